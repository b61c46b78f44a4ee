"""``patch``, ``unpatch`` and ``patched``: torch's own names for dropout lead to the fused path."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_unary

from . import attention, functional

# The family: the function and the module of each kind, here named as in torch.
FAMILY = {
    "dropout": "Dropout",
    "dropout1d": "Dropout1d",
    "dropout2d": "Dropout2d",
    "dropout3d": "Dropout3d",
    "alpha_dropout": "AlphaDropout",
    "feature_alpha_dropout": "FeatureAlphaDropout",
}

_lock = threading.Lock()
_on = False  # between patch() and unpatch()
_depth = 0  # of patched(), over all threads
_saved: dict[tuple[Any, str], Any] = {}


def _alias(name: str, fused: Callable[..., Tensor] | dict[int, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """In the form of ``torch.<name>(input, p, train)``: a fused function, or those for some numbers of dimensions."""
    original, inplace = getattr(torch, name), name.endswith("_")

    def alias(input: Tensor, p: float, train: bool) -> Tensor:
        # A p out of range raises in torch's words, which are not F.dropout's.
        if not isinstance(input, Tensor) or has_torch_function_unary(input) or not 0.0 <= p <= 1.0:
            return original(input, p, train)
        function = fused.get(input.dim()) if isinstance(fused, dict) else fused
        return original(input, p, train) if function is None else function(input, p, train, inplace)

    alias.__name__ = alias.__qualname__ = name
    with suppress(AttributeError):  # scripting is deprecated
        torch.jit._builtins._register_builtin(alias, f"aten::{name}")
    return alias


def _replacements() -> dict[tuple[Any, str], Callable[..., Tensor]]:
    found: dict[tuple[Any, str], Callable[..., Tensor]] = {}
    for name in FAMILY:
        fused, original = getattr(functional, name), getattr(F, name)
        # What torch.jit.script compiles in place of ours: keyword-only defaults are beyond it.
        fused.__prepare_scriptable__ = lambda original=original: original
        found[F, name] = fused
    fused = attention.scaled_dot_product_attention
    with suppress(AttributeError):  # scripting is deprecated
        torch.jit._builtins._register_builtin(fused, "aten::scaled_dot_product_attention")
    found[F, "scaled_dot_product_attention"] = fused
    short: dict[str, Any] = {name: getattr(functional, name) for name in FAMILY}
    short["feature_dropout"] = {3: functional.dropout1d, 4: functional.dropout2d, 5: functional.dropout3d}
    for name, fused in short.items():
        for alias in (name, name + "_"):
            if hasattr(torch, alias):
                found[torch, alias] = _alias(alias, fused)
    return found


_REPLACEMENTS = _replacements()


def meet_torchs_own() -> None:
    """To be called before torch's functions are replaced: it lists those that it knows once, by name, on first use."""
    import torch._dynamo

    torch.overrides.get_overridable_functions()


def _update() -> None:
    """Puts the fused functions in, or torch's back, as the state wants it; the lock is held."""
    wanted = _on or _depth > 0
    if wanted and not _saved:
        meet_torchs_own()
        for (module, name), fused in _REPLACEMENTS.items():
            _saved[module, name] = getattr(module, name)
            setattr(module, name, fused)
    elif not wanted and _saved:
        for (module, name), before in _saved.items():
            # Something else has been put there since: it stays.
            if getattr(module, name) is _REPLACEMENTS[module, name]:
                setattr(module, name, before)
        _saved.clear()


def patch() -> None:
    """Sends torch's dropout functions to the fused path, in the whole process, until ``unpatch()``.

    Replaced are the family in ``torch.nn.functional``, its short forms in ``torch`` (``torch.dropout``,
    ``torch.dropout_``, ...) and ``scaled_dot_product_attention``. So every ``nn.Dropout`` is reached, attention and
    ``nn.TransformerEncoderLayer``, and every functional call; types, pickles, FX graphs and scripted modules stay
    torch's. Calling it again changes nothing. Compiled models are compiled again where they need it, and both versions
    are kept. The first call imports ``torch._dynamo``, as the first optimizer does.

    Not reached: a function bound to another name before (``from torch.nn.functional import dropout``), and dropout
    inside torch's own kernels (``nn.LSTM`` and ``nn.GRU``, attention on a GPU); ``fd.audit`` shows it.

    Example::

        >>> fd.patch()
        >>> F.dropout is fd.dropout
        True
        >>> fd.unpatch()
    """
    global _on
    with _lock:
        _on = True
        _update()


def unpatch() -> None:
    """Undoes ``patch()``, however often that was called, and does nothing if it was not.

    Inside a ``patched()`` block the functions stay replaced until its end. A name to which something else was assigned
    in the meantime is left as it is.

    Example::

        >>> original = F.dropout
        >>> fd.patch()
        >>> fd.unpatch()
        >>> F.dropout is original
        True
    """
    global _on
    with _lock:
        _on = False
        _update()


@contextmanager
def patched() -> Iterator[None]:
    """``patch()`` for the length of a ``with`` block, also if it ends with an exception.

    Blocks nest, inside a ``patch()`` too, and count over all threads: the last one to end puts torch's functions back.
    The whole process is patched meanwhile, not this thread alone. A backward pass may run after the block.

    Example::

        >>> original = F.dropout
        >>> with fd.patched():
        ...     F.dropout is fd.dropout
        True
        >>> F.dropout is original
        True
    """
    global _depth
    with _lock:
        _depth += 1
        _update()
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            _update()
