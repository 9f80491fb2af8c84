"""One method's search on real storages: what is asked, across restarts too, and when the budget is spent."""

import json

import optuna
import pytest
from optuna.trial import TrialState

from cluster.records.run_folder import BusyError
from cluster.references import UserError
from tests.tuning.studies import tiny_plan
from tuning.search import Cost, Search, cost_of
from tuning.storage import heal_journal, open_database, open_journal, open_study

optuna.logging.set_verbosity(optuna.logging.WARNING)

WHOLE = Cost(client_rounds=12, rounds=3, uplink_bytes=100, seconds=1.0)


def search_of(plan, storage, label="zerofl"):
    return Search(plan, plan.contenders[label], storage, "mark")


def accuracy(values):
    """What a made-up experiment gives: best at mask_ratio .1."""
    return 0.9 - abs(values["algorithm.mask_ratio"] - 0.1)


def storages(kind, folder):
    """A function that opens the storage as a new process would."""
    if kind == "journal":
        return lambda: open_journal(folder)
    return lambda: open_database(f"sqlite:///{folder}/study.db")


@pytest.fixture(params=["journal", "sqlite"])
def opened(request, tmp_path):
    return storages(request.param, tmp_path)


def asked(plan, opened, restart_after=()):
    """All configurations of a search with one trial at a time, the storage reopened after some."""
    search, seen = search_of(plan, opened()), []
    while search.wants_another():
        trial = search.ask()
        seen.append(dict(trial.params))
        search.tell_finished(trial, accuracy(trial.params), WHOLE)
        if len(seen) in restart_after:
            search = search_of(plan, opened())
    return seen


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_the_same_suggestions_across_a_restart(sampler, tmp_path):
    section = {"methods": ["zerofl"], "trials": 6, "sampler": {"name": sampler, "startup_trials": 3}}
    plan = tiny_plan(tmp_path, section)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = asked(plan, storages("journal", tmp_path / "a"))
    assert len(whole) == 6
    assert whole[0] == {"algorithm.mask_ratio": 0.2, "algorithm.upload": "top_k_weights"}
    assert len({json.dumps(values) for values in whole}) == 6  # the start is not repeated
    assert asked(plan, storages("sqlite", tmp_path / "b"), restart_after=(1, 4)) == whole
    search = search_of(tiny_plan(tmp_path, {**section, "seed": 1, "name": "other"}), open_journal(tmp_path))
    search.ask()
    assert search.ask().params != whole[1]


def test_a_coordinator_killed_in_mid_ask_suggests_the_same(opened, tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"], "trials": 3})
    search = search_of(plan, opened())
    search.tell_finished(search.ask(), 0.5, WHOLE)
    study = open_study(plan, "zerofl", opened(), "mark")
    study.ask()  # begun, without values
    (left,) = search_of(plan, opened()).interrupted()
    assert left.number == 1
    assert left.params.keys() == {"algorithm.mask_ratio", "algorithm.upload"}
    search = search_of(plan, opened())
    (again,) = search.interrupted()
    assert again.params == left.params
    search.tell_finished(again, 0.6, WHOLE)
    assert search.ask().number == 2
    assert not search.wants_another()


def test_a_method_without_hyperparameters_gets_one_configuration(opened, tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["topk"], "trials": 5})
    search = search_of(plan, opened(), "topk")
    trial = search.ask()
    assert trial.params == {}
    assert not search.wants_another()


