// Discrete Fourier transforms of compile-time length in registers, for CPU vectors and CUDA threads alike:
//
//     Dft<N, kInverse>::run(v):   v_k <- sum_n v_n exp(-+ 2 pi i k n / N),     + if kInverse, never scaled
//
// v is an array of N complex numbers Complex<L>; L is what one lane computes with: float, double, or a vector of them.
// Operations, real additions plus multiplications or fused multiply-adds: 2: 4, 3: 14, 4: 16, 5: 36, 7: 66, 8: 52.
//
// Split<N> is the two-stage form of a longer transform, N = A B:
//   stage 1, for each n2 < B:  t[k1][n2] = turn(n2, k1) of the A-point transform over n1 of v[input(n1, n2)]
//   stage 2, for each k1 < A:  v[output(k1, k2)] = the B-point transform over n2 of t[k1][n2]
// Where A and B have no common divisor the indices are chosen so that no twiddle factor is left (kTwiddles false). The
// inverse goes the other way: stage 2 with inverse transforms from k2 to n2, then conjugate turns and stage 1.
//
// C++17, no state, internal linkage: each translation unit has its own copy (see simd.hpp).
#pragma once
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define ND_FFT __host__ __device__ __forceinline__
#define ND_FFT_CONSTANT __host__ __device__ constexpr
#else
#define ND_FFT inline __attribute__((always_inline))
#define ND_FFT_CONSTANT constexpr
#endif

