#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(GENKERNELS_HAVE_AVX2)
GENKERNELS_DECLARE_ATTENTION(avx2)
GENKERNELS_DECLARE_DROPOUT(avx2)
GENKERNELS_DECLARE_GRU(avx2)
GENKERNELS_DECLARE_LINEAR(avx2)
GENKERNELS_DECLARE_LINEAR_CROSS_ENTROPY(avx2)
GENKERNELS_DECLARE_RNN(avx2)
#endif
#if defined(GENKERNELS_HAVE_AVX512)
GENKERNELS_DECLARE_ATTENTION(avx512)
GENKERNELS_DECLARE_DROPOUT(avx512)
GENKERNELS_DECLARE_GRU(avx512)
GENKERNELS_DECLARE_LINEAR(avx512)
GENKERNELS_DECLARE_LINEAR_CROSS_ENTROPY(avx512)
GENKERNELS_DECLARE_RNN(avx512)
#endif
#if defined(GENKERNELS_HAVE_AVX512_BF16)
GENKERNELS_DECLARE_ATTENTION(avx512_bf16)
GENKERNELS_DECLARE_DROPOUT(avx512_bf16)
GENKERNELS_DECLARE_GRU(avx512_bf16)
GENKERNELS_DECLARE_LINEAR(avx512_bf16)
GENKERNELS_DECLARE_LINEAR_CROSS_ENTROPY(avx512_bf16)
GENKERNELS_DECLARE_RNN(avx512_bf16)
#endif

namespace genkernels {
namespace {

#define GENKERNELS_LEVEL_ENTRY(level, condition) \
  {#level,                                       \
   [] { return bool(condition); },               \
   level::attention_forward,                     \
   level::attention_backward,                    \
   level::attention_double_backward,             \
   level::dropout,                               \
   level::gru_packed_size,                       \
   level::gru_pack,                              \
   level::gru_forward,                           \
   level::gru_backward,                          \
   level::linear_forward,                        \
   level::linear_backward,                       \
   level::linear_cross_entropy,                  \
   level::rnn_forward,                           \
   level::rnn_backward}

// Of float16's conversions __builtin_cpu_supports does not know in every compiler.
[[maybe_unused]] bool has_f16c() {
#if defined(__x86_64__)
  unsigned int a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
#else
  return false;
#endif
}

// __builtin_cpu_supports also asks whether the operating system saves the wider registers.
constexpr Kernels kLevels[] = {
    GENKERNELS_LEVEL_ENTRY(baseline, true),
#if defined(GENKERNELS_HAVE_AVX2)
    GENKERNELS_LEVEL_ENTRY(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()),
#endif
#if defined(GENKERNELS_HAVE_AVX512)
    GENKERNELS_LEVEL_ENTRY(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")),
#endif
#if defined(GENKERNELS_HAVE_AVX512_BF16)
    GENKERNELS_LEVEL_ENTRY(avx512_bf16, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                            __builtin_cpu_supports("avx512bf16")),
#endif
    {},
};
constexpr size_t kLevelCount = sizeof kLevels / sizeof kLevels[0] - 1;

// On Intel's CPUs the bf16 dot product does the work of two float32 multiply-adds and takes the time of four (Sapphire
// Rapids, measured): there bf16 is widened and multiplied as float32 is.
bool is_worth_it(const Kernels& level) { return !is_intel() || std::strcmp(level.level, "avx512_bf16") != 0; }

struct Supported {
  const Kernels* levels[kLevelCount + 1] = {};
  std::atomic<const Kernels*> active;

  Supported() {
    size_t count = 0;
    for (const Kernels* level = kLevels; level->level != nullptr; ++level)
      if (level->is_supported()) {
        levels[count++] = level;
        if (is_worth_it(*level)) active = level;
      }
  }
};

Supported& supported() {
  static Supported instance;
  return instance;
}

}  // namespace

const Kernels* built_levels() { return kLevels; }

const Kernels* const* supported_levels() { return supported().levels; }

const Kernels& kernels() { return *supported().active.load(std::memory_order_relaxed); }

bool select_level(const char* level) {
  for (const Kernels* const* entry = supported_levels(); *entry != nullptr; ++entry)
    if (std::strcmp((*entry)->level, level) == 0) {
      supported().active = *entry;
      return true;
    }
  return false;
}

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace genkernels
