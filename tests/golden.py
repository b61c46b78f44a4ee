"""The golden masks of mask_v1.txt: their reader, and the generator that wrote them.

    python tests/golden.py > tests/mask_v1.txt

The generator takes everything from contract.py and nothing from the library. Version 1 is fixed: records may be added,
but no record may change.
"""

import itertools
import math
import random
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "mask_v1.txt"
COUNT = 256  # elements of a mask

HEAD = f"""\
# Golden masks of fused_dropout's mask contract, version 1. docs/mask-v1.md specifies the contract.
# Written by tests/golden.py. One record a line; fields are separated by single spaces; a line that begins with # is a
# comment. Words, seeds, offsets and mask bits are hexadecimal. All other numbers are decimal, and p is the float64
# nearest to the number given.
#
# philox C0 C1 C2 C3 K0 K1 W0 W1 W2 W3
#   Philox4x32-10 turns the counter C and the key K into the words W.
# mask SEED OFFSET P START N SIZE_1 ... SIZE_N STRIDE_1 ... STRIDE_N BITS
#   The mask of a tensor with these N sizes, {COUNT} elements in all. Its element (i_1, ..., i_N) has the index
#   START + i_1 * STRIDE_1 + ... + i_N * STRIDE_N. BITS lists the elements in row-major order, four a hexadecimal digit,
#   the first of the four in the digit's highest bit. A set bit is a kept element: the digit c means kept, kept,
#   dropped, dropped.
# element SEED OFFSET INDEX P KEPT
#   The element with this index is kept (1) or dropped (0). Most of them are decided by the last of their 48 bits.
"""


class Philox(NamedTuple):
    counter: tuple[int, ...]
    key: tuple[int, ...]
    words: tuple[int, ...]


class Mask(NamedTuple):
    seed: int
    offset: int
    p: float
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kept: tuple[bool, ...]

    @property
    def indices(self):
        """The index of each element, row-major."""
        places = itertools.product(*map(range, self.shape))
        return [self.start + sum(i * s for i, s in zip(place, self.strides, strict=True)) for place in places]


class Element(NamedTuple):
    seed: int
    offset: int
    index: int
    p: float
    kept: bool


def read():
    """(Philox records, Mask records, Element records)."""
    records = {Philox: [], Mask: [], Element: []}
    for line in FILE.read_text().splitlines():
        if not line.startswith("#"):
            record = parse(*line.split(" "))
            records[type(record)].append(record)
    return tuple(records.values())


def parse(kind, *fields):
    if kind == "philox":
        words = tuple(int(field, 16) for field in fields)
        return Philox(words[:4], words[4:6], words[6:])
    seed, offset = int(fields[0], 16), int(fields[1], 16)
    if kind == "element":
        return Element(seed, offset, int(fields[2]), float(fields[3]), fields[4] == "1")
    assert kind == "mask"
    n = int(fields[4])
    sizes = tuple(int(field) for field in fields[5:-1])
    kept = tuple(bit == "1" for bit in f"{int(fields[-1], 16):0{COUNT}b}")
    return Mask(seed, offset, float(fields[2]), int(fields[3]), sizes[:n], sizes[n:], kept)


# ----------------------------------------------------------------------------------------------------------------------

# Random123's kat_vectors, philox4x32 with 10 rounds: counter and key.
KNOWN = [
    ((0,) * 4, (0,) * 2),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
]
KEYS = [
    (0x123456789ABCDEF0, 0x0FEDCBA987654321),
    (0, 0),
    (2**64 - 1, 2**64 - 1),
    (0xFEDCBA9876543210, 0x8000000100000002),
]
QUARTER = [0.25 - 2**-48, 0.25, 0.25 + 2**-48, math.nextafter(0.25, 0), math.nextafter(0.25, 1)]
PROBABILITIES = [0.0, 5e-324, 1e-6, 2**-16, 25 / 256, 0.1, *QUARTER, 1 / 3, 0.5, 0.9, 1 - 2**-16, 1 - 1e-6]
PROBABILITIES += [math.nextafter(1, 0), 1.0]
STARTS = [1, 7, 8, 1001, 2**31 - 100, 2**31, 2**32 - 9, 2**35 - 100, 2**35 - 3, 2**35, 2**62 + 5, 2**63 - COUNT]
WINDOWS = [  # description, sizes, index strides, start
    ("three dimensions, row-major", (4, 8, 8), (64, 8, 1), 0),
    ("one draw for all of the first, middle, last dimension", (4, 8, 8), (0, 8, 1), 0),
    (None, (4, 8, 8), (8, 0, 1), 3),
    (None, (16, 16), (1, 0), 0),
    ("one draw for all", (256,), (0,), 2**40 + 1),
    ("transposed, channels last, reversed", (16, 16), (1, 16), 0),
    (None, (2, 8, 4, 4), (128, 1, 32, 8), 5),
    (None, (4, 8, 8), (1, 4, 32), 2**32 - 100),
    ("columns 32 to 47 of rows 16 to 31 of a 64 x 48 tensor", (16, 16), (48, 1), 16 * 48 + 32),
    ("[2:4, 4:20, 2:10] of a 6 x 20 x 10 tensor", (2, 16, 8), (200, 10, 1), 2 * 200 + 4 * 10 + 2),
    ("rows of 8 with one index between them", (32, 8), (9, 1), 6),
    ("strides of 2^31 and more", (2, 128), (2**33, 1), 0),
    (None, (16, 16), (2**31, 2**35 - 3), 7),
    (None, (8, 32), (2**33 + 3, 7), 2**62 + 5),
    ("overlapping windows", (16, 16), (1, 1), 4),
    ("dimensions of one element", (1, 256, 1), (5, 1, 2**40), 2**35 - 3),
]


