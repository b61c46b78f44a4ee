"""The rest of the family: dropout1d to 3d, alpha dropout, their modules, drop path and Monte Carlo dropout."""

import copy
import inspect
import math
import pickle
import warnings

import contract
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, for_dtypes, key_tensor
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fused_dropout as fd

SEED, OFFSET, P = 99, 3, 0.4
FUNCTIONS = ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]
MODULES = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]
RANKS = {"dropout1d": 3, "dropout2d": 4, "dropout3d": 5, "Dropout1d": 3, "Dropout2d": 4, "Dropout3d": 5}
ALPHA = 1.7580993408473766
for_functions = pytest.mark.parametrize("name", FUNCTIONS)
for_modules = pytest.mark.parametrize("name", MODULES)


@pytest.fixture
def key():
    return key_tensor(SEED, OFFSET)


def ones(name, **options):
    return torch.ones((8, 6, 2, 2, 3)[: RANKS.get(name, 4)], **options)


def mask(*noise_shape):
    return torch.from_numpy(contract.keep_numpy(SEED, OFFSET, P, math.prod(noise_shape))).view(noise_shape)


def outcome(function, *args, **options):
    """The result or the error of a call, and its warnings."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            result = function(*args, **options).shape
        except Exception as error:
            result = type(error), str(error)
    return result, [(w.category, str(w.message)) for w in warned]


class TestFunctions:
    @for_functions
    def test_arguments_are_those_of_torch(self, name):
        theirs = list(inspect.signature(getattr(F, name)).parameters.values())
        ours = list(inspect.signature(getattr(fd, name)).parameters.values())
        assert [(p.name, p.default, p.kind) for p in ours[:4]] == [(p.name, p.default, p.kind) for p in theirs]
        assert [p.name for p in ours[4:6]] == ["generator", "key"]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in ours[4:])

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
    @pytest.mark.parametrize("p", [0.0, 0.4, 1.0, -0.1, 1.5])
    @for_functions
    def test_errors_and_warnings_are_torchs(self, name, p, dtype, training, inplace):
        for rank in range(7):
            for first in (2, 0):
                x = torch.ones((first, 3, 2, 2, 1, 1)[:rank], dtype=dtype)
                theirs = outcome(getattr(F, name), x.clone(), p, training, inplace)
                assert outcome(getattr(fd, name), x.clone(), p, training, inplace) == theirs, rank

    @for_functions
    def test_returns_the_input(self, name):
        for x in (ones(name), ones(name)[:0]):
            for options in ({"training": False}, {"training": True, "p": 0.0}, {"training": True, "inplace": True}):
                assert getattr(fd, name)(x, **options) is x

    @for_dtypes
    @pytest.mark.parametrize(
        ("name", "shape", "noise_shape"),
        [
            ("dropout1d", (8, 6, 5), (8, 6, 1)),
            ("dropout1d", (6, 5), (6, 1)),
            ("dropout2d", (8, 6, 4, 5), (8, 6, 1, 1)),
            ("dropout2d", (8, 6, 4), (8, 6, 1)),
            ("dropout2d", (8, 6), (8, 6)),
            ("dropout3d", (8, 6, 2, 3, 4), (8, 6, 1, 1, 1)),
            ("dropout3d", (6, 2, 3, 4), (6, 1, 1, 1)),
            ("dropout3d", (6, 2, 3), (6, 1, 1)),
        ],
    )
    @pytest.mark.filterwarnings("ignore:dropout[23]d:UserWarning")
    def test_channels(self, name, shape, noise_shape, dtype, key, device):
        """Drops channels as torch does, in place or not, with the contract's mask."""
        x = torch.randn(shape).to(dtype)
        x[0, 0], x[0, 1] = torch.nan, -torch.inf
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        product = (x.to(wide) * torch.tensor(contract.scale(P), dtype=wide)).to(dtype)
        want = torch.where(mask(*noise_shape), product, torch.zeros((), dtype=dtype))
        y = x.to(device)
        assert_same(getattr(fd, name)(y, P, key=key), want)
        assert getattr(fd, name)(y, P, inplace=True, key=key) is y
        assert_same(y, want)
        theirs = getattr(F, name)(torch.ones(shape), P)
        reduced = tuple(d for d, n in enumerate(noise_shape) if n == 1 and shape[d] != 1)
        for y in (theirs, getattr(fd, name)(torch.ones(shape), P)):
            assert torch.equal(y.amin(reduced) if reduced else y, y.amax(reduced) if reduced else y)

    @pytest.mark.parametrize(
        ("name", "noise_shape"), [("alpha_dropout", (8, 6, 4)), ("feature_alpha_dropout", (8, 6, 1))]
    )
    @pytest.mark.parametrize("p", [0.1, 0.4, 0.9])
    def test_alpha_formula(self, name, noise_shape, p, dtype, key, device):
        x = torch.randn(8, 6, 4).to(dtype)
        x[0] = torch.nan
        kept = torch.from_numpy(contract.keep_numpy(SEED, OFFSET, p, math.prod(noise_shape))).view(noise_shape)
        a = ((ALPHA**2 * p + 1) * (1 - p)) ** -0.5
        want = torch.where(kept, x.double() * a, -ALPHA * a) + ALPHA * a * p
        # x + alpha, the product and the sum are each rounded. 1 / (1 - p) enlarges the intermediate result.
        tolerance = 4 * torch.finfo(dtype).eps * x.double().nan_to_num().abs().max().item() / (1 - p) ** 0.5
        y = getattr(fd, name)(x.to(device), p, True, key=key)
        assert y.dtype == dtype
        torch.testing.assert_close(y.cpu().double(), want, rtol=0, atol=tolerance, equal_nan=True)
        assert torch.equal(getattr(fd, name)(x.to(device), p, True, True, key=key).cpu().isnan(), want.isnan())

    @pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
    def test_alpha_keeps_mean_and_variance(self, name):
        torch.manual_seed(0)
        y = getattr(fd, name)(torch.randn(1000, 1000, 1), 0.3, True)
        assert abs(y.mean()) < 0.01
        assert abs(y.var() - 1) < 0.01

    @pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
    def test_alpha_p_one(self, name):
        x = torch.randn(3, 4, requires_grad=True)
        y = getattr(fd, name)(x, 1.0, True)
        y.sum().backward()
        assert torch.equal(y, torch.zeros(3, 4))
        assert torch.equal(x.grad, torch.zeros(3, 4))

    @for_functions
    def test_gradcheck(self, name, key):
        x = ones(name, dtype=torch.double)[:2, :3].clone().requires_grad_()

        def f(x):
            return getattr(fd, name)(x, P, True, key=key)

        assert torch.autograd.gradcheck(f, x, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, x, fast_mode=True)

    @for_functions
    def test_saves_the_key_and_nothing_else(self, name):
        saved = []
        x = ones(name, requires_grad=True)
        with saved_tensors_hooks(lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t):
            getattr(fd, name)(x, P, True)
        assert saved == [16]

    @for_functions
    def test_transforms(self, name):
        function, x = getattr(fd, name), ones(name)[None].expand(3, *ones(name).shape)
        with pytest.raises(RuntimeError, match="randomness error mode"):
            torch.func.vmap(lambda x: function(x, P, True))(x)
        same = torch.func.vmap(lambda x: function(x, P, True), randomness="same")(x)
        assert torch.equal(same[0], same[1])
        different = torch.func.vmap(lambda x: function(x, P, True), randomness="different")(x)
        assert not torch.equal(different[0], different[1])
        for p, training in ((P, False), (0.0, True), (1.0, True)):
            torch.func.vmap(lambda x, p=p, training=training: function(x, p, training))(x)

    @for_functions
    def test_compiles_to_eagers_masks(self, name):
        function, x = getattr(fd, name), ones(name)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: function(x, P, True), fullgraph=True, backend="aot_eager")
        torch.manual_seed(1)
        got = compiled(x)
        torch.manual_seed(1)
        torch.testing.assert_close(got, function(x, P, True))

    @for_functions
    def test_modes_see_torchs_function(self, name):
        class Log(torch.overrides.TorchFunctionMode):
            seen = None

            def __torch_function__(self, func, types, args=(), kwargs=None):
                self.seen = self.seen or func
                return func(*args, **(kwargs or {}))

        x, key = ones(name), fd.key(1)
        with Log() as log:
            getattr(fd, name)(x, P, True)
        assert log.seen is getattr(F, name)
        with Log() as log:
            getattr(fd, name)(x, P, True, key=key)
        assert log.seen is getattr(fd, name)

    @for_functions
    def test_what_is_not_fused(self, name, key):
        class Mine(torch.Tensor):
            pass

        assert type(getattr(fd, name)(ones(name).as_subclass(Mine), P, True)) is Mine
        assert getattr(fd, name)(ones(name, device="meta"), P, True).is_meta
        with pytest.raises(TypeError, match="on meta"):
            getattr(fd, name)(ones(name, device="meta"), P, True, key=key.to("meta"))

    @for_functions
    def test_bad_keys(self, name, key):
        for bad, error in ((key[:1], ValueError), (key.long(), ValueError), (3, TypeError)):
            with pytest.raises(error, match="key has to be a uint64 tensor"):
                getattr(fd, name)(ones(name), P, True, key=bad)
        with pytest.raises(ValueError, match="both"):
            getattr(fd, name)(ones(name), P, True, key=key, generator=torch.Generator())


