"""The way of updates up, as the configuration asks for it: at a client's host and at the driver the same."""

from __future__ import annotations

from algorithms import ParameterLayout, Total
from cluster.configuration.config import Config
from cluster.exchange import Broadcast
from cluster.transport.uplink import Uplink


def make_uplink(config: Config, layout: ParameterLayout) -> Uplink:
    """What encodes, decodes and folds updates."""
    return Uplink(
        layout,
        config.wire.uplink,
        differences=config.method.uploads_differences,
        max_update_norm=config.max_update_norm,
        parts=config.method.confined,
        bits=config.wire.bits,
    )


def no_update(config: Config, layout: ParameterLayout, broadcast: Broadcast) -> Total:
    """The total of a round that nobody's update is part of."""
    return config.method.zero(broadcast.grid, layout, updates=config.keeps_updates)
