// CovLasso from a covariance matrix, exactly, for many targets:
//
//     min over w, w_i = 0:   w' S w / 2 - s' w + sum_j a_j |w_j|,     s = S[i], a_j = (lam / 2) penalty_j
//
// the solution of  Theta' S Theta + lam sum_j penalty_j |Theta_j|  with Theta_i = -1, halved. With the gradient
// g = S w - s (zero column i aside) w is optimal iff g_j = -a_j sign(w_j) on the support and |g_j| <= a_j elsewhere.
// The covariances s may come from outside S (another network's categories). With w >= 0 asked for, g_j >= -a_j is all
// that is needed elsewhere: positive gradients count as zero. A ridge is part of S.
//
// Method: block active set, that is semismooth Newton with a growth limit.
//   1. w = inv(S_AA) (s_A - a_A sign_A) through a blocked Cholesky factor of S_AA, one register wide a block;
//   2. one gradient pass over all n columns (k contiguous rows of S, nothing else written);
//   3. at once: drop every coordinate whose sign flipped and add the worst violators, at most max(8, k/3) rounded up to
//      a full block. Only blocks from the first changed one are factored again; survivors behind it are ordered by
//      falling |w|, so that later drops hit late blocks;
//   4. no flip and no violator: the pass of step 2 is the certificate. A residual on A above tolerance is refined.
// While the active set and its violators are few, steps 1-3 run on a gathered sub-matrix. What is not solved after 60
// steps starts over with single pivots, which end for any positive semidefinite S. No cap on the support.
//
// A path of lams keeps active set, signs and factor: a step in lam starts with two triangular solves. A wanted number
// of nonzeros is found by homotopy: between two events (a column joins, a coordinate vanishes) w and g are linear in
// lam.
//
// Floor per target: one certifying pass, n k multiply-adds over 4 n k bytes of rows out of L2, and k^3 / 3 flops of
// factorisation. Memory per thread: k^2 / 2 + O(n) values, and the gathered sub-matrix, below n^2 / 256 values. Where S
// is larger than the caches (n = 10,000, k = 32) the passes read two rows a nonzero in all, at the speed of memory, and
// take half of the time, the gathers of the sub-matrix a quarter. Targets are independent; one runs on one thread, and
// its result does not depend on the others.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int kMinAdd = 8;             // a step may always add this many coordinates
constexpr int kGuardAfter = 60;        // iterations before single pivots
constexpr int kSmallViewDivisor = 16;  // gather a sub-matrix when this many times its size is below n
constexpr int kMaxStalled = 50;        // entries without a smaller violation, beside one a coordinate
constexpr int kMaxSettled = 20;        // refinements of one solution among single pivots
constexpr int kGradientAfter = 16;     // events of a homotopy until rounding is cleared from the gradient
constexpr int kOrderAbove = 64;        // shorter active sets are not reordered: a late block costs little more
constexpr double kEndOfPath = 0.999;   // position on a last segment that has too few nonzeros
constexpr double kSafety = 0.85;       // part of the tolerance used here; the rest covers rounding of the certificate

template <class T>
constexpr T kPivotFloor = sizeof(T) == 4 ? T(1e-6) : T(1e-14);  // of the diagonal: smaller pivots are raised to it
template <class T>
constexpr T kDependent = sizeof(T) == 4 ? T(1e-5) : T(1e-12);  // of the diagonal: a smaller pivot means dependence
template <class T>
constexpr T kShortest = sizeof(T) == 4 ? T(1e-6) : T(1e-12);  // of lambda_max / 2: segments below are ties
template <class T>
constexpr T kNegativePivot = sizeof(T) == 4 ? T(1e-2) : T(1e-6);  // of the diagonal: below minus this, S is not PSD

ND_INLINE int smaller(int a, int b) { return a < b ? a : b; }
ND_INLINE int larger(int a, int b) { return a > b ? a : b; }
template <class T>
ND_INLINE T larger_of(T a, T b) {
  return a > b ? a : b;
}
ND_INLINE int blocks_of(int count, int width) { return (count + width - 1) / width; }
ND_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
ND_INLINE double magnitude(double x) { return __builtin_fabs(x); }

