// What host code can name: error codes, device memory, device properties, launches with the limits of a device. Work is
// done when the call returns; the one device is the machine itself, with the limits of ND_EMU_DEVICE.
#pragma once
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "nd_emu_threads.hpp"

// ---- errors ----

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

namespace nd_emu {

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace nd_emu

inline cudaError_t cudaPeekAtLastError() { return nd_emu::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(nd_emu::last_error, cudaSuccess); }

// ---- the device ----

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem;
  size_t sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor, reservedSharedMemPerBlock;
  int major, minor, multiProcessorCount, warpSize, l2CacheSize, regsPerBlock, regsPerMultiprocessor;
  int maxThreadsPerBlock, maxThreadsPerMultiProcessor, maxBlocksPerMultiProcessor;
};

namespace nd_emu {

// Compute capability 10 * major + minor, and what differs between the devices of the default architectures.
struct Device {
  int capability, processors, shared_optin, shared_per_processor, threads_per_processor, blocks_per_processor, l2_bytes;
};
inline constexpr Device kDevices[] = {
    {80, 108, 163 << 10, 164 << 10, 2048, 32, 40 << 20},    // A100
    {90, 132, 227 << 10, 228 << 10, 2048, 32, 50 << 20},    // H100
    {100, 148, 227 << 10, 228 << 10, 2048, 32, 126 << 20},  // B200
    {120, 170, 99 << 10, 100 << 10, 1536, 24, 96 << 20},    // RTX 5090
};
inline constexpr int kSharedDefault = 48 << 10, kSharedReserved = 1 << 10, kRegisters = 64 << 10, kMaxThreads = 1024;

inline const Device& device() {
  const std::string name = environment("ND_EMU_DEVICE", "sm_90");
  for (const Device& device : kDevices) {
    if (name == "sm_" + std::to_string(device.capability)) return device;
  }
  refuse("ND_EMU_DEVICE", name, "sm_80, sm_90, sm_100, sm_120");
}

}  // namespace nd_emu

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  return nd_emu::returned(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return nd_emu::returned(cudaErrorInvalidDevice);
  const nd_emu::Device& d = nd_emu::device();
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "emulated sm_%d", d.capability);
  properties->totalGlobalMem = size_t{16} << 30;
  properties->sharedMemPerBlock = nd_emu::kSharedDefault;
  properties->sharedMemPerBlockOptin = d.shared_optin;
  properties->sharedMemPerMultiprocessor = d.shared_per_processor;
  properties->reservedSharedMemPerBlock = nd_emu::kSharedReserved;
  properties->major = d.capability / 10;
  properties->minor = d.capability % 10;
  properties->multiProcessorCount = d.processors;
  properties->warpSize = nd_emu::kWarpSize;
  properties->l2CacheSize = d.l2_bytes;
  properties->regsPerBlock = properties->regsPerMultiprocessor = nd_emu::kRegisters;
  properties->maxThreadsPerBlock = nd_emu::kMaxThreads;
  properties->maxThreadsPerMultiProcessor = d.threads_per_processor;
  properties->maxBlocksPerMultiProcessor = d.blocks_per_processor;
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxRegistersPerMultiprocessor = 82,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = p.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(p.sharedMemPerBlock);
      break;
    case cudaDevAttrWarpSize:
      *value = p.warpSize;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = p.regsPerBlock;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      break;
    case cudaDevAttrL2CacheSize:
      *value = p.l2CacheSize;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = p.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(p.sharedMemPerMultiprocessor);
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = p.regsPerMultiprocessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(p.sharedMemPerBlockOptin);
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = p.maxBlocksPerMultiProcessor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = static_cast<int>(p.reservedSharedMemPerBlock);
      break;
    default:
      return nd_emu::returned(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

// ---- streams and memory ----

using cudaStream_t = struct CUstream_st*;
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};

// Aligned to 256 bytes; filled with NaN.
template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  void* memory = nullptr;
  if (bytes && posix_memalign(&memory, 256, bytes)) return nd_emu::returned(cudaErrorMemoryAllocation);
  if (bytes) std::memset(memory, 0xFF, bytes);
  *pointer = static_cast<T*>(memory);
  return cudaSuccess;
}

inline cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memmove(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  if (bytes) std::memset(memory, value, bytes);
  return cudaSuccess;
}

template <class T>
cudaError_t cudaMallocAsync(T** pointer, size_t bytes, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}

inline cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t = nullptr) {
  return cudaMemcpy(to, from, bytes, kind);
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t = nullptr) {
  return cudaMemset(memory, value, bytes);
}

