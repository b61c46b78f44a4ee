"""Wrong arguments: we refuse those that torch refuses. The error has torch's class, and names the value in one line."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dropout as fd

FAMILY = ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]
X = torch.ones(2, 3, 4)
KEY = fd.key(1)
SQUARE = torch.ones(1, 2, 4, 4)
# Calls of our functions with p and training.
CALLS = {name: lambda p, training, name=name, **more: getattr(fd, name)(X, p, training, **more) for name in FAMILY} | {
    "drop_path": lambda p, training, **more: fd.drop_path(X, p, training, **more),
    "dropout_add": lambda p, training, **more: fd.dropout_add(X, X, p, training, **more),
    "relu_dropout": lambda p, training, **more: fd.relu_dropout(X, p, training, **more),
    "dropout_linear": lambda p, training, **more: fd.dropout_linear(X, torch.ones(5, 4), None, p, training, **more),
}
WRONG_P = [-0.1, 1.1, float("nan"), float("inf"), -1, 2, torch.tensor(1.5), "0.5", None, [0.5], 1j, np.array(0.25)]
WRONG_P += [torch.tensor(0.25, requires_grad=True), torch.tensor([0.25]), torch.tensor([0.1, 0.2])]
WRONG_TRAINING = [None, 0, 1, "yes", np.bool_(True), torch.tensor(True)]


# torch warns about the number of dimensions.
pytestmark = pytest.mark.filterwarnings("ignore:dropout[23]d")


@pytest.fixture(autouse=True)
def _nothing_is_drawn(request):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    yield
    if "draws" not in request.node.name:
        assert torch.equal(torch.get_rng_state(), before)


def error_of(call, *args, **kwargs):
    """The class of the error that a call raises, and its text."""
    with pytest.raises(Exception) as raised:  # noqa: PT011
        call(*args, **kwargs)
    return raised.type, str(raised.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", WRONG_P, ids=repr)
def test_p(p, training):
    # torch refuses a p of several numbers when it compares them, with another class of error.
    theirs = {TypeError} if isinstance(p, torch.Tensor) and p.numel() > 1 else set()
    for name in FAMILY:
        wanted = theirs or {error_of(getattr(F, name), X, p, training)[0]}
        kind, text = error_of(CALLS[name], p, training)
        assert {kind} == wanted, (name, text)
        with fd.patched():
            assert {error_of(getattr(F, name), X, p, training)[0]} == wanted
    wanted = {error_of(CALLS[name], p, training) for name in CALLS}
    assert len(wanted) == 1
    ((kind, text),) = wanted
    assert "\n" not in text
    assert ("requires grad" if getattr(p, "requires_grad", False) else "between 0 and 1, but") in text
    assert error_of(fd.keep_mask, X, p, KEY) == (kind, text)
    assert error_of(fd.scaled_dot_product_attention, SQUARE, SQUARE, SQUARE, dropout_p=p) == (kind, text)


@pytest.mark.parametrize("training", WRONG_TRAINING, ids=repr)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_training(p, training):
    wanted = (TypeError, f"training has to be True or False, but is {training!r}")
    for name in CALLS:
        assert error_of(CALLS[name], p, training) == wanted, name
    for name in FAMILY:
        assert error_of(getattr(F, name), X, p, training)[0] is TypeError
        with fd.patched():
            assert error_of(getattr(F, name), X, p, training) == wanted
            # The short form raises torch's own error.
            short = torch.dropout if name[-1] == "d" else getattr(torch, name)
            assert error_of(short, X, p, training)[0] is TypeError


@pytest.mark.parametrize(
    "p", [0, 1, True, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor(1)], ids=repr
)
def test_what_torch_takes_draws(p):
    for name in FAMILY:
        getattr(F, name)(X, p, True)
    for call in CALLS.values():
        call(p, True)
        call(p, False)
    fd.keep_mask(X, p, KEY)
    assert fd.Dropout(p)(X).shape == X.shape


def test_p_that_requires_grad_when_compiled():
    def f(x, p):
        return fd.dropout(x, p)

    p = torch.tensor(0.5, requires_grad=True)
    assert "requires grad" in error_of(torch.compile(f, backend="eager"), X, p)[1]


def test_generator():
    wanted = (TypeError, "generator has to be a torch.Generator, but is 5")
    for training in (True, False):
        for call in CALLS.values():
            assert error_of(call, 0.5, training, generator=5) == wanted
    assert error_of(fd.scaled_dot_product_attention, SQUARE, SQUARE, SQUARE, dropout_p=0.5, generator=5) == wanted
    assert error_of(fd.Dropout, generator=5) == wanted
    for call in CALLS.values():
        kind, text = error_of(call, 0.5, True, generator=torch.Generator(), key=KEY)
        assert kind is ValueError
        assert "both" in text


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.uint64), ValueError, r"torch.uint64 (3,)"),
        (torch.zeros((), dtype=torch.uint64), ValueError, r"torch.uint64 ()"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"torch.int64 (2,)"),
        (torch.zeros(2, dtype=torch.uint64, device="meta"), ValueError, "meta"),
        (42, TypeError, "as fd.key(42) makes, but is 42"),
        ((1, 2), TypeError, "as fd.key(seed) makes, but is (1, 2)"),
    ],
    ids=repr,
)
def test_key(bad, error, message):
    for call in CALLS.values():
        kind, text = error_of(call, 0.5, True, key=bad)
        assert kind is error
        assert message in text
    kind, text = error_of(fd.keep_mask, (3,), 0.5, bad)
    assert kind is error
    assert message in text
    if message != "meta":  # without an input, a key on any device is valid
        for call in (lambda key: fd.Dropout(key=key), lambda key: fd.fold_in(key, 1), fd.split):
            assert error_of(call, bad)[0] is error


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fd.key("a"), TypeError, "seed has to be an integer, but is 'a'"),
        (lambda: fd.key(2**64), ValueError, "seed has to be from -2**63 to 2**64 - 1, but is 18446744073709551616"),
        (lambda: fd.fold_in(KEY, 1.5), TypeError, "data has to be an integer, but is 1.5"),
        (lambda: fd.split(KEY, 1.5), TypeError, "n has to be an integer, but is 1.5"),
        (lambda: fd.split(KEY, 0), ValueError, "n has to be 1 or more, but is 0"),
        (lambda: fd.keep_mask(X, 0.5, KEY, start=-1), ValueError, "start has to be from 0 to 2**63 - 1, but is -1"),
        (lambda: fd.keep_mask(X, 0.5, KEY, start=2**63), ValueError, f"to 2**63 - 1, but is {2**63}"),
        (
            lambda: fd.keep_mask(X, 0.5, KEY, start=2**63 - 1),
            RuntimeError,
            "largest element index has to be below 2**63",
        ),
        (lambda: fd.keep_mask(X, 0.5, KEY, start=1.5), TypeError, "start has to be an integer, but is 1.5"),
        (lambda: fd.keep_mask(3, 0.5, KEY), TypeError, "a shape has to be a sequence of integers, but is 3"),
        (lambda: fd.keep_mask((4.0,), 0.5, KEY), TypeError, "a shape has to be a sequence of integers, but is (4.0,)"),
        (lambda: fd.keep_mask((-1,), 0.5, KEY), ValueError, "a size has to be 0 or more, but the shape is (-1,)"),
        (lambda: fd.dropout(X, noise_shape=(2, 3.0, 1)), TypeError, "integers and None, but is (2, 3.0, 1)"),
        (lambda: fd.dropout(X, noise_shape=4), TypeError, "integers and None, but is 4"),
        (lambda: fd.Dropout(noise_shape=4), TypeError, "integers and None, but is 4"),
        (lambda: fd.Dropout(None), TypeError, "p has to be a number between 0 and 1, but is None"),
        (lambda: fd.DropoutLinear(3, 2, p="a"), TypeError, "p has to be a number between 0 and 1, but is 'a'"),
        (
            lambda: fd.dropout(X.to("meta"), generator=torch.Generator()),
            TypeError,
            "on CPU or CUDA, but the input is a",
        ),
        (lambda: fd.dropout(torch.arange(3), key=KEY), TypeError, "torch.int64"),
        (lambda: fd.dropout_linear(X, None), TypeError, "must be Tensor, not NoneType"),
        (lambda: fd.mc_predict(3, X), TypeError, "model has to be an nn.Module, but is 3"),
    ],
)
def test_one_line_that_names_the_value(call, error, message):
    kind, text = error_of(call)
    assert kind is error
    assert message in text
    assert "\n" not in text


def test_numpy_and_tensor_sizes_are_integers():
    mask = fd.keep_mask(X, 0.5, KEY)
    assert torch.equal(fd.keep_mask(np.array(X.shape), 0.5, KEY), mask)
    assert torch.equal(fd.keep_mask(X.shape, np.float64(0.5), KEY, start=np.int64(0)), mask)
    of = [
        fd.dropout(X, key=KEY, noise_shape=shape) for shape in ((2, 1, 4), np.array((2, 1, 4)), torch.tensor((2, 1, 4)))
    ]
    assert torch.equal(of[0], of[1])
    assert torch.equal(of[0], of[2])


@pytest.mark.gpu
@pytest.mark.parametrize(("device", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_generator_of_another_device(device, other):
    wanted = (RuntimeError, f"Expected a '{device}' device type for generator but found '{other}'")
    assert error_of(fd.dropout, X.to(device), generator=torch.Generator(other)) == wanted


@pytest.mark.gpu
def test_mask_of_a_shape_is_made_where_the_key_is():
    mask = fd.keep_mask((3, 5), 0.5, KEY.cuda())
    assert mask.is_cuda
    assert torch.equal(mask.cpu(), fd.keep_mask((3, 5), 0.5, KEY))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("training", [True, False])
def test_other_dtypes_are_torchs_to_decide(dtype, training):
    x = torch.ones(5, dtype=dtype)

    def outcome(dropout):
        torch.manual_seed(0)
        try:
            return dropout(x, 0.5, training)
        except Exception as error:
            return type(error), str(error)
        finally:
            torch.manual_seed(0)

    assert str(outcome(fd.dropout)) == str(outcome(F.dropout))


@pytest.mark.parametrize("x", [[1.0], 1.0, None, np.ones(3)], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_not_a_tensor(x, training):
    for name in FAMILY:
        assert error_of(getattr(fd, name), x, 0.5, training)[0] is error_of(getattr(F, name), x, 0.5, training)[0]
    assert "must be Tensor" in error_of(fd.dropout, x, 0.5, training)[1]


def test_modules_check_p_at_each_call():
    for name in ("Dropout", "Dropout1d", "AlphaDropout"):
        ours, theirs = getattr(fd, name)(), getattr(nn, name)()
        for p in (2.0, float("nan"), None, torch.tensor(0.5, requires_grad=True)):
            ours.p = theirs.p = p
            assert error_of(ours, X)[0] is error_of(theirs, X)[0]
