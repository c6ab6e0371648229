// Singular values, numerical ranks and singular vectors of batches of matrices, one thread block a matrix:
//
//     sigma_1 >= .. >= sigma_k of a [m, n],  k = min(m, n),      rank_r = #{ i : sigma_i > max(atol, rtol_r sigma_1) }
//
// Methods, those of csrc/cpu/spectrum.cpp but for the vectors:
//   - by_gram: input of at most 24 digits. Its squares are exact in float64, so the Gram matrix G of the shorter side
//     resolves sigma / sigma_1 down to E^(1/2), E = kGramNoise k eps. Householder tridiagonalisation of G; sigma_1 by
//     multisection, one shift a thread; then one thread a Sturm count: all tolerances at once, each at t - E' and
//     t + E', or bisection for values. Where the two counts differ the matrix is marked as undecided. hermitian ranks
//     (float64 too) as those of G, but of a itself and on both sides of zero.
//   - by_bidiagonal: float64, and in a second launch the matrices that are marked; the others end at once, so the host
//     need not know. Householder bidiagonalisation, counts of the differential quotient-difference form.
//   - vectors (all types): QR, then one-sided Jacobi rotations of the rows of R, which become sigma_i v_i; v_i: vectors
//     of the shorter side. Resolves down to k eps |a|_F; below, vectors complete an orthonormal basis and have no
//     gradient. The gradient sum_i g_i u_i v_i' = a sum_i (g_i / sigma_i) v_i v_i' takes no u_i.
//   A side of more than k + kChunk rows enters QR by kChunk rows at a time, so that memory is bounded by k alone.
//
// Counts take no division: p_i = (d_i - x) p_(i-1) - e_(i-1)^2 p_(i-2), of which signs are compared, is scaled by a
// power of two every 8 steps; a p_i below 2^-100 p_(i-1) is raised to that.
//
// Floor a matrix: its bytes read once; multiply-adds: Gram m k^2 / 2, tridiagonalisation k^3 (both triangles, so that a
// product with the matrix is a sum over rows without an exchange between threads). By 128 bytes of shared memory a
// cycle, and 16 bytes an element and step, the latter takes k^3 / 24 cycles of an SM against k^3 / 64 of its
// arithmetic: 4096 matrices of 32, 1024 of 64, 512 of 128 on an H100: 24, 48, 190 us. Predicted, not measured: 150,
// 110, 560 us. A step waits five barriers, two reductions, a root and three divisions, about 1000 cycles, which 1 to 5
// matrices an SM do not hide; at k = 32 the instructions of reductions and reflections outnumber those of the products.
// Counts take a tenth (k dependent steps of some 40 cycles for each of 4 to 7 sections of sigma_1), values half as much
// as all before. Above k of about 150 the form lies in the workspace. A step then reads it once, and every kPanel = 8
// steps it is updated: 10/3 k^3 bytes a matrix, 56 MB at 256 and 450 MB at 512, which L2 (5.5 TB/s) or memory (3 TB/s,
// where the forms of all blocks exceed 50 MB) deliver in 3 to 5 ms for 256 matrices of 256, and 5 to 10 ms for 64 of
// 512. Vectors: 8 sweeps of k - 1 steps, each k^2 / 2 entries of 3 + 4 multiply-adds and 24 bytes of shared memory.
//
// Threads: 1 warp for k <= 32, 4 for k <= 96, 16 above. Memory: shared while it suffices, else (kInside = false) a
// slice of the workspace for each of the blocks of a launch, which then take matrices in turn. Registers: 128 a thread,
// which costs some instances up to 32 bytes of stack.
//
// A result depends on its own matrix alone, to the last bit; sums are in an order fixed by the shape and by where the
// shared memory of the device puts the matrix. Every matrix is scaled by a power of two to a largest entry in [0.5, 1).
// A matrix with NaN or infinity has NaN values and vectors and rank -1.
// Limits: k <= ND_SPECTRUM_LONGEST, sides < 2^31; one block is slow for one large matrix.
#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

namespace nd::spectrum {

constexpr double kEps = 0x1p-52;
constexpr double kGramNoise = 4;        // E = kGramNoise k eps |G|: rounding of the Gram matrix and what follows
constexpr double kTopError = 4e-9;      // relative error allowed in sigma_1^2
constexpr double kSmallest = 0x1p-100;  // of p_(i-1): what p_i is raised to
constexpr double kTiny = 1e-300;        // stands for a vanishing pivot
constexpr double kWidth = 0x1p-54;      // of the largest: where bisection ends
constexpr double kGramWidth = 0x1p-31;  // of an eigenvalue: the same, where it becomes a float32 value
constexpr int kPanel = 8;               // reflections that are applied together, at most
constexpr int kChunk = 32;              // rows that enter QR together
constexpr int kOutputRows = 8;          // rows of a gradient computed together
constexpr int kMaxSweeps = 40;          // of Jacobi rotations; 6 to 10 are usual
constexpr int kMaxTolerances = 64;      // of a launch

// Other values bring small matrices to the workspace and to many warps in the tests (ND_SPECTRUM_SHARED_BYTES
// likewise).
#if !defined(ND_SPECTRUM_ONE_WARP)
#define ND_SPECTRUM_ONE_WARP 32
#define ND_SPECTRUM_FOUR_WARPS 96
#endif
constexpr int kOneWarp = ND_SPECTRUM_ONE_WARP, kFourWarps = ND_SPECTRUM_FOUR_WARPS;  // longest short sides
constexpr int kMostWarps = 16;  // and wherever the matrix lies in the workspace

template <int kWarps>
constexpr int kBlocksPerSm = 16 / kWarps;           // caps registers at 128 a thread
constexpr int64_t kMaxGrid = 1 << 20;               // blocks; more matrices than that are taken in turn
constexpr int64_t kMaxSlices = int64_t{512} << 20;  // bytes of all slices of the workspace, if more than one

// What a launch works on.
struct Problem {
  NdSpectrumArgs args;
  double rtol[kMaxTolerances];
  int first_rtol, num_rtol;  // of all
  int* undecided;            // [batch] written by by_gram; by_bidiagonal: matrices to do, or null for all
  double* slices;            // one a block, unless all is in shared memory
  int64_t slice;             // values
};

__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
__host__ __device__ inline int short_side(const NdSpectrumArgs& args) {
  return static_cast<int>(smaller(args.m, args.n));
}
__host__ __device__ inline int64_t long_side(const NdSpectrumArgs& args) { return larger(args.m, args.n); }

// Odd, so that neither rows nor columns of an array in shared memory meet in one bank.
__host__ __device__ inline int odd(int64_t count) { return static_cast<int>(count) | 1; }

// Hands out parts of an array, or only counts where there is none.
struct Parts {
  double* next;
  int64_t count = 0;
  __host__ __device__ explicit Parts(double* base) : next(base) {}
  __host__ __device__ double* take(int64_t size) {
    double* part = next;
    count += size;
    if (next) next += size;
    return part;
  }
};

// Sums and maxima over the block, and a barrier: what a thread wrote before, all see after.
template <int kWarps>
struct Reducer {
  double* scratch;  // [2, kWarps]
  int turn = 0;

