// The Fourier filter of images and its gradients, one read and one write of each image:
//
//     y = irfft2(rfft2(x) K),    dx = irfft2(rfft2(g) conj(K)),    dK = c_v sum_b conj(X_b) G_b / (H W)
//
// x, y, g, dx [B, H, W, C] or [B, C, H, W], float32, bfloat16 or float16; K, dK [H, W/2 + 1, C] complex float32. c_v is
// 1 in columns v = 0 and W/2, and there only (K[u] + conj K[-u]) / 2 counts, the part of K that is consistent with real
// images; c_v is 2 elsewhere.
//
// Method: two images of a batch are the real and imaginary part of one, z = x_b + i x_b+1, whose full spectrum is
// multiplied by the Hermitian extension of K. Both parts of the inverse are the two results, without any unpacking, at
// half the flops. P = sum over pairs of conj(Z_x) Z_g has dK in its symmetric part, c_v (P(k) + conj P(-k)) / (2 H W).
// K is projected and extended where it is read, 8 bytes a coefficient from L2: no kernel before, no copy of K.
//
// Floor, bytes an element of x: 8 forward and 12 backward in float32, half of that in 16 bits, and 4 / B for K.
// 128 x 14 x 14 x 384, float32, at 3 TB/s: 26 and 39 us. The flops, at most 40 an element, take a fifth of that.
//
// Layout: a block owns a few channels of a pair, [W][H][channels] complex in shared memory, and loops over pairs. A
// line of N = M S points is held by S threads, M = 7, 14 or 16 points each in registers: M-point codelets, then S = 2
// or 4 by log2 S exchanges between lanes. Rows come from global memory to registers, are transformed and written to
// shared memory; columns are transformed, multiplied and transformed back in place; rows are transformed back and
// stored: two trips through shared memory and two barriers a pair. Frequencies stay where the transform leaves them:
// register k of part p of a line has frequency k + M reverse(p). Lanes run over channels first, so that global accesses
// cover 8 to 128 bytes in a row; the parts of a line are the highest bits of the lane. Tiles of less than 32 bytes of
// channels (56 and 64; in 16 bits 28 and 32 too) share sectors with their neighbours, which L2 holds. Whole planes
// (channels before the image) pass through shared memory once more on both sides and are loaded along the image.
//
// Backward: the spectrum of x waits in registers while that of g is made, and P stays there over all pairs: 6 M
// registers. There are as many blocks as run at once. Each writes its P to the workspace, [splits][H][W][C]; a second
// kernel adds the splits in order. No atomics on floats: results repeat bit for bit.
//
// Limits: H x W of the list below, up to 2^19 channels. A plane with NaN or infinity is NaN, dK of its channel not
// finite; the other image of the pair is not touched. Rounding errors are relative to the larger image of a pair, and
// one whose spectrum overflows spoils its partner.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "neuraldeps/cuda_api.h"
#include "neuraldeps/device.hpp"
#include "neuraldeps/fft_codelets.hpp"

namespace nd::fourier_filter {

constexpr int64_t kForwardBlocks = 4096;  // of a launch at most: many, so that the last ones do not run alone
constexpr int64_t kMostChannels = int64_t{1} << 19;
constexpr int64_t kLongestSum = 64;  // pairs that one block adds up

using Complex = fft::Complex<float>;
using fft::Dft;

// --------------------------------------------------------------------------------------------------------------- lines

// A line of N points in S threads of a warp: point part + S j in register j, then frequency k + M reverse(part) in
// register k.
template <int N>
struct Line {
  static constexpr int S = N <= 16 ? 1 : N <= 32 ? 2 : 4, M = N / S;
  static constexpr int kRoots = S > 1 ? N : 0;  // entries of a table in shared memory

  static __device__ __forceinline__ int reverse(int part) { return S == 4 ? (part >> 1) | ((part & 1) << 1) : part; }

  // Cosine and sine of 2 pi part k / N at k S + part, with the rounding error of the angle put right.
  static __device__ __forceinline__ void make_roots(Complex* table, int thread) {
    if (thread >= kRoots) return;
    constexpr float kPi = 3.14159265358979323846f;
    const float numerator = static_cast<float>(2 * (thread % S) * (thread / S)), angle = numerator / N;
    const float rest = kPi * (fmaf(-angle, N, numerator) / N);
    float s, c;
    sincospif(angle, &s, &c);
    table[thread] = {fmaf(-rest, s, c), fmaf(rest, c, s)};
  }

