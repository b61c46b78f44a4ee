"""Checks of the arguments of public functions. Each error names the given value and the allowed ones.

It stands below ``functional.py``, and imports nothing of this package but ``torch_internals.py``.
"""

from collections.abc import Sequence
from numbers import Real
from operator import index
from typing import Any

import torch
from torch import Generator, SymFloat, SymInt, Tensor, nn

from .torch_internals import is_distributed


def check_arguments(
    input: Any, p: float, training: bool, generator: Generator | None = None, key: Tensor | None = None
) -> None:
    """Checks the arguments that all functions share.

    Raises:
        TypeError: p is not a number, or is a tensor that requires grad; training is not a bool; generator or key has a
            wrong type.
        ValueError: p is not between 0 and 1; key and generator are both given; the key has a wrong shape, dtype or
            device.
        RuntimeError: p is NaN.
    """
    # Repeats the conditions of why_refused, to save a function call if nothing is wrong.
    if type(p) is not float or not 0.0 <= p <= 1.0 or (training is not True and training is not False):
        error = why_refused(p, training)
        if error is not None:
            raise error
    if generator is not None:
        check_generator(generator)
    if key is not None:
        check_key(key, getattr(input, "device", None), generator)


def why_refused(p: float, training: bool) -> Exception | None:
    """The error for a wrong p or training, of the class that torch raises; None if both are correct."""
    if type(p) is not float and not _is_number(p):
        return _no_number(p)
    if training is not True and training is not False:
        return TypeError(f"training has to be True or False, but is {training!r}")
    if not 0.0 <= p <= 1.0:
        # torch's check in Python raises ValueError but accepts NaN. Its check in C++ then raises RuntimeError.
        kind = ValueError if p == p else RuntimeError
        return kind(f"dropout probability has to be between 0 and 1, but got {p}")
    return None


def check_number(p: float) -> None:
    """Checks the type of a module's p. Each call checks its range.

    Raises:
        TypeError: p is not a number, or is a tensor that requires grad.
    """
    if not _is_number(p):
        raise _no_number(p)


def _is_number(p: object) -> bool:
    if isinstance(p, Tensor):
        return p.dim() == 0 and not p.requires_grad
    return isinstance(p, (float, int, SymFloat, SymInt, Real))  # Real includes NumPy's scalars, but not its arrays


def _no_number(p: object) -> TypeError:
    if isinstance(p, Tensor) and p.requires_grad:
        return TypeError("p has to be a number, but requires grad: dropout has no derivative with respect to p")
    given = f"a tensor of shape {tuple(p.shape)}" if isinstance(p, Tensor) else repr(p)
    return TypeError(f"p has to be a number between 0 and 1, but is {given}")


def check_generator(generator: object) -> None:
    """Raises TypeError if the argument is not a generator."""
    if not isinstance(generator, Generator):
        raise TypeError(f"generator has to be a torch.Generator, but is {generator!r}")


def check_key(key: Any, device: torch.device | None = None, generator: Generator | None = None) -> None:
    """Checks the key of one call. device: the input's device, if it is known.

    Raises:
        TypeError: the key is not a tensor.
        ValueError: the key has a wrong shape, dtype or device; a generator is given too.
    """
    if generator is not None:
        raise ValueError("key and generator were both given: a call draws its mask from one of them")
    if not isinstance(key, Tensor) or is_distributed(key):
        raise _no_key("(2,)", key)
    if key.dtype != torch.uint64 or key.shape != (2,):
        raise ValueError(f"key has to be a uint64 tensor of shape (2,), but is {key.dtype} {tuple(key.shape)}")
    if device is not None and key.device.type != "cpu" and key.device != device:
        raise ValueError(f"key has to be on the CPU or on the input's device {device}, but is on {key.device}")


def check_keys(keys: Any) -> None:
    """Checks one or several keys, of shape (..., 2), from which others will be derived.

    Raises:
        TypeError: ``keys`` is not a tensor.
        ValueError: ``keys`` has a wrong shape or dtype.
    """
    if not isinstance(keys, Tensor):
        raise _no_key("(..., 2)", keys)
    if keys.dtype != torch.uint64 or keys.dim() < 1 or keys.shape[-1] != 2:
        raise ValueError(f"key has to be a uint64 tensor of shape (..., 2), but is {keys.dtype} {tuple(keys.shape)}")


def _no_key(shape: str, given: object) -> TypeError:
    seed = given if type(given) is int else "seed"
    return TypeError(f"key has to be a uint64 tensor of shape {shape}, as fd.key({seed}) makes, but is {given!r}")


def check_module(model: object) -> None:
    """Raises TypeError if the argument is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be an nn.Module, but is {model!r}")


def integer(number: Any, name: str) -> int:
    """Converts an argument to int. name: its name, for the error.

    Raises:
        TypeError: the argument is not an integer.
    """
    try:
        return index(number)
    except TypeError:
        raise TypeError(f"{name} has to be an integer, but is {number!r}") from None


def noise_strides(noise_shape: Sequence[int | None], shape: Sequence[int]) -> list[int]:
    """The index strides of a mask that is broadcast to this shape: row-major, and 0 where it is broadcast.

    Raises:
        TypeError: noise_shape is not a sequence of integers and None.
        RuntimeError: noise_shape does not broadcast to the shape.
    """
    given = noise_sizes(noise_shape)
    strides, stride, missing = [0] * len(shape), 1, len(shape) - len(given)
    for d in range(len(shape) - 1, missing - 1, -1):
        own = None if missing < 0 else given[d - missing]
        size = shape[d] if own is None else own
        fits = size == 1 or size == shape[d]
        if missing < 0 or not fits:
            raise RuntimeError(
                f"The noise_shape has to broadcast to the input's shape: each of its sizes has to be 1 or the input's. "
                f"Input sizes: {list(shape)}.  Noise sizes: {list(given)}"
            )
        if size != 1:
            strides[d] = stride
            stride *= size
    return strides


def noise_sizes(noise_shape: Any) -> list[int | None]:
    """Converts a noise_shape to a list.

    Raises:
        TypeError: noise_shape is not a sequence of integers and None.
    """
    try:
        return [n if n is None else as_size(n) for n in noise_shape]
    except TypeError:
        raise TypeError(f"noise_shape has to be a sequence of integers and None, but is {noise_shape!r}") from None


def sizes(shape: Any) -> list[int]:
    """Converts a shape to a list of sizes.

    Raises:
        TypeError: the shape is not a sequence of integers.
        ValueError: a size is negative.
    """
    try:
        found = [as_size(n) for n in shape]
    except TypeError:
        raise TypeError(f"a shape has to be a sequence of integers, but is {shape!r}") from None
    if any(type(n) is int and n < 0 for n in found):
        raise ValueError(f"a size has to be 0 or more, but the shape is {shape!r}")
    return found


def as_size(n: Any) -> Any:
    """Converts a size or a position to int. A compiler's symbolic number stays symbolic."""
    return n if isinstance(n, (int, SymInt)) else index(n)
