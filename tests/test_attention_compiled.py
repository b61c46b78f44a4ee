"""``fd.scaled_dot_product_attention`` compiled, transformed, exported, under autocast and under modes."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ON_FAKE_GPU
from helpers import Passing, PassingFunctions, assert_same
from test_attention import (
    HALF,
    KEY,
    SHORT,
    SINGLE,
    P,
    assert_alike,
    assert_near,
    gradient_for,
    mask_of,
    ours,
    run,
    saved,
    tensors,
    theirs,
    weights_of,
)
from torch import nn
from torch._subclasses import FakeTensorMode

import fused_dropout as fd

for_compilers = pytest.mark.skipif(ON_FAKE_GPU, reason="torch.compile does not work there")


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ torch.compile

L, S = 40, 50  # W has more elements than any other tensor
COMPILED = {  # backend, dtype, heads of keys and values, key, arguments
    "traced": ("aot_eager", SINGLE, 4, KEY, {}),
    "traced, causal groups": ("aot_eager", HALF, 2, KEY, {"is_causal": True, "enable_gqa": True}),
    "traced, mask": ("aot_eager", SINGLE, 4, None, {"attn_mask": mask_of("boolean", (2, 1, L, S))}),
    "inductor, mask": ("inductor", HALF, 4, KEY, {"attn_mask": mask_of("boolean", (2, 1, 1, S)), "scale": 0.3}),
    "inductor, causal groups": ("inductor", SINGLE, 2, None, {"is_causal": True, "enable_gqa": True}),
}


@for_compilers
@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_compiled(compiled, fresh):
    """Same values and gradients as eager, with a key or from one seed. No tensor as large as the weights is saved."""
    backend, dtype, Hkv, key, options = compiled
    of = tensors(2, 4, L, S, Hkv=Hkv, dtype=dtype)

    def call(q, k, v):
        return ours(q, k, v, key=key, **options).cos()

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    assert_alike(of, seeded(compiled), seeded(call), loose=10.0)
    if key is not None:
        assert_alike(of, compiled, lambda *t: theirs(*t, **options).cos(), loose=10.0)
    found, _ = saved(compiled, *[t.clone().requires_grad_() for t in of])
    assert found
    assert max(t.untyped_storage().nbytes() // t.element_size() for t in found) < 2 * 4 * L * S


def seeded(call):
    def called(*tensors):
        torch.manual_seed(3)
        return call(*tensors)

    return called


@for_compilers
def test_compiled_with_dynamic_sizes(fresh):
    compiled = torch.compile(partial(ours, is_causal=True), backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((2, 3, 5, 9), (3, 2, 20, 33)):
        assert_alike(tensors(*size), compiled, partial(theirs, is_causal=True), loose=10.0)


@for_compilers
def test_compiled_with_a_key_as_an_input(fresh):
    """Calls with different keys do not recompile."""
    compiled = torch.compile(lambda q, k, v, key: ours(q, k, v, key=key), backend="aot_eager", fullgraph=True)
    of = tensors(2, 3, 9, 13)
    for i in range(3):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            key = fd.fold_in(KEY, i)
            assert_near(compiled(*of, key), theirs(*of, key=key))


@for_compilers
def test_compiled_without_dropout(fresh):
    compiled = torch.compile(lambda *t: fd.scaled_dot_product_attention(*t), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors()), F.scaled_dot_product_attention(*tensors()))


# ----------------------------------------------------------------------------------------------------------- transforms

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": mask_of("boolean", (5, 9))},
    "additive": {"attn_mask": mask_of("additive", (5, 9)), "scale": -0.4},
}
for_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def both(transform, **options):
    """The results of a transform of the function, and of the composition."""
    return [transform(partial(call, **options)) for call in (ours, theirs)]


@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float64], ids=str)
@for_options
def test_functional_gradient(options, dtype):
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options = {**options, "attn_mask": options["attn_mask"].to(dtype)}
    gradient = both(lambda f: torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2)), **options)
    for got, want in zip(*(f(*tensors(dtype=dtype)) for f in gradient), strict=True):
        assert_near(got, want, 10.0)


@for_options
def test_vmap(options):
    """Over 4-D and 5-D tensors: all three, the query alone, and along another dimension."""
    q, k, v = tensors(3, 4)
    for in_dims, of in (
        (0, (q, k, v)),
        ((0, None, None), (q, k[0], v[0])),
        ((1, 0, 2), (q.transpose(0, 1), k, v.permute(1, 2, 0, 3))),
        (0, (q[None], k[None], v[None])),
    ):
        got, want = (f(*of) for f in both(lambda f, in_dims=in_dims: torch.func.vmap(f, in_dims), **options))
        assert_near(got, want)


def test_vmap_over_masks_and_keys():
    q, k, v = tensors()
    masks = torch.stack([mask_of("boolean", (5, 9)), torch.ones(5, 9, dtype=torch.bool)])
    got = torch.func.vmap(lambda mask: ours(q, k, v, attn_mask=mask))(masks)
    for y, mask in zip(got, masks, strict=True):
        assert_near(y, theirs(q, k, v, attn_mask=mask))


def test_gradients_for_each_example():
    of = tensors(3, 2)
    loss = both(lambda f: torch.func.vmap(torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2))))
    for got, want in zip(*(f(*of) for f in loss), strict=True):
        assert_near(got, want, 10.0)


@for_options
def test_jvp(options):
    of = tuple(tensors())
    transformed = both(lambda f: torch.func.jvp(f, of, tuple(t.cos() for t in of)), **options)
    for got, want in zip(*transformed, strict=True):
        assert_near(got, want)


def test_jacobian_and_hessian():
    q, k, v = tensors(1, 2, 2, 3, 2)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert_near(*(f(q) for f in both(lambda f, jac=jacobian: jac(lambda q: f(q, k, v)))))
    assert_near(*(f(k) for f in both(lambda f: torch.func.hessian(lambda k: f(q, k, v).square().sum()))), 10.0)


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_torchs_own_under_transforms(randomness):
    """Without a key torch's function is called: the same bits from one seed, or the same error."""
    of, found = tensors(), []
    for function in (fd.scaled_dot_product_attention, F.scaled_dot_product_attention):
        torch.manual_seed(3)
        found.append(torch.func.grad(lambda q, f=function: f(q, *of[1:], dropout_p=P).square().sum())(of[0]))
        try:
            found.append(torch.func.vmap(partial(function, dropout_p=P), randomness=randomness)(*of))
        except RuntimeError as error:
            found.append(torch.tensor(["randomness" in str(error)]))
        found.append(torch.get_rng_state())
    for got, want in zip(found[:3], found[3:], strict=True):
        assert torch.equal(got, want)


