"""Every public name has a complete docstring, and the examples in the docstrings are correct."""

import doctest
import importlib
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd

PUBLIC = [name for name in fd.__all__ if not inspect.ismodule(getattr(fd, name))]
MODULES = sorted({getattr(fd, name).__module__ for name in PUBLIC})
REPORTS = [
    "swap.AuditReport",
    "swap.Site",
    "build_info.BackendInfo",
    "swap.ConvertReport",
    "uncertainty.Prediction",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    names = {"fd": fd, "torch": torch, "F": F, "nn": nn}
    outcome = doctest.testmod(importlib.import_module(name), extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name):
    """The first line is a sentence. The rest has the PyTorch line, each parameter, the result and an example."""
    documented = getattr(fd, name)
    lines = inspect.getdoc(documented).splitlines()
    assert lines[0].endswith(".")
    assert lines[1] == ""
    assert any(line.startswith(("In PyTorch: ", "In timm: ")) for line in lines)
    assert "Example:" in lines
    parameters = [p for p in inspect.signature(documented).parameters if p != "self"]
    described = {line.strip().split(":")[0] for line in lines if line.startswith("    ")}
    assert set(parameters) <= described
    if parameters and not inspect.isclass(documented):
        assert {"Returns:", "Yields:"} & set(lines)


@pytest.mark.parametrize("name", REPORTS)
def test_docstrings_of_reports(name):
    """Each field is described, in a section or after the field. The functions that return the report have examples."""
    module, kind = name.split(".")
    report = getattr(importlib.import_module(f"fused_dropout.{module}"), kind)
    source = inspect.getsource(report)
    for field in report.__annotations__:
        assert f"        {field}: " in inspect.getdoc(report).replace("\n    ", "\n        ") or re.search(
            rf'^    {field}: .*\n    """[A-Z]', source, re.M
        ), field
