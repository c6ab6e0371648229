// Weighted mean and centred second moment of streamed rows (Gram matrix of the shifted rows, symmetric half only):
//
//     W = sum_r w_r,   mean = sum_r w_r x_r / W,   moment = sum_r w_r (x_r - mean) (x_r - mean)'
//
// Method: a pivot p near the mean (that of at most 64 rows) is subtracted while rows are packed, y_r = sqrt(w_r) (x_r -
// p), so that no digits are lost to a common offset; then moment = sum_r y_r y_r' - W d d' with d = mean - p, which is
// small. float32, bfloat16 and float16 rows are multiplied in float32 and flushed into float64 every kBlockRows rows;
// float64 rows are float64 throughout.
//
// Floor: rows * n (n + 1) / 2 multiply-adds; for n >= 200 or so memory traffic hides behind them. The tiles on the
// diagonal add about 16 / n to that.
//
// Layout: a chunk of rows is packed as blocks of kBlockRows rows, each block as panels of P = 3 registers of columns:
// packed[block][panel][row][P]. The micro-kernel keeps NR x P sums in registers and reads one panel row and NR scalars
// of another panel a step, so one packing serves both factors. Packed chunks stay in the caches. Sums are
// the lower triangle, rows j, columns i <= j, mirrored at the end.
//
// Threads: packing is split by strips of rows, products by tiles of kTile x kTile entries. Every entry is summed by one
// task in row order, whatever the number of threads. Matrices of few tiles are summed in up to 16 slabs of blocks
// (block number modulo slabs), added in slab order.
//
// Limits: deviations from the pivot whose squares overflow float32 (beyond about 1e19) give infinities; such data has
// to come as float64. NaN and infinities in x reach every entry of their column.
#include <cstring>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd_convert.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int64_t kBlockRows = 384;     // rows summed in T before the flush into float64
constexpr int64_t kStripsPerBlock = 4;  // a strip is the rows of one packing task
constexpr int64_t kStripRows = kBlockRows / kStripsPerBlock;
constexpr int64_t kPackRows = 8;  // rows packed together: their column sums share one conversion to float64
constexpr int64_t kTile = 96;     // columns of a task's tile; a multiple of every P below
constexpr int64_t kChunkBytes = int64_t{2} << 20;  // aim for one packed chunk, times the threads up to kMaxChunkThreads
constexpr int64_t kMaxChunkThreads = 8;
constexpr int64_t kPivotRows = 64;
constexpr int64_t kMinTasks = 16;
static_assert(kBlockRows % kStripsPerBlock == 0 && kStripRows % kPackRows == 0);

// A result beyond this size comes from memory again for every chunk: larger chunks then, though they fill the caches.
constexpr int64_t kLargeResultBytes = int64_t{16} << 20;
constexpr int64_t kLargeResultBlocks = 3;

// Float32 data with a large offset lie on a coarse grid; so do their squares, which then round to one side in a float32
// sum. A factor off every grid makes that rounding random again. float64 has digits to spare.
template <class T>
constexpr T kSpread = sizeof(T) == 4 ? T(0.7236068) : T(1);

// Register blocking: NR rows x kRegisters vectors of sums.
template <class T>
struct Panel {
  static constexpr int W = Vec<T>::W;
  static constexpr int kRegisters = 3;
  static constexpr int P = kRegisters * W;
  static constexpr int kWanted = ND_VECTOR_BYTES == 64 ? 8 : 4;  // of 32 and 16 registers
  static constexpr int NR = kWanted < W ? kWanted : W;
  static_assert(W % NR == 0, "a row group must not cross a register");
  static_assert(kTile % P == 0, "a tile is made of whole panels");
};

// ------------------------------------------------------------------------------------------------ plan

// Sizes of one problem and addresses in its workspace.
template <class T>
struct Layout {
  int64_t n, padded;  // columns, columns rounded up to whole panels
  int64_t blocks;     // of kBlockRows rows
  int64_t blocks_per_chunk;
  int64_t tiles, slabs;  // tiles a side; slabs of blocks
  T* pivot;              // [padded] zero beyond n
  double* sums;          // [slabs, padded] sum_r w_r (x_r - p)
  double* strip_sums;    // [strips_per_chunk, padded] the same, by strip
  double* slab_moments;  // [slabs - 1, n, n]; slab 0 sums in the output
  T* packed;             // [blocks_per_chunk, padded / P, kBlockRows, P]
  int64_t bytes;

