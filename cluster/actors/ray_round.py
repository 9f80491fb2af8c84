"""Rounds on the client actors: handed out, taken in, and done again where an actor is lost.

A round is over when its clients are folded. The evaluation, which comes last, may go on into the next one:
the actors are at work while the driver takes its step.

An actor that dies loses its calls and what it has folded since its total was last collected; all of it is
played again, and a client that keeps losing its actors is played alone until it is clear that it is the one.
So is a chunk of the evaluation, which may train a client.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from cluster.actors.actor_pool import PROBE_EVERY_S, PlacementError
from cluster.actors.placement import call_seconds, longest_first
from cluster.actors.ray_calls import Call, Crew, Evaluation
from cluster.exchange import (
    ActorLostError,
    Assignment,
    Broadcast,
    ClientReport,
    Evaluated,
    EvaluationChunk,
)
from cluster.rounds.engine import Outcome

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


class Rounds:
    """Rounds one after the other: ``start`` hands out the first work, ``finish`` waits for the rest."""

    def __init__(self, crew: Crew) -> None:
        import ray

        self._ray, self._crew, self._pool = ray, crew, crew.pool
        actors = len(crew.pool)
        self._calls: dict[Any, Call] = {}
        self._queues: list[list[Any]] = [[] for _ in range(actors)]  # references, oldest first
        self._since = [0.0] * actors  # when the oldest call began, as far as it can be told
        self._probe_at: dict[int, float] = {}
        self._evaluations: deque[Evaluation] = deque()  # oldest first; the last one is this round's

    def start(
        self, broadcast: Broadcast, assignments: Sequence[Assignment], chunks: Sequence[EvaluationChunk]
    ) -> None:
        """Begin a round."""
        actors, kinds = len(self._pool), self._pool.kinds
        for reference in [r for r, call in self._calls.items() if call.method in ("play", "collect")]:
            # Of a round that an error has ended.
            self._queues[self._calls.pop(reference).actor].remove(reference)
        self._number = broadcast.instructions.round
        self._broadcast = self._ray.put(broadcast)
        self._tasks = {assignment.client: assignment for assignment in assignments}
        self._evaluations = deque(one for one in self._evaluations if not one.done)
        self._evaluations.append(Evaluation(self._broadcast, self._number, deque(chunks)))
        self._waiting: dict[str, deque[Assignment]] = {kind: deque() for kind in kinds}
        self._work = dict.fromkeys(kinds, 0.0)  # what waits, in average samples
        for assignment in longest_first(assignments, self._crew.sizes, self._crew.costs):
            self._wait_for(assignment)
        self._reports: dict[int, ClientReport] = {}
        self._played: list[set[int]] = [set() for _ in range(actors)]  # and not yet collected
        self._uncollected_s = [0.0] * actors
        self._total: Any = None
        self._losses: Counter[int] = Counter()  # how often its actor was lost under a client
        self._failed: dict[int, str] = {}
        self._lost = 0
        self._last_play = time.perf_counter()
        self._hand_out()

    def finish(self) -> Outcome:
        """Wait for every client, and have done again what lost actors had done."""
        started, evaluation = time.perf_counter(), self._evaluations[-1]
        while not self._complete():
            self._wait()
            self._hand_out()
        layers = len(next(iter(self._reports.values())).measured.flops_sparse) if self._reports else 1
        for client, reason in self._failed.items():
            samples = int(self._crew.sizes[client])
            self._reports[client] = ClientReport.failed(client, samples, layers, reason)
        reports = [self._reports[client] for client in sorted(self._reports)]
        worked = max(started, self._last_play)
        seconds = {"work": worked - started, "merge": time.perf_counter() - worked}
        return Outcome(
            self._total,
            reports,
            lambda: self._evaluated(evaluation),
            not evaluation.done,
            seconds,
            self._lost,
        )

    def _evaluated(self, evaluation: Evaluation) -> Evaluated:
        """Wait for an evaluation, perhaps while the next round's clients are played."""
        while not evaluation.done:
            self._wait()
            self._hand_out()
        return evaluation.results

    def _complete(self) -> bool:
        working = any(call.method in ("play", "collect") for call in self._calls.values())
        return not (working or any(self._waiting.values()) or any(self._played))

    # ---------------------------------------------------------------------------------- handing out

    def _hand_out(self) -> None:
        """Give the live actors with room their next calls.

        What is left of the last round's evaluation comes first, then clients, then the actor's total is
        collected, and the small evaluation chunks come last, which keeps the actors level at the end and
        leaves them at work while totals travel and the driver takes its step.
        """
        now, down = time.monotonic(), self._pool.down
        for actor in down:
            if not self._queues[actor] and now >= self._probe_at.get(actor, 0.0):
                self._call(actor, "ready")
        # Whoever is expected to be done first takes the next work. If it has no room, that work waits for
        # it: only an idle actor may take it, not one that would come to it later.
        ends = [(self._expected_end(a, now), len(q), a) for a, q in enumerate(self._queues) if a not in down]
        heapq.heapify(ends)
        full: set[str] = set()  # kinds whose first actor to be done has no room
        while ends:
            *_, actor = heapq.heappop(ends)
            queue, kind = self._queues[actor], self._pool.kinds[actor]
            if len(queue) >= CALLS_IN_FLIGHT:
                full.add(kind)
            elif self._give(actor, work=not queue or kind not in full):
                heapq.heappush(ends, (self._expected_end(actor, now), len(queue), actor))

    def _expected_end(self, actor: int, now: float) -> float:
        """When an actor will be done with what it holds, by what such work has cost so far."""
        seconds = [self._calls[reference].seconds for reference in self._queues[actor]]
        if not seconds:
            return now
        return max(now, self._since[actor] + seconds[0]) + sum(seconds[1:])

    def _give(self, actor: int, *, work: bool) -> bool:
        """Start the actor's next call, if there is one; without ``work`` only its total is collected."""
        *late, current = self._evaluations
        kind = self._kind_to_play(actor)
        due = self._uncollected_s[actor] >= COLLECT_AFTER_S
        queued = {self._calls[reference].method for reference in self._queues[actor]}
        left = next((one for one in late if one.waiting), None)
        if left is not None:
            if work:
                self._evaluate(actor, left)
        elif kind is not None and not due:
            if work:
                self._call(actor, "play", self._take(kind, actor))
        elif (self._played[actor] or "play" in queued) and "collect" not in queued:
            self._call(actor, "collect")
            return True
        elif current.waiting and work:
            self._evaluate(actor, current)
        else:
            return False
        return work

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

    def _take(self, kind: str, actor: int) -> list[Assignment]:
        waiting, pace = self._waiting[kind], self._crew.costs.pace(actor)
        room = 0.0 if pace is None else call_seconds(self._share(kind, actor, pace)) / pace
        taken: list[Assignment] = []
        while waiting:
            work = self._work_of(waiting[0])
            # A client that lost its actor before is played alone: if it does so again, it is known which.
            alone = any(assignment.client in self._losses for assignment in [*taken[:1], waiting[0]])
            if taken and (alone or work / 2 > room):
                break
            taken.append(waiting.popleft())
            self._work[kind] -= work
            room -= work
        return taken

    def _share(self, kind: str, actor: int, pace: float) -> float:
        """Seconds of a kind's waiting work that are the actor's if all actors are to end at the same time."""
        now, down = time.monotonic(), self._pool.down
        fellows = {a for a, name in enumerate(self._pool.kinds) if name == kind and a not in down} | {actor}
        held = {a: self._expected_end(a, now) - now for a in fellows}
        return (sum(held.values()) + self._work[kind] * pace) / len(fellows) - held[actor]

    def _evaluate(self, actor: int, evaluation: Evaluation) -> None:
        waiting, losses = evaluation.waiting, evaluation.losses
        count = max(1, len(waiting) // (3 * len(self._pool)))
        taken: list[EvaluationChunk] = []
        while waiting and len(taken) < count:
            # As above: alone, once it lost its actor.
            if taken and not losses.keys().isdisjoint((taken[0], waiting[0])):
                break
            taken.append(waiting.popleft())
        evaluation.running += len(taken)
        self._call(actor, "evaluate", taken, evaluation)

    def _wait_for(self, assignment: Assignment) -> None:
        kind = self._crew.kind_of(assignment.client)
        self._waiting[kind].append(assignment)
        self._work[kind] += self._work_of(assignment)

    def _work_of(self, assignment: Assignment) -> float:
        return self._crew.costs.work(assignment.client, int(self._crew.sizes[assignment.client]))

    def _call(
        self, actor: int, method: str, work: Sequence[Any] = (), evaluation: Evaluation | None = None
    ) -> None:
        costs, seconds, patience = self._crew.costs, 0.0, self._crew.client_timeout_s
        arguments: tuple[Any, ...] = ()
        if method == "play":
            arguments = (self._broadcast, work)
            seconds = sum(self._work_of(assignment) for assignment in work) * (costs.pace(actor) or 0.0)
        elif method == "collect":
            arguments = (self._number,)
        elif evaluation is not None:
            arguments = (evaluation.broadcast, work)
            seconds = sum(costs.chunk_seconds(chunk) for chunk in work)
            patience *= len(work)
        reference = self._pool.call(actor, method, *arguments)
        if not self._queues[actor]:
            self._since[actor] = time.monotonic()
        self._queues[actor].append(reference)
        limit = patience + PATIENCE * seconds
        self._calls[reference] = Call(actor, method, work, evaluation, seconds, limit)

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
        # An actor answers in the order in which it was asked.
        oldest = [queue[0] for queue in self._queues if queue]
        if oldest:
            ready, _ = self._ray.wait(oldest, num_returns=1, timeout=patience)
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
        elif call.evaluation is not None:
            call.evaluation.running -= len(call.work)
            call.evaluation.results += result
            self._crew.costs.learn_chunks(chunk for chunk, _ in result)
        else:
            del self._pool.down[actor]

    def _merge(self, actor: int, total: Any) -> None:
        played = self._played[actor]
        if total is None or sorted(total.clients) != sorted(played):
            # The actor died and came back in between: what it had folded is gone, or was put back already.
            self._put_back_played(actor)
            return
        if self._total is None:
            self._total = total.copy()
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
            if call.evaluation is not None:
                call.evaluation.running -= len(call.work)
            for work in call.work:
                self._put_back(work, call.evaluation, why if place == 0 else None)
        self._put_back_played(actor)

    def _put_back(self, work: Any, evaluation: Evaluation | None, why: str | None) -> None:
        """Have a client or a chunk done again; with ``why``, its actor was lost under it."""
        losses: Counter[Any] = self._losses if evaluation is None else evaluation.losses
        key = work.client if evaluation is None else work
        if why is not None:
            losses[key] += 1
        if why is not None and losses[key] >= LOSSES:
            self._give_up(work, evaluation, why)
        elif evaluation is None:
            self._wait_for(work)
        else:
            evaluation.waiting.append(work)

    def _put_back_played(self, actor: int) -> None:
        for client in self._played[actor]:
            del self._reports[client]
            self._wait_for(self._tasks[client])
        self._played[actor], self._uncollected_s[actor] = set(), 0.0

    def _give_up(self, work: Any, evaluation: Evaluation | None, why: str) -> None:
        # What is evaluated is the result of the round before.
        stage, number = "train", self._number
        if evaluation is not None:
            stage, number = "evaluation", evaluation.round - 1
        reason = (
            f"stage {stage}: the actor that played it was lost {LOSSES} times, the last one {why} "
            "(out of memory, a crash in native code, or client_timeout_s too short?)"
        )
        whole = work.client is None
        who = f"rows {work.start} to {work.stop} of {work.split}" if whole else f"client {work.client}"
        failure = f"{who} failed in round {number}, {reason}"
        if not self._crew.skip_failing or whole:
            raise ActorLostError(failure)
        _logger.warning(failure)
        if evaluation is None:
            self._failed[work.client] = f"failed in {reason}"
