"""``python -m fused_dropout``: ``info`` prints what serves each device, ``bench`` measures, ``check`` tests masks.

``gpu-check`` says whether the CUDA kernels are right on this machine's GPU, and how fast.
"""

import sys
from collections.abc import Sequence

from .native import backend_info


def main(arguments: Sequence[str] | None = None) -> int:
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if command == "info":
        print(backend_info())
        return 0
    if command == "bench":
        from . import bench

        return bench.main(rest)
    if command == "check":
        from . import testing

        return testing.main(rest)
    if command == "gpu-check":
        from . import gpu_check

        return gpu_check.main(rest)
    print("usage: python -m fused_dropout info | bench | check | gpu-check [--help]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
