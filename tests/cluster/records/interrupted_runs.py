"""Runs that are cut off after a round, and what it means that one equals the undisturbed one."""

import pytest

from cluster.records.checkpoint import latest, load_checkpoint
from cluster.records.run_folder import RunFolder, comparable
from cluster.rounds.driver import Driver
from cluster.rounds.engine import InlineEngine
from tests.tiny_experiment import tiny_federation

ROUNDS = 5


class Killed(BaseException):
    """Stands for the end of the process: nothing after it is run."""


def federated(cache, **overrides):
    """Five rounds on six clients of unequal size, checkpoints every second, a falling learning rate."""
    local = {"batch_size": 16, "lr": 0.3, "lr_final": 0.05, "weight_decay": 1e-3} | overrides.pop("local", {})
    return tiny_federation(cache, rounds=ROUNDS, checkpoint_every=2, local=local, **overrides)


def drive(folder, federation, *, killed_at=None):
    """Run from where the folder stands; ``killed_at`` ends it when that round's line has been stored."""

    def on_line(line):
        if line["round"] == killed_at:
            raise Killed

    driver = Driver(folder, federation, InlineEngine(federation.setup()), on_line=on_line)
    if killed_at is None:
        return driver.run()
    with pytest.raises(Killed):
        driver.run()
    assert not folder.model_file.exists()
    return None


def assert_same_run(folder, reference):
    """Model file byte by byte, lines but for what depends on the machine, and the state behind them."""
    folder, reference = RunFolder(folder), RunFolder(reference)
    assert folder.model_file.read_bytes() == reference.model_file.read_bytes()
    found, expected = folder.rounds(), reference.rounds()
    assert [comparable(line) for line in found] == [comparable(line) for line in expected]
    one, other = (load_checkpoint(latest(run.checkpoints)) for run in (folder, reference))
    assert_same_state(one.state, other.state)
    for key in ("totals", "held", "refused_rounds"):
        assert one.driver[key] == other.driver[key]


def assert_same_state(found, expected):
    """Weights, mask, moments and arrays, bit for bit."""
    assert (found.round, found.mask_version) == (expected.round, expected.mask_version)
    tensors = [
        {"weights": s.weights, "mask": s.mask, **dict(enumerate(s.moments)), **s.arrays}
        for s in (found, expected)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        assert (tensors[0][name] is None) == (tensor is None)
        assert tensor is None or tensors[0][name].numpy().tobytes() == tensor.numpy().tobytes(), name
