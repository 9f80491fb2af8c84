"""Folding one decoded update into a total, wherever that is done: by a host, or by the driver."""

from __future__ import annotations

import numpy as np

from algorithms import ParameterLayout, Total
from cluster.clients.local_training import Broadcast
from cluster.configuration.config import Config
from cluster.transport import wire


@np.errstate(invalid="ignore")  # a signalling NaN is far away like any other
def fold_update(
    total: Total,
    broadcast: Broadcast,
    client: int,
    received: wire.Message,
    samples: int,
    layout: ParameterLayout,
    config: Config,
) -> str | None:
    """Fold a decoded update into ``total``; returns why it was refused, if it was."""
    values, limit = received.values, config.max_update_norm
    if limit is not None:
        trained = layout.trained_size
        differences = config.build_algorithm().uploads_differences
        reference = 0.0 if differences else broadcast.weights[:trained]
        distance = float(np.linalg.norm(values[:trained].astype(np.float64) - reference))
        if not distance <= limit:
            return f"its update is {distance:.3g} away from the global model, max_update_norm is {limit:g}"
    try:
        total.fold(client, values, received.support, samples, layout, received.positions)
    except OverflowError as error:
        return f"its update cannot be averaged: {error}"
    return None
