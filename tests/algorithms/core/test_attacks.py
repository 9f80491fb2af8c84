"""Attacks: worked by hand, against a textbook loop in pixels, inside their balls, and where they are off."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algorithms import Attack, Pixels
from algorithms.core.attacks import EvaluationPgd, Fgsm, Pgd
from cluster.clients.adversary import Adversary
from cluster.workload.objectives import Classification, Regression

PLAIN = Pixels()
IMAGES = Pixels(unit=2.0, low=-1.0, high=1.0)  # of uint8: (x / 255 - 1/2) / (1/2)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adversary(model: nn.Module, pixels: Pixels = PLAIN) -> Adversary:
    return Adversary(model.eval(), Classification(), pixels)


def two_by_two() -> nn.Module:
    """W = ((1, -1), (-1, 1)): at x = (.7, .4) the margin of class 0 is .6, and |dW|_1 = 4."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    return layer


X, Y = torch.tensor([[0.7, 0.4]]), torch.tensor([0])


def attacked(attack: Attack, seed: int = 0) -> torch.Tensor:
    found, _ = adversary(two_by_two()).attacked(attack, X, Y, stream(seed))
    return found


def loss_at(inputs: torch.Tensor) -> float:
    return F.cross_entropy(two_by_two()(inputs), Y).item()


def test_one_step_from_the_input_itself_reaches_the_worst_corner():
    # The worst of the square is x' = (.6, .5): its loss is log(1 + e^-.2).
    assert loss_at(X) == pytest.approx(0.437488, abs=1e-6)
    for step in (0.1, 0.125, 5.0):
        corner = attacked(Fgsm(epsilon=0.1, step=step, random_start=False))
        assert corner.tolist()[0] == pytest.approx([0.6, 0.5], abs=1e-7)
        assert loss_at(corner) == pytest.approx(math.log(1 + math.exp(-0.2)), abs=1e-6)
    short = attacked(Fgsm(epsilon=0.1, step=0.04, random_start=False))
    assert short.tolist()[0] == pytest.approx([0.66, 0.44], abs=1e-7)


def test_it_is_robust_up_to_epsilon_of_fifteen_hundredths():
    for epsilon, wrong in ((0.149, False), (0.151, True)):
        corner = attacked(Pgd(epsilon=epsilon))
        assert bool(two_by_two()(corner).argmax(1) != Y) == wrong


def test_from_a_random_start_only_twice_epsilon_surely_reaches_the_corner():
    corner = pytest.approx([0.6, 0.5], abs=1e-6)
    starts = range(40)
    assert not all(attacked(Fgsm(epsilon=0.1), seed).tolist()[0] == corner for seed in starts)
    assert all(attacked(Fgsm(epsilon=0.1, step=0.2), seed).tolist()[0] == corner for seed in starts)
    assert all(attacked(Pgd(epsilon=0.1), seed).tolist()[0] == corner for seed in starts)


def test_a_step_of_the_euclidean_ball_by_hand():
    # The gradient's direction is (-1, 1) / sqrt 2: x' = x + .1 (-1, 1) / sqrt 2, then no farther.
    expected = [0.7 - 0.1 / math.sqrt(2), 0.4 + 0.1 / math.sqrt(2)]
    for step in (0.1, 3.0):
        found = attacked(Fgsm(epsilon=0.1, step=step, random_start=False, norm="l2"))
        assert found.tolist()[0] == pytest.approx(expected, abs=1e-6)


def test_default_steps_are_those_of_the_papers():
    assert Pgd().length == 2 / 255
    assert Pgd().epsilon == 8 / 255
    assert (Pgd().steps, EvaluationPgd().steps) == (10, 20)
    assert Fgsm(epsilon=0.1).length == 0.125
    assert Pgd(epsilon=0.1).reach == (0.25, 0.1)


# -------------------------------------------------------------------------------------- against a textbook