// An aligned array that grows, zero where not yet written.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  void reserve(int64_t size, int64_t keep = 0) {
    if (size <= capacity_) return;
    const int64_t grown = capacity_ + capacity_ / 2;
    const int64_t capacity = ((size > grown ? size : grown) + 127) / 128 * 128;
    T* data = static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(capacity) * sizeof(T)));
    if (!data) throw std::bad_alloc();
    if (keep) std::memcpy(data, data_, static_cast<size_t>(keep) * sizeof(T));
    std::memset(data + keep, 0, static_cast<size_t>(capacity - keep) * sizeof(T));
    std::free(data_);
    data_ = data;
    capacity_ = capacity;
  }
  T* data() { return data_; }
  operator T*() { return data_; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

// ---------------------------------------------------------------------------------------------- vector helpers

template <class V, int... I>
ND_INLINE V add_neighbours(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

template <int D, class V, int... L>
ND_INLINE void swap_across(V& a, V& b, std::integer_sequence<int, L...>) {
  constexpr int W = sizeof...(L);
  const V low = __builtin_shufflevector(a, b, ((L & D) ? W + L - D : L)...);
  b = __builtin_shufflevector(a, b, ((L & D) ? W + L : L + D)...);
  a = low;
}

// Transposes a W x W tile in log2 W rounds of swaps at distance D.
template <class T, int D = 1>
ND_INLINE void transpose(typename Vec<T>::t* rows) {
  constexpr int W = Vec<T>::W;
#pragma GCC unroll 16
  for (int r = 0; r < W; r++)
    if (!(r & D)) swap_across<D>(rows[r], rows[r + D], std::make_integer_sequence<int, W>{});
  if constexpr (2 * D < W) transpose<T, 2 * D>(rows);
}

// Lane q of the result is the sum of the lanes of v[q], q < N = W.
template <class T, int N = Vec<T>::W>
ND_INLINE typename Vec<T>::t sum_lanes(const typename Vec<T>::t* v) {
  if constexpr (N == 1) {
    return *v;
  } else {
    return add_neighbours(sum_lanes<T, N / 2>(v), sum_lanes<T, N / 2>(v + N / 2),
                          std::make_integer_sequence<int, Vec<T>::W>{});
  }
}

// out = sum_e c[e] row(e) - init over `length` columns, a multiple of W; N registers of columns at a time, so that each
// row element is read once. The last group may overlap the one before it.
template <class T, int N = (ND_VECTOR_BYTES == 64 ? 16 : 8), class Row>
ND_INLINE void combine_rows(T* out, const T* init, Row row, const T* c, int k, int length) {
  constexpr int W = Vec<T>::W;
  if constexpr (N > 1)
    if (length < N * W) return combine_rows<T, N / 2>(out, init, row, c, k, length);
  for (int at = 0; at < length; at += N * W) {
    const int j = smaller(at, length - N * W);
    typename Vec<T>::t sum[N];
    for (int x = 0; x < N; x++) sum[x] = -load(init + j + x * W);
    for (int e = 0; e < k; e++) {
      const T* r = row(e) + j;
      asm("" : "+r"(r));  // one base register, constant offsets
      for (int x = 0; x < N; x++) sum[x] += c[e] * load(r + x * W);
    }
    for (int x = 0; x < N; x++) store(out + j + x * W, sum[x]);
  }
}

template <class T>
T max_magnitude(const T* x, int n) {
  T top = 0;
#pragma omp simd reduction(max : top)
  for (int j = 0; j < n; j++) {
    const T v = magnitude(x[j]);
    top = v > top ? v : top;
  }
  return top;
}

// lambda_max / 2: max of |s_j| / penalty_j over j != self, or of the positive s_j if nonnegative.
template <class T>
T largest_correlation(const T* s, const T* penalty, int n, int self, bool nonnegative) {
  if (!penalty && !nonnegative) {
    if (self < 0) return max_magnitude(s, n);
    return larger_of(max_magnitude(s, self), max_magnitude(s + self + 1, n - self - 1));
  }
  T top = 0;
  for (int j = 0; j < n; j++)
    if (j != self) top = larger_of(top, (nonnegative ? s[j] : magnitude(s[j])) / (penalty ? penalty[j] : T(1)));
  return top;
}

template <class T>
int count_above(const T* x, int n, T threshold) {
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int j = 0; j < n; j++) count += x[j] > threshold;
  return count;
}

// (j, |x_j| - b_j) of the entries where that exceeds `tol`, with b = bound, or a for all where bound is null. The
// outputs have room for n + W entries.
template <class T>
int select_violators(const T* x, const T* bound, T a, int n, T tol, int* index, T* excess) {
  int count = 0;
  for (int j = 0; j < n; j++) {
    const T v = magnitude(x[j]) - (bound ? bound[j] : a);
    index[count] = j;
    excess[count] = v;
    count += v > tol;
  }
  return count;
}

// Keeps, in order, the entries above `bar`.
template <class T>
int keep_above(int* index, T* excess, int count, T bar) {
  int kept = 0;
  for (int x = 0; x < count; x++) {
    const T v = excess[x];
    index[kept] = index[x];
    excess[kept] = v;
    kept += v > bar;
  }
  return kept;
}

#if defined(__AVX512F__)
// The lanes of `v` above `bar` and their indices, appended to (index, excess); returns how many.
ND_INLINE int append_above(__m512i lane, __m512 v, __m512 bar, __mmask16 valid, int* index, float* excess) {
  const __mmask16 hit = _mm512_mask_cmp_ps_mask(valid, v, bar, _CMP_GT_OQ);
  _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(hit, lane));
  _mm512_storeu_ps(excess, _mm512_maskz_compress_ps(hit, v));
  return __builtin_popcount(hit);
}

ND_INLINE int select_violators(const float* x, const float* bound, float a, int n, float tol, int* index,
                               float* excess) {
  int count = 0;
  const __m512 all = _mm512_set1_ps(a), bar = _mm512_set1_ps(tol);
  __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int j = 0; j < n; j += 16) {  // n is a multiple of 16
    const __m512 v = _mm512_sub_ps(_mm512_abs_ps(_mm512_loadu_ps(x + j)), bound ? _mm512_loadu_ps(bound + j) : all);
    count += append_above(lane, v, bar, 0xffff, index + count, excess + count);
    lane = _mm512_add_epi32(lane, _mm512_set1_epi32(16));
  }
  return count;
}

ND_INLINE int keep_above(int* index, float* excess, int count, float bar) {
  int kept = 0;
  const __m512 bars = _mm512_set1_ps(bar);
  for (int x = 0; x < count; x += 16) {
    const __mmask16 valid = static_cast<__mmask16>(count - x < 16 ? (1u << (count - x)) - 1 : 0xffffu);
    kept += append_above(_mm512_loadu_si512(index + x), _mm512_loadu_ps(excess + x), bars, valid, index + kept,
                         excess + kept);
  }
  return kept;
}
#endif

// Keeps, in order, the entries above a threshold that leaves about `wanted` of them, never more than that and never
// none.
template <class T>
int keep_largest(int* index, T* excess, int count, int wanted, T low) {
  if (count <= wanted) return count;
  T high = max_magnitude(excess, count);
  for (int step = 0; step < 8; step++) {
    const T middle = T(0.5) * (low + high);
    const int above = count_above(excess, count, middle);
    if (above > wanted) {
      low = middle;
    } else {
      high = middle;
      if (above > wanted - wanted / 4) break;
    }
  }
  const T bar = count_above(excess, count, high) ? high : low;  // ties at the top leave none above `high`
  return smaller(keep_above(index, excess, count, bar), wanted);
}

// ---------------------------------------------------------------------------------- blocked Cholesky factor of S_AA

// R' R = S_AA for a growing list A of coordinates, in block columns of W: panel b holds R[0 : bW, block b] row by row,
// and below it the inverse of the transposed diagonal block (lower triangle), so that factoring and solving are small
// matrix products without long latency chains. A partly filled block is completed by rows of the identity.
template <class T>
class BlockFactor {
 public:
  using V = typename Vec<T>::t;
  static constexpr int W = Vec<T>::W;

  void reserve(int blocks, int keep) { panels_.reserve(panel_offset(blocks), panel_offset(keep)); }

  // Block column b of S_AA into its panel; row(e) is the row of S of the e-th coordinate, column[e] its column.
  template <class Row>
  void gather(int b, Row row, const int* column, int k, const T* zeros) {
    constexpr int kRows = W < 8 ? W : 8;  // rows of S read side by side
    T* panel = panels_ + panel_offset(b);
    const int first = b * W, filled = smaller(first + W, k);
    for (int h = 0; h < W; h += kRows) {
      const T* r[kRows];
      for (int x = 0; x < kRows; x++) r[x] = first + h + x < k ? row(first + h + x) : zeros;
      T* out = panel + h;
      for (int l = 0; l < filled; l++, out += W)
        for (int x = 0; x < kRows; x++) out[x] = r[x][column[l]];
    }
    for (int l = filled; l < first + W; l++) {
      V unit = {};
      unit[l - first] = 1;
      store(panel + l * W, unit);
    }
  }

