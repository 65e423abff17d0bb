#include "attention_scores.h"

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
// products is computed twice. They lie as [keys, queries]: sums over keys are then sums of registers, and rows of keys
// and values are operands as they are, from the left of scores and from the right of what queries get.
//
// A team of threads goes through a head: each member has blocks of keys of its own. The members meet where sums over
// all keys are known, and then share the rows of what queries get. Where there are heads enough a team has one member.
template <class T>
struct DoubleBackward {
  using A = Accumulator<T>;
  using E = A;
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
    A *w, *mean, *t;                    // of each query: rowsum(P W), that of P Z (G V^T) - grad_logsumexp, that of P T
  };
  // A team's memory.
  struct Head {
    Keys keys;
    E* p;                         // P, then Z P; [keys, score_stride] as the next four
    E* e;                         // Z (G V^T), then P E
    E* w;                         // W, then Z P U
    E* t;                         // Z (G C^T), then P T, then the gradient of S
    E* z;                         // with dropout alone
    A *w_sums, *mean_sums;        // of a block's keys, [key_blocks, block_queries] as the next two
    A *t_sums, *mask_sums;        // the second: of the gradient of S
    A *grad_queries, *grad_rows;  // what Q and G get from a block's keys, [key_blocks, block_queries, ..]
    A *grad_keys, *grad_values;   // [keys, ..]; unused where sums go to the results themselves
  };
  struct Team {
    int64_t members, meeting_members;  // the second: of this range, see Barrier
    int64_t first, last;               // members that this thread is
    mutable int64_t meetings;
  };
  // The next block of queries, and whether it is of another head.
  struct Next {
    int64_t kv, group, query;
    bool is_new_head, is_there;
  };
  // A block of queries, and one of keys.
  struct Place {
    const Scores<T>& scores;
    int64_t b, h, kv_head, query, rows, key, count, key_block;
    Columns<E> columns;  // the queries as columns
    Next next;
  };
  struct Factor {
    const E* scores;
    Rows<const E> rows;
  };

  const AttentionDoubleBackward& arguments;
  const Attention& of;
  const Runtime& runtime;
  Attention of_mask_cotangent;
  const bool has_a, has_b, has_c, has_m, has_w, has_dropout, sums_rows_for_mask;
  const Columns<E> head_columns, value_columns;
  const int64_t groups, kv_count, block_keys, key_blocks, block_queries, query_blocks;
  const int64_t score_stride, head_stride, value_stride;
  const bool keeps_keys, is_mask_shared;
  const int64_t shares, own_heads;
  const Barrier barrier;
  Block* blocks;
  Head* heads;
  A* grad_mask;

  DoubleBackward(const AttentionDoubleBackward& backward, const Runtime& r)
      : arguments(backward),
        of(backward.of),
        runtime(r),
        of_mask_cotangent(of),
        has_a(arguments.grad_grad_query.data != nullptr),
        has_b(arguments.grad_grad_key.data != nullptr),
        has_c(arguments.grad_grad_value.data != nullptr),
        has_m(arguments.grad_grad_mask.type != MaskType::none),
        has_w(has_a || has_b || has_m),
        has_dropout(of.dropout.threshold != 0),
        sums_rows_for_mask(arguments.grad_mask != nullptr && arguments.grad_mask_key == 0 && of.keys > 1),
        head_columns(of.head_size),
        value_columns(of.value_size),
        groups(of.heads / larger(1, of.kv_heads)),
        kv_count(of.batch * of.kv_heads),
        block_keys(in_blocks(of.keys, kBlockKeys, kRandomKeys)),
        key_blocks(ceil_div(of.keys, block_keys)),
        block_queries(in_blocks(of.queries, most_queries(), kLanes<E>)),
        query_blocks(ceil_div(of.queries, block_queries)),
        score_stride(odd_lines(block_queries)),
        head_stride(odd_lines(of.head_size)),
        value_stride(odd_lines(of.value_size)),
        keeps_keys(2 * of.keys * (head_stride + value_stride) * int64_t(sizeof(E)) <= 2 * r.cache),
        is_mask_shared(arguments.grad_mask != nullptr && ((of.batch > 1 && arguments.grad_mask_batch == 0) ||
                                                          (of.heads > 1 && arguments.grad_mask_head == 0))),
        shares(larger(1, smaller(r.threads, is_mask_shared ? key_blocks : larger(kv_count, key_blocks)))),
        own_heads(is_mask_shared ? 0 : kv_count / shares),
        barrier(r, shares),
        blocks(allocate<Block>(r, shares)),
        heads(allocate<Head>(r, shares)),
        grad_mask(static_cast<A*>(arguments.grad_mask)) {
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
                       per_query()};
      if (share > 0 && own_heads == 0) continue;
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
                      allocate<A>(r, key_blocks * block_queries * width(head_columns)),
                      allocate<A>(r, key_blocks * block_queries * width(value_columns)),
                      adds_in_place() ? nullptr : allocate<A>(r, of.keys * width(head_columns)),
                      adds_in_place() ? nullptr : allocate<A>(r, of.keys * width(value_columns))};
    }
    if (grad_mask != nullptr && narrows_mask()) grad_mask = allocate<A>(r, arguments.grad_mask_size);
  }

  // The size of blocks of at most `most` that are about as large as each other, a multiple of `unit`.
  static int64_t in_blocks(int64_t count, int64_t most, int64_t unit) {
    const int64_t blocks = larger(1, ceil_div(count, most));
    return larger(1, ceil_div(ceil_div(count, blocks), unit)) * unit;
  }
  // Half of the cache is for the scores.
  int64_t most_queries() const {
    const int64_t bytes = (has_dropout ? 5 : 4) * larger(1, of.keys) * int64_t(sizeof(E));
    return larger(kLanes<E>, smaller(kMostQueries, runtime.cache / 2 / bytes) / kLanes<E> * kLanes<E>);
  }
  // Elements from one row to the next, so that rows do not share sets of the cache.
  static int64_t odd_lines(int64_t columns) {
    constexpr int64_t kLine = 64 / int64_t(sizeof(E));
    return (ceil_div(columns, kLine) | 1) * kLine;
  }
  static int64_t width(const Columns<E>& columns) { return columns.vectors * kLanes<A>; }
  Keys new_keys(int64_t count) const {
    const auto rows = [&](int64_t stride) { return allocate<E>(runtime, count * stride); };
    return {rows(head_stride), rows(head_stride), rows(value_stride), rows(value_stride)};
  }
  static constexpr bool adds_in_place() { return __is_same(T, A); }
  bool narrows_mask() const { return !__is_same(T, A) && of.mask.type == MaskType::of_dtype; }

  void run() const {
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      const Team all{shares, last - first, first, last, 0};
      const auto part = [&](int64_t share) { return arguments.grad_mask_size * share / shares; };
      if (grad_mask != nullptr) {
        __builtin_memset(grad_mask + part(first), 0, size_t(part(last) - part(first)) * sizeof(A));
        meet(all);
      }
      for (int64_t share = first; share < last; ++share)
        for (int64_t kv = share * own_heads; kv < (share + 1) * own_heads; ++kv)
          run_head(kv, heads[share], blocks + share, Team{1, 1, 0, 1, 0}, kv + 1 == (share + 1) * own_heads);
      for (int64_t kv = own_heads * shares; kv < kv_count; ++kv) {
        meet(all);  // the head's memory is free, for own heads too
        run_head(kv, heads[0], blocks, all, kv + 1 == kv_count);
      }
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

  void run_head(int64_t kv, const Head& head, Block* members, const Team& team, bool is_last) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads;
    const auto each_member = [&](const auto& body) {
      for (int64_t member = team.first; member < team.last; ++member) body(member, members[member]);
    };
    const auto each_key_block = [&](int64_t member, const auto& body) {
      for (int64_t block = member; block < key_blocks; block += team.members)
        body(block * block_keys, smaller(block_keys, of.keys - block * block_keys), block);
    };
    each_member([&](int64_t member, const Block&) {
      each_key_block(member, [&](int64_t key, int64_t count, int64_t) {
        for (int64_t k = key; k < key + count; ++k) {
          __builtin_memset(key_sums(b, h, head)[k], 0, size_t(of.head_size) * sizeof(A));
          __builtin_memset(value_sums(b, h, head)[k], 0, size_t(of.value_size) * sizeof(A));
        }
        if (keeps_keys) copy_keys(b, h, key, count, keys_from(head.keys, key));
      });
    });
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t hq = h * groups + g;
      const Scores<T> scores(of, b, hq);
      for (int64_t query = 0; query < of.queries; query += block_queries) {
        const int64_t rows = smaller(block_queries, of.queries - query);
        const bool ends_head = g + 1 == groups && query + rows == of.queries;
        const Next next{ends_head ? kv + 1 : kv,
                        ends_head                    ? 0
                        : query + rows == of.queries ? g + 1
                                                     : g,
                        query + rows == of.queries ? 0 : query + rows, ends_head, !(ends_head && is_last)};
        const auto each_place = [&](int64_t member, const auto& body) {
          each_key_block(member, [&](int64_t key, int64_t count, int64_t block) {
            body(Place{scores, b, hq, h, query, rows, key, count, block, Columns<E>(rows), next});
          });
        };
        each_member([&](int64_t member, const Block& block) {
          copy_queries(b, hq, query, rows, block);
          each_place(member, [&](const Place& at) { form_scores(at, head, block); });
        });
        meet(team);
        each_member([&](int64_t member, const Block& block) {
          add_up(head.w_sums, nullptr, block.w);
          add_up(head.mean_sums, block.grad_logsumexp, block.mean);
          each_place(member, [&](const Place& at) { form_products(at, head, block); });
        });
        meet(team);
        each_member([&](int64_t member, const Block& block) {
          add_up(head.t_sums, nullptr, block.t);
          each_place(member, [&](const Place& at) {
            form_grad_scores(at, head, block);
            if (grad_mask != nullptr && !sums_rows_for_mask) add_to_mask(at, head.t);
            add_all(at, head, block);
          });
        });
        meet(team);
        each_member([&](int64_t member, const Block& block) {
          finish_queries(b, hq, query, rows, head, block, member, team.members);
        });
      }
    }
    if constexpr (!adds_in_place())
      each_member([&](int64_t member, const Block&) {
        each_key_block(member, [&](int64_t key, int64_t count, int64_t) {
          for (int64_t k = key; k < key + count; ++k) {
            narrow<T>(rows_of<T>(arguments.grad_key, b, h)[k], key_sums(b, h, head)[k], of.head_size);
            narrow<T>(rows_of<T>(arguments.grad_value, b, h)[k], value_sums(b, h, head)[k], of.value_size);
          }
        });
      });
  }

  Rows<A> key_sums(int64_t b, int64_t h, const Head& head) const {
    if constexpr (adds_in_place()) return rows_of<T>(arguments.grad_key, b, h);
    return {head.grad_keys, width(head_columns)};
  }
  Rows<A> value_sums(int64_t b, int64_t h, const Head& head) const {
    if constexpr (adds_in_place()) return rows_of<T>(arguments.grad_value, b, h);
    return {head.grad_values, width(value_columns)};
  }

  // Rows as operands, with zeros up to the end of a register.
  static void copy_rows(Rows<const T> from, int64_t first, int64_t rows, int64_t size, E* to, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t n = 0; n < size; n += kLanes<E>)
        store(to + i * stride + n, load(from[first + i] + n, int(smaller(kLanes<E>, size - n))));
  }
  void copy_keys(int64_t b, int64_t h, int64_t key, int64_t count, const Keys& to) const {
    const auto copy = [&](const HeadsInput& from, int64_t size, E* rows, int64_t stride) {
      if (from.data != nullptr) copy_rows(rows_of<T>(from, b, h), key, count, size, rows, stride);
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

  void copy_queries(int64_t b, int64_t h, int64_t query, int64_t rows, const Block& block) const {
    const Columns<E> columns(rows);
    const auto copy = [&](const HeadsInput& from, int64_t size, E* to, int64_t stride, E* panels) {
      if (from.data == nullptr) return;
      copy_rows(rows_of<T>(from, b, h), query, rows, size, to, stride);
      for (int64_t p = 0; p < columns.panels; ++p)
        columns.with_width(p, [&]<int kVectors>() {
          const int64_t first = columns.first_column(p);
          pack_panel_of_rows<E, E, kVectors>(
              size, [&](int64_t n) { return first + n < rows ? to + (first + n) * stride : nullptr; },
              panels + columns.offset(p, size));
        });
    };
    copy(of.query, of.head_size, block.q, head_stride, block.q_panels);
    copy(arguments.grad_grad_query, of.head_size, block.a, head_stride, block.a_panels);
    copy(arguments.grad_output, of.value_size, block.g, value_stride, block.g_panels);
    const int64_t row = (b * of.heads + h) * of.queries + query, all = of.batch * of.heads * of.queries;
    const A* const statistics = static_cast<const A*>(arguments.statistics) + row;
    const A* const grad = static_cast<const A*>(arguments.grad_logsumexp);
    for (int64_t i = 0; i < columns.vectors * kLanes<A>; ++i) {
      const Shift<A> shift = i < rows ? shift_of(statistics[i], statistics[all + i]) : Shift<A>{0, 0};
      block.shift[i] = shift.near;
      block.rest[i] = shift.rest;
      block.grad_logsumexp[i] = grad == nullptr || i >= rows ? A(0) : grad[row + i];
    }
  }

  // What is copied next is fetched while a tile is multiplied: the share of keys [first, first + run). To wait for
  // memory when it is copied would take a tenth of the time.
  void fetch_next(const Place& at, int64_t first, int64_t run) const {
    if (!at.next.is_there) return;
    const int64_t b = at.next.kv / of.kv_heads, kv_head = at.next.kv % of.kv_heads;
    const auto fetch = [&](const HeadsInput& from, int64_t h, int64_t row, int64_t end, int64_t size) {
      if (from.data == nullptr) return;
      const Rows<const T> rows = rows_of<T>(from, b, h);
      for (; row < end; ++row)
        for (int64_t n = 0; n < size; n += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows[row] + n, 0, 2);
    };
    const int64_t key = at.key + first, rows = smaller(block_queries, of.queries - at.next.query);
    const int64_t query = at.next.query + rows * key / of.keys, end = at.next.query + rows * (key + run) / of.keys;
    fetch(of.query, kv_head * groups + at.next.group, query, end, of.head_size);
    fetch(arguments.grad_grad_query, kv_head * groups + at.next.group, query, end, of.head_size);
    fetch(arguments.grad_output, kv_head * groups + at.next.group, query, end, of.value_size);
    if (!at.next.is_new_head) return;
    fetch(of.key, kv_head, key, key + run, of.head_size);
    fetch(arguments.grad_grad_key, kv_head, key, key + run, of.head_size);
    fetch(of.value, kv_head, key, key + run, of.value_size);
    fetch(arguments.grad_grad_value, kv_head, key, key + run, of.value_size);
  }

  // The first of the block's queries that sees a key.
  int64_t first_seeing(const Place& at, int64_t key) const {
    return larger(0, smaller(at.rows, key - of.diagonal - at.query));
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
  E* tile(E* scores, const Place& at, int64_t first, int64_t column) const {
    return scores + (at.key + first) * score_stride + column;
  }

  // The block's part of a matrix of scores, where of(query, key, count) is a register of a query's keys.
  template <class Of>
  void transpose(const Place& at, E* to, const Of& of_keys) const {
    for (int64_t i = 0; i < at.rows; i += kLanes<A>)
      for (int64_t k = 0; k < at.count; k += kLanes<A>) {
        const int64_t count = smaller(kLanes<A>, at.count - k);
        Square<LaneOf<sizeof(A)>> square{};
        for (int64_t n = 0; n < smaller(kLanes<A>, at.rows - i); ++n) {
          const Vector<A> row = of_keys(i + n, k, int(count));
          __builtin_memcpy(&square.rows[n], &row, sizeof row);
        }
        square.transpose();
        for (int64_t n = 0; n < count; ++n) __builtin_memcpy(tile(to, at, k + n, i), &square.rows[n], kVectorBytes);
      }
  }
  // What is added to scores: -inf where a key takes no part.
  void form_mask(const Place& at, E* to) const {
    typedef LaneOf<sizeof(A)> Lane;
    typedef Lane Lanes __attribute__((vector_size(kVectorBytes)));
    Lanes lanes{};
    for (int l = 0; l < kLanes<A>; ++l) lanes[l] = Lane(l);
    transpose(at, to, [&](int64_t i, int64_t k, int count) {
      const int64_t seen = larger(0, smaller(count, at.scores.visible(at.query + i) - at.key - k));
      Vector<A> x{};
      if (of.mask.type != MaskType::none && seen > 0)
        x = Scores<T>::as_exponents(at.scores.load_mask(at.query + i, at.key + k, seen));
      return lanes < Lane(seen) ? x : broadcast(-A(__builtin_inf()));
    });
  }
  void form_factors(const Place& at, E* to) const {
    E factors[kMostQueries][kRandomKeys];
    for (Place part = at; part.key < at.key + at.count; part.key += kRandomKeys) {
      part.count = smaller(kRandomKeys, at.key + at.count - part.key);
      for (int64_t i = 0; i < at.rows; ++i)
        for (E& factor : factors[i]) factor = E(of.dropout.scale);
      at.scores.template drop<E>(at.query, at.rows, part.key, part.count, {factors[0], kRandomKeys});
      transpose(part, to, [&](int64_t i, int64_t k, int) { return load(factors[i] + k); });
    }
  }

  // P, Z (G V^T), W and Z (G C^T) of a block of keys, and the sums over its keys.
  void form_scores(const Place& at, const Head& head, const Block& block) const {
    A* const w_sums = head.w_sums + at.key_block * block_queries;
    A* const mean_sums = head.mean_sums + at.key_block * block_queries;
    __builtin_memset(w_sums, 0, size_t(block_queries) * sizeof(A));
    __builtin_memset(mean_sums, 0, size_t(block_queries) * sizeof(A));
    if (first_seeing(at, at.key) == at.rows) return;
    const Keys keys = keys_at(at, head, block);
    const bool is_masked = at.scores.needs_mask(at.query, at.key + at.count);
    if (is_masked) form_mask(at, head.p);
    if (has_dropout) form_factors(at, head.z);
    if (has_m) {
      const Scores<T> cotangent(of_mask_cotangent, at.b, at.h);
      transpose(at, head.w,
                [&](int64_t i, int64_t k, int count) { return cotangent.load_mask(at.query + i, at.key + k, count); });
    }
    const A scale = A(of.scale);

    for_tiles(at, [&]<int kVectors>(int64_t panel, int64_t column, int64_t first_of_run, int64_t run) {
      if (panel == 0) fetch_next(at, first_of_run, run);
      const auto form = [&]<int kRows>(int64_t first) {
        typedef Vector<A> Tile[kRows][kVectors];
        const auto multiply_rows = [&](const E* rows, int64_t stride, const E* panels, int64_t size,
                                       Tile& sum) GENKERNELS_LAMBDA {
          multiply_in_chains<kScoreChain<A>, kVectors>(rows + first * stride, stride,
                                                       panels + at.columns.offset(panel, size), size, sum);
        };
        const auto vector_of = [&](E* scores, int i, int v)
                                   GENKERNELS_LAMBDA { return tile(scores, at, first + i, column) + v * kLanes<A>; };
        const auto of_queries = [&](const A* values, int v)
                                    GENKERNELS_LAMBDA { return load(values + column + v * kLanes<A>); };
        const auto add_to = [&](A* sums, const Vector<A>(&part)[kVectors]) GENKERNELS_LAMBDA {
          for (int v = 0; v < kVectors; ++v) {
            A* const to = sums + column + v * kLanes<A>;
            store(to, load(to) + part[v]);
          }
        };
        Tile sum;
        multiply_rows(keys.k, head_stride, block.q_panels, of.head_size, sum);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const auto p = power_of_base(several<kVectors>([&](int v) GENKERNELS_LAMBDA {
            const Vector<A> score =
                is_masked ? at.scores.with_mask(sum[i][v], load(vector_of(head.p, i, v))) : sum[i][v] * at.scores.scale;
            return (score - of_queries(block.shift, v)) - of_queries(block.rest, v);
          }));
          for (int v = 0; v < kVectors; ++v) store(vector_of(head.p, i, v), p[v]);
        }
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
  void add_up(const A* parts, const A* less, A* to) const {
    for (int64_t i = 0; i < block_queries; i += kLanes<A>) {
      Vector<A> sum{};
      for (int64_t block = 0; block < key_blocks; ++block) sum += load(parts + block * block_queries + i);
      store(to + i, less == nullptr ? sum : sum - load(less + i));
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
  void add_all(const Place& at, const Head& head, const Block& block) const {
    const bool is_seen = first_seeing(at, at.key) < at.rows;
    const Keys keys = is_seen && !keeps_keys ? keys_at(at, head, block)
                      : keeps_keys           ? keys_from(head.keys, at.key)
                                             : Keys{};
    const Rows<const E> k{keys.k, head_stride}, b{keys.b, head_stride};
    const Rows<const E> v{keys.v, value_stride}, c{keys.c, value_stride};
    A* const grad_queries = head.grad_queries + at.key_block * block_queries * width(head_columns);
    A* const grad_rows = head.grad_rows + at.key_block * block_queries * width(value_columns);
    add_to_queries(at, {head.t, k}, head_columns, grad_queries, true);
    if (has_b) add_to_queries(at, {head.e, b}, head_columns, grad_queries, false);
    if (has_c) add_to_queries(at, {head.p, c}, value_columns, grad_rows, true);
    if (has_w) add_to_queries(at, {head.w, v}, value_columns, grad_rows, !has_c);
    if (!has_c && !has_w) __builtin_memset(grad_rows, 0, size_t(at.rows * width(value_columns)) * sizeof(A));
    if (!is_seen) return;
    const Factor by_q{head.t, {block.q, head_stride}}, by_a{head.e, {block.a, head_stride}};
    add_to_keys(at, by_q, has_a ? &by_a : nullptr, head_columns, A(of.scale), key_sums(at.b, at.kv_head, head));
    const Factor by_g{head.w, {block.g, value_stride}};
    if (has_w) add_to_keys(at, by_g, nullptr, value_columns, A(1), value_sums(at.b, at.kv_head, head));
  }

  // to[i][:] += sum_k scores[k][i] rows[k][:], or =, over the keys that query i sees.
  void add_to_queries(const Place& at, const Factor& factor, const Columns<E>& columns, A* to, bool is_first) const {
    for (int64_t p = 0; p < columns.panels; ++p)
      columns.with_width(p, [&]<int kVectors>() {
        const int64_t column = columns.first_column(p);
        for_row_tiles(at.rows, [&]<int kRows>(int64_t first) {
          const int64_t seen = at.scores.visible(at.query + first + kRows - 1) - at.key;
          Vector<A> sum[kRows][kVectors] = {};
          add_in_chains<kKeyChain<A>>(tile(const_cast<E*>(factor.scores), at, 0, first), 1, score_stride,
                                      factor.rows.first + column, factor.rows.stride,
                                      larger(0, smaller(at.count, seen)), sum);
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

  // to[k][:] += factor (sum_i scores[k][i] rows[i][:] + ..) over the queries that see key k.
  void add_to_keys(const Place& at, const Factor& one, const Factor* other, const Columns<E>& columns, A factor,
                   Rows<A> to) const {
    for (int64_t p = 0; p < columns.panels; ++p)
      columns.with_width(p, [&]<int kVectors>() {
        const int64_t column = columns.first_column(p);
        for_row_tiles(at.count, [&]<int kRows>(int64_t first) {
          const int64_t skipped = first_seeing(at, at.key + first);
          if (skipped == at.rows) return;
          A* const each = to[at.key + first] + column;
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) __builtin_prefetch(each + i * to.stride + v * kLanes<A>, 1);
          Vector<A> sum[kRows][kVectors] = {};
          const auto add = [&](const Factor& by) GENKERNELS_LAMBDA {
            add_in_chains<kKeyChain<A>>(tile(const_cast<E*>(by.scores), at, first, skipped), score_stride, 1,
                                        by.rows[skipped] + column, by.rows.stride, at.rows - skipped, sum);
          };
          add(one);
          if (other != nullptr) add(*other);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) {
              A* const value = each + i * to.stride + v * kLanes<A>;
              const int lanes = int(smaller(kLanes<A>, columns.count - column - v * kLanes<A>));
              store(value, load(value, lanes) + sum[i][v] * factor, lanes);
            }
        });
      });
  }

  A* mask_row(int64_t b, int64_t h, int64_t query) const {
    return grad_mask + b * arguments.grad_mask_batch + h * arguments.grad_mask_head + query * arguments.grad_mask_query;
  }

  // The gradient of a mask that has keys.
  void add_to_mask(const Place& at, E* grad_scores) const {
    if (arguments.grad_mask_query == 0 && of.queries > 1) {
      for (int64_t k = 0; k < at.count && first_seeing(at, at.key + k) < at.rows; ++k) {
        Vector<A> sum{};
        for (int64_t i = first_seeing(at, at.key + k) / kLanes<A> * kLanes<A>; i < at.rows; i += kLanes<A>)
          sum += load(tile(grad_scores, at, k, i), int(smaller(kLanes<A>, at.rows - i)));
        mask_row(at.b, at.h, at.query)[at.key + k] += sum_of_lanes<A>(sum);
      }
      return;
    }
    for (int64_t i = 0; i < at.rows; i += kLanes<A>)
      for (int64_t k = 0; k < at.count; k += kLanes<A>) {
        Square<LaneOf<sizeof(A)>> square{};
        for (int64_t n = 0; n < smaller(kLanes<A>, at.count - k); ++n)
          __builtin_memcpy(&square.rows[n], tile(grad_scores, at, k + n, i), kVectorBytes);
        square.transpose();
        for (int64_t n = 0; n < smaller(kLanes<A>, at.rows - i); ++n) {
          const int64_t seen = at.scores.visible(at.query + i + n) - at.key - k;
          const int lanes = int(larger(0, smaller(smaller(kLanes<A>, at.count - k), seen)));
          A* const to = mask_row(at.b, at.h, at.query + i + n) + at.key + k;
          Vector<A> x;
          __builtin_memcpy(&x, &square.rows[n], sizeof x);
          if (lanes > 0) store(to, load(to, lanes) + x, lanes);
        }
      }
  }

  // A member's rows of what queries get: the sums over the blocks of keys, in their order.
  void finish_queries(int64_t b, int64_t h, int64_t query, int64_t rows, const Head& head, const Block& block,
                      int64_t member, int64_t members) const {
    const auto write = [&](T* to, const A* parts, const Columns<E>& columns, A factor) {
      for (int64_t n = 0; n < columns.count; n += kLanes<A>) {
        Vector<A> sum{};
        for (int64_t part = 0; part < key_blocks; ++part)
          sum += load(parts + part * block_queries * width(columns) + n);
        store(to + n, sum * factor, int(smaller(kLanes<A>, columns.count - n)));
      }
    };
    const Rows<T> grad_query = rows_of<T>(arguments.grad_query, b, h);
    const Rows<T> grad_grad_output = rows_of<T>(arguments.grad_grad_output, b, h);
    for (int64_t i = member; i < rows; i += members) {
      write(grad_query[query + i], head.grad_queries + i * width(head_columns), head_columns, A(of.scale));
      write(grad_grad_output[query + i], head.grad_rows + i * width(value_columns), value_columns, A(1));
      if (arguments.grad_grad_logsumexp != nullptr)
        static_cast<A*>(arguments.grad_grad_logsumexp)[(b * of.heads + h) * of.queries + query + i] = block.w[i];
    }
    if (!sums_rows_for_mask) return;
    const bool is_one_row = arguments.grad_mask_query == 0 && of.queries > 1;
    if (is_one_row && member > 0) return;
    for (int64_t i = is_one_row ? 0 : member; i < rows; i += is_one_row ? 1 : members) {
      double sum = 0;
      for (int64_t part = 0; part < key_blocks; ++part) sum += double(head.mask_sums[part * block_queries + i]);
      A* const to = mask_row(b, h, query + i);
      *to = A(double(*to) + sum);
    }
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
