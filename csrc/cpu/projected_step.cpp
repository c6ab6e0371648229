// One step of principal knowledge descent, for each latent code z of a layer with the basis u_1..u_R of that layer:
//
//     h = g + rho (z - origin),   p = sum_k (h . u_k) u_k,   z' = z - a p
//
// Floor in bytes a value of float32: 20 (read z, g, origin, write z', p) while the basis stays in cache; 4 R + 5 flops.
//
// A task is one code. h and p of a code lie in the workspace of the task; products are summed by lanes in T over kRun
// values, then in float64. Results do not depend on the number of threads.
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd.hpp"
#include "neuraldeps/simd_convert.hpp"
#include "neuraldeps/simd_exp.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int kTogether = 4;  // vectors of the basis that one pass over h takes
constexpr int64_t kRun = 1024;

template <class T>
using V = typename Vec<T>::t;

template <class T>
struct Code {
  const T *z, *gradient, *origin;  // origin may be null
  T *moved, *direction;
};

// h, padded with zeros to whole vectors.
template <class T>
ND_INLINE V<T> descent(const Code<T>& code, T rho, int64_t i, int64_t count) {
  const auto part = [&](const T* p) { return count == Vec<T>::W ? load(p + i) : load_part_as<T>(p + i, count); };
  const V<T> g = part(code.gradient);
  return code.origin == nullptr ? g : g + rho * (part(code.z) - part(code.origin));
}

// products[k] = h . u_k for `n` <= kTogether rows u_k of the basis.
template <class T, int n>
void multiply(const T* h, const T* basis, int64_t d, double* products) {
  constexpr int W = Vec<T>::W;
  for (int k = 0; k < n; k++) products[k] = 0;
  for (int64_t begin = 0; begin < d; begin += kRun) {
    V<T> sums[n] = {};
    const int64_t end = smaller(begin + kRun, d);
    for (int64_t i = begin; i < end; i += W)
      for (int k = 0; k < n; k++)
        sums[k] += load(h + i) * (end - i >= W ? load(basis + k * d + i) : load_part_as<T>(basis + k * d + i, end - i));
    for (int k = 0; k < n; k++) products[k] += sum_of_lanes<T>(sums[k]);
  }
}

template <class T, int n>
void add(const T* basis, const double* products, int64_t d, T* p) {
  constexpr int W = Vec<T>::W;
  for (int64_t i = 0; i < d; i += W) {
    V<T> sum = load(p + i);
    for (int k = 0; k < n; k++)
      sum += static_cast<T>(products[k]) *
             (d - i >= W ? load(basis + k * d + i) : load_part_as<T>(basis + k * d + i, d - i));
    store(p + i, sum);
  }
}

template <class T, int n>
void project_on(const T* h, const T* basis, int64_t d, T* p) {
  double products[n];
  multiply<T, n>(h, basis, d, products);
  add<T, n>(basis, products, d, p);
}

// workspace: 2 times d rounded up to whole vectors.
template <class T>
double step(const Code<T>& code, const T* basis, int64_t R, int64_t d, T rho, T a, T* workspace) {
  constexpr int W = Vec<T>::W;
  const int64_t room = round_up(d, W);
  T *const h = workspace, *const p = workspace + room;
  for (int64_t i = 0; i < d; i += W) {
    store(h + i, descent(code, rho, i, smaller(W, d - i)));
    store(p + i, V<T>{});
  }
  for (; R >= kTogether; R -= kTogether, basis += kTogether * d) project_on<T, kTogether>(h, basis, d, p);
  for (; R > 0; R--, basis += d) project_on<T, 1>(h, basis, d, p);
  double squares = 0;
  for (int64_t i = 0; i < d; i += W) {
    const int64_t count = smaller(W, d - i);
    const V<T> step = load(p + i);
    const V<T> z = count == W ? load(code.z + i) : load_part_as<T>(code.z + i, count);
    if (count == W) {
      store(code.moved + i, z - a * step);
      store(code.direction + i, step);
    } else {
      store_part_as(code.moved + i, z - a * step, count);
      store_part_as(code.direction + i, step, count);
    }
    squares += sum_of_lanes<T>(step * step);
  }
  return squares;
}

template <class T>
void steps(const ProjectedStepArgs& args, int64_t begin, int64_t end, T* workspace) {
  const auto at = [&](const void* base, int64_t row) {
    return base == nullptr ? nullptr : static_cast<const T*>(base) + row * args.d;
  };
  for (int64_t row = begin; row < end; row++) {
    const Code<T> code = {at(args.z, row), at(args.gradient, row), at(args.origin, row),
                          static_cast<T*>(args.moved) + row * args.d, static_cast<T*>(args.direction) + row * args.d};
    static_cast<T*>(args.squared_norm)[row] =
        static_cast<T>(step(code, static_cast<const T*>(args.basis) + row % args.L * args.R * args.d, args.R, args.d,
                            static_cast<T>(args.rho), static_cast<const T*>(args.step)[row / args.L], workspace));
  }
}

}  // namespace

int64_t projected_step_room(const ProjectedStepArgs& args) {
  const int64_t size = args.dtype == Dtype::kFloat64 ? 8 : 4;
  return 2 * round_up(args.d * size, ND_VECTOR_BYTES);
}

void projected_step(const ProjectedStepArgs& args, int64_t begin, int64_t end, void* workspace) {
  if (args.dtype == Dtype::kFloat64)
    steps(args, begin, end, static_cast<double*>(workspace));
  else
    steps(args, begin, end, static_cast<float*>(workspace));
}

}  // namespace nd::cpu::ND_CPU_LEVEL
