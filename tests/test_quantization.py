"""Quantization: torch gives the same modules and nodes for a converted model as for the original."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import fused_dropout as fd

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="no engine"),
]
X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """All kinds of dropout, between layers that torch quantizes."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.relu, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.1)
        self.channels = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.Dropout2d(0.1), nn.Conv2d(4, 4, 1), nn.FeatureAlphaDropout(0.1)
        )
        self.volume, self.line = nn.Dropout3d(0.1), nn.Dropout1d(0.1)
        self.head = nn.Sequential(
            nn.Linear(36, 8), nn.Dropout(0.2), nn.Linear(8, 8), nn.AlphaDropout(0.1), nn.Linear(8, 2)
        )
        self.lost = nn.Dropout(0)

    def forward(self, x):
        x = self.drop(self.relu(self.conv(self.quant(x))))
        x = self.line(self.volume(self.channels(x)).flatten(2))
        return self.dequant(self.lost(self.head(x)))


def eager_static(model):
    model.eval().qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(model)
    prepared(X)
    return prepared, quantization.convert(prepared)


def eager_dynamic(model):
    return (quantization.quantize_dynamic(model.eval(), {nn.Linear}),)


def eager_qat(model):
    model.train().qconfig = quantization.get_default_qat_qconfig("x86")
    prepared = quantization.prepare_qat(model)
    prepared.eval()(X)
    return prepared, quantization.convert(prepared)


def fx_static(model):
    prepared = quantize_fx.prepare_fx(model.eval(), quantization.get_default_qconfig_mapping("x86"), (X,))
    prepared(X)
    return prepared, quantize_fx.convert_fx(copy.deepcopy(prepared))


def fx_per_type(model):
    mapping = quantization.get_default_qconfig_mapping("x86").set_object_type(nn.Dropout, None)
    prepared = quantize_fx.prepare_fx(model.eval(), mapping, (X,))
    prepared(X)
    return prepared, quantize_fx.convert_fx(copy.deepcopy(prepared))


def fx_dynamic(model):
    mapping = quantization.QConfigMapping().set_global(quantization.default_dynamic_qconfig)
    prepared = quantize_fx.prepare_fx(model.eval(), mapping, (X,))
    return prepared, quantize_fx.convert_fx(copy.deepcopy(prepared))


def fx_qat(model):
    mapping = quantization.get_default_qat_qconfig_mapping("x86")
    prepared = quantize_fx.prepare_qat_fx(model.train(), mapping, (X,))
    prepared.eval()(X)
    return prepared, quantize_fx.convert_fx(copy.deepcopy(prepared))


FLOWS = [eager_static, eager_dynamic, eager_qat, fx_static, fx_per_type, fx_dynamic, fx_qat]


def described(model):
    """Names and classes of the modules, and the code of an FX graph, but no values of observers."""
    kinds = [
        (name, type(m).__name__ if "GraphModule" in str(type(m)) else type(m)) for name, m in model.named_modules()
    ]
    return kinds, getattr(model, "code", "")


@pytest.mark.parametrize("flow", FLOWS)
def test_as_the_original(flow):
    torch.manual_seed(0)
    original = Net()
    model = fd.convert(copy.deepcopy(original))
    for got, want in zip(flow(model), flow(original), strict=True):
        assert described(got) == described(want)
        assert torch.equal(got.eval()(X), want.eval()(X))


@pytest.mark.parametrize("flow", FLOWS)
def test_pairs_and_fused_layers(flow):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 8, 0.1))
    # quantize_dynamic selects linear layers by their class, before it sets qconfig.
    model = fd.convert(copy.deepcopy(original), pair_linears=flow is not eager_dynamic, fuse=True)
    if flow is not eager_dynamic:  # torch's observers do not support this layer
        original, model = original[:2], model[:2]
    for got, want in zip(flow(model), flow(original), strict=True):
        assert described(got) == described(want)


def test_what_is_prepared_stays_torchs(caplog):
    model = fd.convert(Net().train())
    (prepared, _) = eager_qat(model)
    assert type(model.drop) is fd.Dropout, "prepare copies the model"
    report = fd.convert_report(fd.convert(prepared))
    assert type(prepared.drop) is nn.Dropout
    assert report.left["drop"] == "Dropout that is prepared for quantization"
    assert not report.fused
    assert not report.torch
    caplog.clear()
    fd.convert(eager_static(Net())[1])
    assert "left alone" not in caplog.text


def test_subclasses_stay():
    class Mine(fd.Dropout):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Mine(0.1)).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(model)
    assert type(prepared[1]) is Mine
    assert prepared[1].qconfig is not None


@pytest.mark.parametrize("training", [False, True])
def test_export(training):
    """PT2E quantization starts with this exported graph."""
    torch.manual_seed(0)
    model = Net().train(training)
    want = torch.export.export(model, (X,)).graph_module.code
    assert torch.export.export(fd.convert(model), (X,)).graph_module.code == want
