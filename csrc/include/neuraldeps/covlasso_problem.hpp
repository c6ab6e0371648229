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
#include <string>
#include <vector>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/invalid.hpp"

namespace nd {

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

// The largest of n variances, the diagonal of a matrix whose rows are `stride` apart; checks them.
template <class T>
double largest_variance(const T* cov, int64_t n, int64_t stride) {
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
  return top;
}

// Covariances [count, n, n] as the caller holds them: rows `stride` values apart, matrices `matrix_stride`.
template <class T>
struct Covariances {
  const T* data;
  int64_t count, n, matrix_stride, stride;
};

// The power of four that brings the largest variance between 1/2 and 2. Every step of the solver is exact under it,
// square roots included, so that it changes nothing but where numbers overflow.
inline double scale_for(double top) {
  const int exponent = std::ilogb(top);
  return std::ldexp(1.0, -(exponent + (exponent & 1)));
}

// What no variance exceeds: the largest one, or where several matrices share a scale a power of two, so that the result
// of one does not depend on the others.
inline double variance_bound(double top, int64_t matrices) { return matrices == 1 ? top : 2 / scale_for(top); }

// The bound of the variances if the kernels can read the matrices where they are, else 0. They can where rows are an
// odd number of whole 64-byte lines, aligned and without padding, the matrices exactly symmetric and finite, no ridge
// is to be added, and no variance is near the ends of the range of T.
template <class T, class Parallel>
double bound_in_place(const Covariances<T>& covs, double ridge, const Parallel& parallel) {
  constexpr double kFar = 1e12;
  const int64_t n = covs.n, groups = (n + kCovlassoTile - 1) / kCovlassoTile;
  const bool aligned =
      reinterpret_cast<uintptr_t>(covs.data) % 64 == 0 && (covs.count == 1 || covs.matrix_stride == n * n);
  if (ridge != 0 || !aligned || covs.stride != n || n != leading_dimension(n, sizeof(T))) return 0;
  std::vector<CovlassoPackFacts> facts(static_cast<size_t>(groups));
  double top = 0;
  for (int64_t m = 0; m < covs.count; m++) {
    const T* const cov = covs.data + m * covs.matrix_stride;
    top = std::fmax(top, largest_variance(cov, n, n));
    const CovlassoPackArgs<T> args = {cov, n, n, n, 1, 0, nullptr, facts.data()};
    parallel(groups, 8, [&](int64_t begin, int64_t end) { CovlassoKernels<T>::pack()(args, begin, end); });
    for (const CovlassoPackFacts& fact : facts)
      if (!fact.finite || fact.asymmetry != 0) return 0;
  }
  return top > 1 / kFar && top < kFar ? variance_bound(top, covs.count) : 0;
}

// What packing multiplied the matrices by, and the bound of their diagonal entries after it.
struct Scaling {
  double scale, variance_bound;
};

// Packs every matrix into `packed` [count, n, leading_dimension(n)], aligned to 64 bytes, with `ridge` on the diagonal.
// They are all multiplied by the power of four of scale_for.
template <class T, class Parallel>
Scaling pack_covariances(const Covariances<T>& covs, double ridge, T* packed, const Parallel& parallel) {
  const int64_t n = covs.n, groups = (n + kCovlassoTile - 1) / kCovlassoTile, ld = leading_dimension(n, sizeof(T));
  double top = 0;
  for (int64_t m = 0; m < covs.count; m++)
    top = std::fmax(top, largest_variance(covs.data + m * covs.matrix_stride, n, covs.stride));
  const double scale = top + ridge > 0 ? scale_for(top + ridge) : 1.0;
  std::vector<CovlassoPackFacts> facts(static_cast<size_t>(covs.count * groups));
  parallel(covs.count * groups, 8, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end;) {
      const int64_t m = unit / groups, first = unit - m * groups;
      const int64_t last = first + (end - unit) < groups ? first + (end - unit) : groups;
      const CovlassoPackArgs<T> args = {
          covs.data + m * covs.matrix_stride, n, covs.stride, ld, scale, ridge * scale, packed + m * n * ld,
          facts.data() + m * groups};
      CovlassoKernels<T>::pack()(args, first, last);
      unit += last - first;
    }
  });
  double asymmetry = 0;
  for (const CovlassoPackFacts& fact : facts) {
    if (!fact.finite) invalid("cov has a NaN or infinite entry");
    asymmetry = fact.asymmetry > asymmetry ? fact.asymmetry : asymmetry;
  }
  if (asymmetry > 2 * kAsymmetryAllowed)  // the largest variance is below 2 after scaling
    invalid("cov is not symmetric: entries differ by up to " + std::to_string(asymmetry / scale) +
            " from their mirror image");
  return {scale, top + ridge > 0 ? variance_bound((top + ridge) * scale, covs.count) : 1.0};
}

// Packs covariances of targets with categories [rows, n], rows `stride` apart, into [rows, leading_dimension(n)].
template <class T>
void pack_cross(const T* cross, int64_t rows, int64_t n, int64_t stride, double scale, T* packed) {
  const int64_t ld = leading_dimension(n, sizeof(T));
  for (int64_t r = 0; r < rows; r++) {
    T defect = 0;
    for (int64_t j = 0; j < n; j++) {
      const T value = cross[r * stride + j] * static_cast<T>(scale);
      packed[r * ld + j] = value;
      defect += value - value;
    }
    if (defect != 0) invalid("cross has a NaN or infinite entry in row " + std::to_string(r));
    for (int64_t j = n; j < ld; j++) packed[r * ld + j] = 0;
  }
}

inline void check_variance(const double* variance, int64_t rows) {
  for (int64_t r = 0; r < rows; r++) {
    if (!(variance[r] >= 0) || std::isinf(variance[r]))
      invalid("variance[" + std::to_string(r) + "] is " + std::to_string(variance[r]) +
              "; expected a finite number, not negative");
  }
}

// Runs `solve` on arguments whose covariances were multiplied by `scale`, ridge, lam and variance not yet. Results are
// in units of the covariance before that. lam may be 0: the penalty at a ratio of a lambda_max of 0.
template <class T, class Solve>
void solve_scaled(CovlassoArgs<T> args, int64_t num_targets, int64_t num_variances, double scale, const Solve& solve) {
  const int64_t problems = num_targets * args.num_lams;
  std::vector<double> lam(args.lam ? args.lam : nullptr, args.lam ? args.lam + problems : nullptr);
  for (size_t x = 0; x < lam.size(); x++) {
    if (!(lam[x] >= 0) || std::isinf(lam[x])) {
      const size_t lams = static_cast<size_t>(args.num_lams), t = x / lams;
      invalid("lam[" + std::to_string(t) + (lams > 1 ? ", " + std::to_string(x % lams) : "") + "] is " +
              std::to_string(lam[x]) + "; expected a finite positive number");
    }
    lam[x] *= scale;
  }
  std::vector<double> variance(args.variance, args.variance + num_variances);
  for (double& v : variance) v *= scale;
  args.lam = lam.data();
  args.variance = variance.data();
  args.ridge *= scale;
  solve(args);
  for (int64_t x = 0; x < problems; x++)
    for (const int field : {kErr2, kDualityGap, kLambdaMax}) args.info[x * kCovlassoInfoSize + field] /= scale;
}

}  // namespace nd::cpu
