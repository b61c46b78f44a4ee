"""Properties of the kernel for any window that results do not show, counted as in test_launches.py. Also the choice of
the kernel for a window."""

import functools
import itertools
import math
from collections import Counter

import contract
import numpy as np
import pytest
import torch
from conftest import ON_FAKE_GPU
from helpers import DTYPES, assert_same, for_dtypes, key_tensor, values
from launches import (
    HALF,
    KEY,
    MASK,
    NARROW,
    OPS,
    WIDE,
    P,
    for_blocks,
    for_inplace,
    for_ops,
    key_source,
    launched,
    memory,
    module,
    streams,
)

if ON_FAKE_GPU:
    import fake_gpu
    from ptx_run import Buffer, cstruct

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_FAKE_GPU, reason="only the fake GPU counts accesses")]

THREADS, EIGHT_BY_EIGHT = 256, -1


def kept_at(index, p=P, key=KEY):
    """The contract's mask for an array of indices."""
    index = index.astype(np.uint64)
    words = np.stack(contract.block_words(*key, index // np.uint64(8)), axis=-1)
    slot = (index % np.uint64(8)).astype(int)[..., None]
    own = np.take_along_axis(words, slot // 2, axis=-1)
    tie = np.bitwise_xor.reduce(words, axis=-1, keepdims=True) ^ own
    draw = own >> (16 * (slot % 2)).astype(np.uint64) & np.uint64(0xFFFF)
    return ((draw << np.uint64(32) | tie) < contract.threshold(p))[..., 0]


def spread(shape, strides, first=0):
    """first + sum(i_d * strides[d]) for each element of the shape."""
    at = np.full((), first, np.uint64)
    for size, stride in zip(shape, strides, strict=True):
        at = at[..., None] + np.arange(size, dtype=np.uint64) * np.uint64(stride)
    return at


def dropped(x, kept, scale):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    product = (x.to(wide) * torch.tensor(scale, dtype=wide)).to(x.dtype)
    return torch.where(torch.from_numpy(kept), product, torch.zeros((), dtype=x.dtype))


# ------------------------------------------------------------------------------------------------ launches by the host

# A view of full(*sizes), its index strides, its kernel and the number of launches. The kernel is dropout_kernel,
# window_kernel, or window_kernel with its dimensions in the order of the indices.
WINDOWS = {
    "one draw for a channel": (lambda full: full(37, 9, 49), [9, 1, 0], "window", 1),
    "one draw for all channels": (lambda full: full(37, 9, 49), [49, 0, 1], "window", 1),
    "one mask for all samples": (lambda full: full(37, 9, 49), [0, 49, 1], "window", 1),
    "one mask of whole blocks": (lambda full: full(37, 9, 48), [0, 48, 1], "dropout", 1),
    "one draw for all": (lambda full: full(37, 9, 49), [0, 0, 0], "window", 1),
    "channels_last": (lambda full: full(4, 5, 5, 16).permute(0, 3, 1, 2), [16, 1, 0, 0], "window", 1),
    "part of a row": (lambda full: full(12, 264), [528, 1], "dropout", 1),
    "part of a short row": (lambda full: full(12, 24), [48, 1], "window", 1),
    "odd part of a row": (lambda full: full(12, 265), [531, 1], "window", 1),
    "short rows": (lambda full: full(9, 64)[:, 5:13], None, "window", 1),
    "short rows, aligned": (lambda full: full(70, 40)[:, 8:40], None, "window", 1),
    "short rows, odd": (lambda full: full(7, 40)[:, 3:16], None, "window", 1),
    "projections": (lambda full: full(4, 5, 3, 16)[:, :, 1], None, "window", 1),
    "index by column": (lambda full: full(40, 48), [1, 40], "by index", 1),
    "index by column, odd": (lambda full: full(37, 43), [1, 37], "by index", 2),
    "index by column, 9": (lambda full: full(9, 43), [1, 9], "by index", 2),
    "index by column, short": (lambda full: full(5, 43), [1, 5], "window", 1),
    "channels_last index": (lambda full: full(2, 16, 6, 8), [768, 1, 128, 16], "by index", 1),
    "every other": (lambda full: full(603)[::2], None, "window", 1),
    "every other, shared": (lambda full: full(9, 64)[:, ::2], [32, 0], "window", 1),
    "expanded": (lambda full: full(1).expand(300), None, "window", 1),
    "expanded rows": (lambda full: full(1, 296).expand(6, 296), None, "dropout", 1),
    "expanded short rows": (lambda full: full(1, 40).expand(6, 40), None, "window", 1),
    "expanded columns": (lambda full: full(41, 1).expand(41, 9), None, "window", 1),
    "three levels": (lambda full: full(4, 6, 40)[:, :4, 8:32], None, "window", 1),
    "three levels, odd": (lambda full: full(4, 6, 41)[:, :4, 3:24], None, "window", 1),
    "three levels, odd steps": (lambda full: full(4, 6, 41)[:, :4, 8:32], None, "window", 1),
    "coinciding": (lambda full: full(100, 4), [2, 1], "window", 1),
    "wide steps": (lambda full: full(203), [3], "window", 1),
    "far apart": (lambda full: full(5, 41), [2**33 + 1, 1], "window", 1),
    "all far apart": (lambda full: full(67), [2**35 + 5], "window", 1),
    "nine levels": (
        lambda full: full(3, 2, 3, 2, 2, 3, 2, 2, 2),
        [0, 9, 0, 40, 0, 5, 3, 0, 1],
        "window",
        1,
    ),
}


def row_major(shape):
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def check_moves(kind, t, kept=None):
    """Each element of t is stored once; or it is read at most once, and exactly once if it is kept.

    No other memory is accessed. Elements that share memory are read more often.
    """
    pointer, buffer = memory(t)
    size, shared = t.element_size(), 0 in t.stride()
    places = spread(t.shape, t.stride(), (pointer - buffer.base) // size)
    counts = buffer.byte_counts(kind).reshape(-1, size)
    least, most = np.zeros_like(counts), np.zeros_like(counts)
    most[places] = t.numel() if shared else 1
    least[places if kept is None else places[kept]] = 1
    assert (least <= counts).all()
    assert (counts <= most).all()


def access_allowed(x, y):
    """The widest accesses, in bytes, that each eight elements in y's memory order allow, in x and in y."""
    order = np.argsort(spread(y.shape, y.stride()).ravel(), kind="stable")
    bits = 16
    for t in (x, y):
        places = spread(t.shape, t.stride()).ravel()[order].astype(np.int64)
        firsts = np.repeat(places[::8], 8)[: len(places)]
        if (places - firsts != np.arange(len(places)) % 8).any():
            return t.element_size()
        bits |= 8 * t.element_size() | t.data_ptr() | int(np.bitwise_or.reduce(places[::8] * t.element_size()))
    return bits & -bits


def check_widths(kind, t, access):
    """All chunks except the last use accesses of this width. The last uses the widest that its end allows."""
    (_, buffer), size, last = memory(t), t.element_size(), t.numel() % 256
    want = Counter({access: (t.numel() - last) * size})
    if last:
        bits = access | last * size
        want[bits & -bits] += last * size
    widths = {width: int(times.sum()) * width for (k, width), times in buffer.counts.items() if k == kind}
    assert widths == +want


def check_window(x, start, strides, served, inplace):
    """apply or apply_, and keep_mask. Returns the kernel's name."""
    kernel, launches = served
    kept = kept_at(spread(x.shape, row_major(x.shape) if strides is None else strides, start))
    want = dropped(x.cpu(), kept, 1.5)
    args = (x, P, key_tensor(*KEY), start, strides)
    if inplace:
        launched(torch.ops.fused_dropout.apply_, *args, 1.5, launches=launches)
    y = x if inplace else launched(torch.ops.fused_dropout.apply, *args, 1.5, launches=launches)
    names = [name for name, *_ in fake_gpu.launches[-launches:]]
    assert all(f"::{'dropout' if kernel == 'dropout' else 'window'}_kernel<" in name for name in names)
    if launches == 1:  # only the accesses of the last launch are known
        check_moves("st", y)
        check_moves("ld", x, kept)
        if kernel != "dropout":
            access = x.element_size() if kernel == "by index" else access_allowed(x, y)
            check_widths("st", y, access)
            check_widths("ld", x, access)
    assert_same(y, want)
    mask = launched(torch.ops.fused_dropout.keep_mask, *args, launches=launches)
    assert torch.equal(mask.cpu(), torch.from_numpy(kept))
    if launches == 1:
        check_moves("st", mask)
    assert not fake_gpu.launches[-1][3].accesses("ld")
    return names[-1]


@pytest.mark.parametrize(("dtype", "start"), [*itertools.product(DTYPES, (0, 3)), (HALF, 2**33)], ids=str)
@for_inplace
@pytest.mark.parametrize("window", WINDOWS)
def test_windows(dtype, inplace, start, window):
    view, strides, *served = WINDOWS[window]
    if inplace and "expanded" in window:
        pytest.skip("nothing is written to memory that elements share")
    x = view(lambda *shape: values(math.prod(shape), dtype, "cuda").view(shape))
    name = check_window(x, start, strides, served, inplace)
    if served[0] != "dropout":
        assert f"{WIDE if start == 2**33 or 'far apart' in window else NARROW}>(" in name


@for_dtypes
@for_inplace
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_accesses_at_any_offset(dtype, inplace, offset):
    """Accesses are as wide as the addresses allow."""
    for name in ("one draw for a channel", "wide steps", "short rows, aligned"):
        view, strides, *served = WINDOWS[name]
        x = view(lambda *shape: values(math.prod(shape) + offset, dtype, "cuda")[offset:].view(shape))
        check_window(x, 0, strides, served, inplace)


@pytest.mark.parametrize("dtype", [HALF, torch.float64], ids=str)
def test_one_mask_for_misaligned_rows(dtype):
    """Rows that begin inside a block, and whose memory is not aligned either, use dropout_kernel."""
    x = values(7 * 301 + 1, dtype, "cuda")[1:].view(7, 301)
    y = launched(torch.ops.fused_dropout.apply, x, P, key_tensor(*KEY), 0, [0, 1], 1.5)
    assert "::dropout_kernel<" in fake_gpu.launches[-1][0]
    assert_same(y, dropped(x.cpu(), kept_at(spread(x.shape, [0, 1])), 1.5))


@pytest.mark.parametrize(("last", "index_type"), [(2**32 - 1, NARROW), (2**32, WIDE), (2**35 + 9, WIDE)])
def test_64_bits_only_where_needed(last, index_type):
    x = values(40 * 9, HALF, "cuda").view(40, 9)
    name = check_window(x, last - 39, [1, 0], ["window", 1], inplace=False)
    assert f"{index_type}>(" in name


def test_masks_in_vectors():
    """Masks are stored in vectors of 8 bytes, also if they are broadcast."""
    for strides in ([9, 1, 0], [49, 0, 1], [0, 0, 0]):
        mask = torch.empty(37, 9, 49, dtype=MASK, device="cuda")
        y = launched(torch.ops.fused_dropout.keep_mask, mask, P, key_tensor(*KEY), 0, strides)
        check_widths("st", y, 8)


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("scale", [None, -2.0])
def test_nothing_or_all_is_kept(p, scale):
    x = torch.tensor([math.nan, math.inf, -0.0, 3.0, 5.0] * 8).view(8, 5).cuda()
    y = launched(torch.ops.fused_dropout.apply, x, p, key_tensor(*KEY), 0, [1, 0], scale)
    assert_same(y, torch.zeros(8, 5) if p else x.cpu() * (1.0 if scale is None else scale))


# ----------------------------------------------------------------------------------- grids that the host never chooses


@functools.cache
def kernel(dtype, index_type):
    return module().find(f"window_kernel<.*{OPS[dtype]}, {index_type}>").name


def launch(dtype, index_type, x, y, dims, start=0, key=KEY, access=0, grid=1, only=None, **source):
    """Launches the kernel directly. dims: size and strides in x, y and index, innermost first. source: of the key."""
    bits, kind = (32, "u32") if index_type == NARROW else (64, "u64")
    window = b""
    for size, *strides in dims:
        shift = (size - 1).bit_length() - 1
        magic = -(-(2 ** (bits + shift)) // size)
        window += cstruct((kind, [size, magic, *strides, *strides[:1] * 2]), ("s32", shift))
    window += bytes((bits - 1) * (7 * bits // 8 + bits // 8) - len(window))
    window = cstruct(("s32", len(dims)), ("b", window, bits // 8))
    op = bytes(1) if dtype == MASK else cstruct(("f64" if dtype == torch.float64 else "f32", contract.scale(P)))
    numel = math.prod(size for size, *_ in dims)
    args = [streams(x, y), numel, window, start, access, key_source(key, **source), contract.threshold(P), op]
    module().launch(kernel(dtype, index_type), grid, THREADS, args, only=only)


def run(dtype, index_type, dims, start=0, key=KEY, **options):
    """Launches on exactly the window's memory, element by element, and checks everything."""
    shape, (x_strides, y_strides, strides) = [d[0] for d in dims], zip(*(d[1:] for d in dims), strict=True)
    x_places, y_places = spread(shape, x_strides), spread(shape, y_strides)
    x = values(int(x_places.max()) + 1, torch.float32 if dtype == MASK else dtype)
    y = torch.zeros(int(y_places.max()) + 1, dtype=dtype)
    x_memory, y_memory = (Buffer(t.view(torch.uint8).numpy()) for t in (x, y))
    launch(dtype, index_type, 0 if dtype == MASK else x_memory, y_memory, dims, start, key, **options)
    kept = kept_at(spread(shape, strides, start), key=key)
    picked = x[torch.from_numpy(x_places.astype(np.int64))]
    want = torch.from_numpy(kept) if dtype == MASK else dropped(picked, kept, contract.scale(P))
    y[torch.from_numpy(y_places.astype(np.int64))] = want
    assert torch.equal(torch.from_numpy(y_memory.array), y.view(torch.uint8))
    stored = y_memory.byte_counts("st").reshape(-1, dtype.itemsize)
    assert (np.bincount(y_places.astype(np.int64).ravel())[:, None] == stored).all()


GRIDS = {
    "dense": [(5003, 1, 1, 1)],
    "short": [(3, 1, 1, 1)],
    "broadcast": [(7, 1, 1, 0), (300, 7, 7, 1), (3, 2100, 2100, 301)],
    "shared by rows": [(13, 1, 1, 1), (401, 13, 13, 0)],
    "scattered": [(33, 2, 1, 11), (51, 66, 33, 2), (2, 4000, 1690, 7)],
    "eights": [(8, 40, 40, 1), (40, 1, 1, 16), (9, 320, 320, 640)],
    "pairs": [(2, 1, 1, 3), (2, 2, 2, 1), (2, 4, 4, 0), (2, 8, 8, 64), (2, 16, 16, 7), (2, 32, 32, 0), (29, 64, 64, 9)],
}


@for_ops
@for_blocks
@pytest.mark.parametrize("dims", GRIDS)
def test_any_grid(dtype, block_type, dims):
    for grid, start, access in ((1, 0, 0), (2, 5, 0), (7, 64, 0), (2, 3, EIGHT_BY_EIGHT)):
        run(dtype, block_type, GRIDS[dims], start, grid=grid, access=access)


@for_ops
@for_blocks
def test_key_from_device_memory(dtype, block_type):
    key = Buffer(np.array(KEY, np.uint64), readonly=True)
    run(dtype, block_type, GRIDS["broadcast"], on_device=key.ptr)
    assert key.counts


@for_ops
@for_blocks
def test_the_kernel_draws_and_stores_the_key(dtype, block_type):
    state = Buffer(np.array([KEY[0], 40], np.uint64), readonly=True)
    drawn = Buffer(np.zeros(2, np.uint64))
    source = {"drawn": drawn.ptr, "generator": (state.ptr, state.ptr + 8, 12)}
    run(dtype, block_type, GRIDS["broadcast"], key=(KEY[0], 13), grid=3, **source)
    assert list(drawn.array) == [KEY[0], 13]
    assert (drawn.byte_counts("st") == 1).all()


@for_blocks
@pytest.mark.parametrize("sizes", [(3, 701), (7, 301), (2, 1025), (2**11 + 1, 2), (2**12, 1)], ids=str)
def test_the_last_position_of_32_bits(block_type, sizes):
    """The division by multiplication is exact up to the largest tensor with 32-bit indices."""
    inner = math.prod(sizes)
    outer = (2**31 - 1) // inner
    dims = [(sizes[0], 1, 1, 1), (sizes[1], sizes[0], sizes[0], sizes[0]), (outer, 0, 0, inner)]
    dims = [dim for dim in dims if dim[0] > 1]
    numel = outer * inner
    grid = -(-numel // (8 * THREADS))
    positions = np.arange((grid - 1) * 8 * THREADS, numel, dtype=np.int64)
    x, y = Buffer(values(inner, HALF).numpy()), Buffer(np.zeros(inner, np.float16))
    launch(HALF, block_type, x, y, dims, grid=grid, only=[grid - 1])
    places = positions % inner
    want = np.zeros(inner, np.float16)
    want[places] = dropped(torch.from_numpy(x.array[places]), kept_at(positions), contract.scale(P)).numpy()
    assert (y.array == want).all()
    assert (y.byte_counts("st").reshape(-1, 2).max(axis=1)[places] == 1).all()


@pytest.mark.parametrize("access", [0, 16], ids=["one by one", "in vectors"])
def test_passes_through_a_huge_window(tmp_path, access):
    """The grid's first and last blocks, in a window of more than 2^34 elements.

    It has strides beyond 2^33 in x, y and the index.
    """
    dims = [(2**33 + 24, 1, 1, 0), (3, 2**33 + 64, 2**33 + 48, 2**35 + 9)]
    grid, numel = 2**21 + 1, 3 * (2**33 + 24)
    at_once = 8 * THREADS
    passes = [first for block in (0, grid - 1) for first in range(block * at_once, numel, grid * at_once)]
    x, y = (np.memmap(tmp_path / name, np.float16, "w+", shape=2**35) for name in "xy")
    windows = []
    for first in passes:  # whole, or split where the outer dimension advances
        edges = [first, *(k * dims[0][0] for k in (1, 2) if first < k * dims[0][0] < first + at_once)]
        for begin, end in zip(edges, [*edges[1:], min(first + at_once, numel)], strict=True):
            (a, b, i), n = ((begin // dims[0][0]) * np.array(dims[1][1:]), end - begin)
            a, b = int(a) + begin % dims[0][0], int(b) + begin % dims[0][0]
            x[a : a + n] = values(n, HALF).numpy()
            windows.append((a, b, n, int(i)))
    buffers = [[Buffer.at(t.ctypes.data + 2 * at, 2 * n) for t, at in ((x, a), (y, b))] for a, b, n, _ in windows]
    launch(HALF, WIDE, x.ctypes.data, y.ctypes.data, dims, 5, access=access, grid=grid, only=[0, grid - 1])
    assert {i for *_, i in windows} == {0, 2**35 + 9, 2 * (2**35 + 9)}
    for (a, b, n, i), (_, stored) in zip(windows, buffers, strict=True):
        assert (stored.byte_counts("st") == 1).all()
        kept = np.full(n, kept_at(np.array(5 + i)))
        assert_same(torch.from_numpy(y[b : b + n]), dropped(torch.from_numpy(x[a : a + n]), kept, contract.scale(P)))
