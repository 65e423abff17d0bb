#include "attention_scores.h"
#include "gemv.h"

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// The keys that any query of a batch sees, from a group of random numbers on.
KeySpan seen_keys(const Attention& of, int64_t b) {
  const KeySpan seen = VisibleKeys(of, b).span(0, of.queries);
  return {seen.begin / kRandomKeys * kRandomKeys, seen.end};
}
// How many there are at most.
int64_t most_seen_keys(const Attention& of) {
  int64_t most = 0;
  for (int64_t b = 0; b < (of.key_lengths == nullptr ? 1 : of.batch); ++b) {
    const KeySpan seen = seen_keys(of, b);
    most = larger(most, seen.end - seen.begin);
  }
  return most;
}

// Few queries read keys and values as they lie, once: packing them would be most of the work. Keys are cut into chunks,
// which threads share out (Dao et al. 2023, https://pytorch.org/blog/flash-decoding). A chunk's length does not depend
// on their number, and so the order of adding does not. A row is a query of one of the heads that share keys.
template <class T>
struct Chunks {
  using A = Accumulator<T>;
  // Keys at most, as many bytes of them in every dtype: of bfloat16 512 took 2% longer.
  static constexpr int64_t kChunk = 2048 / int64_t(sizeof(T));
  static constexpr int64_t kAhead = 2048;  // elements, see fetch_ahead; 4096 read no faster
  static constexpr int64_t kScoreStride = kChunk + kLanes<A>;

  const Attention& of;
  const Runtime& runtime;
  const int64_t groups, rows, kv_count, chunk_keys, chunks, items, shares;
  const Barrier barrier;

  Chunks(const Attention& attention, const Runtime& r)
      : of(attention),
        runtime(r),
        groups(of.heads / larger(1, of.kv_heads)),
        rows(groups * of.queries),
        kv_count(of.batch * of.kv_heads),
        chunk_keys(kv_count > 1 ? kChunk : kChunk / 2),  // one head alone is shared out in smaller ones
        chunks(ceil_div(most_seen_keys(of), chunk_keys)),
        items(kv_count * chunks),
        shares(larger(1, smaller(r.threads, items))),
        barrier(r, shares) {}

  // run_chunk(kv, chunk, share) for all chunks of all heads, and then merge(kv).
  template <class RunChunk, class Merge>
  void for_chunks(const RunChunk& run_chunk, const Merge& merge) const {
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      for (int64_t share = first; share < last; ++share)
        for (int64_t n = items * share / shares; n < items * (share + 1) / shares; ++n)
          run_chunk(n / chunks, n % chunks, share);
      barrier.wait(last - first, 1);
      for (int64_t kv = kv_count * first / shares; kv < kv_count * last / shares; ++kv) merge(kv);
    });
  }

  // The keys of a chunk; none at the end of a batch that has fewer than others.
  KeySpan keys_of(int64_t b, int64_t chunk) const {
    const KeySpan seen = seen_keys(of, b);
    const int64_t key = smaller(seen.end, seen.begin + chunk * chunk_keys);
    return {key, smaller(seen.end, key + chunk_keys)};
  }
  int64_t head_of(int64_t kv, int64_t row) const { return kv % of.kv_heads * groups + row / of.queries; }
  const T* row_of(const HeadsInput& from, int64_t kv, int64_t row) const {
    return rows_of<T>(from, kv / of.kv_heads, head_of(kv, row))[row % of.queries];
  }
  // Where a row stands among statistics.
  int64_t place_of(int64_t kv, int64_t row) const {
    return row_index(of, kv / of.kv_heads, head_of(kv, row), row % of.queries);
  }

  // A row's scores as exponents, -inf where a key takes no part; returns the largest of each lane. What a softcap makes
  // of them is kept in `capped`, if it is there.
  static Vector<A> form_exponents(const Scores<T>& of_head, int64_t query, int64_t key, int64_t count, A* row,
                                  A* capped = nullptr) {
    Vector<A> top = broadcast(-A(__builtin_inf()));
    for (int64_t n = 0; n < count; n += kLanes<A>) {
      Vector<A> product = load(row + n);
      if (of_head.of.softcap != 0) {
        of_head.cap(&product, 1);
        if (capped != nullptr) store(capped + n, product);
      }
      const Vector<A> x = of_head.exponents_of(query, key + n, product);
      store(row + n, x);
      top = x > top ? x : top;
    }
    return top;
  }
};

