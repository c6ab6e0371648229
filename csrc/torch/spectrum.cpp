// Operators of the hot path spectrum: checks, threads, and LAPACK where it is the faster or the only safe way.
//
//   svdvals         singular values of [B, m, n], descending; NaN where a matrix is not finite
//   matrix_rank     their numbers above max(atol, rtol sigma_1) for several rtol; -1 where a matrix is not finite
//   singular_basis  float64 singular values, and singular vectors of the shorter side as rows, of a not in float64
//   svdvals_with_form  svdvals of a not in float64, and the tridiagonal forms that its gradient starts from
//   svdvals_gradient  sum_i g_i u_i v_i' of a not in float64, and which matrices the Gram matrix does not resolve
//
//   svdvals_device, matrix_rank_device  the first two on CUDA, for min(m, n) <= ND_SPECTRUM_LONGEST; Python decides
//   when
//                   a CUDA tensor goes there. The others take float64 too on CUDA, and resolve every matrix.
//
// Kernels: csrc/cpu/spectrum.cpp, csrc/cuda/spectrum.cu.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_library.hpp"
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/cuda_api.h"
#include "neuraldeps/nvtx.hpp"
#include "neuraldeps/spectrum_problem.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using nd::cpu::Dtype;
using nd::cpu::short_side;
using nd::cpu::spectrum_left_to_lapack;
using nd::cpu::SpectrumArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Arguments of the matrices `a` [B, m, n], which may be replaced by a copy with contiguous rows.
SpectrumArgs problem(Tensor& a, bool hermitian) {
  if (a.dim() != 3) invalid("a must be [B, m, n]");
  if (hermitian && a.size(1) != a.size(2)) invalid("a must be square if hermitian");
  const Dtype dtype = nd::dtype_of("a", a);
  // A transposed view has the same singular values.
  if (a.stride(2) != 1 && a.stride(1) == 1 && !hermitian) a = torch::stable::transpose(a, 1, 2);
  if (a.stride(2) != 1) a = torch::stable::contiguous(a);
  SpectrumArgs args = {};
  args.a = a.const_data_ptr();
  args.dtype = dtype;
  args.batch = a.size(0);
  args.m = a.size(1);
  args.n = a.size(2);
  args.batch_stride = a.stride(0);
  args.row_stride = a.stride(1);
  args.hermitian = hermitian;
  return args;
}

// Runs the kernel over the batch, by all threads if that pays.
void run(const SpectrumArgs& args) {
  nd::cpu::run_spectrum(args, torch::stable::get_num_threads(), [](int64_t count, int64_t grain, const auto& f) {
    torch::stable::parallel_for(0, count, grain, f);
  });
}

// a [B, m, n] in float64, with zeros in place of what is not finite, for which LAPACK would raise.
struct FiniteMatrices {
  Tensor matrices;
  std::vector<bool> finite;  // by matrix

  explicit FiniteMatrices(const Tensor& a)
      : matrices(nd::empty({a.size(0), a.size(1), a.size(2)}, ScalarType::Double, a)),
        finite(static_cast<size_t>(a.size(0))) {
    torch::stable::copy_(matrices, a);
    const int64_t size = a.size(1) * a.size(2);
    double* data = static_cast<double*>(matrices.mutable_data_ptr());
    for (size_t b = 0; b < finite.size(); b++, data += size) {
      finite[b] = std::all_of(data, data + size, [](double x) { return std::isfinite(x); });
      if (!finite[b]) std::fill_n(data, size, 0.0);
    }
  }
};

// Result of the operator `name` of one matrix argument and one that is its text option.
template <class Option>
Tensor lapack(const char* name, const Tensor& matrices, const Option& option) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(matrices), torch::stable::detail::from(option)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}
Tensor lapack_svdvals(const Tensor& a) { return lapack("aten::linalg_svdvals", a, std::optional<std::string>()); }
Tensor lapack_eigvalsh(const Tensor& a) { return lapack("aten::linalg_eigvalsh", a, std::string("L")); }

