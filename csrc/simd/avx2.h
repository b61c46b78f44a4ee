// The vector layer for AVX2 and F16C, which every CPU with AVX2 has: four blocks in a vector. avx2.cpp includes it;
// algorithm.h and softmax.h call its functions.
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

// Four consecutive block numbers, one in each lane. draws_of() interleaves the lanes, so they are in the order 0, 2,
// 1, 3.
inline Lanes blocks_from(uint64_t first) {
  return {_mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_setr_epi64x(0, 2, 1, 3))};
}

// Four block numbers from an array, in the same order of lanes.
inline Lanes blocks_at(const uint64_t* blocks) {
  return {_mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks)), 0xD8)};
}

struct Draws {
  __m256i v;
};

// A 64-bit lane of two words.
inline __m256i join_words(Lanes lower, Lanes upper) {
  return _mm256_blend_epi32(lower.v, _mm256_slli_epi64(upper.v, 32), 0xAA);
}

// The draws of a group in the order of its elements. The words of a block, in order, are its eight draws: 64 bits from
// words 0 and 1, 64 bits from words 2 and 3.
inline void draws_of(const PhiloxWords<Lanes>& words, Draws draws[2]) {
  const __m256i front = join_words(words.w[0], words.w[1]), back = join_words(words.w[2], words.w[3]);
  draws[0] = {_mm256_unpacklo_epi64(front, back)};
  draws[1] = {_mm256_unpackhi_epi64(front, back)};
}

// Kept has 16-bit lanes: all ones for a kept element, zeros for a dropped one. AVX2 compares signed integers only, so
// half the range is added to both sides of a comparison (by an XOR with the highest bit).
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

// Half i of a vector: eight flags.
inline __m128i half_of(Kept kept, int i) {
  return i == 0 ? _mm256_castsi256_si128(kept) : _mm256_extracti128_si256(kept, 1);
}

// Vectors of each dtype and their operations. drop() applies the flags of `kept` from number `first` on. gate() sets x
// to 0 where `by` is 0 or less. Results in 16-bit floats are rounded after each operation.
struct Halves {
  __m128i v;
};
struct BFloats {
  __m256i v;
};

inline __m256 load(const float* x) {
  return _mm256_loadu_ps(x);
}
inline __m256d load(const double* x) {
  return _mm256_loadu_pd(x);
}
inline Halves load(const Half* x) {
  return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))};
}
inline BFloats load(const BFloat16* x) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))};
}

inline void store(float* y, __m256 x) {
  _mm256_storeu_ps(y, x);
}
inline void store(double* y, __m256d x) {
  _mm256_storeu_pd(y, x);
}
inline void store(Half* y, Halves x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), x.v);
}
inline void store(BFloat16* y, BFloats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), x.v);
}

inline __m256 drop(__m256 x, Kept kept, int first, float scale) {
  const __m256i mask = _mm256_cvtepi16_epi32(half_of(kept, first / 8));
  return _mm256_and_ps(_mm256_mul_ps(x, _mm256_set1_ps(scale)), _mm256_castsi256_ps(mask));
}
inline __m256 add(__m256 a, __m256 b) {
  return _mm256_add_ps(a, b);
}
// If one operand is a NaN, or both are zeros, the instruction returns the second one. So NaN and -0 stay as they are.
inline __m256 relu(__m256 x) {
  return _mm256_max_ps(_mm256_setzero_ps(), x);
}
inline __m256 gate(__m256 x, __m256 by) {
  return _mm256_and_ps(_mm256_cmp_ps(by, _mm256_setzero_ps(), _CMP_NLE_UQ), x);
}

