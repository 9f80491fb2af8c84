"""Sparsity by layer, from a run's folder through CSV to the picture."""

import csv

import cluster
from tests.benchmarks import layers
from tests.tiny_experiment import run_inline, tiny_federation


def test_from_runs_to_the_picture(tmp_path, capsys):
    config = tiny_federation(tmp_path, rounds=2, algorithm={"name": "topk", "sparsity": 0.8})

    cluster.run(config, tmp_path / "runs" / "one")
    assert layers.main(["--collect", str(tmp_path / "runs"), "--rounds", "2"]) == 0
    (tmp_path / "rows.csv").write_text(text := capsys.readouterr().out)
    rows = list(csv.DictReader(text.splitlines()))
    line = run_inline(config, tmp_path / "again").lines[1]["sparsity/layers"]
    assert [float(row["sparsity"]) for row in rows] == [float(f"{100 * share:.4g}") for share in line]
    assert {(row["method"], row["seed"], row["round"]) for row in rows} == {("topk", "3", "2")}
    figure = layers.draw(layers.read(tmp_path / "rows.csv"), tmp_path / "picture.png")
    [panel] = figure.axes
    assert panel.get_title() == "topk"
    assert [t.get_text() for t in panel.get_xticklabels()] == [row["layer"] for row in rows]
