"""The mask contract in PyTorch, on any device: the specification to read, and what runs where no kernel was built.

The mask is a pure function of a key ``[seed, offset]``, the drop probability p and each element's index i:

1. ``block = i // 8``; four 32-bit words come from Philox4x32-10 with the counter (offset, block) and the key (seed),
   each a 64-bit number, low word first (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
   SC'11).
2. ``draw(i)`` is the half-word ``i % 8`` of the block; ``tie(i)`` is the XOR of the three words that it is not in.
3. ``K = floor((1 - p) * 2**48 + 0.5)``, at least 1 and at most ``2**48 - 1``. Element i is kept if, and only if,
   ``draw(i) * 2**32 + tie(i) < K``.

A kept element becomes ``x / (1 - p)``, the product with the rounded factor taken in float32 (float64 for float64) and
rounded once more to x's dtype; a dropped one becomes +0, whatever it was. Words are int64 tensors here, since PyTorch
has no unsigned 32-bit arithmetic.
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
CHUNK = 1 << 15


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product. The multiplier less 2**32 is used, since the whole product overflows int64."""
    if torch.compiler.is_compiling() and word.is_cuda:
        # In Triton it wraps, and its compiler makes one 32-bit multiplication of this.
        product = word * multiplier
        return (product >> 32) & LOW_32, product & LOW_32
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
    """K: of each 2**48 equally likely (draw, tie), so many are kept."""
    if p in (0, 1):
        return 0 if p else 1 << 48
    return min(max(floor((1.0 - p) * 2**48 + 0.5), 1), (1 << 48) - 1)


def keep_blocks(first: int, p: float, key: Tensor, kept: Tensor) -> None:
    """Writes the mask of whole blocks, the first of that number, to a bool tensor of shape (blocks, 8)."""
    seed, offset = key.view(torch.int64).unbind()
    block = torch.arange(first, first + len(kept), device=key.device)
    counter = (offset & LOW_32, (offset >> 32) & LOW_32, block & LOW_32, block >> 32)
    words = philox(counter, (seed & LOW_32, (seed >> 32) & LOW_32))
    all_words = words[0] ^ words[1] ^ words[2] ^ words[3]
    for i, word in enumerate(words):
        tie = all_words ^ word
        for half, draw in enumerate((word & 0xFFFF, word >> 16)):
            torch.lt(draw.bitwise_left_shift_(32).bitwise_or_(tie), threshold(p), out=kept[:, 2 * i + half])