template <class T>
cudaError_t cudaMemcpyToSymbol(T& symbol, const void* from, size_t bytes, size_t offset = 0,
                               cudaMemcpyKind kind = cudaMemcpyHostToDevice) {
  if (offset + bytes > sizeof symbol) return nd_emu::returned(cudaErrorInvalidValue);
  return cudaMemcpy(reinterpret_cast<char*>(&symbol) + offset, from, bytes, kind);
}

// ---- kernels ----

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

namespace nd_emu {

inline thread_local bool in_launch = false;
inline std::mutex launch_mutex;                         // one launch at a time: static shared memory is shared by all
inline std::map<const void*, int> raised_shared_limit;  // by kernel

// Dynamic shared memory a launch of `kernel` may ask for.
inline size_t shared_limit(const void* kernel) {
  const auto found = raised_shared_limit.find(kernel);
  return std::min(std::max(found == raised_shared_limit.end() ? 0 : found->second, kSharedDefault),
                  device().shared_optin);
}

inline cudaError_t check_shape(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool grid_fits = grid.x - 1 < 0x7fffffffu && grid.y - 1 < 65535 && grid.z - 1 < 65535;
  const bool block_fits = threads - 1 < kMaxThreads && block.x <= 1024 && block.y <= 1024 && block.z <= 64;
  return grid_fits && block_fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}

inline cudaError_t refused(const char* name, dim3 grid, dim3 block, size_t shared, cudaError_t error) {
  std::fprintf(stderr, "nd_emu: %s<<<(%u,%u,%u), (%u,%u,%u), %zu>>>: %s\n", name, grid.x, grid.y, grid.z, block.x,
               block.y, block.z, shared, cudaGetErrorString(error));
  return returned(error);
}

// Runs call(body) in every thread of the grid, block after block.
inline cudaError_t run_grid(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared, Call call,
                            const void* body) {
  const std::lock_guard lock(launch_mutex);
  if (const cudaError_t error = check_shape(grid, block)) return refused(name, grid, block, shared, error);
  if (shared > shared_limit(kernel)) return refused(name, grid, block, shared, cudaErrorInvalidValue);
  Order order = Order::from_environment();
  Block runner(name, grid, block, shared, order);
  in_launch = true;
  bool succeeds = true;
  for (const uint64_t id : order.permutation(uint64_t{grid.x} * grid.y * grid.z)) {
    const uint64_t row = id / grid.x;
    succeeds = runner.run(
        {static_cast<unsigned>(id % grid.x), static_cast<unsigned>(row % grid.y), static_cast<unsigned>(row / grid.y)},
        call, body);
    if (!succeeds) break;
  }
  in_launch = false;
  return returned(succeeds ? cudaSuccess : cudaErrorLaunchFailure);
}

// What kernel<<<grid, block, shared, stream>>>(arguments...) does. Each thread gets its own copy of the parameters.
template <class... Parameters, class... Arguments>
cudaError_t launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                   Arguments&&... arguments) {
  static_assert((!std::is_reference_v<Parameters> && ...), "a kernel takes its parameters by value");
  if (in_launch) fail("a kernel launches a kernel", {name});
  const std::tuple<std::remove_const_t<Parameters>...> parameters(std::forward<Arguments>(arguments)...);
  const auto body = [&] { std::apply(kernel, parameters); };
  const Call call = [](const void* b) { (*static_cast<decltype(&body)>(b))(); };
  return run_grid(name, reinterpret_cast<const void*>(kernel), grid, block, shared, call, &body);
}

}  // namespace nd_emu

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    return nd_emu::returned(value >= -1 && value <= 100 ? cudaSuccess : cudaErrorInvalidValue);
  }
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > nd_emu::device().shared_optin) {
    return nd_emu::returned(cudaErrorInvalidValue);
  }
  const std::lock_guard lock(nd_emu::launch_mutex);
  nd_emu::raised_shared_limit[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

// Bounded by threads, blocks and dynamic shared memory; registers are not modelled.
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Parameters...), int threads,
                                                          size_t shared) {
  const nd_emu::Device& device = nd_emu::device();
  if (threads < 1) return nd_emu::returned(cudaErrorInvalidValue);
  const int by_threads = device.threads_per_processor / ((threads + 31) / 32 * 32);
  const int by_shared = static_cast<int>(device.shared_per_processor / (shared + nd_emu::kSharedReserved));
  const bool launchable =
      threads <= nd_emu::kMaxThreads && shared <= nd_emu::shared_limit(reinterpret_cast<const void*>(kernel));
  *blocks = launchable ? std::min({by_threads, by_shared, device.blocks_per_processor}) : 0;
  return cudaSuccess;
}
