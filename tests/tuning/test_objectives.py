"""A study of an objective where lower is better: direction, selection, curve, tables, a whole study."""

import optuna
import pytest

from cluster.configuration.trees import ConfigError
from cluster.records.run_folder import RunFolder
from tests.tuning.studies import finish, tiny_tree
from tuning.folder import StudyFolder
from tuning.protocol import MethodResult, Tried, select
from tuning.report import final_table, write_report
from tuning.storage import open_journal, open_study
from tuning.study import plan_of


def regression_plan(tmp_path, study, **overrides):
    """A study of the tiny federation with the number of a class as a quantity."""
    tree = tiny_tree(tmp_path, study, **overrides)
    tree["objective"] = {"name": "tests.example_objective:Regression"}
    tree["partition"] = {"name": "iid", "clients": 6, "seed": 5}
    return plan_of(tree, "tiny")


def tried(number, value, *, state="finished", sent=100):
    return Tried(number, state, {}, value, sent, 12.0, 3, 1.0, None)


@pytest.fixture
def plan(tmp_path):
    return regression_plan(tmp_path, {"methods": ["topk", "sparsyfed"], "trials": 3, "final_seeds": 3})


def test_the_lowest_error_is_selected(plan):
    trials = [tried(0, 2.0), tried(1, 0.5, sent=200), tried(2, 0.5), tried(3, 0.1, state="pruned")]
    assert plan.selects.key == "rmse"
    assert select(trials, plan.selects).number == 2
    result = MethodResult(plan.contenders["topk"], trials, {}, {})
    assert result.best.number == 2
    # A trial that sends less is a compromise though it errs more.
    more = [*trials, tried(4, 0.9, sent=20), tried(5, 0.95, sent=30)]
    assert [trial.number for trial in MethodResult(plan.contenders["topk"], more, {}, {}).front()] == [4, 2]


def test_the_curve_falls_and_a_failure_is_worth_the_worst(plan):
    # Of 3, 1 and a failure (worth 3), two at random are best by 1 in two of three draws and else 3.
    trials = [tried(0, 3.0), tried(1, 1.0), tried(2, None, state="failed")]
    _, best = MethodResult(plan.contenders["topk"], trials, {}, {}).curve
    assert best == pytest.approx([7 / 3, (1 + 1 + 3) / 3, 1.0])
    assert MethodResult(plan.contenders["topk"], trials[2:], {}, {}).curve == ([], [])


def test_the_storage_minimises(plan, tmp_path):
    StudyFolder(tmp_path / "study").path.mkdir()
    study = open_study(plan, "topk", open_journal(tmp_path / "study"), "owner")
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    both = regression_plan(tmp_path, {"methods": ["topk"], "objectives": ["rmse", "uplink_bytes"]})
    (tmp_path / "both").mkdir()
    study = open_study(both, "topk", open_journal(tmp_path / "both"), "owner")
    assert study.directions == [optuna.study.StudyDirection.MINIMIZE] * 2


def test_the_table_ranks_and_judges_by_the_error(plan):
    def result(label, finals):
        runs = {
            4 + turn: {"rmse": value, "sparsity": 0.9, "uplink_bytes": 2_000_000, "flops_sparse": 5e9}
            for turn, value in enumerate(finals)
        }
        return MethodResult(plan.contenders[label], [tried(0, 1.0)], runs, {})

    results = {"topk": result("topk", [5.0, 5.1, 5.2]), "sparsyfed": result("sparsyfed", [2.0, 2.3, 2.2])}
    table = final_table(plan, results)
    assert (table.name, table.title) == ("rmse", "Tuned test root mean squared error")
    assert [row[0] for row in table.rows] == ["sparsyfed", "topk"]
    assert table.rows[1][1:3] == ["5.1 ± 0.2484", "+2.933 ± 0.2868"]
    assert table.rows[1][4] == "worse"
    text = " ".join([*table.header, *table.notes])
    assert "accuracy" not in text
    assert "points" not in text


def test_objectives_are_those_of_what_is_learned(plan, tmp_path):
    assert plan.dump()["study"]["objectives"] == ["rmse"]
    with pytest.raises(ConfigError, match=r"study.objectives: \[rmse\] or \[rmse, uplink_bytes\], found"):
        regression_plan(tmp_path, {"methods": ["topk"], "objectives": ["accuracy"]})


def test_a_whole_study(cache, tmp_path):
    shared = {"local.lr": {"low": 0.001, "high": 0.1, "log": True}}
    study = {"methods": ["fedavg"], "trials": 4, "final_seeds": 2, "shared": shared}
    plan = regression_plan(cache, study, local={"lr": 0.01})
    results = finish(plan, tmp_path / "study")
    (result,) = results.values()
    folder = StudyFolder(tmp_path / "study")
    last = {
        trial.number: RunFolder(folder.trial("fedavg", trial.number)).rounds()[-1]["val/rmse"]
        for trial in result.tried
    }
    assert {trial.number: trial.value for trial in result.tried} == last
    assert len(set(last.values())) == 4
    assert result.best.number == min(last, key=lambda number: last[number])
    for seed, summary in result.finals.items():
        run = RunFolder(folder.final("fedavg", result.best.number, seed))
        assert summary["rmse"] == run.rounds()[-1]["test/rmse"]
    written = write_report(plan, folder, results)
    assert {"rmse.png", "history.png", "budget.png", "rmse.md"} <= {path.name for path in written}
    assert "accuracy" not in (folder.report / "report.md").read_text()
