"""Loads the compiled libraries, and keeps the reason for each missing one.

Only this module knows whether a library is loaded. ``build_info.py`` tells users.
"""

import ctypes
import json
import os
import re
import struct
import sys
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import __version__

_SETTINGS = {
    "FUSED_DROPOUT_BACKEND": ("auto", "native", "reference"),
    "FUSED_DROPOUT_CPU_ISA": ("auto", "avx512", "avx2", "portable"),
    "FUSED_DROPOUT_COMPILE": ("auto", "fuse", "kernel"),
}
_FOLDER = Path(__file__).parent
_LIBRARIES = {"_C": "CPU kernels", "_cuda": "CUDA kernels", "_eager": "eager binding"}
OLDEST_TORCH = (2, 11)  # the kernels use only the stable ABI of this version
_OLDEST_FOR_THE_REFERENCE = (2, 8)  # as in pyproject.toml


def _setting(name: str, **older: str) -> str:
    """The value of an environment variable; "auto" if it is unset or empty. older: the new names of former values."""
    value = os.environ.get(name) or "auto"
    value = older.get(value, value)
    if value not in _SETTINGS[name]:
        raise ValueError(f"{name} has to be one of {', '.join(_SETTINGS[name])}, but is {value!r}")
    return value


def built() -> dict[str, Any]:
    """The record of setup.py: what was compiled, for what, and what was left out. Empty without a usable record."""
    return _record()[0]


def why_no_record() -> str:
    """Why the record cannot be used; empty if it can, or if there is no record."""
    return _record()[1]


def _record() -> tuple[dict[str, Any], str]:
    try:
        found = json.loads((_FOLDER / "_build.json").read_text())
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"_build.json cannot be read ({type(error).__name__}), and is ignored"
    if not _is_record(found):
        return {}, "_build.json is not what setup.py writes, and is ignored"
    return found, ""


def _is_record(found: Any) -> bool:
    """Whether the record has the fields and types that setup.py writes, and each text is one printable line."""
    if not isinstance(found, dict):
        return False
    names, left_out = found.get("built"), found.get("left_out")
    if not isinstance(names, list) or not isinstance(left_out, dict) or ("cuda" in found) != ("architectures" in found):
        return False
    texts = [*names, *left_out.values(), *(found[n] for n in ("torch", "cuda", "architectures") if n in found)]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        return False
    return re.fullmatch(r"\d{1,4}(\.\d{1,4})*", found.get("cuda", "0")) is not None


