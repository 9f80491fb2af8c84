"""Error feedback: what a top-K cut leaves out waits at the client and is added to its next update.

Fed-EF: Li, Li, "Analysis of Error Feedback in Federated Non-Convex Optimization with Biased Compression",
ICML 2023, arXiv 2211.14292. ``step_ahead``: SA-PEF, TMLR 2026, arXiv 2601.20738.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import cut_globally
from algorithms.core.parameters import ParameterLayout


class FedEFClient(Client):
    """Trains dense and sends the top K of its update and of what waits; keeps the rest."""

    def begin(self) -> None:
        """Take what waits, and begin as far ahead along it as ``step_ahead`` says."""
        visit, method = self.visit, self.method
        self.residual = visit.kept.get("residual", torch.zeros_like(visit.prunable)) * method.residual_decay
        if method.step_ahead:
            visit.prunable.add_(self.residual, alpha=method.step_ahead)

    def finish(self) -> Tensor | None:
        """u = w_i - w_t + (1 - step_ahead) e; its top K travels, and exactly the rest is kept."""
        visit = self.visit
        visit.weights.sub_(visit.global_weights[: visit.layout.trained_size])
        visit.prunable.add_(self.residual, alpha=1.0 - self.method.step_ahead)
        whole = visit.prunable.clone()
        support = cut_globally(visit.prunable, visit.keep, visit.layout.prunable, guard=False)
        if self.method.after_loss == "restore":
            visit.kept_if_late["residual"] = whole.clone()
        visit.kept["residual"] = whole.masked_fill_(support, 0.0)
        return support


@dataclass(frozen=True, kw_only=True)
class FedEF(Algorithm):
    """Top-K of differences with a residual: nothing that a cut drops is lost, it arrives later.

    Biases, norms and buffers travel dense, and leave no residual. After a late update the residual is what
    ``after_loss`` says. A refused update has no trace: what waited goes on waiting, as an update that is too
    large or no number would be refused again. A device that drops out has not trained.
    """

    name = "fedef"
    paper = "Li and Li, ICML 2023, arXiv 2211.14292; step_ahead: TMLR 2026, arXiv 2601.20738"
    departures = (
        "Biases and norms travel dense; in the authors' code of SA-PEF the cut is over all parameters.",
    )
    client = FedEFClient
    weighting = "equal"
    unequal_sparsity = True
    follows_sparsity = True
    asynchronous = True

    sparsity: float = hyperparameter(
        0.95, "share of the prunable weights that waits", low=0.0, high=0.9999, source="published: .9 to .999"
    )
    step_ahead: float = hyperparameter(
        0.0,
        "share of the residual that is applied before local training, not after: 0 is Fed-EF",
        low=0.0,
        high=1.0,
        search=(0.0, 1.0),
        source="arXiv 2601.20738, 0.85 in its experiments",
    )
    averaging: str = hyperparameter(
        "plain",
        "mean over all clients, or over those that sent a weight (`masked`: steps up to a cohort larger)",
        choices=("plain", "masked"),
        source="the papers; the authors' code of SA-PEF",
    )
    residual_decay: float = hyperparameter(
        1.0, "what a residual is multiplied by at the client's next visit", low=0.0, high=1.0
    )
    after_loss: str = hyperparameter(
        "keep",
        "what waits after a late update: what the cut left, as if it had arrived (`keep`), or all of it, as "
        "the device is told (`restore`)",
        choices=("keep", "restore"),
    )

    @property
    def uploads_differences(self) -> bool:
        """w_i - w_t is sent."""
        return True

    @property
    def masked(self) -> bool:
        """Whether the mean is over the clients that sent a weight."""
        return self.averaging == "masked"

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """What waits."""
        return {"residual": layout.prunable_size}

    def cut(self, weights: Tensor, mask: Tensor | None, keep: int, layout: ParameterLayout) -> None:
        """Nothing: a tier's budget is one of what travels up, its devices hold the dense model."""
