"""Every public name has a complete docstring, and the examples in the docstrings are right."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd

MODULES = [module.name for module in pkgutil.iter_modules(fd.__path__) if not module.ispkg]
REPORTS = {"AuditReport", "BackendInfo", "ConvertReport"}  # what functions return: the functions have the examples


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("_")])
def test_examples(name):
    module = importlib.import_module(f"fused_dropout.{name}")
    names = {"fd": fd, "torch": torch, "F": F, "nn": nn}
    assert doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("name", fd.__all__)
def test_docstrings(name):
    """The first line is a sentence. The rest has the PyTorch line, each parameter, the result and an example."""
    documented = getattr(fd, name)
    lines = inspect.getdoc(documented).splitlines()
    assert lines[0].endswith(".")
    if name in REPORTS:
        return
    assert lines[1] == ""
    assert any(line.startswith(("In PyTorch: ", "In timm: ")) for line in lines)
    assert "Example:" in lines
    parameters = [p for p in inspect.signature(documented).parameters if p != "self"]
    described = {line.strip().split(":")[0] for line in lines if line.startswith("    ")}
    assert set(parameters) <= described
    if parameters and not inspect.isclass(documented):
        assert {"Returns:", "Yields:"} & set(lines)
