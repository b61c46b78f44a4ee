"""``convert(model, fuse=True)``: layers that call dropout_add and relu_dropout. Transformers and timm: tests/models."""

import copy
import functools
import importlib.util
import io
import pickle
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd
from fused_dropout.swap import fusing

LAYERS = [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer]
for_layers = pytest.mark.parametrize("kind", LAYERS, ids=["encoder", "decoder"])


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The names of the functions that fused layers call."""
    made = []
    for name in ("dropout_add", "relu_dropout"):
        function = getattr(fusing, name)
        monkeypatch.setattr(fusing, name, lambda *a, f=function, n=name, **k: made.append(n) or f(*a, **k))
    return made


def layer(kind=nn.TransformerEncoderLayer, **settings):
    torch.manual_seed(0)
    return kind(16, 2, 32, **{"dropout": 0.3, "batch_first": True, **settings})


def fused(model):
    return fd.convert(copy.deepcopy(model), fuse=True)


def is_fused(module):
    return isinstance(module, fusing.FusedLayer)


def step(model, call=None, dtype=torch.float32, **masks):
    """Output, gradients of inputs and parameters, and the state of the generator after a step."""
    torch.manual_seed(1)
    model.zero_grad()
    inputs = [torch.randn(3, 5, 16).to(dtype).requires_grad_()]
    if isinstance(model, (nn.TransformerDecoderLayer, nn.Transformer)):
        inputs.append(torch.randn(3, 5, 16).to(dtype).requires_grad_())
    y = (model if call is None else call)(*inputs, **masks)
    if y.requires_grad:
        y.sin().sum().backward()
    return [y.detach(), *(t.grad for t in (*inputs, *model.parameters()) if t.grad is not None), torch.get_rng_state()]


def assert_same_steps(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
        assert x.stride() == y.stride()


def expected(kind, relu):
    """The calls of a layer: an encoder layer has one sum for attention, a decoder layer two. Both have one after the
    feed-forward network."""
    sums = 1 if kind is nn.TransformerEncoderLayer else 2
    return ["dropout_add"] * sums + ["relu_dropout"] * relu + ["dropout_add"]


@for_layers
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("activation", "relu"),
    [("relu", True), ("gelu", False), (nn.ReLU(), True), (torch.relu, True), (F.silu, False), (nn.ReLU6(), False)],
    ids=["relu", "gelu", "nn.ReLU", "torch.relu", "silu", "ReLU6"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_step(kind, norm_first, batch_first, activation, relu, dtype, calls):
    settings = {"norm_first": norm_first, "batch_first": batch_first, "activation": activation}
    # No copy: in torch 2.13 a copied decoder layer uses ReLU if its activation is a module.
    got = step(fd.convert(layer(kind, **settings).to(dtype), fuse=True), dtype=dtype)
    assert calls == expected(kind, relu)
    assert_same_steps(got, step(fd.convert(layer(kind, **settings).to(dtype)), dtype=dtype))
    assert calls == expected(kind, relu)


@for_layers
def test_same_step_as_patched(kind, calls):
    """Also the same as converted. Attention's own dropout is a function, which only the patch replaces."""
    model = layer(kind)
    with fd.patched():
        assert_same_steps(step(fused(model)), step(model))
    assert_same_steps(step(fused(model)), step(fd.convert(copy.deepcopy(model))))
    assert calls == 2 * expected(kind, True)


def test_without_biases(calls):
    model = layer(bias=False)
    assert_same_steps(step(fused(model)), step(fd.convert(model)))
    assert calls == expected(type(model), True)


