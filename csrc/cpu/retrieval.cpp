// Exact nearest neighbours without an n x m matrix: for every row of x the k rows of y of smallest (key, index).
//
// Method. Rows are centred (the order of distances does not change, their rounding does), scaled by a power of two and
// rounded to z^ in float32 or bfloat16, with e = |z - z^| and R >= |z|, |z^| measured in float64. A product of rounded
// rows is off by at most
//
//     e_i R_j + R_i e_j + gamma R_i R_j,      gamma: float32 sums of kDepth terms, added up,
//
// so every score s lies within a known slack of the truth. A row keeps what may still be among its k smallest: scores
// with s - slack <= the k-th smallest s + slack so far. At the end float64 keys of the values as given decide, ties by
// index: the result does not depend on order, threads or precision. Rows whose room runs out are reported, not guessed.
//
// Floor: n m dim multiply-adds, half of them within one set; and k rows of x each read once more in float64.
//
// Layout: rows are packed once in strips of MR, as [strip][word][MR], a word being one float32 or two bfloat16. A task
// multiplies a block of strips (kBlockBytes, shared caches) by a panel of up to kPanel columns (second-level cache,
// kept as [NR columns][word][NR]) in steps of kDepth words, and looks at the scores of a strip while they are in the
// first- level cache. Within one set only j >= i is visited, and a score serves both rows.
//
// Limits: m < 2^31. Keys of float64 input have to be finite.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "neuraldeps/cpu_api.h"
#include "neuraldeps/simd.hpp"

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#define ND_HAS_BF16 1
#define ND_BF16_TARGET __attribute__((target("avx512bf16")))
#else
#define ND_HAS_BF16 0
#define ND_BF16_TARGET
#endif

