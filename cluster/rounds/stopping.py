"""When a run has reached what it was for: a target, a budget, or a plateau."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.configuration.config import Config
from cluster.configuration.fitting import stop_measure
from cluster.measures import Measure


@dataclass(frozen=True)
class StopRule:
    """``stop`` of a configuration; see :class:`cluster.configuration.sections.StopSection`.

    Attributes:
        measure: What is watched.
        target: What it is to reach; None with ``patience``.
        patience: So many measured rounds without a new best end the run; None with ``target``.
        after: Rounds before this one never end it.
    """

    measure: Measure
    target: float | None
    patience: int | None
    after: int

    @classmethod
    def of(cls, config: Config, selected_by: str) -> StopRule | None:
        """The rule of a configuration; None where none is set.

        Args:
            config: The configuration.
            selected_by: What selects, as in a line: what is watched unless ``stop.metric`` says otherwise.
        """
        stop = config.stop
        if not stop.asked:
            return None
        measure = stop_measure(config, stop.metric or selected_by)
        return cls(measure, stop.target, stop.patience, stop.after)

    def reason(self, lines: Mapping[int, Mapping[str, Any]]) -> str | None:
        """Why the run ends after the last of these rounds, in words; None where it does not."""
        key, number = self.measure.key, max(lines, default=0)
        value = lines.get(number, {}).get(key)
        if number < max(1, self.after) or value is None:
            return None
        if self.target is not None:
            falls = self.measure.better == "lower" and not self.measure.grows
            reached, sign = (value <= self.target, "<=") if falls else (value >= self.target, ">=")
            return f"{key} {value:.6g} {sign} {self.target:g} in round {number}" if reached else None
        assert self.patience is not None
        merit = self.measure.merit
        measured = [at for at in sorted(lines) if at >= 1 and lines[at].get(key) is not None]
        best = max(measured, key=lambda at: (merit(lines[at][key]), -at))
        since = sum(at > best for at in measured)
        if since < self.patience:
            return None
        return f"{key} has no new best since round {best}, for {since} measured rounds"
