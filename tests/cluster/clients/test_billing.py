"""Every pass over data is billed, whoever asks for it: counted by a hook of the test's own on the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from algorithms import Algorithm, Client, registry
from algorithms.fedavg import FedAvg
from algorithms.splitmix import SplitMix
from cluster.clients.billing import Bill
from cluster.clients.local_training import Trained, Trainer
from tests.cluster.clients.tiny_visits import METHODS, broadcast_of, trainer_of

ROWS = np.arange(20)  # batches of 8, 8 and 4 in each of two epochs


def visit(method: Algorithm) -> tuple[Trained, Trainer, int]:
    """A visit, its trainer, and the samples that went forward through the model."""
    trainer, forward = trainer_of(method), [0]
    trainer.module.register_forward_hook(
        lambda _module, inputs, _output: forward.__setitem__(0, forward[0] + len(inputs[0]))
    )
    trained = trainer.visit(0, ROWS, method.sparsity, broadcast_of(trainer, method, None, 1))
    return trained, trainer, forward[0]


def assert_whole_passes_are_billed(method: Algorithm) -> None:
    """Every forward pass, and the backward pass of each."""
    trained, trainer, forward = visit(method)
    assert trained.measured.flops_dense == trainer.flops.dense(forward)


class _Passes(Client):
    """Does what the method says beside each step's pass."""

    def gradient(self, compute):
        self.method.beside(self.visit, compute)
        return super().gradient(compute)


@dataclass(frozen=True, kw_only=True)
class Beside(Algorithm):
    client = _Passes
    beside = staticmethod(lambda visit, compute: None)


def beside(function) -> Algorithm:
    """A method that does something before each of its six steps over 40 samples."""
    kind = type("Planted", (Beside,), {"beside": staticmethod(function)})
    return dataclass(frozen=True, kw_only=True)(kind)()


def loss_of(visit, rows: Tensor) -> Tensor:
    return F.cross_entropy(visit.module(visit.inputs[rows]), visit.targets[rows])


def parameters(visit) -> list[Tensor]:
    return list(visit.module.parameters())


#: They run parts of passes, or need models of their own: their own tests count.
SADDLES = {"masha1", "masha2", "sgda"}
PARTS = {"fedalign", "fedreg", "fjord", "ma_echo", "masked_fedalign", "masked_fedreg", "rpdro"} | SADDLES
EVERY = {name: method() for name, method in registry().items() if name not in PARTS} | METHODS
EVERY["splitmix"] = SplitMix(bases=2)  # as many as the tiny model's groups


@pytest.mark.parametrize("name", EVERY)
def test_the_passes_of_every_method(name):
    assert_whole_passes_are_billed(EVERY[name])


@pytest.mark.parametrize(
    "extra",
    [
        lambda visit, compute: compute(),
        lambda visit, compute: visit.gradient_of(visit.inputs[:3], visit.targets[:3]),
        lambda visit, compute: visit.gradient_of(visit.inputs[:3], torch.full((3, 3), 1 / 3)),
        lambda visit, compute: torch.autograd.grad(loss_of(visit, torch.arange(5)), parameters(visit)),
        lambda visit, compute: loss_of(visit, torch.arange(5)).backward(),
        lambda visit, compute: torch.autograd.grad(
            loss_of(visit, torch.arange(5)) + loss_of(visit, torch.arange(2)), parameters(visit)
        ),
    ],
    ids=["compute", "gradient_of", "soft targets", "module", "backward", "two forward passes, one backward"],
)
def test_further_passes(extra):
    assert_whole_passes_are_billed(beside(extra))


def test_a_pass_behind_the_visits_back_is_found():
    hidden = []

    class Cheat(Beside):
        def prepare(self, model):
            hidden.append(model)

    method = Cheat()
    object.__setattr__(method, "beside", lambda visit, compute: hidden[0](visit.inputs))
    with pytest.raises(AssertionError):
        assert_whole_passes_are_billed(method)


def share(function, samples: int) -> float:
    """FLOPs of what a planted method does in six steps, in passes over its samples."""
    trained, trainer, _ = visit(beside(function))
    flops = 3 * trainer.flops.forward.sum()
    return (trained.measured.flops_dense - trainer.flops.dense(40)) / (6 * samples * flops)


