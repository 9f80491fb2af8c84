"""A whole round on Ray against bare PyTorch loops that do the same local steps at the same time.

Both sides train the same model on the same numbers of samples and evaluate the same test split each round;
the bare side is one one-thread process an actor with torch.optim.SGD and nothing else: no broadcast,
encoding, decoding, aggregation, mask statistics or logging. Blocks of rounds are interleaved, so that a noisy
machine slows both; read the ratio of the medians. As a round's evaluation may go on into the next round, a
block ends when everything it has begun is done and written.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn import functional as F

import cluster
from algorithms import Instructions
from cluster.actors.ray_session import connection, private_cluster, ray_engine
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.command_line.profile import phases
from cluster.exchange import Broadcast
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.workload import models
from cluster.workload.datasets import Split
from tests.benchmarks.report import Figure

SAMPLES, BATCH, TEST = 64, 16, 512
LARGEST = 600_000  # weights of the largest model of any case
METHODS = ("fedavg", "topk", "sparsyfed", "zerofl", "flash", "feddst", "fixed_mask")


@dataclass(frozen=True)
class Case:
    """One workload: the small CNN on random images; what is measured does not depend on what they show."""

    side: int = 8
    method: str = "fedavg"
    cohort: int = 10
    actors: int = 2
    clients: int = 100
    blocks: int = 6
    rounds: int = 10  # of a block
    sparsity: float | None = None
    model: dict[str, Any] = field(default_factory=dict)
    evaluates: bool = True  # every round
    own_steps: bool = False  # the bare loops make the method's own local steps, not dense ones
    target: float | None = None  # of the ratio of the medians

    def __str__(self) -> str:
        """The case in the table."""
        size = f" channels {self.model['channels']}" if self.model else ""
        return f"{self.side}x{self.side} {self.method} cohort {self.cohort} actors {self.actors}{size}"

    @property
    def algorithm(self) -> dict[str, Any]:
        """The configuration's section."""
        return {"name": self.method} | ({} if self.sparsity is None else {"sparsity": self.sparsity})


