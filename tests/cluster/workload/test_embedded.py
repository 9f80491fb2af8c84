"""Tables that come with scikit-learn: their split and scale, regression and classification on them."""

import math

import numpy as np
import pytest
import torch
from sklearn import datasets

from cluster.cli import main
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.references import DataError
from cluster.workload import models
from cluster.workload.datasets import open_dataset
from cluster.workload.models import ModelError
from cluster.workload.objectives import Regression, added
from cluster.workload.preparing import prepare
from tests.tiny_experiment import run_inline


def table(cache, name="diabetes", **changes):
    """A small experiment on a table."""
    tree = {
        "rounds": 3,
        "cohort": 1,
        "execution": "inline",
        "algorithm": {"name": "fedavg"},
        "model": {"name": "linear", "init": "zero"},
        "data": {"name": name, "cache": str(cache / "data")},
        "partition": {"name": "iid", "clients": 1},
        "local": {"epochs": 1, "batch_size": 1000, "lr": 0.02},
        "tracking": {"enabled": False},
    }
    if name == "diabetes":
        tree["objective"] = {"name": "regression"}
    return resolve({**tree, **changes})


# --- the data


@pytest.mark.parametrize(
    ("name", "load", "sizes"),
    [
        ("diabetes", lambda: datasets.load_diabetes(scaled=False), (354, 88)),
        ("breast_cancer", datasets.load_breast_cancer, (455, 114)),
    ],
)
def test_a_fifth_is_the_test_split_and_train_sets_the_scale(tmp_path, name, load, sizes):
    dataset = open_dataset(prepare(name=name, cache_dir=tmp_path))
    train, test, stored = dataset.train, dataset.test, load()
    assert (len(train.targets), len(test.targets)) == sizes
    assert train.inputs.dtype == test.inputs.dtype == np.float32
    np.testing.assert_allclose(train.inputs.mean(axis=0, dtype=np.float64), 0.0, atol=1e-6)
    np.testing.assert_allclose(train.inputs.std(axis=0, dtype=np.float64), 1.0, atol=1e-6)
    assert np.abs(test.inputs.mean(axis=0)).max() > 1e-3
    # Every row is there once, with its target: the same table up to the scale of its columns.
    ours = np.column_stack([np.concatenate([split.inputs for split in (train, test)]),
                            np.concatenate([split.targets for split in (train, test)])])  # fmt: skip
    theirs = np.column_stack([stored.data, stored.target])
    ours, theirs = ((each - each.mean(axis=0)) / each.std(axis=0) for each in (ours, theirs))
    distances = np.abs(ours[:, None] - theirs[None]).max(axis=2)
    assert sorted(distances.argmin(axis=1)) == list(range(len(theirs)))
    assert distances.min(axis=1).max() < 1e-4


def test_what_is_stored_is_what_the_targets_are(tmp_path):
    diabetes = open_dataset(prepare(name="diabetes", cache_dir=tmp_path))
    assert (diabetes.classes, diabetes.train.targets.dtype) == ((), np.float32)
    assert (diabetes.train.targets.min(), diabetes.train.targets.max()) == (25.0, 346.0)
    cancer = open_dataset(prepare(name="breast_cancer", cache_dir=tmp_path))
    assert (cancer.classes, cancer.train.targets.dtype) == (("malignant", "benign"), np.int64)
    shares = [np.bincount(split.targets) / len(split.targets) for split in (cancer.train, cancer.test)]
    np.testing.assert_allclose(*shares, atol=0.01)
    again = open_dataset(prepare(name="diabetes", cache_dir=tmp_path / "other"))
    np.testing.assert_array_equal(diabetes.test.inputs, again.test.inputs)


# --- regression


def test_two_columns_by_hand():
    # Errors (1, 0), (-1, 2): squares 6 over 4 numbers. Columns spread 2 and 0 about their means.
    outputs, targets = torch.tensor([[2.0, 5.0], [2.0, 7.0]]), torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    objective = Regression()
    assert objective.shape(targets.numpy(), 2) == (2, 2)
    assert float(objective.loss(outputs, targets)) == 1.5
    sums = objective.sums(outputs, targets)
    assert objective.metrics(sums) == {"rmse": math.sqrt(1.5), "mae": 1.0, "r2": 1 - 6 / 2}
    halves = added(*(objective.sums(outputs[row : row + 1], targets[row : row + 1]) for row in range(2)))
    assert objective.metrics(halves) == objective.metrics(sums)
    alike = objective.sums(outputs, torch.full((2, 2), 3.0))
    assert math.isnan(objective.metrics(alike)["r2"])


