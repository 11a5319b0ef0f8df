// Vectors as wide as the processor's registers, and the few functions the kernels build on.
//
// The types are GCC's vector extensions, so every kernel has one source for AVX-512, AVX2 and anything else.
// Intrinsics appear only where the compiler cannot find the instruction. A vector is never wider than a register:
// the compiler would take it apart through memory.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace carousel {

#define CAROUSEL_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON
#endif

// What heads, blocks and hidden sizes must be multiples of, whatever the build: the widest vector.
constexpr int kMultiple = 16;

typedef float f32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16v __attribute__((vector_size(2 * kLanes)));
typedef int8_t i8v __attribute__((vector_size(kLanes)));

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

CAROUSEL_INLINE f32v splat(float x) { return x - f32v{}; }

CAROUSEL_INLINE i32v splat(int32_t x) { return x - i32v{}; }

CAROUSEL_INLINE i32v lane_index() {
#if defined(__AVX512F__)
  return i32v{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return i32v{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return i32v{0, 1, 2, 3};
#endif
}

// Written out, rather than left to contraction, so that every kernel rounds in the same places.
CAROUSEL_INLINE f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// ---- loops over registers ---------------------------------------------------------------------------

// Calls body(0), body(1), ... body(kCount - 1) with constants. Sums that are kept in arrays stay in registers only if
// every loop over them is unrolled, which a pragma asks for and this makes sure of.
template <int kCount, class Body>
CAROUSEL_INLINE void unrolled(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}
#define CAROUSEL_EACH(i) [&](auto i) __attribute__((always_inline))

// Keeps the compiler from computing what comes next before `value`: it would do all the products of a block first, and
// run out of registers.
template <class Vector>
CAROUSEL_INLINE void settle(Vector& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
}

// Keeps the compiler from knowing what it has loaded from there.
template <class T>
CAROUSEL_INLINE void forget(T*& pointer) {
#if defined(__x86_64__)
  asm("" : "+r"(pointer));
#endif
}

// ---- conversion ---------------------------------------------------------------------------------

CAROUSEL_INLINE f32v widen(u16v halves) {
#if defined(__AVX512F__)
  const u32v wide = (u32v)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__)
  const u32v wide = (u32v)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  const u32v wide = __builtin_convertvector(halves, u32v);
#endif
  return (f32v)(wide << 16);
}

CAROUSEL_INLINE u16v narrow(f32v x) {  // to nearest, ties to even; a NaN stays a NaN
  const u32v bits = (u32v)x;
  const u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32v result = (x == x) ? rounded : (u32v{} + 0x7fc0);
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i packed = _mm256_packus_epi32((__m256i)result, (__m256i)result);
  return (u16v)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(result, u16v);
#endif
}

// Half precision, as scales are stored. What is infinite or no number stays it.
CAROUSEL_INLINE f32v widen_half(u16v halves) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)halves);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)halves);
#else
  // The exponent is 15 bits too far down for a float and counts from 15 instead of 127; a product sets it right, for
  // subnormal numbers too. Only the largest exponent stands for no number.
  const u32v bits = __builtin_convertvector(halves, u32v);
  const u32v shifted = (bits & 0x7fff) << 13;
  const u32v magnitude = shifted < (0x7c00u << 13) ? (u32v)((f32v)shifted * 0x1p112f) : shifted | 0x7f800000;
  return (f32v)(magnitude | (bits & 0x8000) << 16);
#endif
}

// To nearest, ties to even; infinite from 65520 on; a NaN stays a NaN.
inline uint16_t to_half(float x) {
  const uint32_t sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000;
  if (x != x) return 0x7e00;
  if (x >= 65520.0f || x <= -65520.0f) return uint16_t(sign | 0x7c00);
  // Adding a number whose last bit is worth what a half's last bit will be rounds there.
  const float magnitude = std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7fffffff);
  const uint32_t exponent = std::bit_cast<uint32_t>(magnitude) & 0x7f800000;
  const uint32_t smallest_normal = 113u << 23;  // 2^-14
  const float rounder = std::bit_cast<float>(std::max(exponent, smallest_normal) + (13u << 23));
  const uint32_t rounded = std::bit_cast<uint32_t>(magnitude + rounder) - std::bit_cast<uint32_t>(rounder);
  const uint32_t base = exponent < smallest_normal ? 0 : (exponent >> 13) - (112u << 10);
  // `rounded` counts half-precision steps from 0 or from the leading bit on; it may carry into the exponent.
  return uint16_t(sign | (exponent < smallest_normal ? rounded : base + rounded - 1024));
}

