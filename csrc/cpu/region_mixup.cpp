// Region-wise mixup of two batches of images and its backward.
//
//     x_m = lam x_v + (1 - lam) x_i                                        two reads, one write
//     dx_v = lam g,  dx_i = (1 - lam) g,  dratio = sums of g (x_v - x_i)   one to three reads, up to two writes
//
// lam is the ratio of the region of a pixel; near borders it may go from one region's to the next one's.
//
// Floor in bytes a float32: 12 forward; backward 12 for the images, 12 for the ratios, 20 for both. Flops (3 and 5 a
// value, and 6 comparisons that keep x_m within its parents) are hidden behind that.
//
// Layout: a row of lam is built once for all channels and all image rows of the same regions, and stays in the L1
// cache; vectors run along W, or along W C where channels are last. Sums for the ratios are in the precision of lam
// over up to kFlush rows of values and along W, then in float64. A forward task is an image row, a backward task an
// image, whose sums have a fixed order.
//
// Where lam is 1 or 0 the pixel of one parent is copied whatever the other one is; a NaN of lam or of both parents is
// NaN.
#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd.hpp"
#include "neuraldeps/simd_convert.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int64_t kFlush = 128;  // additions in the precision of lam before a sum goes to float64

// Rows of values of one image row: of each channel, or with channels last a single one.
struct Rows {
  int64_t length, count, stride;  // values of a row, rows, and from one to the next
  int64_t repeats;                // values of a pixel side by side

  explicit Rows(const RegionMixupArgs& args)
      : length(args.channels_last ? args.W * args.C : args.W),
        count(args.channels_last ? 1 : args.C),
        stride(args.H * args.W),
        repeats(args.channels_last ? args.C : 1) {}
  int64_t first(const RegionMixupArgs& args, int64_t n, int64_t h) const {
    return n * args.C * args.H * args.W + h * length;
  }
};

// f(offset, count) over a row in vectors; only the last count is below W.
template <class T, class F>
ND_INLINE void for_vectors(int64_t length, const F& f) {
  constexpr int W = Vec<T>::W;
  int64_t j = 0;
  for (; j + W <= length; j += W) f(j, W);
  if (j < length) f(j, length - j);
}

template <class T>
ND_INLINE typename Vec<T>::t mix(typename Vec<T>::t lam, typename Vec<T>::t v, typename Vec<T>::t i) {
  typename Vec<T>::t mixed = lam * v + (T(1) - lam) * i;
  const auto low = v < i ? v : i, high = v < i ? i : v;
  mixed = mixed < low ? low : mixed;
  mixed = mixed > high ? high : mixed;
  mixed = lam == T(0) ? i : mixed;
  return lam == T(1) ? v : mixed;
}

// (1 - step) here + step there
template <class T>
ND_INLINE T between(T here, const T* there, double step) {
  return step == 0 ? here : here + static_cast<T>(step) * (*there - here);
}

// lam of the values of a row, made again where it changes.
template <class T>
struct RatioRow {
  T* lam;                        // [length]
  int64_t image = -1, row = -1;  // of what lam holds

  ND_INLINE void set(const RegionMixupArgs& args, int64_t n, int64_t h, int64_t repeats) {
    const auto plain = [&](int64_t r) { return args.step_of_row[r] == 0; };
    if (image == n && plain(row) && plain(h) && args.region_of_row[row] == args.region_of_row[h]) return;
    image = n;
    row = h;
    const int64_t columns = args.columns;
    const T* here = static_cast<const T*>(args.ratio) + (n * args.rows + args.region_of_row[h]) * columns;
    T* out = lam;
    for (int64_t w = 0; w < args.W; w++) {
      const int64_t b = args.region_of_column[w];
      const T ratio = between(here[b], here + columns + b, args.step_of_row[h]);
      T next = ratio;
      if (args.step_of_column[w] != 0) next = between(here[b + 1], here + columns + b + 1, args.step_of_row[h]);
      const T value = between(ratio, &next, args.step_of_column[w]);
      for (int64_t c = 0; c < repeats; c++) *out++ = value;
    }
  }
};

template <class In>
ND_INLINE void mix_rows(const RegionMixupArgs& args, int64_t begin, int64_t end, void* workspace) {
  using T = Wide<In>;
  const Rows rows(args);
  RatioRow<T> ratios{static_cast<T*>(workspace)};
  const In *x_v = static_cast<const In*>(args.x_v), *x_i = static_cast<const In*>(args.x_i);
  In* mixed = static_cast<In*>(args.mixed);
  for (int64_t task = begin; task < end; task++) {
    const int64_t n = task / args.H, h = task % args.H;
    ratios.set(args, n, h, rows.repeats);
    int64_t at = rows.first(args, n, h);
    for (int64_t r = 0; r < rows.count; r++, at += rows.stride) {
      for_vectors<T>(rows.length, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        const auto lam = take<T>(ratios.lam + j, count);
        put(mixed + at + j, mix<T>(lam, take<T>(x_v + at + j, count), take<T>(x_i + at + j, count)), count);
      });
    }
  }
}

// Sums of values and of steps * values.
struct Sums {
  double all, stepped;
};
template <class T>
ND_INLINE Sums sums_of(const T* values, const T* steps, int64_t length) {
  constexpr int W = Vec<T>::W;
  typename Vec<T>::t all{}, stepped{};
  for_vectors<T>(length, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    const auto v = take<T>(values + j, count);
    all += v;
    stepped += v * take<T>(steps + j, count);
  });
  Sums sums{0, 0};
  for (int l = 0; l < W; l++) {
    sums.all += static_cast<double>(all[l]);
    sums.stepped += static_cast<double>(stepped[l]);
  }
  return sums;
}

