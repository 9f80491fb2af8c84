"""Devices: what a client's device is like, when it can be asked, and whether it answers.

Everything is a function of (seed, client) or (seed, client, time slot or round): nothing is stored but one
byte a client for its tier, and a device costs nothing until it is drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cluster import seeding
from cluster.configuration.config import Config
from cluster.configuration.device_sections import TierSection
from cluster.simulation.availability import Always, Availability
from cluster.simulation.clock import Device, DeviceError


@dataclass(frozen=True)
class Devices:
    """The population of devices, drawn from the configuration's seed alone.

    Attributes:
        config: The configuration.
    """

    config: Config

    @cached_property
    def kinds(self) -> list[TierSection]:
        """The tiers in the order of the configuration."""
        return list(self.config.devices.kinds.values())

    @cached_property
    def tiers(self) -> np.ndarray:
        """Index of every client's tier in ``kinds``, int8[clients]; shares are met to one client."""
        clients = self.config.partition.clients
        if len(self.kinds) == 1:
            return np.zeros(clients, np.int8)
        edges = np.rint(np.cumsum([tier.share for tier in self.kinds]) * clients).astype(int)
        tier_of_place = np.repeat(np.arange(len(edges), dtype=np.int8), np.diff(edges, prepend=0))
        order = seeding.generator(self.config.seed, "devices").permutation(clients)
        tiers = np.empty(clients, np.int8)
        tiers[order] = tier_of_place
        return tiers

    def of(self, clients: Sequence[int] | np.ndarray, round_number: int | None = None) -> list[Device]:
        """The devices of some clients: the figures of their tiers, spread by log-normal factors.

        Args:
            clients: Who, int64[n].
            round_number: The round that they are asked in, by whose ``jitter`` all figures move once more;
                None for what they are like over all rounds.
        """
        clients = np.asarray(clients, np.int64)
        tiers = [self.kinds[index] for index in self.tiers[clients]]
        devices = [Device.of(tier) for tier in tiers]
        devices = self._varied(devices, [tier.spread for tier in tiers], "devices", 1, clients)
        if round_number is None or not any(tier.jitter for tier in self.kinds):
            return devices
        return self._varied(devices, [tier.jitter for tier in tiers], "jitter", 2 * round_number, clients)

    def _varied(
        self,
        devices: list[Device],
        sigmas: list[float],
        purpose: seeding.Purpose,
        step: int,
        clients: np.ndarray,
    ) -> list[Device]:
        """Devices with log-normal factors about 1: one of compute, one of both directions of the network."""
        radii, angles = (
            seeding.uniform(self.config.seed, purpose, own, clients).tolist() for own in (step, step + 1)
        )
        varied = []
        for device, sigma, u, v in zip(devices, sigmas, radii, angles, strict=True):
            # Box and Muller 1958. One by one: vectorised logarithms may round by an array's length.
            radius = sigma * math.sqrt(-2.0 * math.log(1.0 - u))
            compute = math.exp(radius * math.cos(2.0 * math.pi * v))
            network = math.exp(radius * math.sin(2.0 * math.pi * v))
            varied.append(
                replace(
                    device,
                    compute=device.compute * compute,
                    downlink=device.downlink * network,
                    uplink=device.uplink * network,
                )
            )
        return varied

    def cells(self, clients: np.ndarray) -> np.ndarray:
        """The cell that each of some clients is in for good, int64[n]; every cell is as likely."""
        count = self.config.devices.cells or 1
        return (seeding.uniform(self.config.seed, "cells", 0, clients) * count).astype(np.int64)

    def uploading(self, clients: np.ndarray, devices: Sequence[Device]) -> list[Device]:
        """Devices with what each has of its cell's uplink while all of these clients upload.

        A cell's uplink is divided equally among its clients of the round, from its beginning to its end; who
        is slower than that keeps its own. A simplification: under processor sharing, where only those that
        are sending divide it, what early and late ones leave goes to the others, so that no upload takes
        longer than here, and just as long where a cell's clients are alike, begin together and send as much.
        In return a share depends on who takes part alone, and a visit's time is known where it is played.

        Args:
            clients: Everybody that uploads in the round, int64[n].
            devices: Their devices.
        """
        capacity = self.config.devices.cell_uplink
        if capacity is None:
            return list(devices)
        cells = self.cells(clients).tolist()
        among = Counter(cells)
        return [
            replace(device, uplink=min(device.uplink, capacity / among[cell]))
            for device, cell in zip(devices, cells, strict=True)
        ]

    def sparsity(self, client: int, default: float, round_number: int) -> float:
        """What the client is to cut to in a round.

        On its way to its target sparsity: its tier's, or ``default`` where that has none.
        """
        own = self.kinds[self.tiers[client]].sparsity
        target = default if own is None else own
        return self.config.ramp.at(target, round_number, self.config.rounds)

    def available(self, clients: np.ndarray, simulated_s: float) -> np.ndarray:
        """Which of some clients, int64[n], can be asked at a time; bool[n]."""
        result = np.ones(len(clients), bool)
        tiers = self.tiers[clients]
        for index, rule in enumerate(self._availability):
            if not isinstance(rule, Always):
                mine = tiers == index
                answer = np.asarray(rule.available(self.config.seed, clients[mine], simulated_s))
                if answer.dtype != bool or answer.shape != (int(mine.sum()),):
                    raise DeviceError(
                        f"availability.name: {type(rule).__name__} returned {answer.dtype} "
                        f"{list(answer.shape)}; expected bool [{int(mine.sum())}], one for each client"
                    )
                result[mine] = answer
        return result

    def drop_outs(self, clients: np.ndarray, visit: int) -> np.ndarray:
        """Which of some clients, int64[n], get the model of a round but never answer; bool[n]."""
        chance = np.array([tier.dropout for tier in self.kinds])[self.tiers[clients]]
        return seeding.uniform(self.config.seed, "dropout", visit, clients) < chance

    def check(self, training_bytes: Mapping[str, int]) -> None:
        """Refuse what can be known before anything starts.

        Args:
            training_bytes: What training takes on a device of each tier; see ``Federation.tier_bytes``.

        Raises:
            DeviceError: A tier has too little memory, or a trace cannot be read.
        """
        for rule in self._availability:
            rule.check()
        for name, tier in self.config.devices.kinds.items():
            if tier.share > 0 and tier.memory < training_bytes[name]:
                raise DeviceError(
                    f"devices.tiers.{name}.memory: {tier.memory:,.0f} bytes, but training takes "
                    f"{training_bytes[name]:,} (weights, gradient, moments, a batch's activations); a "
                    f"smaller model or local.batch_size (now {self.config.local.batch_size}) fits, "
                    "or give the tier share 0"
                )

    @cached_property
    def _availability(self) -> list[Availability]:
        """When the devices of each tier are there."""
        return [self.config.build_availability(name) for name in self.config.devices.kinds]
