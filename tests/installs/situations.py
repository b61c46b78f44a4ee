"""``make test-install``: the result of an installation, in each situation that docs/getting-started.md names.

Each test installs the sources of this tree into a new virtual environment, as that user would, and checks there which
implementation runs. The Makefile makes the environments with other versions of torch: .venv (CPU torch, which runs
this file), .venv-cuda (the newest) and .venv-oldest (2.11). A test is skipped if its environment is missing.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from environments import ROOT, Environment, clean, copy_of_the_sources, expected_digest, path_without

COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang", "nvcc")
NEWER = os.environ.get("TEST_INSTALL_CUDA", ROOT / ".venv-cuda")
OLDEST = os.environ.get("TEST_INSTALL_OLDEST", ROOT / ".venv-oldest")
FLOOR = os.environ.get("TEST_INSTALL_FLOOR", ROOT / ".venv-floor")
DIGEST = expected_digest()
AS_SDIST = "import toolchain; print(toolchain.build_sdist('dist'))"


@pytest.fixture(scope="module")
def folder():
    """A folder on the disk of the environments, because hard links cannot cross disks."""
    folder = ROOT / "build/installs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def sources(folder, request):
    return copy_of_the_sources(folder / f"source of {plain_name(request)}")


def plain_name(request):
    return re.sub(r"[^\w.]+", "-", request.node.name)  # pip takes brackets for extras


def fresh(folder, request, like=sys.prefix):
    if not Path(like, "bin/python").exists():
        pytest.skip(f"there is no {like}")
    return Environment(folder / f"venv-{plain_name(request)}-{time.time_ns()}", like)


@pytest.fixture
def cpu(folder, request):
    return fresh(folder, request)


@pytest.fixture
def cuda(folder, request):
    return fresh(folder, request, NEWER)


@pytest.fixture(scope="module")
def wheels(folder):
    """Two wheels of the CUDA build: for Python and torch of .venv-cuda, and for all, with ``make wheel``'s option."""
    if not Path(NEWER, "bin/python").exists():
        pytest.skip(f"there is no {NEWER}")
    environment = Environment(folder / "venv-wheels", NEWER)
    source = copy_of_the_sources(folder / "source of wheels")
    build = ("wheel", "--no-build-isolation", "--no-deps", "-w")
    settings = {"FUSED_DROPOUT_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    environment.pip(*build, folder / "own", source, **settings)
    environment.pip(
        *build, folder / "all", "--config-settings=--build-option=--py-limited-api=cp310", source, **settings
    )
    return next((folder / "own").glob("*.whl")), next((folder / "all").glob("*.whl"))


def serves(environment, *, eager, cuda=False):
    """Checks that the native kernels run, that the masks are the contract's, and that nothing warns."""
    info = environment.info()
    assert info["devices"]["cpu"] == "native", info
    assert info["eager"] == eager, info
    assert ("_cuda" in info["built"]["built"]) == cuda, info
    assert environment.digest() == DIGEST
    return info


def only_the_reference_serves(environment, why):
    info = environment.info()
    assert info["devices"]["cpu"] == "reference", info
    assert why in " ".join(info["notes"])
    assert len(environment.warnings()) == 1
    assert environment.digest() == DIGEST
    return info


def said(done):
    """The lines of our build in the output of pip -v."""
    return re.findall(r"^\s*fused_dropout: (found|built|left out) (.+)$", done.stdout + done.stderr, re.M)


def without_a_toolkit():
    """A command prefix that hides /usr/local/cuda."""
    toolkit = os.path.realpath("/usr/local/cuda")
    if not os.path.isdir(toolkit):
        return ()
    under = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {toolkit} && exec "$@"', "sh")
    if subprocess.run([*under, "true"], capture_output=True).returncode:
        pytest.skip("what hides the machine's CUDA toolkit is not allowed here")
    return under


def torchs_files(environment):
    return sorted(path.name for path in environment.site.glob("torch*"))


def test_1_torch_of_the_cpu_and_a_compiler(cpu, sources):
    """Also row 6: pip's build isolation, in which torch is not visible. The build prints three lines if asked to."""
    before = torchs_files(cpu)
    start = time.monotonic()
    done = cpu.pip("install", "-v", sources)
    print(f"pip install: {time.monotonic() - start:.0f} s")
    assert [what for what, _ in said(done)] == ["found", "built", "left out"]
    assert time.monotonic() - start < 90  # 60 on a quiet machine
    info = serves(cpu, eager=True)
    assert cpu.warnings() == []
    assert info["notes"] == []
    assert torchs_files(cpu) == before
    quiet = cpu.pip("install", "--force-reinstall", "--no-deps", sources, FUSED_DROPOUT_BUILD="none")
    assert "fused_dropout:" not in quiet.stdout + quiet.stderr


def test_2_torch_and_toolkit_of_one_cuda(cuda, sources):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    start = time.monotonic()
    cuda.pip("install", sources, TORCH_CUDA_ARCH_LIST="9.0", FUSED_DROPOUT_BUILD="cuda")
    print(f"pip install: {time.monotonic() - start:.0f} s")
    assert time.monotonic() - start < 120  # 90 on a quiet machine
    info = serves(cuda, eager=True, cuda=True)
    assert info["built"]["architectures"] == "9.0"
    assert not info["built"]["left_out"]


def test_3_nvcc_of_another_major_version(cuda, sources, tmp_path):
    """Builds for the CPU only and gives the reason. If CUDA is demanded, it takes nvcc from PyPI (test 4) or fails with
    this reason."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 9.2, V9.2.1\n")
    nvcc.chmod(0o755)
    settings = {"under": without_a_toolkit(), "PATH": f"{tmp_path}:{path_without('nvcc')}"}
    done = cuda.pip("install", "-v", sources, **settings)
    ((_, why),) = [line for line in said(done) if line[0] == "left out"]
    assert "_cuda, since there is no nvcc of CUDA" in why
    assert "is of CUDA 9.2" in why
    info = serves(cuda, eager=True)
    assert info["improve"].startswith("FUSED_DROPOUT_BUILD=cuda pip install")
    assert cuda.warnings() == []
    demanded = cuda.pip("install", "--no-build-isolation", sources, check=False, FUSED_DROPOUT_BUILD="cuda", **settings)
    assert demanded.returncode != 0
    assert "FUSED_DROPOUT_BUILD=cuda asks for what is left out" in demanded.stdout + demanded.stderr
    assert "Traceback" not in demanded.stdout + demanded.stderr


def test_4_no_nvcc(cuda, sources):
    """The command that ``info`` names gets nvcc from PyPI, for the build only."""
    settings = {"under": without_a_toolkit(), "PATH": path_without("nvcc")}
    cuda.pip("install", "--no-build-isolation", sources, FUSED_DROPOUT_BUILD="none")
    assert "FUSED_DROPOUT_BUILD=cuda" in cuda.info()["improve"]
    cuda.pip(
        "install",
        "--force-reinstall",
        "--no-deps",
        sources,
        **settings,
        FUSED_DROPOUT_BUILD="cuda",
        TORCH_CUDA_ARCH_LIST="9.0",
    )
    serves(cuda, eager=True, cuda=True)
    assert not list(cuda.site.glob("nvidia/cu*/bin/nvcc"))


def test_4_extra_cuda(cuda, sources):
    """The extra installs nvcc of torch's CUDA version beside torch, and later builds find it."""
    settings = {"under": without_a_toolkit(), "PATH": path_without("nvcc"), "TORCH_CUDA_ARCH_LIST": "9.0"}
    before = torchs_files(cuda)
    cuda.pip("install", f"{sources}[cuda]", **settings, FUSED_DROPOUT_BUILD="none")
    assert torchs_files(cuda) == before
    cuda.pip("install", "--force-reinstall", "--no-deps", "--no-build-isolation", sources, **settings)
    info = serves(cuda, eager=True, cuda=True)
    assert info["built"]["cuda"] == info["cuda"]


def test_5_no_compiler(cpu, sources):
    cpu.pip("install", sources, PATH=path_without(*COMPILERS))
    only_the_reference_serves(cpu, "no working C++ compiler")
    cpu.pip("install", "--force-reinstall", "--no-deps", sources, CXX="/bin/false")
    info = only_the_reference_serves(cpu, "no working C++ compiler: CXX is /bin/false")
    assert info["improve"].startswith("with CXX unset or naming a working C++ compiler")
    tests = [str(ROOT / "tests" / name) for name in ("test_mask.py", "test_keys.py", "test_gradients.py")]
    done = cpu.run("-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_6_another_torch_where_it_is_built(wheels, cpu):
    """As with uv and ``python -m build``: built for CUDA and a newer torch, run under a CPU torch."""
    own, _ = wheels
    cpu.pip("install", "--no-deps", own)
    info = cpu.info()
    assert info["devices"]["cpu"] == "native"
    assert not info["eager"]
    (warning,) = cpu.warnings()
    assert "eager binding" in warning
    assert "Better by: reinstall from the sources" in warning
    assert cpu.digest() == DIGEST


def test_7_torch_is_changed_after_the_installation(wheels, folder, request):
    """The kernels still run, and a one-line message tells how to get the eager binding back."""
    own, _ = wheels
    older = fresh(folder, request, OLDEST)
    older.pip("install", "--no-deps", own)
    info = older.info()
    assert info["torch"] != info["built"]["torch"]
    assert info["devices"]["cpu"] == "native"
    assert older.digest() == DIGEST
    (warning,) = older.warnings()
    assert info["built"]["torch"] in warning
    assert info["improve"] in warning


def test_8_sdist(cpu, sources):
    """The sdist and the wheel made from it hold all needed files and no others."""
    name = cpu.run("-c", AS_SDIST, cwd=sources, PYTHONPATH="build_backend").stdout.split()[-1]
    sdist = sources / "dist" / name
    with tarfile.open(sdist) as archive:
        held = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    tracked = {
        str(path.relative_to(sources))
        for top in ("build_backend", "csrc", "fused_dropout")
        for path in (sources / top).rglob("*")
        if path.is_file()
    }
    tops = {"LICENSE", "README.md", "CHANGELOG.md", "MANIFEST.in", "pyproject.toml", "setup.py"}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in held if "egg-info" not in name} == {
        name for name in tracked if not name.endswith((".pyc", "_build.json", ".so"))
    } | tops | made
    cpu.pip("install", sdist)
    serves(cpu, eager=True)
    assert cpu.warnings() == []
    installed = {path.name for path in cpu.package.rglob("*") if path.is_file()} - {"__pycache__"}
    assert {name for name in installed if not name.endswith((".py", ".pyc", ".so"))} == {"py.typed", "_build.json"}


def test_8_git(cpu, sources):
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):
        subprocess.run(["git", *command], cwd=sources, check=True)
    cpu.pip("install", f"git+file://{str(sources).replace(' ', '%20')}")
    serves(cpu, eager=True)


