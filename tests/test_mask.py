"""Masks and values, bit for bit against contract.py: every operator, device, dtype, size, key, start and probability.

Most thresholds and all ties are too rare to occur by chance (one element in 2**48), so the tests run Philox backwards
to make an element with a given draw and tie. Other files test layouts, gradients, statistics and torch.compile.
"""

import itertools
import math
import random
import struct
from fractions import Fraction

import contract
import pytest
import torch
from helpers import (
    BITS,
    DTYPES,
    EDGES,
    PROBABILITIES,
    assert_same,
    expected,
    expected_mask,
    for_dtypes,
    for_operators,
    key_tensor,
    values,
)

import fused_dropout as fd
from fused_dropout import reference


@pytest.fixture(params=["cpu", "same"])
def make_key(request, device):
    """Keys on the CPU, and keys on the tensor's device. On a GPU the kernel gets them in two different ways."""
    if request.param == "same" and device == "cpu":
        pytest.skip("the same as the cpu case")
    return lambda seed, offset: key_tensor(seed, offset, device if request.param == "same" else "cpu")


def sizes(device: str) -> list[int]:
    """Tails of every vector width, and both sides of each power of two. CUDA has fewer: an interpreter may run it."""
    if device != "cpu":
        return [*range(18), 31, 33, 63, 64, 65, 127, 255, 256, 257, 1023, 1025, 4099, 2**15 + 5, 2**17 + 9]
    return [*range(71), *(2**k + d for k in range(7, 20) for d in (-1, 0, 1)), 2**20 - 1, 2**20, 2**20 + 1]


# ------------------------------------------------------------------------------------------ the contract itself

KNOWN_ANSWERS = """00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
                   ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
                   243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1"""


def test_known_answers_of_random123(device):
    """contract.py and the reference compute Random123's philox4x32-10, so other tests compare with the real Philox."""
    for line in KNOWN_ANSWERS.splitlines():
        numbers = [int(word, 16) for word in line.split()]
        assert list(contract.philox4x32(numbers[:4], numbers[4:6])) == numbers[6:]
        tensors = [torch.tensor(number, device=device) for number in numbers[:6]]
        assert [int(word) for word in reference.philox(tensors[:4], tensors[4:])] == numbers[6:]


def test_reference_philox_on_many_counters(device):
    """The reference multiplies in int64, where a product of two 32-bit words overflows. It must still be right."""
    rng = random.Random(0)
    numbers = [[rng.choice([0, 1, 2**31, 2**32 - 1, rng.getrandbits(32)]) for _ in range(6)] for _ in range(500)]
    columns = torch.tensor(numbers, device=device).unbind(1)
    got = torch.stack(list(reference.philox(columns[:4], columns[4:])), 1)
    assert got.tolist() == [list(contract.philox4x32(row[:4], row[4:])) for row in numbers]


def test_draws_are_the_half_words_in_memory_order():
    """On a little-endian machine, a block's words read as eight uint16 are its draws. The kernels rely on this."""
    words = contract.block_words(2**63 + 5, 2**40 + 3, 2**33 + 1)
    draws = [contract.draw(2**63 + 5, 2**40 + 3, 8 * (2**33 + 1) + h) for h in range(8)]
    assert draws == list(struct.unpack("<8H", struct.pack("<4I", *words)))


def test_fast_contract_equals_plain_contract():
    """keep() is the definition; keep_list and keep_numpy only avoid repeating a block."""
    for p, seed, offset in itertools.product([0.0, 1e-6, 0.3, 1 - 2**-16, 1.0], EDGES[2::3], EDGES[1::3]):
        for start in (0, 5, 2**35 - 20, 2**63 - 42):
            plain = [contract.keep(seed, offset, i, p) for i in range(start, start + 41)]
            assert contract.keep_list(seed, offset, p, 41, start) == plain
            assert contract.keep_numpy(seed, offset, p, 41, start).tolist() == plain


def test_threshold():
    """K is (1 - p) rounded to 48 bits. It is never 0 or 2**48, so that p > 0 can drop and p < 1 can keep."""
    known = {0.5: 2**47, 25 / 256: 231 * 2**40, 0.1: 253327479039590, 5e-324: 2**48 - 1, math.nextafter(1, 0): 1}
    assert {p: contract.threshold(p) for p in known} == known
    for p in PROBABILITIES:
        assert contract.threshold(p) == min(max(math.floor(Fraction(1 - p) * 2**48 + Fraction(1, 2)), 1), 2**48 - 1)


# ---------------------------------------------------------------------------------------------- draws, ties, thresholds


