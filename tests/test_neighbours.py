"""``fd.dropout_add`` and ``fd.relu_dropout`` against the separate calls, bit for bit."""

import itertools
import random

import pytest
import torch
from helpers import DTYPES, Passing, PassingFunctions, assert_same, for_dtypes, run_on
from separate_calls import (
    KEY,
    P,
    for_calls,
    ours_add,
    ours_relu,
    separate_add,
    separate_relu,
    two_calls_add,
)

import fused_dropout as fd

WIDTHS, PROBABILITIES = (1, 7, 96, 768, 1000), (0.0, 1e-3, 0.1, 0.5, 1.0)
# A view of a one-dimensional tensor, for a number of rows and a width. The last dimension is the width.
VIEWS = {
    "contiguous": lambda t, r, w: t[: r * w].view(r, w),
    "transposed": lambda t, r, w: t[: r * w].view(w, r).t(),
    "columns": lambda t, r, w: t[: r * (w + 3)].view(r, w + 3)[:, 2 : w + 2],
    "transposed columns": lambda t, r, w: t[: w * (r + 3)].view(w, r + 3)[:, 1 : r + 1].t(),
    "every other": lambda t, r, w: t[: 2 * r * w : 2].view(r, w),
    "expanded": lambda t, r, w: t[:w].expand(r, w),
    "four dimensions": lambda t, r, w: t[: 6 * r * w].view(2, r, 3, w),
    "channels_last": lambda t, r, w: t[: 6 * r * w].view(2, 3, w, r).permute(0, 3, 1, 2),
    "vector": lambda t, r, w: t[:w],
    "empty": lambda t, r, w: t[:0].view(0, w),
    "no columns": lambda t, r, w: t[:0].view(r, 0),
    "0-d": lambda t, r, w: t[0],
}
for_views = pytest.mark.parametrize("view", VIEWS)
PAIRS = [(view, view) for view in VIEWS]  # of the input and of the residual
PAIRS += [("transposed", "contiguous"), ("contiguous", "transposed"), ("columns", "contiguous"), ("vector", "vector")]
PAIRS += [("contiguous", "columns"), ("contiguous", "expanded"), ("transposed", "expanded"), ("expanded", "transposed")]
PAIRS += [("transposed columns", "contiguous"), ("transposed columns", "transposed"), ("every other", "columns")]
PAIRS += [("channels_last", "four dimensions"), ("four dimensions", "channels_last")]
for_pairs = pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)


def gradient_for(y, layout="contiguous"):
    if layout == "expanded":
        return torch.full((), 0.7, dtype=y.dtype, device=y.device).expand(y.shape)
    shape = y.shape[::-1] if layout == "transposed" else y.shape
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(y)
    return gradient.permute(tuple(range(y.dim()))[::-1]) if layout == "transposed" else gradient


def run(call, storages, views, layout=None, written=False, **options):
    """The result, the gradients of the storages (if layout is given), the storages after the call, and the views."""
    leaves = [t.clone().requires_grad_(layout is not None) for t in storages]
    owned = [leaf * 1 for leaf in leaves]
    tensors = [view(t) for view, t in zip(views, owned, strict=True)]
    y = call(*tensors, **options)
    if written:
        y = tensors[0].copy_(y)
    gradients = ()
    if layout is not None:
        gradients = torch.autograd.grad(y, leaves, gradient_for(y, layout), allow_unused=True, materialize_grads=True)
    return y, gradients, owned, tensors


def strides(t):
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def check(ours, theirs, storages, views, inplace=False, **options):
    """Compares the bits of result and gradients and the result's strides. Checks that only the result is written."""
    y, gradients, owned, tensors = run(ours, storages, views, inplace=inplace, key=KEY, **options)
    want, their_gradients, expected, _ = run(theirs, storages, views, written=inplace, key=KEY, **options)
    assert_same(y, want.detach().cpu())
    for got, of in zip(gradients, their_gradients, strict=True):
        assert_same(got, of.cpu())
    if inplace:
        assert y is tensors[0]
    else:
        laid_out = torch.empty_like(tensors[0])
        assert strides(y) == strides(laid_out if len(tensors) == 1 else tensors[1].detach() + laid_out)
        assert y.untyped_storage().data_ptr() not in [t.untyped_storage().data_ptr() for t in owned]
    for got, of in zip(owned, expected, strict=True):
        assert_same(got, of.detach())


POOL = torch.randn(2**20, generator=torch.Generator().manual_seed(1))


def storage(rng, n, dtype):
    """Random values, and the offset at which a view begins, which is odd in half of the cases."""
    lead, first = rng.choice((0, 0, 0, 1, 3, 5)), rng.randrange(len(POOL) - n - 5)
    return POOL[first : first + lead + n].to(dtype, copy=True), lead


