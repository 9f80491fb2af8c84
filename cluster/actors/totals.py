"""Where the updates are that were folded: with their actors, in the object stores, or with the driver.

The driver takes a few totals itself. Where there are more actors, each puts its total into its node's store
and says whose updates are in it; actors that have nothing left to play combine totals, those of their own
node first, and the driver takes what remains. Totals are exact whatever the grouping, so no bit of a result
depends on who combined what.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from algorithms.core.packing import merge, unpack
from cluster.exchange import ClientReport

#: Totals that the driver takes in one after the other.
DIRECT = 8

#: Totals that one call combines at most.
FAN = 8


@dataclass(frozen=True)
class Stored:
    """A total in the object store, as its actor tells of it.

    Attributes:
        reference: Where it is.
        clients: Whose updates are in it.
        node: Id of the node it is on.
    """

    reference: Any
    clients: tuple[int, ...]
    node: str


@dataclass(frozen=True, eq=False)
class Parcel:
    """A stored total and the actor without which it is lost."""

    stored: Stored
    actor: int


class Totals:
    """What a round has folded so far, and where it is.

    What is lost with an actor or in a store is named, to be played again.

    Args:
        ray: The module.
        nodes: Id of each actor's node; changed where an actor comes back elsewhere.

    Attributes:
        stores: Whether actors leave their totals in the store instead of sending them to the driver.
        total: What the driver has.
        played: Whom each actor has folded since it last handed over.
        uncollected_s: Seconds that went into that.
    """

    def __init__(self, ray: Any, nodes: list[str]) -> None:
        self._ray, self._nodes, self.stores = ray, nodes, len(nodes) > DIRECT
        self.begin()

    def begin(self) -> None:
        """A new round."""
        self.total: Any = None
        self.played: list[set[int]] = [set() for _ in self._nodes]
        self.uncollected_s = [0.0] * len(self._nodes)
        self._ready: dict[str, list[Parcel]] = {}  # by node: stored, and no call is combining them
        self._combining = 0  # calls, each of which will leave one more

    @property
    def few(self) -> bool:
        """Whether what is stored, and will be, is little enough for the driver."""
        return self._count() + self._combining <= DIRECT

    @property
    def nodes(self) -> Collection[str]:
        """Nodes whose stores hold something that no call is combining."""
        return self._ready.keys()

    @property
    def left(self) -> bool:
        """Whether there is anything that the driver does not have."""
        return bool(self._ready) or any(self.played)

    def folded(self, actor: int, reports: Sequence[ClientReport]) -> None:
        """Take note of what an actor has played."""
        # What was not folded needs no collecting, and cannot be lost any more.
        self.played[actor] |= {report.client for report in reports if report.folded}
        self.uncollected_s[actor] += sum(report.seconds for report in reports)

    def take_in(self, actor: int, total: Any) -> set[int]:
        """Take in what an actor hands over; returns who is to be played again."""
        if total is None or sorted(total.clients) != sorted(self.played[actor]):
            # The actor died and came back in between: what it had folded is gone, or was put back already.
            return self._forget(actor)
        self._forget(actor)
        if isinstance(total, Stored):
            self._store(total, actor)
        else:
            self._add(total)
        return set()

    def lose(self, actor: int) -> set[int]:
        """Forget what is lost with an actor; returns who is to be played again."""
        lost = [parcel for ready in self._ready.values() for parcel in ready if parcel.actor == actor]
        self._take_out(lost)
        return self._forget(actor) | clients_of(lost)

    def to_combine(self, actor: int, playing: Collection[str]) -> Sequence[Parcel]:
        """Take out what an idle actor should combine now; nothing where more is worth waiting for.

        Args:
            actor: The actor.
            playing: Nodes on which clients are played, or totals are still to be handed over.
        """
        node = self._nodes[actor]
        taken = self._ready.get(node, [])[:FAN]
        if not taken or (self.few and not playing):
            return ()
        if len(taken) < (FAN if node in playing else 2):
            # Between nodes: by whoever holds one of them, once there are enough or no more will come.
            if playing and self._count() < FAN + DIRECT:
                return ()
            others = (parcel for name, ready in self._ready.items() if name != node for parcel in ready)
            taken += islice(others, FAN - len(taken))
            if len(taken) < 2:
                return ()  # others are still being combined
        self._take_out(taken)
        self._combining += 1
        return taken

    def combined(self, actor: int, parcels: Sequence[Parcel], stored: Stored | None) -> set[int]:
        """Take note of what an actor combined, or that it did not; returns who is to be played again."""
        self._combining -= 1
        if stored is None:
            return clients_of(parcels)
        self._store(stored, actor)
        return set()

    def take_stored(self, patience_s: float) -> set[int]:
        """Take in all that is stored; returns who is to be played again.

        Args:
            patience_s: Seconds for one of them; its actor may be frozen, and then nobody hands it over.
        """
        ready, self._ready, again = self._ready, {}, set[int]()
        for parcel in chain.from_iterable(ready.values()):
            try:
                self._add(self._ray.get(parcel.stored.reference, timeout=patience_s))
            except (self._ray.exceptions.ObjectLostError, self._ray.exceptions.GetTimeoutError):
                again |= clients_of([parcel])
        return again

    def _count(self) -> int:
        return sum(map(len, self._ready.values()))

    def _store(self, stored: Stored, actor: int) -> None:
        self._ready.setdefault(stored.node, []).append(Parcel(stored, actor))

    def _take_out(self, parcels: Iterable[Parcel]) -> None:
        for parcel in parcels:
            ready = self._ready[parcel.stored.node]
            ready.remove(parcel)
            if not ready:
                del self._ready[parcel.stored.node]

    def _add(self, total: Any) -> None:
        if self.total is None:
            self.total = unpack(total)
        else:
            merge(self.total, total)

    def _forget(self, actor: int) -> set[int]:
        played, self.played[actor], self.uncollected_s[actor] = self.played[actor], set(), 0.0
        return played


def clients_of(parcels: Iterable[Parcel]) -> set[int]:
    """Whose updates are in some parcels."""
    return {client for parcel in parcels for client in parcel.stored.clients}
