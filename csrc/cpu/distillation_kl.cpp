// Distillation loss over many classes: T^2 / N sum_n KL(softmax(b_n / T) || softmax(a_n / T)), and its gradient in a.
//
//     s = sum exp((x - m) / T),  m = max x           of the student a and the teacher b, online over chunks
//     u = log p_s - log p_t,     KL = sum p_t (e^u - 1 - u)
//     da = factor (p_s - p_t)
//
// Every term of this KL is >= 0, and as sum p_t e^u = 1, an error of log s changes it in second order only: small
// divergences keep their digits. e^u - 1 - u is a series for small u, else (p_s - p_t) / p_t - u.
//
// Floor: forward 8 bytes an entry of float32 (a and b read), backward 12 (read again, da written); no softmax is
// stored. Exponentials: 4 an entry forward, 2 backward, which vectors hide behind memory from AVX2 on. A gradient
// written by the forward instead would cost 8 bytes more, as the backward has to scale it, and its memory until then.
//
// Layout: a task is a row. The forward takes chunks of kChunk entries, their maximum and sums while they are in the
// first-level cache, then the terms of KL over the row, which is in the second-level cache up to some 100,000 classes.
// Sums of a chunk are float32 by lane (float64 for float64), of chunks float64.
//
// Limits: infinite logits give NaN or infinity.
#include <cmath>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd_convert.hpp"
#include "neuraldeps/simd_exp.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int64_t kChunk = 1024;

template <class T>
using V = typename Vec<T>::t;

// f(j, count) for the vectors of [begin, end); only in the last is count below W.
template <class T, class F>
ND_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  constexpr int W = Vec<T>::W;
  int64_t j = begin;
  for (; j + W <= end; j += W) f(j, W);
  if (j < end) f(j, end - j);
}

// Largest value m of a softmax at temperature T, and s = sum exp((x - m) / T).
template <class T>
struct Softmax {
  T largest = static_cast<T>(-__builtin_inf());
  double sum = 0;

  // Raises m to that of a chunk.
  ND_INLINE void raise(T largest_of_chunk, double over_temperature) {
    if (!(largest_of_chunk > largest)) return;
    if (sum != 0)
      sum *= std::exp((static_cast<double>(largest) - static_cast<double>(largest_of_chunk)) * over_temperature);
    largest = largest_of_chunk;
  }
};

template <class In>
struct Rows {
  using T = Wide<In>;
  const DistillationArgs& args;
  const In *a, *b;

  ND_INLINE Rows(const DistillationArgs& from, int64_t row)
      : args(from),
        a(static_cast<const In*>(from.student) + row * from.student_stride),
        b(static_cast<const In*>(from.teacher) + row * from.teacher_stride) {}

  ND_INLINE void softmaxes(Softmax<T>& student, Softmax<T>& teacher) const {
    const double over_temperature = 1 / args.temperature;
    const V<T> over = broadcast(static_cast<T>(over_temperature));
    const V<T> lowest = broadcast(static_cast<T>(-__builtin_inf()));
    for (int64_t begin = 0; begin < args.C; begin += kChunk) {
      const int64_t end = smaller(args.C, begin + kChunk);
      V<T> top_a = lowest, top_b = lowest;
      for_vectors<T>(begin, end, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        V<T> va = take<T>(a + j, count), vb = take<T>(b + j, count);
        if (count < Vec<T>::W) {
          va = keep_first<T>(va, count, lowest[0]);
          vb = keep_first<T>(vb, count, lowest[0]);
        }
        top_a = larger_lanes<T>(va, top_a);
        top_b = larger_lanes<T>(vb, top_b);
      });
      student.raise(largest_lane<T>(top_a), over_temperature);
      teacher.raise(largest_lane<T>(top_b), over_temperature);
      const V<T> m_a = broadcast(student.largest), m_b = broadcast(teacher.largest);
      V<T> sum_a = {}, sum_b = {};
      for_vectors<T>(begin, end, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        V<T> e_a = exp_of<T>((take<T>(a + j, count) - m_a) * over);
        V<T> e_b = exp_of<T>((take<T>(b + j, count) - m_b) * over);
        if (count < Vec<T>::W) {
          e_a = keep_first<T>(e_a, count, T(0));
          e_b = keep_first<T>(e_b, count, T(0));
        }
        sum_a += e_a;
        sum_b += e_b;
      });
      student.sum += sum_of_lanes<T>(sum_a);
      teacher.sum += sum_of_lanes<T>(sum_b);
    }
  }
};