def test_failed_trials_are_counted_with_their_reason(opened, tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"], "trials": 2})
    search = search_of(plan, opened())
    search.tell_failed(search.ask(), "every update was refused", Cost(8, 2, 50, 1.0))
    (told,) = search_of(plan, opened()).trials()
    assert told.state == TrialState.FAIL
    assert told.user_attrs["reason"] == "every update was refused"
    assert cost_of(told).client_rounds == 8


def test_with_a_pruner_the_budget_is_counted_in_client_rounds(opened, tmp_path):
    # 4 trials of 3 rounds of 4 clients are 48 client-rounds. Pruned after one round, a trial spends 8 with
    # the round that was already being computed; the next begins while a whole one, 12, is left.
    pruner = {"name": "successive_halving", "reduction_factor": 2}
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"], "trials": 4, "pruner": pruner})
    search = search_of(plan, opened())
    spent = []
    while search.wants_another():
        trial = search.ask()
        if search.report(trial, 1, 0.5 - 0.1 * len(spent)):
            search.tell_pruned(trial, Cost(8, 2, 60, 1.0))
            spent.append(8)
        else:
            search.tell_finished(trial, 0.5, WHOLE)
            spent.append(12)
    assert 8 in spent
    assert len(spent) > 4
    assert 48 - 12 < sum(spent) <= 48
    states = [trial.state for trial in search.trials()]
    assert states.count(TrialState.PRUNED) == spent.count(8)


def test_a_running_trial_holds_its_whole_share_of_the_budget(opened, tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"], "trials": 2, "pruner": {"name": "hyperband"}})
    search = search_of(plan, opened())
    search.ask()
    search.ask()
    assert not search.wants_another()


def test_the_decision_to_prune_outlives_the_coordinator(opened, tmp_path):
    pruner = {"name": "successive_halving", "reduction_factor": 2}
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"], "trials": 4, "pruner": pruner})
    search = search_of(plan, opened())
    search.report(search.ask(), 1, 0.9)
    worse = search.ask()
    assert search.report(worse, 1, 0.1)
    search = search_of(plan, opened())
    _, left = search.interrupted()
    assert search.pruned_at(left) == 1
    assert search.report(left, 2, 0.99)  # whatever comes now
    search.tell_pruned(left, Cost(8, 2, 60, 1.0))
    assert search.trials()[1].value == 0.1


def test_two_objectives_have_two_directions(opened, tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"], "objectives": ["accuracy", "uplink_bytes"]})
    search = search_of(plan, opened())
    trial = search.ask()
    assert not search.report(trial, 1, 0.5)
    search.tell_finished(trial, 0.5, WHOLE)
    study = open_study(plan, "zerofl", opened(), "mark")
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.trials[0].values == [0.5, 100.0]


def test_importance_needs_several_configurations(tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"], "trials": 8, "sampler": {"name": "random"}})
    search = search_of(plan, open_journal(tmp_path))
    assert search.importance() == {}
    while search.wants_another():
        trial = search.ask()
        search.tell_finished(trial, accuracy(trial.params), WHOLE)
    importance = search.importance()
    assert importance["algorithm.mask_ratio"] > 0.7 > 0.3 > importance["algorithm.upload"]
    assert sum(importance.values()) == pytest.approx(1.0)


def test_a_study_of_another_folder_is_refused(opened, tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"]})
    open_study(plan, "zerofl", opened(), "mark")
    with pytest.raises(BusyError, match="set study"):
        open_study(plan, "zerofl", opened(), "another mark")


def test_a_torn_line_of_the_journal_is_cut_off(tmp_path):
    plan = tiny_plan(tmp_path, {"methods": ["zerofl"]})
    search_of(plan, open_journal(tmp_path)).ask()
    with open(tmp_path / "study.journal", "a") as file:
        file.write('{"op_code": 4, "worker')
    heal_journal(tmp_path)
    search = search_of(plan, open_journal(tmp_path))
    assert len(search.interrupted()) == 1
    search.ask()
    assert len(search_of(plan, open_journal(tmp_path)).trials()) == 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:secret@host/db", "study.storage: no password belongs into an address"),
        ("postgresql://me:${PASSWORD}@host/db", "is not installed"),
        ("mysql://me@host/db", "is not installed"),
        ("nonsense://x", "cannot be opened"),
        ("sqlite:////no/such/folder/x.db", "cannot be opened"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(url, message, monkeypatch):
    monkeypatch.setenv("PASSWORD", "secret")
    with pytest.raises(UserError, match=message) as raised:
        open_database(url)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)
