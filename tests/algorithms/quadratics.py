"""Two clients on two parabolas: f1 = (x - 2)^2 / 2 and f2 = (x + 1)^2, least together at 0.

FedAvg with two local steps of 0.1 is drawn to 0.036364. The gradients are written down, not computed by the
model: what a method makes of them is what is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import nn

from algorithms import Algorithm, Grid, Instructions, ServerOptimizer, ServerState
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.exchange import Broadcast
from cluster.workload.datasets import Split

GRADIENTS = (lambda x: x - 2.0, lambda x: 2.0 * (x + 1.0))


@dataclass
class Round:
    """What a round left: the models sent, what clients keep, the server's state and the model x."""

    sent: list[float]
    kept: list[dict[str, float]]
    carried: dict[str, float]
    state: ServerState
    x: float


def rounds(method: Algorithm, *cohorts: tuple[int, ...], lr: float = 0.1, steps: int = 2) -> list[Round]:
    """Train from 0; one cohort of clients a round. What each client sends weighs the same."""

    class OnParabola(method.client):
        def gradient(self, compute):
            self.before_forward()
            compute()
            self.visit.gradient[:] = self._slope()
            self.after_backward()
            return torch.zeros(())

        def _slope(self):
            slope = torch.zeros_like(self.visit.gradient)
            slope[0] = GRADIENTS[int(self.visit.targets[0])](self.visit.weights[0])
            return slope

        def _local_gradient(self):
            return self._slope()

    planted = type("Planted", (type(method),), {"client": OnParabola, "name": ""})(
        **{field.name: getattr(method, field.name) for field in fields(method)}
    )
    model = nn.Linear(1, 2, bias=False)
    data = Split(np.ones((2, 1), np.float32), np.array([0, 1]), None)
    trainer = Trainer(model, planted, LocalSettings(0, steps, 1, 0.0, 0.0), data, torch.device("cpu"))
    layout = trainer.layout
    state = planted.initial_state(torch.zeros(layout.size), layout, np.random.default_rng(0))
    kept: list[dict[str, np.ndarray]] = [{}, {}]
    found = []
    for number, cohort in enumerate(cohorts, start=1):
        flat = state.weights.numpy()
        grid = Grid(2.0**20, len(cohort))
        total = planted.zero(grid, layout)
        broadcast = Broadcast(
            flat, flat, None, Instructions(round=number, rounds=9), lr, grid.limit, len(cohort)
        )
        sent = []
        for client in cohort:
            trained = trainer.visit(client, np.array([client]), 0.0, broadcast, kept[client])
            sent.append(float(trained.values[0]))
            kept[client] = trained.kept
            total.fold(client, trained.values[: layout.up_size], None, 1, layout)
        state = planted.advance(state, total, ServerOptimizer(), layout, len(cohort) / 2)
        found.append(
            Round(
                sent,
                [{name: float(array[0]) for name, array in own.items()} for own in kept],
                {
                    name: float(array[0])
                    for name, array in layout.split(state.weights, layout.carried).items()
                },
                replace(state),
                float(state.weights[0]),
            )
        )
    return found
