"""The wire: an update or a model as the real bytes that cross the network, and back.

A message is a header, an explicit support over the prunable span (the positions kept, whatever their value),
the kept values, and the dense rest of the flat vector. The support is written in the cheapest layout:

- dense: nothing; every position is kept.
- shared: nothing; both sides already know the support.
- relative: one bit for each position the receiver holds; the support must lie within those.
- bitmap: one bit for each prunable position.
- runs: lengths of the runs of cut positions as bytes, 255 meaning "255 and go on", through zstandard.
- planes: the same lengths split into 2 or 4 planes of bytes, low bytes first, through zstandard.

The runs of a random mask are geometric, hence memoryless: the bytes of ``runs`` are independent of each other
and so are the planes; the Huffman stage of zstandard then comes close to the mask's entropy |P| H2(d). What
it loses near density 0.001 (one code word is over half of the bytes of ``runs``) ``planes`` wins back.

Where the receiver can work out all trained values that would travel (``known``), none do: the message is its
support and the float buffers, whatever the value format.

On a grid of words (``bits``) all values, buffers included, are whole numbers of so many bits each.

Every bit of the header and the support is read: a decoder refuses padding that is not zero, a run that does
not end, a frame of nothing or with anything behind it, and run lengths in wider planes than they need.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cluster.transport.wire_runs import compress, decompress, escape, join_planes, unescape, unpack_bits
from cluster.transport.wire_values import (
    VALUE_FORMATS,
    Floats,
    Mask,
    Positions,
    Shape,
    ValueFormat,
    WireError,
    checksum,
    read_values,
    to_bytes,
    write_values,
)
from cluster.transport.words import WORD_BITS, pack, unpack

# The place in these tuples is the code in the header: append, never reorder.
_LAYOUTS = ("dense", "shared", "relative", "bitmap", "runs", "planes")
_FORMATS = (*VALUE_FORMATS, *(f"word{bits}" for bits in WORD_BITS))
_LEANING = ("shared", "relative")  # readable only with the support they were written against
_MAGIC, _VERSION = b"SpFd", 2


@dataclass(frozen=True)
class Message:
    """What a receiver reads.

    Attributes:
        values: float32[size], int64[size] of words; positions outside the support are +0.0.
        support: bool[prunable], or None when every position is kept.
        positions: Where the support is true, in order, or None with it.
        marks: Positions that a second message names, bool[prunable]; None where there is none.
    """

    values: np.ndarray
    support: Mask | None
    positions: Positions | None = None
    marks: Mask | None = None


class _Header(NamedTuple):
    magic: bytes
    version: int
    layout: int
    value_format: int
    told: int  # 1 where the trained values are those that the receiver knows, else 0
    kept: int
    prunable: int
    size: int
    shape_checksum: int
    leaning_checksum: int  # of the support that the layout leans on and of values that are known, else 0
    support_bytes: int
    message_bytes: int


_HEADER = struct.Struct("<4sBBBBIIIIIIQ")
_CHECKSUM = struct.Struct("<I")  # over all other bytes of the message; it stands right behind the header
_PAYLOAD = _HEADER.size + _CHECKSUM.size


def dense_bytes(shape: Shape) -> int:
    """Bytes of the whole vector as float32, without a header: the paper's dense cost."""
    return 4 * shape.size


def nonzero_bytes(values: np.ndarray, shape: Shape) -> int:
    """Bytes as the paper counts them: 4 for each nonzero prunable weight, positions free, the rest dense."""
    # Comparing first: numpy counts booleans several times as fast as floats.
    return 4 * (int(np.count_nonzero(values[: shape.prunable] != 0)) + shape.size - shape.prunable)


