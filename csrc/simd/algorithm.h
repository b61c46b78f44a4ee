// The CPU kernels' algorithm, over a vector layer that its includer has defined: portable.h, avx2.h or avx512.h. Each
// layer compiles it once more for its instruction set; hence the nameless namespace.
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

// What all groups of a call have in common.
struct Common {
  explicit Common(const MaskParams& params) : params(params), limit(limit_of(draw_limit(params.threshold))) {
    const PhiloxKey key = philox_key(params.key);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < 2; ++i) keys.k[round][i] = all_lanes(round_key(key, round, i));
    }
    offset[0] = all_lanes(static_cast<uint32_t>(params.key.offset));
    offset[1] = all_lanes(static_cast<uint32_t>(params.key.offset >> 32));
  }

  const MaskParams& params;
  Limit limit;
  RoundKeys keys;
  Lanes offset[2];
};

// Interleaves two groups, so that the arithmetic of one hides the multiply latency of the other. Twins of twins, four
// groups, run fastest with each layer. The compiler would keep an array of groups in memory.
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

using Four = Twin<Twin<Lanes>>;

// How many groups a word belongs to, and a word made of one for all lanes.
template <typename Word>
struct Of {
  static constexpr int kGroups = 1;
  static Word same(const Lanes& word) { return word; }
};
template <typename Word>
struct Of<Twin<Word>> {
  static constexpr int kGroups = 2 * Of<Word>::kGroups;
  static Twin<Word> same(const Lanes& word) { return {Of<Word>::same(word), Of<Word>::same(word)}; }
};

// The blocks to draw: consecutive ones, whose numbers have one upper half...
struct Consecutive {
  uint64_t first;
  const Lanes& upper_half;
  uint64_t operator[](int i) const { return first + i; }
  Consecutive from(int i) const { return {first + i, upper_half}; }
};
inline Lanes lower(const Consecutive& blocks, const Lanes*) {
  return blocks_from(blocks.first);
}
inline Lanes upper(const Consecutive& blocks, const Lanes*) {
  return blocks.upper_half;
}

// ... or any, from a list.
struct Listed {
  const uint64_t* list;
  uint64_t operator[](int i) const { return list[i]; }
  Listed from(int i) const { return {list + i}; }
};
inline Lanes lower(const Listed& blocks, const Lanes*) {
  return blocks_at(blocks.list);
}
inline Lanes upper(const Listed& blocks, const Lanes*) {
  return high(blocks_at(blocks.list));
}

// ... or those of groups of elements, each group's being consecutive with one upper half.
template <typename T>
struct Grouped {
  const Group<T>* groups;
  uint64_t operator[](int i) const { return groups->block + i; }
  Grouped from(int i) const { return {groups + i / kLanes}; }
};
template <typename T>
inline Lanes lower(const Grouped<T>& blocks, const Lanes*) {
  return blocks_from(blocks.groups->block);
}
template <typename T>
inline Lanes upper(const Grouped<T>& blocks, const Lanes*) {
  return all_lanes(static_cast<uint32_t>(blocks.groups->block >> 32));
}

template <typename Blocks, typename Word>
inline Twin<Word> lower(const Blocks& blocks, const Twin<Word>*) {
  const Word* half = nullptr;
  return {lower(blocks, half), lower(blocks.from(Of<Word>::kGroups * kLanes), half)};
}
template <typename Blocks, typename Word>
inline Twin<Word> upper(const Blocks& blocks, const Twin<Word>*) {
  const Word* half = nullptr;
  return {upper(blocks, half), upper(blocks.from(Of<Word>::kGroups * kLanes), half)};
}

