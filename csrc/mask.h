// The mask, version 1, for host and device: which elements survive, as a pure function of (key, p, element index).
// docs/mask-v1.md specifies it. It is fixed bit for bit, for CUDA, every CPU path and fused_dropout/reference.py alike:
// if one of them decided an element in another way, its gradient would belong to another mask.
//
// On CUDA keep() decides each element. On a CPU the vector layers of simd/ compare 16-bit draws with draw_limit(),
// which decides almost all elements; keep() decides those of a group in which a draw equals the limit.
#pragma once

#include "philox.h"

#include <cmath>

namespace fused_dropout {

// One Philox call makes eight 16-bit draws: element i has draw i % 8 of block i / 8.
constexpr int kBlock = 8;

// The 16 bytes that a call draws with and saves for backward: a uint64 tensor [seed, offset].
struct Key {
  uint64_t seed, offset;
};

// How many of the 2^48 equally likely (draw, tie) pairs are kept: those with draw * 2^32 + tie < threshold.
static inline uint64_t threshold(double p) {
  constexpr double kTwo48 = 281474976710656.0;
  double kept = std::floor((1.0 - p) * kTwo48 + 0.5);
  // Strictly between 0 and 1 neither outcome becomes impossible; at 0 all are kept and at 1 none.
  if (p > 0.0 && kept > kTwo48 - 1) kept = kTwo48 - 1;
  if (p < 1.0 && kept < 1) kept = 1;
  return static_cast<uint64_t>(kept);
}

// Kept elements are multiplied by this. The product is taken in float, or in double for double.
static inline double scale(double p) {
  return 1.0 / (1.0 - p);
}

FUSED_DROPOUT_HOST_DEVICE PhiloxKey philox_key(Key key) {
  return {{static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32)}};
}

// Philox's counter for a block of the call.
FUSED_DROPOUT_HOST_DEVICE Words block_counter(Key key, uint64_t block) {
  return {{static_cast<uint32_t>(key.offset), static_cast<uint32_t>(key.offset >> 32), static_cast<uint32_t>(block),
           static_cast<uint32_t>(block >> 32)}};
}

FUSED_DROPOUT_HOST_DEVICE Words block_words(Key key, uint64_t block) {
  return philox(block_counter(key, block), philox_key(key));
}

// The draw alone decides unless it equals this limit: lower draws are kept, higher ones dropped. At p = 0 the threshold
// has 17 high bits; then the highest draw counts as equal, and keep() keeps it.
static inline uint16_t draw_limit(uint64_t threshold) {
  const uint64_t high = threshold >> 32;
  return static_cast<uint16_t>(high < 0xFFFF ? high : 0xFFFF);
}

// Does an element survive? If its draw equals the threshold's high part, its tie decides.
FUSED_DROPOUT_HOST_DEVICE bool keep(uint32_t draw, uint32_t tie, uint64_t threshold) {
  return (static_cast<uint64_t>(draw) << 32 | tie) < threshold;
}

// The 16-bit draw of a slot (an element's index modulo 8). Even slots take the lower half of a word, odd slots the
// upper.
FUSED_DROPOUT_HOST_DEVICE uint32_t draw_of(uint32_t word, int slot) {
  return slot % 2 ? word >> 16 : word & 0xFFFF;
}

// The XOR of a block's words. The XOR with one of them is the tie of the two slots in that word.
FUSED_DROPOUT_HOST_DEVICE uint32_t xor_of(const Words& words) {
  return words.w[0] ^ words.w[1] ^ words.w[2] ^ words.w[3];
}

// The same for a slot of a block. Its tie is the XOR of the block's three other words.
FUSED_DROPOUT_HOST_DEVICE bool keep(const Words& words, int slot, uint64_t threshold) {
  // Not words.w[slot / 2]: a slot unknown at compile time would put the words into memory.
  const uint32_t front = slot < 2 ? words.w[0] : words.w[1], back = slot < 6 ? words.w[2] : words.w[3];
  const uint32_t word = slot < 4 ? front : back;
  return keep(draw_of(word, slot), xor_of(words) ^ word, threshold);
}

// Selects rather than multiplies by zero: a dropped NaN or infinity becomes +0 too.
template <typename Compute, typename T>
FUSED_DROPOUT_HOST_DEVICE T drop_or_scale(bool kept, T x, Compute scale) {
  const Compute product = static_cast<Compute>(x) * scale;
  return static_cast<T>(kept ? product : Compute{0});
}

}  // namespace fused_dropout
