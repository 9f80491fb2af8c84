"""Clients whose gradients are written down: what a method makes of them, with a few weights and no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from algorithms import Algorithm, Grid, ServerOptimizer, ServerState
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.exchange import Broadcast
from cluster.workload.datasets import Split

#: The gradient of a client's loss at its weights, float32[weights].
Slope = Callable[[Tensor], Tensor]


@dataclass
class Round:
    """What a round left: what was sent and is kept, by client; the server's state.

    Attributes:
        sent: lists of the weights.
        kept: Arrays as lists, by name, of every client.
        state: The server's state.
        carried: What is carried, by name.
        weights: The model's weights.
    """

    sent: list[list[float]]
    kept: list[dict[str, list[float]]]
    state: ServerState
    carried: dict[str, list[float]]
    weights: list[float]


def rounds(
    method: Algorithm,
    slopes: Sequence[Slope],
    *cohorts: Sequence[int],
    lr: float = 1.0,
    steps: int = 1,
    kept: Mapping[int, Mapping[str, Sequence[float]]] | None = None,
    size: int = 2,
) -> list[Round]:
    """Train so many weights from 0, one cohort of clients a round; what each client sends weighs the same."""

    class Planted(method.client):
        def gradient(self, compute):
            self.before_forward()
            compute()
            self.visit.gradient[:] = self._slope()
            self.after_backward()
            return torch.zeros(())

        def _slope(self):
            return slopes[int(self.visit.targets[0])](self.visit.weights.clone())

        def _local_gradient(self):
            return self._slope()

    own = type("Planted", (type(method),), {"client": Planted, "name": ""})(
        **{field.name: getattr(method, field.name) for field in fields(method)}
    )
    clients = len(slopes)
    data = Split(np.ones((clients, 1), np.float32), np.arange(clients), None)
    settings = LocalSettings(0, steps, 1, 0.0, 0.0)
    trainer = Trainer(nn.Linear(1, size, bias=False), own, settings, data, torch.device("cpu"))
    layout = trainer.layout
    state = own.initial_state(torch.zeros(layout.size), layout, np.random.default_rng(0))
    states = [
        {name: np.float32(values) for name, values in (kept or {}).get(client, {}).items()}
        for client in range(clients)
    ]
    found = []
    for cohort in cohorts:
        flat, grid = state.weights.numpy(), Grid(2.0**20, len(cohort))
        told = own.instruct(state, 9, clients)
        broadcast = Broadcast(flat, flat, None, told, lr, grid.limit, len(cohort))
        total, sent = own.zero(grid, layout), []
        for client in cohort:
            trained = trainer.visit(client, np.array([client]), own.sparsity, broadcast, states[client])
            sent.append(trained.values[:size].tolist())
            states[client] = trained.kept
            total.fold(client, trained.values[: layout.up_size], trained.support, 1, layout)
        state = own.advance(state, total, ServerOptimizer(), layout, len(cohort) / clients)
        carried = layout.split(state.weights, layout.carried)
        found.append(
            Round(
                sent,
                [{name: array.tolist() for name, array in own.items()} for own in states],
                state,
                {name: array.tolist() for name, array in carried.items()},
                state.weights[:size].tolist(),
            )
        )
    return found
