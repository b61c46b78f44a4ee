// The device-independent part of the operators: it checks the arguments, allocates the result, and describes the
// elements to visit as a list of dimensions, KernelArgs::dims. dropout_cpu.cpp and dropout_cuda.cu call
// register_operators() with their kernel. Uses LibTorch's stable ABI only, so that one binary serves every torch
// from 2.11 on.
#pragma once

#include "simd/kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// The message of the last call into torch that failed. Weak, because torch 2.11 does not have this function.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fused_dropout {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalStrides = std::optional<std::vector<int64_t>>;

// A dimension of the elements that a kernel visits: its size, and its strides, in elements, in x, in y, in the element
// index, and in the other tensors that an operation reads. If the stride of the index is 0, all elements along the
// dimension share one index, and so one draw. The strides of tensors that the operation does not read are those of x.
struct Dim {
  int64_t size, x, y, index, residual = x, bias = x;
};

// A generator under CUDA graph capture: the device addresses of its seed and of its Philox offset, which each replay
// reads, and the increment of the Philox offset within the captured graph before this call.
struct CapturedGenerator {
  uint64_t seed, offset, intragraph;
};

// The arguments of a kernel.
struct KernelArgs {
  const void* x;
  void* y;           // may be x
  ScalarType dtype;  // of x and y; Bool: the kernel writes the mask, one byte an element, and does not read x
  // At least one dimension, in the order of y's strides from the innermost outwards. Neighbouring dimensions are merged
  // where the outer one continues the inner one by all strides.
  std::vector<Dim> dims;
  int64_t numel;
  Tensor key;       // uint64, shape (2,), contiguous: on the CPU, or on y's device
  double p, scale;  // scale: the factor of kept elements
  uint64_t start;   // the index of the first element
  int device;
  Operation operation = Operation::kDrop;
  const void *residual = nullptr, *bias = nullptr;
};

template <typename T>
Streams<T> streams_of(const KernelArgs& args) {
  T* y = static_cast<T*>(args.y);
  // A mask has no x. x then points to y's memory, whose values are ignored.
  const T* x = args.x ? static_cast<const T*>(args.x) : y;
  const auto or_x = [x](const void* stream) { return stream ? static_cast<const T*>(stream) : x; };
  return {x, y, or_x(args.residual), or_x(args.bias)};
}

// The addresses n elements further along a dimension.
template <typename T>
Streams<T> advanced(const Streams<T>& at, const Dim& dim, int64_t n) {
  return {at.x + n * dim.x, at.y + n * dim.y, at.residual + n * dim.residual, at.bias + n * dim.bias};
}

using Kernel = void (*)(const KernelArgs&);

// Whether the dimension has this stride in all tensors.
inline bool has_stride(const Dim& dim, int64_t distance) {
  return dim.x == distance && dim.y == distance && dim.residual == distance && dim.bias == distance;
}

// Rows of consecutive elements, in elements: element (r, c) is read at r * x + c, written at r * y + c, and has index
// start + r * index + c. These are the most common windows: a dense tensor is one row, a slice of columns has many.
struct Rows {
  int64_t count, length, x, y, index, residual, bias;
};

// The dimensions as Rows, if they have that form.
inline std::optional<Rows> as_rows(const std::vector<Dim>& dims) {
  const Dim& inner = dims[0];
  if (dims.size() > 2 || !has_stride(inner, 1) || inner.index != 1) return std::nullopt;
  if (dims.size() == 1) return Rows{1, inner.size, 0, 0, 0, 0, 0};
  const Dim& outer = dims[1];
  return Rows{outer.size, inner.size, outer.x, outer.y, outer.index, outer.residual, outer.bias};
}

// The number of the dimension along which indices are consecutive, if it is not the innermost one in memory and has a
// block of elements or more. Example: a gradient whose layout differs from forward's.
inline std::optional<size_t> consecutive_dim(const std::vector<Dim>& dims) {
  if (dims[0].index <= 1) return std::nullopt;
  for (size_t d = 1; d < dims.size(); ++d) {
    if (dims[d].index == 1 && dims[d].size >= kBlock) return d;
  }
  return std::nullopt;
}

