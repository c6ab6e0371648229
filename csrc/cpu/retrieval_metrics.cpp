// Ranks of the positives of every query among all gallery items that count, and precision from them: the gallery is
// never sorted.
//
// Method. The P positives are sorted by (key, index). Every distance s of a row is held against the limits
// below_a <= beyond_a of each: s < below_a is certain to come before positive a, s >= beyond_a after it, and what lies
// between is decided by the float64 key and the index. Given distances are their own keys, so that between means equal.
// Products of features in float32 have limits as far apart as their error may be, and few distances between.
// Distances are compared as integers of the same order, in which -0.0 equals 0.0. Junk is counted and taken off again.
//
// Floor: one read of nq x ng distances, and nq x ng x P compares.
//
// Layout: a task is some rows. A row is read in chunks of kChunk. Vectors beyond the last positive take one compare,
// the others are held against kGroup positives at a time, one counter of W lanes each. More than kMany positives: a
// binary search for each distance instead.
//
// Limits: ng < 2^31.
#include <cmath>
#include <cstring>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd.hpp"

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

constexpr int64_t kGroup = 8;     // positives whose counters stay in registers
constexpr int64_t kMany = 96;     // positives from which on a search takes fewer steps than compares
constexpr int64_t kChunk = 2048;  // distances that stay in the first-level cache for all groups
constexpr int64_t kAhead = 4096;  // bytes: the processor itself does not fetch beyond a page
constexpr int64_t kLanes = 8;     // partial sums of float64 loops

template <class T>
struct Integer;
template <>
struct Integer<float> {
  typedef int32_t t;
  static constexpr t kMagnitude = 0x7fffffff;
};
template <>
struct Integer<double> {
  typedef int64_t t;
  static constexpr t kMagnitude = 0x7fffffffffffffff;
};

// Integers in the order of x, a value or a vector; the sum makes 0.0 of -0.0.
template <class T>
ND_INLINE typename Integer<T>::t ordered(T x) {
  typename Integer<T>::t bits;
  x += T(0);
  std::memcpy(&bits, &x, sizeof(x));
  return bits < 0 ? bits ^ Integer<T>::kMagnitude : bits;
}
template <class T>
ND_INLINE typename Vec<typename Integer<T>::t>::t ordered_lanes(typename Vec<T>::t x) {
  typedef typename Vec<typename Integer<T>::t>::t Lanes;
  const Lanes bits = reinterpret_cast<Lanes>(x + broadcast(T(0)));
  return bits ^ ((bits < 0) & Integer<T>::kMagnitude);
}

struct Positive {
  double key;
  int32_t index;
};
ND_INLINE bool before(const Positive& a, double key, int64_t index) {
  return a.key < key || (a.key == key && a.index < index);
}

// Positives of one row, ascending, and what is counted for each.
template <class T>
struct Row {
  typedef typename Integer<T>::t I;
  const T* distance;
  int64_t P;           // 0: a query that counts nowhere
  T last;              // the largest distance that may not be beyond the last positive
  Positive* positive;  // [P]
  I *below, *beyond;   // [P up to a full group] limits, ascending
  I* lanes;            // [the same, W] counters of certain distances
  int64_t* first;      // [P + 1] distances certain before positive a, and all behind it, but not before a - 1
  int64_t* between;    // [P] distances before positive a that were not certain; the positive itself is one
  int64_t* tied;       // [P] equal keys behind it
};

ND_INLINE int64_t up_to_group(int64_t P) { return (P + kGroup - 1) / kGroup * kGroup; }

template <class P>
ND_INLINE P* take(char*& at, int64_t count) {
  P* found = reinterpret_cast<P*>(at);
  at += (count * static_cast<int64_t>(sizeof(P)) + 63) / 64 * 64;
  return found;
}

// Room for the positives of a row and the stamps of the identities, from `workspace` on; returns its end.
template <class T>
char* place_row(const RetrievalMetricsArgs& args, char* workspace, Row<T>& row, int64_t*& stamps) {
  typedef typename Integer<T>::t I;
  const int64_t most = up_to_group(args.most_alike);
  stamps = take<int64_t>(workspace, args.identity != nullptr ? args.identities : 0);
  row.positive = take<Positive>(workspace, most);
  row.below = take<I>(workspace, most);
  row.beyond = take<I>(workspace, most);
  row.lanes = take<I>(workspace, most * Vec<I>::W);
  row.first = take<int64_t>(workspace, most + 1);
  row.between = take<int64_t>(workspace, most);
  row.tied = take<int64_t>(workspace, most);
  return workspace;
}

