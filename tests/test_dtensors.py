"""DTensors in two and four processes have the masks and gradients of one process, bit for bit."""

import contextlib
import copy
import functools
import itertools
import warnings

import parallel_training
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from workers import workers_of

import fused_dropout as fd
from fused_dropout import distributed, windows
from fused_dropout.reference import row_major

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
SHAPES = [(16,), (8, 6), (7, 5), (3, 9), (1, 8), (4, 3, 5), (2, 3, 4, 5)]
KEY = fd.key(3)


two = workers_of(__name__, world=2)
four = workers_of(__name__, world=4, timeout=180)  # Inductor compiles in each process


@functools.cache
def mesh_of(shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape)


def distributed_as(whole, mesh, placements):
    """Places the tensor on the mesh. All ranks have the same tensor, so nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def placements_of(dims, mesh_dims):
    """All placements to test for a tensor with this number of dimensions."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    own = [Replicate(), *map(Shard, range(dims))]
    if mesh_dims == 1:
        return [[p] for p in (*own, Partial("sum"), Partial("avg"))]
    pairs = [list(pair) for pair in itertools.product(own, own)]
    strided = [[_StridedShard(d, split_factor=2), Shard(d)] for d in range(dims)]
    return [*pairs, *strided, [Partial("sum"), Shard(dims - 1)], [Shard(0), Partial("sum")]]


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1),
    "sliced": lambda x: x[..., 1:-1],
}


def differs(mesh, shape, placements, dtype, layout, p=0.5):
    """Compares one case with one process, bit for bit. Returns the names of the results that differ."""
    from torch.distributed.tensor import Replicate, Shard

    # Small integers: sums over ranks are then exact.
    base = torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = LAYOUTS[layout](base).detach().requires_grad_()
    x = LAYOUTS[layout](distributed_as(base, mesh, placements)).detach().requires_grad_()
    want, y = fd.dropout(whole, p, key=KEY), fd.dropout(x, p, key=KEY)
    wrong = [] if y.placements == x.placements else ["placements"]
    wrong += [] if torch.equal(y.full_tensor(), want) else ["value"]
    wrong += [] if (y.stride(), y.dtype) == (want.stride(), want.dtype) else ["layout"]
    cotangent = torch.randint(1, 9, want.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (due,) = torch.autograd.grad(want, whole, cotangent)
    for arriving in ([Replicate()] * mesh.ndim, [Shard(want.dim() - 1), *[Replicate()] * (mesh.ndim - 1)]):
        (got,) = torch.autograd.grad(y, x, distributed_as(cotangent, mesh, arriving), retain_graph=True)
        wrong += [] if torch.equal(got.full_tensor(), due) else ["gradient"]
    return wrong


def cases(mesh_dims, how_many):
    """all: each dtype in each layout. many: float32 in each layout, others contiguous. few: float32, contiguous."""
    kinds = list(itertools.product((torch.float32, torch.bfloat16, torch.float16), LAYOUTS))
    kinds = {"few": kinds[:1], "many": [*kinds[:4], kinds[6]], "all": kinds}[how_many]
    for shape in SHAPES[1:6:4] if how_many == "few" else SHAPES:
        for placements in placements_of(len(shape), mesh_dims):
            strided = any(type(own).__name__ == "_StridedShard" for own in placements)
            for dtype, layout in kinds:
                if strided and layout == "sliced":
                    continue  # torch 2.11 cannot slice it
                yield shape, placements, dtype, layout


@contextlib.contextmanager
def planted(fault):
    """Plants a fault in the numbering of a shard."""
    runs_of, window = distributed._runs_of, windows.window
    if fault == "the offset is ignored":
        distributed._runs_of = lambda *a: [[(0, sum(n for _, n in own))] for own in runs_of(*a)]
    elif fault == "the pitch is the local width":
        windows.window = lambda runs, start, _: window(runs, start, row_major([sum(n for _, n in own) for own in runs]))
    elif fault == "dimensions are exchanged":
        windows.window = lambda runs, start, strides: window(runs, start, strides[::-1])
    distributed._plans.clear()
    try:
        yield
    finally:
        distributed._runs_of, windows.window = runs_of, window
        distributed._plans.clear()


def matrix(rank, mesh_shape, how_many, fault=None):
    mesh, bad, n = mesh_of(mesh_shape), [], 0
    with planted(fault):
        for case in cases(mesh.ndim, how_many):
            wrong = differs(mesh, *case)
            n += 1
            bad += [(*map(str, case), wrong)] if wrong else []
    return n, bad[:5], len(bad)


@pytest.mark.parametrize("mesh", [(2,), (4,), (2, 2)])
def test_masks_and_gradients_are_those_of_one_process(request, mesh):
    workers = request.getfixturevalue("two" if mesh == (2,) else "four")
    every_cell = request.config.getoption("--every-cell")
    if mesh == (4,) and not every_cell:
        pytest.skip("shown by the others; make test-sharded runs it")
    for n, bad, count in workers(matrix, mesh, "all" if every_cell else "many"):
        assert count == 0, bad
        assert n > (500 if mesh == (2, 2) else 150)


@pytest.mark.parametrize("fault", ["the offset is ignored", "the pitch is the local width", "dimensions are exchanged"])
def test_the_comparison_finds_planted_faults(four, fault):
    assert max(count for _, _, count in four(matrix, (4,), "few", fault)) > 0


X = torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(1))


