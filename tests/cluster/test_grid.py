"""A grid is many runs in one folder: named, skipped when complete, resumed when not."""

import pytest

from cluster.grid import expand, run_grid, table
from cluster.run_folder import RunFolder
from cluster.trees import ConfigError

GRID = """
extends: quickstart
rounds: 3
cohort: 2
execution: inline
local: {epochs: 1}
model: {name: mlp, hidden: [8]}
tracking: {enabled: false}
grid:
  algorithm: [{name: fedavg}, {name: topk}, {name: sparsyfed, beta: 1.5}]
  seed: [0, 1]
"""


@pytest.fixture
def grid_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GRID)
    return path


def quiet(name, config):
    return lambda line: None


def test_every_point_is_a_run_of_its_own_name(grid_file):
    runs = expand(grid_file, ["algorithm.sparsity=0.8"])
    names = ["fedavg-seed0", "fedavg-seed1", "topk-seed0", "topk-seed1"]
    assert list(runs) == [*names, "sparsyfed-beta1.5-seed0", "sparsyfed-beta1.5-seed1"]
    assert runs["topk-seed1"].seed == 1
    assert runs["topk-seed1"].algorithm.options == {"sparsity": 0.8}
    assert runs["fedavg-seed0"].algorithm.options == {}  # a dense method has no sparsity to override


def test_a_single_experiment_is_no_grid():
    assert expand("quickstart") is None


@pytest.mark.parametrize("override", ["algorithm.name=topk", "seed=3"])
def test_what_the_grid_varies_cannot_be_overridden(grid_file, override):
    with pytest.raises(ConfigError, match="the grid itself varies algorithm, seed"):
        expand(grid_file, [override])


def test_a_grid_run_again_resumes_what_is_not_complete(grid_file, tmp_path):
    overrides = ["partition.clients=4"]
    short = run_grid(expand(grid_file, [*overrides, "stop_after=1"]), tmp_path / "out", started=quiet)
    assert [result.summary["rounds"] for result in short.values()] == [1] * 6
    begun = []

    def started(name, config):
        begun.append(name)
        return lambda line: None

    whole = run_grid(expand(grid_file, overrides), tmp_path / "out", started=started)
    assert len(begun) == 6
    assert all(result.summary["complete"] for result in whole.values())
    run_grid(expand(grid_file, overrides), tmp_path / "out", started=started)
    assert len(begun) == 6  # nothing was computed again
    rows = table(whole)
    assert [row[0] for row in rows[1:]] == list(whole)
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 8
    assert len(RunFolder(tmp_path / "out" / "topk-seed0").rounds()) == 3


def test_a_folder_of_another_grid_is_refused(grid_file, tmp_path):
    overrides = ["partition.clients=4", "stop_after=1"]
    run_grid(expand(grid_file, overrides), tmp_path / "out", started=quiet)
    with pytest.raises(ConfigError, match="another configuration"):
        run_grid(expand(grid_file, [*overrides, "local.lr=0.01"]), tmp_path / "out", started=quiet)
