"""MC dropout: what a network does not know.

The claim (Gal and Ghahramani 2016, arXiv:1506.02142): the spread of passes with dropout left on says how uncertain a
prediction is, so that it is larger for images unlike those that the network was trained on. Shown are digits as they
are, digits turned by some angle, and noise with the digits' own pixels; then what it is good for: refusing to answer
where the network is unsure takes the errors out of the rest.

The measure is the entropy of the mean prediction, in nats; 2.30 is that of a guess among ten.
"""

import argparse

import torch
import torch.nn.functional as F
from basics import COLOURS, figure, finish, load, mlp, options, progress, spread, train
from torch import Tensor, nn

import fused_dropout as fd

ANGLES = (0, 15, 30, 45, 60, 75, 90)
KEPT = (1.0, 0.95, 0.9, 0.85, 0.8)


def turned(x: Tensor, side: int, degrees: float) -> Tensor:
    """Rows of pixels, turned about the middle."""
    angle = torch.deg2rad(torch.tensor(float(degrees)))
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, 0 * cos]), torch.stack([sin, cos, 0 * cos])]).to(x.device)
    images = x.view(-1, 1, side, side)
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).flatten(1)


def shuffled(x: Tensor) -> Tensor:
    """Each image's own pixels in an order of their own."""
    return x.gather(1, torch.rand_like(x).argsort(1))


def entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1)


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments)
    found: dict[str, list[float]] = {}
    by_angle: list[list[tuple[float, float]]] = []
    rejection: dict[str, list[list[float]]] = {"MC dropout": [], "at random": []}
    for seed in progress(range(arguments.seeds), "training"):
        torch.manual_seed(seed)
        model = train(
            mlp(data.train_x.shape[1], (400, 400), 0.5).to(arguments.device), data, epochs=arguments.epochs
        ).eval()

        def predict(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.no_grad(), fd.mc_dropout(model):
                return torch.stack([model(x).softmax(-1) for _ in range(50)]).mean(0)

        rows = []
        for angle in ANGLES:
            mean = predict(turned(data.test_x, data.side, angle))
            rows.append((entropy(mean).mean().item(), (mean.argmax(-1) != data.test_y).float().mean().item()))
        by_angle.append(rows)
        mean = predict(data.test_x)
        unsure, wrong = entropy(mean), (mean.argmax(-1) != data.test_y).float()
        outside = entropy(predict(shuffled(data.test_x)))
        found.setdefault("seen", []).append(unsure.mean().item())
        found.setdefault("turned by 45", []).append(rows[ANGLES.index(45)][0])
        found.setdefault("from outside", []).append(outside.mean().item())
        # The area under the curve of true against false alarms: how often one from outside is the less sure of a pair.
        found.setdefault("told apart", []).append((outside[:, None] > unsure[None]).float().mean().item())
        for name, order in (
            ("MC dropout", unsure.argsort()),
            ("at random", torch.randperm(len(unsure), device=unsure.device)),
        ):
            rejection[name].append([wrong[order[: int(kept * len(order))]].mean().item() for kept in KEPT])
    found["error of all"] = [run[0] for run in rejection["MC dropout"]]
    found["error of the surest 90 %"] = [run[2] for run in rejection["MC dropout"]]

    picture, (left, right) = figure("Unsure where it is wrong, but not of digits on their side", columns=2)
    angles = torch.tensor(by_angle)
    left.errorbar(
        ANGLES, angles[:, :, 0].mean(0), angles[:, :, 0].std(0, correction=0), color=COLOURS[0], marker="o", capsize=3
    )
    left.axhline(sum(found["from outside"]) / arguments.seeds, color=COLOURS[1], linestyle="--")
    left.annotate("pixels shuffled", (0, sum(found["from outside"]) / arguments.seeds), color=COLOURS[1], va="bottom")
    left.set(xlabel="turned by, degrees", ylabel="entropy of the prediction, nats", xticks=ANGLES)
    twin = left.twinx()
    twin.plot(ANGLES, 100 * angles[:, :, 1].mean(0), color=COLOURS[2], marker="s")
    twin.set_ylabel("error, %", color=COLOURS[2])
    for (name, runs), colour in zip(rejection.items(), (COLOURS[0], "grey"), strict=True):
        curve = 100 * torch.tensor(runs)
        right.errorbar(
            [100 * (1 - kept) for kept in KEPT],
            curve.mean(0),
            curve.std(0, correction=0),
            color=colour,
            marker="o",
            capsize=3,
            label=name,
        )
    right.set(
        xlabel="refused, % of the images",
        ylabel=f"error of the rest on {data.name}, %",
        title="refusing the least sure",
    )
    right.legend(frameon=False)
    found["on their side"] = angles[:, -1, 0].tolist()
    means = {name: spread(found[name], 2, 1) for name in ("seen", "turned by 45", "on their side", "from outside")}
    shown = (
        f"{data.name}, mean entropy in nats: digits {means['seen']}, turned by 45 degrees {means['turned by 45']}, by "
        f"90 {means['on their side']}, pixels shuffled {means['from outside']}, told apart from digits in "
        f"{spread(found['told apart'])} % of pairs. Refusing 10 % takes the error from "
        f"{spread(found['error of all'])} % to {spread(found['error of the surest 90 %'])} %."
    )
    finish(picture, arguments, "06_mc_dropout", shown)
    return found


if __name__ == "__main__":
    main(options(__doc__, epochs=20, seeds=3).parse_args())