# ------------------------------------------------------------------------------------------------------ double backward


def second_gradients(call, of, **options):
    leaves = [t.detach().clone().requires_grad_() for t in of]
    y = call(*leaves, **options)
    g = gradient_for(y).requires_grad_()
    first = torch.autograd.grad(y, leaves, g, create_graph=True)
    penalty = sum(t.square().sum() for t in first) + y.cos().sum()
    return *(t.detach() for t in first), *torch.autograd.grad(penalty, (*leaves, g))


@pytest.mark.parametrize("Hkv", [4, 2])
@for_options
def test_double_backward(options, Hkv):
    of = tensors(H=4, Hkv=Hkv)
    found = [second_gradients(call, of, enable_gqa=Hkv != 4, **options) for call in (ours, theirs)]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_double_backward_of_drawn_keys():
    """The second backward has the mask of the forward call, although no key was given."""
    found = []
    for call in (partial(ours, key=None), partial(theirs, key=None, compute=SINGLE)):
        torch.manual_seed(5)
        found.append(second_gradients(call, tensors()))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_double_backward_of_halves():
    found = [second_gradients(call, tensors(dtype=HALF)) for call in (ours, theirs)]
    for got, want in zip(*found, strict=True):
        assert_near(got, want)


def test_double_backward_of_masked_rows():
    mask = torch.arange(5)[:, None] != 2
    found = [second_gradients(call, tensors(), attn_mask=mask) for call in (ours, theirs)]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_finite_differences_of_gradients():
    of = [t.requires_grad_() for t in tensors(1, 2, 3, 4, 3, dtype=torch.float64)]
    assert torch.autograd.gradgradcheck(ours, of, fast_mode=True)


