// The Python module `fused_dropout._eager`, the eager binding: draws keys from torch's generators and records autograd
// in C++, so that a small call takes less time than torch's own dropout. fused_dropout/dispatch.py and keys.py call it.
// Without it, fused_dropout/autograd.py and keys.py give the same bits in Python.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include "eager.h"
#include "version.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#ifdef FUSED_DROPOUT_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#endif

namespace fused_dropout::eager {
namespace {

Tensor apply(const Tensor& x, const Mask& mask) {
  static const auto op =
      find_operator<Tensor(const Tensor&, double, const Tensor&, c10::SymInt, at::OptionalSymIntArrayRef,
                           std::optional<double>)>("fused_dropout::apply");
  return with_torch_error(x, [&] { return op.call(x, mask.p, mask.key, mask.start, strides_of(mask), mask.scale); });
}

void apply_(const Tensor& x, const Mask& mask) {
  static const auto op =
      find_operator<void(const Tensor&, double, const Tensor&, c10::SymInt, at::OptionalSymIntArrayRef,
                         std::optional<double>)>("fused_dropout::apply_");
  op.call(x, mask.p, mask.key, mask.start, strides_of(mask), mask.scale);
}

#ifdef FUSED_DROPOUT_CUDA
// Bit i is set if the kernels run on CUDA device i. operators.py sets it at the first call on that device.
std::atomic<uint64_t> cuda_devices{0};
#endif

// Whether the kernels run on this device. A CUDA device above number 63 never takes the fast path.
bool serves(c10::Device device) {
#ifdef FUSED_DROPOUT_CUDA
  if (device.is_cuda()) return device.index() >= 0 && device.index() < 64 && cuda_devices >> device.index() & 1;
#endif
  return device.is_cpu();
}

}  // namespace

bool takes_fast_path(const Tensor& x) {
  using c10::DispatchKey;
  static const auto kPlainTensor =
      c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU,
                           DispatchKey::AutogradCUDA}) |
      c10::autocast_dispatch_keyset;
  static const auto kPlainThread =
      c10::DispatchKeySet({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView}) | c10::autocast_dispatch_keyset;
  const auto dtype = x.scalar_type();
  // Not empty(): the difference of two key sets keeps the backend bits.
  const auto is_empty = [](c10::DispatchKeySet keys) {
    return keys.highestFunctionalityKey() == DispatchKey::Undefined;
  };
  return x.defined() && serves(x.device()) && is_empty(x.key_set() - kPlainTensor) &&
         is_empty(c10::impl::tls_local_dispatch_key_set().included_ - kPlainThread) &&
         (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble) &&
         !torch::autograd::isFwGradDefined(x) && !torch::jit::tracer::isTracing();
}

namespace {

// Whether the values of a key can be read now, without waiting for a device.
bool is_readable(const Tensor& key) {
  return key.is_cpu() && key.scalar_type() == at::kUInt64 && key.numel() == 2 && key.is_contiguous() &&
         !key.unsafeGetTensorImpl()->is_python_dispatch();
}

// New keys on the CPU, of shape (n, 2), or (2,) for one key. Does not call at::empty, because a transform of torch.func
// would wrap its result.
Tensor empty_cpu_keys(at::IntArrayRef shape) {
  return at::detail::empty_cpu(shape, at::kUInt64);
}

#ifdef FUSED_DROPOUT_CUDA
// Advances the generator's Philox offset by 4 for each of n keys. Returns its state before that.
at::PhiloxCudaState advance(const std::optional<at::Generator>& generator, at::Device device, int64_t n) {
  auto* g = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(device.index()));
  const std::lock_guard<std::mutex> lock(g->mutex_);
  return g->philox_cuda_state(4 * n);
}

// Seed, offset and intragraph offset of a state. Under graph capture, the first two are device addresses.
std::array<int64_t, 3> state_words(const at::PhiloxCudaState& state) {
  const auto word = [&](const auto& one) {
    return state.captured_ ? reinterpret_cast<int64_t>(one.ptr) : static_cast<int64_t>(one.val);
  };
  return {word(state.seed_), word(state.offset_), static_cast<int64_t>(state.offset_intragraph_)};
}

Tensor empty_cuda_keys(at::IntArrayRef shape, at::Device device) {
  return at::empty(shape, at::TensorOptions().dtype(at::kUInt64).device(device));
}

