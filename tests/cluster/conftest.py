"""What several files share: the wire, recorded; tracking without waits and a store for it; three nodes."""

from dataclasses import replace

import pytest

from cluster.clients import client as client_module
from cluster.transport import downlink as downlink_module
from cluster.transport import wire


class Recorded:
    """The wire as one module sees it; keeps every message and every decoded update."""

    def __init__(self):
        self.sent, self.received = [], []

    def __getattr__(self, name):
        return getattr(wire, name)

    def encode(self, *arguments, **options):
        self.sent.append(wire.encode(*arguments, **options))
        return self.sent[-1]

    def decode(self, *arguments, **options):
        message = wire.decode(*arguments, **options)
        # The host decodes the next update into the same memory.
        self.received.append(replace(message, values=message.values.copy()))
        return message


@pytest.fixture
def uplink(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(client_module, "wire", recorded)
    return recorded


@pytest.fixture
def downlink(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(downlink_module, "wire", recorded)
    return recorded


@pytest.fixture(scope="module")
def fast_tracking():
    """MLflow without its noise and its waits."""
    from cluster.records import tracking, tracking_store

    with pytest.MonkeyPatch.context() as patch:
        for key, value in tracking_store.QUIET_DEFAULTS.items():
            patch.setenv(key, value)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        patch.setattr(tracking, "_GATHER_S", 0.02)
        patch.setattr(tracking, "_FIRST_RETRY_S", 0.1)
        patch.setattr(tracking, "_LAST_RETRY_S", 0.3)
        patch.setattr(tracking, "_CLOSING_RETRY_S", 0.2)
        yield


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """One SQLite store for all tests (its first use costs seconds), in a folder with a space in its name."""
    return f"sqlite:///{tmp_path_factory.mktemp('a store')}/mlflow.db"


@pytest.fixture(scope="module")
def nodes():
    """A head without GPUs and two nodes with two each; the labels tell them apart."""
    import ray
    from ray.cluster_utils import Cluster

    from tests.cluster.actors.three_nodes import HEALTH, add

    started = Cluster()
    add(started, "head", num_cpus=4, num_gpus=0, include_dashboard=False, _system_config=HEALTH)
    started.of_class = {name: add(started, name) for name in ("big", "small")}
    ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder of the decoded data and of the gate."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "data" / "gate").mkdir(parents=True)
    return folder
