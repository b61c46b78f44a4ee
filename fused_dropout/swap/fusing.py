"""Makes layers of torch, transformers and timm call ``dropout_add`` and ``relu_dropout``, for ``convert(fuse=True)``.

The class of a layer becomes a subclass with the same name. ``rewriting.py`` makes its forward from the source of the
original one. Dropouts other than a plain ``fd.Dropout`` or ``fd.DropPath`` are called as before. The original forward
runs in eval mode, while a graph is compiled or recorded, and if a method of the layer was replaced.
"""

import functools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..modules import Dropout, DropPath
from ..neighbours import dropout_add, relu_dropout
from ..torch_internals import has_global_hooks, has_hooks, is_compiling, is_recorded
from .rewriting import NO_FORM, Rewritten, Site, Undropped, is_known, rewrite, undropped

_NO_LAYERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)
_NONE: Mapping[type, type] = {}


def _why_not(dropout: Any, table: Mapping[type, type] = _NONE) -> str:
    """Why a layer's dropout cannot be fused; empty if it can. table: the classes that ``convert`` will swap."""
    kind = table.get(type(dropout), type(dropout))
    if (kind is not Dropout and kind is not DropPath) or "forward" in vars(dropout):
        return f"{type(dropout).__name__} is not fd.Dropout or fd.DropPath with its own forward"
    if has_hooks(dropout):
        return "hooks look at its input or output"
    if kind is Dropout and (dropout.inplace or getattr(dropout, "noise_shape", None) is not None):
        return "it works in place or has a noise_shape"
    if kind is DropPath and not dropout.scale_by_keep:
        return "it has scale_by_keep=False"
    return ""


def _is_relu(activation: object) -> bool:
    if type(activation) is nn.ReLU:
        return not (activation.inplace or has_hooks(activation) or "forward" in vars(activation))
    return activation is F.relu or activation is torch.relu


def _p_of(dropout: Any) -> float:
    """The rate of a dropout, or 0 if it does not drop now or cannot be fused."""
    if _why_not(dropout) or not dropout.training or has_global_hooks():
        return 0.0
    p = dropout.p if type(dropout) is Dropout else dropout.drop_prob
    return p if 0 < p < 1 else 0.0


def _have_one_layout(x: Any, y: Any) -> bool:
    return type(x) is Tensor is type(y) and x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()


def _sum(residual: Any, dropout: Any, x: Any, swapped: bool = False) -> Any:
    """``residual + dropout(x)``, or if swapped ``dropout(x) + residual``, which can have another layout."""
    p = _p_of(dropout)
    # If x is the residual, both gradients belong to one tensor, and would be added in another order.
    fits = isinstance(x, Tensor) and x.dim() > 0 and x is not residual
    if p == 0 or not fits or (swapped and not _have_one_layout(x, residual)):
        dropped = dropout(x)
        return dropped + residual if swapped else residual + dropped
    noise_shape = (x.shape[0], *[1] * (x.dim() - 1)) if type(dropout) is DropPath else None
    return dropout_add(x, residual, p, generator=dropout.generator, key=dropout.key, noise_shape=noise_shape)


class _LayerCall(NamedTuple):
    """A call of an inner layer. run: the layer without the dropout at its end, or the layer if dropout is None."""

    run: Callable[..., Any]
    dropout: Any

    def sum(self, residual: Any, x: Any, swapped: bool = False) -> Any:
        if self.dropout is not None:
            return _sum(residual, self.dropout, x, swapped)
        return x + residual if swapped else residual + x


class FusedLayer(nn.Module):
    """The base of the generated classes.

    The rewritten code has only the name ``self`` for sure, so everything that it calls is a method here.
    """

    _fused_dropout_original: type[nn.Module]
    _fused_dropout_rewritten: Rewritten

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":  # torch starts to quantize the module: see modules.Keyed
            unfuse(self)
        nn.Module.__setattr__(self, name, value)

    def _fused_dropout_sum(self, residual: Any, dropout: Any, x: Any, swapped: bool = False) -> Any:
        return _sum(residual, dropout, x, swapped)

    def _fused_dropout_relu(self, dropout: Any, activation: Any, x: Any) -> Any:
        p = _p_of(dropout) if type(dropout) is Dropout and _is_relu(activation) else 0.0
        if p == 0 or not isinstance(x, Tensor):
            return dropout(activation(x))
        return relu_dropout(x, p, generator=dropout.generator, key=dropout.key)

    def _fused_dropout_layer(self, layer: Any, in_tuple: bool) -> _LayerCall:
        found = undropped_layer(layer, in_tuple)
        if found is None or has_global_hooks():
            return _LayerCall(layer, None)
        return _LayerCall(functools.partial(found.function, layer), getattr(layer, found.dropout))

    def _fused_dropout_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fuses = (
            not is_compiling()
            and self.training
            and not is_recorded()
            and not any(isinstance(x, Proxy) for x in (*args, *kwargs.values()))
            and not _replaced(self, self._fused_dropout_original, self._fused_dropout_rewritten)
        )
        forward = self._fused_dropout_rewritten.forward if fuses else self._fused_dropout_original.forward
        return forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle cannot find the generated class by name, so _restore makes it again.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_restore, (self._fused_dropout_original,), *reduced[2:])


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self._fused_dropout_forward(args, kwargs)


