"""Schedules: whom the server asks, which updates it takes in, and when its round is over.

``Synchronous`` is here, ``Buffered`` in a file of its own; both run on the simulated clock over one engine.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from algorithms import Algorithm, Grid, Instructions, ServerState, Total
from cluster import seeding
from cluster.clients.client import wire_shape
from cluster.clients.folding import fold_update
from cluster.clients.local_training import Broadcast
from cluster.engine import Engine, Outcome
from cluster.exchange import EvaluationChunk, Task
from cluster.federation import Federation
from cluster.metrics import Downlink
from cluster.simulation.clock import Clock, first_arrivals
from cluster.simulation.devices import Devices
from cluster.simulation.samplers import Candidates, draw
from cluster.simulation.shift import period_of
from cluster.transport import wire
from cluster.transport.downlink import Parcel, Sender
from cluster.transport.holders import Holders

#: Simulated seconds after which the server asks again when nobody answers and there is no deadline.
IDLE_S = 60.0


@dataclass(frozen=True)
class Snapshot:
    """What a schedule remembers between rounds; a value that later rounds do not change.

    Attributes:
        simulated_s: Simulated seconds since the run began.
        held: Who holds the current mask.
        flight: The next dispatch's number and the clients in flight, plain JSON values (buffered).
        bases: Weights that they started from by version, float32[size] (buffered).
    """

    simulated_s: float = 0.0
    held: Holders = field(default_factory=Holders)
    flight: Any = None
    bases: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """What a round came to.

    Attributes:
        outcome: The engine's outcome, with the total of the accepted updates alone.
        downlink: What was sent.
        metrics: Simulated time and counts of clients, under the names that MLflow shows.
        prepared: When its work was handed out, as ``time.perf_counter`` tells.
    """

    outcome: Outcome
    downlink: Downlink
    metrics: dict[str, Any]
    prepared: float


class Schedule(ABC):
    """Runs rounds of one experiment on an engine.

    Args:
        federation: Data, partition and initial model.
        engine: Where clients are played.
        method: The method.
    """

    def __init__(self, federation: Federation, engine: Engine, method: Algorithm) -> None:
        self.federation, self.engine, self.method = federation, engine, method
        config = self.config = federation.config
        self.devices = Devices(config)
        self.shape = wire_shape(federation.layout)
        self.sender = Sender(self.shape, config.wire.downlink)
        self._sampler = config.build_sampler()
        self._sizes: dict[int, np.ndarray] = {}  # of the last period that was asked for
        self.clock: Clock[Any] = Clock()

    @abstractmethod
    def round(
        self, state: ServerState, chunks: Sequence[EvaluationChunk], meanwhile: Callable[[], None]
    ) -> Round:
        """Collect the updates of one server step.

        Args:
            state: The server's state before it.
            chunks: What to evaluate the model of ``state`` on.
            meanwhile: Called once the first work is handed out.
        """

    def snapshot(self) -> Snapshot:
        """What :meth:`restore` continues from after the rounds so far."""
        return Snapshot(self.clock.now, self.sender.held)

    def restore(self, snapshot: Snapshot, state: ServerState) -> None:
        """Continue from a checkpoint of ``state``."""
        self.clock, self.sender.held = Clock(snapshot.simulated_s), snapshot.held

    def evaluate(
        self, state: ServerState, chunks: Sequence[EvaluationChunk], meanwhile: Callable[[], None]
    ) -> Outcome:
        """Evaluate the model of ``state``, with nothing to train."""
        broadcast = self.broadcast(self.sender.parcel(state), self.instruct(state), 0)
        return self.engine.run(broadcast, [], chunks, meanwhile)

    # ------------------------------------------------------------------------------ what schedules share

    def instruct(self, state: ServerState) -> Instructions:
        """What the next round's clients are told."""
        return self.method.instruct(state, self.config.rounds, self.config.partition.clients)

    def sizes(self, round_number: int) -> np.ndarray:
        """Samples of every client in a round, int64[clients]."""
        period = period_of(self.config.shift, round_number)
        if period not in self._sizes:
            self._sizes = {period: self.federation.sizes_in(period)}
        return self._sizes[period]

    def draw(self, count: int, round_number: int, rng: np.random.Generator) -> np.ndarray:
        """Ask the sampler for clients, int64, ascending."""
        candidates = Candidates(
            self.sizes(round_number),
            lambda clients: self.devices.available(clients, self.clock.now),
            round_number,
            self.clock.now,
            self.devices.tiers,
        )
        return draw(self._sampler, rng, count, candidates)

    def broadcast(self, parcel: Parcel, instructions: Instructions, samples: int) -> Broadcast:
        """What every actor gets for clients with ``samples`` samples together."""
        return Broadcast(
            weights=parcel.received,
            exact=parcel.exact,
            mask=parcel.mask,
            instructions=instructions,
            lr=self.config.learning_rate(max(1, instructions.round)),
            limit=Grid.for_round(parcel.exact, samples).limit,
            samples=samples,
            period=period_of(self.config.shift, instructions.round),
        )

    def tasks(
        self, clients: np.ndarray, parcel: Parcel, instructions: Instructions
    ) -> tuple[list[Task], np.ndarray]:
        """The visits of some clients, and before when each cannot be over, float64[n] in seconds.

        Known before training are the download, the latency and the dense FLOPs; a device that exploits zeros
        may need none.
        """
        epochs = instructions.epochs or self.config.local.epochs
        default, spares = self.method.sparsity, self.config.devices.flops == "sparse"
        sizes, tasks, bounds = self.sizes(instructions.round), [], []
        for client, device in zip(clients.tolist(), self.devices.of(clients), strict=True):
            size = self.sender.bytes_for(client, parcel)
            samples = int(sizes[client]) * epochs
            bounds.append(device.duration(size, 0.0 if spares else self.federation.flops.dense(samples), 0))
            tasks.append(Task(client, self.devices.sparsity(client, default), device, size))
        return tasks, np.array(bounds)

    def downlink(self, sent: Iterable[Task], parcel: Parcel) -> Downlink:
        """What clients were sent, beside the paper's accounting and dense models."""
        sizes = [task.downlink_bytes for task in sent]
        return Downlink(
            sum(sizes),
            wire.nonzero_bytes(parcel.exact, self.shape) * len(sizes),
            wire.dense_bytes(self.shape) * len(sizes),
        )


