"""The driver on a real cluster of three nodes: killed and resumed, detached, attached to, stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import cluster
from cluster.actors import remote
from cluster.actors.ray_session import ClusterError
from cluster.cli import main
from cluster.configuration.config import validate
from cluster.records.run_folder import RunFolder
from tests.cluster.actors.three_nodes import assert_same_run, config, inline


def test_the_driver_killed_in_mid_run_resumes_on_the_same_cluster(nodes, place, tmp_path):
    slow = {"name": "tests.cluster.actors.test_nodes_driver:SlowModel"}
    settings = config(place, rounds=6, model=slow, actors=2)  # a busy machine may take a round to kill it
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
    assert len(RunFolder(tmp_path / "run").rounds()) < 6
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


def test_a_detached_run_is_left_listed_attached_to_and_stopped(nodes, place, tmp_path, capfd, monkeypatch):
    method = {"name": "tests.example_method:RandomK", "sparsity": 0.5}
    settings = config(place, actors=2, detached=True, algorithm=method)
    (tmp_path / "experiment.yaml").write_text(json.dumps(settings.dump()))
    command = [sys.executable, "-m", "cluster", "run", str(tmp_path / "experiment.yaml"), "rounds=5000"]
    command += [f"address={nodes.address}", "--output", str(tmp_path / "long")]
    for _ in range(3):  # Ray loses a worker that starts on an overloaded machine now and then
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("round "):
                break
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=120)
        if "the driver died" not in complaints:
            break
        shutil.rmtree(tmp_path / "long", ignore_errors=True)
    assert process.returncode == 130, complaints
    (name,) = remote.drivers()
    assert f"the run goes on; see it with: sparsyfed attach {name} --address {nodes.address}" in complaints
    assert name.startswith("long-")

    # Who looks need not have the code that the run names.
    monkeypatch.setitem(sys.modules, "tests.example_method", None)
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
    monkeypatch.undo()
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_whole_process_group_and_the_run_still_ends_after_its_round(
    place, tmp_path, number
):
    settings = config(place, actors=1)
    (tmp_path / "experiment.yaml").write_text(json.dumps(settings.dump()))
    command = [sys.executable, "-m", "cluster", "run", str(tmp_path / "experiment.yaml"), "rounds=5000"]
    command += ["address=local", "--output", str(tmp_path / "long")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Under nohup the tests hand on that SIGHUP is ignored, which a run respects.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith("round "):
            break
    os.killpg(process.pid, number)  # as a terminal does: to Ray's processes too
    shown, complaints = process.communicate(timeout=120)
    assert process.returncode == 130, complaints
    assert "stopping after this round" in complaints
    assert "sparsyfed resume" in shown
    folder = RunFolder(tmp_path / "long")
    assert (folder.checkpoints / f"round-{len(folder.rounds()):06d}.safetensors").is_file()
