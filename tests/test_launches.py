"""Properties of the kernel for rows that results do not show. An interpreter of the compiled code counts them.

Each call is one launch. It moves each element once, with the widest access that its address allows. This holds for any
grid, and for tensors larger than any memory.
"""

import functools
import itertools
import math
import operator
import random
from collections import Counter
from typing import NamedTuple

import contract
import numpy as np
import pytest
import torch
from conftest import ON_FAKE_GPU
from helpers import assert_same, expected, for_dtypes, key_tensor, values
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
from torch.utils._python_dispatch import _disable_current_modes

import fused_dropout as fd

if ON_FAKE_GPU:
    import fake_gpu
    from ptx_run import Buffer, cstruct

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_FAKE_GPU, reason="only the fake GPU counts accesses")]


class Rows(NamedTuple):
    """The kernels' struct Rows."""

    count: int
    length: int
    x: int
    y: int
    index: int

    def kept(self, p=P, start=0, key=KEY):
        """The contract's mask, as an array of rows."""
        return np.stack([contract.keep_numpy(*key, p, self.length, start + r * self.index) for r in range(self.count)])


def dense(n):
    return Rows(1, n, n, n, n)


def bytes_by_width(rows, start, size, sides):
    """The number of bytes that accesses of each width move. sides: (pointer, stride).

    A chunk of 32 blocks uses the widest access that both addresses, and the begin and end of the row, allow.
    """
    moved = Counter()
    for r in range(rows.count):
        head = (start + r * rows.index) % 8
        end = head + rows.length
        for at in range(0, end, 256):
            begin, stop = max(head - at, 0), min(end - at, 256)
            addresses = [pointer + (r * stride - head + at) * size for pointer, stride in sides]
            together = functools.reduce(operator.or_, addresses, (begin | stop) * size)
            moved[min(together & -together, 16, 8 * size)] += (stop - begin) * size
    return dict(moved)


def assert_one_pass(rows, start, size, kept, y, x=None):
    """Each element of y is stored once. Each element of x is read at most once, and kept elements exactly once.

    Accesses are as wide as the addresses allow. No other memory is accessed. y and x: a pointer, and the Buffer that it
    points into.
    """
    sides = [("st", *y, rows.y)] + ([("ld", *x, rows.x)] if x else [])
    moved = bytes_by_width(rows, start, size, [(pointer, stride) for _, pointer, _, stride in sides])
    for kind, pointer, buffer, stride in sides:
        places = (pointer - buffer.base) // size + np.arange(rows.count)[:, None] * stride + np.arange(rows.length)
        counts = buffer.byte_counts(kind).reshape(-1, size)
        least, most = np.zeros_like(counts), np.zeros_like(counts)
        most[places] = 1
        least[places if kind == "st" else places[kept]] = 1
        assert (least <= counts).all()
        assert (counts <= most).all()
        widths = {width: times.sum() * width for (k, width), times in buffer.counts.items() if k == kind}
        assert widths == moved
        assert {k for k, _ in buffer.counts} <= {k for k, _, b, _ in sides if b is buffer}


# ------------------------------------------------------------------------------------------------ launches by the host


def check_apply(x, rows, start, inplace):
    want, args = expected(x, *KEY, P, start), (x, P, key_tensor(*KEY))
    if inplace:
        rows = rows._replace(y=rows.x)
        launched(torch.ops.fused_dropout.apply_, *args, start=start)
    y = x if inplace else launched(torch.ops.fused_dropout.apply, *args, start=start)
    assert_one_pass(rows, start, x.element_size(), rows.kept(start=start), memory(y), memory(x))
    assert_same(y, want)


