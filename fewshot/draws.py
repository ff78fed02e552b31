"""Randomness as a function of a name and a counter: nothing to store, nothing to replay."""

import hashlib

import numpy as np

MOST_DRAWS = 160  # random numbers in a row of `Draws`; changing it changes every drawing


def uniform(name, block, count):
    """Random numbers (count,) in [0, 1): the first of block `block` of the stream that `name` stands for.

    A counter-based generator is a function from (key, counter) to random bits.
    The raw bits of Philox are fixed for all versions of numpy; only arithmetic on integers and doubles follows.
    """
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()  # a folder's name may be no UTF-8
    key = int.from_bytes(digest[:16], "little")
    generator = np.random.Philox(key=key, counter=[0, block, 0, 0])
    bits = generator.random_raw(count)
    highest = bits >> np.uint64(11)  # 53 bits, as many as a double holds
    return highest * 2.0**-53


def distinct(u, counts):
    """Draw without replacement: row r gives k different numbers below counts[r], in random order.

    Args: u (R, k) uniform in [0, 1); counts (R,) int, all >= k. Returns int64 (R, k). Fisher-Yates, all rows at once.
    """
    R, k = u.shape
    rows = np.arange(R)
    numbers = np.arange(counts.max(), dtype=np.int32)
    deck = np.tile(numbers, (R, 1))  # (R, largest count)
    for i in range(k):
        steps = u[:, i] * (counts - i)
        j = i + steps.astype(np.int64)  # (R,) a place from i on, below the row's count
        chosen = deck[rows, j]
        deck[rows, j] = deck[:, i]
        deck[:, i] = chosen
    return deck[:, :k].astype(np.int64)


class Draws:
    """Uniform random numbers for one class (rows = 1) or for its images (a row each), fixed by a name.

    Image i always uses row i, so that it stays the same however many images are drawn.
    """

    def __init__(self, name, rows=1):
        numbers = uniform(name, 0, rows * MOST_DRAWS)
        self.table = numbers.reshape(rows, MOST_DRAWS)
        self.columns = iter(range(MOST_DRAWS))  # every draw uses up one column

    def __call__(self, low, high):
        """Uniform in [low, high), (rows, 1, 1): broadcasts against the grid (images, size, size)."""
        u = self.table[:, next(self.columns)]
        return low + (high - low) * u[:, None, None]

    def choice(self, options):
        """One of the options, for a whole class."""
        u = self.table[0, next(self.columns)]
        return options[int(u * len(options))]

    def colour(self, saturation, value, hue=(0, 1)):
        """Colours (3, rows, 1, 1): red, green, blue. Each argument is a range, (least, most).

        hue is a place on the colour wheel (0 red, 1/3 green, 2/3 blue), saturation 0 is grey, value 0 is black.
        """
        h = self(*hue)
        s = self(*saturation)
        v = self(*value)
        primaries = []
        for primary in (0, 1 / 3, 2 / 3):
            angle = 2 * np.pi * (h - primary)
            primaries.append(0.5 + 0.5 * np.cos(angle))
        pure = np.stack(primaries)  # (3, rows, 1, 1) in [0, 1]
        return v * (1 - s * (1 - pure))
