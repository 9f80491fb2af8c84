"""Engines: where a round's work is computed. ``InlineEngine`` here, ``ray_engine.RayEngine`` on actors.

Both give the same bits: totals are exact whatever the grouping, evaluation chunks are fixed, and randomness
never depends on who computes. A dead actor is restarted by Ray and its clients of the round are played again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.clients.client import ClientHost
from cluster.exchange import Assignment, Broadcast, ClientReport, Evaluated, EvaluationChunk, HostSetup


@dataclass
class Outcome:
    """What a round's work came to.

    Attributes:
        total: The sum of the updates that were folded, a ``Total`` (of a secure round a ``SealedTotal`` until
            the schedule has opened it); None when there is none.
        reports: What every client did, in the order of clients.
        evaluated: Waits for the evaluation, which may go on while the next round is played.
        evaluating: Whether it does.
        seconds: Seconds by phase.
        lost_actors: Actors that were lost.
        beside_bytes: Bytes that clients sent beside their updates.
    """

    total: Any
    reports: list[ClientReport]
    evaluated: Callable[[], Evaluated] = list
    evaluating: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    lost_actors: int = 0
    beside_bytes: int = 0


class Engine(Protocol):
    """Computes rounds."""

    @property
    def actors(self) -> int:
        """How many clients it plays at once."""

    def run(
        self,
        broadcast: Broadcast,
        assignments: Sequence[Assignment],
        chunks: Sequence[EvaluationChunk],
        meanwhile: Callable[[], None],
    ) -> Outcome:
        """Play ``assignments`` on ``broadcast``, and begin to evaluate its model on ``chunks``.

        Args:
            broadcast: The round.
            assignments: Clients to play; none to evaluate only.
            chunks: What to evaluate the global model on.
            meanwhile: Called once the first work is handed out.
        """
        ...

    def close(self) -> None:
        """Release the actors."""
        ...


class InlineEngine:
    """Everything in this process, in order: for debugging and as the reference of every other engine."""

    actors = 1

    def __init__(self, setup: HostSetup) -> None:
        self._host = ClientHost(setup)

    def run(
        self,
        broadcast: Broadcast,
        assignments: Sequence[Assignment],
        chunks: Sequence[EvaluationChunk],
        meanwhile: Callable[[], None],
    ) -> Outcome:
        """See :class:`Engine`."""
        meanwhile()
        started = time.perf_counter()
        evaluated = self._host.evaluate(broadcast, chunks) if chunks else []
        seconds = {"evaluate": time.perf_counter() - started}
        if not assignments:
            return Outcome(None, [], lambda: evaluated, seconds=seconds)
        reports = self._host.play(broadcast, assignments)
        total = self._host.collect(broadcast.instructions.round)
        return Outcome(total, reports, lambda: evaluated, seconds=seconds)

    def close(self) -> None:
        """Nothing to release."""
