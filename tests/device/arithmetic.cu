// Bits, conversions and mathematical functions of device code, against plain C++ on the host.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cases.hpp"

namespace {

// A function of one argument: what the device computes and what the host expects.
#define ND_FUNCTION(NAME, FROM, TO, DEVICE, HOST)          \
  struct NAME {                                            \
    using From = FROM;                                     \
    using To = TO;                                         \
    static __device__ To device(From x) { return DEVICE; } \
    static To host(From x) { return HOST; }                \
  }

template <class F>
__global__ void apply(const typename F::From* in, typename F::To* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = F::device(in[i]);
}

// Within `relative` of the host's value; 0: the same bits.
template <class F>
void check(const char* what, const std::vector<typename F::From>& in, double relative = 0) {
  const int n = static_cast<int>(in.size());
  const test::DeviceArray<typename F::From> from(in);
  const test::DeviceArray<typename F::To> to(n);
  ND_LAUNCH(apply<F>, (n + 63) / 64, 64, 0, nullptr, from.data(), to.data(), n);
  std::vector<typename F::To> expected;
  for (typename F::From x : in) expected.push_back(F::host(x));
  if (relative == 0) {
    test::expect(what, to.values(), expected);
  } else {
    test::expect_near(what, to.values(), expected, relative);
  }
}

// ---- bits ----

std::vector<uint64_t> words() {
  std::vector<uint64_t> all = {0, 1, ~0ull, 1ull << 31, 1ull << 32, 1ull << 63, 0xffffffffull};
  uint64_t x = 88172645463325252ull;
  for (int i = 0; i < 64; ++i) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    all.push_back(x >> i);
  }
  return all;
}

int ones(uint64_t x) {
  int count = 0;
  for (; x; x >>= 1) count += x & 1;
  return count;
}

int first_one(uint64_t x) {  // 1 for the lowest bit, 0 for none
  for (int i = 0; i < 64; ++i) {
    if (x >> i & 1) return i + 1;
  }
  return 0;
}

int leading_zeros(uint64_t x, int bits) {
  int count = 0;
  while (count < bits && !(x >> (bits - 1 - count) & 1)) ++count;
  return count;
}

uint64_t reversed(uint64_t x, int bits) {
  uint64_t result = 0;
  for (int i = 0; i < bits; ++i) result |= (x >> i & 1) << (bits - 1 - i);
  return result;
}

uint64_t upper_half_of_product(uint64_t a, uint64_t b) {
  const uint64_t low = 0xffffffff, a0 = a & low, a1 = a >> 32, b0 = b & low, b1 = b >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32), cross = a0 * b1 + (middle & low);
  return a1 * b1 + (middle >> 32) + (cross >> 32);
}

uint32_t permuted_bytes(uint64_t x, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 3; i >= 0; --i) {
    const int digit = selector >> 4 * i & 15, byte = static_cast<int>(x >> 8 * (digit & 7) & 255);
    result = result << 8 | (digit < 8 ? byte : byte < 128 ? 0 : 255);
  }
  return result;
}

using Word = unsigned long long;
ND_FUNCTION(PopulationCount, Word, int, __popc(unsigned(x)) + 100 * __popcll(x), ones(uint32_t(x)) + 100 * ones(x));
ND_FUNCTION(FirstSet, Word, int, __ffs(int(x)) + 100 * __ffsll((long long)x),
            first_one(uint32_t(x)) + 100 * first_one(x));
ND_FUNCTION(LeadingZeros, Word, int, __clz(int(x)) + 100 * __clzll((long long)x),
            leading_zeros(uint32_t(x), 32) + 100 * leading_zeros(x, 64));
ND_FUNCTION(Reversed, Word, Word, __brevll(x) ^ __brev(unsigned(x)), reversed(x, 64) ^ reversed(uint32_t(x), 32));
ND_FUNCTION(Bytes, Word, unsigned, __byte_perm(unsigned(x), unsigned(x >> 32), unsigned(x >> 16)),
            permuted_bytes(x, uint32_t(x >> 16)));
