"""A whole round on Ray against bare PyTorch loops that do the same local steps at the same time.

    python -m tests.benchmarks.bench_round [--actors 2] [--cohort 10] [--rounds 40] [--method fedavg]

Both sides train the same model on the same numbers of samples and evaluate the same test split each round;
the bare side is one one-thread process an actor with torch.optim.SGD and nothing else: no broadcast,
encoding, decoding, aggregation, mask statistics or logging. Rounds are interleaved, so that a noisy machine
slows both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import ray
import torch
from torch.nn import functional as F

import cluster
from cluster.driver import Driver
from cluster.engine import RayEngine
from cluster.federation import Federation
from cluster.run_folder import RunFolder
from cluster.workload import models

CLIENTS, SAMPLES, BATCH, TEST = 100, 64, 16, 512


def images_of_side(side: int) -> dict[str, np.ndarray]:
    """Random images and labels: what is measured does not depend on what they show."""
    generator = np.random.default_rng(0)
    total = CLIENTS * SAMPLES
    return {
        "train_images": generator.integers(0, 256, (total, side, side), np.uint8),
        "train_labels": np.arange(total) % 10,
        "test_images": generator.integers(0, 256, (TEST, side, side), np.uint8),
        "test_labels": np.arange(TEST) % 10,
    }


def images_8() -> dict[str, np.ndarray]:
    """8x8 images."""
    return images_of_side(8)


def images_28() -> dict[str, np.ndarray]:
    """28x28 images."""
    return images_of_side(28)


def bare_loop(pipe: Connection, side: int, clients: int, share: int) -> None:
    """Local steps of ``clients`` clients and evaluation of 1/``share`` of the test split, at each request."""
    torch.set_num_threads(1)
    model = models.build("small_cnn", input_shape=(1, side, side), classes=10, seed=0)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = images_of_side(side)

    def to_input(images: np.ndarray) -> torch.Tensor:
        return ((torch.from_numpy(images)[:, None].float() / 255) - 0.5) / 0.5

    rows = np.arange(CLIENTS * SAMPLES).reshape(CLIENTS, SAMPLES)
    test, test_labels = data["test_images"][: TEST // share], torch.from_numpy(data["test_labels"])
    while pipe.recv():
        for client in range(clients):
            model.load_state_dict(start)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            images = to_input(data["train_images"][rows[client]])
            labels = torch.from_numpy(data["train_labels"][rows[client]])
            for chosen in torch.randperm(SAMPLES).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            correct = (model(to_input(test)).argmax(1) == test_labels[: len(test)]).sum()
        pipe.send(int(correct))


def measure(side: int, method: str, actors: int, cohort: int, rounds: int, folder: Path) -> None:
    """Interleave rounds and bare loops, print the medians and their ratio."""
    config = cluster.resolve(
        {
            "rounds": 10_000,
            "cohort": cohort,
            "checkpoint_every": 10_000,
            "actors": actors,
            "algorithm": {"name": method},
            "data": {"name": f"tests.benchmarks.bench_round:images_{side}", "cache": str(folder / "cache")},
            "partition": {"name": "iid", "clients": CLIENTS},
            "local": {"epochs": 1, "batch_size": BATCH, "lr": 0.01},
            "tracking": {"enabled": False},
        }
    )
    federation = Federation.of(config)
    engine = RayEngine(federation.workload(), federation.sizes, actors=actors, cpus=1, gpus=0)
    run_folder = RunFolder.create(folder / f"run-{side}-{method}-{cohort}", config)
    driver = Driver(run_folder, federation, engine)
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    shares = [len(part) for part in np.array_split(np.arange(cohort), actors)]
    for clients in shares:
        mine, theirs = spawn.Pipe()
        process = spawn.Process(target=bare_loop, args=(theirs, side, clients, actors), daemon=True)
        process.start()
        pipes.append(mine)
        processes.append(process)

    def bare() -> None:
        for pipe in pipes:
            pipe.send(True)
        for pipe in pipes:
            pipe.recv()

    times: dict[str, list[float]] = {"ray": [], "bare": []}
    for turn in range(rounds + 5):
        for name, work in (("ray", driver._round), ("bare", bare)):
            started = time.perf_counter()
            work()
            if turn >= 5:  # the first rounds learn costs and warm up
                times[name].append(time.perf_counter() - started)
    for pipe in pipes:
        pipe.send(False)
    engine.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    lines = run_folder.rounds()[5:]
    phases = [key for key in lines[0] if key.startswith("time/") and key.endswith("_s")]
    split = {key[5:-2]: statistics.median(line[key] for line in lines) * 1e3 for key in phases}
    print(
        f"{side}x{side}  {method:<10} cohort {cohort:>4}  ray {medians['ray'] * 1e3:8.1f} ms  "
        f"bare {medians['bare'] * 1e3:8.1f} ms  ratio {medians['ray'] / medians['bare']:.3f}  "
        f"driver {psutil.Process().memory_info().rss / 2**20:.0f} MiB",
        flush=True,
    )
    print("    ms by phase: " + "  ".join(f"{name} {ms:.1f}" for name, ms in split.items()), flush=True)


def main() -> None:
    """Measure each image size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--cohort", type=int, nargs="+", default=[10])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--method", nargs="+", default=["fedavg"])
    parser.add_argument("--side", type=int, nargs="+", default=[8, 28])
    arguments = parser.parse_args()
    ray.init(
        num_cpus=arguments.actors, include_dashboard=False, log_to_driver=False, object_store_memory=2**29
    )
    with tempfile.TemporaryDirectory() as folder:
        for side in arguments.side:
            for method in arguments.method:
                for cohort in arguments.cohort:
                    measure(side, method, arguments.actors, cohort, arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
