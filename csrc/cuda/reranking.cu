// k-reciprocal re-ranking from neighbour lists (paper: Zhong et al. 2017; every choice as in csrc/cpu/reranking.cpp).
//
//   R(i)   = { g among the first `forward` of list i : i among those of list g }
//   R*(i)  = R(i) and, for every c in R(i) of which more than 2/3 of R_half(c) lie in R(i), all of R_half(c)
//   V(i,g) = exp(-t(i, g)) / sum over R*(i)                V'(i) = mean of V(j) over the first `expand` of list i
//   s(i,j) = sum_c min(V'(i, c), V'(j, c))                 Jaccard = 1 - s / (2 - s), as rows sum to 1
//
// Sizes. What a c adds to R*(i) is less than a third of its at most `half` members, so |R*(i)| is at most E = forward
// ceil(half / 3), 84 for k1 = 20, and V' has at most `expand` E entries a row, 504 for k2 = 6: buffers have room for
// that and nothing is read back. In practice rows have some 20 and 100 entries. Only jaccard_distance, whose result is
// as large as it turns out, counts first and lets its caller read the size.
//
// Layout. Lists and weights: a warp a row, what it sorts in shared memory, or in the workspace where that is too
// little. Jaccard: V' of the gallery by columns, as integers v 2^31; a block a query and chunk of the gallery, its
// counters in shared memory, a warp a column. min and sums of integers: any order gives the same bits, |error of s| <
// entries 2^-32. The best rows: as on the CPU, listed rows first, then those that share a column and whose bound
// (1 - lambda) Jaccard + lambda t_last is not beyond the worst kept; whatever that does not settle is scored in full by
// its own block, one read of the gallery's features.
//
// Bytes, per row: 8 (forward^2 + half^2) of lists, from L2, 12 k1 of distances; 8 (20 + 2 * 100) of V and V'; 16 * 100
// of columns; per query some 100 columns of 130 entries, 8 bytes each, and 8 bytes for each gallery row of a dense
// result, or 4 D for each row that the bound of the best rows leaves open. Predicted for an H100 (not measured): Market
// (3368 + 15913) 0.1 + 0.1 + 0.3 ms, of which the dense result is 0.17; MSMT17 (11659 + 82161) 0.4 + 0.4 + 4 ms dense,
// 5 to 20 ms top 100; 44,000 queries among 440,000 rows 40 ms and as much again for what is left open. A query scored
// in full takes a block about 2 ms at Market size.
#include <climits>
#include <cmath>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"
#include "neuraldeps/sparse_rows.hpp"

// Shared memory for what warps sort; less is for tests.
#if !defined(ND_RERANKING_SHARED_BYTES)
#define ND_RERANKING_SHARED_BYTES (40 << 10)
#endif

