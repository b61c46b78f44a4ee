"""``convert`` and ``revert``: a model's dropout modules, swapped in place for the fused ones and back.

``pairing.py`` and ``fusing.py`` have what is made of a dropout and its neighbours. ``fusing.py`` is imported at its
first use, since it takes a sixth of the time of the whole package.
"""

import sys
from collections.abc import Iterator
from types import MethodType
from typing import NamedTuple, TypeVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn

from . import modules
from .arguments import check_module
from .pairing import PairedDropout, is_lora_layer, pair, pairs_of, unpair
from .patching import FAMILY, Replacement

_Model = TypeVar("_Model", bound=nn.Module)
_RATES = ("p", "drop_prob", "dropout", "drop_rate", "rate")  # attributes with a drop rate, in torch and other libraries
_warned: WeakSet[nn.Module] = WeakSet()  # modules that convert has warned of


def _to_fused() -> dict[type, type]:
    """The classes that are swapped: torch's, and timm's ``DropPath``, which is there if a model has one."""
    found = {getattr(nn, name): getattr(modules, name) for name in FAMILY.values()}
    drop_path = getattr(sys.modules.get("timm.layers.drop"), "DropPath", None)
    return found if drop_path is None else {**found, drop_path: modules.DropPath}


def _to_originals() -> dict[type, type]:
    return {fused: original for original, fused in _to_fused().items()} | {PairedDropout: nn.Dropout}


class ConvertReport(NamedTuple):
    """What ``convert`` finds in a model, by module name; a shared module is there under each of its names.

    fused: modules on the fused path, and their class. torch: modules of torch's classes, which ``convert`` swaps. left:
    modules that look like dropout and are left alone, and why. paired: dropouts that run as one with the linear layer
    after them. unpaired: other dropouts of LoRA layers, and why. layers: layers that call ``dropout_add`` and
    ``relu_dropout``, and for which of their dropouts. unfused: other layers of torch, transformers and timm, and other
    dropouts of such layers, and why. ``str()`` of it is a table.
    """

    fused: dict[str, str]
    torch: dict[str, str]
    left: dict[str, str]
    paired: dict[str, str]
    unpaired: dict[str, str]
    layers: dict[str, str]
    unfused: dict[str, str]

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
    """Why a module that may be taken for dropout is not swapped; None if nobody would take it for that."""
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
    """Whether its dropout calls torch.nn.functional: multi-head attention, and subclasses with torch's forward."""
    kind = type(module)
    return isinstance(module, nn.MultiheadAttention) or any(
        kind.forward is known.forward for known in table if issubclass(known, nn.modules.dropout._DropoutNd)
    )


def _drops(module: nn.Module, table: dict[type, type]) -> bool:
    """Whether a module that is left alone drops, judged by its drop rate, without the fused path."""
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
        vars(module).pop("forward", None)  # the former class's
        module.__class__ = table[type(module)]
    return len(found)


def _log(model: nn.Module, swapped: int, fused: int) -> None:
    """Logs one line about a conversion: a warning if a module that drops was left alone for the first time."""
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
    """What ``convert`` has swapped in a model, what it would swap now, and what it leaves alone and why.

    Args:
        model: any module; it is not changed.

    Returns:
        A ``ConvertReport``: the names of modules in ``fused``, ``torch`` and ``left``, of pairs in ``paired`` and
        ``unpaired``, and of layers in ``layers`` and ``unfused``. Functional calls are not modules, so that it cannot
        see them: ``fd.audit`` does.

    Example::

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
    # The dropout at the end of a layer may be fused with a sum in the layer around it.
    unfused = {name: reason for name, reason in unfused.items() if reason != fusing.NO_FORM or name not in served}
    return {"layers": layers, "unfused": unfused}


def convert(
    model: _Model, dry_run: bool = False, *, lora: bool = False, pair_linears: bool = False, fuse: bool = False
) -> _Model:
    """Swaps each of torch's dropout modules, and timm's ``DropPath``, for the fused one of the same name, in place.

    Only the class of a module changes: instances stay the same objects, shared ones too, with their hooks, training
    flags, p and names, and the state dict is as before. Left alone are subclasses of torch's modules, scripted modules
    and instances whose ``forward`` was replaced (as accelerate's hooks do); ``convert_report`` names them. Doing it
    again changes nothing but what was added since. Functional calls are not modules: ``fd.patch()`` reaches them.
    Convert before ``torch.compile``, or call ``torch.compiler.reset()`` after: before torch 2.13 a compiled model may
    not notice. The logger ``fused_dropout`` gets one line: a warning if modules that drop were left alone, once for
    each module, else of level INFO.

    Where torch's eager or FX quantization prepares a module, that one becomes torch's again, as ``revert`` does it, and
    ``convert`` leaves it alone: torch quantizes a converted model as it quantizes the original. Call ``revert`` first
    where linear layers are paired and ``quantize_dynamic`` is to find them, and where FX is to find a ``DropPath``.

    Args:
        model: any module, also a single ``nn.Dropout``.
        dry_run: change nothing and print ``convert_report(model)``. Default: ``False``
        lora: let the dropout of PEFT's LoRA layers and the ``lora_A`` after it run as one ``dropout_linear``, which
            saves the layer's input in place of the dropped copy. Masks, results and gradients stay the same. Variants
            such as DoRA are left alone, and ``convert_report(model).unpaired`` names them. Default: ``False``
        pair_linears: the same for an ``nn.Linear`` right after a dropout in an ``nn.Sequential``. Default: ``False``
        fuse: let layers of torch, transformers and timm call ``dropout_add`` where they add to a dropout's output, and
            ``relu_dropout`` where they drop a ReLU's. Masks, results and gradients stay the same; see docs/fuse.md.
            ``convert_report(model).unfused`` names the layers that are left alone. Default: ``False``

    Returns:
        ``model`` itself.

    Example::

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

        for layer in reversed(list(model.modules())):  # a layer is seen after those inside it
            if not _is_replaced(layer):
                fusing.fuse(layer)
    for owner in model.modules():
        if lora if is_lora_layer(owner) else pair_linears:
            pair(owner)
    _log(model, swapped, before)
    return model


def revert(model: _Model) -> _Model:
    """Undoes ``convert``: gives each fused dropout module torch's class of the same name (timm's for ``DropPath``, if
    timm is there), in place.

    Modules that were made as ``fd.Dropout`` and the like become torch's, too. What torch's do not know (generator, key,
    noise_shape) stays on the instance, without effect until it is converted again. Subclasses of the fused modules and
    instances whose ``forward`` was replaced are left alone.

    Args:
        model: any module.

    Returns:
        ``model`` itself.

    Example::

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
