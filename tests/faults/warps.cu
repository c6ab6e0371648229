// Faults of warp collectives.
#include "faults.hpp"

namespace {

// A shuffle names all lanes after half of them have returned: a report.
__global__ void shuffle_after_return(int* out) {
  const int t = threadIdx.x;
  if (t >= 16) return;
  out[t] = __shfl_xor_sync(0xffffffffu, t, 1);
}

// Lanes read what others wrote, without __syncwarp: ThreadSanitizer.
__global__ void missing_syncwarp(int* out) {
  __shared__ int s[32];
  const int t = threadIdx.x;
  s[t] = t;
  __syncwarp();
  const int v = s[31 - t];
  s[t] = v;
  out[t] = v;
}

// One lane of a shuffle gives another mask than the others: a report.
__global__ void different_masks(int* out) {
  const int t = threadIdx.x;
  out[t] = __shfl_xor_sync(t == 20 ? 0x7fffffffu : 0xffffffffu, t, 1);
}

// A lane calls a collective whose mask leaves it out: a report.
__global__ void lane_outside_its_mask(int* out) { out[threadIdx.x] = __any_sync(0x0000ffffu, 1); }

// A shuffle reads a lane that its mask leaves out: a report.
__global__ void source_outside_mask(int* out) {
  const int t = threadIdx.x;
  if (t < 16) out[t] = __shfl_sync(0x0000ffffu, t, 20);
}

// Lanes of one warp come to different collectives: a report.
__global__ void different_collectives(int* out) {
  const int t = threadIdx.x;
  if (t < 16) {
    out[t] = __any_sync(0xffffffffu, t);
  } else {
    out[t] = __all_sync(0xffffffffu, t);
  }
}

// A block of 48 threads has no lanes 16 to 31 in its second warp: a report.
__global__ void full_mask_of_partial_warp(int* out) { out[threadIdx.x] = nd::warp_sum(1); }

ND_CASE(shuffle_after_return) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(shuffle_after_return, 1, 32, 0, nullptr, out.data());
  print(out);
}

ND_CASE(missing_syncwarp) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(missing_syncwarp, 1, 32, 0, nullptr, out.data());
  print(out);
}

ND_CASE(different_masks) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(different_masks, 1, 32, 0, nullptr, out.data());
  print(out);
}

ND_CASE(lane_outside_its_mask) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(lane_outside_its_mask, 1, 32, 0, nullptr, out.data());
  print(out);
}

ND_CASE(source_outside_mask) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(source_outside_mask, 1, 32, 0, nullptr, out.data());
  print(out);
}

ND_CASE(different_collectives) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(different_collectives, 1, 32, 0, nullptr, out.data());
  print(out);
}

ND_CASE(full_mask_of_partial_warp) {
  test::DeviceArray<int> out(48, 0);
  ND_LAUNCH(full_mask_of_partial_warp, 1, 48, 0, nullptr, out.data());
  print(out);
}

}  // namespace
