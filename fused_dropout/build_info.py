"""``backend_info``: which implementation runs on each device, what was compiled, and the command for a faster one.

It turns what ``native.py`` found into text for users. Its import gives the warning about a missing library.
"""

import json
import platform
import re
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

import torch

from . import __version__, inductor, native
from .warn import warn


class BackendInfo(NamedTuple):
    """The result of :func:`backend_info`. ``str()`` of it is a text for a bug report."""

    version: str
    """The version of fused_dropout."""
    torch: str
    """The version of torch."""
    cuda: str | None
    """The version of CUDA that torch was built with, or ``None``."""
    python: str
    """The version of Python."""
    platform: str
    """The operating system and the machine type."""
    backend: str
    """The value of the environment variable ``FUSED_DROPOUT_BACKEND``, or ``"auto"``."""
    devices: dict[str, str]
    """The implementation for each device type: ``"native"``, ``"reference"`` (PyTorch operations), or
    ``"compiled reference"`` (a kernel that Inductor makes of the reference).
    """
    eager: bool
    """Whether the C++ binding handles calls outside of transforms."""
    cpu_isa: str | None
    """The instruction set of the CPU kernels, or ``None`` without them."""
    notes: tuple[str, ...]
    """One line for each missing part."""
    improve: str | None
    """A command that installs a faster implementation, or an instruction if there is no such command. ``None`` if
    nothing is missing.
    """
    built: dict[str, Any]
    """The record of the build: ``built``, ``torch``, ``cuda``, ``architectures``, and ``left_out`` with the reasons.
    Empty if there is no usable record.
    """

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


def how_to_improve(**settings: str) -> str | None:
    """The command that installs what is missing, or a sentence if the location of the sources is unknown.

    settings: environment variables for the command.
    """
    if not native.missing:
        return None
    if sys.platform == "win32":
        return "Linux, WSL included; nothing is compiled on Windows"
    if native.backend == "reference":
        return "unset FUSED_DROPOUT_BACKEND"
    if "_cuda" in native.missing and (native.release(torch.version.cuda or "0")[0] >= 13 or shutil.which("nvcc")):
        settings["FUSED_DROPOUT_BUILD"] = "cuda"  # from CUDA 13 on this build installs nvcc from PyPI if it is missing
    variables = " ".join(f"{name}={value}" for name, value in settings.items())
    if source := _sources():
        # Not find_spec("pip"): setuptools' import hook would take this for a build, and remove its distutils.
        has_pip = any(metadata.distributions(name="pip"))
        command = f"{'pip install' if has_pip else 'uv pip install --no-build-isolation'} {source}"
        command = f"{variables} {command}" if variables else command
    else:
        command = "reinstall from the sources" + (f" with {variables}" if variables else "")
    needed = []
    if native.release(torch.__version__) < native.OLDEST_TORCH:
        needed.append(f"torch {'.'.join(map(str, native.OLDEST_TORCH))} or later")
    if compiler := _compiler_to_get():
        needed.append(compiler)
    return f"with {' and '.join(needed)}: {command}" if needed else command


def _compiler_to_get() -> str:
    """Which C++ compiler to install; empty if a working one exists. Parses the reason that toolchain.py recorded."""
    why = native.built().get("left_out", {}).get("_C", "")
    how = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
    if variable := re.match("no working C\\+\\+ compiler: (CXX|CC) is ", why):
        return f"{variable[1]} unset or naming a working C++ compiler ({how})"
    if why.startswith("no working C++ compiler: ") or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return f"a working C++ compiler on PATH ({how})"
    return ""


def _sources() -> str | None:
    """The arguments for pip to reinstall this package from its sources; None if their location is unknown."""
    again = "--force-reinstall --no-deps --no-cache-dir"
    try:
        origin = json.loads(metadata.distribution("fused-dropout").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:  # a clone on PYTHONPATH
        clone = Path(__file__).parents[1]
        return f"-e {shlex.quote(str(clone))}" if (clone / "setup.py").exists() else None
    if not origin:
        return f"{again} --no-binary fused-dropout fused-dropout"
    if "vcs_info" in origin:
        return f"{again} {origin['vcs_info']['vcs']}+{origin['url']}@{origin['vcs_info']['commit_id']}"
    if origin["url"].endswith(".whl"):
        return None
    if not origin["url"].startswith("file:"):
        return f"{again} {shlex.quote(origin['url'])}"
    path = unquote(urlparse(origin["url"]).path)
    if not Path(path).exists():
        return None
    return f"{'-e' if origin.get('dir_info', {}).get('editable') else again} {shlex.quote(path)}"


def _path(device: str) -> str:
    if native.cuda_kernels if device == "cuda" else native.kernels:
        return "native"
    return "compiled reference" if device == "cuda" and native.compiles_reference() else "reference"


def backend_info() -> BackendInfo:
    """Reports which implementation runs on each device, what was compiled, and what is missing.

    In PyTorch: ``torch.utils.collect_env`` and ``torch.__config__.show()`` give such reports about torch itself.

    Returns:
        A named tuple. ``print`` it for a text, as ``python -m fused_dropout info`` does.

    Example:
        >>> fd.backend_info().devices["cpu"] in ("native", "reference")
        True
    """
    return BackendInfo(
        version=__version__,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        backend=native.backend,
        devices={device: _path(device) for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]},
        eager=native.eager is not None,
        cpu_isa=native.kernels.cpu_isa if native.kernels else None,
        notes=(*map(native.note, native.missing), *filter(None, [native.why_no_record(), inductor.problem])),
        improve=how_to_improve(),
        built=native.built(),
    )


# Once, when the package is imported.
if native.warned_of:
    warn(f"{'; '.join(map(native.note, native.warned_of))}. Better by: {how_to_improve()}")
