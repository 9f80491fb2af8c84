"""Randomness derived from (seed, purpose, round, client): never from a process, nor from the method's name.

Methods compared with one seed therefore share partition, cohorts, batch order and initialisation.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Purpose = Literal["initialisation", "cohort", "batches", "torch", "method", "server", "devices"]
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def generator(seed: int, purpose: Purpose, round_number: int = 0, client: int = 0) -> np.random.Generator:
    """An independent generator for one purpose in one round for one client."""
    return np.random.default_rng([seed, _PURPOSES.index(purpose), round_number, client])


def integer(seed: int, purpose: Purpose, round_number: int = 0, client: int = 0) -> int:
    """A 63-bit seed for libraries that take a number."""
    return int(generator(seed, purpose, round_number, client).integers(2**63 - 1))
