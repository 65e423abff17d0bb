// Sigmoid, tanh, e^x and 2^x on vectors, each to 2.1 units in the last place (results below 2^-126 aside, which may
// become 0), and what the normal distribution is made of, to 5. Saturated values are exactly 0, 1 and -1, and NaN
// passes through, as in PyTorch.
#pragma once

#include "simd.h"

namespace genkernels::GENKERNELS_LEVEL {

constexpr double kLog2 = 0.69314718055994530942;  // ln 2

// The forms of AVX-512 and AVX2 take one instruction where the general ones take two to four. `limit` comes first
// because the instruction returns its second operand if one of them is NaN. All lanes are named because GCC 12 warns of
// an uninitialised value inside AVX-512's forms without a mask; the instruction is the same.
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
// x - floor(x), 0 for infinities.
GENKERNELS_INLINE Vector<float> fraction_of(Vector<float> x) {
  return (Vector<float>)_mm512_maskz_reduce_ps(kAllLanes, (__m512)x, _MM_FROUND_TO_NEG_INF);
}
// p 2^floor(x).
GENKERNELS_INLINE Vector<float> scale_by_floor(Vector<float> p, Vector<float> x) { return scale(p, x); }
// With a relative error of 2^-14.
GENKERNELS_INLINE Vector<float> inverse(Vector<float> x) {
  return (Vector<float>)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)x);
}
#else
#if defined(__AVX2__)
GENKERNELS_INLINE Vector<float> at_most(float limit, Vector<float> x) {
  return (Vector<float>)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)x);
}
GENKERNELS_INLINE Vector<float> at_least(float limit, Vector<float> x) {
  return (Vector<float>)_mm256_max_ps(_mm256_set1_ps(limit), (__m256)x);
}
GENKERNELS_INLINE Vector<float> nearest_integer(Vector<float> x) {
  return (Vector<float>)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
GENKERNELS_INLINE Vector<float> at_most(float limit, Vector<float> x) { return x > limit ? broadcast(limit) : x; }
GENKERNELS_INLINE Vector<float> at_least(float limit, Vector<float> x) { return x < limit ? broadcast(limit) : x; }
// Adding and taking away 1.5 * 2^23 rounds to an integer in the current (nearest) mode.
GENKERNELS_INLINE Vector<float> nearest_integer(Vector<float> x) { return (x + 12582912.0f) - 12582912.0f; }
#endif
GENKERNELS_INLINE Vector<float> scale(Vector<float> x, Vector<float> n) {
  const Vector<float> power = (Vector<float>)((__builtin_convertvector(n, Vector<int32_t>) + 127) << 23);
  return n < -126.0f ? Vector<float>{} : x * power;
}
GENKERNELS_INLINE Vector<float> inverse(Vector<float> x) { return 1.0f / x; }
#endif

GENKERNELS_INLINE Vector<float> magnitude(Vector<float> x) {
  return (Vector<float>)((Vector<uint32_t>)x & 0x7fffffffu);
}
GENKERNELS_INLINE Vector<float> with_sign(Vector<float> x, Vector<float> sign) {
  return (Vector<float>)((Vector<uint32_t>)x | ((Vector<uint32_t>)sign & 0x80000000u));
}

// All of these for several registers in turns.
template <int kCount>
using Floats = Several<Vector<float>, kCount>;

template <int kCount>
GENKERNELS_INLINE Floats<kCount> at_most(float limit, const Floats<kCount>& x) {
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return at_most(limit, x[i]); });
}
template <int kCount>
GENKERNELS_INLINE Floats<kCount> at_least(float limit, const Floats<kCount>& x) {
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return at_least(limit, x[i]); });
}
template <int kCount>
GENKERNELS_INLINE Floats<kCount> nearest_integer(const Floats<kCount>& x) {
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return nearest_integer(x[i]); });
}
template <int kCount>
GENKERNELS_INLINE Floats<kCount> scale(const Floats<kCount>& x, const Floats<kCount>& n) {
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return scale(x[i], n[i]); });
}
template <int kCount>
GENKERNELS_INLINE Floats<kCount> inverse(const Floats<kCount>& x) {
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return inverse(x[i]); });
}
template <int kCount>
GENKERNELS_INLINE Floats<kCount> magnitude(const Floats<kCount>& x) {
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return magnitude(x[i]); });
}
template <int kCount>
GENKERNELS_INLINE Floats<kCount> with_sign(const Floats<kCount>& x, const Floats<kCount>& sign) {
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return with_sign(x[i], sign[i]); });
}

