"""SCAFFOLD: control variates take out of each local step what pulls the clients apart.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
arXiv 1910.06378, algorithm 1. The server's c is the mean of all clients' c_i, the unseen counting 0, so it
moves by the share of the population that took part; taking the cohort's mean of c_i for the next c would be
right at full participation alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.local_optimizers import Sgd
from algorithms.core.parameters import Carried, ParameterLayout


class ScaffoldClient(Client):
    """Steps by g - c_i + c; keeps c_i and sends its change beside the weights."""

    def begin(self) -> None:
        """Take c from the server and c_i from the last visit; both are 0 at first."""
        super().begin()
        visit = self.visit
        self.server = visit.carried["c"].clone()
        self.own = visit.kept.get("c", torch.zeros_like(self.server))
        self.correction = self.server - self.own
        self.local_gradient = self._local_gradient() if self.method.option == "I" else None

    def after_backward(self) -> None:
        """g - c_i + c."""
        self.visit.gradient.add_(self.correction)
        super().after_backward()

    def finish(self) -> Tensor | None:
        """c_i+: the gradient at w_t (I), or c_i - c + (w_t - w_i) / (sum of learning rates) (II)."""
        visit = self.visit
        new = self.local_gradient
        if new is None:
            moved = visit.global_weights[: visit.layout.trained_size] - visit.weights
            new = moved / visit.lr_sum - self.correction
        visit.carried["c"].copy_(new - self.own)
        visit.kept["c"] = new
        return super().finish()

    def _local_gradient(self) -> Tensor:
        """Gradient of the client's whole loss at w_t, float32[trained]: a pass over its data."""
        visit, samples = self.visit, len(self.visit.targets)
        statistics = visit.model[visit.layout.trained_size :].clone()
        mean = torch.zeros_like(visit.gradient)
        for start in range(0, samples, visit.batch_size):
            rows = slice(start, start + visit.batch_size)
            visit.gradient_of(visit.inputs[rows], visit.targets[rows])
            mean.add_(visit.gradient, alpha=len(visit.targets[rows]) / samples)
        visit.model[visit.layout.trained_size :] = statistics  # BatchNorm's are of the local steps alone
        return mean


@dataclass(frozen=True, kw_only=True)
class Scaffold(Algorithm):
    """FedAvg with control variates, which travel both ways: twice FedAvg's bytes."""

    name = "scaffold"
    paper = "Karimireddy et al., ICML 2020, arXiv 1910.06378"
    client = ScaffoldClient
    weighting = "equal"
    kept_is_summed = True

    option: str = hyperparameter(
        "II",
        "c_i from the local steps (II), or from one more pass over the client's data at w_t (I)",
        choices=("II", "I"),
        source="algorithm 1, line 12; the authors' experiments use II",
    )

    def problems(self, config: Any) -> Iterator[str]:
        """Option II takes c_i from what plain steps have moved."""
        if self.option == "I":
            return
        if config.build_local_optimizer() != Sgd():
            yield (
                f"local.optimizer.name: {config.local.optimizer.name} does not step along the gradient "
                "alone, from which scaffold's option II takes c_i; set plain sgd, or algorithm.option=I"
            )
        if config.local.clip_norm is not None:
            yield (
                f"local.clip_norm: {config.local.clip_norm:g} cuts the steps from which scaffold's option II "
                "takes c_i; leave it out, or set algorithm.option=I"
            )

    def carries(self, layout: ParameterLayout) -> Mapping[str, Carried]:
        """Down c, up the change of c_i."""
        return {"c": Carried(layout.trained_size)}

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """c_i."""
        return {"c": layout.trained_size}

    def next_carried(
        self, state: ServerState, means: Mapping[str, Tensor], share: float, layout: ParameterLayout
    ) -> Mapping[str, Tensor]:
        """C + |S|/N mean(c_i+ - c_i), line 17; with weights n_i the same of the samples."""
        return {"c": layout.split(state.weights, layout.carried)["c"] + share * means["c"]}
