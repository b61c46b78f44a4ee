"""docs/mask-v1.md: its Python code against the golden masks, and each of its tables against contract.py."""

import re
from itertools import pairwise
from pathlib import Path

import contract
import golden
import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "mask-v1.md").read_text()
PROSE = re.sub(r"\s+", " ", PAGE)  # without line breaks


@pytest.fixture(scope="module")
def page():
    """The variables that the page's Python code defines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(code, names)
    return names


def hexadecimal(words):
    return " ".join(f"{word:08x}" for word in words)


def yes_or_no(kept):
    return "yes" if kept else "no"


def test_reference_implementation(page):
    known, masks, elements = golden.read()
    for p in known:
        assert page["philox"](p.counter, p.key) == p.words
        assert f"| {hexadecimal(p.counter)} | {hexadecimal(p.key)} | {hexadecimal(p.words)} |" in PAGE
    for m in masks:
        assert tuple(page["keep"](m.seed, m.offset, i, m.p) for i in m.indices) == m.kept, m
    for e in elements:
        assert page["keep"](e.seed, e.offset, e.index, e.p) == e.kept, e


def test_thresholds():
    table = re.findall(r"\| (\S+) \| ([0-9a-f]{12}) \|", PAGE.replace("1 - 2^-53", "0.9999999999999999"))
    assert len(table) == 6
    for p, k in table:
        assert contract.threshold(1 / 3 if p == "1/3" else float(p)) == int(k, 16)


def test_worked_example():
    for r in (1, 2, 3, 10):
        key = ((r - 1) * weyl & contract.LOW32 for weyl in (0x9E3779B9, 0xBB67AE85))
        words = contract.philox4x32((0,) * 4, (0,) * 2, r)
        assert f"\nround {r:<2}  {hexadecimal(words)}   key {hexadecimal(key)}\n" in PAGE
    for i in range(8):
        draw, tie, kept = contract.draw(0, 0, i), contract.tie(0, 0, i), contract.keep(0, 0, i, 0.1)
        assert f"\n{i}      {draw:04x}  {tie:08x}   {yes_or_no(kept)}\n" in PAGE
    for numerator, kept in ((0xE8D5C6, False), (0xE8D5C7, True)):
        p = 1 - numerator / 2**24
        assert f"1 - {numerator:#x} / 2^24, where K = e8d5 {contract.threshold(p) & contract.LOW32:08x}" in PROSE
        assert contract.keep(0, 0, 0, p) == kept


def test_worked_result():
    factor = torch.tensor(contract.scale(0.1), dtype=torch.float32)
    x = torch.tensor(3.140625, dtype=torch.float16)
    product = x.float() * factor
    for number in (factor, x, product, product.half()):
        assert re.search(rf"\b{number.item()}\b", PROSE)
    assert contract.expected(x.expand(2), 0, 0, 0.1).tolist() == [0, product.half().item()]


def test_picture_of_a_block():
    """docs/how-it-works.md shows block 0 of the key [0, 0] with p = 0.1."""
    texts = re.findall(r">([^<>]+)</text>", (DOCS / "pictures" / "block.svg").read_text())
    shown = dict(pairwise(texts))  # each label, and the text that follows it
    for j, word in enumerate(contract.block_words(0, 0, 0)):
        assert shown[f"word {j}"] == f"{word:08x}"
    for i in range(8):
        assert shown[f"draw {i}"] == f"{contract.draw(0, 0, i):04x}"
        assert shown[f"element {i}"] == ("kept" if contract.keep(0, 0, i, 0.1) else "dropped")
    high, low = divmod(contract.threshold(0.1), 2**32)
    assert f"K = {high:04x} {low:08x}" in " ".join(texts)
