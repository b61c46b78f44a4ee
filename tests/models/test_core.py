"""Small models of this file, patched and converted: trained, evaluated, undone and audited."""

import pytest
import torch
import torch.nn.functional as F
from swapping import (
    Case,
    Promises,
    alike,
    mean_losses,
    one_thread,  # noqa: F401
)
from torch import nn

import fused_dropout as fd


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(20, 16), nn.Embedding(20, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.3, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, source, target):
        return self.head(self.transformer(self.source(source), self.target(target)))


class LanguageModel(nn.Module):
    """LSTM layers with functional dropout between them, as in AWD-LSTM."""

    def __init__(self):
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(20, 24), nn.Dropout(0.4)
        self.layers = nn.ModuleList(nn.LSTM(24, 24, batch_first=True) for _ in range(2))
        self.top = nn.LSTM(24, 24, 2, batch_first=True, dropout=0.3)
        self.head = nn.Linear(24, 20)

    def forward(self, ids):
        x = self.dropout(self.embedding(ids))
        for layer in self.layers:
            x = F.dropout(layer(x)[0], 0.4, self.training)
        return self.head(self.top(x)[0])


def bias_dropout_add(x, bias, residual, p: float, training: bool):
    """As in Megatron-LM, where this function adds the bias of the linear layer."""
    return residual + F.dropout(x + bias.expand_as(residual), p=p, training=training)


class MegatronBlock(nn.Module):
    def __init__(self, bias_dropout_add=bias_dropout_add):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(20, 24), nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24, bias=False)
        self.bias, self.head = nn.Parameter(torch.zeros(24)), nn.Linear(24, 20)
        self.bias_dropout_add = bias_dropout_add

    def forward(self, ids):
        residual = self.embedding(ids)
        x = self.down(F.gelu(self.up(self.norm(residual)), approximate="tanh"))
        return self.head(self.bias_dropout_add(x, self.bias, residual, 0.5, self.training))


class ConvNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2),
            nn.ReLU(),
            nn.Dropout2d(0.3),
            nn.Conv2d(16, 16, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(144, 32),
            nn.Dropout(0.3, inplace=True),
            nn.Linear(32, 5),
        )


generator = torch.Generator().manual_seed(0)
IDS = torch.randint(20, (8, 6), generator=generator)
OTHERS = torch.randint(20, (8, 5), generator=generator)
IMAGES = torch.randn(8, 3, 16, 16, generator=generator)


def case(make, inputs, labels, *sites, lr=1e-2):
    def loss(y):
        return F.cross_entropy(y.flatten(0, -2), labels.flatten())

    return Case(make, inputs, sites, loss, lr, output=lambda y: y)


CASES = {
    "transformer": case(
        Translator,
        {"source": IDS, "target": OTHERS},
        OTHERS.flip(1),
        *[(f"transformer.encoder.layers.0.dropout{i}", "module") for i in ("", 1, 2)],
        *[(f"transformer.decoder.layers.0.dropout{i}", "module") for i in ("", 1, 2, 3)],
        ("transformer.encoder.layers.0.self_attn", "attention"),
        ("transformer.decoder.layers.0.self_attn", "attention"),
        ("transformer.decoder.layers.0.multihead_attn", "attention"),
    ),
    "lstm": case(
        LanguageModel, {"ids": IDS}, IDS.roll(1, 1), ("dropout", "module"), ("", "call"), ("top", "kernel"), lr=3e-2
    ),
    "megatron": case(MegatronBlock, {"ids": IDS}, IDS, ("", "call")),
    "conv": case(ConvNet, {"input": IMAGES}, torch.arange(8) % 5, ("2", "module"), ("7", "module")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
class TestPromises(Promises):
    pass


def test_the_comparison_of_losses_can_fail(monkeypatch):
    """The comparison rejects a p that is 1.5 times as large, and dropout that does not scale the kept elements."""
    case, fused = CASES["megatron"], fd.functional.dropout
    faults = {
        "p": lambda x, p=0.5, training=True, inplace=False: fused(x, 1.5 * p, training, inplace),
        "scale": lambda x, p=0.5, training=True, inplace=False: fused(x, p, training, inplace) * (1 - p),
    }
    torchs = mean_losses(case, "torch")
    for name, fault in faults.items():
        monkeypatch.setattr(F, "dropout", fault)
        assert not alike(mean_losses(case, "torch"), torchs), name
