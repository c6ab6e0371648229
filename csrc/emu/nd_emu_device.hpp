// What device code can name: keywords, vector types, built-in variables, intrinsics. Semantics are those of the CUDA
// C++ programming guide; where it leaves a value undefined, the emulation reports or does not compile.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include <bit>
#include <concepts>
#include <type_traits>

#include "nd_emu_threads.hpp"

// ---- keywords ----

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // blocks run one after another, and a thread_local would get no AddressSanitizer redzones

// ---- vector types ----

#define ND_EMU_VECTOR2(T, NAME, ALIGNMENT)       \
  struct alignas(ALIGNMENT) NAME##2 { T x, y; }; \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }
#define ND_EMU_VECTOR3(T, NAME)  \
  struct NAME##3 { T x, y, z; }; \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }
#define ND_EMU_VECTOR4(T, NAME, ALIGNMENT)             \
  struct alignas(ALIGNMENT) NAME##4 { T x, y, z, w; }; \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
ND_EMU_VECTOR2(signed char, char, 2)
ND_EMU_VECTOR4(signed char, char, 4)
ND_EMU_VECTOR2(unsigned char, uchar, 2)
ND_EMU_VECTOR4(unsigned char, uchar, 4)
ND_EMU_VECTOR2(short, short, 4)
ND_EMU_VECTOR4(short, short, 8)
ND_EMU_VECTOR2(unsigned short, ushort, 4)
ND_EMU_VECTOR4(unsigned short, ushort, 8)
ND_EMU_VECTOR2(int, int, 8)
ND_EMU_VECTOR3(int, int)
ND_EMU_VECTOR4(int, int, 16)
ND_EMU_VECTOR2(unsigned, uint, 8)
ND_EMU_VECTOR4(unsigned, uint, 16)
ND_EMU_VECTOR2(long long, longlong, 16)
ND_EMU_VECTOR2(unsigned long long, ulonglong, 16)
ND_EMU_VECTOR2(float, float, 8)
ND_EMU_VECTOR3(float, float)
ND_EMU_VECTOR4(float, float, 16)
ND_EMU_VECTOR2(double, double, 16)
#undef ND_EMU_VECTOR2
#undef ND_EMU_VECTOR3
#undef ND_EMU_VECTOR4
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// ---- built-in variables ----

namespace nd_emu {
ND_EMU_INTERNAL inline uint3 thread_position() { return current->self->position; }
ND_EMU_INTERNAL inline uint3 block_position() { return current->block_id; }
ND_EMU_INTERNAL inline dim3 block_shape() { return current->block; }
ND_EMU_INTERNAL inline dim3 grid_shape() { return current->grid; }
ND_EMU_INTERNAL inline void* dynamic_shared() { return current->dynamic_shared; }
}  // namespace nd_emu

#define threadIdx (nd_emu::thread_position())
#define blockIdx (nd_emu::block_position())
#define blockDim (nd_emu::block_shape())
#define gridDim (nd_emu::grid_shape())
constexpr int warpSize = 32;

// ---- barriers ----

#define ND_EMU_CALLER std::source_location location = std::source_location::current()

inline void __syncthreads(ND_EMU_CALLER) { nd_emu::meet_block(false, {"__syncthreads", location}); }

inline int __syncthreads_or(int predicate, ND_EMU_CALLER) {
  return nd_emu::meet_block(predicate != 0, {"__syncthreads_or", location}) != 0;
}

inline int __syncthreads_and(int predicate, ND_EMU_CALLER) {
  return nd_emu::meet_block(predicate == 0, {"__syncthreads_and", location}) == 0;
}

inline int __syncthreads_count(int predicate, ND_EMU_CALLER) {
  return static_cast<int>(nd_emu::meet_block(predicate != 0, {"__syncthreads_count", location}));
}

// Memory is sequentially consistent here; for ThreadSanitizer a fence alone orders nothing, as on a device.
inline void __threadfence_block() {}
inline void __threadfence() {}

[[noreturn]] inline void __trap(ND_EMU_CALLER) { nd_emu::fail("the kernel trapped", {"__trap", location}); }

