"""DTensors: each rank draws the part of the global tensor's mask that belongs to its shard.

Each element has its index in a plain tensor of the global shape and strides. So the mask does not depend on the
placements or on the number of devices, and the ranks need no communication. ``operators.py`` and ``dispatch.py`` call
this module.

It uses private names of torch: ``_spec`` and ``_local_tensor`` of a DTensor, ``_StridedShard`` and
``_disable_current_modes``. If one is missing, the first call with a DTensor raises AttributeError or ImportError.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import keys, reference, windows
from .torch_internals import constant_while_tracing, is_distributed, unwrapped_constant
from .warn import warn

# The meshes whose ranks have compared their keys, each with whether the keys came from the caller's generator.
_compared: set[tuple[Any, bool]] = set()
_plans: dict[Any, Any] = {}


def beside(x: Tensor, other: Tensor) -> Tensor:
    """If x is a DTensor, converts ``other``, which is equal on all ranks, to a replicated DTensor on its mesh."""
    if not is_distributed(x):
        return other
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = x.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(other, mesh, [Replicate()] * mesh.ndim, run_check=False)


@constant_while_tracing
def register_rules() -> bool:
    """Registers the operators' rule for DTensors. Not done at import, because DTensor takes long to import.

    Returns True.
    """
    _register_rules()
    return True


@functools.cache
def _register_rules() -> None:
    from torch.distributed.tensor import DTensor

    from . import operators

    def rule(_: Any, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return on_shard(operator, *args, **kwargs)

    for name in ("apply", f"apply.{operators.FORM}", "apply_", "keep_mask"):
        torch.library.register_torch_dispatch(f"fused_dropout::{name}", DTensor, rule, lib=operators._library)


def has_part_in(x: Any) -> bool:
    """Whether this rank belongs to the mesh of a DTensor."""
    return x.device_mesh.get_coordinate() is not None


@constant_while_tracing
def agree(mesh: Any, generator: Generator | None, compiling: bool) -> bool:
    """Makes the ranks of a mesh draw the same keys. Returns True.

    The ranks compare the next key that each would draw: once for each mesh with the default generator, and once with a
    given generator. If the keys differ, this warns, and all ranks take the generator state of the first rank, as in
    torch's own random operations on CUDA. Under torch.compile the ranks compare while Dynamo traces, because
    compiled code cannot do it.

    Raises:
        RuntimeError: the keys differ while Dynamo traces. Dynamo restores the generator after tracing, so its state
            cannot be changed here. Dynamo reports an InternalTorchDynamoError with the same text.
    """
    mesh = unwrapped_constant(mesh)
    comparison = mesh, generator is not None
    if comparison in _compared or (mesh.device_type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return True
    with _disable_current_modes():
        device = torch.device(mesh.device_type)
        generator = keys.default_generator(device) if generator is None else generator
        words = keys.draw_keys(1, device, generator.clone_state())[0].view(torch.int64).to(device)
        groups = [mesh.get_group(d) for d in range(mesh.ndim) if mesh.size(d) > 1]
        # Finds the largest w and the largest ~w over the mesh. The complement of the second is the smallest w.
        bounds = torch.cat((words, ~words))
        for group in groups:
            dist.all_reduce(bounds, dist.ReduceOp.MAX, group)
        largest, smallest = bounds[:2], ~bounds[2:]
        if torch.equal(largest, smallest):
            _compared.add(comparison)
            return True
        different = (
            f"the ranks of {mesh} are seeded differently, and each would draw a mask of its own for one distributed "
            "tensor"
        )
        if compiling:
            raise RuntimeError(
                f"fused_dropout: {different}. Call torch.manual_seed with the same number on all of them"
            )
        state = generator.get_state().to(device)
        for group in groups:
            dist.broadcast(state, group=group, group_src=0)
        generator.set_state(state.cpu())
        _compared.add(comparison)
    warn(
        f"{different}. All take the generator state of the first from now on. Better call torch.manual_seed with the "
        "same number on all of them"
    )
    return True


def on_shard(
    operator: Any,
    x: Any,
    p: float,
    key: Tensor,
    start: int = 0,
    index_strides: Sequence[int] | None = None,
    *scale: float | None,
) -> Any:
    """Calls the operator on this rank's shard of x, with the indices of the global tensor."""
    makes_mask, in_place = operator._opname == "keep_mask", operator._opname == "apply_"
    if not all(map(_is_linear, x.placements)):
        x = _reduced(x, in_place)
    runs, start, strides, output_spec = _plan_of(x, start, index_strides, makes_mask)

    def on_window(part: Tensor, start: int, strides: list[int]) -> Tensor:
        output = operator(part, p, key, start, strides, *scale)
        return part if in_place else output

    local = x._local_tensor
    if runs is None:
        output = operator(local, p, key, start, strides, *scale)
    else:
        output = windows.over_runs(on_window, local, runs, start, strides, in_place)
    # Skips __init__, which does nothing and takes as long as the rest of this function.
    return None if in_place else x.__class__.__new__(x.__class__, output, output_spec, requires_grad=False)


def _is_linear(placement: Any) -> bool:
    """Whether dropout of each rank's part gives that rank's part of the dropped tensor."""
    return not placement.is_partial() or getattr(placement, "reduce_op", None) in ("sum", "avg")


def _reduced(x: Any, in_place: bool) -> Any:
    """Reduces those partial placements of x whose reduction does not commute with dropout, such as max."""
    from torch.distributed.tensor import Replicate

    if in_place:
        raise RuntimeError(f"in-place dropout of a tensor whose placements {x.placements} have to be reduced first")
    with torch.no_grad():
        return x.redistribute(placements=[own if _is_linear(own) else Replicate() for own in x.placements])