  // Factors block column b, gathered, given all blocks before it. Pivots below a floor are raised to it.
  void factor(int b) {
    T *panel = panels_ + panel_offset(b), diagonal[W];
    for (int q = 0; q < W; q++) diagonal[q] = panel[(b * W + q) * W + q];
    for (int J = 0; J < b; J++) {  // left looking: W rows of R at a time, in registers
      T* here = panel + J * W * W;
      const T *left = panels_ + panel_offset(J), *inverse = left + J * W * W;
      V a[W];
      subtract_product(J * W, panel, left, here, a);
#pragma GCC unroll 16
      for (int q = 0; q < W; q++) {
        V sum = inverse[q * W] * a[0];
#pragma GCC unroll 16
        for (int e = 1; e < W; e++)
          if (e <= q) sum += inverse[q * W + e] * a[e];
        store(here + q * W, sum);
      }
    }
    V a[W];
    subtract_product(b * W, panel, panel, panel + b * W * W, a);
    invert_factor(a, diagonal, panel + b * W * W);
  }

  // Block b of z = inv(R') r, given the blocks before it.
  void forward(int b, const T* r, T* z) {
    const T *panel = panels_ + panel_offset(b), *inverse = panel + b * W * W;
    V a[4] = {}, product[W];
    for (int l = 0; l < b * W; l++) a[l % 4] += z[l] * load(panel + l * W);
    const V t = load(r + b * W) - ((a[0] + a[1]) + (a[2] + a[3]));
    for (int q = 0; q < W; q++) product[q] = load(inverse + q * W) * t;
    store(z + b * W, sum_lanes<T>(product));
  }

  // x = inv(R) z over `blocks` blocks.
  void back(int blocks, const T* z, T* x) {
    for (int I = blocks - 1; I >= 0; I--) {
      V a[W] = {}, even = {}, odd = {};
      for (int J = I + 1; J < blocks; J++) {
        const V xj = load(x + J * W);
        const T* p = panels_ + panel_offset(J) + I * W * W;
        for (int q = 0; q < W; q++) a[q] += load(p + q * W) * xj;
      }
      const V t = load(z + I * W) - sum_lanes<T>(a);
      const T* inverse = panels_ + panel_offset(I) + I * W * W;
      for (int q = 0; q < W; q += 2) {
        even += t[q] * load(inverse + q * W);
        odd += t[q + 1] * load(inverse + (q + 1) * W);
      }
      store(x + I * W, even + odd);
    }
  }

 private:
  static int64_t panel_offset(int b) { return static_cast<int64_t>(W) * W * b * (b + 1) / 2; }

  // a = block - sum_l left[l]' panel[l] over `rows` rows of two panels.
  static ND_INLINE void subtract_product(int rows, const T* panel, const T* left, const T* block, V* a) {
    for (int q = 0; q < W; q++) a[q] = load(block + q * W);
    for (int l = 0; l < rows; l++) {
      const V x = load(panel + l * W);
#pragma GCC unroll 16
      for (int q = 0; q < W; q++) a[q] -= left[l * W + q] * x;
    }
  }

  // a: symmetric W x W block. out: the inverse of its lower Cholesky factor.
  static ND_INLINE void invert_factor(V* a, const T* diagonal, T* out) {
    V f[W], inverse[W], pivots = {};
#pragma GCC unroll 16
    for (int q = 0; q < W; q++) {
      T pivot = a[q][q];
      const T floor = diagonal[q] > 0 ? kPivotFloor<T> * diagonal[q] : T(1);
      pivot = pivot > floor ? pivot : floor;
      pivots[q] = pivot;
      f[q] = a[q] * (1 / pivot);
#pragma GCC unroll 16
      for (int e = 1; e < W; e++)
        if (e > q) a[e] -= f[q][e] * a[q];
    }
    T scale[W];
    for (int q = 0; q < W; q++) scale[q] = 1 / std::sqrt(pivots[q]);
#pragma GCC unroll 16
    for (int q = 0; q < W; q++) {
      V unit = {};
      unit[q] = 1;
      inverse[q] = unit;
    }
#pragma GCC unroll 16
    for (int q = 0; q < W; q++) {
#pragma GCC unroll 16
      for (int e = 1; e < W; e++)
        if (e > q) inverse[e] -= f[q][e] * inverse[q];
      store(out + q * W, inverse[q] * scale[q]);
    }
  }

  Buffer<T> panels_;
};

// ------------------------------------------------------------------------------------------------- one target at a
// time

// The columns an iteration looks at: all of S, or a gathered sub-matrix of it.
template <class T>
struct View {
  const T* rows;  // row j at rows + j * stride
  int64_t stride;
  int length;       // a multiple of the register width; columns beyond the last real one are zero
  const T* target;  // s restricted to the view
  const T* bound;   // a_j per column, or null: a
  int self;         // column of the target itself, or -1
  bool gathered;
  const T* row(int j) const { return rows + stride * j; }
};

enum class Outcome { converged, failed, capped };

template <class T>
class Solver {
  static constexpr int W = Vec<T>::W;

 public:
  explicit Solver(const CovlassoArgs<T>& args) : args_(args), n_(static_cast<int>(args.n)) {
    padded_ = blocks_of(n_, 16) * 16;
    const int room = padded_ + 64;
    for (Buffer<T>* b : {&pull_, &w_, &anchor_, &y_, &right_, &defect_, &g_, &excess_, &zeros_, &scratch_, &scratch2_,
                         &bound_, &small_target_, &small_bound_, &slope_})
      b->reserve(room);
    for (Buffer<int>* b : {&active_, &moved_, &order_, &bin_, &index_, &columns_, &filled_, &barred_}) b->reserve(room);
    sums_.reserve(room);
    members_.reserve(room / 64 + 1);
  }

  // Solves target number t of the call along its path and writes its rows of the outputs.
  void solve(int64_t t) {
    start(t);
    for (int64_t x = t * args_.num_lams; x < (t + 1) * args_.num_lams; x++) {
      set_penalty(static_cast<T>(args_.lam[x] / 2));
      if (x == t * args_.num_lams && args_.start_index) take_start(t);
      move_penalty();
      const Outcome outcome = iterate();
      finish(x, outcome);
    }
  }

  // Solves target number t at a penalty that gives `wanted.k` nonzeros.
  void solve_top_k(int64_t t, const CovlassoTopK& wanted) {
    start(t);
    const Segment segment = follow_path(wanted.k);
    const double position = segment.complete ? wanted.position : kEndOfPath;
    set_penalty(segment.high - static_cast<T>(position) * (segment.high - segment.low));
    if (!segment.complete) k_ = 0;
    move_penalty();
    wanted.lam[t] = 2.0 * a_;
    Outcome outcome = segment.outcome;
    if (outcome != Outcome::capped) outcome = iterate();
    const bool missed = k_ != wanted.k;
    finish(t, outcome);
    if (outcome == Outcome::converged && missed)
      args_.info[t * kCovlassoInfoSize + kStatus] = segment.complete ? kCollinear : kTooFew;
  }

