// Operator of the hot path closed_form_discriminator: checks, threads and the root of the JS game.
//
// Kernels: csrc/cpu/closed_form_discriminator.cpp, with the equations. CUDA tensors go to Triton or the PyTorch
// reference, registered from Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/nvtx.hpp"
#include "parallel.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using nd::cpu::DiscriminatorArgs;
using nd::cpu::kDiscriminatorBlock;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kLargestShare = 1 - 1e-6;  // s of a sample; beyond it mass escapes from the samples
constexpr int kMostSteps = 100;             // the hardest of our tests take 12

struct Solver {
  DiscriminatorArgs args;
  const nd::cpu::Kernels& kernels = nd::cpu::kernels();

  int64_t blocks() const { return (args.N + kDiscriminatorBlock - 1) / kDiscriminatorBlock; }

  template <class F>
  void over_blocks(const F& run) const {
    torch::stable::parallel_for(0, blocks(), 1, run);
  }

  double least_penalty() const {
    over_blocks([&](int64_t begin, int64_t end) { kernels.discriminator_minimum(args, begin, end); });
    double lowest = args.partial[0];
    for (int64_t b = 1; b < blocks(); b++)  // NaN wins
      if (!(args.partial[2 * b] >= lowest)) lowest = std::isnan(lowest) ? lowest : args.partial[2 * b];
    return lowest;
  }

  double mean_tilt(double lowest) const {
    over_blocks([&](int64_t begin, int64_t end) { kernels.discriminator_tilt(args, lowest, begin, end); });
    double sum = 0;
    for (int64_t b = 0; b < blocks(); b++) sum += args.partial[2 * b];
    return sum / static_cast<double>(args.N);
  }

  // Where Newton's iteration goes from r, for 1 / mean(1 / (r + e)) = (1 + r) / 2 over the samples before `end`.
  double newton(double r, int64_t end) const {
    DiscriminatorArgs some = args;
    some.N = end;
    const int64_t count = (end + kDiscriminatorBlock - 1) / kDiscriminatorBlock;
    torch::stable::parallel_for(0, count, 1, [&](int64_t b, int64_t e) { kernels.discriminator_sums(some, r, b, e); });
    double first = 0, second = 0;
    for (int64_t b = 0; b < count; b++) first += args.partial[2 * b], second += args.partial[2 * b + 1];
    const double n = static_cast<double>(end), h = first / n;
    return r - (1 / h - (1 + r) / 2) / (second / n / (h * h) - 0.5);
  }

  // Climbs to the root from `start`, after at most one step that falls to its left.
  double root(double start, int64_t end) const {
    const double tolerance = args.dtype == nd::cpu::Dtype::kFloat64 ? 1e-15 : 1e-8;
    const double least = std::max(1 / kLargestShare - 1, 1 / (2 * static_cast<double>(end) - 1));
    double r = start;
    for (int step = 0; step < kMostSteps; step++) {
      const double next = std::max(newton(r, end), least);
      const bool settled = !(std::abs(next - r) > tolerance * r) || (step > 0 && next < r);
      r = next;
      if (settled) break;
    }
    return r;
  }
};

std::tuple<Tensor, Tensor, Tensor> closed_form_discriminator_cpu(Tensor penalty, double eta, std::string game) {
  ND_RANGE("closed_form_discriminator");
  if (penalty.dim() != 1 || penalty.numel() == 0) invalid("penalty must be [N] with N > 0");
  if (penalty.scalar_type() != ScalarType::Float && penalty.scalar_type() != ScalarType::Double)
    invalid("penalty must be float32 or float64");
  if (!(eta >= 0) || std::isinf(eta)) invalid("eta must be finite and >= 0, not " + std::to_string(eta));
  if (game != "js" && game != "kl") invalid("game must be \"js\" or \"kl\", not \"" + game + "\"");
  penalty = torch::stable::contiguous(penalty);
  const int64_t N = penalty.numel();
  const ScalarType dtype = penalty.scalar_type();
  Tensor discriminator = nd::empty({N}, dtype, penalty), weight = nd::empty({N}, dtype, penalty);
  Tensor c = nd::empty({1}, ScalarType::Double, penalty);
  Solver solver = {{.dtype = nd::dtype_of("penalty", penalty),
                    .penalty = penalty.const_data_ptr(),
                    .N = N,
                    .eta = eta,
                    .jensen_shannon = game == "js",
                    .tilt = nullptr,
                    .partial = nullptr,
                    .discriminator = discriminator.mutable_data_ptr(),
                    .weight = weight.mutable_data_ptr()}};
  const nd::Memory tilt = nd::allocate(N * static_cast<int64_t>(penalty.element_size()));
  const nd::Memory partial = nd::allocate(solver.blocks() * 16);
  solver.args.tilt = tilt.get();
  solver.args.partial = static_cast<double*>(partial.get());

  const double lowest = solver.least_penalty();
  const double mean = solver.mean_tilt(lowest);
  double r = mean;
  if (!std::isfinite(lowest)) {
    r = std::numeric_limits<double>::quiet_NaN();
  } else if (solver.args.jensen_shannon) {
    r = 1;
    if (N > kDiscriminatorBlock) r = solver.root(r, kDiscriminatorBlock);
    r = solver.root(r, N);
  }
  *static_cast<double*>(c.mutable_data_ptr()) =
      eta * lowest - (solver.args.jensen_shannon ? std::log1p(r) : std::log(r));
  solver.over_blocks(
      [&](int64_t begin, int64_t end) { solver.kernels.discriminator_finish(solver.args, r, begin, end); });
  return {discriminator, weight, c};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def(
      "closed_form_discriminator(Tensor penalty, float eta, str game) -> (Tensor discriminator, Tensor weight, "
      "Tensor c)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("closed_form_discriminator", TORCH_BOX(&closed_form_discriminator_cpu));
}
