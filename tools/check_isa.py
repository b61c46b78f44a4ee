"""For ``make test-qemu``: checks the installed library on an emulated CPU, its choice of kernels and their masks.

The argument is the instruction set that it has to choose.
"""

import sys

import torch

import fused_dropout as fd
from fused_dropout import reference


def main() -> None:
    (wanted,) = sys.argv[1:]
    chosen = fd.backend_info().cpu_isa
    assert chosen == wanted, fd.backend_info()
    key = torch.tensor([1, 2], dtype=torch.uint64)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = torch.randn(200003).to(dtype)
        assert torch.equal(fd.dropout(x, 0.3, key=key), reference.apply(x, 0.3, key)), dtype
    assert torch.equal(fd.keep_mask(x, 0.3, key), reference.keep_mask(x, 0.3, key))
    print("ok fused_dropout with", chosen)


if __name__ == "__main__":
    main()
