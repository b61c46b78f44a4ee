"""``python -m fused_dropout info`` prints what serves each device; ``bench`` measures this machine."""

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
    print("usage: python -m fused_dropout info | bench [--help]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
