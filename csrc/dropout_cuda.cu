// The operators on a CUDA device: a thread draws a block, eight elements, and goes on to the next with a stride of the
// grid. Where a mask is broadcast, in a kernel of its own, it takes eight elements and draws what decides for them.
#include <Python.h>

#include "operators.h"
#include "version.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <type_traits>

namespace fused_dropout {
namespace {

constexpr int kThreads = 256;

// By value where the host knows it, else read from the device's memory: no call waits for the GPU.
struct KeySource {
  Key value;
  const Key* on_device;
};

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
  const Key key = source.on_device ? *source.on_device : source.value;
  const RoundKeys keys = round_keys(key);
  const Block lane = blockIdx.x * static_cast<Block>(blockDim.x) + threadIdx.x;
  Block stride = gridDim.x * static_cast<Block>(blockDim.x);
  keep_in_register(stride);
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows.count; row += gridDim.y * blockDim.y) {
    // Counted from the beginning of its first block, the row goes from head to end.
    const uint64_t row_start = start + row * rows.pitch;
    const int64_t head = row_start % kBlock, end = head + rows.length;
    const Block first_block = static_cast<Block>(row_start / kBlock);
    const T* from = nullptr;
    T* to = y + row * rows.y_stride - head;
    keep_in_register(to);
    if constexpr (Op::kReads) {
      from = x + row * rows.x_stride - head;
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

// Noise for the device. With more dimensions of two elements and more a tensor would have 2^64 of them.
template <typename Index>
struct NoiseDims {
  int count;
  Index size[63], stride[63];
};

// Elements that lie together along the innermost dimension: the first, the one past the last, and which of the mask's
// elements decides for the first.
template <typename Index>
struct Run {
  Index begin, end, noise;
};

template <typename Index>
__device__ __forceinline__ Run<Index> run_at(const NoiseDims<Index>& dims, Index position) {
  Index rest = position / dims.size[0], noise = 0;
  const Index begin = rest * dims.size[0];
  for (int d = 1; d < dims.count; ++d) {
    const Index outer = rest / dims.size[d];
    noise += (rest - outer * dims.size[d]) * dims.stride[d];
    rest = outer;
  }
  return {begin, begin + dims.size[0], noise};
}

// A thread takes eight elements that lie together, and draws the blocks of the mask that decide for them: mostly one.
template <typename Op, typename Index>
__global__ void __launch_bounds__(kThreads)
    broadcast_kernel(const typename Op::Element* x, typename Op::Element* y, Index numel, NoiseDims<Index> dims,
                     KeySource source, uint64_t threshold, Op op) {
  using T = typename Op::Element;
  constexpr int kVectors = kBlock * sizeof(T) / sizeof(Vector<T>);
  const Key key = source.on_device ? *source.on_device : source.value;
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % sizeof(Vector<T>) == 0;
  const Index stride = gridDim.x * static_cast<Index>(kThreads) * kBlock;
  for (Index at = (blockIdx.x * static_cast<Index>(kThreads) + threadIdx.x) * kBlock; at < numel; at += stride) {
    const int n = numel - at < kBlock ? static_cast<int>(numel - at) : kBlock;
    const bool whole = aligned && n == kBlock;
    Vector<T> vectors[kVectors];
    T v[kBlock] = {};
    if (whole) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) vectors[i] = reinterpret_cast<const Vector<T>*>(x + at)[i];
      memcpy(v, vectors, sizeof(v));
    } else {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        if (i < n) v[i] = x[at + i];
      }
    }
    Run<Index> run = run_at(dims, at);
    Index drawn = run.noise + (at - run.begin) * dims.stride[0];
    Words words = block_words(key, drawn / kBlock);
    bool kept = keep(words, static_cast<int>(drawn % kBlock), threshold);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (at + i >= run.end) run = run_at(dims, at + i);
      const Index noise = run.noise + (at + i - run.begin) * dims.stride[0];
      if (noise != drawn) {
        if (noise / kBlock != drawn / kBlock) words = block_words(key, noise / kBlock);
        drawn = noise;
        kept = keep(words, static_cast<int>(noise % kBlock), threshold);
      }
      v[i] = op(kept, v[i]);
    }
    if (whole) {
      memcpy(vectors, v, sizeof(v));
#pragma unroll
      for (int i = 0; i < kVectors; ++i) reinterpret_cast<Vector<T>*>(y + at)[i] = vectors[i];
    } else {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        if (i < n) y[at + i] = v[i];
      }
    }
  }
}

void check_launch(const char* what, int64_t numel, int device) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "launch of ", what, " for ", numel, " elements on cuda:", device,
                  " failed: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// As many thread blocks as the device runs at once: more would only take turns.
template <auto kernel>
int resident_blocks(int device) {
  static std::array<std::atomic<int>, 128> known{};
  std::atomic<int>& blocks = known[static_cast<size_t>(device) % known.size()];
  if (blocks == 0) {
    int processors = 0, of_each = 0;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, kThreads, 0);
    blocks = std::max(1, processors * of_each);
  }
  return blocks;
}

