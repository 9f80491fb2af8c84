"""Delivery of a run's rounds to MLflow, and to other sinks, off the round's path.

``rounds.jsonl`` is the only source of truth and serves as the outbox; ``tracking.json`` remembers how far
MLflow has confirmed it. A background thread for each sink reads the outbox and owns every call, the import
(seconds of CPU) and the first migration of an SQLite store included. A sink that is away, hung or
answering with errors therefore costs the round loop and the other sinks nothing; what it missed is sent when
it is back or by ``sparsyfed sync DIR``.

No point is ever logged twice:

- what a sink already holds is read from it after a restart or a failed call, and left out: MLflow's server is
  asked, TensorBoard's and wandb's own files are read;
- a point's timestamp comes from its line, never from the clock at sending, because MLflow's SQL stores keep
  one copy of equal (metric, step, timestamp, value). That covers what asking cannot: a request given up as
  timed out which a hung server carries out after it was asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cluster.records.mlflow_delivery import MlflowDelivery
from cluster.records.outbox import (
    TITLES,
    Cursor,
    Delivery,
    Ending,
    StoredModel,
    TrackingTarget,
    cursor_file,
    name_in,
)
from cluster.records.sqlite_store import TrackingError, is_sqlite, sqlite_file, sqlite_uri
from cluster.records.tensorboard_delivery import TensorboardDelivery
from cluster.records.tracking_store import check, first_line, serve_ui
from cluster.records.wandb_delivery import WandbDelivery, check_login
from cluster.references import UserError, installed

_logger = logging.getLogger("sparsyfed.tracking")

Status = Literal["FINISHED", "FAILED", "KILLED"]

# Twenty metrics cost 15 ms sent alone and 2.6 ms in a full batch, time taken from the round loop through the
# interpreter lock: fast rounds are gathered for this long before they are sent.
_GATHER_S = 2.0
_FIRST_RETRY_S, _LAST_RETRY_S, _CLOSING_RETRY_S = 1.0, 60.0, 2.0


#: How each sink is delivered to.
_DELIVERIES: dict[str, type[Delivery]] = {
    "mlflow": MlflowDelivery,
    "tensorboard": TensorboardDelivery,
    "wandb": WandbDelivery,
}


@dataclass(frozen=True)
class SyncReport:
    """What ``sync`` did: rounds newly confirmed, confirmed in all, and what is in the way if not complete."""

    run_id: str | None
    rounds: int
    rounds_in_total: int
    complete: bool
    problem: str | None


class Tracker:
    """Delivers one run to its sinks while it goes on, from a background thread each.

    The methods return at once (``finish``: by its deadline) and none raises a sink's errors: these are logged
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
        also: Sequence[str] = (),
    ) -> None:
        """Writes ``tracking.json`` and its like, or takes up those found, whose runs then continue.

        Args:
            folder: The run's folder, with or without its ``rounds.jsonl``.
            target: Where to deliver. Another store or experiment than before gets the whole run anew.
            params: The flattened configuration. A resumed run keeps the values it began with.
            tags: Tags of the run, ``mlflow.note.content`` (description), ``mlflow.parentRunId`` ....
            dataset: ``name``, ``digest``, ``source_type`` and ``source`` of the data set, or None.
            also: Sinks beside MLflow.

        Raises:
            TrackingError: A cursor is damaged.
        """
        self._folder = folder
        sinks = (["mlflow"] if target.uri is not None else []) + list(also)
        cursors = [Cursor.begin(folder, sink, target, params, tags, dataset) for sink in sinks]
        self._couriers = [Courier(_delivery(folder, cursor)) for cursor in cursors]

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until MLflow has answered for the first time."""
        return next((c.cursor.run_id for c in self._couriers if c.cursor.sink == "mlflow"), None)

    @property
    def problem(self) -> str | None:
        """Why a sink is behind, in one line; None while deliveries succeed."""
        return next((courier.problem for courier in self._couriers if courier.problem is not None), None)

    def start(self) -> None:
        """Starts delivering; returns at once."""
        for courier in self._couriers:
            courier.thread.start()

    def wait_until_known(self, timeout_s: float) -> str | None:
        """The MLflow run's id, once MLflow has answered; None where it fails to, or not in time."""
        for courier in self._couriers:
            if courier.cursor.sink == "mlflow":
                courier.wait_until_known(timeout_s)
        return self.run_id

    def round_written(self) -> None:
        """Says that a line was appended to ``rounds.jsonl``; returns at once."""
        for courier in self._couriers:
            courier.wake()

    def finish(
        self,
        status: Status,
        artifacts: Sequence[Path],
        summary: Mapping[str, float],
        deadline_s: float,
        make_models: Callable[[], list[StoredModel]] | None = None,
    ) -> bool:
        """Delivers what is left and the end of the run.

        Args:
            status: The status shown.
            artifacts: Files to attach.
            summary: Final scalars, logged as metrics at the last round.
            deadline_s: Longest wait in seconds.
            make_models: Makes the models that MLflow keeps, in its thread.

        Returns:
            Whether every sink has everything. If not, ``sparsyfed sync DIR`` delivers the rest.
        """
        values = {key: float(value) for key, value in summary.items()}
        names = [name_in(self._folder.resolve(), path.resolve()) for path in artifacts]
        ending = Ending(status, int(time.time() * 1000), names, values)
        for courier in self._couriers:
            courier.close(ending, make_models)
        give_up = time.monotonic() + deadline_s
        whole = [courier.leave(max(0.0, give_up - time.monotonic())) for courier in self._couriers]
        return all(whole)


