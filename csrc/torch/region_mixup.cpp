// Operators of the hot path region_mixup: checks, layouts, threads; what they compute stands in
// neuraldeps_kernels/ops/region_mixup.py.
//
// Kernels: csrc/cpu/region_mixup.cpp. CUDA tensors go to Triton or the PyTorch reference, registered from Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "layouts.hpp"
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/nvtx.hpp"
#include "parallel.hpp"
#include "tensors.hpp"

namespace {

using nd::invalid;
using nd::cpu::Dtype;
using nd::cpu::RegionMixupArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kValuesPerThread = 1 << 15;  // fewer are not worth a second thread

// Along one dimension, for every pixel its region a and how far it is on its way to a + 1.
struct Regions {
  std::vector<int64_t> region;
  std::vector<double> step;

  Regions(const char* name, int64_t pixels, int64_t regions, int64_t soft)
      : region(static_cast<size_t>(pixels)), step(static_cast<size_t>(pixels)) {
    if (regions < 1 || regions > pixels)
      invalid("ratio must have 1.." + std::to_string(pixels) + " regions along " + name + ", not " +
              std::to_string(regions));
    if (regions > 1 && soft > pixels / regions)
      invalid("soft must be at most the size of a region, " + std::to_string(pixels / regions) + " pixels along " +
              name + ", not " + std::to_string(soft));
    const double w = static_cast<double>(soft);
    const auto border = [&](int64_t a) { return static_cast<double>((a * pixels + regions - 1) / regions); };
    int64_t a = 0;
    for (int64_t p = 0; p < pixels; p++) {
      const double centre = static_cast<double>(p) + 0.5;
      while (a + 1 < regions && centre - w / 2 >= border(a + 1)) a++;
      region[static_cast<size_t>(p)] = a;
      if (soft > 0 && a + 1 < regions) step[static_cast<size_t>(p)] = std::max(0.0, (centre - border(a + 1)) / w + 0.5);
    }
  }
};

// Arguments of both directions, with everything they point to.
struct Mixup {
  Tensor x_v, x_i, ratio;
  Regions along_rows, along_columns;
  RegionMixupArgs args = {};

  Mixup(const Tensor& given_v, const Tensor& given_i, const Tensor& given_ratio, int64_t soft)
      : x_v(dense_images(given_v)),
        x_i(nd::beside("x_i", given_i, "x_v", x_v)),
        ratio(checked_ratio(given_ratio)),
        along_rows("H", x_v.size(2), ratio.size(1), checked(soft)),
        along_columns("W", x_v.size(3), ratio.dim() == 3 ? ratio.size(2) : 1, soft) {
    args.dtype = nd::dtype_of("x_v", x_v);
    args.channels_last = !nd::is_dense(x_v, false);
    args.N = x_v.size(0);
    args.C = x_v.size(1);
    args.H = x_v.size(2);
    args.W = x_v.size(3);
    args.x_v = x_v.const_data_ptr();
    args.x_i = x_i.const_data_ptr();
    args.ratio = ratio.const_data_ptr();
    args.rows = ratio.size(1);
    args.columns = ratio.dim() == 3 ? ratio.size(2) : 1;
    args.region_of_row = along_rows.region.data();
    args.region_of_column = along_columns.region.data();
    args.step_of_row = along_rows.step.data();
    args.step_of_column = along_columns.step.data();
  }
  Mixup(const Mixup&) = delete;

  bool empty() const { return x_v.numel() == 0; }

  // run(begin, end, workspace) over `tasks` of equal size, by all threads if that pays.
  template <class F>
  void over(int64_t tasks, const F& run) const {
    const int64_t grain = std::max<int64_t>(1, kValuesPerThread * tasks / x_v.numel());
    const auto with_room = [&](int64_t begin, int64_t end) {
      const nd::Memory workspace = nd::allocate(nd::cpu::kernels().region_mixup_room(args));
      run(begin, end, workspace.get());
    };
    if (grain >= tasks) return with_room(0, tasks);
    torch::stable::parallel_for(0, tasks, grain, with_room);
  }

