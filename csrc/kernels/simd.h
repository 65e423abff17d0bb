// Vectors of the SIMD level this file is compiled for. Everything sits in the level's own namespace,
// because the same sources are compiled once per level into one library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define GENKERNELS_INLINE inline __attribute__((always_inline))
#define GENKERNELS_LAMBDA __attribute__((always_inline))  // after a lambda's parameters

namespace genkernels::GENKERNELS_LEVEL {

// A tile of kTileRows rows by three vectors has to fit the registers, with three more for the
// packed operand: 8 x 3 of the 32 registers of AVX-512 and NEON, 4 x 3 of the 16 of AVX2 and SSE.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 8;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type that sums are kept in.
template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<bfloat16> {
  using type = float;
};
template <>
struct AccumulatorOf<float16> {
  using type = float;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// One register of T's; bf16 and float16 are computed with as float.
template <class T>
struct VectorOf {
  typedef Accumulator<T> type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(Accumulator<T>));

template <class S>
GENKERNELS_INLINE Vector<S> broadcast(S value) {
  return value - Vector<S>{};  // 0 + value would have to be computed: it is not value for -0
}

// A product that is rounded before it is added to anything: the compiler does not fuse the two.
template <class V>
GENKERNELS_INLINE V rounded(V product) {
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

template <class S>
GENKERNELS_INLINE Vector<S> load(const S* from) {
  Vector<S> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// GCC would widen halves of a register and put them together.
GENKERNELS_INLINE Vector<float> load(const bfloat16* from) {
#if defined(__AVX512F__)
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vector<float>)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, narrow), 16);
#elif defined(__AVX2__)
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
#else
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  Narrow narrow;
  __builtin_memcpy(&narrow, from, sizeof narrow);
  return (Vector<float>)(__builtin_convertvector(narrow, Vector<uint32_t>) << 16);
#endif
}

// An integer for each lane's float16, to widen it where the processor has no instruction for that.
GENKERNELS_INLINE Vector<float> widened(Vector<uint32_t> half) {
  const Vector<uint32_t> magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
  const Vector<uint32_t> normal = (magnitude << 13) + (112u << 23);  // the exponents' biases differ by 112
  // From an integer: where subnormal floats count as zero, these do not.
  const Vector<float> subnormal = __builtin_convertvector((Vector<int32_t>)magnitude, Vector<float>) * 0x1p-24f;
  const Vector<uint32_t> quiet = magnitude > 0x7c00 ? Vector<uint32_t>{} + 0x400000 : Vector<uint32_t>{};
  const Vector<uint32_t> special = (magnitude << 13) | 0x7f800000 | quiet;
  const Vector<uint32_t> finite = magnitude < 0x400 ? (Vector<uint32_t>)subnormal : normal;
  return (Vector<float>)((magnitude < 0x7c00 ? finite : special) | sign);
}

GENKERNELS_INLINE Vector<float> load(const float16* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  float16x4_t narrow;
  __builtin_memcpy(&narrow, from, sizeof narrow);
  return (Vector<float>)vcvt_f32_f16(narrow);
#else
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  Narrow narrow;
  __builtin_memcpy(&narrow, from, sizeof narrow);
  return widened(__builtin_convertvector(narrow, Vector<uint32_t>));
#endif
}

template <class S>
GENKERNELS_INLINE void store(S* to, Vector<S> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// As bf16, in the lower half of each lane. Rounds to nearest, ties to even. A NaN keeps its sign and becomes quiet:
// rounding its payload up could carry into the exponent and turn it into an infinity.
GENKERNELS_INLINE Vector<uint32_t> rounded_bits(Vector<float> v) {
  const Vector<uint32_t> bits = (Vector<uint32_t>)v;
  const Vector<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vector<uint32_t> quiet = (bits >> 16) | 0x40;
  return v == v ? rounded : quiet;
}

GENKERNELS_INLINE void store(bfloat16* to, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)rounded_bits(v)));
#else
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  const Narrow narrow = __builtin_convertvector(rounded_bits(v), Narrow);
  __builtin_memcpy(to, &narrow, sizeof narrow);
#endif
}

