// The eager binding `fused_dropout._eager`: keys from torch's generators and an autograd Function in C++, so that a
// small call costs less than torch's own dropout. The only file that knows ATen, and so tied to one minor version of
// torch; without it, fused_dropout/autograd.py and rng.py do the same in Python, bit for bit.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include "version.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#ifdef FUSED_DROPOUT_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#endif

namespace {

using at::Tensor;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor apply(const Tensor& x, double p, const Tensor& key) {
  static const auto op = find_operator<Tensor(const Tensor&, double, const Tensor&, int64_t)>("fused_dropout::apply");
  return op.call(x, p, key, 0);
}

void apply_(const Tensor& x, double p, const Tensor& key) {
  static const auto op = find_operator<void(const Tensor&, double, const Tensor&, int64_t)>("fused_dropout::apply_");
  op.call(x, p, key, 0);
}

// A mask that is broadcast: its shape, and what kept elements are multiplied by.
struct Noise {
  std::vector<int64_t> shape;
  double scale;
};

Tensor apply(const Tensor& x, double p, const Tensor& key, const Noise& noise) {
  static const auto op = find_operator<Tensor(const Tensor&, double, const Tensor&, at::IntArrayRef, double)>(
      "fused_dropout::apply_broadcast");
  return op.call(x, p, key, noise.shape, noise.scale);
}

void apply_(const Tensor& x, double p, const Tensor& key, const Noise& noise) {
  static const auto op = find_operator<void(const Tensor&, double, const Tensor&, at::IntArrayRef, double)>(
      "fused_dropout::apply_broadcast_");
  op.call(x, p, key, noise.shape, noise.scale);
}

bool serves(c10::DeviceType device) {
#ifdef FUSED_DROPOUT_CUDA
  static const bool has_cuda_kernels =
      c10::Dispatcher::singleton().findSchema({"fused_dropout::write_captured_key", ""}).has_value();
  if (device == at::kCUDA) return has_cuda_kernels;
#endif
  return device == at::kCPU;
}

// A tensor that the kernels can take as it is, outside every transform, mode and tracer: all else is Python's to
// decide.
bool is_plain(const Tensor& x) {
  using c10::DispatchKey;
  static const auto kPlainTensor =
      c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU,
                           DispatchKey::AutogradCUDA}) |
      c10::autocast_dispatch_keyset;
  static const auto kPlainThread =
      c10::DispatchKeySet({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView}) | c10::autocast_dispatch_keyset;
  const auto dtype = x.scalar_type();
  // A difference of key sets keeps the backends, so empty() would not do.
  const auto nothing_in = [](c10::DispatchKeySet keys) {
    return keys.highestFunctionalityKey() == DispatchKey::Undefined;
  };
  return x.defined() && serves(x.device().type()) && nothing_in(x.key_set() - kPlainTensor) &&
         nothing_in(c10::impl::tls_local_dispatch_key_set().included_ - kPlainThread) &&
         (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble) &&
         !torch::autograd::isFwGradDefined(x) && !torch::jit::tracer::isTracing();
}

// A key whose words can be read here and now.
bool is_plain_key(const Tensor& key) {
  return key.is_cpu() && key.scalar_type() == at::kUInt64 && key.numel() == 2 && key.is_contiguous() &&
         !key.unsafeGetTensorImpl()->is_python_dispatch();
}

#ifdef FUSED_DROPOUT_CUDA
// Seed and Philox offset / 4 of the generator, which moves on by one counter step. During a graph capture both are
// known only when the graph is replayed, so a kernel writes the key there.
Tensor draw_cuda_key(at::Device device, const std::optional<at::Generator>& generator) {
  auto* g = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(device.index()));
  at::PhiloxCudaState state;
  {
    const std::lock_guard<std::mutex> lock(g->mutex_);
    state = g->philox_cuda_state(4);
  }
  if (!state.captured_) {
    Tensor key = at::empty({2}, at::TensorOptions().dtype(at::kUInt64));
    uint64_t* words = key.mutable_data_ptr<uint64_t>();
    words[0] = state.seed_.val;
    words[1] = state.offset_.val / 4;
    return key;
  }
  static const auto write =
      find_operator<void(const Tensor&, int64_t, int64_t, int64_t)>("fused_dropout::write_captured_key");
  Tensor key = at::empty({2}, at::TensorOptions().dtype(at::kUInt64).device(device));
  write.call(key, reinterpret_cast<int64_t>(state.seed_.ptr), reinterpret_cast<int64_t>(state.offset_.ptr),
             static_cast<int64_t>(state.offset_intragraph_));
  return key;
}
#endif