inline float from_half(uint16_t bits) {
  const uint32_t shifted = uint32_t(bits & 0x7fff) << 13;
  const float magnitude = shifted < (0x7c00u << 13) ? std::bit_cast<float>(shifted) * 0x1p112f
                                                    : std::bit_cast<float>(shifted | 0x7f800000);
  return bits & 0x8000 ? -magnitude : magnitude;
}

CAROUSEL_INLINE f32v load(const float* from) { return load_as<f32v>(from); }
CAROUSEL_INLINE f32v load(const bf16* from) { return widen(load_as<u16v>(from)); }
CAROUSEL_INLINE void store(float* to, f32v x) { std::memcpy(to, &x, sizeof x); }
CAROUSEL_INLINE void store(bf16* to, f32v x) {
  const u16v halves = narrow(x);
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

template <class Vector, class Op>
CAROUSEL_INLINE auto reduce(Vector v, Op op) {
  if constexpr (kLanes > 8) v = op(v, __builtin_shuffle(v, lane_index() ^ 8));
  if constexpr (kLanes > 4) v = op(v, __builtin_shuffle(v, lane_index() ^ 4));
  v = op(v, __builtin_shuffle(v, lane_index() ^ 2));
  v = op(v, __builtin_shuffle(v, lane_index() ^ 1));
  return v[0];
}

CAROUSEL_INLINE f32v max(f32v a, f32v b) { return a > b ? a : b; }
CAROUSEL_INLINE f32v min(f32v a, f32v b) { return a < b ? a : b; }
CAROUSEL_INLINE f32v abs(f32v x) { return (f32v)((i32v)x & 0x7fffffff); }

template <class Vector>
CAROUSEL_INLINE auto sum_lanes(Vector v) {
  return reduce(v, [](Vector a, Vector b) { return a + b; });
}
CAROUSEL_INLINE float max_lanes(f32v v) {
  return reduce(v, [](f32v a, f32v b) { return max(a, b); });
}

// ---- elementary functions ---------------------------------------------------------------------------

// Adding and taking away 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
constexpr float kRounder = 12582912.0f;

// e^x to about 1 ulp; 0 below the smallest normal float, so that e^-inf is exactly 0.
// x = n ln2 + r with |r| <= ln2 / 2; e^r by its series; 2^n through the exponent bits.
CAROUSEL_INLINE f32v exp(f32v x) {
  const f32v clamped = min(splat(88.0f), max(splat(-87.0f), x));  // in this order a NaN passes through
  const f32v biased = fma(clamped, splat(1.44269504088896341f), splat(kRounder));
  const f32v n = biased - kRounder;
  f32v r = fma(n, splat(-0.693359375f), clamped);  // the high bits of ln2: n times them is exact
  r = fma(n, splat(2.12194440054690583e-4f), r);
  f32v p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r * r, r) + 1.0f;
  const i32v exponent = (i32v)biased << 23;
  const f32v result = (f32v)((i32v)p + exponent);
  return x < splat(-87.0f) ? f32v{} : result;
}

CAROUSEL_INLINE float exp(float x) { return exp(splat(x))[0]; }

// Small arguments take the continued fraction x/(1+x^2/(3+x^2/(5+x^2/(7+x^2/9)))), which keeps the relative
// precision that 1 - 2/(e^2x + 1) loses near 0.
CAROUSEL_INLINE f32v tanh(f32v x) {
  const f32v s = x * x;
  const f32v numerator = x * fma(s, s + 105.0f, splat(945.0f));
  const f32v denominator = fma(s, fma(s, splat(15.0f), splat(420.0f)), splat(945.0f));
  const f32v large = 1.0f - 2.0f / (exp(abs(x) * 2.0f) + 1.0f);
  const f32v signed_large = (f32v)((i32v)large | ((i32v)x & int32_t(0x80000000)));
  return abs(x) < splat(0.625f) ? numerator / denominator : signed_large;
}

CAROUSEL_INLINE f32v silu(f32v x) { return x / (1.0f + exp(-x)); }

CAROUSEL_INLINE f32v gelu_tanh(f32v x) {
  const f32v inner = 0.797884560802865356f * fma(x * x * x, splat(0.044715f), x);
  return 0.5f * x * (1.0f + tanh(inner));
}

}  // namespace carousel
