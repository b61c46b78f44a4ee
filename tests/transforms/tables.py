"""The tables of the matrix: transforms, functions, sources of keys, compilers.

The expected result of each cell follows from the contract. ``fd.keep_mask`` gives the mask of a key.
``Function.formula``, in torch's own operations, gives values and derivatives under the same transform, not compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, func, nn

import fused_dropout as fd

P, SEED = 0.3, 11
SHAPE, SAMPLES = (8, 3, 2, 1), 4
KEY = torch.tensor([5, 2**40 + 1], dtype=torch.uint64)


def inputs() -> Tensor:
    """A batch for vmap. The other transforms use its first sample. No value is near 0."""
    return torch.rand(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(SEED)) + 0.5


# ---- functions


@dataclass(frozen=True)
class Function:
    """make: makes the function under test from options (generator, key or neither). noise: the shape of its mask."""

    make: Callable[..., Callable[[Tensor], Tensor]]
    noise: tuple[int, ...] = SHAPE
    alpha: bool = False

    def formula(self, x: Tensor, mask: Tensor) -> Tensor:
        """The documented result, in torch's operations."""
        if not self.alpha:
            return x * mask / (1 - P)
        saturation = 1.7580993408473766
        a = 1 / sqrt((1 - P) * (1 + P * saturation**2))
        return (x * mask - saturation * (~mask)) * a + a * saturation * P

    def mask_of(self, key: Tensor) -> Tensor:
        return fd.keep_mask(self.noise, P, key).expand(SHAPE)

    def mask_shown_by(self, y: Tensor) -> Tensor:
        """The mask, taken from an output of this function: dropped elements have a constant value."""
        dropped = self.formula(torch.zeros_like(y), torch.zeros_like(y, dtype=torch.bool))
        return ~torch.isclose(y, dropped)


_CHANNELS = (*SHAPE[:2], 1, 1)
FUNCTIONS = {
    "dropout": Function(lambda **options: lambda x: fd.dropout(x, P, **options)),
    "dropout2d": Function(lambda **options: lambda x: fd.dropout2d(x, P, **options), _CHANNELS),
    "alpha": Function(lambda **options: lambda x: fd.alpha_dropout(x, P, True, **options), alpha=True),
    "feature_alpha": Function(
        lambda **options: lambda x: fd.feature_alpha_dropout(x, P, True, **options), _CHANNELS, alpha=True
    ),
    "noise_shape": Function(
        lambda **options: lambda x: fd.dropout(x, P, noise_shape=(None, 1, 2, 1), **options), (SHAPE[0], 1, 2, 1)
    ),
    "DropPath": Function(lambda **options: fd.DropPath(P, **options), (SHAPE[0], 1, 1, 1)),
    "in_place": Function(lambda **options: lambda x: fd.dropout(x * 1, P, inplace=True, **options)),
}


# ---- transforms: each converts f to a function of x that returns f(x) and derivatives


def _loss(y: Tensor) -> Tensor:
    return (y * y * y).sum()


def _with_output(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def loss(x):
        y = f(x)
        return _loss(y), y

    return loss


def _output_first(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[1], pair[0]


def grad(f):
    return lambda x: _output_first(func.grad(_with_output(f), has_aux=True)(x))


def vjp(f):
    def run(x):
        y, pull = func.vjp(f, x)
        return y, *pull(x.cos())

    return run


def jvp(f):
    return lambda x: func.jvp(f, (x,), (x.cos(),))


def _twice(f):
    def both(x):
        y = f(x)
        return y, y

    return both


def jacrev(f):
    return lambda x: _output_first(func.jacrev(_twice(f), has_aux=True)(x))


def jacfwd(f):
    return lambda x: _output_first(func.jacfwd(_twice(f), has_aux=True, randomness="same")(x))


def hessian(f):
    return lambda x: (func.hessian(lambda x: _loss(f(x)))(x),)


def linearize(f):
    def run(x):
        y, push = func.linearize(f, x)
        return y, push(x.cos())

    return run


def dual_level(f):
    def run(x):
        with fwAD.dual_level():
            y, tangent = fwAD.unpack_dual(f(fwAD.make_dual(x, x.cos())))
        return y, tangent

    return run


class _Scaled(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.weight = f, nn.Parameter(torch.ones(SHAPE))

    def forward(self, x):
        return self.f(self.weight * x)


def functional_call(f):
    """The gradient with respect to the parameters, x. The data are constant."""
    net, data = _Scaled(f), torch.full(SHAPE, 0.75)
    return grad(lambda weight: func.functional_call(net, {"weight": weight}, (data,)))


def value(f):
    return lambda x: (f(x),)


def vmap(randomness):
    return lambda f: lambda x: (func.vmap(f, randomness=randomness)(x),)


def vmap_grad(f):
    return func.vmap(grad(f), randomness="different")


def grad_vmap(f):
    return grad(func.vmap(f, randomness="same"))


@dataclass(frozen=True)
class Transform:
    """each: for transforms that batch, the transform of one sample. draws: "one" key per call, a key for "each" sample,
    or an "error".

    traced: whether Dynamo traces it without a graph break (it does not trace linearize). redraws: whether the
    derivative has another mask if no key is given, as in torch. For example, linearize calls f once for the value and
    once for the derivative.
    """

    make: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], tuple[Tensor, ...]]]
    each: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], tuple[Tensor, ...]]] | None = None
    draws: str = "one"
    traced: bool = True
    redraws: bool = False


TRANSFORMS = {
    "grad": Transform(grad),
    "vjp": Transform(vjp),
    "jvp": Transform(jvp),
    "jacrev": Transform(jacrev),
    "jacfwd": Transform(jacfwd),
    "hessian": Transform(hessian, draws="error"),  # torch's hessian has no randomness option
    "linearize": Transform(linearize, traced=False, redraws=True),
    "vmap_same": Transform(vmap("same"), value),
    "vmap_different": Transform(vmap("different"), value, draws="each"),
    "vmap_error": Transform(vmap("error"), value, draws="error"),
    "vmap_of_grad": Transform(vmap_grad, grad, draws="each"),
    "grad_of_vmap": Transform(grad_vmap, grad),
    "functional_call": Transform(functional_call),
    "dual_level": Transform(dual_level),
}

# ---- keys and compilers


def default_generator():
    torch.manual_seed(SEED)
    return {}


SOURCES = {
    "default": default_generator,
    "generator": lambda: {"generator": torch.Generator().manual_seed(SEED)},
    "key": lambda: {"key": KEY},
}
COMPILERS = {"none": None, "eager": "eager", "aot_eager": "aot_eager", "inductor": "inductor"}
COMPILE_AS = ("kernel", "fuse")  # values of FUSED_DROPOUT_COMPILE


def drawn_keys(n: int) -> list[Tensor]:
    """The keys that n calls take from a CPU generator of this seed, one after the other."""
    generator = torch.Generator().manual_seed(SEED)
    seeds = [int(torch.empty((), dtype=torch.int64).random_(generator=generator)) for _ in range(n)]
    return [torch.tensor([seed, 0], dtype=torch.uint64) for seed in seeds]
