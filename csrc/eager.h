// What the two files of the eager binding share. They alone know ATen, and so are tied to one minor version of torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <vector>

namespace fused_dropout::eager {

using at::Tensor;

// Which elements an operator drops, and what it multiplies the others by: its arguments besides x. The indices start at
// 0; without index strides they follow the memory order of a dense x, and are row-major otherwise.
struct Mask {
  double p;
  Tensor key;
  std::optional<std::vector<int64_t>> index_strides;
  std::optional<double> scale;
  // Under CUDA graph capture: the addresses of the generator's seed and offset, and what the capture had drawn before.
  // The kernel then draws the key and stores it in `key`.
  std::optional<std::array<int64_t, 3>> captured = std::nullopt;
};

// Whether the kernels can take this tensor as it is, outside every transform, mode and tracer. Python decides on the
// rest.
bool takes_fast_path(const Tensor& x);

// Sets the mask's key: a copy of the one that is given, or the generator's next one.
void set_key(Mask& mask, const Tensor& x, const std::optional<at::Generator>& generator,
             const std::optional<Tensor>& key, bool recorded);

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

}  // namespace fused_dropout::eager
