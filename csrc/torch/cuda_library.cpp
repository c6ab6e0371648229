#include "cuda_library.hpp"

#include <dlfcn.h>

#include <filesystem>
#include <stdexcept>

namespace nd {
namespace {

struct Library {
  void* handle = nullptr;
  std::string error;
};

std::string path_beside_this_library(const char* name) {
  Dl_info self;
  if (!dladdr(reinterpret_cast<void*>(&path_beside_this_library), &self) || !self.dli_fname) return name;
  return (std::filesystem::path(self.dli_fname).parent_path() / name).string();
}

Library open_library() {
  const std::string path = path_beside_this_library("libneuraldeps_cuda.so");
  if (!std::filesystem::exists(path)) {
    return {
        nullptr,
        "neuraldeps_kernels was built without CUDA kernels; rebuild it with NEURALDEPS_CUDA=1 and the CUDA toolkit"};
  }
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) return {nullptr, std::string("the CUDA kernels do not load: ") + dlerror()};
  void* version = dlsym(handle, "nd_cuda_api_version");
  if (!version || reinterpret_cast<decltype(&nd_cuda_api_version)>(version)() != ND_CUDA_API_VERSION) {
    return {nullptr, path + " is of another version of neuraldeps_kernels; reinstall the package"};
  }
  return {handle, ""};
}

const Library& library() {
  static const Library opened = open_library();
  return opened;
}

}  // namespace

std::string cuda_library_error() { return library().error; }

void* cuda_symbol(const char* name) {
  if (!library().handle) throw std::runtime_error(library().error);
  void* symbol = dlsym(library().handle, name);
  if (!symbol) throw std::runtime_error(std::string("libneuraldeps_cuda.so lacks ") + name);
  return symbol;
}

void check_cuda(int code, const char* what) {
  if (code != 0) throw std::runtime_error(std::string(what) + ": CUDA error: " + ND_CUDA(nd_cuda_error_string)(code));
}

void* current_cuda_stream(int32_t device) {
  // Declared by torch only for CUDA builds and exported by libtorch_cuda.so, which a CPU torch does not have.
  using GetStream = int32_t (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch_cuda) throw std::runtime_error("a CUDA tensor without libtorch_cuda.so: this torch has no CUDA");
    void* symbol = dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
    if (!symbol) throw std::runtime_error("libtorch_cuda.so lacks aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  if (get_stream(device, &stream) != 0)
    throw std::runtime_error("no current CUDA stream on device " + std::to_string(device));
  return stream;
}

}  // namespace nd