namespace nd::cpu::ND_CPU_LEVEL {
namespace {

typedef Vec<float>::t Floats;
constexpr int64_t W = Vec<float>::W;

constexpr int64_t MR = ND_VECTOR_BYTES == 64 ? 14 : 6;  // rows and columns of a register block: MR x 2 sums
constexpr int64_t NR = 2 * W;
constexpr int64_t kPanel = 128;                                        // columns of a panel at most
constexpr int64_t kPanelBytes = int64_t{512} << 10;                    // of a panel, where that leaves NR columns
constexpr int64_t kBlockBytes = int64_t{4} << 20;                      // of the strips that a task goes through
constexpr int64_t kDepth = 256;                                        // words summed in one go
constexpr int64_t kFar = 64;                                           // room for candidates of the largest key
constexpr int64_t kCentreRows = 1024;                                  // rows behind the centre
constexpr int64_t kLanes = 8;                                          // partial sums of float64 loops
constexpr float kUnit = 0x1p-24f, kTiny = 1e-30f, kUp = 1 + 0x1p-18f;  // kTiny: what flushing denormals can lose
static_assert(kPanel % NR == 0);

// What is known of one row: z^ within `error` of z, |z|, |z^| <= radius; a score is offset_i + offset_j + slope <z, z>.
struct RowFacts {
  double size;  // largest absolute value; infinity where a value is not finite
  double unit;  // cosines: 1 / |x|
  float radius, error, offset;
  float exact_error;  // `error` of the float32 copy beside a bfloat16 one
};

// Candidates of one row of x.
struct Row {
  int32_t lock, count, far_count;
  bool full, far_full;
  float bound;      // upper bound of the k-th smallest score, infinity until there are k
  float far_bound;  // lower bound of the largest
};

struct Candidate {
  float lower, upper;
  int32_t index;
};
struct FarCandidate {
  float upper;
  int32_t index;
};

struct Shared {
  double scale;
  double centre_square;  // of the scaled centre, halved
};

// Sizes, and the state by its addresses.
struct Plan {
  bool self, reduced;
  int64_t rows;                // of x and y
  int64_t n, m;                // rows searched for, and rows searched among
  int64_t longer;              // rows of x that have query_k neighbours
  int64_t room, longer_room;   // candidates of a row
  int64_t words, exact_words;  // of a row in the candidate and in the float32 copy
  int64_t strips_x, strips_y;  // of x and of y (the same for one set)
  int64_t exact_strips;        // strips of x that are searched in float32 beside a reduced copy
  Shared* shared;
  double* centre;            // [dim], scaled
  RowFacts* facts;           // [rows]
  Row* lists;                // [n]
  Candidate* near;           // [n, room]
  FarCandidate* far;         // [n, kFar]
  uint32_t *packed, *exact;  // [strip][word][MR], strips of x, then of y
  int64_t state_bytes;
};

ND_INLINE bool has_bfloat16() {
#if ND_HAS_BF16
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

template <class P>
ND_INLINE P* take(char*& at, int64_t count) {
  P* found = reinterpret_cast<P*>(at);
  at += ceil_div(count * static_cast<int64_t>(sizeof(P)), 64) * 64;
  return found;
}

// Candidates that k neighbours need, with room to collect more before the next look at them.
ND_INLINE int64_t room_for(int64_t k, int64_t m) { return smaller(k + smaller(3 * k, 4096) + 64, m + 1); }

Plan plan_of(const NeighborsArgs& args) {
  Plan p;
  p.self = args.joined;
  p.reduced = args.reduced && has_bfloat16();
  p.rows = args.n + args.m;
  p.n = args.joined ? p.rows : args.n;
  p.m = args.joined ? p.rows : args.m;
  p.longer = args.query_key != nullptr ? args.num_queries : 0;
  p.room = room_for(args.k, p.m);
  p.longer_room = p.longer > 0 ? room_for(args.query_k, p.m) : p.room;
  p.exact_words = args.dim;
  p.words = p.reduced ? ceil_div(args.dim, 2) : args.dim;
  p.strips_x = ceil_div(p.n, MR);
  p.strips_y = ceil_div(p.m, MR);
  p.exact_strips = p.reduced && args.dense != nullptr ? ceil_div(args.num_queries, MR) : 0;
  const int64_t strips = p.self ? p.strips_x : p.strips_x + p.strips_y;
  char* at = static_cast<char*>(args.state);
  p.shared = take<Shared>(at, 1);
  p.centre = take<double>(at, args.dim);
  p.facts = take<RowFacts>(at, p.rows);
  p.lists = take<Row>(at, p.n);
  p.near = take<Candidate>(at, p.longer * p.longer_room + (p.n - p.longer) * p.room);
  p.far = take<FarCandidate>(at, args.largest != nullptr ? p.n * kFar : 0);
  // Panels are copied MR words at a time, the last of a strip beyond its end.
  p.packed = take<uint32_t>(at, strips * p.words * MR + MR);
  p.exact = take<uint32_t>(at, p.exact_strips > 0 ? strips * p.exact_words * MR + MR : 0);
  p.state_bytes = at - static_cast<char*>(args.state);
  return p;
}

// Candidates of row i of x, how many there may be, and how many neighbours are wanted.
ND_INLINE Candidate* list_of(const Plan& p, int64_t i) {
  const int64_t longer = smaller(i, p.longer);
  return p.near + longer * p.longer_room + (i - longer) * p.room;
}
ND_INLINE int64_t room_of(const Plan& p, int64_t i) { return i < p.longer ? p.longer_room : p.room; }
ND_INLINE int64_t k_of(const NeighborsArgs& args, const Plan& p, int64_t i) {
  return i < p.longer ? args.query_k : args.k;
}

// Row r of x, then of y.
template <class T>
ND_INLINE const T* row_of(const NeighborsArgs& args, int64_t r) {
  return r < args.n ? static_cast<const T*>(args.x) + r * args.x_stride
                    : static_cast<const T*>(args.y) + (r - args.n) * args.y_stride;
}

// ------------------------------------------------------------------------------------------------ scan, settle, pack

// 2^-e with x in [2^(e-1), 2^e), or 1.
double power_of_two_below_inverse(double x) {
  int exponent = 0;
  if (x > 0) std::frexp(x, &exponent);
  return std::ldexp(1.0, -exponent);
}

template <class T>
RowFacts scan_row(const NeighborsArgs& args, const T* x) {
  RowFacts facts = {};
  T size[kLanes] = {}, bad[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= args.dim; k += kLanes)
    for (int64_t l = 0; l < kLanes; l++) {
      const T a = x[k + l] < 0 ? -x[k + l] : x[k + l];
      size[l] = size[l] > a ? size[l] : a;
      bad[l] += x[k + l] - x[k + l];  // NaN unless finite
    }
  for (; k < args.dim; k++) {
    const T a = x[k] < 0 ? -x[k] : x[k];
    size[0] = size[0] > a ? size[0] : a;
    bad[0] += x[k] - x[k];
  }
  for (int64_t l = 0; l < kLanes; l++) {
    facts.size = facts.size > static_cast<double>(size[l]) ? facts.size : static_cast<double>(size[l]);
    if (!(bad[l] == 0)) facts.size = HUGE_VAL;
  }
  facts.unit = 1;
  if (args.metric != Metric::kCosine || !(facts.size > 0) || facts.size == HUGE_VAL) return facts;
  const double scale = power_of_two_below_inverse(facts.size);
  double sum[kLanes] = {};
  for (k = 0; k + kLanes <= args.dim; k += kLanes)
    for (int64_t l = 0; l < kLanes; l++) {
      const double z = static_cast<double>(x[k + l]) * scale;
      sum[l] += z * z;
    }
  for (; k < args.dim; k++) sum[0] += static_cast<double>(x[k]) * scale * (static_cast<double>(x[k]) * scale);
  for (int64_t l = 1; l < kLanes; l++) sum[0] += sum[l];
  facts.unit = scale / std::sqrt(sum[0]);
  return facts;
}

// Factor of the values of a row before the centre is subtracted.
ND_INLINE double factor_of(const NeighborsArgs& args, const Plan& p, int64_t r) {
  return args.metric == Metric::kCosine ? p.facts[r].unit : p.shared->scale;
}

template <class T>
void take_centre(const NeighborsArgs& args, const Plan& p) {
  for (int64_t k = 0; k < args.dim; k++) p.centre[k] = 0;
  const int64_t step = ceil_div(p.rows, kCentreRows), count = ceil_div(p.rows, step);
  for (int64_t r = 0; r < p.rows; r += step) {
    const T* x = row_of<T>(args, r);
    const double factor = factor_of(args, p, r) / static_cast<double>(count);
    for (int64_t k = 0; k < args.dim; k++) p.centre[k] += factor * static_cast<double>(x[k]);
  }
  double square = 0;
  for (int64_t k = 0; k < args.dim; k++) square += p.centre[k] * p.centre[k];
  p.shared->centre_square = square / 2;
}

ND_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
ND_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
ND_INLINE uint32_t bfloat16_bits(float x) {  // to nearest even, of a finite x far from overflow
  const uint32_t bits = bits_of(x);
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

struct Sums {
  double square[kLanes], along[kLanes], error[kLanes], exact_error[kLanes];
};
ND_INLINE double total(const double* lanes) {
  double sum = 0;
  for (int64_t l = 0; l < kLanes; l++) sum += lanes[l];
  return sum;
}

// kLanes values of a row, centred: into the copies at stride MR, and into the sums.
template <class T>
ND_INLINE void pack_values(const NeighborsArgs& args, const Plan& p, const T* x, double factor, const double* centre,
                           uint32_t* packed, uint32_t* exact, Sums& sums) {
  uint32_t word[kLanes], coarse[kLanes];
  for (int64_t l = 0; l < kLanes; l++) {
    const double z = static_cast<double>(x[l]) * factor - centre[l];
    const float near = static_cast<float>(z);
    sums.square[l] += z * z;
    sums.along[l] += z * centre[l];
    word[l] = bits_of(near);
    coarse[l] = bfloat16_bits(near);
    const double off = z - static_cast<double>(p.reduced ? float_of(coarse[l] << 16) : near);
    sums.error[l] += off * off;
    const double exact_off = z - static_cast<double>(near);
    sums.exact_error[l] += exact_off * exact_off;
  }
  if (p.reduced)
    for (int64_t l = 0; l < kLanes; l += 2) packed[l / 2 * MR] = coarse[l] | coarse[l + 1] << 16;
  else
    for (int64_t l = 0; l < kLanes; l++) packed[l * MR] = word[l];
  if (p.exact_strips > 0)
    for (int64_t l = 0; l < kLanes; l++) exact[l * MR] = word[l];
  (void)args;
}

// Row r into its lane of a strip.
template <class T>
void pack_row(const NeighborsArgs& args, const Plan& p, int64_t r, uint32_t* packed, uint32_t* exact) {
  const T* x = row_of<T>(args, r);
  const double factor = factor_of(args, p, r);
  const int64_t per_word = p.reduced ? 2 : 1;
  Sums sums = {};
  int64_t k = 0;
  for (; k + kLanes <= args.dim; k += kLanes)
    pack_values(args, p, x + k, factor, p.centre + k, packed + k / per_word * MR, exact + k * MR, sums);
  if (k < args.dim) {  // the rest through buffers, zeros behind it
    T tail[kLanes] = {};
    double centre[kLanes] = {};
    uint32_t words[kLanes * MR], exact_words[kLanes * MR];
    for (int64_t l = 0; k + l < args.dim; l++) tail[l] = x[k + l], centre[l] = p.centre[k + l];
    pack_values(args, p, tail, factor, centre, words, exact_words, sums);
    for (int64_t w = k / per_word; w < p.words; w++) packed[w * MR] = words[(w - k / per_word) * MR];
    if (p.exact_strips > 0)
      for (int64_t w = k; w < p.exact_words; w++) exact[w * MR] = exact_words[(w - k) * MR];
  }
  // float64 sums are good to a few last digits; what they may be short of goes into the factor kUp and into kTiny.
  const double square = total(sums.square);
  RowFacts& facts = p.facts[r];
  facts.error = static_cast<float>(std::sqrt(total(sums.error))) * kUp + kTiny;
  facts.exact_error = static_cast<float>(std::sqrt(total(sums.exact_error))) * kUp + kTiny;
  facts.radius = static_cast<float>(std::sqrt(square)) * kUp + facts.error;
  facts.offset = static_cast<float>(
      args.metric == Metric::kInnerProduct ? -(total(sums.along) + p.shared->centre_square) : square);
}

template <class T>
void pack_strips(const NeighborsArgs& args, const Plan& p, int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; strip++) {
    const bool of_x = strip < p.strips_x;
    const int64_t first = of_x ? strip * MR : p.n + (strip - p.strips_x) * MR;
    const int64_t count = smaller(MR, (of_x ? p.n : p.n + p.m) - first);
    uint32_t* packed = p.packed + strip * p.words * MR;
    uint32_t* exact = p.exact + strip * p.exact_words * MR;
    if (count < MR) {
      std::memset(packed, 0, static_cast<size_t>(p.words * MR) * 4);
      if (p.exact_strips > 0) std::memset(exact, 0, static_cast<size_t>(p.exact_words * MR) * 4);
    }
    for (int64_t r = 0; r < count; r++) pack_row<T>(args, p, first + r, packed + r, exact + r);
    for (int64_t r = 0; of_x && r < count; r++)
      p.lists[first + r] = {.lock = 0,
                            .count = 0,
                            .far_count = 0,
                            .full = false,
                            .far_full = false,
                            .bound = HUGE_VALF,
                            .far_bound = -HUGE_VALF};
  }
}

// ------------------------------------------------------------------------------------------------ products

template <bool kPairs>
ND_BF16_TARGET ND_INLINE Floats multiply_add(Floats sum, uint32_t a, const uint32_t* b) {
#if ND_HAS_BF16
  if constexpr (kPairs)
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                     reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                                                     reinterpret_cast<__m512bh>(_mm512_loadu_si512(b))));
#endif
  return sum + broadcast(float_of(a)) * load(reinterpret_cast<const float*>(b));
}

// c [MR, kPanel] = or += a [steps, MR]' b [steps, NR], summed in registers from zero.
template <bool kPairs>
ND_BF16_TARGET void multiply(const uint32_t* a, const uint32_t* b, int64_t steps, float* c, bool first) {
  Floats sum[MR][2] = {};
  for (int64_t k = 0; k < steps; k++, a += MR, b += NR) {
#pragma GCC unroll 14
    for (int64_t r = 0; r < MR; r++) {
      sum[r][0] = multiply_add<kPairs>(sum[r][0], a[r], b);
      sum[r][1] = multiply_add<kPairs>(sum[r][1], a[r], b + W);
    }
  }
#pragma GCC unroll 14
  for (int64_t r = 0; r < MR; r++) {
    float* to = c + r * kPanel;
    store(to, first ? sum[r][0] : load(to) + sum[r][0]);
    store(to + W, first ? sum[r][1] : load(to + W) + sum[r][1]);
  }
}

// c [MR, kPanel]: products of a strip with the `columns` of a panel.
void multiply_strip(const uint32_t* strip, const uint32_t* panel, int64_t words, int64_t columns, bool pairs,
                    float* c) {
  for (int64_t k = 0; k < words; k += kDepth) {
    const int64_t steps = smaller(kDepth, words - k);
    for (int64_t j = 0; j < columns; j += NR) {
      const uint32_t* b = panel + j * words + k * NR;
      if (pairs)
        multiply<true>(strip + k * MR, b, steps, c + j, k == 0);
      else
        multiply<false>(strip + k * MR, b, steps, c + j, k == 0);
    }
  }
}

// Bound of |computed - exact| / (R_i R_j) of a product: a word takes one rounding, or two, and so does a step.
float rounding_of_products(int64_t words, bool pairs) {
  return (static_cast<float>((pairs ? 2 : 1) * smaller(words, kDepth) + ceil_div(words, kDepth)) + 4) * kUnit * kUp;
}

// Panel of columns [first, first + columns) of the strips of y: [NR columns][word][NR].
void copy_panel(const uint32_t* strips, int64_t words, int64_t first, int64_t columns, int64_t last, uint32_t* panel) {
  for (int64_t j = 0; j < columns; j += NR, panel += words * NR) {
    int64_t to = 0;
    while (to < NR) {  // pieces of strips, each written MR words wide and then overwritten by the next
      const int64_t column = first + j + to, lane = column % MR;
      const int64_t piece = smaller(MR - lane, NR - to);
      const uint32_t* from = strips + column / MR * words * MR + lane;
      if (column >= last) {
        for (int64_t k = 0; k < words; k++)
          for (int64_t l = to; l < NR; l++) panel[k * NR + l] = 0;
        break;
      }
      if (to + MR <= NR)
        for (int64_t k = 0; k < words; k++) std::memcpy(panel + k * NR + to, from + k * MR, MR * 4);
      else
        for (int64_t k = 0; k < words; k++)
          for (int64_t l = 0; l < piece; l++) panel[k * NR + to + l] = from[k * MR + l];
      to += piece;
    }
  }
}

// ------------------------------------------------------------------------------------------------ candidates

ND_INLINE void acquire(int32_t& lock) {
  while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE) != 0) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}
