"""The fused mask of torch.compile on a CUDA device: Inductor's kernel, compiled by Triton, run on the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import contract
import numpy as np
import pytest
from conftest import ON_FAKE_GPU

if ON_FAKE_GPU:
    from ptx_run import Buffer, Module

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_FAKE_GPU, reason="only the fake GPU runs PTX from a file")]

INDUCTOR = Path(__file__).parent.parent / "tools" / "inductor.py"
SEED, OFFSET, P, BLOCK = 0xFEDC_BA98_7654_3210, 0x8000_0001_FFFF_FFFF, 0.1, 1024


@pytest.mark.parametrize(
    ("drop", "dtype", "numel", "first_block"),
    [
        ("fused", "float16", 5000, 0),
        ("fused", "float32", 5000, 0),
        ("fused", "float32", 2**31 - 8, 2**21 - 3),
        ("fused", "float16", 2**35 + 4096, 2**25 - 1),  # the block index of the mask grows from 32 to 33 bits
        ("alone", "float32", 5000, 0),
    ],
)
def test_is_the_contracts_mask(drop, dtype, numel, first_block, tmp_path):
    without_fake = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, "-W", "ignore", INDUCTOR, tmp_path, dtype, str(numel), drop]
    made = subprocess.run(command, env=without_fake, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    first = first_block * BLOCK
    n = min(numel - first, 5 * BLOCK)
    x, y = Buffer(np.ones(n, dtype)), Buffer(np.zeros(n, dtype))
    key = Buffer(np.array([SEED, OFFSET], np.uint64))
    floats = iter([buffer.ptr - first * np.dtype(dtype).itemsize for buffer in (x, y)])
    kinds = json.loads((tmp_path / "fused.json").read_text())
    args = [key if kind == "*u64" else next(floats) if kind.startswith("*fp") else numel for kind in kinds]
    module = Module((tmp_path / "fused.ptx").read_text())
    (kernel,) = module.functions
    args += [0] * (len(module.find(kernel).params) - len(args))  # Triton's scratch memory, not used
    blocks = -(-n // BLOCK)
    module.launch(kernel, first_block + blocks, 128, args, only=range(first_block, first_block + blocks))
    kept = contract.keep_numpy(SEED, OFFSET, P, n, first)
    assert y.array.astype(bool).tolist() == kept.tolist()
