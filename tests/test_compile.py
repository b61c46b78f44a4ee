"""torch.compile: no graph break, the masks and gradients of eager from one seed, only the key saved for backward."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_dropout as fd
from fused_dropout import inductor, native, operators, reference

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "channels_last": lambda x: x.view(2, 6, 8, 10).to(memory_format=torch.channels_last),
    "columns": lambda x: x[:, 3:21],
    "of one element": lambda x: x.view(24, 1, 40).transpose(0, 2),
}
OVERLAPPING = {
    "windows": lambda x: x.unfold(1, 3, 1),
    "expanded": lambda x: x[:, :1].expand(24, 40),
    "0-dim": lambda x: x[0, 0],
}


def step(model, x):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))
    return y.detach(), x.grad


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture(params=["fuse", "kernel"])
def compile_as(request, monkeypatch):
    """Values of FUSED_DROPOUT_COMPILE."""
    monkeypatch.setattr(native, "compile_as", request.param)
    return request.param


def compiled(function, backend="inductor", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


FORMS = [("eager", "fuse"), ("aot_eager", "kernel"), ("eager", "kernel"), ("aot_eager", "fuse")]


@pytest.mark.parametrize(  # each layout with each backend and each value of compile_as
    ("layout", "backend", "form"),
    [(layout, *form) for i, layout in enumerate(LAYOUTS) for form in FORMS[i % 2 * 2 :][:2]],
)
def test_equals_eager(monkeypatch, layout, backend, form):
    monkeypatch.setattr(native, "compile_as", form)
    model = nn.Sequential(fd.Dropout(0.4), nn.Tanh(), fd.Dropout(0.2))
    x = LAYOUTS[layout](torch.randn(24, 40))
    for expected, got in zip(step(model, x), step(compiled(model, backend), x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)  # compiled tanh rounds differently
        assert torch.equal(got == 0, expected == 0)


def test_inductor_equals_eager_in_every_layout(compile_as, key):
    """Bit for bit and with the same strides: values, and gradients that arrive in another layout."""
    layouts = list({**LAYOUTS, **OVERLAPPING}.values())
    tensors = [layout(torch.randn(24, 40)) for layout in layouts]
    tensors += [torch.randn(24, 40).to(dtype).t() for dtype in (torch.float64, torch.float16, torch.bfloat16)]
    gradients = [torch.randn(x.shape).to(x.dtype) for x in tensors]

    def run(*tensors):
        return [fd.dropout(x, 0.4, key=key) for x in tensors]

    results = []
    for function in (run, compiled(run)):
        inputs = [x.detach().requires_grad_() for x in tensors]
        outputs = function(*inputs)
        results.append((outputs, torch.autograd.grad(outputs, inputs, gradients)))
    (expected, expected_gradients), (got, got_gradients) = results
    for a, b in zip([*expected, *expected_gradients], [*got, *got_gradients], strict=True):
        assert torch.equal(a, b)
    assert [y.stride() for y in expected] == [y.stride() for y in got]


def test_every_argument(key, monkeypatch):
    """p of 0 and 1, a noise shape, a start beyond 32 bits: the expansion equals the operator."""
    monkeypatch.setattr(native, "compile_as", "fuse")
    x = torch.randn(6, 50)
    x[0, :4] = torch.tensor([float("inf"), float("nan"), -0.0, 1.0])
    calls = [(0.3, 0, [50, 1]), (0.3, 5, [50, 1]), (0.3, 2**33 + 5, [1, 6]), (0.3, 0, [1, 0]), (0.3, 3, [2**40, 8])]
    calls += [(0.0, 0, [50, 1]), (1.0, 0, [50, 1])]

    def run(apply, x):
        return [apply(x, p, key, start, strides, scale) for p, start, strides in calls for scale in (None, 1.7)]

    torch.compile(lambda x: fd.dropout(x), backend="aot_eager")(x)
    expected = run(operators.apply, x)
    for a, b in zip(expected, compiled(lambda x: run(operators.apply_expanded, x))(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(a == 0, b == 0)
        assert torch.equal(a.signbit(), b.signbit())


def test_noise_shape(compile_as, key):
    x = torch.randn(4, 6, 10, requires_grad=True)
    torch.manual_seed(1)
    expected = fd.dropout(x, 0.4, noise_shape=(4, 1, 10))
    torch.manual_seed(1)
    got = compiled(lambda x: fd.dropout(x, 0.4, noise_shape=(4, 1, 10)))(x)
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_dropouts_of_one_tensor_differ(backend):
    """Common subexpression elimination must not merge the drawing of two keys, in training and under no_grad."""
    function = compiled(lambda x: (fd.dropout(x), fd.dropout(x)), backend)
    x = torch.ones(1000)
    for a, b in (function(x), function(x.clone().requires_grad_())):
        assert not torch.equal(a, b)


def test_draws_anew_at_each_call():
    function = compiled(lambda x: fd.dropout(x), "aot_eager")
    x = torch.ones(1000)
    assert not torch.equal(function(x), function(x))


def test_key_eval_and_in_place(key):
    x = torch.rand(6, 50)
    function = compiled(lambda x, key: fd.dropout(x, 0.3, key=key), "aot_eager")
    assert torch.equal(function(x, key), fd.dropout(x, 0.3, key=key))
    assert torch.equal(compiled(lambda x: fd.dropout(x, training=False), "aot_eager")(x), x)
    function = compiled(lambda x: fd.dropout(x * 1, 0.3, inplace=True), "aot_eager")
    torch.manual_seed(1)
    expected = fd.dropout(x, 0.3)
    torch.manual_seed(1)
    assert torch.equal(function(x), expected)


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.linear, self.dropout, self.norm = nn.Linear(16, 16), dropout(0.2), nn.LayerNorm(16)

    def forward(self, x, residual):
        return self.norm(self.dropout(self.linear(x)) + residual)


BLOCKS = {
    "alone": lambda dropout: lambda x, residual, bias: dropout(x, 0.3),
    "bias, residual": lambda dropout: lambda x, residual, bias: dropout(x + bias, 0.3) + residual,
    "bias, residual, layer norm": lambda dropout: (
        lambda x, residual, bias: F.layer_norm(dropout(x + bias, 0.3) + residual, (16,))
    ),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_saves_the_key_alone(compile_as, block):
    """Saves 16 bytes more than without dropout, and less than with F.dropout by the mask of bools."""

    def saved(dropout):
        found = []
        inputs = [torch.randn(size, requires_grad=True) for size in ((8, 16), (8, 16), (16,))]
        function = compiled(BLOCKS[block](dropout), "aot_eager_decomp_partition")
        with torch.autograd.graph.saved_tensors_hooks(found.append, lambda packed: packed):
            function(*inputs)
        return sorted((str(x.dtype), x.numel()) for x in found)

    assert saved(fd.dropout) == sorted([*saved(lambda x, p: x * 2), ("torch.uint64", 2)])


@pytest.mark.same_without("_C")
@pytest.mark.parametrize("block", ["alone", "bias, residual, layer norm"])
def test_fuses_with_its_neighbours(monkeypatch, block):
    """Forward and backward in no more kernels than with F.dropout."""
    from torch._inductor import metrics
    from torch._inductor.async_compile import AsyncCompile

    monkeypatch.setattr(native, "compile_as", "fuse")
    # The kernels are only counted, not compiled or called.
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)

    def kernels(dropout):
        torch._dynamo.reset()
        metrics.reset()
        inputs = [torch.randn(size, requires_grad=True) for size in ((8, 16), (8, 16), (16,))]
        compiled(BLOCKS[block](dropout))(*inputs).sum().backward()
        return metrics.generated_kernel_count

    with torch._inductor.config.patch(force_disable_caches=True):  # a cached graph generates no kernel
        assert 0 < kernels(fd.dropout) <= kernels(F.dropout)


def drawn(function, x):
    """Results of the function in eager and compiled, from the same seed, and the source of the compiled function."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(3)
    expected = function(x), torch.rand(2)
    torch.manual_seed(3)
    with torch._inductor.config.patch(force_disable_caches=True):
        result, code = run_and_get_code(compiled(function), x)
    return expected, (result, torch.rand(2)), code[0]


