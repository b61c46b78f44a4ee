"""The other functions of torch's dropout family, and ``drop_path``: dropout of channels, alpha dropout, whole samples.

All are built from ``dispatch.drop`` with index strides, a shift and a scale. Users call them; ``modules.py`` and
``swap/patching.py`` use them.
"""

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

# Saved here, because patch() replaces them.
_torch_dropout1d, _torch_dropout2d, _torch_dropout3d = F.dropout1d, F.dropout2d, F.dropout3d
_torch_alpha_dropout, _torch_feature_alpha_dropout = F.alpha_dropout, F.feature_alpha_dropout
# SELU(x) tends to minus this value for x -> -infinity: scale * alpha of Klambauer et al., "Self-Normalizing Neural
# Networks", NIPS'17. The digits are torch's.
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
    r"""Sets each channel of a 1d signal to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    In PyTorch: ``torch.nn.functional.dropout1d(input, p, training, inplace)``. The mask is that of :func:`dropout` with
    ``noise_shape=(N, C, 1)``.

    Args:
        input: shape (N, C, L) or (C, L). Dtypes and devices as in :func:`dropout`.
        p: the probability that a channel is zeroed, from 0 to 1.
        training: if ``False``, returns ``input`` unchanged.
        inplace: if ``True``, overwrites ``input`` and returns it.
        generator: as in :func:`dropout`.
        key: as in :func:`dropout`.
        shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype. It is ``input`` itself in the same cases as for :func:`dropout`.

    Raises:
        ValueError: as :func:`dropout`.
        TypeError: as :func:`dropout`.
        RuntimeError: as :func:`dropout`, and if the input does not have 2 or 3 dimensions.

    Example:
        >>> fd.dropout1d(torch.ones(1, 4, 2), 0.5, key=fd.key(1))
        tensor([[[2., 2.],
                 [0., 0.],
                 [2., 2.],
                 [0., 0.]]])
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
    r"""Sets each channel of an image to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    In PyTorch: ``torch.nn.functional.dropout2d(input, p, training, inplace)``. The mask is that of :func:`dropout` with
    ``noise_shape=(N, C, 1, 1)``.

    Args:
        input: shape (N, C, H, W). Any other number of dimensions from 2 on is read as (N, C, \*), with torch's warning.
            Dtypes and devices as in :func:`dropout`.
        p: the probability that a channel is zeroed, from 0 to 1.
        training: if ``False``, returns ``input`` unchanged.
        inplace: if ``True``, overwrites ``input`` and returns it.
        generator: as in :func:`dropout`.
        key: as in :func:`dropout`.
        shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype. It is ``input`` itself in the same cases as for :func:`dropout`.

    Raises:
        ValueError: as :func:`dropout`.
        TypeError: as :func:`dropout`.
        RuntimeError: as :func:`dropout`, and if the input has less than 2 dimensions. (With ``p=1`` torch's function
            returns ``input * 0`` for these, and so does this one.)

    Example:
        >>> fd.dropout2d(torch.ones(1, 4, 1, 2), 0.5, key=fd.key(1)).squeeze()
        tensor([[2., 2.],
                [0., 0.],
                [2., 2.],
                [0., 0.]])
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
    r"""Sets each channel of a volume to zero with probability ``p`` and multiplies the others by ``1 / (1 - p)``.

    In PyTorch: ``torch.nn.functional.dropout3d(input, p, training, inplace)``. The mask is that of :func:`dropout` with
    ``noise_shape=(N, C, 1, 1, 1)``.

    Args:
        input: shape (N, C, D, H, W) or (C, D, H, W). Any other number of dimensions is read as (C, \*), with torch's
            warning. Dtypes and devices as in :func:`dropout`.
        p: the probability that a channel is zeroed, from 0 to 1.
        training: if ``False``, returns ``input`` unchanged.
        inplace: if ``True``, overwrites ``input`` and returns it.
        generator: as in :func:`dropout`.
        key: as in :func:`dropout`.
        shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype. It is ``input`` itself in the same cases as for :func:`dropout`.

    Raises:
        ValueError: as :func:`dropout`.
        TypeError: as :func:`dropout`.
        RuntimeError: as :func:`dropout`, and if the input has no dimensions. (With ``p=1`` torch's function returns
            ``input * 0`` for it, and so does this one.)

    Example:
        >>> fd.dropout3d(torch.ones(1, 4, 1, 1, 2), 0.5, key=fd.key(1)).squeeze()
        tensor([[2., 2.],
                [0., 0.],
                [2., 2.],
                [0., 0.]])
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
    """Dropout with one draw for each channel.

    ranks: the numbers of dimensions for which torch gives no warning. batched: the number of dimensions of an input
    (N, C, ...); inputs with another number are (C, ...). None: every input is (N, C, ...).
    """
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
        theirs(input, p, training=False)  # gives torch's warning or error, and changes nothing
    if shard is not None:
        return drop_shard(input, p, inplace, generator, key, shard, partial(_lead_strides, lead))
    output = drop(input, p, inplace, generator, key, _lead_strides(lead, input.shape))
    return theirs(input, p, training, inplace) if output is None else output


def _lead_strides(lead: int, shape: Sequence[int]) -> list[int]:
    """The index strides of a mask with one draw for each index of the first ``lead`` dimensions (1 or 2).

    They are row-major in these dimensions, and 0 in the others.
    """
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
    r"""Sets each element to SELU's limit at minus infinity with probability ``p``, and keeps mean 0 and variance 1.

    In PyTorch: ``torch.nn.functional.alpha_dropout(input, p, training, inplace)``. The formula is from Klambauer et
    al., "Self-Normalizing Neural Networks", NIPS'17. A kept x becomes :math:`a x + b`, and a dropped one becomes
    :math:`-a \alpha + b`, with :math:`\alpha = 1.7580993408473766`, :math:`a = ((1 - p) (1 + p \alpha^2))^{-1/2}` and
    :math:`b = a \alpha p`. With ``p=1`` the result is 0. The mask is that of :func:`dropout`.

    Args:
        input: a tensor of any shape. Dtypes and devices as in :func:`dropout`.
        p: the probability that an element is dropped, from 0 to 1.
        training: if ``False``, returns ``input`` unchanged. ``False`` is the default, as in torch.
        inplace: if ``True``, overwrites ``input`` and returns it.
        generator: as in :func:`dropout`.
        key: as in :func:`dropout`.
        shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype. It is ``input`` itself in the same cases as for :func:`dropout`.

    Raises:
        ValueError: as :func:`dropout`.
        TypeError: as :func:`dropout`.
        RuntimeError: as :func:`dropout`.

    Example:
        >>> fd.alpha_dropout(torch.zeros(4), 0.5, training=True, key=fd.key(1))
        tensor([ 0.7792, -0.7792,  0.7792, -0.7792])
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
    r"""Applies :func:`alpha_dropout` to whole channels.

    In PyTorch: ``torch.nn.functional.feature_alpha_dropout(input, p, training, inplace)``. The formula is that of
    :func:`alpha_dropout`, and the mask is that of :func:`dropout` with ``noise_shape=(N, C, 1, ...)``.

    Args:
        input: shape (N, C, \*). Dtypes and devices as in :func:`dropout`.
        p: the probability that a channel is dropped, from 0 to 1.
        training: if ``False``, returns ``input`` unchanged. ``False`` is the default, as in torch.
        inplace: if ``True``, overwrites ``input`` and returns it.
        generator: as in :func:`dropout`.
        key: as in :func:`dropout`.
        shard: as in :func:`dropout`.

    Returns:
        A tensor of the input's shape and dtype. It is ``input`` itself in the same cases as for :func:`dropout`.

    Raises:
        ValueError: as :func:`dropout`.
        TypeError: as :func:`dropout`.
        RuntimeError: as :func:`dropout`, and if the input has less than 2 dimensions. (With ``p=1`` torch's function
            returns ``input * 0`` for these, and so does this one.)

    Example:
        >>> fd.feature_alpha_dropout(torch.zeros(1, 4, 2), 0.5, training=True, key=fd.key(1))[0, :, 0]
        tensor([ 0.7792, -0.7792,  0.7792, -0.7792])
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
    """Alpha dropout of single elements (lead is None), or of all elements with the same first ``lead`` indices.

    Computes ``a * (dropped(x + alpha) - alpha) + b`` by dropout of ``x + alpha``. So the mask, the gradient and the
    saved key are those of dropout.
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
    else:  # the elements are numbered by input's layout, from which the layout of the sum can differ
        strides = None if input.is_contiguous() else reference.index_strides_of(input)
        output = drop(shifted, p, False, generator, key, strides)
    if output is None:
        return theirs(input, p, training, inplace)
    if output is shifted:  # drop() returns its input if that is empty
        return input
    p = float(p)
    scale = 1 / sqrt((1 - p) * (1 + p * _SELU_SATURATION**2))
    factor, shift = scale * (1 - p), -scale * (1 - p) * _SELU_SATURATION
    # A mode, such as that of selective checkpointing, may keep the result of dropout. It must not be changed then.
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
    r"""Sets each sample to zero with probability ``drop_prob`` (stochastic depth).

    In PyTorch: ``x * torch.empty(N, 1, ..., 1).bernoulli_(1 - drop_prob) / (1 - drop_prob)``. Arguments and defaults
    are those of ``timm.layers.drop_path``. Stochastic depth is from Huang et al., "Deep Networks with Stochastic
    Depth", ECCV'16. The mask is that of :func:`dropout` with ``noise_shape=(N, 1, ..., 1)``.

    Args:
        x: shape (N, \*). Dtypes and devices as in :func:`dropout`.
        drop_prob: the probability that a sample is zeroed, from 0 to 1.
        training: if ``False``, returns ``x`` unchanged.
        scale_by_keep: if ``True``, multiplies the kept samples by ``1 / (1 - drop_prob)``.
        generator: as in :func:`dropout`.
        key: as in :func:`dropout`.
        shard: as in :func:`dropout`.

    Returns:
        A tensor of x's shape and dtype. It is ``x`` itself if ``drop_prob`` is 0, ``training`` is ``False`` or ``x`` is
        empty.

    Raises:
        ValueError: as :func:`dropout`.
        TypeError: as :func:`dropout`.
        RuntimeError: as :func:`dropout`.

    Example:
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
