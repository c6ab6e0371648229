// Runs CPU kernels on edge shapes in a program of its own, to be built with sanitizers: buffers of exactly the size
// that cpu_api.h asks for, work space and results full of NaN, tasks one by one and last first. Ends with status 1 and
// a message if a result is wrong.
//
//   -DND_DRIVE_COVARIANCE    with csrc/cpu/covariance.cpp
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "neuraldeps/cpu_api.h"

namespace {

int failures = 0;

void expect(bool right, const char* what, int64_t a, int64_t b, double error) {
  if (right) return;
  failures++;
  std::printf("%s [%lld, %lld]: error %g\n", what, static_cast<long long>(a), static_cast<long long>(b), error);
}

// Memory of exactly `bytes`, aligned to 64, every byte 0xff (NaN in every floating type).
struct Memory {
  explicit Memory(size_t bytes) : data(std::aligned_alloc(64, bytes), &std::free) {
    std::memset(data.get(), 0xff, bytes);
  }
  std::unique_ptr<void, decltype(&std::free)> data;
};

}  // namespace

#if defined(ND_DRIVE_COVARIANCE)
namespace nd::cpu::ND_CPU_LEVEL {
MomentsPlan moments_plan(const MomentsArgs& args);
void moments_start(const MomentsArgs& args);
void moments_pack(const MomentsArgs& args, int64_t chunk, int64_t begin, int64_t end);
void moments_multiply(const MomentsArgs& args, int64_t chunk, int64_t begin, int64_t end);
void moments_finish(const MomentsArgs& args, int64_t begin, int64_t end);
}  // namespace nd::cpu::ND_CPU_LEVEL

namespace {

using nd::cpu::Dtype;
using nd::cpu::MomentsArgs;

struct Element {
  Dtype dtype;
  size_t bytes;
};

// Stores `value` and returns what was stored.
double put(void* x, int64_t index, double value, Dtype dtype) {
  if (dtype == Dtype::kFloat64) return static_cast<double*>(x)[index] = value;
  const float single = static_cast<float>(value);
  if (dtype == Dtype::kFloat32) return static_cast<float*>(x)[index] = single;
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  if (dtype == Dtype::kBfloat16) {
    static_cast<uint16_t*>(x)[index] = static_cast<uint16_t>(bits >> 16);
    bits &= 0xffff0000u;
  } else {  // float16 of a normal number in range, cut to 11 digits
    const uint32_t exponent = (bits >> 23) & 0xffu;
    static_cast<uint16_t*>(x)[index] =
        static_cast<uint16_t>((bits >> 16 & 0x8000u) | ((exponent - 112) << 10) | ((bits >> 13) & 0x3ffu));
    bits &= 0xffffe000u;
  }
  float stored;
  std::memcpy(&stored, &bits, 4);
  return stored;
}

void drive_covariance(int64_t rows, int64_t n, Element element, bool weighted) {
  namespace level = nd::cpu::ND_CPU_LEVEL;
  nd::cpu::Kernels kernels = {};
  kernels.moments_plan = level::moments_plan;
  kernels.moments_start = level::moments_start;
  kernels.moments_pack = level::moments_pack;
  kernels.moments_multiply = level::moments_multiply;
  kernels.moments_finish = level::moments_finish;

  std::mt19937 random(static_cast<unsigned>(rows * 1000 + n));
  std::uniform_real_distribution<double> uniform(0.5, 1.5);
  const int64_t stride = n + 3;  // the last row ends with its last column
  std::vector<char> x(rows ? static_cast<size_t>((rows - 1) * stride + n) * element.bytes : 0);
  std::vector<double> value(static_cast<size_t>(rows * n)), weight(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; r++) {
    weight[static_cast<size_t>(r)] = weighted ? (r % 3 == 1 ? 0.0 : uniform(random)) : 1.0;
    for (int64_t c = 0; c < n; c++)
      value[static_cast<size_t>(r * n + c)] = put(x.data(), r * stride + c, uniform(random), element.dtype);
  }

  std::vector<double> mean(static_cast<size_t>(n), NAN), moment(static_cast<size_t>(n * n), NAN);
  double weight_sum = NAN;
  MomentsArgs args = {x.data(),    element.dtype, rows,          n,      stride, weighted ? weight.data() : nullptr,
                      &weight_sum, mean.data(),   moment.data(), nullptr};
  Memory workspace(static_cast<size_t>(kernels.moments_plan(args).workspace_bytes));
  args.workspace = workspace.data.get();
  nd::cpu::compute_moments(kernels, args, [](int64_t count, const auto& task) {
    for (int64_t t = count - 1; t >= 0; t--) task(t, t + 1);
  });

  double expected_sum = 0;
  std::vector<double> expected_mean(static_cast<size_t>(n), 0.0);
  for (int64_t r = 0; r < rows; r++) {
    expected_sum += weight[static_cast<size_t>(r)];
    for (int64_t c = 0; c < n; c++)
      expected_mean[static_cast<size_t>(c)] += weight[static_cast<size_t>(r)] * value[static_cast<size_t>(r * n + c)];
  }
  expect(std::fabs(weight_sum - expected_sum) <= 1e-12 * expected_sum, "sum of weights", rows, n, weight_sum);
  for (double& m : expected_mean) m = expected_sum > 0 ? m / expected_sum : 0;
  double error = 0;
  for (int64_t j = 0; j < n; j++) {
    for (int64_t i = 0; i < n; i++) {
      double sum = 0;
      for (int64_t r = 0; r < rows; r++)
        sum += weight[static_cast<size_t>(r)] *
               (value[static_cast<size_t>(r * n + i)] - expected_mean[static_cast<size_t>(i)]) *
               (value[static_cast<size_t>(r * n + j)] - expected_mean[static_cast<size_t>(j)]);
      const double difference = std::fabs(moment[static_cast<size_t>(j * n + i)] - sum);
      error = difference <= error ? error : difference;  // NaN stays
    }
  }
  expect(error <= 1e-5 * (1 + expected_sum), "moment", rows, n, error);
}

}  // namespace
#endif

int main() {
#if defined(ND_DRIVE_COVARIANCE)
  const Element elements[] = {{Dtype::kFloat32, 4}, {Dtype::kFloat64, 8}, {Dtype::kBfloat16, 2}, {Dtype::kFloat16, 2}};
  // Rows around the row group 8 and the block 384; columns around registers, panels (48) and tiles (96).
  const int64_t shapes[][2] = {{0, 1},    {1, 1},   {2, 15},   {9, 16},   {3, 17},  {383, 47},
                               {384, 49}, {385, 5}, {900, 33}, {400, 95}, {17, 97}, {40, 193}};
  for (const auto& shape : shapes) {
    for (const Element& element : elements) {
      for (const bool weighted : {false, true}) drive_covariance(shape[0], shape[1], element, weighted);
    }
  }
#endif
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