class Synchronous(Schedule):
    """Rounds of one cohort: over-selection and a deadline leave out who comes too late.

    Of ``over_selection`` x cohort clients that are asked, the first cohort updates count. A device that is
    not available is not reached, one that drops out downloads the model and never answers, and one that
    cannot make the deadline even with an empty upload is not troubled at all. The round is over when the
    cohort is complete or nobody is left to wait for, else at the deadline; without one the server learns who
    is gone.

    Who is among the first is known when all are trained. What an actor can tell by itself it folds at once:
    an update that comes before all but ``cohort`` clients possibly can. The few others travel to the driver.
    """

    def round(
        self, state: ServerState, chunks: Sequence[EvaluationChunk], meanwhile: Callable[[], None]
    ) -> Round:
        """See :class:`Schedule`."""
        section, started = self.config.schedule, self.clock.now
        instructions = self.instruct(state)
        number, wanted = instructions.round, instructions.cohort or self.config.cohort
        rng = seeding.generator(self.config.seed, "cohort", number)
        asked = self.draw(math.ceil(wanted * section.over_selection - 1e-9), number, rng)
        reached = asked[self.devices.available(asked, started)]
        parcel = self.sender.parcel(state)
        tasks, bounds = self.tasks(reached, parcel, instructions)
        deadline = math.inf if section.deadline is None else section.deadline
        punctual = bounds <= deadline
        sent = [task for task, may in zip(tasks, punctual, strict=True) if may]
        clients = np.array([task.client for task in sent], np.int64)
        self.sender.deliver(clients, parcel)
        gone = self.devices.drop_outs(clients, number)
        bounds = np.sort(bounds[punctual][~gone])
        fold_before = float(bounds[wanted]) if len(bounds) > wanted else math.inf
        playing = [
            replace(task, deadline=deadline, fold_before=fold_before)
            for task, lost in zip(sent, gone, strict=True)
            if not lost
        ]
        samples = int(self.sizes(number)[clients[~gone]].sum())
        broadcast = self.broadcast(parcel, instructions, samples)
        prepared = time.perf_counter()
        outcome = self.engine.run(broadcast, playing, chunks, meanwhile)
        arrivals = {r.client: r.visit_s for r in outcome.reports if r.visit_s < math.inf}
        first = first_arrivals(((s, client) for client, s in arrivals.items()), wanted, deadline)
        self._settle(outcome, broadcast, set(first))
        self.clock.now = started + self._length(first, arrivals, wanted, len(sent))
        metrics = {
            "time/simulated_s": self.clock.now,
            "time/round_simulated_s": self.clock.now - started,
            "clients/unavailable": len(asked) - len(reached),
            "clients/stragglers": len(reached) - len(sent),
            "clients/dropped": int(gone.sum()),
            "clients/late": len(arrivals) - len(first),
        }
        return Round(outcome, self.downlink(sent, parcel), metrics, prepared)

    def _settle(self, outcome: Outcome, broadcast: Broadcast, first: set[int]) -> None:
        """Fold what actors left to decide; the rest of it is late."""
        total, layout = outcome.total, self.federation.layout
        for place, report in enumerate(outcome.reports):
            if report.client not in first:
                report = replace(report, late=report.refused is None, message=None)
            elif report.message is not None:
                total = total or Total.zero(
                    Grid(broadcast.limit, broadcast.samples), layout, masked=self.method.masked
                )
                message = wire.decode(report.message, self.shape, held=broadcast.mask)
                refused = fold_update(
                    total, broadcast, report.client, message, report.samples, layout, self.config
                )
                report = replace(report, refused=refused, message=None)
            outcome.reports[place] = report
        outcome.total = total if any(report.accepted for report in outcome.reports) else None

    def _length(self, first: list[int], arrivals: dict[int, float], wanted: int, sent: int) -> float:
        """Seconds until the server has no reason to wait any longer."""
        if first and len(first) in (wanted, sent):
            return arrivals[first[-1]]
        if self.config.schedule.deadline is not None:
            return self.config.schedule.deadline
        return arrivals[first[-1]] if first else IDLE_S


def make_schedule(federation: Federation, engine: Engine, method: Algorithm) -> Schedule:
    """The configured schedule."""
    from cluster.simulation.buffered import Buffered

    kinds = {"synchronous": Synchronous, "buffered": Buffered}
    return kinds[federation.config.schedule.name](federation, engine, method)
