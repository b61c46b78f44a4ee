"""Tests of the masks of any dropout.

    report = testing.check(my_dropout, p=0.1)    # any fn(x) -> y in training mode: ours, torch's, a compiled block
    print(report)                                # the verdict, and what shows it; report.table has all tests
    assert not report.faults

``check`` samples masks and runs all tests on them. The tests in ``statistics`` take masks and can be used alone. The
tests in ``callables`` take the callable. What must hold exactly, such as the same mask in forward and backward, is
compared element by element and not by statistics. On the command line it is ``python -m fused_dropout check``.
"""

from .callables import check, draws_nothing, same_mask, same_mask_in_backward, sample
from .report import Report
from .statistics import (
    ALPHA,
    Result,
    autocorrelation,
    blocks,
    collisions,
    cross_correlation,
    dispersion,
    identical,
    mean,
    rate,
    runs,
    scale,
    uniformity,
    variance,
)

__all__ = [
    "ALPHA",
    "Report",
    "Result",
    "autocorrelation",
    "blocks",
    "check",
    "collisions",
    "cross_correlation",
    "dispersion",
    "draws_nothing",
    "identical",
    "mean",
    "rate",
    "runs",
    "same_mask",
    "same_mask_in_backward",
    "sample",
    "scale",
    "uniformity",
    "variance",
]
