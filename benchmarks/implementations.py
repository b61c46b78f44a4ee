"""Other implementations of dropout. Each name gives ``make(p) -> fn(x) -> y``, or skips with a reason."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fused_dropout as fd


def torch_eager(p):
    return functools.partial(F.dropout, p=p)


def torch_compiled(p):
    from torch._functorch import config

    config.donated_buffer = False  # donated buffers would allow only one backward
    return torch.compile(lambda x: F.dropout(x, p))


def ours(p):
    return functools.partial(fd.dropout, p=p)


def bool_mask(p):
    """Dropout written by hand with a mask of bools."""
    return lambda x: torch.where(torch.rand_like(x) >= p, x / (1 - p), 0)


def bernoulli(p):
    """Dropout with bernoulli_, like timm's DropPath and many models."""
    return lambda x: x * torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)


def jax_jitted(p):
    """Runs on JAX arrays, as JAX users do. Each call makes a new key, as in JAX programs."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")

    @jax.jit
    def drop(x, key):
        kept = jax.random.bernoulli(key, 1 - p, x.shape)
        return jax.numpy.where(kept, x / (1 - p), 0)

    seeds = iter(range(10**9))
    cache = {}

    def run(x):
        if id(x) not in cache:
            cache[id(x)] = jax.numpy.asarray(x.detach().float().cpu().numpy()).astype(str(x.dtype).split(".")[1])
        return drop(cache[id(x)], jax.random.key(next(seeds))).block_until_ready()

    run.forward_only = True
    return run


def triton_low_memory(p):
    """Uses a seed instead of a mask, and one Philox call per element. Only for p = 0.1."""
    if not torch.cuda.is_available():
        pytest.skip("Triton needs a GPU")
    pytest.importorskip("triton", reason="Triton is not installed")
    from fused_dropout.bench.gpu.speed import TritonDropout

    return TritonDropout.apply


def transformer_engine(p):
    if not torch.cuda.is_available():
        pytest.skip("TransformerEngine needs a GPU")
    module = pytest.importorskip("transformer_engine_torch", reason="TransformerEngine is not installed")
    return lambda x: module.dropout_fwd(x, p)[0]


def flash_attention_layer_norm(p):
    """flash-attention's dropout_add_layer_norm with a weight of ones. It has no dropout without normalisation."""
    if not torch.cuda.is_available():
        pytest.skip("flash-attention needs a GPU")
    norm = pytest.importorskip("flash_attn.ops.layer_norm", reason="flash-attention's layer_norm is not installed")

    def run(x):
        rows = x.view(-1, 1024)
        one = torch.ones(1024, dtype=x.dtype, device=x.device)
        return norm.dropout_add_layer_norm(rows, None, one, torch.zeros_like(one), p, 1e-5)

    return run


IMPLEMENTATIONS = {
    "F.dropout": torch_eager,
    "fd.dropout": ours,
    "F.dropout compiled": torch_compiled,
    "rand mask": bool_mask,
    "bernoulli_": bernoulli,
    "JAX": jax_jitted,
    "Triton": triton_low_memory,
    "TransformerEngine": transformer_engine,
    "flash-attention layer_norm": flash_attention_layer_norm,
}
