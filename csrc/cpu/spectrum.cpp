// Singular values and numerical ranks of many small matrices, one matrix a SIMD lane, and ranks of large ones.
//
//     sigma_1 >= .. >= sigma_k of a [m, n],  k = min(m, n),      rank_r = #{ i : sigma_i > max(atol, rtol_r sigma_1) }
//
// Methods:
//   - Inputs of at most 24 digits (float32 and shorter). Squares of them are exact in float64, so the Gram matrix G of
//     the shorter side resolves sigma / sigma_1 down to E^(1/2), E = kGramNoise k eps. k <= kLaneLimit: Householder
//     tridiagonalisation of G; then the root-free QL iteration for values, or Sturm counts for ranks. k > kLaneLimit:
//     sigma_1 by Lanczos, ranks as the inertia of G - t I by a blocked LDL' without pivoting.
//   - A count is taken at t - E' and at t + E', where E' is the error that the method can have made. Where the two
//     differ the small matrix is bidiagonalised instead, and the large one reported as kRankUndecided.
//   - float64: Householder bidiagonalisation (a Gram matrix would square the spectrum), then counts of the differential
//     quotient-difference form, bisected for values.
//   - Vectors v_i of the shorter side, for gradients (not in float64): a twisted factorisation of the tridiagonal form
//     for each eigenvalue, then the reflections. Neighbours with a gap g are orthogonal up to eps / g only, so a matrix
//     where that exceeds kVectorError gets its vectors from the implicit QL iteration instead, with the eigenvalues as
//     shifts; its rotations are kept and applied to a block of columns of all vectors, kSweeps at a time, while the
//     block is in cache. The gradient sum_i g_i u_i v_i' is a (sum_i (g_i / sigma_i) v_i v_i').
//   - hermitian (ranks): as G, but of a itself, with counts on both sides of zero.
//
// Floor, per matrix, in multiply-adds: Gram m k^2 / 2, tridiagonalisation 2/3 k^3 (each step reads and writes the
// trailing triangle once, 16 bytes for 2 multiply-adds), QL about 1.3 k^2 dependent steps of two divisions shared by
// all lanes and chains, bidiagonalisation 4/3 k^2 (3 max(m, n) - k) / 2, LDL' k^3 / 6 a count. Vectors: 2 k^2 divisions
// and k^3 for the reflections, each entry of a vector read and written once a reflection; by QL k^3 / 3 for the
// reflections and 2 for each of about k^3 rotations. Gradient: k^3 / 2 + m k^2.
//
// Layout: lane l of a vector belongs to matrix l of a group of W. The triangle of G is [k][k] vectors, its upper half
// used; two groups form a chain pair whose dependent recurrences hide each other's latency. No operation crosses lanes,
// and finished lanes are frozen by masks: a result depends on its own matrix alone. Lanes beyond the batch repeat its
// last matrix.
//
// Every matrix is scaled by a power of two to a largest entry in [0.5, 1). A matrix with NaN or infinity has NaN values
// and rank -1.
#include <cstring>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd_convert.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int W = Vec<double>::W;
typedef double V __attribute__((vector_size(ND_VECTOR_BYTES)));
typedef int64_t M __attribute__((vector_size(ND_VECTOR_BYTES)));

constexpr int64_t kPairMatrices = 2 * W;  // matrices of a chain pair
static_assert(kSpectrumGroup % kPairMatrices == 0);
constexpr int64_t kLaneLimit = 160;      // longest short side of ranks by lanes
constexpr int64_t kLaneLimitOfFew = 48;  // the same of batches below kFewMatrices, which leave most lanes empty
constexpr int64_t kFewMatrices = 4;
constexpr double kEps = 0x1p-52;
constexpr double kGramNoise = 4;       // E = kGramNoise k eps |G|: rounding of the Gram matrix and what follows
constexpr double kTopError = 4e-9;     // relative error allowed in sigma_1^2
constexpr double kLowest = -1e300;     // below every eigenvalue of a scaled matrix
constexpr double kTiny = 1e-300;       // stands for a vanishing pivot
constexpr double kResolved = 1e-12;    // of sigma_1^2: smaller eigenvalues have vectors of too few digits
constexpr double kRefined = 1e-6;      // of sigma_1^2: smaller eigenvalues have roots of too few digits
constexpr double kLeastGap = 1e-9;     // between eigenvalues whose vectors are found one by one
constexpr double kVectorError = 3e-8;  // allowed in those vectors
constexpr int kSections = 4;           // shifts a multisection step tries at once
constexpr int kTopSteps = 13;          // (kSections + 1)^-13 < 1e-9
constexpr int kSweeps = 8;             // QL sweeps applied to the vectors together
constexpr int kMaxQlSteps = 80;        // an eigenvalue; 2 to 3 are usual
constexpr int64_t kChunk = 128;        // rows of the long side converted at once
constexpr int64_t kPanel = 32;         // rows of an LDL' panel
constexpr int64_t kMaxLanczos = 300;
constexpr int64_t kLanczosCheck = 6;       // steps between looks at sigma_1^2, which has converged once it changes by
constexpr double kLanczosTol = 1e-13;      // less than this (relative) between two of them
constexpr int64_t kMostVectors = 1 << 17;  // of a matrix in lanes: longer ones are left undecided, not bidiagonalised

ND_INLINE double larger(double a, double b) { return a > b ? a : b; }

