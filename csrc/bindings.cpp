// The Python module genkernels._C: what this build is and which SIMD level runs. The ops themselves are registered with
// PyTorch when the library is loaded.
#include <pybind11/pybind11.h>

#include "cuda/gru_cell.h"
#include "dispatch.h"
#include "ops/memory.h"
#include "ops/stats.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace genkernels;
  m.attr("version") = GENKERNELS_VERSION;
  m.attr("compiler") = GENKERNELS_COMPILER;
  m.attr("torch_version") = GENKERNELS_TORCH_VERSION;
#if defined(GENKERNELS_CUDA)
  py::list architectures;
  for (const int* each = cuda::kArchitectures; *each != 0; ++each) architectures.append(*each);
  m.attr("cuda_architectures") = architectures;
#endif
  m.def("simd_levels", [] {
    py::list levels;
    for (const Kernels* const* level = supported_levels(); *level != nullptr; ++level) levels.append((*level)->level);
    return levels;
  });
  m.def("built_simd_levels", [] {
    py::list levels;
    for (const Kernels* level = built_levels(); level->level != nullptr; ++level) levels.append(level->level);
    return levels;
  });
  m.def("simd_level", [] { return kernels().level; });
  m.def("select_simd_level", &select_level);
  m.def("is_intel", &is_intel);
  m.def("empty_cache", &empty_cache);
  m.def("poison_memory", &poison_memory);
  m.def("call_counts", [] {
    py::dict counts;
    for (const CallCounter* counter = CallCounter::first(); counter != nullptr; counter = counter->next)
      counts[counter->op] = counter->calls.load();
    return counts;
  });
  m.def("reset_call_counts", [] {
    for (CallCounter* counter = CallCounter::first(); counter != nullptr; counter = counter->next) counter->calls = 0;
  });
}
