"""Hugging Face models of small configurations, with random weights: patched and converted."""

import copy
import io

import pytest
import torch
from swapping import (
    Case,
    Promises,
    assert_close,
    check_fused,
    for_ways,
    fused_calls,
    one_thread,  # noqa: F401
    same,
    swapped,
)
from torch import nn

import fused_dropout as fd

hf = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # about names that older versions need

P = 0.3
generator = torch.Generator().manual_seed(0)
IDS = torch.randint(50, (6, 8), generator=generator)
LABELS = torch.arange(6) % 4


def bert(attention):
    config = hf.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=P,
        attention_probs_dropout_prob=P,
        num_labels=4,
        attn_implementation=attention,
    )
    sites = [("bert.embeddings.dropout", "module"), ("dropout", "module")]
    for i in range(2):
        sites += [(f"bert.encoder.layer.{i}.{name}.dropout", "module") for name in ("attention.output", "output")]
        sites.append((f"bert.encoder.layer.{i}.attention.self", "call" if attention == "eager" else "attention"))
    inputs = {"input_ids": IDS, "labels": LABELS}
    return Case(lambda: hf.BertForSequenceClassification(config), inputs, sites, lr=3e-3)


def gpt2(attention):
    config = hf.GPT2Config(
        vocab_size=50,
        n_positions=16,
        bos_token_id=None,
        eos_token_id=None,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=P,
        embd_pdrop=P,
        attn_pdrop=P,
        attn_implementation=attention,
    )
    sites = [("transformer.drop", "module")]
    for i in range(2):
        sites += [(f"transformer.h.{i}.{name}", "module") for name in ("attn.resid_dropout", "mlp.dropout")]
        sites.append((f"transformer.h.{i}.attn", "call" if attention == "eager" else "attention"))
    return Case(lambda: hf.GPT2LMHeadModel(config), {"input_ids": IDS, "labels": IDS}, sites)


def t5():
    config = hf.T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.1,
        decoder_start_token_id=0,
        attn_implementation="eager",
    )
    sites = [(f"{stack}.dropout", "module") for stack in ("encoder", "decoder")]
    for stack, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        layers = f"{stack}.block.0.layer"
        sites += [(f"{layers}.{i}.dropout", "module") for i in range(len(attentions))]
        sites += [(f"{layers}.{i}.{attention}", "call") for i, attention in enumerate(attentions)]
        last = f"{layers}.{len(attentions)}"
        sites += [(f"{last}.dropout", "module"), (f"{last}.DenseReluDense.dropout", "module")]
    return Case(lambda: hf.T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS.flip(1)}, sites)


def vit():
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=P,
        attention_probs_dropout_prob=P,
        image_size=16,
        patch_size=4,
        num_labels=4,
        attn_implementation="eager",
    )
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sites = [("vit.embeddings.dropout", "module")]
    for i in range(2):
        sites += [(f"vit.layers.{i}.dropout", "module"), (f"vit.layers.{i}.attention", "call")]
    return Case(
        lambda: hf.ViTForImageClassification(config), {"pixel_values": images, "labels": LABELS}, sites, lr=3e-3
    )


def wav2vec2():
    config = hf.Wav2Vec2Config(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=P,
        attention_dropout=P,
        activation_dropout=P,
        feat_proj_dropout=P,
        final_dropout=P,
        layerdrop=0.0,
        apply_spec_augment=False,
        attn_implementation="eager",
    )
    sound = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(1, 20, (4, 5), generator=torch.Generator().manual_seed(0))
    layer = "wav2vec2.encoder.layers.0"
    modules = ["wav2vec2.feature_projection.dropout", "wav2vec2.encoder.dropout", f"{layer}.dropout", "dropout"]
    modules += [f"{layer}.feed_forward.{name}_dropout" for name in ("intermediate", "output")]
    sites = [*((name, "module") for name in modules), (f"{layer}.attention", "call")]
    return Case(lambda: hf.Wav2Vec2ForCTC(config), {"input_values": sound, "labels": labels}, sites, lr=3e-3)


def llama():
    config = hf.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attention_dropout=P,
        attn_implementation="eager",
    )
    sites = [(f"model.layers.{i}.self_attn", "call") for i in range(2)]
    return Case(lambda: hf.LlamaForCausalLM(config), {"input_ids": IDS, "labels": IDS}, sites)


CASES = {
    "bert": bert("eager"),
    "bert-sdpa": bert("sdpa"),
    "gpt2": gpt2("eager"),
    "gpt2-sdpa": gpt2("sdpa"),
    "t5": t5(),
    "vit": vit(),
    "wav2vec2": wav2vec2(),
    "llama": llama(),
}
for_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
for_some = pytest.mark.parametrize("case", [CASES[name] for name in ("bert", "gpt2", "t5")], ids=["bert", "gpt2", "t5"])


@for_cases
class TestPromises(Promises):
    """Attention drops in a functional call, which patch replaces: F.dropout, or torch's attention function."""


@pytest.mark.parametrize("make", [bert, gpt2])
def test_both_kinds_of_attention_have_the_same_masks(make):
    """Eager attention drops its weights with F.dropout. sdpa drops the same weights, which no tensor holds."""
    with fd.patched():
        eager, whole = (case.step(case.model(), 1) for case in (make("eager"), make("sdpa")))
    assert_close(whole, eager)
    assert not same(make("sdpa").step(make("sdpa").model(), 1), whole)


