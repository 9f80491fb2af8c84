"""What rounds on client actors work with: the actors and their rules, calls and evaluations under way."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.actors.actor_pool import ActorPool
from cluster.actors.placement import CostModel
from cluster.exchange import EvaluationChunk
from cluster.workload.objectives import Sums


@dataclass(frozen=True)
class Crew:
    """Who plays a run's rounds, and by which rules.

    Attributes:
        pool: The actors.
        sizes: Samples of every client, int64[clients].
        costs: What visits have cost so far.
        kind_of: Name of the kind of actors that plays a client.
        client_timeout_s: Seconds beyond the expected ones until an actor counts as hung.
        skip_failing: A client whose actors are lost again and again is skipped; else it ends the run.
        inlined_bytes: Arguments of so many bytes travel with a call; larger ones through the object store.
    """

    pool: ActorPool
    sizes: np.ndarray
    costs: CostModel
    kind_of: Callable[[int], str]
    client_timeout_s: float
    skip_failing: bool
    inlined_bytes: int


@dataclass(eq=False)
class Evaluation:
    """The evaluation of one model, as far as it has come.

    Attributes:
        broadcast: Reference to the model.
        round: The round whose clients start from it.
        waiting: Chunks that no actor has yet.
        running: Number of chunks that actors have.
        results: What is done.
        losses: How often its actor was lost under a chunk.
    """

    broadcast: Any
    round: int
    waiting: deque[EvaluationChunk]
    running: int = 0
    results: list[tuple[EvaluationChunk, Sums]] = field(default_factory=list)
    losses: Counter[EvaluationChunk] = field(default_factory=Counter)

    @property
    def done(self) -> bool:
        """Whether every chunk is evaluated or given up."""
        return not self.waiting and not self.running


@dataclass(frozen=True)
class Call:
    """A call in flight.

    Attributes:
        actor: Who was called.
        method: ``play``, ``collect``, ``evaluate`` or ``ready``.
        work: Its assignments or chunks.
        evaluation: Where its chunks belong.
        seconds: What it is expected to take, as far as that is known.
        limit_s: Seconds after which its actor counts as hung.
        collects: Whether it brings the actor's total of the round.
    """

    actor: int
    method: str
    work: Sequence[Any]
    evaluation: Evaluation | None
    seconds: float
    limit_s: float
    collects: bool
