"""MC dropout: what a network does not know.

The claim (Gal and Ghahramani 2016, arXiv:1506.02142): the spread of passes with dropout left on says how uncertain a
prediction is, so that it is larger for images unlike those that the network was trained on. Shown are digits as they
are, digits turned by some angle, and noise with the digits' own pixels; then what it is good for: refusing to answer
where the network is unsure takes the errors out of the rest. Beside it the one pass of eval(), which costs a
fiftieth: whether the passes say more than that.

The measure is the entropy of the mean prediction, in nats; 2.30 is that of a guess among ten.
"""

import argparse

import torch
import torch.nn.functional as F
from basics import COLOURS, curve, figure, finish, load, mlp, options, progress, spread, train
from torch import Tensor, nn

import fused_dropout as fd

ANGLES = (0, 15, 30, 45, 60, 75, 90)
KEPT = (1.0, 0.95, 0.9, 0.85, 0.8)
PASSES = 50


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


def kept_errors(wrong: Tensor, unsure: Tensor) -> list[float]:
    """The error of the surest, for each share of KEPT."""
    order = unsure.argsort()
    return [wrong[order[: int(kept * len(order))]].mean().item() for kept in KEPT]


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments)
    found: dict[str, list[float]] = {}
    by_angle: dict[str, list[list[float]]] = {"MC dropout": [], "one pass": [], "error": []}
    refusing: dict[str, list[list[float]]] = {"MC dropout": [], "one pass": [], "at random": []}

    def note(what: str, value: Tensor) -> None:
        found.setdefault(what, []).append(value.item())

    for seed in progress(range(arguments.seeds), "training"):
        torch.manual_seed(seed)
        model = mlp(data.train_x.shape[1], (400, 400), 0.5).to(arguments.device)
        train(model, data, epochs=arguments.epochs).eval()

        def drawn(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.no_grad(), fd.mc_dropout(model):
                return torch.stack([model(x).softmax(-1) for _ in range(PASSES)]).mean(0)

        def single(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.no_grad():
                return model(x).softmax(-1)

        for rows in by_angle.values():
            rows.append([])
        for angle in ANGLES:
            x = turned(data.test_x, data.side, angle)
            mean = drawn(x)
            by_angle["MC dropout"][-1].append(entropy(mean).mean().item())
            by_angle["one pass"][-1].append(entropy(single(x)).mean().item())
            by_angle["error"][-1].append((mean.argmax(-1) != data.test_y).float().mean().item())
        note("same answer", (mean.argmax(-1) == mean.argmax(-1).mode().values).float().mean())

        mean, noise = drawn(data.test_x), shuffled(data.test_x)
        wrong = (mean.argmax(-1) != data.test_y).float()
        for name, predict in (("MC dropout", drawn), ("one pass", single)):
            inside, outside = entropy(predict(data.test_x)), entropy(predict(noise))
            note(f"{name}, seen", inside.mean())
            note(f"{name}, from outside", outside.mean())
            # The area under the curve of true against false alarms: how often the one from outside is the less sure.
            note(f"{name}, told apart", (outside[:, None] > inside).float().mean())
            refusing[name].append(kept_errors(wrong, inside))
        refusing["at random"].append(kept_errors(wrong, torch.rand_like(wrong)))

    found["error of all"] = [run[0] for run in refusing["MC dropout"]]
    for name, runs in refusing.items():
        found[f"{name}, error of the surest 90 %"] = [run[KEPT.index(0.9)] for run in runs]
    for angle in (45, 90):
        found[f"turned by {angle}"] = [run[ANGLES.index(angle)] for run in by_angle["MC dropout"]]

    def of(what: str, digits: int = 2, scale: float = 100) -> str:
        return spread(found[what], digits, scale)

    refused, by_one = (of(f"{name}, error of the surest 90 %", 1) for name in ("MC dropout", "one pass"))
    title = (
        f"Refusing a tenth: errors from {of('error of all', 1)} to {refused} % by MC dropout, {by_one} % by one pass"
    )
    picture, (left, middle, right) = figure(title, "abc")
    outside = sum(found["MC dropout, from outside"]) / arguments.seeds
    left.axhline(outside, color="black", linestyle="--", linewidth=1)
    left.annotate("pixels shuffled, MC dropout", (90, outside), ha="right", va="bottom", fontsize=8)
    colours = {"MC dropout": COLOURS[0], "one pass": COLOURS[1], "at random": "grey", "error": COLOURS[2]}
    for name, runs in by_angle.items():
        axis, scale = (middle, 100) if name == "error" else (left, 1)
        curve(axis, ANGLES, zip(*runs, strict=True), scale, color=colours[name], label=name)
    for name, runs in refusing.items():
        curve(right, [100 - 100 * kept for kept in KEPT], zip(*runs, strict=True), 100, color=colours[name], label=name)
    left.set(
        xlabel="turned by, degrees", ylabel="mean entropy, nats", xticks=ANGLES, title="how unsure", ylim=(0, None)
    )
    middle.set(xlabel="turned by, degrees", ylabel="error, %", xticks=ANGLES, title="how wrong")
    right.set(xlabel="refused, % of the images", ylabel="error of the rest, %", title="refusing the least sure")
    left.legend(frameon=False, fontsize=8, loc="lower center")
    right.legend(frameon=False, fontsize=8)
    shown = (
        f"{data.name}, mean entropy of {PASSES} passes: digits {of('MC dropout, seen', 2, 1)}, turned by 45 degrees "
        f"{of('turned by 45', 2, 1)}, by 90 {of('turned by 90', 2, 1)} nats ({of('same answer', 0)} % of those get the "
        f"same answer), pixels shuffled {of('MC dropout, from outside', 2, 1)}, told apart from digits in "
        f"{of('MC dropout, told apart', 1)} % of pairs (one pass of eval(): {of('one pass, told apart', 1)} %). "
        f"Refusing 10 % takes the error from {of('error of all', 1)} % to {refused} % (by one pass: {by_one} %)."
    )
    finish(picture, arguments, "06_mc_dropout", shown)
    return found


if __name__ == "__main__":
    main(options(__doc__, epochs=20, seeds=5).parse_args())
