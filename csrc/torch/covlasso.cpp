// Operators of the hot path covlasso: checks of shapes and types, memory, dispatch.
//
//   covlasso        T independent problems from one covariance, each at one lam or along a path of them
//   covlasso_top_k  the same at a lam that gives k nonzeros
//   lambda_max      the smallest lam of each target at which no category is left
//
// The kernels are csrc/cpu/covlasso.cpp and csrc/cuda/covlasso.cu.
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

// The covariances of a call: S [n, n], or [T, n, n] with one matrix a target, and covariances of the targets with its
// categories: rows of S, or of cross [m, n], whose variances [m] come along. In the layout of the kernels rows of S and
// of cross are longer than n.
struct Covariance {
  Tensor cov;
  OptionalTensor cross, variance;

  int64_t n() const { return cov.size(-2); }
  int64_t columns() const { return cov.size(-1); }
  int64_t rows() const { return cross ? cross->size(0) : cov.size(-2); }
  bool batched() const { return cov.dim() == 3; }
  bool single() const { return cov.scalar_type() == ScalarType::Float; }
};

// What a solution must satisfy besides lam.
struct Options {
  OptionalTensor penalty;
  double tol;
  int64_t max_pivots, capacity;
  bool nonnegative;
  double ridge;
};

struct Start {
  OptionalTensor value, index, count;
};

void check_same(const char* name, const Tensor& x, const Tensor& cov, ScalarType dtype, const char* dtype_name) {
  if (x.scalar_type() != dtype) invalid(std::string(name) + " must be " + dtype_name);
  if (x.device() != cov.device()) invalid(std::string(name) + " and cov must be on one device");
}

void check_square(const Covariance& c) {
  const bool square = (c.cov.dim() == 2 || c.cov.dim() == 3) && c.n() == c.columns();
  if (!square) invalid("cov must be a square matrix [n, n] or matrices [T, n, n], not " + shape_of(c.cov));
}

void check_covariance(const Covariance& c, int64_t num_targets) {
  const Tensor& cov = c.cov;
  if (c.n() > INT32_MAX - 1024)
    invalid("cov has " + std::to_string(c.n()) + " rows; at most 2^31 - 1025 are supported");
  if (cov.scalar_type() != ScalarType::Float && cov.scalar_type() != ScalarType::Double)
    invalid("cov must be float32 or float64");
  if (c.batched() && (!c.cross || cov.size(0) != num_targets))
    invalid("cov [T, n, n] needs cross, and one matrix a target; it is " + shape_of(cov) + " for " +
            std::to_string(num_targets) + " targets");
  if (c.cross.has_value() != c.variance.has_value()) invalid("cross and variance must be given together");
  if (!c.cross) return;
  check_same("cross", *c.cross, cov, cov.scalar_type(), "of the dtype of cov");
  check_same("variance", *c.variance, cov, ScalarType::Double, "float64");
  if (c.cross->dim() != 2 || c.cross->size(1) != c.columns())
    invalid("cross must be [m, " + std::to_string(c.columns()) + "], not " + shape_of(*c.cross));
  if (c.variance->dim() != 1 || c.variance->size(0) != c.cross->size(0))
    invalid("variance must be [" + std::to_string(c.cross->size(0)) + "], not " + shape_of(*c.variance));
}

void check_problem(const Covariance& c, const Tensor& targets, const OptionalTensor& penalty) {
  if (targets.dim() != 1 || targets.scalar_type() != ScalarType::Long) invalid("targets must be int64 [T]");
  if (targets.device() != c.cov.device()) invalid("targets and cov must be on one device");
  check_covariance(c, targets.size(0));
  if (!penalty) return;
  const bool shaped = penalty->dim() == 1
                          ? penalty->size(0) == c.n()
                          : penalty->dim() == 2 && penalty->size(0) == targets.size(0) && penalty->size(1) == c.n();
  if (!shaped) invalid("penalty must be [n] or [T, n], not " + shape_of(*penalty));
  check_same("penalty", *penalty, c.cov, c.cov.scalar_type(), "of the dtype of cov");
}

