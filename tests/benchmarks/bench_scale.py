"""What a round costs against the population and the cohort, and what a thousand actors would cost one driver.

    python -m tests.benchmarks.bench_scale [--populations 1000 100000 1000000] [--cohorts 10 100 1000]
    python -m tests.benchmarks.bench_scale --part merge      one actor's total of an 11M model
    python -m tests.benchmarks.bench_scale --part control    Ray's own calls at a thousand actors

The first prints, for each pair, the seconds of a round on two actors, those of bare PyTorch loops that do
the same local steps in as many processes (interleaved, so that a noisy machine slows both), the difference in
CPU milliseconds a client, and the memory of the driver and of the larger actor, not counting shared pages.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

import cluster
from algorithms import Grid, Total
from cluster.driver import Driver
from cluster.federation import Federation
from cluster.ray_session import ray_engine
from cluster.run_folder import RunFolder
from tests.benchmarks.bench_round import BATCH, SAMPLES, bare_loop

ACTORS = 2
#: Weights of ResNet-18 for CIFAR-10.
LARGE = 11_173_962


def private_mib(process: psutil.Process) -> float:
    """Memory that goes with the process: unique pages, not the object store or mapped data."""
    return float(process.memory_full_info().uss) / 2**20


def client_actors() -> list[psutil.Process]:
    """Processes of this cluster's client actors."""
    return [p for p in psutil.Process().children(recursive=True) if "ClientHost" in " ".join(p.cmdline())]


def measure_rounds(population: int, cohort: int, rounds: int, method: str, folder: Path) -> None:
    """Interleave rounds and bare loops, print medians and memory."""
    config = cluster.resolve(
        {
            "rounds": 10_000,
            "cohort": cohort,
            "checkpoint_every": 10_000,
            "actors": ACTORS,
            "algorithm": {"name": method},
            "data": {"name": "tests.benchmarks.bench_round:images_8", "cache": str(folder / "cache")},
            "partition": {
                "name": "sampled",
                "clients": population,
                "samples_per_client": SAMPLES,
                "alpha": 0.3,
            },
            "local": {"epochs": 1, "batch_size": BATCH, "lr": 0.01},
            "tracking": {"enabled": False},
        }
    )
    started = time.perf_counter()
    federation = Federation.of(config)
    described = time.perf_counter() - started
    engine = ray_engine(config, federation)
    run_folder = RunFolder.create(folder / f"run-{population}-{cohort}", config)
    driver = Driver(run_folder, federation, engine)
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    for clients in (len(part) for part in np.array_split(np.arange(cohort), ACTORS)):
        mine, theirs = spawn.Pipe()
        spawn.Process(target=bare_loop, args=(theirs, 8, clients, ACTORS), daemon=True).start()
        pipes.append(mine)

    def bare() -> None:
        for pipe in pipes:
            pipe.send(True)
        for pipe in pipes:
            pipe.recv()

    times: dict[str, list[float]] = {"ray": [], "bare": []}
    warm = 2
    for turn in range(rounds + warm):
        for name, work in (("ray", driver._round), ("bare", bare)):
            started = time.perf_counter()
            work()
            if turn >= warm:
                times[name].append(time.perf_counter() - started)
    for pipe in pipes:
        pipe.send(False)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    overhead = (seconds["ray"] - seconds["bare"]) * ACTORS / cohort * 1e3
    actors = max(map(private_mib, client_actors()))
    print(
        f"{population:>10,} {cohort:>6} {described:>10.2f} {seconds['ray']:>9.3f} {seconds['bare']:>9.3f} "
        f"{overhead:>12.2f} {private_mib(psutil.Process()):>11.0f} {actors:>10.0f}",
        flush=True,
    )
    engine.close()


def measured(work: Callable[[], Any], times: int = 5) -> float:
    """Median milliseconds."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e3


def some_total(weights: int) -> Total:
    """A total as an actor hands it over: two float64 and an int32 a weight."""
    rng = np.random.default_rng(0)
    high, low = rng.random(weights), rng.random(weights)
    return Total(
        Grid(1.0, 1000), high, low, np.ones(weights, np.int32), np.ones(20, np.int64), None, 500, [0]
    )


@ray.remote
class Host:
    """Holds a total, as a client actor does."""

    def __init__(self, weights: int) -> None:
        self._total = some_total(weights)

    def collect(self) -> Total:
        """The total."""
        return self._total

    def nothing(self) -> None:
        """An empty call."""


def measure_merge() -> None:
    """One actor's total of a large model: out of the actor, into the driver, merged."""
    host = Host.remote(LARGE)
    ray.get(host.nothing.remote())
    mine = some_total(LARGE)
    whole = measured(lambda: mine.merge(ray.get(host.collect.remote())))
    other = some_total(LARGE)
    alone = measured(lambda: mine.merge(other))
    size = 20 * LARGE / 1e6
    print(f"one actor's total of {LARGE:,} weights: {size:.0f} MB")
    print(f"  out of the actor, into this process, merged  {whole:8.0f} ms  (same node, no network)")
    print(f"  merged alone                                 {alone:8.0f} ms")


def measure_control(actors: int = 1000) -> None:
    """Calls that the driver makes to Ray, at many actors."""
    print(f"Ray's calls at {actors:,} actors")
    group = None

    def reserve() -> None:
        nonlocal group
        group = ray.util.placement_group([{"slot": 1.0}] * actors, strategy="PACK")
        assert group.wait(300)

    print(f"  a placement group of {actors:,} bundles on one node  {measured(reserve, 1):8.0f} ms")
    ray.util.remove_placement_group(group)
    host = Host.remote(1)
    ray.get(host.nothing.remote())
    calls = 2 * actors
    references: list[Any] = []

    def submit() -> None:
        references.extend(host.nothing.remote() for _ in range(calls))

    print(f"  submitting {calls:,} calls                           {measured(submit, 1):8.0f} ms")
    ray.get(references)

    @ray.remote(resources={"never": 1})
    def never() -> None: ...

    waiting = [never.remote() for _ in range(calls)] + [host.nothing.remote()]
    ray.wait([waiting[-1]])
    ready = measured(lambda: ray.wait(waiting), 21)
    print(f"  ray.wait for one of {len(waiting):,} calls, one is done {ready:8.2f} ms")


def main() -> None:
    """Measure the chosen part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=["rounds", "merge", "control"], default="rounds")
    parser.add_argument("--populations", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--cohorts", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="fedavg")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-", dir="/tmp") as folder:
        ray.init(
            num_cpus=ACTORS,
            resources={"slot": 1000},
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=2**30,
            _temp_dir=str(Path(folder) / "ray"),
        )
        if arguments.part == "merge":
            measure_merge()
        elif arguments.part == "control":
            measure_control()
        else:
            print("population cohort describe_s   round_s    bare_s  overhead_ms  driver_MiB  actor_MiB")
            for population in arguments.populations:
                for cohort in arguments.cohorts:
                    place = Path(folder)
                    measure_rounds(population, cohort, arguments.rounds, arguments.method, place)
        ray.shutdown()


if __name__ == "__main__":
    main()
