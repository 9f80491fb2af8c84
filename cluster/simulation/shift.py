"""Distribution shift: who holds which data from which round on, and what the change does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.configuration.config import Config
from cluster.configuration.device_sections import ShiftSection
from cluster.configuration.sections import PartitionSection
from cluster.measures import Measure

Line = Mapping[str, Any]


def period_of(section: ShiftSection, round_number: int) -> int:
    """How many shifts lie before a round or begin with it."""
    if section.round is None or round_number < section.round:
        return 0
    return 1 + ((round_number - section.round) // section.every if section.every else 0)


def first_round_of(section: ShiftSection, period: int) -> int:
    """The round that a period begins with, 1 for the first."""
    if section.round is None or period == 0:
        return 1
    return section.round + (period - 1) * (section.every or 0)


def partition_of(config: Config, period: int) -> PartitionSection:
    """A period's partition, its seed a number: what ``shift.partition`` changes, the next seed each shift."""
    section, seed = config.partition, config.partition_seed
    if period == 0:
        return section.model_copy(update={"seed": seed})
    changed = config.shifted_partition
    if "seed" in config.shift.partition:
        seed = (config.seed if changed.seed == "seed" else changed.seed) - 1
    return changed.model_copy(update={"seed": seed + period})


def rows_of(config: Config, period: int, kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rows that a period trains on, int64: all of ``kept``, or those of its classes.

    Args:
        config: The configuration.
        period: Number of the period, from 0.
        kept: Rows that may be trained on, int64.
        labels: Labels of all rows, int64.
    """
    if config.shift.classes is None:
        return kept
    present = np.unique(labels[kept])
    places = (np.arange(config.shift.classes) + period * config.shift.classes) % len(present)
    return kept[np.isin(labels[kept], present[places])]


def shift_metrics(config: Config, stored: Mapping[int, Line], line: Line, selects: Measure) -> dict[str, Any]:
    """What the last shift has done, on test data, by an evaluated round; nothing without shifts.

    Args:
        config: The configuration.
        stored: Lines by round; only earlier ones that are evaluated in any run of ``config`` are looked at.
        line: The round's line.
        selects: What is looked at, the accuracy of classes.
    """
    section, number = config.shift, line["round"]
    if section.round is None:
        return {}
    period = period_of(section, number)
    metrics: dict[str, Any] = {"shift/period": period}
    key = f"test/{selects.key}"
    now: float | None = line.get(key)
    if period == 0 or now is None:
        return metrics
    first = first_round_of(section, period)

    def after(earlier: int) -> float | None:
        if earlier == number:
            return now
        due = earlier % config.evaluate_every == 0
        return stored.get(earlier, {}).get(key) if due else None

    evaluated = (known for r in range(first - 1, 0, -1) if (known := after(r)) is not None)
    before = next(evaluated, None)
    if before is None:
        return metrics
    afterwards = ((r, after(r)) for r in range(first, number + 1))
    wanted = selects.merit(before)
    recovered = next(
        (r for r, known in afterwards if known is not None and selects.merit(known) >= wanted), None
    )
    return metrics | {
        f"shift/{selects.key}_before": before,
        f"shift/{selects.key}_change": now - before,
        "shift/recovery_rounds": None if recovered is None else recovered - first + 1,
    }