// Whether x is dense: its elements fill one stretch of memory without overlap, in any order of its dimensions.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline std::vector<int64_t> row_major(const Tensor& x) {
  std::vector<int64_t> strides(x.dim());
  int64_t stride = 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(x.size(d), 1);
  }
  return strides;
}

// The dtype, shape and device of a tensor, for error messages: "Float (2, 3) on cuda:0".
inline std::string describe(const Tensor& x) {
  std::string shape;
  for (int64_t d = 0; d < x.dim(); ++d) shape += (d ? ", " : "") + std::to_string(x.size(d));
  if (x.dim() == 1) shape += ",";
  const std::string device =
      x.is_cpu() ? "cpu" : (x.is_cuda() ? "cuda:" : "device ") + std::to_string(x.get_device_index());
  return std::string(torch::headeronly::toString(x.scalar_type())) + " (" + shape + ") on " + device;
}

// Raises an error if start or an index stride is negative, if there is not one stride for each dimension, or if the
// largest element index is 2^63 or more. Empty tensors are checked too.
inline void check_window(const Tensor& x, int64_t start, const OptionalStrides& index_strides) {
  STD_TORCH_CHECK(start >= 0, "start has to be 0 or more, but got ", start);
  if (!index_strides) {
    STD_TORCH_CHECK(start <= INT64_MAX - std::max<int64_t>(x.numel() - 1, 0),
                    "the largest element index has to be below 2**63, but start is ", start, " with ", x.numel(),
                    " elements");
    return;
  }
  STD_TORCH_CHECK(static_cast<int64_t>(index_strides->size()) == x.dim(), "index_strides needs one stride for each of ",
                  x.dim(), " dimensions, but got ", index_strides->size());
  int64_t last = start;
  for (int64_t d = 0; d < x.dim(); ++d) {
    const int64_t stride = (*index_strides)[d];
    STD_TORCH_CHECK(stride >= 0, "index_strides have to be 0 or more, but got ", stride);
    int64_t span = 0;
    const bool overflow = __builtin_mul_overflow(stride, std::max<int64_t>(x.size(d) - 1, 0), &span) ||
                          __builtin_add_overflow(last, span, &last);
    STD_TORCH_CHECK(!overflow, "the largest element index has to be below 2**63, but start is ", start,
                    " and the index stride of dimension ", d, " is ", stride, " with ", x.size(d), " elements");
  }
}

// The dimensions for KernelArgs, merged and in the order of y's strides. x, y and the residual have the same shape,
// which is not empty; the bias has the size of x's last dimension. Without index strides the indices follow the memory
// order of a dense x, and are row-major otherwise.
inline std::vector<Dim> merged_dims(const Tensor& x, const Tensor& y, const OptionalStrides& index_strides,
                                    const Tensor* residual = nullptr, const Tensor* bias = nullptr) {
  const bool contiguous = x.is_contiguous() && y.is_contiguous() && (!residual || residual->is_contiguous());
  if (!index_strides && contiguous && !bias) return {{x.numel(), 1, 1, 1}};
  const bool by_memory = !index_strides && is_dense(x);
  const std::vector<int64_t> by_shape = index_strides || by_memory ? std::vector<int64_t>{} : row_major(x);
  std::vector<Dim> dims;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    const int64_t index = index_strides ? (*index_strides)[d] : by_memory ? x.stride(d) : by_shape[d];
    if (x.size(d) == 1) continue;
    dims.push_back({x.size(d), x.stride(d), y.stride(d), index});
    if (residual) dims.back().residual = residual->stride(d);
    if (bias) dims.back().bias = d == x.dim() - 1 ? bias->stride(0) : 0;
  }
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.y < b.y; });
  size_t last = 0;
  for (size_t d = 1; d < dims.size(); ++d) {
    Dim& inner = dims[last];
    const Dim& outer = dims[d];
    const auto continues = [&](int64_t Dim::* stride) { return outer.*stride == inner.*stride * inner.size; };
    const auto strides = {&Dim::x, &Dim::y, &Dim::index, &Dim::residual, &Dim::bias};
    if (std::all_of(strides.begin(), strides.end(), continues)) {
      inner.size *= outer.size;
    } else {
      dims[++last] = outer;
    }
  }
  if (dims.empty()) return {{1, 1, 1, 1}};
  dims.resize(last + 1);
  return dims;
}