// As float16, in the lower half of each lane; rounds as rounded_bits() does, what is too large to an infinity.
GENKERNELS_INLINE Vector<uint32_t> rounded_halves(Vector<float> v) {
  typedef Vector<int32_t> Integers;
  constexpr int32_t kLeast = 0x38800000, kInfinity = 0x47800000;  // 2^-14, the least normal number, and 2^16
  const Integers bits = (Integers)v, magnitude = bits & 0x7fffffff;
  const Integers normal = (magnitude + (0xfff - (112 << 23)) + ((magnitude >> 13) & 1)) >> 13;
  // Beside a half, float32 has the digits of a subnormal float16.
  const Vector<float> sum = (Vector<float>)magnitude + 0.5f;
  const Integers subnormal = (Integers)sum - 0x3f000000;
  const Integers nan = ((magnitude >> 13) & 0x1ff) | 0x7e00;
  const Integers large = magnitude > 0x7f800000 ? nan : Integers{} + 0x7c00;
  const Integers finite = magnitude < kLeast ? subnormal : normal;
  return (Vector<uint32_t>)((magnitude < kInfinity ? finite : large) | ((bits >> 16) & 0x8000));
}

GENKERNELS_INLINE void store(float16* to, Vector<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const float16x4_t narrow = vcvt_f16_f32((float32x4_t)v);
  __builtin_memcpy(to, &narrow, sizeof narrow);
#else
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  const Narrow narrow = __builtin_convertvector(rounded_halves(v), Narrow);
  __builtin_memcpy(to, &narrow, sizeof narrow);
#endif
}

// The last, incomplete vector of a row: `count` elements, the other lanes are zero.
template <class T>
GENKERNELS_INLINE Vector<T> load(const T* from, int count) {
  if (count == kLanes<T>) return load(from);
  T lanes[kLanes<T>] = {};
  __builtin_memcpy(lanes, from, size_t(count) * sizeof(T));
  return load(lanes);
}

template <class T>
GENKERNELS_INLINE void store(T* to, Vector<T> v, int count) {
  if (count == kLanes<T>) return store(to, v);
  T lanes[kLanes<T>];
  store(lanes, v);
  __builtin_memcpy(to, lanes, size_t(count) * sizeof(T));
}

#if defined(__AVX512F__)
GENKERNELS_INLINE __mmask16 first_lanes(int count) { return __mmask16((1u << count) - 1); }

GENKERNELS_INLINE Vector<float> load(const float* from, int count) {
  return (Vector<float>)_mm512_maskz_loadu_ps(first_lanes(count), from);
}
GENKERNELS_INLINE Vector<float> load(const bfloat16* from, int count) {
  const __m512i lanes = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(first_lanes(count), from));
  return (Vector<float>)_mm512_maskz_slli_epi32(0xffff, lanes, 16);
}
GENKERNELS_INLINE Vector<float> load(const float16* from, int count) {
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(first_lanes(count), from));
}
GENKERNELS_INLINE void store(float* to, Vector<float> v, int count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)v);
}
#endif

// As many registers, computed with in turns: while one waits for its last result, the others are computed.
template <class V, int kCount>
struct Several {
  V at[kCount];

  GENKERNELS_INLINE V operator[](int i) const { return at[i]; }
};

// of(0), of(1) and so on.
template <int kCount, class Of>
GENKERNELS_INLINE auto several(const Of& of) {
  Several<decltype(of(0)), kCount> result;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) result.at[i] = of(i);
  return result;
}

template <class V, int kCount>
GENKERNELS_INLINE V one_of(const Several<V, kCount>& x, int i) {
  return x.at[i];
}
template <class V>
GENKERNELS_INLINE V one_of(V x, int) {
  return x;
}

template <class V, int kCount, class Other>
GENKERNELS_INLINE Several<V, kCount> operator+(const Several<V, kCount>& a, const Other& b) {
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return a[i] + one_of(b, i); });
}
template <class V, int kCount, class Other>
GENKERNELS_INLINE Several<V, kCount> operator-(const Several<V, kCount>& a, const Other& b) {
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return a[i] - one_of(b, i); });
}
template <class V, int kCount, class Other>
GENKERNELS_INLINE Several<V, kCount> operator*(const Several<V, kCount>& a, const Other& b) {
  return several<kCount>([&](int i) GENKERNELS_LAMBDA { return a[i] * one_of(b, i); });
}

