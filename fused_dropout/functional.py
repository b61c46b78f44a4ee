"""``dropout`` and ``keep_mask``: what they accept, and which path serves a call."""

from collections.abc import Sequence
from operator import index

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.parameter import Parameter
from torch.overrides import _get_current_function_mode, handle_torch_function, has_torch_function_unary
from torch.utils._device import DeviceContext

from . import autograd, native, operators, reference, rng

# torch's own, whatever stands at that name later.
_torch_dropout = F.dropout
_DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_eager_dropout = native.eager.dropout if native.eager else None
_STRIDED = torch.strided
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    r"""Sets each element to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    Takes the place of :func:`torch.nn.functional.dropout`. Backward regenerates the mask from its 16-byte key; nothing
    else is saved. What the fused kernels do not cover (other dtypes, devices and layouts, tensor subclasses) is left to
    torch's own function.

    Args:
        input: a tensor of any shape; float32, float64, float16 or bfloat16 on CPU or CUDA for the fused path.
        p: probability of an element to be zeroed, between 0 and 1. Default: 0.5
        training: return ``input`` itself if ``False``. Default: ``True``
        inplace: overwrite ``input`` and return it. Default: ``False``
        generator: where the key is drawn from, in place of the default generator of the input's device.
        key: a uint64 tensor of shape (2,), ``[seed, offset]``, on the CPU or on the input's device: the mask is a pure
            function of it, and no generator is touched.

    Returns:
        A tensor of the input's shape and dtype, with the strides of ``torch.empty_like(input)``; ``input`` itself if
        ``p`` is 0, ``training`` is ``False`` or it is empty, or if ``inplace`` is ``True``.

    Raises:
        ValueError: ``p`` is not between 0 and 1; the key has another shape, dtype or device; key and generator both.
        TypeError: ``p`` is not a number; the key is not a tensor; a key or generator for a tensor that the fused path
            does not cover.
        RuntimeError: the generator is of another device; in place on a leaf that requires grad, or on shared memory.

    Example::

        >>> x = torch.ones(4)
        >>> key = torch.tensor([1, 0], dtype=torch.uint64)
        >>> fd.dropout(x, 0.5, key=key)
        tensor([2., 0., 2., 0.])
    """
    if has_torch_function_unary(input):
        return _overridden(input, p, training, inplace, generator, key)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if key is not None:
        _check_key(key, input, generator)
    if (not training or p == 0) and isinstance(input, Tensor):
        return input
    if _eager_dropout is not None and not _is_compiling() and isinstance(input, Tensor):
        output = _eager_dropout(input, p, inplace, generator, key)
        if output is not None:
            return output
    return _dropout(input, p, training, inplace, generator, key)


def _dropout(
    input: Tensor, p: float, training: bool, inplace: bool, generator: Generator | None, key: Tensor | None
) -> Tensor:
    """``dropout`` in Python: every transform and mode, and what goes to torch's own function."""
    transformed = autograd.is_transformed()
    if not _is_fusable(input) or (not transformed and _tracing_state() is not None):
        if key is not None or generator is not None:
            raise TypeError(f"key and generator are for the fused path, which does not take {_describe(input)}")
        return _torch_dropout(input, p, training, inplace)
    if input.numel() == 0:
        return input
    p = float(p)
    if inplace:
        _check_no_overlap(input)
    if key is None:
        if p == 1:
            key = rng.no_key()
        elif transformed:
            key = rng.draw_key_transformed(input.device, generator)
        else:
            key = rng.draw_key(input.device, generator)
    if not inplace:
        return autograd.apply(input, p, key, transformed)
    if transformed or input.is_inference() or (input.requires_grad and torch.is_grad_enabled()):
        # copy_ keeps autograd's and the transforms' rules for in-place changes, and raises torch's own errors.
        return input.copy_(autograd.apply(input, p, key, transformed))
    operators.apply_(input, p, key)
    torch.autograd.graph.increment_version(input)
    return input


