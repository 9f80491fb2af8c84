"""``fedht_simulation``: the linear regression on which Fed-HT's paper compares its methods, by its recipe.

Simulation I of Tong et al., "Federated Nonconvex Sparse Learning", arXiv 2101.00052: 100 clients of 100 rows
and 1,000 features, whose true coefficients, those of the first 100 features, are their own. Draws, order and
seeds follow the re-implementation whose table ``tests/golden/fedht.py`` compares with. The test split are the
100 rows that its objective is measured on: of the last ten clients, which train on most of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cluster.workload import cache

SIMULATION = "fedht_simulation"
CLIENTS, ROWS, FEATURES, RELEVANT, HELD_OUT, SEED = 100, 100, 1000, 100, 10, 42


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Features [clients, rows, features] and targets [clients, rows] of all clients, float32."""
    rng = np.random.default_rng(SEED)
    deviations = np.sqrt(np.arange(1, FEATURES + 1) ** -1.2)
    inputs = np.empty((CLIENTS, ROWS, FEATURES), np.float32)
    targets = np.empty((CLIENTS, ROWS), np.float32)
    for client in range(CLIENTS):
        level, offset = rng.normal(0.1, 0.1), rng.normal(0.0, 0.1)
        coefficients = np.zeros(FEATURES)
        coefficients[:RELEVANT] = rng.normal(level, 1.0, RELEVANT)
        centre = rng.normal(offset, 1.0, FEATURES)
        drawn = rng.normal(centre, deviations, (ROWS, FEATURES))
        inputs[client] = drawn
        targets[client] = drawn @ coefficients + rng.normal(level, 1.0, ROWS)
    return inputs, targets


def write_simulation(folder: Path) -> dict[str, Any]:
    """Write its arrays; returns the names for meta.json, of the clients too."""
    inputs, targets = rows()
    trained = [np.random.default_rng(c).permutation(ROWS)[HELD_OUT:] for c in range(CLIENTS)]
    train = np.concatenate([client * ROWS + np.sort(own) for client, own in enumerate(trained)])
    tested = np.random.default_rng(SEED).permutation(10 * ROWS)[:ROWS] + (CLIENTS - 10) * ROWS
    for split, chosen in (("train", train), ("test", np.sort(tested))):
        cache.save(folder / f"{split}-images.npy", inputs.reshape(-1, FEATURES)[chosen])
        cache.save(folder / f"{split}-labels.npy", targets.reshape(-1)[chosen])
    cache.save(folder / "train-groups.npy", np.repeat(np.arange(CLIENTS), ROWS - HELD_OUT))
    return {"classes": [], "group_names": [f"client {client}" for client in range(CLIENTS)]}
