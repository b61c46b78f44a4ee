"""Finds what a build needs: torch, a C++ compiler and a CUDA toolkit. Builds one extension for ``setup.py``.

It is also the build backend (PEP 517): it requests the missing requirements, and leaves the rest to setuptools.
"""

import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403
from setuptools.errors import ExecError

OLDEST = (2, 11)  # the kernels use only the stable ABI of this torch
PYPI_TOOLKIT = "cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]"  # has nvcc from CUDA 13 on
NO_TORCH = "there is no torch"
NO_COMPILER = "no working C++ compiler"  # fused_dropout/build_info.py searches for this text
ON_WINDOWS = "the sources need GCC's and Clang's extensions to C++, and builds on Windows use MSVC"
ARCHITECTURES = ("7.0", "7.5", "8.0", "9.0", "10.0", "12.0")


if int(setuptools.__version__.split(".")[0]) < 77:  # a build without isolation does not check pyproject.toml
    raise SystemExit(f"this setuptools ({setuptools.__version__}) is too old: pip install 'setuptools>=77'")


def setting(name, *allowed):
    """The value of an environment variable. If it is unset or empty: the first allowed value."""
    if (value := os.environ.get(name) or allowed[0]) not in allowed:
        raise SystemExit(f"{name} has to be one of {', '.join(allowed)}, but is {value!r}")
    return value


def release(version):
    """Returns (2, 11) for "2.11.0a0+abc". A pre-release counts as its release."""
    return tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups()))


def find_torch():
    """Returns the names in torch/version.py, and makes torch importable. None if there is no torch.

    A build in isolation does not see the packages of its interpreter. But the torch among them is the one that will
    run, so this adds their folders to ``sys.path``.
    """
    if not find_spec("torch"):
        seen_there = {n: value for n, value in os.environ.items() if n not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
        command = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
        said = subprocess.run(command, env=seen_there, capture_output=True, text=True, check=True).stdout
        sys.path += [path for path in said.splitlines() if path not in sys.path]
    spec = find_spec("torch")
    return runpy.run_path(str(Path(spec.origin).with_name("version.py"))) if spec and spec.origin else None


def find_compiler():
    """The compiler in CXX, which may also name a wrapper before it and options after it. Else the first that works of
    c++, g++ and clang++.
    """
    asked = [found for word in os.environ.get("CXX", "").split() if (found := shutil.which(word))]
    there = asked[-1:] or [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))]
    if not there:
        return None
    found = asked[-1] if asked else next(filter(works, there), there[0])
    if not asked:
        os.environ["CXX"] = found
    os.environ["CC"] = os.environ.get("CC") or found  # nvcc's host compiler
    return found


@cache
def works(command):
    """Whether this compiler, with its options, compiles and links one line of C++."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "one.cpp"), Path(folder, "one.so")
        source.write_text("#include <cstddef>\n")
        try:
            subprocess.run([*command.split(), "-shared", "-fPIC", source, "-o", library], capture_output=True)
        except OSError:
            return False
        return library.exists()


def why_no_compiler(variable="CXX"):
    """Why the compiler in an environment variable does not work; empty if it works."""
    if not compiler:
        return f"{NO_COMPILER}: there is none on PATH"
    if works(os.environ[variable]):
        return ""
    named = f"{variable} is {ASKED[variable]}" if ASKED[variable] else os.environ[variable]
    return f"{NO_COMPILER}: {named}, which fails on a program of one line"


class Toolkit(NamedTuple):
    """A CUDA toolkit, or if folder is None the reason why there is none."""

    folder: str | None
    version: str = ""
    why_not: str = ""

    def architectures(self, for_this_machine):
        """The value for TORCH_CUDA_ARCH_LIST: the user's, that of this machine's GPU, or all that nvcc knows."""
        import torch

        if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            return asked
        if for_this_machine and torch.cuda.is_available():
            return "native"
        said = subprocess.run([f"{self.folder}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
        known = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in said.split()]
        # The driver compiles this PTX for later GPUs. It is not that of 12.0, which does not run on 11.0.
        portable = [arch for arch in known if arch != "12.0"][-1]
        return ";".join(arch + "+PTX" * (arch == portable) for arch in known)


def find_toolkit(torch):
    """The first toolkit with the major version of this torch's CUDA. Asks nvcc for its folder: it may be a wrapper."""
    if not torch or not torch["cuda"]:
        return Toolkit(None, why_not="this torch is built without CUDA")
    major, others = torch["cuda"].split(".")[0], []
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    system = [*os.environ.get("PATH", "").split(os.pathsep), *map(str, Path("/usr/local").glob("cuda*/bin"))]
    installed = [str(folder) for path in sys.path for folder in Path(path).glob("nvidia/cu*/bin")]
    for place in homes + system + installed:
        if nvcc := shutil.which("nvcc", path=place):
            said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
            version, top = re.search(r"release ([\d.]+)", said), re.search(r"^#\$ TOP=(.+)$", dry, re.M)
            if version and top and version[1].split(".")[0] == major:
                return Toolkit(os.path.realpath(top[1]), version[1])
            others.append(f"; {nvcc} is of CUDA {version[1]}" if version else f"; {nvcc} does not say its version")
    return Toolkit(None, why_not=f"there is no nvcc of CUDA {major}" + "".join(dict.fromkeys(others)))


