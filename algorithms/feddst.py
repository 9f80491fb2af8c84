"""FedDST: clients readjust a shared sparse mask by magnitude and gradient, the server prunes the union back.

Bibikar et al., "Federated Dynamic Sparse Training: Computing Less, Communicating Less, Yet Learning Better",
AAAI 2022, arXiv 2112.09824. Readjustment follows RigL (Evci et al., arXiv 1911.11134).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import ServerState
from algorithms.core.client import Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import exchangeable, layer_counts, prune_and_grow, top_of_union
from algorithms.core.parameters import ParameterLayout
from algorithms.fixed_mask import FixedMask, MaskedClient


class FedDSTClient(MaskedClient):
    """Trains inside the mask; in a readjustment round exchanges a share of it before sending."""

    method: FedDST

    def finish(self) -> Tensor | None:
        """Readjust: drop a share a_t of each layer's mask by magnitude, regrow as many by |gradient|."""
        visit = self.visit
        if visit.instructions.phase.startswith("readjust") and self.mask is not None:
            layers = visit.layout.prunable
            exchanged = exchangeable(visit.instructions.value, layer_counts(self.mask, layers), layers)
            drops, growths = self.exchange(exchanged)
            scores, magnitudes = self.growth_scores(), visit.prunable.abs()
            kept, grown = prune_and_grow(magnitudes, self.mask, drops, growths, scores, layers)
            visit.prunable.masked_fill_(~kept, 0.0)
            # Grown weights start at 0 and belong to the mask: they travel, and count in sum n m.
            self.mask = kept | grown
        return self.mask

    def exchange(self, exchanged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions that each layer drops and grows, of those that it can exchange, int64[layers]."""
        return exchanged, exchanged

    def growth_scores(self) -> Tensor:
        """Where weights grow, the largest first, float32[prunable]: |gradient| of one batch.

        At the trained, not yet pruned weights; running statistics stay.
        """
        visit = self.visit
        buffers = visit.model[visit.layout.trained_size :]
        before = buffers.clone()
        chosen = visit.draw()
        visit.gradient_of(visit.inputs[chosen], visit.targets[chosen])
        buffers.copy_(before)
        return visit.prunable_gradient.abs()


@dataclass(frozen=True, kw_only=True)
class FedDST(FixedMask):
    """Dynamic sparse training across clients; a_0 = 0 is ``fixed_mask``. This follows the paper."""

    name = "feddst"
    shares_support = False
    paper = "Bibikar et al., AAAI 2022, arXiv 2112.09824"
    departures = (
        "The annealing starts at a_0; in the authors' code at its square (their 0.5 is 0.25 here).",
        "Rounds 15, 30, ... readjust, by readjust_interval; in the authors' code rounds 2, 12, ...",
        "Growth picks positions outside the live mask; in the authors' code it may pick, and reset, "
        "others too.",
        "Plain SGD; the authors use momentum 0.9.",
    )
    client = FedDSTClient
    asynchronous = False  # masks move

    readjust_interval: int = hyperparameter(
        15,
        "rounds between readjustments, which end after half of the rounds",
        low=1,
        high=10000,
        search=(5, 30),
        source="delta R; 15 for CIFAR-10 in the authors' README",
    )
    readjust_fraction: float = hyperparameter(
        0.01,
        "a_0, share of each layer's mask that is exchanged; cosine-annealed to 0 at half of the rounds",
        low=0.0,
        high=1.0,
        log=True,
        search=(0.001, 0.5),
        source="alpha; .01 for CIFAR-10 in the authors' README, .5 their code's default (it squares it)",
    )

    # ---- server half

    def instruct(self, state: ServerState, rounds: int, clients: int) -> Instructions:
        """Every ``readjust_interval``-th round until half of them: a_t = a_0 / 2 (1 + cos(pi t / (T/2)))."""
        told = super().instruct(state, rounds, clients)
        share = told.round / (rounds / 2)
        if told.round % self.readjust_interval or share >= 1.0:
            return told
        fraction = self.readjust_fraction / 2 * (1 + math.cos(math.pi * share))
        return replace(told, phase="readjust", value=fraction)

    def sends_mask(self, told: Instructions) -> bool:
        """Between readjustments."""
        return not told.phase.startswith("readjust")

    def next_mask(
        self, state: ServerState, weights: Tensor, total: Total, layout: ParameterLayout
    ) -> Tensor | None:
        """The union of the clients' masks, pruned layer by layer to the old mask's counts by magnitude.

        Where clients of a smaller budget leave a union too small, the rest is filled from the old mask.
        """
        union = torch.from_numpy(total.held)
        assert state.mask is not None
        if not (union & ~state.mask).any():
            return state.mask  # nobody grew anything
        counts = self.next_counts(state.mask, total, layout)
        magnitudes = weights[: layout.prunable_size].abs()
        return top_of_union(magnitudes, union, state.mask, counts, layout.prunable)

    def next_counts(self, mask: Tensor, total: Total, layout: ParameterLayout) -> np.ndarray:
        """Positions of each layer after a readjustment, int64[layers]: as many as before."""
        return layer_counts(mask, layout.prunable)
