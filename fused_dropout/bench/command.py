"""``python -m fused_dropout bench``: nn.Dropout and fd.Dropout side by side on this machine, within two minutes.

The two take turns (ABAB...) on the same tensors in the same process, so that whatever slows the machine slows both. A
speed-up is the median, over the pairs of neighbours, of torch's time / fused_dropout's. ``--full`` takes ten minutes,
more sizes, memory and whole models; ``--report DIR`` makes a page with plots of it.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
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
from torch.utils.checkpoint import checkpoint

from ..build_info import backend_info
from ..modules import Dropout
from .tables import describe, power
from .workloads import MEMORY_WORKLOADS, WORKLOADS, step, swap

P = 0.1
SIZES = {"cpu": (2**10, 2**16, 2**20), "cuda": (2**12, 2**20, 2**26)}
FULL_SIZES = {"cpu": tuple(2**k for k in range(6, 27, 2)), "cuda": tuple(2**k for k in range(10, 31, 2))}
DTYPES = ("float32", "bfloat16", "float16")
CASES = ("forward", "forward + backward", "in place")
IDLE_CASES = ("eval", "p = 0")  # in which nothing is dropped
MODULES = {"nn.Dropout": nn.Dropout, "fd.Dropout": Dropout}

_SPEED_SECONDS = {"quick": 3, "usual": 65, "full": 240}  # for all the speeds together, whatever the number of devices
_MODEL_SECONDS = 25  # for each, in the full form
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
    floor_ns: float | None = None  # a multiply's (CPU) or a copy's (CUDA), forward and in place


@dataclass(frozen=True)
class Memory:
    device: str
    workload: str
    module: str
    checkpointed: bool
    saved: int  # bytes kept for backward, beside parameters, input and output
    peak: int  # bytes above what there was before: of the allocator on CUDA, of the process on a CPU


@dataclass(frozen=True)
class Model:
    device: str
    workload: str
    module: str  # "nn.Dropout", "fd.Dropout" or "p = 0"
    compiled: bool
    seconds: float  # a step, forward and backward: median
    ratio: float  # of nn.Dropout's time, equally compiled, to this: median, 10th and 90th percentile
    ratio_p10: float
    ratio_p90: float


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
    curve: list[float]  # the loss of each epoch's batches, with dropout, mean


KINDS = ("speed", "saved_bytes", "drop_rate", "training", "memory", "model")  # of records


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


def _floor(x: Tensor, in_place: bool) -> Callable[[], object]:
    """What moves the same bytes and does next to nothing: a multiply, or on CUDA a copy."""
    if x.is_cuda:
        return partial((x if in_place else torch.empty_like(x)).copy_, torch.empty_like(x))
    return partial(x.mul_, 1.0) if in_place else partial(torch.mul, x, 1.1)


def _spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    p10, *_, p90 = quantiles(ratios, n=10, method="inclusive")
    return median(ratios), p10, p90


def measure_speed(device: str, dtype: str, numel: int, case: str, seconds: float) -> list[Speed]:
    deadline = time.perf_counter() + seconds
    timer = _time_cuda if device == "cuda" else _time_cpu
    values = torch.randn(numel, device=device).to(getattr(torch, dtype))
    x = values.clone()
    p = 0.0 if case == "p = 0" else P
    modules = [module(p, inplace=case == "in place").train(case != "eval") for module in MODULES.values()]
    contenders: list[Callable[[], object]] = [partial(module, x) for module in modules]
    if case == "forward + backward":
        gradient = torch.ones_like(x)
        contenders = [partial(_forward_backward, module, x.requires_grad_(), gradient) for module in modules]
    if case in ("forward", "in place"):
        contenders.append(_floor(x, case == "in place"))

    def time_one(call: Callable[[], object], calls: int) -> float:
        if case == "in place":
            x.copy_(values)
        return timer(call, calls)

    def time_all(calls: int) -> list[float]:
        return [time_one(call, calls) for call in contenders]

    time_all(3)  # warm-up, as is the search for the number of calls
    calls, limit = 1, _IN_PLACE_CALLS if case == "in place" else math.inf
    while min(time_all(calls)) < _SAMPLE_NS and calls < limit:
        calls *= 2
    rounds = [time_all(calls) for _ in range(_MIN_PAIRS)]
    while time.perf_counter() < deadline:
        rounds.append(time_all(calls))
    torch_ns, fd_ns, *floor = (median(times) / (calls * numel) for times in zip(*rounds, strict=True))
    middle, p10, p90 = _spread([torch_time / fd_time for torch_time, fd_time, *_ in rounds])
    floor_ns = floor[0] if floor else None
    return [Speed(device, dtype, numel, case, p, torch_ns, fd_ns, middle, p10, p90, len(rounds), floor_ns)]


def _saved_bytes(run: Callable[[], Tensor], there_anyway: Sequence[Tensor]) -> int:
    """What autograd keeps from forward to backward, beside the tensors given and the output."""
    saved: list[Tensor] = []
    with saved_tensors_hooks(saved.append, lambda packed: packed):  # there is no backward to unpack for
        output = run()
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in saved)}
    excepted = {tensor.untyped_storage().data_ptr() for tensor in (*there_anyway, output)}
    return sum(storages[address].nbytes() for address in storages.keys() - excepted)


def measure_saved_bytes(device: str) -> list[SavedBytes]:
    x = torch.randn(2**20, device=device, dtype=torch.float32, requires_grad=True)
    nbytes = [_saved_bytes(partial(module(P), x), [x]) for module in MODULES.values()]
    return [SavedBytes(device, "float32", x.numel(), *nbytes)]


def _peak_bytes(device: str, run: Callable[[], object]) -> int:
    """By how much memory rose at most: the allocator's on CUDA, the process's on a CPU (Linux only, else -1)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return -1
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what the allocator keeps for later would hide a rise
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    return int(_search("/proc/self/status", rf"{name}:\s+(\d+) kB") or 0) * 1024


