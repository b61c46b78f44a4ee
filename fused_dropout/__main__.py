"""``python -m fused_dropout``: ``info`` (``--json``) says what serves each device, ``bench`` measures, ``check`` tests
masks.

``gpu-check`` says whether the CUDA kernels are right on this machine's GPU, and how fast.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from . import inductor
from .build_info import backend_info


def info(arguments: Sequence[str]) -> int:
    """What a bug report needs: ``backend_info()``, and the GPUs."""
    parser = argparse.ArgumentParser(prog="python -m fused_dropout info")
    parser.add_argument("--json", action="store_true", help="for a program to read")
    as_json = parser.parse_args(arguments).json
    inductor.register()  # or a problem with Inductor would show at the first compilation only
    found = backend_info()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 20} MiB" for gpu in properties]
    print(json.dumps({**found._asdict(), "gpus": gpus}, indent=1) if as_json else "\n".join([str(found), *gpus]))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if command == "info":
        return info(rest)
    if command == "bench":
        from .bench import command as bench

        return bench.main(rest)
    if command == "check":
        from .testing import command as check

        return check.main(rest)
    if command == "gpu-check":
        from .bench.gpu import check as gpu_check

        return gpu_check.main(rest)
    print("usage: python -m fused_dropout info | bench | check | gpu-check [--help]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
