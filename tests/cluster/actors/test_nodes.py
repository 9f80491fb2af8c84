"""Many nodes, GPUs and faults on a real cluster of three: whatever happens, the weights are those of inline.

One cluster and two pools of actors serve the whole file, in order; each test leaves them healed or says what
is missing. A gate on the disk holds actors in the middle of a round, so that no test depends on timing.
"""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray

import cluster
from cluster.actors import ray_round, totals
from cluster.actors.ray_session import ray_engine
from cluster.clients.client import ClientHost
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.simulation.devices import Devices
from tests.cluster.actors.three_nodes import add, assert_same_run, config, inline


class GatedHost(ClientHost):
    """A host on the CPU, whatever fake GPUs it was given, that waits in mid-round while the gate is shut.

    Its second call of round 2 finds it with a client folded already and another in hand.
    """

    def __init__(self, workload, gpus):
        super().__init__(workload, gpus=0.0)
        self._gate = Path(workload.config.data.cache) / "gate"
        self._calls = Counter()

    def play(self, broadcast, tasks):
        number = broadcast.instructions.round
        self._calls[number] += 1
        for task in tasks:
            (self._gate / f"played-{os.getpid()}-{task.client}").touch()
        if number == 2 and self._calls[number] == 2:
            (self._gate / f"waiting-{os.getpid()}").touch()
            while (self._gate / "shut").exists():
                time.sleep(0.01)
        return super().play(broadcast, tasks)

    def collect(self, round_number):
        self._calls.clear()
        return super().collect(round_number)


@pytest.fixture(autouse=True)
def one_client_a_call(monkeypatch):
    """Else a call would take all that an actor plays of so short a round."""
    monkeypatch.setattr(ray_round, "call_seconds", lambda share: 0.0)


@pytest.fixture(scope="module")
def undisturbed(place):
    """The inline run that every other run must equal."""
    folder = place / "inline"
    cluster.run(inline(config(place)), folder)
    return folder


@pytest.fixture(scope="module")
def gpu_engine(nodes, place):
    """As many actors with 0.6 GPU as fit: one on each of four GPUs."""
    settings = config(place, gpus_per_actor=0.6)
    engine = ray_engine(settings, Federation.of(settings), GatedHost)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tiered(place):
    """Clients of two tiers, each with actors of its own on nodes of its own."""
    return config(
        place,
        algorithm={"name": "topk", "sparsity": 0.5},
        devices={
            "tiers": {
                "weak": {"share": 0.5, "sparsity": 0.8, "cpus": 0.5, "label": {"class": "small"}},
                "strong": {"share": 0.5, "sparsity": 0.5, "cpus": 1, "label": {"class": "head"}},
            }
        },
        actors=2,
    )


@pytest.fixture(scope="module")
def tier_engine(nodes, tiered):
    engine = ray_engine(tiered, Federation.of(tiered), GatedHost)
    yield engine
    engine.close()


def run_on(engine, settings, folder):
    created = RunFolder.create(folder, settings)
    Driver(created, Federation.of(settings), engine).run()
    return created


def healed(engine, seconds=120):
    """Where every actor is, once all are back."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return engine.places()
        except ray.exceptions.RayActorError:
            assert time.monotonic() < deadline, "a lost actor did not come back"
            time.sleep(0.2)


def lose_node(nodes, name, places):
    """A machine is lost: Ray's daemon and, as it would not be on this one machine, every process with it."""
    node = nodes.of_class[name]
    nodes.remove_node(node, allow_graceful=False)
    for actor in places:
        if actor.node == node.node_id:
            os.kill(actor.pid, signal.SIGKILL)


def disturbed(engine, settings, folder, place, disturb):
    """Run while ``disturb(places)`` strikes, with every actor in the middle of round 2."""
    gate, places = place / "data" / "gate", healed(engine)
    for marker in gate.iterdir():
        marker.unlink()
    (gate / "shut").touch()
    failed = []

    def strike():
        try:
            deadline = time.monotonic() + 120
            while len(list(gate.glob("waiting-*"))) < len(places):
                assert time.monotonic() < deadline, "not every actor reached the gate"
                time.sleep(0.02)
            disturb(places)
        except BaseException as error:
            failed.append(error)
        finally:
            (gate / "shut").unlink()

    striker = threading.Thread(target=strike)
    striker.start()
    run = run_on(engine, settings, folder)
    striker.join()
    assert not failed, failed
    return sum(line["time/lost_actors"] for line in run.rounds())


