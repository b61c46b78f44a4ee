"""patch, unpatch, patched: torch's own names call the fused path, and undoing leaves no trace."""

import copy
import inspect
import pickle
import random
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd

TORCHS = {(m, name): f for m in (F, torch) for name, f in vars(m).items() if "dropout" in name and callable(f)}
NAMES = [name for m, name in TORCHS if m is F]
SHORT = [name for m, name in TORCHS if m is torch and name.rstrip("_") in (*NAMES, "feature_dropout")]


def state():
    return {(m, name): getattr(m, name) for m, name in TORCHS}


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    assert state() == TORCHS
    yield
    fd.unpatch()
    assert all(now is TORCHS[place] for place, now in state().items())


class Calls(nn.Module):
    """Each way to call dropout: modules, functions, and torch's short forms."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(40, 40)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x):
        x = F.dropout(self.dropout(self.linear(x)), 0.1, self.training)
        return torch.dropout_(torch.dropout(x.tanh(), 0.2, self.training), 0.1, self.training)


MODELS = {
    "calls": Calls,
    "builtin": lambda: nn.Sequential(nn.Linear(40, 40), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.1)),
    "encoder": lambda: nn.TransformerEncoderLayer(40, 2, 64, dropout=0.3, batch_first=True),
    "attention": lambda: Attention(),
    "channels": lambda: Channels(),
}


class Channels(nn.Module):
    def forward(self, x):
        x = F.dropout2d(F.dropout1d(x, 0.1, self.training)[None], 0.2, self.training)
        x = F.alpha_dropout(F.dropout3d(x[None], 0.1, self.training), 0.1, self.training)
        return F.feature_alpha_dropout(x, 0.1, self.training)[0, 0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(40, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        x, weights = self.attention(x, x, x)
        assert weights is not None  # torch.jit.script needs this
        return x + weights.sum(-1, keepdim=True)


class Dropped(torch.utils.data.Dataset):
    """A data set that uses a function as augmentation."""

    def __init__(self, samples, function):
        self.samples, self.function = samples, function

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.function(self.samples[i], 0.5, True)


def step(model, x, seed=5):
    """Output, gradient and the number of bytes saved for backward."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        y = model(x)
    y.sum().backward()
    return y.detach(), x.grad, sum(saved)


def assert_same_step(got, want):
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert torch.equal(a == 0, b == 0)


@pytest.fixture
def x():
    return torch.randn(4, 6, 40, generator=torch.Generator().manual_seed(0))


