"""PruneFL: the server finds mask and size anew every few rounds, by how much a weight learns for its time.

Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", arXiv 1909.12326.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import layer_counts, layer_wise_top_k
from algorithms.core.parameters import Carried, Entry, ParameterLayout
from algorithms.fixed_mask import MaskedClient

#: Steps between the adjustments of the one client before round 1, which end when the number of weights has
#: moved by at most a tenth five times in a row.
INITIAL_STEPS, SETTLED_WITHIN, SETTLED_TIMES = 10, 0.1, 5


class PruneFLClient(MaskedClient):
    """Trains inside the mask; where it is told, adds up the squares of all gradients and sends them."""

    method: PruneFL

    def begin(self) -> None:
        """Take the mask; nothing is added up yet."""
        super().begin()
        self._adds = self.visit.instructions.phase != "train"
        self._squares = torch.zeros(self.visit.layout.prunable_size + 1, device=self.visit.weights.device)
        self._counts: list[int] = []

    def after_backward(self) -> None:
        """g^2 of every prunable weight, absent ones too, and of all others together."""
        if self._adds:
            squares, prunable = self.visit.gradient.square(), self.visit.layout.prunable_size
            self._squares[:prunable] += squares[:prunable]
            self._squares[prunable] += squares[prunable:].sum()
        super().after_backward()

    def after_step(self) -> None:
        """Before round 1 the client adjusts the mask by itself, until its size has settled."""
        super().after_step()
        visit = self.visit
        if visit.instructions.phase != "initial" or visit.step % INITIAL_STEPS or self._settled():
            return
        assert self.mask is not None
        weights, mask, squares = visit.prunable.cpu(), self.mask.cpu(), self._squares.cpu()
        mask = self.method.adjusted(weights, mask, squares, visit.seconds, visit.layout.prunable, 0)
        self._counts.append(int(mask.sum()))
        self._squares.zero_()
        self.hold(mask.to(visit.weights.device))

    def _settled(self) -> bool:
        last = self._counts[-SETTLED_TIMES - 1 :]
        moves = [abs(after / before - 1.0) for before, after in itertools.pairwise(last)]
        return len(moves) == SETTLED_TIMES and max(moves) <= SETTLED_WITHIN

    def finish(self) -> Tensor | None:
        """Send the masked weights; in an adjusting round the squares, and what weights cost this device."""
        visit = self.visit
        if visit.instructions.phase == "adjust":
            visit.carried["squares"].copy_(self._squares)
            visit.carried["seconds"].copy_(visit.seconds)
        return self.mask

    def gradient_density(self, nonzeros: np.ndarray) -> np.ndarray:
        """All of the gradient where it is added up, the mask's elsewhere."""
        return np.ones(len(nonzeros)) if self._adds else super().gradient_density(nonzeros)


