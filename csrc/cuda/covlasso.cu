// CovLasso from a covariance matrix, exactly, one thread block a target:
//
//     min over w, w_i = 0:   w' S w / 2 - s' w + sum_j a_j |w_j|,     s = S[i], a_j = a penalty_j, a = lam / 2
//
// which is  Theta' S Theta + lam sum_j penalty_j |Theta_j|  with Theta_i = -1, halved. With rho = s - S w, w is optimal
// iff rho_j = a_j sign(w_j) on the support and |rho_j| <= a_j elsewhere. Violations are measured per unit of penalty.
//
// Method: block active set, that is semismooth Newton with a growth limit, as in csrc/cpu/covlasso.cpp.
//   1. w = inv(S_AA) (s_A - a_A sign_A) through a blocked Cholesky factor of S_AA;
//   2. one pass over the k rows of S in A: rho is never stored, its violators go to a list;
//   3. at once: drop every coordinate whose sign flipped and add the worst violators, max(8, k/3) rounded up to a full
//      block; only blocks from the first changed one are factored again, survivors behind it ordered by falling |w|;
//   4. no flip and no violator: the pass once more in float64. It is the certificate, or finds what float32 hid. A
//      residual on A above tolerance is refined.
// After 60 steps single pivots up to the first sign change guard termination. No cap on the support.
//
// Floor per target: the certifying pass, n k values of S out of L2, and k^3 / 6 multiply-adds. n = 1000, k = 25, 1000
// targets, float32: 0.1 GB. A solve reads 0.4 to 0.5 MB: passes over the growing supports, the float64 one, and gathers
// of 32-byte sectors. Its time is a chain of waits: a step has 3 + 4 ceil(k/16) block barriers, 16 pivots a factored
// block and ceil(k/4) loads of rows. What counts is therefore the number of targets an SM holds.
//
// Threads: 4 warps a block, 8 blocks an SM in float32, 4 in float64. A block takes targets from a queue until it is
// empty. Pass: 16 bytes a thread, two pieces of a row and four rows at a time. Factor: a warp owns 4 of the 16 columns
// of a block, so that its triangular solve needs no block barrier; one warp inverts the diagonal block in registers.
// Memory: shared memory holds the violators of up to 2048 columns and the state of up to 80 (float32) or 64 (float64)
// coordinates, 27.5 KB in float32 for n <= 1024. A larger support moves, doubling, to slices of the workspace. Slices
// of one size form a pool under locks; a block takes them in rising order only, so that no two wait for each other.
// Determinism: sums in a fixed order, violators ranked by (violation, index); nothing depends on which block, slice or
// warp came first. Limits: n < 2^30.
#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

namespace nd::covlasso {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int W = 16;                 // width of a block of the factor
constexpr int kColumns = W / kWarps;  // of a block, that a warp owns
constexpr int kRows = 4;              // rows of S a thread reads at a time
constexpr int kBins = 32;             // of violations, two an octave; one a lane
constexpr int kMinAdd = 8;            // a step may always add this many coordinates
constexpr int kMaxRefinements = 3;
constexpr int kMaxDependent = 10;                   // steps that left out coordinates, before single pivots
constexpr int kMaxBlocks = 1024;                    // of a launch
constexpr int64_t kPoolBytes = int64_t{128} << 20;  // of the slices of one size
constexpr unsigned kAll = 0xffffffffu;
constexpr double kSafety = 0.85;  // part of the tolerance at which a violator is taken up

// Small values bring small matrices to the paths of large ones in the tests.
#if !defined(ND_COVLASSO_GUARD_AFTER)
#define ND_COVLASSO_GUARD_AFTER 60
#endif
#if !defined(ND_COVLASSO_SHARED_COLUMNS)
#define ND_COVLASSO_SHARED_COLUMNS 2048
#endif
#if !defined(ND_COVLASSO_SHARED_SUPPORT)
#define ND_COVLASSO_SHARED_SUPPORT (sizeof(T) == 4 ? 80 : 64)
#endif
constexpr int kGuardAfter = ND_COVLASSO_GUARD_AFTER;        // steps before single pivots
constexpr int kSharedColumns = ND_COVLASSO_SHARED_COLUMNS;  // largest n whose violators are listed in shared memory
template <class T>
constexpr int kSharedSupport = ND_COVLASSO_SHARED_SUPPORT;  // coordinates held in shared memory, a multiple of W
template <class T>
constexpr int kBlocksPerSm = sizeof(T) == 4 ? 8 : 4;  // caps registers at 64 and 128 a thread
template <class T>
constexpr T kPivotFloor = sizeof(T) == 4 ? T(4e-6) : T(1e-13);  // of the diagonal: below, dependent on the others
template <class T>
constexpr T kLift = T(1e-2);             // part of that floor to which a pivot is raised, where it must not be left out
constexpr double kNegativePivot = 1e-2;  // of the diagonal: below minus this, S is not PSD

enum Info : int { kErr2, kDualityGap, kKktViolation, kPivots, kStatus, kLambdaMax, kInfoSize };
enum Status : int { kConverged, kCapped, kCollinear, kNotPsd };

// N values, loaded and stored as one.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <class T>
__device__ __forceinline__ T magnitude(T x) {
  return x < T(0) ? -x : x;
}
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return rsqrt(x); }

__host__ __device__ constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
__host__ __device__ constexpr int blocks_of(int k) { return (k + W - 1) / W; }

template <class T>
constexpr int kPiece = kThreads * (16 / static_cast<int>(sizeof(T)));  // columns the block reads at once

// ------------------------------------------------------------------------------------------------------------- memory

// The state of an active set of up to `capacity` coordinates (a multiple of W), in shared memory or in a slice of the
// workspace. Arrays that a step permutes are kept twice.
//
// Factor: R'R = S_AA, R upper triangular, in panels. Panel b is [16 b + 16, 16], row after row: R[0 : 16 b, block b],
// then the inverse of the diagonal block R_bb.
template <class T>
struct Active {
  T* base;
  int64_t capacity;

