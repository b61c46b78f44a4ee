// The CPU kernels' algorithm, over a vector layer that its includer has defined: vector_portable.h, vector_avx2.h or
// vector_avx512.h. Each layer makes it once more, compiled for its instruction set; hence the nameless namespace.
//
// A layer's Lanes hold 64 bits each, of which Philox uses the lower 32: one block a lane. A group is as many blocks as
// there are lanes. Their words give the draws of the group's elements in order, in two vectors of 16-bit draws.
#pragma once

#include "cpu_kernels.h"

#include <cstring>

namespace fused_dropout {
namespace {

constexpr int kGroup = kLanes * kBlock;

struct RoundKeys {
  Lanes k[kPhiloxRounds][2];
};

inline const Lanes& round_key(const RoundKeys& keys, int round, int i) {
  return keys.k[round][i];
}

// What is the same for all groups of a call.
struct Group {
  // Where all are kept the limit is one more than 16 bits hold: then the highest draw is a tie, and won.
  explicit Group(const Draw& draw)
      : draw(draw), limit(limit_of(draw.threshold.hi < 0xFFFF ? draw.threshold.hi : 0xFFFF)) {
    const PhiloxKey key = philox_key(draw.key);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < 2; ++i) keys.k[round][i] = all_lanes(round_key(key, round, i));
    }
    offset[0] = all_lanes(static_cast<uint32_t>(draw.key.offset));
    offset[1] = all_lanes(static_cast<uint32_t>(draw.key.offset >> 32));
  }

  const Draw& draw;
  Limit limit;
  RoundKeys keys;
  Lanes offset[2];
};

// Equal draws leave it to the tie: so rare, a group in a thousand, that mask.h may do all of it once more.
__attribute__((noinline)) void settle_ties(const Draw& draw, uint64_t block, Kept kept[2]) {
  uint16_t flags[kGroup];
  for (int i = 0; i < kGroup; i += kBlock) {
    const Words words = block_words(draw.key, block + i / kBlock);
    for (int slot = 0; slot < kBlock; ++slot) flags[i + slot] = keep(words, slot, draw.threshold) ? 0xFFFF : 0;
  }
  kept[0] = kept_of(flags);
  kept[1] = kept_of(flags + kGroup / 2);
}

template <typename T, typename Compute>
inline void finish_group(const T* x, T* y, uint64_t block, const PhiloxWords<Lanes>& words, const Group& group,
                         Compute scale) {
  Draws draws[2];
  draws_of(words, draws);
  Kept front = below(draws[0], group.limit), back = below(draws[1], group.limit);
  if (__builtin_expect(any_equal(draws[0], draws[1], group.limit), 0)) {
    Kept kept[2];  // apart from the above, whose address nobody takes: they stay in registers
    settle_ties(group.draw, block, kept);
    front = kept[0];
    back = kept[1];
  }
  write(x, y, front, scale);
  write(x + kGroup / 2, y + kGroup / 2, back, scale);
}

template <typename T, typename Compute>
inline void drop_group(const T* x, T* y, uint64_t block, const Group& group, Compute scale) {
  const Lanes blocks = blocks_from(block);
  const PhiloxWords<Lanes> counter = {{group.offset[0], group.offset[1], blocks, high(blocks)}};
  finish_group(x, y, block, philox(counter, group.keys), group, scale);
}

// Two groups at once: a round waits for its products, and the other group's fill the time.
struct Twin {
  Lanes a, b;
};

inline Twin multiply(const Twin& t, uint32_t multiplier) {
  return {multiply(t.a, multiplier), multiply(t.b, multiplier)};
}
inline Twin high(const Twin& product) {
  return {high(product.a), high(product.b)};
}
inline Twin low(const Twin& product) {
  return product;
}
inline Twin xor3(const Twin& x, const Twin& y, const Lanes& key) {
  return {xor3(x.a, y.a, key), xor3(x.b, y.b, key)};
}

template <typename T, typename Compute>
inline void drop_two_groups(const T* x, T* y, uint64_t block, const Group& group, Compute scale) {
  const Lanes &low = group.offset[0], &up = group.offset[1], a = blocks_from(block), b = blocks_from(block + kLanes);
  const auto [w] = philox(PhiloxWords<Twin>{{{low, low}, {up, up}, {a, b}, {high(a), high(b)}}}, group.keys);
  finish_group(x, y, block, {{w[0].a, w[1].a, w[2].a, w[3].a}}, group, scale);
  finish_group(x + kGroup, y + kGroup, block + kLanes, {{w[0].b, w[1].b, w[2].b, w[3].b}}, group, scale);
}

// Whole groups straight from memory; what is left at a ragged head or tail by way of a buffer.
template <typename T, typename Compute>
void drop(const T* x, T* y, uint64_t index, int64_t n, const Draw& draw) {
  const Group group(draw);
  const Compute scale = static_cast<Compute>(draw.scale);
  while (n > 0) {
    const int skip = static_cast<int>(index % kBlock);
    int64_t count = kGroup - skip;
    if (skip == 0 && n >= 2 * kGroup) {
      count = 2 * kGroup;
      drop_two_groups(x, y, index / kBlock, group, scale);
    } else if (skip == 0 && n >= kGroup) {
      drop_group(x, y, index / kBlock, group, scale);
    } else {
      count = n < count ? n : count;
      T buffer[kGroup] = {};
      std::memcpy(buffer + skip, x, count * sizeof(T));
      drop_group(buffer, buffer, index / kBlock, group, scale);
      std::memcpy(y, buffer + skip, count * sizeof(T));
    }
    x += count, y += count, index += count, n -= count;
  }
}

void write_mask(bool* y, uint64_t index, int64_t n, const Draw& draw) {
  drop<bool, float>(y, y, index, n, draw);
}

constexpr CpuKernels make_kernels(const char* isa) {
  return {isa, drop<float, float>, drop<double, double>, drop<Half, float>, drop<BFloat16, float>, write_mask};
}

}  // namespace
}  // namespace fused_dropout