ND_INLINE void release(int32_t& lock) { __atomic_store_n(&lock, 0, __ATOMIC_RELEASE); }
ND_INLINE float read(const float& x) {
  float value;
  __atomic_load(&x, &value, __ATOMIC_RELAXED);
  return value;
}
ND_INLINE void write(float& x, float value) { __atomic_store(&x, &value, __ATOMIC_RELAXED); }

// The k-th smallest of v [count], which is reordered.
float kth_smallest(float* v, int64_t count, int64_t k) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const float pivot = v[(low + high) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (v[i] < pivot) i++;
      while (v[j] > pivot) j--;
      if (i <= j) {
        const float swap = v[i];
        v[i++] = v[j];
        v[j--] = swap;
      }
    }
    if (k - 1 <= j)
      high = j;
    else if (k - 1 >= i)
      low = i;
    else
      break;
  }
  return v[k - 1];
}

// Drops what cannot be among the k smallest; scratch [room].
void shrink(Row& row, Candidate* list, int64_t k, float* scratch) {
  if (row.count < k) return;
  for (int64_t e = 0; e < row.count; e++) scratch[e] = list[e].upper;
  const float bound = kth_smallest(scratch, row.count, k);
  int32_t kept = 0;
  for (int64_t e = 0; e < row.count; e++)
    if (list[e].lower <= bound) list[kept++] = list[e];
  row.count = kept;
  write(row.bound, bound);
}