def test_a_forward_pass_is_a_third_and_an_attack_two_thirds():
    def forward(visit, compute):
        with torch.no_grad():
            visit.module(visit.inputs[:5])

    def attack(visit, compute):
        attacked = visit.inputs[:5].clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(visit.module(attacked), visit.targets[:5]), attacked)

    def both_gradients(visit, compute):
        attacked = visit.inputs[:5].clone().requires_grad_()
        loss = F.cross_entropy(visit.module(attacked), visit.targets[:5])
        torch.autograd.grad(loss, [attacked, *visit.module.parameters()])

    assert share(forward, 5) == pytest.approx(1 / 3)
    assert share(attack, 5) == pytest.approx(2 / 3)
    assert share(both_gradients, 5) == pytest.approx(1)


def test_a_backward_pass_bills_what_it_came_through_alone():
    def both(visit, compute):
        attacked = visit.inputs[:6].clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(visit.module(attacked), visit.targets[:6]), attacked)
        torch.autograd.grad(loss_of(visit, torch.arange(9)), parameters(visit))

    trained, trainer, _ = visit(beside(both))
    attack = 6 * 3 * trainer.flops.forward.sum() * 2 / 3
    expected = trainer.flops.dense(40) + 6 * (attack + trainer.flops.dense(9))
    assert trained.measured.flops_dense == pytest.approx(expected, rel=1e-12)


def test_a_part_of_the_model_costs_its_layers():
    layers = []

    def head(visit, compute):
        linear = [m for m in visit.module.modules() if isinstance(m, torch.nn.Linear)][-1]
        layers[:] = [linear]
        with torch.no_grad():
            linear(torch.ones(7, linear.in_features))

    trained, trainer, _ = visit(beside(head))
    extra = trained.measured.flops_dense - trainer.flops.dense(40)
    assert extra == 6 * 7 * 2 * layers[0].in_features * layers[0].out_features


def test_other_weights_in_the_models_place_cost_the_same():
    def teacher(visit, compute):
        own = {name: p.detach().clone().requires_grad_() for name, p in visit.module.named_parameters()}
        logits = torch.func.functional_call(visit.module, own, (visit.inputs[:5],))
        torch.autograd.grad(F.cross_entropy(logits, visit.targets[:5]), list(own.values()))

    assert_whole_passes_are_billed(beside(teacher))


def test_sparse_flops_of_a_further_pass_follow_the_weights_it_met():
    def zeros(visit, compute):
        here = visit.weights.clone()
        visit.prunable[visit.layout.prunable[-1].span] = 0.0
        visit.gradient_of(visit.inputs[:5], visit.targets[:5])
        with torch.no_grad():
            visit.module(visit.inputs[:5])
        visit.weights.copy_(here)

    trained, trainer, _ = visit(beside(zeros))
    plain, *_ = visit(beside(lambda visit, compute: None))
    extra = trained.measured.flops_sparse - plain.measured.flops_sparse
    # Nothing of the last layer's forward passes and input gradient is left, its weight gradient is dense.
    assert extra[-1] == pytest.approx(6 * 5 * trainer.flops.forward[-1])
    # A gradient by gradient_of and a forward pass: 1 + 1/3 passes over dense weights.
    second = 6 * 5 * trainer.flops.forward[1]
    assert extra[1] == pytest.approx(4 * second)


def test_hooks_are_gone_after_a_visit_that_failed():
    def fail(visit, compute):
        loss_of(visit, torch.arange(5))
        raise RuntimeError("planted")

    method = beside(fail)
    trainer = trainer_of(method)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, method, None, 1))
    assert not any(m._forward_hooks for m in trainer.module.modules())
    assert not any(p._backward_hooks for p in trainer.module.parameters())


class _Nothing(Client):
    def train(self, batches: Iterable[Tensor]) -> Tensor:
        return torch.tensor(0.5)


@dataclass(frozen=True, kw_only=True)
class Nothing(Algorithm):
    client = _Nothing


def test_training_of_ones_own_without_a_pass_costs_nothing():
    trained, _, forward = visit(Nothing())
    found = trained.measured
    assert (found.loss, found.steps, found.flops_dense, forward) == (0.5, 0, 0.0, 0)
    assert not found.flops_sparse.any()


def test_the_first_pass_alone_meets_the_weights_as_received():
    bill = Bill(trainer_of(FedAvg()).flops)
    for samples in (8, 8, 4):
        bill.step(samples)
    assert (bill.first, bill.samples) == (8, 20)
