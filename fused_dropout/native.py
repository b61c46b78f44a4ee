"""What was compiled, whether it loads, and which path serves each device. No other module asks for a library."""

import ctypes
import json
import os
import platform
import re
import shlex
import shutil
import struct
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from . import __version__

_SETTINGS = {
    "FUSED_DROPOUT_BACKEND": ("auto", "native", "python"),
    "FUSED_DROPOUT_CPU_ISA": ("auto", "avx512", "avx2", "portable"),
    "FUSED_DROPOUT_COMPILE": ("auto", "fuse", "kernel"),
}
_FOLDER = Path(__file__).parent
_LIBRARIES = {"_C": "CPU kernels", "_cuda": "CUDA kernels", "_eager": "eager binding"}
_OLDEST_TORCH = (2, 11)  # whose stable ABI the kernels are kept to
_OLDEST_FOR_THE_REFERENCE = (2, 8)  # as in pyproject.toml


@dataclass(frozen=True)
class BackendInfo:
    """Which path serves each device, and why not a better one.

    devices: for each device type "native", or "reference", or "compiled reference" where Inductor makes a kernel of
    that. cpu_isa: the instruction set of the CPU kernels, if they are there. eager: whether the C++ binding takes the
    calls outside of transforms. notes: a line for each thing that is missing. improve: the command that would give a
    better path, or None. built: what was compiled for what (built, torch, cuda, architectures, and left_out with the
    reasons), empty if there is no record.
    """

    version: str
    torch: str
    cuda: str | None
    python: str
    platform: str
    backend: str
    devices: dict[str, str]
    eager: bool
    cpu_isa: str | None = None
    notes: tuple[str, ...] = ()
    improve: str | None = None
    built: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        served = ", ".join(f"{device}: {path}" for device, path in self.devices.items())
        compiled = ", ".join(self.built.get("built") or ["nothing"])
        if self.built.get("torch"):
            compiled += f"; for torch {self.built['torch']}"
        if self.built.get("cuda"):
            compiled += f", CUDA {self.built['cuda']}, architectures {self.built['architectures']}"
        lines = [
            f"fused_dropout {self.version}, torch {self.torch}, CUDA {self.cuda or 'none'}, "
            f"Python {self.python}, {self.platform}, backend {self.backend}",
            f"served by  {served}; CPU kernels: {self.cpu_isa}; eager binding: {'yes' if self.eager else 'no'}",
            f"compiled   {compiled}",
            *(f"note       {note}" for note in self.notes),
            *([f"better by  {self.improve}"] if self.improve else []),
        ]
        return "\n".join(lines)


def _setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in _SETTINGS[name]:
        raise ValueError(f"{name} has to be one of {', '.join(_SETTINGS[name])}, but is {value!r}")
    return value


