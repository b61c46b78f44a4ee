"""Hinton, Srivastava, Krizhevsky, Sutskever and Salakhutdinov 2012 (arXiv:1207.0580), in outline.

On MNIST's 10,000 test images the best published plain network made about 160 errors. With 50 % of the hidden units
dropped, and a limit on their weights, the authors made about 130 errors; with 20 % of the inputs dropped as well, about
110. This example asks whether the same order appears with fewer images.

From the paper's appendix: initial weights from N(0, 0.01), batches of 100, cross-entropy, no weight decay. Instead,
each hidden unit's vector of incoming weights is scaled back to squared length l when it grows longer (``max_norm_``;
here without dropout too). The update of the weights is

    dw(t) = m(t) dw(t - 1) - (1 - m(t)) e(t) gradient,   e(t) = e(0) f^t,   m(t) from 0.5 to 0.99 in the first T epochs

with T = 500, f = 0.998, e(0) = 10 and l = 15, for 3000 epochs. Here T and f follow the number of epochs, so that the
learning rate falls as far as in the paper. The units are rectified, not logistic, so the initial weights are those for
rectified units. e(0) is 0.3: of 0.03, 0.1, 0.3 and 1 it suits the network *without* dropout best. The digits are
enlarged to 28 x 28 pixels, the paper's size, where the neighbours of a dropped pixel hold nearly the same value.

These settings were chosen by the errors on the same 797 digits, since there are no others. On MNIST they were not
chosen again: there are only fewer epochs, for the time, and more seeds.
"""

import argparse
from itertools import pairwise
from statistics import fmean

import torch
from basics import COLOURS, Data, compare, errors, figure, finish, load, mlp, options, parse, spread, train
from torch import nn

import fused_dropout as fd
from fused_dropout.bench.progress import progress

PAPER = {"no dropout": 160, "50 % hidden": 130, "and 20 % input": 110}  # errors of 10,000 images
RATES = {"no dropout": (0.0, 0.0), "50 % hidden": (0.0, 0.5), "and 20 % input": (0.2, 0.5)}
PAPERS_EPOCHS, PAPERS_DECAY, RISE = 3000, 0.998, 500 / 3000
SQUARED_LENGTH, RATE = 15.0, 0.3


@torch.no_grad()
def max_norm_(weight: torch.Tensor, squared_length: float) -> None:
    """Scales each row, the incoming weights of a unit, to this squared length if its own is larger."""
    weight.renorm_(2, 0, squared_length**0.5)


def judge(mean: float, margin: float) -> str:
    """What a change of the error says, given half of its 95 % interval."""
    if abs(mean) <= margin:
        return "no change beyond the noise"
    return "fewer errors" if mean < 0 else "more errors"


def network(inputs: int, width: int, p_input: float, p_hidden: float) -> nn.Sequential:
    model = nn.Sequential(fd.Dropout(p_input), *mlp(inputs, [width, width], p_hidden))
    for name, parameter in model.named_parameters():
        nn.init.kaiming_normal_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
    return model


def schedule(epoch: int, epochs: int) -> tuple[float, float]:
    """Learning rate and momentum of an epoch, as torch.optim.SGD takes them."""
    momentum = 0.5 + 0.49 * min(1, epoch / (RISE * epochs))
    return (1 - momentum) * RATE * PAPERS_DECAY ** (epoch * PAPERS_EPOCHS / epochs), momentum


def trained(data: Data, width: int, p_input: float, p_hidden: float, epochs: int) -> nn.Module:
    model = network(data.train_x.shape[1], width, p_input, p_hidden).to(data.train_x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    hidden = [layer.weight for layer in model if isinstance(layer, nn.Linear)][:-1]

    def after_epoch(epoch: int) -> None:
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = schedule(epoch + 1, epochs)

    def limit() -> None:
        for weight in hidden:
            max_norm_(weight, SQUARED_LENGTH)

    after_epoch(-1)
    return train(model, data, epochs=epochs, batch=100, optimizer=optimizer, after_step=limit, after_epoch=after_epoch)


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments, side=arguments.side)
    wrong: dict[str, list[float]] = {kind: [] for kind in RATES}
    for seed, kind in progress([(s, k) for s in range(arguments.seeds) for k in RATES], "training"):
        torch.manual_seed(seed)
        model = trained(data, arguments.width, *RATES[kind], arguments.epochs)
        wrong[kind].append(errors(model.eval(), data.test_x, data.test_y))

    steps = [compare(*pair) for pair in pairwise(wrong.values())]
    verdict = "; ".join(f"{kind}: {judge(*step)}" for kind, step in zip(list(RATES)[1:], steps, strict=True))
    picture, (left, right) = figure(verdict)
    left.bar(list(PAPER), [count / 100 for count in PAPER.values()], color=COLOURS[:3])
    left.set(ylabel="test error, %", title="the paper, MNIST (60,000 images)")
    for place, values in enumerate(wrong.values()):
        places = [place + 0.06 * (i - len(values) / 2) for i in range(len(values))]
        right.scatter(places, [100 * value for value in values], color=COLOURS[place], s=14)
        right.hlines(100 * fmean(values), place - 0.35, place + 0.35, color=COLOURS[place], linewidth=2)
    right.set_xticks(range(3), list(RATES))
    title = f"here, {data.name} ({len(data.train_x):,} images), {arguments.seeds} seeds"
    right.set(ylabel="test error, %", ylim=(0, None), title=title)
    tested = len(data.test_y)
    counts = ", ".join(f"{kind} {spread(values, 1, tested)}" for kind, values in wrong.items())
    changes = ", ".join(f"{tested * mean:+.1f} ± {tested * margin:.1f}" for mean, margin in steps)
    finish(
        picture,
        arguments,
        "04_hinton_2012",
        f"{data.name}, {arguments.width} units a layer, {arguments.seeds} seeds, {arguments.epochs} epochs",
        f"errors of {tested:,}: {counts}",
        f"change by each of the paper's steps, paired by seed, with 95 % interval: {changes}",
        verdict,
        data=data,
    )
    return wrong


if __name__ == "__main__":
    parser = options(__doc__, epochs=250, seeds=3, on_mnist={"epochs": 70, "seeds": 5})
    parser.add_argument("--width", type=int, default=400, help="units in each of the two hidden layers (400)")
    parser.add_argument("--side", type=int, default=28, help="the digits' pixels in a row; MNIST has 28 (28)")
    main(parse(parser))
