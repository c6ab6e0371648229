// What the emulation alone has: orders, devices to choose from, launch failures that do not stick, host threads.
#include <algorithm>
#include <cstdlib>
#include <thread>

#include "cases.hpp"

namespace {

// Writes down the threads of all blocks in the order in which they come.
__global__ void sequence(int* count, int* out) { out[atomicAdd(count, 1)] = blockIdx.x * blockDim.x + threadIdx.x; }

std::vector<int> threads_in_order(const char* order) {
  setenv("ND_EMU_ORDER", order, 1);
  const test::DeviceArray<int> count(1, 0), out(200, -1);
  ND_LAUNCH(sequence, 4, 50, 0, nullptr, count.data(), out.data());
  return out.values();
}

// The blocks in `sequence`, and whether each came as a whole.
std::vector<int> blocks_of(const std::vector<int>& sequence) {
  std::vector<int> blocks;
  for (size_t i = 0; i < sequence.size(); ++i) {
    if (i % 50 == 0) blocks.push_back(sequence[i] / 50);
    test::expect("one block after another", sequence[i] / 50 == blocks.back());
  }
  return blocks;
}

ND_CASE(orders) {
  std::vector<int> ascending(200);
  for (int i = 0; i < 200; ++i) ascending[i] = i;
  test::expect("forward", threads_in_order("forward"), ascending);
  test::expect("default", threads_in_order(""), ascending);
  test::expect("reverse", threads_in_order("reverse"), std::vector<int>(ascending.rbegin(), ascending.rend()));
  const std::vector<int> first = threads_in_order("random:1"), second = threads_in_order("random:2");
  test::expect("seeds repeat", first, threads_in_order("random:1"));
  test::expect("seeds differ", first != second && first != threads_in_order("random"));
  bool blocks_are_shuffled = false;
  for (std::vector<int> order : {first, second}) {
    const std::vector<int> blocks = blocks_of(order);
    blocks_are_shuffled |= !std::is_sorted(blocks.begin(), blocks.end());
    test::expect("threads are shuffled", !std::is_sorted(order.begin(), order.begin() + 50));
    std::sort(order.begin(), order.end());
    test::expect("all threads", order, ascending);
  }
  test::expect("blocks are shuffled", blocks_are_shuffled);
}

// Lanes come to a shuffle in any order, and warps to a barrier.
__global__ void sequence_after_meetings(int* count, int* out) {
  __shfl_xor_sync(nd::kFullWarp, 0, 1);
  out[atomicAdd(&count[0], 1)] = threadIdx.x;
  __syncthreads();
  out[64 + atomicAdd(&count[1], 1)] = threadIdx.x;
}

ND_CASE(orders_after_meetings) {
  for (const char* order : {"forward", "reverse", "random:1"}) {
    setenv("ND_EMU_ORDER", order, 1);
    const test::DeviceArray<int> count(2, 0), out(128, -1);
    ND_LAUNCH(sequence_after_meetings, 1, 64, 0, nullptr, count.data(), out.data());
    const std::vector<int> threads = out.values();
    const bool forward = std::strcmp(order, "forward") == 0, reverse = std::strcmp(order, "reverse") == 0;
    test::expect(order, std::is_sorted(threads.begin() + 64, threads.end()) == forward);
    test::expect(order, std::is_sorted(threads.rbegin(), threads.rend() - 64) == reverse);
  }
}

// ---- failures ----

__global__ void trap_in_second_block(int* out) {
  __syncthreads();
  if (blockIdx.x == 1 && threadIdx.x == 3) __trap();
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

ND_CASE(failure_does_not_stick) {
  setenv("ND_EMU_ORDER", "forward", 1);
  const test::DeviceArray<int> out(12, 0);
  for (int repetition = 0; repetition < 3; ++repetition) {
    ND_LAUNCH(trap_in_second_block, 3, 4, 0, nullptr, out.data());
    test::expect("trap", cudaGetLastError() == cudaErrorLaunchFailure);
    ND_LAUNCH(trap_in_second_block, 1, 4, 0, nullptr, out.data());
    test::expect("next launch", cudaGetLastError() == cudaSuccess);
  }
  test::expect("what came before the trap", out.values(), std::vector<int>{1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0});
}

// Threads wait for one that traps, with many small arrays on their stacks (between redzones under AddressSanitizer).
__global__ void trap_with_arrays(int* out) {
  volatile int a[2] = {1}, b[2] = {2}, c[2] = {3}, d[2] = {4}, e[2] = {5}, f[2] = {6}, g[2] = {7}, h[2] = {8};
  const int i = threadIdx.x % 2;
  a[i] = b[i] = c[i] = d[i] = e[i] = f[i] = g[i] = h[i] = i;
  if (threadIdx.x == 63) __trap();
  __syncthreads();
  out[threadIdx.x] = a[1 - i] + b[i] + c[i] + d[i] + e[i] + f[i] + g[i] + h[i];
}

__global__ void one_large_array(int* out) {
  volatile int a[256];
  for (int i = 0; i < 256; ++i) a[i] = i;
  out[threadIdx.x] = a[threadIdx.x];
}

ND_CASE(abandoned_stacks_are_not_used_again) {
  const test::DeviceArray<int> out(64, 0);
  ND_LAUNCH(trap_with_arrays, 1, 64, 0, nullptr, out.data());
  test::expect("trap", cudaGetLastError() == cudaErrorLaunchFailure);
  ND_LAUNCH(one_large_array, 1, 64, 0, nullptr, out.data());
  std::vector<int> expected(64);
  for (int i = 0; i < 64; ++i) expected[i] = i;
  test::expect("values", out.values(), expected);
}

__global__ void launches_another(int* out) { ND_LAUNCH(trap_in_second_block, 1, 4, 0, nullptr, out); }

ND_CASE(kernels_launch_no_kernels) {
  const test::DeviceArray<int> out(4, 0);
  ND_LAUNCH(launches_another, 1, 1, 0, nullptr, out.data());
  test::expect("refused", cudaGetLastError() == cudaErrorLaunchFailure);
}

// ---- host threads ----

__global__ void double_all(int* x) {
  __shared__ int s[64];
  s[63 - threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = 2 * s[63 - threadIdx.x];
}

ND_CASE(launches_from_many_threads) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([i] {
      const test::DeviceArray<int> x(64, i);
      for (int repetition = 0; repetition < 3; ++repetition) ND_LAUNCH(double_all, 1, 64, 0, nullptr, x.data());
      test::expect("values", x.values(), std::vector<int>(64, 8 * i));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
