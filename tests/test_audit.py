"""audit names every dropout site and its saved bytes, and leaves the model unchanged."""

import contextlib
import copy
import functools
import inspect
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import dropout as bound_before
from torch.utils.checkpoint import checkpoint

import fused_dropout as fd


def line(function, text):
    """File name and number of the line of a function that contains a text."""
    lines, start = inspect.getsourcelines(function)
    return f"test_audit.py:{start + next(i for i, code in enumerate(lines) if text in code)}"


def rows(report):
    return [(s.module, s.call, s.p, s.train, s.eval, s.saved, s.path) for s in report.sites]


@pytest.fixture
def fused(info):
    return f"fused, {info.devices['cpu']}"


class Functional(nn.Module):
    def forward(self, x):
        x = F.dropout(x, 0.1)  # on in eval
        x = F.dropout(x, 0.2, self.training) + torch.dropout(x, 0.3, self.training)
        return F.alpha_dropout(x, 0.4, training=self.training)


class OwnMask(nn.Module):
    def forward(self, x):
        mask = x.new_empty(x.shape[0], 1).bernoulli_(0.75)
        return x * mask.div_(0.75)


X = torch.ones(6, 8, requires_grad=True)


def test_modules_of_torch_and_fused(fused):
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 8), fd.Dropout(0.2), nn.Identity(), nn.Dropout(0))
    assert rows(fd.audit(model, X)) == [
        ("0", "Dropout", 0.1, True, False, 4 * 48, "torch"),
        ("2", "Dropout", 0.2, True, False, 16, fused),
    ]
    with fd.patched():
        assert [s.path for s in fd.audit(model, X).sites] == [fused, fused]
    assert [s.saved for s in fd.audit(fd.convert(model), X).sites] == [16, 16]
    assert [s.saved for s in fd.audit(model, X.detach()).sites] == [0, 16], "the first needs no gradient"


def test_the_whole_family(fused):
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    kinds = [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout]
    model = nn.Sequential(*(kind(0.2) for kind in kinds))
    assert [(s.p, s.path) for s in fd.audit(model, x).sites] == [(0.2, "torch")] * 4
    assert [(s.p, s.saved, s.path) for s in fd.audit(fd.convert(model), x).sites] == [(0.2, 16, fused)] * 4
    assert rows(fd.audit(fd.DropPath(0.3), x)) == [("", "DropPath", 0.3, True, False, 16, fused)]


def test_calls_by_file_and_line(fused):
    both = line(Functional.forward, "0.2, ")
    sites = [
        ("", line(Functional.forward, "on in eval"), 0.1, True, True),
        ("", both, 0.2, True, False),
        ("", both, 0.3, True, False),
        ("", line(Functional.forward, "alpha"), 0.4, True, False),
    ]
    plain = rows(fd.audit(Functional(), X))
    assert [row[:5] for row in plain] == sites
    assert {row[6] for row in plain} == {"torch"}
    with fd.patched():
        assert rows(fd.audit(Functional(), X)) == [(*site, 16, fused) for site in sites]


def test_left_on_in_eval_is_flagged():
    report = fd.audit(Functional(), X)
    assert [site.p for site in report.on_in_eval] == [0.1]
    assert "dropout is on in eval mode: (model) [test_audit.py:" in str(report)
    assert not fd.audit(nn.Dropout(), X).on_in_eval
    assert "eval mode" not in str(fd.audit(nn.Dropout(), X))


def test_out_of_reach():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 8, 2, dropout=0.25)
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.3)

        def forward(self, x):
            x, _ = self.rnn(x)
            x, _ = self.attention(x, x, x, need_weights=False)
            return F.scaled_dot_product_attention(x, x, x, None, 0.1)

    report = fd.audit(Model().double(), torch.randn(3, 4, 8).double())
    assert [(s.module, s.p, s.train, s.eval) for s in report.out_of_reach] == [
        ("rnn", 0.25, True, False),
        ("attention", 0.3, True, False),
        ("", 0.1, True, True),
    ]
    assert report.sites == report.out_of_reach
    assert "out of reach: rnn [LSTM], attention [MultiheadAttention], (model) [test_audit.py:" in str(report)
    assert not report.advice
    assert not fd.audit(nn.GRU(8, 8, 1), torch.randn(3, 4, 8)).sites