 private:
  void start(int64_t t) {
    const int row = static_cast<int>(args_.targets[t]);
    self_ = args_.cross ? -1 : row;
    cov_ = args_.cov + args_.cov_stride * t;
    target_ = args_.cross ? args_.cross + args_.ld * row : cov_ + args_.ld * row;
    variance_ = args_.variance[row];
    penalty_ = args_.penalty ? args_.penalty + args_.penalty_stride * t : nullptr;
    k_ = 0;
    pivots_ = 0;
    semidefinite_ = true;
    precise_ = false;
    full_view();
    top_ = largest_correlation(target_, penalty_, n_, self_, args_.nonnegative);
    tol_ = static_cast<T>(kSafety * args_.tol * top_);
  }

  void set_penalty(T a) {
    a_ = a;
    if (penalty_)
      for (int j = 0; j < n_; j++) bound_[j] = a_ * penalty_[j];
  }

  T bound_of(int j) { return view_.bound ? view_.bound[j] : a_; }

  // w at the present penalty with the signs as they are; the factor is that of the active set.
  void move_penalty() {
    for (int e = 0; e < k_; e++) {
      pull_[e] = std::copysign(bound_of(active_[e]), pull_[e]);
      right_[e] = view_.target[active_[e]] - pull_[e];
    }
    for (int b = 0; b < blocks_of(k_, W); b++) factor_.forward(b, right_, y_);
    factor_.back(blocks_of(k_, W), y_, w_);
  }

  // The active set and signs of a solution given by the caller.
  void take_start(int64_t t) {
    const int32_t* index = args_.start_index + t * args_.start_capacity;
    const T* value = args_.start_value + t * args_.start_capacity;
    for (int x = 0; x < args_.start_count[t] && x < args_.start_capacity; x++) {
      const int j = index[x];
      if (j < 0 || j >= n_ || j == self_ || !(bound_of(j) <= std::numeric_limits<T>::max())) continue;
      if (!(value[x] > 0 || (value[x] < 0 && !args_.nonnegative)) || members_[j / 64] >> (j % 64) & 1) continue;
      members_[j / 64] |= uint64_t{1} << (j % 64);
      active_[k_] = j;
      pull_[k_++] = std::copysign(bound_of(j), value[x]);
    }
    for (int e = 0; e < k_; e++) members_[active_[e] / 64] = 0;
    resolve(0);
  }

  // Writes the answer; what follows on a path starts from it, or from nothing where it failed.
  void finish(int64_t x, Outcome outcome) {
    if (outcome != Outcome::converged) tidy();
    report(x, outcome);
    if (outcome != Outcome::converged) k_ = 0;
    pivots_ = 0;
    semidefinite_ = true;
    precise_ = false;
  }

  // Block steps on the present view until the certificate holds there.
  Outcome iterate() {
    gradient();
    for (int step = 0; step < kGuardAfter; step++) {
      const Check check = examine();
      const int violators = violations();
      if (!check.flips && !violators) {
        if (view_.gathered) return Outcome::converged;
        if (!precise_ && rounding_shows()) {
          precise_ = true;
          gradient();
        } else if (settle(check.residual)) {
          return Outcome::converged;
        }
        continue;  // g or w has moved a little: look again
      }
      if (pivots_ >= args_.max_pivots) return Outcome::capped;
      if (step == 1 && !view_.gathered && (k_ + violators) * kSmallViewDivisor < n_) {
        enter_small_view(violators);
        iterate();
        leave_small_view();
      } else {
        resolve(block_step(check.flips, violators));
      }
      gradient();
    }
    return view_.gathered ? Outcome::failed : single_pivots();
  }

  // Single pivots from the empty set, with the factor kept regular: the slow, finite way for what defeats block steps,
  // such as linearly dependent categories. `anchor` has the signs of the active set; w moves from it to the minimiser
  // on these signs, or to the first sign change, which is dropped. The objective falls with every pivot.
  Outcome single_pivots() {
    k_ = 0;
    precise_ = true;
    resolve(0);
    gradient();
    T best = std::numeric_limits<T>::max();
    for (int settled = 0, stalled = 0; pivots_ < args_.max_pivots;) {
      const Check check = examine();
      if (check.flips) {
        resolve(drop(blocking_coordinate()));
      } else if (settled < kMaxSettled && !settle(check.residual)) {
        settled++;
        continue;
      } else {
        const int violators = violations();
        if (!violators) return exact_residual() <= tol_ / T(kSafety) ? Outcome::converged : Outcome::failed;
        const T worst = max_magnitude<T>(excess_, violators);
        stalled = worst < best ? 0 : stalled + 1;
        best = worst < best ? worst : best;
        if (stalled > kMaxStalled + k_) return Outcome::failed;  // rounding moves it in circles
        settled = 0;
        keep_largest<T>(index_, excess_, violators, 1, 0);
        for (int e = 0; e < k_; e++) anchor_[e] = w_[e];
        const int first = enter(index_[0]);
        if (first < 0) return Outcome::failed;
        resolve(first);
      }
      gradient();
    }
    return Outcome::capped;
  }

  int violations() {
    return select_violators(g_.data(), view_.bound, a_, view_.length, tol_, index_.data(), excess_.data());
  }

  // True if the residual on A is within tolerance; otherwise one step of iterative refinement is taken.
  bool settle(T residual) {
    if (residual <= tol_ / 2 || exact_residual() <= tol_ / 2) return true;
    refine();
    gradient();
    return false;
  }

  // ---------------------------------------------------------------- views

  void full_view() {
    view_ = {cov_, args_.ld, padded_, target_, penalty_ ? static_cast<T*>(bound_) : nullptr, self_, false};
  }

  // Columns of the small view: the active set, then the violators; its rows are gathered when first needed.
  void enter_small_view(int violators) {
    const int m = k_ + violators, stride = blocks_of(m, 16) * 16;
    for (int e = 0; e < k_; e++) columns_[e] = active_[e];
    for (int x = 0; x < violators; x++) columns_[k_ + x] = index_[x];
    for (int c = 0; c < stride; c++) {
      small_target_[c] = c < m ? view_.target[columns_[c]] : T(0);
      if (penalty_) small_bound_[c] = c < m ? bound_[columns_[c]] : T(0);
      filled_[c] = 0;
    }
    small_rows_.reserve(static_cast<int64_t>(m) * stride);
    view_ = {small_rows_, stride, stride, small_target_, penalty_ ? static_cast<T*>(small_bound_) : nullptr, -1, true};
    num_columns_ = m;
    for (int e = 0; e < k_; e++) fill_row(active_[e] = e);
  }

