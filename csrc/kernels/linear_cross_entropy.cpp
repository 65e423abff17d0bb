#include "linear_cross_entropy.h"

#include "gemm.h"
#include "math.h"
#include "parallel.h"

GENKERNELS_DECLARE_LINEAR_CROSS_ENTROPY(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// The call goes through the rows in blocks. Of each, the threads compute the logits of their own classes, then the
// softmax of their own rows, then the input's gradient in their own columns and the weight's in their own classes,
// meeting after each of the three: no sum has parts of several threads.
//
// What the gradients need of row i's logits x is e^(x - max): with s_i = f_i c_i / sum_v e^(x_v - max), where f_i is
// the factor of the row's loss and c_i its classes' weight, the gradient of x_v is s_i e^(x_v - max) but for the terms
// of the target. These are taken off in units of s_i, so that only rows of the products' results and of the input have
// to be multiplied by s_i, and no logit is touched again.
template <class T>
struct Pass {
  using E = Operand<T>;
  using A = Accumulator<T>;
  static constexpr int64_t kLines = 64 / int64_t(sizeof(A));
  // Rows whose logits are held at a time: so many that what is read once a block, the weight, and read and written, its
  // gradient, is little beside the products; more where the weight has to be packed anew for each block.
  static constexpr int64_t kBlockRows = 256, kBlockRowsOfLarge = 512, kLeastBlockRows = 64, kBlockBytes = 104 << 20;
  // Largest weight that is packed once for all blocks.
  static constexpr int64_t kPackedBytes = 32 << 20;
  // Rows of linear_weight that the input's gradient is added up over before it is stored.
  static constexpr int64_t kClassesTogether = 4 * kChain;
  static constexpr bool kNarrows = !__is_same(E, A);

  const LinearCrossEntropy& of;
  const Runtime& runtime;
  const int64_t N, K, V;
  const bool needs_gradients;
  const Columns<E> classes, features;
  const int64_t block_rows, shares, logit_stride, input_stride;
  const bool packs_at_once;
  const Barrier barrier;
  double total_weight = 0, class_weight = 0;  // of all targets; of all classes

  A* logits;          // [block_rows, logit_stride], later the gradients in units of `scale`
  E* gradients;       // the same as operands, where these are of another type
  A* scale;           // [block_rows]
  E* packed;          // panels of linear_weight^T: all, or one for each thread
  E* chain;           // a panel of kClassesTogether rows of linear_weight, for the input's gradient
  E* inputs;          // [shares][block_rows, input_stride]
  E* input_panels;    // the same, packed
  E* tiles;           // [shares] a group's tiles
  A* input_sums;      // [block_rows, features]
  A* weight_sums;     // [V, K]
  double* bias_sums;  // [V]
  A* losses;          // [N]

  Pass(const LinearCrossEntropy& arguments, const Runtime& r)
      : of(arguments),
        runtime(r),
        N(of.rows),
        K(of.in_features),
        V(of.classes),
        needs_gradients(of.grad_input != nullptr || of.grad_linear_weight != nullptr || of.grad_linear_bias != nullptr),
        classes(V),
        features(K),
        block_rows(rows_of_block()),
        shares(smaller(r.threads, classes.panels)),
        logit_stride(staged_stride<A>(classes.vectors * kLanes<A>)),
        input_stride(staged_stride<E>(K)),
        packs_at_once(N > block_rows && is_packable()),
        barrier(r, shares),
        logits(allocate<A>(r, block_rows * logit_stride)),
        gradients(kNarrows && needs_gradients ? allocate<E>(r, block_rows * logit_stride) : nullptr),
        scale(allocate<A>(r, block_rows)),
        packed(allocate<E>(r, packs_at_once ? classes.packed_size(K) : shares * panel_size())),
        chain(of.grad_input ? allocate<E>(r, shares * kClassesTogether * kPanelVectors * kLanes<E>) : nullptr),
        inputs(allocate<E>(r, block_rows * input_stride)),
        input_panels(of.grad_linear_weight ? allocate<E>(r, features.packed_size(block_rows + 1)) : nullptr),
        tiles(of.grad_linear_weight ? allocate<E>(r, shares * tile_group_size()) : nullptr),
        input_sums(of.grad_input ? allocate<A>(r, block_rows * features.vectors * kLanes<A>) : nullptr),
        weight_sums(static_cast<A*>(of.grad_linear_weight)),
        bias_sums(of.grad_linear_bias ? allocate<double>(r, V) : nullptr),
        losses(of.reduction == Reduction::none ? static_cast<A*>(of.loss) : allocate<A>(r, N)) {
    if (of.grad_linear_weight != nullptr && !__is_same(T, A)) weight_sums = allocate<A>(r, V * K);
    for (int64_t i = 0; i < N; ++i)
      if (!is_ignored(i)) total_weight += double(weight_of(of.target[i]));
    class_weight = double(V);
    if (of.weight != nullptr && of.label_smoothing > 0) {
      class_weight = 0;
      for (int64_t v = 0; v < V; ++v) class_weight += double(weight_of(v));
    }
  }

  bool is_packable() const { return V * K * int64_t(sizeof(E)) <= kPackedBytes; }
  int64_t rows_of_block() const {
    const int64_t most = kBlockBytes / (V * int64_t(sizeof(A))) / kTileRows * kTileRows;
    return smaller(larger(N, 1),
                   larger(kLeastBlockRows, smaller(is_packable() ? kBlockRows : kBlockRowsOfLarge, most)));
  }
  int64_t panel_size() const { return ceil_div(K, kGroup<E>) * Panel<E, kPanelVectors>::kStep; }
  int64_t tile_group_size() const { return kTileGroup * kTileRows * (block_rows + 1); }
  bool is_ignored(int64_t i) const { return of.target[i] == of.ignore_index; }
  A weight_of(int64_t v) const { return of.weight ? static_cast<const A*>(of.weight)[v] : A(1); }

  // The factor of row i's loss in what is differentiated.
  A factor(int64_t i) const {
    const A* grad = static_cast<const A*>(of.grad_loss);
    const double of_loss = grad ? double(grad[of.reduction == Reduction::none ? i : 0]) : 1.0;
    return A(of.reduction == Reduction::mean ? of_loss / total_weight : of_loss);
  }

  void run() const {
    const int64_t blocks = ceil_div(N, block_rows);
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      const auto part = [&](int64_t count, int64_t share) { return count * share / shares; };
      const int64_t first_class = part(classes.panels, first), last_class = part(classes.panels, last);
      if (packs_at_once)
        for (int64_t p = first_class; p < last_class; ++p) pack_classes(p, packed + classes.offset(p, K));
      int64_t meetings = 0;
      const auto meet = [&] { barrier.wait(last - first, ++meetings); };
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t base = block * block_rows, rows = smaller(block_rows, N - base);
        const int64_t first_row = part(rows, first), last_row = part(rows, last);
        if (!reads_input()) stage_inputs(base, first_row, last_row);
        meet();
        compute_logits(input_rows(base), rows, first_class, last_class, first);
        meet();
        for (int64_t i = first_row; i < last_row; ++i) finish_row(base, i);
        meet();
        if (!needs_gradients) continue;
        if (of.grad_linear_weight) pack_inputs(rows, part(features.panels, first), part(features.panels, last));
        if (of.grad_input) add_to_input(base, rows, features.panels * first, features.panels * last, first);
        if (of.grad_linear_bias) add_to_bias(rows, first_class, last_class, block == 0);
        meet();
        if (of.grad_linear_weight) add_to_weight(rows, first_class, last_class, first, block == 0);
      }
    });
    finish();
  }

  const T* weight_row(int64_t v) const { return static_cast<const T*>(of.linear_weight) + v * K; }

  // A panel of linear_weight^T.
  void pack_classes(int64_t p, E* to) const {
    const int64_t first = classes.first_column(p);
    classes.with_width(p, [&]<int kVectors>() {
      pack_panel_of_rows<E, T, kVectors>(
          K, [&](int64_t n) { return first + n < V ? weight_row(first + n) : nullptr; }, to);
    });
  }

  // Whether rows of the input are multiplied as they lie.
  bool reads_input() const { return __is_same(T, E) && !collides<E>(of.input_stride); }
  Rows<const E> input_rows(int64_t base) const {
    if constexpr (__is_same(T, E))
      if (reads_input()) return {static_cast<const E*>(of.input) + base * of.input_stride, of.input_stride};
    return {inputs, input_stride};
  }

  void stage_inputs(int64_t base, int64_t first, int64_t last) const {
    const T* from = static_cast<const T*>(of.input) + (base + first) * of.input_stride;
    stage<E, T>(inputs + first * input_stride, input_stride, last - first, K,
                [&](int64_t i) { return from + i * of.input_stride; });
  }

  void compute_logits(Rows<const E> input, int64_t rows, int64_t first_panel, int64_t last_panel, int64_t share) const {
    const T* bias = static_cast<const T*>(of.linear_bias);
    for (int64_t p = first_panel; p < last_panel; ++p) {
      E* panel = packed + (packs_at_once ? classes.offset(p, K) : share * panel_size());
      if (!packs_at_once) pack_classes(p, panel);
      const E* next = packs_at_once ? packed + classes.offset(smaller(p + 1, last_panel - 1), K) : panel;
      classes.with_width(p, [&]<int kVectors>() {
        multiply_panel<E, kVectors>(input, rows, panel, K, next, p == first_panel,
                                    [&](int64_t first, int64_t run, auto& sum) GENKERNELS_LAMBDA {
                                      for (int v = 0; v < kVectors; ++v) {
                                        const int64_t column = classes.first_column(p) + v * kLanes<A>;
                                        const int count = int(smaller(kLanes<A>, V - column));
                                        const Vector<A> added = bias ? load(bias + column, count) : Vector<A>{};
                                        for (int64_t i = 0; i < run; ++i)
                                          store(logits + (first + i) * logit_stride + column, sum[i][v] + added, count);
                                      }
                                    });
      });
    }
  }

  // The loss of row i of the block, its most likely class, and the row's share of all gradients.
  void finish_row(int64_t base, int64_t i) const {
    A* row = logits + i * logit_stride;
    for (int64_t v = V; v < classes.vectors * kLanes<A>; ++v) row[v] = -A(__builtin_inf());
    const int64_t vectors = classes.vectors, target = of.target[base + i];
    const bool ignored = is_ignored(base + i);
    const A max = max_of(row, vectors);
    if (of.predictions) of.predictions[base + i] = first_of(row, vectors, max);
    const A smoothing = A(of.label_smoothing);
    const A target_weight = ignored ? A(0) : weight_of(target);
    const A to_target = ignored ? A(0) : max - row[target];
    A to_all = 0;  // sum_v w_v (max - x_v)
    if (smoothing > 0 && !ignored) to_all = sum_of_distances(row, vectors, max);
    const A sum = needs_gradients && !ignored ? sum_of_exponentials<true>(row, vectors, max)
                                              : sum_of_exponentials<false>(row, vectors, max);
    if (of.predictions && sum != sum) {
      for (int64_t v = V; v-- > 0;)
        if (row[v] != row[v]) of.predictions[base + i] = v;  // as torch.argmax has it, the first that is no number
    }
    const double log_sum = __builtin_log(double(sum));
    const double loss = (1 - of.label_smoothing) * double(target_weight) * (double(to_target) + log_sum);
    const double smooth =
        smoothing > 0 ? of.label_smoothing / double(V) * (double(to_all) + class_weight * log_sum) : 0.0;
    losses[base + i] = ignored ? A(0) : A(loss + smooth);
    if (!needs_gradients) return;
    const double all = (1 - of.label_smoothing) * double(target_weight) + of.label_smoothing * class_weight / double(V);
    if (ignored || all == 0) {
      // A mean over targets that weigh nothing is no number, and neither is its gradient.
      scale[i] = ignored ? A(0) : factor(base + i) * A(0);
      for (int64_t v = 0; v < vectors; ++v) store(row + v * kLanes<A>, Vector<A>{});
    } else {
      scale[i] = A(double(factor(base + i)) * all / double(sum));
      const double unit = double(sum) / all;
      if (smoothing > 0) take_off(row, vectors, A(of.label_smoothing / double(V) * unit));
      row[target] -= A((1 - of.label_smoothing) * double(target_weight) * unit);
    }
    if (of.grad_linear_weight) scale_row(input_rows(base)[i], scale[i], inputs + i * input_stride);
    if constexpr (kNarrows)
      for (int64_t v = 0; v < vectors * kLanes<A>; v += kLanes<A>)
        store(gradients + i * logit_stride + v, load(row + v));
  }

  static A max_of(const A* row, int64_t vectors) {
    constexpr int kChains = 4;
    Vector<A> most[kChains];
    for (int c = 0; c < kChains; ++c) most[c] = load(row);
    const auto take = [](Vector<A>& so_far, Vector<A> x) { so_far = x > so_far ? x : so_far; };
    int64_t v = 0;
    for (; v + kChains <= vectors; v += kChains)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) take(most[c], load(row + (v + c) * kLanes<A>));
    for (; v < vectors; ++v) take(most[0], load(row + v * kLanes<A>));
    for (int c = 1; c < kChains; ++c) take(most[0], most[c]);
    A max = most[0][0];
    for (int l = 1; l < kLanes<A>; ++l)
      if (most[0][l] > max) max = most[0][l];
    return max;
  }

  // The first element that is `max`.
  static int64_t first_of(const A* row, int64_t vectors, A max) {
    constexpr int64_t kTogether = 16;  // vectors that are looked at before their lanes are
    for (int64_t v = 0; v < vectors; v += kTogether) {
      const int64_t end = smaller(vectors, v + kTogether);
      auto found = load(row + v * kLanes<A>) == max;
      for (int64_t w = v + 1; w < end; ++w) found |= load(row + w * kLanes<A>) == max;
      bool any = false;
      for (int l = 0; l < kLanes<A>; ++l) any |= found[l] != 0;
      for (int64_t i = v * kLanes<A>; any && i < end * kLanes<A>; ++i)
        if (row[i] == max) return i;
    }
    return 0;
  }

  // sum_v e^(x_v - max), in several chains of at most kLongest; kKeeps leaves the summands in the row.
  template <bool kKeeps>
  static A sum_of_exponentials(A* row, int64_t vectors, A max) {
    constexpr int kTogether = 4;
    constexpr int64_t kLongest = 32 * kTogether;
    A total = 0;
    for (int64_t first = 0; first < vectors; first += kLongest) {
      const int64_t end = smaller(vectors, first + kLongest);
      Several<Vector<A>, kTogether> sums = several<kTogether>([](int) { return Vector<A>{}; });
      int64_t v = first;
      for (; v + kTogether <= end; v += kTogether) {
        const auto e = exponential(
            several<kTogether>([&](int c) GENKERNELS_LAMBDA { return load(row + (v + c) * kLanes<A>) - max; }));
        sums = sums + e;
        if constexpr (kKeeps)
          for (int c = 0; c < kTogether; ++c) store(row + (v + c) * kLanes<A>, e[c]);
      }
      for (; v < end; ++v) {
        const auto e = exponential(several<1>([&](int) { return load(row + v * kLanes<A>) - max; }));
        sums.at[0] += e[0];
        if constexpr (kKeeps) store(row + v * kLanes<A>, e[0]);
      }
      const Vector<A> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      A lanes[kLanes<A>];
      store(lanes, sum);
      for (int half = kLanes<A> / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
      total += lanes[0];
    }
    return total;
  }

  Vector<A> class_weights(int64_t v, int count) const {
    const A* weight = static_cast<const A*>(of.weight);
    if (weight != nullptr) return load(weight + v, count);
    A ones[kLanes<A>];
    for (int l = 0; l < kLanes<A>; ++l) ones[l] = A(1);
    return load(ones, count);
  }

  A sum_of_distances(const A* row, int64_t vectors, A max) const {
    double total = 0;
    for (int64_t v = 0; v < vectors * kLanes<A>; v += kLanes<A>) {
      const int count = int(smaller(kLanes<A>, V - v));
      const Vector<A> terms = class_weights(v, count) * (max - load(row + v, count));
      for (int l = 0; l < count; ++l) total += double(terms[l]);
    }
    return A(total);
  }

  void take_off(A* row, int64_t vectors, A amount) const {
    for (int64_t v = 0; v < vectors * kLanes<A>; v += kLanes<A>)
      store(row + v, load(row + v) - class_weights(v, int(smaller(kLanes<A>, V - v))) * amount);
  }

  const E* gradient_rows() const {
    if constexpr (kNarrows)
      return gradients;
    else
      return logits;
  }

  // grad_input = scale * (gradients linear_weight), for parts [first, last) of the panels' parts: each panel of columns
  // has `shares` parts of the rows.
  void add_to_input(int64_t base, int64_t rows, int64_t first_part, int64_t last_part, int64_t share) const {
    const int64_t stride = features.vectors * kLanes<A>;
    T* to = static_cast<T*>(of.grad_input) + base * K;
    E* panel = chain + share * kClassesTogether * kPanelVectors * kLanes<E>;
    for (int64_t k = 0; k < V; k += kClassesTogether) {
      const int64_t count = smaller(kClassesTogether, V - k);
      const bool is_last = k + count == V;
      for (int64_t p = first_part / shares; p < ceil_div(last_part, shares); ++p) {
        const int64_t begin = rows * larger(first_part - p * shares, 0) / shares;
        const int64_t end = rows * smaller(last_part - p * shares, shares) / shares;
        pack_panel<E, T>(features, p, count, [&](int64_t row) { return weight_row(k + row); }, panel);
        features.with_width(p, [&]<int kVectors>() {
          for (int64_t first = begin; first < end; first += kRunRows) {
            const int64_t run = smaller(kRunRows, end - first);
            Vector<A> sum[kRunRows][kVectors];
            product_of_rows<E, kVectors>(gradient_rows() + first * logit_stride + k, logit_stride, run, panel, count,
                                         sum, Ahead<Into::L1>{reinterpret_cast<const char*>(panel)});
            for (int64_t i = 0; i < run; ++i)
              for (int v = 0; v < kVectors; ++v) {
                const int64_t column = features.first_column(p) + v * kLanes<A>;
                A* total = input_sums + (first + i) * stride + column;
                const Vector<A> now = k == 0 ? sum[i][v] : load(total) + sum[i][v];
                if (is_last)
                  store(to + (first + i) * K + column, now * scale[first + i], int(smaller(kLanes<A>, K - column)));
                else
                  store(total, now);
              }
          }
        });
      }
    }
  }

  // Panels of scale * input.
  void pack_inputs(int64_t rows, int64_t first_panel, int64_t last_panel) const {
    for (int64_t p = first_panel; p < last_panel; ++p)
      pack_panel<E, E>(
          features, p, rows, [&](int64_t k) { return inputs + k * input_stride; },
          input_panels + features.offset(p, rows));
  }

  // grad_linear_weight += gradients^T (scale * input), in the rows of the panels' classes.
  void add_to_weight(int64_t rows, int64_t first_panel, int64_t last_panel, int64_t share, bool is_first) const {
    add_transposed_product<E>({gradient_rows(), logit_stride}, rows, classes.first_column(first_panel),
                              smaller(V, classes.first_column(last_panel)), features, 0, features.panels,
                              {input_panels}, tiles + share * tile_group_size(), weight_sums, K, is_first);
  }

  void scale_row(const E* row, A factor, E* to) const {
    for (int64_t k = 0; k < K; k += kLanes<A>) {
      const int count = int(smaller(kLanes<A>, K - k));
      store(to + k, load(row + k, count) * factor, count);
    }
  }

  void add_to_bias(int64_t rows, int64_t first_panel, int64_t last_panel, bool is_first) const {
    const auto value = [&](int64_t i, int64_t v)
                           GENKERNELS_LAMBDA { return load(logits + i * logit_stride + v) * scale[i]; };
    add_columns<A>(rows, classes.first_column(first_panel), smaller(V, classes.first_column(last_panel)), value,
                   bias_sums, is_first);
  }

  void finish() const {
    if (of.reduction != Reduction::none) {
      double sum = 0;
      for (int64_t i = 0; i < N; ++i) sum += double(losses[i]);
      if (of.reduction == Reduction::mean) sum = total_weight == 0 ? __builtin_nan("") : sum / total_weight;
      *static_cast<A*>(of.loss) = A(sum);
    }
    if (of.grad_linear_weight != nullptr && N == 0)
      __builtin_memset(of.grad_linear_weight, 0, size_t(V * K) * sizeof(T));
    if (of.grad_linear_weight != nullptr && N > 0 && !__is_same(T, A))
      parallel(runtime, shares, [&](int64_t i) {
        const int64_t first = V * i / shares * K, last = V * (i + 1) / shares * K;
        narrow<T>(static_cast<T*>(of.grad_linear_weight) + first, weight_sums + first, last - first);
      });
    if (of.grad_linear_bias != nullptr)
      for (int64_t v = 0; v < V; ++v)
        store(static_cast<T*>(of.grad_linear_bias) + v, broadcast(N > 0 ? A(bias_sums[v]) : A(0)), 1);
  }
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& arguments, const Runtime& runtime) {
  switch (arguments.dtype) {
    case DType::float32: return Pass<float>(arguments, runtime).run();
    case DType::float64: return Pass<double>(arguments, runtime).run();
    case DType::bfloat16: return Pass<bfloat16>(arguments, runtime).run();
    case DType::float16: break;  // attention and dropout alone have it
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
