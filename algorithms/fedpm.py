"""FedPM: weights stay frozen at random values, and clients learn which of them to switch on.

Isik et al., "Sparse Random Networks for Communication-Efficient Federated Learning", ICLR 2023, arXiv
2209.15328; the authors' code and their Flower baseline. With a penalty that makes the masks sparse:
Mestoukirdi et al., "Communication-Efficient Federated Learning via Regularized Sparse Random Networks", IEEE
Communications Letters 2023, arXiv 2309.10834. Another FedPM, of 2025, mixes preconditioned gradients.

What the server holds of a weight is v = theta w0: w0 = sign(v) c is frozen, theta the chance that it is on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import layer_counts, layer_sizes, uniform_scores
from algorithms.core.parameters import ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer


class FedPMClient(Client):
    """Trains scores s with theta = sigmoid(s); every pass draws a mask, and one more is sent."""

    method: FedPM

    def begin(self) -> None:
        """Scores of the chances received, in the weights' place; rounding on this way stays below 1e-6."""
        visit = self.visit
        self.frozen = self.method.frozen(visit.prunable, visit.layout)
        self.theta = visit.prunable / self.frozen
        self.uniform = torch.empty_like(self.theta)
        torch.logit(self.theta, eps=1e-6, out=visit.prunable)

    def before_forward(self) -> None:
        """The model is m w0, for m ~ Bernoulli(theta) drawn anew."""
        visit = self.visit
        torch.sigmoid(visit.prunable, out=self.theta)
        mask = torch.lt(self._draw(), self.theta, out=self.uniform)
        torch.mul(mask, self.frozen, out=visit.model[: visit.layout.prunable_size])

    def after_backward(self) -> None:
        """dL/ds = dL/d(m w0) w0 sigmoid'(s), straight through the draw; and the penalty's own."""
        visit, method, theta = self.visit, self.method, self.theta
        gradient = visit.prunable_gradient.mul_(self.frozen)
        if method.estimator == "scaled":
            gradient.mul_(theta)
        if method.penalty:
            gradient.add_(method.penalty / len(gradient))
        gradient.mul_(theta).addcmul_(gradient, theta, value=-1.0)
        visit.gradient[len(gradient) :] = 0.0

    def after_step(self) -> None:
        """After the last step v = theta w0 again, which is what masks are told from."""
        visit = self.visit
        if visit.step == visit.steps:
            visit.prunable.sigmoid_().mul_(self.frozen)

    def finish(self) -> Tensor | None:
        """w0 on one mask m ~ Bernoulli(theta)."""
        visit = self.visit
        theta = torch.div(visit.prunable, self.frozen, out=self.theta)
        self.density = np.array([float(theta[entry.span].mean()) for entry in visit.layout.prunable])
        support = self._draw() < theta
        visit.prunable.copy_(self.frozen).masked_fill_(~support, 0.0)
        visit.measure("theta", theta.mean())
        visit.measure("entropy_bytes", entropy_bytes(support, visit.layout))
        return support

    def training_density(self, trained: np.ndarray) -> np.ndarray:
        """Mean theta: the share of weights that a pass draws."""
        return self.density

    def _draw(self) -> Tensor:
        """Uniform numbers in [0, 1), float32[prunable]."""
        if self.uniform.is_cuda:
            return self.uniform.uniform_()
        self.visit.rng.random(len(self.uniform), np.float32, out=self.uniform.numpy())
        return self.uniform


def entropy_bytes(mask: Tensor, layout: ParameterLayout) -> float:
    """Bytes that masks with these densities of the layers need on average if nothing else is told of them."""
    bits = 0.0
    for size, count in zip(layer_sizes(layout.prunable), layer_counts(mask, layout.prunable), strict=True):
        bits -= sum(part * math.log2(part / size) for part in (int(count), int(size - count)) if part)
    return bits / 8.0


