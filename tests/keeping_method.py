"""A method that uses what few need: state of the client's own, and floats that travel beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms import Algorithm, Carried, Client, ParameterLayout, ServerState, hyperparameter


class KeepingClient(Client):
    """Each step is pulled to what the client trained last time, and by what the server says."""

    def begin(self) -> None:
        """Count the visit; look at what was received."""
        visit = self.visit
        self.last = visit.kept.get("last", visit.global_weights[: visit.layout.trained_size].clone())
        visit.kept["visits"] = visit.kept.get("visits", torch.zeros(1, device=visit.weights.device)) + 1
        self.pull = float(visit.carried["pull"][0])

    def after_backward(self) -> None:
        """The gradient of a proximal term to the last local model."""
        visit = self.visit
        visit.gradient.add_(visit.weights - self.last, alpha=self.method.strength + self.pull)

    def finish(self) -> None:
        """Keep the local model; send how far it moved, how often the client came, and what it was told."""
        visit = self.visit
        visit.kept["last"] = visit.weights.clone()
        visit.carried["moved"].copy_((visit.weights - self.last).norm().reshape(1))
        visit.carried["visits"].copy_(visit.kept["visits"])
        visit.carried["sum"].add_(visit.kept["visits"])


@dataclass(frozen=True, kw_only=True)
class Keeping(Algorithm):
    """FedAvg whose clients remember their last model."""

    client = KeepingClient
    asynchronous = True

    strength: float = hyperparameter(0.1, "of the pull to the client's last model", low=0.0, high=10.0)

    def carries(self, layout: ParameterLayout) -> Mapping[str, Carried]:
        """``sum`` both ways, two numbers up, one down."""
        return {
            "pull": Carried(1, "down"),
            "moved": Carried(1, "up"),
            "sum": Carried(2, "both"),
            "visits": Carried(1, "up"),
        }

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """The last local model, and how often the client came."""
        return {"last": layout.trained_size, "visits": 1}

    def next_carried(
        self, state: ServerState, means: Mapping[str, Tensor], share: float, layout: ParameterLayout
    ) -> Mapping[str, Tensor]:
        """The pull follows from how far the clients moved."""
        return {**means, "pull": 0.01 * means["moved"] * share}
