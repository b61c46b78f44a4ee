"""The checks of ``python -m fused_dropout gpu-check``: the GPU gives the same bits as the CPU.

They vary size, layout, key, stream and compiler. ``overlaps`` measures the correlation of consecutive masks.
"""

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ... import operators
from ...functional import dropout, keep_mask
from ...modules import Dropout
from ..memory import peak_bytes
from ..speed import DTYPES
from ..workloads import P
from . import speed
from .report import Check, Overlap, largest_of
from .speed import first_line

_WINDOW = 1 << 24  # the number of elements compared at once
_SHIFTS = range(-8, 9)
_PROBABILITIES = (0.3, 0.1, 0.5, 25 / 256, 1e-6, 0.9)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KEY = torch.tensor([0x1234_5678_9ABC_DEF0, 0x0FED_CBA9_8765_4321], dtype=torch.uint64)

Checking = Callable[[], str | None]
Layouts = dict[str, Callable[[Tensor], Tensor]]


class Skipped(Exception):
    """Raised with the reason if a check cannot run on this machine."""


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Raises AssertionError unless both have the same strides and the same bits. All NaNs are equal."""
    strides = [
        [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in (actual, expected)
    ]
    require(strides[0] == strides[1], f"{what} strides {strides[0]}, not {strides[1]}")
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    a, b = actual.detach().cpu(), expected.detach().cpu()
    if not torch.equal(a.view(integer), b.view(integer)):
        wrong = ((a.view(integer) != b.view(integer)) & ~(a.isnan() & b.isnan())).flatten()
        require(not wrong.any(), f"{what} {int(wrong.sum())} of {a.numel()} differ, first {int(wrong.int().argmax())}")


def check_sizes(dtype: torch.dtype, largest: int, deadline: float) -> str:
    """Sizes 2^k - 1, 2^k and 2^k + 1. Compares all elements of 2^k, and the first and last window of the others."""
    base = torch.randn(min(_WINDOW, 2**largest + 1)).to(dtype)
    on_gpu = base.cuda()
    for log2 in range(largest + 1):
        p = _PROBABILITIES[log2 % len(_PROBABILITIES)]
        if time.perf_counter() > deadline or torch.cuda.mem_get_info()[0] < 3 * 2**log2 * dtype.itemsize + 2**28:
            return f"to 2^{log2 - 1}: no time or memory for more"
        for numel in sorted({2**log2 - 1, 2**log2, 2**log2 + 1} - {0}):
            y = dropout(on_gpu.repeat(math.ceil(numel / len(base)))[:numel], p, key=KEY)
            starts = range(0, numel, len(base))
            for start in starts if numel == 2**log2 else {0, starts[-1]}:
                part = y[start : start + len(base)]
                same(part, operators.apply(base[: len(part)], p, KEY, start), f"{numel} elements, from {start}:")
    return f"2^0 to 2^{largest}"


def check_beyond_32_bits() -> str:
    numel = 2**32 + 1001
    if torch.cuda.mem_get_info()[0] < 4.5 * numel:
        raise Skipped(f"{4.5 * numel / 1e9:.0f} GB of memory are needed")
    x = torch.ones(numel, dtype=torch.float16, device="cuda")
    for inplace in (False, True):
        y = dropout(x, 0.5, True, inplace, key=KEY)
        for start in range(0, numel, 4 * _WINDOW):
            mask = (y[start : start + 4 * _WINDOW] != 0).cpu()
            same(mask, keep_mask(mask.shape, 0.5, KEY, start=start), f"in place {inplace}, from {start}:")
    return f"{numel:,} halves, new and in place"


def check_starts() -> None:
    """Large start indices, for which the kernel counts with 64 bits."""
    for dtype in _DTYPES:
        x = torch.randn(5003).to(dtype)
        for start in (1, 2**31 - 5, 2**32 - 3, 2**34 - 9, 2**34 + 1, 2**35 + 7, 2**62 + 3):
            same(operators.apply(x.cuda(), 0.3, KEY, start), operators.apply(x, 0.3, KEY, start), f"start {start}:")
            same(keep_mask(x.cuda(), 0.3, KEY, start=start), keep_mask(x, 0.3, KEY, start=start), f"start {start}:")


def check_alignments(numel: int) -> None:
    for dtype in _DTYPES:
        base = torch.randn(numel + 16).to(dtype)
        for shift in range(17):
            on_gpu, on_cpu = base.cuda(), base.clone()
            same(dropout(on_gpu[shift:], 0.3, key=KEY), dropout(on_cpu[shift:], 0.3, key=KEY), f"x[{shift}:]:")
            for x in (on_gpu, on_cpu):
                dropout(x[shift:], 0.3, inplace=True, key=KEY)
            same(on_gpu, on_cpu, f"x[{shift}:] in place:")


# Views of a tensor of shape (4, 6, 16, n): dense ones in another order, rows with gaps between them, and views that are
# copied before the kernel runs.
_DENSE: Layouts = {
    "transposed": lambda x: x.flatten(1).t(),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "channels_last": lambda x: x.permute(0, 3, 1, 2),
}
_ROWS: Layouts = {
    "columns": lambda x: x.flatten(0, 2)[:, 4:],
    "odd columns": lambda x: x.flatten(0, 2)[:, 1:16],
    "heads": lambda x: x.flatten(2)[:, 2],
}
_COPIED: Layouts = {
    "every other": lambda x: x.flatten()[::2],
    "narrow columns": lambda x: x.flatten(0, 2)[:, 3:6],
    "permuted with gaps": lambda x: x.permute(3, 1, 0, 2)[1:, ::2],
}


def check_layouts(layouts: Layouts, columns: int) -> str:
    for dtype in _DTYPES:
        base = torch.randn(4, 6, 16, columns).to(dtype)
        for name, view in layouts.items():
            on_gpu, on_cpu = base.cuda(), base.clone()
            same(dropout(view(on_gpu), 0.3, key=KEY), dropout(view(on_cpu), 0.3, key=KEY), f"{name}, {dtype}:")
            for x in (on_gpu, on_cpu):
                dropout(view(x), 0.3, inplace=True, key=KEY)
            same(on_gpu, on_cpu, f"{name}, {dtype}, in place, or what is around it:")
    return ", ".join(layouts)


def check_backward(columns: int, gradients: Layouts) -> str:
    """gradients: functions that return a gradient for the output y, by name."""
    for dtype in _DTYPES:
        base = torch.randn(4, 6, 16, columns).to(dtype)
        for (name, view), (of, gradient) in [(a, b) for a in (_DENSE | _ROWS).items() for b in gradients.items()]:
            results = []
            for x in (base.cuda(), base):
                leaf = view(x).detach().requires_grad_()
                y = dropout(leaf, 0.3, key=KEY)
                results.append(torch.autograd.grad(y, leaf, gradient(y.detach()))[0])
            require(torch.equal(results[0].cpu(), results[1]), f"{name}, {dtype}, gradient {of}: differs")
    return f"of {', '.join(gradients)}"


_USUAL_GRADIENTS: Layouts = {"the output's layout": lambda y: y * 2}
_OTHER_GRADIENTS: Layouts = {
    "expanded": lambda y: torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape),
    "in another order": lambda y: y.transpose(0, -1).contiguous().transpose(0, -1),
    "contiguous": lambda y: y.contiguous(),
}


def check_keys_and_values(numel: int) -> None:
    special = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-7, 6e-8, 65504.0, 1e-40, 5e-324]
    for dtype in _DTYPES:
        x = torch.tensor(special, dtype=torch.float64).repeat(numel // len(special)).to(dtype)
        for seed, p in [(seed, p) for seed in (0, 1, 2**63, 2**64 - 1) for p in (*_PROBABILITIES, 1.0, 1 - 2**-49)]:
            key = torch.tensor([seed, seed ^ 0xFFFF], dtype=torch.uint64)
            expected = dropout(x, p, key=key)
            same(dropout(x.cuda(), p, key=key), expected, f"{dtype}, p = {p}, key on the CPU:")
            same(dropout(x.cuda(), p, key=key.cuda()), expected, f"{dtype}, p = {p}, key on the GPU:")


def default_generator() -> Generator:
    torch.cuda.init()
    return torch.cuda.default_generators[torch.cuda.current_device()]


def check_generator(numel: int) -> None:
    """A call takes [seed, offset / 4] and advances its generator by 4 for any size, also a given generator."""
    default = default_generator()
    default.manual_seed(1234)
    default.set_offset(40)
    own = Generator("cuda").manual_seed(2**63 + 5)
    for generator, seed, first in ((None, 1234, 10), (own, 2**63 + 5, 0)):
        for call, size in enumerate((1, 1000, numel)):
            before = (generator or default).get_offset()
            mask = dropout(torch.ones(size).cuda(), 0.5, generator=generator).cpu() != 0
            key = torch.tensor([seed, first + call], dtype=torch.uint64)
            same(mask, keep_mask((size,), 0.5, key), f"call {call} of generator {seed}:")
            require((generator or default).get_offset() == before + 4, "the generator did not move by 4")
    require(default.get_offset() == 52, "another generator's call moved the default one")


def check_streams(numel: int) -> None:
    """A call runs after the earlier work of its own stream, and without a synchronization with others."""
    x, key, slow = torch.zeros(numel).cuda(), torch.zeros_like(KEY).cuda(), torch.zeros(2, 64 * numel, device="cuda")
    ones, used, stream = torch.ones(numel).cuda(), KEY.cuda(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            slow[0].copy_(slow[1])
        x.copy_(ones)
        key.copy_(used)
        y = dropout(x, 0.3, key=key)
    stream.synchronize()
    same(y, dropout(torch.ones(numel), 0.3, key=KEY))


def check_devices(numel: int) -> None:
    if torch.cuda.device_count() < 2:
        raise Skipped("there is one device")
    x = torch.randn(numel)
    same(dropout(x.to("cuda:1"), 0.3, key=KEY), dropout(x, 0.3, key=KEY))


def _forward_backward(run: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(x), x, gradient)


def check_memory(numel: int) -> str:
    peaks = []
    for kind in (nn.Dropout, Dropout):
        model, x = nn.Sequential(*(kind(P) for _ in range(24))), torch.randn(numel, device="cuda", requires_grad=True)
        run = partial(_forward_backward, model, x, x.detach())
        run()
        peaks.append(peak_bytes("cuda", run))
    if not peaks[0]:
        raise Skipped("this allocator keeps no count")
    found = ", ".join(f"{name} {peak / 2**20:.1f} MiB" for name, peak in zip(("nn", "fd"), peaks, strict=True))
    require(peaks[1] <= peaks[0] - 20 * numel, f"masks are stored somewhere: {found}")
    return f"peak of 24 dropouts of {4 * numel / 2**20:g} MiB: {found}"


def check_compiled(numel: int) -> None:
    """Compiled code has eager's masks, gradients and generator offset."""
    if speed.triton is None:
        raise Skipped("there is no triton")
    x, gradient = torch.randn(numel, device="cuda", requires_grad=True), torch.randn(numel, device="cuda")
    block, results = lambda x: dropout(dropout(x * 2, 0.5), 0.3), []
    for run in (block, torch.compile(block)):
        torch.manual_seed(7)
        y = run(x)
        results.append((y, *torch.autograd.grad(y, x, gradient), default_generator().get_offset()))
    for eager_one, compiled in zip(*(result[:2] for result in results), strict=True):
        same(compiled, eager_one)
    require(results[0][2] == results[1][2], f"generator offsets {results[0][2]} and, compiled, {results[1][2]}")


