// Softmaxes of rows q (and o) over a long queue Q [K, d] without an [N, K] matrix: for S = q Q' / tau, R = o Q' / tau_t
//
//     log sum exp S,   A = E_p_q[Q],   log sum exp R,   B = E_p_o[Q],   E_p_o[R - S]
//
// from which InfoNCE, KL(p_o || p_q) and their gradients in q follow. One pass over Q: products of a tile, online
// maximum, exponentials, and, with a gradient, products of the exponentials with the tile, whose sums are scaled down
// whenever a maximum rises (as flash attention does).
//
// Floor: 2 N K d multiply-adds with o, as many again with a gradient; the queue is read once (33.6 MB at K = 65,536,
// d = 128) and N K exponentials for each of q and o hide behind the products.
//
// Layout: a task is a block of rows and a slab of the queue. A tile of kTile rows of Q is packed twice, as columns for
// the first product and as rows for the second, each in panels of NR = 2 registers; a register block is MR rows x NR.
// Rows go through a tile kStripsAtOnce strips of MR at a time, so that their scores stay in the second-level cache.
// Sums of a tile are float32 (float64 for a float64 queue), sums of exponentials over tiles float64. Slabs depend on
// the sizes alone and are merged in their order.
//
// Limits: NaN and infinities in a row of q or o reach the results of that row, in Q those of all rows.
#include <cmath>
#include <cstring>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd_convert.hpp"
#include "neuraldeps/simd_exp.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int64_t MR = ND_VECTOR_BYTES == 64 ? 14 : 6;
constexpr int64_t kTile = 192;        // rows of the queue; a multiple of every NR
constexpr int64_t kStripsAtOnce = 2;  // of q, and as many of o
constexpr int64_t kBlockStrips = 336 / MR;
constexpr int64_t kMostSlabs = 16, kSlabRows = 1024;  // a slab has at least so many rows
constexpr int64_t kPartialShare = 8;                  // partial sums take at most this part of an [N, K] matrix

template <class T>
using V = typename Vec<T>::t;

// Of one row and one slab.
struct RowState {
  double largest_q, sum_q, largest_o, sum_o, difference;  // sums of exp(S - m), exp(R - m), exp(R - m) (R - S)
};

template <class T>
struct Plan {
  static constexpr int64_t W = Vec<T>::W, NR = 2 * W;
  static_assert(kTile % NR == 0);
  int64_t sources;         // 2 with o
  int64_t depth;           // d rounded up to whole panels
  int64_t blocks, strips;  // of rows, strips in a block
  int64_t slabs, slab_rows;
  int64_t rows;                            // N rounded up to whole blocks
  int64_t state_bytes, sums_bytes;         // of the partial results
  int64_t vectors, columns, tile, scores;  // numbers in the workspace

  explicit Plan(const QueueContrastArgs& args) {
    sources = args.original ? 2 : 1;
    depth = round_up(args.d, NR);
    const int64_t all_strips = ceil_div(args.N, MR);
    blocks = ceil_div(all_strips, kBlockStrips);
    strips = ceil_div(all_strips, blocks);
    rows = blocks * strips * MR;
    const int64_t wanted = smaller(args.K / kSlabRows, args.K / (kPartialShare * depth));
    slab_rows = round_up(ceil_div(args.K, larger(1, smaller(kMostSlabs, wanted))), kTile);
    slabs = ceil_div(args.K, slab_rows);
    state_bytes = round_up(slabs * rows * static_cast<int64_t>(sizeof(RowState)), 64);
    sums_bytes = args.gradient ? slabs * sources * rows * depth * static_cast<int64_t>(sizeof(T)) : 0;
    vectors = round_up(sources * strips * MR * args.d, 16);
    columns = kTile * args.d;
    tile = kTile * depth;
    scores = sources * kStripsAtOnce * MR * kTile;
  }

  RowState* state(const QueueContrastArgs& args, int64_t slab, int64_t row) const {
    return static_cast<RowState*>(args.partial) + slab * rows + row;
  }
  T* sums(const QueueContrastArgs& args, int64_t slab, int64_t source, int64_t row) const {
    return reinterpret_cast<T*>(static_cast<char*>(args.partial) + state_bytes) +
           ((slab * sources + source) * rows + row) * depth;
  }
};

template <class T, class F>
ND_INLINE void for_vectors(int64_t count, const F& f) {
  constexpr int W = Vec<T>::W;
  int64_t j = 0;
  for (; j + W <= count; j += W) f(j, W);
  if (j < count) f(j, count - j);
}

