#include "attention_scores.h"
#include "gemv.h"

GENKERNELS_DECLARE_ATTENTION(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// The gradients of keys and values are added up for one block of keys over all queries, those of queries in memory (Dao
// 2023, https://arxiv.org/abs/2307.08691, algorithm 2). With P the probabilities and delta = sum_j P_ij dP_ij, which is
// grad_output_i output_i: dP = grad_output V^T, dS = P (dP - delta + grad_logsumexp), grad_query = scale dS K,
// grad_key = scale dS^T Q, grad_value = P^T grad_output.
//
// A team of threads goes through a head: each member has blocks of keys of its own, and when the scores of some queries
// are known the members share these queries' rows of grad_query. Where there are heads enough a team has one member.
template <class T>
struct Backward {
  using A = Accumulator<T>;
  using E = A;
  static constexpr int64_t kBlockQueries = 64;
  static constexpr int64_t kBlocksTogether = 16;  // of queries, between two meetings of a team
  static constexpr int64_t kScoreStride = kBlockKeys + 64 / int64_t(sizeof(E));

  // A thread's own memory.
  struct Block {
    E *queries, *grad_outputs;             // [kBlockQueries, ..] as left operands
    E *query_panels, *grad_output_panels;  // the same as right operands
    E* probabilities;                      // [kBlockQueries, kScoreStride]
    E* grad_scores;                        // the same; in a team, of kBlocksTogether blocks
    A *grad_keys, *grad_values;            // [kBlockKeys, ..]
    A* row_sums;                           // [kBlockQueries]
  };
  // What a team knows of a head.
  struct Head {
    E *keys, *key_rows, *values;  // keys and values transposed, and keys as rows
    A *shift, *rest, *delta;      // [groups, L]
    A* grad_queries;              // [groups, L, query columns]; unused where sums go to grad_query itself
  };
  struct Team {
    int64_t members, meeting_members;  // the second: of this range, see Barrier
    int64_t first, last;               // members that this thread is
    mutable int64_t meetings;
  };

  const AttentionBackward& arguments;
  const Attention& of;
  const Runtime& runtime;
  const PackedHead<T, E> keys, values;
  const Columns<E>& query_columns;
  const Columns<E> value_columns;
  const int64_t groups, query_blocks, key_blocks, kv_count, shares;
  const bool sums_mask, is_mask_shared;
  const int64_t own_heads;
  const int64_t query_stride, value_stride;
  const Barrier barrier;
  Block* blocks;
  Head* heads;
  A* mask_sums;

  Backward(const AttentionBackward& backward, const Runtime& r)
      : arguments(backward),
        of(backward.of),
        runtime(r),
        keys(of.keys, of.head_size, of.head_size),
        values(of.keys, of.value_size, 0),
        query_columns(keys.values),
        value_columns(of.value_size),
        groups(of.heads / larger(1, of.kv_heads)),
        query_blocks(ceil_div(of.queries, kBlockQueries)),
        key_blocks(ceil_div(of.keys, kBlockKeys)),
        kv_count(of.batch * of.kv_heads),
        shares(larger(1, smaller(r.threads, kv_count * larger(key_blocks, query_blocks)))),
        sums_mask(arguments.grad_mask != nullptr &&
                  arguments.grad_mask_size < of.batch * of.heads * of.queries * of.keys),
        is_mask_shared(arguments.grad_mask != nullptr && ((of.batch > 1 && arguments.grad_mask_batch == 0) ||
                                                          (of.heads > 1 && arguments.grad_mask_head == 0))),
        own_heads(is_mask_shared ? 0 : kv_count / shares),
        query_stride(staged_stride<E>(of.head_size)),
        value_stride(staged_stride<E>(of.value_size)),
        barrier(r, shares),
        blocks(allocate<Block>(r, shares)),
        heads(allocate<Head>(r, shares)),
        mask_sums(static_cast<A*>(arguments.grad_mask)) {
    const bool has_teams = own_heads * shares < kv_count;
    for (int64_t share = 0; share < shares; ++share) {
      const int64_t query_size = kBlockQueries * query_columns.vectors * kLanes<E>;
      const int64_t value_size = kBlockQueries * value_columns.vectors * kLanes<E>;
      blocks[share] = {allocate<E>(r, kBlockQueries * query_stride),
                       allocate<E>(r, kBlockQueries * value_stride),
                       allocate<E>(r, query_size),
                       allocate<E>(r, value_size),
                       allocate<E>(r, kBlockQueries * kScoreStride),
                       allocate<E>(r, (has_teams ? kBlocksTogether : 1) * kBlockQueries * kScoreStride),
                       allocate<A>(r, kBlockKeys * query_columns.vectors * kLanes<A>),
                       allocate<A>(r, kBlockKeys * value_columns.vectors * kLanes<A>),
                       allocate<A>(r, kBlockQueries)};
      if (share == 0 || own_heads > 0)
        heads[share] = {allocate<E>(r, keys.transposed_size()),
                        allocate<E>(r, keys.rows_size()),
                        allocate<E>(r, values.transposed_size()),
                        allocate<A>(r, groups * of.queries),
                        allocate<A>(r, groups * of.queries),
                        allocate<A>(r, groups * of.queries),
                        adds_in_place() ? nullptr : allocate<A>(r, groups * of.queries * query_width())};
    }
    if (mask_sums != nullptr && narrows_mask()) mask_sums = allocate<A>(r, arguments.grad_mask_size);
  }

  static constexpr bool adds_in_place() { return __is_same(T, A); }
  bool narrows_mask() const { return !__is_same(T, A) && of.mask.type == MaskType::of_dtype; }
  int64_t query_width() const { return query_columns.vectors * kLanes<A>; }
  int64_t value_width() const { return value_columns.vectors * kLanes<A>; }

  void run() const {
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      Team all{shares, last - first, first, last, 0};
      const auto part = [&](int64_t count, int64_t share) { return count * share / shares; };
      if (sums_mask) {
        const int64_t begin = part(arguments.grad_mask_size, first), end = part(arguments.grad_mask_size, last);
        __builtin_memset(mask_sums + begin, 0, size_t(end - begin) * sizeof(A));
        meet(all);
      }
      for (int64_t share = first; share < last; ++share) {
        const Team alone{1, 1, 0, 1, 0};
        for (int64_t kv = share * own_heads; kv < (share + 1) * own_heads; ++kv)
          run_head(kv, heads[share], blocks + share, alone);
      }
      for (int64_t kv = own_heads * shares; kv < kv_count; ++kv) {
        meet(all);  // the head's memory is free, for own heads too
        run_head(kv, heads[0], blocks, all);
      }
      finish_streams();
      if (mask_sums != nullptr && narrows_mask()) {
        meet(all);
        const int64_t begin = part(arguments.grad_mask_size, first), end = part(arguments.grad_mask_size, last);
        narrow<T>(static_cast<T*>(arguments.grad_mask) + begin, mask_sums + begin, end - begin);
      }
    });
  }

  void meet(const Team& team) const {
    if (team.members > 1) barrier.wait(team.meeting_members, ++team.meetings);
  }

  void run_head(int64_t kv, const Head& head, Block* members, const Team& team) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads;
    for (int64_t member = team.first; member < team.last; ++member) prepare(b, h, head, member, team.members);
    meet(team);
    const int64_t together = team.members == 1 ? 1 : kBlocksTogether;
    for (int64_t super = 0; super < key_blocks; super += team.members) {
      for (int64_t member = team.first; member < team.last; ++member)
        if (super + member < key_blocks) {
          __builtin_memset(members[member].grad_keys, 0, size_t(kBlockKeys * query_width()) * sizeof(A));
          __builtin_memset(members[member].grad_values, 0, size_t(kBlockKeys * value_width()) * sizeof(A));
        }
      for (int64_t g = 0; g < groups; ++g) {
        const Scores<T> scores(of, b, h * groups + g);
        for (int64_t first = 0; first < query_blocks; first += together) {
          const int64_t end = smaller(first + together, query_blocks);
          for (int64_t member = team.first; member < team.last; ++member)
            if (super + member < key_blocks)
              for (int64_t block = first; block < end; ++block)
                add_block(b, h * groups + g, g, block, block - first, super + member, scores, head, members[member]);
          meet(team);
          for (int64_t member = team.first; member < team.last; ++member)
            for (int64_t block = first + member; block < end; block += team.members)
              add_to_queries(b, h * groups + g, g, block, block - first, super, team.members, scores, head, members);
          if (arguments.grad_mask != nullptr && arguments.grad_mask_key == 0 && of.keys > 1)
            for (int64_t member = team.first; member < team.last; ++member)
              add_rows_to_mask(b, h * groups + g, first, end, super, member, team.members, scores, members);
          meet(team);
        }
      }
      for (int64_t member = team.first; member < team.last; ++member)
        if (super + member < key_blocks) finish_keys(b, h, super + member, members[member]);
    }
    if (key_blocks == 0)
      for (int64_t g = 0; g < groups && team.first == 0; ++g)
        for (int64_t i = 0; i < of.queries; ++i)
          __builtin_memset(rows_of<T>(arguments.grad_query, b, h * groups + g)[i], 0, size_t(of.head_size) * sizeof(T));
    else if constexpr (!adds_in_place())
      for (int64_t member = team.first; member < team.last; ++member)
        for (int64_t n = member; n < groups * query_blocks; n += team.members) {
          const int64_t g = n / query_blocks, query = n % query_blocks * kBlockQueries;
          const Rows<T> to = rows_of<T>(arguments.grad_query, b, h * groups + g);
          for (int64_t i = query; i < smaller(query + kBlockQueries, of.queries); ++i)
            narrow<T>(to[i], head.grad_queries + (g * of.queries + i) * query_width(), of.head_size);
        }
  }

  // A member's part of what is known before the first block.
  void prepare(int64_t b, int64_t h, const Head& head, int64_t member, int64_t members) const {
    const Rows<const T> key = rows_of<T>(of.key, b, h), value = rows_of<T>(of.value, b, h);
    for (int64_t block = member; block < key_blocks; block += members) {
      const int64_t first = block * kBlockKeys;
      keys.pack_transposed(key, first, head.keys);
      values.pack_transposed(value, first, head.values);
      keys.pack_rows(key, first, smaller(kBlockKeys, of.keys - first), head.key_rows);
    }
    const int64_t all = of.batch * of.heads * of.queries;
    for (int64_t n = member; n < groups * query_blocks; n += members) {
      const int64_t g = n / query_blocks, query = n % query_blocks * kBlockQueries, hq = h * groups + g;
      const int64_t row = (b * of.heads + hq) * of.queries;
      const A* const statistics = static_cast<const A*>(arguments.statistics) + row;
      const A* const grad = arguments.grad_logsumexp ? static_cast<const A*>(arguments.grad_logsumexp) + row : nullptr;
      const Rows<const T> output = rows_of<T>(arguments.output, b, hq);
      const Rows<const T> grad_output = rows_of<T>(arguments.grad_output, b, hq);
      for (int64_t i = query; i < smaller(query + kBlockQueries, of.queries); ++i) {
        const Shift<A> shift = shift_of(statistics[i], statistics[all + i]);
        head.shift[g * of.queries + i] = shift.near;
        head.rest[g * of.queries + i] = shift.rest;
        double sum = 0;
        for (int64_t n = 0; n < of.value_size && !sums_delta(); n += kLanes<A>) {
          const int count = int(smaller(kLanes<A>, of.value_size - n));
          const Vector<A> product = load(grad_output[i] + n, count) * load(output[i] + n, count);
          sum += double(sum_of_lanes<A>(product));
        }
        head.delta[g * of.queries + i] =
            sums_delta() ? (grad ? grad[i] : A(0)) : A(sum - (grad ? double(grad[i]) : 0.0));
      }
    }
  }

  // What a block of queries and a block of keys have to do with each other: its part of the gradients of keys and
  // values, and the gradient of its scores.
  void add_block(int64_t b, int64_t h, int64_t g, int64_t query_block, int64_t slot, int64_t key_block,
                 const Scores<T>& scores, const Head& head, const Block& block) const {
    const int64_t query = query_block * kBlockQueries, rows = smaller(kBlockQueries, of.queries - query);
    const int64_t key = key_block * kBlockKeys;
    const Columns<E> columns = keys.columns(key);
    if (scores.visible(query + rows - 1) <= key) {
      if (arguments.grad_mask != nullptr && !sums_mask) clear_mask(b, h, query, rows, key, columns.count);
      return;
    }
    const Rows<const T> from = rows_of<T>(of.query, b, h), grad_from = rows_of<T>(arguments.grad_output, b, h);
    const auto query_row = [&](int64_t i) { return from[query + i]; };
    const auto grad_row = [&](int64_t i) { return grad_from[query + i]; };
    const Rows<const E> queries = stage<E, T>(block.queries, query_stride, rows, of.head_size, query_row);
    const Rows<const E> grad_outputs = stage<E, T>(block.grad_outputs, value_stride, rows, of.value_size, grad_row);
    for (int64_t p = 0; p < query_columns.panels; ++p)
      pack_panel<E, T>(query_columns, p, rows, query_row, block.query_panels + query_columns.offset(p, rows));
    for (int64_t p = 0; p < value_columns.panels; ++p)
      pack_panel<E, T>(value_columns, p, rows, grad_row, block.grad_output_panels + value_columns.offset(p, rows));
    const Rows<E> probabilities{block.probabilities, kScoreStride};
    const Rows<E> grad_scores{block.grad_scores + slot * kBlockQueries * kScoreStride, kScoreStride};
    const int64_t statistics = g * of.queries + query;
    // Scores have to be those that the forward pass saw, added up in the same order: of other ones, probabilities do
    // not add up to one.
    const bool has_scores = is_decode(of);
    if (has_scores) {
      const Rows<const T> key_rows = rows_of<T>(of.key, b, h / groups);
      const T* x[kFewRows];
      for (int64_t i = 0; i < rows; ++i) x[i] = query_row(i);
      multiply_units_of_rows(key_rows[key], key_rows.stride, of.head_size, columns.count, x, rows, block.probabilities,
                             kScoreStride);
    }

    for (int64_t p = 0; p < columns.panels; ++p) {
      const int64_t column = columns.first_column(p);
      columns.with_width(p, [&]<int kVectors>() {
        const E* const panel = keys.transposed_panel(head.keys, key, p);
        for_row_tiles(rows, [&]<int kRows>(int64_t first) {
          if (scores.visible(query + first + kRows - 1) <= key + tile_start(column)) return;
          Vector<A> sum[kRows][kVectors];
          if (has_scores)
            for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
              sum[i][v] = load(probabilities[first + i] + column + v * kLanes<A>);
            });
          else
            multiply_in_chains<kScoreChain<A>, kVectors>(queries[first], queries.stride, panel, of.head_size, sum);
          A scale = scores.scale;
          if (scores.needs_mask(query + first, key + column + kVectors * kLanes<A>)) {
            scores.apply_mask(query + first, key + column, sum);
            scale = 1;
          } else if (has_scores) {
            for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA { sum[i][v] *= scale; });
            scale = 1;
          }
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const A shift = head.shift[statistics + first + i], rest = head.rest[statistics + first + i];
            const auto p = power_of_base(
                several<kVectors>([&](int v) GENKERNELS_LAMBDA { return (sum[i][v] * scale - shift) - rest; }));
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) store(probabilities[first + i] + column + v * kLanes<A>, p[v]);
          }
        });
      });
    }
    if (of.dropout.threshold) scores.template mark_dropped<E>(query, rows, key, columns.count, probabilities);
    const auto delta_of = [&](int64_t i) { return sums_delta() ? A(0) : head.delta[statistics + i]; };
    for (int64_t p = 0; p < columns.panels; ++p) {
      const int64_t column = columns.first_column(p);
      columns.with_width(p, [&]<int kVectors>() {
        const E* const panel = values.transposed_panel(head.values, key, p);
        for_row_tiles(rows, [&]<int kRows>(int64_t first) {
          if (scores.visible(query + first + kRows - 1) <= key + tile_start(column)) return;
          Vector<A> sum[kRows][kVectors];
          multiply_in_chains<kScoreChain<A>, kVectors>(grad_outputs[first], grad_outputs.stride, panel, of.value_size,
                                                       sum);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i)
            form_grad_scores<kVectors>(sum[i], delta_of(first + i), probabilities[first + i] + column,
                                       grad_scores[first + i] + column);
        });
      });
    }
    if (sums_delta())
      for (int64_t i = 0; i < rows; ++i)
        take_off_mean(probabilities[i], grad_scores[i], smaller(columns.count, scores.visible(query + i)),
                      head.delta[statistics + i]);
    if (arguments.grad_mask != nullptr && (arguments.grad_mask_key != 0 || of.keys == 1))
      add_to_mask(b, h, query, rows, key, columns.count, scores, grad_scores);
    add_to_keys<A>(query, rows, key, columns.count, probabilities, value_columns, block.grad_output_panels,
                   block.grad_values, value_width());
    add_to_keys<A>(query, rows, key, columns.count, grad_scores, query_columns, block.query_panels, block.grad_keys,
                   query_width());
  }

  // A tile of the keys' gradients can begin in the panel before: its scores have to be there, too.
  static int64_t tile_start(int64_t column) { return column / kTileRows * kTileRows; }

  // dS = P (dP - delta). With dropout, what is not kept is marked by its sign: its dP is 0, the others' is scaled, and
  // it takes no part in the value's gradient.
  template <int kVectors>
  GENKERNELS_INLINE void form_grad_scores(const Vector<A> (&grad)[kVectors], A delta, E* probabilities,
                                          E* grad_scores) const {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      Vector<A> p = load(probabilities + v * kLanes<A>), x = grad[v];
      if (of.dropout.threshold) {
        x = is_dropped(p) ? Vector<A>{} : x * A(of.dropout.scale);
        const Vector<A> kept = is_dropped(p) ? Vector<A>{} : p;
        store(probabilities + v * kLanes<A>, kept);
        p = is_dropped(p) ? -p : p;
      }
      store(grad_scores + v * kLanes<A>, p * (x - delta));
    }
  }
  // Where one block holds all keys, delta is the sum that it stands for: of few keys, dP - delta loses digits that an
  // output, once rounded, does not give back.
  bool sums_delta() const { return key_blocks == 1 && of.dropout.threshold == 0; }

  static void take_off_mean(const E* probabilities, E* grad_scores, int64_t count, A grad_logsumexp) {
    double sum = 0;
    for (int64_t k = 0; k < count; k += kLanes<A>)
      sum += double(sum_of_lanes<A>(load(grad_scores + k, int(smaller(kLanes<A>, count - k)))));
    const A delta = A(sum - double(grad_logsumexp));
    for (int64_t k = 0; k < count; k += kLanes<A>) {
      const int lanes = int(smaller(kLanes<A>, count - k));
      store(grad_scores + k, load(grad_scores + k, lanes) - load(probabilities + k, lanes) * delta, lanes);
    }
  }

  static GENKERNELS_INLINE auto is_dropped(Vector<A> p) {
    typedef LaneOf<sizeof(A)> Lane;
    typedef Lane Lanes __attribute__((vector_size(kVectorBytes)));
    return ((Lanes)p >> (8 * sizeof(A) - 1)) != Lane(0);
  }

  // to[k][:] += sum_i scores[i][k] rows[i][:], over the queries that see key k.
  template <class S>
  void add_to_keys(int64_t query, int64_t rows, int64_t key, int64_t count, Rows<E> from, const Columns<E>& columns,
                   const E* panels, S* to, int64_t stride) const {
    for (int64_t p = 0; p < columns.panels; ++p)
      columns.with_width(p, [&]<int kVectors>() {
        const E* const panel = panels + columns.offset(p, rows);
        for_row_tiles(count, [&]<int kRows>(int64_t first) {
          const int64_t skipped = larger(0, smaller(rows, key + first - of.diagonal - query));
          if (skipped == rows) return;
          Vector<A> sum[kRows][kVectors] = {};
          multiply<E, kRows, kVectors>(from[skipped] + first, 1, kScoreStride,
                                       panel + skipped * Panel<E, kVectors>::kStep, rows - skipped, sum);
          S* const at = to + first * stride + columns.first_column(p);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) {
              S* const each = at + i * stride + v * kLanes<A>;
              store(each, load(each) + sum[i][v]);
            }
        });
      });
  }

  // grad_query += scale dS K, or =, over the team's blocks of keys.
  void add_to_queries(int64_t b, int64_t h, int64_t g, int64_t query_block, int64_t slot, int64_t first_block,
                      int64_t count_of_blocks, const Scores<T>& scores, const Head& head, const Block* members) const {
    const int64_t query = query_block * kBlockQueries, rows = smaller(kBlockQueries, of.queries - query);
    A* to = nullptr;
    int64_t stride = query_width();
    if constexpr (adds_in_place()) {
      const Rows<T> own = rows_of<T>(arguments.grad_query, b, h);
      to = own[query];
      stride = own.stride;
    } else {
      to = head.grad_queries + (g * of.queries + query) * query_width();
    }
    for (int64_t member = 0; member < count_of_blocks && first_block + member < key_blocks; ++member) {
      const int64_t key = (first_block + member) * kBlockKeys, most = smaller(kBlockKeys, of.keys - key);
      const E* const from = members[member].grad_scores + slot * kBlockQueries * kScoreStride;
      for (int64_t p = 0; p < query_columns.panels; ++p)
        query_columns.with_width(p, [&]<int kVectors>() {
          const int64_t column = query_columns.first_column(p);
          for_row_tiles(rows, [&]<int kRows>(int64_t first) {
            const int64_t count = larger(0, smaller(most, scores.visible(query + first + kRows - 1) - key));
            if (count == 0 && key > 0) return;
            Vector<A> sum[kRows][kVectors];
            multiply_in_chains<kKeyChain<A>, kVectors>(from + first * kScoreStride, kScoreStride,
                                                       keys.rows_panel(head.key_rows, key, p), count, sum);
            for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
              A* const at = to + (first + i) * stride + column + v * kLanes<A>;
              const int lanes =
                  adds_in_place() ? int(smaller(kLanes<A>, of.head_size - column - v * kLanes<A>)) : kLanes<A>;
              const Vector<A> x = sum[i][v] * A(of.scale);
              store(at, key == 0 ? x : load(at, lanes) + x, lanes);
            });
          });
        });
    }
  }

  A* mask_row(int64_t b, int64_t h, int64_t query) const {
    return mask_sums + b * arguments.grad_mask_batch + h * arguments.grad_mask_head + query * arguments.grad_mask_query;
  }

  void clear_mask(int64_t b, int64_t h, int64_t query, int64_t rows, int64_t key, int64_t count) const {
    for (int64_t i = query; i < query + rows; ++i)
      __builtin_memset(mask_row(b, h, i) + key, 0, size_t(count) * sizeof(A));
  }

  // grad_mask += dS, or = where nothing is broadcast.
  void add_to_mask(int64_t b, int64_t h, int64_t query, int64_t rows, int64_t key, int64_t count,
                   const Scores<T>& scores, Rows<E> grad_scores) const {
    if (arguments.grad_mask_query == 0 && rows > 1)
      return add_columns_to_mask(mask_row(b, h, query) + key, query, rows, key, count, scores, grad_scores);
    for (int64_t i = 0; i < rows; ++i) {
      A* const to = mask_row(b, h, query + i) + key;
      const int64_t seen = larger(0, smaller(count, scores.visible(query + i) - key));
      if (!sums_mask && seen == count && count % kLanes<A> == 0 && uintptr_t(to) % kVectorBytes == 0) {
        for (int64_t k = 0; k < count; k += kLanes<A>) stream(to + k, load(grad_scores[i] + k));
        continue;
      }
      for (int64_t k = 0; k < count; k += kLanes<A>) {
        const int lanes = int(smaller(kLanes<A>, count - k)), used = int(larger(0, smaller(lanes, seen - k)));
        if (used == 0 && sums_mask) break;
        const Vector<A> x = used > 0 ? load(grad_scores[i] + k, used) : Vector<A>{};
        store(to + k, sums_mask ? load(to + k, lanes) + x : x, lanes);
      }
    }
  }

  // The same for a mask that all queries share, in chains of 16: one over all of them errs by more than PyTorch's sum.
  void add_columns_to_mask(A* to, int64_t query, int64_t rows, int64_t key, int64_t count, const Scores<T>& scores,
                           Rows<E> grad_scores) const {
    constexpr int64_t kShortChain = 16;
    for (int64_t k = 0; k < count; k += kLanes<A>) {
      const int lanes = int(smaller(kLanes<A>, count - k));
      Vector<A> sum = {};
      for (int64_t first = 0; first < rows; first += kShortChain) {
        Vector<A> part = {};
        for (int64_t i = first; i < smaller(rows, first + kShortChain); ++i) {
          const int64_t seen = scores.visible(query + i) - key - k;
          if (seen > 0) part += load(grad_scores[i] + k, int(smaller(lanes, seen)));
        }
        sum += part;
      }
      store(to + k, load(to + k, lanes) + sum, lanes);
    }
  }

  // The same for a mask that all keys share: its rows are the sums of dS over the keys.
  void add_rows_to_mask(int64_t b, int64_t h, int64_t first_block, int64_t last_block, int64_t first_key_block,
                        int64_t member, int64_t count_of_blocks, const Scores<T>& scores, const Block* members) const {
    const bool is_one_row = arguments.grad_mask_query == 0 && of.queries > 1;
    if (is_one_row && member > 0) return;
    for (int64_t block = first_block + (is_one_row ? 0 : member); block < last_block;
         block += is_one_row ? 1 : count_of_blocks)
      for (int64_t i = 0; i < smaller(kBlockQueries, of.queries - block * kBlockQueries); ++i) {
        const int64_t query = block * kBlockQueries + i;
        for (int64_t n = 0; n < count_of_blocks && first_key_block + n < key_blocks; ++n) {
          const int64_t key = (first_key_block + n) * kBlockKeys;
          const int64_t seen = smaller(smaller(kBlockKeys, of.keys - key), scores.visible(query) - key);
          const E* const from = members[n].grad_scores + ((block - first_block) * kBlockQueries + i) * kScoreStride;
          double sum = 0;
          for (int64_t k = 0; k < seen; ++k) sum += double(from[k]);
          A* const to = mask_row(b, h, query);
          *to = A(double(*to) + sum);
        }
      }
  }

  void finish_keys(int64_t b, int64_t h, int64_t key_block, const Block& block) const {
    const int64_t key = key_block * kBlockKeys, count = smaller(kBlockKeys, of.keys - key);
    const auto write = [&](Rows<T> to, const A* from, int64_t width, int64_t size, A factor) {
      for (int64_t k = 0; k < count; ++k)
        for (int64_t n = 0; n < size; n += kLanes<A>)
          store(to[key + k] + n, load(from + k * width + n) * factor, int(smaller(kLanes<A>, size - n)));
    };
    write(rows_of<T>(arguments.grad_key, b, h), block.grad_keys, query_width(), of.head_size, A(of.scale));
    write(rows_of<T>(arguments.grad_value, b, h), block.grad_values, value_width(), of.value_size, A(of.dropout.scale));
  }
};

}  // namespace

void attention_backward(const AttentionBackward& arguments, const Runtime& runtime) {
  if (is_decode(arguments.of) && arguments.grad_mask == nullptr) return attention_decode_backward(arguments, runtime);
  switch (arguments.of.dtype) {
    case DType::float32: return Backward<float>(arguments, runtime).run();
    case DType::float64: return Backward<double>(arguments, runtime).run();
    case DType::bfloat16: return Backward<bfloat16>(arguments, runtime).run();
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