  // z_k exp(-+ 2 pi i part k / N).
  template <bool kInverse>
  static __device__ __forceinline__ void turn(Complex (&z)[M], int part, const Complex* table) {
#pragma unroll
    for (int k = 1; k < M; k++) {
      const Complex root = table[k * S + part];
      z[k] = fft::turned<kInverse>(z[k], root.re, root.im);
    }
  }

  // Sums with, or differences from, the thread whose part differs in `bit`.
  static __device__ __forceinline__ void exchange(Complex (&z)[M], int part, int bit) {
    const float sign = part & bit ? -1.0f : 1.0f;
#pragma unroll
    for (int k = 0; k < M; k++) {
      const float re = __shfl_xor_sync(kFullWarp, z[k].re, bit * (kWarpSize / S));
      const float im = __shfl_xor_sync(kFullWarp, z[k].im, bit * (kWarpSize / S));
      z[k] = {fmaf(sign, z[k].re, re), fmaf(sign, z[k].im, im)};
    }
  }

  // Part 3 times -i, or i.
  template <bool kInverse>
  static __device__ __forceinline__ void turn_last(Complex (&z)[M], int part) {
#pragma unroll
    for (int k = 0; k < M; k++) {
      const Complex turned = fft::turned_by<1, 4, kInverse>(z[k]);
      z[k] = {part == 3 ? turned.re : z[k].re, part == 3 ? turned.im : z[k].im};
    }
  }

  static __device__ __forceinline__ void forward(Complex (&z)[M], int part, const Complex* table) {
    Dft<M, false>::run(z);
    if constexpr (S > 1) turn<false>(z, part, table);
    if constexpr (S == 4) {
      exchange(z, part, 2);
      turn_last<false>(z, part);
    }
    if constexpr (S > 1) exchange(z, part, 1);
  }

  static __device__ __forceinline__ void inverse(Complex (&z)[M], int part, const Complex* table) {
    if constexpr (S > 1) exchange(z, part, 1);
    if constexpr (S == 4) {
      turn_last<true>(z, part);
      exchange(z, part, 2);
    }
    if constexpr (S > 1) turn<true>(z, part, table);
    Dft<M, true>::run(z);
  }
};

// --------------------------------------------------------------------------------------------------------------- tiles

// What a block holds, and the threads that work on it; kBlocksPerSm caps registers.
template <int H, int W, int kChannels_, int kThreads_, int kBlocksPerSm_>
struct Tile {
  using Row = Line<W>;
  using Column = Line<H>;
  static constexpr int kHeight = H, kWidth = W, kHalf = W / 2 + 1;
  static constexpr int kChannels = kChannels_, kThreads = kThreads_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kRowTasks = H * kChannels * Row::S, kColumnTasks = W * kChannels * Column::S;
  // From one w to the next; the padding puts the lines that a warp works on into different banks.
  static constexpr int kPitch = H * kChannels + (kChannels >= 16 ? 4 : 8);
  static constexpr int kRowRoots = W * kPitch, kColumnRoots = H == W ? kRowRoots : kRowRoots + Row::kRoots;
  static constexpr size_t kBytes = sizeof(Complex) * (kColumnRoots + Column::kRoots);
  static_assert(kThreads % kWarpSize == 0 && kRowTasks % kThreads == 0 && kColumnTasks % kThreads == 0,
                "whole warps, and as many tasks for each thread");
};

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 2, kFloat16 = 3 };

struct Arguments {
  int64_t batch;
  int channels, dtype;
  bool planes, adjoint;  // adjoint: conj(K)
  const float2* weight;
  int tiles, pairs, pairs_per_block;
};

__device__ __forceinline__ float value_of(float x) { return x; }
__device__ __forceinline__ float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float value_of(__half x) { return __half2float(x); }
__device__ __forceinline__ void put(float* p, float x) { *p = x; }
__device__ __forceinline__ void put(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }
__device__ __forceinline__ void put(__half* p, float x) { *p = __float2half(x); }

