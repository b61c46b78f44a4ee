"""Dropout at inference: predictions with their spread (Gal and Ghahramani, "Dropout as a Bayesian Approximation",
ICML'16).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .arguments import check_module

__all__ = ["Prediction", "mc_dropout", "mc_predict"]


class Prediction(NamedTuple):
    """mean, std: of the model's output over the passes, each of the output's shape; float32 for 16-bit outputs."""

    mean: Tensor
    std: Tensor


@contextmanager
def mc_dropout(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the dropout modules of the model are in training mode, and nothing else: normalization keeps its
    running statistics. On exit, by an exception too, each module's mode is as it was.

    Dropout modules are those of ``torch.nn``, of this package, and their subclasses. Dropout that is not a module of
    its own follows its owner's mode, and stays off: that of ``nn.LSTM`` and ``nn.MultiheadAttention``, and functional
    calls; so does ``DropPath``. Within, ``nn.TransformerEncoderLayer`` does not take the fast path that it has for eval
    mode, which is without its dropout modules.

    Args:
        model: any module; usually in eval mode.

    Yields:
        The model.

    Example::

        >>> model = nn.Sequential(nn.Linear(4, 4), fd.Dropout(0.5)).eval()
        >>> with fd.mc_dropout(model):
        ...     model.training, model[1].training
        (False, True)
        >>> model[1].training
        False
    """
    check_module(model)
    modes = [(module, module.training) for module in model.modules() if isinstance(module, _DropoutNd)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in modes:
            module.training = True
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fast_path)


@torch.no_grad()
def mc_predict(model: nn.Module, *inputs: Any, passes: int = 20, **options: Any) -> Prediction:
    """Mean and standard deviation of the model's output over passes with dropout on, without gradients.

    A dropout module with a ``key`` of its own applies one mask in every pass, and adds nothing to the spread.

    Args:
        model: a module that returns a tensor; its mode is left as it is but for dropout (see :func:`mc_dropout`).
        inputs, options: what it is called with.
        passes: how many, 2 or more. Default: 20

    Returns:
        A named tuple ``(mean, std)`` of tensors of the output's shape; std is the unbiased estimate.

    Raises:
        ValueError: ``passes`` is less than 2.
        TypeError: ``model`` is not a module, or returns something other than a floating-point tensor.

    Example::

        >>> model = nn.Sequential(nn.Linear(4, 1), fd.Dropout(0.5)).eval()
        >>> mean, std = fd.mc_predict(model, torch.ones(8, 4), passes=10)
        >>> mean.shape, std.shape
        (torch.Size([8, 1]), torch.Size([8, 1]))
    """
    if passes < 2:
        raise ValueError(f"passes has to be 2 or more for a standard deviation, but is {passes}")
    with mc_dropout(model):
        mean = _output(model, inputs, options)
        squares = torch.zeros_like(mean)
        # Welford's update: one output in memory at a time, and no cancellation.
        for n in range(2, passes + 1):
            output = _output(model, inputs, options)
            difference = output - mean
            mean = mean + difference / n
            squares += difference * (output - mean)
    return Prediction(mean, (squares / (passes - 1)).sqrt())


def _output(model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    output = model(*inputs, **options)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        described = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"the model has to return a floating-point tensor, but returned {described}")
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