namespace nd::reranking {

using namespace sparse;

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarpSize;
constexpr int kSharedBytes = ND_RERANKING_SHARED_BYTES;
constexpr int kBestBytes = 16 << 10;                // of shared memory for the best rows
constexpr float kOne = 0x1p31f;                     // a weight of 1
constexpr unsigned kListed = ~0u;                   // in place of a sum that is no longer needed
constexpr int64_t kMostScratch = int64_t{1} << 30;  // bytes of the workspace that all warps sort in

// ------------------------------------------------------------------------------------------------ lists

// t of a squared distance of a row whose largest is `largest`.
__device__ __forceinline__ double original(double key, double largest, bool normalize, int power) {
  const double t = !normalize ? key : largest > 0 ? key / largest : 0;
  return power == 4 ? t * t : t;
}

// What a warp keeps while it works on a row.
struct Encoder {
  NdReciprocalEncodingArgs args;
  int forward, half, expand;  // no longer than the lists
  int most;                   // entries of a row of V: E
  int *half_set, *half_size;  // [rows, half], [rows]: R_half
  int *column, *size;         // [rows, most], [rows]: V
  float* weight;
  char* scratch;  // [warps] slices in the workspace, or null: in shared memory
  int64_t slice;  // bytes
};

__device__ __forceinline__ char* slice_of(const Encoder& e, char* shared) {
  return e.scratch ? e.scratch + (block_index() * kRowWarps + warp_index()) * e.slice : shared + warp_index() * e.slice;
}

// Mutual neighbours of row i within the first `count` entries of the lists, found[0 .. result).
__device__ __forceinline__ int warp_reciprocal(const NdLists& lists, int64_t i, int count, int* found) {
  int size = 0;
  for (int base = 0; base < count; base += kWarpSize) {
    const int own = base + lane_index() < count ? neighbour(lists, i, base + lane_index()) : 0;
    const int here = min(kWarpSize, count - base);
#pragma unroll 4
    for (int a = 0; a < here; a++) {
      const int c = __shfl_sync(kFullWarp, own, a);
      bool mutual = false;
      for (int b = lane_index(); b < count; b += kWarpSize) mutual |= neighbour(lists, c, b) == i;
      if (!__any_sync(kFullWarp, mutual)) continue;
      if (lane_index() == 0) found[size] = c;
      size++;
    }
  }
  __syncwarp();
  return size;
}

// Sorts x [size], padded by `last` to a power of two, for which there is room.
template <class T>
__device__ __forceinline__ void warp_sort(T* x, int size, T last) {
  const int padded = static_cast<int>(power_of_two(size));
  for (int k = size + lane_index(); k < padded; k += kWarpSize) x[k] = last;
  for (int run = 2; run <= padded; run *= 2)
    for (int step = run / 2; step > 0; step /= 2) {
      __syncwarp();
      for (int t = lane_index(); t < padded / 2; t += kWarpSize) {
        const int a = 2 * t - (t & (step - 1)), b = a + step;
        const T u = x[a], v = x[b];
        if ((v < u) != ((a & run) == 0)) continue;
        x[a] = v;
        x[b] = u;
      }
    }
  __syncwarp();
}

__device__ __forceinline__ bool holds(const int* set, int size, int value) {
  for (int a = 0; a < size; a++)
    if (set[a] == value) return true;
  return false;
}

__global__ void __launch_bounds__(kRowThreads) find_half_sets(Encoder e) {
  const NdLists& lists = e.args.lists;
  for (int64_t i = block_index() * kRowWarps + warp_index(); i < lists.rows; i += blocks() * kRowWarps) {
    const int size = warp_reciprocal(lists, i, e.half, e.half_set + i * e.half);
    if (lane_index() == 0) e.half_size[i] = size;
  }
}

// R*(i) in all[0 .. result), ascending; members: room for `forward`.
__device__ __forceinline__ int warp_members(const Encoder& e, int64_t i, int* members, int* all) {
  const int size = warp_reciprocal(e.args.lists, i, e.forward, members);
  int found = 0;
  for (; found + lane_index() < size; found += kWarpSize) all[found + lane_index()] = members[found + lane_index()];
  found = size;
  for (int a = 0; a < size; a++) {
    const int64_t c = members[a];
    const int count = e.half_size[c];
    const int* const other = e.half_set + c * e.half;
    int shared = 0;
    for (int b = lane_index(); b < count; b += kWarpSize) shared += holds(members, size, other[b]);
    shared = __reduce_add_sync(kFullWarp, shared);
    if (3 * shared <= 2 * count) continue;
    for (int base = 0; base < count; base += kWarpSize) {
      const int b = base + lane_index();
      const bool fresh = b < count && !holds(members, size, other[b]);
      int total;
      const int place = found + warp_rank(fresh, total);
      if (fresh) all[place] = other[b];
      found += total;
    }
  }
  __syncwarp();
  warp_sort(all, found, INT_MAX);
  int kept = 0;
  for (int base = 0; base < found; base += kWarpSize) {
    const int k = base + lane_index();
    const int own = k < found ? all[k] : INT_MAX;
    const bool first = k < found && (k == 0 || all[k - 1] != own);
    int total;
    const int place = kept + warp_rank(first, total);
    __syncwarp();
    if (first) all[place] = own;
    kept += total;
    __syncwarp();
  }
  return kept;
}

// Squared distance of i and j, from either list; NaN: in none.
__device__ __forceinline__ double listed_key(const NdLists& lists, int64_t i, int64_t j) {
  for (int64_t a = 0; a < lists.k; a++)
    if (neighbour(lists, i, a) == j) return __ldg(lists.key + i * lists.k + a);
  for (int64_t a = 0; a < lists.k; a++)
    if (neighbour(lists, j, a) == i) return __ldg(lists.key + j * lists.k + a);
  return NAN;
}

// V(i) of all rows.
__global__ void __launch_bounds__(kRowThreads) find_weights(Encoder e) {
  ND_DYNAMIC_SHARED(char, shared);
  const NdLists& lists = e.args.lists;
  const NdFeatures& features = e.args.features;
  int* const members = reinterpret_cast<int*>(slice_of(e, shared));
  int* const all = members + e.forward;
  for (int64_t i = block_index() * kRowWarps + warp_index(); i < lists.rows; i += blocks() * kRowWarps) {
    const int size = warp_members(e, i, members, all);
    float* const weight = e.weight + i * e.most;
    const double largest = e.args.largest[i];
    double sum = 0;
    for (int base = 0; base < size; base += kWarpSize) {
      const int k = base + lane_index();
      const int j = k < size ? all[k] : 0;
      double key = k < size ? listed_key(lists, i, j) : 0;
      for (unsigned open = __ballot_sync(kFullWarp, key != key); open; open &= open - 1) {
        const int lane = __ffs(static_cast<int>(open)) - 1;
        const int other = __shfl_sync(kFullWarp, j, lane);
        const double exact =
            features.dim > 0 ? warp_squared_distance(features, i, other) : lists.key[(i + 1) * lists.k - 1];
        if (lane_index() == lane) key = exact;
      }
      if (k >= size) continue;
      const double own = exp(-original(key, largest, e.args.normalize, e.args.power));
      e.column[i * e.most + k] = j;
      weight[k] = static_cast<float>(own);
      sum += own;
    }
    sum = warp_sum(sum);
    for (int k = lane_index(); k < size; k += kWarpSize)
      weight[k] = static_cast<float>(static_cast<double>(weight[k]) / sum);
    if (lane_index() == 0) e.size[i] = size;
    __syncwarp();
  }
}

// Row of V' that is the a-th part of row i.
__device__ __forceinline__ int64_t part_of(const Encoder& e, int64_t i, int a) {
  return e.expand > 1 ? neighbour(e.args.lists, i, a) : i;
}

// V' of all rows: their sizes to crow + 1 if not kFill, else columns and values. Entries are sorted by column and,
// within one, by neighbour, in which order their values are added.
template <bool kFill>
__global__ void __launch_bounds__(kRowThreads) expand_weights(Encoder e) {
  ND_DYNAMIC_SHARED(char, shared);
  Integer* const entry = reinterpret_cast<Integer*>(slice_of(e, shared));  // column, then place among the parts
  const int64_t rows = e.args.lists.rows;
  for (int64_t i = block_index() * kRowWarps + warp_index(); i < rows; i += blocks() * kRowWarps) {
    int found = 0;
    for (int a = 0; a < e.expand; a++) {
      const int64_t j = part_of(e, i, a);
      const int size = e.size[j];
      for (int k = lane_index(); k < size; k += kWarpSize)
        entry[found + k] = Integer{static_cast<unsigned>(e.column[j * e.most + k])} << 32 | (a * e.most + k);
      found += size;
    }
    __syncwarp();
    warp_sort(entry, found, ~Integer{0});
    int64_t at = kFill ? e.args.crow[i] : 0;
    for (int base = 0; base < found; base += kWarpSize) {
      const int k = base + lane_index();
      const unsigned column = k < found ? static_cast<unsigned>(entry[k] >> 32) : 0;
      const bool first = k < found && (k == 0 || static_cast<unsigned>(entry[k - 1] >> 32) != column);
      int total;
      const int64_t place = at + warp_rank(first, total);
      at += total;
      if (!kFill || !first) continue;
      float sum = 0;
      for (int m = k; m < found && static_cast<unsigned>(entry[m] >> 32) == column; m++) {
        const int part = static_cast<int>(static_cast<unsigned>(entry[m]));
        sum += e.weight[part_of(e, i, part / e.most) * e.most + part % e.most];
      }
      e.args.col[place] = static_cast<int>(column);
      e.args.value[place] = sum / static_cast<float>(e.expand);
    }
    if (!kFill && lane_index() == 0) e.args.crow[i + 1] = at;
    __syncwarp();
  }
}

// ------------------------------------------------------------------------------------------------ Jaccard

// A weight as an integer.
__device__ __forceinline__ unsigned share_of(float weight) { return __float2uint_rn(weight * kOne); }

// Rows [first, first + count) of the encoding.
struct EncodedRows {
  const int64_t* crow;
  const int32_t* col;
  const float* value;
  int64_t first, count;

