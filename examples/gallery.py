"""``make examples``: runs them all, and writes gallery.md: of each its claim, what was shown, and the picture."""

import ast
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def section(example: Path, arguments: list[str]) -> str:
    start = time.monotonic()
    done = subprocess.run([sys.executable, example, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    picture, shown = done.stdout.strip().splitlines()[-2:]
    print(f"{example.name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    title, _, claim = ast.get_docstring(ast.parse(example.read_text())).partition("\n\n")
    number = example.name.split("_")[0].lstrip("0")
    return (
        f"## {number}. {title.rstrip('.')}\n\n{claim}\n\n**Shown** by [`{example.name}`]({example.name}): {shown}\n\n"
        f"![{title}](pictures/{Path(picture).name})\n"
    )


def main() -> None:
    examples = sorted(FOLDER.glob("[0-9]*.py"))
    sections = [section(example, sys.argv[1:]) for example in examples]
    head = "# Dropout, shown\n\nWritten by `make examples`; numbers are means and standard deviations over the seeds.\n"
    (FOLDER / "gallery.md").write_text("\n".join([head, *sections]))


if __name__ == "__main__":
    main()
