"""DDP, FSDP2, tensor parallel and Megatron's generator states, in two processes: the behaviour of torch's dropout."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from workers import WORLD, workers_of

import fused_dropout as fd

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")


workers = workers_of(__name__)


class Model(nn.Module):
    def __init__(self, dropout=nn.Dropout, checkpointed=None):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(16, 16), nn.Tanh(), dropout(0.5)) for _ in range(2))
        self.last = nn.Linear(16, 1)
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in (self.first, self.second):
            again = {"use_reentrant": self.checkpointed == "reentrant"}
            x = checkpoint(block, x, **again) if self.checkpointed else block(x)
        return self.last(x)


def made(dropout=nn.Dropout, checkpointed=None):
    torch.manual_seed(0)
    return Model(dropout, checkpointed)


def batch(rank):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(100 + rank))
    return x.requires_grad_(), x.detach().sum(1, keepdim=True)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for block in (model.first, model.second):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS = {"ddp": ddp, "fsdp": fsdp}
for_wraps = pytest.mark.parametrize("wrap", WRAPS)


def backward(model, rank):
    x, target = batch(rank)
    loss = F.mse_loss(model(x), target)
    loss.backward()
    return loss.item()


def gradients(model):
    grads = [p.grad for p in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def gradient(rank, wrap, how, checkpointed):
    model = made(fd.Dropout if how == "module" else nn.Dropout, checkpointed)
    if how == "convert before":
        fd.convert(model)
    model = WRAPS[wrap](model)
    if how == "convert after":
        fd.convert(model)
    with fd.patched() if how == "patch" else contextlib.nullcontext():
        torch.manual_seed(rank)
        backward(model, rank)
    return gradients(model)


@for_wraps
@pytest.mark.parametrize("how", ["module", "convert before", "convert after", "patch"])
@pytest.mark.parametrize("checkpointed", [None, "reentrant", "non-reentrant"])
def test_gradient_is_the_mean_over_ranks(workers, wrap, how, checkpointed):
    """Each rank has the masks of its seed, as if it trained a separate model. Recomputation has the same masks."""
    alone = []
    for rank in range(WORLD):
        model = made(fd.Dropout)
        torch.manual_seed(rank)
        backward(model, rank)
        alone.append(gradients(model))
    want = [sum(grads) / WORLD for grads in zip(*alone, strict=True)]
    for got in workers(gradient, wrap, how, checkpointed):
        torch.testing.assert_close(got, want)


class Paired(nn.Module):
    """Blocks with a dropout before a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 16)) for _ in range(2)
        )
        self.last = nn.Linear(16, 1)

    def forward(self, x):
        return self.last(self.second(self.first(x)))


def paired_gradient(rank, wrap, pair_linears):
    torch.manual_seed(0)
    model = fd.convert(Paired(), pair_linears=pair_linears)
    if wrap:
        model = WRAPS[wrap](model)
    paired = len(fd.convert_report(model).paired)
    torch.manual_seed(rank)
    backward(model, rank)
    return gradients(model), paired


@for_wraps
def test_paired_gradient_is_the_mean_over_ranks(workers, wrap):
    """A paired dropout and linear layer. FSDP2 frees the layer's weight between forward and backward."""
    alone = [paired_gradient(rank, None, False)[0] for rank in range(WORLD)]
    want = [sum(grads) / WORLD for grads in zip(*alone, strict=True)]
    for got, paired in workers(paired_gradient, wrap, True):
        assert paired == 2
        torch.testing.assert_close(got, want)


def train(rank, wrap, how):
    model = made()
    with fd.patched() if how == "patch" else contextlib.nullcontext():
        model = WRAPS[wrap](model if how == "patch" else fd.convert(model))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        torch.manual_seed(rank)

        def steps(n):
            losses = []
            for _ in range(n):
                optimizer.zero_grad()
                losses.append(backward(model, rank))
                optimizer.step()
            return losses

        def load():
            weights, moments, rng_state = copy.deepcopy(saved)  # an optimizer modifies the state that it loads
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            return rng_state

        losses = steps(30)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
        first = steps(3)
        load()
        other_masks = steps(3)
        torch.set_rng_state(load())
        resumed = steps(3)
    return losses, first, resumed, other_masks


