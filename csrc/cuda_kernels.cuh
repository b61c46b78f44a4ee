// The CUDA kernels: one for rows, in which a thread draws a block and moves its eight elements, and one for any window,
// in which a thread takes eight elements and draws the blocks that decide on them.
#pragma once

#include "operators.h"

#include <type_traits>

namespace fused_dropout {
namespace {

constexpr int kThreads = 256;

// By value where the host knows it, else read from the device's memory: no call waits for the GPU.
struct KeySource {
  Key value;
  const Key* on_device;
};

__device__ __forceinline__ Key key_of(const KeySource& source) {
  return source.on_device ? *source.on_device : source.value;
}

template <typename T, typename Compute>
struct DropOrScale {
  using Element = T;
  static constexpr bool kReads = true;
  Compute scale;
  __device__ T operator()(bool kept, T x) const { return drop_or_scale(kept, x, scale); }
};

struct WriteMask {
  using Element = bool;
  static constexpr bool kReads = false;
  __device__ bool operator()(bool kept, bool) const { return kept; }
};

// Hides how a value came about: it then stays in a register, where the compiler would compute it anew in each pass.
__device__ __forceinline__ void keep_in_register(uint32_t& value) {
  asm volatile("" : "+r"(value));
}
__device__ __forceinline__ void keep_in_register(uint64_t& value) {
  asm volatile("" : "+l"(value));
}
template <typename T>
__device__ __forceinline__ void keep_in_register(T*& pointer) {
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
}

struct RoundKeys {
  uint32_t k[kPhiloxRounds][2];
};

__device__ __forceinline__ RoundKeys round_keys(Key key) {
  RoundKeys keys;
#pragma unroll
  for (int i = 0; i < 2 * kPhiloxRounds; ++i) {
    keys.k[i / 2][i % 2] = round_key(philox_key(key), i / 2, i % 2);
    keep_in_register(keys.k[i / 2][i % 2]);
  }
  return keys;
}

__device__ __forceinline__ uint32_t round_key(const RoundKeys& keys, int round, int i) {
  return keys.k[round][i];
}

template <typename Block>
__device__ __forceinline__ Words words_of(const Key& key, const RoundKeys& keys, Block block) {
  return philox(block_counter(key, block), keys);
}

// A block moves in vectors of 16 bytes (a mask's has no more than 8).
template <typename T>
using Vector = std::conditional_t<sizeof(T) == 1, uint2, uint4>;

// n blocks, as far apart in memory: all are loaded before the first is drawn.
template <int n, typename Op, typename T>
__device__ __forceinline__ void apply_to_blocks(const T* x, T* y, uint64_t apart, const Words (&words)[n],
                                                uint64_t threshold, const Op& op) {
  constexpr int kVectors = kBlock * sizeof(T) / sizeof(Vector<T>);
  Vector<T> vectors[n][kVectors];
  if constexpr (Op::kReads) {
#pragma unroll
    for (int i = 0; i < n * kVectors; ++i) {
      vectors[i / kVectors][i % kVectors] = reinterpret_cast<const Vector<T>*>(x + i / kVectors * apart)[i % kVectors];
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    T v[kBlock] = {};
    if constexpr (Op::kReads) memcpy(v, vectors[i], sizeof(v));
#pragma unroll
    for (int slot = 0; slot < kBlock; ++slot) v[slot] = op(keep(words[i], slot, threshold), v[slot]);
    memcpy(vectors[i], v, sizeof(v));
#pragma unroll
    for (int j = 0; j < kVectors; ++j) reinterpret_cast<Vector<T>*>(y + i * apart)[j] = vectors[i][j];
  }
}

// Only the block's slots from begin to end, one by one.
template <typename Op, typename T>
__device__ __forceinline__ void apply_to_slots(const T* x, T* y, int64_t begin, int64_t end, const Words& words,
                                               uint64_t threshold, const Op& op) {
#pragma unroll
  for (int slot = 0; slot < kBlock; ++slot) {
    if (slot < begin || slot >= end) continue;
    T value{};
    if constexpr (Op::kReads) value = x[slot];
    y[slot] = op(keep(words, slot, threshold), value);
  }
}

// Threads along x walk over the blocks of a row, threads along y over the rows. Block, the type of a block's number,
// has 64 bits for the largest tensors only.
template <typename Op, typename Block>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const typename Op::Element* x, typename Op::Element* y, Rows rows, uint64_t start, KeySource source,
                   uint64_t threshold, Op op) {
  using T = typename Op::Element;
  const Key key = key_of(source);
  const RoundKeys keys = round_keys(key);
  const Block lane = blockIdx.x * static_cast<Block>(blockDim.x) + threadIdx.x;
  Block stride = gridDim.x * static_cast<Block>(blockDim.x);
  keep_in_register(stride);
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows.count; row += gridDim.y * blockDim.y) {
    // Counted from the beginning of its first block, the row goes from head to end.
    const uint64_t row_start = start + row * rows.index;
    const int64_t head = row_start % kBlock, end = head + rows.length;
    const Block first_block = static_cast<Block>(row_start / kBlock);
    const T* from = nullptr;
    T* to = y + row * rows.y - head;
    keep_in_register(to);
    if constexpr (Op::kReads) {
      from = x + row * rows.x - head;
      keep_in_register(from);
    }

    // The blocks that are in it as a whole, if the pointers allow vectors.
    const bool aligned = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % sizeof(Vector<T>) == 0;
    const Block blocks = static_cast<Block>((end + kBlock - 1) / kBlock);
    const Block whole_begin = head ? 1 : 0, whole_end = aligned ? static_cast<Block>(end / kBlock) : 0;
    Block block = whole_begin + lane;
    for (; stride < whole_end && block < whole_end - stride; block += 2 * stride) {
      const uint64_t at = static_cast<uint64_t>(block) * kBlock;
      const Words words[] = {words_of(key, keys, first_block + block),
                             words_of(key, keys, first_block + block + stride)};
      apply_to_blocks(from + at, to + at, static_cast<uint64_t>(stride) * kBlock, words, threshold, op);
    }
    if (block < whole_end) {
      const uint64_t at = static_cast<uint64_t>(block) * kBlock;
      const Words words[] = {words_of(key, keys, first_block + block)};
      apply_to_blocks(from + at, to + at, 0, words, threshold, op);
    }

    // What is left at both ends, or all of it.
    const Block whole = whole_end > whole_begin ? whole_end - whole_begin : 0;
    for (Block i = lane; i < blocks - whole; i += stride) {
      const Block block = i < whole_begin ? i : i + whole;
      const int64_t at = static_cast<int64_t>(block) * kBlock;
      apply_to_slots(from + at, to + at, head - at, end - at, words_of(key, keys, first_block + block), threshold, op);
    }
  }
}

// A size that is divided by: position / size is the upper half of position * magic, shifted. Exact for all positions
// below half the type's range.
template <typename Index>
struct WindowDim {
  Index size, magic, x, y, index;
  int shift;
};

// The dimensions of a window. All have two elements or more, so that no tensor has more of them.
template <typename Index>
struct Window {
  int count;
  WindowDim<Index> dims[sizeof(Index) * 8 - 1];
};

__device__ __forceinline__ uint32_t upper_half(uint32_t a, uint32_t b) {
  return __umulhi(a, b);
}
__device__ __forceinline__ uint64_t upper_half(uint64_t a, uint64_t b) {
  return __umul64hi(a, b);
}

// Where an element is in x, in y and among the indices, and how many more follow it along the innermost dimension,
// itself included.
template <typename Index>
struct Place {
  Index x, y, index, left;
};

template <typename Index>
__device__ __forceinline__ Place<Index> place_at(const Window<Index>& window, Index position) {
  Place<Index> place{};
#pragma unroll 1  // inlined often, and mostly of one pass or two
  for (int d = 0; d < window.count; ++d) {
    const WindowDim<Index>& dim = window.dims[d];
    const Index rest = upper_half(position, dim.magic) >> dim.shift, at = position - rest * dim.size;
    if (d == 0) place.left = dim.size - at;
    place.x += at * dim.x;
    place.y += at * dim.y;
    place.index += at * dim.index;
    position = rest;
  }
  return place;
}

// Calls visit(i, place) for the n elements from a position on, eight at most.
template <typename Index, typename Visit>
__device__ __forceinline__ void visit_places(const Window<Index>& window, Index position, Place<Index> place, int n,
                                             const Visit& visit) {
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    if (i >= n) break;
    visit(i, place);
    if (place.left == 1) {
      if (i + 1 < n) place = place_at(window, position + i + 1);
    } else {
      --place.left;
      place.x += window.dims[0].x;
      place.y += window.dims[0].y;
    }
  }
}