ND_FUNCTION(FunnelLeft, Word, unsigned, __funnelshift_l(unsigned(x), unsigned(x >> 32), unsigned(x >> 7)),
            uint32_t((x << (x >> 7 & 31)) >> 32));
ND_FUNCTION(FunnelRight, Word, unsigned, __funnelshift_r(unsigned(x), unsigned(x >> 32), unsigned(x >> 7)),
            uint32_t(x >> (x >> 7 & 31)));
ND_FUNCTION(ProductUnsigned, Word, unsigned, __umulhi(unsigned(x), unsigned(x >> 32)),
            uint32_t((x & 0xffffffff) * (x >> 32) >> 32));
ND_FUNCTION(ProductSigned, Word, int, __mulhi(int(x), int(x >> 32)), int(int64_t(int(x)) * int(x >> 32) >> 32));
ND_FUNCTION(ProductLong, Word, Word, __umul64hi(x, ~x * 3), upper_half_of_product(x, ~x * 3));

ND_CASE(bits) {
  const std::vector<uint64_t> all = words();
  const std::vector<Word> in(all.begin(), all.end());
  check<PopulationCount>("__popc, __popcll", in);
  check<FirstSet>("__ffs, __ffsll", in);
  check<LeadingZeros>("__clz, __clzll", in);
  check<Reversed>("__brev, __brevll", in);
  check<Bytes>("__byte_perm", in);
  check<FunnelLeft>("__funnelshift_l", in);
  check<FunnelRight>("__funnelshift_r", in);
  check<ProductUnsigned>("__umulhi", in);
  check<ProductSigned>("__mulhi", in);
  check<ProductLong>("__umul64hi", in);
}

ND_FUNCTION(FloatBits, float, float, __int_as_float(__float_as_int(x)) + __uint_as_float(__float_as_uint(x) ^ 1u << 31),
            x - x);
ND_FUNCTION(FloatOne, float, unsigned, __float_as_uint(x) + unsigned(__float_as_int(1.0f)),
            0x3f800000u + (x < 0 ? 1u << 31 : 0u));
ND_FUNCTION(DoubleBits, double, double, __longlong_as_double(__double_as_longlong(x) ^ 1ll << 63), -x);
ND_FUNCTION(DoubleHalves, double, double, __hiloint2double(__double2hiint(x), __double2loint(x)), x);

ND_CASE(bit_casts) {
  check<FloatBits>("float", {1.5f, -2.0f, 0.0f, 1e-40f});
  check<FloatOne>("zeros", {0.0f, 0.0f});
  check<DoubleBits>("double", {1.5, -2.0, 0.0, 1e-310, INFINITY});
  check<DoubleHalves>("halves", {1.5, -2.0e300, 0.1, 1e-310, INFINITY});
}

// ---- conversions ----

