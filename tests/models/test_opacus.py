"""Opacus: its validator replaces layers by new ones with their own dropout modules, and its engine wraps the model."""

import pytest
import torch
import torch.nn.functional as F
from swapping import one_thread  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_dropout as fd

opacus = pytest.importorskip("opacus")
validators = pytest.importorskip("opacus.validators")

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 4


class Model(nn.Module):
    """A model with the layers that Opacus replaces: batch norm, LSTM, attention."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.channels = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout2d(0.3)
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.channels(self.norm(self.conv(x)).relu()).mean((2, 3))
        x = self.lstm(self.dropout(self.linear(x))[:, None])[0]
        return self.head((x + self.attention(x, x, x)[0])[:, 0])


def made():
    torch.manual_seed(0)
    return validators.ModuleValidator.fix(Model())


def private(model):
    """The model, its optimizer and its data under a PrivacyEngine."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    return opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )


INSIDE = ["attention.dropout", "channels", "dropout", "lstm.dropout_layer"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_fixed(when):
    """fix keeps modules that were converted before, and adds layers with new dropouts. A later convert finds these."""
    torch.manual_seed(0)
    model = Model() if when == "after" else fd.convert(Model())
    model = validators.ModuleValidator.fix(model)
    assert sorted(fd.convert_report(model).fused) == ([] if when == "after" else ["channels", "dropout"])
    if when != "before":
        assert sorted(fd.convert_report(fd.convert(model)).fused) == INSIDE
    assert not validators.ModuleValidator.validate(model, strict=False)
    assert set(fd.convert_report(fd.revert(model)).torch) == set(INSIDE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["patched", "converted", "converted under the engine"])
def test_private_training(way):
    """Each sample's gradient has that sample's mask, so their mean is the gradient of the model without the engine."""
    model = made()
    if way == "converted":
        fd.convert(model)
    model, optimizer, data = private(model)
    if way == "converted under the engine":
        fd.convert(model)
    if way == "patched":
        fd.patch()
    try:
        for x, y in data:
            optimizer.zero_grad()
            torch.manual_seed(5)
            F.cross_entropy(model(x), y, reduction="mean").backward()
            sums = [p.grad_sample.sum(0) / len(x) for p in model.parameters()]
            plain = made()
            plain.load_state_dict(model._module.state_dict())
            if way != "patched":
                fd.convert(plain)
            torch.manual_seed(5)
            F.cross_entropy(plain(x), y).backward()
            for a, b in zip(sums, plain.parameters(), strict=True):
                torch.testing.assert_close(a, b.grad, rtol=1e-3, atol=1e-5)
            optimizer.step()
        # Last, because the audit runs a forward pass without a backward, and Opacus' hooks then wait for that backward.
        sites = {site.module: site.path for site in fd.audit(model, IMAGES).sites if site.train}
        assert sorted(sites) == [f"_module.{name}" for name in INSIDE]
        assert all(path.startswith("fused") for path in sites.values())
    finally:
        fd.unpatch()
