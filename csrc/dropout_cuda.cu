// The operators on a CUDA device: which kernel serves a window, and on what grid.
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

// Whether the error means that the library has no machine code for the device, and no PTX that its driver can compile.
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

void check_cuda(cudaError_t error, const char* what, int64_t numel, int device) {
  if (error == cudaSuccess) return;
  STD_TORCH_CHECK(!is_missing_code(error), "fused_dropout: ", describe_missing_code(error, device),
                  ". \"python -m fused_dropout info\" gives the command for a build that serves it.");
  STD_TORCH_CHECK(false, "launch of ", what, " for ", numel, " elements on cuda:", device,
                  " failed: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// How many thread blocks of a kernel the device runs at once. The grid is no larger, so that a warp computes the round
// keys once and then takes chunk after chunk. In a model, a grid with a warp for each chunk is 0.6 % faster at most,
// and misses what the round keys cost there. The first call loads the kernel and keeps the number. A failed call keeps
// nothing, so that the next call asks again.
template <auto kernel>
cudaError_t resident_blocks(int device, int64_t* blocks) {
  static std::array<std::atomic<int>, 128> known{};
  std::atomic<int>& found = known[static_cast<size_t>(device) % known.size()];
  if (found == 0) {
    int processors = 0, of_each = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, kThreads, 0);
    if (error == cudaSuccess && of_each == 0) error = cudaErrorLaunchOutOfResources;
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears the error, which the next launch would report as its own
      return error;
    }
    found = processors * of_each;
  }
  *blocks = found;
  return cudaSuccess;
}

// What a launch needs besides the window.
template <typename Op>
struct LaunchParams {
  KeySource source;
  uint64_t threshold;
  Op op;
};

template <typename Op, typename Block>
void launch_rows_with(const KernelArgs& args, const Rows& rows, const LaunchParams<Op>& params) {
  using T = typename Op::Element;
  const int64_t blocks_per_row = (rows.length + 2 * (kBlock - 1)) / kBlock;  // wherever in a block it begins
  unsigned columns = kWarp;
  while (columns < kThreads && columns < blocks_per_row) columns *= 2;
  const unsigned lines = kThreads / columns;
  int64_t resident = 0;
  check_cuda(resident_blocks<dropout_kernel<Op, Block>>(args.device, &resident), "dropout_kernel", args.numel,
             args.device);
  const int64_t grid_x = std::min(resident, (blocks_per_row + columns - 1) / columns);
  const int64_t grid_y = std::min(std::max<int64_t>(1, resident / grid_x), (rows.count + lines - 1) / lines);
  dropout_kernel<Op, Block><<<dim3(grid_x, grid_y), dim3(columns, lines), 0, current_stream(args.device)>>>(
      streams_of<T>(args), rows, args.start, params.source, params.threshold, params.op);
  check_cuda(cudaGetLastError(), "dropout_kernel", args.numel, args.device);
}

template <typename Op>
void launch_rows(const KernelArgs& args, const Rows& rows, const LaunchParams<Op>& params) {
  const uint64_t last = (args.start + (rows.count - 1) * rows.index + rows.length) / kBlock;
  if (last < uint64_t{1} << 31) {
    launch_rows_with<Op, uint32_t>(args, rows, params);
  } else {
    launch_rows_with<Op, uint64_t>(args, rows, params);
  }
}

// Takes the elements of one stream in groups of eight, in the order of the dimensions. Returns the bytes of the
// widest access that all groups allow, or 0 if the elements of a group do not lie together.
template <typename T>
int access_of_eights(const KernelArgs& args, const void* side, int64_t Dim::* stride) {
  int64_t together = 1;
  size_t d = 0;
  for (; d < args.dims.size() && args.dims[d].*stride == together; ++d) together *= args.dims[d].size;
  if (d < args.dims.size() && together % kBlock != 0) return 0;
  uintptr_t addresses = reinterpret_cast<uintptr_t>(side) | kBlock * sizeof(T);
  for (; d < args.dims.size(); ++d) addresses |= args.dims[d].*stride * sizeof(T);
  return static_cast<int>(addresses & (~addresses + 1));
}

