// Faults of block barriers.
#include "faults.hpp"

namespace {

// No barrier between writing and reading shared memory: ThreadSanitizer.
__global__ void missing_barrier(int* out) {
  __shared__ int s[64];
  const int t = threadIdx.x;
  s[t] = t + 100 * blockIdx.x;
  out[64 * blockIdx.x + t] = s[63 - t];
}

// The barrier that keeps a fast thread from the next round is missing: results by order, and ThreadSanitizer.
__global__ void missing_barrier_in_loop(int* out, int rounds) {
  __shared__ int s[64];
  const int t = threadIdx.x;
  s[t] = t;
  __syncthreads();
  for (int i = 0; i < rounds; ++i) {
    const int neighbour = s[(t + 1) % 64];
    s[t] = 3 * neighbour + 1;
    __syncthreads();
  }
  out[t] = s[t];
}

// A warp reads what another wrote, with __syncwarp in place of a barrier: results by order, and ThreadSanitizer.
__global__ void syncwarp_for_barrier(int* out) {
  __shared__ int s[64];
  const int t = threadIdx.x;
  s[t] = 0;
  __syncthreads();
  if (t < 32) s[t] = t;
  __syncwarp();
  out[t] = t < 32 ? t : s[t - 32];
}

// Two halves of the block wait at different barriers: a report.
__global__ void different_barriers(int* out) {
  const int t = threadIdx.x;
  if (t < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[t] = t;
}

// One warp waits at a barrier, the other at a shuffle that one of its lanes, gone to the barrier, never reaches: a
// report.
__global__ void barrier_and_shuffle(int* out) {
  const int t = threadIdx.x;
  int v = t;
  if (t < 32 || t == 40) {
    __syncthreads();
  } else {
    v = __shfl_xor_sync(0xffffffffu, t, 1);
  }
  out[t] = v;
}

ND_CASE(missing_barrier) {
  test::DeviceArray<int> out(128, 0);
  ND_LAUNCH(missing_barrier, 2, 64, 0, nullptr, out.data());
  print(out);
}

ND_CASE(missing_barrier_in_loop) {
  test::DeviceArray<int> out(64, 0);
  ND_LAUNCH(missing_barrier_in_loop, 1, 64, 0, nullptr, out.data(), 3);
  print(out);
}

ND_CASE(syncwarp_for_barrier) {
  test::DeviceArray<int> out(64, 0);
  ND_LAUNCH(syncwarp_for_barrier, 1, 64, 0, nullptr, out.data());
  print(out);
}

ND_CASE(different_barriers) {
  test::DeviceArray<int> out(64, 0);
  ND_LAUNCH(different_barriers, 1, 64, 0, nullptr, out.data());
  print(out);
}

ND_CASE(barrier_and_shuffle) {
  test::DeviceArray<int> out(64, 0);
  ND_LAUNCH(barrier_and_shuffle, 1, 64, 0, nullptr, out.data());
  print(out);
}

}  // namespace
