// Exact nearest neighbours without an n x m matrix: for every row of x the k rows of y of smallest (key, index). The
// products of 16-bit copies of the rows come from the caller (cuBLAS), a tile at a time; these kernels do the rest.
//
// Method, that of csrc/cpu/retrieval.cpp. A row is centred (the order of distances does not change, their rounding
// does) and scaled: z = a u, a a power of two of its own, so that the largest |u| is in [128, 256). u is rounded to
// u^ = high, or to high + low, both of 16 bits, with e = |z - a u^| and R >= |z|, |a u^| measured in float64. With
// scores o_i + o_j + slope <z_i, z_j> (slope -2, or -1 for inner products) and the product P of u^_i and u^_j,
//
//     score = o_i + o_j + slope a_i a_j P,    |score - truth| <= |slope| (R_i G_j + G_i R_j) + 8 2^-24 (|o_i| + |o_j|),
//     G = e + gamma R / 2,    gamma = (1.5 W + 16) 2^-23,    W terms of a product.
//
// gamma holds for products that are exact and are summed in float32 in any order, rounded or truncated, alone or in
// groups of four or more that are aligned to their largest term and keep 24 bits: what the tensor cores from sm_80 on
// do. Of `high + low` the product leaves out low x low, at most 2^-20 R_i R_j, or in e.
//
// A row keeps the columns with lower bound <= its k-th smallest upper bound so far, and as far candidates those that
// may have the largest key. At the end float64 keys of the values as given decide, in the total order of (key, index):
// results depend neither on order nor on precision. A row whose room runs out is searched anew in float64, by kernels
// that read which those are: the host waits for nothing. A row that is not finite (or, for cosines, zero) makes all
// keys NaN and the indices of every row 0, 1, ..
//
// Layout. A tile has all products of `rows` rows with some columns; within one set (joined) those from the first of the
// rows on. offer_rows: one warp a row, along the row. offer_columns, of one set: columns beyond the rows collect the
// same products, 32 columns a block of 16 warps, each lane down its own column. Either owns the lists it writes, so no
// two blocks meet, and a full list is cut to what may still count before more is taken. finish_rows: one block a row.
//
// Cost on an H100, predicted, not measured; N rows of dim D = 2048 within one set, tiles 2048 x 4096:
//   scan_rows, pack_rows   4 D bytes read by each (pack_rows twice, once from the cache), 2 D written; 10 D float64
//                          operations a row
//   products               N^2 D flops by cuBLAS at 600 Tflop/s, 2 N^2 bytes written
//   offer_rows, _columns   2 N^2 bytes each, from the second-level cache where the tile stays there (5 TB/s); 10 flops
//                          an entry
//   finish_rows            4 D bytes and 3 D float64 operations a candidate: some 22 for 21 neighbours
//                      Market (19,281)   MSMT17 (93,820)   440,000
//   scan, centre, pack       0.15 ms          0.6 ms         2.8 ms
//   products                 1.4 ms           31 ms          670 ms
//   rows and columns         0.6 ms           9 ms           250 ms
//   finish                   1.1 ms           6 ms            28 ms
//   sum                      3.3 ms           47 ms          950 ms
//
// Limits: fewer than 2^31 rows, keys of float64 input have to be finite, few rows of x leave most of the device idle.
#include <cuda_fp16.h>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

