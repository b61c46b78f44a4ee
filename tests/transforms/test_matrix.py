"""Dropout under torch.func, forward AD and torch.compile: transforms x functions x sources of keys x compilers.

``make test`` runs a selection in which every two values occur together. ``make test-transforms`` (pytest --every-cell)
runs all cells.
"""

import contextlib
import itertools

import pytest
import torch
from pairs import all_pairs, every_cell
from tables import COMPILE_AS, COMPILERS, FUNCTIONS, KEY, SAMPLES, SOURCES, TRANSFORMS, P, drawn_keys, inputs

from fused_dropout import native

AXES = [list(TRANSFORMS), list(FUNCTIONS), list(SOURCES), list(COMPILERS), list(COMPILE_AS)]
COSTLY = ["inductor", "generator"]  # a generator causes a graph break at each draw
# Inductor gets these in the same form as grad, jacrev, jvp and vmap: as the graph from tracing the transform.
APART = {frozenset((name, "inductor")) for name in ("vjp", "jacfwd", "hessian", "linearize", "functional_call")}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),  # a warning of torch's linearize
]


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        cells = every_cell(AXES) if metafunc.config.getoption("--every-cell") else all_pairs(AXES, COSTLY, APART)
        metafunc.parametrize("cell", cells, ids="-".join)


def compiled(f, backend, fullgraph):
    torch._dynamo.reset()
    return f if backend is None else torch.compile(f, backend=backend, fullgraph=fullgraph)


def expected(transform, function, x, masks):
    """The transform of the formula with these masks: one mask, or one for each sample."""
    if transform.each is None:
        return transform.make(lambda x: function.formula(x, masks[0]))(x)
    samples = [transform.each(lambda x, m=m: function.formula(x, m))(x_) for x_, m in zip(x, masks, strict=True)]
    return tuple(map(torch.stack, zip(*samples, strict=True)))


def check_masks(function, masks):
    """The properties of masks whose keys are not known: different samples have different masks, elements that share a
    draw are equal, and the rate is right."""
    assert len({str(mask.tolist()) for mask in masks}) == len(masks)
    kept = n = 0
    for mask in masks:
        shared = [i for i, size in enumerate(function.noise) if size == 1]
        noise = mask.amax(shared, keepdim=True)
        assert torch.equal(noise, mask.amin(shared, keepdim=True))
        kept, n = kept + int(noise.sum()), n + noise.numel()
    assert abs(kept / n - (1 - P)) < 5 * (P * (1 - P) / n) ** 0.5


def check(transform, function, source, compiler):
    def made():
        return transform.make(function.make(**SOURCES[source]()))

    x = inputs() if transform.each else inputs()[0]
    run = compiled(made(), compiler, transform.traced and source != "generator")
    if transform.draws == "error" and source != "key":
        with pytest.raises(RuntimeError, match="randomness error mode"):
            run(x)
        return
    state = torch.get_rng_state()
    got = run(x)
    assert torch.equal(state, torch.get_rng_state()) == (source != "default")

    if source == "key":
        masks = [function.mask_of(KEY)] * SAMPLES
    elif transform.draws == "one":
        masks = [function.mask_of(drawn_keys(1)[0])] * SAMPLES
    else:
        masks = list(function.mask_shown_by(got[0]))
        check_masks(function, masks)
        if compiler not in (None, "inductor"):  # Inductor may draw in another order
            assert torch.equal(torch.stack(masks), function.mask_shown_by(made()(x)[0]))
    want = expected(transform, function, x, masks)
    if transform.redraws and source != "key":
        torch.testing.assert_close(got[0], want[0])
        own = got[1] != 0
        check_masks(function, [own])
        got, want = got[1], expected(transform, function, x, [own])[1]
    torch.testing.assert_close(got, want)


def torch_fails_too(transform, backend):
    """Whether this transform and compiler raise an error or lose the derivative if torch draws from a generator.

    Dynamo does not trace such a draw, and calls it between two graphs.
    """
    generator = torch.Generator().manual_seed(1)

    def dropout(x):
        return (x * 1) * torch.where(torch.rand(x.shape, generator=generator) < P, 0.0, 1 / (1 - P))

    with contextlib.suppress(Exception):
        x = inputs() if transform.each else inputs()[0]
        return None in compiled(transform.make(dropout), backend, False)(x)
    return True


def test_cell(cell, monkeypatch):
    transform, function, source, compiler = TRANSFORMS[cell[0]], FUNCTIONS[cell[1]], cell[2], COMPILERS[cell[3]]
    monkeypatch.setattr(native, "compile_as", cell[4])
    try:
        check(transform, function, source, compiler)
    except Exception:
        if source == "generator" and compiler and torch_fails_too(transform, compiler):
            pytest.skip("torch fails here with a generator of its own")
        raise


def test_all_pairs():
    """Every two values of different axes occur together, in few more cells than the two longest axes have pairs."""
    cells = all_pairs(AXES, COSTLY, APART)
    for i, j in itertools.combinations(range(len(AXES)), 2):
        missing = set(itertools.product(AXES[i], AXES[j])) - {(cell[i], cell[j]) for cell in cells}
        assert {frozenset(pair) for pair in missing} <= APART
    assert len(cells) < 1.1 * len(TRANSFORMS) * len(FUNCTIONS)
    assert cells == all_pairs(AXES, COSTLY, APART)