@dataclass(frozen=True, kw_only=True)
class FedPM(Algorithm):
    """Frozen signed constants, learned chances; what is sent is a mask, at most one bit a weight."""

    name = "fedpm"
    paper = "Isik et al., ICLR 2023, arXiv 2209.15328"
    departures = (
        "Biases and norms stay frozen at the common initialisation; the authors give biases masks and have "
        "no norms.",
        "The authors run Adam at 0.1 without decay: local.optimizer.name=adamw local.lr=0.1.",
        "Evaluation draws one mask for good; the authors draw one for every test batch.",
        "The straight-through gradient is the paper's; the authors' code has one more factor theta: "
        "estimator=scaled.",
    )
    client = FedPMClient

    penalty: float = hyperparameter(
        0.0,
        "weight of the mean theta in the local loss, which makes masks sparse; it acts through Adam, whose "
        "steps have the same size where the data have no say",
        low=0.0,
        high=10.0,
        source="arXiv 2309.10834",
    )
    epsilon: float = hyperparameter(
        0.01,
        "a mean mask of 0 becomes this chance, one of 1 becomes 1 minus it, linearly between",
        above=0.0,
        low=1e-6,
        high=0.49,
        source="the authors' code",
    )
    estimator: str = hyperparameter(
        "straight_through",
        "gradient of the draw: `straight_through`, or `scaled` by theta",
        choices=("straight_through", "scaled"),
        source="the paper; the authors' code",
    )
    constant: str = hyperparameter(
        "e",
        "size of the frozen weights: e / sqrt(fan-in), or `kaiming`: sqrt(2 / fan-in)",
        choices=("e", "kaiming"),
        source="the authors' code; the paper",
    )
    prior_reset: int = hyperparameter(
        1,
        "rounds over which masks are averaged before the Beta prior is reset",
        low=1,
        high=10_000,
        source="1 in the authors' code; 1/participation in the paper",
    )
    evaluate: str = hyperparameter(
        "sample",
        "the global model: one Bernoulli(theta) mask from a constant seed, theta > 1/2 (`threshold`), or the "
        "dense `mean` theta w0",
        choices=("sample", "threshold", "mean"),
        source="the authors' code draws for every batch, or takes the threshold",
    )

    @property
    def reparameterised(self) -> bool:
        """Modules compute with m w0, steps are taken on scores."""
        return True

    @property
    def trains_zeros(self) -> bool:
        """A frozen weight has the sign that it begins with; all zeros have the same."""
        return False

    def scale(self, layout: ParameterLayout) -> Tensor:
        """c of every weight, float32[prunable]; the fan-in of a convolution counts its kernel."""
        factor = math.e if self.constant == "e" else math.sqrt(2.0)
        sizes = [(entry.size, factor / math.sqrt(math.prod(entry.shape[1:]))) for entry in layout.prunable]
        return torch.cat([torch.full((size,), c) for size, c in sizes])

    def frozen(self, weights: Tensor, layout: ParameterLayout) -> Tensor:
        """w0 = sign(v) c, float32[prunable]."""
        scale = self.scale(layout).to(weights.device)
        return torch.copysign(scale, weights[: layout.prunable_size])

    # ---- server half

    def initial_state(
        self, weights: Tensor, layout: ParameterLayout, rng: np.random.Generator
    ) -> ServerState:
        """Signs of the common initialisation, and theta = sigmoid of normal scores."""
        scores = torch.from_numpy(rng.standard_normal(layout.prunable_size, np.float32))
        state = ServerState(round=0, weights=self._with(weights, torch.sigmoid(scores), layout))
        return self._since_reset(state, 0.0)

    def aggregate(self, state: ServerState, total: Total, layout: ParameterLayout) -> Tensor:
        """v of the clients' mean mask: the mode of Beta(1 + votes, 1 + absences), squashed by epsilon."""
        mean, prunable = super().aggregate(state, total, layout), layout.prunable_size
        scale = self.scale(layout)
        theta = mean[:prunable].abs() / scale
        if seen := self._seen(state):
            before = (state.weights[:prunable].abs() / scale - self.epsilon) / (1.0 - 2.0 * self.epsilon)
            theta = torch.lerp(before, theta, total.samples / (seen + total.samples))
        mean[:prunable] = self._with(state.weights, theta, layout)[:prunable]
        return mean

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """As everywhere; what the mean mask stands on grows until the prior is reset."""
        after = super().advance(state, total, server, layout, share)
        return self._since_reset(after, self._seen(state) + total.samples, state.round // self.prior_reset)

    def _with(self, weights: Tensor, theta: Tensor, layout: ParameterLayout) -> Tensor:
        """``weights`` with v of such chances, squashed."""
        chances = self.epsilon + (1.0 - 2.0 * self.epsilon) * theta
        return torch.cat([self.frozen(weights, layout) * chances, weights[layout.prunable_size :]])

    def _seen(self, state: ServerState) -> float:
        """Weight of the updates since the last reset, and none after it."""
        if self.prior_reset == 1:
            return 0.0
        seen, period = state.arrays["prior"].tolist()
        return float(seen) if period == state.round // self.prior_reset else 0.0

    def _since_reset(self, state: ServerState, seen: float, period: int = 0) -> ServerState:
        if self.prior_reset == 1:
            return state
        return replace(state, arrays={"prior": torch.tensor([seen, period], dtype=torch.float64)})

    # ---- both halves

    def known(self, weights: Tensor, layout: ParameterLayout) -> Tensor | None:
        """w0, and what stays frozen beside it."""
        rest = weights[layout.prunable_size : layout.trained_size]
        return torch.cat([self.frozen(weights, layout), rest])

    def effective_weights(self, weights: Tensor, layout: ParameterLayout) -> Tensor:
        """w0 where the mask of ``evaluate`` is on; of what a client sends that is itself."""
        if self.evaluate == "mean":
            return weights
        size = layout.prunable_size
        frozen = self.frozen(weights, layout)
        bar = torch.tensor(0.5)
        if self.evaluate == "sample":
            bar = uniform_scores(size, np.random.default_rng(0)).to(weights.device)
        return torch.cat([torch.where(weights[:size] / frozen > bar, frozen, 0.0), weights[size:]])

    def nonzeros(self, weights: Tensor, layout: ParameterLayout) -> Tensor:
        """Where the effective weights are not 0; v never is."""
        return super().nonzeros(self.effective_weights(weights, layout), layout)

    def problems(self, config: Any) -> Iterator[str]:
        """Whatever would act on theta w0 or on scores as if they were weights."""
        local = config.local
        for key, value in (("weight_decay", local.weight_decay), ("proximal", local.proximal)):
            if value:
                yield f"local.{key}: {value:g} pulls at weights, and {self.name} trains scores; leave it at 0"
        if config.build_server() != ServerOptimizer():
            yield f"server.name: {config.server.name}, but {self.name} averages masks; leave the section out"
        if config.wire.uplink != "float32":
            yield f"wire.uplink: {config.wire.uplink}, but {self.name} sends no values; leave it at float32"
        if config.wire.bits is not None and not config.privacy.secure.asked:
            yield f"wire.grid: {config.wire.bits}, but {self.name} sends no values; leave it at exact"
        if config.wire.downlink == "int8" and self.epsilon < 0.005:
            yield (
                f"algorithm.epsilon: {self.epsilon:g} times the largest weight rounds to 0 with "
                f"wire.downlink=int8, which loses the sign that {self.name} needs; set 0.005 or more"
            )


@dataclass(frozen=True, kw_only=True)
class FedPMReg(FedPM):
    """FedPM with a penalty on theta, so that masks cost less than a bit a weight."""

    name = "fedpm_reg"
    paper = "Mestoukirdi et al., IEEE Communications Letters 2023, arXiv 2309.10834"

    penalty: float = hyperparameter(
        1.0,
        "weight of the mean theta in the local loss, which makes masks sparse; it acts through Adam",
        low=0.0,
        high=10.0,
        log=True,
        search=(0.01, 10.0),
        source="arXiv 2309.10834; the value is ours",
    )
