"""What `sparsyfed describe GRID|STUDY` counts, and what it scales two rounds to."""

import pytest

from cluster.cli import main
from cluster.command_line.many_runs import Batch, Cost, _amounts, batches, cost_of
from cluster.configuration.config import resolve
from cluster.execution import run
from cluster.grid import expand
from cluster.records.run_folder import RunFolder
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


def described(capsys, *words):
    assert main(["describe", *words]) == 0
    return capsys.readouterr().out


def rows_of(text):
    return {cells[0]: cells[1:] for line in text.splitlines() if (cells := line.split())}


def test_a_grid_is_counted_by_what_its_runs_cost(capsys):
    grid = expand("compare-digits", ["seed=[0,1,2]", "rounds=7"])
    text = described(capsys, "compare-digits", "seed=[0,1,2]", "rounds=7")
    assert f"compare-digits: a grid  {len(grid.runs)} runs, {7 * len(grid.runs)} rounds" in text
    assert f"{70 * len(grid.runs):,} visits of a client" in text
    parts = batches(grid.runs)
    assert sum(part.runs for part in parts) == len(grid.runs)
    assert {part.config.algorithm.name for part in parts} == {c.algorithm.name for c in grid.runs.values()}
    rows = rows_of(text)
    assert rows["fedavg-seed0"] == ["3", "7"]
    assert "--probe" in text


def test_runs_that_cost_alike_are_one_row():
    base = ["algorithm.name=topk"]
    runs = {
        "first": resolve("quickstart", base),
        "seed": resolve("quickstart", [*base, "seed=3"]),
        "lr": resolve("quickstart", [*base, "local.lr=0.3", "partition.alpha=0.1"]),
        "sparser": resolve("quickstart", [*base, "algorithm.sparsity=0.99"]),
        "wider": resolve("quickstart", [*base, "model.hidden=64"]),
        "longer": resolve("quickstart", [*base, "rounds=31"]),
        "more": resolve("quickstart", [*base, "local.epochs=6"]),
    }
    found = [(part.name, part.runs) for part in batches(runs)]
    assert found == [("first", 3), ("sparser", 1), ("wider", 1), ("longer", 1), ("more", 1)]


def test_a_study_is_its_trials_and_final_runs(capsys, tmp_path):
    text = described(capsys, "study-digits")
    # Seven methods; local.lr is tuned for all, so that each has six trials, and five final seeds.
    assert "study-digits: a study of 7 methods  77 runs" in text
    rows = rows_of(text)
    assert rows["sparsyfed"] == ["11", "12"]
    (tmp_path / "mine.yaml").write_text(
        "extends: quickstart\nrounds: 12\ndata: {validation: 0.2}\nlocal: {epochs: 3}\n"
        "study: {trials: 6, methods: [topk, {name: flash, warmup_epochs: 6}]}\n"
    )
    rows = rows_of(described(capsys, str(tmp_path / "mine.yaml")))
    assert rows["topk"] == ["6", "12"]  # with nothing to tune it has one trial
    # Of 12 rounds of 3 epochs, a round 1 of 6 takes another's place.
    assert rows["flash"] == ["11", "11"]
    text = described(capsys, "study-digits", "study.pruner.name=hyperband")
    assert "at most: hyperband ends some early" in text


def test_amounts_by_hand():
    """3 runs of 1000 s and 2 of 2400 s are 7800 s; bytes add up alike."""
    cheap = Cost(5, 10, 1000.0, uplink_bytes=1e9, downlink_bytes=2e9, disk_bytes=5e6)
    dear = Cost(5, 10, 2400.0, uplink_bytes=4e9, downlink_bytes=8e9, disk_bytes=5e6)
    assert _amounts([(3, cheap), (2, dear)]) == ["2.2", "11", "22", "0.025"]


@pytest.mark.parametrize("method", ["topk", "flash"])
def test_a_probe_is_scaled_to_what_the_run_takes(tmp_path, method):
    """Bytes: exact where every round has the size of the second, as nearly with FLASH's fixed masks."""
    config = tiny_federation(tmp_path, rounds=5, algorithm={"name": method}, tracking={"enabled": False})
    whole = run(config, tmp_path / "whole")
    lines = RunFolder(whole.folder).rounds()
    cost = cost_of(Batch("x", config, 1))
    third = next(line for line in lines if line["round"] == 2)
    expected = {
        way: third[f"comm/{way}link_bytes_total"] + 3 * third[f"comm/{way}link_bytes"]
        for way in ("up", "down")
    }
    assert {"up": cost.uplink_bytes, "down": cost.downlink_bytes} == expected
    if method == "flash":
        assert cost.uplink_bytes == pytest.approx(whole.summary["uplink_bytes"], rel=0.02)
    assert cost.seconds > cost.start_s + 3 * cost.round_s
    disk = sum(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file())
    assert cost.disk_bytes == pytest.approx(disk, rel=0.3)
    assert list(tmp_path.glob("probe*")) == []


def test_a_probe_of_one_round_and_of_a_run_that_stops(tmp_path):
    config = tiny_federation(tmp_path, rounds=1, tracking={"enabled": False})
    cost = cost_of(Batch("x", config, 1))
    assert cost.seconds == pytest.approx(cost.start_s + cost.round_s)
    part = Batch("x", tiny_federation(tmp_path, rounds=9, stop_after=4), 1)
    assert part.rounds == 4


def test_the_probe_of_a_real_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["compare-digits", "execution=inline", "method=[fedavg,topk]", "seed=[0,1]", "local.epochs=1"]
    text = described(capsys, *words, "rounds=4", "--probe")
    rows = rows_of(text)
    assert rows["fedavg-seed0"][:2] == ["2", "4"]
    assert rows["all"][2] == "4"
    assert "From 2 rounds of the first run of each row" in text
    assert "Left out: checkpoints but the last" in text
    dense, sparse = (float(rows[name][5]) for name in ("fedavg-seed0", "topk-sparsity0.9-seed0"))
    # 2 runs of 4 rounds of 10 clients send 210,954 float32 each: 67.5 MB
    assert dense == pytest.approx(0.0675, abs=0.001)
    assert sparse < dense / 4
    assert not list(tmp_path.iterdir())  # nothing is left


def test_a_single_experiment_can_be_probed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = described(capsys, "execution=inline", "rounds=2", "local.epochs=1", "--probe")
    assert "configuration" in text
    assert rows_of(text)["quickstart"][:2] == ["1", "2"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["topk", "--probe"], "--probe plays two rounds of an experiment, grid or study; topk is none"),
        (
            ["compare-digits", "--picture", "x.png"],
            "--picture draws the partition of one run; compare-digits",
        ),
    ],
)
def test_what_cannot_be_probed_or_drawn(words, says, capsys):
    with pytest.raises(SystemExit):
        main(["describe", *words])
    assert says in capsys.readouterr().err
