"""Layouts, bit for bit against contract.py: the index of each element, the place of its result, unchanged memory."""

import math

import pytest
import torch
from helpers import (
    DTYPES,
    EDGES,
    OPERATORS,
    PROBABILITIES,
    assert_same,
    expected,
    expected_mask,
    for_dtypes,
    for_operators,
    key_tensor,
    values,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Each function gets full(*sizes), which makes a contiguous tensor with unused memory around it in its storage.
LAYOUTS = {
    "contiguous": lambda full: full(4, 6, 35),
    "rows": lambda full: full(12, 17)[3:9],
    "transposed": lambda full: full(37, 23).t(),
    "permuted 3-d": lambda full: full(5, 7, 11).permute(2, 0, 1),
    "permuted 4-d": lambda full: full(3, 4, 5, 6).permute(3, 1, 0, 2),
    "channels_last": lambda full: full(2, 6, 7, 5).permute(0, 3, 1, 2),
    "channels_last, sliced batch": lambda full: full(4, 6, 7, 5).permute(0, 3, 1, 2)[1:3],
    "channels_last, sliced channels": lambda full: full(2, 6, 7, 8).permute(0, 3, 1, 2)[:, 1:6],
    "columns": lambda full: full(19, 40)[:, 3:24],
    "aligned columns": lambda full: full(9, 256)[:, 64:192],
    "one of three projections": lambda full: full(7, 3, 32)[:, 1],
    "columns in 3-d": lambda full: full(4, 6, 50)[:, 1:4, 7:30],
    "transposed columns": lambda full: full(19, 40)[:, 3:24].t(),
    "every other row": lambda full: full(20, 33)[::2],
    "every other column": lambda full: full(9, 40)[:, ::2],
    "every other element": lambda full: full(301)[::2],
    "diagonal": lambda full: full(13, 13).diagonal(),
    "expanded rows": lambda full: full(1, 17).expand(8, 17),
    "expanded columns": lambda full: full(17, 1).expand(17, 9),
    "expanded inside": lambda full: full(6, 1, 5).expand(6, 4, 5),
    "expanded scalar": lambda full: full().expand(3, 50),
    "overlapping windows": lambda full: full(40).unfold(0, 8, 3),
    "0-dim": lambda full: full(),
    "0-dim inside": lambda full: full(9)[5],
    "empty": lambda full: full(0),
    "empty 3-d": lambda full: full(4, 0, 3).transpose(0, 2),
    "size 1 with odd strides": lambda full: full(60).as_strided((1, 8, 1, 5), (17, 5, 3, 1), 64),
    "size 1 with odd strides, transposed": lambda full: full(60).as_strided((5, 1, 8, 1), (1, 13, 5, 0), 64),
    "size 1 with odd strides, columns": lambda full: full(60).as_strided((4, 1, 5), (9, 2, 1), 64),
    "unsqueezed": lambda full: full(6, 9).t().unsqueeze(0).unsqueeze(3),
    **{f"offset {k}": lambda full, k=k: full(150)[k:] for k in range(1, 8)},
}


@for_operators
@for_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, ops, layout, dtype):
    """Indices follow memory order if x is dense, else row-major order. Outputs have the strides of empty_like.

    apply does not write to the input's storage, and apply_ writes only to the elements of x.
    """
    x = LAYOUTS[layout](lambda *s: values(math.prod(s) + 128, dtype, device)[64 : 64 + math.prod(s)].view(s))
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    untouched, key, strides = storage.cpu().clone(), key_tensor(2**40, 3), torch.empty_like(x).stride()
    want = expected(x, 2**40, 3, 0.4, start=6)

    y, mask = ops.apply(x, 0.4, key, start=6), ops.keep_mask(x, 0.4, key, start=6)
    assert_same(y, want)
    assert torch.equal(mask.cpu(), expected_mask(x, 2**40, 3, 0.4, start=6))
    assert y.stride() == mask.stride() == strides
    assert_same(storage, untouched)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()

    if not layout.startswith(("expanded", "overlapping")):  # these cannot be written in place; torch refuses too
        torch.ops.fused_dropout.apply_(x, 0.4, key, start=6)
        untouched.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(want)
        assert_same(storage, untouched)


def strided_view(dtype, device, lead, dims, order, repeat):
    """A view whose dimensions are (size, first, step), in another order, repeated `repeat` times if not 0."""
    shape = [size for size, _, _ in dims]
    x = values(lead + math.prod(shape), dtype, device)[lead:].view(shape)
    x = x[tuple(slice(first, None, step) for _, first, step in dims)].permute(order)
    return x.unsqueeze(-1).expand(*x.shape, repeat) if repeat else x


DIMS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.sampled_from([1, 1, 1, 2, 3])), max_size=4)
UINT64 = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
SHARED_DEVICE = HealthCheck.function_scoped_fixture  # all examples use the same device, as intended
P = st.sampled_from([0.0, 1.0, *PROBABILITIES]) | st.floats(0, 1)


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=[SHARED_DEVICE])
@given(st.data(), st.sampled_from(DTYPES), DIMS, P, UINT64, UINT64, st.integers(0, 2**63 - 2**16))
def test_anything(device, data, dtype, dims, p, seed, offset, start):
    """Combinations that the lists above do not have: any layout with any key, probability and start."""
    order = data.draw(st.permutations(range(len(dims))))
    lead, repeat = data.draw(st.integers(0, 7)), data.draw(st.sampled_from([0, 0, 0, 1, 3]))
    x = strided_view(dtype, device, lead, dims, order, repeat)
    key, want = key_tensor(seed, offset), expected(x, seed, offset, p, start)
    for ops in OPERATORS:
        y, mask = ops.apply(x, p, key, start=start), ops.keep_mask(x, p, key, start=start)
        assert_same(y, want)
        assert torch.equal(mask.cpu(), expected_mask(x, seed, offset, p, start))
        assert y.stride() == mask.stride() == torch.empty_like(x).stride()
    if repeat <= 1:
        torch.ops.fused_dropout.apply_(x, p, key, start=start)
        assert_same(x, want)
