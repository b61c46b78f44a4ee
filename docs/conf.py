"""Sphinx's settings: ``make docs`` builds the site into build/docs/html."""

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

import fused_dropout

ROOT = Path(__file__).parent.parent
# The address of the repository, for links to its files.
REPOSITORY = re.search(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]

project = "fused_dropout"
author = "The fused_dropout authors"
copyright = "2026, the fused_dropout authors"
version = release = fused_dropout.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["scripts"]

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # or attributes that a docstring lists would be described twice
doctest_global_setup = """
import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd
"""
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"fused_dropout {version}"
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}


def link_sources(app: Sphinx, page: str, text: list[str]) -> None:
    """Turns links to files outside docs/ into links to the repository, after a check that the file is there."""

    def replaced(link: re.Match) -> str:
        if not (ROOT / link[1]).exists():
            raise FileNotFoundError(f"docs/{page}.md links to ../{link[1]}, which is not there")
        return f"]({REPOSITORY}/blob/main/{link[1]}{link[2] or ''})"

    text[0] = re.sub(r"\]\(\.\./([^)#]*)(#[^)]*)?\)", replaced, text[0])


def mark_examples(app: Sphinx, page: nodes.document) -> None:
    """Lets sphinx.ext.doctest run a page's blocks that begin with >>>. By itself it runs those of docstrings only."""
    for block in page.findall(nodes.literal_block):
        if block.astext().startswith(">>> "):
            block["testnodetype"], block["groups"] = "doctest", ["default"]


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_sources)
    app.connect("doctree-read", mark_examples)
