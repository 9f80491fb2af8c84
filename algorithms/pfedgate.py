"""pFedGate: one dense model for all, and a gate of each client's own that opens blocks of it within a budget.

Chen et al., "Efficient Personalized Federated Learning via Sparse Model-Adaptation", ICML 2023, arXiv
2305.02776; code yxdyc/pFedGate b8cfa15. A gate opens block b by t_b in (0, 1); the model computes with W r,
r_b = t_b in blocks that are kept and 0 in those that the budget drops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algorithms.core.aggregation import Total
from algorithms.core.algorithm import Algorithm, ServerState
from algorithms.core.client import Client
from algorithms.core.hyperparameters import hyperparameter
from algorithms.core.masks import layer_sizes
from algorithms.core.parameters import ParameterLayout
from algorithms.core.server_optimizers import ServerOptimizer

#: Side of the small picture that a gate of images looks at.
_SIDE = 8


@dataclass(frozen=True, eq=False)
class Blocks:
    """The prunable weights cut to blocks, in flat order.

    Attributes:
        sizes: Weights of each, int64[blocks].
        first: Whether it is the first of its tensor, bool[blocks].
        linear: Whether its tensor is a linear layer's, bool[blocks].
        layer: Index of its tensor, int64[blocks].
    """

    sizes: np.ndarray
    first: np.ndarray
    linear: np.ndarray
    layer: np.ndarray

    def expand(self, values: Tensor) -> Tensor:
        """A value of each block for each of its weights, [prunable]."""
        return torch.repeat_interleave(values, torch.from_numpy(self.sizes).to(values.device))


@lru_cache(maxsize=8)
def blocks_of(layout: ParameterLayout, count: int) -> Blocks:
    """Every tensor of N weights in blocks of ceil(N / min(count, N)), the last of what is left."""
    found = []
    for place, entry in enumerate(layout.prunable):
        size = -(-entry.size // min(count, entry.size))
        for start in range(0, entry.size, size):
            found.append((min(size, entry.size - start), start == 0, len(entry.shape) == 2, place))
    sizes, first, linear, layer = (np.array(column) for column in zip(*found, strict=True))
    return Blocks(sizes, first, linear, layer)


class PFedGateClient(Client):
    """Trains W under its own gate, which stays; sends what changed in blocks that a local batch kept."""

    method: PFedGate

    def begin(self) -> None:
        """Take the gate from the last visit. It is a few numbers, and lies on the host."""
        visit, method = self.visit, self.method
        self.blocks = method.blocks_of(visit.layout)
        self.gate = visit.kept["gate"].cpu() if "gate" in visit.kept else method.first_gate(visit.layout)
        self.seen = looked_at(visit.inputs) if method.gate == "images" else None
        self.held = np.zeros(len(self.blocks.sizes), bool)
        self.passes, self.kept_layers = 0, np.zeros(len(visit.layout.prunable))
        sizes, prunable = self.blocks.sizes.tolist(), visit.layout.prunable_size
        self.weights = visit.prunable.split(sizes)
        self.model = visit.model[:prunable].split(sizes)
        self.gradients = visit.prunable_gradient.split(sizes)

    def before_forward(self) -> None:
        """The model is W r, and plain in what is not prunable."""
        visit, method = self.visit, self.method
        rows = None if method.scope == "client" else visit.chosen.cpu()
        self.open = self._open(rows)
        self.kept, self.scales = method.scales(self.open.detach(), visit.sparsity, self.blocks)
        for weights, scale, model in zip(self.weights, self.scales.tolist(), self.model, strict=True):
            torch.mul(weights, scale, out=model)
        rest = slice(visit.layout.prunable_size, visit.layout.trained_size)
        visit.model[rest] = visit.weights[rest]
        self.passes += 1
        self.kept_layers += np.bincount(
            self.blocks.layer, self.kept * self.blocks.sizes, len(self.kept_layers)
        )

    def after_backward(self) -> None:
        """dL/dW = r dL/d(W r), and a step of the gate along <dL/d(W r), W> of each block."""
        visit, method = self.visit, self.method
        alternate = method.optimisation == "alternate"
        for_gate = alternate and visit.step // visit.steps_per_epoch % 2 == 0
        if for_gate or not alternate:
            pairs = zip(self.gradients, self.weights, strict=True)
            along = torch.stack([gradient.dot(weights) for gradient, weights in pairs]).cpu()
            slope = method.slopes(self.open.detach(), self.kept, visit.sparsity)
            (own,) = torch.autograd.grad(self.open, self.gate, along * slope)
            self.gate = self.gate.detach().sub(own, alpha=method.gate_lr)
        self.stays = [t.clone() for t in (visit.weights, *visit.moments)] if for_gate else []
        if for_gate:
            return
        self.held |= self.kept
        for gradient, scale in zip(self.gradients, self.scales.tolist(), strict=True):
            gradient.mul_(scale)

    def after_step(self) -> None:
        """In an epoch for the gate neither decay, momentum nor the proximal term move W."""
        for tensor, before in zip((self.visit.weights, *self.visit.moments), self.stays, strict=False):
            tensor.copy_(before)

    def finish(self) -> Tensor | None:
        """w_i - w_t in the blocks held; keep the gate, and r on all of the client's data."""
        visit = self.visit
        kept, scales = self.method.scales(self._open(None).detach(), visit.sparsity, self.blocks)
        device = visit.weights.device
        visit.kept["gate"], visit.kept["scales"] = self.gate.detach().to(device), scales.to(device)
        visit.measure("density", float(self.blocks.sizes[kept].sum() / self.blocks.sizes.sum()))
        visit.weights.sub_(visit.global_weights[: visit.layout.trained_size])
        support = self.blocks.expand(torch.from_numpy(self.held)).to(device)
        visit.prunable.masked_fill_(~support, 0.0)
        return support

    def training_density(self, trained: np.ndarray) -> np.ndarray:
        """Mean share of the weights in kept blocks."""
        return self.kept_layers / self.passes / layer_sizes(self.visit.layout.prunable)

    def gradient_density(self, nonzeros: np.ndarray) -> np.ndarray:
        """The same: in dropped blocks nobody asks for a gradient."""
        return self.training_density(nonzeros)

    def _open(self, rows: Tensor | None) -> Tensor:
        """t of each block, with a graph to the gate."""
        seen = self.seen if self.seen is None or rows is None else self.seen[rows]
        self.gate = self.gate.detach().requires_grad_()
        return self.method.opening(self.gate, seen)


