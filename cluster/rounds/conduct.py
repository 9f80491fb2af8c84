"""Conduct a run to its end on an engine: driver, tracking, shared storage, signals."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.configuration.config import Config
from cluster.configuration.identity import loaded_code
from cluster.disk import naming, told_by_path
from cluster.federation import Federation
from cluster.machine import Watch, record
from cluster.records import tracking
from cluster.records.introduction import final_scalars
from cluster.records.logged_models import make_models
from cluster.records.model_card import write_card
from cluster.records.outputs import (
    make_tracker,
    summary_of,
    write_artifacts,
)
from cluster.records.run_folder import RunFolder
from cluster.records.shared_storage import SharedStorage
from cluster.rounds.callbacks import Callbacks
from cluster.rounds.driver import Driver
from cluster.rounds.engine import Engine
from cluster.rounds.ledger import Line

#: Seconds that the end of a run waits for a tracking server that is away.
TRACKING_DEADLINE_S = 30.0


Progress = Callable[[Line], None]


class RunGoesOn(KeyboardInterrupt):
    """Ctrl-C left a run that goes on without this process; the message says how to come back to it."""


def conduct(
    path: Path,
    make_engine: Callable[[Config, Federation], Engine],
    on_line: Progress,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Run the experiment in ``path`` to its end on one engine; returns what ``result.json`` holds."""
    folder = RunFolder.open(path)
    with told_by_path(), folder.locked():
        return _conduct(folder, make_engine, on_line, should_stop)


def _conduct(
    folder: RunFolder,
    make_engine: Callable[[Config, Federation], Engine],
    on_line: Progress,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    loaded_code()  # as early as can be: files may change while data are prepared
    config = folder.config()
    torch.set_num_threads(config.threads)
    federation = Federation.of(config)
    watch = Watch(str(folder.path), lambda numbers: record(folder.path, numbers))
    with ExitStack() as ends:
        ends.callback(watch.stop)  # last, or one of the actors would go on with it
        if config.tracking.enabled:
            watch.start()  # before the clients' actors are there, which watch where the driver is not
        engine = make_engine(config, federation)
        ends.callback(engine.close)
        tracker, callbacks = make_tracker(folder, config, federation), Callbacks(config.callbacks)

        def stored(line: Line) -> None:
            if tracker is not None:
                tracker.round_written()
            on_line(line)
            if config.callbacks:
                callbacks.round(line, driver.state_after(line["round"]))

        storage = SharedStorage.of_run(config.checkpoint_uri, folder.path) if config.checkpoint_uri else None

        def push() -> None:
            if storage is not None:
                storage.push(folder)

        driver = Driver(
            folder, federation, engine, on_line=stored, should_stop=should_stop, on_checkpoint=push
        )
        if tracker is not None:
            tracker.start()
        started = time.perf_counter()
        try:
            last = driver.run()
            seconds = time.perf_counter() - started
            summary = summary_of(folder, config, federation, last, seconds, driver.stopped_by)
            folder.write_result(summary)
            callbacks.end(summary)
            with naming(folder.path):
                write_card(folder, config, federation.dataset, summary, last)
                artifacts = write_artifacts(folder, federation)
        except BaseException as error:
            if tracker is not None:
                status: tracking.Status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
                tracker.finish(status, [], {}, deadline_s=TRACKING_DEADLINE_S)
            raise
        if tracker is not None:
            final = final_scalars(summary, folder.rounds())
            # A study's trials are many, and their models nobody's.
            wanted = config.tracking.models and config.tracking.tags.get("kind") != "trial"
            models = partial(make_models, folder, federation) if wanted else None
            delivered = tracker.finish("FINISHED", artifacts, final, TRACKING_DEADLINE_S, models)
            summary |= {"mlflow_run_id": tracker.run_id, "tracking_delivered": delivered}
            folder.write_result(summary)
        if storage is not None and not storage.push(folder, finished=True):
            summary["checkpoint_uri_behind"] = True
        return summary


@contextmanager
def stop_on_signal(also: Callable[[], Any] = lambda: None) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into an event, where signals arrive.

    A second one interrupts at once, except SIGHUP: shell and kernel both tell of a terminal that closes. One
    that is ignored, as under ``nohup``, stays so.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number: int, frame: Any) -> None:
        if stopped.is_set() and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        stopped.set()
        print("stopping after this round; press again to stop at once", file=sys.stderr, flush=True)
        also()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
