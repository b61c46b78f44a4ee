"""noise_shape: the contract's mask of the noise shape, broadcast over the input, in every layout and transform."""

import math

import contract
import pytest
import torch
from helpers import assert_same, for_dtypes, key_tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fused_dropout as fd
from fused_dropout import native, reference

SEED, OFFSET, P = 0x1234_5678_9ABC_DEF0, 77, 0.4
SHAPE = (4, 6, 3, 5)
NOISE_SHAPES = [
    (4, 6, 1, 1),
    (1, 6, 3, 5),
    (4, 1, 3, 1),
    (1, 1, 1, 1),
    (1, 6, 1, 5),
    SHAPE,
    (3, 5),
    (6, 1, 1),
    (None, None, 1, 1),
    (5,),
    (),
]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.cat((x, x, x), -1)[..., 5:10],
    "sliced channels_last": lambda x: torch.cat((x, x), -1).contiguous(memory_format=torch.channels_last)[..., 5:10],
    "expanded": lambda x: x[:, :1].expand(SHAPE),
}
for_noise_shapes = pytest.mark.parametrize("noise_shape", NOISE_SHAPES, ids=str)
for_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture
def key():
    return key_tensor(SEED, OFFSET)


def mask(noise_shape, p=P, shape=SHAPE):
    sizes = shape[len(shape) - len(noise_shape) :]
    resolved = [size if n is None else n for n, size in zip(noise_shape, sizes, strict=True)]
    kept = contract.keep_numpy(SEED, OFFSET, p, math.prod(resolved))
    return torch.from_numpy(kept).view(resolved).expand(shape)


def expected(x, noise_shape, p=P, scale=None):
    """The product in float32 (float64 for float64), rounded once, and +0 for dropped elements."""
    x = x.detach().cpu()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    product = (x.to(wide) * torch.tensor(contract.scale(p) if scale is None else scale, dtype=wide)).to(x.dtype)
    return torch.where(mask(noise_shape, p, x.shape), product, torch.zeros((), dtype=x.dtype))


def sample(dtype=torch.float32, special=True):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    if special:
        x[0, 0], x[1, 1], x[2], x[3, :, 1] = torch.nan, torch.inf, -0.0, -torch.inf
        x[0, 1], x[1, 2] = torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max
    return x


class TestValues:
    @for_dtypes
    @for_noise_shapes
    def test_is_the_contracts_mask_broadcast(self, noise_shape, dtype, key, device):
        x = sample(dtype)
        assert_same(fd.dropout(x.to(device), P, key=key, noise_shape=noise_shape), expected(x, noise_shape))

    @for_layouts
    @for_noise_shapes
    def test_layouts(self, noise_shape, layout, key, device):
        x = layout(sample().to(device))
        y = fd.dropout(x, P, key=key, noise_shape=noise_shape)
        assert_same(y.contiguous(), expected(x, noise_shape).contiguous())
        assert y.stride() == torch.empty_like(x).stride()

    def test_is_keep_mask_of_the_noise_shape(self, key):
        kept = fd.keep_mask((4, 1, 3, 1), P, key).expand(SHAPE)
        assert torch.equal(fd.dropout(torch.ones(SHAPE), P, key=key, noise_shape=(4, 1, 3, 1)) != 0, kept)

    def test_module(self, key):
        x = sample()
        m = fd.Dropout(P, key=key, noise_shape=[1, None, 1, 1])
        assert_same(m(x), expected(x, (1, 6, 1, 1)))
        assert m.eval()(x) is x
        m.train().noise_shape = None
        assert torch.equal(m(torch.ones(SHAPE)), fd.dropout(torch.ones(SHAPE), P, key=key))

    def test_draws_one_key_as_plain_dropout_does(self):
        torch.manual_seed(3)
        a = fd.dropout(torch.ones(4, 5), P, noise_shape=(4, 1))
        follows = torch.rand(1)
        torch.manual_seed(3)
        b = fd.dropout(torch.ones(4), P)
        assert torch.equal(a[:, 0], b)
        assert torch.equal(torch.rand(1), follows)

    def test_generator(self):
        def draw():
            return fd.dropout(torch.ones(64, 2), P, generator=torch.Generator().manual_seed(1), noise_shape=(64, 1))

        state = torch.get_rng_state()
        assert torch.equal(draw(), draw())
        assert torch.equal(torch.get_rng_state(), state)


