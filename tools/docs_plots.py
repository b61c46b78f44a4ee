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
    full = [result for result in results if "model" in result and not result["environment"]["gpus"]]
    newest = max(full, key=lambda result: result["environment"]["date"])
    for name in SHOWN:
        picture = draw(PLOTS[name][2], newest, "cpu", "light", FONT_SIZE)
        (ROOT / "docs" / "pictures" / f"{name}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
