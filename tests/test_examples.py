"""The examples in the public docstrings are true."""

import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd

MODULES = ["functional", "modules", "rng", "patching", "convert", "audit", "uncertainty", "testing", "statistics"]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    torch.manual_seed(0)
    module = importlib.import_module(f"fused_dropout.{name}")
    names = {"fd": fd, "torch": torch, "nn": nn, "F": F}
    failed, tried = doctest.testmod(
        module, extraglobs=names, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert failed == 0
    assert tried > 0 or name in ("testing", "statistics", "rng")