class TestWhatIsReached:
    def test_the_family(self):
        with fd.patched():
            for name in NAMES:
                assert getattr(F, name).func is getattr(fd, name)
                torch.manual_seed(1)
                x = torch.ones(3, 4, *[5] * {"1d": 1, "2d": 2, "3d": 3}.get(name[-2:], 0))
                want = getattr(fd, name)(x, 0.5, True)
                torch.manual_seed(1)
                assert torch.equal(getattr(F, name)(x, 0.5, True), want)
                torch.manual_seed(1)
                kind = next(kind for n, kind in vars(nn).items() if n.lower() == name.replace("_", ""))
                assert torch.equal(kind(0.5)(x), want)
        assert len(NAMES) == 6
        assert len(SHORT) == 8

    def test_channels_by_the_short_form(self):
        for rank, call in ((3, fd.dropout1d), (4, fd.dropout2d), (5, fd.dropout3d)):
            x = torch.ones(*[4] * rank)
            torch.manual_seed(1)
            want = call(x, 0.5)
            with fd.patched():
                torch.manual_seed(1)
                assert torch.equal(torch.feature_dropout(x, 0.5, True), want)

    @pytest.mark.parametrize("model", MODELS)
    def test_models_draw_the_fused_masks(self, model, x):
        model = MODELS[model]()
        plain = step(model, x)
        with fd.patched():
            fused = step(model, x)
            assert torch.equal(step(model, x)[0], fused[0])
            assert not torch.equal(step(model, x, seed=6)[0], fused[0])
        assert fused[2] < plain[2]
        assert not torch.equal(fused[0], plain[0])
        assert torch.equal(step(model, x)[0], plain[0])

    def test_the_mask_is_that_of_fd(self, x):
        torch.manual_seed(1)
        want = fd.dropout(x, 0.3)
        with fd.patched():
            for call in (
                lambda x: nn.Dropout(0.3)(x),
                lambda x: F.dropout(x, 0.3),
                lambda x: F.dropout(input=x, p=0.3, training=True, inplace=False),
                lambda x: torch.dropout(x, 0.3, True),
                lambda x: torch.dropout(input=x, p=0.3, train=True),
                lambda x: torch.dropout_(x.clone(), 0.3, True),
            ):
                torch.manual_seed(1)
                assert torch.equal(call(x), want)

    def test_eval_is_torchs(self, x):
        for model in (make().eval() for make in MODELS.values()):
            plain = model(x)
            with fd.patched():
                assert torch.equal(model(x), plain)

    @pytest.mark.parametrize("name", SHORT)
    def test_short_forms_behave_as_torchs(self, name):
        def outcome(x, p, train):
            call = getattr(torch, name)
            try:
                y = call(x, p, train)
            except Exception as error:
                return type(error), str(error)
            return type(y), y.shape, y is x, y.dtype, x._version > 0

        def outcomes():
            yield from (outcome(torch.ones(4, 5), p, t) for p in (0, 0.5, 1, 1.5, -1.0, "a") for t in (True, False))
            yield from (outcome(torch.ones([2] * rank), 0.5, True) for rank in range(7))
            yield outcome(torch.ones(2, 0), 0.5, True)
            yield outcome([1.0], 0.5, True)
            yield outcome(nn.Parameter(torch.ones(3, 3)), 0.5, True)
            yield outcome(torch.ones(4, 5, dtype=torch.int64), 0.5, False)
            yield outcome(torch.ones(4, 5, device="meta"), 0.5, True)

        want = list(outcomes())
        with fd.patched():
            got = list(outcomes())
        for ours, torchs in zip(got, want, strict=True):
            # The messages of type errors differ.
            assert ours[0] is torchs[0] if torchs[0] is TypeError else ours == torchs

    def test_what_is_not_fused_goes_to_torch(self):
        with fd.patched():
            assert F.dropout(torch.nested.nested_tensor([torch.ones(3), torch.ones(4)])).is_nested
            assert torch.dropout(torch.ones(5, device="meta"), 0.5, True).is_meta

    def test_a_name_bound_before_is_not(self):
        dropout = F.dropout
        with fd.patched():
            assert F.dropout is not dropout

    def test_backward_after_the_block(self, x):
        x.requires_grad_()
        with fd.patched():
            y = nn.Dropout(0.5)(x)
        y.sum().backward()
        assert torch.equal(x.grad == 0, y == 0)

    def test_checkpoint(self, x):
        from torch.utils.checkpoint import checkpoint

        model = Calls()
        with fd.patched():
            want = step(model, x)
            for reentrant in (False, True):
                got = step(lambda x, r=reentrant: checkpoint(model, x, use_reentrant=r), x)
                assert_same_step(got, want)


class TestState:
    def test_patch_is_idempotent(self):
        fd.patch()
        fd.patch()
        assert F.dropout.func is fd.dropout
        fd.unpatch()
        assert state() == TORCHS
        fd.unpatch()
        assert state() == TORCHS

    def test_blocks_nest(self):
        with fd.patched():
            with fd.patched():
                assert F.dropout.func is fd.dropout
            assert F.dropout.func is fd.dropout
        assert state() == TORCHS

    def test_block_inside_patch(self):
        fd.patch()
        with fd.patched():
            pass
        assert F.dropout.func is fd.dropout

    def test_unpatch_inside_a_block_waits_for_its_end(self):
        with fd.patched():
            fd.patch()
            fd.unpatch()
            assert F.dropout.func is fd.dropout
        assert state() == TORCHS

    def test_exception(self):
        with pytest.raises(KeyError), fd.patched():
            raise KeyError
        assert state() == TORCHS

    def test_as_a_decorator(self):
        @fd.patched()
        def inside():
            return F.dropout.func

        assert inside() is inside() is fd.dropout
        assert state() == TORCHS

    def test_anothers_patch_stays(self, monkeypatch):
        def mine(*args):
            raise NotImplementedError

        monkeypatch.setattr(F, "dropout", F.dropout)  # restored at the end
        with fd.patched():
            F.dropout = mine
        assert F.dropout is mine
        with fd.patched():
            assert F.dropout.func is fd.dropout
        assert F.dropout is mine

    def test_threads(self):
        failures = []

        def work(seed):
            rng = random.Random(seed)
            for _ in range(300):
                with fd.patched():
                    if rng.random() < 0.5:
                        with fd.patched():
                            F.dropout(torch.ones(3))
                    if getattr(F.dropout, "func", None) is not fd.dropout:
                        failures.append(seed)
                F.dropout(torch.ones(3))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
        assert not failures
        assert state() == TORCHS


