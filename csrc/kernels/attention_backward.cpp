#include "attention_gradients.h"

GENKERNELS_DECLARE_ATTENTION(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// With P the probabilities and delta = sum_j P_ij dP_ij, which is grad_output_i output_i: dP = grad_output V^T,
// dS = P (dP - delta + grad_logsumexp), grad_query = scale dS K, grad_key = scale dS^T Q, grad_value = P^T grad_output
// (Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B.2). With Z the factors of dropout it is Z dP and
// (Z P)^T. The gradients of a block of queries are added up beside the cache, those of keys and values in memory.
template <class T>
struct Backward : Gradients<T, AttentionBackward> {
  using Base = Gradients<T, AttentionBackward>;
  using Base::arguments, Base::of, Base::has_dropout, Base::sums_rows_for_mask, Base::head_columns, Base::value_columns,
      Base::key_blocks, Base::block_keys, Base::block_queries, Base::score_stride, Base::head_stride,
      Base::value_stride, Base::shares, Base::grad_mask;
  using Base::tile, Base::width, Base::adds_in_place;
  using typename Base::A, typename Base::E, typename Base::Team, typename Base::Queries, typename Base::Place;
  static constexpr int64_t kMostQueries = 192;
  static_assert(kMostQueries <= kChain);

  struct Keys {
    E *k, *v;
  };
  // Rows of queries and of grad_output, or of keys and values, as they are multiplied.
  struct Operands {
    Rows<const E> heads, values;
  };
  // A thread's own memory.
  struct Block {
    E *q, *g;                 // [block_queries, ..]; null, as keys, where rows are read as they lie
    E *q_panels, *g_panels;   // transposed, as right operands
    Keys keys;                // of one block; unused where the team keeps all
    E* p;                     // P, then Z P; [block_keys, score_stride] as the next two
    E* e;                     // Z dP, then dS
    E* z;                     // with dropout alone
    E* capped;                // with a softcap alone
    A *shift, *rest, *delta;  // [block_queries]
    A* sums;                  // of P Z dP over the keys, the same
    A* grad_queries;          // [block_queries, ..]; unused in a team
  };
  // A team's memory.
  struct Head {
    Keys keys;
    // Of each block of keys, of this block of queries and the next: members that are done with one begin the other.
    A* parts[2];                 // of grad_query, [key_blocks, block_queries, ..]
    A* mask_sums[2];             // of the gradient of S, [key_blocks, block_queries]; own heads too
    A *grad_keys, *grad_values;  // [keys, ..]; unused where sums go to the results themselves
  };

  const bool keys_lie, values_lie, queries_lie, grads_lie;  // what is multiplied as it lies
  const bool keeps_keys;
  Block* blocks;
  Head* heads;

  Backward(const AttentionBackward& backward, const Runtime& r)
      : Base(backward, r, most_queries(backward.of)),
        keys_lie(lie_well<T, E>(of.key, smaller(of.keys, block_keys), of.head_size)),
        values_lie(lie_well<T, E>(of.value, kTileRows)),
        queries_lie(lie_well<T, E>(of.query, smaller(of.queries, block_queries), of.head_size)),
        grads_lie(lie_well<T, E>(arguments.grad_output, smaller(of.queries, block_queries), of.value_size)),
        keeps_keys(of.keys * (head_stride + value_stride) * int64_t(sizeof(E)) <= 2 * r.cache),
        blocks(allocate<Block>(r, shares)),
        heads(allocate<Head>(r, shares)) {
    const int64_t queries = ceil_div(block_queries, kLanes<E>) * kLanes<E>;
    for (int64_t share = 0; share < shares; ++share) {
      const auto per_query = [&] { return allocate<A>(r, queries); };
      const auto scores = [&] { return allocate<E>(r, block_keys * score_stride); };
      blocks[share] = {queries_lie ? nullptr : allocate<E>(r, block_queries * head_stride),
                       grads_lie ? nullptr : allocate<E>(r, block_queries * value_stride),
                       allocate<E>(r, queries * of.head_size),
                       allocate<E>(r, queries * of.value_size),
                       keeps_keys ? Keys{} : new_keys(block_keys),
                       scores(),
                       scores(),
                       has_dropout ? scores() : nullptr,
                       of.softcap != 0 ? scores() : nullptr,
                       per_query(),
                       per_query(),
                       per_query(),
                       per_query(),
                       allocate<A>(r, block_queries * width(head_columns))};
      if (!this->has_own_memory(share)) continue;
      const auto parts = [&]() -> A* {
        if (share > 0 || !this->has_teams()) return nullptr;
        return allocate<A>(r, key_blocks * block_queries * width(head_columns));
      };
      const auto sums = [&] { return sums_rows_for_mask ? allocate<A>(r, key_blocks * queries) : nullptr; };
      heads[share] = {keeps_keys ? new_keys(of.keys) : Keys{},
                      {parts(), parts()},
                      {sums(), sums()},
                      adds_in_place() ? nullptr : allocate<A>(r, of.keys * width(head_columns)),
                      adds_in_place() ? nullptr : allocate<A>(r, of.keys * width(value_columns))};
    }
  }

  // Of many keys, what a team's members leave for each other is megabytes.
  static int64_t most_queries(const Attention& of) { return of.keys > 4096 ? kMostQueries / 2 : kMostQueries; }
  Keys new_keys(int64_t count) const {
    return {keys_lie ? nullptr : allocate<E>(this->runtime, count * head_stride),
            values_lie ? nullptr : allocate<E>(this->runtime, count * value_stride)};
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
        this->clear_unseen(b, key, count, head_columns, grad_keys);
        this->clear_unseen(b, key, count, value_columns, grad_values);
        if (keeps_keys) copy_keys(b, h, key, count, keys_from(head.keys, key));
      });
    });
    int64_t turn = 0;
    this->each_queries(kv, is_last, [&](const Queries& queries) {
      A* const mask_sums = head.mask_sums[turn];
      A* const parts = team.members > 1 ? head.parts[turn] : nullptr;
      team.each([&](int64_t member) {
        const Block& block = members[member];
        const Operands rows = copy_queries(queries, block);
        this->clear_mask(queries, member, team);
        this->each_place(queries, member, team, [&](const Place& at) {
          const Operands keys = keys_at(at, head, block);
          form_grad_scores(at, keys, block);
          if (sums_rows_for_mask)
            sum_rows(at, block, mask_sums + at.key_block * block_queries);
          else if (grad_mask != nullptr)
            this->add_to_mask(at, block.e);
          if (of.softcap != 0)
            this->each_capped(at, block.capped,
                              [&](int64_t n, auto derivative) { store(block.e + n, load(block.e + n) * derivative); });
          this->add_to_queries(at, block.e, keys.heads, head_columns,
                               parts ? parts + at.key_block * block_queries * width(head_columns) : block.grad_queries,
                               parts || at.key_block == at.first_block);
          this->add_to_keys(at, {block.e, rows.heads}, nullptr, head_columns, A(of.scale), grad_keys);
          this->add_to_keys(at, {block.p, rows.values}, nullptr, value_columns, A(1), grad_values);
        });
      });
      this->meet(team);
      const int64_t first = queries.first_block * block_queries, seen = queries.end_block - queries.first_block;
      const Rows<T> to = rows_of<T>(arguments.grad_query, b, queries.h);
      team.each([&](int64_t member) {
        const A* const from = parts ? parts + first * width(head_columns) : members[member].grad_queries;
        for (int64_t i = member; i < queries.rows; i += team.members)
          this->add_parts(to[queries.query + i], from + i * width(head_columns), parts ? seen : smaller(1, seen),
                          head_columns, A(of.scale));
        if (sums_rows_for_mask) this->add_rows_to_mask(queries, mask_sums + first, seen, member, team.members);
      });
      turn = team.members > 1 ? 1 - turn : 0;
    });
    team.each([&](int64_t member) {
      this->each_key_block(member, team, [&](int64_t key, int64_t count, int64_t) {
        this->narrow_rows(arguments.grad_key, b, h, key, count, of.head_size, grad_keys);
        this->narrow_rows(arguments.grad_value, b, h, key, count, of.value_size, grad_values);
      });
    });
  }

  void copy_keys(int64_t b, int64_t h, int64_t key, int64_t count, const Keys& to) const {
    if (!keys_lie) this->copy_rows(rows_of<T>(of.key, b, h), key, count, of.head_size, to.k, head_stride);
    if (!values_lie) this->copy_rows(rows_of<T>(of.value, b, h), key, count, of.value_size, to.v, value_stride);
  }
  Keys keys_from(const Keys& all, int64_t key) const { return {all.k + key * head_stride, all.v + key * value_stride}; }
  Operands keys_at(const Place& at, const Head& head, const Block& block) const {
    if (!keeps_keys) copy_keys(at.b, at.kv_head, at.key, at.count, block.keys);
    const Keys copied = keeps_keys ? keys_from(head.keys, at.key) : block.keys;
    return {this->rows_at(of.key, keys_lie, at.b, at.kv_head, at.key, copied.k, head_stride),
            this->rows_at(of.value, values_lie, at.b, at.kv_head, at.key, copied.v, value_stride)};
  }

  Operands copy_queries(const Queries& at, const Block& block) const {
    const Operands rows{
        this->take_queries(at, of.query, of.head_size, block.q, head_stride, block.q_panels, queries_lie),
        this->take_queries(at, arguments.grad_output, of.value_size, block.g, value_stride, block.g_panels, grads_lie)};
    this->copy_statistics(at, block.shift, block.rest, block.delta);
    const Rows<const T> output = rows_of<T>(arguments.output, at.b, at.h);
    for (int64_t i = 0; i < at.rows; i += kLanes<A>) {
      Vector<A> products[kLanes<A>] = {};
      for (int64_t n = 0; n < smaller(kLanes<A>, at.rows - i) && !sums_delta(); ++n) {
        const T* const row = output[at.query + i + n];
        const E* const grad = rows.values[i + n];
        for (int64_t c = 0; c < of.value_size; c += kLanes<A>)
          products[n] += load(grad + c) * load(row + c, int(smaller(kLanes<A>, of.value_size - c)));
      }
      store(block.delta + i, sums_of_lanes<A>(products) - load(block.delta + i));
    }
    return rows;
  }
  // Where one block holds all keys, delta is the sum that it stands for: of few keys, dP - delta loses digits that an
  // output, once rounded, does not give back.
  bool sums_delta() const { return key_blocks == 1; }

  void fetch_next(const Place& at, int64_t first, int64_t run) const {
    const KeySpan own = this->share_of(at, first, run, at.rows);
    this->template fetch_rows<true>(rows_of<T>(arguments.grad_query, at.b, at.h),
                                    {at.query + own.begin, at.query + own.end}, of.head_size);
    Base::fetch_next(
        at, first, run,
        [&](int64_t b, int64_t h, const KeySpan& span) {
          this->fetch_rows(rows_of<T>(of.query, b, h), span, of.head_size);
          this->fetch_rows(rows_of<T>(arguments.grad_output, b, h), span, of.value_size);
          if (!sums_delta()) this->fetch_rows(rows_of<T>(arguments.output, b, h), span, of.value_size);
        },
        [&](int64_t b, int64_t h, const KeySpan& span) {
          this->fetch_rows(rows_of<T>(of.key, b, h), span, of.head_size);
          this->fetch_rows(rows_of<T>(of.value, b, h), span, of.value_size);
        });
  }

  // Z P and dS.
  void form_grad_scores(const Place& at, const Operands& keys, const Block& block) const {
    if (has_dropout) this->form_factors(at, block.z);
    this->template form_probabilities<false>(at, keys.heads, block.q_panels, block.shift, block.rest, block.p, block.e,
                                             block.capped, nullptr,
                                             [&](int64_t first, int64_t run) { fetch_next(at, first, run); });
    if (sums_delta()) __builtin_memset(block.sums, 0, size_t(width(at.columns)) * sizeof(A));
    this->for_small_tiles(at, [&]<int kPanel, int kRows, int kVectors>(int64_t panel, int64_t column, int64_t first) {
      Vector<A> sum[kRows][kVectors];
      E *const p = tile(block.p, first, column), *const e = tile(block.e, first, column);
      this->template multiply_rows<kPanel>(at, keys.values, block.g_panels, of.value_size, panel, column, first, sum);
      const E* const z = has_dropout ? tile(block.z, first, column) : nullptr;
      if (z != nullptr)
        for_tile<kRows, kVectors>([&](int i, int v)
                                      GENKERNELS_LAMBDA { sum[i][v] *= load(z + i * score_stride + v * kLanes<A>); });
      if (sums_delta()) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          A* const to = block.sums + column + v * kLanes<A>;
          Vector<A> part = {};
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const int64_t n = i * score_stride + v * kLanes<A>;
            part += sum[i][v] * load(p + n);
            store(e + n, sum[i][v]);
          }
          store(to, load(to) + part);
        }
        return;
      }
      for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
        const int64_t n = i * score_stride + v * kLanes<A>;
        store(e + n, load(p + n) * (sum[i][v] - load(block.delta + column + v * kLanes<A>)));
        if (z != nullptr) store(p + n, load(p + n) * load(z + n));
      });
    });
    if (sums_delta()) take_off_mean(at, block);
  }

  void take_off_mean(const Place& at, const Block& block) const {
    this->for_tiles(at, [&]<int, int kVectors>(int64_t, int64_t column, int64_t first, int64_t run) {
      Vector<A> delta[kVectors];
      for (int v = 0; v < kVectors; ++v)
        delta[v] = load(block.sums + column + v * kLanes<A>) + load(block.delta + column + v * kLanes<A>);
      for (int64_t i = first; i < first + run; ++i)
        for (int v = 0; v < kVectors; ++v) {
          E *const e = tile(block.e, i, column) + v * kLanes<A>, *const to = tile(block.p, i, column) + v * kLanes<A>;
          const Vector<A> p = load(to);
          store(e, p * (load(e) - delta[v]));
          if (has_dropout) store(to, p * load(tile(block.z, i, column) + v * kLanes<A>));
        }
    });
  }

  // The sums of dS over the block's keys, for a mask that all of them share.
  void sum_rows(const Place& at, const Block& block, A* to) const {
    __builtin_memset(to, 0, size_t(block_queries) * sizeof(A));
    this->for_tiles(at, [&]<int, int kVectors>(int64_t, int64_t column, int64_t first, int64_t run) {
      for (int64_t n = column; n < column + kVectors * kLanes<A>; n += kLanes<A>) {
        Vector<A> sum{};
        for (int64_t i = first; i < first + run; ++i) sum += load(tile(block.e, i, n));
        store(to + n, load(to + n) + sum);
      }
    });
  }
};

}  // namespace

void attention_backward(const AttentionBackward& arguments, const Runtime& runtime) {
  if (is_decode(arguments.of) && arguments.grad_mask == nullptr) return attention_decode_backward(arguments, runtime);
  with_type(arguments.of.dtype, [&]<class T>() { Backward<T>(arguments, runtime).run(); });
}

}  // namespace genkernels::GENKERNELS_LEVEL