// What torch.empty((), dtype=torch.int64).random_() draws, as the seed of a fresh stream: 63 bits.
Tensor draw_cpu_key(const std::optional<at::Generator>& generator) {
  auto* g = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  Tensor key = at::empty({2}, at::TensorOptions().dtype(at::kUInt64));
  uint64_t* words = key.mutable_data_ptr<uint64_t>();
  const std::lock_guard<std::mutex> lock(g->mutex_);
  words[0] = g->random64() & ~(uint64_t{1} << 63);
  words[1] = 0;
  return key;
}

Tensor draw_key(at::Device device, const std::optional<at::Generator>& generator) {
#ifdef FUSED_DROPOUT_CUDA
  if (device.is_cuda()) return draw_cuda_key(device, generator);
#endif
  return draw_cpu_key(generator);
}

// The gradient with its elements in the order in which forward's were numbered: memory order for a dense input
// (strides given unless that is row-major), row-major for the rest, which the operator itself takes a tensor with holes
// for.
Tensor in_order_of(const Tensor& gradient, const std::optional<std::vector<int64_t>>& strides) {
  if (!strides) return gradient.is_non_overlapping_and_dense() ? gradient.contiguous() : gradient;
  if (gradient.strides() == *strides) return gradient;
  return at::empty_strided(gradient.sizes(), *strides, gradient.options()).copy_(gradient);
}

// The same by operations that know every transform.
Tensor select_scaled(const Tensor& x, double p, const Tensor& key, const std::optional<Noise>& noise) {
  static const auto op =
      find_operator<Tensor(const Tensor&, double, const Tensor&, int64_t)>("fused_dropout::keep_mask");
  const Tensor kept = op.call(noise ? at::empty(noise->shape, x.options().dtype(at::kBool)) : x, p, key, 0);
  return at::where(kept, x.mul(noise ? noise->scale : p < 1 ? 1.0 / (1.0 - p) : 0.0), 0);
}

// Straight to the kernel where nothing else is looking; a gradient batched by vmap still needs its own rule.
Tensor run_operator(const Tensor& x, double p, const Tensor& key, const std::optional<Noise>& noise, bool inplace) {
  const bool plain = is_plain(x);
  if (torch::autograd::isFwGradDefined(x) || (noise && !plain)) return select_scaled(x, p, key, noise);
  std::optional<at::AutoDispatchBelowADInplaceOrView> below;
  if (plain) below.emplace();
  if (!inplace) return noise ? apply(x, p, key, *noise) : apply(x, p, key);
  noise ? apply_(x, p, key, *noise) : apply_(x, p, key);
  return x;
}

// Checkpointing without reentry hands backward what it saved when it recomputed: another key means another mask than
// forward's, which torch itself does not notice.
void warn_if_drawn_anew(const Tensor& saved, const Tensor& own) {
  if (saved.unsafeGetTensorImpl() == own.unsafeGetTensorImpl() || !is_plain_key(saved) || !is_plain_key(own)) return;
  if (std::memcmp(saved.const_data_ptr(), own.const_data_ptr(), 2 * sizeof(uint64_t)) == 0) return;
  TORCH_WARN(
      "fused_dropout: recomputation drew another mask than forward did, and the gradients are of neither. Let the "
      "checkpoint preserve the state of the generator, or give dropout a key.");
}

