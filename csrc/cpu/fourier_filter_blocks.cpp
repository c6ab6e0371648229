// Products of spectra with block-diagonal filters: for every frequency (u, v) and each of G blocks of D channels
//
//     Y_b = X_b K,    dX_b = G_b K^H,    dK = c_v / (H W) sum_b conj(X_b)^T G_b,
//
// X_b [D] of image b, K [D, D] from input to output channel. In the columns v = 0 and v = W / 2 the Hermitian part
// (K[u] + conj K[-u]) / 2 takes the place of K, only u <= H / 2 is worked on, and dK[-u] = conj dK[u].
//
// Floor: each weight read once for all images of a call, 8 D operations for each of the numbers of a spectrum; twice
// that with gradients, and dK written.
//
// Layout: all three are one product out[m] = sum_k a[m, k] b[k] of a complex matrix with rows of complex numbers as
// they lie in memory, real and imaginary parts next to each other: one sum of vectors b[k] Re a and one of b[k] Im a
// for each of kRows x kVectors registers of results, put together at the end. Rows m are images, or input channels of
// dK, whose k are images. Sums run over k in order: results do not depend on how rows are cut. Spectra change in place.
#include <cstring>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

template <class T>
struct VectorOf {
  typedef T t __attribute__((vector_size(ND_VECTOR_BYTES)));
};
template <class T>
using V = typename VectorOf<T>::t;
template <class T>
constexpr int kLanes = Vec<T>::W;

// Results of a product in registers, of two sums each: 24 of 32 vectors with AVX-512, else 8 of 16.
constexpr int kRows = ND_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kVectors = ND_VECTOR_BYTES == 64 ? 3 : 2;

constexpr int64_t kLine = 64;  // bytes

enum class Conjugate { kNone, kLeft, kRight };

// Rows of complex numbers, as numbers: element (m, k) at data + m row + k step.
template <class T>
struct Rows {
  const T* data;
  int64_t row, step;
};

template <class T>
struct Product {
  Rows<T> a;   // [m, k]
  const T* b;  // [k] rows b_step apart; whole vectors of it are read
  int64_t b_step;
  int64_t depth;        // of k
  Conjugate conjugate;  // of a or b
  T scale;
  bool add;  // to what is there
  T* out;    // [m] rows out_row apart
  int64_t out_row;
};

// What adds the product with Im a to that with Re a, real and imaginary parts alternating: own + other swapped, times
// signs that are exact.
template <class T>
struct Signs {
  V<T> own, other;
  ND_INLINE explicit Signs(Conjugate conjugate) {
    for (int l = 0; l < kLanes<T>; l++) {
      const bool real = l % 2 == 0;
      own[l] = conjugate == Conjugate::kRight && !real ? T(-1) : T(1);
      other[l] = (conjugate == Conjugate::kNone && real) || (conjugate == Conjugate::kLeft && !real) ? T(-1) : T(1);
    }
  }
};

template <class T>
struct IntOf {
  typedef int32_t t __attribute__((vector_size(ND_VECTOR_BYTES)));
};
template <>
struct IntOf<double> {
  typedef int64_t t __attribute__((vector_size(ND_VECTOR_BYTES)));
};

// Real and imaginary parts exchanged.
template <class T>
ND_INLINE V<T> swapped(V<T> v) {
  typename IntOf<T>::t lanes;
  for (int l = 0; l < kLanes<T>; l++) lanes[l] = l ^ 1;
  return __builtin_shuffle(v, lanes);
}

// Complex numbers a0 b0 a1 b1 .. of the lower or the upper half of the lanes.
template <class T, bool kUpper>
ND_INLINE V<T> pairs_of(V<T> a, V<T> b) {
  typename IntOf<T>::t lanes;
  for (int l = 0; l < kLanes<T>; l++) {
    const int pair = l / 2, from = 2 * (pair / 2) + l % 2 + (kUpper ? kLanes<T> / 2 : 0);
    lanes[l] = from + (pair % 2 ? kLanes<T> : 0);
  }
  return __builtin_shuffle(a, b, lanes);
}

