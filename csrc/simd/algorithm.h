// The CPU kernels' algorithm, over a vector layer that its includer has defined: portable.h, avx2.h or avx512.h. Each
// layer compiles it once more for its instruction set; hence the nameless namespace.
//
// A layer's Lanes hold 64 bits each, of which Philox uses the lower 32: one block a lane. A group is as many blocks as
// there are lanes. Their words give the draws of the group's elements in order, in two vectors of 16-bit draws.
#pragma once

#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace fused_dropout {
namespace {

constexpr int kGroup = kLanes * kBlock;

// A kernel, into which all that it calls is inlined. Left to the compiler, the number of kernels in a file decides, and
// with the operations beside dropout it kept calls in the loop: 1.5 times the time.
#ifndef FUSED_DROPOUT_KERNEL
#define FUSED_DROPOUT_KERNEL __attribute__((flatten))
#endif

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

// Where the elements of a group are: what a group says comes first.
template <typename T, typename Blocks>
inline const Streams<T>& place(const Streams<T>& at, const Blocks&) {
  return at;
}
template <typename T>
inline const Streams<T>& place(const Streams<T>&, const Grouped<T>& blocks) {
  return blocks.groups->at;
}

// Half a group, whose flags are known.
template <Operation operation, typename T, typename Compute>
inline void write(const Streams<T>& at, Kept kept, Compute scale) {
  if constexpr (std::is_same_v<T, bool> || std::is_same_v<T, uint16_t>) {
    write_flags(at.y, kept);
  } else {
    constexpr int kCount = sizeof(load(at.x)) / sizeof(T);
    for (int i = 0; i < kGroup / 2; i += kCount) {
      auto v = load(at.x + i);
      if constexpr (reads_bias(operation)) v = add(v, load(at.bias + i));
      if constexpr (operation == Operation::kReluDrop) v = relu(v);
      v = drop(v, kept, i, scale);
      if constexpr (operation == Operation::kGate) {
        v = gate(v, load(at.residual + i));
      } else if constexpr (reads_residual(operation)) {
        v = add(load(at.residual + i), v);
      }
      store(at.y + i, v);
    }
  }
}

template <Operation operation, typename T, typename Blocks, typename Compute>
inline void finish(const Streams<T>& at, const Blocks& blocks, const PhiloxWords<Lanes>& words, const Common& common,
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
  const Streams<T> group = place(at, blocks);
  write<operation>(group, front, scale);
  write<operation>(group + kGroup / 2, back, scale);
}

template <Operation operation, typename Word, typename T, typename Blocks, typename Compute>
inline void finish(const Streams<T>& at, const Blocks& blocks, const PhiloxWords<Twin<Word>>& words,
                   const Common& common, Compute scale) {
  const auto& w = words.w;
  constexpr int kHalf = Of<Word>::kGroups;
  finish<operation>(at, blocks, PhiloxWords<Word>{{w[0].a, w[1].a, w[2].a, w[3].a}}, common, scale);
  finish<operation>(at + kHalf * kGroup, blocks.from(kHalf * kLanes),
                    PhiloxWords<Word>{{w[0].b, w[1].b, w[2].b, w[3].b}}, common, scale);
}

// As many groups as Word has, straight from memory to memory.
template <Operation operation, typename Word, typename T, typename Blocks, typename Compute>
inline void move_groups(const Streams<T>& at, const Blocks& blocks, const Common& common, Compute scale) {
  const Word* type = nullptr;
  const PhiloxWords<Word> counter = {
      {Of<Word>::same(common.offset[0]), Of<Word>::same(common.offset[1]), lower(blocks, type), upper(blocks, type)}};
  finish<operation>(at, blocks, philox(counter, common.keys), common, scale);
}

// A part of `size` elements, of which n, from the skip-th on, are those of the streams: what is read beside them must
// not be memory of others.
template <Operation operation, typename T, int size>
struct Buffer {
  T x[size] = {}, residual[size] = {}, bias[size] = {};

