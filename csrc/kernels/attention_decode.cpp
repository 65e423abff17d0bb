#include "attention_scores.h"
#include "gemv.h"

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// Those that the last query sees.
int64_t seen_keys(const Attention& of) { return smaller(of.keys, of.queries + of.diagonal); }

// Few queries read keys and values as they lie, once: packing them would be most of the work. Keys are cut into chunks,
// which threads share out (Dao et al. 2023, https://pytorch.org/blog/flash-decoding). A chunk's length does not depend
// on their number, and so the order of adding does not.
template <class T>
struct Decode {
  using A = Accumulator<T>;
  static constexpr int64_t kChunk = 512;   // keys
  static constexpr int64_t kAhead = 2048;  // elements, see fetch_ahead; 4096 read no faster
  static constexpr int64_t kScoreStride = kChunk + kLanes<A>;

  // What a chunk leaves, for each row: a query of one of the heads that share keys.
  struct Part {
    A *outputs, *totals, *most;  // [rows, output_stride], [rows], [rows]
  };

  const AttentionForward& arguments;
  const Attention& of;
  const Runtime& runtime;
  const int64_t groups, rows, keys, chunks, kv_count, items, shares, output_stride;
  const Barrier barrier;
  Part parts;         // of all items
  A* scores;          // [shares, rows, kScoreStride]
  const T** queries;  // [shares, rows]

  Decode(const AttentionForward& forward, const Runtime& r)
      : arguments(forward),
        of(forward.of),
        runtime(r),
        groups(of.heads / larger(1, of.kv_heads)),
        rows(groups * of.queries),
        keys(seen_keys(of)),
        chunks(ceil_div(keys, kChunk)),
        kv_count(of.batch * of.kv_heads),
        items(kv_count * chunks),
        shares(larger(1, smaller(r.threads, items))),
        output_stride(ceil_div(of.value_size, kLanes<A>) * kLanes<A>),
        barrier(r, shares),
        parts{allocate<A>(r, items * rows * output_stride), allocate<A>(r, items * rows), allocate<A>(r, items * rows)},
        scores(allocate<A>(r, shares * rows * kScoreStride)),
        queries(allocate<const T*>(r, shares * rows)) {}

  void run() const {
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      for (int64_t share = first; share < last; ++share)
        for (int64_t n = items * share / shares; n < items * (share + 1) / shares; ++n)
          run_chunk(n / chunks, n % chunks, share);
      barrier.wait(last - first, 1);
      for (int64_t kv = kv_count * first / shares; kv < kv_count * last / shares; ++kv) merge(kv);
    });
  }

  int64_t head_of(int64_t kv, int64_t row) const { return kv % of.kv_heads * groups + row / of.queries; }

  void run_chunk(int64_t kv, int64_t chunk, int64_t share) const {
    const int64_t b = kv / of.kv_heads, h = kv % of.kv_heads, n = (kv * chunks + chunk) * rows;
    const int64_t key = chunk * kChunk, count = smaller(kChunk, keys - key);
    const Rows<const T> key_rows = rows_of<T>(of.key, b, h), values = rows_of<T>(of.value, b, h);
    A* const probabilities = scores + share * rows * kScoreStride;
    const T** const x = queries + share * rows;
    for (int64_t row = 0; row < rows; ++row) x[row] = rows_of<T>(of.query, b, head_of(kv, row))[row % of.queries];
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
    Vector<A> top = broadcast(-A(__builtin_inf()));
    for (int64_t n = 0; n < count; n += kLanes<A>) {
      Vector<A> x[1][1] = {{load(row + n)}};
      if (of_head.needs_mask(query, key + n + kLanes<A>))
        of_head.apply_mask(query, key + n, x);
      else
        x[0][0] *= of_head.scale;
      store(row + n, x[0][0]);
      top = x[0][0] > top ? x[0][0] : top;
    }
    A most = max_of_lanes<A>(top);
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
    const int64_t b = kv / of.kv_heads;
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
      const int64_t h = head_of(kv, row), query = row % of.queries;
      const double logarithm_of_total = logarithm<A>(broadcast(double(total)))[0];
      set_statistics<A>(arguments, (b * of.heads + h) * of.queries + query, total == 0 ? 0 : most, total,
                        logarithm_of_total);
      const A factor = total == 0 ? A(0) : A(of.dropout.scale) / total;
      T* const to = rows_of<T>(arguments.output, b, h)[query];
      for (int64_t n = 0; n < of.value_size; n += kLanes<A>)
        store(to + n, load(sum + n) * factor, int(smaller(kLanes<A>, of.value_size - n)));
    }
  }
};

}  // namespace

bool is_decode(const Attention& of) {
  return seen_keys(of) > 0 && of.heads / larger(1, of.kv_heads) * of.queries <= kFewRows;
}

void attention_decode(const AttentionForward& arguments, const Runtime& runtime) {
  switch (arguments.of.dtype) {
    case DType::float32: return Decode<float>(arguments, runtime).run();
    case DType::float64: return Decode<double>(arguments, runtime).run();
    case DType::bfloat16: return Decode<bfloat16>(arguments, runtime).run();
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
