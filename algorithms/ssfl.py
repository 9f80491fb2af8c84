"""SSFL: one mask for all, found before any training from the saliency of the common initialisation.

"Sparse, or not sparse: SSFL, discovering sparse sub-networks for efficient personalized federated learning",
TMLR 2026, arXiv 2405.09037; the score |gradient x weight| is that of SNIP (Lee et al., ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import target_count, top_k_mask
from algorithms.core.parameters import ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer
from algorithms.fixed_mask import MaskedClient, inside


class SSFLClient(MaskedClient):
    """Scores its weights before round 1, without a step; trains inside the mask from then on."""

    def train(self, batches: Iterable[Tensor]) -> Tensor:
        """``saliency``: |gradient x weight| of each batch in evaluation mode, their mean."""
        visit, method = self.visit, self.method
        if visit.instructions.phase != "saliency":
            return super().train(batches)
        scores, losses = torch.zeros_like(visit.prunable), torch.zeros((), dtype=torch.float64)
        visit.module.eval()
        for chosen in batches:
            losses += visit.gradient_of(visit.inputs[chosen], visit.targets[chosen]).cpu()
            scores += (visit.prunable_gradient * visit.prunable).abs()
        visit.module.train()
        # The mean on the server weighs by samples: a share of them each weighs all clients the same.
        equal = len(visit.targets) if method.saliency_weighting == "equal" else 1
        visit.prunable.copy_(scores / (method.saliency_batches * equal))
        return losses / method.saliency_batches


@dataclass(frozen=True, kw_only=True)
class SSFL(Algorithm):
    """A mask by saliency before round 1, then masked training: K values travel each way, no position."""

    name = "ssfl"
    paper = "arXiv 2405.09037, TMLR 2026"
    departures = (
        "The mask holds exactly K weights; in the authors' code ties with the K-th score are all kept.",
        "Scores are weighted by samples, as in the paper; the authors' code takes the plain mean: "
        "saliency_weighting=equal.",
    )
    client = SSFLClient

    sparsity: float = hyperparameter(
        0.5, "share of prunable weights outside the mask", low=0.0, high=0.9999, source="its main setting"
    )
    saliency_batches: int = hyperparameter(1, "batches of each client that are scored", low=1, high=100)
    saliency_weighting: str = hyperparameter(
        "samples",
        "how the clients' scores are averaged: by `samples` (paper), or `equal` (authors' code)",
        choices=("samples", "equal"),
    )
    saliency_clients: float = hyperparameter(
        1.0, "share of the clients that are asked for scores", low=1e-6, high=1.0, source="its runs ask all"
    )

    @property
    def first_round(self) -> int:
        """0: the scores come before round 1."""
        return 0

    @property
    def trains_zeros(self) -> bool:
        """|gradient x weight| of a zero is 0: it is in no mask."""
        return False

    @property
    def mean_alone(self) -> bool:
        """Of scores as of models."""
        return True

    # ---- server half

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """Dense, with what training will start from."""
        return ServerState(round=-1, weights=weights, arrays={"initial_weights": weights.clone()})

    def instruct(self, state: ServerState, rounds: int, clients: int) -> Instructions:
        """``saliency`` before round 1, of so many clients and batches."""
        told = super().instruct(state, rounds, clients)
        if told.round > 0:
            return told
        cohort = max(1, round(self.saliency_clients * clients))
        steps = self.saliency_batches
        return replace(told, phase="saliency", steps=steps, cohort=cohort, sends_model=False)

    def sends_mask(self, told: Instructions) -> bool:
        """Scores are dense, and from round 1 on there is one mask."""
        return True

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """After the stage: the top K of the mean scores, over all layers together; the initial weights."""
        if state.round >= 0:
            return super().advance(state, total, server, layout, share)
        scores = self.aggregate(state, total, layout)[: layout.prunable_size]
        mask = top_k_mask(scores, target_count(layout.prunable_size, self.sparsity))
        weights = inside(mask, state.arrays["initial_weights"])
        return ServerState(round=0, weights=weights, mask=mask, mask_version=1)

    def problems(self, config: Any) -> Iterator[str]:
        """Scores are divided by what the server multiplies them with."""
        if config.privacy.dp.asked:
            if self.saliency_weighting != "samples":
                yield (
                    f"algorithm.saliency_weighting: {self.saliency_weighting} divides scores by samples, and "
                    "with privacy.dp all clients weigh the same anyhow; leave it out"
                )
        elif config.weighting != "samples":
            yield (
                f"aggregation.weighting: {config.weighting}, and ssfl weighs by samples, its scores as "
                f"algorithm.saliency_weighting says ({self.saliency_weighting}); leave it out"
            )
