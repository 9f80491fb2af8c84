"""FLASC: broadcast and updates are cut apart; clients train all of the model, the server steps on it dense.

Kuo, Raje, Rajesh and Smith, "Sparsity for communication-efficient LoRA", arXiv 2406.05233.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client, Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import cut_globally
from algorithms.core.parameters import ParameterLayout
from algorithms.topk import own_top


class FlascClient(Client):
    """Dense training from a cut model."""

    def finish(self) -> Tensor | None:
        """Send the K largest differences from what was received."""
        visit = self.visit
        visit.weights.sub_(visit.global_weights[: visit.layout.trained_size])
        return cut_globally(visit.prunable, visit.keep, visit.layout.prunable, guard=False)


@dataclass(frozen=True, kw_only=True)
class Flasc(Algorithm):
    """The top of the model travels down, the top of the differences up; the server adds them to all of it."""

    name = "flasc"
    paper = "Kuo et al., arXiv 2406.05233"
    departures = (
        "The server optimizer is the configuration's; the authors run server.name=fedadamw server.lr=1e-3.",
        "Biases and norms travel whole; the authors cut all that is trained by one threshold.",
        "K is rounded to the nearest whole number; the authors round it down.",
    )
    client = FlascClient
    weighting = "equal"
    asynchronous = True

    sparsity: float = hyperparameter(
        0.75,
        "share of a client's differences that is not sent",
        low=0.0,
        high=0.9999,
        source="1, 1/4, 1/16 sent",
    )
    down_sparsity: float = hyperparameter(
        0.75, "share of the model's prunable weights that clients are not sent", low=0.0, high=0.9999
    )

    @property
    def uploads_differences(self) -> bool:
        """w_i - w_t is sent, w_t as the client received it."""
        return True

    @property
    def kept_weights(self) -> float:
        """What is left of the broadcast; uploads are differences."""
        return 1.0 - self.down_sparsity

    def submodel(
        self, weights: Tensor, told: Instructions, place: int | None, budget: float, layout: ParameterLayout
    ) -> Tensor | None:
        """The largest |w|, for all clients the same; they train the rest from 0."""
        return own_top(weights, 1.0 - self.down_sparsity, layout) if self.down_sparsity else None

    def effective_weights(self, weights: Tensor, layout: ParameterLayout) -> Tensor:
        """What clients would be sent: the server's own model is dense, and nobody has it."""
        effective = weights.clone()
        if self.down_sparsity:
            part = own_top(weights, 1.0 - self.down_sparsity, layout)
            effective[: len(part)].masked_fill_(~part, 0.0)
        return effective

    def personal_weights(
        self, weights: Tensor, received: Tensor, kept: Mapping[str, Tensor], layout: ParameterLayout
    ) -> Tensor:
        """What came of the training, the differences sent on top of what was received."""
        return weights
