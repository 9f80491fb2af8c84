"""When the server takes updates in, by ``schedule.name``: what is declared of each schedule.

The objects that play rounds so are in files of their own. One of your own declares its fields here and names
its :class:`cluster.rounds.schedule.Schedule`; ``schedule.name=my_module:Patient``::

    @dataclass(frozen=True, kw_only=True)
    class Patient(Timing):
        '''Waits for everybody.'''

        runs = PatientSchedule  # whose rounds read self.timing.patience

        patience: float = hyperparameter(3.0, "simulated seconds beyond the last arrival", low=0.0)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from algorithms import registry
from algorithms.core.hyperparameters import hyperparameter
from cluster.configuration.config import Config


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What is declared of a schedule."""

    #: The ``Schedule`` that plays such rounds, or its ``module:attribute``.
    runs: ClassVar[str | type] = ""

    def problems(self, config: Config) -> Iterator[str]:
        """What is wrong with such rounds in an experiment, a line each that begins with the key."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class Synchronous(Timing):
    """Rounds of one cohort: over-selection and a deadline leave out who comes too late."""

    runs = "cluster.rounds.synchronous:Synchronous"

    over_selection: float = hyperparameter(
        1.0, "clients asked for each of cohort; the first cohort updates count", low=1.0
    )
    deadline: float | None = hyperparameter(
        None, "simulated seconds after which a round takes no update; null: none", above=0.0
    )


@dataclass(frozen=True, kw_only=True)
class Buffered(Timing):
    """Asynchronous: a server step whenever enough updates are in, however old their base (FedBuff)."""

    runs = "cluster.rounds.buffered:Buffered"

    buffer: int | None = hyperparameter(None, "updates a server step; null: cohort", low=1)
    concurrency: int | None = hyperparameter(
        None, "clients that train at a time; null: twice the buffer", low=1
    )
    staleness_exponent: float = hyperparameter(
        0.5, "a: an update that is s steps behind weighs (1 + s)^-a", low=0.0
    )
    max_staleness: int | None = hyperparameter(
        None, "updates that are more steps behind are left out; null: none", low=0
    )

    def size(self, config: Config) -> int:
        """Updates that make a server step."""
        return self.buffer or config.cohort

    def places(self, config: Config) -> int:
        """Clients that train at a time."""
        return self.concurrency or 2 * self.size(config)

    def problems(self, config: Config) -> Iterator[str]:
        """See :class:`Timing`."""
        method = config.method
        if not method.asynchronous:
            able = ", ".join(name for name, known in registry().items() if known.asynchronous)
            yield (
                f"schedule.name: {config.algorithm.name} needs all clients of a round on one model; "
                f"buffered works with {able}"
            )
        if config.devices.cells is not None:
            yield (
                f"devices.cells: {config.devices.cells}, but who uploads together is known of rounds of one "
                "cohort alone, and buffered has none; set schedule.name=synchronous or leave cells out"
            )
        if method.keeps_updates:
            yield f"schedule.name: {config.algorithm.name} looks at every update of a round: synchronous"
        size, places, clients = self.size(config), self.places(config), config.population
        if places + size > clients:
            yield (
                f"schedule.concurrency: {places} clients in flight and {size} in the buffer are more than "
                f"partition.clients, {clients}"
            )
