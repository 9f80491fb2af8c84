"""Three local steps of SparsyFed and ZeroFL against the layers that the authors published (see README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from algorithms import Grid, Instructions
from algorithms.sparsyfed import SparsyFed, SparsyFedClient
from algorithms.zerofl import ZeroFL, ZeroFLClient
from cluster import seeding
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.exchange import Broadcast
from cluster.workload.datasets import Split

TRACES = Path(__file__).parent / "traces"
SEED, CLIENT = 0, 0
#: Largest difference: measured 6e-8, 3e-8 and 1e-7, and room for another processor's order of summing.
GRADIENT, WEIGHT, LOSS = 2e-7, 2e-7, 5e-7
#: The traces' names of the parameters, in the order of the flat vector: prunable weights, then biases.
NAMES = ("c1.weight", "c2.weight", "fc.weight", "c1.bias", "c2.bias", "fc.bias")


def load(name):
    trace = json.loads((TRACES / f"{name}.json").read_text())
    assert len(trace["steps"]) * trace["batch"] == len(trace["targets"])
    return trace


def flat(parameters):
    """One float32 vector of a trace's tensors."""
    assert set(parameters) == set(NAMES)
    return np.concatenate([np.float32(parameters[name]) for name in NAMES])


def recording(client):
    """The method's own client half that also notes gradients and weights of every step."""

    class Recording(client):
        def after_backward(self):
            super().after_backward()
            steps.append([self.visit.gradient.numpy().copy()])

        def after_step(self):
            super().after_step()
            steps[-1].append(self.visit.weights.numpy().copy())

    steps = []
    return Recording, steps


def play(method_class, client, options, trace, batches):
    """The product's visit of one client over the first ``batches`` batches of the trace, in file order.

    Returns:
        What the visit leaves, and gradient and weights of each step.
    """
    recorded, steps = recording(client)
    method = type("Recorded", (method_class,), {"client": recorded, "name": ""})(**options)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    train = Split(np.float32(trace["inputs"]).reshape(-1, 2, 6, 6), np.array(trace["targets"]), None)
    settings = LocalSettings(SEED, 1, trace["batch"], trace["weight_decay"], 0.0)
    trainer = Trainer(model, method, settings, train, torch.device("cpu"))
    weights = flat(trace["initial"])
    samples = batches * trace["batch"]
    # Rows in the order that the visit's own shuffling turns into the file's.
    shuffled = seeding.generator(SEED, "batches", 1, CLIENT).permutation(samples)
    broadcast = Broadcast(
        weights,
        weights,
        None,
        Instructions(round=1, rounds=1),
        trace["lr"],
        Grid.for_round(weights, 1).limit,
        samples,
    )
    return trainer.visit(CLIENT, np.argsort(shuffled), method.sparsity, broadcast), steps


SPARSYFED = {"beta": 1.25, "threshold": "first_batch_conv", "min_activation_density": 0.01}
ZEROFL = {"threshold": "first_batch_conv", "mask_ratio": 0.0}
CASES = {
    "sparsyfed": (SparsyFed, SparsyFedClient, SPARSYFED),
    "zerofl_0.6": (ZeroFL, ZeroFLClient, {**ZEROFL, "sparsity": 0.6}),
    "zerofl_0.9": (ZeroFL, ZeroFLClient, {**ZEROFL, "sparsity": 0.9}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_weights_of_every_step(name):
    trace = load(name)
    trained, steps = play(*CASES[name], trace, len(trace["steps"]))
    assert trained.measured.steps == len(steps) == 3
    for (gradient, weights), expected in zip(steps, trace["steps"], strict=True):
        np.testing.assert_allclose(gradient, flat(expected["grad"]), rtol=0, atol=GRADIENT)
        np.testing.assert_allclose(weights, flat(expected["weights"]), rtol=0, atol=WEIGHT)
        np.testing.assert_array_equal(weights == 0, flat(expected["weights"]) == 0)


@pytest.mark.parametrize("name", CASES)
def test_losses(name):
    """A visit tells the mean over its steps: of the first, of two, of all three."""
    trace = load(name)
    losses = [step["loss"] for step in trace["steps"]]
    for batches in (1, 2, 3):
        trained, _ = play(*CASES[name], trace, batches)
        assert trained.measured.loss == pytest.approx(sum(losses[:batches]) / batches, abs=LOSS)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("sparsyfed", {"beta": 1.251}),
        ("sparsyfed", {"threshold": "first_batch"}),
        ("sparsyfed", {"threshold": "every_batch"}),
        ("sparsyfed", {"activation_pruning": False}),
        ("zerofl_0.6", {"threshold": "first_batch"}),
        ("zerofl_0.6", {"threshold": "every_batch"}),
        ("zerofl_0.6", {"sparsity": 0.61}),
        ("zerofl_0.9", {"threshold": "first_batch"}),
        ("zerofl_0.9", {"threshold": "every_batch"}),
        ("zerofl_0.9", {"plain_layers": ("2",)}),
    ],
    ids=str,
)
def test_the_traces_tell_other_settings_apart(name, option):
    """Each setting matters for these three steps, far beyond the tolerance."""
    method, client, options = CASES[name]
    trace = load(name)
    _, steps = play(method, client, {**options, **option}, trace, 3)
    off = max(
        np.abs(weights - flat(expected["weights"])).max()
        for (_, weights), expected in zip(steps, trace["steps"], strict=True)
    )
    assert off > 100 * WEIGHT
