"""A run of 2,000 rounds as a user starts it: its last hundred rounds against its first, and what it leaves.

A tiny model, so that what surrounds the training is what is measured. CPU time is that of all processes: this
one, Ray's, the driver and the actor. MLflow is a few seconds behind, so that its store seems to grow
less at the end.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import cluster
from cluster.configuration.config import Config
from tests.benchmarks.report import Figure

#: Rounds between two looks at memory and files.
STEP = 100

_OVERRIDES = (
    "model.name=mlp",
    "model.hidden=[16]",
    "cohort=4",
    "local.epochs=1",
    "actors=1",
)


def experiment(rounds: int) -> Config:
    """The quickstart with a model of 1,210 parameters and four clients a round, tracked by MLflow."""
    return cluster.resolve("quickstart", [f"rounds={rounds}", *_OVERRIDES])


class Watch:
    """Looks at the processes and files of a run after every ``step`` rounds."""

    def __init__(self, folder: Path, step: int = STEP) -> None:
        self.folder, self.step = folder, step
        self.cpu_s: dict[int, float] = {}
        self.own_mib: dict[str, dict[int, float]] = {}
        self.files_kb: dict[str, dict[int, float]] = {}
        self.seconds: list[float] = []

    def __call__(self, line: dict[str, Any]) -> None:
        number = int(line["round"])
        self.seconds.append(line["timestamp"])
        if number != 1 and number % self.step:
            return
        total = 0.0
        for process in (me := psutil.Process(), *me.children(recursive=True)):
            try:
                times, command = process.cpu_times(), process.cmdline()
                total += times.user + times.system
                for name in ("DriverActor", "HostActor", "raylet/raylet", "gcs_server"):
                    if command and name in command[0]:
                        own = process.memory_full_info().uss / 2**20
                        self.own_mib.setdefault(name.rpartition("/")[2], {})[number] = own
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        self.cpu_s[number] = total
        self.own_mib.setdefault("this process", {})[number] = me.memory_full_info().uss / 2**20
        run = self.folder / "run"
        sizes = {
            "rounds.jsonl": (run / "rounds.jsonl").stat().st_size,
            "checkpoints": sum(file.stat().st_size for file in run.glob("checkpoints/*.safetensors")),
            "mlflow.db": sum(file.stat().st_size for file in self.folder.glob("mlflow.db*")),
            "tracking.json": sum(file.stat().st_size for file in run.glob("tracking.json")),
        }
        for name, size in sizes.items():
            self.files_kb.setdefault(name, {})[number] = size / 1000


def watched(rounds: int) -> Watch:
    """A whole run on a Ray of its own, looked at."""
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder))
        cluster.run(experiment(rounds), Path(folder) / "run", progress=watch)
    return watch


def figures(name: str, quick: bool) -> list[Figure]:
    """The later against the earlier, without the first hundred rounds, which warm up."""
    last = 600 if quick else 2000
    middle = last // 2
    watch = watched(last)

    def median_ms(begin: int, end: int) -> float:
        return 1000 * statistics.median(np.diff(watch.seconds[begin - 1 : end]))

    def cpu_ms(begin: int, end: int) -> float:
        return 1000 * (watch.cpu_s[end] - watch.cpu_s[begin]) / (end - begin)

    def case(what: str, early: float, late: float, target: float | None = None) -> None:
        found.extend(
            [
                Figure(name, what, "early", early),
                Figure(name, what, "late", late),
                Figure(name, what, "late / early", late / early, target),
            ]
        )

    found: list[Figure] = []
    case("ms a round: rounds 101-200, last 100", median_ms(100, 200), median_ms(last - 100, last), 1.2)
    case(f"CPU ms a round: 101-{middle}, rest", cpu_ms(100, middle), cpu_ms(middle, last), 1.1)
    for who, own in watch.own_mib.items():
        bound = 1.05 if who.endswith("Actor") else None  # the others are Ray's
        case(f"MiB of {who}: after 200, {last}", own[200], own[last], bound)
    for file, kb in watch.files_kb.items():
        if file in ("rounds.jsonl", "mlflow.db"):
            case(f"kB added to {file}: 1-{middle}, rest", kb[middle], kb[last] - kb[middle], 1.1)
        else:
            halves = ([number for number in kb if (number > middle) == later] for later in (False, True))
            first, second = (max(kb[number] for number in half) for half in halves)
            case(f"kB of {file}, at most: 1-{middle}, rest", first, second, 1.1)
    return found
