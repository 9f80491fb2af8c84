"""A checkpoint comes back bit for bit, is whole or absent, and says so where it was damaged."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from algorithms import ServerState
from cluster.records.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest,
    list_rounds,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)


def checkpoint(round_number=3):
    """Awkward values: -0.0, the smallest subnormal, a NaN, an infinity."""
    weights = torch.linspace(-1, 1, 1000)
    weights[:4] = torch.tensor([-0.0, 1e-45, float("nan"), float("inf")])
    state = ServerState(
        round=round_number,
        weights=weights,
        mask=torch.arange(700) % 3 == 0,
        mask_version=5,
        moments=(torch.full((900,), 0.1), torch.rand(900, generator=torch.Generator().manual_seed(1))),
        arrays={
            "scores": torch.arange(6, dtype=torch.float64).view(2, 3),
            "counts": torch.tensor([1, 2**62]),
            "seed": torch.tensor(2**63 - 1),
            "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            "nothing": torch.zeros(0),
            # A view of the weights, and one that is not contiguous.
            "first": weights[:10],
            "across": torch.arange(6.0).view(2, 3).T,
        },
    )
    driver = {
        "totals": {"comm/uplink_bytes": 7},
        "held": {"version": 1, "clients": [3]},
        "waiting": {"round": 3, "a": 0.1, "b": None},
    }
    return Checkpoint(state, driver, "abc-def")


def same_bits(first, second):
    assert first.dtype == second.dtype
    assert first.shape == second.shape
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    assert torch.equal(first, second)


def assert_same(found, expected):
    assert found.driver == expected.driver
    assert found.digest == expected.digest
    a, b = found.state, expected.state
    assert (a.round, a.mask_version, len(a.moments)) == (b.round, b.mask_version, len(b.moments))
    same_bits(a.weights, b.weights)
    for one, other in zip(a.moments, b.moments, strict=True):
        same_bits(one, other)
    assert a.arrays.keys() == b.arrays.keys()
    for name in b.arrays:
        same_bits(a.arrays[name], b.arrays[name])
    assert (a.mask is None) == (b.mask is None)
    if b.mask is not None:
        same_bits(a.mask, b.mask)


def test_everything_comes_back_bit_for_bit(tmp_path):
    expected = checkpoint()
    path = save_checkpoint(tmp_path, expected, best_round=None)
    assert path == latest(tmp_path) == tmp_path / "round-000003.safetensors"
    assert_same(load_checkpoint(path), expected)


def test_a_method_without_mask_and_moments(tmp_path):
    expected = Checkpoint(ServerState(round=0, weights=torch.ones(3)), {}, "x")
    found = load_checkpoint(save_checkpoint(tmp_path, expected, best_round=None))
    assert_same(found, expected)
    assert found.state.mask is None
    assert found.state.moments == ()


def test_what_is_loaded_does_not_lean_on_the_file(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(), best_round=None)
    found = load_checkpoint(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(found, checkpoint())


def test_no_pickle(tmp_path, monkeypatch):
    import pickle

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    path = save_checkpoint(tmp_path, checkpoint(), best_round=None)
    load_checkpoint(path)
    # The header is plain JSON behind its length, as the safetensors format says.
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert "meta" in json.loads(content[8 : 8 + length])["__metadata__"]


# ------------------------------------------------------------------------------------------ what is kept


def save_rounds(folder, rounds, best=None):
    for round_number in rounds:
        save_checkpoint(folder, checkpoint(round_number), best_round=best)


def test_the_last_two_are_kept(tmp_path):
    save_rounds(tmp_path, [1, 2, 3, 10, 11])
    assert list_rounds(tmp_path) == [10, 11]


def test_later_ones_are_of_lost_rounds(tmp_path):
    save_rounds(tmp_path, [3, 11, 12])
    for number in (4, 5, 6):
        save_checkpoint(tmp_path, checkpoint(number), best_round=None)
    assert list_rounds(tmp_path) == [5, 6]


def test_the_best_is_kept_too(tmp_path):
    save_rounds(tmp_path, [1, 2, 3, 4, 5], best=2)
    assert list_rounds(tmp_path) == [2, 4, 5]
    save_checkpoint(tmp_path, checkpoint(6), best_round=4)  # a new best: the old one goes
    assert list_rounds(tmp_path) == [4, 5, 6]


def test_other_files_are_none_of_its_business(tmp_path):
    (tmp_path / "round-000001.safetensors.bak").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    save_rounds(tmp_path, [2, 3, 4])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes.txt",
        "round-000001.safetensors.bak",
        "round-000003.safetensors",
        "round-000004.safetensors",
    ]


def test_no_folder_no_checkpoint(tmp_path):
    assert latest(tmp_path / "none") is None
    assert list_rounds(tmp_path / "none") == []
    assert latest(tmp_path) is None


# ------------------------------------------------------------------------------------------- atomicity

CRASH = """
import os, signal, sys
from pathlib import Path
from cluster.records.checkpoint import save_checkpoint
from tests.cluster.records.test_checkpoint import checkpoint

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

