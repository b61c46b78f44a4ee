"""The measurements of ``python -m fused_dropout gpu-check``.

They compare dropout with a copy of the same bytes, and measure the host time of small calls and a transformer block.
Contenders take turns, so that a slow phase of the GPU slows all of them.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...functional import dropout
from ..memory import peak_bytes
from ..speed import DTYPES
from ..timing import Contender, Speed, rounds, time_busy_cuda
from ..workloads import Attention, Block, P, swap, without_dropout
from .report import COPY, Bandwidth, HostTime, Note, Step

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# In the order of importance: the last ones are left out if there is no time.
CASES = ("forward", "in place", "forward + backward", "backward")
LOG2_SIZES = (24, 28, 20, 16, 26, 22, 30, 12, 18, 14, 10)
QUICK_LOG2_SIZES = (26, 12)  # sizes that are not in _COMPILED_LOG2_SIZES
_COMPILED_LOG2_SIZES = {"forward": (20, 24, 28), "forward + backward": (24,)}
_CASE_SECONDS = 1.2  # the longest time for the samples of a case
_IN_PLACE_CALLS = 16  # the calls on each buffer in a sample; with more, most values would be 0 or huge
_MAX_BUFFERS = 1024
_BLOCK_SECONDS, _COMPILE_SECONDS = 8.0, 30.0

Dropping = Callable[[Tensor], Tensor]


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


if triton is not None:

    @triton.jit(do_not_specialize=["seed"])
    def _triton_kernel(x, y, numel, p, scale, seed, block: tl.constexpr):  # noqa: ANN001, ANN202
        index = tl.program_id(0) * block + tl.arange(0, block)
        inside = index < numel
        value = tl.load(x + index, mask=inside).to(tl.float32)
        kept = tl.rand(seed, index) >= p
        tl.store(y + index, tl.where(kept, value * scale, 0.0), mask=inside)


class TritonDropout(torch.autograd.Function):
    """The common low-memory dropout in Triton: one Philox call for each element; saves the seed for backward."""

    seeds = itertools.count(2**40 + 1)

    @staticmethod
    def run(x: Tensor, seed: int) -> Tensor:
        y, block = torch.empty_like(x), 1024
        _triton_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), P, 1 / (1 - P), seed, block=block)
        return y

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.seed = next(TritonDropout.seeds)
        return TritonDropout.run(x, ctx.seed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return TritonDropout.run(gradient.contiguous(), ctx.seed)


def label_of_compiled(dtype: str) -> str:
    """The name of the compiled contender. Inductor runs bfloat16 in eager on GPUs before Ampere, with a warning."""
    in_eager = dtype == "bfloat16" and torch.cuda.get_device_capability() < (8, 0)
    return "compiled (runs in eager here)" if in_eager else "compiled"


def implementations(case: str, dtype: str, log2: int) -> dict[str, Callable[[], Dropping]]:
    """For each name a function that makes the dropout to measure. If it fails, only that contender is left out."""
    inplace = case == "in place"
    found: dict[str, Callable[[], Dropping]] = {
        "fd": lambda: partial(dropout, p=P, inplace=inplace),
        "F.dropout": lambda: partial(F.dropout, p=P, inplace=inplace),
    }
    if inplace:
        return found
    if log2 in _COMPILED_LOG2_SIZES.get(case, ()):
        found[f"F.dropout, {label_of_compiled(dtype)}"] = _compiled
    if triton is not None:
        found["Triton"] = lambda: TritonDropout.apply
    try:
        from transformer_engine.pytorch.ops import Dropout as EngineDropout
    except Exception:  # it may be installed and still not load
        return found
    return found | {"TransformerEngine": lambda: EngineDropout(P)}


def _compiled() -> Dropping:
    torch._dynamo.reset()  # compiles each size separately
    return torch.compile(lambda x: F.dropout(x, P), dynamic=False)


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """A function that calls the next of the calls each time, in a cycle."""
    turns = itertools.cycle(calls)

    def call_next() -> None:
        next(turns)()

    return call_next


def eager(make: Callable[[], list[Callable[[], object]]], **options: Any) -> Contender:
    return Contender(in_turn(make()), time_busy_cuda, **options)


def replayed(
    make: Callable[[], list[Callable[[], object]]], outputs: Sequence[Tensor | None], **options: Any
) -> Contender:
    """A contender that replays the calls in a CUDA graph.

    It makes its own calls, because autograd may keep the nodes of a leaf on the stream where they were first used.
    """
    graph, calls = torch.cuda.CUDAGraph(), make()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    written = list(outputs)

    def replay(_alive: Sequence[Tensor | None] = written) -> None:
        graph.replay()

    return Contender(replay, time_busy_cuda, units=len(calls), **options)


def buffer_count(case: str, nbytes: int) -> int:
    """The number of buffers of this size that together exceed the L2 cache, so that each call finds its data outside.

    A call touches its input and its output, or in place one buffer.
    """
    touched = nbytes if case == "in place" else 2 * nbytes
    return min(_MAX_BUFFERS, 1 + 3 * torch.cuda.get_device_properties(0).L2_cache_size // touched)


def calls_of(
    make: Callable[[], Dropping], case: str, values: Tensor, others: Tensor, outputs: list
) -> list[Callable[[], object]]:
    """A call for each row of the values. Outputs are kept until the next call for the row, so they cycle too."""
    run, inputs, gradients = make(), [*values.unbind()], [*others.unbind()]
    leaves = [x.detach().requires_grad_() for x in inputs] if case.endswith("backward") else []
    dropped = [run(x) for x in leaves] if case == "backward" else []

    def forward(i: int) -> None:
        outputs[i] = run(inputs[i])

    def in_place(i: int) -> None:
        run(inputs[i])

    def forward_backward(i: int) -> None:
        (outputs[i],) = torch.autograd.grad(run(leaves[i]), leaves[i], gradients[i])

    def backward(i: int) -> None:
        (outputs[i],) = torch.autograd.grad(dropped[i], leaves[i], gradients[i], retain_graph=True)

    call = dict(zip(CASES, (forward, in_place, forward_backward, backward), strict=True))[case]
    return [partial(call, i) for i in range(len(inputs))]


def copies_of(case: str, inputs: Tensor, outputs: Tensor) -> list[Callable[[], object]]:
    def copy_twice(x: Tensor, y: Tensor) -> None:
        y.copy_(x)
        y.copy_(x)

    call = copy_twice if case == "forward + backward" else lambda x, y: y.copy_(x)
    return [partial(call, x, y) for x, y in zip(inputs, outputs, strict=True)]


def contenders_for(case: str, dtype: str, log2: int, buffers: int) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Yields a name and a function that makes the contender. Call it before the next one is requested."""
    values = torch.randn(buffers, 2**log2, dtype=getattr(torch, dtype), device="cuda")
    others = values.clone()  # the targets of the copies, the gradients, or the source to restore in-place values
    outputs: list[Tensor | None] = [None] * buffers
    options = {"prepare": partial(values.copy_, others)} if case == "in place" else {}
    makers = {COPY: partial(copies_of, case, *((others, values) if options else (values, others)))}
    for name, make in implementations(case, dtype, log2).items():
        makers[name] = partial(calls_of, make, case, values, others, outputs)
    for name, make_calls in makers.items():
        most = {"most": _IN_PLACE_CALLS * buffers} if options else {}
        yield name, partial(eager, make_calls, **options, **most)
        # Backward alone cannot be captured: autograd runs it on the stream of its forward.
        if name in (COPY, "fd", "F.dropout") and case != "backward":
            most = {"most": _IN_PLACE_CALLS} if options else {}
            yield f"{name}, graph", partial(replayed, make_calls, outputs, **options, **most)


