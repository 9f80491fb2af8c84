"""When devices can be asked to train, by the ``availability`` of their tier.

A function of (seed, client, time) alone: nothing is stored, and a device costs nothing until it is asked. One
of your own derives from :class:`Availability`; ``availability={name: my_module:Weekends, ...}``.
"""

from __future__ import annotations

import codecs
import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from algorithms.core.hyperparameters import hyperparameter
from cluster import seeding
from cluster.simulation.clock import DeviceError

_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Availability(ABC):
    """When the devices of a tier are there."""

    @abstractmethod
    def available(self, seed: int, clients: np.ndarray, simulated_s: float) -> np.ndarray:
        """Which of some clients, int64[n], can be asked at a time; bool[n].

        Args:
            seed: Seed of the run.
            clients: Numbers of clients of the tier.
            simulated_s: Seconds since the run began, on the simulated clock.
        """

    def check(self) -> None:  # noqa: B027
        """Refuse what can be known before anything starts; a choice need not.

        Raises:
            DeviceError: Says what is wrong.
        """


class Always(Availability):
    """At any time."""

    def available(self, seed: int, clients: np.ndarray, simulated_s: float) -> np.ndarray:
        """See :class:`Availability`."""
        return np.ones(len(clients), bool)


@dataclass(frozen=True, kw_only=True)
class Diurnal(Availability):
    """A share of them that rises and falls over the day; each device draws its state anew every slot."""

    low: float = hyperparameter(0.2, "share available at the bottom of the day", low=0.0, high=1.0)
    high: float = hyperparameter(0.8, "share available at its height", low=0.0, high=1.0)
    phase: float = hyperparameter(0.0, "hour of the day's height", low=0.0, high=24.0)
    slot: float = hyperparameter(600.0, "seconds between changes of a device's state", above=0.0)

    def available(self, seed: int, clients: np.ndarray, simulated_s: float) -> np.ndarray:
        """See :class:`Availability`."""
        slot = int(simulated_s // self.slot)
        hour = (slot + 0.5) * self.slot / _HOUR
        wave = (1.0 + math.cos(2.0 * math.pi * (hour - self.phase) / 24.0)) / 2.0
        share = self.low + (self.high - self.low) * wave
        return seeding.uniform(seed, "availability", slot, clients) < share


@dataclass(frozen=True, kw_only=True)
class Trace(Availability):
    """The intervals of a CSV file, repeated for ever; beyond its clients they start over at its first."""

    path: str | None = hyperparameter(None, "CSV file with the columns client, start, end in s")

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError("a trace needs its CSV file, path=FILE; found none")

    def available(self, seed: int, clients: np.ndarray, simulated_s: float) -> np.ndarray:
        """See :class:`Availability`."""
        return self._recording.covers(clients, simulated_s)

    def check(self) -> None:
        """See :class:`Availability`: the file is read."""
        _ = self._recording

    @cached_property
    def _recording(self) -> Recording:
        return Recording.read(Path(str(self.path)))


@dataclass(frozen=True)
class Recording:
    """What a trace recorded.

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
    def read(cls, path: Path) -> Recording:
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