RUNS = [
    ((3, 5, 257), [(3, 5, 1), (3, 1, 257), (1, 5, 257), (3, 1, 1), (1, 1, 257), (1, 1, 1)]),
    ((7, 300, 41), [(7, 300, 1), (7, 1, 41), (1, 300, 41)]),  # above the grain: several threads
    ((3, 9000), [(3, 1), (1, 9000)]),
    ((300, 5, 2), [(300, 5, 1)]),
    ((2, 3, 2, 3, 2, 3, 2, 3), [(2, 1, 2, 1, 2, 1, 2, 1), (1, 3, 1, 3, 1, 3, 1, 3), (2, 3, 1, 1, 2, 3, 1, 1)]),
    ((1, 4, 1, 6), [(1, 4, 1, 1), (1, 1, 1, 6)]),
    ((1, 1), [(1, 1)]),
    ((), [()]),
]
for_runs = pytest.mark.parametrize(
    ("shape", "noise_shape"), [(shape, noise) for shape, noises in RUNS for noise in noises], ids=str
)
OPS = {"operator": torch.ops.fused_dropout, "reference": reference}
ORDERS = {
    "row-major": lambda x: x,
    "reversed": lambda x: x.permute(tuple(range(x.dim())[::-1])).contiguous().permute(tuple(range(x.dim())[::-1])),
    "first last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() else x,
}


