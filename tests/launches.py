"""Shared by the tests of launches: helpers for calls, and the kernels of the loaded library."""

import functools

import pytest
import torch
from conftest import ON_FAKE_GPU
from helpers import DTYPES
from torch.utils._python_dispatch import _disable_current_modes

from fused_dropout import native

if ON_FAKE_GPU:
    import fake_gpu
    from ptx_run import Module, cstruct

KEY, P = (0x1234_5678_9ABC_DEF0, 0x0FED_CBA9_8765_4321), 0.3
HALF, MASK = torch.float16, torch.bool
NARROW, WIDE = "unsigned int", "unsigned long"  # the types of a block's number and of an index
TYPES = ["float, float", "double, double", "c10::Half, float", "c10::BFloat16, float"]
OPS = [*(rf"Drop<\(fused_dropout::Operation\)0, {types}>" for types in TYPES), "WriteMask"]
OPS = dict(zip([*DTYPES, MASK], OPS, strict=True))
for_ops = pytest.mark.parametrize("dtype", OPS, ids=str)
for_inplace = pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
for_blocks = pytest.mark.parametrize("block_type", [NARROW, WIDE])


def launched(call, *args, launches=1, **options):
    """The result of a call that has to launch one kernel, or the given number of kernels.

    The call runs without the fake GPU's mode, because a mode would select other paths.
    """
    before = len(fake_gpu.launches)
    with _disable_current_modes():
        result = call(*args, **options)
    assert len(fake_gpu.launches) == before + launches
    return result


def memory(t):
    return t.data_ptr(), fake_gpu.buffer_of(t)


@functools.cache
def module():
    return Module.from_library(native.cuda_kernels.__file__, "sm_{}{}".format(*torch.cuda.get_device_capability()))


def streams(x, y):
    """The kernels' struct Streams, for an operation that reads only x. x and y are buffers or addresses."""
    x, y = (getattr(side, "ptr", side) for side in (x, y))
    return cstruct(("u64", [x, y, x, x]))


def key_source(key, on_device=0, drawn=0, generator=(0, 0, 0)):
    """The kernels' struct KeySource. If the key is read from the device, the key given by value is a different one."""
    by_value = (5, 6) if on_device or drawn else key
    return cstruct(("u64", by_value), ("u64", on_device), ("u64", drawn), ("u64", generator))
