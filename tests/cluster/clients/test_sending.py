"""On a GPU an update crosses the wire while the next client trains; here a thread and copies do that."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import cluster
from cluster.clients import client
from cluster.clients.local_training import Trainer
from cluster.clients.transfers import Staging
from cluster.exchange import ClientError
from cluster.records.run_folder import RunFolder, comparable
from cluster.transport import wire
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def overlapped(monkeypatch):
    """Hosts that send while they train; returns the two arrays of every size that fetches take turns with."""
    pinned, fetches, threads = {}, {}, []

    def fetch(self, tensor):
        key = (id(self), tensor.dtype, tensor.numel())
        fetches[key] = fetches.get(key, 0) + 1
        array = pinned.setdefault((*key, fetches[key] % 2), tensor.numpy().copy())
        array[...] = tensor.numpy()
        return array

    class Recorded(ThreadPoolExecutor):
        def submit(self, *work):
            threads.append(work)
            return super().submit(*work)

    build, encode = client.ClientHost.__init__, wire.encode

    def slow(*arguments, **options):
        time.sleep(0.1)  # long enough for the next client to be trained
        return encode(*arguments, **options)

    def with_uplink(self, workload, gpus=None):
        build(self, workload, gpus)
        self._sending = Recorded(1)

    monkeypatch.setattr(wire, "encode", slow)
    monkeypatch.setattr(Staging, "fetch", fetch)
    monkeypatch.setattr(client.ClientHost, "__init__", with_uplink)
    return threads


@pytest.mark.parametrize("algorithm", [{"name": "fedavg"}, {"name": "sparsyfed", "sparsity": 0.7}])
def test_what_is_sent_while_the_next_client_trains_is_the_same(tmp_path, request, algorithm):
    settings = tiny_federation(tmp_path, cohort=6, algorithm=algorithm)
    cluster.run(settings, tmp_path / "one-by-one")
    sent = request.getfixturevalue("overlapped")
    cluster.run(settings, tmp_path / "overlapped")
    assert len(sent) == 6 * settings.rounds
    models = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("one-by-one", "overlapped")]
    assert models[0] == models[1]
    lines = [
        [comparable(line) for line in RunFolder(tmp_path / run).rounds()]
        for run in ("one-by-one", "overlapped")
    ]
    assert lines[0] == lines[1]


def test_what_fails_on_the_way_is_named(tmp_path, overlapped, monkeypatch):
    encode = wire.encode

    def fail(*arguments, **options):
        if len(overlapped) == 2:
            raise ValueError("planted failure")
        return encode(*arguments, **options)

    monkeypatch.setattr(wire, "encode", fail)
    with pytest.raises(ClientError, match="failed in round 1, stage encode: ValueError: planted failure"):
        cluster.run(tiny_federation(tmp_path, cohort=6), tmp_path / "run")


def test_a_client_that_fails_to_train_is_skipped_and_the_one_before_it_is_folded(
    tmp_path, overlapped, monkeypatch
):
    visit = Trainer.visit

    def fail(self, number, *rest, **more):
        if number == 2:
            raise ValueError("planted failure")
        return visit(self, number, *rest, **more)

    monkeypatch.setattr(Trainer, "visit", fail)
    cluster.run(tiny_federation(tmp_path, cohort=6, on_client_error="skip"), tmp_path / "run")
    for line in RunFolder(tmp_path / "run").rounds():
        assert line["clients/refused_list"] == [[2, "failed in stage train: ValueError: planted failure"]]
        assert line["clients/trained"] == 6
