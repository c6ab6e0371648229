// Checks of values around `compute_moments`, shared by the operators (csrc/torch) and the Python module
// (python_bindings). Wrong values throw std::invalid_argument.
#pragma once
#include <cmath>
#include <cstdint>
#include <string>

#include "neuraldeps/invalid.hpp"

namespace nd::cpu {

inline void check_weights(const double* weights, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (!(weights[i] >= 0) || std::isinf(weights[i]))
      invalid("weights holds " + std::to_string(weights[i]) + "; expected finite numbers that are not negative");
  }
}

// Checks a moment [n, n]: a column of x with NaN, infinities or overflow shows on the diagonal.
inline void check_finite_moment(const double* moment, int64_t n) {
  for (int64_t j = 0; j < n; j++) {
    if (!std::isfinite(moment[j * n + j]))
      invalid("x has no finite covariance in column " + std::to_string(j) +
              ": it holds NaN or infinity, or deviations whose squares overflow (float32: beyond about 1e19)");
  }
}

}  // namespace nd::cpu