def keep_flat(numel: int, p: float, key: Tensor, start: int, device: torch.device) -> Tensor:
    """The mask of the elements start to start + numel - 1: a bool tensor of shape (numel,)."""
    key = key.to(device)
    first, skip = divmod(start, BLOCK)
    kept = torch.empty(-(-(skip + numel) // BLOCK), BLOCK, dtype=torch.bool, device=device)
    # A cache's worth at a time: there are some forty bytes of words and products to each element.
    for i in range(0, len(kept), CHUNK):
        keep_blocks(first + i, p, key, kept[i : i + CHUNK])
    return kept.flatten()[skip : skip + numel]


def keep_each(index: Tensor, bound: int | Tensor, key: Tensor) -> Tensor:
    """The mask of the elements with these indices, one by one: for a compiler, which fuses it with others.

    ``bound`` is the drop probability's ``threshold``.

    Indices of int32 let it see that neighbours have a block in common. The key is expanded, or it would compute what
    depends on that alone in kernels of their own.
    """
    seed, offset = (word.expand(index.shape) for word in key.to(torch.int64).unbind())
    block, slot = (index >> 3).to(torch.int64), index & 7
    counter = (offset & LOW_32, (offset >> 32) & LOW_32, block & LOW_32, block >> 32)
    w0, w1, w2, w3 = philox(counter, (seed & LOW_32, (seed >> 32) & LOW_32))
    word = torch.where(slot < 4, torch.where(slot < 2, w0, w1), torch.where(slot < 6, w2, w3))
    draw = (word >> ((slot & 1) << 4)) & 0xFFFF
    return (draw << 32 | (w0 ^ w1 ^ w2 ^ w3 ^ word)) < bound


def indices(shape: Sequence[int], device: torch.device, start: int = 0) -> Tensor:
    """start, start + 1, ... in row-major order."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes a second, with sympy

    end = start + prod(shape)
    dtype = torch.int32 if guard_or_false(end < 2**31) else torch.int64
    return torch.arange(start, end, dtype=dtype, device=device).view(shape)


def apply_each(x: Tensor, p: float, key: Tensor) -> Tensor:
    """``apply`` as pointwise arithmetic alone."""
    # In memory's order a dense tensor is contiguous, and an element's position is its place in memory.
    order = order_by_stride(x)[::-1] if is_dense(x) else list(range(x.dim()))
    in_order = x.permute(*order)
    product = in_order * scale(p) if x.dtype == torch.float64 else (in_order.float() * scale(p)).to(x.dtype)
    kept = keep_each(indices(in_order.shape, x.device), threshold(p), key.to(x.device))
    dropped = torch.where(kept, product, 0.0)
    return dropped.permute(*(order.index(d) for d in range(x.dim())))


def order_by_stride(x: Tensor) -> list[int]:
    """The dimensions of x by stride, ascending; those of one element come before others of the same stride."""
    order: list[int] = []
    for d in range(x.dim()):  # by insertion: a compiler cannot sort by sizes that it does not know yet
        place = 0
        for other in order:
            before = x.stride(other) < x.stride(d) or (x.stride(other) == x.stride(d) and x.shape[other] <= x.shape[d])
            place += 1 if before else 0
        order.insert(place, d)
    return order


def dims_by_stride(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions of more than one element, those that matter for an address, ascending."""
    return [(x.stride(d), x.shape[d]) for d in order_by_stride(x) if x.shape[d] != 1]


def is_dense(x: Tensor) -> bool:
    """Whether x fills one stretch of memory without overlap, in whatever order of its dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in dims_by_stride(x):
        if stride != expected:
            return False
        expected *= size
    return True


def keep_mask(x: Tensor, p: float, key: Tensor, start: int = 0) -> Tensor:
    """The mask of x: True where an element is kept, in the layout of ``torch.empty_like(x)``.

    Elements are numbered from ``start`` in memory order if x is dense, else in row-major order.
    """
    flat = keep_flat(x.numel(), p, key, start, x.device)
    if is_dense(x):
        return flat.as_strided(x.shape, x.stride())
    return torch.empty_like(x, dtype=torch.bool).copy_(flat.view(x.shape))


def scale(p: float) -> float:
    """What a kept element is multiplied by."""
    return 1.0 / (1.0 - p) if p < 1 else 0.0


def drop(x: Tensor, kept: Tensor) -> Tensor:
    """Makes the elements of x that are not kept +0, in place: selects by their bits, whatever they stand for."""
    x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).mul_(kept)
    return x


def apply(x: Tensor, p: float, key: Tensor, start: int = 0) -> Tensor:
    """Dropout of x with the mask that ``keep_mask`` gives, in the layout of ``torch.empty_like(x)``."""
    # mul by a Python number is what the contract asks for: it takes the product in float32, or float64 for float64.
    return drop(torch.mul(x, scale(p), out=torch.empty_like(x)), keep_mask(x, p, key, start))


def apply_(x: Tensor, p: float, key: Tensor, start: int = 0) -> None:
    """``apply`` in place."""
    drop(x.mul_(scale(p)), keep_mask(x, p, key, start))


def apply_broadcast(x: Tensor, p: float, key: Tensor, noise_shape: Sequence[int], scale: float) -> Tensor:
    """x times scale where the mask of noise_shape, numbered row-major and broadcast over x, keeps it, else +0."""
    output = torch.empty_like(x).copy_(x)
    apply_broadcast_(output, p, key, noise_shape, scale)
    return output


def apply_broadcast_(x: Tensor, p: float, key: Tensor, noise_shape: Sequence[int], scale: float) -> None:
    """``apply_broadcast`` in place."""
    drop(x.mul_(scale), keep_flat(prod(noise_shape), p, key, 0, x.device).view(noise_shape))
