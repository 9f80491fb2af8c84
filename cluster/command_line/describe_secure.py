"""What hiding single updates costs an experiment, in words."""

from __future__ import annotations

from algorithms import ServerState
from cluster.federation import Federation
from cluster.transport.secure_uplink import SecureUplink


def secure_text(federation: Federation, state: ServerState) -> str:
    """Who unmasks a sum, and how large an upload is in the first round: positions shared, or dense.

    Args:
        federation: The experiment.
        state: The server's first state.
    """
    config, method = federation.config, federation.config.method
    section, uplink = config.privacy.secure, SecureUplink(federation.layout, method, config.wire.bits)
    held = None if state.mask is None else state.mask.numpy()
    told = method.instruct(state, config.rounds, config.population)
    dense = f"{uplink.message_bytes(held, shared=False) / 1e6:,.3f} MB"
    alike = all(tier.sparsity is None for tier in config.devices.kinds.values())
    if not (alike and method.sends_mask(told)):
        text = f"{config.algorithm.name} pays dense, {dense} an upload: what a client sends tells of its data"
    elif held is None:
        text = f"every value travels, {uplink.message_bytes(held, shared=True) / 1e6:,.3f} MB an upload"
    else:
        shared = f"{uplink.message_bytes(held, shared=True) / 1e6:,.3f} MB an upload"
        text = f"all clients share one mask, whose values alone travel: {shared}, dense {dense}"
    return (
        f"privacy.secure, masks {section.masks}, wire.grid {config.wire.grid}: "
        f"{section.threshold_of(config.cohort)} of {config.cohort} clients unmask a sum; "
        f"in round {told.round} {text}"
    )