  template <class Op>
  __device__ __forceinline__ double operator()(double v, Op op) {
    if (kWarps == 1) __syncwarp();
    turn ^= 1;
    return block_reduce<kWarps>(v, op, scratch + turn * kWarps);
  }
  __device__ __forceinline__ double sum(double v) { return (*this)(v, Sum()); }
  __device__ __forceinline__ double max(double v) { return (*this)(v, Max()); }
};

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }

// ------------------------------------------------------------------------------------------------ input

struct Bfloat16 {
  unsigned short bits;
};
struct Float16 {
  unsigned short bits;
};

__device__ __forceinline__ double read(const float* p) { return static_cast<double>(__ldg(p)); }
__device__ __forceinline__ double read(const double* p) { return __ldg(p); }
__device__ __forceinline__ double read(const Bfloat16* p) {
  return static_cast<double>(__uint_as_float(static_cast<unsigned>(__ldg(&p->bits)) << 16));
}
__device__ __forceinline__ double read(const Float16* p) {
  const unsigned bits = __ldg(&p->bits), magnitude = bits & 0x7fffu;
  const unsigned top = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;  // infinity and NaN keep the largest exponent
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  const float value = magnitude < 0x0400u ? subnormal : __uint_as_float((magnitude << 13) + top);
  return static_cast<double>(bits & 0x8000u ? -value : value);
}

// Calls function(pointer to matrix b in its own type).
template <class Function>
__device__ __forceinline__ void with_matrix(const NdSpectrumArgs& args, int64_t b, const Function& function) {
  const int64_t offset = b * args.batch_stride;
  switch (args.dtype) {
    case 0:
      return function(static_cast<const float*>(args.a) + offset);
    case 1:
      return function(static_cast<const double*>(args.a) + offset);
    case 2:
      return function(static_cast<const Bfloat16*>(args.a) + offset);
    default:
      return function(static_cast<const Float16*>(args.a) + offset);
  }
}

// Calls function(slow, fast) for 0 <= slow < slows, 0 <= fast < fasts; neighbouring threads differ in fast.
template <int kWarps, class Function>
__device__ __forceinline__ void each(int slows, int fasts, const Function& function) {
  constexpr int kThreads = 32 * kWarps;
  int slow = thread_index() / fasts, fast = thread_index() % fasts;
  const int slow_step = kThreads / fasts, fast_step = kThreads % fasts;
#pragma unroll 4
  while (slow < slows) {
    function(slow, fast);
    slow += slow_step;
    fast += fast_step;
    if (fast >= fasts) {
      fast -= fasts;
      ++slow;
    }
  }
}

__device__ __forceinline__ double power_of_two(int exponent) {  // of a normal number
  return __hiloint2double((1023 + exponent) << 20, 0);
}

// x * 2^-exponent in two steps, either of which a normal number can make.
struct Scale {
  double first, second;
  __device__ __forceinline__ explicit Scale(int exponent)
      : first(power_of_two(-exponent / 2)), second(power_of_two(-exponent + exponent / 2)) {}
  __device__ __forceinline__ double operator()(double x) const { return x * first * second; }
};

// What is known of a matrix before it is decomposed.
struct Facts {
  bool finite, zero;
  int exponent;  // the largest entry is in [2^(exponent-1), 2^exponent); 0 for a zero matrix
};

template <int kWarps>
__device__ __forceinline__ Facts facts_of(const NdSpectrumArgs& args, int64_t b, Reducer<kWarps>& reduce) {
  double largest = 0;
  with_matrix(args, b, [&](const auto* a) {
    each<kWarps>(static_cast<int>(args.m), static_cast<int>(args.n),
                 [&](int i, int j) { largest = Max()(largest, fabs(read(a + i * args.row_stride + j))); });
  });
  largest = reduce.max(largest);
  Facts facts = {largest < INFINITY, largest == 0, 0};
  if (facts.finite && !facts.zero) frexp(largest, &facts.exponent);
  return facts;
}

// Rows [begin, begin + count) of the long side, scaled: row r and column j to out[r row_step + j column_step].
template <int kWarps>
__device__ __forceinline__ void load_rows(const NdSpectrumArgs& args, int64_t b, const Scale& scale, int64_t begin,
                                          int count, double* out, int row_step, int column_step) {
  const int k = short_side(args);
  const int64_t stride = args.row_stride;
  with_matrix(args, b, [&](const auto* a) {
    if (args.m >= args.n) {
      each<kWarps>(count, k, [&](int r, int j) {
        out[r * row_step + j * column_step] = scale(read(a + (begin + r) * stride + j));
      });
    } else {
      each<kWarps>(k, count, [&](int j, int r) {
        out[r * row_step + j * column_step] = scale(read(a + j * stride + begin + r));
      });
    }
  });
}

// ------------------------------------------------------------------------------------------------ symmetric form