def test_attention(fused):
    """Attention saves the key and two numbers per row of the weights, in addition to inputs and result."""

    class Calls(nn.Module):
        def forward(self, x):
            x = F.scaled_dot_product_attention(x, x, x, None, 0.1)
            return fd.scaled_dot_product_attention(x, x, x, dropout_p=0.2)

    x = torch.randn(3, 2, 4, 8, requires_grad=True)
    sites = [(line(Calls.forward, f"0.{p}"), p / 10, True, True) for p in (1, 2)]
    ours = [("", *site, 16 + 8 * 3 * 2 * 4, fused) for site in sites]
    with fd.patched():
        assert rows(fd.audit(Calls(), x)) == ours
        heads = nn.MultiheadAttention(8, 2, dropout=0.3)
        report = fd.audit(heads, *[x[:, 0]] * 3, need_weights=False)
    assert rows(report) == [("", "MultiheadAttention", 0.3, True, False, 16 + 8 * 4 * 2 * 3, fused)]
    assert not report.out_of_reach
    assert rows(fd.audit(Calls(), x))[1:] == ours[1:]
    assert fd.audit(Calls(), x.detach()).sites[1].saved == 0
    assert fd.audit(Calls(), x.double()).sites[1].path == "torch, out of reach"


def test_attention_with_weights(fused):
    attention, x = nn.MultiheadAttention(8, 2, dropout=0.3), torch.randn(3, 4, 8)
    assert [s.path for s in fd.audit(attention, x, x, x).sites] == ["torch"]
    with fd.patched():
        assert rows(fd.audit(attention, x, x, x)) == [("", "MultiheadAttention", 0.3, True, False, 16, fused)]


def test_masks_of_ones_own():
    assert rows(fd.audit(OwnMask(), X)) == [
        ("", line(OwnMask.forward, "bernoulli"), 0.25, True, True, 4 * 6, "own code, aten::bernoulli_")
    ]

    class Half(nn.Module):
        def forward(self, x):
            return x * x.new_empty(x.shape[0], 1).bernoulli_(0.5)  # 0.5 is the default of bernoulli_

    assert [site.p for site in fd.audit(Half(), X).on_in_eval] == [0.5]

    class Uniform(nn.Module):
        def forward(self, x):
            return x * (torch.rand_like(x) < 0.5)

    report = fd.audit(Uniform(), X)
    assert [(s.p, s.eval, s.saved) for s in report.sites] == [(None, True, None)]
    assert not report.on_in_eval, "it may be anything"


def test_names_bound_before(fused):
    class Model(nn.Module):
        def forward(self, x):
            return bound_before(x, 0.2, self.training)

    assert [(s.p, s.train, s.eval, s.saved, s.path) for s in fd.audit(Model(), X).sites] == [
        (0.2, True, False, 4 * 48, "torch")
    ]
    call = fd.dropout

    class Fused(nn.Module):
        def forward(self, x):
            return call(x, 0.2, self.training)

    assert [(s.p, s.train, s.eval, s.path) for s in fd.audit(Fused(), X).sites] == [(0.2, True, False, fused)]


def test_what_never_drops_is_there():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Dropout(0.1), nn.Dropout(0.2)

        def forward(self, x):
            return self.used(x)

    assert [(s.module, s.train, s.path) for s in fd.audit(Model(), X).sites] == [
        ("used", True, "torch"),
        ("unused", False, "-"),
    ]


def test_shared_module_and_loops():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Dropout(0.1)

        def forward(self, x):
            for _ in range(3):
                x = F.dropout(self.b(self.a(x)), 0.2, self.training)
            return x

    assert [(s.module, s.times, s.saved) for s in fd.audit(Model(), X).sites] == [
        ("a", 6, 6 * 4 * 48),
        ("", 3, 3 * 4 * 48),
    ]


