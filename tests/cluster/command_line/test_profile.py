"""Phases of a run from its lines; the bench command."""

from __future__ import annotations

import json

import pytest

from cluster import cli
from cluster.command_line import bench
from cluster.command_line.profile import phases
from cluster.records.run_folder import RunFolder
from tests.tiny_experiment import run_inline, tiny_federation


def test_phases_worked_by_hand():
    # Two rounds of 2 s on 4 actors: 16 actor seconds, of which training took 4 + 8 = 12 and folding 1 + 1.
    lines = [
        {
            "time/round_s": 2.0,
            "time/actors": 4,
            "time/clients_train_s": train,
            "time/clients_fold_s": 1.0,
            "time/step_s": 0.1,
            "time/log_s": 0.5,
        }
        for train in (4.0, 8.0)
    ]
    found = {one.name: one for one in phases(lines)}
    assert list(found) == ["train", "fold", "step", "log"]
    assert (found["train"].median_s, found["train"].total_s, found["train"].share) == (6.0, 12.0, 0.75)
    assert (found["fold"].where, found["fold"].share) == ("actors", 0.125)
    assert (found["step"].where, found["step"].share) == ("driver", pytest.approx(0.05))
    assert (found["log"].where, found["log"].share) == ("hidden", 0.25)


def test_a_runs_lines_carry_every_phase(tmp_path):
    config = tiny_federation(tmp_path, checkpoint_every=1, rounds=3)
    lines = run_inline(config, tmp_path / "run").lines
    found = {one.name: one.total_s for one in phases(lines)}
    wanted = {"broadcast", "train", "encode", "decode", "fold", "evaluate", "step", "log", "checkpoint"}
    assert wanted <= set(found)
    assert all(found[name] > 0 for name in wanted)
    busy = sum(found[name] for name in ("train", "encode", "decode", "fold", "evaluate"))
    assert busy < sum(line["time/round_s"] for line in lines)


def test_run_with_profile_ends_in_the_table(tmp_path, capsys):
    words = ["execution=inline", "rounds=2", "local.epochs=1", "cohort=2", "tracking.enabled=false"]
    assert cli.main(["run", *words, "--profile", "--output", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    for phase in phases(RunFolder(tmp_path / "run").rounds()):
        assert phase.meaning in shown
    assert "2 rounds; 1 actor, busy" in shown


def test_a_grid_has_no_profile(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "compare-digits", "--profile"])
    assert stopped.value.code == 2
    assert "--profile shows one" in capsys.readouterr().err


def test_bench_without_the_repository_says_so(monkeypatch, tmp_path, capsys):
    place = tmp_path / "site-packages" / "cluster" / "command_line" / "bench.py"
    monkeypatch.setattr(bench, "__file__", str(place))
    assert cli.main(["bench"]) == 2
    assert "is no checkout; clone it and install it from there" in capsys.readouterr().err


def test_bench_lists_runs_stores_and_compares(tmp_path, capfd):
    assert cli.main(["bench", "round", "--repeat", "0"]) == 2
    assert "error: --repeat 0: expected a number from 1" in capfd.readouterr().err
    stored = tmp_path / "then.json"
    from tests.benchmarks.report import Figure, comparison, table, write

    figures = [Figure("round", "8x8", "ray/bare", 1.2, 1.15), Figure("round", "8x8", "round ms", 50.0)]
    write(figures, stored)
    assert json.loads(stored.read_text())["figures"][0]["value"] == 1.2
    assert "1.2! (<= 1.15)" in table(figures)
    now = [Figure("round", "8x8", "ray/bare", 1.08, 1.15), Figure("round", "28x28", "ray/bare", 1.0)]
    lines = comparison(now, stored).splitlines()
    assert lines[-2].split() == ["round:", "8x8", "ray/bare", "1.2", "1.08", "0.90"]
    assert len(lines) == 4  # what only one of the two has is left out