template <class T>
struct Decode : Chunks<T> {
  using typename Chunks<T>::A;
  using Chunks<T>::kAhead, Chunks<T>::kScoreStride;
  using Chunks<T>::of, Chunks<T>::rows, Chunks<T>::chunks, Chunks<T>::items, Chunks<T>::shares;
  using Chunks<T>::head_of;

  // What a chunk leaves, for each row.
  struct Part {
    A *outputs, *totals, *most;  // [rows, output_stride], [rows], [rows]
  };

  const AttentionForward& arguments;
  const int64_t output_stride;
  Part parts;         // of all items
  A* scores;          // [shares, rows, kScoreStride]
  const T** queries;  // [shares, rows]

  Decode(const AttentionForward& forward, const Runtime& r)
      : Chunks<T>(forward.of, r),
        arguments(forward),
        output_stride(ceil_div(of.value_size, kLanes<A>) * kLanes<A>),
        parts{allocate<A>(r, items * rows * output_stride), allocate<A>(r, items * rows), allocate<A>(r, items * rows)},
        scores(allocate<A>(r, shares * rows * kScoreStride)),
        queries(allocate<const T*>(r, shares * rows)) {}

  void run() const {
    this->for_chunks([&](int64_t kv, int64_t chunk, int64_t share) { run_chunk(kv, chunk, share); },
                     [&](int64_t kv) { merge(kv); });
  }

  void run_chunk(int64_t kv, int64_t chunk, int64_t share) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads, n = (kv * chunks + chunk) * rows;
    const KeySpan span = this->keys_of(b, chunk);
    const int64_t key = span.begin, count = span.end - key;
    const Rows<const T> key_rows = rows_of<T>(of.key, b, h), values = rows_of<T>(of.value, b, h);
    A* const probabilities = scores + share * rows * kScoreStride;
    const T** const x = queries + share * rows;
    for (int64_t row = 0; row < rows; ++row) x[row] = this->row_of(of.query, kv, row);
    multiply_units_of_rows<kAhead>(key_rows[key], key_rows.stride, of.head_size, count, x, rows, probabilities,
                                   kScoreStride);
    for (int64_t row = 0; row < rows; ++row) {
      const Scores<T> of_head(of, b, head_of(kv, row));
      A* const own = probabilities + row * kScoreStride;
      parts.most[n + row] = exponentiate(of_head, row % of.queries, key, count, own, parts.totals[n + row]);
      if (of.dropout.threshold) of_head.template drop<A>(row % of.queries, 1, key, count, Rows<A>{own, kScoreStride});
    }
    A* const outputs = parts.outputs + n * output_stride;
    __builtin_memset(outputs, 0, size_t(rows * output_stride) * sizeof(A));
    if (of.value_size > 0)
      multiply_as_it_lies<kAhead>(probabilities, kScoreStride, rows, values[key], values.stride, count, of.value_size,
                                  outputs, output_stride);
  }

  // Makes a row's scores base^(score - most); returns `most`.
  static A exponentiate(const Scores<T>& of_head, int64_t query, int64_t key, int64_t count, A* row, A& total) {
    A most = max_of_lanes<A>(Chunks<T>::form_exponents(of_head, query, key, count, row));
    if (!(most > -A(__builtin_inf()))) most = 0;  // no key takes part
    Vector<A> sum = {};
    for (int64_t n = 0; n < count; n += kLanes<A>) {
      const Vector<A> p = power_of_base(several<1>([&](int) { return load(row + n) - most; }))[0];
      store(row + n, p);
      sum += p;
    }
    total = sum_of_lanes<A>(sum);
    return most;
  }

  // Adds up a head's chunks, as parts of one sum.
  void merge(int64_t kv) const {
    for (int64_t row = 0; row < rows; ++row) {
      const auto at = [&](int64_t chunk) { return (kv * chunks + chunk) * rows + row; };
      A most = -A(__builtin_inf());
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        if (parts.totals[at(chunk)] != 0 && !(parts.most[at(chunk)] <= most)) most = parts.most[at(chunk)];
      A* const sum = parts.outputs + at(0) * output_stride;
      A total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const A part = parts.totals[at(chunk)], away = part == 0 ? -A(__builtin_inf()) : parts.most[at(chunk)] - most;
        const Vector<A> factor = power_of_base(several<1>([&](int) { return broadcast(away); }))[0];
        total += part * factor[0];
        const A* const from = parts.outputs + at(chunk) * output_stride;
        for (int64_t n = 0; n < of.value_size; n += kLanes<A>) {
          const Vector<A> x = load(from + n) * factor;
          store(sum + n, chunk == 0 ? x : load(sum + n) + x);
        }
      }
      const double logarithm_of_total = logarithm<A>(broadcast(double(total)))[0];
      set_statistics<A>(arguments, this->place_of(kv, row), total == 0 ? 0 : most, total, logarithm_of_total);
      const A factor = total == 0 ? A(0) : A(of.dropout.scale) / total;
      T* const to = rows_of<T>(arguments.output, kv / of.kv_heads, head_of(kv, row))[row % of.queries];
      for (int64_t n = 0; n < of.value_size; n += kLanes<A>)
        store(to + n, load(sum + n) * factor, int(smaller(kLanes<A>, of.value_size - n)));
    }
  }
};