@pytest.mark.parametrize(
    "masks",
    [
        {"src_mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True},
        {"src_mask": torch.eye(5, dtype=torch.bool)},
        {"src_key_padding_mask": torch.arange(5).expand(3, 5) > 2},
        {"src_mask": torch.zeros(5, 5), "src_key_padding_mask": torch.arange(5).expand(3, 5) > 2},
    ],
    ids=["causal", "bool", "padding", "both"],
)
def test_masks(masks, calls):
    model = layer()
    assert_same_steps(step(fused(model), **masks), step(fd.convert(model), **masks))
    assert calls == expected(type(model), True)


@for_layers
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_and_all_dropped(kind, p, calls):
    model = layer(kind, dropout=p)
    assert_same_steps(step(fused(model)), step(fd.convert(model)))
    assert not calls


def test_without_gradients(calls):
    model = layer()
    with torch.no_grad():
        assert_same_steps(step(fused(model)), step(fd.convert(model)))
    assert calls == expected(type(model), True)


def test_settings_are_read_at_each_call(calls, key):
    """p, key, generator and the training flag of each dropout."""
    model = layer()
    model.dropout1.p = 0.7
    model.dropout2.eval()
    fd.convert(model).dropout.key = key
    assert_same_steps(step(fused(model)), step(model))
    assert calls == ["dropout_add", "relu_dropout"]
    model.dropout1.key, model.dropout2.key = key, fd.key(7)
    model.dropout2.train()
    assert_same_steps(step(fused(model)), step(model))
    for dropout in (model.dropout, model.dropout1):
        dropout.key, dropout.generator = None, torch.Generator().manual_seed(5)
    assert_same_steps(step(fused(model)), step(copy.deepcopy(model)))


@for_layers
def test_eval_is_torchs_own(kind, calls, monkeypatch):
    """Eval mode runs torch's code, with its fast path and nested tensors."""
    monkeypatch.delattr(fusing.FusedLayer, "_fused_dropout_sum")  # the rewritten forward would fail without it
    model = layer(kind).eval()
    net = fused(model)
    assert_same_steps(step(net), step(model))
    if kind is nn.TransformerEncoderLayer:
        with torch.no_grad():
            nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(2, 16)])
            got = net(nested)
            assert got.is_nested
            assert torch.equal(got.to_padded_tensor(0), model(nested).to_padded_tensor(0))
    assert not calls


def test_a_whole_transformer(calls):
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 2, 2, 32, dropout=0.2, batch_first=True)
    got = step(fused(model))
    assert calls == 2 * expected(LAYERS[0], True) + 2 * expected(LAYERS[1], True)
    assert_same_steps(got, step(fd.convert(model)))


def test_autocast_goes_to_the_separate_calls(calls):
    """If the dtypes of the two terms differ, dropout_add adds them as torch does."""
    model = layer(norm_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_steps(step(fused(model)), step(fd.convert(model)))
    assert calls == expected(type(model), True)


@for_layers
def test_saves_less(kind):
    """The result of ReLU is not kept in addition to that of its dropout."""

    def saved(model):
        sizes = {}
        pack = lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t  # noqa: E731
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or pack(t), lambda t: t):
            inputs = [torch.ones(3, 5, 16, requires_grad=True)] * (1 if kind is LAYERS[0] else 2)
            assert model(*inputs).requires_grad
        return sum(sizes.values())

    model = layer(kind)
    assert saved(fused(model)) == saved(fd.convert(model)) - 3 * 5 * 32 * 4 - 16  # and the key of its dropout


def test_nothing_else_changes():
    model = layer()
    model.register_forward_hook(lambda *_: None)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    text, state, kinds = (
        repr(fd.convert(copy.deepcopy(model))),
        list(model.state_dict()),
        list(map(type, model.modules())),
    )
    for _ in range(2):
        for _ in range(2):  # the second time changes nothing
            assert fd.convert(model, fuse=True) is model
            assert is_fused(model)
            assert isinstance(model, nn.TransformerEncoderLayer)
            assert type(model).__name__ == "TransformerEncoderLayer"
            assert type(model).__mro__.count(fusing.FusedLayer) == 1
            assert repr(model) == text
            assert list(model.state_dict()) == state
            assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
        fd.revert(model)
        assert list(map(type, model.modules())) == kinds
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m, 0)), saved_and_loaded],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies(copied, calls):
    model = fused(layer())
    want = step(model)
    twin = copied(model)
    assert type(twin) is type(model)
    calls.clear()
    assert_same_steps(step(twin), want)
    assert calls == expected(LAYERS[0], True)
    assert type(fd.revert(twin)) is nn.TransformerEncoderLayer
    assert is_fused(model)


