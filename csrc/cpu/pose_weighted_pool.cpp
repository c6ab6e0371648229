// Pooling of feature maps by weights of their positions, and its backward.
//
//     pooled_kc = sum_s F_cs H_ks / D_k,   D_k = sum_s H_ks + eps                    one read of F for all K maps
//     A_kc = G_kc / D_k,   dF_cs = sum_k A_kc H_ks,   P_ks = sum_c A_kc F_cs         one read, one write of F's size
//     dH_ks = P_ks - (sum_s H_ks P_ks) / D_k                                         no read of F
//
// Floor in bytes a float32 of F: 4 forward, 4 to 8 backward; 2 K flops forward and 2 K or 4 K backward a value of F,
// which exceed the reads where K is large (17 maps: 8.5 flops a byte).
//
// Layout: a task is a sample and a block of at most 256 channels. Its part X of F is rows of values side by side: one a
// channel along S, or with channels last one a position along C. In terms of rows r, values j and a table of each,
//
//     dots    out_kr = sum_j y_kj X_rj          forward (y = H)      P with channels last (y = A)
//     sums    out_kj = sum_r w_kr X_rj          P (w = A)            forward with channels last (w = H)
//     outer   X_rj = sum_k w_kr y_kj            dF in either
//
// dots holds some rows times some maps in registers and adds their lanes together at the end; sums and outer hold
// kRows rows. kTile rows are in the L1 cache between the passes of a backward. What is added for one result has an
// order that depends on neither the other maps nor the number of threads. Sums are in float32, of float64 features in
// float64.
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd.hpp"
#include "neuraldeps/simd_convert.hpp"

#define ND_INLINED __attribute__((always_inline))  // of lambdas

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int kRows = 8;
constexpr int64_t kTile = 16;

template <class T>
using V = typename Vec<T>::t;

// Rows of values of dtype, `stride` apart.
template <class In>
struct Matrix {
  In* data;
  int64_t rows, length, stride;

  ND_INLINE In* row(int64_t r) const { return data + r * stride; }
  ND_INLINE Matrix part(int64_t first) const { return {row(first), smaller(kTile, rows - first), length, stride}; }
};
template <class T>
struct Table {  // [K, stride]
  T* data;
  int64_t K, stride;

  ND_INLINE T* row(int64_t k) const { return data + k * stride; }
};

// ------------------------------------------------------------------------------------------------ products

// dots of maps k .. k + kMaps - 1 with W / kMaps rows from r on; those beyond the last repeat it and are not written.
template <int kMaps, class In>
ND_INLINE void dots_of(const Matrix<const In>& X, const Table<const Wide<In>>& y, const Table<Wide<In>>& out, int64_t r,
                       int64_t k) {
  using T = Wide<In>;
  constexpr int W = Vec<T>::W, kOwnRows = W / kMaps;
  const In* x[kOwnRows];
  for (int i = 0; i < kOwnRows; i++) x[i] = X.row(smaller(r + i, X.rows - 1));
  V<T> sums[W] = {};
  const auto add = [&](int64_t j, int64_t count) ND_INLINED {
    V<T> h[kMaps];
    for (int b = 0; b < kMaps; b++) h[b] = take<T>(y.row(k + b) + j, count);
    for (int a = 0; a < kOwnRows; a++) {
      const V<T> f = take<T>(x[a] + j, count);
      for (int b = 0; b < kMaps; b++) sums[b * kOwnRows + a] += f * h[b];
    }
  };
  int64_t j = 0;
  for (; j + W <= X.length; j += W) add(j, W);
  if (j < X.length) add(j, X.length - j);
  T totals[W];
  store(totals, lane_sums<T>(sums));
  const int64_t count = smaller(kOwnRows, X.rows - r);
  for (int b = 0; b < kMaps; b++) {
    T* place = out.row(k + b) + r;
    if (count == kOwnRows)
      for (int a = 0; a < kOwnRows; a++) place[a] = totals[b * kOwnRows + a];
    else
      for (int64_t a = 0; a < count; a++) place[a] = totals[b * kOwnRows + a];
  }
}

template <int kMaps, class In>
ND_INLINE void dots_of_rows(const Matrix<const In>& X, const Table<const Wide<In>>& y, const Table<Wide<In>>& out,
                            int64_t k) {
  for (int64_t r = 0; r < X.rows; r += Vec<Wide<In>>::W / kMaps) dots_of<kMaps>(X, y, out, r, k);
}

// out_kr = sum_j y_kj X_rj
template <class In>
ND_INLINE void dots(const Matrix<const In>& X, const Table<const Wide<In>>& y, const Table<Wide<In>>& out) {
  constexpr int W = Vec<Wide<In>>::W;
  for (int64_t r = 0; r < X.rows; r += kTile) {  // stay in the L1 cache for all maps
    const Matrix<const In> tile = X.part(r);
    const Table<Wide<In>> found{out.data + r, out.K, out.stride};
    int64_t k = 0;
    if constexpr (W >= 16)
      for (; k + 4 <= y.K; k += 4) dots_of_rows<4>(tile, y, found, k);
    if constexpr (W >= 8)
      for (; k + 2 <= y.K; k += 2) dots_of_rows<2>(tile, y, found, k);
    for (; k < y.K; k++) dots_of_rows<1>(tile, y, found, k);
  }
}

