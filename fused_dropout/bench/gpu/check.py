"""``python -m fused_dropout gpu-check``: tests and times the CUDA kernels on this GPU, in eight minutes.

Each part runs in a separate process, so that a crash, a hang or an unusable GPU does not affect the other parts. A part
yields records, which are printed and written to a file immediately.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...build_info import backend_info
from ..environment import describe_environment
from ..workloads import P
from . import correctness, graphs, speed
from .report import KINDS, Bandwidth, Check, Clocks, Note, Recorded, failed, kind_of, summary, write

SECONDS, QUICK_SECONDS = 440.0, 60.0
_GRACE = 20.0  # additional seconds for a part to finish what it has begun when its time is over
_LEAST = 8.0  # the import of torch may take almost this long, so a part does not start with less
_SMI_FIELDS = (
    "driver_version pstate clocks.sm clocks.mem clocks.max.sm clocks.max.mem temperature.gpu power.draw power.limit"
)


def measure(quick: bool, deadline: float) -> Iterator[Recorded]:
    yield Clocks("idle", nvidia_smi())
    if not quick and torch.cuda.mem_get_info()[0] > 1 << 32:
        yield Clocks("under load", under_load(nvidia_smi))
    yield from speed.host_times(0.3 if quick else 3.0)
    yield from speed.speeds(quick, deadline)


def under_load(ask: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Returns the result of ask(), called while the GPU has been copying for a second."""
    x, done = torch.randn(2, 1 << 28, device="cuda"), threading.Event()

    def copy() -> None:
        while not done.is_set():
            for _ in range(20):
                x[0].copy_(x[1])
            torch.cuda.synchronize()

    load = threading.Thread(target=copy)
    load.start()
    try:
        time.sleep(1.0)  # until the clocks have risen
        return ask()
    finally:
        done.set()
        load.join()


def sanitizer_verdict(status: int, output: str) -> tuple[str, str]:
    """The result and the detail of a run of compute-sanitizer. Ignores errors in kernels of other libraries."""
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=====")]
    ours = [line for line in lines if re.search("(dropout|window|write_keys)_kernel", line)]
    summary = [line for line in lines if "SUMMARY" in line]
    if not summary:
        return "skipped", f"it does not work here: status {status}: {(output.splitlines() or [''])[-1]}"
    if ours or status not in (0, 99):
        return "failed", f"status {status}: {'; '.join([*ours[:1], *summary])}"
    return "passed", "; ".join(summary)


def sanitize(quick: bool, deadline: float) -> Iterator[Recorded]:
    # No racecheck: no kernel uses shared memory.
    tool, names = shutil.which("compute-sanitizer"), ("memcheck", "initcheck")
    for done, name in enumerate(names):
        start = time.perf_counter()
        seconds = (deadline - start) / (len(names) - done)
        if tool is None or seconds < _LEAST:
            yield Check(f"compute-sanitizer {name}", "skipped", "not on PATH" if tool is None else "no time left")
            continue
        # Checks only our kernels, because torch's would take most of the time. The filter compares mangled names.
        options = ["--tool", name, "--error-exitcode", "99", "--show-backtrace", "no"]
        options += ["--kernel-name", "kernel_substring=fused_dropout"]
        try:
            verdict = sanitizer_verdict(*run_alone([tool, *options, *command("short", True, seconds)], seconds, True))
        except subprocess.TimeoutExpired:
            verdict = "skipped", f"not done after {seconds:.0f} s"
        yield Check(f"compute-sanitizer {name}", *verdict, time.perf_counter() - start)


@dataclass(frozen=True)
class Part:
    run: Callable[[bool, float], Iterator[Recorded]]
    weight: float  # its share of the time


# The time that a part does not use goes to the later parts.
PARTS = {
    "checks": Part(correctness.checks, 30),
    "graphs": Part(graphs.graphs, 6),
    "overlap": Part(correctness.overlaps, 4),
    "speed": Part(measure, 38),
    "sanitizer": Part(sanitize, 16),
    "block": Part(speed.blocks, 14),
}
_HIDDEN = {"short": Part(correctness.short, 0)}


def allot(left: float, part: str) -> float:
    """The seconds for a part: its share, by weight, of the time left for it and the later parts. 0: do not start it."""
    names = list(PARTS)
    share = left * PARTS[part].weight / sum(PARTS[name].weight for name in names[names.index(part) :])
    return 0.0 if left < _LEAST else max(share, _LEAST)


def command(part: str, quick: bool, seconds: float, path: Path | None = None) -> list[str]:
    there = ["--quick"] * quick + (["--json", str(path)] if path else [])
    return [sys.executable, "-m", "fused_dropout", "gpu-check", "--part", part, "--seconds", f"{seconds:.1f}", *there]


def run_alone(arguments: list[str], seconds: float, captured: bool = False) -> tuple[int, str]:
    """Runs a process. Returns its exit status, and its output if captured.

    Kills the process and its children if it takes longer than the seconds.
    """
    # A memory checker sees the end of a tensor only if the tensor is an allocation of its own.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if captured else {})
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if captured else {}
    process = subprocess.Popen(arguments, start_new_session=True, env=environment, text=True, **pipes)
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, output or ""


