"""The model under attack: the same rows and starts every time, whoever computes; training does not notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cluster
from algorithms.core.attacks import Fgsm
from cluster import seeding
from cluster.configuration.attacks import weak_attack
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder, comparable
from cluster.references import DataError
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

KEYS = {
    "robust_gap",
    *(f"{split}/robust_{key}" for split in ("test", "train") for key in ("accuracy", "loss")),
}
PGD = {"name": "pgd", "epsilon": 0.05, "steps": 2}


def under_attack(lines):
    return [{key: value for key, value in line.items() if "robust" in key} for line in lines]


def robust_by_hand(federation, weights, split, rows, start, *, epsilon, step, steps):
    """Accuracy and loss of some rows; the attack's random start is drawn for them in their order."""
    place = ["test", "val", "train"].index(split) + 1
    draws = torch.Generator().manual_seed(seeding.integer(federation.config.seed, "robustness", place, start))
    whole = federation.dataset.train if split == "train" else federation.dataset.test
    pixels = torch.tensor(whole.inputs[rows]).float() / 255
    labels, model = torch.tensor(whole.targets[rows]), federation.model.eval()
    federation.layout.bind(model, weights.clone())
    begin = torch.cat([torch.rand(part.shape, generator=draws) for part in pixels.split(64)])
    found = (pixels + epsilon * (2 * begin - 1)).clip(0, 1)
    for _ in range(steps):
        leaf = found.clone().requires_grad_()
        F.cross_entropy(model((leaf - 0.5) / 0.5), labels).backward()
        found = found + step * leaf.grad.sign()
        found = torch.maximum(torch.minimum(found, pixels + epsilon), pixels - epsilon).clip(0, 1)
    with torch.no_grad():
        logits = model((found - 0.5) / 0.5)
    return (logits.argmax(1) == labels).double().mean().item(), F.cross_entropy(logits, labels).item()


def test_equals_an_evaluation_by_hand_and_training_does_not_notice(cache, tmp_path):
    section = {"every": 2, "epsilon": 0.05, "step": 0.02, "steps": 4, "rows": 80}
    plain = run_inline(tiny_federation(cache, rounds=3), tmp_path / "plain")
    run = run_inline(tiny_federation(cache, rounds=3, evaluate_attack=section), tmp_path / "run")
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    measured = under_attack(run.lines)
    assert [line.keys() for line in measured] == [set(), KEYS, KEYS]  # every second round, and the last
    for line, other in zip(run.lines, plain.lines, strict=True):
        assert {k: v for k, v in comparable(line).items() if "robust" not in k} == comparable(other)

    federation = run.driver.federation
    rows = federation.attacked_rows
    assert rows["test"].tolist() == list(range(60))
    assert len(rows["train"]) == 80
    assert set(rows["train"]) <= {int(r) for c in range(6) for r in federation.partition.client(c)}
    attack = {"epsilon": 0.05, "step": 0.02, "steps": 4}
    for line, state in zip(measured[1:], run.states[2:], strict=True):
        for split, own in rows.items():
            accuracy, loss = robust_by_hand(federation, state.weights, split, own, 0, **attack)
            assert line[f"{split}/robust_accuracy"] == pytest.approx(accuracy)
            assert line[f"{split}/robust_loss"] == pytest.approx(loss, rel=1e-4)
        gap = line["train/robust_accuracy"] - line["test/robust_accuracy"]
        assert line["robust_gap"] == pytest.approx(gap)
    assert run.lines[-1]["test/robust_loss"] > run.lines[-1]["test/loss"]


def test_without_a_radius_it_is_the_plain_evaluation(cache, tmp_path):
    section = {"every": 1, "epsilon": 0.0}
    run = run_inline(tiny_federation(cache, rounds=1, evaluate_attack=section), tmp_path / "run")
    (line,) = run.lines
    assert line["test/robust_accuracy"] == line["test/accuracy"]
    assert line["test/robust_loss"] == pytest.approx(line["test/loss"])


def test_restarts_only_make_it_worse(cache, tmp_path):
    found = {}
    for restarts in (1, 4):
        section = {"every": 1, "epsilon": 0.04, "step": 0.01, "steps": 1, "restarts": restarts}
        config = tiny_federation(cache, rounds=1, evaluate_attack=section)
        (line,) = run_inline(config, tmp_path / str(restarts)).lines
        found[restarts] = line["test/robust_loss"]
    assert found[4] > found[1]


