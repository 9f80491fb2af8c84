"""Objectives: hand-computed sums, tokens that stay integers, a regression through a whole run."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import cluster
from algorithms.fedavg import FedAvg
from cluster.clients.local_training import EVALUATION_BATCH, LocalSettings, Trainer
from cluster.clients.passes import GraphPasses
from cluster.clients.transfers import ClientData
from cluster.configuration.config import resolve, validate
from cluster.configuration.trees import ConfigError
from cluster.exchange import EvaluationChunk
from cluster.federation import Federation
from cluster.records import outputs
from cluster.records.checkpoint import list_rounds
from cluster.records.run_folder import RunFolder
from cluster.records.tracking import sync
from cluster.references import UserError
from cluster.rounds.metrics import added_up
from cluster.workload.datasets import Split
from cluster.workload.inputs import to_input
from cluster.workload.objectives import Classification, added, selecting, selects_of
from tests.cluster.clients.tiny_visits import recorder
from tests.example_objective import NextToken, Regression
from tests.tiny_experiment import run_inline, tiny_federation

CPU = torch.device("cpu")
IID = {"name": "iid"}


# --- by hand


def test_classification_by_hand():
    # Softmax of (0, ln 3) is (1/4, 3/4). Predicted: 1, 1, 0, with ties going to the first.
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)], [0.0, 0.0]])
    targets = torch.tensor([1, 0, 0])
    objective = Classification()
    sums = objective.sums(logits, targets)
    assert sums["samples"].tolist() == [2, 1]
    assert sums["correct"].tolist() == [1, 1]
    assert sums["loss"] == pytest.approx(math.log(4 / 3) + math.log(4) + math.log(2))
    assert float(objective.loss(logits, targets)) == pytest.approx(sums["loss"] / 3)
    assert objective.metrics(sums) == {"accuracy": 2 / 3, "loss": sums["loss"] / 3}
    assert objective.metric_by_class(sums).tolist() == [0.5, 1.0]
    twice = added(sums, sums)
    assert objective.metrics(twice) == pytest.approx(objective.metrics(sums))
    assert twice["samples"].tolist() == [4, 2]


def test_regression_by_hand():
    # Errors 1, -1, 2: squares 6, absolute 4; targets 1, 2, 3 have a squared deviation of 2.
    outputs, targets = torch.tensor([[2.0], [1.0], [5.0]]), torch.tensor([1, 2, 3])
    objective = Regression()
    assert float(objective.loss(outputs, targets)) == 2.0
    expected = {"rmse": math.sqrt(2.0), "mae": 4 / 3, "r2": 1 - 6 / 2}
    assert objective.metrics(objective.sums(outputs, targets)) == pytest.approx(expected)
    parts = [
        (EvaluationChunk("test", start, stop), objective.sums(outputs[start:stop], targets[start:stop]))
        for start, stop in ((2, 3), (0, 2))
    ]
    assert objective.metrics(added_up(parts)["test", None, None, None]) == pytest.approx(expected)


def test_padding_weighs_nothing():
    # Two sequences of which one token each is no padding; every logit alike: perplexity 5.
    outputs, targets = torch.zeros(2, 3, 5), torch.tensor([[0, 0, 1], [2, 0, 0]])
    objective = NextToken()
    assert objective.shape(targets.numpy(), 5) == (2, 3, 5)
    sums = objective.sums(outputs, targets)
    assert sums == {"tokens": 2, "correct": 0, "loss": pytest.approx(2 * math.log(5))}
    assert objective.metrics(sums)["perplexity"] == pytest.approx(5.0)
    assert float(objective.loss(outputs, torch.zeros_like(targets))) == 0.0  # nothing but padding


# --- inputs and targets of any type


@pytest.mark.parametrize(
    ("stored", "dtype", "values"),
    [
        (np.array([0, 255], np.uint8), torch.float32, [-1.0, 1.0]),
        (np.array([0.25, 3.0], np.float32), torch.float32, [0.25, 3.0]),
        (np.array([0.25, 3.0], np.float64), torch.float32, [0.25, 3.0]),
        *[(np.array([7, 30_000], kind), torch.int64, [7, 30_000]) for kind in (np.int16, np.int32, np.int64)],
        (np.array([2**24 + 1], np.int64), torch.int64, [2**24 + 1]),  # which float32 cannot hold
    ],
)
def test_inputs_become_what_their_type_says(stored, dtype, values):
    found = to_input(stored, CPU)
    assert found.dtype == dtype
    assert found.tolist() == values


class NextTokens(nn.Module):
    """A model of tokens that notes what it is given."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.given = set()

    def forward(self, tokens):
        self.given.add((tokens.dtype, tokens.ndim))
        return self.head(self.embedding(tokens))