// A score of row i; returns the bound after it.
float offer(const NeighborsArgs& args, const Plan& p, int64_t i, float score, float slack, int64_t j, float* scratch) {
  Row& row = p.lists[i];
  acquire(row.lock);
  if (!row.full && score - slack <= row.bound) {
    Candidate* list = list_of(p, i);
    const int64_t room = room_of(p, i);
    list[row.count++] = {.lower = score - slack, .upper = score + slack, .index = static_cast<int32_t>(j)};
    if (row.count == room) shrink(row, list, k_of(args, p, i), scratch);
    if (row.count == room) {
      row.full = true;
      write(row.bound, -HUGE_VALF);
    }
  }
  const float bound = row.bound;
  release(row.lock);
  return bound;
}

// The same for the largest score.
float offer_far(const Plan& p, int64_t i, float score, float slack, int64_t j) {
  Row& row = p.lists[i];
  acquire(row.lock);
  if (!row.far_full && score + slack >= row.far_bound) {
    FarCandidate* list = p.far + i * kFar;
    if (score - slack > row.far_bound) write(row.far_bound, score - slack);
    list[row.far_count++] = {.upper = score + slack, .index = static_cast<int32_t>(j)};
    if (row.far_count == kFar) {
      int32_t kept = 0;
      for (int64_t e = 0; e < kFar; e++)
        if (list[e].upper >= row.far_bound) list[kept++] = list[e];
      row.far_count = kept;
    }
    if (row.far_count == kFar) {
      row.far_full = true;
      write(row.far_bound, HUGE_VALF);
    }
  }
  const float bound = row.far_bound;
  release(row.lock);
  return bound;
}

