"""Autograd in Python, over the operators: for torch.compile, torch.func and forward-mode AD, and wherever the eager
binding is not there. Nothing is saved for backward but the key, 16 bytes.

Dropout is linear and diagonal: it is its own backward, its own double backward and its own forward-mode derivative, all
with the same key.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import native, operators, reference

_is_compiling = torch.compiler.is_compiling


def _in_order_of(gradient: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """The gradient with its elements in the order in which forward's were numbered.

    That is memory order for a dense input (whose strides are given unless they are row-major), row-major for the rest.
    """
    if strides is None:
        # Rows with holes between them are numbered row-major by the operator itself, in one pass.
        return gradient.contiguous() if reference.is_dense(gradient) or 0 in gradient.stride() else gradient
    if gradient.stride() == strides:
        return gradient
    return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def _is_exporting() -> bool:
    # Not torch.compiler.is_exporting(), which Dynamo takes for true whenever it compiles (torch 2.11).
    return torch.compiler._is_exporting_flag


def is_fused_by_compiler(x: Tensor) -> bool:
    """Whether a compiler is at work and is to be given the mask's arithmetic, and not the operator."""
    if not _is_compiling() or _is_exporting():
        return False
    return native.compile_as == "fuse" or (native.compile_as == "auto" and x.is_cuda)


def _apply(x: Tensor, p: float, key: Tensor) -> Tensor:
    if is_fused_by_compiler(x):
        return reference.apply_each(x, p, key)
    return operators.apply(x, p, key)


class Dropout(torch.autograd.Function):
    """Dropout of x with probability p and the mask of the key."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, p: float, key: Tensor) -> Tensor:
        return _apply(x, p, key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
        x, ctx.p, key = inputs
        ctx.save_for_backward(key)
        ctx.strides = None if x.is_contiguous() or not reference.is_dense(x) else x.stride()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _backward(ctx, gradient, *ctx.saved_tensors)


def _backward(ctx: Any, gradient: Tensor, key: Tensor) -> tuple[Tensor, None, None]:
    if ctx.strides is not None or not gradient.is_contiguous():
        gradient = _in_order_of(gradient, ctx.strides)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return apply(gradient, ctx.p, key, is_transformed()), None, None
    return _apply(gradient, ctx.p, key), None, None


class DropoutForwardAD(Dropout):
    """Dropout with forward-mode derivatives: apart from the other, since Dynamo refuses a Function that has ``jvp``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
        Dropout.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, p: None, key: None) -> Tensor:
        (key_,) = ctx.saved_tensors
        return apply(_in_order_of(tangent, ctx.strides), ctx.p, key_, transformed=True)


def warn_if_drawn_anew(saved: Tensor, own: Tensor) -> None:
    """Checkpointing without reentry hands backward what it saved when it recomputed: another key means another mask
    than forward's, which torch itself does not notice."""
    if saved is not own and type(saved) is Tensor and saved.is_cpu and own.is_cpu and not torch.equal(saved, own):
        warnings.warn(
            "fused_dropout: recomputation drew another mask than forward did, and the gradients are of neither. Let "
            "the checkpoint preserve the state of the generator, or give dropout a key.",
            stacklevel=3,
        )


class DropoutEager(Dropout):
    """Dropout outside of every transform."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
        Dropout.setup_context(ctx, inputs, output)
        ctx.key = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (key,) = ctx.saved_tensors  # once: a checkpoint hands it out no second time
        warn_if_drawn_anew(key, ctx.key)
        return _backward(ctx, gradient, key)


# Function.apply less what it does for torch.func: binding the arguments by their signature takes it 15 us a call.
_apply_eager = super(torch.autograd.Function, DropoutEager).apply


_in_functorch = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


def is_transformed() -> bool:
    """Whether a compiler, a tracer, a transform or a mode is looking, or forward-mode AD is on."""
    return (
        _is_compiling()
        or _in_functorch()
        or _dispatch_modes() > 0
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


def is_recorded() -> bool:
    """Whether torch.export or torch.jit.trace records a graph, which is to be run without this package."""
    return _is_exporting() or (not _is_compiling() and _tracing_state() is not None)


def _is_functionalized() -> bool:
    from torch._C._functorch import TransformType, get_interpreter_stack

    return any(level.key() == TransformType.Functionalize for level in get_interpreter_stack() or ())


def _is_traced() -> bool:
    """Whether operations are recorded whose derivatives are then taken, so that an autograd Function is lost."""
    if is_recorded() or _is_compiling():
        return is_recorded()
    return (_in_functorch() and _is_functionalized()) or (_dispatch_modes() > 0 and get_proxy_mode() is not None)


def _compose(x: Tensor, p: float, key: Tensor) -> Tensor:
    """The same bits in operations that torch differentiates: for who records them, but no autograd Function."""
    return torch.where(operators.keep_mask(x, p, key), x * reference.scale(p), 0.0)


def apply(x: Tensor, p: float, key: Tensor, transformed: bool) -> Tensor:
    """Dropout of x with probability p and the mask of the key; transformed: what ``is_transformed`` says.

    x: any shape and layout; float32, float64, float16 or bfloat16. key: uint64, shape (2,). Returns a tensor with the
    strides of ``torch.empty_like(x)``.
    """
    if transformed:
        if _is_traced():
            return _compose(x, p, key)
        dual = not _is_compiling() and forward_ad._current_level >= 0
        return (DropoutForwardAD if dual else Dropout).apply(x, p, key)
    if x.requires_grad and torch.is_grad_enabled():
        return _apply_eager(x, p, key)
    return operators.apply(x, p, key)
