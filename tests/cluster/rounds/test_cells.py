"""Cells whose uplink clients share, by hand and against a fluid one; bounds while figures move by round."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster
from cluster.configuration.trees import ConfigError
from cluster.rounds.engine import InlineEngine
from cluster.rounds.schedule import Schedule
from cluster.rounds.secure import SecureRound
from cluster.simulation.clock import Device
from cluster.simulation.devices import Devices
from tests.cluster.rounds.test_buffered import PHONES, SYNCHRONOUS
from tests.cluster.rounds.test_schedule import INSTANT, recorded
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


def quickstart(*overrides):
    return cluster.resolve("quickstart", list(overrides))


# ---------------------------------------------------------------------------------------------- the split


def test_a_client_is_in_one_cell_for_good():
    everyone = np.arange(4000)
    towns = Devices(quickstart("partition.clients=4000", "devices.cells=4", "devices.cell_uplink=1e6"))
    cells = towns.cells(everyone)
    assert np.array_equal(towns.cells(everyone[[70, 3]]), cells[[70, 3]])
    # 1,000 each, give or take 27; four deviations.
    assert np.abs(np.bincount(cells, minlength=4) - 1000).max() < 110
    assert len(np.bincount(cells)) == 4


def test_a_cells_uplink_is_divided_among_those_who_upload(monkeypatch):
    monkeypatch.setattr(
        Devices, "cells", lambda self, clients: np.array([0, 0, 0, 1, 1, 7])[clients.astype(int)]
    )
    devices = [
        Device(1.0 + client, 5.0, uplink, 0.5) for client, uplink in enumerate([900, 100, 900, 900, 200, 250])
    ]
    shared = Devices(quickstart("devices.cells=8", "devices.cell_uplink=600"))

    def uplinks(*clients):
        found = shared.uploading(np.array(clients), [devices[client] for client in clients])
        kept = [(device.compute, device.downlink, device.latency) for device in found]
        assert kept == [(1.0 + client, 5.0, 0.5) for client in clients]
        return [device.uplink for device in found]

    # Of 600 bit/s three get 200, but who has 100 of its own; two get 300; one all that it has.
    assert uplinks(0, 1, 2, 3, 4, 5) == [200, 100, 200, 300, 200, 250]
    assert uplinks(0, 2, 3) == [300, 300, 600]
    assert uplinks(1) == [100]
    assert uplinks() == []
    alone = Devices(quickstart())
    assert alone.uploading(np.arange(6), devices) == devices


def fluid(starts, sizes, own, capacity):
    """When each upload ends under processor sharing: at every moment those that send divide the capacity.

    Nobody gets more than its own rate; what it leaves is divided among the others (max-min fairness).
    """
    left, now, ends = [8.0 * size for size in sizes], min(starts), [math.inf] * len(sizes)
    while any(end == math.inf for end in ends):
        active = [i for i, end in enumerate(ends) if end == math.inf and starts[i] <= now]
        rates, rest = {}, capacity
        for place, i in enumerate(sorted(active, key=lambda i: own[i])):
            rates[i] = min(own[i], rest / (len(active) - place))
            rest -= rates[i]
        arriving = [start for start in starts if start > now]
        until = min([now + left[i] / rates[i] for i in active] + arriving)
        for i in active:
            left[i] -= rates[i] * (until - now)
            if left[i] <= 1e-9 * 8 * sizes[i]:
                ends[i] = until
        now = until
    return ends


UPLOADS = st.lists(
    st.tuples(st.floats(0, 20), st.integers(10, 1000), st.floats(50, 500)), min_size=1, max_size=6
)


@settings(deadline=None)
@given(UPLOADS)
def test_no_upload_takes_longer_than_the_equal_split_says(uploads):
    starts, sizes, own = (list(column) for column in zip(*uploads, strict=True))
    shared = Devices(quickstart("devices.cells=1", "devices.cell_uplink=400"))
    devices = [Device(1.0, 1.0, uplink, start) for start, uplink in zip(starts, own, strict=True)]
    split = shared.uploading(np.arange(len(own)), devices)
    for end, size, device in zip(fluid(starts, sizes, own, 400.0), sizes, split, strict=True):
        assert end <= device.duration(0, 0.0, size) * (1 + 1e-9)


def test_it_is_exact_where_clients_are_alike():
    shared = Devices(quickstart("devices.cells=1", "devices.cell_uplink=400"))
    split = shared.uploading(np.arange(3), [Device(1.0, 1.0, 500.0, 2.0)] * 3)
    # Three times 1,000 bytes through 400 bit/s: a minute, from second 2 on.
    assert [device.duration(0, 0.0, 1000) for device in split] == pytest.approx([62.0] * 3)
    assert fluid([2.0] * 3, [1000] * 3, [500.0] * 3, 400.0) == pytest.approx([62.0] * 3)


# --------------------------------------------------------------------------------------------- the rounds


def in_cells(**tier):
    """Six devices in two cells of 2,000 bit/s, with uplinks that never matter and a second of latency."""
    return {
        "cells": 2,
        "cell_uplink": 2000,
        "tiers": {"a": {"share": 1.0, "latency": 1.0, **INSTANT, **tier}},
    }


def test_who_drops_out_takes_no_share_of_a_round(cache, tmp_path):
    config = tiny_federation(cache, cohort=6, rounds=4, devices=in_cells(dropout=0.3))
    cells = Devices(config).cells(np.arange(6))
    assert set(cells) == {0, 1}
    _, lines, calls = recorded(config, tmp_path / "run")
    for _, reports in calls:
        among = np.bincount([cells[report.client] for report in reports], minlength=2)
        for report in reports:
            rate = 2000 / among[cells[report.client]]
            assert report.visit_s == pytest.approx(8 * report.uplink_bytes / rate + 1.0, rel=1e-12)
    assert sum(line["clients/dropped"] for line in lines) > 0


def test_keys_and_shares_of_a_secure_round_go_through_the_cell_too(cache, tmp_path, monkeypatch):
    # Before anybody is known to be gone all upload: 96 bytes of keys, then what they deal to the five others.
    devices, seen = in_cells(dropout=0.3), []
    config = tiny_federation(
        cache, cohort=6, rounds=3, devices=devices, privacy={"secure": {"masks": "billed", "threshold": 0.5}}
    )
    make = SecureRound.of

    def watching(*given):
        seen.append(make(*given))
        return seen[-1]

    monkeypatch.setattr(SecureRound, "of", watching)
    _, lines, calls = recorded(config, tmp_path / "run")
    rate = 2000 / np.bincount(Devices(config).cells(np.arange(6))).max()
    setup = 8 * 3 * 32 / rate + 1.0 + 8 * 5 * (2 * 33 + 16) / rate + 1.0
    assert [one.setup_s for one in seen] == pytest.approx([setup] * 3)
    assert [task.waits_s for tasks, _ in calls for task in tasks] == [
        one.setup_s for one, (tasks, _) in zip(seen, calls, strict=True) for _ in tasks
    ]
    assert sum(line["clients/dropped"] for line in lines) > 0


def test_bounds_hold_under_cells_and_jitter(cache, tmp_path, monkeypatch):
    """Who is folded where it is played, as surely in time, is in time when the driver decides by itself."""
    tree = {**PHONES, "cohort": 4, "rounds": 6, **SYNCHRONOUS}
    tree["schedule"] = {"over_selection": 2.0, "deadline": 1.0}
    _, lines, calls = recorded(tiny_federation(cache, **tree), tmp_path / "run")
    reports = [report for _, reports in calls for report in reports]
    assert any(report.folded for report in reports)
    assert any(report.message is not None for report in reports)
    for key in ("clients/late", "clients/stragglers", "clients/dropped"):
        assert sum(line[key] for line in lines) > 0, key
    # Now the driver is told nothing beforehand.
    assignments = Schedule.assignments

    def unbound(self, *given):
        visits, bounds = assignments(self, *given)
        return visits, np.where(bounds <= 1.0, 0.0, bounds)

    monkeypatch.setattr(Schedule, "assignments", unbound)
    _, again, calls = recorded(tiny_federation(cache, **tree), tmp_path / "again")
    assert not any(report.folded for _, reports in calls for report in reports)
    assert [line["test/loss"] for line in again] == [line["test/loss"] for line in lines]
    assert [line["time/simulated_s"] for line in again] == [line["time/simulated_s"] for line in lines]


@pytest.mark.parametrize("schedule", [{}, {"name": "buffered", "buffer": 3, "concurrency": 4}])
def test_no_visit_is_over_before_its_bound(cache, tmp_path, monkeypatch, schedule):
    promised, assignments = {}, Schedule.assignments

    def noting(self, clients, parcel, told, *given):
        visits, bounds = assignments(self, clients, parcel, told, *given)
        promised.update({(told.round, visit.client): own for visit, own in zip(visits, bounds, strict=True)})
        return visits, bounds

    monkeypatch.setattr(Schedule, "assignments", noting)
    cells = {} if schedule else {"cells": 3, "cell_uplink": 5e4}
    config = tiny_federation(
        cache, **{**PHONES, "cohort": 8, "devices": PHONES["devices"] | cells, "schedule": schedule}
    )
    taken, play = [], InlineEngine.run

    def watching(self, broadcast, *given):
        outcome = play(self, broadcast, *given)
        taken.extend(((broadcast.instructions.round, r.client), r.visit_s) for r in outcome.reports)
        return outcome

    monkeypatch.setattr(InlineEngine, "run", watching)
    run_inline(config, tmp_path / "run")
    assert len(taken) >= 12
    assert all(promised[visit] <= seconds for visit, seconds in taken)
    # Nobody is promised the same in two rounds.
    assert len(set(promised.values())) == len(promised)


# ----------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["devices.cells=3"], "devices.cells: 3, but how much their clients share is not said; set"),
        (
            ["devices.cell_uplink=2e7"],
            r"devices.cell_uplink: 2e\+07 bit/s, but there are no cells; set devices.cells",
        ),
        (["devices.cells=0", "devices.cell_uplink=2e7"], "devices.cells: .* greater than or equal to 1"),
        (
            ["devices.cells=3", "devices.cell_uplink=2e7", "schedule.name=buffered", "partition.clients=100"],
            "devices.cells: 3, but who uploads together is known of rounds of one cohort alone, and buffered",
        ),
        (["devices.tiers.a={share: 1, jitter: -1}"], "devices.tiers.a.jitter: .* greater than or equal to 0"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        quickstart(*overrides)


def test_cells_and_jitter_make_another_run():
    plain = [["devices.profile=phones"], ["devices.profile=phones", "devices.tiers.low.jitter=0"]]
    other = [
        ["devices.profile=phones", "devices.tiers.low.jitter=0.2"],
        ["devices.profile=phones", "devices.cells=3", "devices.cell_uplink=2e7"],
        ["devices.profile=phones", "devices.cells=3", "devices.cell_uplink=3e7"],
    ]
    digests = [quickstart(*own).digest() for own in plain + other]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_cell_that_carries_all_that_its_clients_have_changes_nothing(cache, tmp_path):
    wide, none = (
        run_inline(tiny_federation(cache, devices={"profile": "phones", **cells}), tmp_path / str(len(cells)))
        for cells in ({"cells": 2, "cell_uplink": 1e9}, {})
    )
    assert [line["time/simulated_s"] for line in wide.lines] == [
        line["time/simulated_s"] for line in none.lines
    ]
