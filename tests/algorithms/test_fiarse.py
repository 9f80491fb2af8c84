"""FIARSE by hand: the part by one threshold over weights and biases, and the gradient through it."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from algorithms import Instructions, ParameterLayout
from algorithms.fiarse import Fiarse, ranked
from tests.algorithms.test_submodels import layout_of
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


def part_of(weights, budget, layout):
    told = Instructions(round=1, rounds=1)
    return Fiarse().submodel(torch.tensor(weights), told, 0, budget, layout).tolist()


def test_one_threshold_over_weights_and_biases():
    layout = layout_of(2, 2, 1)  # weights 4 + 2, biases 2 + 1
    weights = [0.5, -3.0, 0.2, 0.3, 0.1, -2.0, 0.4, 0.0, 1.0]
    # floor(.5 * 9) = 4 of -3, -2, 1, .5
    assert part_of(weights, 0.5, layout) == [True, True, False, False, False, True, False, False, True]
    assert sum(part_of(weights, 1 / 9, layout)) == 1 == sum(part_of(weights, 0.001, layout))
    assert all(part_of(weights, 1.0, layout))


def test_norms_always_travel():
    layout = ParameterLayout.of(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)))
    assert ranked(layout).tolist() == [True] * 6 + [False] * 4
    assert part_of([1.0, 2, 3, 4, 5, 6, 0, 0, 0, 0], 0.5, layout) == [False] * 3 + [True] * 7


class Planted(Fiarse.client):
    """The gradient of everything is 1."""

    gradients: ClassVar[list] = []
    seen: ClassVar[list] = []

    def gradient(self, compute):
        self.before_forward()
        self.seen.append(self.visit.model.clone())
        loss = compute()
        self.visit.gradient.fill_(1.0)
        self.after_backward()
        self.gradients.append(self.visit.gradient.clone())
        return loss


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_gradient_through_the_threshold_by_hand(momentum):
    """theta .3: |w| .5 gets 1.46875, .3 gets 1.5, 3 gets 1.165289; what falls below is cut and frozen."""
    from algorithms.core.local_optimizers import Sgd
    from cluster.transport.downlink import Part

    method = type("Own", (Fiarse,), {"client": Planted, "name": ""})()
    Planted.gradients, Planted.seen = [], []
    optimizer = Sgd(momentum=momentum)
    trainer = trainer_of(method, batch_size=20, weight_decay=0.01, optimizer=optimizer, clip_norm=None)
    layout = trainer.layout
    weights = np.zeros(layout.size, np.float32)
    weights[:4] = [0.5, 0.3, -3.0, 0.2]
    held = np.zeros(layout.trained_size, bool)
    held[:3] = True
    received = np.where(np.pad(held, (0, layout.size - len(held))), weights, np.float32(0))
    part = Part(received, held, 0, 0)
    broadcast = broadcast_of(trainer, method, weights, 1)
    trained = trainer.visit(0, np.arange(20), 0.5, broadcast, part=part)
    first, second = (gradient[:4].tolist() for gradient in Planted.gradients)
    assert first == pytest.approx([1.46875, 1.5, 1.165289, 0.0], abs=1e-6)
    # lr .2 and decay .01 take .5 to .20525 and .3 to -.0006: both are cut in the second step.
    assert Planted.seen[1][:4].tolist() == pytest.approx([0, 0, -3.2270578, 0], abs=1e-6)
    assert second[:2] == [0.0, 0.0]
    expected = [0.5 - 0.2 * (1.46875 + 0.005), 0.3 - 0.2 * (1.5 + 0.003)]
    assert trained.values[:2].tolist() == pytest.approx(expected, abs=1e-6)  # sent as they fell, then froze
    assert trained.values[3] == 0.0


def test_a_run_sends_the_part_of_the_round(cache, tmp_path):
    """What was sent lies inside the largest weights, ranked here by sorting; nobody else's weight moves."""
    settings = {"algorithm": {"name": "fiarse", "sparsity": 0.7}, "rounds": 2}
    run = run_inline(tiny_federation(cache, **settings), tmp_path / "run")
    layout = run.driver.layout
    for number in (1, 2):
        before, after = (run.states[n].weights[: layout.trained_size] for n in (number - 1, number))
        names = [e.name for e in layout.trained if not e.name.startswith(("1.", "5."))]  # not the norms
        split = layout.split(before, layout.trained)
        pooled = sorted((float(v) for name in names for v in split[name].abs().flatten()), reverse=True)
        threshold = pooled[int(0.3 * len(pooled)) - 1]
        moved = layout.split(after - before, layout.trained)
        for name in names:
            assert not moved[name][split[name].abs() < threshold].any()
            if number == 1 and name.endswith("weight"):
                assert moved[name][split[name].abs() >= threshold].any()
