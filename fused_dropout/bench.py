"""``python -m fused_dropout bench``: nn.Dropout and fd.Dropout side by side on this machine, within two minutes.

The two take turns (ABAB...) on the same tensors in the same process, so that whatever slows the machine slows both. A
speed-up is the median, over the pairs of neighbours, of torch's time / fused_dropout's.
"""

import argparse
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import NormalDist, fmean, median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .modules import Dropout
from .native import backend_info

P = 0.1
SIZES = {"cpu": (2**10, 2**16, 2**20), "cuda": (2**12, 2**20, 2**26)}
DTYPES = ("float32", "bfloat16", "float16")
CASES = ("forward", "forward + backward", "in place")
MODULES = {"nn.Dropout": nn.Dropout, "fd.Dropout": Dropout}

_SPEED_SECONDS, _QUICK_SPEED_SECONDS = 65, 3  # for all the speeds together, whatever the number of devices
_SAMPLE_NS = 1e6  # long enough for the clock and for what a single call happens to meet
_MIN_PAIRS = 5
_IN_PLACE_CALLS = 64  # kept values grow by 1 / (1 - P) a call: 64 calls make that 849, which float16 still holds
_EPOCHS, _BATCH, _HIDDEN_P = 15, 64, 0.2


@dataclass(frozen=True)
class Speed:
    device: str
    dtype: str
    numel: int
    case: str
    p: float
    torch_ns: float  # per element; the median over the samples, as fd_ns
    fd_ns: float
    ratio: float  # of torch's time to ours: median, 10th and 90th percentile over the pairs of samples
    ratio_p10: float
    ratio_p90: float
    samples: int


@dataclass(frozen=True)
class SavedBytes:
    device: str
    dtype: str
    numel: int
    torch: int
    fd: int


@dataclass(frozen=True)
class DropRate:
    device: str
    module: str
    p: float
    draws: int
    rate: float
    low: float  # the ends of the 99 % confidence interval
    high: float
    inside: bool  # whether p is between them


@dataclass(frozen=True)
class Training:
    device: str
    module: str
    runs: int
    epochs: int
    accuracy: float  # on the test set, mean
    loss: float  # on the training set without dropout, mean
    seconds: float  # median


@dataclass(frozen=True)
class Step:
    kind: str  # of the records that run() gives
    label: str  # for the progress bar
    run: Callable[[], list]


