// What the CUDA kernels of re-ranking share: prefix sums, sparse rows turned into columns, sums of sparse rows,
// distances of feature rows, and the best of many scores.
//
// Sums over sparse rows are sums of integers, one counter a column in shared memory: they do not depend on the order of
// their terms, so that any thread may add any of them and results repeat bit for bit. Where there are more columns than
// fit, a kernel takes them a chunk at a time.
#pragma once
#include <cstddef>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"

// Columns of a chunk, and threads of a block that sums; smaller ones are for tests.
#if !defined(ND_SPARSE_CHUNK)
#define ND_SPARSE_CHUNK 20480
#endif
#if !defined(ND_SPARSE_THREADS)
#define ND_SPARSE_THREADS 512
#endif

namespace nd::sparse {

constexpr int kMostColumns =
    ND_SPARSE_CHUNK;  // 80 KiB: two blocks an SM of every architecture since 8.0 but 8.6 to 8.9
constexpr int kThreads = ND_SPARSE_THREADS, kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 2;
constexpr int kScanThreads = 256, kScanItems = 8, kScanTile = kScanThreads * kScanItems;

using Integer = unsigned long long;  // what atomics take of 64 bits

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
__host__ __device__ inline int64_t power_of_two(int64_t least) {
  int64_t size = 1;
  while (size < least) size *= 2;
  return size;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return known ? value : 1;
}

// Blocks that are launched for `tasks` of which each block takes one after the other.
inline int64_t resident_blocks(int64_t tasks, int per_processor = kBlocksPerSm) {
  return smaller(tasks, int64_t{device_attribute(cudaDevAttrMultiProcessorCount)} * per_processor);
}

// Hands out parts of the workspace, each aligned to 256 bytes, or only counts where there is none.
struct Workspace {
  char* next;
  size_t bytes = 0;
  explicit Workspace(void* base) : next(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* const part = reinterpret_cast<T*>(next);
    const size_t size = (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    bytes += size;
    if (next) next += size;
    return part;
  }
};

__device__ __forceinline__ int neighbour(const NdLists& lists, int64_t i, int64_t a) {
  const int64_t j = __ldg(lists.index + i * lists.k + a);
  return static_cast<int>(j < 0 ? 0 : j < lists.rows ? j : lists.rows - 1);
}

inline bool valid(const NdLists& lists) { return lists.rows >= 0 && lists.rows < INT32_MAX && lists.k >= 1; }

// Lanes before the calling one for which `flag` holds, and all of them; all lanes call.
__device__ __forceinline__ int warp_rank(bool flag, int& total) {
  const unsigned mask = __ballot_sync(kFullWarp, flag);
  total = __popc(mask);
  return __popc(mask & ((1u << lane_index()) - 1));
}

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
__device__ __forceinline__ int64_t blocks() { return static_cast<int64_t>(gridDim.x); }

// ------------------------------------------------------------------------------------------------ prefix sums

// Sum of the threads before, and of all in total; scratch: [kScanThreads / 32].
__device__ __forceinline__ int64_t scan_block(int64_t own, int64_t* scratch, int64_t& total) {
  int64_t sum = own;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int64_t before = __shfl_up_sync(kFullWarp, static_cast<long long>(sum), distance);
    if (lane_index() >= distance) sum += before;
  }
  __syncthreads();
  if (lane_index() == kWarpSize - 1) scratch[warp_index()] = sum;
  __syncthreads();
  int64_t before = sum - own;
  total = 0;
  for (int w = 0; w < kScanThreads / kWarpSize; w++) {
    if (w < warp_index()) before += scratch[w];
    total += scratch[w];
  }
  return before;
}

// Sums of tiles of x [length].
template <class T>
__global__ void __launch_bounds__(kScanThreads) sum_tiles(const T* x, int64_t length, int64_t* sums) {
  __shared__ int64_t scratch[kScanThreads / kWarpSize];
  const int64_t begin = block_index() * kScanTile;
  int64_t own = 0;
  for (int k = thread_index(); k < kScanTile; k += kScanThreads)
    if (begin + k < length) own += x[begin + k];
  int64_t total;
  scan_block(own, scratch, total);
  if (thread_index() == 0) sums[block_index()] = total;
}

// x [length] becomes its prefix sums: of what lies before an element, or up to it. offsets: what lies before each tile;
// null: there is one block, which goes from tile to tile.
template <class T>
__global__ void __launch_bounds__(kScanThreads)
    scan_tiles(T* x, int64_t length, const int64_t* offsets, bool inclusive) {
  __shared__ int64_t scratch[kScanThreads / kWarpSize];
  int64_t before = offsets ? offsets[block_index()] : 0;
  const int64_t tiles = offsets ? block_index() + 1 : divide_up(length, kScanTile);
  for (int64_t tile = block_index(); tile < tiles; tile++) {
    const int64_t begin = tile * kScanTile + thread_index() * kScanItems;
    int64_t item[kScanItems], own = 0, total;
#pragma unroll
    for (int k = 0; k < kScanItems; k++) {
      item[k] = begin + k < length ? static_cast<int64_t>(x[begin + k]) : 0;
      own += item[k];
    }
    int64_t sum = before + scan_block(own, scratch, total);
#pragma unroll
    for (int k = 0; k < kScanItems; k++) {
      if (inclusive) sum += item[k];
      if (begin + k < length) x[begin + k] = static_cast<T>(sum);
      if (!inclusive) sum += item[k];
    }
    before += total;
  }
}

inline int64_t scan_room(int64_t length) { return divide_up(length, kScanTile); }

// sums: [scan_room(length)].
template <class T>
cudaError_t scan(T* x, int64_t length, bool inclusive, int64_t* sums, cudaStream_t stream) {
  const int64_t tiles = scan_room(length);
  const dim3 threads(kScanThreads);
  if (tiles == 0) return cudaSuccess;
  int64_t* const offsets = tiles > 1 ? sums : nullptr;
  if (offsets) {
    ND_LAUNCH(sum_tiles<T>, dim3(static_cast<unsigned>(tiles)), threads, 0, stream, x, length, sums);
    ND_LAUNCH(scan_tiles<int64_t>, dim3(1), threads, 0, stream, sums, tiles, nullptr, false);
  }
  ND_LAUNCH(scan_tiles<T>, dim3(static_cast<unsigned>(tiles)), threads, 0, stream, x, length, offsets, inclusive);
  return cudaGetLastError();
}

// ------------------------------------------------------------------------------------------------ columns

// Entries of sparse rows by the chunk of their row, then by column, in any order within.
struct Columns {
  const int64_t* start;  // [chunks * columns + 1]
  const uint2* entry;    // row within its chunk, value as an integer
  int64_t columns;
};

// How rows are cut into chunks of equal size.
struct Chunks {
  int64_t rows, size, count;
  explicit Chunks(int64_t rows) : rows(rows), count(divide_up(rows, kMostColumns)) {
    size = count ? divide_up(rows, count) : 1;
    count = divide_up(rows, size);
  }
  __host__ __device__ int64_t begin(int64_t chunk) const { return chunk * size; }
  __host__ __device__ int64_t size_of(int64_t chunk) const { return smaller(size, rows - chunk * size); }
  size_t shared_bytes() const { return sizeof(unsigned) * static_cast<size_t>(size); }
};

// ------------------------------------------------------------------------------------------------ counters of a chunk

__device__ __forceinline__ void clear_counters(unsigned* counter, int64_t size) {
  __syncthreads();
  for (int64_t j = thread_index(); j < size; j += kThreads) counter[j] = 0;
  __syncthreads();
}

// Adds ranges of entries to the counters. source(t, from, to, factor) sets task t < tasks, f(factor, entry.y) is what
// is added at entry.x. A warp looks up kGroup tasks together.
template <int kGroup, class Source, class F>
__device__ __forceinline__ void add_entries(unsigned* counter, const uint2* entry, int64_t tasks, Source source, F f) {
  for (int64_t base = int64_t{warp_index()} * kGroup; base < tasks; base += kWarps * kGroup) {
    long long from = 0, to = 0;
    float factor = 0;
    if (lane_index() < kGroup && base + lane_index() < tasks) source(base + lane_index(), from, to, factor);
#pragma unroll 1
    for (int g = 0; g < kGroup; g++) {
      const float own = __shfl_sync(kFullWarp, factor, g);
      const long long last = __shfl_sync(kFullWarp, to, g);
      for (long long e = __shfl_sync(kFullWarp, from, g) + lane_index(); e < last; e += kWarpSize) {
        const uint2 other = __ldg(entry + e);
        atomicAdd(counter + other.x, f(own, other.y));
      }
    }
  }
}

// Calls put(place, j, value) for the counters that are not 0, ascending, with places from `at` on, and returns the
// place behind; scratch: [kWarps] in shared memory.
template <class Put>
__device__ __forceinline__ int64_t for_counted(const unsigned* counter, int64_t size, int64_t at, int* scratch,
                                               Put put) {
  for (int64_t base = 0; base < size; base += kThreads) {
    const int64_t j = base + thread_index();
    const unsigned value = j < size ? counter[j] : 0;
    int total;
    int64_t place = at + warp_rank(value > 0, total);
    __syncthreads();
    if (lane_index() == 0) scratch[warp_index()] = total;
    __syncthreads();
    for (int w = 0; w < kWarps; w++) {
      if (w < warp_index()) place += scratch[w];
      at += scratch[w];
    }
    if (value > 0) put(place, j, value);
  }
  return at;
}

// Rows is a type with `count`, the number of rows; warp_entries(i, f), by which a warp calls f(column, value) for the
// entries of row i, value a function that returns an integer; start, column.
//
// start [buckets + 1] is zero before, and afterwards, after the sums of start + 1, holds where a bucket begins.
template <class Rows>
__global__ void __launch_bounds__(256) count_columns(Rows rows, int64_t columns, int64_t chunk, int64_t* start) {
  const int64_t i = (block_index() * 256 + thread_index()) / kWarpSize;
  if (i >= rows.count) return;
  int64_t* const counts = start + 1 + i / chunk * columns;
  rows.warp_entries(i,
                    [&](int64_t column, auto) { atomicAdd(reinterpret_cast<Integer*>(counts + column), Integer{1}); });
}

// start + 1 holds where buckets begin; it moves to where they end.
template <class Rows>
__global__ void __launch_bounds__(256)
    place_columns(Rows rows, int64_t columns, int64_t chunk, int64_t* start, uint2* entry) {
  const int64_t i = (block_index() * 256 + thread_index()) / kWarpSize;
  if (i >= rows.count) return;
  int64_t* const next = start + 1 + i / chunk * columns;
  const unsigned row = static_cast<unsigned>(i % chunk);
  rows.warp_entries(i, [&](int64_t column, auto value) {
    const Integer at = atomicAdd(reinterpret_cast<Integer*>(next + column), Integer{1});
    entry[at] = make_uint2(row, value());
  });
}

// Columns of `rows` in start [chunks.count * columns + 1] and entry.
template <class Rows>
cudaError_t transpose(const Rows& rows, int64_t columns, const Chunks& chunks, int64_t* start, uint2* entry,
                      int64_t* sums, cudaStream_t stream) {
  const int64_t buckets = chunks.count * columns;
  const dim3 grid(static_cast<unsigned>(divide_up(rows.count, 256 / kWarpSize))), threads(256);
  cudaError_t error = cudaMemsetAsync(start, 0, sizeof(int64_t) * static_cast<size_t>(buckets + 1), stream);
  if (error || rows.count == 0) return error;
  ND_LAUNCH(count_columns<Rows>, grid, threads, 0, stream, rows, columns, chunks.size, start);
  error = scan(start + 1, buckets, false, sums, stream);
  if (error) return error;
  ND_LAUNCH(place_columns<Rows>, grid, threads, 0, stream, rows, columns, chunks.size, start, entry);
  return cudaGetLastError();
}

// ------------------------------------------------------------------------------------------------ feature rows

__device__ __forceinline__ const void* row_of(const NdFeatures& f, int64_t i) {
  const bool query = i < f.num_queries;
  const int64_t bytes = f.dtype == 1 ? 8 : 4;
  const int64_t at = query ? i * f.query_stride : (i - f.num_queries) * f.gallery_stride;
  return static_cast<const char*>(query ? f.query : f.gallery) + at * bytes;
}

// Sum of term(x_k, y_k) over rows of float32 or float64, in float64; all lanes get it.
template <class Term>
__device__ __forceinline__ double warp_sum_over(const void* x, const void* y, int dtype, int64_t dim, Term term) {
  double sum = 0;
  if (dtype == 1) {
    const double *a = static_cast<const double*>(x), *b = static_cast<const double*>(y);
    for (int64_t k = lane_index(); k < dim; k += kWarpSize) sum += term(a[k], b[k]);
  } else {
    const float *a = static_cast<const float*>(x), *b = static_cast<const float*>(y);
#pragma unroll 4
    for (int64_t k = lane_index(); k < dim; k += kWarpSize)
      sum += term(static_cast<double>(a[k]), static_cast<double>(b[k]));
  }
  return warp_sum(sum);
}

__device__ __forceinline__ double warp_squared_distance(const NdFeatures& f, int64_t i, int64_t j) {
  return warp_sum_over(row_of(f, i), row_of(f, j), f.dtype, f.dim,
                       [](double x, double y) { return (x - y) * (x - y); });
}

__device__ __forceinline__ double warp_product(const NdFeatures& f, int64_t i, int64_t j) {
  return warp_sum_over(row_of(f, i), row_of(f, j), f.dtype, f.dim, [](double x, double y) { return x * y; });
}

// ------------------------------------------------------------------------------------------------ the best of many

// Keeps the `most` smallest (score, index) of what a block offers. All threads call settle together.
struct Best {
  double* score;  // [room_of(most)]
  int* index;
  int* count;  // [1] in shared memory
  int most;
  int kept;      // of all threads alike
  double worst;  // that is kept, infinity while there is room