def test_test_data_that_is_not_to_be_read_is_not_attacked(cache, tmp_path):
    config = tiny_federation(
        cache,
        rounds=1,
        data={"validation": 0.2},
        evaluate_on="validation",
        evaluate_attack={"every": 1, **PGD},
    )
    run = run_inline(config, tmp_path / "run")
    (line,) = under_attack(run.lines)
    assert line.keys() == {key.replace("test", "val") for key in KEYS}
    assert not set(run.driver.federation.attacked_rows["train"]) & set(run.driver.federation.validation)
    assert line["robust_gap"] == pytest.approx(line["train/robust_accuracy"] - line["val/robust_accuracy"])


def test_an_interrupted_run_attacks_as_one_that_was_not(cache, tmp_path):
    config = tiny_federation(cache, rounds=4, checkpoint_every=2, attack=PGD, evaluate_attack={"every": 1})
    whole = run_inline(config, tmp_path / "whole")
    run_inline(config.model_copy(update={"stop_after": 2}), tmp_path / "half")
    federation = Federation.of(config)
    resumed = Driver(RunFolder.open(tmp_path / "half"), federation, InlineEngine(federation.setup()))
    resumed.run()
    assert np.array_equal(resumed.state.weights.numpy(), whole.state.weights.numpy())
    lines = resumed.folder.rounds()
    assert [comparable(line) for line in lines] == [comparable(line) for line in whole.lines]
    assert all("robust_gap" in line for line in lines)


def test_a_run_that_watches_for_its_end_is_attacked_in_the_same_rounds(cache, tmp_path):
    def lines(name, **stop):
        config = tiny_federation(cache, rounds=3, evaluate_attack={"every": 1, **PGD}, stop=stop)
        return under_attack(run_inline(config, tmp_path / name).lines)

    watched = lines("watched", metric="test/robust_accuracy", target=1.0)
    assert watched == lines("plain")
    assert all(line.keys() == KEYS for line in watched)


def test_actors_give_the_bits_of_inline(cache, tmp_path, start_ray):
    start_ray(3)  # two actors and room for the driver
    tree = tiny_federation(
        cache,
        rounds=2,
        algorithm={"name": "fixed_mask", "sparsity": 0.5},
        attack=PGD,
        evaluate_attack={"every": 1, "restarts": 2, "rows": 50},
    ).dump()
    results = []
    for name, more in {"inline": {}, "ray": {"execution": "ray", "actors": 2}}.items():
        cluster.run(resolve({**tree, **more}), tmp_path / name)
        lines = [comparable(line) for line in RunFolder(tmp_path / name).rounds()]
        results.append(((tmp_path / name / "model.safetensors").read_bytes(), lines))
    assert results[0] == results[1]
    assert results[0][1][0].keys() >= KEYS


# ------------------------------------------------------------------------------------------ configuration


def test_it_is_evaluated_in_the_ball_of_training_unless_told_otherwise():
    def built(*overrides):
        return resolve("quickstart", ["evaluate_attack.every=1", *overrides]).build_evaluation_attack()

    assert built() == built("attack.name=pgd") == built("evaluate_attack.name=pgd")
    assert (built().steps, built().epsilon) == (20, 8 / 255)
    training = ["attack.name=fgsm", "attack.epsilon=0.1", "attack.norm=l2", "attack.random_start=false"]
    found = built(*training)
    assert (found.epsilon, found.norm, found.random_start, found.length) == (0.1, "l2", True, 0.025)
    assert built(*training, "evaluate_attack.epsilon=0.2", "evaluate_attack.norm=linf").epsilon == 0.2
    assert type(built("evaluate_attack.name=fgsm")) is Fgsm
    stored = resolve("quickstart", training).dump()
    assert stored["evaluate_attack"]["epsilon"] == 0.1  # a folder says what it was evaluated with


