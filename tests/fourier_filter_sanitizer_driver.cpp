// Runs the kernel of fourier_filter on edge shapes in a program of its own, to be built with sanitizers together with
// csrc/cpu/fourier_filter.cpp: images, weights and work space of exactly the size that cpu_api.h asks for, full of NaN
// before. Ends with status 1 and a message if a result is wrong: the filter is the identity, and so y is x, dx is g,
// and dweight sums to sum x g.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "neuraldeps/cpu_api.h"

namespace nd::cpu::ND_CPU_LEVEL {
FourierFilterPlan fourier_filter_plan(const FourierFilterArgs& args);
void fourier_filter_start(const FourierFilterArgs& args);
void fourier_filter_prepare(const FourierFilterArgs& args, int64_t begin, int64_t end);
void fourier_filter_apply(const FourierFilterArgs& args, int64_t begin, int64_t end, void* workspace);
void fourier_filter_gradients(const FourierFilterArgs& args, int64_t begin, int64_t end, void* workspace);
void fourier_filter_finish(const FourierFilterArgs& args, int64_t begin, int64_t end);
}  // namespace nd::cpu::ND_CPU_LEVEL

namespace {

namespace level = nd::cpu::ND_CPU_LEVEL;
using nd::cpu::Dtype;
using nd::cpu::FourierFilterArgs;
using Memory = std::unique_ptr<char, decltype(&std::free)>;

int failures = 0;

// At least `bytes`, up to the end of a line, every byte 0xff: NaN in every floating type.
Memory memory(int64_t bytes) {
  const size_t size = static_cast<size_t>((bytes + 63) / 64 * 64);
  char* data = static_cast<char*>(std::aligned_alloc(64, size));
  std::memset(data, 0xff, size);
  return {data, &std::free};
}

// Exactly `bytes`.
Memory exact_memory(size_t bytes) { return {static_cast<char*>(std::malloc(bytes)), &std::free}; }

// Small integers, which every dtype holds, by their position.
double number(int64_t i, int64_t seed) { return static_cast<double>((i * 7 + seed) % 15 - 7); }

void put(char* data, Dtype dtype, int64_t i, double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  if (dtype == Dtype::kFloat64) {
    std::memcpy(data + 8 * i, &value, 8);
  } else if (dtype == Dtype::kFloat32) {
    std::memcpy(data + 4 * i, &narrow, 4);
  } else if (dtype == Dtype::kBfloat16) {
    std::memcpy(data + 2 * i, reinterpret_cast<const char*>(&bits) + 2, 2);
  } else {  // float16 of an integer
    const uint16_t half =
        static_cast<uint16_t>(value == 0 ? 0 : (bits >> 16 & 0x8000u) | ((bits & 0x7fffffffu) - (112u << 23)) >> 13);
    std::memcpy(data + 2 * i, &half, 2);
  }
}

double get(const char* data, Dtype dtype, int64_t i) {
  double value;
  float narrow;
  uint32_t bits = 0;
  if (dtype == Dtype::kFloat64) {
    std::memcpy(&value, data + 8 * i, 8);
    return value;
  }
  if (dtype == Dtype::kFloat32) {
    std::memcpy(&narrow, data + 4 * i, 4);
    return narrow;
  }
  uint16_t half;
  std::memcpy(&half, data + 2 * i, 2);
  if (dtype == Dtype::kFloat16) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
  }
  bits = static_cast<uint32_t>(half) << 16;
  std::memcpy(&narrow, &bits, 4);
  return narrow;
}

struct Shape {
  int64_t B, H, W, C;
};

