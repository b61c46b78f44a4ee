"""Measures the bytes that dropout keeps for backward, and the peak memory of a step."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from .workloads import MEMORY_WORKLOADS, MODULES, P, swap, swap_paired, without_dropout


@dataclass(frozen=True)
class Memory:
    device: str
    workload: str
    module: str
    checkpointed: bool
    saved: int  # bytes kept for backward, without parameters, input and output
    peak: int  # largest number of bytes that torch allocated during a step, above those before it


@dataclass(frozen=True)
class SavedBytes:
    device: str
    dtype: str
    numel: int
    torch: int
    fd: int


def saved_bytes(run: Callable[[], Tensor], there_anyway: Sequence[Tensor]) -> int:
    """The bytes that autograd keeps from forward to backward, without the given tensors and the output."""
    saved: list[Tensor] = []
    with saved_tensors_hooks(saved.append, lambda packed: packed):  # no backward will unpack them
        output = run()
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in saved)}
    excepted = {tensor.untyped_storage().data_ptr() for tensor in (*there_anyway, output)}
    return sum(storages[address].nbytes() for address in storages.keys() - excepted)


def measure_saved_bytes(device: str) -> list[SavedBytes]:
    x = torch.randn(2**20, device=device, dtype=torch.float32, requires_grad=True)
    nbytes = [saved_bytes(partial(module(P), x), [x]) for module in MODULES.values()]
    return [SavedBytes(device, "float32", x.numel(), *nbytes)]


def peak_bytes(device: str, run: Callable[[], object]) -> int:
    """The largest rise, during the call, of the bytes that torch has allocated on the device."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with NamedTemporaryFile(suffix=".json") as file:
        with _without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(file.name)
        trace = json.loads(Path(file.name).read_bytes())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in trace if event["name"] == "[memory]"]
    return max(0, *accumulate(nbytes for _, nbytes in sorted(changes)))


@contextmanager
def _without_stderr() -> Iterator[None]:
    """torch's profiler writes two lines to standard error, which no setting of it prevents."""
    before = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def measure_memory(device: str, workload: str) -> list[Memory]:
    records = []
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {"nn.Dropout": lambda model: model, "fd.Dropout": swap}
    if "LoRA" in workload:
        ways |= {"fd, paired": swap_paired, "p = 0": without_dropout}
    for (name, way), checkpointed in product(ways.items(), (False, True)):
        model, x = MEMORY_WORKLOADS[workload]()
        model, x = way(model).to(device), x.to(device).requires_grad_()
        run = partial(checkpoint, model, x, use_reentrant=False) if checkpointed else partial(model, x)
        inputs = [x, *model.parameters()]

        def forward_backward(run: Callable[[], Tensor] = run, inputs: list[Tensor] = inputs) -> None:
            torch.autograd.grad(run().sum(), [t for t in inputs if t.requires_grad])

        forward_backward()  # a first step allocates memory that is kept
        saved = saved_bytes(run, inputs)
        records.append(Memory(device, workload, name, checkpointed, saved, peak_bytes(device, forward_backward)))
    return records
