"""FIARSE: a client trains the largest weights of the model, as many as it has room for.

Wu et al., "FIARSE: Model-heterogeneous federated learning via importance-aware submodel extraction", NeurIPS
2024, arXiv 2407.19389.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client, Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import top_k_mask
from algorithms.core.parameters import ParameterLayout


class FiarseClient(Client):
    """Computes with w [|w| >= theta]; a surrogate passes the threshold's gradient on to w."""

    def begin(self) -> None:
        """theta is the smallest |w| received of what is ranked, for the visit; 0 with the whole model."""
        visit = self.visit
        self._ranked = ranked(visit.layout, visit.weights.device)
        theta = 0.0
        if visit.part is not None:
            held = visit.weights[self._ranked & visit.part].abs()
            theta = float(held.min()) if len(held) else 0.0
        self._theta = theta
        self._present = torch.ones_like(self._ranked)

    def before_forward(self) -> None:
        """Write what the modules compute with: a weight below theta is cut."""
        visit = self.visit
        if self._theta:
            torch.logical_or(visit.weights.abs() >= self._theta, ~self._ranked, out=self._present)
        torch.mul(visit.weights, self._present, out=visit.model[: len(visit.weights)])

    def after_backward(self) -> None:
        """dL/dw = dL/dw^ (1 + 2 theta |w| / (|w| + theta)^2) where |w| >= theta, else 0."""
        visit = self.visit
        if self._theta:
            magnitudes = visit.weights.abs()
            factor = 1.0 + 2.0 * self._theta * magnitudes / (magnitudes + self._theta).square()
            visit.gradient.mul_(torch.where(self._ranked, factor, 1.0))
        visit.gradient.mul_(self._present)
        self._before = visit.weights.clone() if self._theta else None

    def after_step(self) -> None:
        """A weight below theta is frozen for the rest of the visit: neither decay nor momentum move it."""
        visit = self.visit
        if self._before is not None:
            torch.where(self._present, visit.weights, self._before, out=visit.weights)


def ranked(layout: ParameterLayout, device: torch.device | None = None) -> Tensor:
    """What is ranked by magnitude, bool[trained]: the layers' weights and their biases, but no norm."""
    weights = {entry.name for entry in layout.prunable}
    result = torch.zeros(layout.trained_size, dtype=torch.bool, device=device)
    result[: layout.prunable_size] = True
    for entry in layout.other:
        result[entry.span] = f"{entry.name.removesuffix('.bias')}.weight" in weights
    return result


@dataclass(frozen=True, kw_only=True)
class Fiarse(Algorithm):
    """The largest |w| of the global model, cut anew every round, and the mean over each weight's holders."""

    name = "fiarse"
    paper = "Wu et al., NeurIPS 2024, arXiv 2407.19389"
    departures = (
        "Who holds a weight is told by the part sent, not by whether its difference is exactly 0.",
        "A client with the whole model trains as in FedAvg: theta is 0, the authors' the smallest |w|.",
    )
    client = FiarseClient
    confined = True
    unequal_sparsity = True
    asynchronous = True
    weighting = "equal"

    sparsity: float = hyperparameter(
        0.0,
        "share of weights that a client does not hold, unless its tier has its own",
        low=0.0,
        high=0.9999,
    )

    @property
    def reparameterised(self) -> bool:
        """Modules compute with the weights above theta."""
        return True

    @property
    def trains_zeros(self) -> bool:
        """A weight of 0 is no largest one: only who holds the whole model trains it."""
        return self.sparsity == 0.0

    def submodel(
        self, weights: Tensor, told: Instructions, place: int | None, budget: float, layout: ParameterLayout
    ) -> Tensor | None:
        """The floor(budget x size) largest |w| of all layers' weights and biases; norms whole."""
        chosen = ranked(layout)
        positions = torch.nonzero(chosen).reshape(-1)
        count = max(1, math.floor(budget * len(positions) + 1e-7))
        part = ~chosen
        part[positions] = top_k_mask(weights[positions].abs(), count)
        return part
