"""FLASH: find layer densities first, then train one mask that all clients share.

Babakniya et al., "Revisiting Sparsity Hunting in Federated Learning: Why does Sparsity Consensus Matter?",
TMLR 2023, arXiv 2208.13092; dynamic sparse training after Dettmers and Zettlemoyer, arXiv 1907.04840.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import (
    apportion,
    cut_globally,
    exchangeable,
    layer_counts,
    layer_sizes,
    nested_mask,
    prune_and_grow,
    random_mask,
    target_count,
    top_of_union,
    uniform_scores,
)
from algorithms.core.parameters import ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer
from algorithms.fixed_mask import FixedMask, MaskedClient, inside, mean_of_holders


class FlashClient(MaskedClient):
    """Dense in the warm-up; then inside the mask, which dynamic sparse training may move."""

    method: Flash

    def moving(self) -> Tensor | None:
        """Inside the mask; with ``freeze_zero_parameters`` only what was not exactly 0, or has grown."""
        if not self.method.freeze_zero_parameters:
            return super().moving()
        visit = self.visit
        moving = visit.global_weights[: visit.layout.trained_size] != 0
        if self.mask is not None and visit.mask is not None:
            prunable = moving[: visit.layout.prunable_size]
            prunable |= ~visit.mask
            prunable &= self.mask
        return moving.float()

    def after_step(self) -> None:
        """Dynamic sparse training after every local epoch, or half-way through the steps of a single one."""
        super().after_step()
        visit = self.visit
        due = visit.step == visit.steps // 2 if visit.epochs == 1 else visit.step % visit.steps_per_epoch == 0
        if due and visit.instructions.phase in ("sensitivity", "refresh"):
            # The rate falls to 0 with the last step, so that nothing moves after the last epoch.
            self._explore(self.method.prune_rate * (1.0 - visit.step / visit.steps))

    def _explore(self, rate: float) -> None:
        """Drop a share of each layer's weights; the same total regrows at random where weights are large."""
        visit, layers = self.visit, self.visit.layout.prunable
        assert self.mask is not None
        counts, magnitudes = layer_counts(self.mask, layers), visit.prunable.abs()
        drops = exchangeable(rate, counts, layers)
        if not drops.any():
            return
        # Shared by mean |w| before the drop, as in the authors' code; no layer grows beyond its zeros.
        sums = np.array([float(magnitudes[layer.span].sum(dtype=torch.float64)) for layer in layers])
        zeros = layer_sizes(layers) - counts + drops
        growths = apportion(int(drops.sum()), sums / np.maximum(counts, 1), zeros)
        scores = uniform_scores(len(magnitudes), visit.rng).to(magnitudes.device)
        kept, grown = prune_and_grow(magnitudes, self.mask, drops, growths, scores, layers)
        visit.prunable.masked_fill_(~kept, 0.0)
        self.hold(kept | grown)

    def finish(self) -> Tensor | None:
        """Warm-up: the K largest |w|. Later: the masked weights."""
        visit = self.visit
        if self.mask is not None:
            return self.mask
        return cut_globally(visit.prunable, visit.keep, visit.layout.prunable, guard=self.method.guard_layers)


