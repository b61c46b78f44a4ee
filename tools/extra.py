"""Prints the requirements of one extra of pyproject.toml, one a line: ``python tools/extra.py dev``."""

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def main() -> None:
    (name,) = sys.argv[1:]
    print(*tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"][name], sep="\n")


if __name__ == "__main__":
    main()