// Dropout is linear and diagonal: its backward, and backward's own, is the same operator with the same key.
struct Dropout : torch::autograd::Function<Dropout> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, double p, const Tensor& key,
                        const std::optional<Noise>& noise, bool inplace) {
    ctx->save_for_backward({key});
    ctx->saved_data["p"] = p;
    ctx->saved_data["key"] = key;
    if (noise) {
      ctx->saved_data["noise_shape"] = noise->shape;
      ctx->saved_data["scale"] = noise->scale;
    } else if (!x.is_contiguous() && x.is_non_overlapping_and_dense()) {
      ctx->saved_data["strides"] = x.strides().vec();
    }
    if (inplace) ctx->mark_dirty({x});
    return run_operator(x, p, key, noise, inplace);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved_sizes = [&](const char* name) -> std::optional<std::vector<int64_t>> {
      const auto found = ctx->saved_data.find(name);
      return found == ctx->saved_data.end() ? std::nullopt : std::optional(found->second.toIntVector());
    };
    std::optional<Noise> noise;
    if (auto shape = saved_sizes("noise_shape")) noise = {*std::move(shape), ctx->saved_data["scale"].toDouble()};
    // A broadcast mask is numbered in its own shape, whatever the layout.
    const Tensor gradient = noise ? gradients[0] : in_order_of(gradients[0], saved_sizes("strides"));
    const double p = ctx->saved_data["p"].toDouble();
    const Tensor key = ctx->get_saved_variables()[0];
    warn_if_drawn_anew(key, ctx->saved_data["key"].toTensor());
    const bool recorded = at::GradMode::is_enabled() && gradient.requires_grad() && is_plain(gradient);
    return {recorded ? Dropout::apply(gradient, p, key, noise, false) : run_operator(gradient, p, key, noise, false),
            Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// Whether elements may share memory: each dimension has to step over all that the smaller ones reach.
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

// The result, or None where Python has to look: another kind of tensor, a transform, a mode.
std::optional<Tensor> drop(const Tensor& x, double p, bool inplace, const std::optional<at::Generator>& generator,
                           const std::optional<Tensor>& key, const std::optional<Noise>& noise) {
  if (!is_plain(x)) return std::nullopt;
  if (x.numel() == 0) return x;
  const bool recorded = at::GradMode::is_enabled() && x.requires_grad();
  if (inplace) {
    torch::autograd::check_inplace(x, recorded);
    if (may_overlap(x) || (x.is_inference() && !c10::InferenceMode::is_enabled())) return std::nullopt;
  }
  const Tensor used = key ? *key : p == 1 ? at::zeros({2}, at::kUInt64) : draw_key(x.device(), generator);
  if (recorded) return Dropout::apply(x, p, used, noise, inplace);
  const Tensor y = run_operator(x, p, used, noise, inplace);
  if (inplace && !x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
  return y;
}

std::optional<Tensor> dropout(const Tensor& x, double p, bool inplace, const std::optional<at::Generator>& generator,
                              const std::optional<Tensor>& key) {
  return drop(x, p, inplace, generator, key, std::nullopt);
}

std::optional<Tensor> dropout_broadcast(const Tensor& x, double p, bool inplace,
                                        const std::optional<at::Generator>& generator, const std::optional<Tensor>& key,
                                        std::vector<int64_t> noise_shape, double scale) {
  return drop(x, p, inplace, generator, key, Noise{std::move(noise_shape), scale});
}

}  // namespace

PYBIND11_MODULE(_eager, m) {
  m.doc() = FUSED_DROPOUT_BUILT("_eager") " for torch " FUSED_DROPOUT_EXPANDED(FUSED_DROPOUT_TORCH) ";";
  m.def("dropout", torch::wrap_pybind_function_no_gil(dropout));
  m.def("dropout_broadcast", torch::wrap_pybind_function_no_gil(dropout_broadcast));
  m.def("serves", [](const std::string& device) { return serves(c10::Device(device).type()); });
  m.def("draw_key", torch::wrap_pybind_function_no_gil(draw_key));
}