namespace nd::retrieval {

typedef unsigned long long Bits;

// Another value makes lists short in the tests.
#if !defined(ND_RETRIEVAL_COLUMN_WARPS)
#define ND_RETRIEVAL_COLUMN_WARPS 16
#endif
constexpr int kOfferWarps = 8;  // of offer_rows, one a row
constexpr int kPerLane = 4;     // columns that a lane looks at before the warp meets
constexpr int kColumnWarps = ND_RETRIEVAL_COLUMN_WARPS, kRowsAThread = 8;  // of offer_columns
constexpr int kChunk = kColumnWarps * kRowsAThread;
constexpr int kRowWarps = 8;  // of scan_rows and pack_rows
constexpr int kFinishWarps = 4, kExactWarps = 8;
constexpr int kFar = 64;                             // room for candidates of the largest key
constexpr int kCentreRows = 1024;                    // rows behind the centre
constexpr int kAlign = 8;                            // of rows and columns of the copies
constexpr int64_t kExactBytes = int64_t{256} << 20;  // of the keys of rows that are searched in float64, at most
constexpr float kUnit = 0x1p-24f, kTiny = 1e-30f, kUp = 1 + 0x1p-18f;  // kTiny: what flushing denormals can lose
constexpr float kOffsetRounding = 8 * kUnit;
constexpr float kSmallest = 0x1p-14f;  // of high and low: what is below counts as zero

struct Status {
  Bits size;      // largest absolute value, as bits of a double
  Bits bad_row;   // the first that is refused, or ~0
  int undecided;  // rows to be searched in float64
};

// Candidates of one row.
struct State {
  int count, far_count;  // count -1: undecided
  float bound;           // upper bound of the k-th smallest score, infinity until known
  float far_bound;       // lower bound of the largest
};

// Sizes, and what the workspace holds.
struct Search {
  NdNeighborsArgs args;
  int64_t rows, searched, among;  // of x and y; those searched for; those searched among
  int64_t first_base;             // the first row searched among
  int64_t longer;                 // rows that have query_k neighbours
  int64_t room, query_room;       // candidates of a row
  int64_t padded_dim, width;      // columns of a part of a copy, and of all
  float slope, half_gamma;
  Status* status;
  double* centre;    // [dim], scaled
  double* unit;      // [rows] cosines: 1 / |x|
  float4* facts;     // [rows] o, R, G, a
  State* states;     // [searched]
  Bits* range;       // candidates: bits of the upper bound, then of the lower; in the end ordered bits of the key
  int* index;        // the same for their columns
  Bits* far;         // [searched, kFar] bits of the upper bound, column
  int* undecided;    // [searched]
  Bits* exact_keys;  // [exact_blocks, among]
  int exact_blocks;
};

struct Tile {
  const float* product;  // [rows, ld]
  int64_t ld, first_row, rows, first_column, columns;
  int64_t own_columns;  // the first column that collects, of one set
};

__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------ small things

__device__ __forceinline__ Bits bits_of(float low, float high) {
  return static_cast<Bits>(__float_as_uint(high)) << 32 | __float_as_uint(low);
}
__device__ __forceinline__ float low_float(Bits bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
__device__ __forceinline__ float high_float(Bits bits) { return __uint_as_float(static_cast<unsigned>(bits >> 32)); }

// Bits whose unsigned order is that of the numbers, -0 before 0.
__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(unsigned bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
constexpr Bits kSign = Bits{1} << 63;
__device__ __forceinline__ Bits ordered(double x) {
  const Bits bits = static_cast<Bits>(__double_as_longlong(x + 0.0));  // -0 counts as 0
  return bits & kSign ? ~bits : bits | kSign;
}
__device__ __forceinline__ double from_ordered(Bits bits) {
  return __longlong_as_double(static_cast<long long>(bits & kSign ? bits & ~kSign : ~bits));
}

__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_index()) - 1; }

// Row r of x, then of y.
template <class T>
__device__ __forceinline__ const T* row_of(const NdNeighborsArgs& args, int64_t r) {
  return r < args.n ? static_cast<const T*>(args.x) + r * args.x_stride
                    : static_cast<const T*>(args.y) + (r - args.n) * args.y_stride;
}

// 2^-e with x in [2^(e-1), 2^e), as far as it is a normal number; 1 for 0.
__device__ __forceinline__ double power_of_two_below_inverse(double x) {
  int exponent = 0;
  if (x > 0) frexp(x, &exponent);
  return ldexp(1.0, -max(exponent, -1000));
}

// Factor of the values of row r before the centre is subtracted.
__device__ __forceinline__ double factor_of(const Search& s, int64_t r) {
  if (s.args.metric == ND_COSINE) return s.unit[r];
  return power_of_two_below_inverse(__longlong_as_double(static_cast<long long>(s.status->size)));
}

// ------------------------------------------------------------------------------------------------ scan, centre, pack

template <class T>
__global__ void __launch_bounds__(32 * kRowWarps) scan_rows(Search s) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kRowWarps + warp_index();
  if (r >= s.rows) return;
  const T* x = row_of<T>(s.args, r);
  T most = 0;
  bool bad = false;
#pragma unroll 4
  for (int64_t k = lane_index(); k < s.args.dim; k += kWarpSize) {
    const T v = __ldg(x + k);
    bad |= !(v - v == 0);
    most = Max()(most, v < 0 ? -v : v);
  }
  const double size = static_cast<double>(warp_max(most));
  bad = __any_sync(kFullWarp, bad) || (s.args.metric == ND_COSINE && size == 0);
  double unit = 1;
  if (s.args.metric == ND_COSINE && !bad) {
    const double scale = power_of_two_below_inverse(size);
    double sum = 0;
#pragma unroll 4
    for (int64_t k = lane_index(); k < s.args.dim; k += kWarpSize) {
      const double v = static_cast<double>(__ldg(x + k)) * scale;
      sum += v * v;
    }
    unit = scale / sqrt(warp_sum(sum));
  }
  if (lane_index() != 0) return;
  s.unit[r] = unit;
  if (bad)
    atomicMin(&s.status->bad_row, static_cast<Bits>(r));
  else
    atomicMax(&s.status->size, static_cast<Bits>(__double_as_longlong(size)));
}

// The mean of some rows, scaled; a block takes 32 columns.
template <class T>
__global__ void __launch_bounds__(1024) take_centre(Search s) {
  __shared__ double sums[32][33];
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane_index();
  const int64_t step = ceil_div(s.rows, kCentreRows), count = ceil_div(s.rows, step);
  double sum = 0;
  for (int64_t c = warp_index(); c < count && k < s.args.dim; c += kWarpSize)
    sum += factor_of(s, c * step) * static_cast<double>(row_of<T>(s.args, c * step)[k]);
  sums[lane_index()][warp_index()] = sum;
  __syncthreads();
  sum = warp_sum(sums[warp_index()][lane_index()]);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + warp_index();
  if (lane_index() == 0 && column < s.args.dim) s.centre[column] = sum / static_cast<double>(count);
}

// x to nearest even in 16 bits, and what they stand for.
struct Rounded {
  unsigned short bits;
  float value;
};
__device__ __forceinline__ Rounded rounded(float x, bool bfloat16) {
  Rounded r;
  if (bfloat16) {
    const unsigned bits = __float_as_uint(x);
    r.bits = static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    r.value = __uint_as_float(static_cast<unsigned>(r.bits) << 16);
  } else {
    const __half half = __float2half_rn(x);
    r.bits = __half_as_ushort(half);
    r.value = __half2float(half);
  }
  if (!(fabsf(r.value) >= kSmallest)) r = {0, 0.0f};
  return r;
}

