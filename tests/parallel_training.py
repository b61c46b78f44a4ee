"""Trainings for ``test_dtensors.py``: a transformer with tensor and sequence parallelism, and layers under FSDP2."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd

SEQUENCE, WIDTH, HEADS, TOKENS = 16, 32, 4, 50


class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop_weights, self.drop_attention, self.drop_hidden, self.drop_mlp = (nn.Dropout(p) for _ in range(4))

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (
            layer(h).view(h.shape[0], SEQUENCE, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        # No matrix products here: in torch 2.11 they fail for tensors that are sharded by head.
        weights = self.drop_weights(((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / 3).softmax(-1))
        joined = (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2).transpose(1, 2).flatten(2)
        x = x + self.drop_attention(self.out(joined))
        return x + self.drop_mlp(self.down(self.drop_hidden(F.gelu(self.up(self.norm2(x))))))


class Transformer(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(TOKENS, WIDTH), nn.Dropout(p)
        self.blocks = nn.ModuleList(Block(p) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens):
        x = self.drop(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def parallelized(model, mesh):
    """Shards heads and hidden units over the ranks, and the sequence between these layers."""
    from torch.distributed.tensor import Replicate, Shard, parallel

    column = parallel.ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    row = parallel.RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    sequence = parallel.SequenceParallel()
    plan = {
        "embedding": parallel.RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
        ),
        "norm": sequence,
        "head": parallel.ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for i in range(2):
        names = {"norm1": sequence, "norm2": sequence, "out": row, "down": row}
        names |= dict.fromkeys(("q", "k", "v", "up"), column)
        plan |= {f"blocks.{i}.{name}": style for name, style in names.items()}
    return parallel.parallelize_module(model, mesh, plan)


def train(p, steps, mesh=None):
    """Trains the transformer. Returns the loss of each step, and the dropped elements at each site and step."""
    torch.manual_seed(0)
    model = fd.convert(Transformer(p))
    if mesh is not None:
        model = parallelized(model, mesh)
    sites = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(sites) == 9
    masks, losses = [], []

    def note(module, arguments, output):
        masks.append((output.full_tensor() if hasattr(output, "full_tensor") else output) == 0)

    for site in sites:
        site.register_forward_hook(note)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, foreach=False)
    data = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    for _ in range(steps):
        tokens = torch.randint(TOKENS, (4, SEQUENCE), generator=data)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), (tokens * 7 % TOKENS).flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, masks


def train_sharded(p, steps, mesh=None, batch=8):
    """Trains layers under FSDP2, with ``shard=`` and a part of the batch on each rank. Returns as ``train``."""
    from torch.distributed.fsdp import fully_shard

    rank, world = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)])
    if mesh is not None:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(layers.parameters(), 3e-3, foreach=False)
    data, losses, masks = torch.Generator().manual_seed(1), [], []
    part = slice(rank * batch // world, (rank + 1) * batch // world)
    for step in range(steps):
        whole = torch.randn(batch, WIDTH, generator=data)
        x = whole[part]
        key = fd.fold_in(fd.key(3), step)
        optimizer.zero_grad()
        for i, layer in enumerate(layers):
            x = layer(x)
            if i < 2:
                shard = ((batch, WIDTH), (part.start, 0))
                x = fd.dropout(torch.tanh(x), p, p > 0, key=fd.fold_in(key, i), shard=shard)
                masks.append(x == 0)
        loss = (x - whole[part].sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if mesh is not None:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses, masks
