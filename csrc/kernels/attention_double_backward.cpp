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
// A block of queries has the scores of all keys at once, as many as stay in the cache, so that none of the twelve
// products is computed twice. The members of a team meet where sums over all keys are known.
template <class T>
struct DoubleBackward : Gradients<T, AttentionDoubleBackward> {
  using Base = Gradients<T, AttentionDoubleBackward>;
  using Base::arguments, Base::of, Base::runtime, Base::has_dropout, Base::sums_rows_for_mask, Base::head_columns,
      Base::value_columns, Base::key_blocks, Base::block_keys, Base::block_queries, Base::score_stride,
      Base::head_stride, Base::value_stride, Base::shares, Base::grad_mask;
  using Base::first_seeing, Base::width, Base::adds_in_place, Base::meet;
  using typename Base::A, typename Base::E, typename Base::Team, typename Base::Queries, typename Base::Place,
      typename Base::Span, typename Base::Factor;
  static constexpr int64_t kMostQueries = 128;
  static_assert(kMostQueries <= kChain);

  // Rows of keys and values, and their cotangents.
  struct Keys {
    E *k, *b, *v, *c;
  };
  // A thread's own memory.
  struct Block {
    E *q, *a, *g;                       // [block_queries, ..]
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
    A* p_sums;  // of a block's keys, [key_blocks, block_queries] as the next four
    A *w_sums, *mean_sums;
    A *t_sums, *mask_sums;        // the second: of the gradient of S
    A *grad_queries, *grad_rows;  // what Q and G get from a block's keys, [key_blocks, block_queries, ..]
    A *grad_keys, *grad_values;   // [keys, ..]; unused where sums go to the results themselves
  };
  Attention of_mask_cotangent;
  const bool has_a, has_b, has_c, has_m, has_w;
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
        keeps_keys(2 * of.keys * (head_stride + value_stride) * int64_t(sizeof(E)) <= 2 * r.cache),
        blocks(allocate<Block>(r, shares)),
        heads(allocate<Head>(r, shares)) {
    of_mask_cotangent.mask = arguments.grad_grad_mask;
    const int64_t queries = ceil_div(block_queries, kLanes<E>) * kLanes<E>;
    for (int64_t share = 0; share < shares; ++share) {
      const auto per_query = [&] { return allocate<A>(r, queries); };
      blocks[share] = {allocate<E>(r, block_queries * head_stride),
                       allocate<E>(r, block_queries * head_stride),
                       allocate<E>(r, block_queries * value_stride),
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
      const auto scores = [&] { return allocate<E>(r, of.keys * score_stride); };
      const auto sums = [&] { return allocate<A>(r, key_blocks * queries); };
      heads[share] = {keeps_keys ? new_keys(of.keys) : Keys{},
                      scores(),
                      scores(),
                      scores(),
                      scores(),
                      has_dropout ? scores() : nullptr,
                      sums(),
                      sums(),
                      sums(),
                      sums(),
                      sums(),
                      allocate<A>(r, key_blocks * block_queries * width(head_columns)),
                      allocate<A>(r, key_blocks * block_queries * width(value_columns)),
                      adds_in_place() ? nullptr : allocate<A>(r, of.keys * width(head_columns)),
                      adds_in_place() ? nullptr : allocate<A>(r, of.keys * width(value_columns))};
    }
  }

  // Half of the cache is for the scores.
  static int64_t most_queries(const Attention& of, const Runtime& r) {
    const int64_t bytes = (of.dropout.threshold ? 5 : 4) * larger(1, of.keys) * int64_t(sizeof(E));
    return larger(kLanes<E>, smaller(kMostQueries, r.cache / 2 / bytes) / kLanes<E> * kLanes<E>);
  }
  Keys new_keys(int64_t count) const {
    const auto rows = [&](int64_t stride) { return allocate<E>(runtime, count * stride); };
    return {rows(head_stride), rows(head_stride), rows(value_stride), rows(value_stride)};
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
        this->clear_unseen(key, count, head_columns, grad_keys);
        this->clear_unseen(key, count, value_columns, grad_values);
        // These sums nothing is added to.
        if (!has_w)
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
        add_up(head.p_sums, block.p);
        mean_of(head.w_sums, block, block.w);
        mean_of(head.mean_sums, block, block.mean);
        for (int64_t i = 0; i < block_queries; ++i) block.mean[i] -= block.grad_logsumexp[i];
        this->each_place(queries, member, team, [&](const Place& at) { form_products(at, head, block); });
      });
      meet(team);
      team.each([&](int64_t member) {
        const Block& block = members[member];
        mean_of(head.t_sums, block, block.t);
        this->each_place(queries, member, team, [&](const Place& at) {
          form_grad_scores(at, head, block);
          if (grad_mask != nullptr && !sums_rows_for_mask) this->add_to_mask(at, at_block(head.t, at));
          add_all(at, head, block, grad_keys, grad_values);
        });
      });
      meet(team);
      team.each([&](int64_t member) { finish_queries(queries, head, members[member], member, team.members); });
    });
    team.each([&](int64_t member) {
      this->each_key_block(member, team, [&](int64_t key, int64_t count, int64_t) {
        this->narrow_rows(arguments.grad_key, b, h, key, count, of.head_size, grad_keys);
        this->narrow_rows(arguments.grad_value, b, h, key, count, of.value_size, grad_values);
      });
    });
  }

  void copy_keys(int64_t b, int64_t h, int64_t key, int64_t count, const Keys& to) const {
    const auto copy = [&](const HeadsInput& from, int64_t size, E* rows, int64_t stride) {
      if (from.data != nullptr) this->copy_rows(rows_of<T>(from, b, h), key, count, size, rows, stride);
    };
    copy(of.key, of.head_size, to.k, head_stride);
    copy(arguments.grad_grad_key, of.head_size, to.b, head_stride);
    copy(of.value, of.value_size, to.v, value_stride);
    copy(arguments.grad_grad_value, of.value_size, to.c, value_stride);
  }
  Keys keys_from(const Keys& all, int64_t key) const {
    return {all.k + key * head_stride, all.b + key * head_stride, all.v + key * value_stride,
            all.c + key * value_stride};
  }
  Keys keys_at(const Place& at, const Head& head, const Block& block) const {
    if (keeps_keys) return keys_from(head.keys, at.key);
    copy_keys(at.b, at.kv_head, at.key, at.count, block.keys);
    return block.keys;
  }

  void copy_queries(const Queries& at, const Block& block) const {
    const auto copy = [&](const HeadsInput& from, int64_t size, E* to, int64_t stride, E* panels) {
      this->take_queries(at, from, size, to, stride, panels, false);
    };
    copy(of.query, of.head_size, block.q, head_stride, block.q_panels);
    if (has_a) copy(arguments.grad_grad_query, of.head_size, block.a, head_stride, block.a_panels);
    copy(arguments.grad_output, of.value_size, block.g, value_stride, block.g_panels);
    this->copy_statistics(at, block.shift, block.rest, block.grad_logsumexp);
  }

  void fetch_next(const Place& at, int64_t first, int64_t run) const {
    const auto fetch = [&](const HeadsInput& from, int64_t b, int64_t h, const Span& span, int64_t size) {
      if (from.data != nullptr) this->fetch_rows(rows_of<T>(from, b, h), span, size);
    };
    Base::fetch_next(
        at, first, run,
        [&](int64_t b, int64_t h, const Span& span) {
          fetch(of.query, b, h, span, of.head_size);
          fetch(arguments.grad_grad_query, b, h, span, of.head_size);
          fetch(arguments.grad_output, b, h, span, of.value_size);
        },
        [&](int64_t b, int64_t h, const Span& span) {
          fetch(of.key, b, h, span, of.head_size);
          fetch(arguments.grad_grad_key, b, h, span, of.head_size);
          fetch(of.value, b, h, span, of.value_size);
          fetch(arguments.grad_grad_value, b, h, span, of.value_size);
        });
  }

  // Calls body.operator()<vectors>(panel, column, first, run) for tiles of keys [first, first + run) and a panel of
  // queries, but for those where no key takes part. A tile of what queries get can begin in the panel before the first
  // query that sees a key: there, too, scores have to be.
  template <class Body>
  GENKERNELS_INLINE void for_tiles(const Place& at, const Body& body) const {
    for (int64_t p = 0; p < at.columns.panels; ++p)
      at.columns.with_width(p, [&]<int kVectors>() {
        const int64_t column = at.columns.first_column(p), end = smaller(at.rows, column + kVectors * kLanes<A>);
        for (int64_t first = 0; first < at.count; first += kRunRows) {
          const int64_t seeing = first_seeing(at, at.key + first);
          if (seeing == at.rows || seeing / kTileRows * kTileRows >= end) break;
          body.template operator()<kVectors>(p, column, first, smaller(kRunRows, at.count - first));
        }
      });
  }
  E* at_block(E* scores, const Place& at) const { return scores + at.key * score_stride; }
  E* tile(E* scores, const Place& at, int64_t first, int64_t column) const {
    return Base::tile(at_block(scores, at), first, column);
  }

  // P, Z (G V^T), W and Z (G C^T) of a block of keys, and the sums over its keys.
  void form_scores(const Place& at, const Head& head, const Block& block) const {
    A* const p_sums = head.p_sums + at.key_block * block_queries;
    A* const w_sums = head.w_sums + at.key_block * block_queries;
    A* const mean_sums = head.mean_sums + at.key_block * block_queries;
    __builtin_memset(p_sums, 0, size_t(block_queries) * sizeof(A));
    __builtin_memset(w_sums, 0, size_t(block_queries) * sizeof(A));
    __builtin_memset(mean_sums, 0, size_t(block_queries) * sizeof(A));
    if (first_seeing(at, at.key) == at.rows) return;
    const Keys keys = keys_at(at, head, block);
    const bool has_mask = of.mask.type != MaskType::none;
    if (has_mask) this->form_mask(at, at_block(head.p, at));
    if (has_dropout) this->form_factors(at, at_block(head.z, at));
    if (has_m) {
      const Scores<T> cotangent(of_mask_cotangent, at.b, at.h);
      Scores<T>::transpose(
          at.rows, at.count, at_block(head.w, at), score_stride,
          [&](int64_t i, int64_t k, int64_t count) { return cotangent.load_mask(at.query + i, at.key + k, count); });
    }
    const A scale = A(of.scale);

    for_tiles(at, [&]<int kVectors>(int64_t panel, int64_t column, int64_t first_of_run, int64_t run) {
      if (panel + 1 == at.columns.panels) fetch_next(at, first_of_run, run);
      const auto form = [&]<int kRows>(int64_t first) {
        typedef Vector<A> Tile[kRows][kVectors];
        const auto multiply_rows = [&](const E* rows, int64_t stride, const E* panels, int64_t size,
                                       Tile& sum) GENKERNELS_LAMBDA {
          multiply_in_chains<kScoreChain<A>, kVectors>(rows + first * stride, stride,
                                                       panels + at.columns.offset(panel, size), size, sum);
        };
        const auto vector_of = [&](E* scores, int i, int v)
                                   GENKERNELS_LAMBDA { return tile(scores, at, first + i, column) + v * kLanes<A>; };
        const auto add_to = [&](A* sums, const Vector<A>(&part)[kVectors]) GENKERNELS_LAMBDA {
          for (int v = 0; v < kVectors; ++v) {
            A* const to = sums + column + v * kLanes<A>;
            store(to, load(to) + part[v]);
          }
        };
        Tile sum;
        multiply_rows(keys.k, head_stride, block.q_panels, of.head_size, sum);
        Vector<A> weights[kVectors] = {};
        this->shift_scores(at, first, column, has_mask ? tile(head.p, at, first, column) : nullptr, block.shift,
                           block.rest, sum, [&](int i, const auto& exponents) GENKERNELS_LAMBDA {
                             const auto p = power_of_base(exponents);
                             for (int v = 0; v < kVectors; ++v) {
                               weights[v] += p[v];
                               store(vector_of(head.p, i, v), p[v]);
                             }
                           });
        add_to(p_sums, weights);
        if (has_w) {
          multiply_rows(keys.v, value_stride, block.g_panels, of.value_size, sum);
          Vector<A> part[kVectors] = {};
          for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
            Vector<A> x = sum[i][v];
            if (has_dropout) x *= load(vector_of(head.z, i, v));
            part[v] += x * load(vector_of(head.p, i, v));
            store(vector_of(head.e, i, v), x);
          });
          add_to(mean_sums, part);

          if (has_a)
            multiply_rows(keys.k, head_stride, block.a_panels, of.head_size, sum);
          else
            for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA { sum[i][v] = Vector<A>{}; });
          if (has_b) {
            Tile other;
            multiply_rows(keys.b, head_stride, block.q_panels, of.head_size, other);
            for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA { sum[i][v] += other[i][v]; });
          }
          Vector<A> w_part[kVectors] = {};
          for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
            Vector<A> x = sum[i][v] * scale;
            if (has_m) x += load(vector_of(head.w, i, v));
            w_part[v] += x * load(vector_of(head.p, i, v));
            store(vector_of(head.w, i, v), x);
          });
          add_to(w_sums, w_part);
        }
        if (has_c) {
          multiply_rows(keys.c, value_stride, block.g_panels, of.value_size, sum);
          for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
            Vector<A> x = sum[i][v];
            if (has_dropout) x *= load(vector_of(head.z, i, v));
            store(vector_of(head.t, i, v), x);
          });
        }
      };
      // Rows left over one by one: for each number of them this would be much code.
      int64_t first = first_of_run;
      for (; first + kTileRows <= first_of_run + run; first += kTileRows) form.template operator()<kTileRows>(first);
      for (; first < first_of_run + run; ++first) form.template operator()<1>(first);
    });
  }

  // The sum of what the blocks of keys have for each query, in their order.
  void add_up(const A* parts, A* to) const {
    for (int64_t i = 0; i < block_queries; i += kLanes<A>) {
      Vector<A> sum{};
      for (int64_t block = 0; block < key_blocks; ++block) sum += load(parts + block * block_queries + i);
      store(to + i, sum);
    }
  }
  // The same of what P weighs. It adds up to one but for what the logsumexp was rounded by, and differences from a mean
  // of other weights would have that error of the mean itself, which may be many times as large as they.
  void mean_of(const A* parts, const Block& block, A* to) const {
    add_up(parts, to);
    for (int64_t i = 0; i < block_queries; i += kLanes<A>) {
      const Vector<A> weights = load(block.p + i);
      store(to + i, load(to + i) / (weights == A(0) ? broadcast(A(1)) : weights));
    }
  }

  // P E, Z P U and P T, with the sums of the last.
  void form_products(const Place& at, const Head& head, const Block& block) const {
    A* const sums = head.t_sums + at.key_block * block_queries;
    __builtin_memset(sums, 0, size_t(block_queries) * sizeof(A));
    for_tiles(at, [&]<int kVectors>(int64_t, int64_t column, int64_t first, int64_t run) {
      for (int64_t n = column; n < column + kVectors * kLanes<A>; n += kLanes<A>) {
        const Vector<A> w_sum = load(block.w + n), mean = load(block.mean + n);
        Vector<A> part{};
        for (int64_t i = 0; i < run; ++i) {
          E* const at_t = tile(head.t, at, first + i, n);
          const Vector<A> p = load(tile(head.p, at, first + i, n));
          Vector<A> t = has_c ? p * load(at_t) : Vector<A>{};
          if (has_w) {
            E *const at_e = tile(head.e, at, first + i, n), *const at_w = tile(head.w, at, first + i, n);
            const Vector<A> e = load(at_e) - mean, pu = p * (load(at_w) - w_sum);
            t += pu * e;
            store(at_e, p * e);
            store(at_w, has_dropout ? pu * load(tile(head.z, at, first + i, n)) : pu);
          }
          part += t;
          store(at_t, t);
        }
        store(sums + n, load(sums + n) + part);
      }
    });
  }

  // The gradient of S, and Z P.
  void form_grad_scores(const Place& at, const Head& head, const Block& block) const {
    A* const sums = head.mask_sums + at.key_block * block_queries;
    if (sums_rows_for_mask) __builtin_memset(sums, 0, size_t(block_queries) * sizeof(A));
    for_tiles(at, [&]<int kVectors>(int64_t, int64_t column, int64_t first, int64_t run) {
      for (int64_t n = column; n < column + kVectors * kLanes<A>; n += kLanes<A>) {
        const Vector<A> t_sum = load(block.t + n);
        Vector<A> part{};
        for (int64_t i = 0; i < run; ++i) {
          E *const at_t = tile(head.t, at, first + i, n), *const at_p = tile(head.p, at, first + i, n);
          const Vector<A> p = load(at_p), x = load(at_t) - p * t_sum;
          store(at_t, x);
          if (sums_rows_for_mask) part += x;
          if (has_dropout) store(at_p, p * load(tile(head.z, at, first + i, n)));
        }
        if (sums_rows_for_mask) store(sums + n, load(sums + n) + part);
      }
    });
  }

  // What a block of queries and a block of keys get from each other.
  void add_all(const Place& at, const Head& head, const Block& block, Rows<A> key_sums, Rows<A> value_sums) const {
    const bool is_seen = first_seeing(at, at.key) < at.rows;
    const Keys keys = is_seen && !keeps_keys ? keys_at(at, head, block)
                      : keeps_keys           ? keys_from(head.keys, at.key)
                                             : Keys{};
    const Rows<const E> k{keys.k, head_stride}, b{keys.b, head_stride};
    const Rows<const E> v{keys.v, value_stride}, c{keys.c, value_stride};
    A* const grad_queries = head.grad_queries + at.key_block * block_queries * width(head_columns);
    A* const grad_rows = head.grad_rows + at.key_block * block_queries * width(value_columns);
    const auto add_to_queries = [&](E* scores, Rows<const E> rows, const Columns<E>& columns, A* to, bool is_first) {
      Base::add_to_queries(at, at_block(scores, at), rows, columns, to, is_first);
    };
    add_to_queries(head.t, k, head_columns, grad_queries, true);
    if (has_b) add_to_queries(head.e, b, head_columns, grad_queries, false);
    if (has_c) add_to_queries(head.p, c, value_columns, grad_rows, true);
    if (has_w) add_to_queries(head.w, v, value_columns, grad_rows, !has_c);
    if (!has_c && !has_w) __builtin_memset(grad_rows, 0, size_t(at.rows * width(value_columns)) * sizeof(A));
    if (!is_seen) return;
    const Factor by_q{at_block(head.t, at), {block.q, head_stride}}, by_a{at_block(head.e, at), {block.a, head_stride}};
    this->add_to_keys(at, by_q, has_a ? &by_a : nullptr, head_columns, A(of.scale), key_sums);
    const Factor by_g{at_block(head.w, at), {block.g, value_stride}};
    if (has_w) this->add_to_keys(at, by_g, nullptr, value_columns, A(1), value_sums);
  }

  // A member's rows of what queries get.
  void finish_queries(const Queries& at, const Head& head, const Block& block, int64_t member, int64_t members) const {
    const Rows<T> grad_query = rows_of<T>(arguments.grad_query, at.b, at.h);
    const Rows<T> grad_grad_output = rows_of<T>(arguments.grad_grad_output, at.b, at.h);
    for (int64_t i = member; i < at.rows; i += members) {
      this->add_parts(grad_query[at.query + i], head.grad_queries + i * width(head_columns), key_blocks, head_columns,
                      A(of.scale));
      this->add_parts(grad_grad_output[at.query + i], head.grad_rows + i * width(value_columns), key_blocks,
                      value_columns, A(1));
      if (arguments.grad_grad_logsumexp != nullptr)
        static_cast<A*>(arguments.grad_grad_logsumexp)[(at.b * of.heads + at.h) * of.queries + at.query + i] =
            block.w[i];
    }
    if (sums_rows_for_mask) this->add_rows_to_mask(at, head.mask_sums, key_blocks, member, members);
  }
};

}  // namespace

void attention_double_backward(const AttentionDoubleBackward& arguments, const Runtime& runtime) {
  switch (arguments.of.dtype) {
    case DType::float32: return DoubleBackward<float>(arguments, runtime).run();
    case DType::float64: return DoubleBackward<double>(arguments, runtime).run();
    case DType::bfloat16: return DoubleBackward<bfloat16>(arguments, runtime).run();
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
