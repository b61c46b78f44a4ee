"""``make bench-cpu``: measures the CPU kernels on this machine against their targets, in ten minutes.

All contenders of a row take turns (ABAB...) in one process, so that a slow phase of the machine slows all of them. The
result is the median of the ratios of neighbouring samples. ``--row NAME`` measures one row and prints JSON. Rows with
other environment variables run that way, in a separate process.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

HIDE_EAGER = "CPU_TARGETS_HIDE_EAGER"
if os.environ.get(HIDE_EAGER):
    sys.modules["fused_dropout._eager"] = None

import fused_dropout as fd  # noqa: E402
from fused_dropout.bench.environment import describe_environment  # noqa: E402
from fused_dropout.bench.timing import Contender, Speed, rounds  # noqa: E402
from fused_dropout.bench.workloads import P  # noqa: E402


def _values(log2: int, dtype: str = "float32") -> Tensor:
    return torch.randn(2**log2).to(getattr(torch, dtype))


def forward(log2: int, dtype: str = "float32", grad: bool = False) -> list[Contender]:
    x = _values(log2, dtype).requires_grad_(grad)
    return [Contender(partial(dropout, x, P)) for dropout in (fd.dropout, F.dropout)]


def forward_backward(log2: int) -> list[Contender]:
    x, gradient = _values(log2).requires_grad_(), _values(log2)

    def run(dropout: Callable[[Tensor, float], Tensor]) -> None:
        dropout(x, P).backward(gradient)
        x.grad = None

    return [Contender(partial(run, dropout)) for dropout in (fd.dropout, F.dropout)]


def forward_or_product(log2: int) -> list[Contender]:
    x = _values(log2)
    return [Contender(partial(fd.dropout, x, P)), Contender(partial(torch.mul, x, 1.1))]


# In-place dropout lets the values grow, so each sample begins with ones. In small tensors all values become 0 before a
# sample ends.
def _in_place(x: Tensor, call: Callable[[], object]) -> Contender:
    return Contender(call, prepare=partial(x.fill_, 1.0), units=x.numel())


def in_place_or_product(log2: int) -> list[Contender]:
    x = _values(log2)
    return [_in_place(x, partial(fd.dropout, x, P, True, True)), _in_place(x, partial(x.mul_, 1.1))]


def in_place_sizes(low: int, high: int) -> list[Contender]:
    largest = _values(high)
    tensors = [largest[: 2**log2] for log2 in range(low, high + 1)]
    return [_in_place(x, partial(fd.dropout, x, P, True, True)) for x in tensors]


def channels(*shape: int, dtype: str = "float32", inplace: bool = False, last: bool = False) -> list[Contender]:
    x = torch.ones(shape, dtype=getattr(torch, dtype))
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def run(dropout2d: Callable[..., Tensor]) -> Contender:
        prepare = partial(x.fill_, 1.0) if inplace else lambda: None
        return Contender(partial(dropout2d, x, P, True, inplace), prepare=prepare)

    return [run(fd.dropout2d), run(F.dropout2d)]


def rows_or_dense(length: int) -> list[Contender]:
    dense, wide = _values(20), torch.randn(2**20 // length, 2 * length)
    return [Contender(partial(fd.dropout, x, P)) for x in (wide[:, :length], dense)]


def shard(dim: int, log2: int) -> list[Contender]:
    """Half of a tensor (16, n, 1024), divided along one dimension, against as many elements without a shard.

    Both in place.
    """
    whole = [16, 2**log2 // 2**13, 1024]
    part = [size // 2 if d == dim else size for d, size in enumerate(whole)]
    x, begin = torch.ones(part), [size // 2 if d == dim else 0 for d, size in enumerate(whole)]
    calls = (partial(fd.dropout, x, P, inplace=True, shard=(whole, begin)), partial(fd.dropout, x, P, inplace=True))
    return [_in_place(x, call) for call in calls]


def _on_mesh(x: Tensor, dim: int) -> Tensor:
    """A DTensor on a mesh that has only this process."""
    from torch.distributed.tensor import Shard, distribute_tensor

    if not dist.is_initialized():
        store = dist.TCPStore("localhost", 0, 1, is_master=True)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return distribute_tensor(x, dist.init_device_mesh("cpu", (1,)), [Shard(dim)])


def dtensor(dim: int, log2: int) -> list[Contender]:
    """A DTensor against its local tensor, in place."""
    x = torch.ones(16, 2**log2 // 2**14, 1024)
    whole = _on_mesh(x, dim)
    return [_in_place(x, partial(fd.dropout, t, P, True, True)) for t in (whole, whole._local_tensor)]


def small_dtensor(log2: int) -> list[Contender]:
    """Forward and backward of a DTensor."""
    x, gradient = _on_mesh(_values(log2), 0).requires_grad_(), _on_mesh(_values(log2), 0)

    def run(dropout: Callable[[Tensor, float], Tensor]) -> None:
        torch.autograd.grad(dropout(x, P), x, gradient)

    return [Contender(partial(run, dropout)) for dropout in (fd.dropout, F.dropout)]


def threads(log2: int, *counts: int) -> list[Contender]:
    call = partial(fd.dropout, _values(log2), P)

    def prepare(count: int) -> None:
        torch.set_num_threads(count)
        call()  # wakes the threads

    return [Contender(call, prepare=partial(prepare, count)) for count in counts]


def before_linear(batch: int, inputs: int, outputs: int, dtype: str = "float32") -> list[Contender]:
    """Forward and backward of a dropout and a linear layer: as one module, and as torch's two."""
    of_type = {"dtype": getattr(torch, dtype)}
    x = torch.randn(batch, inputs, **of_type).requires_grad_()
    pair = nn.Sequential(nn.Dropout(P), nn.Linear(inputs, outputs, **of_type))

    def step(model: nn.Module) -> None:
        y = model(x)
        torch.autograd.grad(y, (x, *model.parameters()), torch.ones_like(y))

    return [Contender(partial(step, model)) for model in (fd.DropoutLinear(inputs, outputs, p=P, **of_type), pair)]