def cases(name: str, quick: bool) -> list[Case]:
    """The cases of one benchmark of ``__main__``."""
    usual: dict[str, Any] = {"rounds": 5 if quick else 10}
    if name == "cohorts":
        sizes = (10, 100) if quick else (10, 100, 1000)
        return [
            Case(cohort=size, clients=max(100, size), rounds=max(1, 50 // size), blocks=3 if size > 10 else 6)
            for size in sizes
        ]
    if name == "small":
        # About 1 and 5 ms a step on the machine of docs/results.md.
        models = {8: {"channels": [32, 64], "hidden": 128}, 16: {"channels": [64, 128], "hidden": 128}}
        return [
            Case(
                side=side,
                method=method,
                cohort=cohort,
                sparsity=None if method == "fedavg" else 0.95,
                model=model,
                evaluates=False,
                own_steps=method == "sparsyfed",
                target=1.3 if method != "fedavg" else 1.2 if side == 8 else 1.1,
                rounds=max(2, (20 if side == 8 else 5) * 10 // cohort) // (2 if quick else 1),
            )
            for side, model in models.items()
            for cohort in ((10,) if quick else (10, 100))
            for method in ("fedavg", "topk", "sparsyfed")
        ]
    if name == "methods":
        return [Case(method=method, **usual) for method in METHODS]
    if name == "sizes":
        widths = ([16, 32], [64, 128], [128, 256])
        return [Case(method="sparsyfed", **usual, model={"channels": width}) for width in widths]
    if name == "actors":
        return [Case(actors=actors, **usual) for actors in range(1, (os.cpu_count() or 1) + 1)]
    return [
        # The bare loops are dense: only FedAvg makes the same local steps.
        Case(side=side, method=method, target=target, **(usual if side == 8 else {"rounds": 3}))
        for side, target_of_dense in ((8, 1.15), (28, 1.05))
        for method, target in (("fedavg", target_of_dense), ("sparsyfed", None))
    ]


def images_of_side(side: int, clients: int) -> dict[str, np.ndarray]:
    """Random images and labels."""
    generator = np.random.default_rng(0)
    total = clients * SAMPLES
    return {
        "train_images": generator.integers(0, 256, (total, side, side), np.uint8),
        "train_labels": np.arange(total) % 10,
        "test_images": generator.integers(0, 256, (TEST, side, side), np.uint8),
        "test_labels": np.arange(TEST) % 10,
    }


def __getattr__(name: str) -> Any:
    """Data sets by name, such as ``images_8_100``: 8x8 pixels for 100 clients."""
    if not name.startswith("images_"):
        raise AttributeError(name)
    side, clients = map(int, name.split("_")[1:])
    return lambda: images_of_side(side, clients)


def own_steps(pipe: Connection, case: Case, clients: int) -> None:
    """The method's own local steps of ``clients`` clients, at each request."""
    torch.set_num_threads(1)
    images = images_of_side(case.side, case.clients)
    # Not [:, None]: numpy gives that dimension a stride with which torch takes channels to lie together.
    inputs = images["train_images"].reshape(-1, 1, case.side, case.side)
    split = Split(inputs, images["train_labels"].astype(np.int64), None)
    module = models.build(
        "small_cnn", input_shape=(1, case.side, case.side), classes=10, seed=0, **case.model
    )
    method = cluster.resolve({"algorithm": case.algorithm, "tracking": {"enabled": False}}).method
    settings = LocalSettings(seed=0, epochs=1, batch_size=BATCH, weight_decay=0.0, proximal=0.0)
    trainer = Trainer(module, method, settings, split, torch.device("cpu"))
    layout = trainer.layout
    start = method.initial_state(layout.flatten(module), layout, np.random.default_rng(0)).weights.numpy()
    rows = np.arange(case.clients * SAMPLES).reshape(case.clients, SAMPLES)
    for number in (1, 2):  # weights as clients get them from round 2 on
        told = Instructions(round=number, rounds=2)
        broadcast = Broadcast(start, start, None, told, 0.01, 2.0**20, case.cohort * SAMPLES)
        start = trainer.visit(0, rows[0], method.sparsity, broadcast).values.copy()
    while pipe.recv():
        started = time.process_time()
        for client in range(clients):
            trainer._load(broadcast, None)
            visit, steps, _ = trainer._set_up(client, rows[client], method.sparsity, broadcast, None)
            half = method.client(method, visit)
            half.begin()
            half.train(steps.batches(visit))
        pipe.send(time.process_time() - started)


def bare_loop(pipe: Connection, case: Case, clients: int) -> None:
    """Dense local steps of ``clients`` clients and this process's share of an evaluation, at each request."""
    torch.set_num_threads(1)
    side = case.side
    model = models.build("small_cnn", input_shape=(1, side, side), classes=10, seed=0, **case.model)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = images_of_side(side, case.clients)

    def to_input(images: np.ndarray) -> torch.Tensor:
        return ((torch.from_numpy(images)[:, None].float() / 255) - 0.5) / 0.5

    rows = np.arange(case.clients * SAMPLES).reshape(case.clients, SAMPLES)
    test, test_labels = data["test_images"][: TEST // case.actors], torch.from_numpy(data["test_labels"])
    while pipe.recv():
        started = time.process_time()
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
        if case.evaluates:
            model.eval()
            with torch.no_grad():
                _ = int((model(to_input(test)).argmax(1) == test_labels[: len(test)]).sum())
        pipe.send(time.process_time() - started)


def measure(case: Case, folder: Path, name: str = "round") -> list[Figure]:
    """Interleave rounds and bare loops."""
    config = cluster.resolve(
        {
            "rounds": 10_000,
            "cohort": case.cohort,
            "checkpoint_every": 10,
            "actors": case.actors,
            "evaluate_every": 1 if case.evaluates else 10_000,
            "algorithm": case.algorithm,
            "model": {"name": "small_cnn", **case.model},
            "data": {
                "name": f"tests.benchmarks.bench_round:images_{case.side}_{case.clients}",
                "cache": str(folder / "cache"),
            },
            "partition": {"name": "iid", "clients": case.clients},
            "local": {"epochs": 1, "batch_size": BATCH, "lr": 0.01},
            "tracking": {"enabled": False},
        }
    )
    federation = Federation.of(config)
    engine = ray_engine(config, federation)
    run_folder = RunFolder.create(Path(tempfile.mkdtemp(dir=folder)) / "run", config)
    driver = Driver(run_folder, federation, engine)
    spawn = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    for part in np.array_split(np.arange(case.cohort), case.actors):
        mine, theirs = spawn.Pipe()
        loop = own_steps if case.own_steps else bare_loop
        spawn.Process(target=loop, args=(theirs, case, len(part)), daemon=True).start()
        pipes.append(mine)
    ours = [psutil.Process(), *map(psutil.Process, engine.pids())]
    seconds: dict[str, list[float]] = {"ray": [], "bare": [], "ray cpu": [], "bare cpu": []}

    def ray_rounds() -> float:
        before = _cpu_seconds(ours)
        for _ in range(case.rounds):
            driver._round()
        driver._book_keeping()
        return _cpu_seconds(ours) - before

    def bare_rounds() -> float:
        cpu = 0.0
        for _ in range(case.rounds):
            for pipe in pipes:
                pipe.send(True)
            cpu += sum(pipe.recv() for pipe in pipes)
        return cpu

    for turn in range(1 + case.blocks):
        for side, work in (("ray", ray_rounds), ("bare", bare_rounds)):
            started = time.perf_counter()
            cpu = work()
            if turn:  # the first rounds learn costs and warm up
                seconds[side].append((time.perf_counter() - started) / case.rounds)
                seconds[f"{side} cpu"].append(cpu / case.rounds)
    for pipe in pipes:
        pipe.send(False)
    actor_mib = max(process.memory_info().rss for process in ours[1:]) / 2**20
    driver_mib = ours[0].memory_info().rss / 2**20
    engine.close()
    lines = run_folder.rounds()[case.rounds :]
    median = {side: statistics.median(values) for side, values in seconds.items()}
    steps = case.cohort * -(-SAMPLES // BATCH)
    traffic = statistics.median(line["comm/uplink_bytes"] + line["comm/downlink_bytes"] for line in lines)
    figures = [
        Figure(name, str(case), "ray/bare", median["ray"] / median["bare"], case.target),
        Figure(name, str(case), "cpu ray/bare", median["ray cpu"] / median["bare cpu"]),
        Figure(name, str(case), "cpu ms", 1e3 * median["ray cpu"]),
        Figure(name, str(case), "bare cpu ms", 1e3 * median["bare cpu"]),
        Figure(name, str(case), "round ms", 1e3 * median["ray"]),
        Figure(name, str(case), "bare ms", 1e3 * median["bare"]),
        Figure(name, str(case), "clients/s", case.cohort / median["ray"]),
        Figure(name, str(case), "steps/s", steps / median["ray"]),
        Figure(name, str(case), "MB/s", traffic / median["ray"] / 1e6),
        Figure(name, str(case), "driver MiB", driver_mib),
        Figure(name, str(case), "actor MiB", actor_mib),
    ]
    return figures + [
        Figure(f"{name}: ms by phase", str(case), phase.name, 1e3 * phase.median_s) for phase in phases(lines)
    ]


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def bench_cluster() -> AbstractContextManager[None]:
    """A private cluster as a run starts it; this process computes on one thread, as a run's driver does."""
    torch.set_num_threads(1)
    actors = max(2, os.cpu_count() or 1)
    return connection("local", num_cpus=actors, **private_cluster(LARGEST, actors))


def figures(name: str, quick: bool) -> list[Figure]:
    """Every case of one benchmark of ``__main__``."""
    found: list[Figure] = []
    with bench_cluster(), tempfile.TemporaryDirectory() as folder:
        for case in cases(name, quick):
            measured = measure(case, Path(folder), name)
            print(f"  {case}: ray/bare {measured[0].value:.3f}", flush=True)
            found += measured
    return found
