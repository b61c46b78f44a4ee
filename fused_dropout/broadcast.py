"""Dropout with one draw for many elements: a mask of a smaller shape, broadcast over the input, never expanded.

The value and its gradient are two passes in torch's own operations, which take every layout, transform and compiler:
a selection by the small mask, and the product in place. Nothing is saved for backward but the key, 16 bytes.
"""

from typing import Any

import torch
from torch import Tensor

from . import autograd, operators, reference

# The first argument where the second is above the third, else +0, whatever the first is: torch.where, but vectorized on
# the CPU where the mask is broadcast, too, and several times as fast there.
_select = torch.ops.aten.threshold_backward.default
_select_out = torch.ops.aten.threshold_backward.grad_input


def _mask(x: Tensor, p: float, key: Tensor, noise_shape: tuple[int, ...]) -> Tensor:
    """1 where an element is kept, else 0: in x's dtype, of shape noise_shape, its dimensions in memory as x's are."""
    shape = (1,) * (x.dim() - len(noise_shape)) + noise_shape
    mask = operators.keep_mask(torch.empty(shape, dtype=torch.bool, device=x.device), p, key).to(x.dtype)
    if x.is_contiguous() or 0 in x.stride():
        return mask
    # The selection takes the layout of its result from the mask where that has one, and from x only in the rest.
    order = reference.order_by_stride(x)[::-1]
    return mask.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


def _drop(x: Tensor, p: float, key: Tensor, noise_shape: tuple[int, ...], scale: float) -> Tensor:
    return _select(x, _mask(x, p, key, noise_shape), 0).mul_(scale)


class BroadcastDropout(torch.autograd.Function):
    """Dropout of x with the mask of the key on noise_shape; transforms derive the operations of ``_drop`` instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, key: Tensor, noise_shape: tuple[int, ...], scale: float) -> Tensor:
        ctx.save_for_backward(key)
        ctx.arguments = p, noise_shape, scale
        return _drop(x, p, key, noise_shape, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (key,) = ctx.saved_tensors
        p, noise_shape, scale = ctx.arguments
        return apply(gradient, p, key, noise_shape, scale), None, None, None, None


def apply(x: Tensor, p: float, key: Tensor, noise_shape: tuple[int, ...], scale: float) -> Tensor:
    """x times scale where ``keep_mask(noise_shape, p, key)``, broadcast to x's shape, is True, else +0.

    x: any shape and layout; float32, float64, float16 or bfloat16. key: uint64, shape (2,). noise_shape: broadcasts to
    x's shape. Returns a tensor with the strides of ``torch.empty_like(x)``, unless x was expanded.
    """
    if x.requires_grad and torch.is_grad_enabled() and not autograd.is_transformed():
        return BroadcastDropout.apply(x, p, key, noise_shape, scale)
    return _drop(x, p, key, noise_shape, scale)


def apply_(x: Tensor, p: float, key: Tensor, noise_shape: tuple[int, ...], scale: float) -> Tensor:
    """``apply`` in place, where autograd is not looking."""
    return _select_out(x, _mask(x, p, key, noise_shape), 0, grad_input=x).mul_(scale)


def _keep_mask_batched(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, p: float, key: Tensor, start: int = 0
) -> tuple[Tensor, int | None]:
    """vmap: with one key all samples get one mask, that of a sample alone; with a key each, each gets its own."""
    x_dim, _, key_dim, *_ = in_dims
    sample = x if x_dim is None else x.select(x_dim, 0)
    if key_dim is None:
        return operators.keep_mask(sample, p, key, start), None
    return torch.stack([operators.keep_mask(sample, p, own_key, start) for own_key in key.unbind(key_dim)]), 0


torch.library.register_vmap("fused_dropout::keep_mask", _keep_mask_batched, lib=operators._library)