  static __host__ __device__ constexpr int64_t panel_offset(int64_t b) { return W * W / 2 * b * (b + 1); }
  static __host__ __device__ constexpr int64_t bytes(int64_t capacity) {
    return (panel_offset(capacity / W) + 8 * capacity) * static_cast<int64_t>(sizeof(T)) + 2 * capacity * 4;
  }

  __device__ __forceinline__ T* panel(int b) const { return base + panel_offset(b); }
  __device__ __forceinline__ T* inverse(int b) const { return panel(b) + b * W * W; }
  __device__ __forceinline__ T* y() const {
    return vector(0);
  }  // inv(R') (s_A - a_A sign_A); before that its right side
  __device__ __forceinline__ T* temporary() const { return vector(1); }
  __device__ __forceinline__ T* defect() const { return vector(2); }  // rho_A - a_A sign_A
  __device__ __forceinline__ T* w() const { return vector(3); }       // coefficients, 0 beyond k
  __device__ __forceinline__ T* sign(int side) const { return vector(4 + side); }
  __device__ __forceinline__ T* anchor(int side) const { return vector(6 + side); }  // last point of the right signs
  __device__ __forceinline__ int* index(int side) const {
    return reinterpret_cast<int*>(vector(8)) + (side ? capacity : 0);
  }

 private:
  __device__ __forceinline__ T* vector(int x) const { return base + panel_offset(capacity / W) + x * capacity; }
};

// A size of active set and the slices of the workspace for it. Size 0 is the one in shared memory.
template <class T>
struct Pool {
  int64_t capacity = kSharedSupport<T>, slices = 0, bytes = 0;  // bytes of a slice
  int64_t first_lock = 0, offset = 0;                           // offset of the first slice in bytes

  __host__ __device__ static Pool first() { return {}; }
  __host__ __device__ Pool next(int64_t n, int64_t num_targets) const {
    Pool p;
    p.capacity = 2 * capacity < n ? 2 * capacity : round_up(n, W);
    p.bytes = round_up(Active<T>::bytes(p.capacity), 256);
    const int64_t most = num_targets < kMaxBlocks ? num_targets : kMaxBlocks, fit = kPoolBytes / p.bytes;
    p.slices = fit < 1 ? 1 : (fit < most ? fit : most);
    p.first_lock = first_lock + slices;
    p.offset = offset + slices * bytes;
    return p;
  }
};

// Violators of one target: `length` entries, a part of them for each warp, and one bit a column: is it in A?
struct Columns {
  float* violation;  // per unit of penalty, relative to lambda_max / 2
  int* entry;        // 2 j + (rho_j < 0)
  unsigned* member;
  int length;

  template <class T>
  static __host__ __device__ int64_t padded(int64_t n) {
    return round_up(n, 2 * kPiece<T>);
  }
  template <class T>
  static __host__ __device__ int64_t bytes(int64_t n) {
    return padded<T>(n) * 8 + round_up(n, 512) / 8;
  }
};

struct Plan {  // of the workspace: locks and queue, columns of every block, slices of every size
  int64_t counters, columns, total;
};

template <class T>
Plan plan(int64_t n, int64_t num_targets) {
  Pool<T> pool = Pool<T>::first();
  while (pool.capacity < n) pool = pool.next(n, num_targets);
  const int64_t blocks = num_targets < kMaxBlocks ? num_targets : kMaxBlocks;
  Plan p;
  p.counters = round_up(4 * (1 + pool.first_lock + pool.slices), 256);
  p.columns = n > kSharedColumns ? round_up(blocks * Columns::bytes<T>(n), 256) : 0;
  p.total = p.counters + p.columns + pool.offset + pool.slices * pool.bytes;
  return p;
}

template <class T>
struct Arguments {
  const T* cov;
  int n;
  int64_t ld;
  const int64_t* targets;
  const double* lam;
  int num_targets;
  const T* penalty;
  int64_t penalty_stride;
  double tol;
  int64_t max_pivots;
  int32_t* index;
  T* value;
  int64_t capacity;
  int32_t* count;
  double* info;
  int* counters;           // queue, then the locks of the slices
  unsigned char* columns;  // [blocks] of Columns, unless they are in shared memory
  unsigned char* slices;
};

// Shared by the threads of a block; per warp where it is an array of kWarps.
struct Scratch {
  int histogram[kWarps][kBins];
  int listed[kWarps];  // violators
  int kept[kWarps];    // of them, those that may be among the worst
  double reach[kWarps], sums[kWarps][4];
  double info[kInfoSize];
  unsigned char* slice;
  int64_t slice_capacity;
  int task, lock;
  int dependent;   // steps that met coordinates dependent on others
  int indefinite;  // was a pivot clearly negative?
};

// ------------------------------------------------------------------------------------------------------- warp products

template <class T>
__device__ __forceinline__ T warp_largest(T x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = larger(x, __shfl_xor_sync(kAll, x, o));
  return x;
}

// The element of a 16 x 4 product that a lane receives: rows q and q + 1, column c.
struct Place {
  int q, c;
  __device__ __forceinline__ explicit Place(int lane)
      : q(4 * (lane & 3) + 2 * ((lane >> 3) & 1)), c(2 * ((lane >> 2) & 1) + (lane >> 4)) {}
};

