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

from . import compiled, inductor, keys, native, reference
from .build_info import how_to_improve
from .distributed import on_shard
from .inductor import FORM
from .torch_internals import constant_while_tracing, is_compiling, is_distributed, is_recorded, keep_draws_apart
from .warn import warn

_library = torch.library.Library("fused_dropout", "DEF")
_WINDOW = "float p, Tensor key, SymInt start=0, SymInt[]? index_strides=None"
_SCHEMAS = {
    # Without index strides the mask follows the memory order of x, so a compiler must keep the strides of eager.
    f"apply(Tensor x, {_WINDOW}, float? scale=None) -> Tensor": (torch.Tag.needs_exact_strides,),
    f"apply_(Tensor(a!) x, {_WINDOW}, float? scale=None) -> ()": (torch.Tag.needs_exact_strides,),
    f"keep_mask(Tensor x, {_WINDOW}) -> Tensor": (torch.Tag.needs_exact_strides,),
    f"dropout_add(Tensor x, Tensor residual, Tensor? bias, {_WINDOW}, float? scale=None) -> Tensor": (
        torch.Tag.needs_exact_strides,
    ),
    f"dropout_add_(Tensor(a!) x, Tensor residual, Tensor? bias, {_WINDOW}, float? scale=None) -> ()": (
        torch.Tag.needs_exact_strides,
    ),
    f"relu_dropout(Tensor x, {_WINDOW}, float? scale=None) -> Tensor": (torch.Tag.needs_exact_strides,),
    f"relu_dropout_(Tensor(a!) x, {_WINDOW}, float? scale=None) -> ()": (torch.Tag.needs_exact_strides,),
    "relu_dropout_backward(Tensor gradient, Tensor output, float scale) -> Tensor": (),
    # Without gradients of their own: ``attention.py`` has them. The kernels are for the CPU alone.
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float p, Tensor dropout_key, "
    "bool is_causal, float scale) -> (Tensor, Tensor)": (),
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor statistics, "
    "Tensor? attn_mask, float p, Tensor dropout_key, bool is_causal, float scale) -> (Tensor, Tensor, Tensor)": (),
    # For Inductor, which expands it. With index strides given, the mask is the same whatever the layout of x becomes.
    f"apply.{FORM}(Tensor x, float p, Tensor key, SymInt start, SymInt[] index_strides, float? scale=None) -> Tensor": (
        torch.Tag.flexible_layout,
    ),
    # For GPUs without kernels, in ``compiled.py``: numbers are tensors, so that nothing is compiled again for another
    # one. window: start and index strides, or nothing for 0 and row-major ones; fits: whether all indices have 32 bits.
    # Without a scale: the mask.
    f"apply.any_{FORM}(Tensor x, Tensor threshold, Tensor? scale, Tensor key, Tensor[] window, bool fits) -> Tensor": (
        torch.Tag.flexible_layout,
    ),
    # Returns x, and depends on the gradient: a compiler then computes in backward what backward makes of x. Without it
    # forward would compute and save that.
    f"after.{FORM}(Tensor x, Tensor gradient) -> Tensor": (torch.Tag.flexible_layout,),
    # Partitioner and checkpointing replay random state only around operators with this tag, and look for the device
    # among the keyword arguments.
    "draw_keys(SymInt n, *, Device device) -> Tensor": (torch.Tag.nondeterministic_seeded,),
    # For Inductor, which makes one call of the draws of a graph: the second, if it writes that call in C++.
    # torch confuses overloads of the same arguments when it removes them, and ends the process: hence "count".
    f"draw_keys.{FORM}(SymInt count, *, Device device) -> Tensor": (torch.Tag.nondeterministic_seeded,),
    f"draw_keys.named_{FORM}(SymInt n, str device) -> Tensor": (torch.Tag.nondeterministic_seeded,),
}
for _schema, _tags in _SCHEMAS.items():
    _library.define(_schema, tags=(*_tags, torch.Tag.pt2_compliant_tag))