ND_INLINE V all(double x) { return V{} + x; }
ND_INLINE V abs(V x) { return reinterpret_cast<V>(reinterpret_cast<M>(x) & 0x7fffffffffffffff); }
ND_INLINE V larger(V a, V b) { return a > b ? a : b; }
ND_INLINE double abs(double x) { return __builtin_fabs(x); }
ND_INLINE V sqrt(V x) {
#if defined(__AVX512F__)
  return reinterpret_cast<V>(_mm512_maskz_sqrt_pd(0xff, reinterpret_cast<__m512d>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<V>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#else
  for (int l = 0; l < W; l++) x[l] = __builtin_sqrt(x[l]);
  return x;
#endif
}
ND_INLINE bool any(M mask) {
  int64_t found = 0;
  for (int l = 0; l < W; l++) found |= mask[l];
  return found != 0;
}

ND_INLINE double power_of_two(int64_t exponent) {  // of a normal number
  const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

// ------------------------------------------------------------------------------------------------ input

ND_INLINE double to_double(float x) { return x; }
ND_INLINE double to_double(double x) { return x; }

ND_INLINE double to_double(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

ND_INLINE double to_double(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t top = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;  // infinity and NaN keep the largest exponent
  const uint32_t bits = (magnitude << 13) + top;
  float value;
  std::memcpy(&value, &bits, 4);
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  value = magnitude < 0x0400u ? subnormal : value;
  return x.bits & 0x8000u ? -value : value;
}

// What is known of a matrix before it is decomposed.
struct Facts {
  bool finite;
  int64_t exponent;  // the largest entry is in [2^(exponent-1), 2^exponent); 0 for a zero matrix
  double largest;
};

template <class In>
Facts facts_of(const In* a, int64_t rows, int64_t columns, int64_t stride) {
  double largest = 0, poison = 0;  // poison: 0 times every entry
  for (int64_t i = 0; i < rows; i++) {
    const In* row = a + i * stride;
    Vec<double>::t top[4] = {}, sum[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= columns; j += 4 * W) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        V x;
        for (int l = 0; l < W; l++) x[l] = to_double(row[j + u * W + l]);
        top[u] = abs(x) > top[u] ? abs(x) : top[u];
        sum[u] += x * 0.0;
      }
    }
    for (int u = 0; u < 4; u++) {
      for (int l = 0; l < W; l++) {
        largest = larger(largest, top[u][l]);
        poison += sum[u][l];
      }
    }
    for (; j < columns; j++) {
      const double x = to_double(row[j]);
      largest = larger(largest, abs(x));
      poison += x * 0;
    }
  }
  Facts facts = {poison == 0, 0, largest};
  if (facts.finite && largest > 0) {
    uint64_t bits;
    const double shifted = largest < 0x1p-1000 ? largest * 0x1p100 : largest;
    std::memcpy(&bits, &shifted, 8);
    facts.exponent = static_cast<int64_t>(bits >> 52) - 1022 - (largest < 0x1p-1000 ? 100 : 0);
  }
  return facts;
}

// x * 2^-exponent in two steps, either of which a normal number can make.
struct Scale {
  double first, second;
  explicit Scale(int64_t exponent)
      : first(power_of_two(-exponent / 2)), second(power_of_two(-exponent + exponent / 2)) {}
  ND_INLINE double operator()(double x) const { return x * first * second; }
};

// Rows [begin, end) of the long side in float64, `ld` apart, zero beyond the short side.
template <class In>
void load_rows(const SpectrumArgs& args, const In* a, const Scale& scale, int64_t begin, int64_t end, int64_t ld,
               double* x) {
  const int64_t k = smaller(args.m, args.n), stride = args.row_stride;
  if (args.m >= args.n) {
    for (int64_t r = begin; r < end; r++, x += ld) {
      const In* row = a + r * stride;
      for (int64_t j = 0; j < k; j++) x[j] = scale(to_double(row[j]));
      for (int64_t j = k; j < ld; j++) x[j] = 0;
    }
    return;
  }
  for (int64_t j = 0; j < ld; j++) {
    const In* row = a + j * stride;
    for (int64_t r = begin; r < end; r++) x[(r - begin) * ld + j] = j < k ? scale(to_double(row[r])) : 0;
  }
}

// ------------------------------------------------------------------------------------------------ products

typedef double U __attribute__((vector_size(ND_VECTOR_BYTES), aligned(8), may_alias));

ND_INLINE double sum_of(V x) {
  double sum = 0;
  for (int l = 0; l < W; l++) sum += x[l];
  return sum;
}

double dot(const double* x, const double* y, int64_t count) {  // count: a multiple of 8
  V sum = {};
  for (int64_t i = 0; i < count; i += W) sum += *reinterpret_cast<const U*>(x + i) * *reinterpret_cast<const U*>(y + i);
  return sum_of(sum);
}

constexpr int kRows = ND_VECTOR_BYTES == 64 ? 8 : 4;  // of a register tile; divides the multiple of 8 that pads k
constexpr int kColumns = 3;                           // registers

// c[i0 : i0 + kRows, j : j + R W] += x[:, i0..]' y[:, j..]
template <int R>
ND_INLINE void multiply_tile(const double* x, int64_t ldx, const double* y, int64_t ldy, int64_t depth, int64_t i0,
                             int64_t j, double* c, int64_t ldc) {
  V sum[kRows][R];
#pragma GCC unroll 8
  for (int a = 0; a < kRows; a++) {
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) sum[a][r] = *reinterpret_cast<const U*>(c + (i0 + a) * ldc + j + r * W);
  }
  for (int64_t d = 0; d < depth; d++) {
    const double* left = x + d * ldx + i0;
    const double* right = y + d * ldy + j;
    V b[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) b[r] = *reinterpret_cast<const U*>(right + r * W);
#pragma GCC unroll 8
    for (int a = 0; a < kRows; a++) {
#pragma GCC unroll 3
      for (int r = 0; r < R; r++) sum[a][r] += left[a] * b[r];
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < kRows; a++) {
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) *reinterpret_cast<U*>(c + (i0 + a) * ldc + j + r * W) = sum[a][r];
  }
}

// c[i : i + kRows, begin : end] += x[:, i..]' y[:, begin..]
ND_INLINE void multiply_rows(const double* x, int64_t ldx, const double* y, int64_t ldy, int64_t depth, int64_t i,
                             int64_t begin, int64_t end, double* c, int64_t ldc) {
  int64_t j = begin;
  for (; j + kColumns * W <= end; j += kColumns * W) multiply_tile<kColumns>(x, ldx, y, ldy, depth, i, j, c, ldc);
  if (j + 2 * W <= end) {
    multiply_tile<2>(x, ldx, y, ldy, depth, i, j, c, ldc);
    j += 2 * W;
  }
  if (j < end) multiply_tile<1>(x, ldx, y, ldy, depth, i, j, c, ldc);
}

// Upper triangle of c[begin : end, begin : end] += x' y for x, y [depth, ld]; begin and end are multiples of 8.
void multiply_upper(const double* x, const double* y, int64_t ld, int64_t depth, int64_t begin, int64_t end, double* c,
                    int64_t ldc) {
  for (int64_t i = begin; i < end; i += kRows)
    multiply_rows(x, ld, y, ld, depth, i, begin + (i - begin) / W * W, end, c, ldc);
}

// c [rows, columns] = x' y for x [depth, rows], y [depth, columns]; rows and columns are multiples of 8.
void multiply(const double* x, int64_t ldx, const double* y, int64_t ldy, int64_t depth, int64_t rows, int64_t columns,
              double* c, int64_t ldc) {
  std::memset(c, 0, static_cast<size_t>(rows * ldc) * sizeof(double));
  for (int64_t i = 0; i < rows; i += kRows) multiply_rows(x, ldx, y, ldy, depth, i, 0, columns, c, ldc);
}

// Leading dimension of k columns: whole cache lines, an odd number of them, so that rows spread over the cache.
ND_INLINE int64_t leading(int64_t k) { return round_up(k, 8) | 8; }

// Upper triangle of the Gram matrix of the short side, or of a itself (from its lower triangle) if hermitian, scaled.
template <class In>
void symmetric_form(const SpectrumArgs& args, const In* a, const Facts& facts, double* g, double* x) {
  const int64_t k = smaller(args.m, args.n), ld = leading(k), padded = round_up(k, 8);
  const Scale scale(facts.exponent);
  if (args.hermitian) {
    for (int64_t i = 0; i < k; i++) {
      for (int64_t j = i; j < k; j++) g[i * ld + j] = scale(to_double(a[j * args.row_stride + i]));
    }
    return;
  }
  std::memset(g, 0, static_cast<size_t>(padded * ld) * sizeof(double));
  const int64_t depth = larger(args.m, args.n);
  for (int64_t r = 0; r < depth; r += kChunk) {
    const int64_t count = smaller(kChunk, depth - r);
    load_rows(args, a, scale, r, r + count, ld, x);
    multiply_upper(x, x, ld, count, 0, padded, g, ld);
  }
}

// ------------------------------------------------------------------------------------------------ tridiagonal form

struct Reflection {
  V beta, tau, scale;
};

// I - tau v v' that maps (alpha, rest) to (beta, 0), v = (1, scale rest), from squares = |rest|^2.
ND_INLINE Reflection reflection(V alpha, V squares) {
  const V norm = sqrt(alpha * alpha + squares);
  const V beta = alpha > 0 ? -norm : norm;
  const M trivial = squares == 0;
  const V zero = {};
  return {trivial ? alpha : beta, trivial ? zero : (beta - alpha) / (trivial ? all(1) : beta),
          trivial ? zero : 1.0 / (trivial ? all(1) : alpha - beta)};
}

// R rows [i, i + R) of one step: a -= v w' + w v' (of the step before), then p += a next, with a the upper triangle.
template <int R, bool kUpdate>
ND_INLINE void tridiagonal_rows(V* a, int64_t k, int64_t i, const V* v, const V* w, const V* next, V* p) {
  V row_v[R], row_w[R], row_next[R], sum[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    row_v[r] = v[i + r];
    row_w[r] = w[i + r];
    row_next[r] = next[i + r];
    sum[r] = V{};
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    V* row = a + (i + r) * k;
#pragma GCC unroll 4
    for (int c = r; c < R; c++) {
      V x = row[i + c];
      if (kUpdate) x -= row_v[r] * row_w[c] + row_w[r] * row_v[c];
      row[i + c] = x;
      sum[r] += x * row_next[c];
      if (c > r) sum[c] += x * row_next[r];
    }
  }
  for (int64_t j = i + R; j < k; j++) {
    const V vj = v[j], wj = w[j], nj = next[j];
    V pj = p[j];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      V x = a[(i + r) * k + j];
      if (kUpdate) {
        x -= row_v[r] * wj;
        x -= row_w[r] * vj;
        a[(i + r) * k + j] = x;
      }
      sum[r] += x * nj;
      pj += x * row_next[r];
    }
    p[j] = pj;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) p[i + r] += sum[r];
}

template <bool kUpdate>
void tridiagonal_step(V* a, int64_t k, int64_t first, const V* v, const V* w, const V* next, V* p) {
  constexpr int R = ND_VECTOR_BYTES == 64 ? 4 : 2;
  int64_t i = first;
  for (; i + R <= k; i += R) tridiagonal_rows<R, kUpdate>(a, k, i, v, w, next, p);
  for (; i < k; i++) tridiagonal_rows<1, kUpdate>(a, k, i, v, w, next, p);
}

// Diagonal d [k] and off-diagonal e [k] (the last one 0) of a matrix similar to a, whose upper triangle is destroyed.
// Row i of a keeps the reflection of step i in columns i + 1.., with tau in tau[i], where tau is given.
void tridiagonalise(V* a, int64_t k, V* d, V* e, V* tau, V* work) {
  V *v = work, *w = v + k, *next = w + k, *p = next + k;
  for (int64_t s = 0; s < k; s++) {
    V* row = a + s * k;
    if (s > 0) {
      const V vs = v[s], ws = w[s];
      for (int64_t j = s; j < k; j++) row[j] -= vs * w[j] + ws * v[j];
    }
    d[s] = row[s];
    e[s] = V{};
    if (s == k - 1) break;
    V squares = {};
    for (int64_t j = s + 2; j < k; j++) squares += row[j] * row[j];
    const Reflection h = reflection(row[s + 1], squares);
    e[s] = h.beta;
    next[s + 1] = all(1);
    p[s + 1] = V{};
    for (int64_t j = s + 2; j < k; j++) {
      next[j] = row[j] * h.scale;
      p[j] = V{};
    }
    if (s > 0) {
      tridiagonal_step<true>(a, k, s + 1, v, w, next, p);
    } else {
      tridiagonal_step<false>(a, k, s + 1, v, w, next, p);
    }
    V dot = {};
    for (int64_t j = s + 1; j < k; j++) {
      p[j] *= h.tau;
      dot += p[j] * next[j];
    }
    const V half = 0.5 * h.tau * dot;
    for (int64_t j = s + 1; j < k; j++) {
      w[j] = p[j] - half * next[j];
      v[j] = next[j];
      if (tau) row[j] = next[j];
    }
    if (tau) tau[s] = h.tau;
  }
}

// Scales d, e to largest row sum 1; returns the row sum.
V normalise(V* d, V* e, int64_t k) {
  V norm = {}, before = {};
  for (int64_t i = 0; i < k; i++) {
    const V after = abs(e[i]);
    norm = larger(norm, abs(d[i]) + before + after);
    before = after;
  }
  const V factor = norm > 0 ? 1.0 / (norm > 0 ? norm : all(1)) : V{};
  for (int64_t i = 0; i < k; i++) {
    d[i] *= factor;
    e[i] *= factor;
  }
  return norm;
}

// Number of eigenvalues above shift[c][s] of the tridiagonal matrices of C chains; d and squared e are [k][C].
template <int C, int S>
ND_INLINE void count_above(const V* d, const V* e2, int64_t k, const V (&shift)[C][S], M (&count)[C][S]) {
  V pivot[C][S];
#pragma GCC unroll 2
  for (int c = 0; c < C; c++) {
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
      pivot[c][s] = d[c] - shift[c][s];
      count[c][s] = M{};
    }
  }
  for (int64_t i = 0;;) {
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) {
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) {
        V& q = pivot[c][s];
        q = abs(q) < kTiny ? all(-kTiny) : q;
        count[c][s] -= q > 0;
      }
    }
    if (++i == k) break;
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) {
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) pivot[c][s] = d[i * C + c] - shift[c][s] - e2[(i - 1) * C + c] / pivot[c][s];
    }
  }
}

