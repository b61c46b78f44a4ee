"""The long form of the statistics, with new keys: `make statistics`, under twenty minutes on two cores.

Prints a table: test, draws, statistic, p-value, and the smallest fault that the test would have detected. An alarm is
a p-value below 1e-6 / 400. There are fewer than 400 tests, so a correct dropout alarms at most once in a million runs.
The suite runs the same tests with fixed keys; here they use up to 2^31 draws. The test that trained networks are
equivalent runs only here.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from statistics import fmean, variance

import torch
import torch.nn.functional as F
from common import RATES, power_of_tost, tost
from torch import nn

import fused_dropout as fd
from fused_dropout import testing
from fused_dropout.testing.distributions import binomial_p_value, normal_limit
from fused_dropout.testing.statistics import HEADER

TESTS = 400
ALPHA = 1e-6 / TESTS
# Differences that do not matter on a test set of 450 digits. They were fixed before the first run.
MARGINS = {"test accuracy": 0.005, "test loss": 0.02}
MODULES = (fd.Dropout, nn.Dropout)
RUNS, EPOCHS, P_HIDDEN, EQUIVALENCE_LEVEL = 48, 15, 0.2, 0.01


def fresh_key(seed: int | None = None, offset: int | None = None) -> torch.Tensor:
    """[seed, offset]; a part that is not given is drawn from the default generator."""
    drawn = torch.empty(2, dtype=torch.int64).random_().tolist()
    given = [given if given is not None else fresh for given, fresh in zip((seed, offset), drawn, strict=True)]
    return torch.tensor(given, dtype=torch.uint64)


def named(prefix: str, results: Iterator[testing.Result] | list[testing.Result]) -> Iterator[testing.Result]:
    for result in results:
        yield replace(result, test=f"{prefix} {result.test}")


def rates() -> Iterator[testing.Result]:
    for p in RATES:
        mask = fd.keep_mask((2**26,), p, fresh_key())
        yield replace(testing.rate(mask, p, ALPHA), test=f"rate, p = {p:.8g}")


def rate_of_2_to_the_31(p: float = 0.1) -> Iterator[testing.Result]:
    """One mask of 2^31 elements, in pieces."""
    n, piece, key = 2**31, 2**26, fresh_key()
    kept = sum(int(fd.keep_mask((piece,), p, key, start=i).count_nonzero()) for i in range(0, n, piece))
    deviation = math.sqrt(n * p * (1 - p))
    z, p_value = (n - kept - n * p) / deviation, binomial_p_value(n - kept, n, p)
    detail = f"drops {1 - kept / n:.9g}"
    fault = "of the rate, absolute"
    yield testing.Result(
        f"rate, p = {p:g}, one mask", n, z, p_value, normal_limit(ALPHA) * deviation / n, fault, detail
    )


def moments() -> Iterator[testing.Result]:
    for dtype, p in itertools.product((torch.float32, torch.float64, torch.float16, torch.bfloat16), (0.1, 0.3, 0.9)):
        x = torch.rand(2**24).add_(1).to(dtype)
        y = fd.dropout(x, p, key=fresh_key())
        results = [testing.mean(x, y, p, ALPHA), testing.variance(x, y, p, ALPHA), testing.scale(x, y, p)]
        yield from named(f"{str(dtype).removeprefix('torch.')}, p = {p}:", results)


def stacked(name: str, masks: torch.Tensor) -> Iterator[testing.Result]:
    yield testing.autocorrelation(masks, f"every shift, {name}", ALPHA)
    if masks.double().mean() > 0.4:
        yield testing.collisions(masks, f"collisions, {name}", ALPHA)


def related_keys(n: int = 2**17) -> Iterator[testing.Result]:
    """Seeds and offsets that are adjacent or differ in one bit, and distant pieces of one mask."""
    seed, offset = fresh_key().tolist()
    keys = {
        "seeds one bit apart": [(seed ^ 1 << bit, offset) for bit in range(64)],
        "offsets one bit apart": [(seed, offset ^ 1 << bit) for bit in range(64)],
        "offsets in a row": [(seed, offset + k) for k in range(64)],
        "ranks: seeds in a row": [(seed + k, 0) for k in range(64)],
    }
    for name, of_name in keys.items():
        yield from stacked(name, torch.stack([fd.keep_mask((n,), 0.5, fresh_key(*key)) for key in of_name]))
    starts = [*range(0, 16 * 2**32, 2**32), *range(2**36, 2**40, 2**36)]
    key = fresh_key()
    yield from stacked("far parts", torch.stack([fd.keep_mask((n,), 0.5, key, start=start) for start in starts]))


def layers_in_training(module: type[nn.Module]) -> Iterator[testing.Result]:
    """The masks of four layers of one width in 128 steps: compares all layers, step distances and shifts."""
    masks: list[torch.Tensor] = []
    model = nn.Sequential(*itertools.chain(*((nn.Linear(64, 64), module(0.1)) for _ in range(4))))
    for layer in model[1::2]:
        layer.register_forward_hook(lambda _, inputs, output: masks.append((output != 0).flatten()))
    for _ in range(128):
        model(torch.randn(256, 64)).sum().backward()
    yield from stacked(f"layers and steps, {module.__module__.split('.')[0]}", torch.stack(masks).view(128, 4, -1))


def short_calls() -> Iterator[testing.Result]:
    """2^20 new seeds. Among 32-bit seeds, about a hundred would repeat."""
    masks = testing.sample(partial(fd.dropout, p=0.5), 2**20, (64,), torch.float32, "cpu", seconds=120)
    yield testing.collisions(masks, "collisions, 2^20 calls", ALPHA)
    yield from named("2^20 calls:", list(testing.uniformity(masks, ALPHA)))


def checks() -> Iterator[testing.Result]:
    for (name, dropout), p in itertools.product({"fd": fd.dropout, "torch": F.dropout}.items(), (0.1, 0.5)):
        report = testing.check(
            partial(dropout, p=p),
            p,
            evaluation=partial(dropout, p=p, training=False),
            p_zero=partial(dropout, p=0.0),
            n=2**24,
            seconds=90,
            family=50 * ALPHA,
        )
        yield from named(f"{name} {p:g}:", report.results)


def train(module: type[nn.Module], data: list[torch.Tensor], seed: int) -> tuple[float, float]:
    """Accuracy and loss on the test set."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, 128), nn.ReLU(), module(P_HIDDEN), nn.Linear(128, 64), nn.ReLU(), module(P_HIDDEN)]
    model = nn.Sequential(*hidden, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        outputs = model.eval()(test_images)
    accuracy = (outputs.argmax(1) == test_labels).double().mean().item()
    return accuracy, F.cross_entropy(outputs, test_labels).item()


def equivalence_in_training(seed: int) -> Iterator[tuple[bool, str]]:
    """Two one-sided tests on the means over runs with different seeds: the verdict, and the interval."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    split = len(order) * 3 // 4
    data = [tensor[part] for part in (order[:split], order[split:]) for tensor in (images.float() / 16, labels)]
    seeds = iter(range(seed % 2**62, 2**63))
    ours, theirs = (zip(*(train(module, data, next(seeds)) for _ in range(RUNS)), strict=True) for module in MODULES)
    for (name, margin), a, b in zip(MARGINS.items(), ours, theirs, strict=True):
        difference, deviation = fmean(a) - fmean(b), math.sqrt((variance(a) + variance(b)) / RUNS)
        p_value, power = tost(difference, deviation, margin), power_of_tost(deviation, margin, EQUIVALENCE_LEVEL)
        half = 2.3263 * deviation  # the interval for a level of 0.01
        interval = f"98 % interval [{difference - half:+.5f}, {difference + half:+.5f}]"
        means = f"{name}: fd {fmean(a):.5f}, torch {fmean(b):.5f}, {RUNS} runs each, difference {difference:+.5f}"
        verdict = f"margin {margin}, p-value {p_value:.1e}, power {power:.3f}"
        yield p_value < EQUIVALENCE_LEVEL, f"{means}, {interval}, {verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="default: a fresh one")
    options = parser.parse_args()
    seed = torch.seed() if options.seed is None else options.seed
    torch.manual_seed(seed)
    start, results = time.perf_counter(), []
    print(f"seed {seed}; alarm at a p-value below {ALPHA:.1e}\n{HEADER}", flush=True)
    layers = [partial(layers_in_training, module) for module in MODULES]
    for group in (rates, rate_of_2_to_the_31, moments, related_keys, *layers, short_calls, checks):
        for result in group():
            results.append(result)
            print(f"{result}{f'  <- WRONG: {result.detail}' if result.p_value < ALPHA else ''}", flush=True)
    assert len(results) <= TESTS
    equivalent = True
    if find_spec("sklearn"):
        for shown, line in equivalence_in_training(seed):
            equivalent &= shown
            print(f"{line}: {'equivalent' if shown else 'NOT SHOWN to be equivalent'}", flush=True)
    else:
        print("training on digits: skipped, there is no scikit-learn")
    alarms, least = sum(r.p_value < ALPHA for r in results), min(r.p_value for r in results)
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(results)} tests, {alarms} alarms, least p-value {least:.1e}, {minutes:.1f} minutes")
    return int(alarms > 0 or not equivalent)


if __name__ == "__main__":
    sys.exit(main())