class Courier:
    """The thread that delivers a run to one sink, and all that others may ask of it meanwhile.

    Attributes:
        problem: Why the sink is behind, in one line; None while deliveries succeed.
    """

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._changed = threading.Condition()
        self._pending = True  # the run itself is to be created
        self._closing = self._abandoned = self._complete = False
        self.problem: str | None = None
        name = f"sparsyfed-{self.cursor.sink}"
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)

    @property
    def cursor(self) -> Cursor:
        """What has arrived."""
        return self._delivery.cursor

    def wake(self) -> None:
        """Says that there is something new."""
        with self._changed:
            self._pending = True
            self._changed.notify_all()

    def wait_until_known(self, timeout_s: float) -> None:
        """Waits until the sink's run is known, or what keeps it from being so."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.cursor.run_id is not None or self.problem is not None, timeout_s
            )

    def close(self, ending: Ending, make_models: Callable[[], list[StoredModel]] | None = None) -> None:
        """Keeps how the run ended and has it delivered; returns at once."""
        if isinstance(self._delivery, MlflowDelivery):
            self._delivery.make_models = make_models
            ending = replace(ending, models_wanted=make_models is not None)
        self.cursor.ending = ending
        try:
            self.cursor.save(self._delivery.folder)
        except OSError as error:
            _logger.warning("the end of the run is not kept in %s: %s", self._delivery.folder, error)
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def leave(self, deadline_s: float) -> bool:
        """Waits for the end to arrive; returns whether the sink has everything."""
        with self._changed:
            if self.thread.is_alive():
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
            except Exception as error:  # whatever a library raises, the run goes on
                pause_s, retry_s = (_CLOSING_RETRY_S if closing else retry_s), min(2 * retry_s, _LAST_RETRY_S)
                self._report(error)
            else:
                pause_s, retry_s = _GATHER_S, _FIRST_RETRY_S
                self._report(None)
            with self._changed:
                self._changed.notify_all()
                if self._abandoned:
                    break
                if closing and self.problem is None:
                    self._complete = True
                    self._changed.notify_all()
                    break
                self._pending |= self.problem is not None
                self._changed.wait_for(lambda: self._abandoned or self._closing > closing, pause_s)  # noqa: B023
        with suppress(Exception):  # a library may complain once more
            self._delivery.release()

    def _report(self, error: Exception | None) -> None:
        """Keeps the problem for display and logs the start and the end of an outage."""
        if error is None:
            if self.problem is not None:
                _logger.warning("%s takes deliveries again", TITLES[self.cursor.sink])
            self.problem = None
            return
        problem = f"{self._delivery.place} is behind: {first_line(error)}"
        if self.problem is None:
            _logger.warning("%s; rounds wait in %s", problem, self._delivery.folder / "rounds.jsonl")
        self.problem = problem


def check_also(sinks: Sequence[str]) -> None:
    """Refuses a sink beside MLflow that cannot be used, before anything starts.

    Raises:
        TrackingError: Names what is missing and the cure.
    """
    for sink in sinks:
        if not installed(sink):
            raise TrackingError(
                f"tracking.also: {sink} is not installed here; install it (pip install 'sparsyfed[{sink}]'), "
                "or leave it out"
            )
        if sink == "wandb":
            check_login()


def sinks_of(folder: Path) -> list[str]:
    """Where the run in a folder is tracked.

    Raises:
        TrackingError: It is no folder of a tracked run.
    """
    found = [sink for sink in TITLES if cursor_file(folder, sink).exists()]
    if not found:
        raise TrackingError(f"{folder} holds no tracking.json: it is not the folder of a tracked run")
    return found


def _delivery(folder: Path, cursor: Cursor) -> Delivery:
    return _DELIVERIES[cursor.sink](folder, cursor)


def sync(folder: Path, sink: str = "mlflow", *, deadline_s: float = 600.0) -> SyncReport:
    """Delivers what a sink misses of a finished or interrupted run, from its files; may be repeated.

    A run that was interrupted gets the status KILLED; resuming it sets it running again.

    Args:
        folder: The run's folder.
        sink: One of ``sinks_of`` the folder.
        deadline_s: Longest wait in seconds.

    Raises:
        TrackingError: The folder holds no run tracked there, or the sink cannot be used.
    """
    cursor = Cursor.load(folder, sink)
    if cursor is None:
        raise TrackingError(f"{folder} holds no {cursor_file(folder, sink).name}: it was not tracked there")
    if sink == "mlflow":
        check(cursor.uri)
    else:
        check_also([sink])
    if cursor.ending is None:
        rounds = folder / "rounds.jsonl"
        end_ms = int(rounds.stat().st_mtime * 1000) if rounds.exists() else cursor.created_ms
        files = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".yaml", ".png", ".csv")]
        cursor.ending = Ending("KILLED", end_ms, files, {})
    before, give_up = cursor.rounds_delivered, time.monotonic() + deadline_s
    complete, problem = threading.Event(), [f"not done within {deadline_s:g} s"]

    def deliver() -> None:
        delivery = _delivery(folder, cursor)
        try:
            while not complete.is_set() and time.monotonic() < give_up:
                try:
                    if delivery.deliver(True, lambda: time.monotonic() > give_up):
                        complete.set()
                except Exception as error:
                    problem[:] = [first_line(error)]
                    if isinstance(error, UserError) and not isinstance(error, TrackingError):
                        return  # the run's own mistake, which waiting does not cure
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
    "check_also",
    "is_sqlite",
    "serve_ui",
    "sinks_of",
    "sqlite_file",
    "sqlite_uri",
    "sync",
]
