// GNN re-ranking from neighbour lists (paper: Zhang et al. 2020; every choice as in csrc/cpu/gnn_rerank.cpp).
//
//   w(i,a) = cos(i, r(i,a))^2, r(i,a) the a-th nearest of i     A_0(i, r(i,a)) = 1 for a < k1
//   B_l = A_l + A_l^T,     A_{l+1}(i) = sum_{a<k2} w(i,a) B_l(r(i,a)) / norm,     two layers
//   score(i,g) = (1 - lambda) <A_2(i), A_2(g)> + lambda cos(i, g)
//
// Only A_1 and its transpose are stored, at most a few hundred entries a row; how many there are together the caller
// reads once. Rows of A_2 are formed one at a time: of all rows for their norms, of queries to be multiplied,
//
//   z_i = B_1 A_2(i),      <A_2(i), A_2(g)> = sum_{a<k2} w(g,a) z_i(r(g,a)) / norm(g).
//
// Layout. A block sums a row in counters in shared memory, a chunk of its columns at a time, a warp an edge list.
// Everything is summed as integers, so that any order gives the same bits: entries of A_1 are at most 1, those of A_2
// before the norm at most 2 k2, and z_i(c) at most n(c) = 1 + |column c of A_1|, by which it is divided. As w(g,a)
// n(r(g,a)) / norm(g) is at most 2, errors of scores stay below 2 k2 times that of the counters, entries of A_2(i)
// times 2^-32.
//
// Work: the entries of A_2(i) times twice those of a row of A_1 for every query, an 8-byte read from L2 and an addition
// in shared memory each. Predicted for an H100 (not measured), Market (3368 + 15913, k1 = 26, k2 = 7): A_1 0.3 ms,
// norms 0.5 ms, queries 5 to 8 ms (3 10^9 additions); MSMT17 size 60 ms.
#include <climits>
#include <cmath>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"
#include "neuraldeps/sparse_rows.hpp"

namespace nd::gnn_rerank {

using namespace sparse;

constexpr float kOne = 0x1p31f;  // of an entry up to 1
constexpr int kBestBytes = 12 << 10;

__device__ __forceinline__ float weight_of(const NdLists& lists, int64_t i, int64_t a) {
  const double cosine = 1 - lists.key[i * lists.k + a];
  return static_cast<float>(fmin(cosine * cosine, 1.0));
}

// Neighbours as rows of A_0.
struct ListedRows {
  NdLists lists;
  int64_t count;
  template <class F>
  __device__ __forceinline__ void warp_entries(int64_t i, F f) const {
    for (int64_t a = lane_index(); a < lists.k; a += kWarpSize) f(neighbour(lists, i, a), [] { return 0u; });
  }
};

// The graph. Entries of A_1 by row, then chunk of the column; those of its transpose, and of that of A_0, by chunk of
// the row, then column. Place within the chunk and value, 2^31 for 1.
struct Graph {
  NdLists lists;
  Chunks chunks;
  int count;             // neighbours that are summed: k2, or all if that is 1
  float unit;            // of a counter of A_1 and A_2: 2^31 / (2 k2) or less
  Columns first;         // A_0^T
  int64_t* layer_start;  // [rows * chunks + 1]
  uint2* layer;
  int64_t* transposed_start;  // [chunks * rows + 1]
  uint2* transposed;
  float* weight;  // [rows, count] w(g,a) n(r(g,a)) / norm(g)
  float* bound;   // [rows] n

