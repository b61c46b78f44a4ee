"""The mask contract in PyTorch, on any device: the readable specification, which runs if there is no kernel.

The mask is a pure function of a key ``[seed, offset]``, the drop probability p and each element's index i:

1. ``block = i // 8``. Philox4x32-10 gives four 32-bit words for the counter (offset, block) and the key (seed), each a
   64-bit number, low word first (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11).
2. ``draw(i)`` is the 16-bit half-word ``i % 8`` of the block. ``tie(i)`` is the XOR of the three other words.
3. ``K = floor((1 - p) * 2**48 + 0.5)``, at least 1 and at most ``2**48 - 1``. Element i is kept if, and only if,
   ``draw(i) * 2**32 + tie(i) < K``.

A kept element becomes ``x * scale`` with ``scale = 1 / (1 - p)``: the product is taken in float32 (float64 for float64)
and rounded once to x's dtype. A dropped element becomes +0, also if it was inf or NaN.

Element (i_0, ..., i_n-1) has the index ``start + sum(i_d * index_strides[d])``. Without index strides these are x's own
strides if x is dense, and the row-major strides of its shape otherwise.

Words are int64 tensors here, since PyTorch has no unsigned 32-bit arithmetic.
"""

from collections.abc import Sequence
from math import floor, prod

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
BLOCK = 8
LOW_32 = 0xFFFFFFFF
CHUNK = 1 << 15  # blocks drawn at a time; their words and products take about forty bytes for each element


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product. Uses ``multiplier - 2**32``, because the full product overflows int64."""
    product = word * (multiplier - (1 << 32))
    return (product >> 32).add_(word), product.bitwise_and_(LOW_32)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four int64 tensors of 32-bit words for a counter of four and a key of two such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = (high1 ^ c1).bitwise_xor_(k0), low1, (high0 ^ c3).bitwise_xor_(k1), low0
        k0, k1 = (k0 + WEYL[0]) & LOW_32, (k1 + WEYL[1]) & LOW_32
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """K: how many of the 2**48 equally likely (draw, tie) pairs are kept."""
    if p in (0, 1):
        return 0 if p else 1 << 48
    return min(max(floor((1.0 - p) * 2**48 + 0.5), 1), (1 << 48) - 1)


def scale(p: float) -> float:
    """The factor of a kept element, 1 / (1 - p); 0 for p = 1."""
    return 1.0 / (1.0 - p) if p < 1 else 0.0


def row_major(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor of this shape."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides


def order_by_stride(x: Tensor) -> list[int]:
    """The dimensions of x in the order in which ``torch.empty_like(x)`` has them in memory, outermost first."""
    order = list(range(x.dim()))
    if x.is_contiguous():
        return order
    # An insertion sort from the innermost dimension on. sorted() cannot be used: a stride of 0 compares with no other,
    # and a compiler does not know its symbolic sizes yet.
    for place in range(x.dim() - 2, -1, -1):
        moving = place
        for other in range(place + 1, x.dim()):
            outer, inner = order[moving], order[other]
            if x.stride(outer) == 0 or x.stride(inner) == 0:
                continue
            if x.stride(outer) > x.stride(inner):
                break
            if x.stride(outer) < x.stride(inner) or x.shape[outer] < x.shape[inner]:
                order[moving], order[other] = inner, outer
                moving = other
    return order


def is_dense(x: Tensor) -> bool:
    """Whether x fills one contiguous piece of memory without overlap, in any order of its dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for d in order_by_stride(x)[::-1]:
        if x.shape[d] == 1:
            continue
        if x.stride(d) != expected:
            return False
        expected *= x.shape[d]
    return True


def index_strides_of(x: Tensor) -> Sequence[int]:
    """The default index strides: x's own strides if it is dense, else the row-major strides of its shape."""
    return x.stride() if is_dense(x) else row_major(x.shape)


def checked_strides(x: Tensor, start: int, index_strides: Sequence[int] | None) -> Sequence[int]:
    """The index strides of a call on x, after a check that all indices are from 0 to 2**63 - 1.

    Raises:
        RuntimeError: ``start`` or an index stride is negative, there is not one stride for each dimension, or the
            largest index is 2**63 or more.
    """
    strides = index_strides_of(x) if index_strides is None else index_strides
    if start < 0:
        raise RuntimeError(f"start has to be 0 or more, but got {start}")
    if len(strides) != x.dim():
        raise RuntimeError(f"index_strides needs one stride for each of {x.dim()} dimensions, but got {strides}")
    if any(stride < 0 for stride in strides):
        raise RuntimeError(f"index_strides have to be 0 or more, but got {list(strides)}")
    if start + sum(stride * max(size - 1, 0) for stride, size in zip(strides, x.shape, strict=True)) >= 1 << 63:
        raise RuntimeError("the largest element index has to be below 2**63")
    return strides