class TestModules:
    @for_modules
    def test_is_torchs(self, name):
        ours, theirs = getattr(fd, name)(0.25, True), getattr(nn, name)(0.25, True)
        assert isinstance(ours, getattr(nn, name))
        assert type(ours).__name__ == name
        assert repr(ours) == repr(theirs)
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert not ours.state_dict()
        with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
            getattr(fd, name)(1.5)
        with pytest.raises(TypeError):
            getattr(fd, name)(0.5, False, torch.Generator())

    @for_modules
    def test_calls_its_function(self, name, key):
        function, x = getattr(fd, FUNCTIONS[MODULES.index(name)]), ones(name)
        want = function(x, P, True, key=key)
        m = getattr(fd, name)(P)
        m.key = key
        assert torch.equal(m(x), want)
        assert torch.equal(getattr(fd, name)(P, key=key)(x), want)
        assert m.eval()(x) is x
        m.train().key = None
        m.generator = torch.Generator().manual_seed(4)
        torch.manual_seed(4)
        assert torch.equal(m(x), function(x, P, True))

    @for_modules
    def test_in_place_as_in_torch(self, name):
        x = ones(name)
        assert (getattr(fd, name)(P, inplace=True)(x) is x) == ("Alpha" not in name)

    @for_modules
    def test_torchs_modules_become_fused_by_class(self, name):
        m = getattr(nn, name)(P)
        m.__class__ = getattr(fd, name)
        assert m(ones(name)).shape == ones(name).shape
        assert repr(m) == repr(getattr(nn, name)(P))

    @for_modules
    def test_copies(self, name, key):
        m = getattr(fd, name)(P, generator=torch.Generator().manual_seed(3)).eval()
        for c in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            assert type(c) is type(m)
            assert not c.training
            assert c.generator is not m.generator
            assert torch.equal(c.generator.get_state(), m.generator.get_state())
        m = getattr(fd, name)(P, key=key)
        for c in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), m):
            assert torch.equal(c.key, key)

    def test_repr_of_settings(self, key):
        m = fd.Dropout(0.5, generator=torch.Generator(), noise_shape=(None, 1))
        assert repr(m) == "Dropout(p=0.5, inplace=False, generator=Generator(cpu), noise_shape=(None, 1))"
        assert f"key={key}" in repr(fd.Dropout2d(key=key))

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @for_modules
    def test_script(self, name):
        for options in ({}, {"generator": torch.Generator()}):
            scripted = torch.jit.script(getattr(fd, name)(P, **options))
            assert not torch.equal(scripted(ones(name)), scripted(ones(name)))
            assert torch.equal(scripted.eval()(ones(name)), ones(name))

    def test_fx(self):
        """Modules are leaves, like torch's. A module that is itself traced calls torch's function."""
        traced = torch.fx.symbolic_trace(nn.Sequential(*(getattr(fd, name)(P) for name in MODULES)))
        assert [type(m).__name__ for m in traced.children()] == list(MODULES)
        assert not [node for node in traced.graph.nodes if node.op == "call_function"]
        for name, function in zip(MODULES, FUNCTIONS, strict=True):
            graph = torch.fx.symbolic_trace(getattr(fd, name)(P)).graph
            assert [node.target for node in graph.nodes if node.op == "call_function"] == [getattr(F, function)]