// Checks the key, p and the range of the indices, and fills KernelArgs except for x, y and dims. Does not read the
// key's values: on a GPU that would wait for the device.
inline KernelArgs checked_args(const Tensor& x, ScalarType dtype, double p, const Tensor& key, int64_t start,
                               const OptionalStrides& index_strides, std::optional<double> scale) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "dropout probability has to be between 0 and 1, but got ", p);
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::UInt64 && key.dim() == 1 && key.size(0) == 2,
                  "a key has to be a uint64 tensor of shape (2,), [seed, offset], but is ", describe(key));
  STD_TORCH_CHECK(key.is_cpu() || (key.is_cuda() && x.is_cuda() && key.get_device_index() == x.get_device_index()),
                  "a key has to be on the CPU or on the input's device, but is ", describe(key), " for an input ",
                  describe(x));
  check_window(x, start, index_strides);
  return {nullptr,
          nullptr,
          dtype,
          {},
          x.numel(),
          key.is_contiguous() ? key : torch::stable::contiguous(key),
          p,
          scale ? *scale : fused_dropout::scale(p),
          static_cast<uint64_t>(start),
          x.get_device_index()};
}

inline void check_dtype(ScalarType t) {
  STD_TORCH_CHECK(
      t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16,
      "fused_dropout takes float32, float64, float16 and bfloat16, but got ", torch::headeronly::toString(t));
}

// The dtype as the number that LibTorch's C functions take.
inline int32_t dtype_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Raises an error with torch's message if a call into torch failed, most often for lack of memory. The error's class is
// lost here; the callers of the operators, eager.cpp and operators.py, restore it.
inline void check_torch(AOTITorchError code) {
  if (code == AOTI_TORCH_SUCCESS) return;
  const char* (*get_message)() = &torch_exception_get_what_without_backtrace;
  throw std::runtime_error(get_message ? get_message()
                                       : "fused_dropout: a call into torch failed, most likely for lack of memory");
}

// A new tensor of x's shape and device.
inline Tensor empty_strided(const Tensor& x, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle y = nullptr;
  int32_t device_type = 0;
  check_torch(aoti_torch_get_device_type(x.get(), &device_type));
  check_torch(aoti_torch_empty_strided(x.dim(), x.sizes().data(), strides, dtype_code(dtype), device_type,
                                       x.get_device_index(), &y));
  return Tensor(y);
}