// ------------------------------------------------------------------------------------------------ search

// One task: strips [begin, end) of x, all in one precision, by a panel.
struct Task {
  int64_t begin, end, first, columns, count;  // count <= columns: columns that are there
  bool exact;
};

int64_t panel_columns(int64_t words) { return larger(NR, smaller(kPanel, kPanelBytes / (4 * words) / NR * NR)); }
int64_t block_strips(int64_t words) { return larger(1, kBlockBytes / (4 * MR * words)); }

// Calls visit(begin, end, exact) for every block of strips.
template <class Visit>
ND_INLINE void for_each_block(const Plan& p, const Visit& visit) {
  int64_t begin = 0;
  while (begin < p.strips_x) {
    const bool exact = begin < p.exact_strips;
    const int64_t strips = block_strips(exact ? p.exact_words : p.words);
    const int64_t end = smaller(begin + strips, exact ? p.exact_strips : p.strips_x);
    if (visit(begin, end, exact)) return;
    begin = end;
  }
}

// Panels of a block, and the number of those that lie before its first row, which one set leaves out.
struct Panels {
  int64_t columns, skipped, count;
};
ND_INLINE Panels panels_of(const Plan& p, int64_t begin, bool exact) {
  Panels panels;
  panels.columns = panel_columns(exact ? p.exact_words : p.words);
  panels.skipped = p.self ? begin * MR / panels.columns : 0;
  panels.count = ceil_div(p.m, panels.columns) - panels.skipped;
  return panels;
}

Task task_of(const Plan& p, int64_t number) {
  Task task = {};
  for_each_block(p, [&](int64_t begin, int64_t end, bool exact) {
    const Panels panels = panels_of(p, begin, exact);
    if (number >= panels.count) {
      number -= panels.count;
      return false;
    }
    task = {.begin = begin,
            .end = end,
            .first = (panels.skipped + number) * panels.columns,
            .columns = panels.columns,
            .count = 0,
            .exact = exact};
    task.count = smaller(task.columns, p.m - task.first);
    return true;
  });
  return task;
}

// What a row has in common with every row of a block: slack = near * error_i + ..., see slack_of.
struct Extent {
  float radius, error, offset;
};
ND_INLINE float error_of(const RowFacts& facts, bool exact) { return exact ? facts.exact_error : facts.error; }

Extent extent_of(const RowFacts* facts, int64_t count, bool exact) {
  Extent e = {};
  for (int64_t r = 0; r < count; r++) {
    const float offset = facts[r].offset < 0 ? -facts[r].offset : facts[r].offset;
    e.radius = e.radius > facts[r].radius ? e.radius : facts[r].radius;
    e.error = e.error > error_of(facts[r], exact) ? e.error : error_of(facts[r], exact);
    e.offset = e.offset > offset ? e.offset : offset;
  }
  return e;
}

ND_INLINE float slack_of(const RowFacts& row, const Extent& others, float slope, float gamma, bool exact) {
  const float products = error_of(row, exact) * others.radius + row.radius * others.error +
                         (gamma + 4 * kUnit) * row.radius * others.radius;
  const float offset = row.offset < 0 ? -row.offset : row.offset;
  return (-slope * products + 4 * kUnit * (offset + others.offset)) * kUp + kTiny;
}

// Bit l: v_l <= t_l.
ND_INLINE uint32_t at_most(Floats v, Floats t) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, t, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, t, _CMP_LE_OQ)));
#else
  uint32_t bits = 0;
  for (int64_t l = 0; l < W; l++) bits |= static_cast<uint32_t>(v[l] <= t[l]) << l;
  return bits;