  explicit Layout(const MomentsArgs& args) {
    n = args.n;
    padded = ceil_div(n, Panel<T>::P) * Panel<T>::P;
    blocks = ceil_div(args.rows, kBlockRows);
    tiles = ceil_div(n, kTile);
    slabs = larger(1, smaller(blocks, kMinTasks / num_tiles()));
    const int64_t block_bytes = kBlockRows * padded * static_cast<int64_t>(sizeof(T));
    const int64_t fewest = larger(slabs, n * n * 8 > kLargeResultBytes ? kLargeResultBlocks : 1);
    const int64_t wanted = kChunkBytes * smaller(args.threads, kMaxChunkThreads) / block_bytes;
    blocks_per_chunk = larger(1, smaller(blocks, larger(fewest, wanted)));
    bytes = 0;
    char* base = static_cast<char*>(args.workspace);
    const auto place = [&]<class U>(U*& pointer, int64_t count) {
      pointer = reinterpret_cast<U*>(base ? base + bytes : nullptr);
      bytes += ceil_div(count * static_cast<int64_t>(sizeof(U)), 64) * 64;
    };
    place(pivot, padded);
    place(sums, slabs * padded);
    place(strip_sums, strips_per_chunk() * padded);
    place(slab_moments, (slabs - 1) * n * n);
    place(packed, blocks_per_chunk * kBlockRows * padded);
  }

  int64_t num_tiles() const { return tiles * (tiles + 1) / 2; }
  int64_t strips_per_chunk() const { return blocks_per_chunk * kStripsPerBlock; }
  int64_t blocks_in(int64_t chunk) const { return smaller(blocks_per_chunk, blocks - chunk * blocks_per_chunk); }
  int64_t rows_in(int64_t block, int64_t rows) const { return smaller(kBlockRows, rows - block * kBlockRows); }
  T* panel(int64_t block_of_chunk, int64_t column) const {  // column: a multiple of P
    return packed + (block_of_chunk * padded + column) * kBlockRows;
  }
  double* slab_moment(int64_t slab, double* moment) const { return slab ? slab_moments + (slab - 1) * n * n : moment; }
};

// Tile number -> (row, column), column <= row, row by row.
struct Tile {
  int64_t row = 0, column = 0;
  explicit Tile(int64_t number) {
    while (number > row) number -= ++row;
    column = number;
  }
};

// ------------------------------------------------------------------------------------------------ pivot

// One step of the pivot: sum += weight (row - first) in float64.
template <class T, class In>
void add_row(double* sum, const In* row, const In* first, T weight, int64_t n) {
  constexpr int W = Vec<T>::W;
  int64_t c = 0;
  for (; c + W <= n; c += W) add_to(sum + c, weight * (load_as<T>(row + c) - load_as<T>(first + c)));
  if (c < n) add_to(sum + c, weight * (load_part_as<T>(row + c, n - c) - load_part_as<T>(first + c, n - c)));
}

// Sets W and the pivot: the weighted mean of at most kPivotRows rows of positive weight, evenly spread. It is taken
// relative to the first of them: a constant column is its own pivot exactly, and its variance exactly 0.
template <class T, class In>
void start(const MomentsArgs& args) {
  const Layout<T> at(args);
  double weight_sum = 0;
  int64_t used = 0;
  for (int64_t r = 0; args.weights && r < args.rows; r++) {
    weight_sum += args.weights[r];
    used += args.weights[r] != 0;
  }
  if (!args.weights) {
    weight_sum = static_cast<double>(args.rows);
    used = args.rows;
  }
  *args.weight_sum = weight_sum;

  std::memset(at.pivot, 0, static_cast<size_t>(at.padded) * sizeof(T));
  std::memset(at.sums, 0, static_cast<size_t>(at.slabs * at.padded) * sizeof(double));
  double* sum = at.strip_sums;
  std::memset(sum, 0, static_cast<size_t>(at.padded) * sizeof(double));
  const In* first = nullptr;
  const int64_t step = ceil_div(used, kPivotRows);
  double taken = 0;
  for (int64_t r = 0, skip = 0; r < args.rows; r++) {
    const double weight = args.weights ? args.weights[r] : 1;
    if (weight == 0 || skip-- > 0) continue;
    skip = step - 1;
    const In* row = static_cast<const In*>(args.x) + r * args.row_stride;
    if (!first) first = row;
    add_row<T>(sum, row, first, static_cast<T>(weight), args.n);
    taken += weight;
  }
  if (!first) return;
  constexpr int W = Vec<T>::W;
  for (int64_t c = 0; c < args.n; c += W) {
    const int64_t count = smaller(W, args.n - c);
    const typename Vec<T>::t base = load_part_as<T>(first + c, count);
    for (int64_t i = 0; i < count; i++) at.pivot[c + i] = base[i] + static_cast<T>(sum[c + i] / taken);
  }
}

