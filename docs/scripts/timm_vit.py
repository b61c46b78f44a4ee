"""A small vision transformer of timm, with drop path. Needs timm."""

import timm
import torch
import torch.nn.functional as F

import fused_dropout as fd  # new

torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224",
    pretrained=False,
    img_size=32,
    patch_size=8,
    embed_dim=64,
    depth=2,
    num_heads=4,
    num_classes=4,
    proj_drop_rate=0.1,
    attn_drop_rate=0.1,
    drop_path_rate=0.1,
)
labels = torch.arange(32) % 4
stripes = F.one_hot(labels, 4).repeat_interleave(8, 1)  # each label has its own columns
images = torch.randn(32, 3, 32, 32) + stripes[:, None, None]
before = fd.audit(model, images)

fd.convert(model)  # new: nn.Dropout and timm's DropPath, in place
fd.patch()  # new: attention calls a function of torch, which convert does not reach

after = fd.audit(model, images)
print(before.summary)
print(after)
drops = [site for site in after.sites if site.drops]
assert [site.fused for site in drops] == [True] * 10
assert {site.module for site in drops} >= {
    "blocks.0.attn",
    "blocks.1.drop_path1",
    "blocks.1.drop_path2",
}
kept_before = sum(site.saved or 0 for site in before.sites)  # None: not known
assert sum(site.saved for site in drops) < 0.2 * kept_before

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(25):
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
assert losses[-1] < 0.8 * losses[0]
