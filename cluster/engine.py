"""Engines: where a round's work is computed. ``InlineEngine`` in this process, ``RayEngine`` on actors.

Both give the same bits: totals are exact whatever the grouping, evaluation chunks are fixed, and randomness
never depends on who computes. A dead actor is restarted by Ray and its clients of the round are played again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from algorithms import Total
from cluster.client import ClientError, ClientHost, ClientReport, EvaluationChunk, Task, Workload
from cluster.local_training import Broadcast
from cluster.placement import CostModel, chunk_size, longest_first

Evaluated = list[tuple[EvaluationChunk, np.ndarray, float]]

#: Calls an actor holds at once: one runs, one waits, so that it never idles between two.
CALLS_IN_FLIGHT = 2

#: Deaths of its actor that a client may see in one round.
DEATHS_A_CLIENT = 3

#: Seconds for which every actor may be dead before the run ends.
ALL_DOWN_S = 120.0


@dataclass
class Outcome:
    """What a round's work came to."""

    total: Total | None
    reports: list[ClientReport]
    evaluated: Evaluated
    seconds: dict[str, float] = field(default_factory=dict)
    lost_actors: int = 0


class Engine(Protocol):
    """Computes rounds."""

    actors: int

    def run(
        self,
        broadcast: Broadcast,
        tasks: Sequence[Task],
        chunks: Sequence[EvaluationChunk],
        meanwhile: Callable[[], None],
    ) -> Outcome:
        """Play ``tasks`` on ``broadcast``, and evaluate its model on ``chunks``.

        Args:
            broadcast: The round.
            tasks: Clients to play; none to evaluate only.
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

    def __init__(self, workload: Workload) -> None:
        self._host = ClientHost(workload)

    def run(
        self,
        broadcast: Broadcast,
        tasks: Sequence[Task],
        chunks: Sequence[EvaluationChunk],
        meanwhile: Callable[[], None],
    ) -> Outcome:
        """See :class:`Engine`."""
        meanwhile()
        started = time.perf_counter()
        evaluated = self._host.evaluate(broadcast, chunks) if chunks else []
        seconds = {"evaluate": time.perf_counter() - started}
        if not tasks:
            return Outcome(None, [], evaluated, seconds)
        reports = self._host.play(broadcast, tasks)
        total = self._host.collect(broadcast.instructions.round)
        return Outcome(total, reports, evaluated, seconds)

    def close(self) -> None:
        """Nothing to release."""


class RayEngine:
    """Client actors on a Ray cluster, fed longest expected client first.

    Args:
        workload: What there is to play.
        sizes: Samples of every client, int64[clients].
        actors: Number of client actors.
        cpus: CPUs an actor asks for.
        gpus: GPUs an actor asks for.
        placement_timeout: Seconds until actors that cannot be placed are an error.

    Raises:
        PlacementError: The actors did not all start in time; names asked and free resources.
    """

    def __init__(
        self,
        workload: Workload,
        sizes: np.ndarray,
        *,
        actors: int,
        cpus: float,
        gpus: float,
        placement_timeout: float = 30.0,
    ) -> None:
        import ray
        import ray.util.scheduling_strategies

        self._ray = ray
        self.actors = actors
        self._sizes, self._costs = sizes, CostModel()
        self._group = self._reserve(cpus, gpus, placement_timeout)
        # Kept for as long as the actors: a restarted actor reads its constructor's argument again.
        self._workload = ray.put(workload)
        # Ray restarts a dead actor for ever; what it was doing is re-dispatched here, never by Ray.
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 0}
        remote = ray.remote(ClientHost)
        self._hosts: list[Any] = [
            remote.options(**options, scheduling_strategy=strategy(self._group, bundle)).remote(
                self._workload
            )
            for bundle in range(actors)
        ]
        # A constructor that raises says why. Starting is slow on a busy machine, and no reason to give up.
        ray.get([host.__ray_ready__.remote() for host in self._hosts])

    def run(
        self,
        broadcast: Broadcast,
        tasks: Sequence[Task],
        chunks: Sequence[EvaluationChunk],
        meanwhile: Callable[[], None],
    ) -> Outcome:
        """See :class:`Engine`."""
        started = time.perf_counter()
        round_ = _Round(self, broadcast, tasks, chunks)
        dispatched = time.perf_counter()
        meanwhile()
        resumed = time.perf_counter()
        outcome = round_.finish()
        self._costs.learn(outcome.reports)
        outcome.seconds |= {"broadcast": dispatched - started, "meanwhile": resumed - dispatched}
        return outcome

    def close(self) -> None:
        """Kill the actors and free what they had reserved."""
        for host in self._hosts:
            self._ray.kill(host)
        self._ray.util.remove_placement_group(self._group)

    def pids(self) -> list[int]:
        """Process ids of the actors, for fault tests."""
        return list(self._ray.get([host.pid.remote() for host in self._hosts]))

    def _reserve(self, cpus: float, gpus: float, timeout: float) -> Any:
        """One bundle an actor: every GPU of every node is filled, and what does not fit is known at once."""
        ray = self._ray
        bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        group = ray.util.placement_group([bundle] * self.actors, strategy="PACK")
        if not group.wait(timeout):
            asked = f"{self.actors} actors with {cpus:g} CPU and {gpus:g} GPU each"
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            whole = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
            ray.util.remove_placement_group(group)
            raise PlacementError(
                f"{asked} found no room within {timeout:g} s; free now: {free}, the whole cluster: {whole}. "
                "Lower actors, cpus_per_actor or gpus_per_actor."
            )
        return group


class PlacementError(RuntimeError):
    """The cluster has no room for the actors that were asked for."""


class _Round:
    """One round in flight on the actors."""

    def __init__(
        self,
        engine: RayEngine,
        broadcast: Broadcast,
        tasks: Sequence[Task],
        chunks: Sequence[EvaluationChunk],
    ) -> None:
        ray = engine._ray
        self._engine, self._ray = engine, ray
        self._number = broadcast.instructions.round
        self._broadcast = ray.put(broadcast)
        self._tasks = {task.client: task for task in tasks}
        self._waiting = deque(longest_first(tasks, engine._sizes, engine._costs))
        self._chunks = deque(chunks)
        self._calls: dict[Any, tuple[int, str, Any]] = {}  # reference -> (actor, kind, work)
        self._reports: dict[int, ClientReport] = {}
        self._played: list[set[int]] = [set() for _ in range(engine.actors)]
        self._total: Total | None = None
        self._evaluated: Evaluated = []
        self._down: dict[int, float] = {}  # actor -> when its death was noticed
        self._lost = 0
        self._losses: Counter[int] = Counter()  # client -> how often its actor died under it
        self._hand_out()

    def finish(self) -> Outcome:
        """Wait for everything, re-dispatching what dead actors lost."""
        ray = self._ray
        started = time.perf_counter()
        collect_started = started
        while self._waiting or self._chunks or self._working() or any(self._played):
            if not (self._waiting or self._chunks or self._working()):
                # All clients are played: ask each actor for its partial total.
                collect_started = time.perf_counter()
                for actor, played in enumerate(self._played):
                    if played:
                        self._call(actor, "collect", None)
            ready, _ = ray.wait(list(self._calls), num_returns=1)
            for reference in ready:
                self._take_in(reference)
        reports = [self._reports[client] for client in sorted(self._reports)]
        seconds = {"work": collect_started - started, "merge": time.perf_counter() - collect_started}
        return Outcome(self._total, reports, self._evaluated, seconds, self._lost)

    def _working(self) -> bool:
        return any(kind != "probe" for _, kind, _ in self._calls.values())

    def _hand_out(self) -> None:
        """Give every live actor with room its next calls, while there is work left.

        Clients come first and the small evaluation chunks last, which keeps the actors level at the end.
        """
        busy = Counter(actor for actor, _, _ in self._calls.values())
        actors = self._engine.actors
        for turn in range(CALLS_IN_FLIGHT):
            for actor in range(actors):
                if busy[actor] > turn or actor in self._down or not (self._chunks or self._waiting):
                    continue
                busy[actor] += 1
                kind, queue = ("play", self._waiting) if self._waiting else ("evaluate", self._chunks)
                take = chunk_size(len(queue), actors)
                self._call(actor, kind, [queue.popleft() for _ in range(take)])

    def _call(self, actor: int, kind: str, work: Any) -> None:
        host = self._engine._hosts[actor]
        if kind == "evaluate":
            reference = host.evaluate.remote(self._broadcast, work)
        elif kind == "play":
            reference = host.play.remote(self._broadcast, work)
        elif kind == "collect":
            reference = host.collect.remote(self._number)
        else:
            reference = host.__ray_ready__.remote()
        self._calls[reference] = (actor, kind, work)

    def _take_in(self, reference: Any) -> None:
        actor, kind, work = self._calls.pop(reference)
        try:
            result = self._ray.get(reference)
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError):
            self._put_back(actor, kind, work)
            self._probe(actor, failed=kind == "probe")
            self._hand_out()
            return
        if kind == "evaluate":
            self._evaluated.extend(result)
        elif kind == "play":
            self._reports |= {report.client: report for report in result}
            # What was not folded needs no collecting, and cannot be lost any more.
            self._played[actor] |= {report.client for report in result if report.folded}
        elif kind == "collect":
            self._merge(actor, result)
        else:
            del self._down[actor]
        self._hand_out()

    def _probe(self, actor: int, *, failed: bool) -> None:
        """Ask a dead actor whether Ray has restarted it; the others go on with its work meanwhile."""
        if actor in self._down and not failed:
            return  # a second call that the same death took; one probe is under way
        if actor not in self._down:
            self._down[actor] = time.monotonic()
            self._lost += 1
        elif (
            len(self._down) == self._engine.actors
            and time.monotonic() - max(self._down.values()) > ALL_DOWN_S
        ):
            raise PlacementError(
                f"every actor died and none came back within {ALL_DOWN_S:g} s in round {self._number}; "
                "the checkpoints are kept: resume the run when the cluster has room again"
            )
        if failed:
            time.sleep(0.2)  # calls to a restarting actor fail at once
        self._call(actor, "probe", None)

    def _merge(self, actor: int, total: Total | None) -> None:
        played = self._played[actor]
        if total is None or sorted(total.clients) != sorted(played):
            # The actor died and came back in between: what it had folded is gone, or was put back already.
            self._put_back(actor, "collect", played)
            return
        self._played[actor] = set()
        if self._total is None:
            # Arrays out of the object store are read-only.
            self._total = Total(
                total.grid,
                total.high.copy(),
                total.low.copy(),
                total.votes.copy(),
                total.layer_counts.copy(),
                None if total.mask_samples is None else total.mask_samples.copy(),
                total.samples,
                list(total.clients),
            )
        else:
            self._total.merge(total)

    def _put_back(self, actor: int, kind: str, work: Any) -> None:
        """A dead actor loses the call and everything it had folded in this round."""
        if kind == "evaluate":
            self._chunks.extend(work)
        elif kind == "play":
            self._waiting.extend(work)
            self._losses.update(task.client for task in work)
            if self._losses.most_common(1)[0][1] >= DEATHS_A_CLIENT:
                clients = ", ".join(str(task.client) for task in work)
                raise ClientError(
                    f"client {clients} failed in round {self._number}, stage train: the actor that played it "
                    f"died {DEATHS_A_CLIENT} times (out of memory, or a crash in native code?)"
                )
        for client in self._played[actor]:
            self._reports.pop(client, None)
            self._waiting.append(self._tasks[client])
        self._played[actor] = set()
