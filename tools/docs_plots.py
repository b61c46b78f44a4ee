"""Draws the plots of docs/benchmarks.md from the newest benchmarks/results/*.json of ``python -m fused_dropout bench
--full`` on a CPU."""

import json
from pathlib import Path

from fused_dropout.bench.report import PLOTS, draw

ROOT = Path(__file__).parent.parent
SHOWN = ("time", "speedup", "models", "memory")
FONT_SIZE = 12  # the page shows a plot at about half its width


def main():
    results = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    results = sorted((r for r in results if not r["environment"]["gpus"]), key=lambda r: r["environment"]["date"])
    newest = {key: records for result in results for key, records in result.items()}  # of each kind of records
    for name in SHOWN:
        picture = draw(PLOTS[name][2], newest, "cpu", "light", FONT_SIZE)
        (ROOT / "docs" / "pictures" / f"{name}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