def neighbours(
    kind: str, log2: int, dtype: str = "float32", backward: bool = False, composed: str = "fd"
) -> list[Contender]:
    """One call for dropout and the operations next to it, and the separate calls. The last dimension is 1,024."""
    dropout = fd.dropout if composed == "fd" else F.dropout
    x, residual, gradient = (_values(log2, dtype).view(-1, 1024) for _ in range(3))
    bias = _values(10, dtype)
    leaves = {"add": (x, residual), "bias": (x, residual, bias), "relu": (x,)}[kind]
    calls: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "add": (lambda: fd.dropout_add(x, residual, P), lambda: residual + dropout(x, P)),
        "bias": (lambda: fd.dropout_add(x, residual, P, bias=bias), lambda: residual + dropout(x + bias, P)),
        "relu": (lambda: fd.relu_dropout(x, P), lambda: dropout(F.relu(x), P)),
    }

    def run(call: Callable[[], Tensor]) -> None:
        torch.autograd.grad(call(), leaves, gradient)

    for leaf in leaves:
        leaf.requires_grad_(backward)
    return [Contender(partial(run, call) if backward else call) for call in calls[kind]]


def training_step(*sizes: int) -> list[Contender]:
    images, labels = torch.randn(128, sizes[0]), torch.randint(sizes[-1], (128,))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    linears = [nn.Linear(*ends) for ends in pairwise(sizes)]
    contenders = []
    for dropout in (fd.Dropout, nn.Dropout):
        hidden = [layer for linear in linears[:-1] for layer in (linear, nn.ReLU(), dropout(0.5))]
        model = deepcopy(nn.Sequential(*hidden, linears[-1]))
        contenders.append(Contender(partial(step, model, torch.optim.Adam(model.parameters(), lr=1e-3))))
    return contenders


@dataclass(frozen=True)
class Row:
    name: str
    what: str
    against: str
    direction: str  # ">=": the ratio is the other's time / ours; "<=": ours / the other's
    bounds: tuple[float, ...]  # one for each case; the last one also for all later cases
    # Each gives ours and then the other. If it gives more than two, the slowest is compared with the fastest.
    cases: Sequence[Callable[[], list[Contender]]]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 6  # for each case


def at(make: Callable[..., list[Contender]], *log2s: int, **options: object) -> list[Callable[[], list[Contender]]]:
    return [partial(make, log2, **options) for log2 in log2s]


