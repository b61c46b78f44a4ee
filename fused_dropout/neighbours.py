"""Dropout fused with the element-wise operation next to it: ``dropout_add``, ``relu_dropout`` and their modules.

One pass over memory replaces two or three. Values, masks and gradients equal those of the separate calls bit for bit.
Under ``torch.compile`` the separate calls run, because the compiler fuses them itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.overrides import has_torch_function, has_torch_function_unary

from . import autograd, dispatch, native, operators, reference, windows
from .arguments import check_arguments, noise_strides
from .functional import dropout
from .modules import Fused
from .torch_internals import apply_without_functorch, is_compiling, is_recorded
from .windows import Shard

_eager_dropout_add = native.eager.dropout_add if native.eager else None
_eager_relu_dropout = native.eager.relu_dropout if native.eager else None


class _DropoutAdd(torch.autograd.Function):
    """Saves the key alone. ``csrc/neighbours.cpp`` does the same in C++."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        bias: Tensor | None,
        p: float,
        key: Tensor,
        start: int,
        strides: Sequence[int],
    ) -> Tensor:
        ctx.save_for_backward(key)
        ctx.words = autograd.words_of(key)
        ctx.p, ctx.start, ctx.strides = p, start, strides
        return operators.dropout_add(x, residual, bias, p, key, start, strides)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        of_input = of_bias = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            key = autograd.key_for_backward(ctx.words, saved)
            of_input = autograd.apply(gradient, ctx.p, key, ctx.start, ctx.strides)
        if of_input is not None and ctx.needs_input_grad[2]:
            of_bias = of_input.sum_to_size(of_input.shape[-1])
        return of_input, gradient, of_bias, None, None, None, None


