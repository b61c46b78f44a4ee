"""MC dropout: what a network does not know.

The claim (Gal and Ghahramani 2016, arXiv:1506.02142): with dropout left on at test time the passes differ, and their
differences measure how uncertain a prediction is. The images are upright, rotated by some angle, or have their pixels
shuffled. Three scores are compared:

- *entropy*: the entropy of the mean prediction of all passes, which includes the uncertainty within each pass;
- *disagreement*: the entropy of the mean minus the mean entropy of a pass, which is what only several passes can show
  (the mutual information of prediction and weights);
- *one pass*: the entropy of the prediction after eval(), for a fiftieth of the cost.

All are in nats; 2.30 is the entropy of a guess among ten classes. The example then refuses to answer for the images
with the highest scores, and measures the error of the others. That use is not the paper's.
"""

import argparse
from statistics import fmean

import torch
import torch.nn.functional as F
from basics import COLOURS, curve, figure, finish, load, mlp, options, parse, spread, train
from torch import Tensor, nn

import fused_dropout as fd
from fused_dropout.bench.progress import progress

ANGLES = (0, 15, 30, 45, 60, 75, 90)
KEPT = (1.0, 0.95, 0.9, 0.85, 0.8)
PASSES = 50
SCORES = ("entropy", "disagreement", "one pass")


def turned(x: Tensor, side: int, degrees: float) -> Tensor:
    """Images, as rows of pixels, rotated about their centre."""
    angle = torch.deg2rad(torch.tensor(float(degrees)))
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, 0 * cos]), torch.stack([sin, cos, 0 * cos])]).to(x.device)
    images = x.view(-1, 1, side, side)
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).flatten(1)


def shuffled(x: Tensor) -> Tensor:
    """The pixels of each image in a random order, another one for each image."""
    return x.gather(1, torch.rand_like(x).argsort(1))


def entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1)


def kept_errors(wrong: Tensor, unsure: Tensor) -> list[float]:
    """The error of the least uncertain images, for each share of them in KEPT."""
    order = unsure.argsort()
    return [wrong[order[: int(kept * len(order))]].mean().item() for kept in KEPT]


@torch.no_grad()
def scores(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each score the predictions, (images, classes), and how uncertain they are, (images,)."""
    with fd.mc_dropout(model):
        passes = torch.stack([model(x).softmax(-1) for _ in range(PASSES)])
    mean, single = passes.mean(0), model(x).softmax(-1)
    unsure = entropy(mean)
    return {
        "entropy": (mean, unsure),
        "disagreement": (mean, unsure - entropy(passes).mean(0)),
        "one pass": (single, entropy(single)),
    }


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    data = load(arguments)
    found: dict[str, list[float]] = {}
    unsure_of: dict[str, list[list[float]]] = {score: [] for score in SCORES}
    refusing: dict[str, list[list[float]]] = {score: [] for score in (*SCORES, "at random")}
    turned_wrong: list[list[float]] = []

    def note(what: str, value: Tensor) -> None:
        found.setdefault(what, []).append(value.float().mean().item())

    for seed in progress(range(arguments.seeds), "training"):
        torch.manual_seed(seed)
        model = mlp(data.train_x.shape[1], (400, 400), 0.5).to(arguments.device)
        train(model, data, epochs=arguments.epochs).eval()

        at_angle = [scores(model, turned(data.test_x, data.side, angle)) for angle in ANGLES]
        answers = [scored["entropy"][0].argmax(-1) for scored in at_angle]
        turned_wrong.append([(answer != data.test_y).float().mean().item() for answer in answers])
        note("same answer", answers[-1] == answers[-1].mode().values)

        noise = scores(model, shuffled(data.test_x))
        for score, (prediction, unsure) in at_angle[0].items():
            unsure_of[score].append([scored[score][1].mean().item() for scored in at_angle])
            note(f"{score}, from outside", noise[score][1])
            # The area under the ROC curve: how often a shuffled image gets a higher score than an upright one.
            note(f"{score}, told apart", noise[score][1][:, None] > unsure)
            wrong = (prediction.argmax(-1) != data.test_y).float()
            refusing[score].append(kept_errors(wrong, unsure))
        refusing["at random"].append(kept_errors(wrong, torch.rand_like(wrong)))

    for score, runs in refusing.items():
        found[f"{score}, error"] = [run[0] for run in runs]
        found[f"{score}, error of the surest"] = [run[KEPT.index(0.9)] for run in runs]
    for score, runs in unsure_of.items():
        for place in (0, len(ANGLES) - 1):
            found[f"{score}, turned by {ANGLES[place]}"] = [run[place] for run in runs]

    def of(score: str, what: str, digits: int = 1, scale: float = 100) -> str:
        return spread(found[f"{score}, {what}"], digits, scale)

    left_over = ", ".join(f"{of(score, 'error of the surest')} % by {score}" for score in SCORES)
    picture, (left, middle, right) = figure(f"Refusing a tenth leaves errors: {left_over}", "abc")
    colours = dict(zip((*SCORES, "at random"), (*COLOURS[:3], "grey"), strict=True))
    for score, runs in refusing.items():
        if score in SCORES:
            curve(left, ANGLES, zip(*unsure_of[score], strict=True), color=colours[score], label=score)
            left.axhline(fmean(found[f"{score}, from outside"]), color=colours[score], linestyle="--", linewidth=1)
        places = [100 - 100 * kept for kept in KEPT]
        curve(right, places, zip(*runs, strict=True), 100, color=colours[score], label=score)
    curve(middle, ANGLES, zip(*turned_wrong, strict=True), 100, color="black")
    left.set(xlabel="turned by, degrees", ylabel="nats, mean", xticks=ANGLES, ylim=(0, None))
    left.set_title(f"how unsure, {PASSES} passes (dashed: pixels shuffled)")
    middle.set(xlabel="turned by, degrees", ylabel="error, %", xticks=ANGLES, ylim=(0, 100), title="how wrong")
    right.set(xlabel="refused, % of the images", ylabel="error of the rest, %", title="refusing the least sure")
    right.legend(frameon=False, fontsize=8)
    findings = [f"{data.name}, {PASSES} passes; how unsure in nats: upright, turned by 90 degrees, pixels shuffled"]
    for score in SCORES:
        nats = ", ".join(of(score, of_what, 2, 1) for of_what in ("turned by 0", "turned by 90", "from outside"))
        before, after = of(score, "error"), of(score, "error of the surest")
        findings.append(f"{score}: {nats}")
        findings.append(f"{score}: tells shuffled pixels from digits in {of(score, 'told apart')} % of pairs")
        findings.append(f"{score}: refusing the least sure tenth takes the error from {before} to {after} %")
    same = f"{spread(found['same answer'], 0)} % of the digits turned by 90 degrees get the same answer"
    finish(picture, arguments, "06_mc_dropout", *findings, same, data=data)
    return found


if __name__ == "__main__":
    main(parse(options(__doc__, epochs=20, seeds=5)))
