// Runs the kernels without PyTorch, at every SIMD level of this CPU or at the one named as argument: the forward pass
// against a plain loop; the GRU's gradients and attention's second ones against central differences of that loop, the
// other gradients against plain loops too. What the CUDA kernels compute runs here as well, thread by thread. Exit code
// 0 if all agree.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cuda/gru_cell.h"
#include "dispatch.h"

namespace {

// Odd sizes; and a batch that is shared out by units, with whole lines of units, where the cache is as small as kTiny.
struct Sizes {
  int64_t T, B, I, H;
};
constexpr Sizes kSizes[] = {{5, 3, 19, 21}, {4, 9, 19, 64}};
constexpr int64_t kTiny = 64, kUsual = 1 << 20;
int64_t T, B, I, H;
int64_t G;  // gates of the recurrent cell: 3 of the GRU, 1 of the RNN with tanh

using Values = std::vector<double>;

// Everything the loss depends on. The loss is the sum of output * grad_output and h_n * grad_h_n.
using Arguments = std::array<Values, 6>;
const char* const kNames[6] = {"input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"};
std::array<size_t, 6> sizes() {
  return {size_t(T * B * I), size_t(B * H), size_t(G * H * I), size_t(G * H * H), size_t(G * H), size_t(G * H)};
}

// Values that float32 holds exactly, so that only the arithmetic differs between the types.
Values random_values(size_t size, double scale, std::mt19937& random) {
  std::normal_distribution<double> normal(0, scale);
  Values values(size);
  for (double& value : values) value = float(normal(random));
  return values;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

Values plain_forward(const Arguments& arguments) {
  const auto& [input, hx, weight_ih, weight_hh, bias_ih, bias_hh] = arguments;
  Values output(T * B * H);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t b = 0; b < B; ++b) {
      const double* x = &input[(t * B + b) * I];
      const double* h = t == 0 ? &hx[b * H] : &output[((t - 1) * B + b) * H];
      for (int64_t u = 0; u < H; ++u) {
        double from_x[3], from_h[3];
        for (int64_t gate = 0; gate < G; ++gate) {
          const int64_t row = gate * H + u;
          from_x[gate] = bias_ih[row];
          from_h[gate] = bias_hh[row];
          for (int64_t k = 0; k < I; ++k) from_x[gate] += weight_ih[row * I + k] * x[k];
          for (int64_t k = 0; k < H; ++k) from_h[gate] += weight_hh[row * H + k] * h[k];
        }
        double& next = output[(t * B + b) * H + u];
        if (G == 1) {
          next = std::tanh(from_x[0] + from_h[0]);
          continue;
        }
        const double r = sigmoid(from_x[0] + from_h[0]), z = sigmoid(from_x[1] + from_h[1]);
        const double n = std::tanh(from_x[2] + r * from_h[2]);
        next = (1 - z) * n + z * h[u];
      }
    }
  return output;
}

double inner_product(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// The larger one; unlike that of std::fmax or std::max, a NaN stays.
double worse(double a, double b) { return a >= b || std::isnan(a) ? a : b; }

double largest_difference(const Values& a, const Values& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = worse(largest, std::fabs(a[i] - b[i]));
  return largest;
}

class Memory {
 public:
  static void* allocate(void* owner, size_t bytes) {
    const size_t size = (bytes / 64 + 1) * 64;
    void* block = std::aligned_alloc(64, size);
    std::memset(block, 0xff, size);  // NaN: a value that was never written shows
    static_cast<Memory*>(owner)->blocks_.emplace_back(block, &std::free);
    return block;
  }
  static void release(void* owner) { static_cast<Memory*>(owner)->blocks_.clear(); }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
};

using Task = void (*)(void*, int64_t, int64_t);

int64_t most_ranges;  // as many as the runtime says that it has threads

void check_count(int64_t count) {
  if (count <= most_ranges) return;
  std::printf("%lld ranges asked of %lld threads: WRONG\n", static_cast<long long>(count),
              static_cast<long long>(most_ranges));
  std::exit(1);
}

void run_on_threads(int64_t count, Task task, void* argument) {
  check_count(count);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(task, argument, i, i + 1);
  for (std::thread& thread : threads) thread.join();
}

// As in a nested parallel region: one range has all.
void run_as_one(int64_t count, Task task, void* argument) {
  check_count(count);
  task(argument, 0, count);
}

// As under a thread limit: fewer threads than asked for, with unequal ranges.
template <int kThreads>
void run_on(int64_t count, Task task, void* argument) {
  check_count(count);
  const int64_t range = (count + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < count; first += range)
    threads.emplace_back(task, argument, first, std::min(count, first + range));
  for (std::thread& thread : threads) thread.join();
}

struct Threads {
  int count;
  void (*parallel)(int64_t, Task, void*);
};
constexpr Threads kThreads[] = {{1, run_as_one}, {2, run_on_threads}, {2, run_as_one},
                                {3, run_on<2>},  {5, run_on_threads}, {6, run_on<4>}};

template <class S>
std::vector<S> as(const Values& values) {
  return {values.begin(), values.end()};
}

template <class S>
bool check(const genkernels::Kernels& kernels, const Threads& threads, int64_t cache, genkernels::DType dtype,
           const char* name, double tolerance) {
  std::mt19937 random(1);
  const auto size = sizes();
  Arguments arguments;
  std::vector<S> values[6], gradients[6];
  for (int i = 0; i < 6; ++i) {
    // Recurrent weights as modules draw them: larger ones amplify what is rounded from step to step.
    arguments[i] = random_values(size[i], i == 3 ? 1 / std::sqrt(double(H)) : 0.3, random);
    values[i] = as<S>(arguments[i]);
    gradients[i].assign(size[i], S(NAN));
  }
  const Values grad_output = random_values(T * B * H, 1, random), grad_h_n = random_values(B * H, 1, random);
  const std::vector<S> from_output = as<S>(grad_output), from_h_n = as<S>(grad_h_n);
  std::vector<S> output(T * B * H, S(NAN)), h_n(B * H, S(NAN));

  most_ranges = threads.count;
  Memory memory, saved;
  const genkernels::Runtime runtime{threads.count,    cache,           threads.parallel, std::this_thread::yield,
                                    Memory::allocate, Memory::release, &memory};
  const auto forward = G == 1 ? kernels.rnn_forward : kernels.gru_forward;
  const auto backward = G == 1 ? kernels.rnn_backward : kernels.gru_backward;
  genkernels::Recurrent layer{};
  layer.dtype = dtype;
  layer.steps = T;
  layer.batch = B;
  layer.input_size = I;
  layer.hidden_size = H;
  layer.input = values[0].data();
  layer.input_stride_t = B * I;
  layer.input_stride_b = I;
  layer.hx = values[1].data();
  layer.weight_ih = values[2].data();
  layer.weight_hh = values[3].data();
  layer.bias_ih = values[4].data();
  layer.bias_hh = values[5].data();
  layer.output = output.data();
  layer.gates = Memory::allocate(&saved, size_t(T * B * 4 * H) * sizeof(S));  // of whole lines where H is
  layer.h_n = h_n.data();
  forward(&layer, 1, runtime);

  genkernels::RecurrentGradients grad{};
  grad.grad_output = from_output.data();
  grad.grad_output_stride_t = B * H;
  grad.grad_output_stride_b = H;
  grad.grad_h_n = from_h_n.data();
  grad.needs_weights = true;
  grad.grad_input = gradients[0].data();
  grad.grad_hx = gradients[1].data();
  grad.grad_weight_ih = gradients[2].data();
  grad.grad_weight_hh = gradients[3].data();
  grad.grad_bias_ih = gradients[4].data();
  grad.grad_bias_hh = gradients[5].data();
  backward(&layer, &grad, 1, runtime);

  // Both directions in one call give what a call of each gives.
  struct Direction {
    std::vector<S> output, h_n, gradients[6];
  };
  Direction apart[2], together[2];
  genkernels::Recurrent both[2];
  genkernels::RecurrentGradients both_grad[2];
  const auto prepare = [&](Direction(&results)[2]) {
    for (int d = 0; d < 2; ++d) {
      Direction& to = results[d];
      to.output.assign(output.size(), S(NAN));
      to.h_n.assign(h_n.size(), S(NAN));
      for (int i = 0; i < 6; ++i) to.gradients[i].assign(size[i], S(NAN));
      both[d] = layer;
      both[d].reverse = d == 1;
      both[d].output = to.output.data();
      both[d].h_n = to.h_n.data();
      both[d].gates = Memory::allocate(&saved, size_t(T * B * 4 * H) * sizeof(S));
      both_grad[d] = grad;
      both_grad[d].grad_input = to.gradients[0].data();
      both_grad[d].grad_hx = to.gradients[1].data();
      both_grad[d].grad_weight_ih = to.gradients[2].data();
      both_grad[d].grad_weight_hh = to.gradients[3].data();
      both_grad[d].grad_bias_ih = to.gradients[4].data();
      both_grad[d].grad_bias_hh = to.gradients[5].data();
    }
  };
  prepare(apart);
  for (int d = 0; d < 2; ++d) {
    forward(&both[d], 1, runtime);
    backward(&both[d], &both_grad[d], 1, runtime);
  }
  prepare(together);
  forward(both, 2, runtime);
  backward(both, both_grad, 2, runtime);
  bool agrees = apart[0].output == output && apart[1].output != output;
  for (int d = 0; d < 2; ++d) {
    agrees = agrees && together[d].output == apart[d].output && together[d].h_n == apart[d].h_n;
    for (int i = 0; i < 6; ++i) agrees = agrees && together[d].gradients[i] == apart[d].gradients[i];
  }

  const Values expected = plain_forward(arguments);
  const Values expected_h_n(expected.end() - B * H, expected.end());
  const double forward_error = worse(largest_difference({output.begin(), output.end()}, expected),
                                     largest_difference({h_n.begin(), h_n.end()}, expected_h_n));
  agrees = agrees && forward_error <= tolerance;
  std::printf("%-12s %-8s forward %.1e", kernels.level, name, forward_error);

  // One argument moves at a time, in a random direction, so that no gradient hides behind another.
  for (int i = 0; i < 6; ++i) {
    const Values direction = random_values(size[i], 1, random);
    const double step = 1e-5;
    double loss[2];
    for (int side = 0; side < 2; ++side) {
      Arguments moved = arguments;
      for (size_t k = 0; k < size[i]; ++k) moved[i][k] += (side == 0 ? step : -step) * direction[k];
      const Values out = plain_forward(moved);
      loss[side] = inner_product(out, grad_output) + inner_product({out.end() - B * H, out.end()}, grad_h_n);
    }
    const double slope = (loss[0] - loss[1]) / (2 * step);
    const double computed = inner_product({gradients[i].begin(), gradients[i].end()}, direction);
    const double error = std::fabs(computed - slope) / std::fmax(1, std::fabs(slope));
    agrees = agrees && error <= tolerance;
    std::printf("  %s %.1e", kNames[i], error);
  }
  std::printf("  %s\n", agrees ? "ok" : "WRONG");
  return agrees;
}

// [m, n] = a b, or with the second operand transposed; a(i, k) and b(k, j) give the elements.
template <class A, class B2>
Values product(int64_t m, int64_t n, int64_t k, const A& a, const B2& b) {
  Values result(m * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t l = 0; l < k; ++l) result[i * n + j] += a(i, l) * b(l, j);
  return result;
}

// What a linear map of M rows gets and gives.
template <class S>
struct LinearCase {
  static constexpr int64_t M = 301, K = 19, N = 37;  // more rows than a block has

  std::mt19937 random{2};
  const Values input = random_values(M * K, 1, random), weight = random_values(N * K, 0.3, random);
  const Values bias = random_values(N, 0.3, random), grad_output = random_values(M * N, 1, random);
  const std::vector<S> x = as<S>(input), w = as<S>(weight), b = as<S>(bias), g = as<S>(grad_output);
  std::vector<S> grad_input = std::vector<S>(M * K, S(NAN)), grad_weight = std::vector<S>(N * K, S(NAN));
  std::vector<S> grad_bias = std::vector<S>(N, S(NAN));

  Values pre_activation() const {
    Values result = product(
        M, N, K, [&](int64_t i, int64_t k) { return input[i * K + k]; },
        [&](int64_t k, int64_t n) { return weight[n * K + k]; });
    for (int64_t i = 0; i < M * N; ++i) result[i] += bias[i % N];
    return result;
  }

  // The largest error of the three gradients, of which `delta` is the one of pre_activation().
  double gradient_error(const Values& delta) const {
    const auto of_x = product(
        M, K, N, [&](int64_t i, int64_t n) { return delta[i * N + n]; },
        [&](int64_t n, int64_t k) { return weight[n * K + k]; });
    const auto of_w = product(
        N, K, M, [&](int64_t n, int64_t i) { return delta[i * N + n]; },
        [&](int64_t i, int64_t k) { return input[i * K + k]; });
    Values of_b(N);
    for (int64_t i = 0; i < M * N; ++i) of_b[i % N] += delta[i];
    return worse(largest_difference({grad_input.begin(), grad_input.end()}, of_x),
                 worse(largest_difference({grad_weight.begin(), grad_weight.end()}, of_w),
                       largest_difference({grad_bias.begin(), grad_bias.end()}, of_b)));
  }
};

template <class S>
bool check_linear(const genkernels::Kernels& kernels, const genkernels::Runtime& runtime, genkernels::DType dtype,
                  double tolerance) {
  LinearCase<S> c;
  constexpr int64_t M = c.M, K = c.K, N = c.N;
  std::vector<S> output(M * N, S(NAN)), saved(M * N, S(NAN));
  constexpr auto kSilu = genkernels::Activation::silu;
  kernels.linear_forward(
      {dtype, dtype, M, K, N, c.x.data(), K, c.w.data(), c.b.data(), kSilu, output.data(), saved.data()}, runtime);
  kernels.linear_backward({dtype, dtype, M, K, N, c.x.data(), K, c.w.data(), kSilu, saved.data(), c.g.data(), N,
                           c.grad_input.data(), c.grad_weight.data(), c.grad_bias.data()},
                          runtime);
  Values expected = c.pre_activation(), delta = c.grad_output;
  for (int64_t i = 0; i < M * N; ++i) {
    const double s = sigmoid(expected[i]);
    delta[i] *= s * (1 + expected[i] * (1 - s));
    expected[i] *= s;
  }
  const double error = largest_difference({output.begin(), output.end()}, expected);
  const double gradients = c.gradient_error(delta);
  std::printf("%-12s linear forward %.1e backward %.1e\n", kernels.level, error, gradients);
  return error <= tolerance && gradients <= 100 * tolerance;  // sums of 300 rows
}

template <class S>
bool check_loss(const genkernels::Kernels& kernels, const genkernels::Runtime& runtime, genkernels::DType dtype,
                double tolerance) {
  LinearCase<S> c;
  constexpr int64_t M = c.M, K = c.K, N = c.N;
  std::vector<int64_t> target(M);
  for (int64_t i = 0; i < M; ++i) target[i] = i % 5 == 0 ? -100 : i % N;
  S loss = S(NAN);
  genkernels::LinearCrossEntropy arguments{};
  arguments.dtype = dtype;
  arguments.rows = M;
  arguments.in_features = K;
  arguments.classes = N;
  arguments.input = c.x.data();
  arguments.input_stride = K;
  arguments.linear_weight = c.w.data();
  arguments.linear_bias = c.b.data();
  arguments.target = target.data();
  arguments.ignore_index = -100;
  arguments.reduction = genkernels::Reduction::sum;
  arguments.loss = &loss;
  arguments.grad_input = c.grad_input.data();
  arguments.grad_linear_weight = c.grad_weight.data();
  arguments.grad_linear_bias = c.grad_bias.data();
  kernels.linear_cross_entropy(arguments, runtime);

  Values delta = c.pre_activation();
  double expected = 0;
  for (int64_t i = 0; i < M; ++i) {
    double* const row = &delta[i * N];
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) sum += std::exp(row[n]);
    if (target[i] >= 0) expected += std::log(sum) - row[target[i]];
    for (int64_t n = 0; n < N; ++n) row[n] = target[i] < 0 ? 0 : std::exp(row[n]) / sum - (n == target[i]);
  }
  const double error = std::fabs(double(loss) - expected) / expected, gradients = c.gradient_error(delta);
  std::printf("%-12s loss forward %.1e backward %.1e\n", kernels.level, error, gradients);
  return error <= tolerance && gradients <= 100 * tolerance;
}

// Few queries, which have kernels of their own, and more; keys of several chunks, or of more than one block. Where
// there is a mask its gradient is wanted, too, which those of few queries do not give. With a window there are also
// batches of different lengths, ALiBi and a softcap.
struct AttentionSizes {
  int64_t heads, kv_heads, queries, keys;
  bool is_causal, has_mask;
  int64_t window;  // of keys on either side; 0: none
};
constexpr AttentionSizes kAttentionSizes[] = {
    {4, 2, 3, 1100, true, false, 0},  {3, 3, 3, 70, false, true, 0},      {4, 2, 37, 70, true, false, 0},
    {3, 3, 37, 300, false, true, 0},  {4, 2, 3, 1100, false, false, 500}, {4, 2, 300, 310, true, false, 40},
    {3, 3, 37, 300, false, true, 90},
};

// What attention gets, grad_output, grad_logsumexp, query, key, value and mask, or what it gives that has their shapes:
// output, logsumexp and the last four's gradients.
enum { kOutput, kLogsumexp, kQuery, kKey, kValue, kMask };
template <class S>
using AttentionTensors = std::array<std::vector<S>, 6>;

constexpr double kSlopes[] = {0.5, 0.25, 0.0625, 0.125};

AttentionTensors<double> plain_attention(const genkernels::Attention& of, const AttentionTensors<double>& arguments) {
  const auto& [grad_output, grad_logsumexp, query, key, value, mask] = arguments;
  AttentionTensors<double> results;
  for (int i = 0; i < 6; ++i) results[i].resize(arguments[i].size());
  auto& [output, logsumexp, grad_query, grad_key, grad_value, grad_mask] = results;
  const int64_t S = of.keys, D = of.head_size, Dv = of.value_size;
  for (int64_t row = 0; row < of.batch * of.heads * of.queries; ++row) {
    const int64_t i = row % of.queries, kv = row / of.queries / (of.heads / of.kv_heads);
    const int64_t b = row / of.queries / of.heads, h = row / of.queries % of.heads;
    const int64_t keys = of.key_lengths == nullptr ? S : of.key_lengths[b], missing = of.follows_lengths ? S - keys : 0;
    const int64_t unseen = std::max<int64_t>(0, i + of.first_diagonal - missing);
    const int64_t seen = std::min(keys, i + of.diagonal - missing + 1);
    Values p(seen), grad_p(seen), derivative(seen, 1);
    double total = 0, mean = 0;
    for (int64_t j = unseen; j < seen; ++j) {
      double score = 0;
      for (int64_t k = 0; k < D; ++k) score += of.scale * query[row * D + k] * key[(kv * S + j) * D + k];
      if (of.softcap != 0) {
        const double capped = std::tanh(score / of.softcap);
        score = of.softcap * capped;
        derivative[j] = 1 - capped * capped;
      }
      if (!mask.empty()) score += mask[i * S + j];
      if (of.alibi.slopes != nullptr) score -= kSlopes[h] * double(std::abs(i + of.alibi.offset - missing - j));
      total += p[j] = std::exp(score);
    }
    logsumexp[row] = std::log(total);
    for (int64_t j = unseen; j < seen; ++j) {
      p[j] /= total;
      for (int64_t k = 0; k < Dv; ++k) {
        const int64_t at = row * Dv + k, from = (kv * S + j) * Dv + k;
        output[at] += p[j] * value[from];
        grad_p[j] += grad_output[at] * value[from];
        grad_value[from] += p[j] * grad_output[at];
      }
      mean += p[j] * grad_p[j];
    }
    for (int64_t j = unseen; j < seen; ++j) {
      double grad_score = p[j] * (grad_p[j] - mean + grad_logsumexp[row]);
      if (!mask.empty()) grad_mask[i * S + j] += grad_score;
      grad_score *= derivative[j];
      for (int64_t k = 0; k < D; ++k) {
        const int64_t at = row * D + k, from = (kv * S + j) * D + k;
        grad_query[at] += of.scale * grad_score * key[from];
        grad_key[from] += of.scale * grad_score * query[at];
      }
    }
  }
  return results;
}

// One of the tensors, contiguous.
template <class Heads, class Tensors>
Heads heads_of(const genkernels::Attention& of, Tensors& tensors, int i) {
  const bool of_keys = i == kKey || i == kValue;
  const int64_t rows = of_keys ? of.keys : of.queries;
  const int64_t columns = i == kQuery || i == kKey ? of.head_size : of.value_size;
  return {tensors[i].data(), (of_keys ? of.kv_heads : of.heads) * rows * columns, rows * columns, columns};
}

template <class S>
bool check_attention(const genkernels::Kernels& kernels, const genkernels::Runtime& runtime,
                     const AttentionSizes& sizes, genkernels::DType dtype, double tolerance) {
  using Input = genkernels::HeadsInput;
  using Output = genkernels::HeadsOutput;
  genkernels::Attention of{};
  of.dtype = dtype;
  of.batch = 2;
  of.heads = sizes.heads;
  of.kv_heads = sizes.kv_heads;
  of.queries = of.all_queries = sizes.queries;
  of.keys = sizes.keys;
  of.head_size = 19;
  of.value_size = 21;
  of.dropout.scale = 1;
  of.diagonal = sizes.is_causal ? of.keys - of.queries : of.keys;
  of.scale = 0.2;
  const int64_t lengths[] = {of.keys - 7, of.keys};
  const std::vector<S> alibi_slopes(std::begin(kSlopes), std::end(kSlopes));
  if (sizes.window > 0) {
    of.key_lengths = lengths;
    of.follows_lengths = true;
    of.alibi = {alibi_slopes.data(), 0, 1, of.keys - of.queries};
    of.diagonal = of.alibi.offset + (sizes.is_causal ? 0 : sizes.window);
    of.first_diagonal = of.alibi.offset - sizes.window;
    of.softcap = 1.5;
  }

  const int64_t rows = of.batch * of.heads * of.queries, key_rows = of.batch * of.kv_heads * of.keys;
  const int64_t counts[6] = {rows * of.value_size,     rows,
                             rows * of.head_size,      key_rows * of.head_size,
                             key_rows * of.value_size, sizes.has_mask ? of.queries * of.keys : 0};
  std::mt19937 random(3);
  AttentionTensors<double> arguments, cotangents;  // the latter of gradients alone
  AttentionTensors<S> a, c, results, second;
  for (int i = 0; i < 6; ++i) {
    arguments[i] = random_values(counts[i], 1, random);
    cotangents[i] = random_values(i < kQuery ? 0 : counts[i], 1, random);
    a[i] = as<S>(arguments[i]);
    c[i] = as<S>(cotangents[i]);
    results[i].assign(counts[i], S(NAN));
    second[i].assign(counts[i], S(NAN));
  }
  of.query = heads_of<Input>(of, a, kQuery);
  of.key = heads_of<Input>(of, a, kKey);
  of.value = heads_of<Input>(of, a, kValue);
  const auto mask_of = [&](const AttentionTensors<S>& tensors) -> genkernels::AttentionMask {  // broadcast over heads
    if (!sizes.has_mask) return {};
    return {genkernels::MaskType::of_accumulator, tensors[kMask].data(), 0, 0, of.keys, 1};
  };
  of.mask = mask_of(a);
  std::vector<S> statistics(2 * rows, S(NAN));
  kernels.attention_forward({of, heads_of<Output>(of, results, kOutput), statistics.data()}, runtime);
  for (int64_t row = 0; row < rows; ++row) results[kLogsumexp][row] = statistics[row] + statistics[rows + row];

  const auto set_common = [&](auto& backward, AttentionTensors<S>& gradients) {
    backward.of = of;
    backward.grad_output = heads_of<Input>(of, a, kOutput);
    backward.statistics = statistics.data();
    backward.grad_logsumexp = a[kLogsumexp].data();
    backward.grad_query = heads_of<Output>(of, gradients, kQuery);
    backward.grad_key = heads_of<Output>(of, gradients, kKey);
    backward.grad_value = heads_of<Output>(of, gradients, kValue);
    if (!sizes.has_mask) return;
    backward.grad_mask = gradients[kMask].data();
    backward.grad_mask_query = of.keys;
    backward.grad_mask_key = 1;
    backward.grad_mask_size = counts[kMask];
  };
  genkernels::AttentionBackward backward{};
  set_common(backward, results);
  backward.output = heads_of<Input>(of, results, kOutput);
  kernels.attention_backward(backward, runtime);
  genkernels::AttentionDoubleBackward double_backward{};
  set_common(double_backward, second);
  double_backward.grad_grad_query = heads_of<Input>(of, c, kQuery);
  double_backward.grad_grad_key = heads_of<Input>(of, c, kKey);
  double_backward.grad_grad_value = heads_of<Input>(of, c, kValue);
  double_backward.grad_grad_mask = mask_of(c);
  double_backward.grad_grad_output = heads_of<Output>(of, second, kOutput);
  double_backward.grad_grad_logsumexp = second[kLogsumexp].data();
  kernels.attention_double_backward(double_backward, runtime);

  // Second derivatives do not depend on their order: what the double backward gives is how the results change where
  // query, key, value and mask move along the cotangents.
  const double step = 1e-5;
  AttentionTensors<double> ahead = arguments, behind = arguments;
  for (int i = kQuery; i < 6; ++i)
    for (int64_t k = 0; k < counts[i]; ++k) {
      ahead[i][k] += step * cotangents[i][k];
      behind[i][k] -= step * cotangents[i][k];
    }
  const auto expected = plain_attention(of, arguments), behind_results = plain_attention(of, behind);
  auto slopes = plain_attention(of, ahead);
  double errors[3] = {};
  for (int i = 0; i < 6; ++i) {
    for (int64_t k = 0; k < counts[i]; ++k) slopes[i][k] = (slopes[i][k] - behind_results[i][k]) / (2 * step);
    double& error = errors[i < kQuery ? 0 : 1];
    error = worse(error, largest_difference({results[i].begin(), results[i].end()}, expected[i]));
    errors[2] = worse(errors[2], largest_difference({second[i].begin(), second[i].end()}, slopes[i]));
  }
  // Central differences are no more exact.
  const bool agrees = errors[0] <= tolerance && errors[1] <= tolerance && errors[2] <= std::fmax(tolerance, 1e-8);
  std::printf("%-12s attention forward %.1e backward %.1e double backward %.1e  %s\n", kernels.level, errors[0],
              errors[1], errors[2], agrees ? "ok" : "WRONG");
  return agrees;
}

// Number `word` of the four that Philox4x32-10 makes of a counter of 64 bits.
uint32_t philox(uint64_t counter, uint64_t key, int64_t word) {
  std::array<uint32_t, 4> c = {uint32_t(counter), uint32_t(counter >> 32), 0, 0};
  uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(c[0]) * 0xD2511F53u, second = uint64_t(c[2]) * 0xCD9E8D57u;
    c = {uint32_t(second >> 32) ^ c[1] ^ low, uint32_t(second), uint32_t(first >> 32) ^ c[3] ^ high, uint32_t(first)};
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return c[word];
}

template <class S>
bool check_dropout(const genkernels::Kernels& kernels, const genkernels::Runtime& runtime, genkernels::DType dtype,
                   double tolerance) {
  constexpr int64_t kSize = 1003;
  std::mt19937 random(0);
  const Values input = random_values(kSize, 1, random), residual = random_values(kSize, 1, random);
  const std::vector<S> x(input.begin(), input.end()), y(residual.begin(), residual.end());
  std::vector<S> output(kSize, S(NAN));
  const genkernels::Dropout of{uint64_t(1) << 30, 0x123456789ABCDEF, 4. / 3};
  kernels.dropout({dtype, kSize, x.data(), y.data(), output.data(), of}, runtime);
  Values expected = residual;
  for (int64_t i = 0; i < kSize; ++i)
    if (philox(i / 64 * 16 + i % 16, of.seed, i / 16 % 4) >= of.threshold) expected[i] += of.scale * input[i];
  const double error = largest_difference({output.begin(), output.end()}, expected);
  std::printf("%-12s dropout %.1e\n", kernels.level, error);
  return error <= tolerance;
}

template <class S>
bool check_all_but_recurrent(const genkernels::Kernels& kernels, const Threads& threads, int64_t cache,
                             genkernels::DType dtype, double tolerance) {
  most_ranges = threads.count;
  Memory memory;
  const genkernels::Runtime runtime{threads.count,    cache,           threads.parallel, std::this_thread::yield,
                                    Memory::allocate, Memory::release, &memory};
  bool agrees = check_linear<S>(kernels, runtime, dtype, tolerance);
  agrees &= check_loss<S>(kernels, runtime, dtype, tolerance);
  agrees &= check_dropout<S>(kernels, runtime, dtype, tolerance);
  for (const AttentionSizes& sizes : kAttentionSizes)
    agrees &= check_attention<S>(kernels, runtime, sizes, dtype, tolerance);
  return agrees;
}

// bfloat16, as which the CUDA kernels take PyTorch's.
struct Narrow {
  uint16_t bits;

