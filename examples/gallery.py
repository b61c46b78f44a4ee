"""Runs all examples, in six minutes, and writes gallery.md: the claim of each, its findings and its picture."""

import argparse
import ast
import os
import subprocess
import sys
import time
from pathlib import Path

from basics import OUT

from fused_dropout.bench.environment import describe_environment

FOLDER = Path(__file__).parent


def section(example: Path, out: Path) -> str:
    """Runs an example. Its part of gallery.md."""
    start = time.monotonic()
    command = [sys.executable, example, "--out", out / "pictures"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *findings, _ = done.stdout.splitlines()  # the last line says where the picture is
    seconds = f"{time.monotonic() - start:.0f} s"
    print(f"{example.name}: {seconds}", file=sys.stderr)
    title, _, claim = ast.get_docstring(ast.parse(example.read_text())).partition("\n\n")
    number = example.name.split("_")[0].lstrip("0")
    return "\n\n".join(
        [
            f"## {number}. {title.rstrip('.')}",
            claim,
            f"**Shown** by [`{example.name}`]({os.path.relpath(example, out)}) in {seconds}:",
            "\n".join(f"- {finding}" for finding in findings),
            f"![{title}](pictures/{example.stem}.png)\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR", help="for gallery.md and its pictures (build/examples)"
    )
    out = parser.parse_args().out
    sections = [section(example, out) for example in sorted(FOLDER.glob("[0-9]*.py"))]
    here = describe_environment()
    head = (
        "# Dropout, shown\n\nWritten by `make examples`; numbers are means and standard deviations over the seeds. "
        f"fused_dropout {here['fused_dropout']}, torch {here['torch']}, {here['threads']} threads of {here['cpu']}, "
        f"{str(here['date'])[:10]}.\n"
    )
    (out / "gallery.md").write_text("\n".join([head, *sections]))
    print(f"Written to {out / 'gallery.md'}")


if __name__ == "__main__":
    main()