class TestDropPath:
    def test_scripted(self):
        x = torch.ones(2000, 3)
        for scale_by_keep, kept in [(True, 1 / (1 - P)), (False, 1.0)]:
            scripted = torch.jit.script(fd.DropPath(P, scale_by_keep))
            y = scripted(x)
            assert y.unique().tolist() == pytest.approx([0, kept])
            assert torch.equal(y[:, :1].expand_as(y), y)
            assert (y[:, 0] == 0).float().mean() == pytest.approx(P, abs=0.06)
            assert torch.equal(scripted.eval()(x), x)

    def test_is_timms(self):
        assert list(inspect.signature(fd.drop_path).parameters)[:4] == ["x", "drop_prob", "training", "scale_by_keep"]
        assert repr(fd.DropPath(0.25)) == "DropPath(drop_prob=0.250)"
        assert repr(fd.DropPath(generator=torch.Generator())) == "DropPath(drop_prob=0.000, generator=Generator(cpu))"
        assert fd.DropPath().drop_prob == 0.0
        x = torch.ones(4, 3)
        assert fd.DropPath()(x) is fd.DropPath(0.5).eval()(x) is fd.drop_path(x, 0.5) is x

    @for_dtypes
    @pytest.mark.parametrize("scale_by_keep", [True, False])
    def test_drops_samples(self, scale_by_keep, dtype, key, device):
        x = torch.randn(16, 3, 4).to(dtype)
        x[0], x[1] = torch.nan, torch.inf
        y = fd.DropPath(P, scale_by_keep, key=key)(x.to(device))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        product = (x.to(wide) * torch.tensor(contract.scale(P) if scale_by_keep else 1.0, dtype=wide)).to(dtype)
        assert_same(y, torch.where(mask(16, 1, 1), product, torch.zeros((), dtype=dtype)))

    def test_trains(self, key):
        x = torch.randn(16, 3, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: fd.drop_path(x, P, True, False, key=key), x, check_forward_ad=True)

    @pytest.mark.parametrize("scale_by_keep", [True, False])
    def test_what_is_not_fused(self, scale_by_keep):
        class Mine(torch.Tensor):
            pass

        y = fd.drop_path(torch.ones(64, 3).as_subclass(Mine), P, True, scale_by_keep)
        assert type(y) is Mine
        kept = y[(y != 0).all(1)]
        assert 20 < len(kept) < 60
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - P) if scale_by_keep else 1))

    def test_bad_p(self):
        with pytest.raises(ValueError, match="between 0 and 1, but got 2"):
            fd.drop_path(torch.ones(3), 2, True)


