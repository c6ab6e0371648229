// CovLasso from a covariance matrix, exactly, one thread block a target:
//
//     min over w, w_i = 0:   w' S w / 2 - s' w + sum_j a_j |w_j|,     s = S[i], a_j = a penalty_j, a = lam / 2
//
// which is  Theta' S Theta + lam sum_j penalty_j |Theta_j|  with Theta_i = -1, halved. With rho = s - S w, w is optimal
// iff rho_j = a_j sign(w_j) on the support and |rho_j| <= a_j elsewhere. A column of infinite penalty may not enter.
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
// place of another coordinate. The objective falls at each. No cap on the support; S may be singular.
//
// Floor per target: the certifying pass, n k values of S out of L2, and k^3 / 6 multiply-adds. n = 1000, k = 25, 1000
// targets, float32: 0.1 GB. A solve reads 0.4 to 0.5 MB: passes over the growing supports, the float64 one, and gathers
// of 32-byte sectors. Its time is a chain of waits: a step has 4 + 3 ceil(k/16) block barriers if few blocks are
// factored, 16 dependent pivots a factored block, and n / 1024 times k/4 loads of rows. What counts is therefore the
// number of targets that an SM holds.
//
// Threads: 4 warps a block, 8 blocks an SM in float32, 4 in float64. A block takes targets from a queue until it is
// empty. Pass: 16 bytes a thread, two pieces of a row and four rows at a time. Factor: a warp owns 4 of the 16 columns
// of a block, so that its triangular solve needs no block barrier; one warp inverts the diagonal block in registers.
// Registers: the cap of 64 for 8 blocks costs float32 up to 64 bytes of stack. They hold what lives from one phase to
// the next and an address of the float64 pass; the loops of the float32 pass and of the factor do not touch them.
//
// Memory: shared memory holds the violators of up to 2048 columns and the state of up to 80 (float32) or 64 (float64)
// coordinates, 27.1 KB in float32 for n <= 1024. A larger support moves, doubling, to slices of the workspace. Slices
// of one size form a pool under locks; a block takes them in rising order only, so that no two wait for each other.
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
constexpr int kMaxDependent = 10;                   // steps that leave out coordinates, before single pivots
constexpr int kMaxBlocks = 1024;                    // of a launch
constexpr int64_t kPoolBytes = int64_t{128} << 20;  // of the slices of one size
constexpr double kSafety = 0.85;                    // part of the tolerance at which a violator is taken up

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
constexpr T kLargest = sizeof(T) == 4 ? T(3.4028234e38) : T(1.7976931348623157e308);  // finite
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

// The slices of the workspace for active sets of up to `capacity` coordinates; the first is the set in shared memory.
template <class T>
struct Pool {
  int64_t capacity = kSharedSupport<T>, slices = 0, bytes = 0;  // bytes of a slice
  int64_t first_lock = 0, offset = 0;                           // of the first slice; offset in bytes

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

// Bytes of the workspace: queue and locks, columns of every block, and with the slices of every size all of it.
struct Plan {
  int64_t counters, columns, total;
};

template <class T>
Plan plan(int64_t n, int64_t num_targets) {
  Pool<T> pool;
  while (pool.capacity < n) pool = pool.next(n, num_targets);
  const int64_t blocks = num_targets < kMaxBlocks ? num_targets : kMaxBlocks;
  Plan p;
  p.counters = round_up(4 * (1 + pool.first_lock + pool.slices), 256);
  p.columns = n > kSharedColumns ? round_up(blocks * Columns<T>::bytes(n), 256) : 0;
  p.total = p.counters + p.columns + pool.offset + pool.slices * pool.bytes;
  return p;
}

template <class T>
struct Arguments {
  const T* cov;
  int n;
  int row_bytes;  // of S
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
  // The target.
  double a, top, inverse_top;  // lam / 2, lambda_max / 2
  double far;                  // the violation a cold start asks for
  const T* penalty;            // [n] or null
  Columns<T> columns;
  Active<T> active[2];  // the side in use, and what the next step writes
  int task, target;
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

