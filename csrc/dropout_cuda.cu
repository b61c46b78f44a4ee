// The operators on a CUDA device, and the Python module `fused_dropout._cuda`, which fused_dropout/native.py imports.
// Chooses the kernel of cuda_kernels.cuh for a window of elements and its grid, and launches it.
#include <Python.h>

#include "cuda_kernels.cuh"
#include "version.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <exception>
#include <string>

namespace fused_dropout {
namespace {

// Whether the error means that the library has no code for the device: neither machine code, nor PTX that the driver
// can compile.
bool is_missing_code(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion: return true;
    default: return false;
  }
}

std::string describe_missing_code(cudaError_t error, int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  std::string built;
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    built += (built.empty() ? "" : ", ") + std::to_string(arch / 100) + "." + std::to_string(arch / 10 % 10);
  }
  return "cuda:" + std::to_string(device) + " has compute capability " + std::to_string(major) + "." +
         std::to_string(minor) + ", for which there is no code (" + cudaGetErrorString(error) +
         "): the CUDA kernels were built for " + built;
}

// Raises an error if the launch of a kernel failed. numel: the number of elements or keys of the launch.
void check_cuda(cudaError_t error, const char* kernel_name, int64_t numel, int device) {
  if (error == cudaSuccess) return;
  STD_TORCH_CHECK(!is_missing_code(error), "fused_dropout: ", describe_missing_code(error, device),
                  ". \"python -m fused_dropout info\" gives the command for a build that serves it.");
  STD_TORCH_CHECK(false, "fused_dropout: launch of ", kernel_name, " for ", numel, " elements on cuda:", device,
                  " failed: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The number of thread blocks of a kernel that the device runs at once. The grid has at most this many, so that a warp
// computes the round keys once, and then works on one chunk after the other. A grid with one warp for each chunk would
// be at most 0.6 % faster in a model, which leaves out that each warp would compute the round keys. The first call
// loads the kernel and stores the number; a failed call stores nothing, so that the next call tries again.
template <auto kernel>
cudaError_t resident_blocks(int device, int64_t* blocks) {
  static std::array<std::atomic<int>, 128> blocks_of_device{};  // by device; 0: unknown
  std::atomic<int>& blocks_here = blocks_of_device[static_cast<size_t>(device) % blocks_of_device.size()];
  if (blocks_here == 0) {
    int processors = 0, blocks_per_processor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, kernel, kThreads, 0);
    if (error == cudaSuccess && blocks_per_processor == 0) error = cudaErrorLaunchOutOfResources;
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears the error, which the next launch would report as its own
      return error;
    }
    blocks_here = processors * blocks_per_processor;
  }
  *blocks = blocks_here;
  return cudaSuccess;
}

// The arguments of a launch besides the elements.
template <typename Op>
struct LaunchParams {
  KeySource source;
  uint64_t threshold;
  Op op;
};

template <typename Op, typename Block>
void launch_dropout_kernel(const KernelArgs& args, const Rows& rows, const LaunchParams<Op>& params) {
  using T = typename Op::Element;
  const int64_t blocks_per_row = (rows.length + 2 * (kBlock - 1)) / kBlock;  // the most: rows may begin inside a block
  unsigned threads_per_row = kWarp;
  while (threads_per_row < kThreads && threads_per_row < blocks_per_row) threads_per_row *= 2;
  const unsigned rows_per_block = kThreads / threads_per_row;
  int64_t resident = 0;
  check_cuda(resident_blocks<dropout_kernel<Op, Block>>(args.device, &resident), "dropout_kernel", args.numel,
             args.device);
  const int64_t grid_x = std::min(resident, (blocks_per_row + threads_per_row - 1) / threads_per_row);
  const int64_t grid_y =
      std::min(std::max<int64_t>(1, resident / grid_x), (rows.count + rows_per_block - 1) / rows_per_block);
  dropout_kernel<Op, Block>
      <<<dim3(grid_x, grid_y), dim3(threads_per_row, rows_per_block), 0, current_stream(args.device)>>>(
          streams_of<T>(args), rows, args.start, params.source, params.threshold, params.op);
  check_cuda(cudaGetLastError(), "dropout_kernel", args.numel, args.device);
}

