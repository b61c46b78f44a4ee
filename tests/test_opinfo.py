"""The family under ``patched()`` on the inputs of torch's OpInfo, which torch's own operator tests use."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fused_dropout as fd

NAMES = ["dropout", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]  # OpInfo has no dropout1d
pytestmark = pytest.mark.filterwarnings("ignore")  # dropout2d and 3d warn about some shapes: test_family.py
for_names = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def op_db():
    """torch's table of operators. Its import changes global settings, which are restored for later tests."""
    pytest.importorskip("expecttest")
    settings = pytest.importorskip("hypothesis").settings
    calls = {c: c.__call__ for c in (torch._C.ScriptFunction, torch._C.ScriptMethod)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    settings.load_profile("default")
    torch.backends.__allow_nonbracketed_mutation_flag = True
    for c, call in calls.items():
        c.__call__ = call
    return op_db


@pytest.fixture
def ops(name, op_db):
    found = [op for op in op_db if op.name == f"nn.functional.{name}"]
    assert found
    return found


def _with_holes(x):
    """The same values in a tensor with holes: every second element of a wider tensor."""
    wide = torch.empty(*x.shape, 2, dtype=x.dtype)
    return wide[..., 0].copy_(x)


def samples(ops, dtype, grad=False):
    """Yields (function, in-place function, input) for each sample of the operators with this dtype, in two layouts.

    The functions seed the generator before they draw, and restore it afterwards.
    """
    for op in ops:
        if dtype in op.supported_dtypes("cpu"):
            for sample in op.sample_inputs("cpu", dtype):
                for layout in (torch.clone, _with_holes):
                    arguments = sample.args, sample.kwargs
                    functions = [lambda x, f=f, a=arguments: f(x, *a[0], **a[1]) for f in (op.op, op.inplace_variant)]
                    yield *functions, layout(sample.input.detach()).requires_grad_(grad)


def outcome(function, x):
    """The error, or properties that do not depend on the draws: is it the input, shape, dtype, strides."""
    try:
        y = function(x)
    except Exception as error:
        return type(error), str(error)
    return y is x, y.shape, y.dtype, y.stride()


@for_names
def test_samples_reach_ours(name, ops):
    f, _, x = next(s for s in samples(ops, torch.float32) if not torch.equal(s[0](s[2]), s[2]))
    with fd.patched():
        got = f(x)
    torch.manual_seed(42)  # like the functions
    assert torch.equal(got, getattr(fd, name)(x, 0.5, True))


@for_names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64], ids=str)
def test_results_are_torchs_but_for_the_draws(name, dtype, ops):
    for f, f_, x in samples(ops, dtype):
        for function in (f, f_):
            theirs = outcome(function, x.clone())
            with fd.patched():
                assert outcome(function, x.clone()) == theirs
        if dtype != torch.float32:
            continue
        for mode in (torch._subclasses.FakeTensorMode, lambda: torch.device("meta")):
            with mode() as fake:
                y = fake.from_tensor(x) if hasattr(fake, "from_tensor") else x.to("meta")
                theirs = outcome(f, y)
                with fd.patched():
                    assert outcome(f, y) == theirs


@for_names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_in_place(name, dtype, ops):
    with fd.patched():
        for f, f_, x in samples(ops, dtype):
            want = f(x)
            assert f_(x) is x
            torch.testing.assert_close(x, want, rtol=0, atol=0)


@for_names
def test_negated_views(name, ops):
    """Tensors like ``z.conj().imag``, which store the sign separately from the values."""
    with fd.patched():
        for f, f_, x in samples(ops, torch.float32):
            for function in (f, f_):
                torch.testing.assert_close(function(torch._neg_view(x.clone())), f(-x), rtol=0, atol=0)


@for_names
def test_derivatives(name, ops):
    """First and second derivatives: backward, forward and mixed mode, batched, in place."""
    with fd.patched():
        for f, f_, x in samples(ops, torch.float64, grad=True):
            if f(x) is x or not x.is_contiguous():  # test_gradients.py tests the skipped ones
                continue
            assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
            assert gradcheck(lambda x, f_=f_: f_(x.clone()), x, check_forward_ad=True, fast_mode=True)
            assert gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


@for_names
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_vmap(name, randomness, ops):
    for f, _, x in samples(ops, torch.float32):
        batched = torch.func.vmap(f, randomness=randomness)
        theirs = outcome(batched, x.expand(3, *x.shape))
        with fd.patched():
            ours = outcome(batched, x.expand(3, *x.shape))
        assert ours[:-1] == theirs[:-1]  # without strides, which are not promised for a batch


@for_names
def test_older_vmap_refuses_in_torchs_words(name):
    """``torch.autograd.functional`` with ``vectorize=True`` uses the older vmap."""
    x, said = torch.ones(2, 3, 2, 2), []
    for module in (F, fd):
        f = partial(getattr(module, name), p=0.5, training=True)
        with pytest.raises(RuntimeError) as error:
            torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode")
        said.append(str(error.value))
    assert said[0] == said[1]


@for_names
@pytest.mark.parametrize("check", ["operator", "backward", "forward_ad"])
def test_composite_compliance(name, check, ops):
    """torch's own check, from its test_ops.py, that wrapped and plain tensors give the same results."""
    from torch.testing._internal import composite_compliance as compliance

    def same(a, b, **_):
        torch.testing.assert_close(a, b, equal_nan=True)

    ran = 0
    with fd.patched():
        for op in ops:
            for sample in op.sample_inputs("cpu", torch.float32, requires_grad=check == "backward"):
                arguments = [sample.input, *sample.args]
                if check == "operator":
                    compliance.check_with_mode(op, arguments, sample.kwargs, same)
                    compliance.check_all_permutations(op, arguments, sample.kwargs, same)
                elif check == "backward":
                    compliance.check_backward_formula(
                        op.get_op(), arguments, sample.kwargs, None, op.gradcheck_wrapper, same
                    )
                else:
                    compliance.check_forward_ad_formula(
                        op.get_op(), arguments, sample.kwargs, op.gradcheck_wrapper, same
                    )
                ran += 1
    assert ran
