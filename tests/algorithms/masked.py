"""What the tests of mask-holding methods share: one round played by hand, and a naive masked federation."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from algorithms import Algorithm, Grid, ServerOptimizer, ServerState, Total
from cluster import seeding
from cluster.clients.local_training import LocalSettings, Trained, Trainer
from cluster.exchange import Broadcast
from cluster.workload.datasets import Split
from tests.naive import NaiveFederation, NaiveVisit
from tests.tiny_experiment import Mask, Weights

# -------------------------------------------------------------------------------------- one round by hand


def bools(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text.replace(" ", "")])


def play(
    method: Algorithm,
    state: ServerState,
    clients: list[tuple[list[float], int, int]],
    *,
    classes: int = 2,
    rounds: int = 10,
    lr: float = 1.0,
    epochs: int = 1,
    batch_size: int = 16,
    proximal: float = 0.0,
    weight_decay: float = 0.0,
    sparsities: list[float] | None = None,
    server: ServerOptimizer | None = None,
) -> tuple[list[Trained], ServerState]:
    """One round on a linear layer without bias, [classes][inputs].

    Args:
        method: The method.
        state: The server's state; ``state.weights`` are the layer's weights, row by row.
        clients: (input, label, number of equal samples) of each client.
        sparsities: Each client's target; by default the method's.

    Returns:
        What each client sent (values and supports copied), and the server's next state.
    """
    inputs = len(clients[0][0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes, bias=False))
    images = np.concatenate([np.tile(np.float32(x), (n, 1)) for x, _, n in clients])[:, None, None, :]
    labels = np.concatenate([np.full(n, label) for _, label, n in clients])
    settings = LocalSettings(0, epochs, batch_size, weight_decay, proximal)
    trainer = Trainer(model, method, settings, Split(images, labels, None), torch.device("cpu"))
    flat = state.weights.numpy()
    mask = None if state.mask is None else state.mask.numpy()
    grid = Grid(2.0**20, len(labels))
    told = method.instruct(state, rounds, len(clients))
    broadcast = Broadcast(flat, flat, mask, told, lr, grid.limit, len(labels))
    total = Total.zero(grid, trainer.layout, masked=method.masked)
    sent, first = [], 0
    for client, (_, _, count) in enumerate(clients):
        sparsity = method.sparsity if sparsities is None else sparsities[client]
        trained = trainer.visit(client, np.arange(first, first + count), sparsity, broadcast)
        trained.values = trained.values.copy()
        trained.support = None if trained.support is None else trained.support.copy()
        total.fold(client, trained.values, trained.support, trained.measured.samples, trainer.layout)
        sent.append(trained)
        first += count
    return sent, method.advance(state, total, server or ServerOptimizer(), trainer.layout)


# ------------------------------------------------------------------------------------- the naive federation


def share_out(total: int, shares: list[Any], room: list[int]) -> list[int]:
    """``total`` in proportion to ``shares``, in exact fractions; who is full gets just its room."""
    exact = [Fraction(share) for share in shares]
    fixed: dict[int, int] = {i: 0 for i, r in enumerate(room) if r == 0}
    while True:
        rest = [i for i in range(len(room)) if i not in fixed]
        left = total - sum(fixed.values())
        claims = exact if any(exact[i] for i in rest) else [Fraction(r) for r in room]
        whole = sum(claims[i] for i in rest)
        parts = {i: left * claims[i] / whole for i in rest}
        above = [i for i in rest if parts[i] > room[i]]
        if not above:
            break
        fixed |= {i: room[i] for i in above}
    result = [fixed.get(i, math.floor(parts.get(i, 0))) for i in range(len(room))]
    by_remainder = sorted(parts, key=lambda i: (-(parts[i] - math.floor(parts[i])), i))
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    return result


class NaiveMasked(NaiveFederation):
    """Training inside one random mask. Random numbers are drawn as the product documents: one uniform float32
    for each prunable weight, in the layout's order; the largest of a layer are its random positions."""

    def sizes(self) -> list[int]:
        parameters = dict(self.module.named_parameters())
        return [parameters[name].numel() for name in self.prunable]

    def draw(self, counts: list[int], rng: np.random.Generator) -> Mask:
        return self.tops(self.uniform(rng), counts)

    def uniform(self, rng: np.random.Generator) -> dict[str, Tensor]:
        parameters = dict(self.module.named_parameters())
        numbers, start, result = rng.random(sum(self.sizes()), dtype=np.float32), 0, {}
        for name, size in zip(self.prunable, self.sizes(), strict=True):
            result[name] = torch.from_numpy(numbers[start : start + size]).view(parameters[name].shape)
            start += size
        return result

    def tops(self, scores: Weights, counts: list[int], among: list[Mask] | None = None) -> Mask:
        """In each layer the ``count`` positions of largest |score|; ties to the lower index.

        With ``among``, positions in its first mask come first, then those in the second, and so on.
        """
        result = {}
        for name, count in zip(self.prunable, counts, strict=True):
            flat = scores[name].flatten().tolist()
            masks = [mask[name].flatten().tolist() for mask in among or []]

            def rank(i: int, flat: list[float] = flat, masks: list[list[bool]] = masks) -> tuple:
                group = next((g for g, mask in enumerate(masks) if mask[i]), len(masks))
                # Outside every group nothing is known of a position: by index alone.
                return (group, -abs(flat[i]) if group < len(masks) or not masks else 0.0, i)

            chosen = torch.zeros(len(flat), dtype=torch.bool)
            chosen[sorted(range(len(flat)), key=rank)[:count]] = True
            result[name] = chosen.view(scores[name].shape)
        return result

    def counts(self, mask: Mask) -> list[int]:
        return [int(mask[name].sum()) for name in self.prunable]

    def density_shares(self, distribution: str) -> list[Fraction]:
        """Density times size of each layer, up to a factor."""
        parameters = dict(self.module.named_parameters())
        shares = []
        for name, size in zip(self.prunable, self.sizes(), strict=True):
            shape = parameters[name].shape
            density = {
                "uniform": Fraction(1),
                "er": Fraction(shape[0] + shape[1], shape[0] * shape[1]),
                "erk": Fraction(sum(shape), math.prod(shape)),
            }[distribution]
            shares.append(density * size)
        return shares

    # ---- hooks

    def initial(self, weights: Weights) -> Weights:
        keep = self.kept_count(self.options.sparsity)
        counts = share_out(keep, self.density_shares(self.options.layer_density), self.sizes())
        self.mask = self.draw(counts, seeding.generator(self.config.seed, "server"))
        return self.masked(weights, self.mask)

    def begin(self, weights: Weights, visit: NaiveVisit) -> None:
        visit.notes["mask"] = self.mask

    def change_gradients(self, weights: Weights, gradients: Weights, visit: NaiveVisit) -> None:
        mask = visit.notes["mask"]
        if mask is not None and not visit.notes.get("dense"):
            for name in self.prunable:
                gradients[name] = torch.where(mask[name], gradients[name], torch.zeros(()))

    def after_step(self, weights: Weights, visit: NaiveVisit) -> None:
        mask = visit.notes["mask"]
        if mask is not None:
            for name in self.prunable:
                weights[name][~mask[name]] = 0.0

    def upload(self, weights: Weights, received: Weights, visit: NaiveVisit) -> tuple[Weights, Mask | None]:
        return self.sent(weights, visit.notes["mask"])

    def sent(self, weights: Weights, mask: Mask) -> tuple[Weights, Mask | None]:
        """The masked weights; a mask that holds everything is no mask on the wire."""
        return self.masked(weights, mask), None if all(bool(m.all()) for m in mask.values()) else mask

    def server(self, weights, uploads, masks, sizes, round_number):
        return self.masked(self.server_step(weights, self.masked_mean(uploads, masks, sizes)), self.mask)

    def change_mask(self, mask: Mask) -> None:
        """A new mask; the server optimizer forgets what left it."""
        self.mask = mask
        for moment in self.moments:
            for name in self.prunable:
                if name in moment:
                    moment[name] = torch.where(mask[name], moment[name], torch.zeros((), dtype=torch.float64))

    def union(self, masks: dict[int, Mask | None]) -> Mask:
        held = [m for m in masks.values() if m is not None]
        return {name: torch.stack([m[name] for m in held]).any(0) for name in self.prunable}
