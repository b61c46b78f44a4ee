"""``python -m fused_dropout check``: the tests of ``testing.check`` on a dropout that is named on the command line."""

import argparse
import copy
import inspect
import traceback
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .callables import Dropping, check, check_settings

_NAMES = (
    "p",
    "drop_prob",
    "dropout_p",
    "dropout_prob",
    "drop_rate",
    "prob",
    "rate",
    "dropout",
)  # of the parameter that is the probability


def adapt(target: Any, p: float) -> tuple[Dropping, list[Dropping]]:
    """``fn`` and ``idle`` for ``testing.check``.

    target: a module class with a parameter that is called ``p``, ``drop_prob`` or the like, or else p as the first; a
    module, whose own p it has to be; a function with such a parameter. Anything else is called as it is, and no form of
    it that has to be idle is known.
    """
    if isinstance(target, type) and issubclass(target, nn.Module):
        name = _probability(target)

        def make(p: float) -> nn.Module:
            return target(**{name: p}) if name else target(p)

        return make(p).train(), [make(p).eval(), make(0.0).train()]
    if isinstance(target, nn.Module):
        return copy.deepcopy(target).train(), [copy.deepcopy(target).eval()]
    name = _probability(target)
    if name is None:
        return target, []
    if "training" not in inspect.signature(target).parameters:
        return partial(target, **{name: p}), [partial(target, **{name: 0.0})]

    def call(p: float, training: bool) -> Dropping:
        return partial(target, **{name: p, "training": training})

    return call(p, True), [call(0.0, True), call(p, False)]


def _probability(target: Any) -> str | None:
    """The name of the parameter that holds the probability, or None."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # built in
        return None
    return next((name for name in _NAMES if name in parameters), None)


def _probabilities(target: Any) -> list[float]:
    """The p to test with where the user gives none; empty if the target's own p is not known."""
    if isinstance(target, type) or (not isinstance(target, nn.Module) and _probability(target)):
        return [0.1, 0.5]
    own = next((getattr(target, name) for name in _NAMES if isinstance(getattr(target, name, None), float)), None)
    return [] if own is None else [own]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m fused_dropout check",
        description="Tests the masks of any dropout: drop rate and scale, independence of elements and of calls, "
        "one mask in forward and backward, evaluation. Ten seconds for each p. The exit status is 1 if something is "
        "wrong, and 2 if nothing could be tested.",
        epilog="Examples: check torch.nn:Dropout --p 0.1; check my_module:my_dropout --device cuda -v",
    )
    parser.add_argument(
        "target",
        nargs="?",
        default="fused_dropout:dropout",
        metavar="module:callable",
        help="a module class, a function f(x, p), an nn.Module, or any f(x) with its --p. Default: %(default)s",
    )
    parser.add_argument("--p", type=float, action="append", help="may be repeated. Default: 0.1 and 0.5, or a module's")
    parser.add_argument("--dtype", choices=("float32", "float64", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--n", type=int, default=2**22, help="elements of a long call. Default: %(default)s")
    parser.add_argument("--seed", type=int, help="for torch.manual_seed. Default: a fresh one")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the table of all tests, and tracebacks")
    options = parser.parse_args(argv)
    module, _, name = options.target.partition(":")
    if not name or module.endswith(".py") or "/" in module:
        parser.error(f"{options.target} has to be module:callable, such as my_package.my_module:my_dropout")
    try:
        options.callable = attrgetter(name)(import_module(module))
    except AttributeError as error:
        parser.error(f"there is no {options.target}: {error}")
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        parser.error(f"{module} cannot be imported: {_described(error)}")
    if not callable(options.callable):
        parser.error(f"{options.target} cannot be called: it is a {type(options.callable).__name__}")
    options.p = options.p or _probabilities(options.callable)
    if not options.p:
        parser.error(f"{options.target} has no parameter {', '.join(_NAMES)}: say with --p which it drops with")
    try:
        for p in options.p:
            check_settings(p, options.n)
        torch.zeros(1, device=options.device).item()
    except ValueError as error:
        parser.error(str(error))
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device {options.device} cannot be used: {_first_line(error)}")
    return options


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a report for each p. Returns the exit status: 1 if something is wrong, 2 if a p was not tested, else 0."""
    options = _parse(argv)
    seed = torch.seed() if options.seed is None else torch.manual_seed(options.seed).initial_seed()
    print(f"{options.target}, {options.dtype} on {options.device}, seed {seed}")
    dtype, status = getattr(torch, options.dtype), 0
    for p in options.p:
        try:
            fn, idle = adapt(options.callable, p)
            family = 1e-6 / len(options.p)
            report = check(fn, p, idle=idle, dtype=dtype, device=options.device, n=options.n, seconds=12, family=family)
        except (Exception, SystemExit) as error:  # whatever the user's callable raises
            if options.verbose:
                traceback.print_exc()
            print(f"p = {p:g}: NOT TESTED: {options.target} raised {_described(error)}", flush=True)
            status = 2
            continue
        print(f"{report.table}\n\n{report}" if options.verbose else report, flush=True)
        status = status or int(bool(report.faults))
    return status
