"""``convert``, ``revert`` and ``convert_report``: swap a model's dropout modules for the fused ones, and back.

``pairing.py`` joins a dropout with the linear layer after it, and ``fusing.py`` with a sum or a ReLU next to it.
``fusing.py`` is imported at its first use, because it takes a sixth of the import time of the package.
"""

import sys
from collections.abc import Iterator
from types import MethodType
from typing import NamedTuple, TypeVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn

from .. import modules
from ..arguments import check_module
from .pairing import PairedDropout, is_lora_layer, pair, pairs_of, unpair
from .patching import FAMILY, Replacement

_Model = TypeVar("_Model", bound=nn.Module)
_RATES = ("p", "drop_prob", "dropout", "drop_rate", "rate")  # attributes with a drop rate, in torch and other libraries
_warned: WeakSet[nn.Module] = WeakSet()  # modules that convert has given a warning about


def _to_fused() -> dict[type, type]:
    """The classes to swap: torch's, and timm's ``DropPath`` if timm is imported."""
    found = {getattr(nn, name): getattr(modules, name) for name in FAMILY.values()}
    drop_path = getattr(sys.modules.get("timm.layers.drop"), "DropPath", None)
    return found if drop_path is None else {**found, drop_path: modules.DropPath}


def _to_originals() -> dict[type, type]:
    return {fused: original for original, fused in _to_fused().items()} | {PairedDropout: nn.Dropout}


class ConvertReport(NamedTuple):
    """The result of :func:`convert_report`. ``str()`` of it is a table.

    Each attribute is a dictionary with a text for each module name. A shared module appears under each of its names.
    """

    fused: dict[str, str]
    """The fused dropout modules."""
    torch: dict[str, str]
    """The modules of torch's classes, which ``convert`` would swap."""
    left: dict[str, str]
    """The modules that look like dropout but are not swapped, with the reason."""
    paired: dict[str, str]
    """The dropouts that run as one function with the linear layer after them."""
    unpaired: dict[str, str]
    """The other dropouts of LoRA layers, with the reason."""
    layers: dict[str, str]
    """The layers that call ``dropout_add`` or ``relu_dropout``, with the names of their fused dropouts."""
    unfused: dict[str, str]
    """The layers of torch, transformers and timm, and the dropouts in them, that do not call these functions, with the
    reason.
    """

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} fused, {len(self.torch)} to swap, {len(self.left)} left alone"]
        parts = {"fused": self.fused, "to swap": self.torch, "left": self.left}
        parts |= {"paired": self.paired, "unpaired": self.unpaired, "layer": self.layers, "unfused": self.unfused}
        rows = [(what, name or "(model)", text) for what, names in parts.items() for name, text in names.items()]
        first, second = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
        lines += [f"{what:{first}}  {name:{second}}  {text}" for what, name, text in rows]
        return "\n".join(
            [*lines, "Functional calls such as F.dropout are not listed: fd.audit(model, inputs) finds them."]
        )


def _is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's own; that one is left there by accelerate's hooks."""
    forward = vars(module).get("forward")
    if forward is None or isinstance(module, torch.jit.ScriptModule):
        return False
    return forward != MethodType(type(module).forward, module)


def _why_left(name: str, module: nn.Module, table: dict[type, type]) -> str | None:
    """Why a module that looks like dropout is not swapped; None if it does not look like dropout."""
    kind, known = type(module).__name__, {*table, *table.values(), PairedDropout}
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted" if "dropout" in str(getattr(module, "original_name", "")).lower() else None
    if type(module).__module__.startswith("torch.ao.nn.quantized"):
        return None  # it returns its input
    if type(module) in table and "qconfig" in vars(module):
        return f"{kind} that is prepared for quantization"
    if type(module) in known:
        return f"{kind} whose forward was replaced on the instance" if _is_replaced(module) else None
    if isinstance(module, tuple(table)):
        base = next(base for base in type(module).__mro__ if base in table)
        how = "; fd.patch() reaches it" if _calls_torch(module, table) else " with a forward of its own"
        return f"{type(module).__module__}.{kind}, a subclass of {base.__name__}{how}"
    if isinstance(module, nn.MultiheadAttention) and module.dropout:
        return f"{kind}: calls torch's functions, which fd.patch() reaches on a CPU"
    if isinstance(module, nn.RNNBase) and module.dropout and module.num_layers > 1:
        return f"{kind}: drops inside torch's own kernel, out of reach"
    if isinstance(module, nn.Identity):
        return f"{kind}: drops nothing" if "drop" in name.lower() else None
    looks_like_dropout = any(word in kind.lower() for word in ("dropout", "droppath", "dropblock", "stochasticdepth"))
    is_ours = type(module).__module__.startswith("fused_dropout.")
    holds_dropout = any(type(child) in known for child in module.children())
    if looks_like_dropout and not is_ours and not holds_dropout:
        return f"{type(module).__module__}.{kind}, not torch's"
    return None


def _calls_torch(module: nn.Module, table: dict[type, type]) -> bool:
    """Whether the module calls torch.nn.functional: multi-head attention, and subclasses with torch's forward."""
    kind = type(module)
    return isinstance(module, nn.MultiheadAttention) or any(
        kind.forward is known.forward for known in table if issubclass(known, nn.modules.dropout._DropoutNd)
    )