// ---- warp collectives ----

namespace nd_emu {

template <class T>
concept Shuffled = (std::is_arithmetic_v<T> && sizeof(T) >= 4) || requires { typename T::nd_emu_shuffled; };

template <class T>
ND_EMU_INTERNAL uint64_t to_bits(T value) {
  if constexpr (sizeof(T) == 8) return __builtin_bit_cast(uint64_t, value);
  if constexpr (sizeof(T) == 4) return __builtin_bit_cast(uint32_t, value);
  if constexpr (sizeof(T) == 2) return __builtin_bit_cast(uint16_t, value);
}

template <class T>
ND_EMU_INTERNAL T from_bits(uint64_t bits) {
  if constexpr (sizeof(T) == 8) return __builtin_bit_cast(T, bits);
  if constexpr (sizeof(T) == 4) return __builtin_bit_cast(T, static_cast<uint32_t>(bits));
  if constexpr (sizeof(T) == 2) return __builtin_bit_cast(T, static_cast<uint16_t>(bits));
}

ND_EMU_INTERNAL inline unsigned lane() { return current->self->lane(); }

ND_EMU_INTERNAL inline void meet_only(Thread*, unsigned) {}

ND_EMU_INTERNAL inline void take_from_source(Thread* lanes, unsigned mask) {
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Thread& lane = lanes[__builtin_ctz(rest)];
    lane.received = lanes[lane.source].sent;
  }
}

ND_EMU_INTERNAL inline void give_all(Thread* lanes, unsigned mask, uint64_t value) {
  for (unsigned rest = mask; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].received = value;
}

// Lanes of the mask that sent `value`.
ND_EMU_INTERNAL inline unsigned senders(const Thread* lanes, unsigned mask, uint64_t value) {
  unsigned found = 0;
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const unsigned k = __builtin_ctz(rest);
    if (lanes[k].sent == value) found |= 1u << k;
  }
  return found;
}

ND_EMU_INTERNAL inline void ballot(Thread* lanes, unsigned mask) { give_all(lanes, mask, senders(lanes, mask, 1)); }

ND_EMU_INTERNAL inline void match_each(Thread* lanes, unsigned mask) {
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Thread& lane = lanes[__builtin_ctz(rest)];
    lane.received = senders(lanes, mask, lane.sent);
  }
}

template <class T, class Op>
ND_EMU_INTERNAL void reduce(Thread* lanes, unsigned mask) {
  T total = from_bits<T>(lanes[__builtin_ctz(mask)].sent);
  for (unsigned rest = mask & (mask - 1); rest; rest &= rest - 1) {
    total = Op::apply(total, from_bits<T>(lanes[__builtin_ctz(rest)].sent));
  }
  give_all(lanes, mask, to_bits(total));
}

struct Add {
  template <class T>
  ND_EMU_INTERNAL static T apply(T a, T b) {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));  // wraps, as on a device
  }
};
struct Min {
  template <class T>
  ND_EMU_INTERNAL static T apply(T a, T b) {
    return b < a ? b : a;
  }
};
struct Max {
  template <class T>
  ND_EMU_INTERNAL static T apply(T a, T b) {
    return a < b ? b : a;
  }
};
struct And {
  ND_EMU_INTERNAL static unsigned apply(unsigned a, unsigned b) { return a & b; }
};
struct Or {
  ND_EMU_INTERNAL static unsigned apply(unsigned a, unsigned b) { return a | b; }
};
struct Xor {
  ND_EMU_INTERNAL static unsigned apply(unsigned a, unsigned b) { return a ^ b; }
};

template <Shuffled T>
ND_EMU_INTERNAL T shuffle(unsigned mask, T value, unsigned source, Place place) {
  return from_bits<T>(meet_warp(mask, to_bits(value), source, &take_from_source, place));
}

// Width of a shuffle: a power of two up to 32.
ND_EMU_INTERNAL inline unsigned segment(int width, Place place) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("the width of a shuffle is no power of two up to 32", place);
  return static_cast<unsigned>(width);
}

}  // namespace nd_emu

