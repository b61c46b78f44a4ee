"""``fd.dropout_add`` and ``fd.relu_dropout``: tensors saved for backward, derivatives, transforms, errors."""

import ctypes
import doctest
import itertools
from functools import partial

import pytest
import torch
from conftest import ON_FAKE_GPU
from helpers import DTYPES
from separate_calls import (
    KEY,
    P,
    for_calls,
    ours_add,
    ours_relu,
    separate_add,
    separate_relu,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_dropout as fd
from fused_dropout import native, neighbours


def tensors(takes, *shape, grad=True, **options):
    torch.manual_seed(1)
    shape = shape or (4, 6)
    return [torch.randn(s, **options).requires_grad_(grad) for s in (shape, shape, shape[-1:])][:takes]


def saved(call, *tensors, **options):
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        y = call(*tensors, **options)
    return found, y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "columns"])
@for_calls
def test_saved(ours, theirs, takes, layout, dtype):
    """dropout_add saves the key and nothing else. relu_dropout saves its output, without a copy."""
    view = {"contiguous": lambda t: t, "transposed": lambda t: t.mT, "columns": lambda t: t[:, 3:35]}[layout]
    for needs in itertools.product((False, True), repeat=takes):
        given = [view(t) if t.dim() > 1 else t[:32] for t in tensors(takes, 40, 40, grad=False, dtype=dtype)]
        given = [t.resize_(given[0].shape[-1:]) if t.dim() == 1 else t for t in given]
        given = [t.detach().requires_grad_(of) for t, of in zip(given, needs, strict=True)]
        for options in ({}, {"noise_shape": (None, 1)})[: 2 if takes > 1 else 1]:
            found, y = saved(ours, *given, **options)
            if takes > 1:
                assert sum(t.numel() * t.element_size() for t in found) <= 16
                assert len(found) == 1 or not (needs[0] or needs[2])
            else:
                assert [t.data_ptr() for t in found] == [y.data_ptr()] * any(needs)
    with torch.no_grad():
        found, y = saved(ours, *given)
    assert found == []
    assert not y.requires_grad


@for_calls
def test_saved_in_place(ours, theirs, takes):
    x, *others = tensors(takes, 40, 40)
    found, _ = saved(ours, x * 1, *others, inplace=True)
    assert sum(t.untyped_storage().nbytes() for t in found) == (16 if takes > 1 else 40 * 40 * 4)


def test_residual_that_is_the_input():
    """It is used a third time. Its three gradients are summed in the same order."""
    torch.manual_seed(1)
    x, weight = torch.randn(2000, requires_grad=True), torch.randn(2000)
    y = fd.dropout_add(x, x, P, key=KEY) * weight + x * 1e-3
    want = (x + fd.dropout(x, P, key=KEY)) * weight + x * 1e-3
    gradient = torch.randn(2000)
    assert torch.equal(*(torch.autograd.grad(each, x, gradient)[0] for each in (y, want)))


@pytest.mark.parametrize(
    ("layers", "bytes_an_element"),
    [((nn.ReLU, nn.Dropout), 12), ((nn.ReLU, fd.Dropout), 8), ((fd.ReLUDropout,), 4)],
    ids=["torch", "fd.Dropout", "fd.ReLUDropout"],
)
def test_memory_of_a_feed_forward(layers, bytes_an_element):
    """Bytes per element of the inner width, in float32. Saved tensors count once; input and parameters do not count."""
    model, x = nn.Sequential(nn.Linear(16, 512), *(layer() for layer in layers), nn.Linear(512, 16)), torch.ones(64, 16)
    kept = {}
    not_counted = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in not_counted:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    assert sum(kept.values()) // (64 * 512) == bytes_an_element


@for_calls
def test_graph_keeps_no_other_memory(ours, theirs, takes):
    """Saved-tensor hooks show only tensors saved through autograd. The memory of the process shows all."""

    def resident():
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    n = 1 << 23
    x = torch.ones(n, requires_grad=True)
    before = resident()
    kept = [ours(x * 1, *[x * 1] * (takes > 1)) for _ in range(2)]
    if takes > 1:
        kept = [y.grad_fn for y in kept]
    assert resident() - before < 4 * n * (2.5 if takes == 1 else 0.5)


def test_output_changed_after_forward():
    (x,) = tensors(1)
    y = fd.relu_dropout(x, P)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = fd.dropout_add(x, x, P, key=KEY)
    (want,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.no_grad():
        x.add_(1)
    y.add_(1)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)