HALVES = at(forward, 20, 24, dtype="bfloat16") + at(forward, 20, 24, dtype="float16")
SMALL = at(forward, 6) + at(forward_backward, 6)
SMALL_NO_EAGER = at(forward, 6) + at(forward, 6, grad=True) + at(forward_backward, 6)
SLICES = [partial(rows_or_dense, length) for length in (512, 64, 32)]
CHANNELS = [partial(channels, 32, 64, n, n, **more) for n in (7, 56) for more in ({}, {"dtype": "bfloat16"})]
CHANNELS += [partial(channels, 32, 64, 56, 56, **more) for more in ({"inplace": True}, {"last": True})]
SIZES = [partial(in_place_sizes, 12, 26)]
LINEARS = [
    partial(before_linear, 1024, 1024, 16),
    partial(before_linear, 1024, 1024, 16, dtype="bfloat16"),
    partial(before_linear, 4, 16, 16),
]
DTYPES = ("float32", "bfloat16")


def around(*kinds: str, sizes: Sequence[int] = (16, 24), backward: bool, **options: str) -> list[partial]:
    return [
        partial(neighbours, kind, log2, dtype, backward=backward, **options)
        for kind in kinds
        for dtype in DTYPES
        for log2 in sizes
    ]


def attention(batch: int, tokens: int, dtype: str, causal: bool, against: float, threads: int) -> list[Contender]:
    """Forward and backward of attention with 12 heads of 64 and dropout. against: the drop rate for torch's."""
    torch.set_num_threads(threads)
    inputs = [torch.randn(batch, tokens, 12, 64).to(getattr(torch, dtype)).transpose(1, 2) for _ in range(4)]
    *leaves, gradient = inputs
    for leaf in leaves:
        leaf.requires_grad_()

    def run(function: Callable[..., Tensor], p: float) -> None:
        torch.autograd.grad(function(*leaves, dropout_p=p, is_causal=causal), leaves, gradient)

    ours, torchs = fd.scaled_dot_product_attention, F.scaled_dot_product_attention
    return [Contender(partial(run, ours, P)), Contender(partial(run, torchs, against))]


def attentions(dtype: str = "float32", causal: bool = False, against: float = P, threads: int = 1) -> list[partial]:
    more = {"dtype": dtype, "causal": causal, "against": against, "threads": threads}
    return [partial(attention, batch, tokens, **more) for batch, tokens in ((2, 128), (2, 512), (1, 2048))]