// Launches dropout_kernel.
template <typename Op>
void launch_rows(const KernelArgs& args, const Rows& rows, const LaunchParams<Op>& params) {
  const uint64_t last = (args.start + (rows.count - 1) * rows.index + rows.length) / kBlock;
  if (last < uint64_t{1} << 31) {
    launch_dropout_kernel<Op, uint32_t>(args, rows, params);
  } else {
    launch_dropout_kernel<Op, uint64_t>(args, rows, params);
  }
}

// The widest access, in bytes, for groups of eight elements of one tensor, in the order of the dimensions. Returns 0 if
// the elements of a group are not adjacent in memory.
template <typename T>
int access_of_groups(const KernelArgs& args, const void* side, int64_t Dim::* stride) {
  int64_t adjacent = 1;
  size_t d = 0;
  for (; d < args.dims.size() && args.dims[d].*stride == adjacent; ++d) adjacent *= args.dims[d].size;
  if (d < args.dims.size() && adjacent % kBlock != 0) return 0;
  uintptr_t addresses = reinterpret_cast<uintptr_t>(side) | kBlock * sizeof(T);
  for (; d < args.dims.size(); ++d) addresses |= args.dims[d].*stride * sizeof(T);
  return static_cast<int>(addresses & (~addresses + 1));
}

// The widest access that all tensors allow.
template <typename T>
int access_of_groups(const KernelArgs& args) {
  const Streams<T> first = streams_of<T>(args);
  return std::min({access_of_groups<T>(args, first.x, &Dim::x), access_of_groups<T>(args, first.y, &Dim::y),
                   access_of_groups<T>(args, first.residual, &Dim::residual),
                   access_of_groups<T>(args, first.bias, &Dim::bias)});
}

template <typename Op, typename Index>
void launch_window_kernel(const KernelArgs& args, const LaunchParams<Op>& params, int access) {
  using T = typename Op::Element;
  constexpr int kBits = sizeof(Index) * 8;
  Window<Index> window;
  window.count = static_cast<int>(args.dims.size());
  for (int d = 0; d < window.count; ++d) {
    const Dim& dim = args.dims[d];
    int bits = 1;  // the smallest number with size <= 2^bits, but at least 1
    while (uint64_t{1} << bits < static_cast<uint64_t>(dim.size)) ++bits;
    const auto magic = ((static_cast<unsigned __int128>(1) << (kBits - 1 + bits)) + dim.size - 1) / dim.size;
    window.dims[d] = {static_cast<Index>(dim.size),  static_cast<Index>(magic),
                      static_cast<Index>(dim.x),     static_cast<Index>(dim.y),
                      static_cast<Index>(dim.index), static_cast<Index>(dim.residual),
                      static_cast<Index>(dim.bias),  bits - 1};
  }
  int64_t resident = 0;
  check_cuda(resident_blocks<window_kernel<Op, Index>>(args.device, &resident), "window_kernel", args.numel,
             args.device);
  const int64_t elements_per_block = int64_t{kThreads} * kBlock;
  const int64_t grid = std::min(resident, (args.numel + elements_per_block - 1) / elements_per_block);
  window_kernel<Op, Index><<<grid, kThreads, 0, current_stream(args.device)>>>(
      streams_of<T>(args), static_cast<Index>(args.numel), window, static_cast<Index>(args.start), access,
      params.source, params.threshold, params.op);
  check_cuda(cudaGetLastError(), "window_kernel", args.numel, args.device);
}

// Launches window_kernel.
template <typename Op>
void launch_window(const KernelArgs& args, const LaunchParams<Op>& params, int access) {
  // The positions and the index of the last element.
  uint64_t x = 0, y = 0, residual = 0, bias = 0, index = args.start;
  for (const Dim& dim : args.dims) {
    x += (dim.size - 1) * dim.x;
    y += (dim.size - 1) * dim.y;
    residual += (dim.size - 1) * dim.residual;
    bias += (dim.size - 1) * dim.bias;
    index += (dim.size - 1) * dim.index;
  }
  if (args.numel < int64_t{1} << 31 && std::max({x, y, residual, bias, index}) < uint64_t{1} << 32) {
    launch_window_kernel<Op, uint32_t>(args, params, access);
  } else {
    launch_window_kernel<Op, uint64_t>(args, params, access);
  }
}

