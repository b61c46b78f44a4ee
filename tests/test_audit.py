"""audit: every site that drops is named, with what it saved, and the model is as it was."""

import copy
import doctest
import importlib
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import dropout as bound_before

import fused_dropout as fd


def line(function, text):
    """The place in this file of the line of a function that holds a text."""
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
    assert [s.saved for s in fd.audit(model, X.detach()).sites] == [0, 16], "no gradient is asked of the first"


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

    report = fd.audit(Model(), torch.randn(3, 4, 8))
    assert [(s.module, s.p, s.train, s.eval) for s in report.out_of_reach] == [
        ("rnn", 0.25, True, False),
        ("attention", 0.3, True, False),
        ("", 0.1, True, True),
    ]
    assert report.sites == report.out_of_reach
    assert "nobody can reach: rnn [LSTM], attention [MultiheadAttention], (model) [test_audit.py:" in str(report)


def test_attention(fused):
    """Saved besides the inputs and the result: the key, and two numbers for each row of the weights."""

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
            return x * x.new_empty(x.shape[0], 1).bernoulli_(0.5)  # which is bernoulli_'s own default

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

    assert [(s.module, s.saved) for s in fd.audit(Model(), X).sites] == [("a", 6 * 4 * 48), ("", 3 * 4 * 48)]


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


def test_an_error_passes_and_leaves_nothing():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError(F.dropout(x))

    before, state = (F.dropout, torch.dropout, F.scaled_dot_product_attention), torch.get_rng_state()
    model = Fails().eval()
    with pytest.raises(KeyError):
        fd.audit(model, X)
    assert (F.dropout, torch.dropout, F.scaled_dot_product_attention) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


def test_keyword_inputs_and_odd_tensors():
    class Model(nn.Module):
        def forward(self, x, *, scale, ids):
            return F.dropout(x * scale, p=0.1, training=self.training), ids

    report = fd.audit(Model(), X, scale=torch.tensor(2.0), ids={"a": torch.arange(3)})
    assert [site.saved for site in report.sites] == [4 * 48]
    assert not fd.audit(nn.Dropout(0.1), torch.ones(2, 0)).on_in_eval


def test_compiled_model_and_checkpoint():
    from torch.utils.checkpoint import checkpoint

    compiled = torch.compile(nn.Sequential(nn.Dropout(0.1)), backend="aot_eager")
    compiled(X)
    assert [(s.module, s.p, s.train) for s in fd.audit(compiled, X).sites] == [("_orig_mod.0", 0.1, True)]

    class Model(nn.Module):
        def forward(self, x):
            return checkpoint(Functional(), x, use_reentrant=False)

    assert [s.saved for s in fd.audit(Model(), X).sites] == [0] * 4, "what is kept is the input of the block"


def test_transformer_table():
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.2, batch_first=True)
    report = fd.audit(model, torch.randn(3, 5, 16), torch.randn(3, 4, 16))
    assert len(report.sites) == (3 + 1) + (4 + 2)
    assert {s.path for s in report.sites} == {"torch", "torch, out of reach"}
    assert not report.on_in_eval
    lines = str(report).splitlines()
    assert lines[0].split() == ["site", "p", "train", "eval", "saved", "path"]
    row = ["decoder.layers.0.dropout1", "[Dropout]", "0.2", "drops", "-", "768", "B", "torch"]
    assert row in [line.split() for line in lines]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hugging_face_bert(attention, fused):
    """Attention dropout is a functional call there: a conversion of the modules alone misses it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=64, attn_implementation=attention)
    model, ids = transformers.BertModel(config), torch.arange(48).reshape(4, 12)
    output = model.eval()(ids).last_hidden_state
    in_attention = "torch" if attention == "eager" else "torch, out of reach"
    assert [s.path for s in fd.audit(model, ids).sites if s.train] == ["torch", in_attention, "torch", "torch"]
    assert [s.path for s in fd.audit(fd.convert(model), ids).sites if s.train] == [fused, in_attention, fused, fused]
    assert torch.equal(model(ids).last_hidden_state, output)
    fd.revert(model)
    with fd.patched():
        paths = [s.path for s in fd.audit(model, ids).sites if s.train]
        assert paths == [fused, fused if attention == "eager" else in_attention, fused, fused]
        assert torch.equal(model(ids).last_hidden_state, output)


def test_examples_of_the_docstrings():
    module = importlib.import_module("fused_dropout.audit")
    outcome = doctest.testmod(module, extraglobs={"fd": fd, "torch": torch, "F": F, "nn": nn})
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_compiles_after_the_first_audit():
    """In a fresh process, where nothing has imported the compiler before: it has to meet torch's own functions."""
    code = """if True:
        import torch, fused_dropout as fd
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout())
        fd.audit(model, torch.ones(2, 4))
        torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 4))
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
