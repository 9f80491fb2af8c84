"""Shards of a grid are processes that share nothing but the folder; a killed one's runs are taken over."""

import os
import subprocess
import sys
import time

import pytest

from cluster.cli import main
from cluster.grid import expand
from cluster.records.run_folder import BusyError, RunFolder, comparable

pytestmark = pytest.mark.usefixtures("no_pictures")

GRID = """
extends: quickstart
rounds: 3
cohort: 2
execution: inline
partition: {clients: 4}
local: {epochs: 1}
model: {name: mlp, hidden: [8]}
tracking: {enabled: false}
callbacks: ['stall:Stall']
grid: {seed: [0, 1, 2, 3]}
"""

#: Holds a run for ever once its second round is stored, where the environment names a file to leave.
STALL = """
import os, pathlib, time

class Stall:
    def on_round(self, line, state):
        if line["round"] == 2 and "STALLED" in os.environ:
            pathlib.Path(os.environ["STALLED"]).touch()
            time.sleep(3600)
"""


@pytest.fixture
def grid_file(tmp_path, monkeypatch):
    (tmp_path / "stall.py").write_text(STALL)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(GRID)
    return tmp_path / "mine.yaml"


def test_runs_are_dealt_one_after_the_other(grid_file):
    grid = expand(grid_file)
    assert list(grid.shard(1, 3).runs) == ["seed0", "seed3"]
    assert list(grid.shard(2, 3).runs) == ["seed1"]
    assert list(grid.shard(3, 3).runs) == ["seed2"]
    assert list(grid.shard(5, 5).runs) == []  # more shards than runs
    assert list(grid.shard(1, 3).whole) == ["seed0", "seed1", "seed2", "seed3"]


@pytest.mark.parametrize(
    "value", ["0/10", "11/10", "3", "3/", "/3", "a/b", "-1/2", "1/0", "1.5/2", "1/2/3", ""]
)
def test_a_wrong_shard_is_one_clear_line(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "paper-methods", f"--shard={value}"])
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(
        "error: argument --shard: expected K/N, shard K of N with K from 1 to N, such as 3/10"
    )
    assert f"found {value!r}" in line


def test_one_run_has_no_shards(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "quickstart", "--shard", "1/2"])
    assert "quickstart is one run; --shard deals the runs of a grid" in capsys.readouterr().err


def test_a_run_is_claimed_before_its_folder_is_there(tmp_path):
    with RunFolder(tmp_path / "seed0").claimed(), RunFolder(tmp_path / "seed1").claimed():
        with pytest.raises(BusyError, match="seed0 is being run by another process"):
            RunFolder(tmp_path / "seed0").claimed().__enter__()
        assert not (tmp_path / "seed0").exists()
    with RunFolder(tmp_path / "seed0").claimed():
        pass


def test_what_was_killed_while_it_made_a_folder_is_cleared_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.clear_half_made()
    assert not folder.path.exists()
    folder.checkpoints.mkdir(parents=True)
    (folder.path / ".config.yaml.4711.tmp").write_text("rou")
    folder.clear_half_made()
    assert not any(folder.path.iterdir())
    for name in ("notes.txt", "checkpoints/mine", "config.yaml"):
        folder.checkpoints.mkdir(exist_ok=True)
        (folder.path / ".config.yaml.4711.tmp").touch()
        (folder.path / name).touch()
        folder.clear_half_made()
        assert (folder.path / name).exists()
        (folder.path / name).unlink()


def test_a_killed_shards_runs_are_taken_over_and_none_is_played_twice(grid_file, tmp_path, capsys):
    out = tmp_path / "out"

    def command(shard):
        return ["run", str(grid_file), "--shard", shard, "--output", str(out)]

    def rows():
        return [line.split(",")[0] for line in (out / "table.csv").read_text().splitlines()[1:]]

    stalled = tmp_path / "stalled"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    first = subprocess.Popen(
        [sys.executable, "-m", "cluster", *command("1/2")],
        env=os.environ | {"STALLED": str(stalled), "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )
    try:
        while not stalled.exists():
            assert first.poll() is None
            time.sleep(0.05)
        # The same shard once more, while the first one holds seed0: it plays what else there is.
        assert main(command("1/2")) == 1
        said = capsys.readouterr()
        assert "2 of 4 runs, 0 complete before" in said.out
        assert f"error: seed0: {out / 'seed0'} is being run by another process" in said.err
        assert (rows(), first.poll()) == (["seed2"], None)
        before = RunFolder(out / "seed0").rounds()
        assert [line["round"] for line in before] == [1, 2]
    finally:
        first.kill()
        first.wait()
    # Another shard keeps to its own runs; the table has all that is there.
    assert main(command("2/2")) == 0
    assert rows() == ["seed1", "seed2", "seed3"]
    assert RunFolder(out / "seed0").rounds() == before
    capsys.readouterr()
    assert main(command("1/2")) == 0
    assert "2 of 4 runs, 1 complete before" in capsys.readouterr().out
    assert rows() == ["seed0", "seed1", "seed2", "seed3"]
    whole = RunFolder(out / "seed0").rounds()
    assert [line["round"] for line in whole] == [1, 2, 3]
    assert [comparable(line) for line in whole[:2]] == [comparable(line) for line in before]
    # Nothing is left for whoever comes now, with shards or without.
    played = (out / "seed3" / "rounds.jsonl").stat().st_mtime_ns
    assert main(command("2/2")) == 0
    assert main(["run", str(grid_file), "--output", str(out)]) == 0
    assert (out / "seed3" / "rounds.jsonl").stat().st_mtime_ns == played