// f(pointer to the type of the dtype).
template <class F>
__device__ __forceinline__ void with_dtype(void* images, int dtype, F f) {
  if (dtype == kFloat32)
    f(static_cast<float*>(images));
  else if (dtype == kBfloat16)
    f(static_cast<__nv_bfloat16*>(images));
  else
    f(static_cast<__half*>(images));
}

// The calling thread, read anew at each call: what derives from it would otherwise stay in registers throughout.
__device__ __forceinline__ int thread_index() {
#if defined(__CUDA_ARCH__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

__device__ __forceinline__ float nan_if(int mark) { return mark ? __int_as_float(0x7fc00000) : 0.0f; }

// One of the S threads of a line of one channel.
template <class Line, int kChannels>
struct Task {
  int line, part, channel;
  __device__ __forceinline__ explicit Task(int t) {
    constexpr int kInner = kWarpSize / Line::S;
    const int index = Line::S == 1 ? t : t / kWarpSize * kInner + t % kInner;
    part = t % kWarpSize / kInner;
    if (Line::S == 1) part = 0;
    channel = index % kChannels;
    line = index / kChannels;
  }
};

// A thread of a block at work on its channels.
template <class Tile>
struct Worker {
  using Row = typename Tile::Row;
  using Column = typename Tile::Column;
  using RowTask = Task<Row, Tile::kChannels>;
  using ColumnTask = Task<Column, Tile::kChannels>;
  static constexpr int H = Tile::kHeight, W = Tile::kWidth, CH = Tile::kChannels;
  static constexpr int kRowStep = Row::S * Tile::kPitch, kColumnStep = Column::S * CH;

  const Arguments& args;
  Complex* image;  // [W][H][CH] with kPitch, then the tables of roots
  int* spoiled;    // [2][2][CH]: by parity of the pair, image of the pair, channel: has it NaN or infinity?
  int first_channel;

  __device__ __forceinline__ Worker(const Arguments& args, Complex* image, int* spoiled)
      : args(args), image(image), spoiled(spoiled), first_channel(static_cast<int>(blockIdx.x) % args.tiles * CH) {
    Row::make_roots(image + Tile::kRowRoots, thread_index());
    if (H != W) Column::make_roots(image + Tile::kColumnRoots, thread_index());
    for (int i = thread_index(); i < 4 * CH; i += Tile::kThreads) spoiled[i] = 0;
    __syncthreads();
  }

  __device__ __forceinline__ int split() const { return static_cast<int>(blockIdx.x) / args.tiles; }
  __device__ __forceinline__ int first_pair() const { return split() * args.pairs_per_block; }
  __device__ __forceinline__ int end_pair() const { return min(first_pair() + args.pairs_per_block, args.pairs); }
  __device__ __forceinline__ bool owns(int channel) const { return first_channel + channel < args.channels; }
  __device__ __forceinline__ bool has_second(int pair) const { return 2 * int64_t{pair} + 1 < args.batch; }
  __device__ __forceinline__ int64_t image_size() const { return int64_t{H * W} * args.channels; }

  __device__ __forceinline__ int* marks_of(int pair) const { return spoiled + (pair & 1) * 2 * CH; }

  // Between two barriers, so that all have read the marks of the pair before and none has set those of the next.
  __device__ __forceinline__ void clear_next_marks(int pair) const {
    int* const next = marks_of(pair + 1);
    for (int i = thread_index(); i < 2 * CH; i += Tile::kThreads) next[i] = 0;
  }

  // x, or 0 and a mark if it is not finite.
  static __device__ __forceinline__ float finite(float x, int* mark) {
    if (fabsf(x) <= 3.4028234e38f) return x;
    atomicOr(mark, 1);
    return 0.0f;
  }

  // ---- images in global memory ----

  __device__ __forceinline__ int64_t row_offset(int pair, const RowTask& t) const {
    return 2 * pair * image_size() + int64_t{t.line * W + t.part} * args.channels + first_channel + t.channel;
  }

  // kMarked: what is not finite becomes 0, with a mark.
  template <bool kMarked>
  __device__ __forceinline__ void load_row(const void* images, int pair, const RowTask& t, Complex (&z)[Row::M]) const {
#pragma unroll
    for (int j = 0; j < Row::M; j++) z[j] = {0.0f, 0.0f};
    if (!owns(t.channel)) return;
    const bool two = has_second(pair);
    const int64_t second = two ? image_size() : 0;
    with_dtype(const_cast<void*>(images), args.dtype, [&](const auto* x) {
      x += row_offset(pair, t);
      const auto* x2 = x + second;
#pragma unroll
      for (int j = 0; j < Row::M; j++, x += Row::S * args.channels, x2 += Row::S * args.channels)
        z[j] = {value_of(*x), value_of(*x2)};
    });
    int* const marks = marks_of(pair) + t.channel;
#pragma unroll
    for (int j = 0; j < Row::M; j++) {
      if (!two) z[j].im = 0.0f;
      if (kMarked) z[j] = {finite(z[j].re, marks), finite(z[j].im, marks + CH)};
    }
  }

  __device__ __forceinline__ void store_row(void* images, int pair, const RowTask& t,
                                            const Complex (&z)[Row::M]) const {
    if (!owns(t.channel)) return;
    const bool two = has_second(pair);
    const int* const marks = marks_of(pair) + t.channel;
    const float spoil_re = nan_if(marks[0]), spoil_im = nan_if(marks[CH]);
    with_dtype(images, args.dtype, [&](auto* y) {
      y += row_offset(pair, t);
      auto* y2 = y + image_size();
#pragma unroll
      for (int j = 0; j < Row::M; j++, y += Row::S * args.channels, y2 += Row::S * args.channels) {
        put(y, z[j].re + spoil_re);
        if (two) put(y2, z[j].im + spoil_im);
      }
    });
  }

  // f(offset, channel, place in shared memory) for the points of the planes, lanes over up to 4 channels and then along
  // the image.
  template <class F>
  __device__ __forceinline__ void for_points(int pair, F f) const {
    constexpr int kLow = CH < 4 ? CH : 4, kPoints = H * W;
    for (int i = thread_index(); i < CH * kPoints; i += Tile::kThreads) {
      const int p = i / kLow % kPoints, channel = i / kLow / kPoints * kLow + i % kLow;
      if (!owns(channel)) continue;
      const int64_t plane = 2 * int64_t{pair} * args.channels + first_channel + channel;
      f(plane * kPoints + p, channel, image + p % W * Tile::kPitch + p / W * CH + channel);
    }
  }

  template <bool kMarked>
  __device__ __forceinline__ void load_planes(const void* images, int pair) const {
    const bool two = has_second(pair);
    const int64_t second = two ? image_size() : 0;
    int* const marks = marks_of(pair);
    with_dtype(const_cast<void*>(images), args.dtype, [&](const auto* x) {
      for_points(pair, [&](int64_t at, int channel, Complex* place) {
        Complex z = {value_of(x[at]), value_of(x[at + second])};
        if (!two) z.im = 0.0f;
        if (kMarked) z = {finite(z.re, marks + channel), finite(z.im, marks + CH + channel)};
        *place = z;
      });
    });
  }

  __device__ __forceinline__ void store_planes(void* images, int pair) const {
    const bool two = has_second(pair);
    const int* const marks = marks_of(pair);
    with_dtype(images, args.dtype, [&](auto* y) {
      for_points(pair, [&](int64_t at, int channel, const Complex* place) {
        put(y + at, place->re + nan_if(marks[channel]));
        if (two) put(y + at + image_size(), place->im + nan_if(marks[CH + channel]));
      });
    });
  }

  // ---- phases ----

  __device__ __forceinline__ void read_row(const RowTask& t, Complex (&z)[Row::M]) const {
    const Complex* const row = image + t.part * Tile::kPitch + t.line * CH + t.channel;
#pragma unroll
    for (int j = 0; j < Row::M; j++) z[j] = row[j * kRowStep];
  }
  __device__ __forceinline__ void write_row(const RowTask& t, const Complex (&z)[Row::M]) const {
    Complex* const row = image + t.part * Tile::kPitch + t.line * CH + t.channel;
#pragma unroll
    for (int j = 0; j < Row::M; j++) row[j * kRowStep] = z[j];
  }
  __device__ __forceinline__ Complex* column(const ColumnTask& t) const {
    return image + t.line * Tile::kPitch + t.part * CH + t.channel;
  }

  // The rows of a pair of images, transformed, to shared memory.
  template <bool kMarked>
  __device__ __forceinline__ void transform_rows(const void* images, int pair) const {
    if (args.planes) {
      load_planes<kMarked>(images, pair);
      __syncthreads();
    }
#pragma unroll 1
    for (int first = 0; first < Tile::kRowTasks; first += Tile::kThreads) {
      Complex z[Row::M];
      if (args.planes)
        read_row(RowTask(first + thread_index()), z);
      else
        load_row<kMarked>(images, pair, RowTask(first + thread_index()), z);
      Row::forward(z, RowTask(first + thread_index()).part, image + Tile::kRowRoots);
      write_row(RowTask(first + thread_index()), z);
    }
    __syncthreads();
  }

  // The rows transformed back and stored. A thread finds the rows that it will fill for the next pair: no barrier.
  __device__ __forceinline__ void store_rows(void* images, int pair) const {
#pragma unroll 1
    for (int first = 0; first < Tile::kRowTasks; first += Tile::kThreads) {
      Complex z[Row::M];
      read_row(RowTask(first + thread_index()), z);
      Row::inverse(z, RowTask(first + thread_index()).part, image + Tile::kRowRoots);
      if (args.planes)
        write_row(RowTask(first + thread_index()), z);
      else
        store_row(images, pair, RowTask(first + thread_index()), z);
    }
    if (args.planes) {
      __syncthreads();
      store_planes(images, pair);
      __syncthreads();
    }
  }

  // The spectrum of a column.
  __device__ __forceinline__ void read_column(const ColumnTask& t, Complex (&z)[Column::M]) const {
#pragma unroll
    for (int j = 0; j < Column::M; j++) z[j] = column(t)[j * kColumnStep];
    Column::forward(z, t.part, image + Tile::kColumnRoots);
  }

  // Frequencies v of a column, and u of its first register.
  static __device__ __forceinline__ int v_of(const ColumnTask& t) {
    return t.line / Row::S + Row::M * Row::reverse(t.line % Row::S);
  }
  static __device__ __forceinline__ int u_of(const ColumnTask& t) { return Column::M * Column::reverse(t.part); }

  // The spectrum of a column times that of the filter.
  __device__ __forceinline__ void filter_column(const ColumnTask& t, Complex (&z)[Column::M]) const {
    const int v = v_of(t), u = u_of(t);
    const bool mirrored = 2 * v > W, real = 2 * v % W == 0;
    const int channel = owns(t.channel) ? first_channel + t.channel : args.channels - 1;
    const float2* const K = args.weight + int64_t{mirrored ? W - v : v} * args.channels + channel;
    const int step = Tile::kHalf * args.channels;
    constexpr float kScale = 1.0f / (H * W);
    const float conjugation = mirrored != args.adjoint ? -kScale : kScale;
    const int along = mirrored ? -step : step;
    const float2 *f = K + int64_t{mirrored && u > 0 ? H - u : u} * step, *g = K + int64_t{u > 0 ? H - u : 0} * step;
#pragma unroll
    for (int k = 0; k < Column::M; k++) {
      float2 value = *f;
      if (real) value = {0.5f * (value.x + g->x), 0.5f * (value.y - g->y)};
      z[k] = z[k] * Complex{value.x * kScale, value.y * conjugation};
      // The opposite of frequency 0 is itself, that of 1 the last.
      f += k == 0 && u == 0 && mirrored ? (H - 1) * step : along;
      g += k == 0 && u == 0 ? (H - 1) * step : -step;
    }
  }

  // A column transformed back, to where it was read.
  __device__ __forceinline__ void store_column(const ColumnTask& t, Complex (&z)[Column::M]) const {
    Column::inverse(z, t.part, image + Tile::kColumnRoots);
#pragma unroll
    for (int j = 0; j < Column::M; j++) column(t)[j * kColumnStep] = z[j];
  }
};

// ------------------------------------------------------------------------------------------------------------- kernels

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    filter_images(Arguments args, const void* x, void* y) {
  using ColumnTask = typename Worker<Tile>::ColumnTask;
  __shared__ int spoiled[4 * Tile::kChannels];
  ND_DYNAMIC_SHARED(Complex, image);
  const Worker<Tile> worker(args, image, spoiled);
  for (int pair = worker.first_pair(); pair < worker.end_pair(); pair++) {
    worker.template transform_rows<true>(x, pair);
    worker.clear_next_marks(pair);
#pragma unroll 1
    for (int first = 0; first < Tile::kColumnTasks; first += Tile::kThreads) {
      Complex z[Tile::Column::M];
      worker.read_column(ColumnTask(first + thread_index()), z);
      worker.filter_column(ColumnTask(first + thread_index()), z);
      worker.store_column(ColumnTask(first + thread_index()), z);
    }
    __syncthreads();
    worker.store_rows(y, pair);
  }
}

// dx, and P of each split: sums [splits, H, W, C].
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    filter_gradients(Arguments args, const void* grad, const void* x, void* dx, float2* sums) {
  static_assert(Tile::kColumnTasks == Tile::kThreads, "a thread keeps the spectrum and the sums of a column");
  constexpr int H = Tile::kHeight, W = Tile::kWidth, M = Tile::Column::M;
  __shared__ int spoiled[4 * Tile::kChannels];
  ND_DYNAMIC_SHARED(Complex, image);
  const Worker<Tile> worker(args, image, spoiled);
  using ColumnTask = typename Worker<Tile>::ColumnTask;
  Complex P[M];
#pragma unroll
  for (int k = 0; k < M; k++) P[k] = {0.0f, 0.0f};
  for (int pair = worker.first_pair(); pair < worker.end_pair(); pair++) {
    Complex X[M], G[M];
    worker.template transform_rows<false>(x, pair);
    worker.read_column(ColumnTask(thread_index()), X);
    __syncthreads();
    worker.template transform_rows<true>(grad, pair);
    worker.clear_next_marks(pair);
    const ColumnTask t(thread_index());
    worker.read_column(t, G);
    const int* const marks = worker.marks_of(pair) + t.channel;
    const float spoil = nan_if(marks[0] | marks[Tile::kChannels]);
#pragma unroll
    for (int k = 0; k < M; k++) {
      P[k].re += X[k].re * G[k].re + X[k].im * G[k].im + spoil;
      P[k].im += X[k].re * G[k].im - X[k].im * G[k].re + spoil;
    }
    worker.filter_column(ColumnTask(thread_index()), G);
    worker.store_column(ColumnTask(thread_index()), G);
    __syncthreads();
    worker.store_rows(dx, pair);
  }
  const ColumnTask t(thread_index());
  if (!worker.owns(t.channel)) return;
  const int64_t row = int64_t{worker.split()} * H + worker.u_of(t);
  float2* const out = sums + (row * W + worker.v_of(t)) * args.channels + worker.first_channel + t.channel;
#pragma unroll
  for (int k = 0; k < M; k++) out[int64_t{k * W} * args.channels] = {P[k].re, P[k].im};
}

// dweight [H, W/2 + 1, C] of sums [splits, H, W, C].
__global__ void finish_weight_gradient(const float2* sums, int splits, int H, int W, int channels, float2* dweight) {
  const int half = W / 2 + 1;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, point = i / channels;
  if (point >= H * half) return;
  const int u = static_cast<int>(point) / half, v = static_cast<int>(point) % half, c = static_cast<int>(i % channels);
  const int64_t size = int64_t{H * W} * channels;
  const float2* const here = sums + int64_t{u * W + v} * channels + c;
  const float2* const opposite = sums + int64_t{(H - u) % H * W + (W - v) % W} * channels + c;
  float2 sum = {0.0f, 0.0f};
  for (int s = 0; s < splits; s++) {
    const float2 a = here[s * size], b = opposite[s * size];
    sum = {sum.x + (a.x + b.x), sum.y + (a.y - b.y)};
  }
  const float scale = (2 * v % W == 0 ? 0.5f : 1.0f) / static_cast<float>(H * W);
  dweight[i] = {scale * sum.x, scale * sum.y};
}

// ------------------------------------------------------------------------------------------------------------ launches

// Tiles of a grid: forward; the same where a block has little shared memory; backward.
template <class Forward_, class Narrow_, class Backward_>
struct Grid {
  using Forward = Forward_;
  using Narrow = Narrow_;
  using Backward = Backward_;
};

template <int H, int W, int kChannels, int kThreads, int kBlocks, int kBackwardThreads, int kBackwardBlocksPerSm>
using SmallGrid = Grid<Tile<H, W, kChannels, kThreads, kBlocks>, Tile<H, W, kChannels, kThreads, kBlocks>,
                       Tile<H, W, kChannels, kBackwardThreads, kBackwardBlocksPerSm>>;

template <class... Grids>
struct GridList {
  // f(grid) for the H x W grid, or cudaErrorInvalidValue.
  template <class F>
  static int with(int64_t H, int64_t W, F f) {
    int result = cudaErrorInvalidValue;
    (void)((H == Grids::Forward::kHeight && W == Grids::Forward::kWidth && (result = f(Grids()), true)) || ...);
    return result;
  }
};

#if !defined(ND_FOURIER_FILTER_FEW_GRIDS)
using Served = GridList<                    //
    SmallGrid<7, 7, 32, 224, 4, 224, 3>,    //
    SmallGrid<14, 14, 16, 224, 4, 224, 2>,  //
    SmallGrid<16, 16, 16, 256, 3, 256, 2>,  //
    SmallGrid<28, 28, 8, 448, 2, 448, 1>,   //
    SmallGrid<32, 32, 8, 256, 3, 512, 1>,   //
    Grid<Tile<56, 56, 4, 448, 2>, Tile<56, 56, 2, 224, 4>, Tile<56, 56, 2, 448, 1>>,
    Grid<Tile<64, 64, 4, 512, 1>, Tile<64, 64, 2, 256, 3>, Tile<64, 64, 2, 512, 1>>>;
#else  // one, two and four threads a line, for the sanitizers, and sides that differ
using Served = GridList<                  //
    SmallGrid<7, 7, 32, 224, 4, 224, 3>,  //
    Grid<Tile<32, 64, 2, 256, 1>, Tile<32, 64, 2, 256, 1>, Tile<32, 64, 2, 256, 1>>>;
#endif

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of the current device; 1 if there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return known ? value : 1;
}

