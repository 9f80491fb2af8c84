"""The wire refuses: damaged, cut, forged and foreign messages, and its callers' wrong arguments."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.transport.wire import Shape, WireError, decode, describe, encode
from tests.cluster.transport.messages import HEADER, SMALL, flat, mask, ramp


def sealed(data: bytes) -> bytes:
    """The message with the checksum that its bytes should have."""
    checksum = xxhash.xxh3_64_digest(data[: HEADER - 4] + data[HEADER:])[-4:]
    return data[: HEADER - 4] + checksum[::-1] + data[HEADER:]


def small_messages() -> list[tuple[bytes, Shape, dict[str, np.ndarray]]]:
    shape, support = flat(600), np.zeros(600, bool)
    support[[5, 299]] = True
    held = mask("01100001")
    far, distant = flat(40_000), np.zeros(40_000, bool)
    distant[np.random.default_rng(0).integers(0, 40_000, 10)] = True
    known = ramp(10)
    messages: list[tuple[bytes, Shape, dict[str, np.ndarray]]] = [
        (encode(ramp(12), None, SMALL), SMALL, {}),
        (encode(ramp(12), mask("01000001"), SMALL, value_format="int8"), SMALL, {}),
        (encode(ramp(12), mask("01000001"), SMALL, held=held), SMALL, {"held": held}),
        (encode(ramp(12), held, SMALL, held=held, value_format="float16"), SMALL, {"held": held}),
        (encode(ramp(600), support, shape), shape, {}),
        (encode(ramp(40_000), distant, far, value_format="int8"), far, {}),
        (encode(ramp(12), held, SMALL, held=held, known=known), SMALL, {"held": held, "known": known}),
        (encode(ramp(600), support, shape, known=ramp(600)), shape, {"known": ramp(600)}),
    ]
    layouts = [describe(data)["layout"] for data, _, _ in messages]
    assert layouts == ["dense", "bitmap", "relative", "shared", "runs", "planes", "shared", "runs"]
    return messages


@pytest.mark.parametrize("index", range(8))
def test_every_flipped_byte_truncation_and_trailing_byte_is_refused(index: int) -> None:
    data, shape, has = small_messages()[index]
    decode(data, shape, **has)
    out = np.full(shape.size, 7, np.float32)
    for place in range(len(data)):
        for flip in (1, 128, 255):
            broken = bytearray(data)
            broken[place] ^= flip
            with pytest.raises(WireError):
                decode(bytes(broken), shape, **has, out=out)
        with pytest.raises(WireError):
            decode(data[:place], shape, **has, out=out)
        with pytest.raises(WireError):
            describe(data[:place])
    with pytest.raises(WireError):
        decode(data + b"\0", shape, **has, out=out)
    assert (out == 7).all()  # a refused message leaves the receiver's array as it was


@settings(max_examples=400, deadline=None)
@given(index=st.integers(0, 5), data=st.data())
def test_forged_messages_with_a_right_checksum_raise_nothing_else(index: int, data: st.DataObject) -> None:
    message, shape, has = small_messages()[index]
    forged = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        forged[data.draw(st.integers(4, min(len(forged), HEADER + 40) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(sealed(bytes(forged)), shape, **has)
    except WireError:
        return
    assert decoded.values.shape == (shape.size,)


def test_a_frame_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked() -> None:
    data, shape, _ = small_messages()[4]
    about = describe(data)
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(50_000_000))
    forged = bytearray(data[:HEADER] + bomb + data[HEADER + about["support_bytes"] :])
    forged[28:32] = len(bomb).to_bytes(4, "little")
    forged[32:40] = len(forged).to_bytes(8, "little")
    with pytest.raises(WireError, match="would unpack to 50000000 bytes"):
        decode(sealed(bytes(forged)), shape)


def test_a_forged_run_that_leaves_the_prunable_span_is_refused() -> None:
    # Two runs of 200 cut positions end at 401; the same frame in a vector of 400 would write past its span.
    support = np.zeros(402, bool)
    support[[200, 401]] = True
    data = encode(ramp(402), support, flat(402))
    assert describe(data)["layout"] == "runs"
    short = flat(400)
    forged = data[:12] + np.array([400, 400, short.checksum], "<u4").tobytes() + data[24:]
    with pytest.raises(WireError, match="does not have 2 positions below 400"):
        decode(sealed(forged), short)


def test_refusals_say_why() -> None:
    dense = encode(ramp(12), None, SMALL)
    with pytest.raises(WireError, match="header announces 92 bytes, 91 are here"):
        decode(dense[:-1], SMALL)
    with pytest.raises(WireError, match="not a message"):
        decode(b"x" * 60, SMALL)
    with pytest.raises(WireError, match="for 12 floats, 8 of them prunable; this receiver has 13 and 8"):
        decode(dense, Shape(8, 10, 13, SMALL.layers))
    with pytest.raises(WireError, match="splits them differently"):
        decode(dense, Shape(8, 10, 12, ((0, 5), (5, 8), (8, 10))))
    held = mask("01100001")
    for support in (mask("01000001"), held):
        data = encode(ramp(12), support, SMALL, held=held)
        with pytest.raises(WireError, match="does not hold"):
            decode(data, SMALL)
        with pytest.raises(WireError, match="another support"):
            decode(data, SMALL, held=mask("11000001"))


def test_wrong_arguments_are_the_callers_error() -> None:
    support = mask("01000001")
    for arguments in (
        {"value_format": "float8"},
        {"held": np.ones(9, bool)},
    ):
        with pytest.raises(ValueError, match="must be"):
            encode(ramp(12), support, SMALL, **arguments)
    with pytest.raises(ValueError, match=r"values must be contiguous float32\[12\], found float64\[12\]"):
        encode(np.zeros(12), support, SMALL)
    with pytest.raises(ValueError, match="out must be"):
        decode(encode(ramp(12), None, SMALL), SMALL, out=np.zeros(11, np.float32))
    with pytest.raises(ValueError, match="layers must cover"):
        Shape(8, 10, 12, ((0, 4), (5, 10)))


def test_a_message_without_values_needs_the_values_that_it_leans_on() -> None:
    known, support = ramp(10), mask("10110000")
    data = encode(ramp(12), support, SMALL, known=known)
    with pytest.raises(WireError, match="has no values, and this receiver knows of none"):
        decode(data, SMALL)
    for place in (1, 2, 9):  # outside the support, within it, a bias
        other = known.copy()
        other[place] += 1
        with pytest.raises(WireError, match="leans on another support or other values"):
            decode(data, SMALL, known=other)
    with pytest.raises(ValueError, match=r"known must be contiguous float32\[10\]"):
        decode(data, SMALL, known=ramp(12))
