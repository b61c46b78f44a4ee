"""train() and eval(): dropout acts in the first mode and does nothing in the second.

The claim of every tutorial: in training mode each unit is set to zero with probability p and the others are divided by
1 - p, so each pass gives a different output. In evaluation mode the layer returns its input, so each pass gives the
same output. This example measures what a forgotten eval() costs: the test error, and how much the probability of a
class varies from pass to pass.
"""

import argparse

import torch
from basics import COLOURS, curve, figure, finish, load, mlp, options, parse, spread, train
from torch import Tensor, nn

from fused_dropout.bench.progress import progress

PASSES = 20
WIDTHS = (256, 256, 256)


@torch.no_grad()
def passes(model: nn.Module, x: Tensor) -> Tensor:
    """Probabilities of repeated passes over the same images: (PASSES, images, classes)."""
    return torch.stack([model(x).softmax(-1) for _ in range(PASSES)])


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments)
    rates = [0.1, 0.3, 0.5, 0.7]
    found: dict[str, dict[float, list[float]]] = {
        name: {p: [] for p in rates} for name in ("train error", "eval error", "train moves", "eval moves")
    }
    runs = [(p, seed) for p in rates for seed in range(arguments.seeds)]
    for p, seed in progress(runs, "training"):
        torch.manual_seed(seed)
        model = train(mlp(data.train_x.shape[1], WIDTHS, p).to(arguments.device), data, epochs=arguments.epochs)
        for mode in ("train", "eval"):
            model.train(mode == "train")
            drawn = passes(model, data.test_x)
            wrong = (drawn.argmax(-1) != data.test_y).float().mean().item()
            found[f"{mode} error"][p].append(wrong)
            found[f"{mode} moves"][p].append(drawn.std(0).mean().item())

    at = 0.5
    wrong = {mode: spread(found[f"{mode} error"][at]) for mode in ("train", "eval")}
    picture, (left, right) = figure(
        f"Without eval() at p = {at}: {wrong['train']} % errors instead of {wrong['eval']} %"
    )
    for mode, colour in (("train", COLOURS[1]), ("eval", COLOURS[0])):
        curve(left, rates, found[f"{mode} error"].values(), 100, color=colour, label=f"{mode}()")
        curve(right, rates, found[f"{mode} moves"].values(), 100, color=colour)
    left.set(xlabel="drop probability p", ylabel=f"test error on {data.name}, %", title="error of one pass")
    left.set_ylim(bottom=0)
    right.set(xlabel="drop probability p", ylabel="standard deviation, % points")
    right.set_title(f"a class's probability over {PASSES} passes")
    left.legend(frameon=False)
    moves = {mode: spread(found[f"{mode} moves"][at]) for mode in ("train", "eval")}
    finish(
        picture,
        arguments,
        "01_train_and_eval",
        f"{data.name}, p = {at}: test error {wrong['eval']} % with eval(), {wrong['train']} % without",
        f"a probability's standard deviation over passes, % points: {moves['eval']} with, {moves['train']} without",
        data=data,
    )
    return {name: by_rate[at] for name, by_rate in found.items()}


if __name__ == "__main__":
    main(parse(options(__doc__, epochs=20, seeds=5)))