// Numbers [begin, begin + count) of kM rows from row m on, in kN vectors.
template <class T, int kM, int kN>
void multiply(const Product<T>& p, int64_t m, int64_t begin, int64_t count) {
  V<T> re[kM][kN] = {}, im[kM][kN] = {};
  const T* a = p.a.data + m * p.a.row;
  const T* b = p.b + begin;
  for (int64_t k = 0; k < p.depth; k++, a += p.a.step, b += p.b_step) {
    V<T> row[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; n++) row[n] = load(b + n * kLanes<T>);
#pragma GCC unroll 4
    for (int i = 0; i < kM; i++) {
      const T x = a[i * p.a.row], y = a[i * p.a.row + 1];
#pragma GCC unroll 4
      for (int n = 0; n < kN; n++) {
        re[i][n] += row[n] * x;
        im[i][n] += row[n] * y;
      }
    }
  }
  const Signs<T> signs(p.conjugate);
#pragma GCC unroll 4
  for (int i = 0; i < kM; i++) {
    T* const out = p.out + (m + i) * p.out_row + begin;
#pragma GCC unroll 4
    for (int n = 0; n < kN; n++) {
      const V<T> result = (re[i][n] * signs.own + swapped<T>(im[i][n]) * signs.other) * p.scale;
      T* const to = out + n * kLanes<T>;
      const int64_t rest = count - n * kLanes<T>;
      if (rest >= kLanes<T>) {
        store(to, p.add ? load(to) + result : result);
      } else {
        for (int64_t l = 0; l < rest; l++) to[l] = p.add ? to[l] + result[l] : result[l];
      }
    }
  }
}

// Rows [m, m + rows) with rows <= kM, numbers [begin, begin + count) in at most kN vectors.
template <class T, int kM = kRows, int kN = kVectors>
void multiply_part(const Product<T>& p, int64_t m, int64_t rows, int64_t begin, int64_t count) {
  if constexpr (kM > 1) {
    if (rows < kM) return multiply_part<T, kM - 1, kN>(p, m, rows, begin, count);
  }
  if constexpr (kN > 1) {
    if (count <= (kN - 1) * kLanes<T>) return multiply_part<T, kM, kN - 1>(p, m, rows, begin, count);
  }
  multiply<T, kM, kN>(p, m, begin, count);
}

// Numbers that one product in registers covers, so that those of a row of `count` are cut evenly.
template <class T>
int64_t numbers_at_once(int64_t count) {
  const int64_t vectors = (count + kLanes<T> - 1) / kLanes<T>, parts = (vectors + kVectors - 1) / kVectors;
  return (vectors + parts - 1) / parts * kLanes<T>;
}

// ------------------------------------------------------------------------------------------------ weights

// Re and Im of the Hermitian part of rows of weights whose partner at -u is `minus`.
template <class T>
void hermitian_part(const T* K, const T* minus, int64_t D, T* to, int64_t to_row) {
  for (int64_t i = 0; i < D; i++, K += 2 * D, minus += 2 * D, to += to_row) {
    for (int64_t o = 0; o < 2 * D; o += 2) {
      to[o] = (K[o] + minus[o]) * T(0.5);
      to[o + 1] = (K[o + 1] - minus[o + 1]) * T(0.5);
    }
  }
}

