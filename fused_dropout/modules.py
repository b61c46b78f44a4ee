"""Subclasses of torch's dropout modules that call the fused functions, and timm's ``DropPath``.

They differ from torch's modules only in ``forward``, and in the attributes ``generator`` and ``key``. A scripted module
ignores both attributes. With one of them, an input that the kernels do not support is an error. ``torch.export`` and
``torch.jit.trace`` record the mask of a key, and refuse a generator.
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
    """Whether FX should record a call of this module as one node, as it does for torch's modules.

    Such a graph follows ``train()`` and ``eval()``.
    """
    return isinstance(proxy.tracer, Tracer) and proxy.tracer.root is not module


def recorded(module: nn.Module, proxy: Proxy) -> Any:
    """Records a call of this module on the proxy in the FX graph."""
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (proxy,), {})


class Keyed(nn.Module):
    """The attributes ``generator`` and ``key`` of the modules.

    Their defaults are class attributes, because ``convert`` assigns to ``__class__`` of a module and runs no
    ``__init__``. A copy or a pickle of a module has a generator of its own, in the same state.
    """

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
        if name == "qconfig":  # torch starts to quantize the module, and knows only its own classes
            from .swap.convert import revert

            revert(self)
        nn.Module.__setattr__(self, name, value)

    def extra_repr(self) -> str:
        shown = {"generator": self.generator, "key": self.key, "noise_shape": getattr(self, "noise_shape", None)}
        return super().extra_repr() + "".join(f", {name}={_repr(x)}" for name, x in shown.items() if x is not None)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled uint64 tensor cannot be loaded (torch 2.13).
        return self.__dict__ | ({} if self.key is None else {"key": self.key.view(torch.int64)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.key is not None:
            self.key = self.key.view(torch.uint64)


def _repr(value: object) -> str:
    if isinstance(value, Tensor) and torch.compiler.is_compiling():
        return "..."  # vmap calls the repr of a module, and Dynamo cannot trace the repr of a tensor
    return f"Generator({value.device})" if isinstance(value, Generator) else repr(value)


class Fused(Keyed, nn.modules.dropout._DropoutNd):
    """Base of the modules with torch's arguments ``p`` and ``inplace``. Adds ``generator`` and ``key``."""

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, generator: Generator | None = None, key: Tensor | None = None
    ) -> None:
        check_number(p)
        super().__init__(p, inplace)
        self._set(generator, key)