def test_one_row_a_line_and_rate():
    class Model(nn.Module):
        def forward(this, x):
            x = F.dropout(x, 0.1) + F.dropout(x, 0.1) + F.dropout(x, 0.2)
            for p in (0.1, 0.2):
                x = F.dropout(x, p)
            return x

    model = nn.Sequential(Model(), Model())
    assert [(s.module, s.p, s.times) for s in fd.audit(model, X).sites] == [
        (name, *row) for name in "01" for row in ((0.1, 2), (0.2, 1), (0.1, 1), (0.2, 1))
    ]


@pytest.mark.parametrize("patched", [False, True])
def test_nothing_is_left_behind(patched):
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5, inplace=True), Functional(), nn.Linear(8, 1))
    model[1].eval()
    model(X).sum().backward()
    torch.manual_seed(3)
    if patched:
        fd.patch()
    names = {(m, n): f for m in (F, torch, fd, fd.functional) for n, f in vars(m).items() if "drop" in n}
    before = copy.deepcopy((model.state_dict(), [m.training for m in model.modules()], torch.get_rng_state()))
    gradients = [p.grad.clone() for p in model.parameters()]
    x = X.detach().clone()
    fd.audit(model, x)
    state, flags, rng = before
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(x, X)
    assert all(vars(module)[name] is function for (module, name), function in names.items())
    fd.unpatch()


class Changes(nn.Module):
    """A module that changes everything that audit restores, and raises in the given mode."""

    def __init__(self, fails_in=None):
        super().__init__()
        self.norm, self.frozen, self.fails_in = nn.BatchNorm1d(8), nn.BatchNorm1d(8).eval(), fails_in
        self.drop = fd.Dropout(0.1, generator=torch.Generator().manual_seed(1))
        self.register_buffer("late", None)
        self.register_buffer("count", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.late, self.count = x.detach(), self.count + 1
        y = F.dropout(self.drop(self.frozen(self.norm(x))), random.random() / 2)
        if self.training is self.fails_in:
            raise KeyError(y)
        return y

    def step(self, x):
        y = self(x)
        y.sum().backward()
        return y


@pytest.mark.parametrize("fails_in", [None, True, False])
@pytest.mark.parametrize("has_gradients", [True, False])
def test_all_is_put_back(fails_in, has_gradients):
    model = Changes()
    if has_gradients:
        model.step(X)
    model.fails_in = fails_in
    parameters, names = list(model.parameters()), (F.dropout, torch.dropout, F.scaled_dot_product_attention)
    gradients = [p.grad for p in parameters]

    def state():
        tensors = dict(model.named_buffers()) | model.state_dict() | {"gradients": gradients}
        randoms = torch.get_rng_state(), model.drop.generator.get_state()
        flags = [m.training for m in model.modules()]
        return {"tensors": tensors, "torch": randoms, "python": random.getstate(), "flags": flags, "late": model.late}

    before = copy.deepcopy(state())
    for function in (model, model.step):
        with pytest.raises(KeyError) if fails_in is not None else contextlib.nullcontext():
            fd.audit(function, X)
        torch.testing.assert_close(state(), before, rtol=0, atol=0)
        assert all(p.grad is gradient for p, gradient in zip(parameters, gradients, strict=True))
        assert (F.dropout, torch.dropout, F.scaled_dot_product_attention) == names


def test_keyword_inputs_and_odd_tensors():
    class Model(nn.Module):
        def forward(self, x, *, scale, ids):
            return F.dropout(x * scale, p=0.1, training=self.training), ids

    report = fd.audit(Model(), X, scale=torch.tensor(2.0), ids={"a": torch.arange(3)})
    assert [site.saved for site in report.sites] == [4 * 48]
    assert not fd.audit(nn.Dropout(0.1), torch.ones(2, 0)).on_in_eval


def test_compiled_model():
    compiled = torch.compile(nn.Sequential(nn.Dropout(0.1)), backend="aot_eager")
    compiled(X)
    assert [(s.module, s.p, s.train) for s in fd.audit(compiled, X).sites] == [("_orig_mod.0", 0.1, True)]
    fused = torch.compile(nn.Sequential(nn.Linear(X.shape[-1], 2), fd.Dropout(0.1), nn.Linear(2, 2)), backend="eager")
    assert [site.saved for site in fd.audit(fused, X).sites] == [16]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["torch", "converted"])
