// Vectors of float32 or float64 loaded from and stored to arrays of any input dtype, whole or in part.
//
//   Wide<In>                 float64 for float64, else float32: what values of In are computed in
//   load_as<T>(p)            W = Vec<T>::W values
//   load_part_as<T>(p, n)    the first n <= W of them, then zeros; memory beyond is not touched
//   first_as<T>(p)           the value at p
//   store_as(p, v), store_part_as(p, v, n)    the same back, rounded to nearest even
//   take<T>(p, n), put(p, v, n)               either of the two, by whether n is W
//   by_dtype(dtype, f)       f<In>() for the type In of values of dtype
//   add_to(sums, v)          sums[0 : W] += v in float64
//
// Internal linkage throughout, see simd.hpp.
#pragma once
#include <cstdint>
#include <cstring>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class In>
struct WideOf {
  using T = float;
};
template <>
struct WideOf<double> {
  using T = double;
};
template <class In>
using Wide = typename WideOf<In>::T;

typedef uint16_t Halves __attribute__((vector_size(ND_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(ND_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(ND_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(ND_VECTOR_BYTES)));

template <class T, class In>
ND_INLINE typename Vec<T>::t load_as(const In* p);
template <>
ND_INLINE Vec<float>::t load_as<float>(const float* p) {
  return load(p);
}
template <>
ND_INLINE Vec<double>::t load_as<double>(const double* p) {
  return load(p);
}
template <>
ND_INLINE Vec<float>::t load_as<float>(const Bfloat16* p) {
  return reinterpret_cast<Floats>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}
template <>
ND_INLINE Vec<float>::t load_as<float>(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const Words bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words);
  const Words magnitude = bits & 0x7fffu;
  Words normal = (magnitude << 13) + (112u << 23);                         // exponent bias 15 -> 127
  normal += reinterpret_cast<Words>(magnitude >= 0x7c00u) & (112u << 23);  // infinity, NaN: exponent 255
  const Floats subnormal = __builtin_convertvector(reinterpret_cast<Ints>(magnitude), Floats) * 0x1p-24f;
  const Words value = magnitude < 0x0400u ? reinterpret_cast<Words>(subnormal) : normal;
  return reinterpret_cast<Floats>(value | ((bits & 0x8000u) << 16));
#endif
}

ND_INLINE void store_as(float* p, Vec<float>::t v) { store(p, v); }
ND_INLINE void store_as(double* p, Vec<double>::t v) { store(p, v); }
ND_INLINE void store_as(Bfloat16* p, Vec<float>::t v) {
  const Words bits = reinterpret_cast<Words>(static_cast<Floats>(v));
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words value = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(value, Halves);
}
ND_INLINE void store_as(Float16* p, Vec<float>::t v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const Words bits = reinterpret_cast<Words>(static_cast<Floats>(v));
  const Words magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const Floats shifted = reinterpret_cast<Floats>(magnitude) + 0.5f;  // its last digit is that of a float16 subnormal
  const Words subnormal = reinterpret_cast<Words>(shifted) - (126u << 23);
  const Words special = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  const Words finite = magnitude < (113u << 23) ? subnormal : normal;
  const Words value = (magnitude >= (143u << 23) ? special : finite) | ((bits & 0x80000000u) >> 16);
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(value, Halves);
#endif
}

template <class T, class In>
ND_INLINE typename Vec<T>::t load_part_as(const In* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(In) == 4) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#endif
  In part[Vec<T>::W];
  std::memset(part, 0, sizeof part);
  std::memcpy(part, p, static_cast<size_t>(count) * sizeof(In));
  return load_as<T>(part);
}

template <class T, class In>
ND_INLINE T first_as(const In* p) {
  if constexpr (sizeof(In) == sizeof(T))
    return *p;
  else
    return load_part_as<T>(p, 1)[0];
}

template <class In>
ND_INLINE void store_part_as(In* p, typename Vec<Wide<In>>::t v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(In) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
    return;
  }
#endif
  In part[Vec<Wide<In>>::W];
  store_as(part, v);
  std::memcpy(p, part, static_cast<size_t>(count) * sizeof(In));
}

template <class T, class In>
ND_INLINE typename Vec<T>::t take(const In* p, int64_t count) {
  return count == Vec<T>::W ? load_as<T>(p) : load_part_as<T>(p, count);
}
template <class In>
ND_INLINE void put(In* p, typename Vec<Wide<In>>::t v, int64_t count) {
  count == Vec<Wide<In>>::W ? store_as(p, v) : store_part_as(p, v, count);
}

template <class F>
ND_INLINE auto by_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f.template operator()<float>();
    case Dtype::kFloat64:
      return f.template operator()<double>();
    case Dtype::kBfloat16:
      return f.template operator()<Bfloat16>();
    default:
      return f.template operator()<Float16>();
  }
}

typedef double Float64s __attribute__((vector_size(ND_VECTOR_BYTES), aligned(8), may_alias));

ND_INLINE void add_to(double* sums, Vec<double>::t v) { store(sums, load(sums) + v); }
ND_INLINE void add_to(double* sums, Vec<float>::t v) {
  Float64s* out = reinterpret_cast<Float64s*>(sums);
#if defined(__AVX512F__)  // GCC splits this conversion into quarters by itself
  out[0] += _mm512_maskz_cvtps_pd(0xff, __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
  out[1] += _mm512_maskz_cvtps_pd(0xff, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#elif defined(__AVX2__)
  out[0] += _mm256_cvtps_pd(__builtin_shufflevector(v, v, 0, 1, 2, 3));
  out[1] += _mm256_cvtps_pd(__builtin_shufflevector(v, v, 4, 5, 6, 7));
#else
  out[0] += __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1), Float64s);
  out[1] += __builtin_convertvector(__builtin_shufflevector(v, v, 2, 3), Float64s);
#endif
}

}  // namespace
}  // namespace nd::cpu::ND_CPU_LEVEL
