"""The functions ``dropout`` and ``keep_mask``, and what the other functions share with them.

Users call this layer. ``arguments.py`` checks the arguments, and ``dispatch.py`` chooses the implementation.
"""

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

_torch_dropout = F.dropout  # saved here, because patch() replaces F.dropout


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

    In PyTorch: ``torch.nn.functional.dropout(input, p, training, inplace)``.

    Backward computes the mask again from the call's 16-byte key, so a call saves the key and nothing else. The mask
    depends only on the key, ``p`` and the index of each element (docs/mask-v1.md). For a DTensor these are the indices
    of the global tensor. Inputs with a dtype, device or layout that the kernels do not support go to torch's own
    function.

    Args:
        input: a tensor of any shape. The kernels support float32, float64, float16 and bfloat16 on CPU and CUDA.
        p: the probability that an element is zeroed, from 0 to 1.
        training: if ``False``, returns ``input`` unchanged.
        inplace: if ``True``, overwrites ``input`` and returns it.
        generator: the generator that the key is drawn from. Default: the default generator of the input's device
        key: a uint64 tensor ``[seed, offset]`` of shape (2,), on the CPU or on the input's device. The call then uses
            no generator, and the same key gives the same mask again. See :func:`key`.
        noise_shape: the shape of the mask, which is broadcast to the input's shape. Each entry is 1 or the input's
            size in that dimension; ``None`` also means the input's size. Elements that share an entry of the mask are
            dropped together. The mask is ``keep_mask(noise_shape, p, key)``, and is never expanded in memory.
            Default: the input's shape
        shard: ``(global_shape, offsets)``, for an ``input`` that is a part of a larger tensor. It gives the shape of
            the larger tensor, and the position where the part begins in each dimension. The call applies this part of
            ``keep_mask(global_shape, p, key)``. An offset may be a tuple, if the part consists of several runs of
            equal length in that dimension: the first position of each run. ``noise_shape`` then belongs to the global
            tensor. All processes must use the same key, or generators in the same state (docs/distributed.md). Not for
            DTensors, which always get the global mask.

    Returns:
        A tensor of the input's shape and dtype, with the strides of ``torch.empty_like(input)``. It is ``input`` itself
        if ``inplace`` is ``True``, if ``training`` is ``False``, if ``p`` is 0, or if ``input`` is empty.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``key`` has a wrong shape, dtype or device; both ``key`` and
            ``generator`` are given; ``input`` does not lie inside the tensor that ``shard`` describes.
        TypeError: ``p`` is not a number, or is a tensor that requires grad; ``training`` is not a bool; ``key`` is not
            a tensor; ``generator`` is not a generator; ``noise_shape`` is not a sequence of integers and ``None``;
            ``key``, ``generator`` or ``shard`` is given for an input that the kernels do not support.
        RuntimeError: ``p`` is NaN; the generator belongs to another device; ``noise_shape`` does not broadcast to the
            input's shape; ``inplace`` is ``True`` and ``input`` is a leaf that requires grad, or several of its
            elements share memory.

    Example:
        >>> x = torch.ones(4)
        >>> fd.dropout(x, 0.5, key=fd.key(1))
        tensor([2., 0., 2., 0.])
        >>> fd.dropout(torch.ones(4, 3), 0.5, key=fd.key(1), noise_shape=(4, 1))  # one draw for each row
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
    """Calls ``dispatch.drop_part`` for a shard.

    strides_of: returns the index strides of the mask for the global tensor's shape.
    """
    part = part_of(input.shape, shard)
    return drop_part(input, part, p, inplace, generator, key, strides_of(part.whole), scale)


def noisy(x: Tensor, p: float, inplace: bool, strides: Sequence[int], scaled: bool = True) -> Tensor:
    """Torch's own dropout, with a mask that is broadcast over the dimensions whose index stride is 0."""
    noise = _torch_dropout(
        x.new_ones([size if stride else 1 for size, stride in zip(x.shape, strides, strict=True)]), p
    )
    noise = noise if scaled else noise != 0
    return x.mul_(noise) if inplace else x * noise


def is_overridden(x: Tensor) -> bool:
    """Whether a ``__torch_function__`` has to get the call: that of a mode, or one that a subclass defines itself.

    A subclass that defines only ``__torch_dispatch__`` does not need it: it sees the operations inside.
    """
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
    """Passes the call to ``__torch_function__`` as a call of torch's own function, which FX, export and modes know.

    Passes it as our function in two cases: if it has arguments that torch's function lacks, such as a key, and under
    ``torch.device`` as a mode, which only sets the default device.
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
    """Returns the mask that ``dropout(x, p, key=key)`` applies: ``True`` where an element is kept.

    In PyTorch: ``torch.rand(shape) >= p``, with random numbers that depend only on the key and the element's index.
    The element is kept if its 48-bit number from Philox4x32-10 is below ``(1 - p) * 2**48`` (docs/mask-v1.md has the
    definition; Philox is from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).

    Args:
        x_or_shape: a tensor or a shape. For a tensor, the mask has its layout; its values and dtype have no effect. The
            elements are numbered in memory order if the tensor is dense, else in row-major order. For a shape, the mask
            is contiguous.
        p: the probability that an element is dropped, from 0 to 1.
        key: a uint64 tensor ``[seed, offset]`` of shape (2,). See :func:`key`.
        device: the device of the mask. Default: the tensor's device; for a shape, the key's device
        start: the index of the first element, from 0 to 2**63 - 1. With ``shard``: of the global tensor's first
            element.
        shard: ``(global_shape, offsets)`` as in :func:`dropout`. The result is this part of
            ``keep_mask(global_shape, p, key)``.

    Returns:
        A bool tensor of the tensor's shape, or of the given shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``start`` or a size is out of range; ``key`` has a wrong shape, dtype
            or device; the shape does not lie inside the tensor that ``shard`` describes.
        TypeError: ``p`` is not a number; ``start`` is not an integer; ``x_or_shape`` is neither a tensor nor a sequence
            of integers; ``key`` is not a tensor.
        RuntimeError: ``p`` is NaN; an element's index is 2**63 or more.

    Example:
        >>> fd.keep_mask((4,), 0.5, fd.key(1))
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
        # The operator reads only shape, strides and device. One expanded element saves the memory.
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
