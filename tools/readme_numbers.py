"""Writes the README's tables of measurements from benchmarks/results/*.json. With --check it only compares them.

A result is the JSON of ``make bench-cpu`` (it has "rows") or of ``python -m fused_dropout bench --full`` ("model",
"memory").
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPEN, CLOSE = "<!-- numbers: written by `make readme-numbers` from benchmarks/results -->\n", "<!-- /numbers -->"


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
    """The table of whole models on one machine: speed and memory."""
    environment = result["environment"]
    speed = {(r["workload"], r["compiled"]): r["ratio"] for r in result["model"] if r["module"] == "fd.Dropout"}
    memory = {(r["workload"], r["module"]): r for r in result["memory"] if not r["checkpointed"]}
    lines = [
        f"Whole training steps with `fd.Dropout` for `nn.Dropout`, {environment['threads']} threads, torch"
        f" {environment['torch']}, {environment['date'][:10]}: how many",
        "times as fast (medians of interleaved ratios); bytes kept for backward, and peak of a step, before and after.",
        "",
        "| model | eager | compiled | kept for backward | peak |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys([workload for workload, _ in (*speed, *memory)]):
        times = [f"{speed[name, c]:.2f}x" if (name, c) in speed else "" for c in (False, True)]
        both = [memory.get((name, module)) for module in ("nn.Dropout", "fd.Dropout")]
        bytes_ = [" to ".join(size(r[what]) for r in both) if all(both) else "" for what in ("saved", "peak")]
        lines.append(f"| {' | '.join((name, *times, *bytes_))} |")
    return "\n".join(lines)


def tables():
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    return [cpu_table(result) for result in results if "rows" in result] + [
        models_table(result) for result in results if "model" in result
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