// Values of a copy of row r from column k on.
__device__ __forceinline__ void store(const Search& s, int64_t r, int64_t k, unsigned short high, unsigned short low) {
  const bool of_x = s.args.joined || r < s.args.n, of_y = s.args.joined || r >= s.args.n;
  unsigned short* left = static_cast<unsigned short*>(s.args.left) + r * s.width + k;
  unsigned short* right = static_cast<unsigned short*>(s.args.right) + (r - s.first_base) * s.width + k;
  if (of_x) {
    left[0] = high;
    if (s.args.split) left[s.padded_dim] = high, left[2 * s.padded_dim] = low;
  }
  if (of_y && s.args.right != s.args.left) {
    right[0] = high;
    if (s.args.split) right[s.padded_dim] = low, right[2 * s.padded_dim] = high;
  }
}

// Copies of all rows, what is known of them, and empty lists.
template <class T>
__global__ void __launch_bounds__(32 * kRowWarps) pack_rows(Search s) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kRowWarps + warp_index();
  if (r >= s.rows) return;
  const T* x = row_of<T>(s.args, r);
  const double factor = factor_of(s, r);
  double most = 0;
#pragma unroll 4
  for (int64_t k = lane_index(); k < s.args.dim; k += kWarpSize)
    most = fmax(most, fabs(static_cast<double>(__ldg(x + k)) * factor - s.centre[k]));
  most = warp_max(most);
  int exponent = 0;
  frexp(most, &exponent);
  exponent = min(max(exponent, -100), 100) - 8;
  const double scale = ldexp(1.0, exponent), inverse = ldexp(1.0, -exponent);
  const bool lost = !(most >= 0x1p-101 && most < 0x1p100);  // such a row is all error
  double square = 0, along = 0, centre_square = 0, error = 0, low_square = 0;
#pragma unroll 4
  for (int64_t k = lane_index(); k < s.padded_dim; k += kWarpSize) {
    const double c = k < s.args.dim ? s.centre[k] : 0.0;
    const double z = k < s.args.dim ? static_cast<double>(__ldg(x + k)) * factor - c : 0.0;
    const double u = lost ? 0.0 : z * inverse;
    const Rounded high = rounded(static_cast<float>(u), s.args.bfloat16);
    const Rounded low = rounded(static_cast<float>(u - static_cast<double>(high.value)), s.args.bfloat16);
    store(s, r, k, high.bits, low.bits);
    const double kept = static_cast<double>(high.value) + (s.args.fine ? static_cast<double>(low.value) : 0.0);
    const double off = z - kept * scale;
    square += z * z;
    along += z * c;
    centre_square += c * c;
    error += off * off;
    low_square += static_cast<double>(low.value) * static_cast<double>(low.value);
  }
  square = warp_sum(square);
  along = warp_sum(along);
  centre_square = warp_sum(centre_square);
  error = warp_sum(error);
  low_square = warp_sum(low_square);
  if (lane_index() != 0) return;
  // float64 sums are good to a few last digits; what they may be short of goes into kUp and kTiny.
  float e = static_cast<float>(sqrt(error)) * kUp + kTiny;
  const float low = s.args.fine ? static_cast<float>(sqrt(low_square) * scale) * kUp : 0.0f;
  const float radius = static_cast<float>(sqrt(square)) * kUp + e + low;
  if (low > 0x1p-10f * radius) e += low;
  const double offset = s.args.metric == ND_INNER_PRODUCT ? -(along + centre_square / 2) : square;
  s.facts[r] = make_float4(static_cast<float>(offset), radius, (e + s.half_gamma * radius) * kUp,
                           lost ? 0.0f : static_cast<float>(scale));
  if (r < s.searched) s.states[r] = {0, 0, INFINITY, -INFINITY};
}

// Rows of zeros behind the last of a copy.
__global__ void pad_copies(Search s, int64_t left_rows, int64_t right_rows) {
  unsigned short* left = static_cast<unsigned short*>(s.args.left);
  unsigned short* right = static_cast<unsigned short*>(s.args.right);
  for (int64_t k = threadIdx.x; k < kAlign * s.width; k += blockDim.x) {
    if (left_rows + k / s.width < ceil_div(left_rows, kAlign) * kAlign) left[left_rows * s.width + k] = 0;
    if (right_rows + k / s.width < ceil_div(right_rows, kAlign) * kAlign) right[right_rows * s.width + k] = 0;
  }
}

// ------------------------------------------------------------------------------------------------ scores

// What the scores of one row have in common.
struct Own {
  float offset, rounding, radius, error, scale;
  __device__ __forceinline__ Own(const Search& s, float4 facts)
      : offset(facts.x),
        rounding(kOffsetRounding * fabsf(facts.x) + kTiny),
        radius(-s.slope * kUp * facts.y),
        error(-s.slope * kUp * facts.z),
        scale(s.slope * facts.w) {}
};
struct Score {
  float lower, upper;
};
__device__ __forceinline__ Score score_of(const Own& own, float4 other, float product) {
  const float score = fmaf(product * own.scale, other.w, own.offset + other.x);
  const float slack =
      fmaf(own.radius, other.z, fmaf(own.error, other.y, fmaf(kOffsetRounding, fabsf(other.x), own.rounding)));
  return {score - slack, score + slack};
}
__device__ __forceinline__ Score no_score() { return {NAN, NAN}; }  // no comparison holds

