"""``sparsyfed status``, ``stop`` and ``attach``: what they say about the drivers on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cluster.actors.ray_session import ClusterError, connection
from cluster.actors.remote import driver_at, drivers, follow, how_to_come_back, progress_of
from cluster.command_line.figures import duration, evaluated, shown
from cluster.command_line.progress import RunDisplay, announce, conclude, final_text
from cluster.configuration.config import Config, validate
from cluster.execution import Result
from cluster.rounds.conduct import RunGoesOn
from cluster.workload.objectives import selecting


def status(console: Console, address: str) -> int:
    """List the runs on a cluster with their progress."""
    with connection(address):
        found = {name: progress_of(driver) for name, driver in drivers().items()}
    if not found:
        console.print(f"no run is on the cluster at {address}")
        return 0
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for head in ("run", "state", "round", "evaluated", "time", "folder"):
        table.add_column(head, overflow="fold")
    for name, progress in found.items():
        if progress is None:
            table.add_row(name, "no answer", "-", "-", "-", "-")
            continue
        config = validate(progress["config"], inert=True)
        line = progress["lines"][-1] if progress["lines"] else {"round": 0}
        table.add_row(
            name,
            progress["state"] + ", detached" * progress["detached"],
            f"{line['round']}/{config.stop_after or config.rounds}",
            _evaluated(config, line),
            duration(progress["seconds"]),
            f"{progress['host']}:{progress['folder']}",
        )
    console.print(table)
    return 0


def _evaluated(config: Config, line: dict[str, Any]) -> str:
    """What selects, with its name; a dash for a round that was not evaluated."""
    selects = selecting(config, line)
    value = evaluated(line, selects)
    return "-" if value is None else f"{selects.title} {selects.text(value)}"


def stop(console: Console, address: str, wanted: str | None) -> int:
    """End a run after the round in progress, with a checkpoint; returns once it has ended."""
    import ray

    with driver_at(address, wanted) as (name, driver):
        progress = progress_of(driver)
        if progress is None:
            raise ClusterError(f"{name} does not answer")
        console.print(f"{name} ends after its round ...")
        try:
            path = Path(progress["folder"])
            ray.get(driver.stop.remote(path))
            summary = follow(driver, path, lambda line: None)
            console.print(f"ended after round {summary['rounds']}, {final_text(summary)}")
        except ray.exceptions.RayActorError:
            console.print("ended")  # the one who started it has taken the result and closed it
    console.print(
        f"go on with it on {progress['host']}: sparsyfed resume {progress['folder']}", soft_wrap=True
    )
    return 0


def attach(console: Console, address: str, wanted: str | None) -> int:
    """Show the live progress of a run; leaving does not end it."""
    import ray

    with driver_at(address, wanted) as (name, driver):
        progress = progress_of(driver)
        if progress is None:
            raise ClusterError(f"{name} does not answer")
        config, folder = validate(progress["config"], inert=True), Path(progress["folder"])
        since = duration(progress["seconds"])
        announce(console, config, folder, f"{name}, on {progress['host']} for {since}")
        try:
            with RunDisplay(console, config) as display:
                summary = follow(driver, folder, display.on_line)
        except KeyboardInterrupt:
            raise RunGoesOn(how_to_come_back(name, address)) from None
        except ray.exceptions.RayActorError as error:
            raise ClusterError(
                f"{name} has ended or died ({str(error).splitlines()[0]}); "
                f"see {progress['host']}:{folder} (result.json, or error.txt)"
            ) from None
    if (folder / "result.json").is_file():
        conclude(console, Result(folder, summary))
    else:
        console.print(f"{final_text(summary)}, folder {progress['host']}:{shown(folder)}")
    ended = summary["complete"] or summary["rounds"] >= (config.stop_after or config.rounds)
    return 0 if ended else 130