  template <class F>
  __device__ __forceinline__ void warp_entries(int64_t i, F f) const {
    for (int64_t e = crow[first + i] + lane_index(); e < crow[first + i + 1]; e += kWarpSize)
      f(col[e], [&] { return share_of(value[e]); });
  }
};

struct Scorer {
  NdJaccardArgs args;
  Columns columns;  // of the gallery
  Chunks chunks;    // of the gallery

  // s of row i with the gallery rows of a chunk, times 2^31, for the block.
  __device__ __forceinline__ void sum_shares(int64_t i, int64_t chunk, unsigned* shared) const {
    clear_counters(shared, chunks.size);
    const int64_t begin = args.crow[i];
    const int64_t* const start = columns.start + chunk * columns.columns;
    const auto source = [&](int64_t e, long long& from, long long& to, float& factor) {
      const int64_t c = args.col[begin + e];
      from = start[c];
      to = start[c + 1];
      factor = args.value[begin + e];
    };
    add_entries<8>(shared, columns.entry, args.crow[i + 1] - begin, source,
                   [](float value, unsigned other) { return min(share_of(value), other); });
    __syncthreads();
  }

  __device__ __forceinline__ double jaccard(unsigned shared) const {
    const double s = static_cast<double>(shared) * 0x1p-31;
    return fmax(0.0, 1 - s / (2 - s));
  }
};

__global__ void __launch_bounds__(kThreads) mix_dense(Scorer scorer) {
  ND_DYNAMIC_SHARED(unsigned, shared);
  const NdJaccardArgs& args = scorer.args;
  const int64_t i = block_index() % args.num_queries, chunk = block_index() / args.num_queries;
  scorer.sum_shares(i, chunk, shared);
  float* const own = args.distance + i * scorer.chunks.rows + scorer.chunks.begin(chunk);
  const double largest = args.largest[i];
  const float unit = !args.normalize ? 1.0f : largest > 0 ? static_cast<float>(1 / largest) : 0.0f;
  const float rest = static_cast<float>(1 - args.lambda), factor = static_cast<float>(args.lambda);
  const int64_t size = scorer.chunks.size_of(chunk);
  for (int64_t j = thread_index(); j < size; j += kThreads) {
    const float t = own[j] * unit, s = static_cast<float>(shared[j]) * (1 / kOne);
    const float far = fmaxf(0.0f, 1.0f - s / (2.0f - s));
    own[j] = rest * far + factor * (args.power == 4 ? t * t : t);
  }
}

// Of all threads alike: what a query is scored with.
struct Query {
  const Scorer& scorer;
  int64_t i;
  unsigned* shared;  // [chunk] s of the gallery
  int* pending;      // [kThreads] rows whose distance is wanted
  int* count;        // [1] of them
  double largest, last;

