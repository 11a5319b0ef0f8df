// The innermost steps of a product, in the instructions that each processor has.
#pragma once

#include "packing.h"

namespace carousel {

// ---- codes out of their vectors -------------------------------------------------------------------------------

// The bytes of word k of a group, for one tile. `vectors` is where the group's codes begin.
template <int kBits, int64_t kGroup>
CAROUSEL_INLINE i32v unpack(const char* vectors, int k, int tile) {
  const auto vector = [&](int64_t i) { return load_as<i32v>(vectors + (i * kPanelTiles + tile) * kVectorBytes); };
  if constexpr (kBits == 8) return vector(k);
  const u32v pair = (u32v)vector(k / 2);
  const u32v low = (k % 2 ? pair >> 4 : pair) & 0x0f0f0f0f;
  if constexpr (kBits == 4) return (i32v)low;
  const u32v above = (u32v)vector(code_vectors(kBits, kGroup) - 1);
  if constexpr (kBits == 5) return (i32v)(low | ((k < 4 ? above << (4 - k) : above >> (k - 4)) & 0x10101010));
  return (i32v)(low | ((k < 2 ? above << (4 - 2 * k) : above >> (2 * k - 4)) & 0x30303030));
}

// ---- products of bytes ------------------------------------------------------------------------------------------

// sums += the four products of unsigned bytes of weights and signed bytes of a row. Exact.
CAROUSEL_INLINE i32v dot_bytes(i32v sums, i32v weights, i32v row) {
#if defined(__AVX512VNNI__)
  return (i32v)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)row);
#elif defined(__AVXVNNI__)
  return (i32v)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)row);
#else
  for (int shift = 0; shift < 32; shift += 8) sums += (weights >> shift & 255) * (row << (24 - shift) >> 24);
  return sums;
#endif
}

// The even or the odd bytes of each word, as two 16-bit numbers.
typedef int16_t i16v __attribute__((vector_size(4 * kLanes)));
CAROUSEL_INLINE i32v even_bytes(i32v w) { return (i32v)((i16v)w << 8 >> 8); }
CAROUSEL_INLINE i32v odd_bytes(i32v w) { return (i32v)((i16v)w >> 8); }

