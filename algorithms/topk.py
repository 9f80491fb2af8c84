"""Top-K: train dense, send the K weights of largest magnitude.

Its cut to one global threshold is SparsyFed's too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import cut_globally, cut_to_top_k


class TopKClient(Client):
    """Dense training; one global threshold cuts the trained model."""

    method: Any

    def begin(self) -> None:
        """With ``cut_received``, cut the model to the client's own sparsity before it trains.

        Not in round 1, whose dense model nobody has trained yet.
        """
        visit = self.visit
        if self.method.cut_received and visit.instructions.round > 1:
            self.cuts_received = True
            cut_to_top_k(visit.prunable, visit.keep)

    def finish(self) -> Tensor | None:
        """Keep the K largest |w| over all prunable weights."""
        visit = self.visit
        return cut_globally(visit.prunable, visit.keep, visit.layout.prunable, guard=self.method.guard_layers)


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
        "cut the model received to the client's own sparsity before training, from round 2 on",
        source="the authors' code with unequal budgets",
    )
    guard_layers: bool = hyperparameter(
        False,
        "a layer that the global cut would empty keeps the top of its trained weights, its share of K",
        source="the authors' code, where it is off",
    )