class TestTypesAndGraphs:
    def test_types_and_pickles(self):
        plain = pickle.dumps(nn.Dropout(0.3))
        with fd.patched():
            assert type(nn.Dropout()) is nn.Dropout
            assert pickle.dumps(nn.Dropout(0.3)) == plain
            assert type(copy.deepcopy(nn.Dropout())) is nn.Dropout

    def test_functions_are_pickled_as_torchs(self):
        places = [(F, name) for name in (*NAMES, "scaled_dot_product_attention")] + [(torch, name) for name in SHORT]
        with fd.patched():
            fused = {(module.__name__, name): getattr(module, name) for module, name in places}
            inside = pickle.dumps(fused)
            assert all(pickle.loads(inside)[place] is function for place, function in fused.items())
            assert copy.deepcopy(fused) == fused
        after = pickle.dumps(fused)
        plain = {(module.__name__, name): getattr(module, name) for module, name in places}
        for dumped in (inside, after):
            assert b"fused_dropout" not in dumped
            assert pickle.loads(dumped) == plain
        assert copy.deepcopy(fused) == fused  # copies are still fused functions

    def test_pickles_load_without_this_package(self, tmp_path):
        with fd.patched():
            (tmp_path / "functions").write_bytes(pickle.dumps([F.dropout, torch.alpha_dropout, nn.Dropout()]))
        check = """if True:
            import pickle, sys, torch
            sys.modules["fused_dropout"] = None
            functions = pickle.load(open("functions", "rb"))
            assert functions[:2] == [torch.nn.functional.dropout, torch.alpha_dropout]
        """
        subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True)

    def test_spawned_workers_of_a_loader(self):
        with fd.patched():
            data = Dropped([torch.ones(4)] * 2, F.dropout)
            loader = torch.utils.data.DataLoader(data, num_workers=1, multiprocessing_context="spawn")
            assert [batch.shape for batch in loader] == [(1, 4)] * 2

    @pytest.mark.parametrize("name", [*NAMES, "scaled_dot_product_attention"])
    def test_they_look_like_torchs(self, name):
        plain = getattr(F, name)
        with fd.patched():
            function = getattr(F, name)
        assert (function.__name__, function.__module__) == (name, "torch.nn.functional")
        assert function.__doc__ == getattr(fd, name).__doc__
        if name in NAMES:
            parameters = list(inspect.signature(plain).parameters)
            assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters

    def test_fx_sees_torchs(self, x):
        plain = torch.fx.symbolic_trace(Calls()).graph
        with fd.patched():
            traced = torch.fx.symbolic_trace(Calls())
            assert [(n.op, n.target) for n in traced.graph.nodes] == [(n.op, n.target) for n in plain.nodes]
            assert F.dropout not in [n.target for n in traced.graph.nodes]
            copied = pickle.loads(pickle.dumps(traced))
        assert copied(x).shape == x.shape

    def test_script_function(self, x):
        def every(x: torch.Tensor) -> torch.Tensor:
            x = F.dropout(F.dropout1d(F.dropout2d(F.dropout3d(x))), 0.1, True, True)
            x = F.alpha_dropout(F.feature_alpha_dropout(x), training=False)
            x = torch.feature_dropout(torch.dropout(x, 0.1, True), 0.1, True)
            return torch.dropout_(torch.alpha_dropout(torch.feature_alpha_dropout(x, 0.1, True), 0.1, True), 0.1, True)

        with fd.patched():
            graph = str(torch.jit.script(every).inlined_graph)
        operators = [line.partition("= aten::")[2].partition("(")[0] for line in graph.splitlines()]
        count = {name: operators.count(name) for name in SHORT if name in operators}
        assert count.pop("feature_dropout") == 4
        assert count.pop("dropout") == 2
        assert count.pop("dropout_") == 2
        assert all(count.values())
        assert "prim::PythonOp" not in graph

    @pytest.mark.parametrize("model", MODELS)
    def test_script(self, model, x):
        model = MODELS[model]()
        plain = torch.jit.script(model)
        with fd.patched():
            scripted = torch.jit.script(copy.deepcopy(model))
            assert str(scripted.inlined_graph) == str(plain.inlined_graph)
            torch.manual_seed(3)
            got = scripted(x)
        torch.manual_seed(3)
        assert torch.equal(plain(x), got)

    def test_trace(self, x):
        with fd.patched():
            traced = torch.jit.trace(Calls(), x, check_trace=False)
            assert str(traced.inlined_graph).count("aten::dropout") == 4
            assert not torch.equal(traced(x), traced(x))

    @pytest.mark.parametrize("train", [True, False])
    def test_export(self, train, x):
        def operators(model):
            program = torch.export.export(model.train(train), (x,))
            return [node.target for node in program.graph.nodes if node.op == "call_function"]

        want = operators(Calls())
        with fd.patched():
            assert operators(Calls()) == want

    def test_make_fx_does_not_bake_the_mask_in(self, x):
        from torch.fx.experimental.proxy_tensor import make_fx

        with fd.patched():
            traced = make_fx(Calls())(x)
            assert not torch.equal(traced(x), traced(x))

    def test_modes_see_torchs(self, x):
        seen = []

        class Log(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        with fd.patched(), Log():
            F.dropout(x)
            torch.dropout(x, 0.5, True)
        assert seen[0] is TORCHS[F, "dropout"]
        assert TORCHS[torch, "dropout"] in seen


class TestCompile:
    """Patched and unpatched in turn, in either order: each time the result of eager, and no graph break."""

    @pytest.mark.parametrize("model", ["calls", "builtin", "encoder"])
    @pytest.mark.parametrize("first", ["patched", "torch"])
    def test_in_turn(self, model, first, x):
        torch._dynamo.reset()
        model = MODELS[model]()
        want = {"torch": step(model, x)}
        with fd.patched():
            want["patched"] = step(model, x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        order = ["patched", "torch"] if first == "patched" else ["torch", "patched"]
        saved = {}
        for which in order * 2:
            if which == "patched":
                with fd.patched():
                    got = step(compiled, x)
            else:
                got = step(compiled, x)
            assert_same_step(got, want[which])
            assert saved.setdefault(which, got[2]) == got[2]
        assert saved["patched"] < saved["torch"]

    def test_compiled_again_only_once(self, x):
        from torch._dynamo.testing import CompileCounter

        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(Calls(), backend=counter)
        for _ in range(3):
            compiled(x)
            with fd.patched():
                compiled(x)
        assert counter.frame_count == 2

    def test_a_block_inside(self):
        def f(x):
            with fd.patched():
                x = F.dropout(x, 0.3)
            return F.dropout(x, 0.3)

        torch._dynamo.reset()
        compiled = torch.compile(f, backend="aot_eager")
        for _ in range(2):
            torch.manual_seed(0)
            want = f(torch.ones(1000))
            torch.manual_seed(0)
            assert torch.equal(compiled(torch.ones(1000)), want)
            assert state() == TORCHS

    def test_a_process_that_starts_patched(self):
        """torch lists the functions that a graph may contain at the first compilation: here, while patched."""
        program = """
import torch, torch.nn.functional as F, fused_dropout as fd
fd.patch()
def f(x):
    return torch.dropout(F.dropout(x, 0.4), 0.1, True)
x = torch.ones(1000)
compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
for _ in range(2):
    torch.manual_seed(0); want = f(x)
    torch.manual_seed(0); assert torch.equal(compiled(x), want)
    fd.unpatch()
"""
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_transformer_trains():
    def losses():
        torch.manual_seed(0)
        model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.2, batch_first=True)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        source, target = torch.randn(8, 5, 16), torch.randn(8, 4, 16)
        result = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = F.mse_loss(model(source, target), target)
            loss.backward()
            optimizer.step()
            result.append(loss.item())
        return sum(result[-5:]) / sum(result[:5]), model.eval()(source, target)

    plain, _ = losses()
    with fd.patched():
        fused, output = losses()
    assert fused < 0.8
    assert abs(fused - plain) < 0.15
    assert output.isfinite().all()
