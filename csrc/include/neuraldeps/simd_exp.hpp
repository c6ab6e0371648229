// exp of a vector of float32 or float64, and what sums over the values of a row need.
//
//   exp_of<T>(v)                 to 1 ulp; 0 below twice the smallest normal number, infinity above, NaN stays
//   keep_first<T>(v, n, other)   the first n lanes of v, then `other`
//   largest_lane<T>(v)           the largest lane, of NaN any
//   sum_of_lanes<T>(v)           the sum of the lanes in float64, in their order
//
// Method: exp(v) = 2^n exp(r) with n = round(v / ln 2), r = v - n ln 2 in two parts, |r| <= ln(2)/2. float32:
// 1 + r + r^2 p(r), p of degree 4 fitted for the least relative error of the result (3e-9); float64: the Taylor series.
//
// Internal linkage throughout, see simd.hpp.
#pragma once
#include <cstdint>

#include "neuraldeps/simd.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

typedef int32_t ExpInts __attribute__((vector_size(ND_VECTOR_BYTES)));
typedef int64_t ExpLongs __attribute__((vector_size(ND_VECTOR_BYTES)));

template <class T>
struct ExpTraits;
template <>
struct ExpTraits<float> {
  typedef ExpInts Ints;
  static constexpr float kLowest = -86.64339f, kHighest = 88.72284f;  // logarithms of results
  static constexpr float kPerLn2 = 0x1.715476p+0f, kRound = 0x1.8p23f;
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct ExpTraits<double> {
  typedef ExpLongs Ints;
  static constexpr double kLowest = -707.7032713517042, kHighest = 709.782712893384;
  static constexpr double kPerLn2 = 0x1.71547652b82fep+0, kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr int kMantissa = 52, kBias = 1023;
};

// exp(r) for |r| <= ln(2)/2.
ND_INLINE Vec<float>::t exp_near_zero(Vec<float>::t r) {
  Vec<float>::t p = r * 0x1.6a2434p-10f + 0x1.1239e2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  return (p * r) * r + r + 1.0f;
}
ND_INLINE Vec<double>::t exp_near_zero(Vec<double>::t r) {
  Vec<double>::t p = r * (1 / 6227020800.0) + 1 / 479001600.0;
  p = p * r + 1 / 39916800.0;
  p = p * r + 1 / 3628800.0;
  p = p * r + 1 / 362880.0;
  p = p * r + 1 / 40320.0;
  p = p * r + 1 / 5040.0;
  p = p * r + 1 / 720.0;
  p = p * r + 1 / 120.0;
  p = p * r + 1 / 24.0;
  p = p * r + 1 / 6.0;
  p = p * r + 0.5;
  return (p * r) * r + r + 1.0;
}

template <class T>
ND_INLINE typename Vec<T>::t exp_of(typename Vec<T>::t v) {
  using E = ExpTraits<T>;
  using V = typename Vec<T>::t;
  typedef typename E::Ints Ints;
  const V rounded = v * E::kPerLn2 + E::kRound;
  const V n = rounded - E::kRound;
  const V r = v - n * E::kLn2High - n * E::kLn2Low;
  // 2^n as 2 2^(n-1), since the largest n has no normal power.
  const Ints power =
      (reinterpret_cast<Ints>(rounded) - reinterpret_cast<Ints>(broadcast<T>(E::kRound)) + (E::kBias - 1))
      << E::kMantissa;
  V value = exp_near_zero(r) * T(2) * reinterpret_cast<V>(power);
  value = v < E::kLowest ? V{} : value;
  return v > E::kHighest ? broadcast<T>(static_cast<T>(__builtin_inf())) : value;
}

template <class T>
ND_INLINE typename Vec<T>::t keep_first(typename Vec<T>::t v, int64_t count, T other) {
  for (int l = 0; l < Vec<T>::W; l++) v[l] = l < count ? v[l] : other;
  return v;
}

template <class T>
ND_INLINE typename Vec<T>::t larger_lanes(typename Vec<T>::t a, typename Vec<T>::t b) {
  return a > b ? a : b;
}

template <class T>
ND_INLINE T largest_lane(typename Vec<T>::t v) {
  T largest = v[0];
  for (int l = 1; l < Vec<T>::W; l++) largest = v[l] > largest ? v[l] : largest;
  return largest;
}

template <class T>
ND_INLINE double sum_of_lanes(typename Vec<T>::t v) {
  double sum = 0;
  for (int l = 0; l < Vec<T>::W; l++) sum += static_cast<double>(v[l]);
  return sum;
}

}  // namespace
}  // namespace nd::cpu::ND_CPU_LEVEL