// sum over l < rows of P[l][q] X[l][c], P: [rows, 16], X: four columns of a [rows, 16], rows a multiple of 16. A lane
// sums 4 x 2 elements over every fourth l; the sums of four lanes are then added and shared out.
template <class T>
__device__ __forceinline__ Pack<T, 2> product(const T* P, const T* X, int rows, int lane) {
  const int q = 4 * (lane & 3), c = 2 * ((lane >> 2) & 1);
  T sum[2][4] = {};
#pragma unroll 4
  for (int l = lane >> 3; l < rows; l += 4) {
    const Pack<T, 4> p = load<4>(P + l * W + q);
    const Pack<T, 2> x = load<2>(X + l * W + c);
#pragma unroll
    for (int v = 0; v < 4; v++) {
      sum[0][v] += p.v[v] * x.v[0];
      sum[1][v] += p.v[v] * x.v[1];
    }
  }
  const bool second = lane & 16, lower = lane & 8;
  T half[4];
#pragma unroll
  for (int v = 0; v < 4; v++)
    half[v] = (second ? sum[1][v] : sum[0][v]) + __shfl_xor_sync(kAll, second ? sum[0][v] : sum[1][v], 16);
  Pack<T, 2> out;
#pragma unroll
  for (int v = 0; v < 2; v++)
    out.v[v] = (lower ? half[v + 2] : half[v]) + __shfl_xor_sync(kAll, lower ? half[v] : half[v + 2], 8);
  return out;
}

struct Pivots {
  bool small, negative;  // was there one below the floor, one below minus kNegativePivot?
};

// tile := inverse of the upper triangular Cholesky factor of the symmetric tile [16, 16], by one warp: elimination of
// [tile | identity], a lane a column. A pivot below a floor, relative to diagonal[q], is raised to it or, without
// `raise`, its row and column are left out: zeros in the inverse, so that nothing of its rounding errors spreads. Rows
// and columns from `filled` on are those of the identity.
template <class T>
__device__ __forceinline__ Pivots invert_factor(T* tile, const T* diagonal, int filled, bool raise, int lane) {
  const int c = lane & 15;
  T a[W];
#pragma unroll
  for (int q = 0; q < W; q++) a[q] = lane < W ? tile[q * W + c] : T(q == c);
  const T d = diagonal[c], floor = d > T(0) ? kPivotFloor<T> * d : T(1);
  Pivots pivots = {false, c < filled && !(d > T(0))};
#pragma unroll
  for (int q = 0; q < W; q++) {
    if (q < filled) {  // uniform
      const T pivot = __shfl_sync(kAll, a[q], q), least = __shfl_sync(kAll, floor, q);
      const bool small = !(pivot > least);
      pivots.small |= small;
      pivots.negative |= pivot < -static_cast<T>(kNegativePivot / kPivotFloor<T>) * least;
      const T lifted = pivot > kLift<T> * least ? pivot : kLift<T> * least;
      const T root = small && !raise ? T(0) : inverse_root(lifted);
      const T scaled = a[q] * (root * root);
#pragma unroll
      for (int e = 1; e < W; e++)
        if (e > q) a[e] -= __shfl_sync(kAll, a[q], e) * scaled;
      a[q] *= root;
    }
  }
  if (lane >= W) {
#pragma unroll
    for (int q = 0; q < W; q++) tile[c * W + q] = a[q];
  }
  pivots.negative = __any_sync(kAll, pivots.negative);
  return pivots;
}

// z_b = inv(R_bb') (r_b - R[0 : 16 b, block b]' z), by one warp; r may be z.
template <class T>
__device__ __forceinline__ void forward_block(const T* panel, int b, const T* r, T* z, int lane) {
  const int q = lane & 15, half = lane >> 4;
  T sum = 0, out = 0;
#pragma unroll 4
  for (int l = half; l < b * W; l += 2) sum += panel[l * W + q] * z[l];
  sum += __shfl_xor_sync(kAll, sum, 16);
  const T t = r[b * W + q] - sum;
  const T* inverse = panel + b * W * W;
#pragma unroll
  for (int e = 0; e < W / 2; e++) {
    const int row = half * (W / 2) + e;
    out += inverse[row * W + q] * __shfl_sync(kAll, t, row);
  }
  out += __shfl_xor_sync(kAll, out, 16);
  if (lane < W) z[b * W + q] = out;
  __syncwarp();
}

// ---------------------------------------------------------------------------------------------------------- one target

// Solves targets, one after the other; called by all threads of a block. Members are the same in all threads, but for
// the thread's own numbers.
template <class T>
class Solver {
 public:
  __device__ __forceinline__ Solver(const Arguments<T>& args, unsigned char* memory, Scratch& scratch)
      : args_(args), scratch_(scratch), thread_(threadIdx.x), lane_(threadIdx.x & 31), warp_(threadIdx.x >> 5) {
    shared_ = reinterpret_cast<T*>(memory);
    const bool global = args.n > kSharedColumns;
    unsigned char* room =
        global ? args.columns + blockIdx.x * Columns::bytes<T>(args.n) : memory + Active<T>::bytes(kSharedSupport<T>);
    columns_.length = static_cast<int>(Columns::padded<T>(args.n));
    columns_.violation = reinterpret_cast<float*>(room);
    columns_.entry = reinterpret_cast<int*>(columns_.violation + columns_.length);
    columns_.member = reinterpret_cast<unsigned*>(columns_.entry + columns_.length);
  }

  // Target number t of the call: writes its rows of the outputs.
  __device__ __forceinline__ void solve(int t) {
    start(t);
    bool exact = sizeof(T) == 8, stopped = false, capped = false;
    int refinements = 0, step = 0;
    guarded_ = anchored_ = false;
    for (;;) {
      pass(exact);
      __syncthreads();
      guarded_ |= step >= kGuardAfter || scratch_.dependent >= kMaxDependent;
      const Flips flips = count_flips();
      const int wanted = most_additions(k_ - flips.count);
      const Found found = tally(wanted);
      if (stopped || (flips.count == 0 && found.total == 0)) {
        if (exact) {
          const double residual = measure();
          if (stopped || residual <= 0.5 * args_.tol * top_ || refinements == kMaxRefinements) break;
          refine();
          refinements++;
        }
        exact = true;
        __syncthreads();  // the next pass overwrites the tally
        continue;
      }
      capped = pivots_ >= args_.max_pivots;
      stopped = capped || scratch_.indefinite;
      if (!stopped) {
        resolve(change(flips, found, wanted));
        anchored_ = guarded_;
        refinements = 0;
        step++;
      }
      exact = stopped || sizeof(T) == 8;
      __syncthreads();
    }
    report(t, capped);
  }