// How a launch is cut: tiles of channels, and ranges of pairs.
struct Split {
  int64_t tiles, pairs, pairs_per_block, splits;

  Split(const NdFourierFilterArgs& args, int tile_channels, int64_t blocks, int64_t longest)
      : tiles(divide_up(args.channels, tile_channels)), pairs(divide_up(args.batch, 2)) {
    pairs_per_block = divide_up(tiles * pairs, blocks);
    if (pairs_per_block > longest) pairs_per_block = longest;
    splits = pairs ? divide_up(pairs, pairs_per_block) : 0;
  }
};

template <class Tile>
Split forward_split(const NdFourierFilterArgs& args) {
  return Split(args, Tile::kChannels, kForwardBlocks, INT32_MAX);
}

// As many blocks as run at once: each leaves sums behind, which cost as much as a pair.
template <class Tile>
Split backward_split(const NdFourierFilterArgs& args) {
  return Split(args, Tile::kChannels, int64_t{device_attribute(cudaDevAttrMultiProcessorCount)} * Tile::kBlocksPerSm,
               kLongestSum);
}

inline bool valid(const NdFourierFilterArgs& args) {
  return args.batch >= 0 && args.batch < int64_t{1} << 31 && args.channels >= 1 && args.channels <= kMostChannels &&
         (args.dtype == kFloat32 || args.dtype == kBfloat16 || args.dtype == kFloat16);
}