void check_options(const Options& options) {
  if (!(options.tol > 0)) invalid("tol must be positive, not " + std::to_string(options.tol));
  if (options.capacity < 0) invalid("capacity must not be negative, not " + std::to_string(options.capacity));
  if (!(options.ridge >= 0) || options.ridge > 1e300)
    invalid("ridge must be finite and not negative, not " + std::to_string(options.ridge));
}

void check_lam(const Tensor& lam, const Tensor& targets) {
  const bool shaped = (lam.dim() == 1 || (lam.dim() == 2 && lam.size(1) > 0)) && lam.size(0) == targets.size(0);
  if (!shaped || lam.scalar_type() != ScalarType::Double)
    invalid("lam must be float64 [T] or [T, L], not " + shape_of(lam));
  if (lam.device() != targets.device()) invalid("lam and cov must be on one device");
}

void check_start(const Start& start, const Covariance& c, int64_t num_targets) {
  if (!start.value && !start.index && !start.count) return;
  if (!start.value || !start.index || !start.count)
    invalid("start_value, start_index and start_count must be given together");
  check_same("start_value", *start.value, c.cov, c.cov.scalar_type(), "of the dtype of cov");
  check_same("start_index", *start.index, c.cov, ScalarType::Int, "int32");
  check_same("start_count", *start.count, c.cov, ScalarType::Int, "int32");
  if (start.value->dim() != 2 || start.value->size(0) != num_targets)
    invalid("start_value must be [T, c], not " + shape_of(*start.value));
  if (start.index->dim() != 2 || start.index->size(0) != num_targets || start.index->size(1) != start.value->size(1))
    invalid("start_index must have the shape of start_value, not " + shape_of(*start.index));
  if (start.count->dim() != 1 || start.count->size(0) != num_targets)
    invalid("start_count must be [T], not " + shape_of(*start.count));
}

