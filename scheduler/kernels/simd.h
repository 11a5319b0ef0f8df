// Sixteen-lane vectors, and the few functions the kernels build on.
//
// GCC's vector extensions lower these types to AVX-512, to two AVX2 halves or to plain code, so that
// every kernel has one source. Intrinsics appear only where the compiler cannot find the instruction.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace carousel {

#define CAROUSEL_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

enum class DType { f32, bf16 };

// The upper half of a float. Arithmetic is always done in float.
struct bf16 {
  uint16_t bits;
};

template <class Vector>
CAROUSEL_INLINE Vector load_as(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(Vector));
  return v;
}

CAROUSEL_INLINE f32x16 splat(float x) { return x - f32x16{}; }

CAROUSEL_INLINE i32x16 lane_index() {
  return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

// Written out, rather than left to contraction, so that every kernel rounds in the same places.
CAROUSEL_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// ---- conversion ---------------------------------------------------------------------------------

CAROUSEL_INLINE f32x16 widen(u16x16 halves) {
#if defined(__AVX512F__)
  const u32x16 wide = (u32x16)_mm512_cvtepu16_epi32((__m256i)halves);
#else
  const u32x16 wide = __builtin_convertvector(halves, u32x16);
#endif
  return (f32x16)(wide << 16);
}

CAROUSEL_INLINE u16x16 narrow(f32x16 x) {  // to nearest, ties to even; a NaN stays a NaN
  const u32x16 bits = (u32x16)x;
  const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32x16 result = (x == x) ? rounded : (u32x16{} + 0x7fc0);
  return __builtin_convertvector(result, u16x16);
}

CAROUSEL_INLINE f32x16 load(const float* from) { return load_as<f32x16>(from); }
CAROUSEL_INLINE f32x16 load(const bf16* from) { return widen(load_as<u16x16>(from)); }
CAROUSEL_INLINE void store(float* to, f32x16 x) { std::memcpy(to, &x, sizeof x); }
CAROUSEL_INLINE void store(bf16* to, f32x16 x) {
  const u16x16 halves = narrow(x);
  std::memcpy(to, &halves, sizeof halves);
}

CAROUSEL_INLINE float to_float(float x) { return x; }
CAROUSEL_INLINE float to_float(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
CAROUSEL_INLINE void assign(float& to, float x) { to = x; }
CAROUSEL_INLINE void assign(bf16& to, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  to.bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

// ---- reduction: a fixed tree, so the result depends on the lanes alone -----------------------------

template <class Op>
CAROUSEL_INLINE float reduce(f32x16 v, Op op) {
  v = op(v, __builtin_shuffle(v, lane_index() ^ 8));
  v = op(v, __builtin_shuffle(v, lane_index() ^ 4));
  v = op(v, __builtin_shuffle(v, lane_index() ^ 2));
  v = op(v, __builtin_shuffle(v, lane_index() ^ 1));
  return v[0];
}

CAROUSEL_INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
CAROUSEL_INLINE f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }
CAROUSEL_INLINE f32x16 abs(f32x16 x) { return (f32x16)((i32x16)x & 0x7fffffff); }

CAROUSEL_INLINE float sum_lanes(f32x16 v) {
  return reduce(v, [](f32x16 a, f32x16 b) { return a + b; });
}
CAROUSEL_INLINE float max_lanes(f32x16 v) {
  return reduce(v, [](f32x16 a, f32x16 b) { return max(a, b); });
}

// ---- elementary functions ---------------------------------------------------------------------------

// Adding and taking away 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
constexpr float kRounder = 12582912.0f;

// e^x to about 1 ulp; 0 below the smallest normal float, so that e^-inf is exactly 0.
// x = n ln2 + r with |r| <= ln2 / 2; e^r by its series; 2^n through the exponent bits.
CAROUSEL_INLINE f32x16 exp(f32x16 x) {
  const f32x16 clamped = min(splat(88.0f), max(splat(-87.0f), x));  // in this order a NaN passes through
  const f32x16 biased = fma(clamped, splat(1.44269504088896341f), splat(kRounder));
  const f32x16 n = biased - kRounder;
  f32x16 r = fma(n, splat(-0.693359375f), clamped);  // the high bits of ln2: n times them is exact
  r = fma(n, splat(2.12194440054690583e-4f), r);
  f32x16 p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r * r, r) + 1.0f;
  const i32x16 exponent = (i32x16)biased << 23;
  const f32x16 result = (f32x16)((i32x16)p + exponent);
  return x < splat(-87.0f) ? f32x16{} : result;
}

CAROUSEL_INLINE float exp(float x) { return exp(splat(x))[0]; }

// Small arguments take the continued fraction x/(1+x^2/(3+x^2/(5+x^2/(7+x^2/9)))), which keeps the relative
// precision that 1 - 2/(e^2x + 1) loses near 0.
CAROUSEL_INLINE f32x16 tanh(f32x16 x) {
  const f32x16 s = x * x;
  const f32x16 numerator = x * fma(s, s + 105.0f, splat(945.0f));
  const f32x16 denominator = fma(s, fma(s, splat(15.0f), splat(420.0f)), splat(945.0f));
  const f32x16 large = 1.0f - 2.0f / (exp(abs(x) * 2.0f) + 1.0f);
  const f32x16 signed_large = (f32x16)((i32x16)large | ((i32x16)x & int32_t(0x80000000)));
  return abs(x) < splat(0.625f) ? numerator / denominator : signed_large;
}

CAROUSEL_INLINE f32x16 silu(f32x16 x) { return x / (1.0f + exp(-x)); }

CAROUSEL_INLINE f32x16 gelu_tanh(f32x16 x) {
  const f32x16 inner = 0.797884560802865356f * fma(x * x * x, splat(0.044715f), x);
  return 0.5f * x * (1.0f + tanh(inner));
}

}  // namespace carousel