def test_tokens_reach_the_model_as_integers_and_chunks_add_up():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 5, size=(150, 7)).astype(np.int32)
    split = Split(tokens[:, :-1].copy(), tokens[:, 1:].astype(np.int64), None)
    split.targets[:40, 2:] = 0  # padding, unevenly spread over the chunks
    settings = LocalSettings(seed=0, epochs=1, batch_size=8, weight_decay=0.0, proximal=0.0)
    model = NextTokens()
    trainer = Trainer(model, FedAvg(), settings, split, CPU, NextToken())
    inputs, targets = ClientData(split, CPU).of(np.array([3, 1]))
    assert (inputs.dtype, targets.dtype, targets.shape) == (torch.int64, torch.int64, (2, 6))
    weights = trainer.layout.flatten(model).numpy()
    objective = NextToken()
    whole = trainer.evaluate(weights, split, 0, 150)
    assert whole["tokens"] == 110 * 6 + 40 * 2
    parts = added(trainer.evaluate(weights, split, 0, 31), trainer.evaluate(weights, split, 31, 150))
    assert objective.metrics(parts) == pytest.approx(objective.metrics(whole))
    batch = EVALUATION_BATCH["cpu"]
    assert batch < 150  # more than one step of the evaluation
    # By hand, token by token.
    logits = model(torch.from_numpy(split.inputs.astype(np.int64))).double().detach().log_softmax(-1)
    loss = sum(
        -float(logits[row, place, target])
        for (row, place), target in np.ndenumerate(split.targets)
        if target != 0
    )
    assert whole["loss"] == pytest.approx(loss)
    loss = trainer._compute(inputs, targets)
    assert torch.isfinite(loss)
    assert model.given == {(torch.int64, 2)}


def test_a_recorded_pass_takes_targets_of_any_shape():
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 5, size=(24, 7))
    split = Split(tokens[:, :-1].astype(np.int32), tokens[:, 1:].copy(), None)
    settings = LocalSettings(seed=0, epochs=1, batch_size=8, weight_decay=0.0, proximal=0.0)
    trainer = Trainer(NextTokens(), FedAvg(), settings, split, CPU, NextToken())
    inputs, targets = ClientData(split, CPU).of(np.arange(24))
    recorded = []
    passes = GraphPasses(trainer._compute, [], recorder(trainer, recorded))
    for start in (0, 8, 16, 4, 12):  # warm ones, the recording, replays
        chosen = torch.arange(start, start + 8)
        loss = passes.run(inputs, targets, chosen).clone()
        gradient = trainer._gradient.clone()
        assert torch.equal(loss, trainer._compute(inputs[chosen], targets[chosen]))
        assert torch.equal(gradient, trainer._gradient)
    assert recorded == ["recorded"]


# --- a whole run of an objective of one's own


def learning(cache, objective, partition=IID, **options):
    """The tiny experiment with another objective, divided otherwise."""
    tree = tiny_federation(
        cache, **{key: options.pop(key) for key in set(options) & {"data", "local"}}
    ).dump()
    partition = {"clients": 6, "seed": 5, **partition}
    return resolve({**tree, "objective": objective, "partition": partition, **options})


def by_number(cache, **options):
    """The same with the number of a class as a quantity."""
    return learning(cache, {"name": "tests.example_objective:Regression"}, **options)


