// The vector layer for AVX-512 (F, DQ, BW, VL): eight blocks in a vector. avx512.cpp includes it; algorithm.h and
// softmax.h call its functions.
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
  return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)};  // 0x96: a ^ b ^ c
}

// Eight consecutive block numbers, one in each lane. draws_of() interleaves the lanes, so they are in the order 0, 4,
// 1, 5, 2, 6, 3, 7.
inline Lanes blocks_from(uint64_t first) {
  return {_mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7))};
}

// Eight block numbers from an array, in the same order of lanes.
inline Lanes blocks_at(const uint64_t* blocks) {
  return {_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_loadu_si512(blocks))};
}

struct Draws {
  __m512i v;
};

// The draws of a group in the order of its elements. The words of a block, in order, are its eight draws: 64 bits from
// words 0 and 1, 64 bits from words 2 and 3.
inline void draws_of(const PhiloxWords<Lanes>& words, Draws draws[2]) {
  constexpr __mmask16 kUpper = 0xAAAA;
  const __m512i front = _mm512_mask_shuffle_epi32(words.w[0].v, kUpper, words.w[1].v, _MM_PERM_CCAA);
  const __m512i back = _mm512_mask_shuffle_epi32(words.w[2].v, kUpper, words.w[3].v, _MM_PERM_CCAA);
  draws[0] = {_mm512_unpacklo_epi64(front, back)};
  draws[1] = {_mm512_unpackhi_epi64(front, back)};
}

using Limit = __m512i;
using Kept = __mmask32;  // one bit an element: 1 for a kept element

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

// Vectors of each dtype and their operations. drop() applies the flags of `kept` from number `first` on. gate() sets x
// to 0 where `by` is 0 or less. Results in 16-bit floats are rounded after each operation.
struct Halves {
  __m256i v;
};
struct BFloats {
  __m512i v;
};

inline __m512 load(const float* x) {
  return _mm512_loadu_ps(x);
}
inline __m512d load(const double* x) {
  return _mm512_loadu_pd(x);
}
inline Halves load(const Half* x) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))};
}
inline BFloats load(const BFloat16* x) {
  return {_mm512_loadu_si512(x)};
}

inline void store(float* y, __m512 x) {
  _mm512_storeu_ps(y, x);
}
inline void store(double* y, __m512d x) {
  _mm512_storeu_pd(y, x);
}
inline void store(Half* y, Halves x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), x.v);
}
inline void store(BFloat16* y, BFloats x) {
  _mm512_storeu_si512(y, x.v);
}

inline __m512 drop(__m512 x, Kept kept, int first, float scale) {
  return _mm512_maskz_mul_ps(static_cast<__mmask16>(kept >> first), x, _mm512_set1_ps(scale));
}
inline __m512 add(__m512 a, __m512 b) {
  return _mm512_add_ps(a, b);
}
// If one operand is a NaN, or both are zeros, the instruction returns the second one. So NaN and -0 stay as they are.
inline __m512 relu(__m512 x) {
  return _mm512_max_ps(_mm512_setzero_ps(), x);
}
inline __m512 gate(__m512 x, __m512 by) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(by, _mm512_setzero_ps(), _CMP_NLE_UQ), x);
}

// The larger of two elements. If one is a NaN, the second one.
inline __m512 larger(__m512 a, __m512 b) {
  return _mm512_max_ps(a, b);
}
// The largest element of a vector, and the sum of its elements.
inline float largest_of(__m512 x) {
  return _mm512_reduce_max_ps(x);
}
inline float sum_of(__m512 x) {
  return _mm512_reduce_add_ps(x);
}
inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) {
  return _mm512_fmadd_ps(a, b, c);
}