// ------------------------------------------------------------------------------------------------ keys and limits

template <class F, class Add>
ND_INLINE double sum_over(const F* x, const F* y, int64_t dim, const Add& add) {
  double sum[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= dim; k += kLanes)
    for (int64_t l = 0; l < kLanes; l++) sum[l] += add(static_cast<double>(x[k + l]), static_cast<double>(y[k + l]));
  for (; k < dim; k++) sum[0] += add(static_cast<double>(x[k]), static_cast<double>(y[k]));
  for (int64_t l = 1; l < kLanes; l++) sum[0] += sum[l];
  return sum[0];
}

template <class F>
double key_of_features(const RetrievalMetricsArgs& args, int64_t q, int64_t j) {
  const F* x = static_cast<const F*>(args.query) + q * args.query_stride;
  const F* y = static_cast<const F*>(args.gallery) + j * args.gallery_stride;
  const double u = args.query_unit[q], v = args.gallery_unit[j];
  if (args.inner_product) return -sum_over(x, y, args.dim, [=](double a, double b) { return a * u * (b * v); });
  return sum_over(x, y, args.dim, [=](double a, double b) { return (a * u - b * v) * (a * u - b * v); });
}

// What decides the order, in float64.
template <class T>
ND_INLINE double key_of(const RetrievalMetricsArgs& args, const Row<T>& row, int64_t q, int64_t j) {
  if (args.query == nullptr) return static_cast<double>(row.distance[j]) + 0.0;
  return args.dtype_of_features == Dtype::kFloat64 ? key_of_features<double>(args, q, j)
                                                   : key_of_features<float>(args, q, j);
}

template <class T>
void set_limits(const RetrievalMetricsArgs& args, Row<T>& row, int64_t q) {
  typedef typename Integer<T>::t I;
  row.last = -static_cast<T>(HUGE_VAL);
  for (int64_t a = 0; a < row.P; a++) {
    const double key = row.positive[a].key;
    // The conversion to T rounds by less than 2^-23 of the key.
    const double slack = args.query == nullptr ? 0 : args.slack[q] + 0x1p-22 * std::fabs(key);
    row.last = static_cast<T>(key + slack);
    row.below[a] = ordered(static_cast<T>(key - slack));
    row.beyond[a] = ordered(row.last) + 1;
  }
  for (int64_t a = row.P; a < up_to_group(row.P); a++) row.below[a] = row.beyond[a] = -Integer<T>::kMagnitude;
  std::memset(row.lanes, 0, sizeof(I) * static_cast<size_t>(up_to_group(row.P) * Vec<I>::W));
  std::memset(row.first, 0, sizeof(int64_t) * static_cast<size_t>(row.P + 1));
  std::memset(row.between, 0, sizeof(int64_t) * static_cast<size_t>(row.P));
  std::memset(row.tied, 0, sizeof(int64_t) * static_cast<size_t>(row.P));
}

// ------------------------------------------------------------------------------------------------ positives and junk

ND_INLINE bool excluded(const RetrievalMetricsArgs& args, int64_t q, int64_t j) {
  return args.excluded != nullptr && args.excluded[args.group[q] * args.ng + j];
}
ND_INLINE bool same_camera(const RetrievalMetricsArgs& args, int64_t q, int64_t j) {
  return args.query_camera != nullptr && args.query_camera[q] == args.gallery_camera[j];
}

// Shell's sort: few items, and no recursion.
void sort_positives(Positive* items, int64_t count) {
  int64_t gap = 1;
  while (gap < count / 3) gap = 3 * gap + 1;
  for (; gap > 0; gap /= 3)
    for (int64_t i = gap; i < count; i++) {
      const Positive item = items[i];
      int64_t at = i;
      for (; at >= gap && !before(items[at - gap], item.key, item.index); at -= gap) items[at] = items[at - gap];
      items[at] = item;
    }
}