def test_off_it_is_no_part_of_an_experiment():
    assert resolve("quickstart", ["attack.name=none"]).digest() == resolve("quickstart").digest()
    others = ["attack.name=pgd", "attack.name=fgsm", "evaluate_attack.every=1"]
    digests = {resolve("quickstart", [other]).digest() for other in others}
    assert len(digests | {resolve("quickstart").digest()}) == 4


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["attack.name=pdg"], "attack.name: 'pdg' is unknown; allowed are none, fgsm, pgd, .* mean pgd?"),
        (["attack.epsilon=0.1"], "attack.epsilon: none has no such field; .*epsilon belongs to fgsm, pgd"),
        (["attack.name=fgsm", "attack.steps=3"], "attack.steps: fgsm has no such field; .* belongs to pgd"),
        (["attack.name=pgd", "attack.steps=-1"], "attack.steps: -1 is out of range; allowed: 0 to 1000"),
        (["attack.name=pgd", "attack.epsilon=-1.0"], "attack.epsilon: -1.0 is out of range"),
        (["attack.name=pgd", "attack.norm=l1"], "attack.norm: 'l1' is none of linf, l2"),
        (["evaluate_attack.restarts=0", "evaluate_attack.every=1"], "evaluate_attack.restarts: "),
        (["evaluate_attack.steps=50"], "evaluate_attack.steps: 50, but evaluate_attack.every is 0"),
        (["evaluate_attack.rows=50"], "evaluate_attack.rows: 50, but evaluate_attack.every is 0"),
        (
            ["evaluate_attack={every: 1, restarts: 3, random_start: false}"],
            "evaluate_attack.restarts: 3 attacks without a random start are one",
        ),
    ],
)
def test_what_cannot_be_is_one_line(overrides, says):
    first, _, last = says.partition(".*")
    with pytest.raises(ConfigError) as refused:
        resolve("quickstart", overrides)
    (line,) = str(refused.value).splitlines()
    assert first in line
    assert last in line


@pytest.mark.parametrize("section", ["attack", "evaluate_attack"])
def test_an_epsilon_in_steps_of_255_is_refused_and_so_are_tokens(section):
    options = [f"{section}.name=pgd", "evaluate_attack.every=1"]
    with pytest.raises(DataError, match=rf"{section}.epsilon: 8, but .* 8 of 255 steps are 0.0314"):
        Federation.of(resolve("quickstart", [*options, f"{section}.epsilon=8.0"]))
    Federation.of(resolve("quickstart", [*options, f"{section}.epsilon=8.0", f"{section}.norm=l2"]))
    text = ["objective.name=language_model", "data.name=tiny_text", "partition.name=iid", "data.length=16"]
    text += ["model.name=transformer", "partition.clients=6", "cohort=3"]
    with pytest.raises(DataError, match=r"attack.name: pgd .* inputs of data.name = 'tiny_text' are codes"):
        Federation.of(resolve("quickstart", [*text, *options]))


def test_an_evaluation_that_cannot_reach_its_ball_is_warned_of(cache, tmp_path, caplog):
    def config(**section):
        return tiny_federation(cache, rounds=1, evaluate_attack={"every": 1, "epsilon": 0.3, **section})

    assert weak_attack(config()) is None
    assert weak_attack(config(step=0.01, steps=30)) is None  # 40 x .01 for .3 is usual
    assert weak_attack(tiny_federation(cache)) is None
    cluster.run(config(step=0.01, steps=3), tmp_path / "run")
    assert "evaluate_attack: its steps lead 0.03 far at most, and epsilon is 0.3" in caplog.text


def test_tables_are_attacked_in_their_own_units(cache, tmp_path):
    data = {"name": "breast_cancer", "cache": str(cache / "data")}
    config = tiny_federation(
        cache, data=data, model={"name": "linear"}, attack={"name": "pgd", "epsilon": 0.5},
        evaluate_attack={"every": 2}, partition={"clients": 6}, rounds=2,
    )  # fmt: skip
    (_, line) = run_inline(config, tmp_path / "run").lines
    assert line["test/robust_accuracy"] < line["test/accuracy"]


@pytest.mark.usefixtures("no_pictures")
def test_a_regression_is_attacked_by_its_own_loss(cache, tmp_path):
    config = tiny_federation(
        cache, data={"name": "diabetes", "cache": str(cache / "data")}, objective={"name": "regression"},
        model={"name": "linear"}, local={"lr": 0.01}, partition={"name": "iid", "clients": 6, "seed": 5},
        evaluate_attack={"every": 2, "epsilon": 0.5, "restarts": 2},
    )  # fmt: skip
    (_, line) = run_inline(config, tmp_path / "run").lines
    assert line["test/robust_rmse"] > line["test/rmse"]
    assert line["robust_gap"] == pytest.approx(line["test/robust_rmse"] - line["train/robust_rmse"])