// A draw equal to the limit is decided by its tie. About one group in a thousand has one; keep() then decides the whole
// group again.
template <typename Blocks>
__attribute__((noinline)) void settle_ties(const MaskParams& params, Blocks blocks, Kept kept[2]) {
  uint16_t flags[kGroup];
  for (int i = 0; i < kGroup; i += kBlock) {
    const Words words = block_words(params.key, blocks[i / kBlock]);
    for (int slot = 0; slot < kBlock; ++slot) flags[i + slot] = keep(words, slot, params.threshold) ? 0xFFFF : 0;
  }
  kept[0] = kept_of(flags);
  kept[1] = kept_of(flags + kGroup / 2);
}

// Where the elements of a group are: x and y, or what the group says.
template <typename T, typename Blocks>
inline Group<T> place(const T* x, T* y, const Blocks& blocks) {
  return {x, y, blocks[0]};
}
template <typename T>
inline Group<T> place(const T*, T*, const Grouped<T>& blocks) {
  return *blocks.groups;
}

template <typename T, typename Blocks, typename Compute>
inline void finish(const T* x, T* y, const Blocks& blocks, const PhiloxWords<Lanes>& words, const Common& common,
                   Compute scale) {
  Draws draws[2];
  draws_of(words, draws);
  Kept front = below(draws[0], common.limit), back = below(draws[1], common.limit);
  if (__builtin_expect(any_equal(draws[0], draws[1], common.limit), 0)) {
    Kept kept[2];  // separate variables, so that front and back stay in registers
    settle_ties(common.params, blocks, kept);
    front = kept[0];
    back = kept[1];
  }
  const Group<T> group = place(x, y, blocks);
  write(group.x, group.y, front, scale);
  write(group.x + kGroup / 2, group.y + kGroup / 2, back, scale);
}

template <typename Word, typename T, typename Blocks, typename Compute>
inline void finish(const T* x, T* y, const Blocks& blocks, const PhiloxWords<Twin<Word>>& words, const Common& common,
                   Compute scale) {
  const auto& w = words.w;
  constexpr int kHalf = Of<Word>::kGroups;
  finish(x, y, blocks, PhiloxWords<Word>{{w[0].a, w[1].a, w[2].a, w[3].a}}, common, scale);
  finish(x + kHalf * kGroup, y + kHalf * kGroup, blocks.from(kHalf * kLanes),
         PhiloxWords<Word>{{w[0].b, w[1].b, w[2].b, w[3].b}}, common, scale);
}

// As many groups as Word has, straight from x to y.
template <typename Word, typename T, typename Blocks, typename Compute>
inline void drop_groups(const T* x, T* y, const Blocks& blocks, const Common& common, Compute scale) {
  const Word* type = nullptr;
  const PhiloxWords<Word> counter = {
      {Of<Word>::same(common.offset[0]), Of<Word>::same(common.offset[1]), lower(blocks, type), upper(blocks, type)}};
  finish(x, y, blocks, philox(counter, common.keys), common, scale);
}

// A group of which only n elements, from the skip-th on, are wanted: by way of a buffer.
template <typename T, typename Compute>
inline void drop_part(const T* x, T* y, const Consecutive& blocks, int64_t skip, int64_t n, const Common& common,
                      Compute scale) {
  T buffer[kGroup] = {};
  std::memcpy(buffer + skip, x, n * sizeof(T));
  drop_groups<Lanes>(buffer, buffer, blocks, common, scale);
  std::memcpy(y, buffer + skip, n * sizeof(T));
}

