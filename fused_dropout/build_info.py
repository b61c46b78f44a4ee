"""``backend_info``: which path serves each device, what was compiled for what, and the command for a better path."""

import json
import platform
import shlex
import shutil
import warnings
from importlib import metadata
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

import torch

from . import __version__, inductor, native


class BackendInfo(NamedTuple):
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


def how_to_improve() -> str | None:
    """The command that would give what is missing here, from the sources that this package was installed from."""
    if not native.missing:
        return None
    if native.backend == "python":
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
    if "_cuda" in native.missing and (native.release(torch.version.cuda or "0")[0] >= 13 or shutil.which("nvcc")):
        command = f"FUSED_DROPOUT_BUILD=cuda {command}"  # brings nvcc from PyPI where there is none, from CUDA 13 on
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        command = f"with a C++ compiler on PATH (apt-get install g++): {command}"
    if native.release(torch.__version__) < native.OLDEST_TORCH:
        command = f"with torch {'.'.join(map(str, native.OLDEST_TORCH))} or later: {command}"
    return command


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
        notes=(*map(native.note, native.missing), *filter(None, [inductor.problem])),
        improve=how_to_improve(),
        built=native.built(),
    )


# Once, when the package is imported.
if native.warned_of:
    warnings.warn(
        f"fused_dropout: {'; '.join(map(native.note, native.warned_of))}. Better by: {how_to_improve()}",
        RuntimeWarning,
        stacklevel=2,
    )
