"""What is learned: the loss of training, what an evaluation adds up, and what is read off the sums.

An objective is a file's worth of code: a frozen dataclass whose fields, if it has any, are its options, and
whose measures say what is better. One of a user's own is ``objective.name=module:attribute``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.configuration.choices import ChoiceError
from cluster.configuration.config import Config
from cluster.measures import Measure, from_values
from cluster.references import DataError
from cluster.workload.datasets import Dataset

#: What targets are read as, see :attr:`Objective.targets`.
Targets = Literal["classes", "numbers", "label_sets", "tokens"]

#: What was counted or added up over some samples, by name: numbers and arrays, of which ``+`` makes those of
#: more samples.
Sums = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is learned. Subclass it; see :class:`Classification`."""

    name: ClassVar[str] = ""
    #: What an evaluation measures. The first one selects: the best round, checkpoint and configuration.
    measures: ClassVar[tuple[Measure, ...]] = ()
    #: Whether ``targets`` are the classes of the samples, int64[N]: partitions by class, validation data by
    #: class and the evaluation of clients, each on its own classes, take that.
    by_class: ClassVar[bool] = False
    #: Whether samples are tokens of a text: `data` is then read as one, see :mod:`cluster.workload.text`.
    takes_text: ClassVar[bool] = False
    #: What the targets are read as, see :mod:`cluster.workload.targets`; ``tokens``: those of the text.
    targets: ClassVar[Targets] = "classes"
    #: What a model's outputs are, for messages; ``{count}`` is how many there are of each.
    outputs_are: ClassVar[str] = "outputs"

    def __post_init__(self) -> None:
        if not self.measures or self.selects.better is None:
            raise ValueError(f"{type(self).__name__} declares no measure of which more or less is better")

    @property
    def selects(self) -> Measure:
        """The measure that the best round, checkpoint and configuration are selected by."""
        return self.measures[0]

    def count(self, dataset: Dataset) -> int:
        """How many outputs a model gives for each target (what a model's builder is told as ``classes``).

        Raises:
            DataError: The data set has no targets of this kind.
        """
        raise NotImplementedError

    def shape(self, targets: np.ndarray, count: int) -> tuple[int, ...]:
        """Shape of a model's outputs for these targets: one output after the other for each of them."""
        return (*targets.shape, count)

    def fits(self, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        """Whether outputs of one shape do where another one is expected."""
        return found == wanted

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, a scalar to be differentiated.

        It launches the same work whatever the values are, and reads nothing back from the device, so that a
        step can be recorded.

        Args:
            outputs: What the model returned.
            targets: Rows of :attr:`Split.targets`.
        """
        raise NotImplementedError

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """What a batch of an evaluation adds to the sums, read back from the device.

        Batches are fixed and added in a fixed order, so that the sums do not depend on who computes them.
        """
        raise NotImplementedError

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """An error of each sample, the larger the worse, float[n]: of several attacks the worst one counts.

        By default the loss of the sample alone.
        """
        return torch.stack([self.loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))])

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Every one of ``measures`` by its key, of the sums over a whole split."""
        raise NotImplementedError

    def metric_by_class(self, sums: Sums) -> np.ndarray:
        """What selects, within every class, float64[at least classes]; asked for where ``by_class`` alone.

        Its mean, weighted by a client's class shares, is what is to be expected of the client. A class
        without samples may have any finite value.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Classification(Objective):
    """One class for each sample, by cross-entropy of logits."""

    name: ClassVar[str] = "classification"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("accuracy", "accuracy", "share", "Share of the samples whose largest logit is that of their "
                "class.", "higher"),
        Measure("loss", "loss", "nats", "Mean cross-entropy, in float64.", "lower"),
    )  # fmt: skip
    by_class: ClassVar[bool] = True
    outputs_are: ClassVar[str] = "logits, one for each of the {count} classes"

    def count(self, dataset: Dataset) -> int:
        """See :class:`Objective`: a logit for each class."""
        if not dataset.classes:
            found = "tokens" if dataset.vocabulary else "numbers"
            fitting = "language_model or sequence_classification" if dataset.vocabulary else "regression"
            raise DataError(
                f"objective.name: classification, but the targets of data.name = {dataset.name!r} are "
                f"{found}; set objective.name={fitting}"
            )
        return len(dataset.classes)

    def fits(self, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        """See :class:`Objective`; more logits than classes do."""
        return len(found) == len(wanted) and found[:-1] == wanted[:-1] and found[-1] >= wanted[-1]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Objective`: mean cross-entropy."""
        return F.cross_entropy(outputs, targets)

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Samples and correct predictions of every class, int64[logits], and summed cross-entropy."""
        hits = targets[outputs.argmax(1) == targets]
        logits = outputs.shape[1]
        return {
            "samples": np.bincount(targets.cpu().numpy(), minlength=logits),
            "correct": np.bincount(hits.cpu().numpy(), minlength=logits),
            "loss": float(F.cross_entropy(outputs.double(), targets, reduction="sum")),
        }

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Objective`: the largest other logit less that of the class; wrong is above 0."""
        own = targets[:, None]
        others = outputs.scatter(1, own, -math.inf)
        return others.amax(1) - outputs.gather(1, own)[:, 0]

    def metrics(self, sums: Sums) -> dict[str, float]:
        """See :class:`Objective`."""
        samples = int(sums["samples"].sum())
        return {"accuracy": int(sums["correct"].sum()) / samples, "loss": sums["loss"] / samples}

    def metric_by_class(self, sums: Sums) -> np.ndarray:
        """See :class:`Objective`: accuracy."""
        shares: np.ndarray = sums["correct"] / np.maximum(sums["samples"], 1)
        return shares


@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """Numbers for each sample, by their squared errors."""

    name: ClassVar[str] = "regression"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("rmse", "RMSE", "", "Root of the mean squared error, in the targets' unit.", "lower"),
        Measure("mae", "MAE", "", "Mean absolute error, in the targets' unit.", "lower"),
        Measure("r2", "R2", "", "1 less the squared error over that of the targets' own mean.", "higher"),
    )
    targets: ClassVar[Targets] = "numbers"
    outputs_are: ClassVar[str] = "{count} for each sample, one for each of its numbers"

    def count(self, dataset: Dataset) -> int:
        """See :class:`Objective`: as many as the targets have columns."""
        if dataset.train.targets.dtype.kind != "f":
            found = "tokens" if dataset.vocabulary else "classes"
            fitting = "language_model" if dataset.vocabulary else "classification"
            raise DataError(
                f"objective.name: regression, but the targets of data.name = {dataset.name!r} are codes of "
                f"{found}, which are no quantities; set objective.name={fitting}"
            )
        return math.prod(dataset.train.targets.shape[1:])

    def shape(self, targets: np.ndarray, count: int) -> tuple[int, ...]:
        """See :class:`Objective`: a column for each number."""
        return (len(targets), count)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Objective`: mean squared error."""
        return F.mse_loss(outputs.float(), targets.float().view_as(outputs))

    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Number of samples; errors and targets, and their squares, of each column in float64."""
        values = targets.double().view_as(outputs)
        errors = outputs.double() - values
        columns = {
            "squared": errors**2,
            "absolute": errors.abs(),
            "targets": values,
            "targets_squared": values**2,
        }
        return {"samples": len(values), **{name: own.sum(0).cpu().numpy() for name, own in columns.items()}}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """See :class:`Objective`; r2 is not a number where all targets are equal."""
        samples, squared = sums["samples"], float(sums["squared"].sum())
        values = samples * len(sums["squared"])
        spread = float((sums["targets_squared"] - sums["targets"] ** 2 / samples).sum())
        return {
            "rmse": math.sqrt(squared / values),
            "mae": float(sums["absolute"].sum()) / values,
            "r2": 1.0 - squared / spread if spread > 0.0 else math.nan,
        }


def selects_of(summary: Mapping[str, Any]) -> Measure:
    """What selects, as a result says; version 0.1 knew accuracy alone."""
    stored = summary.get("objective", {}).get("metrics")
    return from_values(stored)[0] if stored else Classification.measures[0]


def selecting(config: Config, line: Mapping[str, Any] | None = None) -> Measure:
    """What selects in an experiment.

    Args:
        config: The experiment.
        line: One of its lines; the first metric in it is what selects where the experiment names code that is
            not to be imported.
    """
    if not (config.inert and ":" in config.objective.name):
        objective: Objective = config.build_objective()
        return objective.selects
    key = next((key.partition("/")[2] for key in line or () if key.startswith(("test/", "val/"))), "metric")
    return Measure(key, key.replace("_", " "), "", "")


def added(first: Sums, second: Sums) -> Sums:
    """The sums over the samples of both."""
    return {name: first[name] + second[name] for name in first}


def check_objective(objective: Objective, outputs: Tensor, targets: Tensor) -> None:
    """Compute loss and metrics of a few samples, to find before the first round what would end training.

    Args:
        objective: The objective.
        outputs: What the untrained model returned, with its graph.
        targets: The targets of the same samples.

    Raises:
        ChoiceError: It fails on them, or gives something else than it declares.
    """
    place = f"objective.name: {objective.name or type(objective).__name__}"
    shapes = f"outputs {list(outputs.shape)} and targets {list(targets.shape)}"
    try:
        loss = objective.loss(outputs, targets)
        measured = objective.metrics(objective.sums(outputs.detach(), targets))
    except Exception as error:  # whatever an objective of one's own does
        raise ChoiceError(f"{place} fails on {shapes}: {type(error).__name__}: {error}") from error
    if loss.ndim != 0 or not loss.requires_grad:
        raise ChoiceError(
            f"{place}: the loss of {shapes} has shape {list(loss.shape)}; expected is a scalar that depends "
            "on the outputs"
        )
    declared = {measure.key for measure in objective.measures}
    if set(measured) != declared:
        raise ChoiceError(f"{place} measures {sorted(measured)}; it declares {sorted(declared)}")
