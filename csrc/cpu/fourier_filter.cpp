// Fourier filter of images x [B, H, W, C] or [B, C, H, W], per channel, Wf = W / 2 + 1:
//
//     y = irfft2(rfft2(x) K),    dx = irfft2(rfft2(g) conj K),    dK[u, v] = c_v / (H W) sum_b conj(X) G
//
// with c_v = 1 in the columns v = 0 and v = W / 2, else 2, and K in those two columns replaced by its Hermitian part
// (K[u] + conj K[-u]) / 2.
//
// Method, for one image and kLanes channels at a time: two rows of the image are one complex row; their transforms
// leave the spectrum of the even row plus i times that of the odd one, taken apart while columns are read. Columns 0
// and W / 2 are spectra of real sequences: they are one complex column. Column u of the half spectrum is transformed,
// multiplied by K and transformed back without leaving registers and the first cache, then rows are put together the
// same way. Nothing crosses images: y of an image does not depend on its batch, nor a NaN leave its plane.
//
// Floor: x read once, y written once (and g, in the gradient), K once; about 5 log2(H W) + 8 operations a pixel.
//
// Layout: lane = channel. z [W + 2 columns][stride] complex vectors holds row pairs p < ceil(H / 2) of a column next to
// each other, stride odd so that columns spread over the cache; column W is zero, column W + 1 takes what nobody wants.
// Lengths of `Fixed` are unrolled (two stages, see fft_codelets.hpp), all others run mixed radix over tables, primes
// above 7 directly. Float32 in the lanes for float32, bfloat16 and float16 images, else float64.
//
// Tasks: images of a block of channels (forward), or kept splits of the batch (gradient of K, whose partial sums are
// added in order). The cut depends on shapes alone: the same bits for any number of threads.
//
// Block-diagonal filters need all channels at once: here the half spectra of some images are written to memory and read
// back, and fourier_filter_blocks.cpp multiplies them in between.
#include <cstring>
#include <type_traits>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/fft_codelets.hpp"
#include "neuraldeps/simd_convert.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

using fft::Complex;

constexpr int64_t kSmallImage = 1 << 15;    // bytes
constexpr int64_t kRowsAhead = 3;           // row pairs between a prefetch and its use
constexpr int64_t kSplitImages = 4;         // a split of the batch has at least this many images
constexpr int64_t kMostSplits = 64;         // and there are at most this many,
constexpr int64_t kWantedTasks = 32;        // or as many as make this many tasks
constexpr int64_t kPage = 4096;             // bytes
constexpr int64_t kSpreadBytes = 5 * 64;    // of images beyond whole pages, an odd number of cache lines
constexpr int64_t kSpectraBytes = 4 << 20;  // of the images of blocks that are filtered together, at least, but
constexpr int64_t kFewestImages = 4;        // not fewer than these

template <class T>
struct VectorOf {
  typedef T t __attribute__((vector_size(ND_VECTOR_BYTES)));
};
template <class T>
using V = typename VectorOf<T>::t;
template <class T>
using C = Complex<V<T>>;
template <class T>
constexpr int kLanes = Vec<T>::W;

// ------------------------------------------------------------------------------------------------ transforms
//
// A line transforms N complex vectors:
//   forward(load, store)        load(n, odd) gives v_n, odd = n & 1; store(j, k, v) takes the value of frequency k
//   inverse(load, store)        load(j, k); store(n, odd, v)
//   filter(load, change, store) both, with change(j, v) in between, v by reference
// j counts frequencies in the order in which the line meets them, frequency(j) = k.

template <int N>
struct Order {
  uint16_t input[N], output[N];  // of n2 A + n1 and of k1 B + k2
  constexpr Order() : input(), output() {
    using S = fft::Split<N>;
    for (int b = 0; b < S::B; b++) {
      for (int a = 0; a < S::A; a++) {
        input[b * S::A + a] = static_cast<uint16_t>(S::input(a, b));
        output[a * S::B + b] = static_cast<uint16_t>(S::output(a, b));
      }
    }
  }
};
template <int N>
constexpr Order<N> kOrder;

template <class T, int N>
struct Turns {
  T cos[N], sin[N];  // of n2 A + k1
  constexpr Turns() : cos(), sin() {
    using S = fft::Split<N>;
    for (int n2 = 0; n2 < S::B; n2++) {
      for (int k1 = 0; k1 < S::A; k1++) {
        cos[n2 * S::A + k1] = static_cast<T>(fft::cos_of_turn(S::turn(n2, k1), N));
        sin[n2 * S::A + k1] = static_cast<T>(fft::sin_of_turn(S::turn(n2, k1), N));
      }
    }
  }
};
template <class T, int N>
constexpr Turns<T, N> kTurns;

// How a row pair of width W takes frequency k from the columns of its even and its odd row: own.re - sign other.im +
// i (sign own.im + other.re). Column W is zero.
struct Join {
  int64_t own, other, sign;
};
constexpr Join join_of(int64_t k, int64_t W) {
  if (k == 0 || 2 * k == W) return {k, W, 1};
  return 2 * k < W ? Join{k, W - k, 1} : Join{W - k, k, -1};
}

template <class T, int N>
struct Joins {
  uint16_t own[N], other[N];  // of k1 B + k2
  T sign[N];
  constexpr Joins() : own(), other(), sign() {
    for (int j = 0; j < N; j++) {
      const Join join = join_of(kOrder<N>.output[j], N);
      own[j] = static_cast<uint16_t>(join.own);
      other[j] = static_cast<uint16_t>(join.other);
      sign[j] = static_cast<T>(join.sign);
    }
  }
};
template <class T, int N>
constexpr Joins<T, N> kJoins;

template <class T, int N>
struct Fixed {
  using S = fft::Split<N>;
  static constexpr int A = S::A, B = S::B;
  // n is odd where n2 is, or else where n1 is.
  static constexpr int kStep = B % 2 == 0 ? 2 : 1;

  static int64_t frequency(int64_t j) { return kOrder<N>.output[j]; }
  static ND_INLINE const C<T>* own(const C<T>* z, int64_t stride, int64_t j) {
    return z + kJoins<T, N>.own[j] * stride;
  }
  static ND_INLINE const C<T>* other(const C<T>* z, int64_t stride, int64_t j) {
    return z + kJoins<T, N>.other[j] * stride;
  }
  static ND_INLINE T sign(int64_t j) { return kJoins<T, N>.sign[j]; }

  template <class Load>
  static ND_INLINE void first(const Load& load, C<T>* t) {
#pragma GCC unroll 1
    for (int begin = 0; begin < B; begin += kStep) {
#pragma GCC unroll 2
      for (int e = 0; e < kStep; e++) {
        const int n2 = begin + e;
        C<T> v[A];
#pragma GCC unroll 8
        for (int n1 = 0; n1 < A; n1++)
          v[n1] = load(kOrder<N>.input[n2 * A + n1], static_cast<bool>((kStep == 2 ? e : n1) & 1));
        fft::Dft<A, false>::run(v);
        t[n2] = v[0];
#pragma GCC unroll 8
        for (int k1 = 1; k1 < A; k1++) t[k1 * B + n2] = turn<false>(v[k1], n2 * A + k1);
      }
    }
  }

