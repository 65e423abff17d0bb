#include "linear.h"

#include <type_traits>

#include "gemv.h"
#include "math.h"
#include "parallel.h"

GENKERNELS_DECLARE_LINEAR(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// What the tanh form of gelu, x sigmoid(y), takes the sigmoid of: y = sqrt(8 / pi) (x + 0.044715 x^3).
constexpr double kOfX = 1.5957691216057308, kOfCube = 0.044715 * kOfX;

template <class V, int kCount>
GENKERNELS_INLINE Several<V, kCount> activate(Activation activation, const Several<V, kCount>& x) {
  using A = std::remove_cvref_t<decltype(x.at[0][0])>;
  switch (activation) {
    case Activation::relu: return several<kCount>([&](int i) GENKERNELS_LAMBDA { return x[i] < A(0) ? V{} : x[i]; });
    case Activation::gelu: return x * normal(x).integral;
    case Activation::gelu_tanh: return x * sigmoid(x * (x * x * A(kOfCube) + A(kOfX)));
    case Activation::silu: return x * sigmoid(x);
    default: return x;
  }
}

// grad times the derivative of the activation at x; of relu, x is what it gave.
template <class V, int kCount>
GENKERNELS_INLINE Several<V, kCount> through_activation(Activation activation, const Several<V, kCount>& grad,
                                                        const Several<V, kCount>& x) {
  using A = std::remove_cvref_t<decltype(x.at[0][0])>;
  const auto from_one = [](const Several<V, kCount>& s) GENKERNELS_LAMBDA {
    return several<kCount>([&](int i) GENKERNELS_LAMBDA { return A(1) - s[i]; });
  };
  switch (activation) {
    case Activation::relu:
      return several<kCount>([&](int i) GENKERNELS_LAMBDA { return x[i] <= A(0) ? V{} : grad[i]; });
    case Activation::gelu: {
      const auto at = normal(x);
      return grad * (at.integral + x * (at.power * A(0.39894228040143268)));
    }
    case Activation::gelu_tanh: {
      const auto square = x * x;
      const auto s = sigmoid(x * (square * A(kOfCube) + A(kOfX)));
      return grad * (s + x * s * from_one(s) * (square * A(3 * kOfCube) + A(kOfX)));
    }
    case Activation::silu: {
      const auto s = sigmoid(x);
      return grad * s * (x * from_one(s) + A(1));
    }
    default: return grad;
  }
}

// Calls body.operator()<type>() with the type of weight and bias.
template <class T, class Body>
GENKERNELS_INLINE void with_weight_type(DType dtype, const Body& body) {
  if constexpr (__is_same(T, bfloat16))
    if (dtype == DType::float32) return body.template operator()<float>();
  body.template operator()<T>();
}

// How a call is shared out: each share has a part of the panels of the result's columns, and a part of its rows. As few
// parts of the rows as keep all threads busy, because each of them packs the panels for itself.
struct Shares {
  static constexpr int64_t kMostCopied = 256 << 10;  // bytes of panels that each part of the rows has for itself

  int64_t columns, rows;

  template <class E>
  Shares(const Columns<E>& of, int64_t K, int64_t row_count, int64_t threads) {
    // Panels of one vector wait for the adder: where there are rows enough, and little to pack, these are shared out.
    const bool is_narrow = of.vectors < 2 * threads && row_count >= 4 * kRunRows * threads &&
                           of.packed_size(K) * int64_t(sizeof(E)) <= kMostCopied;
    columns = is_narrow ? 1 : larger(1, smaller(threads, of.panels));
    rows = larger(1, smaller(threads / columns, ceil_div(row_count, kRunRows)));
  }

  int64_t count() const { return columns * rows; }
};

// The part'th of `parts` ranges of [0, count), which begin at multiples of `unit`.
struct Range {
  int64_t first, last;

  Range(int64_t count, int64_t part, int64_t parts, int64_t unit = 1)
      : first(begin(count, part, parts, unit)), last(begin(count, part + 1, parts, unit)) {}

 private:
  static int64_t begin(int64_t count, int64_t part, int64_t parts, int64_t unit) {
    return smaller(count, ceil_div(count, unit) * part / parts * unit);
  }
};

// A share's part of a result: of its rows as far as there are enough of them, then of its panels.
struct Part {
  Range rows, panels;

  Part(int64_t row_count, int64_t unit, int64_t panel_count, int64_t share, int64_t shares)
      : Part(row_count, unit, panel_count, share, shares, larger(1, smaller(shares, ceil_div(row_count, unit)))) {}

 private:
  Part(int64_t row_count, int64_t unit, int64_t panel_count, int64_t share, int64_t shares, int64_t row_parts)
      : rows(share / (shares / row_parts) < row_parts ? Range(row_count, share / (shares / row_parts), row_parts, unit)
                                                      : Range(0, 0, 1)),
        panels(panel_count, share % (shares / row_parts), shares / row_parts) {}
};

template <class T>
struct Forward {
  using E = Operand<T>;
  using A = Accumulator<T>;
  // A block of rows takes half of the L2 cache, and stays there while the panels pass by.
  static constexpr int64_t kLeastBlockRows = 64;
  // So few rows are multiplied with the weight as it lies; what has to be widened is packed earlier.
  static constexpr int64_t kFewRows = __is_same(T, E) ? 32 : 6;

  const Linear& of;
  const int64_t M, K, N;
  const Columns<E> columns;
  const Shares shares;
  const int64_t block_rows, input_stride;
  const bool reads_input, packs_at_once;
  E* packed;  // [shares.rows] times the panels of weight^T, or a panel for each share
  E* inputs;  // [shares][block_rows, input_stride], unless the input is read as it lies

  Forward(const Linear& linear, const Runtime& r)
      : of(linear),
        M(of.rows),
        K(of.in_features),
        N(of.out_features),
        columns(N, r.threads),
        shares(columns, K, M, r.threads),
        block_rows(rows_of_block(r.cache / 2)),
        input_stride(staged_stride<E>(K)),
        reads_input(__is_same(T, E) && !collides<E>(of.input_stride)),
        packs_at_once(ceil_div(M, shares.rows) > block_rows),
        packed(allocate<E>(r, packs_at_once ? shares.rows * columns.packed_size(K) : shares.count() * panel_size())),
        inputs(reads_input ? nullptr : allocate<E>(r, shares.count() * block_rows * input_stride)) {}

  int64_t rows_of_block(int64_t bytes) const {
    const int64_t most = bytes / (larger(1, K) * int64_t(sizeof(E))) / kRunRows * kRunRows;
    return smaller(larger(1, M), larger(kLeastBlockRows, most));
  }
  int64_t panel_size() const { return ceil_div(K, kGroup<E>) * Panel<E, kPanelVectors>::kStep; }

  void run(const Runtime& runtime) const {
    parallel(runtime, shares.count(), [&](int64_t share) {
      const int64_t row_part = share / shares.columns;
      const Range panels(columns.panels, share % shares.columns, shares.columns);
      const Range rows(M, row_part, shares.rows, kRunRows);
      E* const to = packed + (packs_at_once ? row_part * columns.packed_size(K) : share * panel_size());
      if (packs_at_once)
        for (int64_t p = panels.first; p < panels.last; ++p) pack(p, to + columns.offset(p, K));
      for (int64_t base = rows.first; base < rows.last; base += block_rows)
        multiply_block(base, smaller(block_rows, rows.last - base), panels, to, share);
    });
  }

  void pack(int64_t p, E* to) const {
    const int64_t first = columns.first_column(p);
    with_weight_type<T>(of.weight_dtype, [&]<class W>() {
      const W* weight = static_cast<const W*>(of.weight);
      columns.with_width(p, [&]<int kVectors>() {
        pack_panel_of_rows<E, W, kVectors>(
            K, [&](int64_t n) { return first + n < N ? weight + (first + n) * K : nullptr; }, to);
      });
    });
  }

  Rows<const E> input_rows(int64_t base, int64_t rows, int64_t share) const {
    const T* from = static_cast<const T*>(of.input) + base * of.input_stride;
    if constexpr (__is_same(T, E))
      if (reads_input) return {from, of.input_stride};
    return stage<E, T>(inputs + share * block_rows * input_stride, input_stride, rows, K,
                       [&](int64_t i) { return from + i * of.input_stride; });
  }

  void multiply_block(int64_t base, int64_t rows, const Range& panels, E* to, int64_t share) const {
    const Rows<const E> input = input_rows(base, rows, share);
    for (int64_t p = panels.first; p < panels.last; ++p) {
      E* const panel = packs_at_once ? to + columns.offset(p, K) : to;
      if (!packs_at_once) pack(p, panel);
      const E* next = packs_at_once ? to + columns.offset(smaller(p + 1, panels.last - 1), K) : panel;
      columns.with_width(p, [&]<int kVectors>() {
        multiply_panel<E, kVectors>(input, rows, panel, K, next, p == panels.first,
                                    [&](int64_t first, int64_t run, auto& sum) GENKERNELS_LAMBDA {
                                      finish<kVectors>(base + first, run, columns.first_column(p), sum);
                                    });
      });
    }
  }

  // Two rows in turns: an activation is one long chain.
  template <int kVectors>
  void finish(int64_t first, int64_t run, int64_t column, const Vector<A> (&sum)[kRunRows][kVectors]) const {
    // What the next rows are written to is fetched while they are multiplied.
    for (void* to : {of.output, of.pre_activation})
      for (int64_t i = 0; i < kRunRows && to; ++i)
        for (int v = 0; v < kVectors; ++v)
          __builtin_prefetch(static_cast<T*>(to) + (first + kRunRows + i) * N + column + v * kLanes<A>, 1);
    int counts[kVectors];
    Vector<A> added[kVectors];
    with_weight_type<T>(of.weight_dtype, [&]<class W>() GENKERNELS_LAMBDA {
      const W* bias = static_cast<const W*>(of.bias);
      for (int v = 0; v < kVectors; ++v) {
        counts[v] = int(larger(0, smaller(kLanes<A>, N - column - v * kLanes<A>)));
        added[v] = bias ? load(bias + column + v * kLanes<A>, counts[v]) : Vector<A>{};
      }
    });
    for (int64_t i = 0; i < run; i += 2) {
      const auto x = several<2 * kVectors>([&](int j) GENKERNELS_LAMBDA {
        return sum[smaller(i + j / kVectors, run - 1)][j % kVectors] + added[j % kVectors];
      });
      const auto y = activate(of.activation, x);
      for (int j = 0; j < 2 * kVectors && i + j / kVectors < run; ++j) {
        const int64_t at = (first + i + j / kVectors) * N + column + j % kVectors * kLanes<A>;
        if (of.pre_activation) store(static_cast<T*>(of.pre_activation) + at, x[j], counts[j % kVectors]);
        store(static_cast<T*>(of.output) + at, y[j], counts[j % kVectors]);
      }
    }
  }
};

// Outputs [first, last) of few rows, a register of them at a time.
template <class T>
void forward_outputs(const Linear& linear, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  constexpr int kUnits = kLanes<A>;
  constexpr int64_t kFewRows = Forward<T>::kFewRows;
  const int64_t K = linear.in_features, N = linear.out_features;
  const T* bias = static_cast<const T*>(linear.bias);
  for (int64_t n = first; n < last; n += kUnits) {
    const int count = int(smaller(kUnits, last - n));
    const Vector<A> added = bias ? load(bias + n, count) : Vector<A>{};
    const T* input[kFewRows];
    for (int64_t i = 0; i < linear.rows; ++i) input[i] = static_cast<const T*>(linear.input) + i * linear.input_stride;
    A sums[kFewRows][kUnits];
    multiply_units_of_rows(static_cast<const T*>(linear.weight) + n * K, K, K, count, input, linear.rows, sums[0],
                           kUnits);
    for (int64_t i = 0; i < linear.rows; ++i) {
      const auto x = several<1>([&](int) { return load(sums[i], count) + added; });
      if (linear.pre_activation) store(static_cast<T*>(linear.pre_activation) + i * N + n, x[0], count);
      store(static_cast<T*>(linear.output) + i * N + n, activate(linear.activation, x)[0], count);
    }
  }
}

template <class T>
void forward(const Linear& linear, const Runtime& runtime) {
  if (linear.rows > Forward<T>::kFewRows || linear.weight_dtype != linear.dtype)
    return Forward<T>(linear, runtime).run(runtime);
  // Each thread reads a part of the weight from its first element to its last: that is what the call costs.
  constexpr int kUnits = kLanes<Accumulator<T>>;
  const int64_t N = linear.out_features, shares = smaller(runtime.threads, ceil_div(N, kUnits));
  parallel(runtime, shares, [&](int64_t i) {
    const Range part(N, i, shares, kUnits);
    forward_outputs<T>(linear, part.first, part.last);
  });
}

// The rows are gone through in blocks. Of each, the threads form the gradient of what the activation was taken of, in
// their own part of the rows (without an activation grad_output is that gradient, and is read as it lies: a copy takes
// a tenth of the time in bfloat16), and pack their part of the input (not where it can be read as it lies, which spares
// up to a fifth), and meet; then each computes its part of the gradients, and they meet again.
template <class T>
struct Backward {
  using E = Operand<T>;
  using A = Accumulator<T>;
  static constexpr int64_t kBlockRows = 512, kLeastBlockRows = 64, kBlockBytes = 32 << 20;

  const LinearBackward& of;
  const Runtime& runtime;
  const int64_t M, K, N;
  const Columns<E> columns;
  const int64_t block_rows, delta_stride, shares;
  const bool reads_gradient, reads_input;
  const Barrier barrier;
  E* deltas;          // [block_rows, delta_stride], unless grad_output is read as it lies
  E* weight_panels;   // of weight
  E* input_panels;    // of a block's input
  E* tiles;           // [shares] a group's tiles
  A* weight_sums;     // [N, K]
  double* bias_sums;  // [N]

  Backward(const LinearBackward& linear, const Runtime& r)
      : of(linear),
        runtime(r),
        M(of.rows),
        K(of.in_features),
        N(of.out_features),
        columns(K),
        block_rows(rows_of_block()),
        delta_stride(staged_stride<E>(ceil_div(N, kLanes<A>) * kLanes<A>)),
        shares(r.threads),
        reads_gradient(__is_same(T, E) && !of.saved && !collides<E>(of.grad_output_stride)),
        reads_input(__is_same(T, E) && are_panels(columns, of.input_stride)),
        barrier(r, shares),
        deltas(reads_gradient ? nullptr : allocate<E>(r, block_rows * delta_stride)),
        weight_panels(of.grad_input ? allocate<E>(r, columns.packed_size(N)) : nullptr),
        input_panels(of.grad_weight && !reads_input ? allocate<E>(r, columns.packed_size(block_rows)) : nullptr),
        tiles(of.grad_weight ? allocate<E>(r, shares * tile_group_size()) : nullptr),
        weight_sums(static_cast<A*>(of.grad_weight)),
        bias_sums(of.grad_bias ? allocate<double>(r, N) : nullptr) {
    if (of.grad_weight != nullptr && narrows_weight()) weight_sums = allocate<A>(r, N * K);
  }

  int64_t rows_of_block() const {
    const int64_t most = kBlockBytes / (larger(1, N) * int64_t(sizeof(E))) / kTileRows * kTileRows;
    return smaller(larger(1, M), larger(kLeastBlockRows, smaller(kBlockRows, most)));
  }
  bool narrows_weight() const { return !__is_same(T, A) && of.weight_dtype == of.dtype; }
  int64_t tile_group_size() const { return kTileGroup * kTileRows * (block_rows + 1); }

  void run() const {
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      int64_t meetings = 0;
      for (int64_t share = first; share < last && of.grad_input; ++share)
        pack_weight(Range(columns.panels, share, shares));
      for (int64_t base = 0; base < M; base += block_rows) {
        const int64_t rows = smaller(block_rows, M - base);
        for (int64_t share = first; share < last; ++share) {
          if (!reads_gradient) form_deltas(base, Range(rows, share, shares, kRunRows));
          if (of.grad_weight && !reads_input) pack_input(base, rows, Range(columns.panels, share, shares));
        }
        barrier.wait(last - first, ++meetings);
        for (int64_t share = first; share < last; ++share) {
          if (of.grad_input) multiply_by_weight(base, Part(rows, kRunRows, columns.panels, share, shares));
          if (of.grad_weight) add_to_weight(base, rows, Part(N, kTileRows, columns.panels, share, shares), share);
          if (of.grad_bias) add_to_bias(base, rows, Range(N, share, shares, kLanes<A>));
        }
        barrier.wait(last - first, ++meetings);
      }
      for (int64_t share = first; share < last; ++share) finish(Range(N, share, shares));
    });
  }

  Rows<const E> delta_rows(int64_t base) const {
    if constexpr (__is_same(T, E))
      if (reads_gradient) {
        const E* const gradient = static_cast<const E*>(of.grad_output);
        return {gradient + base * of.grad_output_stride, of.grad_output_stride};
      }
    return {deltas, delta_stride};
  }

  void form_deltas(int64_t base, const Range& rows) const {
    constexpr int kTogether = 4;
    const auto part = [&]<int kCount>(int64_t i, int64_t n, int last) {
      const auto load_from = [&](const void* from, int64_t stride) GENKERNELS_LAMBDA {
        const T* at = static_cast<const T*>(from) + (base + i) * stride + n;
        return several<kCount>([&](int v) GENKERNELS_LAMBDA {
          return v + 1 < kCount ? load(at + v * kLanes<A>) : load(at + v * kLanes<A>, last);
        });
      };
      auto delta = load_from(of.grad_output, of.grad_output_stride);
      if (of.saved) delta = through_activation(of.activation, delta, load_from(of.saved, N));
      for (int v = 0; v < kCount; ++v) store(deltas + i * delta_stride + n + v * kLanes<A>, delta[v]);
    };
    for (int64_t i = rows.first; i < rows.last; ++i) {
      int64_t n = 0;
      for (; n + kTogether * kLanes<A> <= N; n += kTogether * kLanes<A>)
        part.template operator()<kTogether>(i, n, kLanes<A>);
      for (; n < N; n += kLanes<A>) part.template operator()<1>(i, n, int(smaller(kLanes<A>, N - n)));
    }
  }

  void pack_weight(const Range& panels) const {
    with_weight_type<T>(of.weight_dtype, [&]<class W>() {
      const W* weight = static_cast<const W*>(of.weight);
      for (int64_t p = panels.first; p < panels.last; ++p)
        pack_panel<E, W>(
            columns, p, N, [&](int64_t n) { return weight + n * K; }, weight_panels + columns.offset(p, N));
    });
  }

  void pack_input(int64_t base, int64_t rows, const Range& panels) const {
    const T* input = static_cast<const T*>(of.input) + base * of.input_stride;
    for (int64_t p = panels.first; p < panels.last; ++p)
      pack_panel<E, T>(
          columns, p, rows, [&](int64_t i) { return input + i * of.input_stride; },
          input_panels + columns.offset(p, rows));
  }

  // grad_input = deltas weight.
  void multiply_by_weight(int64_t base, const Part& own) const {
    T* const to = static_cast<T*>(of.grad_input) + (base + own.rows.first) * K;
    const Rows<const E> block = delta_rows(base), rows{block[own.rows.first], block.stride};
    for (int64_t p = own.panels.first; p < own.panels.last; ++p)
      columns.with_width(p, [&]<int kVectors>() {
        multiply_panel<E, kVectors>(rows, own.rows.last - own.rows.first, weight_panels + columns.offset(p, N), N,
                                    weight_panels + columns.offset(smaller(p + 1, own.panels.last - 1), N),
                                    p == own.panels.first,
                                    [&](int64_t first, int64_t run, auto& sum) GENKERNELS_LAMBDA {
                                      for (int v = 0; v < kVectors; ++v) {
                                        const int64_t column = columns.first_column(p) + v * kLanes<A>;
                                        const int count = int(smaller(kLanes<A>, K - column));
                                        for (int64_t i = 0; i < run; ++i)
                                          store(to + (first + i) * K + column, sum[i][v], count);
                                      }
                                    });
      });
  }

  // grad_weight += deltas^T input.
  void add_to_weight(int64_t base, int64_t rows, const Part& own, int64_t share) const {
    Panels<E> panels{input_panels};
    if (reads_input) panels = {static_cast<const E*>(of.input) + base * of.input_stride, of.input_stride};
    add_transposed_product<E>(delta_rows(base), rows, own.rows.first, own.rows.last, columns, own.panels.first,
                              own.panels.last, panels, tiles + share * tile_group_size(), weight_sums, K, base == 0);
  }

  void add_to_bias(int64_t base, int64_t rows, const Range& own) const {
    const Rows<const E> from = delta_rows(base);
    const auto value = [&](int64_t i, int64_t n)
                           GENKERNELS_LAMBDA { return load(from[i] + n, int(smaller(kLanes<A>, N - n))); };
    add_columns<A>(rows, own.first, own.last, value, bias_sums, base == 0);
  }

  void finish(const Range& own) const {
    const int64_t first = own.first * K, count = own.last * K - first;
    if (of.grad_weight != nullptr && M == 0) __builtin_memset(weight_sums + first, 0, size_t(count) * sizeof(A));
    if (of.grad_weight != nullptr && narrows_weight())
      narrow<T>(static_cast<T*>(of.grad_weight) + first, weight_sums + first, count);
    with_weight_type<T>(of.weight_dtype, [&]<class W>() {
      W* const grad_bias = static_cast<W*>(of.grad_bias);
      for (int64_t n = own.first; n < own.last && grad_bias; ++n)
        store(grad_bias + n, broadcast(M > 0 ? A(bias_sums[n]) : A(0)), 1);
    });
  }
};

}  // namespace

void linear_forward(const Linear& linear, const Runtime& runtime) {
  switch (linear.dtype) {
    case DType::float32: return forward<float>(linear, runtime);
    case DType::float64: return forward<double>(linear, runtime);
    case DType::bfloat16: return forward<bfloat16>(linear, runtime);
    case DType::float16: break;  // attention and dropout alone have it
  }
}

void linear_backward(const LinearBackward& linear, const Runtime& runtime) {
  switch (linear.dtype) {
    case DType::float32: return Backward<float>(linear, runtime).run();
    case DType::float64: return Backward<double>(linear, runtime).run();
    case DType::bfloat16: return Backward<bfloat16>(linear, runtime).run();
    case DType::float16: break;  // attention and dropout alone have it
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
