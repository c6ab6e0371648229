// Operators of the hot path fourier_filter: checks, layouts, threads.
//
//   fourier_filter2d            y = irfft2(rfft2(x) K)
//   fourier_filter2d_backward   dx = irfft2(rfft2(grad) conj K) and dweight
//
// Kernels: csrc/cpu/fourier_filter.cpp, csrc/cuda/fourier_filter.cu. `layout` is the order of dimensions; what lies
// next to each other in memory is taken from the strides, and copied only where that is neither channels nor rows of
// dense planes.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

#include "cuda_library.hpp"
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/memory.hpp"
#include "neuraldeps/nvtx.hpp"
#include "tensors.hpp"

namespace {

using nd::allocate;
using nd::invalid;
using nd::Memory;
using nd::cpu::Dtype;
using nd::cpu::FourierBlocksArgs;
using nd::cpu::FourierBlocksPlan;
using nd::cpu::FourierFilterArgs;
using nd::cpu::FourierFilterPlan;
using nd::cpu::ImageStrides;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSerialPixels = 1 << 13;  // pixels times channels that are not worth a second thread

// Dimensions of rows, columns (pixels of a row) and channels.
struct Layout {
  int32_t row, pixel, channel;
};

Layout layout_of(const std::string& layout) {
  if (layout == "NHWC") return {1, 2, 3};
  if (layout == "NCHW") return {2, 3, 1};
  invalid("layout must be \"NHWC\" or \"NCHW\", not \"" + layout + "\"");
}

void check_norm(const std::string& norm) {
  if (norm != "ortho" && norm != "backward" && norm != "forward")
    invalid("norm must be \"ortho\", \"backward\" or \"forward\", not \"" + norm + "\"");
}

ImageStrides strides_of(const Tensor& x, const Layout& layout) {
  return {x.stride(0), x.stride(layout.row), x.stride(layout.pixel), x.stride(layout.channel)};
}

// x as it is where the kernel reads its strides, else a contiguous copy.
Tensor readable(const Tensor& x, const Layout& layout) {
  const ImageStrides strides = strides_of(x, layout);
  const bool planes = strides.pixel == 1 && strides.row == x.size(layout.pixel);
  return strides.channel == 1 || planes ? x : torch::stable::contiguous(x);
}

// Dense, with channels or columns innermost as in x, else in the order of its dimensions (`_result_like` of
// neuraldeps_kernels/ops/fourier_filter.py).
Tensor result_like(const Tensor& x, const Layout& layout) {
  const bool channels_last = layout.channel == 3;
  const int32_t other = channels_last ? layout.pixel : layout.channel;
  const auto n = [&](int32_t d) { return x.size(d); };
  if (x.stride(other) != 1 || x.stride(3) == 1) return nd::empty({n(0), n(1), n(2), n(3)}, x.scalar_type(), x);
  if (channels_last) {
    const Tensor planes = nd::empty({n(0), n(3), n(1), n(2)}, x.scalar_type(), x);
    return torch::stable::transpose(torch::stable::transpose(planes, 1, 2), 2, 3);
  }
  const Tensor pixels = nd::empty({n(0), n(2), n(3), n(1)}, x.scalar_type(), x);
  return torch::stable::transpose(torch::stable::transpose(pixels, 2, 3), 1, 2);
}

bool in_blocks(const Tensor& weight) { return weight.dim() == 6 && weight.size(3) > 1; }

// Checked arguments but for the results. A weight of blocks of one channel is one of channels.
FourierFilterArgs problem(const Tensor& x, const Tensor& weight, const Layout& layout) {
  if (x.dim() != 4) invalid("x must be [B, H, W, C] or [B, C, H, W]");
  FourierFilterArgs args = {};
  args.dtype = nd::dtype_of("x", x);
  args.batch = x.size(0);
  args.height = x.size(layout.row);
  args.width = x.size(layout.pixel);
  args.channels = x.size(layout.channel);
  if (args.height < 1 || args.width < 1 || args.channels < 1) invalid("x must have no empty dimension but the batch");
  args.x = x.const_data_ptr();
  args.x_strides = strides_of(x, layout);
  const ScalarType computed = args.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  bool fits = weight.scalar_type() == computed && weight.device() == x.device();
  fits = fits && (weight.dim() == 4 || weight.dim() == 6) && weight.size(weight.dim() - 1) == 2;
  fits = fits && weight.size(0) == args.height && weight.size(1) == args.width / 2 + 1;
  if (fits && weight.dim() == 6) {
    fits = weight.size(3) == weight.size(4) && weight.size(2) * weight.size(3) == args.channels;
  } else {
    fits = fits && weight.size(2) == args.channels;
  }
  if (!fits)
    invalid(
        "weight must be [H, W//2+1, C, 2] or [H, W//2+1, G, C/G, C/G, 2], float64 for float64 x, else float32, on "
        "the device of x");
  args.weight = weight.const_data_ptr();
  return args;
}

Tensor gradient_like(const Tensor& weight) {
  const auto n = [&](int32_t d) { return weight.size(d); };
  if (weight.dim() == 4) return nd::empty({n(0), n(1), n(2), n(3)}, weight.scalar_type(), weight);
  return nd::empty({n(0), n(1), n(2), n(3), n(4), n(5)}, weight.scalar_type(), weight);
}

void check_grad(const Tensor& grad, const Tensor& x) {
  if (x.dim() != 4) invalid("x must be [B, H, W, C] or [B, C, H, W]");
  bool same = grad.dim() == 4 && grad.scalar_type() == x.scalar_type() && grad.device() == x.device();
  for (int32_t d = 0; d < 4; d++) same = same && grad.size(d) == x.size(d);
  if (!same) invalid("grad must have the shape, dtype and device of x");
}

// Runs all stages; the batch is not empty.
void run(FourierFilterArgs& args) {
  const nd::cpu::Kernels& kernels = nd::cpu::kernels();
  const FourierFilterPlan plan = kernels.fourier_filter_plan(args);
  const Memory table = allocate(plan.table_bytes), filter = allocate(plan.filter_bytes);
  const Memory sums = args.grad ? allocate(plan.sums_bytes) : nullptr;
  args.splits = plan.splits;
  args.table = table.get();
  args.filter = filter.get();
  args.sums = sums.get();
  kernels.fourier_filter_start(args);
  const int64_t image = args.height * args.width * (args.channels + plan.blocks - 1) / plan.blocks;  // of a block
  const int64_t blocks_grain = std::max<int64_t>(1, 4 * kSerialPixels / image);
  const auto over_blocks = [&](auto stage) {
    torch::stable::parallel_for(0, plan.blocks, blocks_grain,
                                [&](int64_t begin, int64_t end) { stage(args, begin, end); });
  };
  const auto over_tasks = [&](int64_t tasks, int64_t images, auto stage) {
    const int64_t grain = std::max<int64_t>(1, kSerialPixels / (image * std::max<int64_t>(images, 1)));
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      const Memory workspace = allocate(plan.workspace_bytes);
      stage(args, begin, end, workspace.get());
    });
  };
  over_blocks(kernels.fourier_filter_prepare);
  if (!args.grad) {
    over_tasks(plan.blocks * args.batch, 1, kernels.fourier_filter_apply);
    return;
  }
  over_tasks(plan.blocks * plan.splits, args.batch / plan.splits, kernels.fourier_filter_gradients);
  over_blocks(kernels.fourier_filter_finish);
}

