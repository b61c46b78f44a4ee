"""``dropout``, its family and ``keep_mask``: what they accept, and what they mean. ``dispatch.py`` serves them."""

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils._device import DeviceContext

from . import operators, reference
from .autograd import must_compose
from .dispatch import drop, drop_part, is_covered
from .distributed import is_distributed, register_rules
from .reference import row_major
from .torch_internals import function_mode, wraps_tensors
from .windows import Shard, over_runs, part_of

# torch's own, whatever stands at these names later.
_torch_dropout = F.dropout
_torch_dropout1d, _torch_dropout2d, _torch_dropout3d = F.dropout1d, F.dropout2d, F.dropout3d
_torch_alpha_dropout, _torch_feature_alpha_dropout = F.alpha_dropout, F.feature_alpha_dropout
# The value that a SELU unit saturates at, negated: scale times alpha of Klambauer et al., "Self-Normalizing Neural
# Networks", NIPS'17, as in torch.
_SELU_SATURATION = 1.7580993408473766


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    noise_shape: Sequence[int | None] | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Sets each element to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    Takes the place of :func:`torch.nn.functional.dropout`. Backward regenerates the mask from its 16-byte key; nothing
    else is saved. A DTensor is dropped by the mask of the global tensor. What the fused kernels do not cover (other
    dtypes, devices and layouts) is left to torch's own function.

    Args:
        input: a tensor of any shape; float32, float64, float16 or bfloat16 on CPU or CUDA for the fused path.
        p: probability of an element to be zeroed, between 0 and 1. Default: 0.5
        training: return ``input`` itself if ``False``. Default: ``True``
        inplace: overwrite ``input`` and return it. Default: ``False``
        generator: where the key is drawn from, in place of the default generator of the input's device.
        key: a uint64 tensor of shape (2,), ``[seed, offset]``, on the CPU or on the input's device: the mask is a pure
            function of it, and no generator is touched.
        noise_shape: the mask's shape, in place of the input's; it is broadcast over the dimensions where it has 1, so
            that elements there are dropped together. Each entry is 1 or the input's size there, for which ``None``
            may stand. The mask is ``keep_mask(noise_shape, p, key)``, and never expanded in memory.
        shard: ``(global_shape, offsets)``, if ``input`` is a part of a larger tensor: the shape of that tensor, and for
            each dimension the position where the part begins. The mask is this part of
            ``keep_mask(global_shape, p, key)``, so that all parts together are dropped as one tensor. An offset may be
            a tuple: the first positions of runs of equal length, which follow on each other in ``input``.
            ``noise_shape`` is that of the global tensor. All processes have to use the same key, or generators in the
            same state; see docs/distributed.md. Only for plain tensors: DTensors always have the global mask.

    Returns:
        A tensor of the input's shape and dtype, with the strides of ``torch.empty_like(input)``; ``input`` itself if
        ``p`` is 0, ``training`` is ``False`` or it is empty, or if ``inplace`` is ``True``.

    Raises:
        ValueError: ``p`` is not between 0 and 1; the key has another shape, dtype or device; key and generator both;
            ``input`` does not lie in the tensor that ``shard`` describes.
        TypeError: ``p`` is not a number; the key is not a tensor; a key, generator or shard for a tensor that the fused
            path does not cover.
        RuntimeError: the generator is of another device; in place on a leaf that requires grad, or on shared memory;
            ``noise_shape`` does not broadcast to the input's shape.

    Example::

        >>> x = torch.ones(4)
        >>> key = torch.tensor([1, 0], dtype=torch.uint64)
        >>> fd.dropout(x, 0.5, key=key)
        tensor([2., 0., 2., 0.])
        >>> fd.dropout(torch.ones(4, 3), 0.5, key=key, noise_shape=(4, 1))  # one draw a row
        tensor([[2., 2., 2.],
                [0., 0., 0.],
                [2., 2., 2.],
                [0., 0., 0.]])
    """
    if has_torch_function_unary(input) and _is_overridden(input):
        more = {"generator": generator, "key": key, "noise_shape": noise_shape, "shard": shard}
        return _hand_over(dropout, _torch_dropout, input, p, training, inplace, more)
    if not 0.0 <= p <= 1.0:
        raise out_of_range(p)
    if key is not None:
        check_key(key, input, generator)
    if (not training or p == 0) and isinstance(input, Tensor):
        return input
    if shard is not None:
        strides_of = row_major if noise_shape is None else partial(noise_strides, noise_shape)
        return _drop_shard(input, p, inplace, generator, key, shard, strides_of)
    strides = None if noise_shape is None else noise_strides(noise_shape, input.shape)
    output = drop(input, p, inplace, generator, key, strides)
    if output is not None:
        return output
    return _torch_dropout(input, p, training, inplace) if strides is None else _noisy(input, p, inplace, strides)


def _drop_shard(
    input: Tensor,
    p: float,
    inplace: bool,
    generator: Generator | None,
    key: Tensor | None,
    shard: Shard,
    strides_of: Callable[[Sequence[int]], Sequence[int]],
    scale: float | None = None,
) -> Tensor:
    """``drop`` of a shard. strides_of: the index strides for a shape, here that of the global tensor."""
    part = part_of(input.shape, shard)
    return drop_part(input, part, p, inplace, generator, key, strides_of(part.whole), scale)


def noise_strides(noise_shape: Sequence[int | None], shape: Sequence[int]) -> list[int]:
    """The index strides of a mask that is broadcast to this shape: numbered row-major, 0 where it is broadcast.

    Raises:
        RuntimeError: it does not broadcast.
    """
    strides, stride, missing = [0] * len(shape), 1, len(shape) - len(noise_shape)
    for d in range(len(shape) - 1, missing - 1, -1):
        given = None if missing < 0 else noise_shape[d - missing]
        size = shape[d] if given is None else given
        fits = size == 1 or size == shape[d]
        if missing < 0 or not fits:
            raise RuntimeError(
                f"The noise_shape has to broadcast to the input's shape: each of its sizes has to be 1 or the input's. "
                f"Input sizes: {list(shape)}.  Noise sizes: {list(noise_shape)}"
            )
        if size != 1:
            strides[d] = stride
            stride *= size
    return strides


def _noisy(x: Tensor, p: float, inplace: bool, strides: Sequence[int], scaled: bool = True) -> Tensor:
    """Torch's own dropout with a mask that is broadcast where the stride is 0."""
    noise = _torch_dropout(
        x.new_ones([size if stride else 1 for size, stride in zip(x.shape, strides, strict=True)]), p
    )
    noise = noise if scaled else noise != 0
    return x.mul_(noise) if inplace else x * noise


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Sets each channel to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    Takes the place of :func:`torch.nn.functional.dropout1d`; :func:`dropout` with a ``noise_shape`` of 1 for the
    spatial dimension.

    Args:
        input: shape (N, C, L) or (C, L); dtypes and devices as in :func:`dropout`, else torch's own function serves.
        p, training, inplace, generator, key, shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype; ``input`` itself as in :func:`dropout`.

    Raises:
        RuntimeError: the input has another number of dimensions. Otherwise as :func:`dropout`.
    """
    return _channelwise(dropout1d, _torch_dropout1d, (2, 3), 3, input, p, training, inplace, generator, key, shard)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Sets each channel to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    Takes the place of :func:`torch.nn.functional.dropout2d`; :func:`dropout` with a ``noise_shape`` of (N, C, 1, 1).

    Args:
        input: shape (N, C, H, W), or (N, C, L) with torch's warning; dtypes and devices as in :func:`dropout`, else
            torch's own function serves. Other numbers of dimensions from 2 on are taken as (N, C, \*), with a warning.
        p, training, inplace, generator, key, shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype; ``input`` itself as in :func:`dropout`.

    Raises:
        RuntimeError: the input has less than 2 dimensions. Otherwise as :func:`dropout`.
    """
    return _channelwise(dropout2d, _torch_dropout2d, (4,), None, input, p, training, inplace, generator, key, shard)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Sets each channel to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    Takes the place of :func:`torch.nn.functional.dropout3d`; :func:`dropout` with a ``noise_shape`` of 1 for the
    spatial dimensions.

    Args:
        input: shape (N, C, D, H, W) or (C, D, H, W); dtypes and devices as in :func:`dropout`, else torch's own
            function serves. Other numbers of dimensions are taken as (C, \*), with torch's warning.
        p, training, inplace, generator, key, shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype; ``input`` itself as in :func:`dropout`.

    Raises:
        RuntimeError: the input has no dimension. Otherwise as :func:`dropout`.
    """
    return _channelwise(dropout3d, _torch_dropout3d, (4, 5), 5, input, p, training, inplace, generator, key, shard)


def _channelwise(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    ranks: tuple[int, ...],
    batched: int | None,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: Generator | None,
    key: Tensor | None,
    shard: Shard | None,
) -> Tensor:
    """One draw a channel. ranks: the numbers of dimensions that torch does not comment on; batched: the one that has
    samples before channels, None if all have."""
    if has_torch_function_unary(input) and _is_overridden(input):
        return _hand_over(
            ours, theirs, input, p, training, inplace, {"generator": generator, "key": key, "shard": shard}
        )
    if not 0.0 <= p <= 1.0:
        raise out_of_range(p)
    if key is not None:
        check_key(key, input, generator)
    dims = input.dim()
    lead = 2 if batched is None or dims == batched else 1
    if not training or p == 0 or dims < lead:
        return theirs(input, p, training, inplace)
    if dims not in ranks and is_covered(input, generator, key, shard):
        theirs(input, p, training=False)  # changes nothing, but warns or raises in torch's words
    if shard is not None:
        return _drop_shard(input, p, inplace, generator, key, shard, partial(_lead_strides, lead))
    output = drop(input, p, inplace, generator, key, _lead_strides(lead, input.shape))
    return theirs(input, p, training, inplace) if output is None else output


def _lead_strides(lead: int, shape: Sequence[int]) -> list[int]:
    """Row-major index strides of the first dimensions, one or two, for a mask that is broadcast over the others."""
    return [shape[1] if lead == 2 else 1, 1][:lead] + [0] * (len(shape) - lead)


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Sets each element to SELU's negative saturation with probability ``p``, then restores mean 0 and variance 1.

    Takes the place of :func:`torch.nn.functional.alpha_dropout`, with its formula (Klambauer et al., "Self-Normalizing
    Neural Networks", NIPS'17): a kept x becomes :math:`a x + b`, a dropped one :math:`-a \alpha + b`, where
    :math:`\alpha = 1.7580993408473766`, :math:`a = ((1 - p) (1 + p \alpha^2))^{-1/2}`, :math:`b = a \alpha p`.
    If ``p`` is 1 all become 0.

    Args:
        input: a tensor of any shape; dtypes and devices as in :func:`dropout`, else torch's own function serves.
        p, inplace, generator, key, shard: as in :func:`dropout`; the mask is the one that it applies.
        training: return ``input`` itself if ``False``. Default: ``False``, as in torch

    Returns:
        A tensor of the input's shape and dtype; ``input`` itself as in :func:`dropout`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dropout`.
    """
    return _alpha(alpha_dropout, _torch_alpha_dropout, None, input, p, training, inplace, generator, key, shard)


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""``alpha_dropout`` of whole channels: the mask of :func:`dropout` with a ``noise_shape`` of (N, C, 1, ...).

    Takes the place of :func:`torch.nn.functional.feature_alpha_dropout`.

    Args:
        input: shape (N, C, \*); dtypes and devices as in :func:`dropout`, else torch's own function serves.
        p, training, inplace, generator, key, shard: as in :func:`alpha_dropout`.

    Returns:
        A tensor of the input's shape and dtype; ``input`` itself as in :func:`dropout`.

    Raises:
        RuntimeError: the input has less than 2 dimensions. Otherwise as :func:`dropout`.
    """
    return _alpha(
        feature_alpha_dropout, _torch_feature_alpha_dropout, 2, input, p, training, inplace, generator, key, shard
    )


def _alpha(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    lead: int | None,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: Generator | None,
    key: Tensor | None,
    shard: Shard | None,
) -> Tensor:
    """Alpha dropout of elements (lead None), or of all that share the first ``lead`` indices.

    It is dropout of x + alpha between two affine maps, so that its mask, its gradient and what they save are dropout's.
    """
    if has_torch_function_unary(input) and _is_overridden(input):
        return _hand_over(
            ours, theirs, input, p, training, inplace, {"generator": generator, "key": key, "shard": shard}
        )
    if not 0.0 <= p <= 1.0:
        raise out_of_range(p)
    if key is not None:
        check_key(key, input, generator)
    dropping = training and p != 0 and is_covered(input, generator, key, shard)
    if not dropping or input.dim() < (lead or 0):
        return theirs(input, p, training, inplace)
    if shard is not None:
        part_of(input.shape, shard)  # checks it for p = 1 and tensors without dimensions too
    output: Tensor | None
    if p == 1:
        output = drop(input, p, inplace)
        return theirs(input, p, training, inplace) if output is None else output
    if input.dim() == 0:  # see autograd.compose
        output = _alpha(ours, theirs, lead, input.reshape(1), p, training, False, generator, key, None).reshape(())
        return input.copy_(output) if inplace else output
    shifted = input + _SELU_SATURATION
    if shard is not None:
        strides_of = row_major if lead is None else partial(_lead_strides, lead)
        output = _drop_shard(shifted, p, False, generator, key, shard, strides_of)
    elif lead:
        output = drop(shifted, p, False, generator, key, _lead_strides(lead, input.shape))
    else:  # numbered as input is, which need not have the layout of the sum
        strides = None if input.is_contiguous() else reference.index_strides_of(input)
        output = drop(shifted, p, False, generator, key, strides)
    if output is None:
        return theirs(input, p, training, inplace)
    if output is shifted:  # it is empty
        return input
    p = float(p)
    scale = 1 / sqrt((1 - p) * (1 + p * _SELU_SATURATION**2))
    factor, shift = scale * (1 - p), -scale * (1 - p) * _SELU_SATURATION
    # A mode, such as selective checkpointing's, may hold dropout's result, which then must not change.
    output = output * factor + shift if must_compose(input) else output.mul_(factor).add_(shift)
    return input.copy_(output) if inplace else output


def drop_path(
    x: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """Stochastic depth: sets each sample to zero with probability ``drop_prob`` (Huang et al., "Deep Networks with
    Stochastic Depth", ECCV'16), with timm's arguments and defaults.

    Args:
        x: shape (N, ...); dtypes and devices as in :func:`dropout`.
        drop_prob: probability of a sample to be zeroed, between 0 and 1. Default: 0
        training: return ``x`` itself if ``False``. Default: ``False``
        scale_by_keep: multiply the other samples by ``1 / (1 - drop_prob)``. Default: ``True``
        generator, key, shard: as in :func:`dropout`; the mask is that of ``noise_shape=(N, 1, ..., 1)``.

    Returns:
        A tensor of x's shape and dtype; ``x`` itself if ``drop_prob`` is 0 or ``training`` is ``False``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dropout`.

    Example::

        >>> fd.drop_path(torch.ones(4, 2), 0.5, training=True, key=fd.key(1))
        tensor([[2., 2.],
                [0., 0.],
                [2., 2.],
                [0., 0.]])
    """
    if has_torch_function_unary(x) and _is_overridden(x):
        more: dict[str, Any] = {"scale_by_keep": scale_by_keep, "generator": generator, "key": key, "shard": shard}
        return handle_torch_function(drop_path, (x,), x, drop_prob=drop_prob, training=training, **more)
    if not 0.0 <= drop_prob <= 1.0:
        raise out_of_range(drop_prob)
    if key is not None:
        check_key(key, x, generator)
    if not training or drop_prob == 0:
        return x
    scale = None if scale_by_keep else 1.0
    if shard is not None:
        return _drop_shard(x, drop_prob, False, generator, key, shard, partial(_lead_strides, 1), scale)
    strides = [1] + [0] * (x.dim() - 1)
    output = drop(x, drop_prob, False, generator, key, strides, scale)
    return _noisy(x, drop_prob, False, strides, scale_by_keep) if output is None else output


def out_of_range(p: float) -> ValueError:
    return ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def check_key(key: Tensor, input: Tensor, generator: Generator | None = None) -> None:
    if generator is not None:
        raise ValueError("key and generator were both given: a call draws its mask from one of them")
    if not isinstance(key, Tensor) or is_distributed(key):
        raise TypeError(f"key has to be a uint64 tensor of shape (2,), but got {type(key).__name__}")
    if key.dtype != torch.uint64 or key.shape != (2,):
        raise ValueError(f"key has to be a uint64 tensor of shape (2,), but got {key.dtype} {tuple(key.shape)}")
    if key.device.type != "cpu" and key.device != input.device:
        raise ValueError(f"key has to be on the CPU or on the input's device {input.device}, but is on {key.device}")


def _is_overridden(x: Tensor) -> bool:
    """Whether a ``__torch_function__`` has to see the call: a mode's or a subclass's own, not the default of a subclass
    that sees operations instead."""
    return function_mode() is not None or not (isinstance(x, Tensor) and wraps_tensors(x))


def _hand_over(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    more: dict[str, Any],
) -> Tensor:
    """Hands the call to __torch_function__: as torch's own dropout, so that FX, export and modes see what they know.

    A default device is a mode too, but one that says nothing about dropout; and a key has no place in torch's function.
    """
    more = {name: value for name, value in more.items() if value is not None}
    seen = ours if more or isinstance(function_mode(), DeviceContext) else theirs
    return handle_torch_function(seen, (input,), input, p=p, training=training, inplace=inplace, **more)


def keep_mask(
    x_or_shape: Tensor | Sequence[int],
    p: float,
    key: Tensor,
    device: torch.device | str | None = None,
    start: int = 0,
    shard: Shard | None = None,
) -> Tensor:
    """The mask that ``dropout(x, p, key=key)`` applies: True where an element is kept.

    Args:
        x_or_shape: a tensor, whose layout the mask then has (its elements are numbered in memory order if it is dense,
            else row-major), or a shape, for a contiguous mask. The tensor's values and dtype do not matter.
        p: probability of an element to be dropped, between 0 and 1.
        key: a uint64 tensor of shape (2,), ``[seed, offset]``.
        device: where the mask is made. Default: the tensor's device, or the CPU for a shape.
        start: the index of the first element, 0 or more; with ``shard``, of the global tensor's first.
        shard: as in :func:`dropout`: the mask is that part of ``keep_mask(global_shape, p, key)``.

    Returns:
        A bool tensor of that shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``start`` is negative; the key has another shape, dtype or device;
            the shape does not lie in the tensor that ``shard`` describes.
        TypeError: ``start`` is not an integer; the key is not a tensor.

    Example::

        >>> fd.keep_mask((4,), 0.5, torch.tensor([1, 0], dtype=torch.uint64))
        tensor([ True, False,  True, False])
    """
    if not 0.0 <= p <= 1.0:
        raise out_of_range(p)
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
    check_key(key, like)
    if is_distributed(like):
        register_rules()
    if shard is None:
        return operators.keep_mask_as_served(like, float(p), key, index(start))
    part = part_of(like.shape, shard)

    def on_window(window: Tensor, start: int, strides: list[int]) -> Tensor:
        return operators.keep_mask_as_served(window, float(p), key, start, strides)

    return over_runs(on_window, like, part.runs, index(start), row_major(part.whole))
