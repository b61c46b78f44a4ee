"""The first call on a GPU, if the kernels have no code for it or a load fails."""

import subprocess
import sys

import pytest
from conftest import ON_FAKE_GPU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_FAKE_GPU, reason="only the fake GPU's runtime can be made to fail"),
]

# fail(error) makes the fake runtime return this error when a kernel is loaded, and mend() undoes it.
START = """
import ctypes, mmap, warnings
import torch, fake_gpu, fused_dropout as fd
from fused_dropout import native
libc = ctypes.CDLL(None)
address = ctypes.cast(libc.cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, ctypes.c_void_p).value
working = ctypes.string_at(address, 6)
def write(code):
    page = address & -mmap.PAGESIZE
    assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * mmap.PAGESIZE), 7) == 0
    ctypes.memmove(address, code, len(code))
def fail(error):
    write(b"\\xb8" + error.to_bytes(4, "little") + b"\\xc3")  # mov eax, error; ret
def mend():
    write(working)
x, key = torch.ones(5000, device="cuda"), fd.key(5)
want = fd.dropout(torch.ones(5000), 0.3, key=key)
"""

ANOTHER_GPU = """
from fused_dropout import compiled, reference
served = []  # stand-ins: the fake GPU lacks the torch kernels that the reference calls
def serve(name):
    return lambda x, *_: (served.append(name), None if name == "apply_" else torch.empty_like(x))[1]
for name in ("apply", "apply_", "keep_mask"):
    for module in (compiled, reference):
        setattr(module, name, serve(name))
fail(209)  # cudaErrorNoKernelImageForDevice
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        fd.dropout(x, 0.3, key=key)
    torch.ops.fused_dropout.apply(x, 0.3, key)
    torch.ops.fused_dropout.apply_(x, 0.3, key)
assert served == ["keep_mask", "keep_mask", "apply", "apply_"], served  # the first two under the fake GPU's mode
said = [str(w.message) for w in caught if "there is no code" in str(w.message)]
assert len(said) == 1, caught
for part in ("cuda:0 has compute capability 9.0", "were built for 8.0, 9.0", "TORCH_CUDA_ARCH_LIST=9.0 ", "pip "):
    assert part in said[0], said
info = fd.backend_info()
assert info.devices["cuda"] != "native" and any("there is no code" in note for note in info.notes), info
assert not native.eager.serves(x.device) and not fake_gpu.launches
"""

A_LOAD_FAILS_ONCE = """
fail(2)  # cudaErrorMemoryAllocation
for call in (lambda: fd.dropout(x, 0.3, key=key), lambda: torch.ops.fused_dropout.apply(x, 0.3, key)):
    try:
        call()
    except RuntimeError as error:
        assert "failed: " in str(error) and "there is no code" not in str(error), error
    else:
        raise AssertionError("no error")
mend()
assert torch.equal(fd.dropout(x, 0.3, key=key).cpu(), want)
name, grid, block, stats = fake_gpu.launches[-1]
assert grid[0] > 1, grid  # the failed call has left no number behind
"""

NO_OPERATOR_WITHOUT_CODE = """
fail(222)  # cudaErrorUnsupportedPtxVersion
try:
    torch.ops.fused_dropout.apply(x, 0.3, key)
except RuntimeError as error:
    assert "cuda:0 has compute capability 9.0" in str(error) and "fused_dropout info" in str(error), error
else:
    raise AssertionError("no error")
"""

LOADED_AT_THE_FIRST_CALL = """
assert native.cuda_kernels.load(0) == ""
fail(209)  # a loaded kernel is not loaded again
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for y in (x.to(dtype), x.to(dtype).view(50, 100)[:, ::3]):
        fd.dropout(y, 0.3, key=key)
        fd.keep_mask(y, 0.3, key)
torch.ops.fused_dropout.draw_keys(2, device=x.device)
"""


@pytest.mark.parametrize(
    "script",
    [ANOTHER_GPU, A_LOAD_FAILS_ONCE, NO_OPERATOR_WITHOUT_CODE, LOADED_AT_THE_FIRST_CALL],
    ids=["another GPU", "a load fails once", "no operator without code", "loaded at the first call"],
)
def test_first_call(script):
    fake = sys.modules["fake_gpu"].__file__
    done = subprocess.run([sys.executable, fake, "-c", START + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
