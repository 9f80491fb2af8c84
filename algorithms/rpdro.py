"""R-PDRO: an adversary weighs the samples of every batch, and climbs where the model descends.

Michel, Hashimoto, Neubig, "Distributionally Robust Models with Parametric Likelihood Ratios", ICLR 2022,
arXiv 2204.06340: min over theta, max over psi of E[r l] - tau KL, with likelihood ratios r = exp f_psi(x)[y]
that are normalised in the batch. The adversary has the model's architecture, in evaluation mode always, and a
last layer that begins at 0, so that r begins at 1. The federated forms are this project's: an adversary a
client, which stays there, or one for all, which travels with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.parameters import Carried, ParameterLayout

#: Largest norm of the adversary's gradient, as in the authors' code.
_CLIP = 10.0
#: Largest |log Z| of a client.
_LOG_Z = 20.0


class RpdroClient(Client):
    """Descends along the weighted losses; the adversary ascends at the same point."""

    method: Rpdro

    def begin(self) -> None:
        """Take psi from the server, or from the last visit; at first it is w_t with a last layer of 0."""
        super().begin()
        visit, method = self.visit, self.method
        if method.adversary == "shared":
            self.psi = visit.carried["adversary"].clone()
        else:
            first = visit.kept.get("adversary")
            self.psi = without_head(visit.global_weights, visit.layout) if first is None else first.clone()
        if method.scope == "across":
            with torch.no_grad():
                outputs = [
                    self._logits(visit.inputs[start : start + visit.batch_size], self.psi)
                    for start in range(0, len(visit.targets), visit.batch_size)
                ]
            scores = torch.cat(outputs).gather(1, visit.targets[:, None])
            log_z = float(scores.logsumexp(0)) - math.log(len(scores))
            self.z = math.exp(min(max(log_z, -_LOG_Z), _LOG_Z))

    def _logits(self, inputs: Tensor, psi: Tensor) -> Tensor:
        """What the adversary says of each class, [B, classes]."""
        visit, trained = self.visit, self.visit.layout.trained_size
        module = visit.module
        module.eval()
        vector = torch.cat([psi, visit.global_weights[trained : visit.layout.model_size]])
        outputs: Tensor = torch.func.functional_call(module, visit.layout.split(vector), (inputs,))
        module.train()
        return outputs

    def gradient(self, compute: Callable[[], Tensor]) -> Tensor:
        """d mean(r l)/dw; then psi takes its step."""
        visit, method = self.visit, self.method
        psi = self.psi.requires_grad_()
        targets = visit.targets[visit.chosen]
        scores = self._logits(visit.batch, psi).gather(1, targets[:, None])[:, 0]
        ratios, log_ratios = ratios_of(scores, method.normalisation)
        seen: list[Tensor] = []

        def weighted(
            outputs: Tensor, targets: Tensor, objective: Callable[[Tensor, Tensor], Tensor]
        ) -> Tensor:
            seen.append(F.cross_entropy(outputs, targets, reduction="none"))
            return (ratios.detach() * seen[0]).mean()

        self.before_forward()
        found = visit.compute(weighted)
        self.after_backward()
        with torch.no_grad():
            visit.measure("kl", (ratios * log_ratios).mean())
            visit.measure("largest_ratio", ratios.max())
        rate = method.adversary_rate * visit.lr
        if rate:
            loss = adversary_loss(scores, seen[0].detach(), method)
            (slope,) = torch.autograd.grad(loss, psi)
            slope = slope * (_CLIP / (slope.norm() + 1e-6)).clamp(max=1.0)
            self.psi = (psi - rate * slope).detach()
        else:
            self.psi = psi.detach()
        return found

    def finish(self) -> Tensor | None:
        """Leave psi where it belongs; across clients send Z (w_i - w_t) and Z."""
        support = super().finish()
        visit = self.visit
        if self.method.adversary == "shared":
            visit.carried["adversary"].copy_(self.psi)
        else:
            visit.kept["adversary"] = self.psi
        if self.method.scope == "across":
            visit.weights.sub_(visit.global_weights[: visit.layout.trained_size]).mul_(self.z)
            visit.carried["z"].fill_(self.z)
        return support


def ratios_of(scores: Tensor, normalisation: str) -> tuple[Tensor, Tensor]:
    """R and log r of a batch, float32[B] each; by ``batch`` of mean 1, and exactly 1 where all are equal."""
    if normalisation == "self":
        return scores.exp(), scores
    shifted = scores - scores.max().detach()
    mean = shifted.exp().mean()
    return shifted.exp() / mean, shifted - mean.log()


def adversary_loss(scores: Tensor, losses: Tensor, method: Rpdro) -> Tensor:
    """-mean(r l) + tau mean(r log r), and of ratios that are not normalised lambda (log mean exp f)^2.

    Args:
        scores: f_psi(x)[y], float32[B].
        losses: l, float32[B].
        method: tau, the normalisation and lambda.
    """
    ratios, log_ratios = ratios_of(scores, method.normalisation)
    loss = -(ratios * losses).mean() + method.tau * (ratios * log_ratios).mean()
    if method.normalisation == "self":
        loss = loss + method.self_norm_lambda * (scores.logsumexp(0) - math.log(len(scores))) ** 2
    return loss


def without_head(weights: Tensor, layout: ParameterLayout) -> Tensor:
    """A copy of the trained span with a last layer of 0, float32[trained]."""
    copy = weights[: layout.trained_size].clone()
    for entry in layout.head:
        copy[entry.span] = 0.0
    return copy


@dataclass(frozen=True, kw_only=True)
class Rpdro(Algorithm):
    """Distributionally robust training by parametric likelihood ratios, at twice FedAvg's FLOPs."""

    name = "rpdro"
    paper = "Michel et al., ICLR 2022, arXiv 2204.06340"
    departures = (
        "The model's loss is a mean over the batch, as all others; in the authors' code it is a sum.",
        "The adversary steps by plain gradient, the authors' by AdamW; its last layer begins at 0.",
        "What is kept is the last model; the authors choose one by its worst weighted validation error.",
    )
    client = RpdroClient
    least_passes = 1.0

    tau: float = hyperparameter(
        0.01,
        "weight of the adversary's KL divergence",
        low=0.0,
        high=100.0,
        log=True,
        search=(0.001, 1.0),
        source="the authors' README run; their parser has 1",
    )
    adversary_rate: float = hyperparameter(
        1.0,
        "the adversary's rate over the local one; 0: it stays",
        low=0.0,
        high=100.0,
        source="README: equal",
    )
    normalisation: str = hyperparameter(
        "batch", "mean ratio 1 in each batch, or a penalty for another mean", choices=("batch", "self")
    )
    self_norm_lambda: float = hyperparameter(1.0, "weight of that penalty", low=0.0, high=1000.0)
    adversary: str = hyperparameter(
        "client",
        "one a client, which it keeps, or one that travels with the model",
        choices=("client", "shared"),
    )
    scope: str = hyperparameter(
        "within",
        "what ratios weigh: samples within a batch, or by a client's mean ratio its update too (across)",
        choices=("within", "across"),
    )

    @property
    def uploads_differences(self) -> bool:
        """Across clients updates are weighted, which is done to their differences."""
        return self.scope == "across"

    def problems(self, config: Any) -> Iterator[str]:
        """Ratios are compared across clients where they are of one adversary; losses are of classes."""
        if self.scope == "across" and self.adversary != "shared":
            yield "algorithm.scope: across compares clients by one adversary; set algorithm.adversary=shared"
        if self.scope == "across" and config.max_update_norm is not None:
            yield (
                f"max_update_norm: {config.max_update_norm:g}; with algorithm.scope=across an update is sent "
                "times its client's mean ratio, leave it out"
            )
        if config.objective.name != "classification":
            yield f"objective.name: {config.objective.name}; rpdro weighs the losses of classes"

    def carries(self, layout: ParameterLayout) -> Mapping[str, Carried]:
        """Psi both ways and, across clients, up a client's mean ratio."""
        if self.adversary == "client":
            return {}
        both = {"adversary": Carried(layout.trained_size)}
        return both | {"z": Carried(1, "up")} if self.scope == "across" else both

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """The client's own psi."""
        return {"adversary": layout.trained_size} if self.adversary == "client" else {}

    def personal_weights(
        self, weights: Tensor, received: Tensor, kept: Mapping[str, Tensor], layout: ParameterLayout
    ) -> Tensor:
        """What came of the training: across clients Z times as far from what was received is sent."""
        if self.scope == "across":
            own, start = (vector[: layout.trained_size] for vector in (weights, received))
            own.sub_(start).div_(layout.split(weights, layout.carried)["z"]).add_(start)
        return weights

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """A shared adversary begins as the model does, with a last layer of 0."""
        if self.adversary == "shared":
            layout.split(weights, layout.carried)["adversary"].copy_(without_head(weights, layout))
        return super().initial_state(weights, layout, rng)

    def aggregate(self, state: ServerState, total: Total, layout: ParameterLayout) -> Tensor:
        """Across clients sum n Z (w_i - w_t) / sum n Z."""
        mean = super().aggregate(state, total, layout)
        if self.scope == "across":
            mean[: layout.trained_size] /= layout.split(mean, layout.up)["z"]
        return mean