def measure_memory(device: str, workload: str) -> list[Memory]:
    records = []
    for (name, dropout), checkpointed in product(MODULES.items(), (False, True)):
        model, x = MEMORY_WORKLOADS[workload]()
        model, x = (model if dropout is nn.Dropout else swap(model)).to(device), x.to(device).requires_grad_()
        run = partial(checkpoint, model, x, use_reentrant=False) if checkpointed else partial(model, x)
        inputs = [x, *model.parameters()]

        def forward_backward(run: Callable[[], Tensor] = run, inputs: list[Tensor] = inputs) -> None:
            torch.autograd.grad(run().sum(), inputs)

        forward_backward()  # allocates what stays
        saved = _saved_bytes(run, inputs)
        records.append(Memory(device, workload, name, checkpointed, saved, _peak_bytes(device, forward_backward)))
    return records


def measure_model(device: str, workload: str, seconds: float, compiled: bool) -> list[Model]:
    timer = _time_cuda if device == "cuda" else _time_cpu
    model, x = WORKLOADS[workload]()
    model, x = model.to(device), x.to(device)
    models = {"nn.Dropout": model, "fd.Dropout": swap(deepcopy(model)), "p = 0": deepcopy(model)}
    for module in models["p = 0"].modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    calls = []
    for module in models.values():
        run = torch.compile(module) if compiled else module
        calls.append(partial(step, run, list(module.parameters()), x))
    for call in calls:
        call(), call()
    deadline = time.perf_counter() + seconds
    rounds: list[list[float]] = []
    while len(rounds) < _MIN_PAIRS or time.perf_counter() < deadline:
        rounds.append([timer(call, 1) for call in calls])
    records = []
    for i, name in enumerate(models):
        ratios = [times[0] / times[i] for times in rounds]
        taken = median(times[i] for times in rounds) / 1e9
        records.append(Model(device, workload, name, compiled, taken, *_spread(ratios)))
    return records


