// The operators, whatever the device: what they check, what they allocate, and how a tensor becomes the rows that the
// kernels work on. Only LibTorch's stable ABI: one binary serves every torch from 2.11 on.
#pragma once

#include "mask.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

namespace fused_dropout {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Element (r, c) is read at r * x_stride + c, written at r * y_stride + c, and has index start + r * pitch + c.
struct Rows {
  int64_t count, length, x_stride, y_stride, pitch;
};

// A mask of a smaller shape, broadcast over x: the dimensions of a dense x as they lie in memory, innermost first, and
// how far apart in the mask their elements are, 0 where all have the same one.
struct Noise {
  struct Dim {
    int64_t size, stride;
  };
  std::vector<Dim> dims;
  int64_t numel;  // of the mask
};

// What a kernel is given. A mask is written (one byte an element, x unused) where dtype is Bool.
struct Job {
  const void* x;
  void* y;
  ScalarType dtype;
  Rows rows;
  std::optional<Noise> noise;  // then x and y are one row
  Tensor key;
  double p, scale;
  uint64_t start;
  int device;
  int64_t numel() const { return rows.count * rows.length; }
};

using Kernel = void (*)(const Job&);

struct Dim {
  int64_t size, stride;
};

// The dimensions that matter for an address: those of more than one element.
inline std::vector<Dim> dims_of(const Tensor& x) {
  std::vector<Dim> dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1) dims.push_back({x.size(d), x.stride(d)});
  }
  return dims;
}

// A dense, non-overlapping tensor fills one stretch of memory, in whatever order of its dimensions.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  std::vector<Dim> dims = dims_of(x);
  std::sort(dims.begin(), dims.end(), [](Dim a, Dim b) { return a.stride < b.stride; });
  int64_t expected = 1;
  for (const Dim& dim : dims) {
    if (dim.stride != expected) return false;
    expected *= dim.size;
  }
  return true;
}

// A row-major tensor whose rows lie one fixed stride apart: a slice of columns, one of q, k, v beside each other.
// Shorter rows than a block would draw each word several times over; those tensors are copied instead.
inline std::optional<Rows> strided_rows(const Tensor& x) {
  const std::vector<Dim> dims = dims_of(x);
  auto dim = dims.rbegin();
  int64_t length = 1;
  for (; dim != dims.rend() && dim->stride == length; ++dim) length *= dim->size;
  if (dim == dims.rend() || length < kBlock) return std::nullopt;
  const int64_t stride = dim->stride;
  int64_t count = 1;
  for (; dim != dims.rend() && dim->stride == stride * count; ++dim) count *= dim->size;
  if (dim != dims.rend()) return std::nullopt;
  return Rows{count, length, stride, stride, length};
}

inline Rows one_row(int64_t numel) {
  return {1, numel, numel, numel, numel};
}