  // For as many offers as threads between two calls of settle.
  __host__ __device__ static int64_t room_of(int64_t most) { return power_of_two(most + kThreads); }

  __device__ __forceinline__ void clear() {
    __syncthreads();
    if (thread_index() == 0) *count = 0;
    kept = 0;
    worst = INFINITY;
    __syncthreads();
  }

  __device__ __forceinline__ void offer(double value, int64_t at) {
    if (kept == most && !(value <= worst)) return;
    const int place = atomicAdd(count, 1);
    score[place] = value;
    index[place] = static_cast<int>(at);
  }

  __device__ __forceinline__ void settle() {
    __syncthreads();
    const int found = *count;
    __syncthreads();
    if (found == kept) return;
    sort(found);
    kept = found < most ? found : most;
    worst = kept == most ? score[most - 1] : INFINITY;
    if (thread_index() == 0) *count = kept;
    __syncthreads();
  }

 private:
  __device__ __forceinline__ bool before(int a, int b) const {
    return score[a] < score[b] || (score[a] == score[b] && index[a] < index[b]);
  }

  // By bitonic merges, padded to a power of two.
  __device__ __forceinline__ void sort(int found) {
    const int size = static_cast<int>(power_of_two(found));
    for (int k = found + thread_index(); k < size; k += kThreads) {
      score[k] = INFINITY;
      index[k] = INT32_MAX;
    }
    for (int run = 2; run <= size; run *= 2)
      for (int step = run / 2; step > 0; step /= 2) {
        __syncthreads();
        for (int t = thread_index(); t < size / 2; t += kThreads) {
          const int a = 2 * t - (t & (step - 1)), b = a + step;
          if (before(b, a) != ((a & run) == 0)) continue;
          const double value = score[a];
          const int at = index[a];
          score[a] = score[b];
          index[a] = index[b];
          score[b] = value;
          index[b] = at;
        }
      }
    __syncthreads();
  }
};

// Offers first + place, place < size, of which is_open(place) holds, with score(place), which a warp computes together.
// pending: [kThreads], count: [1], both in shared memory.
template <class Open, class Score>
__device__ __forceinline__ void offer_open(Best& best, int* pending, int* count, int64_t first, int64_t size,
                                           Open is_open, Score score) {
  for (int64_t base = 0; base < size; base += kThreads) {
    const int64_t at = base + thread_index();
    const bool open = at < size && is_open(at);
    if (!__syncthreads_or(open)) continue;
    if (thread_index() == 0) *count = 0;
    __syncthreads();
    if (open) pending[atomicAdd(count, 1)] = static_cast<int>(at);
    __syncthreads();
    for (int p = warp_index(); p < *count; p += kWarps) {
      const double value = score(pending[p]);
      if (lane_index() == 0) best.offer(value, first + pending[p]);
    }
    best.settle();
  }
}

// Blocks of kThreads with so much dynamic shared memory.
template <class Kernel, class... Arguments>
cudaError_t launch_blocks(Kernel kernel, int64_t grid, size_t shared, cudaStream_t stream, Arguments... arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error) return error;
  ND_LAUNCH(kernel, dim3(static_cast<unsigned>(grid)), dim3(kThreads), shared, stream, arguments...);
  return cudaGetLastError();
}

}  // namespace nd::sparse
