"""Co-adaptation made visible: what hidden units become with and without dropout.

The claim (Hinton et al. 2012, arXiv:1207.0580; Srivastava et al. 2014, JMLR 15): a unit cannot rely on others to be
there, so it has to detect something useful by itself. Then features should be plainer to the eye, units should agree
less with one another, and fewer of them should be on for an image. Each is measured on the first layer of a network
with one hidden layer, on test images in evaluation mode: the mean absolute correlation of two units, the share of units
that are on, and the error when half of the units are taken away at test time: how much they lean on each other.
"""

import argparse

import torch
from basics import COLOURS, figure, finish, load, mlp, options, progress, spread, train
from torch import Tensor, nn

SHOWN = 64


def correlation(activations: Tensor) -> float:
    """Mean absolute correlation of two different units that are not constant; activations: (images, units)."""
    alive = activations[:, activations.std(0) > 0]
    matrix = torch.corrcoef(alive.T).abs()
    return ((matrix.sum() - matrix.trace()) / (matrix.numel() - len(matrix))).item()


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments)
    found: dict[str, list[float]] = {}
    features: dict[float, Tensor] = {}
    on: dict[float, Tensor] = {}
    for seed, p in progress([(s, p) for s in range(arguments.seeds) for p in (0.0, 0.5)], "training"):
        torch.manual_seed(seed)
        model = train(mlp(data.train_x.shape[1], [256], p).to(arguments.device), data, epochs=arguments.epochs).eval()
        name = "with dropout" if p else "without"
        with torch.no_grad():
            hidden = model[:2](data.test_x)
            halved = [model[3](2 * hidden * (torch.rand_like(hidden[:1]) < 0.5)) for _ in range(20)]
        wrong = torch.stack([(answer.argmax(-1) != data.test_y).float().mean() for answer in halved])
        measured = {
            "correlation": correlation(hidden),
            "share on": (hidden > 0).float().mean().item(),
            "mean activation": hidden.mean().item(),
            "error": (model(data.test_x).argmax(-1) != data.test_y).float().mean().item(),
            "error without half": wrong.mean().item(),
        }
        for what, value in measured.items():
            found.setdefault(f"{what}, {name}", []).append(value)
        if seed == 0:
            strongest = hidden.mean(0).argsort(descending=True)[:SHOWN]
            features[p], on[p] = model[0].weight.detach()[strongest].cpu(), (hidden > 0).float().mean(0).cpu()

    def both(what: str, digits: int = 2, scale: float = 1) -> str:
        values = (spread(found[f"{what}, {name}"], digits, scale) for name in ("without", "with dropout"))
        return " and ".join(values)

    picture, axes = figure(
        "Half of the units can go where each learnt to do without the others", columns=3, figsize=(12, 4)
    )
    for axis, (p, rows) in zip(axes, features.items(), strict=False):
        tiles = rows / rows.abs().amax(1, keepdim=True)
        side = int(SHOWN**0.5)
        images = nn.functional.pad(tiles.view(side, side, data.side, data.side), (0, 1, 0, 1), value=float("nan"))
        axis.imshow(images.transpose(1, 2).reshape(side * (data.side + 1), -1), cmap="RdBu", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[], title=f"incoming weights, p = {p}")
    names = ["correlation", "share on", "error", "error without half"]
    for i, (name, colour) in enumerate({"without": COLOURS[1], "with dropout": COLOURS[0]}.items()):
        values = torch.tensor([found[f"{what}, {name}"] for what in names])
        places = torch.arange(len(names)) + 0.4 * i - 0.2
        axes[2].bar(places, values.mean(1), 0.4, yerr=values.std(1, correction=0), color=colour, capsize=3, label=name)
    axes[2].set_xticks(
        range(len(names)), ["correlation\nof units", "share of\nunits on", "test\nerror", "error with half\nthe units"]
    )
    axes[2].set(ylabel="a share of 1", title=f"{data.name}, {arguments.seeds} seeds")
    axes[2].legend(frameon=False)
    shown = (
        f"{data.name}, without and with dropout 0.5: mean |correlation| of units {both('correlation')}; units on "
        f"{both('share on', 0, 100)} %; mean activation {both('mean activation')}; test error {both('error', 1, 100)} "
        f"%, with half of the units taken away {both('error without half', 1, 100)} %."
    )
    finish(picture, arguments, "07_coadaptation", shown)
    return found


if __name__ == "__main__":
    main(options(__doc__, epochs=60, seeds=3).parse_args())
