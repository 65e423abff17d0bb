#include "attention_gradients.h"

GENKERNELS_DECLARE_ATTENTION(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// Names are those of the formulas in genkernels/reference/attention.py: of queries Q and G, with the cotangent A of
// grad_query, and of keys K and V, with the cotangents B and C of grad_key and grad_value. With P the probabilities, Z
// the factors of dropout, E = Z (G V^T) - mean, W = scale (A K^T + Q B^T) + M and U = W - rowsum(P W),
//
//   grad of G = (Z P) C + (Z P U) V       grad of Q = scale ((grad of S) K + (P E) B)
//   grad of V = (Z P U)^T G               grad of K = scale ((grad of S)^T Q + (P E)^T A)
//   grad of S = P T - P rowsum(P T), where P T = (P U) E + P Z (G C^T)
//
// A softcap's derivative d, and its own d', are factors of W but for M, of P E but in d' P E W, which the gradient of S
// gets, and of that gradient but in M's.
//
// A block of queries has the scores of all keys at once, as many as stay in the cache, so that none of the twelve
// products is computed twice; those that end in a gradient that is not wanted are not computed. The members of a team
// meet where sums over all keys are known.
template <class T>
struct DoubleBackward : Gradients<T, AttentionDoubleBackward> {
  using Base = Gradients<T, AttentionDoubleBackward>;
  using Base::arguments, Base::of, Base::runtime, Base::has_dropout, Base::sums_rows_for_mask, Base::head_columns,
      Base::value_columns, Base::key_blocks, Base::block_keys, Base::block_queries, Base::score_stride,
      Base::head_stride, Base::value_stride, Base::shares, Base::grad_mask;
  using Base::tile, Base::width, Base::adds_in_place, Base::meet;
  using typename Base::A, typename Base::E, typename Base::Team, typename Base::Queries, typename Base::Place,
      typename Base::Factor;
  static constexpr int64_t kMostQueries = 128;
  static_assert(kMostQueries <= kChain);

  // Rows of keys and values, and their cotangents; null where rows are read as they lie.
  struct Keys {
    E *k, *b, *v, *c;
  };
  struct KeyRows {
    Rows<const E> k, b, v, c;
  };
  // A thread's own memory.
  struct Block {
    E *q, *a, *g;                       // [block_queries, ..]; null, too, where rows are read as they lie
    E *q_panels, *a_panels, *g_panels;  // transposed, as right operands
    Keys keys;                          // of one block; unused where the team keeps all
    A *shift, *rest, *grad_logsumexp;   // [block_queries]
    A* p;                               // of each query the sum of P, as the next are sums over keys
    A *w, *mean, *t;                    // of P W, of P Z (G V^T) less grad_logsumexp, and of P T
  };
  // A team's memory.
  struct Head {
    Keys keys;
    E* p;       // P, then Z P; [keys, score_stride] as the next four
    E* e;       // Z (G V^T), then P E
    E* w;       // W, then Z P U
    E* t;       // Z (G C^T), then P T, then the gradient of S
    E* z;       // with dropout alone
    E* capped;  // with a softcap alone, as the next
    E* bent;    // d' W, then d' P E W
    A* p_sums;  // of a block's keys, [key_blocks, block_queries] as the next four
    A *w_sums, *mean_sums;
    A *t_sums, *mask_sums;        // the second: of the gradient of S
    A *grad_queries, *grad_rows;  // what Q and G get from a block's keys, [key_blocks, block_queries, ..]
    A *grad_keys, *grad_values;   // [keys, ..]; unused where sums go to the results themselves
  };
  Attention of_mask_cotangent;
  const bool has_a, has_b, has_c, has_m, has_w;
  const bool wants_rows, wants_queries, wants_keys, wants_values;
  const bool k_lies, b_lies, v_lies, c_lies, q_lies, a_lies, g_lies;  // as operands
  const bool keeps_keys;
  Block* blocks;
  Head* heads;

  DoubleBackward(const AttentionDoubleBackward& backward, const Runtime& r)
      : Base(backward, r, most_queries(backward.of, r)),
        of_mask_cotangent(of),
        has_a(arguments.grad_grad_query.data != nullptr),
        has_b(arguments.grad_grad_key.data != nullptr),
        has_c(arguments.grad_grad_value.data != nullptr),
        has_m(arguments.grad_grad_mask.type != MaskType::none),
        has_w(has_a || has_b || has_m),
        wants_rows(arguments.grad_grad_output.data != nullptr),
        wants_queries(arguments.grad_query.data != nullptr),
        wants_keys(arguments.grad_key.data != nullptr),
        wants_values(arguments.grad_value.data != nullptr),
        k_lies(lie_well<T, E>(of.key, smaller(of.keys, block_keys), of.head_size)),
        b_lies(lie_well<T, E>(arguments.grad_grad_key, smaller(of.keys, block_keys), of.head_size)),
        v_lies(lie_well<T, E>(of.value, smaller(of.keys, block_keys), of.value_size)),
        c_lies(lie_well<T, E>(arguments.grad_grad_value, smaller(of.keys, block_keys), of.value_size)),
        q_lies(lie_well<T, E>(of.query, smaller(of.queries, block_queries), of.head_size)),
        a_lies(lie_well<T, E>(arguments.grad_grad_query, smaller(of.queries, block_queries), of.head_size)),
        g_lies(lie_well<T, E>(arguments.grad_output, smaller(of.queries, block_queries), of.value_size)),
        keeps_keys(2 * of.keys * (head_stride + value_stride) * int64_t(sizeof(E)) <= 2 * r.cache),
        blocks(allocate<Block>(r, shares)),
        heads(allocate<Head>(r, shares)) {
    of_mask_cotangent.mask = arguments.grad_grad_mask;
    const int64_t queries = ceil_div(block_queries, kLanes<E>) * kLanes<E>;
    for (int64_t share = 0; share < shares; ++share) {
      const auto per_query = [&] { return allocate<A>(r, queries); };
      const auto rows = [&](bool lies, int64_t stride) {
        return lies ? nullptr : allocate<E>(r, block_queries * stride);
      };
      blocks[share] = {rows(q_lies, head_stride),
                       rows(a_lies || !has_a, head_stride),
                       rows(g_lies, value_stride),
                       allocate<E>(r, queries * of.head_size),
                       allocate<E>(r, queries * of.head_size),
                       allocate<E>(r, queries * of.value_size),
                       keeps_keys ? Keys{} : new_keys(block_keys),
                       per_query(),
                       per_query(),
                       per_query(),
                       per_query(),
                       per_query(),
                       per_query(),
                       per_query()};
      if (!this->has_own_memory(share)) continue;
      // One block of memory: of megabytes, each would be rounded up to huge pages of its own.
      const int64_t scores = of.keys * score_stride;
      E* const p = allocate<E>(r, score_blocks(of) * scores);
      E* const capped = of.softcap != 0 ? p + (has_dropout ? 5 : 4) * scores : nullptr;
      const auto sums = [&] { return allocate<A>(r, key_blocks * queries); };
      heads[share] = {keeps_keys ? new_keys(of.keys) : Keys{},
                      p,
                      p + scores,
                      p + 2 * scores,
                      p + 3 * scores,
                      has_dropout ? p + 4 * scores : nullptr,
                      capped,
                      capped != nullptr ? capped + scores : nullptr,
                      sums(),
                      sums(),
                      sums(),
                      sums(),
                      sums(),
                      wants_queries ? allocate<A>(r, key_blocks * block_queries * width(head_columns)) : nullptr,
                      wants_rows ? allocate<A>(r, key_blocks * block_queries * width(value_columns)) : nullptr,
                      adds_in_place() ? nullptr : allocate<A>(r, of.keys * width(head_columns)),
                      adds_in_place() ? nullptr : allocate<A>(r, of.keys * width(value_columns))};
    }
  }

  // Half of the cache is for the scores.
  static int64_t most_queries(const Attention& of, const Runtime& r) {
    const int64_t bytes = score_blocks(of) * larger(1, of.keys) * int64_t(sizeof(E));
    return larger(kLanes<E>, smaller(kMostQueries, r.cache / 2 / bytes) / kLanes<E> * kLanes<E>);
  }
  static int64_t score_blocks(const Attention& of) {
    return (of.dropout.threshold ? 5 : 4) + (of.softcap != 0 ? 2 : 0);
  }
  Keys new_keys(int64_t count) const {
    const auto rows = [&](bool lies, bool is_there, int64_t stride) {
      return lies || !is_there ? nullptr : allocate<E>(runtime, count * stride);
    };
    return {rows(k_lies, true, head_stride), rows(b_lies, has_b, head_stride), rows(v_lies, true, value_stride),
            rows(c_lies, has_c, value_stride)};
  }
  void run() const {
    this->run_heads([&](int64_t kv, int64_t share, const Team& team, bool is_last) {
      run_head(kv, heads[share], blocks + share, team, is_last);
    });
  }

  void run_head(int64_t kv, const Head& head, const Block* members, const Team& team, bool is_last) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads;
    const Rows<A> grad_keys = this->key_sums(b, h, head.grad_keys);
    const Rows<A> grad_values = this->value_sums(b, h, head.grad_values);
    team.each([&](int64_t member) {
      this->each_key_block(member, team, [&](int64_t key, int64_t count, int64_t) {
        if (wants_keys) this->clear_unseen(b, key, count, head_columns, grad_keys);
        if (wants_values) this->clear_unseen(b, key, count, value_columns, grad_values);
        // These sums nothing is added to.
        if (wants_values && !has_w)
          for (int64_t k = key; k < key + count; ++k)
            __builtin_memset(grad_values[k], 0, size_t(of.value_size) * sizeof(A));
        if (keeps_keys) copy_keys(b, h, key, count, keys_from(head.keys, key));
      });
    });
    this->each_queries(kv, is_last, [&](const Queries& queries) {
      team.each([&](int64_t member) {
        copy_queries(queries, members[member]);
        this->each_place(queries, member, team, [&](const Place& at) { form_scores(at, head, members[member]); });
      });
      meet(team);
      team.each([&](int64_t member) {
        const Block& block = members[member];
        add_up(queries, head.p_sums, block.p);
        mean_of(queries, head.w_sums, block, block.w);
        mean_of(queries, head.mean_sums, block, block.mean);
        for (int64_t i = 0; i < block_queries; ++i) block.mean[i] -= block.grad_logsumexp[i];
        this->each_place(queries, member, team, [&](const Place& at) { form_products(at, head, block); });
      });
      meet(team);
      team.each([&](int64_t member) {
        const Block& block = members[member];
        mean_of(queries, head.t_sums, block, block.t);
        this->clear_mask(queries, member, team);
        this->each_place(queries, member, team, [&](const Place& at) {
          form_grad_scores(at, head, block);
          if (grad_mask != nullptr && !sums_rows_for_mask) this->add_to_mask(at, at_block(head.t, at));
          if (of.softcap != 0) bend(at, head);
          add_all(at, head, block, grad_keys, grad_values);
        });
      });
      meet(team);
      team.each([&](int64_t member) { finish_queries(queries, head, members[member], member, team.members); });
    });
    team.each([&](int64_t member) {
      this->each_key_block(member, team, [&](int64_t key, int64_t count, int64_t) {
        if (wants_keys) this->narrow_rows(arguments.grad_key, b, h, key, count, of.head_size, grad_keys);
        if (wants_values) this->narrow_rows(arguments.grad_value, b, h, key, count, of.value_size, grad_values);
      });
    });
  }

  void copy_keys(int64_t b, int64_t h, int64_t key, int64_t count, const Keys& to) const {
    const auto copy = [&](const HeadsInput& from, bool lies, int64_t size, E* rows, int64_t stride) {
      if (from.data != nullptr && !lies) this->copy_rows(rows_of<T>(from, b, h), key, count, size, rows, stride);
    };
    copy(of.key, k_lies, of.head_size, to.k, head_stride);
    copy(arguments.grad_grad_key, b_lies, of.head_size, to.b, head_stride);
    copy(of.value, v_lies, of.value_size, to.v, value_stride);
    copy(arguments.grad_grad_value, c_lies, of.value_size, to.c, value_stride);
  }
  Keys keys_from(const Keys& all, int64_t key) const {
    return {all.k + key * head_stride, all.b + key * head_stride, all.v + key * value_stride,
            all.c + key * value_stride};
  }
  KeyRows keys_at(const Place& at, const Head& head, const Block& block) const {
    if (!keeps_keys) copy_keys(at.b, at.kv_head, at.key, at.count, block.keys);
    const Keys copied = keeps_keys ? keys_from(head.keys, at.key) : block.keys;
    const auto rows = [&](const HeadsInput& from, bool lies, const E* copy, int64_t stride) {
      return this->rows_at(from, lies, at.b, at.kv_head, at.key, copy, stride);
    };
    return {rows(of.key, k_lies, copied.k, head_stride), rows(arguments.grad_grad_key, b_lies, copied.b, head_stride),
            rows(of.value, v_lies, copied.v, value_stride),
            rows(arguments.grad_grad_value, c_lies, copied.c, value_stride)};
  }

  void copy_queries(const Queries& at, const Block& block) const {
    this->take_queries(at, of.query, of.head_size, block.q, head_stride, block.q_panels, q_lies);
    if (has_a)
      this->take_queries(at, arguments.grad_grad_query, of.head_size, block.a, head_stride, block.a_panels, a_lies);
    this->take_queries(at, arguments.grad_output, of.value_size, block.g, value_stride, block.g_panels, g_lies);
    this->copy_statistics(at, block.shift, block.rest, block.grad_logsumexp);
  }

  void fetch_next(const Place& at, int64_t first, int64_t run) const {
    const auto fetch = [&](const HeadsInput& from, int64_t b, int64_t h, const KeySpan& span, int64_t size) {
      if (from.data != nullptr) this->fetch_rows(rows_of<T>(from, b, h), span, size);
    };
    const KeySpan own = this->share_of(at, first, run, at.rows);
    const auto fetch_results = [&](const HeadsOutput& to, int64_t size) {
      const KeySpan rows{at.query + own.begin, at.query + own.end};
      if (to.data != nullptr) this->template fetch_rows<true>(rows_of<T>(to, at.b, at.h), rows, size);
    };
    fetch_results(arguments.grad_query, of.head_size);
    fetch_results(arguments.grad_grad_output, of.value_size);
    Base::fetch_next(
        at, first, run,
        [&](int64_t b, int64_t h, const KeySpan& span) {
          fetch(of.query, b, h, span, of.head_size);
          fetch(arguments.grad_grad_query, b, h, span, of.head_size);
          fetch(arguments.grad_output, b, h, span, of.value_size);
        },
        [&](int64_t b, int64_t h, const KeySpan& span) {
          fetch(of.key, b, h, span, of.head_size);
          fetch(arguments.grad_grad_key, b, h, span, of.head_size);
          fetch(of.value, b, h, span, of.value_size);
          fetch(arguments.grad_grad_value, b, h, span, of.value_size);
        });
  }

  E* at_block(E* scores, const Place& at) const { return scores + at.key * score_stride; }

  // P, Z (G V^T), W and Z (G C^T) of a block of keys, and the sums over its keys. A loop for each of them: two tiles at
  // a time would not stay in registers.
  void form_scores(const Place& at, const Head& head, const Block& block) const {
    A* const p_sums = head.p_sums + at.key_block * block_queries;
    A* const w_sums = head.w_sums + at.key_block * block_queries;
    A* const mean_sums = head.mean_sums + at.key_block * block_queries;
    const auto clear = [&](A* sums) { __builtin_memset(sums, 0, size_t(block_queries) * sizeof(A)); };
    clear(w_sums);
    clear(mean_sums);
    const KeyRows keys = keys_at(at, head, block);
    E *const p = at_block(head.p, at), *const w = at_block(head.w, at);
    if (has_dropout) this->form_factors(at, at_block(head.z, at));
    this->template form_probabilities<true>(at, keys.k, block.q_panels, block.shift, block.rest, p,
                                            at_block(head.e, at), at_block(head.capped, at), p_sums,
                                            [&](int64_t first, int64_t run) { fetch_next(at, first, run); });
    if (has_w) multiply_by_g<true>(at, head, block, keys.v, at_block(head.e, at), mean_sums);
    if (has_c) multiply_by_g<false>(at, head, block, keys.c, at_block(head.t, at), nullptr);
    if (!has_w) return;
    if (has_m) {
      const Scores<T> cotangent(of_mask_cotangent, at.b, at.h);
      Scores<T>::transpose(at.rows, at.count, w, score_stride, [&](int64_t i, int64_t k, int64_t count) {
        return cotangent.load_mask(at.query + i, at.key + k, count);
      });
    }
    const A scale = A(of.scale);
    this->for_small_tiles(at, [&]<int kPanel, int kRows, int kVectors>(int64_t panel, int64_t column, int64_t first) {
      Vector<A> sum[kRows][kVectors] = {}, part[kVectors] = {};
      E* const to = tile(w, first, column);
      const E* const weights = tile(p, first, column);
      if (has_a) this->template add_rows<kPanel>(at, keys.k, block.a_panels, of.head_size, panel, column, first, sum);
      if (has_b) this->template add_rows<kPanel>(at, keys.b, block.q_panels, of.head_size, panel, column, first, sum);
      A factor = scale;
      if (of.softcap != 0) {
        const E* const capped = tile(at_block(head.capped, at), first, column);
        E* const bent = tile(at_block(head.bent, at), first, column);
        for_copy(sum, [&](auto& copy) {
          for (int i = 0; i < kRows; ++i)
            for (int v = 0; v < kVectors; ++v) {
              const int64_t n = i * score_stride + v * kLanes<A>;
              copy[i][v] *= scale * Scores<T>::derivative(load(capped + n));
              store(bent + n, copy[i][v] * load(capped + n) * A(-2 / of.softcap));
            }
        });
        factor = 1;
      }
      for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
        const int64_t n = i * score_stride + v * kLanes<A>;
        const Vector<A> x = has_m ? sum[i][v] * factor + load(to + n) : sum[i][v] * factor;
        part[v] += x * load(weights + n);
        store(to + n, x);
      });
      this->add_to_sums(w_sums + column, part);
    });
  }
  // to = Z (G rows^T); with kSums what P makes of it is added to `sums`.
  template <bool kSums>
  void multiply_by_g(const Place& at, const Head& head, const Block& block, Rows<const E> rows, E* to, A* sums) const {
    E* const p = at_block(head.p, at);
    this->for_small_tiles(at, [&]<int kPanel, int kRows, int kVectors>(int64_t panel, int64_t column, int64_t first) {
      Vector<A> sum[kRows][kVectors], part[kVectors] = {};
      this->template multiply_rows<kPanel>(at, rows, block.g_panels, of.value_size, panel, column, first, sum);
      if (has_dropout) {
        const E* const z = tile(at_block(head.z, at), first, column);
        for_tile<kRows, kVectors>([&](int i, int v)
                                      GENKERNELS_LAMBDA { sum[i][v] *= load(z + i * score_stride + v * kLanes<A>); });
      }
      for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
        const int64_t n = i * score_stride + v * kLanes<A>;
        if (kSums) part[v] += sum[i][v] * load(tile(p, first, column) + n);
        store(tile(to, first, column) + n, sum[i][v]);
      });
      if (kSums) this->add_to_sums(sums + column, part);
    });
  }

  // The sum of what the blocks of keys have for each query, in their order.
  void add_up(const Queries& at, const A* parts, A* to) const {
    for (int64_t i = 0; i < block_queries; i += kLanes<A>) {
      Vector<A> sum{};
      for (int64_t block = at.first_block; block < at.end_block; ++block)
        sum += load(parts + block * block_queries + i);
      store(to + i, sum);
    }
  }
  // The same of what P weighs. It adds up to one but for what the logsumexp was rounded by, and differences from a mean
  // of other weights would have that error of the mean itself, which may be many times as large as they.
  void mean_of(const Queries& at, const A* parts, const Block& block, A* to) const {
    add_up(at, parts, to);
    for (int64_t i = 0; i < block_queries; i += kLanes<A>) {
      const Vector<A> weights = load(block.p + i);
      store(to + i, load(to + i) / (weights == A(0) ? broadcast(A(1)) : weights));
    }
  }

  // P E, Z P U and P T, with the sums of the last.
  void form_products(const Place& at, const Head& head, const Block& block) const {
    A* const sums = head.t_sums + at.key_block * block_queries;
    __builtin_memset(sums, 0, size_t(block_queries) * sizeof(A));
    E *const p = at_block(head.p, at), *const e = at_block(head.e, at), *const w = at_block(head.w, at);
    E *const t = at_block(head.t, at), *const z = has_dropout ? at_block(head.z, at) : nullptr;
    E* const bent = of.softcap != 0 ? at_block(head.bent, at) : nullptr;
    this->for_tiles(at, [&]<int, int kVectors>(int64_t, int64_t column, int64_t first, int64_t run) {
      Vector<A> w_sum[kVectors], mean[kVectors], part[kVectors] = {};
      for (int v = 0; v < kVectors; ++v) {
        w_sum[v] = load(block.w + column + v * kLanes<A>);
        mean[v] = load(block.mean + column + v * kLanes<A>);
      }
      for (int64_t i = first; i < first + run; ++i)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          const int64_t n = i * score_stride + column + v * kLanes<A>;
          const Vector<A> weight = load(p + n);
          Vector<A> x = has_c ? weight * load(t + n) : Vector<A>{};
          if (has_w) {
            const Vector<A> difference = load(e + n) - mean[v], pu = weight * (load(w + n) - w_sum[v]);
            x += pu * difference;
            store(e + n, weight * difference);
            if (bent != nullptr) store(bent + n, load(bent + n) * load(e + n));
            store(w + n, has_dropout ? pu * load(z + n) : pu);
          }
          part[v] += x;
          store(t + n, x);
        }
      this->add_to_sums(sums + column, part);
    });
  }

  // The gradient of S, and Z P.
  void form_grad_scores(const Place& at, const Head& head, const Block& block) const {
    A* const sums = head.mask_sums + at.key_block * block_queries;
    if (sums_rows_for_mask) __builtin_memset(sums, 0, size_t(block_queries) * sizeof(A));
    E *const p = at_block(head.p, at), *const t = at_block(head.t, at);
    E* const z = has_dropout ? at_block(head.z, at) : nullptr;
    this->for_tiles(at, [&]<int, int kVectors>(int64_t, int64_t column, int64_t first, int64_t run) {
      Vector<A> t_sum[kVectors], part[kVectors] = {};
      for (int v = 0; v < kVectors; ++v) t_sum[v] = load(block.t + column + v * kLanes<A>);
      for (int64_t i = first; i < first + run; ++i)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          const int64_t n = i * score_stride + column + v * kLanes<A>;
          const Vector<A> weight = load(p + n), x = load(t + n) - weight * t_sum[v];
          part[v] += x;
          store(t + n, x);
          if (has_dropout) store(p + n, weight * load(z + n));
        }
      if (sums_rows_for_mask) this->add_to_sums(sums + column, part);
    });
  }

  // What a softcap makes of the gradient of S and of P E.
  void bend(const Place& at, const Head& head) const {
    E *const t = at_block(head.t, at), *const e = at_block(head.e, at), *const bent = at_block(head.bent, at);
    this->each_capped(at, at_block(head.capped, at), [&](int64_t n, auto d) {
      const Vector<A> x = load(t + n) * d;
      store(t + n, has_w ? x + load(bent + n) : x);
      if (has_w) store(e + n, load(e + n) * d);
    });
  }

  // What a block of queries and a block of keys get from each other.
  void add_all(const Place& at, const Head& head, const Block& block, Rows<A> key_sums, Rows<A> value_sums) const {
    const KeyRows keys = keys_at(at, head, block);
    const auto add_to_queries = [&](E* scores, Rows<const E> rows, const Columns<E>& columns, A* to, bool is_first) {
      Base::add_to_queries(at, at_block(scores, at), rows, columns, to + at.key_block * block_queries * width(columns),
                           is_first);
    };
    if (wants_queries) {
      add_to_queries(head.t, keys.k, head_columns, head.grad_queries, true);
      if (has_b) add_to_queries(head.e, keys.b, head_columns, head.grad_queries, false);
    }
    if (wants_rows) {
      if (has_c) add_to_queries(head.p, keys.c, value_columns, head.grad_rows, true);
      if (has_w) add_to_queries(head.w, keys.v, value_columns, head.grad_rows, !has_c);
      if (!has_c && !has_w)
        __builtin_memset(head.grad_rows + at.key_block * block_queries * width(value_columns), 0,
                         size_t(at.rows * width(value_columns)) * sizeof(A));
    }
    const auto queries = [&](const HeadsInput& from, bool lies, const E* copied, int64_t stride) {
      return this->rows_at(from, lies, at.b, at.h, at.query, copied, stride);
    };
    const Factor by_q{at_block(head.t, at), queries(of.query, q_lies, block.q, head_stride)};
    const Factor by_a{at_block(head.e, at), queries(arguments.grad_grad_query, a_lies, block.a, head_stride)};
    const Factor by_g{at_block(head.w, at), queries(arguments.grad_output, g_lies, block.g, value_stride)};
    if (wants_keys) this->add_to_keys(at, by_q, has_a ? &by_a : nullptr, head_columns, A(of.scale), key_sums);
    if (wants_values && has_w) this->add_to_keys(at, by_g, nullptr, value_columns, A(1), value_sums);
  }

  // A member's rows of what queries get.
  void finish_queries(const Queries& at, const Head& head, const Block& block, int64_t member, int64_t members) const {
    const int64_t first = at.first_block * block_queries, seen = at.end_block - at.first_block;
    const Rows<T> grad_query = rows_of<T>(arguments.grad_query, at.b, at.h);
    const Rows<T> grad_grad_output = rows_of<T>(arguments.grad_grad_output, at.b, at.h);
    for (int64_t i = member; i < at.rows; i += members) {
      if (wants_queries)
        this->add_parts(grad_query[at.query + i], head.grad_queries + (first + i) * width(head_columns), seen,
                        head_columns, A(of.scale));
      if (wants_rows)
        this->add_parts(grad_grad_output[at.query + i], head.grad_rows + (first + i) * width(value_columns), seen,
                        value_columns, A(1));
      if (arguments.grad_grad_logsumexp != nullptr)
        static_cast<A*>(arguments.grad_grad_logsumexp)[row_index(of, at.b, at.h, at.query + i)] = block.w[i];
    }
    if (sums_rows_for_mask) this->add_rows_to_mask(at, head.mask_sums + first, seen, member, members);
  }
};

}  // namespace

void attention_double_backward(const AttentionDoubleBackward& arguments, const Runtime& runtime) {
  with_type(arguments.of.dtype, [&]<class T>() { DoubleBackward<T>(arguments, runtime).run(); });
}

}  // namespace genkernels::GENKERNELS_LEVEL
