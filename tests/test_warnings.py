"""A warning names a line of the user's code, not of this package, of torch or of the import system."""

import re
from pathlib import Path

import pytest
import torch
from forks import Forks

from fused_dropout import native
from fused_dropout.warn import warn

# Programs, each with the number of the line that the warning has to name.
PROGRAMS = {
    "import": ("import os\nimport fused_dropout\n", 2),
    "from": ("from fused_dropout import dropout\n", 1),
    "in a function": ("def load():\n    from fused_dropout.keys import key\nload()\n", 2),
    "import_module": ("import importlib\nimportlib.import_module('fused_dropout')\n", 2),
}
RECOMPUTED = """
import sys, torch, fused_dropout as fd
from torch.utils.checkpoint import checkpoint
x = torch.ones(100, requires_grad=True)
y = checkpoint(lambda x: fd.dropout(x.sin(), 0.5).sin(), x, use_reentrant=False, preserve_rng_state=False).sum()
torch.rand(3)
y.backward()
"""


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("imported", [False, True])
def test_warning_at_an_import(forks, tmp_path, program, imported):
    """The program runs as a script, or is imported."""
    code, line = PROGRAMS[program]
    (tmp_path / "users.py").write_text(code)
    start = "import users" if imported else f"exec(compile({code!r}, '/users.py', 'exec'), {{'__name__': '__main__'}})"
    before = "import sys; sys.modules['fused_dropout._C'] = None; "
    done = forks.run(before + start, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = [text for text in done.stderr.splitlines() if "RuntimeWarning: fused_dropout: " in text]
    assert len(said) == 1
    assert f"/users.py:{line}: " in said[0]


@pytest.mark.parametrize("hide", ["", "_eager"])
def test_warning_at_a_call(forks, tmp_path, hide):
    (tmp_path / "users.py").write_text(RECOMPUTED)
    before = f"import sys; sys.modules.update({{'fused_dropout.{hide}': None}}); " if hide else ""
    done = forks.run(f"{before}import users", PYTHONPATH=f"{tmp_path}")
    assert f"{tmp_path}/users.py:7: RuntimeWarning: fused_dropout: recomputation drew" in done.stderr, done.stderr


def test_no_other_way_to_warn():
    sources = [*Path(native.__file__).parent.rglob("*.py"), *(Path(__file__).parents[1] / "csrc").rglob("*.[ch]*")]
    assert [s.name for s in sources if re.search(r"warnings\.warn\w*\(|TORCH_WARN\w*\(", s.read_text())] == ["warn.py"]


@pytest.mark.parametrize("names", [{"__name__": "torch._inductor.codecache.c4x"}, {}], ids=["named", "nameless"])
def test_code_that_torch_generates_is_passed_over(names):
    names["warn"] = warn
    exec("def call():\n    warn('of this')", names)
    with pytest.warns(RuntimeWarning, match="fused_dropout: of this") as caught:
        names["call"]()
    assert caught[0].filename == __file__


def test_it_can_be_traced():
    def warn_and_add(x):
        warn("while tracing")
        return x + 1

    with pytest.warns(RuntimeWarning, match="while tracing") as caught:
        torch.compile(warn_and_add, backend="eager", fullgraph=True)(torch.ones(2))
    assert caught[0].filename == __file__