// ------------------------------------------------------------------------------------------------ lists, by a warp

// List of row i, its room, and the neighbours wanted.
struct List {
  Bits* range;
  int* index;
  int room, k;
  __device__ __forceinline__ List(const Search& s, int64_t i) {
    const int64_t longer = smaller(i, s.longer), begin = longer * s.query_room + (i - longer) * s.room;
    range = s.range + begin;
    index = s.index + begin;
    room = static_cast<int>(i < s.longer ? s.query_room : s.room);
    k = static_cast<int>(i < s.longer ? s.args.query_k : s.args.k);
  }
};

// The k-th smallest upper bound of count >= k.
__device__ inline float kth_upper(const Bits* range, int count, int k) {
  unsigned found = 0;
  for (int bit = 31; bit >= 0; bit--) {
    const unsigned trial = found | 1u << bit;
    int below = 0;
    for (int e = lane_index(); e < count; e += kWarpSize) below += ordered(high_float(range[e])) < trial;
    if (warp_sum(below) < k) found = trial;
  }
  return from_ordered(found);
}

// Drops what cannot be among the k smallest; what all lanes wrote, all see. Returns what is left.
__device__ inline int shrink(const List& list, int count, float& bound) {
  __syncwarp();
  if (count < list.k) return count;
  bound = kth_upper(list.range, count, list.k);
  int kept = 0;
  for (int first = 0; first < count; first += kWarpSize) {
    const int e = first + lane_index();
    const Bits range = e < count ? list.range[e] : 0;
    const int index = e < count ? list.index[e] : 0;
    const bool keep = e < count && low_float(range) <= bound;
    const unsigned mask = __ballot_sync(kFullWarp, keep);
    const int to = kept + __popc(mask & lanes_below());
    __syncwarp();
    if (keep) {
      list.range[to] = range;
      list.index[to] = index;
    }
    kept += __popc(mask);
  }
  __syncwarp();
  return kept;
}

// The same for the candidates of the largest key.
__device__ inline int shrink_far(Bits* far, int count, float bound) {
  __syncwarp();
  int kept = 0;
  for (int first = 0; first < count; first += kWarpSize) {
    const int e = first + lane_index();
    const Bits candidate = e < count ? far[e] : 0;
    const bool keep = e < count && high_float(candidate) >= bound;
    const unsigned mask = __ballot_sync(kFullWarp, keep);
    const int to = kept + __popc(mask & lanes_below());
    __syncwarp();
    if (keep) far[to] = candidate;
    kept += __popc(mask);
  }
  __syncwarp();
  return kept;
}

__device__ __forceinline__ Bits far_candidate(float upper, int64_t column) {
  return static_cast<Bits>(__float_as_uint(upper)) << 32 | static_cast<unsigned>(column);
}

// One candidate of each lane, to a list that this warp owns. False: no room.
__device__ inline bool push(const List& list, State& state, Score score, int64_t column) {
  unsigned mask = __ballot_sync(kFullWarp, score.lower <= state.bound);
  if (mask == 0) return true;
  if (state.count + __popc(mask) > list.room) {
    state.count = shrink(list, state.count, state.bound);
    mask = __ballot_sync(kFullWarp, score.lower <= state.bound);
    if (state.count + __popc(mask) > list.room) return false;
  }
  if (mask >> lane_index() & 1) {
    const int to = state.count + __popc(mask & lanes_below());
    list.range[to] = bits_of(score.lower, score.upper);
    list.index[to] = static_cast<int>(column);
  }
  state.count += __popc(mask);
  return true;
}

__device__ inline bool push_far(Bits* far, State& state, float upper, int64_t column) {
  const unsigned mask = __ballot_sync(kFullWarp, upper >= state.far_bound);
  if (mask == 0) return true;
  if (state.far_count + __popc(mask) > kFar) {
    state.far_count = shrink_far(far, state.far_count, state.far_bound);
    if (state.far_count + __popc(mask) > kFar) return false;
  }
  if (mask >> lane_index() & 1) far[state.far_count + __popc(mask & lanes_below())] = far_candidate(upper, column);
  state.far_count += __popc(mask);
  return true;
}

// ------------------------------------------------------------------------------------------------ tiles

__device__ __forceinline__ float product_at(const float* product, int64_t j, int64_t columns) {
  return j < columns ? __ldg(product + j) : 0.0f;
}

template <bool kLargest>
__global__ void __launch_bounds__(32 * kOfferWarps) offer_rows(Search s, Tile t) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kOfferWarps + warp_index();
  if (row >= t.rows) return;
  const int64_t i = t.first_row + row;
  State state = s.states[i];
  __syncwarp();
  if (state.count < 0) return;
  const List list(s, i);
  Bits* const far = s.far + (kLargest ? i * kFar : 0);
  const Own own(s, s.facts[i]);
  const float* product = t.product + row * t.ld;
  const float4* facts = s.facts + s.first_base + t.first_column;
  float ahead[kPerLane];  // products of the columns to come, read while those before are looked at
