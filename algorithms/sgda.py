"""Local gradient descent ascent: clients train a model against one perturbation of all inputs.

min over w, max over u of sum n_i/N f_i(w; x + u) - ridge/2 |u|^2, or |u| <= ball: u is the parameter
``perturbation`` of the model (``model.perturbation=true``) and is averaged like the others. A model is judged
without it. Deng and Mahdavi, "Local Stochastic Gradient Descent Ascent", AISTATS 2021, arXiv 2102.13152.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from algorithms.core.algorithm import Algorithm
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.parameters import Carried, Entry, ParameterLayout


def ascending(layout: ParameterLayout) -> Entry | None:
    """The parameter that ascends; None where all descend."""
    found = [entry for entry in layout.other if entry.name.split(".")[-1] == "perturbation"]
    return found[0] if found else None


def turn(gradient: Tensor, weights: Tensor, layout: ParameterLayout, ridge: float) -> None:
    """Make the gradient the saddle's operator, (df/dw, -df/du + ridge u), in place."""
    entry = ascending(layout)
    if entry is not None:
        gradient[entry.span] = ridge * weights[entry.span] - gradient[entry.span]


def confine(weights: Tensor, layout: ParameterLayout, ball: float) -> None:
    """Project u on the ball of the largest magnitude, in place; 0 is no ball."""
    entry = ascending(layout)
    if entry is not None and ball:
        weights[entry.span].clamp_(-ball, ball)


def without_perturbation(weights: Tensor, layout: ParameterLayout) -> Tensor:
    """A copy in which u is 0, as a model is judged."""
    entry, weights = ascending(layout), weights.clone()
    if entry is not None:
        weights[entry.span] = 0.0
    return weights


class SgdaClient(Client):
    """Descends along w and ascends along u with one rate."""

    method: Sgda

    def after_backward(self) -> None:
        """The operator instead of the gradient."""
        visit = self.visit
        turn(visit.gradient, visit.weights, visit.layout, self.method.ridge)
        super().after_backward()

    def after_step(self) -> None:
        """Stay in the ball."""
        super().after_step()
        confine(self.visit.weights, self.visit.layout, self.method.ball)


@dataclass(frozen=True, kw_only=True)
class Sgda(Algorithm):
    """FedAvg on a saddle problem; of a model without a perturbation it is FedAvg, and refused."""

    name = "sgda"
    paper = "Deng and Mahdavi, AISTATS 2021, arXiv 2102.13152"
    departures = ("One rate for descent and ascent, the local one.",)
    client = SgdaClient

    ridge: float = hyperparameter(
        0.0,
        "lambda: ridge/2 |u|^2 is taken off the saddle",
        low=0.0,
        high=100.0,
        search=(0.01, 10.0),
        log=True,
    )
    ball: float = hyperparameter(
        0.0, "largest magnitude of u, in the unit of the inputs; 0: none", low=0.0, high=10.0
    )

    def carries(self, layout: ParameterLayout) -> Mapping[str, Carried]:
        """Nothing.

        Raises:
            ValueError: Nothing ascends.
        """
        if ascending(layout) is None:
            raise ValueError(NEEDS.format(self.name))
        return {}

    def effective_weights(self, weights: Tensor, layout: ParameterLayout) -> Tensor:
        """The model without the perturbation."""
        return without_perturbation(weights, layout)


#: Why a model is refused.
NEEDS = (
    "algorithm.name: {} solves saddle problems, and the model has no parameter called perturbation; set "
    "model.perturbation=true (linear, mlp), or take another method to minimise"
)
