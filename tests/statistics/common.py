"""Shared by the statistics: rates, limits for the results, the threads, and two one-sided tests for equivalence."""

from statistics import NormalDist

import pytest
import torch

LEVEL = 1e-6
# 8-bit and 16-bit thresholds and values beside them, where a rounded p would have another rate.
RATES = [1e-6, 1e-4, 0.01, 24 / 256, 25 / 256, 0.1, 26 / 256, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.99]
RATES += [k / 2**16 + side * 2**-19 for k in (1, 6553, 2**15, 2**16 - 1) for side in (-1, 0, 1)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread: with several, other work on the machine can stall OpenMP's barriers. Most tensors here are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fine(results):
    """Under a fixed key, the level is how improbable a mask has to be before we consider the contract wrong."""
    for result in results if isinstance(results, (list, tuple)) else [results]:
        assert result.p_value > LEVEL, f"{result}: {result.detail}"


def wrong(results):
    """Whether some test alarms, at the level that ``testing`` uses for one of a hundred tests."""
    from fused_dropout import testing

    results = results if isinstance(results, (list, tuple)) else [results]
    assert any(result.p_value < testing.ALPHA for result in results), "\n".join(map(str, results))


def tost(difference, deviation, margin):
    """p-value of two one-sided tests (Schuirmann, 1987): small if the true difference is within +-margin."""
    return NormalDist().cdf((abs(difference) - margin) / deviation)


def power_of_tost(deviation, margin, level):
    """Probability that ``tost`` is below the level if there is no difference."""
    return max(0.0, 2 * NormalDist().cdf(margin / deviation + NormalDist().inv_cdf(level)) - 1)
