"""The table's figures, worked by hand, and its marks, against scipy and the rule."""

import math

import numpy as np
import pytest
from scipy import stats

from cluster.compare.groups import group_runs
from cluster.compare.reading import Series, read_folder
from cluster.compare.table import Table, bytes_to_reach, default_target, p_value
from tests.cluster.compare.made import made, write_run


def table_of(**accuracies):
    """One group a method, with one accuracy a seed."""
    runs = [
        made(value, seed=seed, algorithm__name=name)
        for name, values in accuracies.items()
        for seed, value in (values.items() if isinstance(values, dict) else enumerate(values))
    ]
    return Table.of(group_runs(runs).groups)


def column(table, key):
    place = [each.key for each in table.columns].index(key)
    return {group.label: row[place] for group, row in zip(table.groups, table.cells, strict=True)}


def marks(table, key="accuracy"):
    return {label: cell.mark for label, cell in column(table, key).items()}


def test_the_figures_of_a_run(tmp_path):
    run = read_folder(write_run(tmp_path / "one", [0.5, 0.75, 0.625]))
    table = Table.of(group_runs([run]).groups, target=0.7)
    figures = {key: cell.values["0"] for key in (c.key for c in table.columns)
               for cell in column(table, key).values()}  # fmt: skip
    assert figures == {
        "accuracy": 62.5,
        "best_accuracy": 75.0,
        "mb_to_target": 10.0,  # round 2: 2 * (2 + 3) MB
        "sparsity": 50.0,
        "uplink_mb": 6.0,
        "downlink_mb": 9.0,
        "gflop": 3.0,
        "regrowth": 2.5,  # rounds 2 and 3: (2 + 3) / 2 per mille
        "consensus": 0.5,
    }


def test_the_best_round_is_chosen_by_validation_where_there_is_one(tmp_path):
    run = read_folder(write_run(tmp_path / "one", [0.5, 0.75, 0.625]))
    run.series["val/accuracy"] = Series(np.array([1, 2, 3]), np.array([0.4, 0.5, 0.6]))
    assert column(Table.of(group_runs([run]).groups), "best_accuracy")["sparsyfed"].values == {"0": 62.5}


def test_columns_that_no_run_has_are_left_out():
    assert [each.key for each in table_of(topk=[0.5]).columns] == ["accuracy", "best_accuracy"]


def test_an_interval_over_seeds():
    cell = column(table_of(topk=[0.1, 0.2, 0.4, 0.5]), "accuracy")["topk"]
    low, high = stats.t.interval(0.95, 3, loc=30, scale=stats.sem([10, 20, 40, 50]))
    assert cell.interval == pytest.approx((30, low, high))


def test_the_best_is_marked_where_it_is_significantly_better():
    # Differences from b: 10, 11, 12; from c: 20, 22, 21. Both p < .01 also after Holm's correction.
    table = table_of(a=[0.50, 0.51, 0.52], b=[0.40, 0.40, 0.40], c=[0.30, 0.29, 0.31])
    assert marks(table) == {"a": "best", "b": "", "c": ""}
    to_b = stats.ttest_rel([50, 51, 52], [40, 40, 40]).pvalue
    to_c = stats.ttest_rel([50, 51, 52], [30, 29, 31]).pvalue
    adjusted = {label: cell.adjusted for label, cell in column(table, "accuracy").items()}
    assert adjusted["c"] == pytest.approx(min(2 * min(to_b, to_c), 1) if to_c < to_b else max(2 * to_b, to_c))
    assert adjusted["b"] == pytest.approx(2 * to_b if to_b < to_c else max(2 * to_c, to_b))


def test_what_the_test_cannot_tell_from_the_best_is_tied_and_none_is_best():
    # b is within noise of a: differences 1, -1, 2. c is far below both.
    table = table_of(a=[0.50, 0.51, 0.52], b=[0.49, 0.52, 0.50], c=[0.30, 0.29, 0.31])
    assert marks(table) == {"a": "tied", "b": "tied", "c": ""}


def test_pairing_tells_apart_what_seeds_have_in_common():
    # The seeds' effect (10 points) hides a difference of 1 point in an unpaired test.
    a, b = [0.51, 0.612, 0.711, 0.81], [0.50, 0.60, 0.70, 0.80]
    assert stats.ttest_ind(a, b, equal_var=False).pvalue > 0.9
    assert marks(table_of(a=a, b=b)) == {"a": "best", "b": ""}


