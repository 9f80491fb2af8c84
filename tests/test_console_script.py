"""The installed ``sparsyfed`` in an empty folder that holds a user's own modules, as the README has them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).with_name("sparsyfed")

#: Method, model, data, partition and sampler, each in a file of its own.
MODULES = {
    "my_method.py": (ROOT / "tests" / "example_method.py").read_text(encoding="utf-8"),
    "my_model.py": """
from torch import nn

def build(*, input_shape, classes, width=8):
    size = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.ReLU(), nn.Linear(width, classes))
""",
    "my_data.py": """
import numpy as np

def load_images():
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, size=(40, 6, 6), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(40) % 3
    return arrays
""",
    "my_partition.py": (ROOT / "tests" / "example_partition.py").read_text(encoding="utf-8"),
    "my_sampler.py": """
def first(offset=0):
    def draw(rng, count, candidates):
        return offset + rng.choice(candidates.clients - offset, size=count, replace=False)
    return draw
""",
}
OWN = (
    "algorithm.name=my_method:RandomK",
    "algorithm.sparsity=0.5",
    "model.name=my_model:build",
    "model.width=6",
    "data.name=my_data:load_images",
    "partition.name=my_partition:Halves",
    "partition.leak=0.25",
    "sampler.name=my_sampler:first",
    "sampler.offset=1",
)
SMALL = ("rounds=1", "partition.clients=4", "cohort=3", "local.epochs=1")


@pytest.fixture
def folder(tmp_path):
    """An empty folder with the modules."""
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def sparsyfed(folder, *words):
    """The console script, as a terminal in that folder starts it."""
    if not SCRIPT.is_file():
        pytest.skip("sparsyfed is not installed beside this Python")
    # Another checkout may be the installed one; the folder itself is on no path.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "HOME": str(folder)}
    command = [str(SCRIPT), *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("execution", ["inline", "ray"])
def test_modules_of_the_working_directory_are_found(folder, execution):
    words = [*OWN, *SMALL, f"execution={execution}", "tracking.enabled=false", "--output", "out"]
    ended = sparsyfed(folder, "run", *words)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((folder / "out" / "result.json").read_text())["complete"]


def test_a_choice_of_ones_own_is_described_and_its_keys_are_checked(folder):
    shown = sparsyfed(folder, "describe", "partition", "my_partition:Halves")
    assert shown.returncode == 0, shown.stderr
    assert "The first half of the clients see the lower classes" in shown.stdout
    assert "share of samples that go to anybody" in shown.stdout
    assert "sparsyfed run partition.name=my_partition:Halves partition.leak=0.1" in shown.stdout
    assert sparsyfed(folder, "describe", "my_partition:Halves").stdout == shown.stdout
    wrong = sparsyfed(folder, "run", *OWN[:-2], "partition.laek=1")
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "error: partition.laek: my_partition:Halves has no such field; its fields: leak, and of every "
        "partition clients, seed; did you mean leak?\n"
    )


def test_an_error_inside_a_module_shows_where_it_is(folder):
    (folder / "my_model.py").write_text("import nowhere_to_be_found\n")
    ended = sparsyfed(folder, "describe", "model.name=my_model:build")
    assert ended.returncode == 1
    assert 'my_model.py", line 1' in ended.stderr
    assert "No module named 'nowhere_to_be_found'" in ended.stderr