def jobs(at_most):
    """How many compilations may run at once: MAX_JOBS, and ``at_most`` if it is unset or larger."""
    if not re.fullmatch("[1-9][0-9]{0,3}", asked := os.environ.get("MAX_JOBS") or str(at_most)):
        raise SystemExit(f"MAX_JOBS has to be a number from 1 on, but is {asked!r}")
    return min(int(asked), at_most)


BUILD = setting("FUSED_DROPOUT_BUILD", "auto", "cuda", "cpu", "none")
CUDART = setting("FUSED_DROPOUT_CUDART", "static", "shared")
VERBOSE = bool(os.environ.get("VERBOSE"))
ASKED = {name: os.environ.get(name) for name in ("CXX", "CC")}  # the user's values, before find_compiler sets its own
if not VERBOSE:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
torch, compiler = find_torch(), find_compiler()
toolkit = find_toolkit(torch)


def compile_alone(extension, command, folder):
    """Builds one extension of this ``build_ext`` command. Returns the compiler's message if it fails, else "".

    Several calls may run at once: each sets up its own compiler, and uses its own folder for the objects.
    """
    from torch.utils.cpp_extension import BuildExtension

    class Alone(BuildExtension):
        def build_extensions(self):
            self.compiler.call = self.compiler.spawn = _run  # call in newer setuptools, spawn in older
            super().build_extensions()

    try:
        alone = Alone(command.distribution)  # setuptools 77.0.3 does not accept options here
        alone.use_ninja = False  # the output of ninja cannot be captured
        alone.inplace, alone.editable_mode = command.inplace, command.editable_mode
        alone.build_temp, alone.force = f"{folder}/{extension.name}", True
        alone.ensure_finalized()
        alone.extensions = [extension]
        alone.run()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def _run(command, **_):
    """Runs a compiler. Raises ExecError with its output if it fails."""
    english = {**os.environ, "LC_ALL": "C"}  # why_it_failed searches for English words
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    done = subprocess.run(command, env=english, **pipes)
    if VERBOSE:
        print(*command, done.stdout, file=sys.stderr)
    if done.returncode:
        raise ExecError(done.stdout.strip() or f"{command[0]} ended with exit status {done.returncode}")


_ERROR = re.compile(r"(^|[:)] )(fatal |internal compiler )?error: |undefined reference|cannot find")


def why_it_failed(message):
    """One line from the message of compile_alone: the first error; without one, why CC fails, or the last line."""
    lines = [re.sub(r"\x1b\[[\d;]*[mK]", "", line) for line in message.splitlines() if line.strip()]
    first = next((line for line in lines if _ERROR.search(line)), None)
    line = first or why_no_compiler("CC") or lines[-1]
    return "".join(filter(str.isprintable, " ".join(line.split())))


def why_nothing():
    """Why nothing can be compiled; empty if something can."""
    if BUILD == "none":
        return "FUSED_DROPOUT_BUILD=none"
    if torch and release(torch["__version__"]) < OLDEST:
        return f"torch {torch['__version__']} is older than {'.'.join(map(str, OLDEST))}"
    if sys.platform == "win32":
        return ON_WINDOWS
    return why_no_compiler() or ("" if torch else NO_TORCH)


def missing():
    """The requirements of this build that are not installed."""
    if why_nothing() not in ("", NO_TORCH):
        return []  # nothing will be compiled, so nothing is needed
    wanted = BUILD == "cuda" and not toolkit.folder
    if not torch:
        return ["torch", PYPI_TOOLKIT] if wanted else ["torch"]  # torch's own requirements fix the toolkit's version
    return [f"{PYPI_TOOLKIT}=={torch['cuda']}.*"] if wanted and release(torch["cuda"] or "0.0") >= (13, 0) else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + missing()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + missing()
