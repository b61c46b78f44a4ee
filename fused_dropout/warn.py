"""``warn``: gives a warning that names the user's line. All warnings of the package go through it."""

import sys
import warnings
from types import FrameType

from .torch_internals import constant_while_tracing

# Packages whose frames lie between the user's line and the cause. Generated code of torch has a name in torch, or none.
_BETWEEN = {"fused_dropout", "torch", "importlib", "_frozen_importlib", "_frozen_importlib_external", "runpy", None}


@constant_while_tracing
def warn(message: str) -> None:
    """Warns at the innermost line outside of this package, torch and the import system.

    If there is none, as in a thread of autograd, the warning names line 1 of ``sys``, as ``warnings.warn`` does.
    ``warnings.warn`` itself can skip files only from Python 3.12 on.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _top_package(frame.f_globals) in _BETWEEN:
        frame = frame.f_back
    file, line, own = (
        ("sys", 1, vars(sys)) if frame is None else (frame.f_code.co_filename, frame.f_lineno, frame.f_globals)
    )
    registry = own.setdefault("__warningregistry__", {})
    warnings.warn_explicit(f"fused_dropout: {message}", RuntimeWarning, file, line, own.get("__name__"), registry)


def _top_package(names: dict[str, object]) -> str | None:
    name = names.get("__name__")
    return name.partition(".")[0] if isinstance(name, str) else None
