"""``make inductor``: shows what torch.compile generates for dropout on a CUDA device, without having one.

Inductor generates the source for a block as if there were an H100, and Triton compiles the source for sm_90. The table
has the number of kernels, and the machine instructions an element of pointwise kernels. All of this uses private parts
of torch and Triton. Nothing is measured on a GPU.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.replace_random import replace_random_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_dropout import operators, reference

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    gcnArchName="",
)
HEADER = """# What torch.compile makes of dropout on a GPU

Written by `make inductor`, without a GPU: counts, no times. nn.Dropout's other call draws its seeds. fd's key is an
input here: one more operator draws it and takes its 16 bytes to the device. Kernels of XBLOCK elements have 4 warps.

torch {torch}, triton {triton}, for sm_90; p = {p}, {rows} x {columns}
"""
CUDA, TARGET = torch.device("cuda", 0), GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ROWS, COLUMNS, P = 1 << 14, 1 << 10, 0.1


class Emitted(Exception):
    """Stops Inductor after it has generated the source, before it loads kernels."""


def pretend_there_is_a_gpu() -> None:
    """Replaces functions of torch and Triton so that they see an H100."""
    replacements = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "_get_device_properties": lambda _: H100,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
    }
    for name, stand_in in replacements.items():
        setattr(torch.cuda, name, stand_in)
    torch._subclasses.fake_tensor.init_gpu_context = lambda _: None
    driver = SimpleNamespace(get_current_target=lambda: TARGET, get_current_device=lambda: 0)
    triton.runtime.driver.set_active(driver)
    lookup = torch.ops.prims.inductor_lookup_seed.default
    lookup.prim_meta_impl = lambda seeds, _: torch._prims.TensorMeta(seeds.new_empty((), device="meta"), device=CUDA)
    torch.compiler.is_compiling = lambda: True
    torch.Tensor.is_cuda = property(lambda _: True)
    config.fx_graph_cache = False
    config.compile_threads = 1


def source(function, *inputs: Tensor) -> str:
    """The source that Inductor generates for a function of tensors, as if they were on the GPU."""
    with FakeTensorMode() as mode:
        on_cpu = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
        graph = make_fx(function, decomposition_table=select_decomp_table())(*on_cpu)

    def on_gpu(x):
        if not isinstance(x, FakeTensor):
            return CUDA if isinstance(x, torch.device) else x
        return FakeTensor(mode, torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), CUDA)

    with mode:
        with V.set_fake_mode(mode):
            replace_random_passes(graph)
        for node in graph.graph.nodes:
            node.args, node.kwargs = (tree_map(on_gpu, a) for a in (node.args, node.kwargs))
            node.meta = {"val": tree_map(on_gpu, node.meta.get("val"))}
        graph.recompile()
        written = []

        def codegen(lowering):
            code = plain(lowering)
            written.append(getattr(code[0], "value", code[0]))
            raise Emitted

        plain, GraphLowering.codegen = GraphLowering.codegen, codegen
        try:
            compile_fx_inner(graph, [on_gpu(x) for x in on_cpu])
        except Exception:
            if not written:
                raise
        finally:
            GraphLowering.codegen = plain
    return written[0]


SIGNATURE_IN_SOURCE = re.compile(r"'signature': (\{.*?\})")
KERNEL_IN_SOURCE = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.S)


def compiled(name: str, kernel: str, block: int, warps: int, folder: Path) -> dict[str, Any]:
    """Triton's outputs for a pointwise kernel, among them ``ptx`` and ``cubin``."""
    signature = ast.literal_eval(SIGNATURE_IN_SOURCE.search(kernel)[1])
    kernel = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton\.jit)", "", kernel, flags=re.S)
    path = folder / f"{name}.py"
    path.write_text(kernel.replace("triton_helpers.set_driver_to_gpu()", ""))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    constants = {(list(signature).index("XBLOCK"),): block}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    made = ASTSource(fn=getattr(module, name), signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(made, target=TARGET, options={"num_warps": warps}).asm


def instructions(name: str, kernel: str, block: int, warps: int, folder: Path) -> float:
    """The machine instructions an element of a pointwise kernel. Counts the whole kernel, because it has no loop."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled(name, kernel, block, warps, folder)["cubin"])
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", sass, re.M)) / (block / (32 * warps))


def torchs(x: Tensor, _: Tensor) -> Tensor:
    return torch.native_dropout(x, P, True)[0]


def fused(x: Tensor, key: Tensor) -> Tensor:
    return operators.apply_expanded(x, P, key, 0, reference.row_major(x.shape))


def alone(x: Tensor, key: Tensor) -> Tensor:
    """What an eager call runs if there are no CUDA kernels."""
    scale, threshold = torch.tensor(reference.scale(P), dtype=torch.float32), torch.tensor(reference.threshold(P))
    return operators.apply_any(x, threshold, scale, key, [], x.numel() <= 2**31)


def kernel(x: Tensor, key: Tensor) -> Tensor:
    return torch.ops.fused_dropout.apply(x, P, key)


BLOCKS = {
    "dropout": lambda drop: lambda key, x: (drop(x, key),),
    "bias, dropout, residual": lambda drop: lambda key, x, y, b: (drop(x + b, key) + y,),
    "bias, dropout, residual, layer norm": lambda drop: (
        lambda key, x, y, b: (F.layer_norm(drop(x + b, key) + y, (COLUMNS,)),)
    ),
}


def write_ptx(folder: Path, dtype: torch.dtype, numel: int, drop: str) -> None:
    """Writes the kernel of a dropout (XBLOCK 1024) to fused.ptx, and the types of its parameters to fused.json."""
    key, x = torch.zeros(2, dtype=torch.uint64), torch.empty(1, dtype=dtype).expand(numel)
    ((name, kernel),) = KERNEL_IN_SOURCE.findall(source(BLOCKS["dropout"](globals()[drop]), key, x))
    signature = ast.literal_eval(SIGNATURE_IN_SOURCE.search(kernel)[1])
    (folder / "fused.json").write_text(json.dumps([kind for kind in signature.values() if kind != "constexpr"]))
    (folder / "fused.ptx").write_text(compiled(name, kernel, 1024, 4, folder)["ptx"])


def main() -> None:
    pretend_there_is_a_gpu()
    if sys.argv[1:]:  # for tests/test_triton.py
        folder, dtype, numel, drop = sys.argv[1:]
        return write_ptx(Path(folder), getattr(torch, dtype), int(numel), drop)
    print(HEADER.format(torch=torch.__version__, triton=triton.__version__, p=P, rows=ROWS, columns=COLUMNS))
    print("| block | dtype | dropout | Triton kernels | other calls | instructions an element: XBLOCK 1024, 512 |")
    print("|---|---|---|---|---|---|")
    for block, make in BLOCKS.items():
        for dtype in (torch.float16, torch.float32):
            for name, drop in {"nn.Dropout": torchs, "fd, fused": fused, "fd, kernel": kernel}.items():
                x, bias = torch.empty(ROWS, COLUMNS, dtype=dtype), torch.empty(COLUMNS, dtype=dtype)
                inputs = (x,) if block == "dropout" else (x, x, bias)
                code = source(make(drop), torch.zeros(2, dtype=torch.uint64), *inputs)
                kernels = KERNEL_IN_SOURCE.findall(code)
                others = len(re.findall(r"^ +(?:buf\d+ = )?torch\.ops\.|^ +aten\.", code, re.M))
                counts = "-"
                if len(kernels) == 1 and "triton_poi" in kernels[0][0]:
                    with tempfile.TemporaryDirectory() as folder:
                        counts = ", ".join(f"{instructions(*kernels[0], n, 4, Path(folder)):.0f}" for n in (1024, 512))
                print(f"| {block} | {dtype} | {name} | {len(kernels)} | {others} | {counts} |", flush=True)


if __name__ == "__main__":
    main()