  __device__ __forceinline__ double distance(double key) const {
    return scorer.args.lambda * original(key, largest, scorer.args.normalize, scorer.args.power);
  }

  __device__ __forceinline__ double mixed(unsigned share, double far) const {
    return (1 - scorer.args.lambda) * scorer.jaccard(share) + far;
  }

  // Calls f(j, place in the chunk, key) for what is listed of the gallery rows of a chunk, as many times a thread as
  // any other.
  template <class F>
  __device__ __forceinline__ void for_listed(int64_t chunk, F f) const {
    const NdLists& lists = scorer.args.lists;
    const int64_t first = scorer.args.num_queries + scorer.chunks.begin(chunk), size = scorer.chunks.size_of(chunk);
    for (int64_t base = 0; base < lists.k; base += kThreads) {
      const int64_t a = base + thread_index();
      const int64_t at = a < lists.k ? lists.index[i * lists.k + a] - first : -1;
      f(at >= 0 && at < size, at, a < lists.k ? lists.key[i * lists.k + a] : 0.0);
    }
  }

  // Offers the rows of a chunk, of which is_open(place) holds, with their distances from the features.
  template <class Open>
  __device__ __forceinline__ void offer_unlisted(Best& best, int64_t chunk, Open is_open) const {
    const int64_t first = scorer.chunks.begin(chunk);
    offer_open(best, pending, count, first, scorer.chunks.size_of(chunk), is_open, [&](int64_t at) {
      const NdFeatures& features = scorer.args.features;
      const int64_t j = scorer.args.num_queries + first + at;
      const double far = features.dim > 0 ? distance(warp_squared_distance(features, i, j)) : last;
      return mixed(shared[at], far);
    });
  }
};

struct TopRows {
  Scorer scorer;
  double* score;  // [blocks, room] in the workspace, or null: in shared memory
  int* index;
  int room;
};

// The best rows of one query after the other.
__global__ void __launch_bounds__(kThreads) mix_top_k(TopRows top) {
  ND_DYNAMIC_SHARED(double, dynamic);
  __shared__ int pending[kThreads], counts[2];
  const Scorer& scorer = top.scorer;
  const NdJaccardArgs& args = scorer.args;
  const int64_t chunks = scorer.chunks.count;
  const int in_shared = top.score ? 0 : top.room;
  unsigned* const shared = reinterpret_cast<unsigned*>(reinterpret_cast<int*>(dynamic + in_shared) + in_shared);
  Best best;
  best.score = top.score ? top.score + block_index() * top.room : dynamic;
  best.index = top.score ? top.index + block_index() * top.room : reinterpret_cast<int*>(dynamic + top.room);
  best.count = counts;
  best.most = static_cast<int>(smaller(args.top_k, scorer.chunks.rows));
  const bool known = args.features.dim > 0;
  for (int64_t i = block_index(); i < args.num_queries; i += blocks()) {
    Query query = {scorer, i, shared, pending, counts + 1, args.largest[i], 0};
    query.last = query.distance(args.lists.key[(i + 1) * args.lists.k - 1]);
    const auto offer_listed = [&](int64_t chunk) {
      query.for_listed(chunk, [&](bool there, int64_t at, double key) {
        if (there) best.offer(query.mixed(shared[at], query.distance(key)), scorer.chunks.begin(chunk) + at);
        best.settle();
      });
    };
    const auto forget_listed = [&](int64_t chunk) {
      query.for_listed(chunk, [&](bool there, int64_t at, double) {
        if (there) shared[at] = kListed;
      });
      __syncthreads();
    };
    best.clear();
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      scorer.sum_shares(i, chunk, shared);
      offer_listed(chunk);
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      if (chunks > 1) scorer.sum_shares(i, chunk, shared);
      forget_listed(chunk);
      query.offer_unlisted(best, chunk, [&](int64_t at) {
        return shared[at] > 0 && shared[at] != kListed && query.mixed(shared[at], query.last) <= best.worst;
      });
    }
    const double least = query.mixed(0, query.last);  // of what is not listed and shares nothing
    if (args.lists.k < args.rows && !(best.worst < least || (known && best.worst == least))) {
      if (thread_index() == 0) atomicAdd(reinterpret_cast<Integer*>(args.rescanned), Integer{1});
      best.clear();
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        scorer.sum_shares(i, chunk, shared);
        offer_listed(chunk);
        forget_listed(chunk);
        query.offer_unlisted(best, chunk, [&](int64_t at) { return shared[at] != kListed; });
      }
    }
    for (int64_t a = thread_index(); a < args.top_k; a += kThreads) {
      args.best[i * args.top_k + a] = a < best.kept ? best.score[a] : INFINITY;
      args.found[i * args.top_k + a] = a < best.kept ? best.index[a] : -1;
    }
    __syncthreads();
  }
}

