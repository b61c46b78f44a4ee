"""The relatives of ``dropout``: channels, alpha dropout and stochastic depth."""

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from typing import Any

import torch.nn.functional as F
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import reference
from .arguments import check_arguments
from .autograd import must_compose
from .dispatch import drop, is_covered
from .functional import drop_shard, hand_over, is_overridden, noisy
from .reference import row_major
from .windows import Shard, part_of

# torch's own, whatever stands at these names later.
_torch_dropout1d, _torch_dropout2d, _torch_dropout3d = F.dropout1d, F.dropout2d, F.dropout3d
_torch_alpha_dropout, _torch_feature_alpha_dropout = F.alpha_dropout, F.feature_alpha_dropout
# The value that a SELU unit saturates at, negated: scale times alpha of Klambauer et al., "Self-Normalizing Neural
# Networks", NIPS'17, as in torch.
_SELU_SATURATION = 1.7580993408473766


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Sets each channel to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    Takes the place of :func:`torch.nn.functional.dropout1d`; :func:`dropout` with a ``noise_shape`` of 1 for the
    spatial dimension.

    Args:
        input: shape (N, C, L) or (C, L); dtypes and devices as in :func:`dropout`, else torch's own function serves.
        p, training, inplace, generator, key, shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype; ``input`` itself as in :func:`dropout`.

    Raises:
        RuntimeError: the input has another number of dimensions. Otherwise as :func:`dropout`.
    """
    return _channelwise(dropout1d, _torch_dropout1d, (2, 3), 3, input, p, training, inplace, generator, key, shard)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Sets each channel to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    Takes the place of :func:`torch.nn.functional.dropout2d`; :func:`dropout` with a ``noise_shape`` of (N, C, 1, 1).

    Args:
        input: shape (N, C, H, W), or (N, C, L) with torch's warning; dtypes and devices as in :func:`dropout`, else
            torch's own function serves. Other numbers of dimensions from 2 on are taken as (N, C, \*), with a warning.
        p, training, inplace, generator, key, shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype; ``input`` itself as in :func:`dropout`.

    Raises:
        RuntimeError: the input has less than 2 dimensions and ``p`` is not 1, where torch's own function gives
            ``input * 0``. Otherwise as :func:`dropout`.
    """
    return _channelwise(dropout2d, _torch_dropout2d, (4,), None, input, p, training, inplace, generator, key, shard)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Sets each channel to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    Takes the place of :func:`torch.nn.functional.dropout3d`; :func:`dropout` with a ``noise_shape`` of 1 for the
    spatial dimensions.

    Args:
        input: shape (N, C, D, H, W) or (C, D, H, W); dtypes and devices as in :func:`dropout`, else torch's own
            function serves. Other numbers of dimensions are taken as (C, \*), with torch's warning.
        p, training, inplace, generator, key, shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype; ``input`` itself as in :func:`dropout`.

    Raises:
        RuntimeError: the input has no dimension and ``p`` is not 1, where torch's own function gives ``input * 0``.
            Otherwise as :func:`dropout`.
    """
    return _channelwise(dropout3d, _torch_dropout3d, (4, 5), 5, input, p, training, inplace, generator, key, shard)


def _channelwise(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    ranks: tuple[int, ...],
    batched: int | None,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: Generator | None,
    key: Tensor | None,
    shard: Shard | None,
) -> Tensor:
    """One draw a channel. ranks: the numbers of dimensions that torch does not comment on; batched: the one that has
    samples before channels, None if all have."""
    if has_torch_function_unary(input) and is_overridden(input):
        return hand_over(
            ours, theirs, input, p, training, inplace, {"generator": generator, "key": key, "shard": shard}
        )
    check_arguments(input, p, training, generator, key)
    dims = input.dim()
    lead = 2 if batched is None or dims == batched else 1
    if not training or p == 0 or dims < lead:
        return theirs(input, p, training, inplace)
    if dims not in ranks and is_covered(input, generator, key, shard):
        theirs(input, p, training=False)  # changes nothing, but warns or raises in torch's words
    if shard is not None:
        return drop_shard(input, p, inplace, generator, key, shard, partial(_lead_strides, lead))
    output = drop(input, p, inplace, generator, key, _lead_strides(lead, input.shape))
    return theirs(input, p, training, inplace) if output is None else output


def _lead_strides(lead: int, shape: Sequence[int]) -> list[int]:
    """Index strides of a mask with one draw for each index of the first ``lead`` dimensions, one or two: row-major for
    these, 0 for the others."""
    return [shape[1] if lead == 2 else 1, 1][:lead] + [0] * (len(shape) - lead)


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Sets each element to SELU's negative saturation with probability ``p``, then restores mean 0 and variance 1.

    Takes the place of :func:`torch.nn.functional.alpha_dropout`, with its formula (Klambauer et al., "Self-Normalizing
    Neural Networks", NIPS'17): a kept x becomes :math:`a x + b`, a dropped one :math:`-a \alpha + b`, where
    :math:`\alpha = 1.7580993408473766`, :math:`a = ((1 - p) (1 + p \alpha^2))^{-1/2}`, :math:`b = a \alpha p`.
    If ``p`` is 1 all become 0.

    Args:
        input: a tensor of any shape; dtypes and devices as in :func:`dropout`, else torch's own function serves.
        p, inplace, generator, key, shard: as in :func:`dropout`; the mask is the one that it applies.
        training: return ``input`` itself if ``False``. Default: ``False``, as in torch

    Returns:
        A tensor of the input's shape and dtype; ``input`` itself as in :func:`dropout`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dropout`.
    """
    return _alpha(alpha_dropout, _torch_alpha_dropout, None, input, p, training, inplace, generator, key, shard)


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""``alpha_dropout`` of whole channels: the mask of :func:`dropout` with a ``noise_shape`` of (N, C, 1, ...).

    Takes the place of :func:`torch.nn.functional.feature_alpha_dropout`.

    Args:
        input: shape (N, C, \*); dtypes and devices as in :func:`dropout`, else torch's own function serves.
        p, training, inplace, generator, key, shard: as in :func:`alpha_dropout`.

    Returns:
        A tensor of the input's shape and dtype; ``input`` itself as in :func:`dropout`.

    Raises:
        RuntimeError: the input has less than 2 dimensions and ``p`` is not 1, where torch's own function gives
            ``input * 0``. Otherwise as :func:`dropout`.
    """
    return _alpha(
        feature_alpha_dropout, _torch_feature_alpha_dropout, 2, input, p, training, inplace, generator, key, shard
    )


def _alpha(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    lead: int | None,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: Generator | None,
    key: Tensor | None,
    shard: Shard | None,
) -> Tensor:
    """Alpha dropout of elements (lead None), or of all that share the first ``lead`` indices.

    It is dropout of x + alpha between two affine maps, so that its mask, its gradient and what they save are dropout's.
    """
    if has_torch_function_unary(input) and is_overridden(input):
        return hand_over(
            ours, theirs, input, p, training, inplace, {"generator": generator, "key": key, "shard": shard}
        )
    check_arguments(input, p, training, generator, key)
    dropping = training and p != 0 and is_covered(input, generator, key, shard)
    if not dropping or input.dim() < (lead or 0):
        return theirs(input, p, training, inplace)
    if shard is not None and (p == 1 or input.dim() == 0):
        part_of(input.shape, shard)  # checks it, since it is not used below
    output: Tensor | None
    if p == 1:
        output = drop(input, p, inplace)
        return theirs(input, p, training, inplace) if output is None else output
    if input.dim() == 0:  # see autograd.compose
        output = _alpha(ours, theirs, lead, input.reshape(1), p, training, False, generator, key, None).reshape(())
        return input.copy_(output) if inplace else output
    shifted = input + _SELU_SATURATION
    if shard is not None:
        strides_of = row_major if lead is None else partial(_lead_strides, lead)
        output = drop_shard(shifted, p, False, generator, key, shard, strides_of)
    elif lead:
        output = drop(shifted, p, False, generator, key, _lead_strides(lead, input.shape))
    else:  # numbered as input is, which need not have the layout of the sum
        strides = None if input.is_contiguous() else reference.index_strides_of(input)
        output = drop(shifted, p, False, generator, key, strides)
    if output is None:
        return theirs(input, p, training, inplace)
    if output is shifted:  # it is empty
        return input
    p = float(p)
    scale = 1 / sqrt((1 - p) * (1 + p * _SELU_SATURATION**2))
    factor, shift = scale * (1 - p), -scale * (1 - p) * _SELU_SATURATION
    # A mode, such as selective checkpointing's, may hold dropout's result, which then must not change.
    output = output * factor + shift if must_compose(input) else output.mul_(factor).add_(shift)
    return input.copy_(output) if inplace else output


def drop_path(
    x: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    generator: Generator | None = None,
    key: Tensor | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """Stochastic depth: sets each sample to zero with probability ``drop_prob`` (Huang et al., "Deep Networks with
    Stochastic Depth", ECCV'16), with timm's arguments and defaults.

    Args:
        x: shape (N, ...); dtypes and devices as in :func:`dropout`.
        drop_prob: probability of a sample to be zeroed, between 0 and 1. Default: 0
        training: return ``x`` itself if ``False``. Default: ``False``
        scale_by_keep: multiply the other samples by ``1 / (1 - drop_prob)``. Default: ``True``
        generator, key, shard: as in :func:`dropout`; the mask is that of ``noise_shape=(N, 1, ..., 1)``.

    Returns:
        A tensor of x's shape and dtype; ``x`` itself if ``drop_prob`` is 0 or ``training`` is ``False``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dropout`.

    Example::

        >>> fd.drop_path(torch.ones(4, 2), 0.5, training=True, key=fd.key(1))
        tensor([[2., 2.],
                [0., 0.],
                [2., 2.],
                [0., 0.]])
    """
    if has_torch_function_unary(x) and is_overridden(x):
        more: dict[str, Any] = {"scale_by_keep": scale_by_keep, "generator": generator, "key": key, "shard": shard}
        return handle_torch_function(drop_path, (x,), x, drop_prob=drop_prob, training=training, **more)
    check_arguments(x, drop_prob, training, generator, key)
    if not training or drop_prob == 0:
        return x
    scale = None if scale_by_keep else 1.0
    if shard is not None:
        return drop_shard(x, drop_prob, False, generator, key, shard, partial(_lead_strides, 1), scale)
    strides = [1] + [0] * (x.dim() - 1)
    output = drop(x, drop_prob, False, generator, key, strides, scale)
    return noisy(x, drop_prob, False, strides, scale_by_keep) if output is None else output