def _replaced(module: nn.Module, kind: type, rewritten: Rewritten) -> str:
    """The name of a method that was replaced after its source was read; empty if there is none."""
    for name, function in rewritten.sources.items():
        if getattr(kind, name) is not function or (name in vars(module) and name != "forward"):
            return name
    return ""


def undropped_layer(layer: Any, in_tuple: bool) -> Undropped | None:
    """The forward of a layer without the dropout at its end.

    None if there is no such dropout, or if a call of the layer runs more than the forward of its class.
    """
    kind: Any = type(layer)
    if not isinstance(layer, nn.Module) or kind.__call__ is not nn.Module.__call__ or not is_known(kind):
        return None
    if (
        hasattr(kind, "gradient_checkpointing")
        or "forward" in vars(layer)
        or has_hooks(layer)
        or layer._compiled_call_impl is not None
    ):
        return None
    found = undropped(kind, "forward", kind.forward)
    return found if found is not None and found.in_tuple == in_tuple else None


@functools.cache
def _fused_class(original: Any, source: Any) -> Any:
    rewritten = rewrite(original, source)
    if isinstance(rewritten, str):
        return None
    # Has the name of the original, because libraries look for names. torch.jit.script and FX read the original source.
    forward = FunctionType(_forward.__code__, source.__globals__, "forward")
    own: dict[str, Any] = {"forward": functools.update_wrapper(forward, source), **rewritten.methods}
    own |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    own |= {"_fused_dropout_original": original, "_fused_dropout_rewritten": rewritten}
    return type(original)(original.__name__, (FusedLayer, original), own)


def _restore(original: Any) -> nn.Module:
    kind = _fused_class(original, original.forward) or original
    return kind.__new__(kind)


# Below: what convert, revert and convert_report call.


def _original(module: nn.Module) -> Any:
    """The class of a module; for a fused layer its original class."""
    return vars(type(module)).get("_fused_dropout_original", type(module))


class Places(NamedTuple):
    """The dropouts of a layer that can be fused, and those that cannot.

    fused: for each function, the names of the dropouts that it replaces. left: for each other dropout, the reason. The
    empty name stands for the layer itself.
    """

    fused: dict[str, list[str]]
    left: dict[str, str]

    def __str__(self) -> str:
        return "; ".join(f"{function}: {', '.join(names)}" for function, names in self.fused.items())


def places_of(module: nn.Module, table: Mapping[type, type]) -> Places:
    """The places in a layer after ``convert`` has swapped the classes of the table."""
    kind, places = _original(module), Places({}, {})
    if isinstance(module, _NO_LAYERS) or not module._modules:
        return places
    known: Any = next(
        base for base in kind.__mro__ if issubclass(base, nn.Module) and (base is nn.Module or is_known(base))
    )
    if known is nn.Module:
        return places
    rewritten = rewrite(known, known.forward)
    why_not = rewritten if isinstance(rewritten, str) else NO_FORM
    for site in () if isinstance(rewritten, str) else rewritten.sites:
        name, reason = _look(module, site, table)
        if name and not reason:
            names = places.fused.setdefault(site.function, [])
            names += [name] if name not in names else []
        elif name:
            places.left[name] = reason
    if not places.fused and not places.left:
        if known is kind and any(_may_drop(child, table) for child in module.children()):
            places.left[""] = why_not
    elif places.fused and known is not kind:
        places.left[""] = f"{kind.__module__}.{kind.__name__}, a subclass of {known.__name__}"
    elif isinstance(rewritten, Rewritten) and (name := _replaced(module, kind, rewritten)):
        places.left[""] = f"its {name} was replaced"
    return Places({}, places.left) if "" in places.left else places


def _may_drop(module: object, table: Mapping[type, type]) -> bool:
    return isinstance(module, nn.Dropout | DropPath) or type(module) in table


def _look(module: nn.Module, site: Site, table: Mapping[type, type]) -> tuple[str, str]:
    """Returns the name of the dropout at a site, empty if there is none, and why it cannot be fused."""
    owner: Any = getattr(module, site.layer, None) if site.layer else module
    name = path = site.dropout
    if site.layer:
        kind: Any = type(owner)
        known = isinstance(owner, nn.Module) and is_known(kind)
        found = undropped(kind, "forward", kind.forward) if known else None
        if found is None or found.in_tuple != site.in_tuple:
            return "", ""
        name, path = found.dropout, f"{site.layer}.{found.dropout}"
    dropout = getattr(owner, name, None)
    if not isinstance(dropout, nn.Module) or isinstance(dropout, nn.Identity):
        return "", ""
    if site.layer and not undropped_layer(owner, site.in_tuple):
        return path, f"{site.layer} has hooks, a replaced forward, or a call of its own"
    if site.activation and not _is_relu(activation := getattr(module, site.activation, None)):
        return (path, "its ReLU works in place or has hooks") if isinstance(activation, nn.ReLU) else ("", "")
    return path, _why_not(dropout, table)


def fuse(module: nn.Module) -> None:
    """Changes a layer's class to the generated one, in place, if it has something to fuse."""
    kind: Any = type(module)
    if _original(module) is kind and places_of(module, {}).fused and (fused := _fused_class(kind, kind.forward)):
        vars(module).pop("forward", None)  # bound to the former class
        module.__class__ = fused


def unfuse(module: nn.Module) -> None:
    """Undoes ``fuse``."""
    if (original := _original(module)) is not type(module):
        vars(module).pop("forward", None)
        module.__class__ = original