// Largest eigenvalue by multisection of [low, high]; count_above_many(shift, count) as count_above.
template <int C, class Count>
ND_INLINE void top_by_sections(const Count& count_above_many, V (&low)[C], V (&high)[C]) {
  for (int step = 0; step < kTopSteps; step++) {
    V shift[C][kSections];
    M count[C][kSections];
    for (int c = 0; c < C; c++) {
      const V width = (high[c] - low[c]) * (1.0 / (kSections + 1));
      for (int s = 0; s < kSections; s++) shift[c][s] = low[c] + width * static_cast<double>(s + 1);
    }
    count_above_many(shift, count);
    for (int c = 0; c < C; c++) {
      for (int s = 0; s < kSections; s++) low[c] = count[c][s] > 0 ? shift[c][s] : low[c];
      for (int s = kSections - 1; s >= 0; s--) high[c] = count[c][s] > 0 ? high[c] : shift[c][s];
    }
  }
}

template <int C>
void tridiagonal_top(const V* d, const V* e2, int64_t k, V (&top)[C]) {
  V low[C], high[C];
  for (int c = 0; c < C; c++) {
    low[c] = d[c];
    for (int64_t i = 1; i < k; i++) low[c] = larger(low[c], d[i * C + c]);
    high[c] = all(1 + 8 * kEps);
  }
  top_by_sections<C>([=](const auto& shift, auto& count) { count_above<C, kSections>(d, e2, k, shift, count); }, low,
                     high);
  for (int c = 0; c < C; c++) top[c] = 0.5 * (low[c] + high[c]);
}

// d [k][C] becomes the eigenvalues of the tridiagonal matrices in any order: root-free QL with Wilkinson's shift. Row
// sums are at most 1; e2 [k][C] holds squares and is destroyed.
template <int C>
void eigenvalues(V* d, V* e2, int64_t k) {
  constexpr double kNegligible = kEps * kEps;
  for (int64_t l = 0; l + 1 < k; l++) {
    for (int step = 0; step < kMaxQlSteps; step++) {
      M active[C], some = {};
      V sigma[C], c[C], s[C], gamma[C], p[C];
#pragma GCC unroll 2
      for (int t = 0; t < C; t++) {
        active[t] = e2[l * C + t] > kNegligible;
        some |= active[t];
        const V root = active[t] ? sqrt(e2[l * C + t]) : all(1);
        const V g = (d[(l + 1) * C + t] - d[l * C + t]) / (2.0 * root);
        const V h = sqrt(g * g + 1.0);
        sigma[t] = d[l * C + t] - root / (g + (g < 0 ? -h : h));
        c[t] = all(1);
        s[t] = V{};
        gamma[t] = d[(k - 1) * C + t] - sigma[t];
        p[t] = gamma[t] * gamma[t];
      }
      if (!any(some)) break;
      for (int64_t i = k - 2; i >= l; i--) {
#pragma GCC unroll 2
        for (int t = 0; t < C; t++) {
          V &off = e2[i * C + t], &below = d[(i + 1) * C + t];
          const V b = off, r = p[t] + b, alpha = d[i * C + t];
          if (i != k - 2) e2[(i + 1) * C + t] = active[t] ? s[t] * r : e2[(i + 1) * C + t];
          const M split = r == 0;  // a zero off-diagonal at an exact shift
          const V inverse = 1.0 / (split ? all(1) : r), before = c[t], old = gamma[t];
          c[t] = split ? all(1) : p[t] * inverse;
          s[t] = b * inverse;
          gamma[t] = c[t] * (alpha - sigma[t]) - s[t] * old;
          below = active[t] ? old + (alpha - gamma[t]) : below;
          const M exact = c[t] == 0;
          p[t] = exact ? before * b : gamma[t] * gamma[t] / (exact ? all(1) : c[t]);
        }
      }
#pragma GCC unroll 2
      for (int t = 0; t < C; t++) {
        e2[l * C + t] = active[t] ? s[t] * p[t] : e2[l * C + t];
        d[l * C + t] = active[t] ? sigma[t] + gamma[t] : d[l * C + t];
      }
    }
  }
}

constexpr int kBlock = ND_VECTOR_BYTES == 64 ? 8 : 4;  // columns of a block of vectors, or vectors
constexpr int kTwisted = 4;                            // vectors that hide each other's latency
static_assert(kBlock % kTwisted == 0);

// Vectors of the rows i and columns j of z lie in blocks of columns, [k / kBlock][k][kBlock], which every pass streams.
ND_INLINE int64_t at_block(int64_t i, int64_t j, int64_t k) { return (j / kBlock * k + i) * kBlock + j % kBlock; }

// rows [kBlock, k] times the reflections that tridiagonalise left in a and tau, from number `last` down to 0. A pass
// over the rows applies one and takes the products with the next.
void apply_reflections(const V* a, const V* tau, int64_t k, int64_t last, V* rows) {
  if (last < 0) return;
  V dots[kBlock] = {};
  for (int64_t j = last + 1; j < k; j++) {
    for (int r = 0; r < kBlock; r++) dots[r] += rows[r * k + j] * a[last * k + j];
  }
  for (int64_t s = last; s > 0; s--) {
    const V *v = a + s * k, *next = v - k;
    V factor[kBlock], next_dots[kBlock];
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; r++) {
      factor[r] = dots[r] * tau[s];
      next_dots[r] = rows[r * k + s];  // next[s] is 1
    }
    for (int64_t j = s + 1; j < k; j++) {
      const V vj = v[j], nj = next[j];
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; r++) {
        const V x = rows[r * k + j] - factor[r] * vj;
        rows[r * k + j] = x;
        next_dots[r] += x * nj;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; r++) dots[r] = next_dots[r];
  }
  for (int r = 0; r < kBlock; r++) {
    for (int64_t j = 1; j < k; j++) rows[r * k + j] -= dots[r] * tau[0] * a[j];
  }
}

// Row i of z becomes column i of the product of the reflections. Rows are independent: kBlock of them meet all
// reflections in rows [kBlock, k], which stay in cache.
void accumulate_reflections(const V* a, const V* tau, int64_t k, V* z, V* rows) {
  for (int64_t first = 0; first < k; first += kBlock) {
    for (int64_t i = 0; i < kBlock * k; i++) rows[i] = V{};
    for (int64_t r = 0; r < kBlock && first + r < k; r++) rows[r * k + first + r] = all(1);
    apply_reflections(a, tau, k, smaller(first + kBlock, k) - 2, rows);
    for (int64_t r = 0; r < kBlock && first + r < k; r++) {
      for (int64_t j = 0; j < k; j++) z[at_block(first + r, j, k)] = rows[r * k + j];
      for (int64_t j = k; j < round_up(k, kBlock); j++) z[at_block(first + r, j, k)] = V{};
    }
  }
}

// The vectors of lane l on their own: separate [k, ld] from z.
void separate_lane(const V* z, int64_t k, int64_t ld, int l, double* separate) {
  for (int64_t j = 0; j < k; j++) {
    for (int64_t i = 0; i < k; i++) separate[i * ld + j] = z[at_block(i, j, k)][l];
  }
}

// Rotations of rows i and i + 1 by (c[i], s[i]), i from k - 2 down to last.
struct Sweep {
  V *c, *s;  // [k]
  int64_t last;
};

// Makes `sweep` reach down to `last`, by rotations that do nothing.
void extend(Sweep& sweep, int64_t last) {
  for (; sweep.last > last; sweep.last--) {
    sweep.c[sweep.last - 1] = all(1);
    sweep.s[sweep.last - 1] = V{};
  }
}

// Two sweeps of one length on a block of columns, the second one row behind the first, so that a row is read and
// written once.
ND_INLINE void rotate(V* block, int64_t k, const Sweep& one, const Sweep& two) {
  V first[kBlock], second[kBlock];  // rows that wait for their next rotation
#pragma GCC unroll 8
  for (int j = 0; j < kBlock; j++) {
    const V low = block[(k - 1) * kBlock + j], high = block[(k - 2) * kBlock + j];
    const V c = one.c[k - 2], s = one.s[k - 2];
    second[j] = s * high + c * low;
    first[j] = c * high - s * low;
  }
  for (int64_t i = k - 3; i >= one.last; i--) {
    const V c0 = one.c[i], s0 = one.s[i], c1 = two.c[i + 1], s1 = two.s[i + 1];
    V* row = block + i * kBlock;
#pragma GCC unroll 8
    for (int j = 0; j < kBlock; j++) {
      const V high = row[j], between = s0 * high + c0 * first[j];
      first[j] = c0 * high - s0 * first[j];
      row[2 * kBlock + j] = s1 * between + c1 * second[j];
      second[j] = c1 * between - s1 * second[j];
    }
  }
  const V c = two.c[one.last], s = two.s[one.last];
#pragma GCC unroll 8
  for (int j = 0; j < kBlock; j++) {
    block[(one.last + 1) * kBlock + j] = s * first[j] + c * second[j];
    block[one.last * kBlock + j] = c * first[j] - s * second[j];
  }
}

// Sweeps that wait until there are enough of them to be worth a pass over z: each block meets all while it is in cache.
struct Sweeps {
  V *z, *rotations;  // rotations [kSweeps, 2, k]
  int64_t k;
  int count = 0;
  Sweep waiting[kSweeps] = {};

  Sweep& next(int64_t last) {
    V* c = rotations + count * 2 * k;
    waiting[count] = {c, c + k, last};
    return waiting[count];
  }

  void push() {
    if (++count == kSweeps) apply();
  }

  void apply() {
    if (count % 2) {
      next(k - 1);
      count++;
    }
    for (int s = 0; s < count; s += 2) extend(waiting[s + 1], waiting[s].last);
    for (V* block = z; block < z + k * round_up(k, kBlock); block += k * kBlock) {
      for (int s = 0; s < count; s += 2) rotate(block, k, waiting[s], waiting[s + 1]);
    }
    count = 0;
  }
};

