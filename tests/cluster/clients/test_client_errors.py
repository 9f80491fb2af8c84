"""A client that fails: it ends the run by name, or is skipped, counted and named like a refused one."""

from dataclasses import replace

import pytest

import cluster
from cluster.clients.local_training import Trainer
from cluster.exchange import ClientError, ClientReport
from cluster.records.run_folder import RunFolder
from cluster.rounds.setbacks import Setbacks
from cluster.transport.uplink import Uplink
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def config(tmp_path):
    """All of six clients in every round; client 2 will fail in round 2."""
    return lambda **more: tiny_federation(tmp_path, cohort=6, **more)


@pytest.fixture
def failing(monkeypatch):
    visit = Trainer.visit

    def fail(self, client, rows, sparsity, broadcast, *rest, **more):
        if (broadcast.instructions.round, client) == (2, 2):
            raise ValueError("planted failure")
        return visit(self, client, rows, sparsity, broadcast, *rest, **more)

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
    fold, folded = Uplink.fold, []

    def refuse(self, total, client, *others):
        folded.append(client)
        # Every client is asked each round.
        return "refused" if client == folded.count(client) == 2 else fold(self, total, client, *others)

    monkeypatch.setattr(Uplink, "fold", refuse)
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


@pytest.fixture
def all_failing(monkeypatch):
    def fail(*_, **__):
        raise ValueError("planted failure")

    monkeypatch.setattr(Trainer, "visit", fail)


def test_rounds_in_which_every_client_fails_end_the_run_until_they_are_cured(
    config, all_failing, tmp_path, monkeypatch
):
    failed = "every client failed in 3 rounds in a row, last in round {}: client 0: failed in stage train: "
    with pytest.raises(ClientError, match=failed.format(3) + "ValueError: planted failure"):
        cluster.run(config(rounds=7, on_client_error="skip", stop_after=3), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert [line["clients/refused"] for line in folder.rounds()] == [6, 6, 6]
    with pytest.raises(ClientError, match=failed.format(3)):  # nothing is left to compute, and nothing was
        cluster.resume(folder.path)
    with pytest.raises(ClientError, match=failed.format(6)):
        cluster.resume(folder.path, ["stop_after=null"])
    assert folder.result() is None
    monkeypatch.undo()
    assert cluster.resume(folder.path).summary["complete"]
    assert [line["clients/refused"] for line in folder.rounds()] == [6, 6, 6, 6, 6, 6, 0]


def test_a_stage_before_round_1_in_which_every_client_fails_says_so(config, all_failing, tmp_path):
    flash = {"name": "flash", "sparsity": 0.8, "stage1": "sensitivity", "init_fraction": 1.0}
    with pytest.raises(
        ClientError, match="before round 1 failed: client 0: failed in stage train: ValueError"
    ):
        cluster.run(config(algorithm=flash, on_client_error="skip"), tmp_path / "run")


def reports(*kinds):
    """Reports of clients that failed, were refused (above the norm) or were late."""
    skipped = ClientReport.failed(0, 20, 1, "failed in stage train: planted")
    refused = replace(skipped, skipped=False)
    of = {"failed": skipped, "refused": refused, "late": replace(refused, refused=None, late=True)}
    return [of[kind] for kind in kinds]


@pytest.mark.parametrize(
    ("kinds", "counts"),
    [
        (["failed", "failed"], (0, 1)),
        (["failed", "refused"], (1, 0)),
        (["refused", "refused"], (1, 0)),
        (["refused", "late"], (0, 0)),
        (["failed", "late"], (0, 0)),
        ([], (0, 0)),
    ],
)
def test_only_refused_updates_are_taken_for_divergence(kinds, counts):
    setbacks = Setbacks()
    setbacks.count(1, reports(*kinds))
    assert (setbacks.refused, setbacks.failed) == counts
