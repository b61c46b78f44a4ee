"""``python -m fused_dropout bench``: nn.Dropout and fd.Dropout side by side on this machine, within two minutes.

The two take turns (ABAB...) on the same tensors in the same process, so that whatever slows the machine slows both. A
speed-up is the median, over the pairs of neighbours, of torch's time / fused_dropout's. ``--full`` takes ten minutes,
more sizes, memory and whole models; ``--report DIR`` makes a page with plots of it.
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
from .environment import describe_environment
from .memory import measure_memory, measure_saved_bytes
from .quality import measure_drop_rate, measure_training
from .speed import CASES, DTYPES, FULL_SIZES, IDLE_CASES, SIZES, measure_model, measure_speed
from .tables import describe, power
from .workloads import MEMORY_WORKLOADS, MODULES, OF_TRANSFORMERS, WORKLOADS

KINDS = ("speed", "saved_bytes", "drop_rate", "training", "memory", "model")  # of records
_SPEED_SECONDS = {"quick": 3, "usual": 65, "full": 240}  # for all the speeds together, whatever the number of devices
_MODEL_SECONDS = 25  # for each, in the full form


@dataclass(frozen=True)
class Task:
    kind: str  # of the records that run() gives
    label: str  # for the progress bar
    run: Callable[[], list]


def plan(device: str, form: str, share: float) -> Iterator[Task]:
    """What to measure, in the form "quick", "usual" or "full"; share is this device's part of the time."""
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
            if compiled and workload in OF_TRANSFORMERS:  # a minute to compile, each
                continue
            model = partial(measure_model, device, workload, share * _MODEL_SECONDS / 2, compiled)
            yield Task("model", f"{device} {'compiled ' * compiled}{workload}", model)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, on a GPU or on the CPU. The CPU's allocator has no error class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def execute(tasks: Sequence[Task], report: dict[str, list]) -> None:
    """Runs the tasks under a progress bar: one line redrawn on a terminal, a line now and then elsewhere. A task that
    runs out of memory is noted under "skipped"."""
    start, on_terminal = time.perf_counter(), sys.stderr.isatty()
    for done, this in enumerate(tasks):
        left = f", {(time.perf_counter() - start) / done * (len(tasks) - done):.0f} s left" if done else ""
        line = f"[{'#' * (20 * done // len(tasks)):20}] {done}/{len(tasks)}  {this.label}{left}"
        if on_terminal:
            print(f"\r{line:79.79}", end="", file=sys.stderr, flush=True)
        elif done % 8 == 0:
            print(line, file=sys.stderr, flush=True)
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
    parser = argparse.ArgumentParser("python -m fused_dropout bench", description="nn.Dropout and fd.Dropout compared")
    parser.add_argument("--json", type=Path, default="fused_dropout_bench.json", help="default: %(default)s")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write a page with plots there: report.html and .md")
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all", help="default: all that are there")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="a few seconds, and noisy: to see that it works")
    form.add_argument("--full", action="store_true", help="ten minutes: all sizes, memory, whole models")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's")
    options = parser.parse_args(argv)
    if options.device not in ("all", *there):
        parser.error(f"there is no {options.device} device")
    if not options.json.parent.is_dir():  # said now, not after two minutes
        parser.error(f"there is no folder {options.json.parent}")
    if options.report and not find_spec("matplotlib"):
        parser.error("--report needs matplotlib: pip install 'fused-dropout[bench]'")
    options.devices = there if options.device == "all" else [options.device]
    options.form = "quick" if options.quick else "full" if options.full else "usual"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes: everything, or at Ctrl-C what there is so far. Returns the exit code."""
    options = _parse(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    tasks = [task for device in options.devices for task in plan(device, options.form, 1 / len(options.devices))]
    environment = describe_environment()
    report: dict[str, list] = {kind: [] for kind in (*KINDS, "skipped")}
    code, ending = 0, "Written to"
    try:
        execute(tasks, report)
    except KeyboardInterrupt:
        code, ending = 130, "Interrupted; what was measured is in"
    if sys.stderr.isatty():
        print(f"\r{'':79}\r", end="", file=sys.stderr, flush=True)
    result = {"environment": environment, "skipped": report["skipped"]}
    result |= {kind: [asdict(record) for record in report[kind]] for kind in KINDS}
    print("\n".join(describe(result)))
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(ending, options.json)
    if options.report:
        from .report import write_report

        print("Report:", write_report(result, options.report))
    return code