def measure_speed(case: str, dtype: str, log2: int, seconds: float) -> Iterator[Bandwidth | Note]:
    nbytes = 2**log2 * getattr(torch, dtype).itemsize
    buffers = buffer_count(case, nbytes)
    if 10 * buffers * nbytes > torch.cuda.mem_get_info()[0]:
        yield Note(f"{case}, {dtype}, 2^{log2}: not enough memory")
        return
    contenders: dict[str, Contender] = {}
    for name, make in contenders_for(case, dtype, log2, buffers):
        try:
            contender = make()
            contender.warm_up()
            contenders[name] = contender
        except Exception as error:
            yield Note(f"{case}, {dtype}, 2^{log2}: {name} left out: {first_line(error)}")
    times = rounds(contenders, time.perf_counter() + min(seconds, _CASE_SECONDS))
    moved = 2 * nbytes * (2 if case == "forward + backward" else 1)
    for name, samples in times.items():
        copy = times.get(f"{COPY}, graph" if name.endswith(", graph") else COPY, samples)
        found = Speed.of(samples, copy)
        us, gb_s = found.ns.times(1e-3), moved / found.ns.median
        yield Bandwidth(case, dtype, 2**log2, name, *us, gb_s, *found.ratio, found.samples, buffers)


def speeds(quick: bool, deadline: float) -> Iterator[Bandwidth | Note]:
    """Measures all cases. Each gets its share of the time that is left."""
    cases = list(itertools.product(CASES, QUICK_LOG2_SIZES if quick else LOG2_SIZES, DTYPES))
    for done, (case, log2, dtype) in enumerate(cases):
        left = deadline - time.perf_counter()
        if left < 0:
            skipped = ", ".join(f"{case} {dtype} 2^{log2}" for case, log2, dtype in cases[done:])
            yield Note(f"no time left for {len(cases) - done} cases: {skipped}")
            return
        try:
            yield from measure_speed(case, dtype, log2, left / (len(cases) - done))
        except torch.OutOfMemoryError as error:
            yield Note(f"{case}, {dtype}, 2^{log2}: {first_line(error)}")
        torch.cuda.empty_cache()


