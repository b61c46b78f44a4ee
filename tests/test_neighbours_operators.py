"""The operators of ``fd.dropout_add`` and ``fd.relu_dropout``, on CPU and CUDA: bit for bit against contract.py, the
memory that they write, and their behaviour for arguments that do not fit."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import ON_FAKE_GPU
from helpers import DTYPES, assert_same, expected, for_dtypes, key_tensor, values
from launches import launched

import fused_dropout as fd

if ON_FAKE_GPU:
    import fake_gpu

OPS = torch.ops.fused_dropout
P, SEED, OFFSET = 0.3, 11, 2**40 + 7
KEY = key_tensor(SEED, OFFSET)
# full(*sizes) is a contiguous tensor with unused memory around it in its storage.
LAYOUTS = {
    "contiguous": lambda full: full(9, 96),
    "odd width": lambda full: full(13, 37),
    "odd offset": lambda full: full(9 * 96 + 1)[1:].view(9, 96),
    "transposed": lambda full: full(37, 13).t(),
    "channels_last": lambda full: full(2, 3, 5, 8).permute(0, 3, 1, 2),
    "columns": lambda full: full(9, 40)[:, 3:24],
    "aligned columns": lambda full: full(7, 128)[:, 32:96],
    "transposed columns": lambda full: full(9, 40)[:, 3:24].t(),
    "every other": lambda full: full(301)[::2],
    "vector": lambda full: full(1000),
    "one": lambda full: full(1),
    "0-d": lambda full: full(),
    "empty": lambda full: full(3, 0),
}
RESIDUALS = {
    "alike": lambda x: x,
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "one row": lambda x: x[:1].expand_as(x) if x.dim() > 1 and x.shape[1] else x,
}
for_layouts = pytest.mark.parametrize("layout", LAYOUTS)

RESIDUAL_OF = dict(zip(DTYPES, RESIDUALS, strict=True))


@pytest.fixture
def made(dtype, device):
    """A function that makes a tensor of a layout, with new values at each call. Returns it and its whole storage."""

    def made(layout, seed=0):
        def full(*sizes):
            n = torch.Size(sizes).numel()
            return values(n + 130 + seed, dtype, device)[64 + seed % 2 :][:n].view(sizes)

        x = LAYOUTS[layout](full)
        return x, x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)

    return made


def check_both(operator, in_place, x, storage, others, want, **options):
    """Checks the result out of place and in place, and that nothing else is written."""
    before, others_before = storage.cpu().clone(), [t.cpu().clone() for t in others if t is not None]
    y = operator(x, *others, P, KEY, **options)
    assert_same(y, want)
    assert_same(storage, before)
    assert in_place(x, *others, P, KEY, **options) is None
    before.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(want)
    assert_same(storage, before)
    for t, of in zip([t for t in others if t is not None], others_before, strict=True):
        assert_same(t, of)
    return y


@for_layouts
@pytest.mark.parametrize("residual_layout", RESIDUALS)
def test_dropout_add(residual_layout, layout, made, dtype, device):
    if ON_FAKE_GPU and device == "cuda" and RESIDUAL_OF[dtype] != residual_layout:
        pytest.skip("an interpreter is slow: one layout of the residual for each dtype")
    for with_bias, start in itertools.product((False, True), (0, 5)):
        x, storage = made(layout)
        residual = RESIDUALS[residual_layout](made(layout, 3)[0])
        bias = values(x.shape[-1] + 1, dtype, device)[1:] if with_bias and x.dim() else None
        shifted = x.cpu() if bias is None else x.cpu() + bias.cpu()
        numbered = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(shifted)
        want = residual.cpu() + expected(numbered, SEED, OFFSET, P, start)
        y = check_both(OPS.dropout_add, OPS.dropout_add_, x, storage, (residual, bias), want, start=start)
        sizes = [i for i, size in enumerate(x.shape) if size > 1]
        meta = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in (residual, torch.empty_like(x))]
        strides = (meta[0] + meta[1]).stride()
        assert [y.stride(i) for i in sizes] == [strides[i] for i in sizes]


@for_layouts
def test_relu_dropout(layout, made, dtype):
    for start in (0, 5):
        x, storage = made(layout)
        numbered = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(F.relu(x.cpu()))
        want = expected(numbered, SEED, OFFSET, P, start)
        y = check_both(OPS.relu_dropout, OPS.relu_dropout_, x, storage, (), want, start=start)
        sizes = [i for i, size in enumerate(x.shape) if size > 1]
        assert [y.stride(i) for i in sizes] == [torch.empty_like(x).stride(i) for i in sizes]


@pytest.mark.parametrize("of_gradient", ["alike", "contiguous", "transposed", "one row"])
@for_layouts
def test_relu_dropout_backward(layout, of_gradient, made, dtype, device):
    """The gradient times the scale, but +0 if the output is 0 or less. If the output is NaN, the gradient passes."""
    output = made(layout)[0]
    gradient = RESIDUALS[of_gradient](made(layout, 3)[0])
    alike = fd.reference.is_dense(output) and output.stride() == gradient.stride()
    if ON_FAKE_GPU and device == "cuda" and not alike and not (output.is_contiguous() and gradient.is_contiguous()):
        pytest.skip("the fake GPU has none of torch's own kernels for copies inside an operator")
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -1.0, 2.0], dtype=dtype).repeat(200)
    for t in (output, gradient) if of_gradient in ("contiguous", "transposed") else (output,):
        t.copy_(torch.where(t.cpu() > 0.5, t.cpu(), special[t.dim() :][: t.numel()].view(t.shape)))
    got = OPS.relu_dropout_backward(gradient, output, 1 / (1 - P))
    zero = torch.zeros((), dtype=dtype)
    assert_same(got, torch.where(output.cpu() <= 0, zero, gradient.cpu() * (1 / (1 - P))))


@for_dtypes
@pytest.mark.parametrize("index_strides", [(1, 6), (0, 1), (7, 0), (0, 0), (2**33, 3)], ids=str)
def test_window(index_strides, device, dtype):
    """Index strides, start and scale have the same meaning as for apply()."""
    x, residual, bias = values(78, dtype), values(79, dtype)[1:], values(13, dtype)
    for view in (lambda t: t.view(6, 13), lambda t: t.view(13, 6).t()):
        for options in ({}, {"start": 2**34 + 3}, {"scale": 2.5, "start": 1}):
            options = {"index_strides": index_strides, **options}
            shifted = torch.empty_like(view(x)).copy_(view(x) + bias)
            want = view(residual) + OPS.apply(shifted, P, KEY, **options)
            here = view(x).to(device).clone()
            more = view(residual).to(device), bias.to(device), P, KEY.to(device)
            assert_same(OPS.dropout_add(here, *more, **options), want)
            OPS.dropout_add_(here, *more, **options)
            assert_same(here, want)
            want = OPS.apply(F.relu(view(x)), P, KEY, **options)
            here = view(x).to(device).clone()
            assert_same(OPS.relu_dropout(here, P, KEY, **options), want)
            OPS.relu_dropout_(here, P, KEY, **options)
            assert_same(here, want)


@pytest.mark.parametrize("other", ["alike", "contiguous", "transposed"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "transposed columns", "0-d", "empty"])
@pytest.mark.parametrize("operator", ["dropout_add", "dropout_add_", "relu_dropout_backward"])
def test_opcheck(operator, layout, other):
    if layout in ("0-d", "empty", other):
        other = "alike"
    x = LAYOUTS[layout](lambda *sizes: torch.randn(sizes))
    y, bias = RESIDUALS[other](x.cos()), None if layout in ("transposed", "0-d") else torch.randn(x.shape[-1])
    arguments = (x, y, 2.0) if operator == "relu_dropout_backward" else (x, y, bias, P, KEY)
    torch.library.opcheck(getattr(OPS, operator).default, arguments)


BAD = {
    "small residual": (torch.ones(6), None),
    "narrow residual": (torch.ones(4, 1), None),
    "large residual": (torch.ones(2, 4, 6), None),
    "wrong residual": (torch.ones(3, 6), None),
    "short bias": (torch.ones(4, 6), torch.ones(5)),
    "bias of one": (torch.ones(4, 6), torch.ones(1)),
    "wide bias": (torch.ones(4, 6), torch.ones(4, 6)),
    "long bias": (torch.ones(4, 6), torch.ones(7)),
    "other dtype": (torch.ones(4, 6).double(), None),
    "other dtype of the bias": (torch.ones(4, 6), torch.ones(6).half()),
}


@pytest.mark.parametrize("bad", BAD)
def test_shapes_that_do_not_fit(bad):
    """The result of the separate calls or an error, but never an access outside of the tensors."""
    x, (residual, bias) = torch.randn(4, 6), BAD[bad]
    for operator in (OPS.dropout_add, OPS.dropout_add_):
        written = x.clone()
        try:
            y = operator(written, residual, bias, P, KEY)
        except (RuntimeError, ValueError):
            continue
        shifted = x if bias is None else x + bias
        want = residual + OPS.apply(shifted, P, KEY)
        assert_same(written if y is None else y, want.to(x.dtype) if y is None else want)


@pytest.mark.parametrize(
    "fits",
    [
        (torch.ones(6), torch.ones(4, 6)),
        (torch.ones(4, 6), torch.ones(6)),
        (torch.ones(4, 6).half(), torch.ones(4, 6)),
        (torch.ones(3, 6), torch.ones(4, 6)),
    ],
)
def test_backward_of_shapes_that_do_not_fit(fits):
    gradient, output = fits
    try:
        got = OPS.relu_dropout_backward(gradient, output, 2.0)
    except (RuntimeError, ValueError):
        return
    assert torch.equal(got, torch.where(output <= 0, 0, gradient * 2.0))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_FAKE_GPU, reason="only the fake GPU counts accesses")
def test_bytes_moved():
    """Per bfloat16 element: 6 bytes forward and 4 backward with a residual, 4 and 6 with a ReLU. A bias of 512 elements
    adds its bytes for each row that reads it. All accesses have 16 bytes."""
    n, width = 2**13, 512
    x, residual, gradient = (values(n, torch.bfloat16).cuda().view(-1, width) for _ in range(3))
    bias = values(width, torch.bfloat16).cuda()

    def moved(call, *args, **options):
        result = launched(call, *args, **options)
        stats = fake_gpu.launches[-1][-1]
        widths = [stats.accesses(kind) for kind in ("ld", "st")]
        assert all(set(of) == {16} for of in widths)
        return result, sum(16 * count for of in widths for count in of.values()) / n

    assert moved(fd.dropout_add, x, residual, P, key=KEY)[1] == 6
    assert moved(fd.dropout_add, x, residual, P, key=KEY, bias=bias)[1] == 8
    assert moved(OPS.apply, gradient, P, KEY)[1] == 4
    output, forward = moved(fd.relu_dropout, x, P, key=KEY)
    assert forward == 4
    assert moved(OPS.relu_dropout_backward, gradient, output, 1 / (1 - P))[1] == 6


@pytest.mark.gpu
@pytest.mark.skipif(not ON_FAKE_GPU, reason="only the fake GPU counts launches")
@for_dtypes
def test_one_launch_a_call(dtype):
    """Contiguous and transposed, with and without a bias: one pass forward, and one backward."""
    for view in (lambda t: t.view(6, 130), lambda t: t.view(130, 6).t()):
        for with_bias in (False, True):
            x, residual = values(780, dtype), values(781, dtype)[1:]
            bias = values(view(x).shape[1], dtype) if with_bias else None
            on_gpu = [None if t is None else t.cuda() for t in (x, residual, bias)]
            arguments = view(on_gpu[0]), view(on_gpu[1])
            y = launched(fd.dropout_add, *arguments, P, bias=on_gpu[2], key=KEY)
            assert_same(y, fd.dropout_add(view(x), view(residual), P, bias=bias, key=KEY))
            launched(fd.dropout_add, *arguments, P, inplace=True, bias=on_gpu[2], key=KEY)
            assert_same(arguments[0], y.cpu())
        x, want = view(values(780, dtype).cuda()), fd.relu_dropout(view(values(780, dtype)), P, key=KEY)
        assert_same(launched(fd.relu_dropout, x, P, key=KEY), want)
        launched(fd.relu_dropout, x, P, inplace=True, key=KEY)
        assert_same(x, want)
        gradient = view(values(782, dtype)[2:].cuda())
        got = launched(OPS.relu_dropout_backward, gradient, x, 2.0)
        assert_same(got, torch.where(want <= 0, torch.zeros((), dtype=dtype), gradient.cpu() * 2.0))