// A ragged head, whole groups straight from memory, as many at once as there are, and a ragged tail.
template <typename T, typename Compute>
void drop(const T* x, T* y, uint64_t index, int64_t n, const MaskParams& params) {
  // Up to here the block numbers have the same upper half.
  constexpr uint64_t kReach = (uint64_t{1} << 32) * kBlock;
  const int64_t reach = static_cast<int64_t>(kReach - index % kReach);
  if (n > reach) {
    drop<T, Compute>(x + reach, y + reach, index + reach, n - reach, params);
    n = reach;
  }
  constexpr int kGroups = Of<Four>::kGroups;
  const Common common(params);
  const Compute scale = static_cast<Compute>(params.scale);
  const Lanes upper_half = all_lanes(static_cast<uint32_t>(index / kReach));
  Consecutive blocks{index / kBlock, upper_half};
  int64_t i = 0;
  if (const int64_t skip = index % kBlock) {
    i = n < kGroup - skip ? n : kGroup - skip;
    drop_part(x, y, blocks, skip, i, common, scale);
    blocks.first += kLanes;
  }
  for (; n - i >= kGroups * kGroup; i += kGroups * kGroup, blocks.first += kGroups * kLanes) {
    drop_groups<Four>(x + i, y + i, blocks, common, scale);
  }
  for (; n - i >= kGroup; i += kGroup, blocks.first += kLanes) {
    drop_groups<Lanes>(x + i, y + i, blocks, common, scale);
  }
  if (i < n) drop_part(x + i, y + i, blocks, 0, n - i, common, scale);
}

template <typename T, typename Compute>
void drop_groups(const Group<T>* groups, int64_t n, const MaskParams& params) {
  constexpr int kAtOnce = Of<Four>::kGroups;
  const Common common(params);
  const Compute scale = static_cast<Compute>(params.scale);
  const T* x = nullptr;  // the groups say where
  T* y = nullptr;
  for (; n >= kAtOnce; n -= kAtOnce, groups += kAtOnce) drop_groups<Four>(x, y, Grouped<T>{groups}, common, scale);
  for (; n > 0; --n, ++groups) drop_groups<Lanes>(x, y, Grouped<T>{groups}, common, scale);
}

void draw_flags(const uint64_t* blocks, uint16_t* flags, int64_t n, const MaskParams& params) {
  static_assert(kBlockPadding % kLanes == 0, "the last group has to lie within the padding");
  constexpr int kAtOnce = Of<Four>::kGroups * kLanes;
  const Common common(params);
  int64_t i = 0;
  for (; n - i >= kAtOnce; i += kAtOnce) {
    drop_groups<Four>(flags + i * kBlock, flags + i * kBlock, Listed{blocks + i}, common, 1.0f);
  }
  for (; i < n; i += kLanes) {
    drop_groups<Lanes>(flags + i * kBlock, flags + i * kBlock, Listed{blocks + i}, common, 1.0f);
  }
}

template <typename T, typename Compute>
void select(const T* x, T* y, const uint16_t* flags, int64_t n, double scale) {
  constexpr int kAtOnce = kGroup / 2;
  const Compute s = static_cast<Compute>(scale);
  int64_t i = 0;
  if (flags) {
    for (; n - i >= kAtOnce; i += kAtOnce) write(x + i, y + i, kept_of(flags + i), s);
    if (i == n) return;
  }
  uint16_t last[kAtOnce];
  std::fill_n(last, kAtOnce, 0xFFFF);
  if (!flags) {
    const Kept all = kept_of(last);
    for (; n - i >= kAtOnce; i += kAtOnce) write(x + i, y + i, all, s);
    if (i == n) return;
  }
  T buffer[kAtOnce] = {};
  std::memcpy(buffer, x + i, (n - i) * sizeof(T));
  if (flags) std::memcpy(last, flags + i, (n - i) * sizeof(uint16_t));
  write(buffer, buffer, kept_of(last), s);
  std::memcpy(y + i, buffer, (n - i) * sizeof(T));
}

constexpr CpuKernels make_kernels(const char* isa) {
  return {isa,
          kGroup,
          {drop<float, float>, drop_groups<float, float>, select<float, float>},
          {drop<double, double>, drop_groups<double, double>, select<double, double>},
          {drop<Half, float>, drop_groups<Half, float>, select<Half, float>},
          {drop<BFloat16, float>, drop_groups<BFloat16, float>, select<BFloat16, float>},
          {drop<bool, float>, drop_groups<bool, float>, select<bool, float>},
          draw_flags};
}

}  // namespace
}  // namespace fused_dropout
