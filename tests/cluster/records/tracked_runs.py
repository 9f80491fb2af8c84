"""A tracked run as its driver plays it, without the driver, and what MLflow holds of it afterwards."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from cluster.records.tracking import Tracker, TrackingTarget

METRICS = {"test/accuracy": 0.5, "comm/uplink_bytes": 1000}
DATASET = {"name": "digits", "digest": "d" * 64, "source_type": "local", "source": "scikit-learn"}
DEADLINE_S = 180.0


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
