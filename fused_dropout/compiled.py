"""The reference as one kernel, which Inductor and Triton make at the first call: for GPUs without the CUDA kernels.

``inductor.py`` says what the kernel computes. One serves every size, p, start and key of a dtype, and another one those
that number their elements otherwise than by memory order from 0: nothing is compiled again when these change.
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

_failed: set[tuple[Any, ...]] = set()  # what did not compile here: then the reference serves as it is


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
        "there are no CUDA kernels. The reference serves, for which torch.compile makes a kernel now, in some seconds."
        f"{better}"
    )


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _run(
    out: Tensor, x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int], scale: float | None
) -> bool:
    """Writes x, dropped, to out, which is dense and may be x; or the mask, if out is of bools. Returns whether it did:
    not if it does not compile here, or would for this size alone."""
    function = _write_in_place if out is x or out.dtype == torch.bool else _write
    if out.numel() < 2 or (function, out.dtype) in _failed:
        return False
    _say_once()
    sizes, steps = _levels(out, index_strides)
    window = [] if (start, steps) == (0, [1]) else [torch.tensor(n, device="cpu") for n in (start, *steps)]
    # Numbers as tensors of no dimensions on the CPU: a kernel takes them as arguments, and none is compiled in.
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
        warn(f"it does not compile here, and stays slow: {error}")
        return False
    return True


def _levels(out: Tensor, index_strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sizes and index strides of out in memory order, outermost first: dimensions whose indices continue are one."""
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
    """The memory of x in another shape, but no view: autograd and the compiler treat those otherwise."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), sizes, reference.row_major(sizes))


def keep_mask(x: Tensor, p: float, key: Tensor, start: int = 0, index_strides: Sequence[int] | None = None) -> Tensor:
    """``reference.keep_mask``."""
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
    """``reference.apply``."""
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
    """``reference.apply_``."""
    strides = reference.checked_strides(x, start, index_strides)
    own = x.detach()
    if not reference.is_dense(own) or not _run(own, own, p, key, start, strides, scale):
        x.copy_(apply(x, p, key, start, strides, scale))
