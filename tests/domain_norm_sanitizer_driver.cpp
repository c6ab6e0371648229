// Runs the kernels of domain_norm on edge shapes in a program of its own, to be built with sanitizers together with
// csrc/cpu/domain_norm.cpp: arrays of exactly the sizes that cpu_api.h asks for, results full of NaN before. Every
// kernel runs once over all tasks and once task by task from the last to the first, so that what a task writes outside
// its own part, inside an array, destroys the result of another one. Ends with status 1 and a message if results
// differ or are not finite.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "neuraldeps/cpu_api.h"

namespace nd::cpu::ND_CPU_LEVEL {
int64_t norm_blocks(const NormArgs& args);
void norm_moments(const NormArgs& args, int64_t begin, int64_t end);
void norm_affine(const NormArgs& args, int64_t begin, int64_t end);
void norm_sums(const NormArgs& args, int64_t begin, int64_t end);
void norm_input_grad(const NormArgs& args, int64_t begin, int64_t end);
void domain_norm_forward(const DomainNormArgs& args, NormStage stage, int64_t begin, int64_t end);
void domain_norm_backward(const DomainNormArgs& args, NormStage stage, int64_t begin, int64_t end);
}  // namespace nd::cpu::ND_CPU_LEVEL

namespace {

namespace level = nd::cpu::ND_CPU_LEVEL;
using nd::cpu::DomainNormArgs;
using nd::cpu::Dtype;
using nd::cpu::NormArgs;
using nd::cpu::NormStage;

int failures = 0;

// `count` values of a dtype: -1, 0.5, 1 or 2, or, as `results`, NaN.
class Array {
 public:
  Array(Dtype dtype, int64_t count, bool results = false)
      : dtype_(dtype), bytes_(static_cast<size_t>(count) * size(dtype)), data_(std::malloc(bytes_ ? bytes_ : 1)) {
    std::memset(data_, 0xff, bytes_);
    static unsigned state = 1;
    for (int64_t i = 0; i < count && !results; i++) set(i, (state = state * 1664525u + 1013904223u) >> 30);
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;

  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }
  void forget() const { std::memset(data_, 0xff, bytes_); }
  std::vector<char> copy() const { return {data<char>(), data<char>() + bytes_}; }

  bool finite() const {
    for (size_t i = 0; i < bytes_ / size(dtype_); i++) {
      const uint16_t bits = size(dtype_) == 2 ? data<uint16_t>()[i] : 0;
      const uint16_t exponent = dtype_ == Dtype::kFloat16 ? 0x7c00 : 0x7f80;
      if (size(dtype_) == 2 ? (bits & exponent) == exponent
                            : !std::isfinite(dtype_ == Dtype::kFloat64 ? data<double>()[i] : data<float>()[i]))
        return false;
    }
    return true;
  }

 private:
  static size_t size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
  void set(int64_t i, unsigned which) {
    const float value[] = {-1.0f, 0.5f, 1.0f, 2.0f};
    const uint16_t bfloat16[] = {0xbf80, 0x3f00, 0x3f80, 0x4000}, float16[] = {0xbc00, 0x3800, 0x3c00, 0x4000};
    if (dtype_ == Dtype::kFloat64)
      data<double>()[i] = static_cast<double>(value[which]);
    else if (dtype_ == Dtype::kFloat32)
      data<float>()[i] = value[which];
    else
      data<uint16_t>()[i] = dtype_ == Dtype::kBfloat16 ? bfloat16[which] : float16[which];
  }

