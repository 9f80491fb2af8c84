"""Words on the wire: their bytes, their bits modulo 2**k, and messages of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import Carried, Entry, Grid, ParameterLayout, Total
from cluster.transport import wire
from cluster.transport.uplink import Sending, Uplink, Withheld
from cluster.transport.words import GridError, check_cohort, pack, unpack
from tests.cluster.transport.messages import HEADER, SMALL, mask

PLAIN = ParameterLayout((Entry("w", (40,), 0, 40),), (Entry("b", (3,), 40, 43),), ())


def test_bytes_by_hand():
    words = np.array([1, -1, 258, -(2**31)])
    assert pack(words, 32) == bytes([1, 0, 0, 0, *[255] * 4, 2, 1, 0, 0, 0, 0, 0, 128])
    assert pack(np.array([-2]), 48) == bytes([254, *[255] * 5])
    assert pack(np.array([2**40 + 5]), 64) == bytes([5, 0, 0, 0, 0, 1, 0, 0])
    assert unpack(pack(words, 32), 32, 4).tolist() == words.tolist()
    # Modulo 2**k, whoever wrote them.
    assert unpack(pack(np.array([2**48 + 7, 2**47], np.uint64), 48), 48, 2).tolist() == [7, -(2**47)]
    assert pack(np.empty(0, np.int64), 48) == b""
    with pytest.raises(wire.WireError, match="11 bytes of words where 12 are expected"):
        unpack(bytes(11), 48, 2)


@given(st.sampled_from([64, 48, 32]), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9))
@settings(max_examples=60, deadline=None)
def test_words_come_back(bits, numbers):
    words = np.array(numbers, np.int64) << (bits - 32)
    assert unpack(pack(words, bits), bits, len(numbers)).tolist() == words.tolist()


@pytest.mark.parametrize("bits", [64, 48, 32])
def test_messages_hold_the_kept_words_and_the_rest(bits):
    words, width = np.arange(1, 13) * -3, bits // 8
    for support, held, kept, where in (
        (None, None, 8, 0),
        (mask("10110000"), None, 3, 1),
        (mask("10110000"), mask("10110000"), 3, 0),
        (mask("10100000"), mask("10110000"), 2, 1),
    ):
        message = wire.encode(words, support, SMALL, held=held, bits=bits)
        assert len(message) == HEADER + where + width * (kept + 4)
        assert wire.describe(message)["value_format"] == f"word{bits}"
        received = wire.decode(message, SMALL, held=held, bits=bits)
        expected = words if support is None else np.where(np.append(support, [True] * 4), words, 0)
        assert received.values.tolist() == expected.tolist()
        assert received.values.dtype == np.int64
    for wrong in (message[:-1], message + b"x", message[:-1] + bytes([message[-1] ^ 1])):
        with pytest.raises(wire.WireError):
            wire.decode(wrong, SMALL, held=held, bits=bits)
    for other in {64, 48, 32, None} - {bits}:
        with pytest.raises(wire.WireError, match=f"word{bits}"):
            wire.decode(message, SMALL, held=held, bits=other)
    with pytest.raises(wire.WireError, match="float32"):
        wire.decode(wire.encode(words.astype(np.float32), None, SMALL), SMALL, bits=bits)


def uplink(bits, limit=None, layout=PLAIN, differences=False):
    return Uplink(layout, "float32", differences=differences, max_update_norm=limit, bits=bits)


def test_an_update_crosses_as_words_and_what_is_clamped_is_counted():
    grid, values = Grid(16.0, 10, 48), np.linspace(-20, 20, 43, dtype=np.float32)
    support = np.arange(40) % 2 == 0
    values[:40][~support] = 0.0
    both, total = uplink(48), Total.zero(grid, PLAIN)
    posted = both.encode(values, support, None, sending=Sending(3, 7, grid))
    assert posted.clamped == np.count_nonzero(np.abs(values) > 16)
    assert both.take(total, 3, posted.message, 7, None, None) is None
    plain = Total.zero(grid, PLAIN)
    plain.fold(3, grid.words(values, 7)[0], support, 7, PLAIN)
    assert total.mean().tobytes() == plain.mean().tobytes()
    assert total.votes.tolist() == support.astype(int).tolist()
    values[2] = np.nan
    with pytest.raises(Withheld, match=r"^its update cannot be averaged: a value is not finite$"):
        both.encode(values, support, None, sending=Sending(3, 7, grid))


def test_the_distance_of_words_is_that_of_their_values():
    grid, base = Grid(16.0, 10, 64), np.ones(43, np.float32)
    values = base.copy()
    values[0] += 3.0
    for limit, refused in ((2.9, True), (3.1, False)):
        both = uplink(64, limit)
        message = both.encode(values, None, None, sending=Sending(0, 5, grid)).message
        reason = both.take(Total.zero(grid, PLAIN), 0, message, 5, base, None)
        assert (reason is not None) == refused
    both = uplink(64, 2.9, differences=True)
    message = both.encode(values - base, None, None, sending=Sending(0, 5, grid)).message
    assert "3 away" in both.take(Total.zero(grid, PLAIN), 0, message, 5, base, None)


def test_what_goes_up_alone_stays_away_while_its_words_are_zero():
    layout = PLAIN.carrying({"up": Carried(5, "up")})
    grid, values = Grid(16.0, 10, 32), np.zeros(48, np.float32)
    both, sending = uplink(32, layout=layout), Sending(0, 1, Grid(16.0, 10, 32))
    lean = both.encode(values, None, None, sending=sending).message
    values[44] = 1.0
    whole = both.encode(values, None, None, sending=sending).message
    assert len(whole) - len(lean) == 5 * 4
    assert both.decode(whole, None).values[44] == grid.words(np.ones(1, np.float32), 1)[0][0]
    assert not both.decode(lean, None).values.any()


def test_a_cohort_too_heavy_for_its_words_is_refused_with_both_numbers():
    sizes = np.array([2**26, 10, 2**26, 2**26])
    check_cohort(32, sizes, 1)
    check_cohort(48, sizes, 3)
    check_cohort(None, sizes * 2**20, 4)
    with pytest.raises(GridError) as error:
        check_cohort(32, sizes, 2)
    assert str(error.value) == (
        "wire.grid: 32 bits hold sums over at most 134,217,727 samples, and the largest cohort of 2 "
        "clients has 134,217,728; set wire.grid=64 or exact, or aggregation.weighting=equal"
    )
