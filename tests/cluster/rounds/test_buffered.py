"""Buffered asynchronous rounds against a schedule worked by hand; the order is that of the clock alone."""

import copy
import itertools

import numpy as np
import pytest
import torch

import cluster
from algorithms import registry
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.records.checkpoint import latest, load_checkpoint
from cluster.records.run_folder import RunFolder, comparable
from cluster.rounds import buffered
from cluster.simulation.devices import Devices
from cluster.simulation.samplers import SamplerError
from cluster.transport import wire
from cluster.transport.uplink import Uplink
from tests.cluster.records.interrupted_runs import assert_same_run, drive
from tests.cluster.rounds.test_schedule import INSTANT, assert_same_model, only, recorded, two_kinds
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


def in_turn(clients=()):
    """A sampler that asks one client after the other."""
    turn = itertools.cycle(clients)
    return lambda rng, count, candidates: np.array([next(turn) for _ in range(count)])


def asynchronous(cache, *, buffer=2, concurrency=2, schedule=None, **overrides):
    schedule = {"name": "buffered", "buffer": buffer, "concurrency": concurrency, **(schedule or {})}
    return tiny_federation(cache, schedule=schedule, **overrides)


def by_hand(cache, **overrides):
    """Visits of 1 s and of 3 s; asked are a fast client, a slow one, then the fast ones and the slow ones."""
    settings = {"devices": two_kinds(fast=1.0, slow=3.0), "rounds": 3, **overrides}
    config = asynchronous(cache, **settings)
    fast, slow = (np.flatnonzero(Devices(config).tiers == index).tolist() for index in (0, 1))
    order = [fast[0], slow[0], fast[1], fast[2], slow[1], fast[0], slow[2]]
    sampler = {"name": "tests.cluster.rounds.test_buffered:in_turn", "clients": order}
    return asynchronous(cache, **settings, sampler=sampler), order


def test_a_schedule_worked_by_hand(cache, tmp_path):
    # Two at a time (f: 1 s, s: 3 s), two updates a step. In brackets the dispatch's number.
    #   0 s  f0 [0] until 1, s0 [1] until 3                                                version 0
    #   1 s  f0 in; f1 [2] until 2.   2 s  f1 in: step 1 at 2 s, nobody is stale
    #   2 s  f2 [3] until 3.   3 s  s0 [1] goes first in the tie, one step behind; s1 [4] until 6
    #   3 s  f2 [3] in: step 2 at 3 s                                                      version 2
    #   3 s  f0 [5] until 4.   4 s  f0 in; s2 [6] until 7.   6 s  s1, one step behind: step 3 at 6 s
    config, order = by_hand(cache)
    f0, s0, f1, f2, s1, *_ = order
    driver, lines, calls = recorded(config, tmp_path / "run")
    assert [line["time/simulated_s"] for line in lines] == [2.0, 3.0, 6.0]
    assert [line["time/round_simulated_s"] for line in lines] == [2.0, 1.0, 3.0]
    assert [line["clients/staleness"] for line in lines] == [0.0, 0.5, 0.5]
    assert [line["clients/staleness_max"] for line in lines] == [0, 1, 1]
    assert [line["clients/in_flight"] for line in lines] == [1, 1, 1]
    sizes = driver.federation.sizes
    pairs = [(f0, f1), (s0, f2), (f0, s1)]
    assert [line["clients/samples"] for line in lines] == [int(sizes[list(pair)].sum()) for pair in pairs]
    # Played when needed: at 2 s nobody can precede s0, whose number goes before that of f2.
    played = [[task.client for task in tasks] for tasks, _ in calls]
    assert played == [[f0, s0], [f1], [f2, s1], [f0]]
    assert [line["clients/late"] for line in lines] == [0, 0, 0]


