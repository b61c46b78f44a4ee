"""Statistics of fd.dropout under fixed keys, with nn.Dropout under a fixed seed as the control.

Under a fixed key a statistic is a constant, so the result of these tests never changes. The long form uses new keys.
"""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import RATES, fine, one_thread  # noqa: F401
from helpers import for_dtypes, key_tensor
from torch import nn

import fused_dropout as fd
from fused_dropout import testing

SEED = 0x5EED_0000_C0FF_EE11


def with_offsets():
    """Keys as on CUDA: one seed, consecutive offsets."""
    offset = itertools.count()
    return lambda x, p: fd.dropout(x, p, key=key_tensor(SEED, next(offset)))


def with_generator():
    """Keys as on the CPU: a new seed for each call."""
    return partial(fd.dropout, generator=torch.Generator().manual_seed(SEED))


def of_torch():
    torch.manual_seed(SEED)
    return F.dropout


@pytest.fixture(params=[with_offsets, with_generator, of_torch], ids=lambda make: make.__name__)
def dropout(request):
    with torch.random.fork_rng():
        yield request.param()


def sample(dropout, p, calls, *shape):
    return testing.sample(lambda x: dropout(x, p), calls, shape, torch.float32, "cpu", seconds=60)


# ------------------------------------------------------------------------------------------ rate and scale


@pytest.mark.parametrize("p", RATES)
def test_rate(p):
    """2^24 draws each. At p = 0.1 the test would detect a bias of 6e-4, and 25/256 differs by more."""
    fine(testing.rate(fd.keep_mask((2**24,), p, key_tensor(SEED, 1)), p))