def placed(*placements, x=X, mesh=(2, 2)):
    return distributed_as(x, mesh_of(mesh), list(placements))


def sharded(x=X):
    from torch.distributed.tensor import Shard

    return placed(Shard(0), Shard(1), x=x)


def family():
    k = {"key": KEY}
    square = torch.randn(5, 5, generator=torch.Generator().manual_seed(4))
    yield "dropout2d", lambda x: fd.dropout2d(x, 0.3, **k)
    yield "dropout1d", lambda x: fd.dropout1d(x, 0.3, **k)
    yield "dropout3d", lambda x: fd.dropout3d(x.unsqueeze(1), 0.3, **k)
    yield "alpha_dropout", lambda x: fd.alpha_dropout(x, 0.3, True, **k)
    yield "feature_alpha_dropout", lambda x: fd.feature_alpha_dropout(x, 0.3, True, **k)
    yield "drop_path", lambda x: fd.drop_path(x, 0.3, True, **k)
    yield "noise_shape", lambda x: fd.dropout(x, 0.3, noise_shape=(8, 1, 5), **k)
    yield "keep_mask", lambda x: fd.keep_mask(x, 0.3, KEY)
    yield "module", fd.Dropout(0.3, key=KEY)
    yield "p = 1", lambda x: fd.dropout(x, 1.0)
    yield "float64", lambda x: fd.dropout(x.double(), 0.3, **k)
    yield "in place", lambda x: fd.dropout(x.clone(), 0.3, inplace=True, **k)
    yield "relu_dropout", lambda x: fd.relu_dropout(x, 0.3, **k)
    yield "dropout_add", lambda x: fd.dropout_add(x, 2 * x, 0.3, **k)
    yield "dropout_add, in place", lambda x: fd.dropout_add(x.clone(), 2 * x, 0.3, inplace=True, **k)
    yield "dropout_linear", lambda x: fd.dropout_linear(x.sum(1), distributed.beside(x, square), p=0.3, **k)
    yield "attention", lambda x: fd.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3, dropout_p=0.3, dropout_key=KEY)


def functions(rank):
    bad = []
    for name, function in family():
        x, whole = sharded().requires_grad_(), X.clone().requires_grad_()
        with torch.inference_mode():
            inferred = function(X)
        y, want = function(x), function(whole)
        equal = torch.allclose if name in ("dropout_linear", "attention") else torch.equal
        bad += [] if equal(y.full_tensor(), want) and equal(want, inferred) else [name]
        if want.requires_grad:
            y.square().sum().backward()
            want.square().sum().backward()
            bad += [] if torch.allclose(x.grad.full_tensor(), whole.grad, atol=1e-5) else [f"{name}, gradient"]
        with torch.inference_mode():
            bad += [] if equal(function(sharded()).full_tensor(), inferred) else [f"{name}, inference mode"]
    return bad