  template <class Store>
  static ND_INLINE void last(const C<T>* t, const Store& store) {
#pragma GCC unroll 1
    for (int begin = 0; begin < B; begin += kStep) {
#pragma GCC unroll 2
      for (int e = 0; e < kStep; e++) {
        const int n2 = begin + e;
        C<T> v[A];
        v[0] = t[n2];
#pragma GCC unroll 8
        for (int k1 = 1; k1 < A; k1++) v[k1] = turn<true>(t[k1 * B + n2], n2 * A + k1);
        fft::Dft<A, true>::run(v);
#pragma GCC unroll 8
        for (int n1 = 0; n1 < A; n1++)
          store(kOrder<N>.input[n2 * A + n1], static_cast<bool>((kStep == 2 ? e : n1) & 1), v[n1]);
      }
    }
  }

  template <bool kInverse>
  static ND_INLINE C<T> turn(C<T> v, int index) {
    if constexpr (S::kTwiddles) return fft::turned<kInverse>(v, kTurns<T, N>.cos[index], kTurns<T, N>.sin[index]);
    return v;
  }

  template <class Load, class Store>
  ND_INLINE void forward(const Load& load, const Store& store) const {
    C<T> t[N];
    if constexpr (A > 1) first(load, t);
#pragma GCC unroll 1
    for (int j = 0; j < N; j += B) {
      C<T> v[B];
#pragma GCC unroll 8
      for (int n2 = 0; n2 < B; n2++) v[n2] = A > 1 ? t[j + n2] : load(n2, static_cast<bool>(n2 & 1));
      fft::Dft<B, false>::run(v);
#pragma GCC unroll 8
      for (int k2 = 0; k2 < B; k2++) store(j + k2, A > 1 ? kOrder<N>.output[j + k2] : k2, v[k2]);
    }
  }

  template <class Load, class Store>
  ND_INLINE void inverse(const Load& load, const Store& store) const {
    C<T> t[N];
#pragma GCC unroll 1
    for (int j = 0; j < N; j += B) {
      C<T> v[B];
#pragma GCC unroll 8
      for (int k2 = 0; k2 < B; k2++) v[k2] = load(j + k2, A > 1 ? kOrder<N>.output[j + k2] : k2);
      fft::Dft<B, true>::run(v);
      keep(v, t + j, store);
    }
    if constexpr (A > 1) last(t, store);
  }

  template <class Load, class Change, class Store>
  ND_INLINE void filter(const Load& load, const Change& change, const Store& store) const {
    C<T> t[N];
    if constexpr (A > 1) first(load, t);
#pragma GCC unroll 1
    for (int j = 0; j < N; j += B) {
      C<T> v[B];
#pragma GCC unroll 8
      for (int n2 = 0; n2 < B; n2++) v[n2] = A > 1 ? t[j + n2] : load(n2, static_cast<bool>(n2 & 1));
      fft::Dft<B, false>::run(v);
#pragma GCC unroll 8
      for (int k2 = 0; k2 < B; k2++) change(j + k2, v[k2]);
      fft::Dft<B, true>::run(v);
      keep(v, t + j, store);
    }
    if constexpr (A > 1) last(t, store);
  }

 private:
  // The results of the second stage: kept in t, or final if there is no first one.
  template <class Store>
  static ND_INLINE void keep(const C<T>* v, C<T>* t, const Store& store) {
#pragma GCC unroll 8
    for (int n2 = 0; n2 < B; n2++) {
      if constexpr (A == 1) {
        store(n2, static_cast<bool>(n2 & 1), v[n2]);
      } else {
        t[n2] = v[n2];
      }
    }
  }
};

// Factors of any length: 8, 4 and 2 first, then odd primes.
struct Factors {
  int64_t factor[40];
  explicit Factors(int64_t n) : factor() {
    int count = 0;
    for (const int64_t f : {8, 4, 2, 3, 5, 7}) {
      for (; n % f == 0; n /= f) factor[count++] = f;
    }
    for (int64_t f = 11; n > 1; f += 2) {
      if (f * f > n) f = n;
      for (; n % f == 0; n /= f) factor[count++] = f;
    }
  }
  int64_t largest_prime() const {
    int64_t largest = 1;
    for (const int64_t f : factor) largest = larger(largest, f);
    return largest;
  }
};

template <class T>
struct Any {
  int64_t N;
  const T *cos, *sin;  // [N] of 2 pi m / N
  Factors factors;
  C<T>*a, *b;  // [N + largest prime] work space

  static int64_t frequency(int64_t j) { return j; }
  ND_INLINE const C<T>* own(const C<T>* z, int64_t stride, int64_t j) const { return z + join_of(j, N).own * stride; }
  ND_INLINE const C<T>* other(const C<T>* z, int64_t stride, int64_t j) const {
    return z + join_of(j, N).other * stride;
  }
  ND_INLINE T sign(int64_t j) const { return static_cast<T>(join_of(j, N).sign); }

  template <class Load, class Store>
  ND_INLINE void forward(const Load& load, const Store& store) const {
    for (int64_t n = 0; n < N; n++) a[n] = load(n, static_cast<bool>(n & 1));
    transform<false>(a, b);
    for (int64_t k = 0; k < N; k++) store(k, k, b[k]);
  }

  template <class Load, class Store>
  ND_INLINE void inverse(const Load& load, const Store& store) const {
    for (int64_t k = 0; k < N; k++) a[k] = load(k, k);
    transform<true>(a, b);
    for (int64_t n = 0; n < N; n++) store(n, static_cast<bool>(n & 1), b[n]);
  }

  template <class Load, class Change, class Store>
  ND_INLINE void filter(const Load& load, const Change& change, const Store& store) const {
    for (int64_t n = 0; n < N; n++) a[n] = load(n, static_cast<bool>(n & 1));
    transform<false>(a, b);
    for (int64_t k = 0; k < N; k++) change(k, b[k]);
    transform<true>(b, a);
    for (int64_t n = 0; n < N; n++) store(n, static_cast<bool>(n & 1), a[n]);
  }

  template <bool kInverse>
  __attribute__((noinline)) void transform(const C<T>* in, C<T>* out) const {
    part<kInverse>(in, 1, out, N, factors.factor);
  }