  void leave_small_view() {
    for (int e = 0; e < k_; e++) active_[e] = columns_[active_[e]];
    full_view();
  }

  void fill_row(int j) {
    if (filled_[j]) return;
    filled_[j] = 1;
    const T* r = cov_ + args_.ld * columns_[j];
    T* out = small_rows_ + view_.stride * j;
    for (int c = 0; c < num_columns_; c++) out[c] = r[columns_[c]];
    for (int c = num_columns_; c < view_.stride; c++) out[c] = 0;
  }

  // ---------------------------------------------------------------- linear algebra on the active set

  // w = inv(S_AA) (s_A - pull), where blocks from `first` on have changed.
  void resolve(int first) {
    const int blocks = blocks_of(k_, W);
    for (int e = first * W; e < k_; e++) {
      if (view_.gathered) fill_row(active_[e]);
      right_[e] = view_.target[active_[e]] - pull_[e];
    }
    for (int e = k_; e < blocks * W; e++) right_[e] = 0;
    factor_.reserve(blocks, smaller(first, blocks));
    for (int b = first; b < blocks; b++) {
      factor_.gather(b, [&](int e) { return view_.row(active_[e]); }, active_, k_, zeros_);
      factor_.factor(b);
      factor_.forward(b, right_, y_);
    }
    factor_.back(blocks, y_, w_);
  }

  // g = S w - s on the view, summed in float64 where that shows.
  void gradient() {
    if (sizeof(T) == 4 && precise_) return precise_gradient();
    combine_rows<T>(g_, view_.target, [&](int e) { return view_.row(active_[e]); }, w_, k_, view_.length);
  }

  void precise_gradient() {
    double* sum = sums_;
    for (int j = 0; j < view_.length; j++) sum[j] = -static_cast<double>(view_.target[j]);
    for (int e = 0; e < k_; e++) {
      const T* r = view_.row(active_[e]);
      const double w = w_[e];
#pragma omp simd
      for (int j = 0; j < view_.length; j++) sum[j] += w * r[j];
    }
    for (int j = 0; j < view_.length; j++) g_[j] = static_cast<T>(sum[j]);
  }

  // Rounding of a pass, estimated as that of k random terms, is a sizeable part of the tolerance.
  bool rounding_shows() {
    if (sizeof(T) != 4) return false;
    double squares = 0;
    for (int e = 0; e < k_; e++) squares += static_cast<double>(w_[e]) * w_[e] * view_.row(active_[e])[active_[e]];
    return std::numeric_limits<T>::epsilon() / 2 * std::sqrt(args_.variance_bound * squares) >
           kSafety / 4 * args_.tol * top_;
  }

  // defect = s - S w - pull on A, summed in float64; returns its largest magnitude.
  T exact_residual() {
    for (int e = 0; e < k_; e++) sums_[e] = 0;
    for (int e = 0; e < k_; e++) {
      const T* r = view_.row(active_[e]);
      const double w = w_[e];
      for (int c = 0; c < k_; c++) sums_[c] += w * r[active_[c]];
    }
    for (int e = 0; e < k_; e++)
      defect_[e] = static_cast<T>(static_cast<double>(view_.target[active_[e]]) - pull_[e] - sums_[e]);
    return max_magnitude<T>(defect_, k_);
  }

  // scratch = inv(R') right on A; `right` is filled up with zeros to whole blocks.
  void forward(T* right) {
    const int blocks = blocks_of(k_, W);
    for (int e = k_; e < blocks * W; e++) right[e] = 0;
    for (int b = 0; b < blocks; b++) factor_.forward(b, right, scratch_);
  }

  // The pivot that column j would have after A, negative for an indefinite S; leaves inv(R') S_Aj in scratch.
  double pivot_of(int j) {
    const T* column = view_.row(j);
    for (int e = 0; e < k_; e++) scratch2_[e] = column[active_[e]];
    forward(scratch2_);
    double pivot = column[j];
    for (int e = 0; e < k_; e++) pivot -= static_cast<double>(scratch_[e]) * scratch_[e];
    return pivot;
  }

  // w += inv(S_AA) defect.
  void refine() {
    forward(defect_);
    factor_.back(blocks_of(k_, W), scratch_, scratch2_);
    for (int e = 0; e < k_; e++) w_[e] += scratch2_[e];
  }

  // ---------------------------------------------------------------- active set

  // Coordinate e has lost the sign it entered with, or its value to overflow.
  bool flipped(int e) {
    const T agreement = w_[e] * pull_[e];
    return !(agreement > 0 && agreement <= std::numeric_limits<T>::max());
  }

  struct Check {
    T residual;  // max |g + pull| over the active set
    int flips;   // coordinates whose sign is lost
  };

  // Moves g + pull on the active set, negated, into defect and clears g there and at the target: what remains of g is
  // the others'.
  Check examine() {
    Check check = {0, 0};
    for (int e = 0; e < k_; e++) {
      defect_[e] = -(g_[active_[e]] + pull_[e]);
      check.residual = larger_of(check.residual, magnitude(defect_[e]));
      check.flips += flipped(e);
      g_[active_[e]] = 0;
    }
    if (view_.self >= 0) g_[view_.self] = 0;
    if (args_.nonnegative)
      for (int j = 0; j < view_.length; j++) g_[j] = g_[j] < 0 ? g_[j] : T(0);
    return check;
  }

  // Drops all flipped coordinates, adds the worst violators; returns the first changed block.
  int block_step(int flips, int violators) {
    const int left = k_ - flips;
    int wanted = larger(kMinAdd, k_ / 3);
    if (left + wanted > W) wanted = blocks_of(left + wanted, W) * W - left;
    T low = 0;
    if (!k_) {  // a cold start takes only what is far above its bound
      low = T(0.4995) * max_magnitude<T>(excess_, violators);
      violators = keep_above(index_.data(), excess_.data(), violators, low);
    }
    violators = keep_largest<T>(index_, excess_, violators, wanted, low);
    int first = k_ / W;
    if (flips) first = smaller(first, drop(-1));
    first = smaller(first, k_ / W);
    add(violators);
    return first;
  }

