"""Local optimizers by hand, against torch's own, and inside masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from algorithms.core.local_optimizers import AdamW, Sgd
from algorithms.fedavg import FedAvg
from algorithms.fixed_mask import FixedMask
from algorithms.flash import Flash
from algorithms.sparsyfed import SparsyFed
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of


def steps(optimizer, gradients, lr=0.5, decay=0.0, weights=(1.0, -2.0)) -> list[list[float]]:
    w = torch.tensor(weights)
    moments, found = optimizer.start(w), []
    for number, gradient in enumerate(gradients, start=1):
        optimizer.step(w, torch.tensor(gradient), moments, lr=lr, decay=decay, number=number)
        found.append(w.tolist())
    return found


# lr 0.5. Plain: w - 0.5 g. Momentum 0.5: v = (1, 0), then (0.5 + 1, 0 + 2) = (1.5, 2).
# Nesterov steps along g + 0.5 v: (1.5, 0), then (1 + 0.75, 2 + 1).
def test_sgd_by_hand():
    gradients = [(1.0, 0.0), (1.0, 2.0)]
    assert steps(Sgd(), gradients) == [[0.5, -2.0], [0.0, -3.0]]
    assert steps(Sgd(momentum=0.5), gradients) == [[0.5, -2.0], [-0.25, -3.0]]
    assert steps(Sgd(momentum=0.5, nesterov=True), gradients) == [[0.25, -2.0], [-0.625, -3.5]]


# The first step of Adam is lr in the gradient's direction, after w (1 - lr decay) = 0.95 w.
def test_adamw_by_hand():
    assert steps(AdamW(), [(3.0, -0.25)])[0] == pytest.approx([0.5, -1.5], abs=1e-6)
    assert steps(AdamW(), [(3.0, -0.25)], decay=0.1)[0] == pytest.approx([0.45, -1.4], abs=1e-6)
    assert steps(AdamW(), [(0.0, 0.0)])[0] == [1.0, -2.0]


@pytest.mark.parametrize(
    ("own", "reference", "options"),
    [
        (Sgd(), torch.optim.SGD, {}),
        (Sgd(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
        (Sgd(momentum=0.8, nesterov=True), torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        (AdamW(), torch.optim.AdamW, {"weight_decay": 0.02}),
        (AdamW(momentum=0.7, beta2=0.9, eps=1e-3), torch.optim.AdamW,
         {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.02}),
    ],
)  # fmt: skip
def test_twenty_steps_are_those_of_torch(own, reference, options):
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(50, generator=generator)
    theirs = w.double().clone().requires_grad_()
    optimizer = reference([theirs], lr=0.05, **options)
    moments = own.start(w)
    for number in range(1, 21):
        gradient = torch.randn(50, generator=generator)
        theirs.grad = gradient.double()
        optimizer.step()
        own.step(w, gradient, moments, lr=0.05, decay=0.02 if own.decoupled_decay else 0.0, number=number)
    torch.testing.assert_close(w.double(), theirs.detach(), rtol=1e-5, atol=2e-6)


# ------------------------------------------------------------------------------------------- in a visit


def visit(method, rounds=1, **settings):
    trainer = trainer_of(method, **settings)
    broadcast = broadcast_of(trainer, method, None, 1)
    trained = trainer.visit(0, np.arange(20), method.sparsity, broadcast)
    return trainer, broadcast, replace(trained, values=trained.values.copy())


OPTIMIZERS = [Sgd(momentum=0.9), Sgd(momentum=0.9, nesterov=True), AdamW()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_outside_a_mask_stay_zero(optimizer):
    _, broadcast, trained = visit(FixedMask(sparsity=0.7), optimizer=optimizer, proximal=0.1)
    outside = ~broadcast.mask
    assert not trained.values[: len(outside)][outside].any()
    assert (trained.values[: len(outside)][~outside] != broadcast.weights[: len(outside)][~outside]).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_of_powerpropagation_stay_zero(optimizer):
    method = SparsyFed(sparsity=0.8)
    trainer, _, first = visit(method, optimizer=optimizer)
    zeros = first.values[: trainer.layout.prunable_size] == 0
    again = broadcast_of(trainer, method, first.values, 2)
    before_cut = trainer.visit(1, np.arange(20, 40), 0.0, again).values
    assert zeros.any()
    assert not before_cut[: len(zeros)][zeros].any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_weight_that_a_mask_drops_forgets_its_momentum(optimizer):
    method = Flash(sparsity=0.7, stage1="sensitivity", prune_rate=0.5)
    trainer = trainer_of(method, optimizer=optimizer)
    layout, seen = trainer.layout, []

    class Watched(type(method).client):
        def after_step(self):
            super().after_step()
            outside = ~self.mask
            held = (self.visit.weights, *self.visit.moments)
            seen.append(any(values[: len(outside)][outside].any() for values in held))

    object.__setattr__(method, "client", Watched)
    state = method.initial_state(layout.flatten(trainer.module), layout, np.random.default_rng(0))
    weights, told = state.weights.numpy(), method.instruct(state, 10, 6)
    told = replace(told, epochs=3)
    broadcast = broadcast_of(trainer, method, weights, 1)
    broadcast = replace(broadcast, mask=state.mask.numpy(), instructions=told)
    trainer.visit(0, np.arange(20), method.sparsity, broadcast)
    assert len(seen) == 9
    assert not any(seen)


def test_moments_are_fresh_in_every_visit():
    trainer, broadcast, trained = visit(FedAvg(), optimizer=AdamW())
    again = trainer.visit(0, np.arange(20), 0.0, broadcast).values
    assert np.array_equal(again, trained.values)


# One batch of 20 in one step of lr 0.2: the step is 0.2 times the clipped gradient, whatever it was.
def test_clipping_bounds_the_step_and_leaves_small_gradients_alone():
    settings = {"batch_size": 20, "epochs": 1, "weight_decay": 0.0}
    _, broadcast, plain = visit(FedAvg(), **settings)
    trained = trainer_of(FedAvg()).layout.trained_size
    moved = np.linalg.norm((plain.values - broadcast.weights)[:trained]) / 0.2
    for clip, expected in ((moved / 4, moved / 4), (2 * moved, moved)):
        _, _, clipped = visit(FedAvg(), clip_norm=clip, **settings)
        assert np.linalg.norm((clipped.values - broadcast.weights)[:trained]) / 0.2 == pytest.approx(
            expected, rel=1e-4
        )
    _, _, loose = visit(FedAvg(), clip_norm=1e6, **settings)
    assert np.array_equal(loose.values, plain.values)


def test_a_cosine_inside_a_visit():
    settings = trainer_of(FedAvg(), lr_end=0.1).settings
    # From 0.5 to 0.1 in four steps: 0.3 + 0.2 cos(pi k / 4).
    found = [settings.rate(0.5, step, 4) for step in range(5)]
    assert found == pytest.approx([0.5, 0.3 + 0.1 * 2**0.5, 0.3, 0.3 - 0.1 * 2**0.5, 0.1])
    assert replace(settings, lr_end=None).rate(0.5, 3, 4) == 0.5


# ------------------------------------------------------------------------------------------ configuration


def config(*overrides):
    return resolve("quickstart", list(overrides))


def test_rates_over_rounds():
    base = ("rounds=4", "local.lr=0.4", "local.lr_final=0.1")
    exponential, cosine = config(*base), config(*base, "local.lr_schedule=cosine")
    assert [exponential.learning_rate(t) for t in (2, 4, 8)] == pytest.approx([0.2, 0.1, 0.025])
    # 0.25 + 0.15 cos(pi t / 4), and held at the end.
    assert [cosine.learning_rate(t) for t in (2, 4, 8)] == pytest.approx([0.25, 0.1, 0.1])
    assert config(*base, "local.lr_schedule=cosine_visit").learning_rate(3) == 0.4
    assert config("local.lr=0.4", "local.lr_schedule=constant").learning_rate(3) == 0.4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["local.optimizer.name=adam"], r"local.optimizer.name: 'adam' is unknown; .*did you mean adamw"),
        (["local.optimizer.beta2=0.9"], r"local.optimizer.beta2: sgd has no such field"),
        (["local.optimizer.nesterov=true"], "nesterov: true needs momentum above 0"),
        (["local.lr_schedule=cosine"], "local.lr_final: none, and cosine falls to it"),
        (
            ["local.lr_schedule=constant", "local.lr_final=0.1"],
            "local.lr_final: 0.1 with lr_schedule=constant",
        ),
        (["local.clip_norm=0"], "local.clip_norm"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config("local.lr_final=null", *overrides)


def test_defaults_stay_out_of_the_hash_and_others_enter_it():
    plain = config().digest()
    assert config("local.optimizer.momentum=0.0", "local.lr_schedule=exponential").digest() == plain
    others = [
        config(*overrides).digest()
        for overrides in (
            ["local.optimizer.momentum=0.9"],
            ["local.optimizer.name=adamw"],
            ["local.clip_norm=10"],
            ["local.lr_final=0.1", "local.lr_schedule=cosine"],
        )
    ]
    assert len({plain, *others}) == 5
    assert config("local.optimizer.name=adamw").flat()["local.optimizer.beta2"] == 0.999
