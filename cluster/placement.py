"""Placement: which clients an actor gets next. Longest expected first; results never depend on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cluster.client import ClientReport, Task


class CostModel:
    """Expected seconds of a client, learned from its own visits, else from the seconds a sample of all."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._per_sample = 1.0

    def expected(self, client: int, samples: int) -> float:
        """Expected seconds of one visit; in units of samples before anything was learned."""
        return self._seconds.get(client, samples * self._per_sample)

    def learn(self, reports: Iterable[ClientReport]) -> None:
        """Take in what visits really cost."""
        reports = list(reports)
        for report in reports:
            known = self._seconds.get(report.client)
            self._seconds[report.client] = report.seconds if known is None else (known + report.seconds) / 2
        samples = sum(report.samples for report in reports)
        if samples:
            self._per_sample = sum(report.seconds for report in reports) / samples


def longest_first(tasks: Sequence[Task], sizes: np.ndarray, costs: CostModel) -> list[Task]:
    """The order in which clients are handed out; ties by index."""
    return sorted(
        tasks, key=lambda task: (-costs.expected(task.client, int(sizes[task.client])), task.client)
    )


def chunk_size(waiting: int, actors: int) -> int:
    """How many clients the next call takes (guided self-scheduling).

    Large first chunks keep calls few, single clients at the end keep the actors level.
    """
    return max(1, waiting // (3 * actors))
