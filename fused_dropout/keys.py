"""Keys: from torch's generators, and without one (``key``, ``fold_in`` and ``split``).

A call takes one key from its generator, the same whichever path serves it. CPU: the seed is one 63-bit draw of the
generator, and the offset 0. CUDA: the generator's seed and its Philox offset / 4; the generator then advances by 4, one
counter step, whatever the size of the tensor.
"""

import torch
from torch import Generator, Tensor

from . import reference
from .arguments import check_keys, integer
from .inductor import FORM
from .native import eager, kernels
from .torch_internals import is_compiling, is_recorded

_CPU = torch.device("cpu")
_SEED_AND_ZERO = torch.tensor([-1, 0], device=_CPU)


def draw_key(
    device: torch.device, generator: Generator | None = None, randomness: str | None = None, watched: bool = False
) -> Tensor:
    """A fresh key, a uint64 tensor ``[seed, offset]``, from the generator or from the device's default one.

    randomness: what ``torch_internals.functorch_randomness`` says. Under vmap "error" raises, "same" takes one key,
    "different" one for each sample. watched: whether a compiler, a transform or a mode has to see the drawing.
    """
    if randomness == "error":
        torch.rand((), device=device)  # raises, in torch's words
    if randomness == "different":
        # The same seeds as single calls draw. Bounds that are 2**63 apart keep the low 63 bits of a 64-bit draw.
        seed = torch.randint(-(2**62), 2**62, (1,), dtype=torch.int64, device=device, generator=generator) + 2**62
        return torch.cat((seed, torch.zeros_like(seed))).to(torch.uint64)
    if watched and generator is not None:
        return _draw_keys_in_python(1, device, generator)[0]
    if watched:
        # An operator, so that tracers record the drawing and not what was drawn.
        draw = getattr(torch.ops.fused_dropout.draw_keys, FORM if is_compiling() and not is_recorded() else "default")
        return draw(1, device=device)[0]
    return draw_keys(1, device, generator)[0]


def draw_keys(n: int, device: torch.device, generator: Generator | None = None) -> Tensor:
    """The n keys that n calls would draw, in that order: a uint64 tensor of shape (n, 2), on the CPU or on the device.

    Without the eager binding, the keys of a captured CUDA graph are 63-bit numbers drawn on the device: fresh ones at
    each replay, though not those that eager calls would take.
    """
    if eager is not None and eager.serves(device):
        return eager.draw_keys(n, device, generator)
    if generator is None and device == _CPU and kernels is not None:
        try:
            return torch.ops.fused_dropout.draw_cpu_keys(n)
        except RuntimeError:
            torch.rand((), device=_CPU)  # under torch's older vmap: raises, in words that the operator lacks
            raise
    return _draw_keys_in_python(n, device, generator)


def _draw_keys_in_python(n: int, device: torch.device, generator: Generator | None) -> Tensor:
    """``draw_keys`` in torch's own operations, which modes and transforms see."""
    if generator is not None and generator.device.type != device.type:
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{generator.device.type}'")
    if device.type != "cuda":
        seeds = torch.empty(n, 1, dtype=torch.int64, device=_CPU).random_(generator=generator)
        return (seeds & _SEED_AND_ZERO).view(torch.uint64)
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(n, 2, dtype=torch.int64, device=device).random_(generator=generator).view(torch.uint64)
    seed, offset = _advance_cuda(n, device, generator)
    return torch.tensor([[seed, offset + i] for i in range(n)], dtype=torch.uint64, device=_CPU)