def test_every_gpu_of_every_node_has_its_actor(nodes, gpu_engine, place, undisturbed, tmp_path):
    places = gpu_engine.places()
    used = Counter((actor.node, actor.gpus) for actor in places)
    of_class = [nodes.of_class[name].node_id for name in ("big", "small")]
    assert used == {(node, (gpu,)): 1 for node in of_class for gpu in ("0", "1")}
    run_on(gpu_engine, config(place), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)
    played = {int(path.name.split("-")[1]) for path in (place / "data" / "gate").glob("played-*")}
    assert played == {actor.pid for actor in places}


def test_totals_collected_after_every_call_change_nothing(
    gpu_engine, place, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(ray_round, "COLLECT_AFTER_S", 1e-9)
    collected = []
    take_in = totals.Totals.take_in
    monkeypatch.setattr(
        totals.Totals, "take_in", lambda self, *what: (collected.append(what), take_in(self, *what))[1]
    )
    run_on(gpu_engine, config(place), tmp_path / "run")
    assert len(collected) > 3 * 4  # more often than once an actor and round
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.fixture
def tree(gpu_engine, monkeypatch):
    """Has the driver take one total, and calls combine two; tells of every combining call as it begins."""
    monkeypatch.setattr(totals, "DIRECT", 1)
    monkeypatch.setattr(totals, "FAN", 2)
    monkeypatch.setattr(gpu_engine._rounds._totals, "stores", True)
    begun = []
    call = ray_round.Rounds._call

    def told(self, actor, method, work=(), *more, **named):
        call(self, actor, method, work, *more, **named)
        if method == "combine":
            begun.append((actor, work))
            if strikes:
                strikes.pop()(actor, work)

    strikes = []
    monkeypatch.setattr(ray_round.Rounds, "_call", told)
    return SimpleNamespace(begun=begun, strikes=strikes)


def test_totals_combined_along_a_tree_change_nothing(gpu_engine, tree, place, undisturbed, tmp_path):
    run_on(gpu_engine, config(place), tmp_path / "run")
    assert len(tree.begun) >= 3 * 3  # of four actors, in three rounds
    assert all(len(parcels) == 2 for _, parcels in tree.begun)
    assert_same_run(tmp_path / "run", undisturbed)


def test_an_actor_killed_while_it_combines_changes_nothing(gpu_engine, tree, place, undisturbed, tmp_path):
    places = healed(gpu_engine)
    tree.strikes.append(lambda actor, parcels: os.kill(places[actor].pid, signal.SIGKILL))
    run = run_on(gpu_engine, config(place), tmp_path / "run")
    assert sum(line["time/lost_actors"] for line in run.rounds()) == 1
    assert_same_run(tmp_path / "run", undisturbed)


def test_an_actor_killed_whose_total_is_being_combined_changes_nothing(
    gpu_engine, tree, place, undisturbed, tmp_path
):
    places = healed(gpu_engine)

    def kill(actor, parcels):
        (other,) = {parcel.actor for parcel in parcels} - {actor}
        os.kill(places[other].pid, signal.SIGKILL)

    tree.strikes.append(kill)
    run_on(gpu_engine, config(place), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)
    healed(gpu_engine)


def test_a_tiers_clients_run_on_actors_of_its_own_kind(tier_engine, tiered, place, tmp_path):
    gate = place / "data" / "gate"
    for marker in gate.iterdir():
        marker.unlink()
    kinds = dict(zip(tier_engine._pool.kinds, tier_engine.places(), strict=True))
    weak, strong = kinds["weak"].pid, kinds["strong"].pid
    run_on(tier_engine, tiered, tmp_path / "run")
    played = {tuple(map(int, path.name.split("-")[1:])) for path in gate.glob("played-*")}
    tiers = Devices(tiered).tiers
    assert played == {((weak, strong)[tiers[client]], client) for _, client in played}
    names = {actor["name"].split("-")[0] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert {"weak", "strong"} <= names
    cluster.run(inline(tiered), tmp_path / "inline")
    assert_same_run(tmp_path / "run", tmp_path / "inline")


def test_an_actor_killed_in_mid_round_changes_nothing(gpu_engine, place, undisturbed, tmp_path):
    def kill(places):
        os.kill(places[1].pid, signal.SIGKILL)

    assert disturbed(gpu_engine, config(place), tmp_path / "run", place, kill) == 1
    assert_same_run(tmp_path / "run", undisturbed)


def test_an_actor_that_hangs_is_replaced(gpu_engine, place, undisturbed, tmp_path):
    frozen = []

    def freeze(places):
        frozen.append(places[2].pid)
        os.kill(frozen[0], signal.SIGSTOP)

    assert disturbed(gpu_engine, config(place), tmp_path / "run", place, freeze) >= 1
    assert_same_run(tmp_path / "run", undisturbed)
    assert frozen[0] not in {actor.pid for actor in healed(gpu_engine)}
    assert not psutil.pid_exists(frozen[0])


def test_a_node_killed_in_mid_round_changes_nothing(nodes, gpu_engine, place, undisturbed, tmp_path):
    def kill(places):
        lose_node(nodes, "small", places)

    # Both its actors are lost, and no other node has room for them: the run goes on with the other two.
    assert disturbed(gpu_engine, config(place), tmp_path / "run", place, kill) == 2
    assert_same_run(tmp_path / "run", undisturbed)


def test_clients_whose_own_kind_is_gone_are_played_by_others(
    tier_engine, tiered, tmp_path, monkeypatch, nodes
):
    monkeypatch.setattr(ray_round, "KIND_DOWN_S", 0.5)
    deadline = time.monotonic() + 120  # Ray may learn of the lost node by its missed heartbeats only
    while len([node for node in ray.nodes() if node["Alive"]]) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run = run_on(tier_engine, tiered, tmp_path / "run")
    assert sum(line["time/lost_actors"] for line in run.rounds()) == 1
    cluster.run(inline(tiered), tmp_path / "inline")
    assert_same_run(tmp_path / "run", tmp_path / "inline")


def test_a_new_node_takes_the_place_of_a_lost_one(nodes, gpu_engine, place, undisturbed, tmp_path):
    lost, nodes.of_class["small"] = nodes.of_class["small"], add(nodes, "small")
    used = Counter((actor.node, actor.gpus) for actor in healed(gpu_engine))
    assert len(used) == 4
    assert lost.node_id not in {node for node, _ in used}
    run_on(gpu_engine, config(place), tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


class CrashingHost(GatedHost):
    """Client 5 crashes whoever plays it."""

    def play(self, broadcast, tasks):
        if any(task.client == 5 for task in tasks):
            os._exit(1)
        return super().play(broadcast, tasks)


def test_a_client_that_crashes_its_actors_is_found_alone_and_skipped(nodes, place, tmp_path):
    settings = config(place, cohort=24, rounds=1, actors=2, on_client_error="skip")
    engine = ray_engine(settings, Federation.of(settings), CrashingHost)
    (line,) = run_on(engine, settings, tmp_path / "run").rounds()
    engine.close()
    ((client, reason),) = line["clients/refused_list"]
    assert client == 5
    assert reason.startswith(
        "failed in stage train: the actor that played it was lost 3 times, the last one died"
    )
    assert line["clients/trained"] == 24


def test_a_node_killed_in_mid_tree_changes_nothing(nodes, gpu_engine, tree, place, undisturbed, tmp_path):
    places = healed(gpu_engine)
    tree.strikes.append(lambda *_: lose_node(nodes, "small", places))
    run = run_on(gpu_engine, config(place), tmp_path / "run")
    assert sum(line["time/lost_actors"] for line in run.rounds()) == 2
    assert_same_run(tmp_path / "run", undisturbed)
