"""MASHA: saddle problems by compressed differences of operators around a reference point that all know.

Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov, "Distributed Methods with Compressed Communication for
Solving Variational Inequalities, with Theoretical Guarantees", arXiv 2110.03313; no code is public, and what
follows is not checked against the paper's text. Extragradient in two kinds of round. A *reference* round: all
clients send F_m(w), dense. A *step*: with zbar = tau z + (1 - tau) w, clients send F_m(z') - F_m(w) at z' =
zbar - gamma G, compressed; the server takes zbar - gamma (G + their mean) (masha1), or z' less their mean
(masha2), for the new z, which with probability 1 - tau becomes the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Client, Instructions
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.local_optimizers import Sgd
from algorithms.core.masks import cut_to_top_k
from algorithms.core.parameters import Carried, ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer
from algorithms.sgda import NEEDS, ascending, confine, turn, without_perturbation


class MashaClient(Client):
    """Takes whole gradients at one point or two, and no step."""

    method: Masha
    support: Tensor | None = None
    loss: Tensor = torch.zeros(())

    def train(self, batches: Iterable[Tensor]) -> Tensor:
        """F_m(w) in a reference round, else what the compressor leaves of F_m(z') - F_m(w)."""
        visit, trained = self.visit, self.visit.layout.trained_size
        here = self._local_gradient()
        if visit.instructions.phase == "step":
            visit.weights.copy_(visit.carried["w"])
            here = self.compressed(here - self._local_gradient())
        visit.weights.copy_(here[:trained])
        return self.loss

    def _local_gradient(self) -> Tensor:
        """The operator of all of the client's rows at ``visit.weights``, float32[trained]."""
        visit, samples = self.visit, len(self.visit.targets)
        mean, self.loss = torch.zeros_like(visit.gradient), torch.zeros(())
        for start in range(0, samples, visit.batch_size):
            rows = slice(start, start + visit.batch_size)
            share = len(visit.targets[rows]) / samples
            self.loss = self.loss + share * visit.gradient_of(visit.inputs[rows], visit.targets[rows])
            mean.add_(visit.gradient, alpha=share)
        turn(mean, visit.weights, visit.layout, self.method.ridge)
        return mean

    def compressed(self, difference: Tensor) -> Tensor:
        """K of the prunable positions at random, times d/K; unbiased."""
        visit, size = self.visit, self.visit.layout.prunable_size
        chosen = torch.from_numpy(visit.rng.permutation(size)[: visit.keep]).to(difference.device)
        self.support = torch.zeros(size, dtype=torch.bool, device=difference.device)
        self.support[chosen] = True
        difference[:size] *= self.support * (size / max(1, visit.keep))
        return difference

    def finish(self) -> Tensor | None:
        """The positions that travel; all of them in a reference round."""
        return self.support


class ContractiveMashaClient(MashaClient):
    """Cuts gamma times the difference and what earlier cuts left; keeps what this one leaves."""

    def compressed(self, difference: Tensor) -> Tensor:
        """The K largest of gamma d + e; e is what they leave."""
        visit, size = self.visit, self.visit.layout.prunable_size
        difference = difference * self.method.gamma
        wanted = difference[:size] + visit.kept.get("error", torch.zeros(size, device=difference.device))
        difference[:size] = wanted
        cut_to_top_k(difference[:size], visit.keep)
        self.support = difference[:size] != 0
        visit.kept["error"] = wanted - difference[:size]
        return difference


@dataclass(frozen=True, kw_only=True)
class Masha(Algorithm):
    """What both have in common: the phases, and the server's extragradient."""

    paper = "Beznosikov et al., arXiv 2110.03313"
    departures = (
        "One-sided: clients receive z' and w dense. The new z becomes the reference, so that tau 0 is "
        "extragradient; which one the paper takes is not checked.",
        "What is not prunable, the perturbation included, is not compressed.",
    )
    client = MashaClient

    sparsity: float = hyperparameter(
        0.9, "share of the prunable coordinates that a compressed message leaves out", low=0.0, high=0.9999
    )
    gamma: float = hyperparameter(
        0.1, "step size, the local rate is not used", low=0.0, high=10.0, log=True, search=(1e-3, 1.0)
    )
    reference_chance: float = hyperparameter(
        0.0, "1 - tau; 0: 1 - sparsity, so that both kinds of message cost as much", low=0.0, high=1.0
    )
    ridge: float = hyperparameter(0.0, "lambda: ridge/2 |u|^2 is taken off the saddle", low=0.0, high=100.0)
    ball: float = hyperparameter(0.0, "largest magnitude of u; 0: none; masha1 alone", low=0.0, high=10.0)

    @property
    def chance(self) -> float:
        """1 - tau."""
        return self.reference_chance or 1.0 - self.sparsity

    def problems(self, config: Any) -> Iterator[str]:
        """Clients take no step, and the server its own."""
        if config.build_server() != ServerOptimizer():
            yield f"server.name: {config.server.name}; {self.name} takes the server's step itself"
        local = config.local
        plain = config.build_local_optimizer() == Sgd()
        if not plain or local.weight_decay or local.proximal or local.clip_norm:
            yield f"local: {self.name} takes no local step; leave optimizer, decay, proximal, clip_norm out"

    def carries(self, layout: ParameterLayout) -> Mapping[str, Carried]:
        """Down w.

        Raises:
            ValueError: Nothing ascends, or the operator would depend on running statistics.
        """
        if ascending(layout) is None:
            raise ValueError(NEEDS.format(self.name))
        return self._carried(layout)

    def _carried(self, layout: ParameterLayout) -> Mapping[str, Carried]:
        if layout.buffers:
            raise ValueError(f"algorithm.name: {self.name} needs a model without running statistics")
        return {"w": Carried(layout.trained_size, "down")}

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """Z = w = z0, and the first round is one of reference."""
        point = weights[: layout.trained_size].clone()
        layout.split(weights, layout.carried)["w"].copy_(point)
        arrays = {"z": point, "G": torch.zeros_like(point), "reference": torch.ones(1)}
        seed = torch.tensor([float(rng.integers(2**24))])
        return ServerState(round=0, weights=weights, arrays={**arrays, "coin": seed})

    def instruct(self, state: ServerState, rounds: int, clients: int) -> Instructions:
        """All clients in a reference round, a cohort in a step; no model is sent."""
        due = bool(state.arrays["reference"])
        told = Instructions(round=state.round + 1, rounds=rounds, sends_model=False)
        return replace(told, phase="reference", cohort=clients) if due else replace(told, phase="step")

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """G = mean F_m(w); or the extragradient's second half, and the coin."""
        trained, arrays = slice(0, layout.trained_size), dict(state.arrays)
        mean = self.aggregate(state, total, layout)[trained]
        weights = state.weights.clone()
        w = layout.split(weights, layout.carried)["w"]
        heads = False
        if bool(arrays["reference"]):
            arrays["G"] = mean
        else:
            arrays["z"] = self.second_half(state, mean, layout)
            coin = np.random.default_rng([int(arrays["coin"]), state.round]).random()
            heads = coin < self.chance
            if heads:
                w.copy_(arrays["z"])
        arrays["reference"] = torch.tensor([float(heads)])
        # Where clients evaluate next: w, or z' = zbar - gamma G.
        point = w.clone() if heads else self._bar(arrays["z"], w) - self.gamma * arrays["G"]
        confine(point, layout, 0.0 if heads else self.ball)
        weights[trained] = point
        return replace(state, round=state.round + 1, weights=weights, arrays=arrays)

    def _bar(self, z: Tensor, w: Tensor) -> Tensor:
        return (1.0 - self.chance) * z + self.chance * w

    def second_half(self, state: ServerState, mean: Tensor, layout: ParameterLayout) -> Tensor:
        """Z after the step, float32[trained]."""
        w = layout.split(state.weights, layout.carried)["w"]
        z = self._bar(state.arrays["z"], w) - self.gamma * (state.arrays["G"] + mean)
        confine(z, layout, self.ball)
        return z

    def effective_weights(self, weights: Tensor, layout: ParameterLayout) -> Tensor:
        """The model without the perturbation."""
        return without_perturbation(weights, layout)


@dataclass(frozen=True, kw_only=True)
class Masha1(Masha):
    """MASHA with an unbiased compressor, random positions."""

    name = "masha1"


@dataclass(frozen=True, kw_only=True)
class Masha2(Masha):
    """MASHA with a contractive compressor, the largest positions, and error feedback at the clients."""

    name = "masha2"
    client = ContractiveMashaClient

    def problems(self, config: Any) -> Iterator[str]:
        """No prox beside error feedback."""
        yield from super().problems(config)
        if self.ball:
            yield f"algorithm.ball: {self.ball:g}; masha2 has no ball, set algorithm.ridge"

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """What the cuts left."""
        return {"error": layout.prunable_size}

    def second_half(self, state: ServerState, mean: Tensor, layout: ParameterLayout) -> Tensor:
        """Z' less what was sent, which holds gamma."""
        return state.weights[: layout.trained_size] - mean