// Launches window_kernel with the dimensions in another order: eight elements with consecutive indices come first. So a
// thread draws one block for eight elements, and neighbouring threads access neighbouring memory. A second launch takes
// the elements after the last eight. consecutive: the number of the dimension with consecutive indices.
template <typename Op>
void launch_by_index(const KernelArgs& args, size_t consecutive, const LaunchParams<Op>& params) {
  using T = typename Op::Element;
  const Dim along = args.dims[consecutive];
  const int64_t groups = along.size / kBlock, rest = along.size % kBlock, done = groups * kBlock;
  const auto reordered = [&](int64_t size, int64_t times) {
    KernelArgs part = args;
    part.numel = args.numel / along.size * size * times;
    if (times > 1) {
      part.dims[consecutive] = {times, size * along.x, size * along.y, size, size * along.residual, size * along.bias};
    } else {
      part.dims.erase(part.dims.begin() + consecutive);
    }
    if (size > 1) part.dims.insert(part.dims.begin(), {size, along.x, along.y, 1, along.residual, along.bias});
    return part;
  };
  launch_window(reordered(kBlock, groups), params, kEightByEight);
  if (rest == 0) return;
  KernelArgs part = reordered(rest, 1);
  const Streams<T> tail = advanced(streams_of<T>(args), along, done);
  if (args.x) part.x = tail.x;
  if (args.residual) part.residual = tail.residual;
  if (args.bias) part.bias = tail.bias;
  part.y = tail.y;
  part.start += done;
  launch_window(part, params, kElementByElement);
}

// Launches the kernel that serves these elements best.
template <typename Op>
void launch(const KernelArgs& args, const KeySource& source, Op op) {
  using T = typename Op::Element;
  const torch::stable::accelerator::DeviceGuard guard(args.device);
  const LaunchParams<Op> params{source, threshold(args.p), op};
  if (const auto rows = as_rows(args.dims)) {
    // dropout_kernel serves one row, and rows of a chunk or more. Shorter rows would leave some of its lanes idle. Rows
    // that begin inside a block would make its accesses narrow, so window_kernel serves them if their memory is
    // aligned.
    const bool whole_blocks = rows->length % kBlock == 0 && rows->index % kBlock == 0;
    const bool by_rows = rows->length >= kChunk && (whole_blocks || access_of_groups<T>(args) < kVectorBytes<T>);
    if (rows->count == 1 || by_rows) return launch_rows(args, *rows, params);
  }
  if (const auto d = consecutive_dim(args.dims)) return launch_by_index(args, *d, params);
  launch_window(args, params, access_of_groups<T>(args));
}

template <int bytes, typename T, typename Compute>
void launch_gate(const KernelArgs& args) {
  const torch::stable::accelerator::DeviceGuard guard(args.device);
  int64_t resident = 0;
  check_cuda(resident_blocks<gate_kernel<bytes, T, Compute>>(args.device, &resident), "gate_kernel", args.numel,
             args.device);
  const int64_t elements_per_block = kThreads * bytes / static_cast<int64_t>(sizeof(T));
  const int64_t grid = std::min(resident, (args.numel + elements_per_block - 1) / elements_per_block);
  const Streams<T> at = streams_of<T>(args);
  gate_kernel<bytes, T, Compute><<<grid, kThreads, 0, current_stream(args.device)>>>(
      at.x, at.residual, at.y, args.numel, static_cast<Compute>(args.scale));
  check_cuda(cudaGetLastError(), "gate_kernel", args.numel, args.device);
}

template <typename T, typename Compute>
void gate(const KernelArgs& args) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  if ((address(args.x) | address(args.y) | address(args.residual)) % kVectorBytes<T> == 0) {
    launch_gate<kVectorBytes<T>, T, Compute>(args);
  } else {
    launch_gate<sizeof(T), T, Compute>(args);
  }
}