class Normalised(nn.Module):
    """Takes pixels of [0, 1]: normalisation is inside, as adversarial training's authors have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model((pixels - 0.5) / 0.5)


def some_images() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).double()
    return model, torch.rand(7, 1, 8, 8).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0])


def test_equals_a_textbook_loop_in_pixels():
    model, pixels, targets = some_images()
    attack = Pgd(epsilon=0.1, step=0.03, steps=5)
    found, runs = adversary(model, IMAGES).attacked(attack, (pixels - 0.5) / 0.5, targets, stream(4))
    textbook, inside = Normalised(copy.deepcopy(model)), pixels
    # As documented: a uniform float32 for each value, from -epsilon to epsilon.
    start = torch.rand(pixels.shape, generator=stream(4)) * 2 - 1
    at = (pixels + (0.1 * 2 * start).double() / 2).clip(0, 1)
    for _ in range(5):
        leaf = at.clone().requires_grad_()
        F.cross_entropy(textbook(leaf), targets).backward()
        at = at + 0.03 * leaf.grad.sign()
        at = torch.minimum(torch.maximum(at, inside - 0.1), inside + 0.1).clip(0, 1)
    assert runs == 5
    torch.testing.assert_close((found + 1) / 2, at, atol=1e-7, rtol=0)
    assert float((at - pixels).abs().max()) == pytest.approx(0.1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [Fgsm, Pgd])
def test_it_stays_in_its_ball_and_in_the_range_of_pixels_and_raises_the_loss(kind, norm):
    model, pixels, targets = some_images()
    inputs = (pixels - 0.5) / 0.5
    attack = kind(epsilon=0.2, norm=norm)
    found, _ = adversary(model, IMAGES).attacked(attack, inputs, targets, stream())
    moved = (found - inputs).flatten(1) / 2  # in pixel units
    size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert float(size.max()) <= 0.2 + 1e-6
    assert float(size.max()) > 0.15
    assert float(found.abs().max()) <= 1.0
    before, after = (F.cross_entropy(model(each), targets) for each in (inputs, found))
    assert float(after.detach()) > float(before.detach())


def test_a_random_start_in_the_euclidean_ball_is_uniform():
    # Of a uniform point in a ball of the plane the radius squared is uniform: its mean is 1/2.
    attack = Pgd(epsilon=2.0, steps=1, step=0.0, norm="l2")
    model, many = two_by_two(), torch.zeros(4000, 2)
    found, _ = adversary(model).attacked(attack, many, torch.zeros(4000, dtype=torch.int64), stream())
    share = found.square().sum(1) / 4
    assert float(share.max()) <= 1.0
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert found.mean(0).tolist() == pytest.approx([0, 0], abs=0.05)


@pytest.mark.parametrize("attack", [Attack(), Pgd(epsilon=0.0), Pgd(steps=0), Fgsm(epsilon=0.0)])
def test_an_attack_that_does_nothing_is_not_active(attack):
    assert not attack.active


# ------------------------------------------------------------------------- the model, and several attacks


def test_it_sees_and_leaves_statistics_of_evaluation():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    inputs, targets = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    resident = Adversary(model.train(), Classification(), Pixels())
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found, _ = resident.attacked(Pgd(epsilon=0.1), inputs, targets, stream(2))
    assert model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    again, _ = resident.attacked(Pgd(epsilon=0.1), inputs, targets, stream(2))
    assert torch.equal(found, again)
    assert not model.training


def test_of_several_attacks_the_worst_one_of_each_sample_counts():
    model, pixels, targets = some_images()
    inputs = (pixels - 0.5) / 0.5
    resident, draws = adversary(model, IMAGES), stream(3)
    attack = Pgd(epsilon=0.1, step=0.01, steps=2)
    each = [resident.worst_outputs(attack, inputs, targets, 1, draws).detach() for _ in range(5)]
    worst = resident.worst_outputs(attack, inputs, targets, 5, stream(3))
    for sample, label in enumerate(targets.tolist()):
        margins = [float(o[sample, label] - max(o[sample, k] for k in range(3) if k != label)) for o in each]
        assert torch.equal(worst[sample], each[margins.index(min(margins))][sample])
    assert len({tuple(outputs.flatten().tolist()) for outputs in each}) == 5


def test_errors_by_hand():
    outputs = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 4.5]])
    assert Classification().errors(outputs, torch.tensor([0, 1])).tolist() == [-1.0, 1.5]
    errors = Regression().errors(torch.tensor([[1.0], [5.0]]), torch.tensor([[0.0], [2.0]]))
    assert errors.tolist() == [1.0, 9.0]
