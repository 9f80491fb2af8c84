"""FedRTS: the server redraws a shared sparse mask by Thompson sampling, from votes of clients and of its own.

"FedRTS: Federated Robust Pruning via Combinatorial Thompson Sampling", arXiv 2501.19122. Adjusting rounds are
those of FedTiny and FedMef, after RigL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import ServerState
from algorithms.core.client import Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import layer_counts, layer_sizes, layer_wise_top_k
from algorithms.core.parameters import Entry, ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer
from algorithms.feddst import FedDSTClient
from algorithms.fixed_mask import FixedMask, holding


def exchanged(rate: float, mask: Tensor, layers: Sequence[Entry]) -> np.ndarray:
    """k_l = floor(a_t |mask_l|), at most the layer's absent weights, int64[layers]."""
    counts = layer_counts(mask, layers)
    # Noise of the product must not cost a position.
    wanted = np.floor(np.round(rate * counts, 6)).astype(np.int64)
    return np.minimum(wanted, layer_sizes(layers) - counts)


class FedRTSClient(FedDSTClient):
    """Trains inside the mask; in an adjusting round names the absent weights of largest |gradient|."""

    def finish(self) -> Tensor | None:
        """Positions alone: the k_l largest |g| outside the mask, of one batch at the trained weights."""
        visit, layers = self.visit, self.visit.layout.prunable
        if visit.instructions.phase == "adjust" and self.mask is not None:
            counts = exchanged(visit.instructions.value, self.mask, layers)
            visit.marks = layer_wise_top_k(self.growth_scores(), counts, layers, ~self.mask)
        return self.mask


@dataclass(frozen=True, kw_only=True)
class FedRTS(FixedMask):
    """Every weight has a Beta posterior of being worth its place; adjusting rounds draw the mask anew."""

    name = "fedrts"
    shares_support = False
    paper = "arXiv 2501.19122"
    departures = (
        "The initial mask is random; in the authors' library it holds the largest initial weights "
        "(initial_mask=magnitude).",
        "The indices of absent weights travel, as in the paper; the library's trainer returns gradients.",
        "Uploads are masked; in the library they hold one step's noise outside the mask.",
        "Votes end with the last adjustment, when nothing reads them any more.",
        "Plain SGD; the library's default is Adam.",
    )
    client = FedRTSClient
    asynchronous = False  # masks move
    keeps_updates = True
    keeps_marks = True

    readjust_interval: int = hyperparameter(
        10, "rounds between adjustments", low=1, high=10000, search=(3, 30), source="Delta T"
    )
    readjust_fraction: float = hyperparameter(
        0.2,
        "alpha, share of each layer's mask that is at stake; cosine-annealed to 0 at readjust_until",
        low=0.0,
        high=1.0,
        search=(0.05, 0.5),
    )
    readjust_until: int = hyperparameter(
        300, "T_end, the round from which on the mask stays", low=1, high=1000000
    )
    vote: float = hyperparameter(
        10.0, "lambda, what a round's outcome counts; 0 draws uniform masks", low=0.0, high=1e6
    )
    client_votes: float = hyperparameter(
        0.5, "gamma, weight of the clients' outcomes; the server's have the rest", low=0.0, high=1.0
    )

    def rate(self, round_number: int) -> float:
        """a_t = alpha / 2 (1 + cos(pi t / T_end)); 0 from T_end on, where the formula would rise again."""
        share = min(1.0, round_number / self.readjust_until)
        return self.readjust_fraction / 2 * (1 + math.cos(math.pi * share))

    def adjusts(self, round_number: int) -> bool:
        """Whether a round redraws the mask."""
        return self.rate(round_number) > 0.0 and round_number % self.readjust_interval == 0

    # ---- server half

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """A mask as ``fixed_mask`` draws it, and Beta(1, 1) for every weight."""
        state = super().initial_state(weights, layout, rng)
        ones = torch.ones(layout.prunable_size)
        seed = torch.tensor(int(rng.integers(2**63 - 1)))
        return replace(state, arrays={"wins": ones, "losses": ones.clone(), "mask_seed": seed})

    def instruct(self, state: ServerState, rounds: int, clients: int) -> Instructions:
        """``adjust`` every ``readjust_interval``-th round until T_end."""
        told = super().instruct(state, rounds, clients)
        if not self.adjusts(told.round):
            return told
        return replace(told, phase="adjust", value=self.rate(told.round))

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """The mean; then the round's outcomes and, in an adjusting round, a mask drawn from them."""
        after, layers = super().advance(state, total, server, layout, share), layout.prunable
        rate, mask = self.rate(after.round), after.mask
        if rate == 0.0 or mask is None:
            return after
        adjusts = self.adjusts(after.round)
        counts, gamma = exchanged(rate, mask, layers), self.client_votes
        outcomes = outcomes_of(after.weights, mask, total, counts, layers, gamma)
        tried = torch.ones_like(mask) if adjusts else mask
        wins = after.arrays["wins"] + self.vote * outcomes * tried
        losses = after.arrays["losses"] + self.vote * (1.0 - outcomes) * tried
        after = replace(after, arrays={**after.arrays, "wins": wins, "losses": losses})
        if not adjusts:
            return after
        rng = np.random.default_rng([int(after.arrays["mask_seed"]), after.round])
        return holding(drawn_mask(wins, losses, layer_counts(mask, layers), layers, rng), after)


def outcomes_of(
    weights: Tensor, mask: Tensor, total: Total, counts: np.ndarray, layers: Sequence[Entry], gamma: float
) -> Tensor:
    """o_j in [0, 1], float32[prunable]: in whose tops a weight of the mask is, and who named another one.

    Args:
        weights: w_(t+1), float32[size].
        mask: What was trained, bool[prunable].
        total: The round's updates.
        counts: k_l; a layer's top are all but so many of its mask, int64[layers].
        layers: The prunable layers.
        gamma: Weight of the clients, by their samples; the server's own top has the rest.
    """
    kept = layer_counts(mask, layers) - counts

    def top(values: Tensor) -> Tensor:
        return layer_wise_top_k(values[: len(mask)].abs(), kept, layers, mask).double()

    assert total.updates is not None
    assert total.marked is not None
    votes = torch.from_numpy(total.marked / total.samples)
    for values, samples in total.updates.values():
        votes += top(torch.from_numpy(values[: len(mask)].copy())) * (samples / total.samples)
    own = torch.where(mask, top(weights), 0.5)
    return ((1.0 - gamma) * own + gamma * votes).float()


def drawn_mask(
    wins: Tensor, losses: Tensor, counts: np.ndarray, layers: Sequence[Entry], rng: np.random.Generator
) -> Tensor:
    """The ``counts[l]`` weights of each layer l whose draw from Beta(wins, losses) is largest."""
    draws = rng.beta(wins.double().numpy(), losses.double().numpy())
    mask = torch.zeros(len(wins), dtype=torch.bool)
    for layer, count in zip(layers, counts, strict=True):
        # In float64, where draws near 1 differ.
        best = np.argsort(-draws[layer.span], kind="stable")[:count]
        mask[torch.from_numpy(best) + layer.start] = True
    return mask
