"""Placement: which actors a cluster holds, and which clients each gets next. Results never depend on it.

Plain functions of plain values; ``actor_pool`` and ``ray_round`` act on what they say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import numpy as np

from cluster.configuration.config import Config
from cluster.exchange import Assignment, ClientReport, EvaluationChunk

#: Room for rounding when resource amounts are compared.
_EPSILON = 1e-9

#: Clients whose own cost is remembered; beyond, those first met are forgotten.
_CLIENTS_REMEMBERED = 100_000

#: Seconds that one call to an actor may take by what was learned, so that a death loses little.
CALL_S = 20.0

#: Seconds below which it is not made shorter: handing it out and taking it in costs milliseconds of CPU.
SHORT_CALL_S = 0.2

#: Seconds below which a visit tells nothing of its client: its actor may have waited for a core as long.
SLICE_S = 0.02


# ------------------------------------------------------------------------------------------------ actors


@dataclass(frozen=True)
class ActorKind:
    """Actors that are alike.

    Attributes:
        name: The tier whose clients they play; empty for all clients whose tier asks for nothing.
        cpus: CPUs of one actor.
        gpus: GPUs of one actor: a share of one, or whole ones.
        label: Labels that an actor's node must carry.
        share: Share of the clients that they play.
    """

    name: str
    cpus: float
    gpus: float = 0.0
    label: Mapping[str, str] = field(default_factory=dict)
    share: float = 1.0

    @property
    def actors_a_gpu(self) -> int:
        """Actors on one GPU; a share never spans two."""
        return int(1 / self.gpus + _EPSILON) if 0 < self.gpus < 1 else 1


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has."""

    cpus: float
    gpus: float = 0.0
    label: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """What is reserved in one piece: an actor, or all actors of one GPU.

    Attributes:
        kind: The kind of its actors.
        actors: How many they are.
        whole: The GPU is reserved whole, also where the actors' shares leave something of it.
    """

    kind: ActorKind
    actors: int
    whole: bool = False

    @property
    def resources(self) -> dict[str, float]:
        """CPUs and GPUs, as Ray writes them."""
        gpus = float(ceil(self.kind.gpus)) if self.whole else self.kind.gpus * self.actors
        return {"CPU": self.kind.cpus * self.actors} | ({"GPU": round(gpus, 4)} if gpus else {})


def kinds_of(config: Config) -> list[ActorKind]:
    """A kind for each tier that asks for one, and last the common kind, unless every tier has its own."""
    common = ActorKind("", config.cpus_per_actor, config.gpus_per_actor, config.label)
    own = [
        ActorKind(
            name,
            common.cpus if tier.cpus is None else tier.cpus,
            common.gpus if tier.gpus is None else tier.gpus,
            common.label if tier.label is None else tier.label,
            max(tier.share, _EPSILON),
        )
        for name, tier in config.devices.tiers.items()
        if tier.own_kind
    ]
    rest = 1.0 - sum(kind.share for kind in own)
    return own if own and len(own) == len(config.devices.tiers) else [*own, replace(common, share=rest)]


def bundles(kinds: Sequence[ActorKind], nodes: Sequence[Node], actors: int | None, most: int) -> list[Bundle]:
    """What to reserve: actors on every GPU and core share of every node, or as many as are asked for.

    Kinds get actors by their share of the clients, at least one each; a GPU serves one kind. Where as many
    actors as fit are wanted they are spread over the GPUs, each reserved whole: left to itself, Ray fills one
    GPU of a node first and leaves another idle. A number that was asked for fills a GPU before it begins the
    next, and what is left stays free for others. What has no room is listed all the same: waiting for it ends
    in an error by name, or a new node brings it.

    Args:
        kinds: The kinds.
        nodes: The cluster's nodes.
        actors: Actors in all; None for as many as fit.
        most: As many as fit, but no more than this.
    """
    spread, wanted = actors is None, max(len(kinds), most if actors is None else actors)
    rooms, counts, open_kinds = [_Room(node) for node in nodes], [0] * len(kinds), set(range(len(kinds)))
    while open_kinds and sum(counts) < wanted:
        # Those without an actor first, then the highest quotient (D'Hondt).
        index = min(open_kinds, key=lambda k: (counts[k] > 0, (counts[k] + 1) / kinds[k].share, k))
        choices = [choice for room in rooms for choice in room.choices(kinds[index])]
        if not choices:
            open_kinds.remove(index)
            continue
        (min if spread else max)(choices, key=lambda choice: choice.actors).add()
        counts[index] += 1
    found = [
        Bundle(part.kind, part.actors, whole=spread or part.actors == part.kind.actors_a_gpu)
        for room in rooms
        for part in room.parts
    ]
    roomless = {index: max(0, 1 - count) for index, count in enumerate(counts)}
    if not spread:
        roomless[0] += max(0, wanted - sum(counts) - sum(roomless.values()))
    return found + [Bundle(kinds[index], 1) for index, missing in roomless.items() for _ in range(missing)]


