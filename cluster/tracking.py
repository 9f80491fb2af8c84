"""Delivery of a run's rounds to MLflow, off the round's path.

`rounds.jsonl` is the only source of truth and serves as the outbox; `tracking.json` remembers how far MLflow
has confirmed it. One background thread reads the outbox and owns every MLflow call, the import (seconds of
CPU) and the first migration of an SQLite store included. A server that is away, hung or answering with errors
therefore costs the round loop nothing, and what it missed is sent when it is back or by `sparsyfed sync DIR`.

No point is ever logged twice:

- what the server already holds is read from the server after a restart or a failed call, and left out;
- a point's timestamp comes from its line, never from the clock at sending, because MLflow's SQL stores keep
  one copy of equal (metric, step, timestamp, value). That covers what asking cannot: a request given up as
  timed out which a hung server carries out after it was asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import http.client
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

_logger = logging.getLogger("sparsyfed.tracking")

Status = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's own limits (mlflow/utils/validation.py).
_METRICS_PER_BATCH, _PARAMS_PER_BATCH = 1000, 100
_KEY_LENGTH, _PARAM_LENGTH, _TAG_LENGTH, _DIGEST_LENGTH = 250, 6000, 8000, 36

# Twenty metrics cost 15 ms sent alone and 2.6 ms in a full batch, time taken from the round loop through the
# interpreter lock: fast rounds are gathered for this long before they are sent.
_GATHER_S = 2.0
_FIRST_RETRY_S, _LAST_RETRY_S, _CLOSING_RETRY_S = 1.0, 60.0, 2.0

# A tag that finds a run again whose creation was not confirmed.
_OUTBOX_TAG = "sparsyfed.outbox"

# A call may not hang for minutes (MLflow's defaults: 120 s, 7 retries); this module retries by itself.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}

_save_lock = threading.Lock()


class TrackingError(ValueError):
    """A tracking store or a run's tracking file that cannot be used; says which and what to do."""


@dataclass(frozen=True)
class TrackingTarget:
    """Where a run is tracked: the store (http, https or sqlite), the experiment, the run's name in it."""

    uri: str
    experiment: str
    run_name: str


@dataclass(frozen=True)
class SyncReport:
    """What `sync` did: rounds newly confirmed, confirmed in all, and what is in the way if not complete."""

    run_id: str | None
    rounds: int
    rounds_in_total: int
    complete: bool
    problem: str | None


@dataclass
class _Ending:
    """How a run ended; kept in the cursor so that `sync` can deliver it from the files alone."""

    status: str
    end_ms: int
    artifacts: list[str]  # absolute paths, or names inside the run's folder
    summary: dict[str, float]


@dataclass
class _Cursor:
    """What a run is in MLflow and how much of it has arrived: the content of `tracking.json`."""

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
    ending: _Ending | None = None

    @classmethod
    def load(cls, folder: Path) -> _Cursor | None:
        """Reads a run's cursor; None where the run was never tracked."""
        path = folder / "tracking.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            ending = values.pop("ending")
            return cls(**values, ending=_Ending(**ending) if ending else None)
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


class _Delivery:
    """Brings MLflow up to date with a run's folder. Every method may raise whatever MLflow raises."""

    def __init__(self, folder: Path, cursor: _Cursor) -> None:
        self.folder = folder
        self.cursor = cursor
        self._lock = FileLock(folder / "tracking.lock")
        self._client: MlflowClient | None = None
        self._offset = 0  # bytes of rounds.jsonl read and confirmed
        # Steps the server already holds, per metric; None where nothing unconfirmed can be there.
        self._present: dict[str, set[int]] | None = {}

    def deliver(self, closing: bool, stop: Callable[[], bool]) -> bool:
        """Sends everything new and, when `closing`, the end of the run; False if `stop()` cut it short."""
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
        client = _connect(self.cursor.uri)
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
        experiment_id = _experiment_id(client, cursor.uri, cursor.experiment)
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
                    # Without `timestamp` (Unix seconds): a value that is the same at every sending.
                    seconds = float(row.pop("timestamp", (self.cursor.created_ms + step) / 1000))
                except (ValueError, TypeError, KeyError, AttributeError):
                    _logger.warning("a line of %s is not a round and is passed over", file.name)
                    continue
                if last is not None and step <= last:
                    continue
                metrics += _points(row, step, round(seconds * 1000))
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
        self._send(client, _points(cursor.ending.summary, cursor.last_round or 0, cursor.ending.end_ms))
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