def test_what_a_step_adds_up_to(cache, tmp_path):
    """w_2 = (n s w_s0 + n s (w_1 - w_0) + n w_f2) / (n s + n), s = 2^-.5, against plain float64 sums."""
    config, order = by_hand(cache, rounds=2)
    _, s0, _, f2, *_ = order
    run, _, calls = recorded(config, tmp_path / "run")
    layout, schedule = run.layout, run._schedule
    updates = {}
    for _, reports in calls:
        for report in reports:
            sent = wire.decode(report.message, schedule.uplink.shape)
            updates[report.client] = torch.from_numpy(sent.values)
    first = tiny_federation(
        cache, rounds=1, cohort=2, sampler=only([order[0], order[2]]), devices=two_kinds(fast=1.0, slow=3.0)
    )
    states = run_inline(first, tmp_path / "first").states
    base, moved = states[0].weights.double(), states[1].weights.double() - states[0].weights.double()
    assert base.shape == moved.shape
    n_stale, n_fresh = (int(run.federation.sizes[client]) for client in (s0, f2))
    # Weights are whole 1,024ths of a sample.
    stale, fresh = round(1024 * n_stale * 2**-0.5), 1024 * n_fresh
    expected = (stale * updates[s0].double() + fresh * updates[f2].double()) / (stale + fresh)
    expected[: layout.trained_size] += stale * moved[: layout.trained_size] / (stale + fresh)
    np.testing.assert_allclose(run.state.weights.double(), expected, rtol=1e-6, atol=1e-7)


def test_what_a_step_adds_up_to_over_each_weights_holders(cache, tmp_path, monkeypatch):
    """A stale update on a part moves by what the server has moved that part, and no other weight."""
    kinds = two_kinds(fast=1.0, slow=3.0)
    kinds["tiers"]["fast"]["sparsity"], kinds["tiers"]["slow"]["sparsity"] = 0.5, 0.8
    algorithm = {"name": "fiarse", "sparsity": 0.5}
    config, order = by_hand(cache, rounds=2, devices=kinds, algorithm=algorithm)
    _, s0, _, f2, *_ = order
    folded = []
    take = Uplink.take

    def taking(self, total, client, message, samples, base, held, *rest):
        values = torch.from_numpy(self.decode(message, held).values.copy()).double()
        folded.append((client, values, torch.from_numpy(held), samples))
        return take(self, total, client, message, samples, base, held, *rest)

    monkeypatch.setattr(Uplink, "take", taking)
    states = run_inline(config, tmp_path / "run").states
    trained = len(folded[0][2])
    w0, w1, w2 = (state.weights[:trained].double() for state in states)
    (stale_client, stale, stale_part, n), (fresh_client, fresh, fresh_part, m) = folded[2:4]
    assert (stale_client, fresh_client) == (s0, f2)
    assert (n, m) == (round(1024 * 2**-0.5), 1024)
    held = n * stale_part + m * fresh_part
    summed = n * (stale[:trained] + w1 - w0) * stale_part + m * fresh[:trained] * fresh_part
    expected = torch.where(held > 0, summed / held.clamp(min=1), w1)
    np.testing.assert_allclose(w2, expected, rtol=1e-6, atol=1e-7)
    assert 0 < int((held == 0).sum()) < trained
    assert bool((w1 != w0)[fresh_part & ~stale_part].any())


def test_without_staleness_it_is_the_synchronous_round_bit_for_bit(cache, tmp_path):
    even = {"tiers": {"a": {"share": 1.0, "latency": 1.0, **INSTANT}}}
    settings = {"rounds": 1, "devices": even, "algorithm": {"name": "topk", "sparsity": 0.8}}
    sampler = {"name": "tests.cluster.rounds.test_buffered:in_turn", "clients": [4, 0, 5, 1, 2, 3]}
    config = asynchronous(cache, buffer=3, concurrency=3, **settings, sampler=sampler)
    step = run_inline(config, tmp_path / "buffered")
    together = tiny_federation(cache, **settings, cohort=3, sampler=only([0, 4, 5]))
    assert_same_model(step.state.weights, run_inline(together, tmp_path / "synchronous").state.weights)


