"""Shared by the examples: data, options, training, plots and output."""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mnist_data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dropout as fd

try:
    import matplotlib
    from scipy.stats import t
    from sklearn import datasets
except ModuleNotFoundError as missing:
    sys.exit(f'{missing}; the examples need it: pip install ".[examples]"')

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

plt.rcParams["axes.titlesize"] = 9.5
# Colour-blind readers can tell these apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TRAINED_ON = 1000  # of the 1,797 digits
OUT = Path(__file__).parent.parent / "build" / "examples"  # git ignores it


@dataclass
class Data:
    """Images as rows of pixels from 0 to 1, and their classes."""

    name: str
    about: str  # how many images, and where they come from
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def side(self) -> int:
        return int(self.train_x.shape[1] ** 0.5)

    def to(self, device: str) -> "Data":
        tensors = (self.train_x, self.train_y, self.test_x, self.test_y)
        return Data(self.name, self.about, *(x.to(device) for x in tensors))


def load_digits(side: int = 8) -> Data:
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn: 1,000 to train on and 797 to test with."""
    digits = datasets.load_digits()
    images, classes = torch.tensor(digits.images).float() / 16, torch.tensor(digits.target).long()
    if side != 8:
        images = F.interpolate(images[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = images.flatten(1)[order], classes[order]
    about = f"scikit-learn's digits, {side} x {side} pixels: {TRAINED_ON:,} to train, {len(x) - TRAINED_ON} to test"
    return Data("digits", about, x[:TRAINED_ON], y[:TRAINED_ON], x[TRAINED_ON:], y[TRAINED_ON:])


def load_mnist(where: str, full: bool = False) -> Data:
    """MNIST from any source ("mnist"), or the data set in a folder: of its first 10,000 training images four fifths
    to train on and the rest to test with, or, with full, all of its training and test images where they are there."""
    images = mnist_data.find(full) if where == "mnist" else mnist_data.from_folder(Path(where))
    name = "MNIST" if images.is_mnist else Path(where).resolve().name
    if full and images.test is not None:
        parts, of = (*images.train, *images.test), ""
    else:
        if full:
            print(f"--full: only {len(images.train[0]):,} images are there", file=sys.stderr)
        parts = images.split()
        of = f"'s first {len(parts[0]) + len(parts[2]):,} images"
    train_x, train_y, test_x, test_y = parts
    about = f"{name}{of}: {len(train_x):,} to train, {len(test_x):,} to test; from {images.source}"
    return Data(name, about, train_x.float() / 255, train_y.long(), test_x.float() / 255, test_y.long())


def load(arguments: argparse.Namespace, side: int = 8) -> Data:
    """The images that --data names, or the end of the program with one line that says why not."""
    if arguments.data == "digits":
        return load_digits(side).to(arguments.device)
    try:
        return load_mnist(arguments.data, arguments.full).to(arguments.device)
    except (OSError, ValueError) as error:
        sys.exit(f"--data {arguments.data}: {error}")


def options(
    description: str | None, *, epochs: int, seeds: int, data: bool = True, on_mnist: dict[str, int] | None = None
) -> argparse.ArgumentParser:
    """The options of every example. data: whether it is one of images. on_mnist: other defaults for MNIST."""
    on_mnist = on_mnist or {}
    shown = {
        what: f"({value}; on MNIST {on_mnist[what]})" if what in on_mnist else f"({value})"
        for what, value in (("epochs", epochs), ("seeds", seeds))
    }
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        help = "digits, mnist (from any source), or a folder with MNIST's four IDX files (digits)"
        parser.add_argument("--data", default="digits", metavar="NAME|DIR", help=help)
        parser.add_argument(
            "--full", action="store_true", help="60,000 and 10,000 images of MNIST, not 8,000 and 2,000"
        )
    parser.add_argument("--epochs", type=int, default=epochs, help=shown["epochs"])
    parser.add_argument(
        "--seeds", type=int, default=seeds, help=f"how many runs, with seeds 0, 1, ... {shown['seeds']}"
    )
    parser.add_argument("--device", default="cpu", help="(cpu)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="for the picture (build/examples)")
    parser.set_defaults(on_mnist=on_mnist)
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line, with the defaults for the data that it names."""
    arguments = parser.parse_args(words)
    if "data" not in arguments:
        return arguments
    if arguments.data != "digits":
        parser.set_defaults(**arguments.on_mnist)
        return parser.parse_args(words)
    if arguments.full:
        parser.error("--full is for MNIST: give --data mnist or --data DIR as well")
    return arguments