@dataclass(frozen=True, kw_only=True)
class PruneFL(Algorithm):
    """Adaptive pruning: weights stay or come while their g^2 a second exceeds that of the whole model."""

    name = "prunefl"
    paper = "Jiang et al., arXiv 1909.12326"
    departures = (
        "Squares are added up over the steps of the adjusting round; in the authors' code those of summed "
        "gradients, of all rounds since the last adjustment.",
        "Before round 1 the client adjusts every 10 steps, on its batches as they come; in the authors' code "
        "on 10 fixed batches, from a given accuracy on.",
        "Seconds are those of the simulated devices, averaged over the cohort; the authors measured theirs.",
    )
    client = PruneFLClient

    readjust_interval: int = hyperparameter(
        50, "rounds between adjustments", low=1, high=10000, search=(3, 100)
    )
    drop_fraction: float = hyperparameter(
        0.3,
        "share of each layer's smallest weights that have to earn their place again",
        low=0.0,
        high=1.0,
        search=(0.1, 0.5),
    )
    half_life: int = hyperparameter(10000, "rounds in which drop_fraction halves", low=1, high=1000000)
    max_density: float = hyperparameter(
        1.0,
        "share of the prunable weights beyond which none come; a denser model shrinks by drop_fraction",
        low=1e-4,
        high=1.0,
    )
    initial_adjustments: int = hyperparameter(
        20,
        "most adjustments of one client before round 1, of 10 steps each; 0: start dense",
        low=0,
        high=1000,
    )

    @property
    def first_round(self) -> int:
        """0: one client prunes before round 1."""
        return 0 if self.initial_adjustments else 1

    # ---- server half

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """Dense."""
        mask = torch.ones(layout.prunable_size, dtype=torch.bool)
        return ServerState(round=self.first_round - 1, weights=weights, mask=mask)

    def instruct(self, state: ServerState, rounds: int, clients: int) -> Instructions:
        """``initial`` before round 1, of one client; ``adjust`` every ``readjust_interval``-th round."""
        told = super().instruct(state, rounds, clients)
        if told.round == 0:
            steps = INITIAL_STEPS * self.initial_adjustments
            return replace(told, phase="initial", steps=steps, cohort=1)
        return replace(told, phase="adjust") if told.round % self.readjust_interval == 0 else told

    @property
    def beyond_sums(self) -> str:
        """Its stage before round 1 is one client's."""
        return "" if self.first_round else "begins with the update of a single client"

    def next_mask(
        self, state: ServerState, weights: Tensor, total: Total, layout: ParameterLayout
    ) -> Tensor | None:
        """The one client's after its stage; in an adjusting round what the mean squares and seconds say."""
        number = state.round + 1
        if number == 0:
            return torch.from_numpy(total.held)
        if number % self.readjust_interval:
            return state.mask
        assert state.mask is not None
        sent = layout.split(weights, layout.up)
        return self.adjusted(
            weights[: layout.prunable_size],
            state.mask,
            sent["squares"],
            sent["seconds"],
            layout.prunable,
            number,
        )

    def adjusted(
        self,
        weights: Tensor,
        mask: Tensor,
        squares: Tensor,
        seconds: Tensor,
        layers: Sequence[Entry],
        number: int,
    ) -> Tensor:
        """The mask of the largest g^2 a second: all but the smallest weights stay, others come while it pays.

        Args:
            weights: float32[prunable].
            mask: What was trained, bool[prunable].
            squares: g^2 of every prunable weight, and of all other parameters: float32[prunable + 1].
            seconds: Of a weight of each layer, and of the rest of a round: float32[layers + 1].
            layers: The prunable layers.
            number: The round, by which ``drop_fraction`` halves.
        """
        fraction = self.drop_fraction * 0.5 ** (number / self.half_life)
        counts = layer_counts(mask, layers)
        kept = layer_wise_top_k(
            weights.abs(), counts - np.floor(fraction * counts).astype(np.int64), layers, mask
        )
        gains, stays = squares.double().numpy(), kept.numpy()
        each = np.repeat(seconds[:-1].double().numpy(), [layer.size for layer in layers])
        gain = gains[-1] + gains[:-1][stays].sum()
        cost = float(seconds[-1]) + each[stays].sum()
        candidates = np.flatnonzero(~stays)
        rates = gains[candidates] / each[candidates]
        order = np.argsort(-rates, kind="stable")
        order = order[: max(0, round(self.max_density * len(weights)) - int(stays.sum()))]
        candidates, rates = candidates[order], rates[order]
        # One comes if its own rate exceeds that of all before it together.
        gained = gain + np.append(0.0, np.cumsum(gains[candidates]))[:-1]
        spent = cost + np.append(0.0, np.cumsum(each[candidates]))[:-1]
        pays = rates > gained / spent
        coming = len(pays) if pays.all() else int(np.argmin(pays))
        kept[torch.from_numpy(candidates[:coming])] = True
        return kept

    def carries(self, layout: ParameterLayout) -> Mapping[str, Carried]:
        """g^2 and seconds, dense float32; only in adjusting rounds are they not 0, and travel."""
        return {
            "squares": Carried(layout.prunable_size + 1, "up"),
            "seconds": Carried(len(layout.prunable) + 1, "up"),
        }