// The same as torch.empty_like. For a dense tensor, which is the usual case, it avoids the look-up of that operator by
// name.
inline Tensor empty_like(const Tensor& x, ScalarType dtype) {
  using torch::stable::detail::from;
  if (is_dense(x)) return empty_strided(x, x.strides().data(), dtype);
  std::array<StableIValue, 6> stack{
      from(x),           from(std::optional(dtype)), from(std::nullopt), from(std::nullopt), from(std::nullopt),
      from(std::nullopt)};
  check_torch(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A new tensor with the layout of a + b, for a and b of one shape and dtype. Follows torch's TensorIterator: it sorts
// the dimensions by the strides of a, then by those of b. If they are equal, the smaller dimension becomes the inner
// one.
inline Tensor empty_like_sum(const Tensor& a, const Tensor& b) {
  const bool same = std::equal(a.strides().begin(), a.strides().end(), b.strides().begin());
  if (a.is_contiguous() && b.is_contiguous()) return empty_strided(a, row_major(a).data(), a.scalar_type());
  if (same && is_dense(a)) return empty_strided(a, a.strides().data(), a.scalar_type());
  // 1 if dimension p has to be inside dimension q, -1 if outside, 0 if the strides do not decide.
  const auto inside = [&](int64_t p, int64_t q) {
    for (const Tensor* t : {&a, &b}) {
      if (t->stride(p) == 0 || t->stride(q) == 0) continue;
      if (t->stride(p) != t->stride(q)) return t->stride(p) < t->stride(q) ? 1 : -1;
      if (t->size(p) > t->size(q)) return -1;
    }
    return 0;
  };
  std::vector<int64_t> order;  // from the innermost outwards
  for (int64_t d = a.dim() - 1; d >= 0; --d) {
    order.push_back(d);
    for (size_t moving = order.size() - 1, other = moving; other-- > 0;) {
      const int where = inside(order[other], order[moving]);
      if (where > 0) break;
      if (where < 0) {
        std::swap(order[other], order[moving]);
        moving = other;
      }
    }
  }
  std::vector<int64_t> strides(a.dim());
  int64_t stride = 1;
  for (const int64_t d : order) {
    strides[d] = stride;
    stride *= std::max<int64_t>(a.size(d), 1);
  }
  return empty_strided(a, strides.data(), a.scalar_type());
}

// The operation, and the tensors besides x that it reads.
struct ExtraInputs {
  Operation operation = Operation::kDrop;
  const Tensor *residual = nullptr, *bias = nullptr;
};

// Raises an error if the other tensors do not have x's dtype and device, or a shape that fits x.
inline void check_extra_inputs(const Tensor& x, const ExtraInputs& extra) {
  for (const Tensor* other : {extra.residual, extra.bias}) {
    STD_TORCH_CHECK(!other || (other->scalar_type() == x.scalar_type() && other->is_cuda() == x.is_cuda() &&
                               other->get_device_index() == x.get_device_index()),
                    "all tensors have to have one dtype and one device, but x is ", describe(x), " and another is ",
                    describe(*other));
  }
  STD_TORCH_CHECK(!extra.residual || (extra.residual->dim() == x.dim() &&
                                      std::equal(x.sizes().begin(), x.sizes().end(), extra.residual->sizes().begin())),
                  "the residual has to have the shape of x, but is ", describe(*extra.residual), " for x ",
                  describe(x));
  STD_TORCH_CHECK(!extra.bias || (x.dim() > 0 && extra.bias->dim() == 1 && extra.bias->size(0) == x.size(-1)),
                  "the bias has to have the shape of x's last dimension, but is ", describe(*extra.bias), " for x ",
                  describe(x));
}

// Runs the kernel from x to y. The arguments are checked, and x is not empty.
template <Kernel run>
void run_operation(KernelArgs& args, const Tensor& x, const Tensor& y, const OptionalStrides& index_strides,
                   const ExtraInputs& extra) {
  args.dims = merged_dims(x, y, index_strides, extra.residual, extra.bias);
  args.operation = extra.operation;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  if (extra.residual) args.residual = extra.residual->const_data_ptr();
  if (extra.bias) args.bias = extra.bias->const_data_ptr();
  run(args);
}

template <Kernel run>
void run_in_place(const Tensor& x, double p, const Tensor& key, int64_t start, const OptionalStrides& index_strides,
                  std::optional<double> scale, const ExtraInputs& extra) {
  check_dtype(x.scalar_type());
  check_extra_inputs(x, extra);
  KernelArgs args = checked_args(x, x.scalar_type(), p, key, start, index_strides, scale);
  if (x.numel() == 0) return;
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.stride(d) != 0 || x.size(d) == 1,
                    "unsupported operation: more than one element of the written-to tensor refers to ",
                    "a single memory location. Please clone() the tensor before performing the operation.");
  }
  run_operation<run>(args, x, x, index_strides, extra);
}

template <Kernel run>
Tensor run_out_of_place(const Tensor& x, double p, const Tensor& key, int64_t start,
                        const OptionalStrides& index_strides, std::optional<double> scale, const ExtraInputs& extra) {
  check_dtype(x.scalar_type());
  check_extra_inputs(x, extra);
  KernelArgs args = checked_args(x, x.scalar_type(), p, key, start, index_strides, scale);
  Tensor y = extra.residual ? empty_like_sum(*extra.residual, x) : empty_like(x, x.scalar_type());
  if (x.numel() != 0) run_operation<run>(args, x, y, index_strides, extra);
  return y;
}

template <Kernel run>
void apply_(const Tensor& x, double p, const Tensor& key, int64_t start, const OptionalStrides& index_strides,
            std::optional<double> scale) {
  run_in_place<run>(x, p, key, start, index_strides, scale, {});
}

template <Kernel run>
Tensor apply(const Tensor& x, double p, const Tensor& key, int64_t start, const OptionalStrides& index_strides,
             std::optional<double> scale) {
  return run_out_of_place<run>(x, p, key, start, index_strides, scale, {});
}

inline ExtraInputs residual_and_bias(const Tensor& residual, const std::optional<Tensor>& bias) {
  return {bias ? Operation::kBiasDropAdd : Operation::kDropAdd, &residual, bias ? &*bias : nullptr};
}

