"""``make examples``: runs them all, and writes gallery.md: of each its claim, what was shown, and the picture."""

import ast
import subprocess
import sys
import time
from pathlib import Path

from fused_dropout.bench.environment import describe_environment

FOLDER = Path(__file__).parent


def section(example: Path) -> str:
    start = time.monotonic()
    done = subprocess.run([sys.executable, example], stdout=subprocess.PIPE, text=True, check=True)
    picture, shown = done.stdout.strip().splitlines()[-2:]
    seconds = f"{time.monotonic() - start:.0f} s"
    print(f"{example.name}: {seconds}", file=sys.stderr)
    title, _, claim = ast.get_docstring(ast.parse(example.read_text())).partition("\n\n")
    number = example.name.split("_")[0].lstrip("0")
    return "\n\n".join(
        [
            f"## {number}. {title.rstrip('.')}",
            claim,
            f"**Shown** by [`{example.name}`]({example.name}) in {seconds}: {shown}",
            f"![{title}](pictures/{Path(picture).name})\n",
        ]
    )


def main() -> None:
    examples = sorted(FOLDER.glob("[0-9]*.py"))
    sections = [section(example) for example in examples]
    here = describe_environment()
    head = (
        "# Dropout, shown\n\nWritten by `make examples`; numbers are means and standard deviations over the seeds. "
        f"fused_dropout {here['fused_dropout']}, torch {here['torch']}, {here['threads']} threads of {here['cpu']}, "
        f"{str(here['date'])[:10]}.\n"
    )
    (FOLDER / "gallery.md").write_text("\n".join([head, *sections]))


if __name__ == "__main__":
    main()
