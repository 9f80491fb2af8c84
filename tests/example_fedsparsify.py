"""FedSparsify-Global: the server purges the smallest weights after every round, on a schedule."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.fixed_mask import MaskedClient
from sparsyfed import Algorithm, ParameterLayout, ServerState, Total, hyperparameter, target_count, top_k_mask


@dataclass(frozen=True, kw_only=True)
class FedSparsify(Algorithm):
    """Dense at first; after every round the server purges the smallest weights, which never come back."""

    paper = "Stripelis et al. 2022, arXiv 2204.12430: FedSparsify-Global"
    departures = ("Prunable weights are ranked; the authors rank biases and norms too.",)
    client = MaskedClient  # trains inside the mask that it is sent
    shares_support = True  # all clients send its positions, which therefore need not travel

    sparsity: float = hyperparameter(
        0.9, "share of prunable weights that is 0 in the end", low=0.0, high=0.9999
    )
    until: int = hyperparameter(
        12, "round after which that sparsity is reached", low=1, high=10000, search=(3, 12)
    )
    exponent: float = hyperparameter(
        3.0, "the larger, the earlier weights go", low=1.0, high=10.0, search=(1.0, 6.0), source="n"
    )

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """The common initialisation, and a mask that holds all of it."""
        return ServerState(round=0, weights=weights, mask=torch.ones(layout.prunable_size, dtype=torch.bool))

    def next_mask(
        self, state: ServerState, weights: Tensor, total: Total, layout: ParameterLayout
    ) -> Tensor | None:
        """The largest weights of the mask: s_t = S (1 - (1 - t/T)^n) of all are 0 after round t."""
        left = max(0.0, 1.0 - (state.round + 1) / self.until)
        keep = target_count(layout.prunable_size, self.sparsity * (1.0 - left**self.exponent))
        outside = ~state.mask
        return top_k_mask(weights[: layout.prunable_size].abs().masked_fill(outside, -1.0), keep)

    def problems(self, config: Any) -> Iterator[str]:
        """Rounds that end before the schedule would leave a model denser than it says."""
        if self.until > config.rounds:
            yield f"algorithm.until = {self.until}: the run has {config.rounds} rounds"
