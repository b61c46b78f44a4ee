"""Why activations are scaled: two correct ways, and two mistakes.

A unit is kept with probability q = 1 - p. Without dropout the next layer gets sum(w x) over n inputs; with dropout the
mean of that sum is q * sum(w x). The mean should be the same in training and at test time. Two ways are correct:

- *inverted*: multiply the kept units by 1/q in training, and do nothing at test time: E[m x / q] = x;
- *classic* (Hinton et al. 2012): do nothing in training, and multiply every activation (or its outgoing weights) by q
  at test time: E[m x] = q x, which the next layer then gets in both.

Two mistakes are found in tutorials. *double* scales by 1/q in training and also by q at test time. The network then
gets q times the mean that it was trained on, and q^3 times after three layers. *slip* multiplies by p, the drop
probability, at test time instead of q. That is correct only at p = 0.5.

Measured: the mean input of each layer at test time relative to training, the test error and the test loss. A network
whose activations are too small may still rank the classes correctly, but it is less confident.
"""

import argparse

import torch
import torch.nn.functional as F
from basics import COLOURS, bars, curve, errors, figure, finish, load, options, parse, spread, train
from torch import Tensor, nn

import fused_dropout as fd
from fused_dropout.bench.progress import progress

P = 0.3
WAYS = {
    "inverted: 1/q in training": (False, 1.0),
    "classic: q at test time": (True, 1 - P),
    "double: 1/q, then q": (False, 1 - P),
    "slip: p for q at test time": (True, P),
}


class Scaled(nn.Module):
    """Dropout that can leave out the factor 1/q in training, and multiply at test time."""

    def __init__(self, p: float, unscaled: bool, at_test: float) -> None:
        super().__init__()
        self.drop, self.q, self.unscaled, self.at_test = fd.Dropout(p), 1 - p, unscaled, at_test
        self.seen = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x) * (self.q if self.unscaled and self.training else 1)
        x = x if self.training else x * self.at_test
        self.seen = x.detach().mean().item()
        return x


def network(inputs: int, unscaled: bool, at_test: float, width: int = 256) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (inputs, width, width):
        layers += [nn.Linear(size, width), nn.ReLU(), Scaled(P, unscaled, at_test)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


@torch.no_grad()
def means(model: nn.Sequential, x: Tensor, passes: int) -> list[float]:
    """The mean output of each dropout layer, over this many passes."""
    layers = [layer for layer in model if isinstance(layer, Scaled)]
    sums = torch.zeros(len(layers))
    for _ in range(passes):
        model(x)
        sums += torch.tensor([layer.seen for layer in layers])
    return (sums / passes).tolist()


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments)
    wrong: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    ratios: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for seed, (way, (unscaled, at_test)) in progress(
        [(s, w) for s in range(arguments.seeds) for w in WAYS.items()], "training"
    ):
        torch.manual_seed(seed)
        model = network(data.train_x.shape[1], unscaled, at_test).to(arguments.device)
        train(model, data, epochs=arguments.epochs)
        trained_on = means(model, data.train_x, passes=20)
        tested_on = means(model.eval(), data.train_x, passes=1)
        ratios[way].append([test / seen for test, seen in zip(tested_on, trained_on, strict=True)])
        wrong[way].append(errors(model, data.test_x, data.test_y))
        with torch.no_grad():
            losses[way].append(F.cross_entropy(model(data.test_x), data.test_y).item())

    names = [way.split(":")[0] for way in WAYS]
    at_end = {name: spread((run[-1] for run in ratios[way]), 2, 1) for name, way in zip(names, WAYS, strict=True)}
    picture, (left, middle, right) = figure(
        "Mean input of the last layer, at test time / in training: "
        + ", ".join(f"{name} {share}" for name, share in at_end.items()), "abc", figsize=(13, 3.9)
    )  # fmt: skip
    for (way, runs), colour in zip(ratios.items(), COLOURS, strict=False):
        curve(left, [1, 2, 3], zip(*runs, strict=True), color=colour, label=way)
    left.axhline(1, color="grey", linewidth=0.8, zorder=0)
    left.set(xlabel="after dropout layer", ylabel="mean at test time / in training", ylim=(0, 1.7))
    left.set(xticks=[1, 2, 3], yticks=(0, 0.5, 1), title="mean input of the next layer")
    left.legend(frameon=False, fontsize=8, loc="upper right")
    for axis, values, what, scale in ((middle, wrong, "error, %", 100), (right, losses, "loss, nats", 1)):
        bars(axis, dict(zip(names, values.values(), strict=True)), COLOURS[: len(WAYS)], scale)
        axis.set(xlabel=f"test {what}", title=f"{data.name}, p = {P}")
    findings = [
        f"{name}: mean {at_end[name]}, test error {spread(wrong[way])} %, test loss {spread(losses[way], 3, 1)}"
        for name, way in zip(names, WAYS, strict=True)
    ]
    what = f"{data.name}, p = {P}; mean: after the third dropout, at test time / in training"
    finish(picture, arguments, "02_scaling", what, *findings, data=data)
    ends = {f"{way}, mean": [run[-1] for run in runs] for way, runs in ratios.items()}
    return wrong | ends | {f"{way}, loss": values for way, values in losses.items()}


if __name__ == "__main__":
    main(parse(options(__doc__, epochs=20, seeds=5)))
