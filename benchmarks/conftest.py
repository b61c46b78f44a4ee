"""Fixtures of the pytest-benchmark suites: ``pytest benchmarks --benchmark-only``. README.md describes the method."""

import time

import pytest
import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")


def pytest_addoption(parser):
    group = parser.getgroup("dropout")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--all", action="store_true", help="every size and dtype: most of an hour")
    group.addoption("--threads", type=int, default=0, help="default: torch's")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads") or torch.get_num_threads())


def pytest_generate_tests(metafunc):
    """A few sizes and dtypes, or all of them with --all."""
    config = metafunc.config
    everything, on_gpu = config.getoption("--all"), config.getoption("--device") == "cuda"
    if "log2" in metafunc.fixturenames:
        sizes = range(6, 31 if on_gpu else 27, 2) if everything else (10, 20, 26) if on_gpu else (6, 16, 22)
        metafunc.parametrize("log2", sizes, ids=lambda k: f"2^{k}")
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES if everything else DTYPES[:2])


class EventClock:
    """Measures seconds with CUDA events: the time on the stream, which a host clock cannot measure."""

    def __init__(self):
        self.start = torch.cuda.Event(enable_timing=True)
        self.start.record()

    def __call__(self):
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return self.start.elapsed_time(now) / 1e3


@pytest.fixture
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def measure(benchmark, device):
    """measure(fn, *arguments, elements=..., **what): times fn, and records the nanoseconds per element."""
    benchmark._timer = EventClock() if device == "cuda" else time.perf_counter
    benchmark._min_time, benchmark._max_time, benchmark._min_rounds, benchmark._warmup = 1e-5, 0.15, 5, True

    def run(fn, *arguments, elements=None, **what):
        benchmark.extra_info.update(what, device=device, threads=torch.get_num_threads())
        benchmark(fn, *arguments)
        if elements and benchmark.stats:
            benchmark.extra_info["ns_per_element"] = benchmark.stats.stats.median * 1e9 / elements

    return run