ND_INLINE V wilkinson_shift(const V* d, const V* e, int64_t l, M active) {
  const V off = active ? e[l] : all(1), slope = (d[l + 1] - d[l]) / (2.0 * off), root = sqrt(slope * slope + 1.0);
  return d[l] - off / (slope + (slope < 0 ? -root : root));
}

// One implicit QL step on rows l.. of the tridiagonal matrices d, e of the lanes `active`. It starts anew above every
// off-diagonal that vanishes, as nothing passes one.
void ql_step(V* d, V* e, int64_t k, int64_t l, V shift, M active, const Sweep& sweep) {
  const V one = all(1), zero = {};
  V g = d[k - 1] - shift, sine = one, cosine = one, p = zero;
  M fresh = one > zero;
  for (int64_t i = k - 2; i >= l; i--) {
    const V off = e[i], f = sine * off, b = cosine * off, r = sqrt(f * f + g * g);
    const M split = abs(off) <= kEps, trivial = r == 0;
    e[i + 1] = active & ~fresh ? (split ? g : r) : e[i + 1];
    const V inverse = 1.0 / (trivial ? one : r);
    sine = split ? zero : f * inverse;
    cosine = split | trivial ? one : g * inverse;
    const V shifted = d[i + 1] - p, turn = (d[i] - shifted) * sine + 2.0 * cosine * b;
    sweep.c[i] = active ? cosine : one;
    sweep.s[i] = active ? sine : zero;
    p = sine * turn;  // 0 at a split
    d[i + 1] = active ? shifted + p : d[i + 1];
    g = split ? d[i] - shift : cosine * turn - b;
    sine = split ? one : sine;
    fresh = split;
  }
  d[l] = active ? d[l] - p : d[l];
  e[l] = active ? g : e[l];
}

// The rows of z become the eigenvectors of a tridiagonal matrix in its basis. Row sums are at most 1; d and e are
// destroyed. The rotations of z are the dear part: `known` eigenvalues as shifts save some of the sweeps.
// rotations: [kSweeps, 2, k].
void eigenvectors_by_ql(V* d, V* e, const V* known, int64_t k, V* z, V* rotations) {
  Sweeps sweeps = {z, rotations, k};
  for (int64_t l = 0; l + 1 < k; l++) {
    for (int step = 0; step < kMaxQlSteps; step++) {
      const M active = abs(e[l]) > kEps;
      if (!any(active)) break;
      const V shift = step == 0 ? known[l] : wilkinson_shift(d, e, l, active);
      ql_step(d, e, k, l, shift, active, sweeps.next(l));
      sweeps.push();
    }
  }
  if (sweeps.count > 0) sweeps.apply();
}

// Unit eigenvectors, rows [kTwisted, k], of a tridiagonal matrix whose row sums are at most 1, for kTwisted of its
// eigenvalues: with the pivots p of LDL' from the top and u of UDU' from the bottom, the vector is solved outwards from
// the row where its inverse has the largest diagonal entry, that is gamma = p - e^2 / u is least. Returned are the
// residuals, 1 where the vector overflows. work: [2, k, kTwisted].
void twisted_vectors(const V* d, const V* e, const V* eigenvalue, int64_t k, V* rows, V* residual, V* work) {
  constexpr int S = kTwisted;
  constexpr double kLeast = 1e-30;  // of a pivot
  V *upper = work, *lower = work + k * S;
  V pivot[S], least[S], turn[S], norm[S], x[S];
  for (int s = 0; s < S; s++) pivot[s] = d[k - 1] - eigenvalue[s];
  for (int64_t i = k - 2; i >= 0; i--) {
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
      const V ratio = e[i] / (abs(pivot[s]) < kLeast ? all(kLeast) : pivot[s]);
      upper[i * S + s] = ratio;
      pivot[s] = d[i] - eigenvalue[s] - e[i] * ratio;
    }
  }
  for (int s = 0; s < S; s++) {
    pivot[s] = d[0] - eigenvalue[s];
    least[s] = all(1e300);
    turn[s] = norm[s] = x[s] = V{};
    upper[(k - 1) * S + s] = V{};
  }
  for (int64_t i = 0; i < k; i++) {
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
      const V gamma = abs(pivot[s] - e[i] * upper[i * S + s]);
      turn[s] = gamma < least[s] ? all(static_cast<double>(i)) : turn[s];
      least[s] = gamma < least[s] ? gamma : least[s];
      const V ratio = e[i] / (abs(pivot[s]) < kLeast ? all(kLeast) : pivot[s]);
      lower[i * S + s] = ratio;
      if (i + 1 < k) pivot[s] = d[i + 1] - eigenvalue[s] - e[i] * ratio;
    }
  }
  for (int64_t i = k - 1; i >= 0; i--) {
    const V row = all(static_cast<double>(i));
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
      const V above = -lower[i * S + s] * x[s], zero = {};
      x[s] = row < turn[s] ? above : row == turn[s] ? all(1) : zero;
      rows[s * k + i] = x[s];
      norm[s] += x[s] * x[s];
    }
  }
  for (int64_t i = 1; i < k; i++) {
    const V row = all(static_cast<double>(i)), zero = {};
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
      const V below = -upper[(i - 1) * S + s] * x[s];
      x[s] = row > turn[s] ? below : rows[s * k + i];
      rows[s * k + i] = x[s];
      norm[s] += row > turn[s] ? x[s] * x[s] : zero;
    }
  }
  for (int s = 0; s < S; s++) {
    const V scale = 1.0 / sqrt(norm[s]);
    for (int64_t i = 0; i < k; i++) rows[s * k + i] *= scale;
    residual[s] = scale > 0 ? least[s] * scale : all(1);
  }
}

// ------------------------------------------------------------------------------------------------ bidiagonal form

// Diagonal d and superdiagonal e (the last one 0) of a bidiagonal matrix with the singular values of the matrix whose
// columns are a [k][m], m >= k. One pass over the trailing columns a step applies the two reflections of the step
// before and multiplies by the next; work: 3 m + 4 k vectors.
void bidiagonalise(V* a, int64_t m, int64_t k, V* d, V* e, V* work) {
  V *v = work, *next = v + m, *z = next + m, *w = z + m, *u = w + k, *next_w = u + k, *next_u = next_w + k;
  for (int64_t s = 0; s < k; s++) {
    V* column = a + s * m;
    if (s > 0) {
      for (int64_t i = s; i < m; i++) column[i] -= v[i] * w[s] + z[i] * u[s];
    }
    V squares = {};
    for (int64_t i = s + 1; i < m; i++) squares += column[i] * column[i];
    const Reflection left = reflection(column[s], squares);
    d[s] = left.beta;
    e[s] = V{};
    if (s == k - 1) break;
    next[s] = all(1);
    for (int64_t i = s + 1; i < m; i++) next[i] = column[i] * left.scale;
    V row_squares = {};
    for (int64_t j = s + 1; j < k; j++) {
      V* c = a + j * m;
      V dot = {};
      if (s > 0) {
        const V wj = w[j], uj = u[j];
        for (int64_t i = s; i < m; i++) {
          const V x = c[i] - v[i] * wj - z[i] * uj;
          c[i] = x;
          dot += next[i] * x;
        }
      } else {
        for (int64_t i = s; i < m; i++) dot += next[i] * c[i];
      }
      next_w[j] = left.tau * dot;
      next_u[j] = c[s] - next_w[j];
      if (j > s + 1) row_squares += next_u[j] * next_u[j];
    }
    const Reflection right = reflection(next_u[s + 1], row_squares);
    e[s] = right.beta;
    next_u[s + 1] = all(1);
    for (int64_t j = s + 2; j < k; j++) next_u[j] *= right.scale;
    V overlap = {};
    for (int64_t j = s + 1; j < k; j++) overlap += next_w[j] * next_u[j];
    for (int64_t i = s + 1; i < m; i++) z[i] = -next[i] * overlap;
    for (int64_t j = s + 1; j < k; j++) {
      const V* c = a + j * m;
      const V uj = next_u[j];
      for (int64_t i = s + 1; i < m; i++) z[i] += c[i] * uj;
    }
    for (int64_t i = s + 1; i < m; i++) {
      z[i] *= right.tau;
      v[i] = next[i];
    }
    for (int64_t j = s + 1; j < k; j++) {
      w[j] = next_w[j];
      u[j] = next_u[j];
    }
  }
}

// Scales d, e to a largest |d_i| + |e_i| + |e_(i-1)| of 1 and squares both; returns what was largest.
V normalise_bidiagonal(V* d, V* e, int64_t k) {
  const V norm = normalise(d, e, k);
  for (int64_t i = 0; i < k; i++) {
    d[i] *= d[i];
    e[i] *= e[i];
  }
  return norm;
}

// Number of singular values above shift (not squared), from squares d2, e2.
template <int S>
ND_INLINE void count_singular_above(const V* d2, const V* e2, int64_t k, const V (&shift)[1][S], M (&count)[1][S]) {
  V t[S], square[S];
  for (int s = 0; s < S; s++) {
    square[s] = shift[0][s] * shift[0][s];
    t[s] = -square[s];
    count[0][s] = M{};
  }
  for (int64_t i = 0; i < k; i++) {
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
      V p = d2[i] + t[s];
      p = abs(p) < kTiny ? all(-kTiny) : p;
      count[0][s] -= p > 0;
      t[s] = t[s] * (e2[i] / p) - square[s];
    }
  }
}

