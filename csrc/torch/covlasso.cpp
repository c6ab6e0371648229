// Operators of the hot path covlasso: checks of shapes and types, memory, dispatch.
//
//   covlasso    T independent problems from one covariance (csrc/cpu/covlasso.cpp, csrc/cuda/covlasso.cu)
//   lambda_max  the smallest lam of each target at which no category is left
//
// Values are checked on the CPU only: on CUDA that would make the host wait.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "cuda_library.hpp"
#include "neuraldeps/covlasso_problem.hpp"
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/nvtx.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using nd::leading_dimension;
using nd::cpu::CovlassoArgs;
using nd::cpu::CovlassoKernels;
using nd::cpu::kCovlassoInfoSize;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Threads as covlasso_problem.hpp takes them.
constexpr auto parallel = [](int64_t count, int64_t grain, const auto& f) {
  torch::stable::parallel_for(0, count, grain, f);
};

std::string shape_of(const Tensor& x) {
  std::string text = "[";
  for (int64_t d = 0; d < x.dim(); d++) text += (d ? ", " : "") + std::to_string(x.size(d));
  return text + "]";
}

void check_arguments(const Tensor& cov, const Tensor& targets, const OptionalTensor& penalty) {
  if (cov.dim() != 2 || cov.size(0) != cov.size(1)) invalid("cov must be a square matrix [n, n], not " + shape_of(cov));
  if (cov.size(0) > INT32_MAX - 1024)
    invalid("cov has " + std::to_string(cov.size(0)) + " rows; at most 2^31 - 1025 are supported");
  if (cov.scalar_type() != ScalarType::Float && cov.scalar_type() != ScalarType::Double)
    invalid("cov must be float32 or float64");
  if (targets.dim() != 1 || targets.scalar_type() != ScalarType::Long) invalid("targets must be int64 [T]");
  if (targets.device() != cov.device()) invalid("targets and cov must be on one device");
  if (!penalty) return;
  const bool shaped = penalty->dim() == 1 ? penalty->size(0) == cov.size(0)
                                          : penalty->dim() == 2 && penalty->size(0) == targets.size(0) &&
                                                penalty->size(1) == cov.size(0);
  if (!shaped) invalid("penalty must be [n] or [T, n], not " + shape_of(*penalty));
  if (penalty->scalar_type() != cov.scalar_type()) invalid("penalty must have the dtype of cov");
  if (penalty->device() != cov.device()) invalid("penalty and cov must be on one device");
}

void check_solve_arguments(const Tensor& cov, const Tensor& targets, const Tensor& lam, int64_t capacity) {
  if (lam.dim() != 1 || lam.size(0) != targets.size(0) || lam.scalar_type() != ScalarType::Double)
    invalid("lam must be float64 [T], not " + shape_of(lam));
  if (lam.device() != cov.device()) invalid("lam and cov must be on one device");
  if (capacity < 0) invalid("capacity must not be negative, not " + std::to_string(capacity));
}

void check_targets(const Tensor& targets, int64_t n) {
  nd::cpu::check_targets(static_cast<const int64_t*>(targets.const_data_ptr()), targets.size(0), n);
}

