"""The CPU kernels of each instruction set, in a C++ program without torch; the operators under threads, forks and
inference mode. test_layers.py tests the choice of the layer, and FUSED_DROPOUT_CPU_ISA."""

import multiprocessing
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import golden
import pytest
import torch
from helpers import DTYPES, assert_same, expected, for_dtypes, key_tensor, values

import fused_dropout as fd

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
GRAIN = 1 << 16  # up to this size there is one thread
SIZES = [GRAIN - 1, GRAIN, GRAIN + 1, 2 * GRAIN, 2 * GRAIN + 1, 3 * GRAIN + 13, 2**20 + 3]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """tests/cpu_kernels_test.cpp with the kernels, optimised like the installed ones.

    If make has not built it, it is built here. `make sanitize` runs it under sanitizers.
    """
    if made := os.environ.get("CPU_KERNELS_TEST"):
        return made
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("cpu") / "cpu_kernels_test"
    csrc = HERE.parent / "csrc"
    headers = Path(torch.__file__).parent / "include"
    sources = [HERE / "cpu_kernels_test.cpp", *(csrc / "simd" / f"{isa}.cpp" for isa in ("portable", "avx2", "avx512"))]
    # GCC warns about undefined values in its own AVX-512 header. clang warns about GCC's names of warnings.
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-unknown-warning-option"]
    flags = ["-std=c++17", "-O3", "-pthread", *warnings, f"-I{csrc}", "-isystem", headers]
    subprocess.run([COMPILER, *flags, *sources, "-o", out], check=True)
    return out


@pytest.mark.parametrize("mode", [[], ["--threads"], ["--golden", golden.FILE]], ids=["alone", "threads", "golden"])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_kernels(program, isa, mode):
    """Compares with a scalar loop over lengths, alignments, large indices and ties, up to the last byte before a
    protected page. Other modes: several threads in one buffer, and the golden masks."""
    if isa != "portable" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86 CPU")
    done = subprocess.run([program, *mode, isa], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"ok {isa} ")


def test_the_best_kernels_are_chosen(program, info):
    if info.devices["cpu"] != "native" or os.environ.get("FUSED_DROPOUT_CPU_ISA", "auto") != "auto":
        pytest.skip("no kernels, or others were asked for")
    best = subprocess.run([program, "--dispatch"], capture_output=True, text=True, check=True).stdout.strip()
    assert info.cpu_isa == best


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@for_dtypes
def test_any_number_of_threads(set_threads, dtype):
    """Sizes around the grain and far above it. The number of threads changes between calls. apply, in place, and the
    mask, from an odd index on."""
    x, key = values(SIZES[-1], dtype), key_tensor(3, 2**40 + 1)
    want = expected(x, 3, 2**40 + 1, 0.3, start=5)
    mask = expected(torch.ones_like(x), 3, 2**40 + 1, 0.3, start=5) != 0
    for n in SIZES:
        for threads in (1, 2, 3, 7):
            set_threads(threads)
            assert_same(torch.ops.fused_dropout.apply(x[:n], 0.3, key, start=5), want[:n])
            assert torch.equal(fd.keep_mask((n,), 0.3, key, start=5), mask[:n])
            y = x[:n].clone()
            torch.ops.fused_dropout.apply_(y, 0.3, key, start=5)
            assert_same(y, want[:n])


@for_dtypes
@pytest.mark.parametrize(("first", "last"), [(5, 218), (0, 64), (325, 333)])
def test_columns_in_place_by_many_threads(set_threads, dtype, first, last):
    """The threads' shares begin and end inside rows. Memory between the columns does not change."""
    rows = 3 * GRAIN // (last - first) + 7
    whole, key = values(rows * 333, dtype).view(rows, 333), key_tensor(8, 9)
    want = whole.clone()
    want[:, first:last] = expected(whole[:, first:last].contiguous(), 8, 9, 0.6)
    for threads in (1, 3, 7):
        set_threads(threads)
        buffer = whole.clone()
        columns = buffer[:, first:last]
        assert fd.dropout(columns, 0.6, inplace=True, key=key).data_ptr() == columns.data_ptr()
        assert_same(buffer, want)
        assert_same(fd.dropout(whole[:, first:last], 0.6, key=key), want[:, first:last])


def test_many_python_threads_at_once():
    """Calls of all kinds share no state, also if their kernels use torch's threads."""
    jobs = [(n, dtype, seed) for seed in range(6) for dtype in DTYPES for n in (1, 77, 4099, GRAIN + 1, 3 * GRAIN)]

    def draw(job):
        n, dtype, seed = job
        return fd.dropout(values(n, dtype), 0.25, key=key_tensor(seed, n))

    alone = [draw(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            for got, want in zip(pool.map(draw, jobs), alone, strict=True):
                assert_same(got, want)


def test_python_threads_share_a_generator():
    """In any order of the threads, the keys drawn are those of sequential calls, and none is drawn twice."""
    x = torch.ones(64)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(5)
        alone = [fd.dropout(x, 0.5).tolist() for _ in range(400)]
        torch.manual_seed(5)
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda _: fd.dropout(x, 0.5).tolist(), range(400)))
    finally:
        torch.set_rng_state(state)
    assert len(set(map(tuple, alone))) == 400
    assert sorted(together) == sorted(alone)


@for_dtypes
def test_inference_mode(dtype):
    """Same bits from ordinary and inference tensors, also in place; results are inference tensors."""
    x, key = values(GRAIN + 5, dtype), key_tensor(1, 2)
    want = expected(x, 1, 2, 0.4)
    with torch.inference_mode():
        for source in (x, x.clone()):
            y = fd.dropout(source, 0.4, key=key)
            assert y.is_inference()
            assert_same(y.clone(), want)
        inplace = x.clone()
        assert fd.dropout(inplace, 0.4, inplace=True, key=key).data_ptr() == inplace.data_ptr()
        assert_same(inplace, want)
        assert torch.equal(fd.keep_mask(x, 0.4, key), fd.keep_mask((len(x),), 0.4, key))


# ---------------------------------------------------------------------------------------------- after a fork

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")


class Dropped(torch.utils.data.Dataset):
    """Each item has its own size, dtype and key; some sizes are above the grain."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        n = (9, 1000, GRAIN - 1, 2 * GRAIN + 3)[i % 4]
        return fd.dropout(values(n, DTYPES[i % 3]), 0.5, key=key_tensor(i, 2**33))


def same_in_child(pipe):
    torch.set_num_threads(1)  # like a DataLoader's workers: OpenMP's threads do not survive a fork
    data = Dropped()
    pipe.send([(x.dtype, x.double().nan_to_num().tolist()) for x in (data[i] for i in range(4))])
    pipe.close()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child():
    """A forked child has the parent's choice of kernels and library state, but not its threads."""
    data = Dropped()
    want = [data[i] for i in range(4)]  # with all threads, so that the fork loses some
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=same_in_child, args=(theirs,))
    child.start()
    theirs.close()
    try:
        assert ours.poll(60), "the child hangs"
        for (dtype, got), x in zip(ours.recv(), want, strict=True):
            assert_same(torch.tensor(got, dtype=torch.float64).to(dtype), x)
        child.join(10)
        assert child.exitcode == 0
    finally:
        child.kill()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_loader_workers():
    data = Dropped()
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for got, i in zip(loader, range(len(data)), strict=True):
        assert_same(got, data[i])
