"""Dropout inside other features: checkpointing, hooks, exporters, tracers, loader workers, gradient scaling."""

import contextlib
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, Dataset

import fused_dropout as fd

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
KEY = torch.tensor([3, 4], dtype=torch.uint64)
for_reentrant = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def network(*dropout):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), *dropout, nn.Tanh(), nn.Linear(16, 1))


def made(name):
    """A network and its context. Its dropout is a module, converted, patched, with a key, or with a mask for rows."""
    rows = {"noise_shape": (None, 1)}
    options = {"key": {"key": KEY}, "rows": rows, "rows, key": {**rows, "key": KEY}}
    if name in ("converted", "patched"):
        model = network(nn.Dropout(0.5))
        return (fd.convert(model), contextlib.nullcontext) if name == "converted" else (model, fd.patched)
    if name == "alpha, key":
        return network(fd.AlphaDropout(0.5, key=KEY)), contextlib.nullcontext
    return network(fd.Dropout(0.5, **options.get(name, {}))), contextlib.nullcontext


KINDS = ["module", "converted", "patched", "key", "rows", "rows, key", "alpha, key"]


def gradients(model, run, x, seed=1):
    torch.manual_seed(seed)
    model.zero_grad()
    y = run(x)
    y.sum().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters()]


class TestCheckpointing:
    @for_reentrant
    def test_a_key_needs_no_rng_state(self, use_reentrant):
        """Recomputation has forward's mask, from the key, whatever the state of the generator."""
        x = torch.rand(1000, requires_grad=True)
        options = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
        y = checkpoint(lambda x: fd.dropout(x, 0.5, key=KEY).exp(), x, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y.sum().backward()
        assert torch.equal(x.grad, torch.where(y == 1, 0, y.detach() * 2))

    @for_reentrant
    @pytest.mark.parametrize("dropout", [fd.dropout, fd.dropout2d, F.dropout], ids=["fd", "channels", "torch"])
    def test_without_the_rng_state_the_mask_is_another(self, dropout, use_reentrant):
        """As in torch, which does not warn. We warn if the checkpoint keeps forward's graph, that is without reentry.

        The gradient of dropout itself then has forward's mask, but the recomputed activations have another mask.
        """
        x = torch.rand(1, 1000, 1, 1, requires_grad=True)
        options = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
        y = checkpoint(lambda x: dropout(x, 0.5).exp(), x, **options)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            y.sum().backward()
        ours_kept = dropout is not F.dropout and not use_reentrant
        assert (0 if ours_kept else 400) <= ((y == 1) != (x.grad == 0)).sum() < (1 if ours_kept else 600)
        recomputed = x.grad / torch.where(y == 1, 1, y).detach()
        assert not ours_kept or 200 < ((recomputed - 2).abs() > 1e-4).sum() - (y == 1).sum() < 700
        ours = [w for w in seen if "recomputation drew another mask" in str(w.message)]
        assert len(ours) == ours_kept

    @pytest.mark.parametrize("policy", ["save matmul", "save key", "save dropout", "recompute all"])
    @pytest.mark.parametrize("kind", ["module", "rows", "key", "alpha, key"])
    def test_selective(self, policy, kind):
        saved = {
            "save matmul": [torch.ops.aten.addmm.default, torch.ops.aten.mm.default],
            "save key": [torch.ops.fused_dropout.draw_keys.default],
            "save dropout": [torch.ops.fused_dropout.apply.default, torch.ops.fused_dropout.keep_mask.default],
            "recompute all": [],
        }[policy]

        def decide(context, operator, *args, **kwargs):
            return CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.MUST_RECOMPUTE

        model, x = nn.Sequential(made(kind)[0], fd.Dropout(0.2)), torch.randn(8, 16)

        def run(x):
            def contexts():
                return create_selective_checkpoint_contexts(decide)

            y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
            torch.rand(3)
            return y

        torch.testing.assert_close(gradients(model, run, x), gradients(model, model, x))

    @pytest.mark.parametrize("options", [{}, {"noise_shape": (None, 1)}], ids=["plain", "rows"])
    @pytest.mark.parametrize("hooks", ["save_on_cpu", "bytes"])
    def test_saved_tensors_hooks(self, hooks, options):
        def pack(x):
            buffer = io.BytesIO()
            torch.save(x, buffer)
            return buffer.getvalue()

        context = {
            "save_on_cpu": torch.autograd.graph.save_on_cpu,
            "bytes": lambda: torch.autograd.graph.saved_tensors_hooks(pack, lambda b: torch.load(io.BytesIO(b))),
        }[hooks]
        model, x = network(fd.Dropout(0.5, **options)), torch.randn(8, 16)

        def run(x):
            with context():
                return model(x)

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the recomputed key is another tensor with the same words
            torch.testing.assert_close(gradients(model, run, x), gradients(model, model, x))


@pytest.mark.same_without("_eager")
class TestExport:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()  # otherwise strict export counts recompilations across tests (torch 2.8)

    @pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_in_training(self, kind, strict):
        """Export records torch's own dropout; with a key it records the mask. The gradients are those of the model."""
        model, context = made(kind)
        x = torch.randn(5, 16)
        with context():
            program = torch.export.export(model, (x,), strict=strict)
        module = program.module()
        for p, exported in ((program, module), ((decomposed := program.run_decompositions()), decomposed.module())):
            operators = [str(node.target) for node in p.graph.nodes if node.op == "call_function"]
            assert any("dropout" in name for name in operators)
            if "key" in kind:
                assert "fused_dropout.keep_mask.default" in operators
                torch.testing.assert_close(exported(x), model(x))
            else:
                assert not any("fused_dropout" in name for name in operators)
                assert len({exported(x).sum().item() for _ in range(30)}) > 1
        y, got = gradients(module, module, x)
        assert all(gradient.abs().sum() > 0 for gradient in got)
        if "key" in kind:
            torch.testing.assert_close((y, got), gradients(model, model, x))

    @pytest.mark.same_without("_C")
    @pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_in_eval(self, kind, strict):
        model, context = made(kind)
        x = torch.randn(5, 16)
        model.eval()
        with context():
            program = torch.export.export(model, (x,), strict=strict)
        decomposed = program.run_decompositions()
        assert not any("dropout" in str(node.target) for node in decomposed.graph.nodes)
        assert torch.equal(program.module()(x), model(x))
        assert torch.equal(decomposed.module()(x), model(x))

    @pytest.mark.skipif(VERSION < (2, 13), reason="torch.export.save knows no uint64")
    def test_with_a_key_is_saved(self):
        model, _ = made("key")
        x, buffer = torch.randn(5, 16), io.BytesIO()
        torch.export.save(torch.export.export(model, (x,)), buffer)
        buffer.seek(0)
        assert torch.equal(torch.export.load(buffer).module()(x), model(x))

    def test_a_generator_is_refused(self):
        model = network(fd.Dropout(0.5, generator=torch.Generator()))
        with pytest.raises(TypeError, match="generator is not recorded"):
            torch.export.export(model, (torch.randn(5, 16),), strict=False)
        with pytest.raises(TypeError, match="generator is not recorded"):
            torch.jit.trace(model, torch.randn(5, 16))

    @pytest.mark.parametrize("layout", ["transposed", "columns", "in place"])
    def test_the_keys_mask_in_any_layout(self, layout):
        x = torch.randn(12, 20)
        x = {"transposed": x.t(), "columns": x[:, 3:14], "in place": x}[layout]

        class Drop(nn.Module):
            def forward(self, x):
                return fd.dropout(x * 1 if layout == "in place" else x, 0.3, inplace=layout == "in place", key=KEY)

        want = Drop()(x)
        for recorded in (torch.export.export(Drop(), (x,)).module(), torch.jit.trace(Drop(), x)):
            assert torch.equal(recorded(x), want)

    @pytest.mark.parametrize("dynamo", [False, True], ids=["", "dynamo"])
    @pytest.mark.parametrize("patched", [False, True], ids=["modules", "patched"])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_onnx(self, patched, dynamo):
        onnx = pytest.importorskip("onnx")
        if dynamo:
            pytest.importorskip("onnxscript")
        kinds = [nn.Dropout, nn.AlphaDropout] if patched else [fd.Dropout, fd.AlphaDropout, fd.DropPath]
        model = network(*(kind(0.5) for kind in kinds), *([] if patched else [fd.Dropout(0.5, key=KEY)])).eval()
        x, buffer = torch.randn(5, 16), io.BytesIO()
        with fd.patched() if patched else contextlib.nullcontext():
            if dynamo:
                proto = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto
            else:
                torch.onnx.export(model, (x,), buffer, dynamo=False)
                proto = onnx.load_from_string(buffer.getvalue())
        assert {node.op_type for node in proto.graph.node} <= {"Gemm", "Tanh", "Identity"}


class TestTracers:
    @pytest.mark.parametrize("kind", ["key", "rows, key", "alpha, key"])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_jit_trace_with_a_key(self, kind):
        model, _ = made(kind)
        x, buffer = torch.randn(5, 16), io.BytesIO()
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(gradients(traced, traced, x), gradients(model, model, x))
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        assert torch.equal(torch.jit.load(buffer)(x), model(x))

    @pytest.mark.parametrize("name", ["Dropout", "Dropout1d", "AlphaDropout", "FeatureAlphaDropout", "DropPath"])
    def test_fx_keeps_the_module(self, name):
        """As with torch's modules, a graph that was traced in training mode follows eval()."""
        from torch.fx.experimental.optimization import remove_dropout

        model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(getattr(fd, name)(0.5)))
        x = torch.randn(40, 16)
        traced = torch.fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1.0"]
        assert not torch.equal(traced(x), traced(x))
        assert torch.equal(traced.eval()(x), model.eval()(x))
        if name == "Dropout":
            without = remove_dropout(model.train())
            assert torch.equal(without(x), model[0](x))

    @pytest.mark.parametrize("how", ["converted", "patched"])
    def test_features_of_torchvision(self, how):
        extraction = pytest.importorskip("torchvision.models.feature_extraction")
        model, context = made(how)
        with context():
            features = extraction.create_feature_extractor(model, ["1"])
            x = torch.randn(40, 16)
            assert (features(x)["1"] == 0).any()
            assert torch.equal(features.eval()(x)["1"], model[0](x))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_functionalize(self, kind, train):
        model, context = made(kind)
        model.train(train)
        x = torch.randn(5, 16)
        with context():
            got = gradients(model, torch.func.functionalize(model), x)
            torch.testing.assert_close(got, gradients(model, model, x))

    def test_functionalize_in_place_and_grad(self):
        x = torch.randn(40)
        want = fd.dropout(x, 0.3, key=KEY)
        assert torch.equal(torch.func.functionalize(lambda x: fd.dropout(x * 1, 0.3, inplace=True, key=KEY))(x), want)
        slope = torch.func.grad(torch.func.functionalize(lambda x: fd.dropout(x, 0.3, key=KEY).sum()))(x)
        assert torch.equal(slope, fd.dropout(torch.ones(40), 0.3, key=KEY))

    @pytest.mark.skipif(VERSION < (2, 13), reason="no graph holds a generator")
    @pytest.mark.parametrize("functional", [False, True], ids=["", "functionalized"])
    def test_make_fx_draws_from_the_generator(self, functional):
        from torch.fx.experimental.proxy_tensor import make_fx

        generator, other = torch.Generator(), torch.Generator()

        def drop(x):
            return fd.dropout(x, generator=generator)

        traced = make_fx(torch.func.functionalize(drop) if functional else drop)(torch.ones(99))
        generator.manual_seed(5)
        other.manual_seed(5)
        for _ in range(3):
            assert torch.equal(traced(torch.ones(99)), fd.dropout(torch.ones(99), generator=other))

    @pytest.mark.parametrize("options", [{}, {"noise_shape": (5, 1)}], ids=["", "noise_shape"])
    def test_gradients_through_what_make_fx_traced(self, options):
        from torch.fx.experimental.proxy_tensor import make_fx

        def drop(x):
            return fd.dropout(x * 2, 0.3, key=KEY, **options)

        x = torch.ones(5, 8, requires_grad=True)
        traced = make_fx(drop)(x.detach())
        (got,), (want,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (traced, drop))
        assert torch.equal(got, want)
        assert 0 < got.count_nonzero() < 40

    def test_fake_tensors_with_a_key(self):
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            key = torch.zeros(2, dtype=torch.uint64)
            for options in ({}, {"noise_shape": (3, 1)}):
                assert fd.dropout(torch.ones(3, 5), key=key, **options).shape == (3, 5)


