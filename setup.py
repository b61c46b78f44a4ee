"""Decides what to compile by what is there, builds it, and says so in three lines.

FUSED_DROPOUT_BUILD=auto|cuda|cpu|none (auto), FUSED_DROPOUT_CUDART=static|shared (static), TORCH_CUDA_ARCH_LIST.
With "auto" the fallback is installed when something is missing or does not compile; "cuda" and "cpu" then fail."""

import importlib.util
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

SITE = Path(sysconfig.get_paths()["purelib"])
sys.path.append(str(SITE))  # under build isolation too: the torch to build for is the one that will run
torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None


def setting(name, *allowed):
    if (value := os.environ.get(name, allowed[0])) not in allowed:
        raise SystemExit(f"{name} has to be one of {', '.join(allowed)}, but is {value!r}")
    return value


def find_toolkit():
    """The CUDA toolkit's folder, asked of nvcc itself: on PATH it may be a wrapper. PyPI's packages come last."""
    folders = [os.environ.get("CUDA_HOME", "") + "/bin", os.environ.get("PATH", ""), *SITE.glob("nvidia/cu*/bin")]
    if nvcc := shutil.which("nvcc", path=os.pathsep.join(map(str, folders))):
        said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        return os.path.realpath(re.search(r"^#\$ TOP=(.+)$", said, re.M)[1])


BUILD = setting("FUSED_DROPOUT_BUILD", "auto", "cuda", "cpu", "none")
CUDART = setting("FUSED_DROPOUT_CUDART", "static", "shared")
compiler = shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")
missing = "no torch was found" if not torch else "no C++ compiler was found" if not compiler else ""
missing = "FUSED_DROPOUT_BUILD=none" if BUILD == "none" else missing
cuda = torch.version.cuda if torch else None
toolkit = find_toolkit() if cuda and BUILD in ("auto", "cuda") else None
no_cuda = "" if toolkit or BUILD == "cpu" else "no nvcc was found" if cuda else "this torch is built without it"
if BUILD in ("cuda", "cpu") and (missing or (BUILD == "cuda" and no_cuda)):
    raise SystemExit(f"FUSED_DROPOUT_BUILD={BUILD}, but this cannot be built: {missing or no_cuda}")
info = {"left_out": f"everything: {missing}" if missing else no_cuda and f"CUDA: {no_cuda}"}
extensions = []


def write_info(command, info):
    """Beside the modules, for fused_dropout/native.py: what was built for what, and what was not."""
    folder = Path("." if command.editable_mode else command.build_lib, "fused_dropout")
    folder.joinpath("_build.json").write_text(json.dumps({name: said for name, said in info.items() if said}) + "\n")


class BuildPy(build_py):
    def run(self):
        super().run()
        write_info(self, info)


commands = {"build_py": BuildPy}
if not missing:
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit  # cpp_extension reads it when it is imported
        said = subprocess.run([f"{toolkit}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
        common = ";".join(a for a in ("8.0", "9.0", "10.0") if "compute_" + a.replace(".", "") in said.split())
        native = "editable_wheel" in sys.argv and torch.cuda.is_available()  # for this machine's own use only
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "native" if native else common + "+PTX")
        info |= {"cuda": cuda, "architectures": os.environ["TORCH_CUDA_ARCH_LIST"]}
    info["torch"] = torch.__version__
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD != "auto":
                    raise
                write_info(self, {"left_out": f"everything: compiling failed ({error})"})

    commands["build_ext"] = Build
    Extension = CUDAExtension if toolkit else CppExtension
    flags = ["-O3", "-g0", "-fvisibility=hidden"] + ["-DUSE_CUDA", "-DFUSED_DROPOUT_CUDA"] * bool(toolkit)
    stable = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, the oldest whose stable ABI the kernels are kept to
    sources = ["csrc/library.cpp", *map(str, Path("csrc").glob("*cpu*.cpp")), *["csrc/dropout_cuda.cu"] * bool(toolkit)]
    options = {"cxx": [*flags, stable], "nvcc": ["-O3", "-DUSE_CUDA", stable]}
    kernels = Extension("fused_dropout._C", sources, extra_compile_args=options, py_limited_api=True)
    extensions = [kernels, Extension("fused_dropout._eager", ["csrc/eager.cpp"], extra_compile_args={"cxx": flags})]
    for libraries in [extension.libraries for extension in extensions if toolkit and CUDART == "static"]:
        libraries[libraries.index("cudart") : libraries.index("cudart") + 1] = ["cudart_static", "rt", "dl", "pthread"]

print(f"fused_dropout: found torch {torch and torch.__version__}, compiler {compiler}, CUDA {toolkit}", file=sys.stderr)
built = [extension.name for extension in extensions] or "nothing"
print(f"fused_dropout: compiles {built}\nfused_dropout: leaves out {info['left_out'] or 'nothing'}", file=sys.stderr)
setup(ext_modules=extensions, cmdclass=commands, setup_requires=[] if torch else ["torch"])
