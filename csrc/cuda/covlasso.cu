// CovLasso from covariances, exactly, one thread block a problem:
//
//     min over w:   w' S w / 2 - s' w + sum_j a_j |w_j|,     a_j = a penalty_j, a = lam / 2      (w >= 0 if asked for)
//
// s: a row of S, whose own column i is left out, or a row of other covariances with the n columns. With rho = s - S w,
// w is optimal iff rho_j = a_j sign(w_j) on the support and |rho_j| <= a_j elsewhere; without the bars if w >= 0. A
// column of infinite penalty may not enter. A ridge is part of S. A path is a list of lam, solved one from the other.
//
// Method: block active set, that is semismooth Newton with a growth limit.
//   1. w = inv(S_AA) (s_A - a_A sign_A) through a blocked Cholesky factor of S_AA. A coordinate that depends on those
//      before it is left out: its w is 0, and it counts as flipped;
//   2. one pass over the k rows of S in A: rho is never stored, its violators go to a list;
//   3. at once: drop every coordinate whose sign flipped and add the worst violators, max(8, k/3) rounded up to a full
//      block; only blocks from the first changed one are factored again, survivors behind it ordered by falling |w|;
//   4. no flip and no violator: the pass once more in float64. It is the certificate, or finds what float32 hid. A
//      residual on A above tolerance is refined.
// After 60 steps, or 10 that left coordinates out, single pivots: w moves up to the first sign change, which is
// dropped, else the worst violator enters. If that depends on A, w moves along the null direction, until it takes the
// place of another coordinate. The objective falls at each. No cap on the support but that of the outputs; S may be
// singular. At the next lam of a path the set, its signs and the factor stay: two triangular solves and a pass.
//
// Exactly k nonzeros (float64): homotopy from lambda_max down with the same factor. Between two turns w = u - a v and
// rho = p + a q; a pass that sums p and q finds where the next coordinate vanishes or joins. A column that depends on A
// is put aside until a coordinate vanishes; ties are taken one by one. The segment found is solved as above.
//
// Floor per target: the certifying pass, n k values of S out of L2, and k^3 / 6 multiply-adds. n = 1000, k = 25, 1000
// targets, float32: 0.1 GB. A solve reads 0.4 to 0.5 MB: passes over the growing supports, the float64 one, and gathers
// of 32-byte sectors. Its time is a chain of waits: a step has 4 + 3 ceil(k/16) block barriers if few blocks are
// factored, 16 dependent pivots a factored block, and n / 1024 times k/4 loads of rows. What counts is therefore the
// number of targets that an SM holds. Where S exceeds L2 the rows come from memory: n = 50,000, k = 30 takes 6 MB a
// pass.
//
// Threads: 4 warps a block, 8 blocks an SM in float32, 4 in float64. A block takes targets from a queue until it is
// empty. Where they are more than run at once, a first kernel sorts them into 32 buckets by the number of |s_j| > a_j,
// and those with most come first. Pass: 16 bytes a thread, two pieces of a row and four rows at a time. Factor: a warp
// owns 4 of the 16 columns of a block, so that its triangular solve needs no block barrier; one warp inverts the
// diagonal block in registers. Registers: the cap of 64 for 8 blocks costs float32 up to 64 bytes of stack. They hold
// what lives from one phase to the next; the loops of the passes and of the factor do not touch them.
//
// Memory: shared memory holds the violators of up to 2048 columns and the state of up to 80 (float32) or 64 (float64)
// coordinates, 27.1 KB in float32 for n <= 1024. A larger support moves, doubling, to slices of the workspace. Slices
// of one size form a pool under locks; a block takes them in rising order only, so that no two wait for each other.
// Workspace: at most 128 MB or one slice a size (k^2 / 2 values), 256 MB of columns (8 n bytes a block) above n = 2048,
// and 128 bytes a target. n = 50,000, 64 targets, capacity 1024, float32: 0.36 GB; n = 1000, 1000 targets: 0.46 GB.
//
// Determinism: sums in a fixed order, violators ranked by (violation, index); nothing depends on which block, slice or
// warp came first. Limits: n < 2^26.
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
constexpr int kMaxDependent = 10;                     // steps that leave out coordinates, before single pivots
constexpr int kMaxBlocks = 1024;                      // of a launch
constexpr int64_t kPoolBytes = int64_t{128} << 20;    // of the slices of one size
constexpr int64_t kColumnBytes = int64_t{256} << 20;  // of the columns of all blocks
constexpr int kBuckets = 32;                          // of targets by expected work, two an octave; one a lane
constexpr double kOnBound = 1e-10;                    // of penalty_j: a column that stays as near to its bound is on it
constexpr double kAtRest = 1e-11;                     // of the fastest: a coordinate that does not move along the path
constexpr double kShortest = 1e-9;                    // of its upper end: a segment of the path
constexpr double kPathEnd = 1e-10;                    // of lambda_max: where a path ends
constexpr double kPastTies = 1e-6;                    // of lam: how far down columns that tie are passed
constexpr double kSafety = 0.85;                      // part of the tolerance at which a violator is taken up

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
#if !defined(ND_COVLASSO_LEAST_LIMIT)
#define ND_COVLASSO_LEAST_LIMIT 1024
#endif
#if !defined(ND_COVLASSO_PATIENCE)
#define ND_COVLASSO_PATIENCE 32
#endif
constexpr int64_t kLeastLimit = ND_COVLASSO_LEAST_LIMIT;    // an active set may always grow to this size
constexpr int kPatience = ND_COVLASSO_PATIENCE;             // turns of a homotopy that leave lam where it is
constexpr int kGuardAfter = ND_COVLASSO_GUARD_AFTER;        // steps before single pivots
constexpr int kSharedColumns = ND_COVLASSO_SHARED_COLUMNS;  // largest n whose violators are listed in shared memory
template <class T>
constexpr int kSharedSupport = ND_COVLASSO_SHARED_SUPPORT;  // coordinates held in shared memory, a multiple of W
template <class T>
constexpr int kBlocksPerSm = sizeof(T) == 4 ? 8 : 4;  // caps registers at 64 and 128 a thread
template <class T>
constexpr T kLargest = sizeof(T) == 4 ? T(3.4028234e38) : T(1.7976931348623157e308);  // finite
template <class T>
constexpr T kPivotFloor = sizeof(T) == 4 ? T(4e-6) : T(1e-13);  // of the diagonal: below, dependent on the others
template <class T>
constexpr T kLift = T(1e-2);             // part of that floor to which a pivot is raised, where it must not be left out
constexpr double kNegativePivot = 1e-2;  // of the diagonal: below minus this, S is not PSD

enum Info : int { kErr2, kDualityGap, kKktViolation, kPivots, kStatus, kLambdaMax, kInfoSize };
enum Status : int { kConverged, kCapped, kCollinear, kNotPsd, kTooFew };

// N values, loaded and stored as one.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

// p, which points to global memory: pointers that were kept in shared memory do not tell.
template <class T>
__device__ __forceinline__ const T* global(const T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

template <class T>
__device__ __forceinline__ T magnitude(T x) {
  return x < T(0) ? -x : x;
}
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return Max()(a, b);
}
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return rsqrt(x); }

__host__ __device__ constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
__host__ __device__ constexpr int blocks_of(int k) { return (k + W - 1) / W; }

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // columns a thread reads at once
template <class T>
constexpr int kPiece = kThreads * kVector<T>;  // columns the block reads at once

// The calling thread. Read anew wherever it is made: otherwise all that derives from it stays in registers throughout.
struct Me {
  int thread, lane, warp;
  __device__ __forceinline__ Me() {
#if defined(__CUDA_ARCH__)
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
#else
    thread = static_cast<int>(threadIdx.x);
#endif
    lane = thread % kWarpSize;
    warp = thread / kWarpSize;
  }
};

// x of lanes 0 to `lane`, summed.
__device__ __forceinline__ int inclusive_sum(int x, int lane) {
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const int before = __shfl_up_sync(kFullWarp, x, o);
    if (lane >= o) x += before;
  }
  return x;
}

// ------------------------------------------------------------------------------------------------------------- memory

// The state of an active set of up to `capacity` coordinates (a multiple of W), in shared memory or in a slice of the
// workspace. Arrays that a step permutes are kept twice.
//
// Factor: R'R = S_AA, R upper triangular, in panels. Panel b is [16 b + 16, 16], row after row: R[0 : 16 b, block b],
// then the inverse of the diagonal block R_bb.
template <class T>
struct Active {
  T *panels, *vectors;
  int capacity;

  static __host__ __device__ constexpr int64_t panel_offset(int64_t b) { return W * W / 2 * b * (b + 1); }
  static __host__ __device__ constexpr int64_t bytes(int64_t capacity) {
    return (panel_offset(capacity / W) + 8 * capacity) * static_cast<int64_t>(sizeof(T)) + 2 * capacity * 4;
  }
  static __device__ __forceinline__ Active at(unsigned char* memory, int capacity) {
    T* panels = reinterpret_cast<T*>(memory);
    return {panels, panels + panel_offset(capacity / W), capacity};
  }

