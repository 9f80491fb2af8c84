"""The driver on a cluster: an actor with a name, started, followed, listed and stopped from any machine.

Its name is the run folder's and a hash of configuration and code, so that a driver that outlives its job is
never taken for one of newer code.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.actors.driver_actor import DriverActor
from cluster.actors.ray_session import ClusterError, connection
from cluster.configuration.config import Config
from cluster.configuration.identity import code_digest
from cluster.records.run_folder import RunFolder
from cluster.rounds.conduct import RunGoesOn, stop_on_signal
from cluster.rounds.ledger import Line

_logger = logging.getLogger("sparsyfed.run")

#: Ray namespace of every driver, whichever job started it.
NAMESPACE = "sparsyfed"

#: Seconds in which a driver that lives answers.
ANSWER_S = 15.0


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

    if _warm is not None and not config.detached:
        return _drive_warm(_warm, folder, on_line, should_stop)
    name = driver_name(folder.path, config)
    driver = _start(name, folder.path, config.detached)
    driver.conduct.remote()
    if config.detached:
        try:
            return follow(driver, folder.path, on_line, should_stop)
        except KeyboardInterrupt:
            raise RunGoesOn(how_to_come_back(name, config.address)) from None
        except ray.exceptions.RayActorError as error:
            raise _died(error, folder.path) from None
    try:
        with stop_on_signal(lambda: driver.stop.remote(folder.path)):
            return follow(driver, folder.path, on_line, should_stop)
    except ray.exceptions.RayActorError as error:
        raise _died(error, folder.path) from None
    finally:
        ray.kill(driver)
        _free_what_it_reserved(name)


@dataclass(frozen=True)
class WarmDriver:
    """A driver whose run is over, and the code that it and its actors have loaded."""

    name: str
    actor: Any
    code: str


#: Drivers that wait for a next run, where runs follow each other.
_warm: list[WarmDriver] | None = None


@contextmanager
def warm_drivers() -> Iterator[None]:
    """Runs in here, one after another or side by side, take over each other's drivers and client actors."""
    global _warm
    if _warm is not None:  # two grids in one process
        yield
        return
    mine = _warm = []
    try:
        yield
    finally:
        _warm = None
        for driver in mine:
            _end(driver)


def _drive_warm(
    warm: list[WarmDriver],
    folder: RunFolder,
    on_line: Callable[[Line], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    import ray

    driver = _take(warm, folder.path)
    try:
        driver.actor.conduct.remote()
        with stop_on_signal(lambda: driver.actor.stop.remote(folder.path)):
            summary = follow(driver.actor, folder.path, on_line, should_stop)
    except ray.exceptions.RayActorError as error:
        _end(driver)
        raise _died(error, folder.path) from None
    except BaseException:
        _end(driver)
        raise
    if warm is _warm:
        warm.append(driver)
    else:
        _end(driver)
    return summary


def _take(warm: list[WarmDriver], path: Path) -> WarmDriver:
    """A driver for the run in ``path``, one that waits if it lives and has loaded the code of today."""
    import ray

    code = f"{code_digest()} {_own_code(RunFolder.open(path).config())}"
    while True:
        try:
            driver = warm.pop()  # atomic: several threads start runs
        except IndexError:
            # Its name is that of what its runs belong to, as it is not one run's alone.
            name = f"{path.parent.name}-{secrets.token_hex(4)}"
            return WarmDriver(name, _start(name, path, False, keeps=True), code)
        try:
            if driver.code == code:
                ray.get(driver.actor.begin.remote(path))
                return driver
        except ray.exceptions.RayActorError:
            pass  # it died while it waited
        except BaseException:
            _end(driver)
            raise
        _end(driver)


def _own_code(config: Config) -> str:
    """Short hash of the files that the configuration's own references name, and of those beside them."""
    files: set[Path] = set()
    for reference in set(config.references.values()):
        with suppress(ImportError, ValueError):
            found = find_spec(reference.partition(":")[0])
            if found is not None and found.origin is not None:
                files.update(Path(found.origin).parent.glob("*.py"))
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _end(driver: WarmDriver) -> None:
    import ray

    ray.kill(driver.actor)
    _free_what_it_reserved(driver.name)


def driver_name(path: Path, config: Config) -> str:
    """Name of the driver of the run in ``path``, such as ``digits-topk-s0-3fa9c1d2``."""
    digest = hashlib.sha256(f"{config.digest()} {code_digest()}".encode()).hexdigest()[:8]
    return f"{path.name}-{digest}"


def follow(
    driver: Any, path: Path, on_line: Callable[[Line], None], should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Hand on lines and warnings of the run in ``path`` until it is over; returns its result."""
    import ray

    seen, warned, done = 0, 0, False
    try:
        while not done:
            lines, warnings, done = ray.get(driver.news.remote(path, seen, warned))
            seen, warned = seen + len(lines), warned + len(warnings)
            for text in warnings:
                _logger.warning("%s", text)
            for line in lines:
                on_line(line)
            if not done and should_stop():
                driver.stop.remote(path)
        summary: dict[str, Any] = ray.get(driver.result.remote(path))
        return summary
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


def _start(name: str, path: Path, detached: bool, *, keeps: bool = False) -> Any:
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
            return actor.remote(path, detached, keeps)
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
