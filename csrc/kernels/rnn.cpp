#include "rnn.h"

#include "recurrent_layer.h"

GENKERNELS_DECLARE_RNN(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// A block is three registers of units: with one, a tile would read each element of a row for a single product.
template <class Element>
struct RnnCell {
  using T = Element;
  using A = Accumulator<T>;
  static constexpr int kGates = 1, kSaved = 0, kColumns = 1, kStateColumn = 0, kBiases = kBlockVectors;
  static constexpr bool kSplitsLast = false, kPassesBy = false;

  template <class OfInput, class OfState>
  static GENKERNELS_INLINE Vector<A> sum(int v, const OfInput& of_input, const OfState& of_state) {
    return of_input(v) + of_state(v);
  }

  static void pack_biases(const Recurrent& layer, A* biases) {
    const T* bias_ih = static_cast<const T*>(layer.bias_ih);
    const T* bias_hh = static_cast<const T*>(layer.bias_hh);
    for (int64_t first = 0; first < layer.hidden_size; first += kLanes<A>) {
      const int count = int(smaller(kLanes<A>, layer.hidden_size - first));
      store(biases + first, bias_ih ? load(bias_ih + first, count) + load(bias_hh + first, count) : Vector<A>{});
    }
  }

  template <int kRows, class Sums, class State>
  static GENKERNELS_INLINE void finish(const Block<T>& block, int64_t H, const Sums& sum, const State&, T* output, T*) {
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t unit = block.first + v * kLanes<A>;
      if (unit >= H) return;  // the last block may have less
      const int count = int(smaller(kLanes<A>, H - unit));
      const Vector<A> bias = load(block.bias + v * kLanes<A>);
      const auto next = tanh(several<kRows>([&](int i) GENKERNELS_LAMBDA { return sum(i, v) + bias; }));
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) store(output + i * H + unit, next[i], count);
    }
  }

  template <class D>
  static GENKERNELS_INLINE Vector<A> delta(Vector<A> dh, int64_t, int64_t u, int count, const T*, const T*,
                                           const T* output, D* to) {
    const Vector<A> h = load(output + u, count);
    store(to + u, dh * (A(1) - h * h), count);
    return Vector<A>{};
  }
};

}  // namespace

void rnn_forward(const Recurrent* rnn, int64_t directions, const Runtime& runtime) {
  run_forward<RnnCell>(rnn, directions, runtime);
}

void rnn_backward(const Recurrent* rnn, const RecurrentGradients* grad, int64_t directions, const Runtime& runtime) {
  run_backward<RnnCell>(rnn, grad, directions, runtime);
}

}  // namespace genkernels::GENKERNELS_LEVEL