// A chunk's keys and values get their gradients at once, since all rows that these are sums over are there.
template <class T>
struct DecodeBackward : Chunks<T> {
  using typename Chunks<T>::A;
  using Chunks<T>::kAhead, Chunks<T>::kScoreStride;
  using Chunks<T>::of, Chunks<T>::rows, Chunks<T>::chunks, Chunks<T>::items, Chunks<T>::shares;

  // A thread's own memory.
  struct Block {
    A *probabilities, *kept, *grad_scores;  // [rows, kScoreStride]; the second only with dropout
    A* capped;                              // the same, only with a softcap
    A *queries, *grad_outputs;              // [rows, ..]
    const T **query_rows, **grad_rows;      // the same as they lie
  };

  const AttentionBackward& arguments;
  const Columns<A> query_columns, value_columns;
  A* grad_queries;  // what a chunk leaves, [items, rows, query columns]
  Block* blocks;

  DecodeBackward(const AttentionBackward& backward, const Runtime& r)
      : Chunks<T>(backward.of, r),
        arguments(backward),
        query_columns(of.head_size),
        value_columns(of.value_size),
        grad_queries(allocate<A>(r, items * rows * width(query_columns))),
        blocks(allocate<Block>(r, shares)) {
    for (int64_t share = 0; share < shares; ++share) {
      const auto scores = [&] { return allocate<A>(r, rows * kScoreStride); };
      blocks[share] = {scores(),
                       of.dropout.threshold ? scores() : nullptr,
                       scores(),
                       of.softcap != 0 ? scores() : nullptr,
                       allocate<A>(r, rows * width(query_columns)),
                       allocate<A>(r, rows * width(value_columns)),
                       allocate<const T*>(r, rows),
                       allocate<const T*>(r, rows)};
    }
  }

  static int64_t width(const Columns<A>& columns) { return columns.vectors * kLanes<A>; }

  void run() const {
    this->for_chunks([&](int64_t kv, int64_t chunk, int64_t share) { run_chunk(kv, chunk, blocks[share]); },
                     [&](int64_t kv) { merge(kv); });
  }

