// The CUDA kernels: one for rows of whole warps, in which each lane draws a block, and one for any window, in which
// each lane draws the blocks that decide on eight elements. Both move a chunk of 256 elements a warp, in accesses that
// neighbouring lanes make side by side.
#pragma once

#include "operators.h"

#include <type_traits>

namespace fused_dropout {
namespace {

constexpr int kThreads = 256;

// Thread blocks that a multiprocessor has to be able to hold. This limits the registers of a thread to 40 on Ampere and
// Hopper. Elsewhere so few would not do.
#if defined(__CUDA_ARCH__) && 800 <= __CUDA_ARCH__ && __CUDA_ARCH__ < 1000
constexpr int kResident = 6;
#else
constexpr int kResident = 4;
#endif

// Where the key comes from. No call waits for the GPU.
struct KeySource {
  Key value;             // where the host knows the key
  const Key* on_device;  // else where to read it
  Key* drawn;            // else where to store what is drawn, for backward
  CapturedGenerator generator;
};

__device__ __forceinline__ Key draw_key(const CapturedGenerator& generator, uint64_t i) {
  return {*reinterpret_cast<const uint64_t*>(generator.seed),
          (*reinterpret_cast<const uint64_t*>(generator.offset) + generator.intragraph) / 4 + i};
}

__device__ __forceinline__ Key key_of(const KeySource& source) {
  if (source.on_device) return *source.on_device;
  return source.drawn ? draw_key(source.generator, 0) : source.value;
}

// At the end of a kernel, where no shuffle waits for the one thread that does it.
__device__ __forceinline__ void store_drawn_key(const KeySource& source) {
  if (source.drawn && blockIdx.x + blockIdx.y + threadIdx.x + threadIdx.y == 0) {
    *source.drawn = draw_key(source.generator, 0);
  }
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

constexpr int kWarp = 32;
constexpr int kChunk = kWarp * kBlock;  // the elements that a warp takes at once

// The widest access: 32 bytes from Blackwell on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && CUDART_VERSION >= 13000
constexpr int kWidestAccess = 32;
#else
constexpr int kWidestAccess = 16;
#endif

template <int bytes>
struct VectorOf;
template <>
struct VectorOf<1> {
  using type = uint8_t;
};
template <>
struct VectorOf<2> {
  using type = uint16_t;
};
template <>
struct VectorOf<4> {
  using type = uint32_t;
};
template <>
struct VectorOf<8> {
  using type = uint2;
};
template <>
struct VectorOf<16> {
  using type = uint4;
};
#if CUDART_VERSION >= 13000
template <>
struct VectorOf<32> {
  using type = ulonglong4_32a;
};
#endif
template <int bytes>
using Vector = typename VectorOf<bytes>::type;

// In one instruction: nvcc splits some stores of vectors.
template <typename V>
__device__ __forceinline__ void store(V* at, V vector) {
  *at = vector;
}
__device__ __forceinline__ void store(uint2* at, uint2 v) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store(uint4* at, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
#if CUDART_VERSION >= 13000
__device__ __forceinline__ void store(ulonglong4_32a* at, ulonglong4_32a v) {
  asm volatile("st.global.v4.b64 [%0], {%1, %2, %3, %4};" ::"l"(at), "l"(v.x), "l"(v.y), "l"(v.z), "l"(v.w) : "memory");
}
#endif

// A block has at least one vector. The widest vectors of a chunk are as many for each lane as a block has, because
// neighbouring lanes have to move neighbouring vectors: a request of the warp then touches whole sectors of memory
// only.
template <typename T>
constexpr int kVectorBytes = kBlock * sizeof(T) < kWidestAccess ? kBlock * sizeof(T) : kWidestAccess;
template <typename T>
constexpr int kVectorsOfBlock = kBlock * sizeof(T) / kVectorBytes<T>;

// The value of the warp's first lane. The compiler then knows that all lanes have the same.
template <typename T>
__device__ __forceinline__ T uniform(T value) {
  return __shfl_sync(~0u, value, 0);
}

// What decides on the vectors that a lane moves in a chunk. Its vector number j, which is the chunk's vector
// j * kWarp + lane, has the words from j * 4 / n on; all[j] is the XOR of that block's four words.
template <int n>
struct LaneWords {
  Words words;
  uint32_t all[n];
};

// The block of a chunk that a lane draws. n neighbouring lanes move vectors of the same n blocks: each draws one.
template <int n>
__device__ __forceinline__ int drawn_block(int lane) {
  return lane / n + kWarp / n * (lane % n);
}

// Among n neighbouring lanes, word i of lane j goes to lane i and becomes its word j (n = 4; pairs of words for n = 2).
template <int n>
__device__ __forceinline__ LaneWords<n> exchange(Words words, int lane) {
  LaneWords<n> mine;
#pragma unroll
  for (int j = 0; j < n; ++j) mine.all[j] = n == 1 ? xor_of(words) : __shfl_sync(~0u, xor_of(words), j, n);
#pragma unroll
  for (int bit = 1; bit < n; bit *= 2) {
    const int apart = bit * 4 / n;
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & apart) continue;
      uint32_t &low = words.w[i], &high = words.w[i + apart];
      const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, bit);
      low = upper ? other : low;
      high = upper ? high : other;
    }
  }
  mine.words = words;
  return mine;
}

// Whole chunks that are as far apart in memory, at this lane's first vector: all are loaded before the first is stored.
template <int chunks, typename Op, typename T, int n>
__device__ __forceinline__ void apply_to_chunks(const T* x, T* y, uint64_t apart, const LaneWords<n> (&words)[chunks],
                                                uint64_t threshold, const Op& op) {
  using V = Vector<kVectorBytes<T>>;
  constexpr int kSlots = kBlock / n;
  V vectors[chunks][n];
  if constexpr (Op::kReads) {
#pragma unroll
    for (int i = 0; i < chunks * n; ++i) {
      vectors[i / n][i % n] = reinterpret_cast<const V*>(x + i / n * apart)[i % n * kWarp];
    }
  }
#pragma unroll
  for (int i = 0; i < chunks * n; ++i) {
    const LaneWords<n>& mine = words[i / n];
    const int j = i % n;
    T v[kSlots] = {};
    if constexpr (Op::kReads) memcpy(v, &vectors[i / n][j], sizeof(v));
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const uint32_t word = mine.words.w[(j * kSlots + slot) / 2];
      v[slot] = op(keep(draw_of(word, slot), mine.all[j] ^ word, threshold), v[slot]);
    }
    memcpy(&vectors[i / n][j], v, sizeof(v));
    store(reinterpret_cast<V*>(y + i / n * apart) + j * kWarp, vectors[i / n][j]);
  }
}