 private:
  // Coordinates whose sign is lost, and the first of them (k if there is none).
  struct Flips {
    int count, first;
  };
  // Violators listed; those in bins up to `last` hold the worst `wanted` of them.
  struct Found {
    int total, last;
  };

  __device__ __forceinline__ const T* row(int j) const { return args_.cov + args_.ld * j; }
  __device__ __forceinline__ double penalty(int j) const { return penalty_ ? static_cast<double>(penalty_[j]) : 1.0; }
  __device__ __forceinline__ int part() const { return columns_.length / kWarps; }  // of the list, a warp's
  __device__ __forceinline__ void toggle_member(int j) { atomicXor(&columns_.member[j / 32], 1u << (j % 32)); }

  __device__ __forceinline__ void start(int t) {
    target_ = static_cast<int>(args_.targets[t]);
    a_ = 0.5 * args_.lam[t];
    penalty_ = args_.penalty ? args_.penalty + args_.penalty_stride * t : nullptr;
    active_ = {shared_, kSharedSupport<T>};
    k_ = side_ = pivots_ = 0;
    lock_ = -1;
    for (int x = thread_; x < (args_.n + 31) / 32; x += kThreads) columns_.member[x] = 0;
    T top = 0;
    for (int j = thread_; j < args_.n; j += kThreads) {
      const T rho = magnitude(row(target_)[j]);
      if (j != target_) top = larger(top, penalty_ ? rho / penalty_[j] : rho);
    }
    top = warp_largest(top);
    if (lane_ == 0) scratch_.reach[warp_] = static_cast<double>(top);
    if (thread_ == 0) scratch_.dependent = scratch_.indefinite = 0;
    __syncthreads();
    top_ = reach();
    __syncthreads();
  }

  // Largest of the warps' scratch_.reach.
  __device__ __forceinline__ double reach() const {
    double largest = scratch_.reach[0];
#pragma unroll
    for (int x = 1; x < kWarps; x++) largest = larger(largest, scratch_.reach[x]);
    return largest;
  }

  // ------------------------------------------------------------------------------------------------- pass over columns

  __device__ __forceinline__ void pass(bool exact) {
    const double taken = kSafety * args_.tol * top_, far = 0.4995 * (top_ - a_);
    const double bar = k_ == 0 && far > taken ? far : taken;  // a cold start takes only what is far above its bound
    if constexpr (sizeof(T) == 4) {
      if (!exact) return list_violators<float>(bar);
    }
    list_violators<double>(bar);
  }

  // Violations |rho_j| / penalty_j - a above `bar`, off A, go to the warp's part of the list and into its histogram;
  // sums in the type Sum. The pass in float64 leaves max |rho_j| / penalty_j in scratch_.reach.
  template <class Sum>
  __device__ __forceinline__ void list_violators(double bar) {
    constexpr int V = 16 / sizeof(T);
    const int first_entry = warp_ * part(), padded_k = (k_ + kRows - 1) / kRows * kRows;
    const int* index = active_.index(side_);
    const T* w = active_.w();
    const Sum a = static_cast<Sum>(a_), least = static_cast<Sum>(bar);
    Sum furthest = 0;
    int listed = 0;
    for (int first = 0; first < args_.n; first += 2 * kPiece<T>) {
      const int j0 = first + thread_ * V, j1 = j0 + kPiece<T>;
      const bool inside0 = j0 < args_.n, inside1 = j1 < args_.n;
      Sum rho[2 * V] = {};
      const T* s = row(target_) + j0;
      if (inside0) accumulate(rho, s, Sum(1));
      if (inside1) accumulate(rho + V, s + kPiece<T>, Sum(1));
      for (int e = 0; e < padded_k; e += kRows) {
        const Pack<int, kRows> j = load<kRows>(index + e);
        const Pack<T, kRows> c = load<kRows>(w + e);
#pragma unroll
        for (int x = 0; x < kRows; x++) {
          const T* r = row(j.v[x]) + j0;
          if (inside0) accumulate(rho, r, -static_cast<Sum>(c.v[x]));
          if (inside1) accumulate(rho + V, r + kPiece<T>, -static_cast<Sum>(c.v[x]));
        }
      }
      unsigned hits = 0, negative = 0;
#pragma unroll
      for (int x = 0; x < 2 * V; x++) {
        const int j = (x < V ? j0 : j1) + x % V;
        if (rho[x] < Sum(0)) negative |= 1u << x;
        rho[x] = magnitude(rho[x]);
        if (j >= args_.n || j == target_) continue;
        if (penalty_) rho[x] /= static_cast<Sum>(penalty_[j]);
        furthest = larger(furthest, rho[x]);
        if (rho[x] - a > least && !(columns_.member[j / 32] >> (j % 32) & 1)) hits |= 1u << x;
      }
      if (!__any_sync(kAll, hits)) continue;
#pragma unroll
      for (int x = 0; x < 2 * V; x++) {
        const unsigned lanes = __ballot_sync(kAll, hits >> x & 1);
        if (hits >> x & 1) {
          const int at = first_entry + listed + __popc(lanes & ((1u << lane_) - 1));
          columns_.violation[at] = static_cast<float>((rho[x] - a) / static_cast<Sum>(top_));
          columns_.entry[at] = 2 * ((x < V ? j0 : j1) + x % V) + static_cast<int>(negative >> x & 1);
        }
        listed += __popc(lanes);
      }
    }
    if (sizeof(Sum) == 8) {
      furthest = warp_largest(furthest);
      if (lane_ == 0) scratch_.reach[warp_] = static_cast<double>(furthest);
    }
    if (lane_ == 0) scratch_.listed[warp_] = scratch_.kept[warp_] = listed;
    fill_histogram(first_entry, listed);
  }

