"""Clients judged by rows of their own, and clients that never train, which adapt to a few samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from algorithms import Client
from algorithms.fedavg import FedAvg
from cluster.clients.local_training import to_input
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.references import DataError
from cluster.workload.own_rows import few, hold_out, listed
from tests.cluster.records.interrupted_runs import assert_same_run, drive, federated
from tests.tiny_experiment import run_inline, tiny_federation, tiny_images

pytestmark = pytest.mark.usefixtures("no_pictures")
OWN = {"data": {"validation": 0.25}, "evaluate_clients": {"every": 1, "rows": "own", "after": 6}}
NEW = {"cohort": 3, "evaluate_clients": {"every": 1, "unseen": 2, "shots": [1, 3], "adapt_steps": 2}}


def test_a_share_of_each_class_is_held_out_by_hand():
    labels = np.array([0] * 8 + [1] * 4 + [0] * 4 + [1])
    whole = listed([np.arange(12), np.arange(12, 16), np.arange(16, 17)])
    trained, judged = hold_out(whole, labels, share=0.25, unseen=0, shots=1, seed=3)
    assert [Counter(labels[judged.client(c)].tolist()) for c in range(3)] == [{0: 2, 1: 1}, {0: 1}, {}]
    for client in range(3):
        both = np.concatenate([trained.client(client), judged.client(client)])
        assert sorted(both) == whole.client(client).tolist()
        assert sorted(trained.client(client)) == trained.client(client).tolist()


def test_few_shots_by_hand():
    labels = np.array([0] * 5 + [1] * 2 + [2])
    whole = listed([np.arange(8), np.arange(8)])
    trained, judged = hold_out(whole, labels, share=0.0, unseen=1, shots=3, seed=3)
    assert trained.client(0).tolist() == list(range(8))
    assert not len(judged.client(0))
    # Of the one row of class 2 and the two of class 1 one is left to judge by.
    assert Counter(labels[trained.client(1)].tolist()) == {0: 3, 1: 1}
    assert Counter(labels[judged.client(1)].tolist()) == {0: 2, 1: 1, 2: 1}
    some = [set(few(trained.client(1), labels, shots, 3, 1).tolist()) for shots in (1, 2, 3)]
    assert [len(rows) for rows in some] == [2, 3, 4]
    assert some[0] < some[1] < some[2] == set(trained.client(1).tolist())


def accuracy(federation, flat, rows):
    federation.layout.bind(federation.model, flat[: federation.layout.model_size].clone())
    train = federation.dataset.train
    with torch.no_grad():
        outputs = federation.model.eval()(to_input(train.inputs[rows], torch.device("cpu")))
    return float((outputs.argmax(1).numpy() == train.targets[rows]).mean())


def test_clients_are_judged_by_rows_that_they_did_not_train_on(cache, tmp_path):
    config = tiny_federation(cache, cohort=6, **OWN)
    run = run_inline(config, tmp_path / "run")
    federation = run.driver.federation
    own = [federation.own.client(client) for client in range(6)]
    for client, rows in enumerate(own):
        assert len(rows)
        assert not set(rows) & set(federation.partition.client(client))
    assert sorted(np.concatenate(own)) == federation.validation.tolist()
    assert len(federation.validation) + federation.sizes.sum() == len(federation.dataset.train.targets)
    # The model of round 1, and what each client sends in round 2, where all take part.
    before = [accuracy(federation, run.states[-2].weights, rows) for rows in own]
    after = []
    for client, rows in enumerate(own):
        named, _ = run.uploads[2, client]
        sent = torch.cat([named[e.name].flatten() for e in federation.layout.trained])
        after.append(accuracy(federation, sent, rows))
    line = run.lines[0]
    assert line["clients/accuracy_mean"] == pytest.approx(np.mean(before))
    assert line["clients/accuracy_mean_after"] == pytest.approx(np.mean(after))
    assert line["clients/accuracy_gain"] == pytest.approx(np.mean(after) - np.mean(before))
    assert len(set(after)) > 1
    assert line["val/accuracy"] == pytest.approx(np.average(before, weights=[len(rows) for rows in own]))
    # Who judges does not touch training.
    plain = run_inline(
        tiny_federation(
            cache, cohort=6, data=OWN["data"], evaluate_clients={**OWN["evaluate_clients"], "after": 0}
        ),
        tmp_path / "plain",
    )
    assert torch.equal(plain.state.weights, run.state.weights)


def test_a_tiers_clients_are_judged_at_their_budget(cache, tmp_path):
    tiers = {"weak": {"share": 0.5, "sparsity": 0.9}, "strong": {"share": 0.5, "sparsity": 0.5}}
    config = tiny_federation(
        cache, rounds=1, algorithm={"name": "topk", "sparsity": 0.5}, devices={"tiers": tiers}, **OWN
    )
    run = run_inline(config, tmp_path / "run")
    chunks = run.driver._clients.chunks(1, last=True)
    assert Counter((chunk.tier, chunk.after) for chunk in chunks) == {
        ("weak", None): 3,
        ("strong", None): 3,
        (None, 0): 6,
    }
    assert np.isfinite(run.lines[-1]["clients/accuracy_mean"])


def test_what_has_no_classes_is_judged_by_own_rows(cache, tmp_path):
    config = tiny_federation(
        cache,
        data={"name": "diabetes", "validation": 0.2},
        objective={"name": "regression"},
        partition={"name": "iid", "clients": 6},
        model={"name": "linear"},
        local={"lr": 0.01},
        evaluate_clients=OWN["evaluate_clients"],
    )
    line = run_inline(config, tmp_path / "run").lines[-1]
    assert line["clients/rmse_worst_decile"] >= line["clients/rmse_mean"] > 0


def with_groups():
    """Each image in a group of its class, one in four of another group too."""
    arrays = tiny_images()
    labels = arrays["train_labels"]
    groups = np.array([f"{label}{'-rare' * (row % 4 == 0)}" for row, label in enumerate(labels)])
    return {**arrays, "train_groups": groups}


def test_the_worst_group_is_found_on_validation_data(cache, tmp_path):
    data = {"name": f"{__name__}:with_groups", "validation": 0.3}
    config = tiny_federation(cache, data=data, evaluate_clients={"every": 1, "groups": True})
    run = run_inline(config, tmp_path / "run")
    federation = run.driver.federation
    groups = federation.dataset.train.groups[federation.validation]
    found = [
        accuracy(federation, run.state.weights, federation.validation[groups == code])
        for code in np.unique(groups)
    ]
    assert len(found) == 6
    assert run.lines[-1]["groups/accuracy_mean"] == pytest.approx(np.mean(found))
    assert run.lines[-1]["groups/accuracy_worst"] == pytest.approx(min(found))
    with pytest.raises(DataError, match=r"evaluate_clients.groups: true, but .* has no groups"):
        Federation.of(
            tiny_federation(cache, data={"validation": 0.3}, evaluate_clients={"every": 1, "groups": True})
        )


told = []


class _TellingClient(Client):
    def begin(self):
        if self.visit.instructions.adapts:
            told.append((len(self.visit.targets), self.visit.steps, sorted(self.visit.targets.tolist())))


@dataclass(frozen=True, kw_only=True)
class Telling(FedAvg):
    client = _TellingClient
    name = ""


def test_new_clients_never_train_and_adapt_to_a_few_samples(cache, tmp_path):
    told.clear()
    config = tiny_federation(cache, rounds=3, algorithm={"name": f"{__name__}:Telling"}, **NEW)
    assert config.population == 4
    run = run_inline(config, tmp_path / "run")
    federation, labels = run.driver.federation, run.driver.federation.dataset.train.targets
    assert {client for _, client in run.uploads} == {0, 1, 2, 3}
    found = iter(told)
    for _ in range(3):
        for shots in (1, 3):
            for client in (4, 5):
                rows = few(federation.partition.client(client), labels, shots, config.partition_seed, client)
                assert next(found) == (len(rows), 2, sorted(labels[rows].tolist()))
    # The global model of the last round on the rows that are left.
    expected = [accuracy(federation, run.state.weights, federation.own.client(c)) for c in (4, 5)]
    assert run.lines[-1]["unseen/accuracy_mean"] == pytest.approx(np.mean(expected))
    assert run.lines[-1]["unseen/accuracy_worst_decile"] == pytest.approx(min(expected))
    keys = {f"unseen/accuracy_{what}_{k}_shot" for what in ("mean", "std", "worst_decile") for k in (1, 3)}
    assert keys <= run.lines[0].keys()
    assert not any(key.startswith("unseen") and np.isnan(v) for key, v in run.lines[0].items())


def test_adaptation_is_plain_training_on_the_few(cache, tmp_path):
    config = tiny_federation(cache, rounds=1, **NEW)
    run = run_inline(config, tmp_path / "run")
    host, federation = run.driver.engine._host, run.driver.federation
    parcel = run.driver._schedule.sender.parcel(run.state)
    told_next = run.driver._schedule.instruct(run.state)
    broadcast = run.driver._schedule.broadcast(parcel, told_next, np.empty(0, np.int64), [])
    adapted = host._locally_trained(broadcast, 4, 3).copy()
    rows = few(federation.partition.client(4), federation.dataset.train.targets, 3, config.partition_seed, 4)
    again = replace(broadcast, instructions=replace(told_next, steps=2))
    by_hand = host._trainer.visit(4, rows, 0.0, again).values
    assert np.array_equal(adapted, by_hand)
    assert not np.array_equal(adapted, broadcast.weights)


def test_interrupted_it_judges_alike(cache, tmp_path):
    section = {**NEW["evaluate_clients"], "rows": "own", "after": 2}
    config = federated(cache, cohort=3, data=OWN["data"], evaluate_clients=section)
    for name, killed_at in (("whole", None), ("cut", 3)):
        folder, federation = RunFolder.create(tmp_path / name, config), Federation.of(config)
        drive(folder, federation, killed_at=killed_at)
    drive(folder, Federation.of(config))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert "unseen/accuracy_mean_1_shot" in folder.rounds()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"evaluate_clients": {"every": 1, "rows": "own"}},
            r"rows: own, but none are held out; set data.val",
        ),
        ({**OWN, "shift": {"round": 2}}, r"evaluate_clients.rows: rows change hands at a shift"),
        (
            {**NEW, "partition": {"name": "sampled", "samples_per_client": 9, "alpha": 1.0}},
            r"evaluate_clients.unseen: clients of partition.name=sampled share rows",
        ),
        (
            {"cohort": 5, "evaluate_clients": NEW["evaluate_clients"]},
            r"cohort: 5 .* evaluate_clients.unseen 2",
        ),
        ({"cohort": 1, "evaluate_clients": {"every": 1, "unseen": 6}}, r"unseen: 6, so no client"),
        ({"evaluate_clients": {"every": 1, "groups": True}}, r"groups: true, but no data is held out"),
        ({"evaluate_clients": {"unseen": 1}}, r"evaluate_clients.every: 0"),
        ({"evaluate_clients": {"every": 1, "unseen": 1, "shots": []}}, r"evaluate_clients.shots: \[\]"),
        ({"evaluate_clients": {"every": 1, "unseen": 1, "shots": [0]}}, r"evaluate_clients.shots"),
    ],
)
def test_what_cannot_be_is_refused(cache, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_federation(cache, **options)