# --------------------------------------------------------------------------------------------------------------- export


class Attention(nn.Module):
    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, q, k, v, key=None):
        given = {} if key is None else {"dropout_key": key}
        return self.function(q, k, v, dropout_p=P, **given, **self.options)


@for_compilers
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
def test_export_with_a_key(options):
    """The exported program takes any key."""
    of = tensors(2, 3, 9, 13)
    program = torch.export.export(Attention(fd.scaled_dot_product_attention, **options), (*of, KEY)).module()
    for i in range(2):
        key = fd.fold_in(KEY, i)
        assert_near(program(*of, key), theirs(*of, key=key, **options))


@for_compilers
def test_export_without_a_key():
    """The exported program is torch's own."""
    programs = [
        torch.export.export(Attention(function), tuple(tensors()))
        for function in (fd.scaled_dot_product_attention, F.scaled_dot_product_attention)
    ]
    got, want = ([node.target for node in program.graph.nodes] for program in programs)
    assert [str(target) for target in got] == [str(target) for target in want]


# ------------------------------------------------------------------------------------------------------------- autocast

CAST = {  # dtypes of query, key and value, and arguments
    "single": ((SINGLE,) * 3, {}),
    "mixed": ((SINGLE, HALF, SINGLE), {}),
    "half": ((HALF,) * 3, {"is_causal": True}),
    "boolean mask": ((SINGLE,) * 3, {"attn_mask": mask_of("boolean", (5, 9))}),
    "additive mask": ((SINGLE,) * 3, {"attn_mask": mask_of("float32", (5, 9))}),
}


@pytest.mark.parametrize("to", [HALF, SHORT], ids=str)
@pytest.mark.parametrize("cast", CAST.values(), ids=CAST)
def test_autocast(cast, to):
    """The result is that of the cast tensors. The gradients have the dtypes from before the cast."""
    dtypes, options = cast
    of = [t.to(dtype) for t, dtype in zip(tensors(), dtypes, strict=True)]

    def under(*tensors, **options):
        with torch.autocast("cpu", to):
            return fd.scaled_dot_product_attention(*tensors, dropout_p=P, dropout_key=KEY, **options)

    got, gradients = run(under, of, **options)
    assert got.dtype == to
    want, wanted = run(lambda *t, **options: theirs(*(x.to(to) for x in t), **options), of, **options)
    assert_near(got, want)
    for x, y, dtype in zip(gradients, wanted, dtypes, strict=True):
        assert x.dtype == dtype
        assert_near(x.to(to), y.to(to))


def test_autocast_draws_alike():
    found = []
    for drops in (True, False):
        torch.manual_seed(5)
        q, k, _ = tensors()
        with torch.autocast("cpu", HALF):
            if drops:
                y = fd.scaled_dot_product_attention(q, k, torch.eye(9).expand(2, 3, 9, 9), dropout_p=P)
            else:
                y = fd.dropout(weights_of(q, k), P)
        found.append((y != 0, torch.get_rng_state()))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_autocast_without_dropout():
    with torch.autocast("cpu", HALF):
        assert_same(fd.scaled_dot_product_attention(*tensors()), F.scaled_dot_product_attention(*tensors()))


# ---------------------------------------------------------------------------------------------------------------- modes