// Past the caches: a line that is written whole and read much later need not be fetched first. Ends with
// finish_streams(), before another thread may read it.
template <class T>
GENKERNELS_INLINE void stream(T* to, Vector<T> v) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, float)) return _mm512_stream_ps(to, (__m512)v);
#endif
  store(to, v);
}

GENKERNELS_INLINE void finish_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

template <size_t bytes>
struct LaneOfSize {
  using type = uint32_t;
};
template <>
struct LaneOfSize<8> {
  using type = uint64_t;
};
template <size_t bytes>
using LaneOf = typename LaneOfSize<bytes>::type;

// The lower, or the upper, halves of two registers, element by element: a0 b0 a1 b1 and so on.
template <class Lane, class Row, int... i>
GENKERNELS_INLINE Row interleave(Row a, Row b, bool upper, std::integer_sequence<int, i...>) {
  constexpr int kCount = int(sizeof...(i));
#if defined(__clang__)
  return upper ? __builtin_shufflevector(a, b, (kCount / 2 + i / 2 + i % 2 * kCount)...)
               : __builtin_shufflevector(a, b, (i / 2 + i % 2 * kCount)...);
#else  // which GCC has from 12 on
  typedef Lane Order __attribute__((vector_size(sizeof(Row))));
  return upper ? __builtin_shuffle(a, b, Order{Lane(kCount / 2 + i / 2 + i % 2 * kCount)...})
               : __builtin_shuffle(a, b, Order{Lane(i / 2 + i % 2 * kCount)...});
#endif
}

template <class Lane, class Row>
GENKERNELS_INLINE Row interleave(Row a, Row b, bool upper) {
  return interleave<Lane>(a, b, upper, std::make_integer_sequence<int, int(sizeof(Row) / sizeof(Lane))>{});
}

// A square matrix in registers, transposed: interleaving the lower half of the rows with the upper, as often as their
// number has bits, is a perfect shuffle of all elements. Lanes are integers, so that no value is touched.
template <class Lane>
struct Square {
  static constexpr int kRows = kVectorBytes / int(sizeof(Lane));
  typedef Lane Row __attribute__((vector_size(kVectorBytes)));

  Row rows[kRows];

  GENKERNELS_INLINE void transpose() {
#pragma GCC unroll 8
    for (int bits = 1; bits < kRows; bits *= 2) {
      Row next[kRows];
#pragma GCC unroll 16
      for (int k = 0; k < kRows / 2; ++k) {
        next[2 * k] = interleave<Lane>(rows[k], rows[k + kRows / 2], false);
        next[2 * k + 1] = interleave<Lane>(rows[k], rows[k + kRows / 2], true);
      }
#pragma GCC unroll 16
      for (int k = 0; k < kRows; ++k) rows[k] = next[k];
    }
  }
};

// The sum of each register's lanes, in the lane of its index: the transposed square added up, each stage of the
// transposition at once.
template <class S>
GENKERNELS_INLINE Vector<S> sums_of_lanes(Vector<S> (&rows)[kLanes<S>]) {
#pragma GCC unroll 8
  for (int half = kLanes<S> / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int k = 0; k < half; ++k)
      rows[k] = interleave<LaneOf<sizeof(S)>>(rows[k], rows[k + half], false) +
                interleave<LaneOf<sizeof(S)>>(rows[k], rows[k + half], true);
  }
  return rows[0];
}

GENKERNELS_INLINE float convert(bfloat16 x, float) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
GENKERNELS_INLINE bfloat16 convert(float x, bfloat16) { return {uint16_t(rounded_bits(broadcast(x))[0])}; }
GENKERNELS_INLINE float convert(float16 x, float) { return load(&x, 1)[0]; }
template <class T>
GENKERNELS_INLINE T convert(T x, T) {
  return x;
}

// One element as the type E that products are taken in: `as<E>(x)`.
template <class E, class T>
GENKERNELS_INLINE E as(T x) {
  return convert(x, E{});
}

GENKERNELS_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GENKERNELS_INLINE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
GENKERNELS_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace genkernels::GENKERNELS_LEVEL
