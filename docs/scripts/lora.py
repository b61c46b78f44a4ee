"""LoRA adapters of PEFT on a small Llama. Needs peft and transformers."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fused_dropout as fd  # new

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def kept(model, ids):
    """Bytes that a forward pass keeps for backward, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()  # each storage once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad  # the graph, and so what it keeps, is alive until here
    return sum(storages.values())


torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **shape))
model = get_peft_model(base, LoraConfig(lora_dropout=0.1, target_modules=NAMES)).train()
ids = torch.arange(32).repeat(4, 1) % 7 + torch.arange(4)[:, None]
before = kept(model, ids)

fd.convert(model, lora=True)  # new: each lora_dropout and its lora_A run as one

after = kept(model, ids)
report = fd.convert_report(model)
print(f"{len(report.paired)} adapters paired, {before:,} to {after:,} bytes kept")
assert (len(report.paired), len(report.unpaired)) == (2 * len(NAMES), 0)
assert after < 0.7 * before
assert all(site.fused for site in fd.audit(model, input_ids=ids).sites)

trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
losses = []
for _ in range(30):
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
assert losses[-1] < 0.8 * losses[0]
