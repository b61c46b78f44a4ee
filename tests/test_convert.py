"""convert, revert, convert_report: the classes of the dropout modules change, and nothing else."""

import copy
import logging
import pickle
import sys
import types

import pytest
import torch
from torch import nn

import fused_dropout as fd

FAMILY = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]


version = tuple(int(part) for part in torch.__version__.split(".")[:2])
sees_classes = pytest.mark.skipif(version < (2, 13), reason="Dynamo does not guard the class of a module")


class Mine(nn.Dropout):
    pass


class DropPath(nn.Module):
    drop_prob = 0.1


def small(p=0.3):
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 8), nn.Dropout(0.1, inplace=True))


def classes(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", FAMILY)
def test_each_of_the_family(name):
    model = nn.Sequential(getattr(nn, name)(0.2))
    assert fd.convert(model) is model
    assert type(model[0]) is getattr(fd, name)
    assert isinstance(model[0], getattr(nn, name))
    x = torch.ones(4, 8, *[2] * {"1d": 1, "2d": 2, "3d": 3}.get(name[-2:], 1))
    torch.manual_seed(1)
    want = getattr(fd, name)(0.2)(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), want)
    assert type(fd.revert(model)[0]) is getattr(nn, name)


def test_a_single_module():
    dropout = nn.Dropout(0.2)
    assert fd.convert(dropout) is dropout
    assert type(dropout) is fd.Dropout
    assert type(fd.revert(dropout)) is nn.Dropout
    assert type(fd.revert(fd.Dropout(0.2))) is nn.Dropout


def test_nothing_else_changes():
    model = small().eval()
    model[1].train()
    model[1].p = 0.7
    model[1].note = "kept"
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    ids = [id(m) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    for change in (fd.convert, fd.revert, fd.convert):
        change(model)
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
        assert [id(m) for m in model.modules()] == ids
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
        assert model.state_dict().keys() == state.keys()
    model(torch.ones(2, 8))
    assert calls == [1]
    assert (model[1](torch.ones(1000)) == 0).float().mean() == pytest.approx(0.7, abs=0.07)


def test_drop_path_of_timm(monkeypatch):
    """A stand-in with timm's attributes; tests/models has the real one."""

    class DropPath(nn.Module):
        def __init__(self, drop_prob=0.0, scale_by_keep=True):
            super().__init__()
            self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    model = nn.Sequential(DropPath(0.5, False), nn.Dropout(0.1))
    assert "DropPath" in fd.convert_report(fd.convert(model)).left["0"]
    monkeypatch.setitem(sys.modules, "timm.layers.drop", types.SimpleNamespace(DropPath=DropPath))
    assert type(fd.convert(model)[0]) is fd.DropPath
    assert set(model[0](torch.ones(64, 3)).flatten().tolist()) == {0.0, 1.0}
    assert fd.convert_report(model).fused.keys() == {"0", "1"}
    assert type(fd.revert(model)[0]) is DropPath


def test_converts_what_was_added_since():
    model = fd.convert(small())
    once = classes(model)
    assert classes(fd.convert(model)) == once
    model.append(nn.Dropout(0.5))
    fd.convert(model)
    assert type(model[-1]) is fd.Dropout
    fd.revert(model)
    assert not any(issubclass(kind, fd.Dropout) for kind in classes(model))
    assert classes(fd.revert(model)) == classes(model)


def test_settings_survive_a_revert(key):
    dropout, x = fd.Dropout(0.5, key=key), torch.ones(100)
    want = dropout(x)
    fd.revert(dropout)
    assert not torch.equal(dropout(x), dropout(x))
    assert torch.equal(fd.convert(dropout)(x), want)


def test_shared_instances():
    shared = nn.Dropout(0.2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    fd.convert(model)
    assert model["a"] is model["b"][0] is shared
    assert type(shared) is fd.Dropout
    assert set(fd.convert_report(model).fused) == {"a", "b.0"}


class DropoutBlock(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Dropout(0.1))


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
def test_what_is_left_alone():
    replaced = nn.Dropout(0.1)
    replaced.forward = lambda x: x  # like accelerate's hooks
    model = nn.ModuleDict(
        {
            "plain": nn.Dropout(0.1),
            "mine": Mine(),
            "replaced": replaced,
            "scripted": torch.jit.script(nn.Dropout(0.1)),
            "drop_path": DropPath(),
            "lora_dropout": nn.ModuleDict({"default": nn.Identity()}),
            "rnn": nn.LSTM(2, 2, 2, dropout=0.1),
            "attention": nn.MultiheadAttention(4, 2, dropout=0.1),
            "linear": nn.Linear(2, 2),
            "other": nn.Identity(),
            "undropped": nn.GRU(2, 2, 2),
            "one_layer": nn.GRU(2, 2, 1, dropout=0.1),
            "DropoutBlock": DropoutBlock(),
        }
    )
    before = classes(model)
    report = fd.convert_report(model)
    assert set(report.torch) == {"plain", "DropoutBlock.0"}
    assert set(report.left) == {"mine", "replaced", "scripted", "drop_path", "lora_dropout.default", "rnn", "attention"}
    fd.convert(model)
    assert [a for a, b in zip(before, classes(model), strict=True) if a is not b] == [nn.Dropout] * 2
    fd.revert(model)
    assert classes(model) == before


@pytest.mark.parametrize("converted_before", [False, True])
def test_once_a_replaced_forward_is_put_back(converted_before):
    """accelerate's remove_hook_from_module leaves the class's own forward on the instance."""
    model = small()
    if converted_before:
        fd.convert(model)
    own, model[1].forward = model[1].forward, lambda x: x
    assert "1" in fd.convert_report(model).left
    model[1].forward = own
    assert not fd.convert_report(model).left
    fd.convert(model)
    torch.manual_seed(1)
    want = fd.dropout(torch.ones(50), 0.3)
    torch.manual_seed(1)
    assert torch.equal(model[1](torch.ones(50)), want)
    assert classes(fd.revert(model)) == classes(small())
    assert not torch.equal(model[1](torch.ones(50)), want)


def test_dry_run(capsys):
    model = small()
    before = classes(model)
    assert fd.convert(model, dry_run=True) is model
    assert classes(model) == before
    assert capsys.readouterr().out == (
        "0 fused, 2 to swap, 0 left alone\n"
        "to swap  1  Dropout(p=0.3, inplace=False)\n"
        "to swap  3  Dropout(p=0.1, inplace=True)\n"
        "Functional calls such as F.dropout are not listed: fd.audit(model, inputs) finds them.\n"
    )
    fd.convert(model)
    assert capsys.readouterr().out == ""


def said(caplog, model):
    """Level and text of the one line that a conversion logs."""
    caplog.clear()
    with caplog.at_level("INFO", "fused_dropout"):
        fd.convert(model)
    ((_, level, text),) = caplog.record_tuples
    return logging.getLevelName(level), text


def test_log_where_all_is_well(caplog, capfd):
    model = nn.Sequential(small(), Mine(0.0), nn.LSTM(2, 2, 2), nn.MultiheadAttention(4, 2), nn.Identity())
    assert said(caplog, model) == ("INFO", "fd.convert: 2 dropout modules swapped")
    assert said(caplog, model) == ("INFO", "fd.convert: 0 dropout modules swapped, 2 fused before")
    assert capfd.readouterr() == ("", "")


def test_log_of_what_is_left(caplog):
    """One warning lists the modules that drop and were left alone."""
    model = nn.Sequential(small(), Mine(0.2), Mine(0.2), nn.LSTM(2, 2, 2, dropout=0.1))
    text = "swapped; 3 that drop were left alone: Mine (1, ...), LSTM (3); print(fd.convert_report(model)) says why"
    assert said(caplog, model) == ("WARNING", f"fd.convert: 2 dropout modules {text}")
    for again in (model, model[1:], nn.Sequential(model, nn.Dropout())):
        assert said(caplog, again)[0] == "INFO"
    assert said(caplog, model.append(DropPath()))[0] == "WARNING"
    assert said(caplog, copy.deepcopy(model))[0] == "WARNING"
    more = nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1), *copy.deepcopy(model), nn.GRU(2, 2, 2, dropout=0.1))
    assert "MultiheadAttention (0), Mine (2, ...), LSTM (4), ...;" in said(caplog, more)[1]