// Singular values [B, k] of a [B, m, n] in a's own precision, at least float32. What is not in float64 has its Gram
// matrix taken in float64, which keeps more digits than LAPACK in float32 and costs less.
Tensor values_by_lapack(const Tensor& a) {
  const bool by_gram = a.scalar_type() != ScalarType::Double;
  const FiniteMatrices from(a);
  const Tensor transposed = torch::stable::transpose(from.matrices, 1, 2);
  Tensor found = !by_gram                 ? lapack_svdvals(from.matrices)
                 : a.size(1) >= a.size(2) ? lapack_eigvalsh(torch::stable::matmul(transposed, from.matrices))
                                          : lapack_eigvalsh(torch::stable::matmul(from.matrices, transposed));
  const int64_t batch = a.size(0), k = found.size(1);
  double* data = static_cast<double*>(found.mutable_data_ptr());
  Tensor values = by_gram ? nd::empty({batch, k}, ScalarType::Float, a) : found;
  for (int64_t b = 0; b < batch; b++, data += k) {
    const bool finite = from.finite[static_cast<size_t>(b)];
    if (!finite) std::fill_n(data, k, std::numeric_limits<double>::quiet_NaN());
    if (!by_gram) continue;
    float* own = static_cast<float*>(values.mutable_data_ptr()) + b * k;
    for (int64_t i = 0; i < k; i++)
      own[i] = static_cast<float>(finite ? std::sqrt(std::max(data[k - 1 - i], 0.0)) : data[i]);
  }
  return values;
}

// Ranks of one matrix from its float64 values in any order, of any sign.
void count_values(const SpectrumArgs& args, const double* values, bool finite, int64_t* rank) {
  const int64_t k = short_side(args);
  double top = 0;
  for (int64_t i = 0; i < k; i++) top = std::max(top, std::fabs(values[i]));
  for (int64_t r = 0; r < args.num_rtol; r++) {
    const double t = std::max(args.atol, args.rtol[r] * top);
    rank[r] = !finite ? -1 : std::count_if(values, values + k, [t](double value) { return std::fabs(value) > t; });
  }
}

// Ranks of matrices [begin, end) from LAPACK's values in float64.
void count_by_lapack(const SpectrumArgs& args, Tensor a, int64_t begin, int64_t end) {
  const FiniteMatrices from(torch::stable::narrow(a, 0, begin, end - begin));
  const Tensor values = args.hermitian ? lapack_eigvalsh(from.matrices) : lapack_svdvals(from.matrices);
  const double* data = static_cast<const double*>(values.const_data_ptr());
  for (int64_t b = begin; b < end; b++)
    count_values(args, data + (b - begin) * short_side(args), from.finite[static_cast<size_t>(b - begin)],
                 args.rank + b * args.num_rtol);
}

Tensor svdvals_cpu(Tensor a) {
  ND_RANGE("svdvals");
  SpectrumArgs args = problem(a, false);
  const ScalarType dtype = args.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  if (args.batch > 0 && short_side(args) > 0 && spectrum_left_to_lapack(args)) return values_by_lapack(a);
  Tensor values = nd::empty({args.batch, short_side(args)}, dtype, a);
  if (values.numel() == 0) return values;
  args.values = values.mutable_data_ptr();
  run(args);
  return values;
}

// The tolerances of args or of NdSpectrumArgs; rtol may be replaced by a contiguous copy.
template <class Args>
void set_tolerances(Args& args, Tensor& rtol, double atol) {
  if (rtol.dim() != 1 || rtol.scalar_type() != ScalarType::Double || !rtol.is_cpu())
    invalid("rtol must be float64 [R] on the CPU");
  rtol = torch::stable::contiguous(rtol);
  args.rtol = static_cast<const double*>(rtol.const_data_ptr());
  args.num_rtol = rtol.numel();
  args.atol = atol;
  for (int64_t r = 0; r < args.num_rtol; r++) {
    if (!(args.rtol[r] >= 0)) invalid("rtol must not be negative or NaN, not " + std::to_string(args.rtol[r]));
  }
  if (!(atol >= 0)) invalid("atol must not be negative or NaN, not " + std::to_string(atol));
}

Tensor matrix_rank_cpu(Tensor a, Tensor rtol, double atol, bool hermitian) {
  ND_RANGE("matrix_rank");
  SpectrumArgs args = problem(a, hermitian);
  set_tolerances(args, rtol, atol);
  Tensor rank = nd::empty({args.batch, args.num_rtol}, ScalarType::Long, a);
  args.rank = static_cast<int64_t*>(rank.mutable_data_ptr());
  if (rank.numel() == 0) return rank;
  if (short_side(args) == 0) return torch::stable::zero_(rank);
  if (spectrum_left_to_lapack(args)) {
    count_by_lapack(args, a, 0, args.batch);
    return rank;
  }
  run(args);
  for (int64_t b = 0; b < args.batch; b++) {
    const int64_t* own = args.rank + b * args.num_rtol;
    if (std::find(own, own + args.num_rtol, nd::cpu::kRankUndecided) != own + args.num_rtol)
      count_by_lapack(args, a, b, b + 1);
  }
  return rank;
}

