// Dropout with a residual (dropout_add) and dropout of a ReLU (relu_dropout), for the eager binding.
// fused_dropout/neighbours.py calls these functions, and does the same in Python without the binding.
#include "eager.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

namespace fused_dropout::eager {
namespace {

Tensor run_dropout_add(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& bias, const Mask& mask,
                       bool inplace) {
  using IndexStrides = at::OptionalSymIntArrayRef;
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, double, const Tensor&,
                           c10::SymInt, IndexStrides, std::optional<double>)>("fused_dropout::dropout_add");
  static const auto op_in_place =
      find_operator<void(const Tensor&, const Tensor&, const std::optional<Tensor>&, double, const Tensor&, c10::SymInt,
                         IndexStrides, std::optional<double>)>("fused_dropout::dropout_add_");
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto strides = strides_of(mask);
  if (!inplace) {
    return with_torch_error(
        x, [&] { return op.call(x, residual, bias, mask.p, mask.key, mask.start, strides, mask.scale); });
  }
  op_in_place.call(x, residual, bias, mask.p, mask.key, mask.start, strides, mask.scale);
  return x;
}

// Saves only the key. The gradient of the residual is the incoming gradient.
struct DropoutAdd : torch::autograd::Function<DropoutAdd> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& residual,
                        const std::optional<Tensor>& bias, const Mask& mask, bool inplace) {
    ctx->save_for_backward({mask.key});
    save_mask(ctx, x, mask);
    ctx->saved_data["bias"] = bias.has_value();
    const Tensor y = run_dropout_add(x, residual, bias, mask, inplace);
    return inplace ? result_in_place(x) : y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& gradients) {
    const Tensor& gradient = gradients[0];
    const bool needs_bias_gradient = ctx->saved_data.at("bias").toBool() && ctx->needs_input_grad(2);
    Tensor dx, dbias;
    if (ctx->needs_input_grad(0) || needs_bias_gradient) dx = apply_to_gradient(gradient, saved_mask(ctx, gradient));
    if (needs_bias_gradient) dbias = at::sum_to(dx, at::IntArrayRef{dx.size(-1)});
    return {dx, gradient, dbias, Tensor(), Tensor()};
  }
};

Tensor run_relu_dropout(const Tensor& x, const Mask& mask, bool inplace) {
  using IndexStrides = at::OptionalSymIntArrayRef;
  static const auto op =
      find_operator<Tensor(const Tensor&, double, const Tensor&, c10::SymInt, IndexStrides, std::optional<double>)>(
          "fused_dropout::relu_dropout");
  static const auto op_in_place =
      find_operator<void(const Tensor&, double, const Tensor&, c10::SymInt, IndexStrides, std::optional<double>)>(
          "fused_dropout::relu_dropout_");
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto strides = strides_of(mask);
  if (!inplace) {
    return with_torch_error(x, [&] { return op.call(x, mask.p, mask.key, 0, strides, mask.scale); });
  }
  op_in_place.call(x, mask.p, mask.key, 0, strides, mask.scale);
  return x;
}

Tensor relu_dropout_backward(const Tensor& gradient, const Tensor& output, double scale);

// The backward pass of ReluDropout, with a derivative: it is linear in the gradient. Its derivative with respect to the
// output is 0 wherever it exists.
struct ReluDropoutBackward : torch::autograd::Function<ReluDropoutBackward> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& gradient, const Tensor& output,
                        double scale) {
    ctx->save_for_backward({output});
    ctx->saved_data["scale"] = scale;
    const at::AutoDispatchBelowADInplaceOrView below;
    return relu_dropout_backward(gradient, output, scale);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& gradients) {
    const Tensor output = ctx->get_saved_variables()[0];
    return {relu_dropout_backward(gradients[0], output, ctx->saved_data.at("scale").toDouble()), Tensor(), Tensor()};
  }
};

