"""What ends a run early, and what a user's own callbacks are told of it."""

import copy
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import cluster
from cluster.compare.groups import group_runs
from cluster.compare.reading import read_folder
from cluster.configuration.trees import ConfigError
from cluster.measures import Measure
from cluster.rounds.callbacks import CallbackError
from cluster.rounds.stopping import StopRule
from cluster.rounds.synchronous import Synchronous
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

ACCURACY = Measure("test/accuracy", "accuracy", "share", "", "higher")
LOSS = Measure("test/loss", "loss", "", "", "lower")
BYTES = Measure("comm/uplink_bytes_total", "bytes", "bytes", "", "lower")


def lines_of(key, *values):
    return {number: {key: value} for number, value in enumerate(values, 1)}


def ends_after(rule, key, *values):
    """The round after which a run with these values ends; None where it does not."""
    lines = lines_of(key, *values)
    ends = (n for n in lines if rule.reason({at: lines[at] for at in lines if at <= n}))
    return next(ends, None)


@pytest.mark.parametrize(
    ("measure", "target", "values", "ends"),
    [
        (ACCURACY, 0.5, (0.4, 0.5, 0.6), 2),  # reached is enough
        (ACCURACY, 0.5, (0.4, None, 0.3), None),
        (LOSS, 1.0, (1.5, None, 0.9), 3),  # lower is better
        (LOSS, 1.0, (1.5, 1.1, 1.2), None),
        (BYTES, 100.0, (40, 80, 120), 3),  # a budget is spent, though less is better
    ],
)
def test_a_target_and_a_budget_by_hand(measure, target, values, ends):
    assert ends_after(StopRule(measure, target, None, 0), measure.key, *values) == ends


@pytest.mark.parametrize(
    ("measure", "values", "ends"),
    [
        (ACCURACY, (0.3, 0.5, 0.5, 0.4), 4),  # an equal value is no new best
        (ACCURACY, (0.3, 0.5, None, 0.4, None, 0.6, 0.1), None),  # rounds that are not measured do not count
        (LOSS, (2.0, 1.0, 1.1, 1.2), 4),
    ],
)
def test_a_plateau_by_hand(measure, values, ends):
    assert ends_after(StopRule(measure, None, 2, 0), measure.key, *values) == ends


def test_no_round_before_after_ends_a_run():
    rule = StopRule(ACCURACY, 0.5, None, 3)
    assert ends_after(rule, ACCURACY.key, 0.9, 0.9, 0.9) == 3
    assert ends_after(rule, ACCURACY.key, 0.9, 0.9, 0.1) is None


def stopping(cache, **stop):
    return tiny_federation(
        cache, rounds=8, evaluate_every=2, checkpoint_every=1, evaluate_clients={"every": 8}, stop=stop
    )


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The run without a rule, and a target that its round 4 is the first to reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.records.outputs.picture", lambda *_, **__: None)
        result = cluster.run(stopping(cache), tmp_path_factory.mktemp("whole") / "run")
    values = {n: line["test/loss"] for n, line in result.rounds.iterrows() if line["test/loss"] is not None}
    assert values[4] < values[2]
    return result, {"metric": "test/loss", "target": values[4]}


def test_a_run_ends_in_the_round_that_reaches_the_target(cache, tmp_path, whole):
    longer, rule = whole
    result = cluster.run(stopping(cache, **rule), tmp_path / "run")
    assert result.summary["rounds"] == 4
    assert result.summary["complete"]
    assert result.ended
    assert result.summary["stopped_by"] == f"test/loss {rule['target']:.6g} <= {rule['target']:g} in round 4"
    kept = [key for key in longer.rounds.columns if not key.startswith(("time/", "timestamp", "clients/"))]
    assert result.rounds[kept].astype(str).equals(longer.rounds.loc[:4, kept].astype(str))
    assert (tmp_path / "run" / "clients.csv").is_file()  # the last round judges clients, whichever it is


def test_stopped_and_resumed_after_every_round_it_ends_in_the_same(cache, tmp_path, whole):
    config = stopping(cache, **whole[1])
    at_once = cluster.run(config, tmp_path / "whole")
    cluster.run(stopping(cache, **whole[1]).model_copy(update={"stop_after": 1}), tmp_path / "run")
    for last in (2, 3, 4, 5, 6):
        result = cluster.resume(tmp_path / "run", [f"stop_after={last}"])
        assert result.summary["rounds"] == min(last, 4)
    assert result.summary["stopped_by"] == at_once.summary["stopped_by"]
    found, expected = (path / "model.safetensors" for path in (tmp_path / "run", tmp_path / "whole"))
    assert found.read_bytes() == expected.read_bytes()