def encode(
    values: np.ndarray,
    support: Mask | None,
    shape: Shape,
    *,
    held: Mask | None = None,
    known: Floats | None = None,
    value_format: ValueFormat = "float32",
    bits: int | None = None,
) -> bytes:
    """Write a message in the cheapest layout; the same arguments always give the same bytes.

    Args:
        values: float32[size], or int64[size] with ``bits``; prunable ones outside the support are not sent.
        support: bool[prunable], positions to keep whatever their value; None keeps all.
        shape: The spans of the vector.
        held: bool[prunable] support the receiver already holds, or None; where it equals the support, only
            values are sent.
        known: float32[trained] that the receiver can work out, or None; where all trained values that would
            travel equal it, none do.
        value_format: How trained parameters are written; float buffers are always float32. float32 is exact;
            float16 and bfloat16 round to nearest even and saturate instead of overflowing; int8 rounds to
            multiples of the layer's max|value| / 127. What is not finite stays so (int8: as a NaN layer).
        bits: Of a word of a grid, where nothing is ``known``; None where values are floats.

    Raises:
        ValueError: An argument of wrong shape or type.
    """
    _check_array("values", values, np.int64 if bits else np.float32, shape.size)
    for name, mask in (("support", support), ("held", held)):
        if mask is not None:
            _check_array(name, mask, np.bool_, shape.prunable)
    if known is not None:
        _check_array("known", known, np.float32, shape.trained)
    if value_format not in VALUE_FORMATS:
        raise ValueError(f"value_format is {value_format!r}, must be one of {', '.join(VALUE_FORMATS)}")
    if support is not None and support.all():
        support = None

    if support is None:
        positions, layout, where = None, "dense", b""
    else:
        positions = np.flatnonzero(support)
        layout, where = _write_support(support, positions, held)
    trained = _sent(values, positions, shape)
    pieces: list[bytes | memoryview] = [where]
    told = known is not None and _same_bits(trained, _sent(known, positions, shape))
    if bits:
        pieces += [pack(trained, bits), pack(values[shape.trained :], bits)]
    else:
        pieces += [] if told else write_values(trained, value_format, positions, shape)
        pieces.append(to_bytes(values[shape.trained :], "<f4"))
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        _LAYOUTS.index(layout),
        _FORMATS.index(f"word{bits}" if bits else "float32" if told else value_format),
        told,
        shape.prunable if positions is None else positions.size,
        shape.prunable,
        shape.size,
        shape.checksum,
        _leaning_checksum(held if layout in _LEANING else None, known if told else None),
        len(where),
        _PAYLOAD + sum(map(len, pieces)),
    )
    return b"".join([header, _CHECKSUM.pack(checksum(header, *pieces)), *pieces])


@np.errstate(invalid="ignore")  # a signalling NaN is read like any other, the fold refuses it
def decode(
    data: bytes,
    shape: Shape,
    *,
    held: Mask | None = None,
    known: Floats | None = None,
    out: np.ndarray | None = None,
    bits: int | None = None,
) -> Message:
    """Read a message; nothing is written to ``out`` before the whole message has been found valid.

    Args:
        data: The bytes of one message.
        shape: The spans of the vector, as the sender knew them.
        held: bool[prunable] support this receiver holds, or None.
        known: float32[trained] values that it works out, or None.
        out: Contiguous array to fill and return as the values; a new one when None.
        bits: Of a word of a grid, where values are such and no floats.

    Raises:
        WireError: Truncated, damaged or trailing bytes, a vector of another shape, or another
            ``held`` or ``known``.
        ValueError: ``held``, ``known`` or ``out`` of wrong shape or type.
    """
    if held is not None:
        _check_array("held", held, np.bool_, shape.prunable)
    if known is not None:
        _check_array("known", known, np.float32, shape.trained)
    out = np.empty(shape.size, np.int64 if bits else np.float32) if out is None else out
    _check_array("out", out, np.int64 if bits else np.float32, shape.size)
    header, payload = _open(data)
    found = _FORMATS[header.value_format]
    if found not in ([f"word{bits}"] if bits else VALUE_FORMATS):
        raise WireError(f"a message of {found}, where {f'word{bits}' if bits else 'floats'} is expected")
    if (header.prunable, header.size, header.shape_checksum) != (shape.prunable, shape.size, shape.checksum):
        raise WireError(
            f"the message is for {header.size} floats, {header.prunable} of them prunable; this receiver has "
            f"{shape.size} and {shape.prunable}, or splits them differently into layers and buffers"
        )
    where, content = payload[: header.support_bytes], payload[header.support_bytes :]
    _check_leaning(header, held, known)
    positions = _read_support(header, where, shape, held)
    rest, count = shape.size - shape.trained, shape.trained
    count += 0 if positions is None else positions.size - shape.prunable
    if bits:
        words = unpack(content, bits, count + rest)
        trained, out[shape.trained :] = words[:count], words[count:]
    else:
        told = _sent(known, positions, shape) if header.told and known is not None else None
        trained = read_values(
            content, VALUE_FORMATS[header.value_format], count if told is None else 0, positions, shape
        )
        trained = trained if told is None else told
        out[shape.trained :] = np.frombuffer(content[len(content) - 4 * rest :], "<f4")

    support = None
    if positions is None:
        out[: shape.trained] = trained
    else:
        support = np.zeros(shape.prunable, np.bool_)
        support[positions] = True
        out[: shape.prunable] = 0
        out[positions] = trained[: positions.size]
        out[shape.prunable : shape.trained] = trained[positions.size :]
    return Message(out, support, positions)