// Adds to sums [rows, columns] those of products [length] of image row h, or of several of the same regions.
template <class T>
ND_INLINE void add_row(const RegionMixupArgs& args, int64_t h, int64_t repeats, const T* products, const T* steps,
                       double* sums) {
  const double t = args.step_of_row[h];
  double* here = sums + args.region_of_row[h] * args.columns;
  for (int64_t first = 0, last; first < args.W; first = last) {
    const int64_t b = args.region_of_column[first];
    for (last = first + 1; last < args.W && args.region_of_column[last] == b;) last++;
    const Sums found = sums_of(products + first * repeats, steps + first * repeats, (last - first) * repeats);
    const bool right = b + 1 < args.columns, below = t != 0;
    here[b] += (1 - t) * (found.all - found.stepped);
    if (right) here[b + 1] += (1 - t) * found.stepped;
    if (below) here[args.columns + b] += t * (found.all - found.stepped);
    if (below && right) here[args.columns + b + 1] += t * found.stepped;
  }
}

template <class T>
struct BackwardRoom {
  T *lam, *products, *steps;  // [length]
  double* sums;               // [rows, columns]

  static int64_t row(const RegionMixupArgs& args) {
    return round_up(Rows(args).length * static_cast<int64_t>(sizeof(T)), 64);
  }
  static int64_t bytes(const RegionMixupArgs& args) { return 3 * row(args) + args.rows * args.columns * 8; }
  BackwardRoom(const RegionMixupArgs& args, void* workspace) {
    char* at = static_cast<char*>(workspace);
    T** const parts[] = {&lam, &products, &steps};
    for (T** part : parts) {
      *part = reinterpret_cast<T*>(at);
      at += row(args);
    }
    sums = reinterpret_cast<double*>(at);
  }
};

template <class In, bool kImages, bool kRatios>
ND_INLINE void gradients_of_image(const RegionMixupArgs& args, int64_t n, const BackwardRoom<Wide<In>>& room) {
  using T = Wide<In>;
  const Rows rows(args);
  RatioRow<T> ratios{room.lam};
  const In *x_v = static_cast<const In*>(args.x_v), *x_i = static_cast<const In*>(args.x_i);
  const In* grad = static_cast<const In*>(args.grad);
  In *x_v_grad = static_cast<In*>(args.x_v_grad), *x_i_grad = static_cast<In*>(args.x_i_grad);
  const int64_t regions = args.rows * args.columns;
  if constexpr (kRatios) {
    for (int64_t r = 0; r < regions; r++) room.sums[r] = 0;
    for (int64_t j = 0; j < rows.length; j++) room.steps[j] = static_cast<T>(args.step_of_column[j / rows.repeats]);
  }
  int64_t pending = 0;  // rows in products, all of the same regions
  for (int64_t h = 0; h < args.H; h++) {
    if constexpr (kImages) ratios.set(args, n, h, rows.repeats);
    int64_t at = rows.first(args, n, h);
    for (int64_t r = 0; r < rows.count; r++, at += rows.stride) {
      const bool first = pending == 0 && r == 0;
      for_vectors<T>(rows.length, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        const auto g = take<T>(grad + at + j, count);
        if constexpr (kImages) {
          const auto lam = take<T>(ratios.lam + j, count);
          put(x_v_grad + at + j, lam * g, count);
          put(x_i_grad + at + j, (T(1) - lam) * g, count);
        }
        if constexpr (kRatios) {
          auto sum = g * (take<T>(x_v + at + j, count) - take<T>(x_i + at + j, count));
          if (!first) sum += take<T>(room.products + j, count);
          put(room.products + j, sum, count);
        }
      });
    }
    if constexpr (kRatios) {
      pending++;
      const bool goes_on = h + 1 < args.H && args.region_of_row[h + 1] == args.region_of_row[h] &&
                           args.step_of_row[h + 1] == args.step_of_row[h];
      if (goes_on && pending * rows.count < kFlush) continue;
      add_row(args, h, rows.repeats, room.products, room.steps, room.sums);
      pending = 0;
    }
  }
  if constexpr (kRatios) {
    T* out = static_cast<T*>(args.ratio_grad) + n * regions;
    for (int64_t r = 0; r < regions; r++) out[r] = static_cast<T>(room.sums[r]);
  }
}

template <class In>
ND_INLINE void gradients(const RegionMixupArgs& args, int64_t begin, int64_t end, void* workspace) {
  const BackwardRoom<Wide<In>> room(args, workspace);
  for (int64_t n = begin; n < end; n++) {
    if (args.x_v_grad && args.ratio_grad)
      gradients_of_image<In, true, true>(args, n, room);
    else if (args.x_v_grad)
      gradients_of_image<In, true, false>(args, n, room);
    else
      gradients_of_image<In, false, true>(args, n, room);
  }
}

}  // namespace

int64_t region_mixup_room(const RegionMixupArgs& args) {
  return by_dtype(args.dtype, [&]<class In>() { return BackwardRoom<Wide<In>>::bytes(args); });
}
void region_mixup(const RegionMixupArgs& args, int64_t begin, int64_t end, void* workspace) {
  by_dtype(args.dtype, [&]<class In>() { mix_rows<In>(args, begin, end, workspace); });
}
void region_mixup_backward(const RegionMixupArgs& args, int64_t begin, int64_t end, void* workspace) {
  by_dtype(args.dtype, [&]<class In>() { gradients<In>(args, begin, end, workspace); });
}

}  // namespace nd::cpu::ND_CPU_LEVEL
