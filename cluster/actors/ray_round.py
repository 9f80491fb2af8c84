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
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cluster.actors.actor_pool import PROBE_EVERY_S, NotBegunError, PlacementError
from cluster.actors.placement import call_seconds, longest_first
from cluster.actors.queues import CALLS_IN_FLIGHT, Queues
from cluster.actors.ray_calls import Call, Crew, Evaluation
from cluster.actors.totals import Totals
from cluster.exchange import ActorLostError, Assignment, Broadcast, ClientReport, Evaluated, EvaluationChunk
from cluster.rounds.engine import Outcome

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

#: Calls without which a round has no total.
_TO_THE_TOTAL = ("play", "collect", "combine")

_logger = logging.getLogger("sparsyfed.round")


class Rounds:
    """Rounds one after the other: ``start`` hands out the first work, ``finish`` waits for the rest."""

    def __init__(self, crew: Crew) -> None:
        import ray

        self._ray, self._crew, self._pool = ray, crew, crew.pool
        self._queues = Queues(len(crew.pool))
        self._totals = Totals(ray, crew.pool.nodes)
        kinds = np.array(crew.pool.kinds)
        self._kind_masks = {kind: kinds == kind for kind in crew.pool.kinds}
        self._probe_at: dict[int, float] = {}
        self._evaluations: deque[Evaluation] = deque()  # oldest first; the last one is this round's

    @property
    def at_rest(self) -> bool:
        """Whether every actor lives and has nothing to do."""
        return not self._pool.down and not self._queues.methods.total()

    def start(
        self, broadcast: Broadcast, assignments: Sequence[Assignment], chunks: Sequence[EvaluationChunk]
    ) -> None:
        """Begin a round."""
        for actor in range(len(self._pool)):  # of a round that an error has ended
            self._queues.drop(actor, _TO_THE_TOTAL)
        self._totals.begin()
        self._number = broadcast.instructions.round
        small = broadcast.nbytes <= self._crew.inlined_bytes
        self._broadcast = broadcast if small else self._ray.put(broadcast)
        self._tasks = {assignment.client: assignment for assignment in assignments}
        self._evaluations = deque(one for one in self._evaluations if not one.done)
        self._evaluations.append(Evaluation(self._broadcast, self._number, deque(chunks)))
        self._waiting: dict[str, deque[Assignment]] = {kind: deque() for kind in self._pool.kinds}
        self._work = dict.fromkeys(self._waiting, 0.0)  # what waits, in average samples
        for assignment in longest_first(assignments, self._crew.sizes, self._crew.costs):
            self._wait_for(assignment)
        self._reports: dict[int, ClientReport] = {}
        self._losses: Counter[int] = Counter()  # how often its actor was lost under a client
        self._failed: dict[int, str] = {}
        self._lost, self._last_play = 0, time.perf_counter()
        self._hand_out()

    def finish(self) -> Outcome:
        """Wait for every client, and have done again what lost actors had done."""
        started, evaluation = time.perf_counter(), self._evaluations[-1]
        while self._totals.left or self._to_do():
            if self._totals.few and not self._to_do():
                self._again(self._totals.take_stored(self._crew.client_timeout_s))
            else:
                self._wait()
            self._hand_out()
        layers = len(next(iter(self._reports.values())).measured.flops_sparse) if self._reports else 1
        for client, reason in self._failed.items():
            samples = int(self._crew.sizes[client])
            self._reports[client] = ClientReport.failed(client, samples, layers, reason)
        reports = [self._reports[client] for client in sorted(self._reports)]
        worked = max(started, self._last_play)
        seconds = {"work": worked - started, "merge": time.perf_counter() - worked}
        total, pending = self._totals.total, not evaluation.done
        return Outcome(total, reports, lambda: self._evaluated(evaluation), pending, seconds, self._lost)

    def _evaluated(self, evaluation: Evaluation) -> Evaluated:
        """Wait for an evaluation, perhaps while the next round's clients are played."""
        while not evaluation.done:
            self._wait()
            self._hand_out()
        return evaluation.results

    def _to_do(self) -> bool:
        """Whether something is still to be played, handed over by its actor, or combined."""
        working = any(self._queues.methods[method] for method in _TO_THE_TOTAL)
        return working or any(self._waiting.values()) or any(self._totals.played)

    # ---------------------------------------------------------------------------------- handing out

    def _hand_out(self) -> None:
        """Give the live actors with room their next calls.

        What is left of the last round's evaluation comes first, then clients, then totals, and the small
        evaluation chunks come last, which keeps the actors level at the end and leaves them at work while
        totals travel and the driver takes its step.
        """
        now, queues = time.monotonic(), self._queues
        for actor in self._pool.down:
            if not queues.count[actor] and now >= self._probe_at.get(actor, 0.0):
                self._call(actor, "ready")
        # Whoever is expected to be done first takes the next work. If it has no room, that work waits for
        # it: only an idle actor may take it, not one that would come to it later.
        ends, room = queues.ends(now), queues.count < CALLS_IN_FLIGHT
        alive = np.ones(len(ends), np.bool_)
        alive[list(self._pool.down)] = False
        full: dict[str, float] = {}  # by kind: when the first of those without room is done
        for actor in np.flatnonzero(alive & ~room).tolist():
            kind = self._pool.kinds[actor]
            full[kind] = min(full.get(kind, np.inf), ends[actor])
        nodes = self._totals.nodes
        playing = self._playing() if nodes else set()
        if not any(self._waiting.values()) and not any(one.waiting for one in self._evaluations):
            # Totals are all that there is to hand on.
            folded = np.fromiter(map(bool, self._totals.played), np.bool_, len(ends)) | (queues.playing > 0)
            room &= (folded & (queues.collecting == 0)) | [node in nodes for node in self._pool.nodes]
        first = [(ends[a], queues.count[a], a) for a in np.flatnonzero(alive & room).tolist()]
        heapq.heapify(first)
        while first:
            end, _, actor = heapq.heappop(first)
            count, kind = queues.count[actor], self._pool.kinds[actor]
            if not self._give(actor, playing, work=not count or not full.get(kind, np.inf) < end):
                continue
            end = queues.ends(now)[actor]
            if queues.count[actor] < CALLS_IN_FLIGHT:
                heapq.heappush(first, (end, queues.count[actor], actor))
            else:
                full[kind] = min(full.get(kind, np.inf), end)

    def _give(self, actor: int, playing: set[str], *, work: bool) -> bool:
        """Start the actor's next call, if there is one; without ``work`` only totals are handed on."""
        *late, current = self._evaluations
        kind = self._kind_to_play(actor)
        due = self._totals.uncollected_s[actor] >= COLLECT_AFTER_S
        queues = self._queues
        left = next((one for one in late if one.waiting), None)
        if left is not None:
            if work:
                self._evaluate(actor, left)
        elif kind is not None and not due:
            if work:
                taken, last = self._take(kind, actor)
                self._call(actor, "play", taken, collects=last)
        elif (self._totals.played[actor] or queues.playing[actor]) and not queues.collecting[actor]:
            self._call(actor, "collect")
            return True
        elif not queues.count[actor] and (parcels := self._totals.to_combine(actor, playing)):
            self._call(actor, "combine", parcels)
            return True
        elif current.waiting and work:
            self._evaluate(actor, current)
        else:
            return False
        return work

    def _playing(self) -> set[str]:
        """Nodes from which more totals will come."""
        if any(self._waiting.values()):
            return set(self._pool.nodes)
        busy = self._queues.playing + self._queues.collecting > 0
        played = self._totals.played
        return {node for actor, node in enumerate(self._pool.nodes) if busy[actor] or played[actor]}

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

    def _take(self, kind: str, actor: int) -> tuple[list[Assignment], bool]:
        """The actor's next clients, and whether they are its last of the round, as far as can be told."""
        waiting, pace = self._waiting[kind], self._crew.costs.pace(actor)
        share = 0.0 if pace is None else self._share(kind, actor, pace)
        room = 0.0 if pace is None else call_seconds(share) / pace
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
        return taken, not any(self._waiting.values()) or 0.0 < share <= call_seconds(share)

    def _share(self, kind: str, actor: int, pace: float) -> float:
        """Seconds of a kind's waiting work that are the actor's if all actors are to end at the same time."""
        now = time.monotonic()
        held = self._queues.ends(now) - now
        fellows = self._kind_masks[kind].copy()
        fellows[list(self._pool.down)] = False
        fellows[actor] = True
        waiting = self._work[kind] * pace
        return float((held[fellows].sum() + waiting) / np.count_nonzero(fellows) - held[actor])

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
        self,
        actor: int,
        method: str,
        work: Sequence[Any] = (),
        evaluation: Evaluation | None = None,
        *,
        collects: bool = False,
    ) -> None:
        costs, seconds, patience = self._crew.costs, 0.0, self._crew.client_timeout_s
        arguments: tuple[Any, ...] = ()
        if method == "play":
            arguments = (self._broadcast, work, collects, self._totals.stores)
            seconds = sum(self._work_of(assignment) for assignment in work) * (costs.pace(actor) or 0.0)
        elif method == "collect":
            # While clients wait nobody combines; what is collected then is the driver's.
            stores = self._totals.stores and not any(self._waiting.values())
            arguments, collects = (self._number, stores), True
        elif method == "combine":
            arguments = ([parcel.stored for parcel in work],)
        elif evaluation is not None:
            arguments = (evaluation.broadcast, work)
            seconds = sum(costs.chunk_seconds(chunk) for chunk in work)
            patience *= len(work)
        reference = self._pool.call(actor, method, *arguments)
        limit = patience + PATIENCE * seconds
        call = Call(actor, method, work, evaluation, seconds, limit, collects)
        self._queues.put(reference, call, time.monotonic())

    # ----------------------------------------------------------------------------------- taking in

    def _wait(self) -> None:
        now = time.monotonic()
        if self._pool.seconds_without() > ALL_DOWN_S:
            raise PlacementError(
                f"every actor died and none came back within {ALL_DOWN_S:g} s in round {self._number}; "
                "the checkpoints are kept: resume the run when the cluster has room again"
            )
        deadlines = self._queues.deadline.copy()
        deadlines[list(self._pool.down)] = np.inf  # a dead one may take its time
        patience = max(0.0, float(deadlines.min() - now))
        if self._pool.down or patience == np.inf:
            patience = min(patience, PROBE_EVERY_S)
        ready: list[Any] = []
        # An actor answers in the order in which it was asked.
        oldest = self._queues.oldest()
        if oldest:
            ready, _ = self._ray.wait(list(oldest), num_returns=1, timeout=patience)
        else:
            time.sleep(patience)
        if ready:
            self._take_in(oldest[ready[0]], ready[0])
            return
        for actor in np.flatnonzero(deadlines <= time.monotonic()).tolist():
            self._pool.kill(actor)
            waited = deadlines[actor] - self._queues.since[actor]
            self._lose(actor, f"did not answer within {waited:.0f} s")

    def _take_in(self, actor: int, reference: Any) -> None:
        call = self._queues.call(actor, reference)
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # A restarted host that cannot be built is tried again.
            if isinstance(error.cause, NotBegunError):
                return self._lose(actor, None)
            if call.method != "ready":
                raise error.cause if isinstance(error.cause, Exception) else error from None
            return self._lose(actor, str(error))
        except self._ray.exceptions.RayError as error:
            return self._lose(actor, f"died ({str(error).splitlines()[0]})")
        self._queues.take(actor, reference, time.monotonic())
        if call.method == "play":
            reports, total = result
            self._reports |= {report.client: report for report in reports}
            self._totals.folded(actor, reports)
            self._crew.costs.learn(actor, reports)
            self._last_play = time.perf_counter()
            if call.collects:
                self._again(self._totals.take_in(actor, total))
        elif call.method == "collect":
            self._again(self._totals.take_in(actor, result))
        elif call.method == "combine":
            self._again(self._totals.combined(actor, call.work, result))
        elif call.evaluation is not None:
            call.evaluation.running -= len(call.work)
            call.evaluation.results += result
            self._crew.costs.learn_chunks(chunk for chunk, _ in result)
        else:
            self._pool.back(actor, result)

    # ------------------------------------------------------------------------------------- losses

    def _lose(self, actor: int, why: str | None) -> None:
        """An actor is dead, of nothing that it held where ``why`` is None: put all of that back."""
        self._lost += self._pool.lost(actor)
        self._probe_at[actor] = time.monotonic() + PROBE_EVERY_S
        for place, call in enumerate(self._queues.drop(actor)):
            if call.evaluation is not None:
                call.evaluation.running -= len(call.work)
            if call.method == "combine":
                self._again(self._totals.combined(actor, call.work, None))
                continue
            for work in call.work:
                self._put_back(work, call.evaluation, why if place == 0 else None)
        self._again(self._totals.lose(actor))

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

    def _again(self, clients: Iterable[int]) -> None:
        """Have clients played again whose updates were lost."""
        for client in sorted(clients):
            del self._reports[client]
            self._wait_for(self._tasks[client])

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
