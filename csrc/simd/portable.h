// The vector layer for any CPU, two blocks at a time, in the compiler's own vectors of 16 bytes: SSE2 on x86-64, NEON
// on aarch64, and elsewhere what the compiler makes of them.
#pragma once

#include "kernels.h"

#include <torch/headeronly/util/Half.h>

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fused_dropout {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "vectors are taken apart as little-endian ones are");

constexpr int kLanes = 2;

typedef uint64_t Lanes64 __attribute__((vector_size(16)));
typedef uint32_t Lanes32 __attribute__((vector_size(16)));
typedef uint16_t Lanes16 __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

struct Lanes {
  Lanes64 v;
};

inline Lanes all_lanes(uint32_t word) {
  return {Lanes64{word, word}};
}
// The one operation that compilers do not find by themselves: 32 bits by 32 bits, all 64 of the product.
inline Lanes multiply(Lanes a, uint32_t multiplier) {
#if defined(__SSE2__)
  return {(Lanes64)_mm_mul_epu32((__m128i)a.v, _mm_set1_epi64x(multiplier))};
#elif defined(__ARM_NEON)
  return {(Lanes64)vmull_u32(vmovn_u64((uint64x2_t)a.v), vdup_n_u32(multiplier))};
#else
  return {(a.v & 0xFFFFFFFF) * multiplier};
#endif
}
inline Lanes high(Lanes product) {
  return {product.v >> 32};
}
inline Lanes low(Lanes product) {
  return product;
}
inline Lanes xor3(Lanes a, Lanes b, Lanes c) {
  return {a.v ^ b.v ^ c.v};
}
inline Lanes blocks_from(uint64_t first) {
  return {Lanes64{first, first + 1}};
}

inline Lanes blocks_at(const uint64_t* blocks) {
  return {Lanes64{blocks[0], blocks[1]}};
}

constexpr int kDraws = kLanes * kBlock / 2;

struct Draws {
  Lanes16 v;
};

// The words of a block, in order, are its eight draws; each block fills one of the two vectors.
inline void draws_of(const PhiloxWords<Lanes>& words, Draws draws[2]) {
  const Lanes64 front = (words.w[0].v & 0xFFFFFFFF) | words.w[1].v << 32;
  const Lanes64 back = (words.w[2].v & 0xFFFFFFFF) | words.w[3].v << 32;
  draws[0] = {(Lanes16)Lanes64{front[0], back[0]}};
  draws[1] = {(Lanes16)Lanes64{front[1], back[1]}};
}

using Limit = Lanes16;
using Kept = Lanes16;  // all ones or zeros

inline Limit limit_of(uint16_t high) {
  return Lanes16{} + static_cast<uint16_t>(high);
}
inline Kept below(Draws draws, Limit limit) {
  return (Kept)(draws.v < limit);
}
inline bool any_equal(Draws a, Draws b, Limit limit) {
  const Lanes64 equal = (Lanes64)(a.v == limit) | (Lanes64)(b.v == limit);
  return (equal[0] | equal[1]) != 0;
}
inline Kept kept_of(const uint16_t* flags) {
  Kept kept;
  std::memcpy(&kept, flags, sizeof(kept));
  return kept;
}

// 16 bytes of T, and integers of its width, as all ones and zeros select.
template <typename T, typename Integer>
inline void write_selected(const T* x, T* y, Kept kept, T scale) {
  constexpr int kElements = 16 / sizeof(T);
  typedef T Values __attribute__((vector_size(16)));
  typedef Integer Mask __attribute__((vector_size(16)));
  typedef int16_t Flags __attribute__((vector_size(2 * kElements)));
  for (int i = 0; i < kDraws; i += kElements) {
    Values values;
    Flags flags;
    std::memcpy(&values, x + i, sizeof(values));
    std::memcpy(&flags, reinterpret_cast<const char*>(&kept) + 2 * i, sizeof(flags));
    values = (Values)((Mask)(values * scale) & __builtin_convertvector(flags, Mask));
    std::memcpy(y + i, &values, sizeof(values));
  }
}
inline void write(const float* x, float* y, Kept kept, float scale) {
  write_selected<float, int32_t>(x, y, kept, scale);
}
inline void write(const double* x, double* y, Kept kept, double scale) {
  write_selected<double, int64_t>(x, y, kept, scale);
}

// torch's own conversions.
inline void write(const Half* x, Half* y, Kept kept, float scale) {
  using torch::headeronly::Half;
  for (int i = 0; i < kDraws; ++i) {
    y[i].bits = Half(static_cast<float>(Half(x[i].bits, Half::from_bits())) * scale).x & kept[i];
  }
}

// To bfloat16 in the upper half, to nearest, ties to even. A NaN stays one: it comes from a bfloat16, so that its lower
// half is 0 and the sum carries nothing into its exponent.
inline Lanes32 rounded(Floats x) {
  const Lanes32 bits = (Lanes32)x;
  return bits + 0x7FFF + (bits >> 16 & 1);
}

// The even elements and the odd ones, each where the upper half of a float is.
inline void write(const BFloat16* x, BFloat16* y, Kept kept, float scale) {
  Lanes32 pairs;
  std::memcpy(&pairs, x, sizeof(pairs));
  const Lanes32 even = rounded((Floats)(pairs << 16) * scale), odd = rounded((Floats)(pairs & 0xFFFF0000) * scale);
  const Lanes32 both = (even >> 16 | (odd & 0xFFFF0000)) & (Lanes32)kept;
  std::memcpy(y, &both, sizeof(both));
}

inline void write(const bool*, bool* y, Kept kept, float) {
  for (int i = 0; i < kDraws; ++i) y[i] = kept[i] != 0;
}
inline void write(const uint16_t*, uint16_t* flags, Kept kept, float) {
  std::memcpy(flags, &kept, sizeof(kept));
}

}  // namespace
}  // namespace fused_dropout
