"""Training under attack: against a loop of its own, what it costs, its stream, and where it is off."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from algorithms import Algorithm, Attack, Client
from algorithms.core.attacks import Fgsm, Pgd
from algorithms.fedavg import FedAvg
from algorithms.feddst import FedDST
from algorithms.fedmeta import FedMeta
from algorithms.fedsam import FedSAM
from algorithms.fixed_mask import FixedMask
from algorithms.moon import Moon
from algorithms.scaffold import Scaffold
from cluster import seeding
from tests.algorithms.masked import NaiveMasked
from tests.cluster.clients.test_passes import assert_equal_visits
from tests.cluster.clients.tiny_visits import METHODS, broadcast_of, play, trainer_of
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation, tiny_model

ROWS = np.arange(20)  # batches of 8, 8 and 4 in each of two epochs
PGD = Pgd(epsilon=0.1, steps=3)


def visited(method: Algorithm, attack: Attack, told: dict | None = None, **settings):
    trainer = trainer_of(method, attack=attack, **settings)
    broadcast = broadcast_of(trainer, method, None, 1)
    broadcast = replace(broadcast, instructions=replace(broadcast.instructions, **(told or {})))
    trained = trainer.visit(2, ROWS, method.sparsity, broadcast)
    return trainer, replace(trained, values=trained.values.copy())


# ------------------------------------------------------------------------------- against a loop of its own


class Attacked(NaiveFederation):
    """PGD in the model's inputs, where epsilon and step double, before every gradient."""

    def gradients(self, weights, images, labels, visit):
        attack = self.config.attack
        if visit.notes.get("draws") is None:
            seed = seeding.integer(self.config.seed, "attack", visit.round, visit.client)
            visit.notes["draws"] = torch.Generator().manual_seed(seed)
        start = torch.rand(images.shape, generator=visit.notes["draws"])
        radius, step = 2 * attack.epsilon, 2 * attack.step
        self.module.eval()
        found = (images + radius * (2 * start - 1)).clip(-1, 1)
        for _ in range(attack.steps):
            leaf = found.clone().requires_grad_()
            frozen = {name: tensor.detach() for name, tensor in weights.items()}
            F.cross_entropy(functional_call(self.module, frozen, (leaf,)), labels).backward()
            moved = found + step * leaf.grad.sign()
            found = torch.maximum(torch.minimum(moved, images + radius), images - radius).clip(-1, 1)
        self.module.train()
        return super().gradients(weights, found, labels, visit)


class AttackedMasked(Attacked, NaiveMasked):
    pass


PGD_SECTION = {"name": "pgd", "epsilon": 0.08, "step": 0.03, "steps": 3}


@pytest.mark.parametrize(
    ("reference", "algorithm"),
    [(Attacked, {"name": "fedavg"}), (AttackedMasked, {"name": "fixed_mask", "sparsity": 0.7})],
    ids=["fedavg", "fixed_mask"],
)
def test_equals_the_naive_reference(cache, tmp_path, reference, algorithm):
    model = {"name": "tests.tiny_experiment:tiny_model"}  # with BatchNorm
    local = {"batch_size": 7}
    config = tiny_federation(cache, algorithm=algorithm, model=model, attack=PGD_SECTION, local=local)
    assert_same(run_inline(config, tmp_path / "run"), reference(config).run(), atol=2e-5)


def test_every_round_and_client_draws_anew(cache, tmp_path):
    seeds = [seeding.integer(0, "attack", t, c) for t in (1, 2) for c in (0, 1)]
    assert len(set(seeds)) == 4
    one, other = (
        run_inline(tiny_federation(cache, rounds=1, attack=PGD_SECTION), tmp_path / name) for name in "ab"
    )
    assert_identical(one, other)


# --------------------------------------------------------------------------------------- where it is off


@pytest.mark.parametrize("attack", [Pgd(epsilon=0.0), Pgd(steps=0), Fgsm(epsilon=0.0)])
def test_without_a_radius_or_steps_it_is_training_bit_for_bit(attack):
    (_, plain), (_, none) = visited(FedAvg(), Attack()), visited(FedAvg(), attack)
    assert np.array_equal(plain.values, none.values)
    assert plain.measured.flops_dense == none.measured.flops_dense


def test_a_phase_may_switch_it_off():
    (_, plain), (_, off) = visited(FedAvg(), Attack()), visited(FedAvg(), PGD, {"attack": False})
    assert np.array_equal(plain.values, off.values)
    assert plain.measured.flops_dense == off.measured.flops_dense
    assert not np.array_equal(plain.values, visited(FedAvg(), PGD)[1].values)


def test_at_sparsity_zero_a_mask_is_adversarial_fedavg_bit_for_bit(cache, tmp_path):
    algorithms = ({"name": "fedavg"}, {"name": "fixed_mask", "sparsity": 0.0})
    one, other = (
        run_inline(tiny_federation(cache, algorithm=each, attack=PGD_SECTION), tmp_path / each["name"])
        for each in algorithms
    )
    assert_identical(one, other)


# -------------------------------------------------------------------------------------------- what it costs


class _ByHand(Client):
    """Three forward passes and input gradients before each step, which the meter bills as they happen."""

    def gradient(self, compute):
        visit = self.visit
        for _ in range(3):
            inputs = visit.inputs[visit.chosen].clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(visit.module(inputs), visit.targets[visit.chosen]), inputs)
        return super().gradient(compute)


@dataclass(frozen=True, kw_only=True)
class ByHand(Algorithm):
    client = _ByHand


