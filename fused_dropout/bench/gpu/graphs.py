"""The checks of ``python -m fused_dropout gpu-check`` with CUDA graphs: replays draw the masks of eager calls."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Generator, Tensor

from ...functional import dropout
from ...native import eager
from .correctness import Checking, Skipped, default_generator, require, run_checks, same
from .report import Check
from .speed import first_line


def check_graph(numel: int, inplace: bool) -> None:
    """Replay k draws the masks of the k-th eager calls, and advances the generator as they do, by 4 a call."""
    generator, x = default_generator(), torch.ones(numel).cuda()

    def calls(x: Tensor) -> list[Tensor]:
        return [dropout(x, 0.3, True, inplace), dropout(x, 0.6)]

    generator.manual_seed(1234)
    expected = [[y.cpu() for y in calls(torch.ones(numel).cuda())] for _ in range(3)]
    offset = generator.get_offset()
    require(offset == 24, f"six eager calls moved the generator by {offset}")
    generator.manual_seed(1234)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls(x)
    for replay, of_replay in enumerate(expected):
        x.copy_(torch.ones(numel).cuda())
        graph.replay()
        for y, one in zip(captured, of_replay, strict=True):
            same(y, one, f"replay {replay}:")
    require(generator.get_offset() == offset, f"the generator was left at {generator.get_offset()}, not {offset}")


def check_graph_of_backward(numel: int) -> None:
    x, seen = torch.ones(numel).cuda().requires_grad_(), []
    ones, graph = torch.ones(numel).cuda(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dropout(x, 0.3)
        (dx,) = torch.autograd.grad(y, x, ones)
    for _ in range(2):
        graph.replay()
        seen.append(y.detach().cpu())
        same(dx, seen[-1], "the gradient of a sum of ones:")
    require(not torch.equal(*seen), "two replays drew one mask")


def _capture_two(run: Callable[[Tensor, Generator | None], Tensor], generators: Sequence[Generator | None]) -> None:
    """Captures two graphs at once, with their calls in turn, and replays them in turn. Compares with eager calls."""
    x, streams = torch.ones(4096).cuda(), [torch.cuda.Stream() for _ in generators]
    captures = [torch.cuda.CUDAGraph() for _ in generators]

    def reseed() -> None:
        for i, generator in enumerate(generators):
            (generator or default_generator()).manual_seed(1234 + i)
        torch.cuda.synchronize()

    reseed()
    expected = [[run(x, generator).cpu() for _ in range(2)] for _ in range(2) for generator in generators]
    reseed()
    drawn: list[list[Tensor]] = [[] for _ in generators]
    begun: list[tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]] = []
    try:
        for graph, stream, generator in zip(captures, streams, generators, strict=True):
            if generator is not None:
                graph.register_generator_state(generator)
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="relaxed")
            begun.append((graph, stream))
        for _ in range(2):
            for outputs, stream, generator in zip(drawn, streams, generators, strict=True):
                with torch.cuda.stream(stream):
                    outputs.append(run(x, generator))
        while begun:
            graph, stream = begun.pop()
            with torch.cuda.stream(stream):
                graph.capture_end()
    except Exception:
        for graph, stream in begun:
            with suppress(Exception), torch.cuda.stream(stream):
                graph.capture_end()
        raise
    for i, of_replay in enumerate(expected):
        captures[i % 2].replay()
        torch.cuda.synchronize()
        for y, one in zip(drawn[i % 2], of_replay, strict=True):
            same(y, one, f"graph {i % 2}, replay {i // 2}:")


def check_two_captures(own: bool) -> None:
    """Runs only if torch's own random numbers pass the same check.

    Up to torch 2.11 at least, two captures share a generator's state.
    """
    generators = [Generator("cuda"), Generator("cuda")] if own else [None, None]
    try:
        _capture_two(lambda x, generator: torch.rand(x.shape, device=x.device, generator=generator), generators)
    except Exception as error:
        raise Skipped(f"torch.rand does not pass it either ({first_line(error)})") from error
    _capture_two(lambda x, generator: dropout(x, 0.5, generator=generator), generators)


def graphs(quick: bool, deadline: float) -> Iterator[Check]:
    """Runs in a separate process, and the two captures at once last: a failed capture may leave torch unusable."""
    numel = 1 << 12 if quick else 1 << 20
    found: dict[str, Checking] = {
        "graph: replay k is the k-th eager call": partial(check_graph, numel, False),
        "graph: the same in place": partial(check_graph, numel, True),
        "graph: forward and backward": partial(check_graph_of_backward, numel),
        "graph: two captures at once, a generator each": partial(check_two_captures, True),
        "graph: two captures at once": partial(check_two_captures, False),
    }
    if eager is None:
        reason = "without the eager binding a captured key is another one"
        yield from (Check(name, "skipped", reason) for name in found)
        return
    yield from run_checks(found, deadline)
