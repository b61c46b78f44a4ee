"""Measures the bytes that dropout keeps for backward, and the peak memory of a step."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .environment import search
from .workloads import MEMORY_WORKLOADS, MODULES, P, swap, swap_paired, without_dropout


@dataclass(frozen=True)
class Memory:
    device: str
    workload: str
    module: str
    checkpointed: bool
    saved: int  # bytes kept for backward, without parameters, input and output
    peak: int  # peak bytes above those before the step: of the allocator on CUDA, of the process on a CPU


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
    """The largest rise of memory during the call: of the allocator on CUDA, of the process on a CPU.

    -1 on a CPU if the system is not Linux.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return -1
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # returns free memory to the system, because its reuse would hide a rise
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    return int(search("/proc/self/status", rf"{name}:\s+(\d+) kB") or 0) * 1024


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
