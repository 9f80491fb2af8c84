"""A naive reader of messages: what the fuzzer of the wire holds the product against; no code is shared."""

from __future__ import annotations

import struct

import numpy as np
import xxhash
import zstandard

from cluster.transport.wire import Shape

HEADER, LAYOUTS = 44, ("dense", "shared", "relative", "bitmap", "runs", "planes")
FORMATS, ITEM = ("float32", "float16", "bfloat16", "int8"), (4, 2, 2, 1)


def read_naively(
    data: bytes, shape: Shape, held: np.ndarray | None, known: np.ndarray | None
) -> tuple[np.ndarray, list[int] | None] | None:
    """Values and kept positions (None for all) as the format's description has them; None for no message."""
    if len(data) < HEADER:
        return None
    (
        magic,
        version,
        layout,
        form,
        told,
        kept,
        prunable,
        size,
        spans,
        leans,
        support_bytes,
        length,
        digest,
    ) = struct.unpack("<4s4B6IQI", data[:HEADER])
    if (magic, version, length) != (b"SpFd", 2, len(data)) or layout > 5 or form > 3 or told > 1:
        return None
    if told and (known is None or form):
        return None
    if checksum(data[:40] + data[HEADER:]) != digest:
        return None
    if (prunable, size, spans) != (shape.prunable, shape.size, shape.checksum):
        return None
    where, content = data[HEADER:][:support_bytes], data[HEADER:][support_bytes:]
    if len(where) != support_bytes:
        return None
    needed = _pack(held.tolist()) if layout in (1, 2) and held is not None else b""
    needed += struct.pack(f"<{len(known)}f", *known.tolist()) if told else b""
    if leans != (checksum(needed) if told or (layout in (1, 2) and held is not None) else 0):
        return None
    positions = _positions(LAYOUTS[layout], where, kept, prunable, held)
    if positions == "wrong":
        return None
    sent = [*(range(prunable) if positions is None else positions), *range(prunable, shape.trained)]
    if len(sent) - (shape.trained - prunable) != kept:
        return None
    if told:
        content = b"".join(struct.pack("<f", known[place]) for place in sent) + content
    values = _values(content, form, sent, shape)
    return None if values is None else (values, positions)


def checksum(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def _pack(bits: list[bool]) -> bytes:
    text = "".join("1" if bit else "0" for bit in bits)
    return bytes(int(text[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(text), 8))


def _positions(
    layout: str, where: bytes, kept: int, prunable: int, held: np.ndarray | None
) -> list[int] | str | None:
    if layout == "dense":
        return None if not where and kept == prunable else "wrong"
    if kept >= prunable or (layout in ("shared", "relative") and held is None):
        return "wrong"
    if layout == "shared":
        return np.flatnonzero(held).tolist() if not where else "wrong"
    if layout in ("relative", "bitmap"):
        candidates = np.flatnonzero(held).tolist() if layout == "relative" else list(range(prunable))
        bits = "".join(f"{byte:08b}" for byte in where)
        if len(where) != -(-len(candidates) // 8) or "1" in bits[len(candidates) :]:
            return "wrong"
        return [place for place, bit in zip(candidates, bits, strict=False) if bit == "1"]
    raw = _unzip(where, 4 * prunable)
    runs = None if raw is None else _runs(raw, kept) if layout == "runs" else _planes(raw, kept)
    if runs is None:
        return "wrong"
    positions, place = [], -1
    for run in runs:
        place += run + 1
        positions.append(place)
    return positions if place < prunable else "wrong"


def _unzip(frame: bytes, limit: int) -> bytes | None:
    if not frame:
        return b""
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd" or frame[4] & 31 or frame[4] >> 5 == 0:
        return None
    width = (1, 2, 4, 8)[frame[4] >> 6]
    place = 5 if frame[4] & 32 else 6  # behind the window's descriptor
    announced = int.from_bytes(frame[place : place + width], "little") + 256 * (width == 2)
    if not 0 < announced <= limit:
        return None
    stream = zstandard.ZstdDecompressor().decompressobj()
    try:
        content = stream.decompress(frame)
    except zstandard.ZstdError:
        return None
    return content if stream.eof and not stream.unused_data and len(content) == announced else None


def _runs(raw: bytes, kept: int) -> list[int] | None:
    runs, waiting = [], 0
    for byte in raw:
        waiting += byte
        if byte < 255:
            runs.append(waiting)
            waiting = 0
    ended = not raw or raw[-1] < 255
    return runs if ended and len(runs) == kept else None


def _planes(raw: bytes, kept: int) -> list[int] | None:
    for width, least in ((2, 255), (4, 65536)):
        if kept and len(raw) == width * kept:
            runs = [sum(raw[plane * kept + i] << 8 * plane for plane in range(width)) for i in range(kept)]
            return runs if max(runs) >= least else None
    return None


def _values(content: bytes, form: int, sent: list[int], shape: Shape) -> np.ndarray | None:
    layers, buffers = len(shape.layers) if form == 3 else 0, shape.size - shape.trained
    if len(content) != 4 * layers + ITEM[form] * len(sent) + 4 * buffers:
        return None
    scales = struct.unpack_from(f"<{layers}f", content)
    code = ("f", "e", "H", "b")[form]
    numbers = struct.unpack_from(f"<{len(sent)}{code}", content, 4 * layers)
    result = np.zeros(shape.size, np.float32)
    if form == 3:
        of = [next(i for i, (_, stop) in enumerate(shape.layers) if place < stop) for place in sent]
        for layer, scale in enumerate(scales):
            most = float(np.finfo(np.float32).max) / 127
            if not (scale != scale or 2.0**-126 <= scale < most) or (layer not in of and scale != 2.0**-126):
                return None
        if -128 in numbers:
            return None
        numbers = [
            np.float32(scales[layer]) * np.float32(step) for layer, step in zip(of, numbers, strict=True)
        ]
    elif form == 2:
        numbers = [struct.unpack("<f", struct.pack("<I", number << 16))[0] for number in numbers]
    for place, number in zip(sent, numbers, strict=True):
        result[place] = number
    tail = content[len(content) - 4 * buffers :]
    result[shape.trained :] = struct.unpack(f"<{buffers}f", tail)
    return result


# -------------------------------------------------------------------------------------------------- checks
