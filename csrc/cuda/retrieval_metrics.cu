// Ranks of the positives of every query among all gallery items that count, and precision from them: the gallery is
// never sorted (csrc/cpu/retrieval_metrics.cpp has the definitions).
//
// Method. A block takes a query. Its positives are sorted by (key, index) in shared memory. Every item of the row finds
// by a binary search the first positive that it does not come behind and is counted there; sums over the counters are
// the ranks. Junk is not counted. Given distances are their own keys, in float64; with features, float32 distances of
// known error are, and what lies within the error of a positive gets its key from float64 sums over the features.
// Counters are integers: any order gives the same bits. More positives than a tile holds are taken a tile at a time,
// one read of the row each.
//
// Floor: one read of nq x ng distances. Beside it 5 bytes an item from L2: the place of the item in the order by
// identity and, with exclusions, a flag. Predicted for an H100 (not measured): Market (3368 x 15913, float32) 0.1 ms,
// MSMT17 (11659 x 82161) 1.6 ms, at 2.5 TB/s.
//
// Limits: ng < 2^31. Numbers in `order`, `begin`, `end`, `group`, `identity` that are out of range are skipped.
#include <climits>
#include <cmath>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"
#include "neuraldeps/sparse_rows.hpp"

// Positives sorted at a time, and bytes of shared memory for the flags of identities; smaller ones are for tests.
#if !defined(ND_RETRIEVAL_METRICS_TILE)
#define ND_RETRIEVAL_METRICS_TILE 1024
#endif
#if !defined(ND_RETRIEVAL_METRICS_FLAG_BYTES)
#define ND_RETRIEVAL_METRICS_FLAG_BYTES (16 << 10)
#endif

namespace nd::retrieval_metrics {

using namespace sparse;

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarpSize, kRowsPerSm = 4;
constexpr int kAhead = 4;  // distances that a thread loads together
constexpr int kTile = ND_RETRIEVAL_METRICS_TILE;
enum Precision : int32_t { kStandard = 0, kTrapezoid = 1, kTied = 2 };

// What is counted up to each positive.
enum Counted { kItems, kPositives, kTiedItems, kTiedPositives, kCounters };

struct Problem {
  NdRetrievalMetricsArgs args;
  const int* place;  // [ng] of an item in `order`
  unsigned* flags;   // [blocks, words] in the workspace, or null: in shared memory
  int64_t words;     // 32 identities each
};

// Positives of a tile, in shared memory.
struct Tile {
  double key[kTile];
  int index[kTile];
  int count[kCounters][kTile];
  int size;
};

__device__ __forceinline__ bool before(double key, int64_t index, double other_key, int64_t other_index) {
  return key < other_key || (key == other_key && index < other_index);
}

// A block at work on query q. kBounded: distances of type T are within `slack` of the keys, else they are the keys.
template <class T, bool kBounded>
struct Row {
  const Problem& problem;
  const NdRetrievalMetricsArgs& args;
  Tile& tile;
  int64_t q, begin, end;  // items of the query's identity: order[begin .. end)
  const T* distance;
  double slack;

  __device__ __forceinline__ Row(const Problem& problem, Tile& tile, int64_t q)
      : problem(problem),
        args(problem.args),
        tile(tile),
        q(q),
        begin(larger(args.begin[q], 0)),
        end(smaller(args.end[q], args.ng)),
        distance(static_cast<const T*>(args.distance) + q * args.stride),
        slack(kBounded ? args.slack[q] : 0) {}

  __device__ __forceinline__ bool excluded(int64_t j) const {
    if (!args.excluded) return false;
    const int64_t group = args.group[q];
    return group >= 0 && group < args.groups && args.excluded[group * args.ng + j];
  }
  __device__ __forceinline__ bool same_camera(int64_t j) const {
    return args.query_camera && args.query_camera[q] == args.gallery_camera[j];
  }
  __device__ __forceinline__ double value(int64_t j) const { return static_cast<double>(distance[j]) + 0.0; }

