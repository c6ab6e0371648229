// What the operators of re-ranking share: neighbour lists and features as tensors, for the kernels of both devices.
#pragma once
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <string>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/invalid.hpp"
#include "neuraldeps/reranking.hpp"
#include "parallel.hpp"
#include "tensors.hpp"

namespace nd {

// Ranges so large that what a range sets up per row of the matrix does not count.
inline void parallel_rows(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  const int64_t grain = std::max<int64_t>(64, count / (16 * static_cast<int64_t>(torch::stable::get_num_threads())));
  hand_out_ranges(count, grain, 0, [&](int64_t begin, int64_t end, void*) { f(begin, end); });
}

// Lists of index int64 [N, K] and key float64 [N, K], which may be replaced by contiguous copies; no value is read.
inline reranking::Lists unchecked_lists(torch::stable::Tensor& index, torch::stable::Tensor& key) {
  using torch::headeronly::ScalarType;
  if (index.scalar_type() != ScalarType::Long || key.scalar_type() != ScalarType::Double || index.dim() != 2 ||
      key.dim() != 2 || key.size(0) != index.size(0) || key.size(1) != index.size(1))
    invalid("index int64 and key float64 must be [N, K]");
  if (index.size(1) < 1 && index.size(0) > 0) invalid("index must list one neighbour or more a row");
  index = torch::stable::contiguous(index);
  key = torch::stable::contiguous(key);
  return {index.size(0), index.size(1), static_cast<const int64_t*>(index.const_data_ptr()),
          static_cast<const double*>(key.const_data_ptr()), nullptr};
}

// The same on the CPU, with indices in 0 .. targets - 1.
inline reranking::Lists lists_of(torch::stable::Tensor& index, torch::stable::Tensor& key, int64_t targets) {
  const reranking::Lists lists = unchecked_lists(index, key);
  for (int64_t e = 0; e < lists.rows * lists.k; e++)
    if (lists.index[e] < 0 || lists.index[e] >= targets)
      invalid("index must be in 0.." + std::to_string(targets - 1) + ", not " + std::to_string(lists.index[e]));
  return lists;
}

// The same on a device; `targets` limits indices there.
inline NdLists device_lists(torch::stable::Tensor& index, torch::stable::Tensor& key, int64_t targets) {
  const reranking::Lists lists = unchecked_lists(index, key);
  if (targets >= std::numeric_limits<int32_t>::max()) invalid("rows must be fewer than 2^31 - 1");
  return {targets, std::max<int64_t>(lists.k, 1), lists.index, lists.key};
}

// Rows of query, then of gallery, which may be replaced by copies whose rows are dense.
inline reranking::Features features_of(torch::stable::Tensor& query, torch::stable::Tensor& gallery, int64_t rows) {
  using torch::headeronly::ScalarType;
  for (torch::stable::Tensor* x : {&query, &gallery}) {
    if (x->scalar_type() != ScalarType::Float && x->scalar_type() != ScalarType::Double)
      invalid("query and gallery must be float32 or float64");
    if (x->dim() != 2 || x->scalar_type() != query.scalar_type() || x->size(1) != query.size(1))
      invalid("query and gallery must be [N, D] of one dtype");
    if (x->stride(1) != 1) *x = torch::stable::contiguous(*x);
  }
  if (query.size(0) + gallery.size(0) != rows) invalid("query and gallery must have as many rows as there are lists");
  return {query.const_data_ptr(), gallery.const_data_ptr(), dtype_of("query", query), query.size(0),
          query.size(1),          query.stride(0),          gallery.stride(0)};
}

inline NdFeatures device_features(const reranking::Features& f) {
  return {f.query, f.gallery, static_cast<int32_t>(f.dtype), f.num_queries, f.dim, f.query_stride, f.gallery_stride};
}

// The value of x [1] int64 on a device; the host waits for it.
inline int64_t read_number(const torch::stable::Tensor& x) {
  const torch::stable::Tensor here = torch::stable::to(x, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  return *static_cast<const int64_t*>(here.const_data_ptr());
}

}  // namespace nd
