"""The rooms keep their walls, and an installed wheel runs in an empty folder."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import algorithms
import cluster
import sparsyfed

ROOT = Path(__file__).parents[1]
STANDARD = sys.stdlib_module_names


def imported(path):
    """Top-level names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_algorithms_knows_torch_and_numpy_only():
    for path in (ROOT / "algorithms").rglob("*.py"):
        assert set(imported(path)) - STANDARD <= {"torch", "numpy", "algorithms"}, path


def test_cluster_does_not_import_tuning():
    for path in (ROOT / "cluster").rglob("*.py"):
        if path.name != "cli.py":
            assert "tuning" not in imported(path), path


def test_the_public_names_are_those_of_their_rooms():
    """One module for all that pages and notebooks import; what it tells a type checker is what it gives."""
    told = {}
    for node in ast.walk(ast.parse((ROOT / "tuning/public.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "importlib"):
            told |= {alias.name: node.module for alias in node.names if alias.name != "*"}
    assert set(sparsyfed.__all__) == {*told, *algorithms.__all__} - {"__version__"}
    assert not told.keys() & set(algorithms.__all__)
    assert len(sparsyfed.__all__) == len(set(sparsyfed.__all__))
    assert set(sparsyfed.__all__) <= set(dir(sparsyfed))
    for name in sparsyfed.__all__:
        home = importlib.import_module(told.get(name, "algorithms"))
        assert getattr(sparsyfed, name) is getattr(home, name), name
    assert sparsyfed.__version__ == cluster.__version__
    with pytest.raises(AttributeError, match=r"^module 'sparsyfed' has no attribute 'rum'$"):
        _ = sparsyfed.rum


def test_a_file_with_a_method_brings_torch_and_numpy_alone():
    absent = ("ray", "mlflow", "optuna", "datasets", "pandas", "pydantic")
    code = f"import sys, sparsyfed; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_actor_imports_neither_mlflow_nor_optuna_nor_datasets():
    absent = ("mlflow", "optuna", "datasets")
    code = f"import sys, cluster.clients.client; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_imports_no_compiler_of_torchs(tmp_path):
    """Which takes a second of CPU in the command, the driver and every actor."""
    code = (
        "import sys, pathlib, cluster; from tests.tiny_experiment import tiny_federation;"
        "place = pathlib.Path(sys.argv[1]);"
        "cluster.run(tiny_federation(place, algorithm={'name': 'sparsyfed'}), place / 'run');"
        "print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked where nothing of the checkout is importable."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return site


def test_an_installed_wheel_runs_in_an_empty_folder(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    overrides = ["rounds=1", "local.epochs=1", "execution=inline", "tracking.enabled=false"]
    command = [sys.executable, "-m", "cluster", "run", *overrides, "--output", "run"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["complete"]
    where = [sys.executable, "-c", "import cluster, sparsyfed; print(cluster.__file__, sparsyfed.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.count(str(installed)) == 2