def release(version: str) -> tuple[int, ...]:
    """Returns (2, 11) for "2.11.0a0+abc". A pre-release counts as its release."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _fits(built_for: str, here: str) -> bool:
    """Whether an eager binding fits this torch. Patch releases keep the C++ ABI; a pre-release may have another."""
    final = r"\d+\.\d+\.\d+(\+.*)?"
    if re.fullmatch(final, built_for) and re.fullmatch(final, here):
        return release(built_for) == release(here)
    return built_for == here


def _is_whole(library: bytes) -> bool:
    """Whether the file has all segments of its program headers. A truncated library would crash the process."""
    if library[:4] != b"\x7fELF":
        return True
    try:
        at, size, count = *struct.unpack_from("=Q", library, 32), *struct.unpack_from("=HH", library, 54)
        segments = [struct.unpack_from("=8xQ16xQ", library, at + i * size) for i in range(count)]
    except struct.error:
        return False
    return all(offset + length <= len(library) for offset, length in segments)


def _why_refused(name: str, library: bytes) -> str:
    """Why this file must not be loaded; empty if it may. Reads the bytes, because loading registers the kernels."""
    if not library:
        return "is empty"
    if not _is_whole(library):
        return "is truncated"
    mark = f"fused_dropout.{name} ".encode()
    said = re.compile(rb"([^;\0]+);(?: for torch ([^;\0]+);)?").match(library, library.find(mark) + len(mark))
    version, built_for = (part and part.decode() for part in said.groups()) if said else (None, None)
    if version != __version__:
        return f"is of version {version or 'unknown'}, and this is {__version__}"
    if built_for and not _fits(built_for, torch.__version__):
        return f"was built for torch {built_for}, and this is {torch.__version__}"
    major = release(built().get("cuda") or "0")[0]
    if name == "_cuda" and major > release(torch.version.cuda or "0")[0] and 0 < _driver() < major:
        return f"needs a driver of CUDA {major}, and this torch is of CUDA {torch.version.cuda}"
    return ""


def _driver() -> int:
    """The major version of CUDA that the driver supports; 0 without a driver."""
    version = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


def _why_no_file(name: str) -> str:
    record = built()
    if why := record.get("left_out", {}).get(name):
        return f"not built: {why}"
    if name not in record.get("built", []):
        return "not built"
    if others := sorted(file.name for file in _FOLDER.glob(f"{name}.*.so")):
        return f"not built for this Python: {others[0]} is for another one"
    return "not found: the build made a file, and it is gone"


def _load(name: str) -> tuple[ModuleType | None, str, bool]:
    """Loads an extension module from the package's folder.

    Returns the module or None, the reason for None, and whether None was expected, so that no warning is needed.
    """
    full_name = f"fused_dropout.{name}"
    files = [file for suffix in EXTENSION_SUFFIXES if (file := _FOLDER / f"{name}{suffix}").exists()]
    if sys.modules.get(full_name, name) is None:  # the tests' option --hide sets it to None
        return None, "not built", True
    if not files:
        return None, _why_no_file(name), True
    try:
        if not (why := _why_refused(name, files[0].read_bytes())):
            loader = ExtensionFileLoader(full_name, str(files[0]))
            module = module_from_spec(ModuleSpec(full_name, loader, origin=loader.path))
            loader.exec_module(module)
            sys.modules[full_name] = module
            return module, "", True
    except (ImportError, OSError) as error:
        why = f"does not load ({error}); it was built for torch {built().get('torch')}, CUDA {built().get('cuda')}"
        why += f", and this is torch {torch.__version__}, CUDA {torch.version.cuda}"
    return None, f"refused: {files[0].name} {why}", False


def _load_all() -> tuple[dict[str, ModuleType | None], dict[str, str], list[str]]:
    """Returns each library's module or None, the reason for each missing one, and those that need a warning."""
    modules: dict[str, ModuleType | None] = dict.fromkeys(_LIBRARIES)
    if backend == "reference":
        return modules, dict.fromkeys(_LIBRARIES, "not used: FUSED_DROPOUT_BACKEND=reference"), []
    if release(torch.__version__) < OLDEST_TORCH:
        why = f"not used: they need torch {'.'.join(map(str, OLDEST_TORCH))}, and this is {torch.__version__}"
        return modules, {"_C": why}, ["_C"]
    reasons, warned = {}, []
    for name in _LIBRARIES:
        if name == "_cuda" and not torch.version.cuda:
            continue
        if "_C" in reasons:
            reasons[name] = "not used without the CPU kernels"
            continue
        modules[name], why, expected = _load(name)
        if why:
            reasons[name] = why
        if why and (name == "_C" or not expected):
            warned.append(name)
    return modules, reasons, warned


def note(name: str) -> str:
    instead = "; the pure-PyTorch reference serves instead" if name == "_C" else ""
    return f"{_LIBRARIES[name]} {missing[name]}{instead}"


if release(torch.__version__) < _OLDEST_FOR_THE_REFERENCE:
    raise ImportError(f"fused_dropout needs torch 2.8 or later, and this is {torch.__version__}")
backend = _setting("FUSED_DROPOUT_BACKEND", python="reference")
_setting("FUSED_DROPOUT_CPU_ISA")  # only checks it: the library reads it when it is loaded
# What torch.compile gets. "fuse": the mask's arithmetic, to fuse with its neighbours. "kernel": a call of the kernel.
compile_as = _setting("FUSED_DROPOUT_COMPILE")
# missing: the reason for each missing library. warned_of: the missing libraries that need a warning.
_modules, missing, warned_of = _load_all()
kernels: ModuleType | None = _modules["_C"]
cuda_kernels: ModuleType | None = _modules["_cuda"]
eager: ModuleType | None = _modules["_eager"]
if backend == "native" and kernels is None:
    raise ImportError(f"FUSED_DROPOUT_BACKEND=native, but {_LIBRARIES['_C']} {missing['_C']}")


def _has_triton() -> bool:
    with suppress(ValueError):  # sys.modules["triton"] may be a stub without __spec__
        return find_spec("triton") is not None
    return False


def compiles_reference() -> bool:
    """Whether Inductor compiles the reference for the GPU, because there are no CUDA kernels."""
    on_gpu = bool(torch.version.cuda or torch.version.hip)
    return backend != "reference" and not cuda_kernels and on_gpu and _has_triton()


def withdraw_cuda_kernels(why: str) -> None:
    """Stops using the CUDA kernels, because they have no code for a GPU of this machine."""
    global cuda_kernels
    cuda_kernels, missing["_cuda"] = None, why