@for_wraps
@pytest.mark.parametrize("how", ["convert", "patch"])
def test_trains_and_resumes(workers, wrap, how):
    for losses, first, resumed, other_masks in workers(train, wrap, how):
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        assert resumed == first
        assert other_masks != first


def masks(rank, how):
    """Masks of the function, the module and torch's dropout: one seed on all ranks, a seed per rank, a key per rank."""
    x = torch.ones(256)
    calls = {"fd": lambda: fd.dropout(x), "module": lambda: fd.Dropout(0.5)(x), "torch": lambda: F.dropout(x)}
    found = {}
    for (name, call), seed in itertools.product(calls.items(), ("same", "own")):
        torch.manual_seed(5 + (rank if seed == "own" else 0))
        with fd.patched() if how == "patch" and name == "torch" else contextlib.nullcontext():
            found[name, seed] = call().tolist()
    key = fd.key(5)
    found["key", "same"] = fd.dropout(x, key=key).tolist()
    found["key", "own"] = fd.dropout(x, key=fd.fold_in(key, rank)).tolist()
    return found


@pytest.mark.parametrize("how", ["plain", "patch"])
def test_ranks_agree_where_torchs_do(workers, how):
    a, b = workers(masks, how)
    assert len(a) == 8
    for name, seed in a:
        assert (a[name, seed] == b[name, seed]) == (seed == "same"), (name, seed)


class Tracker:
    """Megatron's ``get_cuda_rng_tracker()`` for the CPU's generator: named states that replace its state in a block."""

    def __init__(self):
        self.states = {}

    def add(self, name, seed):
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states[name] = torch.get_rng_state()
        torch.set_rng_state(before)

    @contextlib.contextmanager
    def fork(self, name="model-parallel-rng"):
        before = torch.get_rng_state()
        torch.set_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = torch.get_rng_state()
            torch.set_rng_state(before)


def tracked(rank, dropout):
    """As in Megatron's layers: residual dropout is equal on all ranks, and attention dropout differs between ranks."""
    names = {"fd": fd.dropout, "torch": F.dropout, "patch": F.dropout}
    x = torch.ones(256)

    def run(tracker):
        with fd.patched() if dropout == "patch" else contextlib.nullcontext():
            call = F.dropout if dropout == "patch" else names[dropout]
            torch.manual_seed(5)
            outside, inside = [call(x)], []
            for _ in range(3):
                with tracker.fork() if tracker else contextlib.nullcontext():
                    if tracker:
                        inside.append(call(x))
                outside.append(call(x))
        return [y.tolist() for y in outside], [y.tolist() for y in inside]

    tracker = Tracker()
    tracker.add("model-parallel-rng", 2718 + rank)
    without, _ = run(None)
    outside, inside = run(tracker)
    tracker.add("model-parallel-rng", 2718 + rank)
    again = run(tracker)
    # The stream of that name without interruption.
    torch.manual_seed(2718 + rank)
    function = fd.dropout if dropout in ("fd", "patch") else F.dropout
    stream = [function(x).tolist() for _ in range(3)]
    return {"without": without, "outside": outside, "inside": inside, "again": again, "stream": stream}


@pytest.mark.parametrize("dropout", ["fd", "patch", "torch"])
def test_megatrons_generator_states(workers, dropout):
    a, b = workers(tracked, dropout)
    for rank in (a, b):
        assert rank["outside"] == rank["without"], "draws inside do not advance the stream outside"
        assert rank["inside"] == rank["stream"], "draws outside do not advance the stream inside"
        assert rank["again"] == (rank["outside"], rank["inside"])
        masks = rank["inside"] + rank["outside"]
        assert all(m != n for m, n in itertools.combinations(masks, 2))
    assert a["outside"] == b["outside"]
    assert all(m != n for m, n in zip(a["inside"], b["inside"], strict=True))


