"""The operators ``torch.ops.fused_dropout``: schemas, fake kernels and a batching rule; the reference for every device.

All apply, or show, the mask of a window of indices: element (i_0, ..., i_n-1) of x has the index
``start + sum(i_d * index_strides[d])``. The native library, where it is loaded, puts its kernels before the reference
for the devices that it was built for. All are pure functions of an explicit key, but for ``draw_keys``, which takes n
keys from a default generator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import keys, native, reference
from .torch_internals import keep_draws_apart

_library = torch.library.Library("fused_dropout", "DEF")
_WINDOW = "float p, Tensor key, SymInt start=0, SymInt[]? index_strides=None"
_SCHEMAS = {
    # Without index strides the mask follows the memory order of x, so a compiler must keep the strides of eager.
    f"apply(Tensor x, {_WINDOW}, float? scale=None) -> Tensor": (torch.Tag.needs_exact_strides,),
    f"apply_(Tensor(a!) x, {_WINDOW}, float? scale=None) -> ()": (torch.Tag.needs_exact_strides,),
    f"keep_mask(Tensor x, {_WINDOW}) -> Tensor": (torch.Tag.needs_exact_strides,),
    # Partitioner and checkpointing replay random state only around operators with this tag, and look for the device
    # among the keyword arguments.
    "draw_keys(SymInt n, *, Device device) -> Tensor": (torch.Tag.nondeterministic_seeded,),
}
for _schema, _tags in _SCHEMAS.items():
    _library.define(_schema, tags=(*_tags, torch.Tag.pt2_compliant_tag))


def _implement(name: str, reference_kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.impl(name, reference_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_dropout::{name}", fake, lib=_library)


def _apply_(x: Tensor, *arguments: Any) -> None:
    # As the kernels have it: who calls the operator counts the change.
    with torch.autograd._unsafe_preserve_version_counter(x):
        reference.apply_(x, *arguments)


def _fake_draw_keys(n: int, *, device: torch.device) -> Tensor:
    keep_draws_apart(torch.ops.fused_dropout.draw_keys)
    return torch.empty(n, 2, dtype=torch.uint64, device=device)


_implement("apply", reference.apply, lambda x, *_: torch.empty_like(x))
_implement("apply_", _apply_, lambda x, *_: None)
_implement("keep_mask", reference.keep_mask, lambda x, *_: torch.empty_like(x, dtype=torch.bool))
torch.library.register_fake("fused_dropout::draw_keys", _fake_draw_keys, lib=_library)
if native.eager is None:  # which has it in C++
    _library.impl("draw_keys", keys.draw_keys_on, "CompositeExplicitAutograd")


def _keep_mask_batched(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    p: float,
    key: Tensor,
    start: int = 0,
    index_strides: Sequence[int] | None = None,
) -> tuple[Tensor, int | None]:
    """vmap: with one key all samples get one mask, that of a sample alone; with a key each, each gets its own."""
    x_dim, _, key_dim, *_ = in_dims
    sample = x if x_dim is None else x.select(x_dim, 0)
    if key_dim is None:
        return keep_mask(sample, p, key, start, index_strides), None
    return torch.stack([keep_mask(sample, p, own, start, index_strides) for own in key.unbind(key_dim)]), 0


torch.library.register_vmap("fused_dropout::keep_mask", _keep_mask_batched, lib=_library)


def chosen_apply(x: Tensor) -> Any:
    """The operator, in the form that is made for whoever runs it."""
    return apply


apply = torch.ops.fused_dropout.apply.default
apply_ = torch.ops.fused_dropout.apply_.default
keep_mask = torch.ops.fused_dropout.keep_mask.default
draw_keys = torch.ops.fused_dropout.draw_keys.default
