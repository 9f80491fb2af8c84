"""What goes up beside the values: positions that are named, and floats only where there are any."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import Carried, Entry, Grid, ParameterLayout, Total
from cluster.transport import wire
from cluster.transport.uplink import Uplink

PLAIN = ParameterLayout((Entry("w", (40,), 0, 40),), (Entry("b", (3,), 40, 43),), ())
CARRYING = PLAIN.carrying({"both": Carried(2), "up": Carried(5, "up"), "down": Carried(4, "down")})


def uplink(layout=PLAIN):
    return Uplink(layout, "float32", differences=False, max_update_norm=None)


def masks():
    return st.lists(st.booleans(), min_size=40, max_size=40).map(lambda bits: np.array(bits, np.bool_))


@given(st.none() | masks(), masks(), st.none() | masks())
@settings(max_examples=100, deadline=None)
def test_what_is_named_arrives_beside_the_update(held, marks, support):
    values = np.linspace(1, 2, 43, dtype=np.float32)
    if support is not None:
        values[:40][~support] = 0.0
    both = uplink()
    posted = both.encode(values, support, held, None, marks)
    alone = both.encode(values, support, held)
    assert posted.message[: len(alone.message)] == alone.message
    assert (posted.density, posted.nonzero_bytes) == (alone.density, alone.nonzero_bytes)
    received = both.decode(posted.message, held)
    assert received.values.tobytes() == values.tobytes()
    assert np.array_equal(received.marks, marks)
    assert both.decode(alone.message, held).marks is None


def test_named_positions_outside_a_shared_mask_take_a_bit_each():
    held = np.arange(40) < 8
    values = np.where(np.arange(43) < 8, np.float32(1), np.float32(0))
    both = uplink()
    alone = len(both.encode(values, held, held).message)
    marks = np.zeros(40, np.bool_)
    marks[[9, 12, 33]] = True
    header = wire.describe(both.encode(values, held, held).message)["header_bytes"]
    # Three runs of absent weights are a frame of more bytes than the bits of 32 of them.
    assert len(both.encode(values, held, held, None, marks).message) - alone == header + 4


def test_a_damaged_or_second_second_message_is_refused():
    values, marks = np.ones(43, np.float32), np.arange(40) % 3 == 0
    message = uplink().encode(values, None, None, None, marks).message
    for wrong in (message[:-1], message + b"x", message + message, message[:-1] + bytes([message[-1] ^ 1])):
        with pytest.raises(wire.WireError):
            uplink().decode(wrong, None)
    held = np.arange(40) < 8
    named = uplink().encode(values, None, held, None, ~held).message
    with pytest.raises(wire.WireError):  # named against another mask than the receiver holds
        uplink().decode(named, np.arange(40) < 9)


def test_totals_add_up_the_samples_of_who_named_a_position():
    totals = [Total.zero(Grid(2.0**20, 6), PLAIN, marks=True) for _ in range(2)]
    values = np.ones(43, np.float32)
    both = uplink()
    for client, samples, named in ((0, 1, [3, 5]), (1, 2, [5]), (2, 3, [])):
        marks = np.isin(np.arange(40), named)
        message = both.encode(values, None, None, None, marks).message
        assert both.take(totals[client % 2], client, message, samples, None, None) is None
    merged = totals[0].merge(totals[1])
    assert {int(j): int(merged.marked[j]) for j in np.flatnonzero(merged.marked)} == {3: 1, 5: 3}
    plain = Total.zero(Grid(2.0**20, 6), PLAIN)
    both.take(plain, 0, both.encode(values, None, None, None, values[:40] > 0).message, 1, None, None)
    assert plain.marked is None


def test_floats_that_go_up_alone_travel_where_there_are_any():
    both = uplink(CARRYING)
    values = np.ones(54, np.float32)  # 43 + 2 + 5 + 4
    values[45:50] = 0.0
    lean = both.encode(values, None, None).message
    received = both.decode(lean, None).values
    assert received.tolist() == [1.0] * 45 + [0.0] * 5
    values[47] = -1e-30
    full = both.encode(values, None, None).message
    assert len(full) - len(lean) == 4 * 5
    assert both.decode(full, None).values[45:].tolist() == [0.0, 0.0, np.float32(-1e-30), 0.0, 0.0]
    assert both.decode(lean, None).values[45:].tolist() == [0.0] * 5  # nothing of the last one stays