inline Arguments arguments_of(const NdFourierFilterArgs& args, const Split& split, bool adjoint) {
  return {args.batch,
          static_cast<int>(args.channels),
          args.dtype,
          args.planes != 0,
          adjoint,
          reinterpret_cast<const float2*>(args.weight),
          static_cast<int>(split.tiles),
          static_cast<int>(split.pairs),
          static_cast<int>(split.pairs_per_block)};
}

inline dim3 blocks_of(const Split& split) { return dim3(static_cast<unsigned>(split.tiles * split.splits)); }

template <class Tile, class Kernel>
cudaError_t allow_shared(Kernel kernel) {
  if (Tile::kBytes + 16 * Tile::kChannels <= 48 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(Tile::kBytes));
}

// Whether a block may have the shared memory of the tile.
template <class Tile>
bool fits() {
  const int bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return Tile::kBytes + 16 * Tile::kChannels <= static_cast<size_t>(bytes);
}

template <class Tile>
int forward(const NdFourierFilterArgs& args, const void* x, void* y, cudaStream_t stream) {
  const Split split = forward_split<Tile>(args);
  if (split.splits == 0) return cudaSuccess;
  if (const cudaError_t error = allow_shared<Tile>(filter_images<Tile>)) return error;
  ND_LAUNCH(filter_images<Tile>, blocks_of(split), dim3(Tile::kThreads), Tile::kBytes, stream,
            arguments_of(args, split, false), x, y);
  return cudaGetLastError();
}