@for_dtypes
@pytest.mark.parametrize("binding", ["eager", "python"])
@pytest.mark.parametrize("n", [1, 7, 8, 2047, 2049, 65541, 131072])
def test_one_launch_a_call(dtype, binding, n, monkeypatch):
    """Forward, backward, in place and mask. The largest sizes need several passes of the grid."""
    if binding == "python":
        monkeypatch.setattr("fused_dropout.dispatch._eager_drop", None)
    rows, size, key = dense(n), dtype.itemsize, key_tensor(*KEY)
    kept, x, gradient = rows.kept(), values(n, dtype, "cuda").requires_grad_(), values(n, dtype, "cuda")
    y = launched(fd.dropout, x, P, key=key)
    assert_one_pass(rows, 0, size, kept, memory(y), memory(x))
    (dx,) = launched(torch.autograd.grad, y, x, gradient)
    assert_one_pass(rows, 0, size, kept, memory(dx), memory(gradient))
    assert not fake_gpu.buffer_of(x).counts
    launched(fd.dropout, gradient, P, inplace=True, key=key)
    assert_one_pass(rows, 0, size, kept, memory(gradient), memory(gradient))
    mask = launched(fd.keep_mask, x, P, key)
    assert_one_pass(rows, 0, 1, kept, memory(mask))
    assert fake_gpu.launches[-1][3].accesses("ld") == {}


@pytest.mark.parametrize("shape", [(0,), (3, 0, 5)])
def test_nothing_to_launch(shape, key):
    before, x = len(fake_gpu.launches), torch.empty(shape).cuda().requires_grad_()
    torch.autograd.grad(fd.dropout(x * 1, P, key=key), x, torch.empty(shape).cuda())
    fd.dropout(x.detach(), P, inplace=True, key=key)
    for call in (torch.ops.fused_dropout.apply, torch.ops.fused_dropout.apply_, torch.ops.fused_dropout.keep_mask):
        call(x.detach(), P, key)
    assert len(fake_gpu.launches) == before


