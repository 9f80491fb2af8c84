"""The engine on a Ray cluster: client actors in kinds, fed by :class:`cluster.actors.ray_round.Rounds`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from cluster.actors.actor_pool import ActorPool, MakeHost, Place
from cluster.actors.placement import Bundle, CostModel
from cluster.actors.ray_calls import Crew
from cluster.actors.ray_round import Rounds
from cluster.clients.client import ClientHost
from cluster.exchange import Assignment, Broadcast, EvaluationChunk, HostSetup
from cluster.rounds.engine import Outcome


class KeptPool:
    """Actors that stay when a run is over, for the next one that wants the same; none on a GPU.

    Starting an actor costs seconds, most of them for importing torch, and a run of a study lasts as long.
    """

    def __init__(self) -> None:
        self._pool: ActorPool | None = None

    def leave(self, pool: ActorPool) -> None:
        """Leave the actors of a run that is over."""
        if any(bundle.kind.gpus for bundle in pool.bundles):
            pool.close()  # memory of a GPU that torch has cached is not given back
        else:
            self._pool = pool

    def take(self, bundles: Sequence[Bundle], make_host: MakeHost) -> ActorPool | None:
        """The actors that were left, if they are those that are wanted; others are ended."""
        pool, self._pool = self._pool, None
        if pool is None or (pool.bundles == tuple(bundles) and pool.make_host == make_host):
            return pool
        pool.close()
        return None

    def close(self) -> None:
        """End what was left."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class RayEngine:
    """Client actors on the connected cluster, fed longest expected client first.

    Args:
        setup: What there is to play.
        sizes: Samples of every client, int64[clients].
        bundles: The actors, as they are reserved.
        kind_of: Name of the kind of actors that plays a client; by default there is only the common kind.
        make_host: Builds the host of an actor from the setup and the actor's GPUs.
        inlined_bytes: See :class:`Crew`.
        placement_timeout: Seconds until actors that cannot be placed are an error.
        watched_as: See :meth:`ActorPool.begin`.
        kept: Takes over the actors that another engine of this process has left, and leaves them to the next.

    Raises:
        PlacementError: The actors were not placed in time; names asked and free resources.
    """

    def __init__(
        self,
        setup: HostSetup,
        sizes: np.ndarray,
        bundles: Sequence[Bundle],
        *,
        kind_of: Callable[[int], str] = lambda client: "",
        make_host: MakeHost = ClientHost,
        inlined_bytes: int = 0,
        placement_timeout: float = 30.0,
        watched_as: str | None = None,
        kept: KeptPool | None = None,
    ) -> None:
        config = setup.config
        self._kept = kept
        pool = kept.take(bundles, make_host) if kept is not None else None
        if pool is None or not pool.alive:
            pool = ActorPool(bundles, make_host, placement_timeout)
        self._pool = pool
        pool.begin(setup, watched_as)
        skip = config.on_client_error == "skip"
        crew = Crew(self._pool, sizes, CostModel(), kind_of, config.client_timeout_s, skip, inlined_bytes)
        self._rounds = Rounds(crew)

    @property
    def actors(self) -> int:
        """Number of client actors."""
        return len(self._pool)

    def run(
        self,
        broadcast: Broadcast,
        assignments: Sequence[Assignment],
        chunks: Sequence[EvaluationChunk],
        meanwhile: Callable[[], None],
    ) -> Outcome:
        """See :class:`cluster.rounds.engine.Engine`."""
        started = time.perf_counter()
        self._rounds.start(broadcast, assignments, chunks)
        dispatched = time.perf_counter()
        meanwhile()
        resumed = time.perf_counter()
        outcome = self._rounds.finish()
        outcome.seconds |= {"broadcast": dispatched - started, "meanwhile": resumed - dispatched}
        return outcome

    def close(self) -> None:
        """Kill the actors and free what they had reserved, or leave them to the next engine."""
        if self._kept is not None and self._rounds.at_rest:
            self._kept.leave(self._pool)
        else:
            self._pool.close()

    def places(self) -> list[Place]:
        """Where every actor runs."""
        return self._pool.places()

    def pids(self) -> list[int]:
        """Process ids of the actors."""
        return [place.pid for place in self.places()]