template <class Tile>
int backward(const NdFourierFilterArgs& args, const void* grad, const void* x, void* dx, float* dweight, void* sums,
             cudaStream_t stream) {
  const Split split = backward_split<Tile>(args);
  auto* const partial = static_cast<float2*>(sums);
  if (split.splits > 0) {
    if (const cudaError_t error = allow_shared<Tile>(filter_gradients<Tile>)) return error;
    ND_LAUNCH(filter_gradients<Tile>, blocks_of(split), dim3(Tile::kThreads), Tile::kBytes, stream,
              arguments_of(args, split, true), grad, x, dx, partial);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  constexpr int kThreads = 256;
  const int64_t size = int64_t{Tile::kHeight} * Tile::kHalf * args.channels;
  ND_LAUNCH(finish_weight_gradient, dim3(static_cast<unsigned>(divide_up(size, kThreads))), dim3(kThreads), 0, stream,
            static_cast<const float2*>(partial), static_cast<int>(split.splits), Tile::kHeight, Tile::kWidth,
            static_cast<int>(args.channels), reinterpret_cast<float2*>(dweight));
  return cudaGetLastError();
}

}  // namespace nd::fourier_filter

extern "C" int nd_fourier_filter_serves(const NdFourierFilterArgs* args) {
  using namespace nd::fourier_filter;
  return valid(*args) && Served::with(args->height, args->width, [](auto) { return cudaSuccess; }) == cudaSuccess;
}