class _Room:
    """What is left of a node, and the parts it was given to."""

    def __init__(self, node: Node) -> None:
        self.cpus, self.gpus, self.label = node.cpus, int(node.gpus), node.label
        self.parts: list[_Part] = []

    def choices(self, kind: ActorKind) -> list[_Part]:
        """Where one more actor of the kind could go: GPUs it has begun, and a new part."""
        if self.cpus + _EPSILON < kind.cpus or not kind.label.items() <= self.label.items():
            return []
        begun = [p for p in self.parts if p.kind == kind and p.actors < kind.actors_a_gpu]
        return begun + ([_Part(kind, self)] if self.gpus >= kind.gpus else [])


@dataclass
class _Part:
    """A bundle in the making."""

    kind: ActorKind
    room: _Room
    actors: int = 0

    def add(self) -> None:
        if not self.actors:
            self.room.parts.append(self)
            self.room.gpus -= ceil(self.kind.gpus)
        self.room.cpus -= self.kind.cpus
        self.actors += 1


# ----------------------------------------------------------------------------------------------- clients


class CostModel:
    """Expected seconds of a client on an actor: its samples, its own factor, and the actor's pace.

    Both are learned from what visits really cost, each taking its part of the error, so that a slow machine
    is not mistaken for a costly client.
    """

    def __init__(self) -> None:
        self._factors: dict[int, float] = {}  # client -> cost of one of its samples, in average samples
        self._paces: dict[int, float] = {}  # actor -> seconds of an average sample
        # Whether an evaluation chunk trains a client, and is attacked -> its seconds.
        self._chunks: dict[tuple[bool, bool], float] = {}

    def work(self, client: int, samples: int) -> float:
        """Cost of one visit in average samples, whoever plays it."""
        return max(1, samples) * self._factors.get(client, 1.0)

    def pace(self, actor: int) -> float | None:
        """Seconds an average sample takes on the actor, or on all where it has not played; None at first."""
        if not self._paces:
            return None
        return self._paces.get(actor) or sum(self._paces.values()) / len(self._paces)

    def learn(self, actor: int, reports: Iterable[ClientReport]) -> None:
        """Take in what visits really cost; a client that failed tells nothing."""
        for report in reports:
            if report.seconds <= 0:
                continue
            work = self.work(report.client, report.samples)
            pace = self.pace(actor)
            if pace is None:
                self._paces[actor] = report.seconds / work
                continue
            surprise, average = report.seconds / (pace * work), pace * max(1, report.samples)
            short = max(abs(report.seconds - average), report.seconds) < SLICE_S
            told = min(1.0, average / SLICE_S) if short else 1.0  # of the actor, the shorter the less
            self._paces[actor] = pace * surprise ** (0.25 * told)
            if short:
                self._factors.pop(report.client, None)
                continue
            self._factors[report.client] = self._factors.pop(report.client, 1.0) * surprise**0.5
            if len(self._factors) > _CLIENTS_REMEMBERED:
                del self._factors[next(iter(self._factors))]

    def chunk_seconds(self, chunk: EvaluationChunk) -> float:
        """Seconds that a chunk of the evaluation takes; 0 at first."""
        return self._chunks.get((chunk.after is not None, chunk.attacked), 0.0)

    def learn_chunks(self, chunks: Iterable[EvaluationChunk]) -> None:
        """Take in what chunks really cost."""
        for chunk in chunks:
            kind = (chunk.after is not None, chunk.attacked)
            self._chunks[kind] = (self._chunks.get(kind, chunk.seconds) + chunk.seconds) / 2


def longest_first(assignments: Sequence[Assignment], sizes: np.ndarray, costs: CostModel) -> list[Assignment]:
    """The order in which clients are handed out; ties by index."""
    return sorted(
        assignments,
        key=lambda assignment: (
            -costs.work(assignment.client, int(sizes[assignment.client])),
            assignment.client,
        ),
    )


def call_seconds(share: float) -> float:
    """Seconds of work for an actor's next call (guided self-scheduling).

    Large first calls keep them few, small ones at the end keep the actors level; ``CALL_S`` bounds what is
    lost when an actor dies, ``SHORT_CALL_S`` what calls cost.

    Args:
        share: Seconds of what waits that the actor would play if all were done at the same time.
    """
    return min(max(share / 3, min(share, SHORT_CALL_S)), CALL_S)