V bidiagonal_top(const V* d2, const V* e2, int64_t k) {
  V low[1] = {V{}}, high[1] = {all(1 + 8 * kEps)};
  for (int64_t i = 0; i < k; i++) low[0] = larger(low[0], d2[i]);
  low[0] = sqrt(low[0]) * (1 - 4 * kEps);
  const auto count = [=](const auto& shift, auto& counts) {
    count_singular_above<kSections>(d2, e2, k, shift, counts);
  };
  top_by_sections<1>(count, low, high);
  top_by_sections<1>(count, low, high);  // to the last digits, as float64 input may ask
  return 0.5 * (low[0] + high[0]);
}

// values [k], descending: a grid of k shifts brackets each, then bisection of kSections values at a time.
void bidiagonal_values(const V* d2, const V* e2, int64_t k, V* values, V* work) {
  V* low = work;
  V* high = work + k;
  for (int64_t r = 0; r < k; r++) {
    low[r] = V{};
    high[r] = all(1 + 8 * kEps);
  }
  for (int64_t g = 0; g < k; g += kSections) {
    V shift[1][kSections];
    M count[1][kSections];
    for (int s = 0; s < kSections; s++)
      shift[0][s] = all(static_cast<double>(smaller(g + s + 1, k)) / static_cast<double>(k + 1));
    count_singular_above<kSections>(d2, e2, k, shift, count);
    for (int64_t r = 0; r < k; r++) {
      for (int s = 0; s < kSections; s++) {
        const M above = count[0][s] > r;
        low[r] = above ? larger(low[r], shift[0][s]) : low[r];
        high[r] = ~above & (shift[0][s] < high[r]) ? shift[0][s] : high[r];
      }
    }
  }
  constexpr int kBits = 54;
  int steps = kBits;
  for (int64_t grid = k + 1; grid > 1; grid /= 2) steps--;
  for (int64_t r = 0; r < k; r += kSections) {
    for (int step = 0; step < steps; step++) {
      V shift[1][kSections];
      M count[1][kSections];
      for (int s = 0; s < kSections; s++) {
        const int64_t i = smaller(r + s, k - 1);
        shift[0][s] = 0.5 * (low[i] + high[i]);
      }
      count_singular_above<kSections>(d2, e2, k, shift, count);
      for (int s = 0; s < kSections && r + s < k; s++) {
        const M above = count[0][s] > r + s;
        low[r + s] = above ? shift[0][s] : low[r + s];
        high[r + s] = above ? high[r + s] : shift[0][s];
      }
    }
  }
  for (int64_t r = 0; r < k; r++) values[r] = 0.5 * (low[r] + high[r]);
}

// ------------------------------------------------------------------------------------------------ groups of lanes

// Addresses in the workspace of a task.
struct LaneWork {
  V* a;                                    // [k, k] symmetric form, or [k, long side] columns of the bidiagonalisation
  V *d, *e;                                // [k, 2] by chain
  V* work;                                 // vectors of one decomposition
  double *g, *x;                           // Gram matrix [padded k, ld] and rows [kChunk, ld] of one matrix
  double* sorted;                          // [k]
  V *form_d, *form_e, *tau, *eigenvalues;  // [k] each, for vectors
  V *z, *rows, *rotations, *gap;           // [k, k], [kBlock, k], [kSweeps, 2, k] and [k], for vectors
  double* vectors;                         // [W, k, ld]
  int64_t* order;                          // [W, k] positions of the eigenvalues, descending
  // For gradients, of one matrix: the short side by the long one [padded k, leading(longer)], weighted vectors by rows
  // and their product with the vectors [padded k, ld], the result.
  double *long_rows, *weighted, *symmetric, *product;
  int64_t bytes;

  LaneWork(const SpectrumArgs& args, bool bidiagonal, void* workspace) {
    const int64_t k = smaller(args.m, args.n), longer = larger(args.m, args.n), ld = leading(k);
    bytes = 0;
    char* base = static_cast<char*>(workspace);
    const auto place = [&]<class T>(T*& pointer, int64_t count) {
      pointer = reinterpret_cast<T*>(base ? base + bytes : nullptr);
      bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    };
    place(a, k * (bidiagonal ? longer : k));
    place(d, 2 * k);
    place(e, 2 * k);
    place(work, larger(2 * kTwisted * k, bidiagonal ? 3 * longer + 4 * k : 0));
    place(g, round_up(k, 8) * ld);
    place(x, kChunk * ld);
    place(sorted, k);
    const int64_t vectors = args.basis || args.gradient ? 1 : 0, padded = round_up(k, 8);
    for (V** pointer : {&form_d, &form_e, &tau, &eigenvalues, &gap}) place(*pointer, vectors * k);
    place(z, vectors * k * round_up(k, kBlock));
    place(rows, vectors * kBlock * k);
    place(rotations, vectors * kSweeps * 2 * k);
    place(this->vectors, vectors * W * k * ld);
    place(order, vectors * W * k);
    const int64_t gradients = args.gradient ? 1 : 0;
    place(long_rows, gradients * padded * leading(longer));
    place(weighted, gradients * k * ld);
    place(symmetric, gradients * padded * ld);
    place(product, gradients * larger(padded * leading(longer), round_up(longer, 8) * ld));
  }
};

ND_INLINE bool is_double(const SpectrumArgs& args) { return args.dtype == Dtype::kFloat64; }

// float64 input needs the bidiagonal form, other input may.
bool needs_bidiagonal(const SpectrumArgs& args) {
  return !args.basis && !args.gradient && !args.hermitian &&
         (is_double(args) || (args.rank && args.m * args.n <= kMostVectors));
}

template <class In>
const In* matrix(const SpectrumArgs& args, int64_t b) {
  return static_cast<const In*>(args.a) + b * args.batch_stride;
}

// Symmetric forms of matrices [first, first + W) into lanes of a [k, k].
template <class In>
void load_symmetric(const SpectrumArgs& args, int64_t first, const Facts* facts, const LaneWork& at, V* a) {
  const int64_t k = smaller(args.m, args.n), ld = leading(k);
  double* lanes = reinterpret_cast<double*>(a);
  for (int l = 0; l < W; l++) {
    if (!facts[l].finite) {
      for (int64_t i = 0; i < k * k; i++) lanes[i * W + l] = 0;
      continue;
    }
    const int64_t b = smaller(first + l, args.batch - 1);
    if (l == 0 || b == first + l) symmetric_form(args, matrix<In>(args, b), facts[l], at.g, at.x);
    for (int64_t i = 0; i < k; i++) {
      for (int64_t j = i; j < k; j++) lanes[(i * k + j) * W + l] = at.g[i * ld + j];
    }
  }
}

// Columns (of the longer side) of matrices [first, first + W) into lanes of a [k][longer].
template <class In>
void load_columns(const SpectrumArgs& args, int64_t first, const Facts* facts, const LaneWork& at) {
  const int64_t longer = larger(args.m, args.n);
  double* lanes = reinterpret_cast<double*>(at.a);
  for (int l = 0; l < W; l++) {
    const In* a = matrix<In>(args, smaller(first + l, args.batch - 1));
    const Scale scale(facts[l].exponent);
    for (int64_t i = 0; i < args.m; i++) {
      for (int64_t j = 0; j < args.n; j++) {
        const int64_t at_lane = (args.m >= args.n ? j * longer + i : i * longer + j) * W + l;
        lanes[at_lane] = facts[l].finite ? scale(to_double(a[i * args.row_stride + j])) : 0;
      }
    }
  }
}

template <class T>
T nan_of() {
  return static_cast<T>(__builtin_nan(""));
}

// Sorted singular values of lane l, chain c: root of values * norm, or values * norm, times 2^exponent.
template <class T>
void store_values(const SpectrumArgs& args, int64_t b, const Facts& facts, const double* value, int64_t step,
                  double norm, bool squared, double* sorted) {
  const int64_t k = smaller(args.m, args.n);
  T* out = static_cast<T*>(args.values) + b * k;
  if (!facts.finite) {
    for (int64_t i = 0; i < k; i++) out[i] = nan_of<T>();
    return;
  }
  const Scale unscale(-facts.exponent);
  for (int64_t i = 0; i < k; i++) {
    const double x = larger(value[i * step], 0.0) * norm;
    int64_t j = i;
    for (; j > 0 && sorted[j - 1] < x; j--) sorted[j] = sorted[j - 1];
    sorted[j] = x;
  }
  for (int64_t i = 0; i < k; i++) out[i] = static_cast<T>(unscale(squared ? __builtin_sqrt(sorted[i]) : sorted[i]));
}

// Thresholds over sigma_1, not squared, of tolerance r: max(atol, rtol sigma_1) / unit, lane by lane.
V threshold(const SpectrumArgs& args, int64_t r, const Facts* facts, V top, V unit) {
  V t;
  for (int l = 0; l < W; l++) {
    const double atol = args.atol > 0 ? Scale(facts[l].exponent)(args.atol) : 0;
    t[l] = larger(atol, args.rtol[r] * top[l] * unit[l]) / larger(unit[l], kTiny);
  }
  return t;
}

void store_rank(const SpectrumArgs& args, int64_t b, int64_t r, const Facts& facts, int64_t count) {
  int64_t* out = args.rank + b * args.num_rtol + r;
  *out = !facts.finite ? -1 : facts.largest == 0 ? 0 : count;
}

// Ranks of matrices [first, first + W) from the bidiagonal form; only those marked in `wanted`.
template <class In>
void ranks_by_bidiagonal(const SpectrumArgs& args, int64_t first, int64_t end, const Facts* facts, const LaneWork& at,
                         const bool* wanted) {
  const int64_t k = smaller(args.m, args.n), longer = larger(args.m, args.n);
  load_columns<In>(args, first, facts, at);
  bidiagonalise(at.a, longer, k, at.d, at.e, at.work);
  const V norm = normalise_bidiagonal(at.d, at.e, k);
  const V top = bidiagonal_top(at.d, at.e, k);
  for (int64_t r = 0; r < args.num_rtol; r++) {
    const V shift[1][1] = {{threshold(args, r, facts, top, norm)}};
    M count[1][1];
    count_singular_above<1>(at.d, at.e, k, shift, count);
    for (int l = 0; l < W && first + l < end; l++) {
      if (wanted[l]) store_rank(args, first + l, r, facts[l], count[0][0][l]);
    }
  }
}

