// Launches, limits, memory, atomics, asynchronous copies.
#include <cuda_pipeline.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>

#include "cases.hpp"

namespace {

// ---- launches ----

// Each thread adds its place to the element that its indices name; also: a kernel may change its own copy of a
// parameter.
__global__ void indices(int* out, int shift) {
  shift += threadIdx.x;
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] += block * threads + thread + shift - static_cast<int>(threadIdx.x);
}

ND_CASE(indices_in_three_dimensions) {
  const dim3 grid(2, 3, 5), block(4, 2, 3);
  const int n = 2 * 3 * 5 * 4 * 2 * 3;
  const test::DeviceArray<int> out(n, 0);
  ND_LAUNCH(indices, grid, block, 0, nullptr, out.data(), 7);
  std::vector<int> expected(n);
  for (int i = 0; i < n; ++i) expected[i] = i + 7;
  test::expect("indices", out.values(), expected);
}

__global__ void touch_shared(int* out, int last) {
  ND_DYNAMIC_SHARED(int, s);
  s[0] = 1;
  s[last] = 2;
  out[0] = s[0] + s[last];
}

// The error of a launch with `shared` bytes of dynamic shared memory.
cudaError_t launch_with(int shared) {
  const test::DeviceArray<int> out(1, 0);
  ND_LAUNCH(touch_shared, 1, 1, shared, nullptr, out.data(), shared / 4 - 1);
  return test::finish();
}