template <class T>
void collect_positives(const RetrievalMetricsArgs& args, int64_t q, Row<T>& row) {
  row.P = 0;
  for (int64_t e = args.begin[q]; e < args.end[q]; e++) {
    const int64_t j = args.order[e];
    if (same_camera(args, q, j) || excluded(args, q, j)) continue;
    row.positive[row.P++] = {key_of(args, row, q, j), static_cast<int32_t>(j)};
  }
  sort_positives(row.positive, row.P);
  set_limits(args, row, q);
}

// ------------------------------------------------------------------------------------------------ counting

// Counts item j `times` for the positives in [from, to) between whose limits it lies.
template <class T>
void settle(const RetrievalMetricsArgs& args, const Row<T>& row, int64_t q, int64_t j, int64_t from, int64_t to,
            int64_t times) {
  const typename Integer<T>::t at = ordered(row.distance[j]);
  const double key = key_of(args, row, q, j);
  for (int64_t a = from; a < to; a++) {
    if (at < row.below[a] || at >= row.beyond[a]) continue;
    const Positive& positive = row.positive[a];
    if (!before(positive, key, j)) row.between[a] += times;
    if (positive.key == key && positive.index < j) row.tied[a] += times;
  }
}

// Counts item j `times` by a binary search.
template <class T>
void search(const RetrievalMetricsArgs& args, const Row<T>& row, int64_t q, int64_t j, int64_t times) {
  const typename Integer<T>::t at = ordered(row.distance[j]);
  if (at >= row.beyond[row.P - 1]) return;
  int64_t from = 0;
  for (int64_t size = row.P; size > 0;) {  // the first positive that is not certain to come before
    const int64_t half = size / 2;
    const bool right = row.beyond[from + half] <= at;
    from += right ? half + 1 : 0;
    size = right ? size - half - 1 : half;
  }
  int64_t to = from;
  while (to < row.P && row.below[to] <= at) to++;
  if (to > from) settle(args, row, q, j, from, to, times);
  row.first[to] += times;
}

// Whether a lane of a mask is set.
template <class I>
ND_INLINE bool any(typename Vec<I>::t mask) {
#if ND_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif ND_VECTOR_BYTES == 32
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  int64_t words[2];
  std::memcpy(words, &mask, sizeof(words));
  return (words[0] | words[1]) != 0;
#endif
}

// Whether a lane is not beyond `last`; NaN is not.
template <class T>
ND_INLINE bool any_near(typename Vec<T>::t x, typename Vec<T>::t last) {
#if ND_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(last), _CMP_NGT_UQ) != 0;
  else
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(x), reinterpret_cast<__m512d>(last), _CMP_NGT_UQ) != 0;
#else
  return any<typename Integer<T>::t>(~(x > last));
#endif
}

// Lists the vectors of [begin, end), a multiple of W, with a distance up to the last positive, and returns their
// number; -1 where a distance is NaN.
template <class T>
ND_INLINE int64_t near_vectors(const Row<T>& row, int64_t begin, int64_t end, int64_t* found) {
  constexpr int64_t W = Vec<T>::W;
  const typename Vec<T>::t last = broadcast(row.last);
  typename Vec<typename Integer<T>::t>::t bad = {};
  int64_t count = 0;
  for (int64_t j = begin; j < end; j += W) {
    const typename Vec<T>::t x = load(row.distance + j);
    __builtin_prefetch(row.distance + j + kAhead / static_cast<int64_t>(sizeof(T)));
    if (!any_near<T>(x, last)) continue;
    bad |= x != x;
    found[count++] = j;
  }
  return any<typename Integer<T>::t>(bad) ? -1 : count;
}

