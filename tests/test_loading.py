"""Loading of the compiled libraries, and ``info``. Incomplete, foreign or incompatible libraries are refused.

Each test imports a copy of the package with modified libraries, in a separate process.
"""

import json
import os
import runpy
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forks import Forks

import fused_dropout as fd
from fused_dropout import build_info, native

REPORT = """
import json, sys, warnings
import torch
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused_dropout as fd
y = fd.dropout(torch.ones(1000), 0.5, key=fd.key(7))
info = fd.backend_info()
print(json.dumps({{"folder": fd.__path__[0], "kept": y.count_nonzero().item(), "cpu": info.devices["cpu"],
                  "eager": info.eager, "notes": info.notes, "improve": info.improve, "text": str(info),
                  "warnings": [str(w.message) for w in caught if "fused_dropout" in str(w.message)]}}))
"""
KEPT = fd.keep_mask((1000,), 0.5, fd.key(7)).sum().item()
needs_kernels = pytest.mark.skipif(native.kernels is None, reason="no compiled kernels")


@pytest.fixture
def package(tmp_path):
    """A copy of the installed package, which tests can change."""
    shutil.copytree(Path(fd.__file__).parent, tmp_path / "fused_dropout", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "fused_dropout"


def library(package, name):
    return next(package.glob(f"{name}.*so"))


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


@pytest.fixture
def outcome(forks, package):
    """The report of a process that imports the copy. It succeeds, and its masks are the contract's in every case."""

    def outcome(before="", code=REPORT, inherited=os.environ, **environment):
        environment = {"PYTHONPATH": str(package.parent), **environment}
        done = forks.run(code.format(before=before), inherited=inherited, **environment)
        assert done.returncode == 0, (done.returncode, done.stderr)
        found = json.loads(done.stdout)
        assert Path(found["folder"]) == package
        assert found["kept"] == KEPT
        return found

    return outcome


def is_refused(found, *why):
    """Checks that one warning gives the reason, and that the reference runs."""
    assert found["cpu"] == "reference"
    assert not found["eager"]
    assert len(found["warnings"]) == 1
    for part in ("CPU kernels", *why, "pure-PyTorch reference", "Better by: ", "pip install"):
        assert part in found["warnings"][0]
    assert any(part in note for note in found["notes"] for part in why)


@needs_kernels
def test_untouched_copy_is_loaded(outcome, package):
    found = outcome()
    assert found["cpu"] == "native"
    assert found["eager"] == (native.eager is not None)
    assert found["warnings"] == []


@needs_kernels
def test_truncated_library(outcome, package):
    """The system's loader would crash on this file with a bus error."""
    whole = library(package, "_C").read_bytes()
    library(package, "_C").write_bytes(whole[: len(whole) // 2])
    is_refused(outcome(), "is truncated")
    for part in (4, 63, 64, 65, 100, 1000, *range(4096, len(whole) * 9 // 10, 4096)):
        assert native._why_refused("_C", whole[:part]) == "is truncated"
    assert native._why_refused("_C", b"") == "is empty"
    assert native._why_refused("_C", whole) == ""


@needs_kernels
def test_library_of_another_architecture(outcome, package):
    bytes_ = bytearray(library(package, "_C").read_bytes())
    assert bytes_[:4] == b"\x7fELF"
    bytes_[18:20] = (183 if bytes_[18] != 183 else 62).to_bytes(2, sys.byteorder)  # e_machine: aarch64, or x86-64
    library(package, "_C").write_bytes(bytes_)
    is_refused(outcome(), "does not load", "built for torch", torch.__version__)


@needs_kernels
def test_library_of_another_version(outcome, package):
    here, other = f"fused_dropout._C {fd.__version__};".encode(), b"fused_dropout._C 9.9.9;"
    whole = library(package, "_C").read_bytes()
    assert whole.count(here) == 1
    library(package, "_C").write_bytes(whole.replace(here, other))
    is_refused(outcome(), "is of version 9.9.9", f"this is {fd.__version__}")


@needs_kernels
def test_library_that_is_not_ours(outcome, package):
    import math

    shutil.copy(getattr(math, "__file__", torch._C.__file__), library(package, "_C"))
    is_refused(outcome(), "is of version unknown")


@needs_kernels
def test_no_library(outcome, package):
    library(package, "_C").unlink()
    is_refused(outcome(), "not found: the build made a file, and it is gone")
    (package / "_build.json").unlink()
    is_refused(outcome(), "not built")


def test_library_for_another_python(outcome, package):
    if native.eager is None:
        pytest.skip("no eager binding")
    (package / "_build.json").write_text('{"built": ["_C", "_eager"], "left_out": {}}')
    library(package, "_eager").rename(package / "_eager.cpython-39-x86_64-linux-gnu.so")
    notes = outcome()["notes"]
    assert "eager binding not built for this Python: _eager.cpython-39-x86_64-linux-gnu.so is for another one" in notes


@needs_kernels
def test_no_library_elsewhere_is_taken(outcome, package, tmp_path):
    """No library of the same name is taken from sys.path, the working directory or a later package of the same name."""
    elsewhere = tmp_path / "elsewhere" / "fused_dropout"
    elsewhere.mkdir(parents=True)
    shutil.move(library(package, "_C"), elsewhere)
    shutil.copy(next(elsewhere.iterdir()), elsewhere.parent)
    is_refused(outcome(f"sys.path.append({str(elsewhere.parent)!r})"), "not found")


def test_eager_binding_of_another_torch(outcome, package):
    if native.eager is None:
        pytest.skip("no eager binding")
    whole = library(package, "_eager").read_bytes()
    here = f"; for torch {torch.__version__};".encode()
    assert whole.count(here) == 1
    library(package, "_eager").write_bytes(whole.replace(here, b"; for torch 2.1.0;".ljust(len(here), b" ")))
    found = outcome()
    assert found["cpu"] == "native"
    assert not found["eager"]
    (warning,) = found["warnings"]
    for part in ("eager binding", "built for torch 2.1.0", f"this is {torch.__version__}", "pip install"):
        assert part in warning


@needs_kernels
@pytest.mark.parametrize(
    ("version", "served"), [("2.10.1", False), ("2.11.0a0+b5c9cb3ab8.nv26.01", True), ("2.11.0.dev20260102", True)]
)
def test_floor_of_the_kernels(outcome, package, version, served):
    """Below this version the reference runs, from it on the kernels. A preview of 2.11 counts as 2.11."""
    before = f"torch.__version__ = torch.torch_version.TorchVersion({version!r})"
    found = outcome(before)
    assert found["cpu"] == ("native" if served else "reference")
    assert not found["eager"]
    assert len(found["warnings"]) == 1
    if not served:
        is_refused(found, "they need torch 2.11", version)


def test_torch_that_is_too_old_for_all(forks, package):
    code = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.7.1'); import fused_dropout"
    done = forks.run(code, PYTHONPATH=str(package.parent))
    assert "ImportError: fused_dropout needs torch 2.8 or later, and this is 2.7.1" in done.stderr


@pytest.mark.parametrize(
    ("built_for", "here", "fits"),
    [
        ("2.13.0", "2.13.1", True),
        ("2.13.0+cpu", "2.13.0+cu130", True),  # the check does not say whether it loads
        ("2.13.0", "2.12.0", False),
        ("2.1.0", "2.11.0", False),
        ("2.11.0a0+abc", "2.11.0a0+abc", True),
        ("2.11.0a0+abc", "2.11.0", False),
        ("2.12.0.dev20260101", "2.12.0.dev20260102", False),
        ("2.13.0rc1", "2.13.0", False),
    ],
)
def test_torch_that_an_eager_binding_fits(built_for, here, fits):
    assert native._fits(built_for, here) == fits


@pytest.mark.parametrize(
    ("built", "here", "driver", "refused"),
    [
        ("13.0", "12.8", 12, True),
        ("13.0", "12.8", 0, False),  # no driver, so no GPU
        ("13.2", "12.8", 13, False),
        ("12.8", "13.0", 12, False),
        ("13.2", "13.0", 13, False),
    ],
)
def test_runtime_that_is_newer_than_the_driver(monkeypatch, built, here, driver, refused):
    monkeypatch.setattr(native, "built", lambda: {"cuda": built})
    monkeypatch.setattr(torch.version, "cuda", here)
    monkeypatch.setattr(native, "_driver", lambda: driver)
    why = native._why_refused("_cuda", f"fused_dropout._cuda {fd.__version__};".encode())
    assert ("driver" in why) == refused
    assert native._why_refused("_C", f"fused_dropout._C {fd.__version__};".encode()) == ""


def test_nothing_is_written_and_nothing_asked_of_home(outcome, package, tmp_path):
    """With a read-only package and no home directory, the import works. It changes no file and no variable."""
    for path in [package, *package.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = "import os; environment = dict(os.environ); os.environ.pop('HOME', None); environment.pop('HOME', None)"
    code = REPORT + "\nassert dict(os.environ) == environment\n"
    files = {path: path.stat().st_mtime_ns for path in package.rglob("*")}
    outcome(before, code, {}, HOME="/nonexistent", TMPDIR="/nonexistent", PYTHONDONTWRITEBYTECODE="1")
    assert {path: path.stat().st_mtime_ns for path in package.rglob("*")} == files


@pytest.mark.parametrize(
    "record",
    [
        *("", "[]", "3", "null", '"x"', "{", "[" * 100_000, "\xff", "{}"),
        '{"built": "x", "left_out": {}}',
        '{"built": [1], "left_out": {}}',
        '{"built": ["_C"], "left_out": []}',
        '{"built": [], "left_out": {"_C": ["x"]}}',
        '{"built": [], "left_out": {}, "torch": 5}',
        '{"built": ["_cuda"], "left_out": {}, "torch": "2.13.0", "cuda": 13, "architectures": "9.0"}',
        '{"built": ["_cuda"], "left_out": {}, "torch": "2.13.0", "cuda": "x", "architectures": "9.0"}',
        '{"built": ["_cuda"], "left_out": {}, "torch": "2.13.0", "cuda": "13.0", "architectures": null}',
        '{"built": ["_cuda"], "left_out": {}, "torch": "2.13.0", "cuda": "13.0"}',
        '{"built": ["\\ud800"], "left_out": {}}',
    ],
)
def test_record_that_cannot_be_used(outcome, package, record):
    """A damaged record counts as no record, and ``info`` says so, with and without the libraries."""
    (package / "_build.json").write_text(record, encoding="latin-1")
    found = outcome()
    assert found["cpu"] == fd.backend_info().devices["cpu"]
    assert "compiled   nothing" in found["text"]
    assert [note for note in found["notes"] if note.startswith("_build.json ") and note.endswith("ignored")]
    found = outcome("sys.modules['fused_dropout._C'] = None")
    assert found["cpu"] == "reference"
    assert len([note for note in found["notes"] if note.startswith("_build.json ")]) == 1


def test_path_with_spaces_and_letters(tmp_path, package):
    odd = tmp_path / "ein Ordner, größer" / "日本"
    odd.mkdir(parents=True)
    shutil.move(package, odd)
    code = "import fused_dropout as fd; print(fd.__path__[0], fd.backend_info().devices['cpu'])"
    environment = {**os.environ, "PYTHONPATH": str(odd), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == f"{odd / 'fused_dropout'} {fd.backend_info().devices['cpu']}", done.stderr


def test_two_processes_at_once(package):
    command = [sys.executable, "-c", "import fused_dropout as fd; print(fd.backend_info().devices['cpu'])"]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd="/") for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == [fd.backend_info().devices["cpu"]] * 2


def test_importing_starts_nothing(outcome, package):
    """The import and the first call start no CUDA context, no compiler and no thread."""
    code = """
import json, sys, threading
import torch
threads = threading.active_count()
import fused_dropout as fd
x = torch.ones(1000, requires_grad=True)
y = fd.dropout(x, 0.5, key=fd.key(7))
y.sum().backward()
assert not torch.cuda.is_initialized()
assert threading.active_count() == threads
assert not {"torch._inductor", "torch._dynamo", "triton", "numpy.testing"} & set(sys.modules) - before, "imported"
print(json.dumps({"folder": fd.__path__[0], "kept": y.count_nonzero().item()}))
"""
    code = code.replace("import fused_dropout", "before = set(sys.modules)\nimport fused_dropout", 1)
    outcome(code=code.replace("{", "{{").replace("}", "}}"))


def test_info_says_what_serves_and_why(capsys, monkeypatch):
    info = fd.backend_info()
    assert set(info.devices.values()) <= {"native", "reference", "compiled reference"}
    for part in (fd.__version__, torch.__version__, *info.notes, *filter(None, [info.improve, info.cpu_isa])):
        assert part in str(info)
    assert (info.improve is None) == (not info.notes)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fused_dropout", "info"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["fused_dropout", "info", "--json"])
    with suppress(SystemExit):
        runpy.run_module("fused_dropout", run_name="__main__")
    said = json.loads(capsys.readouterr().out)
    assert {"version", "torch", "cuda", "python", "devices", "notes", "improve", "built", "gpus"} <= set(said)
    assert str(said["torch"]) in done.stdout


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "--no-cache-dir --no-binary fused-dropout fused-dropout"),
        ({"url": "file:///tmp/a%20b", "dir_info": {}}, "--no-cache-dir '/tmp/a b'"),
        ({"url": "file:///tmp/a", "dir_info": {"editable": True}}, "install -e /tmp/a"),
        ({"url": "file:///tmp/x-0.1.tar.gz", "archive_info": {}}, "--no-cache-dir /tmp/x-0.1.tar.gz"),
        ({"url": "https://host/x-0.1.tar.gz", "archive_info": {}}, "--no-cache-dir https://host/x-0.1.tar.gz"),
        ({"url": "file:///tmp/x-0.1-cp310-abi3-linux.whl", "archive_info": {}}, None),
        ({"url": "file:///nonexistent/a", "dir_info": {}}, None),
        ({"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "git+https://host/x.git@abc"),
    ],
)
def test_command_that_rebuilds(monkeypatch, origin, command):
    """The command names the sources of the package, and turns off pip's cache, which holds the same library.

    If the sources are not known, there is a sentence instead of a command.
    """

    class Distribution:
        @staticmethod
        def read_text(name):
            return origin and json.dumps(origin)

    monkeypatch.setattr(build_info.metadata, "distribution", lambda name: Distribution)
    monkeypatch.setattr(build_info.Path, "exists", lambda path: "nonexistent" not in path.parts)
    monkeypatch.setattr(build_info.shutil, "which", lambda name: None if name == "nvcc" else f"/bin/{name}")
    monkeypatch.setattr(native, "built", lambda: {})
    monkeypatch.setattr(native, "missing", {"_eager": "not built"})
    if command:
        assert build_info.how_to_improve().endswith(command)
    else:
        assert build_info.how_to_improve() == "reinstall from the sources"
    monkeypatch.setattr(native, "missing", {"_cuda": "not built"})
    monkeypatch.setattr(torch.version, "cuda", "12.8")  # PyPI has nvcc from CUDA 13 on
    assert "FUSED_DROPOUT_BUILD" not in build_info.how_to_improve()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    improve = build_info.how_to_improve(TORCH_CUDA_ARCH_LIST="9.0")
    settings = "TORCH_CUDA_ARCH_LIST=9.0 FUSED_DROPOUT_BUILD=cuda"
    if command:
        assert improve.startswith(f"{settings} pip install ")
    else:
        assert improve == f"reinstall from the sources with {settings}"
    monkeypatch.setattr(native, "missing", {})
    assert build_info.how_to_improve() is None


def test_saying_so_leaves_the_process_as_it_was():
    """A search for pip would trigger a hook of setuptools, and Inductor could then not compile for the CPU."""
    code = """
import sys, warnings
sys.modules["fused_dropout._C"] = None
warnings.simplefilter("ignore")
import fused_dropout as fd
assert "pip install" in fd.backend_info().improve
import setuptools, distutils.core
assert "_distutils" in distutils.core.__file__, distutils.core.__file__
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