def run_checks(checks: dict[str, Checking], deadline: float) -> Iterator[Check]:
    lost = ""
    for name, check in checks.items():
        start, result, detail = time.perf_counter(), "passed", ""
        try:
            if lost or start > deadline:
                raise Skipped(lost or "there was no time left")
            detail = check() or ""
            torch.cuda.synchronize()
        except Skipped as reason:
            result, detail = ("failed" if lost else "skipped"), str(reason)
        except Exception as error:
            traceback.print_exc()
            result, detail = "failed", first_line(error)
            try:
                torch.cuda.synchronize()
            except Exception as error_of_all:
                lost = f"not run: the GPU was lost to a check before ({first_line(error_of_all)})"
        yield Check(name, result, detail, time.perf_counter() - start)
        gc.collect()
        with suppress(Exception):  # it raises after a failed capture, or if the GPU is lost
            torch.cuda.empty_cache()


def checks(quick: bool, deadline: float) -> Iterator[Check]:
    numel, largest, columns = (1 << 12, 14, 20) if quick else (1 << 20, 28, 400)
    found: dict[str, Checking] = {
        "keys on CPU and GPU, all p, special values": partial(check_keys_and_values, 1 << 10 if quick else 1 << 16),
        "start, indices to 2^64": check_starts,
        "alignments": partial(check_alignments, 1003 if quick else 70_001),
        "layouts, dense": partial(check_layouts, _DENSE, columns),
        "layouts, rows": partial(check_layouts, _ROWS, columns),
        "layouts, copied": partial(check_layouts, _COPIED, columns),
        "backward": partial(check_backward, columns, _USUAL_GRADIENTS),
        "backward, other gradients": partial(check_backward, columns, _OTHER_GRADIENTS),
        "generator": partial(check_generator, numel),
        "streams": partial(check_streams, numel),
        "devices": partial(check_devices, numel),
        "memory": partial(check_memory, numel),
    }
    for dtype in _DTYPES:
        name = f"the CPU's bits, {str(dtype).removeprefix('torch.')}"
        found[name] = partial(check_sizes, dtype, largest, deadline)
    found["torch.compile"] = partial(check_compiled, numel)
    if not quick:
        found["more than 2^32 elements"] = check_beyond_32_bits
    yield from run_checks(found, deadline)


