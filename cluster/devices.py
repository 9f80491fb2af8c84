"""Devices: which tier a client's device is of, and what that tier asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cluster import seeding
from cluster.config import Config


@dataclass(frozen=True)
class Devices:
    """The population of devices, drawn from the configuration's seed alone.

    Attributes:
        config: The configuration.
    """

    config: Config

    @cached_property
    def tiers(self) -> np.ndarray:
        """Index of every client's tier in ``devices.tiers``, int8[clients]; shares are met to one client."""
        clients = self.config.partition.clients
        shares = [tier.share for tier in self.config.devices.tiers.values()]
        edges = np.rint(np.cumsum(shares) * clients).astype(int)
        tier_of_place = np.searchsorted(edges, np.arange(clients), side="right")
        order = seeding.generator(self.config.seed, "devices").permutation(clients)
        tiers = np.empty(clients, np.int8)
        tiers[order] = tier_of_place
        return tiers

    def sparsity(self, client: int, default: float) -> float:
        """The client's target sparsity: its tier's, or ``default`` where devices are all alike."""
        tiers = list(self.config.devices.tiers.values())
        return tiers[self.tiers[client]].sparsity if tiers else default