template <class T>
const T* data_of(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

struct Solution {
  Tensor value, index, count, info;
  std::tuple<Tensor, Tensor, Tensor, Tensor> tuple() const { return {value, index, count, info}; }
};

Solution empty_solution(const Tensor& cov, int64_t num_targets, int64_t capacity) {
  return {nd::empty({num_targets, capacity}, cov.scalar_type(), cov),
          nd::empty({num_targets, capacity}, ScalarType::Int, cov), nd::empty({num_targets}, ScalarType::Int, cov),
          nd::empty({num_targets, int64_t{kCovlassoInfoSize}}, ScalarType::Double, cov)};
}

template <class T>
Solution solve_on_cpu(const Tensor& cov, const Tensor& targets, const Tensor& lam, const OptionalTensor& penalty,
                      double tol, int64_t max_pivots, int64_t capacity) {
  const int64_t n = cov.size(0), num_targets = targets.size(0);
  Tensor packed = nd::empty({n, leading_dimension(n, sizeof(T))}, cov.scalar_type(), cov);
  T* const rows = static_cast<T*>(packed.mutable_data_ptr());
  const double scale =
      nd::cpu::pack_covariance(static_cast<const T*>(cov.const_data_ptr()), n, cov.stride(0), rows, parallel);
  Solution solution = empty_solution(cov, num_targets, capacity);
  const CovlassoArgs<T> args = {rows,
                                n,
                                packed.size(1),
                                static_cast<const int64_t*>(targets.const_data_ptr()),
                                static_cast<const double*>(lam.const_data_ptr()),
                                data_of<T>(penalty),
                                penalty && penalty->dim() == 2 ? n : 0,
                                tol,
                                max_pivots,
                                static_cast<int32_t*>(solution.index.mutable_data_ptr()),
                                static_cast<T*>(solution.value.mutable_data_ptr()),
                                capacity,
                                static_cast<int32_t*>(solution.count.mutable_data_ptr()),
                                static_cast<double*>(solution.info.mutable_data_ptr())};
  nd::cpu::solve_packed(args, num_targets, scale, parallel);
  return solution;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> covlasso_cpu(Tensor cov, Tensor targets, Tensor lam, OptionalTensor penalty,
                                                        double tol, int64_t max_pivots, int64_t capacity) {
  ND_RANGE("covlasso");
  check_arguments(cov, targets, penalty);
  check_solve_arguments(cov, targets, lam, capacity);
  targets = torch::stable::contiguous(targets);
  check_targets(targets, cov.size(0));
  lam = torch::stable::contiguous(lam);
  if (cov.stride(1) != 1) cov = torch::stable::contiguous(cov);
  if (penalty) penalty = torch::stable::contiguous(*penalty);
  const auto solve = cov.scalar_type() == ScalarType::Float ? solve_on_cpu<float> : solve_on_cpu<double>;
  return solve(cov, targets, lam, penalty, tol, max_pivots, capacity).tuple();
}

template <class T>
void lambda_max_on_cpu(const Tensor& cov, const Tensor& targets, const OptionalTensor& penalty, double* out) {
  CovlassoArgs<T> args = {};
  args.cov = static_cast<const T*>(cov.const_data_ptr());
  args.n = cov.size(0);
  args.ld = cov.stride(0);
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.penalty = data_of<T>(penalty);
  args.penalty_stride = penalty && penalty->dim() == 2 ? args.n : 0;
  parallel(targets.size(0), 64,
           [&](int64_t begin, int64_t end) { CovlassoKernels<T>::lambda_max()(args, out, begin, end); });
}

Tensor lambda_max_cpu(Tensor cov, Tensor targets, OptionalTensor penalty) {
  ND_RANGE("lambda_max");
  check_arguments(cov, targets, penalty);
  targets = torch::stable::contiguous(targets);
  check_targets(targets, cov.size(0));
  if (cov.stride(1) != 1) cov = torch::stable::contiguous(cov);
  if (penalty) penalty = torch::stable::contiguous(*penalty);
  Tensor out = nd::empty({targets.size(0)}, ScalarType::Double, cov);
  const auto run = cov.scalar_type() == ScalarType::Float ? lambda_max_on_cpu<float> : lambda_max_on_cpu<double>;
  run(cov, targets, penalty, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

template <class T, class WorkspaceSize, class Solve>
void launch(WorkspaceSize workspace_size, Solve solve, const Tensor& packed, int64_t n, const Tensor& targets,
            const Tensor& lam, const OptionalTensor& penalty, double tol, int64_t max_pivots, int64_t capacity,
            Solution& solution) {
  const int64_t num_targets = targets.size(0);
  const auto bytes = static_cast<int64_t>(workspace_size(n, num_targets));
  Tensor workspace = nd::empty({bytes}, ScalarType::Byte, packed);
  const int code = solve(
      static_cast<const T*>(packed.const_data_ptr()), n, packed.size(1),
      static_cast<const int64_t*>(targets.const_data_ptr()), static_cast<const double*>(lam.const_data_ptr()),
      num_targets, data_of<T>(penalty), penalty && penalty->dim() == 2 ? n : 0, tol, max_pivots,
      static_cast<int32_t*>(solution.index.mutable_data_ptr()), static_cast<T*>(solution.value.mutable_data_ptr()),
      capacity, static_cast<int32_t*>(solution.count.mutable_data_ptr()),
      static_cast<double*>(solution.info.mutable_data_ptr()), workspace.mutable_data_ptr(),
      nd::current_cuda_stream(packed.get_device_index()));
  nd::check_cuda(code, "covlasso");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> covlasso_cuda(Tensor cov, Tensor targets, Tensor lam, OptionalTensor penalty,
                                                         double tol, int64_t max_pivots, int64_t capacity) {
  ND_RANGE("covlasso");
  check_arguments(cov, targets, penalty);
  check_solve_arguments(cov, targets, lam, capacity);
  const torch::stable::accelerator::DeviceGuard guard(cov.get_device_index());
  const int64_t n = cov.size(0);
  const bool single = cov.scalar_type() == ScalarType::Float;
  Tensor packed = torch::stable::new_zeros(cov, {n, leading_dimension(n, single ? 4 : 8)});
  Tensor inner = torch::stable::narrow(packed, 1, 0, n);
  torch::stable::copy_(inner, cov);
  targets = torch::stable::contiguous(targets);
  lam = torch::stable::contiguous(lam);
  if (penalty) penalty = torch::stable::contiguous(*penalty);
  Solution solution = empty_solution(cov, targets.size(0), capacity);
  if (single)
    launch<float>(ND_CUDA(nd_covlasso_workspace_f32), ND_CUDA(nd_covlasso_f32), packed, n, targets, lam, penalty, tol,
                  max_pivots, capacity, solution);
  else
    launch<double>(ND_CUDA(nd_covlasso_workspace_f64), ND_CUDA(nd_covlasso_f64), packed, n, targets, lam, penalty, tol,
                   max_pivots, capacity, solution);
  return solution.tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def(
      "covlasso(Tensor cov, Tensor targets, Tensor lam, Tensor? penalty, float tol, int max_pivots, int capacity)"
      " -> (Tensor value, Tensor index, Tensor count, Tensor info)");
  m.def("lambda_max(Tensor cov, Tensor targets, Tensor? penalty) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("covlasso", TORCH_BOX(&covlasso_cpu));
  m.impl("lambda_max", TORCH_BOX(&lambda_max_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CUDA, m) { m.impl("covlasso", TORCH_BOX(&covlasso_cuda)); }
