"""Every round reaches MLflow exactly once, whatever happens to the server or to the run.

Real parts throughout: an SQLite store, and an `mlflow server` that is stopped and killed in the middle.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import tracking, tracking_store
from cluster.tracking import Tracker, TrackingError, TrackingTarget, check, sync

METRICS = {"test/accuracy": 0.5, "comm/uplink_bytes": 1000}
DATASET = {"name": "digits", "digest": "d" * 64, "source_type": "local", "source": "scikit-learn"}
DEADLINE_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def _fast_and_quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in tracking_store.QUIET_DEFAULTS.items():
            patch.setenv(key, value)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        patch.setattr(tracking, "_GATHER_S", 0.02)
        patch.setattr(tracking, "_FIRST_RETRY_S", 0.1)
        patch.setattr(tracking, "_LAST_RETRY_S", 0.3)
        patch.setattr(tracking, "_CLOSING_RETRY_S", 0.2)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests (its first use costs seconds), in a folder with a space in its name."""
    return f"sqlite:///{tmp_path_factory.mktemp('a store')}/mlflow.db"


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


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE_S} s for {what}"
        time.sleep(0.02)


def write(folder: Path, number: int, **values: object) -> None:
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": number, **METRICS, **values}) + "\n")


def tracker(folder: Path, uri: str, **changes: object) -> Tracker:
    """A tracker of `folder`, in the experiment named after the test's own folder."""
    arguments = {"params": {"rounds": 3}, "tags": {"method": "fedavg"}, "dataset": None, **changes}
    return Tracker(folder, TrackingTarget(uri, folder.name, "fedavg-1"), **arguments)  # type: ignore[arg-type]


def finish(tracker: Tracker, *artifacts: Path, summary: dict[str, float] | None = None) -> bool:
    return tracker.finish("FINISHED", artifacts, summary or {}, DEADLINE_S)


def steps(uri: str, run_id: str | None, metric: str = "test/accuracy") -> list[int]:
    from mlflow.tracking import MlflowClient

    assert run_id is not None
    return sorted(point.step for point in MlflowClient(uri).get_metric_history(run_id, metric))


def runs_of(uri: str, experiment: str) -> list[str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return [run.info.run_id for run in client.search_runs([found.experiment_id])]


def cursor_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "tracking.json").read_text()))


def test_importing_and_starting_do_not_wait_for_mlflow() -> None:
    code = "import sys, cluster.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_arrives_whole(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    folder, elsewhere = tmp_path / "whole", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # MLflow's own artifact folder would appear here
    params = {f"key.{i}": i for i in range(230)} | {"long": "x" * 7000, "odd (key)": None}
    tags = {"method": "fedavg", "mlflow.note.content": "what it is"}
    run = tracker(folder, store, params=params, tags=tags, dataset=DATASET)
    run.start()
    for number in range(1, 4):
        write(folder, number, timestamp=1.7e9 + number, **{"val/accuracy": number / 10})
        run.round_written()
    odd = {"missing": None, "none": float("nan"), "huge": float("inf"), "list": [1], "text": "a", "yes": True}
    write(folder, 4, **odd)
    picture = folder / "partition.png"
    picture.write_bytes(b"picture")
    assert finish(run, picture, folder / "not there.csv", summary={"final/accuracy": 0.75})

    stored = MlflowClient(store).get_run(str(run.run_id))
    assert steps(store, run.run_id) == [1, 2, 3, 4]
    points = MlflowClient(store).get_metric_history(str(run.run_id), "val/accuracy")
    assert [(p.step, p.value, p.timestamp) for p in points] == [
        (1, 0.1, 1_700_000_001_000),
        (2, 0.2, 1_700_000_002_000),
        (3, 0.3, 1_700_000_003_000),
    ]
    assert set(stored.data.metrics) == {*METRICS, "val/accuracy", "final/accuracy"}
    assert stored.data.metrics["final/accuracy"] == 0.75
    assert len(stored.data.params) == 232
    assert stored.data.params["key.229"] == "229"
    assert stored.data.params["odd _key_"] == "None"
    assert len(stored.data.params["long"]) == 6000
    assert stored.data.tags["method"] == "fedavg"
    assert stored.data.tags["mlflow.note.content"] == "what it is"
    assert stored.info.run_name == "fedavg-1"
    assert stored.info.status == "FINISHED"
    assert stored.inputs is not None
    dataset = stored.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, dataset.source) == ("digits", "d" * 36, "scikit-learn")
    artifacts = tracking_store.artifact_folder(store) / str(run.run_id) / "artifacts"
    assert [path.name for path in artifacts.iterdir()] == ["partition.png"]
    assert list(elsewhere.iterdir()) == []


