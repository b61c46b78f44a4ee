"""One dropout: implementation x dtype x size x forward, backward, both, in place, eval, p = 0; layouts; small calls.

A benchmark group holds the implementations that do the same work.
"""

import pytest
import torch
from implementations import IMPLEMENTATIONS
from torch import nn

import fused_dropout as fd

P = 0.1
CASES = ("forward", "backward", "both")
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "channels_last": lambda x: x.view(16, 64, 8, -1).to(memory_format=torch.channels_last),
    "columns": lambda x: x[:, : x.shape[1] // 2],
    "misaligned": lambda x: x.flatten()[1:],
}
MODULES = {"nn.Dropout": nn.Dropout, "fd.Dropout": fd.Dropout}


def values(log2, dtype, device):
    return torch.randn(2**log2, device=device).to(getattr(torch, dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def bench_implementation(measure, benchmark, implementation, case, dtype, log2, device):
    benchmark.group = f"{case} {dtype} 2^{log2}"
    drop, x = IMPLEMENTATIONS[implementation](P), values(log2, dtype, device)
    if case == "forward":
        return measure(drop, x, elements=x.numel(), implementation=implementation)
    if getattr(drop, "forward_only", False):
        pytest.skip("its gradients are not torch's")
    x.requires_grad_()
    gradient, y = torch.ones_like(x), drop(x)
    if y.grad_fn is None:
        pytest.skip("has no backward")

    def backward(y=None):
        torch.autograd.grad(drop(x) if y is None else y, x, gradient, retain_graph=y is not None)

    measure(backward, *([y] if case == "backward" else []), elements=x.numel(), implementation=implementation)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("case", ["in place", "eval", "p = 0"])
def bench_module(measure, benchmark, module, case, dtype, log2, device):
    benchmark.group = f"{case} {dtype} 2^{log2}"
    drop = MODULES[module](0.0 if case == "p = 0" else P, inplace=case == "in place").train(case != "eval")
    x = torch.zeros(2**log2, dtype=getattr(torch, dtype), device=device)  # in place, other values would grow
    measure(drop, x, elements=x.numel(), implementation=module)


@pytest.mark.parametrize("implementation", ["F.dropout", "fd.dropout"])
@pytest.mark.parametrize("layout", LAYOUTS)
def bench_layout(measure, benchmark, implementation, layout, device):
    benchmark.group = f"layout {layout}"
    x = LAYOUTS[layout](torch.randn(1024, 2048, device=device))
    measure(IMPLEMENTATIONS[implementation](P), x, elements=x.numel(), implementation=implementation)


@pytest.mark.parametrize("how", ["module", "function"])
@pytest.mark.parametrize("whose", ["torch", "fused_dropout"])
def bench_call(measure, benchmark, how, whose, device):
    """Host time of a call on 64 floats."""
    benchmark.group = f"a small call of a {how}"
    module, function = (nn.Dropout, nn.functional.dropout) if whose == "torch" else (fd.Dropout, fd.dropout)
    x = torch.randn(64, device=device)
    measure(module(P) if how == "module" else lambda x: function(x, P), x, elements=64, implementation=whose)
