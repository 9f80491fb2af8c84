"""Flying Bird: a dynamic sparse mask for adversarial training; Flying Bird+ moves its sparsity as well.

Chen et al., "Sparsity Winning Twice: Better Robust Generalization from More Efficient Training", ICLR 2022,
arXiv 2202.09844. Here the mask is exchanged by the clients and pruned back by the server as in FedDST, and
the attack is the section ``attack``'s.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import ServerState
from algorithms.core.client import Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import uniform_scores
from algorithms.core.parameters import Carried, ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer
from algorithms.feddst import FedDST, FedDSTClient
from algorithms.fixed_mask import FixedMask

#: Changes from round to round that Flying Bird+ looks at.
CHANGES = 4


class FlyingBirdClient(FedDSTClient):
    """Exchanges a share of each layer; with ``adaptive``, tells how the received model does on held-out rows.

    Every tenth row of the client is then held out of its training for good.
    """

    method: FlyingBird

    def begin(self) -> None:
        """Hold rows out, and measure the received model under attack on them and on as many others."""
        super().begin()
        if self.method.adaptive:
            visit = self.visit
            rows = torch.arange(len(visit.targets), device=visit.targets.device)
            held = rows % 10 == 9 if len(rows) >= 10 else rows == len(rows) - 1
            train = rows[~held] if len(rows) > 1 else rows
            others = train[:: max(1, len(train) // int(held.sum()))][: int(held.sum())]
            seen, _ = self._measured(others)
            accuracy, loss = self._measured(rows[held])
            visit.carried["robustness"].copy_(torch.stack([seen - accuracy, loss]))
            visit.measure("held_out_accuracy", accuracy, float(held.sum()))
            visit.inputs, visit.targets = visit.inputs[train], visit.targets[train]
            visit.steps_per_epoch = -(-len(train) // visit.batch_size)
            if visit.instructions.steps is None:
                visit.steps = visit.epochs * visit.steps_per_epoch

    def _measured(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and loss under attack."""
        visit = self.visit
        targets = visit.targets[rows]
        outputs = visit.forward(visit.model, visit.attacked(visit.inputs[rows], targets))
        return (outputs.argmax(1) == targets).float().mean(), F.cross_entropy(outputs.float(), targets)

    def exchange(self, exchanged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`FedDSTClient`: prune 1.4 times as many, or grow 1.05 times."""
        phase, drops, growths = self.visit.instructions.phase, exchanged, exchanged
        if "prune more" in phase:
            drops = exchanged + np.floor(0.4 * exchanged + 1e-6).astype(np.int64)
        if "grow more" in phase:
            growths = np.floor(1.05 * exchanged + 1e-6).astype(np.int64)
        return drops, growths

    def growth_scores(self) -> Tensor:
        """See :class:`FedDSTClient`; random ones are the same for all who received one model."""
        if self.method.growth == "gradient":
            return super().growth_scores()
        visit = self.visit
        seed = zlib.crc32(visit.global_weights.cpu().numpy().tobytes())
        scores = uniform_scores(visit.layout.prunable_size, np.random.default_rng(seed))
        return scores.to(visit.weights.device)


@dataclass(frozen=True, kw_only=True)
class FlyingBird(FedDST):
    """Dynamic sparse adversarial training; `adaptive` is Flying Bird+, death rates of 0 are `fixed_mask`."""

    name = "flying_bird"
    paper = "Chen et al., ICLR 2022, arXiv 2202.09844"
    departures = (
        "Clients drop and grow, the server prunes the union back to the layers' counts, as in FedDST; the "
        "authors train centrally.",
        "A layer exchanges round(r n) of its n weights; in the authors' code ceil(r n).",
        "Weights grow by gradient; the authors' published commands grow at random (growth=random).",
        "Flying Bird+ judges the model received every round, on a tenth of each client's rows that it does "
        "not train on; the authors hold 5,000 images out and look at every epoch.",
    )
    client = FlyingBirdClient

    layer_density: str = hyperparameter(
        "igq",
        "layer densities of the initial mask: ideal gas quotas, or as in `fixed_mask`",
        choices=("igq", "uniform", "er", "erk"),
        source="authors' code",
    )
    readjust_interval: int = hyperparameter(
        26,
        "rounds between exchanges",
        low=1,
        high=10000,
        search=(2, 50),
        source="900 steps of 128 in the authors' code: 2.6 epochs, or 26 rounds of 10 of 100 clients",
    )
    readjust_fraction: float = hyperparameter(
        0.5,
        "death rate at first, share of each layer's mask that is exchanged",
        low=0.0,
        high=1.0,
        search=(0.1, 0.7),
        source="authors' code",
    )
    final_fraction: float = hyperparameter(
        0.005, "death rate at the end, on a cosine over all rounds", low=0.0, high=1.0, source="authors' code"
    )
    growth: str = hyperparameter(
        "gradient",
        "where weights grow: `gradient` of a batch under attack, or `random`",
        choices=("gradient", "random"),
        search=("gradient", "random"),
    )
    adaptive: bool = hyperparameter(
        False,
        "Flying Bird+: from half of the rounds on, drop 1.4 times as many where the robust gap grew in half "
        "of the last 4 rounds, and grow 1.05 times as many where the held-out robust loss did",
        source="authors' code",
    )

    @property
    def least_passes(self) -> float:
        """One, but of Flying Bird+ none: clients hold rows out."""
        return 0.0 if self.adaptive else super().least_passes

    def problems(self, config: Any) -> Iterator[str]:
        """Flying Bird+ where nothing is classified."""
        yield from super().problems(config)
        if self.adaptive and not config.left_alone("objective") and not config.build_objective().by_class:
            yield (
                "algorithm.adaptive: true judges by accuracy, and objective.name="
                f"{config.objective.name} has no classes; set adaptive=false"
            )

    def carries(self, layout: ParameterLayout) -> Mapping[str, Carried]:
        """Of Flying Bird+ the robust gap and the held-out robust loss, up."""
        return {"robustness": Carried(2, "up")} if self.adaptive else {}

    # ---- server half

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """See :class:`FixedMask`; Flying Bird+ knows of no round yet."""
        state = super().initial_state(weights, layout, rng)
        unknown = torch.full((CHANGES + 1, 2), math.nan)
        return replace(state, arrays={"robustness": unknown}) if self.adaptive else state

    def instruct(self, state: ServerState, rounds: int, clients: int) -> Instructions:
        """Every so many rounds but the last: exchange r_t = r_T + (r_0 - r_T) (1 + cos(pi t / T)) / 2."""
        told = FixedMask.instruct(self, state, rounds, clients)
        share = told.round / rounds
        first, last = self.readjust_fraction, self.final_fraction
        rate = last + (first - last) * (1 + math.cos(math.pi * share)) / 2
        if told.round % self.readjust_interval or share >= 1.0 or rate <= 0.0:
            return told
        more = self._more(state.arrays["robustness"]) if self.adaptive and share >= 0.5 else []
        return replace(told, phase=", ".join(["readjust", *more]), value=rate)

    def _more(self, history: Tensor) -> list[str]:
        """What the last rounds ask for beyond an exchange of as many as are dropped."""
        if not torch.isfinite(history).all():
            return []
        gap, loss = (history[1:] - history[:-1]).T
        half = CHANGES / 2
        prune, grow = int((gap > 0).sum()) >= half, int((loss >= 0).sum()) >= half
        return ["prune more"] * prune + ["grow more"] * grow

    @property
    def beyond_sums(self) -> str:
        """Flying Bird+ needs votes."""
        return "counts how many clients hold a weight (adaptive: true)" if self.adaptive else ""

    def next_counts(self, mask: Tensor, total: Total, layout: ParameterLayout) -> np.ndarray:
        """As many as before; of Flying Bird+ as many as a client holds on average."""
        if not self.adaptive:
            return super().next_counts(mask, total, layout)
        held = [int(total.votes[layer.span].sum()) / len(total.clients) for layer in layout.prunable]
        return np.rint(held).astype(np.int64)

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """See :class:`FedDST`; Flying Bird+ remembers what clients measured."""
        after = super().advance(state, total, server, layout, share)
        if not self.adaptive:
            return after
        newest = layout.split(after.weights, layout.up)["robustness"].reshape(1, 2)
        return replace(after, arrays={"robustness": torch.cat([state.arrays["robustness"][1:], newest])})