#pragma unroll
  for (int u = 0; u < kPerLane; u++) ahead[u] = product_at(product, u * kWarpSize + lane_index(), t.columns);
  bool room = true;
  for (int64_t first = 0; first < t.columns && room; first += kPerLane * kWarpSize) {
    Score scores[kPerLane];
    bool hit = false, far_hit = false;
    float far_lower = -INFINITY;
#pragma unroll
    for (int u = 0; u < kPerLane; u++) {
      const int64_t j = first + u * kWarpSize + lane_index();
      scores[u] = j < t.columns ? score_of(own, __ldg(facts + j), ahead[u]) : no_score();
      ahead[u] = product_at(product, j + kPerLane * kWarpSize, t.columns);
      hit |= scores[u].lower <= state.bound;
      far_hit |= scores[u].upper >= state.far_bound;
      far_lower = fmaxf(far_lower, scores[u].lower);
    }
    const int64_t column = t.first_column + first + lane_index();
    if (__any_sync(kFullWarp, hit)) {
#pragma unroll
      for (int u = 0; u < kPerLane; u++) room = room && push(list, state, scores[u], column + u * kWarpSize);
    }
    if (kLargest && __any_sync(kFullWarp, far_hit)) {
      state.far_bound = fmaxf(state.far_bound, warp_max(far_lower));
#pragma unroll
      for (int u = 0; u < kPerLane; u++) room = room && push_far(far, state, scores[u].upper, column + u * kWarpSize);
    }
  }
  if (!room) state.count = -1;
  if (lane_index() == 0) s.states[i] = state;
}

// Lists of 32 columns while a block adds to them.
struct Columns {
  int count[kWarpSize], far_count[kWarpSize];
  float bound[kWarpSize];
  unsigned far_bound[kWarpSize];  // ordered
  bool full[kWarpSize];           // or no column
};

// Room for kChunk candidates in the list of column c, in shared memory at the same place, or it is full; by a warp.
template <bool kLargest>
__device__ inline void make_room(const Search& s, Columns& columns, int64_t column, int c) {
  if (columns.full[c]) return;
  const List list(s, column);
  int count = columns.count[c], far_count = columns.far_count[c];
  float bound = columns.bound[c];
  if (count > list.room - kChunk) count = shrink(list, count, bound);
  bool full = count > list.room - kChunk;
  if (kLargest && far_count > kFar / 2) {
    full |= far_count > kFar;  // some are lost
    far_count = shrink_far(s.far + column * kFar, static_cast<int>(smaller(far_count, kFar)),
                           from_ordered(columns.far_bound[c]));
  }
  __syncwarp();
  if (lane_index() == 0) {
    columns.count[c] = count;
    columns.far_count[c] = far_count;
    columns.bound[c] = bound;
    columns.full[c] = full;
  }
}

template <bool kLargest>
__global__ void __launch_bounds__(32 * kColumnWarps) offer_columns(Search s, Tile t) {
  __shared__ Columns columns;
  const int lane = lane_index();
  const int64_t begin = t.own_columns + static_cast<int64_t>(blockIdx.x) * kWarpSize;
  const int64_t last = t.first_column + t.columns - 1, column = smaller(begin + lane, last);
  if (warp_index() == 0) {
    const State state = s.states[column];
    columns.count[lane] = state.count;
    columns.far_count[lane] = state.far_count;
    columns.bound[lane] = state.bound;
    columns.far_bound[lane] = ordered(state.far_bound);
    columns.full[lane] = begin + lane > last || state.count < 0;
  }
  const List list(s, column);
  Bits* const far = s.far + (kLargest ? column * kFar : 0);
  const Own own(s, s.facts[column]);
  const float* product = t.product + column - t.first_column;
  bool low_on_room = true;
  for (int64_t first = 0; first < t.rows; first += kChunk) {
    Score scores[kRowsAThread];
    float far_lower = -INFINITY;
    const int64_t row = first + warp_index() * kRowsAThread;
#pragma unroll
    for (int u = 0; u < kRowsAThread; u++) {
      scores[u] = row + u < t.rows
                      ? score_of(own, __ldg(s.facts + t.first_row + row + u), __ldg(product + (row + u) * t.ld))
                      : no_score();
      far_lower = fmaxf(far_lower, scores[u].lower);
    }
    if (__syncthreads_or(low_on_room)) {
      for (int c = warp_index(); c < kWarpSize; c += kColumnWarps) make_room<kLargest>(s, columns, begin + c, c);
      __syncthreads();
    }
    low_on_room = false;
    if (kLargest) {
      atomicMax(&columns.far_bound[lane], ordered(far_lower));
      __syncthreads();
    }
    if (columns.full[lane]) continue;
    const float near = columns.bound[lane], farthest = from_ordered(columns.far_bound[lane]);
#pragma unroll
    for (int u = 0; u < kRowsAThread; u++) {
      if (scores[u].lower <= near) {
        const int to = atomicAdd(&columns.count[lane], 1);
        list.range[to] = bits_of(scores[u].lower, scores[u].upper);
        list.index[to] = static_cast<int>(t.first_row + row + u);
        low_on_room |= to >= list.room - kChunk;
      }
      if (kLargest && scores[u].upper >= farthest) {
        const int to = atomicAdd(&columns.far_count[lane], 1);
        if (to < kFar) far[to] = far_candidate(scores[u].upper, t.first_row + row + u);
        low_on_room |= to >= kFar / 2;
      }
    }
  }
  __syncthreads();
  if (warp_index() != 0 || begin + lane > last) return;
  const bool full = columns.full[lane] || columns.far_count[lane] > kFar;
  s.states[column] = {full ? -1 : columns.count[lane], columns.far_count[lane], columns.bound[lane],
                      from_ordered(columns.far_bound[lane])};
}

// ------------------------------------------------------------------------------------------------ float64 keys

