"""The tail probabilities: against sums and known values, and against scipy where it is installed."""

import math
from statistics import NormalDist

import pytest
import torch
from common import one_thread  # noqa: F401

from fused_dropout import testing
from fused_dropout.testing.distributions import (
    binomial_p_value,
    chi_square_limit,
    chi_square_p_value,
    normal_limit,
    normal_p_value,
    peak_p_value,
)


@pytest.mark.parametrize("p", [0.03, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("n", [1, 7, 60])
def test_binomial_is_a_sum(n, p):
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    for k in range(n + 1):
        tail = sum(chances[: k + 1]) if k < n * p else sum(chances[k:])
        assert binomial_p_value(k, n, p) == pytest.approx(min(1, 2 * tail), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "p"), [(2**20, 1e-6), (2**24, 0.1), (2**24, 1 / 3), (2**31, 0.1), (2**31, 0.5), (2**24, 0.99)]
)
def test_binomial_of_many(n, p):
    stats = pytest.importorskip("scipy.stats")
    for sigmas in (-8, -3, -0.5, 0.5, 3, 8):
        k = max(0, round(n * p + sigmas * math.sqrt(n * p * (1 - p))))
        tail = stats.binom.cdf(k, n, p) if k < n * p else stats.binom.sf(k - 1, n, p)
        assert binomial_p_value(k, n, p) == pytest.approx(min(1, 2 * tail), rel=1e-3)


def test_chi_square_and_normal():
    assert normal_p_value(-1.959963984540054) == pytest.approx(0.05)
    assert chi_square_p_value(5.991464547107979, 2) == pytest.approx(0.1)  # the upper tail is 0.05
    assert chi_square_p_value(2 * math.log(10 / 9), 2) == pytest.approx(0.2)  # the lower is 1 - e^(-x / 2)
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 7, 63, 1022, 2**20):
        for sigmas in (-5, -1, 1, 6, 12):
            x = max(df / 100, df + sigmas * math.sqrt(2 * df))
            tail = min(stats.chi2.sf(x, df), stats.chi2.cdf(x, df))
            assert chi_square_p_value(x, df) == pytest.approx(2 * tail, rel=1e-6)


def test_peak():
    """One variable is the normal tail; m of them at a p-value of u each leave 1 - (1 - u)^m; skewness fattens."""
    assert peak_p_value(4.0, 1) == pytest.approx(normal_p_value(4.0))
    assert peak_p_value(5.4, 2**21) == pytest.approx(1 - (1 - normal_p_value(5.4)) ** 2**21, rel=1e-6)
    assert peak_p_value(40.0, 2**22) == 0
    assert peak_p_value(5.4, 2**21, skewness=0.05) > 1.5 * peak_p_value(5.4, 2**21)
    assert peak_p_value(2000.0, 2**21, skewness=0.1) == 0


def test_limits_are_seen_99_times_in_100():
    """A fault of the size that a result names: alarm in 99 of 100 draws, or more where a bound stands in for it."""
    alpha = 1e-8
    critical = NormalDist().inv_cdf(1 - alpha / 2)
    assert NormalDist(normal_limit(alpha)).cdf(critical) == pytest.approx(0.01, rel=1e-3)
    stats = pytest.importorskip("scipy.stats")
    for df in (3, 63, 1022):
        missed = stats.ncx2.cdf(stats.chi2.isf(alpha / 2, df), df, chi_square_limit(df, alpha))
        assert 1e-6 < missed < 0.01


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_p_values_of_free_draws_are_uniform(q):
    """A hundred sets of masks from a fixed seed: as many small p-values as there should be, of each test."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for _ in range(100):
        masks = torch.rand(64, 32, 16, generator=generator) < q
        x = torch.rand(masks.shape, generator=generator) + 1
        y = torch.where(masks, x / q, 0.0)
        results = [testing.rate(masks, 1 - q), testing.mean(x, y, 1 - q), testing.runs(masks)]
        results += [testing.blocks(masks.view(128, 256), side) for side in (4, 16)]
        results += [testing.autocorrelation(masks), testing.autocorrelation(masks.flatten(), "flat")]
        results += [testing.cross_correlation(masks[:20], masks[20:]), *testing.uniformity(masks)]
        if q != 0.5:  # where y - x is x or -x
            results.append(testing.variance(x, y, 1 - q))
        for result in results:
            found.setdefault(result.test, []).append(result.p_value)
    assert len(found) >= 17
    for test, p_values in found.items():
        for level in (0.05, 0.5):
            share = sum(p_value < level for p_value in p_values) / len(p_values)
            # Four standard deviations, and 0.02 since counts are discrete and a little skew.
            assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / len(p_values)) + 0.02, (test, level, share)


def test_uniformity_of_small_calls():
    """No position is counted twice where heads and tails meet, and no class is empty."""
    for n in (5, 40, 100):
        masks = torch.rand(2000, n, generator=torch.Generator().manual_seed(n)) < 0.7
        for result in testing.uniformity(masks):
            assert 1e-3 < result.p_value <= 1, (n, result)
