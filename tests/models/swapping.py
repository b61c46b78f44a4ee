"""Shared by the tests of whole models: ways to swap dropout, training runs to compare, and checks that a swap can be
undone."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dropout as fd
from fused_dropout.swap import fusing

WAYS = ["patched", "converted"]
for_ways = pytest.mark.parametrize("way", WAYS)
TORCHS = {(m, name): f for m in (F, torch) for name, f in vars(m).items() if "dropout" in name and callable(f)}
RUNS, STEPS = 12, 10


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: with several, other work on the machine can stall OpenMP's barriers. The tensors here are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Case:
    """A model, its inputs, and its dropout sites in training: pairs of a module's name and the kind of dropout.

    module: one of torch's dropout modules, which ``patch`` and ``convert`` replace. call: a functional call, which
    ``patch`` replaces. attention: ``F.scaled_dot_product_attention``, which ``patch`` replaces. path: timm's drop path,
    which ``convert`` replaces. kernel: inside a kernel of torch, which neither can replace. own: a mask that the model
    draws itself.
    """

    make: Callable[[], nn.Module]
    inputs: dict[str, Any]
    sites: Sequence[tuple[str, str]]
    loss: Callable[[Any], Tensor] = lambda output: output.loss
    lr: float = 1e-2
    output: Callable[[Any], Tensor] = field(default=lambda output: output.logits)

    @property
    def kinds(self) -> set[str]:
        return {kind for _, kind in self.sites}

    @property
    def has_calls(self) -> bool:
        """Whether there are sites that ``patch`` replaces and ``convert`` does not."""
        return not self.kinds.isdisjoint({"call", "attention"})

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().train()

    def step(self, model: nn.Module, seed: int, call: Callable[..., Any] | None = None) -> list[Tensor]:
        """Loss and gradients of one step, with the masks of a seed. call: the compiled model, called instead."""
        model.zero_grad()
        torch.manual_seed(seed)
        loss = self.loss((model if call is None else call)(**self.inputs))
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Equal up to the order of sums. Another mask gives clearly different numbers."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@contextmanager
def swapped(ways: str, model: nn.Module):
    """Fused dropout in the model inside a with block. ways: names of WAYS; with none of them, torch's dropout stays."""
    with ExitStack() as stack:
        if "patched" in ways:
            stack.enter_context(fd.patched())
        if "converted" in ways:
            fd.convert(model)
            stack.callback(fd.revert, model)
        yield


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@contextmanager
def fused_calls():
    """Counts the calls that fused layers make: ``dropout_add`` and ``relu_dropout``."""
    made = Counter()

    def counted(name):
        function = getattr(fusing, name)
        return lambda *args, **settings: made.update([name]) or function(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("dropout_add", "relu_dropout"):
            patch.setattr(fusing, name, counted(name))
        yield made


def check_fused(case: Case, calls: dict[str, int]) -> None:
    """A step of the fused model makes these calls and gives the converted model's results, bit for bit. So do a copy of
    it, and eval mode. Reverting restores the model."""
    plain, model = case.model(), case.model()
    before = [(name, type(m), set(vars(m))) for name, m in model.named_modules()]
    fd.convert(plain)
    fd.convert(model, fuse=True)
    want, state = case.step(plain, 1), torch.get_rng_state()
    with fused_calls() as made:
        assert same(case.step(model, 1), want)
        assert torch.equal(torch.get_rng_state(), state)
        assert made == calls
        twin = copy.deepcopy(model)
        assert same(case.step(twin, 1), want)
        assert made == {name: 2 * times for name, times in calls.items()}
        with torch.no_grad():
            assert torch.equal(case.output(model.eval()(**case.inputs)), case.output(plain.eval()(**case.inputs)))
        assert made == {name: 2 * times for name, times in calls.items()}
    fd.revert(model)
    assert [(name, type(m), set(vars(m))) for name, m in model.named_modules()] == before


def curve(case: Case, ways: str, seed: int = 1, train: bool = True) -> list[float]:
    """Losses in training. Weights and batch are always the same; the seed sets the masks. train: whether to drop."""
    model = case.model().train(train)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=case.lr)
    losses = []
    torch.manual_seed(seed)
    with swapped(ways, model):
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = case.loss(model(**case.inputs))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def alike(ours: list[float], theirs: list[float]) -> bool:
    """Whether the means of two sets of runs differ by less than six standard errors of the difference. With twelve runs
    each, chance exceeds this 5 times in a million (Student's t, 22 degrees of freedom)."""
    error = (variance(ours) / len(ours) + (variance(theirs) / len(theirs) if len(theirs) > 1 else 0)) ** 0.5
    return abs(fmean(ours) - fmean(theirs)) < 6 * error


