"""Measures the speed of nn.Dropout and fd.Dropout: of single calls, and of steps of whole models."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..swap.patching import patched
from .timing import Contender, Speed, clock_of, rounds
from .workloads import MODULES, OF_TRANSFORMERS, WORKLOADS, P, step, swap, without_dropout

SIZES = {"cpu": (2**10, 2**16, 2**20), "cuda": (2**12, 2**20, 2**26)}
FULL_SIZES = {"cpu": tuple(2**k for k in range(6, 27, 2)), "cuda": tuple(2**k for k in range(10, 31, 2))}
DTYPES = ("float32", "bfloat16", "float16")
CASES = ("forward", "forward + backward", "in place")
IDLE_CASES = ("eval", "p = 0")  # the cases without dropping
_IN_PLACE_CALLS = 64  # each call multiplies kept values by 1 / (1 - P): by 849 in 64 calls, which float16 can hold


@dataclass(frozen=True)
class Comparison:
    """The times of the two modules in one case."""

    device: str
    dtype: str
    numel: int
    case: str
    p: float
    torch_ns: float  # nanoseconds an element, median of the samples
    fd_ns: float
    ratio: float  # torch's time / ours: median, 10th and 90th percentile over the pairs of samples
    ratio_p10: float
    ratio_p90: float
    samples: int
    floor_ns: float | None = None  # the same for a multiply (CPU) or a copy (CUDA); for forward and in place


@dataclass(frozen=True)
class Model:
    device: str
    workload: str
    module: str  # "nn.Dropout", "fd.Dropout", "p = 0" or "fd, patched"
    compiled: bool
    seconds: float  # median of a step, forward and backward
    # The time with nn.Dropout (compiled or not, as this one) / this time: median, 10th and 90th percentile.
    ratio: float
    ratio_p10: float
    ratio_p90: float


def _forward_backward(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
    module(x).backward(gradient)
    x.grad = None


def _floor(x: Tensor, in_place: bool) -> Callable[[], object]:
    """An operation that moves the same bytes with almost no arithmetic: a multiply, or on CUDA a copy."""
    if x.is_cuda:
        return partial((x if in_place else torch.empty_like(x)).copy_, torch.empty_like(x))
    return partial(x.mul_, 1.0) if in_place else partial(torch.mul, x, 1.1)


def measure_speed(device: str, dtype: str, numel: int, case: str, seconds: float) -> list[Comparison]:
    end = time.perf_counter() + seconds  # includes the warm-up
    values = torch.randn(numel, device=device).to(getattr(torch, dtype))
    x = values.clone()
    p = 0.0 if case == "p = 0" else P
    modules = {name: make(p, inplace=case == "in place").train(case != "eval") for name, make in MODULES.items()}
    calls: dict[str, Callable[[], object]] = {name: partial(module, x) for name, module in modules.items()}
    if case == "forward + backward":
        gradient = torch.ones_like(x)
        calls = {n: partial(_forward_backward, module, x.requires_grad_(), gradient) for n, module in modules.items()}
    if case in ("forward", "in place"):
        calls["floor"] = _floor(x, case == "in place")
    options: dict[str, Any] = {"clock": clock_of(device), "units": numel}
    if case == "in place":
        options |= {"prepare": partial(x.copy_, values), "most": _IN_PLACE_CALLS}
    contenders = {name: Contender(call, **options) for name, call in calls.items()}
    for contender in contenders.values():
        contender.warm_up()
    times = rounds(contenders, end)
    speed = {name: Speed.of(samples, times["nn.Dropout"]) for name, samples in times.items()}
    ours, floor_ns = speed["fd.Dropout"], speed["floor"].ns.median if "floor" in speed else None
    medians = speed["nn.Dropout"].ns.median, ours.ns.median
    return [Comparison(device, dtype, numel, case, p, *medians, *ours.ratio, ours.samples, floor_ns)]


def _patched(call: Callable[[], object]) -> None:
    with patched():
        call()


def measure_model(device: str, workload: str, seconds: float, compiled: bool) -> list[Model]:
    model, x = WORKLOADS[workload]()
    model, x = model.to(device), x.to(device)
    models = {"nn.Dropout": model, "fd.Dropout": swap(deepcopy(model)), "p = 0": without_dropout(deepcopy(model))}
    if workload in OF_TRANSFORMERS:
        models["fd, patched"] = model
    contenders = {}
    for name, module in models.items():
        run = torch.compile(module) if compiled else module
        call = partial(step, run, list(module.parameters()), x)
        contenders[name] = Contender(partial(_patched, call) if name == "fd, patched" else call, clock_of(device))
        for _ in range(2):
            contenders[name].sample()
    records = []
    times = rounds(contenders, time.perf_counter() + seconds)
    for name, samples in times.items():
        speed = Speed.of(samples, times["nn.Dropout"])
        records.append(Model(device, workload, name, compiled, speed.ns.median / 1e9, *speed.ratio))
    return records
