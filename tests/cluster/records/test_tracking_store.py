"""The store's side of tracking: servers that hang or die, two runs on a new store, `check`, the pages.

Real parts throughout: SQLite stores, and an `mlflow server` that is stopped and killed in the middle.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.records import tracking_store
from cluster.records.tracking import Tracker, TrackingError, TrackingTarget, check, sync
from tests.cluster.records.tracked_runs import (
    DATASET,
    DEADLINE_S,
    cursor_of,
    finish,
    runs_of,
    steps,
    tracker,
    wait_for,
    write,
)

pytestmark = pytest.mark.usefixtures("fast_tracking")


class Server:
    """A tracking server that can be killed, stopped, continued, and started again on its port and store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda: tracking_store.answers(self.uri), "the server to answer")

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


def test_of_an_error_that_is_wrapped_what_happened_is_told() -> None:
    wrapped = (
        "(raised as a result of Query-invoked autoflush; consider ...)\n(sqlite3.OperationalError) full\n[SQL"
    )
    assert tracking_store.first_line(ValueError(wrapped)) == "(sqlite3.OperationalError) full"
    assert tracking_store.first_line(ValueError()) == "ValueError"
    assert tracking_store.first_line(ValueError("a" * 400)) == "a" * 300


def test_runs_that_begin_at_the_same_moment_share_a_new_store(tmp_path: Path) -> None:
    """Two processes, a store that does not exist yet, one experiment to be created."""
    code = """
import sys, pathlib
from cluster.records.tracking import Tracker, TrackingTarget
folder = pathlib.Path(sys.argv[1])
run = Tracker(folder, TrackingTarget(sys.argv[2], "shared", folder.name), params={}, tags={})
run.start()
complete = run.finish("FINISHED", [], {}, 180.0)
print(complete, run.problem)
"""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    processes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", code, str(tmp_path / name), uri]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    answers = [process.communicate(timeout=200) for process in processes]
    assert [(out, err) for out, err in answers] == [("True None\n", ""), ("True None\n", "")]
    assert len(runs_of(uri, "shared")) == 2


def test_a_server_that_hangs_holds_nothing_up(server: Server, tmp_path: Path) -> None:
    run = tracker(tmp_path, server.uri)
    run.start()
    write(tmp_path, 0)
    run.round_written()
    wait_for(lambda: cursor_of(tmp_path)["rounds_delivered"] == 1, "round 0")
    server.signal(signal.SIGSTOP)
    try:
        for number in range(1, 51):
            write(tmp_path, number)
            run.round_written()
        wait_for(lambda: run.problem, "the hang to be noticed")
        assert cursor_of(tmp_path)["rounds_delivered"] == 1
        assert not run.finish("FINISHED", [], {}, 0.2)
        wait_for(lambda: not run._couriers[0].thread.is_alive(), "the thread to give up after its deadline")
    finally:
        server.signal(signal.SIGCONT)
    assert sync(tmp_path, deadline_s=DEADLINE_S).complete
    assert steps(server.uri, run.run_id) == list(range(51))
    assert runs_of(server.uri, tmp_path.name) == [run.run_id]


def test_a_server_that_dies_in_mid_run_gets_everything_once(server: Server, tmp_path: Path) -> None:
    run = tracker(tmp_path, server.uri, dataset=DATASET)
    run.start()
    for number in range(30):
        write(tmp_path, number)
        run.round_written()
        if number == 10:
            wait_for(lambda: cursor_of(tmp_path)["rounds_delivered"], "a first delivery")
            server.kill()
    wait_for(lambda: run.problem, "the outage to be noticed")
    assert server.uri in str(run.problem)
    server.start()
    wait_for(lambda: run.problem is None, "the end of the outage")
    write(tmp_path, 30)
    picture = tmp_path / "partition.png"
    picture.write_bytes(b"picture")
    assert finish(run, picture)
    assert steps(server.uri, run.run_id) == list(range(31))

    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.uri)
    assert [artifact.path for artifact in client.list_artifacts(str(run.run_id))] == ["partition.png"]
    inputs = client.get_run(str(run.run_id)).inputs
    assert inputs is not None
    assert len(inputs.dataset_inputs) == 1  # not once more after the outage