// Key of row i and column j, the same in all lanes of the warp.
template <class T>
__device__ __forceinline__ double key_of(const Search& s, int64_t i, int64_t j) {
  const int64_t other = s.first_base + j, dim = s.args.dim;
  const T *x = row_of<T>(s.args, i), *y = row_of<T>(s.args, other);
  const bool inner = s.args.metric == ND_INNER_PRODUCT;
  const double a = s.unit[i], b = s.unit[other];  // 1 but for cosines
  double sum[4] = {};
  for (int64_t first = 0; first < dim; first += 4 * kWarpSize) {
#pragma unroll
    for (int u = 0; u < 4; u++) {
      const int64_t k = first + u * kWarpSize + lane_index();
      const double v = k < dim ? static_cast<double>(__ldg(x + k)) : 0.0;
      const double w = k < dim ? static_cast<double>(__ldg(y + k)) : 0.0;
      const double difference = __dmul_rn(v, a) - __dmul_rn(w, b);  // rounded alike: 0 for equal rows
      sum[u] += inner ? v * w : difference * difference;
    }
  }
  const double total = warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return inner ? -total : s.args.metric == ND_COSINE ? 0.5 * total : total;
}

struct Results {
  double* key;
  int64_t* index;
  double* largest;
  double* query_key;
  int64_t* query_index;
};

__device__ __forceinline__ void write(const Search& s, const Results& out, int64_t i, int rank, double key,
                                      int64_t index) {
  if (rank < s.args.k) {
    out.key[i * s.args.k + rank] = key;
    out.index[i * s.args.k + rank] = index;
  }
  if (i < s.longer) {
    out.query_key[i * s.args.query_k + rank] = key;
    out.query_index[i * s.args.query_k + rank] = index;
  }
}

// Candidates with their keys, in order, by the block: the rank of one is the number of those before it.
__device__ inline void write_sorted(const Search& s, const Results& out, int64_t i, const List& list, int count) {
  for (int e = static_cast<int>(threadIdx.x); e < count; e += static_cast<int>(blockDim.x)) {
    const Bits key = list.range[e];
    const int index = list.index[e];
    int rank = 0;
    for (int f = 0; f < count; f++) {
      const Bits other = list.range[f];
      rank += other < key || (other == key && list.index[f] < index);
    }
    if (rank < list.k) write(s, out, i, rank, from_ordered(key), index);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kFinishWarps) finish_rows(Search s, Results out) {
  __shared__ int counts[2];
  __shared__ Bits largest[kFinishWarps];
  const int64_t i = blockIdx.x;
  const List list(s, i);
  if (s.status->bad_row != ~Bits{0}) {
    for (int rank = static_cast<int>(threadIdx.x); rank < list.k; rank += static_cast<int>(blockDim.x))
      write(s, out, i, rank, NAN, rank);
    if (out.largest && threadIdx.x == 0) out.largest[i] = NAN;
    return;
  }
  State state = s.states[i];
  if (state.count < 0) {
    if (threadIdx.x == 0) s.undecided[atomicAdd(&s.status->undecided, 1)] = static_cast<int>(i);
    return;
  }
  Bits* const far = s.far + (out.largest ? i * kFar : 0);
  if (warp_index() == 0) {
    const int left = shrink(list, state.count, state.bound);
    const int far_left = out.largest ? shrink_far(far, state.far_count, state.far_bound) : 0;
    if (lane_index() == 0) counts[0] = left, counts[1] = far_left;
  }
  __syncthreads();
  const int count = counts[0];
  for (int e = warp_index(); e < count; e += kFinishWarps) {
    const double key = key_of<T>(s, i, list.index[e]);
    if (lane_index() == 0) list.range[e] = ordered(key);
  }
  Bits most = 0;
  for (int e = warp_index(); e < counts[1]; e += kFinishWarps) {
    const Bits key = ordered(key_of<T>(s, i, static_cast<unsigned>(far[e])));
    most = key > most ? key : most;
  }
  if (lane_index() == 0) largest[warp_index()] = most;
  __syncthreads();
  write_sorted(s, out, i, list, count);
  if (!out.largest || threadIdx.x != 0) return;
  for (int w = 1; w < kFinishWarps; w++) most = largest[w] > most ? largest[w] : most;
  out.largest[i] = from_ordered(most);
}

// Rows without room for their candidates: all keys, then by bisection the k-th, then of its equals the last index.
template <class T>
__global__ void __launch_bounds__(32 * kExactWarps) exact_rows(Search s, Results out) {
  __shared__ int scratch[2][kExactWarps];
  __shared__ Bits most_scratch[kExactWarps];
  __shared__ int taken;
  Bits* const keys = s.exact_keys + static_cast<int64_t>(blockIdx.x) * s.among;
  const int among = static_cast<int>(s.among);
  int turn = 0;
  for (int u = static_cast<int>(blockIdx.x); u < s.status->undecided; u += static_cast<int>(gridDim.x)) {
    const int64_t i = s.undecided[u];
    const List list(s, i);
    Bits most = 0;
    for (int j = warp_index(); j < among; j += kExactWarps) {
      const Bits key = ordered(key_of<T>(s, i, j));
      most = key > most ? key : most;
      if (lane_index() == 0) keys[j] = key;
    }
    most = block_max<kExactWarps>(most, most_scratch);
    const auto count_of = [&](auto holds) {  // columns of which it holds
      int count = 0;
      for (int j = static_cast<int>(threadIdx.x); j < among; j += 32 * kExactWarps) count += holds(keys[j], j);
      turn ^= 1;
      return block_sum<kExactWarps>(count, scratch[turn]);
    };
    Bits kth = 0;
    for (int bit = 63; bit >= 0; bit--) {
      const Bits trial = kth | Bits{1} << bit;
      if (count_of([=](Bits key, int) { return key < trial; }) < list.k) kth = trial;
    }
    const int equals = list.k - count_of([=](Bits key, int) { return key < kth; });  // wanted of those
    int last = 0;  // equals below it are fewer than wanted
    for (int bit = 30; bit >= 0; bit--) {
      const int trial = last | 1 << bit;
      if (count_of([=](Bits key, int j) { return key == kth && j < trial; }) < equals) last = trial;
    }
    if (threadIdx.x == 0) taken = 0;
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < among; j += 32 * kExactWarps) {
      const Bits key = keys[j];
      if (key > kth || (key == kth && j > last)) continue;
      const int to = atomicAdd(&taken, 1);
      list.range[to] = key;
      list.index[to] = j;
    }
    __syncthreads();
    write_sorted(s, out, i, list, list.k);
    if (out.largest && threadIdx.x == 0) out.largest[i] = from_ordered(most);
    __syncthreads();
  }
}