#endif
}

struct Columns {
  float offset[kPanel];               // NaN beyond the last column: no comparison holds
  float slack[kPanel], near[kPanel];  // near: bound + slack, scores up to which are candidates of the column
  float far[kPanel];                  // the same of the largest
};

struct Search {
  const NeighborsArgs& args;
  const Plan& p;
  const Task& task;
  float slope, gamma;
  Extent column_extent;
  Columns& columns;
  float* scratch;
};

// Scores of row i = c [kPanel] in place, offered to the row and, within one set and for j > i, to the columns.
ND_INLINE void offer_scores(const Search& s, int64_t i, float* c) {
  const Plan& p = s.p;
  const RowFacts& facts = p.facts[i];
  Row& row = p.lists[i];
  const bool far = s.args.largest != nullptr;
  const float slack = slack_of(facts, s.column_extent, s.slope, s.gamma, s.task.exact);
  float near_limit = read(row.bound) + slack, far_limit = far ? read(row.far_bound) - slack : HUGE_VALF;
  const int64_t own = p.self ? i - s.task.first : -1;  // column of j = i, if it is in this panel
  const int64_t start = larger(0, own);
  for (int64_t j = start / W * W; j < s.task.count; j += W) {
    const Floats score = broadcast(facts.offset) + load(s.columns.offset + j) + broadcast(s.slope) * load(c + j);
    store(c + j, score);
    const uint32_t from = j < start ? ~uint32_t{0} << (start - j) : ~uint32_t{0};  // j >= i
    for (uint32_t hits = at_most(score, broadcast(near_limit)) & from; hits != 0; hits &= hits - 1) {
      const int64_t at = j + __builtin_ctz(hits);
      near_limit = offer(s.args, p, i, c[at], slack, s.task.first + at, s.scratch) + slack;
    }
    if (far)
      for (uint32_t hits = at_most(broadcast(far_limit), score) & from; hits != 0; hits &= hits - 1) {
        const int64_t at = j + __builtin_ctz(hits);
        far_limit = offer_far(p, i, c[at], slack, s.task.first + at) - slack;
      }
    if (!p.self) continue;
    const uint32_t beyond = own >= j ? from & ~(uint32_t{1} << (own - j)) : from;  // j > i
    for (uint32_t hits = at_most(score, load(s.columns.near + j)) & beyond; hits != 0; hits &= hits - 1) {
      const int64_t at = j + __builtin_ctz(hits);
      const float of_column = s.columns.slack[at];
      s.columns.near[at] = offer(s.args, p, s.task.first + at, c[at], of_column, i, s.scratch) + of_column;
    }
    if (far)
      for (uint32_t hits = at_most(load(s.columns.far + j), score) & beyond; hits != 0; hits &= hits - 1) {
        const int64_t at = j + __builtin_ctz(hits);
        const float of_column = s.columns.slack[at];
        s.columns.far[at] = offer_far(p, s.task.first + at, c[at], of_column, i) - of_column;
      }
  }
}

// Keys of query i with the columns that are no queries, from squared distances of the scaled rows.
void write_dense(const Search& s, int64_t i, const float* c) {
  const NeighborsArgs& args = s.args;
  const double inverse = 1 / s.p.shared->scale;
  const float unit = static_cast<float>(inverse * inverse * (args.metric == Metric::kCosine ? 0.5 : 1));
  float* out = args.dense + i * (s.p.n - args.num_queries) - args.num_queries + s.task.first;
  for (int64_t j = larger(0, args.num_queries - s.task.first); j < s.task.count; j++)
    out[j] = c[j] > 0 ? c[j] * unit : 0;
}

// ------------------------------------------------------------------------------------------------ float64 keys

typedef double Doubles __attribute__((vector_size(64), aligned(8)));  // kLanes of them
typedef float FloatLanes __attribute__((vector_size(32), aligned(4), may_alias));

// Through references: a vector wider than a register has no calling convention.
ND_INLINE void widen(const float* x, Doubles& v) {
  v = __builtin_convertvector(*reinterpret_cast<const FloatLanes*>(x), Doubles);
}
ND_INLINE void widen(const double* x, Doubles& v) { std::memcpy(&v, x, sizeof v); }

