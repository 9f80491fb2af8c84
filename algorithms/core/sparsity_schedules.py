"""Sparsity schedules: what a client is told to cut to in each round, on the way to its target.

They compose with every method whose clients cut to what they are told each visit (``follows_sparsity``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from algorithms.core.hyperparameters import hyperparameter


@dataclass(frozen=True, kw_only=True)
class SparsitySchedule:
    """``constant``: the target from round 1 on."""

    name: ClassVar[str] = "constant"

    def at(self, target: float, round_number: int, rounds: int) -> float:
        """The sparsity of a round.

        Args:
            target: A client's target sparsity.
            round_number: Number of the round, from 1.
            rounds: Planned number of rounds.
        """
        return target


@dataclass(frozen=True, kw_only=True)
class _Rising(SparsitySchedule):
    name: ClassVar[str] = ""

    start: float = hyperparameter(0.0, "sparsity of round 1; a lower target stays", low=0.0, high=0.9999)
    until: int = hyperparameter(
        0, "round from which on the target holds; 0: half of the rounds", low=0, high=10**6
    )

    def at(self, target: float, round_number: int, rounds: int) -> float:
        """From ``start`` in round 1 to the target in round ``until``."""
        until = self.until or max(1, rounds // 2)
        start = min(self.start, target)
        if round_number >= until:
            return target
        return target - (target - start) * self._left((max(1, round_number) - 1) / (until - 1))

    def _left(self, done: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Cosine(_Rising):
    """``cosine``: half a cosine from the start to the target."""

    name: ClassVar[str] = "cosine"

    def _left(self, done: float) -> float:
        return (1.0 + math.cos(math.pi * done)) / 2.0


@dataclass(frozen=True, kw_only=True)
class Cubic(_Rising):
    """``cubic``: fast at first, then slower (Zhu and Gupta 2017, arXiv 1710.01878)."""

    name: ClassVar[str] = "cubic"

    def _left(self, done: float) -> float:
        return (1.0 - done) ** 3
