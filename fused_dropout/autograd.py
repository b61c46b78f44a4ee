"""Dropout with derivatives, in Python: for torch.compile, for transforms, and without the eager binding.

Dropout multiplies each element by 0 or by the scale. So its backward, double backward and forward-mode derivative are
dropout with the same key. ``apply`` saves only the key for backward, 16 bytes. Under the transforms of torch.func and
under dispatch modes, ``compose`` runs instead and saves a mask. ``dispatch.py`` calls this module, which calls
``operators.py``.
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
    """Dropout for torch.compile: calls the operator in forward and in backward."""

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
    """Dropout outside of transforms. Backward uses the key's value in forward, also if the tensor was changed since."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int] | None, scale: float | None
    ) -> Tensor:
        ctx.words = words_of(key)
        return Dropout.forward(ctx, x, p, key, start, index_strides, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors  # read once, because a checkpoint returns it only once
        return _backward(ctx, gradient, key_for_backward(ctx.words, saved))


_apply_eager = apply_without_functorch(DropoutEager)


def _backward(ctx: Any, gradient: Tensor, key: Tensor) -> tuple[Tensor | None, ...]:
    """Applies forward's mask to the gradient. The elements keep their numbers from forward in any gradient layout."""
    index_strides = ctx.index_strides
    if index_strides is None and not gradient.is_contiguous():
        index_strides = reference.row_major(gradient.shape)
    return apply(gradient, ctx.p, key, ctx.start, index_strides, ctx.scale), None, None, None, None, None


def words_of(key: Tensor) -> list[int] | None:
    """The value of a key, to keep for backward. None while compiling, and for a key on a GPU.

    A replayed CUDA graph has to read a key on the GPU again.
    """
    return key.view(torch.int64).tolist() if key.is_cpu and not is_compiling() else None


def key_for_backward(words: list[int] | None, saved: Tensor) -> Tensor:
    """The key with its value in forward, also if the tensor was changed since. Warns if a checkpoint saved another."""
    if words is None:
        return saved
    _warn_if_drawn_anew(saved, words)
    # Makes an int64 tensor and views it, because Inductor has no uint64 constants under compiled autograd.
    return torch.tensor(words, device="cpu").view(torch.uint64)


def _warn_if_drawn_anew(saved: Tensor, words: list[int]) -> None:
    """Warns if a checkpoint drew another key when it recomputed forward, which torch does not notice.

    With ``use_reentrant=False`` the saved tensors are those of the recomputation. A different key means that the
    recomputed activations have a different mask from those of forward.
    """
    if type(saved) is Tensor and saved.is_cpu and saved.dtype == torch.uint64:
        if saved.view(torch.int64).tolist() == words:
            return
        warn_of_another_mask()


def warn_of_another_mask() -> None:
    """Gives the warning. C++ calls it too."""
    warn(
        "recomputation drew another mask than forward did, so the gradients match neither. Let the checkpoint "
        "preserve the state of the generator, or give dropout a key."
    )


def must_compose(x: Tensor) -> bool:
    """Whether a transform, a tracer, a mode or a tensor subclass has to see torch's own operations."""
    return type(x) not in _PLAIN or _is_transformed()


def takes_operator(x: Tensor) -> bool:
    """Whether the operator supports x: a plain tensor, or a DTensor, for which the operator has a rule."""
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
    """``apply`` composed of torch's own operations, for which transforms, modes and subclasses have rules."""
    # The mask belongs to a plain tensor, so the operator needs no rule for a batched, wrapped or differentiated x. It
    # has one element for each draw. Its dimensions are in x's memory order, because torch.where returns the layout of
    # the mask.
    if x.dim() == 0:
        # In torch the product of a number and a tensor without dimensions has a float64 tangent.
        return compose(x.reshape(1), p, key, start, index_strides and [0], scale, inplace).reshape(())
    factor = reference.scale(p) if scale is None else scale
    kept = _keep_mask(x, p, key, start, index_strides)
    if inplace:
        return x.mul_(factor).masked_fill_(~kept, 0.0)
    return torch.where(kept, x * factor, torch.zeros((), dtype=x.dtype, device=x.device))


def _keep_mask(x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int] | None) -> Tensor:
    """The mask of x, as a tensor that no transform wraps, or as a DTensor with the placements of x."""
    if is_distributed(x):
        return operators.keep_mask_as_served(x.detach(), p, key, start, index_strides)
    shape, order = list(x.shape), reference.order_by_stride(x)
    in_order = order == sorted(order)
    if index_strides is not None:
        shape = [size if stride else 1 for size, stride in zip(x.shape, index_strides, strict=True)]
    elif not in_order and not reference.is_dense(x):
        index_strides = reference.row_major(x.shape)  # in the other cases the strides of the dense ``like`` are right
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
    """Dropout of x with probability p and the mask of the key, with all kinds of derivatives.

    x: any shape and layout; float32, float64, float16 or bfloat16. key: uint64, shape (2,). start, index_strides and
    scale: as in the operator. Returns a tensor with the strides of ``torch.empty_like(x)``.
    """
    serve = apply_plain if takes_operator(x) else compose
    return serve(x, p, key, start, index_strides, scale)


def apply_plain(
    x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int] | None, scale: float | None
) -> Tensor:
    """``apply`` for callers for which ``takes_operator`` is true, such as a compiler."""
    if x.requires_grad and torch.is_grad_enabled():
        return (Dropout.apply if is_compiling() else _apply_eager)(x, p, key, start, index_strides, scale)
    return operators.apply_as_served(x, p, key, start, index_strides, scale)