template <typename Op, typename Block>
void launch_with(const Job& job, int64_t blocks_per_row, KeySource source, Op op) {
  using T = typename Op::Element;
  const Rows& rows = job.rows;
  unsigned columns = 2;
  while (columns < kThreads && columns < blocks_per_row) columns *= 2;
  const unsigned lines = kThreads / columns;
  const int64_t resident = resident_blocks<dropout_kernel<Op, Block>>(job.device);
  const int64_t grid_x = std::min(resident, (blocks_per_row + columns - 1) / columns);
  const int64_t grid_y = std::min(std::max<int64_t>(1, resident / grid_x), (rows.count + lines - 1) / lines);
  dropout_kernel<Op, Block><<<dim3(grid_x, grid_y), dim3(columns, lines), 0, current_stream(job.device)>>>(
      static_cast<const T*>(job.x), static_cast<T*>(job.y), rows, job.start, source, threshold(job.p), op);
}

template <typename Op, typename Index>
void launch_broadcast_with(const Job& job, KeySource source, Op op) {
  using T = typename Op::Element;
  NoiseDims<Index> dims{};
  for (const Noise::Dim& dim : job.noise->dims) {
    dims.size[dims.count] = static_cast<Index>(dim.size);
    dims.stride[dims.count++] = static_cast<Index>(dim.stride);
  }
  const int64_t resident = resident_blocks<broadcast_kernel<Op, Index>>(job.device);
  const int64_t at_once = int64_t{kThreads} * kBlock;
  const int64_t grid = std::min(resident, (job.numel() + at_once - 1) / at_once);
  broadcast_kernel<Op, Index><<<grid, kThreads, 0, current_stream(job.device)>>>(
      static_cast<const T*>(job.x), static_cast<T*>(job.y), static_cast<Index>(job.numel()), dims, source,
      threshold(job.p), op);
  check_launch("broadcast_kernel", job.numel(), job.device);
}

template <typename Op>
void launch_broadcast(const Job& job, KeySource source, Op op) {
  if (job.numel() < int64_t{1} << 31) {
    launch_broadcast_with<Op, uint32_t>(job, source, op);
  } else {
    launch_broadcast_with<Op, uint64_t>(job, source, op);
  }
}

template <typename Op>
void launch(const Job& job, Op op) {
  const torch::stable::accelerator::DeviceGuard guard(job.device);
  const uint64_t* words = job.key.const_data_ptr<uint64_t>();
  const KeySource source =
      job.key.is_cpu() ? KeySource{{words[0], words[1]}, nullptr} : KeySource{{}, reinterpret_cast<const Key*>(words)};
  if constexpr (Op::kReads) {
    if (job.noise) return launch_broadcast(job, source, op);
  }
  const Rows& rows = job.rows;
  const int64_t blocks_per_row = (rows.length + 2 * (kBlock - 1)) / kBlock;  // wherever in a block it begins
  const uint64_t last = (job.start + (rows.count - 1) * rows.pitch + rows.length) / kBlock;
  if (last < uint64_t{1} << 31) {
    launch_with<Op, uint32_t>(job, blocks_per_row, source, op);
  } else {
    launch_with<Op, uint64_t>(job, blocks_per_row, source, op);
  }
  check_launch("dropout_kernel", job.numel(), job.device);
}

template <typename T, typename Compute = float>
void drop(const Job& job) {
  launch(job, DropOrScale<T, Compute>{static_cast<Compute>(job.scale)});
}

void run_cuda(const Job& job) {
  switch (job.dtype) {
    case ScalarType::Float: return drop<float>(job);
    case ScalarType::Double: return drop<double, double>(job);
    case ScalarType::Half: return drop<torch::headeronly::Half>(job);
    case ScalarType::BFloat16: return drop<torch::headeronly::BFloat16>(job);
    default: return launch(job, WriteMask{});
  }
}

__global__ void write_key_kernel(uint64_t* key, const int64_t* seed, const int64_t* offset, uint64_t intragraph) {
  key[0] = static_cast<uint64_t>(*seed);
  key[1] = (static_cast<uint64_t>(*offset) + intragraph) / 4;
}

// Under graph capture: writes the key that the generator's captured state stands for at each replay. seed and offset
// are the addresses of that state on the device, intragraph is what the capture had drawn before; see eager.cpp.
void write_captured_key(const Tensor& key, int64_t seed, int64_t offset, int64_t intragraph) {
  const int device = key.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  write_key_kernel<<<1, 1, 0, current_stream(device)>>>(
      key.mutable_data_ptr<uint64_t>(), reinterpret_cast<const int64_t*>(seed),
      reinterpret_cast<const int64_t*>(offset), static_cast<uint64_t>(intragraph));
  check_launch("write_key_kernel", 1, device);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_dropout, m) {
  m.def("write_captured_key(Tensor(a!) key, int seed, int offset, int intragraph) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fused_dropout, CUDA, m) {
  register_operators<run_cuda>(m);
  m.impl("write_captured_key", TORCH_BOX(&write_captured_key));
}

}  // namespace fused_dropout

// The module `fused_dropout._cuda`: importing it registers what stands above.
PyMODINIT_FUNC PyInit__cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", FUSED_DROPOUT_BUILT("_cuda"), 0, nullptr};
  return PyModule_Create(&definition);
}
