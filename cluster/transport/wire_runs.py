"""How positions are written: as bits, and as lengths of the runs between them, through zstandard."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import zstandard

from cluster.transport.wire_values import Mask, Positions, WireError

# Level 1 gives fewer bytes than level 3, and faster: these data do not repeat, so a short match that a longer
# search finds is a coincidence dearer than the Huffman codes it replaces; hence also the long minimum match.
_ZSTD = zstandard.ZstdCompressionParameters.from_level(1, min_match=7)
# Of a frame's descriptor, its fifth byte: unused and reserved bit, checksum, dictionary id (RFC 8878).
_FRAME_EXTRAS = 0b11111


def unpack_bits(packed: memoryview, count: int) -> Mask:
    """So many bits, with nothing behind them."""
    if len(packed) != (count + 7) // 8:
        raise WireError(f"{len(packed)} bytes cannot be {count} bits")
    if packed and packed[-1] & (255 >> ((count - 1) % 8 + 1)):
        raise WireError(f"there are bits behind the {count} of the support")
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).view(np.bool_)


def escape(runs: Positions) -> npt.NDArray[np.uint8]:
    """Lengths as bytes below 255, each behind one 255 for every 255 it exceeds them by."""
    small = runs.astype(np.uint8)
    long = np.flatnonzero(runs >= 255)
    if not long.size:
        return small
    small[long] = runs[long] % 255
    return np.insert(small, np.repeat(long, runs[long] // 255), 255)


def unescape(content: npt.NDArray[np.uint8]) -> Positions:
    """Positions of what :func:`escape` wrote of the lengths before each."""
    if content.size and content[-1] == 255:
        raise WireError("the last run of the support does not end")
    last = content != 255  # these bytes end a run, and the kept position behind it counts one more
    steps = np.add(content, last, dtype=np.intp)
    return np.cumsum(steps, out=steps)[last] - 1


def join_planes(content: npt.NDArray[np.uint8], kept: int) -> Positions:
    """Positions of the lengths before each, whose bytes stand plane by plane."""
    width = content.size // kept if kept else 0
    if width not in (2, 4) or width * kept != content.size:
        raise WireError(f"{content.size} bytes cannot be 2 or 4 planes of {kept} run lengths")
    runs = np.ascontiguousarray(content.reshape(width, kept).T).view(f"<u{width}")[:, 0]
    if runs.max() < (255 if width == 2 else 2**16):
        raise WireError(f"{width} planes of run lengths, the longest of which is {runs.max()}")
    steps = runs.astype(np.intp) + 1
    return np.cumsum(steps, out=steps) - 1


def compress(*planes: npt.NDArray[np.uint8]) -> bytes:
    """One zstandard frame, each plane in blocks of its own (their statistics differ); b"" for no bytes."""
    total = sum(plane.size for plane in planes)
    if not total:
        return b""
    # A context for each call costs 10 microseconds; one that is kept is not safe among threads.
    stream = zstandard.ZstdCompressor(compression_params=_ZSTD).compressobj(size=total)
    pieces = []
    for plane in planes[:-1]:
        pieces += [stream.compress(plane.data), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*pieces, stream.compress(planes[-1].data), stream.flush()])


def decompress(frame: memoryview, limit: int) -> npt.NDArray[np.uint8]:
    """What :func:`compress` wrote, at most ``limit`` bytes."""
    if not frame:
        return np.empty(0, np.uint8)
    try:
        size = zstandard.frame_content_size(frame)
        # A frame of 0 bytes would be taken with anything behind it; -1 is a frame that does not tell.
        if not 0 < size <= limit:
            raise WireError(f"the support would unpack to {size} bytes, 1 to {limit} are possible")
        if frame[4] & _FRAME_EXTRAS:
            raise WireError("the zstandard frame has a dictionary, a checksum or reserved bits")
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"the support is not a zstandard frame: {error}") from error
    return np.frombuffer(content, np.uint8)