def test_the_family_and_its_neighbours(four):
    assert four(functions) == [[]] * 4


def ways(rank):
    """nn.Dropout under patch and after convert. All ranks have the same seed, so nothing warns."""
    torch.manual_seed(5)
    want = fd.dropout(X, 0.3), fd.dropout1d(X, 0.4)
    model = nn.Sequential(nn.Dropout(0.3), nn.Dropout1d(0.4))
    got = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way in ("patch", "convert"):
            torch.manual_seed(5)
            with fd.patched() if way == "patch" else contextlib.nullcontext():
                layers = model if way == "patch" else fd.convert(copy.deepcopy(model))
                got.append([layer(sharded()).full_tensor() for layer in layers])
    return [torch.equal(a, b) for pair in got for a, b in zip(pair, want, strict=True)], torch.rand(1).item()


def test_patch_and_convert(four):
    results = four(ways)
    assert [same for same, _ in results] == [[True] * 4] * 4
    assert len({drawn for _, drawn in results}) == 1


def placements_that_reduce(rank):
    from torch.distributed.tensor import DTensor, Partial

    local = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))
    found = {}
    for kind in ("sum", "avg", "max", "min", "product"):
        x = DTensor.from_local(local, mesh_of((2, 2)), [Partial(kind), Partial(kind)])
        y = fd.dropout(x, 0.5, key=KEY)
        torch.testing.assert_close(y.full_tensor(), fd.dropout(x.full_tensor(), 0.5, key=KEY))
        try:
            kept = fd.dropout(x, 0.5, inplace=True, key=KEY) is x
        except RuntimeError as error:
            kept = "reduced first" in str(error) and "an error"
        found[kind] = all(own.is_partial() for own in y.placements), kept
    return found


def test_partial_sums_stay_and_others_are_reduced(four):
    for found in four(placements_that_reduce):
        assert {kind for kind, (stays, _) in found.items() if stays} == {"sum", "avg"}
        assert all(kept is True if stays else kept == "an error" for stays, kept in found.values())


def in_place(rank):
    x = sharded().requires_grad_()
    m = x * 1
    y = fd.dropout(m, 0.3, inplace=True, key=KEY)
    y.sum().backward()
    gradient = torch.equal(x.grad.full_tensor(), fd.dropout(torch.ones_like(X), 0.3, key=KEY))
    errors = []
    saved = torch.sigmoid(sharded().requires_grad_())
    fd.dropout(saved.detach(), 0.3, inplace=True, key=KEY)
    for act in (lambda: saved.sum().backward(), lambda: fd.dropout(x, 0.3, inplace=True, key=KEY)):
        try:
            act()
        except RuntimeError as error:
            errors.append(str(error)[:40])
    return y is m, gradient, errors


def test_in_place(four):
    for same, gradient, errors in four(in_place):
        assert same
        assert gradient
        assert len(errors) == 2, "a tensor that backward needs; a leaf that requires grad"


def other_inputs(rank):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard

    pending = sharded().redistribute(placements=[Replicate(), Shard(1)], async_op=True)
    kind = type(pending._local_tensor).__name__
    found = {"pending": torch.equal(fd.dropout(pending, 0.3, key=KEY).full_tensor(), fd.dropout(X, 0.3, key=KEY))}
    refused = []
    for act in (
        lambda: fd.dropout(sharded(), 0.3, key=KEY, shard=(X.shape, (0, 0, 0))),
        lambda: fd.dropout(X, 0.3, key=placed(Replicate(), Replicate(), x=KEY)),
        lambda: fd.dropout(sharded(x=torch.ones(8, 6, dtype=torch.int64)), 0.3, key=KEY),
    ):
        try:
            act()
        except TypeError as error:
            refused.append(str(error))
    torch.manual_seed(rank)
    few = distributed_as(X, DeviceMesh("cpu", [0, 1]), [Shard(0)])
    torch.manual_seed(7)
    found["outside"] = (fd.dropout(few, 0.3) is few) == (rank > 1)
    mask = fd.keep_mask(few, 0.3, KEY)
    found["outside, mask"] = mask.dtype == torch.bool and mask.shape == few.shape
    torch.manual_seed(7)
    fd.dropout(few, 0.3)
    left = torch.rand(1)
    torch.manual_seed(7)
    if rank < 2:
        fd.dropout(X)
    found["drawn"] = torch.equal(torch.rand(1), left)
    return kind, found, refused


