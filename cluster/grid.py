"""Grids: one file that stands for many runs, such as every method on every seed.

A grid is an experiment with a section ``grid`` (see ``cluster.configuration.axes``)::

    extends: quickstart
    grid:
      algorithm: [{name: fedavg}, {name: topk}, {name: sparsyfed, beta: 1.5}]
      seed: [0, 1, 2]

Its runs are independent and lie side by side in one folder: a grid that is run again skips what is complete
and resumes what is not. Where the cluster has room for more actors than one run can use, runs share it.
Shards of a grid are processes that know nothing of each other but the folder: each plays the runs that it was
dealt, a lock a run keeps two from playing the same one, and whoever ends a run writes the table of all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from cluster.actors import ray_session, remote
from cluster.configuration.axes import points
from cluster.configuration.config import Config, validate
from cluster.configuration.trees import ConfigError, load_tree, parse_override
from cluster.execution import Result, complete, run_or_resume, stored, tell_of_another_try
from cluster.federation import Federation
from cluster.measures import Measure
from cluster.records.checkpoint import write_atomically
from cluster.records.csv_text import as_csv
from cluster.records.introduction import run_name
from cluster.records.run_folder import RunFolder, RunFolderError
from cluster.records.shared_storage import below
from cluster.references import may_pass
from cluster.rounds.conduct import stop_on_signal
from cluster.workload.objectives import selects_of

#: Columns of the table: header, how a run's cell is computed from its result and lines, format.
_Column = tuple[str, Callable[[dict[str, Any], list[dict[str, Any]]], float | None], str]

#: The columns after those of what selects.
_COLUMNS: tuple[_Column, ...] = (
    ("sparsity %", lambda result, lines: 100 * result["sparsity"], ".1f"),
    ("MB up", lambda result, lines: result["uplink_bytes"] / 1e6, ".2f"),
    ("MB down", lambda result, lines: result["downlink_bytes"] / 1e6, ".2f"),
    ("GFLOP", lambda result, lines: result["flops_sparse"] / 1e9, ".0f"),
    ("regrowth ‰", lambda result, lines: _mean(lines, "masks/regrowth_share", 1000), ".2f"),
    ("client regrowth ‰", lambda result, lines: _mean(lines, "masks/client_regrowth_share", 1000), ".2f"),
    ("consensus", lambda result, lines: _mean(lines, "masks/consensus"), ".3f"),
)

#: What takes a run's lines, given its name and configuration when it starts.
Started = Callable[[str, Config], Callable[[dict[str, Any]], None]]
Ended = Callable[[str, Result | Exception], None]


@dataclass(frozen=True)
class Grid:
    """A grid's runs.

    Attributes:
        runs: Configurations by name.
        at_once: Runs that share the cluster (``runs_at_once``); None for as many as it has room for.
        whole: Those of all shards, where ``runs`` are those of one.
    """

    runs: dict[str, Config]
    at_once: int | None = None
    whole: dict[str, Config] | None = None

    def shard(self, number: int, count: int) -> Grid:
        """What shard ``number`` of ``count`` plays, from 1: every ``count``-th run, as dealt to players."""
        return replace(self, runs=dict([*self.runs.items()][number - 1 :: count]), whole=self.runs)


@dataclass
class Outcome:
    """What became of a grid.

    Attributes:
        results: Results of what ran or was complete before, by name in the order of the grid.
        failures: Why the others failed; those that were not begun are in neither.
        there: All results in the folder, also those of other shards.
    """

    results: dict[str, Result] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    there: dict[str, Result] = field(default_factory=dict)


def expand(source: str | Path, overrides: Sequence[str] = ()) -> Grid | None:
    """The runs of a grid, or None where ``source`` is a single experiment.

    Runs that MLflow would show under one name, such as two settings of a method, have the grid's names there.

    Raises:
        ConfigError: A key or value of the grid is wrong, two of its runs have one name, or two names mean the
            same run.
    """
    tree = load_tree(source)
    if "grid" not in tree:
        return None
    at_once = tree.pop("runs_at_once", None)
    for override in overrides:
        if parse_override(override)[0] == "runs_at_once":
            at_once = parse_override(override)[1]
    if at_once is not None and (not isinstance(at_once, int) or at_once < 1):
        raise ConfigError(f"{source}: runs_at_once: expected a whole number from 1, found {at_once!r}")
    overrides = [override for override in overrides if not override.startswith("runs_at_once=")]
    runs = {name: validate(point) for name, point in points(source, tree, overrides).items()}
    seen: dict[str, str] = {}
    for name, config in runs.items():
        if (other := seen.setdefault(config.model_dump_json(), name)) != name:
            raise ConfigError(
                f"{source}: grid: {other} and {name} are one and the same run; a piece does not undo what an "
                "override, the experiment or what it extends has set: write the key out in both"
            )
    if at_once is not None and at_once > 1 and any(c.execution == "inline" for c in runs.values()):
        raise ConfigError(f"{source}: runs_at_once: {at_once} runs side by side need execution=ray")
    shown = Counter(map(run_name, runs.values()))
    for name, config in runs.items():
        if shown[run_name(config)] > 1 and config.tracking.run_name is None:
            tracking = config.tracking.model_copy(update={"run_name": name})
            runs[name] = config.model_copy(update={"tracking": tracking})
    return Grid(runs, at_once)


def run_grid(
    grid: Grid,
    output: Path,
    *,
    started: Started = lambda name, config: lambda line: None,
    ended: Ended = lambda name, result: None,
) -> Outcome:
    """Run what is not complete, side by side where the cluster has room for it.

    A run that fails does not keep the others from running. Where the machine was at fault and not the
    experiment, it is tried once more, from its last checkpoint. The first Ctrl-C ends every run after its
    round.

    Args:
        grid: The runs.
        output: Folder of all runs; each lies in a subfolder with its name.
        started: Called with each run that starts; returns what takes its lines, each in its own thread.
        ended: Called with each run's result, or why it failed, in the same thread.

    Raises:
        ConfigError: A folder holds a run of another configuration.
        DataError, PartitionError, ModelError, ClusterError: Before anything starts.
    """
    outcome, pending = Outcome(), {}
    for name, config in grid.runs.items():
        done = complete(config, output / name)
        if done is None:
            uri = below(config.checkpoint_uri, output.absolute().name)
            pending[name] = config.model_copy(update={"checkpoint_uri": uri})
        else:
            outcome.results[name] = done
    size = _largest_model(pending.values())

    def work(name: str, config: Config) -> Result | Exception:
        progress, folder = started(name, config), RunFolder(output / name)

        def play() -> Result:
            folder.clear_half_made()
            return complete(config, folder.path) or run_or_resume(
                config, folder.path, progress=progress, should_stop=stopped.is_set
            )

        try:
            with folder.claimed():
                try:
                    result: Result | Exception = play()
                except Exception as error:
                    if stopped.is_set() or not may_pass(error):
                        raise
                    tell_of_another_try(name, error)
                    result = play()
        except Exception as error:
            result = error
        ended(name, result)
        return result

    def take_in(name: str, result: Result | Exception) -> None:
        (outcome.failures if isinstance(result, Exception) else outcome.results)[name] = result  # type: ignore[assignment]
        outcome.results = {name: outcome.results[name] for name in grid.runs if name in outcome.results}
        tabulate()

    def tabulate() -> None:
        # One shard at a time: the last one to write the table has read what all others left.
        with FileLock(output / ".table.lock"):
            before, outcome.there = outcome.there, {}
            for name, config in (grid.whole or grid.runs).items():
                known = outcome.results.get(name) or before.get(name)
                if known is None or not known.summary["complete"]:
                    with suppress(FileNotFoundError, RunFolderError):  # its shard is just removing it
                        known = stored(config, output / name) or known
                if known is not None:
                    outcome.there[name] = known
            write_table(outcome.there, output)

    output.mkdir(parents=True, exist_ok=True)
    with _shared_cluster(pending, grid.at_once, size) as shares, stop_on_signal() as stopped:
        if shares is None:
            for name, config in pending.items():
                result = work(name, config)
                take_in(name, result)
                if isinstance(result, Result) and not result.ended:
                    break  # its own handler took the signal
        else:
            _side_by_side(shares, work, take_in, stopped.is_set)
    tabulate()
    return outcome


def table(results: Mapping[str, Result]) -> list[list[str]]:
    """Header and one row a run, as text."""
    selects = {selects_of(result.summary): None for result in results.values()}
    columns = [column for measure in selects for column in _columns_of(measure)] + list(_COLUMNS)
    rows = [["run", *(header for header, _, _ in columns)]]
    for name, result in results.items():
        lines = RunFolder(result.folder).rounds()
        cells = [compute(result.summary, lines) for _, compute, _ in columns]
        texts = [
            "-" if cell is None else format(cell, form)
            for cell, (_, _, form) in zip(cells, columns, strict=True)
        ]
        rows.append([name, *texts])
    return rows


def _columns_of(selects: Measure) -> tuple[_Column, ...]:
    """What selects, after the last round and in the best one, on test data where that is read."""
    unit = " %" if selects.unit == "share" else ""

    def column(header: str, key: str) -> _Column:
        def compute(result: dict[str, Any], lines: list[dict[str, Any]]) -> float | None:
            value = result.get(key)
            return None if value is None else selects.scale * value

        return header + unit, compute, ".1f" if unit else ".4g"

    return column(selects.title, selects.key), column("best", f"best_{selects.key}")


def write_table(results: Mapping[str, Result], folder: Path) -> None:
    """Write ``table.csv`` and ``table.md``."""
    rows = table(results)
    write_atomically(folder / "table.csv", as_csv(rows).encode())
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    write_atomically(folder / "table.md", ("\n".join(lines) + "\n").encode())


# --------------------------------------------------------------------------------------------- side by side


def shares_of(room: int, config: Config, runs: int, at_once: int | None) -> tuple[int, int]:
    """How many runs share a cluster, and how many actors each gets.

    A run can use as many actors as its cohort has clients; what is beyond serves another run.

    Args:
        room: Actors that the cluster has room for.
        config: A run's configuration.
        runs: Runs that are left.
        at_once: Runs that are to share it; None to derive it.

    Raises:
        ClusterError: There is no room for an actor of each.
    """
    if at_once is None:
        at_once = max(1, min(runs, room // min(config.actors or config.cohort, max(1, room))))
    share = config.actors or max(1, min(room // at_once, config.cohort))
    if at_once > 1 and at_once * share > room:
        raise ray_session.ClusterError(
            f"runs_at_once: {at_once} runs with {share} actors each, but the cluster has room for {room} "
            "actors; lower runs_at_once, actors, cpus_per_actor or gpus_per_actor"
        )
    return at_once, share


@dataclass(frozen=True)
class _Shares:
    """The runs that are left, each with its share of the cluster, and how many go at once."""

    runs: dict[str, Config]
    at_once: int


@contextmanager
def _shared_cluster(
    pending: Mapping[str, Config], at_once: int | None, size: int
) -> Iterator[_Shares | None]:
    """One connection for all runs; None where they run in this process, one after the other."""
    if not pending or any(config.execution == "inline" for config in pending.values()):
        yield None
        return
    first = next(iter(pending.values()))
    where = {(config.address, config.cpus_per_actor, config.gpus_per_actor) for config in pending.values()}
    if len(where) > 1:
        raise ConfigError("grid: address, cpus_per_actor and gpus_per_actor are those of all runs")
    planned, share = 1, first.actors
    if first.address == "local":
        # The object store of a private cluster holds what all runs at once put there.
        planned, share = shares_of(ray_session.local_room(first), first, len(pending), at_once)
    widest = first.model_copy(update={"actors": share})
    with ray_session.connected(widest, planned * size, also=pending.values()), remote.warm_drivers():
        planned, share = shares_of(ray_session.room(first), first, len(pending), at_once)
        yield _Shares({n: c.model_copy(update={"actors": share}) for n, c in pending.items()}, planned)


def _side_by_side(
    shares: _Shares,
    work: Callable[[str, Config], Result | Exception],
    take_in: Callable[[str, Result | Exception], None],
    stopped: Callable[[], bool],
) -> None:
    waiting = iter(shares.runs.items())
    pool = ThreadPoolExecutor(shares.at_once, thread_name_prefix="run")
    working: dict[Future[Result | Exception], str] = {}
    try:
        while True:
            while len(working) < shares.at_once and not stopped() and (item := next(waiting, None)):
                working[pool.submit(work, *item)] = item[0]
            if not working:
                return
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                take_in(working.pop(future), future.result())
    finally:
        # After a second Ctrl-C the connection is cut, which ends what the threads wait for.
        pool.shutdown(wait=False, cancel_futures=True)


def _largest_model(configs: Any) -> int:
    """Floats of the largest model; finds what is wrong with any data, partition or model on the way."""
    sizes: dict[str, int] = {}
    for config in configs:
        tree = config.dump()
        key = json.dumps([tree["data"], tree["partition"], tree["model"], tree["adapter"]], sort_keys=True)
        if key not in sizes:
            sizes[key] = Federation.of(config).stored_floats
    return max(sizes.values(), default=0)


def _mean(lines: Sequence[dict[str, Any]], key: str, scale: float = 1.0) -> float | None:
    # Round 1 starts from a dense model: what masks do is measured from round 2 on.
    values = [line[key] for line in lines if line["round"] > 1 and line.get(key) is not None]
    return scale * float(np.mean(values)) if values else None
