// The CUDA kernels, which dropout_cuda.cu launches. dropout_kernel serves rows of consecutive indices: each lane draws
// one block of a chunk. window_kernel serves any window: each lane draws the blocks of eight elements.
//
// In both kernels a warp moves a chunk of 256 elements, and neighbouring lanes access neighbouring memory.
#pragma once

#include "cuda_chunks.cuh"
#include "operators.h"

namespace fused_dropout {
namespace {

constexpr int kThreads = 256;  // of a thread block

// The number of thread blocks that a multiprocessor must be able to hold at once, which limits the registers of a
// thread. On Ampere and Hopper the limit is 40 registers for dropout alone; Op::kResidentBlocks sets it for operations
// that do more. On other GPUs the compiler would spill registers with these limits.
template <typename Op>
constexpr int resident_blocks_of() {
  using T = typename Op::Element;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
  return 4;
#elif __CUDA_ARCH__ < 1000
  return Op::kResidentBlocks;
#else
  return (sizeof(T) == 8 ? 3 : 4) - (Op::kResidentBlocks < 6);
#endif
}

// How a kernel gets its key, in one of three ways. No call waits for the GPU.
struct KeySource {
  Key value;                    // the key, if the host knows it and both pointers are null
  const Key* on_device;         // device memory to read the key from, or null
  Key* drawn;                   // device memory to store the key that the kernel draws, for backward, or null
  CapturedGenerator generator;  // the generator to draw from, if `drawn` is set
};

// The i-th key that a captured generator draws from now on.
__device__ __forceinline__ Key draw_key(const CapturedGenerator& generator, uint64_t i) {
  return {*reinterpret_cast<const uint64_t*>(generator.seed),
          (*reinterpret_cast<const uint64_t*>(generator.offset) + generator.intragraph) / 4 + i};
}

__device__ __forceinline__ Key key_of(const KeySource& source) {
  if (source.on_device) return *source.on_device;
  return source.drawn ? draw_key(source.generator, 0) : source.value;
}

// Stores a drawn key, by a single thread. Called at the end of a kernel, because no shuffle of the warp may follow it.
__device__ __forceinline__ void store_drawn_key(const KeySource& source) {
  if (source.drawn && blockIdx.x + blockIdx.y + threadIdx.x + threadIdx.y == 0) {
    *source.drawn = draw_key(source.generator, 0);
  }
}

// The sum of two elements, rounded to their type. The intrinsics keep the compiler from contracting a product and the
// sum into one instruction, which would round once only.
template <typename Compute, typename T>
__device__ __forceinline__ T sum(T a, T b) {
  if constexpr (std::is_same_v<Compute, double>) return __dadd_rn(a, b);
  return static_cast<T>(__fadd_rn(static_cast<float>(a), static_cast<float>(b)));
}

// An operation with dropout. The kernels take its type as Op, and call it for each element.
template <Operation operation, typename T, typename Compute>
struct Drop {
  using Element = T;
  static constexpr bool kReads = true;
  static constexpr bool kReadsResidual = reads_residual(operation), kReadsBias = reads_bias(operation);
  static constexpr int kResidentBlocks = kReadsBias                          ? 3
                                         : kReadsResidual                    ? 4
                                         : operation == Operation::kReluDrop ? 5
                                                                             : 6;
  Compute scale;

