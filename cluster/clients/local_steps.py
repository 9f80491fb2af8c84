"""The batches, passes and steps of one visit: the workbench that a method's client half works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from algorithms import Attack, LocalOptimizer, ParameterLayout, Visit
from algorithms.core.client import Loss
from algorithms.core.local_optimizers import Sgd
from algorithms.core.masks import layer_counts, layer_sizes, nonzero_mask
from cluster.clients.billing import Bill
from cluster.clients.meter import Meter
from cluster.clients.passes import Change, Passes, Precision, arithmetic

#: Inputs and targets of a batch -> the attacked inputs, and how often the model was run for them.
Attacking = Callable[[Tensor, Tensor], tuple[Tensor, int]]


@dataclass(frozen=True)
class LocalSettings:
    """What local training takes from the configuration."""

    seed: int
    epochs: int
    batch_size: int
    weight_decay: float
    proximal: float
    precision: Precision = "float32"
    cuda_graphs: bool = False
    optimizer: LocalOptimizer = field(default_factory=Sgd)
    clip_norm: float | None = None
    lr_end: float | None = None  # of a cosine inside each visit
    crop: int = 0
    flip: bool = False
    attack: Attack = field(default_factory=Attack)

    def rate(self, lr: float, step: int, steps: int) -> float:
        """Learning rate of a step, from 0, of a visit in a round whose rate is ``lr``."""
        if self.lr_end is None:
            return lr
        return self.lr_end + (lr - self.lr_end) * (1.0 + math.cos(math.pi * step / steps)) / 2.0


class LocalSteps:
    """See :class:`algorithms.core.client.Workbench`. It is handed the visit and does not hold it.

    Args:
        settings: Local hyperparameters.
        passes: Runs the pass of a step.
        compute: Runs any other pass over inputs and targets, with a loss of its own where one is given.
        module: The model.
        meter: Bills what a method runs through the model by itself.
        order: The client's stream of batches.
        bill: Takes note of every pass.
        change: What the inputs of a step's batch are changed to, by the number of the step.
        attack: Attacks what a gradient is taken of; None leaves it.
    """

    def __init__(
        self,
        settings: LocalSettings,
        passes: Passes,
        compute: Callable[..., Tensor],
        module: nn.Module,
        meter: Meter,
        order: np.random.Generator,
        bill: Bill,
        change: Callable[..., Tensor] | None = None,
        attack: Attacking | None = None,
    ) -> None:
        self._settings, self._passes, self._compute = settings, passes, compute
        self._module, self._meter = module, meter
        self._order, self._bill = order, bill
        self._change, self._attack = change, attack
        # The batch that was attacked last: its rows, and what became of them.
        self._attacked: tuple[Tensor, Tensor] | None = None

    def batches(self, visit: Visit) -> Iterator[Tensor]:
        """Rows of each planned batch, int64[batch]: the client's data in a new order every epoch."""
        samples, size, device = len(visit.targets), visit.batch_size, visit.weights.device
        lr = visit.lr
        for number in range(visit.steps):
            start = number % visit.steps_per_epoch * size
            if start == 0:
                shuffled = torch.from_numpy(self._order.permutation(samples)).to(device)
            visit.lr = self._settings.rate(lr, number, visit.steps)
            visit.chosen = shuffled[start : start + size]
            yield visit.chosen

    def draw(self, visit: Visit) -> Tensor:
        """See :class:`Visit`."""
        shuffled = self._order.permutation(len(visit.targets))
        return torch.from_numpy(shuffled[: visit.batch_size]).to(visit.weights.device)

    def batch(self, visit: Visit) -> Tensor:
        """See :class:`Visit`; changes are drawn anew and are the same, an attack is made once."""
        inputs, change = visit.inputs[visit.chosen], self._change_of(visit)
        return inputs if change is None else change(inputs)

    def unattacked(self, visit: Visit) -> Tensor:
        """See :class:`Visit`."""
        inputs, change = visit.inputs[visit.chosen], self._augmentation_of(visit)
        return inputs if change is None else change(inputs)

    def _augmentation_of(self, visit: Visit) -> Change | None:
        return None if self._change is None else partial(self._change, step=visit.step)

    def _change_of(self, visit: Visit) -> Change | None:
        change = self._augmentation_of(visit)
        if self._attack is None or not visit.instructions.attack:
            return change
        return partial(self._attacked_batch, visit, change, self._attack)

    def _attacked_batch(
        self, visit: Visit, change: Change | None, attack: Attacking, inputs: Tensor
    ) -> Tensor:
        """The batch in hand, changed and attacked once: further passes over it are at other weights alone."""
        chosen, paused = visit.chosen, self._meter.paused
        if self._attacked is None or self._attacked[0] is not chosen:
            self._meter.paused = True
            found, runs = attack(inputs if change is None else change(inputs), visit.targets[chosen])
            self._meter.paused = paused
            self._bill.attack(runs * len(chosen), visit.computes)
            self._attacked = chosen, found
        return self._attacked[1]

    def compute(self, visit: Visit, loss: Loss | None) -> Tensor:
        """See :class:`Visit`."""
        chosen = visit.chosen
        self._meter.paused = True
        if loss is None:
            found = self._passes.run(visit.inputs, visit.targets, chosen, self._change_of(visit))
        else:
            found = self._compute(self.batch(visit), visit.targets[chosen], loss)
        self._bill.step(len(chosen), visit.computes)
        self._meter.paused = False
        return found

    def forward(self, visit: Visit, vector: Tensor, inputs: Tensor) -> Tensor:
        """See :class:`Visit`; billed as it is called, a third of a training pass."""
        module, was_training = self.lend(), self._module.training
        module.eval()
        with torch.no_grad(), arithmetic(self._settings.precision, vector.device):
            outputs: Tensor = torch.func.functional_call(module, visit.layout.split(vector), (inputs,))
        module.train(was_training)
        return outputs

    def attacked(self, visit: Visit, inputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Visit`; billed as it is run."""
        if self._attack is None or not visit.instructions.attack:
            return inputs
        self.lend()
        found, _ = self._attack(inputs, targets)
        return found

    def gradient_of(self, visit: Visit, inputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Visit`."""
        met = nonzero_mask(visit.model[: visit.layout.prunable_size])
        self._meter.paused = True
        runs = 0
        if self._attack is not None and visit.instructions.attack:
            inputs, runs = self._attack(inputs, targets)
        self._bill.more(len(targets), layer_density(met, visit.layout), runs * len(targets))
        loss = self._compute(inputs, targets)
        self._meter.paused = False
        return loss

    def lend(self) -> nn.Module:
        """See :class:`Visit`."""
        self._meter.start(self._bill)
        return self._module

    def descend(self, visit: Visit) -> None:
        """See :class:`Visit`."""
        settings, gradient, weights = self._settings, visit.gradient, visit.weights
        optimizer = settings.optimizer
        if visit.part is not None:
            gradient.mul_(visit.part)  # what the client does not hold is 0, and nothing moves it
        if settings.weight_decay and not optimizer.decoupled_decay:
            gradient.add_(weights, alpha=settings.weight_decay)
        if settings.proximal:
            # Gradient of mu/2 |w - w_t|^2 (FedProx, arXiv 1812.06127).
            gradient.add_(weights, alpha=settings.proximal)
            gradient.sub_(visit.global_weights[: len(weights)], alpha=settings.proximal)
        if settings.clip_norm is not None:
            norm = torch.linalg.vector_norm(gradient)
            gradient.mul_((settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        decay = settings.weight_decay if optimizer.decoupled_decay else 0.0
        optimizer.step(weights, gradient, visit.moments, lr=visit.lr, decay=decay, number=visit.step + 1)


def layer_density(nonzeros: Tensor, layout: ParameterLayout) -> np.ndarray:
    """Share of each prunable layer in a mask, bool[prunable], float64[layers]."""
    return layer_counts(nonzeros, layout.prunable) / layer_sizes(layout.prunable)
