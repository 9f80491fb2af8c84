"""FedDyn: a linear and a quadratic term in each client's loss, so that all agree where their sum is least.

Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, arXiv 2111.04263, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.parameters import ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer


class FedDynClient(Client):
    """Steps by g - h_i + alpha (w - w_t); keeps h_i, which never travels."""

    def begin(self) -> None:
        """Take h_i from the last visit; 0 at first."""
        super().begin()
        visit = self.visit
        self.linear = visit.kept.get("h", torch.zeros_like(visit.gradient))

    def after_backward(self) -> None:
        """g - h_i + alpha (w - w_t)."""
        visit, alpha = self.visit, self.method.alpha
        visit.gradient.sub_(self.linear).add_(visit.weights, alpha=alpha)
        visit.gradient.sub_(visit.global_weights[: visit.layout.trained_size], alpha=alpha)
        super().after_backward()

    def finish(self) -> Tensor | None:
        """h_i - alpha (w_i - w_t)."""
        visit = self.visit
        moved = visit.weights - visit.global_weights[: visit.layout.trained_size]
        visit.kept["h"] = self.linear - self.method.alpha * moved
        return super().finish()


@dataclass(frozen=True, kw_only=True)
class FedDyn(Algorithm):
    """Dynamic regularisation, at FedAvg's bytes; the model is w_t, not the mean of clients' last models."""

    name = "feddyn"
    paper = "Acar et al., ICLR 2021, arXiv 2111.04263"
    departures = (
        "What is evaluated is the server's model; the authors' curves are of the average of all clients' "
        "last models, the absent included, which no server has.",
        "alpha is the same for all clients; in the authors' code it is divided by a client's share of the "
        "samples.",
        "No gradient is clipped; in the authors' code its norm is, at 10, after the terms of alpha are "
        "added: local.clip_norm=10.",
    )
    client = FedDynClient
    weighting = "equal"
    kept_is_summed = True

    alpha: float = hyperparameter(
        0.01,
        "strength of the regularisation",
        low=1e-6,
        high=100.0,
        search=(1e-3, 1.0),
        log=True,
        source="the authors' code, 0.01 in all settings",
    )

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """The server's h is 0."""
        state = super().initial_state(weights, layout, rng)
        return replace(state, arrays={"h": torch.zeros(layout.trained_size)})

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """h - alpha |S|/N (mean - w_t), and w = mean - h / alpha."""
        after = super().advance(state, total, server, layout, share)
        trained = slice(0, layout.trained_size)
        mean = after.weights[trained].clone()
        h = state.arrays["h"] - self.alpha * share * (mean - state.weights[trained])
        after.weights[trained] = mean - h / self.alpha
        return replace(after, arrays={"h": h})

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """h_i."""
        return {"h": layout.trained_size}

    def layer_measures(self, state: ServerState, layout: ParameterLayout) -> Mapping[str, list[float]]:
        """Norm of the server's h in each layer: at low participation it can grow for many rounds."""
        return {"drift": [float(state.arrays["h"][entry.span].norm()) for entry in layout.prunable]}

    def problems(self, config: Any) -> Iterator[str]:
        """The server's step is the method's own."""
        if config.build_server() != ServerOptimizer():
            found = f"{config.server.name} with {config.server.options or 'its defaults'}"
            yield f"server.name: {found}; feddyn takes the server's step itself, leave the section out"