  // Target number t of the call: writes its rows of the outputs.
  __device__ __forceinline__ void solve(int t) {
    start(t);
    bool exact = sizeof(T) == 8, stopped = false;
    for (;;) {
      pass(exact);
      __syncthreads();
      const Flips flips = count_flips();
      const int wanted = most_additions(k_ - flips.count);
      const Found found = tally(wanted);
      const bool solved = flips.count == 0 && found.total == 0;
      if (!solved && !stopped) {
        stopped = capped() || shared_.indefinite;
        if (!stopped) resolve(change(flips, found, wanted));
        exact = stopped || sizeof(T) == 8;
        __syncthreads();  // the next pass overwrites the tally
        continue;
      }
      if (exact) {
        const double residual = measure();
        if (stopped || residual <= 0.5 * args_.tol * shared_.top || shared_.refinements == kMaxRefinements) break;
        refine();
      }
      exact = true;
      __syncthreads();
    }
    report(t, stopped && capped());
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

  // Row j of a matrix with the strides of S.
  __device__ __forceinline__ const T* row(int j, const T* matrix) const {
    const int64_t bytes = static_cast<int64_t>(args_.row_bytes) * j;
    return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(matrix) + bytes);
  }
  __device__ __forceinline__ const T* row(int j) const { return row(j, args_.cov); }
  __device__ __forceinline__ double penalty(int j) const {
    return shared_.penalty ? static_cast<double>(shared_.penalty[j]) : 1.0;
  }
  __device__ __forceinline__ bool capped() const { return shared_.pivots >= args_.max_pivots; }
  __device__ __forceinline__ const Active<T>& active() const { return shared_.active[side_]; }
  __device__ __forceinline__ void toggle_member(int j) const {
    atomicXor(&shared_.columns.member()[j / 32], 1u << (j % 32));
  }

