"""Whole runs on tables: every objective learns, and what data and objective must have in common."""

import numpy as np
import pytest

from cluster.configuration.config import resolve
from cluster.federation import Federation
from cluster.references import UserError
from tests.tiny_experiment import run_inline

pytestmark = pytest.mark.usefixtures("no_pictures")


def people(count, seed):
    """Who likes what, at three places: a table with a class, a number and a set of labels."""
    rng = np.random.default_rng(seed)
    age, kind, place = rng.normal(40, 9, count), rng.integers(0, 3, count), rng.integers(0, 4, count)
    likes = [
        [name for name, yes in (("tea", a > 40), ("jam", k == 1), ("ale", a < 35 and k == 2)) if yes]
        for a, k in zip(age, kind, strict=True)
    ]
    return {
        "age": age,
        "kind": [("p", "q", "r")[code] for code in kind],
        "place": [f"town {code}" for code in place],
        "old": ["yes" if a > 45 or k == 0 else "no" for a, k in zip(age, kind, strict=True)],
        "wage": 3 * age + 20 * (kind == 1) + rng.normal(0, 1, count),
        "likes": likes,
    }


def tables():
    return {"train": people(160, 1), "test": people(60, 2)}


def experiment(cache, objective, label, *more, **sections):
    tree = {
        "rounds": 5,
        "cohort": 4,
        "execution": "inline",
        "objective": {"name": objective},
        "data": {
            "name": f"{__name__}:tables",
            "columns": ["age", "kind"],
            "label_column": label,
            "group_column": "place",
            "cache": str(cache),
        },
        "model": {"name": "linear", "init": "zero"},
        "partition": {"name": "natural", "clients": 4},
        "algorithm": {"name": "fedavg"},
        "local": {"epochs": 3, "batch_size": 16, "lr": 0.1},
        "tracking": {"enabled": False},
    }
    return resolve({**tree, **sections}, list(more))


@pytest.mark.parametrize(
    ("objective", "label", "key", "better"),
    [
        ("classification", "old", "accuracy", lambda value: value > 0.9),
        ("regression", "wage", "rmse", lambda value: value < 5.0),
        ("multilabel", "likes", "micro_f1", lambda value: value > 0.9),
    ],
)
def test_every_objective_learns_of_towns(tmp_path, cache, objective, label, key, better):
    run = run_inline(experiment(cache, objective, label), tmp_path / "run")
    federation = run.driver.federation
    assert federation.dataset.group_names == tuple(f"town {code}" for code in range(4))
    towns = np.array(people(160, 1)["place"])
    for client in range(4):
        assert set(towns[federation.partition.client(client)]) == {f"town {client}"}
    assert federation.selection_metric == f"test/{key}"
    assert better(run.lines[-1][f"test/{key}"])


def test_one_client_descends_on_labels_as_worked_out_in_numpy(tmp_path, cache):
    partition, local = {"name": "iid", "clients": 1}, {"epochs": 1, "batch_size": 1000, "lr": 0.5}
    config = experiment(
        cache, "multilabel", "likes", "data.group_column=null", "cohort=1", partition=partition, local=local
    )
    run = run_inline(config, tmp_path / "run")
    dataset = run.driver.federation.dataset
    assert dataset.classes == ("ale", "jam", "tea")
    table = people(160, 1)
    held = np.array([[name in likes for name in dataset.classes] for likes in table["likes"]])
    np.testing.assert_array_equal(dataset.train.targets, held)
    inputs, tests = dataset.train.inputs.astype(np.float64), dataset.test.inputs.astype(np.float64)
    wanted = np.array([[name in likes for name in dataset.classes] for likes in people(60, 2)["likes"]])
    weights, offset = np.zeros((4, 3)), np.zeros(3)
    for line in run.lines:
        chance = 1 / (1 + np.exp(-(inputs @ weights + offset)))
        loss = -np.mean(np.where(held, np.log(chance), np.log(1 - chance)))
        assert line["train/loss"] == pytest.approx(loss, rel=1e-5)
        errors = (chance - held) / held.size
        weights, offset = weights - 0.5 * inputs.T @ errors, offset - 0.5 * errors.sum(0)
        chance = 1 / (1 + np.exp(-(tests @ weights + offset)))
        found = chance > 0.5
        assert line["test/exact_match"] == np.mean([list(a) == list(b) for a, b in zip(found, wanted)])  # noqa: B905
        loss = -np.mean(np.where(wanted, np.log(chance), np.log(1 - chance)))
        assert line["test/loss"] == pytest.approx(loss, rel=1e-5)


def test_data_and_objective_must_be_of_one_kind(cache):
    with pytest.raises(
        UserError, match=r"multilabel, but the targets of .*'breast_cancer' are one class each"
    ):
        Federation.of(
            resolve(
                "quickstart",
                [
                    "objective.name=multilabel",
                    "data.name=breast_cancer",
                    "model.name=linear",
                    "partition.name=iid",
                    f"data.cache={cache}",
                ],
            )
        )
    with pytest.raises(UserError, match=r"partition.name: lda needs the classes .*multilabel has none"):
        experiment(cache, "multilabel", "likes", partition={"name": "lda", "clients": 4})


def test_the_keys_leave_older_hashes_alone():
    plain = resolve("quickstart")
    assert resolve(plain.dump(), ["data.columns=[a]"]).digest() != plain.digest()
    assert resolve(plain.dump(), ["data.columns=null"]).digest() == plain.digest()
