"""The wire: exact bytes of tiny messages, round trips, entropy, lossy formats."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cluster.transport.wire import Shape, decode, dense_bytes, describe, encode, nonzero_bytes
from tests.cluster.transport.messages import HEADER, SMALL, flat, mask, ramp

SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4028235e38, -65519.0, 65504.0], np.float32)


def bits(array: np.ndarray) -> list[int]:
    return np.ascontiguousarray(array, np.float32).view(np.uint32).tolist()


def test_dense_message_is_header_and_every_float() -> None:
    data = encode(ramp(12), None, SMALL)
    assert len(data) == HEADER + 4 * 12
    assert data[HEADER:] == ramp(12).tobytes()
    message = decode(data, SMALL)
    assert message.support is None
    assert message.values.tolist() == ramp(12).tolist()
    assert encode(ramp(12), np.ones(8, bool), SMALL) == data


def test_bitmap_message_worked_by_hand() -> None:
    data = encode(ramp(12), mask("01000001"), SMALL)
    # Bits, first position first: 01000001 = 0x41. Values 2 and 8, then the rest 9 10 11 12.
    assert data[HEADER:] == b"\x41" + np.array([2, 8, 9, 10, 11, 12], np.float32).tobytes()
    assert describe(data) == {
        "layout": "bitmap",
        "value_format": "float32",
        "told": False,
        "kept": 2,
        "prunable": 8,
        "size": 12,
        "header_bytes": 44,
        "support_bytes": 1,
        "value_bytes": 24,
        "message_bytes": 69,
    }
    message = decode(data, SMALL)
    assert message.support.tolist() == mask("01000001").tolist()
    assert message.values.tolist() == [0, 2, 0, 0, 0, 0, 0, 8, 9, 10, 11, 12]


def test_relative_message_has_a_bit_for_each_held_position() -> None:
    shape = flat(24)
    support, held = mask("010000000000000000000001"), mask("011100000000000000000001")
    data = encode(ramp(24), support, shape, held=held)
    # Held 1 2 3 23; of them 1 and 23 stay: 1001 padded to 0x90. A bitmap would take 3 bytes.
    assert data[HEADER:] == b"\x90" + np.array([2, 24], np.float32).tobytes()
    assert describe(data)["layout"] == "relative"
    assert np.array_equal(decode(data, shape, held=held).support, support)
    # A support that leaves what is held cannot be written relative to it.
    assert describe(encode(ramp(24), ~held, shape, held=held))["layout"] == "bitmap"


def test_shared_message_is_values_alone() -> None:
    support = mask("01000001")
    data = encode(ramp(12), support, SMALL, held=support)
    assert data[HEADER:] == np.array([2, 8, 9, 10, 11, 12], np.float32).tobytes()
    assert np.array_equal(decode(data, SMALL, held=support).support, support)


def test_what_the_receiver_knows_does_not_travel() -> None:
    shape, support, known = flat(8), mask("10110000"), np.float32([1, -1] * 4)
    data = encode(np.where(support, known, np.float32(0)), support, shape, known=known)
    assert data[HEADER:] == b"\xb0"
    parts = describe(data)
    assert (parts["support_bytes"], parts["value_bytes"], parts["told"]) == (1, 0, True)
    assert bits(decode(data, shape, known=known).values) == bits([1, 0, 1, -1, 0, 0, 0, 0])
    # Whatever the format of values: there are none. Float buffers travel, and biases are known too.
    assert encode(known, support, shape, known=known, value_format="int8") == data
    assert encode(ramp(12), None, SMALL, known=ramp(10))[HEADER:] == np.float32([11, 12]).tobytes()


@pytest.mark.parametrize("other", [2.5, -0.0, np.nan])
def test_values_that_differ_in_one_bit_from_what_is_known_travel(other: float) -> None:
    values, known, support = ramp(12), ramp(10), mask("10110000")
    outside, within, bias = known.copy(), known.copy(), known.copy()
    outside[1], within[2], bias[9] = other, other, other
    assert describe(encode(values, support, SMALL, known=outside))["value_bytes"] == 4 * 2
    for differs in (within, bias):
        data = encode(values, support, SMALL, known=differs)
        assert describe(data)["value_bytes"] == 4 * (3 + 4)
        assert decode(data, SMALL, known=differs).values.tolist() == [1, 0, 3, 4, 0, 0, 0, 0, 9, 10, 11, 12]


def test_runs_message_worked_by_hand() -> None:
    # Positions 2, 3, 300 of 2000: cut runs of 2, 0 and 296 = 255 + 41.
    shape, support = flat(2000), np.zeros(2000, bool)
    support[[2, 3, 300]] = True
    data = encode(ramp(2000), support, shape)
    about = describe(data)
    assert about["layout"] == "runs"
    frame = data[HEADER : HEADER + about["support_bytes"]]
    assert zstandard.ZstdDecompressor().decompress(frame) == bytes([2, 0, 255, 41])
    assert np.array_equal(decode(data, shape).support, support)


@pytest.mark.parametrize("gap", [10_000, 100_000])
def test_planes_message_is_low_bytes_then_high_bytes(gap: int) -> None:
    # 100 runs of gap / 2 to gap cut positions: dozens of escapes each, or a few bytes.
    shape, support = flat(101 * gap), np.zeros(101 * gap, bool)
    lengths = np.random.default_rng(0).integers(gap // 2, gap, 100)
    support[np.cumsum(lengths + 1) - 1] = True
    data = encode(ramp(shape.size), support, shape)
    about = describe(data)
    assert about["layout"] == "planes"
    frame = data[HEADER : HEADER + about["support_bytes"]]
    width = 2 if lengths.max() < 65536 else 4
    planes = b"".join(bytes((lengths >> 8 * plane & 255).astype(np.uint8)) for plane in range(width))
    assert zstandard.ZstdDecompressor().decompress(frame) == planes
    assert np.array_equal(decode(data, shape).support, support)


@pytest.mark.parametrize("run", [0, 1, 254, 255, 256, 509, 510, 511, 65_535, 65_536])
@pytest.mark.parametrize("count", [1, 40])
def test_runs_at_the_edges_of_a_byte_and_of_a_plane(run: int, count: int) -> None:
    shape = flat(count * (run + 1) + 3000)
    support = np.zeros(shape.prunable, bool)
    support[np.arange(1, count + 1) * (run + 1) - 1] = True
    support[-1] = True
    message = decode(encode(ramp(shape.size), support, shape), shape)
    assert np.array_equal(message.support, support)
    assert np.array_equal(message.values, np.where(support, ramp(shape.size), 0))


def test_support_keeps_zeros_and_an_empty_one_costs_nothing() -> None:
    zeros = np.zeros(12, np.float32)
    assert decode(encode(zeros, mask("01000001"), SMALL), SMALL).support.sum() == 2
    data = encode(ramp(12), np.zeros(8, bool), SMALL)
    assert describe(data)["support_bytes"] == 0
    assert decode(data, SMALL).values.tolist() == [0] * 8 + [9, 10, 11, 12]


def test_accounting() -> None:
    values = ramp(12)
    values[[0, 3]] = 0.0
    assert dense_bytes(SMALL) == 48
    assert nonzero_bytes(values, SMALL) == 4 * (6 + 4)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a message of any layout and format, with raw float bits (NaN payloads, subnormals)."""
    prunable = draw(st.integers(0, 700))
    trained = prunable + draw(st.integers(0, 5))
    size = trained + draw(st.integers(0, 5))
    cuts = sorted(draw(st.lists(st.integers(0, trained), max_size=4)))
    edges = [0, *cuts, trained]
    shape = Shape(prunable, trained, size, tuple(itertools.pairwise(edges)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = generator.standard_normal(size).astype(np.float32)
    if draw(st.booleans()):
        values = generator.integers(0, 2**32, size, np.uint32).view(np.float32)
    special = generator.random(size) < draw(st.sampled_from([0.0, 0.1, 1.0]))
    values[special] = generator.choice(SPECIAL, special.sum())
    support = generator.random(prunable) < draw(st.sampled_from([0.0, 0.002, 0.05, 0.5, 0.99, 1.0]))
    held = {
        "none": None,
        "same": support.copy(),
        "superset": support | (generator.random(prunable) < 0.1),
        "other": generator.random(prunable) < 0.3,
    }[kind := draw(st.sampled_from(["none", "same", "superset", "other"]))]
    return {
        "values": values,
        "support": draw(st.sampled_from([support, None])) if kind == "none" else support,
        "shape": shape,
        "held": held,
        "value_format": draw(st.sampled_from(["float32", "float16", "bfloat16", "int8"])),
    }


@settings(max_examples=300, deadline=None)
@given(cases())
def test_round_trip(case: dict[str, Any]) -> None:
    values, support, shape = case["values"], case["support"], case["shape"]
    before = values.copy()
    data = encode(**case)
    assert encode(**case) == data
    assert bits(values) == bits(before)
    out = np.full(shape.size, 7, np.float32)
    message = decode(data, shape, held=case["held"], out=out)
    assert message.values is out
    kept = np.ones(shape.prunable, bool) if support is None else support
    if kept.all():
        assert message.support is None
    else:
        assert np.array_equal(message.support, kept)
    assert not any(bits(out[: shape.prunable][~kept]))  # +0.0, bit for bit
    assert bits(out[shape.trained :]) == bits(values[shape.trained :])
    sent = np.concatenate([kept, np.ones(shape.size - shape.prunable, bool)])
    if case["value_format"] == "float32":
        assert bits(out[sent]) == bits(values[sent])
    elif case["value_format"] == "int8":
        for start, stop in shape.layers:
            layer = slice(start, stop)
            original, decoded = values[layer][sent[layer]], out[layer][sent[layer]]
            if not np.isfinite(original).all():
                assert np.isnan(decoded).all()
            elif original.size:
                # Half a step; a scale is at least the smallest normal float32, and is itself rounded.
                scale = max(float(np.abs(original).max()) / 127, np.finfo(np.float32).tiny)
                assert np.abs(decoded.astype(float) - original).max() <= scale * 0.5001
    else:
        assert np.array_equal(np.isfinite(out[sent]), np.isfinite(values[sent]))
        assert np.array_equal(np.isnan(out[sent]), np.isnan(values[sent]))


def frame_bytes(*planes: bytes) -> int:
    """Size of one frame with a block for each plane, of no bytes at all when there is nothing to say."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, min_match=7)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=sum(map(len, planes)))
    size = 0
    for plane in planes[:-1]:
        size += len(stream.compress(plane)) + len(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return size + len(stream.compress(planes[-1])) + len(stream.flush()) if any(planes) else 0


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_chosen_layout_is_the_cheapest(case: dict[str, Any]) -> None:
    support, held = case["support"], case["held"]
    about = describe(encode(**case))
    if support is None or support.all() or (held is not None and np.array_equal(support, held)):
        assert about["support_bytes"] == 0
        return
    positions = np.flatnonzero(support).tolist()
    runs = [position - previous - 1 for previous, position in zip([-1, *positions], positions, strict=False)]
    escaped = b"".join(b"\xff" * (run // 255) + bytes([run % 255]) for run in runs)
    low, high = bytes(run & 255 for run in runs), bytes(run >> 8 for run in runs)
    sizes = {
        "bitmap": (support.size + 7) // 8,
        "runs": frame_bytes(escaped),
        "planes": frame_bytes(low, high),
    }
    if held is not None and not (support & ~held).any():
        sizes["relative"] = (int(held.sum()) + 7) // 8
    assert about["support_bytes"] == sizes[about["layout"]] == min(sizes.values())


@pytest.mark.parametrize("density", [0.001, 0.002, 0.004, 0.01, 0.03, 0.1])
def test_support_is_within_five_percent_of_its_entropy(density: float) -> None:
    prunable = 3_000_000
    support = np.random.default_rng(1).random(prunable) < density
    share = support.mean()
    entropy = -prunable * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    about = describe(encode(np.zeros(prunable, np.float32), support, flat(prunable)))
    assert about["support_bytes"] < 1.05 * entropy


def through(values: list[float], value_format: str) -> np.ndarray:
    """Decoded values of one layer."""
    array = np.array(values, np.float32)
    return decode(encode(array, None, flat(array.size), value_format=value_format), flat(array.size)).values


def test_int8_rounds_half_to_even_with_a_scale_for_each_layer() -> None:
    # Layer 0: scale 127/127 = 1, so 0.5 -> 0, 1.5 -> 2, 2.5 -> 2. Layer 1: 254/127 = 2; 3 is 1.5 steps -> 4.
    # The last layer's cut value 1000 is not sent and does not count for its scale of 12.7/127 = 0.1.
    shape = Shape(8, 10, 11, ((0, 4), (4, 6), (6, 10)))
    values = np.array([127, 0.5, 1.5, 2.5, -254, 3, 1000, 12.7, 0.26, 0, 0.123], np.float32)
    data = encode(values, mask("11111101"), shape, value_format="int8")
    assert len(data) == HEADER + 1 + 3 * 4 + 9 + 4  # bitmap, three scales, 9 trained values, one buffer
    decoded = decode(data, shape).values
    expected = [127, 0, 2, 2, -254, 4, 0, 12.7, 0.3, 0, np.float32(0.123)]
    assert decoded == pytest.approx(expected, rel=1e-6)
    assert decoded[-1] == values[-1]


def test_half_precision_formats_round_to_nearest_even_and_saturate() -> None:
    # float16 has 11 significant bits: 2049 lies between 2048 and 2050, 2051 between 2050 and 2052.
    assert through([2049, 2051, 70000, -1e30, -0.0], "float16").tolist() == [2048, 2052, 65504, -65504, 0]
    # bfloat16 has 8: 257 lies between 256 and 258, 259 between 258 and 260.
    assert through([257, 259, 1.0], "bfloat16").tolist() == [256, 260, 1]
    largest = np.finfo(np.float32).max
    assert np.isfinite(through([largest, -largest], "bfloat16")).all()
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    for value_format, error in (("float16", 2**-11), ("bfloat16", 2**-8)):
        decoded = through(values.tolist(), value_format)
        assert (np.abs(decoded - values) <= error * np.abs(values) + 2**-25).all()


@pytest.mark.parametrize("value_format", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_stays_visible(value_format: str, poison: float) -> None:
    assert not np.isfinite(through([1.0, poison, 2.0], value_format)[1])


@given(hnp.arrays(np.uint32, 8))
def test_finite_values_stay_finite(raw: np.ndarray) -> None:
    values = raw.view(np.float32)
    values[~np.isfinite(values)] = np.finfo(np.float32).max
    for value_format in ("float16", "bfloat16", "int8"):
        assert np.isfinite(through(values.tolist(), value_format)).all()
