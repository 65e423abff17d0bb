// What the backward pass and its own share. A block of queries goes through the blocks of keys, and both hand on what
// they get from each other. Scores lie as [keys, queries]: sums over keys are then sums of registers, and rows of keys
// and values are operands as they are, from the left of scores and from the right of what queries get.
//
// A team of threads goes through a head: each member has blocks of keys of its own, and when the scores of some queries
// are known the members share the rows of what these queries get. Where there are heads enough a team has one member.
#pragma once

#include "attention_scores.h"
#include "gemv.h"

namespace genkernels::GENKERNELS_LEVEL {

template <class T, class Arguments>
struct Gradients {
  using A = Accumulator<T>;
  using E = A;
  typedef LaneOf<sizeof(A)> Lane;
  typedef Lane Lanes __attribute__((vector_size(kVectorBytes)));

  struct Team {
    int64_t members, meeting_members;  // the second: of this range, see Barrier
    int64_t first, last;               // members that this thread is
    mutable int64_t meetings;

    template <class Body>
    void each(const Body& body) const {
      for (int64_t member = first; member < last; ++member) body(member);
    }
  };
  // The next block of queries, and whether it is of another head.
  struct Next {
    int64_t kv, group, query;
    bool is_new_head, is_there;
  };
  // A block of queries, of the head h that has the keys of kv_head.
  struct Queries {
    const Scores<T>& scores;
    int64_t b, h, kv_head, query, rows;
    bool is_first_head;  // of those that share the keys
    Columns<E> columns;  // the queries as columns
    Next next;
    int64_t first_block, end_block;  // the blocks of keys that they see
  };
  // The same beside a block of keys.
  struct Place : Queries {
    int64_t key, count, key_block;
  };

  const Arguments& arguments;
  const Attention& of;
  const Runtime& runtime;
  const bool has_dropout, has_mask, is_few, sums_mask, sums_rows_for_mask, is_mask_shared;
  const Columns<E> head_columns, value_columns;
  const int64_t groups, kv_count, block_keys, key_blocks, block_queries;
  const int64_t score_stride, head_stride, value_stride;
  const int64_t shares, own_heads;
  const Barrier barrier;
  A* grad_mask;

  Gradients(const Arguments& gradients, const Runtime& r, int64_t most_queries)
      : arguments(gradients),
        of(arguments.of),
        runtime(r),
        has_dropout(of.dropout.threshold != 0),
        has_mask(adds_mask(of)),
        is_few(is_decode(of)),
        sums_mask(arguments.grad_mask != nullptr &&
                  arguments.grad_mask_size != of.batch * of.heads * of.queries * of.keys),
        sums_rows_for_mask(arguments.grad_mask != nullptr && arguments.grad_mask_key == 0 && of.keys > 1),
        is_mask_shared(arguments.grad_mask != nullptr && ((of.batch > 1 && arguments.grad_mask_batch == 0) ||
                                                          (of.heads > 1 && arguments.grad_mask_head == 0))),
        head_columns(of.head_size),
        value_columns(of.value_size),
        groups(of.heads / larger(1, of.kv_heads)),
        kv_count(of.batch * of.kv_heads),
        block_keys(in_blocks(of.keys, kBlockKeys, has_dropout ? kRandomKeys : kTileRows)),
        key_blocks(ceil_div(of.keys, block_keys)),
        block_queries(in_blocks(of.queries, most_queries, has_dropout ? larger(kRandomQueries, kLanes<E>) : kLanes<E>)),
        score_stride(odd_lines<E>(block_queries)),
        head_stride(odd_lines<E>(of.head_size)),
        value_stride(odd_lines<E>(of.value_size)),
        shares(larger(1, smaller(r.threads, is_mask_shared ? key_blocks : larger(kv_count, key_blocks)))),
        own_heads(is_mask_shared ? 0 : kv_count / shares),
        barrier(r, shares),
        grad_mask(static_cast<A*>(arguments.grad_mask)) {
    if (grad_mask != nullptr && narrows_mask()) grad_mask = allocate<A>(r, arguments.grad_mask_size);
  }

