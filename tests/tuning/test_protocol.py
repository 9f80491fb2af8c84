"""Selection, budgets, curves and tables, from trials made up and worked out by hand."""

import csv

import pytest

from cluster.workload.objectives import Classification
from tests.tuning.studies import tiny_plan
from tuning.folder import StudyFolder
from tuning.protocol import MethodResult, Tried, differences, on_test, select
from tuning.report import Table, budget_table, final_table, optimum_table, write_report

ACCURACY = Classification().selects


def tried(number, value, *, state="finished", sent=100, spent=12, values=None, reason=None):
    return Tried(number, state, values or {}, value, sent, spent, 3, 1.0, reason)


def result_of(plan, label, trials, finals=(), importance=None):
    """A method's result; ``finals`` are its test on_test on seeds 4, 5, ..."""
    runs = {
        4 + turn: {"accuracy": accuracy, "sparsity": 0.9, "uplink_bytes": 2_000_000, "flops_sparse": 5e9}
        for turn, accuracy in enumerate(finals)
    }
    return MethodResult(plan.contenders[label], trials, runs, importance or {})


@pytest.fixture
def plan(tmp_path):
    return tiny_plan(tmp_path, {"methods": ["topk", "sparsyfed"], "trials": 3, "final_seeds": 3})


def test_the_most_accurate_finished_trial_is_selected():
    trials = [
        tried(0, 0.5),
        tried(1, 0.7, sent=200),
        tried(2, 0.7, sent=100),
        tried(3, 0.7, sent=100),
        tried(4, 0.9, state="pruned"),
        tried(5, None, state="failed"),
    ]
    assert select(trials, ACCURACY).number == 2  # of equals the one that sent least, then the earlier one
    assert select(trials[4:], ACCURACY) is None


def test_the_curve_of_a_budget(plan):
    # Of .2, .6 and a failure (worth 0), two at random are best by .6 in two of three draws and else .2.
    trials = [tried(0, 0.2), tried(1, 0.6, spent=12), tried(2, None, state="failed", spent=6)]
    cost, best = result_of(plan, "sparsyfed", [*trials, tried(3, None, state="running", spent=0)]).curve
    assert cost == pytest.approx([10, 20, 30])
    assert best == pytest.approx([0.8 / 3, (0.6 + 0.6 + 0.2) / 3, 0.6])


def test_the_front_of_two_objectives(plan):
    trials = [
        tried(0, 0.5, sent=100),
        tried(1, 0.4, sent=50),
        tried(2, 0.45, sent=60),
        tried(3, 0.45, sent=70),  # beaten by 2
        tried(4, 0.6, sent=300),
        tried(5, 0.9, sent=1, state="pruned"),
    ]
    assert [trial.number for trial in result_of(plan, "sparsyfed", trials).front()] == [1, 2, 0, 4]


def test_bytes_that_differ_by_a_few_are_no_compromise(plan):
    trials = [
        tried(0, 0.9, sent=10_000),
        tried(1, 0.1, sent=9_990),  # 0.1 % saved for most of the accuracy
        tried(2, 0.8, sent=9_800),  # 2 % saved, not more
        tried(3, 0.7, sent=9_799),
        tried(4, 0.6, sent=9_700),  # 3 % less than 0, but only 1 % less than 3
    ]
    assert [trial.number for trial in result_of(plan, "sparsyfed", trials).front()] == [3, 0]


def test_methods_are_compared_on_the_seeds_that_all_have(plan):
    trials = [tried(0, 0.5)]
    results = {
        "topk": result_of(plan, "topk", trials, [0.5, 0.6]),
        "sparsyfed": result_of(plan, "sparsyfed", trials, [0.7, 0.8, 0.9]),
    }
    assert on_test(plan, results) == {"topk": [0.5, 0.6], "sparsyfed": [0.7, 0.8]}
    found = differences(plan, on_test(plan, results))["topk"]
    assert found.interval.mean == pytest.approx(-0.2)


def test_the_table_says_plainly_what_cannot_be_told_apart(plan):
    trials = [tried(0, 0.5)]
    results = {
        "topk": result_of(plan, "topk", trials, [0.69, 0.82, 0.89]),
        "sparsyfed": result_of(plan, "sparsyfed", trials, [0.7, 0.8, 0.9]),
    }
    table = final_table(plan, results)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert list(rows) == ["topk", "sparsyfed"] or list(rows) == ["sparsyfed", "topk"]
    # t_2(.975) = 4.3027, s = .1: half width .2484.
    assert rows["sparsyfed"]["test %"] == "80.0 ± 24.8"
    assert rows["sparsyfed"]["verdict"] == "reference"
    assert rows["topk"]["verdict"] == "not distinguishable"
    results["topk"] = result_of(plan, "topk", trials, [0.5, 0.601, 0.699])
    assert final_table(plan, results).rows[1][4] == "worse"
    one = {label: result_of(plan, label, trials, [0.5]) for label in results}
    assert final_table(plan, one).rows[0][4:5] + final_table(plan, one).rows[1][4:5] == [
        "one seed: no test",
        "reference",
    ]


