"""FedSAM: every local step descends along the gradient at the worst point near the weights.

Qu et al., "Generalized Federated Learning via Sharpness Aware Minimization", ICML 2022, arXiv 2206.02618; so
also Caldarola et al., "Improving Generalization in Federated Learning by Seeking Flat Minima", ECCV 2022,
arXiv 2203.11834. SAM: Foret et al., ICLR 2021, arXiv 2010.01412.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter


class FedSAMClient(Client):
    """Two passes a step over one batch: up by rho along the gradient, then the gradient there.

    The ascent is along what a step would descend along, a mask's zeros left out, and moves w, not theta;
    weight decay and a proximal term belong to the step alone.
    """

    method: FedSAM

    def gradient(self, compute: Callable[[], Tensor]) -> Tensor:
        """dL/dw at w + rho g / |g|, for g = dL/dw at w; returns the loss at w."""
        visit, rho = self.visit, self.method.rho
        if rho == 0.0:
            return super().gradient(compute)
        drawn = _random_state(visit.weights)
        loss = super().gradient(compute).clone()
        # Running statistics are those of w, which is what travels and is evaluated.
        here, statistics = visit.weights.clone(), visit.model[visit.layout.trained_size :].clone()
        norm = torch.linalg.vector_norm(visit.gradient)
        visit.weights.add_(visit.gradient * (rho / (norm + 1e-12)))
        _restore(drawn, visit.weights)  # both passes drop the same units
        super().gradient(compute)
        visit.weights.copy_(here)
        visit.model[visit.layout.trained_size :] = statistics
        return loss


def _random_state(weights: Tensor) -> Tensor:
    """State of torch's generator where ``weights`` are."""
    return torch.cuda.get_rng_state(weights.device) if weights.is_cuda else torch.get_rng_state()


def _restore(state: Tensor, weights: Tensor) -> None:
    if weights.is_cuda:
        torch.cuda.set_rng_state(state, weights.device)
    else:
        torch.set_rng_state(state)


@dataclass(frozen=True, kw_only=True)
class FedSAM(Algorithm):
    """FedAvg with sharpness-aware local steps, at twice the FLOPs; rho 0 is FedAvg."""

    name = "fedsam"
    paper = "Qu et al., ICML 2022, arXiv 2206.02618; Caldarola et al., ECCV 2022, arXiv 2203.11834"
    shares_support = True
    departures = (
        "Plain FedSAM alone: neither momentum (MoFedSAM), nor the adaptive neighbourhood (ASAM), nor the "
        "averaged weights of Caldarola et al.",
    )
    client = FedSAMClient
    asynchronous = True

    rho: float = hyperparameter(
        0.05,
        "radius of the ascent, in the norm of all trained parameters",
        low=0.0,
        high=10.0,
        log=True,
        search=(0.01, 0.5),
        source="Foret et al.; 0.1 in Caldarola et al. on CIFAR-10 at alpha 0 and 0.05",
    )

    @property
    def least_passes(self) -> float:
        """Two, or one without an ascent."""
        return 2.0 if self.rho else 1.0
