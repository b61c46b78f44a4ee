"""What the examples share: data, training, a plot's looks, and the lines that each of them ends with."""

import argparse
import gzip
import statistics
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dropout as fd

try:
    import matplotlib
    from sklearn import datasets
except ModuleNotFoundError as missing:
    sys.exit(f'{missing}; the examples need it: pip install ".[examples]"')

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

plt.rcParams["axes.titlesize"] = 9.5
# Distinct for the colour-blind too (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TRAINED_ON = 1000  # of the 1,797 digits
OUT = Path(__file__).parent.parent / "build" / "examples"  # git ignores it


@dataclass
class Data:
    """Images as rows of pixels from 0 to 1, and their classes."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def side(self) -> int:
        return int(self.train_x.shape[1] ** 0.5)

    def to(self, device: str) -> "Data":
        tensors = (self.train_x, self.train_y, self.test_x, self.test_y)
        return Data(self.name, *(x.to(device) for x in tensors))


def read_idx(path: Path) -> Tensor:
    """A tensor of bytes from a file in MNIST's IDX format, gzip or not.

    The format: two zero bytes, a byte for the type (8: unsigned bytes), one for the number of dimensions, each size as
    a big-endian 32-bit number, and the bytes.

    Raises:
        ValueError: the file is not of this format, of another type, empty, or shorter or longer than its sizes say.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: the gzip file is damaged or cut off ({error})") from None
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise ValueError(
            f"{path}: not an IDX file, it begins with {raw[:4].hex(' ') or 'nothing'} and not with 00 00 08"
        )
    if raw[2] != 8:
        raise ValueError(f"{path}: holds numbers of type 0x{raw[2]:02x}, but only unsigned bytes (0x08) are read")
    end = 4 + 4 * raw[3]
    if raw[3] == 0 or len(raw) < end:
        raise ValueError(f"{path}: cut off within its header, after {len(raw)} bytes")
    sizes = struct.unpack(f">{raw[3]}I", raw[4:end])
    expected = end + torch.Size(sizes).numel()
    if len(raw) != expected:
        raise ValueError(f"{path}: {' x '.join(map(str, sizes))} would take {expected} bytes, but it has {len(raw)}")
    if len(raw) == end:
        raise ValueError(f"{path}: is empty, {' x '.join(map(str, sizes))}")
    return torch.frombuffer(bytearray(raw[end:]), dtype=torch.uint8).reshape(sizes)


def load_mnist(folder: Path) -> Data:
    """The four files of MNIST in a folder, or of a data set made like it, by the names that they are known under.

    Raises:
        FileNotFoundError: one of the four is not there, neither as it is nor with .gz at its end.
        ValueError: one is not an IDX file (:func:`read_idx`), or does not hold images of 28 x 28 or labels from 0 to 9,
            as many of the one as of the other.
    """
    tensors = []
    for part in ("train", "t10k"):
        pair = []
        for kind, size in (("images-idx3", (28, 28)), ("labels-idx1", ())):
            found = [
                path for name in (f"{part}-{kind}-ubyte", f"{part}-{kind.replace('-idx', '.idx')}-ubyte")
                for path in (folder / name, folder / f"{name}.gz") if path.exists()
            ]  # fmt: skip
            if not found:
                raise FileNotFoundError(f"{folder}: there is no {part}-{kind}-ubyte, nor one that ends in .gz")
            pair.append(read_idx(found[0]))
            if pair[-1].shape[1:] != size:
                raise ValueError(f"{found[0]}: holds {list(pair[-1].shape)}, where {['n', *size]} is expected")
        if len(pair[0]) != len(pair[1]):
            raise ValueError(f"{folder}: {len(pair[0])} images, but {len(pair[1])} labels, in {part}")
        if (most := int(pair[1].max())) > 9:
            raise ValueError(f"{found[0]}: labels go from 0 to 9, but one is {most}")
        tensors += [pair[0].flatten(1).float() / 255, pair[1].long()]
    return Data("MNIST", *tensors)


def load_digits(side: int = 8) -> Data:
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn: 1,000 to train on and 797 to test with."""
    digits = datasets.load_digits()
    images, classes = torch.tensor(digits.images).float() / 16, torch.tensor(digits.target).long()
    if side != 8:
        images = F.interpolate(images[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = images.flatten(1)[order], classes[order]
    return Data("digits", x[:TRAINED_ON], y[:TRAINED_ON], x[TRAINED_ON:], y[TRAINED_ON:])


def load(arguments: argparse.Namespace, side: int = 8) -> Data:
    data = load_mnist(arguments.data) if arguments.data else load_digits(side)
    return data.to(arguments.device)


def options(description: str | None, *, epochs: int, seeds: int, data: bool = True) -> argparse.ArgumentParser:
    """The options of every example; data: whether it is one of images."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        help = "a folder with MNIST's four IDX files (scikit-learn's digits)"
        parser.add_argument("--data", type=Path, metavar="DIR", help=help)
    parser.add_argument("--epochs", type=int, default=epochs, help=f"({epochs})")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many runs, with seeds 0, 1, 2, ... ({seeds})")
    parser.add_argument("--device", default="cpu", help="(cpu)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="for the picture (build/examples)")
    return parser


def mlp(inputs: int, widths: Sequence[int], p: float) -> nn.Sequential:
    """Rectified hidden layers of these widths, dropout after each, and ten classes."""
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
    """Adam, unless there is another optimizer, over shuffled batches. The model is in training mode afterwards."""
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
    """The share of examples that the model classifies wrongly, in the mode that it is in."""
    return (model(x).argmax(-1) != y).float().mean().item()


def spread(values: Iterable[float], digits: int = 1, scale: float = 100) -> str:
    """Mean and standard deviation over the seeds: "3.1 ± 0.4"."""
    scaled = [scale * value for value in values]
    deviation = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.fmean(scaled):.{digits}f}{deviation}"


def figure(title: str, layout: str = "ab", **options: Any) -> tuple[Figure, list[Axes]]:
    """Small multiples, a letter each, rows apart by a semicolon, under a title that says what was found."""
    rows = layout.split(";")
    size = (4.2 * len(rows[0]), 3.2 * len(rows) + 0.5)
    drawn, axes = plt.subplot_mosaic(layout, layout="constrained", **{"figsize": size, **options})
    drawn.suptitle(title, fontsize=11)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, list(axes.values())


def over_seeds(rows: Iterable[Sequence[float]], scale: float) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each row, which is of a value a seed."""
    values = scale * torch.tensor(list(rows))
    return values.mean(1).tolist(), values.std(1, correction=min(1, values.shape[1] - 1)).tolist()


def curve(axis: Axes, places: Iterable[float], rows: Iterable[Sequence[float]], scale: float = 1, **style: Any) -> None:
    """Points with their standard deviations, from a row a point."""
    axis.errorbar(list(places), *over_seeds(rows, scale), marker="o", capsize=3, **style)


def bars(axis: Axes, rows: dict[str, list[float]], colours: Sequence[str], scale: float = 1) -> None:
    """Bars with their standard deviations, from above, from a row a bar."""
    mean, deviation = over_seeds(rows.values(), scale)
    axis.barh(range(len(rows)), mean, xerr=deviation, color=colours, capsize=3)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()


def finish(drawn: Figure, arguments: argparse.Namespace, name: str, *findings: str) -> None:
    """Saves the picture, prints the findings, a line each, and where the picture is."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{name}.png"
    drawn.savefig(path, dpi=110)
    plt.close(drawn)
    print(*findings, f"Picture: {path}", sep="\n")