namespace nd::fft {
namespace {

// ------------------------------------------------------------------------------------------------ roots of unity

// cos and sin by their series, |x| <= pi/4.
ND_FFT_CONSTANT double series_cos(double x) {
  double term = 1, sum = 1;
  for (int i = 1; i <= 10; i++) sum += term *= -x * x / ((2 * i - 1) * (2 * i));
  return sum;
}
ND_FFT_CONSTANT double series_sin(double x) {
  double term = x, sum = x;
  for (int i = 1; i <= 10; i++) sum += term *= -x * x / ((2 * i) * (2 * i + 1));
  return sum;
}

// cos(2 pi m / n) and sin(2 pi m / n), n >= 1, correct to the last bits: the angle is reduced in integers.
ND_FFT_CONSTANT double cos_of_turn(long long m, long long n) {
  m = (m % n + n) % n;
  if (2 * m > n) m = n - m;
  const double sign = 4 * m > n ? -1 : 1;
  if (4 * m > n) {  // cos x = -cos(pi - x)
    m = n - 2 * m;
    n *= 2;
  }
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  if (8 * m > n) return sign * series_sin(kTwoPi * static_cast<double>(n - 4 * m) / static_cast<double>(4 * n));
  return sign * series_cos(kTwoPi * static_cast<double>(m) / static_cast<double>(n));
}
ND_FFT_CONSTANT double sin_of_turn(long long m, long long n) { return cos_of_turn(4 * m - n, 4 * n); }

// ------------------------------------------------------------------------------------------------ complex numbers

template <class L>
struct Complex {
  L re, im;
};

template <class L>
ND_FFT Complex<L> operator+(Complex<L> a, Complex<L> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class L>
ND_FFT Complex<L> operator-(Complex<L> a, Complex<L> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class L>
ND_FFT Complex<L> operator*(Complex<L> a, Complex<L> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class L>
ND_FFT Complex<L> conj(Complex<L> a) {
  return {a.re, -a.im};
}
template <class L>
ND_FFT Complex<L> times_i(Complex<L> a) {
  return {-a.im, a.re};
}

// a (c - i s), or a (c + i s) if kInverse; c and s may be scalars where L is a vector.
template <bool kInverse, class L, class S>
ND_FFT Complex<L> turned(Complex<L> a, S c, S s) {
  if (kInverse) return {a.re * c - a.im * s, a.im * c + a.re * s};
  return {a.re * c + a.im * s, a.im * c - a.re * s};
}

// The scalar type of a lane.
template <class L, class = void>
struct ScalarOf {
  using type = L;
};
template <class L>
struct ScalarOf<L, decltype(static_cast<void>(L{}[0]))> {
  using type = std::remove_reference_t<decltype(std::declval<L&>()[0])>;
};

// a exp(-+ 2 pi i M / N), without multiplications where M / N is a multiple of 1/4.
template <int M, int N, bool kInverse, class L>
ND_FFT Complex<L> turned_by(Complex<L> a) {
  constexpr int kTurn = M % N;
  if constexpr (kTurn == 0) {
    return a;
  } else if constexpr (2 * kTurn == N) {
    return {-a.re, -a.im};
  } else if constexpr (4 * kTurn == N || 4 * kTurn == 3 * N) {
    return (4 * kTurn == N) == kInverse ? Complex<L>{-a.im, a.re} : Complex<L>{a.im, -a.re};
  } else {
    using S = typename ScalarOf<L>::type;
    constexpr S c = static_cast<S>(cos_of_turn(kTurn, N)), s = static_cast<S>(sin_of_turn(kTurn, N));
    return turned<kInverse>(a, c, s);
  }
}

// ------------------------------------------------------------------------------------------------ two stages

ND_FFT_CONSTANT int inverse_modulo(int a, int n) {
  for (int i = 1; i < n; i++) {
    if (a * i % n == 1) return i;
  }
  return 0;
}
ND_FFT_CONSTANT int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// N itself if it has a codelet of its own, else its factor B of those for which max(N / B, B) is smallest, or 1.
ND_FFT_CONSTANT int second_factor(int N) {
  int best = 1;
  if (N <= 5 || N == 7 || N == 8) return N;
  for (int B : {2, 3, 4, 5, 7, 8}) {
    const int now = N / best > best ? N / best : best, then = N / B > B ? N / B : B;
    if (N % B == 0 && then <= now) best = B;
  }
  return best;
}

template <int N>
struct Split {
  static constexpr int B = second_factor(N), A = N / B;
  static constexpr bool kTwiddles = common_divisor(A, B) != 1;
  static ND_FFT_CONSTANT int input(int n1, int n2) { return kTwiddles ? B * n1 + n2 : (B * n1 + A * n2) % N; }
  static ND_FFT_CONSTANT int output(int k1, int k2) {
    return kTwiddles ? k1 + A * k2 : (B * inverse_modulo(B % A, A) * k1 + A * inverse_modulo(A % B, B) * k2) % N;
  }
  // Of N turns, how many t[k1][n2] is turned back by (forward) or ahead (inverse).
  static ND_FFT_CONSTANT int turn(int n2, int k1) { return kTwiddles ? n2 * k1 : 0; }
};

// ------------------------------------------------------------------------------------------------ codelets

template <int N, bool kInverse>
struct Dft;

template <bool kInverse>
struct Dft<1, kInverse> {
  template <class L>
  static ND_FFT void run(Complex<L>*) {}
};

template <bool kInverse>
struct Dft<2, kInverse> {
  template <class L>
  static ND_FFT void run(Complex<L>* v) {
    const Complex<L> a = v[0];
    v[0] = a + v[1];
    v[1] = a - v[1];
  }
};

template <bool kInverse>
struct Dft<4, kInverse> {
  template <class L>
  static ND_FFT void run(Complex<L>* v) {
    const Complex<L> a = v[0] + v[2], b = v[0] - v[2], c = v[1] + v[3];
    const Complex<L> d = turned_by<1, 4, kInverse>(v[1] - v[3]);
    v[0] = a + c;
    v[1] = b + d;
    v[2] = a - c;
    v[3] = b - d;
  }
};

template <bool kInverse>
struct Dft<8, kInverse> {
  template <class L>
  static ND_FFT void run(Complex<L>* v) {
    using S = typename ScalarOf<L>::type;
    constexpr S kRoot = static_cast<S>(0.70710678118654752440);
    Complex<L> e[4] = {v[0], v[2], v[4], v[6]}, o[4] = {v[1], v[3], v[5], v[7]};
    Dft<4, kInverse>::run(e);
    Dft<4, kInverse>::run(o);
    const Complex<L> o2 = turned_by<1, 4, kInverse>(o[2]);
    // sqrt(2) times o_1 and o_3 turned; the multiplications by sqrt(1/2) join the last additions.
    const Complex<L> q1 = turned_by<1, 4, kInverse>(o[1]), q3 = turned_by<1, 4, kInverse>(o[3]);
    const Complex<L> o1 = o[1] + q1, o3 = q3 - o[3];
    v[0] = e[0] + o[0];
    v[4] = e[0] - o[0];
    v[1] = {e[1].re + o1.re * kRoot, e[1].im + o1.im * kRoot};
    v[5] = {e[1].re - o1.re * kRoot, e[1].im - o1.im * kRoot};
    v[2] = e[2] + o2;
    v[6] = e[2] - o2;
    v[3] = {e[3].re + o3.re * kRoot, e[3].im + o3.im * kRoot};
    v[7] = {e[3].re - o3.re * kRoot, e[3].im - o3.im * kRoot};
  }
};

// Odd N, in sums p_j = v_j + v_(N-j) and differences m_j = v_j - v_(N-j):
//   v_k, v_(N-k) = a_k -+ i b_k,   a_k = v_0 + sum_j cos(2 pi j k / N) p_j,   b_k = sum_j sin(2 pi j k / N) m_j
template <int N, bool kInverse, class = void>
struct OddDft {
  static constexpr int kHalf = (N - 1) / 2;

  template <int M, class L>
  static ND_FFT void add_product(Complex<L>& a, Complex<L>& b, Complex<L> p, Complex<L> m) {
    using S = typename ScalarOf<L>::type;
    constexpr S c = static_cast<S>(cos_of_turn(M, N)), s = static_cast<S>(sin_of_turn(M, N));
    a = {a.re + p.re * c, a.im + p.im * c};
    b = {b.re + m.re * s, b.im + m.im * s};
  }

  template <int K, class L, int... J>
  static ND_FFT void output(Complex<L>* v, Complex<L> v0, const Complex<L>* p, const Complex<L>* m,
                            std::integer_sequence<int, J...>) {
    using S = typename ScalarOf<L>::type;
    constexpr S s = static_cast<S>(sin_of_turn(K, N)), c = static_cast<S>(cos_of_turn(K, N));
    Complex<L> a = {v0.re + p[0].re * c, v0.im + p[0].im * c}, b = {m[0].re * s, m[0].im * s};
    (add_product<(J + 2) * K % N>(a, b, p[J + 1], m[J + 1]), ...);
    const Complex<L> ib = times_i(b);
    v[K] = kInverse ? a + ib : a - ib;
    v[N - K] = kInverse ? a - ib : a + ib;
  }

  template <class L, int... K>
  static ND_FFT void outputs(Complex<L>* v, const Complex<L>* p, const Complex<L>* m,
                             std::integer_sequence<int, K...>) {
    const Complex<L> v0 = v[0];
    ((v[0] = v[0] + p[K]), ...);
    (output<K + 1>(v, v0, p, m, std::make_integer_sequence<int, kHalf - 1>()), ...);
  }

  template <class L, int... J>
  static ND_FFT void run(Complex<L>* v, std::integer_sequence<int, J...> half) {
    const Complex<L> p[kHalf] = {(v[J + 1] + v[N - 1 - J])...}, m[kHalf] = {(v[J + 1] - v[N - 1 - J])...};
    outputs(v, p, m, half);
  }

  template <class L>
  static ND_FFT void run(Complex<L>* v) {
    run(v, std::make_integer_sequence<int, kHalf>());
  }
};

template <bool kInverse>
struct Dft<3, kInverse> : OddDft<3, kInverse> {};
template <bool kInverse>
struct Dft<5, kInverse> : OddDft<5, kInverse> {};
template <bool kInverse>
struct Dft<7, kInverse> : OddDft<7, kInverse> {};

// Composite lengths and primes above 7, all in registers; the CPU kernels use Split with stages in memory instead.
template <int N, bool kInverse>
struct Dft {
  using S = Split<N>;
  static constexpr int A = S::A, B = S::B;

  template <int N2, class L, int... I>
  static ND_FFT void first(const Complex<L>* v, Complex<L>* t, std::integer_sequence<int, I...>) {
    Complex<L> a[A] = {v[S::input(I, N2)]...};
    Dft<A, kInverse>::run(a);
    ((t[I * B + N2] = turned_by<S::turn(N2, I), N, kInverse>(a[I])), ...);
  }

  template <int K1, class L, int... I>
  static ND_FFT void second(Complex<L>* v, Complex<L>* t, std::integer_sequence<int, I...>) {
    Dft<B, kInverse>::run(t + K1 * B);
    ((v[S::output(K1, I)] = t[K1 * B + I]), ...);
  }

  template <class L, int... N2>
  static ND_FFT void firsts(const Complex<L>* v, Complex<L>* t, std::integer_sequence<int, N2...>) {
    (first<N2>(v, t, std::make_integer_sequence<int, A>()), ...);
  }

  template <class L, int... K1>
  static ND_FFT void seconds(Complex<L>* v, Complex<L>* t, std::integer_sequence<int, K1...>) {
    (second<K1>(v, t, std::make_integer_sequence<int, B>()), ...);
  }

  template <class L>
  static ND_FFT void run(Complex<L>* v) {
    if constexpr (B == 1) {
      OddDft<N, kInverse>::run(v);
    } else {
      Complex<L> t[N];
      firsts(v, t, std::make_integer_sequence<int, B>());
      seconds(v, t, std::make_integer_sequence<int, A>());
    }
  }
};

}  // namespace
}  // namespace nd::fft