class TestMonteCarlo:
    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 64), nn.BatchNorm1d(64), fd.Dropout(0.5), nn.AlphaDropout(0.1), nn.Linear(64, 2)
        )

    def test_dropout_on_and_nothing_else(self):
        model = self.model().eval()
        model[3].train()
        with fd.mc_dropout(model) as same:
            assert same is model
            assert [m.training for m in model] == [False, False, True, True, False]
            assert not model.training
        assert [m.training for m in model] == [False, False, False, True, False]

    def test_restores_after_an_exception(self):
        model = self.model().eval()
        with pytest.raises(KeyError), fd.mc_dropout(model):
            raise KeyError
        assert not any(m.training for m in model.modules())

    def test_reaches_transformer_layers(self):
        """Transformer layers have a fast path for eval mode, which ignores dropout modules."""
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True).eval()
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            assert torch.equal(layer(x), layer(x))
            with fd.mc_dropout(layer):
                assert not torch.equal(layer(x), layer(x))
            assert torch.equal(layer(x), layer(x))

    def test_mean_and_spread(self):
        model, x = self.model().eval(), torch.randn(5, 4)
        torch.manual_seed(7)
        mean, std = fd.mc_predict(model, x, passes=50)
        torch.manual_seed(7)
        with torch.no_grad(), fd.mc_dropout(model):
            outputs = torch.stack([model(x) for _ in range(50)])
        torch.testing.assert_close(mean, outputs.mean(0))
        torch.testing.assert_close(std, outputs.std(0))
        assert (std > 0).all()
        assert not mean.requires_grad
        assert not any(m.training for m in model.modules())

    def test_outputs(self):
        x = torch.ones(4, dtype=torch.float16)
        assert fd.mc_predict(fd.Dropout(0.5).eval(), x, passes=3).mean.dtype == torch.float32
        with pytest.raises(TypeError, match="returned tuple"):
            fd.mc_predict(nn.LSTM(2, 2).eval(), torch.ones(1, 2))
        with pytest.raises(TypeError, match=r"returned torch\.int64"):
            fd.mc_predict(nn.Identity(), torch.arange(3))
        with pytest.raises(ValueError, match="2 or more"):
            fd.mc_predict(self.model(), x, passes=1)