  // Column j enters with w at a minimiser on the active set. If it is a combination z of the active columns, w moves
  // along that combination, which leaves S w as it is and lowers the objective, until a coordinate reaches zero and
  // makes room. Returns the first changed block, -1 if none ever does, be it by rounding or because S is not
  // positive semidefinite.
  int enter(int j) {
    const T variance = view_.row(j)[j], direction = g_[j] > 0 ? T(-1) : T(1);
    const double pivot = pivot_of(j);
    int first = k_ / W;
    anchor_[k_] = 0;
    if (!(pivot > kDependent<T> * variance)) {
      factor_.back(blocks_of(k_, W), scratch_, scratch2_);
      semidefinite_ = variance > 0 && pivot > -kNegativePivot<T> * variance;
      const int leaving = semidefinite_ ? first_to_vanish(direction) : -1;
      if (leaving < 0) return -1;
      const T length = w_[leaving] / (direction * scratch2_[leaving]);
      for (int e = 0; e < k_; e++) anchor_[e] -= length * direction * scratch2_[e];
      first = smaller(first, drop(leaving));
      index_[0] = j;
      anchor_[k_] = length * direction;
    }
    add(1);
    return first;
  }

  // The active coordinate that reaches zero first when w moves along -direction * z (in scratch2); -1 if none does.
  int first_to_vanish(T direction) {
    int first = -1;
    T nearest = 0;
    for (int e = 0; e < k_; e++) {
      const T length = w_[e] / (direction * scratch2_[e]);
      if (length > 0 && (first < 0 || length < nearest)) {
        first = e;
        nearest = length;
      }
    }
    return first;
  }

  // Moves `anchor` towards w up to the first sign change; returns the coordinate that changes sign.
  int blocking_coordinate() {
    T length = 1;
    int blocking = -1;
    for (int e = 0; e < k_; e++) {
      if (!flipped(e)) continue;
      T reach = anchor_[e] / (anchor_[e] - w_[e]);
      if (!(reach >= 0)) reach = 0;
      if (blocking < 0 || reach < length) {
        length = reach;
        blocking = e;
      }
    }
    for (int e = 0; e < k_; e++) anchor_[e] += length * (w_[e] - anchor_[e]);
    return blocking;
  }

  // Removes the flipped coordinates, or coordinate `only` if that is not negative; returns the first changed block.
  int drop(int only) {
    int first = k_, kept = 0;
    for (int e = 0; e < k_; e++) {
      const bool gone = only >= 0 ? e == only : flipped(e);
      first = gone ? smaller(first, e) : first;
      active_[kept] = active_[e];
      pull_[kept] = pull_[e];
      w_[kept] = w_[e];
      anchor_[kept] = anchor_[e];
      kept += !gone;
    }
    pivots_ += k_ - kept;
    k_ = kept;
    const int block = smaller(first, k_) / W;
    if (k_ > kOrderAbove) order_by_magnitude(block * W);
    return block;
  }

  // Stable bucket sort by falling |w| from position `first` on: later drops should hit late blocks. Leaves w unsorted.
  void order_by_magnitude(int first) {
    constexpr int kBins = 64;
    const int m = k_ - first;
    const T top = max_magnitude<T>(w_ + first, m), scale = top > 0 ? 2 * kBins / top : T(0);
    for (int e = 0; e < m; e++)
      bin_[e] = kBins - 1 - smaller(kBins - 1, static_cast<int>(magnitude(w_[first + e]) * scale));
    int start[kBins + 1] = {};
    for (int e = 0; e < m; e++) start[bin_[e] + 1]++;
    for (int q = 0; q < kBins; q++) start[q + 1] += start[q];
    for (int e = 0; e < m; e++) order_[start[bin_[e]]++] = first + e;
    permute(active_, moved_, first, m);
    permute(pull_, scratch_, first, m);
    permute(anchor_, scratch_, first, m);
  }

  template <class A>
  void permute(Buffer<A>& x, Buffer<A>& room, int first, int m) {
    for (int e = 0; e < m; e++) room[e] = x[order_[e]];
    std::memcpy(x + first, room, static_cast<size_t>(m) * sizeof(A));
  }

  // The first `count` coordinates of index_ enter, against the sign of their gradient (which is still that of them
  // all).
  void add(int count) {
    for (int x = 0; x < count; x++, k_++) {
      const int j = index_[x];
      active_[k_] = j;
      pull_[k_] = g_[j] > 0 ? -bound_of(j) : bound_of(j);
    }
    pivots_ += count;
  }

  // ---------------------------------------------------------------- homotopy

  // Penalties between two events; `complete` if they give the number of nonzeros asked for.
  struct Segment {
    T high, low;
    bool complete;
    Outcome outcome;
  };

  // What ends a segment: after a has fallen by `length`, column `joining` enters or coordinate `leaving` vanishes;
  // neither at the end of the path.
  struct Event {
    T length;
    int joining, leaving;
  };

  // From lambda_max down to the first segment with `wanted` nonzeros; the state is then that at its upper end. Without
  // one, the last segment with fewer.
  Segment follow_path(int64_t wanted) {
    Segment fewer = {top_, top_, false, Outcome::converged};
    set_penalty(top_);
    move_penalty();
    for (int j = 0; j < n_; j++) barred_[j] = 0;
    int left = -1;  // the column that has just left
    for (int step = 0; a_ > kShortest<T> * top_ && pivots_ < args_.max_pivots; step++) {
      if (step % kGradientAfter == 0) gradient();
      const Event event = next_event(left);
      const T low = a_ - event.length;
      const bool visible = event.length > kShortest<T> * top_;
      if (k_ == wanted && visible) return {a_, low, true, Outcome::converged};
      if (k_ < wanted && visible) fewer = {a_, low, false, Outcome::converged};
      if (event.joining < 0 && event.leaving < 0) return fewer;
      set_penalty(low);
      for (int j = 0; j < padded_; j++) g_[j] += event.length * slope_[j];
      left = -1;
      if (event.leaving >= 0) {
        left = active_[event.leaving];
        for (int j = 0; j < n_; j++) barred_[j] = 0;
        move_penalty();
        resolve(drop(event.leaving));
      } else {
        move_penalty();
        join(event.joining);
      }
    }
    if (pivots_ >= args_.max_pivots) fewer.outcome = Outcome::capped;
    return fewer;
  }

  // Column j enters at the bound, with coefficient zero; a combination of the active columns is barred instead, until
  // one of them leaves.
  void join(int j) {
    if (!(pivot_of(j) > kDependent<T> * view_.row(j)[j])) {
      barred_[j] = 1;
      return;
    }
    index_[0] = j;
    const int first = k_ / W;
    add(1);
    resolve(first);
  }