def test_draws_of_a_graph_are_one_call(compile_as):
    """One call draws the keys that eager calls draw, in their order, and leaves the generator in the same state."""
    sites = 24 if compile_as == "kernel" else 4  # the expanded form takes seconds to compile

    expected, got, code = drawn(lambda x: [fd.dropout(x) for _ in range(sites)], torch.ones(64))
    assert torch.equal(torch.stack(expected[0]), torch.stack(got[0]))
    assert torch.equal(expected[1], got[1])
    assert code.count(f" = torch.ops.fused_dropout.draw_keys.default({sites}, ") == 1
    assert code.count(" = torch.ops.fused_dropout.draw_keys.") == 1


@pytest.mark.parametrize("other", [torch.rand_like, F.dropout])
def test_draws_around_other_random_numbers_stay_apart(monkeypatch, other):
    monkeypatch.setattr(native, "compile_as", "kernel")
    _, (got, _), code = drawn(lambda x: (fd.dropout(x), fd.dropout(x), other(x), fd.dropout(x)), torch.ones(64))
    assert code.count(" = torch.ops.fused_dropout.draw_keys.default(2, ") == 1
    assert code.count(" = torch.ops.fused_dropout.draw_keys.") == 2
    assert len({tuple(y.tolist()) for y in got}) == 4


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_checkpoint_inside(compile_as, backend):
    """Forward has the masks of eager, although Inductor reorders calls. Recomputation in backward has them too."""

    def run(x):
        x = fd.dropout(x, 0.2)
        x = checkpoint(lambda x: torch.sin(fd.dropout(fd.dropout(torch.sin(x), 0.5), 0.3)), x, use_reentrant=False)
        return fd.dropout(x, 0.2)

    x = torch.rand(400, requires_grad=True)
    results = []
    for function in (run, compiled(run, backend)):
        torch.manual_seed(3)
        y = function(x)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected == 0, got == 0)
        torch.testing.assert_close(got, expected)