def test_loaded_where_the_class_changed(monkeypatch, calls):
    """A pickled fused layer loads as a layer of the original class if the class's source is no longer known."""
    model = layer()
    data = pickle.dumps(fused(model))
    own = nn.TransformerEncoderLayer.forward
    monkeypatch.setattr(nn.TransformerEncoderLayer, "forward", lambda self, *a, **k: own(self, *a, **k))
    twin = pickle.loads(data)
    assert type(twin) is nn.TransformerEncoderLayer
    assert_same_steps(step(twin), step(fd.convert(model)))
    assert not calls


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, calls):
    """The compiler sees the separate calls, and the masks are those of eager."""
    model = fused(layer())
    want = step(model)
    calls.clear()
    torch.compiler.reset()
    got = step(model, torch.compile(model, backend=backend, fullgraph=True))
    assert not calls
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_recorded(calls):
    """torch.export, torch.jit and FX record the same graph as without fuse."""
    model, x = layer(), torch.randn(3, 5, 16)
    net, plain = fused(model), fd.convert(model)
    program = torch.export.export(net, (x,))
    assert sum("aten.dropout" in str(node.target) for node in program.graph.nodes) == 3
    count = lambda module: str(module.inlined_graph).count("aten::dropout")  # noqa: E731
    assert count(torch.jit.script(net)) == count(torch.jit.script(plain)) > 0
    assert is_fused(net)
    assert count(torch.jit.trace(net, (x,), check_trace=False)) == 3
    assert not calls
    traced = torch.fx.symbolic_trace(nn.Sequential(net))
    assert_same_steps(step(traced), step(plain))
    assert calls == expected(LAYERS[0], True)


def test_transforms(calls):
    model, x = layer(), torch.randn(3, 5, 16)

    def gradient(net):
        torch.manual_seed(1)
        loss = lambda weights: torch.func.functional_call(net, weights, (x,)).sin().sum()  # noqa: E731
        return torch.func.grad(loss)(dict(net.named_parameters()))

    got, want = gradient(fused(model)), gradient(fd.convert(model))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert calls == expected(LAYERS[0], True)


def assert_left(model, reasons, calls):
    """Checks that the model works as without fuse, and that the report gives the reasons."""
    net = fused(model)
    assert_same_steps(step(net), step(fd.convert(model)))
    unfused = fd.convert_report(net).unfused
    assert unfused.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in unfused[name]
    return net


class Mine(nn.TransformerEncoderLayer):
    pass


class MyDropout(nn.Dropout):
    pass


def test_a_subclass_is_left(calls):
    net = assert_left(layer(Mine), {"": "Mine, a subclass of TransformerEncoderLayer"}, calls)
    assert type(net) is Mine
    assert not calls


def test_a_dropout_that_is_not_plain_is_left(calls):
    hooked = nn.Dropout(0.3)
    hooked.register_forward_hook(lambda *_: None)
    replaced = nn.Dropout(0.3)
    replaced.forward = lambda x: x
    for dropout, reason in [
        (hooked, "hooks"),
        (replaced, "with its own forward"),
        (MyDropout(0.3), "MyDropout is not fd.Dropout"),
        (nn.Dropout(0.3, inplace=True), "in place"),
        (fd.Dropout(0.3, noise_shape=(1, None, None)), "noise_shape"),
        (fd.AlphaDropout(0.3), "AlphaDropout is not"),
    ]:
        calls.clear()
        model = layer()
        model.dropout1 = dropout
        assert_left(model, {"dropout1": reason}, calls)
        assert calls == ["relu_dropout", "dropout_add"]
        calls.clear()
        gelu = layer(activation="gelu")
        gelu.dropout1 = gelu.dropout2 = dropout
        net = assert_left(gelu, {"dropout1": reason, "dropout2": reason}, calls)
        assert not calls
        assert not is_fused(net)


def test_a_hook_that_comes_later_sees_all(calls):
    """A later hook on a dropout, or on all modules."""
    net, seen = fused(layer()), []
    want = step(net)
    calls.clear()
    handle = net.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_same_steps(step(net), want)
    assert calls == ["dropout_add", "dropout_add"]
    assert (seen[0] == 0).any()
    assert fd.convert_report(net).layers == {"": "dropout_add: dropout1, dropout2"}
    handle.remove()
    calls.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    assert_same_steps(step(net), want)
    handle.remove()
    assert not calls
    assert {net.dropout, net.dropout1, net.dropout2} <= set(seen[1:])


def test_a_relu_in_place_or_with_hooks_is_left(calls):
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    for activation in (nn.ReLU(inplace=True), hooked):
        calls.clear()
        assert_left(layer(activation=activation), {"dropout": "its ReLU works in place or has hooks"}, calls)
        assert calls == ["dropout_add", "dropout_add"]