def test_a_regression_runs_is_selected_by_the_lowest_error_and_predicts_what_it_logs(tmp_path, cache):
    data = {"validation": 0.25}
    config = by_number(cache, rounds=5, data=data, local={"lr": 0.05}, checkpoint_every=1)
    run = run_inline(config, tmp_path / "run")
    federation = run.driver.federation
    assert federation.selection_metric == "val/rmse"
    assert [key for key in run.lines[0] if key.startswith("test/")] == ["test/rmse", "test/mae", "test/r2"]
    test = federation.dataset.test
    federation.layout.bind(federation.model, run.state.weights.clone())
    with torch.no_grad():
        outputs = federation.model.eval()(to_input(test.inputs, CPU))[:, 0].double().numpy()
    assert outputs.shape == (60,)
    errors = outputs - test.targets
    assert run.lines[-1]["test/rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)))
    assert run.lines[-1]["test/mae"] == pytest.approx(np.mean(np.abs(errors)))
    assert run.lines[-1]["test/r2"] == pytest.approx(1 - np.mean(errors**2) / np.var(test.targets))
    rmse = {line["round"]: line["val/rmse"] for line in run.lines}
    best = min(rmse, key=lambda number: rmse[number])
    assert len(set(rmse.values())) > 1
    assert run.driver._ledger.best(rmse, "val/rmse") == best
    assert best in list_rounds(run.driver.folder.checkpoints)


def test_the_summary_names_what_was_measured(tmp_path, cache):
    from cluster.records.outputs import summary_of

    run = run_inline(by_number(cache, rounds=3), tmp_path / "run")
    summary = summary_of(run.driver.folder, run.driver.config, run.driver.federation, run.lines[-1], 1.0)
    rmse = [line["test/rmse"] for line in run.lines]
    assert (summary["rmse"], summary["best_rmse"]) == (rmse[-1], min(rmse))
    assert summary["best_round"] == 1 + rmse.index(min(rmse))
    assert summary["selected_by"] == "test/rmse"
    assert not {"accuracy", "best_accuracy", "val_accuracy"} & summary.keys()


def test_a_shift_recovers_where_the_error_falls_back(cache):
    from cluster.simulation.shift import shift_metrics

    config = by_number(cache, rounds=9, shift={"round": 3})
    errors = {1: 0.9, 2: 0.5, 3: 0.8, 4: 0.6, 5: 0.5}
    stored = {number: {"round": number, "test/rmse": value} for number, value in errors.items()}
    found = {number: shift_metrics(config, stored, stored[number], Regression().selects) for number in stored}
    assert found[4]["shift/rmse_before"] == 0.5
    assert found[4]["shift/rmse_change"] == pytest.approx(0.1)
    assert found[4]["shift/recovery_rounds"] is None
    assert found[5]["shift/recovery_rounds"] == 3


def test_what_selects_is_known_without_the_code_that_names_it(cache):
    tree = {**by_number(cache).dump(), "objective": {"name": "nowhere:Mine"}}
    config = validate(tree, inert=True)
    line = {"round": 3, "train/loss": 0.1, "test/mean_error": 2.0, "test/other": 1.0}
    found = selecting(config, line)
    assert (found.key, found.title, found.better, found.text(2.0)) == ("mean_error", "mean error", None, "2")
    assert selecting(by_number(cache)).key == "rmse"
    assert selects_of({"accuracy": 0.5}).key == "accuracy"  # of version 0.1


def test_mlflow_knows_what_was_measured(tmp_path, cache, monkeypatch):
    from cluster.compare.reading import read_experiment, read_folder

    monkeypatch.setattr(outputs, "installed", lambda name: name != "matplotlib")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracked = {"uri": uri, "experiment": "errors", "enabled": True}
    result = cluster.run(by_number(cache, rounds=2, tracking=tracked), tmp_path / "run")
    sync(tmp_path / "run")  # in case that the machine was too slow to deliver in time
    (run,) = read_experiment(uri, "errors")
    assert run.metrics == read_folder(result.folder).metrics == Regression.measures
    assert run.series["test/rmse"].values.tolist() == [
        line["test/rmse"] for line in RunFolder(result.folder).rounds()
    ]


# --- refused by name, before anything starts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"partition": {"name": "lda"}},
            "partition.name: lda needs the classes of the samples, and objective",
        ),
        ({"partition": {"name": "dirichlet"}}, r"partition.name: dirichlet .* allowed are iid, natural"),
        ({"partition": {"name": "shards"}}, "partition.name: shards needs"),
        ({"partition": {"name": "sampled"}}, "partition.name: sampled needs"),
        ({"shift": {"round": 2, "partition": {"name": "shards"}}}, "shift.partition.name: shards needs"),
        ({"shift": {"round": 2, "classes": 2}}, "shift.classes: needs the classes"),
        ({"evaluate_clients": {"every": 1}}, "evaluate_clients.every: needs the classes"),
    ],
)
def test_what_takes_classes_is_refused_without_them(cache, options, message):
    with pytest.raises(ConfigError, match=message):
        by_number(cache, **options)


def test_what_takes_no_classes_works_without_them(cache):
    for partition in (IID, {"name": "sampled", "alpha": None, "samples_per_client": 9}):
        federation = Federation.of(by_number(cache, partition=partition, data={"validation": 0.25}))
        assert len(federation.validation) == 30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clasification", "objective.name: 'clasification' is unknown.* did you mean classification"),
        ("tests.example_objective:Dataset", "expected a subclass of Objective"),
        ("tests.example_objective:Unmeasured", "declares no measure of which more or less is better"),
        ("tests.example_objective:Talkative", r"measures \['bias', 'mae', 'r2', 'rmse'\]; it declares"),
        (
            "tests.example_objective:Vectorial",
            r"the loss of outputs \[2, 1\] and targets .* has shape \[2\]",
        ),
        ("tests.example_objective:Broken", "fails on outputs .*: ValueError: planted"),
    ],
)
def test_a_wrong_objective_says_so(cache, name, message):
    with pytest.raises(UserError, match=message):
        Federation.of(learning(cache, {"name": name}))


def test_options_are_declared(cache):
    name = "tests.example_objective:NextToken"
    with pytest.raises(ConfigError, match=r"objective.pading: .* no such field.* did you mean padding"):
        learning(cache, {"name": name, "pading": 1})
    config = resolve(
        learning(cache, {"name": name, "padding": 3}).dump(),
        ["objective.name=classification"],
    )
    assert config.objective.options == {}  # those of the old choice fall away


def test_an_objective_that_is_not_named_leaves_the_hash_as_it_was(cache):
    plain = tiny_federation(cache)
    assert tiny_federation(cache, objective={"name": "classification"}).digest() == plain.digest()
    assert by_number(cache).digest() != learning(cache, {"name": "classification"}).digest()
