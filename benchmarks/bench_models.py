"""A step of whole models, forward and backward: nn.Dropout, fd.Dropout and p = 0, eager and compiled."""

import pytest
import torch
from torch import nn

from fused_dropout.bench.workloads import WORKLOADS, step, swap


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dropout", ["nn.Dropout", "fd.Dropout", "p = 0"])
@pytest.mark.parametrize("workload", WORKLOADS)
def bench_step(measure, benchmark, workload, dropout, compiled, device):
    benchmark.group = f"{workload} {'compiled' if compiled else 'eager'}"
    torch.manual_seed(0)
    model, x = WORKLOADS[workload]()
    model, x = (swap(model) if dropout == "fd.Dropout" else model).to(device), x.to(device)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and dropout == "p = 0":
            module.p = 0.0
    run = torch.compile(model) if compiled else model
    measure(step, run, list(model.parameters()), x, implementation=dropout)