@functools.cache
def frames(module, dynamic, compile_as):
    torch._dynamo.reset()
    dropout, counter = module(0.5), torch._dynamo.testing.CompileCounter()
    model = compiled(nn.Sequential(nn.Linear(8, 8), dropout), counter, dynamic=dynamic)
    for rows in (4, 6, 9, 13):
        model(torch.randn(rows, 8))
        model(torch.randn(8, rows).t())
    for p in (0.1, 0.2, 0.3):
        dropout.p = p
        model(torch.randn(9, 8))
    return counter.frame_count


@pytest.mark.same_without("_C")
@pytest.mark.parametrize("dynamic", [None, True])
def test_recompiles_no_more_than_torch(compile_as, dynamic):
    assert 0 < frames(fd.Dropout, dynamic, compile_as) <= frames(nn.Dropout, dynamic, None)


def test_another_size_compiles_nothing(monkeypatch, key):
    monkeypatch.setattr(native, "compile_as", "fuse")
    function = compiled(lambda x, key: fd.dropout(x.t(), 0.3, key=key), dynamic=True)
    for n, m in ((6, 50), (7, 51), (3, 90)):
        x = torch.randn(n, m, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=(n, m) != (6, 50)):
            y = function(x, key)
        assert torch.equal(y, fd.dropout(x.t(), 0.3, key=key))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0] == 0, y.t() == 0)