def keep_indices(start: int, strides: Sequence[int], shape: Sequence[int], p: float, key: Tensor) -> Tensor:
    """The mask of a window of indices: a contiguous bool tensor of this shape, on the key's device.

    strides: the index strides. The last one has to be 1.
    """
    *outer, length = shape
    first = torch.full((), start, device=key.device)
    for size, stride in zip(outer, strides, strict=False):
        first = first.unsqueeze(-1) + torch.arange(size, device=key.device) * stride
    first = first.flatten()
    kept = torch.empty(len(first), length, dtype=torch.bool, device=key.device)
    seed, offset = key.view(torch.int64).unbind()
    bound = threshold(p)
    for column in range(0, length, BLOCK * CHUNK):
        n = min(BLOCK * CHUNK, length - column)
        blocks = n // BLOCK + 2  # enough for a row that begins at any slot of a block
        for row in range(0, len(first), max(1, CHUNK // blocks)):
            begin = first[row : row + max(1, CHUNK // blocks)] + column
            block = (begin // BLOCK).unsqueeze(-1) + torch.arange(blocks, device=key.device)
            counter = (offset & LOW_32, (offset >> 32) & LOW_32, block & LOW_32, block >> 32)
            words = philox(counter, (seed & LOW_32, (seed >> 32) & LOW_32))
            all_words = words[0] ^ words[1] ^ words[2] ^ words[3]
            drawn = torch.empty(*block.shape, BLOCK, dtype=torch.bool, device=key.device)
            for i, word in enumerate(words):
                tie = all_words ^ word
                for half, draw in enumerate((word & 0xFFFF, word >> 16)):
                    torch.lt(draw.bitwise_left_shift_(32).bitwise_or_(tie), bound, out=drawn[..., 2 * i + half])
            part = kept[row : row + len(begin), column : column + n]
            skip = start % BLOCK
            if all(stride % BLOCK == 0 for stride in strides[:-1]):  # every row begins in the same slot
                part.copy_(drawn.flatten(1)[:, skip : skip + n])
            else:
                place = (begin % BLOCK).unsqueeze(-1) + torch.arange(n, device=key.device)
                torch.gather(drawn.flatten(1), 1, place, out=part)
    return kept.view(*shape)


def keep_window(
    shape: Sequence[int], p: float, key: Tensor, start: int, strides: Sequence[int], device: torch.device
) -> Tensor:
    """The mask of a window with any index strides: of this shape, and expanded where a stride is 0."""
    if p in (0, 1) or prod(shape) == 0:
        return torch.full(shape, p == 0, device=device)
    # Draws each index once, in ascending order, and merges dimensions with continuous indices into long rows.
    order = sorted((d for d, n in enumerate(shape) if n != 1 and strides[d] != 0), key=lambda d: -strides[d])
    sizes, steps = [1], [1]
    for d in order[::-1]:
        if strides[d] == steps[0] * sizes[0]:
            sizes[0] *= shape[d]
        else:
            sizes.insert(0, shape[d])
            steps.insert(0, strides[d])
    kept = keep_indices(start, steps, sizes, p, key.to(device)).view([shape[d] for d in order])
    missing = [d for d in range(len(shape)) if d not in order]
    place = {d: i for i, d in enumerate([*missing, *order])}
    kept = kept.view([1] * len(missing) + list(kept.shape))
    return kept.permute([place[d] for d in range(len(shape))]).expand(shape)


def keep_mask(x: Tensor, p: float, key: Tensor, start: int = 0, index_strides: Sequence[int] | None = None) -> Tensor:
    """The mask of x: a bool tensor of x's shape, True where an element is kept, with the strides of ``empty_like(x)``.

    Raises:
        RuntimeError: as :func:`checked_strides`.
    """
    return torch.empty_like(x, dtype=torch.bool).copy_(_window_of(x, p, key, start, index_strides))


def _drop(x: Tensor, kept: Tensor) -> Tensor:
    """Sets the elements of x that are not kept to +0, in place. Multiplies their bits, so inf and NaN become 0 too."""
    x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).mul_(kept)
    return x


def apply(
    x: Tensor,
    p: float,
    key: Tensor,
    start: int = 0,
    index_strides: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Dropout of x with the mask of the window, in the layout of ``torch.empty_like(x)``.

    Kept elements are multiplied by ``scale``, or by 1 / (1 - p) if that is None.
    """
    kept = _window_of(x, p, key, start, index_strides)
    # torch.mul by a Python number computes in float32 (float64 for float64) and rounds once, as the contract requires.
    return _drop(torch.mul(x, _scale(p, scale), out=torch.empty_like(x)), kept)


def apply_(
    x: Tensor,
    p: float,
    key: Tensor,
    start: int = 0,
    index_strides: Sequence[int] | None = None,
    scale: float | None = None,
) -> None:
    """``apply`` in place."""
    kept = _window_of(x, p, key, start, index_strides)
    _drop(x.mul_(_scale(p, scale)), kept)


def _window_of(x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int] | None) -> Tensor:
    strides = checked_strides(x, start, index_strides)
    return keep_window(x.shape, p, key, start, strides, x.device)


def _scale(p: float, given: float | None) -> float:
    return scale(p) if given is None else given
