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

template <class T>
ND_INLINE V<T> load_some(const T* p, int64_t count) {
  return count >= Vec<T>::W ? load(p) : load_part_as<T>(p, count);
}
template <class T>
ND_INLINE void store_some(T* p, V<T> v, int64_t count) {
  if (count >= Vec<T>::W)
    store(p, v);
  else
    store_part_as(p, v, count);
}

// h, padded with zeros to whole vectors.
template <class T>
void descent(const Code<T>& code, T rho, int64_t d, T* h) {
  for (int64_t i = 0; i < d; i += Vec<T>::W) {
    const V<T> g = load_some(code.gradient + i, d - i);
    store(h + i,
          code.origin == nullptr ? g : g + rho * (load_some(code.z + i, d - i) - load_some(code.origin + i, d - i)));
  }
}

// products[k] = h . u_k for `n` <= kTogether rows u_k of the basis.
template <class T, int n>
ND_INLINE void multiply(const T* h, const T* basis, int64_t d, T* products) {
  constexpr int W = Vec<T>::W;
  double totals[n] = {};
  for (int64_t begin = 0; begin < d; begin += kRun) {
    V<T> even[n] = {}, odd[n] = {};
    const int64_t end = smaller(begin + kRun, d);
    int64_t i = begin;
    for (; i + 2 * W <= end; i += 2 * W)
      for (int k = 0; k < n; k++) {
        even[k] += load(h + i) * load(basis + k * d + i);
        odd[k] += load(h + i + W) * load(basis + k * d + i + W);
      }
    for (; i < end; i += W)
      for (int k = 0; k < n; k++) even[k] += load(h + i) * load_some(basis + k * d + i, end - i);
    for (int k = 0; k < n; k++) totals[k] += sum_of_lanes<T>(even[k] + odd[k]);
  }
  for (int k = 0; k < n; k++) products[k] = static_cast<T>(totals[k]);
}

// sum + sum_k products[k] u_k in one vector.
template <class T, int n>
ND_INLINE V<T> combined(const T* basis, const T* products, int64_t d, int64_t i, V<T> sum) {
  for (int k = 0; k < n; k++) sum += products[k] * load_some(basis + k * d + i, d - i);
  return sum;
}

// The last `n` rows of the basis: p from the part of earlier rows, null if there are none; z' and |p|^2.
template <class T, int n>
double finish(const Code<T>& code, const T* h, const T* basis, int64_t d, T a, const T* earlier) {
  T products[n > 0 ? n : 1];
  if constexpr (n > 0) multiply<T, n>(h, basis, d, products);
  double squares = 0;
  for (int64_t begin = 0; begin < d; begin += kRun) {
    V<T> lanes = {};
    const int64_t end = smaller(begin + kRun, d);
    for (int64_t i = begin; i < end; i += Vec<T>::W) {
      const V<T> p = combined<T, n>(basis, products, d, i, earlier == nullptr ? V<T>{} : load(earlier + i));
      store_some(code.direction + i, p, d - i);
      store_some(code.moved + i, load_some(code.z + i, d - i) - a * p, d - i);
      lanes += p * p;
    }
    squares += sum_of_lanes<T>(lanes);
  }
  return squares;
}

// workspace: 2 times d rounded up to whole vectors.
template <class T>
double step(const Code<T>& code, const T* basis, int64_t R, int64_t d, T rho, T a, T* workspace) {
  T *const h = workspace, *const p = workspace + round_up(d, Vec<T>::W);
  descent(code, rho, d, h);
  const T* earlier = nullptr;
  for (; R > kTogether; R -= kTogether, basis += kTogether * d) {
    T products[kTogether];
    multiply<T, kTogether>(h, basis, d, products);
    for (int64_t i = 0; i < d; i += Vec<T>::W)
      store(p + i, combined<T, kTogether>(basis, products, d, i, earlier == nullptr ? V<T>{} : load(p + i)));
    earlier = p;
  }
  switch (R) {
    case 0:
      return finish<T, 0>(code, h, basis, d, a, earlier);
    case 1:
      return finish<T, 1>(code, h, basis, d, a, earlier);
    case 2:
      return finish<T, 2>(code, h, basis, d, a, earlier);
    case 3:
      return finish<T, 3>(code, h, basis, d, a, earlier);
    default:
      return finish<T, kTogether>(code, h, basis, d, a, earlier);
  }
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