class Plain(torch.Tensor):
    """A subclass without its own rules."""


CONTEXTS = {
    "dispatch mode": Passing,
    "function mode": PassingFunctions,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.parametrize("context", CONTEXTS)
@for_options
def test_contexts(context, options):
    def under(call):
        def called(*tensors):
            with CONTEXTS[context]():
                return call(*tensors, **options)

        return called

    assert_alike(tensors(), under(ours), under(theirs))


@pytest.mark.parametrize("wrap", ["dispatch mode", "subclass"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
def test_torchs_own_where_somebody_looks_on(wrap, options):
    """Same bits as torch from one seed, and torch's result type."""
    found = []
    for function in (fd.scaled_dot_product_attention, F.scaled_dot_product_attention):
        torch.manual_seed(3)
        if wrap == "subclass":
            y = function(*(t.as_subclass(Plain) for t in tensors()), dropout_p=P, **options)
        else:
            with Passing():
                y = function(*tensors(), dropout_p=P, **options)
        found.append((type(y), y.as_subclass(torch.Tensor), torch.get_rng_state()))
    for got, want in zip(*found, strict=True):
        assert got is want or torch.equal(got, want)


def test_parameters():
    of = [nn.Parameter(t) for t in tensors()]
    found, y = saved(ours, *of)
    assert type(y) is torch.Tensor
    assert_near(y, theirs(*of))
    assert all(t.numel() < 2 * 3 * 5 * 9 or any(t.data_ptr() == x.data_ptr() for x in (*of, y)) for t in found)


def test_fake_tensors():
    for dtype in (SINGLE, HALF):
        with FakeTensorMode():
            q, k, v = (torch.empty(t.shape, dtype=dtype, requires_grad=True) for t in tensors(Ev=4))
            y = fd.scaled_dot_product_attention(q, k, v, dropout_p=P)
            assert (y.shape, y.dtype) == ((2, 3, 5, 4), dtype)
            assert [g.shape for g in torch.autograd.grad(y.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_meta_tensors():
    q, k, v = (torch.empty(t.shape, device="meta") for t in tensors(Ev=4))
    assert fd.scaled_dot_product_attention(q, k, v, dropout_p=P).shape == (2, 3, 5, 4)


OPERATOR_INPUTS = {
    "rows": lambda *shape: torch.randn(shape),
    "columns": lambda *shape: torch.randn(*shape[:2], shape[3], shape[2]).mT,
    "every other": lambda *shape: torch.randn(*shape[:3], 2 * shape[3])[..., ::2],
    "heads inside": lambda *shape: torch.randn(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2),
}


@pytest.mark.parametrize("layout", OPERATOR_INPUTS)
@pytest.mark.parametrize("shared", [1, 2])
def test_operators(layout, shared):
    """A compiler may pass inputs with any strides. opcheck tests schema, fake kernels and tracing."""
    make = OPERATOR_INPUTS[layout]
    query, key, value = make(2, 4, 5, 8), make(2, 4 // shared, 7, 8), make(2, 4 // shared, 7, 6)
    mask = (torch.rand(2, 1, 1, 7) < 0.8).expand(2, 4, 5, 7)
    options = (mask, P, KEY, False, 0.3)
    forward = torch.ops.fused_dropout.attention.default
    backward = torch.ops.fused_dropout.attention_backward.default
    out, statistics = forward(query, key, value, *options)
    gradient = make(2, 4, 5, 6)
    want = forward(*(t.contiguous() for t in (query, key, value)), *options)
    torch.testing.assert_close((out, statistics), want)
    saved = (query, key, value, out, statistics)
    plain = [t.contiguous() for t in (gradient, *saved)]
    torch.testing.assert_close(backward(gradient, *saved, *options), backward(*plain, *options))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, (query, key, value, *options), test_utils=tests)
    torch.library.opcheck(backward, (gradient, *saved, *options), test_utils=tests)
