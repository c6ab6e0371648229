// Results of operators. torch::stable::new_empty calls the dispatcher through boxed arguments, which costs a small
// operator as much again as everything else (0.8 us a tensor); the C shim below it allocates directly.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/invalid.hpp"

namespace nd {

// The kernels' name of the dtype of argument `name`.
inline cpu::Dtype dtype_of(const char* name, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return cpu::Dtype::kFloat32;
    case ScalarType::Double:
      return cpu::Dtype::kFloat64;
    case ScalarType::BFloat16:
      return cpu::Dtype::kBfloat16;
    case ScalarType::Half:
      return cpu::Dtype::kFloat16;
    default:
      invalid(std::string(name) + " must be float32, float64, bfloat16 or float16");
  }
}

// Uninitialised contiguous tensor [sizes...] of `dtype` on the device of `like`.
template <size_t NumDims>
torch::stable::Tensor empty(const int64_t (&sizes)[NumDims], torch::headeronly::ScalarType dtype,
                            const torch::stable::Tensor& like) {
  std::array<int64_t, NumDims> strides;
  int64_t stride = 1;
  for (size_t i = NumDims; i-- > 0; stride *= sizes[i]) strides[i] = stride;
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(NumDims, sizes, strides.data(), shim_dtype, device_type,
                                                  like.get_device_index(), &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace nd
