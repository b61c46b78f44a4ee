"""The command line ``python -m fused_dropout``: chooses a command, and has the command ``info``."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

import torch

from . import __version__, inductor
from .build_info import backend_info

# For each command its description and its module. A module is imported only when its command runs: some take seconds.
COMMANDS = {
    "info": ("say what serves each device, and how to get a better path", ""),
    "bench": ("compare the speed and memory of nn.Dropout and fd.Dropout here, two minutes", ".bench.command"),
    "check": ("test the masks of any dropout: rate, scale, independence, backward", ".testing.command"),
    "gpu-check": ("test and time the CUDA kernels on this GPU, eight minutes", ".bench.gpu.check"),
}


def info(arguments: Sequence[str]) -> int:
    """Prints what a bug report needs: ``backend_info()`` and the GPUs."""
    parser = argparse.ArgumentParser(
        "python -m fused_dropout info",
        description="Says which path serves each device, what was compiled, what is missing and why, and the command "
        "that gives a better path.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for a program or a bug report")
    as_json = parser.parse_args(arguments).json
    inductor.register()  # shows a problem with Inductor now, which else appears at the first compilation
    found = backend_info()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 20} MiB" for gpu in properties]
    print(json.dumps({**found._asdict(), "gpus": gpus}, indent=1) if as_json else "\n".join([str(found), *gpus]))
    return 0


def _command(arguments: Sequence[str]) -> Callable[[Sequence[str]], int]:
    """Returns the function that runs the command. Ends the process for --help, --version and a wrong command."""
    parser = argparse.ArgumentParser(
        "python -m fused_dropout",
        description="Dropout for PyTorch: what serves it here, how fast it is, and whether its masks are right.",
        epilog="python -m fused_dropout COMMAND --help lists the options of a command.",
    )
    parser.add_argument(
        "--version", action="version", version=f"fused_dropout {__version__}, torch {torch.__version__}"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (description, _) in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    name = parser.parse_args(arguments[:1]).command
    if name is None:
        parser.print_help(sys.stderr)
        sys.exit(2)
    module = COMMANDS[name][1]
    return import_module(module, __package__).main if module else info


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit status; 1 if the output cannot be written."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            return _command(arguments)(arguments[1:])
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # the error is about a file, not about the output
            raise
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes again when it exits
        if not isinstance(error, BrokenPipeError):  # which means that the reader has closed the pipe on purpose
            print(f"fused_dropout: the output could not be written: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