// Bit i says whether element i of the n from a position on is kept. Neighbours in one block are decided by one draw.
template <typename Index>
__device__ __forceinline__ uint32_t kept_bits(const Window<Index>& window, Index position, Place<Index> place, int n,
                                              Index start, const Key& key, const RoundKeys& keys, uint64_t threshold) {
  const Index stride = window.dims[0].index;
  uint32_t bits = 0;
  Words words{};
  Index drawn = ~Index{0};  // no block has this number
  for (int i = 0;;) {
    const Index index = start + place.index, block = index / kBlock;
    const int slot = static_cast<int>(index % kBlock);
    if (block != drawn) words = words_of(key, keys, drawn = block);
    // The elements from here on that are decided by what was drawn, if the index has stride 0 or 1.
    uint32_t kept = 0;
    int decided = 1;
    if (stride == 1) {
#pragma unroll
      for (int s = 0; s < kBlock; ++s) kept |= static_cast<uint32_t>(keep(words, s, threshold)) << s;
      kept >>= slot;
      decided = kBlock - slot;
    } else {
      kept = keep(words, slot, threshold) ? 0xFF : 0;
      if (stride == 0) decided = kBlock;
    }
    if (place.left < decided) decided = static_cast<int>(place.left);
    bits |= (kept & ((1u << decided) - 1)) << i;
    i += decided;
    if (i >= n) return bits;
    place = place_at(window, position + i);
  }
}

