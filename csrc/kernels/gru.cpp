#include "gru.h"

#include "recurrent_layer.h"

GENKERNELS_DECLARE_GRU(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// A block is the gates r, z, n of one register of units. A row of gradients is [n | r | z | hn]: [n r z] goes with the
// input, [r z hn] with the state.
template <class Element>
struct GruCell {
  using T = Element;
  using A = Accumulator<T>;
  static constexpr int kGates = 3, kSaved = 4, kColumns = 4, kStateColumn = 1, kBiases = 4;
  static constexpr bool kSplitsLast = true, kPassesBy = true;

  // r and z (0 and 1), and of n the input's part and the state's (2 and 3).
  template <class OfInput, class OfState>
  static GENKERNELS_INLINE Vector<A> sum(int v, const OfInput& of_input, const OfState& of_state) {
    return v < 2 ? of_input(v) + of_state(v) : v == 2 ? of_input(2) : of_state(2);
  }

  // b_ir + b_hr, b_iz + b_hz, b_in, b_hn
  static void pack_biases(const Recurrent& layer, A* biases) {
    constexpr int kUnits = kLanes<A>;
    const int64_t H = layer.hidden_size;
    const T* bias_ih = static_cast<const T*>(layer.bias_ih);
    const T* bias_hh = static_cast<const T*>(layer.bias_hh);
    for (int64_t first = 0; first < H; first += kUnits) {
      const int count = int(smaller(kUnits, H - first));
      const auto value = [&](const T* bias, int gate) {
        return bias ? load(bias + gate * H + first, count) : Vector<A>{};
      };
      A* to = biases + first * 4;
      store(to, value(bias_ih, 0) + value(bias_hh, 0));
      store(to + kUnits, value(bias_ih, 1) + value(bias_hh, 1));
      store(to + 2 * kUnits, value(bias_ih, 2));
      store(to + 3 * kUnits, value(bias_hh, 2));
    }
  }

  template <int kRows, class Sums, class State>
  static GENKERNELS_INLINE void finish(const Block<T>& block, int64_t H, const Sums& sum, const State& state, T* output,
                                       T* gates) {
    constexpr int kUnits = kLanes<A>;
    const int count = int(smaller(kUnits, H - block.first));
    const auto gate = [&](int g) GENKERNELS_LAMBDA {
      const Vector<A> bias = load(block.bias + g * kUnits);
      return several<kRows>([&](int i) GENKERNELS_LAMBDA { return sum(i, g) + bias; });
    };
    const auto r = sigmoid(gate(0));
    const auto z = sigmoid(gate(1));
    const auto hn = gate(3);
    const auto n = tanh(gate(2) + r * hn);
    const auto h = several<kRows>([&](int i) GENKERNELS_LAMBDA { return load(state(i) + block.first, count); });
    const auto next = n + z * (h - n);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      if (output != nullptr) store(output + i * H + block.first, next[i], count);
      if (gates == nullptr) continue;
      T* to = gates + i * 4 * H + block.first;
      if (block.streams_gates) {
        stream(to, r[i]);
        stream(to + H, z[i]);
        stream(to + 2 * H, n[i]);
        stream(to + 3 * H, hn[i]);
        continue;
      }
      store(to, r[i], count);
      store(to + H, z[i], count);
      store(to + 2 * H, n[i], count);
      store(to + 3 * H, hn[i], count);
    }
  }

  template <class D>
  static GENKERNELS_INLINE Vector<A> delta(Vector<A> dh, int64_t H, int64_t u, int count, const T* saved,
                                           const T* state, const T*, D* to) {
    const Vector<A> r = load(saved + u, count), z = load(saved + H + u, count);
    const Vector<A> n = load(saved + 2 * H + u, count), hn = load(saved + 3 * H + u, count);
    const Vector<A> h = state ? load(state + u, count) : Vector<A>{};
    const Vector<A> dn = dh * (A(1) - z) * (A(1) - n * n);
    const Vector<A> dz = dh * (h - n) * z * (A(1) - z);
    const Vector<A> dr = dn * hn * r * (A(1) - r);
    store(to + u, dn, count);
    store(to + H + u, dr, count);
    store(to + 2 * H + u, dz, count);
    store(to + 3 * H + u, dn * r, count);
    return dh * z;
  }
};

}  // namespace

int64_t gru_packed_size(const Recurrent& gru) {
  switch (gru.dtype) {
    case DType::float32: return GateWeights<GruCell<float>>(gru, true).bytes();
    case DType::float64: return GateWeights<GruCell<double>>(gru, true).bytes();
    case DType::bfloat16: return GateWeights<GruCell<bfloat16>>(gru, true).bytes();
    case DType::float16: break;  // attention and dropout alone have it
  }
  return 0;
}

void gru_pack(const Recurrent& gru, void* packed, const Runtime& runtime) {
  switch (gru.dtype) {
    case DType::float32: return GateWeights<GruCell<float>>(gru, true).pack_at(packed, runtime);
    case DType::float64: return GateWeights<GruCell<double>>(gru, true).pack_at(packed, runtime);
    case DType::bfloat16: return GateWeights<GruCell<bfloat16>>(gru, true).pack_at(packed, runtime);
    case DType::float16: break;  // attention and dropout alone have it
  }
}

void gru_forward(const Recurrent* gru, int64_t directions, const Runtime& runtime) {
  run_forward<GruCell>(gru, directions, runtime);
}

void gru_backward(const Recurrent* gru, const RecurrentGradients* grad, int64_t directions, const Runtime& runtime) {
  run_backward<GruCell>(gru, grad, directions, runtime);
}

}  // namespace genkernels::GENKERNELS_LEVEL