void check_not_float64(const SpectrumArgs& args) {
  if (args.dtype == Dtype::kFloat64) invalid("a must be float32, bfloat16 or float16 here");
}

std::tuple<Tensor, Tensor> singular_basis_cpu(Tensor a) {
  ND_RANGE("singular_basis");
  SpectrumArgs args = problem(a, false);
  check_not_float64(args);
  const int64_t k = short_side(args);
  Tensor values = nd::empty({args.batch, k}, ScalarType::Double, a);
  Tensor basis = nd::empty({args.batch, k, k}, ScalarType::Double, a);
  if (values.numel() == 0) return {values, basis};
  args.values = values.mutable_data_ptr();
  args.basis = static_cast<double*>(basis.mutable_data_ptr());
  run(args);
  return {values, basis};
}

std::tuple<Tensor, Tensor> svdvals_with_form_cpu(Tensor a) {
  ND_RANGE("svdvals_with_form");
  if (a.dim() == 3 && a.stride(2) != 1) a = torch::stable::contiguous(a);  // not its transpose: as in the gradient
  SpectrumArgs args = problem(a, false);
  check_not_float64(args);
  const int64_t k = short_side(args);
  Tensor values = nd::empty({args.batch, k}, ScalarType::Float, a);
  Tensor form = nd::empty({nd::cpu::spectrum_forms(args.batch, k)}, ScalarType::Double, a);
  if (values.numel() == 0) return {values, form};
  args.values = values.mutable_data_ptr();
  args.forms = static_cast<double*>(form.mutable_data_ptr());
  run(args);
  return {values, form};
}

void check_gradient(const Tensor& grad, const Tensor& a, ScalarType dtype) {
  if (grad.dim() != 2 || grad.size(0) != a.size(0) || grad.size(1) != std::min(a.size(1), a.size(2)) ||
      grad.scalar_type() != dtype)
    invalid("grad must be [B, min(m, n)] beside a [B, m, n], float64 for float64 a, else float32");
}

std::tuple<Tensor, Tensor> svdvals_gradient_cpu(Tensor grad, Tensor a, std::optional<Tensor> form) {
  ND_RANGE("svdvals_gradient");
  if (a.dim() == 3 && a.stride(2) != 1) a = torch::stable::contiguous(a);  // the result has the layout of a
  SpectrumArgs args = problem(a, false);
  check_not_float64(args);
  check_gradient(grad, a, ScalarType::Float);
  grad = torch::stable::contiguous(grad);
  if (form) {
    if (form->dim() != 1 || form->numel() != nd::cpu::spectrum_forms(args.batch, short_side(args)) ||
        form->scalar_type() != ScalarType::Double || form->stride(0) != 1)
      invalid("form must be that of svdvals_with_form of the same a");
    if (reinterpret_cast<uintptr_t>(form->const_data_ptr()) % 64) {  // a hook on saved tensors may have moved it
      Tensor aligned = nd::empty({form->numel()}, ScalarType::Double, a);
      torch::stable::copy_(aligned, *form);
      form = aligned;
    }
    args.forms = static_cast<double*>(form->mutable_data_ptr());
  }
  Tensor gradient = nd::empty({args.batch, args.m, args.n}, ScalarType::Float, a);
  Tensor unresolved = nd::empty({args.batch}, ScalarType::Bool, a);
  if (gradient.numel() == 0) return {gradient, torch::stable::zero_(unresolved)};
  args.value_gradient = static_cast<const float*>(grad.const_data_ptr());
  args.gradient = static_cast<float*>(gradient.mutable_data_ptr());
  args.unresolved = static_cast<bool*>(unresolved.mutable_data_ptr());
  run(args);
  return {gradient, unresolved};
}

// ---- CUDA: nothing waits for the device ----

// Arguments of the matrices `a` as by problem().
NdSpectrumArgs device_problem(Tensor& a, bool hermitian) {
  const SpectrumArgs host = problem(a, hermitian);
  if (short_side(host) > ND_SPECTRUM_LONGEST)
    invalid("min(m, n) must be at most " + std::to_string(ND_SPECTRUM_LONGEST) + " on CUDA");
  NdSpectrumArgs args = {};
  args.a = host.a;
  args.dtype = static_cast<int32_t>(host.dtype);  // numbered alike
  args.batch = host.batch;
  args.m = host.m;
  args.n = host.n;
  args.batch_stride = host.batch_stride;
  args.row_stride = host.row_stride;
  args.hermitian = hermitian;
  return args;
}