@pytest.fixture
def two_threads():
    """Two threads on any machine, so that the second begins inside the tensor."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def strides_of(noise_shape):
    """The index strides of a mask of this shape: row-major, 0 where it is broadcast."""
    return [0 if n == 1 else math.prod(noise_shape[d + 1 :]) for d, n in enumerate(noise_shape)]


class TestOperator:
    """The operator and its reference: runs that share a draw and runs that do not, in every order."""

    @for_runs
    @pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
    @pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
    def test_every_order_of_runs(self, ops, order, shape, noise_shape, key, device, two_threads):
        numbers = torch.arange(1, math.prod(shape) + 1, dtype=torch.float32).view(shape)
        x = order(numbers).to(device)
        want = expected(numbers, noise_shape, scale=1.25)
        y = ops.apply(x, P, key, 0, strides_of(noise_shape), 1.25)
        assert_same(y, want)
        assert y.stride() == x.stride()
        ops.apply_(x, P, key.to(device), 0, strides_of(noise_shape), 1.25)
        assert_same(x, want)

    @for_dtypes
    @pytest.mark.parametrize("offset", [0, 1, 3])
    @pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
    def test_any_alignment_and_nothing_beyond(self, ops, offset, dtype, key, device):
        memory = torch.randn(4 * 45 * 21 + 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        before = memory.clone()
        x = memory[offset : offset + 4 * 45 * 21].view(4, 45, 21)
        for noise_shape in [(4, 45, 1), (4, 1, 21), (1, 45, 21)]:
            assert_same(ops.apply(x, P, key, 0, strides_of(noise_shape), 1.0), expected(x, noise_shape, scale=1.0))
        assert_same(memory, before)
        want = expected(x, (4, 45, 1), scale=1.0)
        ops.apply_(x, P, key, 0, strides_of((4, 45, 1)), 1.0)
        assert_same(x, want)
        assert_same(memory[:offset], before[:offset])
        assert_same(memory[offset + x.numel() :], before[offset + x.numel() :])

    @for_layouts
    @for_noise_shapes
    @pytest.mark.torch_copies
    def test_layouts(self, noise_shape, layout, key, device):
        x = layout(sample().to(device))
        shape = [1] * (4 - len(noise_shape)) + list(noise_shape)
        shape = [size if n is None else n for n, size in zip(shape, SHAPE, strict=True)]
        y = torch.ops.fused_dropout.apply(x, P, key, 0, strides_of(shape), contract.scale(P))
        want = expected(x, noise_shape).contiguous()
        assert_same(y.contiguous(), want)
        assert y.stride() == torch.empty_like(x).stride()
        if 0 not in x.stride():
            torch.ops.fused_dropout.apply_(x, P, key, 0, strides_of(shape), contract.scale(P))
            assert_same(x.contiguous(), want)

    def test_refuses(self, key, info):
        if info.devices["cpu"] == "reference":
            pytest.skip("the reference is checked by its callers")
        with pytest.raises(RuntimeError, match="float32"):
            torch.ops.fused_dropout.apply(torch.ones(3, 4, dtype=torch.int64), P, key, 0, (1, 0), 1.0)
        with pytest.raises(RuntimeError, match="single memory location"):
            torch.ops.fused_dropout.apply_(torch.ones(3, 1).expand(3, 4), P, key, 0, (1, 0), 1.0)

    @pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
    @pytest.mark.parametrize("shape", [(3, 4), (0, 4)], ids=str)
    def test_refuses_a_wrong_window(self, ops, shape, key, device):
        x = torch.ones(shape, device=device)
        windows = [
            (-1, None, "0 or more"),
            (0, (4,), "one stride for each"),
            (0, (4, 1, 1), "one stride for each"),
            (0, (-4, 1), "0 or more"),
            (2**63 - 3, (0, 1), r"below 2\*\*63"),
            (0, (1, 2**62), r"below 2\*\*63"),
        ]
        for start, strides, message in windows:
            for operator in (ops.apply, ops.apply_, ops.keep_mask):
                with pytest.raises(RuntimeError, match=message):
                    operator(x, P, key, start, strides)
        ops.apply(x, P, key, 2**63 - 4, (0, 1))


class TestEdges:
    @pytest.mark.parametrize("inplace", [False, True])
    def test_returns_the_input(self, inplace):
        x = torch.ones(3, 4)
        state = torch.get_rng_state()
        assert fd.dropout(x, 0.0, inplace=inplace, noise_shape=(3, 1)) is x
        assert fd.dropout(x, P, False, inplace, noise_shape=(3, 1)) is x
        empty = torch.empty(3, 0)
        assert fd.dropout(empty, P, inplace=inplace, noise_shape=(3, 1)) is empty
        assert torch.equal(torch.get_rng_state(), state)

    def test_p_one(self):
        x = torch.tensor([[1.0, torch.inf], [torch.nan, -1.0]], requires_grad=True)
        state = torch.get_rng_state()
        y = fd.dropout(x, 1.0, noise_shape=(2, 1))
        y.sum().backward()
        for zeros in (y.detach(), x.grad):
            assert_same(zeros, torch.zeros(2, 2))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("noise_shape", [(3,), (2, 4), (4, 2), (1, 3, 4), (0, 4), (-1, 4), (3, 4, 1)])
    def test_does_not_broadcast(self, noise_shape):
        state = torch.get_rng_state()
        with pytest.raises(RuntimeError, match=r"Input sizes: \[3, 4\]\.  Noise sizes:"):
            fd.dropout(torch.ones(3, 4), P, noise_shape=noise_shape)
        assert torch.equal(torch.get_rng_state(), state)

    def test_what_is_not_fused_goes_to_torch(self, key):
        class Mine(torch.Tensor):
            pass

        y = fd.dropout(torch.ones(64, 3).as_subclass(Mine), P, noise_shape=(64, 1))
        assert type(y) is Mine
        assert set(y.count_nonzero(1).tolist()) == {0, 3}
        assert fd.dropout(torch.ones(64, 3, device="meta"), P, noise_shape=(64, 1)).is_meta
        with pytest.raises(TypeError, match="complex64"):
            fd.dropout(torch.ones(64, 3, dtype=torch.complex64), P, key=key, noise_shape=(64, 1))

    def test_autocast_and_inference_mode(self, key):
        x = sample(special=False)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            y = fd.dropout(x, P, key=key, noise_shape=(4, 6, 1, 1))
        assert_same(y.clone(), expected(x, (4, 6, 1, 1)))


class TestMemory:
    def test_saves_the_key_and_nothing_else(self):
        saved = []
        x = torch.ones(256, 256, requires_grad=True)
        with saved_tensors_hooks(lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t):
            fd.dropout(x, P, noise_shape=(256, 1))
        assert saved == [16]

    def test_the_mask_is_never_expanded(self):
        """Under a mode torch's operations make the mask. No mask has more elements than the noise."""

        class Masks(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
                    bytes_of_masks.append(out.untyped_storage().nbytes())
                return out

        bytes_of_masks = []
        with Masks():
            fd.dropout(torch.ones(512, 512), P, noise_shape=(512, 1))
        assert set(bytes_of_masks) == {512}

    def test_a_mask_of_the_inputs_shape_is_plain_dropouts(self, key):
        """For row-major inputs. For a transposed input, the mask is still numbered in row-major order."""
        x = torch.ones(6, 8)
        assert torch.equal(fd.dropout(x, P, key=key, noise_shape=(None, 8)), fd.dropout(x, P, key=key))
        column = x[:, 0].contiguous()
        assert torch.equal(fd.drop_path(column, P, training=True, key=key), fd.dropout(column, P, key=key))
        y = fd.dropout(x.t(), P, key=key, noise_shape=(8, 6))
        assert torch.equal(y, fd.dropout(torch.ones(8, 6), P, key=key))
        assert not torch.equal(y, fd.dropout(x.t(), P, key=key))


class TestInPlace:
    @for_layouts
    @pytest.mark.parametrize("grad", [False, True])
    def test_is_the_same_as_out_of_place(self, layout, grad, key):
        a = sample(special=False).requires_grad_(grad)
        x = layout(a * 1)
        want = expected(x, (4, 6, 1, 1))
        if 0 in x.stride():
            with pytest.raises(RuntimeError, match="single memory location"):
                fd.dropout(x, P, inplace=True, key=key, noise_shape=(4, 6, 1, 1))
            return
        version = x._version
        y = fd.dropout(x, P, inplace=True, key=key, noise_shape=(4, 6, 1, 1))
        assert y is x
        assert x._version > version
        assert_same(y.contiguous(), want)
        if grad:
            y.sum().backward()
            assert torch.equal(a.grad != 0, mask((4, 6, 1, 1))) or layout is LAYOUTS["sliced"]

    def test_leaf_is_refused_unchanged(self):
        x = torch.ones(3, 4, requires_grad=True)
        with pytest.raises(RuntimeError, match="leaf Variable"):
            fd.dropout(x, P, inplace=True, noise_shape=(3, 1))
        assert torch.equal(x.detach(), torch.ones(3, 4))


class TestGradients:
    @for_layouts
    @pytest.mark.parametrize("of_gradient", LAYOUTS.values(), ids=LAYOUTS)
    def test_gradient_gets_forwards_mask(self, layout, of_gradient, key):
        """NaN and inf do not pass through dropped elements either."""
        x = layout(sample(special=False)).detach().requires_grad_()
        gradient = of_gradient(sample())
        fd.dropout(x, P, key=key, noise_shape=(1, 6, 1, 5)).backward(gradient)
        assert_same(x.grad.contiguous(), expected(gradient, (1, 6, 1, 5)).contiguous())

    @pytest.mark.parametrize("noise_shape", [(3, 1, 2), (1, 4, 1), (3, 4, 2)])
    def test_gradcheck(self, noise_shape, key):
        x = torch.randn(3, 4, 2, dtype=torch.double, requires_grad=True)

        def f(x):
            return fd.dropout(x, P, key=key, noise_shape=noise_shape)

        assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, x)

    def test_func_transforms(self, key):
        x, slope = torch.rand(3, 4), fd.dropout(torch.ones(3, 4), P, key=key, noise_shape=(3, 1))

        def f(x):
            return fd.dropout(x, P, key=key, noise_shape=(3, 1))

        assert torch.equal(torch.func.grad(lambda x: f(x).sum())(x), slope)
        assert torch.equal(torch.func.jvp(f, (x,), (torch.ones(3, 4),))[1], slope)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            assert torch.equal(jacobian(f)(x).view(12, 12), slope.flatten().diag())
        hessian = torch.func.hessian(lambda x: (f(x) ** 2).sum())(x).view(12, 12)
        assert torch.equal(hessian, (2 * slope.flatten() ** 2).diag())

    def test_vmap_randomness(self):
        x = torch.ones(5, 40, 3)

        def f(x):
            return fd.dropout(x, P, noise_shape=(40, 1))

        with pytest.raises(RuntimeError, match="randomness error mode"):
            torch.func.vmap(f)(x)
        torch.manual_seed(3)
        alone = f(x[0])
        torch.manual_seed(3)
        assert torch.equal(torch.func.vmap(f, randomness="same")(x), alone.expand(5, 40, 3))
        different = torch.func.vmap(f, randomness="different")(x)
        assert len({tuple(row.tolist()) for row in different[..., 0]}) == 5
        assert torch.equal(different[..., :1].expand_as(different), different)
        unbatched = torch.func.vmap(lambda _: f(x[0]), randomness="different")(x)
        assert len({tuple(row.tolist()) for row in unbatched[..., 0]}) == 5

    def test_vmap_over_keys(self):
        keys = fd.split(fd.key(1), 3)
        masks = torch.func.vmap(lambda k: fd.dropout(torch.ones(8, 2), P, key=k, noise_shape=(8, 1)))(keys)
        for own, k in zip(masks, keys, strict=True):
            assert torch.equal(own, fd.dropout(torch.ones(8, 2), P, key=k, noise_shape=(8, 1)))

    def test_per_sample_gradients(self):
        weight, data = torch.rand(6, 2), torch.rand(3, 6, 2)

        def loss(weight, row):
            return (fd.dropout(weight * row, P, noise_shape=(6, 1)) ** 2).sum()

        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(weight, data)
        assert torch.equal((gradients != 0).all(-1), (gradients != 0).any(-1))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpoint_recomputes_the_same_mask(self, use_reentrant):
        x = torch.rand(100, 3, requires_grad=True)
        y = checkpoint(lambda x: fd.dropout(x, P, noise_shape=(100, 1)).exp(), x, use_reentrant=use_reentrant)
        torch.rand(3)
        y.sum().backward()
        assert torch.equal(x.grad != 0, y != 1)