def test_9_one_wheel_for_all(wheels, cpu, folder, request):
    """The wheel is tagged cp310-abi3. It gives the same bits under every torch, for CPU and for CUDA."""
    _, wheel = wheels
    assert "-cp310-abi3-linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        libraries = {name for name in archive.namelist() if name.endswith(".so")}
        assert libraries == {"fused_dropout/_C.abi3.so", "fused_dropout/_cuda.abi3.so"}
    for environment in (cpu, fresh(folder, request, NEWER), fresh(folder, request, OLDEST)):
        environment.pip("install", "--no-deps", wheel)
        serves(environment, eager=False, cuda=True)
        assert environment.warnings() == []
        assert "eager binding not built" in " ".join(environment.info()["notes"])


def test_10_editable_reinstalled_uninstalled(cpu, sources):
    cpu.pip("install", "--no-build-isolation", "-e", sources)
    serves(cpu, eager=True)
    assert cpu.info()["improve"] is None
    cpu.pip("install", "--no-build-isolation", "-e", sources, FUSED_DROPOUT_BUILD="none")
    only_the_reference_serves(cpu, "FUSED_DROPOUT_BUILD=none")  # the libraries of the earlier build must not be loaded
    command = cpu.info()["improve"]
    assert command == f"pip install -e '{sources}'"
    cpu.pip(*shlex.split(command)[1:])  # the printed command works
    serves(cpu, eager=True)
    cpu.pip("install", "--no-build-isolation", sources, FUSED_DROPOUT_BUILD="cpu")
    assert cpu.package.exists()
    serves(cpu, eager=True)
    cpu.pip("install", "--no-build-isolation", "--force-reinstall", "--no-deps", sources, FUSED_DROPOUT_BUILD="none")
    only_the_reference_serves(cpu, "FUSED_DROPOUT_BUILD=none")
    cpu.pip("uninstall", "-y", "fused-dropout")
    assert not [path for path in cpu.site.iterdir() if "fused" in path.name]