  // out [n] = transform of in[0], in[stride], ..: n / r transforms of every r-th value, then combined by r at a time.
  template <bool kInverse>
  void part(const C<T>* in, int64_t stride, C<T>* out, int64_t n, const int64_t* factor) const {
    const int64_t r = n == 1 ? 1 : *factor, m = n / r;
    const bool leaf = m == 1;
    if (!leaf) {
      for (int64_t j = 0; j < r; j++) part<kInverse>(in + j * stride, stride * r, out + j * m, m, factor + 1);
    }
    const C<T>* from = leaf ? in : out;
    const int64_t from_stride = leaf ? stride : m;
    switch (r) {
      case 1:
        out[0] = in[0];
        break;
      case 2:
        combine<2, kInverse>(from, from_stride, out, m);
        break;
      case 3:
        combine<3, kInverse>(from, from_stride, out, m);
        break;
      case 4:
        combine<4, kInverse>(from, from_stride, out, m);
        break;
      case 5:
        combine<5, kInverse>(from, from_stride, out, m);
        break;
      case 7:
        combine<7, kInverse>(from, from_stride, out, m);
        break;
      case 8:
        combine<8, kInverse>(from, from_stride, out, m);
        break;
      default:
        combine_prime<kInverse>(from, from_stride, out, m, r);
    }
  }

  template <int R, bool kInverse>
  void combine(const C<T>* from, int64_t stride, C<T>* out, int64_t m) const {
    const int64_t step = N / (m * R);
    for (int64_t k = 0; k < m; k++) {
      C<T> v[R];
#pragma GCC unroll 8
      for (int j = 0; j < R; j++) v[j] = from[j * stride + k];
      if (k > 0) {
#pragma GCC unroll 8
        for (int j = 1; j < R; j++) v[j] = fft::turned<kInverse>(v[j], cos[j * k * step], sin[j * k * step]);
      }
      fft::Dft<R, kInverse>::run(v);
#pragma GCC unroll 8
      for (int j = 0; j < R; j++) out[j * m + k] = v[j];
    }
  }

