"""A Llama with PEFT's LoRA. The dropout modules belong to the adapters, which can be added and removed."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from swapping import (
    Case,
    Promises,
    one_thread,  # noqa: F401
)
from torch import nn
from workers import WORLD, Workers

import fused_dropout as fd

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses names that transformers has renamed

IDS = torch.randint(50, (6, 8), generator=torch.Generator().manual_seed(0))
LAYERS = [f"base_model.model.model.layers.{i}.self_attn" for i in range(2)]


def lora(p, *targets):
    return peft.LoraConfig(r=4, lora_dropout=p, target_modules=list(targets), init_lora_weights=False)


def llama():
    config = hf.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attention_dropout=0.2,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return peft.get_peft_model(hf.LlamaForCausalLM(config), lora(0.5, "q_proj", "v_proj"))


CASE = Case(
    llama,
    {"input_ids": IDS, "labels": IDS},
    [(layer, "call") for layer in LAYERS]
    + [(f"{layer}.{name}.lora_dropout.default", "module") for layer in LAYERS for name in ("q_proj", "v_proj")],
    lr=3e-2,
)


@pytest.mark.parametrize("case", [CASE], ids=["lora"])
class TestPromises(Promises):
    pass


def test_adapters_added_since_are_converted_the_second_time():
    model = fd.convert(CASE.model())
    model.add_adapter("none", lora(0.0, "q_proj"))
    model.add_adapter("third", lora(0.25, "q_proj"))
    added = [f"{layer}.q_proj.lora_dropout.third" for layer in LAYERS]
    assert list(fd.convert_report(model).torch) == added
    report = fd.convert_report(fd.convert(model))
    assert len(report.fused) == 4 + 2
    assert not report.torch
    # With p = 0 PEFT uses an Identity instead of a dropout.
    assert report.left == {f"{layer}.q_proj.lora_dropout.none": "Identity: drops nothing" for layer in LAYERS}
    model.set_adapter("third")
    sites = {site.module: site for site in fd.audit(model, **CASE.inputs).sites if site.train}
    assert {name: sites[name].p for name in added} == dict.fromkeys(added, 0.25)
    assert all(sites[name].path.startswith("fused") for name in added)
    fd.revert(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Dropout)} == {nn.Dropout}


def test_converted_before_the_adapters():
    """get_peft_model adds torch's dropout modules. Merging the adapters removes them."""
    model = CASE.model()
    base = fd.convert(model.unload())
    model = peft.get_peft_model(base, lora(0.5, "q_proj"))
    assert len(fd.convert_report(model).torch) == 2
    assert len(fd.convert_report(fd.convert(model)).fused) == 2
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, nn.Dropout)]


def test_saved_and_loaded(tmp_path):
    """A saved adapter holds no trace of the conversion."""
    model = fd.convert(CASE.model())
    model.save_pretrained(tmp_path)
    twin = peft.PeftModel.from_pretrained(CASE.model().unload(), tmp_path)
    report = fd.convert_report(twin)
    assert len(report.torch) == 4
    assert not report.fused
    with torch.no_grad():
        assert torch.equal(twin.eval()(IDS).logits, model.eval()(IDS).logits)


# ------------------------------------------------------------------------------------------ dropouts paired with lora_A


def paired(model):
    return fd.convert(model, lora=True)


def steps(model, inputs=CASE.inputs, count=2):
    """Losses and gradients of several steps."""
    torch.manual_seed(5)
    found = []
    for _ in range(count):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


def assert_same(got, want):
    assert len(got) == len(want) > 2
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def variant(**options):
    config = lora(0.5, "q_proj", "v_proj")
    for name, value in options.items():
        setattr(config, name, value)
    return peft.get_peft_model(CASE.model().unload(), config).train()


def test_paired_steps_are_those_of_fused_dropout():
    model = paired(CASE.model())
    report = fd.convert_report(model)
    assert len(report.paired) == 4
    assert not report.unpaired
    assert_same(steps(model), steps(fd.convert(CASE.model())))
    assert_same(steps(fd.revert(model)), steps(CASE.model()))
    assert {type(m) for m in model.modules() if isinstance(m, nn.Dropout)} == {nn.Dropout}


def saved_bytes(model):
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**CASE.inputs).loss
    assert loss.requires_grad
    return sum(storages.values())


def test_paired_takes_the_memory_of_no_dropout():
    """A paired model saves 16 bytes per site more than a model without dropout."""
    assert saved_bytes(paired(CASE.model())) == saved_bytes(fd.convert(variant(lora_dropout=0.0))) + 4 * 16
    assert saved_bytes(fd.convert(CASE.model())) > saved_bytes(paired(CASE.model()))


def test_paired_over_a_bfloat16_base():
    """PEFT keeps the adapters in float32. The layer's input is saved in bfloat16, and its float32 cast is not saved."""

    def model():
        made = CASE.model()
        for name, parameter in made.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        return made

    assert_same(steps(paired(model())), steps(fd.convert(model())))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(steps(paired(model())), steps(fd.convert(model())))
    assert saved_bytes(paired(model())) < saved_bytes(fd.convert(model()))
    layer = paired(model()).base_model.model.model.layers[0].self_attn.q_proj
    assert layer.cast_input_dtype_enabled