def check_views(names, dtype, rows, width, rng, with_bias=False, **options):
    """Checks dropout_add for the names of two views, and relu_dropout for one name."""
    size = (6 if "four dimensions" in names or "channels_last" in names else 2) * (rows + 3) * (width + 3)
    made = [(VIEWS[name], *storage(rng, size, dtype)) for name in names]
    views = [lambda t, view=view, lead=lead: view(t[lead:], rows, width) for view, _, lead in made]
    storages = [t for _, t, _ in made]
    if with_bias:
        bias, lead = storage(rng, width, dtype)
        last = views[0](storages[0]).shape[-1:]
        storages, views = [*storages, bias], [*views, lambda t: t[lead:][: last.numel()].view(last)]
    ours, theirs = (ours_add, separate_add) if len(names) > 1 else (ours_relu, separate_relu)
    check(ours, theirs, storages, views, **options)


def check_all(names, dtype, rows, widths=WIDTHS):
    """All combinations of width, bias, gradient and in place.

    With five widths, each width occurs with each probability, and so does each combination of the other options.
    """
    rng = random.Random(f"{names} {dtype} {rows}")
    first = rng.randrange(len(PROBABILITIES))
    for i, (width, with_bias, grad, inplace) in enumerate(itertools.product(widths, *[(False, True)] * 3)):
        if (inplace and names[0] == "expanded") or (with_bias and len(names) == 1):
            continue
        p = PROBABILITIES[(first + i) % len(PROBABILITIES)]
        layout = rng.choice(("contiguous", "transposed", "expanded")) if grad else None
        check_views(names, dtype, rows, width, rng, with_bias, p=p, inplace=inplace, layout=layout)


@for_dtypes
@for_pairs
def test_add_has_the_bits_of_the_separate_calls(pair, dtype):
    check_all(pair, dtype, 4)


@for_dtypes
@for_views
def test_relu_has_the_bits_of_the_separate_calls(view, dtype):
    check_all((view,), dtype, 4)


@pytest.mark.same_without("_eager")
@for_dtypes
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_elements(dtype, threads, info):
    """Above 65,536 elements several threads share a call. Their parts can begin at any place in a row."""
    if threads > 1 and info.devices["cpu"] != "native":
        pytest.skip("the reference has no threads of its own")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for names in [("contiguous", "contiguous"), ("columns", "transposed"), ("transposed", "transposed")]:
            for names_of_call in (names, names[:1]):
                check_all(names_of_call, dtype, 271 - threads, [767])
    finally:
        torch.set_num_threads(before)


def compact():
    """Runs a small part of the matrix above, then prints the instruction set in use."""
    for dtype, names in itertools.product(DTYPES, PAIRS):
        check_all(names, dtype, 5, [77])
        check_all(names[:1], dtype, 5, [77])
        if names[0] in ("contiguous", "transposed") and names[0] == names[1]:
            check_all(names, dtype, 90, [1000])
    print(fd.backend_info().cpu_isa)


@pytest.mark.same_without("_eager")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_instruction_sets(isa, info):
    if info.devices["cpu"] != "native":
        pytest.skip("no kernels")
    run_on(isa, "test_neighbours")


@for_dtypes
def test_special_values(dtype):
    """All triples of input, residual and bias, and each value as a gradient. -0.0 + a dropped element is +0.0."""
    finfo = torch.finfo(dtype)
    some = [0.0, -0.0, 1.0, -1.5, torch.inf, -torch.inf, torch.nan, finfo.max, finfo.min, finfo.tiny / 4, -finfo.tiny]
    some = torch.tensor(some, dtype=dtype)
    x, residual = (t.reshape(121, 11) for t in torch.cartesian_prod(some, some, some).unbind(1)[:2])
    for p, inplace in itertools.product(PROBABILITIES, (False, True)):
        check(ours_relu, separate_relu, [x], [torch.detach], inplace, p=p)
        for tensors in ([x, residual], [x, residual, some]):
            check(ours_add, separate_add, tensors, [torch.detach] * len(tensors), inplace, p=p)
    for gradient in some:
        for calls, leaves in ([(ours_add, separate_add), (x, residual)], [(ours_relu, separate_relu), (x,)]):
            leaves, found = [t.clone().requires_grad_() for t in leaves], []
            for call in calls:
                y = call(*leaves, p=P, key=KEY)
                found.append(torch.autograd.grad(y, leaves, gradient.expand(y.shape)))
            for got, want in zip(*found, strict=True):
                assert_same(got, want)


# ------------------------------------------------------------------------------- same draws as by the separate calls


def assert_alike(got, want):
    assert type(got) is type(want)
    if got.dtype in DTYPES:
        got, want = (t.detach().as_subclass(torch.Tensor).resolve_neg() for t in (got, want))
        assert_same(got, want)
    else:
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert torch.equal(got, want)