  // The key of an item, by a warp.
  __device__ __forceinline__ double warp_key(int64_t j) const {
    if (!kBounded) return value(j);
    const NdFeatures& f = args.features;
    const void *x = row_of(f, q), *y = row_of(f, args.nq + j);
    const double u = args.query_unit[q], v = args.gallery_unit[j];
    if (args.inner_product)
      return -warp_sum_over(x, y, f.dtype, f.dim, [=](double a, double b) { return a * u * (b * v); });
    return warp_sum_over(x, y, f.dtype, f.dim, [=](double a, double b) { return (a * u - b * v) * (a * u - b * v); });
  }

  // The positives of order[from .. from + kTile), sorted. The block calls.
  __device__ __forceinline__ void collect(int64_t from) {
    if (thread_index() == 0) tile.size = 0;
    __syncthreads();
    const int64_t to = smaller(end, from + kTile);
    for (int64_t e = from + thread_index(); e < to; e += kRowThreads) {
      const int64_t j = args.order[e];
      if (j >= 0 && j < args.ng && !same_camera(j) && !excluded(j))
        tile.index[atomicAdd(&tile.size, 1)] = static_cast<int>(j);
    }
    __syncthreads();
    const int size = tile.size;
    for (int a = warp_index(); a < size; a += kRowWarps) {
      const double key = warp_key(tile.index[a]);
      if (lane_index() == 0) tile.key[a] = key;
    }
    const int padded = static_cast<int>(power_of_two(size));
    for (int a = size + thread_index(); a < padded; a += kRowThreads) {
      tile.key[a] = INFINITY;
      tile.index[a] = INT_MAX;
    }
    for (int a = thread_index(); a < size; a += kRowThreads)
      for (int kind = 0; kind < kCounters; kind++) tile.count[kind][a] = 0;
    for (int run = 2; run <= padded; run *= 2)
      for (int step = run / 2; step > 0; step /= 2) {
        __syncthreads();
        for (int t = thread_index(); t < padded / 2; t += kRowThreads) order_pair(2 * t - (t & (step - 1)), step, run);
      }
    __syncthreads();
  }

  __device__ __forceinline__ void order_pair(int a, int step, int run) {
    const int b = a + step;
    const double u = tile.key[a], v = tile.key[b];
    const int i = tile.index[a], j = tile.index[b];
    if (before(v, j, u, i) != ((a & run) == 0)) return;
    tile.key[a] = v;
    tile.key[b] = u;
    tile.index[a] = j;
    tile.index[b] = i;
  }

  // The first positive that does not come before (key, index).
  __device__ __forceinline__ int find(double key, int64_t index) const {
    int from = 0;
    for (int size = tile.size; size > 0;) {
      const int half = size / 2;
      const bool right = before(tile.key[from + half], tile.index[from + half], key, index);
      from += right ? half + 1 : 0;
      size = right ? size - half - 1 : half;
    }
    return from;
  }

  // Lanes where `open` holds get the key of their item; the warp calls.
  __device__ __forceinline__ double exact_key(bool open, int64_t j, double key) const {
    for (unsigned rest = __ballot_sync(kFullWarp, open); rest; rest &= rest - 1) {
      const int lane = __ffs(static_cast<int>(rest)) - 1;
      const double found = warp_key(__shfl_sync(kFullWarp, static_cast<long long>(j), lane));
      if (lane_index() == lane) key = found;
    }
    return key;
  }

  // Counts item j at distance d for the positives of the tile; the warp calls, d is NaN or infinite beyond the end.
  __device__ __forceinline__ void count_item(int64_t j, double d) const {
    const int size = tile.size;
    const bool near = j < args.ng && size > 0 && d - slack <= tile.key[size - 1];
    if (!__any_sync(kFullWarp, near)) return;
    double key = d - slack;
    int place = near ? find(d - slack, kBounded ? INT_MIN : j) : size;
    if (kBounded) {
      // Between two positives, farther from the next than the error: there whatever the key is.
      const bool open = place < size && tile.key[place] <= d + slack;
      key = exact_key(open, j, key);
      if (open) place = find(key, j);
    }
    const int tied = near && args.precision == kTied ? find(key, INT_MIN) : place;  // not behind place
    if (tied >= size) return;
    const int64_t at = problem.place[j];
    const bool positive = at >= begin && at < end;
    if ((positive && same_camera(j)) || excluded(j)) return;
    if (place < size) add(kItems, kPositives, place, positive);
    if (args.precision == kTied) add(kTiedItems, kTiedPositives, tied, positive);
  }

