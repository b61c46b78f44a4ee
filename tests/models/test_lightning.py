"""Training with Lightning's Trainer, patched and converted, and resumed from a checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from swapping import RUNS, alike, for_ways, one_thread, same, swapped  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_dropout as fd

L = pytest.importorskip("lightning", exc_type=(ImportError, RuntimeError))
pytestmark = pytest.mark.filterwarnings("ignore")

generator = torch.Generator().manual_seed(0)
X = torch.randn(32, 16, generator=generator)
DATA = TensorDataset(X, X[:, :4].argmax(1))


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))
        self.losses = []

    def forward(self, x):
        return self.body(F.dropout(x, 0.2, self.training))

    def training_step(self, batch, _):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        assert not self.training
        assert torch.equal(self(batch[0]), self.body[3](self.body[1](self.body[0](batch[0]))))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trained(ways, seed=0, steps=16, folder=None, resume=False):
    """The module after training; it holds its losses."""
    torch.manual_seed(0)
    model = Classifier()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=2,
    )
    torch.manual_seed(100 + seed)
    loader = DataLoader(DATA, batch_size=16)
    with swapped(ways, model):
        trainer.fit(model, loader, loader, ckpt_path=folder / "checkpoint" if resume else None)
        if folder and not resume:
            trainer.save_checkpoint(folder / "checkpoint")
    return model


def mean(losses):
    return sum(losses) / len(losses)


@for_ways
def test_the_loss_falls_as_with_torchs(way):
    runs = {ways: [trained(ways, seed).losses for seed in range(RUNS)] for ways in ("torch", way)}
    assert mean(runs[way][0][-4:]) < 0.9 * mean(runs[way][0][:4])
    assert runs[way][0] != runs["torch"][0]
    assert alike([mean(losses) for losses in runs[way]], [mean(losses) for losses in runs["torch"]])


@for_ways
def test_undone_it_is_torchs(way):
    model, before = trained(way), Classifier()
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert list(model.state_dict()) == list(before.state_dict())
    assert {site.path for site in fd.audit(model, X).sites if site.train} == {"torch"}


def test_a_checkpoint_holds_nothing_of_the_conversion(tmp_path):
    model = trained("converted", steps=4, folder=tmp_path)
    loaded = Classifier.load_from_checkpoint(tmp_path / "checkpoint")
    assert type(loaded.body[2]) is nn.Dropout
    assert same(list(loaded.parameters()), list(model.parameters()))
    resumed = trained("converted", steps=8, folder=tmp_path, resume=True)
    assert len(resumed.losses) == 4


def test_audit_names_every_site():
    model = fd.convert(Classifier())
    assert [(s.module, s.p, s.path.partition(",")[0]) for s in fd.audit(model, X).sites] == [
        ("", 0.2, "torch"),
        ("body.2", 0.5, "fused"),
    ]


def test_audit_of_the_training_step():
    model = Classifier()
    report = fd.audit(model.training_step, DATA[:16], 0)
    assert [(s.module, s.p, s.train, s.eval) for s in report.sites] == [
        ("", 0.2, True, False),
        ("body.2", 0.5, True, False),
    ]
    assert report.advice == "next: fd.convert(model) would fuse 1 of these sites, fd.patch() would fuse 2"