template <int kOwnRows, class In>
ND_INLINE void sums_of(const Matrix<const In>& X, const Table<const Wide<In>>& w, const Table<Wide<In>>& out,
                       int64_t r) {
  using T = Wide<In>;
  constexpr int W = Vec<T>::W;
  for (int64_t j = 0; j < X.length; j += W) {
    const int64_t count = smaller(W, X.length - j);
    V<T> x[kOwnRows];
    for (int i = 0; i < kOwnRows; i++) x[i] = take<T>(X.row(r + i) + j, count);
    for (int64_t k = 0; k < w.K; k++) {
      V<T> sum = take<T>(out.row(k) + j, count);
      for (int i = 0; i < kOwnRows; i++) sum += x[i] * w.row(k)[r + i];
      put(out.row(k) + j, sum, count);
    }
  }
}

// out_kj += sum_r w_kr X_rj
template <class In>
ND_INLINE void sums(const Matrix<const In>& X, const Table<const Wide<In>>& w, const Table<Wide<In>>& out) {
  int64_t r = 0;
  for (; r + kRows <= X.rows; r += kRows) sums_of<kRows>(X, w, out, r);
  for (; r < X.rows; r++) sums_of<1>(X, w, out, r);
}

template <int kOwnRows, class In>
ND_INLINE void outer_of(const Matrix<In>& X, const Table<const Wide<In>>& w, const Table<const Wide<In>>& y,
                        int64_t r) {
  using T = Wide<In>;
  constexpr int W = Vec<T>::W;
  for (int64_t j = 0; j < X.length; j += W) {
    const int64_t count = smaller(W, X.length - j);
    V<T> x[kOwnRows] = {};
    for (int64_t k = 0; k < w.K; k++) {
      const V<T> values = take<T>(y.row(k) + j, count);
      for (int i = 0; i < kOwnRows; i++) x[i] += values * w.row(k)[r + i];
    }
    for (int i = 0; i < kOwnRows; i++) put(X.row(r + i) + j, x[i], count);
  }
}

// X_rj = sum_k w_kr y_kj
template <class In>
ND_INLINE void outer(const Matrix<In>& X, const Table<const Wide<In>>& w, const Table<const Wide<In>>& y) {
  int64_t r = 0;
  for (; r + kRows <= X.rows; r += kRows) outer_of<kRows>(X, w, y, r);
  for (; r < X.rows; r++) outer_of<1>(X, w, y, r);
}

template <class T>
ND_INLINE void set_zero(T* values, int64_t count) {
  for (int64_t i = 0; i < count; i++) values[i] = 0;
}

// ------------------------------------------------------------------------------------------------ blocks

// Channels first .. first + channels - 1 of a sample and the K maps from `map` on.
struct Block {
  int64_t n, first, channels, map, K;

  Block(const PosePoolArgs& args, int64_t n, int64_t b) : n(n) {
    const int64_t per_map = pose_pool_blocks(args) / (args.groups ? args.K : 1);
    const int64_t size = args.groups ? args.C / args.K : args.C;
    map = args.groups ? b / per_map : 0;
    K = args.groups ? 1 : args.K;
    const int64_t end = map + K == args.K ? args.C : (map + 1) * size;
    first = smaller(map * size + b % per_map * kPosePoolChannels, end);
    channels = smaller(kPosePoolChannels, end - first);
  }

  // Place of map k (of the block's own) and channel c in pooled and its gradient.
  int64_t pooled(const PosePoolArgs& args, int64_t k) const {
    return (args.groups ? n * args.C : (n * args.K + k) * args.C) + first;
  }
  template <class In>
  Matrix<In> values(const PosePoolArgs& args, In* features) const {
    In* sample = features + n * args.C * args.S;
    if (args.channels_last) return {sample + first, args.S, channels, args.C};
    return {sample + first * args.S, channels, args.S, args.S};
  }
  template <class T>
  Table<const T> maps(const PosePoolArgs& args) const {
    return {static_cast<const T*>(args.maps) + (n * args.K + map) * args.S, K, args.S};
  }
};

// D of one map.
template <class T>
ND_INLINE double divisor(const T* map, int64_t S, double eps) {
  double sums[Vec<T>::W] = {};
  int64_t s = 0;
  for (; s + Vec<T>::W <= S; s += Vec<T>::W) add_to(sums, load(map + s));
  double sum = 0;
  for (; s < S; s++) sum += static_cast<double>(map[s]);
  for (int l = 0; l < Vec<T>::W; l++) sum += sums[l];
  return sum + eps;
}

// [K, kPosePoolChannels] of a task: sums forward, A backward.
template <class T>
ND_INLINE Table<T> room_of(int64_t K, void* workspace) {
  return {static_cast<T*>(workspace), K, kPosePoolChannels};
}