def test_rates_differ_where_they_should():
    """The test above fails for the nearest p of the 8-bit grid, and for a small p with the 16-bit grid too."""
    for p, other in ((0.1, 25 / 256), (25 / 256, 0.1), (1e-6, 1 / 2**16)):
        assert testing.rate(fd.keep_mask((2**24,), other, key_tensor(SEED, 1)), p).p_value < 1e-9


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
@for_dtypes
def test_mean_variance_and_scale(dtype, p):
    """E[y] / x = 1 and Var[y] / x^2 = p / (1 - p) for each dtype: the scale is exact and the rounding has no bias."""
    x = torch.rand(2**22, generator=torch.Generator().manual_seed(3)).add_(1).to(dtype)
    y = fd.dropout(x, p, key=key_tensor(SEED, 2))
    fine([testing.mean(x, y, p), testing.variance(x, y, p), testing.scale(x, y, p)])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mean_and_variance_of_torch(p):
    """The control, in float32. In bfloat16, nn.Dropout on a CPU rounds the scale itself, so E[y] / x is 0.9983."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        x = torch.rand(2**22) + 1
        y = F.dropout(x, p)
    fine([testing.mean(x, y, p), testing.variance(x, y, p), testing.scale(x, y, p)])


# ------------------------------------------------------------------------------------------ uniformity


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_uniformity(dropout, p):
    """Short calls with a tail of seven elements, and a batch of images along each of its dimensions."""
    fine(list(testing.uniformity(sample(dropout, p, 4096, 255))))
    fine(list(testing.uniformity(sample(dropout, p, 2, 8, 32, 32, 64))))


# ------------------------------------------------------------------------------------------ independence


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence_within_a_call(dropout, p):
    mask = sample(dropout, p, 1, 8, 32, 64, 64)[0]
    fine([testing.autocorrelation(mask.flatten()), testing.autocorrelation(mask), testing.runs(mask)])
    fine([testing.blocks(mask.view(1024, 1024), side) for side in (8, 32)])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence_of_calls(dropout, p):
    """Two long calls; a thousand short calls, at all distances; the 64-bit words of fifteen thousand calls."""
    fine(testing.cross_correlation(*sample(dropout, p, 2, 2**20)))
    fine(testing.autocorrelation(sample(dropout, p, 1024, 1023)))
    fine(testing.collisions(sample(dropout, p, 2**14, 64) if p == 0.5 else sample(dropout, p, 2**10, 1280)))


def masks_of_keys(keys, n=2**14, p=0.5):
    return torch.stack([fd.keep_mask((n,), p, key_tensor(*key)) for key in keys])


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param([(SEED, 7), *((SEED ^ 1 << bit, 7) for bit in range(64))], id="seeds one bit apart"),
        pytest.param([(SEED, 7), *((SEED, 7 ^ 1 << bit) for bit in range(64))], id="offsets one bit apart"),
        pytest.param([(0, 0), *((1 << bit, 0) for bit in range(64)), *((0, 1 << bit) for bit in range(64))], id="zero"),
        pytest.param([(SEED, 2**32 + k) for k in range(-32, 32)], id="offsets next to one another"),
        pytest.param([(SEED + k, 0) for k in range(64)], id="ranks: seeds next to one another"),
        pytest.param([(a, b) for a in range(8) for b in range(8)], id="small seeds and offsets"),
    ],
)
def test_independence_of_related_keys(keys):
    masks = masks_of_keys(keys)
    fine([testing.autocorrelation(masks), testing.collisions(masks)])


def test_independence_of_far_parts():
    """One key, and pieces that begin where an index of 16, 19, 32 or 35 bits would wrap around."""
    starts = [0, 2**16, 2**19, 2**31, 2**32, 2**35, 2**35 + 2**32, 2**40, 2**62]
    pieces = torch.stack([fd.keep_mask((2**16,), 0.5, key_tensor(SEED, 0), start=start) for start in starts])
    fine([testing.autocorrelation(pieces), testing.collisions(pieces), *testing.uniformity(pieces)])


@pytest.mark.parametrize("module", [fd.Dropout, nn.Dropout])
def test_independence_of_layers_in_a_training_step(module):
    """Layers of several widths, in two steps: no mask is a shifted copy of another."""
    masks = []
    with torch.random.fork_rng():
        torch.manual_seed(6)
        widths = (64, 128, 128, 32)
        layers = [(nn.Linear(a, b), module(0.5), nn.Linear(b, b)) for a, b in itertools.pairwise(widths)]
        model = nn.Sequential(*itertools.chain(*layers))
        for layer in model:
            if isinstance(layer, nn.Dropout):
                layer.register_forward_hook(lambda _, inputs, output: masks.append(output != 0))
        for _ in range(2):
            model(torch.randn(512, 64)).sum().backward()
    assert len(masks) == 6
    fine([testing.cross_correlation(a, b) for a, b in itertools.combinations(masks, 2)])


def test_independence_of_dtypes_and_sizes_on_one_generator(dropout):
    """Consecutive calls with different dtypes or sizes share a generator, but no draws."""
    kinds = itertools.product((torch.float32, torch.bfloat16, torch.float64, torch.float16), (4096, 5000, 4103))
    masks = [dropout(torch.ones(n, dtype=dtype), 0.5) != 0 for dtype, n in kinds]
    fine([testing.cross_correlation(a, b) for a, b in itertools.combinations(masks, 2)])


def test_independence_of_ranks():
    """Sixteen ranks with the usual seeds, base + rank, and eight calls each."""
    ranks = []
    for rank in range(16):
        generator = torch.Generator().manual_seed(1234 + rank)
        ranks.append(torch.stack([fd.dropout(torch.ones(8192), 0.1, generator=generator) != 0 for _ in range(8)]))
    fine([testing.autocorrelation(torch.stack(ranks)), *testing.uniformity(torch.stack(ranks))])


# ------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("inplace", [False, True])
def test_one_mask_in_forward_and_backward(inplace):
    fine(list(testing.same_mask_in_backward(partial(fd.dropout, p=0.3, inplace=inplace), torch.rand(10_007) + 1)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_mask_in_forward_and_backward_compiled(backend):
    """Without double backward, which torch refuses for compiled functions."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fd.dropout(x, 0.3), backend=backend, fullgraph=True)
    x, gradient = (torch.rand(10_007) + 1).requires_grad_(), torch.rand(10_007) + 1
    for call in (compiled, partial(torch.utils.checkpoint.checkpoint, compiled, use_reentrant=False)):
        y = call(x)
        (grad,) = torch.autograd.grad(y, x, gradient)
        fine(testing.identical("compiled backward", y == 0, grad == 0))


@pytest.mark.parametrize("module", [fd.Dropout, nn.Dropout])
def test_what_draws_nothing(module):
    for idle in (module(0.0), module(0.5).eval()):
        fine(testing.draws_nothing(idle, torch.rand(1000)))


def test_one_key_one_mask():
    """The mask depends on the key alone, not on the function, the size, the dtype or the alignment."""
    fine(list(testing.same_mask(partial(fd.dropout, p=0.3), torch.ones(1001))))
