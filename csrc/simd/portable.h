// The vector layer for any CPU, in the compiler's vector types of 16 bytes: two blocks in a vector. portable.cpp
// includes it; algorithm.h and softmax.h call its functions. The compiler uses SSE2 on x86-64 and NEON on aarch64.
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

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the casts between vector types assume little-endian order");

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
// The 64-bit product of two 32-bit words. This is the only operation for which compilers do not find the instruction.
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

constexpr int kDrawsPerVector = kLanes * kBlock / 2;

struct Draws {
  Lanes16 v;
};

// The draws of a group in the order of its elements. The words of a block, in order, are its eight draws; each block
// fills one of the two vectors.
inline void draws_of(const PhiloxWords<Lanes>& words, Draws draws[2]) {
  const Lanes64 front = (words.w[0].v & 0xFFFFFFFF) | words.w[1].v << 32;
  const Lanes64 back = (words.w[2].v & 0xFFFFFFFF) | words.w[3].v << 32;
  draws[0] = {(Lanes16)Lanes64{front[0], back[0]}};
  draws[1] = {(Lanes16)Lanes64{front[1], back[1]}};
}

using Limit = Lanes16;
using Kept = Lanes16;  // 16-bit lanes: all ones for a kept element, zeros for a dropped one

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

// Vectors of each dtype and their operations. drop() applies the flags of `kept` from number `first` on. gate() sets x
// to 0 where `by` is 0 or less. Results in 16-bit floats are rounded after each operation.
typedef double Doubles __attribute__((vector_size(16)));
typedef int16_t Signed16 __attribute__((vector_size(16)));
struct Halves {
  Signed16 v;
};
struct BFloats {
  Signed16 v;
};

template <typename Vector, typename T>
inline Vector load_as(const T* x) {
  Vector v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}
inline Floats load(const float* x) {
  return load_as<Floats>(x);
}
inline Doubles load(const double* x) {
  return load_as<Doubles>(x);
}
inline Halves load(const Half* x) {
  return load_as<Halves>(x);
}
inline BFloats load(const BFloat16* x) {
  return load_as<BFloats>(x);
}
template <typename T, typename Vector>
inline void store(T* y, Vector x) {
  std::memcpy(y, &x, sizeof(x));
}

// `count` flags from number `first` on, as wider integers: all ones for a kept element, zeros for a dropped one.
template <typename Integers, int count>
inline Integers widened(Kept kept, int first) {
  typedef int16_t Flags __attribute__((vector_size(2 * count)));
  Flags flags;
  std::memcpy(&flags, reinterpret_cast<const char*>(&kept) + 2 * first, sizeof(flags));
  return __builtin_convertvector(flags, Integers);
}

typedef int32_t Signed32 __attribute__((vector_size(16)));
typedef int64_t Signed64 __attribute__((vector_size(16)));

inline Floats drop(Floats x, Kept kept, int first, float scale) {
  return (Floats)((Signed32)(x * scale) & widened<Signed32, 4>(kept, first));
}
inline Floats add(Floats a, Floats b) {
  return a + b;
}
inline Floats relu(Floats x) {
  return (Floats)((Signed32)x & ~(x < 0));
}
inline Floats gate(Floats x, Floats by) {
  return (Floats)((Signed32)x & ~(by <= 0));
}

// The larger of two elements. If one is a NaN, the second one.
inline Floats larger(Floats a, Floats b) {
  const Signed32 first = a > b;
  return (Floats)(((Signed32)a & first) | ((Signed32)b & ~first));
}
// The largest element of a vector, and the sum of its elements.
inline float largest_of(Floats x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
inline float sum_of(Floats x) {
  return (x[0] + x[2]) + (x[1] + x[3]);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return a * b + c;
}

inline Doubles drop(Doubles x, Kept kept, int first, double scale) {
  return (Doubles)((Signed64)(x * scale) & widened<Signed64, 2>(kept, first));
}
inline Doubles add(Doubles a, Doubles b) {
  return a + b;
}
inline Doubles relu(Doubles x) {
  return (Doubles)((Signed64)x & ~(x < 0));
}
inline Doubles gate(Doubles x, Doubles by) {
  return (Doubles)((Signed64)x & ~(by <= 0));
}

// float16 conversions by torch's Half, one element at a time.
inline float widened(uint16_t half) {
  using torch::headeronly::Half;
  return static_cast<float>(Half(half, Half::from_bits()));
}
inline int16_t narrowed(float x) {
  return static_cast<int16_t>(torch::headeronly::Half(x).x);
}
inline Halves drop(Halves x, Kept kept, int, float scale) {
  for (int i = 0; i < kBlock; ++i) x.v[i] = narrowed(widened(x.v[i]) * scale);
  return {x.v & (Signed16)kept};
}
inline Halves add(Halves a, Halves b) {
  for (int i = 0; i < kBlock; ++i) a.v[i] = narrowed(widened(a.v[i]) + widened(b.v[i]));
  return a;
}

// Rounds floats to bfloat16, in the upper half of each element: to nearest, ties to even. A NaN stays a NaN: it comes
// from a bfloat16, so its lower half is 0, and the addition does not carry into its exponent.
inline Lanes32 rounded(Floats x) {
  const Lanes32 bits = (Lanes32)x;
  return bits + 0x7FFF + (bits >> 16 & 1);
}

// The even and the odd elements as floats. A bfloat16 is the upper half of a float.
inline Floats even(BFloats x) {
  return (Floats)((Lanes32)x.v << 16);
}
inline Floats odd(BFloats x) {
  return (Floats)((Lanes32)x.v & 0xFFFF0000);
}
inline BFloats join_bfloats(Floats even, Floats odd) {
  return {(Signed16)(rounded(even) >> 16 | (rounded(odd) & 0xFFFF0000))};
}
inline BFloats drop(BFloats x, Kept kept, int, float scale) {
  return {join_bfloats(even(x) * scale, odd(x) * scale).v & (Signed16)kept};
}
inline BFloats add(BFloats a, BFloats b) {
  return join_bfloats(even(a) + even(b), odd(a) + odd(b));
}

// ReLU and gate on the bits of 16-bit floats. kernels.h has the order of the bits as signed integers.
template <typename T>
inline Signed16 positive_part(Signed16 x) {
  return x & ~((x <= kMinusInfinity<T>)&(x != kMinusZero));
}
template <typename T>
inline Signed16 gated(Signed16 x, Signed16 by) {
  return x & ~((by <= kMinusInfinity<T>) | (by == 0));
}
inline Halves relu(Halves x) {
  return {positive_part<Half>(x.v)};
}
inline BFloats relu(BFloats x) {
  return {positive_part<BFloat16>(x.v)};
}
inline Halves gate(Halves x, Halves by) {
  return {gated<Half>(x.v, by.v)};
}
inline BFloats gate(BFloats x, BFloats by) {
  return {gated<BFloat16>(x.v, by.v)};
}

inline void write_flags(bool* y, Kept kept) {
  for (int i = 0; i < kDrawsPerVector; ++i) y[i] = kept[i] != 0;
}
inline void write_flags(uint16_t* flags, Kept kept) {
  std::memcpy(flags, &kept, sizeof(kept));
}

}  // namespace
}  // namespace fused_dropout