class _ReluDropout(torch.autograd.Function):
    """Saves the output alone: the gradient passes where the output is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, key: Tensor, strides: Sequence[int]) -> Tensor:
        output = operators.relu_dropout(x, p, key, 0, strides)
        ctx.save_for_backward(output)
        ctx.scale = reference.scale(p)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        return _relu_backward(gradient, output, ctx.scale), None, None, None


class _ReluDropoutBackward(torch.autograd.Function):
    """The backward of ``_ReluDropout``, with a derivative of its own.

    It is linear in the gradient. Its derivative with respect to the output is 0 where it exists.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, output: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(output)
        ctx.scale = scale
        return operators.relu_dropout_backward(gradient, output, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        return _relu_backward(gradient, output, ctx.scale), None, None


_apply_dropout_add, _apply_relu_dropout, _apply_relu_backward = map(
    apply_without_functorch, (_DropoutAdd, _ReluDropout, _ReluDropoutBackward)
)


def _relu_backward(gradient: Tensor, output: Tensor, scale: float) -> Tensor:
    if autograd.must_compose(gradient) or autograd.must_compose(output) or is_compiling():
        zero = torch.zeros((), dtype=gradient.dtype, device=gradient.device)
        return torch.where(output <= 0, zero, gradient * scale)
    return _apply_relu_backward(gradient, output, scale)


def _takes_fused_path(x: Any, *others: Any) -> bool:
    """Whether the operators support these tensors: plain, not empty, all of one dtype and on one device."""
    return (
        not is_recorded()
        and all(isinstance(t, Tensor) and not autograd.must_compose(t) for t in (x, *others))
        and all(t.dtype == x.dtype and t.device == x.device and not t.is_neg() for t in (x, *others))
        and dispatch.is_covered(x)
        and x.numel() != 0
    )


def _key_of(x: Tensor, generator: Generator | None, key: Tensor | None) -> Tensor:
    if x.is_cuda:
        operators.settle_cuda(x.device)
    return dispatch.key_of_call(x.device, generator, key, None, False, recorded=torch.is_grad_enabled())


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _into(input: Any, output: Any, inplace: bool) -> Any:
    """Copies the output to the input if ``inplace`` is set and shape and dtype are the same."""
    if not inplace or output is input or output.shape != input.shape or output.dtype != input.dtype:
        return output
    return input.copy_(output)


def _drop_as_numbered(
    x: Any,
    input: Any,
    p: float,
    training: bool,
    generator: Generator | None,
    key: Tensor | None,
    noise_shape: Sequence[int | None] | None = None,
    shard: Shard | None = None,
) -> Any:
    """Dropout of x, which was computed from ``input``, with the elements numbered by the layout of ``input``.

    The layout of x can differ, and the fused operator numbers the elements by its own input.
    """
    own_layout = isinstance(x, Tensor) and x is not input and x.shape == input.shape and not input.is_contiguous()
    if training and p > 0 and noise_shape is None and shard is None and own_layout:
        output = dispatch.drop(x, p, False, generator, key, reference.index_strides_of(input))
        if output is not None:
            return output
    return dropout(x, p, training, generator=generator, key=key, noise_shape=noise_shape, shard=shard)


def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    generator: Generator | None = None,
    key: Tensor | None = None,
    noise_shape: Sequence[int | None] | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Adds a bias, applies dropout and adds a residual in one pass.

    In PyTorch: ``residual + F.dropout(input + bias, p, training)``.

    The result, the mask and the gradients are those of the separate calls with :func:`dropout`, bit for bit, and so is
    the use of the generator. The call saves the 16-byte key for backward. The separate calls run instead for tensors of
    different shapes or dtypes, tensor subclasses, ``torch.func`` and ``torch.compile``.

    Args:
        input: a tensor of any shape. Dtypes and devices as in :func:`dropout`.
        residual: the tensor added after dropout. Only one of the input's shape and dtype is fused.
        p: the probability that an element is zeroed, from 0 to 1.
        training: if ``False``, drops nothing and only adds.
        inplace: if ``True``, overwrites ``input`` and returns it, if the result has the input's shape and dtype.
            ``residual`` is never overwritten.
        bias: a tensor added before dropout, such as the bias of a linear layer. Only one of shape (input.shape[-1],) is
            fused.
        generator: as in :func:`dropout`.
        key: as in :func:`dropout`. The mask is ``keep_mask(input, p, key)``.
        noise_shape: as in :func:`dropout`. ``(N, 1, ..., 1)`` is stochastic depth:
            ``residual + fd.drop_path(input, p, training)``.
        shard: as in :func:`dropout`.

    Returns:
        A tensor with the shape, dtype and strides of the sum.

    Raises:
        ValueError: as :func:`dropout`.
        TypeError: as :func:`dropout` and :func:`torch.add`.
        RuntimeError: as :func:`dropout` and :func:`torch.add`.

    Example:
        >>> x, residual = torch.ones(4), torch.full((4,), 10.0)
        >>> fd.dropout_add(x, residual, 0.5, key=fd.key(1))
        tensor([12., 10., 12., 10.])
    """
    check_arguments(input, p, training, generator, key)
    if training and 0 < p < 1:
        output = _fused_dropout_add(input, residual, bias, float(p), inplace, generator, key, noise_shape, shard)
        if output is not None:
            return output
    shifted = input if bias is None else input + bias
    dropped = _drop_as_numbered(shifted, input, p, training, generator, key, noise_shape, shard)
    return _into(input, residual + dropped, inplace)


def _fused_dropout_add(
    input: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    p: float,
    inplace: bool,
    generator: Generator | None,
    key: Tensor | None,
    noise_shape: Sequence[int | None] | None,
    shard: Shard | None,
) -> Tensor | None:
    """The result, or None if the separate calls have to be used."""
    if is_compiling() or not (isinstance(input, Tensor) and isinstance(residual, Tensor)):
        return None
    if bias is not None and not isinstance(bias, Tensor):
        return None
    if has_torch_function((input, residual, bias)):
        return None
    start, strides = 0, None if noise_shape is None or shard is not None else noise_strides(noise_shape, input.shape)
    if shard is not None:
        whole, runs = windows.part_of(input.shape, shard)
        numbers = reference.row_major(whole) if noise_shape is None else noise_strides(noise_shape, whole)
        part = windows.window(runs, 0, numbers)
        if isinstance(part, int) or len(part[1]) != input.dim():
            return None
        start, _, strides = part
    if _eager_dropout_add is not None:
        output = _eager_dropout_add(input, residual, bias, p, inplace, generator, key, strides, start)
        if output is not None:
            return output
    tensors = (input, residual) if bias is None else (input, residual, bias)
    if not _takes_fused_path(*tensors) or residual.shape != input.shape:
        return None
    if bias is not None and (bias.dim() != 1 or bias.shape != input.shape[-1:]):
        return None
    if input is residual and torch.is_grad_enabled() and input.requires_grad:
        return None  # both gradients belong to one tensor, and autograd must add them in the order of separate calls
    own = _key_of(input, generator, key)
    window = reference.index_strides_of(input) if strides is None else strides
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _into(input, _apply_dropout_add(input, residual, bias, p, own, start, window), inplace)
    if not inplace or dispatch.needs_copy(input) or any(_share_memory(input, other) for other in tensors[1:]):
        return _into(input, operators.dropout_add(input, residual, bias, p, own, start, window), inplace)
    dispatch.check_no_overlap(input)
    operators.dropout_add_(input, residual, bias, p, own, start, window)
    torch.autograd.graph.increment_version(input)
    return input


def relu_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    r"""Applies ReLU and then dropout in one pass.

    In PyTorch: ``F.dropout(F.relu(input), p, training)``.

    The result, the mask and the gradients are those of the separate calls with :func:`dropout`, bit for bit. The call
    saves only its output, which a linear layer after it keeps as well. Backward needs no mask: the gradient passes
    where the output is positive. The separate calls run instead for tensor subclasses, ``torch.func`` and
    ``torch.compile``.

    Args:
        input: a tensor of any shape. Dtypes and devices as in :func:`dropout`.
        p: the probability that an element is zeroed, from 0 to 1.
        training: if ``False``, returns ``F.relu(input)``.
        inplace: if ``True``, overwrites ``input`` and returns it.
        generator: as in :func:`dropout`.
        key: as in :func:`dropout`. The mask is ``keep_mask(input, p, key)``.

    Returns:
        A tensor of the input's shape and dtype, with the strides of ``torch.empty_like(input)``.

    Raises:
        ValueError: as :func:`dropout`.
        TypeError: as :func:`dropout`.
        RuntimeError: as :func:`dropout`.

    Example:
        >>> fd.relu_dropout(torch.tensor([1.0, 1.0, -1.0, 3.0]), 0.5, key=fd.key(1))
        tensor([2., 0., 0., 0.])
    """
    check_arguments(input, p, training, generator, key)
    if training and 0 < p < 1:
        output = _fused_relu_dropout(input, float(p), inplace, generator, key)
        if output is not None:
            return output
    if not training or p == 0:
        return F.relu(input, inplace)
    return _into(input, _drop_as_numbered(F.relu(input), input, p, training, generator, key), inplace)


def _fused_relu_dropout(
    input: Tensor, p: float, inplace: bool, generator: Generator | None, key: Tensor | None
) -> Tensor | None:
    if is_compiling() or not isinstance(input, Tensor) or has_torch_function_unary(input):
        return None
    if _eager_relu_dropout is not None:
        output = _eager_relu_dropout(input, p, inplace, generator, key)
        if output is not None:
            return output
    if not _takes_fused_path(input):
        return None
    own, strides = _key_of(input, generator, key), reference.index_strides_of(input)
    if torch.is_grad_enabled() and input.requires_grad:
        return _into(input, _apply_relu_dropout(input, p, own, strides), inplace)
    if not inplace or dispatch.needs_copy(input):
        return _into(input, operators.relu_dropout(input, p, own, 0, strides), inplace)
    dispatch.check_no_overlap(input)
    operators.relu_dropout_(input, p, own, 0, strides)
    torch.autograd.graph.increment_version(input)
    return input


class DropoutAdd(Fused):
    r"""Adds a bias, applies dropout in training, and adds a residual, in one pass.

    In PyTorch: ``residual + nn.Dropout(p)(input + bias)``. It calls :func:`dropout_add`. In evaluation mode it only
    adds. ``forward`` takes ``(input, residual, bias=None)``.

    Args:
        p: the probability that an element is zeroed, from 0 to 1. Read at each call.
        inplace: if ``True``, overwrites the input. The residual is never overwritten.
        generator: as in :func:`dropout`. Stored as an attribute and read at each call; copied with the module.
        key: as in :func:`dropout`. Stored as an attribute and read at each call: every call applies the same mask. It
            is not part of the state dict and does not move with the module; a key on the CPU works on every device.
        noise_shape: the shape of the mask, as in :func:`dropout`. Default: the input's shape

    Shape: input, residual and output have one shape, any. A bias has the size of the last dimension.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``key`` has a wrong shape or dtype.
        TypeError: ``p`` is not a number; ``generator`` or ``key`` has a wrong type.

    Example:
        >>> m = fd.DropoutAdd(p=0.1)
        >>> x, residual = torch.randn(2, 20, 16), torch.randn(2, 20, 16)
        >>> m(x, residual).shape
        torch.Size([2, 20, 16])
    """

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        generator: Generator | None = None,
        key: Tensor | None = None,
        noise_shape: Sequence[int | None] | None = None,
    ) -> None:
        super().__init__(p, inplace, generator=generator, key=key)
        self.noise_shape = None if noise_shape is None else tuple(noise_shape)

    def forward(self, input: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        return dropout_add(
            input,
            residual,
            self.p,
            self.training,
            self.inplace,
            bias=bias,
            generator=self.generator,
            key=self.key,
            noise_shape=self.noise_shape,
        )


class ReLUDropout(Fused):
    r"""Applies ReLU, and dropout in training, in one pass that saves only its output.

    In PyTorch: ``nn.Sequential(nn.ReLU(), nn.Dropout(p))``. It calls :func:`relu_dropout`.

    Args:
        p: the probability that an element is zeroed, from 0 to 1. Read at each call.
        inplace: if ``True``, overwrites the input.
        generator: as in :func:`dropout`. Stored as an attribute and read at each call; copied with the module.
        key: as in :func:`dropout`. Stored as an attribute and read at each call: every call applies the same mask. It
            is not part of the state dict and does not move with the module; a key on the CPU works on every device.

    Shape: the input has any shape, and the output has the same.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``key`` has a wrong shape or dtype.
        TypeError: ``p`` is not a number; ``generator`` or ``key`` has a wrong type.

    Example:
        >>> feed_forward = nn.Sequential(nn.Linear(8, 32), fd.ReLUDropout(0.1), nn.Linear(32, 8))
        >>> feed_forward(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        return relu_dropout(input, self.p, self.training, self.inplace, generator=self.generator, key=self.key)
