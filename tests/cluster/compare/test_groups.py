"""Groups: what is one group, what it is called, whom it competes with, and which runs do not count."""

import dataclasses

import pytest

from cluster.compare.groups import group_runs
from cluster.compare.reading import ComparisonError
from tests.cluster.compare.made import made


def labels(*runs, after=None):
    return [group.label for group in group_runs(runs, after=after).groups]


def test_runs_that_differ_only_in_their_seed_are_one_group():
    runs = [made(0.5, seed=seed, algorithm__name=name) for name in ("topk", "flash") for seed in (2, 10, 1)]
    grouped = group_runs(runs)
    assert [group.label for group in grouped.groups] == ["flash", "topk"]
    assert [run.seed for run in grouped.groups[0].runs] == ["1", "2", "10"]
    assert grouped.shared == {"rounds": "1"}


def test_what_cannot_change_a_result_makes_no_group():
    first = made(0.5, seed=0, actors=2, tracking__uri="sqlite:///a.db", data__cache="/a")
    second = made(0.5, seed=1, actors=4, tracking__uri="sqlite:///b.db", data__cache="/b")
    assert labels(first, second) == ["topk"]


@pytest.mark.parametrize(
    ("params", "names"),
    [
        # The method alone tells these apart, whatever else differs.
        ([{"algorithm__name": "topk", "local__lr": 0.1}, {"algorithm__name": "flash", "local__lr": 0.5}],
         ["flash", "topk"]),
        # One method: what differs.
        ([{"algorithm__sparsity": 0.9}, {"algorithm__sparsity": 0.995}],
         ["sparsity 90 %", "sparsity 99.5 %"]),
        # A method without a sparsity has none in its name.
        ([{"algorithm__name": "fedavg"}, {"algorithm__name": "topk", "algorithm__sparsity": 0.9},
          {"algorithm__name": "topk", "algorithm__sparsity": 0.95}], ["fedavg", "topk 90 %", "topk 95 %"]),
        # Numbers are ordered by size.
        ([{"partition__alpha": 1000.0}, {"partition__alpha": 0.1}, {"partition__alpha": 1.0}],
         ["alpha 0.1", "alpha 1.0", "alpha 1000.0"]),
        # Sections that have keys of one name.
        ([{"server__lr": 1.0}, {"server__lr": 0.5}], ["server lr 0.5", "server lr 1.0"]),
        ([{"server__name": "fedadam"}, {"server__name": "fedavg"}], ["server fedadam", "server fedavg"]),
        # Lengths, also where only stop_after differs.
        ([{"stop_after": 5, "rounds": 10}, {"rounds": 10}], ["5 rounds", "10 rounds"]),
        # Shortened they would be the same.
        ([{"algorithm__name": "a:Mine"}, {"algorithm__name": "b:Mine"}],
         ["algorithm.name=a:Mine", "algorithm.name=b:Mine"]),
    ],
)  # fmt: skip
def test_a_group_has_the_shortest_name_of_its_own(params, names):
    runs = [made(0.5, rounds=int(each.pop("rounds", 1)), **each) for each in map(dict, params)]
    assert labels(*(dataclasses.replace(run, reached=10) for run in runs)) == names


def test_a_family_differs_in_its_sparsity_alone():
    runs = [
        made(0.5, algorithm__name=name, algorithm__sparsity=sparsity, partition__alpha=alpha)
        for name in ("flash", "topk")
        for sparsity in (0.9, 0.99)
        for alpha in (0.1, 1)
    ]
    groups = group_runs(runs).groups
    assert len(groups) == 8
    assert groups[0].label == "flash 90 %, alpha 0.1"
    assert {group.family for group in groups} == {
        f"{name}, alpha {alpha}" for name in ("flash", "topk") for alpha in ("0.1", "1")
    }


def test_groups_compete_on_one_task_at_one_sparsity_and_length():
    runs = [
        made(0.5, algorithm__name="topk", algorithm__sparsity=0.9, partition__alpha=1),
        made(0.5, algorithm__name="flash", algorithm__sparsity=0.9, partition__alpha=1),
        made(0.5, algorithm__name="flash", algorithm__sparsity=0.95, partition__alpha=1),
        made(0.5, algorithm__name="flash", algorithm__sparsity=0.9, partition__alpha=0.1),
        made(0.5, algorithm__name="fedavg", partition__alpha=1),
    ]
    contests = {group.label: group.contest for group in group_runs(runs).groups}
    assert len(set(contests.values())) == 4
    assert contests["topk 90 %, alpha 1"] == contests["flash 90 %, alpha 1"]


def test_a_run_that_ended_early_does_not_count():
    whole = made(0.5, name="whole", seed=0, rounds=10)
    failed = dataclasses.replace(made(0.9, name="failed", seed=1, rounds=10), reached=4, status="failed")
    empty = dataclasses.replace(made(0.9, name="empty", seed=2, rounds=10), series={}, status="running")
    grouped = group_runs([whole, failed, empty])
    assert [run.name for run in grouped.groups[0].runs] == ["whole"]
    assert [(run.name, why) for run, why in grouped.left_out] == [
        ("failed", "ended after round 4 of 10 (failed)"),
        ("empty", "running without a round"),
    ]


def test_unequal_rounds_are_compared_after_a_round_of_both():
    short = made(0.5, seed=0, rounds=5)
    stopped = dataclasses.replace(made(0.5, seed=1, rounds=5), params={**short.params, "stop_after": "9"})
    grouped = group_runs([short, stopped], after=5)
    assert len(grouped.groups) == 1  # of one configuration, whenever they were to end
    with pytest.raises(ComparisonError, match=r"no run is complete: run ended after round 5 of 6"):
        group_runs([short], after=6)


def test_where_no_run_counts_the_error_names_a_way_out():
    runs = [dataclasses.replace(made(0.5, name=f"r{i}", rounds=9), reached=i) for i in (3, 4, 5, 6, 7)]
    with pytest.raises(ComparisonError) as error:
        group_runs(runs)
    assert "r3 ended after round 3 of 9" in str(error.value)
    assert "and 2 more. --round 3 compares them" in str(error.value)


def test_a_repeated_run_is_no_further_sample():
    old = dataclasses.replace(made(0.5, name="old", seed=0), started=1.0)
    new = dataclasses.replace(made(0.6, name="new", seed=0), started=2.0)
    grouped = group_runs([new, old])
    assert [run.name for run in grouped.groups[0].runs] == ["new"]
    assert [(run.name, why) for run, why in grouped.left_out] == [("old", "repeated by new")]


def test_methods_with_other_hyperparameters_are_told_apart_by_them():
    runs = [made(0.5, algorithm__name="sparsyfed", algorithm__beta=beta) for beta in (1.0, 1.25)]
    assert labels(*runs, made(0.5)) == ["sparsyfed, beta 1.0", "sparsyfed, beta 1.25", "topk"]


def test_what_is_learned_is_a_task_of_its_own_and_older_runs_learned_classes():
    older = made(0.5, seed=0)
    newer = made(0.6, seed=1, objective__name="classification")
    other = made(0.7, seed=0, objective__name="my_module:Mine")
    groups = group_runs([older, newer, other]).groups
    assert [len(group.runs) for group in groups] == [2, 1]
    assert groups[0].contest != groups[1].contest
