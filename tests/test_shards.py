"""``shard=``: a part of a larger tensor is dropped as in the whole tensor.

The expected result is the part's slice of the same function's result on the whole contiguous tensor. For tensors that
are too large it comes from contract.py.
"""

import re
from functools import partial

import contract
import pytest
import torch
from helpers import DTYPES, assert_same, key_tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, jvp, vmap

import fused_dropout as fd

SEED, OFFSET, P = 0x1234_5678_9ABC_DEF0, 77, 0.4
KEY = key_tensor(SEED, OFFSET)
WHOLE = (24, 8, 21, 3, 2)  # rows of 21 elements begin at each place of a block of eight
PARTS = {  # begin and shape of the part; a function of r dimensions uses the first r entries
    "block": ([3, 1, 2, 1, 0], (11, 6, 17, 2, 1)),
    "one row": ((17, 0, 0, 0, 0), (1, 8, 21, 3, 2)),
    "one run": (((5,), [2], 0, 0, 0), (8, 6, 21, 3, 2)),
    "zigzag": (((4, 16), 0, 0, 0, 0), (8, 8, 21, 3, 2)),
    "no order": (([17, 2, 6], 3, 1, 0, 0), (12, 5, 20, 3, 2)),
    "runs of one": (((3, 20, 7, 6), (7, 0, 2), 0, 0, 0), (4, 3, 21, 3, 2)),
    "runs everywhere": (((20, 1), (0, 5), (15, 0, 8), (2, 0), (1, 0)), (8, 6, 15, 2, 2)),
    "empty": ((24, 0, 0, 0, 0), (0, 8, 21, 3, 2)),
    "empty inside": ((5, 3, 0, 0, 0), (9, 0, 21, 3, 2)),
    "empty runs": (((3, 9), 1, 0, 0, 0), (0, 6, 21, 3, 2)),
}