// The same with a block-diagonal filter.
void run_blocks(const FourierFilterArgs& filter, int64_t groups) {
  const nd::cpu::Kernels& kernels = nd::cpu::kernels();
  FourierBlocksArgs args = {};
  args.filter = filter;
  args.groups = groups;
  const FourierBlocksPlan plan = kernels.fourier_blocks_plan(args);
  const int64_t tensors = filter.grad ? 2 : 1, products_bytes = kernels.fourier_blocks_room(args);
  const Memory table = allocate(kernels.fourier_filter_plan(filter).table_bytes);
  const Memory spectra = allocate(tensors * plan.spectra_bytes);
  args.filter.table = table.get();
  args.mode_stride = plan.mode_stride;
  args.image_stride = plan.image_stride;
  args.x_spectra = spectra.get();
  args.grad_spectra = static_cast<char*>(spectra.get()) + (tensors - 1) * plan.spectra_bytes;
  kernels.fourier_filter_start(args.filter);
  // `work`: multiplications of a task, roughly.
  const auto over_tasks = [&](int64_t tasks, int64_t work, int64_t workspace_bytes, auto stage) {
    const int64_t grain = std::max<int64_t>(1, 8 * kSerialPixels / work);
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      const Memory workspace = allocate(workspace_bytes);
      stage(args, begin, end, workspace.get());
    });
  };
  const int64_t modes = filter.height * (filter.width / 2 + 1), C = filter.channels;
  const int64_t of_image = 8 * filter.height * filter.width * C / plan.blocks;
  for (; args.first < filter.batch; args.first += args.images) {
    args.images = std::min(plan.images, filter.batch - args.first);
    over_tasks(tensors * args.images * plan.blocks, of_image, plan.workspace_bytes, kernels.fourier_blocks_spectra);
    over_tasks(modes, tensors * args.images * C * (C / groups), products_bytes, kernels.fourier_blocks_products);
    over_tasks(args.images * plan.blocks, of_image, plan.workspace_bytes, kernels.fourier_blocks_synthesis);
  }
}