  __device__ __forceinline__ void start(int t) {
    ND_DYNAMIC_SHARED(unsigned char, memory);  // the smallest active set, then the columns
    const Me me;
    const int target = static_cast<int>(args_.targets[t]);
    const T* factors = args_.penalty ? args_.penalty + args_.penalty_stride * t : nullptr;
    k_ = side_ = 0;
    const Columns<T> columns = {args_.n > kSharedColumns ? args_.columns + blockIdx.x * Columns<T>::bytes(args_.n)
                                                         : memory + Active<T>::bytes(kSharedSupport<T>),
                                static_cast<int>(Columns<T>::padded(args_.n))};
#pragma unroll 1
    for (int x = me.thread; x < (args_.n + 31) / 32; x += kThreads) columns.member()[x] = 0;
    const double half = 0.5 * args_.lam[t];
    T top = 0, excess = 0;
#pragma unroll 1
    for (int j = me.thread; j < args_.n; j += kThreads) {
      const T rho = magnitude(row(target)[j]), factor = factors ? factors[j] : T(1);
      if (j == target || !(factor <= kLargest<T>)) continue;
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
    if (me.thread == 0) {
      shared_.target = target;
      shared_.penalty = factors;
      shared_.a = half;
      shared_.top = largest(shared_.reach);
      shared_.far = 0.4995 * largest(shared_.excess);
      shared_.inverse_top = 1 / shared_.top;
      shared_.columns = columns;
      shared_.active[0] = Active<T>::at(memory, kSharedSupport<T>);
      shared_.lock = -1;
      shared_.step = shared_.pivots = shared_.refinements = shared_.dependent = 0;
      shared_.small = shared_.guarded = shared_.anchored = shared_.indefinite = false;
      shared_.raise = 0;
    }
    __syncthreads();
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
      combine_rows(rho, j0, padded_k);
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

  // rho = s - S w in the thread's columns; w and its index are padded to kRows. Beyond column n it is that of column 0.
  template <class Real>
  __device__ __forceinline__ void combine_rows(Real* rho, int j0, int padded_k) const {
    constexpr int V = kVector<T>, P = kPieces<Real>;
    const int* index = active().index(side_);
    const T* w = active().w();
    const T* piece[P];
    Pack<T, V> x[kRows][P];
#pragma unroll
    for (int p = 0; p < P; p++) {
      const int j = j0 + p * kPiece<T>;
      piece[p] = args_.cov + (j < args_.n ? j : 0);
      x[0][p] = load<V>(row(shared_.target, piece[p]));
#pragma unroll
      for (int v = 0; v < V; v++) rho[p * V + v] = static_cast<Real>(x[0][p].v[v]);
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
      const Real size = magnitude(rho[x]);
      Real factor = 1;
      if (shared_.penalty) {
        factor = static_cast<Real>(shared_.penalty[j]);
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
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int before = __shfl_up_sync(kFullWarp, count, o);
      if (me.lane >= o) count += before;
    }
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
    if (shared_.guarded) return left == k_ ? 1 : 0;
    const int wanted = k_ / 3 > kMinAdd ? k_ / 3 : kMinAdd;
    return left + wanted > W ? blocks_of(left + wanted) * W - left : wanted;
  }

  // Step 3 of the method: the next active set, on the other side. Returns the first changed block.
  __device__ __forceinline__ int change(const Flips& flips, const Found& found, int wanted) {
    const Me me;
    const bool single = shared_.anchored && flips.count > 0;
    T part = 1;  // of the way from anchor to w
    const Flips drops = single ? Flips{1, first_sign_change(&part)} : flips;
    const int left = k_ - drops.count, added = found.total < wanted ? found.total : wanted, k = left + added;
    const int block = (left < drops.first ? left : drops.first) / W;
    if (drops.count)
      for (int e = me.thread; e < k_; e += kThreads) {  // negative: dropped; else what survivors are ordered by
        const bool dropped = single ? e == drops.first : flipped(e);
        active().rest()[e] = dropped ? T(-1) : (single ? T(0) : magnitude(active().w()[e]));
      }
    if (found.total > wanted) keep_worst(found.last);
    if (me.thread == 0) make_room(k);
    __syncthreads();
    const Active<T> next = shared_.active[!side_];
    if (next.panels != active().panels) move_factor(next, block);
    keep_survivors(next, block * W, drops.count > 0, part);
    add_violators(next, left, wanted);
    for (int e = k + me.thread; e < blocks_of(k) * W; e += kThreads)
      next.index(!side_)[e] = shared_.target;  // a pass reads that row, times 0
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
    shared_.active[!side_] =
        Active<T>::at(args_.slices + pool.offset + slice * pool.bytes, static_cast<int>(pool.capacity));
    shared_.next_lock = static_cast<int>(1 + pool.first_lock + slice);
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
  // or
  // the part of the way that keeps all signs.
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
      shared_.guarded = shared_.step >= kGuardAfter || shared_.dependent >= kMaxDependent;
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
    const int j = real ? index[column] : shared_.target;
    const T* r = row(j);
    T* panel = set.panel(b);
#pragma unroll 4
    for (int l = me.lane / kColumns; l < b * W + W; l += 32 / kColumns)
      panel[l * W + c] = real && l < k_ ? r[index[l]] : T(l == column);
    if (me.lane < kColumns) {
      const T bound = static_cast<T>(shared_.a * penalty(j));
      set.rest()[column] = real ? r[j] : T(1);
      set.y()[column] = real ? row(shared_.target)[j] - bound * set.sign(side_)[column] : T(0);
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

  // w += inv(S_AA) defect.
  __device__ __forceinline__ void refine() const {
    const Me me;
    const Active<T> set = active();
    T* correction = set.anchor(!side_);
    if (me.warp == 0)
      for (int b = 0; b < blocks_of(k_); b++) forward_block(set.panel(b), b, set.defect(), set.defect(), me.lane);
    __syncthreads();
    back(set.defect(), correction);
    for (int e = me.thread; e < k_; e += kThreads) set.w()[e] += correction[e];
    if (me.thread == 0) shared_.refinements++;
  }

  // ------------------------------------------------------------------------------------------------------- certificate

  // After a pass in float64, with rho on A in float64 too: leaves the defect and, in shared_.sums, the parts of s'w,
  // rho'w, sum_j penalty_j |w_j| and of the largest violation on the support, which is returned.
  __device__ __forceinline__ double measure() {
    const Me me;
    const Active<T> set = active();
    const int* index = set.index(side_);
    const T *w = set.w(), *s = row(shared_.target);
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
      const double excess = x == 0 ? magnitude(rho) - bound : magnitude(rho - (x > 0 ? bound : -bound));
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

  // From what `measure` left; by one thread.
  __device__ __forceinline__ void certify(double* info, bool capped) const {
    Sums sums = {0, 0, 0, 0};
    for (int x = 0; x < kWarps; x++) {
      const Sums& part = shared_.sums[x];
      sums = {sums.linear + part.linear, sums.curvature + part.curvature, sums.norm + part.norm,
              larger(sums.residual, part.residual)};
    }
    const double variance = row(shared_.target)[shared_.target], err2 = variance - sums.linear - sums.curvature;
    const double a = shared_.a, reach = largest(shared_.reach),
                 tau = reach > a ? a / reach : 1.0;  // tau e is dual feasible
    const double worst = larger(sums.residual, largest(shared_.excess));
    const double violation = shared_.top > 0 ? worst * shared_.inverse_top : 0.0;
    info[kErr2] = err2;
    info[kDualityGap] = err2 + 2 * a * sums.norm - tau * (2 * (variance - sums.linear) - tau * err2);
    info[kKktViolation] = violation;
    info[kPivots] = shared_.pivots;
    info[kLambdaMax] = 2 * shared_.top;
    if (capped)
      info[kStatus] = kCapped;
    else if (err2 < -1e-3 * variance)
      info[kStatus] = kNotPsd;
    else if (violation <= args_.tol)
      info[kStatus] = kConverged;
    else
      info[kStatus] = shared_.indefinite ? kNotPsd : kCollinear;
  }

  // Support by increasing index, and the certificate.
  __device__ __forceinline__ void report(int t, bool capped) const {
    const Me me;
    const int* index = active().index(side_);
    const T* w = active().w();
    int32_t* index_row = args_.index + t * args_.capacity;
    T* value_row = args_.value + t * args_.capacity;
    for (int e = me.thread; e < k_; e += kThreads) {
      int rank = 0;
      for (int c = 0; c < k_; c++) rank += w[c] != T(0) && index[c] < index[e];
      if (w[e] == T(0) || rank >= args_.capacity) continue;
      index_row[rank] = index[e];
      value_row[rank] = w[e];
    }
    int nonzero = 0;  // computed by every warp
#pragma unroll 1
    for (int e = me.lane; e - me.lane < k_; e += 32)
      nonzero += __popc(__ballot_sync(kFullWarp, e < k_ && w[e] != T(0)));
    const bool cut = nonzero > args_.capacity;
    const int64_t count = cut ? args_.capacity : nonzero;
#pragma unroll 1
    for (int64_t x = count + me.thread; x < args_.capacity; x += kThreads) {
      index_row[x] = 0;
      value_row[x] = T(0);
    }
    __syncthreads();  // before the slice is given back
    if (me.thread != 0) return;
    certify(args_.info + static_cast<int64_t>(t) * kInfoSize, capped || cut);
    args_.count[t] = static_cast<int32_t>(count);
    release(shared_.lock);
  }

  const Arguments<T>& args_;
  Scratch<T>& shared_;
  int k_, side_;  // |A|, and the side in use of what is kept twice
};

// Targets from a queue, until it is empty.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>) solve_targets(const Arguments<T> args) {
  __shared__ Scratch<T> scratch;
  Solver<T> solver(args, scratch);
  for (;;) {
    if (threadIdx.x == 0) scratch.task = atomicAdd(args.counters, 1);
    __syncthreads();
    const int t = scratch.task;
    if (t >= args.num_targets) return;
    solver.solve(t);
  }
}

template <class T>
int launch(Arguments<T> args, int64_t n, int64_t ld, int64_t num_targets, unsigned char* workspace, void* stream) {
  if (num_targets == 0) return cudaSuccess;
  if (n < 1 || n >= int64_t{1} << 26 || ld < n || ld >= int64_t{1} << 28 || num_targets < 0 ||
      num_targets > INT32_MAX || args.capacity < 0)
    return cudaErrorInvalidValue;
  const Plan p = plan<T>(n, num_targets);
  args.n = static_cast<int>(n);
  args.row_bytes = static_cast<int>(ld * sizeof(T));
  args.num_targets = static_cast<int>(num_targets);
  args.counters = reinterpret_cast<int*>(workspace);
  args.columns = workspace + p.counters;
  args.slices = args.columns + p.columns;
  const auto s = static_cast<cudaStream_t>(stream);
  if (const cudaError_t error = cudaMemsetAsync(args.counters, 0, p.counters, s)) return error;
  static_assert(Active<T>::bytes(kSharedSupport<T>) + Columns<T>::bytes(kSharedColumns) + sizeof(Scratch<T>) <=
                48 << 10);
  const int64_t shared = Active<T>::bytes(kSharedSupport<T>) + (n > kSharedColumns ? 0 : Columns<T>::bytes(n));
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
  return nd::covlasso::launch<float>({cov, 0, 0, targets, lam, 0, penalty, penalty_stride, tol, max_pivots, index,
                                      value, capacity, count, info, nullptr, nullptr, nullptr},
                                     n, ld, num_targets, static_cast<unsigned char*>(workspace), stream);
}

extern "C" int nd_covlasso_f64(const double* cov, int64_t n, int64_t ld, const int64_t* targets, const double* lam,
                               int64_t num_targets, const double* penalty, int64_t penalty_stride, double tol,
                               int64_t max_pivots, int32_t* index, double* value, int64_t capacity, int32_t* count,
                               double* info, void* workspace, void* stream) {
  return nd::covlasso::launch<double>({cov, 0, 0, targets, lam, 0, penalty, penalty_stride, tol, max_pivots, index,
                                       value, capacity, count, info, nullptr, nullptr, nullptr},
                                      n, ld, num_targets, static_cast<unsigned char*>(workspace), stream);
}