// Counts the lanes below each of G limits, and returns the lanes, as bits, that are between one and its upper limit.
template <int64_t G, class I>
ND_INLINE uint32_t count_below(typename Vec<I>::t* count, typename Vec<I>::t at, const typename Vec<I>::t* below,
                               const typename Vec<I>::t* beyond) {
#if ND_VECTOR_BYTES == 64
  typedef typename Vec<I>::t Lanes;
  const __m512i x = reinterpret_cast<__m512i>(at), minus_one = _mm512_set1_epi64(-1);
  __mmask16 between = 0;
  for (int64_t g = 0; g < G; g++) {
    const __m512i sum = reinterpret_cast<__m512i>(count[g]);
    const __m512i low = reinterpret_cast<__m512i>(below[g]), high = reinterpret_cast<__m512i>(beyond[g]);
    if constexpr (sizeof(I) == 4) {
      const __mmask16 certain = _mm512_cmplt_epi32_mask(x, low);
      between = _kor_mask16(between, _kxor_mask16(certain, _mm512_cmplt_epi32_mask(x, high)));
      count[g] = reinterpret_cast<Lanes>(_mm512_mask_sub_epi32(sum, certain, sum, minus_one));
    } else {
      const __mmask8 certain = _mm512_cmplt_epi64_mask(x, low);
      between = _kor_mask16(between, _kxor_mask16(certain, _mm512_cmplt_epi64_mask(x, high)));
      count[g] = reinterpret_cast<Lanes>(_mm512_mask_sub_epi64(sum, certain, sum, minus_one));
    }
  }
  return between;
#else
  typename Vec<I>::t between = {};
  for (int64_t g = 0; g < G; g++) {
    const typename Vec<I>::t certain = at < below[g];
    count[g] -= certain;
    between |= certain ^ (at < beyond[g]);
  }
  uint32_t lanes = 0;
  if (any<I>(between)) {
    I flags[Vec<I>::W];
    store(flags, between);
    for (int64_t l = 0; l < Vec<I>::W; l++) lanes |= static_cast<uint32_t>(flags[l] != 0) << l;
  }
  return lanes;
#endif
}

// The vectors at `found` against the G positives from a on, of which the last may be missing.
template <int64_t G, class T>
void compare_group(const RetrievalMetricsArgs& args, const Row<T>& row, int64_t q, int64_t a, const int64_t* found,
                   int64_t vectors) {
  typedef typename Integer<T>::t I;
  typedef typename Vec<I>::t Lanes;
  constexpr int64_t W = Vec<I>::W;
  Lanes count[G], below[G], beyond[G];
  for (int64_t g = 0; g < G; g++) {
    count[g] = load(row.lanes + (a + g) * W);
    below[g] = broadcast(row.below[a + g]);
    beyond[g] = broadcast(row.beyond[a + g]);
  }
  const int64_t last = a + G < row.P ? a + G : row.P;
  const Lanes end_of_group = broadcast(row.beyond[last - 1]);
  for (int64_t v = 0; v < vectors; v++) {
    const Lanes at = ordered_lanes<T>(load(row.distance + found[v]));
    if (last < row.P && !any<I>(at < end_of_group)) continue;
    uint32_t between = count_below<G, I>(count, at, below, beyond);
    for (; between != 0; between &= between - 1) settle(args, row, q, found[v] + __builtin_ctz(between), a, last, 1);
  }
  for (int64_t g = 0; g < G; g++) store(row.lanes + (a + g) * W, count[g]);
}

template <class T>
void compare(const RetrievalMetricsArgs& args, const Row<T>& row, int64_t q, const int64_t* found, int64_t vectors) {
  for (int64_t a = 0; a < row.P; a += kGroup) {
    const int64_t rest = row.P - a;
    if (rest <= 2)
      compare_group<2>(args, row, q, a, found, vectors);
    else if (rest <= 4)
      compare_group<4>(args, row, q, a, found, vectors);
    else
      compare_group<kGroup>(args, row, q, a, found, vectors);
  }
}

// Counts the items of a row; false where a distance is NaN.
template <class T>
bool count_items(const RetrievalMetricsArgs& args, const Row<T>& row, int64_t q) {
  constexpr int64_t W = Vec<T>::W;
  int64_t found[kChunk / W];
  for (int64_t begin = 0; begin < args.ng; begin += kChunk) {
    const int64_t end = begin + kChunk < args.ng ? begin + kChunk : args.ng;
    const int64_t whole = begin + (end - begin) / W * W;
    const int64_t vectors = near_vectors(row, begin, whole, found);
    if (vectors < 0) return false;
    if (row.P > kMany)
      for (int64_t v = 0; v < vectors * W; v++) search(args, row, q, found[v / W] + v % W, 1);
    else
      compare(args, row, q, found, vectors);
    for (int64_t j = whole; j < end; j++) {
      if (row.distance[j] != row.distance[j]) return false;
      if (row.P > 0) search(args, row, q, j, 1);
    }
  }
  return true;
}

