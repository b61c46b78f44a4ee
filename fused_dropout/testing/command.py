"""``python -m fused_dropout check``: the tests of ``testing.check`` on a dropout that is named on the command line."""

import argparse
import copy
import inspect
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .callables import Dropping, check, check_settings
from .report import described

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


def adapt(target: Any, p: float) -> tuple[Dropping, dict[str, Dropping]]:
    """``fn`` for ``testing.check``, and its ``evaluation`` and ``p_zero`` where they are known.

    target: a class with a parameter that is called ``p``, ``drop_prob`` or the like, or else p as the first; a module,
    whose own p it has to be; a function with such a parameter. Anything else is called as it is.
    """
    if isinstance(target, type):

        def make(p: float, train: bool) -> Dropping:
            instance = _bound(target, p)() if _probability(target) else target(p)
            return instance.train(train) if isinstance(instance, nn.Module) else instance

        idle = {"evaluation": make(p, False)} if issubclass(target, nn.Module) else {}
        return make(p, True), {**idle, "p_zero": make(0.0, True)}
    if isinstance(target, nn.Module):
        return copy.deepcopy(target).train(), {"evaluation": copy.deepcopy(target).eval()}
    if _probability(target) is None:
        return target, {}
    if "training" not in inspect.signature(target).parameters:
        return _bound(target, p), {"p_zero": _bound(target, 0.0)}
    return _bound(target, p, training=True), {
        "evaluation": _bound(target, p, training=False),
        "p_zero": _bound(target, 0.0, training=True),
    }


def _bound(target: Any, p: float, **more: bool) -> Callable[..., Any]:
    """``target`` with its probability given, whether it stands before the input, after it or is named."""
    name = _probability(target) or _NAMES[0]
    parameters = inspect.signature(target).parameters
    position, kind = list(parameters).index(name), parameters[name].kind
    if kind is inspect.Parameter.KEYWORD_ONLY or (position > 0 and kind is not inspect.Parameter.POSITIONAL_ONLY):
        return partial(target, **{name: p}, **more)
    if position == 0:
        return partial(target, p, **more)
    return lambda x: target(x, p, **more)


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
    own = [getattr(target, name, None) for name in _NAMES]
    return [float(p) for p in own if isinstance(p, (int, float)) and not isinstance(p, bool)][:1]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m fused_dropout check",
        description="Tests the masks of any dropout: drop rate and scale, independence of elements and of calls,\n"
        "one mask in forward and backward, evaluation. Ten seconds for each p. The exit status is 1 if\n"
        "something is wrong, and 2 if a p could not be tested.",
        epilog="examples:\n"
        "  python -m fused_dropout check torch.nn:Dropout --p 0.1\n"
        "  python -m fused_dropout check my_module:my_dropout --device cuda -v",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target",
        nargs="?",
        default="fused_dropout:dropout",
        metavar="module:callable",
        help="a class C(p), a function f(x, p), an nn.Module, or any f(x) with its --p. Default: %(default)s",
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
        parser.error(f"{module} cannot be imported: {described(error)}")
    if not callable(options.callable):
        parser.error(f"{options.target} cannot be called: its type is {type(options.callable).__name__}")
    if options.seed is not None and not -(2**63) <= options.seed < 2**64:
        parser.error(f"--seed has to be between -2^63 and 2^64 - 1, but is {options.seed}")
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
        parser.error(
            f"--device {options.device} cannot be used: {(str(error).splitlines() or [type(error).__name__])[0]}"
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a report for each p. Returns the exit status: 1 if something is wrong, 2 if a p was not tested, else 0;
    130 if it is interrupted."""
    options = _parse(argv)
    seed = torch.seed() if options.seed is None else torch.manual_seed(options.seed).initial_seed()
    print(f"{options.target}, {options.dtype} on {options.device}, seed {seed}")
    dtype, status = getattr(torch, options.dtype), 0
    for p in options.p:
        try:
            fn, idle = adapt(options.callable, p)
            family = 1e-6 / len(options.p)
            report = check(fn, p, **idle, dtype=dtype, device=options.device, n=options.n, seconds=12, family=family)
        except KeyboardInterrupt:
            print(f"p = {p:g}: interrupted", flush=True)
            return 130
        except (Exception, SystemExit) as error:  # whatever the user's callable raises
            if options.verbose:
                traceback.print_exc()
            print(f"p = {p:g}: NOT TESTED: {options.target} raised {described(error)}", flush=True)
            if isinstance(error, TypeError):
                print("  it is called as C(p)(x) if it is a class, as f(x, p=p) if it has a p, else as f(x)")
            status = 2
            continue
        print(f"{report}\n\n{report.table}\n" if options.verbose else report, flush=True)
        status = status or int(bool(report.faults))
    return status
