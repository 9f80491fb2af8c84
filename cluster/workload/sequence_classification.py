"""One class for each text, see :mod:`cluster.workload.text`; its tokens are read, never foretold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cluster.references import DataError
from cluster.workload.datasets import Dataset
from cluster.workload.objectives import Classification


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(Classification):
    """One class for each text, by cross-entropy of logits."""

    name: ClassVar[str] = "sequence_classification"
    takes_text: ClassVar[bool] = True
    outputs_are: ClassVar[str] = (
        "logits of each text, one for each of the {count} classes, as of model.name=transformer_classifier"
    )

    def count(self, dataset: Dataset) -> int:
        """See :class:`Objective`: a logit for each class."""
        if not (dataset.vocabulary and dataset.classes):
            raise DataError(
                f"objective.name: sequence_classification, but data.name = {dataset.name!r} holds no texts "
                "with a class each"
            )
        return len(dataset.classes)
