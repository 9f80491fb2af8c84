"""Federated meta-learning: clients train what a few steps on a few samples make of the weights.

First-order MAML on every batch, as Per-FedAvg does (Fallah, Mokhtari, Ozdaglar, NeurIPS 2020, arXiv
2002.07948): steps on the batch's support rows, then the gradient of its query rows there, applied at the old
point. With ``adapt=head`` and an interpolated start it has the two ideas of REFML (Cui et al., arXiv
2310.09002), of which no code is public: how it finds its coefficient and which layers its inner loop moves is
not known, so this is not its reproduction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.parameters import ParameterLayout

#: Points of [0, 1] that ``line`` tries, from the global model on.
POINTS = 11


class FedMetaClient(Client):
    """Starts between w_t and its own last model, and descends along the query rows' gradient.

    A new client that adapts takes the inner loop's steps alone.
    """

    method: FedMeta

    def begin(self) -> None:
        """w_t + a (w_i - w_t); before a client's first visit there is no w_i."""
        super().begin()
        visit, layout = self.visit, self.visit.layout
        self.spans = [
            entry.span for entry in (layout.head if self.method.adapt == "head" else layout.trained)
        ]
        own = visit.kept.get("model")
        if own is not None and self.method.interpolation != "none":
            start = visit.global_weights[: layout.trained_size]
            share = self._share(own)
            visit.measure("interpolation", share)
            visit.weights.copy_(own if share == 1.0 else start + share * (own - start))

    def _share(self, own: Tensor) -> float:
        """a: as configured, or the least loss on some rows of the client; the smaller one of equals."""
        visit, method = self.visit, self.method
        if method.interpolation == "fixed":
            return method.interpolation_weight
        samples = len(visit.targets)
        rows = torch.from_numpy(visit.rng.permutation(samples)[: self._support(samples)]).to(own.device)
        inputs, targets, point = visit.inputs[rows], visit.targets[rows], visit.global_weights.clone()
        start = visit.global_weights[: len(own)]
        losses = []
        for number in range(POINTS):
            point[: len(own)] = start + number / (POINTS - 1) * (own - start)
            losses.append(float(visit.objective(visit.forward(point, inputs), targets)))
        return losses.index(min(losses)) / (POINTS - 1)

    def _support(self, rows: int) -> int:
        """How many of some rows are for support: one at least, where one is left for the query."""
        return min(max(1, round(self.method.support * rows)), rows - 1)

    def gradient(self, compute: Callable[[], Tensor]) -> Tensor:
        """The gradient of the query rows at w - inner_lr (gradients of the support rows)."""
        visit, method = self.visit, self.method
        if visit.instructions.adapts:
            loss = super().gradient(compute)
            self._keep_head()
            visit.lr = method.inner_lr
            return loss
        cut = self._support(len(visit.chosen)) if method.inner_steps else 0
        if not cut:
            return super().gradient(compute)
        inputs, targets = visit.unattacked, visit.targets[visit.chosen]
        here, statistics = visit.weights.clone(), visit.model[visit.layout.trained_size :].clone()
        for _ in range(method.inner_steps):
            self._gradient_of(inputs[:cut], targets[:cut])
            self._keep_head()
            visit.weights.sub_(visit.gradient, alpha=method.inner_lr)
        visit.model[visit.layout.trained_size :] = statistics  # the query rows' alone
        loss = self._gradient_of(inputs[cut:], targets[cut:])
        visit.weights.copy_(here)
        return loss

    def _gradient_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.before_forward()
        loss = self.visit.gradient_of(inputs, targets)
        self.after_backward()
        return loss

    def _keep_head(self) -> None:
        """No gradient but of what adapts."""
        gradient = self.visit.gradient
        kept = [gradient[span].clone() for span in self.spans]
        gradient.zero_()
        for span, own in zip(self.spans, kept, strict=True):
            gradient[span] = own

    def finish(self) -> Tensor | None:
        """Keep the local model, where the next visit starts towards it."""
        if self.method.interpolation != "none":
            self.visit.kept["model"] = self.visit.weights.clone()
        return super().finish()


@dataclass(frozen=True, kw_only=True)
class FedMeta(Algorithm):
    """First-order federated meta-learning, for clients that are new: see ``evaluate_clients.unseen``."""

    name = "fedmeta"
    paper = "Fallah et al., NeurIPS 2020, arXiv 2002.07948; after REFML, Cui et al., arXiv 2310.09002"
    departures = (
        "The outer gradient is of first order; Per-FedAvg also has a Hessian variant.",
        "A batch is split in two; REFML's split, its layers and how it finds its coefficient are not known.",
    )
    client = FedMetaClient
    #: Support rows once an inner step, and the query rows.
    least_passes = 1.0

    inner_lr: float = hyperparameter(
        0.05, "step of the adaptation", low=0.0, high=1.0, log=True, search=(1e-3, 0.5)
    )
    inner_steps: int = hyperparameter(
        1, "steps of the adaptation; 0: FedAvg", low=0, high=5, source="PFLlib's Per-FedAvg"
    )
    support: float = hyperparameter(
        0.5, "share of a batch that is adapted to", low=0.2, high=0.8, source="PFLlib's Per-FedAvg"
    )
    adapt: str = hyperparameter(
        "all",
        "what the adaptation moves: all weights, or the last layer",
        choices=("all", "head"),
        source="head: as ANIL, and REFML as far as it is known",
    )
    interpolation: str = hyperparameter(
        "none",
        "where a client starts between the global and its last model: at the first, at a fixed place, or at "
        "the one of eleven with the least loss",
        choices=("none", "fixed", "line"),
        source="the idea is REFML's",
    )
    interpolation_weight: float = hyperparameter(
        0.0, "the place of `fixed`: 0 the global model, 1 the client's last", low=0.0, high=1.0
    )

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """The client's last model."""
        return {} if self.interpolation == "none" else {"model": layout.trained_size}