// Sum over the values of two rows of what add(sum, x, y) adds, in a fixed order; `next` is the y to come.
template <class T, class Add>
ND_INLINE double sum_over(const T* x, const T* y, const T* next, int64_t dim, const Add& add) {
  Doubles sum[4] = {}, a, b;
  int64_t k = 0;
  for (; k + 4 * kLanes <= dim; k += 4 * kLanes) {
    for (int64_t line = 0; line < 4 * kLanes; line += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(next + k + line);
    for (int64_t q = 0; q < 4; q++) {
      widen(x + k + q * kLanes, a);
      widen(y + k + q * kLanes, b);
      add(sum[q], a, b);
    }
  }
  for (; k < dim; k += kLanes) {
    T rest_x[kLanes] = {}, rest_y[kLanes] = {};
    const size_t bytes = static_cast<size_t>(smaller(kLanes, dim - k)) * sizeof(T);
    std::memcpy(rest_x, x + k, bytes);
    std::memcpy(rest_y, y + k, bytes);
    widen(rest_x, a);
    widen(rest_y, b);
    add(sum[0], a, b);
  }
  const Doubles all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  double result = 0;
  for (int64_t l = 0; l < kLanes; l++) result += all[l];
  return result;
}

template <class T>
double key_of(const NeighborsArgs& args, const Plan& p, int64_t i, int64_t j, int64_t next_j) {
  const int64_t column = p.self ? j : p.n + j;  // as a row
  const T *x = row_of<T>(args, i), *y = row_of<T>(args, column), *next = row_of<T>(args, column + next_j - j);
  typedef const Doubles& In;
  if (args.metric == Metric::kSquaredEuclidean)
    return sum_over(x, y, next, args.dim, [](Doubles& sum, In a, In b) { sum += (a - b) * (a - b); });
  if (args.metric == Metric::kInnerProduct)
    return -sum_over(x, y, next, args.dim, [](Doubles& sum, In a, In b) { sum += a * b; });
  const double u = p.facts[i].unit, v = p.facts[column].unit;
  return 0.5 *
         sum_over(x, y, next, args.dim, [=](Doubles& sum, In a, In b) { sum += (a * u - b * v) * (a * u - b * v); });
}

struct Found {
  double key;
  int64_t index;
};
ND_INLINE bool before(const Found& a, const Found& b) { return a.key < b.key || (a.key == b.key && a.index < b.index); }
int compare(const void* a, const void* b) {
  const Found &x = *static_cast<const Found*>(a), &y = *static_cast<const Found*>(b);
  return before(x, y) ? -1 : before(y, x);
}

void write_sorted(const NeighborsArgs& args, const Plan& p, int64_t i, Found* found, int64_t count) {
  std::qsort(found, static_cast<size_t>(count), sizeof(Found), compare);
  for (int64_t a = 0; a < args.k; a++) {
    args.key[i * args.k + a] = found[a].key;
    args.index[i * args.k + a] = found[a].index;
  }
  for (int64_t a = 0; i < p.longer && a < args.query_k; a++) {
    args.query_key[i * args.query_k + a] = found[a].key;
    args.query_index[i * args.query_k + a] = found[a].index;
  }
}

template <class T>
void finish_row(const NeighborsArgs& args, const Plan& p, int64_t i, Found* found, float* scratch) {
  Row& row = p.lists[i];
  args.undecided[i] = row.full || row.far_full;
  if (args.undecided[i]) return;
  Candidate* list = list_of(p, i);
  shrink(row, list, k_of(args, p, i), scratch);
  for (int64_t e = 0; e < row.count; e++) {
    const int64_t j = list[e].index, next = e + 1 < row.count ? list[e + 1].index : j;
    found[e] = {key_of<T>(args, p, i, j, next), j};
  }
  write_sorted(args, p, i, found, row.count);
  if (args.largest == nullptr) return;
  double largest = -HUGE_VAL;
  for (const FarCandidate* far = p.far + i * kFar; far < p.far + i * kFar + row.far_count; far++) {
    if (far->upper < row.far_bound) continue;
    const double key = key_of<T>(args, p, i, far->index, far->index);
    largest = largest > key ? largest : key;
  }
  args.largest[i] = largest;
}

// Moves heap[0] down until no child comes after its parent: the root is the last of all.
void sift(Found* heap, int64_t count) {
  const Found moved = heap[0];
  int64_t at = 0;
  for (int64_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && before(heap[child], heap[child + 1])) child++;
    if (!before(moved, heap[child])) break;
    heap[at] = heap[child];
  }
  heap[at] = moved;
}

template <class T>
void exact_row(const NeighborsArgs& args, const Plan& p, int64_t i, Found* heap) {
  const int64_t k = k_of(args, p, i);
  double largest = -HUGE_VAL;
  for (int64_t a = 0; a < k; a++) heap[a] = {HUGE_VAL, p.m};
  for (int64_t j = 0; j < p.m; j++) {
    const Found one = {key_of<T>(args, p, i, j, smaller(j + 1, p.m - 1)), j};
    largest = largest > one.key ? largest : one.key;
    if (!before(one, heap[0])) continue;
    heap[0] = one;
    sift(heap, k);
  }
  write_sorted(args, p, i, heap, k);
  if (args.largest != nullptr) args.largest[i] = largest;
}

template <class F32, class F64>
ND_INLINE void by_dtype(const NeighborsArgs& args, const F32& f32, const F64& f64) {
  if (args.dtype == Dtype::kFloat32)
    f32();
  else
    f64();
}

}  // namespace