for kind in ("fsync", "replace"):
    child = os.fork()
    if child == 0:
        setattr(os, kind, die)
        save_checkpoint(Path(sys.argv[1]) / kind, checkpoint(5), best_round=None)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_a_crash_inside_the_write_leaves_the_old_files_whole(tmp_path):
    # fsync: the data may be anything on the disk. replace: it is whole, but has no name yet.
    folders = [tmp_path / "fsync", tmp_path / "replace"]
    for folder in folders:
        save_rounds(folder, [3, 4])
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    ended = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], capture_output=True, text=True)
    assert ended.stdout.split() == [str(int(signal.SIGKILL))] * 2, ended.stderr
    for folder in folders:
        left = [path for path in folder.iterdir() if not path.name.startswith(".")]
        assert all(path.read_bytes() == before[path] for path in left)
        assert list_rounds(folder) == [3, 4]
        assert_same(load_checkpoint(latest(folder)), checkpoint(4))
        assert len(list(folder.glob(".*.tmp"))) == 1
        save_checkpoint(folder, checkpoint(5), best_round=None)  # which clears what the crash left
        assert sorted(p.name for p in folder.iterdir()) == [f"round-00000{r}.safetensors" for r in (4, 5)]


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new, and longer")
    assert path.read_bytes() == b"old"


# --------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with checkpoints of rounds 3 and 4, and the bytes and header length of the latter."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_rounds(folder, [3, 4])
    content = latest(folder).read_bytes()
    return folder, content, 8 + int.from_bytes(content[:8], "little")


def assert_refused(stored, damaged):
    folder, _, _ = stored
    path = latest(folder)
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path)
    text = str(raised.value)
    assert str(path) in text
    assert "damaged checkpoint" in text
    assert "delete it to resume from round 3" in text


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.2, 0.5, 0.999])
def test_truncated(stored, share):
    content = stored[1]
    assert_refused(stored, content[: int(share * len(content))])


def test_longer_than_it_was(stored):
    assert_refused(stored, stored[1] + b"\0")


def test_a_flipped_byte_in_the_tensors(stored):
    _, content, header = stored
    for place in np.linspace(header, len(content) - 1, 40).astype(int):
        damaged = bytearray(content)
        damaged[place] ^= 1
        assert_refused(stored, bytes(damaged))


@pytest.mark.parametrize(("bit", "step"), [(1, 1), (0x10, 5), (0x80, 5)])
def test_any_flipped_byte_in_the_header(stored, bit, step):
    """Length, names, types, offsets, metadata and checksum: no byte may go unnoticed.

    One exception is harmless: padding of the header with another kind of white space.
    """
    folder, content, header = stored
    path = latest(folder)
    unnoticed = []
    for place in range(0, header, step):
        damaged = bytearray(content)
        damaged[place] ^= bit
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except CheckpointError:
            continue
        unnoticed.append(place)
        assert_same(found, checkpoint(4))
    assert len(unnoticed) <= 8


def test_a_checkpoint_of_another_shape_is_refused(stored):
    """A header that was edited consistently: the checksum covers types and shapes too."""
    _, content, header = stored
    edited = content[8:header].replace(b'"shape":[2,3]', b'"shape":[3,2]')
    assert edited != content[8:header]
    assert_refused(stored, content[:8] + edited + content[header:])


def test_no_checkpoint_at_all(stored, tmp_path):
    with pytest.raises(CheckpointError, match="no other checkpoint is left"):
        load_checkpoint(tmp_path / "round-000001.safetensors")


def test_a_newer_state_does_not_touch_an_older_one(tmp_path):
    first = checkpoint(1)
    save_checkpoint(tmp_path, first, best_round=None)
    moved = replace(first.state, round=2, weights=first.state.weights + 1)
    save_checkpoint(tmp_path, Checkpoint(moved, {}, "x"), best_round=None)
    assert_same(load_checkpoint(tmp_path / "round-000001.safetensors"), first)