// Calls f with the widest access from `bytes` down to `least` that the address, or the OR of several, allows.
template <int bytes, int least, typename F>
__device__ __forceinline__ void with_access(uintptr_t address, const F& f) {
  if constexpr (bytes > least) {
    if (address % bytes != 0) return with_access<bytes / 2, least>(address, f);
  }
  f(std::integral_constant<int, bytes>{});
}

// Where an element of a chunk is in x and in y, if it is to be moved.
template <typename Index>
struct Moved {
  bool inside;
  Index x, y;
};

// A chunk in accesses of any width. A lane's accesses begin at the chunk's element `first` and then every `step`; those
// of neighbouring lanes lie side by side. Bit i of kept decides on element i of the lane's eight. where(element) says
// where an access begins. x may be y: all is loaded before the first is stored.
template <int bytes, typename Op, typename T, typename Where>
__device__ __forceinline__ void move_chunk(const T* x, T* y, uint32_t first, uint32_t step, uint32_t kept, const Op& op,
                                           const Where& where) {
  keep_in_register(first);  // else much that follows from it would be kept in registers from one chunk to the next
  using V = Vector<bytes>;
  constexpr int kElements = bytes / sizeof(T), kMoves = kBlock / kElements;
  decltype(where(0)) places[kMoves];
  V vectors[kMoves] = {};
#pragma unroll
  for (int i = 0; i < kMoves; ++i) {
    places[i] = where(static_cast<int>(first + i * step));
    if constexpr (Op::kReads) {
      if (places[i].inside) vectors[i] = *reinterpret_cast<const V*>(x + places[i].x);
    }
  }
#pragma unroll
  for (int i = 0; i < kMoves; ++i) {
    const uint32_t element = first + i * step;
    const uint32_t bits = __shfl_sync(~0u, kept, element / kBlock) >> element % kBlock;
    T v[kElements] = {};
    if constexpr (Op::kReads) memcpy(v, &vectors[i], sizeof(v));
#pragma unroll
    for (int e = 0; e < kElements; ++e) v[e] = op(bits >> e & 1, v[e]);
    memcpy(&vectors[i], v, sizeof(v));
    if (places[i].inside) store(reinterpret_cast<V*>(y + places[i].y), vectors[i]);
  }
}

