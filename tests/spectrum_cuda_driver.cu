// Runs the CUDA kernels of spectrum on two random matrices [m, n] of some types, for the sanitizers: m, n, and the
// types as digits of cuda_api.h. Values, ranks (also where only the bidiagonal form decides, and hermitian), vectors,
// gradients; results and workspace of exactly the size asked for. Prints a line for each; 1 if a result is wrong, by
// sum sigma_i^2 = sum a_ij^2.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

namespace {

constexpr int kBatch = 2, kTolerances = 3;

int failures = 0;

void run(const NdSpectrumArgs& args, const char* what) {
  const size_t bytes = nd_spectrum_workspace(&args);
  void* workspace = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (nd_spectrum(&args, workspace, nullptr) != 0) failures++;
  std::free(workspace);
  std::printf("%s, dtype %d, %zu bytes of workspace\n", what, args.dtype, bytes);
}

void expect(double value, double expected, double tolerance) {
  if (std::fabs(value - expected) <= tolerance * std::fabs(expected)) return;
  failures++;
  std::printf("  %.17g instead of %.17g\n", value, expected);
}

// Sum of squares of x [kBatch * each], which is float64 or float32.
double squares(const std::vector<char>& x, bool is_double, size_t each) {
  double sum = 0;
  for (size_t i = 0; i < each; i++) {
    double value = 0;
    float single = 0;
    std::memcpy(&value, x.data() + 8 * i, is_double ? 8 : 0);
    std::memcpy(&single, x.data() + 4 * i, is_double ? 0 : 4);
    sum += is_double ? value * value : static_cast<double>(single) * single;
  }
  return sum;
}

void drive(int m, int n, int dtype) {
  const int k = m < n ? m : n, size = m * n, stride = n + 3;
  const bool is_double = dtype == 1;
  const size_t bytes = is_double ? 8 : dtype == 0 ? 4 : 2, own = is_double ? 8 : 4;
  std::vector<char> a((kBatch * m * stride - 3) * bytes);
  unsigned state = 1;
  double total = 0;
  for (int i = 0; i < kBatch * m; i++) {
    for (int j = 0; j < n; j++) {
      const double value = 0.5 + 0.5 * ((state = state * 1664525u + 1013904223u) >> 25) / 128.0;
      const float single = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &single, 4);
      const uint16_t bfloat = static_cast<uint16_t>(bits >> 16);
      const uint16_t half = static_cast<uint16_t>((((bits >> 23) - 112) << 10) | ((bits >> 13) & 0x3ffu));
      char* at = a.data() + (i * stride + j) * bytes;
      if (dtype == 0) std::memcpy(at, &single, 4);
      if (dtype == 1) std::memcpy(at, &value, 8);
      if (dtype == 2) std::memcpy(at, &bfloat, 2);
      if (dtype == 3) std::memcpy(at, &half, 2);
      total += value * value;
    }
  }
  NdSpectrumArgs plain = {};
  plain.a = a.data();
  plain.dtype = dtype;
  plain.batch = kBatch;
  plain.m = m;
  plain.n = n;
  plain.batch_stride = m * stride;
  plain.row_stride = stride;
  std::vector<char> values(kBatch * k * own);
  NdSpectrumArgs args = plain;
  args.values = values.data();
  run(args, "values");
  expect(squares(values, is_double, kBatch * k), total, 1e-5);

  const double rtol[kTolerances] = {0.9, 1e-9, 0};
  std::vector<int64_t> rank(kBatch * kTolerances);
  args = plain;
  args.rank = rank.data();
  args.rtol = rtol;
  args.num_rtol = kTolerances;
  run(args, "ranks");
  for (int b = 0; b < kBatch; b++) expect(static_cast<double>(rank[b * kTolerances]), 1, 0);
  if (m >= n) {
    args.m = n;
    args.hermitian = 1;
    run(args, "hermitian ranks");
    for (int b = 0; b < kBatch; b++) expect(static_cast<double>(rank[b * kTolerances]), 1, 0);
  }

  std::vector<double> lengths(kBatch * k), basis(kBatch * k * k);
  args = plain;
  args.values = lengths.data();
  args.basis = basis.data();
  run(args, "vectors");
  double sum = 0;
  for (double x : lengths) sum += x * x;
  expect(sum, total, 1e-12);

  std::vector<char> grad(kBatch * k * own), gradient(kBatch * size * own);
  for (int i = 0; i < kBatch * k; i++) {
    const double value = 1;
    const float single = 1;
    std::memcpy(grad.data() + i * own, is_double ? static_cast<const void*>(&value) : &single, own);
  }
  args = plain;
  args.value_gradient = grad.data();
  args.gradient = gradient.data();
  run(args, "gradient");
  expect(squares(gradient, is_double, kBatch * size), kBatch * k, 1e-5);
}

}  // namespace

int main(int, char** argv) {
  for (const char* dtype = argv[3]; *dtype; dtype++) drive(std::atoi(argv[1]), std::atoi(argv[2]), *dtype - '0');
  return failures > 0;
}