def test_check_accepts_what_can_be_used(store: str, server: Server) -> None:
    check(store)
    check(server.uri)
    check(server.uri + "/")


def test_check_refuses_what_cannot_and_names_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        port = silent.getsockname()[1]
        with pytest.raises(TrackingError, match=rf"127.0.0.1:{port} does not answer"):
            check(f"http://127.0.0.1:{port}", timeout_s=0.2)
    with pytest.raises(TrackingError, match=rf"127.0.0.1:{port} does not answer .*refused"):
        check(f"http://127.0.0.1:{port}")
    with pytest.raises(TrackingError, match="/no/such does not exist"):
        check("sqlite:////no/such/mlflow.db")
    with pytest.raises(TrackingError, match="names no file"):
        check("sqlite:///:memory:")
    text = tmp_path / "notes.db"
    text.write_text("some other file, not a database")
    with pytest.raises(TrackingError, match=r"notes\.db is not an SQLite database"):
        check(f"sqlite:///{text}")
    for uri in ("file:///tmp/mlruns", "./mlruns", "postgresql://host/db"):
        with pytest.raises(TrackingError, match=f"'{uri}' is not supported"):
            check(uri)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        check("https://me:secret@mlflow.example.org")
    assert "secret" not in str(refusal.value)


def test_the_last_runs_are_those_of_one_experiment_and_no_studies_nor_comparisons(
    store: str, tmp_path: Path
) -> None:
    found = []
    for place, kind in enumerate(["run", "trial", "study", "comparison"]):
        folder = tmp_path / kind
        folder.mkdir()
        run = Tracker(
            folder, TrackingTarget(store, "last runs", kind), params={}, tags={"kind": kind}, dataset=None
        )
        run._couriers[0].cursor.created_ms = 4_000_000_000_000 + place
        run.start()
        assert finish(run)
        found.append(run.run_id)
    assert tracking_store.last_runs(store)[1] == found[:2]
    from mlflow.tracking import MlflowClient

    for run_id in found:  # of the far future: other tests ask for the newest
        MlflowClient(store).delete_run(str(run_id))


def test_a_relative_store_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker(tmp_path, "sqlite:///mlflow.db")
    assert cursor_of(tmp_path)["uri"] == f"sqlite:///{tmp_path}/mlflow.db"


def test_the_pages_show_a_run_and_its_artifacts(store: str, tmp_path: Path) -> None:
    run = tracker(tmp_path, store, tags={"method": "fedavg", "kind": "run"})
    picture = tmp_path / "partition.png"
    picture.write_bytes(b"picture")
    write(tmp_path, 1)
    run.start()
    assert finish(run, picture)
    experiment, runs = tracking_store.last_runs(store)
    assert runs == [run.run_id]

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # Under a shell's `&` SIGINT is ignored; here it is a Ctrl-C.
        code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += f"from cluster.records.tracking import serve_ui; sys.exit(serve_ui({store!r}, port={port}))"
        pages = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert pages.stdout is not None
        assert pages.stdout.readline().startswith(f"port {port} is in use, taking ")
        address = pages.stdout.readline().split()[4]
        page = f"{address}/#/experiments/{experiment}/runs/{run.run_id}?workflowType=machine_learning"
        assert pages.stdout.readline() == f"its run: {page}\n"
    try:
        query = urllib.parse.urlencode({"run_id": run.run_id})
        with urllib.request.urlopen(f"{address}/api/2.0/mlflow/artifacts/list?{query}") as answer:
            assert [each["path"] for each in json.load(answer)["files"]] == ["partition.png"]
        with urllib.request.urlopen(f"{address}/get-artifact?path=partition.png&{query}") as answer:
            assert answer.read() == b"picture"
        with urllib.request.urlopen(address) as answer:
            assert b"<html" in answer.read()
    finally:
        pages.send_signal(signal.SIGINT)
        assert pages.wait(15) == 0
    assert not tracking_store.answers(address)
