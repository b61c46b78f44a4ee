"""Attention with dropout by torch's operations, one block of queries at a time, if ``csrc/attention.cpp`` is not built.

A row of the weights is ``exp(score - maximum) * inverse``, where ``inverse`` is 1 / the sum of the row. Backward needs
these two numbers of each row, its ``statistics``. They are (+infinity, 0) for a fully masked row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference

_SCORES = 1 << 22  # how many scores a block has, over all heads
_Pair = tuple[Tensor, Tensor]
_Three = tuple[Tensor, Tensor, Tensor]


def _blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    """The rows of each block of queries."""
    rows = max(1, _SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    for first in range(0, query.shape[2], rows):
        yield slice(first, min(first + rows, query.shape[2]))


def _scores(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, rows: slice) -> Tensor:
    scores = torch.matmul(query[:, :, rows], key.transpose(-2, -1)).mul_(scale)
    if attn_mask is not None:
        part = attn_mask[:, :, rows]
        return scores.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else scores.add_(part)
    if is_causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1 + rows.start)
        return scores.masked_fill_(ahead, -torch.inf)
    return scores


def _drop_(weights: Tensor, p: float, dropout_key: Tensor, rows: slice, queries: int) -> None:
    """Drops a block of the weights, with its part of the mask of all weights (batch, heads, queries, keys)."""
    strides = reference.row_major((*weights.shape[:2], queries, weights.shape[3]))
    reference.apply_(weights, p, dropout_key, rows.start * strides[2], strides)


def _for_each_head(x: Tensor, heads: int) -> Tensor:
    """Converts to float32, and repeats each head of keys or values for all its query heads."""
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def _new_heads(x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """A new tensor of x's shape, with another last size. Its memory order is (batch, row, head, column)."""
    batch, heads, rows, _ = x.shape
    strides = (heads * rows * columns, columns, heads * columns, 1)
    return x.new_empty_strided((batch, heads, rows, columns), strides, dtype=dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    p: float,
    dropout_key: Tensor,
    is_causal: bool,
    scale: float,
) -> _Pair:
    """Returns the output, and the statistics of each row: float32, shape (batch, heads, queries, 2)."""
    out = _new_heads(query, value.shape[3], query.dtype)
    statistics = query.new_empty(*query.shape[:3], 2, dtype=torch.float32)
    heads = query.shape[1]
    query, key, value = query.float(), _for_each_head(key, heads), _for_each_head(value, heads)
    for rows in _blocks(query, key):
        weights = _scores(query, key, attn_mask, is_causal, scale, rows)
        maximum = weights.amax(-1, keepdim=True)
        maximum.masked_fill_(maximum == -torch.inf, torch.inf)
        total = weights.sub_(maximum).exp_().sum(-1, keepdim=True)
        inverse = torch.where(total == 0, 0.0, 1 / total)
        statistics[:, :, rows] = torch.cat([maximum, inverse], -1)
        weights.mul_(inverse)
        _drop_(weights, p, dropout_key, rows, query.shape[2])
        out[:, :, rows] = torch.matmul(weights, value).to(out.dtype)
    return out, statistics


def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    attn_mask: Tensor | None,
    p: float,
    dropout_key: Tensor,
    is_causal: bool,
    scale: float,
) -> _Three:
    """Returns the gradients of query, key and value."""
    dtype, heads, key_heads = query.dtype, query.shape[1], key.shape[1]
    dquery = _new_heads(query, query.shape[3], dtype)
    query, key, value = query.float(), _for_each_head(key, heads), _for_each_head(value, heads)
    gradient = gradient.float()
    delta = (gradient * out).sum(-1, keepdim=True)
    dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
    for rows in _blocks(query, key):
        maximum, inverse = statistics[:, :, rows].split(1, -1)
        weights = _scores(query, key, attn_mask, is_causal, scale, rows).sub_(maximum).exp_().mul_(inverse)
        dropped = weights.clone()
        _drop_(dropped, p, dropout_key, rows, query.shape[2])
        dvalue += torch.matmul(dropped.transpose(-2, -1), gradient[:, :, rows])
        dscores = torch.matmul(gradient[:, :, rows], value.transpose(-2, -1)).mul_(dropped)
        dscores.sub_(weights.mul_(delta[:, :, rows])).mul_(scale)
        dquery[:, :, rows] = torch.matmul(dscores, key).to(dtype)
        dkey += torch.matmul(dscores.transpose(-2, -1), query[:, :, rows])
    results = [dquery]
    for total in (dkey, dvalue):
        each = total.unflatten(1, (key_heads, heads // key_heads)).sum(2)
        results.append(_new_heads(each, each.shape[3], dtype).copy_(each))
    dquery, dkey, dvalue = results
    return dquery, dkey, dvalue


def fake_attention(query: Tensor, key: Tensor, value: Tensor, *_: object) -> _Pair:
    statistics = query.new_empty(*query.shape[:3], 2, dtype=torch.float32)
    return _new_heads(query, value.shape[3], query.dtype), statistics


def fake_attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> _Three:
    dquery, dkey, dvalue = (_new_heads(x, x.shape[3], x.dtype) for x in (query, key, value))
    return dquery, dkey, dvalue