  __device__ __forceinline__ T* panel(int b) const { return panels + panel_offset(b); }
  __device__ __forceinline__ T* inverse(int b) const { return panel(b) + b * W * W; }
  // Vectors [capacity]: inv(R') (s_A - a_A sign_A), and its right side before; what a step or a solve works on;
  // rho_A - a_A sign_A; coefficients, 0 beyond k; their signs; the last point that has them; the columns of S.
  __device__ __forceinline__ T* y() const { return vectors; }
  __device__ __forceinline__ T* rest() const { return vectors + capacity; }
  __device__ __forceinline__ T* defect() const { return vectors + 2 * capacity; }
  __device__ __forceinline__ T* w() const { return vectors + 3 * capacity; }
  __device__ __forceinline__ T* sign(int side) const { return vectors + (4 + side) * capacity; }
  __device__ __forceinline__ T* anchor(int side) const { return vectors + (6 + side) * capacity; }

  __device__ __forceinline__ int* index(int side) const {
    return reinterpret_cast<int*>(vectors + 8 * capacity) + side * capacity;
  }
};

constexpr int kCounters = 1 + kBuckets;  // ints before the locks

// The slices of the workspace for active sets of up to `capacity` coordinates; the first is the set in shared memory.
template <class T>
struct Pool {
  int64_t capacity = kSharedSupport<T>, slices = 0, bytes = 0;  // bytes of a slice
  int64_t first_lock = 0, offset = 0;                           // of the first slice; offset in bytes

  __host__ __device__ Pool next(int64_t n, int64_t blocks) const {
    Pool p;
    p.capacity = 2 * capacity < n ? 2 * capacity : round_up(n, W);
    p.bytes = round_up(Active<T>::bytes(p.capacity), 256);
    const int64_t fit = kPoolBytes / p.bytes;
    p.slices = fit < 1 ? 1 : (fit < blocks ? fit : blocks);
    p.first_lock = first_lock + slices;
    p.offset = offset + slices * bytes;
    return p;
  }
};

// The list of violators of a target, a part of it for each warp, and one bit a column: is it in A?
template <class T>
struct Columns {
  unsigned char* memory;
  int length;  // of the list

  static __host__ __device__ constexpr int64_t padded(int64_t n) { return round_up(n, 2 * kPiece<T>); }
  static __host__ __device__ constexpr int64_t bytes(int64_t n) { return padded(n) * 8 + round_up(n, 512) / 8; }

  // The violation |rho_j| - a_j relative to lambda_max / 2, and 2 j + (rho_j < 0) of each.
  __device__ __forceinline__ float* violation() const { return reinterpret_cast<float*>(memory); }
  __device__ __forceinline__ int* entry() const { return reinterpret_cast<int*>(memory) + length; }

  __device__ __forceinline__ unsigned* member() const { return reinterpret_cast<unsigned*>(memory) + 2 * length; }
  __device__ __forceinline__ int part() const { return length / kWarps; }  // a warp's
};

// How a launch is cut, and the bytes of its workspace: queue, buckets and locks; the buckets' lists of targets; columns
// of every block; with the slices of every size all of it.
struct Plan {
  int64_t blocks, limit;  // limit: of an active set
  int64_t counters, lists, columns, total;
};

template <class T>
Plan plan(int64_t n, int64_t num_targets, int64_t capacity) {
  Plan p;
  p.blocks = num_targets < kMaxBlocks ? num_targets : kMaxBlocks;
  p.columns = 0;
  if (n > kSharedColumns) {
    const int64_t fit = kColumnBytes / Columns<T>::bytes(n);
    if (p.blocks > fit) p.blocks = fit < 1 ? 1 : fit;
    p.columns = round_up(p.blocks * Columns<T>::bytes(n), 256);
  }
  p.limit = 2 * capacity > kLeastLimit ? 2 * capacity : kLeastLimit;
  if (p.limit > n) p.limit = n;
  Pool<T> pool;
  while (pool.capacity < p.limit) pool = pool.next(n, p.blocks);
  p.counters = round_up(4 * (kCounters + pool.first_lock + pool.slices), 256);
  p.lists = round_up(4 * kBuckets * num_targets, 256);
  p.total = p.counters + p.lists + p.columns + pool.offset + pool.slices * pool.bytes;
  return p;
}

// NdCovlassoArgs for a kernel, with the parts of the workspace.
template <class T>
struct Arguments {
  const T* cov;
  int64_t cov_stride;
  const T* cross;
  int n, row_bytes;  // of S
  int num_targets, num_lams, num_blocks, limit;
  const double* variance;
  const int64_t* targets;
  const double* lam;
  const T* penalty;
  int64_t penalty_stride;
  double ridge;
  const double* scale;
  bool nonnegative;
  const T* start_value;
  const int32_t *start_index, *start_count;
  int64_t start_capacity;
  double tol;
  int64_t max_pivots;
  int32_t* index;
  T* value;
  int64_t capacity;
  int32_t* count;
  double* info;
  int k;  // of the top k
  double position;
  double* lam_out;
  int* counters;           // queue, targets of each bucket, then the locks of the slices
  int* lists;              // [kBuckets, num_targets] targets by expected work; null: they come as they are
  unsigned char* columns;  // [blocks] of Columns, unless they are in shared memory
  unsigned char* slices;
};

// Row j of a matrix with the strides of S.
template <class T>
__device__ __forceinline__ const T* row_of(const Arguments<T>& args, const T* matrix, int j) {
  const int64_t bytes = static_cast<int64_t>(args.row_bytes) * j;
  return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(matrix) + bytes);
}
template <class T>
__device__ __forceinline__ const T* matrix_of(const Arguments<T>& args, int t) {
  return args.cov + args.cov_stride * t;
}
// c of problem t.
template <class T>
__device__ __forceinline__ const T* source_of(const Arguments<T>& args, int t) {
  return row_of(args, args.cross ? args.cross : matrix_of(args, t), static_cast<int>(args.targets[t]));
}
template <class T>
__device__ __forceinline__ double scale_of(const Arguments<T>& args) {
  return args.scale ? *args.scale : 1.0;
}
// |x|, or x where only positive coefficients are wanted: what may not exceed a_j off the support.
template <class T, class Real>
__device__ __forceinline__ Real pressure(const Arguments<T>& args, Real x) {
  return args.nonnegative ? x : magnitude(x);
}

// Of a certificate: s'w, rho'w, sum_j penalty_j |w_j|, largest violation on the support.
struct Sums {
  double linear, curvature, norm, residual;
};

// Shared by the threads of a block; per warp where it is an array of kWarps.
template <class T>
struct Scratch {
  int histogram[kWarps][kBins];
  int listed[kWarps];                    // violators
  int kept[kWarps];                      // of them, those that may be among the worst
  double reach[kWarps], excess[kWarps];  // max |rho_j| / penalty_j and max |rho_j| - a_j
  Sums sums[kWarps];
  // The problem, in units of S.
  double a, top, inverse_top;  // lam / 2, lambda_max / 2
  double far;                  // the violation a cold start asks for
  double scale;                // S over the covariance as it was
  double variance;             // v
  const T *cov, *source;       // S; s, a row of it or of cross
  const T* penalty;            // [n] or null
  Columns<T> columns;
  Active<T> active[2];  // the side in use, and what the next step writes
  int task, target;     // target: the column left out, -1: none
  int lock, next_lock;  // of the slices, -1: none
  int step, pivots, refinements;
  int dependent;           // steps that left out a coordinate
  bool small, indefinite;  // was a pivot of this step below the floor, one of any step clearly negative?
  bool guarded, anchored;  // single pivots; and their starting point is there
  T raise;                 // guarded, as a number
};

// ------------------------------------------------------------------------------------------------------- warp products

// The element of a 16 x 4 product that a lane receives: rows q and q + 1, column c.
struct Place {
  int q, c;
  __device__ __forceinline__ explicit Place(int lane)
      : q(4 * (lane & 3) + 2 * ((lane >> 3) & 1)), c(2 * ((lane >> 2) & 1) + (lane >> 4)) {}

  // Of four columns of a tile [16, 16].
  template <class T>
  __device__ __forceinline__ void set(T* tile, const Pack<T, 2>& x) const {
    tile[q * W + c] = x.v[0];
    tile[q * W + W + c] = x.v[1];
  }
  template <class T>
  __device__ __forceinline__ void subtract(T* tile, const Pack<T, 2>& x) const {
    set(tile, {tile[q * W + c] - x.v[0], tile[q * W + W + c] - x.v[1]});
  }
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
    half[v] = (second ? sum[1][v] : sum[0][v]) + __shfl_xor_sync(kFullWarp, second ? sum[0][v] : sum[1][v], 16);
  Pack<T, 2> out;
#pragma unroll
  for (int v = 0; v < 2; v++)
    out.v[v] = (lower ? half[v + 2] : half[v]) + __shfl_xor_sync(kFullWarp, lower ? half[v] : half[v + 2], 8);
  return out;
}

