"""What is averaged: thinned networks, and networks trained apart.

The claim: a network with dropout stands for exponentially many thinned networks that share their weights, and one pass
without dropout and with scaled activations (the *mean network*) approximates the average of their predictions. It is
exactly their normalized geometric mean if there is one hidden layer and a softmax (Hinton et al. 2012,
arXiv:1207.0580); here there are two hidden layers.

Four ways to predict are compared on the same trained network: the mean network, and, from many thinned networks, the
average of their probabilities, the geometric mean and a majority vote. Two references are trained without dropout: one
network, and an ensemble of five networks at five times the cost, which dropout is said to replace.
"""

import argparse
import time
from collections.abc import Callable

import torch
from basics import COLOURS, bars, compare, curve, figure, finish, load, mlp, options, parse, spread, train
from torch import Tensor, nn

import fused_dropout as fd
from fused_dropout.bench.progress import progress

NETWORKS, THINNED, WIDTHS = 5, 100, (400, 400)


def vote(logits: Tensor) -> Tensor:
    """The class that most passes choose, from (passes, images, classes); the sum of probabilities decides a tie."""
    votes = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    return (votes + logits.softmax(-1).mean(0)).argmax(-1)


COMBINED: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda logits: logits.softmax(-1).mean(0).argmax(-1),
    "geometric mean": lambda logits: logits.log_softmax(-1).mean(0).argmax(-1),
    "majority vote": vote,
}


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments)
    wrong: dict[str, list[float]] = {}
    cost: dict[str, list[float]] = {"five networks": [], "one with dropout": []}
    by_number: list[list[float]] = []

    def count(name: str, answer: Tensor) -> None:
        wrong.setdefault(name, []).append((answer != data.test_y).float().mean().item())

    def trained(p: float) -> nn.Module:
        model = train(mlp(data.train_x.shape[1], WIDTHS, p).to(arguments.device), data, epochs=arguments.epochs)
        if data.train_x.is_cuda:
            torch.cuda.synchronize()  # the time of training is measured
        return model

    for seed in progress(range(arguments.seeds), "training"):
        torch.manual_seed(seed)
        start = time.perf_counter()
        plain = [trained(0.0).eval() for _ in range(NETWORKS)]
        cost["five networks"].append(time.perf_counter() - start)
        with torch.no_grad():
            apart = torch.stack([model(data.test_x) for model in plain])
        count("one, no dropout", apart[0].argmax(-1))
        for name in ("average", "majority vote"):
            count(f"five apart: {name}", COMBINED[name](apart))

        start = time.perf_counter()
        model = trained(0.5)
        cost["one with dropout"].append(time.perf_counter() - start)
        with torch.no_grad(), fd.mc_dropout(model):
            thinned = torch.stack([model(data.test_x) for _ in range(THINNED)])
        with torch.no_grad():
            count("dropout: mean network", model.eval()(data.test_x).argmax(-1))
        count("dropout: one thinned", thinned[0].argmax(-1))
        for name, combine in COMBINED.items():
            count(f"dropout: {name}", combine(thinned))
        numbers = [1, 2, 5, 10, 20, 50, THINNED]
        by_number.append([(COMBINED["average"](thinned[:n]) != data.test_y).float().mean().item() for n in numbers])

    one_pass, averaged = (spread(wrong[f"dropout: {name}"]) for name in ("mean network", "average"))
    picture, (left, right) = figure(
        f"One pass of the mean network: {one_pass} % errors; {THINNED} thinned ones averaged: {averaged} %",
        figsize=(10, 3.9),
    )
    bars(left, wrong, [COLOURS[0] if name.startswith("dropout") else COLOURS[1] for name in wrong], 100)
    left.set(xlabel=f"test error on {data.name}, %", title=f"{arguments.seeds} seeds")
    curve(right, numbers, zip(*by_number, strict=True), 100, color=COLOURS[0], label="average of thinned")
    mean = 100 * sum(wrong["dropout: mean network"]) / arguments.seeds
    right.axhline(mean, color=COLOURS[2], label="mean network, one pass")
    right.set(xscale="log", xlabel="thinned networks averaged", ylabel="test error, %", title="how many it takes")
    right.set_xticks(numbers, map(str, numbers))
    right.legend(frameon=False)
    times = sum(cost["five networks"]) / sum(cost["one with dropout"])
    findings = [f"{name} {spread(values)} %" for name, values in wrong.items()]
    change, margin = compare(wrong["one, no dropout"], wrong["dropout: mean network"])
    findings.append(
        f"mean network minus one, no dropout: {100 * change:+.1f} ± {100 * margin:.1f} points (95 %, paired)"
    )
    cost_of_five = f"training five took {times:.1f} times as long as one with dropout"
    finish(picture, arguments, "05_averaging", f"{data.name}, test errors", *findings, cost_of_five, data=data)
    return wrong


if __name__ == "__main__":
    main(parse(options(__doc__, epochs=20, seeds=5)))
