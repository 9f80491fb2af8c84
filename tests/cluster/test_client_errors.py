"""A client that fails: it ends the run by name, or is skipped, counted and named like a refused one."""

import json

import pytest

import cluster
from cluster.client import ClientError, ClientHost
from cluster.driver import DivergedError
from cluster.local_training import Trainer
from cluster.run_folder import RunFolder
from tests.naive import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def config(tmp_path):
    """All of six clients in every round; client 2 will fail in round 2."""
    return lambda **more: tiny_federation(tmp_path, cohort=6, **more)


@pytest.fixture
def failing(monkeypatch):
    visit = Trainer.visit

    def fail(self, client, rows, sparsity, broadcast):
        if (broadcast.instructions.round, client) == (2, 2):
            raise ValueError("planted failure")
        return visit(self, client, rows, sparsity, broadcast)

    monkeypatch.setattr(Trainer, "visit", fail)


def test_a_failing_client_ends_the_run_with_its_round_stage_and_traceback(config, failing, tmp_path):
    with pytest.raises(
        ClientError, match="client 2 failed in round 2, stage train: ValueError: planted"
    ) as e:
        cluster.run(config(), tmp_path / "run")
    assert "test_client_errors.py" in str(e.value)


def test_a_skipped_client_is_named_and_the_round_is_that_of_the_others(
    config, failing, tmp_path, monkeypatch
):
    cluster.run(config(on_client_error="skip"), tmp_path / "skipped")
    last = RunFolder(tmp_path / "skipped").rounds()[-1]
    assert last["clients/refused"] == 1
    assert last["clients/refused_list"] == [[2, "failed in stage train: ValueError: planted failure"]]
    monkeypatch.undo()
    # The same weights as where the server refuses this client's update.
    fold = ClientHost._fold

    def refuse(self, broadcast, client, received, samples):
        if (broadcast.instructions.round, client) == (2, 2):
            return "refused"
        return fold(self, broadcast, client, received, samples)

    monkeypatch.setattr(ClientHost, "_fold", refuse)
    cluster.run(config(), tmp_path / "refused")
    models = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("skipped", "refused")]
    assert models[0] == models[1]
    # What was never trained cost no bytes and no FLOPs.
    whole = RunFolder(tmp_path / "refused").rounds()[-1]
    assert last["comm/uplink_bytes"] < whole["comm/uplink_bytes"]
    assert last["flops/dense"] < whole["flops/dense"]


def test_a_run_that_stopped_at_a_failing_client_resumes_without_it(config, failing, tmp_path):
    with pytest.raises(ClientError):
        cluster.run(config(checkpoint_every=1), tmp_path / "run")
    cluster.resume(tmp_path / "run", ["on_client_error=skip"])
    cluster.run(config(on_client_error="skip"), tmp_path / "skipped")
    models = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("run", "skipped")]
    assert models[0] == models[1]


def test_rounds_in_which_every_client_fails_end_the_run(config, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("planted failure")

    monkeypatch.setattr(Trainer, "visit", fail)
    with pytest.raises(DivergedError, match="client 0: failed in stage train: ValueError: planted failure"):
        cluster.run(config(rounds=5, on_client_error="skip"), tmp_path / "run")
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["clients/refused"] for line in lines] == [6, 6, 6]