struct Pivots {
  bool small, negative;  // was there one below the floor, one below minus kNegativePivot?
};

// tile := inverse of the upper triangular Cholesky factor of the symmetric tile [16, 16], by one warp: elimination of
// [tile | identity], a lane a column. A pivot below a floor, relative to diagonal[q], is raised where raise = 1;
// where raise = 0, its row and column are left out: zeros in the inverse, so that none of its rounding errors spread.
// Rows and columns from `filled` on are those of the identity.
template <class T>
__device__ __forceinline__ Pivots invert_factor(T* tile, const T* diagonal, int filled, T raise, int lane) {
  const int c = lane & 15;
  T a[W];
#pragma unroll
  for (int q = 0; q < W; q++) a[q] = lane < W ? tile[q * W + c] : T(q == c);
  const T d = diagonal[c], floor = d > T(0) ? kPivotFloor<T> * d : T(1);

  Pivots pivots = {false, c < filled && !(d > T(0))};
#pragma unroll
  for (int q = 0; q < W; q++) {
    if (q == filled) break;  // uniform
    const T pivot = __shfl_sync(kFullWarp, a[q], q), least = __shfl_sync(kFullWarp, floor, q);
    const bool small = !(pivot > least);
    pivots.small |= small;
    pivots.negative |= pivot < -static_cast<T>(kNegativePivot / kPivotFloor<T>) * least;
    const T lifted = pivot > kLift<T> * least ? pivot : kLift<T> * least;
    const T root = inverse_root(lifted) * (small ? raise : T(1));
    const T scaled = a[q] * (root * root);
#pragma unroll
    for (int e = 1; e < W; e++)
      if (e > q) a[e] -= __shfl_sync(kFullWarp, a[q], e) * scaled;
    a[q] *= root;
  }
  if (lane >= W) {
#pragma unroll
    for (int q = 0; q < W; q++) tile[c * W + q] = a[q];
  }
  pivots.negative = __any_sync(kFullWarp, pivots.negative);
  return pivots;
}

// z_b = inv(R_bb') (r_b - R[0 : 16 b, block b]' z), by one warp; r may be z.
template <class T>
__device__ __forceinline__ void forward_block(const T* panel, int b, const T* r, T* z, int lane) {
  const int q = lane & 15, half = lane >> 4;
  T sum = 0, out = 0;
#pragma unroll 4
  for (int l = half; l < b * W; l += 2) sum += panel[l * W + q] * z[l];
  sum += __shfl_xor_sync(kFullWarp, sum, 16);
  const T t = r[b * W + q] - sum;
  const T* inverse = panel + b * W * W;
#pragma unroll
  for (int e = 0; e < W / 2; e++) {
    const int row = half * (W / 2) + e;
    out += inverse[row * W + q] * __shfl_sync(kFullWarp, t, row);
  }
  out += __shfl_xor_sync(kFullWarp, out, 16);
  if (lane < W) z[b * W + q] = out;
  __syncwarp();
}

// ---------------------------------------------------------------------------------------------------------- one target

// Solves targets, one after the other; called by all threads of a block. Members are the same in all threads.
template <class T>
class Solver {
 public:
  __device__ __forceinline__ Solver(const Arguments<T>& args, Scratch<T>& scratch) : args_(args), shared_(scratch) {}

  // Problem number t of the call, one penalty after the other: writes its rows of the outputs.
  __device__ __forceinline__ void solve(int t) {
    start(t);
    if (args_.start_count) take_start(t);
    for (int l = 0; l < args_.num_lams; l++) {
      const int64_t row = static_cast<int64_t>(t) * args_.num_lams + l;
      const int changed = begin(args_.lam[row], l == 0);
      report(row, converge(changed));
    }
    finish();
  }

