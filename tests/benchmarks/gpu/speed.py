"""The second part: steps a second and milliseconds a client, memory, host processes and kernels.

Random images; clients as in round 2, when weights are sparse. Figures are of ``Trainer.visit``: load, local
steps, cut, and the copy of the update to the host; not of the wire, which overlaps with the next visit. On
the CPU, where this is rehearsed, models are narrow and a visit is one batch.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from algorithms import Algorithm, Instructions
from algorithms.fedavg import FedAvg
from algorithms.sparsyfed import SparsyFed
from algorithms.topk import TopK
from algorithms.zerofl import ZeroFL
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.clients.passes import set_up_cuda
from cluster.exchange import Broadcast
from cluster.workload import models
from cluster.workload.datasets import Split
from tests.benchmarks.gpu.worker import Context, Found, Item, LeftOut

METHODS: dict[str, Algorithm] = {
    "fedavg": FedAvg(),
    "sparsyfed": SparsyFed(  # as paper-cifar10 has it
        sparsity=0.95,
        threshold="first_batch_conv",
        plain_layers=("*shortcut*",),
        min_activation_density=0.01,
    ),
    "topk": TopK(sparsity=0.95),
    "zerofl": ZeroFL(sparsity=0.95),
}
PRECISIONS = ("float32", "tf32", "bfloat16")
HOSTS = (2, 4, 1)

#: Seconds of measuring one case, and of one number of host processes.
CASE_S, HOSTS_S = 1.0, 3.0

#: Visits before any is measured: passes that draw thresholds come once a visit, three times before a graph.
WARM_VISITS = 5


def pfl_cnn(width: int = 32) -> nn.Module:
    """The two-convolution CNN of pfl-research's benchmark: 1,626,442 weights on 32x32x3."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 14 * 14, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, 10),
    )


@dataclass(frozen=True)
class HostSetup:
    """A model, its small stand-in for rehearsals, and a client."""

    model: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    samples: int
    batch: int
    epochs: int = 1


def _product(name: str, shape: tuple[int, int, int], **options: Any) -> Callable[[], nn.Module]:
    return partial(models.build, name, input_shape=shape, classes=10, seed=0, **options)


_CIFAR, _DIGITS = (3, 32, 32), (1, 8, 8)
WORKLOADS = {
    "resnet18, batch 16": HostSetup(
        _product("resnet18", _CIFAR), _product("resnet18", _CIFAR, width=8), _CIFAR, 500, 16
    ),
    "pfl cnn, batch 10": HostSetup(pfl_cnn, partial(pfl_cnn, 4), _CIFAR, 50, 10),
    "quickstart cnn, batch 16": HostSetup(
        _product("small_cnn", _DIGITS), _product("small_cnn", _DIGITS), _DIGITS, 48, 16, epochs=5
    ),
}
RESNET, PFL, QUICKSTART = WORKLOADS


def key_of(workload: str, method: str, precision: str, graphs: bool) -> str:
    """A case's name in the results."""
    return f"{workload}: {method}, {precision}, {'graphs' if graphs else 'launched'}"


def hosts_key(workload: str, method: str, processes: int) -> str:
    """The same of a number of host processes."""
    return f"{workload}: {method}, {processes} host process{'es' * (processes > 1)}"


def items(device: str) -> list[Item]:
    """What the aims and the paper's runs need comes first."""
    graphs_first = device == "cuda"
    cases = [(RESNET, method, "float32", graphs_first) for method in METHODS]
    found = [_case(*case) for case in cases]
    found += [_hosts(RESNET, method, processes) for method in ("sparsyfed", "fedavg") for processes in HOSTS]
    found += [_kernels(method) for method in ("sparsyfed", "fedavg")]
    more = [(RESNET, method, "tf32", True) for method in METHODS]
    more += [(PFL, method, "float32", True) for method in METHODS]
    found += [_case(*case) for case in more]
    found += [_hosts(PFL, "fedavg", processes) for processes in HOSTS]
    every = [
        (workload, method, precision, graphs)
        for precision in PRECISIONS
        for graphs in (False, True)
        for workload in (RESNET, QUICKSTART, PFL)
        for method in METHODS
    ]
    done = {*cases, *more}
    return found + [_case(*case) for case in every if case not in done]


def _case(workload: str, method: str, precision: str, graphs: bool) -> Item:
    arguments = {"workload": workload, "method": method, "precision": precision, "graphs": graphs}
    return Item(key_of(workload, method, precision, graphs), "speed", f"{__name__}:case", arguments, 4.0)


def _hosts(workload: str, method: str, processes: int) -> Item:
    arguments = {"workload": workload, "method": method, "processes": processes}
    return Item(hosts_key(workload, method, processes), "speed", f"{__name__}:hosts", arguments, 25.0)


def _kernels(method: str) -> Item:
    return Item(f"kernels of a step: {method}", "speed", f"{__name__}:kernels", {"method": method}, 8.0)


