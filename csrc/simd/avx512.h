// The vector layer for AVX-512 (F, DQ, BW, VL): eight blocks at a time.
#pragma once

#include "kernels.h"

#include <immintrin.h>

namespace fused_dropout {
namespace {

constexpr int kLanes = 8;

struct Lanes {
  __m512i v;
};

inline Lanes all_lanes(uint32_t word) {
  return {_mm512_set1_epi64(word)};
}
inline Lanes multiply(Lanes a, uint32_t multiplier) {
  return {_mm512_mul_epu32(a.v, _mm512_set1_epi64(multiplier))};
}
inline Lanes high(Lanes product) {
  return {_mm512_srli_epi64(product.v, 32)};
}
inline Lanes low(Lanes product) {
  return product;
}
inline Lanes xor3(Lanes a, Lanes b, Lanes c) {
  return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)};
}

// The blocks stand in the order in which draws_of interleaves them.
inline Lanes blocks_from(uint64_t first) {
  return {_mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7))};
}

// Blocks by their numbers, in the same order.
inline Lanes blocks_at(const uint64_t* blocks) {
  return {_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_loadu_si512(blocks))};
}

struct Draws {
  __m512i v;
};

// The words of a block, in order, are its eight draws: 64 bits from words 0 and 1, 64 from 2 and 3.
inline void draws_of(const PhiloxWords<Lanes>& words, Draws draws[2]) {
  constexpr __mmask16 kUpper = 0xAAAA;
  const __m512i front = _mm512_mask_shuffle_epi32(words.w[0].v, kUpper, words.w[1].v, _MM_PERM_CCAA);
  const __m512i back = _mm512_mask_shuffle_epi32(words.w[2].v, kUpper, words.w[3].v, _MM_PERM_CCAA);
  draws[0] = {_mm512_unpacklo_epi64(front, back)};
  draws[1] = {_mm512_unpackhi_epi64(front, back)};
}

using Limit = __m512i;
using Kept = __mmask32;

inline Limit limit_of(uint16_t high) {
  return _mm512_set1_epi16(static_cast<int16_t>(high));
}
inline Kept below(Draws draws, Limit limit) {
  return _mm512_cmplt_epu16_mask(draws.v, limit);
}
inline bool any_equal(Draws a, Draws b, Limit limit) {
  return _mm512_cmpeq_epi16_mask(a.v, limit) | _mm512_cmpeq_epi16_mask(b.v, limit);
}
inline Kept kept_of(const uint16_t* flags) {
  return _mm512_movepi16_mask(_mm512_loadu_si512(flags));
}

inline __m512 scaled(__m512 x, Kept kept, float scale) {
  return _mm512_maskz_mul_ps(static_cast<__mmask16>(kept), x, _mm512_set1_ps(scale));
}

inline void write(const float* x, float* y, Kept kept, float scale) {
  _mm512_storeu_ps(y, scaled(_mm512_loadu_ps(x), kept, scale));
  _mm512_storeu_ps(y + 16, scaled(_mm512_loadu_ps(x + 16), kept >> 16, scale));
}

inline void write(const double* x, double* y, Kept kept, double scale) {
  for (int i = 0; i < 32; i += 8) {
    const auto mask = static_cast<__mmask8>(kept >> i);
    _mm512_storeu_pd(y + i, _mm512_maskz_mul_pd(mask, _mm512_loadu_pd(x + i), _mm512_set1_pd(scale)));
  }
}

inline void write(const Half* x, Half* y, Kept kept, float scale) {
  for (int i = 0; i < 32; i += 16) {
    const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)));
    const __m256i narrow = _mm512_cvtps_ph(scaled(wide, kept >> i, scale), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), narrow);
  }
}

// To bfloat16 in the upper half, to nearest, ties to even. A NaN stays one: it comes from a bfloat16, so that its lower
// half is 0 and the sum carries nothing into its exponent.
inline __m512i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
}

// The even elements and the odd ones, each where the upper half of a float is.
inline void write(const BFloat16* x, BFloat16* y, Kept kept, float scale) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000)), pairs = _mm512_loadu_si512(x);
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
  const __m512i low = _mm512_srli_epi32(rounded(_mm512_mul_ps(even, _mm512_set1_ps(scale))), 16);
  const __m512i high = rounded(_mm512_mul_ps(odd, _mm512_set1_ps(scale)));
  const __m512i both = _mm512_ternarylogic_epi32(low, high, upper, 0xF8);  // low | (high & upper)
  _mm512_storeu_si512(y, _mm512_maskz_mov_epi16(kept, both));
}

inline void write(const bool*, bool* y, Kept kept, float) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm256_maskz_set1_epi8(kept, 1));
}
inline void write(const uint16_t*, uint16_t* flags, Kept kept, float) {
  _mm512_storeu_si512(flags, _mm512_movm_epi16(kept));
}

}  // namespace
}  // namespace fused_dropout
