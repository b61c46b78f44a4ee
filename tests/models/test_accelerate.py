"""accelerate's hooks replace the forward of instances. convert leaves these alone and reports it; patch replaces their
dropout."""

import pytest
import torch
from swapping import one_thread  # noqa: F401
from torch import nn

import fused_dropout as fd

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

REPLACED = "Dropout whose forward was replaced on the instance"
X = torch.ones(4, 8, requires_grad=True)


def small():
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)))


def paths(model):
    return [site.path.partition(",")[0] for site in fd.audit(model, X).sites if site.train]


def test_dispatched():
    """A model dispatched to devices block by block: the blocks have hooks, the modules inside them have none."""
    model = accelerate.dispatch_model(
        small(), {"0": "cpu", "1": "cpu", "2": "cpu"}, main_device="cpu", force_hooks=True
    )
    report = fd.convert_report(fd.convert(model))
    assert report.left == {"1": REPLACED}
    assert list(report.fused) == ["2.1"]
    assert type(model[1]) is nn.Dropout
    assert paths(model) == ["torch", "fused"]
    with fd.patched():
        assert paths(model) == ["fused", "fused"]
    fd.revert(model)
    assert type(model[2][1]) is nn.Dropout
    assert paths(model) == ["torch", "torch"]


@pytest.mark.parametrize("converted_before", [False, True])
def test_hook_on_and_off(converted_before):
    model = small()
    if converted_before:
        fd.convert(model)
    kind, calls = type(model[1]), []

    class Counts(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    hooks.add_hook_to_module(model[1], Counts())
    for change in (fd.convert, fd.revert):
        change(model)
        assert type(model[1]) is kind
        assert fd.convert_report(model).left == {"1": REPLACED}
    model(X)
    assert calls == [model[1]]
    hooks.remove_hook_from_module(model[1])
    assert not fd.convert_report(fd.convert(model)).left
    assert paths(model) == ["fused", "fused"]
    fd.revert(model)
    assert paths(model) == ["torch", "torch"]


def test_prepared():
    """Accelerator.prepare wraps only the forward of the whole model, so every dropout inside is converted."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(small())
    assert not fd.convert_report(fd.convert(model)).left
    assert paths(model) == ["fused", "fused"]
    assert model(X).dtype == torch.float32
    accelerator.free_memory()
