"""Iterative hard thresholding: the server keeps the K largest weights of the mean.

Tong, Liang, Zhu, Bi, "Federated Nonconvex Sparse Learning", arXiv 2101.00052. With one local step Fed-HT is
Distributed-IHT, the baseline of that paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Client, Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import cut_to_top_k, target_count
from algorithms.core.parameters import ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer


@dataclass(frozen=True, kw_only=True)
class FedHT(Algorithm):
    """Dense training and uploads; the mean is cut to the K largest |w|, and that is sent down."""

    name = "fedht"
    paper = "Tong et al., arXiv 2101.00052, algorithm 1"
    departures = ("Biases and norms stay dense; the paper's models are one layer without them.",)
    asynchronous = True

    sparsity: float = hyperparameter(
        0.95, "share of the prunable weights that the server cuts: tau is the rest", low=0.0, high=0.9999
    )
    steps: int | None = hyperparameter(
        None, "local steps a visit, 1: Distributed-IHT; null: local.epochs", low=1, source="K; 3 to 10"
    )

    @property
    def kept_weights(self) -> float:
        """tau over |P|."""
        return 1.0 - self.sparsity

    def instruct(self, state: ServerState, rounds: int, clients: int) -> Instructions:
        """So many steps."""
        return replace(super().instruct(state, rounds, clients), steps=self.steps)

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """H_tau of the server's step, over all layers together."""
        after = super().advance(state, total, server, layout, share)
        prunable = layout.prunable_size
        cut_to_top_k(after.weights[:prunable], target_count(prunable, self.sparsity))
        return after


class FedIterHTClient(Client):
    """Cuts to the K largest weights after every local step."""

    def after_step(self) -> None:
        """H_tau."""
        self._support = cut_to_top_k(self.visit.prunable, self.visit.keep)

    def finish(self) -> Tensor | None:
        """Send what the last cut has left."""
        return self._support


@dataclass(frozen=True, kw_only=True)
class FedIterHT(FedHT):
    """Fed-HT whose clients also cut after every local step, so that uploads are sparse too."""

    name = "fediterht"
    paper = "Tong et al., arXiv 2101.00052, algorithm 2"
    client = FedIterHTClient
