// What this machine can do at most, measured: fused multiply-adds out of registers, and reads of memory.
//
// Built once per machine by limits.py with the system compiler. Each SIMD level carries its own target
// attribute, so one baseline object holds all levels and the caller picks one that the CPU has.

#include <cstddef>

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef float vec4 __attribute__((vector_size(16)));

// CHAINS independent accumulators, each updated once per iteration: enough of them hide the latency of
// the multiply-add (4 cycles on two ports need 8), few enough stay in registers. `scale` and `shift` come
// from outside so that nothing folds; the sum is returned so that nothing is dropped.
#define FMA_CHAINS(NAME, TARGET, VECTOR, CHAINS)                                             \
  EXPORT TARGET float NAME(long iterations, float scale, float shift) {                      \
    const VECTOR a = VECTOR{} + scale, b = VECTOR{} + shift;                                 \
    VECTOR sums[CHAINS];                                                                     \
    for (int c = 0; c < CHAINS; ++c) sums[c] = VECTOR{} + float(c);                          \
    for (long i = 0; i < iterations; ++i) {                                                  \
      _Pragma("GCC unroll 32") for (int c = 0; c < CHAINS; ++c) sums[c] = sums[c] * a + b;   \
    }                                                                                        \
    VECTOR total = sums[0];                                                                  \
    for (int c = 1; c < CHAINS; ++c) total += sums[c];                                       \
    float sum = 0;                                                                           \
    for (size_t lane = 0; lane < sizeof(VECTOR) / sizeof(float); ++lane) sum += total[lane]; \
    return sum;                                                                              \
  }

// Adds up `count` floats, a multiple of 128, `repeats` times over.
#define READ(NAME, TARGET, VECTOR)                                          \
  EXPORT TARGET float NAME(const float* data, size_t count, long repeats) { \
    constexpr size_t width = sizeof(VECTOR) / sizeof(float);                \
    VECTOR sums[8] = {};                                                    \
    for (long r = 0; r < repeats; ++r) {                                    \
      for (size_t i = 0; i < count; i += 8 * width) {                       \
        _Pragma("GCC unroll 8") for (size_t c = 0; c < 8; ++c) sums[c] +=   \
            *reinterpret_cast<const VECTOR*>(data + i + c * width);         \
      }                                                                     \
    }                                                                       \
    VECTOR total = sums[0];                                                 \
    for (int c = 1; c < 8; ++c) total += sums[c];                           \
    float sum = 0;                                                          \
    for (size_t lane = 0; lane < width; ++lane) sum += total[lane];         \
    return sum;                                                             \
  }

FMA_CHAINS(fma_baseline, , vec4, 12)
READ(read_baseline, , vec4)

#if defined(__x86_64__)
#include <immintrin.h>

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec16 __attribute__((vector_size(64)));

FMA_CHAINS(fma_avx2, __attribute__((target("avx2,fma"))), vec8, 12)
READ(read_avx2, __attribute__((target("avx2,fma"))), vec8)
FMA_CHAINS(fma_avx512, __attribute__((target("avx512f"))), vec16, 24)
READ(read_avx512, __attribute__((target("avx512f"))), vec16)

// One vdpbf16ps multiplies 32 pairs of bfloat16 and adds them to 16 floats. `pair` holds two of them.
EXPORT __attribute__((target("avx512f,avx512bf16"))) float dot_avx512_bf16(long iterations, int pair) {
  const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
  __m512 sums[24];
  for (int c = 0; c < 24; ++c) sums[c] = _mm512_set1_ps(float(c));
  for (long i = 0; i < iterations; ++i) {
    _Pragma("GCC unroll 32") for (int c = 0; c < 24; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], a, a);
  }
  __m512 total = sums[0];
  for (int c = 1; c < 24; ++c) total = _mm512_add_ps(total, sums[c]);
  return _mm512_reduce_add_ps(total);
}
#endif

// Writes `size` bytes back and drops them from every cache of the machine.
EXPORT void flush(const char* data, size_t size) {
#if defined(__x86_64__)
  for (size_t i = 0; i < size; i += 64) _mm_clflush(data + i);
  if (size > 0) _mm_clflush(data + size - 1);
  _mm_mfence();
#else
  // Memory beyond what caches hold takes their place.
  constexpr size_t large = size_t(1) << 29;
  static volatile char* other = new char[large];
  for (size_t i = 0; i < large; i += 64) other[i] = other[i] + 1;
#endif
}

// The highest level of this CPU: 0 baseline, 1 avx2, 2 avx512, 3 avx512_bf16.
EXPORT int highest_level() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f")) return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}