  __device__ __forceinline__ void add(Counted items, Counted positives, int place, bool positive) const {
    atomicAdd(&tile.count[items][place], 1);
    if (positive) atomicAdd(&tile.count[positives][place], 1);
  }

  // Counts all items; whether a distance is NaN.
  __device__ __forceinline__ bool count_items() const {
    bool bad = false;
    for (int64_t base = 0; base < args.ng; base += kAhead * kRowThreads) {
      double d[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; u++) {
        const int64_t j = base + u * kRowThreads + thread_index();
        d[u] = j < args.ng ? value(j) : INFINITY;
      }
#pragma unroll 1
      for (int u = 0; u < kAhead; u++) {
        double own = d[0];
#pragma unroll
        for (int v = 1; v < kAhead; v++) own = u == v ? d[v] : own;
        bad |= own != own;
        count_item(base + u * kRowThreads + thread_index(), own);
      }
    }
    return bad;
  }

  // Counters become what is counted up to a positive: a warp a kind.
  __device__ __forceinline__ void sum_counters() {
    __syncthreads();
    for (int kind = warp_index(); kind < kCounters; kind += kRowWarps) {
      int before = 0;
      for (int base = 0; base < tile.size; base += kWarpSize) {
        const int a = base + lane_index();
        int sum = a < tile.size ? tile.count[kind][a] : 0;
#pragma unroll
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
          const int other = __shfl_up_sync(kFullWarp, sum, distance);
          if (lane_index() >= distance) sum += other;
        }
        sum += before;
        if (a < tile.size) tile.count[kind][a] = sum;
        before = __shfl_sync(kFullWarp, sum, kWarpSize - 1);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ double precision_at(int a) const {
    const double m = tile.count[kPositives][a], r = tile.count[kItems][a];
    if (args.precision == kStandard) return m / r;
    if (args.precision == kTied)
      return static_cast<double>(tile.count[kTiedPositives][a]) / static_cast<double>(tile.count[kTiedItems][a]);
    return ((tile.count[kItems][a] == 1 ? 1.0 : (m - 1) / (r - 1)) + m / r) / 2;
  }

  // Sets the flags of the identities of all items up to (first_key, first).
  __device__ __forceinline__ void flag_identities(double first_key, int64_t first, unsigned* flags) const {
    for (int64_t base = 0; base < args.ng; base += kRowThreads) {
      const int64_t j = base + thread_index();
      const double d = j < args.ng ? value(j) : INFINITY;
      const bool counts = j < args.ng && d - slack <= first_key;
      const double key = kBounded ? exact_key(counts && d + slack >= first_key, j, d - slack) : d;
      if (!counts || before(first_key, first, key, j) || excluded(j)) continue;
      const int64_t at = problem.place[j];
      if (at >= begin && at < end && same_camera(j)) continue;
      const int64_t identity = args.identity[j];
      if (identity >= 0 && identity < args.ng) atomicOr(flags + identity / 32, 1u << (identity % 32));
    }
  }
};

// Places of items in the order, -1 for those that are not there.
__global__ void __launch_bounds__(256) invert_order(const int64_t* order, int64_t ng, int* place) {
  const int64_t e = block_index() * 256 + thread_index();
  if (e < ng && order[e] >= 0 && order[e] < ng) place[order[e]] = static_cast<int>(e);
}

// ap, inp and first_rank of one query after the other.
template <class T, bool kBounded>
__global__ void __launch_bounds__(kRowThreads, kRowsPerSm) measure(Problem problem) {
  ND_DYNAMIC_SHARED(unsigned, dynamic);
  __shared__ Tile tile;
  __shared__ double sums[kRowWarps];
  const NdRetrievalMetricsArgs& args = problem.args;
  for (int64_t q = block_index(); q < args.nq; q += blocks()) {
    Row<T, kBounded> row(problem, tile, q);
    double sum = 0, first_key = INFINITY;
    int64_t P = 0, first = INT_MAX, first_rank = args.ng, last_rank = 0;
    bool bad = false;
    for (int64_t from = row.begin;; from += kTile) {
      row.collect(from);
      bad |= row.count_items();
      row.sum_counters();
      double own = 0;
      for (int a = thread_index(); a < tile.size; a += kRowThreads) own += row.precision_at(a);
      sum += block_sum<kRowWarps>(own, sums);
      P += tile.size;
      if (tile.size > 0) {
        first_rank = smaller(first_rank, tile.count[kItems][0]);
        last_rank = larger(last_rank, tile.count[kItems][tile.size - 1]);
        if (before(tile.key[0], tile.index[0], first_key, first)) {
          first_key = tile.key[0];
          first = tile.index[0];
        }
      }
      __syncthreads();
      if (from + kTile >= row.end) break;
    }
    bad = __syncthreads_or(bad);
    if (args.identity && !bad && P > 0) {
      unsigned* const flags = problem.flags ? problem.flags + block_index() * problem.words : dynamic;
      for (int64_t w = thread_index(); w < problem.words; w += kRowThreads) flags[w] = 0;
      __syncthreads();
      row.flag_identities(first_key, first, flags);
      __syncthreads();
      double own = 0;
      for (int64_t w = thread_index(); w < problem.words; w += kRowThreads) own += __popc(flags[w]);
      first_rank = static_cast<int64_t>(block_sum<kRowWarps>(own, sums));
      __syncthreads();
    }
    if (thread_index() > 0) continue;
    const bool valid = !bad && P > 0;
    args.ap[q] = valid ? sum / static_cast<double>(P) : NAN;
    args.inp[q] = valid ? static_cast<double>(P) / static_cast<double>(last_rank) : NAN;
    args.first_rank[q] = bad ? -1 : valid ? first_rank : 0;
  }
}

inline bool valid(const NdRetrievalMetricsArgs& args) {
  return args.nq >= 0 && args.ng >= 0 && args.ng < INT_MAX && (args.dtype == 0 || args.dtype == 1) &&
         (!args.slack || args.dtype == 0) && args.precision >= kStandard && args.precision <= kTied;
}

struct Plan {
  Problem problem;
  int* place;
  int64_t grid;
  size_t shared, bytes;

  Plan(const NdRetrievalMetricsArgs& args, void* base) : problem{args, nullptr, nullptr, divide_up(args.ng, 32)} {
    Workspace workspace(base);
    grid = resident_blocks(args.nq, kRowsPerSm);
    place = workspace.take<int>(args.ng);
    const bool outside = problem.words * 4 > ND_RETRIEVAL_METRICS_FLAG_BYTES;
    if (args.identity && outside) problem.flags = workspace.take<unsigned>(grid * problem.words);
    shared = args.identity && !outside ? static_cast<size_t>(problem.words) * 4 : 0;
    problem.place = place;
    bytes = workspace.bytes;
  }
};

inline int run(const NdRetrievalMetricsArgs& args, void* workspace, cudaStream_t stream) {
  const Plan plan(args, workspace);
  if (args.nq == 0) return cudaSuccess;
  if (args.ng > 0) {
    const cudaError_t error = cudaMemsetAsync(plan.place, 0xff, sizeof(int) * static_cast<size_t>(args.ng), stream);
    if (error) return error;
    ND_LAUNCH(invert_order, dim3(static_cast<unsigned>(divide_up(args.ng, 256))), dim3(256), 0, stream, args.order,
              args.ng, plan.place);
    if (const cudaError_t launched = cudaGetLastError()) return launched;
  }
  const auto kernel = args.slack        ? measure<float, true>
                      : args.dtype == 1 ? measure<double, false>
                                        : measure<float, false>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared));
  if (error) return error;
  ND_LAUNCH(kernel, dim3(static_cast<unsigned>(plan.grid)), dim3(kRowThreads), plan.shared, stream, plan.problem);
  return cudaGetLastError();
}

}  // namespace nd::retrieval_metrics

extern "C" size_t nd_retrieval_metrics_workspace(const NdRetrievalMetricsArgs* args) {
  using namespace nd::retrieval_metrics;
  return valid(*args) ? Plan(*args, nullptr).bytes : 0;
}

extern "C" int nd_retrieval_metrics(const NdRetrievalMetricsArgs* args, void* workspace, void* stream) {
  using namespace nd::retrieval_metrics;
  return valid(*args) ? run(*args, workspace, static_cast<cudaStream_t>(stream)) : cudaErrorInvalidValue;
}
