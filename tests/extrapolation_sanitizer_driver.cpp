// Runs the kernels of knowledge extrapolation on edge shapes in a program of its own, to be built with sanitizers
// together with csrc/cpu/closed_form_discriminator.cpp and projected_step.cpp: arrays of exactly the sizes that
// cpu_api.h asks for, results full of NaN before. Every kernel runs once over all tasks and once task by task from the
// last to the first. Ends with status 1 and a message if results differ or are not finite.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "neuraldeps/cpu_api.h"

namespace nd::cpu::ND_CPU_LEVEL {
void discriminator_minimum(const DiscriminatorArgs& args, int64_t begin, int64_t end);
void discriminator_tilt(const DiscriminatorArgs& args, double lowest, int64_t begin, int64_t end);
void discriminator_sums(const DiscriminatorArgs& args, double r, int64_t begin, int64_t end);
void discriminator_finish(const DiscriminatorArgs& args, double r, int64_t begin, int64_t end);
int64_t projected_step_room(const ProjectedStepArgs& args);
void projected_step(const ProjectedStepArgs& args, int64_t begin, int64_t end, void* workspace);
}  // namespace nd::cpu::ND_CPU_LEVEL

namespace {

namespace level = nd::cpu::ND_CPU_LEVEL;
using nd::cpu::DiscriminatorArgs;
using nd::cpu::Dtype;
using nd::cpu::ProjectedStepArgs;

int failures = 0;

// `count` values of a dtype in 0..2, or, as `results`, NaN; nothing else lies behind them.
class Array {
 public:
  Array(Dtype dtype, int64_t count, bool results = false)
      : wide_(dtype == Dtype::kFloat64), bytes_(static_cast<size_t>(count) * (wide_ ? 8 : 4)) {
    data_ = std::malloc(bytes_ ? bytes_ : 1);
    forget();
    static unsigned state = 1;
    for (int64_t i = 0; i < count && !results; i++) {
      const double value = ((state = state * 1664525u + 1013904223u) >> 16) / 32768.0;
      if (wide_)
        static_cast<double*>(data_)[i] = value;
      else
        static_cast<float*>(data_)[i] = static_cast<float>(value);
    }
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;

  void* data() const { return data_; }
  void forget() const { std::memset(data_, 0xff, bytes_); }
  std::vector<char> copy() const { return {static_cast<char*>(data_), static_cast<char*>(data_) + bytes_}; }
  bool finite() const {
    for (size_t i = 0; i < bytes_ / (wide_ ? 8 : 4); i++)
      if (!std::isfinite(wide_ ? static_cast<double*>(data_)[i] : static_cast<float*>(data_)[i])) return false;
    return true;
  }

 private:
  bool wide_;
  size_t bytes_;
  void* data_;
};

// run(backwards) fills the results.
template <class F, class... Arrays>
void check(const char* what, int64_t size, Dtype dtype, const F& run, const Arrays&... results) {
  (results.forget(), ...);
  run(false);
  bool right = (results.finite() && ...);
  const std::vector<char> first[] = {results.copy()...};
  (results.forget(), ...);
  run(true);
  const std::vector<char> second[] = {results.copy()...};
  for (size_t i = 0; i < sizeof...(results); i++) right = right && first[i] == second[i];
  if (right) return;
  failures++;
  std::printf("%s, size %lld, dtype %d\n", what, static_cast<long long>(size), static_cast<int>(dtype));
}

template <class F>
void over(int64_t tasks, bool backwards, const F& kernel) {
  if (!backwards) return kernel(0, tasks);
  for (int64_t t = tasks; t-- > 0;) kernel(t, t + 1);
}

void discriminator(int64_t N, Dtype dtype, bool jensen_shannon) {
  const int64_t blocks = (N + nd::cpu::kDiscriminatorBlock - 1) / nd::cpu::kDiscriminatorBlock;
  const Array penalty(dtype, N), tilt(dtype, N, true), partial(Dtype::kFloat64, 2 * blocks, true);
  const Array D(dtype, N, true), w(dtype, N, true);
  const DiscriminatorArgs args = {.dtype = dtype,
                                  .penalty = penalty.data(),
                                  .N = N,
                                  .eta = 1.5,
                                  .jensen_shannon = jensen_shannon,
                                  .tilt = tilt.data(),
                                  .partial = static_cast<double*>(partial.data()),
                                  .discriminator = D.data(),
                                  .weight = w.data()};
  const auto all = [&](bool backwards) {
    over(blocks, backwards, [&](int64_t b, int64_t e) { level::discriminator_minimum(args, b, e); });
    over(blocks, backwards, [&](int64_t b, int64_t e) { level::discriminator_tilt(args, 0.0, b, e); });
    over(blocks, backwards, [&](int64_t b, int64_t e) { level::discriminator_sums(args, 0.7, b, e); });
    over(blocks, backwards, [&](int64_t b, int64_t e) { level::discriminator_finish(args, 0.7, b, e); });
  };
  check(jensen_shannon ? "discriminator js" : "discriminator kl", N, dtype, all, D, w);
}

void step(int64_t B, int64_t L, int64_t R, int64_t d, Dtype dtype, bool with_origin) {
  const Array z(dtype, B * L * d), gradient(dtype, B * L * d), origin(dtype, B * L * d), basis(dtype, L * R * d);
  const Array a(dtype, B), moved(dtype, B * L * d, true), direction(dtype, B * L * d, true);
  const Array squares(dtype, B * L, true);
  const ProjectedStepArgs args = {.dtype = dtype,
                                  .B = B,
                                  .L = L,
                                  .R = R,
                                  .d = d,
                                  .z = z.data(),
                                  .gradient = gradient.data(),
                                  .origin = with_origin ? origin.data() : nullptr,
                                  .basis = basis.data(),
                                  .step = a.data(),
                                  .rho = 0.25,
                                  .moved = moved.data(),
                                  .direction = direction.data(),
                                  .squared_norm = squares.data()};
  void* workspace = nullptr;
  if (posix_memalign(&workspace, 64, static_cast<size_t>(level::projected_step_room(args))) != 0) std::abort();
  const auto all = [&](bool backwards) {
    over(B * L, backwards, [&](int64_t b, int64_t e) { level::projected_step(args, b, e, workspace); });
  };
  check("projected_step", d, dtype, all, moved, direction, squares);
  std::free(workspace);
}

}  // namespace

int main() {
  const int64_t block = nd::cpu::kDiscriminatorBlock;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64}) {
    for (const int64_t N : {int64_t{1}, int64_t{17}, block, block + 1, 2 * block + 523})
      for (const bool jensen_shannon : {false, true}) discriminator(N, dtype, jensen_shannon);
    for (const int64_t d : {1, 16, 37, 1024, 1061})
      for (const int64_t R : {0, 1, 2, 3, 4, 5, 9}) step(3, 2, R, d, dtype, d % 2 == 0);
  }
  return failures == 0 ? 0 : 1;
}