def test_pending_inputs_and_ranks_outside_of_the_mesh(four):
    for kind, found, refused in four(other_inputs):
        assert kind == "AsyncCollectiveTensor"
        assert all(found.values()), found
        assert len(refused) == 3, refused


def derivatives(rank):
    """Second derivatives, and gradients under each kind of checkpoint."""
    only_sin = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    found = {}

    def twice(x):
        y = fd.dropout(x, 0.3, key=KEY)
        (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return (g**2).sum()

    def block(x):
        return fd.dropout(torch.tanh(x), 0.3).sin()

    calls = {
        "twice": twice,
        "plain": block,
        "reentrant": lambda x: checkpoint(block, x, use_reentrant=True),
        "checkpoint": lambda x: checkpoint(block, x, use_reentrant=False),
        "selective": lambda x: checkpoint(block, x, use_reentrant=False, context_fn=only_sin),
    }
    for name, call in calls.items():
        x, whole = sharded(X.double()).requires_grad_(), X.double().requires_grad_()
        gradients = []
        for one in (x, whole):
            torch.manual_seed(3)
            call(one).sum().backward()
            gradients.append(one.grad)
        found[name] = torch.allclose(gradients[0].full_tensor(), gradients[1])
    return found


def test_second_derivatives_and_checkpoints(four):
    for found in four(derivatives):
        assert all(found.values()), found


def compiled(rank, backend):
    """Compiled values and gradients equal those of eager. Only the keys are saved."""
    from torch.distributed.tensor import Replicate, Shard

    found, saved = [], []

    def pack(t):
        saved.append((t.dtype, t.numel()))
        return t

    def f(x):
        return fd.dropout(x, 0.3) + 100 * fd.dropout(x, 0.5) + fd.dropout2d(x, 0.2)

    whole = X.clone().requires_grad_()
    torch.manual_seed(7)
    want = f(whole)
    want.sum().backward()
    torch._dynamo.reset()
    distributed._compared.clear()
    run = torch.compile(f, backend=backend, fullgraph=True)
    for placements in ((Shard(0), Shard(1)), (Replicate(), Shard(2)))[: 1 if backend == "inductor" else 2]:
        x = placed(*placements).requires_grad_()
        saved.clear()
        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = run(x)
        y.sum().backward()
        found += [torch.equal(y.full_tensor(), want), torch.equal(x.grad.full_tensor(), whole.grad)]
    return found, saved, y.placements == x.placements


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(four, backend):
    for found, saved, same_placements in four(compiled, backend):
        assert all(found), found
        assert saved
        assert all(entry == (torch.uint64, 2) for entry in saved), saved
        assert same_placements


def dynamic(rank):
    from torch.distributed.tensor import Shard

    torch._dynamo.reset()
    run = torch.compile(lambda x: fd.dropout(x, 0.3, key=KEY), backend="eager", fullgraph=True, dynamic=True)
    found = []
    for rows in (8, 16, 23, 40):
        x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
        got = run(distributed_as(x, mesh_of((4,)), [Shard(0)]))
        found.append(torch.equal(got.full_tensor(), fd.dropout(x, 0.3, key=KEY)))
    return found


def test_compiled_for_any_size(four):
    assert four(dynamic) == [[True] * 4] * 4


def seeded(rank, case):
    """With different seeds: one warning, then the masks of the first rank's seed. A second call sends nothing."""
    from torch.distributed.tensor import Replicate, Shard

    distributed._compared.clear()
    torch._dynamo.reset()
    mesh, calls = mesh_of((2, 2)), []
    drop = torch.compile(fd.dropout, backend="aot_eager") if case.startswith("compiled") else fd.dropout
    torch.manual_seed(5 if "alike" in case else 10 + rank)
    x = distributed_as(X, mesh, [Shard(0), Replicate()])
    generator = torch.Generator().manual_seed(20 + rank) if case == "generator" else None
    seed = 5 if "alike" in case else 20 if generator else 10
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        first = drop(x, generator=generator) if generator else drop(x)
    first = first.full_tensor()
    reduce, broadcast = dist.all_reduce, dist.broadcast
    dist.all_reduce = dist.broadcast = lambda *a, **k: calls.append(a)
    try:
        second = drop(x, generator=generator) if generator else drop(x)
    finally:
        dist.all_reduce, dist.broadcast = reduce, broadcast
    whole = torch.Generator().manual_seed(seed)
    same = [
        torch.equal(first, fd.dropout(X, generator=whole)),
        torch.equal(second.full_tensor(), fd.dropout(X, generator=whole)),
    ]
    return same, len(calls), [str(w.message) for w in seen if "seeded differently" in str(w.message)]


@pytest.mark.parametrize("case", ["alike", "differently", "generator", "compiled, alike"])
def test_ranks_agree_at_the_first_call(four, case):
    for same, sent, warned in four(seeded, case):
        assert same == [True, True]
        assert sent == 0
        assert len(warned) == ("alike" not in case)


def compared(rank):
    """Whether a call warns about different seeds after a call with a given generator, and after a failed comparison."""
    from torch.distributed.tensor import Replicate

    x, warned = placed(Replicate(), Replicate()), []
    reduce = dist.all_reduce

    def fails(*_):
        raise RuntimeError("no connection")

    for first in ("generator", "failure"):
        distributed._compared.clear()
        if first == "generator":
            fd.dropout(x, generator=torch.Generator().manual_seed(1))
        else:
            dist.all_reduce = fails
            with contextlib.suppress(RuntimeError):
                fd.dropout(x)
            dist.all_reduce = reduce
        torch.manual_seed(rank)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fd.dropout(x)
        warned.append(any("seeded differently" in str(w.message) for w in seen))
    return warned


def test_the_default_generator_is_compared_whatever_came_before(four):
    assert four(compared) == [[True, True]] * 4


def test_compiling_with_seeds_that_differ_is_an_error(four):
    with pytest.raises(AssertionError, match="seeded differently, and each would draw a mask of its own"):
        four(seeded, "compiled, differently")


def largest_difference(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def trained(rank, world, how, steps):
    """Trains on all ranks and in one process. Returns whether all masks are equal, the number of masks, and the largest
    difference of the losses with dropout and without."""
    mesh, apart = mesh_of((world,)), []
    train = parallel_training.train if how == "tensor parallel" else parallel_training.train_sharded
    for p in (0.1, 0.0):
        alone, whole_masks = train(p, steps)
        losses, masks = train(p, steps, mesh)
        apart.append(largest_difference(alone, losses))
        if p > 0:
            if how == "fsdp":
                n = 8 // world
                whole_masks = [mask[rank * n : (rank + 1) * n] for mask in whole_masks]
            same = len(masks) == len(whole_masks) and all(map(torch.equal, masks, whole_masks))
    return same, len(masks), apart


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("how", ["tensor parallel", "fsdp"])
def test_training_is_that_of_one_process(request, world, how):
    """All masks are equal. The losses differ at most twice as much as without dropout."""
    steps = 20 if request.config.getoption("--every-cell") else 4
    if steps == 4 and (how, world) in [("tensor parallel", 2), ("fsdp", 4)]:
        pytest.skip("shown by the others; make test-sharded runs it")
    workers = request.getfixturevalue("two" if world == 2 else "four")
    for same, sites, (with_dropout, without) in workers(trained, world, how, steps):
        assert same
        assert sites == steps * (9 if how == "tensor parallel" else 2)
        assert with_dropout <= max(2 * without, 1e-6), (with_dropout, without)
