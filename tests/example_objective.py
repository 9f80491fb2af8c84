"""Objectives of one's own: ``objective.name=tests.example_objective:Regression``."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from algorithms.core.hyperparameters import hyperparameter
from cluster.measures import Measure
from cluster.workload.datasets import Dataset
from cluster.workload.objectives import Objective, Sums


@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """A number for each sample, by its squared error."""

    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("rmse", "root mean squared error", "", "Root of the mean squared error.", "lower"),
        Measure("mae", "mean absolute error", "", "Mean absolute error.", "lower"),
        Measure("r2", "R2", "", "1 - squared error over the targets' variance.", "higher"),
    )

    def count(self, dataset: Dataset) -> int:
        return 1

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, 0], targets.to(outputs.dtype))

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        values = targets.double()
        errors = outputs[:, 0].double() - values
        return {
            "samples": len(values),
            "squared": float((errors**2).sum()),
            "absolute": float(errors.abs().sum()),
            "targets": float(values.sum()),
            "targets_squared": float((values**2).sum()),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        samples = sums["samples"]
        spread = sums["targets_squared"] - sums["targets"] ** 2 / samples
        return {
            "rmse": math.sqrt(sums["squared"] / samples),
            "mae": sums["absolute"] / samples,
            "r2": 1.0 - sums["squared"] / spread if spread else math.nan,
        }


@dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """The token that follows each token; padding is neither learned nor counted."""

    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("perplexity", "perplexity", "", "Exponential of the mean loss of a token.", "lower"),
        Measure("token_accuracy", "token accuracy", "share", "Share of the tokens foretold.", "higher"),
    )
    padding: int = hyperparameter(0, "token that fills a sequence up")
    vocabulary: int = hyperparameter(5, "number of tokens", low=1)

    def count(self, dataset: Dataset) -> int:
        return self.vocabulary

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        summed = F.cross_entropy(
            outputs.flatten(0, 1), targets.flatten(), ignore_index=self.padding, reduction="sum"
        )
        return summed / (targets != self.padding).sum().clamp(min=1)

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        seen = targets != self.padding
        loss = F.cross_entropy(outputs[seen].double(), targets[seen], reduction="sum")
        hits = (outputs.argmax(-1) == targets) & seen
        return {"tokens": int(seen.sum()), "correct": int(hits.sum()), "loss": float(loss)}

    def metrics(self, sums: Sums) -> dict[str, float]:
        tokens = sums["tokens"]
        return {
            "perplexity": float(np.exp(sums["loss"] / tokens)),
            "token_accuracy": sums["correct"] / tokens,
        }


@dataclass(frozen=True, kw_only=True)
class Unmeasured(Objective):
    """Declares nothing that selects."""


@dataclass(frozen=True, kw_only=True)
class Talkative(Regression):
    """Measures what it does not declare."""

    def metrics(self, sums: Sums) -> dict[str, float]:
        return {**super().metrics(sums), "bias": 0.0}


@dataclass(frozen=True, kw_only=True)
class Vectorial(Regression):
    """Its loss is no scalar."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets) ** 2


@dataclass(frozen=True, kw_only=True)
class Broken(Regression):
    """Its sums fail."""

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        raise ValueError("planted")
