"""The client half of a method: what it is told, what it works on, and the hooks around its local training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algorithms.core.layers import ActivationPruning
from algorithms.core.masks import target_count
from algorithms.core.parameters import ParameterLayout


@dataclass(frozen=True)
class Instructions:
    """What a client is told this round, beside the weights; the same for the whole cohort.

    Attributes:
        round: Number of the round, from 1 (0 for a stage before the first round).
        rounds: Planned number of rounds.
        phase: The method's own name of what clients do.
        epochs: Local epochs, or None for the configured ones.
        steps: Local steps instead of epochs, which may end in the middle of one; None for epochs.
        sends_model: Whether what clients send is a model or its difference: of anything else the distance
            from the global model (``max_update_norm``) says nothing.
        cohort: Number of clients, or None for the configured cohort.
        value: A number of the method's own, such as an annealed fraction.
        attack: Whether batches are attacked, where the configuration asks for it.
        adapts: Whether it is a new client's adaptation to a few samples, of which nothing is sent.
    """

    round: int
    rounds: int
    phase: str = "train"
    epochs: int | None = None
    cohort: int | None = None
    value: float = 0.0
    steps: int | None = None
    sends_model: bool = True
    attack: bool = True
    adapts: bool = False

    def __post_init__(self) -> None:
        """Steps take the place of epochs."""
        if self.steps is not None and (self.steps < 1 or self.epochs is not None):
            raise ValueError(f"instructions: steps {self.steps} with epochs {self.epochs}; give one of them")

    def local_steps(self, samples: int, batch_size: int, epochs: int) -> int:
        """Steps of a client with so many samples; ``epochs`` are the configured ones."""
        return self.steps or (self.epochs or epochs) * -(-samples // batch_size)

    def local_samples(self, samples: int, batch_size: int, epochs: int) -> int:
        """Samples in the batches of these steps; the last batch of an epoch holds what is left."""
        whole, rest = divmod(self.local_steps(samples, batch_size, epochs), -(-samples // batch_size))
        return whole * samples + rest * batch_size


#: A training loss of (outputs, targets, the objective's own loss of both), as ``Algorithm.loss`` is one.
Loss = Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor]


class Workbench(Protocol):
    """What a visit computes with; the trainer's, which bills whatever is done on it."""

    def batch(self, visit: Visit) -> Tensor:
        """See :attr:`Visit.batch`."""
        ...

    def unattacked(self, visit: Visit) -> Tensor:
        """See :attr:`Visit.unattacked`."""
        ...

    def compute(self, visit: Visit, loss: Loss | None) -> Tensor:
        """See :meth:`Visit.compute`."""
        ...

    def forward(self, visit: Visit, vector: Tensor, inputs: Tensor) -> Tensor:
        """See :meth:`Visit.forward`."""
        ...

    def attacked(self, visit: Visit, inputs: Tensor, targets: Tensor) -> Tensor:
        """See :meth:`Visit.attacked`."""
        ...

    def gradient_of(self, visit: Visit, inputs: Tensor, targets: Tensor) -> Tensor:
        """See :meth:`Visit.gradient_of`."""
        ...

    def descend(self, visit: Visit) -> None:
        """See :meth:`Visit.descend`."""
        ...

    def draw(self, visit: Visit) -> Tensor:
        """See :meth:`Visit.draw`."""
        ...

    def lend(self) -> nn.Module:
        """See :attr:`Visit.module`."""
        ...


