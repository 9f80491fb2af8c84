"""Any number of labels for each sample: a column of lists, see :mod:`cluster.workload.targets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from cluster.measures import Measure
from cluster.references import DataError
from cluster.workload.datasets import Dataset
from cluster.workload.objectives import Objective, Sums, Targets


@dataclass(frozen=True, kw_only=True)
class Multilabel(Objective):
    """Any number of labels for each sample, by binary cross-entropy of a logit for each label.

    A label is found where its logit is above 0, a probability above one half. All measures come of
    counts that add up over samples; mean average precision, which ranks all of them, does not.
    """

    name: ClassVar[str] = "multilabel"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("micro_f1", "micro F1", "share", "2 TP / (2 TP + FP + FN) of all labels together; 0 where "
                "there is none and none is found.", "higher"),
        Measure("macro_f1", "macro F1", "share", "Mean of the labels' own F1; 0 of a label that no sample "
                "has and that is never found.", "higher"),
        Measure("exact_match", "exact match", "share", "Share of the samples whose labels are all found, and "
                "no other.", "higher"),
        Measure("loss", "loss", "nats", "Mean binary cross-entropy of a sample and label, in float64.",
                "lower"),
    )  # fmt: skip
    targets: ClassVar[Targets] = "label_sets"
    outputs_are: ClassVar[str] = "logits, one for each of the {count} labels"

    def count(self, dataset: Dataset) -> int:
        """See :class:`Objective`: a logit for each label."""
        if dataset.train.targets.ndim != 2 or dataset.vocabulary:
            found = "tokens" if dataset.vocabulary else "one class each" if dataset.classes else "numbers"
            raise DataError(
                f"objective.name: multilabel, but the targets of data.name = {dataset.name!r} are {found}; "
                "allowed is a column of lists of labels (data.label_column)"
            )
        return int(dataset.train.targets.shape[1])

    def shape(self, targets: np.ndarray, count: int) -> tuple[int, ...]:
        """See :class:`Objective`: a column for each label."""
        return (len(targets), count)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Objective`: mean binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(outputs.float(), targets.float())

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Samples; found, missed and wrongly found of every label, int64[labels]; summed cross-entropy."""
        held, found = targets.bool(), outputs > 0
        counts = {"hits": held & found, "missed": held & ~found, "wrong": ~held & found}
        return {
            "samples": len(held),
            "exact": int((held == found).all(1).sum()),
            **{name: own.sum(0).cpu().numpy() for name, own in counts.items()},
            "loss": float(
                F.binary_cross_entropy_with_logits(outputs.double(), targets.double(), reduction="sum")
            ),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        """See :class:`Objective`."""
        twice, wrong = 2 * sums["hits"], sums["missed"] + sums["wrong"]
        return {
            "micro_f1": float(twice.sum() / max(int((twice + wrong).sum()), 1)),
            "macro_f1": float(np.mean(twice / np.maximum(twice + wrong, 1))),
            "exact_match": sums["exact"] / sums["samples"],
            "loss": sums["loss"] / (sums["samples"] * len(twice)),
        }