// Bit i says whether the element in slot i is kept.
__device__ __forceinline__ uint32_t keep_bits(const Words& words, uint64_t threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int slot = 0; slot < kBlock; ++slot) bits |= static_cast<uint32_t>(keep(words, slot, threshold)) << slot;
  return bits;
}

// Warps along x walk over the chunks of a row, warps along y over the rows. Block, the type of a block's number, has 64
// bits for the largest tensors only.
template <typename Op, typename Block>
__global__ void __launch_bounds__(kThreads, kResident)
    dropout_kernel(const typename Op::Element* x, typename Op::Element* y, Rows rows, uint64_t start, KeySource source,
                   uint64_t threshold, Op op) {
  using T = typename Op::Element;
  constexpr int n = kVectorsOfBlock<T>, kInFlight = sizeof(T) == 8 ? 1 : 2;
  const Key key = key_of(source);
  const RoundKeys keys = round_keys(key);
  const int lane = threadIdx.x % kWarp, drawn = drawn_block<n>(lane);
  const Block first = uniform((blockIdx.x * static_cast<Block>(blockDim.x) + threadIdx.x) / kWarp);
  const Block stride = gridDim.x * static_cast<Block>(blockDim.x) / kWarp;
  for (int64_t row = uniform(blockIdx.y * blockDim.y + threadIdx.y); row < rows.count; row += gridDim.y * blockDim.y) {
    // Counted from the beginning of its first block, the row goes from head to end.
    const uint64_t row_start = start + row * rows.index;
    const int64_t head = row_start % kBlock, end = head + rows.length;
    const Block first_block = static_cast<Block>(row_start / kBlock);
    const T* from = Op::kReads ? x + row * rows.x - head : nullptr;
    T* to = y + row * rows.y - head;

    // The chunks that are in it as a whole, if the pointers allow vectors.
    const uintptr_t address = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
    const Block chunks = static_cast<Block>((end + kChunk - 1) / kChunk);
    const Block whole_begin = head ? 1 : 0;
    const Block whole_end = address % kVectorBytes<T> == 0 ? static_cast<Block>(end / kChunk) : 0;
    Block chunk = whole_begin + first;
    const T* lane_from = Op::kReads ? from + lane * (kVectorBytes<T> / sizeof(T)) : nullptr;
    T* lane_to = to + lane * (kVectorBytes<T> / sizeof(T));
    if constexpr (Op::kReads) keep_in_register(lane_from);
    keep_in_register(lane_to);
    const auto move_whole = [&](auto count) {
      constexpr int kCount = count;
      const uint64_t at = static_cast<uint64_t>(chunk) * kChunk;
      LaneWords<n> words[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        words[i] = exchange<n>(words_of(key, keys, first_block + (chunk + i * stride) * kWarp + drawn), lane);
      }
      apply_to_chunks(lane_from + at, lane_to + at, static_cast<uint64_t>(stride) * kChunk, words, threshold, op);
      chunk += kCount * stride;
    };
    while ((kInFlight - 1) * stride < whole_end && chunk < whole_end - (kInFlight - 1) * stride) {
      move_whole(std::integral_constant<int, kInFlight>{});
    }
    if (kInFlight > 1 && chunk < whole_end) move_whole(std::integral_constant<int, 1>{});

    // What is left at both ends, or all of it.
    const Block whole = whole_end > whole_begin ? whole_end - whole_begin : 0;
    for (Block i = first; i < chunks - whole; i += stride) {
      const Block chunk = i < whole_begin ? i : i + whole;
      const int64_t at = static_cast<int64_t>(chunk) * kChunk;
      const int begin = head > at ? static_cast<int>(head - at) : 0;
      const int stop = end - at < kChunk ? static_cast<int>(end - at) : kChunk;
      const uint32_t kept = keep_bits(words_of(key, keys, first_block + chunk * kWarp + lane), threshold);
      with_access<kVectorBytes<T>, sizeof(T)>(address | (begin | stop) * sizeof(T), [&](auto bytes) {
        constexpr int kElements = bytes / sizeof(T);
        move_chunk<bytes>(from + at, to + at, lane * kElements, kWarp * kElements, kept, op,
                          [&](int i) { return Moved<int>{i >= begin && i < stop, i, i}; });
      });
    }
  }
  store_drawn_key(source);
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
      kept = keep_bits(words, threshold) >> slot;
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

// Accesses of the kernel below where eight elements that follow each other in the order of the dimensions do not lie
// together: neighbouring lanes take neighbouring elements, or each lane takes its own eight.
constexpr int kElementByElement = 0, kEightByEight = -1;

// Any window. A lane draws for eight elements that follow each other in the order of the dimensions: mostly one block.
// access: the bytes of the widest access if such eights lie together in x and in y, or one of the constants above.
template <typename Op, typename Index>
__global__ void __launch_bounds__(kThreads)
    window_kernel(const typename Op::Element* x, typename Op::Element* y, Index numel, Window<Index> window,
                  Index start, int access, KeySource source, uint64_t threshold, Op op) {
  using T = typename Op::Element;
  const Key key = key_of(source);
  const RoundKeys keys = round_keys(key);
  const int lane = threadIdx.x % kWarp;
  const Index first = uniform((blockIdx.x * static_cast<Index>(kThreads) + threadIdx.x) / kWarp);
  const Index stride = gridDim.x * static_cast<Index>(kThreads) * kBlock;
  for (Index chunk = first * kChunk; chunk < numel; chunk += stride) {
    const int left = numel - chunk < kChunk ? static_cast<int>(numel - chunk) : kChunk;
    const Index at = chunk + lane * kBlock;
    Place<Index> eight{};
    uint32_t kept = 0;
    if (lane * kBlock < left) {
      const int n = left - lane * kBlock < kBlock ? left - lane * kBlock : kBlock;
      eight = place_at(window, at);
      kept = kept_bits(window, at, eight, n, start, key, keys, threshold);
    }
    if (access > 0) {
      with_access<kVectorBytes<T>, sizeof(T)>(access | left * sizeof(T), [&](auto bytes) {
        constexpr int kElements = bytes / sizeof(T);
        move_chunk<bytes>(x, y, lane * kElements, kWarp * kElements, kept, op, [&](int i) {
          const Index slot = i % kBlock;
          return Moved<Index>{i < left, __shfl_sync(~0u, eight.x, i / kBlock) + slot,
                              __shfl_sync(~0u, eight.y, i / kBlock) + slot};
        });
      });
    } else {
      const bool own = access == kEightByEight;
      move_chunk<sizeof(T)>(x, y, own ? lane * kBlock : lane, own ? 1 : kWarp, kept, op, [&](int i) {
        const Place<Index> place = place_at(window, chunk + i);
        return Moved<Index>{i < left, place.x, place.y};
      });
    }
  }
  store_drawn_key(source);
}

}  // namespace
}  // namespace fused_dropout
