// Operator of the hot path queue_contrast: checks, threads, and the losses from what the kernel finds of each row.
//
//   L_con = mean softplus(lse S - l),   l = <q, k> / tau            dL_con / dq = -sigmoid(lse S - l) (k - A) / (tau N)
//   KL    = mean of E_p_o[R - S] - lse R + lse S                    dKL / dq    = (A - B) / (tau N)
//
// Kernel: csrc/cpu/queue_contrast.cpp, notation there. CUDA tensors go to triton/queue_contrast.py, registered from
// Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/nvtx.hpp"
#include "parallel.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using nd::Memory;
using nd::cpu::QueueContrastArgs;
using nd::cpu::QueueContrastPlan;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 16;  // rows that a thread merges at least

// What the kernel finds of the rows.
template <class T>
struct Found {
  std::vector<double> lse_q, lse_o, difference;  // [N]
  std::vector<T> mean_q, mean_o;                 // [N, d]

  Found(int64_t N, int64_t d, bool gradient)
      : lse_q(static_cast<size_t>(N)),
        lse_o(lse_q),
        difference(lse_q),
        mean_q(gradient ? static_cast<size_t>(N * d) : 0),
        mean_o(mean_q) {}

  void run(QueueContrastArgs args) {
    args.lse_q = lse_q.data();
    args.lse_o = lse_o.data();
    args.difference = difference.data();
    args.mean_q = mean_q.data();
    args.mean_o = mean_o.data();
    const nd::cpu::Kernels& kernels = nd::cpu::kernels();
    const QueueContrastPlan plan = kernels.queue_contrast_plan(args);
    const Memory partial = nd::allocate(plan.partial_bytes);
    args.partial = partial.get();
    nd::hand_out(plan.tasks, plan.workspace_bytes, [&](int64_t task, void* workspace) {
      kernels.queue_contrast_accumulate(args, task, task + 1, workspace);
    });
    torch::stable::parallel_for(0, args.N, kGrain,
                                [&](int64_t begin, int64_t end) { kernels.queue_contrast_merge(args, begin, end); });
  }
};

// Both losses, and their gradients [N, d] as far as they are wanted.
template <class T>
void losses(const QueueContrastArgs& args, const T* k, T* contrast_loss, T* consistency_loss, T* dcontrast,
            T* dconsistency) {
  const T* q = static_cast<const T*>(args.q);
  Found<T> found(args.N, args.d, args.gradient);
  found.run(args);
  const double scale = 1 / (args.temperature * static_cast<double>(args.N));
  double contrast = 0, consistency = 0;
  for (int64_t n = 0; n < args.N; n++) {
    double positive = 0;
    for (int64_t c = 0; c < args.d; c++)
      positive += static_cast<double>(q[n * args.d + c]) * static_cast<double>(k[n * args.d + c]);
    const double x = found.lse_q[static_cast<size_t>(n)] - positive / args.temperature;
    contrast += std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x)));
    if (args.original) {
      const size_t i = static_cast<size_t>(n);
      const double divergence = found.difference[i] - found.lse_o[i] + found.lse_q[i];
      consistency += divergence < 0 ? 0 : divergence;  // rounding; NaN stays
    }
    if (!args.gradient) continue;
    const T pull = static_cast<T>(-scale / (1 + std::exp(-x)));
    const T *mean_q = found.mean_q.data() + n * args.d, *mean_o = found.mean_o.data() + n * args.d;
    for (int64_t c = 0; c < args.d; c++) dcontrast[n * args.d + c] = pull * (k[n * args.d + c] - mean_q[c]);
    if (!args.original) continue;
    for (int64_t c = 0; c < args.d; c++) dconsistency[n * args.d + c] = static_cast<T>(scale) * (mean_q[c] - mean_o[c]);
  }
  *contrast_loss = static_cast<T>(contrast / static_cast<double>(args.N));
  *consistency_loss = static_cast<T>(consistency / static_cast<double>(args.N));
}

Tensor rows_like(const char* name, const Tensor& x, const Tensor& q) {
  if (x.dim() != 2 || x.size(0) != q.size(0) || x.size(1) != q.size(1))
    invalid(std::string(name) + " must have the shape of q");
  if (x.scalar_type() != q.scalar_type()) invalid(std::string(name) + " must have the dtype of q");
  return torch::stable::contiguous(x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> queue_contrast_cpu(Tensor q, Tensor k, Tensor queue, OptionalTensor original,
                                                              double temperature, double target_temperature,
                                                              bool gradient) {
  ND_RANGE("queue_contrast");
  const ScalarType wide = q.scalar_type();
  if (q.dim() != 2 || (wide != ScalarType::Float && wide != ScalarType::Double))
    invalid("q must be float32 or float64 [N, d]");
  if (queue.dim() != 2 || queue.size(1) != q.size(1) || q.size(1) < 1)
    invalid("queue must be [K, d] with the d >= 1 of q");
  q = torch::stable::contiguous(q);
  k = rows_like("k", k, q);
  if (original) original = rows_like("original", *original, q);
  if (!(temperature > 0) || !(target_temperature > 0)) invalid("temperatures must be positive");
  if ((wide == ScalarType::Double) != (queue.scalar_type() == ScalarType::Double))
    invalid("queue and q must both be float64, or neither");
  if (queue.stride(1) != 1) queue = torch::stable::contiguous(queue);
  QueueContrastArgs args = {};
  args.dtype = nd::dtype_of("queue", queue);
  args.q = q.const_data_ptr();
  args.original = original ? original->const_data_ptr() : nullptr;
  args.queue = queue.const_data_ptr();
  args.N = q.size(0);
  args.K = queue.size(0);
  args.d = q.size(1);
  args.queue_stride = queue.stride(0);
  args.temperature = temperature;
  args.target_temperature = target_temperature;
  args.gradient = gradient;
  Tensor contrast = nd::empty({1}, wide, q), consistency = nd::empty({1}, wide, q);
  Tensor dcontrast = nd::empty({gradient ? args.N : 0, args.d}, wide, q);
  Tensor dconsistency = nd::empty({gradient && original ? args.N : 0, args.d}, wide, q);
  const auto fill = [&]<class T>(const T* keys) {
    losses(args, keys, static_cast<T*>(contrast.mutable_data_ptr()), static_cast<T*>(consistency.mutable_data_ptr()),
           static_cast<T*>(dcontrast.mutable_data_ptr()), static_cast<T*>(dconsistency.mutable_data_ptr()));
  };
  if (args.N == 0 || args.K == 0) {
    for (Tensor* result : {&contrast, &consistency, &dcontrast, &dconsistency}) torch::stable::zero_(*result);
  } else if (wide == ScalarType::Double) {
    fill(static_cast<const double*>(k.const_data_ptr()));
  } else {
    fill(static_cast<const float*>(k.const_data_ptr()));
  }
  return {torch::stable::select(contrast, 0, 0), torch::stable::select(consistency, 0, 0), dcontrast, dconsistency};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def(
      "queue_contrast(Tensor q, Tensor k, Tensor queue, Tensor? original, float temperature, float target_temperature, "
      "bool gradient) -> (Tensor contrast, Tensor consistency, Tensor dcontrast, Tensor dconsistency)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) { m.impl("queue_contrast", TORCH_BOX(&queue_contrast_cpu)); }
