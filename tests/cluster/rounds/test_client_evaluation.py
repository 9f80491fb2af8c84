"""Each client is judged on its own mix of classes, and training does not notice."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.clients.local_training import Trainer, to_input
from cluster.configuration.trees import ConfigError
from cluster.exchange import ClientError
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder, comparable
from cluster.rounds.client_evaluation import ClientEvaluation, _spread
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from cluster.workload.objectives import Classification
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

ALL = {"every": 1, "after": 6}


def rows_of(folder):
    with open(folder / "clients.csv", newline="") as file:
        return list(csv.DictReader(file))


def judged_by_hand(federation, client, predictions):
    """Mean over the client's samples of the test accuracy in each sample's class."""
    test = federation.dataset.test.targets.tolist()
    accuracy = {}
    for code in set(test):
        own = [p == t for p, t in zip(predictions, test, strict=True) if t == code]
        accuracy[code] = sum(own) / len(own)
    held = [int(c) for c in federation.dataset.train.targets[federation.partition.client(client)]]
    known = [accuracy[code] for code in held if code in accuracy]
    return sum(known) / len(known)


def predictions_of(federation, flat):
    """What the plain module predicts with these effective weights."""
    federation.layout.bind(federation.model, flat.clone())
    federation.model.eval()
    with torch.no_grad():
        return (
            federation.model(to_input(federation.dataset.test.inputs, torch.device("cpu"))).argmax(1).tolist()
        )


def test_spread_by_hand():
    # Eleven clients: the worst tenth, rounded up, are two. Mean (0 + 2 + 9 * 11) / 11 / 20 = 101 / 220.
    accuracies = np.array([0.1, *[0.55] * 9, 0.0])
    expected = {"mean": 101 / 220, "std": np.sqrt((0.01 + 9 * 0.3025) / 11 - (101 / 220) ** 2)}
    expected["worst_decile"] = (0.0 + 0.1) / 2
    selects = Classification().selects
    found = _spread(accuracies, selects, "_after")
    assert found == pytest.approx({f"clients/accuracy_{key}_after": value for key, value in expected.items()})
    assert (
        _spread(np.array([np.nan, 0.5]), selects, "")["clients/accuracy_mean"] == 0.5
    )  # one that nothing is known of
    assert _spread(np.array([np.nan]), selects, "") == {}
    errors = _spread(accuracies, replace(selects, key="rmse", better="lower"), "")
    # The worst are the largest.
    assert errors["clients/rmse_worst_decile"] == 0.55


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "fedavg"},
        {"name": "sparsyfed", "sparsity": 0.8, "beta": 1.5},
        {"name": "zerofl", "sparsity": 0.8, "upload": "top_k_weights_diff"},
        {"name": "flash", "sparsity": 0.8},
        {"name": "feddst", "sparsity": 0.8, "readjust_interval": 1},
    ],
    ids=lambda algorithm: algorithm["name"],
)
def test_before_and_after_are_those_of_real_models_and_training_does_not_notice(tmp_path, cache, algorithm):
    options = {"rounds": 2, "cohort": 6, "algorithm": algorithm, "local": {"lr": 0.5}}
    plain = run_inline(tiny_federation(cache, **options), tmp_path / "plain")
    run = run_inline(tiny_federation(cache, evaluate_clients=ALL, **options), tmp_path / "judged")
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "judged")]
    assert files[0].read_bytes() == files[1].read_bytes()
    added = {"accuracy_gain"} | {
        f"accuracy_{what}{suffix}" for what in ("mean", "std", "worst_decile") for suffix in ("", "_after")
    }
    for line, other in zip(run.lines, plain.lines, strict=True):
        line = comparable(line)
        judged = {key: line.pop(key) for key in list(line) if key.startswith("clients/accuracy")}
        assert line == comparable(other)
        assert judged.keys() == {f"clients/{key}" for key in added}

    # Round 1's "after" is the model that each client sends in round 2, when all of them take part.
    federation, method = run.driver.federation, run.driver.method
    layout, before = federation.layout, run.states[-2].weights
    expected_after, expected_before = [], []
    served = predictions_of(federation, method.effective_weights(before, layout))
    for client in range(6):
        named, _ = run.uploads[2, client]
        values = torch.cat([named[entry.name].flatten() for entry in layout.trained + layout.buffers])
        if method.uploads_differences:
            values[: layout.trained_size] += before[: layout.trained_size]
        own = predictions_of(federation, method.effective_weights(values, layout))
        expected_after.append(judged_by_hand(federation, client, own))
        expected_before.append(judged_by_hand(federation, client, served))
    first = run.lines[0]
    assert first["clients/accuracy_mean"] == pytest.approx(np.mean(expected_before))
    assert first["clients/accuracy_mean_after"] == pytest.approx(np.mean(expected_after))
    assert first["clients/accuracy_std_after"] == pytest.approx(np.std(expected_after))
    assert first["clients/accuracy_worst_decile"] == pytest.approx(min(expected_before))
    gain = np.mean(expected_after) - np.mean(expected_before)
    assert first["clients/accuracy_gain"] == pytest.approx(gain)
    assert len(set(expected_after)) > 1  # clients do differ

    rows = rows_of(tmp_path / "judged")
    assert [int(row["client"]) for row in rows] == list(range(6))
    assert [int(row["samples"]) for row in rows] == federation.sizes.tolist()
    assert {row["round"] for row in rows} == {"2"}
    final = np.array([float(row["accuracy"]) for row in rows])
    assert run.lines[-1]["clients/accuracy_mean"] == pytest.approx(final.mean())


def test_a_subsample_stays_the_same_and_only_due_rounds_are_judged(tmp_path, cache):
    section = {"every": 2, "clients": 4, "after": 2}
    config = tiny_federation(cache, rounds=3, evaluate_every=3, evaluate_clients=section)
    run = run_inline(config, tmp_path / "run")
    judged = ["clients/accuracy_mean" in line for line in run.lines]
    assert judged == [False, True, True]  # every second round, and the last
    assert ["test/accuracy" in line for line in run.lines] == judged
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 4
    assert sum(row["accuracy_after"] != "" for row in rows) == 2
    again = ClientEvaluation(Federation.of(config))
    assert again._judged.tolist() == [int(row["client"]) for row in rows]
    chunks = again.chunks(2, last=False)
    assert [chunk.client for chunk in chunks] == [int(r["client"]) for r in rows if r["accuracy_after"]]
    assert again.chunks(1, last=False) == []


def test_an_interrupted_run_judges_alike(tmp_path, cache):
    config = tiny_federation(cache, rounds=4, checkpoint_every=2, evaluate_clients={"every": 1, "after": 3})
    whole = run_inline(config, tmp_path / "whole")
    folder, federation = RunFolder.create(tmp_path / "cut", config), Federation.of(config)

    class Killed(BaseException):
        pass

    def killed(line):
        if line["round"] == 3:
            raise Killed

    with pytest.raises(Killed):
        Driver(folder, federation, InlineEngine(federation.setup()), on_line=killed).run()
    Driver(folder, federation, InlineEngine(federation.setup())).run()
    assert [comparable(line) for line in folder.rounds()] == [comparable(line) for line in whole.lines]
    written = [(tmp_path / name / "clients.csv").read_bytes() for name in ("cut", "whole")]
    assert written[0] == written[1]


def test_a_class_without_test_images_does_not_count_and_a_tier_is_judged_at_its_budget(tmp_path, cache):
    tiers = {"weak": {"share": 0.5, "sparsity": 0.9}, "strong": {"share": 0.5, "sparsity": 0.5}}
    config = tiny_federation(
        cache,
        algorithm={"name": "topk", "sparsity": 0.5},
        devices={"tiers": tiers},
        evaluate_clients={"every": 1},
    )
    federation = Federation.of(config)
    evaluation = ClientEvaluation(federation)
    counts = np.bincount(federation.dataset.test.targets)
    # As if class 0 had no test image: every other class is always right on whole models, never on weak ones.
    evaluation.__dict__["_counts"] = np.where(np.arange(len(counts)) == 0, 0, counts)
    counts = np.append(evaluation._counts, 0)  # a model may have more logits than there are classes
    right, wrong = ({"samples": counts, "correct": counts * factor, "loss": 0.0} for factor in (1, 0))
    parts = {
        ("test", None, None, None): right,
        ("val", None, None, None): wrong,
        ("test", "weak", None, None): wrong,
        ("test", "strong", None, None): right,
    }
    folder = RunFolder.create(tmp_path / "run", config)
    metrics = evaluation.metrics(folder, 1, parts, last=False)
    assert sorted(float(row["accuracy"]) for row in rows_of(tmp_path / "run")) == [0, 0, 0, 1, 1, 1]
    assert metrics["clients/accuracy_mean"] == 0.5
    assert metrics["clients/accuracy_std"] == 0.5


def test_after_a_shift_clients_are_judged_on_what_they_hold_then(tmp_path, cache):
    shift = {"round": 2, "partition": {"seed": 99}}
    options = {"rounds": 2, "cohort": 6, "local": {"lr": 0.5}, "shift": shift}
    run = run_inline(tiny_federation(cache, evaluate_clients=ALL, **options), tmp_path / "run")
    federation = run.driver.federation
    rows = rows_of(tmp_path / "run")
    assert [int(row["samples"]) for row in rows] == federation.shifted[0].sizes.tolist()
    predictions = predictions_of(federation, run.states[-1].weights)
    object.__setattr__(federation, "partition", federation.shifted[0])  # what judged_by_hand looks at
    expected = [judged_by_hand(federation, client, predictions) for client in range(6)]
    assert [float(row["accuracy"]) for row in rows] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"every": 1, "clients": 7}, "evaluate_clients.clients: 7, but 6 clients train"),
        ({"every": 1, "clients": 2, "after": 3}, "evaluate_clients.after: 3, but only 2 clients are judged"),
        ({"after": 3}, "evaluate_clients.every: 0, so no client is judged"),
        ({"evry": 3}, r"evaluate_clients.evry: unknown key; .*did you mean evaluate_clients.every\?"),
    ],
)
def test_impossible_sections_say_why(cache, section, message):
    with pytest.raises(ConfigError, match=message):
        tiny_federation(cache, evaluate_clients=section)


def test_a_client_that_fails_in_its_evaluation_ends_the_run_or_stays_without_a_number(
    tmp_path, cache, monkeypatch
):
    visit = Trainer.visit

    def fail(self, client, rows, sparsity, broadcast, *rest, **more):
        if (broadcast.instructions.round, client) == (2, 3):  # which judges round 1
            raise ValueError("planted failure")
        return visit(self, client, rows, sparsity, broadcast, *rest, **more)

    monkeypatch.setattr(Trainer, "visit", fail)
    options = {"rounds": 1, "cohort": 6, "evaluate_clients": ALL}
    with pytest.raises(
        ClientError, match="client 3 failed in round 1, stage evaluation: ValueError: planted"
    ):
        run_inline(tiny_federation(cache, **options), tmp_path / "stopped")
    run = run_inline(tiny_federation(cache, on_client_error="skip", **options), tmp_path / "skipped")
    rows = rows_of(tmp_path / "skipped")
    assert [row["client"] for row in rows if not row["accuracy_after"]] == ["3"]
    after = [float(row["accuracy_after"]) for row in rows if row["accuracy_after"]]
    assert run.lines[0]["clients/accuracy_mean_after"] == pytest.approx(np.mean(after))
