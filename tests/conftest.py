"""What every test shares: quiet libraries, one torch thread, data sets that are decoded once."""

import os
import re
import signal

# Before any of them is imported.
os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true",
    GIT_PYTHON_REFRESH="quiet",
    RAY_USAGE_STATS_ENABLED="0",
)

import pytest
import torch

# Helpers whose assertions explain themselves like those of a test.
pytest.register_assert_rewrite(
    "tests.algorithms.masked",
    "tests.cluster.actors.three_nodes",
    "tests.cluster.records.interrupted_runs",
    "tests.cluster.records.tracked_runs",
    "tests.tiny_experiment",
)

# A shell that starts the tests in the background has SIGINT ignored; some of them press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)

#: What a test module says that starts Ray or a process, itself or through the helpers that it imports.
_STARTS = re.compile(r"\b(start_ray|subprocess|multiprocessing|three_nodes|chaos)\b")


def pytest_collection_modifyitems(items):
    """Mark what starts Ray or a process, so that ``pytest -m "not ray"`` is quick.

    With ``-n`` one worker plays all of it, one after another, and the others share the rest by file.
    """
    paths = {item.path for item in items}
    starts = {path: _STARTS.search(path.read_text(encoding="utf-8")) for path in paths}
    for item in items:
        if starts[item.path]:
            item.add_marker("ray")
        item.add_marker(pytest.mark.xdist_group("ray" if starts[item.path] else item.path.as_posix()))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Folder of decoded data sets (``data.cache``), shared by all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs without their pictures, which take longer to draw than tiny runs to compute."""
    from cluster.records import outputs

    for name in ("picture", "curves", "population"):
        monkeypatch.setattr(outputs, name, lambda *_, **__: None)


@pytest.fixture(scope="module")
def start_ray():
    """Starts a Ray cluster of the module's own on this machine, with that many logical CPUs."""
    import ray

    def start(cpus):
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=2**28,
        )

    yield start
    ray.shutdown()