def mean_losses(case: Case, ways: str) -> list[float]:
    return [fmean(curve(case, ways, seed)) for seed in range(RUNS)]


class Promises:
    """The tests of each case. A test file inherits from this class and parametrizes it with its cases."""

    def test_the_loss_falls_as_with_torchs(self, case: Case) -> None:
        """The loss falls, and its mean over the run is that of nn.Dropout. Without dropout the mean differs."""
        # If convert replaces all sites that patch does, or none, its runs equal patch's or torch's: see the next test.
        both = ("module" in case.kinds and case.has_calls) or "path" in case.kinds
        ways = ["patched", "converted"] if both else ["patched"]
        mean = {way: mean_losses(case, way) for way in ("torch", *ways)}
        ours = curve(case, "patched")
        assert fmean(ours[-3:]) < 0.95 * ours[0], ours
        assert ours != curve(case, "torch")
        for way in ways:
            assert alike(mean[way], mean["torch"]), mean
        without = [fmean(curve(case, "torch", train=False))]
        assert not alike(mean["torch"], without), (mean, without)
        assert not alike(mean["patched"], without), (mean, without)

    def test_both_ways_draw_the_same_masks(self, case: Case) -> None:
        """Both ways together give the same masks as one alone, if that one replaces all sites that the other does."""
        patched, converted, both = curve(case, "patched"), curve(case, "converted"), curve(case, "patched, converted")
        assert (both == patched) is ("path" not in case.kinds)
        assert (both == converted) is not case.has_calls
        assert (converted == curve(case, "torch")) is ("module" not in case.kinds)

    @for_ways
    def test_eval_is_as_before(self, case: Case, way: str) -> None:
        model = case.model().eval()
        with torch.no_grad():
            want = case.output(model(**case.inputs))
            with swapped(way, model):
                state = torch.get_rng_state()
                assert torch.equal(case.output(model(**case.inputs)), want)
                assert torch.equal(torch.get_rng_state(), state)

    @for_ways
    def test_undone_it_is_as_before(self, case: Case, way: str) -> None:
        """Undoing restores everything: classes, attributes, state dict, torch's functions, masks and gradients."""
        model = case.model()

        def state():
            return [(name, type(m), set(vars(m))) for name, m in model.named_modules()], list(model.state_dict())

        before, weights, step = state(), [t.clone() for t in model.state_dict().values()], case.step(model, 3)
        with swapped(way, model):
            reached = "module" in case.kinds or (case.has_calls and way == "patched")
            assert same(case.step(model, 3), step) is not reached
            assert list(model.state_dict()) == before[1]
        assert all(getattr(*place) is function for place, function in TORCHS.items())
        assert state() == before
        assert same(list(model.state_dict().values()), weights)
        assert same(case.step(model, 3), step)

    def test_audit_names_every_site(self, case: Case) -> None:
        fused = f"fused, {fd.backend_info().devices['cpu']}"
        model = case.model()
        for ways, reached in (("torch", ""), ("converted", "module path"), ("patched", "module call attention")):
            with swapped(ways, model):
                report = fd.audit(model, **case.inputs)
            paths = {
                "module": "torch",
                "call": "torch",
                "attention": "torch",
                "kernel": "torch, out of reach",
                "path": "own code",
                "own": "own code",
            }
            paths |= dict.fromkeys(reached.split(), fused)
            got = [(site.module, site.path.partition(", aten::")[0]) for site in report.sites if site.train]
            assert sorted(got) == sorted((name, paths[kind]) for name, kind in case.sites), f"{ways}\n{report}"
            attention = {name for name, kind in case.sites if kind == "attention"}
            keys = [site.saved for site in report.sites if site.path == fused and site.module not in attention]
            assert all(saved <= 32 for saved in keys), f"a key a call\n{report}"
            assert not report.on_in_eval, report