// Any window. A thread takes eight elements that follow each other in the order of the dimensions, whether they lie
// together or not, and draws the blocks that decide on them: mostly one.
template <typename Op, typename Index>
__global__ void __launch_bounds__(kThreads)
    window_kernel(const typename Op::Element* x, typename Op::Element* y, Index numel, Window<Index> window,
                  Index start, bool x_vectors, bool y_vectors, KeySource source, uint64_t threshold, Op op) {
  using T = typename Op::Element;
  constexpr int kVectors = kBlock * sizeof(T) / sizeof(Vector<T>);
  const Key key = key_of(source);
  const RoundKeys keys = round_keys(key);
  const Index stride = gridDim.x * static_cast<Index>(kThreads) * kBlock;
  for (Index at = (blockIdx.x * static_cast<Index>(kThreads) + threadIdx.x) * kBlock; at < numel; at += stride) {
    const int n = numel - at < kBlock ? static_cast<int>(numel - at) : kBlock;
    const Place<Index> first = place_at(window, at);
    Vector<T> vectors[kVectors];
    T v[kBlock] = {};
    if constexpr (Op::kReads) {
      if (x_vectors && n == kBlock) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) vectors[i] = reinterpret_cast<const Vector<T>*>(x + first.x)[i];
        memcpy(v, vectors, sizeof(v));
      } else {
        visit_places(window, at, first, n, [&](int i, const Place<Index>& place) { v[i] = x[place.x]; });
      }
    }
    const uint32_t kept = kept_bits(window, at, first, n, start, key, keys, threshold);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) v[i] = op(kept >> i & 1, v[i]);
    if (y_vectors && n == kBlock) {
      memcpy(vectors, v, sizeof(v));
#pragma unroll
      for (int i = 0; i < kVectors; ++i) reinterpret_cast<Vector<T>*>(y + first.y)[i] = vectors[i];
    } else {
      visit_places(window, at, first, n, [&](int i, const Place<Index>& place) { y[place.y] = v[i]; });
    }
  }
}

}  // namespace
}  // namespace fused_dropout
