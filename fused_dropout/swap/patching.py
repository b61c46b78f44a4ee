"""``patch``, ``unpatch`` and ``patched``: replace torch's dropout functions by the fused ones.

``convert.py`` is the other way in: it changes the modules of one model, and this changes functions for all models.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_unary

from .. import attention, family, functional
from ..arguments import why_refused
from ..torch_internals import script_as

# torch's dropout functions, each with the module that calls it.
FAMILY = {
    "dropout": "Dropout",
    "dropout1d": "Dropout1d",
    "dropout2d": "Dropout2d",
    "dropout3d": "Dropout3d",
    "alpha_dropout": "AlphaDropout",
    "feature_alpha_dropout": "FeatureAlphaDropout",
}

_FUSED: dict[str, Callable[..., Tensor]] = {"dropout": functional.dropout} | {
    name: getattr(family, name) for name in FAMILY if name != "dropout"
}


class Replacement(partial):
    """A fused function that stands at a name of torch, such as ``torch.nn.functional.dropout``.

    It is pickled by that name. Loading the pickle gives the function that has the name at that time, patched or not. A
    plain function could not be pickled after ``unpatch()``. The class derives from ``functools.partial``, because
    Dynamo and ``inspect`` support that.
    """

    _place: str

    def at(self, module: Any, name: str) -> "Replacement":
        self._place = f"{module.__name__}:{name}"
        self.__name__ = self.__qualname__ = name
        self.__module__, self.__doc__ = module.__name__, self.func.__doc__
        return self

    def __reduce__(self) -> Any:
        return resolve_name, (self._place,)

    def __copy__(self) -> "Replacement":
        return self

    def __deepcopy__(self, memo: Any) -> "Replacement":
        return self


def unpatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The fused function behind a ``Replacement``. Returns any other function unchanged."""
    return function.func if isinstance(function, Replacement) else function


_lock = threading.Lock()
_on = False  # between patch() and unpatch()
_depth = 0  # how many patched() blocks are open, in all threads
_saved: dict[tuple[Any, str], Any] = {}


def _alias(name: str, fused: Callable[..., Tensor] | dict[int, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """A function with the signature of ``torch.<name>(input, p, train)`` that calls a fused function.

    fused: the function, or a function for each number of dimensions.
    """
    original, inplace = getattr(torch, name), name.endswith("_")

    def alias(input: Tensor, p: float, train: bool) -> Tensor:
        # torch.dropout and F.dropout word their errors differently, so torch's function raises them.
        if not isinstance(input, Tensor) or has_torch_function_unary(input) or why_refused(p, train):
            return original(input, p, train)
        function = fused.get(input.dim()) if isinstance(fused, dict) else fused
        return original(input, p, train) if function is None else function(input, p, train, inplace)

    return alias


def _replacements() -> dict[tuple[Any, str], Replacement]:
    found: dict[tuple[Any, str], Callable[..., Tensor]] = {(F, name): fused for name, fused in _FUSED.items()}
    found[F, "scaled_dot_product_attention"] = attention.scaled_dot_product_attention
    by_rank = {3: family.dropout1d, 4: family.dropout2d, 5: family.dropout3d}
    short: dict[str, Any] = _FUSED | {"feature_dropout": by_rank}
    for name, fused in short.items():
        for alias in (name, name + "_"):
            if hasattr(torch, alias):
                found[torch, alias] = _alias(alias, fused)
    replacements = {(module, name): Replacement(fused).at(module, name) for (module, name), fused in found.items()}
    for (module, name), replacement in replacements.items():
        script_as(replacement, getattr(module, name))
        if module is F:
            script_as(replacement.func, getattr(module, name))
    return replacements


_REPLACEMENTS = _replacements()


def cache_overridable_functions() -> None:
    """torch caches its overridable functions on first use, so call this before replacing any."""
    import torch._dynamo

    torch.overrides.get_overridable_functions()


def _update() -> None:
    """Installs the fused functions or restores torch's, as ``_on`` and ``_depth`` say. The caller holds the lock."""
    wanted = _on or _depth > 0
    if wanted and not _saved:
        cache_overridable_functions()
        for (module, name), fused in _REPLACEMENTS.items():
            _saved[module, name] = getattr(module, name)
            setattr(module, name, fused)
    elif not wanted and _saved:
        for (module, name), before in _saved.items():
            # Keeps a function that someone else has assigned since.
            if getattr(module, name) is _REPLACEMENTS[module, name]:
                setattr(module, name, before)
        _saved.clear()


def patch() -> None:
    """Replaces torch's dropout functions by the fused ones in the whole process, until ``unpatch()``.

    In PyTorch: ``torch.nn.functional.dropout = fd.dropout``, and the same for the other functions.

    Replaced are the dropout functions of ``torch.nn.functional``, their short forms in ``torch`` (``torch.dropout``,
    ``torch.dropout_`` and so on) and ``scaled_dot_product_attention``. This covers every functional call,
    ``nn.Dropout`` and the other modules, attention and ``nn.TransformerEncoderLayer``. Types, pickles, FX graphs and
    scripted modules remain torch's. Another call changes nothing. A compiled model is compiled again where it needs it,
    and keeps both versions. The first call imports ``torch._dynamo``, as the first optimizer does.

    It does not cover a function that was imported by name before (``from torch.nn.functional import dropout``), and
    dropout inside torch's own kernels (``nn.LSTM``, ``nn.GRU``, attention on a GPU). ``fd.audit`` shows these.

    Example:
        >>> fd.patch()
        >>> F.dropout.func is fd.dropout
        True
        >>> fd.unpatch()
    """
    global _on
    with _lock:
        _on = True
        _update()


def unpatch() -> None:
    """Puts torch's own functions back, however often ``patch()`` was called.

    In PyTorch: ``torch.nn.functional.dropout = original``, and the same for the other functions.

    It does nothing without an earlier ``patch()``. Inside a ``patched()`` block the functions stay replaced until the
    block ends. If someone else has assigned another function to a name since, that function stays.

    Example:
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
    """Replaces torch's dropout functions, as :func:`patch` does, inside a ``with`` block.

    In PyTorch: ``with unittest.mock.patch.object(F, "dropout", fd.dropout):`` does this for one function.

    The whole process is patched, not only this thread. Blocks may be nested, also after ``patch()``, and are counted
    over all threads. The end of the last one puts torch's functions back, also after an exception. Backward may run
    after the block.

    Example:
        >>> original = F.dropout
        >>> with fd.patched():
        ...     F.dropout.func is fd.dropout
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