def test_a_shown_interval_holds_0_exactly_where_nothing_is_told(plan):
    # Two methods, three seeds: half the interval is 4.3027 s / sqrt 3, in points.
    trials, base = [tried(0, 0.5)], [0.7, 0.8, 0.9]
    for shifts, shown in (
        ([0.002, 0.006, 0.010], "+0.6 ± 1.0"),
        ([0.0096, 0.0098, 0.0100], "+1.0 ± 0.0"),
        ([0.0020, 0.0006, 0.0034], "+0.2 ± 0.3"),
        ([0.0003, 0.0004, 0.0005], "+0.04 ± 0.02"),  # +0.0 ± 0.0 would hold 0
    ):
        finals = [own + shift for own, shift in zip(base, shifts, strict=True)]
        results = {
            "topk": result_of(plan, "topk", trials, finals),
            "sparsyfed": result_of(plan, "sparsyfed", trials, base),
        }
        row = next(row for row in final_table(plan, results).rows if row[0] == "topk")
        assert row[2] == shown
        mean, half = map(float, shown.split(" ± "))
        assert row[4] == ("better" if mean > half else "not distinguishable")


def test_the_budget_counts_every_end_and_what_is_unused(plan):
    ends = [
        tried(0, 0.5),
        tried(1, 0.2, state="pruned", spent=8),
        tried(2, None, state="failed", reason="bad"),
    ]
    results = {
        "topk": result_of(plan, "topk", [tried(0, 0.5)]),
        "sparsyfed": result_of(plan, "sparsyfed", ends),
    }
    table = budget_table(plan, results)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    # 3 trials of 3 rounds of 4 clients: 36 client-rounds each.
    assert (rows["topk"]["client-rounds"], rows["topk"]["unused"]) == ("12", "24")
    assert [rows["sparsyfed"][key] for key in ("finished", "pruned", "failed")] == ["1", "1", "1"]
    assert (rows["sparsyfed"]["client-rounds"], rows["sparsyfed"]["unused"]) == ("32", "4")
    assert any("topk has nothing to tune" in note for note in table.notes)
    assert "sparsyfed, trial 2 failed: bad" in table.notes


def test_optima_on_a_boundary_are_flagged(plan):
    trials = [tried(0, 0.5, values={"algorithm.beta": 1.25}), tried(1, 0.6, values={"algorithm.beta": 2.0})]
    result = result_of(plan, "sparsyfed", trials, importance={"algorithm.beta": 1.0})
    table = optimum_table(plan, {"sparsyfed": result})
    assert list(table.rows) == [["sparsyfed", "beta", "1 to 2", "1.25", "2", "100", "upper end 2"]]
    assert "widen the range" in table.notes[-1]


def test_a_table_in_three_forms(tmp_path):
    Table("x", "A title", ["a_b", "c %"], [["1|2", "<3"]], ["note"]).write(tmp_path)
    assert (tmp_path / "x.md").read_text() == "| a_b | c % |\n| --- | --- |\n| 1\\|2 | <3 |\n\nnote\n"
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.reader(file)) == [["a_b", "c %"], ["1|2", "<3"]]
    latex = (tmp_path / "x.tex").read_text()
    assert r"a\_b & c \% \\" in latex
    assert "1|2 & $<$3" in latex


def test_every_picture_is_drawn(plan, tmp_path):
    values = [{"algorithm.beta": 1.0 + 0.2 * turn} for turn in range(3)]
    own = [tried(turn, 0.5 + 0.1 * turn, values=v, sent=10**turn) for turn, v in enumerate(values)]
    odd = [tried(3, 0.3, state="pruned", values=values[0]), tried(4, None, state="failed", values=values[0])]
    results = {
        "topk": result_of(plan, "topk", [tried(0, 0.5)], [0.5, 0.6, 0.55]),
        "sparsyfed": result_of(plan, "sparsyfed", own + odd, [0.6, 0.7, 0.65], {"algorithm.beta": 1.0}),
    }
    paths = write_report(plan, StudyFolder(tmp_path), results)
    pictures = {path.name for path in paths if path.suffix == ".png"}
    assert pictures == {"accuracy.png", "budget.png", "importance.png", "history.png", "pareto.png"}
    page = (tmp_path / "report" / "report.md").read_text()
    assert all(f"]({name})" in page for name in pictures)
    empty = {label: result_of(plan, label, []) for label in results}
    paths = write_report(plan, StudyFolder(tmp_path), empty)  # before anything has ended
    assert not [path for path in paths if path.suffix == ".png"]
    assert not (tmp_path / "report" / "accuracy.png").exists()
