"""``patch``, ``unpatch`` and ``patched``: torch's own names for dropout lead to the fused path."""

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

from . import attention, family, functional
from .arguments import why_refused
from .torch_internals import script_as

# The family: the function and the module of each kind, as torch names them.
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
    """A fused function under a name of torch's, such as ``torch.nn.functional.dropout``.

    It is pickled by that name, so that loading it gives the function that has the name then. A plain function would be
    pickled by the name of this package, and could not be pickled at all after ``unpatch()``. It is a
    ``functools.partial``, since Dynamo and ``inspect`` handle those.
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
    """The function that a replacement calls; any other function itself."""
    return function.func if isinstance(function, Replacement) else function


_lock = threading.Lock()
_on = False  # between patch() and unpatch()
_depth = 0  # of patched(), over all threads
_saved: dict[tuple[Any, str], Any] = {}


def _alias(name: str, fused: Callable[..., Tensor] | dict[int, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """In the form of ``torch.<name>(input, p, train)``: a fused function, or those for some numbers of dimensions."""
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
        >>> F.dropout.func is fd.dropout
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