// Truncation saturates and turns NaN into 0.
template <class T, class X>
T saturated(X x) {
  if (std::isnan(x)) return 0;
  if (double(x) <= double(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (double(x) >= double(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}

ND_FUNCTION(FloatToInt, float, int, __float2int_rn(x), saturated<int>(std::nearbyint(x)));
ND_FUNCTION(FloatToIntZero, float, int, __float2int_rz(x), saturated<int>(std::trunc(x)));
ND_FUNCTION(FloatToIntDown, float, int, __float2int_rd(x), saturated<int>(std::floor(x)));
ND_FUNCTION(FloatToIntUp, float, int, __float2int_ru(x), saturated<int>(std::ceil(x)));
ND_FUNCTION(FloatToUnsigned, float, unsigned, __float2uint_rn(x), saturated<unsigned>(std::nearbyint(x)));
ND_FUNCTION(DoubleToInt, double, int, __double2int_rn(x), saturated<int>(std::nearbyint(x)));
ND_FUNCTION(DoubleToUnsignedZero, double, unsigned, __double2uint_rz(x), saturated<unsigned>(std::trunc(x)));
ND_FUNCTION(ToFloat, long long, float, __ll2float_rn(x) + __int2float_rn(int(x)) + __uint2float_rn(unsigned(x)),
            float(x) + float(int(x)) + float(unsigned(x)));
ND_FUNCTION(ToDouble, long long, double, __ll2double_rn(x) + __int2double_rn(int(x)) + __uint2double_rn(unsigned(x)),
            double(x) + double(int(x)) + double(unsigned(x)));
ND_FUNCTION(Narrowed, double, float, __double2float_rn(x), static_cast<float>(x));

ND_CASE(conversions) {
  const std::vector<float> x = {0.5f, 1.5f,  2.5f, -0.5f,    -1.5f,     1e6f, -1e6f,
                                3e9f, -3e9f, 5e9f, INFINITY, -INFINITY, NAN};
  const std::vector<double> y(x.begin(), x.end());
  check<FloatToInt>("__float2int_rn", x);
  check<FloatToIntZero>("__float2int_rz", x);
  check<FloatToIntDown>("__float2int_rd", x);
  check<FloatToIntUp>("__float2int_ru", x);
  check<FloatToUnsigned>("__float2uint_rn", x);
  check<DoubleToInt>("__double2int_rn", y);
  check<DoubleToUnsignedZero>("__double2uint_rz", y);
  check<ToFloat>("to float", {0, 1, -1, (1ll << 24) + 1, (1ll << 31) - 1, 123456789012345ll});
  check<ToDouble>("to double", {0, 1, -1, (1ll << 53) + 1, (1ll << 31) - 1, 123456789012345ll});
  check<Narrowed>("__double2float_rn", {0.1, 1e300, -1e-46, 1 + std::ldexp(1.0, -24), 1 + 3 * std::ldexp(1.0, -24)});
}

// ---- arithmetic ----

ND_FUNCTION(Rounded, float, float, __fadd_rn(__fmul_rn(x, x), __fdiv_rn(__fsub_rn(x, 1.0f), 3.0f)),
            std::fma(x, x, 0.0f) + (x - 1.0f) / 3.0f);
ND_FUNCTION(RoundedDouble, double, double, __dadd_rn(__dmul_rn(x, x), __ddiv_rn(__dsub_rn(x, 1.0), 3.0)),
            std::fma(x, x, 0.0) + (x - 1.0) / 3.0);
ND_FUNCTION(Fused, float, float, __fmaf_rn(x, x, -1.0f) + fmaf(x, 3.0f, -x),
            std::fma(x, x, -1.0f) + std::fma(x, 3.0f, -x));
ND_FUNCTION(FusedDouble, double, double, __fma_rn(x, x, -1.0) + fma(x, 3.0, -x),
            std::fma(x, x, -1.0) + std::fma(x, 3.0, -x));
ND_FUNCTION(Roots, float, float, __fsqrt_rn(x) + __frcp_rn(x), std::sqrt(x) + 1 / x);
ND_FUNCTION(RootsDouble, double, double, __dsqrt_rn(x) + __drcp_rn(x), std::sqrt(x) + 1 / x);
ND_FUNCTION(InverseRoot, float, float, rsqrtf(x), static_cast<float>(1 / std::sqrt(static_cast<double>(x))));
ND_FUNCTION(InverseRootDouble, double, double, rsqrt(x), 1 / std::sqrt(x));
ND_FUNCTION(Saturated, float, float, __saturatef(x), x > 0 ? std::min(x, 1.0f) : 0.0f);
ND_FUNCTION(Fast, float, float, __expf(__logf(x)) * __fdividef(__powf(x, 2.0f), fdividef(x, 1.0f)), x* x);
ND_FUNCTION(FastSine, float, float, __sinf(x) * __sinf(x) + __cosf(x) * __cosf(x) + __tanf(x), 1 + std::tan(x));

ND_CASE(arithmetic) {
  std::vector<float> x;
  std::vector<double> y;
  for (int i = 1; i <= 100; ++i) {
    x.push_back(1.37f * i);
    y.push_back(1.37 * i);
  }
  check<Rounded>("rounded", x);
  check<RoundedDouble>("rounded double", y);
  check<Fused>("fused", x);
  check<FusedDouble>("fused double", y);
  check<Roots>("roots", x);
  check<RootsDouble>("roots double", y);
  check<InverseRoot>("rsqrtf", x, 3e-7);
  check<InverseRootDouble>("rsqrt", y, 3e-16);
  check<Saturated>("__saturatef", {-1.0f, 0.0f, 0.25f, 1.0f, 7.0f, NAN});
  check<Fast>("fast functions", x, 1e-4);
  check<FastSine>("fast sines", {-1.0f, -0.5f, 0.1f, 0.5f, 1.0f}, 1e-5);
}

ND_FUNCTION(Least, float, float, min(x, 2.0f) + fminf(x, 1.0f) + float(min(int(3), 5)),
            std::fmin(x, 2.0f) + std::fmin(x, 1.0f) + 3);
ND_FUNCTION(Most, double, double, max(x, 2.0) + fmax(x, 1.0) + double(max(7ll, 5ll)),
            std::fmax(x, 2.0) + std::fmax(x, 1.0) + 7);
ND_FUNCTION(Overloads, float, float, sqrt(x) + fabs(-x) + abs(-x) + floor(x) + exp(x) * 0,
            std::sqrt(x) + x + x + std::floor(x));

ND_CASE(extremes_and_overloads) {
  check<Least>("min", {0.0f, 1.5f, 9.0f, NAN});
  check<Most>("max", {0.0, 1.5, 9.0, double{NAN}});
  check<Overloads>("float overloads", {0.1f, 1.7f, 9.3f});
  static_assert(std::is_same<decltype(sqrt(1.0f)), float>::value, "sqrt(float) is a float");
  static_assert(std::is_same<decltype(max(1, 2u)), unsigned>::value, "max of int and unsigned is unsigned");
}

const double kPi = 3.14159265358979323846;
ND_FUNCTION(SinePi, double, double, sinpi(x), std::sin(kPi* x));
ND_FUNCTION(CosinePi, double, double, cospi(x), std::cos(kPi* x));

__device__ double sine_and_cosine(double x) {
  double s, c;
  sincospi(x, &s, &c);
  return 2 * s + c;
}

__device__ float sine_and_cosine(float x) {
  float s, c, fast_s, fast_c;
  sincospif(x, &s, &c);
  __sincosf(x, &fast_s, &fast_c);
  return 2 * s + c + (fast_s * fast_s + fast_c * fast_c);
}

ND_FUNCTION(BothPi, double, double, sine_and_cosine(x), 2 * std::sin(kPi * x) + std::cos(kPi * x));
ND_FUNCTION(BothPiFloat, float, float, sine_and_cosine(x) + sinpif(x) - cospif(x), float(3 * std::sin(kPi * x) + 1));
ND_FUNCTION(Quarters, double, double, sinpi(x / 2) * 2 + cospi(x / 2),
            int(x) % 4 == 1   ? 2.0
            : int(x) % 4 == 3 ? -2.0
            : int(x) % 4 == 2 ? -1.0
                              : 1.0);

ND_CASE(trigonometry_of_pi) {
  std::vector<double> x;
  for (int i = 0; i < 64; ++i) x.push_back(-1.97 + i / 16.0);
  check<SinePi>("sinpi", x, 1e-12);
  check<CosinePi>("cospi", x, 1e-12);
  check<BothPi>("sincospi", x, 1e-12);
  check<BothPiFloat>("sincospif", {0.1f, 0.3f, 0.7f, 1.3f}, 1e-5);
  check<Quarters>("exact at halves", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
}

}  // namespace
