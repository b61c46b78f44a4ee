"""What was compiled, whether it loads, and which path serves each device. No other module asks for a library."""

import importlib
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

_SETTINGS = {
    "FUSED_DROPOUT_BACKEND": ("auto", "native", "python"),
    "FUSED_DROPOUT_CPU_ISA": ("auto", "avx512", "avx2", "portable"),
    "FUSED_DROPOUT_COMPILE": ("auto", "fuse", "kernel"),
}
_BUILD_FILE = Path(__file__).with_name("_build.json")


@dataclass(frozen=True)
class BackendInfo:
    """Which path serves each device, and why not a better one.

    devices: "native" or "reference" for each device type. cpu_isa: the instruction set of the CPU kernels, if they are
    there. eager: whether the C++ binding takes the calls outside of transforms. notes: a line for each thing that is
    missing. built: what the compiled part was built for (torch, CUDA, architectures), empty if nothing was.
    """

    version: str
    torch: str
    cuda: str | None
    backend: str
    devices: dict[str, str]
    eager: bool
    cpu_isa: str | None = None
    notes: tuple[str, ...] = ()
    built: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        served = ", ".join(f"{device}: {path}" for device, path in self.devices.items())
        built = ", ".join(f"{name} {value}" for name, value in self.built.items() if name != "left_out") or "nothing"
        left_out = f"; left out {self.built['left_out']}" if "left_out" in self.built else ""
        lines = [
            f"fused_dropout {self.version}, torch {self.torch}, CUDA {self.cuda or 'none'}, backend {self.backend}",
            f"served by     {served}; CPU kernels: {self.cpu_isa}; eager binding: {'yes' if self.eager else 'no'}",
            f"compiled for  {built}{left_out}",
        ]
        return "\n".join(lines + [f"note          {note}" for note in self.notes])


def _setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in _SETTINGS[name]:
        raise ValueError(f"{name} has to be one of {', '.join(_SETTINGS[name])}, but is {value!r}")
    return value


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _built() -> dict[str, object]:
    try:
        return json.loads(_BUILD_FILE.read_text())
    except (OSError, ValueError):
        return {}


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The extension module, or None and the reason."""
    try:
        return importlib.import_module(f"fused_dropout.{name}"), ""
    except ModuleNotFoundError:
        return None, "not built" + (f": {left_out}" if (left_out := _built().get("left_out")) else "")
    except ImportError as error:
        built = f"it was built for torch {_built().get('torch', '?')}, CUDA {_built().get('cuda')}"
        here = f"this is torch {torch.__version__}, CUDA {torch.version.cuda}"
        return None, f"does not load ({error}); {built}, and {here}"


def _load_all() -> tuple[ModuleType | None, ModuleType | None, list[str]]:
    """The kernels, the eager binding and what is to be said about them."""
    _setting("FUSED_DROPOUT_CPU_ISA")  # the library reads it when it is loaded
    if _backend == "python":
        return None, None, ["FUSED_DROPOUT_BACKEND=python"]
    kernels, reason = _load("_C")
    if kernels is None:
        if _backend == "native":
            raise ImportError(f"FUSED_DROPOUT_BACKEND=native, but the compiled kernels are {reason}")
        return None, None, [f"kernels {reason}; the pure-PyTorch reference serves instead"]
    built_for = str(_built().get("torch", ""))
    if _minor(built_for) != _minor(torch.__version__):
        note = f"eager binding built for torch {built_for}, not {torch.__version__}: reinstall to rebuild it"
        return kernels, None, [note]
    eager, reason = _load("_eager")
    return kernels, eager, [] if eager else [f"eager binding {reason}"]


_backend = _setting("FUSED_DROPOUT_BACKEND")
# What torch.compile is given: the mask's arithmetic, to fuse with the neighbours, or the kernel as it is.
compile_as = _setting("FUSED_DROPOUT_COMPILE")
kernels, eager, _notes = _load_all()
if _notes and _backend == "auto":
    warnings.warn(f"fused_dropout: {'; '.join(_notes)}", RuntimeWarning, stacklevel=2)


# A key from the CPU's default generator in one call; None without the kernels.
draw_cpu_key = torch.ops.fused_dropout.draw_cpu_key.default if kernels else None


def _serves(device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("fused_dropout::apply", device.upper())


def backend_info() -> BackendInfo:
    """Which path serves each device, what was compiled for what, and what is missing."""
    from . import __version__

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    notes = list(_notes)
    if "cuda" in devices and kernels and not _serves("cuda"):
        notes.append(f"no CUDA kernels: {_built().get('left_out') or 'not built'}")
    return BackendInfo(
        version=__version__,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        backend=_backend,
        devices={device: "native" if _serves(device) else "reference" for device in devices},
        eager=eager is not None,
        cpu_isa=kernels.cpu_isa if kernels else None,
        notes=tuple(notes),
        built=_built(),
    )
