"""Shared by the bit-exact tests: inputs, and the contract's result for any layout."""

import math
import os
import subprocess
import sys
from pathlib import Path

import contract
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_dropout import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.float16: torch.int16, torch.bfloat16: torch.int16}
EDGES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]  # limits of signed and unsigned integer types
EVEN = [k / 2**16 for k in (1, 2, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1)]  # the draw alone decides: K_lo is 0
PROBABILITIES = [5e-324, 1e-12, 1e-6, 25 / 256, 0.1, 1 / 3, 0.5, 0.9, 1 - 1e-6, 1 - 2**-49, math.nextafter(1, 0)]
PROBABILITIES += EVEN + [math.nextafter(p, 0) for p in EVEN] + [math.nextafter(p, 1) for p in EVEN]

# The operators and their reference take the same arguments and give the same bits.
OPERATORS = [torch.ops.fused_dropout, reference]
SERVED = [  # the operators do not use the eager binding, and the reference does not use compiled code
    pytest.param(torch.ops.fused_dropout, id="operator", marks=pytest.mark.same_without("_eager")),
    pytest.param(reference, id="reference", marks=pytest.mark.same_without("_eager", "_C")),
]
for_operators = pytest.mark.parametrize("ops", SERVED)
for_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def key_tensor(seed: int, offset: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([seed, offset], dtype=torch.uint64, device=device)


def values(n: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype).to(device)


def position(x: torch.Tensor) -> torch.Tensor:
    """The index of each element of x: its place in memory if x is dense and non-overlapping, row-major otherwise."""
    dims = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=False) if size != 1)
    if not all(stride == math.prod(size for _, size in dims[:k]) for k, (stride, _) in enumerate(dims)):
        return torch.arange(x.numel()).reshape(x.shape)
    index = torch.zeros(x.shape, dtype=torch.int64)
    for dim, (stride, size) in enumerate(zip(x.stride(), x.shape, strict=False)):
        index += (torch.arange(size) * stride).reshape(-1, *[1] * (x.dim() - 1 - dim))
    return index


def expected(x: torch.Tensor, seed: int, offset: int, p: float, start: int = 0) -> torch.Tensor:
    """contract.expected for a tensor of any layout."""
    index = position(x).reshape(-1)
    in_order = torch.empty(x.numel(), dtype=x.dtype)
    in_order[index] = x.detach().cpu().reshape(-1)
    return contract.expected(in_order, seed, offset, p, start)[index].reshape(x.shape)


def expected_mask(x: torch.Tensor, seed: int, offset: int, p: float, start: int = 0) -> torch.Tensor:
    return torch.from_numpy(contract.keep_numpy(seed, offset, p, x.numel(), start))[position(x)]


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Compares bits. All NaNs are equal, since the payload of a NaN depends on the hardware."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    got = got.detach().cpu()
    same = (got.view(BITS[got.dtype]) == want.view(BITS[want.dtype])) | (got.isnan() & want.isnan())
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ, the first at {(~same).nonzero()[0].tolist()}"


def run_on(isa: str, module: str) -> None:
    """Runs ``compact()`` of a test module in a process that uses the CPU kernels of an instruction set.

    The process hides the same layers as this one. ``compact()`` has to print the instruction set that it used.
    """
    hidden = [name for name in ("_C", "_eager") if sys.modules.get(f"fused_dropout.{name}", 0) is None]
    code = f"import sys; sys.modules.update({dict.fromkeys(['fused_dropout.' + name for name in hidden])})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}; import {module}; {module}.compact()"],
        env={**os.environ, "FUSED_DROPOUT_CPU_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa] or isa != "portable"


class Passing(TorchDispatchMode):
    """A mode that passes every operation on unchanged."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class PassingFunctions(TorchFunctionMode):
    """A mode that passes every torch function on unchanged."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})
