"""csrc/philox.h and csrc/mask.h, compiled alone: the functions that every kernel calls, also on the device."""

import ctypes
import math
import os
import random
import shutil
import subprocess
from pathlib import Path

import contract
import golden
import pytest
from helpers import EDGES, PROBABILITIES

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host") / "contract.so"
    source = HERE / "host_contract.cpp"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    subprocess.run(
        [COMPILER, *flags, "-shared", "-fPIC", f"-I{HERE.parent / 'csrc'}", source, "-o", library, "-static-libubsan"],
        check=True,
    )
    lib = ctypes.CDLL(str(library))
    lib.threshold_of.argtypes, lib.threshold_of.restype = [ctypes.c_double], ctypes.c_uint64
    lib.keep_words.argtypes = [ctypes.c_uint32 * 4, ctypes.c_int, ctypes.c_uint64]
    lib.keep_index.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_double]
    lib.keep_words.restype = lib.keep_index.restype = ctypes.c_bool
    lib.drop_or_scale_float.argtypes = [ctypes.c_bool, ctypes.c_float, ctypes.c_float]
    lib.drop_or_scale_float.restype = ctypes.c_float
    return lib


def words(*values):
    return (ctypes.c_uint32 * len(values))(*values)


def test_golden_masks(host):
    """The known answers of Philox, and keep() of every element in mask_v1.txt."""
    known, masks, elements = golden.read()
    for p in known:
        out = words(0, 0, 0, 0)
        host.philox_words(words(*p.counter), words(*p.key), out)
        assert tuple(out) == p.words
    for m in masks:
        assert tuple(host.keep_index(m.seed, m.offset, i, m.p) for i in m.indices) == m.kept, m
    for e in elements:
        assert host.keep_index(e.seed, e.offset, e.index, e.p) == e.kept, e


def test_threshold(host):
    for p in [*PROBABILITIES, 0.0, 1.0, math.nextafter(0, 1), math.nextafter(1, 0)]:
        if p in (0.0, 1.0):
            assert host.threshold_of(p) == (0 if p else 1 << 48)
        else:
            assert host.threshold_of(p) == contract.threshold(p)


def test_keep_is_a_48_bit_comparison(host):
    """For each slot: K_hi equal to the draw, below it, above it, 0, 65,535 and 65,536; both outcomes of the tie."""
    generator = random.Random(0)
    for draw in (0, 1, 0x7FFF, 0xFFFE, 0xFFFF, generator.randrange(1 << 16)):
        for tie in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, generator.randrange(1 << 32)):
            for slot in range(8):
                block = [generator.randrange(1 << 32) for _ in range(4)]
                word = slot // 2
                other = block[word] >> 16 if slot % 2 == 0 else block[word] & 0xFFFF
                block[word] = draw << 16 | other if slot % 2 else other << 16 | draw
                # Sets one of the other three words so that their XOR is the wanted tie.
                free = (word + 1) % 4
                rest = [w for i, w in enumerate(block) if i not in (word, free)]
                block[free] = tie ^ rest[0] ^ rest[1]
                value = draw << 32 | tie
                for k in {max(value - 1, 0), value, value + 1, draw << 32, (draw + 1) << 32, 1 << 48}:
                    assert host.keep_words(words(*block), slot, k) == (value < k)


def test_keep_of_far_elements(host):
    """All 64 bits of seed, offset and index reach the counter and the key."""
    indices = [0, 7, 8, (1 << 32) - 1, 1 << 32, (1 << 35) - 1, 1 << 35, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    for seed in EDGES[:6]:
        for offset in EDGES[:6]:
            for index in indices:
                for p in (0.1, 0.5, 0.9):
                    assert host.keep_index(seed, offset, index, p) == contract.keep(seed, offset, index, p)


def test_drop_is_a_selection(host):
    for x in (math.inf, math.nan, -1.0):
        dropped = host.drop_or_scale_float(False, x, 2.0)
        assert dropped == 0
        assert math.copysign(1, dropped) == 1
    assert math.copysign(1, host.drop_or_scale_float(True, -0.0, 2.0)) == -1
