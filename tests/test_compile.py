"""torch.compile: no graph break, and the masks that eager draws from the same seed, forward and backward."""

import pytest
import torch
from torch import nn

import fused_dropout as fd


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
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_equals_eager(backend, layout):
    model = nn.Sequential(fd.Dropout(0.4), nn.Tanh(), fd.Dropout(0.2))
    x = torch.randn(24, 40) if layout == "contiguous" else torch.randn(40, 24).t()
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
