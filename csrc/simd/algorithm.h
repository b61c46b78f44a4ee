// The dropout kernels for CPUs, written over a vector layer: portable.h, avx2.h or avx512.h, which is included before
// this file. tables.h puts the kernels into the tables of kernels.h, where their parameters are described.
//
// Each layer compiles this file for its own instruction set. The unnamed namespace keeps the versions apart.
//
// A vector of Lanes has kLanes lanes of 64 bits, one for each block. Philox uses the lower 32 bits of a lane. A group
// is kLanes blocks. Their words are the draws of the group's elements, in order, in two vectors of 16-bit draws.
#pragma once

#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace fused_dropout {
namespace {

constexpr int kGroup = kLanes * kBlock;  // elements of a group

// Marks a kernel: the compiler inlines all functions that it calls. Without this attribute, the number of kernels in a
// file decides what is inlined. With the operations beside dropout, calls stayed in the loop, and the time was 1.5
// times as long.
#ifndef FUSED_DROPOUT_KERNEL
#define FUSED_DROPOUT_KERNEL __attribute__((flatten))
#endif

// The Philox keys of all rounds, each word in all lanes.
struct RoundKeys {
  Lanes k[kPhiloxRounds][2];
};

inline const Lanes& round_key(const RoundKeys& keys, int round, int i) {
  return keys.k[round][i];
}

// The values that all groups of a call share, as vectors.
struct CallConstants {
  explicit CallConstants(const MaskParams& params) : params(params), limit(limit_of(draw_limit(params.threshold))) {
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

// Two groups that Philox interleaves, so that the arithmetic of one hides the multiply latency of the other. Pairs of
// pairs, that is four groups, run fastest with each layer. Members instead of an array: the compiler would keep an
// array in memory.
template <typename Word>
struct Pair {
  Word a, b;
};

template <typename Word>
inline Pair<Word> multiply(const Pair<Word>& t, uint32_t multiplier) {
  return {multiply(t.a, multiplier), multiply(t.b, multiplier)};
}
template <typename Word>
inline Pair<Word> high(const Pair<Word>& product) {
  return {high(product.a), high(product.b)};
}
template <typename Word>
inline Pair<Word> low(const Pair<Word>& product) {
  return product;
}
template <typename Word>
inline Pair<Word> xor3(const Pair<Word>& x, const Pair<Word>& y, const Lanes& key) {
  return {xor3(x.a, y.a, key), xor3(x.b, y.b, key)};
}

using FourGroups = Pair<Pair<Lanes>>;

// The number of groups that a Word holds, and the conversion of one Lanes vector into a Word for all of them.
template <typename Word>
struct WordTraits {
  static constexpr int kGroups = 1;
  static Word broadcast(const Lanes& word) { return word; }
};
template <typename Word>
struct WordTraits<Pair<Word>> {
  static constexpr int kGroups = 2 * WordTraits<Word>::kGroups;
  static Pair<Word> broadcast(const Lanes& word) {
    return {WordTraits<Word>::broadcast(word), WordTraits<Word>::broadcast(word)};
  }
};

// The three kinds of lists of block numbers that a kernel draws. Each has the block number i, and the list from number
// i on. lower() and upper() return the lower and upper halves of the block numbers as a Word; their pointer argument
// only selects that type.

// Consecutive block numbers with equal upper halves.
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

// Any block numbers, from an array.
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

// The block numbers of groups. Within a group they are consecutive and have equal upper halves.
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
inline Pair<Word> lower(const Blocks& blocks, const Pair<Word>*) {
  const Word* half = nullptr;
  return {lower(blocks, half), lower(blocks.from(WordTraits<Word>::kGroups * kLanes), half)};
}
template <typename Blocks, typename Word>
inline Pair<Word> upper(const Blocks& blocks, const Pair<Word>*) {
  const Word* half = nullptr;
  return {upper(blocks, half), upper(blocks.from(WordTraits<Word>::kGroups * kLanes), half)};
}

// Decides a group again by keep(), if one of its draws equals the limit, so that its tie decides. About one group in a
// thousand has such a draw. Not inlined, to keep it out of the loop.
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

// The addresses of a group's elements: those of the Group if there is one, otherwise `at`.
template <typename T, typename Blocks>
inline const Streams<T>& group_streams(const Streams<T>& at, const Blocks&) {
  return at;
}
template <typename T>
inline const Streams<T>& group_streams(const Streams<T>&, const Grouped<T>& blocks) {
  return blocks.groups->at;
}

// Reads half a group, applies the operation with known flags, and writes the results.
template <Operation operation, typename T, typename Compute>
inline void write_half_group(const Streams<T>& at, Kept kept, Compute scale) {
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

// Turns the random words of one group into flags, and applies the operation to the group's elements.
template <Operation operation, typename T, typename Blocks, typename Compute>
inline void apply_words(const Streams<T>& at, const Blocks& blocks, const PhiloxWords<Lanes>& words,
                        const CallConstants& constants, Compute scale) {
  Draws draws[2];
  draws_of(words, draws);
  Kept front = below(draws[0], constants.limit), back = below(draws[1], constants.limit);
  if (__builtin_expect(any_equal(draws[0], draws[1], constants.limit), 0)) {
    Kept kept[2];  // separate variables, so that front and back stay in registers
    settle_ties(constants.params, blocks, kept);
    front = kept[0];
    back = kept[1];
  }
  const Streams<T> group = group_streams(at, blocks);
  write_half_group<operation>(group, front, scale);
  write_half_group<operation>(group + kGroup / 2, back, scale);
}

// The same for several groups, one after the other.
template <Operation operation, typename Word, typename T, typename Blocks, typename Compute>
inline void apply_words(const Streams<T>& at, const Blocks& blocks, const PhiloxWords<Pair<Word>>& words,
                        const CallConstants& constants, Compute scale) {
  const auto& w = words.w;
  constexpr int kHalf = WordTraits<Word>::kGroups;
  apply_words<operation>(at, blocks, PhiloxWords<Word>{{w[0].a, w[1].a, w[2].a, w[3].a}}, constants, scale);
  apply_words<operation>(at + kHalf * kGroup, blocks.from(kHalf * kLanes),
                         PhiloxWords<Word>{{w[0].b, w[1].b, w[2].b, w[3].b}}, constants, scale);
}

// Draws and applies the mask of as many groups as Word holds. Reads and writes whole groups at `at`.
template <Operation operation, typename Word, typename T, typename Blocks, typename Compute>
inline void draw_and_apply(const Streams<T>& at, const Blocks& blocks, const CallConstants& constants, Compute scale) {
  const Word* type = nullptr;
  const PhiloxWords<Word> counter = {{WordTraits<Word>::broadcast(constants.offset[0]),
                                      WordTraits<Word>::broadcast(constants.offset[1]), lower(blocks, type),
                                      upper(blocks, type)}};
  apply_words<operation>(at, blocks, philox(counter, constants.keys), constants, scale);
}

// A copy of n elements, in buffers of `size` elements, from element `skip` on. The kernels work on whole groups, and
// must not read or write memory outside the caller's tensors.
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

// Draws and applies the mask of n elements of one group, from element `skip` on.
template <Operation operation, typename T, typename Compute>
inline void drop_part(const Streams<T>& at, const Consecutive& blocks, int64_t skip, int64_t n,
                      const CallConstants& constants, Compute scale) {
  Buffer<operation, T, kGroup> buffer(at, skip, n);
  draw_and_apply<operation, Lanes>(buffer.streams(), blocks, constants, scale);
  std::memcpy(at.y, buffer.x + skip, n * sizeof(T));
}

// TypedKernels::drop. If index is not the first of a block, the first group is partial. Whole groups are read and
// written directly; partial groups at both ends go through a Buffer.
template <Operation operation, typename T, typename Compute>
FUSED_DROPOUT_KERNEL void drop(const Streams<T>& all, uint64_t index, int64_t n, const MaskParams& params) {
  // The number of indices whose block numbers have equal upper halves.
  constexpr uint64_t kReach = (uint64_t{1} << 32) * kBlock;
  const int64_t reach = static_cast<int64_t>(kReach - index % kReach);
  if (n > reach) {
    drop<operation, T, Compute>(all + reach, index + reach, n - reach, params);
    n = reach;
  }
  constexpr int kGroups = WordTraits<FourGroups>::kGroups;
  const CallConstants constants(params);
  const Compute scale = static_cast<Compute>(params.scale);
  const Lanes upper_half = all_lanes(static_cast<uint32_t>(index / kReach));
  Consecutive blocks{index / kBlock, upper_half};
  const Streams<T> at = all;  // a local copy: the compiler then knows that no store changes the pointers
  int64_t i = 0;
  if (const int64_t skip = index % kBlock) {
    i = n < kGroup - skip ? n : kGroup - skip;
    drop_part<operation>(at, blocks, skip, i, constants, scale);
    blocks.first += kLanes;
  }
  for (; n - i >= kGroups * kGroup; i += kGroups * kGroup, blocks.first += kGroups * kLanes) {
    draw_and_apply<operation, FourGroups>(at + i, blocks, constants, scale);
  }
  for (; n - i >= kGroup; i += kGroup, blocks.first += kLanes) {
    draw_and_apply<operation, Lanes>(at + i, blocks, constants, scale);
  }
  if (i < n) drop_part<operation>(at + i, blocks, 0, n - i, constants, scale);
}

// TypedKernels::drop_groups.
template <Operation operation, typename T, typename Compute>
FUSED_DROPOUT_KERNEL void drop_groups(const Group<T>* groups, int64_t n, const MaskParams& params) {
  constexpr int kAtOnce = WordTraits<FourGroups>::kGroups;
  const CallConstants constants(params);
  const Compute scale = static_cast<Compute>(params.scale);
  const Streams<T> unused{};  // each Group has its own addresses
  for (; n >= kAtOnce; n -= kAtOnce, groups += kAtOnce) {
    draw_and_apply<operation, FourGroups>(unused, Grouped<T>{groups}, constants, scale);
  }
  for (; n > 0; --n, ++groups) draw_and_apply<operation, Lanes>(unused, Grouped<T>{groups}, constants, scale);
}

// CpuKernels::draw_flags.
FUSED_DROPOUT_KERNEL void draw_flags(const uint64_t* blocks, uint16_t* flags, int64_t n, const MaskParams& params) {
  static_assert(kBlockPadding % kLanes == 0, "the last group has to lie within the padding");
  constexpr int kAtOnce = WordTraits<FourGroups>::kGroups * kLanes;
  const CallConstants constants(params);
  const Streams<uint16_t> at{flags, flags, flags, flags};
  int64_t i = 0;
  for (; n - i >= kAtOnce; i += kAtOnce) {
    draw_and_apply<Operation::kDrop, FourGroups>(at + i * kBlock, Listed{blocks + i}, constants, 1.0f);
  }
  for (; i < n; i += kLanes) {
    draw_and_apply<Operation::kDrop, Lanes>(at + i * kBlock, Listed{blocks + i}, constants, 1.0f);
  }
}

// TypedKernels::select.
template <Operation operation, typename T, typename Compute>
FUSED_DROPOUT_KERNEL void select(const Streams<T>& all, const uint16_t* flags, int64_t n, double scale) {
  constexpr int kAtOnce = kGroup / 2;
  const Compute s = static_cast<Compute>(scale);
  const Streams<T> at = all;  // a local copy, as in drop
  int64_t i = 0;
  if (flags) {
    for (; n - i >= kAtOnce; i += kAtOnce) write_half_group<operation>(at + i, kept_of(flags + i), s);
    if (i == n) return;
  }
  uint16_t last[kAtOnce];
  std::fill_n(last, kAtOnce, 0xFFFF);
  if (!flags) {
    const Kept kept = kept_of(last);
    for (; n - i >= kAtOnce; i += kAtOnce) write_half_group<operation>(at + i, kept, s);
    if (i == n) return;
  }
  if (flags) std::memcpy(last, flags + i, (n - i) * sizeof(uint16_t));
  Buffer<operation, T, kAtOnce> buffer(at + i, 0, n - i);
  write_half_group<operation>(buffer.streams(), kept_of(last), s);
  std::memcpy(at.y + i, buffer.x, (n - i) * sizeof(T));
}

}  // namespace
}  // namespace fused_dropout
