"""Same behaviour as nn.Dropout and F.dropout: seeding, eval mode, modules, scripting, unusual inputs."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd


def ones(n=1000, **options):
    return torch.ones(n, **options)


def seeded(seed=0, **options):
    torch.manual_seed(seed)
    return fd.dropout(ones(), **options)


def test_arguments_are_those_of_torch():
    theirs = list(inspect.signature(F.dropout).parameters.items())
    ours = list(inspect.signature(fd.dropout).parameters.items())
    assert [(name, p.default, p.kind) for name, p in ours[:4]] == [(name, p.default, p.kind) for name, p in theirs]
    assert [name for name, _ in ours[4:]] == ["generator", "key", "noise_shape", "shard"]
    assert fd.dropout(input=ones(), p=0.5, training=True, inplace=False).shape == (1000,)


class TestSeeds:
    def test_manual_seed(self):
        assert torch.equal(seeded(1), seeded(1))
        assert not torch.equal(seeded(1), seeded(2))

    def test_two_calls_never_share_a_mask(self, device):
        masks = [fd.dropout(ones(64, device=device)).cpu() for _ in range(50)]
        assert len({tuple(mask.tolist()) for mask in masks}) == 50

    def test_generator(self):
        def run(seed):
            return fd.dropout(ones(), generator=torch.Generator().manual_seed(seed))

        torch.manual_seed(0)
        before = torch.get_rng_state()
        assert torch.equal(run(5), run(5))
        assert not torch.equal(run(5), run(6))
        assert torch.equal(torch.get_rng_state(), before), "the default generator does not change"

    def test_rng_state(self):
        seeded()
        state = torch.get_rng_state()
        first = fd.dropout(ones())
        torch.set_rng_state(state)
        assert torch.equal(fd.dropout(ones()), first)

    def test_fork_rng(self):
        torch.manual_seed(4)
        expected = fd.dropout(ones())
        torch.manual_seed(4)
        with torch.random.fork_rng(devices=[]):
            fd.dropout(ones())
            fd.dropout(ones())
        assert torch.equal(fd.dropout(ones()), expected)

    @pytest.mark.parametrize("options", [{"training": False}, {"p": 0}, {"p": 0.0, "inplace": True}, {"p": 1}])
    def test_what_needs_no_draw_takes_none(self, options):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        fd.dropout(ones(), **options)
        fd.dropout(torch.empty(0))
        assert torch.equal(torch.get_rng_state(), before)

    def test_key_touches_no_generator(self, key):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        assert torch.equal(fd.dropout(ones(), key=key), fd.dropout(ones(), key=key))
        assert torch.equal(torch.get_rng_state(), before)


class TestReturns:
    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize(("p", "training"), [(0.5, False), (0, True), (0.0, True), (1, False)])
    @pytest.mark.parametrize("inplace", [False, True])
    def test_the_very_tensor(self, p, training, inplace, grad):
        for x in (ones(requires_grad=grad), torch.empty(0), torch.arange(3), nn.Parameter(ones())):
            assert F.dropout(x, p, training, inplace) is x
            assert fd.dropout(x, p, training, inplace) is x

    def test_empty_and_0_dim(self):
        empty = torch.empty(3, 0)
        assert fd.dropout(empty) is empty
        assert fd.dropout(torch.tensor(1.0)).shape == ()

    def test_parameter_gives_a_plain_tensor(self):
        assert type(fd.dropout(nn.Parameter(ones()))) is type(F.dropout(nn.Parameter(ones()))) is torch.Tensor

    def test_p_one_drops_all_and_passes_no_gradient(self):
        x = torch.tensor([1.0, torch.inf, torch.nan], requires_grad=True)
        y = fd.dropout(x, 1.0)
        y.sum().backward()
        assert torch.equal(y, torch.zeros(3))
        assert torch.equal(x.grad, torch.zeros(3))

    @pytest.mark.parametrize("p", [1, True, np.float64(0.25), np.float32(0.25), torch.tensor(0.25), torch.tensor(1)])
    def test_kinds_of_p(self, p, key):
        assert torch.equal(fd.dropout(ones(), p, key=key), fd.dropout(ones(), float(p), key=key))
        torch.manual_seed(0)
        y = fd.dropout(ones(), p)
        torch.manual_seed(0)
        assert torch.equal(y, fd.dropout(ones(), float(p)))

    def test_autocast_keeps_the_dtype(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fd.dropout(ones()).dtype == torch.float32
            assert fd.dropout(ones().bfloat16()).dtype == torch.bfloat16

    def test_copy_on_write_input_stays_lazy(self):
        x = ones()
        lazy = x._lazy_clone()
        fd.dropout(lazy)
        assert torch._C._is_cow_tensor(lazy)

    def test_negative_and_conjugate_views(self, key):
        z = torch.complex(torch.randn(50), torch.randn(50))
        x = z.conj().imag
        assert x.is_neg()
        assert torch.equal(fd.dropout(x, 0.5, key=key), fd.dropout(x.resolve_neg().clone(), 0.5, key=key))


class TestModule:
    def test_is_torchs(self):
        m = fd.Dropout(0.25, inplace=True)
        assert isinstance(m, nn.Dropout)
        assert type(m).__name__ == "Dropout"
        assert repr(m) == repr(nn.Dropout(0.25, inplace=True))
        assert repr(fd.Dropout()) == repr(nn.Dropout())
        assert not m.state_dict()
        with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
            fd.Dropout(1.5)

    def test_copies(self):
        for m in (copy.deepcopy(fd.Dropout(0.3).eval()), pickle.loads(pickle.dumps(fd.Dropout(0.3).eval()))):
            assert type(m) is fd.Dropout
            assert m.p == 0.3
            assert not m.training

    def test_train_and_eval(self):
        m, x = fd.Dropout(0.5), ones()
        assert (m(x) == 0).any()
        assert m.eval()(x) is x
        assert (m.train()(x) == 0).any()

    def test_p_is_read_at_each_call(self):
        m = fd.Dropout(0.5)
        m.p = 0.0
        assert torch.equal(m(ones()), ones())
        m.p = 1.0
        assert torch.equal(m(ones()), ones() * 0)

    def test_in_place(self):
        x = ones()
        assert fd.Dropout(0.5, inplace=True)(x) is x
        assert (x == 0).any()

    def test_script_and_trace(self):
        """As in torch, a scripted or traced module draws at each call. It calls torch's own dropout."""
        example = ones()
        for m in (torch.jit.script(fd.Dropout()), torch.jit.trace(fd.Dropout(), example, check_trace=False)):
            assert not torch.equal(m(example), m(example))
        assert torch.equal(torch.jit.script(fd.Dropout()).eval()(example), example)

    def test_trains_a_network(self):
        torch.manual_seed(0)
        x = torch.randn(256, 10)
        target = (x.sum(1) > 0).long()
        model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), fd.Dropout(0.3), nn.Linear(64, 2))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
        assert (model.eval()(x).argmax(1) == target).float().mean() > 0.95