// Row block / chunks and a chunk: how many of its Jaccard distances are below 1 to counts, or what they are.
template <bool kFill>
__global__ void __launch_bounds__(kThreads) jaccard_rows(Scorer scorer, int64_t* counts) {
  ND_DYNAMIC_SHARED(unsigned, shared);
  __shared__ int scratch[kWarps];
  const int64_t i = block_index() / scorer.chunks.count, chunk = block_index() % scorer.chunks.count;
  scorer.sum_shares(i, chunk, shared);
  const int64_t begin = kFill && block_index() > 0 ? counts[block_index() - 1] : 0, first = scorer.chunks.begin(chunk);
  const int64_t end =
      for_counted(shared, scorer.chunks.size_of(chunk), begin, scratch, [&](int64_t place, int64_t j, unsigned value) {
        if (!kFill) return;
        scorer.args.col_out[place] = static_cast<int>(first + j);
        scorer.args.value_out[place] = first + j == i ? 0.0f : static_cast<float>(scorer.jaccard(value));
      });
  if (!kFill && thread_index() == 0) counts[block_index()] = end;
}

// Ends of rows from those of their chunks.
__global__ void __launch_bounds__(256) take_row_ends(const int64_t* ends, int64_t chunks, int64_t rows, int64_t* crow) {
  const int64_t i = block_index() * 256 + thread_index();
  if (i <= rows) crow[i] = i > 0 ? ends[i * chunks - 1] : 0;
}

