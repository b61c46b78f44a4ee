"""Tests of a callable that drops, and ``check``, which runs them and those of ``statistics`` on its masks."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .distributions import normal_p_value
from .statistics import (
    ALPHA,
    HEADER,
    Result,
    autocorrelation,
    blocks,
    collisions,
    cross_correlation,
    identical,
    mean,
    rate,
    runs,
    scale,
    uniformity,
    variance,
)

Dropping = Callable[[Tensor], Tensor]

# ------------------------------------------------------------------------------------------ tests of a callable


def same_mask_in_backward(fn: Dropping, x: Tensor, alpha: float = ALPHA) -> Iterator[Result]:
    """Backward zeroes the gradients of what forward zeroed, and of nothing else: in plain backward with another call
    between, checkpointed, where x is 0, which hides the mask from who looks for it in y, and in double backward.

    x: any values but 0; ``fn`` has to be differentiable. Raises what ``fn`` raises, double backward last.
    """
    gradient, detail = torch.rand_like(x) + 1, "have one mask in forward and another in backward"
    x = x.detach().requires_grad_()
    for y in (fn(x * 1), fn(x * 1)):
        yield identical("backward", y == 0, torch.autograd.grad(y, x, gradient)[0] == 0, detail)
    y = checkpoint(lambda x: fn(x * 1), x, use_reentrant=False)
    yield identical("checkpointed backward", y == 0, torch.autograd.grad(y, x, gradient)[0] == 0, detail)
    yield _mask_at_zeros(fn, x, (y == 0).count_nonzero().item() / y.numel(), alpha)
    y, gradient = fn(x * 1), gradient.requires_grad_()
    (grad,) = torch.autograd.grad(y, x, gradient, create_graph=True)
    (grad,) = torch.autograd.grad(grad, gradient, torch.ones_like(grad))
    yield identical("double backward", y == 0, grad == 0, detail)


def _mask_at_zeros(fn: Dropping, x: Tensor, drop_rate: float, alpha: float) -> Result:
    """Where x is 0 the gradients have the rate that the outputs have elsewhere."""
    zeros, n = torch.zeros_like(x, requires_grad=True), x.numel()
    (grad,) = torch.autograd.grad(fn(zeros * 1), zeros, torch.ones_like(x))
    result = rate(grad != 0, min(max(drop_rate, 1 / n), 1 - 1 / n), alpha)
    # Two samples, not one against a known rate: twice the variance.
    z, smallest = result.statistic / math.sqrt(2), result.smallest * math.sqrt(2)
    detail = f"where x is 0, {1 - (grad != 0).double().mean().item():.4g} of the gradients are"
    p_value = normal_p_value(z)
    return replace(result, test="backward at zeros", statistic=z, p_value=p_value, smallest=smallest, detail=detail)


def scale_of_gradients(fn: Dropping, x: Tensor, p: float) -> Result:
    """Each gradient that passes is multiplied by 1 / (1 - p), within two roundings."""
    gradient, x = torch.rand_like(x) + 1, x.detach().requires_grad_()
    result = scale(gradient, torch.autograd.grad(fn(x * 1), x, gradient)[0], p)
    detail = f"gradients are not divided by 1 - p: off by up to {result.statistic:.3g} epsilon"
    return replace(result, test="backward scale", detail=detail)


def draws_nothing(fn: Dropping, x: Tensor) -> Result:
    """``fn``, in evaluation or at p = 0, returns the values of x and leaves the default generators alone."""
    result, moved = _idle(fn, x)
    detail = result.detail + moved * "; the generator has moved"
    return replace(
        result, statistic=result.statistic + moved, p_value=float(result.p_value == 1 and not moved), detail=detail
    )


def _idle(fn: Dropping, x: Tensor) -> tuple[Result, bool]:
    """Whether ``fn`` returns the values of x, and whether it moved a generator."""

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if x.is_cuda else ())]

    before, y = states(), fn(x.clone())
    return identical("eval and p = 0", x, y, "change"), not all(map(torch.equal, before, states()))


def same_mask(fn: Dropping, x: Tensor) -> Iterator[Result]:
    """One seed of torch's default generator gives one mask: at a second call, for a tensor of another alignment, one
    element longer, of another dtype. x: of one dimension. A dropout that promises less may differ in the last three."""

    def seeded(input: Tensor) -> Tensor:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if x.is_cuda else ()):
            torch.manual_seed(1)
            return fn(input) != 0

    other = torch.float64 if x.dtype != torch.float64 else torch.float32
    longer = torch.ones(len(x) + 1, dtype=x.dtype, device=x.device)
    mask = seeded(longer.clone()[:-1])
    yield identical("call", mask, seeded(longer.clone()[:-1]))
    yield identical("size", mask, seeded(longer.clone())[:-1])
    yield identical("alignment", mask, seeded(longer.clone()[1:]))
    yield identical("dtype", mask, seeded(longer[:-1].to(other)))


def notes(fn: Dropping, x: Tensor) -> Iterator[str]:
    """What is good to know and no fault: what becomes of a dropped NaN, and what the mask of one seed depends on."""
    selects = all(bool((fn(torch.full_like(x, value)) == 0).any()) for value in (math.nan, math.inf))
    yield f"a dropped NaN or inf becomes {'0' if selects else 'NaN'}"
    variants: list[Result] = []
    try:
        variants += same_mask(fn, x)
    except Exception as error:  # somebody's kernel may not take another size, alignment or dtype
        yield f"the masks of one seed were not all compared: {str(error)[:90]}"
    changing = [result.test for result in variants if result.statistic]
    if len(changing) < len(variants):
        constant = [result.test for result in variants if not result.statistic]
        yield f"one seed gives one mask, whatever the {', '.join(constant)}"
    if changing:
        yield f"the mask of one seed changes with the {', '.join(changing)}"


# ------------------------------------------------------------------------------------------ all of them


# Kinds of faults, and how the names of the tests begin that find them. The first kind that matches is taken.
_KINDS = {
    "calls": ("every shift, long", "every shift, short", "every shift, tiny", "collisions"),
    "rate of calls": ("rate by call",),
    "positions": ("rate by", "rate at"),
    "elements": ("every lag", "every shift", "runs", "blocks"),
    "rate": ("rate",),
    "scale": ("E[y] / x", "Var[y] / x^2", "scale"),
    "backward at zeros": ("backward at zeros",),
    "backward scale": ("backward scale",),
    "checkpoint": ("checkpointed backward",),
    "backward": ("backward", "double backward"),
    "idle": ("eval and p = 0",),
}
# What each kind means to a user. Causes stand before their consequences.
_MEANINGS = {
    "rate": "{}",
    "scale": "the scale is wrong: {}",
    "backward": "backward uses another mask than forward",
    "backward at zeros": "backward uses another mask than forward where x is 0",
    "backward scale": "backward scales wrongly: {}",
    "checkpoint": "a checkpoint recomputes another mask than forward's",
    "idle": "values change in evaluation or at p = 0",
    "calls": "calls share masks, or parts of them",
    "rate of calls": "the rate changes from call to call",
    "positions": "some positions are dropped more often than others",
    "elements": "the elements of a mask depend on each other",
}
_ROWS = 5  # of faults in a report


@dataclass(frozen=True)
class Report:
    """What ``check`` found: ``results`` of all tests, those that are ``faults`` at the level ``alpha`` of each, and
    ``notes``. ``str()`` gives the verdict, up to five faults and the notes; ``table`` has all tests."""

    p: float
    alpha: float
    results: tuple[Result, ...]
    notes: tuple[str, ...]

    @property
    def faults(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.p_value < self.alpha)

    @property
    def verdict(self) -> str:
        """What is wrong, in one line, the cause first; "nothing is wrong" if there are no faults."""
        return "; ".join(self._causes()) or "nothing is wrong"

    @property
    def table(self) -> str:
        """All tests, one a line."""
        lines = [f"p = {self.p:g}; alarm at a p-value below {self.alpha:.0e}", HEADER]
        faults = self.faults
        return "\n".join(lines + [f"{result}{'  <- WRONG' * (result in faults)}" for result in self.results])

    def _causes(self) -> dict[str, Result]:
        """What is wrong, in words, and the result with the smallest p-value for each. Causes come first, and their
        consequences are left out."""
        found: dict[str, Result] = {}
        for result in self.faults:
            kind = next(kind for kind, names in _KINDS.items() if result.test.startswith(names))
            if kind == "calls" and " at shift 0, " in result.detail:
                kind = "elements"  # the correlation is within one call
            found[kind] = min(found.get(kind, result), result, key=lambda r: r.p_value)
        for kind in self._consequences(found):
            found.pop(kind, None)
        return {words.format(found[kind].detail): found[kind] for kind, words in _MEANINGS.items() if kind in found}

    def _consequences(self, found: dict[str, Result]) -> Iterator[str]:
        """The kinds of faults that follow from others."""
        measured = self.p
        if off := found.get("rate"):
            measured += off.statistic * math.sqrt(self.p * (1 - self.p) / off.n)
            yield from ("scale", "backward scale")  # their tests expect 1 / (1 - p) for the given p
        if "scale" in found or "backward" in found:
            yield "backward scale"
        if not 1e-9 < measured < 1 - 1e-9:  # the mask is constant
            yield from ("calls", "rate of calls", "positions", "elements", "backward at zeros")
        elif "calls" in found or "elements" in found:
            # The tests of rates assume independent draws, and those of calls independent elements.
            yield from ("rate of calls", "backward at zeros")
            if "positions" in found and not any(map(_is_strong, self.faults)):
                yield from ("calls", "elements")  # different rates by position correlate calls and elements
            else:
                yield "positions"
                yield from ["calls"] * ("elements" in found)
            if abs(measured - self.p) < 0.05:
                yield "rate"
        if "backward" in found:
            yield from ("backward at zeros", "checkpoint")

    def __str__(self) -> str:
        if not self.faults:
            lines = [f"p = {self.p:g}: nothing is wrong ({len(self.results)} tests)"]
        else:
            lines = [f"p = {self.p:g}: WRONG: {self.verdict}"]
            shown = [result for words, result in self._causes().items() if result.detail not in words]
            lines += [f"  {result.test}: {result.detail}" for result in shown[:_ROWS]]
            lines.append(f"  {len(self.faults)} of {len(self.results)} tests fail")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _is_strong(result: Result) -> bool:
    """Whether it found a correlation near 1."""
    return result.test.startswith(("every shift", "every lag")) and abs(result.statistic) > 0.5 * math.sqrt(result.n)


def sample(fn: Dropping, calls: int, shape: Sequence[int], dtype: torch.dtype, device: str, seconds: float) -> Tensor:
    """Masks of consecutive calls ``fn(ones)``: bool, (calls, *shape), or of fewer calls after so many seconds."""
    ones, deadline = torch.ones(*shape, dtype=dtype, device=device), time.perf_counter() + seconds
    masks: list[Tensor] = []
    chunk = max(1, min(calls, 2**16 // ones.numel()))
    while len(masks) * chunk < calls and (len(masks) < 2 or time.perf_counter() < deadline):
        masks.append(torch.stack([fn(ones.clone()) for _ in range(chunk)]) != 0)
    return torch.cat(masks)


def check(
    fn: Dropping,
    p: float = 0.5,
    *,
    idle: Sequence[Dropping] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    n: int = 2**22,
    seconds: float = 30.0,
    family: float = 1e-6,
) -> Report:
    """Runs all tests on a callable that drops.

    Args:
        fn: takes a tensor, returns its dropout: y is 0 where an element was dropped, x / (1 - p) elsewhere. It may work
            in place. It has to draw anew at each call; each call is meant to be independent of the others.
        p: the drop probability that ``fn`` is meant to have, 0.01 to 0.99.
        idle: the same dropout in evaluation, or with p = 0: callables that have to return their input. It is noted, and
            no fault, if they move a generator.
        dtype, device: of the tensors that ``fn`` is given.
        n: elements of a long call, a power of two, 2^18 at least. Four of these are sampled, n / 2^10 short calls of
            1023 elements and n / 2^4 of 64: at 2^22 it takes some ten seconds.
        seconds: for the sampling, about: a ``fn`` that is slower is called less often.
        family: probability of any alarm at all on a faultless ``fn``.

    Returns:
        A Report; ``report.faults`` is empty if nothing is wrong.

    Raises:
        ValueError: p is not between 0.01 and 0.99, or n too small.
        TypeError: ``fn`` does not return a tensor of its input's shape, dtype and device. Whatever it raises is passed
            on.
    """
    check_settings(p, n)
    alpha = family / 50  # there are fewer than fifty tests
    with torch.no_grad():
        for shape in ((64,), (2, 4, 8)):
            check_output(fn, torch.ones(shape, dtype=dtype, device=device))
        draw = partial(sample, fn, dtype=dtype, device=device, seconds=seconds / 3)
        long, short, tiny = draw(4, (n >> 18, 64, 64, 64)), draw(n >> 10, (1023,)), draw(n >> 4, (64,))
        x = torch.rand(n, dtype=torch.float32, device=device).add_(1).to(dtype)
        y = fn(x.clone())
    everything = torch.cat([masks.flatten() for masks in (long, short, tiny)])
    results = [rate(everything, p, alpha), mean(x, y, p, alpha), variance(x, y, p, alpha), scale(x, y, p)]
    remarks = list(notes(fn, x[: 2**12]))
    for masks in (long, short):
        results += [replace(r, test=f"{r.test}, n = {masks[0].numel()}") for r in uniformity(masks, alpha)]
    left_out: dict[str, int] = {}
    for test in _independence(long, short, tiny, alpha):
        try:
            results.append(test())
        except ValueError as error:  # too few draws for it, or a constant mask, at which the tests above alarm
            left_out[str(error)] = left_out.get(str(error), 0) + 1
    remarks += [f"tests of independence left out: {count}, since {why}" for why, count in left_out.items()]
    try:
        at_rest = [_idle(each, x[: 2**10]) for each in idle]
        results += [result for result, _ in at_rest]
        if any(moved for _, moved in at_rest):
            remarks.append("the generator moves in evaluation or at p = 0, where torch's dropout draws nothing")
    except Exception as error:  # somebody's dropout may refuse p = 0
        remarks.append(f"evaluation and p = 0 were not tested: {str(error)[:90]}")
    try:
        results.append(scale_of_gradients(fn, x[: 2**16 + 5], p))
        for result in same_mask_in_backward(fn, x[: 2**16 + 5], alpha):
            results.append(result)
    except Exception as error:  # somebody's kernel may have no backward, or no double backward
        remarks.append(f"not all of backward was tested: {str(error)[:90]}")
    return Report(p, alpha, tuple(results), tuple(remarks))


def check_output(fn: Dropping, x: Tensor) -> None:
    """Raises TypeError if ``fn`` does not return a tensor of the shape, dtype and device of x."""
    y = fn(x.clone())
    if not isinstance(y, Tensor):
        raise TypeError(f"a dropout has to return a tensor, but this returns a {type(y).__name__}")
    if (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device):
        given, got = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (x, y))
        raise TypeError(f"a dropout has to return what it is given, {given}, but this returns {got}")


def check_settings(p: float, n: int) -> None:
    if n < 2**18 or n & (n - 1):
        raise ValueError(f"n has to be a power of two, 2^18 at least, but is {n}")
    if not 0.01 <= p <= 0.99:
        raise ValueError(f"p has to be between 0.01 and 0.99 for the tests of independence, but is {p}")


def _independence(long: Tensor, short: Tensor, tiny: Tensor, alpha: float) -> Iterator[Callable[[], Result]]:
    """The tests that need masks of both kinds of elements, and enough of them."""
    yield partial(autocorrelation, long[0].flatten(), "every lag of a call, flat", alpha)
    yield partial(autocorrelation, long[1], "every shift, all dimensions", alpha)
    for later in range(1, len(long)):
        yield partial(cross_correlation, long[0], long[later], f"every shift, long calls {later} apart", alpha)
    yield partial(autocorrelation, short, "every shift, short calls k apart", alpha)
    yield partial(autocorrelation, tiny[: 2**16], "every shift, tiny calls k apart", alpha)
    yield partial(collisions, tiny, "collisions, tiny calls", alpha)
    yield partial(collisions, long[:, :2], "collisions, long calls", alpha)
    yield partial(runs, long[0], alpha)
    for side in (8, 32):
        yield partial(blocks, long[1].flatten().view(2048, -1), side, alpha)
