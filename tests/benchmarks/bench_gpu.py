"""Local training on a GPU: passes launched one by one against CUDA graphs, by method and precision.

Two workloads of the literature: CIFAR ResNet-18 with clients of 500 samples in batches of 16, and the CNN of
pfl-research's CIFAR-10 benchmark (1.6 million weights) with clients of 50 in batches of 10. Random images.
A whole run of the first in under five minutes (700 rounds of 10 clients) allows 42 ms a client, of the second
in under a minute (1,500 rounds of 50 users) 0.8 ms. Without a GPU it says so and measures nothing.

    sparsyfed bench gpu
    sparsyfed run paper-cifar10 gpus_per_actor=0.25 evaluate_every=50    # the whole run, four actors a GPU
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from algorithms import Algorithm, Instructions
from algorithms.fedavg import FedAvg
from algorithms.sparsyfed import SparsyFed
from cluster.clients.local_training import Broadcast, LocalSettings, Trainer
from cluster.clients.passes import set_up_cuda
from cluster.workload import models
from cluster.workload.datasets import Split
from tests.benchmarks.report import Figure


def pfl_cnn() -> nn.Module:
    """The two-convolution CNN of pfl-research's benchmark: 1,626,442 weights on 32x32x3."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 14 * 14, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


WORKLOADS: dict[str, dict[str, Any]] = {
    "resnet18, 500 samples, batch 16": {
        "model": lambda: models.build("resnet18", input_shape=(3, 32, 32), classes=10, seed=0),
        "samples": 500,
        "batch": 16,
    },
    "pfl cnn, 50 samples, batch 10": {"model": pfl_cnn, "samples": 50, "batch": 10},
}


def figures(name: str, quick: bool) -> list[Figure]:
    """Milliseconds a client and steps a second of each workload, method and way."""
    if not torch.cuda.is_available():
        print("  gpu: torch sees no CUDA device here; nothing was measured")
        return []
    set_up_cuda()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (5000, 3, 32, 32), np.uint8)
    split = Split(images, np.arange(5000) % 10, None)
    found = []
    for workload, about in WORKLOADS.items():
        for method in (FedAvg(), SparsyFed(sparsity=0.95)):
            for precision in ("float32", "tf32", "bfloat16"):
                for graphs in (False, True):
                    seconds = _visits(about, method, split, precision, graphs, 5 if quick else 15)
                    steps = -(-about["samples"] // about["batch"])
                    case = f"{workload}: {method.name} {precision} {'graphs' if graphs else 'launched'}"
                    found += [
                        Figure(name, case, "client ms", 1e3 * seconds),
                        Figure(name, case, "steps/s", steps / seconds),
                    ]
    return found


def _visits(
    about: dict[str, Any], method: Algorithm, split: Split, precision: Any, graphs: bool, repeats: int
) -> float:
    """Median seconds of a visit as clients of round 2 make it."""
    model = about["model"]()
    settings = LocalSettings(0, 1, about["batch"], 0.0, 0.0, precision, graphs)
    trainer = Trainer(model, method, settings, split, torch.device("cuda"))
    state = method.initial_state(
        trainer.layout.flatten(trainer.module), trainer.layout, np.random.default_rng(0)
    )
    rows, weights = np.arange(about["samples"]), state.weights.numpy()
    seconds = []
    for turn in range(repeats + 5):
        if turn < 2:  # one dense visit, then from what it left, as from round 2 on
            instructions = Instructions(round=turn + 1, rounds=2)
            broadcast = Broadcast(weights, weights, None, instructions, 0.01, 2.0**20, len(rows))
        started = time.perf_counter()
        trained = trainer.visit(turn, rows, method.sparsity, broadcast)
        if turn == 0:
            weights = trained.values.copy()
        if turn >= 5:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