def drawn(call, tensors, *, grad=True, views=None, **options):
    """Like run(): the result, the gradients, and the tensors and the generator's state after the call."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(grad and t.is_floating_point()) for t in tensors]
    owned = [t if t is None else view(t * 1) for t, view in zip(leaves, views or [lambda t: t] * 3, strict=False)]
    torch.manual_seed(3)
    y, state = call(*owned, **options), torch.get_rng_state()
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    g = torch.ones_like(y) if y.is_complex() else gradient_for(y.as_subclass(torch.Tensor))
    return y, torch.autograd.grad(y, wanted, g) if wanted and y.requires_grad else (), state, owned


def assert_drawn_alike(ours, theirs, tensors, **options):
    """Out of place, and in place if the result fits into the input. If not, the call leaves the input unchanged."""
    want, their_gradients, their_state, their_tensors = drawn(theirs, tensors, **options)
    for inplace in (False, True):
        y, gradients, state, owned = drawn(ours, tensors, inplace=inplace, **options)
        assert torch.equal(state, their_state)
        assert_alike(y, want)
        for got, of in zip(gradients, their_gradients, strict=True):
            assert_alike(got + 0 if inplace else got, of + 0 if inplace else of)  # a view's gradient is added to zeros
        fits = inplace and (want.shape, want.dtype) == (owned[0].shape, owned[0].dtype)
        assert (y is owned[0]) == fits or (type(y) is not type(owned[0]) and y.data_ptr() == owned[0].data_ptr())
        for got, of in itertools.islice(zip(owned, their_tensors, strict=True), fits, None):
            assert got is of is None or torch.equal(got.detach(), of.detach())


HALF, DOUBLE, COMPLEX = torch.bfloat16, torch.float64, torch.complex64
MIXED = {  # dtypes or shapes of input, residual and bias; the defaults are float32 and (4, 6)
    "plain": ((4, 6), (4, 6), (6,)),
    "wider residual": (HALF, torch.float32, HALF),
    "narrower residual": (torch.float32, HALF, torch.float32),
    "wider bias": (HALF, HALF, torch.float32),
    "narrower bias": (DOUBLE, DOUBLE, torch.float16),
    "two halves": (HALF, torch.float16, None),
    "integers": (torch.float32, torch.int64, torch.int32),
    "complex residual": (torch.float32, COMPLEX, None),
    "residual row": ((4, 6), (6,), None),
    "residual column": ((4, 6), (4, 1), (6,)),
    "scalars": ((4, 6), (), ()),
    "larger residual": ((4, 6), (3, 4, 6), None),
    "residual of a size-1 dimension more": ((4, 6), (1, 4, 6), (6,)),
    "input row": ((6,), (4, 6), (6,)),
    "bias of all elements": ((4, 6), (4, 6), (4, 6)),
    "bias column": ((4, 6), (4, 6), (4, 1)),
    "bias of one": ((4, 6), (4, 6), (1,)),
    "larger bias": ((6,), (4, 6), (4, 6)),
    "much larger bias": ((6,), (6,), (3, 4, 6)),
    "empty": ((0, 6), (0, 6), (6,)),
    "empty by broadcasting": ((1, 6), (0, 6), (6,)),
}
ENDS = [{}, {"p": 0.0}, {"p": 1.0}, {"training": False}, {"p": 1.0, "training": False}, {"p": 1e-300}]


def of_kind(kind, shape):
    shape, dtype = (kind, torch.float32) if isinstance(kind, tuple) else (shape, kind)
    return None if kind is None else (torch.randn(shape) * 3).to(dtype)


@pytest.mark.parametrize("kinds", MIXED.values(), ids=MIXED)
def test_mixed_dtypes_and_shapes(kinds):
    torch.manual_seed(1)
    tensors = [of_kind(kind, shape) for kind, shape in zip(kinds, ((4, 6), (4, 6), (6,)), strict=True)]
    for ends, transposed in itertools.product(ENDS, (False, True)):
        views = [lambda t: t.mT.contiguous().mT if t.dim() > 1 else t] * 3 if transposed else None
        assert_drawn_alike(ours_add, two_calls_add, tensors, views=views, **ends)


class Plain(torch.Tensor):
    """A subclass without its own rules."""


WRAPPED = {
    "subclass": lambda t: t.as_subclass(Plain),
    "negative": torch._neg_view,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
}


@pytest.mark.parametrize("place", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("wrap", WRAPPED)
@for_calls
def test_wrapped_tensors(ours, theirs, takes, wrap, place):
    views = [WRAPPED[wrap] if i in place else torch.nn.Identity() for i in range(takes)]
    tensors = [torch.randn(6, 6), torch.randn(6, 6), torch.randn(6)][:takes]
    for ends in ENDS[:4]:
        assert_drawn_alike(ours, theirs, tensors, views=views, **ends)


CONTEXTS = {
    "dispatch mode": Passing,
    "function mode": PassingFunctions,
    "autocast": lambda: torch.autocast("cpu", HALF),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.parametrize("context", CONTEXTS)
@for_calls
def test_contexts(ours, theirs, takes, context):
    def under(call):
        def called(*tensors, **options):
            with CONTEXTS[context]():
                return call(*tensors, **options)

        return called

    tensors = [torch.randn(4, 6), torch.randn(4, 6).to(HALF), torch.randn(6)][:takes]
    for ends, dtype in itertools.product(ENDS[:4], (None, torch.float32, HALF)):
        cast = [t if dtype is None else t.to(dtype) for t in tensors]
        assert_drawn_alike(under(ours), under(theirs), cast, grad=context not in ("no_grad", "inference_mode"), **ends)


@pytest.mark.parametrize("source", ["default", "generator", "key"])
@for_calls
def test_same_draws(ours, theirs, takes, source):
    """The mask and the generators' final states are those of one fd.dropout, also on empty tensors."""
    for shape, ends in itertools.product(((4, 6), (0, 6), ()), ENDS):
        states = []
        for call in (ours, theirs):
            torch.manual_seed(5)
            generator = torch.Generator().manual_seed(8)
            given = {"default": {}, "generator": {"generator": generator}, "key": {"key": KEY}}[source]
            y = call(*[torch.ones(shape)] * min(takes, 2), **ends, **given)
            states.append((y, torch.get_rng_state(), generator.get_state()))
        for got, want in zip(*states, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("noise_shape", [(None, 1), (1, 6), (1, 1), (4, 6), (6,)], ids=str)
def test_noise_shape(noise_shape):
    for layout, with_bias, inplace in itertools.product(
        (None, "contiguous", "transposed"), (False, True), (False, True)
    ):
        for view in ("contiguous", "transposed", "columns", "expanded"):
            if inplace and view == "expanded":
                continue
            views = [lambda t, v=v: VIEWS[v](t, 4, 6) for v in (view, "contiguous")] + [lambda t: t[:6]] * with_bias
            storages = [torch.randn(60) for _ in views]
            check(ours_add, separate_add, storages, views, inplace, layout=layout, noise_shape=noise_shape)
    x, residual = torch.randn(4, 6), torch.randn(4, 6)
    if noise_shape == (None, 1):
        y = fd.dropout_add(x, residual, P, noise_shape=noise_shape, key=KEY)
        assert torch.equal(y, residual + fd.drop_path(x, P, True, key=KEY))


# ------------------------------------------------------------------------------------------------------------ aliasing

N = 300  # rows and columns: above 65,536 elements
ALIASED = {
    "the same": lambda t: (t[:90000].view(N, N),) * 2,
    "one ahead": lambda t: (t[:90000].view(N, N), t[1:90001].view(N, N)),
    "one behind": lambda t: (t[1:90001].view(N, N), t[:90000].view(N, N)),
    "a row ahead": lambda t: (t[:90000].view(N, N), t[N:][:90000].view(N, N)),
    "much behind": lambda t: (t[70000:160000].view(N, N), t[:90000].view(N, N)),
    "its transpose": lambda t: (t[:90000].view(N, N), t[:90000].view(N, N).t()),
    "its row": lambda t: (t[:90000].view(N, N), t[:N].expand(N, N)),
    "every other element": lambda t: (t[:180000:2].view(N, N), t[:90000].view(N, N)),
    "other columns": lambda t: (t.view(400, 500)[:, :77], t.view(400, 500)[:, 40:117]),
    "bias": lambda t: (t[:90000].view(N, N), t[:90000].view(N, N), t[5 : N + 5]),
    "bias alone": lambda t: (t[:90000].view(N, N), t[100000:190000].view(N, N), t[:90000].view(N, N)[:, 7]),
}


@pytest.mark.parametrize("alias", ALIASED)
def test_aliasing(alias):
    """The result is computed from the values before the call, and nothing else is written."""
    for p, grad, inplace, dtype in itertools.product(
        (0.0, P, 1.0), (False, True), (False, True), (torch.float32, HALF)
    ):
        memory = POOL[:200_000].to(dtype, copy=True).requires_grad_(grad)
        found = []
        for call in (ours_add, separate_add):
            shared = memory * 1
            x, *others = ALIASED[alias](shared)
            y = call(x, *others, p=p, key=KEY, **({"inplace": inplace} if call is ours_add else {}))
            if inplace and call is separate_add:
                y = x.copy_(y)
            gradients = torch.autograd.grad(y, memory, gradient_for(y)) if grad else ()
            found.append((y.detach(), *gradients, shared.detach()))
            assert (y is x) == inplace
        for got, want in zip(*found, strict=True):
            assert_same(got, want)