def test_checkpoint(reentrant, way):
    """A checkpoint keeps the input of the block and no mask. A recomputation does not count as a call."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.outside = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 8)), nn.Dropout(0.1)

        def forward(self, x):
            return self.outside(checkpoint(self.inside, x, use_reentrant=reentrant))

        def step(self, x):
            self(x).sum().backward()

    model = fd.convert(Model()) if way == "converted" else Model()
    for report in (fd.audit(model, X), fd.audit(model.step, X)):
        first, last = report.sites
        assert (first.module, first.checkpointed, first.saved, first.torch_saved, first.times) == (
            "inside.0",
            True,
            0,
            0,
            1,
        )
        assert (last.checkpointed, last.saved, last.torch_saved) == (False, 16 if way == "converted" else 192, 192)
        assert [line.count("checkpointed") for line in str(report).splitlines()][:4] == [0, 0, 1, 0]


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))

    def forward(self, x):
        return F.dropout(self.body(x), 0.2, self.training)

    def training_step(self, batch, index):
        return self(batch[0]).sum() + index


def test_a_function_in_place_of_the_model():
    model = Trained().eval()
    names = [("body.1", True, False), ("", True, False)]

    def rows(report):
        return [(s.module, s.train, s.eval) for s in report.sites]

    def step(x):
        return model(F.dropout(x, 0.3, model.training))

    for function in (model.training_step, functools.partial(model.training_step, index=0)):
        report = fd.audit(function, [X], *([0] if function == model.training_step else []))
        assert rows(report) == names
        assert report.evaluated
        assert report.advice.startswith("next: fd.convert(model) would fuse 1")
    assert rows(fd.audit(step, X, of=model)) == [("(function)", True, False), *names]
    assert not model.training
    # audit cannot know the module of a plain function, so it leaves the flags alone.
    assert not fd.audit(step, X).sites
    report = fd.audit(lambda x: F.dropout(x, 0.3), X)
    assert rows(report) == [("(function)", True, False)]
    assert "of=model" in str(report)
    rnn = nn.LSTM(8, 8, 2, dropout=0.1)
    assert [s.p for s in fd.audit(lambda x: rnn(x), X).out_of_reach] == [0.1]
    assert not report.on_in_eval


@pytest.mark.parametrize("model", [3, None])
def test_what_it_takes(model):
    with pytest.raises(TypeError, match=f"^model has to be an nn.Module or a function, but is {model}$"):
        fd.audit(model, X)
    with pytest.raises(TypeError, match=r"^model has to be an nn.Module, but is 3$"):
        fd.audit(print, X, of=3)


def test_transformer_table():
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.2, batch_first=True)
    report = fd.audit(model, torch.randn(3, 5, 16), torch.randn(3, 4, 16))
    assert len(report.sites) == (3 + 1) + (4 + 2)
    assert {s.path for s in report.sites} == {"torch"}
    assert not report.on_in_eval
    lines = str(report).splitlines()
    assert lines[1].split() == ["site", "p", "train", "eval", "times", "saved", "path"]
    row = ["decoder.layers.0.dropout1", "[Dropout]", "0.2", "drops", "-", "1", "768", "B", "torch"]
    assert row in [line.split() for line in lines]


def test_first_and_last_line(fused):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Dropout(0.2), nn.Dropout(0))
            self.attention, self.rnn = nn.MultiheadAttention(8, 2, dropout=0.1), nn.GRU(8, 8, 2, dropout=0.1)

        def forward(self, x):
            x = F.dropout(self.layers(x), 0.1, self.training)[None]
            return self.rnn(self.attention(x, x, x, need_weights=False)[0])

    model, x = Model(), torch.randn(512, 8)

    def ends():
        lines = str(fd.audit(model, x)).splitlines()
        return lines[0], lines[-1]

    assert ends() == (
        "0 of 5 sites fused, 48 KiB kept for backward, unknown at 2",
        "next: fd.convert(model) would fuse 2 of these sites, fd.patch() would fuse 4",
    )
    fd.convert(model)
    assert ends() == (
        "2 of 5 sites fused, 48 KiB to 16 KiB kept for backward, unknown at 2",
        "next: fd.patch() would fuse 2 of these sites",
    )
    with fd.patched():
        first, last = ends()
    assert first.startswith("4 of 5 sites fused")
    assert last == "out of reach: rnn [GRU]"
    assert str(fd.audit(nn.Linear(8, 8), x)) == "nothing dropped"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Dropout", (2, 3, 4)),
        ("Dropout1d", (2, 3, 4)),
        ("Dropout1d", (3, 4)),
        ("Dropout2d", (2, 3, 4, 4)),
        ("Dropout3d", (2, 3, 4, 4, 4)),
        ("Dropout3d", (3, 4, 4, 4)),
        ("AlphaDropout", (2, 3, 4)),
        ("FeatureAlphaDropout", (2, 3, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_torchs_dropout(name, shape, dtype):
    """``torch_saved`` of a fused site equals the bytes that torch's module saves."""
    model, x = nn.Sequential(getattr(nn, name)(0.2)), torch.ones(shape, dtype=dtype, requires_grad=True)
    (before,), (after,) = fd.audit(model, x).sites, fd.audit(fd.convert(model), x).sites
    assert before.saved == before.torch_saved == after.torch_saved > 0
    assert after.saved == 16
    assert fd.audit(model, x.detach()).sites[0].torch_saved == 0


