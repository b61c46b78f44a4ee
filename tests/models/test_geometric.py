"""A graph attention network of PyTorch Geometric: it drops the attention weights with a functional call."""

import pytest
import torch
import torch.nn.functional as F
from swapping import (
    Case,
    Promises,
    one_thread,  # noqa: F401
)
from torch import nn

geometric = pytest.importorskip("torch_geometric.nn")


class GAT(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.4)
        self.first = geometric.GATConv(16, 8, heads=2, dropout=0.4)
        self.second = geometric.GATConv(16, 4, heads=1, dropout=0.4)

    def forward(self, x, edge_index):
        x = F.elu(self.first(self.dropout(x), edge_index))
        return self.second(F.dropout(x, 0.4, self.training), edge_index)


generator = torch.Generator().manual_seed(0)
INPUTS = {
    "x": torch.randn(30, 16, generator=generator),
    "edge_index": torch.randint(30, (2, 120), generator=generator),
}
LABELS = torch.arange(30) % 4


def model_of_the_library():
    return geometric.GAT(16, 8, num_layers=2, out_channels=4, heads=2, dropout=0.2)


CASES = {
    "layers": Case(
        GAT,
        INPUTS,
        [("dropout", "module"), ("first", "call"), ("", "call"), ("second", "call")],
        lambda y: F.cross_entropy(y, LABELS),
        output=lambda y: y,
    ),
    "library": Case(
        model_of_the_library,
        INPUTS,
        [("dropout", "module"), ("convs.0", "call"), ("convs.1", "call")],
        lambda y: F.cross_entropy(y, LABELS),
        lr=3e-2,
        output=lambda y: y,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
class TestPromises(Promises):
    pass
