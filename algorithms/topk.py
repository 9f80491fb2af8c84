"""Top-K: train dense, send the K weights of largest magnitude.

Its cut to one global threshold is SparsyFed's too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client, Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import cut_globally, top_k_mask
from algorithms.core.parameters import ParameterLayout


class TopKClient(Client):
    """Dense training; one global threshold cuts the trained model."""

    method: Any

    def finish(self) -> Tensor | None:
        """Keep the K largest |w| over all prunable weights."""
        visit = self.visit
        return cut_globally(visit.prunable, visit.keep, visit.layout.prunable, guard=self.method.guard_layers)


def own_top(weights: Tensor, budget: float, layout: ParameterLayout) -> Tensor:
    """The model cut to a client's own budget, bool[trained]; parameters that are not pruned are whole."""
    prunable = layout.prunable_size
    part = torch.ones(layout.trained_size, dtype=torch.bool)
    part[:prunable] = top_k_mask(weights[:prunable].abs(), round(budget * prunable))
    part[:prunable] &= weights[:prunable] != 0
    return part


@dataclass(frozen=True, kw_only=True)
class TopK(Algorithm):
    """Dense training, then one global cut to the top K; plain weighted mean, where absent counts as 0."""

    name = "topk"
    paper = "the Top-K baseline of Guastella et al., ICLR 2025, arXiv 2504.05153, section 4"
    client = TopKClient
    unequal_sparsity = True
    follows_sparsity = True
    asynchronous = True

    sparsity: float = hyperparameter(0.95, "share of prunable weights that is cut", low=0.0, high=0.9999)
    cut_received: bool = hyperparameter(
        False,
        "send each client the model cut to its own sparsity, from round 2 on",
        source="the authors' code with unequal budgets",
    )
    guard_layers: bool = hyperparameter(
        False,
        "a layer that the global cut would empty keeps the top of its trained weights, its share of K",
        source="the authors' code, where it is off",
    )

    @property
    def kept_weights(self) -> float:
        """K over |P|."""
        return 1.0 - self.sparsity

    def submodel(
        self, weights: Tensor, told: Instructions, place: int | None, budget: float, layout: ParameterLayout
    ) -> Tensor | None:
        """With ``cut_received`` a client is sent no more than what it would cut to."""
        return own_top(weights, budget, layout) if self.cut_received and told.round > 1 else None
