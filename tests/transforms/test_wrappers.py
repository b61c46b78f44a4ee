"""Tensor subclasses that wrap a tensor (``__torch_dispatch__``): they have the mask of the wrapped tensor."""

import pytest
import torch
from tables import FUNCTIONS, KEY, SEED, P, drawn_keys, inputs
from torch import Tensor, func
from torch.utils._pytree import tree_map_only

import fused_dropout as fd


class Wrapper(Tensor):
    """Runs each operator on the wrapped tensors, and wraps the result."""

    refused: tuple = ()
    seen: list

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self, **_):
        return f"{type(self).__name__}({self.inner})"

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, meta, size, stride):
        return cls(tensors["inner"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        cls.seen.append(operator.name())
        if operator.name().split(".")[0] in cls.refused:
            raise NotImplementedError(f"{cls.__name__} has no rule for {operator}")
        inner_args, inner_kwargs = tree_map_only(Wrapper, lambda x: x.inner, (args, kwargs or {}))
        result = operator(*inner_args, **inner_kwargs)
        if operator.name().split(".")[0].endswith("_"):
            return args[0]  # the tensor that was changed in place
        return tree_map_only(Tensor, cls, result)


class WithTorchFunction(Wrapper):
    """torch's default ``__torch_function__``."""

    __torch_function__ = Tensor.__torch_function__


class WithoutWhere(Wrapper):
    """Like subclasses that implement only some operators."""

    refused = ("aten::where", "fused_dropout::apply", "fused_dropout::apply_", "fused_dropout::keep_mask")


@pytest.fixture(autouse=True)
def _nothing_seen():
    Wrapper.seen = []


for_functions = pytest.mark.parametrize("name", FUNCTIONS)
for_wrappers = pytest.mark.parametrize("kind", [Wrapper, WithTorchFunction])


def expected(function, x, key):
    """The value and the gradient of its sum of cubes."""
    x = x.clone().requires_grad_()
    y = function.formula(x, function.mask_of(key))
    (y * y * y).sum().backward()
    return y.detach(), x.grad


@for_wrappers
@for_functions
def test_the_mask_of_a_key(name, kind):
    function, x = FUNCTIONS[name], inputs()[0]
    wrapped = kind(x).requires_grad_()
    y = function.make(key=KEY)(wrapped)
    assert type(y) is kind
    (y * y * y).sum().backward()
    assert type(wrapped.grad) is kind
    torch.testing.assert_close((y.detach().inner, wrapped.grad.inner), expected(function, x, KEY))


@for_functions
@pytest.mark.parametrize("own", [False, True], ids=["default", "generator"])
def test_the_mask_that_a_plain_tensor_draws(name, own):
    function, x = FUNCTIONS[name], inputs()[0]
    options = {"generator": torch.Generator().manual_seed(SEED)} if own else {}
    wrapped = Wrapper(x).requires_grad_()
    torch.manual_seed(SEED)
    y = function.make(**options)(wrapped)
    (y * y * y).sum().backward()
    torch.testing.assert_close((y.detach().inner, wrapped.grad.inner), expected(function, x, drawn_keys(1)[0]))


@for_functions
def test_layout(name):
    """The mask follows the element order of the wrapped tensor."""
    function, x = FUNCTIONS[name], inputs()[0].to(memory_format=torch.channels_last)
    got = function.make(key=KEY)(Wrapper(x)).inner
    torch.testing.assert_close(got, function.make(key=KEY)(x))


def test_transforms():
    function, x = FUNCTIONS["dropout"], inputs()[0]
    drop = function.make(key=KEY)
    y, gradient = expected(function, x, KEY)
    got = func.grad(lambda x: (drop(x) ** 3).sum())(Wrapper(x))
    torch.testing.assert_close(got.inner, gradient)
    got = func.jvp(drop, (Wrapper(x),), (Wrapper(x),))[1]
    torch.testing.assert_close(got.inner, y)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    torch._dynamo.reset()
    x = inputs()[0]
    got = torch.compile(lambda x: fd.dropout(x, P, key=KEY), backend=backend, fullgraph=True)(Wrapper(x))
    torch.testing.assert_close(got.inner, fd.dropout(x, P, key=KEY))


class TestWithoutARule:
    @pytest.mark.parametrize("name", ["dropout", "alpha", "in_place"])
    def test_torchs_own_dropout_serves(self, name):
        function, x = FUNCTIONS[name], inputs()[0]
        wrapped = WithoutWhere(x).requires_grad_()
        y = function.make()(wrapped)
        assert {"aten::native_dropout", "aten::bernoulli_.float"} & set(Wrapper.seen)
        (y * y * y).sum().backward()
        mask = function.mask_shown_by(y.detach().inner)
        assert 0.5 < mask.float().mean() < 0.9
        torch.testing.assert_close(y.detach().inner, function.formula(x, mask))
        slope = function.formula(x + 1, mask) - function.formula(x, mask)
        torch.testing.assert_close(wrapped.grad.inner, 3 * y.detach().inner ** 2 * slope, rtol=1e-4, atol=1e-4)

    def test_a_key_is_refused(self):
        for options in ({"key": KEY}, {"generator": torch.Generator()}):
            with pytest.raises(TypeError, match="are for strided tensors"):
                fd.dropout(WithoutWhere(inputs()[0]), P, **options)
