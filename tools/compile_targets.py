"""Measures torch.compile with dropout on a CPU against its targets, for ``make bench-cpu``.

    python compile_targets.py                               all rows
    python compile_targets.py first-call DROPOUT BACKEND    one first call, in this process: seconds
    python compile_targets.py forward DROPOUT               the compiled forward, in this process: microseconds

Each number comes from a separate process with a separate cache. For first calls, fused_dropout and torch take turns,
and the number is the median.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dropout as fd

SITES, WIDTH, REPEATS = 24, 64, 3
# The largest allowed time as a multiple of F.dropout's: of the first call by backend, of the forward by mode.
FIRST_CALLS = {"inductor": 1.0, "aot_eager": 5.0}
FORWARD = {"fuse": 1.5, "kernel": 2.3}
DROPOUTS = {"ours": fd.Dropout, "torch": nn.Dropout}


def first_call(dropout: str, backend: str) -> float:
    """The seconds that the first forward and backward of a chain of layers take."""
    layers = [layer for _ in range(SITES) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU(), DROPOUTS[dropout](0.1))]
    model, x = torch.compile(nn.Sequential(*layers), backend=backend), torch.randn(8, WIDTH)
    start = time.perf_counter()
    model(x).sum().backward()
    return time.perf_counter() - start


def in_own_process(*arguments: str, mode: str) -> float:
    """Runs this file with the arguments. mode: the value of FUSED_DROPOUT_COMPILE."""
    with tempfile.TemporaryDirectory() as cache:
        own = {"TORCHINDUCTOR_CACHE_DIR": cache, "FUSED_DROPOUT_COMPILE": mode, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, __file__, *arguments]
        return float(
            subprocess.run(command, env=os.environ | own, check=True, stdout=subprocess.PIPE, text=True).stdout
        )


def forward(dropout: str) -> Callable[[], Tensor]:
    """A compiled function of several dropouts in a row on a small tensor."""
    drop = {"ours": fd.dropout, "torch": F.dropout}[dropout]

    def run(x: Tensor) -> Tensor:
        for _ in range(SITES):
            x = drop(x, 0.1)
        return x

    compiled, x = torch.compile(run, fullgraph=True), torch.ones(WIDTH)
    return lambda: compiled(x)


def microseconds(dropout: str) -> float:
    torch.set_num_threads(1)
    call = forward(dropout)
    with torch.no_grad():
        call()
        samples = []
        for _ in range(200):
            start = time.perf_counter_ns()
            for _ in range(20):
                call()
            samples.append((time.perf_counter_ns() - start) / 20e3)
    return median(samples)


def rows() -> list[dict]:
    """For each target: what, against, bound, ratio, and both times (in s; in us for the forward)."""
    found = []
    for backend, bound in FIRST_CALLS.items():
        turns = [
            [in_own_process("first-call", dropout, backend, mode="fuse") for dropout in DROPOUTS]
            for _ in range(REPEATS)
        ]
        ours, torchs = map(median, zip(*turns, strict=True))
        what = f"first call, {SITES} (Linear, ReLU, dropout), forward + backward, {backend}"
        found.append({"what": what, "against": "nn.Dropout", "bound": bound, "ours": ours, "other": torchs})
    for mode, bound in FORWARD.items():
        ours, torchs = (in_own_process("forward", dropout, mode=mode) for dropout in ("ours", "torch"))
        what = f"compiled forward, {SITES} dropouts of {WIDTH} floats, {mode}"
        found.append({"what": what, "against": "F.dropout", "bound": bound, "ours": ours, "other": torchs})
    return [{**row, "ratio": row["ours"] / row["other"]} for row in found]


def main() -> None:
    what, *arguments = sys.argv[1:] or [""]
    if what == "first-call":
        print(first_call(*arguments))
    elif what == "forward":
        print(microseconds(*arguments))
    else:
        for row in rows():
            print("{what}: {ratio:.2f} of {against} (at most {bound}); {ours:.3g}, {other:.3g}".format(**row))


if __name__ == "__main__":
    main()
