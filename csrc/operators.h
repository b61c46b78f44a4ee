// The operators, whatever the device: what they check, what they allocate, and how a tensor and a window of indices
// become the dimensions that the kernels work on. Only LibTorch's stable ABI: one binary serves every torch from 2.11
// on.
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
#include <utility>
#include <vector>

// The message of the last call that failed. torch 2.11 does not have this function.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fused_dropout {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Strides = std::optional<std::vector<int64_t>>;

// A dimension of the elements that a kernel visits: its size, and how far apart neighbours are in x, in y, in the
// element index, and in what an operation reads besides, counted in elements. All elements have one index where index
// is 0. What an operation does not read stands at x.
struct Dim {
  int64_t size, x, y, index, residual = x, bias = x;
};

// A generator under CUDA graph capture: where each replay finds its seed and its Philox offset on the device, and what
// the capture had drawn before.
struct CapturedGenerator {
  uint64_t seed, offset, intragraph;
};

// What a kernel is given.
struct KernelArgs {
  const void* x;
  void* y;           // may be x
  ScalarType dtype;  // Bool: the mask is written, one byte an element, and x is not read
  // From the innermost in y outwards, at least one. Neighbours are merged where all that a dimension counts continues.
  std::vector<Dim> dims;
  int64_t numel;
  Tensor key;       // uint64, shape (2,), contiguous: on the CPU, or on y's device
  double p, scale;  // scale: of kept elements
  uint64_t start;   // the index of the first element
  int device;
  Operation operation = Operation::kDrop;
  const void *residual = nullptr, *bias = nullptr;
};

template <typename T>
Streams<T> streams_of(const KernelArgs& args) {
  T* y = static_cast<T*>(args.y);
  // A mask has no x: its own memory is read in the place of one, and ignored.
  const T* x = args.x ? static_cast<const T*>(args.x) : y;
  const auto or_x = [x](const void* stream) { return stream ? static_cast<const T*>(stream) : x; };
  return {x, y, or_x(args.residual), or_x(args.bias)};
}

// n steps along a dimension.
template <typename T>
Streams<T> step(const Streams<T>& at, const Dim& dim, int64_t n) {
  return {at.x + n * dim.x, at.y + n * dim.y, at.residual + n * dim.residual, at.bias + n * dim.bias};
}

using Kernel = void (*)(const KernelArgs&);

// Whether neighbours along the dimension are `distance` apart in all tensors.
inline bool is_apart(const Dim& dim, int64_t distance) {
  return dim.x == distance && dim.y == distance && dim.residual == distance && dim.bias == distance;
}

// Element (r, c) is read at r * x + c, written at r * y + c, and has index start + r * index + c. The commonest
// windows: dense tensors are one row, slices of columns are many.
struct Rows {
  int64_t count, length, x, y, index, residual, bias;
};

inline std::optional<Rows> as_rows(const std::vector<Dim>& dims) {
  const Dim& inner = dims[0];
  if (dims.size() > 2 || !is_apart(inner, 1) || inner.index != 1) return std::nullopt;
  if (dims.size() == 1) return Rows{1, inner.size, 0, 0, 0, 0, 0};
  const Dim& outer = dims[1];
  return Rows{outer.size, inner.size, outer.x, outer.y, outer.index, outer.residual, outer.bias};
}

// The dimension whose indices are consecutive, if it is not the innermost one in memory. Example: a gradient whose
// layout differs from forward's.
inline std::optional<size_t> consecutive_dim(const std::vector<Dim>& dims) {
  if (dims[0].index <= 1) return std::nullopt;
  for (size_t d = 1; d < dims.size(); ++d) {
    if (dims[d].index == 1 && dims[d].size >= kBlock) return d;
  }
  return std::nullopt;
}

// A dense, non-overlapping tensor fills one stretch of memory, in whatever order of its dimensions.
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

// Refuses index strides that are negative or too few or too many, and windows whose largest index is 2^63 or more.
inline void check_window(const Tensor& x, int64_t start, const Strides& index_strides) {
  STD_TORCH_CHECK(start >= 0, "start has to be 0 or more, but got ", start);
  if (!index_strides) {
    STD_TORCH_CHECK(start <= INT64_MAX - std::max<int64_t>(x.numel() - 1, 0),
                    "the largest element index has to be below 2**63");
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
    STD_TORCH_CHECK(!overflow, "the largest element index has to be below 2**63");
  }
}

