"""The run's ledger: a line a round, written once, and compared where a round is computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cluster.configuration.config import Config
from cluster.measures import Measure
from cluster.records.run_folder import RunFolder, comparable
from cluster.references import UserError
from cluster.simulation.shift import shift_metrics

Line = dict[str, Any]

#: What a line also gives since the run began.
TOTALS = ("comm/uplink_bytes", "comm/downlink_bytes", "flops/dense", "flops/sparse", "energy/joules")


class ReplayError(UserError):
    """A round computed again differs from its stored line."""

    status = 1


class Ledger:
    """Takes the lines of a run in, in order.

    Args:
        folder: The run's folder.
        config: The configuration.
        lines: The lines that stand in it already.
        on_line: Called with each new line once it is stored.
        selects: What rounds are selected by.

    Attributes:
        lines: The stored lines by round.
        waiting: The last round's line, until its evaluation is in.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        lines: Iterable[Line],
        on_line: Callable[[Line], None],
        selects: Measure,
    ) -> None:
        self._folder, self._config, self._on_line, self._selects = folder, config, on_line, selects
        self.lines = {line["round"]: line for line in lines}
        self._totals: dict[str, float] = dict.fromkeys(TOTALS, 0)
        self._spent = {"log": 0.0, "checkpoint": 0.0}  # seconds of the last book-keeping
        self.waiting: Line | None = None

    def line(self, round_number: int) -> Line:
        """The stored line of a round."""
        return self.lines[round_number]

    def value(self, round_number: int, metric: str) -> Any:
        """What the stored line of a round says of a metric; None where there is none."""
        return self.lines.get(round_number, {}).get(metric)

    def enter(self, line: Line, *, evaluated: bool) -> None:
        """Add totals and times of the book-keeping to a round's line; store it, or let it wait.

        Args:
            line: What was measured; its metrics are added to.
            evaluated: Whether it waits for no evaluation.
        """
        for key in self._totals:
            self._totals[key] += line[key]
            line[f"{key}_total"] = self._totals[key]
        line |= {f"time/{name}_s": seconds for name, seconds in self._spent.items()}
        self.waiting = line
        if evaluated:
            self.complete({})

    def complete(self, evaluation: Line) -> None:
        """Store the line that waits, with what its evaluation gave."""
        if self.waiting is not None:
            self._store(self.waiting | evaluation)
            self.waiting = None

    def spent(self, log: float, checkpoint: float) -> None:
        """Note the seconds of the last book-keeping, which the next line tells."""
        self._spent = {"log": log, "checkpoint": checkpoint}

    def best(self, rounds: Iterable[int], metric: str) -> int | None:
        """Of some rounds the first one with the best value of what selects, ``metric`` in a line.

        None where none has one.
        """
        merit = self._selects.merit
        known = [number for number in rounds if self.value(number, metric) is not None]
        return max(known, key=lambda number: (merit(self.value(number, metric)), -number), default=None)

    def dump(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, plain JSON values."""
        self._folder.sync_rounds()  # a checkpoint never outlives the lines before it
        return {"totals": self._totals, "waiting": self.waiting}

    def load(self, stored: Mapping[str, Any]) -> None:
        """Continue from what :meth:`dump` gave; what an older version did not add up has no total."""
        self._totals, self.waiting = dict(stored["totals"]), stored["waiting"]

    def _store(self, line: Line) -> None:
        line |= shift_metrics(self._config, self.lines, line, self._selects)
        number = line["round"]
        if number not in self.lines:
            self._folder.append_round(line)
            self.lines[number] = line
            self._on_line(line)
            return
        old, new = comparable(self.lines[number]), comparable(line)
        differing = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
        if differing:
            raise ReplayError(
                f"round {number} computed again differs from {self._folder.rounds_file} in "
                f"{', '.join(differing)}: the code, a library or the machine changed since"
            )
