"""What clients are sent: the model as real bytes, less the mask where a client holds it already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from algorithms import ParameterLayout, ServerState
from cluster.transport import wire

#: The base has one version.
_BASE = 0


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the model, as the clients get it that have room for no more.

    Attributes:
        weights: What they decode, float32[size], 0 outside the part.
        held: What they hold, train and send alone, bool[trained]; None where they train all of the model.
        nbytes: Bytes of the message.
        nonzero_bytes: Four bytes a nonzero value, the paper's accounting.
    """

    weights: np.ndarray
    held: np.ndarray | None
    nbytes: int
    nonzero_bytes: int


@dataclass(frozen=True)
class Parcel:
    """One version of the model, encoded when first asked for.

    Attributes:
        state: The server's state that is sent.
        layout: The model's layout.
        shape: The shape of messages.
        value_format: Format of the values.
        parts: The parts of it that clients were sent, in the order in which they were first asked for.
    """

    state: ServerState
    layout: ParameterLayout
    shape: wire.Shape
    value_format: wire.ValueFormat
    parts: list[Part] = field(default_factory=list)
    _places: dict[bytes, int] = field(default_factory=dict)

    @cached_property
    def exact(self) -> np.ndarray:
        """w_t as the server holds it, float32[size]; one array, so that pickle writes it once."""
        return self.state.weights.numpy()

    @property
    def mask(self) -> np.ndarray | None:
        """The mask both sides hold, bool[prunable], or None."""
        return None if self.state.mask is None else self.state.mask.numpy()

    @cached_property
    def decoded(self) -> np.ndarray:
        """w_t as clients decode it, float32[size], 0 in what only travels up.

        The same array as ``exact`` unless the downlink is lossy or something travels up alone.
        """
        if self.value_format == "float32":
            return self.layout.received_down(self.sent)
        return self.layout.received_down(wire.decode(self.message, self.shape).values)

    @cached_property
    def sent(self) -> np.ndarray:
        """What travels of w_t, float32[down_size]."""
        return self.layout.sent_down(self.exact)

    def part(self, support: np.ndarray, *, known: bool, confined: bool) -> int:
        """The place in ``parts`` of what a client is sent; a support is encoded once.

        Args:
            support: The part, bool[trained].
            known: Whether the client can work the support out by itself.
            confined: Whether it trains that part alone.
        """
        key = np.packbits(support).tobytes()
        if key not in self._places:
            shape, held = wire.Shape.of(self.layout, "down", parts=True), support if known else None
            message = wire.encode(self.sent, support, shape, held=held, value_format=self.value_format)
            received = wire.decode(message, shape, held=held).values
            nonzero_bytes = wire.nonzero_bytes(received, shape)
            weights = self.layout.received_down(received)
            self._places[key] = len(self.parts)
            self.parts.append(Part(weights, support if confined else None, len(message), nonzero_bytes))
        return self._places[key]

    @cached_property
    def message(self) -> bytes:
        """The model for a client that does not hold the mask."""
        return self._encode(held=None)

    @cached_property
    def full_bytes(self) -> int:
        """Bytes for a client that does not hold the mask."""
        return len(self.message)

    @cached_property
    def relative_bytes(self) -> int:
        """Bytes for a client that does."""
        return len(self._encode(held=self.mask))

    def _encode(self, held: np.ndarray | None) -> bytes:
        support = self.exact[: self.shape.prunable] != 0 if self.mask is None else self.mask
        return wire.encode(self.sent, support, self.shape, held=held, value_format=self.value_format)


class Sender:
    """Bills every client what it is really sent.

    Args:
        layout: The model's layout.
        value_format: Format of the values.
        base_bytes: Bytes of what is frozen, which a client is sent before its first model, and never again.

    Attributes:
        held: Who holds the current mask; never changed in place.
        installed: Who holds the base; the same.
    """

    def __init__(self, layout: ParameterLayout, value_format: wire.ValueFormat, base_bytes: int = 0) -> None:
        self._layout, self._format, self._base_bytes = layout, value_format, base_bytes
        self.shape = wire.Shape.of(layout, "down")
        self.held, self.installed = Holders(), Holders()

    def parcel(self, state: ServerState) -> Parcel:
        """The model of ``state``, to be sent to any number of clients."""
        return Parcel(state, self._layout, self.shape, self._format)

    def bytes_for(self, client: int, parcel: Parcel, part: int | None = None) -> int:
        """Bytes that a client would be sent now, of the whole model or of a part; at first with the base."""
        first = self._base_bytes and not self.installed.holds(client, _BASE)
        base = self._base_bytes if first else 0
        if part is not None:
            return base + parcel.parts[part].nbytes
        state = parcel.state
        holds = state.mask is not None and self.held.holds(client, state.mask_version)
        return base + (parcel.relative_bytes if holds else parcel.full_bytes)

    def deliver(self, clients: Iterable[int], parcel: Parcel) -> None:
        """Note that clients got the model, and with it the mask and the base."""
        clients = list(clients)
        if parcel.state.mask is not None:
            self.held = self.held.after(clients, parcel.state.mask_version)
        if self._base_bytes:
            self.installed = self.installed.after(clients, _BASE)


@dataclass(frozen=True, eq=False)
class Holders:
    """The clients that got one version of the mask; who holds an older one is forgotten, for it is sent anew.

    Eight bytes a holder, and none of the clients that never took part.

    Attributes:
        version: The mask's version (``ServerState.mask_version``); -1 before there was one.
        clients: int64, ascending.
    """

    version: int = -1
    clients: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def holds(self, client: int, version: int) -> bool:
        """Whether a client holds that version."""
        place = int(np.searchsorted(self.clients, client))
        return version == self.version and place < len(self.clients) and bool(self.clients[place] == client)

    def after(self, clients: Iterable[int], version: int) -> Holders:
        """The holders once clients got that version."""
        held = self.clients if version == self.version else self.clients[:0]
        return Holders(version, np.union1d(held, np.fromiter(clients, np.int64)))

    def dump(self) -> dict[str, Any]:
        """Plain JSON values, for a checkpoint."""
        return {"version": self.version, "clients": self.clients.tolist()}

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Holders:
        """What :meth:`dump` wrote."""
        return cls(int(stored["version"]), np.array(stored["clients"], np.int64))