def test_10_uv(cpu, sources):
    """With uv's build isolation the environment is hidden. Without isolation uv builds for the installed torch."""
    cpu.pip("install", "-q", "uv")
    uv = ("-m", "uv", "pip", "install", "--python", str(cpu.python))
    before = torchs_files(cpu)
    cpu.run(*uv, "--no-build-isolation", str(sources))
    serves(cpu, eager=True)
    cpu.run("-m", "uv", "pip", "uninstall", "--python", str(cpu.python), "fused-dropout")
    assert not cpu.package.exists()
    assert torchs_files(cpu) == before


def test_11_two_builds_at_once_in_an_odd_place(folder, request):
    """Two builds of one read-only tree, with spaces and letters in its path, without a home directory."""
    odd = copy_of_the_sources(folder / "ein Ordner, größer 日本" / "fused dropout")
    files = sorted(odd.rglob("*"))
    two = [fresh(folder, request), Environment(folder / "noch ein größerer Ordner", sys.prefix)]
    under = without_writing_to(odd)
    commands = [
        [*under, environment.python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(odd)]
        for environment in two
    ]
    environment = clean(HOME=None, PIP_NO_CACHE_DIR="1", TORCH_EXTENSIONS_DIR=None)
    both = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    for each in two:
        serves(each, eager=True)
    assert sorted(odd.rglob("*")) == files


