// The functions by which a warp loads, drops and stores a chunk of 256 elements; the kernels of cuda_kernels.cuh call
// them. Whole chunks are moved in the widest vectors, other chunks in accesses of any width. Neighbouring lanes move
// neighbouring vectors, so that a request of the warp touches only whole sectors of memory.
#pragma once

#include "simd/kernels.h"

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

namespace fused_dropout {
namespace {

// Hides from the compiler how a value was computed. The value then stays in a register. Without this, the compiler
// would compute it again in each pass of a loop.
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

constexpr int kWarp = 32;               // lanes
constexpr int kChunk = kWarp * kBlock;  // elements: what a warp moves at once

// The widest access, in bytes. Blackwell and later GPUs have accesses of 32 bytes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && CUDART_VERSION >= 13000
constexpr int kWidestAccess = 32;
#else
constexpr int kWidestAccess = 16;
#endif

// The integer or vector type of an access of so many bytes.
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

// Stores a vector by one instruction. nvcc splits some vector stores into several.
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

// The bytes of the widest vector, which is at most a block, and the number of such vectors in a block. That is also the
// number of vectors that each lane moves in a chunk.
template <typename T>
constexpr int kVectorBytes = kBlock * sizeof(T) < kWidestAccess ? kBlock * sizeof(T) : kWidestAccess;
template <typename T>
constexpr int kVectorsOfBlock = kBlock * sizeof(T) / kVectorBytes<T>;

// Returns the value of the warp's first lane. The compiler then knows that all lanes have the same value.
template <typename T>
__device__ __forceinline__ T warp_uniform(T value) {
  return __shfl_sync(~0u, value, 0);
}

// The random words for the n vectors that a lane moves in a chunk. Its vector j is vector j * kWarp + lane of the
// chunk, and uses the words from number j * 4 / n on. block_xor[j] is the XOR of the four words of its block, for the
// ties.
template <int n>
struct LaneWords {
  Words words;
  uint32_t block_xor[n];
};

// The number, within a chunk, of the block that a lane draws. n neighbouring lanes move the vectors of the same n
// blocks, and each lane draws one of them.
template <int n>
__device__ __forceinline__ int drawn_block(int lane) {
  return lane / n + kWarp / n * (lane % n);
}

// Exchanges the drawn words among n neighbouring lanes, so that each lane has the words for its own vectors. For n = 4,
// word i of lane j becomes word j of lane i. For n = 2 the same happens with pairs of words.
template <int n>
__device__ __forceinline__ LaneWords<n> exchange(Words words, int lane) {
  LaneWords<n> mine;
#pragma unroll
  for (int j = 0; j < n; ++j) mine.block_xor[j] = n == 1 ? xor_of(words) : __shfl_sync(~0u, xor_of(words), j, n);
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

// One vector of each tensor that an operation reads.
template <typename Op, typename V>
struct Loaded {
  V x{}, residual{}, bias{};

  // Loads the vectors. `at` has their positions, in elements from the addresses of `streams`.
  template <typename T, typename Access>
  __device__ __forceinline__ void load(const Streams<T>& streams, const Access& at) {
    if constexpr (Op::kReads) x = *reinterpret_cast<const V*>(streams.x + at.x);
    if constexpr (Op::kReadsResidual) residual = *reinterpret_cast<const V*>(streams.residual + at.residual);
    if constexpr (Op::kReadsBias) bias = *reinterpret_cast<const V*>(streams.bias + at.bias);
  }

  // Returns the results. kept(i) is whether element i is kept.
  template <typename Kept>
  __device__ __forceinline__ V apply(const Op& op, const Kept& kept) const {
    using T = typename Op::Element;
    constexpr int kCount = sizeof(V) / sizeof(T);
    T v[kCount], r[kCount], b[kCount];
    memcpy(v, &x, sizeof(V));
    memcpy(r, &residual, sizeof(V));
    memcpy(b, &bias, sizeof(V));
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = op(kept(i), v[i], r[i], b[i]);
    V result;
    memcpy(&result, v, sizeof(V));
    return result;
  }
};

// The positions of an access in each tensor, in elements. It is skipped if inside is false.
template <typename Index>
struct Access {
  bool inside;
  Index x, y, residual, bias;
};

// Loads, drops and stores whole chunks, in the widest vectors. Loads all vectors before it stores the first one.
//   at     the lane's first vector of the first chunk
//   apart  the distance between chunks, in elements
template <int chunks, typename Op, typename T, int n>
__device__ __forceinline__ void apply_to_chunks(const Streams<T>& at, uint64_t apart,
                                                const LaneWords<n> (&words)[chunks], uint64_t threshold, const Op& op) {
  using V = Vector<kVectorBytes<T>>;
  constexpr int kSlots = kBlock / n;
  Loaded<Op, V> vectors[chunks][n];
#pragma unroll
  for (int i = 0; i < chunks * n; ++i) {
    const uint64_t place = i / n * apart + i % n * kWarp * kSlots;
    vectors[i / n][i % n].load(at, Access<uint64_t>{true, place, place, place, place});
  }
#pragma unroll
  for (int i = 0; i < chunks * n; ++i) {
    const LaneWords<n>& mine = words[i / n];
    const int j = i % n;
    const V result = vectors[i / n][j].apply(op, [&](int slot) {
      const uint32_t word = mine.words.w[(j * kSlots + slot) / 2];
      return keep(draw_of(word, slot), mine.block_xor[j] ^ word, threshold);
    });
    store(reinterpret_cast<V*>(at.y + i / n * apart) + j * kWarp, result);
  }
}

// Calls f with the widest access, in bytes, that the address allows, between `least` and `bytes`. For several
// addresses, pass their OR.
template <int bytes, int least, typename F>
__device__ __forceinline__ void with_access(uintptr_t address, const F& f) {
  if constexpr (bytes > least) {
    if (address % bytes != 0) return with_access<bytes / 2, least>(address, f);
  }
  f(std::integral_constant<int, bytes>{});
}

// Loads, drops and stores one chunk, in accesses of `bytes` bytes. Loads all before it stores the first one, because x
// may be y. All lanes of the warp must call it.
//   first, step  the lane's accesses begin at elements first, first + step, ... of the chunk
//   kept         bit i is whether element 8 * lane + i of the chunk is kept
//   where        where(element) returns the positions of an access as an Access
template <int bytes, typename Op, typename T, typename Where>
__device__ __forceinline__ void move_chunk(const Streams<T>& streams, uint32_t first, uint32_t step, uint32_t kept,
                                           const Op& op, const Where& where) {
  keep_in_register(first);  // otherwise the compiler keeps values computed from it in registers across chunks
  using V = Vector<bytes>;
  constexpr int kElements = bytes / sizeof(T), kMoves = kBlock / kElements;
  decltype(where(0)) places[kMoves];
  Loaded<Op, V> vectors[kMoves];
#pragma unroll
  for (int i = 0; i < kMoves; ++i) {
    places[i] = where(static_cast<int>(first + i * step));
    if (places[i].inside) vectors[i].load(streams, places[i]);
  }
#pragma unroll
  for (int i = 0; i < kMoves; ++i) {
    const uint32_t element = first + i * step;
    const uint32_t bits = __shfl_sync(~0u, kept, element / kBlock) >> element % kBlock;
    const V result = vectors[i].apply(op, [&](int e) { return bits >> e & 1; });
    if (places[i].inside) store(reinterpret_cast<V*>(streams.y + places[i].y), result);
  }
}

}  // namespace
}  // namespace fused_dropout