def overlap(first: Tensor, second: Tensor) -> dict[str, float]:
    """For each shift the correlation of second[i] with first[i + shift]. Both masks are flat."""
    correlations = {}
    for shift in _SHIFTS:
        a, b = first[max(shift, 0) : len(first) + min(shift, 0)], second[max(-shift, 0) : len(second) - max(shift, 0)]
        both, of_a, of_b = (int(mask.count_nonzero()) / len(a) for mask in (a & b, a, b))
        correlations[f"{shift:+d}"] = (both - of_a * of_b) / math.sqrt(of_a * (1 - of_a) * of_b * (1 - of_b))
    return correlations


def overlaps(quick: bool, deadline: float) -> Iterator[Check | Overlap]:
    """The correlations of the masks of two consecutive calls."""
    runs = {"fd.dropout": dropout, "F.dropout": F.dropout}
    for log2 in (12,) if quick else (20, 24):
        for dtype, (name, run) in [(dtype, named) for dtype in DTYPES for named in runs.items()]:
            x = torch.ones(2**log2, dtype=getattr(torch, dtype), device="cuda")
            torch.manual_seed(2026)
            first, second = (run(x, 0.5) != 0 for _ in range(2))
            yield (found := Overlap(name, dtype, 2**log2, 2 ** (-log2 / 2), overlap(first, second)))
            if name == "fd.dropout":
                at, most = largest_of(found.correlations)
                result = "passed" if abs(most) < 6 * found.noise else "failed"
                yield Check(f"consecutive masks, {dtype}, 2^{log2}", result, f"{most:+.4f} at shift {at} at most")


def short(quick: bool, deadline: float) -> Iterator[Check]:
    """Runs each kernel once, for compute-sanitizer. All inputs are copies from the host, so they are initialized."""
    found: dict[str, Checking] = {
        "keys": partial(check_keys_and_values, 24),
        "alignments": partial(check_alignments, 300),
        "layouts": partial(check_layouts, _DENSE | _ROWS, 20),
        "start": check_starts,
        "the CPU's bits": partial(check_sizes, torch.float16, 12, deadline),
    }
    yield from run_checks(found, deadline)
