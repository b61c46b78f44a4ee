// The CPU kernels' algorithm, over a vector layer that its includer has defined: portable.h, avx2.h or
// avx512.h. Each layer makes it once more, compiled for its instruction set; hence the nameless namespace.
//
// A layer's Lanes hold 64 bits each, of which Philox uses the lower 32: one block a lane. A group is as many blocks as
// there are lanes. Their words give the draws of the group's elements in order, in two vectors of 16-bit draws.
#pragma once

#include "kernels.h"

#include <algorithm>
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

// What is the same for all groups of a call, as long as the upper half of the block's number is.
struct Common {
  // Where all are kept the limit is one more than 16 bits hold: then the highest draw is a tie, and won.
  Common(const Draw& draw, uint64_t upper)
      : draw(draw), limit(limit_of(std::min<uint64_t>(draw.threshold >> 32, 0xFFFF))) {
    const PhiloxKey key = philox_key(draw.key);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < 2; ++i) keys.k[round][i] = all_lanes(round_key(key, round, i));
    }
    offset[0] = all_lanes(static_cast<uint32_t>(draw.key.offset));
    offset[1] = all_lanes(static_cast<uint32_t>(draw.key.offset >> 32));
    block_upper = all_lanes(static_cast<uint32_t>(upper));
  }

  const Draw& draw;
  Limit limit;
  RoundKeys keys;
  Lanes offset[2], block_upper;
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
inline void finish(const T* x, T* y, uint64_t block, const PhiloxWords<Lanes>& words, const Common& common,
                   Compute scale) {
  Draws draws[2];
  draws_of(words, draws);
  Kept front = below(draws[0], common.limit), back = below(draws[1], common.limit);
  if (__builtin_expect(any_equal(draws[0], draws[1], common.limit), 0)) {
    Kept kept[2];  // apart from the above, whose address nobody takes: they stay in registers
    settle_ties(common.draw, block, kept);
    front = kept[0];
    back = kept[1];
  }
  write(x, y, front, scale);
  write(x + kGroup / 2, y + kGroup / 2, back, scale);
}

// Two at once: a round waits for its products, and the other's fill the time. Twins of twins, four groups, run fastest
// with each layer; an array in their place would be kept in memory.
template <typename Word>
struct Twin {
  Word a, b;
};

template <typename Word>
inline Twin<Word> multiply(const Twin<Word>& t, uint32_t multiplier) {
  return {multiply(t.a, multiplier), multiply(t.b, multiplier)};
}
template <typename Word>
inline Twin<Word> high(const Twin<Word>& product) {
  return {high(product.a), high(product.b)};
}
template <typename Word>
inline Twin<Word> low(const Twin<Word>& product) {
  return product;
}
template <typename Word>
inline Twin<Word> xor3(const Twin<Word>& x, const Twin<Word>& y, const Lanes& key) {
  return {xor3(x.a, y.a, key), xor3(x.b, y.b, key)};
}

using AtOnce = Twin<Twin<Lanes>>;

// How many groups a word is of, the same word for all, and the numbers of their blocks.
template <typename Word>
struct Of {
  static constexpr int kGroups = 1;
  static Word same(const Lanes& word) { return word; }
  static Word blocks(uint64_t first) { return blocks_from(first); }
};
template <typename Word>
struct Of<Twin<Word>> {
  static constexpr int kGroups = 2 * Of<Word>::kGroups;
  static Twin<Word> same(const Lanes& word) { return {Of<Word>::same(word), Of<Word>::same(word)}; }
  static Twin<Word> blocks(uint64_t first) {
    return {Of<Word>::blocks(first), Of<Word>::blocks(first + Of<Word>::kGroups * kLanes)};
  }
};

template <typename Word, typename T, typename Compute>
inline void finish(const T* x, T* y, uint64_t block, const PhiloxWords<Twin<Word>>& words, const Common& common,
                   Compute scale) {
  const auto& w = words.w;
  constexpr int kHalf = Of<Word>::kGroups;
  finish(x, y, block, PhiloxWords<Word>{{w[0].a, w[1].a, w[2].a, w[3].a}}, common, scale);
  finish(x + kHalf * kGroup, y + kHalf * kGroup, block + kHalf * kLanes,
         PhiloxWords<Word>{{w[0].b, w[1].b, w[2].b, w[3].b}}, common, scale);
}