void run(const Shape& shape, Dtype dtype, bool planes, bool backward) {
  const auto [B, H, W, C] = shape;
  const int64_t size = B * H * W * C, Wf = W / 2 + 1;
  const size_t width = dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
  const Dtype computed = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  const Memory x = exact_memory(static_cast<size_t>(size) * width), g = exact_memory(static_cast<size_t>(size) * width);
  const Memory y = exact_memory(static_cast<size_t>(size) * width);
  const size_t weight_bytes = static_cast<size_t>(H * Wf * C * 2) * (computed == Dtype::kFloat64 ? 8 : 4);
  const Memory weight = exact_memory(weight_bytes), dweight = exact_memory(weight_bytes);
  std::memset(y.get(), 0xff, static_cast<size_t>(size) * width);
  std::memset(dweight.get(), 0xff, weight_bytes);
  double product = 0;
  for (int64_t i = 0; i < size; i++) {
    put(x.get(), dtype, i, number(i, 1));
    put(g.get(), dtype, i, number(i, 5));
    product += number(i, 1) * number(i, 5);
  }
  for (int64_t i = 0; i < H * Wf * C * 2; i++) put(weight.get(), computed, i, i % 2 == 0);

  FourierFilterArgs args = {};
  args.x = x.get();
  args.grad = backward ? g.get() : nullptr;
  args.y = y.get();
  args.x_strides =
      planes ? nd::cpu::ImageStrides{H * W * C, W, 1, H * W} : nd::cpu::ImageStrides{H * W * C, W * C, C, 1};
  args.grad_strides = args.y_strides = args.x_strides;
  args.dtype = dtype;
  args.batch = B;
  args.height = H;
  args.width = W;
  args.channels = C;
  args.weight = weight.get();
  args.dweight = dweight.get();
  const nd::cpu::FourierFilterPlan plan = level::fourier_filter_plan(args);
  const Memory table = memory(plan.table_bytes), filter = memory(plan.filter_bytes), sums = memory(plan.sums_bytes);
  args.splits = plan.splits;
  args.table = table.get();
  args.filter = filter.get();
  args.sums = sums.get();
  level::fourier_filter_start(args);
  level::fourier_filter_prepare(args, 0, plan.blocks);
  const int64_t tasks = plan.blocks * (backward ? plan.splits : B);
  const auto stage = backward ? level::fourier_filter_gradients : level::fourier_filter_apply;
  for (int64_t end = tasks; end > 0; end -= 2) {  // results must not depend on the cut or the order
    const Memory workspace = memory(plan.workspace_bytes);
    stage(args, end < 2 ? 0 : end - 2, end, workspace.get());
  }
  if (backward) level::fourier_filter_finish(args, 0, plan.blocks);

  double worst = 0, sum = 0;
  for (int64_t i = 0; i < size; i++) {
    const double error = std::fabs(get(y.get(), dtype, i) - number(i, backward ? 5 : 1));
    worst = error <= worst ? worst : error;
  }
  for (int64_t i = 0; backward && i < H * Wf * C * 2; i += 2) sum += get(dweight.get(), computed, i);
  const bool right = worst <= 1e-4 && (!backward || std::fabs(sum - product) <= 1e-4 * static_cast<double>(size) * 50);
  if (right) return;
  failures++;
  std::printf("[%lld, %lld, %lld, %lld] dtype %d planes %d backward %d: error %g, sum %g of %g\n",
              static_cast<long long>(B), static_cast<long long>(H), static_cast<long long>(W),
              static_cast<long long>(C), static_cast<int>(dtype), planes, backward, worst, sum, product);
}

}  // namespace

int main() {
  // Unrolled and any lengths, odd and even; channels below, at and beyond the lanes; planes below and beyond a vector.
  const std::vector<Shape> shapes = {{1, 1, 1, 1},   {3, 7, 7, 17},  {2, 8, 14, 16},  {2, 16, 28, 3}, {1, 32, 56, 5},
                                     {1, 64, 2, 20}, {9, 3, 5, 19},  {2, 2, 3, 33},   {1, 11, 26, 4}, {2, 1, 9, 16},
                                     {2, 13, 1, 9},  {5, 6, 10, 16}, {1, 49, 12, 18}, {2, 4, 3, 8}};
  for (const Shape& shape : shapes) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16}) {
      for (const bool planes : {false, true}) {
        for (const bool backward : {false, true}) run(shape, dtype, planes, backward);
      }
    }
  }
  return failures > 0;
}