inline __m512d drop(__m512d x, Kept kept, int first, double scale) {
  return _mm512_maskz_mul_pd(static_cast<__mmask8>(kept >> first), x, _mm512_set1_pd(scale));
}
inline __m512d add(__m512d a, __m512d b) {
  return _mm512_add_pd(a, b);
}
inline __m512d relu(__m512d x) {
  return _mm512_max_pd(_mm512_setzero_pd(), x);
}
inline __m512d gate(__m512d x, __m512d by) {
  return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(by, _mm512_setzero_pd(), _CMP_NLE_UQ), x);
}

inline __m512 widened(Halves x) {
  return _mm512_cvtph_ps(x.v);
}
inline Halves narrowed(__m512 x) {
  return {_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)};
}
inline Halves drop(Halves x, Kept kept, int first, float scale) {
  return narrowed(drop(widened(x), kept, first, scale));
}
inline Halves add(Halves a, Halves b) {
  return narrowed(add(widened(a), widened(b)));
}
inline Halves relu(Halves x) {
  const __m256i least = _mm256_set1_epi16(kMinusInfinity<Half>);
  const __mmask16 negative =
      _mm256_cmple_epi16_mask(x.v, least) & _mm256_cmpneq_epi16_mask(x.v, _mm256_set1_epi16(kMinusZero));
  return {_mm256_maskz_mov_epi16(static_cast<__mmask16>(~negative), x.v)};
}
inline Halves gate(Halves x, Halves by) {
  const __m256i least = _mm256_set1_epi16(kMinusInfinity<Half>);
  const __mmask16 zero = _mm256_testn_epi16_mask(by.v, by.v) | _mm256_cmple_epi16_mask(by.v, least);
  return {_mm256_maskz_mov_epi16(static_cast<__mmask16>(~zero), x.v)};
}

// Rounds floats to bfloat16, in the upper half of each element: to nearest, ties to even. A NaN stays a NaN: it comes
// from a bfloat16, so its lower half is 0, and the addition does not carry into its exponent.
inline __m512i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
}

// The even and the odd elements as floats. A bfloat16 is the upper half of a float.
inline __m512i upper_halves() {
  return _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
}
inline __m512 even(BFloats x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(x.v, 16));
}
inline __m512 odd(BFloats x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x.v, upper_halves()));
}
inline __m512i join_bfloats(__m512 even, __m512 odd) {
  const __m512i low = _mm512_srli_epi32(rounded(even), 16);
  return _mm512_ternarylogic_epi32(low, rounded(odd), upper_halves(), 0xF8);  // low | (odd & upper)
}
inline BFloats drop(BFloats x, Kept kept, int, float scale) {
  const __m512 s = _mm512_set1_ps(scale);
  return {_mm512_maskz_mov_epi16(kept, join_bfloats(_mm512_mul_ps(even(x), s), _mm512_mul_ps(odd(x), s)))};
}
inline BFloats add(BFloats a, BFloats b) {
  return {join_bfloats(add(even(a), even(b)), add(odd(a), odd(b)))};
}
inline BFloats relu(BFloats x) {
  const __m512i least = _mm512_set1_epi16(kMinusInfinity<BFloat16>);
  const __mmask32 negative =
      _mm512_cmple_epi16_mask(x.v, least) & _mm512_cmpneq_epi16_mask(x.v, _mm512_set1_epi16(kMinusZero));
  return {_mm512_maskz_mov_epi16(~negative, x.v)};
}
inline BFloats gate(BFloats x, BFloats by) {
  const __m512i least = _mm512_set1_epi16(kMinusInfinity<BFloat16>);
  const __mmask32 zero = _mm512_testn_epi16_mask(by.v, by.v) | _mm512_cmple_epi16_mask(by.v, least);
  return {_mm512_maskz_mov_epi16(~zero, x.v)};
}

inline void write_flags(bool* y, Kept kept) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm256_maskz_set1_epi8(kept, 1));
}
inline void write_flags(uint16_t* flags, Kept kept) {
  _mm512_storeu_si512(flags, _mm512_movm_epi16(kept));
}

}  // namespace
}  // namespace fused_dropout
