"""A LightningModule in the Trainer of Lightning. Needs lightning."""

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_dropout as fd  # new


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        first = nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.3)
        second = nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3)
        self.body = nn.Sequential(*first, *second, nn.Linear(64, 4))
        self.losses = []

    def training_step(self, batch, index):
        inputs, labels = batch
        loss = F.cross_entropy(self.body(inputs), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


lightning.seed_everything(0)
inputs = torch.randn(512, 16)
labels = inputs[:, :4].argmax(1)
model = Classifier()
batch = inputs[:32], labels[:32]
before = fd.audit(model.training_step, batch, 0)

fd.convert(model)  # new: each nn.Dropout in the model becomes an fd.Dropout, in place

after = fd.audit(model.training_step, batch, 0)
print(before.summary)
print(after)
assert [site.fused for site in after.sites] == [True, True]
assert sum(site.saved for site in after.sites) == 2 * 16
assert sum(site.saved for site in before.sites) > 100 * 2 * 16

model.losses.clear()  # the audits have called training_step
trainer = lightning.Trainer(
    accelerator="cpu",
    max_epochs=6,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
data = TensorDataset(inputs, labels)
trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
first, last = (sum(losses) / 16 for losses in (model.losses[:16], model.losses[-16:]))
print(f"loss {first:.2f} to {last:.2f}")
assert last < 0.6 * first
