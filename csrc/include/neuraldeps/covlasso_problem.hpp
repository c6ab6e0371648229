// One CovLasso call on the CPU, from a caller's covariance to results in its units: checks of values, scale, packing,
// solving. Shared by the operators (csrc/torch) and the Python module (python_bindings); each brings its own memory and
// its own threads as
//
//   parallel(count, grain, f)   calls f(begin, end) over [0, count) in any order, and returns when all are done
//
// Results do not depend on how `parallel` divides. Wrong values throw std::invalid_argument.
#pragma once
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "neuraldeps/cpu_api.h"

namespace nd {

[[noreturn]] inline void invalid(const std::string& message) { throw std::invalid_argument(message); }

// Values per row of a packed [n, ld] covariance: rows of whole 64-byte lines, 16 values at least, and an odd number of
// lines: a power of two would map rows on one set of cache lines.
inline int64_t leading_dimension(int64_t n, int64_t bytes_per_value) {
  const int64_t lines = (n + 15) / 16 * 16 * bytes_per_value / 64;
  return (lines | 1) * 64 / bytes_per_value;
}

}  // namespace nd

namespace nd::cpu {

constexpr double kAsymmetryAllowed = 1e-5;  // of the largest variance: what other libraries' rounding leaves

// The kernels of one type of values.
template <class T>
struct CovlassoKernels;
template <>
struct CovlassoKernels<float> {
  static auto solve() { return kernels().covlasso_f32; }
  static auto pack() { return kernels().covlasso_pack_f32; }
  static auto lambda_max() { return kernels().lambda_max_f32; }
};
template <>
struct CovlassoKernels<double> {
  static auto solve() { return kernels().covlasso_f64; }
  static auto pack() { return kernels().covlasso_pack_f64; }
  static auto lambda_max() { return kernels().lambda_max_f64; }
};

inline void check_targets(const int64_t* targets, int64_t num_targets, int64_t n) {
  for (int64_t t = 0; t < num_targets; t++) {
    if (targets[t] < 0 || targets[t] >= n)
      invalid("targets[" + std::to_string(t) + "] is " + std::to_string(targets[t]) + "; expected 0 to " +
              std::to_string(n - 1));
  }
}

// The power of two that brings the largest variance near one; checks the diagonal.
template <class T>
double covariance_scale(const T* cov, int64_t n, int64_t stride) {
  double top = 0;
  for (int64_t i = 0; i < n; i++) {
    const double variance = cov[i * stride + i];
    if (!std::isfinite(variance))
      invalid("cov has a NaN or infinite entry at [" + std::to_string(i) + ", " + std::to_string(i) + "]");
    if (variance < 0)
      invalid("cov[" + std::to_string(i) + ", " + std::to_string(i) + "] is " + std::to_string(variance) +
              "; a variance is not negative");
    top = variance > top ? variance : top;
  }
  return top > 0 ? std::ldexp(1.0, -std::ilogb(top)) : 1.0;
}

// Packs cov [n, n], rows `stride` values apart, into `packed` [n, leading_dimension(n)], aligned to 64 bytes, and
// returns the scale it was multiplied by.
template <class T, class Parallel>
double pack_covariance(const T* cov, int64_t n, int64_t stride, T* packed, const Parallel& parallel) {
  const int64_t groups = (n + kCovlassoTile - 1) / kCovlassoTile;
  const double scale = covariance_scale(cov, n, stride);
  std::vector<CovlassoPackFacts> facts(static_cast<size_t>(groups));
  const CovlassoPackArgs<T> args = {cov, n, stride, leading_dimension(n, sizeof(T)), scale, packed, facts.data()};
  parallel(groups, 8, [&](int64_t begin, int64_t end) { CovlassoKernels<T>::pack()(args, begin, end); });
  double asymmetry = 0;
  for (const CovlassoPackFacts& fact : facts) {
    if (!fact.finite) invalid("cov has a NaN or infinite entry");
    asymmetry = fact.asymmetry > asymmetry ? fact.asymmetry : asymmetry;
  }
  if (asymmetry > 2 * kAsymmetryAllowed)  // the largest variance is below 2 after scaling
    invalid("cov is not symmetric: entries differ by up to " + std::to_string(asymmetry / scale) +
            " from their mirror image");
  return scale;
}

// Solves the problems of `args`, whose cov was packed with `scale`; lam and the results are in units of the covariance
// before that. lam may be 0: the penalty at a ratio of a lambda_max of 0.
template <class T, class Parallel>
void solve_packed(CovlassoArgs<T> args, int64_t num_targets, double scale, const Parallel& parallel) {
  std::vector<double> scaled(args.lam, args.lam + num_targets);
  for (int64_t t = 0; t < num_targets; t++) {
    double& lam = scaled[static_cast<size_t>(t)];
    if (!(lam >= 0) || std::isinf(lam))
      invalid("lam[" + std::to_string(t) + "] is " + std::to_string(lam) + "; expected a finite positive number");
    lam *= scale;
  }
  args.lam = scaled.data();
  parallel(num_targets, 1, [&](int64_t begin, int64_t end) { CovlassoKernels<T>::solve()(args, begin, end); });
  for (int64_t t = 0; t < num_targets; t++)
    for (const int field : {kErr2, kDualityGap, kLambdaMax}) args.info[t * kCovlassoInfoSize + field] /= scale;
}

}  // namespace nd::cpu
