"""Co-adaptation made visible: what hidden units become with and without dropout.

The claim (Hinton et al. 2012, arXiv:1207.0580; Srivastava et al. 2014, JMLR 15, section 7): a unit cannot rely on other
units to be there, so it has to detect something useful by itself. Features should look simpler, and fewer units should
be on for an image. Readers of the papers add that two units should agree less.

As in the paper of 2014 the network is an autoencoder: it reconstructs the image through one layer of rectified units.
Measured on test images, in evaluation mode:

- the share of a feature's squared weights in its strongest eighth of the pixels, and the same for random weights;
- the mean absolute correlation of two units, and the share of units that are on for an image;
- the error of the reconstruction, relative to the variance of the pixels: with all units, and with a random half of
  them, doubled. Dropout trains for the second; without dropout it shows how much units rely on each other.

Units that are never on do not count.
"""

import argparse

import torch
import torch.nn.functional as F
from basics import COLOURS, figure, finish, load, options, over_seeds, parse, spread, train
from torch import Tensor, nn

import fused_dropout as fd
from fused_dropout.bench.progress import progress

UNITS, SHOWN = 100, 64
KINDS = {"without dropout": 0.0, "with dropout": 0.5}
PANELS = {
    "strength in\n1/8 of the pixels": {"strength in an eighth": ""},
    "mean |correlation|\nof two units": {"correlation": ""},
    "units that are on\nfor an image": {"share on": ""},
    "error / variance\nof the pixels": {"error": "all units", "error of half": "half"},
}


def autoencoder(pixels: int, p: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(pixels, UNITS), nn.ReLU(), fd.Dropout(p), nn.Linear(UNITS, pixels))
    for name, parameter in model.named_parameters():  # small, so that visible features are learned ones
        nn.init.normal_(parameter, 0, 0.01) if name.endswith("weight") else nn.init.zeros_(parameter)
    return model


def concentration(features: Tensor) -> float:
    """The mean share of a row's squares in its largest eighth."""
    squares = features.square().sort(descending=True).values
    return (squares[:, : squares.shape[1] // 8].sum(1) / squares.sum(1)).mean().item()


def correlation(activations: Tensor) -> float:
    """Mean absolute correlation of two different units that are not constant; activations: (images, units)."""
    matrix = torch.corrcoef(activations[:, activations.std(0) > 0].T).abs()
    return ((matrix.sum() - matrix.trace()) / (matrix.numel() - len(matrix))).item()


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments)
    data.train_y = data.train_x  # an autoencoder's target is its input
    x = data.test_x
    found: dict[str, list[float]] = {}
    shown: dict[str, Tensor] = {}
    runs = [(seed, kind) for seed in range(arguments.seeds) for kind in KINDS]
    for seed, kind in progress(runs, "training"):
        torch.manual_seed(seed)
        model = autoencoder(x.shape[1], KINDS[kind]).to(arguments.device)
        train(model, data, epochs=arguments.epochs, batch=100, loss=F.mse_loss).eval()
        with torch.no_grad():
            hidden, variance = model[:2](x), x.var(0).mean()
            halves = [model[3](2 * hidden * (torch.rand_like(hidden[:1]) < 0.5)) for _ in range(20)]
            used = (hidden > 0).any(0)
            seen = hidden[:, used]
            # Scaled by how much each pixel varies: a weight of a pixel that is always blank has no effect.
            features = model[0].weight * data.train_x.std(0)
            measured = {
                "strength in an eighth": concentration(features[used]),
                "correlation": correlation(seen),
                "share on": (seen > 0).float().mean().item(),
                "error": (F.mse_loss(model(x), x) / variance).item(),
                "error of half": (torch.stack([F.mse_loss(half, x) for half in halves]).mean() / variance).item(),
            }
        for what, value in measured.items():
            found.setdefault(f"{what}, {kind}", []).append(value)
        shown.setdefault(kind, features[hidden.mean(0).argsort(descending=True)[:SHOWN]].cpu())

    noise = concentration(torch.randn(1000, x.shape[1]) * data.train_x.std(0).cpu())

    def both(what: str, digits: int = 0) -> str:
        return " and ".join(spread(found[f"{what}, {kind}"], digits) for kind in KINDS)

    halved = [spread(found[f"error of half, {kind}"], 0) for kind in KINDS]
    found_out = f"With half of the units the error is {halved[0]} % of the pixels' variance, with dropout {halved[1]} %"
    picture, axes = figure(found_out, "aabb;cdef", figsize=(9, 7.4), height_ratios=(2, 1))
    colours = dict(zip(KINDS, (COLOURS[1], COLOURS[0]), strict=True))
    for axis, (kind, features) in zip(axes, shown.items(), strict=False):
        rows, side = int(SHOWN**0.5), data.side
        tiles = (features / features.abs().amax(1, keepdim=True)).view(rows, rows, side, side)
        tiles = F.pad(tiles, (0, 1, 0, 1), value=float("nan"))
        tiled = tiles.transpose(1, 2).reshape(rows * (side + 1), -1).numpy()
        axis.imshow(tiled, cmap="RdBu", vmin=-1, vmax=1)
        axis.set_title(f"what {SHOWN} units detect, {kind}", color=colours[kind])
        axis.set_axis_off()
    for axis, (title, bars) in zip(axes[2:], PANELS.items(), strict=True):
        for i, (kind, colour) in enumerate(colours.items()):
            mean, deviation = over_seeds([found[f"{what}, {kind}"] for what in bars], 100)
            places = [place + 0.4 * i - 0.2 for place in range(len(bars))]
            axis.bar(places, mean, 0.36, yerr=deviation, color=colour, capsize=3)
        axis.set_xticks(range(len(bars)), bars.values())
        axis.set(title=title, xlim=(-0.6, len(bars) - 0.4))
    axes[2].set_ylabel("%")
    axes[2].axhline(100 * noise, color="black", linestyle="--", linewidth=1, label="random weights")
    axes[2].legend(fontsize=8, loc="lower center")
    axes[5].set_yscale("log")
    axes[5].yaxis.set_major_formatter("{x:g}")
    axes[5].yaxis.set_minor_formatter("")  # else powers of ten where the axis spans less than a decade
    finish(
        picture,
        arguments,
        "07_coadaptation",
        f"{data.name}, {UNITS} units; each pair: without and with dropout 0.5, in %",
        f"strength in an eighth of the pixels: {both('strength in an eighth')} (random weights: {100 * noise:.0f})",
        f"mean |correlation| of two units: {both('correlation', 1)}",
        f"units on for an image: {both('share on')}",
        f"error, of the pixels' variance: {both('error', 2)}",
        f"the same with a random half of the units: {both('error of half')}",
        data=data,
    )
    return found


if __name__ == "__main__":
    main(parse(options(__doc__, epochs=400, seeds=3, on_mnist={"epochs": 100})))
