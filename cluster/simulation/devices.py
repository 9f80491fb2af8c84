"""Devices: what a client's device is like, when it can be asked, and whether it answers.

Everything is a function of (seed, client) or (seed, client, time slot or round): nothing is stored but one
byte a client for its tier, and a device costs nothing until it is drawn.
"""

from __future__ import annotations

import codecs
import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cluster import seeding
from cluster.configuration.config import Config
from cluster.configuration.sections import AvailabilitySection, TierSection
from cluster.references import UserError
from cluster.simulation.clock import Device

_HOUR = 3600.0


class DeviceError(UserError):
    """Devices that cannot take part; the message names the tier or file, what was found and the fix."""


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

    def of(self, clients: Sequence[int] | np.ndarray) -> list[Device]:
        """The devices of some clients: the figures of their tiers, spread by log-normal factors.

        Compute has a factor of its own; both directions of the network share one.
        """
        clients = np.asarray(clients, np.int64)
        seed = self.config.seed
        radii, angles = (seeding.uniform(seed, "devices", step, clients).tolist() for step in (1, 2))
        devices = []
        for tier_index, u, v in zip(self.tiers[clients], radii, angles, strict=True):
            tier = self.kinds[tier_index]
            # Box and Muller 1958. One by one: vectorised logarithms may round by an array's length.
            radius = tier.spread * math.sqrt(-2.0 * math.log(1.0 - u))
            compute = math.exp(radius * math.cos(2.0 * math.pi * v))
            network = math.exp(radius * math.sin(2.0 * math.pi * v))
            devices.append(
                Device(tier.compute * compute, tier.downlink * network, tier.uplink * network, tier.latency)
            )
        return devices

    def sparsity(self, client: int, default: float) -> float:
        """The client's target sparsity: its tier's, or ``default`` where that has none."""
        own = self.kinds[self.tiers[client]].sparsity
        return default if own is None else own

    def available(self, clients: np.ndarray, simulated_s: float) -> np.ndarray:
        """Which of some clients, int64[n], can be asked at a time; bool[n]."""
        result = np.ones(len(clients), bool)
        tiers = self.tiers[clients]
        for index, tier in enumerate(self.kinds):
            if tier.availability.name == "always":
                continue
            mine = tiers == index
            if tier.availability.name == "diurnal":
                result[mine] = self._awake(tier.availability, clients[mine], simulated_s)
            else:
                result[mine] = self._traces[str(tier.availability.path)].covers(clients[mine], simulated_s)
        return result

    def drop_outs(self, clients: np.ndarray, visit: int) -> np.ndarray:
        """Which of some clients, int64[n], get the model of a round but never answer; bool[n]."""
        chance = np.array([tier.dropout for tier in self.kinds])[self.tiers[clients]]
        return seeding.uniform(self.config.seed, "dropout", visit, clients) < chance

    def check(self, training_bytes: int) -> None:
        """Refuse what can be known before anything starts.

        Args:
            training_bytes: What training takes on a device; see ``Federation.training_bytes``.

        Raises:
            DeviceError: A tier has too little memory, or a trace cannot be read.
        """
        _ = self._traces
        for name, tier in self.config.devices.kinds.items():
            if tier.share > 0 and tier.memory < training_bytes:
                raise DeviceError(
                    f"devices.tiers.{name}.memory: {tier.memory:,.0f} bytes, but training takes "
                    f"{training_bytes:,} (weights, gradient and a batch's activations); a smaller model or "
                    f"local.batch_size (now {self.config.local.batch_size}) fits, or give the tier share 0"
                )

    def _awake(self, section: AvailabilitySection, clients: np.ndarray, simulated_s: float) -> np.ndarray:
        slot = int(simulated_s // section.slot)
        hour = (slot + 0.5) * section.slot / _HOUR
        wave = (1.0 + math.cos(2.0 * math.pi * (hour - section.phase) / 24.0)) / 2.0
        share = section.low + (section.high - section.low) * wave
        return seeding.uniform(self.config.seed, "availability", slot, clients) < share

    @cached_property
    def _traces(self) -> dict[str, Trace]:
        sections = [tier.availability for tier in self.kinds]
        return {section.path: Trace.read(Path(section.path)) for section in sections if section.path}


@dataclass(frozen=True)
class Trace:
    """Recorded availability, repeated for ever; clients beyond those of the trace start over at its first.

    Attributes:
        rows: Place of each interval's client among those of the trace, int64[intervals].
        starts: First second of each interval, float64[intervals].
        ends: Second after its last, float64[intervals].
        clients: Number of clients in the trace.
    """

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    clients: int

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read a CSV file with a header and the columns client (any number), start and end (seconds).

        UTF-8, or UTF-16 with its mark; empty lines and those that begin with # are passed over.

        Raises:
            DeviceError: There is no such file, or a line is no interval.
        """
        columns = ("client", "start", "end")
        place: dict[str, int] = {}
        intervals = []
        for number, cells in _rows(path):
            if not place:
                place = {name: index for index, name in enumerate(cells)}
                if not set(columns) <= set(place):
                    raise DeviceError(f"{path}: expected the columns client, start, end, found {cells}")
                continue
            found = [cells[place[name]] if place[name] < len(cells) else "None" for name in columns]
            try:
                client, start, end = int(found[0]), float(found[1]), float(found[2])
                if not 0.0 <= start < end < math.inf:
                    raise ValueError
            except ValueError:
                raise DeviceError(
                    f"{path}, line {number}: expected a client's number and 0 <= start < end in seconds, "
                    f"found {','.join(found)}"
                ) from None
            intervals.append((client, start, end))
        if not intervals:
            raise DeviceError(f"{path}: holds no interval, so that no client would ever be available")
        numbers, starts, ends = (np.array(column) for column in zip(*intervals, strict=True))
        clients, rows = np.unique(numbers, return_inverse=True)
        return cls(rows, starts, ends, len(clients))

    def covers(self, clients: np.ndarray, simulated_s: float) -> np.ndarray:
        """Which of some clients, int64[n], are in one of their intervals; bool[n]."""
        time = simulated_s % float(self.ends.max())
        active = np.unique(self.rows[(self.starts <= time) & (time < self.ends)])
        return np.isin(clients % self.clients, active)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV file that hold something, each with its number, and their cells."""
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
        for number, line in enumerate(text.splitlines(), 1):
            cells = [cell.strip() for cell in next(csv.reader([line]), [])]
            if any(cells) and not cells[0].startswith("#"):
                yield number, cells
    except OSError as error:
        raise DeviceError(f"availability.path: {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DeviceError(f"availability.path: {path} is no CSV file in UTF-8 or UTF-16: {error}") from None
