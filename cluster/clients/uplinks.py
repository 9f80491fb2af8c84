"""The way of updates up, as the configuration asks for it: at a client's host and at the driver the same."""

from __future__ import annotations

from typing import Any

from algorithms import ParameterLayout
from cluster.configuration.config import Config
from cluster.exchange import Broadcast
from cluster.transport.secure_uplink import SecureUplink
from cluster.transport.uplink import Uplink


def make_uplink(config: Config, layout: ParameterLayout) -> Any:
    """What encodes, decodes and folds updates: an ``Uplink``, or a ``SecureUplink`` in its place."""
    if config.privacy.secure.asked:
        return SecureUplink(layout, config.method, config.wire.bits)
    return Uplink(
        layout,
        config.wire.uplink,
        differences=config.method.uploads_differences,
        max_update_norm=config.max_update_norm,
        parts=config.method.confined,
        bits=config.wire.bits,
    )


def no_update(config: Config, uplink: Any, layout: ParameterLayout, broadcast: Broadcast) -> Any:
    """The total of a round that nobody's update is part of: a ``Total``, or a ``SealedTotal`` of words."""
    if isinstance(uplink, SecureUplink):
        return uplink.zero(broadcast.mask, shared=broadcast.shared)
    return config.method.zero(broadcast.grid, layout, updates=config.keeps_updates)
