"""A client's visit leaves nothing behind: what it allocated is free for the next one at once."""

import gc

import pytest
import torch

import algorithms
from algorithms import Client, Visit
from algorithms.fedavg import FedAvg
from cluster.federation import Federation
from cluster.records.run_folder import RunFolder
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from tests.cluster.clients.tiny_visits import trainer_of
from tests.tiny_experiment import asked_for, tiny_federation


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


MORE = {
    "feddst": {"readjust_interval": 1},
    "flying_bird": {"readjust_interval": 1, "adaptive": True},
    "robust_bird": {"draw_rounds": 2},
    "splitmix": {"bases": 2},
}


def after_three_rounds(tmp_path, method):
    """What is made once is made by then; FedDST's next round is one of its readjustments."""
    section = {"name": method, **MORE.get(method, {})}
    options = {"rounds": 5, "on_client_error": "skip", **asked_for(method)}
    config = tiny_federation(tmp_path, algorithm=section, **options)
    federation = Federation.of(config)
    engine = InlineEngine(federation.setup())
    driver = Driver(RunFolder.create(tmp_path / "run", config), federation, engine)
    for _ in range(3):
        driver._round()
    return driver


@pytest.mark.parametrize("method", sorted(algorithms.registry().keys() - {"ma_echo"}))  # one round is its all
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


class Keeping(torch.nn.Module):
    """Keeps in evaluation what it made of its weight, until it trains, as timm's TinyViT does."""

    def __init__(self):
        super().__init__()
        self.layer, self.kept = torch.nn.Linear(64, 3, bias=False), None

    def train(self, mode=True):
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, images):
        product = self.layer(images.flatten(1))
        if self.training:
            return product
        self.kept = self.layer.weight * 1.0 if self.kept is None else self.kept
        return torch.nn.functional.linear(images.flatten(1), self.kept)


def test_an_evaluation_is_of_the_weights_at_hand():
    trainer = trainer_of(FedAvg(), model=Keeping())
    split, weights = trainer._data._split, [torch.randn(trainer.layout.size).numpy() for _ in range(2)]
    first, second, again = (trainer.evaluate(weights[which], split, 0, 60)["loss"] for which in (0, 1, 0))
    assert first != second
    assert first == again
