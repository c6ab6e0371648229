// Runs the CUDA CovLasso kernel on small problems from a fixed random covariance, for the sanitizers: n, the ratio
// lam / lambda_max and the rank on the command line. With a fourth word every fifth category is excluded and the others
// have penalties of their own. Prints the status of every target; 1 if one is not converged.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

namespace {

template <class T, class Size, class Solve>
int run(int n, double ratio, int rank, bool penalised, double tol, Size workspace_size, Solve solve) {
  const int ld = (n + 15) / 16 * 16, rows = 3, capacity = n - 1;
  std::vector<double> x(static_cast<size_t>(rank) * n);
  unsigned state = 1;
  for (double& v : x) v = static_cast<int>((state = state * 1664525u + 1013904223u) >> 16) / 32768.0 - 1;
  std::vector<T> penalty(n, T(1));
  for (int j = 0; penalised && j < n; j++) penalty[j] = j % 5 == 3 ? T(INFINITY) : T(0.75 + 0.25 * (j % 3));
  T* cov = static_cast<T*>(std::aligned_alloc(64, sizeof(T) * n * ld));
  std::vector<double> lam(rows, 0.0);
  std::vector<int64_t> targets = {0, n / 2, n - 1};
  for (int i = 0; i < n; i++)
    for (int j = 0; j < ld; j++) {
      double sum = 0;
      for (int r = 0; j < n && r < rank; r++) sum += x[r * n + i] * x[r * n + j];
      cov[i * ld + j] = static_cast<T>(sum);
    }
  for (int t = 0; t < rows; t++)
    for (int j = 0; j < n; j++) {
      const double size = std::fabs(cov[targets[t] * ld + j]) / penalty[j];
      if (j != targets[t] && 2 * ratio * size > lam[t]) lam[t] = 2 * ratio * size;
    }
  std::vector<int32_t> index(rows * capacity), count(rows);
  std::vector<T> value(rows * capacity);
  std::vector<double> info(rows * 6);
  const size_t bytes = (workspace_size(n, rows) + 255) / 256 * 256;
  void* workspace = std::aligned_alloc(256, bytes);
  const int code = solve(cov, n, ld, targets.data(), lam.data(), rows, penalised ? penalty.data() : nullptr, 0, tol,
                         20000, index.data(), value.data(), capacity, count.data(), info.data(), workspace, nullptr);
  bool converged = code == 0;
  for (int t = 0; t < rows; t++) {
    std::printf("n %d target %d: %d nonzeros, status %g\n", n, t, count[t], info[t * 6 + 4]);
    converged &= info[t * 6 + 4] == 0;
  }
  std::free(workspace);
  std::free(cov);
  return converged ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const int n = std::atoi(argv[1]), rank = std::atoi(argv[3]);
  const double ratio = std::atof(argv[2]);
  return run<float>(n, ratio, rank, argc > 4, 1e-6, nd_covlasso_workspace_f32, nd_covlasso_f32) |
         run<double>(n, ratio, rank, argc > 4, 1e-12, nd_covlasso_workspace_f64, nd_covlasso_f64);
}