def on_dtensors(rank, placement, how):
    """Value and gradient of a DTensor by one of the entry points, and of the whole tensor in one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    dense = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))

    def run(dropout, x):
        torch.manual_seed(5)
        y = dropout(x.requires_grad_())
        y.sum().backward()
        return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (y.detach(), x.grad)]

    x = distribute_tensor(dense, mesh, [Replicate() if placement == "replicate" else Shard(0)])
    with fd.patched() if how == "patch" else contextlib.nullcontext():
        got = run(nn.Dropout(0.5) if how == "patch" else fd.Dropout(0.5) if how == "module" else fd.dropout, x)
    want = run(fd.dropout, dense.clone())
    return [torch.equal(a, b) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("placement", ["replicate", "shard"])
@pytest.mark.parametrize("how", ["function", "module", "patch"])
def test_dtensors_have_the_global_mask(workers, placement, how):
    assert workers(on_dtensors, placement, how) == [[True, True]] * WORLD


def tensor_parallel(rank, sequence, how):
    """Loss and gradients of two linear layers that are sharded over both ranks, with dropout between and after them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, parallel

    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 16), nn.Dropout(0.5))
    plan = {"0": parallel.ColwiseParallel(), "3": parallel.RowwiseParallel()}
    if sequence:
        plan = {
            "0": parallel.ColwiseParallel(use_local_output=False),
            "3": parallel.RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
            "4": parallel.SequenceParallel(sequence_dim=0),
        }
    if how == "convert before":
        fd.convert(model)
    model = parallel.parallelize_module(model, mesh, plan)
    if how == "convert after":
        fd.convert(model)
    masks = []
    model[2].register_forward_hook(lambda _, args, y: masks.append((args[0], y)))
    model[4].register_forward_hook(lambda _, args, y: masks.append((args[0], y)))
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    with fd.patched() if how == "patch" else contextlib.nullcontext():
        torch.manual_seed(7)
        y = model(x)
        (y.full_tensor() if sequence else y).square().sum().backward()
    local = [[t.full_tensor() if hasattr(t, "full_tensor") else t for t in pair] for pair in masks]
    kinds = [type(y).__name__ for _, y in masks]
    grads = [p.grad.full_tensor() for p in model.parameters()]
    return kinds, [(x.detach(), y.detach()) for x, y in local], grads


@pytest.mark.parametrize("sequence", [False, True], ids=["local", "sequence"])
@pytest.mark.parametrize("how", ["convert before", "convert after", "patch"])
def test_tensor_parallel(workers, sequence, how):
    """With one seed, plain local tensors have one mask on all ranks, as in torch. DTensors have the global mask."""
    ranks = workers(tensor_parallel, sequence, how)
    for kinds, dropped, _ in ranks:
        assert kinds == ["DTensor" if sequence else "Tensor"] * 2
        torch.manual_seed(7)
        for x, y in dropped:
            assert torch.equal(y, fd.dropout(x))
    torch.testing.assert_close(ranks[0][2], ranks[1][2])
    if not sequence:
        assert torch.equal(ranks[0][1][1][1], ranks[1][1][1][1]), "replicated activations are dropped alike"


def audited(rank, seed, local):
    """The sites that audit reports for two linear layers with tensor parallelism over both ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel

    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 16), nn.Dropout(0.5))
    plan = {"0": parallel.ColwiseParallel(use_local_output=local), "3": parallel.RowwiseParallel()}
    model = parallel.parallelize_module(model, mesh, plan)
    x, found = torch.randn(8, 16), []
    for _ in range(2):
        torch.manual_seed(seed + rank * (seed != 1))
        report = fd.audit(model, x)
        found.append([(site.module, site.shares_mask) for site in report.one_mask_for_shards])
        fd.convert(model)
    return found, "activations that differ: 2 [Dropout] along tp" in str(report)


class Twice(nn.Module):
    """Calls one dropout twice: before and after the columns are sharded."""

    def __init__(self):
        super().__init__()
        self.columns, self.drop = nn.Linear(16, 32), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.columns(self.drop(x)))


def audited_twice(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    model = parallel.parallelize_module(Twice(), mesh, {"columns": parallel.ColwiseParallel()})
    torch.manual_seed(1)
    return [site.module for site in fd.audit(model, torch.ones(8, 16)).one_mask_for_shards]


def test_audit_looks_at_each_call_of_a_site(workers):
    assert workers(audited_twice) == [["drop"]] * WORLD


def test_audit_finds_one_mask_for_shards(workers):
    """Only the dropout between the two layers is reported, because its input is a different shard on each rank."""
    for found, said in workers(audited, 1, True):
        assert found == [[("2", ("tp",))]] * 2
        assert said
    assert [found for found, _ in workers(audited, 10, True)] == [[[], []]] * WORLD
    for found, _ in workers(audited, 1, False):
        assert found[1] == [], "a DTensor has the global mask"
