"""Visits of tiny clients by a trainer of their own, for comparing ways to compute them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from algorithms import Algorithm
from algorithms.fedavg import FedAvg
from algorithms.feddst import FedDST
from algorithms.fixed_mask import FixedMask
from algorithms.sparsyfed import SparsyFed
from algorithms.topk import TopK
from algorithms.zerofl import ZeroFL
from cluster.clients.local_training import LocalSettings, Trained, Trainer
from cluster.clients.passes import GraphPasses
from cluster.exchange import Broadcast
from cluster.workload import models
from cluster.workload.datasets import Split
from tests.tiny_experiment import tiny_images

METHODS = {
    "fedavg": FedAvg(),
    "topk": TopK(sparsity=0.8),
    "sparsyfed": SparsyFed(sparsity=0.8),
    "sparsyfed every batch": SparsyFed(sparsity=0.8, threshold="every_batch"),
    "sparsyfed spectral": SparsyFed(sparsity=0.8, exponent="spectral"),
    "zerofl": ZeroFL(sparsity=0.7),
    "zerofl first batch in convolutions": ZeroFL(sparsity=0.7, threshold="first_batch_conv"),
    "fixed_mask": FixedMask(sparsity=0.7),
    "feddst": FedDST(sparsity=0.7, readjust_interval=1),
}


def recorder(trainer: Trainer, recorded: list[str]) -> Callable:
    """Capture without a GPU: the work runs when replayed, and what Python does meanwhile is undone."""
    prunings = list(trainer._pruning.values())

    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        before_recording = [pruning.drawn for pruning in prunings]
        recorded.append("recorded")

        def replay() -> Tensor:
            now = [pruning.drawn for pruning in prunings]
            for pruning, drawn in zip(prunings, before_recording, strict=True):
                pruning.drawn = drawn
            loss = compute()
            for pruning, drawn in zip(prunings, now, strict=True):
                pruning.drawn = drawn
            return loss

        return replay

    return capture


def trainer_of(
    method: Algorithm,
    device: str = "cpu",
    *,
    recorded: list[str] | None = None,
    model=None,
    times=1,
    **settings,
) -> Trainer:
    """A trainer of a tiny model, or of another one on images ``times`` as large.

    ``recorded`` collects what the stand-in for CUDA graphs records.
    """
    arrays = tiny_images()
    images = np.kron(arrays["train_images"], np.ones((1, times, times), np.uint8))
    split = Split(images[:, None].copy(), arrays["train_labels"], None)
    model = model or models.build(
        "small_cnn", input_shape=(1, 8, 8), classes=3, seed=1, channels=[4, 6], hidden=16, groups=2
    )
    options = LocalSettings(seed=3, epochs=2, batch_size=8, weight_decay=1e-3, proximal=0.0)
    trainer = Trainer(copy.deepcopy(model), method, replace(options, **settings), split, torch.device(device))
    if recorded is not None:
        capture = recorder(trainer, recorded)
        trainer._passes = GraphPasses(trainer._compute, trainer._pruning.values(), capture)
    return trainer


def broadcast_of(trainer: Trainer, method, weights: np.ndarray | None, number: int) -> Broadcast:
    layout = trainer.layout
    state = method.initial_state(layout.flatten(trainer.module), layout, np.random.default_rng(0))
    weights = state.weights.numpy().copy() if weights is None else weights
    mask = None if state.mask is None else state.mask.numpy()
    instructions = method.instruct(replace(state, round=number - 1), 10, 6)
    return Broadcast(weights, weights, mask, instructions, 0.2, 2.0**20, 60)


def play(trainer: Trainer, method) -> list[Trained]:
    """Two rounds of three clients with 20, 33 and 8 samples: batches of 8, 4 and 1."""
    played: list[Trained] = []
    weights = None
    for number in (1, 2):
        broadcast = broadcast_of(trainer, method, weights, number)
        for client, rows in enumerate((range(20), range(20, 53), range(53, 61))):
            trained = trainer.visit(client, np.arange(120)[list(rows)], method.sparsity, broadcast)
            support = None if trained.support is None else trained.support.copy()
            played.append(replace(trained, values=trained.values.copy(), support=support))
        if not method.uploads_differences:
            weights = played[-1].values
    return played
