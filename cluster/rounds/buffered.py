"""Buffered asynchronous rounds: the server steps whenever enough updates are in, however old their base.

FedBuff: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv
2106.06639.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from algorithms import Algorithm, Grid, ServerState
from cluster import seeding
from cluster.exchange import Assignment, ClientReport, EvaluationChunk
from cluster.federation import Federation
from cluster.rounds.engine import Engine, Outcome
from cluster.rounds.schedule import IDLE_S, Round, Schedule, Snapshot
from cluster.simulation.clock import Clock
from cluster.simulation.samplers import SamplerError
from cluster.transport.downlink import Parcel

#: Weights of updates are whole numbers of this share of a sample, so that totals stay exact.
_WEIGHT_UNIT = 1024

#: Draws after which a free place stays empty until the next event, because everyone drawn is busy or away.
_DRAWS = 1000


@dataclass
class Flight:
    """A client on its way.

    Attributes:
        sequence: Number of its dispatch, which decides ties.
        version: Rounds completed when it got the model.
        start: Simulated seconds of its dispatch.
        assignment: Its visit.
        bound: Simulated seconds before which it cannot be back.
        lost: Whether it drops out; its place is free again at ``bound``.
        report: What came of the visit; None until it is played.
    """

    sequence: int
    version: int
    start: float
    assignment: Assignment
    bound: float
    lost: bool
    report: ClientReport | None = None


@dataclass
class _Step:
    """One server step in the making.

    Attributes:
        state: The server's state before it.
        parcel: The model of ``state``.
        chunks: What that model is still to be evaluated on.
        meanwhile: The book-keeping of the last step, once the first work is handed out.
        asked: Who was sent the model of ``state``.
        arrived: Who came back.
        outcome: What became of it.
        unavailable: Clients that were drawn and away.
        lost: Clients that dropped out.
    """

    state: ServerState
    parcel: Parcel
    chunks: Sequence[EvaluationChunk]
    meanwhile: Callable[[], None]
    asked: list[Assignment] = field(default_factory=list)
    arrived: list[Flight] = field(default_factory=list)
    outcome: Outcome = field(default_factory=lambda: Outcome(None, []))
    unavailable: int = 0
    lost: int = 0


class Buffered(Schedule):
    """``concurrency`` clients train at a time; ``buffer`` updates make a server step, a round.

    An update that is s steps behind weighs n_i (1 + s)^-a. What counts of it is its difference from the model
    that the client got: a method that sends weights has them moved by what the server has moved since, which
    for s = 0 is nothing. A client is asked once a version at most.

    Visits are played when they are needed: the next event is final when nobody who is not yet played can
    precede it, as the download, the latency and the dense FLOPs, known at the dispatch, take their time. So
    the order of events is that of the simulated clock alone, whoever computes what when.
    """

    def __init__(self, federation: Federation, engine: Engine, method: Algorithm) -> None:
        super().__init__(federation, engine, method)
        self._size, self._places = self.timing.size(self.config), self.timing.places(self.config)
        self._keeps = bool(method.keeps(federation.layout))
        self._sequence = 0
        self._flights: dict[int, Flight] = {}  # by sequence
        self._parcels: dict[int, Parcel] = {}  # by version
        self.clock: Clock[int] = Clock()  # arrivals of played flights, and of lost ones

    def round(
        self, state: ServerState, chunks: Sequence[EvaluationChunk], meanwhile: Callable[[], None]
    ) -> Round:
        """See :class:`Schedule`."""
        step = self._step = _Step(state, self.sender.parcel(state), chunks, meanwhile)
        self._parcels[state.round] = step.parcel
        clock, started, prepared = self.clock, self.clock.now, time.perf_counter()
        while sum(not self._too_old(flight) for flight in step.arrived) < self._size:
            self._fill()
            if not self._flights:
                self._wait()
                continue
            while not self._next_is_final():
                self._play()
            flight = self._flights.pop(clock.advance())
            if flight.lost:
                step.lost += 1
            else:
                step.arrived.append(flight)
        self._evaluate()
        outcome = self._total()
        aloft = {flight.version for flight in self._flights.values()}
        self._parcels = {v: parcel for v, parcel in self._parcels.items() if v in aloft}
        staleness = [state.round - flight.version for flight in step.arrived]
        metrics = {
            "time/simulated_s": clock.now,
            "time/round_simulated_s": clock.now - started,
            "clients/unavailable": step.unavailable,
            "clients/stragglers": 0,
            "clients/dropped": step.lost,
            "clients/late": sum(report.late for report in outcome.reports),
            "clients/in_flight": len(self._flights),
            "clients/staleness": float(np.mean(staleness)),
            "clients/staleness_max": max(staleness),
        }
        return Round(outcome, self.downlink(step.asked, step.parcel), metrics, prepared)

    def snapshot(self) -> Snapshot:
        """See :class:`Schedule`; what was played already is played again after a restart."""
        flights = [
            (
                f.sequence,
                f.version,
                f.start,
                f.assignment.client,
                f.assignment.downlink_bytes,
                f.bound,
                f.lost,
            )
            for f in self._flights.values()
        ]
        bases = {version: parcel.state.weights for version, parcel in self._parcels.items()}
        return replace(super().snapshot(), flight=(self._sequence, flights), bases=bases)

    def restore(self, snapshot: Snapshot, state: ServerState) -> None:
        """See :class:`Schedule`."""
        super().restore(snapshot, state)
        self._sequence, flights = snapshot.flight
        for version, weights in snapshot.bases.items():
            self._parcels[version] = self.sender.parcel(replace(state, round=version, weights=weights))
        for sequence, version, start, client, downlink_bytes, bound, lost in flights:
            sparsity = self.devices.sparsity(client, self.method.sparsity, version + 1)
            parcel, device = self._parcels[version], self.devices.of([client], version + 1)[0]
            part = self.part(parcel, self.instruct(parcel.state), sequence, sparsity)
            own = self.kept.of(client)
            assignment = Assignment(client, sparsity, device, downlink_bytes, kept=own, part=part)
            self._take_off(Flight(sequence, version, start, assignment, bound, lost))

    def population_weight(self, round_number: int) -> int:
        """See :class:`Schedule`; in the unit of a step's weights."""
        return _WEIGHT_UNIT * super().population_weight(round_number)

    def _take_off(self, flight: Flight) -> None:
        # Updates go to the driver, in the order of which they are folded.
        flight.assignment = replace(flight.assignment, fold_before=-math.inf)
        self._flights[flight.sequence] = flight
        if flight.lost:
            self.clock.schedule(flight.bound, flight.sequence, flight.sequence)

    # ------------------------------------------------------------------------------------ who is asked

    def _fill(self) -> None:
        """Dispatch clients with the current model until all places are taken, or nobody is to be had."""
        step = self._step
        while len(self._flights) < self._places:
            client = self._find()
            if client is None:
                return
            sequence, now = self._sequence, self.clock.now
            told = self.instruct(step.state)
            assignments, bounds = self.assignments(np.array([client]), step.parcel, told, sequence)
            self.sender.deliver([client], step.parcel)
            step.asked += assignments
            lost = bool(self.devices.drop_outs(np.array([client]), sequence)[0])
            bound = now + float(bounds[0])
            self._take_off(Flight(sequence, step.state.round, now, assignments[0], bound, lost))
            self._sequence += 1

    def _find(self) -> int | None:
        """A client that is available, on the ground and not yet asked on this version."""
        step = self._step
        now = self.clock.now
        blocked = {flight.assignment.client for flight in self._flights.values()}
        blocked |= self._met()
        if len(blocked) == self.config.population:
            return None
        rng = seeding.generator(self.config.seed, "cohort", self._sequence, int(now))
        for _ in range(_DRAWS):
            for client in self.draw(1, step.state.round + 1, rng).tolist():
                if client in blocked:
                    continue
                if self.devices.available(np.array([client]), now)[0]:
                    return int(client)
                step.unavailable += 1
        return None

    def _met(self) -> set[int]:
        """Clients that are not asked again in this step."""
        asked = {assignment.client for assignment in self._step.asked}
        if not self._keeps:
            return asked
        # Whether what one sent is refused, hence what it keeps, is known once the step is made.
        return asked | {flight.assignment.client for flight in self._step.arrived}

    def _wait(self) -> None:
        """Nobody is in flight and nobody could be asked: try again later."""
        step = self._step
        if len(self._met()) == self.config.population:
            raise SamplerError(
                f"all {len(step.asked)} clients were asked in round {step.state.round + 1} and "
                f"{len(step.arrived)} answered, of {self._size} that a server step needs; "
                "lower schedule.buffer or the tiers' dropout"
            )
        self.clock.now += IDLE_S

    # -------------------------------------------------------------------------------- playing and folding

    def _pending(self) -> list[Flight]:
        return [f for f in self._flights.values() if f.report is None and not f.lost]

    def _next_is_final(self) -> bool:
        """Whether nobody whose arrival is not yet known can precede the next event."""
        clock = self.clock
        return all(clock.next_event() < (flight.bound, flight.sequence) for flight in self._pending())

    def _play(self) -> None:
        """Play everyone whose arrival is not yet known, version after version."""
        step = self._step
        pending = self._pending()
        for version in sorted({flight.version for flight in pending}):
            flights = [flight for flight in pending if flight.version == version]
            chunks = step.chunks if version == step.state.round else []
            reports = {
                r.client: r for r in self._run(version, [f.assignment for f in flights], chunks).reports
            }
            for flight in flights:
                report = reports[flight.assignment.client]
                flight.report = report
                # A client that failed and was skipped is back when it could have been.
                arrival = flight.start + report.visit_s if report.visit_s < math.inf else flight.bound
                self.clock.schedule(arrival, flight.sequence, flight.sequence)

    def _run(self, version: int, assignments: list[Assignment], chunks: Sequence[EvaluationChunk]) -> Outcome:
        step = self._step
        parcel = self._parcels[version]
        instructions = self.instruct(parcel.state)
        clients = np.array([assignment.client for assignment in assignments], np.int64)
        broadcast = self.broadcast(parcel, instructions, clients, chunks)
        played = self.engine.run(broadcast, assignments, chunks, step.meanwhile)
        step.meanwhile = lambda: None
        outcome = step.outcome
        if chunks:
            step.chunks, outcome.evaluated, outcome.evaluating = [], played.evaluated, played.evaluating
        outcome.lost_actors += played.lost_actors
        for phase, seconds in played.seconds.items():
            outcome.seconds[phase] = outcome.seconds.get(phase, 0.0) + seconds
        return played

    def _evaluate(self) -> None:
        """What no visit of this round has taken along: evaluation, and the book-keeping of the last one."""
        step = self._step
        if step.chunks:
            self._run(step.state.round, [], step.chunks)
        step.meanwhile()

    def _too_old(self, flight: Flight) -> bool:
        limit: int | None = self.timing.max_staleness
        return limit is not None and self._step.state.round - flight.version > limit

    def _total(self) -> Outcome:
        """Fold what has arrived, in the order of arrival."""
        step = self._step
        state, outcome = step.state, step.outcome
        layout, exponent = self.federation.layout, self.timing.staleness_exponent
        weights = []
        for flight in step.arrived:
            assert flight.report is not None
            share = (1.0 + state.round - flight.version) ** -exponent
            weights.append(max(1, round(_WEIGHT_UNIT * self.config.weight(flight.report.samples) * share)))
        grid = Grid.for_round(step.parcel.exact, sum(weights))
        total = self.method.zero(grid, layout)
        for flight, weight in zip(step.arrived, weights, strict=True):
            report = flight.report
            assert report is not None
            late, refused = self._too_old(flight), report.refused
            if not late and report.message is not None:
                base, part = self._parcels[flight.version], flight.assignment.part
                sent = base.decoded if part is None else base.parts[part].weights
                held = None if part is None else base.parts[part].held
                mask, known = base.mask if held is None else held, self.known(base.decoded)
                refused = self.uplink.take(total, report.client, report.message, weight, sent, mask, known)
                if refused is None and not self.method.uploads_differences:
                    moved = self._moved_since(base.state.weights).numpy()
                    total.shift(moved if held is None else np.where(held, moved, np.float32(0)), weight)
            outcome.reports.append(replace(report, late=late, refused=refused, message=None))
        outcome.reports[:] = self.kept.commit(state.round + 1, outcome.reports)
        outcome.total = total if any(report.accepted for report in outcome.reports) else None
        return outcome

    def _moved_since(self, base: Tensor) -> Tensor:
        """What the server has moved the trained parameters by since ``base``, float32[trained]."""
        trained = self.federation.layout.trained_size
        return self._step.state.weights[:trained] - base[:trained]