# Compiles one graph three times with one cache: expanded, with the kernel, expanded again. Prints each time whether
# the kernel's operator was called, and whether the graph came from the cache.
WITH_ONE_CACHE = """
import torch, fused_dropout as fd
from fused_dropout import native
from torch._dynamo.utils import counters
x, key = torch.ones(64), fd.key(5)
for native.compile_as in ("fuse", "kernel", "fuse"):
    torch._dynamo.reset()
    counters.clear()
    function = torch.compile(lambda x: fd.dropout(x, 0.3, key=key))
    function(x)
    with torch.profiler.profile() as profile:
        y = function(x)
    assert torch.equal(y, fd.dropout(x, 0.3, key=key))
    print(any(event.key == "fused_dropout::apply" for event in profile.key_averages()), any("hit" in name and n
          for name, n in [*counters["aot_autograd"].items(), *counters["inductor"].items()]))
"""


@pytest.mark.same_without("_C")
def test_caches_keep_the_forms_apart(tmp_path, info):
    """One cache holds the expanded graph and the graph with the kernel. The third run gets the expanded one from it."""
    own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    # Precompiled headers and the search for vector instructions would each take longer than the one kernel.
    own |= {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    own["FUSED_DROPOUT_BACKEND"] = info.backend if info.devices["cpu"] == "native" else "reference"
    command = [sys.executable, "-c", WITH_ONE_CACHE]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # torch ends the process if overloads have the same arguments
    assert done.stdout.split() == ["False", "False", "True", "False", "False", "True"]


def test_cpp_wrapper(compile_as, key):
    """With a drawn key, in place and with a given key."""

    def run(x, key):
        y = fd.dropout(fd.dropout(x * 2, 0.2) + 1, 0.3, inplace=True)
        return fd.dropout(y, 0.1, key=key)

    # Backward for one value of compile_as only, since each takes a C++ compiler some seconds.
    x = torch.rand(8, 16, requires_grad=compile_as == "fuse")
    results = []
    with torch._inductor.config.patch(cpp_wrapper=True):
        for function in (run, compiled(run)):
            torch.manual_seed(1)
            y = function(x, key)
            results.append((y, *(torch.autograd.grad(y.sum(), x) if x.requires_grad else ())))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


class WithKey(nn.Module):
    def forward(self, x, key):
        y = fd.dropout(x * 2, 0.3, inplace=True, key=key)
        return fd.dropout(y + 1, 0.3, key=key)


def test_ahead_of_time(monkeypatch, key):
    """Whatever is fused here, an exported graph uses only names that other versions of this package have too."""
    monkeypatch.setattr(native, "compile_as", "fuse")
    x = torch.rand(8, 16)
    exported = torch.export.export(WithKey(), (x, key))
    assert inductor.FORM not in str(exported.graph)
    loaded = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(exported))
    assert torch.equal(loaded(x, key), WithKey()(x, key))


def test_export():
    exported = torch.export.export(nn.Sequential(nn.Linear(4, 4), fd.Dropout()).eval(), (torch.ones(2, 4),))
    assert exported.module()(torch.ones(2, 4)).shape == (2, 4)


def test_where_inductor_is_not_as_expected(monkeypatch, key):
    """The graph then calls the operator, and info says so."""
    from torch._inductor.lowering import lowerings

    x = torch.rand(6, 50).t()
    monkeypatch.setattr(native, "compile_as", "fuse")
    monkeypatch.setattr(inductor, "problem", None)
    monkeypatch.setattr(inductor, "_registered", False)
    for operator in (operators.apply_expanded, torch.ops.higher_order.run_and_save_rng_state):
        monkeypatch.delitem(lowerings, operator, raising=False)
    with torch._inductor.config.patch(force_disable_caches=True):
        got = compiled(lambda x, key: fd.dropout(x, 0.3, key=key))(x, key)
    assert torch.equal(got, fd.dropout(x, 0.3, key=key))
    assert any("torch.compile calls the operator as it is" in note for note in fd.backend_info().notes)


def test_the_constants_are_the_contracts():
    """A cached graph has the constants compiled in. Its cache key depends on inductor.py, but not on reference.py."""
    assert (reference.MULTIPLIERS, reference.WEYL) == ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))
    assert (reference.ROUNDS, reference.threshold(0.3)) == (10, int(0.7 * 2**48 + 0.5))