@dataclass(frozen=True, kw_only=True)
class Flash(Algorithm):
    """Sensitivity first, then training inside a mask: fixed (SPDST) or renewed every few rounds (JMWST).

    A server optimizer acts from round 1 on; the stage before it leaves no moments, as the model starts anew.
    """

    name = "flash"
    paper = "Babakniya et al., TMLR 2023, arXiv 2208.13092"
    departures = (
        "The mask holds exactly K weights; the authors' codes round each layer down.",
        "Parameters that are 0 in the model received may move; in SparsyFed's re-implementation they stay "
        "frozen: freeze_zero_parameters.",
    )
    client = FlashClient
    unequal_sparsity = True
    reads_supports = True

    sparsity: float = hyperparameter(0.95, "share of prunable weights outside the mask", low=0.0, high=0.9999)
    stage1: str = hyperparameter(
        "magnitude",
        "how the mask is found: `magnitude` of round 1's dense models (as SparsyFed re-implements it), or "
        "`sensitivity`: layer densities, by dynamic sparse training in a stage before round 1 (FLASH's own)",
        choices=("magnitude", "sensitivity"),
        source="section 4.1; arXiv 2504.05153, section 4",
    )
    warmup_epochs: int = hyperparameter(
        0, "local epochs of round 1 with `magnitude`; 0: as every round", low=0, high=1000, search=(1, 10)
    )
    init_fraction: float = hyperparameter(
        0.05, "share of clients in the `sensitivity` stage", low=0.0, high=1.0, source="the authors' README"
    )
    init_epochs: int = hyperparameter(
        10, "local epochs of the `sensitivity` stage", low=1, high=1000, source="the authors' README"
    )
    refresh_interval: int = hyperparameter(
        0,
        "rounds between renewals of the mask by dynamic sparse training (JMWST); 0 keeps it (SPDST)",
        low=0,
        high=10000,
        search=(0, 10),
        source="section 4.2",
    )
    prune_rate: float = hyperparameter(
        0.25,
        "share of a layer's weights that dynamic sparse training drops, falling to 0 over the local steps",
        low=0.0,
        high=1.0,
        source="the authors' code",
    )
    averaging: str = hyperparameter(
        "plain",
        "`plain` mean, where absent counts as 0, or `masked`, over the clients that hold a weight",
        choices=("plain", "masked"),
        source="the authors' update_mode",
    )
    freeze_zero_parameters: bool = hyperparameter(
        False,
        "freeze what is exactly 0 in the model received, biases and norm shifts that start at 0 included",
        source="the re-implementation of arXiv 2504.05153",
    )
    guard_layers: bool = hyperparameter(
        False, "a layer that the cut of the warm-up would empty keeps the top of its weights, its share of K"
    )

    @property
    def masked(self) -> bool:
        """Whether a weight's mean is over the clients that hold it."""
        return self.averaging == "masked"

    @property
    def kept_weights(self) -> float:
        """K over |P| in the warm-up of ``magnitude``."""
        return 1.0 - self.sparsity if self.stage1 == "magnitude" else 1.0

    @property
    def first_round(self) -> int:
        """0 with ``sensitivity``, which has a stage of its own."""
        return 0 if self.stage1 == "sensitivity" else 1

    @property
    def mean_alone(self) -> bool:
        """With one mask for good, ranked after round 1; all layers are then as dense as each other."""
        return self.stage1 == "magnitude" and not self.refresh_interval

    # ---- server half

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """``magnitude``: dense. ``sensitivity``: under a random mask, with what the restart will need."""
        if self.stage1 == "magnitude":
            return super().initial_state(weights, layout, rng)
        state = FixedMask(sparsity=self.sparsity, layer_density="uniform").initial_state(weights, layout, rng)
        seed = torch.tensor(int(rng.integers(2**63 - 1)))
        return replace(state, round=-1, arrays={"initial_weights": weights.clone(), "mask_seed": seed})

    def instruct(self, state: ServerState, rounds: int, clients: int) -> Instructions:
        """Names the phase: ``warm-up`` while there is no mask, ``sensitivity``, ``refresh`` or ``train``."""
        told = super().instruct(state, rounds, clients)
        if told.round == 0:
            cohort = max(1, round(self.init_fraction * clients))
            return replace(told, phase="sensitivity", epochs=self.init_epochs, cohort=cohort)
        if state.mask is None:
            return replace(told, phase="warm-up", epochs=self.warmup_epochs or None)
        return replace(told, phase="refresh") if self._refreshes(told.round) else told

    def sends_mask(self, told: Instructions) -> bool:
        """Once there is one, and while it stays."""
        return told.phase == "train"

    def aggregate(self, state: ServerState, total: Total, layout: ParameterLayout) -> Tensor:
        """The plain mean, or the mean over each weight's holders."""
        return mean_of_holders(state, total) if self.masked else super().aggregate(state, total, layout)

    def next_mask(
        self, state: ServerState, weights: Tensor, total: Total, layout: ParameterLayout
    ) -> Tensor | None:
        """After the warm-up and a refresh: each layer's largest weights, as many as clients keep on average.

        The first mask ranks |mean w|, later ones the |w| that the server step has left.
        """
        if state.mask is not None and not self._refreshes(state.round + 1):
            return state.mask
        ranked = self.aggregate(state, total, layout) if state.mask is None else weights
        union = torch.from_numpy(total.held)
        magnitudes = ranked[: layout.prunable_size].abs()
        counts = self._mean_counts(total, layout)
        return top_of_union(magnitudes, union, state.mask, counts, layout.prunable)

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """After the ``sensitivity`` stage: the common initialisation again, under a new random mask."""
        if state.round >= 0:
            return super().advance(state, total, server, layout, share)
        rng = np.random.default_rng(int(state.arrays["mask_seed"]))
        mask = random_mask(self._mean_counts(total, layout), layout.prunable, rng)
        weights = inside(mask, state.arrays["initial_weights"])
        return ServerState(round=0, weights=weights, mask=mask, mask_version=state.mask_version + 1)

    def cut(self, weights: Tensor, mask: Tensor | None, keep: int, layout: ParameterLayout) -> None:
        """A tier's budget keeps the top of the larger mask, as its clients do."""
        if mask is None:
            super().cut(weights, mask, keep, layout)
        else:
            weights.masked_fill_(~nested_mask(weights.abs(), mask, keep, layout.prunable), 0.0)

    def _mean_counts(self, total: Total, layout: ParameterLayout) -> np.ndarray:
        """d_l |P_l|, d_l the n_i-weighted mean of the clients' densities of layer l, scaled to the target."""
        keep = target_count(layout.prunable_size, self.sparsity)
        return apportion(keep, total.layer_counts, layer_sizes(layout.prunable))

    def _refreshes(self, round_number: int) -> bool:
        return self.refresh_interval > 0 and round_number % self.refresh_interval == 0