  // On the present active set w + t step and g + t slope as a falls by t.
  Event next_event(int left) {
    for (int e = 0; e < k_; e++) scratch2_[e] = pull_[e] / a_;
    forward(scratch2_);
    factor_.back(blocks_of(k_, W), scratch_, anchor_);
    combine_rows<T>(slope_, zeros_, [&](int e) { return view_.row(active_[e]); }, anchor_, k_, view_.length);
    Event event = {a_ * (1 - kShortest<T>), -1, -1};
    for (int e = 0; e < k_; e++) {
      if (!(w_[e] * pull_[e] > 0)) {
        // At zero it follows its sign or has no place; rounding must not make a move of it.
        if (anchor_[e] * pull_[e] < 0 && event.length > 0) event = {0, -1, e};
      } else if (w_[e] * anchor_[e] < 0 && -w_[e] / anchor_[e] < event.length) {
        event = {-w_[e] / anchor_[e], -1, e};
      }
    }
    for (int e = 0; e < k_; e++) barred_[active_[e]] += 2;
    for (int j = 0; j < n_; j++) excess_[j] = barred_[j] || j == self_ ? a_ : length_to_join(j, j == left);
    for (int e = 0; e < k_; e++) barred_[active_[e]] -= 2;
    for (int j = 0; j < n_; j++)
      if (excess_[j] < event.length) event = {excess_[j], j, -1};
    if (event.joining < 0 && event.leaving < 0) event.length = a_;
    return event;
  }

  // How far a falls until |g_j| reaches the bound; that column which just left starts at the bound, moving away from
  // it.
  T length_to_join(int j, bool left) {
    const T p = penalty_ ? penalty_[j] : T(1), g = g_[j], u = slope_[j], bound = a_ * p;
    const T below = larger_of(bound + g, T(0)) / (p - u), above = larger_of(bound - g, T(0)) / (p + u);
    const bool joins_below = p - u > kShortest<T> * p && !(left && g < 0);
    const bool joins_above = p + u > kShortest<T> * p && !(left && g > 0) && !args_.nonnegative;
    T length = a_;
    if (joins_below && below < length) length = below;
    if (joins_above && above < length) length = above;
    return length;
  }

  // ---------------------------------------------------------------- result

  // Makes what an unfinished run left a valid answer: finite, signs those of w, gradient and residual up to date.
  void tidy() {
    bool finite = true;
    int kept = 0;
    for (int e = 0; e < k_; e++) {
      finite &= w_[e] - w_[e] == 0;
      active_[kept] = active_[e];
      w_[kept] = w_[e];
      pull_[kept] = w_[e] > 0 ? magnitude(pull_[e]) : -magnitude(pull_[e]);
      right_[kept] = view_.target[active_[e]] - pull_[kept];
      kept += w_[e] != 0;
    }
    k_ = finite ? kept : 0;
    gradient();
    examine();
  }

  // Writes support, coefficients and certificate. g and defect belong to the present w (examine came last).
  void report(int64_t x, Outcome outcome) {
    double linear = 0, curvature = 0, norm = 0, squares = 0;  // s'w, (S w - s)'w, sum a_j |w_j|, |w|^2
    T worst = 0, reach = 0;                                   // KKT violation, max |g_j| / a_j
#pragma omp simd reduction(+ : linear, curvature, norm, squares) reduction(max : worst, reach)
    for (int e = 0; e < k_; e++) {
      const double w = w_[e], g = -defect_[e] - pull_[e];
      squares += w * w;
      linear += (right_[e] + pull_[e]) * w;
      curvature += g * w;
      norm += magnitude(pull_[e] * w);
      const T miss = magnitude(defect_[e]), ratio = magnitude(defect_[e] / pull_[e] + 1);
      worst = miss > worst ? miss : worst;
      reach = ratio > reach ? ratio : reach;
    }
    if (penalty_) {
      for (int j = 0; j < n_; j++) {
        worst = larger_of(worst, magnitude(g_[j]) - bound_[j]);
        reach = larger_of(reach, magnitude(g_[j]) / bound_[j]);
      }
    } else {
      const T g = max_magnitude<T>(g_, padded_);
      worst = larger_of(worst, g - a_);
      reach = larger_of(reach, g / a_);
    }
    const double ridged = variance_ - linear + curvature;
    const double tau = reach > 1 ? 1.0 / reach : 1.0;  // scales the residual into the dual feasible set
    double* info = args_.info + x * kCovlassoInfoSize;
    info[kErr2] = ridged - args_.ridge * squares;
    info[kDualityGap] = ridged + 2 * norm - tau * (2 * (variance_ - linear) - tau * ridged);
    info[kKktViolation] = top_ > 0 ? static_cast<double>(worst) / top_ : 0.0;
    info[kPivots] = static_cast<double>(pivots_);
    info[kStatus] = status(outcome, ridged < -1e-3 * variance_);
    info[kLambdaMax] = 2.0 * top_;
    write_support(x);
  }

  int status(Outcome outcome, bool negative_error) const {
    if (outcome == Outcome::capped) return kCapped;
    if (negative_error || (outcome == Outcome::failed && !semidefinite_)) return kNotPsd;
    return outcome == Outcome::failed ? kCollinear : kConverged;
  }

  void write_support(int64_t x) {
    const int64_t capacity = args_.capacity;
    int32_t* index = args_.index + x * capacity;
    T* value = args_.value + x * capacity;
    for (int e = 0; e < k_; e++) {  // sorts by a bitmap of the columns
      const int j = active_[e];
      g_[j] = w_[e];
      members_[j / 64] |= uint64_t{1} << (j % 64);
    }
    int64_t count = 0;
    for (int q = 0; q < padded_; q += 64) {
      for (uint64_t rest = members_[q / 64]; rest && count < capacity; rest &= rest - 1) {
        const int j = q + __builtin_ctzll(rest);
        index[count] = j;
        value[count++] = g_[j];
      }
      members_[q / 64] = 0;
    }
    std::memset(index + count, 0, static_cast<size_t>(capacity - count) * sizeof(int32_t));
    std::memset(value + count, 0, static_cast<size_t>(capacity - count) * sizeof(T));
    args_.count[x] = static_cast<int32_t>(count);
    if (k_ > capacity) args_.info[x * kCovlassoInfoSize + kStatus] = kCapped;
  }

