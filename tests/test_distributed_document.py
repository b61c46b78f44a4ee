"""docs/distributed.md: each recipe runs in two processes, and its assertions hold in both."""

import re
from pathlib import Path

import pytest
import torch.distributed as dist
from workers import WORLD, workers_of

PAGE = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
SECTIONS = re.split(r"^##+ (.*)\n", PAGE, flags=re.MULTILINE)[1:]
CODE = {
    heading: "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for heading, text in zip(SECTIONS[::2], SECTIONS[1::2], strict=True)
}
SHARED = CODE.pop("Recipes")  # the common beginning of all recipes
RECIPES = {heading: code for heading, code in CODE.items() if code}

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


workers = workers_of(__name__)


def run(rank, code):
    """Runs a recipe in this process. Returns the rank and the number of processes that it found."""
    names = {"__name__": "recipe"}
    exec(compile(code, "docs/distributed.md", "exec"), names)
    return names["rank"], names["world"]


@pytest.mark.parametrize("heading", RECIPES)
def test_recipe(workers, heading):
    code = RECIPES[heading]
    assert "assert" in code
    assert workers(run, SHARED + code) == [(rank, WORLD) for rank in range(WORLD)]


def test_page_has_the_recipes():
    assert len(RECIPES) == 7
    assert PAGE.count("```python") == 1 + 7 + 1  # tensor parallel has two