// ------------------------------------------------------------------------------------------------ pack

// Factors of a group of rows.
template <class T>
struct RowFactors {
  T product[kPackRows];  // kSpread sqrt(w): y = product (x - p)
  T sum[kPackRows];      // sqrt(w) / kSpread: w (x - p) = sum y

  void set(int r, double weight) {
    const double root = __builtin_sqrt(weight);
    product[r] = static_cast<T>(root * kSpread<T>);
    sum[r] = static_cast<T>(root / kSpread<T>);
  }
};

// y of R rows and W columns, and their share of sum_r w_r (x_r - p).
template <class T, int64_t R, bool kWeighted, class Load>
ND_INLINE void pack_group(Load load_row, typename Vec<T>::t pivot, const RowFactors<T>& factors, T* packed,
                          double* sums) {
  typename Vec<T>::t y[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    if (kWeighted && factors.product[r] == 0) {
      y[r] = typename Vec<T>::t{};
    } else {
      y[r] = (load_row(r) - pivot) * factors.product[r];
    }
    store(packed + r * Panel<T>::P, y[r]);
    y[r] *= factors.sum[r];
  }
#pragma GCC unroll 3
  for (int width = R / 2; width; width /= 2) {
#pragma GCC unroll 4
    for (int r = 0; r < width; r++) y[r] += y[r + width];
  }
  add_to(sums, y[0]);
}

// Packs R rows of x; `panel`: their place in the first panel of a block.
template <class T, int64_t R, bool kWeighted, class In>
void pack_rows(const Layout<T>& at, const In* x, int64_t row_stride, const RowFactors<T>& factors, T* panel,
               double* sums) {
  constexpr int W = Panel<T>::W, P = Panel<T>::P;
  for (int64_t c = 0; c < at.n; c += P, panel += kBlockRows * P) {
    for (int v = 0; v < P && c + v < at.n; v += W) {
      const In* from = x + c + v;
      const int64_t left = at.n - c - v;
      const typename Vec<T>::t pivot = load(at.pivot + c + v);
      double* sum = sums + c + v;
      if (left >= W) {
        pack_group<T, R, kWeighted>([=](int r) { return load_as<T>(from + r * row_stride); }, pivot, factors, panel + v,
                                    sum);
      } else {
        pack_group<T, R, kWeighted>([=](int r) { return load_part_as<T>(from + r * row_stride, left); }, pivot, factors,
                                    panel + v, sum);
      }
    }
  }
}

template <class T, bool kWeighted, class In>
void pack_strip(const MomentsArgs& args, const Layout<T>& at, int64_t chunk, int64_t strip) {
  const int64_t block = chunk * at.blocks_per_chunk + strip / kStripsPerBlock;
  const int64_t begin = strip % kStripsPerBlock * kStripRows;  // in the block
  const int64_t end = smaller(begin + kStripRows, at.rows_in(block, args.rows));
  double* sums = at.strip_sums + strip * at.padded;
  std::memset(sums, 0, static_cast<size_t>(at.padded) * sizeof(double));
  RowFactors<T> factors;
  for (int g = 0; g < kPackRows; g++) factors.set(g, 1);
  for (int64_t r = begin; r < end;) {
    const int64_t row = block * kBlockRows + r;
    const bool full = r + kPackRows <= end;
    const int64_t group = full ? kPackRows : 1;
    if constexpr (kWeighted) {
      for (int g = 0; g < group; g++) factors.set(g, args.weights[row + g]);
    }
    const In* from = static_cast<const In*>(args.x) + row * args.row_stride;
    T* panel = at.panel(strip / kStripsPerBlock, 0) + r * Panel<T>::P;
    if (full) {
      pack_rows<T, kPackRows, kWeighted>(at, from, args.row_stride, factors, panel, sums);
    } else {
      pack_rows<T, 1, kWeighted>(at, from, args.row_stride, factors, panel, sums);
    }
    r += group;
  }
}

template <class T, class In>
void pack(const MomentsArgs& args, int64_t chunk, int64_t begin, int64_t end) {
  const Layout<T> at(args);
  for (int64_t strip = begin; strip < smaller(end, at.blocks_in(chunk) * kStripsPerBlock); strip++) {
    if (args.weights) {
      pack_strip<T, true, In>(args, at, chunk, strip);
    } else {
      pack_strip<T, false, In>(args, at, chunk, strip);
    }
  }
}

// ------------------------------------------------------------------------------------------------ products