def measure_drop_rate(device: str, name: str, p: float, draws: int) -> list[DropRate]:
    torch.manual_seed(0)  # one interval in a hundred misses p by chance: the same ones at each run
    module, ones = MODULES[name](p), torch.ones(2**20, device=device)
    rate = 1 - sum(int(module(ones).count_nonzero()) for _ in range(draws // ones.numel())) / draws
    half = NormalDist().inv_cdf(0.995) * math.sqrt(rate * (1 - rate) / draws)
    return [DropRate(device, name, p, draws, rate, rate - half, rate + half, abs(rate - p) <= half)]


def _train(dropout: type[nn.Module], data: list[Tensor], seed: int, epochs: int) -> tuple[float, float, float, Tensor]:
    """Accuracy, loss, seconds, loss by epoch. The seed gives initial weights, the batches' order and the dropout."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), dropout(_HIDDEN_P), nn.Linear(128, 64), nn.ReLU(), dropout(_HIDDEN_P)]
    model = nn.Sequential(*layers, nn.Linear(64, 10)).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    shuffle = torch.Generator().manual_seed(seed)
    curve = torch.zeros(epochs, device=images.device)
    start = time.perf_counter()
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels), generator=shuffle).to(images.device).split(_BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            curve[epoch] += loss.detach() * len(batch) / len(labels)
    with torch.no_grad():
        final = F.cross_entropy(model.eval()(images), labels).item()  # .item() waits for the GPU
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    return accuracy, final, time.perf_counter() - start, curve.cpu()


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
        accuracy, loss, seconds, curves = zip(*of_module, strict=True)
        curve = torch.stack(curves).mean(0).tolist()
        records.append(Training(device, name, runs, _EPOCHS, fmean(accuracy), fmean(loss), median(seconds), curve))
    return records


def plan(device: str, form: str, share: float) -> Iterator[Step]:
    """What to measure, in the form "quick", "usual" or "full"; share is this device's part of the time."""
    sizes = (FULL_SIZES if form == "full" else SIZES)[device]
    kinds = [*product(DTYPES, sizes, CASES), ("float32", SIZES[device][1], "eval")]
    if form == "full":
        kinds = list(product(DTYPES, sizes, CASES + IDLE_CASES))
    seconds = share * _SPEED_SECONDS[form] / len(kinds)
    for dtype, numel, case in kinds:
        run = partial(measure_speed, device, dtype, numel, case, seconds)
        yield Step("speed", f"{device} {dtype} {power(numel)} {case}", run)
    yield Step("saved_bytes", f"{device} saved bytes", partial(measure_saved_bytes, device))
    draws = 2**21 if form == "quick" or backend_info().devices[device] == "reference" else 2**24
    for p, name in product((0.1, 0.5), MODULES):
        yield Step("drop_rate", f"{device} drop rate of {name}", partial(measure_drop_rate, device, name, p, draws))
    if find_spec("sklearn"):
        runs = {"quick": 1, "usual": 3, "full": 5}[form]
        yield Step("training", f"{device} training", partial(measure_training, device, runs))
    if form == "full":
        for workload in MEMORY_WORKLOADS:
            yield Step("memory", f"{device} memory of {workload}", partial(measure_memory, device, workload))
        for workload, compiled in product(WORKLOADS, (False, True)):
            model = partial(measure_model, device, workload, share * _MODEL_SECONDS / 2, compiled)
            yield Step("model", f"{device} {'compiled ' * compiled}{workload}", model)


def execute(steps: Sequence[Step], report: dict[str, list]) -> None:
    """Runs the steps under a progress bar: one line redrawn on a terminal, a line now and then elsewhere."""
    start, on_terminal = time.perf_counter(), sys.stderr.isatty()
    for done, this in enumerate(steps):
        left = f", {(time.perf_counter() - start) / done * (len(steps) - done):.0f} s left" if done else ""
        line = f"[{'#' * (20 * done // len(steps)):20}] {done}/{len(steps)}  {this.label}{left}"
        if on_terminal:
            print(f"\r{line:79.79}", end="", file=sys.stderr, flush=True)
        elif done % 8 == 0:
            print(line, file=sys.stderr, flush=True)
        report[this.kind] += this.run()


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
    steps = [step for device in options.devices for step in plan(device, options.form, 1 / len(options.devices))]
    environment = describe_environment()
    report: dict[str, list] = {kind: [] for kind in KINDS}
    code, ending = 0, "Written to"
    try:
        execute(steps, report)
    except KeyboardInterrupt:
        code, ending = 130, "Interrupted; what was measured is in"
    if sys.stderr.isatty():
        print(f"\r{'':79}\r", end="", file=sys.stderr, flush=True)
    result = {"environment": environment, **{kind: [asdict(r) for r in records] for kind, records in report.items()}}
    print("\n".join(describe(result)))
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(ending, options.json)
    if options.report:
        from .report import write_report

        print("Report:", write_report(result, options.report))
    return code