def announced(data: bytes) -> tuple[int, int]:
    """Bytes of the message that ``data`` begins with and floats of its vector, as the header announces them.

    Raises:
        WireError: There is no whole header.
    """
    header = _header(data)
    return header.message_bytes, header.size


def describe(data: bytes) -> dict[str, Any]:
    """What a message is made of: layout, value format, counts, and bytes of each part.

    Raises:
        WireError: Truncated or damaged bytes.
    """
    header, payload = _open(data)
    return {
        "layout": _LAYOUTS[header.layout],
        "value_format": _FORMATS[header.value_format],
        "told": bool(header.told),
        "kept": header.kept,
        "prunable": header.prunable,
        "size": header.size,
        "header_bytes": _PAYLOAD,
        "support_bytes": header.support_bytes,
        "value_bytes": len(payload) - header.support_bytes,
        "message_bytes": header.message_bytes,
    }


def _check_array(name: str, array: np.ndarray, dtype: type, size: int) -> None:
    if array.dtype != dtype or array.shape != (size,) or not array.flags.c_contiguous:
        expected = f"contiguous {np.dtype(dtype).name}[{size}]"
        raise ValueError(f"{name} must be {expected}, found {array.dtype.name}{list(array.shape)}")


def _sent(values: np.ndarray, positions: Positions | None, shape: Shape) -> np.ndarray:
    """The trained values that travel."""
    if positions is None:
        return values[: shape.trained]
    return np.concatenate([values[positions], values[shape.prunable : shape.trained]])


def _same_bits(first: Floats, second: Floats) -> bool:
    return np.array_equal(first.view(np.uint32), second.view(np.uint32))


def _leaning_checksum(held: Mask | None, known: Floats | None) -> int:
    pieces = [] if held is None else [np.packbits(held).data]
    pieces += [] if known is None else [to_bytes(known, "<f4")]
    return checksum(*pieces) if pieces else 0


def _check_leaning(header: _Header, held: Mask | None, known: Floats | None) -> None:
    """That the receiver has what the message leans on."""
    layout, needs_held = _LAYOUTS[header.layout], _LAYOUTS[header.layout] in _LEANING
    if header.leaning_checksum and not (needs_held or header.told):
        raise WireError(f"a message of layout {layout} leans on no support, and names one")
    if needs_held and held is None:
        raise WireError("the message leans on a support that this receiver does not hold")
    if header.told and known is None:
        raise WireError("the message has no values, and this receiver knows of none")
    if header.leaning_checksum != _leaning_checksum(
        held if needs_held else None, known if header.told else None
    ):
        raise WireError("the message leans on another support or other values than this receiver holds")


def _header(data: bytes) -> _Header:
    if len(data) < _PAYLOAD:
        raise WireError(f"{len(data)} bytes are too few for the header of {_PAYLOAD}")
    return _Header._make(_HEADER.unpack_from(data))


