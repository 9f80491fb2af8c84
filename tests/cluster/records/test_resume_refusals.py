"""What resume heals, what it accepts to be changed, and what it refuses, each by a message that names it."""

import json
import os

import pytest

import cluster
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.records.checkpoint import CheckpointError, latest, list_rounds, load_checkpoint, save_checkpoint
from cluster.records.run_folder import RunFolder, RunFolderError, comparable
from cluster.rounds.driver import Driver
from cluster.rounds.ledger import ReplayError
from tests.cluster.records.interrupted_runs import assert_same_run, drive, federated

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def interrupted(cache, tmp_path):
    """A run killed after round 3, whose last checkpoint is that of round 2, and the undisturbed one."""
    config = federated(cache, algorithm={"name": "topk", "sparsity": 0.8})
    federation = Federation.of(config)
    drive(RunFolder.create(tmp_path / "reference", config), federation)
    folder = RunFolder.create(tmp_path / "run", config)
    drive(folder, federation, killed_at=3)
    assert list_rounds(folder.checkpoints) == [2]
    return folder


@pytest.mark.parametrize("torn", ['{"round": 4, "times', "{", '{"round": 4}', "\0\0\0"])
def test_a_torn_last_line_is_healed(interrupted, torn):
    whole = interrupted.rounds_file.read_bytes()
    with open(interrupted.rounds_file, "a") as file:
        file.write(torn)
    # A reader leaves it alone: the line may be one that the driver is just writing.
    assert [line["round"] for line in interrupted.rounds()] == [1, 2, 3]
    assert interrupted.rounds_file.read_bytes() == whole + torn.encode()
    cluster.resume(interrupted.path)
    assert_same_run(interrupted.path, interrupted.path.parent / "reference")
    assert interrupted.rounds_file.read_bytes().startswith(whole)


def test_what_cannot_change_a_result_may_be_overridden(interrupted):
    harmless = [
        "actors=3",
        "checkpoint_every=1",
        "stop_after=4",
        "cpus_per_actor=0.5",
        "tracking.tags.who=me",
    ]
    stopped = cluster.resume(interrupted.path, harmless)
    assert stopped.summary["rounds"] == 4
    config = interrupted.config()
    assert (config.actors, config.checkpoint_every, config.tracking.tags) == (3, 1, {"who": "me"})
    assert list_rounds(interrupted.checkpoints)[-2:] == [3, 4]
    cluster.resume(interrupted.path, ["stop_after=null"])
    assert_same_run(interrupted.path, interrupted.path.parent / "reference")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["seed=1"], "seed"),
        (["algorithm.sparsity=0.7"], "algorithm.sparsity"),
        (["local.lr=0.2", "actors=3"], "local.lr"),
        (["rounds=6"], "rounds"),
        (
            ["algorithm.name=fedavg"],
            "algorithm.cut_received, algorithm.guard_layers, algorithm.name, algorithm.sparsity",
        ),
        (["partition.alpha=2", "cohort=3"], "cohort, partition.alpha"),
    ],
)
def test_anything_else_is_refused(interrupted, overrides, named):
    before = {path: path.read_bytes() for path in interrupted.path.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=f"^{named}: would change the result .* resume accepts .*stop_after"
    ):
        cluster.resume(interrupted.path, overrides)
    assert before == {path: path.read_bytes() for path in interrupted.path.rglob("*") if path.is_file()}


def test_a_wrong_override_is_a_clear_error(interrupted):
    with pytest.raises(ConfigError, match="did you mean stop_after"):
        cluster.resume(interrupted.path, ["stop_aftr=3"])


def test_a_tampered_line_is_noticed(interrupted):
    lines = interrupted.rounds()
    lines[2]["train/loss"] += 1e-9
    interrupted.rounds_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        ReplayError, match=r"round 3 computed again differs from .*rounds.jsonl in train/loss"
    ):
        cluster.resume(interrupted.path)


def test_a_checkpoint_of_another_configuration_is_refused(interrupted):
    text = (interrupted.path / "config.yaml").read_text()
    assert "seed: 3" in text
    (interrupted.path / "config.yaml").write_text(text.replace("seed: 3", "seed: 4", 1))
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        cluster.resume(interrupted.path, trust=True)


def test_a_damaged_checkpoint_names_the_way_on_and_the_way_works(cache, tmp_path):
    config = federated(cache)
    federation = Federation.of(config)
    drive(RunFolder.create(tmp_path / "reference", config), federation)
    folder = RunFolder.create(tmp_path / "run", config)
    drive(folder, federation, killed_at=4)
    path = latest(folder.checkpoints)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"round-000004.* delete it to resume from round 2"):
        cluster.resume(folder.path)
    os.unlink(path)
    cluster.resume(folder.path)
    assert_same_run(folder.path, tmp_path / "reference")


def test_no_run_and_taken_folders(cache, tmp_path, interrupted):
    with pytest.raises(RunFolderError, match="holds no run"):
        cluster.resume(tmp_path / "nothing")
    with pytest.raises(RunFolderError, match="exists and is not empty; go on with it: sparsyfed resume"):
        cluster.run(federated(cache), interrupted.path)


def test_a_run_that_fails_before_its_first_round_leaves_no_folder(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(Driver, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        cluster.run(federated(cache), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refusal_is_compared_by_client_not_by_its_words():
    lines = [{"clients/refused_list": [[3, f"lost after {seconds} s"]]} for seconds in (1, 2)]
    assert comparable(lines[0]) == comparable(lines[1])
    assert comparable(lines[0]) != comparable({"clients/refused_list": [[4, "lost after 1 s"]]})


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"local": {"lr_final": 0.01, "lr_horizon": 3}}, "held the learning rate from local.lr_horizon on"),
        ({"local": {"lr_final": 0.01, "lr_horizon": 5}}, None),
        ({"algorithm": {"name": "zerofl", "sparsity": 0.8}}, "SWAT takes the ceiling"),
        ({"devices": {"flops": "sparse"}, "schedule": {"deadline": 1e9}}, "counted sparse FLOPs"),
        ({"devices": {"flops": "sparse"}}, None),
        ({"algorithm": {"name": "fedavg"}}, None),
    ],
)
def test_a_checkpoint_of_older_rules_goes_on_where_they_make_no_difference(
    cache, tmp_path, overrides, reason
):
    config = federated(cache, **({"algorithm": {"name": "topk", "sparsity": 0.8}} | overrides))
    assert config.rounds == 5
    folder = RunFolder.create(tmp_path / "run", config)
    drive(folder, Federation.of(config), killed_at=3)
    path = latest(folder.checkpoints)
    stored = load_checkpoint(path)
    del stored.driver["rules"]  # as version 0.1 wrote it
    save_checkpoint(folder.checkpoints, stored, best_round=None)
    if reason is None:
        lines = [json.loads(line) for line in folder.rounds_file.read_text().splitlines()]
        for line in lines:
            del line["masks/client_cut"]  # which 0.1 did not measure yet
        folder.rounds_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = cluster.resume(folder.path).summary
        assert summary["rounds"] == 5
        # Its sparse FLOPs were counted by two rules.
        assert summary["measures"] == {"flops/sparse": 0}
    else:
        with pytest.raises(
            CheckpointError, match=f"made by an older version, wh.*{reason}.*start the run anew"
        ):
            cluster.resume(folder.path)
