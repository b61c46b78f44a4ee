"""A character-level transformer, with nn.Dropout and with fd.Dropout.

The claim is this library's own: swapping the dropout changes nothing but the time and the memory. The same model, from
the same seed, is trained with torch's layers and after ``fd.convert``; their masks differ, so the curves do too, but no
more than those of two seeds. Without dropout the small text is learnt by heart, and the validation loss turns up.

The text is made here, by a grammar: sentences of subject, verb and object, whose words agree in number.
"""

import argparse
import random
import time

import torch
import torch.nn.functional as F
from basics import COLOURS, figure, finish, options, progress, spread
from torch import Tensor, nn

import fused_dropout as fd

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


def run(
    kind: str, codes: tuple[Tensor, Tensor], symbols: int, steps: int, device: str
) -> tuple[list[float], float, int]:
    """Validation losses, seconds a step, and the bytes that autograd keeps for backward in one."""
    model = Characters(symbols, 0.0 if kind == "no dropout" else P).to(device)
    if kind == "fd.Dropout":
        fd.convert(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, taken, kept = [], [], {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    for step in range(steps):
        x, y = batch(codes[0])
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep if step == 0 else lambda x: x, lambda x: x):
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken.append(time.perf_counter() - start)
        if (step + 1) % 20 == 0:
            model.eval()
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)
                pairs = [batch(codes[1]) for _ in range(4)]
                losses.append(sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in pairs) / 4)
            model.train()
    return losses, sorted(taken)[len(taken) // 2], sum(kept.values())


def main(arguments: argparse.Namespace) -> dict[str, list[float]]:
    written = text(700, seed=1)
    letters = sorted(set(written))
    codes = torch.tensor([letters.index(letter) for letter in written], device=arguments.device)
    parts = codes[: len(codes) // 2], codes[len(codes) // 2 :]
    kinds = ("nn.Dropout", "fd.Dropout", "no dropout")
    curves: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    kept: dict[str, int] = {}
    for seed, kind in progress([(s, k) for s in range(arguments.seeds) for k in kinds], "training"):
        torch.manual_seed(seed)
        losses, each, kept[kind] = run(kind, parts, len(letters), 20 * arguments.epochs, arguments.device)
        curves[kind].append(losses)
        seconds[kind].append(each)

    ends = {kind: [losses[-1] for losses in each] for kind, each in curves.items()}
    picture, (left, right) = figure("fd.Dropout for nn.Dropout: the same curve, in less time and memory", columns=2)
    for kind, colour in zip(kinds, (COLOURS[1], COLOURS[0], "grey"), strict=True):
        for i, losses in enumerate(curves[kind]):
            steps = [20 * (j + 1) for j in range(len(losses))]
            left.plot(steps, losses, color=colour, linewidth=1, label=kind if i == 0 else None)
    left.set(xlabel="step", ylabel="validation loss, nats a character", title=f"{arguments.seeds} seeds each")
    left.legend(frameon=False)
    places = range(len(kinds))
    bars = [1000 * sum(seconds[kind]) / arguments.seeds for kind in kinds]
    right.bar(places, bars, 0.6, color=[COLOURS[1], COLOURS[0], "grey"])
    right.bar_label(right.containers[0], [f"{kept[kind] / 2**20:.1f} MiB" for kind in kinds])
    right.set(ylabel="ms a step, median", title="time, and memory kept for backward")
    right.set_xticks(places, kinds)
    ratio = [ours / theirs for ours, theirs in zip(seconds["fd.Dropout"], seconds["nn.Dropout"], strict=True)]
    shown = (
        f"{len(parts[0]):,} characters, {arguments.seeds} seeds, last validation loss: "
        + ", ".join(f"{kind} {spread(ends[kind], 3, 1)}" for kind in kinds)
        + f". fd.Dropout takes {spread(ratio, 2, 1)} of nn.Dropout's time a step, and keeps "
        f"{kept['fd.Dropout'] / 2**20:.1f} MiB for backward instead of {kept['nn.Dropout'] / 2**20:.1f} (no dropout: "
        f"{kept['no dropout'] / 2**20:.1f})."
    )
    finish(picture, arguments, "08_char_transformer", shown)
    return {**{f"loss, {kind}": values for kind, values in ends.items()}, "kept": [float(kept[kind]) for kind in kinds]}


if __name__ == "__main__":
    parser = options(__doc__, epochs=20, seeds=2)
    main(parser.parse_args())