def draw_keys_on(n: int, *, device: torch.device) -> Tensor:
    """The operator ``draw_keys`` without the eager binding: keys on the device, for which nothing waits."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return draw_keys(n, device)
    seed, offset = _advance_cuda(n, device, None)
    keys = torch.empty(n, 2, dtype=torch.int64, device=device)
    keys[:, 0] = _signed(seed, "seed")  # a number goes to a kernel by value
    torch.arange(offset, offset + n, out=keys[:, 1])
    return keys.view(torch.uint64)


def _advance_cuda(n: int, device: torch.device, generator: Generator | None) -> tuple[int, int]:
    """Seed and Philox offset / 4 of the generator, which moves on by n counter steps."""
    generator = default_generator(device) if generator is None else generator
    offset = generator.get_offset()
    generator.set_offset(offset + 4 * n)
    return generator.initial_seed(), offset // 4


def default_generator(device: torch.device) -> Generator:
    """The default generator of a CPU or CUDA device; of the current one if a CUDA device has no index."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def no_key() -> Tensor:
    """A key for calls whose result no draw decides (p = 1)."""
    return torch.zeros(2, dtype=torch.uint64, device="cpu")


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """A key from a number: for masks that depend on nothing else, no generator's state and no earlier call.

    Which to use when: nothing, and so the default generator, for what ``nn.Dropout`` does; ``generator=`` for a stream
    of its own; ``key=`` where a mask has to be had again (recomputation, debugging, another device) or has to depend on
    named things only, such as ``fold_in(fold_in(key(seed), step), layer)``. One key gives one mask: derive one for each
    call, and take no mask from a key that others were derived from.

    A call keeps the value of its key for backward. Compiled code keeps the tensor: do not change it through NumPy or
    ``.data`` before backward.

    Args:
        seed: from -2**63 to 2**64 - 1; a negative one counts from 2**64, as in ``torch.manual_seed``.
        device: where the key is kept. Default: torch's default device. A key on the CPU serves every device; one on a
            CUDA device can be changed between the replays of a captured graph.

    Returns:
        A uint64 tensor ``[seed, 0]``, as from ``torch.func._random.key`` in torch 2.13.

    Raises:
        ValueError: the seed is out of range.
        TypeError: the seed is not an integer.

    Example::

        >>> fd.key(5)
        tensor([5, 0], dtype=torch.uint64)
    """
    words = [torch.full((1,), word, dtype=torch.int64, device=device) for word in (_signed(seed, "seed"), 0)]
    return torch.cat(words).view(torch.uint64)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """The key for a number under this key: of a step, a layer, a rank, a sample.

    Ranks that share their seed (model replicas after ``torch.manual_seed(0)`` on each) drop alike. Where they should
    not, take ``fold_in(key, rank)``; where they should, as tensor-parallel ranks on replicated activations, ``key``.

    The four words of Philox4x32-10 for the counter ``offset + data`` and the key ``seed``: the values of
    ``torch.func._random.fold_in`` in torch 2.13, which has them on CUDA only. No device is waited for; works under
    ``torch.compile`` and in captured graphs.

    Args:
        key: uint64, shape (2,), or (..., 2) for as many keys.
        data: an integer from -2**63 to 2**64 - 1, or an int64 or uint64 tensor that broadcasts to the shape of the keys
            less its last dimension, on the key's device: a number that a captured graph reads at each replay.

    Returns:
        A uint64 tensor of the key's shape and device.

    Raises:
        ValueError: the key has another shape or dtype; ``data`` is out of range.
        TypeError: ``data`` is neither an integer nor a tensor of integers; the key is not a tensor.

    Example::

        >>> fd.fold_in(fd.key(5), 3)
        tensor([12787321758626223646, 17427304685265241759], dtype=torch.uint64)
    """
    check_keys(key)
    if isinstance(data, Tensor):
        if data.dtype not in (torch.int64, torch.uint64):
            raise TypeError(f"data has to be an integer or an int64 or uint64 tensor, but is {data.dtype}")
        number = data.to(torch.int64)
    else:
        number = torch.full((), _signed(data, "data"), dtype=torch.int64, device=key.device)
    return _derive(key, number)


def split(key: Tensor, n: int = 2) -> Tensor:
    """n keys from one: ``fold_in(key, 0)`` to ``fold_in(key, n - 1)``, at the price of one.

    Args:
        key: uint64, shape (2,), or (..., 2) for as many keys.
        n: the number of keys, 1 or more. Default: 2

    Returns:
        A uint64 tensor of shape (n, 2), or (n, ..., 2), on the key's device: the values of
        ``torch.func._random.split`` in torch 2.13.

    Raises:
        ValueError: the key has another shape or dtype; ``n`` is less than 1.
        TypeError: ``n`` is not an integer; the key is not a tensor.

    Example::

        >>> attention, mlp = fd.split(fd.key(5))
        >>> torch.equal(mlp, fd.fold_in(fd.key(5), 1))
        True
    """
    check_keys(key)
    n = integer(n, "n")
    if n < 1:
        raise ValueError(f"n has to be 1 or more, but is {n}")
    return _derive(key, torch.arange(n, device=key.device).view(n, *(1 for _ in key.shape[1:])))


def _derive(key: Tensor, data: Tensor) -> Tensor:
    """Philox's four words for the counter offset + data, as a key."""
    # to() keeps the 64 bits, as view() would, which torch 2.11 has no batching rule for.
    seed, offset = key.to(torch.int64).unbind(-1)
    # By halves, since a sum beyond 2**63 is undefined in what a compiler makes of it.
    low = (offset & reference.LOW_32) + (data & reference.LOW_32)
    high = ((offset >> 32) & reference.LOW_32) + ((data >> 32) & reference.LOW_32) + (low >> 32)
    counter = (low & reference.LOW_32, high & reference.LOW_32, torch.zeros_like(low), torch.zeros_like(low))
    words = reference.philox(counter, (seed & reference.LOW_32, (seed >> 32) & reference.LOW_32))
    return torch.stack((words[0] | (words[1] << 32), words[2] | (words[3] << 32)), -1).to(torch.uint64)


def _signed(number: int, name: str) -> int:
    """The int64 with the bits of this uint64; a negative number is taken as it is."""
    number = integer(number, name)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"{name} has to be from -2**63 to 2**64 - 1, but is {number}")
    return number - 2**64 if number >= 2**63 else number
