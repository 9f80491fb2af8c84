"""Robust Bird: a mask found by plain training early on, then adversarial training inside it.

Chen et al., "Sparsity Winning Twice: Better Robust Generalization from More Efficient Training", ICLR 2022,
arXiv 2202.09844; the mask is an early-bird ticket (You et al., ICLR 2020, arXiv 1909.11957).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import target_count, top_k_mask
from algorithms.core.parameters import ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer
from algorithms.fixed_mask import MaskedClient, inside, mean_of_holders

#: Masks that are kept; the newest is compared with the others.
MASKS = 5


@dataclass(frozen=True, kw_only=True)
class RobustBird(Algorithm):
    """Dense, without attack, until the largest weights stay the same; then inside their mask under attack."""

    name = "robust_bird"
    paper = "Chen et al., ICLR 2022, arXiv 2202.09844"
    departures = (
        "Masks are compared after every round, over all prunable weights; the authors compare epochs, over "
        "convolutions.",
        "Two masks are near where they differ in a share of their own weights; the authors take the share of "
        "all positions, which at a sparsity above 0.96 holds of any two.",
        "The schedule of the learning rate goes on when the mask is drawn; the authors start a new one.",
    )
    client = MaskedClient

    sparsity: float = hyperparameter(
        0.8, "share of prunable weights outside the mask", low=0.0, high=0.9999, source="tables 1 and 2"
    )
    stop_distance: float = hyperparameter(
        0.2,
        "share of a mask's weights in which it may differ from each of the 4 before, to be drawn",
        low=0.0,
        high=1.0,
        search=(0.05, 0.4),
        source="0.08 of all positions at density 0.2 in the authors' code",
    )
    draw_rounds: int = hyperparameter(
        10, "round after which it is drawn at the latest", low=1, high=10000, log=True, search=(5, 50)
    )

    @property
    def masked(self) -> bool:
        """A weight's mean is over the clients that hold it."""
        return True

    def problems(self, config: Any) -> Iterator[str]:
        """A run that may end before there is a mask."""
        if config.rounds <= self.draw_rounds:
            yield (
                f"algorithm.draw_rounds: {self.draw_rounds}, but rounds is {config.rounds}: there may be no "
                "mask at the end; lower draw_rounds"
            )

    # ---- server half

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """Dense; no mask is known."""
        none = torch.zeros(MASKS, layout.prunable_size, dtype=torch.bool)
        return ServerState(round=0, weights=weights, arrays={"masks": none})

    def instruct(self, state: ServerState, rounds: int, clients: int) -> Instructions:
        """Without attack until there is a mask."""
        told = super().instruct(state, rounds, clients)
        return replace(told, phase="draw", attack=False) if state.mask is None else told

    def aggregate(self, state: ServerState, total: Total, layout: ParameterLayout) -> Tensor:
        """The mean over each weight's holders."""
        return mean_of_holders(state, total)

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """Before there is a mask: note the largest weights, and draw their mask where it has settled.

        Weights go on from where they are; the server optimizer starts anew.
        """
        after = super().advance(state, total, server, layout, share)
        if state.mask is not None:
            return after
        keep = target_count(layout.prunable_size, self.sparsity)
        newest = top_k_mask(after.weights[: layout.prunable_size].abs(), keep)
        masks = torch.cat([state.arrays["masks"][1:], newest[None]])
        if after.round < self.draw_rounds and not self._settled(masks, keep):
            return replace(after, arrays={"masks": masks})
        weights = inside(newest, after.weights)
        return replace(after, weights=weights, mask=newest, mask_version=1, moments=(), arrays={})

    def _settled(self, masks: Tensor, keep: int) -> bool:
        """Whether all masks, bool[masks, prunable], are known and the newest is near each of the others."""
        differing = (masks[:-1] & ~masks[-1]).sum(1)
        known = bool(masks.any(1).all())
        return known and bool((differing <= self.stop_distance * keep).all())
