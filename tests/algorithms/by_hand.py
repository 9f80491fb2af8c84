"""The smallest federation: one linear layer without bias, float images, one visit at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from algorithms import Algorithm, Grid, Instructions, LocalOptimizer, ServerOptimizer, ServerState, Total
from algorithms.core.local_optimizers import Sgd
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.exchange import Broadcast
from cluster.workload.datasets import Split


def one_round(
    method: Algorithm,
    weights: list[list[float]],
    clients: list[tuple[list[float], int, int]],
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    proximal: float = 0.0,
    epochs: int = 1,
    batch_size: int = 16,
    server: ServerOptimizer | None = None,
    optimizer: LocalOptimizer | None = None,
) -> tuple[list[list[list[float]]], list[list[list[float]]]]:
    """One round from ``weights``, [classes][inputs].

    Args:
        method: The method.
        weights: w_t.
        clients: (input, label, number of equal samples) of each client.
        lr, weight_decay, proximal, epochs, batch_size: Local training.
        server: Server optimizer; by default the plain mean.
        optimizer: Local optimizer; by default plain SGD.

    Returns:
        The uploads, and [w_(t+1)].
    """
    start = torch.tensor(weights)
    model = nn.Sequential(nn.Flatten(), nn.Linear(start.shape[1], start.shape[0], bias=False))
    images = np.concatenate([np.tile(np.float32(x), (n, 1)) for x, _, n in clients])[:, None, None, :]
    labels = np.concatenate([np.full(n, label) for _, label, n in clients])
    settings = LocalSettings(0, epochs, batch_size, weight_decay, proximal, optimizer=optimizer or Sgd())
    trainer = Trainer(model, method, settings, Split(images, labels, None), torch.device("cpu"))
    layout = trainer.layout
    state = ServerState(round=0, weights=start.flatten())
    flat = state.weights.numpy()
    broadcast = Broadcast(
        flat, flat, None, Instructions(round=1, rounds=1), lr, Grid.for_round(flat, 1).limit, len(labels)
    )
    total = Total.zero(Grid(2.0**20, len(labels)), layout, masked=method.masked)
    uploads, first = [], 0
    for client, (_, _, count) in enumerate(clients):
        trained = trainer.visit(client, np.arange(first, first + count), method.sparsity, broadcast)
        uploads.append(trained.values.reshape(start.shape).tolist())
        total.fold(client, trained.values, trained.support, trained.measured.samples, layout)
        first += count
    after = method.advance(state, total, server or ServerOptimizer(), layout)
    return uploads, [after.weights.reshape(start.shape).tolist()]
