// The operator library `neuraldeps`: what is common to all hot paths. Each hot path adds its own schemas and kernels in
// its own file through STABLE_TORCH_LIBRARY_FRAGMENT and STABLE_TORCH_LIBRARY_IMPL.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cuda_library.hpp"
#include "neuraldeps/cpu_api.h"

namespace {

// Instruction-set levels: compiled, runnable on this machine, in use.
std::tuple<std::string, std::string, std::string> cpu_levels() {
  return {nd::cpu::compiled_levels(), nd::cpu::available_levels(), nd::cpu::kernels().level};
}

// JSON written by setup.py: compilers, versions, CUDA architectures or why there are none.
std::string build_info() { return ND_BUILD_INFO; }

std::string cuda_library_error() { return nd::cuda_library_error(); }

}  // namespace

STABLE_TORCH_LIBRARY(neuraldeps, m) {
  m.def("cpu_levels() -> (str compiled, str available, str active)");
  m.def("build_info() -> str");
  m.def("cuda_library_error() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(neuraldeps, CompositeExplicitAutograd, m) {
  m.impl("cpu_levels", TORCH_BOX(&cpu_levels));
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("cuda_library_error", TORCH_BOX(&cuda_library_error));
}
