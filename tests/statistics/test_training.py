"""Equivalence with nn.Dropout, by two one-sided tests, and training runs that have to be equal bit for bit.

The margin is a thousandth for the rate, and 2^-9, the error of rounding one value to bfloat16, for mean and variance. A
first version used a thousandth there too, which was too small to compare the mean at p = 0.5.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import one_thread, power_of_tost, tost  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_dropout as fd
from fused_dropout import keys, reference

MARGINS, EQUIVALENCE_LEVEL = {"rate": 1e-3, "mean": 2**-9, "variance": 2**-9}, 1e-3


# ------------------------------------------------------------------------------------------ equivalence


def moments(dropout, p, n=2**24):
    """Rate, E[y] / x and Var[y] / x^2 of one call, each with its variance under the definition of dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        y = dropout(torch.ones(n), p)
    odds, total = p / (1 - p), y.sum(dtype=torch.float64).item()
    return {
        "rate": (1 - y.count_nonzero().item() / n, p * (1 - p) / n),
        "mean": (total / n, odds / n),
        "variance": (y.sub_(1).square_().sum(dtype=torch.float64).item() / n, (p + (1 - p) * odds**4 - odds**2) / n),
    }


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_equivalent_to_torch(p):
    ours, theirs = moments(fd.dropout, p), moments(F.dropout, p)
    for name, (value, variance) in ours.items():
        deviation = (variance + theirs[name][1]) ** 0.5 + 1e-12  # the variance is a constant at p = 1/2
        assert power_of_tost(deviation, MARGINS[name], EQUIVALENCE_LEVEL) > 0.95, name
        assert tost(value - theirs[name][0], deviation, MARGINS[name]) < EQUIVALENCE_LEVEL, name


def test_equivalence_can_fail():
    """A rate that differs by slightly more than the margin, as with 8 bits at p = 0.1, is not equivalent."""
    ours, theirs = moments(fd.dropout, 25 / 256), moments(F.dropout, 0.1)
    for name in ("rate", "variance"):
        assert tost(ours[name][0] - theirs[name][0], 1e-4, MARGINS[name]) > 0.9, name


# ------------------------------------------------------------------------------------------ whole runs, bit for bit


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, key):
        ctx.p = p
        ctx.save_for_backward(key)
        return reference.apply(x, p, key)

    @staticmethod
    def backward(ctx, grad):
        return reference.apply(grad, ctx.p, *ctx.saved_tensors), None, None


class ReferenceDropout(nn.Dropout):
    """The PyTorch reference under autograd. Of the rest of the library it uses only the drawing of keys."""

    def forward(self, x):
        return _Reference.apply(x, self.p, keys.draw_key(x.device)) if self.training else x


class Run:
    """A small classifier in training. One seed determines the weights, data and dropout."""

    def __init__(self, module=fd.Dropout, checkpointed=False):
        torch.manual_seed(31)
        layers = [nn.Linear(20, 64), nn.ReLU(), module(0.1), nn.Linear(64, 64), nn.ReLU(), module(0.5)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(64, 5)
        self.model = nn.ModuleList([self.body, self.head])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.forward = partial(checkpoint, self.body, use_reentrant=False) if checkpointed else self.body

    def train(self, steps):
        for _ in range(steps):
            x = torch.randn(33, 20)
            loss = F.cross_entropy(self.head(self.forward(x)), x[:, :5].argmax(1))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return self

    def state(self):
        return [self.model.state_dict(), self.optimizer.state_dict(), torch.get_rng_state()]

    def load(self, state):
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])
        torch.set_rng_state(state[2])
        return self


@pytest.fixture
def weights():
    """The weights after a plain run of sixty steps."""
    with torch.random.fork_rng():
        yield list(Run().train(60).model.parameters())


def assert_equal(run, weights):
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), weights, strict=True))


def test_kernel_and_reference_train_the_same_weights(weights):
    assert_equal(Run(ReferenceDropout).train(60), weights)


def test_checkpointing_changes_no_weight(weights):
    assert_equal(Run(checkpointed=True).train(60), weights)


def test_resumed_is_uninterrupted(weights, tmp_path):
    torch.save(Run().train(25).state(), tmp_path / "state.pt")
    torch.manual_seed(99)  # as in a new process
    state = torch.load(tmp_path / "state.pt")
    assert_equal(Run().load(state).train(35), weights)


def test_another_mask_trains_other_weights(weights):
    """The comparisons above can fail: nn.Dropout's masks, or a generator that is not restored, give other weights."""
    state = Run().train(25).state()
    resumed = Run().load([*state[:2], torch.Generator().manual_seed(99).get_state()]).train(35)
    for other in (Run(nn.Dropout).train(60), resumed):
        assert not any(torch.equal(a, b) for a, b in zip(other.model.parameters(), weights, strict=True))