  Narrow() = default;
  explicit Narrow(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    bits = uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

// One unit of a step, from what the products give.
enum { kXr, kXz, kXn, kHr, kHz, kHn, kState, kInputs };
using Unit = std::array<double, kInputs>;

std::array<double, 5> plain_gates(const Unit& of) {
  const double r = sigmoid(of[kXr] + of[kHr]), z = sigmoid(of[kXz] + of[kHz]);
  const double n = std::tanh(of[kXn] + r * of[kHn]);
  return {r, z, n, of[kHn], (1 - z) * n + z * of[kState]};
}

double plain_slope(Unit of, int input) {
  constexpr double kStep = 1e-5;
  of[input] += kStep;
  const double above = plain_gates(of)[4];
  of[input] -= 2 * kStep;
  return (above - plain_gates(of)[4]) / (2 * kStep);
}

template <class S>
double largest_error(const std::vector<S>& actual, const Values& expected) {
  return largest_difference(Values(actual.begin(), actual.end()), expected);
}

// A step of the CUDA kernels, kWidth units at once, on seven threads.
template <class S, int kWidth>
bool check_gates(int64_t units, const char* name, double tolerance) {
  constexpr int64_t kRows = 5, kDevice = 7;
  std::mt19937 random(3);
  const auto draw = [&](int64_t columns) {
    std::vector<S> values;
    for (const double value : random_values(kRows * columns, 1, random)) values.push_back(S(value));
    return values;
  };
  const std::vector<S> x = draw(3 * units), from_h = draw(3 * units), h = draw(units), grad = draw(units);
  std::vector<S> saved(4 * h.size()), output(h.size(), S(NAN)), grad_h = output, gates(4 * h.size(), S(NAN));
  std::vector<S> deltas = gates;
  Values next(h.size()), parts(gates.size()), slopes(gates.size()), passed(h.size());
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t u = 0; u < units; ++u) {
      const auto at = [&](int64_t blocks, int64_t block) { return (row * blocks + block) * units + u; };
      const Unit unit = {x[at(3, 0)],      x[at(3, 1)],      x[at(3, 2)], from_h[at(3, 0)],
                         from_h[at(3, 1)], from_h[at(3, 2)], h[at(1, 0)]};
      const auto each = plain_gates(unit);
      const double of = grad[at(1, 0)];
      const int inputs[] = {kXn, kXr, kXz, kHn};
      for (int64_t gate = 0; gate < 4; ++gate) {
        parts[at(4, gate)] = each[gate];
        saved[at(4, gate)] = S(each[gate]);
        slopes[at(4, gate)] = of * plain_slope(unit, inputs[gate]);
      }
      next[at(1, 0)] = each[4];
      passed[at(1, 0)] = of * plain_slope(unit, kState);
    }
  using namespace genkernels::cuda;
  const GatesForward<S> forward{kRows, units, x.data(), from_h.data(), h.data(), output.data(), gates.data()};
  const GatesBackward<S> backward{kRows, units, grad.data(), saved.data(), h.data(), deltas.data(), grad_h.data()};
  // Wide only where rows are multiples of it, and begin at such.
  GatesForward<S> shifted = forward, ragged = forward, unsaved = forward;
  GatesBackward<S> shifted_back = backward, ragged_back = backward;
  ++shifted.hx, ++shifted_back.hx, ++ragged.H, ++ragged_back.H;
  bool agrees = forward.takes(kWidth) && backward.takes(kWidth);
  for (const bool takes :
       {shifted.takes(kWidth), shifted_back.takes(kWidth), ragged.takes(kWidth), ragged_back.takes(kWidth)})
    agrees &= takes == (kWidth == 1);
  unsaved.gates = nullptr;  // which is not written to
  compute_share<kWidth>(unsaved, 0, 1);
  std::fill(output.begin(), output.end(), S(NAN));
  for (int64_t thread = 0; thread < kDevice; ++thread) {
    compute_share<kWidth>(forward, thread, kDevice);
    compute_share<kWidth>(backward, thread, kDevice);
  }
  const double errors[] = {largest_error(output, next), largest_error(gates, parts), largest_error(deltas, slopes),
                           largest_error(grad_h, passed)};
  for (const double error : errors) agrees &= error <= tolerance;
  // Saturated gates are exact, and NaN passes through.
  const auto ends = gates_of<float>(-200, 200, 200, 0, 0, 0), nan = gates_of<float>(NAN, 0, 0, 0, NAN, 0);
  agrees &= ends.r == 0 && ends.z == 1 && ends.n == 1 && std::isnan(nan.r) && std::isnan(nan.z) && std::isnan(nan.n);
  std::printf("%-12s %s %d at once: output %.1e gates %.1e deltas %.1e state %.1e  %s\n", "gates", name, kWidth,
              errors[0], errors[1], errors[2], errors[3], agrees ? "ok" : "WRONG");
  return agrees;
}

template <class S>
bool check_gates(const char* name, double tolerance) {
  return check_gates<S, 1>(21, name, tolerance) & check_gates<S, 16 / sizeof(S)>(24, name, tolerance);
}

}  // namespace

int main(int argc, char** argv) {
  bool found = false, agrees = check_gates<float>("float32", 1e-5);
  agrees &= check_gates<double>("float64", 1e-9);
  agrees &= check_gates<Narrow>("bfloat16", 0.05);
  for (const genkernels::Kernels* const* level = genkernels::supported_levels(); *level != nullptr; ++level) {
    if (argc > 1 && std::strcmp(argv[1], (*level)->level) != 0) continue;
    found = true;
    for (const Threads& threads : kThreads)
      for (const int64_t cache : {kTiny, kUsual}) {
        agrees &= check_all_but_recurrent<float>(**level, threads, cache, genkernels::DType::float32, 1e-5);
        agrees &= check_all_but_recurrent<double>(**level, threads, cache, genkernels::DType::float64, 1e-12);
      }
    for (const int64_t gates : {3, 1})
      for (const Sizes& each : kSizes) {
        T = each.T, B = each.B, I = each.I, H = each.H, G = gates;
        for (const Threads& threads : kThreads)
          for (const int64_t cache : {kTiny, kUsual}) {
            agrees &= check<float>(**level, threads, cache, genkernels::DType::float32, "float32", 1e-5);
            agrees &= check<double>(**level, threads, cache, genkernels::DType::float64, "float64", 1e-7);
          }
      }
  }
  if (!found) std::fprintf(stderr, "this CPU or this build has no level %s\n", argv[1]);
  return found && agrees ? 0 : 1;
}
