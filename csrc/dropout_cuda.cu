// The operators on a CUDA device: one thread a block of eight draws, grid-stride over the blocks of all rows.
#include "operators.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

namespace fused_dropout {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 1 << 16;

// Eight elements, moved 16 bytes at a time (8 for a mask, whose element is a byte).
template <typename T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Packet {
  T v[kBlock];
};

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

template <typename Op>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const typename Op::Element* x, typename Op::Element* y, Rows rows, int64_t blocks_per_row,
                   uint64_t start, KeySource source, Threshold t, Op op) {
  using T = typename Op::Element;
  const Key key = source.on_device ? *source.on_device : source.value;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < rows.count * blocks_per_row;
       b += stride) {
    const int64_t row = b / blocks_per_row;
    const uint64_t row_start = start + row * rows.pitch;
    const uint64_t block = row_start / kBlock + b % blocks_per_row;
    // The columns of the block's first and one past its last element: outside the row at a ragged head or tail.
    const int64_t first = static_cast<int64_t>(block * kBlock - row_start);
    const int64_t begin = first < 0 ? 0 : first;
    const int64_t end = first + kBlock < rows.length ? first + kBlock : rows.length;
    if (begin >= end) continue;
    const T* from = x + row * rows.x_stride + first;
    T* to = y + row * rows.y_stride + first;
    const Words words = block_words(key, block);
    const uintptr_t address = reinterpret_cast<uintptr_t>(to) | (Op::kReads ? reinterpret_cast<uintptr_t>(from) : 0);
    if (end - begin == kBlock && address % alignof(Packet<T>) == 0) {
      Packet<T> packet;
      if constexpr (Op::kReads) packet = *reinterpret_cast<const Packet<T>*>(from);
#pragma unroll
      for (int i = 0; i < kBlock; ++i) packet.v[i] = op(keep(words, i, t), packet.v[i]);
      *reinterpret_cast<Packet<T>*>(to) = packet;
    } else {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        if (first + i < begin || first + i >= end) continue;
        T value{};
        if constexpr (Op::kReads) value = from[i];
        to[i] = op(keep(words, i, t), value);
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

template <typename Op>
void launch(const Job& job, Op op) {
  using T = typename Op::Element;
  const int device = job.device;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const uint64_t* words = job.key.const_data_ptr<uint64_t>();
  const KeySource source =
      job.key.is_cpu() ? KeySource{{words[0], words[1]}, nullptr} : KeySource{{}, reinterpret_cast<const Key*>(words)};
  const Rows& rows = job.rows;
  // A row begins anywhere in a block; with a pitch of whole blocks all begin alike.
  const int64_t head = rows.count > 1 && rows.pitch % kBlock ? kBlock - 1 : static_cast<int64_t>(job.start % kBlock);
  const int64_t blocks_per_row = (head + rows.length + kBlock - 1) / kBlock;
  const int64_t grid = std::min(kMaxGrid, (rows.count * blocks_per_row + kThreads - 1) / kThreads);
  dropout_kernel<Op><<<grid, kThreads, 0, current_stream(device)>>>(static_cast<const T*>(job.x),
                                                                    static_cast<T*>(job.y), rows, blocks_per_row,
                                                                    job.start, source, threshold(job.p), op);
  check_launch("dropout_kernel", job.numel(), device);
}

template <typename T, typename Compute = float>
void drop(const Job& job) {
  launch(job, DropOrScale<T, Compute>{static_cast<Compute>(scale(job.p))});
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