class Dropout(Fused, nn.Dropout):
    r"""Sets each element to zero with probability ``p`` in training, and multiplies the others by ``1 / (1 - p)``.

    In PyTorch: ``torch.nn.Dropout(p, inplace)``, of which this is a subclass. It calls :func:`dropout`.

    Args:
        p: the probability that an element is zeroed, from 0 to 1. Read at each call.
        inplace: if ``True``, overwrites the input.
        generator: as in :func:`dropout`. Stored as an attribute and read at each call; copied with the module.
        key: as in :func:`dropout`. Stored as an attribute and read at each call: every call applies the same mask. It
            is not part of the state dict and does not move with the module; a key on the CPU works on every device.
        noise_shape: the shape of the mask, as in :func:`dropout`. Default: the input's shape

    Shape: the input has any shape, and the output has the same.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``key`` has a wrong shape or dtype.
        TypeError: ``p`` is not a number; ``generator``, ``key`` or ``noise_shape`` has a wrong type.

    Example:
        >>> fd.Dropout(0.5, key=fd.key(1))(torch.ones(4))
        tensor([2., 0., 2., 0.])
        >>> over_time = fd.Dropout(p=0.2, noise_shape=(1, None, None))  # (T, N, C): one mask for all T
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

    In PyTorch: ``torch.nn.Dropout1d(p, inplace)``, of which this is a subclass. It calls :func:`dropout1d`.

    Args:
        p: the probability that a channel is zeroed, from 0 to 1. Read at each call.
        inplace: if ``True``, overwrites the input.
        generator: as in :func:`dropout`. Stored as an attribute and read at each call; copied with the module.
        key: as in :func:`dropout`. Stored as an attribute and read at each call: every call applies the same mask. It
            is not part of the state dict and does not move with the module; a key on the CPU works on every device.

    Shape: the input is (N, C, L) or (C, L), and the output has the same shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``key`` has a wrong shape or dtype.
        TypeError: ``p`` is not a number; ``generator`` or ``key`` has a wrong type.

    Example:
        >>> fd.Dropout1d(0.5, key=fd.key(1))(torch.ones(1, 4, 2))[0, :, 0]
        tensor([2., 0., 2., 0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout1d(input, self.p, self.training, self.inplace)
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        return family.dropout1d(input, self.p, self.training, self.inplace, generator=self.generator, key=self.key)


class Dropout2d(Fused, nn.Dropout2d):
    r"""Sets whole channels to zero with probability ``p`` in training, and scales the rest by 1 / (1 - p).

    In PyTorch: ``torch.nn.Dropout2d(p, inplace)``, of which this is a subclass. It calls :func:`dropout2d`.

    Args:
        p: the probability that a channel is zeroed, from 0 to 1. Read at each call.
        inplace: if ``True``, overwrites the input.
        generator: as in :func:`dropout`. Stored as an attribute and read at each call; copied with the module.
        key: as in :func:`dropout`. Stored as an attribute and read at each call: every call applies the same mask. It
            is not part of the state dict and does not move with the module; a key on the CPU works on every device.

    Shape: the input is (N, C, H, W), or (N, C, L) with torch's warning. The output has the same shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``key`` has a wrong shape or dtype.
        TypeError: ``p`` is not a number; ``generator`` or ``key`` has a wrong type.

    Example:
        >>> fd.Dropout2d(0.5, key=fd.key(1))(torch.ones(1, 4, 2, 2))[0, :, 0, 0]
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

    In PyTorch: ``torch.nn.Dropout3d(p, inplace)``, of which this is a subclass. It calls :func:`dropout3d`.

    Args:
        p: the probability that a channel is zeroed, from 0 to 1. Read at each call.
        inplace: if ``True``, overwrites the input.
        generator: as in :func:`dropout`. Stored as an attribute and read at each call; copied with the module.
        key: as in :func:`dropout`. Stored as an attribute and read at each call: every call applies the same mask. It
            is not part of the state dict and does not move with the module; a key on the CPU works on every device.

    Shape: the input is (N, C, D, H, W) or (C, D, H, W), and the output has the same shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``key`` has a wrong shape or dtype.
        TypeError: ``p`` is not a number; ``generator`` or ``key`` has a wrong type.

    Example:
        >>> fd.Dropout3d(0.5, key=fd.key(1))(torch.ones(1, 4, 2, 2, 2))[0, :, 0, 0, 0]
        tensor([2., 0., 2., 0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.dropout3d(input, self.p, self.training, self.inplace)
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        return family.dropout3d(input, self.p, self.training, self.inplace, generator=self.generator, key=self.key)


class AlphaDropout(Fused, nn.AlphaDropout):
    r"""Sets elements to SELU's limit with probability ``p`` in training, and keeps mean 0 and variance 1.

    In PyTorch: ``torch.nn.AlphaDropout(p)``, of which this is a subclass. It calls :func:`alpha_dropout`, which has the
    formula and its source.

    Args:
        p: the probability that an element is dropped, from 0 to 1. Read at each call.
        inplace: has no effect, as in torch.
        generator: as in :func:`dropout`. Stored as an attribute and read at each call; copied with the module.
        key: as in :func:`dropout`. Stored as an attribute and read at each call: every call applies the same mask. It
            is not part of the state dict and does not move with the module; a key on the CPU works on every device.

    Shape: the input has any shape, and the output has the same.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``key`` has a wrong shape or dtype.
        TypeError: ``p`` is not a number; ``generator`` or ``key`` has a wrong type.

    Example:
        >>> fd.AlphaDropout(0.5, key=fd.key(1))(torch.zeros(4))
        tensor([ 0.7792, -0.7792,  0.7792, -0.7792])
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.alpha_dropout(input, self.p, self.training)
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        return family.alpha_dropout(input, self.p, self.training, generator=self.generator, key=self.key)


class FeatureAlphaDropout(Fused, nn.FeatureAlphaDropout):
    r"""Sets channels to SELU's limit with probability ``p`` in training, and keeps mean 0 and variance 1.

    In PyTorch: ``torch.nn.FeatureAlphaDropout(p)``, of which this is a subclass. It calls
    :func:`feature_alpha_dropout`, which has the formula and its source.

    Args:
        p: the probability that a channel is dropped, from 0 to 1. Read at each call.
        inplace: has no effect, as in torch.
        generator: as in :func:`dropout`. Stored as an attribute and read at each call; copied with the module.
        key: as in :func:`dropout`. Stored as an attribute and read at each call: every call applies the same mask. It
            is not part of the state dict and does not move with the module; a key on the CPU works on every device.

    Shape: the input is (N, C, \*), and the output has the same shape.

    Raises:
        ValueError: ``p`` is not between 0 and 1; ``key`` has a wrong shape or dtype.
        TypeError: ``p`` is not a number; ``generator`` or ``key`` has a wrong type.

    Example:
        >>> fd.FeatureAlphaDropout(0.5, key=fd.key(1))(torch.zeros(1, 4, 2))[0, :, 0]
        tensor([ 0.7792, -0.7792,  0.7792, -0.7792])
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.feature_alpha_dropout(input, self.p, self.training)
        if isinstance(input, Proxy) and is_leaf(self, input):
            return recorded(self, input)
        return family.feature_alpha_dropout(input, self.p, self.training, generator=self.generator, key=self.key)


class DropPath(Keyed):
    r"""Sets whole samples to zero with probability ``drop_prob`` in training (stochastic depth).

    In timm: ``timm.layers.DropPath(drop_prob, scale_by_keep)``, with the same arguments and attributes. It calls
    :func:`drop_path`, which has the PyTorch line and the source.

    Args:
        drop_prob: the probability that a sample is zeroed, from 0 to 1. Read and checked at each call.
        scale_by_keep: if ``True``, multiplies the kept samples by ``1 / (1 - drop_prob)``.
        generator: as in :func:`dropout`. Stored as an attribute and read at each call; copied with the module.
        key: as in :func:`dropout`. Stored as an attribute and read at each call: every call applies the same mask. It
            is not part of the state dict and does not move with the module; a key on the CPU works on every device.

    Shape: the input is (N, \*), and the output has the same shape.

    Raises:
        ValueError: ``key`` has a wrong shape or dtype.
        TypeError: ``generator`` or ``key`` has a wrong type.

    Example:
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
