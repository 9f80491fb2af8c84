"""Many nodes, GPUs and faults on a real cluster of three: whatever happens, the weights are those of inline.

One cluster and two pools of actors serve the whole file, in order; each test leaves them healed or says what
is missing. A gate on the disk holds actors in the middle of a round, so that no test depends on timing.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

import cluster
from cluster import ray_round, remote
from cluster.cli import main
from cluster.client import ClientHost
from cluster.config import validate
from cluster.devices import Devices
from cluster.driver import Driver
from cluster.federation import Federation
from cluster.ray_session import ClusterError, ray_engine
from cluster.run_folder import RunFolder, comparable
from tests.naive import tiny_federation

#: A dead node, which refuses each check at once, is noticed in two seconds; one that is only slow has twenty.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
    "health_check_timeout_ms": 5000,
}
STORE = 150 * 2**20


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
def nodes():
    """A head without GPUs and two nodes with two each; the labels tell them apart."""
    started = Cluster()
    add(started, "head", num_cpus=4, num_gpus=0, include_dashboard=False, _system_config=HEALTH)
    started.of_class = {name: add(started, name) for name in ("big", "small")}
    ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
    yield started
    ray.shutdown()
    started.shutdown()


def add(nodes, name, **more):
    """A node more. Ray gives one half a minute to start, which a busy machine may not have."""
    options = {"num_cpus": 3, "num_gpus": 2, "labels": {"class": name}, "object_store_memory": STORE} | more
    for _ in range(4):
        try:
            return nodes.add_node(**options)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    raise TimeoutError(f"node {name} did not start")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder of the decoded data and of the gate."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "data" / "gate").mkdir(parents=True)
    return folder


def config(place, **more):
    """24 clients of unequal size, half of them a round."""
    usual = {
        "rounds": 3,
        "cohort": 12,
        "partition": {"clients": 24, "alpha": 1.0},
        "checkpoint_every": 1,
        "execution": "ray",
        "address": "auto",
        "client_timeout_s": 10.0,
    }
    return tiny_federation(place, **(usual | more))


@pytest.fixture(scope="module")
def undisturbed(place):
    """The inline run that every other run must equal."""
    folder = place / "inline"
    cluster.run(inline(config(place)), folder)
    return folder


def inline(settings):
    return validate(settings.dump() | {"execution": "inline", "detached": False})


def assert_same_run(folder, reference):
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    lines = [[comparable(line) for line in RunFolder(path).rounds()] for path in (folder, reference)]
    assert lines[0] == lines[1]


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
    merge = ray_round.Rounds._merge
    monkeypatch.setattr(
        ray_round.Rounds, "_merge", lambda self, *what: (collected.append(what), merge(self, *what))
    )
    run_on(gpu_engine, config(place), tmp_path / "run")
    assert len(collected) > 3 * 4  # more often than once an actor and round
    assert_same_run(tmp_path / "run", undisturbed)


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
        nodes.remove_node(nodes.of_class["small"], allow_graceful=False)

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


def test_the_driver_killed_in_mid_run_resumes_on_the_same_cluster(nodes, place, undisturbed, tmp_path):
    settings = config(place, model={"name": "tests.cluster.test_nodes:SlowModel"}, actors=2)
    cluster.run(inline(settings), tmp_path / "inline")

    def kill_the_driver():
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/checkpoints/round-000001*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        (driver,) = remote.drivers().values()
        os.kill(remote.progress_of(driver)["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_driver)
    killer.start()
    with pytest.raises(ClusterError, match="sparsyfed resume"):
        cluster.run(settings, tmp_path / "run")
    killer.join()
    assert len(RunFolder(tmp_path / "run").rounds()) < 3
    cluster.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "inline")


def SlowModel(input_shape, classes):
    """A linear model whose training forward takes a while."""
    from torch import nn

    class Slow(nn.Sequential):
        def forward(self, inputs):
            if self.training:
                time.sleep(0.05)
            return super().forward(inputs)

    return Slow(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], classes))


def test_a_detached_run_is_left_listed_attached_to_and_stopped(nodes, place, tmp_path, capfd):
    settings = config(place, actors=2, detached=True)
    (tmp_path / "experiment.yaml").write_text(json.dumps(settings.dump()))
    command = [sys.executable, "-m", "cluster", "run", str(tmp_path / "experiment.yaml"), "rounds=5000"]
    command += [f"address={nodes.address}", "--output", str(tmp_path / "long")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("round "):
            break
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == 130, complaints
    (name,) = remote.drivers()
    assert f"the run goes on; see it with: sparsyfed attach {name} --address {nodes.address}" in complaints
    assert name.startswith("long-")

    assert main(["status", "--address", nodes.address]) == 0
    listed = capfd.readouterr().out
    assert "running, detached" in listed
    assert "/5000" in listed
    assert main(["attach", "nosuch", "--address", nodes.address]) == 2
    assert f"no run on the cluster at {nodes.address} whose name begins with nosuch" in capfd.readouterr().err

    stopping = threading.Timer(2.0, main, [["stop", "long", "--address", nodes.address]])
    stopping.start()
    assert main(["attach", "--address", nodes.address]) == 130
    stopping.join()
    shown = capfd.readouterr().out
    assert "accuracy" in shown
    assert "ended after round" in shown
    assert f"sparsyfed resume {tmp_path / 'long'}" in shown
    done = len(RunFolder(tmp_path / "long").rounds())
    # Its driver is still there to tell how the run ended, and makes way for the next.
    assert remote.progress_of(remote.drivers()[name])["state"] == "stopped"
    cluster.resume(tmp_path / "long", [f"stop_after={done + 1}"])
    assert len(RunFolder(tmp_path / "long").rounds()) == done + 1
    whole = inline(validate(settings.dump() | {"rounds": 5000, "stop_after": done + 1}))
    cluster.run(whole, tmp_path / "whole")
    models = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("long", "whole")]
    assert models[0] == models[1]


def test_ctrl_c_reaches_the_whole_process_group_and_the_run_still_ends_after_its_round(place, tmp_path):
    settings = config(place, actors=1)
    (tmp_path / "experiment.yaml").write_text(json.dumps(settings.dump()))
    command = [sys.executable, "-m", "cluster", "run", str(tmp_path / "experiment.yaml"), "rounds=5000"]
    command += ["address=local", "--output", str(tmp_path / "long")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("round "):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes too
    shown, complaints = process.communicate(timeout=120)
    assert process.returncode == 130, complaints
    assert "stopping after this round" in complaints
    assert "sparsyfed resume" in shown
    folder = RunFolder(tmp_path / "long")
    assert (folder.checkpoints / f"round-{len(folder.rounds()):06d}.safetensors").is_file()


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