  Dtype dtype_;
  size_t bytes_;
  void* data_;
};

struct Shape {
  int64_t N, C, S;
};

void expect(bool right, const char* what, const NormArgs& args) {
  if (right) return;
  failures++;
  std::printf("%s [%lld, %lld, %lld] dtype %d channels_last %d\n", what, static_cast<long long>(args.N),
              static_cast<long long>(args.C), static_cast<long long>(args.S), static_cast<int>(args.dtype),
              args.channels_last);
}

// run(backwards) fills the results.
template <class F, class... Arrays>
void check(const char* what, const NormArgs& args, const F& run, const Arrays&... results) {
  (results.forget(), ...);
  run(false);
  expect((results.finite() && ...), what, args);
  const std::vector<char> first[] = {results.copy()...};
  (results.forget(), ...);
  run(true);
  const std::vector<char> second[] = {results.copy()...};
  for (size_t i = 0; i < sizeof...(results); i++) expect(first[i] == second[i], what, args);
}

// kernel(begin, end) over all tasks at once, or one by one from the last to the first.
template <class F>
void over(int64_t tasks, bool backwards, const F& kernel) {
  if (!backwards) return kernel(0, tasks);
  for (int64_t t = tasks; t-- > 0;) kernel(t, t + 1);
}

void by_sample(Shape shape, Dtype dtype, bool channels_last) {
  const Dtype wide = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  const int64_t values = shape.N * shape.C * shape.S, rows = shape.N * shape.C;
  const Array x(dtype, values), grad(dtype, values), y(dtype, values), residual(dtype, values);
  const Array mean(wide, rows), scale(wide, rows), shift(wide, rows), slope(wide, rows);
  const Array out(dtype, values, true), out_residual(dtype, values, true), sum(wide, rows, true),
      other(wide, rows, true);
  NormArgs args = {};
  args.dtype = dtype;
  args.channels_last = channels_last;
  args.N = shape.N;
  args.C = shape.C;
  args.S = shape.S;
  args.x = x.data();
  args.mean = mean.data();
  args.scale = scale.data();
  args.shift = shift.data();
  args.slope = slope.data();
  args.sum = sum.data();
  args.centred_sum = other.data();
  args.out = out.data();
  const int64_t tasks = shape.N * level::norm_blocks(args);
  const auto run = [&](void (*kernel)(const NormArgs&, int64_t, int64_t)) {
    return [&args, tasks, kernel](bool backwards) {
      over(tasks, backwards, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    };
  };
  check("moments", args, run(level::norm_moments), sum, other);
  for (const bool flag : {false, true}) {
    for (const bool relu : {false, true}) {
      args.residual = flag ? residual.data() : nullptr;
      args.relu = relu;
      check("affine", args, run(level::norm_affine), out);
    }
  }
  check("gradient of moments", args, run(level::norm_input_grad), out);
  args.grad = grad.data();
  for (const bool mask : {false, true}) {
    args.result = mask ? y.data() : nullptr;
    check("sums", args, run(level::norm_sums), sum, other);
    args.out_residual = nullptr;
    check("gradient", args, run(level::norm_input_grad), out);
    args.out_residual = out_residual.data();
    check("gradient with residual", args, run(level::norm_input_grad), out, out_residual);
  }
}

// Samples alternate between two of three groups; the last group is empty.
void by_domain(Shape shape, Dtype dtype, bool channels_last, bool staged) {
  const Dtype wide = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  const int64_t groups = 3, values = shape.N * shape.C * shape.S, rows = shape.N * shape.C, table = groups * shape.C;
  const Array x(dtype, values), grad(dtype, values), weight(wide, table), bias(wide, table);
  const Array y(dtype, values, true), dx(dtype, values, true), dresidual(dtype, values, true);
  const Array partial(Dtype::kFloat64, rows, true), centred_partial(Dtype::kFloat64, rows, true);
  const Array mean(Dtype::kFloat64, table, true), variance(Dtype::kFloat64, table, true);
  const Array weight_grad(Dtype::kFloat64, table, true), bias_grad(Dtype::kFloat64, table, true);
  const Array centre(wide, table, true), scale(wide, table, true), shift(wide, table, true), slope(wide, table, true);
  std::vector<int64_t> group, order, first = {0};
  for (int64_t n = 0; n < shape.N; n++) group.push_back(n % 2);
  for (int64_t k = 0; k < groups; k++) {
    for (int64_t n = k; k < 2 && n < shape.N; n += 2) order.push_back(n);
    first.push_back(static_cast<int64_t>(order.size()));
  }
  DomainNormArgs args = {};
  args.values.dtype = dtype;
  args.values.channels_last = channels_last;
  args.values.N = shape.N;
  args.values.C = shape.C;
  args.values.S = shape.S;
  args.values.x = x.data();
  args.values.out = y.data();
  args.values.relu = true;
  args.groups = groups;
  args.group = group.data();
  args.order = order.data();
  args.first = first.data();
  args.partial = partial.data<double>();
  args.centred_partial = centred_partial.data<double>();
  args.mean = mean.data<double>();
  args.variance = variance.data<double>();
  args.weight = weight.data();
  args.bias = bias.data();
  args.eps = 1e-5;
  args.batch_statistics = true;
  args.weight_grad = weight_grad.data<double>();
  args.bias_grad = bias_grad.data<double>();
  args.centre = centre.data();
  args.scale = scale.data();
  args.shift = shift.data();
  args.slope = slope.data();
  const int64_t blocks = level::norm_blocks(args.values);
  const auto run = [&](void (*kernel)(const DomainNormArgs&, NormStage, int64_t, int64_t)) {
    return [&args, &shape, blocks, staged, kernel](bool backwards) {
      const auto stage = [&](NormStage which, int64_t units) {
        over(units * blocks, backwards, [&](int64_t begin, int64_t end) { kernel(args, which, begin, end); });
      };
      if (!staged) return stage(NormStage::kAll, groups);
      stage(NormStage::kReduce, shape.N);
      stage(NormStage::kMerge, groups);
      stage(NormStage::kApply, shape.N);
    };
  };
  check("forward", args.values, run(level::domain_norm_forward), y, mean, variance);
  args.values.result = y.data();
  args.values.grad = grad.data();
  args.values.out = dx.data();
  args.values.out_residual = dresidual.data();
  check("backward", args.values, run(level::domain_norm_backward), dx, dresidual, weight_grad, bias_grad);
  args.values.result = nullptr;
  args.values.out_residual = nullptr;
  check("backward without mask", args.values, run(level::domain_norm_backward), dx, weight_grad, bias_grad);
}

}  // namespace

int main() {
  // Fewer channels and positions than lanes, one more and one less than registers and blocks hold, a row longer than
  // what is added without a look at what is pending.
  const Shape shapes[] = {{2, 1, 1},   {3, 5, 3},   {2, 16, 16},  {2, 17, 15}, {4, 33, 20}, {2, 63, 4},
                          {2, 65, 33}, {3, 127, 7}, {2, 129, 16}, {5, 257, 1}, {2, 130, 2}, {2, 3, 9001}};
  for (const Shape shape : shapes) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBfloat16, Dtype::kFloat16}) {
      for (const bool channels_last : {false, true}) {
        by_sample(shape, dtype, channels_last);
        for (const bool staged : {false, true}) by_domain(shape, dtype, channels_last, staged);
      }
    }
  }
  return failures > 0;
}