def test_paired_adapters_over_a_bfloat16_base():
    """Two active adapters share PEFT's cast, whose gradient is rounded once."""
    found = []
    for convert in (paired, fd.convert):
        layer = nn.Sequential(nn.Linear(16, 16))
        layer = peft.get_peft_model(layer.bfloat16(), lora(0.3, "0"))
        layer.add_adapter("second", lora(0.3, "0"))
        torch.manual_seed(0)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        layer = convert(layer.train())
        x = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
        for active in ("default", ["default", "second"]):
            layer.base_model.set_adapter(active)
            y = layer(x)
            y.square().sum().backward()
            found.append([y, x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_paired_under_autocast_to_another_dtype(base, dtype):
    """PEFT casts to float32 before dropout, and autocast casts after it."""
    found = []
    for convert in (paired, fd.convert):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(16, 16, dtype=base))
        layer = convert(peft.get_peft_model(layer, lora(0.3, "0"), autocast_adapter_dtype=False).train())
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        x = torch.randn(8, 16).to(base).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = layer(x)
        y.float().square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_formula_of_the_documentation(dtype):
    """docs/lora.md: paired dropouts keep 2h + i elements per token and layer, unpaired dropouts 6h + i.

    Over a bfloat16 base the paired ones keep bfloat16, and the unpaired ones keep the float32 casts.
    """
    hidden, intermediate, layers, tokens = 32, 48, 2, 6 * 8
    shared, each = 2 * hidden + intermediate, 6 * hidden + intermediate

    def model(p):
        config = hf.LlamaConfig(
            vocab_size=50,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=intermediate,
        )
        torch.manual_seed(0)
        names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        return peft.get_peft_model(hf.LlamaForCausalLM(config).to(dtype), lora(p, *names)).train()

    alone, both = saved_bytes(fd.convert(model(0.5))), saved_bytes(paired(model(0.5)))
    # The first layer's input needs no gradient, so its q, k and v dropouts save no key.
    assert alone - both == (4 * each - dtype.itemsize * shared) * tokens * layers - 3 * 16
    none = saved_bytes(model(0.0))
    assert both - 16 * 7 * layers == none if dtype == torch.float32 else both < none


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_variants(options):
    model = paired(variant(**options))
    report = fd.convert_report(model)
    if "use_dora" in options:
        assert len(report.unpaired) == 4
        assert all("Dora" in why for why in report.unpaired.values())
    else:
        assert len(report.paired) == 4
    assert_same(steps(model), steps(fd.convert(variant(**options))))


def test_a_variant_that_is_added_later():
    """It is noticed at the call."""

    class Variant:
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            assert (module.lora_dropout[active_adapter](torch.ones(100)) == 0).any()
            return result + module.lora_A[active_adapter](module.lora_dropout[active_adapter](x)).sum()

    losses = []
    for model in (paired(CASE.model()), fd.convert(CASE.model())):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_variant["default"] = Variant
        losses.append(steps(model))
    assert_same(*losses)


def test_a_kernel_that_reads_the_dropout_itself():
    """A forward that calls the dropout and then multiplies by lora_A's weight."""

    def forward(self, x, *args, **kwargs):
        dropped = self.lora_dropout["default"](x)
        assert (dropped == 0).any()
        return self.base_layer(x) + dropped @ self.lora_A["default"].weight.t() @ self.lora_B["default"].weight.t()

    model = paired(CASE.model())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = forward.__get__(layer)
    steps(model)
    model = paired(CASE.model())
    kind = type(model.base_model.model.model.layers[0].self_attn.q_proj)
    original = kind.forward
    kind.forward = forward
    try:
        steps(model)
    finally:
        kind.forward = original


def test_paired_adapters_come_and_go(tmp_path):
    def life(convert):
        model = convert(CASE.model())
        model.add_adapter("second", lora(0.25, "q_proj"))
        found = steps(convert(model))
        model.base_model.set_adapter(["default", "second"])
        found += steps(model)
        with model.disable_adapter():
            found.append(model.eval()(**CASE.inputs).loss)
        found.append(model(**CASE.inputs, adapter_names=["default"] * 3 + ["second"] * 3).loss)
        model.train().merge_adapter()
        found.append(model(**CASE.inputs).loss)
        model.unmerge_adapter()
        model.delete_adapter("second")
        return model, [t.detach() for t in found + steps(model)]

    (model, got), (twin, want) = life(paired), life(fd.convert)
    assert_same(got, want)
    assert list(model.state_dict()) == list(twin.state_dict())
    model.save_pretrained(tmp_path)
    loaded = paired(peft.PeftModel.from_pretrained(CASE.model().unload(), tmp_path, is_trainable=True).train())
    for ours, theirs in zip(steps(loaded), steps(model), strict=True):
        torch.testing.assert_close(ours, theirs)  # merging and unmerging has rounded the weights
    assert len([m for m in model.merge_and_unload().modules() if isinstance(m, nn.Dropout)]) == 0


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_paired(copied):
    model = paired(CASE.model())
    twin = copied(model)
    assert len(fd.convert_report(twin).paired) == 4
    assert_same(steps(twin), steps(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_paired_in_a_checkpoint(reentrant):
    found = []
    for convert in (paired, fd.convert):
        model = convert(CASE.model())
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append(steps(model))
    assert_same(*found)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_paired_and_compiled(backend):
    model, twin = paired(CASE.model()), fd.convert(CASE.model())
    for layers in (model.base_model.model.model.layers, twin.base_model.model.model.layers):
        del layers[1]  # for time
        layers[0].self_attn.attention_dropout = 0.0  # torch's dropout, whose masks differ under Inductor
    torch.compiler.reset()
    for ours, theirs in zip(steps(torch.compile(model, backend=backend)), steps(twin), strict=True):
        torch.testing.assert_close(ours, theirs)


# --------------------------------------------------------------------------------------------- 8- and 4-bit base layers


def quantized(bits):
    """Two layers with two adapters, over a quantized base of bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    for i in (0, 2):
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False) if bits == 8 else bnb.nn.Linear4bit(64, 64)
        layer.load_state_dict(model[i].state_dict())
        model[i] = layer
    try:
        model.to("cpu")(torch.ones(1, 64))  # quantizes
    except Exception as error:
        pytest.skip(f"bitsandbytes has no {bits}-bit layer on CPU here: {error}")
    setattr(model, f"is_loaded_in_{bits}bit", True)
    model = peft.get_peft_model(model, lora(0.5, "0", "2")).train()
    model.add_adapter("second", lora(0.25, "0", "2"))
    model.base_model.set_adapter(["default", "second"])
    assert model.base_model.model[0].__class__.__module__ == "peft.tuners.lora.bnb"
    assert model.base_model.model[2].base_layer.weight.dtype in (torch.int8, torch.uint8)
    return model


def steps_of_layers(model, dtype):
    torch.manual_seed(5)
    found = []
    for _ in range(2):
        x = torch.randn(8, 64, dtype=dtype, requires_grad=True)
        y = model(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert len(found) == 2 * (2 + 2 * 2 * 2)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_paired_over_quantized_layers(bits, autocast, dtype):
    model, plain = paired(quantized(bits)), fd.convert(quantized(bits))
    report = fd.convert_report(model)
    assert len(report.paired) == 4
    assert not report.unpaired
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = steps_of_layers(plain, dtype)
        assert_same(steps_of_layers(model, dtype), want)
        fd.revert(model)
        assert {type(m) for m in model.modules() if isinstance(m, nn.Dropout)} == {nn.Dropout}
        model.zero_grad()
        assert_same(steps_of_layers(fd.convert(model), dtype), want)


@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_is_lost_over_quantized_layers(bits, monkeypatch):
    """Simulates a later PEFT whose forward does not pass the dropout's output to lora_A."""
    model = paired(quantized(bits))

    def forward(self, x):
        return self.base_layer(x) + self.lora_dropout["default"](x) @ self.lora_A["default"].weight.t().sum(1, True)

    forward.__module__ = "peft.tuners.lora.bnb"
    monkeypatch.setattr(type(model.base_model.model[0]), "forward", forward)
    with pytest.raises(RuntimeError, match="nothing was dropped"):
        model(torch.ones(8, 64))
    monkeypatch.undo()
    assert_same(steps_of_layers(model, torch.float32), steps_of_layers(fd.convert(quantized(bits)), torch.float32))


# ------------------------------------------------------------------------------------------------- FSDP2, two processes


@pytest.fixture(scope="module")
def workers():
    workers = Workers(__name__)
    yield workers
    workers.stop()


def sharded_step(rank, lora, checkpointed, dtype):
    """Loss, gradients and weights after a step of a model that is sharded by decoder layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model = fd.convert(CASE.model().train(), lora=lora)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"mesh": init_device_mesh("cpu", (WORLD,)), "mp_policy": MixedPrecisionPolicy(param_dtype=dtype)}
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    torch.manual_seed(rank)
    loss = model(input_ids=IDS[rank::WORLD], labels=IDS[rank::WORLD]).loss
    loss.backward()
    optimizer.step()
    found = [loss.detach(), *(t.full_tensor() for p in trained for t in (p.grad, p.detach()))]
    return found, len(fd.convert_report(model).paired)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_paired_and_sharded(workers, checkpointed, dtype):
    both = workers(sharded_step, True, checkpointed, dtype)
    alone = workers(sharded_step, False, checkpointed, dtype)
    for (got, paired_there), (want, _) in zip(both, alone, strict=True):
        assert paired_there == 4
        assert_same(got, want)