def generate():
    """The text of mask_v1.txt."""
    from contract import forge, keep, philox4x32, threshold

    rng = random.Random(17)
    lines = []

    def mask(key, p, start, shape=(COUNT,), strides=(1,)):
        window = Mask(*key, p, start, shape, strides, ())
        bits = "".join("01"[keep(*key, i, p)] for i in window.indices)
        numbers = " ".join(str(number) for number in (start, len(shape), *shape, *strides))
        lines.append(f"mask {key[0]:016x} {key[1]:016x} {p!r} {numbers} {int(bits, 2):064x}")

    def element(half, value, bound, p=None):
        """An element with the 48 bits `value`, under a p with the threshold `bound`."""
        p = 1 - bound / 2**48 if p is None else p
        assert threshold(p) == bound
        seed, offset, i = forge(rng, half, value >> 32, value & 0xFFFFFFFF)
        assert keep(seed, offset, i, p) == (value < bound)
        lines.append(f"element {seed:016x} {offset:016x} {i} {p!r} {int(value < bound)}")

    lines.append("# Known answers of Random123's kat_vectors")
    for counter, key in KNOWN:
        words = (*counter, *key, *philox4x32(counter, key))
        lines.append(" ".join(["philox", *(f"{word:08x}" for word in words)]))

    lines.append("# Every p, with every key")
    for p, key in itertools.product(PROBABILITIES, KEYS):
        mask(key, p, 0)
    lines.append("# Starts")
    for start, key in itertools.product(STARTS, KEYS[::3]):
        mask(key, 0.5 if key == KEYS[0] else 0.1, start)
    for note, shape, strides, start in WINDOWS:
        if note:
            lines.append(f"# Index strides: {note}")
        mask(KEYS[0], 0.5, start, shape, strides)
        mask(KEYS[3], 0.3, start, shape, strides)
    lines.append("# The 48 bits of one element, in each slot in turn, are c000 00000000: K of p = 1/4")
    for slot, p in itertools.product(range(8), QUARTER):
        if p == QUARTER[0]:
            seed, offset, i = forge(rng, slot, 0xC000, 0)
        mask((seed, offset), p, i - 100 - slot * 5)

    lines.append("# For each slot, ties that are won and lost: the closest, and those far from the other words' bits")
    for half in range(8):
        high, low = rng.randrange(1, 0xFFFF), rng.randrange(2, 0xFFFFFFFF)
        bound = high << 32 | low
        element(half, bound - 1, bound)
        element(half, bound, bound)
        element(half, high << 32, high << 32 | 1)
        element(half, high << 32 | 0xFFFFFFFF, high << 32 | 0xFFFFFFFF)
    lines.append("# For each slot, both ends of the threshold's range: at least one of 2^48 is kept, and one dropped")
    for half in range(8):
        element(half, 0, 1, math.nextafter(1, 0))
        element(half, 1, 1, math.nextafter(1, 0))
        element(half, 2**48 - 2, 2**48 - 1, 5e-324)
        element(half, 2**48 - 1, 2**48 - 1, 5e-324)
    lines.append("# The threshold's rounding: fractions of 1/4, 1/2 (even and odd), 3/4, and 1 - p rounded to a double")
    for half, (whole, fraction) in enumerate([(1000, 0.25), (1000, 0.5), (1001, 0.5), (1000, 0.75)]):
        k = 0x4000_0000_0000 + whole
        for value in (k - 1, k, k + 1):
            element(half, value, k + (fraction >= 0.5), 1 - (k + fraction) / 2**48)
    # The exact (1 - p) * 2^48 + 1/2 is a little less than an integer. A double rounds it up to this integer.
    p = (2**41 + 0.5) / 2**48 + 2**-58
    k = 2**48 - 2**41
    for half in (4, 5, 6, 7):
        element(half, k - 1, k, p)
        element(half, k, k, p)
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(generate(), end="")
