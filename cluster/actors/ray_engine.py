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


class RayEngine:
    """Client actors on the connected cluster, fed longest expected client first.

    Args:
        setup: What there is to play.
        sizes: Samples of every client, int64[clients].
        bundles: The actors, as they are reserved.
        kind_of: Name of the kind of actors that plays a client; by default there is only the common kind.
        make_host: Builds the host of an actor from the setup and the actor's GPUs.
        placement_timeout: Seconds until actors that cannot be placed are an error.
        watched_as: See :class:`ActorPool`.

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
        placement_timeout: float = 30.0,
        watched_as: str | None = None,
    ) -> None:
        config = setup.config
        self._pool = ActorPool(setup, bundles, make_host, placement_timeout, watched_as)
        skip = config.on_client_error == "skip"
        self._rounds = Rounds(Crew(self._pool, sizes, CostModel(), kind_of, config.client_timeout_s, skip))

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
        """Kill the actors and free what they had reserved."""
        self._pool.close()

    def places(self) -> list[Place]:
        """Where every actor runs."""
        return self._pool.places()

    def pids(self) -> list[int]:
        """Process ids of the actors."""
        return [place.pid for place in self.places()]