// Tridiagonal form of W matrices: reflections in a [k, k] and tau [k], whose last entry is the row sum by which
// diagonal d [k] and off-diagonal e [k] are divided; eigenvalues [k] of d, e in any order.
struct Form {
  V *a, *tau, *d, *e, *eigenvalues;
};

// Where the form of matrices [first, first + W) lies: in args.forms, or else in the workspace, without reflections if
// only values are wanted.
Form form_of(const SpectrumArgs& args, int64_t first, const LaneWork& at) {
  const int64_t k = smaller(args.m, args.n);
  if (!args.forms) {
    if (args.basis || args.gradient) return {at.a, at.tau, at.form_d, at.form_e, at.eigenvalues};
    return {at.a, nullptr, at.work + 4 * k, at.work + 5 * k, nullptr};
  }
  V* base = reinterpret_cast<V*>(args.forms + first * k * (k + 4));
  return {base, base + k * k, base + k * (k + 1), base + k * (k + 2), base + k * (k + 3)};
}

// Counts of a chain pair from their symmetric forms; sets unsure[c * W + l] where the Gram matrix cannot decide.
void symmetric_ranks(const SpectrumArgs& args, int64_t first, int64_t end, const Facts* facts, const LaneWork& at,
                     const V (&norm)[2], bool* unsure) {
  const int64_t k = smaller(args.m, args.n);
  V top[2], bottom[2] = {};
  tridiagonal_top<2>(at.d, at.e, k, top);
  if (args.hermitian) {
    V* negative = at.work;
    for (int64_t i = 0; i < k * 2; i++) negative[i] = -at.d[i];
    tridiagonal_top<2>(negative, at.e, k, bottom);
  }
  for (int64_t r = 0; r < args.num_rtol; r++) {
    V shift[2][2];
    M count[2][2];
    for (int c = 0; c < 2; c++) {
      const Facts* own = facts + c * W;
      if (args.hermitian) {
        const V t = threshold(args, r, own, larger(top[c], bottom[c]), norm[c]);
        shift[c][0] = t;
        shift[c][1] = -t * (1 + 2 * kEps);
      } else {
        const V t = threshold(args, r, own, sqrt(larger(top[c], V{})), sqrt(norm[c]));
        const V slack = kGramNoise * kEps * static_cast<double>(k) + kTopError * t * t;
        shift[c][0] = t * t + slack;
        shift[c][1] = t * t - slack;
      }
    }
    count_above<2, 2>(at.d, at.e, k, shift, count);
    for (int l = 0; l < kPairMatrices && first + l < end; l++) {
      const int64_t above = count[l / W][0][l % W], others = k - count[l / W][1][l % W];
      if (!args.hermitian && above + others != k) unsure[l] = true;
      store_rank(args, first + l, r, facts[l], args.hermitian ? above + others : above);
    }
  }
}

// Matrices [first, first + kPairMatrices), or the first W of them, through their symmetric forms.
template <class In>
void symmetric_group(const SpectrumArgs& args, int64_t first, int64_t end, const Facts* facts, const LaneWork& at) {
  const int64_t k = smaller(args.m, args.n);
  V norm[2];
  for (int c = 0; c < 2; c++) {
    const int64_t b = first + c * W < end ? first + c * W : first;  // the second chain may repeat the first
    const Form form = form_of(args, b, at);
    if (b != first || c == 0) {
      load_symmetric<In>(args, b, facts + c * W, at, form.a);
      tridiagonalise(form.a, k, form.d, form.e, form.tau, at.work);
      norm[c] = normalise(form.d, form.e, k);
      if (form.tau) form.tau[k - 1] = norm[c];
    } else {
      norm[c] = norm[0];
    }
    for (int64_t i = 0; i < k; i++) {
      at.d[i * 2 + c] = form.d[i];
      at.e[i * 2 + c] = form.e[i] * form.e[i];
    }
  }
  if (args.rank) {
    bool unsure[kPairMatrices] = {};
    symmetric_ranks(args, first, end, facts, at, norm, unsure);
    for (int c = 0; c < 2; c++) {
      bool some = false;
      for (int l = 0; l < W; l++) some |= unsure[c * W + l] && facts[c * W + l].finite;
      if (some && needs_bidiagonal(args)) {
        ranks_by_bidiagonal<In>(args, first + c * W, end, facts + c * W, at, unsure + c * W);
      } else if (some) {
        for (int l = 0; l < W && first + c * W + l < end; l++) {
          for (int64_t r = 0; unsure[c * W + l] && r < args.num_rtol; r++)
            store_rank(args, first + c * W + l, r, facts[c * W + l], kRankUndecided);
        }
      }
    }
    return;
  }
  eigenvalues<2>(at.d, at.e, k);
  for (int c = 0; c < 2 && args.forms && first + c * W < end; c++) {
    const Form form = form_of(args, first + c * W, at);
    for (int64_t i = 0; i < k; i++) form.eigenvalues[i] = at.d[i * 2 + c];
  }
  for (int l = 0; l < kPairMatrices && first + l < end; l++)
    store_values<float>(args, first + l, facts[l], reinterpret_cast<double*>(at.d + l / W) + l % W, 2 * W,
                        norm[l / W][l % W], true, at.sorted);
}

// order[l]: positions of the eigenvalues of lane l, descending; gap[i]: from eigenvalue i to the nearest other one.
// The vectors of eigenvalues up to `ignored` of the largest need not be right, unless it is negative: their gap counts
// as large.
void sort_lanes(const V* eigenvalues, int64_t k, double ignored, int64_t* order, V* gap) {
  for (int l = 0; l < W; l++, order += k) {
    const auto value = [=](int64_t i) { return eigenvalues[i][l]; };
    for (int64_t i = 0; i < k; i++) {
      int64_t j = i;
      for (; j > 0 && value(order[j - 1]) < value(i); j--) order[j] = order[j - 1];
      order[j] = i;
    }
    double before = -kLowest;
    for (int64_t j = 0; j < k; j++) {
      const double own = value(order[j]), after = j + 1 < k ? own - value(order[j + 1]) : -kLowest;
      gap[order[j]][l] = ignored >= 0 && own <= ignored * value(order[0]) ? -kLowest : before < after ? before : after;
      before = after;
    }
  }
}

// at.vectors by twisted factorisations of the tridiagonal form. Returned: lanes whose vectors may be inaccurate.
M vectors_by_twisting(const Form& form, int64_t k, int64_t ld, const LaneWork& at) {
  M unsure = {};
  for (int64_t i = 0; i < k; i++) unsure |= at.gap[i] < kLeastGap;
  for (int64_t first = 0; first < k && any(~unsure); first += kBlock) {
    for (int64_t r = 0; r < kBlock; r += kTwisted) {
      V eigenvalue[kTwisted], residual[kTwisted];
      for (int s = 0; s < kTwisted; s++) eigenvalue[s] = form.eigenvalues[smaller(first + r + s, k - 1)];
      twisted_vectors(form.d, form.e, eigenvalue, k, at.rows + r * k, residual, at.work);
      for (int s = 0; s < kTwisted; s++)
        unsure |= ~(residual[s] <= kVectorError * at.gap[smaller(first + r + s, k - 1)]);
    }
    apply_reflections(form.a, form.tau, k, k - 2, at.rows);
    for (int64_t r = 0; r < kBlock && first + r < k; r++) {
      const double* from = reinterpret_cast<const double*>(at.rows + r * k);
      for (int l = 0; l < W; l++) {
        double* to = at.vectors + (l * k + first + r) * ld;
        for (int64_t j = 0; j < k; j++) to[j] = from[j * W + l];
      }
    }
  }
  return unsure;
}

// Replaces vectors and eigenvalues of the lanes in `wanted` by those of the QL iteration.
void vectors_by_ql(const Form& form, int64_t k, int64_t ld, const LaneWork& at, M wanted) {
  for (int64_t i = 0; i < k; i++) {
    at.d[i] = form.d[i];
    at.e[i] = form.e[i];
  }
  accumulate_reflections(form.a, form.tau, k, at.z, at.rows);
  eigenvectors_by_ql(at.d, at.e, form.eigenvalues, k, at.z, at.rotations);
  for (int l = 0; l < W; l++) {
    if (!wanted[l]) continue;
    for (int64_t i = 0; i < k; i++) form.eigenvalues[i][l] = at.d[i][l];
    separate_lane(at.z, k, ld, l, at.vectors + l * k * ld);
  }
}

// Eigenvectors of the symmetric forms of [first, first + W) in at.vectors, with at.order. Returned: the tridiagonal
// form, with eigenvalues that belong to the vectors.
template <class In>
Form decompose(const SpectrumArgs& args, int64_t first, const Facts* facts, const LaneWork& at) {
  const int64_t k = smaller(args.m, args.n), ld = leading(k);
  Form form = form_of(args, first, at);
  if (args.forms) {
    for (int64_t i = 0; i < k; i++) at.eigenvalues[i] = form.eigenvalues[i];
    form.eigenvalues = at.eigenvalues;
  } else {
    load_symmetric<In>(args, first, facts, at, form.a);
    tridiagonalise(form.a, k, form.d, form.e, form.tau, at.work);
    form.tau[k - 1] = normalise(form.d, form.e, k);
    for (int64_t i = 0; i < k; i++) {
      form.eigenvalues[i] = form.d[i];
      at.e[i] = form.e[i] * form.e[i];
    }
    eigenvalues<1>(form.eigenvalues, at.e, k);
  }
  const double ignored = args.gradient ? kResolved : -1;
  sort_lanes(form.eigenvalues, k, ignored, at.order, at.gap);
  M unsure = vectors_by_twisting(form, k, ld, at);
  for (int l = 0; l < W; l++) unsure[l] = facts[l].finite ? unsure[l] : 0;
  if (any(unsure)) {
    vectors_by_ql(form, k, ld, at, unsure);
    sort_lanes(form.eigenvalues, k, ignored, at.order, at.gap);
  }
  return form;
}

