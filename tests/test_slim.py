"""The slim inline path: what runs, and what is said, where only a few of the dependencies are installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.workload.parquet_folders import ROOT, write_dataset

#: The quickstart on generated images, made as small as it gets.
QUICKSTART = (
    "execution=inline",
    "rounds=2",
    "cohort=2",
    "partition.clients=6",
    "model.channels=[4,8]",
    "model.hidden=16",
    "model.groups=2",
    "local.epochs=1",
)


def slim(*words, cwd=ROOT):
    """A command where Ray and the other large dependencies are not installed: status, stdout, stderr."""
    command = [sys.executable, "-m", "tests.slim", "cluster", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def images(tmp_path):
    """A parquet folder as the hub stores it, with the names of the classes in the schema's metadata."""
    names = ["bee", "cat", "dog"]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    write_dataset(tmp_path / "images", shape=(8, 8, 3), train=48, test=12, features=features)
    return tmp_path / "images"


def test_the_inline_quickstart_runs_and_says_in_one_line_what_it_left_out(images, tmp_path):
    run = tmp_path / "run"
    data = (f"data.name=images data.path={images} data.cache={tmp_path / 'cache'}").split()
    status, out, err = slim("run", "quickstart", *QUICKSTART, *data, "--output", run)
    assert status == 0, err
    assert err.strip() == ("not installed here: mlflow (the run is not tracked), matplotlib (no pictures)")
    assert "2 of 2 rounds" in out
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert (run / "model.safetensors").is_file()
    assert (run / "sparsity_per_layer.csv").is_file()
    assert not (tmp_path / "mlflow.db").exists()
    (prepared,) = (tmp_path / "cache").glob("images-*/meta.json")
    assert json.loads(prepared.read_text())["classes"] == ["bee", "cat", "dog"]


def test_it_computes_the_bits_of_an_installation_with_everything(images, tmp_path):
    data = (f"data.name=images data.path={images} data.cache={tmp_path / 'cache'}").split()
    words = ("run", "quickstart", *QUICKSTART, *data, "tracking.enabled=false", "--output")
    status, _, err = slim(*words, tmp_path / "slim")
    assert status == 0, err
    full = [sys.executable, "-m", "cluster", *words, str(tmp_path / "full")]
    subprocess.run(full, cwd=ROOT, capture_output=True, check=True)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("slim", "full")]
    assert models[0] == models[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "quickstart"], "execution: ray, and Ray is not installed here"),
        (["run", "quickstart", "execution=inline"], "'digits' is a part of scikit-learn"),
        (
            ["run", "quickstart", "execution=inline", "data.name=uoft-cs/cifar10"],
            "by the package datasets, which is not installed here",
        ),
        (
            ["run", "quickstart", "execution=inline", "tracking.uri=sqlite:///a.db"],
            "MLflow is not installed here; install it (pip install mlflow), or set tracking.enabled=false",
        ),
        (["tune", "study-digits"], "tune needs optuna, which is not installed here: pip install optuna"),
        (["compare"], "which is not installed here: pip install "),
    ],
)
def test_what_needs_a_package_that_is_not_there_says_so_in_one_line(words, says, tmp_path):
    if words[0] == "run":
        words = [*words, f"data.cache={tmp_path / 'cache'}", "--output", tmp_path / "run"]
    status, _, err = slim(*words)
    assert status == 2
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert not Path(tmp_path / "run").exists()