def _time_cpu(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return time.perf_counter_ns() - start


def _time_cuda(call: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e6


def _forward_backward(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    module(x).backward(gradient)
    x.grad = None


def measure_speed(device: str, dtype: str, numel: int, case: str, seconds: float) -> list[Speed]:
    deadline = time.perf_counter() + seconds
    timer = _time_cuda if device == "cuda" else _time_cpu
    values = torch.randn(numel, device=device).to(getattr(torch, dtype))
    x = values.clone()
    modules = [module(P, inplace=case == "in place").train(case != "eval") for module in MODULES.values()]
    both = [partial(module, x) for module in modules]
    if case == "forward + backward":
        both = [partial(_forward_backward, module, x.requires_grad_(), torch.ones_like(x)) for module in modules]

    def time_one(call: Callable[[], object], calls: int) -> float:
        if case == "in place":
            x.copy_(values)
        return timer(call, calls)

    def time_pair(calls: int) -> list[float]:
        return [time_one(call, calls) for call in both]

    time_pair(3)  # warm-up, as is the search for the number of calls
    calls, limit = 1, _IN_PLACE_CALLS if case == "in place" else math.inf
    while min(time_pair(calls)) < _SAMPLE_NS and calls < limit:
        calls *= 2
    pairs = [time_pair(calls) for _ in range(_MIN_PAIRS)]
    while time.perf_counter() < deadline:
        pairs.append(time_pair(calls))
    torch_ns, fd_ns = (median(times) / (calls * numel) for times in zip(*pairs, strict=True))
    ratios = [torch_time / fd_time for torch_time, fd_time in pairs]
    p10, *_, p90 = quantiles(ratios, n=10, method="inclusive")
    return [Speed(device, dtype, numel, case, P, torch_ns, fd_ns, median(ratios), p10, p90, len(pairs))]


def measure_saved_bytes(device: str) -> list[SavedBytes]:
    """What autograd keeps from forward to backward, beside the input and the output."""
    x, nbytes = torch.randn(2**20, device=device, dtype=torch.float32, requires_grad=True), []
    for module in MODULES.values():
        saved: list[Tensor] = []
        with saved_tensors_hooks(saved.append, lambda packed: packed):  # there is no backward to unpack for
            y = module(P)(x)
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in saved)}
        there_anyway = {tensor.untyped_storage().data_ptr() for tensor in (x, y)}
        nbytes.append(sum(storages[address].nbytes() for address in storages.keys() - there_anyway))
    return [SavedBytes(device, "float32", x.numel(), *nbytes)]


def measure_drop_rate(device: str, name: str, p: float, draws: int) -> list[DropRate]:
    torch.manual_seed(0)  # one interval in a hundred misses p by chance: the same ones at each run
    module, ones = MODULES[name](p), torch.ones(2**20, device=device)
    rate = 1 - sum(int(module(ones).count_nonzero()) for _ in range(draws // ones.numel())) / draws
    half = NormalDist().inv_cdf(0.995) * math.sqrt(rate * (1 - rate) / draws)
    return [DropRate(device, name, p, draws, rate, rate - half, rate + half, abs(rate - p) <= half)]


def _train(dropout: type[nn.Module], data: list[Tensor], seed: int, epochs: int) -> tuple[float, float, float]:
    """Accuracy, loss and seconds. The seed gives the initial weights, the order of the batches and the dropout."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), dropout(_HIDDEN_P), nn.Linear(128, 64), nn.ReLU(), dropout(_HIDDEN_P)]
    model = nn.Sequential(*layers, nn.Linear(64, 10)).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    shuffle = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=shuffle).to(images.device).split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(images), labels).item()  # .item() waits for the GPU
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    return accuracy, loss, time.perf_counter() - start


def measure_training(device: str, runs: int) -> list[Training]:
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(array, device=device) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    train, test = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
    data = [tensor[part] for part in (train, test) for tensor in (images.float() / 16, labels)]
    for dropout in MODULES.values():
        _train(dropout, data, seed=0, epochs=1)  # warm-up
    results = [[_train(dropout, data, seed, _EPOCHS) for dropout in MODULES.values()] for seed in range(runs)]
    records = []
    for name, of_module in zip(MODULES, zip(*results, strict=True), strict=True):
        accuracy, loss, seconds = zip(*of_module, strict=True)
        records.append(Training(device, name, runs, _EPOCHS, fmean(accuracy), fmean(loss), median(seconds)))
    return records


def plan(device: str, quick: bool, share: float) -> Iterator[Step]:
    kinds = [*product(DTYPES, SIZES[device], CASES), ("float32", SIZES[device][1], "eval")]
    seconds = share * (_QUICK_SPEED_SECONDS if quick else _SPEED_SECONDS) / len(kinds)
    for dtype, numel, case in kinds:
        run = partial(measure_speed, device, dtype, numel, case, seconds)
        yield Step("speed", f"{device} {dtype} {_power(numel)} {case}", run)
    yield Step("saved_bytes", f"{device} saved bytes", partial(measure_saved_bytes, device))
    draws = 2**21 if quick or backend_info().devices[device] == "reference" else 2**24
    for p, name in product((0.1, 0.5), MODULES):
        yield Step("drop_rate", f"{device} drop rate of {name}", partial(measure_drop_rate, device, name, p, draws))
    if find_spec("sklearn"):
        yield Step("training", f"{device} training", partial(measure_training, device, 1 if quick else 3))


def execute(steps: Sequence[Step], report: dict[str, list]) -> None:
    """Runs the steps under a progress bar: one line redrawn on a terminal, a line now and then elsewhere."""
    start, on_terminal = time.perf_counter(), sys.stderr.isatty()
    for done, step in enumerate(steps):
        left = f", {(time.perf_counter() - start) / done * (len(steps) - done):.0f} s left" if done else ""
        line = f"[{'#' * (20 * done // len(steps)):20}] {done}/{len(steps)}  {step.label}{left}"
        if on_terminal:
            print(f"\r{line:79.79}", end="", file=sys.stderr, flush=True)
        elif done % 8 == 0:
            print(line, file=sys.stderr, flush=True)
        report[step.kind] += step.run()


def _power(numel: int) -> str:
    return f"2^{numel.bit_length() - 1}"


def _round(value: float) -> str:
    """Three significant digits, and no fewer before the point."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}" if value < 99999.5 else f"{value / 1000:.0f}k"


def _speed_cell(r: Speed | None) -> str:
    if r is None:
        return f"{'-':>6}{'-':>6}{'-':>7}{'':10}"
    torch_us, fd_us = (_round(ns * r.numel / 1e3) for ns in (r.torch_ns, r.fd_ns))
    return f"{torch_us:>6}{fd_us:>6}{_round(r.ratio):>6}x {_round(r.ratio_p10) + '-' + _round(r.ratio_p90):<9}"


def _speed_lines(records: Sequence[Speed], device: str) -> Iterator[str]:
    yield f"Microseconds a call, p = {P}; speed-up = torch / fd: median, 10th-90th percentile\n"
    yield " " * 13 + "".join(f" {' ' + case + ' ':-^27} " for case in CASES)
    yield f"{'dtype':9}{'size':4}" + f"{'torch':>6}{'fd':>6}  {'speed-up':<15}" * len(CASES)
    found = {(r.dtype, r.numel, r.case): r for r in records}
    for dtype, numel in product(DTYPES, SIZES[device]):
        yield f"{dtype:9}{_power(numel):4}" + "".join(_speed_cell(found.get((dtype, numel, case))) for case in CASES)
    if r := next((r for r in records if r.case == "eval"), None):
        us = f"torch {r.torch_ns * r.numel / 1e3:.2f}, fd {r.fd_ns * r.numel / 1e3:.2f}"
        yield f"\nIn eval mode ({r.dtype}, {_power(r.numel)}): {us}, {r.ratio:.2f}x"


def _other_lines(report: dict[str, list]) -> Iterator[str]:
    for r in report["saved_bytes"]:
        yield f"Saved for backward of {_power(r.numel)} {r.dtype}s: torch {r.torch:,} bytes, fd {r.fd:,} bytes"
    for i, r in enumerate(report["drop_rate"]):
        if i == 0:
            yield f"\nDrop rate over {_power(r.draws)} draws (seed 0), 99 % interval"
        verdict = "inside" if r.inside else "OUTSIDE (1 in 100 is, by chance)"
        yield f"  p = {r.p}  {r.module}  {r.rate:.6f}  [{r.low:.6f}, {r.high:.6f}]  p is {verdict}"
    for i, r in enumerate(report["training"]):
        if i == 0:
            yield f"\nTraining an MLP (64-128-64-10) on digits: dropout {_HIDDEN_P}, {r.epochs} epochs, runs: {r.runs}"
        yield f"  {r.module}  test accuracy {r.accuracy:.2%}  train loss {r.loss:.4f}  {r.seconds:.2f} s"
    if not find_spec("sklearn"):
        yield "\nTraining: skipped, there is no scikit-learn: pip install 'fused-dropout[bench]'"


def describe(report: dict[str, list], environment: dict[str, object], devices: Sequence[str]) -> Iterator[str]:
    info = backend_info()
    for device in devices:
        here = {kind: [r for r in records if r.device == device] for kind, records in report.items()}
        yield f"== {device}: {environment['cpu'] if device == 'cpu' else torch.cuda.get_device_name()}"
        yield f"torch {environment['torch']}, {environment['threads']} threads, load {environment['load']} at the start"
        yield from (line.rstrip(" ") for line in (*_speed_lines(here["speed"], device), *_other_lines(here), ""))
    served = ", ".join(f"{device}: {info.devices[device]}" for device in devices)
    yield from (f"note: {note}" for note in info.notes)
    yield f"Served by {served}; eager binding: {'yes' if info.eager else 'no'}"


def _search(path: str, pattern: str) -> str | None:
    found = re.search(pattern, Path(path).read_text()) if Path(path).exists() else None
    return found and found.group(1)


def describe_environment() -> dict[str, object]:
    """All but what was measured; load is what the machine was busy with before, so that noise has a name."""
    info = backend_info()
    return {
        "fused_dropout": info.version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _search("/proc/cpuinfo", r"model name\s*: (.*)") or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": _search("/proc/driver/nvidia/version", r"Kernel Module\D.*?\s(\d+\.[\d.]+)\s"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "backend_info": asdict(info),
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    there = list(backend_info().devices)
    parser = argparse.ArgumentParser("python -m fused_dropout bench", description="nn.Dropout and fd.Dropout compared")
    parser.add_argument("--json", type=Path, default="fused_dropout_bench.json", help="default: %(default)s")
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all", help="default: all that are there")
    parser.add_argument("--quick", action="store_true", help="a few seconds, and noisy: to see that it works")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's")
    options = parser.parse_args(argv)
    if options.device not in ("all", *there):
        parser.error(f"there is no {options.device} device")
    if not options.json.parent.is_dir():  # said now, not after two minutes
        parser.error(f"there is no folder {options.json.parent}")
    options.devices = there if options.device == "all" else [options.device]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes: everything, or at Ctrl-C what there is so far. Returns the exit code."""
    options = _parse(argv)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    steps = [step for device in options.devices for step in plan(device, options.quick, 1 / len(options.devices))]
    environment = describe_environment()
    report: dict[str, list] = {"speed": [], "saved_bytes": [], "drop_rate": [], "training": []}
    code, ending = 0, "Written to"
    try:
        execute(steps, report)
    except KeyboardInterrupt:
        code, ending = 130, "Interrupted; what was measured is in"
    if sys.stderr.isatty():
        print(f"\r{'':79}\r", end="", file=sys.stderr, flush=True)
    print("\n".join(describe(report, environment, options.devices)))
    options.json.write_text(json.dumps({"environment": environment, **report}, default=asdict, indent=1) + "\n")
    print(ending, options.json)
    return code
