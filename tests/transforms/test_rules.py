"""vmap's rules for random operations, and inputs that are error-prone, compiled and not."""

import pytest
import torch
import torch.nn.functional as F
from tables import KEY, SEED, P, drawn_keys
from torch import func, nn

import fused_dropout as fd
from fused_dropout import native

SCALE = torch.tensor(1 / (1 - P)).float()
SHAPE = (6, 4, 5, 2)
CHANNELS = (6, 4, 1, 1)
# name: the function, and the shape of its mask for an input of SHAPE
CALLS = {
    "dropout": (fd.dropout, SHAPE),
    "dropout2d": (fd.dropout2d, CHANNELS),
    "alpha_dropout": (fd.alpha_dropout, SHAPE),
    "feature_alpha_dropout": (fd.feature_alpha_dropout, CHANNELS),
    "noise_shape": (lambda x, *args, **more: fd.dropout(x, *args, noise_shape=(6, 1, 5, 1), **more), (6, 1, 5, 1)),
    "drop_path": (fd.drop_path, (6, 1, 1, 1)),
    "in_place": (lambda x, *args, **more: fd.dropout(x * 1, *args, inplace=True, **more), SHAPE),
}
for_calls = pytest.mark.parametrize("name", CALLS)
for_compilers = pytest.mark.parametrize("compiler", [None, "aot_eager"], ids=str)


@pytest.fixture(params=["kernel", "fuse"])
def compile_as(request, monkeypatch):
    """Values of FUSED_DROPOUT_COMPILE."""
    monkeypatch.setattr(native, "compile_as", request.param)


def compiled(f, compiler):
    torch._dynamo.reset()
    return f if compiler is None else torch.compile(f, backend=compiler, fullgraph=True)


def values(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(SEED)) + 0.5


def dropped(x, mask):
    return torch.where(mask, x * SCALE, 0)


class TestVmap:
    @for_compilers
    @for_calls
    def test_no_randomness_is_asked_for_where_nothing_is_drawn(self, name, compiler):
        call, x = CALLS[name][0], values(3, *SHAPE)
        state = torch.get_rng_state()
        calls = ((0.0, True), (1.0, True), (P, False), (1.0, False))
        run = compiled(func.vmap(lambda x: tuple(call(x, p, training) for p, training in calls)), compiler)
        torch.testing.assert_close(run(x), (x, x * 0, x, x))
        assert torch.equal(state, torch.get_rng_state())

    @for_compilers
    @for_calls
    def test_a_batch_of_keys(self, name, compiler):
        """Each sample has the mask of its own key, alone and inside grad, whether x has a batch or not."""
        call, x, keys = CALLS[name][0], values(3, *SHAPE), fd.split(KEY, 3)

        def loss(x, key):
            return (call(x, P, True, key=key) ** 3).sum()

        def both(x, key):
            return call(x, P, True, key=key), func.grad(loss)(x, key)

        for of_x, batch, samples in ((0, x, x), (None, x[0], [x[0]] * 3)):
            if name == "in_place" and of_x is None:
                continue  # there is no memory for the samples; torch refuses too
            got = compiled(func.vmap(both, (of_x, 0)), compiler)(batch, keys)
            want = zip(*(both(sample, key) for sample, key in zip(samples, keys, strict=True)), strict=True)
            torch.testing.assert_close(got, tuple(map(torch.stack, want)))

    @for_compilers
    @for_calls
    def test_different_samples_draw_the_keys_of_as_many_calls(self, name, compiler):
        call, x = CALLS[name][0], values(40, *SHAPE)
        run = compiled(func.vmap(lambda x: call(x, P, True), randomness="different"), compiler)
        torch.manual_seed(SEED)
        got = run(x)
        torch.manual_seed(SEED)
        torch.testing.assert_close(got, torch.stack([call(sample, P, True) for sample in x]))

    @for_compilers
    @pytest.mark.parametrize("inner", ["same", "different"])
    @pytest.mark.parametrize("outer", ["same", "different"])
    def test_nested(self, outer, inner, compiler):
        x = torch.ones(3, 4, 50)
        both = func.vmap(func.vmap(lambda x: fd.dropout(x, P), randomness=inner), randomness=outer)
        got = compiled(both, compiler)(x)
        for masks, randomness in ((got[:, 0], outer), (got[0], inner)):
            assert len({str(mask.tolist()) for mask in masks}) == (1 if randomness == "same" else len(masks))

    @for_compilers
    def test_an_unbatched_input_has_a_mask_for_each_sample(self, compiler):
        one, batch = torch.ones(50), torch.ones(4, 50)
        run = compiled(func.vmap(lambda x: (fd.dropout(one, P), x), randomness="different"), compiler)
        assert len({str(mask.tolist()) for mask in run(batch)[0]}) == 4

    @for_compilers
    @pytest.mark.parametrize("layout", ["dim 1", "last dim", "transposed", "channels_last"])
    def test_samples_are_numbered_as_alone(self, layout, compiler):
        """The mask of a key follows the layout of the sample, wherever the batch dimension is."""
        x, dim = {
            "dim 1": (values(6, 3, 5), 1),
            "last dim": (values(6, 5, 3), 2),
            "transposed": (values(3, 6, 5).transpose(1, 2), 0),
            "channels_last": (values(3, 2, 6, 5).to(memory_format=torch.channels_last), 0),
        }[layout]
        got = compiled(func.vmap(lambda x: fd.dropout(x, P, key=KEY), dim), compiler)(x)
        torch.testing.assert_close(got, torch.stack([fd.dropout(sample, P, key=KEY) for sample in x.unbind(dim)]))


