"""Allowed dependencies of the compiled part: the stable ABI of LibTorch; ATen only for the eager binding."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_dropout import native

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
EAGER = ("eager.h", "eager.cpp", "dropout_linear.cpp", "neighbours.cpp")
# The last one declares torch's operations for compiled programs, as C functions.
STABLE = re.compile(r"torch/(csrc/stable/|headeronly/|csrc/inductor/aoti_torch/(c/|generated/c_shim_cpu\.h))")


def test_only_the_eager_binding_includes_aten():
    """The same kernels run under every torch from 2.11 on only if they use nothing else of torch."""
    for source in CSRC.rglob("*.[ch]*"):
        included = re.findall(r'#include [<"](.+?)[>"]', source.read_text())
        unstable = [name for name in included if name.startswith(("ATen", "c10", "torch/")) and not STABLE.match(name)]
        assert bool(unstable) == (source.name in EAGER), f"{source.name} includes {unstable}"


def test_kernels_need_no_cxx_symbol_of_torch():
    libraries = [module.__file__ for module in (native.kernels, native.cuda_kernels) if module]
    if not libraries or shutil.which("nm") is None:
        pytest.skip("no compiled kernels, or no nm")
    command = ["nm", "-D", "-C", "--undefined-only", *libraries]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith(" ")]
    assert any(name.startswith("aoti_torch_") for name in needed)
    assert [name for name in needed if re.search(r"\b(at|c10|torch)::", name)] == []


def test_kernels_call_nothing_in_their_loops():
    """Results do not show this: with one step of the CPU kernels left as a call, dropout takes 1.4 times as long."""
    if not native.kernels or shutil.which("nm") is None:
        pytest.skip("no compiled kernels, or no nm")
    command = ["nm", "-C", native.kernels.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "settle_ties" not in symbols:
        pytest.skip("the names of functions were stripped off")
    steps = r"\(anonymous namespace\)::(move_groups|finish|write|philox|draws_of|drop_part)[<(]"
    assert re.findall(steps, symbols) == []


@pytest.mark.parametrize(
    ("asked", "compiler", "kept"),
    [
        (None, "c++", False),
        ("wrapper c++", "c++", True),
        ("c++ --sysroot=/", "c++", True),
        ("no-such-compiler", "c++", False),
    ],
)
def test_compiler_that_is_asked_for(asked, compiler, kept, tmp_path):
    """CXX stays as the user wrote it, with wrapper and options, unless the named compiler does not exist."""
    if not shutil.which("c++"):
        pytest.skip("no compiler")
    (tmp_path / "wrapper").touch(0o755)
    code = "import os, toolchain; print(toolchain.compiler, os.environ['CXX'], os.environ['CC'], sep='|')"
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    environment |= {"PYTHONPATH": str(ROOT / "build_backend"), "PATH": f"{os.environ['PATH']}:{tmp_path}"} | (
        {"CXX": asked} if asked else {}
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found, cxx, cc = done.stdout.strip().split("|")
    assert found == cc == shutil.which(compiler)
    assert cxx == (asked if kept else found)


def test_document_of_environment_variables():
    """It lists exactly our variables that the sources read, with their allowed values."""
    rows = re.findall(r"^\| (`[A-Z].*?) \| (.*?) \|", (ROOT / "docs/environment.md").read_text(), re.M)
    documented = {name: values for names, values in rows for name in re.findall(r"`([A-Z_]+)`", names)}
    folders = [ROOT / name for name in ("build_backend", "csrc", "fused_dropout", "benchmarks")]
    files = [ROOT / "setup.py", *(file for folder in folders for file in folder.rglob("*.*"))]
    text = "".join(f.read_text() for f in files if f.suffix in (".py", ".ipynb", ".h", ".cpp", ".cu", ".cuh"))
    ours = set(re.findall(r'"(FUSED_DROPOUT_[A-Z_]+)\\?"', text))
    read = ours | set(re.findall(r'(?:environ\.get\(|environ\[|getenv\()"([A-Z_]+)"', text)) - {"PATH"}
    assert read <= documented.keys()
    assert {name for name in documented if name.startswith("FUSED_DROPOUT_")} == ours
    settings = {name: list(values) for name, values in native._SETTINGS.items()}
    for name, values in re.findall(r'setting\("(\w+)", (.+?)\)', (ROOT / "build_backend/toolchain.py").read_text()):
        settings[name] = re.findall(r"\w+", values)
    assert len(settings) == 5
    for name, values in settings.items():
        assert re.findall(r"`(\w+)`", documented[name]) == values


def test_make_in_an_environment_whose_path_has_a_space(tmp_path):
    """All commands quote the path, and the space does not end the name of a target or prerequisite."""
    if not shutil.which("make") or not Path(sys.prefix, "bin/python").exists():
        pytest.skip("no make, or no environment")
    active = tmp_path / "my env"
    active.symlink_to(sys.prefix)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "test", "lint", "bench", "gpu-check", "wheel", "test-models", "sanitize"]
    settings = environment | {"VIRTUAL_ENV": str(active)}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'"{active}/bin/python" -m pytest' in done.stdout
    assert not re.search(rf'[^"]{re.escape(str(active))}/', done.stdout)