// c [MR, NR], rows `c_stride` apart, = or += a [MR, depth] panel [depth, NR].
template <bool kAdd, class T>
__attribute__((noinline)) void multiply(const T* a, int64_t a_stride, const T* panel, int64_t depth, T* c,
                                        int64_t c_stride) {
  constexpr int64_t W = Vec<T>::W;
  V<T> sum[MR][2] = {};
  for (int64_t k = 0; k < depth; k++, panel += 2 * W) {
    const V<T> left = load(panel), right = load(panel + W);
#pragma GCC unroll 14
    for (int64_t r = 0; r < MR; r++) {
      const T factor = a[r * a_stride + k];
      sum[r][0] += factor * left;
      sum[r][1] += factor * right;
    }
  }
#pragma GCC unroll 14
  for (int64_t r = 0; r < MR; r++) {
    T* out = c + r * c_stride;
    store(out, kAdd ? load(out) + sum[r][0] : sum[r][0]);
    store(out + W, kAdd ? load(out + W) + sum[r][1] : sum[r][1]);
  }
}

// Lane l of a where l has not the bit h, else lane l - h of b; kUpper: lane l + h of a, else lane l of b.
template <int h, bool kUpper, class Vector, int... l>
ND_INLINE Vector exchanged(Vector a, Vector b, Lanes<l...>) {
  constexpr int W = sizeof...(l);
  return __builtin_shufflevector(a, b, (kUpper ? ((l & h) ? W + l : l + h) : ((l & h) ? W + l - h : l))...);
}

// W x W values transposed, from bit h of their places on.
template <int h, class T>
ND_INLINE void transpose(V<T> (&v)[Vec<T>::W]) {
  if constexpr (h < Vec<T>::W) {
    using All = typename LanesUpTo<Vec<T>::W>::t;
#pragma GCC unroll 16
    for (int i = 0; i < Vec<T>::W; i++) {
      if (i & h) continue;
      const V<T> a = v[i], b = v[i + h];
      v[i] = exchanged<h, false>(a, b, All());
      v[i + h] = exchanged<h, true>(a, b, All());
    }
    transpose<2 * h, T>(v);
  }
}

// Rows [first, first + count) of the queue: `rows` [depth / NR, kTile, NR] and `columns` [kTile / NR, d, NR], zeros
// beyond them.
template <class T, class In>
void pack_tile(const QueueContrastArgs& args, const Plan<T>& plan, int64_t first, int64_t count, T* rows, T* columns) {
  constexpr int64_t W = Vec<T>::W, NR = Plan<T>::NR;
  for (int64_t j = 0; j < kTile; j++) {
    const In* from = static_cast<const In*>(args.queue) + (first + j) * args.queue_stride;
    for (int64_t c = 0; c < plan.depth; c += W) {
      const int64_t left = j < count ? args.d - c : 0;
      const V<T> v = left >= W ? load_as<T>(from + c) : left > 0 ? load_part_as<T>(from + c, left) : V<T>{};
      store(rows + (c / NR * kTile + j) * NR + c % NR, v);
    }
  }
  for (int64_t j = 0; j < kTile; j += W) {
    T* to = columns + j / NR * args.d * NR + j % NR;
    for (int64_t c = 0; c < args.d; c += W) {
      V<T> block[W];
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; i++) block[i] = load(rows + (c / NR * kTile + j + i) * NR + c % NR);
      transpose<1, T>(block);
      const int64_t wanted = smaller(W, args.d - c);
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; i++)
        if (i < wanted) store(to + (c + i) * NR, block[i]);
    }
  }
}

// Raises m to that of the scores of a tile, and scales down what was summed under the old one.
template <class T>
ND_INLINE void raise(const T* scores, int64_t count, T over, double& largest, double& sum, double& other, T* sums,
                     int64_t depth) {
  V<T> top = broadcast(static_cast<T>(-__builtin_inf()));
  for_vectors<T>(count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    const V<T> v = take<T>(scores + j, n);
    top = larger_lanes<T>(n == Vec<T>::W ? v : keep_first<T>(v, n, top[0]), top);
  });
  const double found = static_cast<double>(largest_lane<T>(top) * over);
  if (!(found > largest)) return;
  if (sum != 0) {
    const double factor = std::exp(largest - found);
    sum *= factor;
    other *= factor;
    if (sums) {
      const V<T> f = broadcast(static_cast<T>(factor));
      for (int64_t c = 0; c < depth; c += Vec<T>::W) store(sums + c, load(sums + c) * f);
    }
  }
  largest = found;
}

