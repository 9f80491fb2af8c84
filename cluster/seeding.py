"""Randomness derived from (seed, purpose, round, client): never from a process, nor from the method's name.

Methods compared with one seed therefore share partition, cohorts, batch order and initialisation.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Purpose = Literal[
    "initialisation",
    "cohort",
    "batches",
    "torch",
    "method",
    "server",
    "devices",
    "partition",
    "availability",
    "dropout",
    "evaluation",
    "sampler",
    "augmentation",
    "attack",
    "robustness",
    "adapter",
    "byzantine",
    "privacy",
    "masks",
    "jitter",
    "cells",
]
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def generator(seed: int, purpose: Purpose, round_number: int = 0, client: int = 0) -> np.random.Generator:
    """An independent generator for one purpose in one round for one client."""
    return np.random.default_rng([seed, _PURPOSES.index(purpose), round_number, client])


def integer(seed: int, purpose: Purpose, round_number: int = 0, client: int = 0) -> int:
    """A 63-bit seed for libraries that take a number."""
    return int(generator(seed, purpose, round_number, client).integers(2**63 - 1))


def uniform(seed: int, purpose: Purpose, step: int, clients: np.ndarray) -> np.ndarray:
    """One number in [0, 1) a client, float64[len(clients)], each a function of (seed, purpose, step, client).

    A counter-based hash (SplitMix64's finaliser, Steele et al., OOPSLA 2014, twice under two keys): a
    client's number does not depend on who else is asked for, and a million of them cost milliseconds, which
    a generator for each would not.
    """
    keys = np.random.SeedSequence([seed, _PURPOSES.index(purpose), step]).generate_state(2, np.uint64)
    bits = np.asarray(clients).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for key in keys:
        bits ^= key
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
    return (bits >> np.uint64(11)) * 2.0**-53
