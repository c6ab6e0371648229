// Instance moments, the affine pass over them, their backward, and batch normalisation by domain.
//
//     g[n, c] = mean of x,  q[n, c] = mean of (x - g)^2                              one read
//     y = act(A (x - g) + B + residual)                                              one read, one write
//     S1 = sum dy',  S2 = sum dy' (x - g)                                            two reads
//     dx = A dy' + offset + slope (x - g),   dy' = dy where y > 0 for a ReLU         two reads, one write
//
// per sample n and channel c, or, by domain k, with g = mean_k and A, B, offset, slope of all samples of k.
//
// Floor in bytes an element of float32: 8 forward (x read, y written) and 12 backward (x, dy read, dx written) while
// the values of the batch stay in cache between the two passes over them, else 12 and 20. Flops (3 and 4 a value and
// pass) are hidden behind that, but for short rows, whose sums over lanes count as much.
//
// Layouts: [N, C, S], where a block is one register of channels, vectors run along S, and the sums of all channels of
// a block go over lanes together; and [N, S, C], where a block is kBlockVectors registers of channels and a pass walks
// down S with one accumulator a channel. Samples of enough positions go stage by stage, each in the order of memory:
// moments of every sample, tables of the domains, affine pass. With few positions a domain and a block are one task.
//
// Moments are sums of x - p and (x - p)^2 about a pivot p, the mean of a few values of a row or of the first rows, in
// float32 (float64 for float64) that goes to float64 every kFlush additions. The error of the variance is that of these
// sums times 1 + (mean - p)^2 / variance <= number of values / number of values in p. Segments are merged by Chan's
// formula in float64. The mean of a domain is used as p = mean rounded to the precision of x, with mean - p in the
// shift, so that nothing is lost where the mean is large.
//
// No operation depends on the number of threads or on other domains; results do not depend on other channels.
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd.hpp"
#include "neuraldeps/simd_convert.hpp"

#define ND_INLINED __attribute__((always_inline))  // of lambdas
#define ND_NOINLINE __attribute__((noinline))      // one copy of each loop

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int kBlockVectors = ND_VECTOR_BYTES == 64 ? 8 : 4;  // of 32 and 16 registers
constexpr int64_t kFlush = 128;                               // additions to a float32 accumulator
constexpr int64_t kPivotShare = 64;  // down S the pivot is the mean of a 64th of the values of a channel, the first
constexpr int64_t kPivotRows = 8;    // ones, but of at least so many rows
constexpr int kAhead = 4;            // registers that one step along S takes

template <class T>
using V = typename Vec<T>::t;

// ------------------------------------------------------------------------------------------------ vectors

template <class T>
ND_INLINE V<T> keep_first(V<T> v, int64_t count) {
  for (int l = 0; l < Vec<T>::W; l++) v[l] = l < count ? v[l] : T(0);
  return v;
}
#if defined(__AVX512F__)
template <>
ND_INLINE V<float> keep_first<float>(V<float> v, int64_t count) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << count) - 1), v);
}
#endif