@for_dtypes
@pytest.mark.parametrize("start", [0, 8, 2**36])
def test_widest_accesses(dtype, start, key):
    """Whole and aligned blocks use only the widest accesses: 16 bytes, or 8 bytes for a mask."""
    n, x = 9 * 2**13, values(9 * 2**13 + 16, dtype, "cuda")[16:]
    for call in (torch.ops.fused_dropout.apply, torch.ops.fused_dropout.apply_):
        launched(call, x, P, key, start=start)
        stats = fake_gpu.launches[-1][3]
        assert stats.accesses("ld") == stats.accesses("st") == {16: n * dtype.itemsize // 16}
    launched(torch.ops.fused_dropout.keep_mask, x, P, key, start=start)
    assert fake_gpu.launches[-1][3].accesses("st") == {8: n // 8}


@for_dtypes
@for_inplace
@pytest.mark.parametrize("start", [0, 3, 8])
def test_views_at_any_offset(dtype, inplace, start):
    for k in range(17):
        check_apply(values(80, dtype, "cuda")[k : k + 59], dense(59), start, inplace)


LAYOUTS = {
    "columns": (lambda x: x(7, 340)[:, 3:316], Rows(7, 313, 340, 313, 313)),
    "aligned columns": (lambda x: x(7, 340)[:, 8:328], Rows(7, 320, 340, 320, 320)),
    "odd row stride": (lambda x: x(5, 341)[:, 1:281], Rows(5, 280, 341, 280, 280)),
    "shortest rows": (lambda x: x(9, 264)[:, 5:261], Rows(9, 256, 264, 256, 256)),
    "long rows": (lambda x: x(3, 2101)[:, 4:2068], Rows(3, 2064, 2101, 2064, 2064)),
    "more rows than the grid has": (lambda x: x(600, 264)[:, 3:259], Rows(600, 256, 264, 256, 256)),
    "projections": (lambda x: x(4, 5, 3, 264)[:, :, 1], Rows(20, 264, 792, 264, 264)),
    "transposed": (lambda x: x(37, 23).t(), dense(37 * 23)),
    "channels_last": (lambda x: x(2, 6, 7, 5).permute(0, 3, 1, 2), dense(420)),
}


@for_dtypes
@for_inplace
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_one_launch(dtype, inplace, start, layout):
    view, rows = LAYOUTS[layout]
    check_apply(view(lambda *shape: values(math.prod(shape), dtype, "cuda").view(shape)), rows, start, inplace)


@pytest.mark.parametrize("start", [0, 2**33, 2**35 - 50, 2**36, 2**62])
def test_64_bits_only_where_needed(start):
    check_apply(values(100, HALF, "cuda"), dense(100), start, inplace=False)
    assert f"{WIDE if start > 2**34 else NARROW}>(" in fake_gpu.launches[-1][0]


# ----------------------------------------------------------------------------------- grids that the host never chooses


@functools.cache
def kernel(dtype, block_type):
    return module().find(f"dropout_kernel<.*{OPS[dtype]}, {block_type}>").name


def launch(dtype, block_type, x, y, rows, p=P, start=0, key=KEY, grid=1, block=256, only=None, **source):
    """Launches the kernel directly. source: the source of its key, if it is not given by value."""
    op = bytes(1) if dtype == MASK else cstruct(("f64" if dtype == torch.float64 else "f32", contract.scale(p)))
    rows = cstruct(("s64", [*rows, rows.x, rows.x]))
    args = [streams(x, y), rows, start, key_source(key, **source), contract.threshold(p), op]
    module().launch(kernel(dtype, block_type), grid, block, args, only=only)


def run(dtype, block_type, rows, p=P, start=0, key=KEY, leads=(0, 0), **options):
    """Launches on exactly the rows' memory and checks everything. leads: offsets of the first blocks from aligned
    addresses."""
    size, kept = dtype.itemsize, rows.kept(p, start, key)
    x = values((rows.count - 1) * rows.x + rows.length, torch.float32 if dtype == MASK else dtype)
    y = torch.zeros((rows.count - 1) * rows.y + rows.length, dtype=dtype)
    x_memory, y_memory = (
        Buffer(t.view(torch.uint8).numpy(), (start + lead) % 8 * size) for t, lead in zip((x, y), leads, strict=True)
    )
    launch(dtype, block_type, 0 if dtype == MASK else x_memory, y_memory, rows, p, start, key, **options)
    sides = [(buffer.ptr, buffer) for buffer in (y_memory, x_memory)]
    assert_one_pass(rows, start, size, kept, *sides[: 1 if dtype == MASK else 2])
    x = x.as_strided((rows.count, rows.length), (rows.x, 1))
    want = [contract.expected(row, *key, p, start + r * rows.index) for r, row in enumerate(x)]
    want = torch.from_numpy(kept) if dtype == MASK else torch.stack(want)
    y = torch.from_numpy(y_memory.array).view(dtype).as_strided(want.shape, (rows.y, 1)).contiguous()
    assert torch.equal(y.view(torch.uint8), want.view(torch.uint8))
    return kept


GRIDS = [(1, (32, 8)), (1, 256), ((3, 1), (64, 2)), ((1, 5), (64, 4)), ((7, 3), (32, 2)), (5, (32, 1))]


@for_ops
@for_blocks
@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_any_grid(dtype, block_type, grid, block):
    run(dtype, block_type, dense(1517), start=5, grid=grid, block=block)
    run(dtype, block_type, Rows(7, 361, 377, 364, 400), start=3, grid=grid, block=block)
    run(dtype, block_type, Rows(3, 512, 512, 528, 1024), start=8, grid=grid, block=block)
    run(dtype, block_type, Rows(33, 9, 9, 16, 2**20 + 1), start=6, grid=grid, block=block)


@for_blocks
@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize("dtype", [HALF, torch.float32, torch.float64], ids=str)
def test_any_number_of_chunks(dtype, block_type, grid):
    """Pairs of passes, a single pass after them, and partial chunks at both ends, for each remainder of the grid's
    stride."""
    for chunks, tail, start in itertools.product(range(8), (0, 5, 40), (0, 3)):
        run(dtype, block_type, dense(256 * chunks + tail or 1), start=start, grid=grid, block=32)


@for_ops
@pytest.mark.parametrize("start", [0, 3])
def test_each_side_has_its_own_alignment(dtype, start):
    for leads in itertools.product((0, 1, 3, 4, 7), repeat=2):
        run(dtype, NARROW, Rows(2, 301, 304, 312, 304), start=start, leads=leads, block=(32, 2))


@for_ops
@for_blocks
def test_key_from_device_memory(dtype, block_type):
    key = Buffer(np.array(KEY, np.uint64), readonly=True)
    run(dtype, block_type, dense(300), on_device=key.ptr)
    assert key.counts


@for_ops
@for_blocks
@pytest.mark.parametrize("exponent", [32, 34, 35, 36, 62])
def test_start_around_a_power_of_two(dtype, block_type, exponent):
    if block_type == WIDE or exponent < 35:
        run(dtype, block_type, dense(800), start=2**exponent - 400, grid=2, block=32)


def check_windows(folder, block_type, rows, windows, **options):
    """In tensors larger than any memory: each window (place in x, place in y, length, index) moves once."""
    x, y = (np.memmap(folder / name, np.float16, "w+", shape=2**38) for name in "xy")
    for a, _, n, _ in windows:
        x[a : a + n] = values(n, HALF).numpy()
    buffers = [[Buffer.at(t.ctypes.data + 2 * at, 2 * n) for t, at in ((y, b), (x, a))] for a, b, n, _ in windows]
    launch(HALF, block_type, x.ctypes.data, y.ctypes.data, rows, **options)
    for (a, b, n, i), sides in zip(windows, buffers, strict=True):
        assert_one_pass(dense(n), i, 2, dense(n).kept(start=i), *((buffer.base, buffer) for buffer in sides))
        assert_same(torch.from_numpy(y[b : b + n]), contract.expected(torch.from_numpy(x[a : a + n]), *KEY, P, i))


@pytest.mark.parametrize(("stride", "block_type"), [(2**29, NARROW), (2**29, WIDE), (2**32, WIDE), (2**33, WIDE)])
def test_passes_through_a_huge_tensor(tmp_path, stride, block_type):
    """The first and last blocks of the grid: both passes of a pair, and the tail after the last pass."""
    far, grid, start = 8 * stride, stride // 256, 2**20
    places = ((0, 2048), (far - 2048, 4096), (2 * far - 2048, 2053))
    windows = [(at, at, n, start + at) for at, n in places]
    check_windows(tmp_path, block_type, dense(2 * far + 5), windows, start=start, grid=grid, only=[0, grid - 1])


@pytest.mark.parametrize(("index", "block_type"), [(59, NARROW), (59, WIDE), (2**18 + 1, WIDE), (2**40 + 3, WIDE)])
def test_rows_of_a_huge_tensor(tmp_path, index, block_type):
    """The last line of the tallest grid, and the rows that it continues with, beyond 2^32 elements."""
    rows = Rows(3 * 65535, 59, 2**18, 2**17 + 8, index)
    windows = [(r * rows.x, r * rows.y, 59, r * index) for r in (65534, 2 * 65535 - 1, 3 * 65535 - 1)]
    check_windows(tmp_path, block_type, rows, windows, grid=(1, 65535), only=[65534])


@for_ops
@pytest.mark.parametrize(
    "k", [1, 2**32 - 1, 2**32, 2**47, (0xFFFF << 32) - 1, 0xFFFF << 32, 2**48 - 2, 2**48 - 1], ids=hex
)
def test_threshold(dtype, k):
    assert contract.threshold(1 - k / 2**48) == k
    run(dtype, NARROW, dense(2003), p=1 - k / 2**48)


@pytest.mark.parametrize("dtype", [HALF, MASK], ids=str)
@pytest.mark.parametrize("draw", [0, 40000, 65535])
def test_ties(dtype, draw):
    """An element whose 48 bits equal K, which drops it, or K - 1, which keeps it.

    It is at each place of a block: in whole chunks, in vectors at the end of a row, and among single elements.
    """
    for half, tie in itertools.product(range(8), (0, 2**32 - 1)):
        seed, offset, i = contract.forge(random.Random(half), half, draw, tie)
        for n, ahead, lead in ((256, 8 * (half + 1), 0), (256, 8 * (31 - half), 0), (20, 8, 0), (20, 8, 1)):
            start = i - half - ahead
            for k in {draw << 32 | tie, (draw << 32 | tie) + 1} - {0, 2**48}:
                options = {"p": 1 - k / 2**48, "start": start, "key": (seed, offset), "leads": (lead, lead)}
                kept = run(dtype, WIDE, dense(n), block=32, **options)
                assert kept[0, i - start] == (k > draw << 32 | tie)


# ------------------------------------------------------------------------------------------------------------- sectors


def efficiency(kind):
    """Of the last launch: the bytes moved, divided by the bytes of the memory sectors that the requests touched."""
    stats = fake_gpu.launches[-1][3]
    sectors = sum(n for (k, space, _), n in stats.sectors.items() if (k, space) == (kind, "global"))
    return stats.bytes(kind) / (32 * sectors)


@pytest.fixture
def counts_sectors(monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_SECTORS", "1")


@for_dtypes
def test_whole_sectors(dtype, counts_sectors, key):
    """The warps' requests touch only the memory that they move."""
    x = values(2**15, dtype, "cuda")
    y = launched(torch.ops.fused_dropout.apply, x, P, key)
    assert (efficiency("ld"), efficiency("st")) == (1, 1)
    launched(torch.ops.fused_dropout.apply_, y, P, key)
    assert (efficiency("ld"), efficiency("st")) == (1, 1)
    launched(torch.ops.fused_dropout.keep_mask, x, P, key)
    assert efficiency("st") == 1
    launched(torch.ops.fused_dropout.apply, x.view(32, 32, 32), P, key, 0, [32, 1, 0])
    assert "::window_kernel<" in fake_gpu.launches[-1][0]
    assert (efficiency("ld"), efficiency("st")) == (1, 1)
    launched(torch.ops.fused_dropout.apply, x.view(128, 256), P, key, 0, [1, 128])  # the layout differs from forward's
    assert "::window_kernel<" in fake_gpu.launches[-1][0]
    assert (efficiency("ld"), efficiency("st")) == (1, 1)


@for_dtypes
@pytest.mark.parametrize(("alignment", "least"), [(8, 0.88), (4, 0.79), (2, 0.66)])
def test_sectors_of_misaligned_views(dtype, alignment, least, counts_sectors, key):
    if alignment < dtype.itemsize:
        pytest.skip("elements are aligned")
    x = values(2**15 + 8, dtype, "cuda")[alignment // dtype.itemsize :][: 2**15]
    launched(torch.ops.fused_dropout.apply_, x, P, key)
    assert min(efficiency("ld"), efficiency("st")) >= least
    launched(torch.ops.fused_dropout.apply_, x.view(32, 32, 32), P, key, 0, [32, 1, 0])
    assert "::window_kernel<" in fake_gpu.launches[-1][0]
    assert min(efficiency("ld"), efficiency("st")) >= least


# ----------------------------------------------------------------------------------------- the key of a captured graph


@for_ops
@for_blocks
def test_the_kernel_draws_and_stores_the_key(dtype, block_type):
    """From the addresses of seed and offset. The key is stored once, on any grid."""
    state = Buffer(np.array([KEY[0], 40], np.uint64), readonly=True)
    for grid, block in (((2, 3), (32, 2)), (1, 256)):
        drawn = Buffer(np.zeros(2, np.uint64))
        source = {"drawn": drawn.ptr, "generator": (state.ptr, state.ptr + 8, 12)}
        run(dtype, block_type, Rows(3, 300, 300, 304, 600), key=(KEY[0], 13), grid=grid, block=block, **source)
        assert list(drawn.array) == [KEY[0], 13]
        assert (drawn.byte_counts("st") == 1).all()


def test_one_launch_a_call_in_a_captured_graph(info):
    """The kernel itself draws the key, so no other kernel has to write it before."""
    if not info.eager:
        pytest.skip("without the eager binding torch draws the keys")
    x = torch.ones(600, device="cuda", requires_grad=True)
    ones, graph = torch.ones(20, 30, device="cuda"), torch.cuda.CUDAGraph()
    launched(fd.dropout, ones, 0.5)  # the first call on a device runs in Python
    with _disable_current_modes(), torch.cuda.graph(graph):
        y = fd.dropout(x, 0.5)
        (dx,) = torch.autograd.grad(y, x, ones.view(600))
        fd.dropout(ones, 0.5, inplace=True)
        rows = fd.dropout(ones, 0.5, noise_shape=(20, 1))
    seen = []
    for _ in range(2):
        before = len(fake_gpu.launches)
        graph.replay()
        assert len(fake_gpu.launches) == before + 4
        assert torch.equal(dx.cpu(), y.detach().cpu())
        assert (ones.cpu() == 0).any()
        seen.append(torch.cat((y.detach().cpu(), rows.cpu().view(600))))
        ones.fill_(1)
    assert not torch.equal(*seen)