// e^x = 2^n (1 + p), for |x| < 128. x = n ln 2 + r with ln 2 in two parts, so that r keeps all its bits (Cody and Waite
// 1980); p = r + r^2 q is the minimax polynomial of e^r - 1 on |r| <= ln 2 / 2 (Remez' algorithm), which keeps its
// own digits near zero.
template <int kCount>
struct Exponential {
  Floats<kCount> n, r, q;

  GENKERNELS_INLINE explicit Exponential(const Floats<kCount>& x) : n(nearest_integer(x * 1.44269504f)) {
    r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    q = r * 1.38888735e-3f + 8.36906792e-3f;
    q = q * r + 4.16671336e-2f;
    q = q * r + 1.66665062e-1f;
    q = q * r + 4.99999981e-1f;
  }
  GENKERNELS_INLINE Floats<kCount> p() const { return q * r * r + r; }
  GENKERNELS_INLINE Floats<kCount> power() const { return scale((q * r + 1.0f) * r + 1.0f, n); }
};

// e^x for x <= 0, 0 where float32 has nothing smaller.
template <int kCount>
GENKERNELS_INLINE Floats<kCount> exponential(const Floats<kCount>& x) {
  return Exponential<kCount>(at_least(-104.0f, x)).power();
}

#if defined(__AVX512F__)
// 2^x for x < 127, 0 where float32 has nothing smaller. The power of x - floor(x) is the polynomial of least relative
// error, 2.0e-9, among those that are 1 at 0 (Lawson's algorithm). Two thirds of the operations of e^x.
template <int kCount>
GENKERNELS_INLINE Floats<kCount> power_of_two(const Floats<kCount>& x) {
  const Floats<kCount> r = several<kCount>([&](int i) GENKERNELS_LAMBDA { return fraction_of(x[i]); });
  Floats<kCount> p = r * 2.16129163e-4f + 1.24678458e-3f;
  p = p * r + 9.67545155e-3f;
  p = p * r + 5.54852821e-2f;
  p = p * r + 2.40229309e-1f;
  p = p * r + 6.93147063e-1f;
  p = p * r + 1.0f;
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return scale_by_floor(p[i], x[i]); });
}
#else
// 2^x for x < 127, where what float32 has below 2^-126 is 0, too. Of x less the nearest integer: adding 1.5 * 2^23
// rounds to one, and with the exponent's bias it is added as the bits that make up its power of two, which are 0 for
// -127. With instructions for floor(x) and for the scale, which take several operations each, this took twice the time.
template <int kCount>
GENKERNELS_INLINE Floats<kCount> power_of_two(const Floats<kCount>& x) {
  constexpr float kRounds = 12582912.0f + 127.0f;
  const Floats<kCount> finite = at_least(-127.0f, x), rounded = finite + kRounds;
  const Floats<kCount> r = finite - (rounded - kRounds);
  Floats<kCount> p = r * 1.53298402e-4f + 1.33909762e-3f;
  p = p * r + 9.61849838e-3f;
  p = p * r + 5.55035956e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return several<kCount>([&](int i)
                             GENKERNELS_LAMBDA { return p[i] * (Vector<float>)((Vector<uint32_t>)rounded[i] << 23); });
}
#endif

// a / (a + c). One step of Newton's method squares the error of the inverse (it takes half the time of a division), and
// its residual is formed from a and c themselves: near 1 what counts is the distance from 1, and gradients see it.
template <int kCount>
GENKERNELS_INLINE Floats<kCount> fraction(const Floats<kCount>& a, float c) {
  const Floats<kCount> inverted = inverse(a + c);
  const Floats<kCount> q = a * inverted;
  const Floats<kCount> residual = (a - q * a) - q * c;
  return residual * inverted + q;
}

// e^x / (e^x + 1). Beyond the limits it is 0 or 1 in float32.
template <int kCount>
GENKERNELS_INLINE Floats<kCount> sigmoid(const Floats<kCount>& x) {
  const Exponential<kCount> e(at_least(-104.0f, at_most(30.0f, x)));
  return fraction(e.power(), 1.0f);
}

// (e^2|x| - 1) / (e^2|x| + 1) with the sign of x. e^2|x| - 1 is taken as 2^n p + (2^n - 1): near zero n is 0, and
// nothing cancels.
template <int kCount>
GENKERNELS_INLINE Floats<kCount> tanh(const Floats<kCount>& x) {
  const Floats<kCount> absolute = magnitude(x);
  const Exponential<kCount> e(at_most(20.0f, absolute + absolute));
  const Floats<kCount> power = several<kCount>([&](int i) GENKERNELS_LAMBDA { return scale(broadcast(1.0f), e.n[i]); });
  return with_sign(fraction(power * e.p() + (power - 1.0f), 2.0f), x);
}

