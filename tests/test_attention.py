"""``fd.scaled_dot_product_attention`` against attention in torch's operations with the mask of ``fd.keep_mask``."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, key_tensor, run_on
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_dropout as fd

P, KEY = 0.3, key_tensor(11, 2**40 + 7)
SINGLE, HALF, SHORT = torch.float32, torch.bfloat16, torch.float16
for_fused_dtypes = pytest.mark.parametrize("dtype", [SINGLE, HALF, SHORT], ids=str)


def repeated(t, heads):
    """Repeats heads of keys or values, so that each head of queries has one."""
    return t.repeat_interleave(heads // t.shape[-3], -3)


def weights_of(q, k, attn_mask=None, is_causal=False, *, scale=None, enable_gqa=False):
    """The weights before dropout: zeros in rows that are fully masked."""
    if enable_gqa:
        k = repeated(k, q.shape[-3])
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    masked = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.where(masked, 0, torch.where(masked, 0, scores).softmax(-1))


def composed(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, key=None, compute=SINGLE, **options):
    """The contract in torch's own operations, in the dtype ``compute``. Without a key, ``fd.dropout`` draws one."""
    dtype, (q, k, v) = q.dtype, (t.to(compute) for t in (q, k, v))
    weights = weights_of(q, k, attn_mask, is_causal, **options)
    if key is None:
        dropped = fd.dropout(weights, dropout_p)
    else:
        factor = 1 / (1 - dropout_p) if dropout_p < 1 else 1.0
        dropped = weights * fd.keep_mask(tuple(weights.shape), dropout_p, key).to(compute) * factor
    if options.get("enable_gqa"):
        v = repeated(v, q.shape[-3])
    return (dropped @ v).to(dtype)


def ours(*tensors, dropout_p=P, key=KEY, **options):
    return fd.scaled_dot_product_attention(*tensors, dropout_p=dropout_p, dropout_key=key, **options)


def theirs(*tensors, dropout_p=P, key=KEY, compute=torch.float64, **options):
    return composed(*tensors, dropout_p=dropout_p, key=key, compute=compute, **options)


def gradient_for(y, layout="contiguous"):
    if layout == "expanded":
        return torch.full((), 0.7, dtype=y.dtype).expand(y.shape)
    order = list(range(y.dim()))
    if layout == "transposed":
        order[-2:] = order[:-3:-1]
    if layout == "heads last":
        order = [*order[:-3], order[-2], order[-3], order[-1]]
    generator = torch.Generator().manual_seed(4)
    return torch.randn([y.shape[d] for d in order], generator=generator).to(y.dtype).permute(order)


def run(call, tensors, views=None, layout="contiguous", of=(True, True, True), **options):
    """The result, and the gradients of the tensors. The call gets the views of the tensors."""
    leaves = [t.detach().clone().requires_grad_(needs) for t, needs in zip(tensors, of, strict=True)]
    y = call(*(leaves if views is None else views(*leaves)), **options)
    wanted = [t for t in leaves if t.requires_grad]
    return y, torch.autograd.grad(y, wanted, gradient_for(y, layout))


