"""Resume goes on only from what it can stand on: sound lines, the same data, partition, code and torch."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import cluster
from cluster.federation import Federation
from cluster.records import resuming
from cluster.records.checkpoint import CheckpointError, list_rounds, read_meta
from cluster.records.resuming import ChangedError
from cluster.records.run_folder import RunFolder, RunFolderError
from cluster.rounds import conduct
from tests import tiny_experiment
from tests.cluster.records.interrupted_runs import assert_same_run, drive, federated

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    folder = RunFolder.create(tmp_path_factory.mktemp("whole") / "run", federated(cache))
    drive(folder, Federation.of(folder.config()))
    return folder.path


@pytest.fixture
def interrupted(cache, tmp_path):
    """Killed after round 4, whose line is stored: checkpoints of rounds 2 and 4."""
    folder = RunFolder.create(tmp_path / "run", federated(cache))
    drive(folder, Federation.of(folder.config()), killed_at=4)
    assert list_rounds(folder.checkpoints) == [2, 4]
    return folder


def everything(folder):
    return {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------- lines

DAMAGE = {
    "missing": lambda lines: lines[:2] + lines[3:],
    "doubled": lambda lines: [*lines[:3], lines[2], lines[3]],
    "reordered": lambda lines: [*lines[:2], lines[3], lines[2]],
    "cut in the middle": lambda lines: [*lines[:2], lines[2][:40] + "\n", lines[3]],
    "zeros": lambda lines: [*lines[:2], "\0" * 50 + "\n", lines[3]],
    "not an object": lambda lines: [*lines[:2], "3\n", lines[3]],
    "empty": lambda lines: [*lines[:2], "\n", *lines[2:]],
    "without a round": lambda lines: [*lines[:2], '{"loss": 1}\n', *lines[2:]],
    "ends too early": lambda lines: lines[:2],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_the_last_checkpoint_that_the_lines_cover_is_taken(case, interrupted, undisturbed):
    lines = interrupted.rounds_file.read_text().splitlines(keepends=True)
    damaged = "".join(DAMAGE[case](lines))
    interrupted.rounds_file.write_text(damaged)
    result = cluster.resume(interrupted.path)
    assert result.summary["complete"]
    assert_same_run(interrupted.path, undisturbed)
    kept = interrupted.path / "rounds.jsonl.before-resume"
    if case == "ends too early":
        assert not kept.exists()
    else:
        assert kept.read_text() == damaged


EARLY = {
    "missing": (lambda lines: lines[1:], r"line 1 is round 2 where round 1 is due"),
    "reordered": (lambda lines: [lines[1], lines[0], *lines[2:]], r"line 1 is round 2 where round 1 is due"),
    "damaged": (lambda lines: ["{\n", *lines[1:]], r"line 1 is damaged \(round 1 is due there\)"),
    "gone": (lambda lines: [], r"it ends after round 0"),
}


@pytest.mark.parametrize("case", EARLY)
def test_lines_that_cover_no_checkpoint_are_one_clear_line(case, interrupted, undisturbed):
    damage, message = EARLY[case]
    lines = interrupted.rounds_file.read_text().splitlines(keepends=True)
    interrupted.rounds_file.write_text("".join(damage(lines)))
    before = everything(interrupted)
    with pytest.raises(
        RunFolderError, match=message + r", and no checkpoint is that old \(there is round 2, 4\)"
    ):
        cluster.resume(interrupted.path)
    assert everything(interrupted) == before
    for number in (2, 4):  # the way on that the message names
        (interrupted.checkpoints / f"round-{number:06d}.safetensors").unlink()
    cluster.resume(interrupted.path)
    assert_same_run(interrupted.path, undisturbed)


# ------------------------------------------------------------------------------------------------- ground


def other_images():
    arrays = tiny_experiment.tiny_images()
    return {**arrays, "train_images": np.flip(arrays["train_images"], axis=2).copy()}


@pytest.mark.parametrize("what", ["sparsyfed's code", "torch", "the data"])
def test_what_changed_since_is_named_and_may_be_gone_over_knowingly(what, interrupted, monkeypatch):
    made = read_meta(interrupted.checkpoints / "round-000004.safetensors")["stands_on"]
    assert made.keys() == {"data", "partition", "code", "torch"}
    if what == "sparsyfed's code":
        monkeypatch.setattr(resuming, "code_digest", lambda: "cafe")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    else:
        images = other_images()
        monkeypatch.setattr(tiny_experiment, "tiny_images", lambda: images)
    before = everything(interrupted)
    with pytest.raises(ChangedError, match=rf"checkpoint of round 4: {what} \(.*, now .*--anyway") as refusal:
        cluster.resume(interrupted.path)
    assert str(refusal.value).count(", now ") == 1
    assert everything(interrupted) == before
    result = cluster.resume(interrupted.path, anyway=True)
    assert result.summary["complete"]
    assert [line["round"] for line in interrupted.rounds()] == [1, 2, 3, 4, 5]
    cluster.resume(interrupted.path)  # its new checkpoints stand on what is there now


def test_a_checkpoint_without_fingerprints_still_resumes(interrupted, undisturbed, monkeypatch):
    """Those of 0.1 have none."""
    load = resuming.load_checkpoint
    monkeypatch.setattr(resuming, "load_checkpoint", lambda path: replace(load(path), stands_on={}))
    monkeypatch.setattr(resuming, "code_digest", lambda: "cafe")
    cluster.resume(interrupted.path)
    assert_same_run(interrupted.path, undisturbed)


# ------------------------------------------------------------------------------------------ before writing


def test_a_configuration_that_was_cut_short_is_not_taken_for_a_short_one(interrupted):
    text = (interrupted.path / "config.yaml").read_text()
    for cut in range(0, len(text) - 1, 97):
        (interrupted.path / "config.yaml").write_text(text[:cut])
        before = everything(interrupted)
        with pytest.raises(cluster.ConfigError.__mro__[1]):  # a UserError, whichever notices first
            cluster.resume(interrupted.path)
        assert everything(interrupted) == before, cut


def test_a_tracking_server_that_is_away_does_not_keep_a_run_from_going_on(
    cache, tmp_path, undisturbed, monkeypatch, fast_tracking
):
    monkeypatch.setattr(conduct, "TRACKING_DEADLINE_S", 0.5)
    config = federated(cache, tracking={"enabled": True, "uri": "http://127.0.0.1:9"})
    folder = RunFolder.create(tmp_path / "run", config)
    drive(folder, Federation.of(config), killed_at=4)
    result = cluster.resume(folder.path)
    assert (result.summary["complete"], result.summary["tracking_delivered"]) == (True, False)
    assert_same_run(folder.path, undisturbed)
    with pytest.raises(Exception, match="does not answer"):  # another one is looked at
        cluster.resume(folder.path, ["tracking.uri=http://127.0.0.1:1"])


def test_a_checkpoint_that_is_only_out_of_reach_is_not_called_damaged(interrupted, monkeypatch):
    path = interrupted.checkpoints / "round-000004.safetensors"
    path.unlink()
    path.mkdir()  # root reads every file: a folder in its place cannot be read by anybody
    with pytest.raises(CheckpointError, match=r"round-000004.* cannot be read \(Is a directory\)") as refusal:
        cluster.resume(interrupted.path)
    assert "delete" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.pop("mask_version"), "was made by sparsyfed .* and lacks mask_version"),
        (lambda meta: meta["driver"].pop("held"), "made by another version of sparsyfed and lacks held"),
        (lambda meta: meta.update(format=99), "which is newer than this one"),
        (
            lambda meta: [meta.pop(key) for key in ("version", "digest")],
            "an older version of .* lacks digest",
        ),
    ],
)
def test_a_checkpoint_of_another_version_is_one_line(change, message, interrupted):
    from safetensors import safe_open
    from safetensors.torch import save

    from cluster.records.checkpoint import checksum

    path = interrupted.checkpoints / "round-000004.safetensors"
    with safe_open(path, framework="pt") as stored:
        meta = json.loads(stored.metadata()["meta"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    change(meta)
    text = json.dumps(meta)
    path.write_bytes(save(tensors, {"meta": text, "sha256": checksum(tensors, text)}))
    with pytest.raises(CheckpointError, match=message):
        cluster.resume(interrupted.path)