def nvidia_smi() -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    fields = _SMI_FIELDS.split()
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    for which in ([f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"], []) if tool else ():
        try:
            said = subprocess.run([str(tool), *which, *query], capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return dict(zip(fields, map(str.strip, said.stdout.splitlines()[0].split(",")), strict=False))
    return {}


def describe_machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    versions: dict[str, str | None] = {}
    for name in ("triton", "transformer_engine"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    found = {
        "name": gpu.name,
        "compute capability": f"{gpu.major}.{gpu.minor}",
        "processors": gpu.multi_processor_count,
        "memory, GiB": round(gpu.total_memory / 2**30, 1),
        "L2, MiB": round(gpu.L2_cache_size / 2**20, 1),
    }
    return {"gpu": found, "cuda": torch.version.cuda, **versions, **describe_environment()}


def missing() -> str:
    """The message about what is missing to run on this machine; empty if nothing is."""
    if torch.version.cuda is None:
        return f"gpu-check: torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"gpu-check: torch {torch.__version__} sees no CUDA device here; try nvidia-smi"
    if backend_info().devices["cuda"] != "native":
        wanted = f"cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]=={torch.version.cuda}.*"
        why = "; ".join(backend_info().notes)
        return f"gpu-check: there are no CUDA kernels to check ({why}); with nvcc or '{wanted}', install again"
    return ""


def run_part(part: Part, options: argparse.Namespace) -> int:
    """Runs a part in this process, prints the records, and writes each as a line of JSON.

    Returns 1 if a check failed, and 3 if the part itself failed.
    """
    signal.alarm(math.ceil(options.seconds + 2 * _GRACE))  # ends this process even if its parent is gone
    status, deadline = 0, time.perf_counter() + options.seconds
    with open(options.json or os.devnull, "a") as file:
        try:
            for record in part.run(options.quick, deadline):
                if not isinstance(record, Bandwidth) or record.implementation == "fd":  # the table has the rest
                    print(record, flush=True)
                print(json.dumps({"kind": kind_of(record), **asdict(record)}), file=file, flush=True)
                status |= isinstance(record, Check) and record.result == "failed"
        except Exception:
            traceback.print_exc()
            return 3
    return status


def run_parts(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Runs each part in a separate process, and adds its records to the report, even if the part failed."""
    end = time.perf_counter() + options.seconds
    for name in PARTS:
        seconds, trouble = allot(end - time.perf_counter(), name), ""
        if not seconds:
            report["note"].append(asdict(Note(f"no time left for the part {name}")))
            continue
        print(f"\n== {name}, {seconds:.0f} s at most", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path, start = Path(folder, "records"), time.perf_counter()
            try:
                status, _ = run_alone(command(name, options.quick, seconds, path), seconds + _GRACE)
                trouble = "" if status in (0, 1) else f"ended with status {status}"
            except subprocess.TimeoutExpired:
                trouble = f"was ended after {seconds + _GRACE:.0f} s"
            finally:
                for line in path.read_text().splitlines() if path.exists() else ():
                    record = json.loads(line)
                    report[record.pop("kind")].append(record)
        if trouble:
            report["check"].append(asdict(Check(f"part {name}", "failed", trouble, time.perf_counter() - start)))
            print(f"part {name} {trouble}", flush=True)


def report_path(given: Path | None, machine: dict[str, Any]) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", machine["gpu"]["name"].lower()).strip("-") + f"-torch{machine['torch']}"
    if given is None:
        return Path(f"fused_dropout_gpu_{name}.json")
    return given / f"{name}.json" if given.is_dir() else given


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m fused_dropout gpu-check", description="checks and measures on this GPU")
    where = "or a folder for it; default: fused_dropout_gpu_<gpu>-torch<version>.json"
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help=f"the report, {where}; Markdown and plots go beside it"
    )
    parser.add_argument("--quick", action="store_true", help="one minute: small sizes, and few measurements")
    parser.add_argument("--seconds", type=float, help=f"default: {SECONDS:.0f}, or {QUICK_SECONDS:.0f} with --quick")
    parser.add_argument("--part", choices=PARTS | _HIDDEN, help="only that, in this process; FILE gets a line a record")
    options = parser.parse_args(argv)
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    if options.json and not options.json.parent.is_dir():  # an error now is better than after eight minutes
        parser.error(f"there is no folder {options.json.parent}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 1 if a check failed, and 2 if this machine cannot run it.

    After Ctrl-C it writes the records that it has.
    """
    options = _parse(argv)
    if problem := missing():
        print(problem, file=sys.stderr)
        return 2
    if options.part:
        return run_part((PARTS | _HIDDEN)[options.part], options)
    machine, interrupted = describe_machine(), False
    used = {"seconds": options.seconds, "quick": options.quick, "p": P}
    report: dict[str, Any] = {"machine": machine, "options": used} | {name: [] for name in KINDS}
    print(f"{machine['gpu']['name']}, torch {machine['torch']}\n{backend_info()}", flush=True)
    try:
        run_parts(options, report)
    except KeyboardInterrupt:
        interrupted = True
    written = write(report, report_path(options.json, machine))
    print("", *summary(report), "Written: " + ", ".join(map(str, written)), sep="\n")
    return 130 if interrupted else int(bool(failed(report)))