apply = torch.ops.fused_dropout.apply.default
apply_expanded = getattr(torch.ops.fused_dropout.apply, FORM)
apply_ = torch.ops.fused_dropout.apply_.default
keep_mask = torch.ops.fused_dropout.keep_mask.default
dropout_add = torch.ops.fused_dropout.dropout_add.default
dropout_add_ = torch.ops.fused_dropout.dropout_add_.default
relu_dropout = torch.ops.fused_dropout.relu_dropout.default
relu_dropout_ = torch.ops.fused_dropout.relu_dropout_.default
relu_dropout_backward = torch.ops.fused_dropout.relu_dropout_backward.default
draw_keys = torch.ops.fused_dropout.draw_keys.default
draw_keys_together = getattr(torch.ops.fused_dropout.draw_keys, FORM)
apply_any = getattr(torch.ops.fused_dropout.apply, f"any_{FORM}")
after = getattr(torch.ops.fused_dropout.after, FORM)


def implement(name: str, reference_kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Gives an operator the kernel of every device that has none of its own, and its fake kernel."""
    _library.impl(name, reference_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_dropout::{name}", fake, lib=_library)


def _uncounted(in_place: Callable[..., None]) -> Callable[..., None]:
    """As the kernels have it: who calls the operator counts the change."""

    def changed(x: Tensor, *arguments: Any) -> None:
        with torch.autograd._unsafe_preserve_version_counter(x):
            in_place(x, *arguments)

    return changed


def _fake_draw_keys(count: int, *, device: torch.device | str) -> Tensor:
    inductor.register_if_imported()
    keep_draws_apart(torch.ops.fused_dropout.draw_keys)
    return torch.empty(count, 2, dtype=torch.uint64, device=device)


def _fake_apply_expanded(x: Tensor, *_: Any) -> Tensor:
    inductor.register_if_imported()
    return torch.empty_like(x)


def _fake_apply_any(x: Tensor, threshold: Tensor, scale: Tensor | None, *_: Any) -> Tensor:
    inductor.register_if_imported()
    return torch.empty_like(x, dtype=torch.bool if scale is None else x.dtype)


def _after(x: Tensor, gradient: Tensor) -> Tensor:
    return _fake_after(x, gradient).copy_(x)


def _fake_after(x: Tensor, gradient: Tensor) -> Tensor:
    inductor.register_if_imported()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _not_compiled(*_: Any) -> Tensor:
    raise RuntimeError(inductor.problem or "torch.compile is switched off")


def _dropout_add(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    p: float,
    key: Tensor,
    start: int = 0,
    index_strides: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """``residual + apply(x + bias)``. The mask is numbered by x, whatever layout the sum has."""
    strides = reference.checked_strides(x, start, index_strides)
    return residual + apply(x if bias is None else x + bias, p, key, start, strides, scale)


def _relu_dropout(
    x: Tensor,
    p: float,
    key: Tensor,
    start: int = 0,
    index_strides: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """``apply(relu(x))``, with the mask numbered by x."""
    return apply(torch.relu(x), p, key, start, reference.checked_strides(x, start, index_strides), scale)


def _relu_dropout_backward(gradient: Tensor, output: Tensor, scale: float) -> Tensor:
    """``gradient * scale``, and 0 where the output is 0 or less: a NaN there lets the gradient pass, as in torch."""
    result = _fake_relu_dropout_backward(gradient, output, scale)
    zero = torch.zeros((), dtype=gradient.dtype, device=gradient.device)
    return torch.where(output <= 0, zero, gradient * scale, out=result)


def _fake_relu_dropout_backward(gradient: Tensor, output: Tensor, scale: float) -> Tensor:
    one_row = reference.is_dense(gradient) and gradient.stride() == output.stride()
    one_row = one_row or (gradient.is_contiguous() and output.is_contiguous())
    return torch.empty_like(gradient, memory_format=torch.preserve_format if one_row else torch.contiguous_format)


def _written_to_x(function: Callable[..., Tensor]) -> Callable[..., None]:
    def in_place(x: Tensor, *arguments: Any) -> None:
        x.copy_(function(x, *arguments))

    return _uncounted(in_place)


# The operators that are made of the one above where no kernel serves.
_COMPOSED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dropout_add": (_dropout_add, lambda x, residual, bias, *_: residual + (x if bias is None else x + bias)),
    "dropout_add_": (_written_to_x(_dropout_add), lambda x, *_: None),
    "relu_dropout": (_relu_dropout, lambda x, *_: torch.empty_like(x)),
    "relu_dropout_": (_written_to_x(_relu_dropout), lambda x, *_: None),
    "relu_dropout_backward": (_relu_dropout_backward, _fake_relu_dropout_backward),
}
for _name, (_kernel, _fake) in _COMPOSED.items():
    implement(_name, _kernel, _fake)
implement("apply", reference.apply, lambda x, *_: torch.empty_like(x))
implement(f"apply.{FORM}", apply, _fake_apply_expanded)
implement(f"apply.any_{FORM}", _not_compiled, _fake_apply_any)
implement(f"after.{FORM}", _after, _fake_after)
implement("apply_", _uncounted(reference.apply_), lambda x, *_: None)
implement("keep_mask", reference.keep_mask, lambda x, *_: torch.empty_like(x, dtype=torch.bool))
torch.library.register_fake("fused_dropout::draw_keys", _fake_draw_keys, lib=_library)
if native.eager is None:  # which has it in C++
    _library.impl("draw_keys", keys.draw_keys_on, "CompositeExplicitAutograd")
implement(f"draw_keys.{FORM}", lambda count, *, device: draw_keys(count, device=device), _fake_draw_keys)
implement(
    f"draw_keys.named_{FORM}",
    lambda n, device: draw_keys(n, device=torch.device(device)),
    lambda n, device: _fake_draw_keys(n, device=device),
)


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


def _serve_cuda_by_reference() -> None:
    """Registers the reference for CUDA, compiled if that is possible, and replaces the kernels if they are loaded."""
    by = compiled if native.compiles_reference() else reference
    # Older versions of torch load no kernels to replace, and may not have this option.
    override: Any = {"allow_override": True} if native.release(torch.__version__) >= native.OLDEST_TORCH else {}
    kernels = {"apply": by.apply, "apply_": _uncounted(by.apply_), "keep_mask": by.keep_mask}
    for name, kernel in (kernels | {name: kernel for name, (kernel, _) in _COMPOSED.items()}).items():
        _library.impl(name, kernel, "CUDA", **override)
    if native.eager is not None:  # its draw_keys needs a CUDA kernel to write keys on the device
        _library.impl("draw_keys", keys.draw_keys_on, "CompositeExplicitAutograd", **override)


_settled: set[int] = set()


@constant_while_tracing
def settle_cuda(device: torch.device) -> bool:
    """Loads the CUDA kernels at the first call on a device. If they have no code for it, warns, and lets the reference
    serve CUDA from then on. Not done at import, since it creates a CUDA context. Returns True."""
    if native.cuda_kernels is None or device.index in _settled or not torch.cuda.is_available():
        return True
    if why := native.cuda_kernels.load(device.index):
        native.withdraw_cuda_kernels(f"not used: {why}")
        _serve_cuda_by_reference()
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        better = how_to_improve(TORCH_CUDA_ARCH_LIST=capability)
        warn(f"{native.note('_cuda')}. The reference serves instead. Better by: {better}")
    elif native.eager is not None:
        native.eager.serve_cuda(device.index)
    _settled.add(device.index)
    return True


if native.compiles_reference() or (native.cuda_kernels is None and native.eager is not None and torch.version.cuda):
    _serve_cuda_by_reference()


def apply_as_served(
    x: Tensor, p: float, key: Tensor, start: int, index_strides: Sequence[int] | None, scale: float | None
) -> Tensor:
    """``apply``, in the form that is made for whoever runs it: a compiler may fuse it with its neighbours."""
    fuse = native.compile_as == "fuse" or (native.compile_as == "auto" and x.is_cuda)
    if fuse and is_compiling() and not is_recorded():
        strides = reference.index_strides_of(x) if index_strides is None else index_strides
        return apply_expanded(x, p, key, start, strides, scale)
    try:
        if is_distributed(x) and not is_compiling():
            return on_shard(apply, x, p, key, start, index_strides, scale)  # what the dispatcher would come to
        return apply(x, p, key, start, index_strides, scale)
    except RuntimeError:
        torch.empty_like(x)  # if memory is missing, raises torch's own error: the kernel's has lost its class
        raise


def keep_mask_as_served(
    x: Tensor, p: float, key: Tensor, start: int = 0, index_strides: Sequence[int] | None = None
) -> Tensor:
    """``keep_mask``, which raises torch's own error if memory is missing."""
    try:
        return keep_mask(x, p, key, start, index_strides)
    except RuntimeError:
        torch.empty_like(x, dtype=torch.bool)
        raise