@dataclass
class Visit:
    """One client's local training as the trainer sets it up; tensors are views that live for the visit.

    Attributes:
        layout: The model's layout.
        instructions: This round's instructions.
        sparsity: The client's target sparsity: its device tier's, else the method's.
        global_weights: w_t as received, float32[size]; not to be written.
        mask: The mask both sides hold, bool[prunable], or None.
        computes: With how much of what the client holds of a layer the next steps compute, float64[layers],
            where a method leaves some out of ``model``: no more is billed. None for all of it.
        part: The part of the model that the client holds, trains and sends, bool[trained]; outside it w is 0
            and stays so. None where it holds all of it.
        weights: w, the trained span, float32[trained].
        model: What the modules compute with, float32[size]; its trained span *is* ``weights`` unless the
            method re-parameterises.
        gradient: Gradient of the loss with respect to ``model``, then to ``weights``, float32[trained].
        prunings: The layers that prune their inputs, by the name of the weight.
        inputs: The client's model inputs, [n_i, ...].
        targets: Their targets, [n_i, ...].
        rng: The client's generator for the method's own randomness.
        lr: The learning rate of the next step.
        batch_size: Samples of a whole batch.
        epochs: Local epochs; rounded up where a number of steps was told.
        steps_per_epoch: Local steps an epoch.
        steps: Local steps that are planned.
        workbench: What computes.
        chosen: Rows of the batch in hand, int64[batch].
        step: Steps done.
        lr_sum: Sum of their learning rates.
        kept: What the client keeps from visit to visit, by name, each float32 of the declared size; empty
            before its first. What stands here at the end is kept.
        kept_if_late: What the client keeps instead where its update comes too late and is left out; empty
            where that makes no difference to it.
        marks: Positions that the client names beside its update, bool[prunable]; they alone travel.
        seconds: What a prunable weight that is kept costs the device in this visit, on the simulated clock,
            by layer, and last what all the rest does; float32[layers + 1].
        moments: The local optimizer's, each float32[trained]: 0 at the start of the visit.
        measures: The method's own numbers, as (sum, weight).
        objective: The objective's own loss of outputs and targets.
    """

    layout: ParameterLayout
    instructions: Instructions
    sparsity: float
    global_weights: Tensor
    mask: Tensor | None
    weights: Tensor
    model: Tensor
    gradient: Tensor
    prunings: Mapping[str, ActivationPruning]
    inputs: Tensor
    targets: Tensor
    rng: np.random.Generator
    lr: float
    batch_size: int
    epochs: int
    steps_per_epoch: int
    steps: int
    workbench: Workbench
    chosen: Tensor
    step: int = 0
    lr_sum: float = 0.0
    kept: dict[str, Tensor] = field(default_factory=dict)
    kept_if_late: dict[str, Tensor] = field(default_factory=dict)
    marks: Tensor | None = None
    seconds: Tensor = field(default_factory=lambda: torch.zeros(0))
    moments: tuple[Tensor, ...] = ()
    measures: dict[str, tuple[float | Tensor, float]] = field(default_factory=dict)
    objective: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    part: Tensor | None = None
    computes: np.ndarray | None = None

    @property
    def module(self) -> nn.Module:
        """The model; what a method runs through it, or through a part of it, is billed layer by layer."""
        return self.workbench.lend()

    @property
    def carried(self) -> dict[str, Tensor]:
        """What travels beside the model by name, views: as received, and sent as it is left."""
        return self.layout.split(self.model, self.layout.carried)

    @property
    def prunable(self) -> Tensor:
        """The prunable span of ``weights``, a view."""
        return self.weights[: self.layout.prunable_size]

    @property
    def prunable_gradient(self) -> Tensor:
        """The prunable span of ``gradient``, a view."""
        return self.gradient[: self.layout.prunable_size]

    @property
    def keep(self) -> int:
        """K, the number of prunable weights at the client's target sparsity."""
        return target_count(self.layout.prunable_size, self.sparsity)

    @property
    def batch(self) -> Tensor:
        """Inputs of the batch in hand as its pass meets them, augmented and attacked or not, [batch, ...]."""
        return self.workbench.batch(self)

    @property
    def unattacked(self) -> Tensor:
        """The same before an attack, [batch, ...]: for ``gradient_of``, which attacks by itself."""
        return self.workbench.unattacked(self)

    def compute(self, loss: Loss | None = None) -> Tensor:
        """One pass over the batch in hand: its loss; ``gradient`` is filled at what ``model`` holds.

        The scalar returned may be overwritten by the next pass.

        Args:
            loss: A loss that depends on the visit, instead of the method's; such a pass is never recorded.
        """
        return self.workbench.compute(self, loss)

    def forward(self, vector: Tensor, inputs: Tensor) -> Tensor:
        """What the module returns with other weights, in evaluation mode and without gradients.

        ``model``, ``gradient`` and running statistics stay as they are.

        Args:
            vector: What the modules shall compute with, float32[at least model_size].
            inputs: Model inputs, [n, ...].
        """
        return self.workbench.forward(self, vector, inputs)

    def attacked(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Inputs as training's attack makes them at what ``model`` holds; as they are where there is none.

        Args:
            inputs: Model inputs, [n, ...].
            targets: Their targets.
        """
        return self.workbench.attacked(self, inputs, targets)

    def gradient_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The same on other data than a batch: fills ``gradient``, returns the loss, calls no hook.

        Args:
            inputs: Model inputs, [n, ...].
            targets: What the loss takes: one target each, or soft ones.
        """
        return self.workbench.gradient_of(self, inputs, targets)

    def descend(self) -> None:
        """One local step along ``gradient``; weight decay and the proximal term come on top."""
        self.workbench.descend(self)
        self.step += 1
        self.lr_sum += self.lr

    def measure(self, name: str, value: float | Tensor, weight: float = 1.0) -> None:
        """Note a number of the method's own, logged as ``method/<name>``: its mean over the cohort.

        Args:
            name: Letters, digits, ``_``, ``-`` and ``.``.
            value: A number, or a scalar tensor, which is read when the visit is over.
            weight: Its weight in the mean; all that are noted under one name count.
        """
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(f"visit.measure: {name!r} is no name of letters, digits, _, - and .")
        if isinstance(value, Tensor):
            value = value.detach().double()
        total, weights = self.measures.get(name, (0.0, 0.0))
        self.measures[name] = (total + value * weight, weights + weight)

    def draw(self) -> Tensor:
        """Rows of one more batch, int64[batch], from the stream that orders the batches."""
        return self.workbench.draw(self)


class Client:
    """The client half of a method: hooks around plain SGD for one visit. Every default is dense."""

    #: Set by ``begin`` where it cuts the weights received, so that their FLOPs are counted as cut.
    cuts_received = False

    def __init__(self, method: Any, visit: Visit) -> None:
        self.method = method
        self.visit = visit

    def begin(self) -> None:
        """Called once, when the global model is loaded."""

    def train(self, batches: Iterable[Tensor]) -> Tensor:
        """The whole local training: a step on each batch.

        Args:
            batches: Rows of each batch, in the order that all methods share; ``visit.chosen`` follows it.

        Returns:
            The mean loss over the steps.
        """
        visit = self.visit
        losses = torch.zeros((), dtype=torch.float64, device=visit.weights.device)
        for _ in batches:
            losses += self.gradient(visit.compute)
            visit.descend()
            self.after_step()
        return losses / visit.step

    def gradient(self, compute: Callable[[], Tensor]) -> Tensor:
        """Fill ``visit.gradient`` for one batch and return its loss.

        Args:
            compute: One pass over the batch at what ``visit.model`` holds; may be called several times.
        """
        self.before_forward()
        loss = compute()
        self.after_backward()
        return loss

    def before_forward(self) -> None:
        """Called before each forward pass; may write ``visit.weights`` and ``visit.model``."""

    def after_backward(self) -> None:
        """Called with ``visit.gradient`` filled; weight decay and the proximal term follow."""

    def after_step(self) -> None:
        """Called after each SGD step; ``visit.step`` counts it already."""

    def finish(self) -> Tensor | None:
        """Turn ``visit.weights`` into what is uploaded, in place; cut positions become +0.0.

        Returns:
            The support that travels, bool[prunable]; None when every prunable weight does.
        """
        return None

    def training_density(self, trained: np.ndarray) -> np.ndarray:
        """Density of each prunable layer in forward passes after the first, float64[layers], for FLOPs.

        Args:
            trained: Share of nonzeros of each layer at the end of local training, before the final cut.
        """
        return trained

    def gradient_density(self, nonzeros: np.ndarray) -> np.ndarray:
        """Share of each prunable layer's weight gradient that the method uses, float64[layers], for FLOPs.

        Args:
            nonzeros: Share of nonzeros of each layer: as received for the first batch, and at the end of
                local training, before the final cut, for the others.
        """
        return np.ones(len(nonzeros))