  const CovlassoArgs<T>& args_;
  const int n_;
  int padded_ = 0;
  int self_ = -1, k_ = 0, num_columns_ = 0;  // self: the target's own column
  const T *cov_ = nullptr, *target_ = nullptr, *penalty_ = nullptr;
  double variance_ = 0;
  T a_ = 0, top_ = 0, tol_ = 0;
  int64_t pivots_ = 0;
  bool semidefinite_ = true, precise_ = false;
  View<T> view_ = {};
  BlockFactor<T> factor_;
  Buffer<int> active_;            // [k] columns of the view in the active set
  Buffer<T> pull_, w_, anchor_;   // [k] a_j sign, coefficient, last point feasible in sign
  Buffer<T> y_, right_, defect_;  // [k] inv(R')(s_A - pull), s_A - pull, -(g + pull)
  Buffer<double> sums_;           // [n]
  Buffer<T> g_, excess_, bound_;  // [n] gradient, violations, a_j
  Buffer<T> slope_;               // [n] change of g along the path
  Buffer<int> index_;             // [n] violators
  Buffer<int> columns_, filled_;  // [m] columns of S in the small view, rows gathered
  Buffer<T> small_rows_, small_target_, small_bound_;
  Buffer<T> zeros_, scratch_, scratch2_;
  Buffer<int> barred_;  // [n] columns that may not join
  Buffer<int> moved_, order_, bin_;
  Buffer<uint64_t> members_;  // [n / 64] bitmap of the support
};

template <class T>
void solve_range(const CovlassoArgs<T>& args, int64_t begin, int64_t end) {
  Solver<T> solver(args);
  for (int64_t t = begin; t < end; t++) solver.solve(t);
}

void solve_top_k_range(const CovlassoArgs<double>& args, const CovlassoTopK& wanted, int64_t begin, int64_t end) {
  Solver<double> solver(args);
  for (int64_t t = begin; t < end; t++) solver.solve_top_k(t, wanted);
}

// ------------------------------------------------------------------------------------- padding, checks, lambda_max

// Rows of a W x W tile from column `column` on, zero outside the n x n matrix.
template <class T>
ND_INLINE void load_tile(const CovlassoPackArgs<T>& args, int64_t row, int64_t column, typename Vec<T>::t* tile) {
  constexpr int W = Vec<T>::W;
  for (int r = 0; r < W; r++) {
    const T* source = args.cov + (row + r) * args.stride + column;
    if (row + r >= args.n) {
      tile[r] = typename Vec<T>::t{};
    } else if (column + W <= args.n) {
      tile[r] = load(source);
    } else {
      T partial[W] = {};
      std::memcpy(partial, source, static_cast<size_t>(args.n - column) * sizeof(T));
      tile[r] = load(partial);
    }
  }
}

template <class T>
ND_INLINE void store_tile(const CovlassoPackArgs<T>& args, int64_t row, int64_t column,
                          const typename Vec<T>::t* tile) {
  constexpr int W = Vec<T>::W;
  for (int r = 0; r < W && row + r < args.n; r++) store(args.packed + (row + r) * args.ld + column, tile[r]);
}

// Tiles (row, column) and (column, row) of S become their scaled mean.
template <class T>
ND_INLINE void pack_tile(const CovlassoPackArgs<T>& args, int64_t row, int64_t column, typename Vec<T>::t& asymmetry,
                         typename Vec<T>::t& defect) {
  constexpr int W = Vec<T>::W;
  const T half = static_cast<T>(args.scale / 2);
  typename Vec<T>::t upper[W], lower[W];
  load_tile(args, row, column, upper);
  load_tile(args, column, row, lower);
  transpose<T>(lower);
  for (int r = 0; r < W; r++) {
    const auto a = half * upper[r], b = half * lower[r], difference = a > b ? a - b : b - a;
    asymmetry = difference > asymmetry ? difference : asymmetry;
    upper[r] = a + b;
    defect += upper[r] - upper[r];  // NaN where an entry is not finite
  }
  if (!args.packed) return;
  if (row == column && args.ridge > 0)
    for (int r = 0; r < W && row + r < args.n; r++) upper[r][r] += static_cast<T>(args.ridge);
  store_tile(args, row, column, upper);
  transpose<T>(upper);
  store_tile(args, column, row, upper);
}

template <class T>
void pack_range(const CovlassoPackArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int W = Vec<T>::W;
  static_assert(kCovlassoTile % W == 0);
  const int64_t written = (args.n + W - 1) / W * W;
  for (int64_t unit = begin; unit < end; unit++) {
    typename Vec<T>::t asymmetry = {}, defect = {};
    const int64_t first = unit * kCovlassoTile, last = first + kCovlassoTile < args.n ? first + kCovlassoTile : args.n;
    for (int64_t row = first; row < last; row += W)
      for (int64_t column = row; column < args.n; column += W) pack_tile(args, row, column, asymmetry, defect);
    for (int64_t row = first; args.packed && row < last; row++)
      std::memset(args.packed + row * args.ld + written, 0, static_cast<size_t>(args.ld - written) * sizeof(T));
    args.facts[unit] = {true, 0};
    for (int x = 0; x < W; x++) {
      args.facts[unit].finite &= defect[x] == 0;
      args.facts[unit].asymmetry = larger_of(args.facts[unit].asymmetry, 2.0 * asymmetry[x]);
    }
    if (!args.packed && args.facts[unit].asymmetry > 0) return;
  }
}

template <class T>
void lambda_max_range(const CovlassoArgs<T>& args, double* lambda_max, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; t++) {
    const T* penalty = args.penalty ? args.penalty + args.penalty_stride * t : nullptr;
    const T* row = (args.cross ? args.cross : args.cov) + args.ld * args.targets[t];
    lambda_max[t] = 2.0 * largest_correlation(row, penalty, static_cast<int>(args.n),
                                              args.cross ? -1 : static_cast<int>(args.targets[t]), args.nonnegative);
  }
}

}  // namespace

void covlasso_f32(const CovlassoArgs<float>& args, int64_t begin, int64_t end) { solve_range(args, begin, end); }
void covlasso_f64(const CovlassoArgs<double>& args, int64_t begin, int64_t end) { solve_range(args, begin, end); }
void covlasso_top_k_f64(const CovlassoArgs<double>& args, const CovlassoTopK& wanted, int64_t begin, int64_t end) {
  solve_top_k_range(args, wanted, begin, end);
}
void covlasso_pack_f32(const CovlassoPackArgs<float>& args, int64_t begin, int64_t end) {
  pack_range(args, begin, end);
}
void covlasso_pack_f64(const CovlassoPackArgs<double>& args, int64_t begin, int64_t end) {
  pack_range(args, begin, end);
}
void lambda_max_f32(const CovlassoArgs<float>& args, double* lambda_max, int64_t begin, int64_t end) {
  lambda_max_range(args, lambda_max, begin, end);
}
void lambda_max_f64(const CovlassoArgs<double>& args, double* lambda_max, int64_t begin, int64_t end) {
  lambda_max_range(args, lambda_max, begin, end);
}

}  // namespace nd::cpu::ND_CPU_LEVEL
