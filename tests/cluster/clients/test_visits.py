"""A client's visit leaves nothing behind: what it allocated is free for the next one at once."""

import gc

import pytest

import algorithms
from cluster.driver import Driver
from cluster.engine import InlineEngine
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from tests.tiny_experiment import tiny_federation


@pytest.fixture
def garbage():
    """What only the garbage collector can free from now on."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def collected():
        gc.collect()
        return list(gc.garbage)

    yield collected
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


@pytest.mark.parametrize("method", sorted(algorithms.registry()))
def test_nothing_of_a_visit_waits_for_the_garbage_collector(tmp_path, method, request):
    config = tiny_federation(tmp_path, algorithm={"name": method}, rounds=5)
    federation = Federation.of(config)
    driver = Driver(
        RunFolder.create(tmp_path / "run", config), federation, InlineEngine(federation.workload())
    )
    for _ in range(3):  # what is made once is made
        driver._round()
    collected = request.getfixturevalue("garbage")
    driver._round()
    left = [type(each).__name__ for each in collected()]
    assert left == []
