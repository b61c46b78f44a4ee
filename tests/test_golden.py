"""The golden masks of mask_v1.txt against the reference, and against the operators on the CPU and the GPU.

The C++ tests read the same file: test_host_contract.py for mask.h, and cpu_kernels_test.cpp for the CPU kernels.
"""

import contract
import golden
import pytest
import torch
from helpers import assert_same, for_operators, key_tensor, values

PHILOX, MASKS, ELEMENTS = golden.read()
CONTIGUOUS = [m for m in MASKS if m.strides == torch.empty(m.shape, device="meta").stride()]
OTHER = [m for m in MASKS if m not in CONTIGUOUS]
NEIGHBOURS = 200  # around an element, so that it is in the middle of a kernel's vectors


def wanted(mask, device):
    return torch.tensor(mask.kept, device=device).view(mask.shape)


def check(ops, mask, x, *window):
    """keep_mask, apply and apply_ of x against a golden mask."""
    key, kept = key_tensor(mask.seed, mask.offset, x.device), wanted(mask, x.device)
    product = x * contract.scale(mask.p) if mask.p < 1 else x
    result = torch.where(kept, product, torch.zeros_like(x))
    assert torch.equal(ops.keep_mask(x, mask.p, key, *window), kept), mask
    assert_same(ops.apply(x, mask.p, key, *window), result)
    ops.apply_(x, mask.p, key, *window)
    assert_same(x, result)


@pytest.mark.same_without("_eager", "_C")
def test_the_file_is_what_its_generator_writes():
    assert golden.FILE.read_text() == golden.generate()


def test_the_file_holds_what_it_should():
    """The file has masks of every kind. For each slot it has an element that the tie keeps, and one that it drops."""
    assert {(e.index % 8, e.kept) for e in ELEMENTS} == {(slot, kept) for slot in range(8) for kept in (False, True)}
    assert len(PHILOX) == 3
    assert len(CONTIGUOUS) > 100
    assert len(OTHER) > 20
    assert {len(m.kept) for m in MASKS} == {golden.COUNT}


@pytest.mark.same_without("_eager", "_C")
def test_contract():
    """The contract in plain integers gives these masks."""
    for p in PHILOX:
        assert contract.philox4x32(p.counter, p.key) == p.words
    for m in MASKS:
        assert tuple(contract.keep(m.seed, m.offset, i, m.p) for i in m.indices) == m.kept, m
    for e in ELEMENTS:
        assert contract.keep(e.seed, e.offset, e.index, e.p) == e.kept, e


@for_operators
def test_masks(ops, device):
    """Masks of consecutive elements from a start on."""
    for m in CONTIGUOUS:
        check(ops, m, values(golden.COUNT, torch.float32, device).view(m.shape), m.start)


@for_operators
def test_masks_of_dense_tensors(ops, device):
    """A dense tensor is numbered by its own strides: transposed, channels last, reversed."""
    dense = [m for m in OTHER if sorted(m.indices) == list(range(m.start, m.start + golden.COUNT))]
    assert len(dense) >= 6
    for m in dense:
        x = values(golden.COUNT, torch.float32, device).as_strided(m.shape, m.strides)
        check(ops, m, x, m.start)


@for_operators
def test_masks_with_index_strides(ops, device):
    """Every record with its index strides given, on a contiguous tensor and on one with reversed dimensions."""
    for m in MASKS:
        x = values(golden.COUNT, torch.float32, device)
        check(ops, m, x.clone().view(m.shape), m.start, m.strides)
        reversed_dims = tuple(range(len(m.shape)))[::-1]
        check(ops, m, x.view(m.shape[::-1]).permute(reversed_dims), m.start, m.strides)


@for_operators
@pytest.mark.parametrize("lead", [0, 77], ids=["alone", "among others"])
def test_elements(ops, device, lead):
    """Elements that the last of their 48 bits decides, alone and in the middle of other elements."""
    for e in ELEMENTS:
        x = torch.ones(NEIGHBOURS if lead else 1, device=device)
        key = key_tensor(e.seed, e.offset, device)
        assert ops.keep_mask(x, e.p, key, e.index - lead)[lead] == e.kept, e
        assert (ops.apply(x, e.p, key, e.index - lead)[lead] != 0) == e.kept, e
