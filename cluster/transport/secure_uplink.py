"""What clients send where the server is to see their sum alone: words, and a total of words.

A message holds n_i w_i in whole units of the round's grid, of the exact one as two words a value, then
n_i m_i of every prunable weight where the method needs it and clients differ in what they hold, then n_i.
Where all clients send the mask that both sides know, its values alone travel; else every value does, as where
one is missing is hidden too. With masks every word is the sender's plus its mask, modulo 2**k.
"""

from __future__ import annotations

import struct
from bisect import insort
from dataclasses import dataclass, field

import numpy as np
import xxhash

from algorithms import Algorithm, Grid, ParameterLayout, Total
from cluster.transport.uplink import Posted, Sending, Withheld
from cluster.transport.wire_values import WireError
from cluster.transport.words import pack, signed, unpack

_HEADER = struct.Struct("<4sBxxxII")  # magic, bits of a word, number of words, checksum of all the rest
_MAGIC = b"SpFm"


@dataclass
class SealedTotal:
    """The sum of some clients' messages. A monoid, as :class:`algorithms.Total` is.

    Attributes:
        words: Modulo 2**64, of which the lowest bits of a word's size count, uint64[n].
        clients: Whose messages are in it, ascending.
    """

    words: np.ndarray
    clients: list[int] = field(default_factory=list)

    def fold(self, client: int, words: np.ndarray) -> None:
        """Add one client's words, int64[n]."""
        self.words += words.view(np.uint64)
        insort(self.clients, client)

    def merge(self, other: SealedTotal) -> SealedTotal:
        """Add ``other`` to this total, in place."""
        self.words += other.words
        self.clients = sorted(self.clients + other.clients)
        return self

    def copy(self) -> SealedTotal:
        """The same in memory of its own."""
        return SealedTotal(self.words.copy(), list(self.clients))


