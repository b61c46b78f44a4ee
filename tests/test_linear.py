"""``fd.dropout_linear`` against ``F.linear(fd.dropout(...))``: bit for bit, and the tensors saved for backward."""

import doctest
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ON_FAKE_GPU
from helpers import DTYPES, key_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_dropout as fd
from fused_dropout import linear, native

P, KEY = 0.3, (11, 7)
IN, OUT = 24, 40
INPUTS = {
    "matrix": lambda dtype: torch.randn(6, IN, dtype=dtype),
    "one row": lambda dtype: torch.randn(1, IN, dtype=dtype),
    "batch": lambda dtype: torch.randn(3, 5, IN, dtype=dtype),
    "four dimensions": lambda dtype: torch.randn(2, 3, 4, IN, dtype=dtype),
    "transposed": lambda dtype: torch.randn(IN, 6, dtype=dtype).t(),
    "columns": lambda dtype: torch.randn(6, IN + 3, dtype=dtype)[:, 1 : IN + 1],
    "batch second": lambda dtype: torch.randn(5, 3, IN, dtype=dtype).transpose(0, 1),
    "vector": lambda dtype: torch.randn(IN, dtype=dtype),
    "empty": lambda dtype: torch.randn(0, IN, dtype=dtype),
}
WEIGHTS = {
    "weight": lambda dtype: torch.randn(OUT, IN, dtype=dtype),
    "transposed weight": lambda dtype: torch.randn(IN, OUT, dtype=dtype).t(),
}


