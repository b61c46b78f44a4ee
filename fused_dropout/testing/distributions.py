"""Tail probabilities for ``testing``, and the smallest faults that its tests find. They need torch alone, not scipy.

``alpha`` is the level of a two-sided test. A fault counts as found if the test alarms with probability ``1 - MISS``.
"""

import math
from statistics import NormalDist

import torch

MISS = 0.01


def normal_p_value(z: float) -> float:
    """P(\\|Z\\| >= \\|z\\|) for a standard normal Z."""
    return math.erfc(abs(z) / math.sqrt(2))


def binomial_p_value(k: int, n: int, p: float) -> float:
    """Twice the smaller tail of Binomial(n, p) at k, at most 1. The tail is summed term by term, from k outwards.

    The relative error is below 1e-4 up to n = 2^32. It comes from the logarithm of the first term.
    """
    q = 1 - p
    if k < n * p:
        k, p, q = n - k, q, p
    first = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log(q)
    j = torch.arange(min(n - k, int(20 * math.sqrt(n * p * q)) + 100), dtype=torch.float64)
    ratios = (n - k - j) / (k + j + 1) * (p / q)
    return min(1.0, 2 * math.exp(first) * (1 + ratios.cumprod(0).sum().item()))


def chi_square_p_value(statistic: float, df: int) -> float:
    """Twice the smaller tail of the chi-square distribution, at most 1: rates may differ too much or too little."""
    half, a = torch.tensor([statistic / 2, df / 2], dtype=torch.float64)
    return min(1.0, 2 * min(torch.special.gammaincc(a, half).item(), torch.special.gammainc(a, half).item()))


def peak_p_value(z: float, shifts: int, skewness: float = 0.0) -> float:
    """P(max \\|Z_i\\| >= \\|z\\|) for ``shifts`` independent, nearly standard normal Z_i.

    The tails of a sum with this skewness are exp(+-skewness * z^3 / 6) times the normal tails (Cramér, "Sur un nouveau
    théorème-limite de la théorie des probabilités", 1938). This matters where dropped or kept elements are rare.
    """
    tail = normal_p_value(z) * math.cosh(skewness * min(abs(z), 10.0) ** 3 / 6)
    return -math.expm1(shifts * math.log1p(-min(tail, 0.5)))


def normal_limit(alpha: float, shifts: int = 1) -> float:
    """The mean, in standard deviations, that is found with probability 1 - MISS as the largest of ``shifts`` values."""
    return NormalDist().inv_cdf(1 - MISS) - NormalDist().inv_cdf(alpha / (2 * shifts))


def chi_square_limit(df: int, alpha: float) -> float:
    """The noncentrality of a chi-square statistic that is found with probability 1 - MISS, by bounds on both tails.

    Laurent and Massart, Annals of Statistics 28 (2000), lemma 1, for the alarm; Birgé, "An alternative point of view on
    Lepski's method" (2001), lemma 8.1, for the noncentral lower tail.
    """
    t, u = math.log(2 / alpha), math.log(1 / MISS)
    root = 2 * math.sqrt(u) + math.sqrt(4 * u + (math.sqrt(df) + 2 * math.sqrt(t)) ** 2)
    return (root**2 - df) / 2