def test_updates_that_are_too_old_are_left_out(cache, tmp_path):
    config, _ = by_hand(cache, schedule={"max_staleness": 0})
    driver, lines, _ = recorded(config, tmp_path / "run")
    # s0 is one step behind at 3 s: late; step 2 needs another one, s1's 6 s or a fast client's 4 s.
    assert [line["clients/late"] for line in lines][1] == 1
    assert all(line["clients/staleness_max"] <= 1 for line in lines)
    assert driver.state.round == 3


SPREAD = {"share": 0.5, "spread": 0.8, "jitter": 0.5}
PHONES = {
    "cohort": 2,
    "rounds": 5,
    "checkpoint_every": 2,
    "devices": {
        "tiers": {
            "low": {"compute": 1e6, "uplink": 3e4, "downlink": 5e4, "dropout": 0.2, **SPREAD},
            "high": {"compute": 1e7, "uplink": 1e5, "downlink": 4e5, **SPREAD},
        }
    },
    "partition": {"clients": 12},
}


@pytest.mark.parametrize("batches", ["one at a time", "everyone at once", "the last first"])
def test_the_order_does_not_depend_on_who_is_played_when(cache, tmp_path, monkeypatch, batches):
    config = asynchronous(cache, concurrency=4, buffer=3, **PHONES)
    reference = run_inline(config, tmp_path / "reference")
    pending = buffered.Buffered._pending

    def order(step):
        flights = pending(step)
        return flights[::-1] if batches == "the last first" else flights[:1]

    if batches == "everyone at once":
        is_final = buffered.Buffered._next_is_final
        monkeypatch.setattr(
            buffered.Buffered, "_next_is_final", lambda own: not pending(own) and is_final(own)
        )
    else:
        play = buffered.Buffered._play

        def in_parts(step):
            with monkeypatch.context() as patch:
                patch.setattr(buffered.Buffered, "_pending", order)
                play(step)

        monkeypatch.setattr(buffered.Buffered, "_play", in_parts)
    again = run_inline(config, tmp_path / "again")
    assert_same_model(again.state.weights, reference.state.weights)
    assert [comparable(line) for line in again.lines] == [comparable(line) for line in reference.lines]
    assert sum(line["clients/dropped"] for line in again.lines) > 0
    assert max(line["clients/staleness_max"] for line in again.lines) > 0


ABLE = [name for name, method in registry().items() if method.asynchronous]


@pytest.mark.parametrize("method", ["fedavg", "sparsyfed", "zerofl", "fixed_mask", "fedrolex", "fiarse"])
def test_interrupted_is_uninterrupted(cache, tmp_path, method):
    options = {"name": method} | ({} if method == "fedavg" else {"sparsity": 0.8})
    phones = copy.deepcopy(PHONES)
    if method == "zerofl":
        options["upload"] = "top_k_weights_diff"
    if method in ("fedrolex", "fiarse"):  # parts of several versions are in flight
        options["sparsity"] = 0.0
        for tier, sparsity in (("low", 0.75), ("high", 0.0)):
            phones["devices"]["tiers"][tier]["sparsity"] = sparsity
    config = asynchronous(
        cache,
        concurrency=4,
        buffer=3,
        **phones,
        algorithm=options,
        server={"name": "fedavg", "momentum": 0.5},
    )
    federation = Federation.of(config)
    drive(RunFolder.create(tmp_path / "reference", config), federation)
    assert load_checkpoint(latest(tmp_path / "reference" / "checkpoints")).bases
    for stop in (2, 3):
        folder = RunFolder.create(tmp_path / f"killed-{stop}", config)
        drive(folder, federation, killed_at=stop)
        drive(RunFolder.open(folder.path), federation)
        assert_same_run(folder.path, tmp_path / "reference")


