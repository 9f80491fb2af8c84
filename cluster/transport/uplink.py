"""What clients send: an update as real bytes, decoded again, then folded into a total or refused.

Positions that a client names beside its update (``marks``) are a second message behind the first: a support
and no values. What goes up alone beside the model is left out where it holds nothing but zeros. All of it is
the same at a client's host and at the driver, which folds what a host cannot decide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from algorithms import Grid, ParameterLayout, Total
from algorithms.core.clipping import fold_clipped
from cluster.transport import wire
from cluster.transport.masking import KeyRound


@dataclass(frozen=True)
class Posted:
    """An update on its way.

    Attributes:
        message: Its bytes.
        nonzero_bytes: Four bytes a nonzero value, the paper's accounting.
        density: Share of the prunable weights that travel.
        clamped: Values that were cut to the limit of the round's grid.
    """

    message: bytes
    nonzero_bytes: int
    density: float
    clamped: int = 0


@dataclass(frozen=True)
class Sending:
    """What a client knows of its round when it sends, where values are written on the round's grid.

    Attributes:
        client: Its index.
        samples: Its weight, n_i.
        grid: The round's grid.
        shared: Whether all clients of a secure round send the mask that both sides hold.
        keys: What the clients of a secure round know of each other; None where masks are only billed.
    """

    client: int
    samples: int
    grid: Grid
    shared: bool = False
    keys: KeyRound | None = None


class Withheld(Exception):
    """A client's own update does not fit the round's grid, and it does not send it; says why."""


class Uplink:
    """Encodes, decodes, refuses and folds updates of one model.

    Args:
        layout: The model's layout.
        value_format: Format of the values.
        differences: Whether updates are w_i - w_t over the trained span.
        max_update_norm: Distance from w_t beyond which an update is refused; None: no limit.
        parts: Whether clients send the part of the model that they hold.
        bits: Of a word of the round's grid, in whole units of which values travel; None for floats.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        value_format: wire.ValueFormat,
        *,
        differences: bool,
        max_update_norm: float | None,
        parts: bool = False,
        bits: int | None = None,
    ) -> None:
        self.shape = wire.Shape.of(layout, "up", parts=parts)
        self._lean = self.shape
        if layout.up:  # where it holds zeros alone, it does not travel
            self._lean = replace(self.shape, size=layout.up[0].start)
        prunable = layout.prunable_size
        self._marks_shape = wire.Shape(prunable, prunable, prunable, ((0, prunable),))
        self._no_values = np.zeros(prunable, np.float32)
        self._layout, self._format = layout, value_format
        self._differences, self._limit = differences, max_update_norm
        # Every update is decoded into the same memory: fresh pages cost as much as the decoding.
        self._decoded = np.empty(self.shape.size, np.int64 if bits else np.float32)
        self._bits = bits

    def encode(
        self,
        values: np.ndarray,
        support: np.ndarray | None,
        held: np.ndarray | None,
        known: np.ndarray | None = None,
        marks: np.ndarray | None = None,
        sending: Sending | None = None,
    ) -> Posted:
        """An update as bytes.

        Args:
            values: float32[size] of the layout, +0.0 outside the support; what travels down alone stays.
            support: bool[prunable], or None for all of it.
            held: What both sides know: the mask, bool[prunable], or the client's part, bool[trained].
            known: Values that both sides work out, float32[trained], or None.
            marks: Positions that are named beside it, bool[prunable], or None.
            sending: Who sends, where values travel as words of a grid.

        Raises:
            Withheld: A value is not finite, and there are no words for it.
        """
        clamped = 0
        if self._bits:
            assert sending is not None
            known = None
            try:
                values, clamped = sending.grid.words(values[: self.shape.size], sending.samples)
            except OverflowError as error:
                raise Withheld(f"its update cannot be averaged: {error}") from None
        shape, prunable = self.shape, self._layout.prunable_size
        if not values[self._lean.size : shape.size].any():
            shape = self._lean
        values = values[: shape.size]
        if shape.prunable > prunable:
            support = _within(held, support, shape.prunable)
        message = wire.encode(
            values, support, shape, held=held, known=known, value_format=self._format, bits=self._bits
        )
        if marks is not None:
            message += wire.encode(
                self._no_values,
                marks,
                self._marks_shape,
                held=_outside(held, prunable),
                known=self._no_values,
            )
        sent = prunable if support is None else int(np.count_nonzero(support[:prunable]))
        return Posted(message, wire.nonzero_bytes(values, shape), sent / prunable, clamped)

    def decode(
        self, message: bytes, held: np.ndarray | None, known: np.ndarray | None = None
    ) -> wire.Message:
        """An update as the server reads it; its values last until the next one is decoded."""
        first, floats = wire.announced(message)
        shape = self._lean if floats == self._lean.size else self.shape
        whole = message if first == len(message) else message[:first]
        out = self._decoded[: shape.size]
        received = wire.decode(whole, shape, held=held, known=known, out=out, bits=self._bits)
        self._decoded[shape.size :] = 0
        received = replace(received, values=self._decoded)
        if first >= len(message):
            return received
        outside = _outside(held, len(self._no_values))
        named = wire.decode(message[first:], self._marks_shape, held=outside, known=self._no_values)
        marks = np.ones(len(self._no_values), np.bool_) if named.support is None else named.support
        return replace(received, marks=marks)

    @np.errstate(invalid="ignore")  # a signalling NaN is far away like any other
    def fold(
        self,
        total: Total,
        client: int,
        received: wire.Message,
        samples: int,
        base: np.ndarray | None,
        clip: float | None = None,
    ) -> str | None:
        """Fold a decoded update into ``total``; returns why it was refused, if it was.

        Args:
            total: Where it goes.
            client: Who sent it.
            received: What :meth:`decode` returned.
            samples: Its weight, n_i.
            base: What the client received, float32[size]; None where no model was sent.
            clip: What its difference is cut to; None: it is not.
        """
        values, limit = received.values, self._limit
        if limit is not None and base is not None:
            trained = self._layout.trained_size
            if self._bits:
                values = total.grid.values(values, samples)
            reference = 0.0 if self._differences else base[:trained]
            distance = float(np.linalg.norm(values[:trained].astype(np.float64) - reference))
            if not distance <= limit:
                return (
                    f"its update is {distance:.3g} away from the global model, max_update_norm is {limit:g}"
                )
        try:
            if clip is not None:
                start = None if self._differences else base
                fold_clipped(total, client, values, received.support, start, clip, self._layout)
                return None
            total.fold(
                client,
                received.values,
                received.support,
                samples,
                self._layout,
                received.positions,
                received.marks,
            )
        except OverflowError as error:
            return f"its update cannot be averaged: {error}"
        return None

    def take(
        self,
        total: Total,
        client: int,
        message: bytes,
        samples: int,
        base: np.ndarray | None,
        held: np.ndarray | None,
        known: np.ndarray | None = None,
        clip: float | None = None,
    ) -> str | None:
        """Decode and fold a message; see :meth:`fold`."""
        return self.fold(total, client, self.decode(message, held, known), samples, base, clip)


def _within(part: np.ndarray | None, support: np.ndarray | None, trained: int) -> np.ndarray | None:
    """What travels of a part of the model, bool[trained]; ``support``, bool[prunable], may leave some out."""
    if support is None:
        return part
    within = np.ones(trained, bool) if part is None else part.copy()
    within[: len(support)] &= support
    return within


def _outside(held: np.ndarray | None, prunable: int) -> np.ndarray | None:
    """Where what both sides know does not reach, bool[prunable]: most marks are there."""
    return None if held is None else ~held[:prunable]
