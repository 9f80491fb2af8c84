"""EF21: clients and server hold an estimate of every client's update, and only its top-K changes travel.

Richtarik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error
Feedback", NeurIPS 2021, arXiv 2106.05203; with partial participation arXiv 2110.03294.
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
from algorithms.core.masks import cut_globally
from algorithms.core.parameters import ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer


class EF21Client(Client):
    """Sends the top K of what its update differs by from the estimate; keeps the estimate, g_i."""

    def finish(self) -> Tensor | None:
        """c = top K of (w_i - w_t - g_i), and g_i + c."""
        visit = self.visit
        estimate = visit.kept.get("estimate", torch.zeros_like(visit.weights))
        visit.weights.sub_(visit.global_weights[: visit.layout.trained_size]).sub_(estimate)
        support = cut_globally(visit.prunable, visit.keep, visit.layout.prunable, guard=False)
        visit.kept["estimate"] = estimate + visit.weights
        return support


@dataclass(frozen=True, kw_only=True)
class EF21(Algorithm):
    """The server steps by the mean of all clients' estimates, the absent included, every round.

    It is no residual feedback: a client that is away keeps pushing its last estimate. With few participants
    the mean is a memory of many rounds, and a large step diverges.
    """

    name = "ef21"
    paper = "Richtarik et al., NeurIPS 2021, arXiv 2106.05203; partial participation: arXiv 2110.03294"
    departures = (
        "The estimate is of w_i - w_t after the local steps; the analysis is of one full gradient.",
        "The first estimate is 0; in the authors' code it is the first update, uncompressed and not billed.",
        "Biases and norms travel dense.",
    )
    client = EF21Client
    weighting = "equal"
    kept_is_summed = True
    unequal_sparsity = True
    follows_sparsity = True

    sparsity: float = hyperparameter(
        0.95, "share of the prunable weights whose change does not travel", low=0.0, high=0.9999
    )
    step: float = hyperparameter(
        0.5,
        "the server's step along the mean estimate",
        low=1e-4,
        high=1.0,
        search=(0.05, 1.0),
        log=True,
    )

    @property
    def uploads_differences(self) -> bool:
        """Changes of the estimate of w_i - w_t are sent."""
        return True

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """The mean estimate, G, is 0."""
        return ServerState(round=0, weights=weights, arrays={"estimate": torch.zeros(layout.trained_size)})

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """G + |S|/N mean(c), and w + step G; float buffers take the plain mean."""
        weights, trained = self.aggregate(state, total, layout), layout.trained_size
        estimate = state.arrays["estimate"] + share * weights[:trained]
        weights[:trained] = state.weights[:trained] + self.step * estimate
        return replace(state, round=state.round + 1, weights=weights, arrays={"estimate": estimate})

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """g_i."""
        return {"estimate": layout.trained_size}

    def personal_weights(
        self, weights: Tensor, received: Tensor, kept: Mapping[str, Tensor], layout: ParameterLayout
    ) -> Tensor:
        """w_t + g_i: what is sent is only what g_i changes by."""
        trained = layout.trained_size
        weights[:trained] = received[:trained] + kept["estimate"]
        return self.effective_weights(weights, layout)

    def problems(self, config: Any) -> Iterator[str]:
        """The server's step is the method's own, and both sides must add the same numbers up."""
        if config.wire.uplink != "float32":
            yield (
                f"wire.uplink: {config.wire.uplink} rounds what the server adds to its estimates, and ef21's "
                "clients add the exact values to theirs; leave it at float32"
            )
        if config.wire.bits is not None:
            yield (
                f"wire.grid: {config.wire.bits} rounds what the server adds to its estimates, and ef21's "
                "clients add the exact values to theirs; leave it at exact"
            )
        if config.build_server() != ServerOptimizer():
            yield (
                f"server.name: {config.server.name}, but ef21 takes the server's step itself "
                "(algorithm.step); leave the section out"
            )

    def cut(self, weights: Tensor, mask: Tensor | None, keep: int, layout: ParameterLayout) -> None:
        """Nothing: a tier's budget is one of what travels up, its devices hold the dense model."""