inline void __syncwarp(unsigned mask = 0xffffffffu, ND_EMU_CALLER) {
  nd_emu::meet_warp(mask, 0, nd_emu::lane(), &nd_emu::meet_only, {"__syncwarp", location});
}

// From lane `source` of the own segment of `width` lanes.
template <nd_emu::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, ND_EMU_CALLER) {
  const nd_emu::Place place{"__shfl_sync", location};
  const unsigned low = nd_emu::segment(width, place) - 1;
  return nd_emu::shuffle(mask, value, (static_cast<unsigned>(source) & low) | (nd_emu::lane() & ~low), place);
}

// From `delta` lanes below; the own value where that is below the segment.
template <nd_emu::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, ND_EMU_CALLER) {
  const nd_emu::Place place{"__shfl_up_sync", location};
  const unsigned low = nd_emu::segment(width, place) - 1, lane = nd_emu::lane();
  return nd_emu::shuffle(mask, value, delta <= (lane & low) ? lane - delta : lane, place);
}

// From `delta` lanes above; the own value where that is above the segment.
template <nd_emu::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, ND_EMU_CALLER) {
  const nd_emu::Place place{"__shfl_down_sync", location};
  const unsigned low = nd_emu::segment(width, place) - 1, lane = nd_emu::lane();
  return nd_emu::shuffle(mask, value, delta <= low - (lane & low) ? lane + delta : lane, place);
}

// From lane ^ lane_mask; the own value where that is in a later segment.
template <nd_emu::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, ND_EMU_CALLER) {
  const nd_emu::Place place{"__shfl_xor_sync", location};
  const unsigned low = nd_emu::segment(width, place) - 1, lane = nd_emu::lane();
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  return nd_emu::shuffle(mask, value, source <= (lane | low) ? source : lane, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, ND_EMU_CALLER) {
  const nd_emu::Place place{"__ballot_sync", location};
  return static_cast<unsigned>(nd_emu::meet_warp(mask, predicate != 0, nd_emu::lane(), &nd_emu::ballot, place));
}

inline int __any_sync(unsigned mask, int predicate, ND_EMU_CALLER) {
  const nd_emu::Place place{"__any_sync", location};
  return nd_emu::meet_warp(mask, predicate != 0, nd_emu::lane(), &nd_emu::ballot, place) != 0;
}

inline int __all_sync(unsigned mask, int predicate, ND_EMU_CALLER) {
  const nd_emu::Place place{"__all_sync", location};
  return nd_emu::meet_warp(mask, predicate != 0, nd_emu::lane(), &nd_emu::ballot, place) == mask;
}

// Lanes of the mask whose value has the same bits.
template <nd_emu::Shuffled T>
unsigned __match_any_sync(unsigned mask, T value, ND_EMU_CALLER) {
  const nd_emu::Place place{"__match_any_sync", location};
  const uint64_t bits = nd_emu::to_bits(value);
  return static_cast<unsigned>(nd_emu::meet_warp(mask, bits, nd_emu::lane(), &nd_emu::match_each, place));
}

template <nd_emu::Shuffled T>
unsigned __match_all_sync(unsigned mask, T value, int* all_same, ND_EMU_CALLER) {
  const nd_emu::Place place{"__match_all_sync", location};
  const uint64_t bits = nd_emu::to_bits(value);
  *all_same = nd_emu::meet_warp(mask, bits, nd_emu::lane(), &nd_emu::match_each, place) == mask;
  return *all_same ? mask : 0;
}

#define ND_EMU_REDUCE(NAME, T, OP)                                                                             \
  inline T NAME(unsigned mask, T value, ND_EMU_CALLER) {                                                       \
    const nd_emu::Place place{#NAME, location};                                                                \
    const uint64_t bits = nd_emu::to_bits(value);                                                              \
    return nd_emu::from_bits<T>(nd_emu::meet_warp(mask, bits, nd_emu::lane(), &nd_emu::reduce<T, OP>, place)); \
  }
ND_EMU_REDUCE(__reduce_add_sync, int, nd_emu::Add)
ND_EMU_REDUCE(__reduce_add_sync, unsigned, nd_emu::Add)
ND_EMU_REDUCE(__reduce_min_sync, int, nd_emu::Min)
ND_EMU_REDUCE(__reduce_min_sync, unsigned, nd_emu::Min)
ND_EMU_REDUCE(__reduce_max_sync, int, nd_emu::Max)
ND_EMU_REDUCE(__reduce_max_sync, unsigned, nd_emu::Max)
ND_EMU_REDUCE(__reduce_and_sync, unsigned, nd_emu::And)
ND_EMU_REDUCE(__reduce_or_sync, unsigned, nd_emu::Or)
ND_EMU_REDUCE(__reduce_xor_sync, unsigned, nd_emu::Xor)
#undef ND_EMU_REDUCE

// ---- atomics: relaxed, as on a device; each returns the old value ----

namespace nd_emu {

template <class T, class... Allowed>
concept OneOf = (std::same_as<T, Allowed> || ...);
template <class T>
concept Word = OneOf<T, int, unsigned, unsigned long long>;
template <class T>
concept OrderedWord = OneOf<T, int, unsigned, long long, unsigned long long>;

// Replaces *address by update(old) in one step.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    next = update(old);
  } while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace nd_emu

template <class T>
  requires(nd_emu::Word<T> || nd_emu::OneOf<T, float, double>)
T atomicAdd(T* address, std::type_identity_t<T> value) {
  if constexpr (std::integral<T>)
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  else
    return nd_emu::atomic_update(address, [=](T old) { return old + value; });
}

template <nd_emu::OneOf<int, unsigned> T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return __atomic_fetch_sub(address, value, __ATOMIC_RELAXED);
}

template <nd_emu::OrderedWord T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return nd_emu::atomic_update(address, [=](T old) { return old < value ? value : old; });
}

