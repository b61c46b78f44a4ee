"""``make sass``: checks the machine code of the installed CUDA kernels against limits, and computes a roofline from it.

In the kernel for rows, the steady state is the loop that stores most in a pass, of those loops whose accesses all have
the largest width for the type and the architecture. The table has its instructions an element, by class. The roofline
is a model from these counts and from data sheets. Nothing is measured on a GPU.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
LIMITS = {
    "c10::Half": 13.5,
    "c10::BFloat16": 14.2,
    "float": 14.2,
    "double": 19,
}  # instructions an element, with 32-bit block numbers
# The additional instructions that an operation may have. The keys are the values of csrc's enum Operation.
MORE = {"0": 0.0, "1": 5.8, "2": 10.8, "3": 4.0}
OPERATIONS = {"0": "", "1": " + residual", "2": " + residual and bias", "3": " of ReLU"}
# The registers of a thread that the number of resident blocks in cuda_kernels.cuh allows. Elsewhere the limit is 80.
REGISTERS = {arch: {"0": 40, "1": 64, "2": 80, "3": 48} for arch in ("sm_80", "sm_90")}
# Limits of registers and instructions of the kernel for any window, which draws in one place, not unrolled. The second
# pair is for operations that do more than dropout.
WINDOW_LIMITS, WINDOW_LIMITS_OF_MORE = (64, 1900), (128, 3100)
SIZES = {"c10::Half": 2, "c10::BFloat16": 2, "float": 4, "double": 8, "mask": 1}
CLASSES = {
    "wide multiply": r"U?IMAD\.WIDE",
    "logic, shift": r"U?P?LOP3|U?SHF|U?PRMT",
    "compare, select": r"U?ISETP|F?SEL",
    "float, convert": r"FMUL|HADD2|DMUL|F2FP?",
    "memory": r"LDG|STG",
    "the rest": r"",
}
DIVISION = ("MUFU", "I2F", "F2I")  # the code of a division or a modulo has these, inlined or in a function


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    bandwidth: float  # bytes a second
    processors: int
    clock: float  # Hz, boost

    def seconds(self, instructions: float, wide_multiplies: float, size: int) -> dict[str, float]:
        """The seconds for an element by each limit of the GPU. The largest one binds."""
        cycles = 1 / (self.processors * self.clock)
        return {
            "memory": 2 * size / self.bandwidth,
            "issue": instructions / 128 * cycles,  # four schedulers, each of which issues for a warp
            "wide multiply": wide_multiplies / 32 * cycles,  # a quarter of that; assumed, not documented
        }


GPUS = (
    Gpu("A100 80GB", "sm_80", 2.039e12, 108, 1.41e9),
    Gpu("H100 SXM", "sm_90", 3.35e12, 132, 1.98e9),
    Gpu("H200", "sm_90", 4.8e12, 132, 1.98e9),
)


@dataclass
class Kernel:
    arch: str
    dtype: str
    block_bits: int
    registers: int
    stack: int
    divisions: int  # in the whole kernel
    loop: list[str]  # the opcodes of the steady state
    operation: str = "0"

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.loop)

    @property
    def elements(self) -> int:
        """The number of elements that a pass of the loop stores."""
        return stored_bits(self.loop) // 8 // SIZES[self.dtype]

    @property
    def per_element(self) -> float:
        return len(self.loop) / self.elements

    def by_class(self) -> dict[str, float]:
        of = Counter(next(name for name, pattern in CLASSES.items() if re.match(pattern, o)) for o in self.loop)
        return {name: of[name] / self.elements for name in CLASSES}

    def faults(self) -> list[str]:
        if not self.loop:
            return ["no loop whose accesses are all of the widest width"]
        registers = REGISTERS.get(self.arch, {}).get(self.operation, 80 if self.operation == "0" else 128)
        emulated = self.arch == "sm_75" and self.dtype == "c10::BFloat16"  # sm_75 has no bfloat16 conversions
        limit = LIMITS.get(self.dtype, 99) if self.block_bits == 32 and not emulated else 99
        limit += MORE[self.operation]
        # Kernels for tensors of 2**34 elements and more that are known to spill registers.
        known = self.operation != "0" or (self.arch, self.dtype) == ("sm_120", "double")
        may_spill = known and self.block_bits == 64
        return [
            *([f"{self.registers} registers, more than {registers}"] if self.registers > registers else []),
            *(["accesses of local memory in the loop"] if self.count("LDL|STL") and not may_spill else []),
            *([f"{self.stack} bytes of stack"] if self.stack and self.arch in REGISTERS and not may_spill else []),
            *(["a division"] if self.divisions else []),
            *(
                [f"{self.per_element:.2f} instructions an element, more than {limit}"]
                if self.per_element > limit
                else []
            ),
        ]


def find_tool() -> str:
    """The path of cuobjdump: from a CUDA toolkit, or from Triton."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else Path()
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))
    return tool or sys.exit("cuobjdump is missing: it comes with the CUDA toolkit and with Triton")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def access_bits(opcode: str) -> int:
    """The width of a load or a store in bits: 32 if the opcode does not say it."""
    found = re.search(r"\.(256|128|64|[US]?16|[US]?8)$", opcode)
    return int(found[1].lstrip("US")) if found else 32


