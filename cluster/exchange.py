"""What the driver and those who play clients exchange, beside the model itself (``Broadcast``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from algorithms import Grid, Instructions
from cluster.configuration.config import Config
from cluster.measured import Measured
from cluster.references import UserError
from cluster.simulation.clock import Device
from cluster.transport.downlink import Part
from cluster.transport.masking import KeyRound
from cluster.workload.objectives import Sums
from cluster.workload.partition import Partition


@dataclass(frozen=True)
class HostSetup:
    """What a host needs to play any client; made once by the driver, read by every host without copying.

    Attributes:
        config: The configuration.
        folder: Folder of the decoded data set on this node.
        partition: Who holds which rows of the training split.
        validation: Rows held out of the training split.
        shifted: Who owns which rows after the first, second ... shift of the data.
        attacked: Rows of each split that the model is attacked on.
        own: The rows that each client is judged by, where it is by rows of its own.
        base: What is frozen below an adapter, float32[frozen], one for all hosts of a node; else None.
    """

    config: Config
    folder: Path
    partition: Partition
    validation: np.ndarray
    shifted: tuple[Partition, ...] = ()
    attacked: Mapping[str, np.ndarray] = field(default_factory=dict)
    own: Partition | None = None
    base: np.ndarray | None = None


@dataclass(frozen=True)
class Assignment:
    """One client to play.

    Attributes:
        client: Index of the client.
        sparsity: Its target sparsity.
        device: What the simulated time of its visit follows from.
        downlink_bytes: Bytes that it was sent.
        deadline: Simulated seconds after which its update is late and left out.
        fold_before: Simulated seconds before which its update surely counts, so that it is folded here; a
            later one goes to the driver, which knows when the others arrived.
        kept: What it keeps from its last visit, float32 arrays by name.
        part: Which of the broadcast's parts it was sent; None for the whole model.
        waits_s: Simulated seconds before its visit, in which keys are exchanged.
    """

    client: int
    sparsity: float
    device: Device
    downlink_bytes: int
    deadline: float = math.inf
    fold_before: float = math.inf
    kept: Mapping[str, np.ndarray] = field(default_factory=dict)
    part: int | None = None
    waits_s: float = 0.0


@dataclass(frozen=True)
class ClientReport:
    """What a host tells the driver of one visit, beside the total.

    ``visit_s`` is simulated, infinite where nothing arrived. ``late`` updates are left out; ``folded`` ones
    are in the host's total; a ``message`` is one that the driver decides about. A ``skipped`` client failed:
    it sent nothing, and ``refused`` says why. ``kept`` is what the client keeps for its next visit, and
    ``kept_if_late``, where it is not empty, what it keeps instead if its update is late. ``clamped`` counts
    values that it cut to the limit of the round's grid. ``joules`` are of its training and of what
    it sent; what it was sent is billed when it is, whether it answers or not.
    """

    client: int
    measured: Measured
    seconds: float
    phases: tuple[float, float, float, float]  # train, encode, decode, fold in seconds
    uplink_bytes: int
    uplink_nonzero_bytes: int
    upload_density: float
    refused: str | None
    visit_s: float = math.inf
    late: bool = False
    folded: bool = False
    message: bytes | None = None
    skipped: bool = False
    kept: Mapping[str, np.ndarray] = field(default_factory=dict)
    kept_if_late: Mapping[str, np.ndarray] = field(default_factory=dict)
    clamped: int = 0
    joules: float = 0.0

    @property
    def samples(self) -> int:
        """n_i."""
        return self.measured.samples

    @property
    def accepted(self) -> bool:
        """Whether the update is part of the round's total."""
        return self.refused is None and not self.late

    @classmethod
    def failed(cls, client: int, samples: int, layers: int, reason: str) -> ClientReport:
        """The report of a client that failed and was skipped: nothing trained, nothing sent."""
        return cls(
            client=client,
            measured=Measured.nothing(samples, layers),
            seconds=0.0,
            phases=(0.0, 0.0, 0.0, 0.0),
            uplink_bytes=0,
            uplink_nonzero_bytes=0,
            upload_density=0.0,
            refused=reason,
            skipped=True,
        )


@dataclass(frozen=True)
class EvaluationChunk:
    """Rows of a split to evaluate; chunks are fixed, so that sums do not depend on who computes them."""

    split: str  # "test", "val", "own" of a client, "group"; under attack "train" too
    start: int
    stop: int
    tier: str | None = None  # evaluate the model cut to this tier's budget
    client: int | None = None  # whose rows, or whose model; of "group" which one
    after: int | None = None  # the model after its local training (0), or adapted to so many rows a class
    attacked: bool = False  # evaluate under attack; the rows are places among those of HostSetup.attacked
    seconds: float = 0.0  # that the evaluation took


#: What an evaluation counted and added up on each chunk.
Evaluated = Sequence[tuple[EvaluationChunk, Sums]]


class ClientError(UserError):
    """A client's code raised; the message carries client, round, stage and the original traceback."""

    status = 1


class ActorLostError(ClientError):
    """The actors that played a client, or evaluated some rows, were lost one after the other."""

    passes = True


@dataclass(frozen=True)
class Broadcast:
    """What every actor gets for one round: one object in the store, arrays read without copying.

    Attributes:
        weights: w_t as the clients decode it, float32[size].
        exact: w_t as the server holds it, for evaluation; the same array unless the downlink is lossy.
        mask: The mask both sides hold, bool[prunable], or None.
        instructions: The method's instructions.
        lr: Learning rate of the round.
        limit: Largest magnitude an update may hold (see ``Grid``).
        samples: Samples of the whole cohort.
        bits: Bits of a word of the round's grid, or None (see ``Grid``).
        shared: Whether all clients send the mask, so that in a secure round nothing else travels.
        keys: What clients of a secure round know of each other once keys are exchanged.
        period: Number of shifts of the data so far, which tells who holds what.
        kept: What the clients keep that are evaluated after local training, by client and name.
        parts: The parts of the model that clients were sent who have no room for all of it.
        clip: What updates are cut to, so that totals are of their differences; None: they are not.
    """

    weights: np.ndarray
    exact: np.ndarray
    mask: np.ndarray | None
    instructions: Instructions
    lr: float
    limit: float
    samples: int
    period: int = 0
    kept: Mapping[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    parts: Sequence[Part] = ()
    bits: int | None = None
    clip: float | None = None
    shared: bool = False
    keys: KeyRound | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the model, its mask, its parts and what clients keep."""
        kept = (array for own in self.kept.values() for array in own.values())
        parts = (array for part in self.parts for array in (part.weights, part.held))
        arrays = {id(a): a for a in (self.weights, self.exact, self.mask, *parts, *kept) if a is not None}
        return sum(array.nbytes for array in arrays.values())

    @property
    def grid(self) -> Grid:
        """The round's grid."""
        return Grid(self.limit, self.samples, self.bits)

    def base(self, part: int | None) -> np.ndarray | None:
        """What the distance of an update is measured from, float32[size]: what was received, of which part.

        None where no model is sent.
        """
        if not self.instructions.sends_model:
            return None
        return self.weights if part is None else self.parts[part].weights

    def held(self, part: int | None) -> np.ndarray | None:
        """What both sides know of an update's support: the mask, or the part that the client holds."""
        own = None if part is None else self.parts[part].held
        return self.mask if own is None else own
