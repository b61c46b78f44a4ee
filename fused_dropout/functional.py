"""``dropout`` and ``keep_mask``: what a call means. ``arguments.py`` checks it, and ``dispatch.py`` serves it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils._device import DeviceContext

from . import operators, reference
from .arguments import check_arguments, check_key, integer, noise_strides, sizes
from .dispatch import drop, drop_part
from .distributed import register_rules
from .reference import row_major
from .torch_internals import function_mode, is_distributed, wraps_tensors
from .windows import Shard, over_runs, part_of

_torch_dropout = F.dropout  # torch's own, whatever stands at that name later


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
        TypeError: ``p`` is not a number, or a tensor that requires grad; ``training`` is not a bool; the key is not a
            tensor, or the generator not a generator; ``noise_shape`` is not a sequence of integers and ``None``; a key,
            generator or shard for a tensor that the fused path does not cover.
        RuntimeError: ``p`` is NaN; the generator is of another device; in place on a leaf that requires grad, or on
            shared memory; ``noise_shape`` does not broadcast to the input's shape.

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
    if has_torch_function_unary(input) and is_overridden(input):
        more = {"generator": generator, "key": key, "noise_shape": noise_shape, "shard": shard}
        return hand_over(dropout, _torch_dropout, input, p, training, inplace, more)
    check_arguments(input, p, training, generator, key)
    if (not training or p == 0) and isinstance(input, Tensor):
        return input
    if shard is not None:
        strides_of = row_major if noise_shape is None else partial(noise_strides, noise_shape)
        return drop_shard(input, p, inplace, generator, key, shard, strides_of)
    strides = None if noise_shape is None else noise_strides(noise_shape, input.shape)
    output = drop(input, p, inplace, generator, key, strides)
    if output is not None:
        return output
    return _torch_dropout(input, p, training, inplace) if strides is None else noisy(input, p, inplace, strides)


def drop_shard(
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


def noisy(x: Tensor, p: float, inplace: bool, strides: Sequence[int], scaled: bool = True) -> Tensor:
    """Torch's own dropout with a mask that is broadcast where the stride is 0."""
    noise = _torch_dropout(
        x.new_ones([size if stride else 1 for size, stride in zip(x.shape, strides, strict=True)]), p
    )
    noise = noise if scaled else noise != 0
    return x.mul_(noise) if inplace else x * noise


def is_overridden(x: Tensor) -> bool:
    """Whether a ``__torch_function__`` has to see the call: a mode's or a subclass's own, not the default of a subclass
    that sees operations instead."""
    return function_mode() is not None or not (isinstance(x, Tensor) and wraps_tensors(x))


def hand_over(
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
        device: where the mask is made. Default: the tensor's device, or the key's for a shape.
        start: the index of the first element, from 0 to 2**63 - 1; with ``shard``, of the global tensor's first.
        shard: as in :func:`dropout`: the mask is that part of ``keep_mask(global_shape, p, key)``.

    Returns:
        A bool tensor of that shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``start`` or a size is out of range; the key has another shape, dtype
            or device; the shape does not lie in the tensor that ``shard`` describes.
        TypeError: ``p`` is not a number, ``start`` not an integer, ``x_or_shape`` neither a tensor nor a sequence of
            integers, or the key not a tensor.
        RuntimeError: ``p`` is NaN; an element has an index of 2**63 or more.

    Example::

        >>> fd.keep_mask((4,), 0.5, torch.tensor([1, 0], dtype=torch.uint64))
        tensor([ True, False,  True, False])
    """
    check_arguments(None, p, True)
    start = integer(start, "start")
    if not 0 <= start < 2**63:
        raise ValueError(f"start has to be from 0 to 2**63 - 1, but is {start}")
    like = None
    if isinstance(x_or_shape, Tensor):
        shape, like = list(x_or_shape.shape), x_or_shape.detach()
        if device is not None and like.device != torch.device(device):
            like = torch.empty_like(like, dtype=torch.bool, device=device) if reference.is_dense(like) else None
    else:
        shape = sizes(x_or_shape)
        if device is None:
            device = key.device if isinstance(key, Tensor) and key.is_cuda else "cpu"
    if like is None:
        # One element stands for all: only shape, layout and device are looked at.
        like = torch.empty((), dtype=torch.bool, device=device).expand(shape)
    check_key(key, like.device)
    if is_distributed(like):
        register_rules()
    if shard is None:
        return operators.keep_mask_as_served(like, float(p), key, start)
    part = part_of(like.shape, shard)

    def on_window(window: Tensor, start: int, strides: list[int]) -> Tensor:
        return operators.keep_mask_as_served(window, float(p), key, start, strides)

    return over_runs(on_window, like, part.runs, start, row_major(part.whole))
