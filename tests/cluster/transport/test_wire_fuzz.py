"""A short run of the fuzzer, and that it would find what it is there for."""

import struct

import numpy as np
import pytest
import zstandard

from cluster.transport import wire
from cluster.transport.wire import WireError, decode, encode
from tests import fuzz_wire
from tests.cluster.transport.messages import SMALL, flat, mask, ramp


def test_hostile_messages_are_refused_or_mean_what_they_say():
    counts = fuzz_wire.fuzz(seed=20261127, messages=6000)
    assert sum(counts.values()) == 6000
    assert min(counts[kind] for kind in ("refused", "not folded", "folded")) > 100


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        (
            "wire.unpack_bits",
            lambda packed, count: np.unpackbits(np.frombuffer(packed, np.uint8), count=count) > 0,
        ),
        (
            "wire.decompress",
            lambda frame, limit: np.frombuffer(zstandard.decompress(frame or _EMPTY), np.uint8),
        ),
        ("wire_runs._FRAME_EXTRAS", 0),
    ],
)
def test_the_fuzzer_finds_a_reader_that_is_not_strict(monkeypatch, name, broken):
    monkeypatch.setattr(f"cluster.transport.{name}", broken)
    with pytest.raises(fuzz_wire.Violation):
        fuzz_wire.fuzz(seed=1, messages=6000)


_EMPTY = zstandard.compress(b"")


# --- each kind, written down


SHAPE = flat(2000)
SUPPORT = np.isin(np.arange(2000), [2, 3, 300])  # runs 2, 0 and 296 = 255 + 41
MESSAGE = encode(ramp(2000), SUPPORT, SHAPE)
VALUES = MESSAGE[-12:]


def with_frame(frame, head=MESSAGE[:44], values=VALUES):
    return fuzz_wire.seal(head, frame, values)


def compressed(content, **options):
    return zstandard.ZstdCompressor(level=1, **options).compress(content)


RUNS = bytes([2, 0, 255, 41])
DICTIONARY = zstandard.ZstdCompressionDict(bytes(range(64)), dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def test_the_frame_by_itself_is_taken():
    assert np.array_equal(decode(with_frame(compressed(RUNS)), SHAPE).support, SUPPORT)


@pytest.mark.parametrize(
    ("frame", "why"),
    {
        "announces 0 bytes, with garbage behind": (compressed(b"") + b"garbage", "0 bytes"),
        "announces 0 bytes": (compressed(b""), "0 bytes"),
        "announces nothing": (compressed(RUNS, write_content_size=False), "-1 bytes"),
        "skippable, with a frame behind": (b"\x50\x2a\x4d\x18\x01\0\0\0x" + compressed(RUNS), "0 bytes"),
        "with a frame behind": (compressed(RUNS) + compressed(b"\1"), "not a zstandard frame"),
        "with a byte behind": (compressed(RUNS) + b"\0", "not a zstandard frame"),
        "in two frames": (compressed(RUNS[:2]) + compressed(RUNS[2:]), "not a zstandard frame"),
        "with a checksum": (compressed(RUNS, write_checksum=True), "a checksum"),
        "with a dictionary id of 0": (b"\x28\xb5\x2f\xfd\x21\0" + compressed(RUNS)[5:], "a dictionary"),
        "with the unused bit set": (b"\x28\xb5\x2f\xfd\x30" + compressed(RUNS)[5:], "reserved bits"),
        "announces more than can be": (
            b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8 + b"\1\0\0",
            "would unpack to|not a",
        ),
        "with an unended run behind": (compressed(RUNS + b"\xff"), "does not end"),
    }.values(),
)
def test_another_frame_for_the_same_runs_is_refused(frame, why):
    with pytest.raises(WireError, match=why):
        decode(with_frame(frame), SHAPE)


def test_run_lengths_in_wider_planes_than_they_need_are_refused():
    far, gap = flat(70_000), 400
    support = np.zeros(70_000, bool)
    support[np.arange(1, 101) * gap - 1] = True
    data = encode(ramp(70_000), support, far)
    head = bytearray(data[:44])
    values = data[-400:]
    for layout, width, good in (("planes", 2, True), ("planes", 4, False)):
        head[5] = wire._LAYOUTS.index(layout)
        planes = np.full(100, gap - 1, f"<u{width}").view(np.uint8).reshape(100, width).T.tobytes()
        forged = fuzz_wire.seal(head, compressed(planes), values)
        if good:
            assert np.array_equal(decode(forged, far).support, support)
        else:
            with pytest.raises(WireError, match="4 planes of run lengths, the longest of which is 399"):
                decode(forged, far)


def forged(data, place, code, value):
    changed = bytearray(data)
    struct.pack_into(code, changed, place, value)
    return fuzz_wire.checked(bytes(changed))


@pytest.mark.parametrize(
    ("place", "code", "value", "why"),
    [
        (7, "B", 2, "unknown layout"),
        (7, "B", 1, "knows of none"),
        (12, "<I", 9, "9 of them prunable"),
        (16, "<I", 13, "for 13 floats"),
        (24, "<I", 5, "leans on no support"),
        (44, "B", 0b01000001, "behind the 6"),
    ],
)
def test_what_a_message_does_not_need_is_refused(place, code, value, why):
    shape = wire.Shape(6, 8, 10, ((0, 6), (6, 8)))
    data = encode(ramp(10), mask("010001"), shape)
    decode(data, shape)
    with pytest.raises(WireError, match=why):
        decode(forged(data, place, code, value), shape)


def test_a_support_that_keeps_everything_is_dense():
    data = encode(ramp(12), None, SMALL)
    bitmap = bytearray(data[:44])
    bitmap[5] = wire._LAYOUTS.index("bitmap")
    with pytest.raises(WireError, match="bitmap keeps 8 of 8"):
        decode(fuzz_wire.seal(bitmap, b"\xff", data[44:]), SMALL)


@pytest.mark.parametrize(
    ("place", "value"), [(0, b"\0\0\0\0"), (0, b"\0\0\x80\x7f"), (4, b"\0\0\x80?"), (-17, b"\x80")]
)
def test_scales_and_steps_that_no_sender_writes_are_refused(place, value):
    # Scales of three layers, of which the second sends nothing; steps of two weights and two biases; buffers.
    shape = wire.Shape(8, 10, 12, ((0, 4), (4, 8), (8, 10)))
    data = encode(ramp(12), mask("11000000"), shape, value_format="int8")
    content = bytearray(data[45:])
    assert len(content) == 12 + 4 + 8
    place = place if place >= 0 else 12
    content[place : place + len(value)] = value
    with pytest.raises(WireError, match="no sender writes"):
        decode(fuzz_wire.seal(data[:44], data[44:45], bytes(content)), shape)
