// The dropout mask, version 1: whether an element is kept, as a pure function of (key, p, element index). All CPU and
// CUDA kernels include this file. docs/mask-v1.md specifies the mask.
//
// The mask is fixed bit for bit. CUDA, every CPU path and fused_dropout/reference.py must agree: if one path decided an
// element differently, the gradient of that element would belong to another mask.
//
// On CUDA, keep() decides each element. On a CPU, the vector layers of simd/ compare the 16-bit draws with
// draw_limit(), which decides almost all elements. If a draw equals the limit, keep() decides all elements of that
// draw's group.
#pragma once

#include "philox.h"

#include <cmath>

namespace fused_dropout {

// A block is eight consecutive element indices, which share one Philox call. The call gives eight 16-bit draws: element
// i uses draw i % 8 of block i / 8.
constexpr int kBlock = 8;

// The key of a call, which is saved for backward: 16 bytes, as in the uint64 tensor [seed, offset].
struct Key {
  uint64_t seed, offset;
};

// How many of the 2^48 equally likely (draw, tie) pairs are kept: those with draw * 2^32 + tie < threshold.
static inline uint64_t threshold(double p) {
  constexpr double kTwo48 = 281474976710656.0;
  double kept = std::floor((1.0 - p) * kTwo48 + 0.5);
  // For 0 < p < 1 both outcomes stay possible. For p = 0 all elements are kept, and for p = 1 none.
  if (p > 0.0 && kept > kTwo48 - 1) kept = kTwo48 - 1;
  if (p < 1.0 && kept < 1) kept = 1;
  return static_cast<uint64_t>(kept);
}

// The factor of kept elements. The product is computed in float, or in double if the elements are double.
static inline double scale(double p) {
  return 1.0 / (1.0 - p);
}

FUSED_DROPOUT_HOST_DEVICE PhiloxKey philox_key(Key key) {
  return {{static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32)}};
}

// The Philox counter of a block.
FUSED_DROPOUT_HOST_DEVICE Words block_counter(Key key, uint64_t block) {
  return {{static_cast<uint32_t>(key.offset), static_cast<uint32_t>(key.offset >> 32), static_cast<uint32_t>(block),
           static_cast<uint32_t>(block >> 32)}};
}

// The four random words of a block: its eight draws.
FUSED_DROPOUT_HOST_DEVICE Words block_words(Key key, uint64_t block) {
  return philox(block_counter(key, block), philox_key(key));
}

// The limit that a draw is compared with: lower draws are kept, higher draws are dropped, and the tie decides an equal
// draw. For p = 0, threshold >> 32 is 2^16, which does not fit into 16 bits. The limit is then the highest draw, and
// keep() keeps an element with that draw.
static inline uint16_t draw_limit(uint64_t threshold) {
  const uint64_t high = threshold >> 32;
  return static_cast<uint16_t>(high < 0xFFFF ? high : 0xFFFF);
}

// Whether an element is kept, by its 16-bit draw and its 32-bit tie. The tie decides if the draw equals threshold
// >> 32.
FUSED_DROPOUT_HOST_DEVICE bool keep(uint32_t draw, uint32_t tie, uint64_t threshold) {
  return (static_cast<uint64_t>(draw) << 32 | tie) < threshold;
}

// The 16-bit draw of a slot, which is an element's index modulo 8. `word` is word slot / 2 of the block. Even slots use
// its lower half, odd slots its upper half.
FUSED_DROPOUT_HOST_DEVICE uint32_t draw_of(uint32_t word, int slot) {
  return slot % 2 ? word >> 16 : word & 0xFFFF;
}

// The XOR of a block's four words. XOR it with one word to get the tie of the two slots in that word.
FUSED_DROPOUT_HOST_DEVICE uint32_t xor_of(const Words& words) {
  return words.w[0] ^ words.w[1] ^ words.w[2] ^ words.w[3];
}

// Whether the element in a slot of a block is kept. Its tie is the XOR of the block's three other words.
FUSED_DROPOUT_HOST_DEVICE bool keep(const Words& words, int slot, uint64_t threshold) {
  // Not words.w[slot / 2]: if the slot is unknown at compile time, the compiler would put the words into memory.
  const uint32_t front = slot < 2 ? words.w[0] : words.w[1], back = slot < 6 ? words.w[2] : words.w[3];
  const uint32_t word = slot < 4 ? front : back;
  return keep(draw_of(word, slot), xor_of(words) ^ word, threshold);
}

// Selects 0 instead of multiplying by 0, so that a dropped NaN or infinity becomes +0 too.
template <typename Compute, typename T>
FUSED_DROPOUT_HOST_DEVICE T drop_or_scale(bool kept, T x, Compute scale) {
  const Compute product = static_cast<Compute>(x) * scale;
  return static_cast<T>(kept ? product : Compute{0});
}

}  // namespace fused_dropout
