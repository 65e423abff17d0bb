// What follows the products in a step of the GRU, and its gradient: of one unit, and a thread's share of a step.
// Formulas: genkernels/reference/gru.py. gru_cell.cu compiles it for GPUs; the tests run it on the CPU, too.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define GENKERNELS_HOST_DEVICE __host__ __device__ inline
#else
#define GENKERNELS_HOST_DEVICE inline
#endif

namespace genkernels::cuda {

template <class A>
struct Gates {
  A r, z, n, q;  // q: W_hn h + b_hn
};

// Of n, r and z before their functions, of q, and of h beside what the product with W_h adds to it.
template <class A>
struct GateGradients {
  A n, r, z, q, h;
};

// exp and tanh are the C library's and CUDA's full ones, to 2 units in the last place. Their approximations are far
// from that and would save nothing: the kernels wait for memory.
template <class A>
GENKERNELS_HOST_DEVICE A sigmoid(A x) {
  return A(1) / (A(1) + std::exp(-x));
}

// x: W_i x + b_i, h: W_h h + b_h.
template <class A>
GENKERNELS_HOST_DEVICE Gates<A> gates_of(A x_r, A x_z, A x_n, A h_r, A h_z, A h_n) {
  const A r = sigmoid(x_r + h_r);
  return {r, sigmoid(x_z + h_z), std::tanh(x_n + r * h_n), h_n};
}

template <class A>
GENKERNELS_HOST_DEVICE A next_state(const Gates<A>& of, A h) {
  return (h - of.n) * of.z + of.n;
}

template <class A>
GENKERNELS_HOST_DEVICE GateGradients<A> gradients_of(const Gates<A>& of, A h, A grad) {
  const A one = 1, n = grad * (one - of.z) * (one - of.n * of.n);
  return {n, n * of.q * of.r * (one - of.r), grad * (h - of.n) * of.z * (one - of.z), n * of.r, grad * of.z};
}

// kWidth neighbours, which one instruction reads or writes. Numbers of 16 bits are computed with in float32.
template <int kWidth, class S>
struct Several {
  using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
  struct alignas(kWidth * sizeof(S)) Stored {
    S at[kWidth];
  };
  A at[kWidth];

  GENKERNELS_HOST_DEVICE void load(const S* from) {
    const Stored stored = *reinterpret_cast<const Stored*>(from);
    for (int i = 0; i < kWidth; ++i) at[i] = A(stored.at[i]);
  }
  GENKERNELS_HOST_DEVICE void store(S* to) const {
    Stored stored;
    for (int i = 0; i < kWidth; ++i) stored.at[i] = S(at[i]);
#if defined(__CUDA_ARCH__)
    // As an assignment, numbers of which others are computed become four instructions.
    if constexpr (sizeof(Stored) == sizeof(uint4))
      return __stwb(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&stored));
#endif
    *reinterpret_cast<Stored*>(to) = stored;
  }
};

// Several of each of kCount blocks of a row, which lie H units apart.
template <int kCount, int kWidth, class S>
struct Blocks {
  Several<kWidth, S> of[kCount];

  GENKERNELS_HOST_DEVICE Blocks() {}
  GENKERNELS_HOST_DEVICE Blocks(const S* from, int64_t H) {
    for (int i = 0; i < kCount; ++i) of[i].load(from + i * H);
  }
  GENKERNELS_HOST_DEVICE void store(S* to, int64_t H) const {
    for (int i = 0; i < kCount; ++i) of[i].store(to + i * H);
  }
};

template <class... Pointers>
bool are_aligned(size_t bytes, Pointers... at) {
  return ((reinterpret_cast<uintptr_t>(at) % bytes == 0) && ...);
}

template <class S>
struct GatesForward {
  int64_t B, H;
  const S* projected;  // [B, 3H]: W_i x + b_i
  const S* recurrent;  // [B, 3H]: W_h h + b_h
  const S* hx;         // [B, H]
  S* output;           // [B, H]
  S* gates;            // [B, 4H]: r, z, n, q; or null

  bool takes(int width) const {
    return H % width == 0 && are_aligned(width * sizeof(S), projected, recurrent, hx, output, gates);
  }
  // kWidth units of a row, from `unit` on.
  template <int kWidth>
  GENKERNELS_HOST_DEVICE void compute(int64_t row, int64_t unit) const {
    const Blocks<3, kWidth, S> x(projected + row * 3 * H + unit, H), from_h(recurrent + row * 3 * H + unit, H);
    const Blocks<1, kWidth, S> h(hx + row * H + unit, H);
    Blocks<1, kWidth, S> next;
    Blocks<4, kWidth, S> saved;
    for (int i = 0; i < kWidth; ++i) {
      const auto each = gates_of(x.of[0].at[i], x.of[1].at[i], x.of[2].at[i], from_h.of[0].at[i], from_h.of[1].at[i],
                                 from_h.of[2].at[i]);
      next.of[0].at[i] = next_state(each, h.of[0].at[i]);
      saved.of[0].at[i] = each.r, saved.of[1].at[i] = each.z, saved.of[2].at[i] = each.n, saved.of[3].at[i] = each.q;
    }
    next.store(output + row * H + unit, H);
    if (gates != nullptr) saved.store(gates + row * 4 * H + unit, H);
  }
};

template <class S>
struct GatesBackward {
  int64_t B, H;
  const S* grad_output;  // [B, H]
  const S* gates;        // [B, 4H]
  const S* hx;           // [B, H]
  S* deltas;             // [B, 4H]: the gradients of n, r, z, q
  S* grad_hx;            // [B, H]

  bool takes(int width) const {
    return H % width == 0 && are_aligned(width * sizeof(S), grad_output, gates, hx, deltas, grad_hx);
  }
  template <int kWidth>
  GENKERNELS_HOST_DEVICE void compute(int64_t row, int64_t unit) const {
    const Blocks<4, kWidth, S> saved(gates + row * 4 * H + unit, H);
    const Blocks<1, kWidth, S> h(hx + row * H + unit, H), grad(grad_output + row * H + unit, H);
    Blocks<4, kWidth, S> delta;
    Blocks<1, kWidth, S> passed;
    for (int i = 0; i < kWidth; ++i) {
      const Gates of{saved.of[0].at[i], saved.of[1].at[i], saved.of[2].at[i], saved.of[3].at[i]};
      const auto each = gradients_of(of, h.of[0].at[i], grad.of[0].at[i]);
      delta.of[0].at[i] = each.n, delta.of[1].at[i] = each.r, delta.of[2].at[i] = each.z, delta.of[3].at[i] = each.q;
      passed.of[0].at[i] = each.h;
    }
    delta.store(deltas + row * 4 * H + unit, H);
    passed.store(grad_hx + row * H + unit, H);
  }
};

// What thread `thread` of `threads` does of a step.
template <int kWidth, class Step>
GENKERNELS_HOST_DEVICE void compute_share(const Step& step, int64_t thread, int64_t threads) {
  const int64_t groups = step.H / kWidth;  // of a row
  for (int64_t i = thread; i < step.B * groups; i += threads)
    step.template compute<kWidth>(i / groups, i % groups * kWidth);
}

// What gru_cell.cu was compiled for, as 900 for sm_90; 0 ends it.
extern const int kArchitectures[];

}  // namespace genkernels::cuda