def test_a_replaced_forward_is_left(calls):
    model = layer()
    own = model.forward
    model.forward = lambda *a, **k: own(*a, **k)
    fd.convert(model, fuse=True)
    assert type(model) is nn.TransformerEncoderLayer
    assert "replaced on the instance" in fd.convert_report(model).unfused[""]
    model.forward = own  # like after accelerate's remove_hook_from_module
    fd.convert(model, fuse=True)
    assert is_fused(model)
    step(model)
    assert calls == expected(LAYERS[0], True)


def test_a_forward_replaced_later(calls):
    """The new forward still calls the fused one. revert leaves the layer alone until the new forward is removed."""
    net = fused(layer())
    want, own = step(net), net.forward
    net.forward = lambda *a, **k: own(*a, **k)
    assert is_fused(fd.revert(net))
    fd.convert(net)
    assert_same_steps(step(net), want)
    net.forward = own
    assert type(fd.revert(net)) is nn.TransformerEncoderLayer
    assert "forward" not in vars(net)


def test_a_replaced_method_is_left(monkeypatch, calls):
    """A method that is replaced on an instance or in the class, before or after the conversion."""
    model = layer()
    model._ff_block = lambda x: x
    assert_left(model, {"": "its _ff_block was replaced"}, calls)
    net = fused(layer())
    net._sa_block = lambda x, *_, **__: x
    plain = fd.convert(layer())
    plain._sa_block = net._sa_block
    assert_same_steps(step(net), step(plain))
    net = fused(layer())
    own = nn.TransformerEncoderLayer._ff_block
    monkeypatch.setattr(nn.TransformerEncoderLayer, "_ff_block", lambda self, x: own(self, x) * 2)
    assert_same_steps(step(net), step(fd.convert(layer())))
    assert "_ff_block was replaced" in fd.convert_report(net).unfused[""]
    assert not calls
    # A layer that is converted now has a method whose source cannot be read, so one sum is not fused.
    net = fused(layer())
    assert_same_steps(step(net), step(fd.convert(layer())))


def test_a_forward_replaced_in_the_class_is_left(monkeypatch, calls):
    early = fused(layer())
    own = nn.TransformerEncoderLayer.forward
    monkeypatch.setattr(nn.TransformerEncoderLayer, "forward", lambda self, *a, **k: own(self, *a, **k) * 2)
    assert_left(layer(), {"": "TransformerEncoderLayer.forward was replaced"}, calls)
    assert_same_steps(step(early), step(fd.convert(layer())))
    assert not calls


# Sources of other libraries: a file that claims to be part of timm.

HEAD = """
import functools
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.act = nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU()
        self.dropout, self.drop = nn.Dropout(0.3), nn.Dropout(0.4)
        self.end, self.twice, self.plain_end = End(), Twice(), PlainEnd()

    def half(self, x):
        return self.dropout(self.linear(x))

    def pair(self, x):
        return self.dropout(x), x

    def early(self, x):
        if x.dim() == 3:
            return x
        return self.dropout(x)

class End(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(16, 16), nn.Dropout(0.2)

    def forward(self, x, twice=False):
        y = self.linear(x)
        y = self.drop(y)
        return y, x

class Twice(End):
    def forward(self, x):
        y = self.linear(x)
        y = self.drop(y)
        return y, y

class OwnCall(End):
    def __call__(self, x):
        return super().__call__(x * 2)

class Checkpointed(End):
    gradient_checkpointing = True

class PlainEnd(End):
    def forward(self, x):
        return self.drop(self.linear(x))
"""


@pytest.fixture
def library(tmp_path, monkeypatch, request):
    """Makes a layer with a given forward, in a separate file."""
    made = []

    def make(forward, before_forward="", name="timm.made_up"):
        path = tmp_path / f"made_up_{len(made)}.py"
        lines = "".join(f"        {line}\n" for line in forward.strip().splitlines())
        source = HEAD.replace("\nclass End", f"\n{before_forward}    def forward(self, x):\n{lines}\nclass End", 1)
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        made.append(path)
        torch.manual_seed(0)
        return module.Layer()

    return make