@pytest.fixture(params=["eager", "python"])
def path(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(linear, "_eager_dropout_linear", None)
    elif native.eager is None:
        pytest.skip("there is no eager binding")
    return request.param


def two_calls(x, weight, bias, p=P, training=True, **source):
    return F.linear(fd.dropout(x.to(weight.dtype), p, training, **source), weight, bias)


def run(call, x, weight, bias, of=(True, True, True), expanded=False, **source):
    """Result, gradients, and the generator's state after it."""
    leaves = [
        None if t is None else t.detach().requires_grad_(needs) for t, needs in zip((x, weight, bias), of, strict=True)
    ]
    torch.manual_seed(3)
    y = call(*leaves, **source)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    torch.manual_seed(4)
    gradient = torch.ones((), dtype=y.dtype).expand(y.shape) if expanded else torch.randn_like(y)
    return y, torch.autograd.grad(y, wanted, gradient) if wanted else (), torch.get_rng_state()


def assert_same_bits(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.stride() == want.stride()
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


def ours(*tensors, **source):
    return fd.dropout_linear(*tensors, P, **source)


def assert_same_runs(tensors, ours=ours, theirs=two_calls, **options):
    """Returns the result and the gradients."""
    got, want = (run(call, *tensors, **options) for call in (ours, theirs))
    for x, y in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert_same_bits(x, y)
    return got[0], *got[1]


@pytest.mark.same_without("_eager")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_same_bits(path, inputs, weights, dtype):
    """Value, gradients and strides, for each choice of the tensors that need a gradient.

    In turn, two of the dtypes have an expanded output gradient, and the others a stored one.
    """
    torch.manual_seed(1)
    x, weight = INPUTS[inputs](dtype), WEIGHTS[weights](dtype)
    for bias, of in itertools.product(
        (None, torch.randn(OUT, dtype=dtype)), itertools.product((False, True), repeat=3)
    ):
        expanded = (sum(of) + (bias is None) + DTYPES.index(dtype)) % 2 == 0
        assert_same_runs((x, weight, bias), of=of, expanded=expanded)


@pytest.mark.parametrize("source", ["default", "generator", "key"])
def test_same_draws(path, source):
    """The same mask as the two calls, and the same final state of the generator."""
    states = []
    for call in (ours, two_calls):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(8)
        given = {"default": {}, "generator": {"generator": generator}, "key": {"key": key_tensor(*KEY)}}[source]
        layer = nn.Linear(IN, OUT)
        y = call(torch.ones(4, IN), layer.weight, layer.bias, **given)
        states.append((y.detach(), torch.get_rng_state(), generator.get_state()))
    for x, y in zip(*states, strict=True):
        assert torch.equal(x, y)


def tensors(x_dtype=torch.float32, dtype=torch.float32):
    torch.manual_seed(1)
    parameters = (torch.randn(*shape, dtype=dtype) for shape in ((OUT, IN), (OUT,)))
    return torch.randn(3, 5, IN, dtype=x_dtype), *parameters


@pytest.mark.parametrize(("x_dtype", "dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_input_of_another_dtype_is_cast(path, x_dtype, dtype):
    _, dx, *_ = assert_same_runs(tensors(x_dtype, dtype))
    assert dx.dtype == x_dtype


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(path, x_dtype, dtype):
    def under(call):
        def called(*t, **source):
            with torch.autocast("cpu", torch.bfloat16):
                return call(*t, **source)

        return called

    assert_same_runs(tensors(x_dtype, dtype), under(ours), under(lambda x, *t: F.linear(fd.dropout(x, P), *t)))


@pytest.mark.parametrize("options", [{"training": False}, {"p": 0.0}, {"p": 1.0}, {"p": 1e-300}])
def test_the_ends_of_p(path, options):
    options = {"p": P} | options
    assert_same_runs(tensors(), partial(fd.dropout_linear, **options), partial(two_calls, **options))


def saved(call, *tensors):
    """The tensors that autograd saves."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        y = call(*tensors)
    return found, y


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_saves_the_input_and_the_key(path, x_dtype):
    x, layer = torch.randn(4, 5, IN, dtype=x_dtype, requires_grad=True), nn.Linear(IN, OUT)
    found, _ = saved(fd.dropout_linear, x, layer.weight, layer.bias, P)
    fresh = [t for t in found if t.data_ptr() not in (x.data_ptr(), layer.weight.data_ptr())]
    assert [(t.dtype, t.numel()) for t in fresh] == [(torch.uint64, 2)]
    assert {t.data_ptr() for t in found} >= {x.data_ptr(), layer.weight.data_ptr()}
    found, _ = saved(fd.dropout_linear, x.detach(), layer.weight, layer.bias, P)
    assert layer.weight.data_ptr() not in {t.data_ptr() for t in found}  # only the gradient of x needs the weight
    layer.weight.requires_grad_(False)
    found, _ = saved(fd.dropout_linear, x, layer.weight, layer.bias, P)
    assert x.data_ptr() not in {t.data_ptr() for t in found}


def test_changed_in_place(path):
    x, layer = torch.randn(4, IN), nn.Linear(IN, OUT)
    y = fd.dropout_linear(x, layer.weight, layer.bias, P)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_key_that_is_changed_later(path):
    key, x, layer = key_tensor(*KEY), torch.ones(4, IN, requires_grad=True), nn.Linear(IN, OUT)
    y = fd.dropout_linear(x, layer.weight, None, P, key=key)
    key[0] = 5
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx == 0, ~fd.keep_mask(x, P, key_tensor(*KEY)))


def test_double_backward(path):
    torch.manual_seed(1)
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (5, 4), (5,))]
    key = key_tensor(*KEY)
    assert torch.autograd.gradcheck(lambda *t: fd.dropout_linear(*t, P, key=key), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: fd.dropout_linear(*t, P, key=key), tensors)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_torch_func(path, randomness):
    x, weight, key = torch.randn(3, 4, IN), torch.randn(OUT, IN), key_tensor(*KEY)
    ours = torch.func.grad(lambda w: fd.dropout_linear(x, w, None, P, key=key).square().sum())(weight)
    theirs = torch.func.grad(lambda w: two_calls(x, w, None, key=key).square().sum())(weight)
    assert torch.equal(ours, theirs)
    y = torch.func.vmap(lambda x: fd.dropout_linear(x, weight, None, P), randomness=randomness)(torch.ones_like(x))
    assert torch.equal(y[0], y[1]) == (randomness == "same")
    tangent = torch.func.jvp(lambda x: fd.dropout_linear(x, weight, None, P, key=key), (x,), (x.cos(),))[1]
    assert torch.equal(tangent, two_calls(x.cos(), weight, None, key=key))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(path, reentrant):
    x, layer, found = torch.randn(4, IN, requires_grad=True), nn.Linear(IN, OUT), []
    arguments = (x, layer.weight, layer.bias, P)
    for call in (fd.dropout_linear, partial(checkpoint, fd.dropout_linear, use_reentrant=reentrant)):
        torch.manual_seed(2)
        call(*arguments).square().sum().backward()
        found.append([t.grad for t in arguments[:3]])
        for t in arguments[:3]:
            t.grad = None
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_wrong_input(path):
    x, layer = torch.ones(4, IN), nn.Linear(IN, OUT)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fd.dropout_linear(x, layer.weight, p=1.5)
    with pytest.raises(ValueError, match="key"):
        fd.dropout_linear(x, layer.weight, p=P, key=torch.zeros(3, dtype=torch.uint64))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fd.dropout_linear(x[:, 1:], layer.weight, p=P)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fd.DropoutLinear(IN, OUT, p=2.0)


def test_module():
    torch.manual_seed(1)
    layer, pair = fd.DropoutLinear(IN, OUT, p=P), nn.Linear(IN, OUT)
    pair.load_state_dict(layer.state_dict())
    x = torch.randn(4, IN)
    torch.manual_seed(2)
    got = layer(x)
    torch.manual_seed(2)
    assert torch.equal(got, pair(fd.dropout(x, P)))
    layer.eval()
    assert torch.equal(layer(x), pair(x))
    assert repr(layer) == f"DropoutLinear(in_features={IN}, out_features={OUT}, bias=True, p={P})"


def test_examples():
    outcome = doctest.testmod(linear, extraglobs={"fd": fd, "torch": torch})
    assert (outcome.attempted, outcome.failed) == (4, 0)


@pytest.mark.same_without("_eager")
@pytest.mark.skipif(ON_FAKE_GPU, reason="torch.compile does not work there")
@pytest.mark.parametrize("compile_as", ["fuse", "kernel"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(compile_as, backend, dtype, monkeypatch):
    """The gradients of eager calls. The only saved tensor of x's size is x itself, instead of its dropped copy."""
    monkeypatch.setattr(native, "compile_as", compile_as)
    x = torch.randn(4, 5, IN, dtype=dtype, requires_grad=True)
    layer = nn.Linear(IN, OUT)
    call = torch.compile(lambda x: fd.dropout_linear(x, layer.weight, layer.bias, P).relu(), backend=backend)
    torch.manual_seed(3)
    found, y = saved(call, x)
    torch.manual_seed(3)
    want = fd.dropout_linear(x, layer.weight, layer.bias, P).relu()
    torch.testing.assert_close(y, want)
    fresh = [t for t in found if t.data_ptr() not in (x.data_ptr(), *(p.data_ptr() for p in layer.parameters()))]
    assert sum(t.numel() * t.element_size() for t in fresh if t.numel() != y.numel()) == 16
    inputs, gradient = (x, *layer.parameters()), torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, gradient), torch.autograd.grad(want, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