extern "C" int nd_fourier_filter(const NdFourierFilterArgs* args, const void* x, void* y, void* stream) {
  using namespace nd::fourier_filter;
  if (!valid(*args)) return cudaErrorInvalidValue;
  return Served::with(args->height, args->width, [&](auto served) {
    using Wide = typename decltype(served)::Forward;
    using Narrow = typename decltype(served)::Narrow;
    const auto run = fits<Wide>() ? forward<Wide> : forward<Narrow>;
    return run(*args, x, y, static_cast<cudaStream_t>(stream));
  });
}

extern "C" size_t nd_fourier_filter_backward_workspace(const NdFourierFilterArgs* args) {
  using namespace nd::fourier_filter;
  size_t bytes = 0;
  if (!valid(*args)) return bytes;
  Served::with(args->height, args->width, [&](auto served) {
    using Tile = typename decltype(served)::Backward;
    bytes = sizeof(float2) *
            static_cast<size_t>(backward_split<Tile>(*args).splits * Tile::kHeight * Tile::kWidth * args->channels);
    return cudaSuccess;
  });
  return bytes;
}

extern "C" int nd_fourier_filter_backward(const NdFourierFilterArgs* args, const void* grad, const void* x, void* dx,
                                          float* dweight, void* workspace, void* stream) {
  using namespace nd::fourier_filter;
  if (!valid(*args)) return cudaErrorInvalidValue;
  return Served::with(args->height, args->width, [&](auto served) {
    using Tile = typename decltype(served)::Backward;
    return backward<Tile>(*args, grad, x, dx, dweight, workspace, static_cast<cudaStream_t>(stream));
  });
}
