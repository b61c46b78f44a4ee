"""784-512-256-128-10: a network as in Keras tutorials, with and without dropout.

ReLU, softmax, Adam, batches of 128; dropout on the input and after each hidden layer; 567,434 parameters. The claim:
without dropout the training loss goes to zero while the validation loss rises again, because the network memorises its
training set. With dropout the two curves stay together.

Measured: the gap between the two losses after the last epoch, the least validation loss, and the epoch that has it. All
losses are computed in evaluation mode. The training loss that Keras shows is computed with dropout active, and is
higher. The network expects images of 28 x 28 pixels, which is MNIST's size; the digits of 8 x 8 are enlarged to it.
"""

import argparse
from statistics import fmean

import torch
import torch.nn.functional as F
from basics import COLOURS, Data, errors, figure, finish, load, mlp, options, parse, spread, train
from torch import nn

import fused_dropout as fd
from fused_dropout.bench.progress import progress

WIDTHS = (512, 256, 128)
PARAMETERS = 567_434


def network(p_input: float, p_hidden: float) -> nn.Sequential:
    model = nn.Sequential(fd.Dropout(p_input), *mlp(784, WIDTHS, p_hidden))  # softmax is part of the loss
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    return model


def curves(model: nn.Module, data: Data, epochs: int) -> torch.Tensor:
    """(epochs, 4): training and validation loss, then error, after each epoch, in evaluation mode."""
    rows = []

    def measure(_: int) -> None:
        model.eval()
        with torch.no_grad():
            both = ((data.train_x, data.train_y), (data.test_x, data.test_y))
            losses = [F.cross_entropy(model(x), y).item() for x, y in both]
            rows.append(losses + [errors(model, x, y) for x, y in both])

    train(model, data, epochs=epochs, after_epoch=measure)
    return torch.tensor(rows)


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments, side=28)
    kinds = {"without dropout": (0.0, 0.0), "with dropout": (0.2, 0.5)}
    found = {kind: [] for kind in kinds}
    for seed, kind in progress([(s, k) for s in range(arguments.seeds) for k in kinds], "training"):
        torch.manual_seed(seed)
        found[kind].append(curves(network(*kinds[kind]).to(arguments.device), data, arguments.epochs))

    runs = {kind: torch.stack(each) for kind, each in found.items()}
    gaps = {kind: (each[:, -1, 1] - each[:, -1, 0]).tolist() for kind, each in runs.items()}
    wrong = {kind: each[:, -1, 3].tolist() for kind, each in runs.items()}
    turn = {kind: (each[:, :, 1].argmin(1) + 1).tolist() for kind, each in runs.items()}
    apart = (f"{fmean(gap):.2f} nats {kind}" for kind, gap in gaps.items())
    title = f"Validation loss minus training loss: {', '.join(apart)}"
    picture, axes = figure(title, "ab;cd", figsize=(9, 6))
    axes[1].sharey(axes[0])
    axes[3].sharey(axes[2])
    for column, (kind, each) in enumerate(runs.items()):
        for axis, first, values in ((axes[column], 0, each), (axes[2 + column], 2, 100 - 100 * each)):
            for part, label in enumerate(("training", "validation")):
                drawn, epochs = values[:, :, first + part], range(1, arguments.epochs + 1)
                axis.plot(epochs, drawn.mean(0), marker=".", color=COLOURS[part], label=label)
                axis.fill_between(epochs, drawn.amin(0), drawn.amax(0), color=COLOURS[part], alpha=0.2, linewidth=0)
        axes[column].set_title(f"{kind}:\ngap {spread(gaps[kind], 2, 1)} nats, error {spread(wrong[kind])} %")
        axes[column].axvline(fmean(turn[kind]), color="grey", linestyle=":", label="least validation loss")
        axes[2 + column].set_xlabel("epoch")
    axes[0].set(ylabel=f"cross-entropy on {data.name}, nats", yscale="log")
    axes[2].set(ylabel="accuracy, %", ylim=(None, 100.5))
    axes[0].legend(frameon=False)
    ends = {kind: each[:, -1, 1].tolist() for kind, each in runs.items()}
    least = {kind: each[:, :, 1].amin(1).tolist() for kind, each in runs.items()}
    findings = [f"{data.name}, {PARAMETERS:,} parameters, {arguments.epochs} epochs"]
    for kind in kinds:
        gap, end, lowest = (spread(values[kind], 3, 1) for values in (gaps, ends, least))
        findings.append(f"{kind}: validation minus training loss {gap}, validation error {spread(wrong[kind])} %")
        findings.append(f"{kind}: validation loss {end} at the end, least {lowest} in epoch {spread(turn[kind], 0, 1)}")
    finish(picture, arguments, "03_mnist_mlp", *findings, data=data)
    return {f"gap {kind}": gap for kind, gap in gaps.items()} | {f"error {kind}": each for kind, each in wrong.items()}


if __name__ == "__main__":
    main(parse(options(__doc__, epochs=40, seeds=5)))