ScalarType value_type(const Tensor& a) {
  return a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void run_on_device(const NdSpectrumArgs& args, const Tensor& a) {
  const auto bytes = static_cast<int64_t>(ND_CUDA(nd_spectrum_workspace)(&args));
  Tensor workspace = nd::empty({bytes}, ScalarType::Byte, a);
  void* const stream = nd::current_cuda_stream(a.get_device_index());
  nd::check_cuda(ND_CUDA(nd_spectrum)(&args, workspace.mutable_data_ptr(), stream), "spectrum");
}

Tensor svdvals_cuda(Tensor a) {
  ND_RANGE("svdvals");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  NdSpectrumArgs args = device_problem(a, false);
  Tensor values = nd::empty({args.batch, std::min(args.m, args.n)}, value_type(a), a);
  if (values.numel() == 0) return values;
  args.values = values.mutable_data_ptr();
  run_on_device(args, a);
  return values;
}

Tensor matrix_rank_cuda(Tensor a, Tensor rtol, double atol, bool hermitian) {
  ND_RANGE("matrix_rank");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  NdSpectrumArgs args = device_problem(a, hermitian);
  set_tolerances(args, rtol, atol);
  Tensor rank = nd::empty({args.batch, args.num_rtol}, ScalarType::Long, a);
  if (rank.numel() == 0) return rank;
  if (std::min(args.m, args.n) == 0) return torch::stable::zero_(rank);
  args.rank = static_cast<int64_t*>(rank.mutable_data_ptr());
  run_on_device(args, a);
  return rank;
}

std::tuple<Tensor, Tensor> singular_basis_cuda(Tensor a) {
  ND_RANGE("singular_basis");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  NdSpectrumArgs args = device_problem(a, false);
  const int64_t k = std::min(args.m, args.n);
  Tensor values = nd::empty({args.batch, k}, ScalarType::Double, a);
  Tensor basis = nd::empty({args.batch, k, k}, ScalarType::Double, a);
  if (values.numel() == 0) return {values, basis};
  args.values = values.mutable_data_ptr();
  args.basis = static_cast<double*>(basis.mutable_data_ptr());
  run_on_device(args, a);
  return {values, basis};
}

std::tuple<Tensor, Tensor> svdvals_gradient_cuda(Tensor grad, Tensor a, std::optional<Tensor> form) {
  ND_RANGE("svdvals_gradient");
  if (form) invalid("form must be None on CUDA");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  if (a.dim() == 3 && a.stride(2) != 1) a = torch::stable::contiguous(a);  // the result has the layout of a
  NdSpectrumArgs args = device_problem(a, false);
  check_gradient(grad, a, value_type(a));
  grad = torch::stable::contiguous(grad);
  Tensor gradient = nd::empty({args.batch, args.m, args.n}, value_type(a), a);
  Tensor unresolved = nd::empty({args.batch}, ScalarType::Bool, a);
  torch::stable::zero_(unresolved);
  if (gradient.numel() == 0) return {gradient, unresolved};
  args.value_gradient = grad.const_data_ptr();
  args.gradient = gradient.mutable_data_ptr();
  run_on_device(args, a);
  return {gradient, unresolved};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def("svdvals(Tensor a) -> Tensor");
  m.def("svdvals_device(Tensor a) -> Tensor");
  m.def("matrix_rank_device(Tensor a, Tensor rtol, float atol, bool hermitian) -> Tensor");
  m.def("matrix_rank(Tensor a, Tensor rtol, float atol, bool hermitian) -> Tensor");
  m.def("singular_basis(Tensor a) -> (Tensor values, Tensor basis)");
  m.def("svdvals_with_form(Tensor a) -> (Tensor values, Tensor form)");
  m.def("svdvals_gradient(Tensor grad, Tensor a, Tensor? form=None) -> (Tensor gradient, Tensor unresolved)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("svdvals", TORCH_BOX(&svdvals_cpu));
  m.impl("matrix_rank", TORCH_BOX(&matrix_rank_cpu));
  m.impl("singular_basis", TORCH_BOX(&singular_basis_cpu));
  m.impl("svdvals_with_form", TORCH_BOX(&svdvals_with_form_cpu));
  m.impl("svdvals_gradient", TORCH_BOX(&svdvals_gradient_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CUDA, m) {
  m.impl("svdvals_device", TORCH_BOX(&svdvals_cuda));
  m.impl("matrix_rank_device", TORCH_BOX(&matrix_rank_cuda));
  m.impl("singular_basis", TORCH_BOX(&singular_basis_cuda));
  m.impl("svdvals_gradient", TORCH_BOX(&svdvals_gradient_cuda));
}