// ------------------------------------------------------------------------------------------------ launches

inline bool valid(const NdReciprocalEncodingArgs& args) {
  return sparse::valid(args.lists) && args.forward >= 1 && args.half >= 1 && args.expand >= 1 &&
         (args.power == 2 || args.power == 4);
}

// Sizes, with null for all arrays of the workspace.
inline Encoder encoder_of(const NdReciprocalEncodingArgs& args) {
  Encoder e = {};
  e.args = args;
  e.forward = static_cast<int>(smaller(args.forward, args.lists.k));
  e.half = static_cast<int>(smaller(args.half, args.lists.k));
  e.expand = static_cast<int>(smaller(args.expand, args.lists.k));
  e.most = static_cast<int>(smaller(args.lists.rows, int64_t{e.forward} * divide_up(e.half, 3)));
  return e;
}

// Bytes that a warp sorts in.
inline int64_t slice_bytes(const Encoder& e, bool expanding) {
  const int64_t members = int64_t{e.forward} * divide_up(e.half, 3);
  const int64_t bytes =
      expanding ? 8 * power_of_two(int64_t{e.expand} * e.most) : 4 * (e.forward + power_of_two(members));
  return divide_up(bytes, 16) * 16;
}

struct EncodingPlan {
  Encoder encoder;
  int64_t* sums;
  int64_t grid[2], slice[2];  // of weights, of their expansion
  char* scratch[2];
  size_t bytes;