// (e^u - 1 - u) / u^2 for |u| <= 1/2.
ND_INLINE V<float> second_order(V<float> u) {
  V<float> p = u * (1 / 40320.0f) + 1 / 5040.0f;
  p = p * u + 1 / 720.0f;
  p = p * u + 1 / 120.0f;
  p = p * u + 1 / 24.0f;
  p = p * u + 1 / 6.0f;
  return p * u + 0.5f;
}
ND_INLINE V<double> second_order(V<double> u) {
  V<double> p = u * (1 / 1307674368000.0) + 1 / 87178291200.0;
  p = p * u + 1 / 6227020800.0;
  p = p * u + 1 / 479001600.0;
  p = p * u + 1 / 39916800.0;
  p = p * u + 1 / 3628800.0;
  p = p * u + 1 / 362880.0;
  p = p * u + 1 / 40320.0;
  p = p * u + 1 / 5040.0;
  p = p * u + 1 / 720.0;
  p = p * u + 1 / 120.0;
  p = p * u + 1 / 24.0;
  p = p * u + 1 / 6.0;
  return p * u + 0.5;
}

template <class In>
void forward_row(const DistillationArgs& args, int64_t row) {
  using T = Wide<In>;
  const Rows<In> rows(args, row);
  Softmax<T> student, teacher;
  rows.softmaxes(student, teacher);
  double* statistics = args.statistics + 4 * row;
  statistics[0] = static_cast<double>(student.largest);
  statistics[1] = std::log(student.sum);
  statistics[2] = static_cast<double>(teacher.largest);
  statistics[3] = std::log(teacher.sum);

  const double shift = statistics[3] - statistics[1];
  const T shift_high = static_cast<T>(shift);
  const V<T> high = broadcast(shift_high), low = broadcast(static_cast<T>(shift - static_cast<double>(shift_high)));
  const V<T> over = broadcast(static_cast<T>(1 / args.temperature));
  const V<T> m_a = broadcast(student.largest), m_b = broadcast(teacher.largest);
  const V<T> over_a = broadcast(static_cast<T>(1 / student.sum)), over_b = broadcast(static_cast<T>(1 / teacher.sum));
  double divergence = 0;
  for (int64_t begin = 0; begin < args.C; begin += kChunk) {
    V<T> sum = {};
    for_vectors<T>(begin, smaller(args.C, begin + kChunk),
                   [&](int64_t j, int64_t count) __attribute__((always_inline)) {
                     const V<T> x_a = take<T>(rows.a + j, count) - m_a, x_b = take<T>(rows.b + j, count) - m_b;
                     const V<T> p_s = exp_of<T>(x_a * over) * over_a, p_t = exp_of<T>(x_b * over) * over_b;
                     const V<T> u = ((x_a - x_b) * over + high) + low;
                     const V<T> magnitude = u < T(0) ? -u : u;
                     V<T> term = magnitude <= T(0.5) ? p_t * (u * u) * second_order(u) : p_s - p_t - p_t * u;
                     if (count < Vec<T>::W) term = keep_first<T>(term, count, T(0));
                     sum += term;
                   });
    divergence += sum_of_lanes<T>(sum);
  }
  args.divergence[row] = divergence;
}

template <class In>
void backward_row(const DistillationArgs& args, int64_t row) {
  using T = Wide<In>;
  const Rows<In> rows(args, row);
  const double* statistics = args.statistics + 4 * row;
  const V<T> over = broadcast(static_cast<T>(1 / args.temperature));
  const V<T> m_a = broadcast(static_cast<T>(statistics[0])), m_b = broadcast(static_cast<T>(statistics[2]));
  const V<T> scale_a = broadcast(static_cast<T>(args.factor * std::exp(-statistics[1])));
  const V<T> scale_b = broadcast(static_cast<T>(args.factor * std::exp(-statistics[3])));
  In* out = static_cast<In*>(args.dstudent) + row * args.C;
  for_vectors<T>(0, args.C, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    const V<T> e_a = exp_of<T>((take<T>(rows.a + j, count) - m_a) * over);
    const V<T> e_b = exp_of<T>((take<T>(rows.b + j, count) - m_b) * over);
    const V<T> gradient = scale_a * e_a - scale_b * e_b;
    count == Vec<T>::W ? store_as(out + j, gradient) : store_part_as(out + j, gradient, count);
  });
}

template <class In>
void run_rows(const DistillationArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) args.dstudent ? backward_row<In>(args, row) : forward_row<In>(args, row);
}

}  // namespace

void distillation_kl(const DistillationArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&]<class In>() { run_rows<In>(args, begin, end); });
}

}  // namespace nd::cpu::ND_CPU_LEVEL