 private:
  static Tensor dense_images(const Tensor& x) {
    if (x.dim() != 4) invalid("x_v must be [N, C, H, W]");
    return nd::is_dense(x, false) || nd::is_dense(x, true) ? x : nd::made_contiguous(x);
  }
  static int64_t checked(int64_t soft) {
    if (soft < 0) invalid("soft must be at least 0, not " + std::to_string(soft));
    return soft;
  }
  Tensor checked_ratio(const Tensor& given) const {
    const auto wide = x_v.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    if (given.dim() < 2 || given.dim() > 3 || given.size(0) != x_v.size(0) || given.scalar_type() != wide)
      invalid("ratio must be [N, R] or [N, Rh, Rw] in the dtype of sums");
    Tensor dense = nd::made_contiguous(given);
    wide == ScalarType::Double ? check_range<double>(dense) : check_range<float>(dense);
    return dense;
  }
  template <class T>
  static void check_range(const Tensor& ratio) {
    const T* values = static_cast<const T*>(ratio.const_data_ptr());
    for (int64_t i = 0; i < ratio.numel(); i++)
      if (values[i] < 0 || values[i] > 1) invalid("ratio must be within 0..1, not " + std::to_string(values[i]));
  }
};

Tensor region_mixup_cpu(Tensor x_v, Tensor x_i, Tensor ratio, int64_t soft) {
  ND_RANGE("region_mixup");
  Mixup mixup(x_v, x_i, ratio, soft);
  Tensor mixed = nd::empty_beside(mixup.x_v);
  if (mixup.empty()) return mixed;
  mixup.args.mixed = mixed.mutable_data_ptr();
  mixup.over(mixup.args.N * mixup.args.H, [&](int64_t begin, int64_t end, void* workspace) {
    nd::cpu::kernels().region_mixup(mixup.args, begin, end, workspace);
  });
  return mixed;
}

std::tuple<Tensor, Tensor, Tensor> region_mixup_backward_cpu(Tensor grad, Tensor x_v, Tensor x_i, Tensor ratio,
                                                             int64_t soft, bool images, bool ratios) {
  ND_RANGE("region_mixup_backward");
  Mixup mixup(x_v, x_i, ratio, soft);
  RegionMixupArgs& args = mixup.args;
  grad = nd::beside("grad", grad, "x_v", mixup.x_v);
  const auto nothing = [&] { return nd::empty({0}, mixup.ratio.scalar_type(), mixup.ratio); };
  Tensor x_v_grad = images ? nd::empty_beside(mixup.x_v) : nothing();
  Tensor x_i_grad = images ? nd::empty_beside(mixup.x_v) : nothing();
  Tensor ratio_grad = ratios ? nd::empty_beside(mixup.ratio) : nothing();
  if (mixup.empty()) {
    if (ratios) torch::stable::zero_(ratio_grad);
    return {x_v_grad, x_i_grad, ratio_grad};
  }
  args.grad = grad.const_data_ptr();
  args.x_v_grad = images ? x_v_grad.mutable_data_ptr() : nullptr;
  args.x_i_grad = images ? x_i_grad.mutable_data_ptr() : nullptr;
  args.ratio_grad = ratios ? ratio_grad.mutable_data_ptr() : nullptr;
  if (images || ratios) {
    mixup.over(args.N, [&](int64_t begin, int64_t end, void* workspace) {
      nd::cpu::kernels().region_mixup_backward(args, begin, end, workspace);
    });
  }
  return {x_v_grad, x_i_grad, ratio_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def("region_mixup(Tensor x_v, Tensor x_i, Tensor ratio, int soft) -> Tensor");
  m.def(
      "region_mixup_backward(Tensor grad, Tensor x_v, Tensor x_i, Tensor ratio, int soft, bool images, bool ratios) -> "
      "(Tensor dx_v, Tensor dx_i, Tensor dratio)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("region_mixup", TORCH_BOX(&region_mixup_cpu));
  m.impl("region_mixup_backward", TORCH_BOX(&region_mixup_backward_cpu));
}