  // Range of B_1(c) in a chunk: that of A_1 if !side, else of its transpose.
  __device__ __forceinline__ void edges_of(int64_t c, int64_t chunk, bool side, long long& from, long long& to) const {
    const int64_t* const start =
        side ? transposed_start + chunk * lists.rows + c : layer_start + c * chunks.count + chunk;
    from = start[0];
    to = start[1];
  }
};

// Row i of A_1 in a chunk, before the norm, in units of 1 / unit.
__device__ __forceinline__ void sum_first(const Graph& graph, int64_t i, int64_t chunk, unsigned* counter) {
  clear_counters(counter, graph.chunks.size);
  const int64_t begin = graph.chunks.begin(chunk), size = graph.chunks.size_of(chunk);
  for (int t = warp_index(); t < 2 * graph.count; t += kWarps) {
    const int64_t r = neighbour(graph.lists, i, t / 2);
    const unsigned w = __float2uint_rn(weight_of(graph.lists, i, t / 2) * graph.unit);
    if (t % 2 == 0) {
      for (int64_t b = lane_index(); b < graph.lists.k; b += kWarpSize) {
        const int64_t at = neighbour(graph.lists, r, b) - begin;
        if (at >= 0 && at < size) atomicAdd(counter + at, w);
      }
    } else {
      const int64_t* const start = graph.first.start + chunk * graph.first.columns + r;
      for (int64_t e = start[0] + lane_index(); e < start[1]; e += kWarpSize)
        atomicAdd(counter + graph.first.entry[e].x, w);
    }
  }
  __syncthreads();
}

// Row i of A_2 in a chunk, likewise.
__device__ __forceinline__ void sum_second(const Graph& graph, int64_t i, int64_t chunk, unsigned* counter) {
  clear_counters(counter, graph.chunks.size);
  for (int side = 0; side < 2; side++) {
    const uint2* const entry = side ? graph.transposed : graph.layer;
    const auto source = [&](int64_t a, long long& from, long long& to, float& factor) {
      graph.edges_of(neighbour(graph.lists, i, a), chunk, side, from, to);
      factor = weight_of(graph.lists, i, a) * graph.unit * (1 / kOne);
    };
    add_entries<1>(counter, entry, graph.count, source,
                   [](float factor, unsigned share) { return __float2uint_rn(factor * __uint2float_rn(share)); });
  }
  __syncthreads();
}

// A_1 before the norm: the numbers of entries to layer_start + 1, or the entries.
template <bool kFill>
__global__ void __launch_bounds__(kThreads) make_layer(Graph graph) {
  ND_DYNAMIC_SHARED(unsigned, counter);
  __shared__ int scratch[kWarps];
  const int64_t i = block_index() / graph.chunks.count, chunk = block_index() % graph.chunks.count;
  sum_first(graph, i, chunk, counter);
  const int64_t end = for_counted(counter, graph.chunks.size_of(chunk), kFill ? graph.layer_start[block_index()] : 0,
                                  scratch, [&](int64_t place, int64_t j, unsigned value) {
                                    if (kFill) graph.layer[place] = make_uint2(static_cast<unsigned>(j), value);
                                  });
  if (!kFill && thread_index() == 0) graph.layer_start[block_index() + 1] = end;
}

// Entries of A_1 in units of 2^-31 of its rows' norms: a warp a row.
__global__ void __launch_bounds__(256) normalise_layer(Graph graph) {
  const int64_t i = (block_index() * 256 + thread_index()) / kWarpSize, chunks = graph.chunks.count;
  if (i >= graph.lists.rows) return;
  const int64_t begin = graph.layer_start[i * chunks], end = graph.layer_start[(i + 1) * chunks];
  double squares = 0;
  for (int64_t e = begin + lane_index(); e < end; e += kWarpSize) {
    const double value = graph.layer[e].y;
    squares += value * value;
  }
  const double factor = kOne / sqrt(warp_sum(squares));
  for (int64_t e = begin + lane_index(); e < end; e += kWarpSize)
    graph.layer[e].y = __double2uint_rn(factor * graph.layer[e].y);
}

// A_1 as rows to transpose.
struct LayerRows {
  Graph graph;
  int64_t count;
  template <class F>
  __device__ __forceinline__ void warp_entries(int64_t i, F f) const {
    for (int64_t chunk = 0; chunk < graph.chunks.count; chunk++) {
      long long from, to;
      graph.edges_of(i, chunk, false, from, to);
      for (long long e = from + lane_index(); e < to; e += kWarpSize)
        f(graph.chunks.begin(chunk) + graph.layer[e].x, [&] { return graph.layer[e].y; });
    }
  }
};

// n of all rows, rounded up; sums of integers, as columns are in no order.
__global__ void __launch_bounds__(256) bound_columns(Graph graph) {
  const int64_t c = (block_index() * 256 + thread_index()) / kWarpSize;
  if (c >= graph.lists.rows) return;
  Integer squares = 0;
  for (int64_t chunk = 0; chunk < graph.chunks.count; chunk++) {
    long long from, to;
    graph.edges_of(c, chunk, true, from, to);
    for (long long e = from + lane_index(); e < to; e += kWarpSize) {
      const Integer value = (graph.transposed[e].y >> 11) + 1;
      squares += value * value;
    }
  }
  squares = warp_sum(squares);
  if (lane_index() == 0) graph.bound[c] = static_cast<float>(1 + sqrt(static_cast<double>(squares)) * 0x1p-20);
}

// w(i,a) n(r(i,a)) / norm(i): a block a row.
__global__ void __launch_bounds__(kThreads) normalise_weights(Graph graph) {
  ND_DYNAMIC_SHARED(unsigned, counter);
  __shared__ double sums[2][kWarps];
  const int64_t i = block_index();
  double squares = 0;
  for (int64_t chunk = 0; chunk < graph.chunks.count; chunk++) {
    sum_second(graph, i, chunk, counter);
    double own = 0;
    for (int64_t j = thread_index(); j < graph.chunks.size_of(chunk); j += kThreads)
      own += static_cast<double>(counter[j]) * counter[j];
    squares += block_sum<kWarps>(own, sums[chunk % 2]);
  }
  const double factor = graph.unit / sqrt(squares);
  for (int64_t a = thread_index(); a < graph.count; a += kThreads)
    graph.weight[i * graph.count + a] =
        static_cast<float>(factor * weight_of(graph.lists, i, a) * graph.bound[neighbour(graph.lists, i, a)]);
}

// B_1 by columns: entries at column c over n(c). A warp a row.
__global__ void __launch_bounds__(256) scale_edges(Graph graph) {
  const int64_t i = (block_index() * 256 + thread_index()) / kWarpSize;
  if (i >= graph.lists.rows) return;
  for (int64_t chunk = 0; chunk < graph.chunks.count; chunk++)
    for (int side = 0; side < 2; side++) {
      uint2* const entry = side ? graph.transposed : graph.layer;
      long long from, to;
      graph.edges_of(i, chunk, side, from, to);
      for (long long e = from + lane_index(); e < to; e += kWarpSize)
        entry[e].y = __float2uint_rn(__uint2float_rn(entry[e].y) / graph.bound[graph.chunks.begin(chunk) + entry[e].x]);
    }
}

struct Ranker {
  NdGnnArgs args;
  Graph graph;
  float2* own;           // [blocks, rows] entries of A_2(i): column as bits, value
  float* similarity;     // [blocks, gallery], or null: the result is dense
  double* inverse_norm;  // [rows] of features
  double* score;         // [blocks, room] in the workspace, or null: in shared memory
  int* index;
  int room;
};

// Row i of A_2 from scaled edges, in any order; returns its entries' number, count: [1] in shared memory.
__device__ __forceinline__ int list_second(const Graph& graph, int64_t i, unsigned* counter, double* sums, int* count,
                                           float2* own) {
  if (thread_index() == 0) *count = 0;
  double squares = 0;
  for (int64_t chunk = 0; chunk < graph.chunks.count; chunk++) {
    sum_second(graph, i, chunk, counter);
    double part = 0;
    for (int64_t j = thread_index(); j < graph.chunks.size_of(chunk); j += kThreads) {
      if (counter[j] == 0) continue;
      const int64_t column = graph.chunks.begin(chunk) + j;
      const float value = __uint2float_rn(counter[j]) * graph.bound[column];
      own[atomicAdd(count, 1)] = {__int_as_float(static_cast<int>(column)), value};
      part += static_cast<double>(value) * value;
    }
    squares += block_sum<kWarps>(part, sums);
    __syncthreads();
  }
  const int found = *count;
  const float factor = static_cast<float>(1 / sqrt(squares));
  for (int e = thread_index(); e < found; e += kThreads) own[e].y *= factor;
  __syncthreads();
  return found;
}

// z_i over n in a chunk, 2^31 for 1.
__device__ __forceinline__ void sum_z(const Ranker& ranker, int64_t i, int64_t chunk, const float2* own, int found,
                                      unsigned* counter) {
  const Graph& graph = ranker.graph;
  clear_counters(counter, graph.chunks.size);
  if (ranker.args.expand == 1) {
    for (int64_t a = thread_index(); a < graph.lists.k; a += kThreads) {
      const int64_t at = neighbour(graph.lists, i, a) - graph.chunks.begin(chunk);
      if (at >= 0 && at < graph.chunks.size_of(chunk)) counter[at] = 1u << 31;
    }
  } else {
    for (int side = 0; side < 2; side++) {
      const auto source = [&](int64_t e, long long& from, long long& to, float& factor) {
        graph.edges_of(__float_as_int(own[e].x), chunk, side, from, to);
        factor = own[e].y;
      };
      add_entries<8>(counter, side ? graph.transposed : graph.layer, found, source,
                     [](float factor, unsigned share) { return __float2uint_rn(factor * __uint2float_rn(share)); });
    }
  }
  __syncthreads();
}

// What a chunk of z adds to <A_i, A_g> of all of the gallery: out(g, sum).
template <class Out>
__device__ __forceinline__ void gather(const Ranker& ranker, int64_t chunk, const unsigned* counter, Out out) {
  const Graph& graph = ranker.graph;
  const int64_t gallery = graph.lists.rows - ranker.args.num_queries, begin = graph.chunks.begin(chunk);
  const int64_t size = graph.chunks.size_of(chunk);
  for (int64_t g = thread_index(); g < gallery; g += kThreads) {
    const int64_t row = ranker.args.num_queries + g;
    float sum = 0;
    for (int a = 0; a < graph.count; a++) {
      const int64_t at = neighbour(graph.lists, row, a) - begin;
      if (at < 0 || at >= size) continue;
      const float w = ranker.args.expand == 1 ? 1.0f : graph.weight[row * graph.count + a];
      sum += w * (__uint2float_rn(counter[at]) * (1 / kOne));
    }
    out(g, sum);
  }
}

__global__ void __launch_bounds__(kThreads) mix_dense(Ranker ranker) {
  ND_DYNAMIC_SHARED(unsigned, counter);
  __shared__ double sums[kWarps];
  __shared__ int count;
  const NdGnnArgs& args = ranker.args;
  const int64_t gallery = args.lists.rows - args.num_queries;
  float2* const own = ranker.own + block_index() * args.lists.rows;
  const float rest = static_cast<float>(1 - args.lambda), factor = static_cast<float>(args.lambda);
  for (int64_t i = block_index(); i < args.num_queries; i += blocks()) {
    const int found = args.expand > 1 ? list_second(ranker.graph, i, counter, sums, &count, own) : 0;
    float* const result = args.distance + i * gallery;
    for (int64_t chunk = 0; chunk < ranker.graph.chunks.count; chunk++) {
      sum_z(ranker, i, chunk, own, found, counter);
      gather(ranker, chunk, counter, [&](int64_t g, float sum) {
        result[g] = rest * sum + (chunk == 0 ? factor * (1 - result[g]) : result[g]);
      });
    }
  }
}

// 1 / |x| of all rows of features: a warp a row.
__global__ void __launch_bounds__(256) find_norms(Ranker ranker) {
  const int64_t i = (block_index() * 256 + thread_index()) / kWarpSize;
  if (i >= ranker.args.lists.rows) return;
  const double squares = warp_product(ranker.args.features, i, i);
  if (lane_index() == 0) ranker.inverse_norm[i] = 1 / sqrt(squares);
}

// The best rows of one query after the other: scores with the opposite sign, ascending.
__global__ void __launch_bounds__(kThreads) mix_top_k(Ranker ranker) {
  ND_DYNAMIC_SHARED(double, dynamic);
  __shared__ double sums[kWarps];
  __shared__ int pending[kThreads], counts[3];
  const NdGnnArgs& args = ranker.args;
  const NdLists& lists = args.query_lists;
  const int64_t gallery = args.lists.rows - args.num_queries;
  const int in_shared = ranker.score ? 0 : ranker.room;
  unsigned* const counter = reinterpret_cast<unsigned*>(reinterpret_cast<int*>(dynamic + in_shared) + in_shared);
  float2* const own = ranker.own + block_index() * args.lists.rows;
  float* const similarity = ranker.similarity + block_index() * gallery;
  Best best;
  best.score = ranker.score ? ranker.score + block_index() * ranker.room : dynamic;
  best.index =
      ranker.score ? ranker.index + block_index() * ranker.room : reinterpret_cast<int*>(dynamic + ranker.room);
  best.count = counts;
  best.most = static_cast<int>(smaller(args.top_k, gallery));
  for (int64_t i = block_index(); i < args.num_queries; i += blocks()) {
    const int found = args.expand > 1 ? list_second(ranker.graph, i, counter, sums, counts + 1, own) : 0;
    for (int64_t chunk = 0; chunk < ranker.graph.chunks.count; chunk++) {
      sum_z(ranker, i, chunk, own, found, counter);
      gather(ranker, chunk, counter,
             [&](int64_t g, float sum) { similarity[g] = chunk == 0 ? sum : similarity[g] + sum; });
    }
    best.clear();
    const auto mixed = [&](int64_t g, double cosine) {
      return -((1 - args.lambda) * static_cast<double>(similarity[g]) + args.lambda * cosine);
    };
    for (int64_t base = 0; base < lists.k; base += kThreads) {
      const int64_t a = base + thread_index();
      const int64_t g = a < lists.k ? lists.index[i * lists.k + a] - args.num_queries : -1;
      if (g >= 0 && g < gallery) best.offer(mixed(g, 1 - lists.key[i * lists.k + a]), g);
      best.settle();
      if (g >= 0 && g < gallery) similarity[g] = NAN;  // no longer open
    }
    __syncthreads();
    const double last = 1 - lists.key[(i + 1) * lists.k - 1];
    offer_open(
        best, pending, counts + 2, 0, gallery, [&](int64_t g) { return mixed(g, last) <= best.worst; },
        [&](int64_t g) {
          const int64_t j = args.num_queries + g;
          return mixed(g, warp_product(args.features, i, j) * ranker.inverse_norm[i] * ranker.inverse_norm[j]);
        });
    for (int64_t a = thread_index(); a < args.top_k; a += kThreads) {
      args.score[i * args.top_k + a] = a < best.kept ? -best.score[a] : -INFINITY;
      args.found[i * args.top_k + a] = a < best.kept ? best.index[a] : -1;
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------ launches

inline bool valid(const NdGnnArgs& args) {
  return sparse::valid(args.lists) && args.num_queries >= 0 && args.num_queries <= args.lists.rows &&
         args.expand >= 1 && args.expand <= args.lists.k && args.edges >= 0 && args.top_k >= 0;
}

// What finds A_1, in the workspace of nd_gnn_layer.
struct LayerPlan {
  Graph graph;
  int64_t *first_start, *sums;
  uint2* first;
  size_t bytes;

  LayerPlan(const NdGnnArgs& args, void* base)
      : graph{args.lists,
              Chunks(args.lists.rows),
              static_cast<int>(args.expand > 1 ? args.expand : args.lists.k),
              0,
              {},
              nullptr,
              nullptr,
              nullptr,
              nullptr,
              nullptr,
              nullptr} {
    Workspace workspace(base);
    const int64_t rows = args.lists.rows, buckets = rows * graph.chunks.count;
    graph.unit = kOne / static_cast<float>(2 * power_of_two(graph.count));
    first_start = workspace.take<int64_t>(buckets + 1);
    first = workspace.take<uint2>(rows * args.lists.k);
    graph.layer_start = workspace.take<int64_t>(buckets + 1);
    sums = workspace.take<int64_t>(scan_room(buckets));
    graph.first = {first_start, first, rows};
    bytes = workspace.bytes;
  }
};

struct RankPlan {
  LayerPlan layer;
  Ranker ranker;
  int64_t grid;
  size_t bytes;

  RankPlan(const NdGnnArgs& args, void* layer_base, void* base)
      : layer(args, layer_base), ranker{args, layer.graph, nullptr, nullptr, nullptr, nullptr, nullptr, 0} {
    Workspace workspace(base);
    const int64_t rows = args.lists.rows, gallery = rows - args.num_queries;
    Graph& graph = ranker.graph;
    grid = resident_blocks(args.num_queries);
    if (args.expand > 1) {
      graph.layer = workspace.take<uint2>(args.edges);
      graph.transposed = workspace.take<uint2>(args.edges);
      graph.transposed_start = workspace.take<int64_t>(rows * graph.chunks.count + 1);
      graph.weight = workspace.take<float>(rows * graph.count);
      graph.bound = workspace.take<float>(rows);
      ranker.own = workspace.take<float2>(grid * rows);
    }
    if (args.top_k > 0) {
      ranker.similarity = workspace.take<float>(grid * gallery);
      ranker.inverse_norm = workspace.take<double>(rows);
      ranker.room = static_cast<int>(Best::room_of(smaller(args.top_k, gallery)));
      if (ranker.room * 12 > kBestBytes) {
        ranker.score = workspace.take<double>(grid * ranker.room);
        ranker.index = workspace.take<int>(grid * ranker.room);
      }
    }
    bytes = workspace.bytes;
  }
};

inline dim3 warps_for(int64_t rows) { return dim3(static_cast<unsigned>(divide_up(rows, 256 / kWarpSize))); }

inline cudaError_t count_layer(const NdGnnArgs& args, int64_t* edges, void* workspace, cudaStream_t stream) {
  const LayerPlan plan(args, workspace);
  const int64_t buckets = args.lists.rows * plan.graph.chunks.count;
  cudaError_t error = cudaMemsetAsync(edges, 0, sizeof(int64_t), stream);
  if (error || buckets == 0 || args.expand == 1) return error;
  error = transpose(ListedRows{args.lists, args.lists.rows}, args.lists.rows, plan.graph.chunks, plan.first_start,
                    plan.first, plan.sums, stream);
  if (!error) error = cudaMemsetAsync(plan.graph.layer_start, 0, sizeof(int64_t), stream);
  if (!error) error = launch_blocks(make_layer<false>, buckets, plan.graph.chunks.shared_bytes(), stream, plan.graph);
  if (!error) error = scan(plan.graph.layer_start + 1, buckets, true, plan.sums, stream);
  if (!error)
    error = cudaMemcpyAsync(edges, plan.graph.layer_start + buckets, sizeof(int64_t), cudaMemcpyDeviceToDevice, stream);
  return error;
}

inline cudaError_t make_graph(const RankPlan& plan, cudaStream_t stream) {
  const Graph& graph = plan.ranker.graph;
  const int64_t rows = graph.lists.rows;
  const size_t shared = graph.chunks.shared_bytes();
  cudaError_t error = launch_blocks(make_layer<true>, rows * graph.chunks.count, shared, stream, graph);
  if (error) return error;
  ND_LAUNCH(normalise_layer, warps_for(rows), dim3(256), 0, stream, graph);
  error = transpose(LayerRows{graph, rows}, rows, graph.chunks, graph.transposed_start, graph.transposed,
                    plan.layer.sums, stream);
  if (error) return error;
  ND_LAUNCH(bound_columns, warps_for(rows), dim3(256), 0, stream, graph);
  error = launch_blocks(normalise_weights, rows, shared, stream, graph);
  if (error) return error;
  ND_LAUNCH(scale_edges, warps_for(rows), dim3(256), 0, stream, graph);
  return cudaGetLastError();
}

inline cudaError_t rank(const NdGnnArgs& args, void* layer, void* workspace, cudaStream_t stream) {
  const RankPlan plan(args, layer, workspace);
  const size_t shared = plan.ranker.graph.chunks.shared_bytes();
  if (args.num_queries == 0) return cudaSuccess;
  if (args.expand > 1)
    if (const cudaError_t error = make_graph(plan, stream)) return error;
  if (args.top_k == 0) return launch_blocks(mix_dense, plan.grid, shared, stream, plan.ranker);
  ND_LAUNCH(find_norms, warps_for(args.lists.rows), dim3(256), 0, stream, plan.ranker);
  if (const cudaError_t error = cudaGetLastError()) return error;
  const size_t best = plan.ranker.score ? 0 : static_cast<size_t>(plan.ranker.room) * 12;
  return launch_blocks(mix_top_k, plan.grid, shared + best, stream, plan.ranker);
}

}  // namespace nd::gnn_rerank

extern "C" size_t nd_gnn_layer_workspace(const NdGnnArgs* args) {
  using namespace nd::gnn_rerank;
  return valid(*args) ? LayerPlan(*args, nullptr).bytes : 0;
}

extern "C" int nd_gnn_layer(const NdGnnArgs* args, int64_t* edges, void* workspace, void* stream) {
  using namespace nd::gnn_rerank;
  return valid(*args) ? count_layer(*args, edges, workspace, static_cast<cudaStream_t>(stream)) : cudaErrorInvalidValue;
}

extern "C" size_t nd_gnn_rerank_workspace(const NdGnnArgs* args) {
  using namespace nd::gnn_rerank;
  return valid(*args) ? RankPlan(*args, nullptr, nullptr).bytes : 0;
}

extern "C" int nd_gnn_rerank(const NdGnnArgs* args, void* layer, void* workspace, void* stream) {
  using namespace nd::gnn_rerank;
  return valid(*args) ? rank(*args, layer, workspace, static_cast<cudaStream_t>(stream)) : cudaErrorInvalidValue;
}