  // Odd r by sums and differences, as fft::OddDft.
  template <bool kInverse>
  void combine_prime(const C<T>* from, int64_t stride, C<T>* out, int64_t m, int64_t r) const {
    C<T>* const v = (out >= a && out < a + N ? a : b) + N;  // [r] behind the result: sums, then differences
    const int64_t step = N / (m * r), half = (r - 1) / 2, root = N / r;
    for (int64_t k = 0; k < m; k++) {
      const C<T> v0 = from[k];
      C<T> sum = v0;
      for (int64_t j = 1; j <= half; j++) {
        const int64_t other = r - j;
        const C<T> x = fft::turned<kInverse>(from[j * stride + k], cos[j * k * step], sin[j * k * step]);
        const C<T> y = fft::turned<kInverse>(from[other * stride + k], cos[other * k * step], sin[other * k * step]);
        v[j - 1] = x + y;
        v[half + j - 1] = x - y;
        sum = sum + v[j - 1];
      }
      out[k] = sum;
      for (int64_t i = 1; i <= half; i++) {
        C<T> p = v0, q = {};
        for (int64_t j = 0, turn = i; j < half; j++) {
          const T c = cos[turn * root], s = sin[turn * root];
          p = {p.re + v[j].re * c, p.im + v[j].im * c};
          q = {q.re + v[half + j].re * s, q.im + v[half + j].im * s};
          turn += i;
          turn -= turn >= r ? r : 0;
        }
        const C<T> iq = fft::times_i(q);
        out[i * m + k] = kInverse ? p + iq : p - iq;
        out[(r - i) * m + k] = kInverse ? p - iq : p + iq;
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------ pairs of numbers

template <class T>
struct IntOf {
  typedef int32_t t __attribute__((vector_size(ND_VECTOR_BYTES)));
};
template <>
struct IntOf<double> {
  typedef int64_t t __attribute__((vector_size(ND_VECTOR_BYTES)));
};

// a0 b0 a1 b1 .. of the lower and the upper half of the lanes.
template <class T, bool kUpper>
ND_INLINE V<T> interleaved(V<T> a, V<T> b) {
  typename IntOf<T>::t lanes;
  for (int l = 0; l < kLanes<T>; l++) lanes[l] = l / 2 + (kUpper ? kLanes<T> / 2 : 0) + (l % 2 ? kLanes<T> : 0);
  return __builtin_shuffle(a, b, lanes);
}

// Lanes 0, 2, .. or 1, 3, .. of a, then of b.
template <class T, bool kOdd>
ND_INLINE V<T> every_other(V<T> a, V<T> b) {
  typename IntOf<T>::t lanes;
  for (int l = 0; l < kLanes<T>; l++) lanes[l] = 2 * l + (kOdd ? 1 : 0);
  return __builtin_shuffle(a, b, lanes);
}

// Complex numbers of lanes channels from their [lanes, 2] numbers.
template <class T>
ND_INLINE C<T> load_pairs(const T* pairs, int64_t lanes) {
  constexpr int L = kLanes<T>;
  T both[2 * L] = {};
  if (lanes < L) {
    for (int64_t l = 0; l < 2 * lanes; l++) both[l] = pairs[l];
    pairs = both;
  }
  const V<T> low = load(pairs), high = load(pairs + L);
  return {every_other<T, false>(low, high), every_other<T, true>(low, high)};
}

template <class T>
ND_INLINE void store_pairs(T* pairs, C<T> value, int64_t lanes) {
  constexpr int L = kLanes<T>;
  T both[2 * L];
  T* const to = lanes < L ? both : pairs;
  store(to, interleaved<T, false>(value.re, value.im));
  store(to + L, interleaved<T, true>(value.re, value.im));
  for (int64_t l = 0; lanes < L && l < 2 * lanes; l++) pairs[l] = both[l];
}

// ------------------------------------------------------------------------------------------------ rows and columns

// z[k][p] of a row pair whose pixels are `step` apart.
template <class T, class Line>
void split_rows(const Line& line, const T* even, const T* odd, int64_t step, C<T>* z, int64_t stride) {
  line.forward([&](int64_t n, bool) { return C<T>{load(even + n * step), load(odd + n * step)}; },
               [&](int64_t, int64_t k, C<T> v) { z[k * stride] = v; });
}

// The row pair of z[.][p], whose column k < W / 2 holds even rows of frequency k and column W - k odd ones; columns 0
// and W / 2 hold pairs of real numbers.
template <class T, class Line>
void join_rows(const Line& line, const C<T>* z, int64_t stride, T* even, T* odd, int64_t step) {
  line.inverse(
      [&](int64_t j, int64_t) {
        const C<T> a = *line.own(z, stride, j), b = *line.other(z, stride, j);
        const T sign = line.sign(j);
        return C<T>{a.re - b.im * sign, a.im * sign + b.re};
      },
      [&](int64_t n, bool, C<T> v) {
        store(even + n * step, v.re);
        store(odd + n * step, v.im);
      });
}

// Twice X[h] of frequency k, from columns k and W - k of row pairs.
template <class T>
ND_INLINE C<T> apart(const C<T>* own, const C<T>* other, int64_t h, bool odd) {
  const C<T> a = own[h / 2], b = other[h / 2];
  return odd ? C<T>{a.im + b.im, b.re - a.re} : C<T>{a.re + b.re, a.im - b.im};
}

template <class T>
ND_INLINE void put_apart(C<T>* own, C<T>* other, int64_t h, bool odd, C<T> v) {
  C<T>* const column = odd ? other : own;
  column[h / 2] = v;
}

// X[h] of frequencies 0 and W / 2, both real, as one complex number.
template <class T>
ND_INLINE C<T> both_real(const C<T>* first, const C<T>* middle, int64_t h, bool odd) {
  const C<T> a = first[h / 2], b = middle[h / 2];
  return odd ? C<T>{a.im, b.im} : C<T>{a.re, b.re};
}

template <class T>
ND_INLINE void put_both_real(C<T>* first, C<T>* middle, int64_t h, bool odd, C<T> v) {
  C<T>&a = first[h / 2], &b = middle[h / 2];
  if (odd) {
    a.im = v.re;
    b.im = v.im;
  } else {
    a.re = v.re;
    b.re = v.im;
  }
}

// Twice the spectra A and B that t[u] = A[u] + i B[u] has at u, both of real sequences.
template <class T>
struct RealPair {
  C<T> A, B;
  ND_INLINE RealPair(const C<T>* t, int64_t u, int64_t minus_u) {
    const C<T> x = t[u], y = t[minus_u];
    A = {x.re + y.re, x.im - y.im};
    B = {x.im + y.im, y.re - x.re};
  }
  ND_INLINE RealPair(C<T> A, C<T> B) : A(A), B(B) {}
  ND_INLINE void put(C<T>* t, int64_t u, int64_t minus_u) const {
    t[minus_u] = {A.re + B.im, B.re - A.im};
    t[u] = {A.re - B.im, A.im + B.re};
  }
};

// Complex vectors of the filter of a block of channels: pairs K[u, 0], K[u, W/2] for u <= H / 2, then for each column
// between them H values in the order of the column line; all times 1 / (2 H W). Sums of conj(X) G have the same places.
ND_INLINE int64_t filter_size(int64_t H, int64_t W) { return 2 * (H / 2 + 1) + (W - 1) / 2 * H; }

// Numbers from one row of a spectrum, or one of its frequencies, to the next.
struct SpectrumStrides {
  int64_t row, mode;
};

// Multiplies the spectrum of the rows in z, which become those of y.
template <class T, class Line>
void filter_columns(const Line& line, int64_t H, int64_t W, C<T>* z, int64_t stride, C<T>* t, const C<T>* K) {
  C<T>* const first = z;
  C<T>* const middle = z + (W % 2 == 0 ? W / 2 : W) * stride;
  C<T>* const middle_out = W % 2 == 0 ? middle : middle + stride;
  line.forward([&](int64_t h, bool odd) { return both_real<T>(first, middle, h, odd); },
               [&](int64_t, int64_t k, C<T> v) { t[k] = v; });
  for (int64_t u = 0; 2 * u <= H; u++, K += 2) {
    const int64_t minus_u = u == 0 ? 0 : H - u;
    RealPair<T> pair(t, u, minus_u);
    pair.A = pair.A * K[0];
    pair.B = pair.B * K[1];
    pair.put(t, u, minus_u);
  }
  line.inverse([&](int64_t, int64_t k) { return t[k]; },
               [&](int64_t h, bool odd, C<T> v) { put_both_real<T>(first, middle_out, h, odd, v); });
  for (int64_t k = 1; 2 * k < W; k++, K += H) {
    C<T>* const own = z + k * stride;
    C<T>* const other = z + (W - k) * stride;
    line.filter([&](int64_t h, bool odd) { return apart<T>(own, other, h, odd); },
                [&](int64_t j, C<T>& v) { v = v * K[j]; },
                [&](int64_t h, bool odd, C<T> v) { put_apart<T>(own, other, h, odd, v); });
  }
}

// The same with conj(K) of g; adds conj(X) G to the sums.
template <class T, class Line>
void filter_columns_backward(const Line& line, int64_t H, int64_t W, const C<T>* x, C<T>* z, int64_t stride, C<T>* tx,
                             C<T>* t, const C<T>* K, C<T>* sums) {
  const int64_t middle_column = (W % 2 == 0 ? W / 2 : W) * stride;
  C<T>* const first = z;
  C<T>* const middle_out = z + middle_column + (W % 2 == 0 ? 0 : stride);
  line.forward([&](int64_t h, bool odd) { return both_real<T>(x, x + middle_column, h, odd); },
               [&](int64_t, int64_t k, C<T> v) { tx[k] = v; });
  line.forward([&](int64_t h, bool odd) { return both_real<T>(z, z + middle_column, h, odd); },
               [&](int64_t, int64_t k, C<T> v) { t[k] = v; });
  for (int64_t u = 0; 2 * u <= H; u++, K += 2, sums += 2) {
    const int64_t minus_u = u == 0 ? 0 : H - u;
    const RealPair<T> X(tx, u, minus_u);
    RealPair<T> G(t, u, minus_u);
    sums[0] = sums[0] + fft::conj(X.A) * G.A;
    sums[1] = sums[1] + fft::conj(X.B) * G.B;
    G.A = G.A * fft::conj(K[0]);
    G.B = G.B * fft::conj(K[1]);
    G.put(t, u, minus_u);
  }
  line.inverse([&](int64_t, int64_t k) { return t[k]; },
               [&](int64_t h, bool odd, C<T> v) { put_both_real<T>(first, middle_out, h, odd, v); });
  for (int64_t k = 1; 2 * k < W; k++, K += H, sums += H) {
    const C<T>* const own_x = x + k * stride;
    const C<T>* const other_x = x + (W - k) * stride;
    C<T>* const own = z + k * stride;
    C<T>* const other = z + (W - k) * stride;
    line.forward([&](int64_t h, bool odd) { return apart<T>(own_x, other_x, h, odd); },
                 [&](int64_t j, int64_t, C<T> v) { tx[j] = v; });
    line.filter([&](int64_t h, bool odd) { return apart<T>(own, other, h, odd); },
                [&](int64_t j, C<T>& v) {
                  sums[j] = sums[j] + fft::conj(tx[j]) * v;
                  v = v * fft::conj(K[j]);
                },
                [&](int64_t h, bool odd, C<T> v) { put_apart<T>(own, other, h, odd, v); });
  }
}

// X [H, Wf] of the rows in z, of rows and frequencies so many numbers apart: twice the spectrum, in columns 0 and W / 2
// for u <= H / 2 alone.
template <class T, class Line>
void columns_to_spectrum(const Line& line, int64_t H, int64_t W, const C<T>* z, int64_t stride, C<T>* t, T* X,
                         const SpectrumStrides& strides) {
  const auto put = [&](int64_t u, int64_t v, C<T> value) {
    store_pairs(X + u * strides.row + v * strides.mode, value, kLanes<T>);
  };
  const C<T>* const middle = z + (W % 2 == 0 ? W / 2 : W) * stride;
  line.forward([&](int64_t h, bool odd) { return both_real<T>(z, middle, h, odd); },
               [&](int64_t, int64_t k, C<T> v) { t[k] = v; });
  for (int64_t u = 0; 2 * u <= H; u++) {
    const RealPair<T> pair(t, u, u == 0 ? 0 : H - u);
    put(u, 0, pair.A);
    if (W % 2 == 0) put(u, W / 2, pair.B);
  }
  for (int64_t k = 1; 2 * k < W; k++) {
    const C<T>* const own = z + k * stride;
    const C<T>* const other = z + (W - k) * stride;
    line.forward([&](int64_t h, bool odd) { return apart<T>(own, other, h, odd); },
                 [&](int64_t, int64_t u, C<T> v) { put(u, k, v); });
  }
}

// The reverse.
template <class T, class Line>
void spectrum_to_columns(const Line& line, int64_t H, int64_t W, const T* X, const SpectrumStrides& strides, C<T>* t,
                         C<T>* z, int64_t stride) {
  const auto get = [&](int64_t u, int64_t v) { return load_pairs(X + u * strides.row + v * strides.mode, kLanes<T>); };
  for (int64_t u = 0; 2 * u <= H; u++)
    RealPair<T>(get(u, 0), W % 2 == 0 ? get(u, W / 2) : C<T>{}).put(t, u, u == 0 ? 0 : H - u);
  C<T>* const middle_out = z + (W % 2 == 0 ? W / 2 : W + 1) * stride;
  line.inverse([&](int64_t, int64_t k) { return t[k]; },
               [&](int64_t h, bool odd, C<T> v) { put_both_real<T>(z, middle_out, h, odd, v); });
  for (int64_t k = 1; 2 * k < W; k++) {
    C<T>* const own = z + k * stride;
    C<T>* const other = z + (W - k) * stride;
    line.inverse([&](int64_t, int64_t u) { return get(u, k); },
                 [&](int64_t h, bool odd, C<T> v) { put_apart<T>(own, other, h, odd, v); });
  }
}

// The lines of one axis as functions; `any` is used by lengths that are not fixed.
template <class T>
struct Axis {
  void (*split)(const Any<T>& any, const T* even, const T* odd, int64_t step, C<T>* z, int64_t stride);
  void (*join)(const Any<T>& any, const C<T>* z, int64_t stride, T* even, T* odd, int64_t step);
  void (*filter)(const Any<T>& any, int64_t W, C<T>* z, int64_t stride, C<T>* t, const C<T>* K);
  void (*filter_backward)(const Any<T>& any, int64_t W, const C<T>* x, C<T>* z, int64_t stride, C<T>* tx, C<T>* t,
                          const C<T>* K, C<T>* sums);
  void (*analyse)(const Any<T>& any, int64_t W, const C<T>* z, int64_t stride, C<T>* t, T* X,
                  const SpectrumStrides& strides);
  void (*synthesise)(const Any<T>& any, int64_t W, const T* X, const SpectrumStrides& strides, C<T>* t, C<T>* z,
                     int64_t stride);
  int64_t (*frequency)(int64_t j);
};

template <class T, class Line>
ND_INLINE Line line_of(const Any<T>& any) {
  if constexpr (std::is_same_v<Line, Any<T>>) {
    return any;
  } else {
    return Line();
  }
}

template <class T, class Line>
constexpr Axis<T> axis_of() {
  return {
      [](const Any<T>& any, const T* even, const T* odd, int64_t step, C<T>* z, int64_t stride) {
        split_rows<T>(line_of<T, Line>(any), even, odd, step, z, stride);
      },
      [](const Any<T>& any, const C<T>* z, int64_t stride, T* even, T* odd, int64_t step) {
        join_rows<T>(line_of<T, Line>(any), z, stride, even, odd, step);
      },
      [](const Any<T>& any, int64_t W, C<T>* z, int64_t stride, C<T>* t, const C<T>* K) {
        filter_columns<T>(line_of<T, Line>(any), any.N, W, z, stride, t, K);
      },
      [](const Any<T>& any, int64_t W, const C<T>* x, C<T>* z, int64_t stride, C<T>* tx, C<T>* t, const C<T>* K,
         C<T>* sums) { filter_columns_backward<T>(line_of<T, Line>(any), any.N, W, x, z, stride, tx, t, K, sums); },
      [](const Any<T>& any, int64_t W, const C<T>* z, int64_t stride, C<T>* t, T* X, const SpectrumStrides& strides) {
        columns_to_spectrum<T>(line_of<T, Line>(any), any.N, W, z, stride, t, X, strides);
      },
      [](const Any<T>& any, int64_t W, const T* X, const SpectrumStrides& strides, C<T>* t, C<T>* z, int64_t stride) {
        spectrum_to_columns<T>(line_of<T, Line>(any), any.N, W, X, strides, t, z, stride);
      },
      [](int64_t j) { return Line::frequency(j); },
  };
}

template <class T>
Axis<T> axis_of(int64_t N) {
  if constexpr (sizeof(T) == 4) {
    switch (N) {
      case 7:
        return axis_of<T, Fixed<T, 7>>();
      case 8:
        return axis_of<T, Fixed<T, 8>>();
      case 14:
        return axis_of<T, Fixed<T, 14>>();
      case 16:
        return axis_of<T, Fixed<T, 16>>();
      case 28:
        return axis_of<T, Fixed<T, 28>>();
      case 32:
        return axis_of<T, Fixed<T, 32>>();
      case 56:
        return axis_of<T, Fixed<T, 56>>();
      case 64:
        return axis_of<T, Fixed<T, 64>>();
    }
  }
  return axis_of<T, Any<T>>();
}

// ------------------------------------------------------------------------------------------------ pixels

template <class T, int kRows = kLanes<T>>
ND_INLINE void transpose(V<T>* rows) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes<T>; step *= 2) {
    V<T> next[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows / 2; i++) {
      next[2 * i] = interleaved<T, false>(rows[i], rows[i + kRows / 2]);
      next[2 * i + 1] = interleaved<T, true>(rows[i], rows[i + kRows / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) rows[i] = next[i];
  }
}

// Channels [channel, channel + lanes) of one image as elements of type E.
template <class E>
struct Channels {
  E* data;  // of the first channel
  int64_t lanes, H, W;
  ImageStrides strides;
};

// rows[i] = pixels i < count * W of rows h, .., h + count - 1, a vector of channels each. Planes: kLanes<T> vectors on
// either side of rows may be overwritten.
template <class T, class E>
void load_pixels(const Channels<const E>& from, int64_t h, int64_t count, T* rows) {
  constexpr int L = kLanes<T>;
  const int64_t W = from.W, plane = from.H * W;
  if (from.strides.channel == 1) {
    for (int64_t i = 0; i < count; i++) {
      const E* pixel = from.data + (h + i) * from.strides.row;
      for (int64_t w = 0; w < W; w++, pixel += from.strides.pixel, rows += L)
        store(rows, from.lanes == L ? load_as<T>(pixel) : load_part_as<T>(pixel, from.lanes));
    }
    return;
  }
  const int64_t begin = h * W;
  for (int64_t i = 0; i < count * W; i += L) {
    const int64_t start = smaller(begin + i, plane - L);  // a window that ends with the plane may start early
    V<T> block[L];
    for (int l = 0; l < L; l++) {
      const E* pixels = from.data + l * from.strides.channel;
      if (l >= from.lanes) {
        block[l] = V<T>{};
      } else {
        block[l] = start >= 0 ? load_as<T>(pixels + start) : load_part_as<T>(pixels + begin + i, plane - begin - i);
      }
    }
    transpose<T>(block);
    T* const to = rows + ((start >= 0 ? start : begin + i) - begin) * L;
    for (int r = 0; r < L; r++) store(to + r * L, block[r]);
  }
}

// The reverse; rows of an image must come in order. Planes: kLanes<T> vectors behind rows are read.
template <class T, class E>
void store_pixels(const T* rows, int64_t h, int64_t count, const Channels<E>& to) {
  constexpr int L = kLanes<T>;
  const int64_t W = to.W, plane = to.H * W;
  if (to.strides.channel == 1) {
    for (int64_t i = 0; i < count; i++) {
      E* pixel = to.data + (h + i) * to.strides.row;
      for (int64_t w = 0; w < W; w++, pixel += to.strides.pixel, rows += L) {
        if (to.lanes == L) {
          store_as(pixel, load(rows));
        } else {
          store_part_as(pixel, load(rows), to.lanes);
        }
      }
    }
    return;
  }
  for (int64_t i = 0, begin = h * W; i < count * W; i += L) {
    V<T> block[L];
    for (int r = 0; r < L; r++) block[r] = load(rows + (i + r) * L);
    transpose<T>(block);
    const int64_t rest = plane - begin - i;  // what is written beyond these rows belongs to later ones
    for (int l = 0; l < to.lanes; l++) {
      E* const pixels = to.data + l * to.strides.channel + begin + i;
      if (rest >= L) {
        store_as(pixels, block[l]);
      } else {
        store_part_as(pixels, block[l], rest);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ images

// Work space of a task.
template <class T>
struct Work {
  int64_t H, W, pairs, stride, blocks, size;
  bool small;  // images that fit the first cache
  Axis<T> rows, columns;
  Any<T> row_line, column_line;
  C<T>*z, *zx, *t, *tx;  // z, zx: [W + 2][stride]; t, tx: [H]
  T* pixels;             // [2 W] vectors, with kLanes more on either side
  int64_t bytes;

  Work(const FourierFilterArgs& args, void* memory)
      : H(args.height),
        W(args.width),
        pairs(ceil_div(H, 2)),
        stride(pairs | 1),
        blocks(ceil_div(args.channels, kLanes<T>)),
        size(filter_size(H, W)),
        small(H * W * ND_VECTOR_BYTES <= kSmallImage),
        rows(axis_of<T>(W)),
        columns(axis_of<T>(H)),
        row_line{W, nullptr, nullptr, Factors(W), nullptr, nullptr},
        column_line{H, nullptr, nullptr, Factors(H), nullptr, nullptr} {
    const T* const table = static_cast<const T*>(args.table);
    row_line.cos = table;
    row_line.sin = table + W;
    column_line.cos = table + 2 * W;
    column_line.sin = table + 2 * W + H;
    char* next = static_cast<char*>(memory);
    const auto take = [&](int64_t count) {
      C<T>* const taken = reinterpret_cast<C<T>*>(next);
      next += count * static_cast<int64_t>(sizeof(C<T>));
      return taken;
    };
    z = take((W + 2) * stride);
    zx = args.grad ? take((W + 2) * stride) : nullptr;
    t = take(H);
    tx = take(H);
    row_line.a = take(W + row_line.factors.largest_prime());
    row_line.b = take(W + row_line.factors.largest_prime());
    column_line.a = take(H + column_line.factors.largest_prime());
    column_line.b = take(H + column_line.factors.largest_prime());
    pixels = reinterpret_cast<T*>(take(W + kLanes<T>)) + kLanes<T> * kLanes<T>;
    bytes = next - static_cast<char*>(memory);
  }

  void clear() const {
    for (C<T>* column : {z, zx}) {
      if (column) std::memset(static_cast<void*>(column + W * stride), 0, static_cast<size_t>(stride) * sizeof(C<T>));
    }
  }
};

// A tensor of images; (b, block) is a block of channels of one of them, the last one beyond the end.
template <class T, class E>
struct Images {
  E* data;
  ImageStrides strides;
  const FourierFilterArgs& args;

  Channels<E> operator()(int64_t b, int64_t block) const {
    const int64_t channel = block * kLanes<T>, image = smaller(b, args.batch - 1);
    return {data + image * strides.batch + channel * strides.channel, smaller(kLanes<T>, args.channels - channel),
            args.height, args.width, strides};
  }
};

// Asks for a row pair that will be needed soon: lines of channels lie far apart, which no hardware foresees.
template <bool kWrite, class E>
ND_INLINE void prefetch(const Channels<E>& images, int64_t h) {
  if (images.strides.channel != 1) return;
  for (const int64_t end = smaller(h + 2, images.H); h < end; h++) {
    const char* pixel = reinterpret_cast<const char*>(images.data + h * images.strides.row);
    const int64_t step = images.strides.pixel * static_cast<int64_t>(sizeof(E));
    for (int64_t w = 0; w < images.W; w++, pixel += step) __builtin_prefetch(pixel, kWrite, 2);
  }
}

// `next`: the images that will be read after these; `result`, if not null: those that will be written. Small ones are
// asked for as a whole, large ones a few rows ahead.
template <class T, class E>
void rows_to_spectrum(const Work<T>& work, const Channels<const E>& from, const Channels<const E>& next,
                      const Channels<E>* result, C<T>* z) {
  for (int64_t p = 0; p < work.pairs; p++) {
    const int64_t h = 2 * p, count = smaller(2, work.H - h);
    if (work.small) {
      prefetch<false>(next, h);
      if (result) prefetch<true>(*result, h);
    } else {
      prefetch<false>(p + kRowsAhead < work.pairs ? from : next, 2 * ((p + kRowsAhead) % work.pairs));
    }
    if constexpr (std::is_same_v<T, E>) {
      if (from.strides.channel == 1 && from.lanes == kLanes<T> && count == 2) {
        const T* const even = from.data + h * from.strides.row;
        work.rows.split(work.row_line, even, even + from.strides.row, from.strides.pixel, z + p, work.stride);
        continue;
      }
    }
    T* const odd = work.pixels + work.W * kLanes<T>;
    load_pixels<T>(from, h, count, work.pixels);
    if (count == 1) std::memset(odd, 0, static_cast<size_t>(work.W) * ND_VECTOR_BYTES);
    work.rows.split(work.row_line, work.pixels, odd, kLanes<T>, z + p, work.stride);
  }
}

template <class T, class E>
void spectrum_to_rows(const Work<T>& work, C<T>* z, const Channels<E>& to) {
  if (work.H % 2 == 1) {  // the pair of the last row
    C<T>* const last = z + work.pairs - 1;
    for (int64_t k = 1; 2 * k < work.W; k++) last[(work.W - k) * work.stride] = C<T>{};
    last->im = V<T>{};
    if (work.W % 2 == 0) last[work.W / 2 * work.stride].im = V<T>{};
  }
  for (int64_t p = 0; p < work.pairs; p++) {
    const int64_t h = 2 * p, count = smaller(2, work.H - h);
    if (!work.small) prefetch<true>(to, h + 2 * kRowsAhead);
    if constexpr (std::is_same_v<T, E>) {
      if (to.strides.channel == 1 && to.lanes == kLanes<T> && count == 2) {
        T* const even = to.data + h * to.strides.row;
        work.rows.join(work.row_line, z + p, work.stride, even, even + to.strides.row, to.strides.pixel);
        continue;
      }
    }
    work.rows.join(work.row_line, z + p, work.stride, work.pixels, work.pixels + work.W * kLanes<T>, kLanes<T>);
    store_pixels<T>(work.pixels, h, count, to);
  }
}

// Calls f(u, v, place, minus_u) for every frequency of a block's filter: place is its complex vector, and minus_u > u
// names the frequency (minus_u, v) that it also stands for; else minus_u = u.
template <class T, class F>
ND_INLINE void for_each_place(const Work<T>& work, const F& f) {
  int64_t place = 0;
  for (int64_t u = 0; 2 * u <= work.H; u++) {
    const int64_t minus_u = u == 0 ? 0 : work.H - u;
    f(u, int64_t{0}, place++, minus_u);
    f(u, work.W % 2 == 0 ? work.W / 2 : int64_t{-1}, place++, minus_u);
  }
  for (int64_t v = 1; 2 * v < work.W; v++) {
    for (int64_t j = 0; j < work.H; j++) f(work.columns.frequency(j), v, place++, int64_t{-1});
  }
}

template <class T>
void prepare(const FourierFilterArgs& args, int64_t block) {
  const Work<T> work(args, nullptr);
  const int64_t channel = block * kLanes<T>, lanes = smaller(kLanes<T>, args.channels - channel);
  const auto K = [&](int64_t u, int64_t v) {
    const int64_t index = ((u * (args.width / 2 + 1) + v) * args.channels + channel) * 2;
    return load_pairs(static_cast<const T*>(args.weight) + index, lanes);
  };
  const T scale = T(0.5) / (static_cast<T>(args.height) * static_cast<T>(args.width));
  C<T>* const filter = static_cast<C<T>*>(args.filter) + block * work.size;
  for_each_place(work, [&](int64_t u, int64_t v, int64_t place, int64_t minus_u) {
    C<T> value = {};
    if (v >= 0) value = K(u, v);
    if (v >= 0 && minus_u >= 0) {
      const C<T> sum = value + fft::conj(K(minus_u, v));
      value = {sum.re * T(0.5), sum.im * T(0.5)};
    }
    filter[place] = {value.re * scale, value.im * scale};
  });
}

template <class T>
void finish(const FourierFilterArgs& args, int64_t block) {
  const Work<T> work(args, nullptr);
  const int64_t channel = block * kLanes<T>, lanes = smaller(kLanes<T>, args.channels - channel);
  const T scale = T(1) / (static_cast<T>(args.height) * static_cast<T>(args.width));
  const C<T>* const sums = static_cast<const C<T>*>(args.sums) + block * args.splits * work.size;
  const auto put = [&](int64_t u, int64_t v, C<T> value) {
    const int64_t index = ((u * (args.width / 2 + 1) + v) * args.channels + channel) * 2;
    store_pairs(static_cast<T*>(args.dweight) + index, value, lanes);
  };
  for_each_place(work, [&](int64_t u, int64_t v, int64_t place, int64_t minus_u) {
    if (v < 0) return;
    C<T> sum = sums[place];
    for (int64_t s = 1; s < args.splits; s++) sum = sum + sums[s * work.size + place];
    const T own = scale * (minus_u >= 0 ? T(0.25) : T(0.5));  // spectra count twice; c_v
    sum = {sum.re * own, sum.im * own};
    put(u, v, sum);
    if (minus_u > u) put(minus_u, v, fft::conj(sum));
  });
}

template <class T, class E>
void apply(const FourierFilterArgs& args, int64_t begin, int64_t end, void* memory) {
  const Work<T> work(args, memory);
  work.clear();
  const Images<T, const E> x{static_cast<const E*>(args.x), args.x_strides, args};
  const Images<T, E> y{static_cast<E*>(args.y), args.y_strides, args};
  for (int64_t task = begin; task < end; task++) {
    const int64_t block = task / args.batch, b = task % args.batch;
    const Channels<E> result = y(b, block);
    rows_to_spectrum(work, x(b, block), x(b + 1, block), &result, work.z);
    const C<T>* const K = static_cast<const C<T>*>(args.filter) + block * work.size;
    work.columns.filter(work.column_line, work.W, work.z, work.stride, work.t, K);
    spectrum_to_rows(work, work.z, result);
  }
}

template <class T, class E>
void gradients(const FourierFilterArgs& args, int64_t begin, int64_t end, void* memory) {
  const Work<T> work(args, memory);
  work.clear();
  const Images<T, const E> x{static_cast<const E*>(args.x), args.x_strides, args};
  const Images<T, const E> g{static_cast<const E*>(args.grad), args.grad_strides, args};
  const Images<T, E> dx{static_cast<E*>(args.y), args.y_strides, args};
  for (int64_t task = begin; task < end; task++) {
    const int64_t block = task / args.splits, split = task % args.splits;
    const C<T>* const K = static_cast<const C<T>*>(args.filter) + block * work.size;
    C<T>* const sums = static_cast<C<T>*>(args.sums) + task * work.size;
    std::memset(static_cast<void*>(sums), 0, static_cast<size_t>(work.size) * sizeof(C<T>));
    for (int64_t b = split * args.batch / args.splits; b < (split + 1) * args.batch / args.splits; b++) {
      const Channels<E> result = dx(b, block);
      rows_to_spectrum<T, E>(work, x(b, block), x(b + 1, block), nullptr, work.zx);
      rows_to_spectrum(work, g(b, block), g(b + 1, block), &result, work.z);
      work.columns.filter_backward(work.column_line, work.W, work.zx, work.z, work.stride, work.tx, work.t, K, sums);
      spectrum_to_rows(work, work.z, result);
    }
  }
}

// ------------------------------------------------------------------------------------------------ blocks of channels

template <class T>
ND_INLINE T* spectrum_of(const FourierBlocksArgs& args, void* spectra, int64_t image, int64_t block) {
  return static_cast<T*>(spectra) + image * args.image_stride + 2 * kLanes<T> * block;
}
ND_INLINE SpectrumStrides spectrum_strides(const FourierBlocksArgs& args) {
  return {(args.filter.width / 2 + 1) * args.mode_stride, args.mode_stride};
}

// Task (tensor, image, block) of [1 or 2 tensors, images, blocks]: the spectrum of a block of channels of an image.
template <class T, class E>
void spectra(const FourierBlocksArgs& args, int64_t begin, int64_t end, void* memory) {
  const Work<T> work(args.filter, memory);
  work.clear();
  const Images<T, const E> x{static_cast<const E*>(args.filter.x), args.filter.x_strides, args.filter};
  const Images<T, const E> g{static_cast<const E*>(args.filter.grad), args.filter.grad_strides, args.filter};
  for (int64_t task = begin; task < end; task++) {
    const int64_t block = task % work.blocks, image = task / work.blocks % args.images;
    const bool of_grad = task / work.blocks / args.images > 0;
    const Images<T, const E>& images = of_grad ? g : x;
    const int64_t next = block + 1 < work.blocks ? block + 1 : 0, b = args.first + image;
    rows_to_spectrum<T, E>(work, images(b, block), images(b + (next == 0), next), nullptr, work.z);
    work.columns.analyse(work.column_line, work.W, work.z, work.stride, work.t,
                         spectrum_of<T>(args, of_grad ? args.grad_spectra : args.x_spectra, image, block),
                         spectrum_strides(args));
  }
}

// Task (image, block) of [images, blocks]: y or dx from its spectrum.
template <class T, class E>
void synthesis(const FourierBlocksArgs& args, int64_t begin, int64_t end, void* memory) {
  const Work<T> work(args.filter, memory);
  work.clear();
  const Images<T, E> y{static_cast<E*>(args.filter.y), args.filter.y_strides, args.filter};
  void* const all = args.filter.grad ? args.grad_spectra : args.x_spectra;
  for (int64_t task = begin; task < end; task++) {
    const int64_t block = task % work.blocks, image = task / work.blocks;
    const Channels<E> result = y(args.first + image, block);
    if (work.small) {
      for (int64_t h = 0; h < work.H; h += 2) prefetch<true>(result, h);
    }
    work.columns.synthesise(work.column_line, work.W, spectrum_of<T>(args, all, image, block), spectrum_strides(args),
                            work.t, work.z, work.stride);
    spectrum_to_rows(work, work.z, result);
  }
}

// As many images together as make their spectra as large as the weights, which are read once for all of them.
template <class T>
FourierBlocksPlan blocks_plan(const FourierBlocksArgs& args) {
  const FourierFilterArgs& filter = args.filter;
  const Work<T> work(filter, nullptr);
  const int64_t modes = filter.height * (filter.width / 2 + 1), numbers = static_cast<int64_t>(sizeof(T));
  const int64_t mode_stride = 2 * kLanes<T> * work.blocks;
  // Images of a frequency are spread over the sets of a cache; products may read a vector beyond the last one.
  const int64_t image_bytes = round_up(modes * mode_stride * numbers, kPage) + kSpreadBytes;
  const int64_t weight_bytes = 2 * numbers * modes * filter.channels * (filter.channels / args.groups);
  const int64_t most = larger(kFewestImages, larger(kSpectraBytes, weight_bytes) / image_bytes);
  const int64_t images = ceil_div(filter.batch, ceil_div(filter.batch, most));
  return {work.blocks, images, mode_stride, image_bytes / numbers, images * image_bytes, work.bytes};
}

template <class T>
FourierFilterPlan plan(const FourierFilterArgs& args) {
  const Work<T> work(args, nullptr);
  const int64_t enough = ceil_div(kWantedTasks, work.blocks), possible = ceil_div(args.batch, kSplitImages);
  const int64_t splits = larger(1, smaller(kMostSplits, smaller(enough, possible)));
  const int64_t vector_bytes = static_cast<int64_t>(sizeof(C<T>));
  return {work.blocks,
          splits,
          2 * (args.height + args.width) * static_cast<int64_t>(sizeof(T)),
          work.blocks * work.size * vector_bytes,
          work.blocks * splits * work.size * vector_bytes,
          work.bytes};
}

template <class T>
void fill_table(const FourierFilterArgs& args) {
  T* table = static_cast<T*>(args.table);
  for (const int64_t N : {args.width, args.height}) {
    for (int64_t m = 0; m < N; m++) {
      table[m] = static_cast<T>(fft::cos_of_turn(m, N));
      table[N + m] = static_cast<T>(fft::sin_of_turn(m, N));
    }
    table += 2 * N;
  }
}

}  // namespace

FourierFilterPlan fourier_filter_plan(const FourierFilterArgs& args) {
  return args.dtype == Dtype::kFloat64 ? plan<double>(args) : plan<float>(args);
}

void fourier_filter_prepare(const FourierFilterArgs& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block++)
    args.dtype == Dtype::kFloat64 ? prepare<double>(args, block) : prepare<float>(args, block);
}

void fourier_filter_start(const FourierFilterArgs& args) {
  args.dtype == Dtype::kFloat64 ? fill_table<double>(args) : fill_table<float>(args);
}

void fourier_filter_apply(const FourierFilterArgs& args, int64_t begin, int64_t end, void* workspace) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return apply<float, float>(args, begin, end, workspace);
    case Dtype::kFloat64:
      return apply<double, double>(args, begin, end, workspace);
    case Dtype::kBfloat16:
      return apply<float, Bfloat16>(args, begin, end, workspace);
    case Dtype::kFloat16:
      return apply<float, Float16>(args, begin, end, workspace);
  }
}

void fourier_filter_gradients(const FourierFilterArgs& args, int64_t begin, int64_t end, void* workspace) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return gradients<float, float>(args, begin, end, workspace);
    case Dtype::kFloat64:
      return gradients<double, double>(args, begin, end, workspace);
    case Dtype::kBfloat16:
      return gradients<float, Bfloat16>(args, begin, end, workspace);
    case Dtype::kFloat16:
      return gradients<float, Float16>(args, begin, end, workspace);
  }
}

void fourier_filter_finish(const FourierFilterArgs& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block++)
    args.dtype == Dtype::kFloat64 ? finish<double>(args, block) : finish<float>(args, block);
}

FourierBlocksPlan fourier_blocks_plan(const FourierBlocksArgs& args) {
  return args.filter.dtype == Dtype::kFloat64 ? blocks_plan<double>(args) : blocks_plan<float>(args);
}

void fourier_blocks_spectra(const FourierBlocksArgs& args, int64_t begin, int64_t end, void* workspace) {
  switch (args.filter.dtype) {
    case Dtype::kFloat32:
      return spectra<float, float>(args, begin, end, workspace);
    case Dtype::kFloat64:
      return spectra<double, double>(args, begin, end, workspace);
    case Dtype::kBfloat16:
      return spectra<float, Bfloat16>(args, begin, end, workspace);
    case Dtype::kFloat16:
      return spectra<float, Float16>(args, begin, end, workspace);
  }
}

void fourier_blocks_synthesis(const FourierBlocksArgs& args, int64_t begin, int64_t end, void* workspace) {
  switch (args.filter.dtype) {
    case Dtype::kFloat32:
      return synthesis<float, float>(args, begin, end, workspace);
    case Dtype::kFloat64:
      return synthesis<double, double>(args, begin, end, workspace);
    case Dtype::kBfloat16:
      return synthesis<float, Bfloat16>(args, begin, end, workspace);
    case Dtype::kFloat16:
      return synthesis<float, Float16>(args, begin, end, workspace);
  }
}

}  // namespace nd::cpu::ND_CPU_LEVEL