def test_only_methods_whose_updates_stand_alone_take_part(cache):
    alone = {"fedavg", "fedef", "fedrolex", "fedsam", "fiarse", "fixed_mask", "heterofl", "sparsyfed", "topk"}
    assert alone < set(ABLE)
    assert not {"feddst", "flash", "scaffold", "feddyn", "ssfl"} & set(ABLE)
    with pytest.raises(ConfigError, match=r"flash needs all .* works with .*fedavg, .*fedrolex, fedsam"):
        asynchronous(cache, algorithm={"name": "flash"})
    with pytest.raises(ConfigError, match="feddst needs all clients"):
        asynchronous(cache, algorithm={"name": "feddst"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"concurrency": 5, "buffer": 2},
            "5 clients in flight and 2 in the buffer are more than .*, 6",
        ),
        ({"schedule": {"deadline": 3}}, "deadline: buffered has no such field; .*belongs to synchronous"),
        ({"schedule": {"over_selection": 2}}, "schedule.over_selection: buffered has no such field"),
    ],
)
def test_wrong_settings_are_one_clear_error(cache, overrides, message):
    with pytest.raises(ConfigError, match=message):
        asynchronous(cache, **overrides)


def test_a_buffer_that_can_never_fill_is_an_error(cache, tmp_path):
    gone = {"tiers": {"a": {"share": 1.0, "dropout": 1.0}}}
    with pytest.raises(SamplerError, match="all 6 clients were asked in round 1 and 0 answered, of 2"):
        run_inline(asynchronous(cache, devices=gone), tmp_path / "run")


def test_it_waits_until_somebody_is_there(cache, tmp_path):
    (tmp_path / "trace.csv").write_text("client,start,end\n" + "".join(f"{c},100,200\n" for c in range(6)))
    availability = {"name": "trace", "path": str(tmp_path / "trace.csv")}
    tiers = {"a": {"share": 1.0, "latency": 1.0, **INSTANT, "availability": availability}}
    config = asynchronous(cache, devices={"tiers": tiers}, sampler={"name": "availability"})
    _, lines, _ = recorded(config, tmp_path / "run")
    assert [line["time/simulated_s"] for line in lines] == [121.0, 122.0]  # asked at 0, 60 and 120 s


@pytest.fixture(scope="module")
def local_ray(start_ray):
    start_ray(3)  # two actors and room for the driver


SYNCHRONOUS = {
    "schedule": {"over_selection": 1.5, "deadline": 6.0},
    "algorithm": {"name": "sparsyfed", "sparsity": 0.8},
    "devices": PHONES["devices"] | {"cells": 3, "cell_uplink": 5e4},
}


@pytest.mark.parametrize("kind", ["buffered", "deadline"])
def test_ray_gives_the_bits_of_inline(local_ray, cache, tmp_path, kind):
    def config(**more):
        if kind == "buffered":
            return asynchronous(cache, concurrency=4, buffer=3, **PHONES, **more)
        return tiny_federation(cache, **{**PHONES, "cohort": 6, **SYNCHRONOUS}, **more)

    inline = cluster.run(config(), tmp_path / "inline")
    cluster.run(config(execution="ray", actors=2), tmp_path / "ray")
    assert_same_run(tmp_path / "ray", inline.folder)
    lines = RunFolder(inline.folder).rounds()
    key = "clients/staleness_max" if kind == "buffered" else "clients/late"
    assert max(line[key] for line in lines) > 0


def test_a_deadline_run_is_the_same_when_interrupted(cache, tmp_path):
    config = tiny_federation(cache, **{**PHONES, "cohort": 6, **SYNCHRONOUS})
    federation = Federation.of(config)
    drive(RunFolder.create(tmp_path / "reference", config), federation)
    lines = RunFolder(tmp_path / "reference").rounds()
    for key in ("clients/dropped", "clients/late"):
        assert sum(line[key] for line in lines) > 0
    for stop in (2, 3):
        folder = RunFolder.create(tmp_path / f"killed-{stop}", config)
        drive(folder, federation, killed_at=stop)
        drive(RunFolder.open(folder.path), federation)
        assert_same_run(folder.path, tmp_path / "reference")