  template <class Sum>
  static __device__ __forceinline__ void accumulate(Sum* rho, const T* r, Sum factor) {
    constexpr int V = 16 / sizeof(T);
    const Pack<T, V> x = load<V>(r);
#pragma unroll
    for (int v = 0; v < V; v++) rho[v] += factor * static_cast<Sum>(x.v[v]);
  }

  // Bin 0 holds violations of lambda_max / 2 and more; two bins an octave, and the last holds all small ones.
  static __device__ __forceinline__ int bin(float violation) {
    const int b = (__float_as_int(1.0f) - __float_as_int(violation)) >> 22;
    return b < 0 ? 0 : (b < kBins ? b : kBins - 1);
  }

  __device__ __forceinline__ void fill_histogram(int first_entry, int listed) {
    scratch_.histogram[warp_][lane_] = 0;
    __syncwarp();  // also after the entries
    for (int x = lane_; x < listed; x += 32)
      atomicAdd(&scratch_.histogram[warp_][bin(columns_.violation[first_entry + x])], 1);
  }

  // How many violators there are, and the bins among which the worst `wanted` are; computed by every warp.
  __device__ __forceinline__ Found tally(int wanted) const {
    int count = 0;
#pragma unroll
    for (int x = 0; x < kWarps; x++) count += scratch_.histogram[x][lane_];
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int before = __shfl_up_sync(kAll, count, o);
      if (lane_ >= o) count += before;
    }
    const unsigned enough = __ballot_sync(kAll, count >= wanted);
    return {__shfl_sync(kAll, count, 31), enough ? __ffs(static_cast<int>(enough)) - 1 : kBins - 1};
  }

  // Leaves, in order, the warp's entries in bins up to `last`.
  __device__ __forceinline__ void keep_worst(int last) {
    const int first = warp_ * part(), listed = scratch_.listed[warp_];
    int kept = 0;
    for (int x = 0; x < listed; x += 32) {
      const bool valid = x + lane_ < listed;
      const float violation = valid ? columns_.violation[first + x + lane_] : 0.0f;
      const int entry = valid ? columns_.entry[first + x + lane_] : 0;
      const bool keep = valid && bin(violation) <= last;
      const unsigned lanes = __ballot_sync(kAll, keep);
      if (keep) {
        const int at = first + kept + __popc(lanes & ((1u << lane_) - 1));
        columns_.violation[at] = violation;
        columns_.entry[at] = entry;
      }
      kept += __popc(lanes);
    }
    if (lane_ == 0) scratch_.kept[warp_] = kept;
  }

  // -------------------------------------------------------------------------------------------------------- active set

  __device__ __forceinline__ bool flipped(int e) const { return !(active_.w()[e] * active_.sign(side_)[e] > T(0)); }

  // Computed by every warp.
  __device__ __forceinline__ Flips count_flips() const {
    Flips flips = {0, k_};
    for (int e = 0; e < k_; e += 32) {
      const unsigned lanes = __ballot_sync(kAll, e + lane_ < k_ && flipped(e + lane_));
      if (lanes && flips.count == 0) flips.first = e + __ffs(static_cast<int>(lanes)) - 1;
      flips.count += __popc(lanes);
    }
    return flips;
  }

  __device__ __forceinline__ int most_additions(int left) const {
    if (guarded_) return left == k_ ? 1 : 0;
    const int wanted = k_ / 3 > kMinAdd ? k_ / 3 : kMinAdd;
    return left + wanted > W ? blocks_of(left + wanted) * W - left : wanted;
  }

  // Step 3 of the method: the next active set, on the other side of the doubled arrays. Returns the first changed
  // block.
  __device__ __forceinline__ int change(const Flips& flips, const Found& found, int wanted) {
    const bool single = anchored_ && flips.count > 0;
    T reach = 1;  // part of the way from anchor to w
    const Flips drops = single ? Flips{1, first_sign_change(&reach)} : flips;
    const int left = k_ - drops.count, added = found.total < wanted ? found.total : wanted;
    const int block = (left < drops.first ? left : drops.first) / W;
    if (drops.count)
      for (int e = thread_; e < k_; e += kThreads) {  // negative: dropped; else what survivors are ordered by
        const bool dropped = single ? e == drops.first : flipped(e);
        active_.temporary()[e] = dropped ? T(-1) : (single ? T(0) : magnitude(active_.w()[e]));
      }
    if (found.total > wanted) keep_worst(found.last);
    __syncthreads();
    const Active<T> next = room_for(left + added);
    keep_survivors(next, block, drops.count > 0, reach);
    add_violators(next, left, wanted);
    for (int e = left + added + thread_; e < blocks_of(left + added) * W; e += kThreads)
      next.index(!side_)[e] = target_;  // a pass reads that row, times 0
    __syncthreads();
    if (next.base != active_.base) {
      release(lock_);
      lock_ = scratch_.lock;
      active_ = next;
    }
    side_ = !side_;
    k_ = left + added;
    pivots_ += drops.count + added;
    return block;
  }

  // The coordinate that loses its sign first on the way from anchor to w, and the part of the way up to there; computed
  // by every warp. There is a flipped coordinate.
  __device__ __forceinline__ int first_sign_change(T* reach) const {
    T least = 2;
    int at = k_;
    for (int e = lane_; e < k_; e += 32) {
      if (!flipped(e)) continue;
      const T from = active_.anchor(side_)[e], r = from / (from - active_.w()[e]), part = r >= T(0) ? r : T(0);
      if (part < least) {
        least = part;
        at = e;
      }
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
      const T part = __shfl_xor_sync(kAll, least, o);
      const int other = __shfl_xor_sync(kAll, at, o);
      if (part < least || (part == least && other < at)) {
        least = part;
        at = other;
      }
    }
    *reach = least;
    return at;
  }

  // The present state if it has room for k coordinates, else a slice of the workspace.
  __device__ __forceinline__ Active<T> room_for(int k) {
    if (blocks_of(k) * W <= active_.capacity) return active_;
    if (thread_ == 0) take_slice(k);
    __syncthreads();
    return {reinterpret_cast<T*>(scratch_.slice), scratch_.slice_capacity};
  }

  __device__ __forceinline__ void take_slice(int k) {
    Pool<T> pool;
    while (pool.capacity < k) pool = pool.next(args_.n, args_.num_targets);
    int* locks = args_.counters + 1 + pool.first_lock;
    int slice = static_cast<int>(blockIdx.x % pool.slices);
    while (atomicCAS(&locks[slice], 0, 1) != 0) {
      slice = slice + 1 < pool.slices ? slice + 1 : 0;
#if defined(__CUDA_ARCH__)
      __nanosleep(100);
#endif
    }
    __threadfence();
    scratch_.slice = args_.slices + pool.offset + slice * pool.bytes;
    scratch_.slice_capacity = pool.capacity;
    scratch_.lock = static_cast<int>(1 + pool.first_lock + slice);
  }

  // After a barrier behind the last use.
  __device__ __forceinline__ void release(int lock) const {
    if (thread_ != 0 || lock < 0) return;
    __threadfence();
    atomicExch(&args_.counters[lock], 0);
  }

  // Survivors to `next`; those behind the first changed block by falling order, if any is dropped.
  __device__ __forceinline__ void keep_survivors(const Active<T>& next, int block, bool drops, T reach) {
    const int first = block * W;
    if (next.base != active_.base) {
      const int64_t size = Active<T>::panel_offset(block);
      for (int64_t x = thread_; x < size; x += kThreads) next.base[x] = active_.base[x];
      for (int x = thread_; x < first; x += kThreads) next.y()[x] = active_.y()[x];
    }
    const T* order = active_.temporary();
    for (int e = thread_; e < k_; e += kThreads) {
      const int j = active_.index(side_)[e];
      int at = e;
      if (drops) {
        const T own = order[e];
        if (own < T(0)) {
          toggle_member(j);
          continue;
        }
        if (e >= first) {
          at = first;
          for (int c = first; c < k_; c++) at += order[c] > own || (order[c] == own && c < e);
        }
      }
      const T from = active_.anchor(side_)[e], to = active_.w()[e];
      next.index(!side_)[at] = j;
      next.sign(!side_)[at] = active_.sign(side_)[e];
      next.anchor(!side_)[at] = reach < T(1) ? from + reach * (to - from) : to;
    }
  }

  // The worst `wanted` of the kept violators behind the survivors, by rank.
  __device__ __forceinline__ void add_violators(const Active<T>& next, int left, int wanted) {
    for (int x = lane_; x < scratch_.kept[warp_]; x += 32) {
      const float violation = columns_.violation[warp_ * part() + x];
      const int entry = columns_.entry[warp_ * part() + x];
      int rank = 0;
      for (int other = 0; other < kWarps; other++)
        for (int y = other * part(); y < other * part() + scratch_.kept[other]; y++) {
          const float v = columns_.violation[y];
          rank += v > violation || (v == violation && columns_.entry[y] < entry);
        }
      if (rank >= wanted) continue;
      next.index(!side_)[left + rank] = entry >> 1;
      next.sign(!side_)[left + rank] = entry & 1 ? T(-1) : T(1);
      next.anchor(!side_)[left + rank] = T(0);
      toggle_member(entry >> 1);
    }
  }

  // ---------------------------------------------------------------------------------------------------- linear algebra

  // w = inv(S_AA) (s_A - a_A sign_A), where blocks from `first` on have changed.
  __device__ __forceinline__ void resolve(int first) {
    const int blocks = blocks_of(k_);
    bool small = false;
    for (int b = first; b < blocks; b++) gather(b);
    __syncwarp();
    for (int b = first; b < blocks; b++) {
      for (int J = 0; J < b; J++) eliminate(b, J);
      __syncthreads();
      if (b > 0) {
        const T* panel = active_.panel(b);
        subtract(active_.inverse(b) + kColumns * warp_, product(panel, panel + kColumns * warp_, b * W, lane_));
        __syncthreads();
      }
      if (warp_ == 0) {
        const int filled = k_ - b * W < W ? k_ - b * W : W;
        const Pivots pivots = invert_factor(active_.inverse(b), active_.temporary() + b * W, filled, guarded_, lane_);
        if (pivots.negative && guarded_ && lane_ == 0) scratch_.indefinite = 1;  // else it may be rounding
        small |= pivots.small;

        forward_block(active_.panel(b), b, active_.y(), active_.y(), lane_);
      }
      __syncthreads();
    }
    if (thread_ == 0 && small) scratch_.dependent++;
    back(active_.y(), active_.w());
  }

  // The warp's columns of block column b of S_AA, of its diagonal (into temporary) and of the right side (into y).
  __device__ __forceinline__ void gather(int b) {
    const int* index = active_.index(side_);
    const int c = kColumns * warp_ + lane_ % kColumns, column = b * W + c;
    const bool real = column < k_;
    const int j = real ? index[column] : target_;
    const T* r = row(j);
    T* panel = active_.panel(b);
#pragma unroll 4
    for (int l = lane_ / kColumns; l < b * W + W; l += 32 / kColumns)
      panel[l * W + c] = real && l < k_ ? r[index[l]] : T(l == column);
    if (lane_ < kColumns) {
      active_.temporary()[column] = real ? r[j] : T(1);
      active_.y()[column] =
          real ? row(target_)[j] - static_cast<T>(a_ * penalty(j)) * active_.sign(side_)[column] : T(0);
    }
  }

  // The warp's columns of R_Jb = inv(R_JJ') (S_Jb - sum over I < J of R_IJ' R_Ib).
  __device__ __forceinline__ void eliminate(int b, int J) {
    T* columns = active_.panel(b) + kColumns * warp_;
    T* tile = columns + J * W * W;
    if (J > 0) subtract(tile, product(active_.panel(J), columns, J * W, lane_));
    __syncwarp();
    const Pack<T, 2> x = product(active_.inverse(J), tile, W, lane_);
    const Place at(lane_);
    __syncwarp();
    tile[at.q * W + at.c] = x.v[0];
    tile[at.q * W + W + at.c] = x.v[1];
    __syncwarp();
  }

  __device__ __forceinline__ void subtract(T* tile, const Pack<T, 2>& x) const {
    const Place at(lane_);
    tile[at.q * W + at.c] -= x.v[0];
    tile[at.q * W + W + at.c] -= x.v[1];
  }

  // x = inv(R) z. A block of x is computed by every warp; then each thread takes it off its rows above.
  __device__ __forceinline__ void back(const T* z, T* x) {
    const int r = lane_ & 15, half = lane_ >> 4;
    T* rest = active_.temporary();
    for (int I = blocks_of(k_) - 1; I >= 0; I--) {
      const T* inverse = active_.inverse(I) + r * W + half * (W / 2);
      const T* right = (I == blocks_of(k_) - 1 ? z : rest) + I * W + half * (W / 2);
      T sum = 0;
#pragma unroll
      for (int q = 0; q < W / 2; q++) sum += inverse[q] * right[q];
      sum += __shfl_xor_sync(kAll, sum, 16);
      if (warp_ == 0 && lane_ < W) x[I * W + r] = sum;
      T solved[W];
#pragma unroll
      for (int q = 0; q < W; q++) solved[q] = __shfl_sync(kAll, sum, q);
      for (int l = thread_; l < I * W; l += kThreads) {
        const T* above = active_.panel(I) + l * W;
        T left = (I == blocks_of(k_) - 1 ? z : rest)[l];
#pragma unroll
        for (int q = 0; q < W; q++) left -= above[q] * solved[q];
        rest[l] = left;
      }
      __syncthreads();
    }
  }

  // w += inv(S_AA) defect.
  __device__ __forceinline__ void refine() {
    T* defect = active_.defect();
    T* correction = active_.anchor(!side_);
    if (warp_ == 0)
      for (int b = 0; b < blocks_of(k_); b++) forward_block(active_.panel(b), b, defect, defect, lane_);
    __syncthreads();
    back(defect, correction);
    for (int e = thread_; e < k_; e += kThreads) active_.w()[e] += correction[e];
  }

  // ------------------------------------------------------------------------------------------------------- certificate

  // After a pass in float64: rho on A, err2, duality gap and violation in float64, into scratch_.info; leaves the
  // defect. Returns the largest violation on the support.
  __device__ __forceinline__ double measure() {
    const int* index = active_.index(side_);
    const T* w = active_.w();
    double residual = 0, linear = 0, curvature = 0, norm = 0;  // s'w, rho'w, sum_j penalty_j |w_j|
    for (int e = thread_; e < blocks_of(k_) * W; e += kThreads) {
      if (e >= k_) {
        active_.defect()[e] = T(0);
        continue;
      }
      const int j = index[e];
      const T* r = row(j);
      const double s = row(target_)[j], x = w[e], factor = penalty(j), bound = a_ * factor;
      double rho = s;
#pragma unroll 4
      for (int c = 0; c < k_; c++) rho -= static_cast<double>(w[c]) * static_cast<double>(r[index[c]]);
      active_.defect()[e] = static_cast<T>(rho - bound * static_cast<double>(active_.sign(side_)[e]));
      const double excess = x == 0 ? magnitude(rho) - bound : magnitude(rho - (x > 0 ? bound : -bound));
      residual = larger(residual, excess / factor);
      linear += s * x;
      curvature += rho * x;
      norm += factor * magnitude(x);
    }
    residual = warp_largest(residual);
    linear = warp_sum(linear);
    curvature = warp_sum(curvature);
    norm = warp_sum(norm);
    if (lane_ == 0) {
      double* sums = scratch_.sums[warp_];
      sums[0] = linear, sums[1] = curvature, sums[2] = norm, sums[3] = residual;
    }
    __syncthreads();
    linear = curvature = norm = residual = 0;
#pragma unroll
    for (int x = 0; x < kWarps; x++) {
      const double* sums = scratch_.sums[x];
      linear += sums[0], curvature += sums[1], norm += sums[2], residual = larger(residual, sums[3]);
    }
    if (thread_ == 0) {
      const double furthest = reach(), tau = furthest > a_ ? a_ / furthest : 1.0;  // tau (residual) is dual feasible
      const double variance = row(target_)[target_], err2 = variance - linear - curvature;
      const double worst = larger(residual, furthest - a_);
      scratch_.info[kErr2] = err2;
      scratch_.info[kDualityGap] = err2 + 2 * a_ * norm - tau * (2 * (variance - linear) - tau * err2);
      scratch_.info[kKktViolation] = top_ > 0 && worst > 0 ? worst / top_ : 0.0;
    }
    return residual;
  }

  __device__ __forceinline__ int status(bool capped) const {
    if (capped) return kCapped;
    if (scratch_.info[kErr2] < -1e-3 * static_cast<double>(row(target_)[target_])) return kNotPsd;
    if (scratch_.info[kKktViolation] <= args_.tol) return kConverged;
    return scratch_.indefinite ? kNotPsd : kCollinear;
  }

  // Support by increasing index, and what `measure` found.
  __device__ __forceinline__ void report(int t, bool capped) {
    const int* index = active_.index(side_);
    const T* w = active_.w();
    int32_t* index_row = args_.index + t * args_.capacity;
    T* value_row = args_.value + t * args_.capacity;
    for (int e = thread_; e < k_; e += kThreads) {
      int rank = 0;
      for (int c = 0; c < k_; c++) rank += w[c] != T(0) && index[c] < index[e];
      if (w[e] == T(0) || rank >= args_.capacity) continue;
      index_row[rank] = index[e];
      value_row[rank] = w[e];
    }
    int nonzero = 0;  // computed by every warp
    for (int e = 0; e < k_; e += 32) nonzero += __popc(__ballot_sync(kAll, e + lane_ < k_ && w[e + lane_] != T(0)));
    const bool cut = nonzero > args_.capacity;
    const int64_t count = cut ? args_.capacity : nonzero;
    for (int64_t x = count + thread_; x < args_.capacity; x += kThreads) {
      index_row[x] = 0;
      value_row[x] = T(0);
    }
    if (thread_ == 0) {
      double* info = args_.info + static_cast<int64_t>(t) * kInfoSize;
      info[kErr2] = scratch_.info[kErr2];
      info[kDualityGap] = scratch_.info[kDualityGap];
      info[kKktViolation] = scratch_.info[kKktViolation];
      info[kPivots] = pivots_;
      info[kStatus] = cut ? kCapped : status(capped);
      info[kLambdaMax] = 2 * top_;
      args_.count[t] = static_cast<int32_t>(count);
    }
    __syncthreads();
    release(lock_);
  }

  const Arguments<T>& args_;
  Scratch& scratch_;
  const int thread_, lane_, warp_;
  T* shared_;  // the smallest active set
  Columns columns_;
  int target_, k_, side_, pivots_, lock_;  // side_: of the doubled arrays, the one in use; lock_: of the slice, or -1
  double a_, top_;                         // lam / 2, lambda_max / 2
  const T* penalty_;
  bool guarded_, anchored_;  // single pivots; and their starting point is there
  Active<T> active_;
};

