#include "attention_scores.h"

GENKERNELS_DECLARE_ATTENTION(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// Blocks of queries go through the keys in blocks (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 1). A
// row's maximum is that of the first block; it is raised only where a score exceeds it by kSlack, so that most tiles
// need no reduction, and sums are kept by lanes until the end.
//
// Where there are heads enough, each thread has heads of its own, which it packs for itself. The heads left over are
// packed by all threads, which then take blocks of queries in turns, the longest first.
template <class T>
struct Forward {
  using E = Operand<T>;
  using A = Accumulator<T>;
  static constexpr int64_t kBlockQueries = 48;
  static constexpr int64_t kScoreStride = kBlockKeys + 64 / int64_t(sizeof(E));
  static constexpr A kSlack = 5;

  // A thread's own block.
  struct Block {
    E* queries;       // [kBlockQueries, query_stride]
    E* scores;        // [kBlockQueries, kScoreStride], later e^(score - most)
    A* outputs;       // [kBlockQueries, output_stride]
    A* totals;        // [kBlockQueries, lanes] sums of the scores' exponentials
    A* most;          // [kBlockQueries]
    bool* has_most;   // [kBlockQueries] whether a key took part so far
    bool* have_most;  // [kBlockQueries / kRunRows] whether that holds for all rows of a run
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
                       allocate<bool>(r, kBlockQueries / kRunRows),
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
    for (int64_t i = 0; i < rows; ++i) {
      block.most[i] = 0;
      block.has_most[i] = block.have_most[i / kRunRows] = false;
    }
    __builtin_memset(block.totals, 0, size_t(rows * kLanes<A>) * sizeof(A));
    __builtin_memset(block.outputs, 0, size_t(rows * output_stride) * sizeof(A));
    const int64_t end = scores.visible(query + rows - 1);
    for (int64_t key = 0; key < end; key += kBlockKeys) {
      const Columns<E> columns = packed.columns(key);
      for (int64_t p = 0; p < columns.panels; ++p) {
        const int64_t column = columns.first_column(p);
        if (key + column >= end) break;
        // The first run of rows that sees a key of the panel.
        int64_t skipped = 0;
        while (skipped + kRunRows < rows && scores.visible(query + skipped + kRunRows - 1) <= key + column)
          skipped += kRunRows;
        columns.with_width(p, [&]<int kVectors>() {
          const E* const panel = packed.transposed_panel(keys, key, p);
          const Rows<const E> seen{queries[skipped], queries.stride};
          multiply_panel<E, kVectors, kScoreChain<A>>(
              seen, rows - skipped, panel, of.head_size, panel + of.head_size * Panel<E, kVectors>::kStep / kGroup<E>,
              [&](int64_t at, int64_t run, auto& sum) GENKERNELS_LAMBDA {
                A scale = A(of.scale);
                if (scores.needs_mask(query + skipped + at, key + column + kVectors * kLanes<A>)) {
                  scores.template apply_mask<kVectors>(query + skipped + at, run, key + column, sum);
                  scale = 1;
                }
                exponentiate<kVectors>(block, skipped + at, run, column, scale, sum);
              });
        });
      }
      if (of.dropout.threshold)
        scores.template drop<E>(query, rows, key, columns.count, Rows<E>{block.scores, kScoreStride});
      add_values(scores, block, query, rows, key, columns.count, values);
    }
    finish(b, h, query, rows, block);
  }

  // Makes the scores of a tile e^(score - most), and adds them up.
  template <int kVectors>
  GENKERNELS_INLINE void exponentiate(const Block& block, int64_t first, int64_t run, int64_t column, A scale,
                                      Vector<A> (&sum)[kRunRows][kVectors]) const {
    bool& have_most = block.have_most[first / kRunRows];
    if (!have_most) {
      have_most = true;
      for (int64_t i = 0; i < run; ++i) have_most &= find_most<kVectors>(block, first + i, scale, sum[i]);
    }
    if (run == kRunRows) return exponentiate_rows<kRunRows, kVectors>(block, first, column, scale, sum);
    for (int64_t i = 0; i < run; ++i) exponentiate_rows<1, kVectors>(block, first + i, column, scale, sum + i);
  }

  template <int kRows, int kVectors>
  GENKERNELS_INLINE void exponentiate_rows(const Block& block, int64_t first, int64_t column, A scale,
                                           Vector<A> (*sum)[kVectors]) const {
    Vector<A> top = broadcast(-A(__builtin_inf()));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector<A> most = broadcast(block.most[first + i]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = sum[i][v] * scale - most;
        top = sum[i][v] > top ? sum[i][v] : top;
      }
    }
    if (any_above(top, kSlack))
      for (int i = 0; i < kRows; ++i) raise<kVectors>(block, first + i, column, sum[i]);
    constexpr int kTogether = kRows == 1 ? 1 : 2;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i += kTogether) {
      const auto e = exponential(
          several<kTogether * kVectors>([&](int j) GENKERNELS_LAMBDA { return sum[i + j / kVectors][j % kVectors]; }));
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

  // Whether the row has a maximum: it has none before a key takes part.
  template <int kVectors>
  GENKERNELS_INLINE bool find_most(const Block& block, int64_t i, A scale, const Vector<A> (&scores)[kVectors]) const {
    if (block.has_most[i]) return true;
    Vector<A> top = scores[0] * scale;
    for (int v = 1; v < kVectors; ++v) {
      const Vector<A> x = scores[v] * scale;
      top = x > top ? x : top;
    }
    const A most = max_of_lanes<A>(top);
    if (!(most > -A(__builtin_inf()))) return false;
    block.most[i] = most;
    return block.has_most[i] = true;
  }

  // A score that exceeds the row's maximum by so much becomes the maximum, and what was computed of the row follows.
  template <int kVectors>
  __attribute__((noinline)) void raise(const Block& block, int64_t i, int64_t column, Vector<A> (&x)[kVectors]) const {
    Vector<A> top = x[0];
    for (int v = 1; v < kVectors; ++v) top = x[v] > top ? x[v] : top;
    const A excess = max_of_lanes<A>(top);
    if (!(excess > kSlack)) return;
    const A most = block.most[i] + excess, rise = most - block.most[i];
    block.most[i] = most;
    for (int v = 0; v < kVectors; ++v) x[v] -= rise;
    const Vector<A> factor = exponential(several<1>([&](int) { return broadcast(-rise); }))[0];
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
        for (int64_t first = 0; first < rows; first += kRunRows) {
          const int64_t run = smaller(kRunRows, rows - first);
          const int64_t count = smaller(keys, scores.visible(query + first + run - 1) - key);
          if (count <= 0) continue;
          Vector<A> sum[kRunRows][kVectors];
          product_of_rows<E, kVectors, kKeyChain<A>>(block.scores + first * kScoreStride, kScoreStride, run, panel,
                                                     count, sum);
          A* const to = block.outputs + first * output_stride + packed.values.first_column(p);
          for (int64_t i = 0; i < run; ++i)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) {
              A* const at = to + i * output_stride + v * kLanes<A>;
              store(at, load(at) + sum[i][v]);
            }
        }
      });
  }

  void finish(int64_t b, int64_t h, int64_t query, int64_t rows, const Block& block) const {
    const Rows<T> output = rows_of<T>(arguments.output, b, h);
    const int64_t rows_of_all = of.batch * of.heads * of.queries;
    A* const shifts = static_cast<A*>(arguments.statistics) + (b * of.heads + h) * of.queries + query;
    const A kept = A(of.dropout.scale);
    for (int64_t i = 0; i < rows; ++i) {
      const A total = sum_of_lanes<A>(load(block.totals + i * kLanes<A>));
      // The logarithm is added as far as the sum has digits for it: scores near that sum, which make most of the
      // gradients, are then subtracted from without rounding.
      const double log = total == 0 ? 0.0 : __builtin_log(double(total));
      const A shift = total == 0 ? -A(__builtin_inf()) : A(double(block.most[i]) + log);
      shifts[i] = shift;
      shifts[rows_of_all + i] = total == 0 ? A(0) : A(log - (double(shift) - double(block.most[i])));
      const A factor = total == 0 ? A(0) : kept / total;
      const A* const from = block.outputs + i * output_stride;
      for (int64_t n = 0; n < of.value_size; n += kLanes<A>)
        store(output[query + i] + n, load(from + n) * factor, int(smaller(kLanes<A>, of.value_size - n)));
    }
  }
};

}  // namespace

void attention_forward(const AttentionForward& arguments, const Runtime& runtime) {
  switch (arguments.of.dtype) {
    case DType::float32: return Forward<float>(arguments, runtime).run();
    case DType::float64: return Forward<double>(arguments, runtime).run();
    case DType::bfloat16: return Forward<bfloat16>(arguments, runtime).run();
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
