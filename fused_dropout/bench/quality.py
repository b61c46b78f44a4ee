"""Measures whether the drop rate is p, and whether a network trains as well as with nn.Dropout."""

import math
import time
from dataclasses import dataclass
from statistics import NormalDist, fmean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .workloads import MODULES

_EPOCHS, _BATCH, _HIDDEN_P = 15, 64, 0.2


@dataclass(frozen=True)
class DropRate:
    device: str
    module: str
    p: float
    draws: int
    rate: float
    low: float  # the bounds of the 99 % confidence interval
    high: float
    inside: bool  # whether p is inside the interval


@dataclass(frozen=True)
class Training:
    device: str
    module: str
    runs: int
    epochs: int
    accuracy: float  # mean, on the test set
    loss: float  # mean, on the training set without dropout
    seconds: float  # median of a run
    curve: list[float]  # the mean loss in each epoch, with dropout


def measure_drop_rate(device: str, name: str, p: float, draws: int) -> list[DropRate]:
    torch.manual_seed(0)  # one interval in a hundred misses p by chance; with a seed it is always the same one
    module, ones = MODULES[name](p), torch.ones(2**20, device=device)
    rate = 1 - sum(int(module(ones).count_nonzero()) for _ in range(draws // ones.numel())) / draws
    half = NormalDist().inv_cdf(0.995) * math.sqrt(rate * (1 - rate) / draws)
    return [DropRate(device, name, p, draws, rate, rate - half, rate + half, abs(rate - p) <= half)]


def _train(dropout: type[nn.Module], data: list[Tensor], seed: int, epochs: int) -> tuple[float, float, float, Tensor]:
    """Returns accuracy, loss, seconds and the loss of each epoch.

    The seed determines the initial weights, the order of the batches and the masks.
    """
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), dropout(_HIDDEN_P), nn.Linear(128, 64), nn.ReLU(), dropout(_HIDDEN_P)]
    model = nn.Sequential(*layers, nn.Linear(64, 10)).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    shuffle = torch.Generator().manual_seed(seed)
    curve = torch.zeros(epochs, device=images.device)
    start = time.perf_counter()
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels), generator=shuffle).to(images.device).split(_BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            curve[epoch] += loss.detach() * len(batch) / len(labels)
    with torch.no_grad():
        final = F.cross_entropy(model.eval()(images), labels).item()  # .item() waits for the GPU
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    return accuracy, final, time.perf_counter() - start, curve.cpu()


def measure_training(device: str, runs: int) -> list[Training]:
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(array, device=device) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    train, test = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
    data = [tensor[part] for part in (train, test) for tensor in (images.float() / 16, labels)]
    for dropout in MODULES.values():
        _train(dropout, data, seed=0, epochs=1)  # warm-up
    results = [[_train(dropout, data, seed, _EPOCHS) for dropout in MODULES.values()] for seed in range(runs)]
    records = []
    for name, of_module in zip(MODULES, zip(*results, strict=True), strict=True):
        accuracy, loss, seconds, curves = zip(*of_module, strict=True)
        curve = torch.stack(curves).mean(0).tolist()
        records.append(Training(device, name, runs, _EPOCHS, fmean(accuracy), fmean(loss), median(seconds), curve))
    return records
