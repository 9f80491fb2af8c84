"""Comparing an MLflow experiment: a real SQLite store, filled as a run fills it."""

import os
from pathlib import Path

import numpy as np
import pytest

from cluster.cli import main
from cluster.compare import plots
from cluster.compare.groups import group_runs
from cluster.compare.reading import ComparisonError, read_experiment, read_folder
from cluster.configuration.config import resolve
from cluster.records import tracking, tracking_store
from cluster.records.introduction import benchmark_name, in_short
from cluster.records.tracking import Tracker, TrackingTarget
from tests.cluster.compare.made import write_run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of four finished runs and a failed one, all of them delivered to its store."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in tracking_store.QUIET_DEFAULTS.items():
            patch.setenv(key, value)
        patch.setattr(tracking, "_GATHER_S", 0.02)
        for method, accuracies in (("topk", [0.3, 0.4]), ("flash", [0.5, 0.6])):
            for seed in (0, 1):
                values = [value + seed / 100 for value in accuracies]
                deliver(
                    write_run(root / f"{method}-{seed}", values, f"algorithm.name={method}", f"seed={seed}")
                )
        failed = write_run(root / "failed", [0.1], "algorithm.name=flash", "seed=2", rounds=2)
        deliver(failed, status="FAILED", artifacts=False)
        yield root


def deliver(folder, status="FINISHED", artifacts=True):
    (folder / "clients.csv").write_text("client,samples,accuracy\n0,10,0.5\n1,10,0.75\n")
    config = resolve(folder / "config.yaml")
    target = TrackingTarget(f"sqlite:///{folder.parent}/mlflow.db", benchmark_name(config), folder.name)
    # What does not apply to a method is written as "-" or None, by versions.
    params = {**in_short(config), **config.flat(), "algorithm.other": "-"}
    if config.seed == 1:  # up to 0.1 the keys of other choices were there too
        params |= {"partition.shards_per_client": 2, "schedule.buffer": None, "schedule.max_staleness": 3}
    tracker = Tracker(folder, target, params=params, tags={"method": config.algorithm.name, "kind": "run"})
    tracker.start()
    files = [folder / "sparsity_per_layer.csv", folder / "clients.csv"] if artifacts else []
    assert tracker.finish(status, files, {}, deadline_s=250)


@pytest.fixture
def uri(root):
    return f"sqlite:///{root}/mlflow.db"


def test_a_run_read_from_mlflow_is_the_run_read_from_its_folder(root, uri):
    stored = {run.name: run for run in read_experiment(uri, "digits-lda0.5")}
    assert len(stored) == 5
    for name in ("topk-1", "failed"):
        run, there = stored[name], read_folder(root / name)
        assert run.params == there.params
        assert (run.seed, run.reached, run.planned) == (there.seed, there.reached, there.planned)
        assert run.series.keys() == there.series.keys()
        for key, series in there.series.items():
            np.testing.assert_array_equal(run.series[key].rounds, series.rounds)
            np.testing.assert_array_equal(run.series[key].values, series.values)
    assert stored["topk-1"].layers == read_folder(root / "topk-1").layers
    np.testing.assert_array_equal(stored["topk-1"].clients, [0.5, 0.75])
    assert not stored["failed"].layers  # no file came with it


def test_a_failed_run_is_left_out(uri):
    grouped = group_runs(read_experiment(uri, "digits-lda0.5"))
    assert {group.label: len(group.runs) for group in grouped.groups} == {"flash": 2, "topk": 2}
    assert [(run.name, why) for run, why in grouped.left_out] == [
        ("failed", "ended after round 1 of 2 (failed)")
    ]


def test_a_filter_picks_runs(uri):
    rule = "tags.method = 'topk' and params.seed = '1'"
    assert [run.name for run in read_experiment(uri, "digits-lda0.5", rule)] == ["topk-1"]


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("digits-lda05", "", r"known there: .*digits-lda0.5.*; did you mean digits-lda0.5\?"),
        (
            "digits-lda0.5",
            "tags.method is topk",
            r"--filter \"tags.method is topk\"|--filter 'tags.method is topk'",
        ),
        ("digits-lda0.5", "tags.method = 'fedavg'", "no run of experiment 'digits-lda0.5' passes the filter"),
        ("Default", "", "no run of experiment 'Default' is left"),
    ],
)
def test_a_wrong_source_is_one_clear_error(uri, name, rule, message):
    with pytest.raises(ComparisonError, match=message):
        read_experiment(uri, name, rule)


@pytest.fixture
def one_picture(monkeypatch):
    """The first plot alone: the others are drawn by the report's own tests."""
    curves = plots.curves
    monkeypatch.setattr(plots, "curves", lambda selects: curves(selects)[:1])
    monkeypatch.setattr(plots, "endings", lambda groups: ())


@pytest.mark.usefixtures("one_picture")
def test_compare_writes_a_report_and_keeps_it_in_the_experiment(root, uri, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "digits-lda0.5", "--root", str(root), "--output", "out"]) == 0
    shown = capsys.readouterr().out
    assert "flash" in shown
    assert "left out: failed, ended after round 1 of 2 (failed)" in shown
    assert "report    out/report.html" in shown
    client = tracking_store.connect(uri)
    experiment = client.get_experiment_by_name("digits-lda0.5").experiment_id
    (run,) = client.search_runs([experiment], "tags.kind = 'comparison'")
    assert run.info.run_name == "comparison of 4 runs"
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"] == Path("out/table.md").read_text()
    kept = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "table.csv", "table.tex", "figures"} <= kept
    # A second comparison does not take the first one for a run.
    assert len(read_experiment(uri, "digits-lda0.5")) == 5


@pytest.mark.usefixtures("one_picture")
def test_compare_without_a_name_reads_the_folders_of_the_root(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(root)
    assert main(["compare", "--round", "1", "--target", "30"]) == 0
    shown = capsys.readouterr().out
    assert "left out" not in shown  # after round 1 the failed run counts too
    assert "MB to 30 %" in shown
    assert (tmp_path / "comparison" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no store yet at"),
        (["--filter", "tags.method = 'x'"], "name one MLflow experiment"),
        (["a", "b"], "name one MLflow experiment"),
        ([], "runs: there is no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["compare", *words])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