def _open(data: bytes) -> tuple[_Header, memoryview]:
    """Header and payload of a message whose every byte is as it was sent."""
    header = _header(data)
    if header.magic != _MAGIC:
        raise WireError(f"not a message: it begins with {header.magic!r} instead of {_MAGIC!r}")
    if header.version != _VERSION:
        raise WireError(f"the message has version {header.version}, this receiver reads version {_VERSION}")
    if header.message_bytes != len(data):
        raise WireError(f"the header announces {header.message_bytes} bytes, {len(data)} are here")
    view = memoryview(data)
    payload = view[_PAYLOAD:]
    if checksum(view[: _HEADER.size], payload) != _CHECKSUM.unpack_from(data, _HEADER.size)[0]:
        raise WireError("the checksum does not match: the message was damaged on its way")
    if header.layout >= len(_LAYOUTS) or header.value_format >= len(_FORMATS) or header.told > 1:
        raise WireError(f"unknown layout {header.layout} or value format {header.value_format}")
    if header.told and header.value_format:
        raise WireError("the message has no values, and a format of values")
    if header.support_bytes > len(payload):
        raise WireError(f"a support of {header.support_bytes} bytes in a payload of {len(payload)}")
    return header, payload


def _write_support(support: Mask, positions: Positions, held: Mask | None) -> tuple[str, bytes]:
    """The cheapest of nothing, bits and zstandard frames, with its layout."""
    if held is not None and np.array_equal(support, held):
        return "shared", b""
    if held is not None and not np.any(support > held):
        layout, bit_count = "relative", int(np.count_nonzero(held))
    else:
        layout, bit_count = "bitmap", support.size
    bits_size = (bit_count + 7) // 8
    runs = np.diff(positions, prepend=-1) - 1
    frames = {"runs": compress(escape(runs))}
    # Without an escape the first plane alone is all that ``runs`` holds, so planes cannot be smaller.
    if runs.size and (longest := runs.max()) >= 255:
        wide = runs.astype("<u2" if longest < 2**16 else "<u4")
        frames["planes"] = compress(*np.ascontiguousarray(wide.view(np.uint8).reshape(runs.size, -1).T))
    smallest = min(frames, key=lambda name: len(frames[name]))
    if len(frames[smallest]) < bits_size:
        return smallest, frames[smallest]
    bits = support if held is None or layout == "bitmap" else support[held]
    return layout, np.packbits(bits).tobytes()


def _read_support(header: _Header, where: memoryview, shape: Shape, held: Mask | None) -> Positions | None:
    """Sorted distinct positions, as many as the header announces; None for all."""
    layout, kept = _LAYOUTS[header.layout], header.kept
    if layout == "dense":
        if where or kept != shape.prunable:
            raise WireError(f"a dense message keeps {kept} of {shape.prunable} positions")
        return None
    if kept >= shape.prunable:
        raise WireError(f"a message of layout {layout} keeps {kept} of {shape.prunable} positions")
    if layout in ("runs", "planes"):
        # Known before anything is unpacked, so a small message cannot ask for a large allocation.
        limit = kept + shape.prunable // 255 if layout == "runs" else 4 * kept
        content = decompress(where, limit)
        positions = unescape(content) if layout == "runs" else join_planes(content, kept)
    elif layout == "bitmap" or held is None:
        positions = np.flatnonzero(unpack_bits(where, shape.prunable))
    else:
        positions = np.flatnonzero(held)
        if layout == "relative":
            positions = positions[unpack_bits(where, positions.size)]
        elif where:
            raise WireError(f"{len(where)} bytes of support in a message that needs none")
    if positions.size != kept or (kept and positions[-1] >= shape.prunable):
        raise WireError(f"the support does not have {kept} positions below {shape.prunable}")
    return positions


__all__ = [
    "Message",
    "Shape",
    "ValueFormat",
    "WireError",
    "announced",
    "decode",
    "dense_bytes",
    "describe",
    "encode",
    "nonzero_bytes",
]