template <class T>
ND_INLINE V<T> square_root(V<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_sqrt_ps(0xffff, v);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_sqrt_pd(0xff, v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_sqrt_ps(v);
  if constexpr (sizeof(T) == 8) return _mm256_sqrt_pd(v);
#else
  for (int l = 0; l < Vec<T>::W; l++) v[l] = static_cast<T>(__builtin_sqrt(v[l]));
  return v;
#endif
}

// a - b on the multipliers, one of which idles where sums are formed on the adders. `one` is a 1 that the compiler does
// not see through.
template <class T>
ND_INLINE V<T> unknown_one() {
  V<T> one = broadcast(T(1));
#if defined(__FMA__)
  asm("" : "+v"(one));
#endif
  return one;
}
template <class T>
ND_INLINE V<T> difference(V<T> a, V<T> b, [[maybe_unused]] V<T> one) {
#if defined(__FMA__)
  return a * one - b;
#else
  return a - b;
#endif
}

template <class T>
ND_INLINE V<T> positive_part(V<T> v) {
  return v < T(0) ? V<T>{} : v;  // NaN stays
}

template <class F>
ND_INLINE void with_flags(bool first, bool second, const F& f) {
  if (first) {
    second ? f.template operator()<true, true>() : f.template operator()<true, false>();
  } else {
    second ? f.template operator()<false, true>() : f.template operator()<false, false>();
  }
}

// The samples of one pass and the arrays of one task.
struct Samples {
  const int64_t* index;
  int64_t count;
};

template <class T>
struct Coefficients {
  const T *mean, *scale, *shift, *slope;  // one a channel of the block
};

// mean and sum of squared deviations from the sums of x - p and (x - p)^2 over `number` values
template <class T>
ND_INLINE void moments_about(const T* p, const double* first, const double* second, double number, int64_t width,
                             double* mean, double* deviation) {
  const double over = 1 / number;
  for (int64_t i = 0; i < width; i++) {
    const double shift = first[i] * over;
    mean[i] = p[i] + shift;
    deviation[i] = second[i] - first[i] * shift;
  }
}

// ------------------------------------------------------------------------------------------------ [N, C, S]

template <class In>
struct AlongPositions {
  using T = Wide<In>;
  static constexpr int W = Vec<T>::W;
  static constexpr int kWidth = W;                            // channels of a block
  static constexpr int64_t kPiece = kFlush / 2 * kAhead * W;  // of a row, added without a look at what is pending

  // f(register, offset, count) for all values of a row; only in the last step is count below W.
  template <class F>
  static ND_INLINE void for_vectors(int64_t length, const F& f) {
    int64_t j = 0;
    for (; j + kAhead * W <= length; j += kAhead * W) {
#pragma GCC unroll 4
      for (int u = 0; u < kAhead; u++) f(u, j + u * W, W);
    }
    if (j + 2 * W <= length) {
      f(0, j, W);
      f(1, j + W, W);
      j += 2 * W;
    }
    if (j + W <= length) {
      f(2, j, W);
      j += W;
    }
    if (j < length) f(3, j, length - j);
  }
  static ND_INLINE V<T> take(const In* p, int64_t count) {
    return count == W ? load_as<T>(p) : load_part_as<T>(p, count);
  }
  static ND_INLINE void put(In* p, V<T> v, int64_t count) { count == W ? store_as(p, v) : store_part_as(p, v, count); }

  static ND_INLINE int64_t place(const NormArgs& args, int64_t n, int64_t c) { return (n * args.C + c) * args.S; }

  // sum = sum of d, other = sum of e over a row, where f(offset, count, d, e) sets d and e.
  template <class F>
  static ND_INLINE void sum_vectors(int64_t length, V<T>& sum, V<T>& other, const F& f) {
    V<T> d, e;
    int64_t j = 0;
    sum = other = V<T>{};
    if (length >= kAhead * W) {
      V<T> sums[kAhead], others[kAhead];
#pragma GCC unroll 4
      for (int u = 0; u < kAhead; u++) f(u * W, W, sums[u], others[u]);
      for (j = kAhead * W; j + kAhead * W <= length; j += kAhead * W) {
#pragma GCC unroll 4
        for (int u = 0; u < kAhead; u++) {
          f(j + u * W, W, d, e);
          sums[u] += d;
          others[u] += e;
        }
      }
      sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      other = (others[0] + others[1]) + (others[2] + others[3]);
    }
    for (; j < length; j += W) {
      f(j, smaller(W, length - j), d, e);
      sum += d;
      other += e;
    }
  }

  // Sums [W] of d and e by channel over the rows of the samples, where row(i, s, place) of sample s and channel c0 + i
  // is a function of (place, count, d, e) that sets d and e.
  template <class F>
  static ND_INLINE void sum_rows(const NormArgs& args, Samples samples, int64_t c0, int64_t width, double* first,
                                 double* second, const F& row) {
    V<T> sums[W], others[W];
    for (int64_t i = width; i < W; i++) sums[i] = others[i] = V<T>{};
    for (int64_t i = 0; i < W; i++) first[i] = second[i] = 0;
    int64_t pending = 0;  // additions since the last flush; none: sums and others hold nothing
    const auto flush = [&]() ND_INLINED {
      add_to(first, lane_sums<T>(sums));
      add_to(second, lane_sums<T>(others));
      pending = 0;
    };
    const int64_t length = args.S;
    for (int64_t s = 0; s < samples.count; s++) {
      for (int64_t j0 = 0; j0 < length; j0 += kPiece) {
        const int64_t values = smaller(kPiece, length - j0);
        int64_t at = place(args, samples.index[s], c0);
        for (int64_t i = 0; i < width; i++, at += length) {
          const auto f = row(i, s, at);
          V<T> sum, other;
          sum_vectors(values, sum, other,
                      [&](int64_t j, int64_t count, V<T>& d, V<T>& e) ND_INLINED { f(at + j0 + j, count, d, e); });
          sums[i] = pending ? sums[i] + sum : sum;
          others[i] = pending ? others[i] + other : other;
        }
        pending += values / (kAhead * W) + 2;
        if (pending >= kFlush / 2) flush();
      }
    }
    if (pending) flush();
  }

  // Mean of a few values of a row, far from each other.
  static ND_INLINE T pivot(const In* row, int64_t length) {
    if (length < 4) return first_as<T>(row);
    const int64_t step = length / 4;
    return T(0.25) *
           ((first_as<T>(row) + first_as<T>(row + step)) + (first_as<T>(row + 2 * step) + first_as<T>(row + 3 * step)));
  }

  static ND_NOINLINE void moments(const NormArgs& args, Samples samples, int64_t c0, int64_t width, double* mean,
                                  double* deviation) {
    T p[kWidth];
    double first[kWidth], second[kWidth];
    const In* x = static_cast<const In*>(args.x);
    sum_rows(args, samples, c0, width, first, second, [&](int64_t i, int64_t s, int64_t start) ND_INLINED {
      if (s == 0) p[i] = pivot(x + start, args.S);
      const V<T> at_row = broadcast(p[i]), one = unknown_one<T>();
      return [=](int64_t at, int64_t count, V<T>& d, V<T>& e) ND_INLINED {
        d = difference<T>(take(x + at, count), at_row, one);
        if (count < W) d = keep_first<T>(d, count);
        e = d * d;
      };
    });
    moments_about(p, first, second, static_cast<double>(samples.count * args.S), width, mean, deviation);
  }

  static ND_NOINLINE void gradient_sums(const NormArgs& args, Samples samples, int64_t c0, int64_t width, const T* p,
                                        double* first, double* second) {
    const In *x = static_cast<const In*>(args.x), *grad = static_cast<const In*>(args.grad);
    const In* y = static_cast<const In*>(args.result);
    with_flags(y != nullptr, false, [&]<bool kMask, bool>() ND_INLINED {
      sum_rows(args, samples, c0, width, first, second, [&](int64_t i, int64_t, int64_t) ND_INLINED {
        const V<T> at_row = broadcast(p[i]);
        return [=](int64_t at, int64_t count, V<T>& d, V<T>& e) ND_INLINED {
          d = take(grad + at, count);
          if constexpr (kMask) d = take(y + at, count) > T(0) ? d : V<T>{};
          e = d * (take(x + at, count) - at_row);
        };
      });
    });
  }

  // f(channel of the block, place) for all rows.
  template <class F>
  static ND_INLINE void for_rows(const NormArgs& args, Samples samples, int64_t c0, int64_t width, const F& f) {
    const int64_t length = args.S;
    for (int64_t s = 0; s < samples.count; s++) {
      int64_t at = place(args, samples.index[s], c0);
      for (int64_t i = 0; i < width; i++, at += length) f(i, at, length);
    }
  }

  static ND_NOINLINE void affine(const NormArgs& args, Samples samples, int64_t c0, int64_t width,
                                 const Coefficients<T>& table) {
    const In *x = static_cast<const In*>(args.x), *r = static_cast<const In*>(args.residual);
    In* y = static_cast<In*>(args.out);
    const Coefficients<T> at_channel = table;
    with_flags(r != nullptr, args.relu, [&]<bool kResidual, bool kRelu>() ND_INLINED {
      for_rows(args, samples, c0, width, [&](int64_t i, int64_t at, int64_t length) ND_INLINED {
        const V<T> p = broadcast(at_channel.mean[i]), a = broadcast(at_channel.scale[i]);
        const V<T> b = broadcast(at_channel.shift[i]);
        const In *own_x = x + at, *own_r = r + at;
        In* own_y = y + at;
        for_vectors(length, [=](int, int64_t j, int64_t count) ND_INLINED {
          V<T> v = a * (take(own_x + j, count) - p) + b;
          if constexpr (kResidual) v += take(own_r + j, count);
          put(own_y + j, kRelu ? positive_part<T>(v) : v, count);
        });
      });
    });
  }

  static ND_NOINLINE void input_grad(const NormArgs& args, Samples samples, int64_t c0, int64_t width,
                                     const Coefficients<T>& table) {
    const In *x = static_cast<const In*>(args.x), *grad = static_cast<const In*>(args.grad);
    const In* y = static_cast<const In*>(args.result);
    In *dx = static_cast<In*>(args.out), *dr = static_cast<In*>(args.out_residual);
    const Coefficients<T> at_channel = table;
    if (!grad) {
      for_rows(args, samples, c0, width, [&](int64_t i, int64_t at, int64_t length) ND_INLINED {
        const V<T> p = broadcast(at_channel.mean[i]), b = broadcast(at_channel.shift[i]);
        const V<T> slope = broadcast(at_channel.slope[i]);
        const In* own_x = x + at;
        In* own_dx = dx + at;
        for_vectors(length, [=](int, int64_t j, int64_t count)
                                ND_INLINED { put(own_dx + j, slope * (take(own_x + j, count) - p) + b, count); });
      });
      return;
    }
    with_flags(y != nullptr, dr != nullptr, [&]<bool kMask, bool kResidual>() ND_INLINED {
      for_rows(args, samples, c0, width, [&](int64_t i, int64_t at, int64_t length) ND_INLINED {
        const V<T> p = broadcast(at_channel.mean[i]), a = broadcast(at_channel.scale[i]);
        const V<T> b = broadcast(at_channel.shift[i]), slope = broadcast(at_channel.slope[i]);
        const In *own_x = x + at, *own_grad = grad + at, *own_y = y + at;
        In *own_dx = dx + at, *own_dr = dr + at;
        for_vectors(length, [=](int, int64_t j, int64_t count) ND_INLINED {
          V<T> d = take(own_grad + j, count);
          if constexpr (kMask) d = take(own_y + j, count) > T(0) ? d : V<T>{};
          if constexpr (kResidual) put(own_dr + j, d, count);
          put(own_dx + j, a * d + (slope * (take(own_x + j, count) - p) + b), count);
        });
      });
    });
  }
};

// ------------------------------------------------------------------------------------------------ [N, S, C]

template <class In>
struct DownPositions {
  using T = Wide<In>;
  static constexpr int W = Vec<T>::W;
  static constexpr int kWidth = kBlockVectors * W;

  // f<K, whole>(first channel, channels) for the registers of a block: as many at once as fill, the rest one by one, as
  // the last of them may be cut.
  template <class F>
  static ND_INLINE void for_registers(int64_t width, const F& f) {
    if (width == kWidth) return f.template operator()<kBlockVectors, true>(0, W);
    int64_t w = 0;
    if (width >= kWidth / 2) {
      f.template operator()<kBlockVectors / 2, true>(0, W);
      w = kWidth / 2;
    }
    for (; w < width; w += W) f.template operator()<1, false>(w, smaller(W, width - w));
  }
  template <bool kWhole>
  static ND_INLINE V<T> take(const In* p, int64_t count) {
    return kWhole ? load_as<T>(p) : load_part_as<T>(p, count);
  }
  template <bool kWhole>
  static ND_INLINE void put(In* p, V<T> v, int64_t count) {
    kWhole ? store_as(p, v) : store_part_as(p, v, count);
  }
  template <int K, bool kWhole>
  static ND_INLINE void take_table(V<T> (&out)[K], const T* table, int64_t count) {
    for (int u = 0; u < K; u++) out[u] = kWhole ? load(table + u * W) : load_part_as<T>(table, count);
  }

  static ND_INLINE int64_t place(const NormArgs& args, int64_t n, int64_t c) { return n * args.S * args.C + c; }

  // Mean of the first rows.
  template <int K, bool kWhole>
  static ND_INLINE void pivot(const NormArgs& args, Samples samples, int64_t c, int64_t count, V<T> (&p)[K]) {
    const int64_t wanted = larger(kPivotRows, samples.count * args.S / kPivotShare);
    for (int u = 0; u < K; u++) p[u] = V<T>{};
    int64_t rows = 0;
    for (int64_t i = 0; i < samples.count && rows < wanted; i++) {
      const In* x = static_cast<const In*>(args.x) + place(args, samples.index[i], c);
      const int64_t stop = smaller(args.S, smaller(wanted, kFlush) - rows);
      for (int64_t s = 0; s < stop; s++, x += args.C) {
#pragma GCC unroll 8
        for (int u = 0; u < K; u++) p[u] += take<kWhole>(x + u * W, count);
      }
      rows += stop;
      if (rows == kFlush) break;
    }
    for (int u = 0; u < K; u++) p[u] *= T(1) / static_cast<T>(rows);
  }

  // first += sum of d, second += sum of e over all rows of the samples, where f(place, u, d, e) sets d and e.
  template <int K, class F>
  static ND_INLINE void sum_rows(const NormArgs& args, Samples samples, int64_t c, double* first, double* second,
                                 const F& f) {
    V<T> sums[K] = {}, others[K] = {};
    int64_t pending = 0;
    const auto flush = [&]() ND_INLINED {
      for (int u = 0; u < K; u++) {
        add_to(first + u * W, sums[u]);
        add_to(second + u * W, others[u]);
        sums[u] = others[u] = V<T>{};
      }
      pending = 0;
    };
    for (int64_t i = 0; i < samples.count; i++) {
      int64_t at = place(args, samples.index[i], c);
      for (int64_t s = 0; s < args.S;) {
        const int64_t rows = smaller(args.S - s, kFlush - pending);
        for (int64_t r = 0; r < rows; r++, at += args.C) {
#pragma GCC unroll 8
          for (int u = 0; u < K; u++) {
            V<T> d, e;
            f(at, u, d, e);
            sums[u] += d;
            others[u] += e;
          }
        }
        s += rows;
        pending += rows;
        if (pending == kFlush) flush();
      }
    }
    flush();
  }

  static ND_NOINLINE void moments(const NormArgs& args, Samples samples, int64_t c0, int64_t width, double* mean,
                                  double* deviation) {
    for_registers(width, [&]<int K, bool kWhole>(int64_t w, int64_t count) ND_INLINED {
      V<T> p[K];
      pivot<K, kWhole>(args, samples, c0 + w, count, p);
      double first[K * W] = {}, second[K * W] = {};
      const In* x = static_cast<const In*>(args.x);
      sum_rows<K>(args, samples, c0 + w, first, second, [&](int64_t at, int u, V<T>& d, V<T>& e) ND_INLINED {
        d = take<kWhole>(x + at + u * W, count) - p[u];
        e = d * d;
      });
      T pivots[K * W];
      for (int u = 0; u < K; u++) store(pivots + u * W, p[u]);
      moments_about(pivots, first, second, static_cast<double>(samples.count * args.S), kWhole ? K * W : count,
                    mean + w, deviation + w);
    });
  }

  static ND_NOINLINE void gradient_sums(const NormArgs& args, Samples samples, int64_t c0, int64_t width, const T* mean,
                                        double* first, double* second) {
    for_registers(width, [&]<int K, bool kWhole>(int64_t w, int64_t count) ND_INLINED {
      V<T> p[K];
      take_table<K, kWhole>(p, mean + w, count);
      double sums[K * W] = {}, centred[K * W] = {};
      const In *x = static_cast<const In*>(args.x), *grad = static_cast<const In*>(args.grad);
      const In* y = static_cast<const In*>(args.result);
      with_flags(y != nullptr, false, [&]<bool kMask, bool>() ND_INLINED {
        sum_rows<K>(args, samples, c0 + w, sums, centred, [&](int64_t at, int u, V<T>& d, V<T>& e) ND_INLINED {
          d = take<kWhole>(grad + at + u * W, count);
          if constexpr (kMask) d = take<kWhole>(y + at + u * W, count) > T(0) ? d : V<T>{};
          e = d * (take<kWhole>(x + at + u * W, count) - p[u]);
        });
      });
      for (int i = 0; i < (kWhole ? K * W : count); i++) {
        first[w + i] = sums[i];
        second[w + i] = centred[i];
      }
    });
  }

  // f(place, u) for all rows of the samples and registers of the block.
  template <int K, class F>
  static ND_INLINE void for_rows(const NormArgs& args, Samples samples, int64_t c, const F& f) {
    for (int64_t i = 0; i < samples.count; i++) {
      int64_t at = place(args, samples.index[i], c);
      for (int64_t s = 0; s < args.S; s++, at += args.C) {
#pragma GCC unroll 8
        for (int u = 0; u < K; u++) f(at + u * W, u);
      }
    }
  }

  static ND_NOINLINE void affine(const NormArgs& args, Samples samples, int64_t c0, int64_t width,
                                 const Coefficients<T>& table) {
    for_registers(width, [&]<int K, bool kWhole>(int64_t w, int64_t count) ND_INLINED {
      V<T> p[K], a[K], b[K];
      take_table<K, kWhole>(p, table.mean + w, count);
      take_table<K, kWhole>(a, table.scale + w, count);
      take_table<K, kWhole>(b, table.shift + w, count);
      const In *x = static_cast<const In*>(args.x), *r = static_cast<const In*>(args.residual);
      In* y = static_cast<In*>(args.out);
      with_flags(r != nullptr, args.relu, [&]<bool kResidual, bool kRelu>() ND_INLINED {
        for_rows<K>(args, samples, c0 + w, [&](int64_t at, int u) ND_INLINED {
          V<T> v = a[u] * (take<kWhole>(x + at, count) - p[u]) + b[u];
          if constexpr (kResidual) v += take<kWhole>(r + at, count);
          put<kWhole>(y + at, kRelu ? positive_part<T>(v) : v, count);
        });
      });
    });
  }

  static ND_NOINLINE void input_grad(const NormArgs& args, Samples samples, int64_t c0, int64_t width,
                                     const Coefficients<T>& table) {
    for_registers(width, [&]<int K, bool kWhole>(int64_t w, int64_t count) ND_INLINED {
      V<T> p[K], a[K], b[K], slope[K];
      take_table<K, kWhole>(p, table.mean + w, count);
      take_table<K, kWhole>(b, table.shift + w, count);
      take_table<K, kWhole>(slope, table.slope + w, count);
      const In *x = static_cast<const In*>(args.x), *grad = static_cast<const In*>(args.grad);
      const In* y = static_cast<const In*>(args.result);
      In *dx = static_cast<In*>(args.out), *dr = static_cast<In*>(args.out_residual);
      if (!grad) {
        for_rows<K>(args, samples, c0 + w, [&](int64_t at, int u) ND_INLINED {
          put<kWhole>(dx + at, slope[u] * (take<kWhole>(x + at, count) - p[u]) + b[u], count);
        });
        return;
      }
      take_table<K, kWhole>(a, table.scale + w, count);
      with_flags(y != nullptr, dr != nullptr, [&]<bool kMask, bool kResidual>() ND_INLINED {
        for_rows<K>(args, samples, c0 + w, [&](int64_t at, int u) ND_INLINED {
          V<T> d = take<kWhole>(grad + at, count);
          if constexpr (kMask) d = take<kWhole>(y + at, count) > T(0) ? d : V<T>{};
          if constexpr (kResidual) put<kWhole>(dr + at, d, count);
          put<kWhole>(dx + at, a[u] * d + (slope[u] * (take<kWhole>(x + at, count) - p[u]) + b[u]), count);
        });
      });
    });
  }
};

// ------------------------------------------------------------------------------------------------ by sample

template <class Values>
ND_INLINE int64_t number_of_blocks(const NormArgs& args) {
  return (args.C + Values::kWidth - 1) / Values::kWidth;
}

// f(sample, first channel, channels, place in a table) for each task.
template <class Values, class F>
ND_INLINE void for_tasks(const NormArgs& args, int64_t begin, int64_t end, const F& f) {
  const int64_t blocks = number_of_blocks<Values>(args);
  for (int64_t t = begin; t < end; t++) {
    const int64_t n = t / blocks, c = t % blocks * Values::kWidth;
    f(Samples{&n, 1}, c, smaller(Values::kWidth, args.C - c), n * args.C + c);
  }
}

template <class T>
ND_INLINE const T* table(const void* values, int64_t place) {
  return values ? static_cast<const T*>(values) + place : nullptr;
}

template <class Values>
void moments(const NormArgs& args, int64_t begin, int64_t end) {
  using T = typename Values::T;
  for_tasks<Values>(args, begin, end, [&](Samples sample, int64_t c, int64_t width, int64_t place) ND_INLINED {
    double mean[Values::kWidth], deviation[Values::kWidth];
    Values::moments(args, sample, c, width, mean, deviation);
    const double over = 1 / static_cast<double>(args.S);
    for (int64_t i = 0; i < width; i++) {
      static_cast<T*>(args.sum)[place + i] = static_cast<T>(mean[i]);
      static_cast<T*>(args.centred_sum)[place + i] = static_cast<T>(deviation[i] < 0 ? 0 : deviation[i] * over);
    }
  });
}

template <class Values>
void sums(const NormArgs& args, int64_t begin, int64_t end) {
  using T = typename Values::T;
  for_tasks<Values>(args, begin, end, [&](Samples sample, int64_t c, int64_t width, int64_t place) ND_INLINED {
    double first[Values::kWidth], second[Values::kWidth];
    Values::gradient_sums(args, sample, c, width, table<T>(args.mean, place), first, second);
    for (int64_t i = 0; i < width; i++) {
      static_cast<T*>(args.sum)[place + i] = static_cast<T>(first[i]);
      static_cast<T*>(args.centred_sum)[place + i] = static_cast<T>(second[i]);
    }
  });
}

template <class T>
ND_INLINE Coefficients<T> coefficients(const NormArgs& args, int64_t place) {
  return {table<T>(args.mean, place), table<T>(args.scale, place), table<T>(args.shift, place),
          table<T>(args.slope, place)};
}

template <class Values>
void affine(const NormArgs& args, int64_t begin, int64_t end) {
  for_tasks<Values>(args, begin, end, [&](Samples sample, int64_t c, int64_t width, int64_t place) ND_INLINED {
    Values::affine(args, sample, c, width, coefficients<typename Values::T>(args, place));
  });
}

template <class Values>
void input_grad(const NormArgs& args, int64_t begin, int64_t end) {
  for_tasks<Values>(args, begin, end, [&](Samples sample, int64_t c, int64_t width, int64_t place) ND_INLINED {
    Values::input_grad(args, sample, c, width, coefficients<typename Values::T>(args, place));
  });
}

// ------------------------------------------------------------------------------------------------ by domain

// Coefficients that are being computed.
template <class T>
struct Table {
  T *mean, *scale, *shift, *slope;
};
template <class T>
ND_INLINE Coefficients<T> coefficients(const Table<T>& table) {
  return {table.mean, table.scale, table.shift, table.slope};
}

// One block of channels.
template <class Values>
struct Domains {
  using T = typename Values::T;
  static constexpr int kWidth = Values::kWidth;

  const DomainNormArgs& args;
  int64_t c, width;

  ND_INLINE int64_t place(int64_t row) const { return row * args.values.C + c; }
  ND_INLINE Samples samples(int64_t group) const {
    const int64_t first = args.first[group];
    return {args.order + first, args.first[group + 1] - first};
  }

  // mean = sum_n g_n / N_k,   variance = sum_n (q_n + (g_n - mean)^2) / N_k over the samples n of the group
  void merge_moments(int64_t group) const {
    const Samples own = samples(group);
    double mean[kWidth] = {}, variance[kWidth] = {};
    const double over = own.count > 0 ? 1 / static_cast<double>(own.count) : 0;
    const double over_positions = 1 / static_cast<double>(args.values.S);
    for (int64_t i = 0; i < own.count; i++) {
      const double* g = args.partial + place(own.index[i]);
      for (int64_t l = 0; l < width; l++) mean[l] += g[l];
    }
    for (int64_t l = 0; l < width; l++) mean[l] *= over;
    for (int64_t i = 0; i < own.count; i++) {
      const double *g = args.partial + place(own.index[i]), *deviation = args.centred_partial + place(own.index[i]);
      for (int64_t l = 0; l < width; l++)
        variance[l] += deviation[l] * over_positions + (g[l] - mean[l]) * (g[l] - mean[l]);
    }
    for (int64_t l = 0; l < width; l++) variance[l] *= over;
    keep_moments(group, mean, variance);
  }

  void group_moments(int64_t group) const {
    const Samples own = samples(group);
    double mean[kWidth] = {}, variance[kWidth] = {};
    if (own.count > 0) Values::moments(args.values, own, c, width, mean, variance);
    const double over = 1 / static_cast<double>(larger(1, own.count * args.values.S));
    for (int64_t l = 0; l < width; l++) variance[l] *= over;
    keep_moments(group, mean, variance);
  }

  ND_INLINE void keep_moments(int64_t group, const double* mean, const double* variance) const {
    for (int64_t l = 0; l < width; l++) {
      args.mean[place(group) + l] = mean[l];
      args.variance[place(group) + l] = variance[l] < 0 ? 0 : variance[l];
    }
  }

  // p, the mean in the precision of x
  ND_INLINE void take_centre(int64_t group, T* p) const {
    const double* mean = args.mean + place(group);
    for (int64_t l = 0; l < width; l++) p[l] = static_cast<T>(mean[l]);
    for (int64_t l = width; l < kWidth; l++) p[l] = 0;
  }
  ND_INLINE void take_rstd(int64_t group, T* rstd) const {
    const double* variance = args.variance + place(group);
    for (int64_t l = 0; l < width; l++) rstd[l] = static_cast<T>(variance[l] + args.eps);
    for (int64_t l = width; l < kWidth; l++) rstd[l] = 1;
    for (int l = 0; l < kWidth; l += Vec<T>::W) store(rstd + l, T(1) / square_root<T>(load(rstd + l)));
  }
  ND_INLINE const T* parameter(const void* values, int64_t group) const {
    return table<T>(values, args.shared_affine ? c : place(group));
  }

  ND_INLINE Table<T> table_of(int64_t group) const {
    const auto at = [&](void* values) { return static_cast<T*>(values) + place(group); };
    return {at(args.centre), at(args.scale), at(args.shift), at(args.slope)};
  }

  // y = scale (x - p) + shift
  void prepare(int64_t group, Table<T> to) const {
    T p[kWidth], rstd[kWidth];
    take_centre(group, p);
    take_rstd(group, rstd);
    const T *weight = parameter(args.weight, group), *bias = parameter(args.bias, group);
    const double* mean = args.mean + place(group);
    for (int64_t l = 0; l < width; l++) {
      const T scale = weight ? rstd[l] * weight[l] : rstd[l];
      const T offset = scale * static_cast<T>(mean[l] - static_cast<double>(p[l]));
      to.mean[l] = p[l];
      to.scale[l] = scale;
      to.shift[l] = bias ? bias[l] - offset : -offset;
    }
  }

  // first and second [width]
  void reduce_gradients(int64_t group, Samples own, double* first, double* second) const {
    T p[kWidth];
    take_centre(group, p);
    double sums[kWidth], centred[kWidth];
    Values::gradient_sums(args.values, own, c, width, p, sums, centred);
    for (int64_t l = 0; l < width; l++) {
      first[l] = sums[l];
      second[l] = centred[l];
    }
  }

  void merge_gradients(int64_t group, Table<T> to) const {
    const Samples own = samples(group);
    double first[kWidth] = {}, second[kWidth] = {};
    for (int64_t i = 0; i < own.count; i++) {
      const double *s1 = args.partial + place(own.index[i]), *s2 = args.centred_partial + place(own.index[i]);
      for (int64_t l = 0; l < width; l++) first[l] += s1[l];
      for (int64_t l = 0; l < width; l++) second[l] += s2[l];
    }
    keep_gradients(group, first, second, to);
  }

  void group_gradients(int64_t group, Table<T> to) const {
    const Samples own = samples(group);
    double first[kWidth] = {}, second[kWidth] = {};
    if (own.count > 0) reduce_gradients(group, own, first, second);
    keep_gradients(group, first, second, to);
  }

  // With S1, S2 = sum dy' (x - p) - (mean - p) S1: gradients of bias and weight, and
  //   dx = weight rstd (dy' - S1 / M - (x - mean) rstd^2 S2 / M) = scale dy' + shift + slope (x - p),
  // without the terms in S1 and S2 where mean and variance do not depend on x; exactly 0 for a single value.
  ND_INLINE void keep_gradients(int64_t group, const double* first, const double* second, Table<T> to) const {
    T p[kWidth], rstd[kWidth];
    take_centre(group, p);
    take_rstd(group, rstd);
    const T* weight = parameter(args.weight, group);
    const double* mean = args.mean + place(group);
    double *bias_grad = args.bias_grad + place(group), *weight_grad = args.weight_grad + place(group);
    const int64_t number = samples(group).count * args.values.S;
    const double over = args.batch_statistics ? 1 / static_cast<double>(larger(1, number)) : 0;
    const double moves = args.batch_statistics && number == 1 ? 0 : 1;
    for (int64_t l = 0; l < width; l++) {
      const double shift = mean[l] - static_cast<double>(p[l]), centred = second[l] - shift * first[l];
      const double r = static_cast<double>(rstd[l]);
      const double scale = moves * (weight ? r * static_cast<double>(weight[l]) : r);
      const double slope = -scale * r * r * centred * over;
      bias_grad[l] = first[l];
      weight_grad[l] = centred * r;
      to.mean[l] = p[l];
      to.scale[l] = static_cast<T>(scale);
      to.slope[l] = static_cast<T>(slope);
      to.shift[l] = static_cast<T>(-scale * first[l] * over - slope * shift);
    }
  }
};

// step(domains of the block, group or sample) for each task.
template <class Values, class Step>
ND_INLINE void for_blocks(const DomainNormArgs& args, int64_t begin, int64_t end, const Step& step) {
  const int64_t blocks = number_of_blocks<Values>(args.values);
  for (int64_t t = begin; t < end; t++) {
    const int64_t c = t % blocks * Values::kWidth;
    step(Domains<Values>{args, c, smaller(Values::kWidth, args.values.C - c)}, t / blocks);
  }
}

template <class Values>
void forward(const DomainNormArgs& args, NormStage stage, int64_t begin, int64_t end) {
  using Block = const Domains<Values>&;
  using T = typename Values::T;
  switch (stage) {
    case NormStage::kAll:
      return for_blocks<Values>(args, begin, end, [&](Block block, int64_t group) {
        T memory[4][Values::kWidth];
        const Table<T> table{memory[0], memory[1], memory[2], memory[3]};
        block.group_moments(group);
        block.prepare(group, table);
        Values::affine(args.values, block.samples(group), block.c, block.width, coefficients(table));
      });
    case NormStage::kReduce:
      return for_blocks<Values>(args, begin, end, [&](Block block, int64_t n) {
        const int64_t place = block.place(n);
        Values::moments(args.values, {&n, 1}, block.c, block.width, args.partial + place, args.centred_partial + place);
      });
    case NormStage::kMerge:
      return for_blocks<Values>(args, begin, end, [](Block block, int64_t group) {
        block.merge_moments(group);
        block.prepare(group, block.table_of(group));
      });
    case NormStage::kPrepare:
      return for_blocks<Values>(args, begin, end,
                                [](Block block, int64_t group) { block.prepare(group, block.table_of(group)); });
    case NormStage::kApply:
      return for_blocks<Values>(args, begin, end, [&](Block block, int64_t n) {
        Values::affine(args.values, {&n, 1}, block.c, block.width, coefficients(block.table_of(args.group[n])));
      });
  }
}

template <class Values>
void backward(const DomainNormArgs& args, NormStage stage, int64_t begin, int64_t end) {
  using Block = const Domains<Values>&;
  using T = typename Values::T;
  switch (stage) {
    case NormStage::kAll:
      return for_blocks<Values>(args, begin, end, [&](Block block, int64_t group) {
        T memory[4][Values::kWidth];
        const Table<T> table{memory[0], memory[1], memory[2], memory[3]};
        block.group_gradients(group, table);
        Values::input_grad(args.values, block.samples(group), block.c, block.width, coefficients(table));
      });
    case NormStage::kReduce:
      return for_blocks<Values>(args, begin, end, [&](Block block, int64_t n) {
        const int64_t place = block.place(n);
        block.reduce_gradients(args.group[n], {&n, 1}, args.partial + place, args.centred_partial + place);
      });
    case NormStage::kMerge:
      return for_blocks<Values>(
          args, begin, end, [](Block block, int64_t group) { block.merge_gradients(group, block.table_of(group)); });
    case NormStage::kPrepare:
      return;  // of the forward only
    case NormStage::kApply:
      return for_blocks<Values>(args, begin, end, [&](Block block, int64_t n) {
        Values::input_grad(args.values, {&n, 1}, block.c, block.width, coefficients(block.table_of(args.group[n])));
      });
  }
}

// f<Values>() for the layout and dtype of args.
template <class F>
ND_INLINE auto by_layout(const NormArgs& args, const F& f) {
  const auto with = [&]<class In>() {
    return args.channels_last ? f.template operator()<DownPositions<In>>()
                              : f.template operator()<AlongPositions<In>>();
  };
  switch (args.dtype) {
    case Dtype::kFloat32:
      return with.template operator()<float>();
    case Dtype::kFloat64:
      return with.template operator()<double>();
    case Dtype::kBfloat16:
      return with.template operator()<Bfloat16>();
    default:
      return with.template operator()<Float16>();
  }
}

}  // namespace

