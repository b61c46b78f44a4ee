"""Chooses the implementation of a call: the only place that does. ``functional.py`` calls it, and it calls
``autograd.py``.

| the call runs under | implementation |
|---|---|
| nothing else | the eager binding; without it the autograd Function in Python |
| torch.compile | the autograd Function, whose operator the compiler does not look into |
| torch.func, forward-mode AD, a dispatch mode, a tensor subclass | ``autograd.compose``: torch's own operations |
| torch.export, torch.jit.trace | torch's own dropout; with a key ``autograd.compose`` |

For a tensor that none of them supports, ``drop`` returns None, and the caller uses torch's own dropout.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.parameter import Parameter

from . import autograd, keys, native, operators, reference, windows
from .autograd import must_compose
from .distributed import agree, has_part_in, register_rules
from .torch_internals import (
    functorch_randomness,
    is_compiling,
    is_distributed,
    is_fake,
    is_recorded,
    is_watched,
    known_zero,
    wraps_tensors,
)

_DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_eager_drop = native.eager.drop if native.eager else None


def drop(
    x: Any,
    p: float,
    inplace: bool = False,
    generator: Generator | None = None,
    key: Tensor | None = None,
    index_strides: Sequence[int] | None = None,
    scale: float | None = None,
    start: int = 0,
) -> Tensor | None:
    """Dropout in training, with 0 < p <= 1. The caller has checked the arguments.

    index_strides, scale, start: as in the operator. Returns None if the caller has to use torch's own dropout.

    Raises:
        TypeError: a key or a generator is given, and the fused implementations do not support x.
        RuntimeError: ``inplace`` is set and elements of x share memory.
    """
    if _eager_drop is not None and not is_compiling() and isinstance(x, Tensor):
        output = _eager_drop(x, p, inplace, generator, key, index_strides, scale, start)
        if output is not None:
            return output
    if not is_covered(x, generator, key):
        return None
    if x.is_cuda:
        operators.settle_cuda(x.device)
    compiling, sharded = is_compiling(), is_distributed(x)
    if is_empty(x) or (sharded and not has_part_in(x)):
        return x
    p, given = float(p), key
    randomness = functorch_randomness()
    watched = randomness is not None or is_watched() or (compiling and is_recorded())
    if key is None and p == 1:
        key = keys.no_key()
    else:
        if sharded and key is None and (compiling or not is_fake(x._local_tensor)):
            agree(x.device_mesh, generator, compiling)
        key = key_of_call(x.device, generator, key, randomness, compiling or watched, x.requires_grad)
    if sharded:
        register_rules()
    elif inplace:
        check_no_overlap(x)
    if not watched and (type(x) is Tensor or type(x) is Parameter or sharded):
        if inplace and not compiling and not needs_copy(x):
            operators.apply_(x, p, key, start, index_strides, scale)
            torch.autograd.graph.increment_version(x)
            return x
        output = autograd.apply_plain(x, p, key, start, index_strides, scale)
    else:
        try:
            # Compiled code works in place inside compose, without the copy_ below: AOTAutograd turns copy_ into
            # aten.copy, which has no forward-mode derivative.
            output = autograd.compose(x, p, key, start, index_strides, scale, inplace and compiling)
        except NotImplementedError:
            if not wraps_tensors(x):
                raise
            _refuse_for_torch(x, False, generator, given)
            return None  # the subclass lacks a rule for one of the composed operations
    return x.copy_(output) if inplace and output is not x else output


def drop_part(
    x: Tensor,
    part: windows.Part,
    p: float,
    inplace: bool,
    generator: Generator | None,
    key: Tensor | None,
    index_strides: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """``drop`` for a part of a tensor. index_strides: those of the whole tensor.

    All runs of the part share one key. An empty part of a tensor with elements draws a key too, so that the generators
    of all ranks stay in the same state.

    Raises:
        TypeError: the fused implementations do not support x, or x is a DTensor.
    """
    is_covered(x, generator, key, part)  # raises TypeError if not
    if is_distributed(x):
        raise TypeError("shard is for plain tensors: a DTensor already knows its shard")
    if key is None and p < 1 and (is_empty(x) or any(len(own) > 1 for own in part.runs)) and 0 not in part.whole:
        randomness, watched = functorch_randomness(), is_compiling() or must_compose(x)
        key = key_of_call(x.device, generator, None, randomness, watched, False)

    def on_window(window: Tensor, start: int, strides: list[int]) -> Tensor:
        output = drop(window, p, inplace, generator if key is None else None, key, strides, scale, start)
        assert output is not None  # because is_covered() is true
        return output

    if is_empty(x):
        # apply() uses the key, because a compiler removes a draw with an unused result.
        return autograd.apply(x, float(p), key, 0, index_strides) if is_compiling() and key is not None else x
    if inplace:
        check_no_overlap(x)  # drop() checks each run alone
    output = windows.over_runs(on_window, x, part.runs, 0, index_strides, inplace)
    return x if inplace else output


def is_empty(x: Tensor) -> bool:
    """Whether x has no elements, as far as a compiler knows."""
    return known_zero(x.numel()) if is_compiling() else x.numel() == 0


def key_of_call(
    device: torch.device,
    generator: Generator | None,
    key: Tensor | None,
    randomness: str | None,
    watched: bool,
    recorded: bool,
) -> Tensor:
    """The key of a call: a new one (``keys.draw_key``), or the given one.

    recorded: whether autograd saves the key. It then saves a copy, so that later changes to the caller's key do not
    change the gradient.
    """
    if key is None:
        return keys.draw_key(device, generator, randomness, watched)
    return key.clone() if recorded and not watched else key


def is_covered(x: Any, generator: Generator | None = None, key: Tensor | None = None, shard: object = None) -> bool:
    """Whether the fused implementations, or the composition, support x.

    Raises:
        TypeError: they do not, and a key, a generator or a shard is given, which torch's own dropout lacks.
    """
    recorded = is_recorded()
    taken = type(x) is Tensor or type(x) is Parameter
    taken = taken or (isinstance(x, Tensor) and wraps_tensors(x))
    taken = taken and x.dtype in _DTYPES and (x.is_cpu or x.is_cuda) and x.layout is torch.strided and not x.is_nested
    if taken and (not recorded or key is not None):
        return True
    _refuse_for_torch(x, recorded, generator, key, shard)
    return False


def _refuse_for_torch(
    x: Any, recorded: bool, generator: Generator | None, key: Tensor | None, shard: object = None
) -> None:
    """Raises TypeError if an argument is given that torch's own dropout lacks."""
    if generator is not None and recorded:
        raise TypeError("a generator is not recorded by torch.export and torch.jit.trace: give a key, or neither")
    if shard is not None and recorded and key is None:
        raise TypeError("shard is not recorded by torch.export and torch.jit.trace without a key")
    if key is not None or generator is not None or shard is not None:
        kind = f" of {x.dtype}, {x.layout}, on {x.device}" if isinstance(x, Tensor) else ""
        raise TypeError(
            "key, generator and shard are for strided tensors of float32, float64, float16 or bfloat16 on CPU or CUDA, "
            f"but the input is a {type(x).__name__}{kind}"
        )


def needs_copy(x: Tensor) -> bool:
    """Whether the result has to be written to x by ``copy_``.

    ``copy_`` follows autograd's rules for in-place changes, raises torch's own errors, and supports negated views such
    as ``z.conj().imag``.
    """
    return x.is_inference() or x.is_neg() or (x.requires_grad and torch.is_grad_enabled())


def check_no_overlap(x: Tensor) -> None:
    """Raises RuntimeError if several elements of x share memory. torch raises it only where the check is cheap."""
    span = 1
    for d in reference.order_by_stride(x)[::-1]:
        if x.shape[d] != 1 and x.stride(d) < span:
            break
        span += x.stride(d) * (x.shape[d] - 1)
    else:
        return
    # Interleaved dimensions need not overlap, so this counts the different addresses.
    address = torch.arange(x.untyped_storage().nbytes() // x.element_size()).as_strided(x.shape, x.stride())
    if 0 in x.stride() or address.unique().numel() != x.numel():
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
