// Runs the CUDA CovLasso kernels on small problems from a fixed random covariance, for the sanitizers: n, the ratio
// lam / lambda_max, the rank and what is solved:
//
//   plain    three targets at one lam
//   penalty  every fifth category excluded, penalties of their own for the others
//   path     three lams, from the solution of the target before as a start, coefficients not negative
//   cross    targets outside the covariance, a matrix each, ridge, scale
//   top      seven nonzeros; of the ratio nothing is used
//
// Prints the status of every solution; 1 if one is not converged.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

namespace {

constexpr int kRows = 3, kTop = 7;

// Rows aligned to 64 bytes.
template <class T>
T* aligned(size_t size) {
  return static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64));
}

struct Problem {
  int n, rank;
  std::vector<double> x;  // [rank, n + kRows] samples

  double covariance(int i, int j) const {
    double sum = 0;
    for (int r = 0; r < rank; r++) sum += x[r * (n + kRows) + i] * x[r * (n + kRows) + j];
    return sum;
  }
};

template <class T, class Size, class Solve>
int run(int n, double ratio, int rank, const std::string& what, double tol, Size workspace_size, Solve solve) {
  const bool cross = what == "cross", path = what == "path", penalised = what == "penalty", top = what == "top";
  const int ld = (n + 15) / 16 * 16, lams = path ? 3 : 1, capacity = top ? kTop : n, matrices = cross ? kRows : 1;
  const double ridge = cross ? 0.25 : 0, scale = cross ? 0.5 : 1;
  Problem problem = {n, rank, std::vector<double>(static_cast<size_t>(rank) * (n + kRows))};
  unsigned state = 1;
  for (double& v : problem.x) v = static_cast<int>((state = state * 1664525u + 1013904223u) >> 16) / 32768.0 - 1;
  T* cov = aligned<T>(static_cast<size_t>(matrices) * n * ld);
  T* rows = aligned<T>(static_cast<size_t>(kRows) * ld);
  for (int m = 0; m < matrices; m++)
    for (int i = 0; i < n; i++)
      for (int j = 0; j < ld; j++)
        cov[(static_cast<size_t>(m) * n + i) * ld + j] =
            j < n ? static_cast<T>(scale * ((m + 1) * problem.covariance(i, j) + (i == j ? ridge : 0))) : T(0);
  std::vector<int64_t> targets = {0, cross ? 1 : n / 2, cross ? 2 : n - 1};
  std::vector<double> variance(kRows), lam(kRows * lams);
  std::vector<T> penalty(n, T(1));
  for (int j = 0; penalised && j < n; j++) penalty[j] = j % 5 == 3 ? T(INFINITY) : T(0.75 + 0.25 * (j % 3));
  for (int t = 0; t < kRows; t++) {
    variance[t] = problem.covariance(n + t, n + t);
    double largest = 0;
    for (int j = 0; j < ld; j++) {
      const double c = j < n ? problem.covariance(cross ? n + t : static_cast<int>(targets[t]), j) : 0;
      rows[t * ld + j] = static_cast<T>(scale * c);
      const bool candidate = j < n && (cross || j != targets[t]);
      if (candidate && (path ? c : std::fabs(c)) / penalty[j] > largest)
        largest = (path ? c : std::fabs(c)) / penalty[j];
    }
    for (int l = 0; l < lams; l++) lam[t * lams + l] = 2 * std::pow(ratio, (l + 1.0) / lams) * largest;
  }
  std::vector<int32_t> index(kRows * lams * capacity), count(kRows * lams), start_index(kRows * n),
      start_count(kRows, n);
  std::vector<T> value(kRows * lams * capacity), start_value(kRows * n);
  for (int x = 0; x < kRows * n; x++) start_index[x] = (7 * x) % (n + 3) - 1, start_value[x] = T(x % 3 - 1);
  std::vector<double> info(kRows * lams * 6), chosen(kRows);
  NdCovlassoArgs args = {};
  args.cov = cov;
  args.cov_stride = matrices > 1 ? n * ld : 0;
  args.n = n;
  args.ld = ld;
  args.cross = cross ? rows : nullptr;
  args.variance = variance.data();
  args.targets = targets.data();
  args.num_targets = kRows;
  args.lam = lam.data();
  args.num_lams = lams;
  args.penalty = penalised ? penalty.data() : nullptr;
  args.ridge = ridge;
  args.scale = cross ? &scale : nullptr;
  args.nonnegative = path;
  args.start_value = start_value.data();
  args.start_index = start_index.data();
  args.start_count = path ? start_count.data() : nullptr;
  args.start_capacity = n;
  args.tol = tol;
  args.max_pivots = 20000;
  args.index = index.data();
  args.value = value.data();
  args.capacity = capacity;
  args.count = count.data();
  args.info = info.data();
  void* workspace = std::aligned_alloc(256, (workspace_size(&args) + 255) / 256 * 256);
  bool converged = (top ? nd_covlasso_top_k_f64(&args, kTop, 0.5, chosen.data(), workspace, nullptr)
                        : solve(&args, workspace, nullptr)) == 0;
  for (int x = 0; x < kRows * lams; x++) {
    std::printf("%s, n %d, solution %d: %d nonzeros, status %g\n", what.c_str(), n, x, count[x], info[x * 6 + 4]);
    converged &= info[x * 6 + 4] == 0;
  }
  for (void* memory : {workspace, static_cast<void*>(cov), static_cast<void*>(rows)}) std::free(memory);
  return converged ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const int n = std::atoi(argv[1]), rank = std::atoi(argv[3]);
  const double ratio = std::atof(argv[2]);
  const std::string what = argc > 4 ? argv[4] : "plain";
  const int single =
      what == "top" ? 0 : run<float>(n, ratio, rank, what, 1e-6, nd_covlasso_workspace_f32, nd_covlasso_f32);
  return single | run<double>(n, ratio, rank, what, 1e-12, nd_covlasso_workspace_f64, nd_covlasso_f64);
}
