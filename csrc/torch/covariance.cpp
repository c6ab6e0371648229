// Operator of the hot path covariance: checks, threads.
//
//   centered_moments    per batch entry sum w, weighted mean and centred second moment (csrc/cpu/covariance.cpp; the
//                       CUDA kernel is neuraldeps_kernels/triton/covariance.py, registered from Python)
//
// Values are checked on the CPU only: on CUDA that would make the host wait.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/moments_problem.hpp"
#include "neuraldeps/nvtx.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using nd::cpu::Dtype;
using nd::cpu::MomentsArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_weights(const Tensor& weights, const Tensor& x) {
  if (weights.dim() != 2 || weights.size(0) != x.size(0) || weights.size(1) != x.size(1) ||
      weights.scalar_type() != ScalarType::Double || weights.device() != x.device())
    invalid("weights must be float64 [B, N] on the device of x [B, N, n]");
  nd::cpu::check_weights(static_cast<const double*>(weights.const_data_ptr()), weights.numel());
}

std::tuple<Tensor, Tensor, Tensor> centered_moments_cpu(Tensor x, OptionalTensor weights) {
  ND_RANGE("centered_moments");
  using torch::stable::new_empty;
  if (x.dim() != 3 || x.size(2) == 0) invalid("x must be [B, N, n] with n >= 1");
  const Dtype dtype = nd::dtype_of("x", x);
  const int64_t batch = x.size(0), rows = x.size(1), n = x.size(2);
  if (x.stride(2) != 1 || x.stride(1) < n) x = torch::stable::contiguous(x);
  if (weights) {
    weights = torch::stable::contiguous(*weights);
    check_weights(*weights, x);
  }
  Tensor weight_sum = new_empty(x, {batch}, ScalarType::Double);
  Tensor mean = new_empty(x, {batch, n}, ScalarType::Double);
  Tensor moment = new_empty(x, {batch, n, n}, ScalarType::Double);

  // Many problems run side by side, few one after the other with all threads; the result is the same.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t groups = batch >= threads ? threads : 1;

  const char* data = static_cast<const char*>(x.const_data_ptr());
  const int64_t batch_bytes = x.stride(0) * static_cast<int64_t>(x.element_size());
  const double* weight = weights ? static_cast<const double*>(weights->const_data_ptr()) : nullptr;
  double* const sums = static_cast<double*>(weight_sum.mutable_data_ptr());
  double* const means = static_cast<double*>(mean.mutable_data_ptr());
  double* const moments = static_cast<double*>(moment.mutable_data_ptr());
  const auto problem = [&](int64_t b, void* workspace) {
    return MomentsArgs{data + b * batch_bytes,
                       dtype,
                       rows,
                       n,
                       x.stride(1),
                       weight ? weight + b * rows : nullptr,
                       sums + b,
                       means + b * n,
                       moments + b * n * n,
                       workspace,
                       groups == 1 ? threads : 1};
  };
  const nd::cpu::Kernels& kernels = nd::cpu::kernels();
  const int64_t bytes = batch ? kernels.moments_plan(problem(0, nullptr)).workspace_bytes : 0;
  Tensor workspaces = new_empty(x, {groups, bytes}, ScalarType::Byte);
  char* const workspace = static_cast<char*>(workspaces.mutable_data_ptr());
  const auto by_all_threads = [](int64_t count, const auto& f) { torch::stable::parallel_for(0, count, 1, f); };
  const auto by_this_thread = [](int64_t count, const auto& f) { f(0, count); };
  if (groups == 1) {
    for (int64_t b = 0; b < batch; b++) nd::cpu::compute_moments(kernels, problem(b, workspace), by_all_threads);
  } else {
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; g++) {
        for (int64_t b = g * batch / groups; b < (g + 1) * batch / groups; b++)
          nd::cpu::compute_moments(kernels, problem(b, workspace + g * bytes), by_this_thread);
      }
    });
  }
  for (int64_t b = 0; b < batch; b++) nd::cpu::check_finite_moment(moments + b * n * n, n);
  return {weight_sum, mean, moment};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def("centered_moments(Tensor x, Tensor? weights) -> (Tensor weight_sum, Tensor mean, Tensor moment)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) { m.impl("centered_moments", TORCH_BOX(&centered_moments_cpu)); }
