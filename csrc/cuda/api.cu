// What every caller of libneuraldeps_cuda asks first: interface version, number of devices, the text of an error code.
#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

extern "C" int nd_cuda_api_version(void) { return ND_CUDA_API_VERSION; }

extern "C" const char* nd_cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int nd_cuda_device_count(int* count) {
  *count = 0;
  return static_cast<int>(cudaGetDeviceCount(count));
}
