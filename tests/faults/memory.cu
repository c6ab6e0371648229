// Faults of memory accesses by one thread.
#include <cuda_pipeline.h>

#include "faults.hpp"

namespace {

// Writes one element past a static shared array: UndefinedBehaviorSanitizer or AddressSanitizer.
__global__ void shared_overrun(int* out, int last) {
  __shared__ int s[32];
  for (int i = threadIdx.x; i <= last; i += 32) s[i] = i;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

// Writes one element past the dynamic shared memory of the launch: AddressSanitizer.
__global__ void dynamic_shared_overrun(int* out, int last) {
  ND_DYNAMIC_SHARED(int, s);
  for (int i = threadIdx.x; i <= last; i += 32) s[i] = i;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

// Writes one element past a global array: AddressSanitizer.
__global__ void global_overrun(int* out, int last) {
  for (int i = threadIdx.x; i <= last; i += 32) out[i] = i;
}

// Sums into dynamic shared memory that was never set to zero: NaN.
__global__ void unset_dynamic_shared(float* out) {
  ND_DYNAMIC_SHARED(float, s);
  s[threadIdx.x] += 1.0f;
  out[threadIdx.x] = s[threadIdx.x];
}

// Sums into device memory that was never set to zero: NaN.
__global__ void unset_global(float* out, float* unset) {
  unset[threadIdx.x] += 1.0f;
  out[threadIdx.x] = unset[threadIdx.x];
}

// Loads a float4 from an address that is a multiple of 4 bytes only: UndefinedBehaviorSanitizer.
__global__ void misaligned_float4(float* out, const float* in) {
  const float4 v = *reinterpret_cast<const float4*>(in + 1);
  out[threadIdx.x] = v.x + v.w;
}

// An int index overflows; g++ rewrites the product in unsigned arithmetic and reports nothing: nobody.
__global__ void overflow_rewritten(int* out, int row) {
  const int index = row * (int)(blockDim.x * 4096);
  out[threadIdx.x] = index;
}

// An int index overflows: UndefinedBehaviorSanitizer.
__global__ void overflow(int* out, int row, int stride) { out[threadIdx.x] = row * stride; }

// A thread uses asynchronous copies before it has waited for them: results (zeros where the data are ones).
__global__ void copy_used_too_early(float* out, const float* in) {
  __shared__ float s[2][32];
  const int t = threadIdx.x;
  s[0][t] = s[1][t] = 0.0f;
  __pipeline_memcpy_async(&s[0][t], &in[t], 4);
  __pipeline_commit();
  __pipeline_memcpy_async(&s[1][t], &in[t], 4);
  __pipeline_commit();
  out[t] = s[0][t];
  __pipeline_wait_prior(1);
  out[32 + t] = s[0][t];
  out[64 + t] = s[1][t];
  __pipeline_wait_prior(0);
}

// A thread returns with a copy on its way: a report.
__global__ void copy_never_waited_for(float* out, const float* in) {
  __shared__ float s[32];
  const int t = threadIdx.x;
  __pipeline_memcpy_async(&s[t], &in[t], 4);
  __pipeline_commit();
  out[t] = 0.0f;
}

ND_CASE(shared_overrun) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(shared_overrun, 1, 32, 0, nullptr, out.data(), 32);
  print(out);
}

ND_CASE(dynamic_shared_overrun) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(dynamic_shared_overrun, 1, 32, 40 * sizeof(int), nullptr, out.data(), 40);
  print(out);
}

ND_CASE(global_overrun) {
  test::DeviceArray<int> out(42, 0);
  ND_LAUNCH(global_overrun, 1, 32, 0, nullptr, out.data(), 42);
  print(out);
}

ND_CASE(unset_dynamic_shared) {
  test::DeviceArray<float> out(32, 0);
  ND_LAUNCH(unset_dynamic_shared, 1, 32, 32 * sizeof(float), nullptr, out.data());
  print(out);
}

ND_CASE(unset_global) {
  test::DeviceArray<float> out(32, 0), unset(32);
  ND_LAUNCH(unset_global, 1, 32, 0, nullptr, out.data(), unset.data());
  print(out);
}

ND_CASE(misaligned_float4) {
  test::DeviceArray<float> out(32, 0), in(8, 1.0f);
  ND_LAUNCH(misaligned_float4, 1, 32, 0, nullptr, out.data(), in.data());
  print(out);
}

ND_CASE(overflow_rewritten) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(overflow_rewritten, 1, 32, 0, nullptr, out.data(), 20000);
  print(out);
}

ND_CASE(overflow) {
  test::DeviceArray<int> out(32, 0);
  ND_LAUNCH(overflow, 1, 32, 0, nullptr, out.data(), 70000, 70000);
  print(out);
}

ND_CASE(copy_used_too_early) {
  test::DeviceArray<float> out(96, -1.0f), in(32, 1.0f);
  ND_LAUNCH(copy_used_too_early, 1, 32, 0, nullptr, out.data(), in.data());
  print(out);
}

ND_CASE(copy_never_waited_for) {
  test::DeviceArray<float> out(32, -1.0f), in(32, 1.0f);
  ND_LAUNCH(copy_never_waited_for, 1, 32, 0, nullptr, out.data(), in.data());
  print(out);
}

}  // namespace
