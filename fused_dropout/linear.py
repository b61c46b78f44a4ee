"""Dropout and the linear layer after it as one function: ``dropout_linear`` and ``DropoutLinear``.

The weight's gradient needs the dropped input. Autograd would keep this copy. Here backward computes it again from the
input and the 16-byte key. ``swap/pairing.py`` uses this for LoRA layers.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from . import autograd, dispatch, native, operators, reference
from .arguments import check_arguments
from .functional import dropout
from .torch_internals import apply_without_functorch, is_compiling, is_recorded

_eager_dropout_linear = native.eager.dropout_linear if native.eager else None


class _DropoutLinear(torch.autograd.Function):
    """Saves the input, the key, and the weight if the input needs a gradient.

    ``csrc/dropout_linear.cpp`` does the same in C++.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, p: float, key: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, key)
        ctx.p, ctx.dtype, ctx.column_major = p, dtype, _is_column_major(weight.t())
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        ctx.words = autograd.words_of(key)
        dropped = operators.apply_as_served(x.to(dtype), p, key, 0, reference.index_strides_of(x), None)
        return F.linear(dropped, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved_key = ctx.saved_tensors
        key, strides = autograd.key_for_backward(ctx.words, saved_key), reference.index_strides_of(x)
        if is_compiling():
            x = operators.after(x, gradient)
        drop = partial(autograd.apply, p=ctx.p, key=key, index_strides=strides)
        rows, dropped = _as_matrix(gradient), _as_matrix(drop(x.to(ctx.dtype)))
        dx = dbias = None
        if weight is not None:
            dx = _gradient_of_first(rows, weight.to(ctx.dtype).t(), _is_column_major(dropped)).view(x.shape)
            dx = drop(dx).to(x.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            terms = rows if gradient.dim() == 3 else gradient
            dbias = terms.sum_to_size(terms.shape[-1]).to(ctx.bias_dtype)
        dweight = _gradient_of_second(rows, dropped, ctx.column_major).t().to(ctx.weight_dtype)
        return dx, dweight, dbias, None, None, None


_apply_eager = apply_without_functorch(_DropoutLinear)


# The gradients of a matrix product, by the same calls as in torch's autograd: the results are equal bit for bit.
# There the layout of each factor decides which call computes its gradient.


def _is_column_major(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.stride(1) == matrix.shape[0]


def _gradient_of_first(gradient: Tensor, second: Tensor, first_is_column_major: bool) -> Tensor:
    return second.mm(gradient.t()).t() if first_is_column_major else gradient.mm(second.t())


def _gradient_of_second(gradient: Tensor, first: Tensor, second_is_column_major: bool) -> Tensor:
    return gradient.t().mm(first).t() if second_is_column_major else first.t().mm(gradient)


def _as_matrix(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _product_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, p: float) -> torch.dtype | None:
    """The dtype of the matrix product, or None if the two separate calls have to be used."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not torch.is_grad_enabled() or p == 1 or any(map(autograd.must_compose, tensors)):
        return None
    if not weight.requires_grad or x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return None
    if x.device != weight.device or not (x.is_contiguous() or x.dim() == 2) or is_recorded():
        return None
    if not dispatch.is_covered(x) or not dispatch.is_covered(weight) or dispatch.is_empty(x):
        return None
    if bias is not None and (bias.dim() != 1 or bias.dtype != weight.dtype):
        return None
    if not torch.is_autocast_enabled(x.device.type):
        return weight.dtype
    dtype = torch.get_autocast_dtype(x.device.type)
    return dtype if x.dtype == dtype and weight.dtype != torch.float64 else None


def dropout_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    r"""Applies dropout and then a linear layer, and saves ``input`` instead of its dropped copy.

    In PyTorch: ``F.linear(F.dropout(input, p, training), weight, bias)``.

    The result, the mask and the gradients are those of ``F.linear(fd.dropout(...))``, bit for bit, and so is the use of
    the generator. Backward computes the dropped input again. If something else keeps ``input`` too, as the base layer
    of LoRA does, the call needs no more memory than with ``p=0``. If ``input`` is changed in place after the call,
    backward raises torch's error.

    The two separate calls run instead under ``torch.func`` and dispatch modes, for tensor subclasses, and for inputs of
    three or more dimensions that are not contiguous.

    Args:
        input: shape (..., in_features). If its dtype differs from the weight's, it is cast before dropout, and saved
            without the cast. (PEFT has float32 adapters in a bfloat16 model.)
        weight: shape (out_features, in_features).
        bias: shape (out_features,), or ``None``.
        p: the probability that an element of ``input`` is zeroed, from 0 to 1.
        training: if ``False``, drops nothing.
        generator: as in :func:`dropout`.
        key: as in :func:`dropout`.

    Returns:
        A tensor of shape (..., out_features).

    Raises:
        ValueError: as :func:`dropout`.
        TypeError: as :func:`dropout` and :func:`torch.nn.functional.linear`.
        RuntimeError: as :func:`dropout` and :func:`torch.nn.functional.linear`.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.eye(3)
        >>> fd.dropout_linear(x, weight, p=0.5, key=fd.key(1))
        tensor([[2., 0., 2.],
                [0., 2., 0.]])
    """
    check_arguments(input, p, training, generator, key)
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        return F.linear(input, weight, bias)  # raises torch's error
    if training and p > 0:
        if _eager_dropout_linear is not None and not is_compiling():
            output = _eager_dropout_linear(input, weight, bias, p, generator, key)
            if output is not None:
                return output
        if dtype := _product_dtype(input, weight, bias, p):
            if input.is_cuda:
                operators.settle_cuda(input.device)
            own = dispatch.key_of_call(input.device, generator, key, None, is_compiling(), recorded=True)
            apply = _DropoutLinear.apply if is_compiling() else _apply_eager
            return apply(input, weight, bias, float(p), own, dtype)
    if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
        input = input.to(weight.dtype)
    return F.linear(dropout(input, p, training, generator=generator, key=key), weight, bias)


class DropoutLinear(nn.Linear):
    """A linear layer that drops its input in training, and saves the input instead of its dropped copy.

    In PyTorch: ``nn.Sequential(nn.Dropout(p), nn.Linear(in_features, out_features, bias))``. It calls
    :func:`dropout_linear`, and has the state dict of ``nn.Linear``.

    Args:
        in_features: the size of the input's last dimension.
        out_features: the size of the output's last dimension.
        bias: if ``False``, the layer has no bias.
        p: the probability that an element of the input is zeroed, from 0 to 1. Read at each call.
        device: the device of the parameters, as in :class:`torch.nn.Linear`.
        dtype: the dtype of the parameters, as in :class:`torch.nn.Linear`.

    Shape: the input is (..., in_features), and the output is (..., out_features).

    Raises:
        ValueError: ``p`` is not between 0 and 1.
        TypeError: ``p`` is not a number.

    Example:
        >>> layer = fd.DropoutLinear(20, 30, p=0.1)
        >>> layer(torch.ones(4, 20)).shape
        torch.Size([4, 30])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_arguments(None, p, True)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        return dropout_linear(input, self.weight, self.bias, self.p, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