class SecureUplink:
    """Encodes, decodes, folds and opens; stands where :class:`cluster.transport.uplink.Uplink` does.

    Args:
        layout: The model's layout.
        method: The method.
        bits: Bits of a word of the round's grid; None for the exact one.
    """

    def __init__(self, layout: ParameterLayout, method: Algorithm, bits: int | None) -> None:
        self._layout, self._method, self._grid_bits = layout, method, bits
        self._bits = bits or 64
        self._counts = method.masked or method.reads_supports

    def message_bytes(self, held: np.ndarray | None, *, shared: bool) -> int:
        """Bytes of a message; all clients of a round send as many."""
        return _HEADER.size + self.count(held, shared=shared) * self._bits // 8

    def count(self, held: np.ndarray | None, *, shared: bool) -> int:
        """Words of a message."""
        layout = self._layout
        values = layout.up_size
        if shared and held is not None:
            values -= int(np.count_nonzero(~held))
        counts = layout.prunable_size if self._counts and not shared else 0
        return values * (2 if self._grid_bits is None else 1) + counts + 1

    def zero(self, held: np.ndarray | None, *, shared: bool) -> SealedTotal:
        """The total of no message."""
        return SealedTotal(np.zeros(self.count(held, shared=shared), np.uint64))

    def encode(
        self,
        values: np.ndarray,
        support: np.ndarray | None,
        held: np.ndarray | None,
        known: np.ndarray | None = None,
        marks: np.ndarray | None = None,
        sending: Sending | None = None,
    ) -> Posted:
        """An update as bytes; see :class:`Uplink`.

        Raises:
            Withheld: A value is not finite or, on the exact grid, beyond its limit.
            ValueError: The method sends other positions than it says all clients share.
        """
        assert sending is not None
        if (
            sending.shared
            and support is not None
            and not (held is not None and np.array_equal(support, held))
        ):
            raise ValueError(
                f"{type(self._method).__name__}.sends_mask promises the mask that both sides hold; this "
                f"client's update has {np.count_nonzero(support):,} positions, others than its own"
            )
        kept = values[: self._layout.up_size]
        if sending.shared and held is not None:
            kept = kept[self._positions(held)]
        pieces, clamped = self._units(kept, sending.grid, sending.samples)
        if self._counts and not sending.shared:
            ones = np.ones(self._layout.prunable_size, np.bool_) if support is None else support
            pieces.append(ones * np.int64(sending.samples))
        words = np.concatenate([*pieces, [sending.samples]]).view(np.uint64)
        if sending.keys is not None:
            sending.keys.mask(words, sending.client)
        content = pack(words, self._bits)
        message = _HEADER.pack(_MAGIC, self._bits, len(words), _checksum(content)) + content
        # Under a mask no value is 0, and the paper's accounting counts all that travel.
        density = 1.0 if not sending.shared or held is None else np.count_nonzero(held) / len(held)
        return Posted(message, 4 * len(kept), float(density), clamped)

    def decode(self, message: bytes, held: np.ndarray | None, known: np.ndarray | None = None) -> np.ndarray:
        """The words of a message, int64[n]."""
        if len(message) < _HEADER.size:
            raise WireError(f"{len(message)} bytes are no message of words")
        magic, bits, count, checksum = _HEADER.unpack_from(message)
        content = message[_HEADER.size :]
        if (magic, bits) != (_MAGIC, self._bits):
            raise WireError(f"a message of {magic!r} and {bits} bits, expected are {_MAGIC!r}, {self._bits}")
        if _checksum(content) != checksum:
            raise WireError("the checksum does not match: the message was damaged on its way")
        return unpack(content, bits, count)

    def fold(
        self,
        total: SealedTotal,
        client: int,
        received: np.ndarray,
        samples: int,
        base: np.ndarray | None,
        clip: float | None = None,
    ) -> str | None:
        """Add a message; nobody can tell whether it ought to be refused."""
        if len(received) != len(total.words):
            raise WireError(f"{len(received):,} words in a round of {len(total.words):,}")
        total.fold(client, received)
        return None

    def take(
        self,
        total: SealedTotal,
        client: int,
        message: bytes,
        samples: int,
        base: np.ndarray | None,
        held: np.ndarray | None,
        known: np.ndarray | None = None,
        clip: float | None = None,
    ) -> str | None:
        """Decode and add a message."""
        return self.fold(total, client, self.decode(message, held), samples, base)

    def open(self, sealed: SealedTotal, held: np.ndarray | None, grid: Grid, *, shared: bool) -> Total:
        """The total that the sum of plain words stands for, as if each update had been folded.

        Where clients sent more than the mask, it does not know how many hold a position: ``votes`` is empty.
        """
        layout, bits = self._layout, self._bits
        words = signed(sealed.words, bits)
        samples = words[-1]
        total = self._method.zero(grid, layout)
        total.samples, total.clients = int(samples), list(sealed.clients)
        where = slice(0, layout.up_size) if held is None or not shared else self._positions(held)
        size = len(total.high[where])
        coarse, fine = grid.units
        if self._grid_bits is None:
            total.high[where], total.low[where] = words[:size] * coarse, words[size : 2 * size] * fine
        else:
            total.high[where], total.low[where] = grid.parts(words[:size])
        prunable = layout.prunable_size
        if shared:
            total.votes[:] = len(total.clients)
            counts = np.full(prunable, total.samples, np.int64)
            if held is not None:
                total.votes[~held] = counts[~held] = 0
        else:
            total.votes = np.empty(0, np.int32)
            counts = words[len(words) - 1 - prunable : -1] if self._counts else np.empty(0, np.int64)
        if len(counts):
            total.layer_counts[:] = [int(counts[entry.span].sum()) for entry in layout.prunable]
            if total.mask_samples is not None or not shared:
                total.mask_samples = counts.copy()
        return total

    def _units(self, values: np.ndarray, grid: Grid, samples: int) -> tuple[list[np.ndarray], int]:
        """n_i w_i in whole units, one or two words a value, and how many were clamped."""
        try:
            if grid.bits is not None:
                words, clamped = grid.words(values, samples)
                return [words], clamped
            grid.check(values)
        except OverflowError as error:
            raise Withheld(f"its update cannot be averaged: {error}") from None
        terms = values.astype(np.float64)
        terms *= samples
        return list(grid.integers(terms)), 0

    def _positions(self, held: np.ndarray) -> np.ndarray:
        prunable = self._layout.prunable_size
        return np.concatenate([np.flatnonzero(held), np.arange(prunable, self._layout.up_size)])


def _checksum(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF
