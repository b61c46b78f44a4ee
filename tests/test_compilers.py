"""Builds whose compiler cannot compile our sources: the report of the build, and the warning at the import.

``setup.py`` runs as under pip, with stand-ins for the compiler. None of these builds compiles our sources.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import Forks

from fused_dropout import native

ROOT = Path(__file__).parents[1]
REFUSES_OURS = """#!/bin/sh
for argument in "$@"; do case "$argument" in csrc/*)
    echo "csrc/philox.h:3:1: warning: an unused error"
    {says}
    exit 1;;
esac; done
exec c++ "$@"
"""
# Compiles other files, but does not know the function attribute "target".
HAS_NO_TARGETS = """#!/bin/sh
for argument in "$@"; do case "$argument" in
    csrc/simd/avx2.cpp) echo "csrc/simd/avx2.cpp:13:9: error: unknown attribute 'target'" >&2; exit 1;;
    csrc/*) exit 0;;
esac; done
exec c++ "$@"
"""
# MSVC's compiler ignores the options that it does not know. It makes a program by default, not a library.
MSVC = """#!/bin/sh
echo "Microsoft (R) C/C++ Optimizing Compiler Version 19.44.35211 for x64" >&2
for argument in "$@"; do echo "cl : Command line warning D9002 : ignoring unknown option '$argument'" >&2; done
exit {status}
"""
# Runs setup.py as on Windows. The imports before it still see the real system.
AS_WINDOWS = """
import sys, setuptools, setuptools.command.build_ext, setuptools.command.build_py, setuptools.dist
sys.path.append("build_backend")
import toolchain
sys.platform, sys.argv = "win32", sys.argv[1:]
import runpy
runpy.run_path("setup.py", run_name="__main__")
"""
ASKED = "echo 'csrc/mask.h:7:1: error: no GNU extensions' >&2; echo 'csrc/mask.h:8:1: error: more' >&2"

too_old_a_torch = native.release(torch.__version__) < native.OLDEST_TORCH
needs_kernels_torch = pytest.mark.skipif(too_old_a_torch, reason="nothing is compiled for this torch")


def has_no_setuptools(done):
    return "No module named 'setuptools'" in done.stderr or "pip install 'setuptools>=77'" in done.stderr


def build(into, *, run=("setup.py",), **settings):
    """Runs a build and returns the reason why it left out the CPU kernels."""
    cleared = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "VERBOSE")}
    environment = cleared | {"FUSED_DROPOUT_BUILD": "", **settings}
    command = [sys.executable, *run, "build", "--build-lib", into]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if has_no_setuptools(done):
        pytest.skip("setuptools is missing or too old")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads((into / "fused_dropout/_build.json").read_text())["left_out"]["_C"]


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


def warning_of(forks, package, code="import fused_dropout"):
    done = forks.run(code, PYTHONPATH=str(package))
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "fused_dropout: " in line]
    return warning


@needs_kernels_torch
@pytest.mark.parametrize(
    ("settings", "why", "better"),
    [
        ({"CXX": "/bin/false"}, "CXX is /bin/false, which fails on a program of one line", "CXX unset or naming"),
        ({"CXX": "/bin/true", "CC": "/bin/false"}, "CXX is /bin/true, which fails on a program", "CXX unset or naming"),
        ({"PATH": "/nonexistent"}, "there is none on PATH", "a working C++ compiler on PATH"),
    ],
)
def test_no_working_compiler(forks, tmp_path, settings, why, better):
    reason = build(tmp_path, **settings)
    assert reason.startswith("no working C++ compiler: ")
    assert why in reason
    warning = warning_of(forks, tmp_path)
    assert reason in warning
    assert f"Better by: with {better}" in warning
    assert "apt-get install g++" in warning


@needs_kernels_torch
@pytest.mark.parametrize("status", [0, 2])
def test_msvc(tmp_path, status):
    """For each exit status, the reason is the same: the compiler made no library."""
    compiler = tmp_path / "cl"
    compiler.write_text(MSVC.format(status=status))
    compiler.chmod(0o755)
    reason = build(tmp_path, CXX=str(compiler))
    assert reason == f"no working C++ compiler: CXX is {compiler}, which fails on a program of one line"


@needs_kernels_torch
def test_windows(forks, tmp_path):
    """Nothing is compiled, the reference runs, and the advice contains no Linux command."""
    reason = build(tmp_path, run=("-c", AS_WINDOWS, "setup.py"))
    assert reason == "the sources need GCC's and Clang's extensions to C++, and builds on Windows use MSVC"
    code = "import sys; sys.platform = 'win32'; import torch, fused_dropout as fd; "
    code += "assert 0 < int(fd.Dropout(0.5)(torch.ones(1000)).count_nonzero()) < 1000"
    warning = warning_of(forks, tmp_path, code)
    assert f"CPU kernels not built: {reason}; the pure-PyTorch reference serves instead" in warning
    assert warning.endswith("Better by: Linux, WSL included; nothing is compiled on Windows")


@needs_kernels_torch
def test_compiler_of_macos(forks, tmp_path):
    build(tmp_path, CXX="/bin/false")
    warning = warning_of(forks, tmp_path, "import sys; sys.platform = 'darwin'; import fused_dropout")
    assert "naming a working C++ compiler (xcode-select --install): " in warning


@needs_kernels_torch
def test_compiler_without_function_attributes(tmp_path):
    """If one file does not compile, all CPU kernels are left out."""
    compiler = tmp_path / "compiler"
    compiler.write_text(HAS_NO_TARGETS)
    compiler.chmod(0o755)
    assert subprocess.run([compiler, "--version"], capture_output=True).returncode == 0, "no c++ behind it"
    assert build(tmp_path, CXX=str(compiler)) == "csrc/simd/avx2.cpp:13:9: error: unknown attribute 'target'"


@needs_kernels_torch
@pytest.mark.parametrize(
    ("says", "why"),
    [(ASKED, "csrc/mask.h:7:1: error: no GNU extensions"), ("", "csrc/philox.h:3:1: warning: an unused error")],
)
def test_compiler_that_does_not_take_our_sources(forks, tmp_path, says, why):
    """The reason is the compiler's first error, or its last line if there is no error."""
    compiler = tmp_path / "compiler"
    compiler.write_text(REFUSES_OURS.format(says=says))
    compiler.chmod(0o755)
    assert subprocess.run([compiler, "--version"], capture_output=True).returncode == 0, "no c++ behind it"
    assert build(tmp_path, CXX=str(compiler)) == why
    warning = warning_of(forks, tmp_path)
    assert f"CPU kernels not built: {why}; the pure-PyTorch reference serves instead" in warning
    assert "no working C++ compiler" not in warning


def test_first_error():
    """Errors of several compilers. Without an error line, the reason is that the C compiler does not work."""
    messages = {
        "a.cu(12): error: no\n": "a.cu(12): error: no",
        "\x1b[01ma.cpp:1:2:\x1b[K \x1b[31mfatal error: \x1b[Kno\tsuch file\n": "a.cpp:1:2: fatal error: no such file",
        "cc1plus: error: bad value\n": "cc1plus: error: bad value",
        "a.o: in f\na.cpp: undefined reference to `g'\n": "a.cpp: undefined reference to `g'",
        "nvcc fatal   : Failed to preprocess host compiler properties.\n": "no working C++ compiler: CC is /bin/false, "
        "which fails on a program of one line",
    }
    code = "import json, sys; from toolchain import why_it_failed; "
    code += "print(json.dumps([why_it_failed(message) for message in json.loads(sys.argv[1])]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "build_backend"), "CC": "/bin/false", "CXX": ""}
    command = [sys.executable, "-c", code, json.dumps(list(messages))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if has_no_setuptools(done) or '"no working C++ compiler: there is none' in done.stdout:
        pytest.skip("no compiler, or setuptools is missing or too old")
    assert json.loads(done.stdout) == list(messages.values())
