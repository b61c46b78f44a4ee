"""Dropout with one draw for many elements: a mask of a smaller shape, broadcast over the input, never expanded.

As elsewhere nothing is saved for backward but the key, 16 bytes.
"""

from typing import Any

import torch
from torch import Tensor

from . import autograd, operators


class BroadcastDropout(torch.autograd.Function):
    """Dropout of x with the mask of the key on noise_shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, key: Tensor, noise_shape: tuple[int, ...], scale: float) -> Tensor:
        ctx.save_for_backward(key)
        ctx.arguments = p, noise_shape, scale
        return operators.apply_broadcast(x, p, key, noise_shape, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (key,) = ctx.saved_tensors
        p, noise_shape, scale = ctx.arguments
        return apply(gradient, p, key, noise_shape, scale), None, None, None, None


_apply_eager = super(torch.autograd.Function, BroadcastDropout).apply


def apply(x: Tensor, p: float, key: Tensor, noise_shape: tuple[int, ...], scale: float) -> Tensor:
    """x times scale where ``keep_mask(noise_shape, p, key)``, broadcast to x's shape, is True, else +0.

    x: any shape and layout; float32, float64, float16 or bfloat16. key: uint64, shape (2,). noise_shape: as many sizes
    as x has, each x's or 1. Returns a tensor with the strides of ``torch.empty_like(x)``, unless x was expanded.
    """
    if autograd.is_transformed():
        # In torch's own operations, for which every transform has its rules and every compiler its fusions.
        kept = operators.keep_mask(torch.empty(noise_shape, dtype=torch.bool, device=x.device), p, key)
        return (x * scale).masked_fill(kept.logical_not(), 0.0)
    if x.requires_grad and torch.is_grad_enabled():
        return _apply_eager(x, p, key, noise_shape, scale)
    return operators.apply_broadcast(x, p, key, noise_shape, scale)