// K^T, by squares of kLanes / 2 complex numbers in registers.
template <class T>
void transpose(const T* K, int64_t row, int64_t D, T* to, int64_t to_row) {
  constexpr int kSide = kLanes<T> / 2;
  const int64_t whole = D / kSide * kSide;
  for (int64_t i = 0; i < whole; i += kSide) {
    for (int64_t o = 0; o < whole; o += kSide) {
      V<T> square[kSide];
#pragma GCC unroll 8
      for (int r = 0; r < kSide; r++) square[r] = load(K + (i + r) * row + 2 * o);
#pragma GCC unroll 4
      for (int step = 1; step < kSide; step *= 2) {
        V<T> next[kSide];
#pragma GCC unroll 4
        for (int r = 0; r < kSide / 2; r++) {
          next[2 * r] = pairs_of<T, false>(square[r], square[r + kSide / 2]);
          next[2 * r + 1] = pairs_of<T, true>(square[r], square[r + kSide / 2]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kSide; r++) square[r] = next[r];
      }
#pragma GCC unroll 8
      for (int r = 0; r < kSide; r++) store(to + (o + r) * to_row + 2 * i, square[r]);
    }
  }
  for (int64_t i = 0; i < D; i++) {
    for (int64_t o = i < whole ? whole : 0; o < D; o++)
      std::memcpy(to + o * to_row + 2 * i, K + i * row + 2 * o, 2 * sizeof(T));
  }
}

// Weights of a block as rows b of a product: where they are, or in a padded copy.
template <class T>
struct Weights {
  const T* data;
  int64_t row;
};

// Work space of a task.
template <class T>
struct Work {
  int64_t D, row;                    // numbers of a padded row of D complex ones
  T *filter, *transposed, *results;  // [D][row], with gradients [D][row], [kRows][row]
  int64_t bytes;

  Work(const FourierBlocksArgs& args, void* memory)
      : D(args.filter.channels / args.groups), row(round_up(2 * D, kLanes<T>)) {
    filter = static_cast<T*>(memory);
    transposed = filter + D * row;
    results = transposed + (args.filter.grad ? D * row : 0);
    bytes = static_cast<int64_t>(sizeof(T)) * (results + kRows * row - filter);
  }
};

// ------------------------------------------------------------------------------------------------ one frequency

template <class T>
struct Mode {
  const FourierBlocksArgs& args;
  const Work<T>& work;
  int64_t H, Wf, D;
  int64_t u, v, minus_u;
  bool real;  // its column is the spectrum of real numbers: minus_u stands for what u does

  Mode(const FourierBlocksArgs& args, const Work<T>& work, int64_t mode)
      : args(args),
        work(work),
        H(args.filter.height),
        Wf(args.filter.width / 2 + 1),
        D(work.D),
        u(mode / Wf),
        v(mode % Wf),
        minus_u(u == 0 ? 0 : H - u),
        real(v == 0 || 2 * v == args.filter.width) {}

  ND_INLINE int64_t weight(int64_t u, int64_t g) const { return ((u * Wf + v) * args.groups + g) * D * D * 2; }
  ND_INLINE T* spectra(void* data, int64_t g) const {
    return static_cast<T*>(data) + (u * Wf + v) * args.mode_stride + 2 * g * D;
  }

  Weights<T> filter(int64_t g) const {
    const T* const all = static_cast<const T*>(args.filter.weight);
    const T* const K = all + weight(u, g);
    if (real) {
      hermitian_part(K, all + weight(minus_u, g), D, work.filter, work.row);
    } else if (2 * D % kLanes<T> == 0) {
      return {K, 2 * D};
    } else {
      for (int64_t i = 0; i < D; i++)
        std::memcpy(work.filter + i * work.row, K + i * 2 * D, static_cast<size_t>(2 * D) * sizeof(T));
    }
    return {work.filter, work.row};
  }

  // Spectra of all images, [images, D], times b [D, D].
  void multiply_spectra(T* spectra, Weights<T> b, Conjugate conjugate, T scale) const {
    const int64_t columns = numbers_at_once<T>(2 * D);
    const bool in_place = columns >= 2 * D;  // a row is read before it is written
    for (int64_t m = 0; m < args.images; m += kRows) {
      const int64_t rows = smaller(kRows, args.images - m);
      T* const own = spectra + m * args.image_stride;
      const Product<T> product = {{own, args.image_stride, 2},
                                  b.data,
                                  b.row,
                                  D,
                                  conjugate,
                                  scale,
                                  false,
                                  in_place ? own : work.results,
                                  in_place ? args.image_stride : work.row};
      for (int64_t n = 0; n < 2 * D; n += columns) multiply_part(product, 0, rows, n, smaller(columns, 2 * D - n));
      for (int64_t i = 0; !in_place && i < rows; i++)
        std::memcpy(own + i * args.image_stride, work.results + i * work.row, static_cast<size_t>(2 * D) * sizeof(T));
    }
  }

  // dK of block g, [D, D]; adds if there were images before.
  void multiply_gradients(const T* x, const T* grad, int64_t g) const {
    T* const all = static_cast<T*>(args.filter.dweight);
    T* const dK = all + weight(u, g);
    const T pixels = static_cast<T>(H) * static_cast<T>(args.filter.width);
    const T scale = (real ? T(0.25) : T(0.5)) / pixels;  // spectra count twice; c_v
    const int64_t columns = numbers_at_once<T>(2 * D), stride = args.image_stride;
    const Product<T> product = {{x, 2, stride}, grad,           stride, args.images, Conjugate::kLeft,
                                scale,          args.first > 0, dK,     2 * D};
    for (int64_t n = 0; n < 2 * D; n += columns) {
      for (int64_t i = 0; i < D; i += kRows)
        multiply_part(product, i, smaller(kRows, D - i), n, smaller(columns, 2 * D - n));
    }
    if (!real || minus_u <= u) return;
    T* const other = all + weight(minus_u, g);
    for (int64_t j = 0; j < 2 * D * D; j += 2) {
      other[j] = dK[j];
      other[j + 1] = -dK[j + 1];
    }
  }

  // Asks for rows of 2 D numbers that lie `ahead` of those in use, for the block or frequency that comes next.
  void prefetch_next(const T* data, int64_t row, int64_t rows, int64_t ahead) const {
    for (int64_t r = 0; r < rows; r++) {
      const char* const begin = reinterpret_cast<const char*>(data + r * row + ahead);
      const int64_t bytes = 2 * D * static_cast<int64_t>(sizeof(T));
      for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(begin + at, 0, 2);
    }
  }

  void run() const {
    if (real && 2 * u > H) return;
    const T scale = T(0.5) / (static_cast<T>(H) * static_cast<T>(args.filter.width));
    for (int64_t g = 0; g < args.groups; g++) {
      const Weights<T> K = filter(g);
      T* const x = spectra(args.x_spectra, g);
      prefetch_next(x, args.image_stride, args.images, 2 * D);
      prefetch_next(static_cast<const T*>(args.filter.weight) + weight(u, g), 2 * D, D, 2 * D * D);
      if (!args.filter.grad) {
        multiply_spectra(x, K, Conjugate::kNone, scale);
        continue;
      }
      T* const grad = spectra(args.grad_spectra, g);
      prefetch_next(grad, args.image_stride, args.images, 2 * D);
      multiply_gradients(x, grad, g);
      transpose(K.data, K.row, D, work.transposed, work.row);
      multiply_spectra(grad, {work.transposed, work.row}, Conjugate::kRight, scale);
    }
  }
};

template <class T>
void products(const FourierBlocksArgs& args, int64_t begin, int64_t end, void* memory) {
  const Work<T> work(args, memory);
  for (int64_t mode = begin; mode < end; mode++) Mode<T>(args, work, mode).run();
}

}  // namespace

int64_t fourier_blocks_room(const FourierBlocksArgs& args) {
  return args.filter.dtype == Dtype::kFloat64 ? Work<double>(args, nullptr).bytes : Work<float>(args, nullptr).bytes;
}

void fourier_blocks_products(const FourierBlocksArgs& args, int64_t begin, int64_t end, void* workspace) {
  args.filter.dtype == Dtype::kFloat64 ? products<double>(args, begin, end, workspace)
                                       : products<float>(args, begin, end, workspace);
}

}  // namespace nd::cpu::ND_CPU_LEVEL