int device_attribute(cudaDeviceAttr attribute) {
  int value = -1;
  test::expect("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, attribute, 0) == cudaSuccess);
  return value;
}

ND_CASE(shared_memory_must_be_allowed) {
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  test::expect("48 KiB without asking", launch_with(48 << 10) == cudaSuccess);
  test::expect("more without asking", launch_with((48 << 10) + 4) == cudaErrorInvalidValue);
  test::expect("the error does not stay", cudaGetLastError() == cudaSuccess);
  const auto allow = [](int bytes) {
    const cudaError_t error = cudaFuncSetAttribute(touch_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaGetLastError();
    return error;
  };
  test::expect("more than the device has", allow(most + 4) == cudaErrorInvalidValue);
  test::expect("all of it", allow(most) == cudaSuccess);
  test::expect("asked for", launch_with(most) == cudaSuccess);
  test::expect("more than asked for", launch_with(most + 4) == cudaErrorInvalidValue);
  test::expect("less again", allow(64 << 10) == cudaSuccess);
  test::expect("as much as allowed now", launch_with(64 << 10) == cudaSuccess);
  test::expect("more than allowed now", launch_with((64 << 10) + 4) == cudaErrorInvalidValue);
}

cudaError_t launch_shape(dim3 grid, dim3 block) {
  const test::DeviceArray<int> out(1 << 17, 0);
  ND_LAUNCH(indices, grid, block, 0, nullptr, out.data(), 0);
  return test::finish();
}

ND_CASE(shapes_of_launches) {
  test::expect("1024 threads", launch_shape(1, 1024) == cudaSuccess);
  test::expect("1024 threads in 3 dimensions", launch_shape(1, dim3(4, 4, 64)) == cudaSuccess);
  test::expect("65535 rows", launch_shape(dim3(1, 65535), 1) == cudaSuccess);
  test::expect("no blocks", launch_shape(0, 32) == cudaErrorInvalidConfiguration);
  test::expect("no rows of blocks", launch_shape(dim3(1, 0), 32) == cudaErrorInvalidConfiguration);
  test::expect("no threads", launch_shape(1, 0) == cudaErrorInvalidConfiguration);
  test::expect("1025 threads", launch_shape(1, 1025) == cudaErrorInvalidConfiguration);
  test::expect("64 x 32 threads", launch_shape(1, dim3(64, 32)) == cudaErrorInvalidConfiguration);
  test::expect("65 layers", launch_shape(1, dim3(1, 1, 65)) == cudaErrorInvalidConfiguration);
  test::expect("65536 rows", launch_shape(dim3(1, 65536), 1) == cudaErrorInvalidConfiguration);
  test::expect("negative grid", launch_shape(dim3(0u - 1), 1) == cudaErrorInvalidConfiguration);
}

ND_CASE(last_error) {
  test::expect("none", cudaPeekAtLastError() == cudaSuccess);
  ND_LAUNCH(indices, 0, 1, 0, nullptr, nullptr, 0);
  test::expect("peek", cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
  test::expect("peek again", cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
  test::expect("get", cudaGetLastError() == cudaErrorInvalidConfiguration);
  test::expect("gone", cudaGetLastError() == cudaSuccess);
  test::expect("text", std::strcmp(cudaGetErrorString(cudaErrorInvalidValue), "invalid argument") == 0);
  test::expect("name", std::strcmp(cudaGetErrorName(cudaErrorLaunchFailure), "cudaErrorLaunchFailure") == 0);
}

ND_CASE(device_properties) {
  int count = 0, device = -1, blocks = -1;
  test::expect("a device", cudaGetDeviceCount(&count) == cudaSuccess && count >= 1);
  test::expect("current", cudaSetDevice(0) == cudaSuccess && cudaGetDevice(&device) == cudaSuccess && device == 0);
  test::expect("no such device", cudaSetDevice(count) == cudaErrorInvalidDevice);
  cudaGetLastError();
  cudaDeviceProp p;
  test::expect("properties", cudaGetDeviceProperties(&p, 0) == cudaSuccess);
  test::expect("warp", p.warpSize == 32 && device_attribute(cudaDevAttrWarpSize) == 32);
  test::expect("threads", p.maxThreadsPerBlock == device_attribute(cudaDevAttrMaxThreadsPerBlock));
  test::expect("processors", p.multiProcessorCount == device_attribute(cudaDevAttrMultiProcessorCount));
  test::expect("major", p.major == device_attribute(cudaDevAttrComputeCapabilityMajor));
  const int optin = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  test::expect("shared memory", static_cast<int>(p.sharedMemPerBlockOptin) == optin);
  const int expected_optin = p.major == 9 || p.major == 10 ? 227 : p.major == 8 && p.minor == 0 ? 163 : 99;
  test::expect("opt-in shared memory", optin == expected_optin << 10);
  const int threads = device_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  test::expect("occupancy",
               cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, touch_shared, 1024, 0) == cudaSuccess);
  test::expect("bounded by threads", blocks == threads / 1024);
  cudaFuncSetAttribute(touch_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, touch_shared, 32, 64 << 10);
  const int per_processor = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int reserved = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  test::expect("bounded by shared memory", blocks == per_processor / ((64 << 10) + reserved));
}

// ---- memory ----

__constant__ float table[4];

__global__ void scale_by_table(float* x) { x[threadIdx.x] *= table[threadIdx.x % 4]; }

ND_CASE(copies_and_constants) {
  const std::vector<float> host = {1, 2, 3, 4, 5, 6, 7, 8};
  const float scales[] = {1, 10, 100, 1000};
  const test::DeviceArray<float> a(host), b(host.size());
  test::expect("symbol", cudaMemcpyToSymbol(table, scales, sizeof scales) == cudaSuccess);
  ND_LAUNCH(scale_by_table, 1, 8, 0, nullptr, a.data());
  cudaMemcpyAsync(b.data(), a.data(), 8 * sizeof(float), cudaMemcpyDeviceToDevice, nullptr);
  cudaMemsetAsync(b.data(), 0, 2 * sizeof(float), nullptr);
  test::expect("synchronize", cudaStreamSynchronize(nullptr) == cudaSuccess);
  test::expect("copies", b.values(), std::vector<float>{0, 0, 300, 4000, 5, 60, 700, 8000});
  float* nothing = nullptr;
  test::expect("no bytes", cudaMalloc(&nothing, 0) == cudaSuccess && cudaFree(nothing) == cudaSuccess);
  float* pooled = nullptr;
  test::expect("pool", cudaMallocAsync(&pooled, 64, nullptr) == cudaSuccess);
  test::expect("alignment", reinterpret_cast<uintptr_t>(pooled) % 256 == 0);
  test::expect("pool", cudaFreeAsync(pooled, nullptr) == cudaSuccess);
}

template <class T>
bool is_laid_out(size_t size, size_t alignment) {
  return sizeof(T) == size && alignof(T) == alignment;
}

ND_CASE(vector_types) {
  test::expect("char", is_laid_out<char2>(2, 2) && is_laid_out<char4>(4, 4) && is_laid_out<uchar4>(4, 4));
  test::expect("short", is_laid_out<short2>(4, 4) && is_laid_out<ushort4>(8, 8));
  test::expect("int", is_laid_out<int2>(8, 8) && is_laid_out<int3>(12, 4) && is_laid_out<int4>(16, 16));
  test::expect("unsigned", is_laid_out<uint2>(8, 8) && is_laid_out<uint3>(12, 4) && is_laid_out<uint4>(16, 16));
  test::expect("long long", is_laid_out<longlong2>(16, 16) && is_laid_out<ulonglong2>(16, 16));
  test::expect("float", is_laid_out<float2>(8, 8) && is_laid_out<float3>(12, 4) && is_laid_out<float4>(16, 16));
  test::expect("double", is_laid_out<double2>(16, 16));
}

// Transposes [4 * n] of float4 into four rows, with the cache hints.
__global__ void split(const float4* in, float* out, int n) {
  const float4 v = threadIdx.x % 2 ? __ldg(in + threadIdx.x) : __ldcs(in + threadIdx.x);
  const float4 w = make_float4(v.x, v.y, v.z, v.w);
  out[threadIdx.x] = w.x;
  __stcs(out + n + threadIdx.x, w.y);
  __stcg(out + 2 * n + threadIdx.x, __ldcg(&in[threadIdx.x].z));
  __stwt(out + 3 * n + threadIdx.x, __ldca(&in[threadIdx.x].w));
}

ND_CASE(vector_loads) {
  std::vector<float> in(128), expected(128);
  for (int i = 0; i < 128; ++i) expected[i % 4 * 32 + i / 4] = in[i] = static_cast<float>(i);
  const test::DeviceArray<float> from(in), to(128);
  ND_LAUNCH(split, 1, 32, 0, nullptr, reinterpret_cast<const float4*>(from.data()), to.data(), 32);
  test::expect("rows", to.values(), expected);
}

// ---- atomics ----

template <class T>
__global__ void add_all(T* sum) {
  atomicAdd(sum, T(1 + blockIdx.x));
}

template <class T>
void check_add(const char* what) {
  const test::DeviceArray<T> sum(1, T(3));
  ND_LAUNCH(add_all<T>, 4, 64, 0, nullptr, sum.data());
  test::expect(what, sum.values(), std::vector<T>{T(3 + 64 * 10)});
}

ND_CASE(atomic_sums) {
  check_add<int>("int");
  check_add<unsigned>("unsigned");
  check_add<unsigned long long>("unsigned long long");
  check_add<float>("float");
  check_add<double>("double");
}

// The threads of 4 blocks hold a permutation of 0..255.
template <class T>
__global__ void extremes(T* out) {
  const T v = static_cast<T>((blockIdx.x * blockDim.x + threadIdx.x) * 7 % 256);
  atomicMax(&out[0], v);
  atomicMin(&out[1], v - 100);
}

__global__ void bit_atomics(unsigned* out) {
  const unsigned v = (blockIdx.x * blockDim.x + threadIdx.x) * 7 % 256;
  atomicSub(&out[0], v);
  atomicAnd(&out[1], ~(1u << v % 8));
  atomicOr(&out[2], 1u << v % 9);
  atomicXor(&out[3], v);
}

template <class T>
void check_extremes(const char* what, T lowest) {
  const test::DeviceArray<T> out(std::vector<T>{T(5), T(5)});
  ND_LAUNCH(extremes<T>, 4, 64, 0, nullptr, out.data());
  test::expect(what, out.values(), std::vector<T>{T(255), lowest});
}

ND_CASE(atomic_extremes_and_bits) {
  check_extremes<int>("int", -100);
  check_extremes<long long>("long long", -100);
  check_extremes<unsigned>("unsigned", 0);
  check_extremes<unsigned long long>("unsigned long long", 0);
  const test::DeviceArray<unsigned> out(std::vector<unsigned>{40000, 0xffff, 0x8000, 0x10000});
  ND_LAUNCH(bit_atomics, 4, 64, 0, nullptr, out.data());
  test::expect("bits", out.values(), std::vector<unsigned>{40000 - 255 * 128, 0xff00, 0x81ff, 0x10000});
}

// Every thread takes a ticket from a counter and pushes itself on a linked list.
template <class T>
__global__ void tickets_and_list(int* counter, int* ticket, T* head, T* next) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  ticket[i] = atomicAdd(counter, 1);
  next[i] = atomicExch(head, static_cast<T>(i));
}

template <class T>
void check_list(const char* what, T end) {
  const int n = 128;
  const test::DeviceArray<int> counter(1, 0), ticket(n, -1);
  const test::DeviceArray<T> head(1, end), next(n, T(0));
  ND_LAUNCH(tickets_and_list<T>, 2, 64, 0, nullptr, counter.data(), ticket.data(), head.data(), next.data());
  std::vector<int> tickets = ticket.values(), expected(n);
  std::sort(tickets.begin(), tickets.end());
  for (int i = 0; i < n; ++i) expected[i] = i;
  test::expect(what, tickets, expected);
  const std::vector<T> links = next.values();
  int length = 0;
  for (T i = head.values()[0]; i != end && length <= n; i = links[static_cast<size_t>(i)]) ++length;
  test::expect(what, length == n);
}

ND_CASE(atomic_tickets) {
  check_list<int>("int", 1000);
  check_list<unsigned>("unsigned", 1000);
  check_list<unsigned long long>("unsigned long long", 1000);
  check_list<float>("float", 1000.0f);
}

// A product by compare-and-swap: the way to the atomics that CUDA lacks.
template <class T>
__global__ void multiply_all(T* product) {
  T old = 1, seen;  // a guess: an unprotected read would race
  do {
    seen = old;
    old = atomicCAS(product, seen, static_cast<T>(seen * 3));
  } while (old != seen);
}

template <class T>
void check_product(const char* what) {
  const test::DeviceArray<T> product(1, T(1));
  ND_LAUNCH(multiply_all<T>, 1, 10, 0, nullptr, product.data());
  test::expect(what, product.values(), std::vector<T>{static_cast<T>(59049)});
}

ND_CASE(atomic_compare_and_swap) {
  check_product<int>("int");
  check_product<unsigned>("unsigned");
  check_product<unsigned long long>("unsigned long long");
  check_product<unsigned short>("unsigned short");
}

// Blocks add up their parts; the one that finishes last, whichever it is, adds the parts in order.
__global__ void last_block_sums(const float* in, float* parts, unsigned* finished, float* sum) {
  __shared__ float scratch[2];
  __shared__ bool last;
  const float part = nd::block_sum<2>(in[blockIdx.x * 64 + threadIdx.x], scratch);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = part;
    __threadfence();
    last = atomicAdd(finished, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += __ldcg(&parts[b]);
  *sum = total;
}

ND_CASE(last_block) {
  std::vector<float> in(8 * 64);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  const test::DeviceArray<float> values(in), parts(8), sum(1);
  const test::DeviceArray<unsigned> finished(1, 0u);
  ND_LAUNCH(last_block_sums, 8, 64, 0, nullptr, values.data(), parts.data(), finished.data(), sum.data());
  test::expect("sum", sum.values(), std::vector<float>{512 * 511 / 2});
}

// ---- asynchronous copies ----

// Sums tiles of 4 * 64 floats, each on its way while the one before is added; the last one is cut off at n.
__global__ void sum_tiles(const float* in, float* out, int n) {
  __shared__ float4 tile[2][64];
  const int t = threadIdx.x, tiles = (n + 255) / 256;
  const auto fetch = [&](int i) {
    const int first = 256 * i + 4 * t;
    const int missing = first + 4 > n ? (first >= n ? 4 : first + 4 - n) : 0;
    if (i < tiles) __pipeline_memcpy_async(&tile[i % 2][t], &in[missing == 4 ? 0 : first], 16, 4 * missing);
    __pipeline_commit();
  };
  float sum = 0;
  fetch(0);
  for (int i = 0; i < tiles; ++i) {
    fetch(i + 1);
    __pipeline_wait_prior(1);
    __syncthreads();
    const float4 v = tile[i % 2][63 - t];  // written by another thread
    sum += v.x + v.y + v.z + v.w;
    __syncthreads();
  }
  __pipeline_wait_prior(0);
  out[t] = sum;
}

ND_CASE(asynchronous_copies) {
  const int n = 3 * 256 + 41;
  std::vector<float> in(n), expected(64);
  for (int i = 0; i < n; ++i) {
    in[i] = static_cast<float>(i % 19);
    expected[63 - i % 256 / 4] += in[i];
  }
  in.resize(4 * 256, 1000.0f);  // what lies behind the end is not added
  const test::DeviceArray<float> values(in), out(64);
  ND_LAUNCH(sum_tiles, 1, 64, 0, nullptr, values.data(), out.data(), n);
  test::expect("sums", out.values(), expected);
}

}  // namespace