def test_input_saved_before_it_is_overwritten():
    for call in (ours_relu, lambda x, **options: ours_add(x, torch.ones(6), **options)):
        y = tensors(1)[0].exp()
        call(y, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@for_calls
def test_version_of_what_is_overwritten(ours, theirs, takes):
    for grad, ends in itertools.product((False, True), ({}, {"p": 0.0}, {"p": 1.0})):
        x, *others = (t * 1 for t in tensors(takes, grad=grad))
        ours(x, *others, inplace=True, **ends)
        assert x._version == 1
        assert all(t._version == 0 for t in others)


@for_calls
def test_key_changed_after_forward(ours, theirs, takes):
    given, key = tensors(takes), KEY.clone()
    y = ours(*given, key=key)
    key[0] = 5
    for got, want in zip(
        torch.autograd.grad(y.sum(), given), torch.autograd.grad(theirs(*given, key=KEY).sum(), given), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_who_needs_a_gradient(needs):
    given = [t.detach().requires_grad_(of) for t, of in zip(tensors(3), needs, strict=True)]
    wanted = [t for t in given if t.requires_grad]
    gradients = [torch.autograd.grad(call(*given, key=KEY).cos().sum(), wanted) for call in (ours_add, separate_add)]
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)


class Stop(torch.autograd.Function):
    """Passes on no gradient, not even zeros."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return None


@for_calls
def test_undefined_gradient(ours, theirs, takes):
    given = tensors(takes)
    gradients = torch.autograd.grad(Stop.apply(ours(*given)).sum(), given, allow_unused=True, materialize_grads=True)
    assert not any(t.any() for t in gradients)


@for_calls
def test_backward_twice(ours, theirs, takes):
    given = tensors(takes)
    y = ours(*given, key=KEY).sum()
    first, second = (torch.autograd.grad(y, given, retain_graph=again) for again in (True, False))
    assert all(map(torch.equal, first, second))
    if takes == 1:
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (5,)], ids=str)
@for_calls
def test_higher_derivatives(ours, theirs, takes, shape):
    given, call = tensors(takes, *shape, dtype=torch.float64), partial(ours, key=KEY)
    assert torch.autograd.gradcheck(call, given, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, given)

    def second(call):
        y = call(*given, key=KEY)
        gradient = torch.full_like(y, 0.3).requires_grad_()
        (first,) = torch.autograd.grad(y, given[0], gradient, create_graph=True)
        return torch.autograd.grad(first, gradient, first.detach().cos())[0]

    assert torch.equal(second(ours), second(theirs))


TRANSFORMS = {
    "grad": lambda call, n: torch.func.grad(lambda *t: (call(*t) ** 3).sum(), tuple(range(n))),
    "vjp": lambda call, n: lambda *t: torch.func.vjp(call, *t)[1](t[0].sin()),
    "jvp": lambda call, n: lambda *t: torch.func.jvp(call, t, tuple(s.cos() for s in t)),
    "jacrev": lambda call, n: torch.func.jacrev(call, tuple(range(n))),
    "jacfwd": lambda call, n: torch.func.jacfwd(call, randomness="same"),
    "vmap same": lambda call, n: torch.func.vmap(call, randomness="same"),
    "vmap different": lambda call, n: torch.func.vmap(call, (0, *[None] * (n - 1)), randomness="different"),
    "vmap of the residual": lambda call, n: torch.func.vmap(call, (None, 0, None)[:n], randomness="different"),
    "vmap of grad": lambda call, n: torch.func.vmap(
        torch.func.grad(lambda *t: (call(*t) ** 3).sum()), randomness="different"
    ),
}


@pytest.mark.parametrize("source", [{}, {"key": KEY}], ids=["default", "key"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@for_calls
def test_torch_func(ours, theirs, takes, transform, source):
    if takes == 1 and transform == "vmap of the residual":
        pytest.skip("it has none")
    given = [t.detach() for t in tensors(takes, 6, 6)]
    if "vmap" in transform and takes > 1:
        given[2] = torch.randn(6, 6)
    found = []
    for call in (ours, theirs):
        torch.manual_seed(2)
        found.append(torch.utils._pytree.tree_leaves(TRANSFORMS[transform](partial(call, **source), takes)(*given)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@for_calls
def test_vmap_that_allows_no_draws(ours, theirs, takes):
    given = [t.detach() for t in tensors(takes)][:2]
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.func.vmap(ours)(*given)
    for ends in ({"p": 0.0}, {"p": 1.0}, {"training": False}):
        assert torch.equal(torch.func.vmap(partial(ours, **ends))(*given), theirs(*given, **ends))


@pytest.mark.parametrize("reentrant", [False, True])
@for_calls
def test_checkpoint(ours, theirs, takes, reentrant):
    given, found = tensors(takes), []
    for call in (ours, partial(checkpoint, ours, use_reentrant=reentrant)):
        torch.manual_seed(2)
        found.append(torch.autograd.grad(call(*given).square().sum(), given) if not reentrant else None)
        if reentrant:
            torch.manual_seed(2)
            call(*given).square().sum().backward()
            found[-1] = [t.grad for t in given]
            for t in given:
                t.grad = None
    assert all(map(torch.equal, *found))


@pytest.mark.skipif(ON_FAKE_GPU, reason="torch.compile does not work there")
@pytest.mark.parametrize(("backend", "compile_as"), [("aot_eager", "kernel"), ("inductor", "fuse")])
@for_calls
def test_compiled(ours, theirs, takes, backend, compile_as, monkeypatch):
    monkeypatch.setattr(native, "compile_as", compile_as)
    torch._dynamo.reset()
    given, found = tensors(takes, 5, 40), []
    for call in (torch.compile(ours, backend=backend, fullgraph=True), theirs):
        torch.manual_seed(3)
        y = call(*given)
        found.append((y, *torch.autograd.grad(y, given, y.detach().cos())))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


# --------------------------------------------------------------------------------------------------- errors and modules


@for_calls
def test_wrong_arguments(ours, theirs, takes):
    given = [t.detach() for t in tensors(takes)]
    state, before = torch.get_rng_state(), [t.clone() for t in given]
    wrong = [{"p": 1.5}, {"p": -0.1}, {"p": float("nan")}, {"p": 2.0, "training": False}, {"p": "0.5"}]
    wrong += [{"key": KEY, "generator": torch.Generator()}, {"key": KEY[:1]}, {"key": KEY.long()}, {"key": 5}]
    wrong += [{"key": KEY[:1], "p": 0.0}, {"key": KEY.to("meta")}]
    for options, inplace in itertools.product(wrong, (False, True)):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as theirs_raise:
            theirs(*given, **options)
        with pytest.raises(theirs_raise.type) as raised:
            ours(*given, inplace=inplace, **options)
        assert str(raised.value) == str(theirs_raise.value)
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("ends", [{}, {"p": 0.0}, {"p": 1.0}, {"training": False}], ids=str)
@for_calls
def test_refused_in_place_unchanged(ours, theirs, takes, ends):
    _, *others = (t.detach() for t in tensors(takes))
    leaf, expanded = torch.ones(4, 6, requires_grad=True), torch.ones(1, 6).expand(4, 6)
    of_many = (torch.ones(3, 4, 6, requires_grad=True) * 1).unbind()[0]
    for x, message in ((leaf, "leaf"), (expanded, "single memory location"), (of_many, "multiple views")):
        with pytest.raises(RuntimeError, match=message):
            ours(x, *others, inplace=True, **ends)
        assert torch.equal(x.detach(), torch.ones(4, 6))


def test_residual_that_does_not_broadcast():
    for residual, bias in ((torch.ones(3, 6), None), (torch.ones(4, 6), torch.ones(5))):
        with pytest.raises(RuntimeError, match="must match the size"):
            fd.dropout_add(torch.ones(4, 6), residual, bias=bias)


def test_modules():
    x, residual, bias = (t.detach() for t in tensors(3))
    add = fd.DropoutAdd(P, key=KEY, noise_shape=(None, 1))
    relu = fd.ReLUDropout(P, inplace=True, key=KEY)
    assert torch.equal(add(x, residual, bias), separate_add(x, residual, bias, key=KEY, noise_shape=(4, 1)))
    assert torch.equal(add.eval()(x, residual), residual + x)
    assert torch.equal(fd.DropoutAdd(1.0)(x, residual), residual)
    assert torch.equal(fd.ReLUDropout(P, generator=torch.Generator())(x) >= 0, torch.ones(4, 6, dtype=torch.bool))
    want = separate_relu(x, key=KEY)
    assert relu(x) is x
    assert torch.equal(x, want)
    assert torch.equal(relu.eval()(x), want)
    for module in (fd.DropoutAdd, fd.ReLUDropout):
        assert repr(module(P)) == f"{module.__name__}(p={P}, inplace=False)"
        with pytest.raises(ValueError, match="between 0 and 1"):
            module(2.0)


@pytest.mark.parametrize("module", [fd.DropoutAdd(0.5), fd.ReLUDropout(0.5)], ids=lambda m: type(m).__name__)
def test_modules_drop_under_mc_dropout(module):
    x = torch.ones(1000)
    arguments = (x, x.clone()) if isinstance(module, fd.DropoutAdd) else (x,)
    module.eval()
    assert module(*arguments).unique().numel() == 1
    with fd.mc_dropout(module):
        assert module(*arguments).unique().numel() == 2


def test_examples():
    outcome = doctest.testmod(neighbours, extraglobs={"fd": fd, "torch": torch, "nn": torch.nn})
    assert outcome.failed == 0
    assert outcome.attempted >= 6