// Scores of one row of q (and o) with a tile become exponentials, and their sums join the state.
template <bool kOriginal, class T>
void exponentials(const QueueContrastArgs& args, const Plan<T>& plan, int64_t count, T* scores_q, T* scores_o,
                  RowState& state, T* sums_q, T* sums_o) {
  const T over_q = static_cast<T>(1 / args.temperature), over_o = static_cast<T>(1 / args.target_temperature);
  double none = 0;
  raise(scores_q, count, over_q, state.largest_q, state.sum_q, none, sums_q, plan.depth);
  if (kOriginal) raise(scores_o, count, over_o, state.largest_o, state.sum_o, state.difference, sums_o, plan.depth);
  const V<T> m_q = broadcast(static_cast<T>(state.largest_q)), m_o = broadcast(static_cast<T>(state.largest_o));
  V<T> sum_q = {}, sum_o = {}, difference = {};
  for_vectors<T>(count, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    const V<T> x_q = take<T>(scores_q + j, n) * over_q;
    V<T> e_q = exp_of<T>(x_q - m_q);
    if (n < Vec<T>::W) e_q = keep_first<T>(e_q, n, T(0));
    sum_q += e_q;
    put(scores_q + j, e_q, n);
    if (kOriginal) {
      const V<T> x_o = take<T>(scores_o + j, n) * over_o;
      V<T> e_o = exp_of<T>(x_o - m_o);
      if (n < Vec<T>::W) e_o = keep_first<T>(e_o, n, T(0));
      sum_o += e_o;
      difference += e_o * (x_o - x_q);
      put(scores_o + j, e_o, n);
    }
  });
  state.sum_q += sum_of_lanes<T>(sum_q);
  if (kOriginal) {
    state.sum_o += sum_of_lanes<T>(sum_o);
    state.difference += sum_of_lanes<T>(difference);
  }
}

template <class T, class In>
void accumulate_task(const QueueContrastArgs& args, const Plan<T>& plan, int64_t task, T* workspace) {
  constexpr int64_t NR = Plan<T>::NR;
  const int64_t slab = task % plan.slabs, row0 = task / plan.slabs * plan.strips * MR;
  const int64_t rows = plan.strips * MR, given = larger(0, smaller(rows, args.N - row0));
  T *vectors = workspace, *columns = vectors + plan.vectors, *tile = columns + plan.columns, *scores = tile + plan.tile;
  for (int64_t source = 0; source < plan.sources; source++) {
    const T* from = static_cast<const T*>(source ? args.original : args.q) + row0 * args.d;
    T* to = vectors + source * rows * args.d;
    std::memcpy(to, from, static_cast<size_t>(given * args.d) * sizeof(T));
    std::memset(to + given * args.d, 0, static_cast<size_t>((rows - given) * args.d) * sizeof(T));
    if (args.gradient)
      std::memset(plan.sums(args, slab, source, row0), 0, static_cast<size_t>(rows * plan.depth) * sizeof(T));
  }
  const double lowest = -__builtin_inf();
  for (int64_t r = 0; r < rows; r++) *plan.state(args, slab, row0 + r) = RowState{lowest, 0, lowest, 0, 0};

  const int64_t end = smaller(args.K, (slab + 1) * plan.slab_rows);
  for (int64_t first = slab * plan.slab_rows; first < end; first += kTile) {
    const int64_t count = smaller(kTile, end - first);
    pack_tile<T, In>(args, plan, first, count, tile, columns);
    for (int64_t strip = 0; strip < plan.strips; strip += kStripsAtOnce) {
      const int64_t strips = smaller(kStripsAtOnce, plan.strips - strip);
      const auto scores_of = [&](int64_t source, int64_t row) {
        return scores + (source * kStripsAtOnce * MR + row) * kTile;
      };
      for (int64_t source = 0; source < plan.sources; source++) {
        const T* from = vectors + (source * rows + strip * MR) * args.d;
        for (int64_t j = 0; j < count; j += NR)
          for (int64_t s = 0; s < strips; s++)
            multiply<false>(from + s * MR * args.d, args.d, columns + j * args.d, args.d, scores_of(source, s * MR) + j,
                            kTile);
      }
      for (int64_t r = 0; r < smaller(strips * MR, given - strip * MR); r++) {
        const int64_t row = row0 + strip * MR + r;
        RowState& state = *plan.state(args, slab, row);
        T* sums_q = args.gradient ? plan.sums(args, slab, 0, row) : nullptr;
        if (plan.sources == 2) {
          T* sums_o = args.gradient ? plan.sums(args, slab, 1, row) : nullptr;
          exponentials<true>(args, plan, count, scores_of(0, r), scores_of(1, r), state, sums_q, sums_o);
        } else {
          exponentials<false, T>(args, plan, count, scores_of(0, r), nullptr, state, sums_q, nullptr);
        }
      }
      if (!args.gradient) continue;
      for (int64_t source = 0; source < plan.sources; source++) {
        for (int64_t c = 0; c < plan.depth; c += NR)
          for (int64_t s = 0; s < strips; s++)
            multiply<true>(scores_of(source, s * MR), kTile, tile + c * kTile, count,
                           plan.sums(args, slab, source, row0 + (strip + s) * MR) + c, plan.depth);
      }
    }
  }
}

