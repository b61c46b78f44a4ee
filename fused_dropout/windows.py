"""Describes a shard of a tensor as windows of element indices: start and index strides for the operator.

``dispatch.py`` uses it for the argument ``shard``, and ``distributed.py`` for DTensors.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import as_size
from .reference import order_by_stride

# The positions that a part holds along one dimension of the global tensor, in the order in which it holds them. Each
# entry is a run of consecutive positions: (first, count). An empty part has no runs.
Runs = Sequence[tuple[int, int]]
# The argument ``shard``: the shape of the global tensor, and for each dimension the position where the part begins. A
# tuple of positions gives the first positions of runs of equal length.
Shard = tuple[Sequence[int], Sequence[int | Sequence[int]]]


class Part(NamedTuple):
    """A part of a tensor: the whole tensor's shape, and the runs of the part along each dimension."""

    whole: tuple[int, ...]
    runs: list[Runs]


def part_of(shape: Sequence[int], shard: Shard) -> Part:
    """Checks and converts the argument ``shard`` of a call on a tensor of this shape.

    Raises:
        ValueError: the shapes do not fit; the part does not lie inside the whole, or has an element twice.
        TypeError: ``shard`` is not a pair of sequences of integers.
    """
    try:
        whole, offsets = shard
        whole = tuple(map(as_size, whole))
        beginnings = [tuple(map(as_size, own)) if isinstance(own, Sequence) else (as_size(own),) for own in offsets]
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
        count = size // len(own)
        ordered = sorted(own) if len(own) > 1 else own
        if ordered[0] < 0 or ordered[-1] + count > total:
            raise ValueError(
                f"shard: runs of {count} at {own} do not lie in dimension {d} of the whole, of size {total}"
            )
        if any(second - first < count for first, second in pairwise(ordered)):
            raise ValueError(f"shard: runs of {count} at {own} overlap in dimension {d}")
        runs.append(joined([(first, count) for first in own]) if count else [])
    return Part(whole, runs)


def chunk(runs: Runs, n: int, rank: int) -> Runs:
    """``torch.chunk(positions, n)[rank]``, or no runs if there are fewer chunks."""
    total = sum(count for _, count in runs)
    size = -(-total // n)
    return _between(runs, size * rank, size * (rank + 1))


def _between(runs: Runs, begin: int, end: int) -> Runs:
    """``positions[begin:end]``."""
    part, passed = [], 0
    for first, count in runs:
        low, high = max(begin - passed, 0), min(end - passed, count)
        if low < high:
            part.append((first + low, high - low))
        passed += count
    return part


def joined(runs: Runs) -> Runs:
    """The same positions, with adjacent runs merged."""
    whole: list[tuple[int, int]] = []
    for first, count in runs:
        if whole and sum(whole[-1]) == first:
            whole[-1] = (whole[-1][0], whole[-1][1] + count)
        else:
            whole.append((first, count))
    return whole


def _are_regular(runs: Runs) -> bool:
    """Whether all runs have the same length and distance. A view with one more dimension then describes them."""
    distance = runs[1][0] - runs[0][0]
    return distance >= 0 and all(
        count == runs[0][1] and first == runs[0][0] + i * distance for i, (first, count) in enumerate(runs)
    )


def window(runs: Sequence[Runs], start: int, index_strides: Sequence[int]) -> tuple[int, list[int], list[int]] | int:
    """The operator's arguments for a part of a tensor: start, the shape of a view of the part, and index strides.

    If the runs of a dimension are irregular, the part needs several calls. The function then returns that dimension.

    runs: the runs in each dimension of the part. start, index_strides: those of the whole tensor.

    Raises:
        RuntimeError: an index is 2**63 or more.
    """
    shape, strides = [], []
    for d, (own, stride) in enumerate(zip(runs, index_strides, strict=True)):
        if len(own) > 1 and stride != 0:
            if not _are_regular(own):
                return d
            shape += [len(own), own[0][1]]
            strides += [(own[1][0] - own[0][0]) * stride, stride]
        else:
            shape.append(sum(count for _, count in own))
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
    """Calls ``function(view, start, index_strides)`` for all of x, a part of a tensor, in as few calls as possible.

    runs, start, index_strides: as in :func:`window`. The function gets a view of x, with the start and the index
    strides of that view, and returns a tensor of the view's shape. in_place: the function changes the view, and its
    result is ignored.
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
    """``over_runs`` with one call for each run of dimension d.

    Returns a tensor with the strides of ``torch.empty_like(x)``.
    """
    sizes = [count for _, count in runs[d]]
    # Autograd forbids in-place changes of views from split. Otherwise split is faster: its backward makes one gradient
    # in all, and that of narrow one full gradient for each run, which are then added.
    parts = [x.narrow(d, sum(sizes[:i]), n) for i, n in enumerate(sizes)] if in_place else x.split(sizes, d)
    each = [[*runs[:d], [run], *runs[d + 1 :]] for run in runs[d]]
    outputs = [
        over_runs(function, part, own, start, index_strides, in_place) for part, own in zip(parts, each, strict=True)
    ]
    if in_place:
        return x
    order = order_by_stride(x)  # cat returns a row-major result, so the dimensions are put into x's memory order
    outputs = [output.permute(order) for output in outputs]
    return torch.cat(outputs, order.index(d)).permute([order.index(dim) for dim in range(x.dim())])