def without_writing_to(folder):
    under = ("unshare", "--mount", "sh", "-c", f'mount --bind -o ro "{folder}" "{folder}" && exec "$@"', "sh")
    if subprocess.run([*under, "true"], capture_output=True).returncode:
        pytest.skip("a read-only mount is not allowed here")
    return under


@pytest.mark.parametrize(
    "version", ["2.8.0a0+5228986c39.nv25.05", "2.11.0a0+b5c9cb3ab8.nv26.01", "2.12.0.dev20260401+cu130"]
)
def test_12_no_torch_is_replaced(cpu, sources, version):
    """Vendor and nightly builds of torch satisfy the requirement, for pip and for uv."""
    (metadata,) = cpu.site.glob("torch-*.dist-info")
    renamed = metadata.with_name(f"torch-{version}.dist-info")
    text = (metadata / "METADATA").read_text()
    if renamed != metadata:
        shutil.copytree(metadata, renamed)
        shutil.rmtree(metadata)
        (renamed / "METADATA").unlink()  # a hard link
        (renamed / "METADATA").write_text(text.replace(f"Version: {torch.__version__}\n", f"Version: {version}\n", 1))
    done = cpu.pip("install", "--no-build-isolation", sources, FUSED_DROPOUT_BUILD="none")
    assert "Collecting torch" not in done.stdout
    assert cpu.run("-c", "from importlib.metadata import version; print(version('torch'))").stdout.strip() == version
    cpu.pip("install", "-q", "uv")
    uv = ("-m", "uv", "pip", "install", "--dry-run", "--python", str(cpu.python), "--no-build-isolation", str(sources))
    planned = cpu.run(*uv, FUSED_DROPOUT_BUILD="none").stderr
    assert re.search(r"^ [-+~] fused-dropout==", planned, re.M)
    assert not re.search(r"^ [-+~] torch==", planned, re.M)


