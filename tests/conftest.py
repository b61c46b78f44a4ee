"""Fixtures, and options that hide layers of the library.

    pytest --hide=_eager     no eager binding: the kernels behind the Python autograd Function
    pytest --hide=_cuda      no CUDA kernels: the reference on CUDA devices
    pytest --hide=_C         no compiled part at all: the pure-PyTorch reference

A run with --hide skips the tests that would run the same code as without it: those marked same_without.

    pytest --every-cell      tests/transforms: all cells of the matrix, not all pairs of values

On the fake GPU the tests marked gpu run too, except those in which torch itself copies inside an operator.
"""

import gc
import sys

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--hide", default="", help="extension modules to do without: _eager, _cuda or _C")
    parser.addoption(
        "--every-cell", action="store_true", help="the whole matrix of transforms, not all pairs of values"
    )


def pytest_configure(config):
    for name in filter(None, config.getoption("--hide").split(",")):
        sys.modules[f"fused_dropout.{name}"] = None
    import fused_dropout as fd

    config.stash[_INFO] = fd.backend_info()


_INFO = pytest.StashKey()
ON_FAKE_GPU = "fake_gpu" in sys.modules


def pytest_report_header(config):
    return str(config.stash[_INFO]).splitlines()


collect_ignore = ["installs"]  # only if named on the command line: make test-install


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # the garbage collector then skips torch's million objects
    gc.set_threshold(700, 10, 50)  # and rarely scans the objects that torch's compiler leaves


def pytest_runtest_setup(item):
    hidden = set(filter(None, item.config.getoption("--hide").split(",")))
    if hidden and any(hidden <= set(marker.args) for marker in item.iter_markers("same_without")):
        pytest.skip("runs the same code without --hide")
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if ON_FAKE_GPU and item.get_closest_marker("torch_copies"):
            pytest.skip("the fake GPU has none of torch's own kernels for copies inside an operator")
        if ON_FAKE_GPU and item.get_closest_marker("no_modes"):
            pytest.skip("the fake GPU is a dispatch mode, under which dropout runs in torch's own operations")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def key():
    return torch.tensor([0x1234_5678_9ABC_DEF0, 0x0FED_CBA9_8765_4321], dtype=torch.uint64)


@pytest.fixture
def info(request):
    return request.config.stash[_INFO]