TOKENS = "128, 512, 2,048"
DROPPING, PLAIN = "torch's, dropping", "torch's, p = 0"
FIVE = around("add", "bias", sizes=(20,), backward=False) + around("add", "bias", "relu", sizes=(20,), backward=True)
OVER_TORCH = {"sizes": (16, 20), "composed": "torch"}
SHARDS, WITHOUT = [partial(shard, dim, 22) for dim in range(3)], "as many, no shard"
DTENSORS = [partial(dtensor, dim, 22) for dim in range(2)]
STEP = [partial(training_step, 784, 512, 256, 128, 10)]
AVX2, PORTABLE = {"FUSED_DROPOUT_CPU_ISA": "avx2"}, {"FUSED_DROPOUT_CPU_ISA": "portable"}
PYTHON, NO_EAGER = {"FUSED_DROPOUT_BACKEND": "reference"}, {HIDE_EAGER: "1"}
ROWS = (
    Row("float32", "float32 forward: 2^16, 2^20, 2^22", "F.dropout", ">=", (20,), at(forward, 16, 20, 22)),
    Row("half", "bfloat16, float16 forward: 2^20, 2^24 each", "F.dropout", ">=", (16,), HALVES),
    Row("float64", "float64 forward: 2^20", "F.dropout", ">=", (10,), at(forward, 20, dtype="float64")),
    Row("autograd", "float32 forward + backward: 2^20", "F.dropout", ">=", (10,), at(forward_backward, 20)),
    Row("cache", "float32 forward in cache: 2^14, 2^16", "x * 1.1", "<=", (3.5,), at(forward_or_product, 14, 16)),
    Row("in-place", "float32 in place: 2^24", "x.mul_(1.1)", "<=", (1.25,), at(in_place_or_product, 24)),
    Row("out-of-place", "float32 out of place: 2^24", "x * 1.1", "<=", (1.25,), at(forward_or_product, 24)),
    Row("avx2", "AVX2 forced, float32 forward: 2^20", "F.dropout", ">=", (12,), at(forward, 20), AVX2),
    Row("portable", "portable forced, float32 forward: 2^20", "F.dropout", ">=", (2,), at(forward, 20), PORTABLE),
    Row("fallback", "pure PyTorch, float32 forward: 2^20", "F.dropout", "<=", (1.5,), at(forward, 20), PYTHON),
    Row("threads", "two threads, float32 forward: 2^22", "one thread", ">=", (1.7,), [partial(threads, 22, 2, 1)]),
    Row("sizes", "ns an element in place, 2^12 to 2^26: worst", "its own best", "<=", (1.6,), SIZES, seconds=25),
    Row("small", "64 floats: forward, forward + backward", "F.dropout", "<=", (0.7, 0.9), SMALL),
    Row("no-eager", "the same and with grad, no eager binding", "F.dropout", "<=", (1.5,), SMALL_NO_EAGER, NO_EAGER),
    Row(
        "channels",
        "dropout2d, (32, 64, n, n): n = 7, 56 as float32, bfloat16; 56 in place, channels_last",
        "F.dropout2d",
        "<=",
        (1.1,),
        CHANNELS,
    ),
    Row("rows", "2^20 floats, rows of 512, 64, 32 of a wider tensor", "as many, dense", "<=", (1.25, 1.5, 2), SLICES),
    Row(
        "linear",
        "dropout and a linear layer, 1,024 x 1,024 to 16 as float32, bfloat16; 4 x 16 to 16: forward + backward",
        "nn.Dropout, nn.Linear",
        "<=",
        (0.5, 0.5, 1.0),
        LINEARS,
    ),
    Row(
        "add",
        "dropout_add forward: 2^16, 2^24 as float32, bfloat16",
        "fd.dropout, +",
        ">=",
        (1.5, 2.5, 1.5, 2.5),
        around("add", backward=False),
    ),
    Row("add-grad", "the same + backward", "fd.dropout, +", ">=", (1.2, 1.8, 1.2, 1.8), around("add", backward=True)),
    Row("bias", "with bias, forward", "+, fd.dropout, +", ">=", (1.7,), around("bias", backward=False)),
    Row("bias-grad", "the same + backward", "+, fd.dropout, +", ">=", (1.4,), around("bias", backward=True)),
    Row("relu", "relu_dropout forward + backward", "F.relu, fd.dropout", ">=", (1.7,), around("relu", backward=True)),
    Row(
        "around-avx2",
        "AVX2 forced: the five rows above, 2^20 each",
        "the same",
        ">=",
        (1.2,),
        FIVE,
        AVX2,
        3,
    ),
    Row(
        "around-portable",
        "portable forced: the same",
        "the same",
        ">=",
        (1.2,),
        FIVE,
        PORTABLE,
        3,
    ),
    Row(
        "around-torch",
        "the three, forward: 2^16, 2^20 as float32, bfloat16",
        "torch's own",
        ">=",
        (15,),
        around("add", "bias", "relu", backward=False, **OVER_TORCH),
        seconds=3,
    ),
    Row(
        "around-torch-grad",
        "the same + backward",
        "torch's own",
        ">=",
        (5,),
        around("add", "bias", "relu", backward=True, **OVER_TORCH),
        seconds=3,
    ),
    Row("attention", f"attention, {TOKENS} tokens, forward + backward", DROPPING, ">=", (1.3, 1.6, 2.4), attentions()),
    Row("attention-plain", "the same", PLAIN, "<=", (1.1, 1.1, 1.12), attentions(against=0.0)),
    Row("attention-causal", "causal: 512, 2,048", DROPPING, ">=", (2.2, 4.5), attentions(causal=True)[1:]),
    Row("attention-causal-plain", "the same", PLAIN, "<=", (0.8, 0.95), attentions(causal=True, against=0.0)[1:]),
    Row("attention-bfloat16", f"in bfloat16: {TOKENS}", DROPPING, ">=", (1.7, 2.4, 4.0), attentions(dtype="bfloat16")),
    Row("attention-float16", f"in float16: {TOKENS}", DROPPING, ">=", (1.2,), attentions(dtype="float16")),
    Row("attention-threads", "two threads: 512, 2,048", PLAIN, "<=", (1.1,), attentions(against=0.0, threads=2)[1:]),
    Row("attention-avx2", f"AVX2 forced: {TOKENS}", DROPPING, ">=", (1.0,), attentions(), AVX2),
    Row("attention-portable", f"portable forced: {TOKENS}", DROPPING, ">=", (1.0,), attentions(), PORTABLE),
    Row(
        "shard", "shards of 2^22 floats, divided along dimension 0, 1, 2 of 3", WITHOUT, "<=", (1.1, 1.1, 1.25), SHARDS
    ),
    Row("dtensor", "DTensors of 2^22 floats: Shard(0), Shard(1)", "their local tensors", "<=", (1.1,), DTENSORS),
    Row("dtensor-small", "a DTensor of 64 floats, forward + backward", "F.dropout", "<=", (1.0,), at(small_dtensor, 6)),
    Row("training", "training step of an MLP, dropout 0.5", "nn.Dropout", "<=", (1.0,), STEP, seconds=12),
)


