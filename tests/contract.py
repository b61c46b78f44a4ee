"""The mask contract in plain integers, and its inverse, which makes elements with a given draw and tie.

It is written from the specification alone and shares no code with the library, so the tests compare two independent
implementations. The part below the line computes many elements at once, with numpy and torch.
"""

import math

import numpy as np
import torch

LOW32 = 2**32 - 1


def philox4x32(counter, key, rounds=10):
    """Four words from four counter words and two key words (Salmon et al., SC'11)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        m0, m1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (m1 >> 32) ^ c1 ^ k0, m1 & LOW32, (m0 >> 32) ^ c3 ^ k1, m0 & LOW32
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return c0, c1, c2, c3


def threshold(p):
    """K: an element is kept iff its 48 bits (draw above, tie below) are less."""
    return min(max(math.floor((1 - p) * 2**48 + 0.5), 1), 2**48 - 1)


def scale(p):
    return 1 / (1 - p)


def block_words(seed, offset, block):
    return philox4x32((offset & LOW32, offset >> 32, block & LOW32, block >> 32), (seed & LOW32, seed >> 32))


def draw(seed, offset, i):
    """The half-word of element i: element 0 has the low half of word 0, element 1 its high half, and so on."""
    return block_words(seed, offset, i // 8)[i % 8 // 2] >> 16 * (i % 2) & 0xFFFF


def tie(seed, offset, i):
    """The XOR of the three words that do not hold the draw."""
    w0, w1, w2, w3 = block_words(seed, offset, i // 8)
    return (w1 ^ w2 ^ w3, w0 ^ w2 ^ w3, w0 ^ w1 ^ w3, w0 ^ w1 ^ w2)[i % 8 // 2]


def keep(seed, offset, i, p):
    if p in (0, 1):
        return p == 0
    high, low = threshold(p) >> 32, threshold(p) & LOW32
    return draw(seed, offset, i) < high or (draw(seed, offset, i) == high and tie(seed, offset, i) < low)


def keep_list(seed, offset, p, n, start=0):
    """keep() of elements start .. start + n - 1, each block computed once."""
    kept = []
    for block in range(start // 8, (start + n + 7) // 8):
        words = block_words(seed, offset, block)
        everything = words[0] ^ words[1] ^ words[2] ^ words[3]  # XOR with one word leaves the XOR of the other three
        kept += [((w >> half & 0xFFFF) << 32 | everything ^ w) < threshold(p) for w in words for half in (0, 16)]
    return kept[start % 8 : start % 8 + n] if 0 < p < 1 else [p == 0] * n


def philox_backwards(words, seed):
    """The counter that Philox turns into these words."""
    c0, c1, c2, c3 = words
    inverse0, inverse1 = pow(0xD2511F53, -1, 2**32), pow(0xCD9E8D57, -1, 2**32)
    for r in reversed(range(10)):
        k0, k1 = seed + r * 0x9E3779B9 & LOW32, (seed >> 32) + r * 0xBB67AE85 & LOW32
        a, b = c3 * inverse0 & LOW32, c1 * inverse1 & LOW32
        c0, c1, c2, c3 = a, c0 ^ (0xCD9E8D57 * b >> 32) ^ k0, b, c2 ^ (0xD2511F53 * a >> 32) ^ k1
    return c0, c1, c2, c3


def forge(rng, half, wanted_draw, wanted_tie):
    """The seed, offset and index of an element with this draw and tie, at place `half` of its block."""
    while True:
        seed, other, a, b = rng.getrandbits(64), rng.getrandbits(16), rng.getrandbits(32), rng.getrandbits(32)
        words = [a, b, a ^ b ^ wanted_tie]
        words.insert(half // 2, other << 16 | wanted_draw if half % 2 == 0 else wanted_draw << 16 | other)
        c0, c1, c2, c3 = philox_backwards(words, seed)
        offset, i = c1 << 32 | c0, 8 * (c3 << 32 | c2) + half
        if 2**12 < i < 2**63 - 2**12:  # an index is an int64, and needs room for neighbours
            assert (draw(seed, offset, i), tie(seed, offset, i)) == (wanted_draw, wanted_tie)
            return seed, offset, i


# ----------------------------------------------------------------------------------------------------------------------


def words_numpy(seed, offset, first, count):
    """block_words of `count` blocks from `first` on, one block a row: the same code on uint64 arrays."""
    return np.stack(block_words(seed, offset, np.uint64(first) + np.arange(count, dtype=np.uint64)), axis=1)


def keep_numpy(seed, offset, p, n, start=0):
    """keep_list, fast enough for millions of elements."""
    words = words_numpy(seed, offset, start // 8, (start % 8 + n + 7) // 8)
    ties = np.bitwise_xor.reduce(words, axis=1, keepdims=True) ^ words
    kept = (np.stack([words & 0xFFFF, words >> 16], axis=2) << 32 | ties[:, :, None]) < threshold(p)
    return kept.reshape(-1)[start % 8 :][:n] if 0 < p < 1 else np.full(n, p == 0)


def expected(values, seed, offset, p, start=0):
    """Dropout of a one-dimensional CPU tensor whose element 0 has index `start`."""
    if p in (0, 1):
        return values.clone() if p == 0 else torch.zeros_like(values)
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    product = (values.to(wide) * torch.tensor(scale(p), dtype=wide)).to(values.dtype)
    kept = torch.from_numpy(keep_numpy(seed, offset, p, len(values), start))
    return torch.where(kept, product, torch.zeros((), dtype=values.dtype))
