// The declarations that the three files of the eager binding share: eager.cpp, dropout_linear.cpp and neighbours.cpp.
// Only these files include ATen, so the binding works with one minor version of torch only.
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

// The arguments of an operator besides x: which elements it drops, and the factor of the others. Without index strides,
// the indices follow the memory order of a dense x, and are row-major otherwise.
struct Mask {
  double p;
  Tensor key;
  std::optional<std::vector<int64_t>> index_strides;
  std::optional<double> scale;
  int64_t start = 0;
  // Under CUDA graph capture: the device addresses of the generator's seed and Philox offset, and the increment of the
  // offset within the captured graph before this call. The kernel then draws the key and stores it in `key`.
  std::optional<std::array<int64_t, 3>> captured_state = std::nullopt;
};

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline at::OptionalSymIntArrayRef strides_of(const Mask& mask) {
  if (!mask.index_strides) return std::nullopt;
  return c10::fromIntArrayRefSlow(*mask.index_strides);
}

// Returns call(), whose result has the size of `like`. An error of call() has lost its class in the stable ABI. If it
// failed for lack of memory, at::empty_like(like) fails too, and raises torch's OutOfMemoryError.
template <typename Call>
Tensor with_torch_error(const Tensor& like, Call call) {
  try {
    return call();
  } catch (const std::exception&) {
    at::empty_like(like);
    throw;
  }
}

// Whether the kernels can take x directly: a plain tensor of a supported dtype and device, outside all transforms,
// modes and tracers. Python handles all other tensors.
bool takes_fast_path(const Tensor& x);

// Sets the mask's key: the given key, copied if autograd records the call, or else the generator's next key.
void set_key(Mask& mask, const Tensor& x, const std::optional<at::Generator>& generator,
             const std::optional<Tensor>& key, bool recorded);

// Under graph capture: launches a kernel that draws the key and stores it in mask.key. For operators whose own kernel
// does not do so.
void write_captured_key(Mask& mask);

// save_mask saves the mask of x for backward. saved_mask returns it for a gradient: the gradient's elements have the
// indices of x's elements, whatever layout the gradient has.
void save_mask(torch::autograd::AutogradContext* ctx, const Tensor& x, const Mask& mask);
Mask saved_mask(torch::autograd::AutogradContext* ctx, const Tensor& gradient);

// Whether a kernel may write to x in place. If not, Python handles the call. Raises torch's errors for in-place
// operations.
bool is_writable(const Tensor& x, bool recorded);

// For an operation in place on x. result_in_place counts the change of x, and returns the result of the autograd
// Function. After that, finish_in_place gives the history of that result to x, and returns x. A call that autograd does
// not record calls finish_in_place only, which then counts the change.
Tensor result_in_place(const Tensor& x);
Tensor finish_in_place(const Tensor& x, const Tensor& result, bool recorded);

// Runs apply() or apply_() of fused_dropout, without autograd. x must take the fast path. Returns the result, which is
// x if inplace.
Tensor run_kernel(const Tensor& x, const Mask& mask, bool inplace);

// Applies the mask to a gradient. The result has derivatives again. The mask's index strides must be set if the
// gradient does not take the fast path. inplace: the gradient may be overwritten.
Tensor apply_to_gradient(const Tensor& gradient, const Mask& mask, bool inplace = false);

// The key for backward. A key on the CPU is forward's; it warns if a checkpoint saved another key. A key on a CUDA
// device is the saved one, because its value is only known when a graph is replayed.
Tensor key_for_backward(const Tensor& of_forward, const Tensor& saved);

// The row-major strides of a shape.
std::vector<int64_t> row_major(at::IntArrayRef sizes);

// dropout_linear, or None if Python has to handle the call. fused_dropout/linear.py describes the arguments.
std::optional<Tensor> dropout_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double p,
                                     const std::optional<at::Generator>& generator, const std::optional<Tensor>& key);

// dropout_add and relu_dropout, or None if Python has to handle the call. fused_dropout/neighbours.py describes the
// arguments.
std::optional<Tensor> dropout_add(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& bias, double p,
                                  bool inplace, const std::optional<at::Generator>& generator,
                                  const std::optional<Tensor>& key, std::optional<std::vector<int64_t>> index_strides,
                                  int64_t start);
std::optional<Tensor> relu_dropout(const Tensor& x, double p, bool inplace,
                                   const std::optional<at::Generator>& generator, const std::optional<Tensor>& key);

}  // namespace fused_dropout::eager
