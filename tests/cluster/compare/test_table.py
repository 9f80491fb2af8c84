"""The table's figures, worked by hand, and its verdicts, against scipy and the rule."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml
from scipy import stats

from cluster.compare import plots
from cluster.compare.costs import BYTES, HOURS, budgets_of
from cluster.compare.formats import findings
from cluster.compare.groups import group_runs
from cluster.compare.reading import ComparisonError, Series, read_folder, read_folders
from cluster.compare.table import Table, default_target, target_of
from cluster.measures import as_values
from cluster.workload.objectives import Classification
from tests.cluster.compare.made import made, write_run

ACCURACY = Classification().selects


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


def verdicts(table, key="accuracy"):
    return {label: cell.verdict for label, cell in column(table, key).items()}


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


def test_how_much_less_than_dense_is_sent_down(tmp_path):
    # A dense broadcast of 8 MB, then 1 MB and .5 MB.
    folder = write_run(tmp_path / "one", [0.1, 0.2, 0.3], **{"comm/dense_bytes": 8_000_000})
    lines = [json.loads(text) for text in (folder / "rounds.jsonl").read_text().splitlines()]
    for line, total in zip(lines, (8_000_000, 9_000_000, 9_500_000), strict=True):
        line["comm/downlink_bytes_total"] = total
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = Table.of(group_runs([read_folder(folder)]).groups)
    assert column(table, "downlink_ratio")["sparsyfed"].values["0"] == pytest.approx(24 / 9.5)
    assert column(table, "downlink_ratio_last")["sparsyfed"].values["0"] == 16.0


def test_what_masks_do(tmp_path):
    more = {"masks/client_cut": 120.0, "masks/overlap_10": 0.75}
    table = Table.of(group_runs([read_folder(write_run(tmp_path / "one", [0.1, 0.2], **more))]).groups)
    assert column(table, "client_cut")["sparsyfed"].values == {"0": 120.0}
    assert column(table, "overlap_10")["sparsyfed"].values == {"0": 0.75}


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


def test_the_best_is_the_best_where_all_others_are_worse():
    # c is 21 below: t^2 = 3 * 21^2 / (2 error^2) / 2; then b, a paired t test of differences 10, 11, 12.
    a, b, c = [0.50, 0.51, 0.52], [0.40, 0.40, 0.40], [0.30, 0.29, 0.31]
    table = table_of(a=a, b=b, c=c)
    assert verdicts(table) == {"a": "best", "b": "worse", "c": "worse"}
    adjusted = {label: cell.adjusted for label, cell in column(table, "accuracy").items()}
    assert adjusted["a"] == 1.0
    assert adjusted["b"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    ((_, contest),) = table.contests
    assert (contest.seeds, contest.left) == (3, 1)
    assert contest.error == pytest.approx(np.std([10, 11, 12], ddof=1) / math.sqrt(2))


def test_what_the_test_cannot_tell_from_the_best_is_tied_and_none_is_best():
    # b is within noise of a: differences 1, -1, 2. c is far below both.
    table = table_of(a=[0.50, 0.51, 0.52], b=[0.49, 0.52, 0.50], c=[0.30, 0.29, 0.31])
    assert verdicts(table) == {"a": "tied", "b": "tied", "c": "worse"}


def test_what_seeds_have_in_common_hides_nothing():
    # The seeds' effect (10 points) hides a difference of 1 point in an unpaired test.
    a, b = [0.51, 0.612, 0.711, 0.81], [0.50, 0.60, 0.70, 0.80]
    assert stats.ttest_ind(a, b, equal_var=False).pvalue > 0.9
    assert verdicts(table_of(a=a, b=b)) == {"a": "best", "b": "worse"}


def test_all_that_compete_count():
    # t = 3 sqrt(3) with 2 degrees of freedom: p = .035 alone is significant, beside others like b it is not.
    a, b = [0.53, 0.52, 0.54], [0.5, 0.5, 0.5]
    assert 0.02 < stats.ttest_rel(a, b).pvalue < 0.05
    assert verdicts(table_of(a=a, b=b))["a"] == "best"
    others = {name: [0.5 + d / 1000 for d in own] for name, own in {"c": [9, 1, -9], "d": [-9, 8, 2]}.items()}
    assert set(verdicts(table_of(a=a, b=b, **others)).values()) == {"tied"}


def test_one_seed_has_no_verdict():
    table = table_of(a=[0.9], b=[0.1])
    assert verdicts(table) == {"a": "", "b": ""}
    ((_, contest),) = table.contests
    assert contest.seeds == 1
    assert math.isnan(contest.error)
    interval = column(table, "accuracy")["a"].interval
    assert interval.mean == 90
    assert math.isnan(interval.low)


def test_a_group_of_one_seed_keeps_the_verdict_from_nobody_else():
    table = table_of(a=[0.50, 0.51, 0.52], b=[0.40, 0.40, 0.40], c=[0.9])
    assert verdicts(table) == {"a": "best", "b": "worse", "c": ""}


def test_only_seeds_that_all_have_count():
    a, b = {0: 0.9, 1: 0.50, 2: 0.51, 3: 0.52}, {1: 0.40, 2: 0.40, 3: 0.40, 7: 0.99}
    table = table_of(a=a, b=b)
    assert verdicts(table) == {"a": "best", "b": "worse"}
    assert (table.contests[0][1].seeds, table.contests[0][1].most) == (3, 4)
    assert findings(table)[0].startswith("Accuracy: 2 groups over the 3 seeds of 4 in common.")
    apart = table_of(a={0: 0.5, 1: 0.51}, b={1: 0.1, 2: 0.1})
    assert set(verdicts(apart).values()) == {""}
    assert findings(apart) == [
        "Accuracy: no verdict, which takes two seeds that all 2 groups have; found 1 common seed"
    ]


def test_how_many_seeds_3_points_take():
    # Differences of a and b vary by 1 point: error 1 / sqrt 2, as in the test of `seeds_to_tell`.
    table = table_of(a=[0.50, 0.51, 0.52], b=[0.50, 0.50, 0.50])
    assert table.contests[0][1].error == pytest.approx(0.7071, abs=1e-4)
    assert "between the 2 not told apart takes about 4 seeds to tell (80 % power" in findings(table)[0]


def test_one_group_competes_with_nobody():
    assert verdicts(table_of(a=[0.9, 0.8])) == {"a": ""}


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
    assert verdicts(table) == {"sparsyfed": "", "topk": ""}  # half a group is not compared


def test_a_lower_cost_is_better(tmp_path):
    # Accuracy 0.5 after round 1 (5 MB) against round 2 (10 MB), in every seed.
    runs = [
        read_folder(write_run(tmp_path / f"{name}{seed}", values, f"seed={seed}", f"algorithm.name={name}"))
        for name, values in (("topk", [0.5, 0.6, 0.6]), ("flash", [0.4, 0.6, 0.6]))
        for seed in (0, 1)
    ]
    table = Table.of(group_runs(runs).groups, target=0.5)
    assert verdicts(table, "mb_to_target") == {"flash": "worse", "topk": "best"}
    assert verdicts(table, "uplink_mb") == {"flash": "", "topk": ""}  # no contest


def test_bytes_to_reach_an_accuracy(tmp_path):
    run = read_folder(write_run(tmp_path / "one", [0.1, None, 0.5, 0.4, 0.7]))
    assert [BYTES.to_reach(run, ACCURACY, target) for target in (0.1, 0.2, 0.5, 0.6)] == [
        5e6,
        15e6,
        15e6,
        25e6,
    ]
    assert BYTES.to_reach(run, ACCURACY, 0.71) is None


def spending(folder):
    """Two methods, 5 MB a round; topk takes 1 h and 2 kJ a round, flash .5 h and 3 kJ."""
    runs = []
    for name, values, hours, joules in (
        ("topk", [0.5, 0.6, 0.7], 1.0, 2000.0),
        ("flash", [0.4, None, 0.6], 0.5, 3000.0),
    ):
        path = write_run(folder / name, values, f"algorithm.name={name}")
        lines = [json.loads(text) for text in (path / "rounds.jsonl").read_text().splitlines()]
        for own in lines:
            own["time/simulated_s"] = 3600.0 * hours * own["round"]
            own["energy/joules_total"] = joules * own["round"]
        (path / "rounds.jsonl").write_text("".join(json.dumps(own) + "\n" for own in lines))
        runs.append(read_folder(path))
    return runs


def test_what_a_target_costs_and_what_a_budget_buys(tmp_path):
    groups = group_runs(spending(tmp_path)).groups

    def figures(table):
        return {
            each.key: {label: own.values.get("0") for label, own in column(table, each.key).items()}
            for each in table.columns
            if each.key.startswith("for_") or each.key.endswith("_to_target")
        }

    # 60 % after round 2 of topk and round 3 of flash. In all topk spends 3 h and 6 kJ, flash 1.5 h and 9 kJ,
    # and both 15 MB, of which there is no default budget.
    table = Table.of(groups, target=0.6)
    assert figures(table) == {
        "mb_to_target": {"topk": 10.0, "flash": 15.0},
        "h_to_target": {"topk": 2.0, "flash": 1.5},
        "kj_to_target": {"topk": 4.0, "flash": 9.0},
        "for_h": {"topk": 50.0, "flash": 60.0},  # 1.5 h: a round of topk, all of flash
        "for_kj": {"topk": 70.0, "flash": 40.0},  # 6 kJ: all of topk, two rounds of flash, the first measured
    }
    headers = {each.key: each.header for each in table.columns}
    assert headers["for_kj"] == "accuracy (%) for 6 kJ"
    assert headers["h_to_target"] == "simulated h to 60 %"
    asked = figures(Table.of(groups, target=0.6, budgets=budgets_of(["10MB", "0.5 h"])))
    assert asked["for_mb"] == {"topk": 60.0, "flash": 40.0}
    assert asked["for_h"] == {"topk": None, "flash": 40.0}  # topk has no round that is so short
    assert "for_kj" not in asked


def test_the_default_budget_pays_for_the_cheapest_run(tmp_path):
    runs = spending(tmp_path)
    assert HOURS.default_budget(runs) == 1.5 * 3600
    assert HOURS.default_budget(runs[:1]) is None  # all that there is is paid for
    assert BYTES.default_budget(runs) is None
    assert HOURS.default_budget([*runs, made(0.5)]) is None  # nobody knows what that one took


@pytest.mark.parametrize("text", ["50", "50GB", "MB", "-1MB", "0kJ", "1.2.3h", "1e999h"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(ComparisonError, match=rf"--budget {text}: expected a number and MB, h, kJ"):
        budgets_of([text])
    assert budgets_of(["50MB", "2h", "5e1kJ"]) == {"MB": 50e6, "h": 7200.0, "kJ": 50e3}
    with pytest.raises(ComparisonError, match="--budget 3MB: there is another one in MB"):
        budgets_of(["2MB", "3MB"])


def test_the_default_target_is_what_half_of_the_groups_reach():
    groups = group_runs(
        [made(value, algorithm__name=name) for name, value in
         {"a": 0.10, "b": 0.74, "c": 0.76, "d": 0.92}.items()]
    ).groups  # fmt: skip
    assert default_target(groups, ACCURACY) == 0.75  # c and d reach it
    assert default_target(groups[1:2], ACCURACY) == 0.7
    assert default_target(group_runs([made(0.04)]).groups, ACCURACY) is None


# --- where lower is better

RMSE = replace(ACCURACY, key="rmse", title="error", unit="", better="lower")
NAME = "nowhere:Regression"  # never imported by a comparison


def errors_of(folder, **errors):
    """Runs of an objective of one's own, one group a method; only the first of all says what it measures."""
    params = ("algorithm.beta=1",)
    for name, by_seed in errors.items():
        for seed, values in enumerate(by_seed):
            more = {"test/rmse": None}
            path = write_run(folder / f"{name}-{seed}", [None] * len(values), f"seed={seed}", *params, **more)
            lines = [json.loads(text) for text in (path / "rounds.jsonl").read_text().splitlines()]
            for line, value in zip(lines, values, strict=True):
                line["test/rmse"] = value
            (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            tree = yaml.safe_load((path / "config.yaml").read_text())
            tree["objective"], tree["algorithm"]["beta"] = {"name": NAME}, float(name.removeprefix("b"))
            (path / "config.yaml").write_text(yaml.safe_dump(tree))
    first = next(iter(sorted(folder.iterdir())))
    told = {"complete": True, "objective": {"name": NAME, "metrics": as_values([RMSE])}}
    (first / "result.json").write_text(json.dumps(told))
    return read_folders([folder])


def test_the_lowest_error_is_the_best(tmp_path):
    # b2 errs least in the end, b3 most; every run's least error is that of its second round.
    runs = errors_of(
        tmp_path / "runs",
        b1=[[9.0, 4.0, 5.00], [9.0, 4.0, 5.01], [9.0, 4.0, 5.02]],
        b2=[[9.0, 2.0, 3.00], [9.0, 2.0, 3.02], [9.0, 2.0, 3.01]],
        b3=[[9.0, 6.0, 7.00], [9.0, 6.0, 7.01], [9.0, 6.0, 7.03]],
    )
    table = Table.of(group_runs(runs).groups)
    assert [each.key for each in table.columns][:3] == ["rmse", "best_rmse", "mb_to_target"]
    assert [each.header for each in table.columns][:3] == ["error", "best", "MB to error 4"]
    assert verdicts(table, "rmse") == {"beta 1.0": "worse", "beta 2.0": "best", "beta 3.0": "worse"}
    means = {label: cell.interval.mean for label, cell in column(table, "best_rmse").items()}
    assert means == {"beta 1.0": 4.0, "beta 2.0": 2.0, "beta 3.0": 6.0}
    # 5 MB a round: 4 is reached in the second round by two of three.
    spent = {label: cell.values for label, cell in column(table, "mb_to_target").items()}
    assert spent["beta 1.0"] == spent["beta 2.0"] == {"0": 10.0, "1": 10.0, "2": 10.0}
    assert spent["beta 3.0"] == {}
    assert table.target == default_target(table.groups, RMSE) == 4.0
    assert target_of(runs, 4.5) == 4.5
    (finding,) = findings(table)[:1]
    assert finding.startswith("Error: 3 groups over the 3 seeds in common. A difference of 0.0903 between")
    assert "accuracy" not in " ".join([*findings(table), *(each.header for each in table.columns)])


def test_of_many_groups_those_with_the_least_errors_are_drawn():
    runs = [
        replace(
            made(0.0, seed=0, algorithm__name=f"m{place:02d}"),
            series={"test/rmse": Series(np.array([1]), np.array([float(place)]))},
            metrics=(RMSE,),
        )
        for place in range(plots.MOST_LINES + 3)
    ]
    drawn = plots.best_of(group_runs(runs).groups)
    assert [group.label for group in drawn] == [f"m{place:02d}" for place in range(plots.MOST_LINES)]


def test_two_objectives_in_one_table_do_not_compete(tmp_path):
    runs = errors_of(tmp_path / "runs", b1=[[9.0, 4.0], [9.0, 4.5]], b2=[[9.0, 2.0], [9.0, 2.5]])
    runs += [made(0.5, seed=seed, algorithm__name="topk") for seed in (0, 1)]
    table = Table.of(group_runs(runs).groups)
    assert {"accuracy", "rmse"} <= {each.key for each in table.columns}
    assert set(verdicts(table).values()) == {""}
    assert {label: cell.values for label, cell in column(table, "rmse").items()}["topk"] == {}


@pytest.mark.parametrize("shown", [0, -1, 101])
def test_a_target_that_is_no_percentage_is_refused(shown):
    with pytest.raises(ComparisonError, match=f"--target {shown}: expected a percentage, such as 80"):
        target_of([made(0.5)], shown)
    assert target_of([made(0.5)], 80) == 0.8
