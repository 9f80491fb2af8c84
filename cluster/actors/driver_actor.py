"""The driver as an actor: conducts a run and tells whoever asks of its rounds, its warnings and its end."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from cluster.actors.gauges import Gauges
from cluster.actors.ray_engine import KeptPool
from cluster.actors.ray_session import ray_engine
from cluster.machine import record
from cluster.records.run_folder import RunFolder
from cluster.rounds.conduct import conduct
from cluster.rounds.ledger import Line

#: Seconds that a detached driver stays to tell how its run ended.
LINGER_S = 60.0


class Warnings(logging.Handler):
    """Keeps the warnings of this process for whoever follows the run; a log of Ray's is read by nobody."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.texts.append(record.getMessage())


class DriverActor:
    """Runs the rounds on the cluster and hands their lines, and its warnings, to whoever asks.

    Args:
        path: The run's folder, on this actor's node.
        detached: Nobody need be there when the run ends; the actor then ends itself.
        keeps: Its actors stay for its next run.
    """

    def __init__(self, path: Path, detached: bool, keeps: bool = False) -> None:
        self._detached, self._kept = detached, KeptPool() if keeps else None
        self._changed = threading.Condition()
        self._warnings = Warnings()
        logging.getLogger("sparsyfed").addHandler(self._warnings)
        self.begin(path)

    def begin(self, path: Path) -> None:
        """Turn to a run, the first or the next."""
        self._path = path
        self._config = RunFolder.open(path).config()
        self._gauges = Gauges(path.name, self._config)
        self._started = time.time()
        self._lines: list[Line] = []
        self._stop = False
        self._state = "running"
        self._summary: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._warnings.texts = []

    def conduct(self) -> None:
        """Run to the end; see :func:`cluster.execution.conduct`."""
        try:
            engine = partial(ray_engine, watched_as=str(self._path), kept=self._kept)
            self._summary = conduct(self._path, engine, self._on_line, lambda: self._stop)
            self._state = "finished" if self._summary["complete"] else "stopped"
        except BaseException as error:
            self._error, self._state = error, "failed"
            if self._detached:  # perhaps nobody is there to be told
                with suppress(OSError):  # a full disk may be what ended it
                    (self._path / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        with self._changed:
            self._changed.notify_all()
        if self._detached:
            import ray

            me = ray.get_runtime_context().current_actor
            ending = threading.Timer(LINGER_S, lambda: me.__ray_terminate__.remote())
            ending.daemon = True
            ending.start()

    def news(self, path: Path, lines: int, warnings: int) -> tuple[list[Line], list[str], bool]:
        """Wait for a line of the run in ``path`` beyond the first ``lines``.

        Returns:
            The lines and the warnings since those that are known, and whether the run is over.
        """
        if path != self._path:
            return [], [], True
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._lines) > lines, timeout=30.0)
            return self._lines[lines:], self._warnings.texts[warnings:], self._over

    def result(self, path: Path) -> dict[str, Any]:
        """What the ``result.json`` of ``path`` holds, once the run is over; raises what ended it."""
        if path != self._path:  # the driver has turned to the next one
            return RunFolder.open(path).result() or {}
        if self._error is not None:
            raise self._error
        return self._summary

    def progress(self) -> dict[str, Any]:
        """Where the run stands, as plain values."""
        return {
            "folder": str(self._path),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "config": self._config.dump(),
            "state": "stopping" if self._stop and not self._over else self._state,
            "detached": self._detached,
            "seconds": time.time() - self._started,
            "lines": self._lines[-1:],
        }

    def sampled(self, host: str, numbers: dict[str, float]) -> None:
        """Take in what another machine of the run is doing."""
        if not self._over:
            record(self._path, numbers, host)

    def stop(self, path: Path) -> None:
        """End the run in ``path`` after the current round, with a checkpoint."""
        if path == self._path:
            self._stop = True

    @property
    def _over(self) -> bool:
        return self._state != "running"

    def _on_line(self, line: Line) -> None:
        self._gauges.set(line)
        with self._changed:
            self._lines.append(line)
            self._changed.notify_all()
