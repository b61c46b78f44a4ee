"""The reference as one kernel, which Inductor and Triton make at the first call: for GPUs without the CUDA kernels.

A kernel serves every size, p and key of a dtype: nothing is compiled again when they change.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import reference
from .build_info import how_to_improve

_failed: set[tuple[Any, ...]] = set()  # what did not compile here: then the reference serves as it is


def _keep(numel: int, bound: Tensor, key: Tensor, start: int) -> Tensor:
    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile is switched off")  # as it stands it would take forty bytes an element
    return reference.keep_each(reference.indices((numel,), key.device, start), bound, key)


def _apply(x: Tensor, bound: Tensor, key: Tensor, start: int, scale: Tensor) -> Tensor:
    product = (x.to(scale.dtype) * scale).to(x.dtype)
    return torch.where(_keep(x.numel(), bound, key, start), product, 0.0)


@cache
def _say_once() -> None:
    better = f" Better by: {how_to_improve()}" if how_to_improve() else ""
    warnings.warn(
        "fused_dropout: there are no CUDA kernels. The reference serves, for which torch.compile makes a kernel now, "
        f"in some seconds.{better}",
        RuntimeWarning,
        stacklevel=5,
    )


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _try(function: Callable[..., Tensor], numel: int, dtype: torch.dtype, *arguments: Any) -> Tensor | None:
    """What the compiled function gives; None if it does not compile here, or would for this size alone."""
    if numel < 2 or (function, dtype) in _failed:
        return None
    _say_once()
    try:
        # Each dtype, device and mode has a kernel of its own, and eight would be the limit.
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=256):
            return _compiled(function)(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _failed.add((function, dtype))
        warnings.warn(f"fused_dropout: it does not compile here, and stays slow: {error}", RuntimeWarning, stacklevel=3)
        return None


def _bound(p: float) -> Tensor:
    return torch.tensor(reference.threshold(p), device="cpu")  # a number would be compiled in, were it 0 or 1


def _keep_flat(numel: int, p: float, key: Tensor, device: torch.device, start: int = 0) -> Tensor:
    kept = _try(_keep, numel, torch.bool, numel, _bound(p), key.to(device), start)
    return reference.keep_flat(numel, p, key, start, device) if kept is None else kept


def _over(x: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The elements of x in another shape, but no view: autograd and the compiler treat those otherwise."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, strides)


def _in_layout_of(x: Tensor, flat: Tensor) -> Tensor:
    """Of elements in the order in which those of x are numbered: a tensor of x's shape, strided as its empty_like."""
    strides = torch.empty_like(x, device="meta").stride()
    if reference.is_dense(x):
        return _over(flat, x.shape, strides)
    return torch.empty_strided(x.shape, strides, dtype=flat.dtype, device=flat.device).copy_(flat.view(x.shape))


def keep_mask(x: Tensor, p: float, key: Tensor, start: int = 0) -> Tensor:
    """``reference.keep_mask``."""
    return _in_layout_of(x, _keep_flat(x.numel(), p, key, x.device, start))


def apply(x: Tensor, p: float, key: Tensor, start: int = 0) -> Tensor:
    """``reference.apply``."""
    dense = x.detach() if reference.is_dense(x) else x.detach().contiguous()
    flat = _over(dense, (x.numel(),), (1,))
    scale = torch.tensor(reference.scale(p), dtype=torch.promote_types(x.dtype, torch.float32), device="cpu")
    applied = _try(_apply, x.numel(), x.dtype, flat, _bound(p), key.to(x.device), start, scale)
    return reference.apply(x, p, key, start) if applied is None else _in_layout_of(x, applied)


def apply_(x: Tensor, p: float, key: Tensor, start: int = 0) -> None:
    """``reference.apply_``."""
    x.copy_(apply(x, p, key, start))


def apply_broadcast_(x: Tensor, p: float, key: Tensor, noise_shape: Sequence[int], scale: float) -> None:
    """``reference.apply_broadcast_``."""
    reference.drop(x.mul_(scale), _keep_flat(prod(noise_shape), p, key, x.device).view(list(noise_shape)))


def apply_broadcast(x: Tensor, p: float, key: Tensor, noise_shape: Sequence[int], scale: float) -> Tensor:
    """``reference.apply_broadcast``."""
    output = torch.empty_like(x).copy_(x)
    apply_broadcast_(output, p, key, noise_shape, scale)
    return output
