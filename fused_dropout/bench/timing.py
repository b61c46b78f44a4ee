"""The timing method of all benchmarks: contenders take turns (ABAB...) in one process.

So a slow phase of the machine slows all of them, and each ratio is of two samples of the same round.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import NamedTuple, TypeVar

import torch

SAMPLE_NS = 1e6  # long enough for the clock's resolution, and to average over disturbances of single calls
MIN_ROUNDS = 7

Clock = Callable[[Callable[[], object], int], float]
Name = TypeVar("Name")


def time_cpu(call: Callable[[], object], calls: int) -> float:
    """The nanoseconds of this many calls on the host."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return time.perf_counter_ns() - start


def time_cuda(call: Callable[[], object], calls: int) -> float:
    """The nanoseconds of this many calls on the GPU, measured by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e6


def time_busy_cuda(call: Callable[[], object], calls: int) -> float:
    """The same after an additional call, which keeps the GPU busy while the host launches the first timed calls."""
    call()
    return time_cuda(call, calls)


def clock_of(device: str) -> Clock:
    return time_cuda if device == "cuda" else time_cpu


@dataclass
class Contender:
    call: Callable[[], object]
    clock: Clock = time_cpu
    prepare: Callable[[], object] = lambda: None  # called before each sample, and not timed
    units: int = 1  # the units of work in a call
    calls: int = 1  # the calls in a sample
    most: int = 1 << 16  # the largest allowed value of calls

    def sample(self) -> float:
        """Takes a sample. Returns the nanoseconds of a unit."""
        self.prepare()
        return self.clock(self.call, self.calls) / (self.calls * self.units)

    def warm_up(self) -> None:
        """Runs a few samples, and chooses the number of calls for a sample."""
        for _ in range(3):
            self.sample()
        while self.calls < self.most and self.sample() * self.calls * self.units < SAMPLE_NS:
            self.calls *= 2


def rounds(contenders: Mapping[Name, Contender], end: float) -> dict[Name, list[float]]:
    """Takes samples of the contenders in turn. Returns those of each.

    end: the time of ``time.perf_counter()`` to stop at. There are at least MIN_ROUNDS rounds.
    """
    times: dict[Name, list[float]] = {name: [] for name in contenders}
    taken = 0
    while contenders and (taken < MIN_ROUNDS or time.perf_counter() < end):
        for name, contender in contenders.items():
            times[name].append(contender.sample())
        taken += 1
    return times


class Spread(NamedTuple):
    median: float
    p10: float
    p90: float

    def times(self, factor: float) -> "Spread":
        return Spread(factor * self.median, factor * self.p10, factor * self.p90)


def _spread(samples: Sequence[float]) -> Spread:
    p10, *_, p90 = quantiles(samples, n=10, method="inclusive")
    return Spread(median(samples), p10, p90)


@dataclass(frozen=True)
class Speed:
    """The statistics of a contender's samples."""

    ns: Spread  # nanoseconds of a unit of work
    ratio: Spread  # the baseline's time / this one's in the same round
    samples: int

    @staticmethod
    def of(samples: Sequence[float], baseline: Sequence[float] | None = None) -> "Speed":
        """baseline: the samples of another contender in the same rounds. Without it the ratios are 1."""
        ratios = [other / own for other, own in zip(baseline or samples, samples, strict=True)]
        return Speed(_spread(samples), _spread(ratios), len(samples))
