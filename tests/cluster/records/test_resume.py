"""Promise 2: interrupted equals uninterrupted, bit for bit, wherever the run was cut off."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest

import cluster
from algorithms import registry
from cluster.federation import Federation
from cluster.records.checkpoint import list_rounds
from cluster.records.run_folder import RunFolder, comparable
from tests.cluster.records.interrupted_runs import assert_same_run, drive, federated

pytestmark = pytest.mark.usefixtures("no_pictures")

# ---------------------------------------------------------------------------- every method, every stop point

VARIANTS = {
    # Everything that has a state of its own on the server: moments, versions of the mask, a lossy wire.
    "sparsyfed, momentum, bfloat16": {
        "algorithm": {"name": "sparsyfed", "sparsity": 0.8},
        "server": {"name": "fedavg", "momentum": 0.9},
        "wire": {"uplink": "bfloat16", "downlink": "bfloat16"},
    },
    "sparsyfed, spectral": {"algorithm": {"name": "sparsyfed", "sparsity": 0.8, "exponent": "spectral"}},
    "topk, fedadam": {"algorithm": {"name": "topk", "sparsity": 0.8}, "server": {"name": "fedadam"}},
    "zerofl, differences": {"algorithm": {"name": "zerofl", "sparsity": 0.8, "upload": "top_k_weights_diff"}},
    "feddst, momentum": {
        "algorithm": {"name": "feddst", "sparsity": 0.8, "readjust_interval": 1},
        "server": {"name": "fedavg", "momentum": 0.9},
        "wire": {"downlink": "int8"},
    },
    "fedrts": {"algorithm": {"name": "fedrts", "sparsity": 0.8, "readjust_interval": 2}},
    "prunefl": {"algorithm": {"name": "prunefl", "readjust_interval": 2, "initial_adjustments": 2}},
    "flash, sensitivity": {
        "algorithm": {"name": "flash", "sparsity": 0.8, "stage1": "sensitivity", "refresh_interval": 2},
    },
    "topk on tiers": {
        "algorithm": {"name": "topk", "sparsity": 0.5},
        "devices": {
            "tiers": {"weak": {"share": 0.5, "sparsity": 0.9}, "strong": {"share": 0.5, "sparsity": 0.5}}
        },
    },
    "fedavg, batch norm": {
        "algorithm": {"name": "fedavg"},
        "model": {"name": "tests.tiny_experiment:tiny_model"},
        "data": {"validation": 0.2},
    },
    "fedpm": {"algorithm": {"name": "fedpm", "prior_reset": 3}, "local": {"weight_decay": 0.0}},
    "fedpm_reg": {"algorithm": {"name": "fedpm_reg"}, "local": {"weight_decay": 0.0}},
    "flying_bird": {
        "algorithm": {"name": "flying_bird", "adaptive": True, "readjust_interval": 1},
        "attack": {"name": "pgd", "steps": 1},
    },
    "splitmix": {"algorithm": {"name": "splitmix", "bases": 2}},
    "robust_bird": {"algorithm": {"name": "robust_bird", "draw_rounds": 2}},
    **{
        name: {
            "algorithm": {"name": name},
            "model": {"name": "linear", "perturbation": True},
            "local": {"weight_decay": 0.0},
        }
        for name in ("masha1", "masha2", "sgda")
    },
    "of one's own": {"algorithm": {"name": "tests.example_method:RandomK", "sparsity": 0.8}},
}
CASES = {name: {"algorithm": {"name": name}} for name in registry()} | VARIANTS
del CASES["ma_echo"]  # is done after one round


@pytest.mark.parametrize("case", CASES)
def test_interrupted_is_uninterrupted(cache, tmp_path, case):
    config = federated(cache, **CASES[case])
    federation = Federation.of(config)
    assert len(set(federation.sizes.tolist())) > 3
    reference = tmp_path / "reference"
    drive(RunFolder.create(reference, config), federation)
    # Round t's line is stored while round t + 1 is computed. 2: the checkpoint of
    # round 2 lies there with its line waiting; 3: a round after it; 5: during the last evaluation.
    for stop in (2, 3, 5):
        path = tmp_path / f"killed-{stop}"
        folder = RunFolder.create(path, config)
        drive(folder, federation, killed_at=stop)
        assert [line["round"] for line in folder.rounds()][-1] == stop
        drive(RunFolder.open(path), federation)
        assert_same_run(path, reference)


def test_killed_again_and_again(cache, tmp_path):
    config = federated(cache, **VARIANTS["feddst, momentum"])
    federation = Federation.of(config)
    drive(RunFolder.create(tmp_path / "reference", config), federation)
    folder = RunFolder.create(tmp_path / "run", config)
    for stop in (1, 2, 3, 4):
        drive(folder, federation, killed_at=stop)
    drive(folder, federation)
    assert_same_run(tmp_path / "run", tmp_path / "reference")


@pytest.mark.parametrize(
    "execution_of_more_rounds", [["stop_after=null"], ["stop_after=4"], ["stop_after=5"]]
)
def test_stop_after_then_on(cache, tmp_path, execution_of_more_rounds):
    config = federated(cache, **VARIANTS["sparsyfed, momentum, bfloat16"])
    cluster.run(config, tmp_path / "reference")
    stopped = cluster.run(config.model_copy(update={"stop_after": 3}), tmp_path / "run")
    assert (stopped.summary["rounds"], stopped.summary["complete"]) == (3, False)
    lines = RunFolder(tmp_path / "reference").rounds()
    assert stopped.summary["accuracy"] == lines[2]["test/accuracy"]
    cluster.resume(tmp_path / "run", execution_of_more_rounds)
    result = cluster.resume(tmp_path / "run", ["stop_after=null"])
    assert result.summary["complete"]
    assert_same_run(tmp_path / "run", tmp_path / "reference")


def test_a_finished_run_resumes_to_itself(cache, tmp_path):
    config = federated(cache)
    first = cluster.run(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    again = cluster.resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "copy")
    assert {**first.summary, "seconds": 0} == {**again.summary, "seconds": 0}


def test_a_moved_run_resumes(cache, tmp_path):
    config = federated(cache)
    federation = Federation.of(config)
    drive(RunFolder.create(tmp_path / "reference", config), federation)
    drive(RunFolder.create(tmp_path / "run", config), federation, killed_at=3)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    cluster.resume(tmp_path / "elsewhere")
    assert_same_run(tmp_path / "elsewhere", tmp_path / "reference")


def test_an_interruption_between_evaluations(cache, tmp_path):
    """``stop_after`` evaluates round 3, which an undisturbed run does not; nothing else may differ."""
    config = federated(cache, evaluate_every=4)
    cluster.run(config, tmp_path / "reference")
    cluster.run(config.model_copy(update={"stop_after": 3}), tmp_path / "run")
    cluster.resume(tmp_path / "run", ["stop_after=null"])
    lines = [RunFolder(tmp_path / name).rounds() for name in ("run", "reference")]
    assert [line["round"] for line in lines[0]] == [1, 2, 3, 4, 5]
    assert [[line["round"] for line in one if "test/accuracy" in line] for one in lines] == [
        [3, 4, 5],
        [4, 5],
    ]
    for found, expected in zip(*lines, strict=True):
        assert all(found[key] == value for key, value in comparable(expected).items())
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "reference")]
    assert models[0] == models[1]


def test_a_run_ended_earlier_than_it_had_come_is_evaluated_there(cache, tmp_path):
    """Rounds 1 to 3 have no accuracy yet; ending the run after round 2 measures the model it ends with."""
    config = federated(cache, evaluate_every=5)
    drive(RunFolder.create(tmp_path / "run", config), Federation.of(config), killed_at=3)
    result = cluster.resume(tmp_path / "run", ["stop_after=2"])
    expected = cluster.run(config.model_copy(update={"stop_after": 2}), tmp_path / "reference")
    assert result.summary["rounds"] == 2
    assert result.summary["accuracy"] == expected.summary["accuracy"]
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "reference")]
    assert models[0] == models[1]


@pytest.mark.parametrize("method", ["sparsyfed", "fixed_mask"])
def test_a_resnet_with_batch_norm(cache, tmp_path, method):
    """Where sums of float32 differ in the last bit: 175,000 weights, unequal clients, real digits."""
    config = federated(
        cache,
        data={"name": "digits"},
        model={"name": "resnet18", "width": 8},
        algorithm={"name": method, "sparsity": 0.9},
        server={"name": "fedavg", "momentum": 0.5},
        partition={"clients": 60, "alpha": 0.3},
        local={"lr": 0.05},
        cohort=3,
        stop_after=3,
    )
    federation = Federation.of(config)
    assert federation.layout.prunable_size > 170_000
    drive(RunFolder.create(tmp_path / "reference", config), federation)
    folder = RunFolder.create(tmp_path / "run", config)
    drive(folder, federation, killed_at=2)
    assert list_rounds(folder.checkpoints) == [2]
    drive(folder, federation)
    assert_same_run(tmp_path / "run", tmp_path / "reference")


# ------------------------------------------------------------------------------------------- SIGKILL

#: 700,000 weights and clients of unequal size: sums that were grouped differently would show.
WIDE = {
    "data": {"name": "digits"},
    "model": {"name": "resnet18", "width": 16},
    "partition": {"clients": 60, "alpha": 0.3},
    "cohort": 3,
}

KILL = """
import os, signal, sys, time
from pathlib import Path
from cluster import execution
from cluster.rounds.driver import Driver
from cluster.records.run_folder import RunFolder

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before_the_checkpoint():
    write = Driver.checkpoint
    Driver.checkpoint = lambda self, snapshot: die() if self.state.round == 4 else write(self, snapshot)

