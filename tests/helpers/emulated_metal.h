// Stands for the names of Metal that the rotation kernel uses, so that g++ compiles its source.
//
// Compiled once to run (emulated_threads.h), and once for each address space to check it: with
// -DCHECK_device every `device` is `volatile` and nothing else is, so that the compiler refuses a
// pointer or reference that leaves the space. Metal also refuses, and so does this header, `double`
// and a float that becomes a bfloat by itself. Names that are not here are refused by the compiler:
// a barrier that does not order threadgroup memory is one.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

typedef std::uint32_t uint;
struct uint3 { uint x, y, z; };

namespace emulation {
inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emulation

struct bfloat {
  std::uint16_t bits;
  bfloat() = default;
  bfloat(const bfloat&) = default;
  bfloat(const volatile bfloat& other) : bits(other.bits) {}
  bfloat& operator=(const bfloat&) = default;
  explicit bfloat(float value) {
    const std::uint32_t wide = emulation::bits_of(value);
    const std::uint32_t half_unit = 0x7fff + (wide >> 16 & 1);  // ties to even
    bits = std::isnan(value) ? 0x7fc0 : std::uint16_t((wide + half_unit) >> 16);
  }
  void operator=(bfloat other) volatile { bits = other.bits; }
  operator float() const volatile { return emulation::float_of(std::uint32_t(bits) << 16); }
};

struct half {
  std::uint16_t bits;
  half() = default;
  half(const half&) = default;
  half(const volatile half& other) : bits(other.bits) {}
  half& operator=(const half&) = default;
  half(float value) {
    const std::uint16_t sign = emulation::bits_of(value) >> 16 & 0x8000;
    const float size = std::fabs(value), tiniest = std::ldexp(1.0f, -24);
    if (std::isnan(value)) bits = 0x7e00;
    else if (size >= 65520.0f) bits = sign | 0x7c00;
    else if (size < 1024 * tiniest) bits = sign | std::uint16_t(std::nearbyint(size / tiniest));
    else {
      int exponent;
      std::frexp(size, &exponent);  // size is in [2 ** (exponent - 1), 2 ** exponent)
      const float unit = std::ldexp(1.0f, exponent - 11);
      const std::uint32_t wide = emulation::bits_of(std::nearbyint(size / unit) * unit);
      bits = sign | std::uint16_t((wide >> 13) - (112 << 10));
    }
  }
  void operator=(half other) volatile { bits = other.bits; }
  operator float() const volatile {
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
    return sign * std::ldexp(float(fraction + 1024), exponent - 25);
  }
};
typedef bfloat bfloat16_t;
typedef half float16_t;

struct alignas(16) float4 {
  float at[4];
  float4() = default;
  float4(const float4&) = default;
  float4& operator=(const float4&) = default;
  explicit float4(float value) : at{value, value, value, value} {}
  float4(float x, float y, float z, float w) : at{x, y, z, w} {}
  float4(const volatile float4& o) : at{o.at[0], o.at[1], o.at[2], o.at[3]} {}
  void operator=(float4 o) volatile { for (int n = 0; n < 4; ++n) at[n] = o.at[n]; }
  float operator[](int n) const { return at[n]; }
  float& operator[](int n) { return at[n]; }
  volatile float& operator[](int n) volatile { return at[n]; }
};
inline float4 operator*(float4 a, float b) { return {a[0] * b, a[1] * b, a[2] * b, a[3] * b}; }
inline float4 operator-(float4 a) { return {-a[0], -a[1], -a[2], -a[3]}; }

namespace metal {
using std::is_same;
enum class mem_flags { mem_threadgroup };
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float4 fma(float4 a, float4 b, float4 c) {
  return {fma(a[0], b[0], c[0]), fma(a[1], b[1], c[1]), fma(a[2], b[2], c[2]), fma(a[3], b[3], c[3])};
}
void simdgroup_barrier(mem_flags, int line = __builtin_LINE());
void threadgroup_barrier(mem_flags, int line = __builtin_LINE());
}  // namespace metal
using namespace metal;

#if defined CHECK_device || defined CHECK_constant || defined CHECK_thread || defined CHECK_threadgroup
#define CHECKED
#else
#include "emulated_threads.h"
#include "emulated_banks.h"
#endif

#ifdef CHECK_device
#define device volatile
#else
#define device
#endif
#ifdef CHECK_constant
#define constant volatile
#else
#define constant
#endif
#ifdef CHECK_thread
#define thread volatile
#else
#define thread
#endif
#ifdef CHECK_threadgroup
#define threadgroup volatile
#elif defined CHECKED
#define threadgroup
#else
#define threadgroup static  // one threadgroup runs at a time, so its threads share what is static
#endif
#define double Metal_has_no_double