// Keys on the CPU, from a state whose values are known.
Tensor keys_from_state(at::IntArrayRef shape, const at::PhiloxCudaState& state) {
  Tensor keys = empty_cpu_keys(shape);
  uint64_t* words = keys.mutable_data_ptr<uint64_t>();
  for (int64_t i = 0; i < keys.numel() / 2; ++i) {
    words[2 * i] = state.seed_.val;
    words[2 * i + 1] = state.offset_.val / 4 + i;
  }
  return keys;
}

void write_keys(const Tensor& keys, int64_t seed, int64_t offset, bool captured, int64_t intragraph) {
  static const auto op =
      find_operator<void(const Tensor&, int64_t, int64_t, bool, int64_t)>("fused_dropout::write_keys");
  op.call(keys, seed, offset, captured, intragraph);
}

// n keys of a CUDA generator: its seed, and its Philox offset / 4. Under graph capture these are known only when the
// graph is replayed. In that case, and if on_device is set, a kernel writes the keys to the device.
Tensor draw_cuda_keys(int64_t n, at::Device device, const std::optional<at::Generator>& generator, bool on_device) {
  const at::PhiloxCudaState state = advance(generator, device, n);
  if (!state.captured_ && !on_device) return keys_from_state({n, 2}, state);
  Tensor keys = empty_cuda_keys({n, 2}, device);
  const auto [seed, offset, intragraph] = state_words(state);
  write_keys(keys, seed, offset, state.captured_, intragraph);
  return keys;
}

void draw_cuda_key(Mask& mask, at::Device device, const std::optional<at::Generator>& generator) {
  const at::PhiloxCudaState state = advance(generator, device, 1);
  if (state.captured_) {
    mask.key = empty_cuda_keys({2}, device);
    mask.captured_state = state_words(state);
  } else {
    mask.key = keys_from_state({2}, state);
  }
}

void draw_and_apply(const Tensor& x, const Tensor& y, const Mask& mask) {
  static const auto op =
      find_operator<void(const Tensor&, const Tensor&, double, const Tensor&, at::OptionalSymIntArrayRef,
                         std::optional<double>, int64_t, int64_t, int64_t)>("fused_dropout::draw_and_apply");
  const auto [seed, offset, intragraph] = *mask.captured_state;
  op.call(x, y, mask.p, mask.key, strides_of(mask), mask.scale, seed, offset, intragraph);
}
#endif

// The keys of a CPU generator. The seeds are the 63-bit numbers that torch.empty(n, dtype=torch.int64).random_() draws,
// and the offsets are 0.
Tensor draw_cpu_keys(at::IntArrayRef shape, const std::optional<at::Generator>& generator) {
  // torch's older vmap has no random operations. Under it, at::rand raises torch's error.
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::VmapMode)) at::rand({});
  auto* g = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  Tensor keys = empty_cpu_keys(shape);
  uint64_t* words = keys.mutable_data_ptr<uint64_t>();
  const std::lock_guard<std::mutex> lock(g->mutex_);
  for (uint64_t* end = words + keys.numel(); words != end;) {
    *words++ = g->random64() & ~(uint64_t{1} << 63);
    *words++ = 0;
  }
  return keys;
}

Tensor draw_keys(int64_t n, at::Device device, const std::optional<at::Generator>& generator, bool on_device) {
#ifdef FUSED_DROPOUT_CUDA
  if (device.is_cuda()) return draw_cuda_keys(n, device, generator, on_device);
#endif
  return draw_cpu_keys({n, 2}, generator);
}

// The operator draw_keys, for compilers and modes. Its keys are on `device`.
Tensor draw_keys_operator(c10::SymInt n, at::Device device) {
  return draw_keys(n.expect_int(), device, std::nullopt, true);
}

// Draws the key of one call.
void draw_key(Mask& mask, at::Device device, const std::optional<at::Generator>& generator) {
#ifdef FUSED_DROPOUT_CUDA
  if (device.is_cuda()) return draw_cuda_key(mask, device, generator);
#endif
  mask.key = draw_cpu_keys({2}, generator);
}