NeighborsPlan neighbors_plan(const NeighborsArgs& args) {
  const Plan p = plan_of(args);
  NeighborsPlan plan = {};
  plan.rows = p.rows;
  plan.strips = p.self ? p.strips_x : p.strips_x + p.strips_y;
  plan.state_bytes = p.state_bytes;
  int64_t panel = 0;
  for_each_block(p, [&](int64_t begin, int64_t, bool exact) {
    const Panels panels = panels_of(p, begin, exact);
    plan.search_tasks += panels.count;
    panel = larger(panel, (panels.columns * (exact ? p.exact_words : p.words) + MR) * 4);
    return false;
  });
  const int64_t searching = panel + 64 + static_cast<int64_t>(sizeof(float)) * (MR * kPanel + p.longer_room) +
                            static_cast<int64_t>(sizeof(Columns)) + 64;
  const int64_t finishing = p.longer_room * static_cast<int64_t>(sizeof(Found)) + 4 * p.longer_room + 128;
  plan.workspace_bytes = ceil_div(larger(searching, finishing), 64) * 64;
  return plan;
}

void neighbors_scan(const NeighborsArgs& args, int64_t begin, int64_t end) {
  const Plan p = plan_of(args);
  for (int64_t r = begin; r < end; r++)
    by_dtype(
        args, [&] { p.facts[r] = scan_row(args, row_of<float>(args, r)); },
        [&] { p.facts[r] = scan_row(args, row_of<double>(args, r)); });
}

int64_t neighbors_settle(const NeighborsArgs& args) {
  const Plan p = plan_of(args);
  double size = 0;
  for (int64_t r = 0; r < p.rows; r++) {
    if (p.facts[r].size == HUGE_VAL || (args.metric == Metric::kCosine && p.facts[r].size == 0)) return r;
    size = size > p.facts[r].size ? size : p.facts[r].size;
  }
  p.shared->scale = args.metric == Metric::kCosine ? 1 : power_of_two_below_inverse(size);
  by_dtype(args, [&] { take_centre<float>(args, p); }, [&] { take_centre<double>(args, p); });
  return -1;
}

void neighbors_pack(const NeighborsArgs& args, int64_t begin, int64_t end) {
  const Plan p = plan_of(args);
  by_dtype(args, [&] { pack_strips<float>(args, p, begin, end); }, [&] { pack_strips<double>(args, p, begin, end); });
}

void neighbors_search(const NeighborsArgs& args, int64_t number, void* workspace) {
  const Plan p = plan_of(args);
  const Task task = task_of(p, number);
  const int64_t words = task.exact ? p.exact_words : p.words;
  const uint32_t* strips = task.exact ? p.exact : p.packed;
  const uint32_t* columns_at = p.self ? strips : strips + p.strips_x * words * MR;
  const RowFacts* column_facts = (p.self ? p.facts : p.facts + p.n) + task.first;
  char* at = static_cast<char*>(workspace);
  uint32_t* panel = take<uint32_t>(at, task.columns * words + MR);
  float* c = take<float>(at, MR * kPanel);
  Columns& columns = *take<Columns>(at, 1);
  const bool pairs = p.reduced && !task.exact;
  const Search s = {.args = args,
                    .p = p,
                    .task = task,
                    .slope = args.metric == Metric::kInnerProduct ? -1.f : -2.f,
                    .gamma = rounding_of_products(words, pairs),
                    .column_extent = extent_of(column_facts, task.count, task.exact),
                    .columns = columns,
                    .scratch = take<float>(at, p.longer_room)};
  copy_panel(columns_at, words, task.first, task.columns, p.m, panel);

  const int64_t first_row = task.begin * MR;
  const int64_t last_row = smaller(p.n, p.self ? smaller(task.end * MR, task.first + task.count) : task.end * MR);
  const Extent rows = extent_of(p.facts + first_row, last_row - first_row, task.exact);
  for (int64_t j = 0; j < kPanel; j++) columns.offset[j] = j < task.count ? column_facts[j].offset : __builtin_nanf("");
  if (p.self)
    for (int64_t j = 0; j < task.count; j++) {
      columns.slack[j] = slack_of(column_facts[j], rows, s.slope, s.gamma, task.exact);
      columns.near[j] = read(p.lists[task.first + j].bound) + columns.slack[j];
      columns.far[j] = read(p.lists[task.first + j].far_bound) - columns.slack[j];
    }
  for (int64_t i = first_row; i < last_row; i += MR) {
    multiply_strip(strips + i * words, panel, words, task.columns, pairs, c);
    for (int64_t r = 0; r < smaller(MR, last_row - i); r++) {
      offer_scores(s, i + r, c + r * kPanel);
      if (args.dense != nullptr && i + r < args.num_queries) write_dense(s, i + r, c + r * kPanel);
    }
  }
}

void neighbors_finish(const NeighborsArgs& args, int64_t begin, int64_t end, void* workspace) {
  const Plan p = plan_of(args);
  char* at = static_cast<char*>(workspace);
  Found* found = take<Found>(at, p.longer_room);
  float* scratch = reinterpret_cast<float*>(at);
  for (int64_t i = begin; i < end; i++)
    by_dtype(
        args, [&] { finish_row<float>(args, p, i, found, scratch); },
        [&] { finish_row<double>(args, p, i, found, scratch); });
}

void neighbors_exact(const NeighborsArgs& args, int64_t row, void* workspace) {
  const Plan p = plan_of(args);
  Found* heap = static_cast<Found*>(workspace);
  by_dtype(args, [&] { exact_row<float>(args, p, row, heap); }, [&] { exact_row<double>(args, p, row, heap); });
}

}  // namespace nd::cpu::ND_CPU_LEVEL
