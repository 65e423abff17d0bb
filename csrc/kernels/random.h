// Random numbers that depend on nothing but their place: Philox4x32-10 (Salmon et al. 2011,
// https://doi.org/10.1145/2063384.2063405).
#pragma once

#include "simd.h"

namespace genkernels::GENKERNELS_LEVEL {

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

struct Product {
  Words high, low;
};

// The halves of 64-bit products.
GENKERNELS_INLINE Product multiply_words(Words x, uint32_t by) {
#if defined(__AVX512F__)
  const __m512i a = (__m512i)x, b = _mm512_set1_epi32(int(by));
  const __m512i even = _mm512_maskz_mul_epu32(0xff, a, b);
  const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, a, 32), b);
  return {(Words)_mm512_mask_blend_epi32(0xaaaa, _mm512_maskz_srli_epi64(0xff, even, 32), odd),
          (Words)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_maskz_slli_epi64(0xff, odd, 32))};
#elif defined(__AVX2__)
  const __m256i a = (__m256i)x, b = _mm256_set1_epi32(int(by));
  const __m256i even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  return {(Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa),
          (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
#else
  Product result{};
  for (int i = 0; i < kVectorBytes / 4; ++i) {
    const uint64_t product = uint64_t(x[i]) * by;
    result.high[i] = uint32_t(product >> 32);
    result.low[i] = uint32_t(product);
  }
  return result;
#endif
}

// The four numbers of each counter.
GENKERNELS_INLINE void philox(Words (&counter)[4], uint64_t key) {
  uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Product first = multiply_words(counter[0], 0xD2511F53u), second = multiply_words(counter[2], 0xCD9E8D57u);
    counter[0] = second.high ^ counter[1] ^ low;
    counter[1] = second.low;
    counter[2] = first.high ^ counter[3] ^ high;
    counter[3] = first.low;
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
}

// The numbers of keys [64 group, 64 group + 64) of a query of a head, in their order.
constexpr int64_t kRandomKeys = 64;
GENKERNELS_INLINE void random_keys(uint64_t seed, uint32_t head, uint32_t query, uint32_t group,
                                   uint32_t (&numbers)[kRandomKeys]) {
  constexpr int kCount = kVectorBytes / 4;
  Words lanes{};
  for (int i = 0; i < kCount; ++i) lanes[i] = uint32_t(i);
  for (int first = 0; first < 16; first += kCount) {
    Words counter[4] = {lanes + (group * 16 + uint32_t(first)), Words{} + query, Words{} + head, Words{}};
    philox(counter, seed);
    for (int word = 0; word < 4; ++word) __builtin_memcpy(numbers + word * 16 + first, &counter[word], kVectorBytes);
  }
}

// As many of them as a register of S has lanes, one in each.
template <class S>
GENKERNELS_INLINE Vector<LaneOf<sizeof(S)>> load_numbers(const uint32_t* from) {
  Vector<LaneOf<sizeof(S)>> x;
  if constexpr (sizeof(S) == sizeof(uint32_t))
    __builtin_memcpy(&x, from, sizeof x);
  else
    for (int i = 0; i < kLanes<S>; ++i) x[i] = from[i];
  return x;
}

// The same numbers of keys n, n + 16, n + 32 and n + 48 of such a group and of 16 queries from `query` on.
constexpr int64_t kRandomQueries = 16;
GENKERNELS_INLINE void random_queries(uint64_t seed, uint32_t head, uint32_t query, uint32_t group, uint32_t n,
                                      uint32_t (&numbers)[4][kRandomQueries]) {
  constexpr int kCount = kVectorBytes / 4;
  Words lanes{};
  for (int i = 0; i < kCount; ++i) lanes[i] = uint32_t(i);
  for (int first = 0; first < kRandomQueries; first += kCount) {
    Words counter[4] = {Words{} + (group * 16 + n), lanes + (query + uint32_t(first)), Words{} + head, Words{}};
    philox(counter, seed);
    for (int word = 0; word < 4; ++word) __builtin_memcpy(numbers[word] + first, &counter[word], kVectorBytes);
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
