"""BERT in the Trainer of transformers, on a CPU. Needs transformers and accelerate."""

import torch
import transformers

import fused_dropout as fd  # new

transformers.set_seed(0)
config = transformers.BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
)
model = transformers.BertForSequenceClassification(config)
words = torch.randint(100, (512, 16))
labels = (words[:, 0] >= 50).long()  # does the first word come from the upper half?
rows = [{"input_ids": words[i], "labels": labels[i]} for i in range(len(words))]
before = fd.audit(model, words[:4])

fd.patch()  # new: all of torch's dropout functions, for the whole process

after = fd.audit(model, words[:4])
print(before.summary)
print(after)
drops = [site for site in after.sites if site.drops]
assert [site.fused for site in drops] == [True] * 8
kept_before = sum(site.saved or 0 for site in before.sites)  # None: not known
assert sum(site.saved for site in drops) < 0.2 * kept_before

arguments = transformers.TrainingArguments(
    output_dir="trainer_output",
    max_steps=80,
    per_device_train_batch_size=32,
    learning_rate=5e-3,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
trainer = transformers.Trainer(model, arguments, train_dataset=rows)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
assert losses[-1] < 0.8 * losses[0]
