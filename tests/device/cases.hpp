// Named test cases of a program that runs on a GPU (nvcc) and on the emulation alike:
//
//   ND_CASE(name) { ...launch...; expect("what", actual, expected); }
//
// main.cu runs the cases named on the command line, or all, and exits 1 after any failed expectation.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "neuraldeps/device.hpp"

namespace test {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

inline int failures = 0;

inline void expect(const char* what, bool holds) {
  if (holds) return;
  ++failures;
  std::printf("  %s: does not hold\n", what);
}

// Equal bits, element by element: NaN equals NaN.
template <class T>
void expect(const char* what, const std::vector<T>& actual, const std::vector<T>& expected) {
  expect(what, actual.size() == expected.size());
  for (size_t i = 0; i < actual.size() && i < expected.size(); ++i) {
    if (std::memcmp(&actual[i], &expected[i], sizeof(T)) == 0) continue;
    ++failures;
    std::printf("  %s: element %zu is %.17g, expected %.17g\n", what, i, static_cast<double>(actual[i]),
                static_cast<double>(expected[i]));
    return;
  }
}

// Within `relative` of the expected value; infinities and NaN must be the same.
template <class T>
void expect_near(const char* what, const std::vector<T>& actual, const std::vector<T>& expected, double relative) {
  expect(what, actual.size() == expected.size());
  for (size_t i = 0; i < actual.size() && i < expected.size(); ++i) {
    const double a = actual[i], b = expected[i];
    if (a == b || (a != a && b != b) || std::abs(a - b) <= relative * std::abs(b)) continue;
    ++failures;
    std::printf("  %s: element %zu is %.17g, expected %.17g\n", what, i, a, b);
    return;
  }
}

// Waits for the device; the error of the launches since the last call.
inline cudaError_t finish() {
  const cudaError_t launched = cudaGetLastError(), ran = cudaDeviceSynchronize();
  return launched != cudaSuccess ? launched : ran;
}

// n elements in device memory.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t n) : n_(n) { expect("cudaMalloc", cudaMalloc(&data_, n * sizeof(T)) == cudaSuccess); }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    expect("cudaMemcpy", cudaMemcpy(data_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  DeviceArray(size_t n, T value) : DeviceArray(std::vector<T>(n, value)) {}
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }

  // The values after all launches so far, which must have succeeded.
  std::vector<T> values() const {
    const cudaError_t error = finish();
    if (error != cudaSuccess) std::printf("  %s\n", cudaGetErrorString(error));
    expect("launch", error == cudaSuccess);
    std::vector<T> host(n_);
    expect("cudaMemcpy", cudaMemcpy(host.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return host;
  }

 private:
  T* data_ = nullptr;
  size_t n_;
};

}  // namespace test

#define ND_CASE(NAME)                                                      \
  static void NAME##_case();                                               \
  static const test::Registration NAME##_registration(#NAME, NAME##_case); \
  static void NAME##_case()
