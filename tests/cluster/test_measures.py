"""The table of measures holds what runs write, all of it and no more; nothing else spells a metric out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import cluster
from cluster.configuration.config import resolve
from cluster.measures import (
    MEASURES,
    RESULTS,
    VERSIONS,
    Measure,
    as_values,
    declared,
    from_values,
    of_objective,
    results_of,
)
from cluster.workload.objectives import Classification
from tests.example_objective import Regression
from tests.tiny_experiment import run_inline, tiny_federation

ROOT = Path(__file__).parents[2]
METRICS = Classification.measures

#: Declared, but of no run below: on Ray, or of methods that have no measures of their own.
ELSEWHERE = {"time/work_s", "time/merge_s", "method/<name>"}
ELSEWHERE |= {
    "privacy/epsilon",
    "privacy/clip",
    "privacy/clipped",
}  # they take a library: rounds/test_private.py
RESULTS_ELSEWHERE = {"mlflow_run_id", "tracking_delivered", "checkpoint_uri_behind"}

TIERS = {"weak": {"share": 0.5, "sparsity": 0.9}, "strong": {"share": 0.5, "sparsity": 0.5}}
RUNS = {
    "plain": {"data": {"validation": 0.2}},
    "long": {"rounds": 20, "evaluate_every": 20, "cohort": 2},
    "secure": {"wire": {"grid": 64}, "privacy": {"secure": {"masks": "billed"}}},
    "buffered": {
        "algorithm": {"name": "topk"},
        "cohort": 2,
        "schedule": {"name": "buffered", "buffer": 2, "concurrency": 3},
    },
    "tiers": {"algorithm": {"name": "topk", "sparsity": 0.5}, "devices": {"tiers": TIERS}},
    "shift": {"rounds": 4, "shift": {"round": 3}},
    "clients": {"evaluate_clients": {"every": 1, "after": 2}},
    "attack": {"evaluate_attack": {"every": 2, "steps": 1}, "data": {"validation": 0.2}},
    "groups": {
        "data": {"name": "tests.cluster.rounds.test_own_rows:with_groups", "validation": 0.2},
        "evaluate_clients": {"every": 1, "groups": True},
    },
    "unseen": {"cohort": 2, "evaluate_clients": {"every": 1, "unseen": 2}},
    "flash": {"algorithm": {"name": "flash", "stage1": "sensitivity", "sparsity": 0.5}},
    "kept": {"algorithm": {"name": "feddyn"}},
    "ramp": {"algorithm": {"name": "topk"}, "sparsity_schedule": {"name": "cubic"}},
    "adapter": {"model": {"name": "mlp"}, "adapter": {"name": "lora", "rank": 2}},
    "spectral": {"algorithm": {"name": "sparsyfed", "exponent": "spectral", "sparsity": 0.5}},
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """The lines of every run."""
    place = tmp_path_factory.mktemp("measured")
    return [
        line
        for name, options in RUNS.items()
        for line in run_inline(tiny_federation(place, **options), place / name).lines
    ]


def test_every_key_of_a_line_is_declared(lines):
    assert {key for line in lines for key in line if declared(key, METRICS) is None} == set()
    assert any(line["round"] == 0 for line in lines)  # a stage before round 1


def test_every_declared_key_is_in_some_line(lines):
    used = {declared(key, METRICS).key for line in lines for key in line}
    every = {measure.key for measure in (*MEASURES, *of_objective(METRICS))}
    assert every - used == ELSEWHERE


@pytest.mark.usefixtures("no_pictures")
def test_a_result_holds_what_is_declared(tmp_path, cache):
    result = cluster.run(tiny_federation(cache, rounds=1), tmp_path / "run")
    stored = json.loads((result.folder / "result.json").read_text())
    every = {measure.key for measure in (*RESULTS, *results_of(METRICS[0]))}
    assert stored.keys() == every - RESULTS_ELSEWHERE
    assert from_values(stored["objective"]["metrics"]) == METRICS
    assert stored["measures"] == VERSIONS == {"flops/sparse": 2}


@pytest.mark.usefixtures("no_pictures")
def test_a_regression_writes_what_is_declared(tmp_path, cache):
    tree = tiny_federation(cache, rounds=3, shift={"round": 2}).dump()
    tree["objective"] = {"name": "tests.example_objective:Regression"}
    tree["partition"] = {"name": "iid", "clients": 6, "seed": 5}
    run = run_inline(resolve({**tree, "shift": {"round": 2}}), tmp_path / "run")
    keys = {key for line in run.lines for key in line}
    assert {key for key in keys if declared(key, Regression.measures) is None} == set()
    assert {"test/rmse", "test/r2", "shift/rmse_change"} <= keys
    assert not [key for key in keys if "accuracy" in key]


def test_keys_stand_once_and_say_something():
    every = [*MEASURES, *of_objective(METRICS)]
    assert len({measure.key for measure in every}) == len(every)
    assert len({measure.key for measure in RESULTS}) == len(RESULTS)
    for measure in (*every, *RESULTS):
        assert measure.meaning.endswith("."), measure
        assert measure.title
        assert measure.better in ("higher", "lower", None)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("tiers/any name at all/accuracy", "tiers/<tier>/accuracy"),
        ("tiers/a/b/accuracy", None),
        ("exponent/layers", "<name>/layers"),
        ("test/accuracyy", None),
        ("test/rmse", None),
        ("flops/sparse", "flops/sparse"),
    ],
)
def test_families(key, found):
    measure = declared(key, METRICS)
    assert (measure and measure.key) == found


def test_directions_and_units():
    error = Measure("rmse", "error", "", "An error.", "lower")
    assert error.merit(2.0) < error.merit(1.0)
    assert METRICS[0].merit(0.5) > METRICS[0].merit(0.25)
    assert (METRICS[0].label, METRICS[0].text(0.125), METRICS[0].figure(0.125, 2)) == (
        "accuracy (%)", "12.5%", "12.50"
    )  # fmt: skip
    assert (error.label, error.text(1234.5), error.text(None)) == ("error", "1234", "-")
    assert declared("comm/uplink_bytes", METRICS).label == "sent up (MB)"
    spread = {measure.key: measure.better for measure in of_objective([error])}
    assert spread["clients/rmse_std"] is None
    assert spread["clients/rmse_worst_decile"] == spread["shift/rmse_change"] == "lower"


def test_metrics_are_read_back_from_other_versions():
    (values,) = as_values([replace(METRICS[0], version=2)])
    assert from_values([{**values, "unheard_of": 1}]) == (replace(METRICS[0], version=2),)


@pytest.mark.parametrize("literal", ["test/accuracy", "val/accuracy", "best_accuracy", "accuracy_mean"])
def test_nothing_spells_a_metric_out(literal):
    product = [path for room in ("algorithms", "cluster", "tuning") for path in (ROOT / room).rglob("*.py")]
    assert [path for path in product if literal in path.read_text(encoding="utf-8")] == []