def measure_case(case: partial, row: Row) -> dict:
    torch.set_num_threads(1)
    contenders, end = case(), time.perf_counter() + row.seconds
    for contender in contenders:
        contender.warm_up()
    times = list(rounds(dict(enumerate(contenders)), end).values())
    medians = [Speed.of(of_one).ns.median for of_one in times]
    ours, other = times[:2]
    if len(times) > 2:  # compares the slowest with the fastest
        ours, other = (times[medians.index(choose(medians))] for choose in (max, min))
    ratio = Speed.of(ours, other).ratio if row.direction == ">=" else Speed.of(other, ours).ratio
    options = [f"{name}={value}" for name, value in case.keywords.items()]
    label = " ".join(map(str, (case.func.__name__, *case.args, *options)))
    spread = {"ratio": ratio.median, "p10": ratio.p10, "p90": ratio.p90}
    return {"case": label, **spread, "rounds": len(ours), "ns": medians}


def measure(row: Row) -> list[dict]:
    """Returns a record for each case, or none if this machine cannot run the row."""
    if any(os.environ.get(name) != value for name, value in row.environment.items()):
        environment = os.environ | row.environment | {"PYTHONWARNINGS": "ignore"}
        command = [sys.executable, __file__, "--row", row.name]
        return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    isa = row.environment.get("FUSED_DROPOUT_CPU_ISA", fd.backend_info().cpu_isa)
    if isa != fd.backend_info().cpu_isa or (row.name == "threads" and os.cpu_count() == 1):
        return []
    return [measure_case(case, row) for case in row.cases]


def describe(row: Row, records: Sequence[dict]) -> tuple[str, ...]:
    """The cells of the row in the table."""
    sign = 1 if row.direction == ">=" else -1
    within = [
        sign * record["ratio"] >= sign * row.bounds[min(i, len(row.bounds) - 1)] for i, record in enumerate(records)
    ]
    unit = "times faster" if row.direction == ">=" else "times its time"
    reach = f"{row.direction} {' / '.join(map(str, row.bounds))} {unit}"
    figures = ", ".join(f"{record['ratio']:#.3g}" for record in records)
    if row.name == "training" and records:
        figures += f" ({1 - records[0]['ratio']:+.1%} gained)"
    verdict = ("reached" if all(within) else "missed") if records else "not here"
    return row.what, row.against, reach, figures, verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default="fused_dropout_bench_cpu.json", help="default: %(default)s")
    parser.add_argument("--row", choices=[row.name for row in ROWS], help="measure one row, and print JSON")
    options = parser.parse_args()
    # After a large tensor is freed, glibc keeps up to 30 MiB for later calls, as in any long-running process.
    torch.empty(30 * 2**18)
    if options.row:
        print(json.dumps(measure(next(row for row in ROWS if row.name == options.row))))
        return
    torch.set_num_threads(1)
    environment, start, report = describe_environment(), time.perf_counter(), {}
    for row in ROWS:
        print(f"{time.perf_counter() - start:4.0f} s  {row.what}", file=sys.stderr, flush=True)
        report[row.name] = measure(row)
    title = f"{environment['cpu']}, {environment['backend_info']['cpu_isa']}, torch {environment['torch']}"
    print(f"{title}, load {environment['load']} before and {os.getloadavg()[0]:.2f} after; p = {P}\n")
    lines = [describe(row, report[row.name]) for row in ROWS]
    lines = [("work", "against", "reach", "here", ""), *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    keys = ("name", "what", "against", "reach", "here", "verdict", "cases")
    rows = [dict(zip(keys, (n, *line, report[n]), strict=True)) for n, line in zip(report, lines[1:], strict=True)]
    options.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"\nWritten to {options.json}")


if __name__ == "__main__":
    main()