class Tracker:
    """Delivers one run to MLflow while it goes on, from a background thread.

    The methods return at once (`finish`: by its deadline) and none raises MLflow's errors: these are logged
    once per outage, shown by `problem`, and answered by trying again.
    """

    def __init__(
        self,
        folder: Path,
        target: TrackingTarget,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        dataset: Mapping[str, str] | None = None,
    ) -> None:
        """Writes `tracking.json`, or takes up the one found, whose MLflow run then continues.

        Args:
            folder: The run's folder, with or without its `rounds.jsonl`.
            target: Where to deliver. Another store or experiment than before gets the whole run anew.
            params: The flattened configuration. A resumed run keeps the values it began with.
            tags: Tags of the run, `mlflow.note.content` (description) and `mlflow.parentRunId` among them.
            dataset: `name`, `digest`, `source_type` and `source` of the data set, or None.

        Raises:
            TrackingError: `tracking.json` is damaged.
        """
        uri = _absolute(target.uri)
        cursor = _Cursor.load(folder)
        if cursor is None or (cursor.uri, cursor.experiment) != (uri, target.experiment):
            cursor = _Cursor(uri, target.experiment, target.run_name, {}, {}, None)
        cursor.params = {_name(key): str(value)[:_PARAM_LENGTH] for key, value in params.items()}
        cursor.tags = {_name(key): str(value)[:_TAG_LENGTH] for key, value in tags.items()}
        cursor.dataset = None
        if dataset is not None:
            cursor.dataset = {key: dataset[key] for key in ("name", "digest", "source_type", "source")}
            cursor.dataset["digest"] = cursor.dataset["digest"][:_DIGEST_LENGTH]
        cursor.ending = None
        cursor.save(folder)
        self._cursor = cursor
        self._delivery = _Delivery(folder, cursor)
        self._changed = threading.Condition()
        self._pending = True  # the run itself is to be created
        self._closing = self._abandoned = self._complete = False
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._work, name="sparsyfed-tracking", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until MLflow has answered for the first time."""
        return self._cursor.run_id

    @property
    def problem(self) -> str | None:
        """Why MLflow is behind, in one line; None while deliveries succeed."""
        return self._problem

    def start(self) -> None:
        """Starts delivering; returns at once."""
        self._thread.start()

    def round_written(self) -> None:
        """Says that a line was appended to `rounds.jsonl`; returns at once."""
        with self._changed:
            self._pending = True
            self._changed.notify_all()

    def finish(
        self, status: Status, artifacts: Sequence[Path], summary: Mapping[str, float], deadline_s: float
    ) -> bool:
        """Delivers what is left and the end of the run.

        Args:
            status: The status shown by MLflow.
            artifacts: Files to attach.
            summary: Final scalars, logged as metrics at the last round.
            deadline_s: Longest wait in seconds.

        Returns:
            Whether MLflow has everything. If not, `sparsyfed sync DIR` delivers the rest.
        """
        folder = self._delivery.folder
        names = [str(path.resolve()) for path in artifacts]
        self._cursor.ending = _Ending(status, int(time.time() * 1000), names, dict(summary))
        try:
            self._cursor.save(folder)
        except OSError as error:
            _logger.warning("the end of the run is not kept in %s: %s", folder / "tracking.json", error)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if self._thread.is_alive():
                self._changed.wait_for(lambda: self._complete, deadline_s)
            self._abandoned = True
            self._changed.notify_all()
            return self._complete

    def _work(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if self._abandoned:
                    break
                self._pending, closing = False, self._closing
            try:
                self._delivery.deliver(closing, lambda: self._abandoned)
            except Exception as error:  # whatever MLflow raises, the run goes on
                pause_s, retry_s = (_CLOSING_RETRY_S if closing else retry_s), min(2 * retry_s, _LAST_RETRY_S)
                self._report(error)
            else:
                pause_s, retry_s = _GATHER_S, _FIRST_RETRY_S
                self._report(None)
            with self._changed:
                if self._abandoned:
                    break
                if closing and self._problem is None:
                    self._complete = True
                    self._changed.notify_all()
                    break
                self._pending |= self._problem is not None
                self._changed.wait_for(lambda: self._abandoned or self._closing > closing, pause_s)  # noqa: B023
        self._delivery.release()

    def _report(self, error: Exception | None) -> None:
        """Keeps the problem for display and logs the start and the end of an outage."""
        if error is None:
            if self._problem is not None:
                _logger.warning("MLflow takes deliveries again")
            self._problem = None
            return
        problem = f"MLflow ({self._cursor.uri}) is behind: {_first_line(error)}"
        if self._problem is None:
            _logger.warning("%s; rounds wait in %s", problem, self._delivery.folder / "rounds.jsonl")
        self._problem = problem


def sync(folder: Path, *, deadline_s: float = 600.0) -> SyncReport:
    """Delivers what MLflow misses of a finished or interrupted run, from its files; may be repeated.

    A run that was interrupted gets the status KILLED; resuming it sets it running again.

    Args:
        folder: The run's folder.
        deadline_s: Longest wait in seconds.

    Raises:
        TrackingError: The folder holds no tracked run.
    """
    cursor = _Cursor.load(folder)
    if cursor is None:
        raise TrackingError(f"{folder} holds no tracking.json: it is not the folder of a tracked run")
    check(cursor.uri)
    if cursor.ending is None:
        rounds = folder / "rounds.jsonl"
        end_ms = int(rounds.stat().st_mtime * 1000) if rounds.exists() else cursor.created_ms
        files = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".yaml", ".png", ".csv")]
        cursor.ending = _Ending("KILLED", end_ms, files, {})
    complete, before, problem = False, cursor.rounds_delivered, f"not done within {deadline_s:g} s"
    delivery, give_up = _Delivery(folder, cursor), time.monotonic() + deadline_s
    try:
        while not complete and time.monotonic() < give_up:
            try:
                complete = delivery.deliver(True, lambda: time.monotonic() > give_up)
            except Exception as error:
                problem = _first_line(error)
                time.sleep(max(0.0, min(_CLOSING_RETRY_S, give_up - time.monotonic())))
    finally:
        delivery.release()
    total = cursor.rounds_delivered
    return SyncReport(cursor.run_id, total - before, total, complete, None if complete else problem)


def check(uri: str, timeout_s: float = 5.0) -> None:
    """Refuses a store that cannot be used, before anything starts and without importing MLflow.

    Args:
        uri: The tracking store.
        timeout_s: Longest wait for a server in seconds.

    Raises:
        TrackingError: Names the uri, what is wrong with it and what would be right.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        if parts.username or parts.password:  # they would end up in files and messages
            raise TrackingError(
                f"tracking store at {parts.hostname}: give the login as MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, not inside the address"
            )
        _check_server(uri, timeout_s)
    elif parts.scheme == "sqlite":
        database = sqlite_file(uri)
        if not database.parent.is_dir():
            raise TrackingError(f"tracking store {uri}: the folder {database.parent} does not exist")
        if not os.access(database if database.exists() else database.parent, os.W_OK):
            raise TrackingError(f"tracking store {uri}: {database} cannot be written")
        if database.exists() and not _is_sqlite(database):
            raise TrackingError(f"tracking store {uri}: {database} is not an SQLite database")
    else:
        hint = " (MLflow 3 has given up its file store)" if parts.scheme in ("", "file") else ""
        raise TrackingError(
            f"tracking store {uri!r} is not supported{hint}; give sqlite:////folder/mlflow.db or the "
            "http(s) address of an `mlflow server`, which may keep its data in any database"
        )


