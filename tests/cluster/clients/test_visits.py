"""A client's visit leaves nothing behind: what it allocated is free for the next one at once."""

import gc

import pytest
import torch

import algorithms
from algorithms import Client, Visit
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from tests.tiny_experiment import tiny_federation


@pytest.fixture
def left_behind():
    """Called after something, tells which visits and tensors of it only the garbage collector can free."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def found():
        gc.collect()
        return [each for each in gc.garbage if isinstance(each, Visit | Client | torch.Tensor)]

    yield found
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def after_three_rounds(tmp_path, method):
    """What is made once is made by then; FedDST's next round is one of its readjustments."""
    more = {"readjust_interval": 1} if method == "feddst" else {}
    config = tiny_federation(tmp_path, algorithm={"name": method, **more}, rounds=5, on_client_error="skip")
    federation = Federation.of(config)
    engine = InlineEngine(federation.setup())
    driver = Driver(RunFolder.create(tmp_path / "run", config), federation, engine)
    for _ in range(3):
        driver._round()
    return driver


@pytest.mark.parametrize("method", sorted(algorithms.registry()))
def test_nothing_of_a_visit_waits_for_the_garbage_collector(tmp_path, method, request):
    driver = after_three_rounds(tmp_path, method)
    left_behind = request.getfixturevalue("left_behind")
    driver._round()
    assert left_behind() == []


def test_nor_of_one_that_failed(tmp_path, monkeypatch, request):
    driver = after_three_rounds(tmp_path, "sparsyfed")
    left_behind = request.getfixturevalue("left_behind")
    monkeypatch.setattr("algorithms.sparsyfed.SparsyFedClient.finish", fail)
    monkeypatch.setattr("cluster.clients.client._logger.disabled", True)  # a record holds the traceback
    driver._round()
    assert left_behind() == []


def fail(client):
    raise ValueError("no update today")
