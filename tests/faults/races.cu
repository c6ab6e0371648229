// Faults between threads through global memory, and between blocks.
#include "faults.hpp"

namespace {

// All threads of a block write one element: results by order, and ThreadSanitizer.
__global__ void one_element_by_many(int* out) { out[0] = threadIdx.x; }

// Each thread adds to one element, without an atomic: ThreadSanitizer (the emulation never stops a thread in between).
__global__ void count_without_atomic(int* out) { out[0] += 1; }

// Blocks write one element: results by order. Races between blocks are not modelled.
__global__ void one_element_by_blocks(int* out) { out[0] = blockIdx.x; }

// A block reads what the block before it writes: results by order.
__global__ void block_after_block(int* out) { out[blockIdx.x + 1] = out[blockIdx.x] + 1; }

// A block counts on what the one before left in static shared memory: results by order.
__global__ void shared_from_block_before(int* out) {
  __shared__ int s;
  if (blockIdx.x == 1) s = 7;
  out[blockIdx.x] = s;
}

ND_CASE(one_element_by_many) {
  test::DeviceArray<int> out(1, 0);
  ND_LAUNCH(one_element_by_many, 1, 64, 0, nullptr, out.data());
  print(out);
}

ND_CASE(count_without_atomic) {
  test::DeviceArray<int> out(1, 0);
  ND_LAUNCH(count_without_atomic, 1, 64, 0, nullptr, out.data());
  print(out);
}

ND_CASE(one_element_by_blocks) {
  test::DeviceArray<int> out(1, 0);
  ND_LAUNCH(one_element_by_blocks, 8, 1, 0, nullptr, out.data());
  print(out);
}

ND_CASE(block_after_block) {
  test::DeviceArray<int> out(9, 0);
  ND_LAUNCH(block_after_block, 8, 1, 0, nullptr, out.data());
  print(out);
}

ND_CASE(shared_from_block_before) {
  test::DeviceArray<int> out(3, 0);
  ND_LAUNCH(shared_from_block_before, 3, 1, 0, nullptr, out.data());
  print(out);
}

}  // namespace
