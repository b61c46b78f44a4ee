"""A character-level transformer, with nn.Dropout and with fd.Dropout.

The claim is this library's own: to replace nn.Dropout changes only time and memory. The same model is trained from the
same seed with torch's layers and after ``fd.convert``. The masks differ, so the loss curves differ too, but not by
more than those of two seeds should. (Two seeds show only large differences; ``python -m fused_dropout check`` tests
the masks themselves.) The models take their steps in turn, so that all meet the same load of the machine. A model
without dropout is trained for comparison.

A grammar makes the text: sentences of subject, verb and object, whose words agree in number.
"""

import argparse
import random
import time
from statistics import median

import torch
import torch.nn.functional as F
from basics import COLOURS, figure, finish, options, parse, spread
from torch import Tensor, nn

import fused_dropout as fd
from fused_dropout.bench.progress import progress

CONTEXT, WIDTH, HEADS, LAYERS, P = 64, 96, 4, 2, 0.2
ONE = ["the old miller", "a stranger", "her brother", "the captain", "a red fox", "the clerk", "our neighbour"]
MANY = ["two children", "the sailors", "seven crows", "his sisters", "the judges", "some travellers"]
ACTS = [("sees", "see"), ("follows", "follow"), ("forgets", "forget"), ("carries", "carry"), ("remembers", "remember")]
THINGS = [
    "the lantern",
    "a broken wheel",
    "the north road",
    "three letters",
    "the harvest",
    "an empty house",
    "the sea",
]
WHEN = ["at night", "in the morning", "before the rain", "again", "without a word", "every winter"]


def text(sentences: int, seed: int) -> str:
    drawn = random.Random(seed)

    def clause() -> str:
        many = drawn.random() < 0.5
        verb = drawn.choice(ACTS)[many]
        return f"{drawn.choice(MANY if many else ONE)} {verb} {drawn.choice(THINGS)}"

    def sentence() -> str:
        first = f"{clause()} {drawn.choice(WHEN)}"
        return f"{first}, and {clause()}." if drawn.random() < 0.4 else f"{first}."

    return " ".join(sentence() for _ in range(sentences))


class Characters(nn.Module):
    def __init__(self, symbols: int, p: float) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, p, batch_first=True, norm_first=True)
        self.drop, self.blocks = nn.Dropout(p), nn.TransformerEncoder(block, LAYERS, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, symbols)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        hidden = self.drop(self.symbols(x) + self.places(torch.arange(x.shape[1], device=x.device)))
        return self.out(self.blocks(hidden, mask=mask, is_causal=True))


def batch(codes: Tensor, size: int = 32) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(codes) - CONTEXT - 1, (size, 1))
    rows = codes[(starts + torch.arange(CONTEXT + 1)).to(codes.device)]
    return rows[:, :-1], rows[:, 1:]


class Run:
    """A model in training."""

    def __init__(self, kind: str, symbols: int, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.model = Characters(symbols, 0.0 if kind == "no dropout" else P).to(device)
        if kind == "fd.Dropout":
            fd.convert(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())

    def step(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(x, y).backward()
        self.optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def validate(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.model.eval()
        with torch.no_grad():
            self.losses.append(sum(self.loss(x, y).item() for x, y in batches) / len(batches))
        self.model.train()

    def kept(self, x: Tensor, y: Tensor) -> int:
        """The bytes that autograd keeps for backward in a step."""
        sizes = {}

        def keep(saved: Tensor) -> Tensor:
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            loss = self.loss(x, y)  # kept alive: storages that are freed and reused would count once
        del loss
        return sum(sizes.values())


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    written = text(700, seed=1)
    letters = sorted(set(written))
    codes = torch.tensor([letters.index(letter) for letter in written], device=arguments.device)
    parts = codes[: len(codes) // 2], codes[len(codes) // 2 :]
    kinds = ("nn.Dropout", "fd.Dropout", "no dropout")
    curves: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    ratio, kept = [], {}
    for seed in range(arguments.seeds):
        runs = {kind: Run(kind, len(letters), seed, arguments.device) for kind in kinds}
        validation = [batch(parts[1]) for _ in range(4)]
        kept = {kind: each.kept(*batch(parts[0])) for kind, each in runs.items()}
        for i in progress(range(20 * arguments.epochs), f"training, seed {seed}"):
            shared = batch(parts[0])
            for each in runs.values():  # in turn: the speed of a machine changes
                each.step(*shared)
                if i % 20 == 19:
                    each.validate(validation)
        for kind, each in runs.items():
            curves[kind].append(each.losses)
            seconds[kind].append(median(each.seconds))
        pairs = zip(runs["fd.Dropout"].seconds, runs["nn.Dropout"].seconds, strict=True)
        ratio.append(median(ours / theirs for ours, theirs in pairs))

    ends = {kind: [losses[-1] for losses in each] for kind, each in curves.items()}
    lost = " and ".join(spread(ends[kind], 2, 1) for kind in kinds[:2])
    title = f"nn.Dropout and fd.Dropout: losses {lost}, and {spread(ratio, 2, 1)} of the time a step"
    picture, (left, right) = figure(title)
    for kind, colour in zip(kinds, (COLOURS[1], COLOURS[0], "grey"), strict=True):
        for i, losses in enumerate(curves[kind]):
            steps = [20 * (j + 1) for j in range(len(losses))]
            width = 5 if kind == "nn.Dropout" else 1.2  # visible below the other curve
            left.plot(steps, losses, marker=".", color=colour, linewidth=width, label=None if i else kind)
    left.set(xlabel="step", ylabel="validation loss, nats a character", title=f"{arguments.seeds} seeds each")
    left.legend(frameon=False)
    places = range(len(kinds))
    bars = [1000 * sum(seconds[kind]) / arguments.seeds for kind in kinds]
    right.bar(places, bars, 0.6, color=[COLOURS[1], COLOURS[0], "grey"])
    right.bar_label(right.containers[0], [f"{kept[kind] / 2**20:.1f} MiB" for kind in kinds])
    right.set(ylabel="ms a step, median", title="time, and memory kept for backward")
    right.set_xticks(places, kinds)
    finish(
        picture,
        arguments,
        "08_char_transformer",
        f"{len(parts[0]):,} characters, {arguments.seeds} seeds",
        "validation loss: " + ", ".join(f"{kind} {spread(ends[kind], 3, 1)}" for kind in kinds),
        f"a step with fd.Dropout takes {spread(ratio, 2, 1)} of the time of one with nn.Dropout",
        "MiB kept for backward: " + ", ".join(f"{kind} {kept[kind] / 2**20:.1f}" for kind in kinds),
    )
    return {f"loss, {kind}": ends[kind] for kind in kinds} | {f"kept, {kind}": [kept[kind]] for kind in kinds}


if __name__ == "__main__":
    parser = options(__doc__, epochs=10, seeds=2, data=False)
    main(parse(parser))