def coordinates(begins, size):
    """The positions of a part along one dimension of the whole."""
    begins = [begins] if isinstance(begins, int) else begins
    return torch.cat([torch.arange(begin, begin + size // len(begins)) for begin in begins])


def add_with_bias(x, *args, **options):
    """dropout_add with a bias. Column i of the whole has the bias i."""
    begins = options["shard"][1][-1] if "shard" in options else 0
    return fd.dropout_add(x, x.clone(), *args, bias=coordinates(begins, x.shape[-1]).to(x), **options)


CALLS = {  # number of dimensions, and a function of (x, p, training)
    "dropout": (3, fd.dropout),
    "noise_shape": (3, partial(fd.dropout, noise_shape=(24, 1, None))),
    "dropout_add": (3, lambda x, *args, **options: fd.dropout_add(x, x.clone(), *args, **options)),
    "alpha_dropout": (3, fd.alpha_dropout),
    "dropout1d": (3, fd.dropout1d),
    "dropout1d unbatched": (2, fd.dropout1d),
    "dropout2d": (4, fd.dropout2d),
    "dropout3d": (5, fd.dropout3d),
    "dropout3d unbatched": (4, fd.dropout3d),
    "feature_alpha_dropout": (4, fd.feature_alpha_dropout),
    "drop_path": (3, fd.drop_path),
    "drop_path unscaled": (3, partial(fd.drop_path, scale_by_keep=False)),
}
VARIANTS = {"bias": (3, add_with_bias), "bias, noise": (3, partial(add_with_bias, noise_shape=(24, 1, 1)))}
for noise in ((24, 1, 1), (1, 8, None), (None, 1), (21,), (), (1, 1, 1)):
    VARIANTS[f"noise_shape {noise}"] = 3, partial(fd.dropout, noise_shape=noise)
LAYOUTS = {
    "contiguous": torch.clone,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda x: torch.stack((x, x), -1)[..., 1],
    "sliced and transposed": lambda x: torch.cat((x, x), 0).transpose(0, -1).contiguous().transpose(0, -1)[: len(x)],
}
for_parts = pytest.mark.parametrize("part", PARTS)
for_few_parts = pytest.mark.parametrize("part", ["block", "zigzag", "no order", "runs everywhere", "empty"])
for_calls = pytest.mark.parametrize(("rank", "function"), CALLS.values(), ids=CALLS)
for_few_calls = pytest.mark.parametrize("function", [function for _, function in CALLS.values()][:4], ids=[*CALLS][:4])
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)  # zeros may have either sign


def check(run, part, rank, same=assert_same, **to):
    """Compares run on the whole with run on the part.

    run(x, gradient) returns tensors of x's shape, and a value that is the same for all parts.
    """
    shape, offsets, of_part = (entries[:rank] for entries in (WHOLE, *PARTS[part]))
    index = torch.meshgrid(*map(coordinates, offsets, of_part), indexing="ij")
    both = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    both.view(-1)[::29], both.view(-1)[::31], both.view(-1)[::37] = torch.nan, torch.inf, -0.0
    x, gradient = both.to(**to)
    (want, then), (got, own_then) = run(x, gradient), run(x[index], gradient[index], shard=(shape, offsets))
    for a, b in zip(got, want, strict=True):
        same(a.detach(), b.detach()[index].cpu())
    assert own_then == then


def outcome(function, x, gradient, source="key", **options):
    """Returns the result and the gradient, and then the next number of each of the two generators."""
    torch.manual_seed(5)
    generator = torch.Generator(x.device).manual_seed(6)
    options |= {"key": {"key": KEY}, "generator": {"generator": generator}, "default": {}}[source]
    x = x.detach().requires_grad_()
    y = function(x, P, True, **options)
    then = [torch.rand(1, device=x.device, generator=g).item() for g in (None, generator)]
    return (y, *torch.autograd.grad(y, x, gradient)), then


@pytest.mark.parametrize(("rank", "function"), (CALLS | VARIANTS).values(), ids=CALLS | VARIANTS)
@for_parts
def test_is_the_part_of_the_whole(rank, function, part, device):
    """With a key and with generators. All parts, also empty ones, leave a generator in the same state."""
    for dtype, source in zip(DTYPES, ("key", "default", "generator", "key"), strict=True):
        check(partial(outcome, function, source=source), part, rank, dtype=dtype, device=device)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@for_few_parts
@for_few_calls
def test_layouts_and_in_place(function, part, layout, inplace):
    def in_layout(leaf, *args, **options):
        x = layout(leaf * 1)
        memory = torch.empty(0).set_(x.detach().untyped_storage())
        before = memory.clone()
        y = function(x, *args, inplace=inplace, **options)
        assert y is x or not inplace
        assert y.stride() == (x if inplace else torch.empty_like(x)).stride() or not len(x)
        before.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x.detach())
        assert_same(memory, before)  # nothing is written beside the part
        return y

    check(lambda x, t, **s: outcome(in_layout if s else function, x, layout(t) if s else t, **s), part, 3, assert_equal)


TRANSFORMS = {
    "double backward": lambda f, x, t: [torch.autograd.functional.vhp(lambda x: (f(x) ** 2).sum(), x, t)[1]],
    "jvp": lambda f, x, t: jvp(f, (x,), (t,)),
    "vmap of grad": lambda f, x, t: vmap(grad(lambda x: (f(x) ** 2).sum()))(torch.stack((x, t))),
    "vmap of keys": lambda f, x, t: vmap(lambda key: f(x, key=key))(fd.split(KEY, 3)),
    "vmap with one key": lambda f, x, t: vmap(partial(f, key=None), -1, randomness="same")(torch.stack((x, t), -1)),
    "vmap with own keys": lambda f, x, t: vmap(partial(f, key=None), randomness="different")(torch.stack((x, t))),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@for_few_parts
@for_few_calls
def test_transforms(function, part, transform):
    def run(x, t, **shard):
        torch.manual_seed(8)
        return [*transform(lambda x, key=KEY: function(x, P, True, key=key, **shard), x, t)], torch.rand(1)

    check(run, part, 3, assert_equal)


@for_parts
def test_keep_mask(part):
    def masks(x, _, **shard):
        inputs = (x.shape, list(x.shape), *(layout(x) for layout in LAYOUTS.values())) if shard else [WHOLE[:4]] * 6
        cases = ((P, 0), (P, 2**40 + 3), (0, 5), (1, 5))
        return [fd.keep_mask(like, p, KEY, start=start, **shard) for like in inputs for p, start in cases], None

    check(masks, part, 4, assert_equal)


HUGE = [  # global shape, offsets, shape, noise_shape
    ((5, 2**20, 2**13 + 1), (2, 2**19 + 5, 2**12 + 3), (2, 2, 37), (5, 2**20, 2**13 + 1)),
    ((2**33 + 5,), ((2**33 - 27, 2**32 - 9, 7),), (96,), (2**33 + 5,)),
    ((2**31, 2**31 + 1), ((2**31 - 3, 2**30), (5, 2**31 - 11)), (4, 24), (2**31, 2**31 + 1)),
    ((2**25, 7, 2**31 - 1), (2**25 - 9, 3, 2**31 - 9), (8, 4, 8), (2**25, 1, 2**31 - 1)),
]


@pytest.mark.parametrize(("whole", "offsets", "shape", "noise_shape"), HUGE, ids=str)
def test_more_than_2_to_the_32_elements(whole, offsets, shape, noise_shape, device):
    places = torch.meshgrid(*map(coordinates, offsets, shape), indexing="ij")
    strides = torch.empty(noise_shape, dtype=torch.bool, device="meta").expand(whole).stride()
    index = sum(place * stride for place, stride in zip(places, strides, strict=True))
    want = torch.tensor([contract.keep(SEED, OFFSET, i, P) for i in index.flatten().tolist()]).view(shape)
    x = torch.ones(shape, device=device, requires_grad=True)
    y = fd.dropout(x, P, key=KEY, noise_shape=noise_shape, shard=(whole, offsets))
    y.sum().backward()
    assert torch.equal(y.cpu() != 0, want)
    assert torch.equal(x.grad.cpu() != 0, want)


@for_calls
def test_draws_nothing(rank, function):
    """No key is drawn if the whole is empty, if p is 0 or 1, or if training is False."""
    state = torch.get_rng_state()
    for whole, p, training in (((24, 0, 21), P, True), (WHOLE, 0.0, True), (WHOLE, 1.0, True), (WHOLE, P, False)):
        shape, offsets = (*whole, *WHOLE)[:rank], (7, 0, 0, 0, 0)[:rank]
        x, x_whole = torch.full((9, *shape[1:]), 2.0), torch.full(shape, 2.0)
        y, want = function(x, p, training, shard=(shape, offsets)), function(x_whole, p, training, key=KEY)
        assert torch.equal(y, want[7:16])
        assert (y is x) == (want is x_whole)
    assert torch.equal(torch.get_rng_state(), state)


@for_calls
def test_saves_the_key_and_nothing_else(rank, function):
    saved, (offsets, shape) = [], PARTS["one run"]
    x = torch.ones(shape[:rank], requires_grad=True)
    with saved_tensors_hooks(lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t):
        for options in ({}, {"key": KEY}):
            function(x, P, True, shard=(WHOLE[:rank], offsets[:rank]), **options)
    assert saved == [16, 16]


@pytest.mark.same_without("_eager")
@pytest.mark.parametrize("parts", [["block", "no order"], ["empty"]], ids=str)
def test_compile(parts):
    def chain(x, p, training, **shard):
        x = fd.dropout_add(fd.dropout(x, p, **shard), x, p, key=KEY, **shard)
        return fd.dropout(fd.alpha_dropout(x, p, True, **shard), p, noise_shape=(24, 1, None), **shard)

    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    for part in parts:
        check(lambda x, t, **s: outcome(compiled if s else chain, x, t, "default", **s), part, 3, assert_equal)


# Shards of a part of shape (3, 4)
VALUE_ERRORS = [((6,), (5, 0)), ((6, 8), (5,)), ((6, 8), (0, 0, 7)), ((6, 8, 9), (0, 0, 7)), ((2, 8), (0, 0))]
VALUE_ERRORS += [((6, 8), a) for a in ((4, 0), (0, 5), (-1, 0), (0, (1, 7)), (0, (-2, 4)))]  # outside
VALUE_ERRORS += [((6, 8), a) for a in ((0, (4, 5)), (0, (5, 4)), ((1, 3, 1), 0), (0, (2, 2)))]  # overlap
VALUE_ERRORS += [((6, 8), ((0, 3), 0)), ((6, 8), (0, (0, 2, 4)))]  # runs of unequal length
TYPE_ERRORS = [7, "ab", ((6, 8),), ((6, 8), (0, 0), 1), (6, 8), ((6, 8), 0), (6, (0, 0)), ((6.0, 8), (0, 0))]
TYPE_ERRORS += [((6, 8), a) for a in ((0, 0.5), (0, None), ("0", 0), (0, (0, 1.5)), (0, ((0,),)))]


@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "dropout1d", "drop_path", "dropout_add"])
def test_wrong_shards(name):
    drawn = partial(CALLS[name][1], torch.ones(3, 4), P, True)
    for call in (drawn, partial(drawn, key=KEY), partial(fd.keep_mask, (3, 4), P, KEY)):
        for shard in VALUE_ERRORS:
            largest = max(map(int, re.findall(r"\d+", str(shard[1]))))
            with pytest.raises(ValueError, match=rf"shard.*\b{largest}\b"):
                call(shard=shard)
        for shard in TYPE_ERRORS:
            with pytest.raises(TypeError, match=re.escape(str(shard))):
                call(shard=shard)


