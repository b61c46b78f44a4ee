"""A small GPT in a plain training loop, in the manner of nanoGPT. Needs torch only."""

import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd  # new

P, WIDTH, HEADS, LENGTH = 0.1, 64, 4, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop1, self.drop2 = fd.Dropout(P), fd.Dropout(P)  # was: nn.Dropout

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        p = P * self.training
        # was: F.scaled_dot_product_attention
        y = fd.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.drop1(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.drop2(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(self, letters):
        super().__init__()
        self.tokens, self.places = nn.Embedding(letters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.drop = fd.Dropout(P)  # was: nn.Dropout
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, letters)

    def forward(self, ids):
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return self.head(self.blocks(self.drop(x)))


torch.manual_seed(0)  # the masks follow this seed, as with nn.Dropout
ids = torch.tensor(list(b"a mask is a function of a key and an index. " * 100)) % 32
model, losses = GPT(32), []
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(60):
    batch = ids[torch.randint(len(ids) - LENGTH, (8, 1)) + torch.arange(LENGTH + 1)]
    loss = F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
assert losses[-1] < 0.5 * losses[0]
report = fd.audit(model, batch[:, :-1])
print(report)
assert [site.fused for site in report.sites] == [True] * 7
kept_by_torch = sum(site.torch_saved for site in report.sites)
assert sum(site.saved for site in report.sites) < 0.1 * kept_by_torch
