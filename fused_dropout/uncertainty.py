"""Monte Carlo dropout: predictions with a standard deviation, from several passes with dropout on.

The method is from Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML'16.
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
    """The result of :func:`mc_predict`."""

    mean: Tensor
    """The mean of the model's output over the passes, of the output's shape. float32 for 16-bit outputs."""
    std: Tensor
    """The standard deviation over the passes (unbiased estimate), of the same shape and dtype."""


@contextmanager
def mc_dropout(model: nn.Module) -> Iterator[nn.Module]:
    """Puts the dropout modules of a model, and no others, into training mode inside a ``with`` block.

    In PyTorch: ``module.train()`` for each dropout module, and ``module.eval()`` for each at the end. Normalization
    layers keep their running statistics. On exit, also by an exception, each module gets its former mode back.

    The dropout modules are those of ``torch.nn`` and of this package, and their subclasses, but not ``DropPath``. Other
    dropout follows the mode of the module that contains it, and stays off: functional calls, and dropout inside
    ``nn.LSTM`` and ``nn.MultiheadAttention``. The block switches off the fast path of ``nn.TransformerEncoderLayer``
    for eval mode, which skips its dropout modules.

    Args:
        model: any module, usually in eval mode.

    Yields:
        The model.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
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
    """Computes mean and standard deviation of a model's output over several passes with dropout on.

    In PyTorch: ``torch.std_mean(torch.stack([model(*inputs) for _ in range(passes)]), 0)`` inside :func:`mc_dropout`
    and ``torch.no_grad()``. Here one output at a time is in memory. The method is from Gal and Ghahramani, "Dropout as
    a Bayesian Approximation", ICML'16, and the update formula from Welford, "Note on a method for calculating corrected
    sums of squares and products", Technometrics 4(3), 1962.

    A dropout module with a ``key`` applies the same mask in every pass, and so adds nothing to the deviation.

    Args:
        model: a module that returns a tensor. Only the mode of its dropout modules changes (see :func:`mc_dropout`).
        inputs: the positional arguments of the model.
        passes: the number of passes, 2 or more.
        options: the keyword arguments of the model.

    Returns:
        A named tuple ``(mean, std)`` of tensors of the output's shape. ``std`` is the unbiased estimate.

    Raises:
        ValueError: ``passes`` is less than 2.
        TypeError: ``model`` is not a module, or does not return a floating-point tensor.

    Example:
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
        # Welford's update avoids the cancellation that a sum of squares has.
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
