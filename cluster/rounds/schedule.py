"""Schedules: whom the server asks, which updates it takes in, and when its round is over.

``Synchronous`` and ``Buffered`` have files of their own; both run on the simulated clock over one engine.
What is declared of each is in ``schedules``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from algorithms import Algorithm, Grid, Instructions, ServerState
from cluster.clients.uplinks import make_uplink
from cluster.exchange import Assignment, Broadcast, EvaluationChunk
from cluster.federation import Federation
from cluster.flops import held_shares
from cluster.records.kept_files import KeptState
from cluster.rounds.engine import Engine, Outcome
from cluster.rounds.kept import Kept
from cluster.rounds.metrics import Downlink
from cluster.simulation.clock import Clock
from cluster.simulation.devices import Devices
from cluster.simulation.samplers import Candidates, draw
from cluster.simulation.shift import period_of
from cluster.transport import wire
from cluster.transport.downlink import Holders, Parcel, Sender
from cluster.workload.inputs import from_read_only

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
        kept: What clients keep, by client.
        installed: Who holds the frozen base of an adapter.
    """

    simulated_s: float = 0.0
    held: Holders = field(default_factory=Holders)
    flight: Any = None
    bases: dict[int, Tensor] = field(default_factory=dict)
    kept: Mapping[int, KeptState] = field(default_factory=dict)
    installed: Holders = field(default_factory=Holders)


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
        self.timing = config.build_schedule()
        self.devices = Devices(config)
        self.uplink = make_uplink(config, federation.layout)
        self.sender = Sender(federation.layout, config.wire.downlink, federation.trained.base_bytes)
        self._sampler = config.build_sampler()
        self.varies: bool = getattr(self._sampler, "varies", False)
        self._sizes: dict[int, np.ndarray] = {}  # of the last period that was asked for
        self.clip = config.privacy.dp.clip  # of the next broadcast; the driver's to change
        self.clock: Clock[Any] = Clock()
        self.kept = Kept(late=not method.kept_is_summed)

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
        return Snapshot(
            self.clock.now, self.sender.held, kept=self.kept.states, installed=self.sender.installed
        )

    def restore(self, snapshot: Snapshot, state: ServerState) -> None:
        """Continue from a checkpoint of ``state``."""
        self.clock, self.sender.held = Clock(snapshot.simulated_s), snapshot.held
        self.kept.states, self.sender.installed = snapshot.kept, snapshot.installed

    def evaluate(
        self, state: ServerState, chunks: Sequence[EvaluationChunk], meanwhile: Callable[[], None]
    ) -> Outcome:
        """Evaluate the model of ``state``, with nothing to train."""
        nobody = np.empty(0, np.int64)
        broadcast = self.broadcast(self.sender.parcel(state), self.instruct(state), nobody, chunks)
        return self.engine.run(broadcast, [], chunks, meanwhile)

    # ------------------------------------------------------------------------------ what schedules share

    def instruct(self, state: ServerState) -> Instructions:
        """What the next round's clients are told."""
        return self.method.instruct(state, self.config.rounds, self.config.population)

    def sizes(self, round_number: int) -> np.ndarray:
        """Samples of every client that trains in a round, int64[population]."""
        # The model of the last round is evaluated on the way to one that is not planned.
        period = period_of(self.config.shift, min(round_number, self.config.rounds))
        if period not in self._sizes:
            self._sizes = {period: self.federation.sizes_in(period)[: self.config.population]}
        return self._sizes[period]

    def draw(self, count: int, round_number: int, rng: np.random.Generator) -> np.ndarray:
        """Ask the sampler for clients, int64, ascending."""
        candidates = Candidates(
            self.sizes(round_number),
            lambda clients: self.devices.available(clients, self.clock.now),
            round_number,
            self.clock.now,
            self.devices.tiers[: self.config.population],
        )
        return draw(self._sampler, rng, count, candidates)

    def population_weight(self, round_number: int) -> int:
        """What the updates of all clients together would weigh in a round."""
        sizes = self.sizes(round_number)
        return int(sizes.sum()) if self.config.weighting == "samples" else len(sizes)

    def broadcast(
        self,
        parcel: Parcel,
        instructions: Instructions,
        clients: np.ndarray,
        chunks: Sequence[EvaluationChunk],
    ) -> Broadcast:
        """What every actor gets.

        Args:
            parcel: The model.
            instructions: What clients are told.
            clients: Who is to train, int64[n].
            chunks: What the model is to be evaluated on.
        """
        config, sizes = self.config, self.sizes(instructions.round)[clients]
        samples = int(sizes.sum()) if self.config.weighting == "samples" else len(clients)
        kept = {c.client: own for c in chunks if c.client is not None and (own := self.kept.of(c.client))}
        return Broadcast(
            weights=parcel.decoded,
            exact=parcel.exact,
            mask=parcel.mask,
            instructions=instructions,
            lr=self.config.learning_rate(max(1, instructions.round)),
            limit=Grid.for_round(parcel.exact, samples, config.wire.bits).limit,
            samples=samples,
            bits=config.wire.bits,
            period=period_of(self.config.shift, instructions.round),
            kept=kept,
            parts=tuple(parcel.parts),
            clip=self.clip,
        )

    def assignments(
        self, clients: np.ndarray, parcel: Parcel, instructions: Instructions, place: int
    ) -> tuple[list[Assignment], np.ndarray]:
        """The visits of some clients, and before when each cannot be over, float64[n] in seconds.

        Known before training are the download, the latency and the passes that the method makes at least over
        the planned batches; a device that exploits zeros may need no FLOPs.

        Args:
            clients: Who is asked, int64[n].
            parcel: The model.
            instructions: What clients are told.
            place: How many clients were asked before the first of them.
        """
        local, flops = self.config.local, self.federation.flops
        default, spares = self.method.sparsity, self.config.devices.flops == "sparse"
        sizes, bounds = self.sizes(instructions.round), []
        assignments: list[Assignment] = []
        devices = self.devices.of(clients, instructions.round)
        for client, device in zip(clients.tolist(), devices, strict=True):
            sparsity, kept = self.devices.sparsity(client, default, instructions.round), self.kept.of(client)
            part = self.part(parcel, instructions, place + len(assignments), sparsity)
            size = self.sender.bytes_for(client, parcel, part)
            samples = instructions.local_samples(int(sizes[client]), local.batch_size, local.epochs)
            held = None if part is None else parcel.parts[part].held
            passes = flops if held is None else flops.of_part(held_shares(held, self.federation.layout))
            least = 0.0 if spares else self.method.least_passes * passes.dense(samples)
            bounds.append(device.duration(size, least, 0))
            assignments.append(Assignment(client, sparsity, device, size, kept=kept, part=part))
        return assignments, np.array(bounds)

    def uploading(self, visits: Sequence[Assignment]) -> list[Assignment]:
        """Visits of clients that upload in one round, each with its share of its cell's uplink."""
        clients = np.array([visit.client for visit in visits], np.int64)
        devices = self.devices.uploading(clients, [visit.device for visit in visits])
        return [
            visit if device is visit.device else replace(visit, device=device)
            for visit, device in zip(visits, devices, strict=True)
        ]

    def known(self, received: np.ndarray) -> np.ndarray | None:
        """What a message need not hold of an update of ``received``, float32[trained], or None."""
        known = self.method.known(from_read_only(received), self.federation.layout)
        return None if known is None else known.numpy()

    def part(self, parcel: Parcel, instructions: Instructions, place: int, sparsity: float) -> int | None:
        """Which part of a model a client is sent; see :meth:`algorithms.Algorithm.submodel`."""
        method, layout = self.method, self.federation.layout
        support = method.submodel(parcel.state.weights, instructions, place, 1.0 - sparsity, layout)
        if support is None or bool(support.all()):
            return None
        return parcel.part(support.numpy(), known=method.submodel_known, confined=method.confined)

    def downlink(self, sent: Iterable[Assignment], parcel: Parcel) -> Downlink:
        """What clients were sent, beside the paper's accounting and dense models."""
        sent = list(sent)
        whole = wire.nonzero_bytes(parcel.sent, parcel.shape)
        return Downlink(
            sum(assignment.downlink_bytes for assignment in sent),
            sum(whole if a.part is None else parcel.parts[a.part].nonzero_bytes for a in sent),
            wire.dense_bytes(parcel.shape) * len(sent),
            math.fsum(a.device.energy(a.downlink_bytes, 0.0, 0) for a in sent),
        )
