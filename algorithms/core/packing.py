"""A total as it travels between actors: as it is, or its nonzero positions alone where that is smaller.

Of sparse updates a total holds the union of their supports and zeros elsewhere. It is packed and unpacked
without rounding; what is added up of packed totals are the same integers on the same grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from algorithms.core.aggregation import Total

#: The arrays of a total that have an entry a position.
_COLUMNS = ("high", "low", "votes", "mask_samples", "marked")

#: A total is packed if that leaves at most this share of its bytes: less is not worth the passes over it.
_WORTH = 0.75


@dataclass(frozen=True)
class PackedTotal:
    """A total without its zeros.

    Attributes:
        rest: All of the total but its columns.
        positions: Where some column is not zero, ascending, int32 or int64.
        columns: By name of the array its values at those positions that it reaches to.
        sizes: By name its length.
    """

    rest: Total
    positions: np.ndarray
    columns: dict[str, np.ndarray]
    sizes: dict[str, int]

    @property
    def clients(self) -> list[int]:
        """Whose updates are in it, ascending."""
        return self.rest.clients

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.positions.nbytes + sum(values.nbytes for values in self.columns.values())

    @property
    def whole_nbytes(self) -> int:
        """Bytes of its arrays with their zeros."""
        return sum(self.sizes[name] * values.itemsize for name, values in self.columns.items())


def pack(total: Any) -> Any:
    """What to send of a total; a sealed one, whose words show nothing, as it is."""
    if not isinstance(total, Total):
        return total
    arrays = {name: own for name in _COLUMNS if (own := getattr(total, name)) is not None}
    most = _most(sum(own.nbytes for own in arrays.values()), arrays)
    if any(np.count_nonzero(own) > most for own in arrays.values()):
        return total
    filled = np.zeros(max(map(len, arrays.values())), np.bool_)
    for own in arrays.values():
        filled[: len(own)] |= own != 0
    positions = np.flatnonzero(filled)
    if len(positions) > most:
        return total
    columns = {name: own[positions[: _reach(positions, len(own))]] for name, own in arrays.items()}
    nothing: dict[str, Any] = {name: own[:0] for name, own in arrays.items()}
    kind = np.int32 if len(filled) < 2**31 else np.int64
    sizes = {name: len(own) for name, own in arrays.items()}
    return PackedTotal(replace(total, **nothing), positions.astype(kind), columns, sizes)


def unpack(total: Any) -> Any:
    """The total in writable arrays of its own: those out of the object store are read-only."""
    if not isinstance(total, PackedTotal):
        return total.copy()
    arrays: dict[str, Any] = {}
    for name, values in total.columns.items():
        arrays[name] = np.zeros(total.sizes[name], values.dtype)
        arrays[name][total.positions[: len(values)]] = values
    rest = total.rest
    return replace(rest, **arrays, clients=list(rest.clients), layer_counts=rest.layer_counts.copy())


def merge(total: Any, other: Any) -> None:
    """Add ``other``, packed or not, to ``total``, in place."""
    if not isinstance(other, PackedTotal):
        total.merge(other)
        return
    positions = torch.from_numpy(other.positions.astype(np.int64))
    for name, values in other.columns.items():
        own = torch.from_numpy(getattr(total, name))
        own.index_add_(0, positions[: len(values)], torch.from_numpy(values.copy()))
    total.merge_rest(other.rest)


def combine(totals: Iterable[Any]) -> Any:
    """What some totals add up to, packed where that is smaller.

    Packed ones are kept until all are there, and added up where they are filled. Where they would take more
    room than a whole total, they are added to one as they come.
    """
    parts: list[Any] = []
    whole: Any = None
    for total in totals:
        if whole is not None:
            merge(whole, total)
            continue
        parts.append(total)
        if not isinstance(total, PackedTotal) or sum(part.nbytes for part in parts) > total.whole_nbytes:
            whole = _added(parts)
            parts.clear()  # not kept alive
    return _united(parts) if whole is None else pack(whole)


def _added(totals: Sequence[Any]) -> Any:
    whole = unpack(totals[0])
    for total in totals[1:]:
        merge(whole, total)
    return whole


def _united(parts: Sequence[PackedTotal]) -> Any:
    """The sum of packed totals, packed unless their union is worth no packing."""
    first = parts[0]
    filled = np.zeros(max(first.sizes.values()), np.bool_)
    for part in parts:
        filled[part.positions.astype(np.intp)] = True  # numpy is twice as fast by its own index type
    positions = np.flatnonzero(filled)
    if len(positions) > _most(first.whole_nbytes, first.columns):
        return pack(_added(parts))
    place = np.empty(len(filled), np.int32)  # of a position among those of the union
    place[positions] = np.arange(len(positions), dtype=np.int32)
    columns = {
        name: np.zeros(_reach(positions, first.sizes[name]), values.dtype)
        for name, values in first.columns.items()
    }
    rest = replace(first.rest, clients=list(first.clients), layer_counts=first.rest.layer_counts.copy())
    for part in parts:
        places = place[part.positions.astype(np.intp)].astype(np.intp)
        for name, values in part.columns.items():
            columns[name][places[: len(values)]] += values
    for part in parts[1:]:
        rest.merge_rest(part.rest)
    return PackedTotal(rest, positions.astype(first.positions.dtype), columns, first.sizes)


def _most(whole_nbytes: int, columns: Mapping[str, np.ndarray]) -> float:
    """Positions up to which a total of so many bytes, with such columns, is worth packing."""
    return _WORTH * whole_nbytes / (4 + sum(values.itemsize for values in columns.values()))


def _reach(positions: np.ndarray, size: int) -> int:
    return int(np.searchsorted(positions, size))