template <typename T>
int access_of_eights(const KernelArgs& args) {
  const Streams<T> first = streams_of<T>(args);
  return std::min({access_of_eights<T>(args, first.x, &Dim::x), access_of_eights<T>(args, first.y, &Dim::y),
                   access_of_eights<T>(args, first.residual, &Dim::residual),
                   access_of_eights<T>(args, first.bias, &Dim::bias)});
}

template <typename Op, typename Index>
void launch_window_with(const KernelArgs& args, const LaunchParams<Op>& params, int access) {
  using T = typename Op::Element;
  constexpr int kBits = sizeof(Index) * 8;
  Window<Index> window;
  window.count = static_cast<int>(args.dims.size());
  for (int d = 0; d < window.count; ++d) {
    const Dim& dim = args.dims[d];
    int bits = 1;  // 2^bits is the size or more
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
  const int64_t at_once = int64_t{kThreads} * kBlock;
  const int64_t grid = std::min(resident, (args.numel + at_once - 1) / at_once);
  window_kernel<Op, Index><<<grid, kThreads, 0, current_stream(args.device)>>>(
      streams_of<T>(args), static_cast<Index>(args.numel), window, static_cast<Index>(args.start), access,
      params.source, params.threshold, params.op);
  check_cuda(cudaGetLastError(), "window_kernel", args.numel, args.device);
}

template <typename Op>
void launch_window(const KernelArgs& args, const LaunchParams<Op>& params, int access) {
  uint64_t x = 0, y = 0, residual = 0, bias = 0, index = args.start;  // of the last element
  for (const Dim& dim : args.dims) {
    x += (dim.size - 1) * dim.x;
    y += (dim.size - 1) * dim.y;
    residual += (dim.size - 1) * dim.residual;
    bias += (dim.size - 1) * dim.bias;
    index += (dim.size - 1) * dim.index;
  }
  if (args.numel < int64_t{1} << 31 && std::max({x, y, residual, bias, index}) < uint64_t{1} << 32) {
    launch_window_with<Op, uint32_t>(args, params, access);
  } else {
    launch_window_with<Op, uint64_t>(args, params, access);
  }
}

// The same elements in another order, in which eight with consecutive indices come first: a thread then draws one block
// for them, and its neighbours take neighbours in memory. One launch more takes those past the last eight.
template <typename Op>
void launch_by_index(const KernelArgs& args, size_t consecutive, const LaunchParams<Op>& params) {
  using T = typename Op::Element;
  const Dim along = args.dims[consecutive];
  const int64_t eights = along.size / kBlock, rest = along.size % kBlock, done = eights * kBlock;
  const auto with = [&](int64_t size, int64_t times) {
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
  launch_window(with(kBlock, eights), params, kEightByEight);
  if (rest == 0) return;
  KernelArgs part = with(rest, 1);
  const Streams<T> past = step(streams_of<T>(args), along, done);
  if (args.x) part.x = past.x;
  if (args.residual) part.residual = past.residual;
  if (args.bias) part.bias = past.bias;
  part.y = past.y;
  part.start += done;
  launch_window(part, params, kElementByElement);
}

template <typename Op>
void launch(const KernelArgs& args, const KeySource& source, Op op) {
  using T = typename Op::Element;
  const torch::stable::accelerator::DeviceGuard guard(args.device);
  const LaunchParams<Op> params{source, threshold(args.p), op};
  if (const auto rows = as_rows(args.dims)) {
    // window_kernel serves rows shorter than a chunk, which would leave lanes of dropout_kernel idle. It also serves
    // rows that begin inside a block if their memory is aligned: dropout_kernel would move them in narrow accesses.
    const bool whole_blocks = rows->length % kBlock == 0 && rows->index % kBlock == 0;
    const bool by_rows = rows->length >= kChunk && (whole_blocks || access_of_eights<T>(args) < kVectorBytes<T>);
    if (rows->count == 1 || by_rows) return launch_rows(args, *rows, params);
  }
  if (const auto d = consecutive_dim(args.dims)) return launch_by_index(args, *d, params);
  launch_window(args, params, access_of_eights<T>(args));
}

template <int bytes, typename T, typename Compute>
void launch_gate(const KernelArgs& args) {
  const torch::stable::accelerator::DeviceGuard guard(args.device);
  int64_t resident = 0;
  check_cuda(resident_blocks<gate_kernel<bytes, T, Compute>>(args.device, &resident), "gate_kernel", args.numel,
             args.device);
  const int64_t at_once = kThreads * bytes / static_cast<int64_t>(sizeof(T));
  const int64_t grid = std::min(resident, (args.numel + at_once - 1) / at_once);
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

CapturedGenerator captured_generator(int64_t seed, int64_t offset, int64_t intragraph) {
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), static_cast<uint64_t>(intragraph)};
}

// apply under graph capture, or apply_ if y is x. At each replay the kernel draws the next key of the generator and
// stores it in `key` for backward. y has the size and dtype of x.
void draw_and_apply(const Tensor& x, const Tensor& y, double p, const Tensor& key, const Strides& index_strides,
                    std::optional<double> scale, int64_t seed, int64_t offset, int64_t intragraph) {
  check_dtype(x.scalar_type());
  KernelArgs args = checked_args(x, x.scalar_type(), p, key, 0, index_strides, scale);
  STD_TORCH_CHECK(key.is_cuda() && key.is_contiguous() && y.scalar_type() == x.scalar_type() &&
                      y.get_device_index() == x.get_device_index() && y.numel() == x.numel() && y.dim() == x.dim() &&
                      x.numel() > 0,
                  "draw_and_apply takes a key on the device, an x that is not empty, and a y like x");
  args.dims = dims_of(x, y, index_strides);
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  KeySource source{};
  source.drawn = reinterpret_cast<Key*>(key.mutable_data_ptr<uint64_t>());
  source.generator = captured_generator(seed, offset, intragraph);
  run_with_key(args, source);
}

__global__ void write_keys_kernel(Key* keys, int64_t n, Key first, bool captured, CapturedGenerator generator) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= n) return;
  keys[i] = captured ? draw_key(generator, i) : Key{first.seed, first.offset + i};
}