def host_times(seconds: float) -> Iterator[HostTime]:
    """The time that a call takes on the host while the GPU's queue is not full."""
    x, gradient = torch.randn(64, device="cuda"), torch.randn(64, device="cuda")
    leaf = x.clone().requires_grad_()

    def forward_backward(run: Callable[[Tensor, float], Tensor]) -> None:
        torch.autograd.grad(run(leaf, P), leaf, gradient)

    calls: dict[tuple[str, str], Callable[[], object]] = {("forward", "x.clone()"): x.clone}
    for name, run in {"fd.dropout": dropout, "F.dropout": F.dropout}.items():
        calls["forward", name] = partial(run, x, P)
        calls["forward with grad", name] = partial(run, leaf, P)
        calls["forward + backward", name] = partial(forward_backward, run)
        calls["in place", name] = partial(run, x.clone(), P, True, True)
    contenders = {n: Contender(call, prepare=torch.cuda.synchronize, calls=100) for n, call in calls.items()}
    for contender in contenders.values():
        contender.sample()  # a warm-up: the first sample is slower
    for (case, name), times in rounds(contenders, time.perf_counter() + seconds).items():
        yield HostTime(case, name, *Speed.of(times).ns.times(1e-3))


class FusedAttention(Attention):
    """The same by torch's fused kernel, without dropout of the weights, which a module cannot apply there."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def autocast_step(model: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        y = model(x)
    torch.autograd.grad(y, parameters, x.detach())  # x serves as the gradient; its values do not matter


def measure_block(name: str, fused: bool, compiled: bool, x: Tensor, deadline: float) -> Iterator[Step | Note]:
    block = Block(768, 12, P, causal=True).cuda()
    if fused:
        block.attention.__class__ = FusedAttention
    models = {"nn.Dropout": block, "fd.Dropout": swap(deepcopy(block)), "p = 0": without_dropout(deepcopy(block))}
    steps: dict[str, Contender] = {}
    for of_model, model in models.items():
        if compiled and deadline - time.perf_counter() < _COMPILE_SECONDS:
            yield Note(f"block, {name}, {of_model}: no time left to compile it")
            continue
        run = torch.compile(model) if compiled else model
        steps[of_model] = Contender(partial(autocast_step, run, [*model.parameters(), x], x), time_busy_cuda, calls=2)
        for _ in range(3):
            steps[of_model].sample()
    peaks = {of_model: peak_bytes("cuda", contender.call) / 2**20 for of_model, contender in steps.items()}
    seconds = min(_BLOCK_SECONDS, (deadline - time.perf_counter()) / 3)
    for of_model, times in rounds(steps, time.perf_counter() + seconds).items():
        yield Step(name, of_model, *Speed.of(times).ns.times(1e-6), peaks[of_model])


def blocks(quick: bool, deadline: float) -> Iterator[Step | Note]:
    """Measures the block of GPT-2 small, with torch's fused attention, and with explicit weights that are dropped."""
    shape = (1, 128, 768) if quick else (8, 1024, 768)
    x = torch.randn(shape, device="cuda", requires_grad=True)
    size = " x ".join(map(str, shape))
    for name, fused, compiled in (
        ("fused attention", True, False),
        ("attention weights dropped", False, False),
        (f"fused attention, {label_of_compiled('bfloat16')}", True, True),
    ):
        try:
            yield from measure_block(f"{size}, {name}", fused, compiled, x, deadline)
        except Exception as error:
            yield Note(f"block, {size}, {name}: {first_line(error)}")