int64_t norm_blocks(const NormArgs& args) {
  return by_layout(args, [&]<class Values>() { return number_of_blocks<Values>(args); });
}
void norm_moments(const NormArgs& args, int64_t begin, int64_t end) {
  by_layout(args, [&]<class Values>() { moments<Values>(args, begin, end); });
}
void norm_affine(const NormArgs& args, int64_t begin, int64_t end) {
  by_layout(args, [&]<class Values>() { affine<Values>(args, begin, end); });
}
void norm_sums(const NormArgs& args, int64_t begin, int64_t end) {
  by_layout(args, [&]<class Values>() { sums<Values>(args, begin, end); });
}
void norm_input_grad(const NormArgs& args, int64_t begin, int64_t end) {
  by_layout(args, [&]<class Values>() { input_grad<Values>(args, begin, end); });
}
void domain_norm_forward(const DomainNormArgs& args, NormStage stage, int64_t begin, int64_t end) {
  by_layout(args.values, [&]<class Values>() { forward<Values>(args, stage, begin, end); });
}
void domain_norm_backward(const DomainNormArgs& args, NormStage stage, int64_t begin, int64_t end) {
  by_layout(args.values, [&]<class Values>() { backward<Values>(args, stage, begin, end); });
}

}  // namespace nd::cpu::ND_CPU_LEVEL
