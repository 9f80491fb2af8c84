"""`ray job submit` end to end, as the README shows it: a head with a token, a job, its results."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(tmp_path):
    """A real head node that dies with its process; the token stays in a folder of the test."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    dashboard = free_port()
    # Ray's sockets want a short path.
    folder = Path(f"/tmp/sparsyfed-{os.getpid()}-{dashboard}")
    command = [RAY, "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}"]
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
    yield address, environment
    process.terminate()
    process.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job_leaves_the_results_of_a_local_run(head, tmp_path):
    address, environment = head
    overrides = ["rounds=2", "cohort=4", "local.epochs=1", "tracking.enabled=false"]
    command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--"]
    command += ["python", "-m", "cluster", "run", "quickstart", "address=auto", *overrides]
    command += ["--output", str(tmp_path / "job")]
    for _ in range(30):
        submitted = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
        )
        if "No available agent" not in submitted.stderr:  # the head answers before its agent does
            break
        time.sleep(1)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout + submitted.stderr
    local = ["-m", "cluster", "run", "quickstart", "execution=inline", *overrides]
    subprocess.run([sys.executable, *local, "--output", str(tmp_path / "local")], cwd=ROOT, check=True)
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("job", "local")]
    assert results[0]["complete"]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    models = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("job", "local")]
    assert models[0] == models[1]