def test_holms_correction_counts_all_that_compete():
    # t = 3 sqrt(3) with 2 degrees of freedom: p = .035 alone is significant, among three like it not.
    a, b = [0.53, 0.52, 0.54], [0.5, 0.5, 0.5]
    assert 0.02 < stats.ttest_rel(a, b).pvalue < 0.05
    assert marks(table_of(a=a, b=b))["a"] == "best"
    assert set(marks(table_of(a=a, b=b, c=b, d=b)).values()) == {"tied"}


def test_one_seed_distinguishes_nothing():
    table = table_of(a=[0.9], b=[0.1])
    assert marks(table) == {"a": "tied", "b": "tied"}
    interval = column(table, "accuracy")["a"].interval
    assert interval.mean == 90
    assert math.isnan(interval.low)


def test_one_group_competes_with_nobody():
    assert marks(table_of(a=[0.9, 0.8])) == {"a": ""}


def test_values_are_paired_over_shared_seeds_and_welchs_where_none_are():
    first, second = {"0": 1.0, "1": 3.0, "2": 4.0}, {"1": 2.0, "2": 4.5, "3": 9.0}
    assert p_value(first, second) == pytest.approx(stats.ttest_rel([3, 4], [2, 4.5]).pvalue)
    apart = {"7": 2.0, "8": 4.5, "9": 9.0}
    expected = stats.ttest_ind([1, 3, 4], [2, 4.5, 9], equal_var=False).pvalue
    assert p_value(first, apart) == pytest.approx(expected)
    assert math.isnan(p_value({"0": 1.0}, {"0": 2.0}))


def test_missing_metrics_leave_gaps_and_no_contest(tmp_path):
    runs = [
        read_folder(write_run(tmp_path / "a0", [0.5, 0.9], "seed=0")),
        read_folder(write_run(tmp_path / "a1", [0.5, 0.8], "seed=1", drop=["masks/consensus"])),
        read_folder(
            write_run(tmp_path / "b0", [0.2, 0.3], "seed=0", "algorithm.name=topk", drop=["test/accuracy"])
        ),
        read_folder(write_run(tmp_path / "b1", [0.2, 0.3], "seed=1", "algorithm.name=topk")),
    ]
    table = Table.of(group_runs(runs).groups)
    assert column(table, "consensus")["sparsyfed"].values == {"0": 0.5}
    assert column(table, "accuracy")["topk"].values == {"1": 30.0}
    assert marks(table) == {"sparsyfed": "", "topk": ""}  # half a group is not compared


def test_a_lower_cost_is_better(tmp_path):
    # Accuracy 0.5 after round 1 (5 MB) against round 2 (10 MB), in every seed.
    runs = [
        read_folder(write_run(tmp_path / f"{name}{seed}", values, f"seed={seed}", f"algorithm.name={name}"))
        for name, values in (("topk", [0.5, 0.6, 0.6]), ("flash", [0.4, 0.6, 0.6]))
        for seed in (0, 1)
    ]
    table = Table.of(group_runs(runs).groups, target=0.5)
    assert marks(table, "mb_to_target") == {"flash": "", "topk": "best"}
    assert marks(table, "uplink_mb") == {"flash": "", "topk": ""}  # no contest


def test_bytes_to_reach_an_accuracy(tmp_path):
    run = read_folder(write_run(tmp_path / "one", [0.1, None, 0.5, 0.4, 0.7]))
    assert [bytes_to_reach(run, target) for target in (0.1, 0.2, 0.5, 0.6)] == [5e6, 15e6, 15e6, 25e6]
    assert bytes_to_reach(run, 0.71) is None


def test_the_default_target_is_what_half_of_the_groups_reach():
    groups = group_runs(
        [made(value, algorithm__name=name) for name, value in
         {"a": 0.10, "b": 0.74, "c": 0.76, "d": 0.92}.items()]
    ).groups  # fmt: skip
    assert default_target(groups) == 0.75  # c and d reach it
    assert default_target(groups[1:2]) == 0.7
    assert default_target(group_runs([made(0.04)]).groups) is None
