// The vector layer for AVX2 (with F16C, which every CPU that has it brings): four blocks at a time.
#pragma once

#include "kernels.h"

#include <immintrin.h>

namespace fused_dropout {
namespace {

constexpr int kLanes = 4;

struct Lanes {
  __m256i v;
};

inline Lanes all_lanes(uint32_t word) {
  return {_mm256_set1_epi64x(word)};
}
inline Lanes multiply(Lanes a, uint32_t multiplier) {
  return {_mm256_mul_epu32(a.v, _mm256_set1_epi64x(multiplier))};
}
inline Lanes high(Lanes product) {
  return {_mm256_srli_epi64(product.v, 32)};
}
inline Lanes low(Lanes product) {
  return product;
}
inline Lanes xor3(Lanes a, Lanes b, Lanes c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)};
}

// The blocks stand in the order in which draws_of interleaves them.
inline Lanes blocks_from(uint64_t first) {
  return {_mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_setr_epi64x(0, 2, 1, 3))};
}

// Blocks by their numbers, in the same order.
inline Lanes blocks_at(const uint64_t* blocks) {
  return {_mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks)), 0xD8)};
}

struct Draws {
  __m256i v;
};

inline __m256i join(Lanes lower, Lanes upper) {
  return _mm256_blend_epi32(lower.v, _mm256_slli_epi64(upper.v, 32), 0xAA);
}

// The words of a block, in order, are its eight draws: 64 bits from words 0 and 1, 64 from 2 and 3.
inline void draws_of(const PhiloxWords<Lanes>& words, Draws draws[2]) {
  const __m256i front = join(words.w[0], words.w[1]), back = join(words.w[2], words.w[3]);
  draws[0] = {_mm256_unpacklo_epi64(front, back)};
  draws[1] = {_mm256_unpackhi_epi64(front, back)};
}

// 16-bit lanes of all ones or zeros. AVX2 compares signed integers only: both sides are moved by half the range.
using Limit = __m256i;
using Kept = __m256i;

inline __m256i half_range() {
  return _mm256_set1_epi16(INT16_MIN);
}
inline Limit limit_of(uint16_t high) {
  return _mm256_xor_si256(_mm256_set1_epi16(static_cast<int16_t>(high)), half_range());
}
inline Kept below(Draws draws, Limit limit) {
  return _mm256_cmpgt_epi16(limit, _mm256_xor_si256(draws.v, half_range()));
}
inline bool any_equal(Draws a, Draws b, Limit limit) {
  const __m256i wanted = _mm256_xor_si256(limit, half_range());
  const __m256i equal = _mm256_or_si256(_mm256_cmpeq_epi16(a.v, wanted), _mm256_cmpeq_epi16(b.v, wanted));
  return _mm256_movemask_epi8(equal);
}
inline Kept kept_of(const uint16_t* flags) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(flags));
}

inline __m128i part(Kept kept, int i) {
  return i == 0 ? _mm256_castsi256_si128(kept) : _mm256_extracti128_si256(kept, 1);
}
inline __m256 scaled(__m256 x, float scale) {
  return _mm256_mul_ps(x, _mm256_set1_ps(scale));
}

inline void write(const float* x, float* y, Kept kept, float scale) {
  for (int i = 0; i < 2; ++i) {
    const __m256i mask = _mm256_cvtepi16_epi32(part(kept, i));
    const __m256 product = scaled(_mm256_loadu_ps(x + 8 * i), scale);
    _mm256_storeu_ps(y + 8 * i, _mm256_and_ps(product, _mm256_castsi256_ps(mask)));
  }
}

inline void write(const double* x, double* y, Kept kept, double scale) {
  for (int i = 0; i < 4; ++i) {
    const __m128i four = i % 2 ? _mm_unpackhi_epi64(part(kept, i / 2), part(kept, i / 2)) : part(kept, i / 2);
    const __m256i mask = _mm256_cvtepi16_epi64(four);
    const __m256d product = _mm256_mul_pd(_mm256_loadu_pd(x + 4 * i), _mm256_set1_pd(scale));
    _mm256_storeu_pd(y + 4 * i, _mm256_and_pd(product, _mm256_castsi256_pd(mask)));
  }
}

inline void write(const Half* x, Half* y, Kept kept, float scale) {
  for (int i = 0; i < 2; ++i) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * i)));
    const __m128i narrow = _mm256_cvtps_ph(scaled(wide, scale), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + 8 * i), _mm_and_si128(narrow, part(kept, i)));
  }
}

// To bfloat16 in the upper half, to nearest, ties to even. A NaN stays one: it comes from a bfloat16, so that its lower
// half is 0 and the sum carries nothing into its exponent.
inline __m256i rounded(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
}

// The even elements and the odd ones, each where the upper half of a float is.
inline void write(const BFloat16* x, BFloat16* y, Kept kept, float scale) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  const __m256i low = _mm256_srli_epi32(rounded(scaled(even, scale)), 16), high = rounded(scaled(odd, scale));
  const __m256i both = _mm256_blend_epi16(low, high, 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm256_and_si256(both, kept));
}

inline void write(const bool*, bool* y, Kept kept, float) {
  const __m128i bytes = _mm_packs_epi16(part(kept, 0), part(kept, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm_and_si128(bytes, _mm_set1_epi8(1)));
}
inline void write(const uint16_t*, uint16_t* flags, Kept kept, float) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(flags), kept);
}

}  // namespace
}  // namespace fused_dropout
