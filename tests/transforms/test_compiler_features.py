"""Unbacked sizes, and compiled autograd."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from tables import COMPILE_AS, FUNCTIONS, KEY, SEED, P, drawn_keys, inputs

import fused_dropout as fd
from fused_dropout import native


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture(params=COMPILE_AS)
def compile_as(request, monkeypatch):
    """Values of FUSED_DROPOUT_COMPILE."""
    monkeypatch.setattr(native, "compile_as", request.param)


class TestUnbackedSizes:
    """The number of selected rows is known only when the compiled graph runs."""

    @pytest.mark.parametrize(
        ("how", "backend"),
        [
            ("drawn", "eager"),
            ("drawn", "aot_eager"),
            ("drawn", "inductor"),
            ("key", "aot_eager"),
            ("patched", "aot_eager"),
        ],
    )
    def test_rows_by_a_mask(self, how, backend, compile_as):
        drop = {
            "drawn": lambda x: fd.dropout(x, P),
            "key": lambda x: fd.dropout(x, P, key=KEY),
            "patched": lambda x: F.dropout(x, P),
        }[how]
        x = (torch.rand(20, 7) + 0.5).requires_grad_()
        run = torch.compile(lambda x, rows: drop(x[rows]), backend=backend, fullgraph=True)
        with (
            torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
            fd.patched() if how == "patched" else contextlib.nullcontext(),
        ):
            for n in (7, 12, 1):  # one graph for all sizes
                rows, x.grad = torch.arange(20) < n, None
                torch.manual_seed(SEED)
                y = run(x, rows)
                mask = fd.keep_mask((n, 7), P, KEY if how == "key" else drawn_keys(1)[0])
                torch.testing.assert_close(y, x[rows] * mask / (1 - P))
                y.sum().backward()
                torch.testing.assert_close(x.grad[rows], mask / (1 - P))
                assert not x.grad[~rows].any()
            assert run(x, rows & False).shape == (0, 7)
            assert run(x.detach(), rows).shape == (1, 7)


def of_a_view(x):
    y = x * 1
    fd.dropout(y[:, 1:], P, inplace=True)
    return y


def of_a_flat_view(x):
    y = x * 1
    fd.dropout(y.view(-1), P, inplace=True)
    return y


def of_two_views(x):
    y = x * 1
    for rows in (slice(0, 3), slice(3, 8)):
        fd.dropout(y[rows], P, inplace=True)
    return y


def channels_of_a_view(x):
    y = x * 1
    fd.dropout2d(y[:, 1:], P, inplace=True)
    return y


IN_PLACE = [of_a_view, of_a_flat_view, of_two_views, channels_of_a_view]
CALLS = {name: function.make() for name, function in FUNCTIONS.items()} | {f.__name__: f for f in IN_PLACE}


class TestCompiledAutograd:
    @staticmethod
    def step(run, x, context=contextlib.nullcontext):
        x = x.clone().requires_grad_()
        torch.manual_seed(SEED)
        y = run(x)
        with context():
            (y * y * y).sum().backward()
        return y.detach(), x.grad

    @pytest.mark.parametrize("name", CALLS)
    def test_backward_of_eager(self, name):
        def context():
            return torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"))

        want = self.step(CALLS[name], inputs()[0])
        torch.testing.assert_close(self.step(CALLS[name], inputs()[0], context), want)

    @pytest.mark.parametrize("name", ["dropout", "alpha", "DropPath", "in_place", "of_two_views", "channels_of_a_view"])
    def test_backward_of_compiled(self, name):
        def context():
            return torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"))

        want = self.step(CALLS[name], inputs()[0])
        run = torch.compile(CALLS[name], backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(self.step(run, inputs()[0], context), want)

    def test_the_gradient_is_the_mask(self):
        """With Inductor, which compiles the given backward."""

        def context():
            return torch._dynamo.compiled_autograd._enable(torch.compile(backend="inductor"))

        x = inputs()[0]
        y, gradient = self.step(CALLS["in_place"], x, context)
        mask = FUNCTIONS["in_place"].mask_of(drawn_keys(1)[0])
        torch.testing.assert_close(y, x * mask / (1 - P))
        torch.testing.assert_close(gradient, 3 * y * y * mask / (1 - P))