// Targets from a queue, until it is empty.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>) solve_targets(const Arguments<T> args) {
  ND_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ Scratch scratch;
  Solver<T> solver(args, memory, scratch);
  for (;;) {
    if (threadIdx.x == 0) scratch.task = atomicAdd(args.counters, 1);
    __syncthreads();
    const int t = scratch.task;
    if (t >= args.num_targets) return;
    solver.solve(t);
  }
}

template <class T>
int launch(Arguments<T> args, int64_t n, int64_t num_targets, unsigned char* workspace, void* stream) {
  if (num_targets == 0) return cudaSuccess;
  if (n < 1 || n >= int64_t{1} << 30 || num_targets < 0 || num_targets > INT32_MAX || args.capacity < 0)
    return cudaErrorInvalidValue;
  const Plan p = plan<T>(n, num_targets);
  args.n = static_cast<int>(n);
  args.num_targets = static_cast<int>(num_targets);
  args.counters = reinterpret_cast<int*>(workspace);
  args.columns = workspace + p.counters;
  args.slices = args.columns + p.columns;
  const auto s = static_cast<cudaStream_t>(stream);
  if (const cudaError_t error = cudaMemsetAsync(args.counters, 0, p.counters, s)) return error;
  static_assert(Active<T>::bytes(kSharedSupport<T>) + 2048 * 8 + 256 + sizeof(Scratch) <= 48 << 10);
  const int64_t shared = Active<T>::bytes(kSharedSupport<T>) + (n > kSharedColumns ? 0 : Columns::bytes<T>(n));
  const int64_t blocks = num_targets < kMaxBlocks ? num_targets : kMaxBlocks;
  ND_LAUNCH(solve_targets<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), static_cast<size_t>(shared), s,
            args);
  return cudaGetLastError();
}