// The operator apply in torch's own operations, for which every transform has rules. autograd.compose does the same in
// Python.
Tensor compose(const Tensor& x, const Mask& mask) {
  static const auto op =
      find_operator<Tensor(const Tensor&, double, const Tensor&, c10::SymInt, at::OptionalSymIntArrayRef)>(
          "fused_dropout::keep_mask");
  std::vector<int64_t> shape = x.sizes().vec();
  for (size_t d = 0; d < shape.size(); ++d) {
    if ((*mask.index_strides)[d] == 0) shape[d] = 1;
  }
  const Tensor like = at::empty(shape, at::TensorOptions().dtype(at::kBool).device(x.device()));
  const Tensor kept =
      with_torch_error(like, [&] { return op.call(like, mask.p, mask.key, mask.start, strides_of(mask)); });
  const double scale = mask.scale ? *mask.scale : mask.p < 1 ? 1.0 / (1.0 - mask.p) : 0.0;
  const Tensor zero = at::zeros({}, at::TensorOptions().dtype(x.scalar_type()).device(x.device()));
  return at::where(kept, x.mul(scale), zero);
}

}  // namespace

std::vector<int64_t> row_major(at::IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return strides;
}

Tensor run_kernel(const Tensor& x, const Mask& mask, bool inplace) {
  const at::AutoDispatchBelowADInplaceOrView below;
#ifdef FUSED_DROPOUT_CUDA
  if (mask.captured_state) {
    const Tensor y = inplace ? x : at::empty_like(x);
    draw_and_apply(x, y, mask);
    return y;
  }
#endif
  if (!inplace) return apply(x, mask);
  apply_(x, mask);
  return x;
}

namespace {

// Warns if the recomputation of a non-reentrant checkpoint drew another key. In that case backward gets the recomputed
// tensors, whose mask differs from forward's. torch does not detect this.
void warn_if_another_key(const Tensor& saved, const Tensor& own) {
  if (saved.unsafeGetTensorImpl() == own.unsafeGetTensorImpl() || !is_readable(saved)) return;
  if (std::memcmp(saved.const_data_ptr(), own.const_data_ptr(), 2 * sizeof(uint64_t)) == 0) return;
  // Not TORCH_WARN, which would report a line of torch instead of the user's line.
  const py::gil_scoped_acquire gil;
  py::module_::import("fused_dropout.autograd").attr("warn_of_another_mask")();
}

}  // namespace

Tensor key_for_backward(const Tensor& of_forward, const Tensor& saved) {
  if (!is_readable(of_forward)) return saved;
  warn_if_another_key(saved, of_forward);
  return of_forward;
}

void save_mask(torch::autograd::AutogradContext* ctx, const Tensor& x, const Mask& mask) {
  ctx->saved_data["p"] = mask.p;
  ctx->saved_data["key"] = mask.key;
  ctx->saved_data["start"] = mask.start;
  if (mask.scale) ctx->saved_data["scale"] = *mask.scale;
  if (mask.index_strides) {
    ctx->saved_data["index_strides"] = *mask.index_strides;
  } else if (!x.is_contiguous() && x.is_non_overlapping_and_dense()) {
    ctx->saved_data["index_strides"] = x.strides().vec();
  }
}

Mask saved_mask(torch::autograd::AutogradContext* ctx, const Tensor& gradient) {
  const auto& saved = ctx->saved_data;
  Mask mask{saved.at("p").toDouble(), Tensor(), std::nullopt, std::nullopt, saved.at("start").toInt()};
  mask.key = key_for_backward(saved.at("key").toTensor(), ctx->get_saved_variables()[0]);
  if (const auto found = saved.find("scale"); found != saved.end()) mask.scale = found->second.toDouble();
  if (const auto found = saved.find("index_strides"); found != saved.end()) {
    mask.index_strides = found->second.toIntVector();
  } else if (!gradient.is_contiguous() || !takes_fast_path(gradient)) {
    mask.index_strides = row_major(gradient.sizes());
  }
  return mask;
}

void write_captured_key([[maybe_unused]] Mask& mask) {
#ifdef FUSED_DROPOUT_CUDA
  if (!mask.captured_state) return;
  const auto [seed, offset, intragraph] = *mask.captured_state;
  write_keys(mask.key.view({1, 2}), seed, offset, true, intragraph);
  mask.captured_state.reset();
#endif
}

void set_key(Mask& mask, const Tensor& x, const std::optional<at::Generator>& generator,
             const std::optional<Tensor>& key, bool recorded) {
  if (!key) {
    draw_key(mask, x.device(), generator);
  } else {
    // A copy, so that later changes of the caller's key do not change the gradient.
    mask.key = recorded && is_readable(*key) ? key->clone() : *key;
  }
}