// What the normal distribution is made of: e^(-x^2/2), and the integral of its density up to x.
template <class V, int kCount>
struct Normal {
  Several<V, kCount> power, integral;
};

// The integral beyond |x| is e^(-x^2/2) t P(t) with t = 1 / (1 + 0.35 |x|) (the form of Abramowitz and Stegun 1964,
// 7.1.26); P is the polynomial of least relative error, 3.2e-8, for |x| <= 15 (Lawson's algorithm).
template <int kCount>
GENKERNELS_INLINE Normal<Vector<float>, kCount> normal(const Floats<kCount>& x) {
  const Floats<kCount> absolute = at_most(16.0f, magnitude(x));
  const Floats<kCount> power = exponential(absolute * absolute * -0.5f);
  const Floats<kCount> divisor = absolute * 0.35f + 1.0f;
  const Floats<kCount> estimate = inverse(divisor);
  const Floats<kCount> error =
      several<kCount>([&](int i) GENKERNELS_LAMBDA { return 1.0f - divisor[i] * estimate[i]; });
  const Floats<kCount> t = estimate * error + estimate;
  Floats<kCount> p = t * -0.0291638006f + 0.144060209f;
  p = p * t + -0.255900676f;
  p = p * t + 0.159391606f;
  p = p * t + -0.0232629777f;
  p = p * t + 0.105574459f;
  p = p * t + 0.119815579f;
  p = p * t + 0.139864326f;
  p = p * t + 0.139621259f;
  const Floats<kCount> beyond = p * t * power;
  return {power, several<kCount>([&](int i) GENKERNELS_LAMBDA { return x[i] < 0.0f ? beyond[i] : 1.0f - beyond[i]; })};
}

// ln x for finite x > 0 (NaN beyond), as exactly as A's sums need it: to 1e-11 for float32. x = 2^e m with m between
// 1/sqrt(2) and sqrt(2), and ln m = 2 artanh((m - 1) / (m + 1)) as a series.
template <class A>
GENKERNELS_INLINE Vector<double> logarithm(Vector<double> x) {
  if constexpr (sizeof(A) == 8) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
    return x;
  } else {
    typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
    const Bits bits = (Bits)x, above = (bits - 0x3fe6a09e667f3bcd) >> 52;
    const Vector<double> m = (Vector<double>)(bits - (above << 52));
    const Vector<double> t = (m - 1.0) / (m + 1.0), s = t * t;
    Vector<double> series = s * (1.0 / 13) + 1.0 / 11;
    series = series * s + 1.0 / 9;
    series = series * s + 1.0 / 7;
    series = series * s + 1.0 / 5;
    series = series * s + 1.0 / 3;
    return __builtin_convertvector(above, Vector<double>) * kLog2 + 2.0 * (t + t * s * series) + (x - x);
  }
}

// float64 is for gradcheck and for references: the C library's functions, lane by lane.
template <int kCount>
GENKERNELS_INLINE Several<Vector<double>, kCount> exponential(Several<Vector<double>, kCount> x) {
  for (Vector<double>& each : x.at)
    for (int i = 0; i < kLanes<double>; ++i) each[i] = __builtin_exp(each[i]);
  return x;
}

template <int kCount>
GENKERNELS_INLINE Several<Vector<double>, kCount> sigmoid(Several<Vector<double>, kCount> x) {
  for (Vector<double>& each : x.at)
    for (int i = 0; i < kLanes<double>; ++i) each[i] = 1.0 / (1.0 + __builtin_exp(-each[i]));
  return x;
}

template <int kCount>
GENKERNELS_INLINE Several<Vector<double>, kCount> tanh(Several<Vector<double>, kCount> x) {
  for (Vector<double>& each : x.at)
    for (int i = 0; i < kLanes<double>; ++i) each[i] = __builtin_tanh(each[i]);
  return x;
}

template <int kCount>
GENKERNELS_INLINE Normal<Vector<double>, kCount> normal(const Several<Vector<double>, kCount>& x) {
  Normal<Vector<double>, kCount> result = {x * x * -0.5, x};
  result.power = exponential(result.power);
  for (Vector<double>& each : result.integral.at)
    for (int i = 0; i < kLanes<double>; ++i) each[i] = 0.5 * __builtin_erfc(each[i] * -0.70710678118654752440);
  return result;
}

}  // namespace genkernels::GENKERNELS_LEVEL
