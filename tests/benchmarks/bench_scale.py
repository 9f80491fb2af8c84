"""What a round costs against the population and the cohort, and what a thousand actors would cost one driver.

    python -m tests.benchmarks.bench_scale [--populations 1000 100000 1000000] [--cohorts 10 100 1000]
    python -m tests.benchmarks.bench_scale --inline          without Ray, in this process
    python -m tests.benchmarks.bench_scale --part control    Ray's own calls at a thousand actors

The first prints, for each pair: the seconds of a round on two actors, and of bare PyTorch loops that do the
same local steps in as many processes (interleaved, so that a noisy machine slows both); the CPU milliseconds
that a client takes of driver and actors, and of the bare processes, which other work on the machine changes
less; and the memory of the driver and of the larger actor, not counting shared pages.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from torch.nn import functional as F

import cluster
from cluster.actors.ray_session import ray_engine
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.rounds.engine import Engine, InlineEngine
from cluster.workload import models
from cluster.workload.datasets import open_dataset

ACTORS, BATCH = 2, 16


def private_mib(process: psutil.Process) -> float:
    """Memory that goes with the process: unique pages, not the object store or mapped data."""
    return float(process.memory_full_info().uss) / 2**20


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU time that processes have taken."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def client_actors() -> list[psutil.Process]:
    """Processes of this cluster's client actors."""
    return [p for p in psutil.Process().children(recursive=True) if "ClientHost" in " ".join(p.cmdline())]


def bare_loop(pipe: Connection, data: Path, name: str, clients: int, samples: int) -> None:
    """The local steps of ``clients`` clients at each request, and nothing else."""
    torch.set_num_threads(1)
    train = open_dataset(data).train
    model = models.build(name, input_shape=(1, 8, 8), classes=10, seed=0).train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = np.random.default_rng(0)
    while pipe.recv():
        for _ in range(clients):
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            rows = np.sort(rng.integers(len(train.targets), size=samples))
            images = (torch.from_numpy(train.inputs[rows]).float() / 255 - 0.5) / 0.5
            labels = torch.from_numpy(train.targets[rows])
            for chosen in torch.randperm(samples).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
        pipe.send(True)


def measure_rounds(
    population: int, cohort: int, arguments: argparse.Namespace, actors: int, folder: Path
) -> None:
    """Interleave rounds and bare loops, print medians and memory."""
    config = cluster.resolve(
        {
            "rounds": 10_000,
            "cohort": cohort,
            "checkpoint_every": 10_000,
            "evaluate_every": 10_000,
            "actors": actors,
            "algorithm": {"name": arguments.method},
            "model": {"name": arguments.model},
            "data": {"name": "digits", "cache": str(folder / "cache")},
            "partition": {
                "name": "sampled",
                "clients": population,
                "samples_per_client": arguments.samples,
                "alpha": 0.3,
            },
            "local": {"epochs": 1, "batch_size": BATCH, "lr": 0.01},
            "tracking": {"enabled": False},
        }
    )
    started = time.perf_counter()
    federation = Federation.of(config)
    described = time.perf_counter() - started
    engine: Engine = InlineEngine(federation.setup()) if arguments.inline else ray_engine(config, federation)
    run_folder = RunFolder.create(folder / f"run-{population}-{cohort}", config)
    driver = Driver(run_folder, federation, engine)
    spawn = multiprocessing.get_context("spawn")
    pipes, bare_processes = [], []
    for clients in (len(part) for part in np.array_split(np.arange(cohort), actors)):
        mine, theirs = spawn.Pipe()
        process = spawn.Process(
            target=bare_loop,
            args=(theirs, federation.dataset.folder, arguments.model, clients, arguments.samples),
            daemon=True,
        )
        process.start()
        pipes.append(mine)
        bare_processes.append(psutil.Process(process.pid))

    def bare() -> None:
        for pipe in pipes:
            pipe.send(True)
        for pipe in pipes:
            pipe.recv()

    sides = {
        "ray": (driver._round, [psutil.Process(), *client_actors()]),
        "bare": (bare, bare_processes),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    warm = 1  # the first round learns costs and warms caches
    for turn in range(arguments.rounds + warm):
        for name, (work, processes) in sides.items():
            started, used = time.perf_counter(), cpu_seconds(processes)
            work()
            if turn >= warm:
                times[name].append((time.perf_counter() - started, cpu_seconds(processes) - used))
    largest = max(map(private_mib, client_actors()), default=0.0)
    for pipe, process in zip(pipes, bare_processes, strict=True):
        pipe.send(False)
        process.wait()
    medians = {name: np.median(values, axis=0) for name, values in times.items()}
    ray_s, bare_s = (medians[name][0] for name in sides)
    ray_ms, bare_ms = (medians[name][1] / cohort * 1e3 for name in sides)
    print(
        f"{population:>10,} {cohort:>6} {described:>10.2f} {ray_s:>9.3f} {bare_s:>9.3f} "
        f"{ray_ms:>10.2f} {bare_ms:>11.2f} {private_mib(psutil.Process()):>11.0f} {largest:>10.0f}",
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


@ray.remote
class Host:
    """Stands for a client actor."""

    def nothing(self) -> None:
        """An empty call."""


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
    host = Host.remote()
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
    parser.add_argument("--part", choices=["rounds", "control"], default="rounds")
    parser.add_argument("--inline", action="store_true", help="rounds in this process, one bare loop")
    parser.add_argument("--populations", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--cohorts", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64, help="samples a client, in batches of 16")
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--method", default="fedavg")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-", dir="/tmp") as folder:
        if not arguments.inline:
            ray.init(
                "local",
                num_cpus=ACTORS,
                resources={"slot": 1000},
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=2**30,
                _temp_dir=str(Path(folder) / "ray"),
            )
        if arguments.part == "control":
            measure_control()
        else:
            print(
                "population cohort describe_s   round_s    bare_s  client_ms    bare_ms driver_MiB  actor_MiB"
            )
            for population in arguments.populations:
                for cohort in arguments.cohorts:
                    actors = 1 if arguments.inline else ACTORS
                    measure_rounds(population, cohort, arguments, actors, Path(folder))
        ray.shutdown()


if __name__ == "__main__":
    main()