def test_one_client_descends_as_worked_out_in_numpy(tmp_path, cache):
    run = run_inline(table(cache, rounds=12), tmp_path / "run")
    dataset = run.driver.federation.dataset
    inputs, targets = dataset.train.inputs.astype(np.float64), dataset.train.targets.astype(np.float64)
    weights, offset = np.zeros(10), 0.0
    for line in run.lines:
        errors = inputs @ weights + offset - targets
        assert line["train/loss"] == pytest.approx(np.mean(errors**2), rel=1e-5)
        weights -= 0.02 * 2 * (inputs.T @ errors) / len(errors)
        offset -= 0.02 * 2 * errors.mean()
        off = dataset.test.inputs @ weights + offset - dataset.test.targets
        assert line["test/rmse"] == pytest.approx(np.sqrt(np.mean(off**2)), rel=1e-5)
        assert line["test/mae"] == pytest.approx(np.mean(np.abs(off)), rel=1e-5)
        spread = np.var(dataset.test.targets.astype(np.float64))
        assert line["test/r2"] == pytest.approx(1 - np.mean(off**2) / spread, rel=1e-4)


def test_linear_options():
    options = {"input_shape": (4,), "classes": 2, "seed": 1}
    names = [name for name, _ in models.build("linear", bias=False, **options).named_parameters()]
    assert names == ["1.weight"]
    zero = models.build("linear", init="zero", **options)
    assert all((parameter == 0).all() for parameter in zero.parameters())
    drawn = models.build("linear", **options)[1].weight
    assert (drawn != 0).all()
    assert torch.equal(drawn, models.build("mlp", hidden=[], **options)[1].weight)


def test_classes_of_a_table_are_divided_and_clients_judged(tmp_path, cache):
    partition = {"name": "lda", "clients": 5, "alpha": 0.5}
    config = table(
        cache,
        "breast_cancer",
        rounds=8,
        cohort=5,
        partition=partition,
        model={"name": "mlp", "hidden": [8]},
        local={"epochs": 2, "batch_size": 16, "lr": 0.1},
        evaluate_clients={"every": 8},
    )
    run = run_inline(config, tmp_path / "run")
    assert run.lines[-1]["test/accuracy"] > 0.9
    assert 0 < run.lines[-1]["clients/accuracy_mean"] <= 1


# --- what does not fit is told


def test_objective_and_targets_must_be_of_one_kind(cache):
    with pytest.raises(DataError, match=r"'diabetes' are numbers; set objective.name=regression"):
        Federation.of(table(cache, objective={"name": "classification"}))
    with pytest.raises(DataError, match=r"'breast_cancer' are codes of classes.*name=classification"):
        Federation.of(table(cache, "breast_cancer", objective={"name": "regression"}))


def test_what_takes_classes_or_images_is_refused(cache):
    with pytest.raises(ConfigError) as raised:
        table(cache, partition={"name": "lda", "clients": 2})
    assert str(raised.value).count("\n") == 0  # a shift that is not asked for is not blamed
    with pytest.raises(ModelError, match=r"small_cnn cannot be built .*\[10\].*mlp and linear take"):
        Federation.of(table(cache, model={"name": "small_cnn"}))
    with pytest.raises(DataError, match=r"'diabets' is no data set: .*did you mean diabetes"):
        Federation.of(table(cache, data={"name": "diabets"}, objective={"name": "regression"}))


def test_it_is_described_without_classes(cache, capsys):
    words = ["data.name=diabetes", "objective.name=regression", "partition.name=iid", "model.name=linear"]
    assert main(["describe", *words, f"data.cache={cache}"]) == 0
    shown = capsys.readouterr().out
    assert "diabetes, inputs 10, 1 target" in shown
    assert "11 / 12 / 12 samples (min / median / max)" in shown