KNOWN = {
    "return x + self.dropout(self.linear(x))": ["dropout_add"],
    "return self.dropout(self.linear(x)) + x": ["dropout_add"],
    "y = self.linear(x)\nreturn self.norm(x + self.dropout(x + self.drop(y)))": ["dropout_add", "dropout_add"],
    # The same tensor is dropped and added. Its gradients have to be summed in the order of the separate calls.
    "return x + self.dropout(x)": [],
    "return self.norm(x + self.dropout(x + self.drop(x)))": ["dropout_add"],
    "y = self.dropout(self.linear(x))\ny = y + x\nreturn y * 2": ["dropout_add"],
    "y = self.dropout(self.linear(x))\ny = x + y\nreturn y * 2": ["dropout_add"],
    "y = self.dropout(self.linear(x))\nreturn self.norm(y + x)": ["dropout_add"],
    "y = self.dropout(self.linear(x))\nz = x + y\nreturn z": ["dropout_add"],
    "if x.dim() > 1:\n    y = self.dropout(self.linear(x))\n    x = y + x\nreturn x": ["dropout_add"],
    "for _ in range(2):\n    y = self.dropout(self.linear(x))\n    y = x + y\n    x = y\nreturn x": [
        "dropout_add",
        "dropout_add",
    ],
    "return self.dropout(self.act(self.linear(x)))": ["relu_dropout"],
    "y = self.act(self.linear(x))\ny = self.dropout(y)\nreturn self.linear(y)": ["relu_dropout"],
    "return x + self.half(x)": ["dropout_add"],
    "y, _ = self.end(x)\nx = y + x\nreturn x": ["dropout_add"],
    "y, z = self.end(x, twice=True)\nx = x + y\nreturn x * z": ["dropout_add"],
    "y = self.plain_end(x)\nx = x + y\nreturn x": ["dropout_add"],
    # The result of the layer is unpacked, so its dropout stays in the layer.
    "y, z = self.plain_end(x[:2])\nx = z + y\nreturn z + self.drop(x)": ["dropout_add"],
    # Not fused, because of the layout: the terms have different strides.
    "return self.dropout(x.transpose(0, 1).contiguous().transpose(0, 1)) + x": [],
}
UNKNOWN = [
    "return self.dropout(x) - x",
    "x += self.dropout(x)\nreturn x",
    "return self.dropout(self.linear(x))",
    "y = self.dropout(x)\nz = x + y\nreturn z * y",
    "y = self.dropout(x)\nz = self.linear(x)\nreturn y + z",
    "y = self.dropout(x)\nreturn y + self.drop(x) * y",
    "y = self.dropout(x)\nreturn self.norm(x * 2 + y)",
    "return self.dropout(x) + self.linear(x)",
    "y = self.dropout(x)\nreturn y + y",
    "y = self.end(x)\ny = x + y[0]\nreturn y",
    "y, z = self.pair(x)\ny = x + y\nreturn y + z",
    "y, z = self.end(x)\nw = x + y\nreturn y * w",
    "y, z = self.twice(x)\ny = x + y\nreturn y * z",
    "return x + self.early(x)",
]


def run(model):
    torch.manual_seed(1)
    model.zero_grad()
    x = torch.randn(3, 5, 16, requires_grad=True)
    y = model(x * 1)  # not a leaf, so it may be changed in place
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None), torch.get_rng_state()]


@pytest.mark.parametrize("forward", KNOWN)
def test_forms(forward, library, calls):
    model = library(forward)
    got = run(fused(model))
    assert calls == KNOWN[forward]
    assert_same_steps(got, run(fd.convert(model)))
    assert_same_steps(got, run(fused(model)))


@pytest.mark.parametrize("forward", UNKNOWN)
def test_other_forms_are_left(forward, library, calls):
    model = library(forward)
    net = fused(model)
    assert not is_fused(net)
    assert "no known form" in fd.convert_report(net).unfused[""]
    assert_same_steps(run(net), run(fd.convert(model)))
    assert not calls


def test_other_operands_are_left(library, calls):
    """The order of draws has to stay that of the source, so the second dropout is fused and the first is not."""
    model = library("return self.dropout(x) + self.drop(x)")
    assert_same_steps(run(fused(model)), run(fd.convert(model)))
    assert calls == ["dropout_add"]


