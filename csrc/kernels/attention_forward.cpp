#include "attention_scores.h"

GENKERNELS_DECLARE_ATTENTION(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// Blocks of queries go through the keys in blocks (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 1).
// Scores lie as [keys, queries]: then rows of keys and values are operands as they are, from the left of scores and
// from the right of outputs, keys never have to be transposed, and what is known of each query fills registers. Values
// are packed where their rows do not lie well.
//
// A query's exponents are relative to `most`: 0, or the first scores' maximum if that is farther than kSlack from 0, or
// a later one that exceeds it by kSlack. So most tiles change nothing that was computed before.
//
// Where there are heads enough, each thread has heads of its own. Of the heads left over threads take blocks of queries
// in turns, the longest first.
template <class T>
struct Forward {
  using E = Operand<T>;
  using A = Accumulator<T>;
  static constexpr int64_t kMostQueries = 96;
  static constexpr int64_t kPartKeys = 64;
  static constexpr A kSlack = sizeof(A) == 8 ? 0 : 16;  // digits count in float64

  // A thread's own block of queries.
  struct Block {
    E* queries;      // [D, queries], a right operand
    E* scores;       // [block_keys, score_stride], as base^(score - most); with pairs of keys side by side for bf16
    A* masks;        // [block_keys, score_stride]; unused where nothing is added to scores
    A* outputs;      // [queries, output_stride]
    A* totals;       // [queries], the sums of the scores' exponentials
    A* parts;        // [queries], the same of the last kPartKeys; of float64 what `totals` was rounded by
    A* most;         // [queries]
    bool* has_most;  // [queries], whether a key took part so far
  };
  // A head's keys and values, in memory of ours where they cannot be read as they lie.
  struct Head {
    E *keys, *values;
  };
  // A block of queries and one of keys.
  struct Place {
    const Scores<T>& scores;
    const Block& block;
    Rows<const E> keys;
    E* values;  // of the head, if packed
    Rows<const T> value_rows;
    int64_t query, rows, key, count;
    bool is_first, is_last;
  };

  const AttentionForward& arguments;
  const Attention& of;
  const Runtime& runtime;
  const Columns<E> value_columns;
  const bool reads_keys;
  const int64_t groups, kv_count, block_queries, query_blocks;
  const bool reads_values;  // as they lie, as keys
  const int64_t block_keys;
  const bool has_mask;
  const int64_t shares, own_heads;  // own_heads: of each thread
  const int64_t key_stride, score_stride, output_stride;
  const Barrier barrier;
  int64_t* next_item;
  Block* blocks;
  Head *heads, *shared_heads;

  Forward(const AttentionForward& forward, const Runtime& r)
      : arguments(forward),
        of(forward.of),
        runtime(r),
        value_columns(of.value_size),
        reads_keys(lie_well<T, E>(of.key, kTileRows)),
        groups(of.heads / larger(1, of.kv_heads)),
        kv_count(of.batch * of.kv_heads),
        block_queries(in_blocks(of.queries, kv_count * groups < 4 ? kMostQueries / 2 : kMostQueries,
                                larger(of.dropout.threshold ? kRandomQueries : kLanes<A>, kTileRows))),
        query_blocks(ceil_div(of.queries, block_queries)),
        reads_values(kGroup<E> == 1 &&
                     lie_well<T, E>(of.value, are_read_often() ? smaller(of.keys, kBlockKeys) : 1, of.value_size)),
        block_keys(in_blocks(of.keys, kBlockKeys, kRandomKeys)),
        has_mask(adds_mask(of)),
        shares(larger(1, smaller(r.threads, kv_count * groups * query_blocks))),
        own_heads(kv_count / shares),
        key_stride(staged_stride<E>(of.head_size)),
        score_stride(odd_lines<A>(block_queries)),
        output_stride(value_columns.vectors * kLanes<A>),
        barrier(r, shares),
        next_item(allocate<int64_t>(r, 1)),
        blocks(allocate<Block>(r, shares)),
        heads(allocate<Head>(r, shares)),
        shared_heads(allocate<Head>(r, kv_count - own_heads * shares)) {
    *next_item = 0;
    const auto new_head = [&] {
      return Head{reads_keys ? nullptr : allocate<E>(r, of.keys * key_stride),
                  reads_values ? nullptr : allocate<E>(r, value_columns.packed_size(of.keys))};
    };
    for (int64_t n = 0; n < kv_count - own_heads * shares; ++n) shared_heads[n] = new_head();
    for (int64_t share = 0; share < shares; ++share) {
      blocks[share] = {allocate<E>(r, ceil_div(of.head_size, kGroup<E>) * kGroup<E> * block_queries),
                       allocate<E>(r, block_keys * score_stride),
                       has_mask ? allocate<A>(r, block_keys * score_stride) : nullptr,
                       allocate<A>(r, block_queries * output_stride),
                       allocate<A>(r, block_queries),
                       allocate<A>(r, block_queries),
                       allocate<A>(r, block_queries),
                       allocate<bool>(r, block_queries)};
      if (own_heads > 0) heads[share] = new_head();
    }
  }

  // For few blocks of queries, packing costs more than it saves.
  bool are_read_often() const { return groups * query_blocks > 2; }

  void run() const {
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      const int64_t items = groups * query_blocks;
      for (int64_t share = first; share < last; ++share)
        for (int64_t kv = share * own_heads; kv < (share + 1) * own_heads; ++kv) {
          for (int64_t key = 0; key < of.keys; key += block_keys) pack(kv, key, heads[share]);
          for (int64_t n = 0; n < items; ++n) run_item(kv, n, heads[share], blocks[share]);
        }
      const int64_t first_shared = own_heads * shares, left_over = kv_count - first_shared;
      if (left_over == 0) return;
      if (!reads_keys || !reads_values) {
        const int64_t key_blocks = ceil_div(of.keys, block_keys);
        for (int64_t share = first; share < last; ++share)
          for (int64_t n = share; n < left_over * key_blocks; n += shares)
            pack(first_shared + n / key_blocks, n % key_blocks * block_keys, shared_heads[n / key_blocks]);
        barrier.wait(last - first, 1);
      }
      for (int64_t n; (n = __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED)) < left_over * items;)
        run_item(first_shared + n / items, n % items, shared_heads[n / items], blocks[first]);
    });
  }

  void pack(int64_t kv, int64_t key, const Head& head) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads;
    const VisibleKeys visible(of, b);
    const KeySpan seen = visible.span(0, of.queries);
    const int64_t count = smaller(block_keys, visible.keys - key);
    if (key + count <= seen.begin || key >= seen.end) return;
    if (!reads_keys) {
      const Rows<const T> rows = rows_of<T>(of.key, b, h);
      stage<E, T>(head.keys + key * key_stride, key_stride, count, of.head_size,
                  [&](int64_t i) { return rows[key + i]; });
    }
    if (reads_values) return;
    const Rows<const T> rows = rows_of<T>(of.value, b, h);
    for (int64_t p = 0; p < value_columns.panels; ++p)
      pack_panel<E, T>(
          value_columns, p, count, [&](int64_t i) { return rows[key + i]; }, values_at(head.values, key, p));
  }

  // Packed values from a key on: a panel holds all keys.
  E* values_at(E* values, int64_t key, int64_t p) const {
    return values + value_columns.offset(p, of.keys) + key * value_columns.width(p) * kLanes<E>;
  }

  // The blocks that see most keys come first.
  void run_item(int64_t kv, int64_t n, const Head& head, const Block& block) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads * groups + n % groups;
    const int64_t query = (query_blocks - 1 - n / groups) * block_queries;
    const int64_t rows = smaller(block_queries, of.queries - query);
    const Scores<T> scores(of, b, h);
    const Columns<E> columns(rows);
    const Rows<const T> from = rows_of<T>(of.query, b, h);
    for (int64_t p = 0; p < columns.panels; ++p)
      columns.with_width(p, [&]<int kVectors>() {
        const int64_t first = query + columns.first_column(p);
        pack_panel_of_rows<E, T, kVectors>(
            of.head_size, [&](int64_t i) { return first + i < query + rows ? from[first + i] : nullptr; },
            block.queries + columns.offset(p, of.head_size));
      });
    // What the next block reads and what this one writes last are on their way meanwhile.
    const Rows<T> output = rows_of<T>(arguments.output, b, h);
    for (int64_t i = 0; i < rows; ++i) {
      if (query >= block_queries) prefetch<false>(from[query + i - block_queries], of.head_size);
      prefetch<true>(output[query + i], of.value_size);
    }
    __builtin_memset(block.most, 0, sizeof(A) * size_t(block_queries));
    __builtin_memset(block.totals, 0, sizeof(A) * size_t(block_queries));
    __builtin_memset(block.parts, 0, sizeof(A) * size_t(block_queries));
    __builtin_memset(block.has_most, 0, sizeof(bool) * size_t(block_queries));
    bool have_most[kMostQueries] = {};  // whether find_most() is done with all of a panel
    Rows<const E> keys{head.keys, key_stride};
    if constexpr (__is_same(T, E))
      if (reads_keys) keys = rows_of<T>(of.key, b, kv % of.kv_heads);
    const KeySpan seen = scores.span(query, rows);
    const int64_t begin = first_in_tiles(seen.begin), end = seen.end;
    for (int64_t key = begin; key < end || key == begin; key += block_keys) {
      const Place at{scores,
                     block,
                     keys,
                     head.values,
                     rows_of<T>(of.value, b, kv % of.kv_heads),
                     query,
                     rows,
                     key,
                     smaller(block_keys, end - key),
                     key == begin,
                     key + block_keys >= end};
      if (has_mask) scores.form_mask(query, rows, key, at.count, block_keys, block.masks, score_stride);
      for (int64_t p = 0; p < columns.panels; ++p)
        columns.with_width(p, [&]<int kVectors>() { form_scores<kVectors>(at, columns, p, have_most[p]); });
      add_up_parts(block, 0, rows);
      if (of.dropout.threshold) drop(at);
      A factors[kMostQueries + kLanes<A>];
      if (at.is_last)
        for (int64_t i = 0; i < rows; i += kLanes<A>) {
          const Vector<A> total = load(block.totals + i);
          store(factors + i, A(of.dropout.scale) / (total == A(0) ? broadcast(A(__builtin_inf())) : total));
        }
      add_values(at, output, factors);
    }
    finish(b, h, query, rows, block);
  }

  // Where a block of keys begins that has this key, of those that a window may have at the left end. Random numbers are
  // of whole groups of keys.
  int64_t first_in_tiles(int64_t key) const {
    const int64_t unit = of.dropout.threshold ? kRandomKeys : kTileRows;
    return key / unit * unit;
  }
  // Of a block's keys, the first that query `query` sees or one that a tile has together with it.
  int64_t first_row(const Place& at, int64_t query) const {
    return larger(0, at.scores.first_visible(query) - at.key) / kTileRows * kTileRows;
  }

  template <bool kForWriting, class S>
  static GENKERNELS_INLINE void prefetch(S* row, int64_t count) {
    constexpr int64_t kLine = 64 / int64_t(sizeof(S));
    for (int64_t n = 0; n < count; n += kLine) __builtin_prefetch(row + n, kForWriting, 2);
  }

  // Of a panel of queries and a block of keys.
  template <int kPanel>
  GENKERNELS_INLINE void form_scores(const Place& at, const Columns<E>& columns, int64_t p, bool& have_most) const {
    const E* const panel = at.block.queries + columns.offset(p, of.head_size);
    const int64_t column = columns.first_column(p), end = smaller(at.rows, column + kPanel * kLanes<A>);
    const auto form_tile = [&]<int kRows>(int64_t row) GENKERNELS_LAMBDA {
      const int64_t key = at.key + row;
      // The first query that sees the first key. A tile of outputs may begin before it: there, too, scores have to be.
      const int64_t seeing = larger(0, key - at.scores.diagonal - at.query) / kTileRows * kTileRows;
      if (seeing >= end) return false;
      if (row % kPartKeys == 0) add_up_parts(at.block, column, column + kPanel * kLanes<A>);
      const int64_t skipped = larger(0, seeing - column) / kLanes<A>;
      const auto form = [&]<int kVectors>(int64_t from) GENKERNELS_LAMBDA {
        const int64_t first = column + from * kLanes<A>;
        Vector<A> sum[kRows][kVectors];
        for (bool is_raised = false;; is_raised = true) {
          multiply_in_chains<kScoreChain<A>, kPanel>(at.keys[key], at.keys.stride, panel + from * kLanes<E> * kGroup<E>,
                                                     of.head_size, sum);
          if (of.softcap != 0) for_copy(sum, [&](auto& copy) { at.scores.cap(&copy[0][0], kRows * kVectors); });
          A scale = at.scores.scale;
          if (has_mask) {
            for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
              const Vector<A> masks = load(at.block.masks + (row + i) * score_stride + first + v * kLanes<A>);
              sum[i][v] = at.scores.with_mask(sum[i][v], masks);
            });
            scale = 1;
          }
          const bool hides = key + kRows > at.scores.visible(at.query + first);
          if (!have_most) {
            Vector<A> scaled[kRows][kVectors];
            // With a scale of its own: products that the two share would not be fused with what is subtracted.
            const Vector<A> own = rounded(broadcast(scale));
            for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA { scaled[i][v] = sum[i][v] * own; });
            hide_keys(at, first, row, hides, scaled);
            have_most = find_most(at, row, first, scaled) && from == 0;
          }
          if (!subtract_most(at, row, first, scale, hides, is_raised, sum)) break;
        }
        exponentiate(at, row, first, sum);
      };
      // As few vectors as have queries that see a key; of whole tiles, since each such body is much code.
      if constexpr (kRows == kTileRows && kPanel > 1)
        if (skipped > 0) {
          if constexpr (kPanel > 2)
            if (skipped == 1) return form.template operator()<2>(1), true;
          return form.template operator()<1>(kPanel - 1), true;
        }
      return form.template operator()<kPanel>(0), true;
    };
    for_key_tiles(at.count, form_tile, first_row(at, at.query + column / kTileRows * kTileRows));
  }

  // body.operator()<rows>(first) for tiles of keys until it returns false: of kTileRows, and of the last half of them
  // and so on, since each body is much code.
  template <int kRows = kTileRows, class Body>
  GENKERNELS_INLINE void for_key_tiles(int64_t count, const Body& body, int64_t first = 0) const {
    for (; first + kRows <= count; first += kRows)
      if (!body.template operator()<kRows>(first)) return;
    if constexpr (kRows > 1) for_key_tiles<kRows / 2>(count, body, first);
  }

  // -inf where a diagonal hides a key: where `hides`, from queries before it, and the first one from queries after it.
  template <int kRows, int kVectors>
  GENKERNELS_INLINE void hide_keys(const Place& at, int64_t column, int64_t row, bool hides,
                                   Vector<A> (&tile)[kRows][kVectors]) const {
    typedef LaneOf<sizeof(A)> Lane;
    typedef Lane Lanes __attribute__((vector_size(kVectorBytes)));
    constexpr int64_t kQueries = kVectors * kLanes<A>;
    const int64_t query = at.query + column, key = at.key + row;
    if (hides) {
      Lanes lanes{};
      for (int l = 0; l < kLanes<A>; ++l) lanes[l] = Lane(l);
      const int64_t seeing = smaller(kQueries, key - at.scores.diagonal - query);
      for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
        tile[i][v] =
            lanes + Lane(v * kLanes<A>) < Lane(larger(0, seeing + i)) ? broadcast(-A(__builtin_inf())) : tile[i][v];
      });
    }
    const int64_t end = key - at.scores.first_diagonal - query + 1;  // the queries that see the first key
    if (end < kQueries) for_copy(tile, [&](auto& copy) { at.scores.hide_left(&copy[0][0], kRows, kVectors, end); });
  }

  // Makes the scores of a tile exponents. Whether they have to be computed again: of those that were far above `most`,
  // the difference has lost digits.
  template <int kRows, int kVectors>
  GENKERNELS_INLINE bool subtract_most(const Place& at, int64_t row, int64_t column, A scale, bool hides,
                                       bool is_raised, Vector<A> (&x)[kRows][kVectors]) const {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const Vector<A> most = load(at.block.most + column + v * kLanes<A>);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) x[i][v] = x[i][v] * scale - most;
    }
    hide_keys(at, column, row, hides, x);
    Vector<A> tops[kVectors];
    for_tile<kRows, kVectors>([&](int i, int v)
                                  GENKERNELS_LAMBDA { tops[v] = i > 0 && tops[v] > x[i][v] ? tops[v] : x[i][v]; });
    Vector<A> top = tops[0];