class TestCompile:
    @pytest.mark.same_without("_eager")
    @pytest.mark.parametrize("compile_as", ["kernel", "fuse"])
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_masks_and_gradients_of_eager(self, backend, compile_as, monkeypatch):
        monkeypatch.setattr(native, "compile_as", compile_as)

        def f(x):
            return fd.dropout(x, P, noise_shape=(x.shape[0], x.shape[1], 1)).tanh()

        def run(function, x):
            torch.manual_seed(5)
            x = x.clone().requires_grad_()
            y = function(x)
            (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
            return y, gradient

        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend=backend)
        for n in (4, 5, 6):
            for got, want in zip(run(compiled, torch.rand(n, 3, 7)), run(f, torch.rand(n, 3, 7)), strict=True):
                assert torch.equal(got != 0, want != 0)
        x = torch.rand(4, 3, 7)
        for got, want in zip(run(compiled, x), run(f, x), strict=True):
            torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("keys", [(), (fd.key(3),)], ids=["", "key"])
    def test_make_fx_keeps_sizes_open(self, keys):
        def drop(x, *keys):
            options = dict(zip(("key",), keys, strict=False))
            return fd.drop_path(x, 0.5, training=True, **options), fd.dropout(x, P, noise_shape=(None, 1), **options)

        traced = make_fx(drop, tracing_mode="symbolic")(torch.ones(5, 8), *keys)
        for y in traced(torch.ones(7, 8), *keys):
            assert y.shape == (7, 8)
            assert torch.equal(y[:, :1].expand_as(y), y)

    def test_is_seen_by_fx_as_it_is(self):
        graph = torch.fx.symbolic_trace(fd.Dropout(P, noise_shape=(1, None))).graph
        (node,) = [node for node in graph.nodes if node.op == "call_function"]
        assert node.target is fd.dropout
        assert node.kwargs["noise_shape"] == (1, None)


@pytest.mark.parametrize("noise_shape", [(None, 1, 6), (24, None, 1), (1, 6)])
def test_compiled_for_any_size(noise_shape, key):
    def function(x):
        return fd.dropout(x, 0.4, key=key, noise_shape=noise_shape)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(torch.ones(24, 8, 6)), function(torch.ones(24, 8, 6)))


def test_more_dimensions_than_an_empty_input():
    with pytest.raises(RuntimeError, match="has to broadcast"):
        fd.dropout(torch.ones(0), 0.5, noise_shape=(1, 0))