// The dimensions of x, y and the residual (of one shape, not empty) in the order of y's memory, merged. The bias has
// x's last dimension.
inline std::vector<Dim> dims_of(const Tensor& x, const Tensor& y, const Strides& index_strides,
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

// Checks the key and the ranges of p and of the indices; none of it reads the GPU's memory. y and dims are left open.
inline KernelArgs checked_args(const Tensor& x, ScalarType dtype, double p, const Tensor& key, int64_t start,
                               const Strides& index_strides, std::optional<double> scale) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "dropout probability has to be between 0 and 1, but got ", p);
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::UInt64 && key.dim() == 1 && key.size(0) == 2,
                  "a key is a uint64 tensor of shape (2,): [seed, offset]");
  STD_TORCH_CHECK(key.is_cpu() || (key.is_cuda() && x.is_cuda() && key.get_device_index() == x.get_device_index()),
                  "a key has to be on the CPU or on the input's own device");
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

inline int32_t dtype_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Raises torch's message if a call failed, most often for lack of memory. The error's class is lost here. The callers
// of the operators, eager.cpp and operators.py, restore it.
inline void check_torch(AOTITorchError code) {
  if (code == AOTI_TORCH_SUCCESS) return;
  const char* (*what)() = &torch_exception_get_what_without_backtrace;
  throw std::runtime_error(what ? what() : "fused_dropout: a call into torch failed, most likely for lack of memory");
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

// What torch.empty_like gives; for a dense tensor, the usual case, without a look-up of that operator by its name.
inline Tensor empty_like(const Tensor& x, ScalarType dtype) {
  using torch::stable::detail::from;
  if (is_dense(x)) return empty_strided(x, x.strides().data(), dtype);
  std::array<StableIValue, 6> stack{
      from(x),           from(std::optional(dtype)), from(std::nullopt), from(std::nullopt), from(std::nullopt),
      from(std::nullopt)};
  check_torch(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A new tensor like the sum of two of one shape and dtype. As torch's TensorIterator decides it: the dimensions are
// sorted by the strides of the first, then of the second; of two that tie, the smaller is inside.
inline Tensor empty_like_sum(const Tensor& a, const Tensor& b) {
  const bool same = std::equal(a.strides().begin(), a.strides().end(), b.strides().begin());
  if (a.is_contiguous() && b.is_contiguous()) return empty_strided(a, row_major(a).data(), a.scalar_type());
  if (same && is_dense(a)) return empty_strided(a, a.strides().data(), a.scalar_type());
  // Whether dimension p is inside of q, 1, or outside, -1; 0 if nothing says so.
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

// The tensors of an operation besides the first one, which they fit.
struct Others {
  Operation operation = Operation::kDrop;
  const Tensor *residual = nullptr, *bias = nullptr;
};

inline void check_others(const Tensor& x, const Others& others) {
  for (const Tensor* other : {others.residual, others.bias}) {
    STD_TORCH_CHECK(!other || (other->scalar_type() == x.scalar_type() && other->is_cuda() == x.is_cuda() &&
                               other->get_device_index() == x.get_device_index()),
                    "all tensors need one dtype and one device");
  }
  STD_TORCH_CHECK(
      !others.residual || (others.residual->dim() == x.dim() &&
                           std::equal(x.sizes().begin(), x.sizes().end(), others.residual->sizes().begin())),
      "the residual needs the shape of x");
  STD_TORCH_CHECK(!others.bias || (x.dim() > 0 && others.bias->dim() == 1 && others.bias->size(0) == x.size(-1)),
                  "the bias needs the last dimension of x");
}

// Runs an operation from x to y, whose arguments are checked. x is not empty.
template <Kernel run>
void run_operation(KernelArgs& args, const Tensor& x, const Tensor& y, const Strides& index_strides,
                   const Others& others) {
  args.dims = dims_of(x, y, index_strides, others.residual, others.bias);
  args.operation = others.operation;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  if (others.residual) args.residual = others.residual->const_data_ptr();
  if (others.bias) args.bias = others.bias->const_data_ptr();
  run(args);
}

template <Kernel run>
void run_in_place(const Tensor& x, double p, const Tensor& key, int64_t start, const Strides& index_strides,
                  std::optional<double> scale, const Others& others) {
  check_dtype(x.scalar_type());
  check_others(x, others);
  KernelArgs args = checked_args(x, x.scalar_type(), p, key, start, index_strides, scale);
  if (x.numel() == 0) return;
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.stride(d) != 0 || x.size(d) == 1,
                    "unsupported operation: more than one element of the written-to tensor refers to ",
                    "a single memory location. Please clone() the tensor before performing the operation.");
  }
  run_operation<run>(args, x, x, index_strides, others);
}

template <Kernel run>
Tensor run_out_of_place(const Tensor& x, double p, const Tensor& key, int64_t start, const Strides& index_strides,
                        std::optional<double> scale, const Others& others) {
  check_dtype(x.scalar_type());
  check_others(x, others);
  KernelArgs args = checked_args(x, x.scalar_type(), p, key, start, index_strides, scale);
  Tensor y = others.residual ? empty_like_sum(*others.residual, x) : empty_like(x, x.scalar_type());
  if (x.numel() != 0) run_operation<run>(args, x, y, index_strides, others);
  return y;
}

template <Kernel run>
void apply_(const Tensor& x, double p, const Tensor& key, int64_t start, const Strides& index_strides,
            std::optional<double> scale) {
  run_in_place<run>(x, p, key, start, index_strides, scale, {});
}

template <Kernel run>
Tensor apply(const Tensor& x, double p, const Tensor& key, int64_t start, const Strides& index_strides,
             std::optional<double> scale) {
  return run_out_of_place<run>(x, p, key, start, index_strides, scale, {});
}

inline Others residual_and_bias(const Tensor& residual, const std::optional<Tensor>& bias) {
  return {bias ? Operation::kBiasDropAdd : Operation::kDropAdd, &residual, bias ? &*bias : nullptr};
}

template <Kernel run>
void dropout_add_(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& bias, double p,
                  const Tensor& key, int64_t start, const Strides& index_strides, std::optional<double> scale) {
  run_in_place<run>(x, p, key, start, index_strides, scale, residual_and_bias(residual, bias));
}

template <Kernel run>
Tensor dropout_add(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& bias, double p,
                   const Tensor& key, int64_t start, const Strides& index_strides, std::optional<double> scale) {
  return run_out_of_place<run>(x, p, key, start, index_strides, scale, residual_and_bias(residual, bias));
}

template <Kernel run>
void relu_dropout_(const Tensor& x, double p, const Tensor& key, int64_t start, const Strides& index_strides,
                   std::optional<double> scale) {
  run_in_place<run>(x, p, key, start, index_strides, scale, {Operation::kReluDrop});
}

template <Kernel run>
Tensor relu_dropout(const Tensor& x, double p, const Tensor& key, int64_t start, const Strides& index_strides,
                    std::optional<double> scale) {
  return run_out_of_place<run>(x, p, key, start, index_strides, scale, {Operation::kReluDrop});
}

// Without key and window: the output tells which elements pass. Works on one row.
template <Kernel run>
Tensor relu_dropout_backward(const Tensor& gradient, const Tensor& output, double scale) {
  check_dtype(gradient.scalar_type());
  check_others(gradient, {Operation::kGate, &output});
  const auto own = gradient.strides(), others = output.strides();
  if (!is_dense(gradient) || !std::equal(own.begin(), own.end(), others.begin())) {
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
Tensor keep_mask(const Tensor& x, double p, const Tensor& key, int64_t start, const Strides& index_strides) {
  KernelArgs args = checked_args(x, ScalarType::Bool, p, key, start, index_strides, std::nullopt);
  Tensor mask = empty_like(x, ScalarType::Bool);
  if (x.numel() == 0) return mask;
  // The elements of x are not read: one that stands for all, expanded to x's shape, is x enough.
  const bool by_memory = index_strides || is_dense(x);
  args.dims = dims_of(mask, mask, by_memory ? index_strides : Strides(row_major(x)));
  args.y = mask.mutable_data_ptr();
  run(args);
  return mask;
}

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