// m[j][i] += sum_{r < rows} b[r][j] a[r][i] for j < NR, i < V * W; a, b: packed panels. Only the first valid_rows x
// valid_columns entries of m exist.
template <class T, int V>
void multiply_panels(const T* a, const T* b, int64_t rows, double* m, int64_t stride, int64_t valid_rows,
                     int64_t valid_columns) {
  constexpr int W = Panel<T>::W, P = Panel<T>::P, NR = Panel<T>::NR;
  constexpr int64_t kPrefetchDistance = 8, kPrefetchRows = 128;  // measured
  typename Vec<T>::t sum[NR][V] = {};
  const auto accumulate = [&](int64_t count) __attribute__((always_inline)) {
    for (int64_t r = 0; r < count; r++, a += P, b += P) {
      __builtin_prefetch(b + kPrefetchDistance * P);
      typename Vec<T>::t x[V];
      for (int v = 0; v < V; v++) x[v] = load(a + v * W);
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) {
        for (int v = 0; v < V; v++) sum[j][v] += b[j] * x[v];
      }
    }
  };
  // The sums are asked for late: the panels streaming by would push them out of the first-level cache again.
  const int64_t last = smaller(rows, kPrefetchRows);
  accumulate(rows - last);
  for (int64_t j = 0; j < smaller(NR, valid_rows); j++) {
    for (int i = 0; i < V * W; i += 8) __builtin_prefetch(m + j * stride + i, 1);
  }
  accumulate(last);

  if (valid_rows >= NR && valid_columns >= V * W) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) add_to(m + j * stride + v * W, sum[j][v]);
    }
    return;
  }
  T edge[NR][V * W];
#pragma GCC unroll 8
  for (int j = 0; j < NR; j++) {
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) store(&edge[j][v * W], sum[j][v]);
  }
  for (int64_t j = 0; j < smaller(NR, valid_rows); j++) {
    for (int64_t i = 0; i < smaller(V * W, valid_columns); i++) m[j * stride + i] += edge[j][i];
  }
}

// Adds one packed block to a tile of the lower triangle.
template <class T>
void multiply_tile(const Layout<T>& at, Tile tile, int64_t block_of_chunk, int64_t rows, double* moment) {
  constexpr int W = Panel<T>::W, P = Panel<T>::P, NR = Panel<T>::NR;
  const int64_t n = at.n;
  const int64_t j_end = smaller(n, (tile.row + 1) * kTile), i_end = smaller(n, (tile.column + 1) * kTile);
  for (int64_t i = tile.column * kTile; i < i_end; i += P) {
    const T* a = at.panel(block_of_chunk, i);
    for (int64_t j = larger(i, tile.row * kTile); j < j_end; j += NR) {
      const T* b = at.panel(block_of_chunk, j / P * P) + j % P;
      double* m = moment + j * n + i;
      const int64_t last_column = smaller(j + NR, n) - 1 - i;  // those beyond lie above the diagonal
      if (last_column >= 2 * W) {
        multiply_panels<T, 3>(a, b, rows, m, n, n - j, n - i);
      } else if (last_column >= W) {
        multiply_panels<T, 2>(a, b, rows, m, n, n - j, n - i);
      } else {
        multiply_panels<T, 1>(a, b, rows, m, n, n - j, n - i);
      }
    }
  }
}

template <class T>
void clear_tile(const Layout<T>& at, Tile tile, double* moment) {
  const int64_t begin = tile.column * kTile, width = smaller(at.n - begin, kTile);
  for (int64_t j = tile.row * kTile; j < smaller(at.n, (tile.row + 1) * kTile); j++) {
    std::memset(moment + j * at.n + begin, 0, static_cast<size_t>(width) * sizeof(double));
  }
}