def test_a_resumed_run_continues_in_the_same_mlflow_run(store: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    first = tracker(tmp_path, store)
    first.start()
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert finish(first, summary={"final/accuracy": 0.1})

    # A changed parameter would make MLflow refuse the batch: the first value stays, a new one is added.
    resumed = tracker(tmp_path, store, params={"rounds": 5, "new": 1}, tags={"method": "topk"})
    resumed.start()
    wait_for(lambda: MlflowClient(store).get_run(str(first.run_id)).info.status == "RUNNING", "RUNNING")
    write(tmp_path, 3)
    resumed.round_written()
    assert finish(resumed, summary={"final/accuracy": 0.2})

    assert resumed.run_id == first.run_id
    assert steps(store, first.run_id) == [1, 2, 3]
    stored = MlflowClient(store).get_run(str(first.run_id))
    assert stored.data.params == {"rounds": "3", "new": "1"}
    assert stored.data.tags["method"] == "topk"
    assert stored.data.metrics["final/accuracy"] == 0.2
    assert stored.info.status == "FINISHED"


@pytest.mark.parametrize("safeguard", ["asking the server", "fixed timestamps"])
def test_a_cursor_that_fell_behind_sends_nothing_twice(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safeguard: str
) -> None:
    """The crash between a delivery and its note in tracking.json: each of the safeguards alone suffices."""
    from mlflow.tracking import MlflowClient

    folder = tmp_path / f"behind-{safeguard.replace(' ', '-')}"
    folder.mkdir()
    run = tracker(folder, store)
    write(folder, 1)
    run.start()
    wait_for(lambda: cursor_of(folder)["rounds_delivered"] == 1, "round 1")
    old = (folder / "tracking.json").read_bytes()
    for number in range(2, 6):
        write(folder, number)
    assert finish(run)
    (folder / "tracking.json").write_bytes(old)
    write(folder, 6)

    sent: list[int] = []
    log_batch = MlflowClient.log_batch

    def spy(self: MlflowClient, run_id: str, metrics: object = (), **rest: object) -> None:
        sent.extend(metric.step for metric in metrics)  # type: ignore[attr-defined]
        log_batch(self, run_id, metrics=metrics, **rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", spy)
        if safeguard == "fixed timestamps":  # the server answered before it carried out the older request
            patch.setattr(MlflowClient, "get_metric_history", lambda *_: [])
        assert sync(folder, deadline_s=DEADLINE_S).complete
    assert set(sent) == ({6} if safeguard == "asking the server" else {2, 3, 4, 5, 6})
    assert steps(store, run.run_id) == [1, 2, 3, 4, 5, 6]
    assert runs_of(store, folder.name) == [run.run_id]


@pytest.mark.parametrize("call", ["create_run", "log_batch", "log_artifact", "set_terminated"])
def test_an_answer_that_got_lost_leads_to_no_second_copy(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The server does what it is asked, but its first answer does not arrive."""
    from mlflow.tracking import MlflowClient

    folder = tmp_path / f"lost-{call}"
    folder.mkdir()
    original = getattr(MlflowClient, call)
    calls: list[dict[str, Any]] = []

    def lossy(self: MlflowClient, *arguments: object, **named: Any) -> object:
        result = original(self, *arguments, **named)
        if call != "log_batch" or "metrics" in named:
            calls.append(named)
            if len(calls) == 1:
                raise ConnectionError("the answer got lost")
        return result

    monkeypatch.setattr(MlflowClient, call, lossy)
    run = tracker(folder, store)
    for number in range(4):
        write(folder, number)
    run.start()
    assert finish(run, folder / "rounds.jsonl")
    assert calls
    # A run found again is not created again, a point found is not sent again.
    assert call != "create_run" or len(calls) == 1
    sent = [(point.key, point.step) for named in calls for point in named.get("metrics", ())]
    assert len(sent) == len(set(sent))
    assert steps(store, run.run_id) == [0, 1, 2, 3]
    assert runs_of(store, folder.name) == [run.run_id]


def test_a_creation_carried_out_late_leaves_one_run(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hung server that creates the run only after it was asked again: the spare one is removed."""
    from mlflow.tracking import MlflowClient

    original, late = MlflowClient.create_run, list[Callable[[], object]]()

    def hung_once(self: MlflowClient, *arguments: object, **named: object) -> object:
        if not late:
            late.append(lambda: original(self, *arguments, **named))  # type: ignore[arg-type]
            raise TimeoutError("no answer")
        return original(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(MlflowClient, "create_run", hung_once)
    run = tracker(tmp_path, store)
    write(tmp_path, 1)
    run.start()
    wait_for(lambda: cursor_of(tmp_path)["rounds_delivered"] == 1, "round 1")
    late[0]()
    assert len(runs_of(store, tmp_path.name)) == 2
    assert finish(run)
    assert runs_of(store, tmp_path.name) == [run.run_id]


def test_sync_delivers_from_the_files_alone_and_only_once(store: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    written = tmp_path / "written"
    written.mkdir()
    run = tracker(written, store)  # never started, as if MLflow had been away throughout
    for number in range(600):
        write(written, number, **{f"layer/{i}": i for i in range(4)})
    (written / "curves.png").write_bytes(b"curves")
    assert not finish(run, written / "curves.png", summary={"final/accuracy": 0.5})
    assert run.run_id is None

    moved = written.rename(tmp_path / "moved")
    report = sync(moved, deadline_s=DEADLINE_S)
    assert report.complete
    assert report.problem is None
    assert (report.rounds, report.rounds_in_total) == (600, 600)
    before = MlflowClient(store).get_run(str(report.run_id))
    again = sync(moved, deadline_s=DEADLINE_S)
    assert (again.complete, again.rounds, again.run_id) == (True, 0, report.run_id)
    assert MlflowClient(store).get_run(str(report.run_id)).info.end_time == before.info.end_time
    assert before.info.status == "FINISHED"
    for metric in ("test/accuracy", "layer/3"):
        assert steps(store, report.run_id, metric) == list(range(600))
    assert steps(store, report.run_id, "final/accuracy") == [599]
    assert [a.path for a in MlflowClient(store).list_artifacts(str(report.run_id))] == ["curves.png"]


def test_a_round_of_many_metrics_is_split_into_batches(store: str, tmp_path: Path) -> None:
    run = tracker(tmp_path, store)
    write(tmp_path, 1, **{f"wide/{i}": i for i in range(2100)})
    run.start()
    assert finish(run)
    assert steps(store, run.run_id, "wide/2099") == [1]


def test_a_half_written_line_waits_for_its_end(store: str, tmp_path: Path) -> None:
    run = tracker(tmp_path, store)
    line = json.dumps({"round": 1, **METRICS}) + "\n"
    (tmp_path / "rounds.jsonl").write_text(line[:20])
    assert run._delivery.deliver(False, lambda: False)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write(line[20:])
    assert run._delivery.deliver(False, lambda: False)
    assert steps(store, run.run_id) == [1]
    run._delivery.release()


def test_sync_of_an_interrupted_run_marks_it_killed(store: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    tracker(tmp_path, store)
    write(tmp_path, 1)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('not a round\n{"round": 2, "test/accu')  # torn by the crash
    report = sync(tmp_path, deadline_s=DEADLINE_S)
    assert report.complete
    assert steps(store, report.run_id) == [1]
    assert MlflowClient(store).get_run(str(report.run_id)).info.status == "KILLED"


def test_sync_leaves_a_run_alone_that_is_still_going(store: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run = tracker(tmp_path, store)
    run.start()
    wait_for(lambda: run.run_id, "the run")
    write(tmp_path, 1)
    report = sync(tmp_path, deadline_s=0.5)
    assert not report.complete
    assert report.rounds == 0
    assert "another process" in str(report.problem)
    assert MlflowClient(store).get_run(str(run.run_id)).info.status == "RUNNING"  # not KILLED
    assert finish(run)
    assert sync(tmp_path, deadline_s=DEADLINE_S).complete
    assert steps(store, run.run_id) == [1]


def test_a_run_deleted_in_mlflow_is_delivered_anew(store: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run = tracker(tmp_path, store)
    run.start()
    write(tmp_path, 1)
    assert finish(run)
    MlflowClient(store).delete_run(str(run.run_id))
    report = sync(tmp_path, deadline_s=DEADLINE_S)
    assert report.complete
    assert report.run_id != run.run_id
    assert steps(store, report.run_id) == [1]


def test_runs_that_begin_at_the_same_moment_share_a_new_store(tmp_path: Path) -> None:
    """Two processes, a store that does not exist yet, one experiment to be created."""
    code = """
import sys, pathlib
from cluster.tracking import Tracker, TrackingTarget
folder = pathlib.Path(sys.argv[1])
run = Tracker(folder, TrackingTarget(sys.argv[2], "shared", folder.name), params={}, tags={})
run.start()
complete = run.finish("FINISHED", [], {}, 60.0)
print(complete, run.problem)
"""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    processes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", code, str(tmp_path / name), uri]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    answers = [process.communicate(timeout=90) for process in processes]
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
        wait_for(lambda: not run._thread.is_alive(), "the thread to give up after its deadline")
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


def test_files_that_are_not_a_tracked_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"holds no tracking\.json"):
        sync(tmp_path)
    (tmp_path / "tracking.json").write_text("{")
    with pytest.raises(TrackingError, match=r"tracking\.json is damaged"):
        sync(tmp_path)


def test_a_relative_store_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker(tmp_path, "sqlite:///mlflow.db")
    assert cursor_of(tmp_path)["uri"] == f"sqlite:///{tmp_path}/mlflow.db"


def test_the_pages_show_a_run_and_its_artifacts(store: str, tmp_path: Path) -> None:
    run = tracker(tmp_path, store)
    picture = tmp_path / "partition.png"
    picture.write_bytes(b"picture")
    write(tmp_path, 1)
    run.start()
    assert finish(run, picture)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # Under a shell's `&` SIGINT is ignored; here it is a Ctrl-C.
        code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += f"from cluster.tracking import serve_ui; sys.exit(serve_ui({store!r}, port={port}))"
        pages = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert pages.stdout is not None
        assert pages.stdout.readline().startswith(f"port {port} is in use, taking ")
        address = pages.stdout.readline().split()[4]
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
