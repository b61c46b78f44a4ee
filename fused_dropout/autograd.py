"""Dropout with derivatives, in Python: for torch.compile and every transform, and where the eager binding is not there.

Dropout is linear and diagonal: it is its own backward, its own double backward and its own forward-mode derivative, all
with the same key. ``apply`` saves the key for backward and nothing else, 16 bytes; under the transforms of torch.func
and under dispatch modes ``compose`` serves, which saves a mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from . import operators, reference
from .torch_internals import (
    apply_without_functorch,
    functorch_randomness,
    is_compiling,
    is_distributed,
    is_fake,
    is_watched,
)
from .warn import warn

_PLAIN = (Tensor, Parameter)


class Dropout(torch.autograd.Function):
    """Dropout as torch.compile traces it: the operator in forward and in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int] | None, scale: float | None
    ) -> Tensor:
        ctx.save_for_backward(key)
        ctx.p, ctx.scale, ctx.start, ctx.index_strides = p, scale, start, index_strides
        if index_strides is None and not x.is_contiguous() and reference.is_dense(x):
            ctx.index_strides = x.stride()
        return operators.apply_as_served(x, p, key, start, index_strides, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (key,) = ctx.saved_tensors
        return _backward(ctx, gradient, key)


class DropoutEager(Dropout):
    """Dropout outside of every transform. Backward uses the key's value of forward, whatever became of its memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int] | None, scale: float | None
    ) -> Tensor:
        ctx.words = words_of(key)
        return Dropout.forward(ctx, x, p, key, start, index_strides, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors  # once: a checkpoint hands it out no second time
        return _backward(ctx, gradient, key_for_backward(ctx.words, saved))


_apply_eager = apply_without_functorch(DropoutEager)


def _backward(ctx: Any, gradient: Tensor, key: Tensor) -> tuple[Tensor | None, ...]:
    """The same mask on the gradient: elements are numbered as in forward, whatever layout the gradient arrives in."""
    index_strides = ctx.index_strides
    if index_strides is None and not gradient.is_contiguous():
        index_strides = reference.row_major(gradient.shape)
    return apply(gradient, ctx.p, key, ctx.start, index_strides, ctx.scale), None, None, None, None, None


def words_of(key: Tensor) -> list[int] | None:
    """A key's value, kept for backward; None on a device, where a replayed graph reads it, and while compiling."""
    return key.view(torch.int64).tolist() if key.is_cpu and not is_compiling() else None


def key_for_backward(words: list[int] | None, saved: Tensor) -> Tensor:
    """Forward's key, whatever became of its memory. Warns if a checkpoint saved another one."""
    if words is None:
        return saved
    _warn_if_drawn_anew(saved, words)
    # A view of signed numbers: Inductor, under compiled autograd, has no constants of uint64.
    return torch.tensor(words, device="cpu").view(torch.uint64)


def _warn_if_drawn_anew(saved: Tensor, words: list[int]) -> None:
    """A checkpoint without reentry hands backward what it saved when it recomputed. Another key there means that the
    recomputed activations have another mask than forward's, which torch itself does not notice."""
    if type(saved) is Tensor and saved.is_cpu and saved.dtype == torch.uint64:
        if saved.view(torch.int64).tolist() == words:
            return
        warn_of_another_mask()


def warn_of_another_mask() -> None:
    """Called from C++, too."""
    warn(
        "recomputation drew another mask than forward did, and the gradients are of neither. Let the checkpoint "
        "preserve the state of the generator, or give dropout a key."
    )


def must_compose(x: Tensor) -> bool:
    """Whether a transform, a tracer, a mode or a tensor subclass has to see torch's own operations."""
    return type(x) not in _PLAIN or _is_transformed()


def takes_operator(x: Tensor) -> bool:
    """Whether the operator serves x: a plain tensor, or a DTensor, for which the operator has a rule."""
    return (type(x) in _PLAIN or is_distributed(x)) and not _is_transformed()


def _is_transformed() -> bool:
    return functorch_randomness() is not None or is_watched()


def compose(
    x: Tensor,
    p: float,
    key: Tensor,
    start: int,
    index_strides: Sequence[int] | None,
    scale: float | None,
    inplace: bool = False,
) -> Tensor:
    """``apply`` in torch's own operations, for which every transform, mode and subclass has its rules."""
    # The mask is made for a plain tensor: then a batched, wrapped or differentiated x needs no rule for the operator.
    # It has no more elements than there are draws, and its dimensions in x's order, since torch.where gives its result
    # the layout of the mask first.
    if x.dim() == 0:
        # A number times a tensor without dimensions has a tangent of float64 in torch.
        return compose(x.reshape(1), p, key, start, index_strides and [0], scale, inplace).reshape(())
    factor = reference.scale(p) if scale is None else scale
    kept = _keep_mask(x, p, key, start, index_strides)
    if inplace:
        return x.mul_(factor).masked_fill_(~kept, 0.0)
    return torch.where(kept, x * factor, torch.zeros((), dtype=x.dtype, device=x.device))


def _keep_mask(x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int] | None) -> Tensor:
    """The mask of x as a tensor that no transform wraps, or a DTensor placed as x is."""
    if is_distributed(x):
        return operators.keep_mask_as_served(x.detach(), p, key, start, index_strides)
    shape, order = list(x.shape), reference.order_by_stride(x)
    in_order = order == sorted(order)
    if index_strides is not None:
        shape = [size if stride else 1 for size, stride in zip(x.shape, index_strides, strict=True)]
    elif not in_order and not reference.is_dense(x):
        index_strides = reference.row_major(x.shape)  # else those of the tensor below, which is dense
    empty = x.new_empty if is_fake(x) else torch.empty
    like = empty(shape if in_order else [shape[d] for d in order], dtype=torch.bool, device=x.device)
    if not in_order:
        like = like.permute([order.index(d) for d in range(x.dim())])
    return operators.keep_mask_as_served(like, p, key, start, index_strides)


def apply(
    x: Tensor,
    p: float,
    key: Tensor,
    start: int = 0,
    index_strides: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Dropout of x with probability p and the mask of the key, with derivatives of every kind.

    x: any shape and layout; float32, float64, float16 or bfloat16. key: uint64, shape (2,). start, index_strides and
    scale: as in the operator. Returns a tensor with the strides of ``torch.empty_like(x)``.
    """
    serve = apply_plain if takes_operator(x) else compose
    return serve(x, p, key, start, index_strides, scale)


def apply_plain(
    x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int] | None, scale: float | None
) -> Tensor:
    """``apply`` for callers that know that ``takes_operator`` is true, a compiler among them."""
    if x.requires_grad and torch.is_grad_enabled():
        return (Dropout.apply if is_compiling() else _apply_eager)(x, p, key, start, index_strides, scale)
    return operators.apply_as_served(x, p, key, start, index_strides, scale)
