"""What crosses the wire: the shape both sides know, and the formats of the values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import xxhash

from algorithms import ParameterLayout

ValueFormat = Literal["float32", "float16", "bfloat16", "int8"]
Floats: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.bool_]
Positions: TypeAlias = npt.NDArray[np.intp]

# The place in this tuple is the code in the header: append, never reorder.
VALUE_FORMATS: tuple[ValueFormat, ...] = get_args(ValueFormat)
# No scale is 0 or subnormal (too coarse to divide by), and 127 times the largest is not infinite.
_SMALLEST_SCALE = np.finfo(np.float32).tiny
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


class WireError(ValueError):
    """Bytes that are not a message this receiver can read; says which expectation failed."""


@dataclass(frozen=True)
class Shape:
    """What sender and receiver both know of the flat vector.

    Attributes:
        prunable: Length of the first span, the only one a support speaks of: the prunable weights, or all
            that is trained where clients hold parts of the model.
        trained: End of the trained parameters; ``[trained, size)`` are float buffers and what is carried.
        size: Length of the whole vector.
        layers: (start, stop) of every trained tensor in order, covering ``[0, trained)``; int8 scales each.

    Raises:
        ValueError: The spans are not nested, or the layers do not cover the trained span.
    """

    prunable: int
    trained: int
    size: int
    layers: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls, layout: ParameterLayout, direction: Literal["up", "down"] = "up", *, parts: bool = False
    ) -> Shape:
        """The shape of what clients send (``up``) or are sent (``down``), or of ``parts`` of the model."""
        layers = tuple((entry.start, entry.stop) for entry in layout.trained)
        size = layout.up_size if direction == "up" else layout.down_size
        spoken = layout.trained_size if parts else layout.prunable_size
        return cls(spoken, layout.trained_size, size, layers)

    def __post_init__(self) -> None:
        if not 0 <= self.prunable <= self.trained <= self.size < 2**31:
            raise ValueError(f"need 0 <= prunable <= trained <= size < 2**31, found {self}")
        edges = [0, *(stop for _, stop in self.layers)]
        starts = [start for start, _ in self.layers]
        if starts != edges[:-1] or edges[-1] != self.trained or edges != sorted(edges):
            raise ValueError(f"layers must cover [0, {self.trained}) in order, found {self.layers}")

    @cached_property
    def checksum(self) -> int:
        """Of all spans: receivers that split the vector differently differ here."""
        spans = np.array([self.prunable, self.trained, self.size, *self._stops], "<i8")
        return checksum(spans.tobytes())

    @cached_property
    def _stops(self) -> npt.NDArray[np.int64]:
        return np.array([stop for _, stop in self.layers], np.int64)


def checksum(*pieces: bytes | memoryview) -> int:
    """The lower half of XXH3 over all pieces."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest() & 0xFFFFFFFF


def to_bytes(array: np.ndarray, dtype: str) -> memoryview:
    """The bytes of the same numbers as ``dtype``; no copy where they are so already."""
    return np.ascontiguousarray(array, dtype).data.cast("B") if array.size else memoryview(b"")


def _layer_counts(positions: Positions | None, shape: Shape) -> npt.NDArray[np.int64]:
    """How many of the transmitted trained values each layer has."""
    edges = shape._stops
    if positions is not None:
        within = np.searchsorted(positions, np.minimum(edges, shape.prunable))
        edges = within + np.maximum(edges - shape.prunable, 0)
    return np.diff(edges, prepend=0)


@np.errstate(invalid="ignore")  # a signalling NaN is sent like any other, the receiver refuses it
def write_values(
    trained: Floats, value_format: ValueFormat, positions: Positions | None, shape: Shape
) -> list[memoryview]:
    """Transmitted trained values in their format, for int8 behind one float32 scale a layer."""
    if value_format == "float32":
        return [to_bytes(trained, "<f4")]
    if value_format == "bfloat16":
        return [to_bytes(_to_bfloat16(trained), "<u2")]
    if value_format == "float16":
        largest = float(np.finfo(np.float16).max)
        finite = np.isfinite(trained)
        return [to_bytes(np.where(finite, np.clip(trained, -largest, largest), trained), "<f2")]
    counts = _layer_counts(positions, shape)
    filled = counts > 0
    peaks = np.zeros(counts.size, np.float32)
    if trained.size:
        starts = (np.cumsum(counts) - counts)[filled]
        peaks[filled] = np.maximum.reduceat(np.abs(trained), starts)
    scales = np.clip(peaks / np.float32(127), _SMALLEST_SCALE, _LARGEST_SCALE)
    scales[~np.isfinite(peaks)] = np.nan
    steps = np.rint(trained / np.repeat(scales, counts))
    return [to_bytes(scales, "<f4"), to_bytes(np.nan_to_num(steps).clip(-127, 127), "i1")]


def read_values(
    content: memoryview, value_format: ValueFormat, count: int, positions: Positions | None, shape: Shape
) -> np.ndarray:
    """The transmitted trained values, as numbers that convert to float32."""
    scale_count = len(shape.layers) if value_format == "int8" else 0
    expected = 4 * scale_count + _ITEM_BYTES[value_format] * count + 4 * (shape.size - shape.trained)
    if len(content) != expected:
        raise WireError(f"{len(content)} bytes of values where {expected} are expected")
    if value_format == "float32":
        return np.frombuffer(content, "<f4", count)
    if value_format == "float16":
        return np.frombuffer(content, "<f2", count)
    if value_format == "bfloat16":
        return (np.frombuffer(content, "<u2", count).astype(np.uint32) << 16).view(np.float32)
    scales = np.frombuffer(content, "<f4", scale_count).astype(np.float32)
    steps = np.frombuffer(content, np.int8, count, offset=4 * scale_count)
    counts = _layer_counts(positions, shape)
    possible = (scales >= _SMALLEST_SCALE) & (scales <= _LARGEST_SCALE) | np.isnan(scales)
    if not possible.all() or (scales[counts == 0] != _SMALLEST_SCALE).any() or steps.min(initial=0) == -128:
        raise WireError("scales or steps of int8 values that no sender writes")
    return steps * np.repeat(scales, counts)


def _to_bfloat16(values: Floats) -> npt.NDArray[np.uint32]:
    """Upper halves of float32, rounded to nearest, ties to even; finite values stay finite, NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded: npt.NDArray[np.uint32] = (bits + (0x7FFF + ((bits >> 16) & 1))) >> np.uint32(16)
    rounded[np.isfinite(values) & ((rounded & 0x7FFF) == 0x7F80)] -= 1
    rounded[np.isnan(values)] = 0x7FC0
    return rounded