template <typename T, typename Compute = float>
void drop(const KernelArgs& args, const KeySource& source) {
  const auto scale = static_cast<Compute>(args.scale);
  switch (args.operation) {
    case Operation::kDrop: return launch(args, source, Drop<Operation::kDrop, T, Compute>{scale});
    case Operation::kDropAdd: return launch(args, source, Drop<Operation::kDropAdd, T, Compute>{scale});
    case Operation::kBiasDropAdd: return launch(args, source, Drop<Operation::kBiasDropAdd, T, Compute>{scale});
    case Operation::kReluDrop: return launch(args, source, Drop<Operation::kReluDrop, T, Compute>{scale});
    case Operation::kGate: return gate<T, Compute>(args);
  }
}

void run_with_key(const KernelArgs& args, const KeySource& source) {
  switch (args.dtype) {
    case ScalarType::Float: return drop<float>(args, source);
    case ScalarType::Double: return drop<double, double>(args, source);
    case ScalarType::Half: return drop<torch::headeronly::Half>(args, source);
    case ScalarType::BFloat16: return drop<torch::headeronly::BFloat16>(args, source);
    default: return launch(args, source, WriteMask{});
  }
}

void run_cuda(const KernelArgs& args) {
  KeySource source{};
  if (args.operation == Operation::kGate) return run_with_key(args, source);
  const uint64_t* words = args.key.const_data_ptr<uint64_t>();
  if (args.key.is_cpu()) {
    source.value = {words[0], words[1]};
  } else {
    source.on_device = reinterpret_cast<const Key*>(words);
  }
  run_with_key(args, source);
}

// The operators' int64 arguments as the struct.
CapturedGenerator captured_generator(int64_t seed, int64_t offset, int64_t intragraph) {
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), static_cast<uint64_t>(intragraph)};
}

// The operator draw_and_apply: apply under graph capture, or apply_ if y is x. At each replay the kernel draws the next
// key of the generator and stores it in `key` for backward. y has the shape and dtype of x.
//   seed, offset  device addresses of the generator's seed and Philox offset
//   intragraph    the increment of the Philox offset within the captured graph before this call
void draw_and_apply(const Tensor& x, const Tensor& y, double p, const Tensor& key, const OptionalStrides& index_strides,
                    std::optional<double> scale, int64_t seed, int64_t offset, int64_t intragraph) {
  check_dtype(x.scalar_type());
  KernelArgs args = checked_args(x, x.scalar_type(), p, key, 0, index_strides, scale);
  STD_TORCH_CHECK(
      key.is_cuda() && key.is_contiguous() && y.scalar_type() == x.scalar_type() &&
          y.get_device_index() == x.get_device_index() && y.numel() == x.numel() && y.dim() == x.dim() && x.numel() > 0,
      "draw_and_apply takes a contiguous key on a CUDA device, an x that is not empty, and a y like x, but key "
      "is ",
      describe(key), ", x is ", describe(x), " and y is ", describe(y));
  args.dims = merged_dims(x, y, index_strides);
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  KeySource source{};
  source.drawn = reinterpret_cast<Key*>(key.mutable_data_ptr<uint64_t>());
  source.generator = captured_generator(seed, offset, intragraph);
  run_with_key(args, source);
}

// Writes the n keys that n calls draw from a generator; one thread writes one key.
//   keys       n keys of 16 bytes, written
//   n          the number of keys
//   first      the first key, if not captured; key i has its seed and its offset plus i
//   captured   whether to draw the keys from `generator`, and to read its seed and Philox offset of 8 bytes each
//   generator  the device addresses of these two, and an increment
__global__ void write_keys_kernel(Key* keys, int64_t n, Key first, bool captured, CapturedGenerator generator) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= n) return;
  keys[i] = captured ? draw_key(generator, i) : Key{first.seed, first.offset + i};
}

// The operator write_keys: writes the keys that n calls draw from a generator into a tensor of shape (n, 2). seed and
// offset are the generator's seed and Philox offset. Under graph capture they are the device addresses of both, which
// each replay reads again, and intragraph is the increment of the Philox offset within the captured graph before this
// call.
void write_keys(const Tensor& keys, int64_t seed, int64_t offset, bool captured, int64_t intragraph) {
  STD_TORCH_CHECK(keys.is_cuda() && keys.scalar_type() == ScalarType::UInt64 && keys.dim() == 2 && keys.size(1) == 2 &&
                      keys.is_contiguous(),
                  "keys have to be a contiguous uint64 tensor of shape (n, 2) on a CUDA device, but are ",
                  describe(keys));
  const int64_t n = keys.size(0);
  if (n == 0) return;
  const int device = keys.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Key first{static_cast<uint64_t>(seed), static_cast<uint64_t>(offset) / 4};
  write_keys_kernel<<<(n + kThreads - 1) / kThreads, kThreads, 0, current_stream(device)>>>(
      reinterpret_cast<Key*>(keys.mutable_data_ptr<uint64_t>()), n, first, captured,
      captured_generator(seed, offset, intragraph));
  check_cuda(cudaGetLastError(), "write_keys_kernel", n, device);
}

