"""Randomness as a function of a name and a counter: nothing to store, nothing to replay."""

import hashlib

import numpy as np


def uniform(name, block, count):
    """Random numbers (count,) in [0, 1): the first of block `block` of the stream that `name` stands for.

    A counter-based generator is a function from (key, counter) to random bits.
    The raw bits of Philox are fixed for all versions of numpy; only arithmetic on integers and doubles follows.
    """
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()  # a folder's name may be no UTF-8
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    bits = np.random.Philox(key=key, counter=[0, block, 0, 0]).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53


def distinct(u, counts):
    """Draw without replacement: row r gives k different numbers below counts[r], in random order.

    Args: u (R, k) uniform in [0, 1); counts (R,) int, all >= k. Returns int64 (R, k). Fisher-Yates, all rows at once.
    """
    R, k = u.shape
    rows = np.arange(R)
    numbers = np.arange(counts.max(), dtype=np.int32)
    deck = np.tile(numbers, (R, 1))
    for i in range(k):
        j = i + (u[:, i] * (counts - i)).astype(np.int64)
        chosen = deck[rows, j]
        deck[rows, j] = deck[:, i]
        deck[:, i] = chosen
    return deck[:, :k].astype(np.int64)


class Draws:
    """Uniform random numbers for one class (rows = 1) or for its images (a row each), fixed by a name.

    Image i always uses row i, so that it stays the same however many images are drawn.
    """

    def __init__(self, name, rows=1):
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
        key = int.from_bytes(digest[:16], "little")
        bits = np.random.Philox(key=key).random_raw(rows * 160).reshape(rows, 160)
        self.table = (bits >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        self.columns = iter(range(160))  # every draw uses up one column

    def __call__(self, low, high):
        """Uniform in [low, high), (rows, 1, 1): broadcasts against the grid (images, size, size)."""
        return low + (high - low) * self.table[:, next(self.columns), None, None]

    def choice(self, options):
        """One of the options, for a whole class."""
        return options[int(self.table[0, next(self.columns)] * len(options))]

    def colour(self, saturation, value, hue=(0, 1)):
        """Colours (3, rows, 1, 1) from these ranges of a colour wheel (0 red, 1/3 green, 2/3 blue)."""
        h = self(*hue)
        s = self(*saturation)
        v = self(*value)
        wheel = np.stack([0.5 + 0.5 * np.cos(2 * np.pi * (h - primary / 3)) for primary in range(3)])
        return v * (1 - s * (1 - wheel))
