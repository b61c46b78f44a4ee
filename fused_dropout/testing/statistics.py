"""Tests of masks. Each test takes bool tensors, True where an element was kept, and returns a ``Result``.

A result holds the p-value and the size of the smallest fault that the test would have found. So a fault that was not
found is known to be smaller. The tests use ``alpha`` for that size only; the caller compares the p-value with it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .distributions import (
    binomial_p_value,
    chi_square_limit,
    chi_square_p_value,
    normal_limit,
    normal_p_value,
    peak_p_value,
)

ALPHA = 1e-8  # level of one test: 1e-6 for a family of a hundred


@dataclass(frozen=True)
class Result:
    """The outcome of one test on ``n`` draws.

    ``p_value`` is the probability that a correct mask gives a statistic at least as extreme; it is 0 or 1 where
    equality is tested. ``smallest`` is the smallest fault that the test finds with probability 0.99 at its level, in
    the unit that ``fault`` names. ``detail`` says in words what was found.
    """

    test: str
    n: int
    statistic: float
    p_value: float
    smallest: float
    fault: str
    detail: str

    def __str__(self) -> str:
        draws = f"2^{math.log2(max(self.n, 1)):.1f}"
        return (
            f"{self.test:42} {draws:>6} {self.statistic:>10.4g} {self.p_value:>8.1e}  {self.smallest:.1e} {self.fault}"
        )


HEADER = f"{'test':42} {'n':>6} {'statistic':>10} {'p-value':>8}  smallest fault seen"


# ------------------------------------------------------------------------------------------ rate and scale


def rate(mask: Tensor, p: float, alpha: float = ALPHA) -> Result:
    """Drop rate: exact binomial test of the dropped elements of a bool mask of any shape against p, 0 < p < 1."""
    n = mask.numel()
    dropped = n - int(mask.count_nonzero())
    deviation = math.sqrt(n * p * (1 - p))
    return Result(
        "rate",
        n,
        (dropped - n * p) / deviation,
        binomial_p_value(dropped, n, p),
        normal_limit(alpha) * deviation / n,
        "of the rate, absolute",
        _drops(dropped / n, p),
    )


def _drops(rate: float, p: float) -> str:
    how_many = {0.0: "nothing", 1.0: "everything"}.get(rate, f"{rate:.4g} of the elements")
    return f"drops {how_many}, where p is {p:.4g}"


def mean(x: Tensor, y: Tensor, p: float, alpha: float = ALPHA) -> Result:
    """Mean: compares the sum of y with the sum of x, two tensors of one shape. x has to be positive.

    Given x, y has mean x and variance x^2 p / (1 - p). Use different values in x, so that rounding errors average out.
    """
    wide = x.double()
    ratio = y.sum(dtype=torch.float64).item() / wide.sum().item()
    deviation = math.sqrt(wide.square().sum().item() * p / (1 - p)) / wide.sum().item()
    z = (ratio - 1) / deviation
    detail = f"the mean of y is {ratio:.7g} times that of x"
    return Result("E[y] / x", x.numel(), z, normal_p_value(z), normal_limit(alpha) * deviation, "of the mean", detail)


def variance(x: Tensor, y: Tensor, p: float, alpha: float = ALPHA) -> Result:
    """Variance: compares the sum of (y - x)^2 with the sum of x^2, two tensors of one shape.

    (y / x - 1)^2 is 1 where an element was dropped and (p / (1 - p))^2 where it was kept. With r = p / (1 - p) its
    mean is r and its variance p + (1 - p) r^4 - r^2. The rounding to y's dtype adds its epsilon squared.
    """
    wide, odds = x.double(), p / (1 - p)
    squares, errors = wide.square(), (y.double() - wide).square()
    ratio = (errors.sum() / squares.sum()).item()
    noise = p + (1 - p) * odds**4 - odds**2 + torch.finfo(y.dtype).eps ** 2
    deviation = math.sqrt(squares.square().sum().item() * noise) / squares.sum().item()
    z, detail = (ratio - odds) / deviation, f"the variance of y is {ratio:.7g} x^2, not {odds:.7g} x^2"
    return Result("Var[y] / x^2", x.numel(), z, normal_p_value(z), normal_limit(alpha) * deviation, "of x^2", detail)


def scale(x: Tensor, y: Tensor, p: float) -> Result:
    """Scale: each kept element is x / (1 - p), within two roundings to y's dtype. x must not contain zeros.

    The statistic is the largest relative error, in units of the dtype's epsilon.
    """
    wide, limit = x.double() / (1 - p), 1.001
    error = torch.where(y == 0, 0.0, (y.double() / wide - 1).abs()).max().item() / torch.finfo(y.dtype).eps
    detail = f"kept elements are not x / (1 - p): off by up to {error:.3g} epsilon"
    return Result("scale", x.numel(), error, float(error <= limit), limit, "epsilon of a kept element", detail)


# ------------------------------------------------------------------------------------------ uniformity


def dispersion(
    test: str, counts: Tensor, trials: Tensor | int, kept_rate: float | None = None, alpha: float = ALPHA
) -> Result:
    """Chi-square test: several classes of elements have the same keep rate.

    Args:
        test: the name of the result.
        counts: number of kept elements of each class.
        trials: number of elements of each class, or of every class.
        kept_rate: the expected rate. By default the rate of all classes together, which costs a degree of freedom.
        alpha: level of the test.
    """
    counts, trials = counts.double().flatten(), torch.as_tensor(trials, device=counts.device).double()
    trials = trials.expand(counts.shape)
    n, df = int(trials.sum()), len(counts) - (kept_rate is None)
    q = (counts.sum() / n).item() if kept_rate is None else kept_rate
    variance = max(q * (1 - q), 1 / n)
    z = (counts - trials * q) / (trials * variance).sqrt()
    statistic, worst = z.square().sum().item(), int(z.abs().argmax())
    smallest = math.sqrt(chi_square_limit(df, alpha) * variance / n)
    detail = f"number {worst} of {len(counts)} drops {1 - (counts[worst] / trials[worst]).item():.4g}, all {1 - q:.4g}"
    return Result(test, n, statistic, chi_square_p_value(statistic, df), smallest, "r.m.s. of the rates", detail)


def uniformity(masks: Tensor, alpha: float = ALPHA) -> Iterator[Result]:
    """The keep rate is the same everywhere in masks of shape (calls, ...): by call, by position, by position modulo 8,
    16, 32 and 64 (the slots of a vector or a warp), at the first and last 64 positions, and by index of each dimension.
    """
    flat = masks.flatten(1)
    calls, n = flat.shape
    kept_rate = (flat.count_nonzero() / flat.numel()).item()
    by_position, position = flat.sum(0).double(), torch.arange(n, device=masks.device)
    yield dispersion("rate by call", flat.sum(1), n, alpha=alpha)
    if calls * min(kept_rate, 1 - kept_rate) >= 5:  # with fewer the counts are not nearly normal
        yield dispersion("rate by position", by_position, calls, alpha=alpha)
        edge = min(64, n // 2)
        ends = torch.cat((by_position[:edge], by_position[n - edge :]))
        yield dispersion("rate at heads and tails", ends, calls, kept_rate, alpha=alpha)
    for m in (m for m in (8, 16, 32, 64) if m <= n):
        counts = torch.zeros(m, dtype=torch.float64, device=masks.device).index_add_(0, position % m, by_position)
        yield dispersion(f"rate by position mod {m}", counts, (position % m).bincount() * calls, alpha=alpha)
    for d in range(1, masks.dim()) if masks.dim() > 2 else ():
        counts = masks.movedim(d, 0).flatten(1).sum(1)
        yield dispersion(f"rate by index of dimension {d - 1}", counts, masks.numel() // len(counts), alpha=alpha)


# ------------------------------------------------------------------------------------------ independence


def _peak(
    test: str, n: int, correlation: Tensor, z: Tensor, shifts: int, rates: Sequence[float], alpha: float
) -> Result:
    """The result for the largest of ``z``: the correlations at all shifts, divided by their standard deviations.

    shifts: how many of them are independent. rates: the keep rates of both masks. A sum over n pairs of draws has the
    product of the draws' skewnesses divided by n^(1/2) as its skewness.
    """
    skewness = math.prod((1 - 2 * q) / math.sqrt(q * (1 - q)) for q in rates) / math.sqrt(n)
    if abs(skewness) > 0.1:
        raise ValueError(f"{n} draws are too few for correlations at keep rates {rates}: skewness {skewness:.2g}")
    at = z.abs().argmax().cpu()
    where = zip(torch.unravel_index(at, z.shape), z.shape, strict=True)
    shift = ", ".join(str((int(i) + size // 2) % size - size // 2) for i, size in where)
    peak, smallest = z.flatten()[at].item(), normal_limit(alpha, shifts) / math.sqrt(n)
    p_value, detail = peak_p_value(peak, shifts, skewness), f"{correlation.flatten()[at]:.3g} at shift {shift}"
    return Result(test, n, peak, p_value, smallest, "correlation at any shift", f"correlation {detail}")


def correlations(mask: Tensor) -> tuple[Tensor, float]:
    """The correlations of a mask with itself at all shifts, which are circular in each dimension, and its keep rate."""
    centred, q = _centred(mask)
    dims = tuple(range(mask.dim()))
    spectrum = torch.fft.rfftn(centred, dim=dims)
    return torch.fft.irfftn(spectrum.abs().square(), s=mask.shape, dim=dims) / mask.numel(), q


def autocorrelation(mask: Tensor, test: str = "auto-correlation", alpha: float = ALPHA) -> Result:
    """The elements of a bool mask are independent: tests the correlation at all shifts, circular in each dimension.

    A mask of one dimension is tested at every lag, a mask of two dimensions at every shift of rows and columns
    together, and so on. With calls stacked along dimension 0, this includes shifts between any two calls. The
    correlations are the inverse Fourier transform of the power spectrum (Wiener-Khinchin theorem). The p-value is that
    of the largest one.

    Raises:
        ValueError: the mask is constant, or too few elements are dropped or kept for a nearly normal correlation.
    """
    correlation, q = correlations(mask)
    n = mask.numel()
    z = correlation * math.sqrt(n)
    z.view(-1)[0] = 0
    # A shift that equals its own opposite counts each pair twice, which doubles the variance.
    z[tuple(slice(None, None, max(1, size // 2) if size % 2 == 0 else size) for size in mask.shape)] /= math.sqrt(2)
    return _peak(test, n, correlation, z, max(n // 2, 1), (q, q), alpha)


def cross_correlation(a: Tensor, b: Tensor, test: str = "cross-correlation", alpha: float = ALPHA) -> Result:
    """Two bool masks are independent: tests the correlation at every circular shift. Masks of any shape are flattened.

    Raises:
        ValueError: as ``autocorrelation``.
    """
    (za, qa), (zb, qb) = _centred(a.flatten()), _centred(b.flatten())
    length, n = max(len(za), len(zb)), min(len(za), len(zb))
    spectrum = torch.fft.rfft(za, length).conj() * torch.fft.rfft(zb, length)
    correlation = torch.fft.irfft(spectrum, length) / n
    return _peak(test, n, correlation, correlation * math.sqrt(n), length, (qa, qb), alpha)


def _centred(mask: Tensor) -> tuple[Tensor, float]:
    """The mask shifted and scaled to mean 0 and variance 1, and its keep rate."""
    z = mask.double()
    q = z.mean().item()
    if q in (0, 1):
        raise ValueError("the mask is constant")
    return z.sub_(q).div_(math.sqrt(q * (1 - q))), q


def collisions(masks: Tensor, test: str = "collisions", alpha: float = ALPHA) -> Result:
    """Repeated words of 64 bits in masks of shape (calls, ...): finds a part of one call's mask that occurs again, in
    another call or in the same one, at any distance that is a multiple of eight elements.

    Words begin at each of the eight byte alignments. Where p is not 1/2, a word is the XOR of k neighbours. k is large
    enough that two independent words are equal with probability ((1 + (1 - 2p)^2k) / 2)^64 <= e 2^-64. By Markov's
    inequality the p-value of c collisions is at most the expected number divided by c.

    Raises:
        ValueError: a call has fewer than 64 k elements.
    """
    flat = masks.flatten(1)[:, : masks[0].numel() // 8 * 8]
    bias, folded = _bias_and_folds(masks)
    if flat.shape[1] < 64 * folded:
        raise ValueError(f"calls of {flat.shape[1]} elements are too short for words of {64 * folded}")
    bits = flat.view(len(flat), -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=masks.device)
    packed = bits.sum(-1, dtype=torch.uint8)
    words = torch.cat([_words(packed[:, first:], folded) for first in range(8)])
    in_order = words.sort().values
    repeats = int((in_order[1:] == in_order[:-1]).sum())
    # Words of neighbouring alignments share elements; there are too few such pairs to matter.
    expected = len(words) ** 2 / 2 * ((1 + bias ** (2 * folded)) / 2) ** 64
    p_value = min(1.0, expected / repeats) if repeats else 1.0
    needed = max(1, math.ceil(expected / alpha))
    detail = f"{repeats} of {len(words)} words occur a second time, where {expected:.1g} are expected"
    fault = f"repeat(s) of {64 * folded} to {64 * folded + 56 * (len(flat[0]) > 64)} elements"
    return Result(test, flat.numel(), repeats, p_value, needed, fault, detail)


def _bias_and_folds(masks: Tensor) -> tuple[float, int]:
    """|1 - 2p|, and the smallest k for which |1 - 2p|^2k <= 1/64."""
    bias = abs(1 - 2 * masks.count_nonzero().item() / masks.numel())
    return bias, max(1, math.ceil(math.log(64) / -2 / math.log(bias))) if 0 < bias < 1 else 1


def _words(packed: Tensor, folded: int) -> Tensor:
    """Packs rows of uint8 into int64 words, each the XOR of ``folded`` neighbours. A remainder is left out."""
    whole = packed.shape[1] // (8 * folded) * 8 * folded
    words = packed[:, :whole].flatten().clone().view(torch.int64).view(-1, folded)
    return reduce(torch.bitwise_xor, words.unbind(1))


def runs(mask: Tensor, alpha: float = ALPHA) -> Result:
    """Run lengths: compares the runs of kept and of dropped elements of a flattened bool mask with the geometric
    distribution, by a chi-square test. Lengths that are expected fewer than a hundred times form one class.

    Raises:
        ValueError: the mask is constant.
    """
    flat = mask.flatten()
    q = _centred(flat)[1]
    ends = (flat[1:] != flat[:-1]).nonzero().flatten()
    lengths, kept = ends.diff(), flat[ends[1:]]
    statistic, df, n = 0.0, 0, len(lengths)
    for go_on, of_kind in ((q, lengths[kept]), (1 - q, lengths[~kept])):
        longest = max(1, int(math.log(100 / max(len(of_kind), 101)) / math.log(go_on)))
        chances = torch.tensor([go_on**i * (1 - go_on) for i in range(longest)] + [go_on**longest]).double()
        expected = chances * len(of_kind)
        found = of_kind.clamp(max=longest + 1).sub(1).bincount(minlength=longest + 1).cpu()
        statistic += ((found - expected).square() / expected.clamp(min=1)).sum().item()
        df += longest
    smallest = math.sqrt(chi_square_limit(df, alpha) / max(n, 1))
    detail = (
        f"{n} runs, where {2 * q * (1 - q) * flat.numel():.0f} are expected; lengths off by {statistic:.0f} for {df}"
    )
    p_value = chi_square_p_value(statistic, df)
    return Result("runs", flat.numel(), statistic, p_value, smallest, "r.m.s., relative, of lengths", detail)


def blocks(mask: Tensor, side: int = 8, alpha: float = ALPHA) -> Result:
    """Variance of the number of kept elements in square blocks of a two-dimensional bool mask.

    For m blocks the sum of the squared, normalized counts has mean m and variance m (2 + excess / side^2), where
    excess = (1 - 6 q (1 - q)) / (q (1 - q)) is the excess kurtosis of one draw with keep rate q.
    """
    rows, columns = (size // side for size in mask.shape)
    counts = mask[: rows * side, : columns * side].reshape(rows, side, columns, side).sum((1, 3)).double()
    q, area, m = (counts.mean() / side**2).item(), side**2, rows * columns
    variance = max(q * (1 - q), 1 / (m * area))
    ratio = (counts - area * q).square().sum().item() / (area * variance * m)
    deviation = math.sqrt((2 + (1 - 6 * variance) / (variance * area)) / m)
    z, detail = (
        (ratio - 1) / deviation,
        f"the variance of a block's rate is {ratio:.4g} times that of independent draws",
    )
    name, fault = f"blocks of {side} x {side}", "of the variance"
    return Result(name, m * area, z, normal_p_value(z), normal_limit(alpha) * deviation, fault, detail)


# ------------------------------------------------------------------------------------------ equality


def identical(test: str, a: Tensor, b: Tensor, detail: str = "differ") -> Result:
    """Two tensors of one shape are equal, element by element. The p-value is 1 if they are, else 0."""
    differences = int((a != b).count_nonzero())
    words = f"{differences} of {a.numel()} elements {detail}"
    return Result(test, a.numel(), differences, float(differences == 0), 1, "element", words)
