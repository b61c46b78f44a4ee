"""Every public name has a complete docstring, and the examples in the docstrings are correct."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd

MODULES = [module.name for module in pkgutil.iter_modules(fd.__path__) if not module.ispkg]
REPORTS = [
    "swap.AuditReport",
    "swap.Site",
    "build_info.BackendInfo",
    "swap.ConvertReport",
    "uncertainty.Prediction",
]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("_")])
def test_examples(name):
    module = importlib.import_module(f"fused_dropout.{name}")
    names = {"fd": fd, "torch": torch, "F": F, "nn": nn}
    assert doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("name", [name for name in fd.__all__ if not inspect.ismodule(getattr(fd, name))])
def test_docstrings(name):
    """The first line is a sentence. The rest has the PyTorch line, each parameter, the result and an example."""
    documented = getattr(fd, name)
    lines = inspect.getdoc(documented).splitlines()
    assert lines[0].endswith(".")
    if f"{documented.__module__}.{name}".removeprefix("fused_dropout.") in REPORTS:
        return
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
