"""Hinton, Srivastava, Krizhevsky, Sutskever and Salakhutdinov 2012 (arXiv:1207.0580), in outline.

On MNIST's 10,000 test images a plain network of the time made about 160 errors; with 50 % dropout of the hidden units
about 130, and with 20 % dropout of the inputs as well about 110. The order is to be found again, on the data at hand.

From the paper's appendix: weights drawn from N(0, 0.01), batches of 100, cross-entropy; no weight decay, but a limit on
each unit's incoming weights, whose vector is scaled back to squared length l when it grows longer (``max_norm_``); and

    dw(t) = m(t) dw(t - 1) - (1 - m(t)) e(t) gradient,   e(t) = e(0) f^t,   m(t) from 0.5 to 0.99 in the first T epochs

with T = 500, f = 0.998, e(0) = 10 and l = 15. Here T and f follow the number of epochs, so that the learning rate falls
as far as it did in the paper; the units are rectified, not logistic, and e(0) is 1.
"""

import argparse

import torch
from basics import COLOURS, errors, figure, finish, load, options, progress, spread, train
from torch import nn

import fused_dropout as fd

PAPER = {"no dropout": 160, "50 % hidden": 130, "and 20 % input": 110}  # errors of 10,000
RATES = {"no dropout": (0.0, 0.0), "50 % hidden": (0.0, 0.5), "and 20 % input": (0.2, 0.5)}
PAPERS_EPOCHS, PAPERS_DECAY, RISE = 3000, 0.998, 500 / 3000
SQUARED_LENGTH, RATE = 15.0, 1.0


@torch.no_grad()
def max_norm_(weight: torch.Tensor, squared_length: float) -> None:
    """Scales the incoming weights of each unit, a row, to this squared length where theirs is larger."""
    norms = weight.norm(dim=1, keepdim=True)
    weight.mul_((squared_length**0.5 / norms.clamp_min(1e-12)).clamp_max(1))


def network(inputs: int, p_input: float, p_hidden: float, width: int = 400) -> nn.Sequential:
    model = nn.Sequential(
        fd.Dropout(p_input),
        *(nn.Linear(inputs, width), nn.ReLU(), fd.Dropout(p_hidden)),
        *(nn.Linear(width, width), nn.ReLU(), fd.Dropout(p_hidden)),
        nn.Linear(width, 10),
    )
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 0, 0.1) if name.endswith("weight") else nn.init.zeros_(parameter)
    return model


def schedule(epoch: int, epochs: int) -> tuple[float, float]:
    """Learning rate and momentum of an epoch, as torch.optim.SGD takes them."""
    momentum = 0.5 + 0.49 * min(1, epoch / (RISE * epochs))
    return (1 - momentum) * RATE * PAPERS_DECAY ** (epoch * PAPERS_EPOCHS / epochs), momentum


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments)
    wrong: dict[str, list[float]] = {kind: [] for kind in RATES}
    for seed, kind in progress([(s, k) for s in range(arguments.seeds) for k in RATES], "training"):
        torch.manual_seed(seed)
        model = network(data.train_x.shape[1], *RATES[kind]).to(arguments.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1)
        weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]

        def set_rates(epoch: int, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for group in optimizer.param_groups:
                group["lr"], group["momentum"] = schedule(epoch, arguments.epochs)

        def limit(weights: list[torch.Tensor] = weights) -> None:
            for weight in weights:
                max_norm_(weight, SQUARED_LENGTH)

        set_rates(0)
        train(
            model,
            data,
            epochs=arguments.epochs,
            batch=100,
            optimizer=optimizer,
            after_step=limit,
            after_epoch=lambda epoch, s=set_rates: s(epoch + 1),
        )
        wrong[kind].append(errors(model.eval(), data.test_x, data.test_y))

    held = all(a > b for a, b in zip(means(wrong), means(wrong)[1:], strict=False))
    title = "The paper's order" if held else "Not the paper's order"
    picture, (left, right) = figure(f"{title} on {data.name}: errors of {arguments.seeds} seeds", columns=2)
    left.bar(list(PAPER), [count / 100 for count in PAPER.values()], color=COLOURS[:3])
    left.set(ylabel="test error, %", title="the paper, MNIST (60,000 images)")
    for place, values in enumerate(wrong.values()):
        right.scatter(
            [place + 0.06 * (i - len(values) / 2) for i in range(len(values))],
            [100 * v for v in values],
            color=COLOURS[place],
            s=14,
        )
        right.hlines(100 * sum(values) / len(values), place - 0.35, place + 0.35, color=COLOURS[place], linewidth=2)
    right.set(
        xticks=range(3),
        xticklabels=list(RATES),
        ylabel="test error, %",
        title=f"here, {data.name} ({len(data.train_x):,} images)",
    )
    shown = (
        f"{data.name}, {arguments.seeds} seeds, test errors of {len(data.test_y):,}: "
        + ", ".join(f"{kind} {spread(values, 1, len(data.test_y))}" for kind, values in wrong.items())
        + f"; the paper's order {'held' if held else 'did not hold'} in the mean."
    )
    finish(picture, arguments, "04_hinton_2012", shown)
    return wrong


def means(wrong: dict[str, list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in wrong.values()]


if __name__ == "__main__":
    main(options(__doc__, epochs=60, seeds=8).parse_args())
