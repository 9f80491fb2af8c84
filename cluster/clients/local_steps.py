"""The batches, passes and steps of one visit: the workbench that a method's client half works on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from algorithms import ParameterLayout, Visit
from algorithms.core.masks import layer_counts, layer_sizes, nonzero_mask
from cluster.clients.billing import Bill
from cluster.clients.meter import Meter
from cluster.clients.passes import Compute, Passes, Precision


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


class LocalSteps:
    """See :class:`algorithms.core.client.Workbench`. It is handed the visit and does not hold it.

    Args:
        settings: Local hyperparameters.
        passes: Runs the pass of a step.
        compute: Runs any other pass.
        module: The model.
        meter: Bills what a method runs through the model by itself.
        order: The client's stream of batches.
        bill: Takes note of every pass.
    """

    def __init__(
        self,
        settings: LocalSettings,
        passes: Passes,
        compute: Compute,
        module: nn.Module,
        meter: Meter,
        order: np.random.Generator,
        bill: Bill,
    ) -> None:
        self._settings, self._passes, self._compute = settings, passes, compute
        self._module, self._meter = module, meter
        self._order, self._bill = order, bill

    def batches(self, visit: Visit) -> Iterator[Tensor]:
        """Rows of each planned batch, int64[batch]: the client's data in a new order every epoch."""
        samples, size, device = len(visit.targets), visit.batch_size, visit.weights.device
        for number in range(visit.steps):
            start = number % visit.steps_per_epoch * size
            if start == 0:
                shuffled = torch.from_numpy(self._order.permutation(samples)).to(device)
            visit.chosen = shuffled[start : start + size]
            yield visit.chosen

    def draw(self, visit: Visit) -> Tensor:
        """See :class:`Visit`."""
        shuffled = self._order.permutation(len(visit.targets))
        return torch.from_numpy(shuffled[: visit.batch_size]).to(visit.weights.device)

    def compute(self, visit: Visit) -> Tensor:
        """See :class:`Visit`."""
        self._bill.step(len(visit.chosen))
        self._meter.paused = True
        loss = self._passes.run(visit.inputs, visit.targets, visit.chosen)
        self._meter.paused = False
        return loss

    def gradient_of(self, visit: Visit, inputs: Tensor, targets: Tensor) -> Tensor:
        """See :class:`Visit`."""
        met = nonzero_mask(visit.model[: visit.layout.prunable_size])
        self._bill.more(len(targets), layer_density(met, visit.layout))
        self._meter.paused = True
        loss = self._compute(inputs, targets)
        self._meter.paused = False
        return loss

    def lend(self) -> nn.Module:
        """See :class:`Visit`."""
        self._meter.start(self._bill)
        return self._module

    def descend(self, visit: Visit) -> None:
        """Plain SGD."""
        settings, gradient, weights = self._settings, visit.gradient, visit.weights
        if settings.weight_decay:
            gradient.add_(weights, alpha=settings.weight_decay)
        if settings.proximal:
            # Gradient of mu/2 |w - w_t|^2 (FedProx, arXiv 1812.06127).
            gradient.add_(weights, alpha=settings.proximal)
            gradient.sub_(visit.global_weights[: len(weights)], alpha=settings.proximal)
        weights.add_(gradient, alpha=-visit.lr)


def layer_density(nonzeros: Tensor, layout: ParameterLayout) -> np.ndarray:
    """Share of each prunable layer in a mask, bool[prunable], float64[layers]."""
    return layer_counts(nonzeros, layout.prunable) / layer_sizes(layout.prunable)
