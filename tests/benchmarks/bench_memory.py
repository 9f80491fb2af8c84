"""Resident memory of the driver and of an actor over many rounds: it must not grow.

    python -m tests.benchmarks.bench_memory [--rounds 200]

Runs the quickstart's model on Ray in this process, which is then the driver, and prints the resident set of
the driver and of each actor after round 20 and after the last round.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import psutil
import ray

import cluster
from cluster.driver import Driver
from cluster.engine import RayEngine
from cluster.federation import Federation
from cluster.run_folder import RunFolder


def main() -> None:
    """Run the rounds and print what memory did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = cluster.resolve(
        "quickstart",
        [
            f"rounds={arguments.rounds}",
            "local.epochs=1",
            "actors=2",
            "tracking.enabled=false",
            *arguments.overrides,
        ],
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**29)
    federation = Federation.of(config)
    engine = RayEngine(federation.workload(), federation.sizes, actors=2, cpus=1, gpus=0)
    processes = [psutil.Process(), *map(psutil.Process, engine.pids())]
    resident: dict[int, list[float]] = {}

    def watch(line: dict[str, object]) -> None:
        if line["round"] in (20, arguments.rounds - 1):
            resident[int(str(line["round"]))] = [p.memory_info().rss / 2**20 for p in processes]

    with tempfile.TemporaryDirectory() as folder:
        Driver(RunFolder.create(Path(folder) / "run", config), federation, engine, on_line=watch).run()
    engine.close()
    print(f"{'round':>6} {'driver MiB':>11} {'actor 1 MiB':>12} {'actor 2 MiB':>12}")
    for number, sizes in resident.items():
        print(f"{number:>6} {sizes[0]:>11.1f} {sizes[1]:>12.1f} {sizes[2]:>12.1f}")


if __name__ == "__main__":
    main()
