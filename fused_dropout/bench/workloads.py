"""Models for the benchmarks: small enough for a CPU, with layer shapes of well-known models.

Each function returns a model with torch's dropout modules, and its input. ``swap`` replaces the modules by ours.
"""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import Dropout
from ..swap.convert import convert

P = 0.1
MODULES = {"nn.Dropout": nn.Dropout, "fd.Dropout": Dropout}


class Attention(nn.Module):
    """Self-attention that computes its weights explicitly, and drops them by a module."""

    def __init__(self, width: int, heads: int, p: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop_weights = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if self.causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return self.out((self.drop_weights(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block, with the normalization before (GPT-2, causal) or after (BERT) its two parts."""

    def __init__(self, width: int, heads: int, p: float, causal: bool) -> None:
        super().__init__()
        self.norm_first = causal
        self.attention, self.drop_attention = Attention(width, heads, p, causal), nn.Dropout(p)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(p))
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.drop_attention(self.attention(self.norm_attention(x)))
            return x + self.mlp(self.norm_mlp(x))
        x = self.norm_attention(x + self.drop_attention(self.attention(x)))
        return self.norm_mlp(x + self.mlp(x))


class Recurrent(nn.Module):
    """Two LSTM layers with dropout modules between and after, because dropout inside ``nn.LSTM`` cannot be replaced."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.first, self.second = (nn.LSTM(width, width, batch_first=True) for _ in range(2))
        self.drop_first, self.drop_second = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_second(self.second(self.drop_first(self.first(x)[0]))[0])


def mlp(p: float = P) -> tuple[nn.Module, Tensor]:
    """An MLP 784-512-256-128-10 with dropout after each hidden layer; batch of 128."""
    sizes = (784, 512, 256, 128)
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(p))]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], 10)), torch.randn(128, sizes[0])


def gpt2_block(p: float = P) -> tuple[nn.Module, Tensor]:
    """A block of GPT-2 small: width 768, 12 heads; one sequence of 1,024."""
    return Block(768, 12, p, causal=True), torch.randn(1, 1024, 768)


def bert_large_layer(p: float = P) -> tuple[nn.Module, Tensor]:
    """A layer of BERT large: width 1,024, 16 heads; one sequence of 512."""
    return Block(1024, 16, p, causal=False), torch.randn(1, 512, 1024)


def encoder_layer(p: float = P) -> tuple[nn.Module, Tensor]:
    """torch's own TransformerEncoderLayer: width 512, 8 heads; four sequences of 256."""
    return nn.TransformerEncoderLayer(512, 8, dropout=p, batch_first=True), torch.randn(4, 256, 512)


class Adapted(nn.Module):
    """A frozen linear layer with a LoRA adapter of rank 8."""

    def __init__(self, inputs: int, outputs: int, p: float) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.down, self.up = nn.Sequential(nn.Dropout(p), nn.Linear(inputs, 8, bias=False)), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class AdaptedLayer(nn.Module):
    """A Llama layer whose seven linear layers have LoRA adapters, with torch's fused attention."""

    def __init__(self, width: int, heads: int, intermediate: int, p: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Adapted(width, width, p) for _ in range(4))
        self.gate, self.up, self.down = (
            Adapted(*sizes, p) for sizes in ((width, intermediate), (width, intermediate), (intermediate, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def lora_layer(p: float = P) -> tuple[nn.Module, Tensor]:
    """A Llama layer with LoRA adapters: width 512, intermediate 1,376; one sequence of 2,048."""
    return AdaptedLayer(512, 8, 1376, p), torch.randn(1, 2048, 512)


def lstm(p: float = P) -> tuple[nn.Module, Tensor]:
    """Two LSTM layers of width 256; 32 sequences of 64."""
    return Recurrent(256, p), torch.randn(32, 64, 256)


class Logits(nn.Module):
    """A language model of transformers that takes token numbers and returns logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


def bert_base(p: float = P) -> tuple[nn.Module, Tensor]:
    """Two layers of BERT base's shape, with transformers' default attention; two sequences of 512."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(num_hidden_layers=2, vocab_size=1000, hidden_dropout_prob=p, attention_probs_dropout_prob=p)
    return Logits(BertForMaskedLM(config)), torch.randint(1000, (2, 512))


def gpt2(p: float = P) -> tuple[nn.Module, Tensor]:
    """Two layers of GPT-2 small's shape, with transformers' default attention; two sequences of 512."""
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"bos_token_id": None, "eos_token_id": None}  # the defaults are larger than this vocabulary
    config = GPT2Config(n_layer=2, vocab_size=1000, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, **special)
    return Logits(GPT2LMHeadModel(config)), torch.randint(1000, (2, 512))


# Their attention calls functional dropout, which only ``patch`` replaces.
OF_TRANSFORMERS = {"BERT base, 2 layers": bert_base, "GPT-2 small, 2 layers": gpt2}
WORKLOADS: dict[str, Callable[..., tuple[nn.Module, Tensor]]] = {
    "MLP 784-512-256-128-10": mlp,
    "GPT-2 small block": gpt2_block,
    "BERT large layer": bert_large_layer,
    "TransformerEncoderLayer": encoder_layer,
    "2-layer LSTM": lstm,
    **(OF_TRANSFORMERS if find_spec("transformers") else {}),
}


MEMORY_WORKLOADS: dict[str, Callable[..., tuple[nn.Module, Tensor]]] = {
    "one dropout, 2^24 floats": lambda p=P: (nn.Dropout(p), torch.randn(2**24)),
    "24 dropouts in a row, 2^23 floats": lambda p=P: (
        nn.Sequential(*(nn.Dropout(p) for _ in range(24))),
        torch.randn(2**23),
    ),
    "TransformerEncoderLayer": encoder_layer,
    "GPT-2 small block": gpt2_block,
    "Llama layer, LoRA": lora_layer,
}


def swap(model: nn.Module) -> nn.Module:
    """Replaces every ``nn.Dropout`` of the model by ours, in place."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
    return model


def swap_paired(model: nn.Module) -> nn.Module:
    """The same, and pairs each dropout with the linear layer directly after it."""
    return convert(model, pair_linears=True)


def without_dropout(model: nn.Module) -> nn.Module:
    """Sets p = 0 in every ``nn.Dropout`` of the model, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def step(model: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Runs forward and backward. Returns the gradients of the mean square of the output."""
    return torch.autograd.grad(model(x).square().mean(), parameters)
