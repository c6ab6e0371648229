// The CPU kernels for NumPy arrays and the CUDA kernels for CuPy arrays, without torch.
#include <pybind11/pybind11.h>

#include <tuple>

#include "neuraldeps/cpu_api.h"

namespace py = pybind11;

namespace {

std::tuple<std::string, std::string, std::string> cpu_levels() {
  return {nd::cpu::compiled_levels(), nd::cpu::available_levels(), nd::cpu::kernels().level};
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.def("cpu_levels", &cpu_levels, "Instruction-set levels: compiled, runnable on this machine, in use.");
}