// Eigenvector number i of lane l, in descending order.
ND_INLINE const double* vector_of(const LaneWork& at, int64_t k, int64_t i, int l) {
  return at.vectors + (l * k + at.order[l * k + i]) * leading(k);
}

// Singular values and vectors of matrices [first, first + W).
template <class In>
void basis_group(const SpectrumArgs& args, int64_t first, int64_t end, const Facts* facts, const LaneWork& at) {
  const int64_t k = smaller(args.m, args.n);
  const Form form = decompose<In>(args, first, facts, at);
  const V norm = form.tau[k - 1];
  for (int l = 0; l < W && first + l < end; l++) {
    const Scale unscale(-facts[l].exponent);
    double* values = static_cast<double*>(args.values) + (first + l) * k;
    double* basis = args.basis + (first + l) * k * k;
    for (int64_t i = 0; i < k; i++) {
      const double squared = larger(form.eigenvalues[at.order[l * k + i]][l], 0.0) * norm[l];
      values[i] = facts[l].finite ? unscale(__builtin_sqrt(squared)) : nan_of<double>();
      const double* v = vector_of(at, k, i, l);
      for (int64_t j = 0; j < k; j++) basis[i * k + j] = facts[l].finite ? v[j] : nan_of<double>();
    }
  }
}

// The matrix with its short side as rows, scaled: [padded k, leading(longer)], zero beyond.
template <class In>
void load_long_rows(const SpectrumArgs& args, const In* a, const Scale& scale, double* x) {
  const int64_t k = smaller(args.m, args.n), longer = larger(args.m, args.n), ld = leading(longer);
  std::memset(x, 0, static_cast<size_t>(round_up(k, 8) * ld) * sizeof(double));
  for (int64_t i = 0; i < args.m; i++) {
    const In* row = a + i * args.row_stride;
    if (args.m >= args.n) {
      for (int64_t j = 0; j < k; j++) x[j * ld + i] = scale(to_double(row[j]));
    } else {
      for (int64_t j = 0; j < longer; j++) x[i * ld + j] = scale(to_double(row[j]));
    }
  }
}

// |a v| from the short side of a by its long one in rows.
double length_of_image(const double* rows, int64_t ldl, const double* v, int64_t k, int64_t padded_long,
                       double* image) {
  std::memset(image, 0, static_cast<size_t>(padded_long) * sizeof(double));
  for (int64_t i = 0; i < k; i++) {
    for (int64_t j = 0; j < padded_long; j++) image[j] += v[i] * rows[i * ldl + j];
  }
  return __builtin_sqrt(dot(image, image, padded_long));
}

// dL/da = a sum_i (g_i / sigma_i) v_i v_i' of matrix b, lane l (or its transpose, of a wide matrix).
template <class In>
void lane_gradient(const SpectrumArgs& args, int64_t b, int l, const Facts& facts, const Form& form,
                   const LaneWork& at) {
  const int64_t k = smaller(args.m, args.n), longer = larger(args.m, args.n), ld = leading(k), ldl = leading(longer);
  const int64_t padded = round_up(k, 8), padded_long = round_up(longer, 8);
  float* out = args.gradient + b * args.m * args.n;
  args.unresolved[b] = false;
  if (!facts.finite) {
    for (int64_t i = 0; i < args.m * args.n; i++) out[i] = nan_of<float>();
    return;
  }
  load_long_rows(args, matrix<In>(args, b), Scale(facts.exponent), at.long_rows);
  double* vectors = at.vectors + l * k * ld;
  const double top = form.eigenvalues[at.order[l * k]][l], norm = form.tau[k - 1][l];
  for (int64_t i = 0; i < k; i++) {
    const int64_t place = at.order[l * k + i];
    double *v = vectors + place * ld, *row = at.weighted + place * ld;
    const double g = args.value_gradient[b * k + i], squared = form.eigenvalues[place][l];
    double sigma = __builtin_sqrt(larger(squared, 0.0) * norm);
    if (squared <= kResolved * top) {
      if (g != 0 && top > 0) args.unresolved[b] = true;
      sigma = 0;
    } else if (squared <= kRefined * top && g != 0) {
      sigma = length_of_image(at.long_rows, ldl, v, k, padded_long, at.product);
    }
    const double weight = sigma > 0 ? g / sigma : 0;
    for (int64_t j = 0; j < k; j++) row[j] = weight * v[j];
    for (int64_t j = k; j < padded; j++) row[j] = v[j] = 0;
  }
  std::memset(at.symmetric, 0, static_cast<size_t>(padded * ld) * sizeof(double));
  multiply_upper(at.weighted, vectors, ld, k, 0, padded, at.symmetric, ld);
  for (int64_t i = 0; i < k; i++) {
    for (int64_t j = 0; j < i; j++) at.symmetric[i * ld + j] = at.symmetric[j * ld + i];
  }
  const bool tall = args.m >= args.n;
  if (tall) {
    multiply(at.long_rows, ldl, at.symmetric, ld, k, padded_long, padded, at.product, ld);
  } else {
    multiply(at.symmetric, ld, at.long_rows, ldl, k, padded, padded_long, at.product, ldl);
  }
  const int64_t stride = tall ? ld : ldl;
  for (int64_t i = 0; i < args.m; i++) {
    for (int64_t j = 0; j < args.n; j++) out[i * args.n + j] = static_cast<float>(at.product[i * stride + j]);
  }
}

template <class In>
void gradient_group(const SpectrumArgs& args, int64_t first, int64_t end, const Facts* facts, const LaneWork& at) {
  const Form form = decompose<In>(args, first, facts, at);
  for (int l = 0; l < W && first + l < end; l++) lane_gradient<In>(args, first + l, l, facts[l], form, at);
}

// Matrices [first, first + W) of float64 through their bidiagonal forms.
void bidiagonal_group(const SpectrumArgs& args, int64_t first, int64_t end, const Facts* facts, const LaneWork& at) {
  const int64_t k = smaller(args.m, args.n), longer = larger(args.m, args.n);
  if (args.rank) {
    bool wanted[W];
    for (int l = 0; l < W; l++) wanted[l] = true;
    ranks_by_bidiagonal<double>(args, first, end, facts, at, wanted);
    return;
  }
  load_columns<double>(args, first, facts, at);
  bidiagonalise(at.a, longer, k, at.d, at.e, at.work);
  const V norm = normalise_bidiagonal(at.d, at.e, k);
  V* values = at.work;  // its vectors are no longer needed
  bidiagonal_values(at.d, at.e, k, values, values + k);
  for (int l = 0; l < W && first + l < end; l++)
    store_values<double>(args, first + l, facts[l], reinterpret_cast<double*>(values) + l, W, norm[l], false,
                         at.sorted);
}

template <class In>
void lane_groups(const SpectrumArgs& args, int64_t begin, int64_t end, void* workspace) {
  const LaneWork at(args, needs_bidiagonal(args), workspace);
  for (int64_t first = begin; first < end; first += kPairMatrices) {
    Facts facts[kPairMatrices];
    for (int64_t l = 0; l < kPairMatrices; l++) {
      const bool repeated = l > 0 && first + l >= args.batch;
      facts[l] = repeated ? facts[args.batch - 1 - first]
                          : facts_of(matrix<In>(args, first + l), args.m, args.n, args.row_stride);
    }
    if (args.gradient) {
      gradient_group<In>(args, first, end, facts, at);
      if (first + W < end) gradient_group<In>(args, first + W, end, facts + W, at);
    } else if (args.basis) {
      basis_group<In>(args, first, end, facts, at);
      if (first + W < end) basis_group<In>(args, first + W, end, facts + W, at);
    } else if (sizeof(In) < 8 || args.hermitian) {
      symmetric_group<In>(args, first, end, facts, at);
    } else if constexpr (sizeof(In) == 8) {
      bidiagonal_group(args, first, end, facts, at);
      if (first + W < end) bidiagonal_group(args, first + W, end, facts + W, at);
    }
  }
}

// ------------------------------------------------------------------------------------------------ large matrices

// Addresses in the workspace of one large matrix.
struct LargeWork {
  double *g, *f;           // [padded k, ld] symmetric form, and what LDL' overwrites
  double* x;               // [kChunk, ld] rows, or a scaled panel
  double *v, *before, *y;  // [padded k] Lanczos vectors
  double *alpha, *beta;    // [kMaxLanczos]
  int64_t k, padded, ld, bytes;

  LargeWork(const SpectrumArgs& args, void* workspace) {
    k = smaller(args.m, args.n);
    padded = round_up(k, 8);
    ld = leading(k);
    bytes = 0;
    char* base = static_cast<char*>(workspace);
    const auto place = [&](double*& pointer, int64_t count) {
      pointer = reinterpret_cast<double*>(base ? base + bytes : nullptr);
      bytes += round_up(count * 8, 64);
    };
    place(g, padded * ld);
    place(f, padded * ld);
    place(x, kChunk * ld);
    place(v, padded);
    place(before, padded);
    place(y, padded);
    place(alpha, kMaxLanczos);
    place(beta, kMaxLanczos);
  }
};

// y = G v from the upper triangle, read once; 8 rows at a time.
void symmetric_product(const LargeWork& at, const double* v, double* y) {
  std::memset(y, 0, static_cast<size_t>(at.padded) * sizeof(double));
  for (int64_t i = 0; i < at.padded; i += 8) {
    const double* g = at.g + i * at.ld;
    double total[8];
    for (int r = 0; r < 8; r++) {
      total[r] = g[r * at.ld + i + r] * v[i + r];
      for (int c = 0; c < r; c++) total[r] += g[c * at.ld + i + r] * v[i + c];
      for (int c = r + 1; c < 8; c++) total[r] += g[r * at.ld + i + c] * v[i + c];
    }
    V sum[8] = {};
    for (int64_t j = i + 8; j < at.padded; j += W) {
      const V vj = *reinterpret_cast<const U*>(v + j);
      V yj = *reinterpret_cast<const U*>(y + j);
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++) {
        const V entry = *reinterpret_cast<const U*>(g + r * at.ld + j);
        sum[r] += entry * vj;
        yj += entry * v[i + r];
      }
      *reinterpret_cast<U*>(y + j) = yj;
    }
    for (int r = 0; r < 8; r++) y[i + r] += total[r] + sum_of(sum[r]);
  }
}