  __device__ T operator()(bool kept, T x, T residual, T bias) const {
    if constexpr (kReadsBias) x = sum<Compute>(x, bias);
    if constexpr (operation == Operation::kReluDrop) x = static_cast<Compute>(x) < 0 ? static_cast<T>(Compute{0}) : x;
    x = drop_or_scale(kept, x, scale);
    if constexpr (kReadsResidual) x = sum<Compute>(residual, x);
    return x;
  }
};

// The operation that writes the mask: true where an element is kept.
struct WriteMask {
  using Element = bool;
  static constexpr bool kReads = false, kReadsResidual = false, kReadsBias = false;
  static constexpr int kResidentBlocks = 6;
  __device__ bool operator()(bool kept, bool, bool, bool) const { return kept; }
};

// The Philox keys of all rounds.
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

// The random words of a block.
template <typename Block>
__device__ __forceinline__ Words words_of(const Key& key, const RoundKeys& keys, Block block) {
  return philox(block_counter(key, block), keys);
}

// Bit i is whether the element in slot i of a block is kept.
__device__ __forceinline__ uint32_t keep_bits(const Words& words, uint64_t threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int slot = 0; slot < kBlock; ++slot) bits |= static_cast<uint32_t>(keep(words, slot, threshold)) << slot;
  return bits;
}

// The OR of the addresses that an operation accesses, for their common alignment.
template <typename Op, typename T>
__device__ __forceinline__ uintptr_t address_of(const Streams<T>& at) {
  uintptr_t address = reinterpret_cast<uintptr_t>(at.y);
  if constexpr (Op::kReads) address |= reinterpret_cast<uintptr_t>(at.x);
  if constexpr (Op::kReadsResidual) address |= reinterpret_cast<uintptr_t>(at.residual);
  if constexpr (Op::kReadsBias) address |= reinterpret_cast<uintptr_t>(at.bias);
  return address;
}

// Drops rows of elements with consecutive indices. Along x the warps of the grid share the chunks of a row; along y
// they share the rows. A thread block has kThreads threads; blockDim.x is a multiple of kWarp. The grid may have any
// size.
//   streams    the first element of each tensor. Writes rows.count * rows.length elements of y, which may be x, and
//   reads
//              as many elements of x, residual and bias, if Op reads them
//   rows       the number of rows, their length and their strides, in elements
//   start      the element index of the first element
//   source     where the key comes from. Reads 16 bytes at source.on_device, or writes 16 bytes to source.drawn
//   threshold  of mask.h, 0 to 2^48
//   op         the operation, with its scale
// Block is the type of block numbers: uint32_t if all block numbers are below 2^31, otherwise uint64_t.
template <typename Op, typename Block>
__global__ void __launch_bounds__(kThreads, resident_blocks_of<Op>())
    dropout_kernel(Streams<typename Op::Element> streams, Rows rows, uint64_t start, KeySource source,
                   uint64_t threshold, Op op) {
  using T = typename Op::Element;
  constexpr int n = kVectorsOfBlock<T>, kInFlight = sizeof(T) == 8 ? 1 : 2;
  const Key key = key_of(source);
  const RoundKeys keys = round_keys(key);
  const int lane = threadIdx.x % kWarp, drawn = drawn_block<n>(lane);
  const Block first = warp_uniform((blockIdx.x * static_cast<Block>(blockDim.x) + threadIdx.x) / kWarp);
  const Block stride = gridDim.x * static_cast<Block>(blockDim.x) / kWarp;
  for (int64_t row = warp_uniform(blockIdx.y * blockDim.y + threadIdx.y); row < rows.count;
       row += gridDim.y * blockDim.y) {
    // Positions in a row count from the beginning of its first block. The row goes from head to end.
    const uint64_t row_start = start + row * rows.index;
    const int64_t head = row_start % kBlock, end = head + rows.length;
    const Block first_block = static_cast<Block>(row_start / kBlock);
    const Streams<T> at{streams.x + row * rows.x - head, streams.y + row * rows.y - head,
                        streams.residual + row * rows.residual - head, streams.bias + row * rows.bias - head};

    // The chunks that lie completely in the row, or none if the addresses do not allow the widest vectors.
    const uintptr_t address = address_of<Op>(at);
    const Block chunks = static_cast<Block>((end + kChunk - 1) / kChunk);
    const Block whole_begin = head ? 1 : 0;
    const Block whole_end = address % kVectorBytes<T> == 0 ? static_cast<Block>(end / kChunk) : 0;
    Block chunk = whole_begin + first;
    Streams<T> lane_streams = at + lane * (kVectorBytes<T> / sizeof(T));
    if constexpr (Op::kReads) keep_in_register(lane_streams.x);
    keep_in_register(lane_streams.y);
    if constexpr (Op::kReadsResidual) keep_in_register(lane_streams.residual);
    if constexpr (Op::kReadsBias) keep_in_register(lane_streams.bias);
    const auto move_whole = [&](auto count) {
      constexpr int kCount = count;
      LaneWords<n> words[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        words[i] = exchange<n>(words_of(key, keys, first_block + (chunk + i * stride) * kWarp + drawn), lane);
      }
      apply_to_chunks(lane_streams + static_cast<uint64_t>(chunk) * kChunk, static_cast<uint64_t>(stride) * kChunk,
                      words, threshold, op);
      chunk += kCount * stride;
    };
    while ((kInFlight - 1) * stride < whole_end && chunk < whole_end - (kInFlight - 1) * stride) {
      move_whole(std::integral_constant<int, kInFlight>{});
    }
    if (kInFlight > 1 && chunk < whole_end) move_whole(std::integral_constant<int, 1>{});

    // The other chunks: those at both ends of the row, or all of them.
    const Block whole = whole_end > whole_begin ? whole_end - whole_begin : 0;
    for (Block i = first; i < chunks - whole; i += stride) {
      const Block chunk = i < whole_begin ? i : i + whole;
      const int64_t skipped = static_cast<int64_t>(chunk) * kChunk;
      const int begin = head > skipped ? static_cast<int>(head - skipped) : 0;
      const int stop = end - skipped < kChunk ? static_cast<int>(end - skipped) : kChunk;
      const uint32_t kept = keep_bits(words_of(key, keys, first_block + chunk * kWarp + lane), threshold);
      with_access<kVectorBytes<T>, sizeof(T)>(address | (begin | stop) * sizeof(T), [&](auto bytes) {
        constexpr int kElements = bytes / sizeof(T);
        move_chunk<bytes>(at + skipped, lane * kElements, kWarp * kElements, kept, op,
                          [&](int i) { return Access<int>{i >= begin && i < stop, i, i, i, i}; });
      });
    }
  }
  store_drawn_key(source);
}

// A dimension of a window, in elements, with numbers for a division by its size: position / size is the upper half of
// position * magic, shifted right by `shift`. Exact for all positions below half the range of Index.
template <typename Index>
struct WindowDim {
  Index size, magic, x, y, index, residual, bias;
  int shift;
};

// The dimensions of a window, from the innermost outwards. Each has two elements or more, so a tensor that Index can
// count has no more dimensions than the array.
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

// The position of an element in each tensor and its index relative to start. left: the number of elements from it to
// the end of the innermost dimension, including itself.
template <typename Index>
struct Place {
  Index x, y, index, left, residual, bias;
};

// The Place of the element at a position, which counts the elements in the order of the dimensions.
template <typename Op, typename Index>
__device__ __forceinline__ Place<Index> place_at(const Window<Index>& window, Index position) {
  Place<Index> place{};
#pragma unroll 1  // this function is inlined in many places, and the loop mostly has one or two passes
  for (int d = 0; d < window.count; ++d) {
    const WindowDim<Index>& dim = window.dims[d];
    const Index rest = upper_half(position, dim.magic) >> dim.shift, at = position - rest * dim.size;
    if (d == 0) place.left = dim.size - at;
    place.x += at * dim.x;
    place.y += at * dim.y;
    place.index += at * dim.index;
    if constexpr (Op::kReadsResidual) place.residual += at * dim.residual;
    if constexpr (Op::kReadsBias) place.bias += at * dim.bias;
    position = rest;
  }
  return place;
}

// Bit i is whether element i of the n elements from `position` on is kept. Draws once for neighbours in the same block.
template <typename Op, typename Index>
__device__ __forceinline__ uint32_t kept_bits(const Window<Index>& window, Index position, Place<Index> place, int n,
                                              Index start, const Key& key, const RoundKeys& keys, uint64_t threshold) {
  const Index stride = window.dims[0].index;
  uint32_t bits = 0;
  Words words{};
  Index drawn = ~Index{0};  // not a block number
  for (int i = 0;;) {
    const Index index = start + place.index, block = index / kBlock;
    const int slot = static_cast<int>(index % kBlock);
    if (block != drawn) words = words_of(key, keys, drawn = block);
    // The number of elements from here on that the drawn words decide. It is above 1 if the index stride is 0 or 1.
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
    place = place_at<Op>(window, position + i);
  }
}

// The values of window_kernel's `access` for groups of eight elements that are not adjacent in memory.
// kElementByElement: neighbouring lanes move neighbouring elements. kEightByEight: each lane moves its own eight
// elements.
constexpr int kElementByElement = 0, kEightByEight = -1;

// Drops any window of elements. Positions count the elements in the order of the dimensions. Each lane draws for eight
// consecutive positions, which mostly are in one block. The grid has one dimension and may have any size.
//   streams    the first element of each tensor. Writes numel elements of y, which may be x, and reads as many elements
//   of
//              x, residual and bias, if Op reads them
//   numel      the number of elements; below half the range of Index
//   window     the dimensions, with strides in elements
//   start      the element index of the first element
//   access     the widest access in bytes, if eight consecutive positions are adjacent in each tensor; otherwise
//              kElementByElement or kEightByEight
//   source     where the key comes from. Reads 16 bytes at source.on_device, or writes 16 bytes to source.drawn
//   threshold  of mask.h, 0 to 2^48
//   op         the operation, with its scale
// Index is the type of positions, strides and indices: uint32_t if all of them fit, otherwise uint64_t.
template <typename Op, typename Index>
__global__ void __launch_bounds__(kThreads)
    window_kernel(Streams<typename Op::Element> streams, Index numel, Window<Index> window, Index start, int access,
                  KeySource source, uint64_t threshold, Op op) {
  using T = typename Op::Element;
  const Key key = key_of(source);
  const RoundKeys keys = round_keys(key);
  const int lane = threadIdx.x % kWarp;
  const Index first = warp_uniform((blockIdx.x * static_cast<Index>(kThreads) + threadIdx.x) / kWarp);
  const Index stride = gridDim.x * static_cast<Index>(kThreads) * kBlock;
  for (Index chunk = first * kChunk; chunk < numel; chunk += stride) {
    const int left = numel - chunk < kChunk ? static_cast<int>(numel - chunk) : kChunk;
    const Index at = chunk + lane * kBlock;
    Place<Index> lane_place{};
    uint32_t kept = 0;
    if (lane * kBlock < left) {
      const int n = left - lane * kBlock < kBlock ? left - lane * kBlock : kBlock;
      lane_place = place_at<Op>(window, at);
      kept = kept_bits<Op>(window, at, lane_place, n, start, key, keys, threshold);
    }
    if (access > 0) {
      with_access<kVectorBytes<T>, sizeof(T)>(access | left * sizeof(T), [&](auto bytes) {
        constexpr int kElements = bytes / sizeof(T);
        move_chunk<bytes>(streams, lane * kElements, kWarp * kElements, kept, op, [&](int i) {
          const auto of = [&](Index at) -> Index { return __shfl_sync(~0u, at, i / kBlock) + i % kBlock; };
          Access<Index> moved{i < left, of(lane_place.x), of(lane_place.y)};
          if constexpr (Op::kReadsResidual) moved.residual = of(lane_place.residual);
          if constexpr (Op::kReadsBias) moved.bias = of(lane_place.bias);
          return moved;
        });
      });
    } else {
      const bool own = access == kEightByEight;
      move_chunk<sizeof(T)>(streams, own ? lane * kBlock : lane, own ? 1 : kWarp, kept, op, [&](int i) {
        const Place<Index> place = place_at<Op>(window, chunk + i);
        return Access<Index>{i < left, place.x, place.y, place.residual, place.bias};
      });
    }
  }
  store_drawn_key(source);
}

// Operation::kGate: the backward pass of relu_dropout. Moves elements in accesses of `bytes` bytes, and the rest at the
// end element by element. The grid has one dimension and may have any size.
//   gradient   numel elements, read
//   output     numel elements, read: the output of the forward pass
//   y          numel elements, written: gradient * scale, or 0 where output <= 0
//   scale      the factor of the elements that pass
// All three addresses are multiples of `bytes`.
template <int bytes, typename T, typename Compute>
__global__ void __launch_bounds__(kThreads)
    gate_kernel(const T* gradient, const T* output, T* y, int64_t numel, Compute scale) {
  using V = Vector<bytes>;
  constexpr int kElements = bytes / sizeof(T);
  const auto gate = [&](T by, T x) {
    return static_cast<Compute>(by) <= 0 ? static_cast<T>(Compute{0}) : drop_or_scale(true, x, scale);
  };
  const int64_t first = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t stride = gridDim.x * static_cast<int64_t>(kThreads), whole = numel / kElements;
  for (int64_t i = first; i < whole; i += stride) {
    const V x = reinterpret_cast<const V*>(gradient)[i], by = reinterpret_cast<const V*>(output)[i];
    T v[kElements], o[kElements];
    memcpy(v, &x, sizeof(V));
    memcpy(o, &by, sizeof(V));
#pragma unroll
    for (int e = 0; e < kElements; ++e) v[e] = gate(o[e], v[e]);
    V result;
    memcpy(&result, v, sizeof(V));
    store(reinterpret_cast<V*>(y) + i, result);
  }
  for (int64_t i = whole * kElements + first; i < numel; i += stride) y[i] = gate(output[i], gradient[i]);
}

}  // namespace
}  // namespace fused_dropout
