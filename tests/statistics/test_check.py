"""``testing.check`` and ``python -m fused_dropout check``: a healthy dropout passes, a faulty one is named."""

import sys

import pytest
import torch
import torch.nn.functional as F
from common import one_thread  # noqa: F401

import fused_dropout as fd
from fused_dropout import testing
from fused_dropout.__main__ import main


def run(capsys, *arguments):
    with torch.random.fork_rng():
        status = main(["check", "--n", str(2**18), *arguments])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("target", ["fused_dropout:dropout", "torch.nn.functional:dropout"])
def test_healthy(target, capsys):
    status, output = run(capsys, target, "--p", "0.5", "--seed", "1")
    assert status == 0, output
    assert output.endswith("nothing is wrong\n")
    for test in ("rate", "E[y] / x", "every lag", "collisions", "runs", "blocks", "double backward", "eval and p = 0"):
        assert f"\n{test}" in output
    assert "a dropped NaN or inf becomes " + ("0" if "fused" in target else "NaN") in output


PLANTED = """
import torch, torch.nn.functional as F

def eight_bits(x, p):
    return F.dropout(x, int(p * 256) / 256)

class Repeats(torch.nn.Dropout):
    def forward(self, x):
        if not self.training:
            return F.dropout(x, self.p)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return F.dropout(x, self.p)

def keeps_all(x):
    return x * 1
"""


@pytest.mark.parametrize(
    ("name", "tests"),
    [
        ("eight_bits", ["rate", "scale"]),
        ("Repeats", ["every shift, long calls 1 apart", "every shift, short calls k apart", "eval and p = 0"]),
        ("keeps_all", ["rate"]),
    ],
)
def test_faulty(name, tests, tmp_path, monkeypatch, capsys):
    (tmp_path / "planted_for_check.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    status, output = run(capsys, f"planted_for_check:{name}", "--p", "0.1", "--seed", "2")
    del sys.modules["planted_for_check"]
    assert status == 1
    for test in tests:
        assert f"WRONG, {test}: " in output, output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch:no_such"], "there is no torch:no_such"),
        (["no_such_module:f"], "there is no no_such_module:f"),
        (["torch.nn.functional"], "there is no torch.nn.functional"),
        (["torch:neg"], "say with --p"),
        (["--p", "0.001"], "p has to be between"),
        (["--n", "1000"], "n has to be a power of two"),
    ],
)
def test_refusals(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["check", *arguments])
    assert message in capsys.readouterr().err


def test_report():
    """What is wrong is listed; fewer than the fifty tests that the level of each is made for; slow callables work."""

    def without_backward(x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return F.dropout(x.detach(), 0.3)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        report = testing.check(without_backward, 0.3, n=2**20, seconds=0.1)
    assert not report.faults
    assert 25 < len(report.results) <= 50
    assert report.alpha == 1e-6 / 50
    assert any("not all of backward was tested" in note for note in report.notes)
    assert any("float32 only" in note for note in report.notes)
    for wrong in ({"p": 1e-3}, {"n": 2**17}, {"n": 3 * 2**20}):
        with pytest.raises(ValueError, match="has to be"):
            testing.check(fd.dropout, **wrong)