@pytest.mark.parametrize("hook", [False, True])
def test_a_layer_at_whose_end_is_a_dropout(hook, library, calls):
    """A hook on such a layer sees the result of its dropout."""
    model, seen = library("y, _ = self.end(x)\nx = y + x\nreturn x"), []
    net = fused(model)
    report = fd.convert_report(net)
    assert report.layers == {"": "dropout_add: end.drop"}
    assert "end" not in report.unfused
    assert "no known form" in report.unfused["twice"]
    if hook:
        net.end.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    assert_same_steps(run(net), run(fd.convert(model)))
    assert calls == ([] if hook else ["dropout_add"])
    if hook:
        assert (seen[0] == 0).any()
        assert "end has hooks" in fd.convert_report(net).unfused["end.drop"]


@pytest.mark.parametrize("kind", ["OwnCall", "Checkpointed"])
def test_a_layer_whose_call_is_more_than_its_forward_is_left(kind, library, calls):
    model = library("y, _ = self.end(x)\nx = y + x\nreturn x")
    model.end = getattr(sys.modules["timm.made_up"], kind)()
    net = fused(model)
    assert not is_fused(net)
    assert "end has" in fd.convert_report(net).unfused["end.drop"]
    assert_same_steps(run(net), run(fd.convert(model)))
    assert not calls


def test_layers_of_others_are_left(library, calls):
    net = fused(library(FORM, name="mine.made_up"))
    assert not is_fused(net)
    assert not fd.convert_report(net).unfused
    run(net)
    assert not calls


FORM = "return x + self.dropout(self.linear(x))"


def test_a_changed_source_is_left(library, calls):
    """The file was changed after its import, so the source at that line is not the code that runs."""
    model = library(FORM)
    path = sys.modules["timm.made_up"].__file__
    Path(path).write_text(Path(path).read_text().replace(FORM, "return x - self.dropout(self.linear(x))"))
    net = fused(model)
    assert not is_fused(net)
    assert fd.convert_report(net).unfused[""] == "the source of Layer.forward is not what runs"
    assert_same_steps(run(net), run(fd.convert(model)))


def test_a_source_that_is_not_there_is_left(library):
    model = library(FORM)
    Path(sys.modules["timm.made_up"].__file__).unlink()
    assert fd.convert_report(fused(model)).unfused[""] == "Layer.forward has no source"


def test_decorated_and_wrapped_forwards_are_left(library, calls):
    """The effect of a decorator is not known, nor is that of a function that wraps forward after its definition."""
    net = fused(library(FORM, before_forward="    @torch.no_grad()\n"))
    assert fd.convert_report(net).unfused[""] == "Layer.forward is decorated with torch.no_grad()"
    model = library(FORM)
    kind = type(model)
    own = kind.forward

    @functools.wraps(own)
    def twice(self, x):
        return own(self, x) * 2

    kind.forward = twice
    net = fused(model)
    assert fd.convert_report(net).unfused[""] == "Layer.forward is wrapped in another function"
    assert_same_steps(run(net), run(fd.convert(model)))
    net = fused(library("super().train\n" + FORM))
    assert fd.convert_report(net).unfused[""] == "Layer.forward uses super() or another closure"
    assert not calls


def test_report(capsys):
    model = nn.Sequential(layer(), layer(Mine), layer(activation="gelu"))
    fuses = "fd.convert(model, fuse=True) fuses "
    report = fd.convert_report(model)
    assert not report.layers
    assert report.unfused == {
        "0": fuses + "dropout_add: dropout1, dropout2; relu_dropout: dropout",
        "1": f"{__name__}.Mine, a subclass of TransformerEncoderLayer",
        "2": fuses + "dropout_add: dropout1, dropout2",
    }
    fd.convert(model, fuse=True, dry_run=True)
    assert "unfused  0" in capsys.readouterr().out
    assert not is_fused(model[0])
    report = fd.convert_report(fd.convert(model, fuse=True))
    assert report.layers == {
        "0": "dropout_add: dropout1, dropout2; relu_dropout: dropout",
        "2": "dropout_add: dropout1, dropout2",
    }
    assert report.unfused.keys() == {"1"}
    assert "layer    0" in str(report)


def test_tracebacks_show_the_librarys_lines():
    net = fused(layer())
    with pytest.raises(Exception, match="7") as caught:
        net(torch.randn(3, 5, 7))
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert any(frame.filename.endswith("transformer.py") and "_sa_block" in frame.line for frame in frames)
