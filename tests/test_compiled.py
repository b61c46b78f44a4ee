"""The reference compiled by Inductor, which GPUs without the CUDA kernels use. Here Inductor compiles it for the CPU.

test_triton.py tests the kernel from Triton. The test marked gpu checks that such a GPU uses it.
"""

import warnings

import pytest
import torch
from test_compile import LAYOUTS

import fused_dropout as fd
from fused_dropout import compiled, native, reference


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    compiled._say_once.cache_clear()
    monkeypatch.setattr(compiled, "_failed", set())


def both(name, x, *arguments):
    """The results of the reference and of the compiled reference."""
    results = []
    for module in (reference, compiled):
        own = x.clone(memory_format=torch.preserve_format)
        result = getattr(module, name)(own, *arguments)
        results.append(own if result is None else result)
    return results


def test_is_the_reference(dtype, key):
    """Every layout, p, start and scale. One warning; no recompilation after the first call without and with a start."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        both("apply", torch.randn(100).to(dtype), 0.3, key)
        both("apply", torch.randn(40, 3).to(dtype)[:, :2], 0.3, key)  # has holes: copied, then changed in place
        both("apply", torch.randn(100).to(dtype), 0.3, key, 5)
        both("apply", torch.randn(40, 3).to(dtype)[:, :2], 0.3, key, 5)
    assert sum("there are no CUDA kernels" in str(warning.message) for warning in said) == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layout in LAYOUTS.values():
            for p, *window in ((0.3, 0), (0.1, 5), (0.0, 0, None, 1.7), (1.0, 2), (1e-6, 2**33 + 4, None, -3.0)):
                expected, got = both("apply", layout(torch.randn(24, 40).to(dtype)), p, key, *window)
                assert torch.equal(*(y.contiguous().view(torch.uint8) for y in (got, expected)))
                assert got.stride() == expected.stride()
                assert not got._is_view()  # a view could not be changed in place after a dropout with a gradient
        for n in (0, 1, 2, 1001):
            expected, got = both("apply", torch.randn(n).to(dtype), 0.3, key)
            assert torch.equal(got, expected)
    assert not compiled._failed


@pytest.mark.filterwarnings("ignore:fused_dropout. there are no CUDA kernels")
def test_the_other_operators(key):
    x = torch.randn(24, 40)
    calls = [("apply_", (0.3, key)), ("keep_mask", (0.3, key)), ("keep_mask", (0.3, key, 3))]
    calls += [("apply", (0.3, key, 0, [1, 0], 1.5)), ("apply_", (0.3, key, 7, [2**40, 8]))]
    for name, arguments in calls:
        expected, got = both(name, x.t().contiguous().t(), *arguments)
        assert torch.equal(got, expected), name
        assert got.stride() == expected.stride()
        assert not got._is_view()
    assert not compiled._failed


@pytest.mark.filterwarnings("ignore:fused_dropout. there are no CUDA kernels")
def test_sizes_and_windows_compile_nothing_again(key):
    """Sizes that were equal at the first call may differ at the next. Strides and starts are variables too."""
    calls = [((6, 6), [1, 0], 0), ((4, 9), [0, 1], 3), ((9, 2), [2**40, 8], 1), ((3, 5), [7, 7], 2**34)]
    for i, (shape, strides, start) in enumerate(calls):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            expected, got = both("apply", torch.randn(shape), 0.3, key, start, strides)
        assert torch.equal(got, expected)
    assert not compiled._failed


@pytest.mark.filterwarnings("ignore:fused_dropout. there are no CUDA kernels")
def test_takes_no_memory_but_the_result(key):
    from torch._inductor.utils import run_and_get_code

    with torch._inductor.config.patch(force_disable_caches=True):
        for x in (torch.randn(100), torch.randn(20, 5)[:, :3]):
            _, (code, *_) = run_and_get_code(compiled.apply, x, 0.3, key)
            assert "empty_strided" not in code.split("def call")[1].split("def benchmark")[0]


@pytest.mark.filterwarnings("ignore:fused_dropout. there are no CUDA kernels")
def test_where_it_does_not_compile(monkeypatch, key):
    """For example without a C compiler for Triton's launcher: one warning, no second try, and the eager reference."""
    tries = []

    def fails(function):
        tries.append(function)
        raise OSError("no C compiler")

    monkeypatch.setattr(compiled, "_compiled", fails)
    with pytest.warns(RuntimeWarning, match="does not compile here, and stays slow: no C compiler") as said:
        results = [both("apply", torch.randn(100), 0.3, key) for _ in range(3)]
    assert all(torch.equal(*pair) for pair in results)
    assert sum("stays slow" in str(warning.message) for warning in said) == len(tries) == 1


@pytest.mark.filterwarnings("ignore:fused_dropout. there are no CUDA kernels")
def test_where_torch_compile_is_switched_off(key):
    """Must not run the arithmetic for the compiler in eager, which would need forty bytes per element."""
    x = torch.randn(100)
    with torch.compiler.set_stance("force_eager"), pytest.warns(RuntimeWarning, match="torch.compile is switched off"):
        got = compiled.apply(x, 0.3, key)
    assert torch.equal(got, reference.apply(x, 0.3, key))


@pytest.mark.filterwarnings("ignore:fused_dropout. there are no CUDA kernels")
def test_more_variants_than_dynamo_compiles_by_itself(key):
    with torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float32, torch.float64, torch.float16):
            expected, got = both("apply", torch.randn(100).to(dtype), 0.3, key)
            assert torch.equal(got, expected)
        with torch.inference_mode():
            both("apply", torch.randn(100), 0.3, key)
    assert not compiled._failed


@pytest.mark.gpu
@pytest.mark.torch_copies
def test_serves_where_there_are_no_cuda_kernels(key):
    if native.cuda_kernels or not torch.cuda.is_available():
        pytest.skip("there are CUDA kernels")
    assert fd.backend_info().devices["cuda"] == "compiled reference"
    x = torch.randn(1000, requires_grad=True)
    on_gpu = x.detach().cuda().requires_grad_()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fd.dropout(x, 0.3, key=key).sum().backward()
        fd.dropout(on_gpu, 0.3, key=key).add_(1).sum().backward()
    assert any("there are no CUDA kernels" in str(warning.message) for warning in said)
    assert torch.equal(on_gpu.grad.cpu(), x.grad)
