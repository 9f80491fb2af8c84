"""What a run is to those who watch it, how much of it each has, and how the rest is read from its folder.

``rounds.jsonl`` is the outbox. Every sink (MLflow, TensorBoard, Weights & Biases) has a cursor of its own in
the run's folder and a delivery of its own; one that is away leaves the others alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout

from cluster.machine import SAMPLES
from cluster.records.metric_names import metric_name, numbers_in
from cluster.records.sqlite_store import TrackingError, absolute_uri

#: About as many numbers are read and sent at a time; MLflow's limit of metrics a batch.
NUMBERS_PER_BATCH = 1000
_SAMPLES_PER_BATCH = 50

# MLflow's own limits (mlflow/utils/validation.py), below those of the others.
PARAM_LENGTH, TAG_LENGTH, DIGEST_LENGTH = 6000, 8000, 36

_logger = logging.getLogger("sparsyfed.tracking")
_save_lock = threading.Lock()


@dataclass(frozen=True)
class TrackingTarget:
    """Where a run is tracked.

    Attributes:
        uri: MLflow's store (http, https or sqlite); None without MLflow.
        experiment: The experiment in it, elsewhere the project.
        run_name: The run's name.
        register: Name in MLflow's registry for the best model; None for none.
    """

    uri: str | None
    experiment: str
    run_name: str
    register: str | None = None


#: A tag that finds in MLflow what of this outbox was created there without a confirmation.
OUTBOX_TAG = "sparsyfed.outbox"


@dataclass
class StoredModel:
    """A model that waits in the run's folder.

    Attributes:
        name: ``final`` or ``best``.
        folder: Where it lies, relative inside the run's folder.
        step: The round it is of.
        tags: What is told of it.
        metrics: What that round's evaluation measured.
        written_ms: Unix time of that round's line in milliseconds.
    """

    name: str
    folder: str
    step: int
    tags: dict[str, str]
    metrics: dict[str, float]
    written_ms: int


@dataclass
class Ending:
    """How a run ended; kept in the cursor so that ``sync`` can deliver it from the files alone.

    Attributes:
        status: FINISHED, FAILED or KILLED.
        end_ms: Unix time in milliseconds.
        artifacts: Files, relative inside the run's folder, which may be moved; absolute outside it.
        summary: Final scalars.
        models: Models that were made and may not have arrived.
        models_wanted: Models are still to be made.
    """

    status: str
    end_ms: int
    artifacts: list[str]
    summary: dict[str, float]
    models: list[StoredModel] = field(default_factory=list)
    models_wanted: bool = False

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> Ending:
        """Reads what a cursor kept."""
        return cls(**{**values, "models": [StoredModel(**each) for each in values.get("models", ())]})


@dataclass
class Cursor:
    """What a run is in a sink and how much of it has arrived: the content of ``tracking.json``.

    MLflow's is called so since before there were others; theirs are ``tracking-tensorboard.json`` and so on.
    """

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
    sink: str = "mlflow"
    delivered: bool = False  # with the end
    samples_delivered: int = 0  # lines of system.jsonl
    register: str | None = None

    @classmethod
    def begin(
        cls,
        folder: Path,
        sink: str,
        target: TrackingTarget,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        dataset: Mapping[str, str] | None,
    ) -> Cursor:
        """Writes a run's cursor, or takes up the one found, so that the sink's run continues.

        Raises:
            TrackingError: The file is damaged.
        """
        uri = absolute_uri(target.uri) if sink == "mlflow" and target.uri else ""
        cursor = cls.load(folder, sink)
        # Another store or experiment than before gets the whole run anew.
        if cursor is None or (absolute_uri(cursor.uri), cursor.experiment) != (uri, target.experiment):
            cursor = cls(uri, target.experiment, target.run_name, {}, {}, None, sink=sink)
        cursor.params = {metric_name(key): str(value)[:PARAM_LENGTH] for key, value in params.items()}
        cursor.tags = {metric_name(key): str(value)[:TAG_LENGTH] for key, value in tags.items()}
        cursor.dataset = None
        if dataset is not None:
            cursor.dataset = {key: dataset[key] for key in ("name", "digest", "source_type", "source")}
            cursor.dataset["digest"] = cursor.dataset["digest"][:DIGEST_LENGTH]
        cursor.ending, cursor.delivered, cursor.register = None, False, target.register
        cursor.save(folder)
        return cursor

    @classmethod
    def load(cls, folder: Path, sink: str = "mlflow") -> Cursor | None:
        """Reads a run's cursor; None where the run was never tracked there."""
        path = cursor_file(folder, sink)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            ending = values.pop("ending")
            cursor = cls(**values, ending=Ending.load(ending) if ending else None)
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
                f"{path} is damaged ({error}); delete it to deliver the run to {TITLES[sink]} anew"
            ) from error

    def save(self, folder: Path) -> None:
        """Replaces the file in one step, so that a crash leaves the old or the new one."""
        with _save_lock:
            path = cursor_file(folder, self.sink)
            temporary = path.with_suffix(".json.tmp")
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(self), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)

    def forget_deliveries(self) -> None:
        """Starts over in a new run."""
        self.run_id, self.last_round, self.rounds_delivered, self.creations = None, None, 0, 0
        self.samples_delivered = 0
        self.token, self.artifacts_logged = uuid.uuid4().hex, {}


#: What sinks are called, by their names in ``tracking.also``; MLflow is ``tracking`` itself.
TITLES = {"mlflow": "MLflow", "tensorboard": "TensorBoard", "wandb": "Weights & Biases"}