void run(FourierFilterArgs& args, const Tensor& weight) {
  if (in_blocks(weight)) {
    run_blocks(args, weight.size(2));
  } else {
    run(args);
  }
}

// What no kernel serves on CUDA goes to those of ops/fourier_filter.py.
template <size_t NumTensors>
std::array<StableIValue, NumTensors + 2> in_torch(const char* name, const std::array<Tensor, NumTensors>& tensors,
                                                  const std::string& layout, const std::string& norm) {
  std::array<StableIValue, NumTensors + 2> stack;
  for (size_t i = 0; i < NumTensors; i++) stack[i] = torch::stable::detail::from(tensors[i]);
  stack[NumTensors] = torch::stable::detail::from(layout);
  stack[NumTensors + 1] = torch::stable::detail::from(norm);
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor fourier_filter2d_cpu(Tensor x, Tensor weight, std::string layout, std::string norm) {
  ND_RANGE("fourier_filter2d");
  const Layout dims = layout_of(layout);
  check_norm(norm);
  weight = torch::stable::contiguous(weight);
  Tensor y = x.dim() == 4 ? result_like(x, dims) : x;
  x = x.dim() == 4 ? readable(x, dims) : x;
  FourierFilterArgs args = problem(x, weight, dims);
  if (args.batch == 0) return y;
  args.y = y.mutable_data_ptr();
  args.y_strides = strides_of(y, dims);
  run(args, weight);
  return y;
}

std::tuple<Tensor, Tensor> fourier_filter2d_backward_cpu(Tensor grad, Tensor x, Tensor weight, std::string layout,
                                                         std::string norm) {
  ND_RANGE("fourier_filter2d_backward");
  const Layout dims = layout_of(layout);
  check_norm(norm);
  weight = torch::stable::contiguous(weight);
  check_grad(grad, x);
  Tensor dx = result_like(x, dims);
  x = readable(x, dims);
  grad = readable(grad, dims);
  FourierFilterArgs args = problem(x, weight, dims);
  Tensor dweight = gradient_like(weight);
  if (args.batch == 0) return {dx, torch::stable::zero_(dweight)};
  args.grad = grad.const_data_ptr();
  args.grad_strides = strides_of(grad, dims);
  args.y = dx.mutable_data_ptr();
  args.y_strides = strides_of(dx, dims);
  args.dweight = dweight.mutable_data_ptr();
  run(args, weight);
  return {dx, dweight};
}

// ---------------------------------------------------------------------------------------------------------------- CUDA

// Sizes and dtype of checked arguments for the kernels on the device.
NdFourierFilterArgs device_arguments(const Tensor& x, const Tensor& weight, const Layout& dims) {
  const FourierFilterArgs checked = problem(x, weight, dims);
  NdFourierFilterArgs args = {};
  args.batch = checked.batch;
  args.height = checked.height;
  args.width = checked.width;
  args.channels = checked.channels;
  args.dtype = static_cast<int32_t>(checked.dtype);
  return args;
}

// Whether csrc/cuda/fourier_filter.cu has kernels for a call. What it has none for goes to those of
// ops/fourier_filter.py.
bool served_on_cuda(const Tensor& x, const Tensor& weight, const Layout& dims) {
  if (weight.dim() == 6) return false;
  const NdFourierFilterArgs args = device_arguments(x, weight, dims);
  return nd::cuda_library_error().empty() && ND_CUDA(nd_fourier_filter_serves)(&args) != 0;
}

// The weight as pairs of neighbouring floats.
Tensor as_pairs(const Tensor& weight) {
  const Tensor dense = torch::stable::contiguous(weight);
  const bool aligned = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % (2 * sizeof(float)) == 0;
  return aligned ? dense : torch::stable::clone(dense);
}

// x with the strides of result_like(x), copied if it has others.
Tensor dense_as(const Tensor& x, const Tensor& result, const Layout& dims) {
  bool same = true;
  for (int32_t d = 0; d < 4; d++) same &= x.size(d) == 1 || x.stride(d) == result.stride(d);
  if (same) return x;
  Tensor copy = result_like(result, dims);
  return torch::stable::copy_(copy, x);
}

Tensor fourier_filter2d_cuda(Tensor x, Tensor weight, std::string layout, std::string norm) {
  ND_RANGE("fourier_filter2d");
  const Layout dims = layout_of(layout);
  check_norm(norm);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (!served_on_cuda(x, weight, dims)) {
    const auto stack = in_torch<2>("neuraldeps::fourier_filter2d_in_torch", {x, weight}, layout, norm);
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  weight = as_pairs(weight);
  Tensor y = result_like(x, dims);
  x = dense_as(x, y, dims);
  NdFourierFilterArgs args = device_arguments(x, weight, dims);
  args.planes = y.stride(dims.channel) != 1;
  args.weight = static_cast<const float*>(weight.const_data_ptr());
  void* const stream = nd::current_cuda_stream(x.get_device_index());
  nd::check_cuda(ND_CUDA(nd_fourier_filter)(&args, x.const_data_ptr(), y.mutable_data_ptr(), stream),
                 "fourier_filter2d");
  return y;
}

std::tuple<Tensor, Tensor> fourier_filter2d_backward_cuda(Tensor grad, Tensor x, Tensor weight, std::string layout,
                                                          std::string norm) {
  ND_RANGE("fourier_filter2d_backward");
  const Layout dims = layout_of(layout);
  check_norm(norm);
  check_grad(grad, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (!served_on_cuda(x, weight, dims)) {
    const auto stack = in_torch<3>("neuraldeps::fourier_filter2d_backward_in_torch", {grad, x, weight}, layout, norm);
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
  }
  weight = as_pairs(weight);
  Tensor dx = result_like(x, dims);
  x = dense_as(x, dx, dims);
  grad = dense_as(grad, dx, dims);
  Tensor dweight = nd::empty({weight.size(0), weight.size(1), weight.size(2), 2}, weight.scalar_type(), weight);
  NdFourierFilterArgs args = device_arguments(x, weight, dims);
  args.planes = dx.stride(dims.channel) != 1;
  args.weight = static_cast<const float*>(weight.const_data_ptr());
  const size_t bytes = ND_CUDA(nd_fourier_filter_backward_workspace)(&args);
  Tensor workspace = nd::empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, x);
  const int code =
      ND_CUDA(nd_fourier_filter_backward)(&args, grad.const_data_ptr(), x.const_data_ptr(), dx.mutable_data_ptr(),
                                          static_cast<float*>(dweight.mutable_data_ptr()), workspace.mutable_data_ptr(),
                                          nd::current_cuda_stream(x.get_device_index()));
  nd::check_cuda(code, "fourier_filter2d_backward");
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(neuraldeps, m) {
  m.def("fourier_filter2d(Tensor x, Tensor weight, str layout, str norm) -> Tensor");
  m.def(
      "fourier_filter2d_backward(Tensor grad, Tensor x, Tensor weight, str layout, str norm) -> (Tensor dx, Tensor "
      "dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CPU, m) {
  m.impl("fourier_filter2d", TORCH_BOX(&fourier_filter2d_cpu));
  m.impl("fourier_filter2d_backward", TORCH_BOX(&fourier_filter2d_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CUDA, m) {
  m.impl("fourier_filter2d", TORCH_BOX(&fourier_filter2d_cuda));
  m.impl("fourier_filter2d_backward", TORCH_BOX(&fourier_filter2d_backward_cuda));
}