def test_killed_before_the_round_that_ends_it_is_judged_it_ends_there_all_the_same(
    cache, tmp_path, whole, monkeypatch
):
    evaluate, judged = Synchronous.evaluate, []

    def dying(self, state, chunks, between):
        judged.append(state.round)
        if state.round == 4 and judged.count(4) == 1:  # round 4's checkpoint is written, its line is not
            raise KeyboardInterrupt
        return evaluate(self, state, chunks, between)

    monkeypatch.setattr(Synchronous, "evaluate", dying)
    with pytest.raises(KeyboardInterrupt):
        cluster.run(stopping(cache, **whole[1]), tmp_path / "run")
    assert cluster.resume(tmp_path / "run").summary["rounds"] == 4


def test_it_goes_on_where_the_rule_is_taken_away(cache, tmp_path, whole):
    cluster.run(stopping(cache, **whole[1]), tmp_path / "run")
    result = cluster.resume(tmp_path / "run", ["stop.target=null", "stop.metric=null"])
    assert (result.summary["rounds"], result.summary["stopped_by"]) == (8, None)
    expected = whole[0].folder / "model.safetensors"
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == expected.read_bytes()


def test_a_comparison_takes_the_end_that_a_rule_set(cache, tmp_path, whole):
    result = cluster.run(stopping(cache, **whole[1]), tmp_path / "run")
    found = group_runs([read_folder(result.folder), read_folder(whole[0].folder)])
    assert len(found.groups) == 2
    assert not found.left_out


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ({"metric": "test/acuracy", "target": 0.5}, "did you mean test/accuracy"),
        ({"metric": "sparsity/layers", "target": 0.5}, "no number of a round"),
        ({"target": 0.5, "patience": 3}, "leave one of them out"),
        ({"metric": "test/loss"}, "stop.metric: ends nothing without stop.target or stop.patience"),
        ({"metric": "train/lr", "patience": 2}, "neither more nor less of train/lr is better"),
        ({"metric": "val/accuracy", "target": 0.5}, "set data.validation"),
        ({"metric": "test/robust_accuracy", "target": 0.5}, "not measured; set evaluate_attack.every"),
        ({"metric": "clients/accuracy_gain", "target": 0.5}, "not measured; set evaluate_clients.after"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(cache, stop, message):
    with pytest.raises(ConfigError, match=message):
        stopping(cache, **stop)


# ------------------------------------------------------------------------------------------- callbacks


class Listener:
    """Writes down what it is told, and spoils what it is given."""

    told: ClassVar[list] = []
    ended: ClassVar[list] = []

    def on_round(self, line, state):
        self.told.append((copy.deepcopy(dict(line)), state.round, state.weights.clone()))
        state.weights.zero_()
        line["sparsity/layers"].clear()

    def on_end(self, result):
        self.ended.append(dict(result))


class Failing:
    def on_round(self, line, state):
        if line["round"] == 2:
            raise KeyError("disk")


def test_callbacks_are_told_every_line_with_its_state_and_change_nothing(cache, tmp_path):
    Listener.told.clear()
    Listener.ended.clear()
    name = f"{__name__}:Listener"
    plain = cluster.run(tiny_federation(cache, rounds=3, evaluate_every=2), tmp_path / "plain")
    config = tiny_federation(cache, rounds=3, evaluate_every=2, callbacks=[name])
    result = cluster.run(config, tmp_path / "run")
    assert config.digest() == tiny_federation(cache, rounds=3, evaluate_every=2).digest()
    stored = [json.loads(text) for text in Path(result.folder / "rounds.jsonl").read_text().splitlines()]
    assert [line for line, _, _ in Listener.told] == stored
    assert [number for _, number, _ in Listener.told] == [1, 2, 3]
    assert len({weights.numpy().tobytes() for *_, weights in Listener.told}) == 3
    for name, tensor in plain.model().state_dict().items():
        assert torch.equal(tensor, result.model().state_dict()[name])
    assert [ended["rounds"] for ended in Listener.ended] == [3]


def test_an_exception_in_a_callback_names_it_and_the_round(cache, tmp_path):
    config = tiny_federation(cache, rounds=3, callbacks=[f"{__name__}:Failing"])
    with pytest.raises(KeyError, match="disk") as raised:
        cluster.run(config, tmp_path / "run")
    assert f"callbacks.0 = {__name__}:Failing, round 2" in raised.value.__notes__[0]
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", [f"{__name__}:nobody", f"{__name__}:lines_of", "no.such.module:Thing"])
def test_what_is_no_callback_is_refused_before_anything_starts(cache, tmp_path, name):
    with pytest.raises(CallbackError, match=r"callbacks\.0"):
        cluster.run(tiny_federation(cache, callbacks=[name]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
