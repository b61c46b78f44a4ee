"""``backend_info``: which path serves each device, what was compiled for what, and the command for a better path."""

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
    """Which path serves each device, and why not a better one.

    devices: for each device type "native", or "reference", or "compiled reference" where Inductor makes a kernel of
    that. cpu_isa: the instruction set of the CPU kernels, if they are there. eager: whether the C++ binding takes the
    calls outside of transforms. notes: a line for each thing that is missing. improve: the command that would give a
    better path, or what to do where there is no such command, or None. built: what was compiled for what (built, torch,
    cuda, architectures, and left_out with the reasons), empty if there is no usable record.
    """

    version: str
    torch: str
    cuda: str | None
    python: str
    platform: str
    backend: str
    devices: dict[str, str]
    eager: bool
    cpu_isa: str | None
    notes: tuple[str, ...]
    improve: str | None
    built: dict[str, Any]

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
    """The command that installs what is missing, or a sentence if the sources are not known. settings: environment
    variables for the command."""
    if not native.missing:
        return None
    if sys.platform == "win32":
        return "Linux, WSL included; nothing is compiled on Windows"
    if native.backend == "reference":
        return "unset FUSED_DROPOUT_BACKEND"
    if "_cuda" in native.missing and (native.release(torch.version.cuda or "0")[0] >= 13 or shutil.which("nvcc")):
        settings["FUSED_DROPOUT_BUILD"] = "cuda"  # brings nvcc from PyPI where there is none, from CUDA 13 on
    variables = " ".join(f"{name}={value}" for name, value in settings.items())
    if source := _sources():
        # Not find_spec("pip"): setuptools' hook takes that for a build, and takes its distutils out of this process.
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
    """Which C++ compiler to install; empty if there is one that works. It reads the reason that toolchain.py wrote."""
    why = native.built().get("left_out", {}).get("_C", "")
    how = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
    if variable := re.match("no working C\\+\\+ compiler: (CXX|CC) is ", why):
        return f"{variable[1]} unset or naming a working C++ compiler ({how})"
    if why.startswith("no working C++ compiler: ") or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return f"a working C++ compiler on PATH ({how})"
    return ""


def _sources() -> str | None:
    """pip's arguments that install this package again from its sources; None if it is not known where these are."""
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
    """Which path serves each device, what was compiled for what, and what is missing."""
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