def assert_near(got, want, loose=1.0):
    """Within the tolerances of torch's own tests of attention; 16-bit dtypes multiply them by the largest value."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    atol = {SINGLE: 1e-5, torch.float64: 1e-12, HALF: 5e-2, SHORT: 2e-2}[got.dtype] * loose
    rtol = {SINGLE: 5e-6, torch.float64: 1e-12}.get(got.dtype, 0.0) * loose
    if got.dtype in (HALF, SHORT) and got.numel():
        atol *= max(1.0, want.double().nan_to_num(0, 0, 0).abs().max().item())
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol, equal_nan=True)


def assert_alike(tensors, ours=ours, theirs=theirs, loose=1.0, **options):
    """Returns the result and the gradients."""
    got, want = (run(call, tensors, **options) for call in (ours, theirs))
    assert_near(got[0], want[0])
    for x, y in zip(got[1], want[1], strict=True):
        assert_near(x, y, loose)
    return got[0], *got[1]


def tensors(B=2, H=3, L=5, S=9, E=8, Ev=None, Hkv=None, dtype=SINGLE):
    """Query, key and value; without a head dimension if H is None."""
    generator = torch.Generator().manual_seed(B + 10 * L + 100 * S + E)
    heads, fewer = ([], []) if H is None else ([H], [Hkv or H])
    shapes = [B, *heads, L, E], [B, *fewer, S, E], [B, *fewer, S, Ev or E]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# ----------------------------------------------------------------------------------------------- the mask, bit by bit

GRIDS = {  # batch, heads, L, S
    "one of all": (1, 1, 1, 1),
    "multiple of 8": (2, 2, 3, 8),
    "one below": (2, 3, 11, 7),
    "one above": (3, 2, 10, 9),
    "no heads": (3, None, 6, 13),
    "31": (2, 2, 9, 31),
    "33": (1, 5, 7, 33),
    "127": (2, 2, 5, 127),
    "one query": (5, 2, 1, 129),
    "300": (1, 2, 3, 300),
    "700": (1, 1, 5, 700),
    "many queries": (1, 2, 257, 5),
    "more queries": (1, 1, 600, 3),
    "both long": (1, 2, 257, 300),
    "many rows": (4, 8, 65, 67),
}


def dropped_weights(q, k, **options):
    """The weights after dropout in the forward and in the backward pass, obtained by passing identity matrices."""
    rows, columns = q.shape[-2], k.shape[-2]
    shape = [*k.shape[:-1], max(rows, columns)]
    value = torch.eye(columns, shape[-1], dtype=q.dtype).expand(shape).clone().requires_grad_()
    y = ours(q, k, value, **options)
    (gradient,) = torch.autograd.grad(y, value, torch.eye(rows, shape[-1], dtype=q.dtype).expand(y.shape))
    return y.detach()[..., :columns], gradient[..., :rows].mT


@for_fused_dtypes
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_each_element_of_the_mask(grid, dtype):
    """Forward and backward drop the same weights as ``fd.keep_mask``, and divide the others by 1 - p."""
    q, k, _ = tensors(*grid, dtype=dtype)
    weights = weights_of(q.double(), k.double())
    for p, key in ((P, KEY), (0.9, key_tensor(2**64 - 1, 5))):
        kept = fd.keep_mask(tuple(weights.shape), p, key)
        for got in dropped_weights(q, k, dropout_p=p, key=key):
            assert torch.equal(got != 0, kept)
            relative = {SINGLE: 2e-5, HALF: 5e-2, SHORT: 2e-2}[dtype]
            torch.testing.assert_close(got.double(), weights * kept / (1 - p), rtol=relative, atol=1e-6)


HIDDEN = {
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.rand(9, 13, generator=torch.Generator().manual_seed(1)) < 0.6},
    "additive": {"attn_mask": torch.randn(2, 1, 9, 13, generator=torch.Generator().manual_seed(1))},
}


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("E", [8, 80])
def test_masked_elements_are_numbered_too(hidden, E):
    """The dropout mask does not depend on attn_mask, is_causal or the layouts of the tensors."""
    q, k, _ = tensors(2, 3, 9, 13, E)
    weights = weights_of(q, k, **hidden)
    kept = fd.keep_mask(tuple(weights.shape), P, KEY)
    for views in ((q, k), (q.mT.contiguous().mT, k.transpose(1, 2).contiguous().transpose(1, 2))):
        for got in dropped_weights(*views, **hidden):
            assert torch.equal(got != 0, kept & (weights > 0))


def test_mask_of_grouped_queries():
    """The mask has the heads of the query."""
    q, k, _ = tensors(2, 6, 5, 9, Hkv=2)
    value = torch.eye(9).expand(2, 2, 9, 9)
    got = ours(q, k, value, enable_gqa=True)
    assert torch.equal(got != 0, fd.keep_mask((2, 6, 5, 9), P, KEY))


@pytest.mark.parametrize("p", [1e-300, 1e-3, 0.5, 1 - 2**-20])
def test_probabilities(p):
    """For each p. The tolerance grows with the values, because 1 / (1 - p) makes them large."""
    got, want = (run(call, tensors(L=40, S=70), dropout_p=p) for call in (ours, theirs))
    for x, y in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * max(1.0, y.abs().max().item()))


def test_every_weight_dropped(dtype):
    y, gradients = run(ours, tensors(dtype=dtype), dropout_p=1.0)
    for t in (y, *gradients):
        assert torch.equal(t, torch.zeros_like(t))


# -------------------------------------------------------------------------------------------------- values, gradients

SIZES = {  # batch, heads, L, S, E, Ev
    "one": (1, 1, 1, 1, 1, 1),
    "one key": (2, 2, 255, 1, 8, 3),
    "seven keys": (2, 1, 3, 7, 64, 64),
    "one query": (3, 2, 1, 257, 64, 80),
    "three dimensions": (3, None, 33, 31, 8, 5),
    "whole block": (1, 2, 256, 33, 8, 8),
    "block and one": (1, 1, 257, 127, 80, 1),
    "long rows": (1, 1, 3, 700, 8, 64),
    "many rows": (1, 2, 600, 9, 1, 8),
    "both long": (1, 1, 257, 300, 8, 8),
    "wide": (2, 2, 9, 8, 80, 64),
}


@for_fused_dtypes
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_sizes(size, is_causal, dtype):
    loose = 10.0 if max(size[2:4]) > 100 else 1.0
    assert_alike(tensors(*size, dtype=dtype), is_causal=is_causal, loose=loose)


@pytest.mark.parametrize("of", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_what_needs_a_gradient(of):
    assert_alike(tensors(), of=of)
    assert_alike(tensors(H=4, Hkv=2), of=of, enable_gqa=True)


def test_without_gradients():
    q, k, v = tensors()
    with torch.no_grad():
        assert not ours(q.requires_grad_(), k, v).requires_grad
    with torch.inference_mode():
        assert_near(ours(q, k, v), theirs(q, k, v))
    assert ours(q, k, v).requires_grad


@for_fused_dtypes
@pytest.mark.parametrize("scale", [None, 0.5, -0.7, 0.0, 2])
def test_scale(scale, dtype):
    for options in ({}, {"is_causal": True}, {"attn_mask": mask_of("additive", (5, 9), dtype)}):
        assert_alike(tensors(dtype=dtype), scale=scale, loose=10.0, **options)


GROUPS = {  # heads of the query, of the key and the value
    "two each": (4, 2),
    "three each": (6, 2),
    "all of one": (4, 1),
    "one each": (2, 2),
}


@for_fused_dtypes
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_grouped_queries(groups, dtype):
    H, Hkv = groups
    for options in ({}, {"is_causal": True}, {"attn_mask": mask_of("boolean", (2, H, 5, 9))}):
        assert_alike(tensors(H=H, Hkv=Hkv, dtype=dtype), enable_gqa=True, **options)


def test_grouped_queries_without_a_batch():
    q, k, v = (t[0] for t in tensors(H=4, Hkv=2))
    assert_alike((q, k, v), enable_gqa=True)


def test_fewer_heads_of_values_than_of_keys():
    q, k, v = tensors(H=4, Hkv=2)
    assert_alike((q, k, v[:, :1]), enable_gqa=True)


BROADCAST = {  # shapes of query, key and value
    "one batch of queries": ((1, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "one head of keys": ((2, 3, 5, 8), (2, 1, 9, 8), (2, 3, 9, 8)),
    "one head of values": ((2, 3, 5, 8), (2, 3, 9, 8), (2, 1, 9, 4)),
    "crossed": ((2, 1, 5, 8), (1, 3, 9, 8), (2, 3, 9, 4)),
    "only values": ((1, 1, 5, 8), (1, 1, 9, 8), (2, 3, 9, 4)),
    "three and four dimensions": ((3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "five dimensions": ((2, 1, 3, 5, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 4)),
    "matrices": ((5, 8), (9, 8), (9, 4)),
}


@pytest.mark.parametrize("shapes", BROADCAST.values(), ids=BROADCAST)
def test_batch_dimensions_are_broadcast(shapes):
    torch.manual_seed(1)
    of = [torch.randn(shape) for shape in shapes]
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.randn(5, 9)}):
        assert_alike(of, **options)


EMPTY = {
    "no keys": ((2, 3, 5, 8), (2, 3, 0, 8)),
    "no queries": ((2, 3, 0, 8), (2, 3, 9, 8)),
    "no batch": ((0, 3, 5, 8), (0, 3, 9, 8)),
    "no heads": ((2, 0, 5, 8), (2, 0, 9, 8)),
    "matrices": ((3, 5, 8), (3, 0, 8)),
}


@for_fused_dtypes
@pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY)
def test_empty(shapes, dtype):
    """Empty results or zeros, as in torch."""
    q, k = (torch.randn(shape).to(dtype) for shape in shapes)
    found = [
        run(call, (q, k, k.clone()), is_causal=is_causal)
        for is_causal in (False, True)
        for call in (ours, partial(F.scaled_dot_product_attention, dropout_p=P), partial(ours, key=None))
    ]
    for got, want in zip(found[::3] + found[2::3], found[1::3] * 2, strict=True):
        for x, y in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            assert_near(x, y)


def test_double():
    """float64 uses the composition with a key, and torch's own function without one."""
    assert_alike(tensors(dtype=torch.float64))
    assert_alike(tensors(H=4, Hkv=2, dtype=torch.float64), enable_gqa=True, is_causal=True)