template <class T>
size_t workspace_bytes(int64_t n, int64_t num_targets) {
  return static_cast<size_t>(plan<T>(n, num_targets).total);
}

}  // namespace nd::covlasso

extern "C" size_t nd_covlasso_workspace_f32(int64_t n, int64_t num_targets) {
  return nd::covlasso::workspace_bytes<float>(n, num_targets);
}

extern "C" size_t nd_covlasso_workspace_f64(int64_t n, int64_t num_targets) {
  return nd::covlasso::workspace_bytes<double>(n, num_targets);
}

extern "C" int nd_covlasso_f32(const float* cov, int64_t n, int64_t ld, const int64_t* targets, const double* lam,
                               int64_t num_targets, const float* penalty, int64_t penalty_stride, double tol,
                               int64_t max_pivots, int32_t* index, float* value, int64_t capacity, int32_t* count,
                               double* info, void* workspace, void* stream) {
  return nd::covlasso::launch<float>({cov, 0, ld, targets, lam, 0, penalty, penalty_stride, tol, max_pivots, index,
                                      value, capacity, count, info, nullptr, nullptr, nullptr},
                                     n, num_targets, static_cast<unsigned char*>(workspace), stream);
}

extern "C" int nd_covlasso_f64(const double* cov, int64_t n, int64_t ld, const int64_t* targets, const double* lam,
                               int64_t num_targets, const double* penalty, int64_t penalty_stride, double tol,
                               int64_t max_pivots, int32_t* index, double* value, int64_t capacity, int32_t* count,
                               double* info, void* workspace, void* stream) {
  return nd::covlasso::launch<double>({cov, 0, ld, targets, lam, 0, penalty, penalty_stride, tol, max_pivots, index,
                                       value, capacity, count, info, nullptr, nullptr, nullptr},
                                      n, num_targets, static_cast<unsigned char*>(workspace), stream);
}