class DropConnect(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(values(7, 9))

    def forward(self, x):
        return F.linear(x, fd.dropout(self.weight, P, self.training))


class TestDropConnect:
    """Dropout of the differentiated tensor itself, with no operation in between."""

    @for_compilers
    def test_autograd(self, compiler):
        module, x = DropConnect(), values(5, 9)
        torch.manual_seed(SEED)
        compiled(module, compiler)(x).sum().backward()
        mask = fd.keep_mask((7, 9), P, drawn_keys(1)[0])
        torch.testing.assert_close(module.weight.grad, dropped(x.sum(0).expand(7, 9), mask))

    @for_compilers
    def test_functional_call(self, compiler, compile_as):
        module, x = DropConnect(), values(5, 9)

        def loss(parameters, x):
            return func.functional_call(module, parameters, (x,)).sum()

        parameters = {"weight": module.weight.detach()}
        torch.manual_seed(SEED)
        got = compiled(func.grad(loss), compiler)(parameters, x)["weight"]
        mask = fd.keep_mask((7, 9), P, drawn_keys(1)[0])
        torch.testing.assert_close(got, dropped(x.sum(0).expand(7, 9), mask))

    @for_compilers
    def test_per_sample_gradients(self, compiler):
        x, weight, keys = values(5, 9), values(7, 9), fd.split(KEY, 5)

        def loss(weight, x, key):
            return F.linear(x, fd.dropout(weight, P, key=key)).sum()

        got = compiled(func.vmap(func.grad(loss), (None, 0, 0)), compiler)(weight, x, keys)
        masks = torch.stack([fd.keep_mask((7, 9), P, key) for key in keys])
        torch.testing.assert_close(got, dropped(x[:, None].expand(5, 7, 9), masks))

    @for_compilers
    def test_forward_mode(self, compiler):
        weight, tangent = values(7, 9), values(7, 9).cos()
        run = compiled(lambda w, t: func.jvp(lambda w: fd.dropout(w, P, key=KEY), (w,), (t,)), compiler)
        mask = fd.keep_mask((7, 9), P, KEY)
        torch.testing.assert_close(run(weight, tangent), (dropped(weight, mask), dropped(tangent, mask)))


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(), (1, 1, 3)], ids=["0-d", ""])
    def test_tangents_and_gradients_have_the_inputs(self, dtype, shape):
        """Also for a 0-d input, where a Python number as factor would make the tangent float64 (torch 2.13)."""
        x = torch.ones(shape, dtype=dtype)
        functions = [fd.dropout, fd.alpha_dropout, *([fd.feature_alpha_dropout, fd.drop_path] if shape else [])]
        for function in functions:
            for p in (0.5, 1.0):

                def f(x, function=function, p=p):
                    return function(x, p, True)

                outputs = [*func.jvp(f, (x,), (x,)), func.grad(lambda x, f=f: f(x).sum())(x), func.jacrev(f)(x)]
                outputs.append(func.vmap(f, randomness="same")(torch.stack([x, x])))
                assert [y.dtype for y in outputs] == [dtype] * 5

    def test_alpha_dropout_of_a_number(self):
        y, tangent = func.jvp(lambda x: fd.alpha_dropout(x, 0.5, True), (torch.tensor(1.0),), (torch.tensor(1.0),))
        assert y.dtype == tangent.dtype == torch.float32


def loss(x):
    return (fd.dropout(x, P) ** 2).sum()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
class TestCompileOfATransform:
    """torch.compile of the transform itself, as users write it."""

    def test_grad(self, compiler, compile_as):
        x = values(60)
        torch.manual_seed(SEED)
        got = compiled(func.grad(loss), compiler)(x)
        mask = fd.keep_mask((60,), P, drawn_keys(1)[0])
        torch.testing.assert_close(got, 2 * dropped(dropped(x, mask), mask))

    def test_vmap_of_grad(self, compiler, compile_as):
        x = values(4, 60)
        got = compiled(func.vmap(func.grad(loss), randomness="different"), compiler)(x)
        assert len({str(mask.tolist()) for mask in got != 0}) == 4
        torch.testing.assert_close(got, 2 * dropped(dropped(x, got != 0), got != 0))

    def test_vmap(self, compiler, compile_as):
        x = torch.ones(4, 60)
        got = compiled(func.vmap(fd.dropout, randomness="different"), compiler)(x)
        assert len({str(mask.tolist()) for mask in got}) == 4
        got = compiled(func.vmap(fd.dropout, randomness="same"), compiler)(x)
        assert len({str(mask.tolist()) for mask in got}) == 1
        with pytest.raises(RuntimeError, match="randomness error mode"):
            compiled(func.vmap(fd.dropout), compiler)(x)

    def test_each_call_draws_anew(self, compiler):
        x, run = torch.ones(60), compiled(func.grad(loss), compiler)
        assert not torch.equal(run(x), run(x))
