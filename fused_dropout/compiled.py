"""The reference compiled to one kernel by Inductor and Triton at the first call, for GPUs without the CUDA kernels.

``inductor.py`` has the arithmetic. For each dtype there are two kernels, for all sizes, p, scales and keys: one for
elements numbered in memory order from 0, and one for other indices. So a new value never causes a compilation.
``operators.py`` registers these functions as the CUDA kernels.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference
from .build_info import how_to_improve
from .inductor import FORM, for_every_size
from .warn import warn

_failed: set[tuple[Any, ...]] = set()  # what did not compile here. For these the reference runs uncompiled.


def _apply_any(x: Tensor, p: Tensor, scale: Tensor | None, key: Tensor, *window: Any) -> Tensor:
    return getattr(torch.ops.fused_dropout.apply, f"any_{FORM}")(x, p, scale, key, *window)


def _write(out: Tensor, x: Tensor, *arguments: Any) -> None:
    out.copy_(_apply_any(x, *arguments))


def _write_in_place(x: Tensor, *arguments: Any) -> None:
    x.copy_(_apply_any(x, *arguments))


@cache
def _say_once() -> None:
    better = f" Better by: {how_to_improve()}" if how_to_improve() else ""
    warn(
        "there are no CUDA kernels. The reference serves instead: torch.compile makes a kernel of it now, which takes "
        "some seconds."
        f"{better}"
    )


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _run(
    out: Tensor, x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int], scale: float | None
) -> bool:
    """Writes the dropped x to out, or the mask if out is bool. out is dense and may be x itself.

    Returns False and writes nothing in two cases: the kernel does not compile here, or out has less than 2 elements. It
    would be compiled for that size alone.
    """
    function = _write_in_place if out is x or out.dtype == torch.bool else _write
    if out.numel() < 2 or (function, out.dtype) in _failed:
        return False
    _say_once()
    sizes, steps = _levels(out, index_strides)
    window = [] if (start, steps) == (0, [1]) else [torch.tensor(n, device="cpu") for n in (start, *steps)]
    # The numbers are CPU tensors without dimensions, so the kernel takes them as arguments and not as constants.
    threshold = torch.tensor(reference.threshold(p), device="cpu")
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = torch.tensor(reference.scale(p) if scale is None else scale, dtype=wide, device="cpu")
    arguments = (threshold, None if out.dtype == torch.bool else factor, key.to(x.device), window, out.numel() <= 2**31)
    tensors = (_over(out, sizes),) if function is _write_in_place else (_over(out, sizes), _over(x, sizes))
    try:
        with torch.no_grad(), for_every_size():
            _compiled(function)(*tensors, *arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _failed.add((function, out.dtype))
        warn(f"the reference does not compile here, and stays slow: {error}")
        return False
    return True


def _levels(out: Tensor, index_strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sizes and index strides of out in memory order, outermost first. Merges dimensions with continuous indices."""
    sizes: list[int] = []
    steps: list[int] = []
    for d in reference.order_by_stride(out):
        if out.shape[d] == 1:
            continue
        if sizes and steps[-1] == index_strides[d] * out.shape[d]:
            sizes[-1] *= out.shape[d]
            steps[-1] = index_strides[d]
        else:
            sizes.append(out.shape[d])
            steps.append(index_strides[d])
    return sizes, steps


def _over(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The memory of x in another shape. Not a view, because autograd and the compiler treat views differently."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), sizes, reference.row_major(sizes))


def keep_mask(x: Tensor, p: float, key: Tensor, start: int = 0, index_strides: Sequence[int] | None = None) -> Tensor:
    """``reference.keep_mask``, compiled if possible."""
    strides = reference.checked_strides(x, start, index_strides)
    out = torch.empty_like(x, dtype=torch.bool)
    return out if _run(out, x, p, key, start, strides, None) else reference.keep_mask(x, p, key, start, strides)


def apply(
    x: Tensor,
    p: float,
    key: Tensor,
    start: int = 0,
    index_strides: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """``reference.apply``, compiled if possible."""
    x, strides = x.detach(), reference.checked_strides(x, start, index_strides)
    dense = reference.is_dense(x)
    out = torch.empty_like(x) if dense else torch.empty_like(x).copy_(x)
    if _run(out, x if dense else out, p, key, start, strides, scale):
        return out
    return reference.apply(x, p, key, start, strides, scale)


def apply_(
    x: Tensor,
    p: float,
    key: Tensor,
    start: int = 0,
    index_strides: Sequence[int] | None = None,
    scale: float | None = None,
) -> None:
    """``reference.apply_``, compiled if possible."""
    strides = reference.checked_strides(x, start, index_strides)
    own = x.detach()
    if not reference.is_dense(own) or not _run(own, own, p, key, start, strides, scale):
        x.copy_(apply(x, p, key, start, strides, scale))