// Keys of queries with all rows that are none, from their products, in float32.
__global__ void __launch_bounds__(256) write_dense(Search s, Tile t, float* dense) {
  const int64_t queries = s.args.num_queries, j = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const double inverse = s.args.metric == ND_COSINE ? 1.0 : 1 / factor_of(s, 0);
  const float unit = static_cast<float>(inverse * inverse * (s.args.metric == ND_COSINE ? 0.5 : 1));
  const bool bad = s.status->bad_row != ~Bits{0};
  if (j >= t.columns) return;
  const float4 other = __ldg(s.facts + queries + j);
  for (int64_t row = blockIdx.y; row < t.rows; row += gridDim.y) {
    const float4 own = __ldg(s.facts + t.first_row + row);
    const float scores = fmaf(t.product[row * t.ld + j] * (s.slope * own.w), other.w, own.x + other.x);
    dense[(t.first_row + row) * t.columns + j] = bad ? NAN : fmaxf(scores, 0.0f) * unit;
  }
}

// ------------------------------------------------------------------------------------------------ host

// Hands out aligned parts of the workspace, or only counts where there is none.
struct Parts {
  char* base;
  int64_t bytes = 0;
  template <class P>
  P* take(int64_t count) {
    P* part = base ? reinterpret_cast<P*>(base + bytes) : nullptr;
    bytes += ceil_div(count * static_cast<int64_t>(sizeof(P)), 256) * 256;
    return part;
  }
};

int64_t room_for(int64_t k, int64_t among) { return smaller(k + smaller(3 * k, 4096) + 32, among) + kChunk; }

Search search_of(const NdNeighborsArgs& args, void* workspace, int64_t* bytes = nullptr) {
  Search s = {};
  s.args = args;
  s.rows = args.n + args.m;
  s.searched = args.joined ? s.rows : args.n;
  s.among = args.joined ? s.rows : args.m;
  s.first_base = args.joined ? 0 : args.n;
  s.room = room_for(args.k, s.among);
  s.longer = args.query_k > 0 ? args.num_queries : 0;
  s.query_room = s.longer > 0 ? room_for(args.query_k, s.among) : s.room;
  s.padded_dim = ceil_div(args.dim, kAlign) * kAlign;
  s.width = (args.split ? 3 : 1) * s.padded_dim;
  s.slope = args.metric == ND_INNER_PRODUCT ? -1.0f : -2.0f;
  // The absolute terms of three parts add up to 2^-9 more than R_i R_j.
  const double terms = static_cast<double>((args.fine ? 3 : 1) * s.padded_dim) * (args.fine ? 1 + 0x1p-8 : 1);
  s.half_gamma = static_cast<float>((1.5 * terms + 16) * 0x1p-24 + (args.fine ? 0x1p-21 : 0)) * kUp;
  s.exact_blocks = static_cast<int>(smaller(kExactBytes / (8 * s.among) + 1, smaller(s.searched, 512)));
  Parts parts = {static_cast<char*>(workspace)};
  s.status = parts.take<Status>(1);
  s.centre = parts.take<double>(args.dim);
  s.unit = parts.take<double>(s.rows);
  s.facts = parts.take<float4>(s.rows);
  s.states = parts.take<State>(s.searched);
  const int64_t lists = s.longer * s.query_room + (s.searched - s.longer) * s.room;
  s.range = parts.take<Bits>(lists);
  s.index = parts.take<int>(lists);
  s.far = parts.take<Bits>(args.wants_largest ? s.searched * kFar : 0);
  s.undecided = parts.take<int>(s.searched);
  s.exact_keys = parts.take<Bits>(s.exact_blocks * s.among);
  if (bytes) *bytes = parts.bytes;
  return s;
}

bool valid(const NdNeighborsArgs& a) {
  const int64_t all = a.n + a.m, among = a.joined ? all : a.m;
  const bool sizes = a.n >= 0 && a.m >= 0 && all < int64_t{1} << 31 && a.dim >= 1 && (a.joined ? all : a.n) >= 1;
  const bool lists = a.k >= 1 && a.k <= among && (a.query_k == 0 || (a.query_k >= a.k && a.query_k <= among));
  const bool queries = a.num_queries >= 0 && a.num_queries <= (a.joined ? all : 0);
  return sizes && lists && queries && (a.dtype == 0 || a.dtype == 1) && a.metric >= ND_SQUARED_EUCLIDEAN &&
         a.metric <= ND_INNER_PRODUCT && (a.split || !a.fine);
}

