// What the files of the eager binding share. They alone know ATen, and so are tied to one minor version of torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <vector>

namespace fused_dropout::eager {

using at::Tensor;

// Which elements an operator drops, and what it multiplies the others by: its arguments besides x. Without index
// strides the indices follow the memory order of a dense x, and are row-major otherwise.
struct Mask {
  double p;
  Tensor key;
  std::optional<std::vector<int64_t>> index_strides;
  std::optional<double> scale;
  int64_t start = 0;
  // Under CUDA graph capture: the addresses of the generator's seed and offset, and what the capture had drawn before.
  // The kernel then draws the key and stores it in `key`.
  std::optional<std::array<int64_t, 3>> captured = std::nullopt;
};

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline at::OptionalSymIntArrayRef strides_of(const Mask& mask) {
  if (!mask.index_strides) return std::nullopt;
  return c10::fromIntArrayRefSlow(*mask.index_strides);
}

// Returns call(), whose result has the size of `like`. An error loses its class in the stable ABI. If the call failed
// for lack of memory, at::empty_like fails too, and raises torch's own error.
template <typename Call>
Tensor with_torchs_error(const Tensor& like, Call call) {
  try {
    return call();
  } catch (const std::exception&) {
    at::empty_like(like);
    throw;
  }
}

// Whether the kernels can take this tensor as it is, outside every transform, mode and tracer. Python decides on the
// rest.
bool takes_fast_path(const Tensor& x);

// Sets the mask's key: a copy of the one that is given, or the generator's next one.
void set_key(Mask& mask, const Tensor& x, const std::optional<at::Generator>& generator,
             const std::optional<Tensor>& key, bool recorded);

// Stores the mask's key where backward finds it, if no kernel that draws does so.
void write_captured_key(Mask& mask);

// Keeps a mask for backward, and gives it back for a gradient: its elements are numbered as those of x, whatever layout
// the gradient arrives in.
void save_mask(torch::autograd::AutogradContext* ctx, const Tensor& x, const Mask& mask);
Mask saved_mask(torch::autograd::AutogradContext* ctx, const Tensor& gradient);

// Whether a kernel may write to x, in place; else Python has to look. Raises torch's errors.
bool is_writable(const Tensor& x, bool recorded);

// What a Function that has worked in place on x returns as its result, counting the change; and what then gives that
// result's history to x. A call that is not recorded does only the latter.
Tensor result_in_place(const Tensor& x);
Tensor finish_in_place(const Tensor& x, const Tensor& result, bool recorded);

// Straight to the kernel, past autograd: x takes the fast path. Returns x if it works in place.
Tensor run_kernel(const Tensor& x, const Mask& mask, bool inplace);

// Applies the mask to a gradient, with derivatives of its own. The mask's index strides have to be set if the gradient
// does not take the fast path. inplace: the gradient may be overwritten.
Tensor apply_to_gradient(const Tensor& gradient, const Mask& mask, bool inplace = false);

// The key for backward: forward's, except on a device, where its value is read when a graph is replayed. Warns if a
// checkpoint saved another one.
Tensor key_for_backward(const Tensor& of_forward, const Tensor& saved);

std::vector<int64_t> row_major(at::IntArrayRef sizes);

// dropout_linear, or None where Python has to look. fused_dropout/linear.py describes the arguments.
std::optional<Tensor> dropout_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double p,
                                     const std::optional<at::Generator>& generator, const std::optional<Tensor>& key);

// dropout_add and relu_dropout likewise, for fused_dropout/neighbours.py.
std::optional<Tensor> dropout_add(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& bias, double p,
                                  bool inplace, const std::optional<at::Generator>& generator,
                                  const std::optional<Tensor>& key, std::optional<std::vector<int64_t>> index_strides,
                                  int64_t start);
std::optional<Tensor> relu_dropout(const Tensor& x, double p, bool inplace,
                                   const std::optional<at::Generator>& generator, const std::optional<Tensor>& key);

}  // namespace fused_dropout::eager
