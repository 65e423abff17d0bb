// Sigmoid and tanh on vectors, each to 2.1 units in the last place (results below 2^-126 aside, which may become 0).
// Saturated values are exactly 0, 1 and -1, and NaN passes through, as in PyTorch.
#pragma once

#include "simd.h"

namespace genkernels::GENKERNELS_LEVEL {

// The AVX-512 forms take one instruction where the general ones take two to four. `limit` comes first because the
// instruction returns its second operand if one of them is NaN. All lanes are named because GCC 12 warns of an
// uninitialised value inside the forms without a mask; the instruction is the same.
#if defined(__AVX512F__)
constexpr __mmask16 kAllLanes = 0xffff;
GENKERNELS_INLINE Vector<float> at_most(float limit, Vector<float> x) {
  return (Vector<float>)_mm512_maskz_min_ps(kAllLanes, _mm512_set1_ps(limit), (__m512)x);
}
GENKERNELS_INLINE Vector<float> at_least(float limit, Vector<float> x) {
  return (Vector<float>)_mm512_maskz_max_ps(kAllLanes, _mm512_set1_ps(limit), (__m512)x);
}
GENKERNELS_INLINE Vector<float> nearest_integer(Vector<float> x) {
  return (Vector<float>)_mm512_maskz_roundscale_ps(kAllLanes, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
// x 2^n for an integer n.
GENKERNELS_INLINE Vector<float> scale(Vector<float> x, Vector<float> n) {
  return (Vector<float>)_mm512_maskz_scalef_ps(kAllLanes, (__m512)x, (__m512)n);
}
// With a relative error of 2^-14.
GENKERNELS_INLINE Vector<float> inverse(Vector<float> x) {
  return (Vector<float>)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)x);
}
#else
GENKERNELS_INLINE Vector<float> at_most(float limit, Vector<float> x) { return x > limit ? broadcast(limit) : x; }
GENKERNELS_INLINE Vector<float> at_least(float limit, Vector<float> x) { return x < limit ? broadcast(limit) : x; }
// Adding and taking away 1.5 * 2^23 rounds to an integer in the current (nearest) mode.
GENKERNELS_INLINE Vector<float> nearest_integer(Vector<float> x) { return (x + 12582912.0f) - 12582912.0f; }
GENKERNELS_INLINE Vector<float> scale(Vector<float> x, Vector<float> n) {
  const Vector<float> power = (Vector<float>)((__builtin_convertvector(n, Vector<int32_t>) + 127) << 23);
  return n < -126.0f ? Vector<float>{} : x * power;
}
GENKERNELS_INLINE Vector<float> inverse(Vector<float> x) { return 1.0f / x; }
#endif

// e^x = 2^n (1 + p), for |x| < 128. x = n ln 2 + r with ln 2 in two parts, so that r keeps all its bits (Cody and Waite
// 1980); p is the minimax polynomial of e^r - 1 on |r| <= ln 2 / 2 (Remez' algorithm), which keeps its
// own digits near zero.
struct Exponential {
  Vector<float> n, p;

  GENKERNELS_INLINE explicit Exponential(Vector<float> x) : n(nearest_integer(x * 1.44269504f)) {
    const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector<float> q = r * 1.38888735e-3f + 8.36906792e-3f;
    q = q * r + 4.16671336e-2f;
    q = q * r + 1.66665062e-1f;
    q = q * r + 4.99999981e-1f;
    q = q * r;
    p = q * r + r;
  }
};

// a / (a + c). One step of Newton's method squares the error of the inverse (it takes half the time of a division), and
// its residual is formed from a and c themselves: near 1 what counts is the distance from 1, and gradients see it.
GENKERNELS_INLINE Vector<float> fraction(Vector<float> a, float c) {
  const Vector<float> inverted = inverse(a + c);
  const Vector<float> q = a * inverted;
  const Vector<float> residual = (a - q * a) - q * c;
  return residual * inverted + q;
}

// e^x / (e^x + 1). Beyond the limits it is 0 or 1 in float32.
GENKERNELS_INLINE Vector<float> sigmoid(Vector<float> x) {
  const Exponential e(at_least(-104.0f, at_most(30.0f, x)));
  return fraction(scale(e.p + 1.0f, e.n), 1.0f);
}

// (e^2|x| - 1) / (e^2|x| + 1) with the sign of x. e^2|x| - 1 is taken as 2^n p + (2^n - 1): near zero n is 0, and
// nothing cancels.
GENKERNELS_INLINE Vector<float> tanh(Vector<float> x) {
  const Vector<uint32_t> sign = (Vector<uint32_t>)x & 0x80000000u;
  const Vector<float> magnitude = (Vector<float>)((Vector<uint32_t>)x ^ sign);
  const Exponential e(at_most(20.0f, magnitude + magnitude));
  const Vector<float> power = scale(broadcast(1.0f), e.n);
  const Vector<float> y = fraction(power * e.p + (power - 1.0f), 2.0f);
  return (Vector<float>)((Vector<uint32_t>)y | sign);
}

// float64 is for gradcheck and for references: the C library's functions, lane by lane.
GENKERNELS_INLINE Vector<double> sigmoid(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = 1.0 / (1.0 + __builtin_exp(-x[i]));
  return x;
}

GENKERNELS_INLINE Vector<double> tanh(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

}  // namespace genkernels::GENKERNELS_LEVEL
