"""Memory of the driver and of the actors over many rounds: it must not grow.

Runs the quickstart's model on Ray with this process as the driver; one local epoch, so that rounds are short.
Counted is what is a process's own (its unique set size): the object store's pages, of fixed size in all, are
resident with everyone who has read them, and each broadcast lies on other ones.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import psutil

import cluster
from cluster.actors.ray_session import ray_engine
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from tests.benchmarks.bench_round import bench_cluster
from tests.benchmarks.report import Figure

#: Rounds after which memory is read; a run ends at the last one that it reaches.
MARKS = (20, 100, 200, 500, 1000)


def series(last: int) -> dict[str, dict[int, float]]:
    """MiB of each process's own after every tenth round up to ``last``."""
    config = cluster.resolve(
        "quickstart",
        [f"rounds={last + 1}", "local.epochs=1", "actors=2", "evaluate_every=10", "tracking.enabled=false"],
    )
    with bench_cluster():
        federation = Federation.of(config)
        engine = ray_engine(config, federation)
        names = ("driver", "actor 1", "actor 2")
        processes = dict(zip(names, [psutil.Process(), *map(psutil.Process, engine.pids())], strict=True))
        own: dict[str, dict[int, float]] = {who: {} for who in names}

        def watch(line: dict[str, object]) -> None:
            number = int(str(line["round"]))
            if number % 10 == 0:
                for who, process in processes.items():
                    own[who][number] = process.memory_full_info().uss / 2**20

        with tempfile.TemporaryDirectory() as folder:
            Driver(RunFolder.create(Path(folder) / "run", config), federation, engine, on_line=watch).run()
        engine.close()
    return own


def figures(name: str, quick: bool) -> list[Figure]:
    """MiB of each process's own after round 20 and later, and the growth since."""
    own = series(200 if quick else 1000)
    return [
        figure
        for number in MARKS
        for who, sizes in own.items()
        if number in sizes
        for figure in (
            Figure(name, f"after round {number}", f"{who} MiB", sizes[number]),
            Figure(name, f"after round {number}", f"{who} / round 20", sizes[number] / sizes[MARKS[0]], 1.05),
        )
    ]
