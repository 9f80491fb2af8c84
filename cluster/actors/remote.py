"""The driver on a cluster: an actor with a name, started, followed, listed and stopped from any machine.

Its name is the run folder's and a hash of configuration and code, so that a driver that outlives its job is
never taken for one of newer code.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from cluster.actors.gauges import Gauges
from cluster.actors.ray_session import ClusterError, connection, ray_engine
from cluster.configuration.config import Config
from cluster.configuration.identity import code_digest
from cluster.machine import record
from cluster.records.run_folder import RunFolder
from cluster.rounds.conduct import RunGoesOn, conduct, stop_on_signal
from cluster.rounds.ledger import Line

_logger = logging.getLogger("sparsyfed.run")

#: Ray namespace of every driver, whichever job started it.
NAMESPACE = "sparsyfed"

#: Seconds that a detached driver stays to tell how its run ended.
LINGER_S = 60.0

#: Seconds in which a driver that lives answers.
ANSWER_S = 15.0


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
    """

    def __init__(self, path: Path, detached: bool) -> None:
        self._path, self._detached = path, detached
        self._config = RunFolder.open(path).config()
        self._gauges = Gauges(path.name, self._config)
        self._started = time.time()
        self._lines: list[Line] = []
        self._changed = threading.Condition()
        self._stop = False
        self._state = "running"
        self._summary: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._warnings = Warnings()
        logging.getLogger("sparsyfed").addHandler(self._warnings)

    def conduct(self) -> None:
        """Run to the end; see :func:`cluster.execution.conduct`."""
        try:
            engine = partial(ray_engine, watched_as=str(self._path))
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

    def news(self, lines: int, warnings: int) -> tuple[list[Line], list[str], bool]:
        """Wait for a line beyond the first ``lines``.

        Returns:
            The lines and the warnings since those that are known, and whether the run is over.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._lines) > lines, timeout=30.0)
            return self._lines[lines:], self._warnings.texts[warnings:], self._over

    def result(self) -> dict[str, Any]:
        """What ``result.json`` holds, once the run is over; raises what ended it."""
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
        record(self._path, numbers, host)

    def stop(self) -> None:
        """End the run after the current round, with a checkpoint."""
        self._stop = True

    @property
    def _over(self) -> bool:
        return self._state != "running"

    def _on_line(self, line: Line) -> None:
        self._gauges.set(line)
        with self._changed:
            self._lines.append(line)
            self._changed.notify_all()


# ------------------------------------------------------------------------------------ from the one who starts


def drive(
    folder: RunFolder, config: Config, on_line: Callable[[Line], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Run ``folder`` in a driver actor on the connected cluster and follow it to its end.

    Args:
        folder: The run's folder.
        config: Its configuration.
        on_line: Called with each new round's line.
        should_stop: Asked after each round; True ends the run with a checkpoint.

    Raises:
        RunGoesOn: Ctrl-C, where the driver is detached.
        ClusterError: The driver died, or one of this name is alive.
    """
    import ray

    name = driver_name(folder.path, config)
    driver = _start(name, folder.path, config.detached)
    driver.conduct.remote()
    if config.detached:
        try:
            return follow(driver, on_line, should_stop)
        except KeyboardInterrupt:
            raise RunGoesOn(how_to_come_back(name, config.address)) from None
        except ray.exceptions.RayActorError as error:
            raise _died(error, folder.path) from None
    try:
        with stop_on_signal(lambda: driver.stop.remote()):
            return follow(driver, on_line, should_stop)
    except ray.exceptions.RayActorError as error:
        raise _died(error, folder.path) from None
    finally:
        ray.kill(driver)
        _free_what_it_reserved(name)


def driver_name(path: Path, config: Config) -> str:
    """Name of the driver of the run in ``path``, such as ``digits-topk-s0-3fa9c1d2``."""
    digest = hashlib.sha256(f"{config.digest()} {code_digest()}".encode()).hexdigest()[:8]
    return f"{path.name}-{digest}"


