"""Decides what to compile, compiles it, and reports it in three lines and in fused_dropout/_build.json.

With FUSED_DROPOUT_BUILD=auto, an extension that does not compile is left out, and the fallback runs instead. With
"cuda" and "cpu" the build fails. docs/environment.md lists the variables; build_backend/toolchain.py reads them.
"""

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.append("build_backend")
from toolchain import BUILD, CUDART, OLDEST, compile_alone, compiler, jobs, toolkit, torch, why_it_failed, why_nothing

SOURCES = {
    "_C": [
        "csrc/library.cpp",
        "csrc/dropout_cpu.cpp",
        "csrc/attention.cpp",
        *map(str, sorted(Path("csrc/simd").glob("*.cpp"))),
    ],
    "_cuda": ["csrc/dropout_cuda.cu"],
    "_eager": ["csrc/eager.cpp", "csrc/dropout_linear.cpp", "csrc/neighbours.cpp"],
}
ABI3_WHEEL = "--py-limited-api" in " ".join(sys.argv)
left_out = dict.fromkeys(SOURCES, why_nothing()) if why_nothing() else {}
if not toolkit.folder or BUILD == "cpu":
    left_out.setdefault("_cuda", toolkit.why_not or "FUSED_DROPOUT_BUILD=cpu")
if ABI3_WHEEL:
    left_out.setdefault("_eager", "it serves one Python and one torch, and this wheel all")
planned = [name for name in SOURCES if name not in left_out]
places = tempfile.TemporaryDirectory(prefix="fused_dropout-")  # a new folder: no file of an earlier build is reused


def extension(name, version):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    flags = ["-O3", f"-DFUSED_DROPOUT_VERSION={version}", f"-DFUSED_DROPOUT_TORCH={torch['__version__']}"]
    flags += ["-DUSE_CUDA", "-DFUSED_DROPOUT_CUDA"] * ("_cuda" not in left_out)
    flags += [f"-DTORCH_TARGET_VERSION=0x{OLDEST[0]:02x}{OLDEST[1]:02x}000000000000"] * (name != "_eager")
    options = {
        "cxx": [*flags, "-g0", "-fvisibility=hidden", "-ffp-contract=off"],
        # nvcc compiles each architecture separately, on one thread for each CPU, or on fewer if MAX_JOBS says so.
        "nvcc": [*flags, "-Xcompiler=-fvisibility=hidden", f"--threads={jobs(os.cpu_count() or 1)}"],
    }
    make = CppExtension if name == "_C" or "_cuda" in left_out else CUDAExtension
    made = make(f"fused_dropout.{name}", SOURCES[name], extra_compile_args=options, py_limited_api=name != "_eager")
    if "cudart" in made.libraries and CUDART == "static":
        made.libraries += ["cudart_static", "rt", "dl", "pthread"]
        made.libraries.remove("cudart")
    return made


def report(package):
    """Prints the result, and writes it to _build.json for ``fused_dropout/native.py``.

    Ends the build with an error if FUSED_DROPOUT_BUILD demands an extension that is left out.
    """
    built = [name for name in SOURCES if name not in left_out]
    info = {"built": built, "left_out": left_out} | ({"torch": torch["__version__"]} if built else {})
    if "_cuda" in built:
        info |= {"cuda": toolkit.version, "architectures": os.environ["TORCH_CUDA_ARCH_LIST"]}
    Path(package, "_build.json").write_text(json.dumps(info) + "\n")
    found = f"torch {torch and torch['__version__']}, compiler {compiler}, CUDA toolkit {toolkit.folder}"
    reasons = {why: ", ".join(name for name in left_out if left_out[name] == why) for why in left_out.values()}
    without = "; ".join(f"{names}, since {why}" for why, names in reasons.items())
    for what, those in (("found", found), ("built", ", ".join(built)), ("left out", without)):
        print("fused_dropout:", what, those or "nothing", file=sys.stderr)
    demanded = {"cpu": ["_C", "_eager"], "cuda": SOURCES}.get(BUILD, [])
    if [name for name in demanded if name in left_out and not (name == "_eager" and ABI3_WHEEL)]:
        raise SystemExit(f"FUSED_DROPOUT_BUILD={BUILD} asks for what is left out")


class BuildPy(build_py):
    def run(self):
        super().run()
        package = "fused_dropout" if self.editable_mode else f"{self.build_lib}/fused_dropout"
        for library in [file for name in SOURCES for file in Path(package).glob(f"{name}.*")]:
            library.unlink()  # built earlier
        if not self.distribution.ext_modules:
            report(package)


class Build(build_ext):
    """Compiles the extensions separately and in parallel, so that the failure of one does not stop the others."""

    def run(self):
        if "_cuda" not in left_out:
            os.environ["TORCH_CUDA_ARCH_LIST"] = toolkit.architectures(self.editable_mode)
            os.environ["CUDA_HOME"] = toolkit.folder  # cpp_extension reads it when it is imported
        extensions = self.distribution.ext_modules = [extension(n, self.distribution.get_version()) for n in planned]
        with ThreadPoolExecutor(jobs(len(planned))) as side_by_side:
            messages = list(side_by_side.map(lambda each: compile_alone(each, self, places.name), extensions))
        self.extensions = [each for each, message in zip(extensions, messages, strict=True) if not message]
        for name, message in filter(all, zip(planned, messages, strict=True)):
            print(message, file=sys.stderr)
            left_out[name] = why_it_failed(message)
        report("fused_dropout" if self.editable_mode else f"{self.build_lib}/fused_dropout")


setup(
    ext_modules=[Extension(f"fused_dropout.{name}", [], py_limited_api=name != "_eager") for name in planned],
    cmdclass={"build_py": BuildPy, "build_ext": Build},
    options={"build": {"build_base": places.name}, "egg_info": {"egg_base": places.name}},
)