def test_bytes_of_dropout_and_its_neighbours(fused):
    """In addition to inputs and results, dropout_add and dropout_linear save a key, and relu_dropout saves nothing."""
    model = nn.Sequential(fd.ReLUDropout(0.1), fd.DropoutLinear(8, 8, p=0.1))
    model.add = fd.DropoutAdd(0.1)
    model.forward = lambda x: model.add(model[1](model[0](x)), x)
    sites = {site.call: (site.saved, site.torch_saved, site.path) for site in fd.audit(model, X).sites}
    assert sites == {
        "ReLUDropout": (0, 192, fused),
        "DropoutLinear": (16, 192, fused),
        "DropoutAdd": (16, 192, fused),
    }
    layer = fd.convert(nn.TransformerEncoderLayer(8, 2, 8, 0.1), fuse=True)
    sites = [(s.call, s.times, s.saved) for s in fd.audit(layer, X[None]).sites if s.call != "MultiheadAttention"]
    assert sites == [("TransformerEncoderLayer", 3, 32)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hugging_face_bert(attention, fused):
    """BERT's attention dropout is a functional call, so a conversion of the modules alone misses it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=64, attn_implementation=attention)
    model, ids = transformers.BertModel(config), torch.arange(48).reshape(4, 12)
    output = model.eval()(ids).last_hidden_state
    assert [s.path for s in fd.audit(model, ids).sites if s.train] == ["torch"] * 4
    assert [s.path for s in fd.audit(fd.convert(model), ids).sites if s.train] == [fused, "torch", fused, fused]
    assert torch.equal(model(ids).last_hidden_state, output)
    fd.revert(model)
    with fd.patched():
        assert [s.path for s in fd.audit(model, ids).sites if s.train] == [fused] * 4
        assert torch.equal(model(ids).last_hidden_state, output)


def test_compiles_after_the_first_audit():
    """In a new process, where the compiler is not imported yet. Its import has to find torch's own functions."""
    code = """if True:
        import torch, fused_dropout as fd
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout())
        fd.audit(model, torch.ones(2, 4))
        torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 4))
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
