"""Runs that measured by different rules: marked, out of contests, and never in one mean."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cluster.compare.formats import findings, number_rows, text_rows
from cluster.compare.groups import group_runs
from cluster.compare.html import page
from cluster.compare.reading import Series, read_folder
from cluster.compare.table import Comparison, Table
from cluster.compare.versions import is_of, version
from tests.cluster.compare.made import made, write_run


def flops(value, name, seed=0, measures=(), **params):
    """A run with an accuracy and so many GFLOP, measured by the versions given."""
    run = made(0.5, f"{name}-{seed}", seed=seed, algorithm__name=name, **params)
    series = {**run.series, "flops/sparse_total": Series(np.array([1]), np.array([value * 1e9]))}
    return replace(run, series=series, measures=None if measures is None else dict(measures))


NEW = {"flops/sparse": 2}


def gflop(runs):
    """The column's text by group, and what is said below the table."""
    table = Table.of(group_runs(runs).groups)
    header, *rows = text_rows(table)
    place = header.index("GFLOP")
    assert findings(table)[1:] == table.differing_rules
    return {row[0]: row[place] for row in rows}, table.differing_rules


@pytest.mark.parametrize(
    ("metric", "belongs"),
    [
        ("flops/sparse", True),
        ("flops/sparse_total", True),
        ("flops/sparse/layers", True),
        ("flops/sparsest", False),
        ("flops/dense", False),
    ],
)
def test_a_family_is_a_metric_and_what_goes_on_after_its_name(metric, belongs):
    assert is_of(metric, "flops/sparse") == belongs


def test_nothing_is_said_where_all_rules_are_the_same():
    for measures in ({}, NEW, None):
        runs = [flops(30, "a", measures=measures), flops(10, "b", measures=measures)]
        assert gflop(runs) == ({"a": "30", "b": "10"}, [])


def test_an_older_rule_is_marked_in_its_column_alone():
    texts, said = gflop([flops(30, "a"), flops(10, "b", measures=NEW)])
    assert texts == {"a": "30 ≠", "b": "10"}
    assert said == [
        "flops/sparse measured by different rules: version 2, and an older or unknown one in runs a-0; "
        "run again to compare"
    ]
    table = Table.of(group_runs([flops(30, "a"), flops(10, "b", measures=NEW)]).groups)
    header, *rows = number_rows(table)
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(cell["group"], cell["figure"]) for cell in cells if cell["rule"]] == [("a", "gflop")]


def test_an_unfinished_run_does_not_say_by_which_rule_it_measures():
    texts, _ = gflop([flops(30, "a", measures=None), flops(10, "b", measures=NEW)])
    assert texts == {"a": "30 ≠", "b": "10"}


def test_what_was_measured_by_different_rules_goes_into_no_mean():
    # Of seeds 0, 1, 2 the middle one is old: 20 is the mean of 10 and 30, without 1000.
    runs = [flops(value, "a", seed, measures) for seed, (value, measures) in
            enumerate([(10, NEW), (1000, {}), (30, NEW)])]  # fmt: skip
    groups = group_runs([*runs, flops(5, "b", measures=NEW)]).groups
    assert "flops/sparse_total" not in groups[0].runs[1].series  # nor into a curve
    assert "test/accuracy" in groups[0].runs[1].series
    texts, said = gflop([*runs, flops(5, "b", measures=NEW)])
    assert texts == {"a": "20 ± 127 (2 of 3)", "b": "5"}
    assert "in runs a-1;" in said[0]


def test_a_figure_measured_by_an_older_rule_does_not_compete():
    accuracy = {"test/accuracy": 2}
    runs = [flops(1, name, seed, measures) for seed in (0, 1)
            for name, measures in (("a", {}), ("b", accuracy), ("c", accuracy))]  # fmt: skip
    groups = group_runs(runs).groups
    table = Table.of(groups)
    assert table.contests[0][1].places == (1, 2)
    assert [row[0].verdict for row in table.cells] == ["", "tied", "tied"]


def test_the_report_says_which_runs_to_compute_again():
    runs = [flops(30, "a"), flops(10, "b", measures=NEW)]
    text = page(Comparison.of(runs, "two runs"), [], [])
    assert "30<sup>≠</sup>" in text
    assert "≠</sup> measured by an older or unknown rule" in text
    assert text.count("flops/sparse measured by different rules") == 2  # below the table, and at the plots


def test_the_versions_are_read_from_the_result(tmp_path):
    old, new, running = (write_run(tmp_path / name, [0.5]) for name in ("old", "new", "running"))
    (old / "result.json").write_text(json.dumps({"complete": True}))
    (new / "result.json").write_text(json.dumps({"complete": True, "measures": NEW}))
    versions = [version(read_folder(path), "flops/sparse") for path in (old, new, running)]
    assert versions == [1, 2, 0]
