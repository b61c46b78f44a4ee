"""Decides what to compile by what is there, builds it, and says so in three lines.

FUSED_DROPOUT_BUILD=auto|cuda|cpu|none (auto), FUSED_DROPOUT_CUDART=static|shared (static), TORCH_CUDA_ARCH_LIST.
With "auto" the fallback is installed when something is missing or does not compile; "cuda" and "cpu" then fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def setting(name, *allowed):
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise SystemExit(f"{name} has to be one of {', '.join(allowed)}, but is {value!r}")
    return value


def find_nvcc():
    """The toolkit's folder, asked of nvcc itself: on PATH it may be a wrapper script. Or the one of PyPI's packages."""
    packaged = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/bin/nvcc"))
    for nvcc in filter(None, [os.environ.get("CUDA_HOME", "") + "/bin/nvcc", shutil.which("nvcc"), *map(str, packaged)]):
        if os.access(nvcc, os.X_OK):
            said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
            if top := re.search(r"^#\$ TOP=(.+)$", said, re.M):
                return os.path.realpath(top[1])
    return None


BUILD = setting("FUSED_DROPOUT_BUILD", "auto", "cuda", "cpu", "none")
CUDART = setting("FUSED_DROPOUT_CUDART", "static", "shared")
left_out, extensions, commands, info = [], [], {}, {}

# Under build isolation the environment that will run is still this interpreter's own: build for the torch in it.
sys.path.append(sysconfig.get_paths()["purelib"])
try:
    import torch
except ImportError:
    torch = None
compiler = shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")
toolkit = find_nvcc() if torch and torch.version.cuda and BUILD in ("auto", "cuda") else None
if toolkit:
    os.environ["CUDA_HOME"] = toolkit
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")

if BUILD == "none":
    left_out.append("everything: FUSED_DROPOUT_BUILD=none")
elif not torch or not compiler:
    left_out.append("everything: " + ("no C++ compiler was found" if torch else "no torch was found"))
else:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    if not toolkit and BUILD != "cpu":
        left_out.append("CUDA: " + ("no nvcc was found" if torch.version.cuda else "this torch is built without it"))
    flags = ["-O3", "-fvisibility=hidden"]
    cuda = ["-DUSE_CUDA", "-DFUSED_DROPOUT_CUDA"] if toolkit else []
    # 2.11 is the oldest torch whose stable ABI the kernels are kept to.
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000", *cuda]
    kernels = (CUDAExtension if toolkit else CppExtension)(
        "fused_dropout._C",
        ["csrc/library.cpp", "csrc/dropout_cpu.cpp"] + ["csrc/dropout_cuda.cu"] * bool(toolkit),
        extra_compile_args={"cxx": [*flags, *stable], "nvcc": ["-O3", *stable]},
        py_limited_api=True,
    )
    eager = (CUDAExtension if toolkit else CppExtension)(
        "fused_dropout._eager", ["csrc/eager.cpp"], extra_compile_args={"cxx": [*flags, *cuda]}
    )
    for extension in (kernels, eager) if toolkit and CUDART == "static" else ():
        extension.libraries = [x for x in extension.libraries if x != "cudart"] + ["cudart_static", "rt", "dl", "pthread"]
    extensions = [kernels, eager]
    info = {"torch": torch.__version__, "cuda": torch.version.cuda if toolkit else None}
    info["architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"] if toolkit else None

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD != "auto":
                    raise
                print(f"fused_dropout: compiling failed, the pure-PyTorch fallback is installed: {error}", file=sys.stderr)
                info.clear()
                info["left_out"] = f"everything: compiling failed ({error})"
                write_info(self.inplace, self.build_lib)

    commands["build_ext"] = Build
if BUILD in ("cuda", "cpu") and (not extensions or (BUILD == "cuda" and not toolkit)):
    raise SystemExit(f"FUSED_DROPOUT_BUILD={BUILD}, but this cannot be built: {'; '.join(left_out)}")
info["left_out"] = "; ".join(left_out) or None


def write_info(inplace, build_lib):
    """Beside the modules, for fused_dropout/native.py: what was built for what, and what was not."""
    said = {name: value for name, value in info.items() if value}
    (HERE if inplace else Path(build_lib)).joinpath("fused_dropout", "_build.json").write_text(json.dumps(said) + "\n")


class BuildPy(build_py):
    def run(self):
        super().run()
        write_info(self.editable_mode, self.build_lib)


found = f"torch {torch.__version__ if torch else None}, C++ compiler {compiler}, CUDA toolkit {toolkit}"
built = "; ".join(e.name + (" (CPU and CUDA)" if toolkit else " (CPU)") for e in extensions) or "nothing (pure PyTorch)"
print(f"fused_dropout: found {found}\n  compiles {built}\n  leaves out {info['left_out'] or 'nothing'}", file=sys.stderr)
setup(ext_modules=extensions, cmdclass={**commands, "build_py": BuildPy}, setup_requires=[] if torch else ["torch"])