template <Kernel run>
void dropout_add_(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& bias, double p,
                  const Tensor& key, int64_t start, const OptionalStrides& index_strides, std::optional<double> scale) {
  run_in_place<run>(x, p, key, start, index_strides, scale, residual_and_bias(residual, bias));
}

template <Kernel run>
Tensor dropout_add(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& bias, double p,
                   const Tensor& key, int64_t start, const OptionalStrides& index_strides,
                   std::optional<double> scale) {
  return run_out_of_place<run>(x, p, key, start, index_strides, scale, residual_and_bias(residual, bias));
}

template <Kernel run>
void relu_dropout_(const Tensor& x, double p, const Tensor& key, int64_t start, const OptionalStrides& index_strides,
                   std::optional<double> scale) {
  run_in_place<run>(x, p, key, start, index_strides, scale, {Operation::kReluDrop});
}

template <Kernel run>
Tensor relu_dropout(const Tensor& x, double p, const Tensor& key, int64_t start, const OptionalStrides& index_strides,
                    std::optional<double> scale) {
  return run_out_of_place<run>(x, p, key, start, index_strides, scale, {Operation::kReluDrop});
}

// The backward pass of relu_dropout. It needs no key and no window: a gradient passes where forward's output is not 0
// or less. Visits all elements as one row, so tensors of other layouts are copied first.
template <Kernel run>
Tensor relu_dropout_backward(const Tensor& gradient, const Tensor& output, double scale) {
  check_dtype(gradient.scalar_type());
  check_extra_inputs(gradient, {Operation::kGate, &output});
  const auto gradient_strides = gradient.strides(), output_strides = output.strides();
  if (!is_dense(gradient) || !std::equal(gradient_strides.begin(), gradient_strides.end(), output_strides.begin())) {
    if (!gradient.is_contiguous() || !output.is_contiguous()) {
      return relu_dropout_backward<run>(torch::stable::contiguous(gradient), torch::stable::contiguous(output), scale);
    }
  }
  const Tensor y = empty_like(gradient, gradient.scalar_type());
  if (y.numel() == 0) return y;
  KernelArgs args{gradient.const_data_ptr(),
                  y.mutable_data_ptr(),
                  y.scalar_type(),
                  {{y.numel(), 1, 1, 1}},
                  y.numel(),
                  Tensor(),
                  0.0,
                  scale,
                  0,
                  y.get_device_index(),
                  Operation::kGate,
                  output.const_data_ptr()};
  run(args);
  return y;
}

template <Kernel run>
Tensor keep_mask(const Tensor& x, double p, const Tensor& key, int64_t start, const OptionalStrides& index_strides) {
  KernelArgs args = checked_args(x, ScalarType::Bool, p, key, start, index_strides, std::nullopt);
  Tensor mask = empty_like(x, ScalarType::Bool);
  if (x.numel() == 0) return mask;
  // The values of x are not read, so x may be a single element that is expanded to a shape. Without index strides the
  // numbering follows x, not the new mask: memory order for a dense x, row-major order otherwise.
  const bool by_memory = index_strides || is_dense(x);
  args.dims = merged_dims(mask, mask, by_memory ? index_strides : OptionalStrides(row_major(x)));
  args.y = mask.mutable_data_ptr();
  run(args);
  return mask;
}

// Registers the operators of fused_dropout/operators.py for the device of the kernel `run`.
template <Kernel run>
void register_operators(torch::stable::detail::StableLibrary& library) {
  library.impl("apply", TORCH_BOX(&apply<run>));
  library.impl("apply_", TORCH_BOX(&apply_<run>));
  library.impl("keep_mask", TORCH_BOX(&keep_mask<run>));
  library.impl("dropout_add", TORCH_BOX(&dropout_add<run>));
  library.impl("dropout_add_", TORCH_BOX(&dropout_add_<run>));
  library.impl("relu_dropout", TORCH_BOX(&relu_dropout<run>));
  library.impl("relu_dropout_", TORCH_BOX(&relu_dropout_<run>));
  library.impl("relu_dropout_backward", TORCH_BOX(&relu_dropout_backward<run>));
}

}  // namespace fused_dropout
