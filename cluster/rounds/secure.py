"""Secure rounds: what keys, shares and recovery cost, and what becomes of a sum that nobody can take apart.

A round has four steps. Clients send two public keys (one for masks, one for the shares' encryption) and a
commitment, and receive everybody's keys; they deal their shares, which the server hands on encrypted; they
train and send; and those in the sum send the server a share of every client, of its key where it is gone,
else of its own mask's seed. The first two wait for all of them, the last for the first ``threshold``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from algorithms import Total
from cluster.configuration.config import Config
from cluster.exchange import Assignment, Broadcast, ClientReport
from cluster.references import UserError
from cluster.simulation.clock import Device
from cluster.transport.masking import KEY_BYTES, SHARE_BYTES, SHARES_MESSAGE_BYTES, KeyRound, Shares
from cluster.transport.secure_uplink import SealedTotal, SecureUplink

#: Bytes in which the server names a client of the sum.
_NUMBER_BYTES = 4

#: Measures of single updates, which the server does not see.
HIDDEN = (
    "masks/client_regrowth_before_cut",
    "masks/client_regrowth",
    "masks/client_regrowth_share",
    "masks/client_deactivation",
    "masks/client_cut",
)

_logger = logging.getLogger("sparsyfed.secure")


class StageError(UserError):
    """Too few clients answered in the stage before round 1, which a run cannot be without."""


@dataclass(frozen=True)
class SecureRound:
    """One round's keys, shares and costs.

    Attributes:
        number: The round.
        clients: Who exchanged keys, with their devices: all that were sent the model.
        threshold: How many of them it takes to unmask a sum.
        keys: What they agreed on; None where masks are only billed.
    """

    number: int
    clients: dict[int, Device]
    threshold: int
    keys: KeyRound | None

    @classmethod
    def of(cls, config: Config, number: int, sent: Sequence[Assignment]) -> SecureRound:
        """The round of those who are sent the model."""
        section, clients = config.privacy.secure, {one.client: one.device for one in sent}
        keys = KeyRound.of(config.seed, number, clients) if section.masks == "real" else None
        return cls(number, clients, section.threshold_of(len(clients)), keys)

    @cached_property
    def _steps(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Bytes up and down of a client in each of the two steps before it trains."""
        others = len(self.clients) - 1
        shares = others * SHARES_MESSAGE_BYTES
        return (3 * KEY_BYTES, others * 2 * KEY_BYTES), (shares, shares)

    @cached_property
    def setup_s(self) -> float:
        """Simulated seconds until everybody can mask: both steps wait for the slowest."""
        devices = self.clients.values()
        return sum(max((d.duration(down, 0, up) for d in devices), default=0.0) for up, down in self._steps)

    @cached_property
    def _share_bytes(self) -> int:
        """Bytes of the shares of all clients, one of each."""
        return len(self.clients) * SHARE_BYTES

    def recovery_s(self, summed: Sequence[int]) -> float:
        """Simulated seconds until ``threshold`` clients of the sum have sent their shares."""
        down = _NUMBER_BYTES * len(summed)
        waits = sorted(self.clients[client].duration(down, 0, self._share_bytes) for client in summed)
        return waits[self.threshold - 1] if len(waits) >= self.threshold else 0.0

    def bytes_up(self, summed: int) -> int:
        """Bytes of keys and shares that all clients send, so many of them in the sum."""
        before = sum(up for up, _ in self._steps) * len(self.clients)
        return before + summed * self._share_bytes

    def bytes_down(self, summed: int) -> int:
        """The same of what they are sent."""
        before = sum(down for _, down in self._steps) * len(self.clients)
        return before + summed * summed * _NUMBER_BYTES

    def open(self, sealed: SealedTotal | None, uplink: SecureUplink, broadcast: Broadcast) -> Total | None:
        """The round's total; None where fewer clients answered than it takes.

        Raises:
            StageError: It is the stage before round 1.
            WrongShare: What clients handed over does not fit what they had promised.
        """
        summed = [] if sealed is None else sealed.clients
        if sealed is None or len(summed) < self.threshold:
            lost = (
                f"{len(summed)} of the {len(self.clients)} clients that exchanged keys are in the sum, and "
                f"it takes {self.threshold} to unmask it (privacy.secure.threshold)"
            )
            if self.number < 1:
                raise StageError(f"the stage before round 1 is lost: {lost}")
            _logger.warning("round %d is lost: %s", self.number, lost)
            return None
        if self.keys is not None:
            self.keys.unmask(sealed.words, summed, Shares(self.keys, tuple(summed[: self.threshold])))
        return uplink.open(sealed, broadcast.mask, broadcast.grid, shared=broadcast.shared)

    def metrics(self, reports: Sequence[ClientReport], *, lost: bool) -> dict[str, Any]:
        """What a round's line says of it, and leaves out."""
        summed = sum(report.accepted for report in reports)
        return {
            "secure/uplink_bytes": self.bytes_up(summed),
            "secure/downlink_bytes": self.bytes_down(summed),
            "secure/recovered": 0 if lost else len(self.clients) - summed,
            "secure/lost": int(lost),
            **dict.fromkeys(HIDDEN),
        }