// The larger of two elements. If one is a NaN, the second one.
inline __m256 larger(__m256 a, __m256 b) {
  return _mm256_max_ps(a, b);
}
// The largest element of a vector, and the sum of its elements.
inline float largest_of(__m256 x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float sum_of(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) {
  return _mm256_add_ps(_mm256_mul_ps(a, b), c);  // not every CPU with AVX2 has FMA
}

inline __m256d drop(__m256d x, Kept kept, int first, double scale) {
  const __m128i eight = half_of(kept, first / 8), four = first % 8 ? _mm_unpackhi_epi64(eight, eight) : eight;
  const __m256d mask = _mm256_castsi256_pd(_mm256_cvtepi16_epi64(four));
  return _mm256_and_pd(_mm256_mul_pd(x, _mm256_set1_pd(scale)), mask);
}
inline __m256d add(__m256d a, __m256d b) {
  return _mm256_add_pd(a, b);
}
inline __m256d relu(__m256d x) {
  return _mm256_max_pd(_mm256_setzero_pd(), x);
}
inline __m256d gate(__m256d x, __m256d by) {
  return _mm256_and_pd(_mm256_cmp_pd(by, _mm256_setzero_pd(), _CMP_NLE_UQ), x);
}

inline __m256 widened(Halves x) {
  return _mm256_cvtph_ps(x.v);
}
inline Halves narrowed(__m256 x) {
  return {_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)};
}
inline Halves drop(Halves x, Kept kept, int first, float scale) {
  return {_mm_and_si128(narrowed(_mm256_mul_ps(widened(x), _mm256_set1_ps(scale))).v, half_of(kept, first / 8))};
}
inline Halves add(Halves a, Halves b) {
  return narrowed(add(widened(a), widened(b)));
}
// All ones for -0 and for negative values down to -infinity. relu() and gate() set them to 0, but relu() keeps -0.
inline __m128i up_to_minus_infinity(Halves x) {
  return _mm_cmpgt_epi16(_mm_set1_epi16(kMinusInfinity<Half> + 1), x.v);
}
inline Halves relu(Halves x) {
  const __m128i not_minus_zero = _mm_cmpgt_epi16(x.v, _mm_set1_epi16(kMinusZero));
  return {_mm_andnot_si128(_mm_and_si128(up_to_minus_infinity(x), not_minus_zero), x.v)};
}
inline Halves gate(Halves x, Halves by) {
  return {_mm_andnot_si128(_mm_or_si128(up_to_minus_infinity(by), _mm_cmpeq_epi16(by.v, _mm_setzero_si128())), x.v)};
}

// Rounds floats to bfloat16, in the upper half of each element: to nearest, ties to even. A NaN stays a NaN: it comes
// from a bfloat16, so its lower half is 0, and the addition does not carry into its exponent.
inline __m256i rounded(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
}

// The even and the odd elements as floats. A bfloat16 is the upper half of a float.
inline __m256 even(BFloats x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(x.v, 16));
}
inline __m256 odd(BFloats x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x.v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline __m256i join_bfloats(__m256 even, __m256 odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xAA);
}
inline BFloats drop(BFloats x, Kept kept, int, float scale) {
  const __m256 s = _mm256_set1_ps(scale);
  return {_mm256_and_si256(join_bfloats(_mm256_mul_ps(even(x), s), _mm256_mul_ps(odd(x), s)), kept)};
}
inline BFloats add(BFloats a, BFloats b) {
  return {join_bfloats(add(even(a), even(b)), add(odd(a), odd(b)))};
}
inline __m256i up_to_minus_infinity(BFloats x) {
  return _mm256_cmpgt_epi16(_mm256_set1_epi16(kMinusInfinity<BFloat16> + 1), x.v);
}
inline BFloats relu(BFloats x) {
  const __m256i not_minus_zero = _mm256_cmpgt_epi16(x.v, _mm256_set1_epi16(kMinusZero));
  return {_mm256_andnot_si256(_mm256_and_si256(up_to_minus_infinity(x), not_minus_zero), x.v)};
}
inline BFloats gate(BFloats x, BFloats by) {
  const __m256i zero = _mm256_cmpeq_epi16(by.v, _mm256_setzero_si256());
  return {_mm256_andnot_si256(_mm256_or_si256(up_to_minus_infinity(by), zero), x.v)};
}

inline void write_flags(bool* y, Kept kept) {
  const __m128i bytes = _mm_packs_epi16(half_of(kept, 0), half_of(kept, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm_and_si128(bytes, _mm_set1_epi8(1)));
}
inline void write_flags(uint16_t* flags, Kept kept) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(flags), kept);
}

}  // namespace
}  // namespace fused_dropout
