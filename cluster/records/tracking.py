"""Delivery of a run's rounds to MLflow, off the round's path.

``rounds.jsonl`` is the only source of truth and serves as the outbox; ``tracking.json`` remembers how far
MLflow has confirmed it. One background thread reads the outbox and owns every MLflow call, the import
(seconds of CPU) and the first migration of an SQLite store included. A server that is away, hung or
answering with errors therefore costs the round loop nothing; what it missed is sent when it is back or by
``sparsyfed sync DIR``.

No point is ever logged twice:

- what the server already holds is read from the server after a restart or a failed call, and left out;
- a point's timestamp comes from its line, never from the clock at sending, because MLflow's SQL stores keep
  one copy of equal (metric, step, timestamp, value). That covers what asking cannot: a request given up as
  timed out which a hung server carries out after it was asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.records.sqlite_store import TrackingError, absolute_uri, is_sqlite, sqlite_file, sqlite_uri
from cluster.records.tracking_delivery import (
    DIGEST_LENGTH,
    PARAM_LENGTH,
    TAG_LENGTH,
    Cursor,
    Delivery,
    Ending,
    metric_name,
    name_in,
)
from cluster.records.tracking_store import check, first_line, serve_ui

_logger = logging.getLogger("sparsyfed.tracking")

Status = Literal["FINISHED", "FAILED", "KILLED"]

# Twenty metrics cost 15 ms sent alone and 2.6 ms in a full batch, time taken from the round loop through the
# interpreter lock: fast rounds are gathered for this long before they are sent.
_GATHER_S = 2.0
_FIRST_RETRY_S, _LAST_RETRY_S, _CLOSING_RETRY_S = 1.0, 60.0, 2.0


@dataclass(frozen=True)
class TrackingTarget:
    """Where a run is tracked: the store (http, https or sqlite), the experiment, the run's name in it."""

    uri: str
    experiment: str
    run_name: str


@dataclass(frozen=True)
class SyncReport:
    """What ``sync`` did: rounds newly confirmed, confirmed in all, and what is in the way if not complete."""

    run_id: str | None
    rounds: int
    rounds_in_total: int
    complete: bool
    problem: str | None


class Tracker:
    """Delivers one run to MLflow while it goes on, from a background thread.

    The methods return at once (``finish``: by its deadline) and none raises MLflow's errors: these are logged
    once per outage, shown by ``problem``, and answered by trying again.
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
        """Writes ``tracking.json``, or takes up the one found, whose MLflow run then continues.

        Args:
            folder: The run's folder, with or without its ``rounds.jsonl``.
            target: Where to deliver. Another store or experiment than before gets the whole run anew.
            params: The flattened configuration. A resumed run keeps the values it began with.
            tags: Tags of the run, ``mlflow.note.content`` (description), ``mlflow.parentRunId`` ....
            dataset: ``name``, ``digest``, ``source_type`` and ``source`` of the data set, or None.

        Raises:
            TrackingError: ``tracking.json`` is damaged.
        """
        uri = absolute_uri(target.uri)
        cursor = Cursor.load(folder)
        if cursor is None or (absolute_uri(cursor.uri), cursor.experiment) != (uri, target.experiment):
            cursor = Cursor(uri, target.experiment, target.run_name, {}, {}, None)
        cursor.params = {metric_name(key): str(value)[:PARAM_LENGTH] for key, value in params.items()}
        cursor.tags = {metric_name(key): str(value)[:TAG_LENGTH] for key, value in tags.items()}
        cursor.dataset = None
        if dataset is not None:
            cursor.dataset = {key: dataset[key] for key in ("name", "digest", "source_type", "source")}
            cursor.dataset["digest"] = cursor.dataset["digest"][:DIGEST_LENGTH]
        cursor.ending = None
        cursor.save(folder)
        self._cursor = cursor
        self._delivery = Delivery(folder, cursor)
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

    def wait_until_known(self, timeout_s: float) -> str | None:
        """The MLflow run's id, once MLflow has answered; None where it fails to, or not in time."""
        with self._changed:
            self._changed.wait_for(lambda: self.run_id is not None or self._problem is not None, timeout_s)
        return self.run_id

    def round_written(self) -> None:
        """Says that a line was appended to ``rounds.jsonl``; returns at once."""
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
            Whether MLflow has everything. If not, ``sparsyfed sync DIR`` delivers the rest.
        """
        folder = self._delivery.folder
        values = {key: float(value) for key, value in summary.items()}
        names = [name_in(folder.resolve(), path.resolve()) for path in artifacts]
        self._cursor.ending = Ending(status, int(time.time() * 1000), names, values)
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
                self._changed.notify_all()
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
        problem = f"MLflow ({self._cursor.uri}) is behind: {first_line(error)}"
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
    cursor = Cursor.load(folder)
    if cursor is None:
        raise TrackingError(f"{folder} holds no tracking.json: it is not the folder of a tracked run")
    check(cursor.uri)
    if cursor.ending is None:
        rounds = folder / "rounds.jsonl"
        end_ms = int(rounds.stat().st_mtime * 1000) if rounds.exists() else cursor.created_ms
        files = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".yaml", ".png", ".csv")]
        cursor.ending = Ending("KILLED", end_ms, files, {})
    before, give_up = cursor.rounds_delivered, time.monotonic() + deadline_s
    complete, problem = threading.Event(), [f"not done within {deadline_s:g} s"]

    def deliver() -> None:
        delivery = Delivery(folder, cursor)
        try:
            while not complete.is_set() and time.monotonic() < give_up:
                try:
                    if delivery.deliver(True, lambda: time.monotonic() > give_up):
                        complete.set()
                except Exception as error:
                    problem[:] = [first_line(error)]
                    time.sleep(max(0.0, min(_CLOSING_RETRY_S, give_up - time.monotonic())))
        finally:
            delivery.release()

    # In a thread that is left alone after the deadline: a call may hang in MLflow for minutes.
    thread = threading.Thread(target=deliver, name="sparsyfed-sync", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline_s) + 0.5)
    total, done = cursor.rounds_delivered, complete.is_set()
    return SyncReport(cursor.run_id, total - before, total, done, None if done else problem[0])


__all__ = [
    "Status",
    "SyncReport",
    "Tracker",
    "TrackingError",
    "TrackingTarget",
    "check",
    "is_sqlite",
    "serve_ui",
    "sqlite_file",
    "sqlite_uri",
    "sync",
]
