// The CUDA kernels as the operators see them: libneuraldeps_cuda.so is opened beside the operator library at the first
// CUDA call, so that one operator library serves a torch with and without CUDA, and a machine with and without a
// driver.
//
//   ND_CUDA(nd_covlasso_f32)(...)            calls a function of cuda_api.h through its pointer, looked up once
//   nd::check_cuda(code, "covlasso")         throws with CUDA's own text unless code is 0
//   nd::current_cuda_stream(device)          torch's current stream of that device
#pragma once
#include <cstdint>
#include <string>

#include "neuraldeps/cuda_api.h"

#define ND_CUDA(function)                                                                            \
  ([]() -> decltype(&function) {                                                                     \
    static const auto pointer = reinterpret_cast<decltype(&function)>(::nd::cuda_symbol(#function)); \
    return pointer;                                                                                  \
  }())

namespace nd {

// Address of an exported function of libneuraldeps_cuda.so; throws std::runtime_error if the library or the name is
// missing.
void* cuda_symbol(const char* name);

// Why the CUDA kernels cannot be called in this process; empty if they can.
std::string cuda_library_error();

void check_cuda(int code, const char* what);

void* current_cuda_stream(int32_t device);

}  // namespace nd