class TestOtherPaths:
    def test_modes_and_subclasses_see_torchs_dropout(self):
        class Log(torch.overrides.TorchFunctionMode):
            def __init__(self):
                super().__init__()
                self.seen = []

            def __torch_function__(self, func, types, args=(), kwargs=None):
                self.seen.append(func)
                return func(*args, **(kwargs or {}))

        x = ones()
        with Log() as log:
            fd.dropout(x)
        assert log.seen[0] is F.dropout

        class Mine(torch.Tensor):
            pass

        assert type(fd.dropout(ones().as_subclass(Mine))) is Mine

    def test_a_default_device_changes_nothing(self):
        expected = seeded(1)
        with torch.device("cpu"):
            assert torch.equal(seeded(1), expected)

    def test_fx_sees_torchs_dropout(self):
        graph = torch.fx.symbolic_trace(lambda x: fd.dropout(x, 0.3)).graph
        assert [node.target for node in graph.nodes if node.op == "call_function"] == [F.dropout]

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
    def test_scripted_functions_call_torchs(self):
        def f(x: torch.Tensor) -> torch.Tensor:
            x = fd.dropout(fd.dropout1d(fd.dropout2d(fd.dropout3d(x), 0.1, True)), 0.1, True, True)
            x = fd.alpha_dropout(fd.feature_alpha_dropout(x, 0.1, True), 0.1, True)
            return fd.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

        graph = str(torch.jit.script(f).inlined_graph)
        for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
            assert f"aten::{name}(" in graph
        assert "aten::scaled_dot_product_attention(" in graph
        assert "prim::PythonOp" not in graph

    def test_make_fx_does_not_bake_the_mask_in(self):
        from torch.fx.experimental.proxy_tensor import make_fx

        traced = make_fx(lambda x: fd.dropout(x))(ones())
        assert not torch.equal(traced(ones()), traced(ones()))

    def test_meta_and_sparse(self):
        assert fd.dropout(torch.ones(5, device="meta")).shape == (5,)
        assert fd.dropout(torch.nested.nested_tensor([ones(3), ones(4)])).is_nested

    def test_threads_draw_apart(self):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            masks = list(pool.map(lambda _: tuple(fd.dropout(ones(64)).tolist()), range(200)))
        assert len(set(masks)) == 200
