"""Runs the examples and writes gallery.md: the claim of each, its findings and its pictures.

With --only, the other examples are not run: what gallery.md says of their last run stays.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import mnist_data
from basics import OUT

from fused_dropout.bench.environment import describe_environment

FOLDER = Path(__file__).parent
ON_MNIST = ("03", "04", "05", "06", "07")  # run on MNIST as well as on the digits
SHOWN = "**Shown** by "


def run(example: Path, data: str | None, out: Path) -> tuple[str, list[str]]:
    """Runs an example: what it ran on and for how long, and its findings."""
    before = os.times()
    command = [sys.executable, example, "--out", out / "pictures", *(["--data", data] if data else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *findings, _ = done.stdout.splitlines()  # the last line says where the picture is
    after = os.times()  # CPU time: it does not depend on what else the machine does
    cpu = sum(getattr(after, part) - getattr(before, part) for part in ("children_user", "children_system"))
    seconds = f"{cpu:.0f} s of CPU time"
    print(f"{example.name} {data or ''}: {seconds}", file=sys.stderr)
    name = {"digits": "digits, ", "mnist": "MNIST, "}.get(data, "")
    return f"{name}{seconds}", findings


def show(example: Path, title: str, out: Path, mnist: bool) -> str:
    """Runs an example on its data sets. What was found, and the pictures."""
    kinds = ("digits", "mnist") if mnist and example.name[:2] in ON_MNIST else (None,)
    runs = [run(example, data, out) for data in kinds]
    here = describe_environment()
    threads = f"{here['threads']} thread{'s' if here['threads'] != 1 else ''}"
    where = f"torch {here['torch']}, {threads} of {here['cpu']}, {str(here['date'])[:10]}"
    link = f"{SHOWN}[`{example.name}`]({os.path.relpath(example, out)})"
    if len(runs) == 1:
        ((seconds, found),) = runs
        head, lines = f"{link} in {seconds} ({where}):", [f"- {finding}" for finding in found]
    else:
        head = f"{link} on both data sets ({where}):"
        rows = [[name for name, _ in runs], ["---"] * len(runs)]
        rows += [list(row) for row in zip_longest(*(found for _, found in runs), fillvalue="")]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    suffixes = {None: "", "digits": "", "mnist": "_mnist"}
    pictures = [f"![{title}](pictures/{example.stem}{suffixes[data]}.png)" for data in kinds]
    return "\n\n".join([head, "\n".join(lines), *pictures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR", help="for gallery.md and its pictures (build/examples)"
    )
    parser.add_argument("--only", nargs="*", metavar="NN", help="run these, such as 03 04, or none (all)")
    arguments = parser.parse_args()
    out = arguments.out
    gallery = out / "gallery.md"
    kept = {}
    if arguments.only is not None and gallery.exists():
        for part in re.split(r"^## ", gallery.read_text(), flags=re.MULTILINE)[1:]:
            kept[part.partition(".")[0].zfill(2)] = SHOWN + part.partition(SHOWN)[2].strip()
    mnist = arguments.only != []
    if mnist:
        try:
            mnist_data.find()
        except FileNotFoundError as error:
            print(f"{error}; the examples run on the digits alone", file=sys.stderr)
            mnist = False
    sections = []
    for example in sorted(FOLDER.glob("[0-9]*.py")):
        number = example.name[:2]
        title, _, claim = ast.get_docstring(ast.parse(example.read_text())).partition("\n\n")
        title = title.rstrip(".")
        again = arguments.only is None or number in arguments.only or number not in kept
        shown = show(example, title, out, mnist) if again else kept[number]
        sections.append(f"## {number.lstrip('0')}. {title}\n\n{claim}\n\n{shown}\n")
    head = "# Dropout, shown\n\nWritten by `make examples`; numbers are means and standard deviations over the seeds.\n"
    gallery.write_text("\n".join([head, *sections]))
    print(f"Written to {gallery}")


if __name__ == "__main__":
    main()
