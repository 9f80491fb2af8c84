"""What a run is in MLflow, how much of it has arrived, and the calls that deliver the rest."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from cluster.records.sqlite_store import TrackingError
from cluster.records.tracking_store import connect, find_experiment

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

# MLflow's own limits (mlflow/utils/validation.py).
_METRICS_PER_BATCH, _PARAMS_PER_BATCH = 1000, 100
KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH, DIGEST_LENGTH = 250, 6000, 8000, 36

# A tag that finds a run again whose creation was not confirmed.
_OUTBOX_TAG = "sparsyfed.outbox"

_logger = logging.getLogger("sparsyfed.tracking")
_save_lock = threading.Lock()


@dataclass
class Ending:
    """How a run ended; kept in the cursor so that ``sync`` can deliver it from the files alone."""

    status: str
    end_ms: int
    artifacts: list[str]  # relative inside the run's folder, which may be moved; absolute outside it
    summary: dict[str, float]


@dataclass
class Cursor:
    """What a run is in MLflow and how much of it has arrived: the content of ``tracking.json``."""

    uri: str
    experiment: str
    run_name: str
    params: dict[str, str]
    tags: dict[str, str]
    dataset: dict[str, str] | None
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    creations: int = 0
    run_id: str | None = None
    last_round: int | None = None
    rounds_delivered: int = 0
    artifacts_logged: dict[str, str] = field(default_factory=dict)
    ending: Ending | None = None

    @classmethod
    def load(cls, folder: Path) -> Cursor | None:
        """Reads a run's cursor; None where the run was never tracked."""
        path = folder / "tracking.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            ending = values.pop("ending")
            cursor = cls(**values, ending=Ending(**ending) if ending else None)
            texts, tables = (cursor.uri, cursor.experiment), (cursor.params, cursor.tags)
            if not all(isinstance(each, str) for each in texts) or not all(
                isinstance(each, dict) for each in (*tables, cursor.artifacts_logged)
            ):
                raise TypeError("a value is of another kind")
            return cursor
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrackingError(
                f"{path} is damaged ({error}); delete it to deliver the run to MLflow anew"
            ) from error

    def save(self, folder: Path) -> None:
        """Replaces the file in one step, so that a crash leaves the old or the new one."""
        with _save_lock:
            temporary = folder / "tracking.json.tmp"
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(self), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / "tracking.json")

    def forget_deliveries(self) -> None:
        """Starts over in a new MLflow run."""
        self.run_id, self.last_round, self.rounds_delivered, self.creations = None, None, 0, 0
        self.token, self.artifacts_logged = uuid.uuid4().hex, {}


