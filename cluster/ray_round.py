"""One round in flight on the client actors: handed out, taken in, and done again where an actor is lost.

An actor that dies loses its calls and what it has folded since its total was last collected; all of it is
played again, and a client that keeps losing its actors is played alone until it is clear that it is the one.
So is a chunk of the evaluation, which may train a client.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from algorithms import Total
from cluster.actor_pool import PROBE_EVERY_S, ActorPool, PlacementError
from cluster.client import ClientError, ClientReport, EvaluationChunk, Task
from cluster.engine import Evaluated, Outcome
from cluster.local_training import Broadcast
from cluster.placement import CostModel, chunk_work, longest_first

#: Calls an actor holds at once: one runs, one waits, so that it never idles between two.
CALLS_IN_FLIGHT = 2

#: Losses of its actor that a client, or a chunk of the evaluation, may see in one round.
LOSSES = 3

#: An actor counts as hung after this many times the expected seconds of its call, and the timeout.
PATIENCE = 10.0

#: Seconds of training that an actor folds before its total is collected in mid-round.
COLLECT_AFTER_S = 60.0

#: Seconds for which every actor of a kind may be dead before others play its clients.
KIND_DOWN_S = 30.0

#: Seconds for which every actor may be dead before the run ends.
ALL_DOWN_S = 120.0


_logger = logging.getLogger("sparsyfed.round")


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
    """

    pool: ActorPool
    sizes: np.ndarray
    costs: CostModel
    kind_of: Callable[[int], str]
    client_timeout_s: float
    skip_failing: bool


@dataclass(frozen=True)
class _Call:
    actor: int
    method: str
    work: Sequence[Any]
    limit_s: float  # longer, and its actor counts as hung