def _built() -> dict[str, Any]:
    try:
        return json.loads((_FOLDER / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _release(version: str) -> tuple[int, ...]:
    """(2, 11) of "2.11.0a0+abc": what comes before a release counts as it."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _fits(built_for: str, here: str) -> bool:
    """Whether an eager binding serves: patch releases keep the C++ ABI, what comes before a release need not."""
    final = r"\d+\.\d+\.\d+(\+.*)?"
    if re.fullmatch(final, built_for) and re.fullmatch(final, here):
        return _release(built_for) == _release(here)
    return built_for == here


def _is_whole(library: bytes) -> bool:
    """Whether the file has all that its program headers speak of: the loader dies of one that was cut off."""
    if library[:4] != b"\x7fELF":
        return True
    try:
        at, size, count = *struct.unpack_from("=Q", library, 32), *struct.unpack_from("=HH", library, 54)
        segments = [struct.unpack_from("=8xQ16xQ", library, at + i * size) for i in range(count)]
    except struct.error:
        return False
    return all(offset + length <= len(library) for offset, length in segments)


def _why_refused(name: str, library: bytes) -> str:
    """Why not to load this file, read before it is: loading it would register its kernels."""
    if not _is_whole(library):
        return "is truncated"
    said = re.search(rf"fused_dropout\.{name} ([^;\0]+);(?: for torch ([^;\0]+);)?".encode(), library)
    version, built_for = (part and part.decode() for part in said.groups()) if said else (None, None)
    if version != __version__:
        return f"is of version {version or 'unknown'}, and this is {__version__}"
    if built_for and not _fits(built_for, torch.__version__):
        return f"was built for torch {built_for}, and this is {torch.__version__}"
    major = _release(_built().get("cuda") or "0")[0]
    if name == "_cuda" and major > _release(torch.version.cuda or "0")[0] and 0 < _driver() < major:
        return f"needs a driver of CUDA {major}, and this torch is of CUDA {torch.version.cuda}"
    return ""


def _driver() -> int:
    """The major version of CUDA that the driver is made for; 0 without one."""
    version = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


def _load(name: str) -> tuple[ModuleType | None, str, bool]:
    """The extension module from the package's own folder; or None, why, and whether that was to be expected."""
    full_name = f"fused_dropout.{name}"
    files = [file for suffix in EXTENSION_SUFFIXES if (file := _FOLDER / f"{name}{suffix}").exists()]
    if not files or sys.modules.get(full_name, name) is None:
        why = _built().get("left_out", {}).get(name)
        return None, "not built" + (f": {why}" if why else ""), True
    try:
        if not (why := _why_refused(name, files[0].read_bytes())):
            loader = ExtensionFileLoader(full_name, str(files[0]))
            module = module_from_spec(ModuleSpec(full_name, loader, origin=loader.path))
            loader.exec_module(module)
            sys.modules[full_name] = module
            return module, "", True
    except (ImportError, OSError) as error:
        why = f"does not load ({error}); it was built for torch {_built().get('torch')}, CUDA {_built().get('cuda')}"
        why += f", and this is torch {torch.__version__}, CUDA {torch.version.cuda}"
    return None, f"refused: {files[0].name} {why}", False


def _load_all() -> tuple[dict[str, ModuleType | None], dict[str, str], list[str]]:
    """Each library's module or None; of those that are missing why; and which of them the user has to hear of."""
    modules: dict[str, ModuleType | None] = dict.fromkeys(_LIBRARIES)
    if _backend == "python":
        return modules, dict.fromkeys(_LIBRARIES, "not used: FUSED_DROPOUT_BACKEND=python"), []
    if _release(torch.__version__) < _OLDEST_TORCH:
        why = f"not used: they need torch {'.'.join(map(str, _OLDEST_TORCH))}, and this is {torch.__version__}"
        return modules, {"_C": why}, ["_C"]
    missing, said = {}, []
    for name in _LIBRARIES:
        if name == "_cuda" and not torch.version.cuda:
            continue
        if "_C" in missing:
            missing[name] = "not used without the CPU kernels"
            continue
        modules[name], why, expected = _load(name)
        if why:
            missing[name] = why
        if why and (name == "_C" or not expected):
            said.append(name)
    return modules, missing, said


def _note(name: str) -> str:
    instead = "; the pure-PyTorch reference serves instead" if name == "_C" else ""
    return f"{_LIBRARIES[name]} {_missing[name]}{instead}"


def how_to_improve() -> str | None:
    """The command that would give what is missing here, from the sources that this package was installed from."""
    if not _missing:
        return None
    if _backend == "python":
        return "unset FUSED_DROPOUT_BACKEND"
    source, again = "--no-binary fused-dropout fused-dropout", "--force-reinstall --no-deps --no-cache-dir"
    try:
        origin = json.loads(metadata.distribution("fused-dropout").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {}
    if "vcs_info" in origin:
        source = f"{origin['vcs_info']['vcs']}+{origin['url']}@{origin['vcs_info']['commit_id']}"
    elif origin.get("url", "").endswith(".whl"):
        source = "SOURCES"  # which only the user knows
    elif origin:
        source = shlex.quote(unquote(urlparse(origin["url"]).path))
        again = "-e" if origin.get("dir_info", {}).get("editable") else again
    # Not find_spec("pip"): setuptools' hook takes that for a build, and takes its distutils out of this process.
    has_pip = any(metadata.distributions(name="pip"))
    command = f"{'pip install' if has_pip else 'uv pip install --no-build-isolation'} {again} {source}"
    if "_cuda" in _missing and (_release(torch.version.cuda or "0")[0] >= 13 or shutil.which("nvcc")):
        command = f"FUSED_DROPOUT_BUILD=cuda {command}"  # brings nvcc from PyPI where there is none, from CUDA 13 on
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        command = f"with a C++ compiler on PATH (apt-get install g++): {command}"
    if _release(torch.__version__) < _OLDEST_TORCH:
        command = f"with torch {'.'.join(map(str, _OLDEST_TORCH))} or later: {command}"
    return command


if _release(torch.__version__) < _OLDEST_FOR_THE_REFERENCE:
    raise ImportError(f"fused_dropout needs torch 2.8 or later, and this is {torch.__version__}")
_backend = _setting("FUSED_DROPOUT_BACKEND")
_setting("FUSED_DROPOUT_CPU_ISA")  # the library reads it when it is loaded
# What torch.compile is given: the mask's arithmetic, to fuse with the neighbours, or the kernel as it is.
compile_as = _setting("FUSED_DROPOUT_COMPILE")
_modules, _missing, _said = _load_all()
kernels: ModuleType | None = _modules["_C"]
cuda_kernels: ModuleType | None = _modules["_cuda"]
eager: ModuleType | None = _modules["_eager"]
if _backend == "native" and kernels is None:
    raise ImportError(f"FUSED_DROPOUT_BACKEND=native, but {_note('_C')}")
if _said:
    warnings.warn(
        f"fused_dropout: {'; '.join(map(_note, _said))}. Better by: {how_to_improve()}", RuntimeWarning, stacklevel=2
    )


def _has_triton() -> bool:
    with suppress(ValueError):  # a module of that name that is none
        return find_spec("triton") is not None
    return False


# Whether Inductor makes the kernel for a GPU of NVIDIA's or AMD's.
compiles_reference: bool = (
    _backend != "python" and not cuda_kernels and bool(torch.version.cuda or torch.version.hip) and _has_triton()
)


def _path(device: str) -> str:
    if cuda_kernels if device == "cuda" else kernels:
        return "native"
    return "compiled reference" if device == "cuda" and compiles_reference else "reference"


def backend_info() -> BackendInfo:
    """Which path serves each device, what was compiled for what, and what is missing."""
    return BackendInfo(
        version=__version__,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        backend=_backend,
        devices={device: _path(device) for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]},
        eager=eager is not None,
        cpu_isa=kernels.cpu_isa if kernels else None,
        notes=tuple(map(_note, _missing)),
        improve=how_to_improve(),
        built=_built(),
    )
