"""``warn``: a warning that names the user's line."""

import sys
import warnings

from .torch_internals import constant_while_tracing

# Modules whose frames stand between the user's line and the cause. Code that torch generates has a name of torch's, or
# none.
_BETWEEN = {"fused_dropout", "torch", "importlib", "_frozen_importlib", "_frozen_importlib_external", None}


@constant_while_tracing
def warn(message: str) -> None:
    """Warns at the innermost line that is neither this package's nor torch's nor the import system's.

    ``warnings.warn`` takes names of files to skip only from Python 3.12 on. In a thread of autograd's, all lines may be
    ours: then the outermost one is named.
    """
    frame = sys._getframe(1)
    while _top_package(frame.f_globals) in _BETWEEN and frame.f_back:
        frame = frame.f_back
    own = frame.f_globals
    warnings.warn_explicit(
        f"fused_dropout: {message}",
        RuntimeWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        own.get("__name__"),
        own.setdefault("__warningregistry__", {}),
    )


def _top_package(names: dict[str, object]) -> str | None:
    name = names.get("__name__")
    return name.partition(".")[0] if isinstance(name, str) else None