# ---------------------------------------------------------------------------------------------------------- attn_mask

B, H, L, S = 2, 3, 6, 11
SHAPES = {
    "keys": (S,),
    "queries and keys": (L, S),
    "padding": (B, 1, 1, S),
    "batch": (B, 1, L, S),
    "all": (B, H, L, S),
    "heads": (1, H, L, S),
    "one column": (L, 1),
    "three dimensions": (H, L, S),
}
VIEWS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "part": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "offset": lambda t: torch.cat([t.new_ones(3), t.flatten()])[3:].view(t.shape),
    "every other": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t.expand(B, H, L, S),
}


def mask_of(kind, shape, dtype=SINGLE):
    """A boolean or additive mask. Every query sees the first key."""
    generator = torch.Generator().manual_seed(len(shape))
    random = torch.randn(shape, generator=generator)
    if kind == "boolean":
        return torch.where(torch.arange(shape[-1]) == 0, True, random > -0.3)
    if kind == "-inf":
        random = torch.where(torch.arange(shape[-1]) == 0, random, random.masked_fill(random < -0.3, -torch.inf))
    return random.to(SINGLE if kind == "float32" else dtype)


@pytest.mark.parametrize("kind", ["boolean", "additive", "-inf"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_masks(shape, view, kind):
    assert_alike(tensors(B, H, L, S), attn_mask=VIEWS[view](mask_of(kind, shape)))


@pytest.mark.parametrize("dtype", [HALF, SHORT], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive", "-inf", "float32"])
@pytest.mark.parametrize("shape", ["keys", "padding", "all"])
def test_masks_of_half_precision(shape, kind, dtype):
    assert_alike(tensors(B, H, L, S, dtype=dtype), attn_mask=mask_of(kind, SHAPES[shape], dtype))


def test_masks_and_sizes():
    """Sizes above one block of rows or of columns."""
    for of in ((1, 2, 300, 9), (2, 1, 5, 300), (2, None, 257, 33)):
        shape = [of[0], of[2], of[3]] if of[1] is None else of
        for kind in ("boolean", "-inf"):
            assert_alike(tensors(*of), attn_mask=mask_of(kind, shape), loose=10.0)
    assert_alike(tensors(2, 4, 300, 9, Hkv=2), attn_mask=mask_of("-inf", (2, 4, 300, 9)), enable_gqa=True, loose=10.0)


@for_fused_dtypes
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_fully_masked_rows(kind, dtype):
    """Fully masked rows give zeros, and no gradient passes through them."""
    seen = torch.rand(B, 1, L, S, generator=torch.Generator().manual_seed(2)) < 0.5
    seen[..., 1] = True
    seen[0, :, 2:4] = False
    seen[1] = False
    seen[..., 0] = False  # also a key that no query sees
    mask = seen if kind == "boolean" else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    y, dq, dk, dv = assert_alike(tensors(B, H, L, S, dtype=dtype), attn_mask=mask)
    for t in (y[0, :, 2:4], y[1], dq[0, :, 2:4], dq[1], dk[1], dv[1], dk[:, :, 0], dv[:, :, 0]):
        assert torch.equal(t, torch.zeros_like(t))


@for_fused_dtypes
def test_rows_of_the_lowest_number(dtype):
    """A row of an additive mask that is everywhere the dtype's lowest number hides nothing: the weights are equal."""
    mask = torch.zeros(L, S, dtype=dtype)
    mask[1:3] = torch.finfo(dtype).min
    mask[3, ::2] = torch.finfo(dtype).min
    q, k, v = tensors(B, H, L, S, dtype=dtype)
    if dtype != SHORT:  # the lowest number of SHORT leaves the differences of the scores
        kept = fd.keep_mask((B, H, L, S), P, KEY)
        uniform = kept[:, :, 1:3].double() / (1 - P) / S @ v.double()
        assert_near(ours(q, k, v, attn_mask=mask)[:, :, 1:3], uniform.to(dtype))
    assert_alike((q, k, v), theirs=partial(theirs, compute=SINGLE), attn_mask=mask)


@pytest.mark.parametrize("shape", ["keys", "queries and keys", "padding", "all"])
def test_mask_that_needs_a_gradient(shape):
    for dtype in (SINGLE, HALF):
        found, of = [], tensors(B, H, L, S, dtype=dtype)
        for call in (ours, theirs):
            mask = mask_of("additive", SHAPES[shape], dtype).requires_grad_()
            y, gradients = run(lambda *t, call=call, mask=mask: call(*t, attn_mask=mask), of, of=(True, False, True))
            again = call(*of, attn_mask=mask)
            found.append((y, *gradients, *torch.autograd.grad(again, mask, gradient_for(again))))
        for got, want in zip(*found, strict=True):
            assert_near(got, want)


def test_mask_that_needs_a_gradient_and_rows_masked():
    found = []
    for call in (ours, theirs):
        mask = torch.zeros(L, S).masked_fill(torch.arange(L)[:, None] == 2, -torch.inf).requires_grad_()
        y = call(*tensors(B, H, L, S), attn_mask=mask)
        found.append((y, *torch.autograd.grad(y, mask, gradient_for(y))))
    for got, want in zip(*found, strict=True):
        assert_near(got, want)


# ----------------------------------------------------------------------------------------------------- special values

PLACES = {"query": (0, (0, 1, 2, 3)), "key": (1, (1, 2, 7, 0)), "value": (2, (1, 0, 4, 5))}


@for_fused_dtypes
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_special_values(place, special, dtype):
    """NaN and inf appear in the same places as in the composition, where 0 * inf is NaN too."""
    of = tensors(B, H, L, S, dtype=dtype)
    of[place[0]][place[1]] = special
    for options in ({}, {"attn_mask": mask_of("boolean", (L, S))}, {"attn_mask": mask_of("additive", (L, S), dtype)}):
        got, want = ours(*of, **options), theirs(*of, **options, compute=SINGLE)
        assert not want.isfinite().all()
        assert_near(got, want)


def test_a_query_that_is_not_finite_stays_alone():
    """It does not affect the rows and gradients of the other queries."""
    q, k, v = tensors(B, H, L, S)
    q[0, 1, 2] = torch.nan
    y, gradients = run(ours, (q, k, v))
    assert y[0, 1, 2].isnan().all()
    assert y.isnan().sum() == 8
    assert gradients[0].isnan().sum() == 8
    assert not gradients[1][1].isnan().any()


def test_large_scores():
    """Scores beyond the range of float16, of both signs."""
    q, k, v = tensors(B, H, L, S, E=64, dtype=SHORT)
    q, k = q.sign() * 200, k * 100
    scores = q.float() @ k.float().mT / 8
    assert scores.abs().max() > 65504
    got = ours(q, k, v)
    assert got.isfinite().all()
    assert_near(got, theirs(q, k, v))
    assert_near(ours(q.float(), k.float(), v.float()), theirs(q.float(), k.float(), v.float()))


# ------------------------------------------------------------------------------------------------------------ layouts


def of_projection(x):
    return [t.transpose(1, 2) for t in x.view(2, 7, 3, 4, 8).unbind(2)]


LAYOUTS = {  # query, key and value as views of the tensors that get the gradients
    "heads of one projection": ((2, 7, 96), of_projection),
    "sequence first": ((7, 2, 96), lambda x: of_projection(x.transpose(0, 1))),
    "halves of the last dimension": ((2, 3, 7, 24), lambda x: x.split(8, -1)),
    "offset": ((1 + 3 * 2 * 3 * 7 * 8,), lambda x: x[1:].view(3, 2, 3, 7, 8).unbind()),
    "transposed": ((3, 2, 3, 8, 7), lambda x: x.mT.unbind()),
    "every other": ((3, 2, 3, 7, 16), lambda x: x[..., ::2].unbind()),
    "every other row": ((3, 2, 3, 14, 8), lambda x: x[:, :, :, ::2].unbind()),
    "expanded over the batch": ((3, 1, 3, 7, 8), lambda x: x.expand(3, 2, 3, 7, 8).unbind()),
    "expanded over the rows": ((3, 2, 3, 1, 8), lambda x: x.expand(3, 2, 3, 7, 8).unbind()),
    "expanded over the columns": ((3, 2, 3, 7, 1), lambda x: x.expand(3, 2, 3, 7, 8).unbind()),
    "one tensor": ((2, 3, 7, 8), lambda x: (x, x, x)),
    "three dimensions": ((7, 4, 24), lambda x: x.transpose(0, 1).split(8, -1)),
}


@for_fused_dtypes
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, dtype):
    shape, views = layout
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for options in ({"layout": "heads last"}, {"layout": "expanded", "is_causal": True}):
        assert_alike((x,), views=views, of=(True,), loose=4.0, **options)


@for_fused_dtypes
@pytest.mark.parametrize("layout", ["expanded", "transposed", "heads last"])
def test_layouts_of_the_gradient(layout, dtype):
    assert_alike(tensors(L=257, dtype=dtype), layout=layout, loose=10.0)
    assert_alike(tensors(H=None, dtype=dtype), layout=layout)


@for_fused_dtypes
def test_threads(dtype):
    """One thread and two give the same bits."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            of_thread = []
            for size, options in (
                ((2, 1, 300, 70), {}),
                ((1, 3, 70, 130), {"is_causal": True}),
                ((1, 4, 70, 33, 8, 8, 2), {"enable_gqa": True, "attn_mask": mask_of("boolean", (70, 33))}),
                ((3, None, 257, 31), {"attn_mask": mask_of("additive", (31,), dtype)}),
            ):
                y, gradients = run(ours, tensors(*size, dtype=dtype), **options)
                of_thread += [y.detach(), *gradients]
            found.append(of_thread)
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert_same(one, two)


def compact():
    """Runs a part of the tests above, then prints the instruction set in use."""
    for dtype in (SINGLE, HALF, SHORT):
        for size, options in ((SIZES["wide"], {}), (SIZES["block and one"], {"is_causal": True})):
            assert_alike(tensors(*size, dtype=dtype), loose=10.0, **options)
        assert_alike(tensors(H=4, Hkv=2, dtype=dtype), attn_mask=mask_of("boolean", (5, 9)), enable_gqa=True)
        test_each_element_of_the_mask(GRIDS["33"], dtype)
        test_layouts(LAYOUTS["heads of one projection"], dtype)
        test_special_values(PLACES["value"], torch.inf, dtype)
    print(fd.backend_info().cpu_isa)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_instruction_sets(isa, info):
    if info.devices["cpu"] != "native":
        pytest.skip("no kernels")
    run_on(isa, "test_attention")


# ------------------------------------------------------------------------------------------- key, generator and errors


@pytest.mark.parametrize("source", ["default", "generator", "key"])
@for_fused_dtypes
def test_same_draws(dtype, source):
    """The mask and the generators' final states are those of ``fd.dropout`` on the weights."""
    for p, heads in ((0.0, 3), (P, 3), (1.0, 3), (P, None)):
        q, k, _ = tensors(H=heads, dtype=dtype)
        value, states = torch.eye(9, dtype=dtype).expand(*k.shape[:-1], 9), []
        for ours in (True, False):
            torch.manual_seed(5)
            generator = torch.Generator().manual_seed(8)
            given = {"default": {}, "generator": {"generator": generator}, "key": {"key": KEY}}[source]
            if ours:
                given = {f"dropout_{name}" if name == "key" else name: of for name, of in given.items()}
                y = fd.scaled_dot_product_attention(q, k, value, dropout_p=p, **given)
            else:
                y = fd.dropout(weights_of(q.float(), k.float()), p, **given)
            states.append((y != 0, torch.get_rng_state(), generator.get_state()))
        for got, want in zip(*states, strict=True):
            assert torch.equal(got, want)


def test_composition_draws_from_the_generator_too():
    for dtype in (torch.float64, SINGLE):
        q, k, v = tensors(dtype=dtype)
        mask = torch.zeros(5, 9, requires_grad=dtype == SINGLE, dtype=dtype)
        generators = [torch.Generator().manual_seed(8) for _ in range(2)]
        got = fd.scaled_dot_product_attention(q, k, v, mask, P, generator=generators[0])
        weights = fd.dropout(weights_of(q, k), P, generator=generators[1])
        assert_near(got.detach(), weights @ v)
        assert torch.equal(*(generator.get_state() for generator in generators))


TORCHS = {  # cases without a key that use torch's own function: tensors and arguments
    "nothing dropped": (lambda: tensors(), {"dropout_p": 0.0}),
    "nothing dropped, causal": (lambda: tensors(dtype=HALF), {"dropout_p": 0.0, "is_causal": True}),
    "nothing dropped, mask": (lambda: tensors(), {"dropout_p": 0.0, "attn_mask": mask_of("boolean", (5, 9))}),
    "nothing dropped, groups": (lambda: tensors(H=4, Hkv=2), {"dropout_p": 0.0, "enable_gqa": True, "scale": 0.3}),
    "float64": (lambda: tensors(dtype=torch.float64), {"dropout_p": P}),
    "float64, causal": (lambda: tensors(dtype=torch.float64), {"dropout_p": P, "is_causal": True, "scale": 2.0}),
}


@pytest.mark.parametrize("torchs", TORCHS.values(), ids=TORCHS)
def test_torchs_own(torchs):
    """Torch's bits, also for gradients, and torch's use of its generator."""
    make, options = torchs
    found = []
    for call in (fd.scaled_dot_product_attention, F.scaled_dot_product_attention):
        torch.manual_seed(3)
        y, gradients = run(call, make(), **options)
        found.append((y, *gradients, torch.get_rng_state()))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_nothing_dropped_with_a_key_or_generator():
    generator, of = torch.Generator().manual_seed(8), tensors()
    before, want = generator.get_state(), F.scaled_dot_product_attention(*of)
    assert torch.equal(fd.scaled_dot_product_attention(*of, generator=generator), want)
    assert torch.equal(fd.scaled_dot_product_attention(*of, dropout_key=KEY), want)
    assert torch.equal(generator.get_state(), before)


def test_arguments_have_torchs_order():
    q, k, v = tensors()
    mask = mask_of("boolean", (5, 9))
    got = fd.scaled_dot_product_attention(q, k, v, mask, P, False, scale=0.4, enable_gqa=False, dropout_key=KEY)
    assert_near(got, theirs(q, k, v, mask, scale=0.4))
    named = fd.scaled_dot_product_attention(value=v, key=k, query=q, is_causal=True, dropout_p=P, dropout_key=KEY)
    assert_near(named, theirs(q, k, v, is_causal=True))
    with pytest.raises(TypeError):
        fd.scaled_dot_product_attention(q, k, v, None, P, False, 0.4)


q, k, v = tensors()
ERRORS = {
    "mask and causal": ((q, k, v), {"attn_mask": torch.ones(5, 9, dtype=torch.bool), "is_causal": True}),
    "features": ((q, k[..., 1:], v), {}),
    "keys and values": ((q, k, v[:, :, 1:]), {}),
    "batch": ((q, k.repeat(2, 1, 1, 1)[1:], v.repeat(2, 1, 1, 1)[1:]), {}),
    "heads": ((q.repeat(1, 2, 1, 1), k, v), {}),
    "groups": ((q, k[:, 1:], v[:, 1:]), {"enable_gqa": True}),
    "one dimension": ((q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), {}),
    "shape of the mask": ((q, k, v), {"attn_mask": torch.ones(5, 8, dtype=torch.bool)}),
    "larger mask": ((q[:1], k[:1], v[:1]), {"attn_mask": torch.zeros(2, 3, 5, 9)}),
    "dimensions of the mask": ((q, k, v), {"attn_mask": torch.zeros(2, 2, 3, 5, 9)}),
    "mask of integers": ((q, k, v), {"attn_mask": torch.ones(5, 9, dtype=torch.int64)}),
    "mask of float64": ((q, k, v), {"attn_mask": torch.ones(5, 9, dtype=torch.float64)}),
    "mask of another half": ((q.to(HALF), k.to(HALF), v.to(HALF)), {"attn_mask": torch.ones(5, 9, dtype=SHORT)}),
    "dtype of the key": ((q, k.to(HALF), v), {}),
    "dtype of the value": ((q, k, v.double()), {}),
    "integers": ((q.int(), k.int(), v.int()), {}),
}
del q, k, v


@pytest.mark.parametrize("source", ["default", "key"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_torchs_errors(error, source):
    of, options = error
    with pytest.raises((RuntimeError, TypeError)) as raised:
        F.scaled_dot_product_attention(*of, dropout_p=P, **options)
    with pytest.raises(
        (raised.type, TypeError) if source == "key" else raised.type
    ):  # TypeError: as fd.dropout with a key
        fd.scaled_dot_product_attention(
            *of, dropout_p=P, **options, **({} if source == "default" else {"dropout_key": KEY})
        )


def test_wrong_probability_or_key(dtype):
    of = tensors(dtype=dtype)
    for p in (-0.1, 1.5, math.nan):
        for given in ({}, {"dropout_key": KEY}):
            with pytest.raises(RuntimeError if math.isnan(p) else ValueError, match="between 0 and 1"):
                fd.scaled_dot_product_attention(*of, dropout_p=p, **given)
    wrong = [{"key": torch.zeros(3, dtype=torch.uint64)}, {"key": torch.zeros(2)}, {"key": 3}]
    for given in (*wrong, {"key": KEY, "generator": torch.Generator()}):
        with pytest.raises((ValueError, TypeError)) as raised:
            fd.dropout(of[0], P, **given)
        with pytest.raises(raised.type, match="key"):
            fd.scaled_dot_product_attention(
                *of, dropout_p=P, dropout_key=given["key"], generator=given.get("generator")
            )


# ----------------------------------------------------------------------------------------------------------- autograd


def saved(call, *tensors, **options):
    """The tensors that autograd saves."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        y = call(*tensors, **options)
    return found, y


SAVING = {
    "plain": (4, {}),
    "causal": (4, {"is_causal": True}),
    "mask": (4, {"attn_mask": torch.ones(40, 50, dtype=torch.bool)}),
    "padding": (4, {"attn_mask": torch.zeros(2, 1, 1, 50).expand(2, 4, 40, 50)}),
    "groups": (2, {"enable_gqa": True}),
}


@for_fused_dtypes
@pytest.mark.parametrize("source", ["default", "key"])
@pytest.mark.parametrize("saving", SAVING.values(), ids=SAVING)
def test_saves_two_numbers_a_row_and_the_key(saving, source, dtype):
    """Saved in addition to inputs and result."""
    Hkv, options = saving
    of = [t.requires_grad_() for t in tensors(2, 4, 40, 50, Hkv=Hkv, dtype=dtype)]
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options = {"attn_mask": options["attn_mask"].to(dtype)}
    found, y = saved(partial(ours, key=KEY if source == "key" else None), *of, **options)
    there = {t.data_ptr() for t in (*of, y, *options.values()) if isinstance(t, torch.Tensor)}
    assert {t.data_ptr() for t in (*of, y)} <= {t.data_ptr() for t in found}
    fresh = [t for t in found if t.data_ptr() not in there]
    assert sum(t.numel() for t in fresh if t.dtype == SINGLE) == 2 * 2 * 4 * 40
    assert [t.nbytes for t in fresh if t.dtype != SINGLE] == [16]
    storages = {t.data_ptr(): t.nbytes() for t in (t.untyped_storage() for t in fresh)}
    assert sum(storages.values()) == 8 * 2 * 4 * 40 + 16


@pytest.mark.parametrize("place", ["query", "key", "value", "result"])
def test_changed_in_place(place):
    of = [t.requires_grad_() for t in tensors()]
    owned = [t * 1 for t in of]
    y = ours(*owned)
    {"query": owned[0], "key": owned[1], "value": owned[2], "result": y}[place].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_key_that_is_changed_later():
    found = []
    for changed in (False, True):
        key = KEY.clone()
        leaves = [t.requires_grad_() for t in tensors()]
        y = ours(*leaves, key=key)
        if changed:
            key.fill_(5)
        found.append(torch.autograd.grad(y, leaves, gradient_for(y)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@for_fused_dtypes
def test_a_second_backward_pass(dtype):
    leaves = [t.requires_grad_() for t in tensors(dtype=dtype)]
    y = ours(*leaves)
    first, second = (torch.autograd.grad(y, leaves, gradient_for(y), retain_graph=True) for _ in range(2))
    for got, want in zip(first, second, strict=True):
        assert torch.equal(got, want)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_gradients_are_added():
    """One leaf is query, key and value, and is used twice."""
    x = tensors()[0].requires_grad_()
    (ours(x, x, x) + ours(x, x, x, is_causal=True)).square().sum().backward()
    z = x.detach().clone().requires_grad_()
    (theirs(z, z, z) + theirs(z, z, z, is_causal=True)).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@for_fused_dtypes
def test_checkpoint(dtype, reentrant):
    """The result and gradients of the plain call: recomputation draws the same key."""
    found = []
    for call in (partial(ours, key=None), partial(ours, key=None)):
        if found:
            call = partial(checkpoint, call, use_reentrant=reentrant)
        leaves = [t.requires_grad_() for t in tensors(dtype=dtype)]
        torch.manual_seed(2)
        y = call(*leaves)
        y.backward(gradient_for(y))
        found.append([y.detach(), *(t.grad for t in leaves)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_gradient_of_the_finite_differences():
    """In float64 with the composition, and with masked rows."""
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2] = False
    of = [t.requires_grad_() for t in tensors(1, 2, 4, 5, 3, dtype=torch.float64)]
    for options in ({}, {"attn_mask": mask}, {"is_causal": True}):
        assert torch.autograd.gradcheck(lambda *t, options=options: ours(*t, **options), of, fast_mode=True)


# ------------------------------------------------------------------------------------------------ patch and attention


@pytest.fixture
def patched():
    """Torch's function from before the patch."""
    before = F.scaled_dot_product_attention
    fd.patch()
    yield before
    fd.unpatch()
    assert F.scaled_dot_product_attention is before


def test_patch(patched):
    assert F.scaled_dot_product_attention.func is fd.scaled_dot_product_attention
    assert torch.equal(F.scaled_dot_product_attention(*tensors()), patched(*tensors()))
    fd.patch()
    fd.unpatch()
    assert F.scaled_dot_product_attention is patched
    with fd.patched():
        assert F.scaled_dot_product_attention.func is fd.scaled_dot_product_attention
    assert F.scaled_dot_product_attention is patched


def by_hand(attention, x, **options):
    """``nn.MultiheadAttention`` with x as query, key and value, batch first, in separate operations."""
    heads = attention.num_heads
    q, k, v = (
        t.unflatten(-1, (heads, -1)).transpose(1, 2)
        for t in F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    )
    y = composed(q, k, v, dropout_p=attention.dropout, **options)
    return attention.out_proj(y.permute(2, 0, 1, 3).flatten(-2)).transpose(0, 1)  # torch's layout, for the next dropout


SEEN = {
    "everything": ({}, {}),
    "causal": (
        {"attn_mask": nn.Transformer.generate_square_subsequent_mask(7), "is_causal": True},
        {"is_causal": True},
    ),
    "padding": (
        {"key_padding_mask": torch.arange(7) >= torch.tensor([[5], [7]])},
        {"attn_mask": (torch.arange(7) < torch.tensor([[5], [7]]))[:, None, None]},
    ),
    "additive": (
        {"attn_mask": torch.linspace(-1, 1, 49).view(7, 7)},
        {"attn_mask": torch.linspace(-1, 1, 49).view(7, 7)},
    ),
}


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_multihead_attention(patched, seen):
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(24, 3, dropout=P, batch_first=True)
    found, x = [], torch.randn(2, 7, 24)
    for call in (
        lambda x: attention(x, x, x, need_weights=False, **seen[0])[0],
        lambda x: by_hand(attention, x, **seen[1]),
    ):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        y = call(leaf)
        found.append((y, *torch.autograd.grad(y, [leaf, *attention.parameters()], gradient_for(y)), torch.rand(1)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    attention.eval()
    got, _ = attention(x, x, x, need_weights=False, **seen[0])
    attention.dropout = 0.0
    torch.testing.assert_close(got, by_hand(attention, x, **seen[1]))


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(patched, norm_first):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(24, 3, 40, dropout=P, batch_first=True, norm_first=norm_first)
    x, found = torch.randn(2, 7, 24), []

    def attends(x):
        return fd.dropout(by_hand(layer.self_attn, x), P)

    def feeds(x):
        return fd.dropout(layer.linear2(fd.dropout(layer.linear1(x).relu(), P)), P)

    def separate(x):
        if norm_first:
            x = x + attends(layer.norm1(x))
            return x + feeds(layer.norm2(x))
        x = layer.norm1(x + attends(x))
        return layer.norm2(x + feeds(x))

    for call in (layer, separate):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        y = call(leaf)
        found.append((y, *torch.autograd.grad(y, [leaf, *layer.parameters()], gradient_for(y))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


RELATED = {
    "one tensor": lambda x, m: (x, x, x),
    "keys and values": lambda x, m: (x, m, m),
    "one of another": lambda x, m: (x, 2 * x, x.sin()),
    "siblings": lambda x, m: ((x + m).cos(), x + m, x * m),
}


@pytest.mark.parametrize("shape", [(2, 5, 4), (1, 2, 5, 4)], ids=str)
@pytest.mark.parametrize("related", RELATED)
def test_inputs_that_are_made_of_each_other(related, shape):
    """Each path counts once: in gradients with and without create_graph, and in the second derivative."""
    x, m = (torch.randn(shape, requires_grad=True) for _ in range(2))

    def derivatives(attention):
        y = attention(*RELATED[related](x, m)).square().sum() + m.sum()
        plain = torch.autograd.grad(y, (x, m), retain_graph=True)
        first = torch.autograd.grad(y, (x, m), create_graph=True)
        return [*plain, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, m), allow_unused=True)]

    def composed_here(q, k, v):
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return fd.dropout(weights, P, key=KEY) @ v

    got = derivatives(lambda *of: fd.scaled_dot_product_attention(*of, dropout_p=P, dropout_key=KEY))
    for a, b in zip(got, derivatives(composed_here), strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
