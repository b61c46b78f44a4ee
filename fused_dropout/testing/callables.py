"""Tests of a callable that drops, and ``check``, which runs them and those of ``statistics`` on its masks."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .distributions import normal_p_value
from .report import Report, described
from .statistics import (
    ALPHA,
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
    """Backward zeroes the gradients of the elements that forward zeroed, and no others.

    This is tested after another call in between, with a checkpoint, in double backward, and where x is 0: there a
    backward that reads its mask from y would go wrong. x must not contain zeros. ``fn`` has to be differentiable; its
    errors are passed on. Double backward comes last.
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
    """Where x is 0, gradients are zeroed at the rate at which outputs are zeroed elsewhere."""
    zeros, n = torch.zeros_like(x, requires_grad=True), x.numel()
    (grad,) = torch.autograd.grad(fn(zeros * 1), zeros, torch.ones_like(x))
    result = rate(grad != 0, min(max(drop_rate, 1 / n), 1 - 1 / n), alpha)
    # Two samples are compared, not a sample with a known rate, which doubles the variance.
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
    result, moved = _idle("evaluation and p = 0", fn, x)
    detail = result.detail + moved * "; the generator has moved"
    return replace(
        result, statistic=result.statistic + moved, p_value=float(result.p_value == 1 and not moved), detail=detail
    )


def _idle(test: str, fn: Dropping, x: Tensor) -> tuple[Result, bool]:
    """Whether ``fn`` returns the values of x, and whether it moved a generator."""

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if x.is_cuda else ())]

    before, y = states(), fn(x.clone())
    return _wrong_output(x, y, test) or identical(test, x, y, "change"), not all(map(torch.equal, before, states()))


def _wrong_output(x: Tensor, y: object, test: str = "output") -> Result | None:
    """A fault, if y is no finite tensor of the shape, dtype and device of x, which is finite."""
    if not isinstance(y, Tensor):
        return _fault(test, f"returns {y!r:.20} of type {type(y).__name__}, and no tensor")
    for quantity, given, got in (
        ("", x.dtype, y.dtype),
        ("shape ", tuple(x.shape), tuple(y.shape)),
        ("device ", x.device, y.device),
    ):
        if given != got:
            return _fault(test, f"returns {quantity}{got} for {given}".replace("torch.", ""))
    if wrong := y.numel() - int(y.isfinite().count_nonzero()):
        return _fault(test, f"returns NaN or inf in {wrong} of {y.numel()} elements for finite values")
    return None


def _fault(test: str, detail: str) -> Result:
    return Result(test, 1, 1.0, 0.0, 1.0, "call", detail)


def same_mask(fn: Dropping, x: Tensor) -> Iterator[Result]:
    """One seed of torch's default generator gives one mask: in a second call, for a tensor of another alignment, with
    one element more, and of another dtype. x has one dimension. A dropout may differ in the last three, unless it
    promises more than torch's.
    """

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
    """Facts that are no faults: what becomes of a dropped NaN, and what the mask of one seed depends on."""
    try:
        selects = all(bool((fn(torch.full_like(x, value)) == 0).any()) for value in (math.nan, math.inf))
        yield f"a dropped NaN or inf becomes {'0' if selects else 'NaN'}"
    except Exception as error:  # it may check its input
        yield f"NaN and inf were not tested: {described(error)}"
    variants: list[Result] = []
    try:
        variants += same_mask(fn, x)
    except Exception as error:  # somebody's kernel may not take another size, alignment or dtype
        yield f"the masks of one seed were not all compared: {described(error)}"
    changing = [result.test for result in variants if result.statistic]
    if len(changing) < len(variants):
        constant = [result.test for result in variants if not result.statistic]
        yield f"one seed gives one mask, whatever the {', '.join(constant)}"
    if changing:
        yield f"the mask of one seed changes with the {', '.join(changing)}"


# ------------------------------------------------------------------------------------------ all of them


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
    evaluation: Dropping | None = None,
    p_zero: Dropping | None = None,
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
        evaluation: the same dropout in evaluation, which has to return the values of its input. Not tested by default.
        p_zero: the same dropout with p = 0, which has to return the values of its input too. If one of these two moves
            a generator, a note says so; it is no fault.
        dtype, device: of the tensors that ``fn`` is given.
        n: elements of a long call: a power of two, at least 2^18. Four long calls are sampled, n / 2^10 short calls of
            1023 elements and n / 2^4 tiny calls of 64. With 2^22 it takes about ten seconds.
        seconds: time for the sampling, about. A slow ``fn`` is called less often.
        family: probability of at least one false alarm in all tests together.

    Returns:
        A Report; ``report.faults`` is empty if nothing is wrong. A result of another shape, dtype or device, with NaN
        or without a gradient is a fault, and so is an error in backward, in evaluation or at p = 0.

    Raises:
        ValueError: p is not between 0.01 and 0.99, or n too small. What ``fn`` raises in training is passed on.
    """
    check_settings(p, n)
    alpha = family / 50  # there are fewer than fifty tests
    with torch.no_grad():
        for shape in ((64,), (2, 4, 8)):
            ones = torch.ones(shape, dtype=dtype, device=device)
            if fault := _wrong_output(ones, fn(ones.clone())):
                return Report(p, alpha, (fault,), ())
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
        except ValueError as error:  # too few draws, or a constant mask, which the tests above report
            left_out[str(error)] = left_out.get(str(error), 0) + 1
    remarks += [f"tests of independence left out: {count}, since {why}" for why, count in left_out.items()]
    for name, idle in (("evaluation", evaluation), ("p = 0", p_zero)):
        if idle is not None:
            result, remark = _idle_or_fault(name, idle, x[: 2**10])
            results.append(result)
            remarks += remark
    of_backward, remark = _backward(fn, x[: 2**16 + 5], p, alpha)
    return Report(p, alpha, (*results, *of_backward), (*remarks, *remark))


def _idle_or_fault(name: str, fn: Dropping, x: Tensor) -> tuple[Result, list[str]]:
    """The result of ``_idle``, a fault if ``fn`` raises, and a note if it draws."""
    try:
        result, moved = _idle(name, fn, x)
    except Exception as error:
        return _fault(name, f"raises {described(error)}"), []
    return result, [f"the generator moves ({name}), where torch's dropout draws nothing"] * moved


def _backward(fn: Dropping, x: Tensor, p: float, alpha: float) -> tuple[list[Result], list[str]]:
    """The tests of backward, a fault if there is none or if it raises, and a note if there is no double backward."""
    results: list[Result] = []
    try:
        if not fn(x.detach().requires_grad_() * 1).requires_grad:
            return [_fault("gradient", "the result has no gradient")], []
        results.append(scale_of_gradients(fn, x, p))
        for result in same_mask_in_backward(fn, x, alpha):
            results.append(result)
    except Exception as error:
        if results and results[-1].test == "backward at zeros":  # only double backward is left
            return results, [f"double backward was not tested: {described(error)}"]
        results.append(_fault("gradient", f"with an input that requires grad, raises {described(error)}"))
    return results, []


def check_settings(p: float, n: int) -> None:
    if n < 2**18 or n & (n - 1):
        raise ValueError(f"n has to be a power of two, 2^18 at least, but is {n}")
    if not 0.01 <= p <= 0.99:
        raise ValueError(f"p has to be between 0.01 and 0.99 for the tests of independence, but is {p}")


def _independence(long: Tensor, short: Tensor, tiny: Tensor, alpha: float) -> Iterator[Callable[[], Result]]:
    """The tests that need enough draws, with both kept and dropped elements."""
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