#pragma GCC unroll 3
    for (int v = 1; v < kVectors; ++v) top = tops[v] > top ? tops[v] : top;
    if (!any_above(top, kSlack) || is_raised) return false;
    Vector<A> copies[kVectors];
    for (int v = 0; v < kVectors; ++v) copies[v] = tops[v];
    raise(at, row, column, copies);
    return true;
  }

  // Makes the exponents of a tile what they are exponents of, and adds that up.
  template <int kRows, int kVectors>
  GENKERNELS_INLINE void exponentiate(const Place& at, int64_t row, int64_t column,
                                      const Vector<A> (&x)[kRows][kVectors]) const {
    const Block& block = at.block;
    E* const scores = score_at(block, row, column);  // once: the compiler has to take stores for changes of the sizes
    const int64_t stride = score_stride;
    constexpr int kTogether = kGroup<E> == 2 || kVectorBytes == 64 ? int(smaller(2, kRows)) : 1;
    Vector<A> added[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i += kTogether) {
      const auto e = power_of_base(
          several<kTogether * kVectors>([&](int j) GENKERNELS_LAMBDA { return x[i + j / kVectors][j % kVectors]; }));
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        E* const to = scores + i * stride + v * kLanes<A> * kGroup<E>;
        Vector<A> sum = e[v];
        if constexpr (kTogether == 2) {
          store_scores(to, stride, e[v], e[kVectors + v]);
          sum += e[kVectors + v];
        } else if constexpr (kGroup<E> == 2) {
          store_scores(to, stride, e[v], Vector<A>{});
        } else {
          store(to, e[v]);
        }
        added[v] = i == 0 ? sum : added[v] + sum;
      }
    }
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) add_up(block, column + v * kLanes<A>, added[v]);
  }

  // In one chain over all keys, sums would err by more than PyTorch's.
  static GENKERNELS_INLINE void add_up_parts(const Block& block, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += kLanes<A>) {
      store(block.totals + i, load(block.totals + i) + load(block.parts + i));
      store(block.parts + i, Vector<A>{});
    }
  }
  static GENKERNELS_INLINE void add_up(const Block& block, int64_t column, Vector<A> x) {
    A* const part = block.parts + column;
    if constexpr (sizeof(A) == 8) {  // Knuth, The Art of Computer Programming 2, 4.2.2, theorem B
      A* const total = block.totals + column;
      const Vector<A> before = load(total), sum = before + x, added = sum - before;
      store(total, sum);
      x = (before - (sum - added)) + (x - added);
    }
    store(part, load(part) + x);
  }

  E* score_at(const Block& block, int64_t row, int64_t column) const {
    if constexpr (kGroup<E> == 2) return block.scores + row / 2 * 2 * score_stride + column * 2;
    return block.scores + row * score_stride + column;
  }
  // Of a key and the next.
  static GENKERNELS_INLINE void store_scores(E* to, int64_t stride, Vector<A> x, Vector<A> next) {
    if constexpr (kGroup<E> == 2) {
      store(reinterpret_cast<uint32_t*>(to), rounded_bits(x) | rounded_bits(next) << 16);
    } else {
      store(to, x);
      store(to + stride, next);
    }
  }

  // What is subtracted from a query's scores: nothing where the first of them are small anyway. Where they are far
  // below, as those of masks of -1e9, each tile looks for larger ones, since beside such a number they lose their
  // digits. Whether this need not be called again.
  template <int kRows, int kVectors>
  __attribute__((noinline)) bool find_most(const Place& at, int64_t row, int64_t column,
                                           const Vector<A> (&scores)[kRows][kVectors]) const {
    const Block& block = at.block;
    bool is_done = true;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = column + v * kLanes<A>;
      Vector<A> top = scores[0][v], change{};
      for (int i = 1; i < kRows; ++i) top = scores[i][v] > top ? scores[i][v] : top;
      bool changes = false;
      for (int l = 0; l < kLanes<A>; ++l) {
        bool& has_most = block.has_most[first + l];
        A& most = block.most[first + l];
        if (has_most && most >= -kSlack) continue;
        const A found = top[l] > -kSlack && !(top[l] > kSlack) ? A(0) : top[l];
        if (found > (has_most ? most : -A(__builtin_inf()))) {
          if (has_most) change[l] = most - found;
          changes |= has_most;
          most = found;
          has_most = true;
        }
        is_done &= has_most && most >= -kSlack;
      }
      if (changes) rescale(at, row, first, change);
    }
    return is_done;
  }

  // Scores that exceed `most` by so much become it, and what was computed of their queries follows.
  template <int kVectors>
  __attribute__((noinline)) void raise(const Place& at, int64_t row, int64_t column,
                                       const Vector<A> (&tops)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) {
      A* const to = at.block.most + column + v * kLanes<A>;
      const Vector<A> most = load(to), raised = most + (tops[v] > kSlack ? tops[v] : Vector<A>{});
      if (!any_above(tops[v], kSlack)) continue;
      store(to, raised);
      rescale(at, row, column + v * kLanes<A>, most - raised);
    }
  }

  // Multiplies what was computed of a register of queries, of the block's scores the first `row` keys', by
  // base^exponent.
  void rescale(const Place& at, int64_t row, int64_t column, Vector<A> exponent) const {
    const Block& block = at.block;
    const Vector<A> factor = power_of_base(several<1>([&](int) { return exponent; }))[0];
    store(block.totals + column, load(block.totals + column) * factor);
    store(block.parts + column, load(block.parts + column) * factor);
    for (int64_t k = 0; k < row; k += kGroup<E>) {
      E* const to = score_at(block, k, column);
      if constexpr (kGroup<E> == 2) {
        const Vector<uint32_t> pair = load(reinterpret_cast<const uint32_t*>(to));
        store_scores(to, score_stride, (Vector<A>)(pair << 16) * factor, (Vector<A>)(pair & 0xffff0000u) * factor);
      } else {
        store(to, load(to) * factor);
      }
    }
    for (int l = 0; l < kLanes<A> && !at.is_first; ++l) {
      A* const output = block.outputs + (column + l) * output_stride;
      for (int64_t n = 0; n < output_stride && exponent[l] != 0; n += kLanes<A>)
        store(output + n, load(output + n) * factor[l]);
    }
  }

  // Sets what dropout does not keep to zero.
  void drop(const Place& at) const {
    typedef typename Scores<T>::Lanes Lanes;
    at.scores.each_kept(at.query, at.rows, at.key, at.count, [&](int64_t k, int64_t i, Lanes is_kept) {
      E* const to = score_at(at.block, k, i);
      Lanes x;
      __builtin_memcpy(&x, to, sizeof x);
      if constexpr (kGroup<E> == 2) is_kept |= k % 2 ? 0xffffu : 0xffff0000u;  // the other key of the pair
      x &= is_kept;
      __builtin_memcpy(to, &x, sizeof x);
    });
  }

  // Adds P V to the outputs, or makes them the result.
  void add_values(const Place& at, Rows<T> result, const A* factors) const {
    for (int64_t p = 0; p < value_columns.panels; ++p)
      value_columns.with_width(p, [&]<int kVectors>() {
        const int64_t column = value_columns.first_column(p);
        const E* values = nullptr;
        int64_t value_step = Panel<E, kVectors>::kStep;
        if (!reads_values) {
          values = values_at(at.values, at.key, p);
        } else if constexpr (__is_same(T, E)) {
          values = at.value_rows[at.key] + column;
          value_step = at.value_rows.stride;
        }
        for (int64_t first = 0; first < at.rows; first += kTileRows) {
          const int64_t last = smaller(first + kTileRows, at.rows) - 1, row = first_row(at, at.query + first);
          const int64_t count = larger(0, smaller(at.count, at.scores.visible(at.query + last) - at.key) - row);
          if (count == 0 && !at.is_first && !at.is_last) continue;
          Vector<A> sum[kTileRows][kVectors] = {};
          add_in_chains<kKeyChain<A>>(score_at(at.block, row, first), kGroup<E>, score_stride * kGroup<E>,
                                      values + row / kGroup<E> * value_step, value_step, count, sum);
          A* const to = at.block.outputs + first * output_stride + column;
          if (!at.is_first)
            for_tile<kTileRows, kVectors>(
                [&](int i, int v) GENKERNELS_LAMBDA { sum[i][v] += load(to + i * output_stride + v * kLanes<A>); });
          if (!at.is_last) {
            for_tile<kTileRows, kVectors>(
                [&](int i, int v) GENKERNELS_LAMBDA { store(to + i * output_stride + v * kLanes<A>, sum[i][v]); });
            continue;
          }
          T* const at_result = result[at.query + first] + column;
          if (last - first + 1 == kTileRows && column + kVectors * kLanes<A> <= of.value_size) {
            for_tile<kTileRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
              store(at_result + i * result.stride + v * kLanes<A>, sum[i][v] * factors[first + i]);
            });
            continue;
          }
          for_copy(sum, [&](auto& copy) {
            for (int i = 0; i <= last - first; ++i)
              for (int v = 0; v < kVectors; ++v)
                store(at_result + i * result.stride + v * kLanes<A>, copy[i][v] * factors[first + i],
                      int(smaller(kLanes<A>, of.value_size - column - v * kLanes<A>)));
          });
        }
      });
  }

  void finish(int64_t b, int64_t h, int64_t query, int64_t rows, const Block& block) const {
    double totals[kMostQueries + kLanes<double>], logarithms[kMostQueries + kLanes<double>];
    for (int64_t i = 0; i < rows; ++i) totals[i] = double(block.totals[i]);
    for (int64_t i = rows; i < rows + kLanes<double>; ++i) totals[i] = 1;
    for (int64_t i = 0; i < rows; i += kLanes<double>) store(logarithms + i, logarithm<A>(load(totals + i)));
    for (int64_t i = 0; i < rows; ++i)
      set_statistics<A>(arguments, row_index(of, b, h, query + i), block.most[i], totals[i], logarithms[i]);
  }
};

}  // namespace

void attention_forward(const AttentionForward& arguments, const Runtime& runtime) {
  if (is_decode(arguments.of)) return attention_decode(arguments, runtime);
  with_type(arguments.of.dtype, [&]<class T>() { Forward<T>(arguments, runtime).run(); });
}

}  // namespace genkernels::GENKERNELS_LEVEL
