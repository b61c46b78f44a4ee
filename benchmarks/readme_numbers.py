"""Writes the README's table of measurements from benchmarks/results/*.json; --check only says whether it is up to date.

A result is what ``python -m fused_dropout bench --json benchmarks/results/<device>-<torch>.json`` writes.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPEN, CLOSE = "<!-- numbers: written by `make readme-numbers` from benchmarks/results -->\n", "<!-- /numbers -->"


def table(result):
    """One machine: how many times faster than nn.Dropout, median and 10th to 90th percentile, by dtype, size, case."""
    environment = result["environment"]
    device = (environment["gpus"] or [environment["cpu"]])[0]
    isa = environment["backend_info"]["cpu_isa"]
    title = (
        f"{device} ({isa}), torch {environment['torch']}, {environment['threads']} threads, {environment['date'][:10]}"
    )
    cases = ["forward", "forward + backward", "in place"]
    lines = [f"{title}. How many times the speed of `nn.Dropout`, p = 0.1: median (10th to 90th percentile).", ""]
    lines += ["| device | dtype | elements | " + " | ".join(cases) + " |", "|---|---|---|" + "---|" * len(cases)]
    rows = {}
    for record in result["speed"]:
        if record["case"] not in cases:
            continue
        cell = f"{record['ratio']:.1f} ({record['ratio_p10']:.1f} to {record['ratio_p90']:.1f})"
        rows.setdefault((record["device"], record["dtype"], record["numel"]), {})[record["case"]] = cell
    for (where, dtype, numel), cells in rows.items():
        values = " | ".join(cells.get(case, "") for case in cases)
        lines.append(f"| {where} | {dtype} | {numel:,} | {values} |")
    saved = result["saved_bytes"][0]
    lines += ["", f"Saved for backward of 2^20 floats: {saved['torch']:,} bytes by `nn.Dropout`, {saved['fd']} here."]
    return "\n".join(lines)


def main():
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    tables = [table(json.loads(path.read_text())) for path in results]
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(OPEN)
    new = before + OPEN + "\n" + "\n\n".join(tables) + "\n\n" + CLOSE + rest.split(CLOSE)[1]
    if "--check" in sys.argv:
        sys.exit("README.md is not what benchmarks/results says: run `make readme-numbers`" if new != text else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