template <class In>
ND_INLINE void forward(const PosePoolArgs& args, const Block& block, void* workspace) {
  using T = Wide<In>;
  const Matrix<const In> X = block.values(args, static_cast<const In*>(args.features));
  const Table<const T> maps = block.maps<T>(args);
  const Table<T> found = room_of<T>(block.K, workspace);
  if (args.channels_last) {
    set_zero(found.data, block.K * kPosePoolChannels);
    sums<In>(X, maps, found);
  } else {
    dots<In>(X, maps, found);
  }
  for (int64_t k = 0; k < block.K; k++) {
    const V<T> D = broadcast(static_cast<T>(divisor(maps.row(k), args.S, args.eps)));
    In* out = static_cast<In*>(args.pooled) + block.pooled(args, k);
    for (int64_t c = 0; c < block.channels; c += Vec<T>::W)
      put(out + c, load(found.row(k) + c) / D, smaller(Vec<T>::W, block.channels - c));
  }
}

template <class In>
ND_INLINE void backward(const PosePoolArgs& args, const Block& block, int64_t task, void* workspace) {
  using T = Wide<In>;
  const Table<const T> maps = block.maps<T>(args);
  const Table<T> coefficients = room_of<T>(block.K, workspace);
  for (int64_t k = 0; k < block.K; k++) {
    const V<T> D = broadcast(static_cast<T>(divisor(maps.row(k), args.S, args.eps)));
    const In* grad = static_cast<const In*>(args.grad) + block.pooled(args, k);
    for (int64_t c = 0; c < block.channels; c += Vec<T>::W)
      store(coefficients.row(k) + c, take<T>(grad + c, smaller(Vec<T>::W, block.channels - c)) / D);
  }
  const Table<const T> A{coefficients.data, block.K, coefficients.stride};
  const Table<const T>&by_row = args.channels_last ? maps : A, &by_value = args.channels_last ? A : maps;
  const Table<T> P{static_cast<T*>(args.partial) + task * block.K * args.S, block.K, args.S};
  if (args.partial) set_zero(P.data, block.K * args.S);
  const int64_t rows = args.channels_last ? args.S : block.channels;
  for (int64_t r = 0; r < rows; r += kTile) {
    const Table<const T> own{by_row.data + r, block.K, by_row.stride};
    if (args.features_grad) outer<In>(block.values(args, static_cast<In*>(args.features_grad)).part(r), own, by_value);
    if (!args.partial) continue;
    const Matrix<const In> X = block.values(args, static_cast<const In*>(args.features)).part(r);
    if (args.channels_last)
      dots<In>(X, by_value, {P.data + r, block.K, args.S});
    else
      sums<In>(X, own, P);
  }
}

template <class T>
ND_INLINE void maps_gradient(const PosePoolArgs& args, int64_t n) {
  const int64_t blocks = pose_pool_blocks(args), own = args.groups ? blocks / args.K : blocks;
  const T* partial = static_cast<const T*>(args.partial) + n * blocks * (args.groups ? 1 : args.K) * args.S;
  for (int64_t k = 0; k < args.K; k++) {
    const int64_t place = (n * args.K + k) * args.S;
    const T* map = static_cast<const T*>(args.maps) + place;
    T* out = static_cast<T*>(args.maps_grad) + place;
    const T* first = partial + (args.groups ? k * own : k) * args.S;  // of block 0 of this map
    const int64_t stride = (args.groups ? 1 : args.K) * args.S;
    double product = 0;
    for (int64_t s = 0; s < args.S; s++) {
      double P = 0;
      for (int64_t b = 0; b < own; b++) P += static_cast<double>(first[b * stride + s]);
      out[s] = static_cast<T>(P);
      product += P * static_cast<double>(map[s]);
    }
    const T shift = static_cast<T>(product / divisor(map, args.S, args.eps));
    for (int64_t s = 0; s < args.S; s++) out[s] -= shift;
  }
}

}  // namespace

int64_t pose_pool_room(const PosePoolArgs& args) {
  return (args.groups ? 1 : args.K) * kPosePoolChannels * (args.dtype == Dtype::kFloat64 ? 8 : 4);
}
void pose_pool(const PosePoolArgs& args, int64_t begin, int64_t end, void* workspace) {
  const int64_t blocks = pose_pool_blocks(args);
  by_dtype(args.dtype, [&]<class In>() {
    for (int64_t t = begin; t < end; t++) forward<In>(args, Block(args, t / blocks, t % blocks), workspace);
  });
}
void pose_pool_backward(const PosePoolArgs& args, int64_t begin, int64_t end, void* workspace) {
  const int64_t blocks = pose_pool_blocks(args);
  by_dtype(args.dtype, [&]<class In>() {
    for (int64_t t = begin; t < end; t++) backward<In>(args, Block(args, t / blocks, t % blocks), t, workspace);
  });
}
void pose_pool_maps_grad(const PosePoolArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n++)
    args.dtype == Dtype::kFloat64 ? maps_gradient<double>(args, n) : maps_gradient<float>(args, n);
}

}  // namespace nd::cpu::ND_CPU_LEVEL