// A task is a tile of one slab: its products and, on the diagonal, its column sums.
template <class T>
void multiply(const MomentsArgs& args, int64_t chunk, int64_t begin, int64_t end) {
  const Layout<T> at(args);
  for (int64_t task = begin; task < end; task++) {
    const Tile tile(task / at.slabs);
    const int64_t slab = task % at.slabs;
    double* moment = at.slab_moment(slab, args.moment);
    if (chunk == 0) clear_tile(at, tile, moment);
    for (int64_t b = 0; b < at.blocks_in(chunk); b++) {
      const int64_t block = chunk * at.blocks_per_chunk + b;
      if (block % at.slabs != slab) continue;
      multiply_tile(at, tile, b, at.rows_in(block, args.rows), moment);
      if (tile.row != tile.column) continue;
      double* sums = at.sums + slab * at.padded;
      const double* strip_sums = at.strip_sums + b * kStripsPerBlock * at.padded;
      const int64_t c_end = smaller(at.n, (tile.row + 1) * kTile);
      for (int strip = 0; strip < kStripsPerBlock; strip++) {
        for (int64_t c = tile.row * kTile; c < c_end; c++) sums[c] += strip_sums[strip * at.padded + c];
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ finish

// d = mean - p of the columns of one tile.
template <class T>
void shifts_of(const MomentsArgs& args, const Layout<T>& at, int64_t tile, double* d) {
  const int64_t begin = tile * kTile, count = smaller(kTile, at.n - begin);
  const double scale = *args.weight_sum > 0 ? 1 / *args.weight_sum : 0;
  for (int64_t c = 0; c < count; c++) {
    double sum = 0;
    for (int64_t s = 0; s < at.slabs; s++) sum += at.sums[s * at.padded + begin + c];
    d[c] = sum * scale;
  }
}

// Adds the slabs of a tile, moves it from the pivot to the mean, mirrors it.
template <class T>
void finish(const MomentsArgs& args, int64_t begin, int64_t end) {
  const Layout<T> at(args);
  const int64_t n = at.n;
  const double weight = *args.weight_sum;
  const double unspread = 1 / (static_cast<double>(kSpread<T>) * kSpread<T>);
  double d_row[kTile], d_column[kTile];
  for (int64_t task = begin; task < end; task++) {
    const Tile tile(task);
    const int64_t j0 = tile.row * kTile, i0 = tile.column * kTile;
    const int64_t j_end = smaller(n, j0 + kTile);
    if (at.blocks == 0) clear_tile(at, tile, args.moment);
    shifts_of(args, at, tile.row, d_row);
    shifts_of(args, at, tile.column, d_column);
    for (int64_t j = j0; j < j_end; j++) {
      const int64_t i_end = smaller(j + 1, i0 + kTile);
      double* row = args.moment + j * n;
      for (int64_t s = 1; s < at.slabs; s++) {
        const double* more = at.slab_moment(s, args.moment) + j * n;
        for (int64_t i = i0; i < i_end; i++) row[i] += more[i];
      }
      const double shift = weight * d_row[j - j0];
      for (int64_t i = i0; i < i_end; i++) row[i] = row[i] * unspread - shift * d_column[i - i0];
      if (tile.row == tile.column && row[j] < 0) row[j] = 0;  // rounding of a variance far below the squared shift
    }
    for (int64_t i = i0; i < smaller(n, i0 + kTile); i++) {
      for (int64_t j = larger(j0, i + 1); j < j_end; j++) args.moment[i * n + j] = args.moment[j * n + i];
    }
    if (tile.row == tile.column) {
      for (int64_t j = j0; j < j_end; j++) {
        args.mean[j] = weight > 0 ? static_cast<double>(at.pivot[j]) + d_row[j - j0] : 0;
      }
    }
  }
}

template <class T>
MomentsPlan plan(const MomentsArgs& args) {
  const Layout<T> at(args);
  return {.chunks = ceil_div(at.blocks, at.blocks_per_chunk),
          .pack_tasks = at.strips_per_chunk(),
          .multiply_tasks = at.num_tiles() * at.slabs,
          .finish_tasks = at.num_tiles(),
          .workspace_bytes = at.bytes};
}

}  // namespace

MomentsPlan moments_plan(const MomentsArgs& args) {
  return args.dtype == Dtype::kFloat64 ? plan<double>(args) : plan<float>(args);
}

void moments_start(const MomentsArgs& args) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return start<float, float>(args);
    case Dtype::kFloat64:
      return start<double, double>(args);
    case Dtype::kBfloat16:
      return start<float, Bfloat16>(args);
    case Dtype::kFloat16:
      return start<float, Float16>(args);
  }
}

void moments_pack(const MomentsArgs& args, int64_t chunk, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return pack<float, float>(args, chunk, begin, end);
    case Dtype::kFloat64:
      return pack<double, double>(args, chunk, begin, end);
    case Dtype::kBfloat16:
      return pack<float, Bfloat16>(args, chunk, begin, end);
    case Dtype::kFloat16:
      return pack<float, Float16>(args, chunk, begin, end);
  }
}

void moments_multiply(const MomentsArgs& args, int64_t chunk, int64_t begin, int64_t end) {
  args.dtype == Dtype::kFloat64 ? multiply<double>(args, chunk, begin, end) : multiply<float>(args, chunk, begin, end);
}

void moments_finish(const MomentsArgs& args, int64_t begin, int64_t end) {
  args.dtype == Dtype::kFloat64 ? finish<double>(args, begin, end) : finish<float>(args, begin, end);
}

}  // namespace nd::cpu::ND_CPU_LEVEL
