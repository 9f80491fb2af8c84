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

    Attributes:
        states: A value: every commit makes a new mapping.
    """

    def __init__(self) -> None:
        self.states: Mapping[int, KeptState] = {}

    def of(self, client: int) -> Mapping[str, np.ndarray]:
        """What a client keeps; nothing before its first visit."""
        state = self.states.get(client)
        return state.arrays if state is not None else {}

    def commit(self, round_number: int, reports: Iterable[ClientReport]) -> list[ClientReport]:
        """Keep what a round's clients keep; returns their reports without it.

        Where the update is no part of the model (late, refused, failed, never answered), neither is what
        came of the visit: the client keeps what it kept before, so that it and the server go on agreeing.
        """
        changed: dict[int, KeptState] = {}
        rest = []
        for report in reports:
            if report.kept and report.accepted:
                # Copies: the arrays may lie in the object store, with those of others.
                arrays = {name: array.copy() for name, array in report.kept.items()}
                changed[report.client] = KeptState(round_number, arrays)
            rest.append(replace(report, kept={}) if report.kept else report)
        if changed:
            self.states = {**self.states, **changed}
        return rest
