"""torch.compile: no graph break, and the masks that eager draws from the same seed, forward and backward."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import fused_dropout as fd
from fused_dropout import native, reference

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "channels_last": lambda x: x.view(2, 6, 8, 10).to(memory_format=torch.channels_last),
    "columns": lambda x: x[:, 3:21],
    "of one element": lambda x: x.view(24, 1, 40).transpose(0, 2),
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


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_equals_eager(backend):
    model = nn.Sequential(fd.Dropout(0.4), nn.Tanh(), fd.Dropout(0.2))
    x = torch.randn(24, 40)
    expected = step(model, x)
    got = step(torch.compile(model, backend=backend, fullgraph=True), x)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # compiled tanh rounds otherwise
        assert torch.equal(a == 0, b == 0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_dropouts_of_one_tensor_differ(backend):
    """Common subexpression elimination must not merge the drawing of two keys, in training and under no_grad."""
    compiled = torch.compile(lambda x: (fd.dropout(x), fd.dropout(x)), backend=backend, fullgraph=True)
    x = torch.ones(1000)
    for a, b in (compiled(x), compiled(x.clone().requires_grad_())):
        assert not torch.equal(a, b)


def test_draws_anew_at_each_call():
    compiled = torch.compile(lambda x: fd.dropout(x), backend="aot_eager", fullgraph=True)
    x = torch.ones(1000)
    assert not torch.equal(compiled(x), compiled(x))


def test_key_eval_and_in_place(key):
    x = torch.rand(6, 50)
    compiled = torch.compile(lambda x, key: fd.dropout(x, 0.3, key=key), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, key), fd.dropout(x, 0.3, key=key))
    compiled = torch.compile(lambda x: fd.dropout(x, training=False), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), x)
    compiled = torch.compile(lambda x: fd.dropout(x * 1, 0.3, inplace=True), backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    expected = fd.dropout(x, 0.3)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), expected)


def test_export():
    exported = torch.export.export(nn.Sequential(nn.Linear(4, 4), fd.Dropout()).eval(), (torch.ones(2, 4),))
    assert exported.module()(torch.ones(2, 4)).shape == (2, 4)


@pytest.fixture(params=["fuse", "kernel"])
def compile_as(request, monkeypatch):
    """FUSED_DROPOUT_COMPILE"""
    monkeypatch.setattr(native, "compile_as", request.param)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arithmetic_is_the_operator(layout, dtype, key):
    """What the compiler is given to fuse: the same bits and strides as the kernel's."""
    x = LAYOUTS[layout](torch.randn(24, 40).to(dtype))
    expected, got = torch.ops.fused_dropout.apply(x, 0.3, key), reference.apply_each(x, 0.3, key)
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()
    index = torch.tensor([0, 7, 8, 2**31, 2**35 - 1, 2**35, 2**40 + 3])
    one_by_one = [fd.keep_mask((1,), 0.5, key, start=int(i)) for i in index]
    assert torch.equal(reference.keep_each(index, reference.threshold(0.5), key), torch.cat(one_by_one))


@pytest.mark.parametrize(
    ("backend", "layout"), [("inductor", "transposed"), *(("aot_eager", layout) for layout in LAYOUTS)]
)
def test_masks_of_eager(compile_as, backend, layout):
    x = LAYOUTS[layout](torch.randn(24, 40))
    compiled = torch.compile(nn.Sequential(fd.Dropout(0.4), nn.Softsign()), backend=backend, fullgraph=True)
    for a, b in zip(step(nn.Sequential(fd.Dropout(0.4), nn.Softsign()), x), step(compiled, x), strict=True):
        assert torch.equal(a == 0, b == 0)
        torch.testing.assert_close(a, b)


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.linear, self.dropout, self.norm = nn.Linear(16, 16), dropout(0.2), nn.LayerNorm(16)

    def forward(self, x, residual):
        return self.norm(self.dropout(self.linear(x)) + residual)


def kernels_of(dropout):
    from torch._inductor import metrics

    torch._dynamo.reset()
    metrics.reset()
    x, residual = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
    torch.compile(Block(dropout), fullgraph=True)(x, residual).sum().backward()
    return metrics.generated_kernel_count


def test_fuses_with_its_neighbours(monkeypatch):
    """linear, dropout, residual, layer norm and their backward: as many kernels as with nn.Dropout."""
    monkeypatch.setattr(native, "compile_as", "fuse")
    with torch._inductor.config.patch(force_disable_caches=True):  # what is cached generates no kernel
        assert kernels_of(fd.Dropout) == kernels_of(nn.Dropout)


@pytest.mark.parametrize("dynamic", [None, True])
def test_recompiles_no_more_than_torch(compile_as, dynamic):
    def frames(dropout):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        model = torch.compile(nn.Sequential(nn.Linear(8, 8), dropout), backend=counter, fullgraph=True, dynamic=dynamic)
        for rows in (4, 6, 9, 13):
            model(torch.randn(rows, 8))
            model(torch.randn(8, rows).t())
        for p in (0.1, 0.2, 0.3):
            dropout.p = p
            model(torch.randn(9, 8))
        return counter.frame_count

    assert frames(fd.Dropout(0.5)) <= frames(nn.Dropout(0.5))


def test_checkpoint_inside(compile_as):
    """What is recomputed in backward has forward's mask."""
    from torch.utils.checkpoint import checkpoint

    def run(x):
        return checkpoint(lambda x: fd.dropout(torch.sin(x), 0.5), x, use_reentrant=False)

    x = torch.rand(400, requires_grad=True)
    y = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    y.sum().backward()
    assert torch.equal(y == 0, x.grad == 0)
    assert 0 < (y == 0).sum() < 400