template <class T>
const T* data_of(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

Tensor dense(const Tensor& x) { return torch::stable::contiguous(x); }
OptionalTensor dense(const OptionalTensor& x) { return x ? OptionalTensor(dense(*x)) : x; }

// Rows of contiguous values; matrices and rows may lie apart.
Tensor rows_dense(const Tensor& x) { return x.stride(-1) == 1 ? x : dense(x); }

struct Solution {
  Tensor value, index, count, info;
  std::tuple<Tensor, Tensor, Tensor, Tensor> tuple() const { return {value, index, count, info}; }
};

// Results shaped as lam: [T, ...] or [T, L, ...].
Solution empty_solution(const Tensor& cov, const Tensor& lam, int64_t capacity) {
  const int64_t T = lam.size(0), fields = kCovlassoInfoSize;
  const ScalarType dtype = cov.scalar_type();
  if (lam.dim() == 1)
    return {nd::empty({T, capacity}, dtype, cov), nd::empty({T, capacity}, ScalarType::Int, cov),
            nd::empty({T}, ScalarType::Int, cov), nd::empty({T, fields}, ScalarType::Double, cov)};
  const int64_t L = lam.size(1);
  return {nd::empty({T, L, capacity}, dtype, cov), nd::empty({T, L, capacity}, ScalarType::Int, cov),
          nd::empty({T, L}, ScalarType::Int, cov), nd::empty({T, L, fields}, ScalarType::Double, cov)};
}

// ----------------------------------------------------------------------------------------------------------------- CPU

// A covariance in the solver's layout: the caller's own memory where that has it.
template <class T>
struct Packed {
  Tensor cov, cross, variance;
  double scale, variance_bound;
};

template <class T>
Packed<T> pack(const Covariance& c, double ridge) {
  const int64_t n = c.n(), ld = leading_dimension(n, sizeof(T)), count = c.batched() ? c.cov.size(0) : 1;
  const Tensor cov = rows_dense(c.cov);
  const T* const values = static_cast<const T*>(cov.const_data_ptr());
  const nd::cpu::Covariances<T> covs = {values, count, n, c.batched() ? cov.stride(0) : 0, cov.stride(-2)};
  Packed<T> packed = {cov, cov, cov, 1, nd::cpu::bound_in_place(covs, ridge, parallel)};
  if (!packed.variance_bound) {
    packed.cov = nd::empty({count, n, ld}, cov.scalar_type(), cov);
    const auto [scale, variance_bound] =
        nd::cpu::pack_covariances(covs, ridge, static_cast<T*>(packed.cov.mutable_data_ptr()), parallel);
    packed.scale = scale;
    packed.variance_bound = variance_bound;
  }
  if (!c.cross) {  // the diagonal, as the ridge may drown it in the packed one
    packed.variance = nd::empty({n}, ScalarType::Double, cov);
    double* const variance = static_cast<double*>(packed.variance.mutable_data_ptr());
    for (int64_t i = 0; i < n; i++) variance[i] = values[i * (covs.stride + 1)];
    return packed;
  }
  const Tensor cross = rows_dense(*c.cross);
  packed.variance = dense(*c.variance);
  nd::cpu::check_variance(static_cast<const double*>(packed.variance.const_data_ptr()), c.rows());
  packed.cross = nd::empty({c.rows(), ld}, cov.scalar_type(), cov);
  nd::cpu::pack_cross(static_cast<const T*>(cross.const_data_ptr()), c.rows(), n, cross.stride(0), packed.scale,
                      static_cast<T*>(packed.cross.mutable_data_ptr()));
  return packed;
}

// The fields that all solves share; lam, num_lams and the start are the caller's.
template <class T>
CovlassoArgs<T> arguments(const Covariance& c, const Packed<T>& packed, const Tensor& targets, const Options& options,
                          Solution& solution) {
  CovlassoArgs<T> args = {};
  args.cov = static_cast<const T*>(packed.cov.const_data_ptr());
  args.n = c.n();
  args.ld = packed.cov.size(-1);
  args.cov_stride = c.batched() ? args.n * args.ld : 0;
  if (c.cross) args.cross = static_cast<const T*>(packed.cross.const_data_ptr());
  args.variance = static_cast<const double*>(packed.variance.const_data_ptr());
  args.variance_bound = packed.variance_bound;
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.num_lams = 1;
  args.penalty = data_of<T>(options.penalty);
  args.penalty_stride = options.penalty && options.penalty->dim() == 2 ? args.n : 0;
  args.nonnegative = options.nonnegative;
  args.ridge = options.ridge;
  args.tol = options.tol;
  args.max_pivots = options.max_pivots;
  args.index = static_cast<int32_t*>(solution.index.mutable_data_ptr());
  args.value = static_cast<T*>(solution.value.mutable_data_ptr());
  args.capacity = options.capacity;
  args.count = static_cast<int32_t*>(solution.count.mutable_data_ptr());
  args.info = static_cast<double*>(solution.info.mutable_data_ptr());
  return args;
}

template <class T>
Solution solve_on_cpu(const Covariance& c, const Tensor& targets, const Tensor& lam, const Start& start,
                      const Options& options) {
  Solution solution = empty_solution(c.cov, lam, options.capacity);
  const int64_t num_targets = targets.size(0);
  if (num_targets == 0) return solution;
  const Packed<T> packed = pack<T>(c, options.ridge);
  CovlassoArgs<T> args = arguments(c, packed, targets, options, solution);
  args.lam = static_cast<const double*>(lam.const_data_ptr());
  args.num_lams = lam.dim() == 2 ? lam.size(1) : 1;
  args.start_index = data_of<int32_t>(start.index);
  args.start_value = data_of<T>(start.value);
  args.start_count = data_of<int32_t>(start.count);
  args.start_capacity = start.value ? start.value->size(1) : 0;
  nd::cpu::solve_scaled(args, num_targets, c.rows(), packed.scale, [&](const CovlassoArgs<T>& scaled) {
    parallel(num_targets, 1, [&](int64_t begin, int64_t end) { CovlassoKernels<T>::solve()(scaled, begin, end); });
  });
  return solution;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> covlasso_cpu(Tensor cov, Tensor targets, Tensor lam, OptionalTensor penalty,
                                                        double tol, int64_t max_pivots, int64_t capacity,
                                                        OptionalTensor cross, OptionalTensor variance, bool nonnegative,
                                                        double ridge, OptionalTensor start_value,
                                                        OptionalTensor start_index, OptionalTensor start_count) {
  ND_RANGE("covlasso");
  const Covariance c = {cov, cross, variance};
  const Options options = {dense(penalty), tol, max_pivots, capacity, nonnegative, ridge};
  const Start start = {dense(start_value), dense(start_index), dense(start_count)};
  check_square(c);
  check_problem(c, targets, options.penalty);
  check_lam(lam, targets);
  check_options(options);
  check_start(start, c, targets.size(0));
  targets = dense(targets);
  nd::cpu::check_targets(static_cast<const int64_t*>(targets.const_data_ptr()), targets.size(0), c.rows());
  const auto solve = c.single() ? solve_on_cpu<float> : solve_on_cpu<double>;
  return solve(c, targets, dense(lam), start, options).tuple();
}

void check_top_k(const Covariance& c, int64_t k, double position) {
  if (c.single()) invalid("cov must be float64: the path is followed in float64");
  if (k < 1) invalid("k must be at least 1, not " + std::to_string(k));
  if (!(position > 0 && position < 1)) invalid("position must be between 0 and 1, not " + std::to_string(position));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> covlasso_top_k_cpu(Tensor cov, Tensor targets, int64_t k,
                                                                      OptionalTensor penalty, double tol,
                                                                      int64_t max_pivots, double position,
                                                                      OptionalTensor cross, OptionalTensor variance,
                                                                      bool nonnegative, double ridge) {
  ND_RANGE("covlasso_top_k");
  const Covariance c = {cov, cross, variance};
  const Options options = {dense(penalty), tol, max_pivots, k, nonnegative, ridge};
  check_square(c);
  check_problem(c, targets, options.penalty);
  check_options(options);
  check_top_k(c, k, position);
  targets = dense(targets);
  const int64_t num_targets = targets.size(0);
  nd::cpu::check_targets(static_cast<const int64_t*>(targets.const_data_ptr()), num_targets, c.rows());
  Tensor lam = nd::empty({num_targets}, ScalarType::Double, cov);
  Solution solution = empty_solution(cov, lam, k);
  if (num_targets) {
    const Packed<double> packed = pack<double>(c, ridge);
    double* const lams = static_cast<double*>(lam.mutable_data_ptr());
    const nd::cpu::CovlassoTopK wanted = {k, position, lams};
    nd::cpu::solve_scaled(arguments(c, packed, targets, options, solution), num_targets, c.rows(), packed.scale,
                          [&](const CovlassoArgs<double>& scaled) {
                            parallel(num_targets, 1, [&](int64_t begin, int64_t end) {
                              nd::cpu::kernels().covlasso_top_k_f64(scaled, wanted, begin, end);
                            });
                          });
    for (int64_t t = 0; t < num_targets; t++) lams[t] /= packed.scale;
  }
  return {solution.value, solution.index, solution.count, solution.info, lam};
}

template <class T>
void lambda_max_on_cpu(const Covariance& c, const Tensor& targets, const OptionalTensor& penalty, bool nonnegative,
                       double* out) {
  const Tensor rows = rows_dense(c.cross ? *c.cross : c.cov);
  CovlassoArgs<T> args = {};
  (c.cross ? args.cross : args.cov) = static_cast<const T*>(rows.const_data_ptr());
  args.n = c.n();
  args.ld = rows.stride(0);
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.penalty = data_of<T>(penalty);
  args.penalty_stride = penalty && penalty->dim() == 2 ? args.n : 0;
  args.nonnegative = nonnegative;
  parallel(targets.size(0), 64,
           [&](int64_t begin, int64_t end) { CovlassoKernels<T>::lambda_max()(args, out, begin, end); });
}

// cov is read for its shape only where cross is given.
Tensor lambda_max_cpu(Tensor cov, Tensor targets, OptionalTensor penalty, OptionalTensor cross, bool nonnegative) {
  ND_RANGE("lambda_max");
  OptionalTensor variance;
  if (cross) variance = nd::empty({cross->size(0)}, ScalarType::Double, *cross);
  const Covariance c = {cov, cross, variance};
  check_square(c);
  check_problem(c, targets, penalty);
  targets = dense(targets);
  nd::cpu::check_targets(static_cast<const int64_t*>(targets.const_data_ptr()), targets.size(0), c.rows());
  Tensor out = nd::empty({targets.size(0)}, ScalarType::Double, cov);
  const auto run = c.single() ? lambda_max_on_cpu<float> : lambda_max_on_cpu<double>;
  run(c, targets, dense(penalty), nonnegative, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

// ---------------------------------------------------------------------------------------------------------------- CUDA

// The private operators below take covariances that ops/covlasso.py has put into the layout of the kernels on the
// device: rows of whole 64-byte lines, padded with zeros, scaled by *scale, with the ridge on the diagonal.

NdCovlassoArgs device_arguments(const Covariance& c, const Tensor& scale, const Tensor& targets, const Options& options,
                                Solution& solution) {
  NdCovlassoArgs args = {};
  args.cov = c.cov.const_data_ptr();
  args.n = c.n();
  args.ld = c.columns();
  args.cov_stride = c.batched() ? args.n * args.ld : 0;
  args.cross = c.cross ? c.cross->const_data_ptr() : nullptr;
  args.variance = data_of<double>(c.variance);
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.num_targets = targets.size(0);
  args.num_lams = 1;
  args.penalty = options.penalty ? options.penalty->const_data_ptr() : nullptr;
  args.penalty_stride = options.penalty && options.penalty->dim() == 2 ? args.n : 0;
  args.ridge = options.ridge;
  args.scale = static_cast<const double*>(scale.const_data_ptr());
  args.nonnegative = options.nonnegative;
  args.tol = options.tol;
  args.max_pivots = options.max_pivots;
  args.index = static_cast<int32_t*>(solution.index.mutable_data_ptr());
  args.value = solution.value.mutable_data_ptr();
  args.capacity = options.capacity;
  args.count = static_cast<int32_t*>(solution.count.mutable_data_ptr());
  args.info = static_cast<double*>(solution.info.mutable_data_ptr());
  return args;
}

Tensor workspace_for(size_t bytes, const Tensor& like) {
  return nd::empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, like);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> covlasso_packed_cuda(Tensor cov, Tensor scale, Tensor targets, Tensor lam,
                                                                OptionalTensor penalty, double tol, int64_t max_pivots,
                                                                int64_t capacity, OptionalTensor cross,
                                                                OptionalTensor variance, bool nonnegative, double ridge,
                                                                OptionalTensor start_value, OptionalTensor start_index,
                                                                OptionalTensor start_count) {
  ND_RANGE("covlasso");
  const torch::stable::accelerator::DeviceGuard guard(cov.get_device_index());
  const Covariance c = {cov, cross, dense(variance)};
  const Options options = {dense(penalty), tol, max_pivots, capacity, nonnegative, ridge};
  const Start start = {dense(start_value), dense(start_index), dense(start_count)};
  check_problem(c, targets, options.penalty);
  check_lam(lam, targets);
  check_options(options);
  check_start(start, c, targets.size(0));
  targets = dense(targets);
  lam = dense(lam);
  Solution solution = empty_solution(cov, lam, capacity);
  NdCovlassoArgs args = device_arguments(c, scale, targets, options, solution);
  args.lam = static_cast<const double*>(lam.const_data_ptr());
  args.num_lams = lam.dim() == 2 ? lam.size(1) : 1;
  args.start_value = start.value ? start.value->const_data_ptr() : nullptr;
  args.start_index = data_of<int32_t>(start.index);
  args.start_count = data_of<int32_t>(start.count);
  args.start_capacity = start.value ? start.value->size(1) : 0;
  void* const stream = nd::current_cuda_stream(cov.get_device_index());
  const auto size = c.single() ? ND_CUDA(nd_covlasso_workspace_f32) : ND_CUDA(nd_covlasso_workspace_f64);
  const auto solve = c.single() ? ND_CUDA(nd_covlasso_f32) : ND_CUDA(nd_covlasso_f64);
  Tensor workspace = workspace_for(size(&args), cov);
  nd::check_cuda(solve(&args, workspace.mutable_data_ptr(), stream), "covlasso");
  return solution.tuple();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> covlasso_top_k_packed_cuda(
    Tensor cov, Tensor scale, Tensor targets, int64_t k, OptionalTensor penalty, double tol, int64_t max_pivots,
    double position, OptionalTensor cross, OptionalTensor variance, bool nonnegative, double ridge) {
  ND_RANGE("covlasso_top_k");
  const torch::stable::accelerator::DeviceGuard guard(cov.get_device_index());
  const Covariance c = {cov, cross, dense(variance)};
  const Options options = {dense(penalty), tol, max_pivots, k, nonnegative, ridge};
  check_problem(c, targets, options.penalty);
  check_options(options);
  check_top_k(c, k, position);
  targets = dense(targets);
  Tensor lam = nd::empty({targets.size(0)}, ScalarType::Double, cov);
  Solution solution = empty_solution(cov, lam, k);
  const NdCovlassoArgs args = device_arguments(c, scale, targets, options, solution);
  Tensor workspace = workspace_for(ND_CUDA(nd_covlasso_workspace_f64)(&args), cov);
  const int code =
      ND_CUDA(nd_covlasso_top_k_f64)(&args, k, position, static_cast<double*>(lam.mutable_data_ptr()),
                                     workspace.mutable_data_ptr(), nd::current_cuda_stream(cov.get_device_index()));
  nd::check_cuda(code, "covlasso_top_k");
  return {solution.value, solution.index, solution.count, solution.info, lam};
}

}  // namespace

// ND_OPTIONS and ND_START: what the operators share after their own arguments.
#define ND_OPTIONS "Tensor? cross=None, Tensor? variance=None, bool nonnegative=False, float ridge=0.0"
#define ND_START ", Tensor? start_value=None, Tensor? start_index=None, Tensor? start_count=None"
#define ND_SOLUTION " -> (Tensor value, Tensor index, Tensor count, Tensor info"

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def(
      "covlasso(Tensor cov, Tensor targets, Tensor lam, Tensor? penalty, float tol, int max_pivots, int capacity, "
      "" ND_OPTIONS ND_START ")" ND_SOLUTION ")");
  m.def(
      "covlasso_top_k(Tensor cov, Tensor targets, int k, Tensor? penalty, float tol, int max_pivots, float position, "
      "" ND_OPTIONS ")" ND_SOLUTION ", Tensor lam)");
  m.def(
      "lambda_max(Tensor cov, Tensor targets, Tensor? penalty, Tensor? cross=None, bool nonnegative=False)"
      " -> Tensor");
  m.def(
      "covlasso_packed(Tensor cov, Tensor scale, Tensor targets, Tensor lam, Tensor? penalty, float tol, "
      "int max_pivots, int capacity, " ND_OPTIONS ND_START ")" ND_SOLUTION ")");
  m.def(
      "covlasso_top_k_packed(Tensor cov, Tensor scale, Tensor targets, int k, Tensor? penalty, float tol, "
      "int max_pivots, float position, " ND_OPTIONS ")" ND_SOLUTION ", Tensor lam)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("covlasso", TORCH_BOX(&covlasso_cpu));
  m.impl("covlasso_top_k", TORCH_BOX(&covlasso_top_k_cpu));
  m.impl("lambda_max", TORCH_BOX(&lambda_max_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CUDA, m) {
  m.impl("covlasso_packed", TORCH_BOX(&covlasso_packed_cuda));
  m.impl("covlasso_top_k_packed", TORCH_BOX(&covlasso_top_k_packed_cuda));
}