def test_12_a_torch_that_the_kernels_do_not_serve(folder, request, sources):
    """The fallback works, and passes its tests, from the lowest torch that the metadata allows."""
    floor = fresh(folder, request, FLOOR)
    before = torchs_files(floor)
    floor.pip("install", "--no-build-isolation", sources)
    only_the_reference_serves(floor, "they need torch 2.11")
    assert torchs_files(floor) == before
    asked = re.search(
        r"^Requires-Dist: torch>=([\d.]+)\.0\.dev0$",
        next(floor.site.glob("fused_dropout-*/METADATA")).read_text(),
        re.M,
    )
    assert floor.info()["torch"].startswith(asked[1])
    names = ["mask", "layouts", "gradients", "operators", "dropin", "family", "noise_shape", "keys", "composition"]
    names += ["compile", "convert", "patch"]
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
    options = ("-q", "-p", "no:cacheprovider", "-m", "not gpu")
    done = floor.run("-W", "ignore", "-m", "pytest", *options, *tests, check=False)
    print(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-3000:]


def test_13_cuda_runtime_is_static(wheels):
    """The wheel therefore requires no version of the CUDA runtime."""
    _, wheel = wheels
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract("fused_dropout/_cuda.abi3.so", wheel.parent))
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", said))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= needed
    assert not {name for name in needed if re.match(r"libcu|libnv|libpython|libtorch_python", name)}


def test_compile_error_is_the_compilers_own(cpu, sources):
    """A part that does not compile is left out. If it was demanded, the build fails with the compiler's message."""
    (sources / "csrc/eager.cpp").write_text('#include "there_is_no_such_header.h"\n')
    done = cpu.pip("install", "-v", "--no-build-isolation", sources)
    assert dict(said(done))["left out"].count("there_is_no_such_header.h: No such file") == 1
    info = serves(cpu, eager=False)
    assert "there_is_no_such_header.h: No such file" in " ".join(info["notes"])
    demand = ("install", "--no-build-isolation", "--force-reinstall", "--no-deps", sources)
    failed = cpu.pip(*demand, check=False, FUSED_DROPOUT_BUILD="cpu")
    assert failed.returncode != 0
    text = failed.stdout + failed.stderr
    assert "there_is_no_such_header.h: No such file" in text
    assert "FUSED_DROPOUT_BUILD=cpu asks for what is left out" in text
    assert "Traceback" not in text
    assert len(text.splitlines()) < 40
    (sources / "csrc/mask.h").write_text("#error no mask\n")
    cpu.pip(*demand)
    only_the_reference_serves(cpu, "no mask")


def test_unknown_setting(cpu, sources):
    for name, allowed in {"BUILD": "auto, cuda, cpu, none", "CUDART": "static, shared"}.items():
        done = cpu.pip("install", "--no-build-isolation", sources, check=False, **{f"FUSED_DROPOUT_{name}": "fast"})
        assert done.returncode != 0
        assert f"FUSED_DROPOUT_{name} has to be one of {allowed}, but is 'fast'" in done.stdout + done.stderr


def test_metadata(wheels):
    """torch is the only runtime requirement."""
    with zipfile.ZipFile(wheels[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = archive.read(name).decode()
    needed = [line for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.M) if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line)[0] for line in needed] == ["torch"]
    assert set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.M)) >= {"bench", "test", "dev", "cuda", "examples"}
    assert "License-Expression: BSD-3-Clause" in metadata