template <nd_emu::OrderedWord T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return nd_emu::atomic_update(address, [=](T old) { return value < old ? value : old; });
}

template <nd_emu::Word T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return __atomic_fetch_and(address, value, __ATOMIC_RELAXED);
}

template <nd_emu::Word T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

template <nd_emu::Word T>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return __atomic_fetch_xor(address, value, __ATOMIC_RELAXED);
}

template <class T>
  requires(nd_emu::Word<T> || std::same_as<T, float>)
T atomicExch(T* address, std::type_identity_t<T> value) {
  return nd_emu::atomic_update(address, [=](T) { return value; });
}

template <class T>
  requires(nd_emu::Word<T> || std::same_as<T, unsigned short>)
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return compare;
}

// ---- loads and stores with cache hints ----

#define ND_EMU_LOAD(NAME)    \
  template <class T>         \
  T NAME(const T* address) { \
    return *address;         \
  }
ND_EMU_LOAD(__ldg)
ND_EMU_LOAD(__ldca)
ND_EMU_LOAD(__ldcg)
ND_EMU_LOAD(__ldcs)
#undef ND_EMU_LOAD

#define ND_EMU_STORE(NAME)                               \
  template <class T>                                     \
  void NAME(T* address, std::type_identity_t<T> value) { \
    *address = value;                                    \
  }
ND_EMU_STORE(__stcg)
ND_EMU_STORE(__stcs)
ND_EMU_STORE(__stwt)
#undef ND_EMU_STORE

// ---- bits ----

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return std::countl_zero(static_cast<unsigned long long>(v)); }

inline unsigned long long __brevll(unsigned long long v) {
  v = (v >> 1 & 0x5555555555555555u) | (v & 0x5555555555555555u) << 1;
  v = (v >> 2 & 0x3333333333333333u) | (v & 0x3333333333333333u) << 2;
  v = (v >> 4 & 0x0f0f0f0f0f0f0f0fu) | (v & 0x0f0f0f0f0f0f0f0fu) << 4;
  return __builtin_bswap64(v);
}
inline unsigned __brev(unsigned v) { return static_cast<unsigned>(__brevll(v) >> 32); }

// The upper 32 bits of high:low << (shift mod 32), and the lower 32 bits of high:low >> (shift mod 32).
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}