@for_calls
def test_refuses(rank, function):
    """TypeError for tensors that are not fused and under torch.export; ValueError for a key with a generator."""
    x, call = torch.ones(WHOLE[:rank]), partial(function, shard=(WHOLE[:rank], [0] * rank))
    for other in (x.long(), x.bool(), x.to(torch.complex64), x.to(torch.float8_e4m3fn), x.to_sparse(), x.to("meta")):
        for options in ({}, {"key": KEY}):
            with pytest.raises(TypeError, match=str(other.dtype)):
                call(other, P, True, **options)
    with pytest.raises(ValueError, match="generator"):
        call(x, P, True, key=KEY, generator=torch.Generator())
    module = torch.nn.Module()
    module.forward = lambda x: call(x, P, True)
    for inputs in ((x,), (x.long(),)):
        with pytest.raises(TypeError, match="shard"):
            torch.export.export(module, inputs, strict=False)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_once_for_all_offsets(dynamic):
    """For example, each micro-batch has another offset."""
    torch._dynamo.reset()
    graphs, whole = [], torch.randn(64, 6)

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def function(x, first):
        return fd.dropout(x, P, key=KEY, shard=((64, 6), (first, 0)))

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    for first in (8, 0, 16, 24, 32, 1, 3, 5, 7, 40):
        assert torch.equal(compiled(whole[first : first + 8], first), fd.dropout(whole, P, key=KEY)[first : first + 8])
    assert len(graphs) <= 3, "Dynamo specialises the offset 0"


@pytest.mark.parametrize("begins", [(0, 3, 9, 20), (20, 0, 7, 40)])
def test_in_place_on_memory_that_runs_share(begins):
    with pytest.raises(RuntimeError, match="single memory location"):
        fd.dropout(torch.ones(1, 6).expand(4, 6), P, inplace=True, key=KEY, shard=((64, 6), (begins, 0)))


def test_in_place_on_a_part_without_elements():
    """Such a part may have strides of 0. Nothing is written, so nothing is refused, as in torch."""
    x = torch.empty_strided((7, 0, 3), (0, 1, 0))
    assert fd.dropout(x, 0.5, inplace=True, key=KEY, shard=((8, 2, 3), (1, 2, 0))) is x
