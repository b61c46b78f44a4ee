"""Writes the README's tables of measurements from benchmarks/results/*.json; --check says whether they are up to date.

A result is the JSON of ``make bench-cpu`` (rows) or of ``python -m fused_dropout bench`` (saved bytes).
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPEN, CLOSE = "<!-- numbers: written by `make readme-numbers` from benchmarks/results -->\n", "<!-- /numbers -->"


def cpu_table(result):
    """One machine: what was measured, against what, and how many times faster or slower."""
    environment = result["environment"]
    isa = environment["backend_info"]["cpu_isa"]
    title = f"{environment['cpu']} ({isa}), one core, torch {environment['torch']}, {environment['date'][:10]}, p = 0.1"
    lines = [f"{title}. Medians of interleaved ratios:", "", "| work | against | measured |", "|---|---|---|"]
    for row in result["rows"]:
        figures = [case["ratio"] for case in row["cases"]]
        unit = "times faster" if row["reach"].startswith(">=") else "times its time"
        measured = ", ".join(f"{figure:#.3g}" for figure in figures)
        lines.append(f"| {row['what']} | `{row['against']}` | {measured} {unit} |")
    return "\n".join(lines)


def saved(result):
    of = result["saved_bytes"][0]
    return f"Saved for backward of 2^20 floats: {of['torch']:,} bytes by `nn.Dropout`, {of['fd']} here."


def tables():
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    return [cpu_table(result) for result in results if "rows" in result] + [
        saved(result) for result in results if "saved_bytes" in result
    ]


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(OPEN)
    new = before + OPEN + "\n" + "\n\n".join(tables()) + "\n\n" + CLOSE + rest.split(CLOSE)[1]
    if "--check" in sys.argv:
        sys.exit("README.md is not what benchmarks/results says: run `make readme-numbers`" if new != text else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
