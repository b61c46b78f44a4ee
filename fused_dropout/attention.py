"""Attention with dropout that does not keep the attention weights: ``scaled_dot_product_attention``.

As in flash attention, the weights of one block of queries at a time are computed, dropped and used, and backward
computes them again. The mask is that of the full tensor of weights, for any block size. ``csrc/attention.cpp`` has the
operators, and ``attention_blocks.py`` has them in PyTorch.
"""

from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from . import attention_blocks, autograd, dispatch, operators
from .arguments import check_arguments
from .distributed import beside
from .functional import dropout
from .torch_internals import apply_without_functorch, is_compiling, is_distributed, is_recorded, is_traced_ahead

_torch_attention = F.scaled_dot_product_attention  # saved here, because patch() replaces it
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

operators.implement("attention", attention_blocks.attention, attention_blocks.fake_attention)
operators.implement("attention_backward", attention_blocks.attention_backward, attention_blocks.fake_attention_backward)
_attention = torch.ops.fused_dropout.attention.default
_attention_backward = torch.ops.fused_dropout.attention_backward.default


class _Attention(torch.autograd.Function):
    """Saves the three inputs, the output, two numbers for each row of the weights, the attention mask and the key."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        p: float,
        dropout_key: Tensor,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        out, statistics = _attention(
            query, key, value, _expanded(attn_mask, query, key), p, dropout_key, is_causal, scale
        )
        ctx.save_for_backward(query, key, value, out, statistics, attn_mask, dropout_key)
        ctx.p, ctx.is_causal, ctx.scale = p, is_causal, scale
        ctx.words = None if is_traced_ahead(query) else autograd.words_of(dropout_key)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, statistics, attn_mask, saved_key = ctx.saved_tensors
        dropout_key = autograd.key_for_backward(ctx.words, saved_key)
        if torch.is_grad_enabled() and not is_compiling():
            # A view of each input separates their gradients, also if two inputs are the same tensor, or if one was
            # computed from another.
            query, key, value = (x.view_as(x) for x in (query, key, value))
            inputs = [x for x, needed in zip((query, key, value), ctx.needs_input_grad, strict=False) if needed]
            result = _compose(query, key, value, attn_mask, ctx.p, ctx.is_causal, ctx.scale, None, dropout_key)
            gradients = iter(torch.autograd.grad(result, inputs, gradient, create_graph=True))
            three = [next(gradients) if needed else None for needed in ctx.needs_input_grad[:3]]
        else:
            mask = _expanded(attn_mask, query, key)
            arguments = (query, key, value, out, statistics, mask, ctx.p, dropout_key, ctx.is_causal, ctx.scale)
            three = _attention_backward(gradient, *arguments)
        return *three, None, None, None, None, None


_apply_eager = apply_without_functorch(_Attention)


def _expanded(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The attention mask in the form that the operators need: bool or float32, of the weights' shape."""
    if attn_mask is None:
        return None
    attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.float()
    return attn_mask.expand(*query.shape[:3], key.shape[2])


def _compose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    p: float,
    is_causal: bool,
    scale: float,
    generator: Generator | None,
    dropout_key: Tensor | None,
) -> Tensor:
    """Attention by torch's operations, with all weights in memory. Supports every transform and derivative."""
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    heads = query.shape[-3] if query.dim() > 2 else 1
    # enable_gqa: several query heads share one key head.
    key, value = (
        x.repeat_interleave(heads // x.shape[-3], -3) if x.dim() > 2 and 1 < x.shape[-3] < heads else x
        for x in (key, value)
    )
    scores = query @ key.transpose(-2, -1) * scale
    if is_causal:
        attn_mask = beside(scores, torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril())
    if attn_mask is not None:
        attn_mask = attn_mask.expand(scores.shape)
        masked = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        # The softmax of a fully masked row is undefined. torch gives it weights of 0.
        whole = (masked == -torch.inf).all(-1, keepdim=True)
        weights = masked.masked_fill(whole, 0.0).softmax(-1).masked_fill(whole, 0.0)
    else:
        weights = scores.softmax(-1)
    return (dropout(weights, p, generator=generator, key=dropout_key) @ value).to(dtype)


def _is_covered(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, p: float, is_causal: bool, enable_gqa: bool
) -> bool:
    """Whether the operators support the call. False also for a wrong call: torch's function then raises its error."""
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    if p >= 1 or is_recorded() or (is_causal and attn_mask is not None):
        return False
    if any(autograd.must_compose(x) and not is_traced_ahead(x) for x in tensors):
        return False
    if not all(x.is_cpu and x.layout is torch.strided and not x.is_nested for x in tensors):
        return False
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype or any(map(dispatch.is_empty, tensors)):
        return False
    if query.dim() not in (3, 4) or not query.dim() == key.dim() == value.dim():
        return False
    if key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1] or query.shape[:-3] != key.shape[:-3]:
        return False
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads != key_heads and (not enable_gqa or heads % key_heads):
        return False
    if attn_mask is None:
        return True
    if attn_mask.requires_grad or attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return False
    weights = (*query.shape[:-1], key.shape[-2])
    sizes = attn_mask.shape
    return len(sizes) <= len(weights) and all(
        size in (1, wanted) for size, wanted in zip(reversed(sizes), reversed(weights), strict=False)
    )


