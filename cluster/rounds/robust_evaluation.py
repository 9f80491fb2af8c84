"""Robustness: the global model under attack, on the same rows of each split every time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.exchange import EvaluationChunk
from cluster.federation import Federation
from cluster.records.run_folder import finite
from cluster.rounds.metrics import Part
from cluster.workload.objectives import Sums


class RobustEvaluation:
    """Measures the robustness of one experiment's model, every so many rounds and after the last.

    Args:
        federation: Data, partition and configuration.
        rows: Of one chunk.
    """

    def __init__(self, federation: Federation, rows: int) -> None:
        self._every, self._objective = federation.config.evaluate_attack.every, federation.objective
        self._chunks = [
            EvaluationChunk(split, start, min(start + rows, len(own)), attacked=True)
            for split, own in federation.attacked_rows.items()
            for start in range(0, len(own), rows)
        ]

    def due(self, round_number: int, *, last: bool = False) -> bool:
        """Whether the model is attacked after this round."""
        return self._every > 0 and (last or round_number % self._every == 0)

    def chunks(self, round_number: int, *, last: bool) -> list[EvaluationChunk]:
        """What is to be evaluated for it."""
        return self._chunks if self.due(round_number, last=last) else []

    def metrics(self, parts: Mapping[Part, Sums]) -> dict[str, Any]:
        """The objective's metrics of each split under attack, and by how much what selects is worse on test.

        Args:
            parts: The sums of ``chunks``; none where it was not due.
        """
        by_split = {split: self._objective.metrics(sums) for (split, _, _, _), sums in parts.items()}
        metrics: dict[str, Any] = {
            f"{split}/robust_{measure.key}": finite(own[measure.key])
            for split, own in by_split.items()
            for measure in self._objective.measures
        }
        selects = self._objective.selects
        unseen = by_split.get("test") or by_split.get("val")
        if unseen is not None and "train" in by_split:
            merits = [selects.merit(own[selects.key]) for own in (by_split["train"], unseen)]
            metrics["robust_gap"] = finite(merits[0] - merits[1])
        return metrics