def mlp(inputs: int, widths: Sequence[int], p: float) -> nn.Sequential:
    """Hidden layers of rectified units, of these widths, with dropout after each; then ten classes."""
    layers: list[nn.Module] = []
    for before, width in pairwise([inputs, *widths]):
        layers += [nn.Linear(before, width), nn.ReLU(), fd.Dropout(p)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def train(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    batch: int = 128,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    after_step: Callable[[], Any] | None = None,
    after_epoch: Callable[[int], Any] | None = None,
) -> nn.Module:
    """Trains on shuffled batches, with Adam by default. The model is in training mode afterwards."""
    optimizer = optimizer or torch.optim.Adam(model.parameters())
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(data.train_x)).to(data.train_x.device).split(batch):
            optimizer.zero_grad()
            loss(model(data.train_x[rows]), data.train_y[rows]).backward()
            optimizer.step()
            if after_step:
                after_step()
        if after_epoch:
            after_epoch(epoch)
            model.train()
    return model


@torch.no_grad()
def errors(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """The share of images that the model classifies wrongly, in its present mode."""
    return (model(x).argmax(-1) != y).float().mean().item()


def spread(values: Iterable[float], digits: int = 1, scale: float = 100) -> str:
    """Mean and standard deviation over the seeds: "3.1 ± 0.4"."""
    scaled = [scale * value for value in values]
    deviation = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.fmean(scaled):.{digits}f}{deviation}"


def compare(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The mean change over the seeds, and half of its 95 % interval by Student's t (infinite for one seed)."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    runs = len(changes)
    margin = t.ppf(0.975, runs - 1) * statistics.stdev(changes) / runs**0.5 if runs > 1 else math.inf
    return statistics.fmean(changes), margin


def figure(title: str, layout: str = "ab", **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each letter of the layout, whose rows end with ";". The title states the result."""
    rows = layout.split(";")
    size = (4.2 * len(rows[0]), 3.2 * len(rows) + 0.5)
    drawn, axes = plt.subplot_mosaic(layout, layout="constrained", **{"figsize": size, **options})
    drawn.suptitle(title, fontsize=11)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, list(axes.values())


def over_seeds(rows: Iterable[Sequence[float]], scale: float) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each row, which holds one value for each seed."""
    values = scale * torch.tensor(list(rows))
    return values.mean(1).tolist(), values.std(1, correction=min(1, values.shape[1] - 1)).tolist()


def curve(axis: Axes, places: Iterable[float], rows: Iterable[Sequence[float]], scale: float = 1, **style: Any) -> None:
    """Draws a point with its standard deviation for each row, which holds one value for each seed."""
    axis.errorbar(list(places), *over_seeds(rows, scale), marker="o", capsize=3, **style)


def bars(axis: Axes, rows: dict[str, list[float]], colours: Sequence[str], scale: float = 1) -> None:
    """Draws a bar with its standard deviation for each row, the first at the top."""
    mean, deviation = over_seeds(rows.values(), scale)
    axis.barh(range(len(rows)), mean, xerr=deviation, color=colours, capsize=3)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()


def finish(drawn: Figure, arguments: argparse.Namespace, name: str, *findings: str, data: Data | None = None) -> None:
    """Saves the picture. Prints the data, the findings and the path of the picture, one a line."""
    if data is not None:
        drawn.supxlabel(data.about, fontsize=8, color="dimgrey")
        findings = (data.about, *findings)
        name += "" if data.name == "digits" else f"_{data.name.lower()}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{name}.png"
    drawn.savefig(path, dpi=110)
    plt.close(drawn)
    print(*findings, f"Picture: {path}", sep="\n")
