"""Top-K: train dense, send the K weights of largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from algorithms.algorithm import Algorithm, Client
from algorithms.hyperparameters import hyperparameter
from algorithms.masks import cut_to_top_k


class TopKClient(Client):
    """Dense training; one global threshold cuts the trained model."""

    def finish(self) -> Tensor | None:
        """Keep the K largest |w| over all prunable weights."""
        return cut_to_top_k(self.visit.prunable, self.visit.keep)


@dataclass(frozen=True, kw_only=True)
class TopK(Algorithm):
    """Dense training, then one global cut to the top K; plain weighted mean, where absent counts as 0."""

    name = "topk"
    paper = "the Top-K baseline of Guastella et al., ICLR 2025, arXiv 2504.05153, section 4"
    client = TopKClient
    unequal_sparsity = True
    asynchronous = True

    sparsity: float = hyperparameter(0.95, "share of prunable weights that is cut", low=0.0, high=0.9999)