// Gram matrix g [k, ld] of the short side of matrix b, scaled, both triangles; x: [rows, ld].
template <int kWarps>
__device__ void gram(const NdSpectrumArgs& args, int64_t b, const Scale& scale, double* g, int ld, double* x,
                     int rows) {
  const int k = short_side(args), quarter = (k + 3) / 4, tiles = quarter * (quarter + 1) / 2;
  const int64_t depth = long_side(args);
  for (int64_t begin = 0; begin < depth; begin += rows) {
    const int count = static_cast<int>(smaller(rows, depth - begin));
    load_rows<kWarps>(args, b, scale, begin, count, x, ld, 1);
    __syncthreads();
    for (int tile = thread_index(); tile < tiles; tile += 32 * kWarps) {
      int ti = static_cast<int>((sqrtf(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) * 0.5f);
      ti += (ti + 1) * (ti + 2) / 2 <= tile;
      ti -= ti * (ti + 1) / 2 > tile;
      const int tj = tile - ti * (ti + 1) / 2;
      int is[4], js[4];
      double sum[4][4];
#pragma unroll
      for (int u = 0; u < 4; u++) {
        is[u] = min(ti + u * quarter, k - 1);
        js[u] = min(tj + u * quarter, k - 1);
      }
#pragma unroll
      for (int u = 0; u < 4; u++) {
#pragma unroll
        for (int v = 0; v < 4; v++) {
          const bool inside = begin > 0 && ti + u * quarter < k && tj + v * quarter < k;
          sum[u][v] = inside ? g[static_cast<int64_t>(is[u]) * ld + js[v]] : 0.0;
        }
      }
      for (int r = 0; r < count; r++) {
        const double* row = x + r * ld;
        double left[4], right[4];
#pragma unroll
        for (int u = 0; u < 4; u++) {
          left[u] = row[is[u]];
          right[u] = row[js[u]];
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
#pragma unroll
          for (int v = 0; v < 4; v++) sum[u][v] += left[u] * right[v];
        }
      }
#pragma unroll
      for (int u = 0; u < 4; u++) {
#pragma unroll
        for (int v = 0; v < 4; v++) {
          const int i = ti + u * quarter, j = tj + v * quarter;
          if (i < k && j < k) {
            g[static_cast<int64_t>(i) * ld + j] = sum[u][v];
            g[static_cast<int64_t>(j) * ld + i] = sum[u][v];
          }
        }
      }
    }
    __syncthreads();
  }
}

// The symmetric matrix with the lower triangle of matrix b, scaled.
template <int kWarps>
__device__ void load_symmetric(const NdSpectrumArgs& args, int64_t b, const Scale& scale, double* g, int ld) {
  const int k = short_side(args);
  with_matrix(args, b, [&](const auto* a) {
    each<kWarps>(k, k, [&](int i, int j) {
      if (j > i) return;
      const double x = scale(read(a + i * args.row_stride + j));
      g[static_cast<int64_t>(i) * ld + j] = x;
      g[static_cast<int64_t>(j) * ld + i] = x;
    });
  });
  __syncthreads();
}

// I - tau v v' that maps (alpha, rest) to (beta, 0), v = (1, scale rest), from squares = |rest|^2.
struct Reflection {
  double beta, tau, scale;
  __device__ __forceinline__ Reflection(double alpha, double squares) : beta(alpha), tau(0), scale(0) {
    if (squares == 0) return;
    const double norm = sqrt(alpha * alpha + squares);
    beta = alpha > 0 ? -norm : norm;
    tau = (beta - alpha) / beta;
    scale = 1 / (alpha - beta);
  }
};

// Shared memory of by_gram.
struct GramWork {
  double *d, *e2, *next, *partial, *v, *w, *x, *dots, *head, *scratch, *g;
  int ld, panel, rows;  // of g and x; of v and w; of x
  int64_t count;

  __host__ __device__ GramWork(int k, int warps, bool g_inside, double* base) : g(nullptr) {
    Parts parts(base);
    ld = odd(k);
    panel = g_inside ? 1 : k <= 512 ? kPanel : kPanel / 2;
    rows = g_inside ? (warps == 1 ? 8 : 16) : panel;
    d = parts.take(k);
    e2 = parts.take(k);
    next = parts.take(k);
    partial = parts.take(larger(32 * warps, (k + 31) / 32 * 32));
    v = parts.take(larger(2 * panel * k, g_inside ? 0 : rows * ld));
    w = v + panel * k;
    x = g_inside ? parts.take(static_cast<int64_t>(rows) * ld) : v;  // v is not in use yet
    dots = parts.take(2 * kPanel);
    head = parts.take(1);
    scratch = parts.take(2 * warps);
    if (g_inside) g = parts.take(static_cast<int64_t>(k) * ld);
    count = parts.count;
  }
};

// Calls function(j, first row, step of rows, place in partial) so that every column j of [first, k) has each row of
// [first, k) in one call; neighbouring threads differ in j. Returns how many calls a column has: their places lie
// `width` apart.
template <int kWarps, class Function>
__device__ __forceinline__ int each_column(int first, int k, int& width, const Function& function) {
  const int strips = (k - first + 31) / 32, groups = strips < kWarps ? kWarps / strips : 1;
  width = strips * 32;
  for (int unit = warp_index(); unit < strips * groups; unit += kWarps) {
    const int offset = unit % strips * 32 + lane_index(), group = unit / strips;
    if (first + offset < k) function(first + offset, first + group, groups, group * width + offset);
  }
  return groups;
}

// Diagonal d and off-diagonal e2 (not yet squared, the last one 0) of a tridiagonal matrix similar to g, which is
// destroyed. With the reflections of earlier steps, g becomes g - sum_t (v_t w_t' + w_t v_t'). In shared memory a step
// applies the one before it and multiplies g by its own vector in one pass; with kPanels, in the workspace, it only
// reads g, and at.panel reflections are applied together.
template <int kWarps, bool kPanels>
__device__ __forceinline__ void tridiagonalise(double* g, int k, const GramWork& at, Reducer<kWarps>& reduce) {
  constexpr int kThreads = 32 * kWarps, kBatch = kPanels ? 8 : 4;  // rows a thread has on their way
  for (int s = 0; s < k; s++) {
    const int waiting = kPanels ? s % at.panel : min(s, 1), first = s + 1;  // reflections that g lacks
    const double* row = g + static_cast<int64_t>(s) * at.ld;
    double squares = 0;
    for (int j = s + thread_index(); j < k; j += kThreads) {
      double x = row[j];
      for (int t = 0; t < waiting; t++) x -= at.v[t * k + s] * at.w[t * k + j] + at.w[t * k + s] * at.v[t * k + j];
      if (j == s) at.d[s] = x;
      if (j == first) *at.head = x;
      at.next[j] = j == first ? 1.0 : x;
      if (j > first) squares += x * x;
    }
    squares = reduce.sum(squares);
    if (first == k) break;
    const Reflection h(*at.head, squares);
    if (thread_index() == 0) at.e2[s] = h.beta;
    for (int j = s + thread_index(); j < k; j += kThreads) {
      if (j > first) at.next[j] *= h.scale;
    }
    __syncthreads();
    const bool update = !kPanels && s > 0;
    int width;
    const int groups = each_column<kWarps>(first, k, width, [&](int j, int i, int step, int place) {
      double* column = g + j;
      const double vj = update ? at.v[j] : 0.0, wj = update ? at.w[j] : 0.0;
      double sum = 0;
      const auto entry = [&](int r, double x) {
        if (update) {
          x -= at.v[r] * wj + at.w[r] * vj;
          column[static_cast<int64_t>(r) * at.ld] = x;
        }
        sum += x * at.next[r];
      };
      for (; i + (kBatch - 1) * step < k; i += kBatch * step) {
        double x[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; u++) x[u] = column[static_cast<int64_t>(i + u * step) * at.ld];
#pragma unroll
        for (int u = 0; u < kBatch; u++) entry(i + u * step, x[u]);
      }
      for (; i < k; i += step) entry(i, column[static_cast<int64_t>(i) * at.ld]);
      at.partial[place] = sum;
    });
    if (kPanels) {
      for (int unit = warp_index(); unit < 2 * waiting; unit += kWarps) {
        const double* vector = (unit % 2 == 0 ? at.v : at.w) + unit / 2 * k;
        double dot = 0;
        for (int j = first + lane_index(); j < k; j += 32) dot += vector[j] * at.next[j];
        dot = warp_sum(dot);
        if (lane_index() == 0) at.dots[unit] = dot;
      }
    }
    __syncthreads();
    double dot = 0;
    for (int j = first + thread_index(); j < k; j += kThreads) {
      double p = 0;
      for (int group = 0; group < groups; group++) p += at.partial[group * width + j - first];
      for (int t = 0; kPanels && t < waiting; t++)
        p -= at.v[t * k + j] * at.dots[2 * t + 1] + at.w[t * k + j] * at.dots[2 * t];
      p *= h.tau;
      at.partial[j - first] = p;
      dot += p * at.next[j];
    }
    const double half = 0.5 * h.tau * reduce.sum(dot);
    const int own = kPanels ? waiting * k : 0;
    for (int j = first + thread_index(); j < k; j += kThreads) {
      at.v[own + j] = at.next[j];
      at.w[own + j] = at.partial[j - first] - half * at.next[j];
    }
    __syncthreads();
    if (kPanels && waiting + 1 == at.panel) {
      each_column<kWarps>(first, k, width, [&](int j, int i, int step, int) {
        double vj[kPanel], wj[kPanel];
#pragma unroll
        for (int t = 0; t < kPanel; t++) {
          vj[t] = t < at.panel ? at.v[t * k + j] : 0.0;
          wj[t] = t < at.panel ? at.w[t * k + j] : 0.0;
        }
#pragma unroll 2
        for (; i < k; i += step) {
          double x = g[static_cast<int64_t>(i) * at.ld + j];
#pragma unroll
          for (int t = 0; t < kPanel; t++) {
            if (t < at.panel) x -= at.v[t * k + i] * wj[t] + at.w[t * k + i] * vj[t];
          }
          g[static_cast<int64_t>(i) * at.ld + j] = x;
        }
      });
      __syncthreads();
    }
  }
  if (thread_index() == 0) at.e2[k - 1] = 0;
  __syncthreads();
}

// Scales d, e to largest row sum 1 and squares e, or both; returns the row sum.
template <int kWarps>
__device__ double normalise(double* d, double* e, int k, bool both, Reducer<kWarps>& reduce) {
  double norm = 0;
  for (int i = thread_index(); i < k; i += 32 * kWarps)
    norm = fmax(norm, fabs(d[i]) + fabs(e[i]) + (i > 0 ? fabs(e[i - 1]) : 0.0));
  norm = reduce.max(norm);
  const double factor = norm > 0 ? 1 / norm : 0.0;
  for (int i = thread_index(); i < k; i += 32 * kWarps) {
    const double x = d[i] * factor, y = e[i] * factor;
    d[i] = both ? x * x : x;
    e[i] = y * y;
  }
  __syncthreads();
  return norm;
}

// Number of eigenvalues above x, |x| < 5, of sign times the tridiagonal matrix d, e2: row sums at most 1, e2 squared.
__device__ __forceinline__ int count_above(const double* d, const double* e2, int k, double sign, double x) {
  constexpr int kSteps = 8;  // |p| stays within 2^-800 and 2^30 of where it was
  double before = 0, now = 1, off = 0;
  int count = 0;
  for (int first = 0; first < k; first += kSteps) {
    const int end = min(first + kSteps, k);
    for (int i = first; i < end; i++) {
      double p = (sign * d[i] - x) * now - off * before;
      if (fabs(p) < kSmallest * fabs(now)) p = -kSmallest * now;
      count += (p > 0) == (now > 0);
      off = e2[i];
      before = now;
      now = p;
    }
    const double unit = power_of_two(1023 - (__double2hiint(now) >> 20 & 0x7ff));
    before *= unit;
    now *= unit;
  }
  return count;
}

// Where count(x) falls to 0, for x in [low, high]: to `bits` bits of high - low.
template <int kWarps, class Count>
__device__ __forceinline__ double top_by_sections(double low, double high, int bits, const Count& count) {
  constexpr int kThreads = 32 * kWarps, kBits = kWarps == 1 ? 5 : kWarps == 4 ? 7 : 9;  // of a step
  static_assert(kThreads == 1 << kBits, "sections of a step");
  for (int found = 0; found < bits; found += kBits) {
    const double width = (high - low) / (kThreads + 1);
    const int below = __syncthreads_count(count(low + width * (thread_index() + 1)) > 0);
    high = below < kThreads ? low + width * (below + 1) : high;
    low += width * below;
  }
  return 0.5 * (low + high);
}

// Calls store(r, x_r) with x_0 >= x_1 >= .., of which count(x) are above x; all are in [0, 1]. grid: [k].
template <int kWarps, class Count, class Store>
__device__ __forceinline__ void bisect(int k, double relative, double* grid, const Count& count, const Store& store) {
  constexpr int kThreads = 32 * kWarps;
  for (int j = thread_index(); j < k; j += kThreads) grid[j] = count((j + 1.0) / (k + 1.0));
  __syncthreads();
  for (int r = thread_index(); r < k; r += kThreads) {
    int begin = 0, end = k;  // of the first grid point with no more than r above it
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (grid[middle] > r) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    double low = begin / (k + 1.0), high = begin < k ? (begin + 1.0) / (k + 1.0) : 1 + 8 * kEps;
    while (high - low > fmax(kWidth, relative * low)) {
      const double middle = 0.5 * (low + high);
      if (middle <= low || middle >= high) break;
      if (count(middle) > r) {
        low = middle;
      } else {
        high = middle;
      }
    }
    store(r, low > 0 ? 0.5 * (low + high) : 0.0);
  }
}

// ------------------------------------------------------------------------------------------------ results

__device__ __forceinline__ void store_value(const NdSpectrumArgs& args, int64_t b, int r, double value) {
  const int64_t at = b * short_side(args) + r;
  if (args.dtype == 1) {
    static_cast<double*>(args.values)[at] = value;
  } else {
    static_cast<float*>(args.values)[at] = static_cast<float>(value);
  }
}

__device__ __forceinline__ void store_rank(const Problem& problem, int64_t b, int r, int count) {
  problem.args.rank[b * problem.args.num_rtol + problem.first_rtol + r] = count;
}

// Results of a matrix that is zero or not finite.
template <int kWarps>
__device__ void store_trivial(const Problem& problem, int64_t b, const Facts& facts) {
  constexpr int kThreads = 32 * kWarps;
  if (problem.args.rank) {
    for (int r = thread_index(); r < problem.num_rtol; r += kThreads) store_rank(problem, b, r, facts.finite ? 0 : -1);
    return;
  }
  for (int r = thread_index(); r < short_side(problem.args); r += kThreads)
    store_value(problem.args, b, r, facts.finite ? 0.0 : NAN);
}

// max(atol, rtol_r sigma_1) / unit, of the scaled matrix, for top = sigma_1 / unit.
__device__ __forceinline__ double threshold(const Problem& problem, int r, const Facts& facts, double top,
                                            double unit) {
  const double atol = problem.args.atol > 0 ? Scale(facts.exponent)(problem.args.atol) : 0.0;
  return fmin(fmax(atol, problem.rtol[r] * top * unit) / fmax(unit, kTiny), 2.0);  // nothing is above 1
}

// Ranks from d, e2 of norm `norm`; returns whether rounding can have changed one of them.
template <int kWarps>
__device__ bool symmetric_ranks(const Problem& problem, int64_t b, const Facts& facts, double norm, const GramWork& at,
                                Reducer<kWarps>& reduce) {
  constexpr int kThreads = 32 * kWarps, kBits = 34;
  const int k = short_side(problem.args);
  const bool hermitian = problem.args.hermitian != 0;
  double size = 0;
  for (int side = 0; side < (hermitian ? 2 : 1); side++) {
    const double sign = side == 0 ? 1.0 : -1.0;
    double low = -1;
    for (int i = thread_index(); i < k; i += kThreads) low = fmax(low, sign * at.d[i]);
    low = reduce.max(low);
    size = fmax(size, top_by_sections<kWarps>(low, 1 + 8 * kEps, kBits,
                                              [&](double x) { return count_above(at.d, at.e2, k, sign, x); }));
  }
  bool unsure = false;
  for (int first = 0; first < 2 * problem.num_rtol; first += kThreads) {
    const int r = min((first + thread_index()) / 2, problem.num_rtol - 1);
    const bool upper = thread_index() % 2 == 0;
    double shift;
    if (hermitian) {
      const double t = threshold(problem, r, facts, size, norm);
      shift = upper ? t : -t * (1 + 2 * kEps);
    } else {
      const double t = threshold(problem, r, facts, sqrt(size), sqrt(norm));
      const double slack = kGramNoise * kEps * k + kTopError * t * t;
      shift = upper ? t * t + slack : t * t - slack;
    }
    const int above = count_above(at.d, at.e2, k, 1.0, shift), other = __shfl_xor_sync(kFullWarp, above, 1);
    if (upper && (first + thread_index()) / 2 < problem.num_rtol)
      store_rank(problem, b, r, hermitian ? above + k - other : above);
    unsure |= !hermitian && above != other;
  }
  return __syncthreads_or(unsure);
}

// Ranks or values through the Gram matrix, or ranks through the matrix itself if hermitian.
template <int kWarps, bool kInside>
__global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm<kWarps>) by_gram(const Problem problem) {
  ND_DYNAMIC_SHARED(double, shared);
  const NdSpectrumArgs& args = problem.args;
  const int k = short_side(args);
  const GramWork at(k, kWarps, kInside, shared);
  double* g = kInside ? at.g : problem.slices + blockIdx.x * problem.slice;
  Reducer<kWarps> reduce = {at.scratch};
  for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
    const Facts facts = facts_of<kWarps>(args, b, reduce);
    bool unsure = false;
    if (!facts.finite || facts.zero) {
      store_trivial<kWarps>(problem, b, facts);
    } else {
      const Scale scale(facts.exponent);
      if (args.hermitian) {
        load_symmetric<kWarps>(args, b, scale, g, at.ld);
      } else {
        gram<kWarps>(args, b, scale, g, at.ld, at.x, at.rows);
      }
      tridiagonalise<kWarps, !kInside>(g, k, at, reduce);
      const double norm = normalise<kWarps>(at.d, at.e2, k, false, reduce);
      if (args.rank) {
        unsure = symmetric_ranks<kWarps>(problem, b, facts, norm, at, reduce);
      } else {
        const Scale unscale(-facts.exponent);
        bisect<kWarps>(
            k, kGramWidth, at.next, [&](double x) { return count_above(at.d, at.e2, k, 1.0, x); },
            [&](int r, double x) { store_value(args, b, r, unscale(sqrt(x * norm))); });
      }
    }
    if (problem.undecided && thread_index() == 0) problem.undecided[b] = unsure;
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------ orthogonal forms

// Columns w [k, ld] of one matrix, in shared memory or a slice, and vectors in shared memory.
struct DenseWork {
  double *v, *u, *d, *e, *grid, *scratch, *x, *product, *y, *w;
  int rows, ld;  // of a column that are used, and from one to the next
  int64_t count;

  // vectors: for the kernel of that name, which has rows of its result in x and product, and in y a copy of R if w is
  // not inside.
  __host__ __device__ DenseWork(int k, int64_t longer, int warps, bool vectors, bool w_inside, bool y_inside,
                                double* base)
      : x(nullptr), product(nullptr), y(nullptr), w(nullptr) {
    Parts parts(base);
    rows = static_cast<int>(smaller(longer, k + kChunk));
    ld = odd(rows);
    v = parts.take(rows);
    u = parts.take(k);
    d = parts.take(k);
    e = parts.take(k);
    grid = parts.take(k);
    scratch = parts.take(4 * warps);
    if (vectors) {
      x = parts.take(kOutputRows * odd(k));
      product = parts.take(kOutputRows * odd(k));
    }
    if (y_inside) y = parts.take(static_cast<int64_t>(k) * odd(k));
    if (w_inside) w = parts.take(static_cast<int64_t>(k) * ld);
    count = parts.count;
  }
};

// The reflection that clears rows [low, high) of column c into its row s; its vector in v, but for the 1 of row s.
template <int kWarps>
__device__ Reflection reflect(double* c, int s, int low, int high, double* v, Reducer<kWarps>& reduce) {
  const double alpha = c[s];
  double squares = 0;
  for (int i = low + thread_index(); i < high; i += 32 * kWarps) squares += c[i] * c[i];
  const Reflection h(alpha, reduce.sum(squares));
  for (int i = low + thread_index(); i < high; i += 32 * kWarps) v[i] = c[i] * h.scale;
  if (thread_index() == 0) c[s] = h.beta;
  __syncthreads();
  return h;
}

// Applies it to the columns after s, a warp a column; row s of them also to `row`, if given.
template <int kWarps>
__device__ void reflect_columns(double* w, int ld, int k, int s, int low, int high, const double* v, double tau,
                                double* row) {
  for (int j = s + 1 + warp_index(); j < k; j += kWarps) {
    double* c = w + static_cast<int64_t>(j) * ld;
    const double head = c[s];
    double dot = 0;
    for (int i = low + lane_index(); i < high; i += 32) dot += v[i] * c[i];
    const double factor = tau * (head + warp_sum(dot));
    for (int i = low + lane_index(); i < high; i += 32) c[i] -= factor * v[i];
    __syncwarp();
    if (lane_index() == 0) {
      c[s] = head - factor;
      if (row) row[j] = head - factor;
    }
  }
  __syncthreads();
}

// Columns of matrix b, or of the factor R of its QR decomposition if it is longer than w or if `factored`: then with
// what the reflections left below the diagonal. Returns the number of rows.
template <int kWarps>
__device__ int load_columns(const NdSpectrumArgs& args, int64_t b, const Scale& scale, bool factored, double* w,
                            const DenseWork& at, Reducer<kWarps>& reduce) {
  const int k = short_side(args);
  const int64_t longer = long_side(args);
  load_rows<kWarps>(args, b, scale, 0, at.rows, w, 1, at.ld);
  __syncthreads();
  if (!factored && longer == at.rows) return at.rows;
  for (int s = 0; s < k; s++) {
    const Reflection h = reflect<kWarps>(w + static_cast<int64_t>(s) * at.ld, s, s + 1, at.rows, at.v, reduce);
    reflect_columns<kWarps>(w, at.ld, k, s, s + 1, at.rows, at.v, h.tau, nullptr);
  }
  for (int64_t begin = at.rows; begin < longer; begin += kChunk) {
    const int count = static_cast<int>(smaller(kChunk, longer - begin));
    load_rows<kWarps>(args, b, scale, begin, count, w + k, 1, at.ld);
    __syncthreads();
    for (int s = 0; s < k; s++) {
      const Reflection h = reflect<kWarps>(w + static_cast<int64_t>(s) * at.ld, s, k, k + count, at.v, reduce);
      reflect_columns<kWarps>(w, at.ld, k, s, k, k + count, at.v, h.tau, nullptr);
    }
  }
  return k;
}

// Diagonal d and superdiagonal e (the last one 0) of a bidiagonal matrix with the singular values of w, rows >= k.
template <int kWarps>
__device__ void bidiagonalise(double* w, int rows, int k, const DenseWork& at, Reducer<kWarps>& reduce) {
  constexpr int kThreads = 32 * kWarps;
  for (int s = 0; s < k; s++) {
    double* column = w + static_cast<int64_t>(s) * at.ld;
    const Reflection left = reflect<kWarps>(column, s, s + 1, rows, at.v, reduce);
    if (thread_index() == 0) {
      at.d[s] = left.beta;
      at.e[s] = 0;
    }
    if (s == k - 1) break;
    reflect_columns<kWarps>(w, at.ld, k, s, s + 1, rows, at.v, left.tau, at.u);
    const double alpha = at.u[s + 1];
    double squares = 0;
    for (int j = s + 2 + thread_index(); j < k; j += kThreads) squares += at.u[j] * at.u[j];
    const Reflection right(alpha, reduce.sum(squares));
    for (int j = s + 2 + thread_index(); j < k; j += kThreads) at.u[j] *= right.scale;
    if (thread_index() == 0) {
      at.e[s] = right.beta;
      at.u[s + 1] = 1;
    }
    __syncthreads();
    for (int i = s + 1 + thread_index(); i < rows; i += kThreads) {
      double dot = 0;
      for (int j = s + 1; j < k; j++) dot += w[static_cast<int64_t>(j) * at.ld + i] * at.u[j];
      const double factor = right.tau * dot;
      for (int j = s + 1; j < k; j++) w[static_cast<int64_t>(j) * at.ld + i] -= factor * at.u[j];
    }
    __syncthreads();
  }
  __syncthreads();
}

// Number of singular values above x (not squared) of the bidiagonal matrix of squares d2, e2.
__device__ __forceinline__ int count_singular_above(const double* d2, const double* e2, int k, double x) {
  const double square = x * x;
  double t = -square;
  int count = 0;
  for (int i = 0; i < k; i++) {
    double p = d2[i] + t;
    if (fabs(p) < kTiny) p = -kTiny;
    count += p > 0;
    t = t * (e2[i] / p) - square;
  }
  return count;
}

// Ranks or values through the bidiagonal form.
template <int kWarps, bool kInside>
__global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm<kWarps>) by_bidiagonal(const Problem problem) {
  constexpr int kThreads = 32 * kWarps, kBits = 54;
  ND_DYNAMIC_SHARED(double, shared);
  const NdSpectrumArgs& args = problem.args;
  const int k = short_side(args);
  const DenseWork at(k, long_side(args), kWarps, false, kInside, false, shared);
  double* w = kInside ? at.w : problem.slices + blockIdx.x * problem.slice;
  Reducer<kWarps> reduce = {at.scratch};
  const auto count = [&](double x) { return count_singular_above(at.d, at.e, k, x); };
  for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
    if (problem.undecided && !problem.undecided[b]) continue;
    const Facts facts = facts_of<kWarps>(args, b, reduce);
    if (!facts.finite || facts.zero) {
      store_trivial<kWarps>(problem, b, facts);
      __syncthreads();
      continue;
    }
    const int rows = load_columns<kWarps>(args, b, Scale(facts.exponent), false, w, at, reduce);
    if (rows < at.rows) {
      each<kWarps>(k, k, [&](int j, int i) {
        if (i > j) w[static_cast<int64_t>(j) * at.ld + i] = 0;
      });
      __syncthreads();
    }
    bidiagonalise<kWarps>(w, rows, k, at, reduce);
    const double norm = normalise<kWarps>(at.d, at.e, k, true, reduce);
    if (args.rank) {
      double low = 0;
      for (int i = thread_index(); i < k; i += kThreads) low = fmax(low, at.d[i]);
      low = sqrt(reduce.max(low)) * (1 - 4 * kEps);
      const double top = top_by_sections<kWarps>(low, 1 + 8 * kEps, kBits, count);
      for (int r = thread_index(); r < problem.num_rtol; r += kThreads)
        store_rank(problem, b, r, count(threshold(problem, r, facts, top, norm)));
    } else {
      const Scale unscale(-facts.exponent);
      bisect<kWarps>(k, 0.0, at.grid, count, [&](int r, double x) { store_value(args, b, r, unscale(x * norm)); });
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------ vectors

// Rotates pairs of the vectors y [k, ld] until all are orthogonal, but for those whose square is at most `cut`. Pairs
// meet as in a tournament, `lanes` threads a pair.
template <int kWarps>
__device__ void orthogonalise(double* y, int ld, int k, double cut) {
  constexpr int kThreads = 32 * kWarps;
  const int players = k + k % 2, pairs = players / 2, others = players - 1;
  int lanes = 32;
  while (lanes > 1 && lanes * pairs > kThreads) lanes /= 2;
  const int teams = kThreads / lanes, team = thread_index() / lanes, lane = thread_index() % lanes;
  const double tolerance = 16 * kEps * kEps * k;  // of the squared cosine
  for (int sweep = 0; sweep < kMaxSweeps; sweep++) {
    bool rotated = false;
    for (int step = 0; step < others; step++) {
      for (int first = 0; first < pairs; first += teams) {
        const int q = first + team, one = q == 0 ? others : (step + q) % others, two = (step + others - q) % others;
        const bool valid = q < pairs && one < k && two < k;
        double* a = y + static_cast<int64_t>(valid ? min(one, two) : 0) * ld;
        double* c = y + static_cast<int64_t>(valid ? max(one, two) : 0) * ld;
        double aa = 0, cc = 0, ac = 0;
        for (int i = lane; valid && i < k; i += lanes) {
          aa += a[i] * a[i];
          cc += c[i] * c[i];
          ac += a[i] * c[i];
        }
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
          aa += shuffle_xor(aa, distance);
          cc += shuffle_xor(cc, distance);
          ac += shuffle_xor(ac, distance);
        }
        if (valid && fmin(aa, cc) > cut && ac * ac > tolerance * aa * cc) {
          const double slope = (cc - aa) / (2 * ac);
          const double tangent = copysign(1 / (fabs(slope) + sqrt(1 + slope * slope)), slope);
          const double cosine = 1 / sqrt(1 + tangent * tangent), sine = cosine * tangent;
          for (int i = lane; i < k; i += lanes) {
            const double left = a[i], right = c[i];
            a[i] = cosine * left - sine * right;
            c[i] = sine * left + cosine * right;
          }
          rotated = true;
        }
      }
      __syncthreads();
    }
    if (!__syncthreads_or(rotated)) return;
  }
}

// Replaces the vectors of y [k, ld] that are not live by others, so that all are orthonormal. Each starts from the unit
// vector that is farthest from the span of those before. left, dots, v: [k].
template <int kWarps>
__device__ void complete_basis(double* y, int ld, int k, double* live, double* left, double* dots, double* v,
                               ArgMax<double>* scratch, Reducer<kWarps>& reduce) {
  constexpr int kThreads = 32 * kWarps;
  for (int c = thread_index(); c < k; c += kThreads) {
    double rest = 1;
    for (int i = 0; i < k; i++) {
      const double x = y[static_cast<int64_t>(i) * ld + c];
      if (live[i] != 0) rest -= x * x;
    }
    left[c] = rest;
  }
  __syncthreads();
  for (int missing = 0; missing < k; missing++) {
    if (live[missing] != 0) continue;
    ArgMax<double> best = {-1, k};
    for (int c = thread_index(); c < k; c += kThreads) best = Max()(best, ArgMax<double>{left[c], c});
    if (kWarps == 1) __syncwarp();
    const int start = block_argmax<kWarps>(best, scratch).index;
    for (int c = thread_index(); c < k; c += kThreads) v[c] = c == start ? 1.0 : 0.0;
    __syncthreads();
    for (int round = 0; round < 2; round++) {
      for (int i = thread_index(); i < k; i += kThreads) {
        double dot = 0;
        for (int c = 0; live[i] != 0 && c < k; c++) dot += y[static_cast<int64_t>(i) * ld + c] * v[c];
        dots[i] = dot;
      }
      __syncthreads();
      for (int c = thread_index(); c < k; c += kThreads) {
        double x = v[c];
        for (int i = 0; i < k; i++) {
          if (live[i] != 0) x -= dots[i] * y[static_cast<int64_t>(i) * ld + c];
        }
        v[c] = x;
      }
      __syncthreads();
    }
    double squares = 0;
    for (int c = thread_index(); c < k; c += kThreads) squares += v[c] * v[c];
    const double factor = 1 / sqrt(reduce.sum(squares));
    for (int c = thread_index(); c < k; c += kThreads) {
      const double x = v[c] * factor;
      y[static_cast<int64_t>(missing) * ld + c] = x;
      left[c] -= x * x;
    }
    if (thread_index() == 0) live[missing] = 1;
    __syncthreads();
  }
}

// The gradient a sum_i factor_i y_i y_i' of matrix b, scaled, from the vectors y [k, ld]; T: its type.
template <class T, int kWarps>
__device__ void store_gradient(const NdSpectrumArgs& args, int64_t b, const Scale& scale, const double* y, int ld,
                               const double* factor, const DenseWork& at) {
  const int k = short_side(args), ldx = odd(k);
  const int64_t longer = long_side(args);
  T* out = static_cast<T*>(args.gradient) + b * args.m * args.n;
  for (int64_t begin = 0; begin < longer; begin += kOutputRows) {
    const int count = static_cast<int>(smaller(kOutputRows, longer - begin));
    load_rows<kWarps>(args, b, scale, begin, count, at.x, ldx, 1);
    __syncthreads();
    each<kWarps>(count, k, [&](int r, int i) {
      double dot = 0;
      for (int j = 0; j < k; j++) dot += at.x[r * ldx + j] * y[static_cast<int64_t>(i) * ld + j];
      at.product[r * ldx + i] = dot * factor[i];
    });
    __syncthreads();
    each<kWarps>(count, k, [&](int r, int j) {
      double sum = 0;
      for (int i = 0; i < k; i++) sum += at.product[r * ldx + i] * y[static_cast<int64_t>(i) * ld + j];
      at.x[r * ldx + j] = sum;
    });
    __syncthreads();
    if (args.m >= args.n) {
      each<kWarps>(count, k, [&](int r, int j) { out[(begin + r) * k + j] = static_cast<T>(at.x[r * ldx + j]); });
    } else {
      each<kWarps>(k, count, [&](int j, int r) { out[j * longer + begin + r] = static_cast<T>(at.x[r * ldx + j]); });
    }
    __syncthreads();
  }
}

// Fills `count` values of T from `out`.
template <class T, int kWarps>
__device__ void fill(void* out, int64_t first, int64_t count, double value) {
  for (int64_t i = thread_index(); i < count; i += 32 * kWarps) static_cast<T*>(out)[first + i] = static_cast<T>(value);
}

// Values with vectors of the shorter side, or the gradient of the values.
template <int kWarps, bool kInside>
__global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm<kWarps>) vectors(const Problem problem, bool copied) {
  constexpr int kThreads = 32 * kWarps;
  ND_DYNAMIC_SHARED(double, shared);
  const NdSpectrumArgs& args = problem.args;
  const int k = short_side(args);
  const int64_t square = static_cast<int64_t>(k) * k, size = args.m * args.n;
  const bool is_double = args.dtype == 1;
  const DenseWork at(k, long_side(args), kWarps, true, kInside, !kInside && copied, shared);
  double* w = kInside ? at.w : problem.slices + blockIdx.x * problem.slice;
  double* y = !kInside && copied ? at.y : w;
  double *length = at.d, *place = at.u, *live = at.grid, *factor = at.e;
  const int ld = !kInside && copied ? odd(k) : at.ld;
  Reducer<kWarps> reduce = {at.scratch};
  for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
    const Facts facts = facts_of<kWarps>(args, b, reduce);
    if (!facts.finite) {
      if (args.basis) {
        fill<double, kWarps>(args.values, b * k, k, NAN);
        fill<double, kWarps>(args.basis, b * square, square, NAN);
      } else if (is_double) {
        fill<double, kWarps>(args.gradient, b * size, size, NAN);
      } else {
        fill<float, kWarps>(args.gradient, b * size, size, NAN);
      }
      __syncthreads();
      continue;
    }
    const Scale scale(facts.exponent), unscale(-facts.exponent);
    load_columns<kWarps>(args, b, scale, true, w, at, reduce);
    double squares = 0;  // of R, whose rows become the vectors y
    each<kWarps>(k, k, [&](int i, int j) {
      double* upper = w + static_cast<int64_t>(j) * at.ld + i;
      double* lower = w + static_cast<int64_t>(i) * at.ld + j;
      if (j >= i) squares += *upper * *upper;
      if (!kInside && copied) {
        y[static_cast<int64_t>(i) * ld + j] = j >= i ? *upper : 0.0;
      } else if (j > i) {
        *lower = *upper;
        *upper = 0;
      }
    });
    const double cut = square * kEps * kEps * reduce.sum(squares);
    orthogonalise<kWarps>(y, ld, k, cut);
    for (int i = thread_index(); i < k; i += kThreads) {
      double sum = 0;
      for (int j = 0; j < k; j++) sum += y[static_cast<int64_t>(i) * ld + j] * y[static_cast<int64_t>(i) * ld + j];
      length[i] = sqrt(sum);
      live[i] = sum > cut ? 1.0 : 0.0;
    }
    __syncthreads();
    for (int i = thread_index(); i < k; i += kThreads) {
      int before = 0;
      for (int j = 0; j < k; j++) before += length[j] > length[i] || (length[j] == length[i] && j < i);
      place[i] = before;
      if (args.basis) continue;
      const int64_t own = b * k + before;
      const double g = is_double ? static_cast<const double*>(args.value_gradient)[own]
                                 : static_cast<double>(static_cast<const float*>(args.value_gradient)[own]);
      factor[i] = live[i] != 0 ? g / length[i] : 0.0;
    }
    each<kWarps>(k, k, [&](int i, int j) {
      if (live[i] != 0) y[static_cast<int64_t>(i) * ld + j] /= length[i];
    });
    __syncthreads();
    if (args.basis) {
      complete_basis<kWarps>(y, ld, k, live, at.x, factor, at.v,
                             reinterpret_cast<ArgMax<double>*>(at.scratch + 2 * kWarps), reduce);
      for (int i = thread_index(); i < k; i += kThreads)
        static_cast<double*>(args.values)[b * k + static_cast<int>(place[i])] = unscale(length[i]);
      each<kWarps>(k, k, [&](int i, int j) {
        args.basis[b * square + static_cast<int64_t>(place[i]) * k + j] = y[static_cast<int64_t>(i) * ld + j];
      });
    } else if (is_double) {
      store_gradient<double, kWarps>(args, b, scale, y, ld, factor, at);
    } else {
      store_gradient<float, kWarps>(args, b, scale, y, ld, factor, at);
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------ launches

struct Device {
  int processors = 0, shared = 0;  // bytes of a block
  cudaError_t error;
  Device() {
    int index = 0;
    error = cudaGetDevice(&index);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
    if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
#if defined(ND_SPECTRUM_SHARED_BYTES)
    shared = ND_SPECTRUM_SHARED_BYTES;
#endif
  }
};

int warps_of(int k) { return k <= kOneWarp ? 1 : k <= kFourWarps ? 4 : kMostWarps; }

struct Plan {
  int64_t grid, shared, slice;  // blocks; values in shared memory, and in the workspace a block, 0 if all is inside
  int warps;
  bool copied;  // vectors: R is in shared memory, but not what it is made from

  int64_t slice_bytes() const { return grid * slice * 8; }
};

// For so many values in shared memory with everything inside, with R copied there (0: never), and with neither.
Plan plan_of(const NdSpectrumArgs& args, const Device& device, int64_t inside, int64_t copied, int64_t outside,
             int64_t slice) {
  if (inside * 8 <= device.shared) return {smaller(args.batch, kMaxGrid), inside, 0, warps_of(short_side(args)), false};
  const int64_t most = larger(1, smaller(kMaxSlices / (slice * 8), 2 * device.processors));
  const bool copies = copied > 0 && copied * 8 <= device.shared;
  return {smaller(args.batch, most), copies ? copied : outside, slice, kMostWarps, copies};
}

Plan gram_plan(const NdSpectrumArgs& args, const Device& device) {
  const int k = short_side(args);
  const GramWork inside(k, warps_of(k), true, nullptr), outside(k, kMostWarps, false, nullptr);
  return plan_of(args, device, inside.count, 0, outside.count, static_cast<int64_t>(k) * inside.ld);
}

Plan dense_plan(const NdSpectrumArgs& args, const Device& device, bool vectors) {
  const int k = short_side(args);
  const auto work = [&](int warps, bool w_inside, bool y_inside) {
    return DenseWork(k, long_side(args), warps, vectors, w_inside, y_inside, nullptr);
  };
  const DenseWork inside = work(warps_of(k), true, false);
  return plan_of(args, device, inside.count, vectors ? work(kMostWarps, false, true).count : 0,
                 work(kMostWarps, false, false).count, static_cast<int64_t>(k) * inside.ld);
}

bool by_symmetric_form(const NdSpectrumArgs& args) { return args.hermitian || args.dtype != 1; }
bool wants_vectors(const NdSpectrumArgs& args) { return args.basis || args.gradient; }

template <class... Arguments>
cudaError_t launch(void (*kernel)(Problem, Arguments...), const Plan& plan, cudaStream_t stream, Problem problem,
                   double* slices, Arguments... arguments) {
  problem.slice = plan.slice;
  problem.slices = slices;
  const int shared = static_cast<int>(plan.shared * 8);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  ND_LAUNCH(kernel, static_cast<unsigned>(plan.grid), 32 * plan.warps, shared, stream, problem, arguments...);
  return cudaGetLastError();
}

// The instance of a kernel for a plan.
#define ND_INSTANCE(KERNEL, PLAN)          \
  ((PLAN).slice > 0    ? KERNEL<16, false> \
   : (PLAN).warps == 1 ? KERNEL<1, true>   \
   : (PLAN).warps == 4 ? KERNEL<4, true>   \
                       : KERNEL<16, true>)

// Of the marks of undecided matrices, before the slices.
int64_t flag_bytes(const NdSpectrumArgs& args) { return (args.batch * 4 + 255) / 256 * 256; }

size_t workspace_bytes(const NdSpectrumArgs& args, const Device& device) {
  if (wants_vectors(args)) return static_cast<size_t>(dense_plan(args, device, true).slice_bytes());
  const int64_t gram = by_symmetric_form(args) ? gram_plan(args, device).slice_bytes() : 0;
  const int64_t dense = args.hermitian ? 0 : dense_plan(args, device, false).slice_bytes();
  return static_cast<size_t>(flag_bytes(args) + larger(gram, dense));
}

cudaError_t run(const NdSpectrumArgs& args, void* workspace, cudaStream_t stream) {
  const Device device;
  if (device.error) return device.error;
  Problem problem = {};
  problem.args = args;
  if (wants_vectors(args)) {
    const Plan plan = dense_plan(args, device, true);
    return launch(ND_INSTANCE(vectors, plan), plan, stream, problem, static_cast<double*>(workspace), plan.copied);
  }
  double* const slices = static_cast<double*>(workspace) + flag_bytes(args) / 8;
  const bool symmetric = by_symmetric_form(args), both = symmetric && args.rank && !args.hermitian;
  problem.undecided = both ? static_cast<int*>(workspace) : nullptr;
  const int64_t all = args.rank ? args.num_rtol : 1;
  for (int64_t first = 0; first < all; first += kMaxTolerances) {
    problem.first_rtol = static_cast<int>(first);
    problem.num_rtol = args.rank ? static_cast<int>(smaller(kMaxTolerances, all - first)) : 0;
    for (int r = 0; r < problem.num_rtol; r++) problem.rtol[r] = args.rtol[first + r];
    cudaError_t error = cudaSuccess;
    if (symmetric) {
      const Plan plan = gram_plan(args, device);
      error = launch(ND_INSTANCE(by_gram, plan), plan, stream, problem, slices);
    }
    if (!error && (!symmetric || both)) {
      const Plan plan = dense_plan(args, device, false);
      error = launch(ND_INSTANCE(by_bidiagonal, plan), plan, stream, problem, slices);
    }
    if (error) return error;
  }
  return cudaSuccess;
}

bool valid(const NdSpectrumArgs& args) {
  const int results = (args.rank != nullptr) + (args.values != nullptr) + (args.gradient != nullptr);
  return args.batch >= 0 && args.m >= 1 && args.n >= 1 && long_side(args) < (int64_t{1} << 31) &&
         short_side(args) <= ND_SPECTRUM_LONGEST && args.dtype >= 0 && args.dtype <= 3 && results == 1;
}

}  // namespace nd::spectrum

extern "C" size_t nd_spectrum_workspace(const NdSpectrumArgs* args) {
  if (args->batch == 0 || !nd::spectrum::valid(*args)) return 0;
  const nd::spectrum::Device device;
  return nd::spectrum::workspace_bytes(*args, device);
}

extern "C" int nd_spectrum(const NdSpectrumArgs* args, void* workspace, void* stream) {
  if (!nd::spectrum::valid(*args)) return static_cast<int>(cudaErrorInvalidValue);
  if (args->batch == 0) return static_cast<int>(cudaSuccess);
  return static_cast<int>(nd::spectrum::run(*args, workspace, static_cast<cudaStream_t>(stream)));
}
