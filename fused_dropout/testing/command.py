"""``python -m fused_dropout check``: the tests of ``testing.check`` on a dropout that is named on the command line."""

import argparse
import inspect
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .callables import Dropping, check, check_settings


def adapt(target: Any, p: float) -> tuple[Dropping, list[Dropping]]:
    """``fn`` and ``idle`` for ``testing.check``: of a module class, of a function with a parameter ``p``; of anything
    else it is the callable itself, and nothing that has to be idle is known."""
    if isinstance(target, type) and issubclass(target, nn.Module):
        return target(p), [target(p).eval(), target(0.0)]
    try:
        parameters = set(inspect.signature(target).parameters)
    except ValueError:  # built in
        parameters = set()
    if "p" not in parameters:
        return target, []
    idle: list[Dropping] = [partial(target, p=0.0)]
    if "training" in parameters:
        idle.append(partial(target, p=p, training=False))
    return partial(target, p=p), idle


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m fused_dropout check", description="What is wrong with a dropout's masks"
    )
    parser.add_argument(
        "target",
        nargs="?",
        default="fused_dropout:dropout",
        metavar="module:callable",
        help="a module class, a function with a parameter p, or any fn(x) whose p is then to be given. "
        "Default: %(default)s",
    )
    parser.add_argument("--p", type=float, action="append", help="may be repeated. Default: 0.1 and 0.5")
    parser.add_argument("--dtype", choices=("float32", "float64", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--n", type=int, default=2**22, help="elements of a long call. Default: %(default)s")
    parser.add_argument("--seed", type=int, help="for torch.manual_seed. Default: a fresh one")
    options = parser.parse_args(argv)
    module, _, name = options.target.partition(":")
    try:
        options.callable = attrgetter(name)(import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"there is no {options.target}: {error}")
    if not options.p and adapt(options.callable, 0.5)[0] is options.callable:
        parser.error(f"{options.target} has no parameter p: say with --p which it drops with")
    options.p = options.p or [0.1, 0.5]
    try:
        for p in options.p:
            check_settings(p, options.n)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a report for each p. Returns the exit status: 1 if something is wrong, else 0."""
    options = _parse(argv)
    seed = torch.seed() if options.seed is None else torch.manual_seed(options.seed).initial_seed()
    print(f"{options.target}, {options.dtype} on {options.device}, seed {seed}")
    dtype, wrong = getattr(torch, options.dtype), False
    for p in options.p:
        fn, idle = adapt(options.callable, p)
        family = 1e-6 / len(options.p)
        report = check(fn, p, idle=idle, dtype=dtype, device=options.device, n=options.n, seconds=12, family=family)
        print(f"\n{report}", flush=True)
        wrong |= bool(report.faults)
    return int(wrong)