unsigned blocks(int64_t count, int64_t each) { return static_cast<unsigned>(ceil_div(count, each)); }

template <class T>
cudaError_t prepare(const Search& s, cudaStream_t stream) {
  if (const cudaError_t error = cudaMemsetAsync(s.status, 0, sizeof(Status), stream)) return error;
  if (const cudaError_t error = cudaMemsetAsync(&s.status->bad_row, 0xff, sizeof(Bits), stream)) return error;
  ND_LAUNCH(scan_rows<T>, blocks(s.rows, kRowWarps), 32 * kRowWarps, 0, stream, s);
  ND_LAUNCH(take_centre<T>, blocks(s.args.dim, kWarpSize), 1024, 0, stream, s);
  ND_LAUNCH(pack_rows<T>, blocks(s.rows, kRowWarps), 32 * kRowWarps, 0, stream, s);
  ND_LAUNCH(pad_copies, 1, 256, 0, stream, s, s.searched, s.among);
  return cudaGetLastError();
}

template <class T>
cudaError_t finish(const Search& s, const Results& out, cudaStream_t stream) {
  ND_LAUNCH(finish_rows<T>, static_cast<unsigned>(s.searched), 32 * kFinishWarps, 0, stream, s, out);
  ND_LAUNCH(exact_rows<T>, static_cast<unsigned>(s.exact_blocks), 32 * kExactWarps, 0, stream, s, out);
  return cudaGetLastError();
}

template <bool kLargest>
cudaError_t offer(const Search& s, const Tile& t, cudaStream_t stream) {
  ND_LAUNCH(offer_rows<kLargest>, blocks(t.rows, kOfferWarps), 32 * kOfferWarps, 0, stream, s, t);
  const int64_t columns = t.first_column + t.columns - t.own_columns;
  if (s.args.joined && columns > 0)
    ND_LAUNCH(offer_columns<kLargest>, blocks(columns, kWarpSize), 32 * kColumnWarps, 0, stream, s, t);
  return cudaGetLastError();
}

bool inside(const Search& s, const Tile& t) {
  return t.rows >= 1 && t.columns >= 1 && t.ld >= t.columns && t.first_row >= 0 && t.first_column >= 0 &&
         t.first_row + t.rows <= s.searched && t.first_column + t.columns <= s.among;
}

int code(cudaError_t error) { return static_cast<int>(error); }

}  // namespace nd::retrieval

using namespace nd::retrieval;

extern "C" size_t nd_neighbors_workspace(const NdNeighborsArgs* args) {
  int64_t bytes = 0;
  if (valid(*args)) search_of(*args, nullptr, &bytes);
  return static_cast<size_t>(bytes);
}

extern "C" int nd_neighbors_prepare(const NdNeighborsArgs* args, void* workspace, void* stream) {
  if (!valid(*args)) return code(cudaErrorInvalidValue);
  const Search s = search_of(*args, workspace);
  const auto queue = static_cast<cudaStream_t>(stream);
  return code(args->dtype == 0 ? prepare<float>(s, queue) : prepare<double>(s, queue));
}

extern "C" int nd_neighbors_offer(const NdNeighborsArgs* args, const float* product, int64_t ld, int64_t first_row,
                                  int64_t rows, int64_t first_column, int64_t columns, void* workspace, void* stream) {
  if (!valid(*args)) return code(cudaErrorInvalidValue);
  const Search s = search_of(*args, workspace);
  Tile t = {product, ld, first_row, rows, first_column, columns, first_row + rows};
  if (!inside(s, t)) return code(cudaErrorInvalidValue);
  if (t.own_columns < first_column) t.own_columns = first_column;
  const auto queue = static_cast<cudaStream_t>(stream);
  return code(args->wants_largest ? offer<true>(s, t, queue) : offer<false>(s, t, queue));
}

extern "C" int nd_neighbors_finish(const NdNeighborsArgs* args, double* key, int64_t* index, double* largest,
                                   double* query_key, int64_t* query_index, void* workspace, void* stream) {
  if (!valid(*args) || (args->wants_largest != 0) != (largest != nullptr)) return code(cudaErrorInvalidValue);
  const Search s = search_of(*args, workspace);
  const Results out = {key, index, largest, query_key, query_index};
  const auto queue = static_cast<cudaStream_t>(stream);
  return code(args->dtype == 0 ? finish<float>(s, out, queue) : finish<double>(s, out, queue));
}

extern "C" int nd_neighbors_dense(const NdNeighborsArgs* args, const float* product, int64_t ld, int64_t first_row,
                                  int64_t rows, float* dense, void* workspace, void* stream) {
  const int64_t others = args->n + args->m - args->num_queries;
  if (!valid(*args) || args->metric == ND_INNER_PRODUCT || rows < 1 || others < 1 || ld < others || first_row < 0 ||
      first_row + rows > args->num_queries)
    return code(cudaErrorInvalidValue);
  const Search s = search_of(*args, workspace);
  const Tile t = {product, ld, first_row, rows, 0, others, 0};
  const dim3 grid(blocks(others, 256), static_cast<unsigned>(smaller(rows, 65535)));
  ND_LAUNCH(write_dense, grid, 256, 0, static_cast<cudaStream_t>(stream), s, t, dense);
  return code(cudaGetLastError());
}
