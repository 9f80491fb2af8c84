"""A cluster of three nodes, and a folder that they share."""

import pytest


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
