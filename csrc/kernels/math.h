// Sigmoid and tanh on vectors, to about two units in the last place. NaN passes through.
#pragma once

#include "simd.h"

namespace genkernels::GENKERNELS_LEVEL {

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, with ln 2 in two parts (Cody and Waite) so that r keeps
// all its bits. The polynomial is the degree-6 one of Cephes' expf (S. Moshier). Below -87.3 the result stays at
// 2^-126: callers add 1 to it. Above 88.72 it is infinity, so that a saturated gate is exactly 0 or 1, as in PyTorch.
GENKERNELS_INLINE Vector<float> exp(Vector<float> x) {
  const float overflow = 88.72283f, underflow = -87.33654f;
  Vector<float> clamped = x > overflow ? broadcast(overflow) : x;
  clamped = clamped < underflow ? broadcast(underflow) : clamped;
  // Adding and taking away 1.5 * 2^23 rounds to an integer in the current (nearest) mode.
  const Vector<float> n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
  const Vector<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // n reaches 128 just below the overflow, one more than an exponent holds: scale in two halves.
  const Vector<int32_t> whole = __builtin_convertvector(n, Vector<int32_t>);
  const Vector<int32_t> half = whole >> 1;
  const Vector<float> scale = (Vector<float>)((half + 127) << 23);
  const Vector<float> rest = (Vector<float>)((whole - half + 127) << 23);
  return x > overflow ? broadcast(__builtin_inff()) : p * scale * rest;
}

GENKERNELS_INLINE Vector<float> sigmoid(Vector<float> x) { return 1.0f / (1.0f + exp(-x)); }

// Near zero 1 - 2 / (exp(2x) + 1) loses all digits; there the odd polynomial of Cephes' tanhf serves.
GENKERNELS_INLINE Vector<float> tanh(Vector<float> x) {
  const Vector<uint32_t> sign = (Vector<uint32_t>)x & 0x80000000u;
  const Vector<float> magnitude = (Vector<float>)((Vector<uint32_t>)x ^ sign);
  const Vector<float> square = x * x;
  Vector<float> p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vector<float> near = (p * square) * x + x;
  const Vector<float> far = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
  const Vector<float> signed_far = (Vector<float>)((Vector<uint32_t>)far | sign);
  return magnitude < 0.625f ? near : signed_far;
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