// Each of the four selector digits of `selector` names a byte of high:low; its top bit repeats that byte's sign.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned digit = selector >> (4 * i) & 15;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (digit & 7)) & 255);
    if (digit & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
inline int __double2hiint(double v) { return static_cast<int>(std::bit_cast<uint64_t>(v) >> 32); }
inline int __double2loint(double v) { return static_cast<int>(std::bit_cast<uint64_t>(v)); }
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(uint64_t{static_cast<unsigned>(high)} << 32 | static_cast<unsigned>(low));
}

// ---- arithmetic: what <math.h> lacks; the approximate functions are exact here ----

template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::floating_point<T>)
    return static_cast<T>(fmin(static_cast<T>(a), static_cast<T>(b)));
  else
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::floating_point<T>)
    return static_cast<T>(fmax(static_cast<T>(a), static_cast<T>(b)));
  else
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

inline float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// sin(pi x) and cos(pi x), exact at multiples of 1/2.
inline void sincospi(double x, double* sine, double* cosine) {
  const double quadrant = nearbyint(2 * x);
  const double angle = M_PI * (x - quadrant / 2), s = sin(angle), c = cos(angle);
  switch (static_cast<int>(fmod(fmod(quadrant, 4) + 4, 4))) {
    case 0:
      *sine = s, *cosine = c;
      break;
    case 1:
      *sine = c, *cosine = -s;
      break;
    case 2:
      *sine = -s, *cosine = -c;
      break;
    default:
      *sine = -c, *cosine = s;
  }
}
inline double sinpi(double x) {
  double s, c;
  sincospi(x, &s, &c);
  return s;
}
inline double cospi(double x) {
  double s, c;
  sincospi(x, &s, &c);
  return c;
}
inline float sinpif(float x) { return static_cast<float>(sinpi(x)); }
inline float cospif(float x) { return static_cast<float>(cospi(x)); }
inline void sincospif(float x, float* sine, float* cosine) { *sine = sinpif(x), *cosine = cospif(x); }

inline float fdividef(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline void __sincosf(float x, float* sine, float* cosine) { *sine = sinf(x), *cosine = cosf(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __drcp_rn(double a) { return 1.0 / a; }
inline double __dsqrt_rn(double a) { return sqrt(a); }

// ---- conversions: to integers they saturate and turn NaN into 0 ----

namespace nd_emu {

// `x`, already rounded to an integer, as T.
template <class T>
T saturated(double x) {
  const double lowest = static_cast<double>(std::numeric_limits<T>::min());
  const double beyond = std::ldexp(1.0, std::numeric_limits<T>::digits);
  if (x != x) return 0;
  if (x < lowest) return std::numeric_limits<T>::min();
  return x < beyond ? static_cast<T>(x) : std::numeric_limits<T>::max();
}

}  // namespace nd_emu

#define ND_EMU_TO_INTEGER(FROM, FROM_TYPE, TO, TO_TYPE)                                                         \
  inline TO_TYPE __##FROM##2##TO##_rn(FROM_TYPE x) { return nd_emu::saturated<TO_TYPE>(nearbyint(double{x})); } \
  inline TO_TYPE __##FROM##2##TO##_rz(FROM_TYPE x) { return nd_emu::saturated<TO_TYPE>(trunc(double{x})); }     \
  inline TO_TYPE __##FROM##2##TO##_rd(FROM_TYPE x) { return nd_emu::saturated<TO_TYPE>(floor(double{x})); }     \
  inline TO_TYPE __##FROM##2##TO##_ru(FROM_TYPE x) { return nd_emu::saturated<TO_TYPE>(ceil(double{x})); }
ND_EMU_TO_INTEGER(float, float, int, int)
ND_EMU_TO_INTEGER(float, float, uint, unsigned)
ND_EMU_TO_INTEGER(float, float, ll, long long)
ND_EMU_TO_INTEGER(double, double, int, int)
ND_EMU_TO_INTEGER(double, double, uint, unsigned)
ND_EMU_TO_INTEGER(double, double, ll, long long)
#undef ND_EMU_TO_INTEGER

inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline double __int2double_rn(int x) { return x; }
inline double __uint2double_rn(unsigned x) { return x; }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
