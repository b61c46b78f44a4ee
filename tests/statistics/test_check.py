"""``testing.check`` and ``python -m fused_dropout check``: a correct dropout passes, and a fault is named."""

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
    assert "\np = 0.5: nothing is wrong (" in output
    assert len(output.splitlines()) < 7
    _, output = run(capsys, target, "--p", "0.5", "--seed", "1", "-v")
    for test in (
        "rate",
        "E[y] / x",
        "every lag",
        "collisions",
        "runs",
        "blocks",
        "double backward",
        "evaluation",
        "p = 0  ",
    ):
        assert f"\n{test}" in output
    assert "a dropped NaN or inf becomes " + ("0" if "fused" in target else "NaN") in output


PLANTED = """
import torch, torch.nn.functional as F

def textbook(x, p):
    return x * (torch.rand_like(x) >= p) / (1 - p)

def identity(x, p):
    return x * 1

def zero(x, drop_prob):
    return x * 0

def half_the_rate(x, p):
    return F.dropout(x, p / 2)

def unscaled(x, p):
    return x * (torch.rand_like(x) >= p)

def columns(x, p):
    return x * (torch.rand(*x.shape[:-1], 1) >= p) / (1 - p)

class Repeats(torch.nn.Dropout):
    def forward(self, x):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return F.dropout(x, self.p, self.training)

class Forgetful(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.p = p
        return F.dropout(x, p)

    @staticmethod
    def backward(ctx, gradient):
        return F.dropout(gradient, ctx.p), None

def forgetful(x, p):
    return Forgetful.apply(x, p)

class Unscaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        kept = torch.rand_like(x) >= p
        ctx.save_for_backward(kept)
        return x * kept / (1 - p)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None

def unscaled_backward(x, p):
    return Unscaled.apply(x, p)

def by_position(x, p):
    rate = torch.where(torch.arange(x.numel()) % 2 == 0, p * 0.5, p * 1.5).view(x.shape)
    return x * (torch.rand_like(x) >= rate) / (1 - p)

class Sized(torch.nn.Dropout):
    def __init__(self, size, *, rate):
        super().__init__(rate)

class Named(Sized):
    def __init__(self, size=3, *, rate=0.5):
        super().__init__(size, rate=rate)

def always(x, p, training=True):
    return F.dropout(x, p)

def keeps_all(x):
    return x * 1

def raises(x, p):
    raise KeyError("no more")

def widens(x, p):
    return x.double()

def flattens(x, p):
    return x.flatten()

def leaves(x, p):
    raise SystemExit(0)

def interrupted(x, p):
    raise KeyboardInterrupt

def silent(x, p):
    assert False

def nothing(x, p):
    F.dropout(x, p)

def pair(x, p):
    return F.dropout(x, p), p

def nan(x, p):
    return F.dropout(x, p) * float("nan")

def detached(x, p):
    return F.dropout(x.detach(), p)

def never_idle(x, p, training=True):
    if not training:
        raise ValueError("for training only")
    return F.dropout(x, p)

def never_zero(x, p):
    return F.dropout(x, {0.2: 0.2}[p])

class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        return F.dropout(x, p)

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no backward yet")

def no_backward(x, p):
    return NoBackward.apply(x, p)

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        kept = (torch.rand_like(x) >= p) / (1 - p)
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None

def once_differentiable(x, p):
    return Once.apply(x, p)

def reversed_order(p, x):
    return F.dropout(x, p)

def positional(x, p, /):
    return F.dropout(x, p)

class Plain:
    def __init__(self, p):
        self.p = p

    def __call__(self, x):
        return F.dropout(x, self.p)

class NoArguments:
    def __call__(self, x):
        return F.dropout(x, 0.2)

own = torch.nn.Dropout(0.25)
zero_of_int = torch.nn.Dropout(0)
number = 3
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    (tmp_path / "planted_for_check.py").write_text(PLANTED)
    (tmp_path / "unreadable_for_check.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("planted_for_check", None)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("textbook", "nothing is wrong"),
        ("identity", "WRONG: drops nothing, where p is 0.2"),
        ("zero", "WRONG: drops everything, where p is 0.2; with p = 0: 1024 of 1024 elements change"),
        ("half_the_rate", "WRONG: drops 0."),
        ("unscaled", "WRONG: the scale is wrong: the mean of y is 0."),
        ("columns", "WRONG: the elements of a mask depend on each other"),
        ("Repeats", "WRONG: calls share masks, or parts of them"),
        ("forgetful", "WRONG: backward uses another mask than forward"),
        ("unscaled_backward", "WRONG: backward scales wrongly: gradients are not divided by 1 - p"),
        ("by_position", "WRONG: some positions are dropped more often than others"),
        ("Named", "nothing is wrong"),
        ("always", "WRONG: in evaluation: 1024 of 1024 elements change"),
        ("keeps_all", "WRONG: drops nothing, where p is 0.2"),
        ("widens", "WRONG: returns float64 for float32"),
        ("flattens", "WRONG: returns shape (64,) for (2, 4, 8)"),
        ("nothing", "WRONG: returns None of type NoneType, and no tensor"),
        ("pair", "WRONG: returns (tensor("),
        ("nan", "WRONG: returns NaN or inf in 64 of 64 elements"),
        ("detached", "WRONG: the result has no gradient"),
        ("never_idle", "WRONG: in evaluation: raises ValueError: for training only"),
        ("never_zero", "WRONG: with p = 0: raises KeyError: 0.0"),
        ("no_backward", "WRONG: with an input that requires grad, raises NotImplementedError: no backward yet"),
        ("once_differentiable", "nothing is wrong"),
        ("reversed_order", "nothing is wrong"),
        ("positional", "nothing is wrong"),
        ("Plain", "nothing is wrong"),
    ],
)
def test_verdict(name, verdict, planted, capsys):
    status, output = run(capsys, f"planted_for_check:{name}", "--p", "0.2", "--seed", "2")
    assert status == ("WRONG" in verdict)
    second = output.splitlines()[1]
    assert second.startswith(f"p = 0.2: {verdict}")
    assert ("tests fail" in output) == ("WRONG" in verdict)
    assert sum(not line.startswith("  note:") for line in output.splitlines()) <= 8
    if name in ("unscaled", "forgetful", "half_the_rate", "columns", "Repeats", "by_position"):
        assert ";" not in second, "a consequence is reported beside the cause"
    moves = ("textbook", "unscaled", "columns", "by_position", "unscaled_backward", "always", "once_differentiable")
    assert ("the generator moves" in output) == (name in moves)
    assert ("double backward was not tested: RuntimeError: " in output) == (name == "once_differentiable")


def test_a_module_of_ones_own(planted, capsys):
    status, output = run(capsys, "planted_for_check:own", "--seed", "2")
    assert status == 0
    assert "p = 0.25: nothing is wrong" in output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "KeyError: 'no more'"),
        ("silent", "raised AssertionError\n"),
        ("NoArguments", "NoArguments() takes no arguments\n  it is called as C(p)(x) if it is a class"),
        ("leaves", "raised SystemExit: 0"),
        ("Sized", "missing 1 required positional argument: 'size'"),
    ],
)
def test_what_cannot_be_tested(name, message, planted, capsys):
    status, output = run(capsys, f"planted_for_check:{name}", "--p", "0.5")
    assert status == 2
    assert output.splitlines()[1].startswith("p = 0.5: NOT TESTED: ")
    assert message in output
    assert "Traceback" not in output


def test_interrupt(planted, capsys):
    status, output = run(capsys, "planted_for_check:interrupted", "--p", "0.5")
    assert status == 130
    assert output.endswith("p = 0.5: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch:no_such"], "there is no torch:no_such"),
        (["no_such_module:f"], "no_such_module cannot be imported: ModuleNotFoundError"),
        (["torch.nn.functional"], "torch.nn.functional has to be module:callable"),
        (["my_file.py:f"], "my_file.py:f has to be module:callable"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["torch:neg"], "say with --p"),
        (["planted_for_check:number"], "cannot be called: its type is int"),
        (["unreadable_for_check:f"], "unreadable_for_check cannot be imported: SyntaxError"),
        (["--device", "no_device"], "--device no_device cannot be used: "),
        (["--p", "0.001"], "p has to be between"),
        (["planted_for_check:zero_of_int"], "p has to be between"),
        (["--seed", str(2**64)], "--seed has to be between -2^63 and 2^64 - 1, but is 18446744073709551616"),
        (["--n", "1000"], "n has to be a power of two"),
    ],
)
def test_refusals(arguments, message, planted, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_cuda_device(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--device", "cuda"])
    *_, last = capsys.readouterr().err.splitlines()
    assert "--device cuda cannot be used: " in last


def test_report():
    """Faults are listed. There are fewer tests than the fifty that the level of each assumes. Slow callables work."""

    def without_backward(x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return F.dropout(x.detach(), 0.3)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        report = testing.check(without_backward, 0.3, n=2**20, seconds=0.1)
    assert [fault.detail for fault in report.faults] == ["the result has no gradient"]
    assert 25 < len(report.results) <= 50
    assert report.alpha == 1e-6 / 50
    assert any("float32 only" in note for note in report.notes)
    for wrong in ({"p": 1e-3}, {"n": 2**17}, {"n": 3 * 2**20}):
        with pytest.raises(ValueError, match="has to be"):
            testing.check(fd.dropout, **wrong)