def looked_at(inputs: Tensor) -> Tensor:
    """What a gate sees of each sample: grey, small, of mean 0 and deviation 1, float32[n, 64]."""
    given = inputs.detach().cpu().float()
    if given.dim() == 4:
        small = F.adaptive_avg_pool2d(given.mean(dim=1, keepdim=True), _SIDE).flatten(1)
    else:
        small = F.adaptive_avg_pool1d(given.flatten(1)[:, None], _SIDE * _SIDE)[:, 0]
    return F.layer_norm(small, small.shape[1:])


@dataclass(frozen=True, kw_only=True)
class PFedGate(Algorithm):
    """Personalised and sparse: what clients share is dense, what each computes with fits its budget."""

    name = "pfedgate"
    paper = "Chen et al., ICML 2023, arXiv 2305.02776"
    departures = (
        "A gate is by default one score a block, which looks at no data; the authors' looks at images "
        "(gate=images) and makes a mask for every batch (scope=batch).",
        "gate=images sees 8x8 grey pictures, standardised each; the authors' sees all pixels behind a "
        "switchable norm.",
        "Importances are exact, ties go to the first block; the authors round them to tenths.",
        "Blocks are of prunable weights alone; biases and norms are trained and travel dense.",
        "Dropped blocks do not travel up; the authors average dense models, of momentum and decay too.",
        "What the authors add to the trained logits, a ReLU, is left out.",
    )
    client = PFedGateClient
    unequal_sparsity = True

    sparsity: float = hyperparameter(
        0.5, "1 minus the density that a client's blocks are chosen for", low=0.0, high=0.9999
    )
    blocks: int = hyperparameter(
        5, "blocks of each tensor", low=1, high=1000, source="the authors' code, all published runs"
    )
    gate: str = hyperparameter(
        "scores",
        "`scores`: a score for each block; `images`: a linear layer on the client's samples",
        choices=("scores", "images"),
        source="ours; the authors' code in kind",
    )
    scope: str = hyperparameter(
        "client",
        "a gate of images looks at all samples of the `client`, or at each `batch`",
        choices=("client", "batch"),
        source="ours; the authors' code",
    )
    scale: bool = hyperparameter(True, "kept blocks are multiplied by t, or by 1", source="the authors' code")
    gate_lr: float = hyperparameter(
        0.1,
        "learning rate of the gate's own SGD",
        low=0.0,
        high=10.0,
        log=True,
        search=(0.01, 2.0),
        source="the authors' commands: .03 to 1.5",
    )
    optimisation: str = hyperparameter(
        "joint",
        "gate and weights in one backward pass, or `alternate`: an epoch for the gate, one for the weights",
        choices=("joint", "alternate"),
        source="the authors' bi_level_opt, 0 and 1",
    )
    average_over: str = hyperparameter(
        "cohort",
        "whose weights are averaged: the cohort's, or the `population`'s, the absent counting as unchanged",
        choices=("cohort", "population"),
        source="the authors' aggregate_sampled_clients, 1 and 0",
    )
    first_block_kept: bool = hyperparameter(
        True, "the first block of every tensor is never dropped", source="the authors' code"
    )

    @property
    def reparameterised(self) -> bool:
        """Modules compute with W r."""
        return True

    @property
    def uploads_differences(self) -> bool:
        """A block that no batch kept has not changed."""
        return True

    def lay_out(self, layout: ParameterLayout, model: nn.Module, example: Tensor) -> ParameterLayout:
        """See :class:`Algorithm`; refuses tokens to look at."""
        if self.gate == "images" and not example.is_floating_point():
            raise ValueError(
                "algorithm.gate: images looks at samples as numbers, which tokens are not; set scores"
            )
        return super().lay_out(layout, model, example)

    # ---- the gate

    def blocks_of(self, layout: ParameterLayout) -> Blocks:
        """The blocks of a model."""
        return blocks_of(layout, self.blocks)

    def first_gate(self, layout: ParameterLayout) -> Tensor:
        """Every client's first gate, the same: scores of 0, or weights [blocks, 64], gains and biases."""
        count = len(self.blocks_of(layout).sizes)
        if self.gate == "scores":
            return torch.zeros(count)
        weights = np.random.default_rng(0).uniform(-1 / _SIDE, 1 / _SIDE, count * _SIDE**2)
        return torch.cat([torch.from_numpy(weights).float(), torch.ones(count), torch.zeros(count)])

    def opening(self, gate: Tensor, seen: Tensor | None) -> Tensor:
        """t of each block: of the score, or the mean over the samples that are looked at."""
        if seen is None:
            return torch.sigmoid(gate)
        count = len(gate) // (_SIDE**2 + 2)
        weights, gain, bias = gate.split([count * _SIDE**2, count, count])
        logits = seen @ weights.view(count, -1).T
        # BatchNorm, which would not take one sample alone.
        logits = (logits - logits.mean(0)) * (logits.var(0, correction=0) + 1e-5).rsqrt() * gain + bias
        return torch.sigmoid(logits).mean(0)

    def scales(self, opening: Tensor, sparsity: float, blocks: Blocks) -> tuple[np.ndarray, Tensor]:
        """Which blocks are kept, bool[blocks], and r, float32[blocks].

        In each group, linear layers and others, they are taken in the order of importance max(t, s_min) as
        long as they fit into the budget; one that does not is passed over.
        """
        density, floor = 1.0 - sparsity, self._floor(sparsity)
        kept = blocks.first & self.first_block_kept
        share = density - floor if self.first_block_kept else density
        importance = opening.clamp(min=floor).numpy()
        for group in (blocks.linear, ~blocks.linear):
            others = np.flatnonzero(group & ~kept)
            room = round(round(share * float(blocks.sizes[others].sum()), 6))
            for block in others[np.argsort(-importance[others], kind="stable")]:
                if sparsity == 0.0 or blocks.sizes[block] <= room:
                    kept[block] = True
                    room -= blocks.sizes[block]
        mask = torch.from_numpy(kept)
        return kept, opening * mask if self.scale else mask.float()

    def slopes(self, opening: Tensor, kept: np.ndarray, sparsity: float) -> Tensor:
        """dr/dt of each block; the choice passes the slope of max(t, s_min) straight through."""
        slope = torch.full_like(opening, float(self.scale))
        if sparsity:
            above = (opening > self._floor(sparsity)).float()
            slope += above * opening if self.scale else above
        return slope * torch.from_numpy(kept)

    def _floor(self, sparsity: float) -> float:
        """s_min, which the first blocks are taken to use up."""
        return min(max(1.0 / self.blocks, 0.1), 1.0 - sparsity)

    # ---- server half

    def advance(
        self,
        state: ServerState,
        total: Total,
        server: ServerOptimizer,
        layout: ParameterLayout,
        share: float = 1.0,
    ) -> ServerState:
        """As everywhere, or only ``share`` of the way, as if the absent had sent w_t."""
        after, trained = super().advance(state, total, server, layout, share), layout.trained_size
        if self.average_over == "population":
            after.weights[:trained] = torch.lerp(state.weights[:trained], after.weights[:trained], share)
        return after

    # ---- both halves

    def keeps(self, layout: ParameterLayout) -> Mapping[str, int]:
        """The gate, and r as it was at the end of the visit."""
        return {"gate": len(self.first_gate(layout)), "scales": len(self.blocks_of(layout).sizes)}

    def personal_weights(
        self, weights: Tensor, received: Tensor, kept: Mapping[str, Tensor], layout: ParameterLayout
    ) -> Tensor:
        """W r."""
        weights[: layout.prunable_size] *= self.blocks_of(layout).expand(kept["scales"])
        return weights

    def cut(self, weights: Tensor, mask: Tensor | None, keep: int, layout: ParameterLayout) -> None:
        """Nothing: a tier's budget is one of blocks, which each client chooses; the global model is dense."""

    def problems(self, config: Any) -> Iterator[str]:
        """An epoch for the gate needs one for the weights; scores look at no batch."""
        if self.optimisation == "alternate" and config.local.epochs % 2:
            yield (
                f"local.epochs: {config.local.epochs}, but algorithm.optimisation=alternate trains the gate "
                "and the weights in turn, an epoch each; set an even number"
            )
        if self.scope == "batch" and self.gate == "scores":
            yield (
                "algorithm.scope: batch, but algorithm.gate=scores looks at no samples; set gate=images, or "
                "scope=client"
            )
