"""Runs that follow each other take over the processes of those before, and nothing else of them."""

import os
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
import ray

import cluster
from cluster.actors import remote
from cluster.actors.actor_pool import ActorPool
from cluster.actors.driver_actor import DriverActor
from cluster.actors.placement import ActorKind, Bundle
from cluster.actors.ray_engine import KeptPool
from cluster.grid import Grid, run_grid
from cluster.records.run_folder import RunFolder, comparable

SHORT = [
    "rounds=2",
    "cohort=4",
    "model.name=mlp",
    "model.hidden=[16]",
    "local.epochs=1",
    "evaluate_every=2",
    "actors=2",
    "cpus_per_actor=0.5",
    "tracking.enabled=false",
]


@pytest.fixture(scope="module")
def two_cores(start_ray):
    start_ray(2)


def config(seed, *more):
    return cluster.resolve("quickstart", [*SHORT, f"seed={seed}", *more])


def running(title):
    """Process ids of this cluster's actors of a class."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{title}"):
                found[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    return set(found)


def results_of(folder):
    return [comparable(line) for line in RunFolder(folder).rounds()]


@pytest.fixture(scope="module")
def inline(tmp_path_factory):
    """What each run comes to by itself."""
    place = tmp_path_factory.mktemp("inline")
    for seed in (0, 1, 2):
        cluster.run(config(seed, "execution=inline"), place / f"s{seed}")
    return place


def grid(**runs):
    return Grid({name: config(seed) for name, seed in runs.items()}, at_once=1)


def test_the_runs_of_a_grid_share_their_processes(two_cores, inline, tmp_path):
    seen = []

    def ended(name, result):
        seen.append((running("HostActor"), running("DriverActor")))

    outcome = run_grid(grid(s0=0, s1=1, s2=2), tmp_path / "grid", ended=ended)
    assert not outcome.failures
    assert seen[0] == seen[1] == seen[2]
    assert [len(pids) for pids in seen[0]] == [2, 1]
    for name in ("s0", "s1", "s2"):
        assert results_of(tmp_path / "grid" / name) == results_of(inline / name)
    deadline = time.monotonic() + 30
    while running("HostActor") | running("DriverActor"):
        assert time.monotonic() < deadline, "what was kept is ended with the grid"


def test_what_dies_between_two_runs_is_replaced(two_cores, inline, tmp_path):
    victims = ["HostActor", "DriverActor", "HostActor"]

    def ended(name, result):
        os.kill(min(running(victims.pop(0))), signal.SIGKILL)

    outcome = run_grid(grid(s0=0, s1=1, s2=2), tmp_path / "grid", ended=ended)
    assert not outcome.failures
    for name in ("s0", "s1", "s2"):
        assert results_of(tmp_path / "grid" / name) == results_of(inline / name)


def test_a_run_that_wants_others_or_follows_a_failure_gets_its_own(two_cores, inline, tmp_path):
    usual = [each for each in SHORT if not each.startswith("model.")]
    failing = cluster.resolve("quickstart", [*usual, "model.name=tests.cluster.actors.test_ray:FailingModel"])
    with remote.warm_drivers():
        cluster.run(config(0), tmp_path / "s0")
        first = running("HostActor")
        cluster.run(config(1, "actors=3"), tmp_path / "s1")
        second = running("HostActor")
        with pytest.raises(Exception, match="client"):
            cluster.run(failing, tmp_path / "failing")
        assert not remote._warm
        cluster.run(config(2), tmp_path / "s2")
        assert len(remote._warm) == 1
    assert len(second) == 3
    assert not first & second
    for name in ("s0", "s1", "s2"):
        assert results_of(tmp_path / name) == results_of(inline / name)


def test_code_of_ones_own_that_changed_is_loaded_anew(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(remote, "_end", ended.append)
    monkeypatch.setattr(remote, "_start", lambda *_, **__: "new")
    monkeypatch.setattr(remote.RunFolder, "open", lambda path: SimpleNamespace(config=lambda: None))
    monkeypatch.setattr(remote, "_own_code", lambda settings: "today")
    begun = SimpleNamespace(begin=SimpleNamespace(remote=lambda path: path))
    monkeypatch.setattr(ray, "get", lambda value: value)
    same = remote.WarmDriver("a", begun, f"{remote.code_digest()} today")
    old = remote.WarmDriver("b", begun, f"{remote.code_digest()} yesterday")
    assert remote._take([same, old], tmp_path) is same
    assert ended == [old]
    assert remote._take([], tmp_path).actor == "new"


def test_the_hash_of_ones_own_code_changes_with_the_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "their_model.py"
    settings = SimpleNamespace(references={"model.name": "their_model:Net"})
    source.write_text("class Net: ...")
    first = remote._own_code(settings)
    source.write_text("class Net: pass")
    assert remote._own_code(settings) != first
    assert remote._own_code(SimpleNamespace(references={})) != first


def test_actors_on_a_gpu_are_not_kept():
    closed = []
    pool = SimpleNamespace(bundles=[Bundle(ActorKind("", 1, gpus=0.5), 2)], close=lambda: closed.append(1))
    kept = KeptPool()
    kept.leave(pool)
    assert closed == [1]
    assert kept.take(pool.bundles, None) is None


def test_what_is_said_of_one_run_does_not_reach_the_next(tmp_path):
    """``sparsyfed stop`` and ``attach`` speak to a driver that has turned to the next run meanwhile."""
    driver = object.__new__(DriverActor)
    driver._path, driver._stop, driver._state = tmp_path / "next", False, "running"
    driver.stop(tmp_path / "before")
    assert not driver._stop
    assert driver.news(tmp_path / "before", 0, 0) == ([], [], True)
    driver.stop(tmp_path / "next")
    assert driver._stop


def test_a_driver_that_cannot_begin_is_ended_and_not_lost(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(remote, "_end", ended.append)
    monkeypatch.setattr(remote.RunFolder, "open", lambda path: SimpleNamespace(config=lambda: None))
    monkeypatch.setattr(remote, "_own_code", lambda settings: "")

    def broken(value):
        raise OSError("the disk is away")

    monkeypatch.setattr(ray, "get", broken)
    begun = SimpleNamespace(begin=SimpleNamespace(remote=lambda path: path))
    driver = remote.WarmDriver("a", begun, f"{remote.code_digest()} ")
    with pytest.raises(OSError, match="the disk is away"):
        remote._take([driver], tmp_path)
    assert ended == [driver]


def test_kept_actors_that_do_not_answer_are_ended():
    closed = []

    def frozen(calls, timeout):
        assert timeout > 0
        raise ray.exceptions.GetTimeoutError

    pool = object.__new__(ActorPool)
    pool._ray = SimpleNamespace(get=frozen, exceptions=ray.exceptions)
    pool._hosts, pool.close = [], lambda: closed.append(True)
    assert not pool.alive
    assert closed
