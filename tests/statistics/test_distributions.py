"""Compares tail probabilities and limits with scipy's, and checks p-values of independent draws."""

import math

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

SIGMAS = (-30, -12, -8, -3, -1, -0.5, 0, 0.5, 1, 3, 8, 12, 30)


@pytest.fixture(scope="module")
def stats():
    return pytest.importorskip("scipy.stats")


def test_normal(stats):
    for z in (*SIGMAS, 1e-9, 5.4, 37.0):
        assert normal_p_value(z) == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-12, abs=0)


@pytest.mark.parametrize("p", [1e-9, 1e-6, 1e-3, 0.1, 1 / 3, 0.5, 0.9, 0.99, 1 - 1e-6])
@pytest.mark.parametrize("n", [1, 7, 60, 2**10, 2**16, 2**20, 2**24, 2**31, 2**32])
def test_binomial(n, p, stats):
    """The tolerance grows with n: the first term is exp() of a difference of numbers as large as n * log(n)."""
    deviation = math.sqrt(n * p * (1 - p))
    for k in {0, n, *(min(n, max(0, round(n * p + sigmas * deviation))) for sigmas in SIGMAS)}:
        tail = stats.binom.cdf(k, n, p) if k < n * p else stats.binom.sf(k - 1, n, p)
        assert binomial_p_value(k, n, p) == pytest.approx(min(1, 2 * tail), rel=1e-12 + 1e-14 * n, abs=1e-290)


@pytest.mark.parametrize("df", [1, 2, 7, 63, 255, 1022, 2**14, 2**20, 2**24])
def test_chi_square(df, stats):
    for x in (df / 1000, df / 10, *(df + sigmas * math.sqrt(2 * df) for sigmas in SIGMAS)):
        if x > 0:
            tail = min(stats.chi2.sf(x, df), stats.chi2.cdf(x, df))
            assert chi_square_p_value(x, df) == pytest.approx(2 * tail, rel=1e-8, abs=1e-290)


@pytest.mark.parametrize("shifts", [1, 2, 100, 2**10, 2**21, 2**31])
def test_peak(shifts, stats):
    for z in (1.0, 2.0, 4.0, 5.4, 8.0, 12.0, 30.0):
        exact = -math.expm1(shifts * stats.halfnorm.logcdf(z))
        assert peak_p_value(z, shifts) == peak_p_value(-z, shifts) == pytest.approx(exact, rel=1e-10, abs=0)


@pytest.mark.parametrize("skewness", [0.01, 0.05, 0.1])
def test_peak_of_a_skew_variable(skewness, stats):
    """Up to the largest skewness that ``testing`` admits, the p-value is too large by less than a factor of two. The
    p-value of a normal variable would be too small, at skewness 0.1 by a factor of nine."""
    shape = 4 / skewness**2
    gamma = stats.gamma(shape, loc=-(shape**0.5), scale=shape**-0.5)  # mean 0, variance 1
    for z in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        exact = gamma.sf(z) + gamma.cdf(-z)
        assert 0.999 * exact < peak_p_value(z, 1, skewness) < 2 * exact
    assert peak_p_value(2000.0, 2**21, skewness) == 0


@pytest.mark.parametrize("alpha", [1e-12, 1e-8, 1e-4])
def test_limits_are_seen_99_times_in_100(alpha, stats):
    """A fault of the size that a result names alarms in 99 of 100 draws, or in more if the size is only a bound."""
    for shifts in (1, 2**20):
        critical = stats.norm.isf(alpha / shifts / 2)
        assert stats.norm.sf(critical - normal_limit(alpha, shifts)) == pytest.approx(0.99, rel=1e-9)
    for df in (1, 3, 63, 1022, 2**16, 2**20):
        critical, limit = stats.chi2.isf(alpha / 2, df), chi_square_limit(df, alpha)
        assert stats.ncx2.cdf(critical, df, limit) < 0.01
        assert stats.ncx2.cdf(critical, df, limit / 2) > 0.01  # the bound is not twice too large


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_p_values_of_free_draws_are_uniform(q):
    """A hundred sets of masks from a fixed seed: each test has the expected number of small p-values."""
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
        if q != 0.5:  # at 0.5, y - x is x or -x
            results.append(testing.variance(x, y, 1 - q))
        for result in results:
            found.setdefault(result.test, []).append(result.p_value)
    assert len(found) >= 17
    for test, p_values in found.items():
        for level in (0.05, 0.5):
            share = sum(p_value < level for p_value in p_values) / len(p_values)
            # Four standard deviations, plus 0.02 because counts are discrete and slightly skewed.
            assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / len(p_values)) + 0.02, (test, level, share)


def test_uniformity_of_small_calls():
    """No position is counted in both the head and the tail, and no class is empty."""
    for n in (5, 40, 100):
        masks = torch.rand(2000, n, generator=torch.Generator().manual_seed(n)) < 0.7
        for result in testing.uniformity(masks):
            assert 1e-3 < result.p_value <= 1, (n, result)
