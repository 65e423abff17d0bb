#include "attention_scores.h"

GENKERNELS_DECLARE_ATTENTION(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// Blocks of queries go through the keys in blocks (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 1). A
// row's exponents are relative to `most`: 0, or the first scores' maximum if that is farther than kSlack from 0, or a
// later one that exceeds it by kSlack. So most tiles need no reduction, and sums are kept by lanes until the end.
//
// Where there are heads enough, each thread has heads of its own, which it packs for itself. The heads left over are
// packed by all threads, which then take blocks of queries in turns, the longest first.
template <class T>
struct Forward {
  using E = Operand<T>;
  using A = Accumulator<T>;
  static constexpr int64_t kBlockQueries = 48;
  static constexpr int64_t kScoreStride = kBlockKeys + 64 / int64_t(sizeof(E));
  static constexpr A kSlack = sizeof(A) == 8 ? 0 : 16;  // digits count in float64

  // A thread's own block.
  struct Block {
    E* queries;       // [kBlockQueries, query_stride]
    E* scores;        // [kBlockQueries, kScoreStride], later base^(score - most)
    A* outputs;       // [kBlockQueries, output_stride]
    A* totals;        // [kBlockQueries, lanes] sums of the scores' exponentials
    A* most;          // [kBlockQueries]
    bool* has_most;   // [kBlockQueries] whether a key took part so far
    bool* have_most;  // [kBlockQueries / kTileRows] whether find_most() is done with all rows of a tile
    E* keys;          // of a head of its own
    E* values;
  };

  const AttentionForward& arguments;
  const Attention& of;
  const Runtime& runtime;
  const PackedHead<T, E> packed;
  const int64_t groups, query_blocks, kv_count, shares, own_heads;  // own_heads: of each thread
  const int64_t query_stride, output_stride;
  const Barrier barrier;
  E *shared_keys, *shared_values;
  int64_t* next_item;
  Block* blocks;

  Forward(const AttentionForward& forward, const Runtime& r)
      : arguments(forward),
        of(forward.of),
        runtime(r),
        packed(of.keys, of.head_size, of.value_size),
        groups(of.heads / larger(1, of.kv_heads)),
        query_blocks(ceil_div(of.queries, kBlockQueries)),
        kv_count(of.batch * of.kv_heads),
        shares(larger(1, smaller(r.threads, kv_count * groups * query_blocks))),
        own_heads(kv_count / shares),
        query_stride(staged_stride<E>(of.head_size)),
        output_stride(packed.values.vectors * kLanes<A>),
        barrier(r, shares),
        next_item(allocate<int64_t>(r, 1)),
        blocks(allocate<Block>(r, shares)) {
    *next_item = 0;
    const int64_t left_over = kv_count - own_heads * shares;
    shared_keys = left_over ? allocate<E>(r, left_over * packed.transposed_size()) : nullptr;
    shared_values = left_over ? allocate<E>(r, left_over * packed.rows_size()) : nullptr;
    for (int64_t share = 0; share < shares; ++share)
      blocks[share] = {allocate<E>(r, kBlockQueries * query_stride),
                       allocate<E>(r, kBlockQueries * kScoreStride),
                       allocate<A>(r, kBlockQueries * output_stride),
                       allocate<A>(r, kBlockQueries * kLanes<A>),
                       allocate<A>(r, kBlockQueries),
                       allocate<bool>(r, kBlockQueries),
                       allocate<bool>(r, kBlockQueries / kTileRows),
                       own_heads ? allocate<E>(r, packed.transposed_size()) : nullptr,
                       own_heads ? allocate<E>(r, packed.rows_size()) : nullptr};
  }

  void run() const {
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      for (int64_t share = first; share < last; ++share)
        for (int64_t kv = share * own_heads; kv < (share + 1) * own_heads; ++kv) run_own_head(kv, blocks[share]);
      const int64_t first_shared = own_heads * shares, left_over = kv_count - first_shared;
      if (left_over == 0) return;
      const int64_t key_blocks = ceil_div(of.keys, kBlockKeys);
      for (int64_t share = first; share < last; ++share)
        for (int64_t n = share; n < left_over * key_blocks; n += shares)
          pack(first_shared + n / key_blocks, n % key_blocks * kBlockKeys, keys_of(n / key_blocks),
               values_of(n / key_blocks));
      barrier.wait(last - first, 1);
      const int64_t items = groups * query_blocks;
      for (int64_t n; (n = __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED)) < left_over * items;) {
        const int64_t kv = n / items;
        run_item(first_shared + kv, n % items, keys_of(kv), values_of(kv), blocks[first]);
      }
    });
  }

  E* keys_of(int64_t shared) const { return shared_keys + shared * packed.transposed_size(); }
  E* values_of(int64_t shared) const { return shared_values + shared * packed.rows_size(); }

  void pack(int64_t kv, int64_t first_key, E* keys, E* values) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads;
    packed.pack_transposed(rows_of<T>(of.key, b, h), first_key, keys);
    packed.pack_rows(rows_of<T>(of.value, b, h), first_key, values);
  }

  void run_own_head(int64_t kv, const Block& block) const {
    for (int64_t key = 0; key < of.keys; key += kBlockKeys) pack(kv, key, block.keys, block.values);
    for (int64_t n = 0; n < groups * query_blocks; ++n) run_item(kv, n, block.keys, block.values, block);
  }

  // The blocks that see most keys come first.
  void run_item(int64_t kv, int64_t n, const E* keys, const E* values, const Block& block) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads * groups + n % groups;
    const int64_t first = (query_blocks - 1 - n / groups) * kBlockQueries;
    run_block(b, h, first, smaller(kBlockQueries, of.queries - first), keys, values, block);
  }

  void run_block(int64_t b, int64_t h, int64_t query, int64_t rows, const E* keys, const E* values,
                 const Block& block) const {
    const Scores<T> scores(of, b, h);
    const Rows<const T> from = rows_of<T>(of.query, b, h);
    const Rows<const E> queries =
        stage<E, T>(block.queries, query_stride, rows, of.head_size, [&](int64_t i) { return from[query + i]; });
    // What the next block reads and what this one writes last are on their way meanwhile.
    const Rows<T> output = rows_of<T>(arguments.output, b, h);
    for (int64_t i = 0; i < rows; ++i) {
      if (query + i >= kBlockQueries) prefetch<false>(from[query + i - kBlockQueries], of.head_size);
      prefetch<true>(output[query + i], of.value_size);
    }
    __builtin_memset(block.most, 0, sizeof(A) * kBlockQueries);
    __builtin_memset(block.has_most, 0, sizeof(bool) * kBlockQueries);
    __builtin_memset(block.have_most, 0, sizeof(bool) * kBlockQueries / kTileRows);
    __builtin_memset(block.totals, 0, size_t(rows * kLanes<A>) * sizeof(A));
    __builtin_memset(block.outputs, 0, size_t(rows * output_stride) * sizeof(A));
    const int64_t end = scores.visible(query + rows - 1);
    for (int64_t key = 0; key < end; key += kBlockKeys) {
      const Columns<E> columns = packed.columns(key);
      for (int64_t p = 0; p < columns.panels; ++p) {
        const int64_t column = columns.first_column(p);
        if (key + column >= end) break;
        // The first tile of rows that sees a key of the panel.
        int64_t skipped = 0;
        while (skipped + kTileRows < rows && scores.visible(query + skipped + kTileRows - 1) <= key + column)
          skipped += kTileRows;
        columns.with_width(p, [&]<int kPanel>() {
          const E* const panel = packed.transposed_panel(keys, key, p);
          for_row_tiles(rows - skipped, [&]<int kRows>(int64_t at) {
            const int64_t row = skipped + at;
            with_vectors<A, kRows, kPanel>(scores.visible(query + row + kRows - 1) - key - column, [&]<int kVectors>() {
              Vector<A> sum[kRows][kVectors];
              multiply_in_chains<kScoreChain<A>, kPanel>(queries[row], queries.stride, panel, of.head_size, sum);
              A scale = scores.scale;
              if (scores.needs_mask(query + row, key + column + kVectors * kLanes<A>)) {
                scores.apply_mask(query + row, key + column, sum);
                scale = 1;
              }
              exponentiate(block, row, column, scale, sum);
            });
          });
        });
      }
      if (of.dropout.threshold)
        scores.template drop<E>(query, rows, key, columns.count, Rows<E>{block.scores, kScoreStride});
      add_values(scores, block, query, rows, key, columns.count, values);
    }
    finish(b, h, query, rows, block);
  }

  // Makes the scores of a tile base^(score - most), and adds them up.
  template <int kRows, int kVectors>
  GENKERNELS_INLINE void exponentiate(const Block& block, int64_t first, int64_t column, A scale,
                                      Vector<A> (&x)[kRows][kVectors]) const {
    bool& have_most = block.have_most[first / kTileRows];
    if (!have_most) {
      have_most = true;
      for_copy(x, [&](auto& copy) {
        for (int i = 0; i < kRows; ++i) have_most &= find_most<kVectors>(block, first + i, column, scale, copy[i]);
      });
    }
    Vector<A> tops[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector<A> most = broadcast(block.most[first + i]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        x[i][v] = x[i][v] * scale - most;
        tops[v] = i > 0 && tops[v] > x[i][v] ? tops[v] : x[i][v];
      }
    }
    if (any_above(top_of(tops), kSlack))
      for_copy(x, [&](auto& copy) {
        for (int i = 0; i < kRows; ++i) raise<kVectors>(block, first + i, column, copy[i]);
      });
    constexpr int kTogether = kRows % 2 ? 1 : 2;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i += kTogether) {
      const auto e = power_of_base(
          several<kTogether * kVectors>([&](int j) GENKERNELS_LAMBDA { return x[i + j / kVectors][j % kVectors]; }));
#pragma GCC unroll 2
      for (int j = 0; j < kTogether; ++j) {
        A* const total = block.totals + (first + i + j) * kLanes<A>;
        E* const to = block.scores + (first + i + j) * kScoreStride + column;
        Vector<A> added = e[j * kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          if (v > 0) added += e[j * kVectors + v];
          store(to + v * kLanes<A>, e[j * kVectors + v]);
        }
        store(total, load(total) + added);
      }
    }
  }

  template <bool kForWriting, class S>
  static GENKERNELS_INLINE void prefetch(S* row, int64_t count) {
    constexpr int64_t kLine = 64 / int64_t(sizeof(S));
    for (int64_t n = 0; n < count; n += kLine) __builtin_prefetch(row + n, kForWriting, 2);
  }

  template <int kVectors>
  static GENKERNELS_INLINE Vector<A> top_of(const Vector<A> (&x)[kVectors]) {
    Vector<A> top = x[0];
#pragma GCC unroll 3
    for (int v = 1; v < kVectors; ++v) top = x[v] > top ? x[v] : top;
    return top;
  }

  // What is subtracted from a row's scores: nothing where the first of them are small anyway. Where they are far below,
  // as those of masks of -1e9, each tile looks for larger ones, since beside such a number they lose their digits.
  // Whether this need not be called again.
  template <int kVectors>
  __attribute__((noinline)) bool find_most(const Block& block, int64_t i, int64_t column, A scale,
                                           const Vector<A> (&scores)[kVectors]) const {
    bool& has_most = block.has_most[i];
    A& most = block.most[i];
    if (has_most && most >= -kSlack) return true;
    Vector<A> scaled[kVectors];
    for (int v = 0; v < kVectors; ++v) scaled[v] = scores[v] * scale;
    const Vector<A> top = top_of(scaled);
    const A found = any_above(top, -kSlack) && !any_above(top, kSlack) ? A(0) : max_of_lanes<A>(top);
    if (!(found > (has_most ? most : -A(__builtin_inf())))) return false;
    if (has_most) rescale(block, i, column, most - found);
    most = found;
    has_most = true;
    return most >= -kSlack;
  }

  // A score that exceeds `most` by so much becomes it, and what was computed of the row follows.
  template <int kVectors>
  __attribute__((noinline)) void raise(const Block& block, int64_t i, int64_t column, Vector<A> (&x)[kVectors]) const {
    const Vector<A> top = top_of(x);
    if (!any_above(top, kSlack)) return;
    const A most = block.most[i], raised = most + max_of_lanes<A>(top), rise = raised - most;
    block.most[i] = raised;
    for (int v = 0; v < kVectors; ++v) x[v] -= rise;
    rescale(block, i, column, -rise);
  }

  // Multiplies what was computed of a row, of its scores the first `column`, by base^exponent.
  void rescale(const Block& block, int64_t i, int64_t column, A exponent) const {
    const Vector<A> factor = power_of_base(several<1>([&](int) { return broadcast(exponent); }))[0];
    A* const total = block.totals + i * kLanes<A>;
    store(total, load(total) * factor);
    A* const output = block.outputs + i * output_stride;
    for (int64_t n = 0; n < output_stride; n += kLanes<A>) store(output + n, load(output + n) * factor);
    E* const scores = block.scores + i * kScoreStride;
    for (int64_t n = 0; n < column; n += kLanes<A>) store(scores + n, load(scores + n) * factor);
  }

  void add_values(const Scores<T>& scores, const Block& block, int64_t query, int64_t rows, int64_t key, int64_t keys,
                  const E* values) const {
    for (int64_t p = 0; p < packed.values.panels; ++p)
      packed.values.with_width(p, [&]<int kVectors>() {
        const E* const panel = packed.rows_panel(values, key, p);
        for_row_tiles(rows, [&]<int kRows>(int64_t first) {
          const int64_t count = smaller(keys, scores.visible(query + first + kRows - 1) - key);
          if (count <= 0) return;
          Vector<A> sum[kRows][kVectors];
          multiply_in_chains<kKeyChain<A>, kVectors>(block.scores + first * kScoreStride, kScoreStride, panel, count,
                                                     sum);
          A* const to = block.outputs + first * output_stride + packed.values.first_column(p);
          for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
            A* const at = to + i * output_stride + v * kLanes<A>;
            store(at, load(at) + sum[i][v]);
          });
        });
      });
  }

  void finish(int64_t b, int64_t h, int64_t query, int64_t rows, const Block& block) const {
    const Rows<T> output = rows_of<T>(arguments.output, b, h);
    double totals[kBlockQueries], logarithms[kBlockQueries];
    A factors[kBlockQueries];
    for (int64_t first = 0; first < rows; first += kLanes<A>) {
      Vector<A> lanes[kLanes<A>];
      for (int i = 0; i < kLanes<A>; ++i) lanes[i] = load(block.totals + (first + i) * kLanes<A>);
      const Vector<A> sums = sums_of_lanes<A>(lanes);
      store(factors + first, A(of.dropout.scale) / (sums == A(0) ? broadcast(A(__builtin_inf())) : sums));
      for (int i = 0; i < kLanes<A>; ++i) totals[first + i] = double(sums[i]);
    }
    for (int64_t i = 0; i < rows; i += kLanes<double>) store(logarithms + i, logarithm<A>(load(totals + i)));
    for (int64_t i = 0; i < rows; ++i)
      set_statistics<A>(arguments, (b * of.heads + h) * of.queries + query + i, block.most[i], totals[i],
                        logarithms[i]);
    for (int64_t i = 0; i < rows; ++i) {
      const A* const from = block.outputs + i * output_stride;
      T* const to = output[query + i];
      int64_t n = 0;
      for (; n + kLanes<A> <= of.value_size; n += kLanes<A>) store(to + n, load(from + n) * factors[i]);
      if (n < of.value_size) store(to + n, load(from + n) * factors[i], int(of.value_size - n));
    }
  }
};

}  // namespace

void attention_forward(const AttentionForward& arguments, const Runtime& runtime) {
  if (is_decode(arguments.of)) return attention_decode(arguments, runtime);
  switch (arguments.of.dtype) {
    case DType::float32: return Forward<float>(arguments, runtime).run();
    case DType::float64: return Forward<double>(arguments, runtime).run();
    case DType::bfloat16: return Forward<bfloat16>(arguments, runtime).run();
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
