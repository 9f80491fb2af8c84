"""What a client half may take in hand: its batches, passes, loss, number of steps and own measures."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cluster
from algorithms import Algorithm, Client, Instructions
from algorithms.fedavg import FedAvg
from cluster import execution
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import tiny_federation

ROWS = np.arange(20)  # batches of 8, 8 and 4


def told(method: Algorithm, **instructions):
    trainer = trainer_of(method)
    broadcast = broadcast_of(trainer, method, None, 1)
    told = replace(broadcast.instructions, **instructions)
    return trainer, replace(broadcast, instructions=told)


def of(kind: type[Client], **members) -> Algorithm:
    own = type("Own", (Algorithm,), {"client": kind, "__module__": __name__, **members})
    return dataclass(frozen=True, kw_only=True)(own)()


# ------------------------------------------------------------------------------------------ number of steps


class _Noting(Client):
    seen: list[list[int]] = []  # noqa: RUF012

    def before_forward(self):
        self.seen.append(self.visit.chosen.tolist())


def batches(**instructions) -> list[list[int]]:
    _Noting.seen.clear()
    trainer, broadcast = told(of(_Noting), **instructions)
    trained = trainer.visit(0, ROWS, 0.0, broadcast)
    assert trained.measured.steps == len(_Noting.seen)
    assert trained.measured.flops_dense == trainer.flops.dense(sum(map(len, _Noting.seen)))
    planned = broadcast.instructions.local_samples(len(ROWS), 8, trainer.settings.epochs)
    assert planned == sum(map(len, _Noting.seen))
    return list(_Noting.seen)


@pytest.mark.parametrize("steps", range(1, 10))
def test_steps_take_the_batches_of_as_many_epochs_as_they_need(steps):
    three_epochs = batches(epochs=3)
    assert [len(batch) for batch in three_epochs] == [8, 8, 4] * 3
    assert sorted(row for batch in three_epochs[3:6] for row in batch) == list(range(20))
    assert three_epochs[:3] != three_epochs[3:6] != three_epochs[6:]
    assert batches(steps=steps) == three_epochs[:steps]


def test_steps_of_whole_epochs_are_these_epochs_bit_for_bit():
    results = []
    for instructions in ({"steps": 6}, {"epochs": 2}, {}):
        trainer, broadcast = told(FedAvg(), **instructions)
        results.append(trainer.visit(0, ROWS, 0.0, broadcast).values.copy())
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_steps_and_epochs_are_not_told_together():
    with pytest.raises(ValueError, match="steps 3 with epochs 2; give one of them"):
        Instructions(round=1, rounds=1, steps=3, epochs=2)


# ------------------------------------------------------------------------------- gradient, train, loss


class _Itself(Client):
    """The defaults, written out by hand."""

    def train(self, batches):
        total = 0.0
        for chosen in batches:
            assert chosen is self.visit.chosen
            total += float(self.gradient(self.visit.compute))
            self.visit.descend()
            self.after_step()
        return total / self.visit.step

    def gradient(self, compute):
        visit = self.visit
        assert (visit.lr, visit.batch_size) == (0.2, 8)
        compute()
        visit.gradient.fill_(7.0)
        return visit.gradient_of(visit.inputs[visit.chosen], visit.targets[visit.chosen])


def test_the_defaults_written_out_end_in_the_same_bits():
    results = []
    for method in (FedAvg(), of(_Itself, loss=lambda self, out, y, objective: F.cross_entropy(out, y))):
        trainer, broadcast = told(method)
        results.append(trainer.visit(0, ROWS, 0.0, broadcast))
        results[-1] = replace(results[-1], values=results[-1].values.copy())
    assert np.array_equal(results[0].values, results[1].values)
    assert results[0].measured.loss == pytest.approx(results[1].measured.loss, abs=1e-12)
    assert results[1].measured.flops_dense == 2 * results[0].measured.flops_dense


def test_a_loss_of_ones_own_and_the_objectives_inside_it():
    found = []
    for loss in (
        lambda self, outputs, targets, objective: objective(outputs, targets),
        lambda self, outputs, targets, objective: 3.0 * objective(outputs, targets),
        lambda self, outputs, targets, objective: 0.0 * outputs.sum(),
    ):
        trainer, broadcast = told(of(Client, loss=loss), steps=1)
        found.append(trainer.visit(0, ROWS, 0.0, broadcast))
    assert found[1].measured.loss == pytest.approx(3 * found[0].measured.loss)
    assert found[2].measured.loss == 0.0


def test_gradient_of_soft_targets_is_the_mean_over_hard_ones():
    seen = []

    class Soft(Client):
        def begin(self):
            visit, hard = self.visit, []
            for label in range(3):
                visit.gradient_of(visit.inputs[:4], torch.full((4,), label))
                hard.append(visit.gradient.clone())
            visit.gradient_of(visit.inputs[:4], torch.full((4, 3), 1 / 3))
            seen.append((visit.gradient.clone(), torch.stack(hard).mean(0)))

    trainer, broadcast = told(of(Soft))
    trainer.visit(0, ROWS, 0.0, broadcast)
    torch.testing.assert_close(*seen[0], atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------- own measures


class _Measuring(Client):
    def after_step(self):
        step = self.visit.step
        self.visit.measure("step", step, weight=2)
        if step == 1:
            self.visit.measure("once", len(self.visit.targets))
        self.visit.measure("samples", torch.tensor(float(len(self.visit.targets))), weight=0.5)


@dataclass(frozen=True, kw_only=True)
class Measuring(Algorithm):
    client = _Measuring


def test_measures_add_up_in_a_visit():
    trainer, broadcast = told(Measuring(), steps=3)
    trained = trainer.visit(0, ROWS, 0.0, broadcast)
    assert trained.measured.own == {
        "step": (2.0 * (1 + 2 + 3), 6.0),
        "once": (20.0, 1.0),
        "samples": (30.0, 1.5),
    }


def test_a_measure_without_a_proper_name_is_refused():
    class Wrong(Client):
        def begin(self):
            self.visit.measure("a name/with more", 1.0)

    trainer, broadcast = told(of(Wrong))
    with pytest.raises(ValueError, match="'a name/with more' is no name"):
        trainer.visit(0, ROWS, 0.0, broadcast)


def test_measures_are_logged_as_means_over_the_cohort(tmp_path):
    found = []
    for name, where in {"inline": {}, "ray": {"execution": "ray", "actors": 2}}.items():
        config = tiny_federation(
            tmp_path / "data", algorithm={"name": f"{__name__}:Measuring"}, rounds=1, cohort=3, **where
        )
        line = cluster.run(config, tmp_path / name).rounds.iloc[0]
        # Noted in every step: sum steps n_i / sum steps, and each client's n_i once: sum n_i / 3.
        assert line["method/once"] == pytest.approx(line["clients/samples"] / 3)
        found.append((line["method/step"], line["method/samples"], line["method/once"]))
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------- CUDA graphs


def test_methods_with_passes_of_their_own_are_not_recorded():
    assert FedAvg().recordable
    assert of(Client, loss=lambda *_: None).recordable
    assert of(_Noting).recordable
    assert not of(_Itself).recordable
    assert (FedAvg().least_passes, of(_Itself).least_passes) == (1.0, 0.0)


@pytest.mark.parametrize(("method", "replays"), [(FedAvg(), True), (of(_Itself), False)])
def test_the_trainer_records_passes_of_those_that_can_be_replayed(method, replays, monkeypatch):
    made = []
    monkeypatch.setattr("cluster.clients.local_training.GraphPasses", lambda *_: made.append(1))
    trainer = trainer_of(method)
    trainer._choose_passes(replace(trainer.settings, cuda_graphs=True), "cuda")
    assert bool(made) == replays
    trainer._choose_passes(replace(trainer.settings, cuda_graphs=False), "cuda")
    assert len(made) == replays


def test_a_run_says_once_that_passes_are_launched_op_by_op(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="sparsyfed.run"):
        for name in ("fedavg", f"{__name__}:Twice"):
            config = tiny_federation(tmp_path / "data", algorithm={"name": name}, gpus_per_actor=1)
            execution._preflight(config)
    told = [record.getMessage() for record in caplog.records if "cuda_graphs" in record.getMessage()]
    assert told == [
        f"{__name__}:Twice trains by passes of its own: they are launched op by op, cuda_graphs=true is for "
        "methods whose steps are one pass"
    ]


class _Twice(Client):
    def gradient(self, compute):
        compute()
        return super().gradient(compute)


@dataclass(frozen=True, kw_only=True)
class Twice(Algorithm):
    client = _Twice
