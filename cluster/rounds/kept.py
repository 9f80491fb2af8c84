"""What clients keep between their visits, in the driver's memory: whoever plays a client is sent its own.

So an actor or a node that dies takes nothing with it, and any actor can play any client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from cluster.exchange import ClientReport
from cluster.records.kept_files import KeptState


class Kept:
    """The states of the clients that have any, by client.

    Args:
        late: Whether a late client, which has trained all the same, keeps what came of it.

    Attributes:
        states: A value: every commit makes a new mapping.
    """

    def __init__(self, *, late: bool = True) -> None:
        self._late = late
        self.states: Mapping[int, KeptState] = {}

    def of(self, client: int) -> Mapping[str, np.ndarray]:
        """What a client keeps; nothing before its first visit."""
        state = self.states.get(client)
        return state.arrays if state is not None else {}

    def commit(self, round_number: int, reports: Iterable[ClientReport]) -> list[ClientReport]:
        """Keep what a round's clients keep; returns their reports without it.

        A refused or failed client, or one that never answered, keeps what it kept before; so does a late one
        where the server holds the sum of what clients keep, so that the two go on agreeing.
        """
        changed: dict[int, KeptState] = {}
        rest = []
        for report in reports:
            if report.kept and (report.accepted or (report.late and self._late)):
                kept = report.kept_if_late if report.late and report.kept_if_late else report.kept
                # Copies: the arrays may lie in the object store, with those of others.
                arrays = {name: array.copy() for name, array in kept.items()}
                changed[report.client] = KeptState(round_number, arrays)
            rest.append(replace(report, kept={}, kept_if_late={}) if report.kept else report)
        if changed:
            self.states = {**self.states, **changed}
        return rest