  void run_chunk(int64_t kv, int64_t chunk, const Block& block) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads;
    const KeySpan span = this->keys_of(b, chunk);
    const int64_t key = span.begin, count = span.end - key;
    const Rows<const T> key_rows = rows_of<T>(of.key, b, h), values = rows_of<T>(of.value, b, h);
    for (int64_t row = 0; row < rows; ++row) {
      block.query_rows[row] = this->row_of(of.query, kv, row);
      block.grad_rows[row] = this->row_of(arguments.grad_output, kv, row);
      copy(block.query_rows[row], query_columns, block.queries + row * width(query_columns));
      copy(block.grad_rows[row], value_columns, block.grad_outputs + row * width(value_columns));
    }
    multiply_units_of_rows<kAhead>(key_rows[key], key_rows.stride, of.head_size, count, block.query_rows, rows,
                                   block.probabilities, kScoreStride);
    multiply_units_of_rows<kAhead>(values[key], values.stride, of.value_size, count, block.grad_rows, rows,
                                   block.grad_scores, kScoreStride);
    for (int64_t row = 0; row < rows; ++row) form_grad_scores(kv, row, key, count, block);
    const Rows<T> grad_key = rows_of<T>(arguments.grad_key, b, h), grad_value = rows_of<T>(arguments.grad_value, b, h);
    set_keys(block.grad_scores, block.queries, query_columns, key, count, A(of.scale), grad_key);
    set_keys(of.dropout.threshold ? block.kept : block.probabilities, block.grad_outputs, value_columns, key, count,
             A(of.dropout.scale), grad_value);
    const auto clear = [&](int64_t first, int64_t end) {
      for (int64_t k = first; k < end; ++k) {
        __builtin_memset(grad_key[k], 0, size_t(of.head_size) * sizeof(T));
        __builtin_memset(grad_value[k], 0, size_t(of.value_size) * sizeof(T));
      }
    };
    if (chunk == 0) clear(0, span.begin);
    if (chunk + 1 == chunks) clear(span.end, of.keys);
    A* const to = grad_queries + (kv * chunks + chunk) * rows * width(query_columns);
    __builtin_memset(to, 0, size_t(rows * width(query_columns)) * sizeof(A));
    if (of.head_size > 0)
      multiply_as_it_lies<kAhead>(block.grad_scores, kScoreStride, rows, key_rows[key], key_rows.stride, count,
                                  of.head_size, to, width(query_columns));
  }

  static void copy(const T* from, const Columns<A>& columns, A* to) {
    for (int64_t n = 0; n < columns.count; n += kLanes<A>)
      store(to + n, load(from + n, int(smaller(kLanes<A>, columns.count - n))));
  }

  // Makes a row's scores probabilities, and its dP dS: see attention_backward.cpp.
  void form_grad_scores(int64_t kv, int64_t row, int64_t key, int64_t count, const Block& block) const {
    const Scores<T> of_head(of, kv / of.kv_heads, this->head_of(kv, row));
    const int64_t query = row % of.queries, place = this->place_of(kv, row);
    const int64_t seen = larger(0, smaller(count, of_head.visible(query) - key));
    A* const probabilities = block.probabilities + row * kScoreStride;
    A* const grad_scores = block.grad_scores + row * kScoreStride;
    A* const kept = of.dropout.threshold ? block.kept + row * kScoreStride : nullptr;
    const A* const statistics = static_cast<const A*>(arguments.statistics) + place;
    const Shift<A> shift = shift_of(statistics[0], statistics[all_rows(of)]);
    A* const capped = of.softcap != 0 ? block.capped + row * kScoreStride : nullptr;
    this->form_exponents(of_head, query, key, count, probabilities, capped);
    for (int64_t n = 0; n < count; n += kLanes<A>) {
      const Vector<A> p =
          power_of_base(several<1>([&](int) { return (load(probabilities + n) - shift.near) - shift.rest; }))[0];
      store(probabilities + n, p);
      if (kept != nullptr) store(kept + n, p);
    }
    if (kept != nullptr) of_head.template drop<A>(query, 1, key, count, Rows<A>{kept, kScoreStride});
    double sum = 0;
    for (int64_t n = 0; n < count; n += kLanes<A>) {
      Vector<A> x = load(grad_scores + n, int(larger(0, smaller(kLanes<A>, seen - n))));
      if (kept != nullptr) x = load(kept + n) == A(0) ? Vector<A>{} : x * A(of.dropout.scale);
      store(grad_scores + n, x);
      if (sums_delta()) sum += double(sum_of_lanes<A>(load(probabilities + n) * x));
    }
    if (!sums_delta()) {
      const T *const output = this->row_of(arguments.output, kv, row), *const grad = block.grad_rows[row];
      for (int64_t n = 0; n < of.value_size; n += kLanes<A>) {
        const int lanes = int(smaller(kLanes<A>, of.value_size - n));
        sum += double(sum_of_lanes<A>(load(grad + n, lanes) * load(output + n, lanes)));
      }
    }
    if (arguments.grad_logsumexp != nullptr) sum -= double(static_cast<const A*>(arguments.grad_logsumexp)[place]);
    for (int64_t n = 0; n < count; n += kLanes<A>)
      store(grad_scores + n, load(probabilities + n) * (load(grad_scores + n) - A(sum)));
    for (int64_t n = 0; n < count && capped != nullptr; n += kLanes<A>)
      store(grad_scores + n, load(grad_scores + n) * Scores<T>::derivative(load(capped + n)));
  }
  // See there, too.
  bool sums_delta() const { return chunks == 1; }

  // to[k][:] = factor sum_row scores[row][k] of[row][:].
  void set_keys(const A* scores, const A* of_rows, const Columns<A>& columns, int64_t key, int64_t count, A factor,
                Rows<T> to) const {
    for_row_tiles(count, [&]<int kRows>(int64_t first) {
      for (int64_t p = 0; p < columns.panels; ++p)
        columns.with_width(p, [&]<int kVectors>() {
          const int64_t column = columns.first_column(p);
          Vector<A> sum[kRows][kVectors] = {};
          multiply<A, kRows, kVectors>(scores + first, 1, kScoreStride, of_rows + column, rows, sum, NothingAhead{},
                                       width(columns));
          for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA {
            const int64_t at = column + v * kLanes<A>;
            store(to[key + first + i] + at, sum[i][v] * factor, int(smaller(kLanes<A>, columns.count - at)));
          });
        });
    });
  }

  void merge(int64_t kv) const {
    for (int64_t row = 0; row < rows; ++row) {
      T* const to = rows_of<T>(arguments.grad_query, kv / of.kv_heads, this->head_of(kv, row))[row % of.queries];
      const A* const parts = grad_queries + (kv * chunks * rows + row) * width(query_columns);
      for (int64_t n = 0; n < of.head_size; n += kLanes<A>) {
        Vector<A> sum = load(parts + n);
        for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += load(parts + chunk * rows * width(query_columns) + n);
        store(to + n, sum * A(of.scale), int(smaller(kLanes<A>, of.head_size - n)));
      }
    }
  }
};

}  // namespace

bool is_decode(const Attention& of) {
  return of.heads / larger(1, of.kv_heads) * of.queries <= kFewRows && most_seen_keys(of) > 0;
}

void attention_decode(const AttentionForward& arguments, const Runtime& runtime) {
  with_type(arguments.of.dtype, [&]<class T>() { Decode<T>(arguments, runtime).run(); });
}

void attention_decode_backward(const AttentionBackward& arguments, const Runtime& runtime) {
  with_type(arguments.of.dtype, [&]<class T>() { DecodeBackward<T>(arguments, runtime).run(); });
}

}  // namespace genkernels::GENKERNELS_LEVEL
