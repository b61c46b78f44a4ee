"""The README and docs/: their Python code and scripts run, and their links and lists are complete.

Each page is one program: its ``python`` blocks run one after the other, with the variables that ``names`` defines.
Sphinx (``make docs``) runs the ``pycon`` blocks and the examples of docstrings. test_distributed_document.py runs the
recipes of docs/distributed.md.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd
from fused_dropout.testing import report

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "docs/scripts").glob("*.py"))
ELSEWHERE = ("distributed.md",)
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.name not in ELSEWHERE]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def names():
    """The variables that the pages assume: a small model and its input, and tensors with their usual names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8))
    n, c = 4, 8
    x, residual, bias, weight = torch.randn(n, 6, c), torch.randn(n, 6, c), torch.randn(c), torch.randn(5, c)
    return {
        "__name__": "page", "torch": torch, "nn": nn, "F": F, "fd": fd, "model": model, "n": n, "c": c, "x": x,
        "residual": residual, "bias": bias, "weight": weight, "linear_bias": torch.randn(5), "key": fd.key(7),
        "generator": torch.Generator(), "q": torch.randn(2, 3, 4, 8), "k": torch.randn(2, 3, 4, 8),
        "v": torch.randn(2, 3, 4, 8), "p": 0.1, "seed": 1, "rank": 0, "step": 3, "layer": 2,
    }  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_python_blocks(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    given = names()
    try:
        with torch.random.fork_rng():
            for block in BLOCK.finditer(text):
                line = text.count("\n", 0, block.start(1))
                exec(compile("\n" * line + block[1], str(page), "exec"), given)  # errors show the page's line
    except ModuleNotFoundError as error:
        if error.name in ("torch", "fused_dropout"):
            raise
        pytest.skip(f"needs {error.name}: make test-models")
    finally:
        fd.unpatch()
        torch.compiler.reset()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script(script, tmp_path):
    """A script runs to its end, or says in one line which library it needs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", script]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # Only the last line counts: libraries log the same text about optional packages.
    last = outcome.stderr.strip().rpartition("\n")[2]
    if match := re.match(r"ModuleNotFoundError: No module named '(\w+)", last):
        assert match[1] not in ("torch", "fused_dropout")
        pytest.skip(f"needs {match[1]}: make test-models")
    assert outcome.returncode == 0, outcome.stderr


def test_scripts_are_shown():
    page = (ROOT / "docs/swap-in.md").read_text()
    assert [script.name for script in SCRIPTS if f"scripts/{script.name}" not in page] == []


def test_verdicts_are_explained():
    """docs/check.md explains each kind of verdict."""
    page = (ROOT / "docs/check.md").read_text()
    for words in report._MEANINGS.values():
        assert words.removesuffix(": {}").removesuffix("{}") in page, words


def test_api_reference_is_complete():
    page = (ROOT / "docs/api.md").read_text()
    listed = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page, re.MULTILINE)
    assert sorted({*listed, "uncertainty"} - {"check", "Report", "Result"}) == sorted(fd.__all__)


def test_numbers_in_the_text():
    """Numbers that sentences repeat are those of benchmarks/results."""
    results = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")]
    kernels, models = (next(r[key] for r in results if key in r) for key in ("rows", "model"))
    forward = [case["ratio"] for row in kernels if row["what"].startswith("float32 forward: ") for case in row["cases"]]
    steps = [r["ratio"] for r in models if r["module"] == "fd.Dropout"]
    fast = f"{min(forward):.0f} to {max(forward):.0f} times as fast"
    for name, text in (
        ("README.md", fast),
        ("docs/getting-started.md", fast),
        ("docs/getting-started.md", f"{min(steps):.2f} to {max(steps):.2f} times as fast"),
    ):
        assert text in re.sub(r"\s+", " ", (ROOT / name).read_text()), (name, text)


def test_readme_renders_on_pypi():
    """On PyPI, links and pictures have to be absolute."""
    links = re.findall(r"\]\(([^)]*)\)|(?:src|href)=\"([^\"]*)\"", (ROOT / "README.md").read_text())
    assert [link for pair in links for link in pair if link and not link.startswith(("https://", "#"))] == []
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
