"""Makes keys: from torch's generators, and from numbers (``key``, ``fold_in`` and ``split``).

Each call of dropout takes one key from its generator, on every path the same. On a CPU the seed is one 63-bit draw of
the generator, and the offset is 0. On CUDA the key is the generator's seed and its Philox offset / 4, and the generator
advances by 4, which is one step of the counter, for a tensor of any size.
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
    """Draws a key, a uint64 tensor ``[seed, offset]``, from the generator or from the device's default generator.

    randomness: the result of ``torch_internals.functorch_randomness``. Under vmap, "error" raises, "same" draws one
    key, and "different" draws one for each sample. watched: whether a compiler, a transform or a mode has to see the
    drawing operation.
    """
    if randomness == "error":
        torch.rand((), device=device)  # raises torch's error
    if randomness == "different":
        # Draws the seeds that single calls would draw: with bounds 2**63 apart, randint keeps the low 63 bits of a
        # 64-bit draw.
        seed = torch.randint(-(2**62), 2**62, (1,), dtype=torch.int64, device=device, generator=generator) + 2**62
        return torch.cat((seed, torch.zeros_like(seed))).to(torch.uint64)
    if watched and generator is not None:
        return _draw_keys_in_python(1, device, generator)[0]
    if watched:
        # An operator, so that a tracer records the drawing and not its result.
        draw = getattr(torch.ops.fused_dropout.draw_keys, FORM if is_compiling() and not is_recorded() else "default")
        return draw(1, device=device)[0]
    return draw_keys(1, device, generator)[0]


def draw_keys(n: int, device: torch.device, generator: Generator | None = None) -> Tensor:
    """Draws the n keys that n calls would draw, in that order: a uint64 tensor of shape (n, 2), on the CPU or device.

    While a CUDA graph is captured without the eager binding, the keys are 63-bit numbers drawn on the device. Each
    replay draws new ones, but not those that eager calls would draw.
    """
    if eager is not None and eager.serves(device):
        return eager.draw_keys(n, device, generator)
    if generator is None and device == _CPU and kernels is not None:
        try:
            return torch.ops.fused_dropout.draw_cpu_keys(n)
        except RuntimeError:
            torch.rand((), device=_CPU)  # under torch's older vmap this raises a clearer error than the operator's
            raise
    return _draw_keys_in_python(n, device, generator)


def _draw_keys_in_python(n: int, device: torch.device, generator: Generator | None) -> Tensor:
    """``draw_keys`` by torch's own operations, which modes and transforms see."""
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
    """The operator ``draw_keys`` without the eager binding. Returns keys on the device, without a synchronization."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return draw_keys(n, device)
    seed, offset = _advance_cuda(n, device, None)
    keys = torch.empty(n, 2, dtype=torch.int64, device=device)
    keys[:, 0] = _signed(seed, "seed")  # a Python number goes to the kernel by value, without a copy
    torch.arange(offset, offset + n, out=keys[:, 1])
    return keys.view(torch.uint64)


def _advance_cuda(n: int, device: torch.device, generator: Generator | None) -> tuple[int, int]:
    """Returns the seed and the Philox offset / 4 of the generator, and advances it by n counter steps."""
    generator = default_generator(device) if generator is None else generator
    offset = generator.get_offset()
    generator.set_offset(offset + 4 * n)
    return generator.initial_seed(), offset // 4


def default_generator(device: torch.device) -> Generator:
    """The default generator of a device. A CUDA device without an index means the current one."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def no_key() -> Tensor:
    """A key for calls that need none, because p is 1."""
    return torch.zeros(2, dtype=torch.uint64, device="cpu")


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """Makes a key from a number. Masks from it depend on no generator and on no earlier call.

    In PyTorch: ``torch.func._random.key(seed)`` (private, torch 2.13) returns the same values.

    When to use which argument of :func:`dropout`:

    - neither: the key comes from the default generator, as for ``nn.Dropout``;
    - ``generator=``: the layer gets a random stream of its own;
    - ``key=``: the mask can be made again (recomputation, debugging, another device), or depends only on chosen
      numbers, as in ``fold_in(fold_in(key(seed), step), layer)``.

    One key gives one mask. Derive a key for each call, and do not use a key for a mask if others are derived from it.

    An eager call stores the value of its key for backward. Compiled code stores the tensor: do not change it through
    NumPy or ``.data`` before backward.

    Args:
        seed: an integer from -2**63 to 2**64 - 1. ``2**64`` is added to a negative one, as in ``torch.manual_seed``.
        device: the device of the key. Default: torch's default device. A key on the CPU works on every device. A key on
            a CUDA device can be changed between the replays of a captured graph.

    Returns:
        The uint64 tensor ``[seed, 0]``.

    Raises:
        ValueError: ``seed`` is out of range.
        TypeError: ``seed`` is not an integer.

    Example:
        >>> fd.key(5)
        tensor([5, 0], dtype=torch.uint64)
    """
    words = [torch.full((1,), word, dtype=torch.int64, device=device) for word in (_signed(seed, "seed"), 0)]
    return torch.cat(words).view(torch.uint64)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Derives a new key from a key and a number, such as the number of a step, layer, rank or sample.

    In PyTorch: ``torch.func._random.fold_in(key, data)`` (private, torch 2.13, CUDA only) returns the same values.

    Ranks with the same seed (as after ``torch.manual_seed(0)`` on each) draw the same masks. If they should differ, use
    ``fold_in(key, rank)``. If they should be equal, as for tensor-parallel ranks with replicated activations, use
    ``key``.

    The result is the four output words of Philox4x32-10 for the counter ``offset + data`` and the key ``seed`` (Salmon
    et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11). The call does not synchronize with the device. It
    works under ``torch.compile`` and in captured graphs.

    Args:
        key: a uint64 tensor of shape (2,), or (..., 2) for several keys.
        data: an integer from -2**63 to 2**64 - 1, or an int64 or uint64 tensor on the key's device that broadcasts to
            ``key.shape[:-1]``. A captured graph reads such a tensor at each replay.

    Returns:
        A uint64 tensor of the key's shape and device.

    Raises:
        ValueError: ``key`` has a wrong shape or dtype; ``data`` is out of range.
        TypeError: ``data`` is neither an integer nor a tensor of integers; ``key`` is not a tensor.

    Example:
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
    """Derives n keys from a key: ``fold_in(key, 0)`` to ``fold_in(key, n - 1)``, in one call.

    In PyTorch: ``torch.func._random.split(key, n)`` (private, torch 2.13) returns the same values.

    Args:
        key: a uint64 tensor of shape (2,), or (..., 2) for several keys.
        n: the number of keys, 1 or more.

    Returns:
        A uint64 tensor of shape (n, 2), or (n, ..., 2), on the key's device.

    Raises:
        ValueError: ``key`` has a wrong shape or dtype; ``n`` is less than 1.
        TypeError: ``n`` is not an integer; ``key`` is not a tensor.

    Example:
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
    """The four output words of Philox for the counter offset + data, as a key."""
    # to() keeps the 64 bits, as view() does. torch 2.11 has no batching rule for view().
    seed, offset = key.to(torch.int64).unbind(-1)
    # Adds 32-bit halves, because an int64 sum beyond 2**63 is undefined in compiled C++ code.
    low = (offset & reference.LOW_32) + (data & reference.LOW_32)
    high = ((offset >> 32) & reference.LOW_32) + ((data >> 32) & reference.LOW_32) + (low >> 32)
    counter = (low & reference.LOW_32, high & reference.LOW_32, torch.zeros_like(low), torch.zeros_like(low))
    words = reference.philox(counter, (seed & reference.LOW_32, (seed >> 32) & reference.LOW_32))
    return torch.stack((words[0] | (words[1] << 32), words[2] | (words[3] << 32)), -1).to(torch.uint64)


def _signed(number: int, name: str) -> int:
    """The int64 with the same bits as this uint64. A negative number is returned unchanged."""
    number = integer(number, name)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"{name} has to be from -2**63 to 2**64 - 1, but is {number}")
    return number - 2**64 if number >= 2**63 else number
