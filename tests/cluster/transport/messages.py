"""Tiny messages: shapes, supports and values that can be written down by hand."""

from __future__ import annotations

import numpy as np

from cluster.transport.wire import Shape

HEADER = 44  # 4 magic, 3 codes, 1 pad, 6 x 4 counts and checksums, 8 length, 4 checksum of all the rest
# 8 prunable weights in two layers of 4, a bias of 2, 2 buffer floats.
SMALL = Shape(8, 10, 12, ((0, 4), (4, 8), (8, 10)))


def mask(text: str) -> np.ndarray:
    return np.array([character == "1" for character in text])


def ramp(size: int) -> np.ndarray:
    return np.arange(1, size + 1, dtype=np.float32)


def flat(prunable: int) -> Shape:
    """One prunable layer and nothing else."""
    return Shape(prunable, prunable, prunable, ((0, prunable),))
