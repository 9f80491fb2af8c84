"""Words of k bits: whole numbers modulo 2**k as 4, 6 or 8 bytes each, the lowest first."""

from __future__ import annotations

import numpy as np

from algorithms import Grid
from cluster.references import UserError
from cluster.transport.wire_values import WireError

#: Bits of a word, in the order of their codes in a message's header: append, never reorder.
WORD_BITS = (64, 48, 32)


class GridError(UserError):
    """The sums of a round would not fit the words of its grid."""


def check_cohort(bits: int | None, weights: np.ndarray, cohort: int) -> None:
    """Refuse cohorts whose sums of n_i w_i a word could not tell from each other.

    Args:
        bits: Bits of the word; None for the exact grid.
        weights: n_i of every client.
        cohort: How many are asked.

    Raises:
        GridError: The largest cohort weighs too much; names both numbers.
    """
    if bits is None:
        return
    most = Grid.most_samples(bits)
    heaviest = int(np.sort(weights)[-cohort:].sum())
    if heaviest > most:
        raise GridError(
            f"wire.grid: {bits} bits hold sums over at most {most:,} samples, and the largest cohort of "
            f"{cohort:,} clients has {heaviest:,}; set wire.grid=64 or exact, or aggregation.weighting=equal"
        )


def pack(words: np.ndarray, bits: int) -> bytes:
    """``words``, int64[n] or uint64[n], modulo 2**bits."""
    content = np.ascontiguousarray(words).astype(words.dtype.newbyteorder("<"), copy=False)
    return content.view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()


def unpack(content: bytes | memoryview, bits: int, count: int) -> np.ndarray:
    """So many words, int64[count] from -2**(bits - 1) on.

    Raises:
        WireError: There are not as many.
    """
    width = bits // 8
    if len(content) != width * count:
        raise WireError(f"{len(content)} bytes of words where {width * count} are expected")
    raw = np.zeros((count, 8), np.uint8)
    raw[:, :width] = np.frombuffer(content, np.uint8).reshape(count, width)
    return signed(raw.view("<u8")[:, 0], bits)


def signed(words: np.ndarray, bits: int) -> np.ndarray:
    """The numbers from -2**(bits - 1) on that ``words``, uint64[n], stand for modulo 2**bits, int64[n]."""
    spare = np.uint64(64 - bits)
    result: np.ndarray = (words.astype(np.uint64) << spare).view(np.int64) >> np.int64(spare)
    return result
