"""Parts of a tensor, as windows of its element indices: shards, and what several runs of positions make up."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import order_by_stride

# The positions along one dimension of the global tensor that a part has, in its own order: (first, number) of each run
# of neighbours. A part without elements there has no run.
Runs = Sequence[tuple[int, int]]
# What users give for a part: the shape of the whole tensor, and for each dimension where the part begins in it, or a
# tuple of the beginnings of runs of equal length.
Shard = tuple[Sequence[int], Sequence[int | Sequence[int]]]


class Part(NamedTuple):
    """A part of a tensor: the whole tensor's shape, and the runs of the part along each dimension."""

    whole: tuple[int, ...]
    runs: list[Runs]


def part_of(shape: Sequence[int], shard: Shard) -> Part:
    """The part that a tensor of this shape is, as the user gives it.

    Raises:
        ValueError: the shape does not fit, or a part does not lie in the whole, or has an element twice.
        TypeError: ``shard`` is not a pair of sequences of integers.
    """
    try:
        whole, offsets = shard
        whole = tuple(map(_integer, whole))
        beginnings = [tuple(map(_integer, own)) if isinstance(own, Sequence) else (_integer(own),) for own in offsets]
    except (TypeError, ValueError):
        raise TypeError(
            f"shard has to be (global_shape, offsets), each with an entry a dimension, but is {shard}"
        ) from None
    if not len(whole) == len(beginnings) == len(shape):
        raise ValueError(
            f"shard has to have an entry for each of the {len(shape)} dimensions of the input, but is {shard}"
        )
    runs = []
    for d, (size, total, own) in enumerate(zip(shape, whole, beginnings, strict=True)):
        if len(own) == 0 or size % len(own) != 0:
            raise ValueError(f"shard: dimension {d} of the input has size {size}, which is not {len(own)} equal runs")
        number = size // len(own)
        ordered = sorted(own) if len(own) > 1 else own
        if ordered[0] < 0 or ordered[-1] + number > total:
            raise ValueError(
                f"shard: runs of {number} at {own} do not lie in dimension {d} of the whole, of size {total}"
            )
        if any(second - first < number for first, second in pairwise(ordered)):
            raise ValueError(f"shard: runs of {number} at {own} overlap in dimension {d}")
        runs.append(joined([(first, number) for first in own]) if number else [])
    return Part(whole, runs)


def _integer(n: int) -> int:
    """Not ``index`` alone, which makes a compiler take each number for a constant."""
    return n if isinstance(n, int) else index(n)


def chunk(runs: Runs, n: int, rank: int) -> Runs:
    """The part of ``torch.chunk(positions, n)`` with this number; nothing where there are fewer parts than n."""
    total = sum(number for _, number in runs)
    size = -(-total // n)
    return _between(runs, size * rank, size * (rank + 1))


def _between(runs: Runs, begin: int, end: int) -> Runs:
    """The positions from number ``begin`` to before number ``end``."""
    part, passed = [], 0
    for first, number in runs:
        low, high = max(begin - passed, 0), min(end - passed, number)
        if low < high:
            part.append((first + low, high - low))
        passed += number
    return part


def joined(runs: Runs) -> Runs:
    """The same positions with runs that follow on each other made one."""
    whole: list[tuple[int, int]] = []
    for first, number in runs:
        if whole and sum(whole[-1]) == first:
            whole[-1] = (whole[-1][0], whole[-1][1] + number)
        else:
            whole.append((first, number))
    return whole


def _are_regular(runs: Runs) -> bool:
    """Whether the runs are of one length and at one distance, so that two dimensions hold them."""
    distance = runs[1][0] - runs[0][0]
    return distance >= 0 and all(
        number == runs[0][1] and first == runs[0][0] + i * distance for i, (first, number) in enumerate(runs)
    )


def window(runs: Sequence[Runs], start: int, index_strides: Sequence[int]) -> tuple[int, list[int], list[int]] | int:
    """What an operator takes for a part of a tensor: start, the shape to view the part as, and its index strides.

    Returns a dimension instead if two dimensions cannot hold its runs.

    Raises:
        RuntimeError: an index is 2**63 or more.

    runs: for each dimension of the part. start, index_strides: of the whole tensor.
    """
    shape, strides = [], []
    for d, (own, stride) in enumerate(zip(runs, index_strides, strict=True)):
        if len(own) > 1 and stride != 0:
            if not _are_regular(own):
                return d
            shape += [len(own), own[0][1]]
            strides += [(own[1][0] - own[0][0]) * stride, stride]
        else:
            shape.append(sum(number for _, number in own))
            strides.append(stride)
        start += own[0][0] * stride if own else 0
    if any(type(n) is int and n >= 1 << 63 for n in (start, *strides)):
        raise RuntimeError("the largest element index has to be below 2**63")
    return start, shape, strides


def over_runs(
    function: Callable[[Tensor, int, list[int]], Tensor],
    x: Tensor,
    runs: Sequence[Runs],
    start: int,
    index_strides: Sequence[int],
    in_place: bool = False,
) -> Tensor:
    """``function(x, start, index_strides)`` for a part of a tensor, in as few calls as its runs allow.

    runs, start, index_strides: as in :func:`window`. The function takes those of what it is given, and returns a tensor
    of that shape. in_place: it changes what it is given, and only that counts.
    """
    whole = window(runs, start, index_strides)
    if isinstance(whole, int):
        return _over_each_run(function, x, whole, runs, start, index_strides, in_place)
    start, shape, strides = whole
    if len(shape) == x.dim():
        return function(x, start, strides)
    return function(x.view(shape), start, strides).reshape(x.shape)


def _over_each_run(
    function: Callable[[Tensor, int, list[int]], Tensor],
    x: Tensor,
    d: int,
    runs: Sequence[Runs],
    start: int,
    index_strides: Sequence[int],
    in_place: bool,
) -> Tensor:
    """``over_runs`` with a call for each run of dimension d. The result has the strides of ``torch.empty_like(x)``."""
    sizes = [number for _, number in runs[d]]
    # Autograd lets nobody change one of several views that split returns, but puts their gradients together at once.
    parts = [x.narrow(d, sum(sizes[:i]), n) for i, n in enumerate(sizes)] if in_place else x.split(sizes, d)
    each = [[*runs[:d], [run], *runs[d + 1 :]] for run in runs[d]]
    outputs = [
        over_runs(function, part, own, start, index_strides, in_place) for part, own in zip(parts, each, strict=True)
    ]
    if in_place:
        return x
    order = order_by_stride(x)  # cat fills memory in the order of the dimensions
    outputs = [output.permute(order) for output in outputs]
    return torch.cat(outputs, order.index(d)).permute([order.index(dim) for dim in range(x.dim())])
