"""Every round reaches MLflow exactly once, whatever happens to the run that writes it.

Real parts throughout: an SQLite store, asked by MLflow's own client what it holds.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.records import tracking_store
from cluster.records.tracking import TrackingError, sync
from tests.cluster.records.tracked_runs import (
    DATASET,
    DEADLINE_S,
    METRICS,
    cursor_of,
    finish,
    runs_of,
    steps,
    tracker,
    wait_for,
    write,
)

pytestmark = pytest.mark.usefixtures("fast_tracking")


def test_importing_and_starting_do_not_wait_for_mlflow() -> None:
    code = "import sys, cluster.records.tracking; sys.exit('mlflow' in sys.modules)"
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
    delivery = run._couriers[0]._delivery
    assert delivery.deliver(False, lambda: False)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write(line[20:])
    assert delivery.deliver(False, lambda: False)
    assert steps(store, run.run_id) == [1]
    delivery.release()


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


def test_files_that_are_not_a_tracked_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"holds no tracking\.json"):
        sync(tmp_path)
    (tmp_path / "tracking.json").write_text("{")
    with pytest.raises(TrackingError, match=r"tracking\.json is damaged"):
        sync(tmp_path)
