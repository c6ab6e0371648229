// 16-bit floating-point numbers and pairs of them, behind <cuda_fp16.h> and <cuda_bf16.h>. Stored as on a device;
// converted and computed with one rounding to nearest even (fused multiply-add: two, the first to double).
#pragma once
#include <cmath>

#include "nd_emu_device.hpp"

namespace nd_emu {

// kExponent bits of exponent, kFraction bits of fraction: half is <5, 10>, bfloat16 is <8, 7>.
template <int kExponent, int kFraction>
struct Float16 {
  using nd_emu_shuffled = void;
  unsigned short bits;

  Float16() = default;
  template <class T>
    requires std::is_arithmetic_v<T>
  Float16(T value) : bits(round(static_cast<double>(value))) {}
  static Float16 of_bits(unsigned short bits) {
    Float16 value;
    value.bits = bits;
    return value;
  }

  operator float() const {
    const int exponent = bits >> kFraction & kSpecial, fraction = bits & ((1 << kFraction) - 1);
    double size = std::ldexp(exponent ? fraction + (1 << kFraction) : fraction, (exponent ? exponent : 1) + kScale);
    if (exponent == kSpecial) size = fraction ? NAN : INFINITY;
    return static_cast<float>(bits >> 15 ? -size : size);
  }

  Float16& operator+=(Float16 b) { return *this = *this + b; }
  Float16& operator-=(Float16 b) { return *this = *this - b; }
  Float16& operator*=(Float16 b) { return *this = *this * b; }
  Float16& operator/=(Float16 b) { return *this = *this / b; }
  friend Float16 operator+(Float16 a, Float16 b) { return {float{a} + float{b}}; }
  friend Float16 operator-(Float16 a, Float16 b) { return {float{a} - float{b}}; }
  friend Float16 operator*(Float16 a, Float16 b) { return {float{a} * float{b}}; }
  friend Float16 operator/(Float16 a, Float16 b) { return {float{a} / float{b}}; }
  friend Float16 operator-(Float16 a) { return of_bits(a.bits ^ 0x8000); }
  friend bool operator==(Float16 a, Float16 b) { return float{a} == float{b}; }
  friend bool operator!=(Float16 a, Float16 b) { return float{a} != float{b}; }
  friend bool operator<(Float16 a, Float16 b) { return float{a} < float{b}; }
  friend bool operator<=(Float16 a, Float16 b) { return float{a} <= float{b}; }
  friend bool operator>(Float16 a, Float16 b) { return float{a} > float{b}; }
  friend bool operator>=(Float16 a, Float16 b) { return float{a} >= float{b}; }

 private:
  static constexpr int kSpecial = (1 << kExponent) - 1;  // exponent field of infinity and NaN
  // A number is (fraction with its leading bit) * 2^(exponent field + kScale).
  static constexpr int kScale = 1 - (1 << (kExponent - 1)) - kFraction;

  static unsigned short round(double x) {
    const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
    if (x != x) return 0x7fff;
    if (x == 0) return sign;
    if (std::isinf(x)) return sign | kSpecial << kFraction;
    const int exponent = std::max(std::ilogb(x) - kFraction - kScale, 1);
    // In units of the last place. The leading bit of a normal number adds to the exponent field, and so does a carry.
    const double units = std::nearbyint(std::ldexp(std::fabs(x), -kScale - exponent));
    const double rounded = std::ldexp(exponent - 1, kFraction) + units;
    return sign | static_cast<unsigned short>(std::min(rounded, std::ldexp(kSpecial, kFraction)));
  }
};

template <class T>
struct alignas(4) Pair16 {
  using nd_emu_shuffled = void;
  T x, y;

  Pair16() = default;
  Pair16(T x, T y) : x(x), y(y) {}

  friend Pair16 operator+(Pair16 a, Pair16 b) { return {a.x + b.x, a.y + b.y}; }
  friend Pair16 operator-(Pair16 a, Pair16 b) { return {a.x - b.x, a.y - b.y}; }
  friend Pair16 operator*(Pair16 a, Pair16 b) { return {a.x * b.x, a.y * b.y}; }
  friend Pair16 operator/(Pair16 a, Pair16 b) { return {a.x / b.x, a.y / b.y}; }
  friend Pair16 operator-(Pair16 a) { return {-a.x, -a.y}; }
  Pair16& operator+=(Pair16 b) { return *this = *this + b; }
  Pair16& operator-=(Pair16 b) { return *this = *this - b; }
  Pair16& operator*=(Pair16 b) { return *this = *this * b; }
  Pair16& operator/=(Pair16 b) { return *this = *this / b; }
};

template <class T>
constexpr bool kIsFloat16 = false;
template <int kExponent, int kFraction>
constexpr bool kIsFloat16<Float16<kExponent, kFraction>> = true;
template <class T>
concept AnyFloat16 = kIsFloat16<T>;

}  // namespace nd_emu

template <nd_emu::AnyFloat16 T>
T __hadd(T a, T b) {
  return a + b;
}
template <nd_emu::AnyFloat16 T>
T __hsub(T a, T b) {
  return a - b;
}
template <nd_emu::AnyFloat16 T>
T __hmul(T a, T b) {
  return a * b;
}
template <nd_emu::AnyFloat16 T>
T __hdiv(T a, T b) {
  return a / b;
}
template <nd_emu::AnyFloat16 T>
T __hfma(T a, T b, T c) {
  return fma(static_cast<double>(float{a}), static_cast<double>(float{b}), static_cast<double>(float{c}));
}
template <nd_emu::AnyFloat16 T>
T __hneg(T a) {
  return -a;
}
template <nd_emu::AnyFloat16 T>
T __habs(T a) {
  return T::of_bits(a.bits & 0x7fff);
}
template <nd_emu::AnyFloat16 T>
T __hmax(T a, T b) {
  return fmaxf(a, b);
}
template <nd_emu::AnyFloat16 T>
T __hmin(T a, T b) {
  return fminf(a, b);
}
template <nd_emu::AnyFloat16 T>
bool __hisnan(T a) {
  return a != a;
}
template <class T>
nd_emu::Pair16<T> __hadd2(nd_emu::Pair16<T> a, nd_emu::Pair16<T> b) {
  return a + b;
}
template <class T>
nd_emu::Pair16<T> __hsub2(nd_emu::Pair16<T> a, nd_emu::Pair16<T> b) {
  return a - b;
}
template <class T>
nd_emu::Pair16<T> __hmul2(nd_emu::Pair16<T> a, nd_emu::Pair16<T> b) {
  return a * b;
}
template <class T>
nd_emu::Pair16<T> __hfma2(nd_emu::Pair16<T> a, nd_emu::Pair16<T> b, nd_emu::Pair16<T> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