Tensor relu_dropout_backward(const Tensor& gradient, const Tensor& output, double scale) {
  if (!takes_fast_path(gradient) || !takes_fast_path(output) || gradient.scalar_type() != output.scalar_type()) {
    const Tensor zero = at::zeros({}, gradient.options());
    return at::where(output.le(0), zero, gradient.mul(scale));
  }
  if (at::GradMode::is_enabled() && gradient.requires_grad()) {
    return ReluDropoutBackward::apply(gradient, output, scale);
  }
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&, double)>("fused_dropout::relu_dropout_backward");
  const at::AutoDispatchBelowADInplaceOrView below;
  return with_torch_error(gradient, [&] { return op.call(gradient, output, scale); });
}

// Saves its output, which tells which elements the gradient passes: those that are not 0 or less.
struct ReluDropout : torch::autograd::Function<ReluDropout> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Mask& mask, bool inplace) {
    ctx->saved_data["scale"] = 1.0 / (1.0 - mask.p);
    const Tensor y = run_relu_dropout(x, mask, inplace);
    if (!inplace) {
      ctx->save_for_backward({y});
      return y;
    }
    const Tensor result = result_in_place(x);
    // x.detach() shares the version counter of x, so that backward raises an error if x is changed after this call.
    ctx->save_for_backward({x.detach()});
    return result;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& gradients) {
    const Tensor output = ctx->get_saved_variables()[0];
    return {relu_dropout_backward(gradients[0], output, ctx->saved_data.at("scale").toDouble()), Tensor(), Tensor()};
  }
};

// Whether `other` takes the fast path and has x's dtype and device.
bool fits(const Tensor& x, const Tensor& other) {
  return takes_fast_path(other) && other.scalar_type() == x.scalar_type() && other.device() == x.device();
}

}  // namespace

std::optional<Tensor> dropout_add(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& bias, double p,
                                  bool inplace, const std::optional<at::Generator>& generator,
                                  const std::optional<Tensor>& key, std::optional<std::vector<int64_t>> index_strides,
                                  int64_t start) {
  if (!takes_fast_path(x) || x.numel() == 0 || !fits(x, residual) || residual.sizes() != x.sizes()) return std::nullopt;
  if (bias && (!fits(x, *bias) || bias->dim() != 1 || x.dim() == 0 || bias->size(0) != x.size(-1))) return std::nullopt;
  const bool any_requires_grad = x.requires_grad() || residual.requires_grad() || (bias && bias->requires_grad());
  const bool recorded = at::GradMode::is_enabled() && any_requires_grad;
  // x + dropout(x): Python makes separate calls, so that the two gradients of x are added in the order of torch.
  if (recorded && x.is_same(residual)) return std::nullopt;
  const auto shares_memory = [&](const Tensor& other) { return x.storage().is_alias_of(other.storage()); };
  if (inplace && (!is_writable(x, recorded) || shares_memory(residual) || (bias && shares_memory(*bias)))) {
    return std::nullopt;
  }
  Mask mask{p, Tensor(), std::move(index_strides), std::nullopt, start};
  set_key(mask, x, generator, key, recorded);
  write_captured_key(mask);
  const Tensor y = recorded ? DropoutAdd::apply(x, residual, bias, mask, inplace)
                            : run_dropout_add(x, residual, bias, mask, inplace);
  return inplace ? finish_in_place(x, y, recorded) : y;
}

std::optional<Tensor> relu_dropout(const Tensor& x, double p, bool inplace,
                                   const std::optional<at::Generator>& generator, const std::optional<Tensor>& key) {
  if (!takes_fast_path(x) || x.numel() == 0) return std::nullopt;
  const bool recorded = at::GradMode::is_enabled() && x.requires_grad();
  if (inplace && !is_writable(x, recorded)) return std::nullopt;
  Mask mask{p, Tensor(), std::nullopt, std::nullopt};
  set_key(mask, x, generator, key, recorded);
  write_captured_key(mask);
  const Tensor y = recorded ? ReluDropout::apply(x, mask, inplace) : run_relu_dropout(x, mask, inplace);
  return inplace ? finish_in_place(x, y, recorded) : y;
}

}  // namespace fused_dropout::eager
