"""Where the milliseconds of a small round go: when actors play, and when nobody does.

    python -m tests.benchmarks.timeline [METHOD] [ROUNDS]

The 53,000-weight CNN on 8x8 images, cohort 10, two actors, no evaluation. Host and driver write down when
they begin and end; all processes of a machine read the same clock.
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

import cluster
from cluster.actors.ray_session import ray_engine
from cluster.clients.client import ClientHost
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from tests.benchmarks.bench_round import bench_cluster, cases

WARM_UP = 10


class TimedHost(ClientHost):
    """Writes down when it plays, beside the decoded data."""

    def play(self, *arguments: Any) -> Any:
        """See :class:`ClientHost`."""
        began = time.perf_counter()
        reports = super().play(*arguments)
        with open(self._setup.folder.parent / f"played-{os.getpid()}", "a") as file:
            file.write(f"{began} {time.perf_counter()}\n")
        return reports


def measure(method: str, rounds: int, folder: Path) -> None:
    """Print the medians of so many rounds."""
    case = next(case for case in cases("small", quick=True) if case.method == method)
    config = cluster.resolve(
        {
            "rounds": 100_000,
            "cohort": case.cohort,
            "checkpoint_every": 100_000,
            "evaluate_every": 100_000,
            "actors": case.actors,
            "algorithm": case.algorithm,
            "model": {"name": "small_cnn", **case.model},
            "data": {"name": "tests.benchmarks.bench_round:images_8_100", "cache": str(folder / "cache")},
            "partition": {"name": "iid", "clients": case.clients},
            "local": {"epochs": 1, "batch_size": 16, "lr": 0.01},
            "tracking": {"enabled": False},
        }
    )
    federation = Federation.of(config)
    engine = ray_engine(config, federation, TimedHost)
    driver = Driver(RunFolder.create(folder / "run", config), federation, engine)
    for _ in range(WARM_UP):
        driver._round()
    begun, before = [], cpu_seconds()
    for _ in range(rounds):
        begun.append(time.perf_counter())
        driver._round()
    begun.append(time.perf_counter())
    spent = {name: after - before.get(name, 0.0) for name, after in cpu_seconds().items()}
    plays = {
        path.name: [tuple(map(float, line.split())) for line in path.read_text().splitlines()]
        for path in federation.dataset.folder.parent.glob("played-*")
    }
    engine.close()
    gaps: dict[str, list[float]] = collections.defaultdict(list)
    for start, end in pairwise(begun):
        mine = [own for calls in plays.values() if (own := [c for c in calls if start <= c[0] < end])]
        first, last = min(own[0][0] for own in mine), [own[-1][1] for own in mine]
        gaps["whole round"].append(end - start)
        gaps["begin to the first visit"].append(first - start)
        gaps["an actor's visits, mean"].append(sum(b - a for own in mine for a, b in own) / len(mine))
        gaps["first to last actor's end"].append(max(last) - min(last))
        gaps["last visit to the next round"].append(end - max(last))
    for name, values in gaps.items():
        print(f"{name:<30} {1e3 * statistics.median(values):6.1f} ms")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1])[:5]:
        print(f"CPU of {name:<23} {1e3 * seconds / rounds:6.1f} ms a round")


def cpu_seconds() -> dict[str, float]:
    """CPU time of this process and those below it, by name."""
    found: dict[str, float] = collections.Counter()
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            name = "driver" if process == me else Path(process.cmdline()[0]).name
            found[name] += sum(process.cpu_times()[:2])
        except (psutil.Error, IndexError):
            continue
    return found


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("method", nargs="?", default="fedavg", choices=("fedavg", "topk", "sparsyfed"))
    parser.add_argument("rounds", nargs="?", type=int, default=120)
    arguments = parser.parse_args()
    with bench_cluster(), tempfile.TemporaryDirectory() as folder:
        measure(arguments.method, arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
