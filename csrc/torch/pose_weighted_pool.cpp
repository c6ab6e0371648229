// Operators of the hot path pose_weighted_pool: checks, layouts, threads; what they compute stands in
// neuraldeps_kernels/ops/pose_weighted_pool.py.
//
// Kernels: csrc/cpu/pose_weighted_pool.cpp. CUDA tensors go to Triton or the PyTorch reference, registered from Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>

#include "layouts.hpp"
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/nvtx.hpp"
#include "parallel.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using nd::cpu::Dtype;
using nd::cpu::PosePoolArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kValuesPerThread = 1 << 15;  // of features; fewer are not worth a second thread

// Arguments of both directions, with the tensors they point to.
struct Pool {
  Tensor features, maps;
  PosePoolArgs args = {};

  Pool(const Tensor& given, const Tensor& given_maps, bool groups, double eps)
      : features(dense(given)), maps(nd::made_contiguous(given_maps)) {
    args.dtype = nd::dtype_of("features", features);
    if (maps.dim() != 4 || maps.size(0) != features.size(0) || maps.size(2) != features.size(2) ||
        maps.size(3) != features.size(3) || maps.scalar_type() != wide())
      invalid("maps must be [N, K, h, w] beside the features, in the dtype of sums");
    args.channels_last = !nd::is_dense(features, false);
    args.groups = groups;
    args.N = features.size(0);
    args.C = features.size(1);
    args.S = features.size(2) * features.size(3);
    args.K = maps.size(1);
    if (groups && (args.K < 1 || args.K > args.C))
      invalid("maps must be 1.." + std::to_string(args.C) + " with groups of channels, not " + std::to_string(args.K));
    if (!(eps > 0)) invalid("eps must be positive, not " + std::to_string(eps));
    args.eps = eps;
    args.features = features.const_data_ptr();
    args.maps = maps.const_data_ptr();
  }

  ScalarType wide() const { return args.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float; }

  // Uninitialised [N, K, C], or [N, C] with groups.
  Tensor pooled() const {
    return args.groups ? nd::empty({args.N, args.C}, features.scalar_type(), features)
                       : nd::empty({args.N, args.K, args.C}, features.scalar_type(), features);
  }

  // run(begin, end, workspace) over all samples times `blocks`, by all threads if that pays.
  template <class F>
  void over(int64_t blocks, const F& run) const {
    const int64_t tasks = args.N * blocks, values = std::max<int64_t>(1, features.numel());
    const int64_t grain = std::max<int64_t>(1, kValuesPerThread * tasks / values);
    const auto with_room = [&](int64_t begin, int64_t end) {
      const nd::Memory workspace = nd::allocate(nd::cpu::kernels().pose_pool_room(args));
      run(begin, end, workspace.get());
    };
    if (grain >= tasks) return with_room(0, tasks);
    torch::stable::parallel_for(0, tasks, grain, with_room);
  }

 private:
  static Tensor dense(const Tensor& features) {
    if (features.dim() != 4) invalid("features must be [N, C, h, w]");
    return nd::is_dense(features, false) || nd::is_dense(features, true) ? features : nd::made_contiguous(features);
  }
};

Tensor pose_weighted_pool_cpu(Tensor features, Tensor maps, bool groups, double eps) {
  ND_RANGE("pose_weighted_pool");
  Pool pool(features, maps, groups, eps);
  Tensor pooled = pool.pooled();
  if (pooled.numel() == 0) return pooled;
  pool.args.pooled = pooled.mutable_data_ptr();
  pool.over(nd::cpu::pose_pool_blocks(pool.args), [&](int64_t begin, int64_t end, void* workspace) {
    nd::cpu::kernels().pose_pool(pool.args, begin, end, workspace);
  });
  return pooled;
}

std::tuple<Tensor, Tensor> pose_weighted_pool_backward_cpu(Tensor grad, Tensor features, Tensor maps, bool groups,
                                                           double eps, bool of_features, bool of_maps) {
  ND_RANGE("pose_weighted_pool_backward");
  Pool pool(features, maps, groups, eps);
  PosePoolArgs& args = pool.args;
  grad = nd::made_contiguous(grad);
  int64_t values = args.N * args.C;
  if (!groups) values *= args.K;
  if (grad.scalar_type() != pool.features.scalar_type() || grad.numel() != values)
    invalid("grad must have shape and dtype of the result");
  const auto nothing = [&] { return nd::empty({0}, pool.wide(), pool.maps); };
  Tensor features_grad = of_features ? nd::empty_beside(pool.features) : nothing();
  Tensor maps_grad = of_maps ? nd::empty_beside(pool.maps) : nothing();
  if (values == 0) {
    if (of_features) torch::stable::zero_(features_grad);
    if (of_maps) torch::stable::zero_(maps_grad);
    return {features_grad, maps_grad};
  }
  const int64_t blocks = nd::cpu::pose_pool_blocks(args);
  Tensor partial =
      of_maps ? nd::empty({args.N, blocks, groups ? 1 : args.K, args.S}, pool.wide(), pool.maps) : nothing();
  args.grad = grad.const_data_ptr();
  args.features_grad = of_features ? features_grad.mutable_data_ptr() : nullptr;
  args.partial = of_maps ? partial.mutable_data_ptr() : nullptr;
  pool.over(blocks, [&](int64_t begin, int64_t end, void* workspace) {
    nd::cpu::kernels().pose_pool_backward(args, begin, end, workspace);
  });
  if (of_maps) {
    args.maps_grad = maps_grad.mutable_data_ptr();
    pool.over(1, [&](int64_t begin, int64_t end, void*) { nd::cpu::kernels().pose_pool_maps_grad(args, begin, end); });
  }
  return {features_grad, maps_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def("pose_weighted_pool(Tensor features, Tensor maps, bool groups, float eps) -> Tensor");
  m.def(
      "pose_weighted_pool_backward(Tensor grad, Tensor features, Tensor maps, bool groups, float eps, "
      "bool of_features, bool of_maps) -> (Tensor dfeatures, Tensor dmaps)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("pose_weighted_pool", TORCH_BOX(&pose_weighted_pool_cpu));
  m.impl("pose_weighted_pool_backward", TORCH_BOX(&pose_weighted_pool_backward_cpu));
}