template <typename Word, typename T, typename Compute>
inline void drop_groups(const T* x, T* y, uint64_t block, const Common& common, Compute scale) {
  const PhiloxWords<Word> counter = {{Of<Word>::same(common.offset[0]), Of<Word>::same(common.offset[1]),
                                      Of<Word>::blocks(block), Of<Word>::same(common.block_upper)}};
  finish(x, y, block, philox(counter, common.keys), common, scale);
}

// A group of which only n elements, from the skip-th on, are wanted: by way of a buffer.
template <typename T, typename Compute>
inline void drop_part(const T* x, T* y, uint64_t block, int64_t skip, int64_t n, const Common& common, Compute scale) {
  T buffer[kGroup] = {};
  std::memcpy(buffer + skip, x, n * sizeof(T));
  drop_groups<Lanes>(buffer, buffer, block, common, scale);
  std::memcpy(y, buffer + skip, n * sizeof(T));
}

// A ragged head, whole groups straight from memory, as many at once as there are, and a ragged tail.
template <typename T, typename Compute>
void drop(const T* x, T* y, uint64_t index, int64_t n, const Draw& draw) {
  // Up to here the upper half of the block's number is the same, and so is what Philox makes of it alone.
  constexpr uint64_t kReach = (uint64_t{1} << 32) * kBlock;
  const int64_t reach = static_cast<int64_t>(kReach - index % kReach);
  if (n > reach) {
    drop<T, Compute>(x + reach, y + reach, index + reach, n - reach, draw);
    n = reach;
  }
  constexpr int kGroups = Of<AtOnce>::kGroups;
  const Common common(draw, index / kReach);
  const Compute scale = static_cast<Compute>(draw.scale);
  uint64_t block = index / kBlock;
  int64_t i = 0;
  if (const int64_t skip = index % kBlock) {
    i = n < kGroup - skip ? n : kGroup - skip;
    drop_part(x, y, block, skip, i, common, scale);
    block += kLanes;
  }
  for (; n - i >= kGroups * kGroup; i += kGroups * kGroup, block += kGroups * kLanes) {
    drop_groups<AtOnce>(x + i, y + i, block, common, scale);
  }
  for (; n - i >= kGroup; i += kGroup, block += kLanes) drop_groups<Lanes>(x + i, y + i, block, common, scale);
  if (i < n) drop_part(x + i, y + i, block, 0, n - i, common, scale);
}

void write_mask(bool* y, uint64_t index, int64_t n, const Draw& draw) {
  drop<bool, float>(y, y, index, n, draw);
}

template <typename T, typename Compute>
void select(const T* x, T* y, const uint16_t* flags, int64_t n, double scale) {
  constexpr int kAtOnce = kGroup / 2;
  uint16_t last[kAtOnce];
  std::fill_n(last, kAtOnce, 0xFFFF);
  const Kept all = kept_of(last);
  const Compute s = static_cast<Compute>(scale);
  int64_t i = 0;
  for (; n - i >= kAtOnce; i += kAtOnce) write(x + i, y + i, flags ? kept_of(flags + i) : all, s);
  if (i == n) return;
  T buffer[kAtOnce] = {};
  std::memcpy(buffer, x + i, (n - i) * sizeof(T));
  if (flags) std::memcpy(last, flags + i, (n - i) * sizeof(uint16_t));
  write(buffer, buffer, kept_of(last), s);
  std::memcpy(y + i, buffer, (n - i) * sizeof(T));
}

constexpr CpuKernels make_kernels(const char* isa) {
  return {isa,        drop<float, float>,   drop<double, double>,   drop<Half, float>,   drop<BFloat16, float>,
          write_mask, select<float, float>, select<double, double>, select<Half, float>, select<BFloat16, float>};
}

}  // namespace
}  // namespace fused_dropout