// Writes the keys that n calls draw from a generator: by its seed and its Philox offset or, under graph capture, by the
// addresses of both on the device, where each replay finds new ones. intragraph is what the capture had drawn before.
void write_keys(const Tensor& keys, int64_t seed, int64_t offset, bool captured, int64_t intragraph) {
  STD_TORCH_CHECK(keys.is_cuda() && keys.scalar_type() == ScalarType::UInt64 && keys.dim() == 2 && keys.size(1) == 2 &&
                      keys.is_contiguous(),
                  "keys are written into a contiguous uint64 tensor of shape (n, 2) on a CUDA device");
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

// load(device: int) -> str: loads all kernels. Returns "", or a description if the library has no code for the device.
// Raises RuntimeError if loading fails for another reason.
PyObject* load(PyObject*, PyObject* number) {
  const int device = static_cast<int>(PyLong_AsLong(number));
  if (PyErr_Occurred()) return nullptr;
  try {
    const cudaError_t error = load_kernels(device);
    if (is_missing_code(error)) return PyUnicode_FromString(describe_missing_code(error, device).c_str());
    STD_TORCH_CHECK(error == cudaSuccess, "loading the kernels on cuda:", device,
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

// The module `fused_dropout._cuda`: importing it registers what stands above.
PyMODINIT_FUNC PyInit__cuda(void) {
  static PyMethodDef methods[] = {{"load", fused_dropout::load, METH_O, nullptr}, {}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", FUSED_DROPOUT_BUILT("_cuda"), 0, methods};
  return PyModule_Create(&definition);
}
