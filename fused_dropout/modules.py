"""The dropout modules of ``torch.nn`` on the fused path, and timm's ``DropPath``.

Each is torch's module in all but its forward, which calls the function of its name in :mod:`fused_dropout`. In addition
all take keyword-only arguments, which are attributes of the same names, read at each call:

generator: where keys are drawn from, in place of the default generator of the input's device. A copy or a pickle of the
    module has a generator of its own, in the same state.
key: a uint64 tensor of shape (2,): with it each call in training applies the same mask. It is not part of the
    state_dict, and does not move with the module; on the CPU it serves inputs on every device.

Both are for the fused path: a scripted module does without, and an input that goes to torch's own function is an error.
``torch.export`` and ``torch.jit.trace`` record the mask of a key, and refuse a generator.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.fx import Proxy, Tracer

from . import family, functional
from .arguments import check_generator, check_key, check_number, noise_sizes


def is_leaf(module: nn.Module, proxy: Proxy) -> bool:
    """Whether FX records a call of this module, as it does of torch's: the graph then knows eval()."""
    return isinstance(proxy.tracer, Tracer) and proxy.tracer.root is not module


def recorded(module: nn.Module, proxy: Proxy) -> Any:
    """Records a call of this module on the proxy in the FX graph."""
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (proxy,), {})


class Keyed(nn.Module):
    """generator and key; class attributes, so that a module of torch's can become one of these by an assignment to its
    ``__class__``."""

    generator: Generator | None = None
    key: Tensor | None = None

    def _set(self, generator: Generator | None, key: Tensor | None) -> None:
        if generator is not None:
            check_generator(generator)
            self.generator = generator
        if key is not None:
            check_key(key)
            self.key = key

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":  # torch quantizes the module now, and its tables have torch's own classes only
            from .convert import revert

            revert(self)
        nn.Module.__setattr__(self, name, value)

    def extra_repr(self) -> str:
        shown = {"generator": self.generator, "key": self.key, "noise_shape": getattr(self, "noise_shape", None)}
        return super().extra_repr() + "".join(f", {name}={_repr(x)}" for name, x in shown.items() if x is not None)

    def __getstate__(self) -> dict[str, Any]:
        # pickle writes uint64 tensors in a way that it cannot read (torch 2.13).
        return self.__dict__ | ({} if self.key is None else {"key": self.key.view(torch.int64)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.key is not None:
            self.key = self.key.view(torch.uint64)


def _repr(value: object) -> str:
    if isinstance(value, Tensor) and torch.compiler.is_compiling():
        return "..."  # vmap takes the name of a module from its repr, and Dynamo does not trace that of a tensor
    return f"Generator({value.device})" if isinstance(value, Generator) else repr(value)


class Fused(Keyed, nn.modules.dropout._DropoutNd):
    """The arguments of torch's dropout modules, and a generator and a key."""

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, generator: Generator | None = None, key: Tensor | None = None
    ) -> None:
        check_number(p)
        super().__init__(p, inplace)
        self._set(generator, key)


class Dropout(Fused, nn.Dropout):
    r"""Sets each element of the input to zero with probability ``p`` in training, and scales the rest by 1 / (1 - p).

    An :class:`torch.nn.Dropout` that calls :func:`fused_dropout.dropout`.

    Args:
        p: probability of an element to be zeroed, between 0 and 1; read at each call. Default: 0.5
        inplace: overwrite the input. Default: ``False``
        generator, key: see :mod:`fused_dropout.modules`.
        noise_shape: the mask's shape, each size 1 or the input's, for which ``None`` may stand: as in
            :func:`fused_dropout.dropout`. Default: the input's shape

    Shape: input and output have the same, any shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1.

    Example::

        >>> m = fd.Dropout(p=0.2)
        >>> m(torch.randn(20, 16)).shape
        torch.Size([20, 16])
        >>> over_time = fd.Dropout(p=0.2, noise_shape=(1, None, None))  # (T, N, C): one mask for all steps
        >>> (over_time(torch.ones(50, 4, 8)).std(0) == 0).all()
        tensor(True)
    """

    noise_shape: Sequence[int | None] | None = None

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        generator: Generator | None = None,
        key: Tensor | None = None,
        noise_shape: Sequence[int | None] | None = None,
    ) -> None:
        super().__init__(p, inplace, generator=generator, key=key)
        if noise_shape is not None:
            self.noise_shape = tuple(noise_sizes(noise_shape))

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout(input, self.p, self.training, self.inplace)
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        return functional.dropout(
            input,
            self.p,
            self.training,
            self.inplace,
            generator=self.generator,
            key=self.key,
            noise_shape=self.noise_shape,
        )


