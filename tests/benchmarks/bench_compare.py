"""Seconds until ``sparsyfed compare`` has read 100 of 10,000 runs of one SQLite store, and what a run costs.

The store is filled by SQL: through MLflow's client that would take hours.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

from cluster.compare.reading import read_experiment, read_of
from cluster.records.tracking_store import connect, find_experiment
from cluster.workload.objectives import Classification
from tests.benchmarks.report import Figure

EXPERIMENT, LOGGED, ROUNDS, GROUP = "many", read_of(Classification.measures)[:12], 30, 100


def figures(name: str, quick: bool) -> list[Figure]:
    """The whole reading, and metric by metric against MLflow's own call for a run."""
    runs = 1_000 if quick else 10_000
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        client = connect(uri)
        fill(Path(folder) / "mlflow.db", int(find_experiment(client, uri, EXPERIMENT)), runs)
        print(f"  a store of {runs:,} runs is filled", flush=True)
        started = time.time()
        read = read_experiment(uri, EXPERIMENT, "tags.part = '3'")
        together = time.time() - started
        few = read[:5]
        started = time.time()
        for run in few:
            for key in LOGGED:
                client.get_metric_history(run.place, key)
        alone = (time.time() - started) / len(few)
    case = f"{len(read)} of {runs:,} runs"
    return [
        Figure(name, case, "search and read s", together, 5.0),
        Figure(name, case, "ms a run", 1000 * together / len(read)),
        Figure(name, case, "ms a run, metrics asked one by one", 1000 * alone),
    ]


def fill(database: Path, experiment: int, runs: int) -> None:
    """Adds finished runs of :data:`ROUNDS` rounds with random values, each hundred of them a ``part``."""
    draw = random.Random(0)
    with closing(sqlite3.connect(database)) as store:

        def add(table: str, **values: object) -> None:
            marks = ", ".join("?" * len(values))
            store.execute(f"insert into {table} ({', '.join(values)}) values ({marks})", [*values.values()])

        for number in range(runs):
            own, began = f"{draw.getrandbits(128):032x}", 10**12 + 1000 * number
            place = f"{database.parent.as_uri()}/mlartifacts/{experiment}/{own}/artifacts"
            add(
                "runs",
                run_uuid=own,
                name=f"run-{number}",
                status="FINISHED",
                start_time=began,
                end_time=began + 1000,
                lifecycle_stage="active",
                artifact_uri=place,
                experiment_id=experiment,
                user_id="somebody",
                source_type="UNKNOWN",
            )
            for key, value in (("algorithm.name", "fedavg"), ("seed", number % GROUP), ("rounds", ROUNDS)):
                add("params", run_uuid=own, key=key, value=str(value))
            add("tags", run_uuid=own, key="part", value=str(number // GROUP))
            for key in LOGGED:
                for step in range(1, ROUNDS + 1):
                    point = {"value": draw.random(), "timestamp": began + step, "step": step, "is_nan": 0}
                    add("metrics", run_uuid=own, key=key, **point)
                add("latest_metrics", run_uuid=own, key=key, **point)
        store.commit()
