"""A Llama with PEFT's LoRA: its dropout is in modules of the adapters, which come and go."""

import pytest
import torch
from swapping import (
    Case,
    Promises,
    one_thread,  # noqa: F401
)
from torch import nn

import fused_dropout as fd

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers renames

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
    # With p = 0 PEFT puts an Identity there.
    assert report.left == {f"{layer}.q_proj.lora_dropout.none": "Identity: drops nothing" for layer in LAYERS}
    model.set_adapter("third")
    sites = {site.module: site for site in fd.audit(model, **CASE.inputs).sites if site.train}
    assert {name: sites[name].p for name in added} == dict.fromkeys(added, 0.25)
    assert all(sites[name].path.startswith("fused") for name in added)
    fd.revert(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Dropout)} == {nn.Dropout}


def test_converted_before_the_adapters():
    """What get_peft_model adds is torch's; merged away again, nothing of it is left."""
    model = CASE.model()
    base = fd.convert(model.unload())
    model = peft.get_peft_model(base, lora(0.5, "q_proj"))
    assert len(fd.convert_report(model).torch) == 2
    assert len(fd.convert_report(fd.convert(model)).fused) == 2
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, nn.Dropout)]


def test_saved_and_loaded(tmp_path):
    """An adapter's folder holds nothing of the conversion."""
    model = fd.convert(CASE.model())
    model.save_pretrained(tmp_path)
    twin = peft.PeftModel.from_pretrained(CASE.model().unload(), tmp_path)
    report = fd.convert_report(twin)
    assert len(report.torch) == 4
    assert not report.fused
    with torch.no_grad():
        assert torch.equal(twin.eval()(IDS).logits, model.eval()(IDS).logits)