def assert_decides(ops, dtype, device, p, element, kept):
    """Checks the element alone in its block, inside a vector loop, and with misaligned blocks."""
    seed, offset, i = element
    key = key_tensor(seed, offset)
    for before, n in ((i % 8, 8), (i % 8 + 512, 1024), (509, 1027))[device != "cpu" :]:
        one = torch.zeros(n, dtype=dtype, device=device)
        one[before] = 1
        want = torch.tensor(contract.scale(p) if kept else 0.0, dtype=torch.float32 if one.itemsize < 8 else dtype)
        assert_same(ops.apply(one, p, key, start=i - before)[before], want.to(dtype))
    assert bool(ops.keep_mask(one, p, key, start=i - before)[before]) == kept


@for_operators
@for_dtypes
@pytest.mark.parametrize("half", range(8))
def test_tie_rule_is_a_48_bit_comparison(device, ops, half, dtype):
    """(draw, tie) < K as one 48-bit number. K is close to the element's number, so signs, carries and an equal tie
    matter."""
    rng = random.Random(half)
    cases = list(itertools.product([0, 1, 0x7FFF, 0x8000, 0xFFFF], [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
    for draw, tie in cases if device == "cpu" else rng.sample(cases, 2):
        number = draw << 32 | tie
        element = contract.forge(rng, half, draw, tie)
        for k in range(max(number - 1, 1), min(number + 2, 2**48)):
            p = 1 - k / 2**48  # exact: k has 48 bits
            assert contract.threshold(p) == k
            assert_decides(ops, dtype, device, p, element, kept=number < k)


@for_operators
@pytest.mark.parametrize("p", PROBABILITIES)
def test_threshold_of_every_probability(device, ops, p):
    """The last element that is kept and the first that is dropped: K is right to its last bit, also if clamped."""
    rng = random.Random(p)
    for dtype in DTYPES if device == "cpu" else rng.sample(DTYPES, 1):
        for number, kept in ((contract.threshold(p) - 1, True), (contract.threshold(p), False)):
            element = contract.forge(rng, rng.randrange(8), number >> 32, number & contract.LOW32)
            assert_decides(ops, dtype, device, p, element, kept)


@for_operators
def test_every_bit_of_the_key_counts(device, ops, make_key):
    """64 bits of seed and 64 bits of offset, unsigned: around the limits of int32 and int64, and each single bit."""
    x = values(100, torch.float32, device)
    bits = [2**k for k in range(64)]
    keys = [*itertools.product(EDGES, EDGES), *((b, 0) for b in bits), *((0, b) for b in bits)]
    for seed, offset in keys if device == "cpu" else keys[:: len(keys) // 40]:
        assert_same(ops.apply(x, 0.3, make_key(seed, offset)), expected(x, seed, offset, 0.3))


@pytest.mark.torch_copies
@for_operators
def test_key_may_be_a_view(device, ops):
    """A column of a table of keys is a key: its strides and storage offset count."""
    x = values(100, torch.float32, device)
    table = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint64)
    for keys in (table, table.to(device)):
        assert_same(ops.apply(x, 0.3, keys[:, 1]), expected(x, 2, 5, 0.3))


@for_operators
@pytest.mark.parametrize("edge", [2**31, 2**32, 2**34, 2**35, 2**36, 2**48, 2**62, 2**63 - 1])
def test_start_far_out(device, ops, make_key, edge):
    """Indices and blocks exceed 32 bits inside one tensor (2**35 is block 2**32), at every alignment."""
    n = 600
    for shift in range(8) if device == "cpu" else (0, 3):
        start = min(edge - n // 2 - shift, 2**63 - 1 - n - shift)
        for dtype in DTYPES if device == "cpu" else DTYPES[shift : shift + 1]:
            x = values(n, dtype, device)
            assert_same(ops.apply(x, 0.4, make_key(3, 2**60 + 1), start), expected(x, 3, 2**60 + 1, 0.4, start))
        assert ops.keep_mask(x, 0.4, make_key(3, 1), start).tolist() == contract.keep_list(3, 1, 0.4, n, start)


@for_operators
def test_shards_draw_their_part_of_the_whole(device, ops):
    """With start, a contiguous piece has the same mask as this part of the whole tensor, for any cut."""
    rng, key, x = random.Random(0), key_tensor(11, 12), values(999, torch.float32, device)
    for start in (0, 3, 2**32 - 500):
        whole = ops.apply(x, 0.5, key, start=start)
        for first, last in [sorted(rng.sample(range(1000), 2)) for _ in range(30 if device == "cpu" else 4)]:
            assert_same(ops.apply(x[first:last], 0.5, key, start=start + first), whole[first:last].cpu())


# ------------------------------------------------------------------------------------------ sizes and values


@for_operators
@for_dtypes
def test_sizes(device, ops, make_key, dtype):
    """apply, apply_ and keep_mask at every size: full vectors, tails, and shares of many threads."""
    x = values(sizes(device)[-1], dtype, device)
    key, want = make_key(5, 6), expected(x, 5, 6, 0.1)
    mask = torch.from_numpy(contract.keep_numpy(5, 6, 0.1, len(x)))
    for n in sizes(device):
        assert_same(ops.apply(x[:n], 0.1, key), want[:n])
        assert torch.equal(ops.keep_mask(x[:n], 0.1, key).cpu(), mask[:n])
        inplace = x[:n].clone()
        torch.ops.fused_dropout.apply_(inplace, 0.1, key)
        assert_same(inplace, want[:n])


def test_number_of_threads_does_not_matter(device):
    """The mask depends on the index, not on the thread."""
    if device != "cpu":
        pytest.skip("CPU threads")
    x, before = values(300_007, torch.float32), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert_same(torch.ops.fused_dropout.apply(x, 0.1, key_tensor(1, 2), start=5), expected(x, 1, 2, 0.1, 5))
    finally:
        torch.set_num_threads(before)


@for_dtypes
def test_misaligned_views_and_stray_writes(device, dtype):
    """In place at every offset into a buffer: heads that vector loads cannot handle, and no writes outside."""
    for lead, n in itertools.product(range(1, 9), [*range(1, 40), 65, 131, 255] if device == "cpu" else [1, 9, 131]):
        buffer = torch.full((lead + n + 9,), 7.0, dtype=dtype, device=device)
        x = buffer[lead : lead + n]
        want = torch.full_like(buffer, 7.0, device="cpu")
        want[lead : lead + n] = expected(x, lead, n, 0.5, start=lead)
        assert_same(torch.ops.fused_dropout.apply(x, 0.5, key_tensor(lead, n), start=lead), want[lead : lead + n])
        torch.ops.fused_dropout.apply_(x, 0.5, key_tensor(lead, n), start=lead)
        assert_same(buffer, want)


@for_operators
@pytest.mark.parametrize("p", [0.4, 0.9])
@for_dtypes
def test_special_values(device, ops, dtype, p):
    """A dropped element is +0, whatever its value. A kept one is multiplied, which preserves NaN, -0 and denormals."""
    info = torch.finfo(dtype)
    tiny = torch.tensor(1, dtype=BITS[dtype]).view(dtype).item()  # the smallest denormal
    special = [math.inf, math.nan, 0.0, tiny, 3 * tiny, info.tiny - tiny, info.tiny, 1.0, info.max / 4, info.max]
    x = torch.tensor([sign * v for v in special for sign in (1, -1)], dtype=dtype, device=device).repeat(50)
    y, mask = ops.apply(x, p, key_tensor(8, 9)), expected_mask(x, 8, 9, p)
    assert all(0 < column.sum() < 50 for column in mask.view(50, -1).unbind(1))  # each value is both kept and dropped
    assert_same(y, expected(x, 8, 9, p))
    assert (y.cpu().view(BITS[dtype])[~mask] == 0).all()  # only +0 has no bit set
    kept = mask & (x.cpu() == 0)
    assert torch.equal(y.cpu()[kept].signbit(), x.cpu()[kept].signbit())


@for_operators
@pytest.mark.parametrize("p", [0.4, 0.7, 1 / 3, 1 / 7, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_of_every_16_bit_value(device, ops, dtype, p):
    """All 65536 bit patterns, because some faults change only some of the results.

    At p = 0.4 and 1/7, more than a thousand change if the product is rounded directly to 16 bits and not to float32
    first. At 0.7, 1/3 and 0.9, more than a thousand change if the scale stays a double.
    """
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    for seed in range(2):
        assert_same(ops.apply(x, p, key_tensor(seed, 1)), expected(x, seed, 1, p))


@for_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_at_every_probability(device, ops, dtype):
    """s = 1 / (1 - p) comes from the given p, not from K. In float64 the whole product is float64."""
    x = values(256, dtype, device)
    for p in PROBABILITIES:
        assert_same(ops.apply(x, p, key_tensor(4, 4)), expected(x, 4, 4, p))


@for_operators
@for_dtypes
def test_p_zero_and_one(device, ops, dtype):
    """p == 0 gives the values in a new tensor. p == 1 gives +0 everywhere, also for infinities and NaN."""
    x = torch.tensor([1.5, -0.0, math.inf, -math.inf, math.nan, -3.0] * 7, dtype=dtype, device=device)
    for p, want in ((0.0, x.cpu().clone()), (1.0, torch.zeros(42, dtype=dtype))):
        y = ops.apply(x, p, key_tensor(1, 2))
        assert_same(y, want)
        assert y.data_ptr() != x.data_ptr()
        assert ops.keep_mask(x, p, key_tensor(1, 2)).tolist() == [p == 0] * 42
        inplace = x.clone()
        torch.ops.fused_dropout.apply_(inplace, p, key_tensor(1, 2))
        assert_same(inplace, want)


# ------------------------------------------------------------------------------------------ the public functions


@for_dtypes
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_with_a_key(device, make_key, dtype, inplace):
    """fd.dropout has the bits of the operator, with and without autograd, and in place."""
    for view, grad in itertools.product(("contiguous", "transposed", "columns"), (False, not inplace)):
        x = values(960, dtype, device).view(24, 40)
        x = {"contiguous": x, "transposed": x.t(), "columns": x[:, 3:20]}[view].requires_grad_(grad)
        want = expected(x, 7, 2**33, 0.25)
        y = fd.dropout(x, 0.25, inplace=inplace, key=make_key(7, 2**33))
        assert_same(y, want)
        assert (y.data_ptr() == x.data_ptr()) == inplace
    assert_same(fd.dropout(x, 0.25, training=False, key=make_key(7, 2**33)), x.detach().cpu())


def test_keep_mask_of_a_tensor_or_a_shape(device, make_key):
    """A shape stands for a contiguous tensor. A tensor has its own layout; its dtype does not matter."""
    want = torch.tensor(contract.keep_list(1, 2**50, 0.3, 36, start=13))
    for shape in ((36,), (4, 9), (2, 3, 6), torch.Size((4, 9))):
        mask = fd.keep_mask(shape, 0.3, make_key(1, 2**50), device=device, start=13)
        assert mask.dtype == torch.bool
        assert mask.device.type == torch.device(device).type
        assert mask.is_contiguous()
        assert torch.equal(mask.cpu(), want.view(shape))
    for dtype in DTYPES:
        mask = fd.keep_mask(torch.empty(9, 4, dtype=dtype, device=device).t(), 0.3, make_key(1, 2**50), start=13)
        assert torch.equal(mask.cpu(), want.view(9, 4).t())
        assert mask.stride() == (1, 4)


def next_key(generator: torch.Generator) -> tuple[int, int]:
    """Draws the key from this generator that the next call would draw."""
    if generator.device.type == "cpu":
        return torch.empty((), dtype=torch.int64).random_(generator=generator).item(), 0
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return generator.initial_seed(), offset // 4


@pytest.fixture(params=["default", "own"])
def generator(request, device):
    """The device's default generator, which is restored afterwards, and a generator given by the user."""
    if request.param == "own":
        yield torch.Generator(device).manual_seed(2**40 + 7)
        return
    torch.empty(0, device=device)  # CUDA's generators exist only after CUDA is initialised
    default = torch.default_generator if device == "cpu" else torch.cuda.default_generators[0]
    state = default.get_state()
    default.manual_seed(2**40 + 7)
    yield default
    default.set_state(state)


def given_to_dropout(generator: torch.Generator) -> dict:
    default = [torch.default_generator, *torch.cuda.default_generators]
    return {} if any(generator is each for each in default) else {"generator": generator}


def test_keys_come_from_the_generator(device, generator):
    """Each call draws one key in the documented way, for any size, with or without gradients. Runs can be repeated."""
    start = generator.get_state()
    keys = [next_key(generator) for _ in range(6)]
    end = generator.get_state()
    generator.set_state(start)
    assert len(set(keys)) == 6
    for call, (seed, offset) in enumerate(keys):
        x = values((1, 1000)[call % 2], torch.float32, device).requires_grad_(call in (2, 3))
        y = fd.dropout(x, 0.5, inplace=call > 3, **given_to_dropout(generator))
        want = expected(x if call <= 3 else values(x.numel(), torch.float32), seed, offset, 0.5)
        assert_same(y, want)
    assert torch.equal(generator.get_state(), end)


def test_what_draws_no_key(device, generator):
    """p = 0, p = 1, evaluation, an empty tensor and a given key do not advance the generator."""
    x, before = values(10, torch.float32, device), generator.get_state()
    given = given_to_dropout(generator)
    assert_same(fd.dropout(x, 0.0, **given), x.cpu())
    assert_same(fd.dropout(x, 1.0, **given), torch.zeros(10))
    assert_same(fd.dropout(x, 0.5, training=False, **given), x.cpu())
    assert fd.dropout(x[:0], 0.5, **given).shape == (0,)
    fd.dropout(x, 0.5, key=key_tensor(1, 2))
    assert torch.equal(generator.get_state(), before)
