"""Defines the operators ``torch.ops.fused_dropout``: schemas, fake kernels, a batching rule, and reference kernels.

Most of them apply the mask of a window of indices: element (i_0, ..., i_n-1) of x has the index
``start + sum(i_d * index_strides[d])``. They are pure functions of an explicit key, except ``draw_keys``, which draws n
keys from a default generator. The native library has its own kernels for its devices, and the reference runs on all
others. ``autograd.py`` calls this module.
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
    # Without index strides the mask follows the memory order of x, so a compiler must keep eager's strides.
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
    # The operators have no autograd rules; ``attention.py`` has them. The kernels are only for the CPU.
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float p, Tensor dropout_key, "
    "bool is_causal, float scale) -> (Tensor, Tensor)": (),
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor statistics, "
    "Tensor? attn_mask, float p, Tensor dropout_key, bool is_causal, float scale) -> (Tensor, Tensor, Tensor)": (),
    # For Inductor, which expands it. The index strides are required, so the mask is right for any layout of x.
    f"apply.{FORM}(Tensor x, float p, Tensor key, SymInt start, SymInt[] index_strides, float? scale=None) -> Tensor": (
        torch.Tag.flexible_layout,
    ),
    # For ``compiled.py``, on GPUs without kernels. The numbers are tensors, so that a new value needs no compilation.
    # window: start and index strides; empty for 0 and row-major. fits: whether all indices fit 32 bits. Returns the
    # mask if scale is None.
    f"apply.any_{FORM}(Tensor x, Tensor threshold, Tensor? scale, Tensor key, Tensor[] window, bool fits) -> Tensor": (
        torch.Tag.flexible_layout,
    ),
    # Returns x, but depends on the gradient, so a compiler has to compute in backward what backward derives from x.
    # Without it the compiler would compute this in forward and save it.
    f"after.{FORM}(Tensor x, Tensor gradient) -> Tensor": (torch.Tag.flexible_layout,),
    # The partitioner and checkpointing replay the random state only around operators with this tag, and find the device
    # in the keyword arguments.
    "draw_keys(SymInt n, *, Device device) -> Tensor": (torch.Tag.nondeterministic_seeded,),
    # For Inductor, which merges the draws of a graph into one call. The second overload is for its C++ wrapper. The
    # argument is named "count" because torch crashes on removing two overloads with equal arguments.
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
    """Registers the kernel for all devices without their own kernel, and the fake kernel."""
    _library.impl(name, reference_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_dropout::{name}", fake, lib=_library)


def _uncounted(in_place: Callable[..., None]) -> Callable[..., None]:
    """Makes an in-place function leave the version counter alone, as the C++ kernels do. Their callers increment it."""

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
    """``residual + apply(x + bias)``. The layout of x numbers the elements, also if the sum has another layout."""
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
    """``apply(relu(x))``. The layout of x numbers the elements."""
    return apply(torch.relu(x), p, key, start, reference.checked_strides(x, start, index_strides), scale)


def _relu_dropout_backward(gradient: Tensor, output: Tensor, scale: float) -> Tensor:
    """``gradient * scale``, and 0 where the output is 0 or less. Where it is NaN the gradient passes, as in torch."""
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


# The operators that have a composition as their reference: for each the kernel and the fake kernel.
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
if native.eager is None:  # the eager binding registers it in C++
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
    """The vmap rule. One key gives all samples the same mask, that of a single sample. A batch of keys gives each
    sample its own mask.
    """
    x_dim, _, key_dim, *_ = in_dims
    sample = x if x_dim is None else x.select(x_dim, 0)
    if key_dim is None:
        return keep_mask(sample, p, key, start, index_strides), None
    return torch.stack([keep_mask(sample, p, own, start, index_strides) for own in key.unbind(key_dim)]), 0


torch.library.register_vmap("fused_dropout::keep_mask", _keep_mask_batched, lib=_library)


def _serve_cuda_by_reference() -> None:
    """Registers the reference for CUDA, compiled if possible. Replaces the CUDA kernels if they are loaded."""
    by = compiled if native.compiles_reference() else reference
    # Under older versions of torch no kernels are loaded, and this option may be missing.
    override: Any = {"allow_override": True} if native.release(torch.__version__) >= native.OLDEST_TORCH else {}
    kernels = {"apply": by.apply, "apply_": _uncounted(by.apply_), "keep_mask": by.keep_mask}
    for name, kernel in (kernels | {name: kernel for name, (kernel, _) in _COMPOSED.items()}).items():
        _library.impl(name, kernel, "CUDA", **override)
    if native.eager is not None:  # its draw_keys uses a CUDA kernel to write keys on the device
        _library.impl("draw_keys", keys.draw_keys_on, "CompositeExplicitAutograd", **override)


_settled: set[int] = set()


@constant_while_tracing
def settle_cuda(device: torch.device) -> bool:
    """Loads the CUDA kernels at the first call on a device. Returns True.

    If they have no code for this GPU, it warns and registers the reference for CUDA. It does not run at import, because
    it creates a CUDA context.
    """
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
    """Calls ``apply``, or while compiling, if set so, the overload that Inductor fuses with its neighbours."""
    fuse = native.compile_as == "fuse" or (native.compile_as == "auto" and x.is_cuda)
    if fuse and is_compiling() and not is_recorded():
        strides = reference.index_strides_of(x) if index_strides is None else index_strides
        return apply_expanded(x, p, key, start, strides, scale)
    try:
        if is_distributed(x) and not is_compiling():
            return on_shard(apply, x, p, key, start, index_strides, scale)  # calls the rule without the dispatcher
        return apply(x, p, key, start, index_strides, scale)
    except RuntimeError:
        torch.empty_like(x)  # if memory is missing, raises torch's OutOfMemoryError, which the kernel's error is not
        raise


def keep_mask_as_served(
    x: Tensor, p: float, key: Tensor, start: int = 0, index_strides: Sequence[int] | None = None
) -> Tensor:
    """Calls ``keep_mask``. Raises torch's own error if memory is missing."""
    try:
        return keep_mask(x, p, key, start, index_strides)
    except RuntimeError:
        torch.empty_like(x, dtype=torch.bool)
        raise