def test_an_attack_costs_what_the_same_passes_cost_a_method_that_runs_them():
    (trainer, plain), (_, attacked) = visited(FedAvg(), Attack()), visited(FedAvg(), PGD)
    _, by_hand = visited(ByHand(), Attack())
    assert attacked.measured.flops_dense == pytest.approx(by_hand.measured.flops_dense, rel=1e-12)
    np.testing.assert_allclose(attacked.measured.flops_sparse, by_hand.measured.flops_sparse, rtol=1e-12)
    # 40 samples, three times, a forward pass and an input gradient of every layer, the first included.
    extra = attacked.measured.flops_dense - plain.measured.flops_dense
    assert extra == pytest.approx(40 * 3 * 2 * trainer.flops.forward.sum())


def test_inside_a_mask_an_attack_costs_the_masks_share():
    method = FixedMask(sparsity=0.8, layer_density="uniform")
    (trainer, plain), (_, attacked) = visited(method, Attack()), visited(method, PGD)
    extra = attacked.measured.flops_sparse - plain.measured.flops_sparse
    mask = broadcast_of(trainer, method, None, 1).mask
    density = [mask[layer.span].mean() for layer in trainer.layout.prunable]
    np.testing.assert_allclose(extra, 40 * 3 * 2 * trainer.flops.forward * density)


def seen(method: Algorithm, attack: Attack, **settings) -> tuple[list[torch.Tensor], int]:
    """What a visit's training passes take in, and the samples of all forward passes."""
    trainer, taken, samples = trainer_of(method, attack=attack, **settings), [], 0

    def note(module, inputs, _):
        nonlocal samples
        samples += len(inputs[0])
        if module.training:
            taken.append(inputs[0].detach().clone())

    trainer.module.register_forward_hook(note)
    trained = trainer.visit(2, ROWS, method.sparsity, broadcast_of(trainer, method, None, 1))
    forward, training = trainer.flops.forward.sum(), sum(map(len, taken))
    attacks = trained.measured.flops_dense - trainer.flops.dense(training)
    assert attacks == pytest.approx(2 * forward * (samples - training))  # every pass is billed
    return taken, samples - training


def test_both_passes_of_fedsam_take_the_inputs_of_one_attack():
    taken, attacked = seen(FedSAM(rho=0.1), PGD)
    assert attacked == 3 * 40
    assert all(torch.equal(*taken[i : i + 2]) for i in range(0, 12, 2))


@pytest.mark.parametrize(
    ("method", "more"),
    [(FedDST(sparsity=0.7, readjust_interval=1), 8), (Scaffold(option="I"), 20)],
    ids=["feddst", "scaffold"],
)
def test_gradients_of_other_data_are_taken_under_attack_too(method, more):
    taken, attacked = seen(method, PGD)
    assert attacked == 3 * (40 + more)
    plain, _ = seen(method, Attack())
    assert len(taken) == len(plain)
    assert not any(torch.equal(*pair) for pair in zip(taken, plain, strict=True))


def test_what_fedmeta_adapts_to_and_learns_from_is_attacked_once():
    """Each row in a pass of its own, at most epsilon away; that is .1 in pixels of the model's unit 2."""
    method = FedMeta(inner_lr=0.0, support=0.5)
    (taken, attacked), (plain, _) = (seen(method, attack, crop=2, flip=True) for attack in (PGD, Attack()))
    assert attacked == 3 * 40
    for one, other in zip(taken, plain, strict=True):
        assert 0.15 < float((one - other).abs().max()) <= 0.2 + 1e-6


def test_moons_representations_are_those_of_one_attacked_batch():
    trainer, met = trainer_of(Moon(), attack=PGD), []
    last = visited(FedAvg(), Attack())[1].values
    trainer.module.register_forward_pre_hook(lambda module, inputs: met.append(inputs[0].clone()))
    trained = trainer.visit(2, ROWS, 0.0, broadcast_of(trainer, Moon(), None, 1), {"model": last})
    assert len(met) == 6 * (3 + 3)  # of each step three runs of the attack, then the three models
    for step in range(0, len(met), 6):
        assert all(torch.equal(met[step + 3], met[step + more]) for more in (4, 5))
    total, weight = trained.measured.own["contrast"]
    assert total > 0.0
    assert weight == 6


# ------------------------------------------------------------------------------- every method, and graphs


@pytest.mark.parametrize("name", METHODS)
def test_replayed_passes_are_the_launched_ones_bit_for_bit(name):
    method, recorded = METHODS[name], []
    expected = play(trainer_of(method, attack=PGD), method)
    assert_equal_visits(play(trainer_of(method, attack=PGD, recorded=recorded), method), expected)
    assert recorded


def test_running_statistics_are_those_of_the_training_passes_alone():
    model, moved = tiny_model(input_shape=(1, 8, 8), classes=3), []
    trainer = trainer_of(FedAvg(), model=model, attack=PGD)
    trainer.module[1].register_forward_hook(lambda module, *_: moved.append(module.training))
    trainer.visit(2, ROWS, 0.0, broadcast_of(trainer, FedAvg(), None, 1))
    assert (sum(moved), len(moved)) == (6, 6 + 3 * 6)


def test_what_augmentation_makes_of_a_batch_is_attacked():
    taken = [seen(FedAvg(), attack, crop=2, flip=True)[0] for attack in (Attack(), PGD)]
    assert not torch.equal(taken[0][0], seen(FedAvg(), Attack())[0][0])
    for plain, attacked in zip(*taken, strict=True):
        assert 0.15 < float((attacked - plain).abs().max()) <= 0.2 + 1e-6  # 0.1 in pixels