// Adds the sums of all slabs: out = sum_i exp(m_i - m) / s sums_i over d.
template <class T>
void merge_sums(const QueueContrastArgs& args, const Plan<T>& plan, int64_t source, int64_t row, double largest,
                double sum, T* out) {
  for (int64_t c = 0; c < args.d; c++) out[c] = 0;
  for (int64_t slab = 0; slab < plan.slabs; slab++) {
    const RowState& state = *plan.state(args, slab, row);
    const T share = static_cast<T>(std::exp((source ? state.largest_o : state.largest_q) - largest) / sum);
    const T* sums = plan.sums(args, slab, source, row);
    for (int64_t c = 0; c < args.d; c++) out[c] += share * sums[c];
  }
}

template <class T>
void merge_row(const QueueContrastArgs& args, const Plan<T>& plan, int64_t row) {
  double largest_q = plan.state(args, 0, row)->largest_q, largest_o = plan.state(args, 0, row)->largest_o;
  for (int64_t slab = 1; slab < plan.slabs; slab++) {
    const RowState& state = *plan.state(args, slab, row);
    largest_q = state.largest_q > largest_q ? state.largest_q : largest_q;
    largest_o = state.largest_o > largest_o ? state.largest_o : largest_o;
  }
  double sum_q = 0, sum_o = 0, difference = 0;
  for (int64_t slab = 0; slab < plan.slabs; slab++) {
    const RowState& state = *plan.state(args, slab, row);
    sum_q += state.sum_q * std::exp(state.largest_q - largest_q);
    if (plan.sources == 1) continue;
    const double factor = std::exp(state.largest_o - largest_o);
    sum_o += state.sum_o * factor;
    difference += state.difference * factor;
  }
  args.lse_q[row] = largest_q + std::log(sum_q);
  if (args.gradient) merge_sums(args, plan, 0, row, largest_q, sum_q, static_cast<T*>(args.mean_q) + row * args.d);
  if (plan.sources == 1) return;
  args.lse_o[row] = largest_o + std::log(sum_o);
  args.difference[row] = difference / sum_o;
  if (args.gradient) merge_sums(args, plan, 1, row, largest_o, sum_o, static_cast<T*>(args.mean_o) + row * args.d);
}

template <class T>
QueueContrastPlan sizes(const QueueContrastArgs& args) {
  const Plan<T> plan(args);
  const int64_t numbers = plan.vectors + plan.columns + plan.tile + plan.scores;
  return {plan.blocks * plan.slabs, plan.state_bytes + plan.sums_bytes, numbers * static_cast<int64_t>(sizeof(T))};
}

template <class T, class In>
void accumulate_tasks(const QueueContrastArgs& args, int64_t begin, int64_t end, void* workspace) {
  const Plan<T> plan(args);
  for (int64_t task = begin; task < end; task++) accumulate_task<T, In>(args, plan, task, static_cast<T*>(workspace));
}

template <class T>
void merge_rows(const QueueContrastArgs& args, int64_t begin, int64_t end) {
  const Plan<T> plan(args);
  for (int64_t row = begin; row < end; row++) merge_row(args, plan, row);
}

}  // namespace

QueueContrastPlan queue_contrast_plan(const QueueContrastArgs& args) {
  return args.dtype == Dtype::kFloat64 ? sizes<double>(args) : sizes<float>(args);
}

void queue_contrast_accumulate(const QueueContrastArgs& args, int64_t begin, int64_t end, void* workspace) {
  by_dtype(args.dtype, [&]<class In>() { accumulate_tasks<Wide<In>, In>(args, begin, end, workspace); });
}

void queue_contrast_merge(const QueueContrastArgs& args, int64_t begin, int64_t end) {
  args.dtype == Dtype::kFloat64 ? merge_rows<double>(args, begin, end) : merge_rows<float>(args, begin, end);
}

}  // namespace nd::cpu::ND_CPU_LEVEL