def follow(
    driver: Any, on_line: Callable[[Line], None], should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Hand on a driver's lines and warnings, from its first, until its run is over; returns its result."""
    import ray

    seen, warned, done = 0, 0, False
    try:
        while not done:
            lines, warnings, done = ray.get(driver.news.remote(seen, warned))
            seen, warned = seen + len(lines), warned + len(warnings)
            for text in warnings:
                _logger.warning("%s", text)
            for line in lines:
                on_line(line)
            if should_stop():
                driver.stop.remote()
        summary: dict[str, Any] = ray.get(driver.result.remote())
        return summary
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


def _start(name: str, path: Path, detached: bool) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # The run's folder is on this node; the driver asks for no CPU, so that every core trains.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(DriverActor)
    actor = actor.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached" if detached else None,
        num_cpus=0,
        max_concurrency=16,
        scheduling_strategy=here,
    )
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            return actor.remote(path, detached)
        except ValueError:
            # A driver that was just killed keeps its name until Ray has noticed, and one whose run is over
            # stays to tell of it.
            _end_if_over(name)
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"a driver named {name} is on the cluster already: sparsyfed attach {name}, "
                    f"sparsyfed stop {name}, or choose another --output"
                ) from None
            time.sleep(0.2)


def _end_if_over(name: str) -> None:
    """End the driver of that name where its run is over."""
    import ray

    with suppress(ValueError):  # it is gone
        driver = ray.get_actor(name, namespace=NAMESPACE)
        found = progress_of(driver)
        if found is not None and found["state"] in ("finished", "stopped", "failed"):
            ray.kill(driver)


def _free_what_it_reserved(name: str) -> None:
    """The actors of a driver that was killed are gone with it, their places are not."""
    import ray

    with suppress(ValueError):  # nothing is left, as after a run that ended by itself
        ray.util.remove_placement_group(ray.util.get_placement_group(name))


def _died(error: Exception, path: Path) -> ClusterError:
    # A folder in which nothing was computed is removed, and there is nothing to go on with.
    kept = f"nothing computed is lost: sparsyfed resume {path}" if RunFolder(path).begun else "run it again"
    return ClusterError(f"the driver died ({str(error).splitlines()[0]}); {kept}")


def how_to_come_back(name: str, address: str) -> str:
    """What to type to see or end a run that goes on."""
    return (
        f"the run goes on; see it with: sparsyfed attach {name} --address {address}; "
        f"end it after its round with: sparsyfed stop {name} --address {address}"
    )


# ---------------------------------------------------------------------------------------- from anywhere else


def drivers() -> dict[str, Any]:
    """The drivers on the connected cluster by name."""
    import ray

    found = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE
    ]
    return {name: ray.get_actor(name, namespace=NAMESPACE) for name in sorted(found)}


@contextmanager
def driver_at(address: str, wanted: str | None) -> Iterator[tuple[str, Any]]:
    """Connect to a cluster and find one of its drivers.

    Args:
        address: The cluster.
        wanted: The driver's name or how it begins; None where there is only one.

    Raises:
        ClusterError: There is none, or more than one; names those there are.
    """
    with connection(address):
        found = drivers()
        names = [wanted] if wanted in found else [n for n in found if n.startswith(wanted or "")]
        if len(names) != 1:
            there = f"; there are {', '.join(found)}" if found else ""
            problem = "several runs" if names else "no run"
            begins = f" whose name begins with {wanted}" if wanted else ""
            raise ClusterError(f"{problem} on the cluster at {address}{begins}{there}")
        name = names[0]
        yield name, found[name]


def progress_of(driver: Any) -> dict[str, Any] | None:
    """Where a driver's run stands; None if it does not answer."""
    import ray

    try:
        found: dict[str, Any] = ray.get(driver.progress.remote(), timeout=ANSWER_S)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return None
    return found
