"""Passes recorded and replayed against passes launched one by one; arithmetic; a round received once.

Without a GPU the recorder is a stand-in that keeps what a CUDA graph keeps: the memory, and no Python.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from algorithms import Algorithm
from algorithms.fedavg import FedAvg
from algorithms.feddst import FedDST
from algorithms.fixed_mask import FixedMask
from algorithms.layers import ActivationPruning, prune_inputs
from algorithms.sparsyfed import SparsyFed
from algorithms.topk import TopK
from algorithms.zerofl import ZeroFL
from cluster.clients.client import _same
from cluster.clients.local_training import Broadcast, LocalSettings, Trained, Trainer
from cluster.clients.passes import WARM_UP, GraphPasses, set_up_cuda
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.workload import models
from cluster.workload.datasets import Split
from tests.tiny_experiment import tiny_images, tiny_model

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
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


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
    method: Algorithm, device: str = "cpu", *, recorded: list[str] | None = None, model=None, **settings
) -> Trainer:
    arrays = tiny_images()
    split = Split(arrays["train_images"][:, None].copy(), arrays["train_labels"], None)
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


def assert_equal_visits(first: list[Trained], second: list[Trained]) -> None:
    for one, other in zip(first, second, strict=True):
        for name in vars(one):
            found, expected = getattr(one, name), getattr(other, name)
            assert np.array_equal(found, expected), name


@pytest.mark.parametrize("name", METHODS)
def test_replayed_passes_are_the_launched_ones_bit_for_bit(name):
    method, recorded = METHODS[name], []
    expected = play(trainer_of(method), method)
    trainer = trainer_of(method, recorded=recorded)
    assert_equal_visits(play(trainer, method), expected)
    # Recorded are the kinds of pass that came often enough, each once.
    kinds = trainer._passes._recordings.values()
    assert len(recorded) == sum(one.replay is not None for one in kinds) >= 2
    assert {len(one.labels) for one in kinds} == {1, 4, 8}


def test_a_pass_is_recorded_once_it_is_warm():
    method, recorded = FedAvg(), []
    trainer = trainer_of(method, recorded=recorded)
    broadcast = broadcast_of(trainer, method, None, 1)
    for visit in range(1, 6):
        trainer.visit(visit, np.arange(8), 0.0, broadcast)  # one batch in each of two epochs
        assert len(recorded) == (2 * visit > WARM_UP)


@pytest.mark.parametrize("density", [None, 0.3, 1.0])
@pytest.mark.parametrize("minimum", [0.0, 0.5])
def test_thresholds_drawn_on_the_device_are_those_of_the_host(density, minimum):
    generator = torch.Generator().manual_seed(7)
    for inputs in (
        torch.randn(3, 5, 4, generator=generator),
        torch.relu(torch.randn(3, 5, 4, generator=generator)),
        torch.tensor([1.0, float("nan"), 2.0]),
        torch.zeros(4),
    ):
        weight = torch.randn(40, generator=generator)
        weight[: 0 if density == 1.0 else 33] = 0.0
        found = []
        for on_device in (False, True):
            pruning = ActivationPruning(density=density, every_batch=False, minimum_density=minimum)
            pruning.on_device = on_device
            found.append((float(pruning.threshold(inputs, weight)), pruning.kept))
        assert found[0] == found[1]


def test_a_round_is_received_once_and_a_new_one_replaces_it():
    method = FedAvg()
    trainer = trainer_of(method)
    first = broadcast_of(trainer, method, None, 1)
    rows = np.arange(20)
    expected = trainer.visit(0, rows, 0.0, first).values.copy()
    trainer.visit(1, rows, 0.0, first)
    assert np.array_equal(trainer.visit(0, rows, 0.0, first).values, expected)
    other = replace(first, weights=first.weights * 2)
    assert not np.array_equal(trainer.visit(0, rows, 0.0, other).values, expected)
    assert np.array_equal(trainer.visit(0, rows, 0.0, first).values, expected)


def test_copies_of_a_broadcast_share_its_memory():
    method = FedAvg()
    first = broadcast_of(trainer_of(method), method, None, 1)
    assert _same(first, replace(first))  # as two calls of one round unpack it from the object store
    assert not _same(first, replace(first, weights=first.weights.copy()))
    assert not _same(first, replace(first, samples=61))
    assert not _same(first, replace(first, period=1))


@pytest.mark.parametrize("name", ["fedavg", "sparsyfed", "zerofl"])
def test_bfloat16_rounds_products_but_keeps_float32_weights(name):
    method = METHODS[name]
    model = tiny_model(input_shape=(1, 8, 8), classes=3)
    exact, rounded = trainer_of(method, model=model), trainer_of(method, model=model, precision="bfloat16")
    broadcast = broadcast_of(exact, method, None, 1)
    results = [one.visit(0, np.arange(20), method.sparsity, broadcast) for one in (exact, rounded)]
    assert results[1].values.dtype == np.float32
    assert not np.array_equal(results[0].values, results[1].values)
    # bfloat16 has 8 significant bits: an error of 2^-8 in each product, within a few per cent of the loss.
    assert results[1].loss == pytest.approx(results[0].loss, rel=0.05)


def test_bfloat16_pruning_keeps_what_ties_with_the_threshold():
    # 1, 2, 2 and 3 at density 1/2: the threshold is 2, and both entries of 2 stay.
    layer = nn.Sequential(nn.Linear(4, 1, bias=False))
    prune_inputs(layer, lambda name, module: ActivationPruning(density=0.5, every_batch=True))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.tensor([[1.0, -2.0, 2.0, 3.0]]))
    assert output.dtype == torch.bfloat16
    output.backward()
    assert layer[0].weight.grad.tolist() == [[0.0, -2.0, 2.0, 3.0]]


def test_tf32_is_refused_where_there_is_no_gpu():
    with pytest.raises(ConfigError, match="precision: tf32 is arithmetic of GPUs"):
        resolve("quickstart", ["precision=tf32"])
    assert resolve("quickstart", ["precision=bfloat16"]).digest() != resolve("quickstart").digest()


@needs_a_gpu
@pytest.mark.parametrize("name", METHODS)
def test_cuda_graphs_equal_eager_passes_bit_for_bit(name):
    set_up_cuda()
    method = METHODS[name]
    model = models.build("resnet18", input_shape=(1, 8, 8), classes=3, seed=1, width=8)
    eager = trainer_of(method, "cuda", model=model)
    replayed = trainer_of(method, "cuda", model=model, cuda_graphs=True)
    assert_equal_visits(play(replayed, method), play(eager, method))


@needs_a_gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_gpu_trains_to_what_the_cpu_does(precision):
    method = SparsyFed(sparsity=0.8)
    model = tiny_model(input_shape=(1, 8, 8), classes=3)
    cpu = trainer_of(method, model=model)
    gpu = trainer_of(method, "cuda", cuda_graphs=True, model=model, precision=precision)
    broadcast = broadcast_of(cpu, method, None, 1)
    results = [one.visit(0, np.arange(20), 0.8, broadcast) for one in (cpu, gpu)]
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-4 if precision == "float32" else 0.05)
