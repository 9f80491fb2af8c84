"""The simulated clock: how long a visit takes a device, and events in the total order (time, sequence).

It never looks at the wall clock. All times are simulated seconds since the run began.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.configuration.device_sections import TierSection
from cluster.references import UserError

Event = TypeVar("Event")


class DeviceError(UserError):
    """Devices that cannot take part; the message names the tier or file, what was found and the fix."""


@dataclass(frozen=True)
class Device:
    """One client's device.

    Attributes:
        compute: FLOP/s that training reaches.
        downlink: bit/s.
        uplink: bit/s.
        latency: Seconds a visit, beside transfers and training.
        flop_energy: Joules a FLOP of training.
        downlink_energy: Joules a byte received.
        uplink_energy: Joules a byte sent.
    """

    compute: float
    downlink: float
    uplink: float
    latency: float
    flop_energy: float = 0.0
    downlink_energy: float = 0.0
    uplink_energy: float = 0.0

    @classmethod
    def of(cls, tier: TierSection) -> Device:
        """The median device of a tier."""
        return cls(
            tier.compute,
            tier.downlink,
            tier.uplink,
            tier.latency,
            tier.flop_energy,
            tier.downlink_energy,
            tier.uplink_energy,
        )

    def duration(self, downlink_bytes: int, flops: float, uplink_bytes: int) -> float:
        """Seconds from the server's sending the model until it has the update: the four parts in turn."""
        download, upload = 8 * downlink_bytes / self.downlink, 8 * uplink_bytes / self.uplink
        return download + flops / self.compute + upload + self.latency

    def energy(self, downlink_bytes: int, flops: float, uplink_bytes: int) -> float:
        """Joules of the same three; what a device draws while it idles is not counted."""
        radio = self.downlink_energy * downlink_bytes + self.uplink_energy * uplink_bytes
        return radio + self.flop_energy * flops


class Clock(Generic[Event]):
    """Simulated time, and the events that lie ahead.

    Events at the same time come in the order of their sequence numbers, so that the order never depends on
    who computed what first.

    Attributes:
        now: Simulated seconds.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._ahead: list[tuple[float, int, Event]] = []

    def __len__(self) -> int:
        """Number of events ahead."""
        return len(self._ahead)

    def schedule(self, time: float, sequence: int, event: Event) -> None:
        """Put an event at ``time``, not before now; ``sequence`` is its own and decides ties."""
        if time < self.now:
            raise ValueError(f"an event at {time} s lies before now, {self.now} s")
        heapq.heappush(self._ahead, (time, sequence, event))

    def next_event(self) -> tuple[float, int]:
        """Time and sequence number of the first event; at infinity when there is none."""
        return self._ahead[0][:2] if self._ahead else (float("inf"), 0)

    def advance(self) -> Event:
        """Move to the first event and return it."""
        self.now, _, event = heapq.heappop(self._ahead)
        return event


def first_arrivals(arrivals: Iterable[tuple[float, int]], count: int, deadline: float) -> list[int]:
    """The sequence numbers of the first ``count`` arrivals until the deadline (inclusive), in order.

    Args:
        arrivals: (time, sequence) of each.
        count: How many are wanted.
        deadline: Latest time.
    """
    return [sequence for time, sequence in sorted(arrivals)[:count] if time <= deadline]