// Takes the junk off again.
template <class T>
void discount_junk(const RetrievalMetricsArgs& args, const Row<T>& row, int64_t q) {
  for (int64_t e = args.begin[q]; e < args.end[q]; e++) {
    const int64_t j = args.order[e];
    if (same_camera(args, q, j) && !excluded(args, q, j)) search(args, row, q, j, -1);
  }
  if (args.excluded == nullptr) return;
  const int64_t group = args.group[q];
  for (int64_t e = args.excluded_start[group]; e < args.excluded_start[group + 1]; e++)
    search(args, row, q, args.excluded_list[e], -1);
}

// ------------------------------------------------------------------------------------------------ results

// Identities seen before the first positive, and its own.
template <class T>
int64_t rank_of_identity(const RetrievalMetricsArgs& args, const Row<T>& row, int64_t q, int64_t* stamps) {
  const Positive& first = row.positive[0];
  int64_t rank = 1;
  stamps[args.identity[first.index]] = q + 1;
  for (int64_t j = 0; j < args.ng; j++) {
    const typename Integer<T>::t at = ordered(row.distance[j]);
    if (at >= row.beyond[0] || excluded(args, q, j)) continue;
    int64_t& stamp = stamps[args.identity[j]];
    if (stamp == q + 1) continue;
    if (at >= row.below[0] && before(first, key_of(args, row, q, j), j)) continue;
    stamp = q + 1;
    rank++;
  }
  return rank;
}

template <class T>
void write_metrics(const RetrievalMetricsArgs& args, const Row<T>& row, int64_t q) {
  constexpr int64_t W = Vec<typename Integer<T>::t>::W;
  double sum = 0;
  int64_t certain = 0, rank = 0, tied_end = 0;
  for (int64_t a = 0; a < row.P; a++) {
    certain += row.first[a];
    int64_t compared = 0;
    for (int64_t l = 0; l < W; l++) compared += row.lanes[a * W + l];
    rank = certain + compared + row.between[a];
    const double m = static_cast<double>(a + 1), r = static_cast<double>(rank);
    if (args.precision == Precision::kStandard) {
      sum += m / r;
    } else if (args.precision == Precision::kTrapezoid) {
      sum += ((rank == 1 ? 1.0 : (m - 1) / (r - 1)) + m / r) / 2;
    } else {
      if (a >= tied_end)
        for (tied_end = a + 1; tied_end < row.P && row.positive[tied_end].key == row.positive[a].key;) tied_end++;
      sum += static_cast<double>(tied_end) / static_cast<double>(rank + row.tied[a]);
    }
    if (a == 0) args.first_rank[q] = rank;
  }
  args.ap[q] = sum / static_cast<double>(row.P);
  args.inp[q] = static_cast<double>(row.P) / static_cast<double>(rank);
}

template <class T>
void measure_rows(const RetrievalMetricsArgs& args, int64_t begin, int64_t end, void* workspace) {
  Row<T> row;
  int64_t* stamps;
  place_row(args, static_cast<char*>(workspace), row, stamps);
  if (args.identity != nullptr) std::memset(stamps, 0, sizeof(int64_t) * static_cast<size_t>(args.identities));
  for (int64_t q = begin; q < end; q++) {
    row.distance = static_cast<const T*>(args.distance) + q * args.stride;
    collect_positives(args, q, row);
    const bool counted = count_items(args, row, q);
    args.ap[q] = args.inp[q] = NAN;
    args.first_rank[q] = counted ? 0 : -1;
    if (!counted || row.P == 0) continue;
    discount_junk(args, row, q);
    write_metrics(args, row, q);
    if (args.identity != nullptr) args.first_rank[q] = rank_of_identity(args, row, q, stamps);
  }
}

}  // namespace

int64_t retrieval_metrics_room(const RetrievalMetricsArgs& args) {
  Row<double> wide;
  Row<float> row;
  int64_t* stamps;
  char* const nothing = nullptr;
  return (args.dtype == Dtype::kFloat64 ? place_row(args, nothing, wide, stamps)
                                        : place_row(args, nothing, row, stamps)) -
         nothing;
}

void retrieval_metrics(const RetrievalMetricsArgs& args, int64_t begin, int64_t end, void* workspace) {
  if (args.dtype == Dtype::kFloat64)
    measure_rows<double>(args, begin, end, workspace);
  else
    measure_rows<float>(args, begin, end, workspace);
}

}  // namespace nd::cpu::ND_CPU_LEVEL