class Round:
    """One round in flight. Its first work is handed out at once; ``finish`` waits for the rest."""

    def __init__(
        self, crew: Crew, broadcast: Broadcast, tasks: Sequence[Task], chunks: Sequence[EvaluationChunk]
    ) -> None:
        import ray

        self._ray, self._crew, self._pool = ray, crew, crew.pool
        self._number = broadcast.instructions.round
        self._broadcast = ray.put(broadcast)
        self._tasks = {task.client: task for task in tasks}
        self._chunks = deque(chunks)
        self._waiting: dict[str, deque[Task]] = {kind: deque() for kind in crew.pool.kinds}
        self._work = dict.fromkeys(crew.pool.kinds, 0.0)  # what waits, in average samples
        for task in longest_first(tasks, crew.sizes, crew.costs):
            self._wait_for(task)
        self._actors_of = Counter(crew.pool.kinds)
        self._calls: dict[Any, _Call] = {}
        self._queues: list[list[Any]] = [[] for _ in range(len(crew.pool))]  # references, oldest first
        self._since = [0.0] * len(crew.pool)  # when the oldest call began, as far as it can be told
        self._probe_at: dict[int, float] = {}
        self._reports: dict[int, ClientReport] = {}
        self._played: list[set[int]] = [set() for _ in range(len(crew.pool))]  # and not yet collected
        self._uncollected_s = [0.0] * len(crew.pool)
        self._total: Total | None = None
        self._evaluated: Evaluated = []
        # How often its actor was lost under a client, or under a chunk.
        self._losses: Counter[int | EvaluationChunk] = Counter()
        self._failed: dict[int, str] = {}
        self._lost = 0
        self._last_play = time.perf_counter()
        self._hand_out()

    def finish(self) -> Outcome:
        """Wait for everything, and have done again what lost actors had done."""
        started = time.perf_counter()
        while not self._complete():
            self._wait()
            self._hand_out()
        layers = len(next(iter(self._reports.values())).flops_sparse) if self._reports else 1
        for client, reason in self._failed.items():
            samples = int(self._crew.sizes[client])
            self._reports[client] = ClientReport.failed(client, samples, layers, reason)
        reports = [self._reports[client] for client in sorted(self._reports)]
        worked = max(started, self._last_play)
        seconds = {"work": worked - started, "merge": time.perf_counter() - worked}
        return Outcome(self._total, reports, self._evaluated, seconds, self._lost)

    def _complete(self) -> bool:
        working = any(call.method != "ready" for call in self._calls.values())
        return not (working or self._chunks or any(self._waiting.values()) or any(self._played))

    # ---------------------------------------------------------------------------------- handing out

    def _hand_out(self) -> None:
        """Give every live actor with room its next calls, quick actors first.

        Clients come first, then the actor's total is collected, and the small evaluation chunks come last,
        which keeps the actors level at the end.
        """
        down, costs = self._pool.down, self._crew.costs
        for actor in down:
            if not self._queues[actor] and time.monotonic() >= self._probe_at.get(actor, 0.0):
                self._call(actor, "ready")
        free = [a for a, calls in enumerate(self._queues) if len(calls) < CALLS_IN_FLIGHT and a not in down]
        free.sort(key=lambda actor: costs.pace(actor) or 0.0)
        for turn in range(CALLS_IN_FLIGHT):
            for actor in free:
                if len(self._queues[actor]) <= turn:
                    self._give(actor)

    def _give(self, actor: int) -> None:
        kind = self._kind_to_play(actor)
        due = self._uncollected_s[actor] >= COLLECT_AFTER_S
        busy = {self._calls[reference].method for reference in self._queues[actor]}
        if kind is not None and not due:
            self._call(actor, "play", self._take(kind, actor))
        elif self._played[actor] and not busy & {"play", "collect"}:
            self._call(actor, "collect")
        elif self._chunks:
            count = max(1, len(self._chunks) // (3 * len(self._pool)))
            self._call(actor, "evaluate", self._take_chunks(count))

    def _kind_to_play(self, actor: int) -> str | None:
        """The actor's own kind while its clients wait, else one whose actors are all gone."""
        own = self._pool.kinds[actor]
        if self._waiting[own]:
            return own
        if not self._pool.down:
            return None
        for kind, waiting in self._waiting.items():
            if waiting and self._pool.seconds_without(kind) > KIND_DOWN_S:
                return kind
        return None

    def _take(self, kind: str, actor: int) -> list[Task]:
        waiting = self._waiting[kind]
        limit = chunk_work(self._work[kind], self._actors_of[kind], self._crew.costs.pace(actor))
        taken: list[Task] = []
        while waiting:
            work = self._work_of(waiting[0])
            # A client that lost its actor before is played alone: if it does so again, it is known which.
            alone = any(task.client in self._losses for task in [*taken[:1], waiting[0]])
            if taken and (alone or work > limit):
                break
            taken.append(waiting.popleft())
            self._work[kind] -= work
            limit -= work
        return taken

    def _take_chunks(self, count: int) -> list[EvaluationChunk]:
        taken: list[EvaluationChunk] = []
        while self._chunks and len(taken) < count:
            # As above: alone, once it lost its actor.
            if taken and not self._losses.keys().isdisjoint((taken[0], self._chunks[0])):
                break
            taken.append(self._chunks.popleft())
        return taken

    def _wait_for(self, task: Task) -> None:
        kind = self._crew.kind_of(task.client)
        self._waiting[kind].append(task)
        self._work[kind] += self._work_of(task)

    def _work_of(self, task: Task) -> float:
        return self._crew.costs.work(task.client, int(self._crew.sizes[task.client]))

    def _call(self, actor: int, method: str, work: Sequence[Any] = ()) -> None:
        arguments: dict[str, tuple[Any, ...]] = {"ready": (), "collect": (self._number,)}
        reference = self._pool.call(actor, method, *arguments.get(method, (self._broadcast, work)))
        if not self._queues[actor]:
            self._since[actor] = time.monotonic()
        self._queues[actor].append(reference)
        seconds = 0.0
        if method == "play":
            seconds = sum(self._work_of(task) for task in work) * (self._crew.costs.pace(actor) or 0.0)
        patience = self._crew.client_timeout_s * (len(work) if method == "evaluate" else 1)
        limit = patience + PATIENCE * seconds
        self._calls[reference] = _Call(actor, method, work, limit)

    # ----------------------------------------------------------------------------------- taking in

    def _wait(self) -> None:
        now = time.monotonic()
        if self._pool.seconds_without() > ALL_DOWN_S:
            raise PlacementError(
                f"every actor died and none came back within {ALL_DOWN_S:g} s in round {self._number}; "
                "the checkpoints are kept: resume the run when the cluster has room again"
            )
        deadlines = {
            actor: self._since[actor] + self._calls[queue[0]].limit_s
            for actor, queue in enumerate(self._queues)
            if queue and actor not in self._pool.down  # a dead one may take its time
        }
        patience = max(0.0, min(deadlines.values(), default=now + PROBE_EVERY_S) - now)
        if self._pool.down:
            patience = min(patience, PROBE_EVERY_S)
        ready: list[Any] = []
        if self._calls:
            ready, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=patience)
        else:
            time.sleep(patience)
        if ready:
            self._take_in(ready[0])
            return
        for actor, deadline in deadlines.items():
            if deadline <= time.monotonic():
                self._pool.kill(actor)
                self._lose(actor, f"did not answer within {deadline - self._since[actor]:.0f} s")

    def _take_in(self, reference: Any) -> None:
        call = self._calls[reference]
        actor = call.actor
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if call.method != "ready":  # a restarted host that cannot be built is tried again
                raise error.cause if isinstance(error.cause, Exception) else error from None
            self._lose(actor, str(error))
            return
        except self._ray.exceptions.RayError as error:
            self._lose(actor, f"died ({str(error).splitlines()[0]})")
            return
        del self._calls[reference]
        self._queues[actor].remove(reference)
        self._since[actor] = time.monotonic()
        if call.method == "play":
            self._reports |= {report.client: report for report in result}
            # What was not folded needs no collecting, and cannot be lost any more.
            self._played[actor] |= {report.client for report in result if report.folded}
            self._uncollected_s[actor] += sum(report.seconds for report in result)
            self._crew.costs.learn(actor, result)
            self._last_play = time.perf_counter()
        elif call.method == "collect":
            self._merge(actor, result)
        elif call.method == "evaluate":
            self._evaluated.extend(result)
        else:
            del self._pool.down[actor]

    def _merge(self, actor: int, total: Total | None) -> None:
        played = self._played[actor]
        if total is None or sorted(total.clients) != sorted(played):
            # The actor died and came back in between: what it had folded is gone, or was put back already.
            self._put_back_played(actor)
            return
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
        self._played[actor], self._uncollected_s[actor] = set(), 0.0

    # ------------------------------------------------------------------------------------- losses

    def _lose(self, actor: int, why: str) -> None:
        """An actor is dead: put back what it held, and ask from now on whether it is back."""
        self._lost += self._pool.lost(actor)
        self._probe_at[actor] = time.monotonic() + PROBE_EVERY_S
        references, self._queues[actor] = self._queues[actor], []
        for place, reference in enumerate(references):
            call = self._calls.pop(reference)
            for work in call.work:
                key = work.client if isinstance(work, Task) else work
                if place == 0:
                    self._losses[key] += 1
                if self._losses[key] >= LOSSES:
                    self._give_up(work, why)
                elif isinstance(work, Task):
                    self._wait_for(work)
                else:
                    self._chunks.append(work)
        self._put_back_played(actor)

    def _put_back_played(self, actor: int) -> None:
        for client in self._played[actor]:
            del self._reports[client]
            self._wait_for(self._tasks[client])
        self._played[actor], self._uncollected_s[actor] = set(), 0.0

    def _give_up(self, work: Task | EvaluationChunk, why: str) -> None:
        # What is evaluated is the result of the round before.
        played = isinstance(work, Task)
        stage, number = ("train", self._number) if played else ("evaluation", self._number - 1)
        reason = (
            f"stage {stage}: the actor that played it was lost {LOSSES} times, the last one {why} "
            "(out of memory, a crash in native code, or client_timeout_s too short?)"
        )
        who = (
            f"rows {work.start} to {work.stop} of {work.split}"
            if work.client is None
            else f"client {work.client}"
        )
        failure = f"{who} failed in round {number}, {reason}"
        if not self._crew.skip_failing or work.client is None:
            raise ClientError(failure)
        _logger.warning(failure)
        if played:
            self._failed[work.client] = f"failed in {reason}"
