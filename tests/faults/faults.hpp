// Kernels with one fault each, as cases of ../device/cases.hpp. A case prints the kernel's result; test_emulator.py
// says which lane must find the fault: the plain build (a report, NaN, or results that depend on ND_EMU_ORDER),
// AddressSanitizer and UndefinedBehaviorSanitizer, ThreadSanitizer.
#pragma once
#include "../device/cases.hpp"

namespace test {

template <class T>
void print(const DeviceArray<T>& array) {
  for (T v : array.values()) std::printf(" %.9g", static_cast<double>(v));
  std::printf("\n");
}

}  // namespace test