  // Problem number t at the first penalties at which k coefficients are nonzero. A homotopy that columns with a tie
  // keep in place is moved past them by steps of the other method.
  __device__ __forceinline__ void solve_top_k(int t) {
    const Me me;
    start(t);
    begin(0, true);
    double lam, high = shared_.top;
    int turns = 0;
    Way way;
    bool capped;
    do {
      way = follow(&high, &turns);
      lam = 2 * high / shared_.scale;
      renew_members();
      capped = converge(begin(lam, false));
    } while (way == kStuck);
    if (me.thread == 0) shared_.pivots += turns;
    const int nonzero = report(t, capped || way == kGivenUp);
    if (me.thread == 0) {
      args_.lam_out[t] = lam;
      double& status = args_.info[static_cast<int64_t>(t) * kInfoSize + kStatus];
      if (status == double{kConverged} && nonzero != args_.k) status = way == kFound ? kCollinear : kTooFew;
    }
    finish();
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

  __device__ __forceinline__ const T* row(int j, const T* matrix) const { return global(row_of(args_, matrix, j)); }
  __device__ __forceinline__ const T* row(int j) const { return row(j, shared_.cov); }
  __device__ __forceinline__ const T* source() const { return global(shared_.source); }
  __device__ __forceinline__ double penalty(int j) const {
    return shared_.penalty ? static_cast<double>(global(shared_.penalty)[j]) : 1.0;
  }
  __device__ __forceinline__ bool exhausted() const { return shared_.pivots >= args_.max_pivots; }
  __device__ __forceinline__ const Active<T>& active() const { return shared_.active[side_]; }
  __device__ __forceinline__ void toggle_member(int j) const {
    atomicXor(&shared_.columns.member()[j / 32], 1u << (j % 32));
  }

  // Problem t, with an empty active set.
  __device__ __forceinline__ void start(int t) {
    ND_DYNAMIC_SHARED(unsigned char, memory);  // the smallest active set, then the columns
    const Me me;
    k_ = side_ = 0;
    const Columns<T> columns = {args_.n > kSharedColumns ? args_.columns + blockIdx.x * Columns<T>::bytes(args_.n)
                                                         : memory + Active<T>::bytes(kSharedSupport<T>),
                                static_cast<int>(Columns<T>::padded(args_.n))};
#pragma unroll 1
    for (int x = me.thread; x < (args_.n + 31) / 32; x += kThreads) columns.member()[x] = 0;
    if (me.thread == 0) {
      const int target = static_cast<int>(args_.targets[t]);
      const T* source = source_of(args_, t);
      shared_.scale = scale_of(args_);
      shared_.variance =
          args_.cross ? args_.variance[target] * shared_.scale : source[target] - args_.ridge * shared_.scale;
      shared_.cov = matrix_of(args_, t);
      shared_.source = source;
      shared_.target = args_.cross ? -1 : target;
      shared_.penalty = args_.penalty ? args_.penalty + args_.penalty_stride * t : nullptr;
      shared_.columns = columns;
      shared_.active[0] = Active<T>::at(memory, kSharedSupport<T>);
      shared_.lock = -1;
      shared_.small = shared_.guarded = shared_.anchored = false;
      shared_.raise = 0;
    }
    __syncthreads();
  }

  // By one thread, once nothing reads the active set.
  __device__ __forceinline__ void finish() const {
    if (Me().thread == 0) release(shared_.lock);
  }

  // The active set and the signs of the given solution of problem t; w is not used.
  __device__ __forceinline__ void take_start(int t) {
    const Me me;
    const int given = args_.start_count[t], most = static_cast<int>(args_.start_capacity);
    const int count = given < most ? given : most;
    const int32_t* index = args_.start_index + args_.start_capacity * t;
    const T* value = args_.start_value + args_.start_capacity * t;
    if (me.thread == 0) {
      make_room(count < args_.limit ? count : args_.limit);
      shared_.lock = shared_.next_lock;
      shared_.active[0] = shared_.active[1];
    }
    __syncthreads();
    if (me.warp == 0) {
      const Active<T> set = active();
      unsigned* member = shared_.columns.member();
      int taken = 0;
#pragma unroll 1
      for (int first = 0; first < count; first += 32) {
        const int x = first + me.lane, j = x < count ? index[x] : -1;
        const T sign = x < count ? value[x] : T(0);
        bool usable =
            j >= 0 && j < args_.n && j != shared_.target && (sign > T(0) || (sign < T(0) && !args_.nonnegative));
        if (usable) usable = penalty(j) <= static_cast<double>(kLargest<T>) && !(member[j / 32] >> (j % 32) & 1);
#pragma unroll 1
        for (int lane = 0; lane < 31; lane++) {
          const int other = __shfl_sync(kFullWarp, usable ? j : -1, lane);
          if (lane < me.lane && other == j) usable = false;
        }
        const unsigned lanes = __ballot_sync(kFullWarp, usable);
        const int at = taken + __popc(lanes & ((1u << me.lane) - 1));
        if (usable && at < args_.limit) {
          set.index(0)[at] = j;
          set.sign(0)[at] = sign > T(0) ? T(1) : T(-1);
          set.w()[at] = T(0);
          toggle_member(j);
        }
        taken += __popc(lanes);
        __syncwarp();
      }
      if (taken > args_.limit) taken = args_.limit;
      if (me.lane == 0) shared_.task = taken;
      for (int e = taken + me.lane; e < blocks_of(taken) * W; e += 32) set.index(0)[e] = 0;
    }
    __syncthreads();
    k_ = shared_.task;
  }

  // The next penalty. Returns the first block of the active set that is to be factored.
  __device__ __forceinline__ int begin(double lam, bool first) {
    const Me me;
    const double half = 0.5 * lam * shared_.scale;
    if (first || k_ == 0) scan(half);
    if (me.thread == 0) {
      if (first) {
        shared_.top = largest(shared_.reach);
        shared_.inverse_top = 1 / shared_.top;
      }
      shared_.far = 0.4995 * largest(shared_.excess);
      shared_.a = half;
      shared_.step = shared_.pivots = shared_.refinements = shared_.dependent = 0;
      shared_.indefinite = false;
    }
    __syncthreads();
    if (first) return 0;
    const Active<T> set = active();
    for (int e = me.thread; e < k_; e += kThreads) {
      const int j = set.index(side_)[e];
      set.y()[e] = source()[j] - static_cast<T>(half * penalty(j)) * set.sign(side_)[e];
      set.anchor(side_)[e] = set.w()[e];
    }
    __syncthreads();
    forward(set.y());
    __syncthreads();
    return blocks_of(k_);
  }

  // Leaves the parts of the largest |s_j| / penalty_j and |s_j| - a_j.
  __device__ __forceinline__ void scan(double half) const {
    const Me me;
    T top = 0, excess = 0;
#pragma unroll 1
    for (int j = me.thread; j < args_.n; j += kThreads) {
      const T rho = pressure(args_, source()[j]), factor = shared_.penalty ? global(shared_.penalty)[j] : T(1);
      if (j == shared_.target || !(factor <= kLargest<T>)) continue;
      top = larger(top, rho / factor);
      excess = larger(excess, rho - static_cast<T>(half) * factor);
    }
    top = warp_max(top);
    excess = warp_max(excess);
    if (me.lane == 0) {
      shared_.reach[me.warp] = static_cast<double>(top);
      shared_.excess[me.warp] = static_cast<double>(excess);
    }
    __syncthreads();
  }

  // Steps 1 to 4 until nothing is left to do; true if given up as capped.
  __device__ __forceinline__ bool converge(int changed) {
    bool exact = sizeof(T) == 8, stopped = false;
    for (;;) {
      if (changed >= 0) resolve(changed);
      changed = -1;
      pass(exact);
      __syncthreads();
      const Flips flips = count_flips();
      const int wanted = most_additions(k_ - flips.count);
      const Found found = tally(wanted);
      const bool solved = flips.count == 0 && found.total == 0, full = flips.count == 0 && wanted == 0;
      if (!solved && !stopped) {
        stopped = exhausted() || full || shared_.indefinite;
        if (!stopped) changed = change(flips, found, wanted);
        exact = stopped || sizeof(T) == 8;
        __syncthreads();  // the next pass overwrites the tally
        continue;
      }
      if (exact) {
        const double residual = measure();
        if (stopped || residual <= 0.5 * args_.tol * shared_.top || shared_.refinements == kMaxRefinements)
          return stopped && !solved && (exhausted() || full);
        refine();
      }
      exact = true;
      __syncthreads();
    }
  }

  static __device__ __forceinline__ double largest(const double* of_warps) {
    double x = of_warps[0];
#pragma unroll
    for (int w = 1; w < kWarps; w++) x = larger(x, of_warps[w]);
    return x;
  }

  // ------------------------------------------------------------------------------------------------- pass over columns

  __device__ __forceinline__ void pass(bool exact) {
    const double taken = kSafety * args_.tol * shared_.top;
    const double bar =
        k_ == 0 && shared_.far > taken ? shared_.far : taken;  // a cold start takes only what is far above
    if constexpr (sizeof(T) == 4) {
      if (!exact) return list_violators<float>(bar);
    }
    list_violators<double>(bar);
  }

  // Violations |rho_j| - a_j above `bar`, off A, go to the warp's part of the list and into its histogram; sums in the
  // type Real. The pass in float64 leaves the parts of the largest |rho_j| / penalty_j and |rho_j| - a_j.
  template <class Real>
  __device__ __forceinline__ void list_violators(double bar) {
    constexpr int kHeld = kPieces<Real> * kVector<T>;
    const Me me;
    const Columns<T> list = shared_.columns;
    const int first_entry = me.warp * list.part(), padded_k = (k_ + kRows - 1) / kRows * kRows;
    Real reach = 0, excess = 0;
    int listed = 0;
    for (int first = 0; first < args_.n; first += kPieces<Real> * kPiece<T>) {
      const int j0 = first + me.thread * kVector<T>;
      Real rho[kHeld];
      combine_rows<true>(rho, active().w(), j0, padded_k);
      unsigned negative = 0;
      const unsigned hits = violators(rho, j0, static_cast<Real>(bar), &negative, &reach, &excess);
      if (!__any_sync(kFullWarp, hits)) continue;
      const Real scale = static_cast<Real>(shared_.inverse_top);
#pragma unroll
      for (int x = 0; x < kHeld; x++) {
        const unsigned lanes = __ballot_sync(kFullWarp, hits >> x & 1);
        if (hits >> x & 1) {
          const int at = first_entry + listed + __popc(lanes & ((1u << me.lane) - 1));
          list.violation()[at] = static_cast<float>(rho[x] * scale);
          list.entry()[at] = 2 * (j0 + column_offset(x)) + static_cast<int>(negative >> x & 1);
        }
        listed += __popc(lanes);
      }
    }
    if (sizeof(Real) == 8) {
      reach = warp_max(reach);
      excess = warp_max(excess);
      if (me.lane == 0) {
        shared_.reach[me.warp] = static_cast<double>(reach);
        shared_.excess[me.warp] = static_cast<double>(excess);
      }
    }
    if (me.lane == 0) shared_.listed[me.warp] = shared_.kept[me.warp] = listed;
    fill_histogram(list.violation() + first_entry, listed);
  }

  // A thread holds pieces of 16 bytes, one of every kPiece<T> columns: x is column j0 + column_offset(x). Two pieces,
  // but one where float32 is summed in float64, for want of registers.
  template <class Real>
  static constexpr int kPieces = sizeof(Real) == sizeof(T) ? 2 : 1;
  static __device__ __forceinline__ constexpr int column_offset(int x) {
    return x % kVector<T> + x / kVector<T> * kPiece<T>;
  }

  // rho = s - S w in the thread's columns, or -S w if not Sourced; w and its index are padded to kRows. Beyond column n
  // it is that of column 0.
  template <bool Sourced, class Real>
  __device__ __forceinline__ void combine_rows(Real* rho, const T* w, int j0, int padded_k) const {
    constexpr int V = kVector<T>, P = kPieces<Real>;
    const int* index = active().index(side_);
    const T* piece[P];
    Pack<T, V> x[kRows][P];
#pragma unroll
    for (int p = 0; p < P; p++) {
      const int j = j0 + p * kPiece<T>;
      const int at = j < args_.n ? j : 0;
      piece[p] = shared_.cov + at;
      if (Sourced) x[0][p] = load<V>(source() + at);
#pragma unroll
      for (int v = 0; v < V; v++) rho[p * V + v] = Sourced ? static_cast<Real>(x[0][p].v[v]) : Real(0);
    }
    for (const T* end = w + padded_k; w != end; w += kRows, index += kRows) {
      const Pack<int, kRows> j = load<kRows>(index);
#pragma unroll
      for (int i = 0; i < kRows * P; i++) x[i / P][i % P] = load<V>(row(j.v[i / P], piece[i % P]));
      __syncwarp();  // keeps all loads ahead of the sums: one wait, not several
      const Pack<T, kRows> c = load<kRows>(w);
#pragma unroll
      for (int i = 0; i < kRows * P; i++)
#pragma unroll
        for (int v = 0; v < V; v++)
          rho[i % P * V + v] -= static_cast<Real>(c.v[i / P]) * static_cast<Real>(x[i / P][i % P].v[v]);
    }
  }

  // Which of the thread's columns violate by more than `bar`, and which have rho < 0; rho becomes the violation.
  template <class Real>
  __device__ __forceinline__ unsigned violators(Real* rho, int j0, Real bar, unsigned* negative, Real* reach,
                                                Real* excess) const {
    const unsigned* member = shared_.columns.member();
    const Real a = static_cast<Real>(shared_.a);
    unsigned hits = 0;
#pragma unroll
    for (int x = 0; x < kPieces<Real> * kVector<T>; x++) {
      const int j = j0 + column_offset(x);
      if (rho[x] < Real(0)) *negative |= 1u << x;
      if (j >= args_.n || j == shared_.target) continue;
      const Real size = pressure(args_, rho[x]);
      Real factor = 1;
      if (shared_.penalty) {
        factor = static_cast<Real>(global(shared_.penalty)[j]);
        if (!(factor <= static_cast<Real>(kLargest<T>))) continue;
      }
      rho[x] = size - a * factor;
      if (sizeof(Real) == 8) {
        *reach = larger(*reach, shared_.penalty ? size / factor : size);
        *excess = larger(*excess, rho[x]);
      }
      if (rho[x] > bar && !(member[j / 32] >> (j % 32) & 1)) hits |= 1u << x;
    }
    return hits;
  }

  // Bin 0 holds violations of lambda_max / 2 and more; two bins an octave, and the last holds all small ones.
  static __device__ __forceinline__ int bin(float violation) {
    const int b = (__float_as_int(1.0f) - __float_as_int(violation)) >> 22;
    return b < 0 ? 0 : (b < kBins ? b : kBins - 1);
  }

  __device__ __forceinline__ void fill_histogram(const float* violation, int listed) {
    const Me me;
    shared_.histogram[me.warp][me.lane] = 0;
    __syncwarp();  // also behind the list
#pragma unroll 1
    for (int x = me.lane; x < listed; x += 32) atomicAdd(&shared_.histogram[me.warp][bin(violation[x])], 1);
  }

  // How many violators there are, and the bins among which the worst `wanted` are; computed by every warp.
  __device__ __forceinline__ Found tally(int wanted) const {
    const Me me;
    int count = 0;
#pragma unroll
    for (int x = 0; x < kWarps; x++) count += shared_.histogram[x][me.lane];
    count = inclusive_sum(count, me.lane);
    const unsigned enough = __ballot_sync(kFullWarp, count >= wanted);
    return {__shfl_sync(kFullWarp, count, 31), enough ? __ffs(static_cast<int>(enough)) - 1 : kBins - 1};
  }

  // Leaves, in order, the warp's entries in bins up to `last`.
  __device__ __forceinline__ void keep_worst(int last) {
    const Me me;
    const Columns<T> list = shared_.columns;
    float* violation = list.violation() + me.warp * list.part();
    int* entry = list.entry() + me.warp * list.part();
    const int listed = shared_.listed[me.warp];
    int kept = 0;
#pragma unroll 1
    for (int first = 0; first < listed; first += 32) {
      const int x = first + me.lane;
      const float v = x < listed ? violation[x] : 0.0f;
      const int e = x < listed ? entry[x] : 0;
      const bool keep = x < listed && bin(v) <= last;
      const unsigned lanes = __ballot_sync(kFullWarp, keep);
      if (keep) {
        const int at = kept + __popc(lanes & ((1u << me.lane) - 1));
        violation[at] = v;
        entry[at] = e;
      }
      kept += __popc(lanes);
    }
    if (me.lane == 0) shared_.kept[me.warp] = kept;
  }

  // -------------------------------------------------------------------------------------------------------- active set

  __device__ __forceinline__ bool flipped(int e) const { return !(active().w()[e] * active().sign(side_)[e] > T(0)); }

  // Computed by every warp.
  __device__ __forceinline__ Flips count_flips() const {
    const Me me;
    Flips flips = {0, k_};
#pragma unroll 1
    for (int e = 0; e < k_; e += 32) {
      const unsigned lanes = __ballot_sync(kFullWarp, e + me.lane < k_ && flipped(e + me.lane));
      if (lanes && flips.count == 0) flips.first = e + __ffs(static_cast<int>(lanes)) - 1;
      flips.count += __popc(lanes);
    }
    return flips;
  }

  __device__ __forceinline__ int most_additions(int left) const {
    const int room = args_.limit - left;
    if (shared_.guarded) return left == k_ && room > 0 ? 1 : 0;
    int wanted = k_ / 3 > kMinAdd ? k_ / 3 : kMinAdd;
    if (left + wanted > W) wanted = blocks_of(left + wanted) * W - left;
    return wanted < room ? wanted : room;
  }

  // Step 3 of the method: the next active set, on the other side. Returns the first changed block.
  __device__ __forceinline__ int change(const Flips& flips, const Found& found, int wanted) {
    const Me me;
    const bool single = shared_.anchored && flips.count > 0;
    T part = 1;  // of the way from anchor to w
    const Flips drops = single ? Flips{1, first_sign_change(&part)} : flips;
    if (drops.count)
      for (int e = me.thread; e < k_; e += kThreads) {  // negative: dropped; else what survivors are ordered by
        const bool dropped = single ? e == drops.first : flipped(e);
        active().rest()[e] = dropped ? T(-1) : (single ? T(0) : magnitude(active().w()[e]));
      }
    if (found.total > wanted) keep_worst(found.last);
    return rebuild(drops, found.total < wanted ? found.total : wanted, part);
  }

  // The active set without those that are marked in rest, and with the worst `added` of the kept violators.
  __device__ __forceinline__ int rebuild(const Flips& drops, int added, T part) {
    const Me me;
    const int left = k_ - drops.count, k = left + added, block = (left < drops.first ? left : drops.first) / W;
    if (me.thread == 0) make_room(k);
    __syncthreads();
    const Active<T> next = shared_.active[!side_];
    if (next.panels != active().panels) move_factor(next, block);
    keep_survivors(next, block * W, drops.count > 0, part);
    add_violators(next, left, added);
    for (int e = k + me.thread; e < blocks_of(k) * W; e += kThreads)
      next.index(!side_)[e] = 0;  // a pass reads that row, times 0
    __syncthreads();
    if (me.thread == 0) {
      if (shared_.next_lock != shared_.lock) release(shared_.lock);
      shared_.lock = shared_.next_lock;
      shared_.pivots += drops.count + added;
      shared_.step++;
      shared_.refinements = 0;
    }
    side_ = !side_;
    k_ = k;
    return block;
  }

  // The coordinate that loses its sign first on the way from anchor to w, and the part of the way up to there; computed
  // by every warp. There is a flipped coordinate.
  __device__ __forceinline__ int first_sign_change(T* part) const {
    const Me me;
    T least = 2;
    int at = k_;
#pragma unroll 1
    for (int e = me.lane; e < k_; e += 32) {
      if (!flipped(e)) continue;
      const T from = active().anchor(side_)[e], reach = from / (from - active().w()[e]);
      const T own = reach >= T(0) ? reach : T(0);
      if (own < least) {
        least = own;
        at = e;
      }
    }
    const ArgMax<T> first = warp_argmax(ArgMax<T>{-least, at});
    *part = -first.value;
    return first.index;
  }

  // By one thread: where the next state goes, the present place if that holds k coordinates, else a slice of the
  // workspace.
  __device__ __forceinline__ void make_room(int k) {
    shared_.active[!side_] = active();
    shared_.next_lock = shared_.lock;
    if (blocks_of(k) * W <= active().capacity) return;
    Pool<T> pool;
    while (pool.capacity < k) pool = pool.next(args_.n, args_.num_blocks);
    int* locks = args_.counters + kCounters + pool.first_lock;
    int slice = static_cast<int>(blockIdx.x % pool.slices);
    while (atomicCAS(&locks[slice], 0, 1) != 0) {
      slice = slice + 1 < pool.slices ? slice + 1 : 0;
#if defined(__CUDA_ARCH__)
      __nanosleep(100);
#endif
    }
    __threadfence();
    shared_.active[!side_] =
        Active<T>::at(args_.slices + pool.offset + slice * pool.bytes, static_cast<int>(pool.capacity));
    shared_.next_lock = static_cast<int>(kCounters + pool.first_lock + slice);
  }

  // By one thread, after a barrier behind the last use of the slice.
  __device__ __forceinline__ void release(int lock) const {
    if (lock < 0) return;
    __threadfence();
    atomicExch(&args_.counters[lock], 0);
  }

  // What stays of the factor and of y: the blocks before `block`.
  __device__ __forceinline__ void move_factor(const Active<T>& next, int block) const {
    const Me me;
    const int64_t size = Active<T>::panel_offset(block);
    for (int64_t x = me.thread; x < size; x += kThreads) next.panels[x] = active().panels[x];
    for (int x = me.thread; x < block * W; x += kThreads) next.y()[x] = active().y()[x];
  }

  // Survivors to `next`, and if any coordinate is dropped, those from `first` on by falling order. Anchors move to w,
  // or the part of the way that keeps all signs.
  __device__ __forceinline__ void keep_survivors(const Active<T>& next, int first, bool drops, T part) const {
    const Me me;
    const T* order = active().rest();
    for (int e = me.thread; e < k_; e += kThreads) {
      const int j = active().index(side_)[e];
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
      const T from = active().anchor(side_)[e], to = active().w()[e];
      next.index(!side_)[at] = j;
      next.sign(!side_)[at] = active().sign(side_)[e];
      next.anchor(!side_)[at] = part < T(1) ? from + part * (to - from) : to;
    }
  }

  // The worst `wanted` of the kept violators behind the survivors, by rank.
  __device__ __forceinline__ void add_violators(const Active<T>& next, int left, int wanted) const {
    const Me me;
    const Columns<T> list = shared_.columns;
    const float* violation = list.violation();
    const int* entry = list.entry();
    const int own = me.warp * list.part();
    for (int x = own + me.lane; x < own + shared_.kept[me.warp]; x += 32) {
      int rank = 0;
      for (int other = 0; other < kWarps; other++) {
        const int begin = other * list.part(), end = begin + shared_.kept[other];
        for (int y = begin; y < end; y++)
          rank += violation[y] > violation[x] || (violation[y] == violation[x] && entry[y] < entry[x]);
      }
      if (rank >= wanted) continue;
      next.index(!side_)[left + rank] = entry[x] >> 1;
      next.sign(!side_)[left + rank] = entry[x] & 1 ? T(-1) : T(1);
      next.anchor(!side_)[left + rank] = T(0);
      toggle_member(entry[x] >> 1);
    }
  }

  // ---------------------------------------------------------------------------------------------------- linear algebra

  // w = inv(S_AA) (s_A - a_A sign_A), where blocks from `first` on have changed.
  __device__ __forceinline__ void resolve(int first) {
    for (int b = first; b < blocks_of(k_); b++) gather(b);
    for (int b = first; b < blocks_of(k_); b++) {
      for (int J = 0; J < b; J++) eliminate(b, J);
      __syncthreads();
      if (b > 0) {
        complement(b);
        __syncthreads();
      }
      invert(b);
      __syncthreads();
    }
    if (Me().thread == 0) {
      shared_.dependent += shared_.small;
      shared_.small = false;
      shared_.anchored = shared_.guarded;
      shared_.guarded |= shared_.step >= kGuardAfter || shared_.dependent >= kMaxDependent;
      shared_.raise = shared_.guarded;
    }
    back(active().y(), active().w());
  }

  // The warp's columns of block column b of S_AA, of its diagonal (into rest) and of the right side (into y).
  __device__ __forceinline__ void gather(int b) const {
    const Me me;
    const Active<T> set = active();
    const int* index = set.index(side_);
    const int c = kColumns * me.warp + me.lane % kColumns, column = b * W + c;
    const bool real = column < k_;
    const int j = real ? index[column] : 0;
    const T* r = row(j);
    T* panel = set.panel(b);
#pragma unroll 4
    for (int l = me.lane / kColumns; l < b * W + W; l += 32 / kColumns)
      panel[l * W + c] = real && l < k_ ? r[index[l]] : T(l == column);
    if (me.lane < kColumns) {
      const T bound = static_cast<T>(shared_.a * penalty(j));
      set.rest()[column] = real ? r[j] : T(1);
      set.y()[column] = real ? source()[j] - bound * set.sign(side_)[column] : T(0);
    }
  }

  // The warp's columns of R_Jb = inv(R_JJ') (S_Jb - sum over I < J of R_IJ' R_Ib).
  __device__ __forceinline__ void eliminate(int b, int J) const {
    const Me me;
    T* columns = active().panel(b) + kColumns * me.warp;
    T* tile = columns + J * W * W;
    const Place at(me.lane);
    if (J > 0) at.subtract(tile, product(active().panel(J), columns, J * W, me.lane));
    __syncwarp();
    const Pack<T, 2> x = product(active().inverse(J), tile, W, me.lane);
    __syncwarp();
    at.set(tile, x);
    __syncwarp();
  }

  // The warp's columns of S_bb - sum over I < b of R_Ib' R_Ib.
  __device__ __forceinline__ void complement(int b) const {
    const Me me;
    const T* panel = active().panel(b);
    T* columns = active().panel(b) + kColumns * me.warp;
    Place(me.lane).subtract(columns + b * W * W, product(panel, columns, b * W, me.lane));
  }

  // By the first warp: the inverse of R_bb, and block b of y.
  __device__ __forceinline__ void invert(int b) const {
    const Me me;
    if (me.warp > 0) return;
    const int filled = k_ - b * W < W ? k_ - b * W : W;
    const Pivots pivots = invert_factor(active().inverse(b), active().rest() + b * W, filled, shared_.raise, me.lane);
    if (me.lane == 0) {
      shared_.small |= pivots.small;
      // Without the guard the set may depend on itself, and the sign of a pivot be that of rounding errors.
      shared_.indefinite |= pivots.negative && shared_.guarded;
    }
    forward_block(active().panel(b), b, active().y(), active().y(), me.lane);
  }

  // x = inv(R) z. A block of x is computed by every warp; then each thread takes it off its rows above.
  __device__ __forceinline__ void back(const T* z, T* x) const {
    const Me me;
    const int r = me.lane & 15, half = (me.lane >> 4) * (W / 2);
    const T* right = z;
    for (int I = blocks_of(k_) - 1; I >= 0; I--) {
      const T* inverse = active().inverse(I) + r * W + half;
      T sum = 0;
#pragma unroll
      for (int q = 0; q < W / 2; q++) sum += inverse[q] * right[I * W + half + q];
      sum += shuffle_xor(sum, 16);
      if (me.warp == 0 && me.lane < W) x[I * W + r] = sum;
      T solved[W];
#pragma unroll
      for (int q = 0; q < W; q++) solved[q] = __shfl_sync(kFullWarp, sum, q);
      T* rest = active().rest();
      for (int l = me.thread; l < I * W; l += kThreads) {
        const T* above = active().panel(I) + l * W;
        T left = right[l];
#pragma unroll
        for (int q = 0; q < W; q++) left -= above[q] * solved[q];
        rest[l] = left;
      }
      right = rest;
      __syncthreads();
    }
  }

  // z := inv(R') z, by the first warp.
  __device__ __forceinline__ void forward(T* z) const {
    const Me me;
    if (me.warp == 0)
      for (int b = 0; b < blocks_of(k_); b++) forward_block(active().panel(b), b, z, z, me.lane);
  }

  // w += inv(S_AA) defect.
  __device__ __forceinline__ void refine() const {
    const Me me;
    const Active<T> set = active();
    T* correction = set.anchor(!side_);
    forward(set.defect());
    __syncthreads();
    back(set.defect(), correction);
    for (int e = me.thread; e < k_; e += kThreads) set.w()[e] += correction[e];
    if (me.thread == 0) shared_.refinements++;
  }

  // ---------------------------------------------------------------------------------------------------------- homotopy

  // Where the path turns next below a = lam / 2: coordinate -1 - code of A reaches zero, or column code / 2 joins, with
  // sign -1 if code is odd. a = 0: nowhere.
  struct Turn {
    double a;
    int code;
  };

  // On the present active set w = u - a v and rho = p + a q, with u = inv(S_AA) s_A, which w holds, v = inv(S_AA) f_A,
  // f_j = penalty_j sign_j, p = s - S u, q = S v. Columns on the bound whatever a is, as a copy of an active one, do
  // not join.
  __device__ __forceinline__ Turn next_turn(double high) {
    constexpr int kHeld = kPieces<T> * kVector<T>;
    const Me me;
    const Active<T> set = active();
    T *factors = set.defect(), *v = set.anchor(!side_);
    for (int e = me.thread; e < blocks_of(k_) * W; e += kThreads)
      factors[e] = e < k_ ? static_cast<T>(penalty(set.index(side_)[e])) * set.sign(side_)[e] : T(0);
    __syncthreads();
    forward(factors);
    __syncthreads();
    back(factors, v);
    T fastest = 0;  // computed by every warp
#pragma unroll 1
    for (int e = me.lane; e < k_; e += 32) fastest = larger(fastest, magnitude(v[e]));
    fastest = warp_max(fastest);
    ArgMax<double> best = {0, INT32_MAX};
    for (int e = me.thread; e < k_; e += kThreads) {
      const T sign = set.sign(side_)[e], speed = sign * v[e], least = kAtRest * fastest;
      if (speed < -least) best = Max()(best, ArgMax<double>{clamped(set.w()[e] / v[e], high), -1 - e});
      // In a tie a coordinate may have entered that stays at zero.
      if (magnitude(speed) <= least && sign * set.w()[e] - high * speed <= high * least)
        best = Max()(best, ArgMax<double>{high, -1 - e});
    }
    const unsigned* member = shared_.columns.member();
    const int padded_k = (k_ + kRows - 1) / kRows * kRows;
    for (int first = 0; first < args_.n; first += kPieces<T> * kPiece<T>) {
      const int j0 = first + me.thread * kVector<T>;
      T p[kHeld], q[kHeld];
      combine_rows<true>(p, set.w(), j0, padded_k);
      combine_rows<false>(q, v, j0, padded_k);
#pragma unroll
      for (int x = 0; x < kHeld; x++) {
        const int j = j0 + column_offset(x);
        if (j >= args_.n || j == shared_.target || (member[j / 32] >> (j % 32) & 1)) continue;
        const T factor = static_cast<T>(penalty(j)), sign = p[x] < T(0) && !args_.nonnegative ? T(-1) : T(1);
        const T room = factor + sign * q[x];  // q is -S v here
        if (!(factor <= kLargest<T>) || !(room > kOnBound * factor) || !(sign * p[x] > T(0))) continue;
        best = Max()(best, ArgMax<double>{clamped(sign * p[x] / room, high), 2 * j + (sign < T(0))});
      }
    }
    best = warp_argmax(best);
    if (me.lane == 0) {
      shared_.sums[me.warp].linear = best.value;
      shared_.listed[me.warp] = best.index;
    }
    __syncthreads();
    for (int w = 0; w < kWarps; w++) best = Max()(best, ArgMax<double>{shared_.sums[w].linear, shared_.listed[w]});
    return {best.value, best.index};
  }

  static __device__ __forceinline__ double clamped(double a, double high) { return a > 0 ? (a < high ? a : high) : 0; }

  // The active set behind a turn. Returns the first changed block.
  __device__ __forceinline__ int take(int code) {
    const Me me;
    const Flips drops = code < 0 ? Flips{1, -1 - code} : Flips{0, k_};
    for (int e = me.thread; e < k_; e += kThreads) active().rest()[e] = T(e == drops.first ? -1 : 0);
    if (me.thread == 0) {
      shared_.columns.violation()[0] = 1;
      shared_.columns.entry()[0] = code;
      for (int w = 0; w < kWarps; w++) shared_.kept[w] = w == 0 && code >= 0;
      shared_.step = shared_.dependent = 0;  // no reason for single pivots
    }
    return rebuild(drops, code >= 0, T(1));
  }

  // Columns that were put aside may enter again.
  __device__ __forceinline__ void renew_members() const {
    const Me me;
    for (int x = me.thread; x < (args_.n + 31) / 32; x += kThreads) shared_.columns.member()[x] = 0;
    __syncthreads();
    for (int e = me.thread; e < k_; e += kThreads) toggle_member(active().index(side_)[e]);
    __syncthreads();
  }

  // How a homotopy ended: on a segment with k coordinates, without one, at a limit of the call, or by turns that leave
  // a where it is.
  enum Way { kFound, kEnded, kGivenUp, kStuck };

  // Follows the path down from *high = lam / 2 to the first segment with k coordinates, or to its end. Leaves in *high
  // where to solve. A column that depends on A is put aside until a coordinate vanishes.
  __device__ __forceinline__ Way follow(double* high, int* turns) {
    const double end = kPathEnd * shared_.top;
    if (Me().thread == 0) shared_.a = 0;
    int changed = 0, joined = -1, still = 0;
    for (;;) {
      __syncthreads();
      resolve(changed);
      __syncthreads();
      if (joined >= 0 && shared_.dependent) {
        __syncthreads();
        changed = take(-k_);
        if (Me().thread == 0) toggle_member(joined);
        joined = -1;
        continue;
      }
      const Turn turn = next_turn(*high);
      const double low = turn.a > end ? turn.a : 0;
      const bool visible = *high - low > kShortest * *high;
      if (k_ == args_.k && visible) {
        *high -= args_.position * (*high - low);
        return kFound;
      }
      if (low == 0) {
        *high = end;
        return kEnded;
      }
      if (*turns >= args_.max_pivots || k_ >= args_.limit) return kGivenUp;
      still = visible ? 0 : still + 1;
      *high = low;
      ++*turns;
      if (still > 2 * k_ + kPatience) {
        *high *= 1 - kPastTies;
        return kStuck;
      }
      changed = take(turn.code);
      joined = turn.code / 2;
      if (turn.code < 0) {
        renew_members();
        joined = -1;
      }
    }
  }

  // ------------------------------------------------------------------------------------------------------- certificate

  // After a pass in float64, with rho on A in float64 too: leaves the defect and, in shared_.sums, the parts of Sums;
  // returns the largest violation on the support.
  __device__ __forceinline__ double measure() {
    const Me me;
    const Active<T> set = active();
    const int* index = set.index(side_);
    const T *w = set.w(), *s = source();
    double linear = 0, curvature = 0, norm = 0, residual = 0;
    for (int e = me.thread; e < blocks_of(k_) * W; e += kThreads) {
      if (e >= k_) {
        set.defect()[e] = T(0);
        continue;
      }
      const int j = index[e];
      const T* r = row(j);
      const double x = w[e], factor = penalty(j), bound = shared_.a * factor;
      double rho = s[j];
#pragma unroll 4
      for (int c = 0; c < k_; c++) rho -= static_cast<double>(w[c]) * static_cast<double>(r[index[c]]);
      set.defect()[e] = static_cast<T>(rho - bound * static_cast<double>(set.sign(side_)[e]));
      const double excess = x == 0 ? pressure(args_, rho) - bound : magnitude(rho - (x > 0 ? bound : -bound));
      linear += static_cast<double>(s[j]) * x;
      curvature += rho * x;
      norm += factor * magnitude(x);
      residual = larger(residual, excess);
    }
    linear = warp_sum(linear), curvature = warp_sum(curvature), norm = warp_sum(norm), residual = warp_max(residual);
    if (me.lane == 0) shared_.sums[me.warp] = {linear, curvature, norm, residual};
    __syncthreads();
    for (int x = 0; x < kWarps; x++) residual = larger(residual, shared_.sums[x].residual);
    return residual;
  }

  // From what `measure` left; by one thread. Of the problem with the ridge, which is one more sample for each
  // predictor, on which the target is 0; what that adds to err2 is taken off in the end.
  __device__ __forceinline__ void certify(double* info, bool capped, double squares) const {
    Sums sums = {0, 0, 0, 0};
    for (int x = 0; x < kWarps; x++) {
      const Sums& part = shared_.sums[x];
      sums = {sums.linear + part.linear, sums.curvature + part.curvature, sums.norm + part.norm,
              larger(sums.residual, part.residual)};
    }
    const double variance = shared_.variance, err2 = variance - sums.linear - sums.curvature;
    const double a = shared_.a, reach = largest(shared_.reach),
                 tau = reach > a ? a / reach : 1.0;  // tau e is dual feasible
    const double worst = larger(sums.residual, largest(shared_.excess));
    const double violation = shared_.top > 0 ? worst * shared_.inverse_top : 0.0;
    const double unit = 1 / shared_.scale,
                 gap = err2 + 2 * a * sums.norm - tau * (2 * (variance - sums.linear) - tau * err2);
    info[kErr2] = err2 * unit - args_.ridge * squares;
    info[kDualityGap] = gap * unit;
    info[kKktViolation] = violation;
    info[kPivots] = shared_.pivots;
    info[kLambdaMax] = 2 * shared_.top * unit;
    if (capped)
      info[kStatus] = kCapped;
    else if (err2 < -1e-3 * variance)
      info[kStatus] = kNotPsd;
    else if (violation <= args_.tol)
      info[kStatus] = kConverged;
    else
      info[kStatus] = shared_.indefinite ? kNotPsd : kCollinear;
  }

  // Support by increasing index, and the certificate, into row `row` of the outputs. Returns the number of nonzeros.
  __device__ __forceinline__ int report(int64_t row, bool capped) const {
    const Me me;
    const int* index = active().index(side_);
    const T* w = active().w();
    int32_t* index_row = args_.index + row * args_.capacity;
    T* value_row = args_.value + row * args_.capacity;
    for (int e = me.thread; e < k_; e += kThreads) {
      int rank = 0;
      for (int c = 0; c < k_; c++) rank += w[c] != T(0) && index[c] < index[e];
      if (w[e] == T(0) || rank >= args_.capacity) continue;
      index_row[rank] = index[e];
      value_row[rank] = w[e];
    }
    int nonzero = 0;  // computed by every warp, as |w|^2
    double squares = 0;
#pragma unroll 1
    for (int e = me.lane; e - me.lane < k_; e += 32) {
      const double x = e < k_ ? w[e] : T(0);
      nonzero += __popc(__ballot_sync(kFullWarp, x != 0));
      squares += x * x;
    }
    squares = warp_sum(squares);
    const bool cut = nonzero > args_.capacity;
    const int64_t count = cut ? args_.capacity : nonzero;
#pragma unroll 1
    for (int64_t x = count + me.thread; x < args_.capacity; x += kThreads) {
      index_row[x] = 0;
      value_row[x] = T(0);
    }
    if (me.thread == 0) {
      certify(args_.info + row * kInfoSize, capped || cut, squares);
      args_.count[row] = static_cast<int32_t>(count);
    }
    __syncthreads();  // before the next penalty, or the slice is given back
    return nonzero;
  }

  const Arguments<T>& args_;
  Scratch<T>& shared_;
  int k_, side_;  // |A|, and the side in use of what is kept twice
};

// The next target of the queue, num_targets or more if it is empty; called by the first warp.
template <class T>
__device__ __forceinline__ int next_target(const Arguments<T>& args) {
  const int lane = Me().lane;
  const int position = __shfl_sync(kFullWarp, lane == 0 ? atomicAdd(args.counters, 1) : 0, 0);
  if (!args.lists || position >= args.num_targets) return position;
  const int size = args.counters[1 + lane], end = inclusive_sum(size, lane);
  const int bucket = __ffs(static_cast<int>(__ballot_sync(kFullWarp, end > position))) - 1;
  const int slot = position - __shfl_sync(kFullWarp, end - size, bucket);
  return args.lists[static_cast<int64_t>(bucket) * args.num_targets + slot];
}

// Targets from a queue, until it is empty; TopK: by homotopy.
template <class T, bool TopK>
__device__ __forceinline__ void work(const Arguments<T>& args, Scratch<T>& scratch) {
  Solver<T> solver(args, scratch);
  for (;;) {
    if (threadIdx.x < kWarpSize) {
      const int task = next_target(args);
      if (threadIdx.x == 0) scratch.task = task;
    }
    __syncthreads();
    const int t = scratch.task;
    if (t >= args.num_targets) return;
    if constexpr (TopK)
      solver.solve_top_k(t);
    else
      solver.solve(t);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>) solve_targets(const Arguments<T> args) {
  __shared__ Scratch<T> scratch;
  work<T, false>(args, scratch);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>) find_top_k(const Arguments<T> args) {
  __shared__ Scratch<T> scratch;
  work<T, true>(args, scratch);
}

// Targets into buckets by the number of |c_j| > a_j at the last penalty, which grows with the work; those with most in
// bucket 0. A warp a target. Where in its bucket a target lies depends on the order of the warps; its result does not.
template <class T>
__global__ void __launch_bounds__(kThreads) sort_targets(const Arguments<T> args) {
  const Me me;
  const int t = static_cast<int>(blockIdx.x) * kWarps + me.warp;
  if (t >= args.num_targets) return;
  const T* source = source_of(args, t);
  const T* penalty = args.penalty ? args.penalty + args.penalty_stride * t : nullptr;
  const T a = static_cast<T>(0.5 * args.lam[static_cast<int64_t>(t + 1) * args.num_lams - 1] * scale_of(args));
  float above = 0;
#pragma unroll 4
  for (int j = me.lane; j < args.n; j += kWarpSize)
    above += pressure(args, source[j]) > (penalty ? a * penalty[j] : a) ? 1.0f : 0.0f;
  above = warp_sum(above);
  if (me.lane != 0) return;
  const int octave = (__float_as_int(above + 1.0f) - __float_as_int(1.0f)) >> 22;
  const int bucket = octave < kBuckets ? kBuckets - 1 - octave : 0;
  const int slot = atomicAdd(&args.counters[1 + bucket], 1);
  args.lists[static_cast<int64_t>(bucket) * args.num_targets + slot] = t;
}

// Blocks that the device of this thread runs at once.
template <class T>
int64_t resident_blocks() {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return int64_t{processors} * kBlocksPerSm<T>;
}

// What the workspace depends on.
inline bool valid_sizes(const NdCovlassoArgs& args) {
  return args.n >= 1 && args.n < int64_t{1} << 26 && args.num_targets >= 0 && args.num_targets < int64_t{1} << 31 &&
         args.capacity >= 0;
}

inline bool valid(const NdCovlassoArgs& args) {
  return valid_sizes(args) && args.ld >= args.n && args.ld < int64_t{1} << 28 && args.num_lams >= 1 &&
         args.num_lams < int64_t{1} << 31 && args.start_capacity >= 0 && args.start_capacity < int64_t{1} << 31;
}

template <class T>
int launch(const NdCovlassoArgs& args, int k, double position, double* lam_out, void* workspace, void* stream) {
  if (!valid(args)) return cudaErrorInvalidValue;
  if (args.num_targets == 0) return cudaSuccess;
  const Plan p = plan<T>(args.n, args.num_targets, args.capacity);
  const bool sorted = k == 0 && args.num_targets > resident_blocks<T>();
  auto* const memory = static_cast<unsigned char*>(workspace);
  auto* const counters = reinterpret_cast<int*>(memory);
  auto* const lists = sorted ? reinterpret_cast<int*>(memory + p.counters) : nullptr;
  unsigned char* const columns = memory + p.counters + p.lists;
  const Arguments<T> arguments = {static_cast<const T*>(args.cov),
                                  args.cov_stride,
                                  static_cast<const T*>(args.cross),
                                  static_cast<int>(args.n),
                                  static_cast<int>(args.ld * static_cast<int64_t>(sizeof(T))),
                                  static_cast<int>(args.num_targets),
                                  static_cast<int>(k ? 1 : args.num_lams),
                                  static_cast<int>(p.blocks),
                                  static_cast<int>(p.limit),
                                  args.variance,
                                  args.targets,
                                  args.lam,
                                  static_cast<const T*>(args.penalty),
                                  args.penalty_stride,
                                  args.ridge,
                                  args.scale,
                                  args.nonnegative != 0,
                                  static_cast<const T*>(args.start_value),
                                  args.start_index,
                                  k ? nullptr : args.start_count,
                                  args.start_capacity,
                                  args.tol,
                                  args.max_pivots,
                                  args.index,
                                  static_cast<T*>(args.value),
                                  args.capacity,
                                  args.count,
                                  args.info,
                                  k,
                                  position,
                                  lam_out,
                                  counters,
                                  lists,
                                  columns,
                                  columns + p.columns};
  const auto s = static_cast<cudaStream_t>(stream);
  if (const cudaError_t error = cudaMemsetAsync(counters, 0, static_cast<size_t>(p.counters), s)) return error;
  if (sorted)
    ND_LAUNCH(sort_targets<T>, dim3(static_cast<unsigned>((args.num_targets + kWarps - 1) / kWarps)), dim3(kThreads), 0,
              s, arguments);
  static_assert(Active<T>::bytes(kSharedSupport<T>) + Columns<T>::bytes(kSharedColumns) + sizeof(Scratch<T>) <=
                48 << 10);
  const int64_t shared =
      Active<T>::bytes(kSharedSupport<T>) + (args.n > kSharedColumns ? 0 : Columns<T>::bytes(args.n));
  const dim3 grid(static_cast<unsigned>(p.blocks)), block(kThreads);
  if constexpr (sizeof(T) == 8) {
    if (k) {
      ND_LAUNCH(find_top_k<T>, grid, block, static_cast<size_t>(shared), s, arguments);
      return cudaGetLastError();
    }
  }
  ND_LAUNCH(solve_targets<T>, grid, block, static_cast<size_t>(shared), s, arguments);
  return cudaGetLastError();
}

template <class T>
size_t workspace_bytes(const NdCovlassoArgs& args) {
  return valid_sizes(args) ? static_cast<size_t>(plan<T>(args.n, args.num_targets, args.capacity).total) : 0;
}

}  // namespace nd::covlasso

extern "C" size_t nd_covlasso_workspace_f32(const NdCovlassoArgs* args) {
  return nd::covlasso::workspace_bytes<float>(*args);
}

extern "C" size_t nd_covlasso_workspace_f64(const NdCovlassoArgs* args) {
  return nd::covlasso::workspace_bytes<double>(*args);
}

extern "C" int nd_covlasso_f32(const NdCovlassoArgs* args, void* workspace, void* stream) {
  return nd::covlasso::launch<float>(*args, 0, 0, nullptr, workspace, stream);
}

extern "C" int nd_covlasso_f64(const NdCovlassoArgs* args, void* workspace, void* stream) {
  return nd::covlasso::launch<double>(*args, 0, 0, nullptr, workspace, stream);
}

extern "C" int nd_covlasso_top_k_f64(const NdCovlassoArgs* args, int64_t k, double position, double* lam_out,
                                     void* workspace, void* stream) {
  if (k < 1 || k > args->capacity || k >= int64_t{1} << 26 || !(position > 0) || !(position < 1))
    return cudaErrorInvalidValue;
  return nd::covlasso::launch<double>(*args, static_cast<int>(k), position, lam_out, workspace, stream);
}