// Checks shape, dtype and device of the key, and the ranges of p and start; none of it reads the GPU's memory.
// Pointers and rows are for the caller to fill in; what stands here is for a dense tensor.
inline Job job_for(const Tensor& x, ScalarType dtype, double p, const Tensor& key, int64_t start) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "dropout probability has to be between 0 and 1, but got ", p);
  STD_TORCH_CHECK(start >= 0, "start has to be 0 or more, but got ", start);
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::UInt64 && key.dim() == 1 && key.size(0) == 2,
                  "a key is a uint64 tensor of shape (2,): [seed, offset]");
  STD_TORCH_CHECK(key.is_cpu() || (key.is_cuda() && x.is_cuda() && key.get_device_index() == x.get_device_index()),
                  "a key has to be on the CPU or on the input's own device");
  return {nullptr,
          nullptr,
          dtype,
          one_row(x.numel()),
          std::nullopt,
          key.is_contiguous() ? key : torch::stable::contiguous(key),
          p,
          scale(p),
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

// What torch.empty_like gives; for a dense tensor, the usual case, without a look-up of that operator by its name.
inline Tensor empty_like(const Tensor& x, ScalarType dtype) {
  using torch::stable::detail::from;
  if (is_dense(x)) {
    AtenTensorHandle y = nullptr;
    int32_t device_type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), x.sizes().data(), x.strides().data(), dtype_code(dtype),
                                                    device_type, x.get_device_index(), &y));
    return Tensor(y);
  }
  std::array<StableIValue, 6> stack{
      from(x),           from(std::optional(dtype)), from(std::nullopt), from(std::nullopt), from(std::nullopt),
      from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline void check_writable(const Tensor& x) {
  for (const Dim& dim : dims_of(x)) {
    STD_TORCH_CHECK(dim.stride != 0, "unsupported operation: more than one element of the written-to tensor refers to ",
                    "a single memory location. Please clone() the tensor before performing the operation.");
  }
}

template <Kernel run>
void apply_(const Tensor& x, double p, const Tensor& key, int64_t start) {
  check_dtype(x.scalar_type());
  Job job = job_for(x, x.scalar_type(), p, key, start);
  if (x.numel() == 0) return;
  check_writable(x);
  const bool dense = is_dense(x);
  const std::optional<Rows> rows = dense ? one_row(x.numel()) : strided_rows(x);
  const Tensor y = rows ? x : torch::stable::contiguous(x);
  if (rows) job.rows = *rows;
  job.x = job.y = y.mutable_data_ptr();
  run(job);
  Tensor out = x;
  if (!rows) torch::stable::copy_(out, y);
}

template <Kernel run>
Tensor apply(const Tensor& x, double p, const Tensor& key, int64_t start) {
  check_dtype(x.scalar_type());
  Job job = job_for(x, x.scalar_type(), p, key, start);
  Tensor y = empty_like(x, x.scalar_type());
  if (x.numel() == 0) return y;
  const std::optional<Rows> rows = is_dense(x) ? one_row(x.numel()) : strided_rows(x);
  if (!rows || (!is_dense(x) && !y.is_contiguous())) {
    const Tensor row_major = torch::stable::contiguous(x);
    apply_<run>(row_major, p, job.key, start);
    return torch::stable::copy_(y, row_major);
  }
  job.rows = *rows;
  job.rows.y_stride = rows->length;
  job.x = x.const_data_ptr();
  job.y = y.mutable_data_ptr();
  run(job);
  return y;
}

template <Kernel run>
Tensor keep_mask(const Tensor& x, double p, const Tensor& key, int64_t start) {
  Job job = job_for(x, ScalarType::Bool, p, key, start);
  Tensor mask = empty_like(x, ScalarType::Bool);
  if (x.numel() == 0) return mask;
  const bool in_place = is_dense(x) || mask.is_contiguous();
  const Tensor row_major = in_place ? mask : torch::stable::contiguous(mask);
  job.y = row_major.mutable_data_ptr();
  run(job);
  return in_place ? mask : torch::stable::copy_(mask, row_major);
}

// The mask's elements are numbered row-major in the noise's shape, whatever the layout of x.
inline Noise noise_of(const Tensor& x, const std::vector<int64_t>& noise_shape) {
  STD_TORCH_CHECK(static_cast<int64_t>(noise_shape.size()) == x.dim(), "noise_shape needs a size for each dimension");
  std::vector<std::pair<int64_t, Noise::Dim>> dims;  // with the stride in x
  int64_t numel = 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    const int64_t size = noise_shape[d];
    STD_TORCH_CHECK(size == 1 || size == x.size(d), "each size of noise_shape has to be 1 or the input's");
    if (x.size(d) != 1) dims.push_back({x.stride(d), {x.size(d), size == 1 ? 0 : numel}});
    numel *= size;
  }
  std::sort(dims.begin(), dims.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Noise::Dim> merged = {{1, 0}};
  for (const auto& [stride, dim] : dims) {
    Noise::Dim& inner = merged.back();
    if (inner.size == 1) {
      inner = dim;
    } else if (dim.stride == inner.stride * inner.size) {
      inner.size *= dim.size;
    } else {
      merged.push_back(dim);
    }
  }
  return {std::move(merged), numel};
}

template <Kernel run>
void apply_broadcast_(const Tensor& x, double p, const Tensor& key, const std::vector<int64_t>& noise_shape,
                      double scale) {
  check_dtype(x.scalar_type());
  Job job = job_for(x, x.scalar_type(), p, key, 0);
  if (x.numel() == 0) return;
  check_writable(x);
  const bool dense = is_dense(x);
  const Tensor y = dense ? x : torch::stable::contiguous(x);
  job.noise = noise_of(y, noise_shape);
  job.scale = scale;
  job.x = job.y = y.mutable_data_ptr();
  run(job);
  Tensor out = x;
  if (!dense) torch::stable::copy_(out, y);
}

template <Kernel run>
Tensor apply_broadcast(const Tensor& x, double p, const Tensor& key, const std::vector<int64_t>& noise_shape,
                       double scale) {
  check_dtype(x.scalar_type());
  Job job = job_for(x, x.scalar_type(), p, key, 0);
  Tensor y = empty_like(x, x.scalar_type());
  if (x.numel() == 0) return y;
  if (!is_dense(x)) {
    torch::stable::copy_(y, x);
    apply_broadcast_<run>(y, p, job.key, noise_shape, scale);
    return y;
  }
  job.noise = noise_of(x, noise_shape);
  job.scale = scale;
  job.x = x.const_data_ptr();
  job.y = y.mutable_data_ptr();
  run(job);
  return y;
}

template <Kernel run>
void register_operators(torch::stable::detail::StableLibrary& library) {
  library.impl("apply", TORCH_BOX(&apply<run>));
  library.impl("apply_", TORCH_BOX(&apply_<run>));
  library.impl("keep_mask", TORCH_BOX(&keep_mask<run>));
  library.impl("apply_broadcast", TORCH_BOX(&apply_broadcast<run>));
  library.impl("apply_broadcast_", TORCH_BOX(&apply_broadcast_<run>));
}

}  // namespace fused_dropout
