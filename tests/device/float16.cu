// half and bfloat16 as functions on arrays, for comparison with NumPy and torch: conversions of every kind and
// arithmetic. n elements each; bits are the 16 bits of a number.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "neuraldeps/device.hpp"

#define ND_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Half {
  using T = __half;
  using T2 = __half2;
  static __device__ T from(float x) { return __float2half(x); }
  static __device__ T from(double x) { return __double2half(x); }
  static __device__ float to_float(T x) { return __half2float(x); }
  static __device__ T of_bits(uint16_t x) { return __ushort_as_half(x); }
  static __device__ uint16_t bits(T x) { return __half_as_ushort(x); }
  static __device__ T2 pair(float x, float y) { return __floats2half2_rn(x, y); }
  static __device__ T2 pair(float2 v) { return __float22half2_rn(v); }
  static __device__ T2 pair(T x, T y) { return __halves2half2(x, y); }
  static __device__ float2 to_float(T2 v) { return __half22float2(v); }
  static __device__ T low(T2 v) { return __low2half(v); }
  static __device__ T high(T2 v) { return __high2half(v); }
};

struct Bfloat16 {
  using T = __nv_bfloat16;
  using T2 = __nv_bfloat162;
  static __device__ T from(float x) { return __float2bfloat16(x); }
  static __device__ T from(double x) { return __double2bfloat16(x); }
  static __device__ float to_float(T x) { return __bfloat162float(x); }
  static __device__ T of_bits(uint16_t x) { return __ushort_as_bfloat16(x); }
  static __device__ uint16_t bits(T x) { return __bfloat16_as_ushort(x); }
  static __device__ T2 pair(float x, float y) { return __floats2bfloat162_rn(x, y); }
  static __device__ T2 pair(float2 v) { return __float22bfloat162_rn(v); }
  static __device__ T2 pair(T x, T y) { return __halves2bfloat162(x, y); }
  static __device__ float2 to_float(T2 v) { return __bfloat1622float2(v); }
  static __device__ T low(T2 v) { return __low2bfloat16(v); }
  static __device__ T high(T2 v) { return __high2bfloat16(v); }
};

__device__ int64_t global_index() { return blockIdx.x * int64_t{blockDim.x} + threadIdx.x; }

template <class F, class X>
__global__ void round_all(const X* x, uint16_t* bits, int64_t n) {
  const int64_t i = global_index();
  if (i < n) bits[i] = F::bits(F::from(x[i]));
}

template <class F>
__global__ void widen_all(const uint16_t* bits, float* x, int64_t n) {
  const int64_t i = global_index();
  if (i < n) x[i] = F::to_float(F::of_bits(bits[i]));
}

// out [10, n]: a + b, a - b, a * b, a / b, fma(a, b, a), max, min, -a, |a|, and 1, 2 or 3 for a < b, a == b, a > b.
template <class F>
__global__ void combine_all(const uint16_t* a_bits, const uint16_t* b_bits, uint16_t* out, int64_t n) {
  const int64_t i = global_index();
  if (i >= n) return;
  const typename F::T a = F::of_bits(a_bits[i]), b = F::of_bits(b_bits[i]);
  const typename F::T results[] = {a + b,        a - b,        a * b, a / b,    __hfma(a, b, a),
                                   __hmax(a, b), __hmin(a, b), -a,    __habs(a)};
  for (int k = 0; k < 9; ++k) out[k * n + i] = F::bits(results[k]);
  out[9 * n + i] = a < b ? 1 : a == b ? 2 : a > b ? 3 : 0;
}

// out [4, n]: pairs of neighbours (x, y) of a and of b -> a + b, a * b, fma(a, b, a), and (y, x) of a by a shuffle.
template <class F>
__global__ void combine_pairs(const float* a, const float* b, uint16_t* out, int64_t n) {
  using T2 = typename F::T2;
  const int64_t i = 2 * global_index();
  if (i >= n) return;
  const T2 u = F::pair(a[i], a[i + 1]), v = F::pair(make_float2(b[i], b[i + 1]));
  const T2 results[] = {__hadd2(u, v), u * v, __hfma2(u, v, u), F::pair(F::high(u), F::low(u))};
  for (int k = 0; k < 4; ++k) {
    const float2 wide = F::to_float(results[k]);
    out[k * n + i] = F::bits(F::from(wide.x));
    out[k * n + i + 1] = F::bits(F::from(wide.y));
  }
}

// Sums the values of a warp of pairs; n = 64.
template <class F>
__global__ void sum_warp(const float* x, float* sum) {
  const int t = threadIdx.x;
  typename F::T2 v = F::pair(x[2 * t], x[2 * t + 1]);
  for (int distance = 16; distance > 0; distance /= 2) v = __hadd2(v, __shfl_xor_sync(nd::kFullWarp, v, distance));
  typename F::T w = F::low(v);
  w += __shfl_xor_sync(nd::kFullWarp, F::high(v), 0);
  if (t == 0) *sum = F::to_float(w);
}

unsigned num_blocks(int64_t n) { return static_cast<unsigned>((n + 127) / 128); }

}  // namespace

#define ND_FORMAT(NAME, F)                                                                       \
  ND_EXPORT int NAME##_from_float(const float* x, uint16_t* bits, int64_t n) {                   \
    ND_LAUNCH((round_all<F, float>), num_blocks(n), 128, 0, nullptr, x, bits, n);                \
    return cudaGetLastError();                                                                   \
  }                                                                                              \
  ND_EXPORT int NAME##_from_double(const double* x, uint16_t* bits, int64_t n) {                 \
    ND_LAUNCH((round_all<F, double>), num_blocks(n), 128, 0, nullptr, x, bits, n);               \
    return cudaGetLastError();                                                                   \
  }                                                                                              \
  ND_EXPORT int NAME##_to_float(const uint16_t* bits, float* x, int64_t n) {                     \
    ND_LAUNCH(widen_all<F>, num_blocks(n), 128, 0, nullptr, bits, x, n);                         \
    return cudaGetLastError();                                                                   \
  }                                                                                              \
  ND_EXPORT int NAME##_combine(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n) { \
    ND_LAUNCH(combine_all<F>, num_blocks(n), 128, 0, nullptr, a, b, out, n);                     \
    return cudaGetLastError();                                                                   \
  }                                                                                              \
  ND_EXPORT int NAME##_combine_pairs(const float* a, const float* b, uint16_t* out, int64_t n) { \
    ND_LAUNCH(combine_pairs<F>, num_blocks(n), 128, 0, nullptr, a, b, out, n);                   \
    return cudaGetLastError();                                                                   \
  }                                                                                              \
  ND_EXPORT int NAME##_sum_warp(const float* x, float* sum) {                                    \
    ND_LAUNCH(sum_warp<F>, 1, 32, 0, nullptr, x, sum);                                           \
    return cudaGetLastError();                                                                   \
  }
ND_FORMAT(half, Half)
ND_FORMAT(bfloat16, Bfloat16)