def _check(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> None:
    """Raises the error of torch's function for shapes that do not fit, by a call on the meta device."""
    mask = None if attn_mask is None else _without_values(attn_mask)
    query, key, value = map(_without_values, (query, key, value))
    _torch_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=enable_gqa)


def _without_values(x: Tensor) -> Tensor:
    """A tensor of this shape on the meta device. Plain also for a DTensor, whose operations could communicate."""
    if is_distributed(x):
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    return x.new_empty(x.shape, device="meta")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    generator: Generator | None = None,
    dropout_key: Tensor | None = None,
) -> Tensor:
    r"""Computes attention with dropout on a CPU, without keeping the attention weights for backward.

    In PyTorch: ``F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)``. The formula is
    ``dropout(softmax(query @ key.T * scale + attn_mask), dropout_p) @ value``.

    With dropout on a CPU, torch keeps the weights, their mask and the dropped weights for backward. This function keeps
    two numbers for each row of the weights, as flash attention does (Dao et al., "FlashAttention: Fast and
    Memory-Efficient Exact Attention with IO-Awareness", NeurIPS'22). The mask is ``fd.keep_mask`` of the weights, a
    tensor of shape (..., L, S), for every layout of the inputs.

    A call is fused on a CPU, if 0 < ``dropout_p`` < 1, the dtype is float32, bfloat16 or float16, and the inputs have
    three or four dimensions. Other calls go to torch's function: without dropout, on a GPU, with other dtypes, under
    ``torch.func``, dispatch modes and ``torch.export``, and for tensor subclasses. If such a call has a generator or a
    key, or on a CPU an ``attn_mask`` that requires grad, it runs as torch's operations and :func:`dropout`. A second
    derivative needs memory for the weights.

    Args:
        query: shape (..., L, E).
        key: shape (..., S, E).
        value: shape (..., S, Ev).
        attn_mask: a tensor that broadcasts to (..., L, S). A bool mask is ``True`` where a query attends to a key. A
            floating-point mask is added to the scores.
        dropout_p: the probability that a weight is zeroed, from 0 to 1.
        is_causal: if ``True``, query i attends only to keys 0 to i.
        scale: the factor of the scores. Default: :math:`1 / \sqrt{E}`
        enable_gqa: if ``True``, key and value may have fewer heads (dimension -3) than the query. Each of their heads
            then belongs to several consecutive heads of the query.
        generator: the generator that the key of the mask is drawn from. Default: the default generator
        dropout_key: the key of the mask, as ``key`` in :func:`dropout`. The call then uses no generator.

    Returns:
        A tensor of shape (..., L, Ev).

    Raises:
        ValueError: ``dropout_p`` is not between 0 and 1; ``dropout_key`` has a wrong shape, dtype or device; both
            ``dropout_key`` and ``generator`` are given.
        TypeError: ``dropout_p`` is not a number; ``generator`` or ``dropout_key`` has a wrong type.
        RuntimeError: as torch's function, for example if the shapes do not fit.

    Example:
        >>> query, key, value = torch.zeros(1, 2, 1), torch.zeros(1, 3, 1), torch.ones(1, 3, 1)
        >>> fd.scaled_dot_product_attention(query, key, value, dropout_p=0.5, dropout_key=fd.key(1)).squeeze()
        tensor([1.3333, 0.6667])
        >>> fd.keep_mask(torch.empty(1, 2, 3), 0.5, fd.key(1))
        tensor([[[ True, False,  True],
                 [False,  True, False]]])
    """
    keyed = generator is not None or dropout_key is not None
    check_arguments(query, dropout_p, True, generator, dropout_key)
    if dropout_p == 0:
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if isinstance(query, Tensor) and query.is_cpu and torch.is_autocast_enabled("cpu"):
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    composed = keyed or (isinstance(attn_mask, Tensor) and attn_mask.requires_grad and query.is_cpu)
    composed = composed or (is_distributed(query) and query.is_cpu)
    if not _is_covered(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        if not composed or not dispatch.is_covered(query, generator, dropout_key):
            return _torch_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        _check(query, key, value, attn_mask, is_causal, enable_gqa)
        factor = 1 / sqrt(query.shape[-1]) if scale is None else scale
        return _compose(query, key, value, attn_mask, dropout_p, is_causal, factor, generator, dropout_key)
    factor = 1 / sqrt(query.shape[-1]) if scale is None else float(scale)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    traced = is_compiling() or is_traced_ahead(query)
    own = dispatch.key_of_call(query.device, generator, dropout_key, None, traced, needs_grad)
    mask = attn_mask if attn_mask is None or query.dim() == 4 else attn_mask[(None,) * (attn_mask.dim() == 3)]
    q, k, v = (x if x.dim() == 4 else x.unsqueeze(0) for x in (query, key, value))
    drop = (float(dropout_p), own, is_causal, factor)
    if needs_grad:
        out = (_Attention.apply if traced else _apply_eager)(q, k, v, mask, *drop)
    else:
        out = _attention(q, k, v, _expanded(mask, q, k), *drop)[0]
    return out if query.dim() == 4 else out.squeeze(0)


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts the tensors as autocast does for torch's function."""

    def cast(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(x.device.type)) if eligible else x

    return tuple(map(cast, tensors))