// Loads the kernels of one operation: resident_blocks() loads its kernel.
template <typename Op>
cudaError_t load_kernels_of(int device) {
  int64_t blocks = 0;
  for (const auto resident :
       {&resident_blocks<dropout_kernel<Op, uint32_t>>, &resident_blocks<dropout_kernel<Op, uint64_t>>,
        &resident_blocks<window_kernel<Op, uint32_t>>, &resident_blocks<window_kernel<Op, uint64_t>>}) {
    if (const cudaError_t error = resident(device, &blocks); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T, typename Compute>
cudaError_t load_kernels_of_type(int device) {
  int64_t blocks = 0;
  for (const auto load :
       {&load_kernels_of<Drop<Operation::kDrop, T, Compute>>, &load_kernels_of<Drop<Operation::kDropAdd, T, Compute>>,
        &load_kernels_of<Drop<Operation::kBiasDropAdd, T, Compute>>,
        &load_kernels_of<Drop<Operation::kReluDrop, T, Compute>>}) {
    if (const cudaError_t error = load(device); error != cudaSuccess) return error;
  }
  if (const cudaError_t error = resident_blocks<gate_kernel<kVectorBytes<T>, T, Compute>>(device, &blocks)) {
    return error;
  }
  return resident_blocks<gate_kernel<sizeof(T), T, Compute>>(device, &blocks);
}

// Loads all kernels, so that a graph capture does not have to load one.
cudaError_t load_kernels(int device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  for (const auto load : {&load_kernels_of_type<float, float>, &load_kernels_of_type<double, double>,
                          &load_kernels_of_type<torch::headeronly::Half, float>,
                          &load_kernels_of_type<torch::headeronly::BFloat16, float>, &load_kernels_of<WriteMask>}) {
    if (const cudaError_t error = load(device); error != cudaSuccess) return error;
  }
  int64_t blocks = 0;
  return resident_blocks<write_keys_kernel>(device, &blocks);
}

// The Python function _cuda.load(device: int) -> str: loads all kernels for a device. Returns "", or a description if
// the library has no code for the device. Raises RuntimeError if loading fails for another reason.
PyObject* load(PyObject*, PyObject* number) {
  const int device = static_cast<int>(PyLong_AsLong(number));
  if (PyErr_Occurred()) return nullptr;
  try {
    const cudaError_t error = load_kernels(device);
    if (is_missing_code(error)) return PyUnicode_FromString(describe_missing_code(error, device).c_str());
    STD_TORCH_CHECK(error == cudaSuccess, "fused_dropout: loading the kernels on cuda:", device,
                    " failed: ", cudaGetErrorString(error));
    return PyUnicode_FromString("");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_dropout, m) {
  m.def("write_keys(Tensor(a!) keys, int seed, int offset, bool captured, int intragraph) -> ()");
  m.def(
      "draw_and_apply(Tensor x, Tensor(a!) y, float p, Tensor(b!) key, SymInt[]? index_strides, float? scale, int "
      "seed, "
      "int offset, int intragraph) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fused_dropout, CUDA, m) {
  register_operators<run_cuda>(m);
  m.impl("write_keys", TORCH_BOX(&write_keys));
  m.impl("draw_and_apply", TORCH_BOX(&draw_and_apply));
}

}  // namespace fused_dropout

// The module `fused_dropout._cuda`. Importing it loads this library, whose static initialisers register the operators
// above.
PyMODINIT_FUNC PyInit__cuda(void) {
  static PyMethodDef methods[] = {{"load", fused_dropout::load, METH_O, nullptr}, {}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", FUSED_DROPOUT_BUILT("_cuda"), 0, methods};
  return PyModule_Create(&definition);
}
