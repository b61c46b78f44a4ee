"""Pairs a dropout with the linear layer directly after it, so that they run as one ``dropout_linear``, for ``convert``.

Both modules belong to an owner: a LoRA layer of PEFT, or an ``nn.Sequential``. During the owner's forward the dropout
returns its input unchanged, and the linear layer drops it. At other times the dropout drops as usual. If the linear
layer does not receive the unchanged input, the end of the owner's forward raises an error.
"""

import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..linear import dropout_linear
from ..modules import Dropout, is_leaf, recorded
from ..torch_internals import has_hooks

_HANDLES = "_fused_dropout_pairing"
_CAST = "_cast_input_dtype"  # the method of PEFT's layers


class _Call:
    """A call of an owner's forward in one thread, and the enclosing call.

    The state is not stored on the modules, because threads and nested calls share them.

    pairs: each dropout, its linear layer, and the inputs that the dropout passed on and the linear layer has not
        received yet. A list, searched by ``is``: Dynamo makes guards of the keys of a dict, which would compile each
        layer again.
    casts: whether the owner leaves the cast of its input to ``dropout_linear``, which saves the input without the cast.
    """

    def __init__(self, owner: nn.Module, outer: "_Call | None") -> None:
        self.owner, self.outer = owner, outer
        self.pairs: list[tuple[PairedDropout, PairedLinear, list[Tensor]]] = []
        self.casts = False

    def has_handed_on(self) -> bool:
        return any(handed_on for _, _, handed_on in self.pairs)


class _Thread(threading.local):
    """The innermost call of a thread."""

    def __init__(self) -> None:
        self.call: _Call | None = None


_thread = _Thread()


class PairedDropout(Dropout):
    """``fd.Dropout`` that passes its input unchanged to a ``PairedLinear`` during their owner's forward."""

    def forward(self, input: Tensor) -> Tensor:
        call = _thread.call
        if call is not None and self.training and isinstance(input, Tensor):
            for dropout, _, handed_on in call.pairs:
                if dropout is self:
                    handed_on.append(input)
                    return input
        return super().forward(input)


