"""FjORD: ordered dropout, HeteroFL's prefixes with a width drawn anew for every step.

Horvath et al., "FjORD: Fair and accurate federated learning under heterogeneous targets with ordered
dropout", NeurIPS 2021, arXiv 2102.13451.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import layer_counts
from algorithms.core.widths import Slices, UnitLayout


class FjordClient(Client):
    """Each step trains a prefix of the units held, its width drawn among the levels up to the own."""

    method: Any

    def begin(self) -> None:
        """The prefix of every level, bool[trained], and its share of each layer held."""
        visit, layout = self.visit, self.visit.layout
        assert isinstance(layout, UnitLayout)
        device, own = visit.weights.device, self.method.ratio(1.0 - visit.sparsity, layout)
        widths = [k / self.method.levels for k in range(1, self.method.levels)]
        parts = [self.method.slice(width, 0, layout) for width in [w for w in widths if w < own] + [own]]
        counts = [layer_counts(part[: layout.prunable_size], layout.prunable) for part in parts]
        self._levels = [
            (part.to(device), count / counts[-1]) for part, count in zip(parts, counts, strict=True)
        ]

    def gradient(self, compute: Callable[[], Tensor]) -> Tensor:
        """A pass with the weights of one level; the others have no gradient."""
        visit = self.visit
        part, visit.computes = self._levels[int(visit.rng.integers(len(self._levels)))]
        torch.mul(visit.weights, part, out=visit.model[: len(part)])
        loss = compute()
        visit.gradient.mul_(part)
        return loss


@dataclass(frozen=True, kw_only=True)
class Fjord(Slices):
    """Nested widths, each trained for itself; a weight's mean is over the clients whose width reaches it."""

    name = "fjord"
    paper = "Horvath et al., NeurIPS 2021, arXiv 2102.13451"
    departures = (
        "No distillation from the largest width to the one drawn.",
        "Every width has the same GroupNorm; the authors have BatchNorm statistics for each.",
        "A budget is a share of the weights; in the paper it is the ratio of widths: share_of=width.",
    )
    client = FjordClient

    levels: int = hyperparameter(
        5, "widths that are drawn from, k/levels of the whole; a client's own is the largest", low=1, high=64
    )

    @property
    def reparameterised(self) -> bool:
        """Modules compute with the prefix of the step."""
        return True