def cursor_file(folder: Path, sink: str) -> Path:
    """Where a sink's cursor lies."""
    return folder / ("tracking.json" if sink == "mlflow" else f"tracking-{sink}.json")


@dataclass(frozen=True)
class Row:
    """A round's line as it is sent.

    Attributes:
        step: The round.
        written_ms: Unix time in milliseconds, the same at every sending.
        numbers: Its finite numbers by name. null, lists, text and what is not finite stay in rounds.jsonl.
    """

    step: int
    written_ms: int
    numbers: dict[str, float]


class Delivery(ABC):
    """Brings a sink up to date with a run's folder. Every method may raise whatever the sink's library does.

    Args:
        folder: The run's folder.
        cursor: What has arrived.
    """

    #: Whether it is told what machines are doing.
    watches: ClassVar[bool] = True

    def __init__(self, folder: Path, cursor: Cursor) -> None:
        self.folder, self.cursor = folder, cursor
        name = "tracking.lock" if cursor.sink == "mlflow" else f"tracking-{cursor.sink}.lock"
        self._lock = FileLock(folder / name)
        self._opened = False
        self._offset = 0  # bytes of rounds.jsonl read and confirmed
        self._samples_at: int | None = None  # of system.jsonl; None: to be found by counting lines

    @property
    def place(self) -> str:
        """Where it delivers, in words."""
        return TITLES[self.cursor.sink]

    def deliver(self, closing: bool, stop: Callable[[], bool]) -> bool:
        """Sends everything new and, when ``closing``, the run's end; False if ``stop()`` cut it short."""
        try:
            if not self._opened:
                self._claim()
                self._samples_at = None
                self._open()
                self._opened = True
            done = self._send_rounds(stop)
            # A round comes first: MLflow's page of compared runs draws the metric that was logged first.
            if done and self.watches and self.cursor.last_round is not None:
                done = self._send_samples(stop)
            if done:
                self._all_sent()
            if done and closing:
                assert self.cursor.ending is not None
                done = self.cursor.delivered = self._send_ending(self.cursor.ending, stop)
                self.cursor.save(self.folder)
            return done
        except BaseException:
            # The outcome of the failed call is unknown: open, look and compare again.
            self._opened = False
            raise

    def release(self) -> None:
        """Lets another process deliver this run."""
        self._lock.release(force=True)

    def _send_samples(self, stop: Callable[[], bool]) -> bool:
        """Sends what machines were doing."""
        cursor = self.cursor
        try:
            file = (self.folder / SAMPLES).open("rb")
        except FileNotFoundError:
            return True
        with file:
            if self._samples_at is None:
                self._samples_at = sum(len(file.readline()) for _ in range(cursor.samples_delivered))
            file.seek(self._samples_at)
            while not stop():
                lines = [line for line in islice(file, _SAMPLES_PER_BATCH) if line.endswith(b"\n")]
                if not lines:
                    return True
                self._send([row for line in lines for row in self._sample(line)])
                self._samples_at += sum(map(len, lines))
                cursor.samples_delivered += len(lines)
                cursor.save(self.folder)
        return False

    def _sample(self, line: bytes) -> Iterator[Row]:
        """A sample at the run's age in seconds; nothing of a line that was damaged."""
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            row = json.loads(line)
            written_ms = round(1000 * row.pop("timestamp"))
            yield Row(max(0, (written_ms - self.cursor.created_ms) // 1000), written_ms, numbers_in(row))

    @abstractmethod
    def _open(self) -> None:
        """Connects, and finds out what the sink has."""

    @abstractmethod
    def _send(self, rows: Sequence[Row]) -> None:
        """Sends what the sink does not have of some rounds."""

    @abstractmethod
    def _send_ending(self, ending: Ending, stop: Callable[[], bool]) -> bool:
        """Sends the run's end, which may have arrived before; False if ``stop()`` cut it short."""

    def _all_sent(self) -> None:  # noqa: B027 - most sinks have nothing to do
        """Called when everything written so far was sent."""

    def _claim(self) -> None:
        if not self._lock.is_locked:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise TrackingError("another process is delivering this run") from None

    def _send_rounds(self, stop: Callable[[], bool]) -> bool:
        cursor = self.cursor
        while not stop():
            rows, offset = self._next_rows()
            if rows:
                self._send(rows)
            self._offset = offset
            if not rows:
                return True
            cursor.last_round = rows[-1].step
            cursor.rounds_delivered += len(rows)
            cursor.save(self.folder)
        return False

    def _next_rows(self) -> tuple[list[Row], int]:
        """Reads about one batch of rounds; returns them and the offset behind them."""
        rows: list[Row] = []
        numbers = 0
        try:
            file = (self.folder / "rounds.jsonl").open("rb")
        except FileNotFoundError:
            return rows, 0
        with file:
            if file.seek(0, os.SEEK_END) < self._offset:
                self._offset = 0  # a resume cut the file; rounds up to `last_round` are passed over below
            offset = file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # still being written, or torn by a crash
                    break
                offset += len(line)
                last = rows[-1].step if rows else self.cursor.last_round
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
                rows.append(Row(step, round(seconds * 1000), numbers_in(row)))
                numbers += len(rows[-1].numbers)
                if numbers >= NUMBERS_PER_BATCH:
                    break
        return rows, offset


def name_in(folder: Path, path: Path) -> str:
    """How an artifact is remembered: relative inside the run's folder, absolute outside it."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