class PairedLinear(nn.Linear):
    """``nn.Linear`` that drops the input that a ``PairedDropout`` passed on."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":  # torch starts to quantize the module: see modules.Keyed
            self.__class__ = nn.Linear  # type: ignore[assignment]
        nn.Module.__setattr__(self, name, value)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        call = _thread.call
        if call is None:
            return super().forward(input)
        for dropout, linear, handed_on in call.pairs:
            if linear is self and handed_on:
                if handed_on.pop() is not input:
                    raise RuntimeError("fused_dropout: a paired linear layer got another input than its dropout")
                source = {"generator": dropout.generator, "key": dropout.key}
                return dropout_linear(input, self.weight, self.bias, dropout.p, **source)  # type: ignore[arg-type]
        return super().forward(input.to(self.weight.dtype) if call.casts else input)


class Pair(NamedTuple):
    """A dropout and the linear layer after it. name: the dropout's name in the owner. why_not: why they cannot be
    paired, or empty.
    """

    name: str
    dropout: Any
    linear: Any
    why_not: str

    @property
    def is_paired(self) -> bool:
        """Whether they are paired now. A later change, such as a variant of the adapter, makes it False again."""
        return not self.why_not and (type(self.dropout), type(self.linear)) == (PairedDropout, PairedLinear)


def is_lora_layer(module: nn.Module) -> bool:
    layer = getattr(sys.modules.get("peft.tuners.lora.layer"), "LoraLayer", None)
    return layer is not None and isinstance(module, layer)


def pairs_of(owner: Any) -> Iterator[Pair]:
    """The dropouts of a LoRA layer or an ``nn.Sequential``, each with the linear layer directly after it."""
    if is_lora_layer(owner):
        for adapter, dropout in owner.lora_dropout.items():
            if isinstance(dropout, nn.Identity):
                continue
            linear = owner.lora_A[adapter] if adapter in owner.lora_A else None  # noqa: SIM401 (it has no get)
            why_not = _why_not(dropout, linear)
            variants = getattr(owner, "lora_variant", None)
            if variants is None:
                why_not = "this version of PEFT does not tell variants such as DoRA from plain adapters"
            elif adapter in variants:
                why_not = f"{_name_of(variants[adapter])} uses the dropped input in another way"
            elif not type(owner).forward.__module__.startswith("peft.") or "forward" in vars(owner):
                why_not = "the layer's forward was replaced"
            yield Pair(f"lora_dropout.{adapter}", dropout, linear, why_not)
    elif isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward:
        names = [name for name, _ in owner.named_modules(remove_duplicate=False) if name and "." not in name]
        modules = list(owner)
        for name, dropout, linear in zip(names, modules, modules[1:], strict=False):
            if isinstance(dropout, nn.Dropout) and isinstance(linear, nn.Linear):
                shared = sum(module is dropout or module is linear for module in modules) > 2
                why_not = "a module stands there more than once" if shared else _why_not(dropout, linear)
                yield Pair(name, dropout, linear, why_not)


def _name_of(variant: Any) -> str:
    return (variant if isinstance(variant, type) else type(variant)).__name__


def _why_not(dropout: Any, linear: Any) -> str:
    if type(dropout) not in (Dropout, PairedDropout) or "forward" in vars(dropout):
        return f"{type(dropout).__name__} is not fd.Dropout with its own forward"
    if dropout.inplace or dropout.noise_shape is not None:
        return "the dropout works in place or has a noise_shape"
    if type(linear) not in (nn.Linear, PairedLinear) or "forward" in vars(linear):
        return f"{type(linear).__name__} is not nn.Linear with its own forward"
    if has_hooks(dropout) or has_hooks(linear):
        return "hooks look at what is between the two"
    return ""


def pair(owner: nn.Module) -> None:
    """Pairs the modules of an owner where possible: changes their classes, and adds two hooks to the owner."""
    pairs = [each for each in pairs_of(owner) if not each.why_not]
    for each in pairs:
        each.dropout.__class__, each.linear.__class__ = PairedDropout, PairedLinear
    if pairs and _HANDLES not in vars(owner):
        begun = owner.register_forward_pre_hook(_before_forward)
        vars(owner)[_HANDLES] = (begun, owner.register_forward_hook(_after_forward, always_call=True))
        if hasattr(type(owner), _CAST):
            vars(owner)[_CAST] = partial(_cast, owner)


def unpair(owner: nn.Module) -> None:
    """Undoes ``pair``."""
    for handle in vars(owner).pop(_HANDLES, ()):
        handle.remove()
    vars(owner).pop(_CAST, None)
    for each in pairs_of(owner):
        if type(each.dropout) is PairedDropout:
            each.dropout.__class__ = Dropout  # type: ignore[assignment]
        if type(each.linear) is PairedLinear:
            each.linear.__class__ = nn.Linear  # type: ignore[assignment]


def _cast(owner: Any, x: Any, dtype: Any) -> Any:
    """Replaces PEFT's ``_cast_input_dtype`` on this owner, and leaves out casts that ``dropout_linear`` does."""
    call = _thread.call
    if call is not None and call.owner is owner and call.casts and isinstance(x, Tensor):
        device = x.device.type
        # Autocast casts after dropout. Dropout in x's dtype gives the same bits as dropout in float32 with that cast
        # only if x has autocast's dtype.
        if not torch.is_autocast_enabled(device):
            return x
        if dtype == torch.float32 and x.dtype == torch.get_autocast_dtype(device):
            return x
    return getattr(type(owner), _CAST)(owner, x, dtype)


def _call_around(owner: Any) -> _Call | None:
    """The call that encloses a new call of the owner.

    Skips calls that a KeyboardInterrupt left behind, because it skipped their ``_after_forward``: a call of the owner
    itself and those inside it. If the owner really calls itself, the dropouts of the outer call drop as usual from here
    on.
    """
    call = _thread.call
    while call is not None and not call.has_handed_on():
        if call.owner is owner:
            return call.outer
        call = call.outer
    return _thread.call


def _before_forward(owner: Any, _inputs: Any) -> None:
    _thread.call = call = _Call(owner, _call_around(owner))
    if not owner.training:
        return
    pairs = [each for each in pairs_of(owner) if each.is_paired]
    call.pairs = [(each.dropout, each.linear, []) for each in pairs]
    if is_lora_layer(owner):
        # Several active adapters share the result of PEFT's cast, and their gradients are added in its dtype.
        active = [f"lora_dropout.{adapter}" for adapter in owner.active_adapters if adapter in owner.lora_A]
        call.casts = len(active) == 1 and any(each.name == active[0] for each in pairs)


def _after_forward(owner: Any, _inputs: Any, output: Any) -> None:
    call = _thread.call
    while call is not None and call.owner is not owner:
        call = call.outer  # skips calls that a KeyboardInterrupt left behind
    if call is None:
        return
    _thread.call = call.outer
    if output is not None and call.has_handed_on():
        raise RuntimeError(
            f"fused_dropout: {type(owner).__name__} did not pass the output of a paired dropout to its linear layer, "
            "so nothing was dropped. Convert the model without pairing."
        )