class Masks(Dataset):
    def __init__(self, dropout):
        self.dropout = dropout
        self.model = network(fd.Dropout(0.5, key=KEY))

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.dropout(torch.ones(64)), self.model(torch.ones(16)).detach()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers(start):
    """Each worker draws from the seed that the loader gives it, and new workers draw the same from the same seed. The
    data set, which workers receive, holds the model."""
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    data = Masks(fd.Dropout(0.5))
    loader = DataLoader(data, num_workers=2, multiprocessing_context=start, persistent_workers=start == "spawn")

    def epoch(seed):
        torch.manual_seed(seed)
        masks, outputs = zip(*((mask.tolist(), output) for mask, output in loader), strict=True)
        assert all(torch.equal(output[0], data.model(torch.ones(16))) for output in outputs)
        assert len({str(mask) for mask in masks}) == len(data)
        return masks

    first = epoch(1)
    if start == "fork":  # persistent workers continue their stream
        assert epoch(1) == first
        assert epoch(2) != first


@pytest.mark.parametrize("how", ["converted", "patched"])
def test_gradient_scaling(how):
    """Infinite gradients pass through the mask, so the step is skipped and the scale decreases."""
    model, context = made(how)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 16)

    def step(factor):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        with context(), torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().sum() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return [bool((a != b).any()) for a, b in zip(before, model.parameters(), strict=True)]

    assert all(step(1.0))
    assert scaler.get_scale() == 2.0**10
    assert not any(step(1e38))
    assert scaler.get_scale() == 2.0**9
    assert all(step(1.0))
    assert all(p.isfinite().all() for p in model.parameters())