def _plan_of(x: Any, start: int, index_strides: Sequence[int] | None, makes_mask: bool) -> Any:
    """``_plan``, cached: it is the same for all tensors with the same spec."""
    spec, coordinate = x._spec, x.device_mesh.get_coordinate()
    if not all(type(n) is int for n in (*spec.shape, start, *(index_strides or ()))):
        return _plan(x, start, index_strides, makes_mask)  # a compiler's symbolic sizes have no hash
    known = (spec, coordinate and tuple(coordinate), start, index_strides and tuple(index_strides), makes_mask)
    plan = _plans.get(known)
    if plan is None:
        if len(_plans) == 1024:
            _plans.clear()
        plan = _plans[known] = _plan(x, start, index_strides, makes_mask)
    return plan


def _plan(x: Any, start: int, index_strides: Sequence[int] | None, makes_mask: bool) -> Any:
    """How the operator runs on this rank's shard: (runs, start, index strides, spec of the output).

    If one call without a view is enough, runs is None, and start and index strides are those of the shard. Otherwise
    they are those of the global tensor.
    """
    strides = reference.checked_strides(x, start, index_strides)
    output_spec = _spec_of_output(x, makes_mask)
    if not has_part_in(x):
        return None, 0, None, output_spec
    runs = _runs_of(x._spec)
    window = windows.window(runs, start, strides)
    if isinstance(window, int) or len(window[1]) != len(strides):  # the local tensor needs a view or several calls
        return runs, start, strides, output_spec
    return None, window[0], window[2], output_spec


def _spec_of_output(x: Any, makes_mask: bool) -> Any:
    """The spec of the output: the placements of x, and the strides of ``torch.empty_like(x)``.

    A mask is bool, and replicated where x is partial, because bools have no sum.
    """
    from torch.distributed.tensor import Replicate

    spec, strides = x._spec, x.stride()
    if not reference.is_dense(x):
        strides = torch.empty_like(torch.empty_strided(x.shape, strides, device="meta")).stride()
    elif not makes_mask:
        return spec
    meta = spec.tensor_meta._replace(stride=strides, dtype=torch.bool if makes_mask else x.dtype)
    placements = tuple(Replicate() if makes_mask and own.is_partial() else own for own in spec.placements)
    return replace(spec, placements=placements, tensor_meta=meta)


def _runs_of(spec: Any) -> list[windows.Runs]:
    """The positions that this rank holds along each dimension of the global tensor."""
    from torch.distributed.tensor.placement_types import _StridedShard

    coordinate = spec.mesh.get_coordinate()
    runs: list[windows.Runs] = [[(0, size)] if size != 0 else [] for size in spec.shape]
    # Mesh dimensions divide a tensor dimension from left to right, if the spec has no order of its own.
    order = getattr(spec, "shard_order", None)
    for m in [m for _, dims in order for m in dims] if order else range(len(coordinate)):
        placement, n, rank = spec.placements[m], spec.mesh.size(m), coordinate[m]
        if not hasattr(placement, "dim"):
            continue
        own = runs[placement.dim]
        if isinstance(placement, _StridedShard):
            factor = int(placement.split_factor)
            pieces = [windows.chunk(own, factor, i) for i in range(factor)]
            own = [run for piece in pieces for run in windows.chunk(piece, n, rank)]
        else:
            own = windows.chunk(own, n, rank)
        runs[placement.dim] = windows.joined(own)
    return runs


# For one call of dropout on this rank: the key of its mask, and checksums of its input.
Fingerprint = tuple[tuple[int, ...], tuple[int, ...]]


def meshes_of(model: torch.nn.Module) -> list[Any]:
    """The device meshes of a model's parameters to which this rank belongs."""
    sharded: list[Any] = [p for p in model.parameters() if is_distributed(p)]
    return list(dict.fromkeys(p.device_mesh for p in sharded if has_part_in(p)))


def fingerprint_of(x: Any, generator: Generator | None, key: Tensor | None) -> Fingerprint:
    """The fingerprint of a call with these arguments. Call this before the call itself, which draws the key."""
    x = (x.to_local() if is_distributed(x) else x).detach()
    if key is None:
        state = keys.default_generator(x.device) if generator is None else generator
        key = keys.draw_keys(1, x.device, state.clone_state())[0]
    bits = x.reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return tuple(key.view(torch.int64).tolist()), tuple(int(bits[::step].sum()) for step in (1, 3, 7))


def one_mask_for_shards(mesh: Any, fingerprints: dict[str, list[Fingerprint]]) -> dict[str, list[str]]:
    """For each dimension of a mesh: the sites that drew the same mask on all its ranks for different inputs.

    One such call is enough. All ranks of the mesh have to call this function.
    """
    found: dict[str, list[str]] = {}
    for d in range(mesh.ndim):
        ranks: list[Any] = [None] * mesh.size(d)
        dist.all_gather_object(ranks, fingerprints, mesh.get_group(d))
        name = mesh.mesh_dim_names[d] if mesh.mesh_dim_names else f"mesh dimension {d}"
        found[name] = []
        for site in fingerprints:
            calls = zip(*(of_rank.get(site, []) for of_rank in ranks), strict=False)
            masks_and_inputs = [tuple(map(set, zip(*call, strict=True))) for call in calls]
            if any(len(masks) == 1 and len(inputs) > 1 for masks, inputs in masks_and_inputs):
                found[name].append(site)
    return found