// Largest eigenvalue, at least `low`, of the tridiagonal matrix sign * alpha [count], beta: multisection with one shift
// a lane.
double top_of(const double* alpha, const double* beta, int64_t count, double sign, double low) {
  double high = low;
  for (int64_t i = 0; i < count; i++) {
    const double around = (i + 1 < count ? abs(beta[i]) : 0) + (i > 0 ? abs(beta[i - 1]) : 0);
    low = larger(low, sign * alpha[i]);
    high = larger(high, sign * alpha[i] + around);
  }
  while (high - low > 1e-14 * larger(abs(low), abs(high))) {
    const double width = (high - low) / (W + 1);
    V shift[1][1], pivot;
    for (int l = 0; l < W; l++) shift[0][0][l] = low + width * (l + 1);
    M found = {};
    pivot = sign * alpha[0] - shift[0][0];
    for (int64_t i = 0;;) {
      pivot = abs(pivot) < kTiny ? all(-kTiny) : pivot;
      found |= pivot > 0;
      if (++i == count) break;
      pivot = sign * alpha[i] - shift[0][0] - beta[i - 1] * beta[i - 1] / pivot;
    }
    int above = 0;
    while (above < W && found[above]) above++;
    high = above < W ? shift[0][0][above] : high;
    const double next = above > 0 ? shift[0][0][above - 1] : low;
    if (next == low && above > 0) break;  // no number lies between
    low = next;
    if (width <= kEps * larger(abs(low), abs(high))) break;
  }
  return 0.5 * (low + high);
}

struct Extremes {
  double top, bottom;  // largest eigenvalue, and minus the smallest
};

// Lanczos without reorthogonalisation from a fixed start: copies of converged values do no harm at the ends.
// The smallest is wanted of indefinite matrices only.
Extremes extreme_eigenvalues(const LargeWork& at, bool indefinite) {
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (int64_t i = 0; i < at.padded; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    at.v[i] = i < at.k ? static_cast<double>(state >> 11) * 0x1p-53 - 0.5 : 0;
    at.before[i] = 0;
  }
  const double start = 1 / __builtin_sqrt(dot(at.v, at.v, at.padded));
  for (int64_t i = 0; i < at.padded; i++) at.v[i] *= start;
  Extremes now = {kLowest, kLowest};
  double beta = 0, size = 0;
  for (int64_t s = 0; s < kMaxLanczos; s++) {
    symmetric_product(at, at.v, at.y);
    const double alpha = dot(at.v, at.y, at.padded);
    for (int64_t i = 0; i < at.padded; i++) at.y[i] -= alpha * at.v[i] + beta * at.before[i];
    beta = __builtin_sqrt(dot(at.y, at.y, at.padded));
    at.alpha[s] = alpha;
    at.beta[s] = beta;
    size = larger(size, abs(alpha) + beta);
    const bool invariant = beta <= 1e-14 * size;
    if (invariant || (s + 1) % kLanczosCheck == 0 || s + 1 == kMaxLanczos) {
      const Extremes last = now;
      now.top = top_of(at.alpha, at.beta, s + 1, 1, last.top);
      if (indefinite) now.bottom = top_of(at.alpha, at.beta, s + 1, -1, last.bottom);
      const double size_now = larger(now.top, now.bottom);
      double change = now.top > 0.9 * size_now ? now.top - last.top : 0;  // the smaller end plays no part
      if (now.bottom > 0.9 * size_now) change = larger(change, now.bottom - last.bottom);
      if (invariant || change <= kLanczosTol * size_now) break;
    }
    for (int64_t i = 0; i < at.padded; i++) {
      at.before[i] = at.v[i];
      at.v[i] = at.y[i] / beta;
    }
  }
  return now;
}

// Number of eigenvalues of G above `shift` from the pivots of LDL'; error: bound of the shift that its rounding is
// worth.
int64_t inertia_above(const LargeWork& at, double shift, double* error) {
  const int64_t k = at.k, ld = at.ld;
  double* f = at.f;
  for (int64_t i = 0; i < at.padded; i++) {
    const int64_t from = i / 8 * 8;
    std::memcpy(f + i * ld + from, at.g + i * ld + from, static_cast<size_t>(at.padded - from) * sizeof(double));
    f[i * ld + i] -= shift;
  }
  int64_t above = 0;
  double terms = 0;  // sum over pivots of the largest entry of the rank-one term
  for (int64_t p = 0; p < k; p += kPanel) {
    const int64_t end = smaller(p + kPanel, k);
    for (int64_t s = p; s < end; s++) {
      const double* row = f + s * ld;
      const double pivot = abs(row[s]) < kTiny ? -kTiny : row[s];
      const double inverse = 1 / pivot;
      above += pivot > 0;
      double* scaled = at.x + (s - p) * ld;
      V largest = {};
      for (int64_t j = s / W * W; j < at.padded; j += W) {
        const V entry = *reinterpret_cast<const U*>(row + j);
        *reinterpret_cast<U*>(scaled + j) = entry * -inverse;
        if (j > s) largest = larger(largest, abs(entry));
      }
      double most = abs(pivot);
      for (int l = 0; l < W; l++) most = larger(most, largest[l]);
      terms += most * most * abs(inverse);
      for (int64_t i = s + 1; i < end; i++) {
        double* target = f + i * ld;
        const V factor = all(scaled[i]);
        for (int64_t j = i / W * W; j < at.padded; j += W)
          *reinterpret_cast<U*>(target + j) += factor * *reinterpret_cast<const U*>(row + j);
      }
    }
    if (end < k) multiply_upper(at.x, f + p * ld, ld, end - p, end, at.padded, f, ld);
  }
  *error = kEps * terms * __builtin_sqrt(static_cast<double>(k));
  return above;
}

// Number of eigenvalues above t, or -1 where rounding may change it. `slack`: error of t and of G.
int64_t certain_count(const LargeWork& at, double t, double slack) {
  for (int attempt = 0; attempt < 3; attempt++) {
    if (slack > 0.25 * abs(t)) return -1;
    double error[2];
    const int64_t above[2] = {inertia_above(at, t + slack, &error[0]), inertia_above(at, t - slack, &error[1])};
    const double worst = larger(error[0], error[1]);
    if (worst <= slack) return above[0] == above[1] ? above[0] : -1;
    slack = 2 * worst;  // another shift, farther from every eigenvalue that the counts could confuse
  }
  return -1;
}

// Ranks of one large matrix.
template <class In>
void large_ranks(const SpectrumArgs& args, int64_t b, void* workspace) {
  const Facts facts = facts_of(matrix<In>(args, b), args.m, args.n, args.row_stride);
  const LargeWork at(args, workspace);
  const int64_t k = at.k;
  if (!facts.finite || facts.largest == 0) {
    for (int64_t r = 0; r < args.num_rtol; r++) store_rank(args, b, r, facts, 0);
    return;
  }
  if (args.hermitian) std::memset(at.g, 0, static_cast<size_t>(at.padded * at.ld) * sizeof(double));
  symmetric_form(args, matrix<In>(args, b), facts, at.g, at.x);
  const Extremes ends = extreme_eigenvalues(at, args.hermitian);
  const double size = larger(ends.top, ends.bottom), noise = kGramNoise * kEps * static_cast<double>(k) * size;
  const double atol = args.atol > 0 ? Scale(facts.exponent)(args.atol) : 0;
  for (int64_t r = 0; r < args.num_rtol; r++) {
    int64_t count = kRankUndecided;
    if (args.hermitian) {
      const double t = larger(atol, args.rtol[r] * size), slack = noise + kTopError * t;
      const int64_t above = certain_count(at, t, slack), not_below = certain_count(at, -t, slack);
      if (above >= 0 && not_below >= 0) count = above + k - not_below;
    } else {
      const double t = larger(atol, args.rtol[r] * __builtin_sqrt(size));
      const int64_t above = certain_count(at, t * t, noise + kTopError * t * t);
      if (above >= 0) count = above;
    }
    store_rank(args, b, r, facts, count);
  }
}

ND_INLINE bool by_lanes(const SpectrumArgs& args) {
  return args.values || args.gradient || (!args.hermitian && is_double(args)) ||
         smaller(args.m, args.n) <= (args.batch < kFewMatrices ? kLaneLimitOfFew : kLaneLimit);
}

template <class In>
void run(const SpectrumArgs& args, int64_t begin, int64_t end, void* workspace) {
  if (by_lanes(args)) {
    lane_groups<In>(args, begin, end, workspace);
  } else {
    for (int64_t b = begin; b < end; b++) large_ranks<In>(args, b, workspace);
  }
}

}  // namespace

SpectrumPlan spectrum_plan(const SpectrumArgs& args) {
  if (by_lanes(args)) return {kSpectrumGroup, LaneWork(args, needs_bidiagonal(args), nullptr).bytes};
  return {1, LargeWork(args, nullptr).bytes};
}

void spectrum(const SpectrumArgs& args, int64_t begin, int64_t end, void* workspace) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return run<float>(args, begin, end, workspace);
    case Dtype::kFloat64:
      return run<double>(args, begin, end, workspace);
    case Dtype::kBfloat16:
      return run<Bfloat16>(args, begin, end, workspace);
    case Dtype::kFloat16:
      return run<Float16>(args, begin, end, workspace);
  }
}

}  // namespace nd::cpu::ND_CPU_LEVEL