class Dropout1d(Fused, nn.Dropout1d):
    r"""Sets whole channels to zero with probability ``p`` in training, and scales the rest by 1 / (1 - p).

    An :class:`torch.nn.Dropout1d` that calls :func:`fused_dropout.dropout1d`.

    Args:
        p: probability of a channel to be zeroed, between 0 and 1; read at each call. Default: 0.5
        inplace: overwrite the input. Default: ``False``
        generator, key: see :mod:`fused_dropout.modules`.

    Shape: input and output (N, C, L) or (C, L).

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout1d(input, self.p, self.training, self.inplace)
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        return family.dropout1d(input, self.p, self.training, self.inplace, generator=self.generator, key=self.key)


class Dropout2d(Fused, nn.Dropout2d):
    r"""Sets whole channels to zero with probability ``p`` in training, and scales the rest by 1 / (1 - p).

    An :class:`torch.nn.Dropout2d` that calls :func:`fused_dropout.dropout2d`.

    Args:
        p: probability of a channel to be zeroed, between 0 and 1; read at each call. Default: 0.5
        inplace: overwrite the input. Default: ``False``
        generator, key: see :mod:`fused_dropout.modules`.

    Shape: input and output (N, C, H, W); (N, C, L) with torch's warning.

    Raises:
        ValueError: ``p`` is not between 0 and 1.

    Example::

        >>> y = fd.Dropout2d(0.5, key=fd.key(1))(torch.ones(1, 4, 2, 2))
        >>> y[0, :, 0, 0]
        tensor([2., 0., 2., 0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout2d(input, self.p, self.training, self.inplace)
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        return family.dropout2d(input, self.p, self.training, self.inplace, generator=self.generator, key=self.key)


class Dropout3d(Fused, nn.Dropout3d):
    r"""Sets whole channels to zero with probability ``p`` in training, and scales the rest by 1 / (1 - p).

    An :class:`torch.nn.Dropout3d` that calls :func:`fused_dropout.dropout3d`.

    Args:
        p: probability of a channel to be zeroed, between 0 and 1; read at each call. Default: 0.5
        inplace: overwrite the input. Default: ``False``
        generator, key: see :mod:`fused_dropout.modules`.

    Shape: input and output (N, C, D, H, W) or (C, D, H, W).

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout3d(input, self.p, self.training, self.inplace)
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        return family.dropout3d(input, self.p, self.training, self.inplace, generator=self.generator, key=self.key)


class AlphaDropout(Fused, nn.AlphaDropout):
    r"""Sets elements to SELU's negative saturation with probability ``p`` in training, and keeps mean 0 and variance 1.

    An :class:`torch.nn.AlphaDropout` that calls :func:`fused_dropout.alpha_dropout`.

    Args:
        p: probability of an element to be dropped, between 0 and 1; read at each call. Default: 0.5
        inplace: without effect, as in torch.
        generator, key: see :mod:`fused_dropout.modules`.

    Shape: input and output have the same, any shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.alpha_dropout(input, self.p, self.training)
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        return family.alpha_dropout(input, self.p, self.training, generator=self.generator, key=self.key)


class FeatureAlphaDropout(Fused, nn.FeatureAlphaDropout):
    r"""Sets channels to SELU's negative saturation with probability ``p`` in training, and keeps mean 0 and variance 1.

    An :class:`torch.nn.FeatureAlphaDropout` that calls :func:`fused_dropout.feature_alpha_dropout`.

    Args:
        p: probability of a channel to be dropped, between 0 and 1; read at each call. Default: 0.5
        inplace: without effect, as in torch.
        generator, key: see :mod:`fused_dropout.modules`.

    Shape: input and output (N, C, \*).

    Raises:
        ValueError: ``p`` is not between 0 and 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.feature_alpha_dropout(input, self.p, self.training)
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        return family.feature_alpha_dropout(input, self.p, self.training, generator=self.generator, key=self.key)


class DropPath(Keyed):
    r"""Stochastic depth: sets whole samples to zero with probability ``drop_prob`` in training.

    timm's module of this name, with its arguments and attributes; calls :func:`fused_dropout.drop_path`.

    Args:
        drop_prob: probability of a sample to be zeroed, between 0 and 1; read at each call. Default: 0
        scale_by_keep: multiply the other samples by 1 / (1 - drop_prob). Default: ``True``
        generator, key: see :mod:`fused_dropout.modules`.

    Shape: input and output (N, \*).

    Example::

        >>> fd.DropPath(0.5, key=fd.key(1))(torch.ones(4, 2))
        tensor([[2., 2.],
                [0., 0.],
                [2., 2.],
                [0., 0.]])
    """

    def __init__(
        self,
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        *,
        generator: Generator | None = None,
        key: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep
        self._set(generator, key)

    def extra_repr(self) -> str:
        return f"drop_prob={round(self.drop_prob, 3):0.3f}" + super().extra_repr()

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self.drop_prob == 0.0 or not self.training:
                return x
            kept = torch.rand([x.size(0)] + [1] * (x.dim() - 1), device=x.device) >= self.drop_prob
            scaled = x / (1.0 - self.drop_prob) if self.scale_by_keep and self.drop_prob < 1.0 else x
            return torch.where(kept, scaled, torch.zeros_like(x))
        if isinstance(x, Proxy) and is_leaf(self, x):
            return recorded(self, x)
        return family.drop_path(
            x, self.drop_prob, self.training, self.scale_by_keep, generator=self.generator, key=self.key
        )