  EncodingPlan(const NdReciprocalEncodingArgs& args, void* base) : encoder(encoder_of(args)) {
    const int64_t rows = args.lists.rows;
    Workspace workspace(base);
    encoder.half_set = workspace.take<int>(rows * encoder.half);
    encoder.half_size = workspace.take<int>(rows);
    encoder.column = workspace.take<int>(rows * encoder.most);
    encoder.weight = workspace.take<float>(rows * encoder.most);
    encoder.size = workspace.take<int>(rows);
    sums = workspace.take<int64_t>(scan_room(rows));
    const int64_t blocks = resident_blocks(divide_up(rows, kRowWarps), 8);
    for (int stage = 0; stage < 2; stage++) {
      slice[stage] = slice_bytes(encoder, stage == 1);
      grid[stage] = smaller(blocks, larger(1, kMostScratch / (kRowWarps * slice[stage])));
      const bool outside = slice[stage] * kRowWarps > kSharedBytes;
      scratch[stage] = outside ? workspace.take<char>(grid[stage] * kRowWarps * slice[stage]) : nullptr;
    }
    bytes = workspace.bytes;
  }

  template <class Kernel>
  cudaError_t launch(Kernel kernel, int stage, cudaStream_t stream) const {
    Encoder e = encoder;
    e.scratch = scratch[stage];
    e.slice = slice[stage];
    const size_t shared = slice[stage] * kRowWarps > kSharedBytes ? 0 : static_cast<size_t>(slice[stage] * kRowWarps);
    ND_LAUNCH(kernel, dim3(static_cast<unsigned>(grid[stage])), dim3(kRowThreads), shared, stream, e);
    return cudaGetLastError();
  }
};

inline int encode(const NdReciprocalEncodingArgs& args, void* workspace, cudaStream_t stream) {
  const EncodingPlan plan(args, workspace);
  const int64_t rows = args.lists.rows;
  cudaError_t error = cudaMemsetAsync(args.crow, 0, sizeof(int64_t), stream);
  if (error || rows == 0) return error;
  error = plan.launch(find_half_sets, 0, stream);
  if (!error) error = plan.launch(find_weights, 0, stream);
  if (!error) error = plan.launch(expand_weights<false>, 1, stream);
  if (!error) error = scan(args.crow + 1, rows, true, plan.sums, stream);
  if (!error) error = plan.launch(expand_weights<true>, 1, stream);
  return error;
}

inline bool valid(const NdJaccardArgs& args) {
  return args.rows >= 0 && args.rows < INT_MAX && args.num_queries >= 0 && args.num_queries <= args.rows &&
         args.room >= 0 && args.top_k >= 0 && (args.power == 2 || args.power == 4);
}

struct JaccardPlan {
  Scorer scorer;
  TopRows top;
  int64_t *start, *sums, *counts;
  uint2* entry;
  int64_t grid;  // of top rows
  size_t bytes;

  JaccardPlan(const NdJaccardArgs& args, void* base)
      : scorer{args, {}, Chunks(args.rows - args.num_queries)}, top{scorer, nullptr, nullptr, 0} {
    Workspace workspace(base);
    const int64_t chunks = scorer.chunks.count, buckets = chunks * args.rows;
    start = workspace.take<int64_t>(buckets + 1);
    entry = workspace.take<uint2>(args.room);
    counts = workspace.take<int64_t>(args.crow_out ? buckets : 0);
    sums = workspace.take<int64_t>(scan_room(buckets));
    scorer.columns = {start, entry, args.rows};
    top.scorer = scorer;
    top.room = static_cast<int>(Best::room_of(smaller(args.top_k, larger(scorer.chunks.rows, 1))));
    grid = resident_blocks(args.num_queries);
    if (args.top_k > 0 && top.room * 12 > kBestBytes) {
      top.score = workspace.take<double>(grid * top.room);
      top.index = workspace.take<int>(grid * top.room);
    }
    bytes = workspace.bytes;
  }

  cudaError_t make_columns(cudaStream_t stream) const {
    const NdJaccardArgs& args = scorer.args;
    const EncodedRows rows = {args.crow, args.col, args.value, args.num_queries, scorer.chunks.rows};
    return transpose(rows, args.rows, scorer.chunks, start, entry, sums, stream);
  }
};

}  // namespace nd::reranking

extern "C" int64_t nd_reciprocal_encoding_room(const NdReciprocalEncodingArgs* args) {
  using namespace nd::reranking;
  if (!valid(*args)) return 0;
  const Encoder e = encoder_of(*args);
  return smaller(args->lists.rows, int64_t{e.expand} * e.most);
}