namespace {

// Dropout multiplies each element by a constant. So its backward, and the backward of that, is the same operator with
// the same key.
struct Dropout : torch::autograd::Function<Dropout> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Mask& mask, bool inplace) {
    ctx->save_for_backward({mask.key});
    save_mask(ctx, x, mask);
    const Tensor y = run_kernel(x, mask, inplace);
    return inplace ? result_in_place(x) : y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& gradients) {
    return {apply_to_gradient(gradients[0], saved_mask(ctx, gradients[0])), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor apply_to_gradient(const Tensor& gradient, const Mask& mask, bool inplace) {
  if (!takes_fast_path(gradient)) return compose(gradient, mask);
  if (at::GradMode::is_enabled() && gradient.requires_grad()) return Dropout::apply(gradient, mask, false);
  return run_kernel(gradient, mask, inplace);
}

namespace {

// Whether elements of x may share memory. They do not if the stride of each dimension is larger than the span of all
// dimensions with smaller strides.
bool may_overlap(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t span = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < span) return true;
    span += stride * (size - 1);
  }
  return false;
}

// Increments the version counter, by which autograd detects changes of saved tensors.
void bump_version_counter(const Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

bool is_writable(const Tensor& x, bool recorded) {
  torch::autograd::check_inplace(x, recorded);
  return !may_overlap(x) && (!x.is_inference() || c10::InferenceMode::is_enabled());
}

Tensor result_in_place(const Tensor& x) {
  bump_version_counter(x);
  return x.variable_data();  // a new tensor on x's memory, without history
}

Tensor finish_in_place(const Tensor& x, const Tensor& result, bool recorded) {
  if (!recorded) bump_version_counter(x);
  // The same call as in torch's own in-place operations. mark_dirty() has the same effect, but compiled autograd
  // refuses it.
  if (recorded) torch::autograd::impl::rebase_history(x, torch::autograd::impl::gradient_edge(result));
  return x;
}

namespace {

// Dropout of x. Returns None if Python has to handle the call: another kind of tensor, a transform, a mode.
std::optional<Tensor> drop(const Tensor& x, double p, bool inplace, const std::optional<at::Generator>& generator,
                           const std::optional<Tensor>& key, std::optional<std::vector<int64_t>> index_strides,
                           std::optional<double> scale, int64_t start) {
  if (!takes_fast_path(x)) return std::nullopt;
  if (x.numel() == 0) return x;
  const bool recorded = at::GradMode::is_enabled() && x.requires_grad();
  if (inplace && !is_writable(x, recorded)) return std::nullopt;
  Mask mask{p, Tensor(), std::move(index_strides), scale, start};
  if (!key && p == 1) {
    mask.key = at::zeros({2}, at::kUInt64);
  } else {
    set_key(mask, x, generator, key, recorded);
  }
  if (start != 0) write_captured_key(mask);  // draw_and_apply, which draws the key itself, only starts at index 0
  const Tensor y = recorded ? Dropout::apply(x, mask, inplace) : run_kernel(x, mask, inplace);
  return inplace ? finish_in_place(x, y, recorded) : y;
}

}  // namespace
}  // namespace fused_dropout::eager

using namespace fused_dropout::eager;

TORCH_LIBRARY_IMPL(fused_dropout, CompositeExplicitAutograd, m) {
  m.impl("draw_keys", draw_keys_operator);
}

PYBIND11_MODULE(_eager, m) {
  m.doc() = FUSED_DROPOUT_BUILT("_eager") " for torch " FUSED_DROPOUT_EXPANDED(FUSED_DROPOUT_TORCH) ";";
  m.def("drop", torch::wrap_pybind_function_no_gil(drop));
  m.def("dropout_linear", torch::wrap_pybind_function_no_gil(dropout_linear));
  m.def("dropout_add", torch::wrap_pybind_function_no_gil(dropout_add));
  m.def("relu_dropout", torch::wrap_pybind_function_no_gil(relu_dropout));
  m.def("serves", serves);
#ifdef FUSED_DROPOUT_CUDA
  m.def("serve_cuda", [](int device) { cuda_devices |= device < 64 ? uint64_t{1} << device : 0; });
#endif
  m.def("draw_keys", torch::wrap_pybind_function_no_gil(
                         [](int64_t n, at::Device device, const std::optional<at::Generator>& generator) {
                           return draw_keys(n, device, generator, false);
                         }));
}
