// Runs the kernel of spectrum on edge shapes in a program of its own, to be built with sanitizers together with
// csrc/cpu/spectrum.cpp: inputs, results and work space of exactly the size that cpu_api.h asks for, full of NaN
// before. Ends with status 1 and a message if a result is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "neuraldeps/cpu_api.h"

namespace nd::cpu::ND_CPU_LEVEL {
SpectrumPlan spectrum_plan(const SpectrumArgs& args);
void spectrum(const SpectrumArgs& args, int64_t begin, int64_t end, void* workspace);
}  // namespace nd::cpu::ND_CPU_LEVEL

namespace {

using nd::cpu::Dtype;
using nd::cpu::SpectrumArgs;

int failures = 0;

void expect(bool right, const char* what, const SpectrumArgs& args, double error) {
  if (right) return;
  failures++;
  std::printf("%s [%lld, %lld, %lld] dtype %d: %g\n", what, static_cast<long long>(args.batch),
              static_cast<long long>(args.m), static_cast<long long>(args.n), static_cast<int>(args.dtype), error);
}

// Exactly `bytes`, every byte 0xff: NaN in every floating type.
std::unique_ptr<char, decltype(&std::free)> memory(int64_t bytes, size_t alignment) {
  char* data = static_cast<char*>(std::aligned_alloc(alignment, static_cast<size_t>(bytes)));
  std::memset(data, 0xff, static_cast<size_t>(bytes));
  return {data, &std::free};
}

void run(const SpectrumArgs& args) {
  const nd::cpu::SpectrumPlan plan = nd::cpu::ND_CPU_LEVEL::spectrum_plan(args);
  const int64_t group = args.forms ? 8 : plan.group / 2 + 1;  // results must not depend on it
  for (int64_t begin = (args.batch - 1) / group * group; begin >= 0; begin -= group) {
    const auto workspace = memory((plan.workspace_bytes + 63) / 64 * 64, 64);
    const int64_t end = begin + group < args.batch ? begin + group : args.batch;
    nd::cpu::ND_CPU_LEVEL::spectrum(args, begin, end, workspace.get());
  }
}

// Entries in [0.5, 1) have sum sigma_i^2 = sum a_ij^2 and more than one value above half of the largest never.
void drive(int64_t batch, int64_t m, int64_t n, Dtype dtype, size_t bytes) {
  const int64_t k = m < n ? m : n, stride = n + 3, size = (m - 1) * stride + n;
  std::vector<char> a(static_cast<size_t>(batch * size) * bytes);
  std::vector<double> energy(static_cast<size_t>(batch), 0.0);
  std::mt19937 random(static_cast<unsigned>(m * 1000 + n));
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t i = 0; i < m; i++) {
      for (int64_t j = 0; j < n; j++) {
        const double value = 0.5 + 0.5 * static_cast<double>(random() % 128) / 128;
        char* at = a.data() + static_cast<size_t>(b * size + i * stride + j) * bytes;
        const float single = static_cast<float>(value);
        uint32_t bits;
        std::memcpy(&bits, &single, 4);
        const uint16_t bfloat = static_cast<uint16_t>(bits >> 16);
        const uint16_t half = static_cast<uint16_t>((((bits >> 23) - 112) << 10) | ((bits >> 13) & 0x3ffu));
        if (dtype == Dtype::kFloat64) std::memcpy(at, &value, 8);
        if (dtype == Dtype::kFloat32) std::memcpy(at, &single, 4);
        if (dtype == Dtype::kBfloat16) std::memcpy(at, &bfloat, 2);
        if (dtype == Dtype::kFloat16) std::memcpy(at, &half, 2);
        energy[static_cast<size_t>(b)] += value * value;
      }
    }
  }
  SpectrumArgs args = {};
  args.a = a.data();
  args.dtype = dtype;
  args.batch = batch;
  args.m = m;
  args.n = n;
  args.batch_stride = size;
  args.row_stride = stride;

  const bool is_double = dtype == Dtype::kFloat64;
  std::vector<double> values(static_cast<size_t>(batch * k), NAN);
  std::vector<float> single(is_double ? 0 : static_cast<size_t>(batch * k), NAN);
  args.values = is_double ? static_cast<void*>(values.data()) : single.data();
  run(args);
  for (size_t i = 0; i < single.size(); i++) values[i] = single[i];
  for (int64_t b = 0; b < batch; b++) {
    double sum = 0;
    for (int64_t i = 0; i < k; i++)
      sum += values[static_cast<size_t>(b * k + i)] * values[static_cast<size_t>(b * k + i)];
    const double all = energy[static_cast<size_t>(b)], error = std::fabs(sum - all) / all;
    expect(error <= 1e-5, "sum of squared values", args, error);
  }

  const double rtol[] = {0.5, 1e-9};  // the second one undecided by a Gram matrix
  std::vector<int64_t> rank(static_cast<size_t>(batch * 2), -7);
  args.values = nullptr;
  args.rank = rank.data();
  args.rtol = rtol;
  args.num_rtol = 2;
  for (const bool hermitian : {false, true}) {
    if (hermitian && m != n) continue;
    args.hermitian = hermitian;
    run(args);
    for (int64_t b = 0; b < batch; b++)
      expect(rank[static_cast<size_t>(2 * b)] == 1, "rank", args,
             static_cast<double>(rank[static_cast<size_t>(2 * b)]));
  }
  if (is_double) return;

  args.rank = nullptr;
  args.hermitian = false;
  args.values = values.data();
  std::vector<double> basis(static_cast<size_t>(batch * k * k), NAN);
  args.basis = basis.data();
  run(args);
  double worst = 0;
  for (int64_t row = 0; row < batch * k; row++) {
    double sum = 0;
    for (int64_t j = 0; j < k; j++)
      sum += basis[static_cast<size_t>(row * k + j)] * basis[static_cast<size_t>(row * k + j)];
    worst = std::fabs(sum - 1) <= worst ? worst : std::fabs(sum - 1);  // NaN stays
  }
  expect(worst <= 1e-12, "length of a vector", args, worst);

  args.values = nullptr;
  args.basis = nullptr;
  std::vector<float> of_values(static_cast<size_t>(batch * k), 0.0f);
  std::vector<float> gradient(static_cast<size_t>(batch * m * n), NAN);
  const std::unique_ptr<bool[]> unresolved(new bool[static_cast<size_t>(batch)]);
  for (int64_t b = 0; b < batch; b++) of_values[static_cast<size_t>(b * k)] = 1;
  const auto forms = memory((nd::cpu::spectrum_forms(batch, k) * 8 + 63) / 64 * 64, 64);
  args.values = single.data();
  args.forms = reinterpret_cast<double*>(forms.get());
  run(args);
  args.values = nullptr;
  args.value_gradient = of_values.data();
  args.gradient = gradient.data();
  args.unresolved = unresolved.get();
  run(args);
  const std::vector<float> from_forms = gradient;
  std::fill(gradient.begin(), gradient.end(), NAN);
  args.forms = nullptr;
  run(args);
  double difference = 0;
  for (size_t i = 0; i < gradient.size(); i++)
    difference = std::fmax(difference, std::fabs(gradient[i] - from_forms[i]));
  expect(difference <= 1e-6, "gradient from forms", args, difference);
  for (int64_t b = 0; b < batch; b++) {  // u_1 v_1' has norm 1
    double sum = 0;
    for (int64_t i = 0; i < m * n; i++) {
      const double g = gradient[static_cast<size_t>(b * m * n + i)];
      sum += g * g;
    }
    expect(std::fabs(sum - 1) <= 1e-5, "gradient", args, sum);
    expect(!unresolved[static_cast<size_t>(b)], "unresolved", args, 1);
  }
}

}  // namespace

int main() {
  const std::pair<Dtype, size_t> dtypes[] = {
      {Dtype::kFloat32, 4}, {Dtype::kFloat64, 8}, {Dtype::kBfloat16, 2}, {Dtype::kFloat16, 2}};
  // Batches around the lanes and chains; sides around registers and tiles; ranks beyond the lanes (k > 160).
  const int64_t shapes[][3] = {{1, 1, 1},   {3, 1, 7},    {9, 2, 1},   {17, 2, 2},    {5, 8, 9},
                               {18, 17, 5}, {2, 33, 150}, {4, 41, 25}, {1, 161, 170}, {1, 200, 163}};
  for (const auto& shape : shapes) {
    for (const auto& [dtype, bytes] : dtypes) drive(shape[0], shape[1], shape[2], dtype, bytes);
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
