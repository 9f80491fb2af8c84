"""Local steps of SparsyFed, ZeroFL, FedPM and pFedGate against dense ones.

One thread, the quickstart's model and client (48 samples, 5 epochs, batches of 16: 15 steps a visit), the
built-in decoder on 64 tokens and the vision transformer on 32x32 images; weights as clients get them from
round 2 on. Visits of all variants are interleaved and the CPU time of the thread is
taken, so that a busy machine slows them alike: read the ratios of the medians. ``visit`` is the whole of
``Trainer.visit`` (load, steps, cut, measurements) per step, ``step`` is forward, backward and update alone,
``map`` the part of it in the method's hooks (w -> theta, dL/dtheta -> dL/dw).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from algorithms import Algorithm, Client, Instructions, Visit
from algorithms.fedavg import FedAvg
from algorithms.fedpm import FedPM
from algorithms.pfedgate import PFedGate
from algorithms.sparsyfed import SparsyFed
from algorithms.zerofl import ZeroFL
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.exchange import Broadcast
from cluster.workload import models
from cluster.workload.datasets import Split
from cluster.workload.language_model import LanguageModel
from cluster.workload.objectives import Classification, Objective
from tests.benchmarks.report import Figure

SAMPLES, EPOCHS, BATCH = 48, 5, 16
STEPS = EPOCHS * -(-SAMPLES // BATCH)


def _images(side: int) -> Split:
    digits = load_digits()
    small = (digits.images[:SAMPLES] / 16 * 255).astype(np.uint8)
    if side == 28:  # each pixel three times, in a border of two
        small = np.pad(np.kron(small, np.ones((1, 3, 3), np.uint8)), ((0, 0), (2, 2), (2, 2)))
    return Split(np.ascontiguousarray(small[:, None]), digits.target[:SAMPLES].astype(np.int64), None)


def _tokens() -> Split:
    drawn = np.random.default_rng(0).integers(0, 257, (SAMPLES, 65))
    return Split(drawn[:, :-1].astype(np.int16), drawn[:, 1:].astype(np.int64), None)


@dataclass(frozen=True)
class _Task:
    """What is trained: a model and samples for it."""

    label: str
    model: str
    split: Split
    outputs: int
    objective: Objective
    repeats: int


def _tasks() -> list[_Task]:
    images, small, large = Classification(), _images(8), _images(28)
    colours = np.repeat(np.pad(large.inputs, ((0, 0), (0, 0), (2, 2), (2, 2))), 3, axis=1)
    return [
        _Task("8x8", "small_cnn", small, 10, images, 20),
        _Task("28x28", "small_cnn", large, 10, images, 8),
        _Task("decoder", "transformer", _tokens(), 257, LanguageModel(), 8),
        _Task("vit", "vit", Split(colours, large.targets, None), 10, images, 8),
    ]


class _Variant:
    """A trainer and the weights a client of round 2 receives; collects times of a step."""

    def __init__(self, method: Algorithm, task: _Task) -> None:
        split = task.split
        model = models.build(task.model, input_shape=split.inputs.shape[1:], classes=task.outputs, seed=1)
        settings = LocalSettings(seed=0, epochs=EPOCHS, batch_size=BATCH, weight_decay=0.0, proximal=0.0)
        self.method = method
        self.trainer = Trainer(model, method, settings, split, torch.device("cpu"), task.objective)
        layout = self.trainer.layout
        state = method.initial_state(layout.flatten(self.trainer.module), layout, np.random.default_rng(0))
        self.weights = state.weights.numpy()
        self.weights = self.play(1).values.copy()
        self.visits: list[float] = []
        self.steps: list[float] = []
        self.maps: list[float] = []
        self._spent = {"step": 0.0, "map": 0.0}
        # Instance attributes hide the methods: the product itself carries no stopwatch.
        object.__setattr__(method, "client", self._timed_client)

    def play(self, round_number: int) -> Any:
        instructions = Instructions(round=round_number, rounds=2)
        broadcast = Broadcast(self.weights, self.weights, None, instructions, 0.1, 2.0**20, SAMPLES)
        return self.trainer.visit(0, np.arange(SAMPLES), self.method.sparsity, broadcast)

    def measure(self) -> None:
        self._spent = {"step": 0.0, "map": 0.0}
        start = time.thread_time()
        self.play(2)
        self.visits.append((time.thread_time() - start) / STEPS)
        self.steps.append(self._spent["step"] / STEPS)
        self.maps.append(self._spent["map"] / STEPS)

    def _timed_client(self, method: Algorithm, visit: Visit) -> Client:
        client = type(method).client(method, visit)
        client.before_forward = self._timed("map", client.before_forward)
        client.after_backward = self._timed("map", client.after_backward)
        client.gradient = self._timed("step", client.gradient)
        visit.workbench.descend = self._timed("step", visit.workbench.descend)
        return client

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.thread_time()
            result = function(*arguments)
            self._spent[part] += time.thread_time() - start
            return result

        return timed


def _variants(sparsity: float) -> dict[str, Algorithm]:
    return {
        "sparsyfed, first_batch": SparsyFed(sparsity=sparsity),
        "sparsyfed, every_batch": SparsyFed(sparsity=sparsity, threshold="every_batch"),
        "sparsyfed, powerpropagation only": SparsyFed(sparsity=sparsity, activation_pruning=False),
        "sparsyfed, activation pruning only": SparsyFed(sparsity=sparsity, beta=1.0),
        "zerofl, first_batch": ZeroFL(sparsity=sparsity),
        "zerofl, every_batch": ZeroFL(sparsity=sparsity, threshold="every_batch"),
    }


def figures(name: str, quick: bool) -> list[Figure]:
    """Step and visit of each task, sparsity and variant."""
    torch.set_num_threads(1)
    found = []
    for task in _tasks():
        runs = {f"{task.label} dense (fedavg)": _Variant(FedAvg(), task)}
        for sparsity in (0.95,) if quick else (0.9, 0.95):
            for variant, method in _variants(sparsity).items():
                runs[f"{task.label} {sparsity} {variant}"] = _Variant(method, task)
        runs[f"{task.label} fedpm"] = _Variant(FedPM(), task)
        runs[f"{task.label} pfedgate"] = _Variant(PFedGate(), task)
        for _ in range(task.repeats // 2 if quick else task.repeats):
            for run in runs.values():
                run.measure()
        dense = next(iter(runs.values()))
        for case, run in runs.items():
            step, visit = median(run.steps), median(run.visits)
            target = 1.3 if case.endswith(("first_batch", "fedpm", "pfedgate")) else None
            found += [
                Figure(name, case, "step ms", 1e3 * step),
                Figure(name, case, "step/dense", step / median(dense.steps), target),
                Figure(name, case, "map ms", 1e3 * median(run.maps)),
                Figure(name, case, "visit ms a step", 1e3 * visit),
                Figure(name, case, "visit/dense", visit / median(dense.visits)),
            ]
    return found
