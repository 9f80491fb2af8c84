"""Which clients hold the current mask, so that they need not be sent it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Holders:
    """The clients that got one version of the mask; who holds an older one is forgotten, for it is sent anew.

    Eight bytes a holder, and none of the clients that never took part.

    Attributes:
        version: The mask's version (``ServerState.mask_version``); -1 before there was one.
        clients: int64, ascending.
    """

    version: int = -1
    clients: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def holds(self, client: int, version: int) -> bool:
        """Whether a client holds that version."""
        place = int(np.searchsorted(self.clients, client))
        return version == self.version and place < len(self.clients) and bool(self.clients[place] == client)

    def after(self, clients: Iterable[int], version: int) -> Holders:
        """The holders once clients got that version."""
        held = self.clients if version == self.version else self.clients[:0]
        return Holders(version, np.union1d(held, np.fromiter(clients, np.int64)))

    def dump(self) -> dict[str, Any]:
        """Plain JSON values, for a checkpoint."""
        return {"version": self.version, "clients": self.clients.tolist()}

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Holders:
        """What :meth:`dump` wrote."""
        return cls(int(stored["version"]), np.array(stored["clients"], np.int64))
