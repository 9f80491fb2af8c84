"""`ray job submit` and `submit.py` end to end: a head with a token, a job, the results of a local run."""

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RAY = str(Path(sys.executable).with_name("ray"))

#: The experiment: few of a million clients, none of whom is ever listed.
WORDS = ["quickstart", "rounds=2", "cohort=4", "local.epochs=1", "tracking.enabled=false"]
WORDS += ["partition.name=sampled", "partition.clients=1000000", "partition.alpha=0.5"]
WORDS += ["model.channels=[8, 16]", "model.hidden=32"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A real head node that dies with its process; the token stays in a folder of the test."""
    token = tmp_path_factory.mktemp("head") / "token"
    token.write_text(secrets.token_hex(32))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port, dashboard = free_port(), free_port()
    # Ray's sockets want a short path.
    folder = Path(f"/tmp/sparsyfed-{os.getpid()}-{dashboard}")
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--num-cpus=2", "--object-store-memory=300000000", f"--temp-dir={folder}"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            request = urllib.request.Request(
                f"{address}/api/version", headers={"Authorization": f"Bearer {token.read_text()}"}
            )
            urllib.request.urlopen(request, timeout=5)
            break
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, "ray start ended by itself"
            time.sleep(0.5)
    yield address, f"127.0.0.1:{port}", environment
    process.terminate()
    process.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def words(cache):
    """The arguments of all three."""
    return ["run", *WORDS, f"data.cache={cache}"]


@pytest.fixture(scope="module")
def local(words, tmp_path_factory):
    """The folder of the same experiment in one process."""
    folder = tmp_path_factory.mktemp("local") / "run"
    command = [sys.executable, "-m", "cluster", *words, "execution=inline", "--output", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("token", [None, "wrong", "0" * 64])
def test_without_the_heads_token_nothing_is_told(head, token):
    dashboard, _, _ = head
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    for path in (
        "/api/version",
        "/api/jobs/",
        "/nodes?view=summary",
        "/api/v0/actors",
        "/api/cluster_status",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(dashboard + path, headers=headers), timeout=30)
        assert refused.value.code in (401, 403), path


def assert_same_results(found, expected):
    """Accuracy and model file, byte by byte."""
    results = [json.loads((folder / "result.json").read_text()) for folder in (found, expected)]
    assert results[0]["complete"]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["partition_hash"] == results[1]["partition_hash"]
    models = [(folder / "model.safetensors").read_bytes() for folder in (found, expected)]
    assert models[0] == models[1]


def test_a_submitted_job_leaves_the_results_of_a_local_run(head, words, local, tmp_path):
    dashboard, _, environment = head
    command = [RAY, "job", "submit", "--address", dashboard, "--working-dir", ".", "--"]
    command += ["python", "-m", "cluster", *words, "address=auto", "--output", str(tmp_path / "job")]
    for _ in range(30):
        submitted = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
        )
        if "No available agent" not in submitted.stderr:  # the head answers before its agent does
            break
        time.sleep(1)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout + submitted.stderr
    assert_same_results(tmp_path / "job", local)


def test_submit_py_as_ray_submit_starts_it_leaves_the_results_of_a_local_run(head, words, local, tmp_path):
    """`ray submit` copies one file to the head's home and has a shell read the words, joined by spaces."""
    _, address, environment = head
    shutil.copy(ROOT / "ray_configs" / "submit.py", tmp_path)
    # The head knows its own address, and the package by its setup_commands.
    environment = {**environment, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    command = " ".join([shlex.quote(sys.executable), "submit.py", *words, "--output", "runs/submitted"])
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ray at auto" in done.stdout  # which `run` was not told
    assert_same_results(tmp_path / "runs" / "submitted", local)
