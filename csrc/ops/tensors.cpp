#include "tensors.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>

#include "memory.h"

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // its name in torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

#if defined(__linux__)
// Of torch 2.11 and later; null beside torch 2.10, where every tensor has PyTorch's memory.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);
#endif

namespace genkernels {

using torch::stable::Tensor;

namespace {

// Sizes and the strides of a contiguous tensor.
struct Layout {
  static constexpr size_t kMostDimensions = 64;  // as many as PyTorch's own operations take
  std::array<int64_t, kMostDimensions> strides;
  int64_t dimensions;
  size_t bytes;
  int32_t dtype;

  Layout(const Tensor& input, Sizes sizes, bool is_accumulator) : dimensions(int64_t(sizes.size())) {
    STD_TORCH_CHECK(sizes.size() <= kMostDimensions, "expected at most ", kMostDimensions, " dimensions");
    const bool widens = is_accumulator && accumulator_dtype(input) != input.scalar_type();
    bytes = widens ? sizeof(float) : input.element_size();
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
      strides[i] = stride;  // as PyTorch has them, where there are no elements too
      bytes *= size_t(sizes[i]);
    }
    if (widens)
      dtype = aoti_torch_dtype_float32();
    else
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
  }
};

Tensor new_tensor(const Layout& layout, Sizes sizes) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(layout.dimensions, sizes.data(), layout.strides.data(),
                                                         layout.dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  poison(tensor.mutable_data_ptr(), layout.bytes);
  return tensor;
}

}  // namespace

Tensor new_tensor(const Tensor& input, Sizes sizes) { return new_tensor(Layout(input, sizes, false), sizes); }

Tensor new_accumulator(const Tensor& input, Sizes sizes) { return new_tensor(Layout(input, sizes, true), sizes); }

torch::headeronly::ScalarType accumulator_dtype(const Tensor& input) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = input.scalar_type();
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

Tensor new_kept(const Tensor& input, Sizes sizes, bool is_accumulator) {
  const Layout layout(input, sizes, is_accumulator);
#if defined(__linux__)
  void* const block = torch_from_blob != nullptr && layout.bytes >= kLargeBlock ? take_block(layout.bytes) : nullptr;
  if (block != nullptr) {
    AtenTensorHandle handle;
    const AOTITorchError error = torch_from_blob(
        block, layout.dimensions, sizes.data(), layout.strides.data(), 0, layout.dtype, aoti_torch_device_type_cpu(),
        -1, &handle, aoti_torch_layout_strided(), nullptr, 0, [](void* data, void*) { return_block(data); }, nullptr);
    if (error != AOTI_TORCH_SUCCESS) return_block(block);
    STABLE_TORCH_ERROR_CODE_CHECK(error);
    poison(block, layout.bytes);
    return Tensor(handle);
  }
#endif
  return new_tensor(layout, sizes);
}

}  // namespace genkernels