def _is_fusable(x: object) -> bool:
    """Whether the fused path covers x: a plain strided tensor of a floating dtype on a CPU or CUDA device."""
    return (
        (type(x) is Tensor or type(x) is Parameter)
        and x.dtype in _DTYPES
        and (x.is_cpu or x.is_cuda)
        and x.layout is _STRIDED
        and not x.is_nested
    )


def _check_key(key: Tensor, input: Tensor, generator: Generator | None = None) -> None:
    if generator is not None:
        raise ValueError("key and generator were both given: a call draws its mask from one of them")
    if not isinstance(key, Tensor):
        raise TypeError(f"key has to be a uint64 tensor of shape (2,), but got {type(key).__name__}")
    if key.dtype != torch.uint64 or key.shape != (2,):
        raise ValueError(f"key has to be a uint64 tensor of shape (2,), but got {key.dtype} {tuple(key.shape)}")
    if key.device.type != "cpu" and key.device != input.device:
        raise ValueError(f"key has to be on the CPU or on the input's device {input.device}, but is on {key.device}")


def _check_no_overlap(x: Tensor) -> None:
    """Refuses to write to memory that several elements share, as torch does where it can tell cheaply."""
    span = 1
    for stride, size in reference.dims_by_stride(x):
        if stride < span:
            break
        span += stride * (size - 1)
    else:
        return
    # Interleaved dimensions may still be free of overlap: count the addresses.
    address = torch.arange(x.untyped_storage().nbytes() // x.element_size()).as_strided(x.shape, x.stride())
    if 0 in x.stride() or address.unique().numel() != x.numel():
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )


def _describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"a {type(x).__name__} of {x.dtype}, {x.layout}, on {x.device}"


def _overridden(
    input: Tensor, p: float, training: bool, inplace: bool, generator: Generator | None, key: Tensor | None
) -> Tensor:
    """Hands the call to __torch_function__: as torch's own dropout, so that FX, export and modes see what they know.

    A default device is a mode too, but one that says nothing about dropout; and a key has no place in torch's function.
    """
    if key is None and generator is None and not isinstance(_get_current_function_mode(), DeviceContext):
        return handle_torch_function(_torch_dropout, (input,), input, p=p, training=training, inplace=inplace)
    return handle_torch_function(
        dropout, (input,), input, p=p, training=training, inplace=inplace, generator=generator, key=key
    )


def keep_mask(
    x_or_shape: Tensor | Sequence[int],
    p: float,
    key: Tensor,
    device: torch.device | str | None = None,
    start: int = 0,
) -> Tensor:
    """The mask that ``dropout(x, p, key=key)`` applies: True where an element is kept.

    Args:
        x_or_shape: a tensor, whose layout the mask then has (its elements are numbered in memory order if it is dense,
            else row-major), or a shape, for a contiguous mask. The tensor's values and dtype do not matter.
        p: probability of an element to be dropped, between 0 and 1.
        key: a uint64 tensor of shape (2,), ``[seed, offset]``.
        device: where the mask is made. Default: the tensor's device, or the CPU for a shape.
        start: the index of the first element, 0 or more.

    Returns:
        A bool tensor of that shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``start`` is negative; the key has another shape, dtype or device.
        TypeError: ``start`` is not an integer; the key is not a tensor.

    Example::

        >>> fd.keep_mask((4,), 0.5, torch.tensor([1, 0], dtype=torch.uint64))
        tensor([ True, False,  True, False])
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if index(start) < 0:
        raise ValueError(f"start has to be 0 or more, but got {start}")
    shape, like = x_or_shape, None
    if isinstance(x_or_shape, Tensor):
        shape, like = x_or_shape.shape, x_or_shape.detach()
        if device is not None and like.device != torch.device(device):
            like = torch.empty_like(like, dtype=torch.bool, device=device) if reference.is_dense(like) else None
    if like is None:
        # One element stands for all: only shape, layout and device are looked at.
        like = torch.empty((), dtype=torch.bool, device=device or "cpu").expand(tuple(shape))
    _check_key(key, like)
    return operators.keep_mask(like, float(p), key, index(start))