  Buffer(const Streams<T>& from, int64_t skip, int64_t n) {
    std::memcpy(x + skip, from.x, n * sizeof(T));
    if constexpr (reads_residual(operation)) std::memcpy(residual + skip, from.residual, n * sizeof(T));
    if constexpr (reads_bias(operation)) std::memcpy(bias + skip, from.bias, n * sizeof(T));
  }
  Streams<T> streams() { return {x, x, residual, bias}; }
};

template <Operation operation, typename T, typename Compute>
inline void drop_part(const Streams<T>& at, const Consecutive& blocks, int64_t skip, int64_t n, const Common& common,
                      Compute scale) {
  Buffer<operation, T, kGroup> buffer(at, skip, n);
  move_groups<operation, Lanes>(buffer.streams(), blocks, common, scale);
  std::memcpy(at.y, buffer.x + skip, n * sizeof(T));
}

// A ragged head, whole groups straight from memory, as many at once as there are, and a ragged tail.
template <Operation operation, typename T, typename Compute>
FUSED_DROPOUT_KERNEL void drop(const Streams<T>& all, uint64_t index, int64_t n, const MaskParams& params) {
  // Up to here the block numbers have the same upper half.
  constexpr uint64_t kReach = (uint64_t{1} << 32) * kBlock;
  const int64_t reach = static_cast<int64_t>(kReach - index % kReach);
  if (n > reach) {
    drop<operation, T, Compute>(all + reach, index + reach, n - reach, params);
    n = reach;
  }
  constexpr int kGroups = Of<Four>::kGroups;
  const Common common(params);
  const Compute scale = static_cast<Compute>(params.scale);
  const Lanes upper_half = all_lanes(static_cast<uint32_t>(index / kReach));
  Consecutive blocks{index / kBlock, upper_half};
  const Streams<T> at = all;  // a copy, which the compiler knows that no store changes
  int64_t i = 0;
  if (const int64_t skip = index % kBlock) {
    i = n < kGroup - skip ? n : kGroup - skip;
    drop_part<operation>(at, blocks, skip, i, common, scale);
    blocks.first += kLanes;
  }
  for (; n - i >= kGroups * kGroup; i += kGroups * kGroup, blocks.first += kGroups * kLanes) {
    move_groups<operation, Four>(at + i, blocks, common, scale);
  }
  for (; n - i >= kGroup; i += kGroup, blocks.first += kLanes) {
    move_groups<operation, Lanes>(at + i, blocks, common, scale);
  }
  if (i < n) drop_part<operation>(at + i, blocks, 0, n - i, common, scale);
}

template <Operation operation, typename T, typename Compute>
FUSED_DROPOUT_KERNEL void drop_groups(const Group<T>* groups, int64_t n, const MaskParams& params) {
  constexpr int kAtOnce = Of<Four>::kGroups;
  const Common common(params);
  const Compute scale = static_cast<Compute>(params.scale);
  const Streams<T> unused{};  // the groups say where
  for (; n >= kAtOnce; n -= kAtOnce, groups += kAtOnce) {
    move_groups<operation, Four>(unused, Grouped<T>{groups}, common, scale);
  }
  for (; n > 0; --n, ++groups) move_groups<operation, Lanes>(unused, Grouped<T>{groups}, common, scale);
}

FUSED_DROPOUT_KERNEL void draw_flags(const uint64_t* blocks, uint16_t* flags, int64_t n, const MaskParams& params) {
  static_assert(kBlockPadding % kLanes == 0, "the last group has to lie within the padding");
  constexpr int kAtOnce = Of<Four>::kGroups * kLanes;
  const Common common(params);
  const Streams<uint16_t> at{flags, flags, flags, flags};
  int64_t i = 0;
  for (; n - i >= kAtOnce; i += kAtOnce) {
    move_groups<Operation::kDrop, Four>(at + i * kBlock, Listed{blocks + i}, common, 1.0f);
  }
  for (; i < n; i += kLanes) {
    move_groups<Operation::kDrop, Lanes>(at + i * kBlock, Listed{blocks + i}, common, 1.0f);
  }
}

template <Operation operation, typename T, typename Compute>
FUSED_DROPOUT_KERNEL void select(const Streams<T>& all, const uint16_t* flags, int64_t n, double scale) {
  constexpr int kAtOnce = kGroup / 2;
  const Compute s = static_cast<Compute>(scale);
  const Streams<T> at = all;  // as in drop
  int64_t i = 0;
  if (flags) {
    for (; n - i >= kAtOnce; i += kAtOnce) write<operation>(at + i, kept_of(flags + i), s);
    if (i == n) return;
  }
  uint16_t last[kAtOnce];
  std::fill_n(last, kAtOnce, 0xFFFF);
  if (!flags) {
    const Kept kept = kept_of(last);
    for (; n - i >= kAtOnce; i += kAtOnce) write<operation>(at + i, kept, s);
    if (i == n) return;
  }
  if (flags) std::memcpy(last, flags + i, (n - i) * sizeof(uint16_t));
  Buffer<operation, T, kAtOnce> buffer(at + i, 0, n - i);
  write<operation>(buffer.streams(), kept_of(last), s);
  std::memcpy(at.y + i, buffer.x, (n - i) * sizeof(T));
}

}  // namespace
}  // namespace fused_dropout