def test_log_under_patch(caplog):
    model = nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1), Mine(0.2))
    with fd.patched():
        assert said(caplog, model)[0] == "INFO"
    assert said(caplog, model)[0] == "WARNING"


@pytest.mark.parametrize("function", [fd.convert, fd.revert, fd.convert_report])
def test_only_modules(function):
    with pytest.raises(TypeError, match=r"^model has to be an nn.Module, but is 3$"):
        function(3)


def test_copies_and_pickles():
    model = fd.convert(small())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(twin) == classes(model)
        assert classes(fd.revert(twin)) == classes(small())


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")
def test_script_and_export():
    model, x = small(), torch.randn(2, 8)
    scripted = str(torch.jit.script(model).inlined_graph).count("aten::dropout")
    assert str(torch.jit.script(fd.convert(model)).inlined_graph).count("aten::dropout") == scripted
    with fd.patched():
        assert str(torch.jit.script(copy.deepcopy(model)).inlined_graph).count("aten::dropout") == scripted
    program = torch.export.export(model, (x,))
    assert sum("aten.dropout" in str(node.target) for node in program.graph.nodes) == 2


@pytest.mark.parametrize("reset", [True, pytest.param(False, marks=sees_classes)])
def test_compiled_before(reset):
    """A compiled model recompiles if the class of a module changed. Before torch 2.13 this needs a reset of Dynamo."""
    torch._dynamo.reset()
    model, x = small(0.5), torch.randn(20, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for change in (fd.convert, fd.revert, fd.convert):
        compiled(x)
        change(model)
        if reset:
            torch.compiler.reset()
        torch.manual_seed(0)
        want = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(x), want)


def test_transformer():
    model = nn.Transformer(16, 2, 2, 2, 32, dropout=0.2, batch_first=True)
    source, target = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    output = model.eval()(source, target)
    sites = len(fd.convert_report(model).torch)
    assert sites == 2 * 3 + 2 * 4
    fd.convert(model)
    assert len(fd.convert_report(model).fused) == sites
    assert set(fd.convert_report(model).left.values()) == {
        "MultiheadAttention: calls torch's functions, which fd.patch() reaches on a CPU"
    }
    assert torch.equal(model(source, target), output)
    model.train()(source, target).sum().backward()
    assert torch.equal(fd.revert(model).eval()(source, target), output)


def test_modules_of_ours_are_not_reported_as_left():
    ours = [fd.DropoutAdd(0.1), fd.ReLUDropout(0.1), fd.DropoutLinear(3, 3), fd.DropPath(0.1)]

    class MyDropout(nn.Module):
        pass

    left = fd.convert_report(nn.Sequential(*ours, MyDropout())).left
    assert list(left) == ["4"]
    assert left["4"].endswith("MyDropout, not torch's")