def _check_server(uri: str, timeout_s: float) -> None:
    fix = "start it, correct the address, or track into sqlite:////folder/mlflow.db"
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=timeout_s) as answer:
            healthy = answer.read(64).strip() == b"OK"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # a proxy in front that wants the login which MLflow's client will send
            return
        raise TrackingError(f"tracking server {uri} answers with HTTP {error.code}; {fix}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise TrackingError(f"tracking server {uri} does not answer ({reason}); {fix}") from error
    if not healthy:
        raise TrackingError(f"{uri} answers but is not an MLflow tracking server; {fix}")


def _is_sqlite(database: Path) -> bool:
    if not database.is_file():
        return False
    with database.open("rb") as file:
        return file.read(16) in (b"", b"SQLite format 3\0")


def sqlite_file(uri: str) -> Path:
    """The absolute path of the database file of an `sqlite:///` uri."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if not uri.startswith("sqlite:///") or not path or path == ":memory:":
        raise TrackingError(f"tracking store {uri} names no file; write sqlite:////folder/mlflow.db")
    return Path(os.path.abspath(path))


def _absolute(uri: str) -> str:
    """The uri that means the same from any working directory."""
    if not uri.startswith("sqlite:"):
        return uri.rstrip("/")
    return f"sqlite:///{sqlite_file(uri)}" + "".join(uri.partition("?")[1:])


def artifact_folder(uri: str) -> Path:
    """Where an SQLite store's artifacts lie: beside it, not in the working directory as MLflow has it."""
    return sqlite_file(uri).parent / "mlartifacts"


def creation_lock(uri: str) -> FileLock:
    """The lock under which an SQLite store is opened.

    MLflow guards only a part of a new store's creation: of three processes opening one at the same moment,
    two failed with "duplicate column name".
    """
    database = sqlite_file(uri)
    return FileLock(database.with_name(database.name + ".lock"), timeout=120)


def use_quiet_defaults(environment: MutableMapping[str, str]) -> None:
    """Sets MLflow's switches (bounded calls, no telemetry, no chatter) where the user has not."""
    for key, value in _ENVIRONMENT.items():
        environment.setdefault(key, value)


def _connect(uri: str) -> MlflowClient:
    use_quiet_defaults(os.environ)
    from mlflow.tracking import MlflowClient

    if not uri.startswith("sqlite:"):
        return MlflowClient(uri)
    with creation_lock(uri):
        return MlflowClient(uri)


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Finds the experiment or creates it, also when another run does so at the same moment."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = str(artifact_folder(uri)) if uri.startswith("sqlite:") else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise TrackingError(f"the experiment {name!r} cannot be created nor found in MLflow")
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the experiment {name!r} was deleted in MLflow: choose another name, or "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return experiment.experiment_id


def _points(values: Mapping[str, object], step: int, written_ms: int) -> list[Metric]:
    """The numbers among `values` as points; null, lists, text and what is not finite are left out.

    MLflow would store infinity as 1.8e308 and ruin the chart's scale; the line in rounds.jsonl keeps it.
    """
    from mlflow.entities import Metric

    return [
        Metric(_name(key), float(value), written_ms, step)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _name(text: str) -> str:
    """A key that MLflow accepts: its characters, no empty or dotted path segments, at most 250 characters."""
    segments = re.sub(r"[^\w\-. :/]", "_", text).split("/")
    return "/".join(part for part in segments if part.strip(".") != "")[:_KEY_LENGTH] or "_"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def serve_ui(uri: str, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Serves MLflow's pages for a store until Ctrl-C (or SIGTERM, or the terminal closes).

    One worker and no job runners: up in 6 s with 2 processes and 0.5 GB, where MLflow's defaults take 28 s
    with 15 processes and 2.4 GB (2 cores). A name under which it is reached, other than localhost and private
    addresses, has to be listed in MLFLOW_SERVER_ALLOWED_HOSTS.

    Args:
        uri: The tracking store; that of a server is only named, since its pages are served already.
        host: The interface to listen on.
        port: The port; the next free one is taken, with a message, if it is in use.

    Returns:
        The exit status for the command line.

    Raises:
        TrackingError: The store cannot be used, or no port is free.
    """
    check(uri)
    if not uri.startswith("sqlite:"):
        print(f"MLflow is served at {uri}", flush=True)
        return 0
    free = _free_port(host, port)
    if free != port:
        print(f"port {port} is in use, taking {free}", flush=True)
    environment = dict(os.environ)
    use_quiet_defaults(environment)
    environment.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--workers",
        "1",
        "--host",
        host,
        "--port",
        str(free),
    ]
    command += ["--backend-store-uri", _absolute(uri), "--artifacts-destination", str(artifact_folder(uri))]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # A signal that is ignored already (nohup) stays ignored.
    wanted = (signal.SIGTERM, signal.SIGHUP)
    stopping = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
    before = [signal.signal(number, interrupt) for number in stopping]
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    # In a process group of its own, so that a Ctrl-C reaches only this process and all of them end here.
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{free}"
        with creation_lock(uri):
            while server.poll() is None and not _answers(address):
                time.sleep(0.2)
        if server.poll() is None:
            print(f"MLflow is served at {address} (Ctrl-C ends it)", flush=True)
        status = server.wait()
        log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
        print(
            f"the MLflow server ended with status {status}:\n{log.read().decode(errors='replace')}",
            flush=True,
        )
        return status or 1
    except KeyboardInterrupt:
        return 0
    finally:
        for number, handler in zip(stopping, before, strict=True):
            signal.signal(number, handler)
        _end_group(server)
        log.close()


def _answers(address: str) -> bool:
    try:
        check(address, timeout_s=2.0)
    except TrackingError:
        return False
    return True


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, min(port + 100, 65536)):
        try:
            with socket.create_server((host, candidate), family=family):
                return candidate
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise TrackingError(f"cannot listen on {host}: {error}") from error
    raise TrackingError(f"no port from {port} on is free on {host}")


def _end_group(server: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):  # the group is gone
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience_s)
