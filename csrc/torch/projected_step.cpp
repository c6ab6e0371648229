// Operator of the hot path projected_step: checks and threads.
//
// Kernel: csrc/cpu/projected_step.cpp, with the equations. CUDA tensors go to Triton or the PyTorch reference,
// registered from Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/nvtx.hpp"
#include "parallel.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using nd::cpu::ProjectedStepArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kValuesPerTask = 1 << 15;

// Values of a contiguous copy of x, or of x itself.
const void* values(const char* name, Tensor& x, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  bool fits = x.scalar_type() == dtype && x.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (const int64_t size : sizes) fits = fits && x.size(axis++) == size;
  if (!fits) invalid(std::string(name) + " has a wrong dtype or shape");
  x = torch::stable::contiguous(x);
  return x.const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor> projected_step_cpu(Tensor z, Tensor gradient, Tensor basis, Tensor step,
                                                      std::optional<Tensor> origin, double rho) {
  ND_RANGE("projected_step");
  const ScalarType dtype = z.scalar_type();
  if (z.dim() != 3) invalid("z must be [B, L, d]");
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) invalid("z must be float32 or float64");
  ProjectedStepArgs args = {};
  args.dtype = nd::dtype_of("z", z);
  args.B = z.size(0), args.L = z.size(1), args.d = z.size(2);
  args.R = basis.dim() == 3 ? basis.size(1) : 0;
  args.z = values("z", z, dtype, {args.B, args.L, args.d});
  args.gradient = values("gradient", gradient, dtype, {args.B, args.L, args.d});
  args.basis = values("basis", basis, dtype, {args.L, args.R, args.d});
  args.step = values("step", step, dtype, {args.B});
  if (origin) args.origin = values("origin", *origin, dtype, {args.B, args.L, args.d});
  args.rho = rho;
  Tensor moved = nd::empty({args.B, args.L, args.d}, dtype, z),
         direction = nd::empty({args.B, args.L, args.d}, dtype, z);
  Tensor squared_norm = nd::empty({args.B, args.L}, dtype, z);
  args.moved = moved.mutable_data_ptr();
  args.direction = direction.mutable_data_ptr();
  args.squared_norm = squared_norm.mutable_data_ptr();
  const nd::cpu::Kernels& kernels = nd::cpu::kernels();
  nd::hand_out_ranges(args.B * args.L, std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, args.d)),
                      kernels.projected_step_room(args), [&](int64_t begin, int64_t end, void* workspace) {
                        kernels.projected_step(args, begin, end, workspace);
                      });
  return {moved, direction, squared_norm};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def(
      "projected_step(Tensor z, Tensor gradient, Tensor basis, Tensor step, Tensor? origin, float rho) -> (Tensor "
      "moved, Tensor direction, Tensor squared_norm)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) { m.impl("projected_step", TORCH_BOX(&projected_step_cpu)); }