def stored_bits(opcodes: list[str]) -> int:
    return sum(access_bits(opcode) for opcode in opcodes if opcode.startswith("STG"))


def widest_access(arch: str, dtype: str) -> int:
    """The width of the widest access, in bits. An access is never wider than a block of eight elements."""
    return min(64 * SIZES[dtype], 256 if int(re.sub(r"\D", "", arch)) >= 100 else 128)


def steady_state(lines: list[tuple[int, str, str]], width: int) -> list[str]:
    """The opcodes of the loop that stores most, of the loops whose accesses all have this width in bits.

    The loop for the ends of a row also has narrower accesses, so it is ignored. lines: (address, opcode, operands).
    """
    position = {address: i for i, (address, *_) in enumerate(lines)}
    loops = []
    for end, (address, opcode, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            opcodes = [line[1] for line in lines[position[int(target[1], 16)] : end + 1]]
            moves = [access_bits(opcode) for opcode in opcodes if opcode.startswith(("LDG", "STG"))]
            if moves and set(moves) == {width}:
                loops.append(opcodes)
    return max(loops, key=stored_bits, default=[])


def resources(library: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and other resources, by architecture and kernel name."""
    usage: dict[tuple[str, str], dict[str, int]] = {}
    arch = name = ""
    for line in output(find_tool(), "--dump-resource-usage", str(library)).splitlines():
        arch = found[1] if (found := re.search(r"arch = (sm_\w+)", line)) else arch
        name = found[1] if (found := re.match(r"\s*Function (\S+?):?\s*$", line)) else name
        if "REG:" in line:
            usage[arch, name] = {what: int(n) for what, n in re.findall(r"(\w+):(\d+)", line)}
    return usage


@dataclass
class WindowKernel:
    """The kernel for any window. Its loops depend on the window, so only numbers of the whole kernel are counted."""

    name: str
    registers: int
    stack: int
    instructions: int
    local: int
    divisions: int
    operation: str

    def faults(self) -> list[str]:
        counts = {"registers": self.registers, "instructions": self.instructions}
        limits = WINDOW_LIMITS if self.operation == "0" else WINDOW_LIMITS_OF_MORE
        return [
            *(
                f"{n} {what}, more than {most}"
                for (what, n), most in zip(counts.items(), limits, strict=True)
                if n > most
            ),
            *(f"{n} {what}" for what, n in vars(self).items() if what in ("stack", "local", "divisions") and n),
        ]


def parse(library: Path, usage: dict[tuple[str, str], dict[str, int]]) -> tuple[list[Kernel], list[WindowKernel]]:
    tool, kernels, windows = find_tool(), [], []
    for image in re.split(r"(?=code for sm_|arch = sm_)", output(tool, "--dump-sass", str(library)))[1:]:
        arch = re.search(r"sm_\w+", image)[0]
        for code in image.split("Function : ")[1:]:
            name = code.split()[0]
            full = output("c++filt", name)
            kind = re.search(
                r"(dropout|window)_kernel<.*?(?:Drop<\(.*?\)(\d), ([\w:]+), \w+>|WriteMask), unsigned (int|long)", full
            )
            if not kind:
                continue
            instruction = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z][\w.]*)\s*(.*?);")
            found = instruction.findall(code)
            lines = [
                (int(a, 16), opcode.removesuffix(".SYS"), operands) for a, opcode, operands in found
            ]  # on sm_75 opcodes end with .SYS
            used = usage[arch, name]
            local, divisions = (
                sum(opcode.startswith(names) for _, opcode, _ in lines) for names in (("LDL", "STL"), DIVISION)
            )
            operation, dtype = kind[2] or "0", kind[3] or "mask"
            bits = 32 if kind[4] == "int" else 64
            if kind[1] == "window":
                name = f"{arch} {dtype}{OPERATIONS[operation]}, {bits} bits, any window"
                windows.append(WindowKernel(name, used["REG"], used["STACK"], len(lines), local, divisions, operation))
                continue
            kernels.append(
                Kernel(
                    arch,
                    dtype,
                    bits,
                    used["REG"],
                    used["STACK"],
                    divisions,
                    steady_state(lines, widest_access(arch, dtype)),
                    operation,
                )
            )
    return kernels, windows


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def report(kernels: list[Kernel], windows: list[WindowKernel]) -> str:
    rows = [["arch", "dtype", "block number", "registers", "instructions an element", *CLASSES, "loads, stores"]]
    for k in sorted(kernels, key=lambda k: (k.arch, k.block_bits, k.operation, SIZES[k.dtype], k.dtype)):
        classes = [f"{n:.2f}" for n in k.by_class().values()]
        moves = f"{k.count(r'LDG')}, {k.count(r'STG')} of {widest_access(k.arch, k.dtype) // 8} bytes"
        rows.append(
            [
                k.arch,
                k.dtype + OPERATIONS[k.operation],
                f"{k.block_bits} bits",
                str(k.registers),
                f"{k.per_element:.2f}",
                *classes,
                moves,
            ]
        )
    model = [["GPU", "dtype", "bound by", "ps an element", "next", "margin"]]
    for gpu in GPUS:
        for k in kernels:
            if k.arch == gpu.arch and k.block_bits == 32 and k.dtype in LIMITS and k.operation == "0":
                wide = k.by_class()["wide multiply"]
                times = sorted(gpu.seconds(k.per_element, wide, SIZES[k.dtype]).items(), key=lambda item: -item[1])
                (first, most), (second, less), _ = times
                model.append([gpu.name, k.dtype, first, f"{most * 1e12:.2f}", second, f"{most / less:.1f} times"])
    return (
        "# The CUDA kernels' machine code\n\nWritten by `make sass`. The steady state, per element:\n\n"
        f"{table(rows)}\n\n"
        f"Those for any window take {max(w.registers for w in windows)} registers and "
        f"{max(w.instructions for w in windows)} instructions of code at most.\n\n"
        "## A model, nothing measured\n\n"
        "What a large tensor's dropout is bound by, from the counts above and from data sheets (bandwidth, processors\n"
        "and boost clock; 128 instructions a clock and processor; 32 wide multiplies, which is not documented): the\n"
        "time of an element, and how far off the next bound is.\n\n"
        f"{table(model)}\n"
    )


def main() -> None:
    installed = Path(find_spec("fused_dropout").origin).parent
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else next(installed.glob("_cuda.*"))
    usage = resources(library)
    kernels, windows = parse(library, usage)
    text = report([k for k in kernels if k.loop], windows)
    print(text)
    RESULTS.joinpath("sass.md").write_text(text)
    images = output(find_tool(), "--list-ptx", str(library))
    faults = [
        f"{k.arch} {k.dtype}{OPERATIONS[k.operation]}, {k.block_bits} bits: {fault}"
        for k in kernels
        for fault in k.faults()
    ]
    faults += [f"{w.name}: {fault}" for w in windows for fault in w.faults()]
    # PTX of sm_120 does not run on sm_110. build_backend/toolchain.py makes the same choice.
    built = {k.arch for k in kernels}
    portable = max(built - {"sm_120"} or built, key=lambda arch: int(re.sub(r"\D", "", arch)))
    if portable not in images:
        faults.append(f"no PTX for {portable}, from which a later GPU's driver would compile")
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