@for_some
@for_ways
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_draws_the_same_masks_again(case, way, reentrant):
    model, calls = case.model(), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_: calls.append(1))
    with swapped(way, model):
        want, once = case.step(model, 1), len(calls)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_close(case.step(model, 1), want)
    assert len(calls) > 2 * once, "nothing was computed again"


@for_some
@for_ways
def test_compiled_the_masks_are_eagers(case, way):
    torch._dynamo.reset()
    model = case.model()
    with swapped(way, model):
        compiled = torch.compile(model, backend="aot_eager")
        assert_close(case.step(model, 1, compiled), case.step(model, 1))


def trained(way, folder, reentrant=None):
    """The weights of a BERT after a few steps of Hugging Face's Trainer."""
    pytest.importorskip("accelerate")
    case = CASES["bert"]
    model = case.model()
    checkpointing = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    arguments = hf.TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=reentrant is not None,
        **checkpointing,
    )
    data = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, LABELS, strict=True)]
    with swapped(way, model):
        hf.Trainer(model, arguments, train_dataset=data).train()
    return list(model.parameters())


@for_ways
def test_trainer(way, tmp_path):
    """The weights are equal with and without checkpointing, and differ from those of torch's masks."""
    plain = trained(way, tmp_path)
    assert not torch.allclose(plain[0], trained("torch", tmp_path)[0], atol=1e-3)
    for reentrant in (True, False):
        assert_close(trained(way, tmp_path, reentrant), plain)


def kinds(model):
    return [type(m) for m in model.modules() if isinstance(m, nn.Dropout)]


@for_some
def test_copies_and_pickles_of_a_converted_model(case):
    model = fd.convert(case.model())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert kinds(twin) == kinds(model)
        assert same(case.step(twin, 1), case.step(model, 1))
        assert set(kinds(fd.revert(twin))) <= {nn.Dropout}
    assert set(kinds(model)) <= {fd.Dropout}


@for_cases
def test_saved_pretrained_and_loaded(case, tmp_path):
    """The saved folder holds no trace of the conversion. It loads into a plain model and into a converted one."""
    model = fd.convert(case.model())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation).train()
    assert set(kinds(loaded)) <= {nn.Dropout}
    assert same(list(loaded.state_dict().values()), list(model.state_dict().values()))
    want = case.step(model, 1)
    assert same(case.step(fd.convert(loaded), 1), want)
    assert same(case.step(fd.revert(loaded), 1), case.step(fd.revert(model), 1))


def copy_of_bert(name):
    """RoBERTa and others have copies of BERT's layers, under their own names."""
    config = getattr(hf, f"{name}Config")(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
        hidden_dropout_prob=P,
        attention_probs_dropout_prob=P,
        num_labels=4,
    )
    return Case(
        lambda: getattr(hf, f"{name}ForSequenceClassification")(config), {"input_ids": IDS, "labels": LABELS}, []
    )


# By default, two layers with two sums each.
FUSED = {
    "bert": (CASES["bert"], {"dropout_add": 4}),
    "bert-sdpa": (CASES["bert-sdpa"], {"dropout_add": 4}),
    "roberta": (copy_of_bert("Roberta"), {"dropout_add": 4}),
    "electra": (copy_of_bert("Electra"), {"dropout_add": 4}),
    "megatron-bert": (copy_of_bert("MegatronBert"), {"dropout_add": 4}),  # without the norm
    "gpt2": (CASES["gpt2"], {"dropout_add": 4}),
    "vit": (CASES["vit"], {"dropout_add": 4}),
    "t5": (CASES["t5"], {"dropout_add": 5, "relu_dropout": 2}),
    "wav2vec2": (CASES["wav2vec2"], {"dropout_add": 1}),
    "llama": (CASES["llama"], {}),
}


@pytest.mark.parametrize(("case", "calls"), FUSED.values(), ids=FUSED)
def test_fused(case, calls):
    check_fused(case, calls)


@for_some
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_fused_and_checkpointed(case, reentrant):
    """Backward recomputes the fused layers."""
    model = fd.convert(case.model(), fuse=True)
    want = case.step(model, 1)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fused_calls() as calls:
        assert_close(case.step(model, 1), want)
    once = next(calls for known, calls in FUSED.values() if known is case)
    assert calls == {name: 2 * times for name, times in once.items()}


@for_some
def test_fused_and_compiled(case):
    """The compiler sees the separate calls."""
    torch._dynamo.reset()
    model = fd.convert(case.model(), fuse=True)
    want = case.step(model, 1)
    with fused_calls() as calls:
        assert_close(case.step(model, 1, torch.compile(model, backend="aot_eager")), want)
    assert not calls


def test_fused_report():
    report = fd.convert_report(fd.convert(CASES["gpt2"].model(), fuse=True))
    both = "dropout_add: attn.resid_dropout, mlp.dropout"
    assert report.layers == {"transformer.h.0": both, "transformer.h.1": both}
    assert not any(name.startswith("transformer.h") for name in report.unfused)


def test_attention_that_is_looked_at_is_not_fused():
    """A hook on GPT-2's attention sees the result of its dropout."""
    case, seen = CASES["gpt2"], []
    model = fd.convert(case.model(), fuse=True)
    want = case.step(model, 1)
    model.transformer.h[0].attn.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    with fused_calls() as calls:
        assert same(case.step(model, 1), want)
    assert calls == {"dropout_add": 3}
    assert (seen[0] == 0).any()
