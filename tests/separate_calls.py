"""The separate calls that ``fd.dropout_add`` and ``fd.relu_dropout`` replace, with their arguments in one order."""

import pytest
import torch
import torch.nn.functional as F
from helpers import key_tensor

import fused_dropout as fd

P, KEY = 0.3, key_tensor(11, 2**40 + 7)


class Dropped(torch.autograd.Function):
    """Dropout in torch's own operations.

    As with fd.dropout, the input's gradient has the layout of the output's gradient. The layout affects the last bits
    of the sum for a bias.
    """

    @staticmethod
    def forward(ctx, x, kept, scale):
        ctx.kept, ctx.scale = kept, scale
        return torch.empty_like(x).copy_(torch.where(kept, x * scale, 0))

    @staticmethod
    def backward(ctx, gradient):
        return Dropped.apply(gradient, ctx.kept, ctx.scale), None, None


def dropped(x, numbered, p, key, training=True, noise_shape=None):
    """Dropout of x with the mask of ``numbered``, which may have another layout."""
    if not training or p == 0:
        return x
    if noise_shape is not None:
        sizes = numbered.shape[numbered.dim() - len(noise_shape) :]
        noise_shape = [size if n is None else n for n, size in zip(noise_shape, sizes, strict=True)]
    kept = fd.keep_mask(numbered if noise_shape is None else noise_shape, p, key)
    return Dropped.apply(x, kept, 1 / (1 - p) if p < 1 else 1.0)


def separate_add(x, residual, bias=None, p=P, training=True, *, key=KEY, noise_shape=None):
    return residual + dropped(x if bias is None else x + bias, x, p, key, training, noise_shape)


def separate_relu(x, p=P, training=True, *, key=KEY):
    return dropped(F.relu(x), x, p, key, training)


def ours_add(x, residual, bias=None, p=P, training=True, inplace=False, **source):
    return fd.dropout_add(x, residual, p, training, inplace, bias=bias, **source)


def two_calls_add(x, residual, bias=None, p=P, training=True, **source):
    return residual + fd.dropout(x if bias is None else x + bias, p, training, **source)


def ours_relu(x, p=P, training=True, inplace=False, **source):
    return fd.relu_dropout(x, p, training, inplace, **source)


def two_calls_relu(x, p=P, training=True, **source):
    return fd.dropout(F.relu(x), p, training, **source)


CALLS = {"add": (ours_add, two_calls_add, 3), "relu": (ours_relu, two_calls_relu, 1)}  # and the number of tensors
for_calls = pytest.mark.parametrize(("ours", "theirs", "takes"), CALLS.values(), ids=CALLS)
