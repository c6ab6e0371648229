// Vectors of the instruction-set level a file is compiled for, through GCC/Clang vector extensions.
//
//   ND_CPU_LEVEL      namespace of the level: baseline, avx2, avx512 (given on the command line)
//   ND_VECTOR_BYTES   64 with AVX-512, 32 with AVX2, 16 otherwise; a vector never exceeds one register
//
// Everything here has internal linkage: the same file is compiled at several levels, and the linker must never hand the
// copy of one level to another.
#pragma once
#include <cstdint>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(ND_CPU_LEVEL)
#define ND_CPU_LEVEL baseline
#endif
#if defined(__AVX512F__)
#define ND_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ND_VECTOR_BYTES 32
#else
#define ND_VECTOR_BYTES 16
#endif
#define ND_INLINE inline __attribute__((always_inline))

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

ND_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ND_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
ND_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
ND_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One register of W values; loads and stores through it need the alignment of T only.
template <class T>
struct Vec {
  typedef T t __attribute__((vector_size(ND_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int W = ND_VECTOR_BYTES / sizeof(T);
};

template <class T>
ND_INLINE typename Vec<T>::t load(const T* p) {
  return *reinterpret_cast<const typename Vec<T>::t*>(p);
}

template <class T>
ND_INLINE void store(T* p, typename Vec<T>::t v) {
  *reinterpret_cast<typename Vec<T>::t*>(p) = v;
}

template <class T>
ND_INLINE typename Vec<T>::t broadcast(T x) {
  return typename Vec<T>::t{} + x;
}

template <int...>
struct Lanes {};
template <int n, int... l>
struct LanesUpTo : LanesUpTo<n - 1, n - 1, l...> {};
template <int... l>
struct LanesUpTo<0, l...> {
  using t = Lanes<l...>;
};

// With h a power of two, lane l is the sum of lanes l and l ^ h of a where l has not the bit h, and of b where it has.
template <int h, class Vector, int... l>
ND_INLINE Vector pair_sums(Vector a, Vector b, Lanes<l...>) {
  constexpr int W = sizeof...(l);
  return __builtin_shufflevector(a, b, ((l & h) ? W + l : l)...) +
         __builtin_shufflevector(a, b, ((l & h) ? W + (l ^ h) : l ^ h)...);
}
template <int h, class T>
ND_INLINE void halve(typename Vec<T>::t (&v)[Vec<T>::W]) {
  if constexpr (h > 0) {
    for (int i = 0; i < h; i++) v[i] = pair_sums<h>(v[i], v[i + h], typename LanesUpTo<Vec<T>::W>::t());
    halve<h / 2, T>(v);
  }
}

// Lane i is the sum of the lanes of v[i].
template <class T>
ND_INLINE typename Vec<T>::t lane_sums(const typename Vec<T>::t (&v)[Vec<T>::W]) {
  typename Vec<T>::t sums[Vec<T>::W];
  for (int i = 0; i < Vec<T>::W; i++) sums[i] = v[i];
  halve<Vec<T>::W / 2, T>(sums);
  return sums[0];
}

}  // namespace
}  // namespace nd::cpu::ND_CPU_LEVEL
