"""The simulated clock against schedules worked by hand: ties and durations of zero included."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.simulation.clock import Clock, Device, first_arrivals

PHONE = Device(compute=1000.0, downlink=800.0, uplink=80.0, latency=0.5)


def test_a_visit_is_download_training_upload_and_latency():
    # 100 bytes at 800 bit/s 1 s, 3000 FLOP at 1000 FLOP/s 3 s, 20 bytes at 80 bit/s 2 s, and .5 s.
    assert PHONE.duration(100, 3000.0, 20) == 6.5
    assert PHONE.duration(0, 0.0, 0) == 0.5
    assert Device(1.0, 1.0, 1.0, 0.0).duration(0, 0.0, 0) == 0.0


def test_the_energy_of_a_visit_by_hand():
    # 100 bytes at 0.25 J, 3,000 FLOPs at 0.125 J and 20 bytes at 2 J: 25 + 375 + 40.
    device = replace(PHONE, flop_energy=0.125, downlink_energy=0.25, uplink_energy=2.0)
    assert device.energy(100, 3000.0, 20) == 440.0
    assert device.energy(100, 0.0, 0) == 25.0  # of one that downloads and drops out
    assert device.duration(100, 3000.0, 20) == PHONE.duration(100, 3000.0, 20)


@given(st.integers(0, 10**9), st.floats(0, 1e15), st.integers(0, 10**9), st.floats(0, 1e12))
def test_what_is_known_before_training_never_exceeds_the_visit(down, flops, up, extra):
    assert PHONE.duration(down, flops, 0) <= PHONE.duration(down, flops + extra, up)


def test_events_come_by_time_then_sequence():
    clock = Clock()
    for time, sequence, name in ((2.0, 1, "c"), (1.0, 5, "b"), (1.0, 3, "a"), (2.0, 0, "late but first")):
        clock.schedule(time, sequence, name)
    assert (clock.now, clock.next_event(), len(clock)) == (0.0, (1.0, 3), 4)
    assert [(clock.advance(), clock.now) for _ in range(3)] == [
        ("a", 1.0),
        ("b", 1.0),
        ("late but first", 2.0),
    ]
    clock.schedule(2.0, 2, "of no duration")  # at the very time that is now: after c, whose number is lower
    assert [clock.advance() for _ in range(2)] == ["c", "of no duration"]
    assert clock.next_event() == (math.inf, 0)


def test_time_does_not_run_backwards():
    clock = Clock(3.0)
    with pytest.raises(ValueError, match=r"an event at 2\.0 s lies before now, 3\.0 s"):
        clock.schedule(2.0, 0, "too late")


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0]), st.integers(0, 99)), unique_by=lambda e: e[1]))
def test_the_order_does_not_depend_on_who_was_scheduled_first(events):
    orders = []
    for given_in in (events, events[::-1]):
        clock = Clock()
        for time, sequence in given_in:
            clock.schedule(time, sequence, object())
        orders.append([])
        while len(clock):
            orders[-1].append(clock.next_event())
            clock.advance()
    assert orders[0] == orders[1] == sorted(events)


def test_first_arrivals():
    arrivals = [(4.0, 7), (1.0, 9), (4.0, 2), (6.0, 1)]
    assert first_arrivals(arrivals, 2, math.inf) == [9, 2]  # the tie at 4 s goes to the lower number
    assert first_arrivals(arrivals, 9, 4.0) == [9, 2, 7]  # the deadline itself is in time
    assert first_arrivals(arrivals, 9, 0.5) == []
    assert first_arrivals([], 3, math.inf) == []