// dot_shorts: the sums of two products of 16-bit numbers each, on top of `sums`.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
#define CAROUSEL_SIXTEEN_BIT_SUMS 1
#if defined(__AVX512BW__)
typedef __m512i Register;
CAROUSEL_INLINE Register multiply_bytes(i32v weights, i32v row) {
  return _mm512_maddubs_epi16((Register)weights, (Register)row);
}
CAROUSEL_INLINE Register add_shorts(Register a, Register b) { return _mm512_add_epi16(a, b); }
CAROUSEL_INLINE i32v multiply_shorts(Register a, Register b) { return (i32v)_mm512_madd_epi16(a, b); }
CAROUSEL_INLINE i32v widen_sums(Register sums) { return multiply_shorts(sums, _mm512_set1_epi16(1)); }
#else
typedef __m256i Register;
CAROUSEL_INLINE Register multiply_bytes(i32v weights, i32v row) {
  return _mm256_maddubs_epi16((Register)weights, (Register)row);
}
CAROUSEL_INLINE Register add_shorts(Register a, Register b) { return _mm256_add_epi16(a, b); }
CAROUSEL_INLINE i32v multiply_shorts(Register a, Register b) { return (i32v)_mm256_madd_epi16(a, b); }
CAROUSEL_INLINE i32v widen_sums(Register sums) { return multiply_shorts(sums, _mm256_set1_epi16(1)); }
#endif
CAROUSEL_INLINE i32v dot_shorts(i32v sums, i32v a, i32v b) { return sums + multiply_shorts((Register)a, (Register)b); }
#else
#define CAROUSEL_SIXTEEN_BIT_SUMS 0
CAROUSEL_INLINE i32v dot_shorts(i32v sums, i32v a, i32v b) {
#if defined(__SSE2__) && !defined(__AVX2__)
  return sums + (i32v)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return sums + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
#endif

CAROUSEL_INLINE i32v broadcast(uint32_t word) { return splat(int32_t(word)); }

// sums[row][tile] = the products of one group of codes with kRows rows. `words` is [words of the group][kRows].
template <int kBits, int64_t kGroup, int kRows>
CAROUSEL_INLINE void dot_group(const char* vectors, const uint32_t* words, i32v (&sums)[kRows][kPanelTiles]) {
  constexpr int kWords = int(kGroup / 4);
  constexpr bool kShorts = reads_shorts(kBits);
#if CAROUSEL_SIXTEEN_BIT_SUMS
  if constexpr (!kShorts) {
    // vpmaddubsw adds two products into 16 bits. With small codes several such pairs fit: 2 * 127 * 15 * 8 = 30,480,
    // so a group of four-bit codes is summed by 16-bit additions alone and widened once.
    constexpr int kRun = kBits == 4 ? 8 : kBits == 5 ? 4 : 2;
    unrolled<kWords / kRun>(CAROUSEL_EACH(part) {
      Register run[kRows][kPanelTiles];
      unrolled<kRun>(CAROUSEL_EACH(step) {
        constexpr int k = part * kRun + step;
        i32v tile[kPanelTiles];
        unrolled<kPanelTiles>(CAROUSEL_EACH(t) { tile[t] = unpack<kBits, kGroup>(vectors, k, t); });
        unrolled<kRows>(CAROUSEL_EACH(r) {
          const i32v word = broadcast(words[k * kRows + r]);
          unrolled<kPanelTiles>(CAROUSEL_EACH(t) {
            const Register product = multiply_bytes(tile[t], word);
            run[r][t] = step == 0 ? product : add_shorts(run[r][t], product);
            settle(run[r][t]);
          });
        });
      });
      unrolled<kRows>(CAROUSEL_EACH(r) {
        unrolled<kPanelTiles>(CAROUSEL_EACH(t) {
          sums[r][t] = part == 0 ? widen_sums(run[r][t]) : sums[r][t] + widen_sums(run[r][t]);
        });
      });
    });
    return;
  }
#endif
  unrolled<kRows>(CAROUSEL_EACH(r) { unrolled<kPanelTiles>(CAROUSEL_EACH(t) { sums[r][t] = i32v{}; }); });
  unrolled<kWords>(CAROUSEL_EACH(k) {
    i32v tile[kPanelTiles];
    unrolled<kPanelTiles>(CAROUSEL_EACH(t) { tile[t] = unpack<kBits, kGroup>(vectors, k, t); });
    if constexpr (kShorts) {
      // 16-bit products, of the even bytes and of the odd ones.
      unrolled<2>(CAROUSEL_EACH(odd) {
        i32v half[kPanelTiles];
        unrolled<kPanelTiles>(CAROUSEL_EACH(t) { half[t] = odd ? odd_bytes(tile[t]) : even_bytes(tile[t]); });
        unrolled<kRows>(CAROUSEL_EACH(r) {
          const i32v word = broadcast(words[(2 * k + odd) * kRows + r]);
          unrolled<kPanelTiles>(CAROUSEL_EACH(t) {
            sums[r][t] = dot_shorts(sums[r][t], half[t], word);
            settle(sums[r][t]);
          });
        });
      });
    } else {
      unrolled<kRows>(CAROUSEL_EACH(r) {
        const i32v word = broadcast(words[k * kRows + r]);
        unrolled<kPanelTiles>(CAROUSEL_EACH(t) { sums[r][t] = dot_bytes(sums[r][t], tile[t], word); });
      });
    }
  });
}

// ---- products of floats -----------------------------------------------------------------------------------------

CAROUSEL_INLINE f32v dot_halves(f32v sums, i32v weights, i32v row) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)row);
#else
  return sums;  // never called: rows are floats where this instruction is missing
#endif
}

// sums[row][tile] += one word of weights times kRows rows. `words` moves on.
template <Mode mode, int kRows>
CAROUSEL_INLINE void dot_word(const char* weights, const uint32_t*& words, f32v (&sums)[kRows][kPanelTiles]) {
  constexpr bool kHalves = mode == Mode::bf16 && kHasHalfDots;
  constexpr int kParts = mode == Mode::bf16 && !kHasHalfDots ? 2 : 1;  // floats in a word of weights
  unrolled<kParts>(CAROUSEL_EACH(part) {
    i32v tile[kPanelTiles];
    unrolled<kPanelTiles>(CAROUSEL_EACH(t) {
      const i32v word = load_as<i32v>(weights + t * kVectorBytes);
      tile[t] = kParts == 1 ? word : part == 0 ? word << 16 : word & int32_t(0xffff0000);
    });
    unrolled<kRows>(CAROUSEL_EACH(r) {
      const i32v word = broadcast(words[r]);
      unrolled<kPanelTiles>(CAROUSEL_EACH(t) {
        sums[r][t] = kHalves ? dot_halves(sums[r][t], tile[t], word) : fma((f32v)tile[t], (f32v)word, sums[r][t]);
      });
    });
    words += kRows;
    forget(weights);  // or the second part's weights are kept from the first, and sums are not
  });
}

}  // namespace carousel