class Delivery:
    """Brings MLflow up to date with a run's folder. Every method may raise whatever MLflow raises."""

    def __init__(self, folder: Path, cursor: Cursor) -> None:
        self.folder = folder
        self.cursor = cursor
        self._lock = FileLock(folder / "tracking.lock")
        self._client: MlflowClient | None = None
        self._offset = 0  # bytes of rounds.jsonl read and confirmed
        # Steps the server already holds, per metric; None where nothing unconfirmed can be there.
        self._present: dict[str, set[int]] | None = {}

    def deliver(self, closing: bool, stop: Callable[[], bool]) -> bool:
        """Sends everything new and, when ``closing``, the run's end; False if ``stop()`` cut it short."""
        try:
            if self._client is None:
                self._client = self._open()
            done = self._send_rounds(self._client, stop)
            return done and (not closing or self._send_ending(self._client, stop))
        except BaseException:
            # The outcome of the failed call is unknown: connect, look and compare again.
            self._client, self._present = None, {}
            raise

    def release(self) -> None:
        """Lets another process deliver this run."""
        self._lock.release(force=True)

    def _open(self) -> MlflowClient:
        """Connects, finds or creates the run, and describes it where MLflow differs from the cursor."""
        if not self._lock.is_locked:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise TrackingError("another process is delivering this run") from None
        client = connect(self.cursor.uri)
        run = self._existing_run(client) or self._new_run(client)
        self._describe(client, run)
        return client

    def _existing_run(self, client: MlflowClient) -> Run | None:
        from mlflow.exceptions import MlflowException

        cursor = self.cursor
        if cursor.run_id is None:
            return None
        try:
            run = client.get_run(cursor.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage == "deleted":
            _logger.warning("MLflow run %s is gone: delivering to a new one", cursor.run_id)
            cursor.forget_deliveries()
            self._offset = 0
            return None
        return run

    def _new_run(self, client: MlflowClient) -> Run:
        cursor = self.cursor
        experiment_id = find_experiment(client, cursor.uri, cursor.experiment)
        # An earlier attempt may have succeeded without our knowing.
        run = next(iter(self._runs_of_this_outbox(client, experiment_id)), None)
        if run is None:
            cursor.creations += 1
            cursor.save(self.folder)
            run = client.create_run(
                experiment_id,
                start_time=cursor.created_ms,
                tags={**cursor.tags, _OUTBOX_TAG: cursor.token},
                run_name=cursor.run_name,
            )
            self._present = None if cursor.creations == 1 else {}
        cursor.run_id = run.info.run_id
        cursor.save(self.folder)
        return run

    def _runs_of_this_outbox(self, client: MlflowClient, experiment_id: str) -> Sequence[Run]:
        rule = f"tags.`{_OUTBOX_TAG}` = '{self.cursor.token}'"
        return client.search_runs([experiment_id], rule, order_by=["attributes.start_time ASC"])

    def _describe(self, client: MlflowClient, run: Run) -> None:
        from mlflow.entities import Dataset, DatasetInput, Param, RunTag

        cursor, run_id = self.cursor, run.info.run_id
        # MLflow refuses a whole batch over one changed parameter: the values a run began with stay.
        params = [Param(k, v) for k, v in cursor.params.items() if k not in run.data.params]
        for start in range(0, len(params), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=params[start : start + _PARAMS_PER_BATCH], synchronous=True)
        tags = [RunTag(k, v) for k, v in cursor.tags.items() if run.data.tags.get(k) != v]
        for start in range(0, len(tags), _PARAMS_PER_BATCH):
            client.log_batch(run_id, tags=tags[start : start + _PARAMS_PER_BATCH], synchronous=True)
        if cursor.dataset is not None:
            dataset = Dataset(**cursor.dataset)
            known = run.inputs.dataset_inputs if run.inputs else []
            if all(each.dataset.digest != dataset.digest for each in known):
                client.log_inputs(run_id, datasets=[DatasetInput(dataset)])
        if cursor.ending is None and run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")

    def _send_rounds(self, client: MlflowClient, stop: Callable[[], bool]) -> bool:
        cursor = self.cursor
        while not stop():
            metrics, rounds, offset = self._next_rounds()
            self._send(client, metrics)
            self._offset = offset
            if not rounds:
                self._present = None  # everything written so far is confirmed
                return True
            cursor.last_round = rounds[-1]
            cursor.rounds_delivered += len(rounds)
            cursor.save(self.folder)
        return False

    def _next_rounds(self) -> tuple[list[Metric], list[int], int]:
        """Reads about one batch of rounds; returns its points, its round numbers and the offset behind it."""
        metrics: list[Metric] = []
        rounds: list[int] = []
        try:
            file = (self.folder / "rounds.jsonl").open("rb")
        except FileNotFoundError:
            return metrics, rounds, 0
        with file:
            if file.seek(0, os.SEEK_END) < self._offset:
                self._offset = 0  # a resume cut the file; rounds up to `last_round` are passed over below
            offset = file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # still being written, or torn by a crash
                    break
                offset += len(line)
                last = rounds[-1] if rounds else self.cursor.last_round
                try:
                    row = json.loads(line)
                    step = int(row.pop("round"))
                    # Without ``timestamp`` (Unix seconds): a value that is the same at every sending.
                    seconds = float(row.pop("timestamp", (self.cursor.created_ms + step) / 1000))
                except (ValueError, TypeError, KeyError, AttributeError):
                    _logger.warning("a line of %s is not a round and is passed over", file.name)
                    continue
                if last is not None and step <= last:
                    continue
                metrics += points(row, step, round(seconds * 1000))
                rounds.append(step)
                if len(metrics) >= _METRICS_PER_BATCH:
                    break
        return metrics, rounds, offset

    def _send(self, client: MlflowClient, metrics: list[Metric]) -> None:
        run_id = self.cursor.run_id
        assert run_id is not None
        if self._present is not None:
            for key in {metric.key for metric in metrics} - self._present.keys():
                self._present[key] = {point.step for point in client.get_metric_history(run_id, key)}
            metrics = [metric for metric in metrics if metric.step not in self._present[metric.key]]
        for start in range(0, len(metrics), _METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_BATCH], synchronous=True)

    def _send_ending(self, client: MlflowClient, stop: Callable[[], bool]) -> bool:
        """Sends the summary, the artifacts and, last, the status: a run shown as finished is complete."""
        cursor = self.cursor
        assert cursor.ending is not None
        assert cursor.run_id is not None
        self._present = {}  # a repeated `sync` sends the summary again
        self._send(client, points(cursor.ending.summary, cursor.last_round or 0, cursor.ending.end_ms))
        for name in cursor.ending.artifacts:
            path = self.folder / name
            if stop():
                return False
            if not path.is_file():
                _logger.warning("the artifact %s does not exist and is not logged", path)
                continue
            version = f"{path.stat().st_size}:{path.stat().st_mtime_ns}"
            if cursor.artifacts_logged.get(name) != version:
                client.log_artifact(cursor.run_id, str(path))
                cursor.artifacts_logged[name] = version
                cursor.save(self.folder)
        if cursor.creations > 1:  # a creation given up as timed out may have been carried out later
            for run in self._runs_of_this_outbox(client, client.get_run(cursor.run_id).info.experiment_id):
                if run.info.run_id != cursor.run_id:
                    client.delete_run(run.info.run_id)
        client.set_terminated(cursor.run_id, cursor.ending.status, cursor.ending.end_ms)
        cursor.save(self.folder)
        return True


def points(values: Mapping[str, object], step: int, written_ms: int) -> list[Metric]:
    """The numbers among ``values`` as points; null, lists, text and what is not finite are left out.

    MLflow would store infinity as 1.8e308 and ruin the chart's scale; the line in rounds.jsonl keeps it. Its
    page that compares runs draws the metric that was logged first: what selects, the first metric on test
    data in a line, comes before all others.
    """
    from mlflow.entities import Metric

    first = next((key for key in values if key.startswith("test/")), None)
    return [
        Metric(metric_name(key), float(value), written_ms, step)
        for key, value in sorted(values.items(), key=lambda item: item[0] != first)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def metric_name(text: str) -> str:
    """A key that MLflow accepts: its characters, no empty or dotted path segments, at most 250 characters."""
    segments = re.sub(r"[^\w\-. :/]", "_", text).split("/")
    return "/".join(part for part in segments if part.strip(".") != "")[:KEY_LENGTH] or "_"


def name_in(folder: Path, path: Path) -> str:
    """How an artifact is remembered: relative inside the run's folder, absolute outside it."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
