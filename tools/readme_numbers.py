"""Writes the tables of measurements into README.md and docs/benchmarks.md, from benchmarks/results/*.json. --check only
compares them.

A result is the JSON of ``make bench-cpu`` (it has "rows") or of ``python -m fused_dropout bench --full`` ("model" and
"memory", which may be in two files, if they were measured at different times). A table stands between the comments
``<!-- numbers: written by ... -->`` and ``<!-- /numbers -->``. With ``numbers of the CPU kernels:`` or ``numbers of
models:`` in the first comment only that table is written.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/benchmarks.md")
PLACE = re.compile(r"(<!-- numbers(?: of ([a-zA-Z ]+))?: written by .*? -->\n).*?(<!-- /numbers -->)", re.DOTALL)


def cpu_table(result):
    """The table of kernels on one machine: what was measured, against what, and how many times faster or slower."""
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


def size(n):
    return f"{n / 2**20:,.0f} MiB" if n >= 2**20 else f"{n:,} B"


def models_table(result):
    """The table of whole models on one machine: the speed of a training step."""
    environment = result["environment"]
    speed = {(r["workload"], r["compiled"]): r["ratio"] for r in result["model"] if r["module"] == "fd.Dropout"}
    lines = [
        f"A training step, times as fast as with `nn.Dropout`: {environment['cpu']}, {environment['threads']} threads, "
        f"torch {environment['torch']}, {environment['date'][:10]}:",
        "",
        "| model | eager | compiled |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(workload for workload, _ in speed):
        lines.append(f"| {name} | {speed[name, False]:.2f} | {speed[name, True]:.2f} |")
    return "\n".join(lines)


def memory_table(result):
    """The table of what a step keeps for backward, and of its peak."""
    environment = result["environment"]
    memory = {(r["workload"], r["module"]): r for r in result["memory"] if not r["checkpointed"]}
    lines = [
        f"Memory of a step without parameters: kept for backward, and the peak; torch {environment['torch']}, "
        f"{environment['date'][:10]}:",
        "",
        "| model | kept, `nn.Dropout` | kept, `fd.Dropout` | peak, `nn.Dropout` | peak, `fd.Dropout` |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(workload for workload, _ in memory):
        both = [memory[name, module] for module in ("nn.Dropout", "fd.Dropout")]
        lines.append(f"| {' | '.join((name, *(size(r[what]) for what in ('saved', 'peak') for r in both)))} |")
    return "\n".join(lines)


def tables(kind):
    """The tables of one kind, or all of them."""
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    kinds = {
        "the CPU kernels": [cpu_table(result) for result in results if "rows" in result],
        "models": [
            *(models_table(result) for result in results if "model" in result),
            *(memory_table(result) for result in results if "memory" in result),
        ],
    }
    return "\n\n".join(kinds[kind] if kind else (table for tables in kinds.values() for table in tables))


def main():
    for name in PAGES:
        page = ROOT / name
        text = page.read_text()
        new, places = PLACE.subn(lambda m: f"{m[1]}\n{tables(m[2])}\n\n{m[3]}", text)
        if not places:
            sys.exit(f"{name} has no place for numbers")
        if "--check" not in sys.argv:
            page.write_text(new)
        elif new != text:
            sys.exit(f"{name} is not what benchmarks/results says: run `make readme-numbers`")


if __name__ == "__main__":
    main()
