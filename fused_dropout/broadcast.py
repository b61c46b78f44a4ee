"""Dropout with one draw for many elements: a mask of a smaller shape, broadcast over the input, never expanded.

As elsewhere nothing is saved for backward but the key, 16 bytes.
"""

from typing import Any

import torch
from torch import Tensor

from . import autograd, operators, reference


class BroadcastDropout(torch.autograd.Function):
    """Dropout of x with the mask of the key on noise_shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, key: Tensor, noise_shape: tuple[int, ...], scale: float) -> Tensor:
        ctx.save_for_backward(key)
        ctx.arguments = p, noise_shape, scale, key
        return operators.apply_broadcast(x, p, key, noise_shape, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (key,) = ctx.saved_tensors
        p, noise_shape, scale, own = ctx.arguments
        autograd.warn_if_drawn_anew(key, own)
        return apply(gradient, p, key, noise_shape, scale), None, None, None, None


def _keep_mask(x: Tensor, p: float, key: Tensor, noise_shape: tuple[int, ...]) -> Tensor:
    """True where an element is kept, of shape noise_shape, with its dimensions in memory in the order of x's."""
    if autograd.is_fused_by_compiler(x):
        index = reference.indices(noise_shape, x.device)
        kept = reference.keep_each(index, reference.threshold(p), key.to(x.device))
    else:
        kept = operators.keep_mask(torch.empty(noise_shape, dtype=torch.bool, device=x.device), p, key)
    if x.is_contiguous() or 0 in x.stride():
        return kept
    # torch.where gives its result the layout of the mask first, and that of x only where the mask has none.
    order = reference.order_by_stride(x)[::-1]
    return kept.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


_apply_eager = super(torch.autograd.Function, BroadcastDropout).apply


def apply(x: Tensor, p: float, key: Tensor, noise_shape: tuple[int, ...], scale: float) -> Tensor:
    """x times scale where ``keep_mask(noise_shape, p, key)``, broadcast to x's shape, is True, else +0.

    x: any shape and layout; float32, float64, float16 or bfloat16. key: uint64, shape (2,). noise_shape: as many sizes
    as x has, each x's or 1. Returns a tensor with the strides of ``torch.empty_like(x)``, unless x was expanded.
    """
    if autograd.is_transformed():
        # In torch's own operations, for which every transform has its rules and every compiler its fusions.
        return torch.where(_keep_mask(x, p, key, noise_shape), x * scale, 0.0)
    if x.requires_grad and torch.is_grad_enabled():
        return _apply_eager(x, p, key, noise_shape, scale)
    return operators.apply_broadcast(x, p, key, noise_shape, scale)
