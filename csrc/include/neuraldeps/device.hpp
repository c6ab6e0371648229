// What every kernel file includes: CUDA itself or its emulation on the CPU, launches, reductions over warps and blocks.
//
// Compiled by nvcc (C++17) this is CUDA; compiled by a host compiler (C++20, csrc/emu on the include path) the same
// source runs on the CPU, see nd_emu.hpp. Reductions add in an order that depends on the number of threads alone, so
// results repeat bit for bit, and every thread gets the same result: a branch on it is uniform.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

// Launches KERNEL<<<GRID, BLOCK, SHARED, STREAM>>>(arguments...). Errors: cudaGetLastError(). More than 48 KiB of
// shared memory, static and dynamic, must have been allowed by cudaFuncSetAttribute.
#define ND_LAUNCH(KERNEL, GRID, BLOCK, SHARED, STREAM, ...) KERNEL<<<(GRID), (BLOCK), (SHARED), (STREAM)>>>(__VA_ARGS__)

// T* NAME: the dynamic shared memory of the block, aligned to 16 bytes.
#define ND_DYNAMIC_SHARED(T, NAME)                           \
  extern __shared__ __align__(16) unsigned char nd_shared[]; \
  T* NAME = reinterpret_cast<T*>(nd_shared)
#else
#include "nd_emu.hpp"

#define ND_LAUNCH(KERNEL, GRID, BLOCK, SHARED, STREAM, ...) \
  nd_emu::launch(#KERNEL, KERNEL, (GRID), (BLOCK), (SHARED), (STREAM)__VA_OPT__(, ) __VA_ARGS__)
#define ND_DYNAMIC_SHARED(T, NAME) T* NAME = static_cast<T*>(nd_emu::dynamic_shared())
#endif

namespace nd {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Lane and warp of the calling thread in a one-dimensional block.
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) & (kWarpSize - 1); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// ---- operations; NaN counts as larger than every number, so that it is never lost ----

// Whether a > b.
template <class T>
__device__ __forceinline__ bool exceeds(T a, T b) {
  return a > b || (a != a && b == b);
}

// A value and where it was found.
template <class T>
struct ArgMax {
  T value;
  int index;
};

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return exceeds(b, a) ? b : a;
  }
  // The larger value; of equal ones that with the lower index.
  template <class T>
  __device__ __forceinline__ ArgMax<T> operator()(ArgMax<T> a, ArgMax<T> b) const {
    return exceeds(b.value, a.value) || (!exceeds(a.value, b.value) && b.index < a.index) ? b : a;
  }
};

// ---- warps: all 32 lanes call, all get the result ----

template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int lane_mask) {
  return __shfl_xor_sync(kFullWarp, v, lane_mask);
}

template <class T>
__device__ __forceinline__ ArgMax<T> shuffle_xor(ArgMax<T> v, int lane_mask) {
  return {shuffle_xor(v.value, lane_mask), shuffle_xor(v.index, lane_mask)};
}

// By a butterfly, whose order is the same in every lane because a + b == b + a.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T v, Op op) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) v = op(v, shuffle_xor(v, distance));
  return v;
}

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  return warp_reduce(v, Sum());
}

template <class T>
__device__ __forceinline__ T warp_max(T v) {
  return warp_reduce(v, Max());
}

template <class T>
__device__ __forceinline__ ArgMax<T> warp_argmax(ArgMax<T> v) {
  return warp_reduce(v, Max());
}

// ---- one-dimensional blocks of 32 * kWarps threads: all call, all get the result ----

// scratch: [kWarps] in shared memory, free when the block calls, and free again after the next barrier of the block:
// calls that use two scratch arrays in turn need no barrier between them. One barrier inside, none with one warp.
template <int kWarps, class T, class Op>
__device__ __forceinline__ T block_reduce(T v, Op op, T* scratch) {
  static_assert(kWarps >= 1 && kWarps <= 32, "a block has at most 1024 threads");
  v = warp_reduce(v, op);
  if (kWarps == 1) return v;
  if (lane_index() == 0) scratch[warp_index()] = v;
  __syncthreads();
  v = scratch[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) v = op(v, scratch[w]);
  return v;
}

template <int kWarps, class T>
__device__ __forceinline__ T block_sum(T v, T* scratch) {
  return block_reduce<kWarps>(v, Sum(), scratch);
}

template <int kWarps, class T>
__device__ __forceinline__ T block_max(T v, T* scratch) {
  return block_reduce<kWarps>(v, Max(), scratch);
}

template <int kWarps, class T>
__device__ __forceinline__ ArgMax<T> block_argmax(ArgMax<T> v, ArgMax<T>* scratch) {
  return block_reduce<kWarps>(v, Max(), scratch);
}

}  // namespace nd
