"""What is measured of a client's visit, and what a round says of its clients: a new measure is added here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from algorithms import ParameterLayout


@dataclass(frozen=True)
class Measured:
    """What was measured of one visit; travels with its report.

    Attributes:
        samples: n_i.
        steps: Local steps.
        loss: Mean training loss over the steps.
        regrown_before_cut: |{w_t = 0 and w_i != 0}| before the final cut.
        regrown: The same after it.
        deactivated: |{w_t != 0 and w_i = 0}| after it.
        flops_dense: Dense-equivalent training FLOPs.
        flops_sparse: Ideal sparse training FLOPs of each prunable layer, float64[layers].
        flops_frozen: FLOPs in layers that are not trained; part of the dense ones.
        own: The method's own numbers by name, as (sum, weight): ``visit.measure``.
    """

    samples: int
    steps: int
    loss: float
    regrown_before_cut: int
    regrown: int
    deactivated: int
    flops_dense: float
    flops_sparse: np.ndarray
    own: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    flops_frozen: float = 0.0

    @property
    def flops_sparse_total(self) -> float:
        """Ideal sparse training FLOPs of the whole model."""
        return float(self.flops_sparse.sum()) + self.flops_frozen

    @classmethod
    def nothing(cls, samples: int, layers: int) -> Measured:
        """Of a client with so many samples that failed: nothing trained, nothing sent."""
        return cls(samples, 0, math.nan, 0, 0, 0, 0.0, np.zeros(layers))


def cohort_metrics(
    everyone: Sequence[Measured], accepted: Sequence[Measured], layout: ParameterLayout
) -> dict[str, Any]:
    """What a round's line says of its clients.

    Args:
        everyone: Of all that were played: what they did was done.
        accepted: Of those whose updates are part of the model.
        layout: The model's layout.
    """
    prunable = layout.prunable_size
    samples = sum(one.samples for one in accepted)
    loss = sum(one.loss * one.samples for one in accepted) / samples if samples else math.nan
    layers = sum((one.flops_sparse for one in everyone), np.zeros(len(layout.prunable)))

    def mean(values: Sequence[float]) -> float | None:
        return float(np.mean(values)) if len(values) else None

    return {
        "train/loss": loss if math.isfinite(loss) else None,
        "masks/client_regrowth_before_cut": mean([one.regrown_before_cut for one in accepted]),
        "masks/client_regrowth": mean([one.regrown for one in accepted]),
        "masks/client_regrowth_share": mean([one.regrown / prunable for one in accepted]),
        "masks/client_deactivation": mean([one.deactivated for one in accepted]),
        # |(supp w_t u supp w_i) \\ supp cut(w_i)|: what the SparsyFed authors log and call regrowth.
        "masks/client_cut": mean(
            [one.regrown_before_cut + one.deactivated - one.regrown for one in accepted]
        ),
        "flops/dense": sum(one.flops_dense for one in everyone),
        "flops/sparse": float(layers.sum()) + sum(one.flops_frozen for one in everyone),
        "flops/layers": [float(flops) for flops in layers],
        "clients/steps": sum(one.steps for one in everyone),
        "clients/samples": samples,
        **_own([one.own for one in accepted]),
    }


def _own(measured: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float | None]:
    """The method's own numbers: means over the accepted clients, added in the order of the reports."""
    metrics: dict[str, float | None] = {}
    for name in sorted({name for own in measured for name in own}):
        sums, weights = zip(*(own[name] for own in measured if name in own), strict=True)
        mean = sum(sums) / sum(weights) if sum(weights) else math.nan
        metrics[f"method/{name}"] = mean if math.isfinite(mean) else None
    return metrics
