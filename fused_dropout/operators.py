"""The operators ``torch.ops.fused_dropout``: schemas, fake kernels and batching rule; the reference for every device.

The native library, where it is loaded, puts its kernels before the reference for the devices that it was built for.
All are pure functions of an explicit key, but for ``draw_key``, which takes one from a default generator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import compiled, native, reference, rng

_library = torch.library.Library("fused_dropout", "DEF")
_ARGUMENTS = "float p, Tensor key, int start=0"
_BROADCAST = "float p, Tensor key, int[] noise_shape, float scale"
_SCHEMAS = {
    # The mask follows the memory order of x, so a compiler must hand the operator the strides that eager would.
    f"apply(Tensor x, {_ARGUMENTS}) -> Tensor": (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
    f"apply_(Tensor(a!) x, {_ARGUMENTS}) -> ()": (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
    f"keep_mask(Tensor x, {_ARGUMENTS}) -> Tensor": (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
    f"apply_broadcast(Tensor x, {_BROADCAST}) -> Tensor": (torch.Tag.pt2_compliant_tag,),
    f"apply_broadcast_(Tensor(a!) x, {_BROADCAST}) -> ()": (torch.Tag.pt2_compliant_tag,),
    # Partitioner and checkpointing replay random state only around operators with this tag, and look for the device
    # among the keyword arguments.
    "draw_key(*, Device device) -> Tensor": (torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
}
for _schema, _tags in _SCHEMAS.items():
    _library.define(_schema, tags=_tags)


def _implement(name: str, reference_kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.impl(name, reference_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_dropout::{name}", fake, lib=_library)


def _uncounted(in_place: Callable[..., None]) -> Callable[..., None]:
    """As the kernels have it: who calls the operator counts the change."""

    def changed(x: Tensor, *arguments: Any) -> None:
        with torch.autograd._unsafe_preserve_version_counter(x):
            in_place(x, *arguments)

    return changed


def _keep_mask(x: Tensor, p: float, key: Tensor, start: int = 0) -> Tensor:
    return reference.keep_mask(x, p, key, start).clone()


def _fake_draw_key(*, device: torch.device) -> Tensor:
    # Without this AOTAutograd takes two drawings for a common subexpression, and two dropouts of a compiled block get
    # one mask. Up to torch 2.13 at least it goes by this list of its own, not by the operator's tag.
    from torch._functorch.compile_utils import rand_ops

    if torch.ops.fused_dropout.draw_key not in rand_ops:
        rand_ops.append(torch.ops.fused_dropout.draw_key)
    return torch.empty(2, dtype=torch.uint64, device=device)


_implement("apply", reference.apply, lambda x, p, key, start=0: torch.empty_like(x))
_implement("apply_", _uncounted(reference.apply_), lambda x, p, key, start=0: None)
_implement("keep_mask", _keep_mask, lambda x, p, key, start=0: torch.empty_like(x, dtype=torch.bool))
_implement("apply_broadcast", reference.apply_broadcast, lambda x, p, key, noise_shape, scale: torch.empty_like(x))
_implement("apply_broadcast_", _uncounted(reference.apply_broadcast_), lambda x, p, key, noise_shape, scale: None)
if native.compiles_reference:
    for _name in ("apply", "apply_", "keep_mask", "apply_broadcast", "apply_broadcast_"):
        _kernel = getattr(compiled, _name)
        _library.impl(_name, _uncounted(_kernel) if _name.endswith("_") else _kernel, "CUDA")
_implement("draw_key", lambda *, device: rng.draw_key(device).to(device), _fake_draw_key)


def _apply_batched(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, p: float, key: Tensor, start: int = 0
) -> tuple[Tensor, int]:
    """vmap: with one key all samples get one mask, that of a sample alone; with a key each, each gets its own."""
    x_dim, _, key_dim, *_ = in_dims
    samples = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    if key_dim is None:
        return torch.where(keep_mask(samples[0], p, key, start), samples * reference.scale(p), 0.0), 0
    pairs = zip(samples, key.unbind(key_dim), strict=True)
    return torch.stack([apply(sample, p, own_key, start) for sample, own_key in pairs]), 0


def _keep_mask_batched(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, p: float, key: Tensor, start: int = 0
) -> tuple[Tensor, int | None]:
    x_dim, _, key_dim, *_ = in_dims
    sample = x if x_dim is None else x.select(x_dim, 0)
    if key_dim is None:
        return keep_mask(sample, p, key, start), None
    return torch.stack([keep_mask(sample, p, own_key, start) for own_key in key.unbind(key_dim)]), 0


torch.library.register_vmap("fused_dropout::apply", _apply_batched, lib=_library)
torch.library.register_vmap("fused_dropout::keep_mask", _keep_mask_batched, lib=_library)

apply = torch.ops.fused_dropout.apply.default
apply_ = torch.ops.fused_dropout.apply_.default
keep_mask = torch.ops.fused_dropout.keep_mask.default
apply_broadcast = torch.ops.fused_dropout.apply_broadcast.default
apply_broadcast_ = torch.ops.fused_dropout.apply_broadcast_.default
