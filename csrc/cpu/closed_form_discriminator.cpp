// Passes over the penalties of samples that the closed-form discriminator is made of.
//
// With u_i = eta (l_i - min l), y_i = exp(-u_i), e_i = 1 - y_i the density ratio of the tilted law is
//
//     JS game   w_i = y_i / (r + e_i),   r > 0 the root of mean w = 1, that is of  1 / mean(1 / (r + e)) = (1 + r) / 2
//     KL game   w_i = y_i / mean y
//
// and D_i = 1 / (1 + w_i). The left side of the root's equation is concave in r, so that Newton's iteration climbs to
// the root from its left without a bracket; each step is one pass: an addition, a division and two sums a sample, and
// no exponential, which the first pass stores.
//
// Stored a sample is v = e where e <= 1/2, else -y: each of e and y = 1 - e keeps its relative precision.
//
// Floor in bytes a sample of float32: 8 (read l, write v), 4 a step (read v), 12 (read v, write D, w). The division,
// 0.6 cycles a value with AVX-512, is the longest of the operations of a step.
//
// Work is counted in blocks of kDiscriminatorBlock samples, each with partial sums of its own: in float32 within lanes
// for kRun values, then in float64. Results do not depend on the number of threads.
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd.hpp"
#include "neuraldeps/simd_convert.hpp"
#include "neuraldeps/simd_exp.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int64_t kRun = 512;  // values added in one precision before float64 takes over
static_assert(kDiscriminatorBlock % kRun == 0);

template <class T>
using V = typename Vec<T>::t;

struct Block {
  int64_t begin, end;
};
Block block_of(const DiscriminatorArgs& args, int64_t block) {
  const int64_t begin = block * kDiscriminatorBlock;
  return {begin, smaller(begin + kDiscriminatorBlock, args.N)};
}

// f<vector>(i, count) for the vectors of [begin, end): count is W but for the last.
template <class T, class F>
ND_INLINE void over_vectors(int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; i += Vec<T>::W) f(i, smaller(Vec<T>::W, end - i));
}

template <class T>
ND_INLINE V<T> load_some(const T* p, int64_t count) {
  return count == Vec<T>::W ? load(p) : load_part_as<T>(p, count);
}
template <class T>
ND_INLINE void store_some(T* p, V<T> v, int64_t count) {
  if (count == Vec<T>::W)
    store(p, v);
  else
    store_part_as(p, v, count);
}

// ------------------------------------------------------------------------------------------------ passes

template <class T>
double minimum(const T* l, Block block) {
  V<T> lowest = broadcast(l[block.begin]), unequal = {};
  over_vectors<T>(block.begin, block.end, [&](int64_t i, int64_t count) {
    const V<T> v = keep_first<T>(load_some(l + i, count), count, l[block.begin]);
    lowest = v < lowest ? v : lowest;
    unequal += v == v ? V<T>{} : broadcast(T(1));
  });
  return sum_of_lanes<T>(unequal) > 0 ? __builtin_nan("") : -static_cast<double>(largest_lane<T>(-lowest));
}

// As many samples as a vector of double has lanes, in T.
template <class T>
using Samples __attribute__((vector_size(sizeof(T) * Vec<double>::W))) = T;

// v of samples, and the sum of their y.
template <class T>
double tilt(const T* l, T* stored, double eta, double lowest, Block block) {
  V<double> sum = {};
  over_vectors<double>(block.begin, block.end, [&](int64_t i, int64_t count) {
    const auto bytes = static_cast<size_t>(count) * sizeof(T);
    Samples<T> part = {};
    count == Vec<double>::W ? __builtin_memcpy(&part, l + i, sizeof part) : __builtin_memcpy(&part, l + i, bytes);
    const V<double> y = exp_of<double>((lowest - __builtin_convertvector(part, V<double>)) * eta);
    const V<double> e = 1.0 - y;
    part = __builtin_convertvector(e > 0.5 ? -y : e, Samples<T>);
    count == Vec<double>::W ? __builtin_memcpy(stored + i, &part, sizeof part)
                            : __builtin_memcpy(stored + i, &part, bytes);
    sum += count == Vec<double>::W ? y : keep_first<double>(y, count, 0.0);
  });
  return sum_of_lanes<double>(sum);
}

// Lanes that hold -y, which may be -0.
template <class T>
ND_INLINE auto beyond_half(V<T> v) {
  return reinterpret_cast<typename ExpTraits<T>::Ints>(v) < 0;
}
template <class T>
ND_INLINE V<T> complement(V<T> v) {
  return beyond_half<T>(v) ? 1 + v : v;  // e
}

// Sums of 1 / (r + e) and of its square.
template <class T>
void inverse_sums(const T* stored, double r, Block block, double* sums) {
  sums[0] = sums[1] = 0;
  const V<T> shift = broadcast(static_cast<T>(r));
  for (int64_t begin = block.begin; begin < block.end; begin += kRun) {
    V<T> first = {}, second = {};
    over_vectors<T>(begin, smaller(begin + kRun, block.end), [&](int64_t i, int64_t count) {
      V<T> q = 1 / (complement<T>(load_some(stored + i, count)) + shift);
      if (count < Vec<T>::W) q = keep_first<T>(q, count, T(0));
      first += q;
      second += q * q;
    });
    sums[0] += sum_of_lanes<T>(first);
    sums[1] += sum_of_lanes<T>(second);
  }
}

// D and w from v; JS: r is the root, KL: the mean of y.
template <class T>
void finish(const DiscriminatorArgs& args, double r, Block block) {
  T* const discriminator = static_cast<T*>(args.discriminator);
  T* const weight = static_cast<T*>(args.weight);
  const V<T> shift = broadcast(static_cast<T>(r)), per_mean = broadcast(static_cast<T>(1 / r));
  const V<T> scale = broadcast(static_cast<T>(1 / (1 + r)));
  over_vectors<T>(block.begin, block.end, [&](int64_t i, int64_t count) {
    const V<T> v = load_some(static_cast<const T*>(args.tilt) + i, count);
    const V<T> e = complement<T>(v), y = beyond_half<T>(v) ? -v : 1 - v;
    const V<T> w = args.jensen_shannon ? y / (e + shift) : y * per_mean;
    store_some(weight + i, w, count);
    store_some(discriminator + i, args.jensen_shannon ? (e + shift) * scale : 1 / (1 + w), count);
  });
}

// run(T()) with T the type of the samples.
template <class F>
ND_INLINE void with_type(Dtype dtype, const F& run) {
  if (dtype == Dtype::kFloat64)
    run(double());
  else
    run(float());
}

}  // namespace

void discriminator_minimum(const DiscriminatorArgs& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t b = begin; b < end; b++)
      args.partial[2 * b] = minimum(static_cast<const T*>(args.penalty), block_of(args, b));
  });
}

void discriminator_tilt(const DiscriminatorArgs& args, double lowest, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* const l = static_cast<const T*>(args.penalty);
    for (int64_t b = begin; b < end; b++)
      args.partial[2 * b] = tilt(l, static_cast<T*>(args.tilt), args.eta, lowest, block_of(args, b));
  });
}

void discriminator_sums(const DiscriminatorArgs& args, double r, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t b = begin; b < end; b++)
      inverse_sums(static_cast<const T*>(args.tilt), r, block_of(args, b), args.partial + 2 * b);
  });
}

void discriminator_finish(const DiscriminatorArgs& args, double r, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto zero) {
    for (int64_t b = begin; b < end; b++) finish<decltype(zero)>(args, r, block_of(args, b));
  });
}

}  // namespace nd::cpu::ND_CPU_LEVEL