# ------------------------------------------------------------------------------------------ measuring


def case(context: Context, workload: str, method: str, precision: str, graphs: bool) -> Found:
    """Milliseconds a client, steps a second and device memory of one case."""
    if context.device == "cpu" and (graphs or precision == "tf32"):
        raise LeftOut("CUDA graphs and TF32 need CUDA")
    if context.device == "cuda":
        gc.collect()  # trainers hold themselves in circles, and on the GPU their memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    visits, steps = _visits(context.device, workload, method, precision, graphs)
    seconds: list[float] = []
    began = time.perf_counter()
    least = 3 if context.device == "cuda" else 1
    while len(seconds) < least or time.perf_counter() - began < (CASE_S if context.device == "cuda" else 0):
        started = time.perf_counter()
        next(visits)
        seconds.append(time.perf_counter() - started)
    middle = statistics.median(seconds)
    found: Found = {"client ms": 1e3 * middle, "steps/s": steps / middle, "visits": len(seconds)}
    if context.device == "cuda":
        found["MiB"] = torch.cuda.max_memory_reserved() / 2**20
    return found


def hosts(context: Context, workload: str, method: str, processes: int) -> Found:
    """Steps a second of so many processes on the one device at the same time, in total."""
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(processes), spawn.SimpleQueue()
    arguments = (context.device, workload, method, barrier, answers)
    started = [spawn.Process(target=_one_host, args=arguments) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"a host process ended with status {process.exitcode}")
    total, memory = 0.0, 0.0
    for _ in started:
        rate, reserved = answers.get()
        total, memory = total + rate, max(memory, reserved)
    return {"steps/s": total, "MiB each": memory}


def _one_host(device: str, workload: str, method: str, barrier: Any, answers: Any) -> None:
    visits, steps = _visits(device, workload, method, "float32", device == "cuda")
    barrier.wait(timeout=120)
    count, began = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - began < (HOSTS_S if device == "cuda" else 0):
        next(visits)
        count += 1
    rate = count * steps / (time.perf_counter() - began)
    barrier.wait(timeout=120)  # nobody leaves the device to the others while they are being measured
    answers.put((rate, torch.cuda.max_memory_reserved() / 2**20 if device == "cuda" else 0.0))


def kernels(context: Context, method: str) -> Found:
    """What a launched ResNet-18 step spends the device's time on, by kernel; on the CPU by operation."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = context.device == "cuda"
    visits, steps = _visits(context.device, RESNET, method, "float32", False)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        started = time.perf_counter()
        next(visits)
        wall = time.perf_counter() - started
    what = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [
        event for event in profiler.key_averages() if event.device_type == kind and getattr(event, what) > 0
    ]
    events.sort(key=lambda event: -getattr(event, what))
    busy = sum(getattr(event, what) for event in events)
    return {
        "wall us a step": 1e6 * wall / steps,
        "device us a step": busy / steps,
        "launches a step": sum(event.count for event in events) / steps,
        "kernels": [
            {
                "name": event.key[:120],
                "us a step": getattr(event, what) / steps,
                "share": getattr(event, what) / busy,
                "calls a step": event.count / steps,
            }
            for event in events[:15]
        ],
    }


def _visits(
    device: str, workload: str, method: str, precision: Any, graphs: bool
) -> tuple[Iterator[None], int]:
    """Visits of clients of round 2, one a ``next``, warmed up; and the steps of one."""
    about, algorithm = WORKLOADS[workload], METHODS[method]
    samples, warm = about.samples, WARM_VISITS
    if device == "cuda":
        set_up_cuda()
    else:
        torch.set_num_threads(1)
        samples, warm = about.batch, 1
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (max(1000, samples), *about.shape), np.uint8)
    split = Split(images, np.arange(len(images)) % 10, None)
    settings = LocalSettings(0, about.epochs, about.batch, 0.0, 0.0, precision, graphs)
    model = about.model() if device == "cuda" else about.small()
    trainer = Trainer(model, algorithm, settings, split, torch.device(device))
    layout = trainer.layout
    state = algorithm.initial_state(layout.flatten(trainer.module).cpu(), layout, np.random.default_rng(0))
    rows = np.arange(samples)

    def broadcast(weights: np.ndarray, number: int) -> Broadcast:
        return Broadcast(weights, weights, None, Instructions(number, 2), 0.01, 2.0**20, samples)

    first = trainer.visit(0, rows, algorithm.sparsity, broadcast(state.weights.numpy(), 1))
    second = broadcast(first.values.copy(), 2)

    def visits() -> Iterator[None]:
        turn = 1
        while True:
            trainer.visit(turn, rows, algorithm.sparsity, second)
            turn += 1
            yield

    endless = visits()
    for _ in range(warm):
        next(endless)
    return endless, about.epochs * -(-samples // about.batch)
