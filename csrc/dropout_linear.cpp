// A linear layer after dropout, for the eager binding; fused_dropout/linear.py calls it. Autograd saves the input
// instead of its dropped copy. Backward computes that copy again from the key.
#include "eager.h"

#include <ATen/ExpandUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/function.h>

namespace fused_dropout::eager {
namespace {

// The gradients of a matrix product, by the same calls as in torch's autograd, so that the bits are the same. Each
// gradient has the layout of the matrix that it belongs to.
bool is_column_major(const Tensor& matrix) {
  return matrix.stride(0) == 1 && matrix.stride(1) == matrix.size(0);
}

Tensor gradient_of_first(const Tensor& gradient, const Tensor& second, bool first_is_column_major) {
  return first_is_column_major ? second.mm(gradient.t()).t() : gradient.mm(second.t());
}

Tensor gradient_of_second(const Tensor& gradient, const Tensor& first, bool second_is_column_major) {
  return second_is_column_major ? gradient.t().mm(first).t() : first.t().mm(gradient);
}

struct DropoutLinear : torch::autograd::Function<DropoutLinear> {
  // dtype: the dtype of the product, to which x, weight and bias are cast.
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Mask& mask, at::ScalarType dtype) {
    ctx->save_for_backward({x, x.requires_grad() ? weight : Tensor(), mask.key});
    auto& saved = ctx->saved_data;
    saved["p"] = mask.p;
    saved["key"] = mask.key;
    saved["dtype"] = static_cast<int64_t>(dtype);
    saved["weight_dtype"] = static_cast<int64_t>(weight.scalar_type());
    saved["column_major"] = is_column_major(weight.t());
    if (bias) saved["bias_dtype"] = static_cast<int64_t>(bias->scalar_type());
    const Tensor dropped = run_kernel(x.to(dtype), mask, false);
    return at::linear(dropped, weight.to(dtype), bias ? std::optional(bias->to(dtype)) : std::nullopt);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& gradients) {
    auto& data = ctx->saved_data;
    const auto dtype_of = [&](const char* name) { return static_cast<at::ScalarType>(data.at(name).toInt()); };
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const auto dtype = dtype_of("dtype");
    Mask mask{data.at("p").toDouble(), key_for_backward(data.at("key").toTensor(), saved[2]), std::nullopt,
              std::nullopt};
    // The indices of forward, because casts and products may have other layouts.
    mask.index_strides = x.is_non_overlapping_and_dense() ? x.strides().vec() : row_major(x.sizes());

    const Tensor& gradient = gradients[0];
    const auto as_matrix = [](const Tensor& t) { return t.dim() == 2 ? t : t.reshape({-1, t.size(-1)}); };
    const Tensor rows = as_matrix(gradient), dropped = as_matrix(apply_to_gradient(x.to(dtype), mask));
    Tensor dx, dbias;
    if (weight.defined()) {
      dx = gradient_of_first(rows, weight.to(dtype).t(), is_column_major(dropped)).view(x.sizes());
      dx = apply_to_gradient(dx, mask, true).to(x.scalar_type());
    }
    if (const auto found = data.find("bias_dtype"); found != data.end() && ctx->needs_input_grad(2)) {
      const Tensor& terms = gradient.dim() == 3 ? rows : gradient;
      dbias = at::sum_to(terms, at::IntArrayRef{terms.size(-1)}).to(dtype_of("bias_dtype"));
    }
    Tensor dweight = gradient_of_second(rows, dropped, data.at("column_major").toBool()).t();
    return {dx, dweight.to(dtype_of("weight_dtype")), dbias, Tensor(), Tensor()};
  }
};

}  // namespace

std::optional<Tensor> dropout_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double p,
                                     const std::optional<at::Generator>& generator, const std::optional<Tensor>& key) {
  // Without a gradient of the weight, autograd does not save the dropped copy, and two separate calls are as good. They
  // also serve an x that torch cannot view as a matrix.
  if (!at::GradMode::is_enabled() || !takes_fast_path(x) || !takes_fast_path(weight) || !weight.requires_grad() ||
      x.dim() < 2 || weight.dim() != 2 || x.numel() == 0 || x.size(-1) != weight.size(1) || p == 1 ||
      x.device() != weight.device() || !(x.is_contiguous() || x.dim() == 2)) {
    return std::nullopt;
  }
  if (bias && (!takes_fast_path(*bias) || bias->dim() != 1 || bias->scalar_type() != weight.scalar_type())) {
    return std::nullopt;
  }
  at::ScalarType dtype = weight.scalar_type();
  if (at::autocast::is_autocast_enabled(x.device().type())) {
    dtype = at::autocast::get_autocast_dtype(x.device().type());
    if (x.scalar_type() != dtype || weight.scalar_type() == at::kDouble) return std::nullopt;
  }
  Mask mask{p, Tensor(), std::nullopt, std::nullopt};
  set_key(mask, x, generator, key, true);
  return DropoutLinear::apply(x, weight, bias, mask, dtype);
}

}  // namespace fused_dropout::eager
