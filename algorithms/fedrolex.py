"""FedRolex: a client trains a window of every layer's units that moves by one unit a round.

Alam, Liu, Yan and Zhang, "FedRolex: Model-heterogeneous federated learning with rolling sub-model
extraction", NeurIPS 2022, arXiv 2212.01548.
"""

from __future__ import annotations

from dataclasses import dataclass

from algorithms.core.client import Instructions
from algorithms.core.widths import Slices


@dataclass(frozen=True, kw_only=True)
class FedRolex(Slices):
    """A rolling window of every hidden layer's units, the same offset for all clients of a round."""

    name = "fedrolex"
    paper = "Alam et al., NeurIPS 2022, arXiv 2212.01548"
    departures = (
        "The window moves forwards, as in the paper; the authors' code moves it back; as much is covered.",
        "Where a GroupNorm follows, it moves by one of its groups a round.",
        "A budget is a share of the weights; in the paper it is the ratio of widths: share_of=width.",
        "Biases, norms and the classifier are averaged like all else; the authors' code weighs them by the "
        "number of past updates.",
    )
    weighting = "equal"

    def first(self, told: Instructions) -> int:
        """One unit, or block, on every round: {j, ..., j + k - 1} modulo the layer's, j = 0 in round 1."""
        return max(0, told.round - 1)
