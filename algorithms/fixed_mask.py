"""Fixed random mask: one sparse model for all, drawn before round 1 and never changed.

RandomMask, the control of Bibikar et al., "Federated Dynamic Sparse Training", AAAI 2022, arXiv 2112.09824:
FedDST with a_0 = 0. Its client half, training inside a mask, is that of every method that holds one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Client, Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import (
    apportion,
    density_shares,
    layer_counts,
    layer_sizes,
    layer_wise_top_k,
    nested_mask,
    random_mask,
    target_count,
)
from algorithms.core.parameters import ParameterLayout


class MaskedClient(Client):
    """Trains inside a mask: weights outside it are zero and stay exactly zero.

    A client with a smaller budget than the method's (hetero-FLASH's tiers) trains the top of the mask.

    Attributes:
        mask: The client's live mask, bool[prunable]; None trains every weight.
    """

    method: Any

    def begin(self) -> None:
        """Take the mask both sides hold, or the part of it that this client's budget allows."""
        visit = self.visit
        self.mask = visit.mask
        self._outside: Tensor | None = None
        self._moving = self.moving()
        if self.mask is not None and visit.sparsity > self.method.sparsity:
            self.cuts_received = True
            magnitudes = visit.prunable.abs()
            self.hold(nested_mask(magnitudes, self.mask, visit.keep, visit.layout.prunable))

    def hold(self, mask: Tensor) -> None:
        """Train inside ``mask`` from now on; weights that leave it become +0.0."""
        self.mask, self._outside = mask, ~mask
        self._moving = self.moving()
        for values in (self.visit.weights, *self.visit.moments):
            # A weight that comes back is not moved by what it did before.
            values[: len(mask)].masked_fill_(self._outside, 0.0)

    def moving(self) -> Tensor | None:
        """0 or 1 for each of the first trained parameters, whether it may move; None where all may."""
        return None if self.mask is None else self.mask.float()

    def after_backward(self) -> None:
        """No gradient outside the mask: one multiplication; decay leaves a zero where it is."""
        if self._moving is not None:
            self.visit.gradient[: len(self._moving)].mul_(self._moving)

    def after_step(self) -> None:
        """Hold the zeros of a mask of one's own: a proximal term would pull them to the weights received."""
        if self._outside is not None:
            self.visit.prunable.masked_fill_(self._outside, 0.0)

    def finish(self) -> Tensor | None:
        """Send the masked weights; where the mask is the one received, its positions need not travel."""
        return self.mask

    def training_density(self, trained: np.ndarray) -> np.ndarray:
        """The mask's density: a grown weight costs its FLOPs while its value is still 0."""
        if self.mask is None:
            return trained
        layers = self.visit.layout.prunable
        return layer_counts(self.mask, layers) / layer_sizes(layers)

    def gradient_density(self, nonzeros: np.ndarray) -> np.ndarray:
        """The mask's density: no gradient outside it is used."""
        return np.ones(len(nonzeros)) if self.mask is None else self.training_density(nonzeros)


def inside(mask: Tensor, weights: Tensor) -> Tensor:
    """A copy of a flat vector whose prunable weights outside the mask are zero, float32[size]."""
    weights = weights.clone()
    weights[: len(mask)].masked_fill_(~mask, 0.0)
    return weights


def holding(mask: Tensor, state: ServerState) -> ServerState:
    """The state with another mask: what leaves it is 0, and its moments too."""
    assert state.mask is not None
    return replace(
        state,
        weights=inside(mask, state.weights),
        moments=tuple(inside(mask, moment) for moment in state.moments),
        mask=mask,
        mask_version=state.mask_version + int(not torch.equal(mask, state.mask)),
    )


def mean_of_holders(state: ServerState, total: Total) -> Tensor:
    """sum n m w / sum n m, float32[size]; a weight of the mask that no client of the round holds keeps w_t.

    Such weights exist when all clients of a round train a smaller part of the mask, or have all dropped them.
    """
    mean = torch.from_numpy(total.masked_mean())
    if state.mask is not None:
        absent = torch.nonzero(state.mask & torch.from_numpy(~total.held)).reshape(-1)
        mean[absent] = state.weights[absent]
    return mean


@dataclass(frozen=True, kw_only=True)
class FixedMask(Algorithm):
    """One random mask with uniform, ER or ERK layer densities; masked weights alone are trained and sent."""

    name = "fixed_mask"
    paper = "RandomMask, the control of Bibikar et al., AAAI 2022, arXiv 2112.09824"
    client = MaskedClient
    shares_support = True
    asynchronous = True

    sparsity: float = hyperparameter(
        0.95, "share of prunable weights outside the mask", low=0.0, high=0.9999, source="section 4"
    )
    layer_density: str = hyperparameter(
        "erk",
        "layer densities of the initial mask: `uniform`, `er`, `erk` (layers above 1 dense, rest rescaled) "
        "or `igq` (ideal gas quotas)",
        choices=("uniform", "er", "erk", "igq"),
        source="section 3",
    )
    initial_mask: str = hyperparameter(
        "random",
        "positions of the initial mask in each layer: `random`, or the largest initial weights (`magnitude`)",
        choices=("random", "magnitude"),
    )

    @property
    def masked(self) -> bool:
        """A weight's mean is over the clients that hold it."""
        return True

    # ---- server half

    def sends_mask(self, told: Instructions) -> bool:
        """Clients train and send the mask."""
        return True

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """The common initialisation under a mask of exactly K = round((1 - s) |P|) positions."""
        layers = layout.prunable
        keep = target_count(layout.prunable_size, self.sparsity)
        counts = apportion(keep, density_shares(self.layer_density, layers, keep), layer_sizes(layers))
        if self.initial_mask == "random":
            mask = random_mask(counts, layers, rng)
        else:
            mask = layer_wise_top_k(weights[: layout.prunable_size].abs(), counts, layers)
        return ServerState(round=0, weights=inside(mask, weights), mask=mask)

    def aggregate(self, state: ServerState, total: Total, layout: ParameterLayout) -> Tensor:
        """The mean over each weight's holders."""
        return mean_of_holders(state, total)
