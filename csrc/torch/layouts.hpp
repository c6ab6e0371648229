// Memory layouts of values [N, C, *]: what kernels take as it is, and results beside it.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "neuraldeps/invalid.hpp"
#include "neuraldeps/memory.hpp"

namespace nd {

using torch::stable::Tensor;

constexpr int kMaxDimensions = 64;

// torch::stable::contiguous calls the dispatcher even for nothing, which would double a small operator.
inline Tensor made_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Contiguous, or channels-last of any rank.
inline bool is_dense(const Tensor& x, bool channels_last) {
  int64_t expected = 1;
  const auto next = [&](int64_t d) {
    const bool fits = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    return fits;
  };
  if (x.numel() == 0) return true;
  if (channels_last && !next(1)) return false;
  for (int64_t d = x.dim() - 1; d > 1; d--) {
    if (!next(d)) return false;
  }
  return (channels_last || next(1)) && next(0);
}

// Asks for huge pages, where the system leaves the choice to programs: a large result is new memory at every call, and
// one fault in place of 512 a page takes less than half of the time.
inline void prefer_huge_pages([[maybe_unused]] const Tensor& x) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(kHugePage);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + static_cast<uintptr_t>(x.numel()) * x.element_size()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Uninitialised tensor of shape and strides of `like`, which is dense.
inline Tensor empty_beside(const Tensor& like) {
  std::array<int64_t, kMaxDimensions> sizes, strides;
  for (int64_t d = 0; d < like.dim(); d++) {
    sizes[static_cast<size_t>(d)] = like.size(d);
    strides[static_cast<size_t>(d)] = like.stride(d);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.scalar_type()));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(like.dim(), sizes.data(), strides.data(), dtype, device_type,
                                                  like.get_device_index(), &handle));
  Tensor result(handle);
  prefer_huge_pages(result);
  return result;
}

// `other` of the shape and dtype of x, in the layout of x.
inline Tensor beside(const std::string& name, const Tensor& other, const std::string& name_of_x, const Tensor& x) {
  bool same_shape = other.dim() == x.dim(), same_layout = same_shape;
  for (int64_t d = 0; same_shape && d < x.dim(); d++) {
    same_shape = other.size(d) == x.size(d);
    same_layout = same_layout && (x.size(d) == 1 || other.stride(d) == x.stride(d));
  }
  if (!same_shape || other.scalar_type() != x.scalar_type())
    invalid(name + " must have shape and dtype of " + name_of_x);
  if (same_layout) return other;
  Tensor copy = empty_beside(x);
  return torch::stable::copy_(copy, other);
}

}  // namespace nd
