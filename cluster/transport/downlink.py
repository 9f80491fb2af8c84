"""What clients are sent: the model as real bytes, less the mask where a client holds it already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from algorithms import ServerState
from cluster.transport import wire
from cluster.transport.holders import Holders


@dataclass(frozen=True)
class Parcel:
    """One version of the model, encoded when first asked for.

    Attributes:
        state: The server's state that is sent.
        shape: The shape of messages.
        value_format: Format of the values.
    """

    state: ServerState
    shape: wire.Shape
    value_format: wire.ValueFormat

    @property
    def exact(self) -> np.ndarray:
        """w_t as the server holds it, float32[size]."""
        return self.state.weights.numpy()

    @property
    def mask(self) -> np.ndarray | None:
        """The mask both sides hold, bool[prunable], or None."""
        return None if self.state.mask is None else self.state.mask.numpy()

    @cached_property
    def received(self) -> np.ndarray:
        """w_t as clients decode it, float32[size]; the same array unless the downlink is lossy."""
        return self.exact if self.value_format == "float32" else wire.decode(self._full, self.shape).values

    @cached_property
    def full_bytes(self) -> int:
        """Bytes for a client that does not hold the mask."""
        return len(self._full)

    @cached_property
    def relative_bytes(self) -> int:
        """Bytes for a client that does."""
        return len(self._encode(held=self.mask))

    @cached_property
    def _full(self) -> bytes:
        return self._encode(held=None)

    def _encode(self, held: np.ndarray | None) -> bytes:
        support = self.exact[: self.shape.prunable] != 0 if self.mask is None else self.mask
        return wire.encode(self.exact, support, self.shape, held=held, value_format=self.value_format)


class Sender:
    """Bills every client what it is really sent.

    Attributes:
        held: Who holds the current mask; never changed in place.
    """

    def __init__(self, shape: wire.Shape, value_format: wire.ValueFormat) -> None:
        self.shape, self.value_format = shape, value_format
        self.held = Holders()

    def parcel(self, state: ServerState) -> Parcel:
        """The model of ``state``, to be sent to any number of clients."""
        return Parcel(state, self.shape, self.value_format)

    def bytes_for(self, client: int, parcel: Parcel) -> int:
        """Bytes that a client would be sent now."""
        state = parcel.state
        holds = state.mask is not None and self.held.holds(client, state.mask_version)
        return parcel.relative_bytes if holds else parcel.full_bytes

    def deliver(self, clients: Iterable[int], parcel: Parcel) -> None:
        """Note that clients got the model, and with it the mask."""
        if parcel.state.mask is not None:
            self.held = self.held.after(clients, parcel.state.mask_version)