  static int64_t width(const Columns<E>& columns) { return columns.vectors * kLanes<A>; }
  static constexpr bool adds_in_place() { return __is_same(T, A); }
  bool narrows_mask() const { return !__is_same(T, A) && of.mask.type == MaskType::of_dtype; }
  // Teams use the memory of the first.
  bool has_own_memory(int64_t share) const { return share == 0 || own_heads > 0; }
  bool has_teams() const { return own_heads * shares < kv_count; }

  // run_head(kv, share, team, is_last) for all heads, with the memory of a share.
  template <class RunHead>
  void run_heads(const RunHead& run_head) const {
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      const Team all{shares, last - first, first, last, 0};
      const auto part = [&](int64_t share) { return arguments.grad_mask_size * share / shares; };
      if (sums_mask) {
        __builtin_memset(grad_mask + part(first), 0, size_t(part(last) - part(first)) * sizeof(A));
        meet(all);
      }
      for (int64_t share = first; share < last; ++share)
        for (int64_t kv = share * own_heads; kv < (share + 1) * own_heads; ++kv)
          run_head(kv, share, Team{1, 1, 0, 1, 0}, kv + 1 == (share + 1) * own_heads);
      for (int64_t kv = own_heads * shares; kv < kv_count; ++kv) {
        meet(all);  // the head's memory is free, for own heads too
        run_head(kv, 0, all, kv + 1 == kv_count);
      }
      finish_streams();
      if (grad_mask != nullptr && narrows_mask()) {
        meet(all);
        narrow<T>(static_cast<T*>(arguments.grad_mask) + part(first), grad_mask + part(first),
                  part(last) - part(first));
      }
    });
  }

  void meet(const Team& team) const {
    if (team.members > 1) barrier.wait(team.meeting_members, ++team.meetings);
  }

  // body(queries) for all blocks of queries that see a head of keys.
  template <class Body>
  void each_queries(int64_t kv, bool is_last, const Body& body) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads;
    for (int64_t g = 0; g < groups; ++g) {
      const Scores<T> scores(of, b, h * groups + g);
      for (int64_t query = 0; query < of.queries; query += block_queries) {
        const int64_t rows = smaller(block_queries, of.queries - query);
        const bool ends_group = query + rows == of.queries, ends_head = ends_group && g + 1 == groups;
        const Next next{ends_head ? kv + 1 : kv, ends_group ? (ends_head ? 0 : g + 1) : g,
                        ends_group ? 0 : query + rows, ends_head, !(ends_head && is_last)};
        const KeySpan seen = scores.span(query, rows);
        const int64_t first_block = seen.begin / block_keys;
        const int64_t end_block = seen.begin == seen.end ? first_block : ceil_div(seen.end, block_keys);
        body(
            Queries{scores, b, h * groups + g, h, query, rows, g == 0, Columns<E>(rows), next, first_block, end_block});
      }
    }
  }
  // body(key, count, key_block) for a member's blocks of keys.
  template <class Body>
  void each_key_block(int64_t member, const Team& team, const Body& body) const {
    for (int64_t block = member; block < key_blocks; block += team.members)
      body(block * block_keys, smaller(block_keys, of.keys - block * block_keys), block);
  }
  // body(place) for those of them that a block of queries sees.
  template <class Body>
  void each_place(const Queries& queries, int64_t member, const Team& team, const Body& body) const {
    const int64_t skipped = (member + team.members - queries.first_block % team.members) % team.members;
    for (int64_t block = queries.first_block + skipped; block < queries.end_block; block += team.members)
      body(Place{queries, block * block_keys, smaller(block_keys, queries.scores.keys - block * block_keys), block});
  }

  // Rows as operands, with zeros up to the end of a register.
  static void copy_rows(Rows<const T> from, int64_t first, int64_t rows, int64_t size, E* to, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t n = 0; n < size; n += kLanes<E>)
        store(to + i * stride + n, load(from[first + i] + n, int(smaller(kLanes<E>, size - n))));
  }
  static Rows<const E> as_they_lie(const HeadsInput& from, int64_t b, int64_t h, int64_t first) {
    const Rows<const T> rows = rows_of<T>(from, b, h);
    return {static_cast<const E*>(static_cast<const void*>(rows[first])), rows.stride};
  }
  // Rows of a head from `first` on, as they lie or where they were copied to.
  static Rows<const E> rows_at(const HeadsInput& from, bool lies, int64_t b, int64_t h, int64_t first, const E* copied,
                               int64_t stride) {
    return lies ? as_they_lie(from, b, h, first) : Rows<const E>{copied, stride};
  }
  // A block's rows of queries, and transposed; copied to `to`, or as they lie where `may_lie`.
  Rows<const E> take_queries(const Queries& at, const HeadsInput& from, int64_t size, E* to, int64_t stride, E* panels,
                             bool may_lie) const {
    Rows<const E> rows{to, stride};
    if (may_lie)
      rows = as_they_lie(from, at.b, at.h, at.query);
    else
      copy_rows(rows_of<T>(from, at.b, at.h), at.query, at.rows, size, to, stride);
    for (int64_t p = 0; p < at.columns.panels; ++p)
      at.columns.with_width(p, [&]<int kVectors>() {
        const int64_t first = at.columns.first_column(p);
        pack_panel_of_rows<E, E, kVectors>(
            size, [&](int64_t n) { return first + n < at.rows ? rows[first + n] : nullptr; },
            panels + at.columns.offset(p, size));
      });
    return rows;
  }
  // Each query's shift and the gradient of its logsumexp, up to the end of a register.
  void copy_statistics(const Queries& at, A* near, A* rest, A* grad_logsumexp) const {
    const int64_t row = row_index(of, at.b, at.h, at.query), all = all_rows(of);
    const A* const statistics = static_cast<const A*>(arguments.statistics) + row;
    const A* const grad = static_cast<const A*>(arguments.grad_logsumexp);
    for (int64_t i = 0; i < width(at.columns); ++i) {
      const Shift<A> shift = i < at.rows ? shift_of(statistics[i], statistics[all + i]) : Shift<A>{0, 0};
      near[i] = shift.near;
      rest[i] = shift.rest;
      grad_logsumexp[i] = grad == nullptr || i >= at.rows ? A(0) : grad[row + i];
    }
  }

  template <bool kForWriting = false, class Element>
  static void fetch_rows(Rows<Element> rows, const KeySpan& span, int64_t size) {
    for (int64_t row = span.begin; row < span.end; ++row)
      for (int64_t n = 0; n < size; n += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows[row] + n, kForWriting, 2);
  }
  // Of `count` rows, those that go with keys [first, first + run) among the keys that a block of queries sees.
  KeySpan share_of(const Place& at, int64_t first, int64_t run, int64_t count) const {
    const KeySpan seen = at.scores.span(at.query, at.rows);
    const int64_t all = seen.end - seen.begin, key = larger(0, smaller(at.key + first - seen.begin, all));
    return {count * key / all, count * smaller(key + run, all) / all};
  }
  // What is copied next is fetched while a tile is multiplied, the share of a run of keys: fetch_queries(b, h, span)
  // and, with a new head, fetch_keys(b, h, span). To wait for memory when it is copied would take a tenth of the time.
  template <class Query, class Key>
  void fetch_next(const Place& at, int64_t first, int64_t run, const Query& fetch_queries,
                  const Key& fetch_keys) const {
    if (!at.next.is_there) return;
    const int64_t b = at.next.kv / of.kv_heads, h = at.next.kv % of.kv_heads, query = at.next.query;
    const KeySpan rows = share_of(at, first, run, smaller(block_queries, of.queries - query));
    fetch_queries(b, h * groups + at.next.group, KeySpan{query + rows.begin, query + rows.end});
    if (at.next.is_new_head) fetch_keys(b, h, share_of(at, first, run, of.keys));
  }

  // The first of the block's queries that sees a key, and the first after those.
  int64_t first_seeing(const Queries& at, int64_t key) const {
    return larger(0, smaller(at.rows, key - at.scores.diagonal - at.query));
  }
  int64_t end_seeing(const Queries& at, int64_t key) const {
    return larger(0, smaller(at.rows, key - at.scores.first_diagonal - at.query + 1));
  }
  E* tile(E* scores, int64_t first, int64_t column) const { return scores + first * score_stride + column; }

  void form_mask(const Place& at, E* to) const {
    at.scores.form_mask(at.query, at.rows, at.key, at.count, 0, to, score_stride);
  }
  // What form_mask() reads next, for a tile: it lies a page further with each query, where the processor does not look.
  void fetch_mask(const Place& at, int64_t column, int64_t end, int64_t first) const {
    const bool ends_row = at.key + at.count == of.keys;
    const int64_t query = at.query + (ends_row ? block_queries : 0),
                  key = ends_row ? first : at.key + block_keys + first;
    if (of.mask.query == 0 || first * at.scores.element % 64 != 0 || key >= of.keys) return;
    for (int64_t i = column; i < smaller(end, of.queries - query); ++i) at.scores.fetch_mask(query + i, key);
  }
  // What dropout multiplies with.
  void form_factors(const Place& at, E* to) const {
    at.scores.each_kept(at.query, at.rows, at.key, at.count, [&](int64_t k, int64_t i, Lanes is_kept) {
      store(tile(to, k, i), (Vector<A>)((Lanes)broadcast(A(of.dropout.scale)) & is_kept));
    });
  }

  // Products of a tile, times `scale`, as exponents less the queries' shift, -inf where a key takes no part:
  // form(i, exponents) for its rows. `column` is the first of its queries, `first` the first of its keys, and `mask`
  // what is added to it, or null; then the scale is that of with_mask().
  template <int kRows, int kVectors, class Form>
  GENKERNELS_INLINE void shift_scores(const Place& at, int64_t first, int64_t column, A scale, const E* mask,
                                      const A* near, const A* rest, Vector<A> (&sum)[kRows][kVectors],
                                      const Form& form) const {
    if (mask != nullptr) {
      for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
        sum[i][v] = at.scores.with_mask(sum[i][v], load(mask + i * score_stride + v * kLanes<A>));
      });
      scale = 1;
    }
    const int64_t hidden = at.key + first - at.scores.diagonal - at.query - column;  // queries, for the first key
    const int64_t seeing = at.key + first - at.scores.first_diagonal - at.query - column + 1;  // of the first diagonal
    const bool hides = hidden + kRows > 1, hides_left = seeing < kVectors * kLanes<A>;
    Lanes lanes{};
    for (int l = 0; l < kLanes<A>; ++l) lanes[l] = Lane(l);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      auto x = several<kVectors>([&](int v) GENKERNELS_LAMBDA {
        return (sum[i][v] * scale - load(near + column + v * kLanes<A>)) - load(rest + column + v * kLanes<A>);
      });
      if (hides) {
        const Lanes begin = Lanes{} + Lane(larger(0, smaller(kVectors * kLanes<A>, hidden + i)));
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v)
          x.at[v] = lanes + Lane(v * kLanes<A>) >= begin ? x.at[v] : broadcast(-A(__builtin_inf()));
      }
      if (hides_left) {
        auto copy = x;
        Scores<T>::hide_left(copy.at, 1, kVectors, seeing + i);
        x = copy;
      }
      form(i, x);
    }
  }

  // Calls body.operator()<panel's vectors, tile's vectors>(panel, column, first, run) for tiles of keys
  // [first, first + run) and the queries of a panel from the first register on that has one that sees them. A tile of
  // what queries get can begin before that query: there, too, scores have to be.
  template <class Body>
  GENKERNELS_INLINE void for_tiles(const Place& at, const Body& body) const {
    for (int64_t p = 0; p < at.columns.panels; ++p)
      at.columns.with_width(p, [&]<int kPanel>() {
        const int64_t column = at.columns.first_column(p), end = smaller(at.rows, column + kPanel * kLanes<A>);
        for (int64_t first = 0; first < at.count; first += kTileRows) {
          const int64_t seeing = first_seeing(at, at.key + first), begin = seeing / kTileRows * kTileRows;
          if (seeing == at.rows || begin >= end) break;
          const int64_t run = smaller(kTileRows, at.count - first);
          if (end_seeing(at, at.key + first + run - 1) <= column / kTileRows * kTileRows) continue;
          const int64_t skipped = larger(0, begin - column) / kLanes<A>;
          const auto call = [&]<int kVectors>() GENKERNELS_LAMBDA {
            body.template operator()<kPanel, kVectors>(p, column + (kPanel - kVectors) * kLanes<A>, first, run);
          };
          if constexpr (kPanel > 2)
            if (skipped == kPanel - 2) {
              call.template operator()<2>();
              continue;
            }
          if constexpr (kPanel > 1)
            if (skipped == kPanel - 1) {
              call.template operator()<1>();
              continue;
            }
          call.template operator()<kPanel>();
        }
      });
  }

  // The same in tiles that registers hold: body.operator()<panel's vectors, rows, vectors>(panel, column, first). Rows
  // left over are cut into tiles of half as many each: for every number of them this would be much code.
  template <class Body>
  GENKERNELS_INLINE void for_small_tiles(const Place& at, const Body& body) const {
    for_tiles(at, [&]<int kPanel, int kVectors>(int64_t panel, int64_t column, int64_t first, int64_t run) {
      const auto call = [&]<int kRows>(int64_t row) {
        body.template operator()<kPanel, kRows, kVectors>(panel, column, row);
      };
      if (run == kTileRows)
        call.template operator()<kTileRows>(first);
      else
        for_rows_left<kPanel == kVectors ? kTileRows / 2 : 1>(run, first, call);
    });
  }
  template <int kRows, class Body>
  static GENKERNELS_INLINE void for_rows_left(int64_t rows, int64_t first, const Body& body) {
    const int64_t end = first + rows;
    for (; first + kRows <= end; first += kRows) body.template operator()<kRows>(first);
    if constexpr (kRows > 1) for_rows_left<kRows / 2>(end - first, first, body);
  }

  // sum = rows[first:][:] panel[:][column:].
  template <int kPanel, int kRows, int kVectors>
  GENKERNELS_INLINE void multiply_rows(const Place& at, Rows<const E> rows, const E* panels, int64_t size,
                                       int64_t panel, int64_t column, int64_t first,
                                       Vector<A> (&sum)[kRows][kVectors]) const {
    for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA { sum[i][v] = Vector<A>{}; });
    add_rows<kPanel>(at, rows, panels, size, panel, column, first, sum);
  }
  // The same, +=.
  template <int kPanel, int kRows, int kVectors>
  GENKERNELS_INLINE void add_rows(const Place& at, Rows<const E> rows, const E* panels, int64_t size, int64_t panel,
                                  int64_t column, int64_t first, Vector<A> (&sum)[kRows][kVectors]) const {
    const int64_t skipped = column - at.columns.first_column(panel);
    add_in_chains<kScoreChain<A>>(rows[first], rows.stride, kGroup<E>,
                                  panels + at.columns.offset(panel, size) + skipped, Panel<E, kPanel>::kStep, size,
                                  sum);
  }

  // Makes products of a tile, times `factor`, what a softcap makes of them, and keeps that.
  template <int kRows, int kVectors>
  GENKERNELS_INLINE void cap_tile(const Place& at, A factor, E* capped, Vector<A> (&products)[kRows][kVectors]) const {
    for_copy(products, [&](auto& copy) GENKERNELS_LAMBDA {
      at.scores.cap(&copy[0][0], kRows * kVectors);
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) {
          store(capped + i * score_stride + v * kLanes<A>, copy[i][v]);
          copy[i][v] = rounded(copy[i][v] * factor);
        }
    });
  }
  // body(n, d) for a register of each query's scores, where d is the derivative of what a softcap makes of a score.
  template <class Body>
  void each_capped(const Place& at, const E* capped, const Body& body) const {
    for_tiles(at, [&]<int, int kVectors>(int64_t, int64_t column, int64_t first, int64_t run) {
      for (int64_t i = first; i < first + run; ++i)
        for (int64_t n = i * score_stride + column, v = 0; v < kVectors; ++v, n += kLanes<A>)
          body(n, Scores<T>::derivative(load(capped + n)));
    });
  }

  // The scores that the forward pass of few queries saw, times `factor`.
  void form_few_scores(const Place& at, A factor, E* to) const {
    constexpr int64_t kStride = kBlockKeys + kLanes<A>;
    const Rows<const T> keys = rows_of<T>(of.key, at.b, at.kv_head), queries = rows_of<T>(of.query, at.b, at.h);
    const T* rows[kFewRows];
    for (int64_t i = 0; i < at.rows; ++i) rows[i] = queries[at.query + i];
    A scores[kFewRows * kStride];
    multiply_units_of_rows(keys[at.key], keys.stride, of.head_size, at.count, rows, at.rows, scores, kStride);
    Scores<T>::transpose(at.rows, at.count, to, score_stride,
                         [&](int64_t i, int64_t k, int64_t) { return load(scores + i * kStride + k) * factor; });
  }

  // P of a block of keys; with kSums what it adds up to for each query, in `sums`, and with a softcap what that made of
  // the products, in `capped`. `few` is scratch, and fetch(first, run) is called for runs of the keys.
  template <bool kSums, class Fetch>
  void form_probabilities(const Place& at, Rows<const E> keys, const E* panels, const A* near, const A* rest, E* p,
                          E* few, E* capped, A* sums, const Fetch& fetch) const {
    const bool has_cap = of.softcap != 0;
    if (has_mask) form_mask(at, p);
    // Without a mask that forward pass rounds them before it subtracts, the other one does not.
    const A few_scale = is_few && !has_mask ? at.scores.scale : A(1);
    const A scale = is_few && !has_mask ? A(1) : at.scores.scale;
    if (is_few) form_few_scores(at, has_cap ? A(1) : few_scale, few);
    if (kSums) __builtin_memset(sums, 0, size_t(width(at.columns)) * sizeof(A));
    for_small_tiles(at, [&]<int kPanel, int kRows, int kVectors>(int64_t panel, int64_t column, int64_t first) {
      if (panel + 1 == at.columns.panels) fetch(first, kRows);
      if (has_mask) fetch_mask(at, column, column + kVectors * kLanes<A>, first);
      Vector<A> sum[kRows][kVectors];
      if (is_few)
        for_tile<kRows, kVectors>(
            [&](int i, int v) GENKERNELS_LAMBDA { sum[i][v] = load(tile(few, first + i, column) + v * kLanes<A>); });
      else
        multiply_rows<kPanel>(at, keys, panels, of.head_size, panel, column, first, sum);
      if (has_cap) cap_tile(at, few_scale, tile(capped, first, column), sum);
      Vector<A> weights[kVectors] = {};
      shift_scores(at, first, column, scale, has_mask ? tile(p, first, column) : nullptr, near, rest, sum,
                   [&](int i, const auto& exponents) GENKERNELS_LAMBDA {
                     const auto e = power_of_base(exponents);
#pragma GCC unroll 3
                     for (int v = 0; v < kVectors; ++v) {
                       if (kSums) weights[v] += e[v];
                       store(tile(p, first + i, column) + v * kLanes<A>, e[v]);
                     }
                   });
      if (kSums) add_to_sums(sums + column, weights);
    });
  }
  template <int kVectors>
  static GENKERNELS_INLINE void add_to_sums(A* sums, const Vector<A> (&parts)[kVectors]) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes<A>, load(sums + v * kLanes<A>) + parts[v]);
  }

  // to[i][:] += sum_k scores[k][i] rows[k][:], or =, over the keys that query i sees.
  void add_to_queries(const Place& at, const E* scores, Rows<const E> rows, const Columns<E>& columns, A* to,
                      bool is_first) const {
    for (int64_t p = 0; p < columns.panels; ++p)
      columns.with_width(p, [&]<int kVectors>() {
        const int64_t column = columns.first_column(p);
        for_row_tiles(at.rows, [&]<int kRows>(int64_t first) {
          const KeySpan seen = at.scores.span(at.query + first, kRows);
          const int64_t key = larger(0, seen.begin - at.key) / kTileRows * kTileRows;
          const int64_t count = seen.begin == seen.end ? 0 : larger(0, smaller(at.count, seen.end - at.key) - key);
          if (count == 0 && !is_first) return;
          Vector<A> sum[kRows][kVectors] = {};
          add_in_chains<kKeyChain<A>>(scores + key * score_stride + first, 1, score_stride,
                                      rows.first + key * rows.stride + column, rows.stride, count, sum);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) {
              A* const each = to + (first + i) * width(columns) + column + v * kLanes<A>;
              store(each, is_first ? sum[i][v] : load(each) + sum[i][v]);
            }
        });
      });
  }

  struct Factor {
    const E* scores;
    Rows<const E> rows;
  };
  // to[k][:] += factor (sum_i scores[k][i] rows[i][:] + ..), or = where no query before saw the key, over the queries
  // that see key k.
  void add_to_keys(const Place& at, const Factor& one, const Factor* other, const Columns<E>& columns, A factor,
                   Rows<A> to) const {
    for (int64_t p = 0; p < columns.panels; ++p)
      columns.with_width(p, [&]<int kVectors>() {
        const int64_t column = columns.first_column(p);
        for_row_tiles(at.count, [&]<int kRows>(int64_t first) {
          const int64_t skipped = first_seeing(at, at.key + first), end = end_seeing(at, at.key + first + kRows - 1);
          if (skipped >= end) return;
          const bool is_first =
              at.is_first_head && (at.query == 0 || at.scores.visible(at.query - 1) <= at.key + first);
          A* const each = to[at.key + first] + column;
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) __builtin_prefetch(each + i * to.stride + v * kLanes<A>, 1);
          Vector<A> sum[kRows][kVectors] = {};
          const auto add = [&](const Factor& by) GENKERNELS_LAMBDA {
            add_in_chains<kKeyChain<A>>(by.scores + first * score_stride + skipped, score_stride, 1,
                                        by.rows[skipped] + column, by.rows.stride, end - skipped, sum);
          };
          add(one);
          if (other != nullptr) add(*other);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) {
              A* const value = each + i * to.stride + v * kLanes<A>;
              const int lanes = int(smaller(kLanes<A>, columns.count - column - v * kLanes<A>));
              store(value, is_first ? sum[i][v] * factor : load(value, lanes) + sum[i][v] * factor, lanes);
            }
        });
      });
  }
  // Where the sums of keys are added up: in the results, or in a head's own memory.
  Rows<A> key_sums(int64_t b, int64_t h, A* own) const {
    if constexpr (adds_in_place()) return rows_of<T>(arguments.grad_key, b, h);
    return {own, width(head_columns)};
  }
  Rows<A> value_sums(int64_t b, int64_t h, A* own) const {
    if constexpr (adds_in_place()) return rows_of<T>(arguments.grad_value, b, h);
    return {own, width(value_columns)};
  }
  // Zeros for what add_to_keys() never reaches: tiles of keys that no query sees.
  void clear_unseen(int64_t b, int64_t key, int64_t count, const Columns<E>& columns, Rows<A> to) const {
    const VisibleKeys visible(of, b);
    const KeySpan seen = visible.span(0, groups == 0 ? 0 : of.queries);
    const int64_t begin = seen.begin == seen.end ? visible.keys : seen.begin / kTileRows * kTileRows;
    const int64_t end = smaller(visible.keys, ceil_div(seen.end, kTileRows) * kTileRows);
    for (int64_t k = key; k < key + count; ++k)
      if (k < begin || k >= end) __builtin_memset(to[k], 0, size_t(columns.count) * sizeof(A));
  }
  void narrow_rows(const HeadsOutput& to, int64_t b, int64_t h, int64_t key, int64_t count, int64_t size,
                   Rows<A> from) const {
    if constexpr (!adds_in_place())
      for (int64_t k = key; k < key + count; ++k) narrow<T>(rows_of<T>(to, b, h)[k], from[k], size);
  }

  // to = factor times the sum of `count` parts, in their order.
  void add_parts(T* to, const A* parts, int64_t count, const Columns<E>& columns, A factor) const {
    for (int64_t n = 0; n < columns.count; n += kLanes<A>) {
      Vector<A> sum{};
      for (int64_t part = 0; part < count; ++part) sum += load(parts + part * block_queries * width(columns) + n);
      store(to + n, sum * factor, int(smaller(kLanes<A>, columns.count - n)));
    }
  }

  A* mask_row(int64_t b, int64_t h, int64_t query) const {
    return grad_mask + b * arguments.grad_mask_batch + h * arguments.grad_mask_head + query * arguments.grad_mask_query;
  }

  // The gradient of a mask where nothing is broadcast, of keys that a block of queries does not see.
  void clear_mask(const Queries& at, int64_t member, const Team& team) const {
    if (grad_mask == nullptr || sums_mask) return;
    each_key_block(member, team, [&](int64_t key, int64_t count, int64_t block) {
      if (block < at.first_block || block >= at.end_block) add_to_mask(Place{at, key, count, block}, nullptr);
    });
  }
  // The gradient of a mask that has keys: of the block's scores, += or, where nothing is broadcast, =.
  void add_to_mask(const Place& at, E* grad_scores) const {
    if (arguments.grad_mask_query == 0 && of.queries > 1) {
      for (int64_t k = 0; k < at.count && first_seeing(at, at.key + k) < at.rows; ++k) {
        Vector<A> sum{};
        const int64_t first = first_seeing(at, at.key + k / kTileRows * kTileRows) / kLanes<A> * kLanes<A>;
        const int64_t end = end_seeing(at, at.key + k);
        for (int64_t i = first; i < end; i += kLanes<A>)
          sum += load(tile(grad_scores, k, i), int(smaller(kLanes<A>, end - i)));
        mask_row(at.b, at.h, at.query)[at.key + k] += sum_of_lanes<A>(sum);
      }
      return;
    }
    Lanes lanes{};
    for (int l = 0; l < kLanes<A>; ++l) lanes[l] = Lane(l);
    A lines[kLanes<A>][kBlockKeys];
    const int64_t all = smaller(block_keys, of.keys - at.key);  // of others than those of this batch there are zeros
    for (int64_t i = 0; i < at.rows; i += kLanes<A>) {
      for (int64_t k = 0; k < all; k += kLanes<A>) {
        const int64_t count = smaller(kLanes<A>, all - k), rows = smaller(kLanes<A>, at.rows - i);
        const KeySpan span = at.scores.span(at.query + i, rows);
        const bool is_seen = span.begin < smaller(span.end, at.key + k + count) && span.end > at.key + k;
        if (!is_seen && sums_mask) continue;
        Square<LaneOf<sizeof(A)>> square;
        for (int64_t n = 0; n < kLanes<A>; ++n) {
          const Vector<A> row = n < count && is_seen ? load(tile(grad_scores, k + n, i)) : Vector<A>{};
          __builtin_memcpy(&square.rows[n], &row, sizeof row);
        }
        square.transpose();
        for (int64_t n = 0; n < rows; ++n) {
          const int64_t seen = larger(0, smaller(count, at.scores.visible(at.query + i + n) - at.key - k));
          const int64_t unseen = smaller(seen, larger(0, at.scores.first_visible(at.query + i + n) - at.key - k));
          Vector<A> x;
          __builtin_memcpy(&x, &square.rows[n], sizeof x);
          x = (lanes >= Lane(unseen)) & (lanes < Lane(seen)) ? x : Vector<A>{};
          A* const to = mask_row(at.b, at.h, at.query + i + n) + at.key + k;
          if (!sums_mask)
            store(lines[n] + k, x);
          else if (seen > 0)
            store(to, load(to, int(seen)) + x, int(seen));
        }
      }
      // Row by row: memory takes a line from each of many pages far more slowly.
      for (int64_t n = 0; n < smaller(kLanes<A>, at.rows - i) && !sums_mask; ++n) {
        A* const to = mask_row(at.b, at.h, at.query + i + n) + at.key;
        const bool streams = uintptr_t(to) % kVectorBytes == 0;
        int64_t k = 0;
        for (; k + kLanes<A> <= all; k += kLanes<A>)
          if (streams)
            stream(to + k, load(lines[n] + k));
          else
            store(to + k, load(lines[n] + k));
        if (k < all) store(to + k, load(lines[n] + k), int(all - k));
      }
    }
  }

  // The gradient of a mask that all keys share, from the sums over `parts` blocks of keys: a member's rows.
  void add_rows_to_mask(const Queries& at, const A* sums, int64_t parts, int64_t member, int64_t members) const {
    const bool is_one_row = arguments.grad_mask_query == 0 && of.queries > 1;
    if (is_one_row && member > 0) return;
    for (int64_t i = is_one_row ? 0 : member; i < at.rows; i += is_one_row ? 1 : members) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += double(sums[part * block_queries + i]);
      A* const to = mask_row(at.b, at.h, at.query + i);
      *to = A(double(*to) + sum);
    }
  }
};

}  // namespace genkernels::GENKERNELS_LEVEL
