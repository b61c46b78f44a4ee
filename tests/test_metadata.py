"""Metadata of a release, which several files repeat."""

import re
from pathlib import Path

import fused_dropout
from fused_dropout import native

ROOT = Path(__file__).parents[1]


def only(pattern, name):
    (found,) = re.findall(pattern, (ROOT / name).read_text(), re.M)
    return found


def test_version_and_date():
    """The newest release of the changelog is this version, and the citation has both of its values."""
    version, date = re.findall(r"^## \[(\d.*?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]
    assert version == fused_dropout.__version__
    assert only(r"^version: (.+)$", "CITATION.cff") == version
    assert only(r"^date-released: (.+)$", "CITATION.cff") == date


def test_repository():
    """All files name the repository that pyproject.toml names, and its documentation."""
    repository = only(r'^Repository = "(.+)"$', "pyproject.toml")
    documentation = only(r'^Documentation = "(.+)"$', "pyproject.toml")
    names = ["README.md", "CITATION.cff", "CHANGELOG.md", ".github/ISSUE_TEMPLATE/config.yml"]
    for path in (*(ROOT / name for name in names), *(ROOT / "docs").glob("*.md")):
        pattern = r"https://(?:github\.com/[^/\s]+/fused_dropout|[^/\s]+\.github\.io/\w+)"
        addresses = re.findall(pattern, path.read_text())
        assert set(addresses) <= {repository, documentation}, path.name
        assert addresses or path.parent.name == "docs"


def test_torch_of_the_workflows():
    """They test the oldest torch that the kernels support, and the torch that the Makefile installs."""
    oldest = ".".join(map(str, native.OLDEST_TORCH)) + ".0"
    default = only(r"^TORCH := .*torch==([\d.]+)\)", "Makefile")
    for name in ("tests.yml", "wheels.yml"):
        tested = set(re.findall(r'torch: "([\d.]+)"', (ROOT / ".github/workflows" / name).read_text()))
        assert {oldest, default} <= tested
