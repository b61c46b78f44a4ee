"""``python -m fused_dropout bench``: compares nn.Dropout and fd.Dropout on this machine, within two minutes.

The two take turns (ABAB...) on the same tensors in the same process, so that a slow phase of the machine slows both.
The speed-up is the median of torch's time / fused_dropout's time over the pairs of neighbouring samples. ``--full``
takes ten minutes, and adds sizes, memory and whole models. Only ``--json`` and ``--report`` write files.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

from ..build_info import backend_info
from .environment import cpu_share, describe_environment
from .memory import measure_memory, measure_saved_bytes
from .progress import progress
from .quality import measure_drop_rate, measure_training
from .speed import CASES, DTYPES, FULL_SIZES, IDLE_CASES, SIZES, measure_model, measure_speed
from .tables import busy, describe, power
from .workloads import MEMORY_WORKLOADS, MODULES, OF_TRANSFORMERS, WORKLOADS

KINDS = ("speed", "saved_bytes", "drop_rate", "training", "memory", "model")  # the kinds of records
_SPEED_SECONDS = {"quick": 3, "usual": 65, "full": 240}  # for all speed measurements together, on all devices
_MODEL_SECONDS = 25  # for each model in the full form


@dataclass(frozen=True)
class Task:
    kind: str  # the kind of the records that run() returns
    label: str  # for the progress bar
    run: Callable[[], list]


def plan(device: str, form: str, share: float) -> Iterator[Task]:
    """Lists what to measure. form: "quick", "usual" or "full". share: this device's part of the time."""
    sizes = (FULL_SIZES if form == "full" else SIZES)[device]
    kinds = [*product(DTYPES, sizes, CASES), ("float32", SIZES[device][1], "eval")]
    if form == "full":
        kinds = list(product(DTYPES, sizes, CASES + IDLE_CASES))
    seconds = share * _SPEED_SECONDS[form] / len(kinds)
    for dtype, numel, case in kinds:
        run = partial(measure_speed, device, dtype, numel, case, seconds)
        yield Task("speed", f"{device} {dtype} {power(numel)} {case}", run)
    yield Task("saved_bytes", f"{device} saved bytes", partial(measure_saved_bytes, device))
    draws = 2**21 if form == "quick" or backend_info().devices[device] == "reference" else 2**24
    for p, name in product((0.1, 0.5), MODULES):
        yield Task("drop_rate", f"{device} drop rate of {name}", partial(measure_drop_rate, device, name, p, draws))
    if find_spec("sklearn"):
        runs = {"quick": 1, "usual": 3, "full": 5}[form]
        yield Task("training", f"{device} training", partial(measure_training, device, runs))
    if form == "full":
        for workload in MEMORY_WORKLOADS:
            yield Task("memory", f"{device} memory of {workload}", partial(measure_memory, device, workload))
        for workload, compiled in product(WORKLOADS, (False, True)):
            if compiled and workload in OF_TRANSFORMERS:  # each would take a minute to compile
                continue
            model = partial(measure_model, device, workload, share * _MODEL_SECONDS / 2, compiled)
            yield Task("model", f"{device} {'compiled ' * compiled}{workload}", model)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, on a GPU or on the CPU. The error of the CPU's allocator is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def execute(tasks: Sequence[Task], report: dict[str, list], threads: int) -> None:
    """Runs the tasks, and adds their records to the report.

    A task that runs out of memory is listed under "skipped". About once a second ``cpu_share(threads)`` is added to
    "cpu_shares".
    """
    probed = time.perf_counter()
    for this in progress(tasks, lambda task: task.label):
        if time.perf_counter() - probed > 1:
            report["cpu_shares"].append(cpu_share(threads))
            probed = time.perf_counter()
        try:
            report[this.kind] += this.run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            report["skipped"].append(f"{this.label}: not enough memory")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    there = list(backend_info().devices)
    parser = argparse.ArgumentParser(
        "python -m fused_dropout bench",
        description="Measures nn.Dropout and fd.Dropout side by side on this machine and prints tables: speed, memory, "
        "drop rate, and the training of a small network. Takes two minutes.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.html and report.md, with plots, there")
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all", help="default: all that are there")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="ten seconds: to see that it works; the numbers are noisy")
    form.add_argument("--full", action="store_true", help="ten minutes: all sizes, memory, whole models")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch; default: as many as it takes")
    options = parser.parse_args(argv)
    if options.device not in ("all", *there):
        parser.error(f"there is no {options.device} device")
    if options.json and not options.json.parent.is_dir():  # an error now is better than after two minutes
        parser.error(f"there is no folder {options.json.parent}")
    if options.json and options.json.is_dir():
        parser.error(f"--json takes a file, and {options.json} is a folder")
    if options.report and not find_spec("matplotlib"):
        parser.error("--report needs matplotlib: pip install 'fused-dropout[bench]'")
    options.devices = there if options.device == "all" else [options.device]
    options.form = "quick" if options.quick else "full" if options.full else "usual"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results. After Ctrl-C it writes those that it has. Returns the exit code."""
    options = _parse(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    tasks = [task for device in options.devices for task in plan(device, options.form, 1 / len(options.devices))]
    environment = describe_environment()
    report: dict[str, list] = {kind: [] for kind in (*KINDS, "skipped", "cpu_shares")}
    threads = (
        torch.get_num_threads() if "cpu" in options.devices else 1
    )  # a GPU needs one thread, which launches kernels
    report["cpu_shares"] = [cpu_share(threads) for _ in range(5)]
    for line in busy(report["cpu_shares"]):
        print(line, file=sys.stderr, flush=True)
    code = 0
    try:
        execute(tasks, report, threads)
    except KeyboardInterrupt:
        code = 130
    result = {"environment": environment, "skipped": report["skipped"], "cpu_shares": report["cpu_shares"]}
    result |= {kind: [asdict(record) for record in report[kind]] for kind in KINDS}
    print("\n".join(describe(result)))
    if code:
        print("Interrupted: the tables hold what was measured before.")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print("Numbers:", options.json)
    if options.report:
        from .report import write_report

        print("Report:", write_report(result, options.report))
    if not options.json and not options.report:
        print("Nothing was saved: --json FILE saves the numbers, --report DIR a page with plots.")
    return code