def _drops(module: nn.Module, table: dict[type, type]) -> bool:
    """Whether a module that is not swapped drops by torch's functions. Its drop rate decides."""
    if isinstance(F.dropout, Replacement) and _calls_torch(module, table):
        return False  # fd.patch() is on
    rate = next((rate for name in _RATES if isinstance(rate := getattr(module, name, None), int | float)), 0)
    return rate > 0


def _swappable(model: nn.Module, table: dict[type, type]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in table and not _is_replaced(module) and "qconfig" not in vars(module):
            yield name, module


def _swap(model: nn.Module, table: dict[type, type]) -> int:
    """Returns how many modules were swapped."""
    found = {id(module): module for _, module in _swappable(model, table)}
    for module in found.values():
        vars(module).pop("forward", None)  # bound to the former class
        module.__class__ = table[type(module)]
    return len(found)


def _log(model: nn.Module, swapped: int, fused: int) -> None:
    """Logs one line about a conversion, as a warning if it leaves out a module that drops for the first time."""
    import logging

    table, left = _to_fused(), list[tuple[str, nn.Module]]()
    for name, module in model.named_modules():
        if _why_left(name, module, table) is not None and _drops(module, table):
            left.append((name or "(model)", module))
    text = f"fd.convert: {swapped} dropout modules swapped" + (f", {fused} fused before" if fused else "")
    if left:
        kinds: dict[str, list[str]] = {}
        for name, module in left:
            kinds.setdefault(type(module).__name__, []).append(name)
        some = [f"{kind} ({names[0]}{', ...' if len(names) > 1 else ''})" for kind, names in list(kinds.items())[:3]]
        text += f"; {len(left)} that drop were left alone: {', '.join(some)}{', ...' if len(kinds) > 3 else ''}"
        text += "; print(fd.convert_report(model)) says why"
    is_new = any(module not in _warned for _, module in left)
    _warned.update(module for _, module in left)
    logging.getLogger("fused_dropout").log(logging.WARNING if is_new else logging.INFO, text)


def convert_report(model: nn.Module) -> ConvertReport:
    """Lists what ``convert`` has swapped in a model, what it would swap, and what it leaves out, with the reasons.

    In PyTorch: ``[name for name, m in model.named_modules() if isinstance(m, nn.Dropout)]`` is a part of this list. The
    report does not include functional calls; :func:`audit` finds them.

    Args:
        model: any module. It is not changed.

    Returns:
        A named tuple of dictionaries. ``print`` it for a table.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.LSTM(4, 4, 2, dropout=0.2))
        >>> print(fd.convert_report(fd.convert(model)))
        1 fused, 0 to swap, 1 left alone
        fused  1  Dropout(p=0.1, inplace=False)
        left   2  LSTM: drops inside torch's own kernel, out of reach
        Functional calls such as F.dropout are not listed: fd.audit(model, inputs) finds them.
    """
    check_module(model)
    every = list(model.named_modules(remove_duplicate=False))
    table = _to_fused()
    reasons = {name: _why_left(name, module, table) for name, module in every}
    return ConvertReport(
        fused={name: repr(module) for name, module in _swappable(model, _to_originals())},
        torch={name: repr(module) for name, module in _swappable(model, table)},
        left={name: reason for name, reason in reasons.items() if reason is not None},
        **_report_pairs(model),
        **_report_layers(model),
    )


def _report_pairs(model: nn.Module) -> dict[str, dict[str, str]]:
    """The fields ``paired`` and ``unpaired`` of a report."""
    paired, unpaired = {}, {}
    for owner_name, owner in model.named_modules():
        for each in pairs_of(owner):
            name = f"{owner_name}.{each.name}".lstrip(".")
            if each.is_paired:
                paired[name] = f"before {each.linear}"
            elif is_lora_layer(owner):
                unpaired[name] = each.why_not or "fd.convert(model, lora=True) pairs it with lora_A"
    return {"paired": paired, "unpaired": unpaired}


def _report_layers(model: nn.Module) -> dict[str, dict[str, str]]:
    """The fields ``layers`` and ``unfused`` of a report."""
    from . import fusing

    layers, unfused, served = {}, {}, set()
    for name, module in model.named_modules(remove_duplicate=False):
        places = fusing.places_of(module, _to_fused())
        prefix = f"{name}." if name else ""
        if places.fused and _is_replaced(module):
            unfused[name] = f"{type(module).__name__} whose forward was replaced on the instance"
            continue
        if places.fused and isinstance(module, fusing.FusedLayer):
            layers[name] = str(places)
            served |= {(prefix + dropout).rpartition(".")[0] for names in places.fused.values() for dropout in names}
        elif places.fused:
            unfused[name] = f"fd.convert(model, fuse=True) fuses {places}"
        unfused |= {(prefix + dropout).rstrip("."): reason for dropout, reason in places.left.items()}
    # The dropout at the end of a layer can be fused with a sum in the enclosing layer.
    unfused = {name: reason for name, reason in unfused.items() if reason != fusing.NO_FORM or name not in served}
    return {"layers": layers, "unfused": unfused}


def convert(
    model: _Model, dry_run: bool = False, *, lora: bool = False, pair_linears: bool = False, fuse: bool = False
) -> _Model:
    """Swaps torch's dropout modules, and timm's ``DropPath``, for the fused modules of the same names, in place.

    In PyTorch: ``module.__class__ = fd.Dropout`` for each ``nn.Dropout`` of the model.

    Only the class of a module changes. The instances, also shared ones, keep their hooks, names, ``p`` and training
    flags, and the state dict does not change. ``convert`` leaves out subclasses of torch's modules, scripted modules,
    and instances whose ``forward`` was replaced (as by accelerate's hooks). :func:`convert_report` lists them. A second
    call changes only what was added since. Functional calls are not modules, but :func:`patch` replaces them.

    Call ``convert`` before ``torch.compile``, or call ``torch.compiler.reset()`` after it. Before torch 2.13 a compiled
    model may not notice the change. The logger ``fused_dropout`` gets one line. Its level is WARNING if a module that
    drops was left out, once for each module, and INFO otherwise.

    If torch's eager or FX quantization prepares a module, that module becomes torch's again, as by :func:`revert`, and
    ``convert`` leaves it out from then on. So torch quantizes a converted model as it quantizes the original. Call
    ``revert`` first in two cases: if linear layers are paired and ``quantize_dynamic`` has to find them, and if FX has
    to find a ``DropPath``.

    Args:
        model: any module, also a single ``nn.Dropout``.
        dry_run: if ``True``, changes nothing and prints ``convert_report(model)``.
        lora: if ``True``, the dropout of PEFT's LoRA layers and the ``lora_A`` after it run as one
            :func:`dropout_linear`, which saves the layer's input instead of its dropped copy. Masks, results and
            gradients stay the same. Variants such as DoRA are left out; ``convert_report(model).unpaired`` lists them.
        pair_linears: if ``True``, the same for an ``nn.Linear`` directly after a dropout in an ``nn.Sequential``.
        fuse: if ``True``, layers of torch, transformers and timm call :func:`dropout_add` where they add to the output
            of a dropout, and :func:`relu_dropout` where they drop the output of a ReLU. Masks, results and gradients
            stay the same (docs/fuse.md). ``convert_report(model).unfused`` lists the layers that are left out.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        >>> fd.convert(model) is model
        True
        >>> type(model[1]) is fd.Dropout
        True
    """
    check_module(model)
    if dry_run:
        print(convert_report(model))
        return model
    originals = _to_originals()
    before = sum(type(module) in originals for module in model.modules())
    swapped = _swap(model, _to_fused())
    if fuse:
        from . import fusing

        for layer in reversed(list(model.modules())):  # inner layers first
            if not _is_replaced(layer):
                fusing.fuse(layer)
    for owner in model.modules():
        if lora if is_lora_layer(owner) else pair_linears:
            pair(owner)
    _log(model, swapped, before)
    return model


def revert(model: _Model) -> _Model:
    """Gives each fused dropout module torch's class of the same name again, in place.

    In PyTorch: ``module.__class__ = nn.Dropout`` for each ``fd.Dropout`` of the model.

    ``DropPath`` becomes timm's, if timm is imported. Modules that were created as ``fd.Dropout`` become torch's too.
    The attributes ``generator``, ``key`` and ``noise_shape`` stay on the instance, and have no effect until it is
    converted again. Subclasses of the fused modules, and instances whose ``forward`` was replaced, do not change.

    Args:
        model: any module.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> type(fd.revert(fd.Dropout(0.1))) is nn.Dropout
        True
    """
    from . import fusing

    check_module(model)
    for owner in model.modules():
        unpair(owner)
        if not _is_replaced(owner):
            fusing.unfuse(owner)
    _swap(model, _to_originals())
    return model
