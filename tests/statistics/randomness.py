"""Runs the installed test batteries on the generator's words, in the orders in which training uses them.

    python tests/statistics/randomness.py                 # make randomness: all installed batteries, a report to a file
    python tests/statistics/randomness.py --stream calls  # 32-bit words to stdout, for another battery

dieharder is a Debian package. PractRand runs as ``RNG_test stdin32``. TestU01 runs as a program ``testu01_stdin`` that
reads words from its standard input and prints Crush's report. Both have to be on the PATH. The words come from
``reference.philox``; the tests of the mask show that the kernels have the same words.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from fused_dropout import reference

CHUNK = 2**14  # blocks drawn at a time
BLOCKS = 16  # of a short call: 128 elements
SEED = 0x0123_4567_89AB_CDEF

# The tests of dieharder that its author does not call suspect or broken, in sizes that need at most a few GB of words.
TESTS = [(test, None) for test in (0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 15, 16, 100, 101, 102, 204, 205, 206, 207, 209)]
TESTS += [*((200, size) for size in (1, 4, 8)), (201, 2), (202, 3), (202, 5), (203, 0), (203, 3)]


def words(seed: Tensor, offset: Tensor, block: Tensor) -> bytes:
    """The blocks' words, in order: 16 bytes for each of the int64 triples (seed, offset, block)."""
    halves = [
        half
        for number in (offset, block, seed)
        for half in (number & reference.LOW_32, number >> 32 & reference.LOW_32)
    ]
    drawn = torch.stack(reference.philox(halves[:4], halves[4:]), dim=1)
    return drawn.to(torch.uint32).numpy().tobytes()


def one_call(first: int) -> bytes:
    """A single very long call: consecutive blocks."""
    block = torch.arange(first, first + CHUNK)
    return words(torch.full_like(block, SEED), torch.zeros_like(block), block)


def calls(first: int) -> bytes:
    """Short calls whose offset advances by one per call, as on CUDA."""
    number = torch.arange(first, first + CHUNK)
    return words(torch.full_like(number, SEED), number // BLOCKS, number % BLOCKS)


def fresh_seeds(first: int) -> bytes:
    """Short calls with a new seed for each, drawn like keys on the CPU."""
    generator = torch.Generator().manual_seed(SEED + first)
    seed = torch.empty(CHUNK // BLOCKS, dtype=torch.int64).random_(generator=generator).repeat_interleave(BLOCKS)
    number = torch.arange(CHUNK)
    return words(seed, torch.zeros_like(seed), number % BLOCKS)


def one_position(first: int) -> bytes:
    """The same block of consecutive calls: the words that one neuron uses during training."""
    offset = torch.arange(first, first + CHUNK)
    return words(torch.full_like(offset, SEED), offset, torch.full_like(offset, 3))


ORDERS: dict[str, Callable[[int], bytes]] = {
    "one_call": one_call,
    "calls": calls,
    "fresh_seeds": fresh_seeds,
    "one_position": one_position,
}


def stream(order: str) -> None:
    """Writes words to stdout until the reader closes the pipe."""
    torch.set_num_threads(1)
    first = 0
    try:
        while True:
            sys.stdout.buffer.write(ORDERS[order](first))
            first += CHUNK
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def words_in(order: str) -> Iterator[IO[bytes]]:
    """The reading end of a pipe with an endless stream of words."""
    source = subprocess.Popen([sys.executable, __file__, "--stream", order], stdout=subprocess.PIPE)
    assert source.stdout is not None
    try:
        yield source.stdout
    finally:
        source.stdout.close()
        source.terminate()
        source.wait()


def run(command: list[str], source: IO[bytes]) -> str:
    done = subprocess.run(command, stdin=source, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def dieharder(source: IO[bytes]) -> Iterator[str]:
    """The report lines of all tests, which run one after the other on one stream. One result in a hundred is weak by
    chance, so a weak result is repeated three times on the words that follow."""
    for test, size in TESTS:
        command = ["dieharder", "-g", "200", "-d", str(test), *(["-n", str(size)] if size is not None else [])]
        lines = assessed(run(command, source))
        yield from lines or [f"FAILED to run: dieharder -d {test}"]
        if any("WEAK" in line for line in lines):
            yield from (f"{line}  (repeated)" for _ in range(3) for line in assessed(run(command, source)))


def assessed(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.search(r"PASSED|WEAK|FAILED", line)]


def batteries(practrand_size: str) -> dict[str, Callable[[IO[bytes]], Iterator[str]]]:
    """The installed batteries."""

    def practrand(source: IO[bytes]) -> Iterator[str]:
        yield from run(["RNG_test", "stdin32", "-tlmax", practrand_size], source).splitlines()

    def testu01(source: IO[bytes]) -> Iterator[str]:
        yield from run(["testu01_stdin"], source).splitlines()

    every = {"dieharder": dieharder, "RNG_test": practrand, "testu01_stdin": testu01}
    return {name: battery for name, battery in every.items() if shutil.which(name)}


def report(names: list[str], practrand_size: str) -> Iterator[str]:
    """Yields the report line by line, as the results arrive."""
    found = batteries(practrand_size)
    yield f"Philox4x32-10, seed {SEED:#x}, {time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}"
    for name, program in (("dieharder", "dieharder"), ("PractRand", "RNG_test"), ("TestU01", "testu01_stdin")):
        yield f"{name}: {'runs' if program in found else 'not installed'}"
    for battery, of_battery in found.items():
        for order in names:
            start, lines = time.perf_counter(), []
            yield f"\n== {battery}, {order}: {ORDERS[order].__doc__}"
            with words_in(order) as source:
                for line in of_battery(source):
                    lines.append(line)
                    yield line.rstrip()
            failed, weak = (sum(word in line for line in lines) for word in ("FAIL", "WEAK"))
            yield f"{len(lines)} lines, {failed} failed, {weak} weak, {(time.perf_counter() - start) / 60:.1f} minutes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", choices=ORDERS)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--practrand-size", default="16GB")
    parser.add_argument("--output", type=Path, default="benchmarks/results/randomness.txt")
    options = parser.parse_args()
    if options.stream:
        stream(options.stream)
        return 0
    if not batteries(options.practrand_size):
        print("no battery is installed: apt-get install dieharder")
        return 1
    lines = []
    for line in report(options.orders, options.practrand_size):
        print(line, flush=True)
        lines.append(line)
    options.output.write_text("\n".join(lines) + "\n")
    return int(any("FAIL" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