def inside_the_write():
    replace = os.replace
    os.replace = lambda source, target: die() if "round-000004" in str(target) else replace(source, target)

def inside_a_line():
    append = RunFolder.append_round
    def torn(folder, line):
        if line["round"] < 4:
            return append(folder, line)
        with open(folder.rounds_file, "a") as file:
            file.write('{"round": 4, "timestamp": 17')
            file.flush()
            die()
    RunFolder.append_round = torn

for point in (before_the_checkpoint, inside_the_write, inside_a_line):
    child = os.fork()
    if child == 0:
        point()
        execution.run(RunFolder(Path(sys.argv[1])).config(), Path(sys.argv[2]) / point.__name__)
        os._exit(0)
    print(point.__name__, os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_sigkill_at_the_worst_moments(cache, tmp_path):
    config = federated(cache, **VARIANTS["feddst, momentum"], **WIDE)
    assert len(set(Federation.of(config).sizes.tolist())) > 5
    cluster.run(config, tmp_path / "reference")
    ended = python(KILL, tmp_path / "reference", tmp_path)
    points = dict(line.split() for line in ended.stdout.splitlines())
    assert points == dict.fromkeys(["before_the_checkpoint", "inside_the_write", "inside_a_line"], "9"), (
        ended.stderr
    )
    for point in points:
        folder = RunFolder(tmp_path / point)
        left = list_rounds(folder.checkpoints)
        assert left == ([2, 4] if point == "inside_a_line" else [2])
        assert not (folder.path / "result.json").exists()
        assert [line["round"] for line in folder.rounds()] == [1, 2, 3]
        cluster.resume(folder.path)
        assert_same_run(folder.path, tmp_path / "reference")
        assert not list(folder.path.rglob(".*.tmp"))


KILL_BEFORE_THE_FLUSH = """
import os, signal, sys, time
from pathlib import Path
from cluster import execution
from cluster.records import tracking
from cluster.records.run_folder import RunFolder
from mlflow.tracking import MlflowClient

# Rounds are sent as they happen, and the process dies with round 3 in its hands.
for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").startswith("cluster.") and hasattr(module, "_GATHER_S"):
        module._GATHER_S = 0.02
log_batch = MlflowClient.log_batch

def send(self, run_id, metrics=(), **more):
    if any(metric.step == 3 for metric in metrics):
        os.kill(os.getpid(), signal.SIGKILL)
    return log_batch(self, run_id, metrics=metrics, **more)

MlflowClient.log_batch = send
folder = Path(sys.argv[2])

def wait(line):
    deadline = time.monotonic() + 120
    while line["round"] == 2 and time.monotonic() < deadline:
        import json
        if json.loads((folder / "tracking.json").read_text())["rounds_delivered"] >= 2:
            break
        time.sleep(0.02)
    while line["round"] == 4 and time.monotonic() < deadline:
        time.sleep(0.02)  # round 3 is on its way

execution.run(RunFolder(Path(sys.argv[1])).config(), folder, progress=wait)
"""


def points_in_mlflow(database):
    """(run, key, step) of every point, from the store itself."""
    with sqlite3.connect(database) as store:
        return store.execute("select run_uuid, key, step from metrics").fetchall()


def test_sigkill_before_the_flush_to_mlflow(cache, tmp_path):
    database = tmp_path / "mlflow.db"
    tracked = {"enabled": True, "uri": f"sqlite:///{database}"}
    config = federated(cache, tracking=tracked, **WIDE)
    untracked = federated(cache, **WIDE)
    cluster.run(untracked, tmp_path / "reference")
    # The configuration travels in a folder of its own: nothing may be in the run's.
    RunFolder.create(tmp_path / "asked", config)
    ended = python(KILL_BEFORE_THE_FLUSH, tmp_path / "asked", tmp_path / "run")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    cursor = json.loads((tmp_path / "run" / "tracking.json").read_text())
    assert cursor["run_id"]
    before = points_in_mlflow(database)
    assert {step for _, _, step in before} == {1, 2}
    result = cluster.resume(tmp_path / "run")
    assert result.summary["mlflow_run_id"] == cursor["run_id"]
    assert result.summary["tracking_delivered"]
    assert_same_run(tmp_path / "run", tmp_path / "reference")
    after = points_in_mlflow(database)
    assert {run for run, _, _ in after} == {cursor["run_id"]}
    assert len(after) == len(set(after))  # exactly one point a key and step
    logged = {(key, step) for _, key, step in after if not key.startswith(("final/", "system/"))}
    lines = RunFolder(tmp_path / "run").rounds()
    assert {step for key, step in logged if key == "test/accuracy"} == {1, 2, 3, 4, 5}
    numbers = {
        (key, line["round"])
        for line in lines
        for key, value in line.items()
        if isinstance(value, (int, float)) and key not in ("round", "timestamp")
    }
    assert numbers <= logged
    with sqlite3.connect(database) as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
