"""Runs from folders: what is found, what is read of them, and what cannot be."""

import numpy as np
import pytest

from cluster.compare.reading import (
    ComparisonError,
    find_folders,
    read_folder,
    read_folders,
    values_of_clients,
)
from cluster.workload.objectives import Classification
from tests.cluster.compare.made import LAYERS, write_run


def test_a_run_is_read_from_its_folder(tmp_path):
    path = write_run(tmp_path / "one", [0.5, None, 0.75], "seed=3", "algorithm.name=topk")
    run = read_folder(path)
    assert (run.name, run.place, run.seed, run.reached, run.planned) == ("one", str(path), "3", 3, 3)
    assert run.params["algorithm.name"] == "topk"
    assert run.params["algorithm.sparsity"] == "0.9"  # from the preset; defaults are filled in
    accuracy = run.series["test/accuracy"]
    np.testing.assert_array_equal(accuracy.rounds, [1, 3])  # the second round was not evaluated
    np.testing.assert_array_equal(accuracy.values, [0.5, 0.75])
    np.testing.assert_array_equal(run.series["comm/uplink_bytes_total"].values, [2e6, 4e6, 6e6])
    assert "time/simulated_s" not in run.series
    assert run.layers == dict(zip(LAYERS, (0.25, 0.5, 0.75), strict=True))
    assert len(run.clients) == 0


def test_runs_of_two_seeds_share_all_other_parameters(tmp_path):
    runs = [read_folder(write_run(tmp_path / str(seed), [0.5], f"seed={seed}")) for seed in (0, 7)]
    assert [run.seed for run in runs] == ["0", "7"]
    without = [{key: value for key, value in run.params.items() if key != "seed"} for run in runs]
    assert without[0] == without[1]


def test_folders_are_found_at_any_depth_but_not_among_mlflows_copies(tmp_path):
    write_run(tmp_path / "grid" / "a", [0.5])
    write_run(tmp_path / "b", [0.5])
    write_run(tmp_path / "mlartifacts" / "0123" / "artifacts", [0.5])
    assert find_folders([tmp_path, tmp_path / "b"]) == [tmp_path / "b", tmp_path / "grid" / "a"]


def test_where_there_is_no_run_the_error_says_so(tmp_path):
    with pytest.raises(ComparisonError, match="no run lies in"):
        read_folders([tmp_path])
    with pytest.raises(ComparisonError, match="nowhere: there is no such folder"):
        read_folders([tmp_path / "nowhere"])


def test_a_run_that_cannot_be_read_says_why(tmp_path):
    for name, text in (("words", "just words"), ("broken", "a: [")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    damaged = write_run(tmp_path / "lines", [0.5])
    (damaged / "rounds.jsonl").write_text("{}\n")
    for run in read_folders([tmp_path]):
        assert run.status.startswith("cannot be read: "), run
        assert not run.series


def test_a_torn_last_line_is_not_read(tmp_path):
    path = write_run(tmp_path / "one", [0.5, 0.6])
    with open(path / "rounds.jsonl", "a") as file:
        file.write('{"round": 3, "test/acc')
    assert read_folder(path).reached == 2


def test_a_method_that_is_not_installed_is_read_all_the_same(tmp_path):
    path = write_run(tmp_path / "one", [0.5])
    config = (path / "config.yaml").read_text().replace("name: sparsyfed", "name: away:Method")
    (path / "config.yaml").write_text(config)
    assert read_folder(path).params["algorithm.name"] == "away:Method"
    assert read_folder(path).params["partition.alpha"] == "0.5"


def test_accuracies_of_clients(tmp_path):
    path = tmp_path / "clients.csv"
    path.write_text("client,samples,accuracy\n0,10,0.5\n1,12,\n2,9,1.0\n")
    np.testing.assert_array_equal(values_of_clients(path, Classification.measures), [0.5, 1.0])
    path.write_text("client,samples,accuracy_before,accuracy_after,accuracy_global\n0,10,0.1,0.2,0.75\n")
    np.testing.assert_array_equal(values_of_clients(path, Classification.measures), [0.75])
    assert len(values_of_clients(tmp_path / "none.csv", Classification.measures)) == 0


def test_a_run_as_it_was_after_a_round(tmp_path):
    path = write_run(tmp_path / "one", [0.5, 0.6, 0.7])
    (path / "clients.csv").write_text("client,samples,accuracy\n0,10,0.5\n")
    early = read_folder(path).until(2)
    assert (early.reached, early.series["test/accuracy"].values.tolist()) == (2, [0.5, 0.6])
    assert not early.layers
    assert len(early.clients) == 0  # both are known of the end alone
    assert read_folder(path).until(3).layers