extern "C" size_t nd_reciprocal_encoding_workspace(const NdReciprocalEncodingArgs* args) {
  using namespace nd::reranking;
  return valid(*args) ? EncodingPlan(*args, nullptr).bytes : 0;
}

extern "C" int nd_reciprocal_encoding(const NdReciprocalEncodingArgs* args, void* workspace, void* stream) {
  using namespace nd::reranking;
  return valid(*args) ? encode(*args, workspace, static_cast<cudaStream_t>(stream)) : cudaErrorInvalidValue;
}

extern "C" size_t nd_jaccard_workspace(const NdJaccardArgs* args) {
  using namespace nd::reranking;
  return valid(*args) ? JaccardPlan(*args, nullptr).bytes : 0;
}

extern "C" int nd_jaccard_rerank(const NdJaccardArgs* args, void* workspace, void* stream) {
  using namespace nd::reranking;
  if (!valid(*args)) return cudaErrorInvalidValue;
  const JaccardPlan plan(*args, workspace);
  const int64_t tasks = args->num_queries * plan.scorer.chunks.count;
  if (tasks == 0) return cudaSuccess;
  const auto queue = static_cast<cudaStream_t>(stream);
  const cudaError_t error = plan.make_columns(queue);
  return error ? error : launch_blocks(mix_dense, tasks, plan.scorer.chunks.shared_bytes(), queue, plan.scorer);
}

extern "C" int nd_jaccard_rerank_top_k(const NdJaccardArgs* args, void* workspace, void* stream) {
  using namespace nd::reranking;
  if (!valid(*args) || args->lists.k < 1 || args->top_k < 1) return cudaErrorInvalidValue;
  const auto queue = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemsetAsync(args->rescanned, 0, sizeof(int64_t), queue);
  const JaccardPlan plan(*args, workspace);
  if (error || args->num_queries == 0) return error;
  error = plan.make_columns(queue);
  const size_t best = plan.top.score ? 0 : static_cast<size_t>(plan.top.room) * 12;
  return error ? error : launch_blocks(mix_top_k, plan.grid, plan.scorer.chunks.shared_bytes() + best, queue, plan.top);
}

extern "C" int nd_jaccard_distance_count(const NdJaccardArgs* args, void* workspace, void* stream) {
  using namespace nd::reranking;
  if (!valid(*args) || args->num_queries != 0) return cudaErrorInvalidValue;
  const auto queue = static_cast<cudaStream_t>(stream);
  const JaccardPlan plan(*args, workspace);
  const int64_t chunks = plan.scorer.chunks.count, tasks = args->rows * chunks;
  if (tasks == 0) return cudaMemsetAsync(args->crow_out, 0, sizeof(int64_t), queue);
  cudaError_t error = plan.make_columns(queue);
  if (!error)
    error =
        launch_blocks(jaccard_rows<false>, tasks, plan.scorer.chunks.shared_bytes(), queue, plan.scorer, plan.counts);
  if (!error) error = scan(plan.counts, tasks, true, plan.sums, queue);
  if (error) return error;
  ND_LAUNCH(take_row_ends, dim3(static_cast<unsigned>(divide_up(args->rows + 1, 256))), dim3(256), 0, queue,
            plan.counts, chunks, args->rows, args->crow_out);
  return cudaGetLastError();
}

extern "C" int nd_jaccard_distance_fill(const NdJaccardArgs* args, void* workspace, void* stream) {
  using namespace nd::reranking;
  if (!valid(*args) || args->num_queries != 0) return cudaErrorInvalidValue;
  const JaccardPlan plan(*args, workspace);
  const int64_t tasks = args->rows * plan.scorer.chunks.count;
  return tasks == 0 ? cudaSuccess
                    : launch_blocks(jaccard_rows<true>, tasks, plan.scorer.chunks.shared_bytes(),
                                    static_cast<cudaStream_t>(stream), plan.scorer, plan.counts);
}
